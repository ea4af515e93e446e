//! What a session begins with, and how the next one is made from what is left.

use std::collections::BTreeMap;

use super::ids::{OrderKey, ProcessId, VariableId};
use super::subscriptions::{Subscriptions, Variable};
use super::value::{Operation, Value, ValueError};
use crate::checksum::{Digest, digest};
use crate::limits::ORDERED_TIME_CEILING;

/// What a process begins a session with, or ended one with
/// ([`Process::state`](super::Process::state)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Start {
    /// Keys of the session are later than this.
    pub time: u64,
    /// What variables hold; those left out hold what their kind begins with.
    pub values: BTreeMap<VariableId, Value>,
}

/// Why a process cannot start like this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The number 0 is no life.
    #[error("the incarnation is 0; draw a random one")]
    Incarnation,
    /// A start value does not fit.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The start time leaves no room.
    #[error("start time {time} is beyond half of what logical time has")]
    Time {
        /// What was given.
        time: u64,
    },
}

impl Start {
    /// What `variable` holds in it.
    pub(super) fn value(&self, variable: &Variable) -> Value {
        let stated = self.values.get(&variable.id).cloned();
        stated.unwrap_or_else(|| variable.kind.initial())
    }

    /// Checks the values that are given against `subscriptions`; those of variables that
    /// are not configured are ignored.
    pub(super) fn check(&self, subscriptions: &Subscriptions) -> Result<(), StartError> {
        for (id, value) in &self.values {
            if let Some(variable) = subscriptions.variable(*id) {
                value.check(*id, variable.kind)?;
            }
        }
        if self.time > ORDERED_TIME_CEILING / 2 {
            return Err(StartError::Time { time: self.time });
        }
        Ok(())
    }

    /// The digest of what both `one` and `other` start from.
    pub(super) fn digest(
        &self,
        subscriptions: &Subscriptions,
        one: ProcessId,
        other: ProcessId,
    ) -> Digest {
        let mut bytes = self.time.to_le_bytes().to_vec();
        for variable in subscriptions.of(one).filter(|v| v.has(other)) {
            bytes.extend(variable.id.0.to_le_bytes());
            match self.value(variable) {
                Value::Integer(number) => bytes.extend(number.to_le_bytes()),
                Value::Bytes(content) => {
                    bytes.extend((content.len() as u32).to_le_bytes());
                    bytes.extend(content.iter());
                }
            }
        }
        digest(&bytes)
    }
}

/// What the next session starts from: of each variable the value of the subscriber that
/// delivered furthest, and a time after everything that was delivered. Each process gives
/// its last delivered key and its state; those that lost their memory give nothing.
///
/// A subscriber whose last key is k has delivered every operation on its variables up to
/// k, so the greatest one's value is the newest.
pub fn merge_states<'a>(
    subscriptions: &Subscriptions,
    states: impl IntoIterator<Item = (ProcessId, Option<OrderKey>, &'a Start)>,
) -> Start {
    let mut merged = Start::default();
    let mut newest: BTreeMap<VariableId, Option<OrderKey>> = BTreeMap::new();
    for (process, last, state) in states {
        merged.time = merged
            .time
            .max(state.time)
            .max(last.map_or(0, |key| key.time));
        for variable in subscriptions.of(process) {
            let best = newest.get(&variable.id);
            if best.is_none_or(|best| *best < last) {
                newest.insert(variable.id, last);
                merged.values.insert(variable.id, state.value(variable));
            }
        }
    }
    merged
}

/// Replays operations on one variable; shared by what delivers and what checks.
pub(super) fn apply(value: &mut Value, operation: &Operation) -> (bool, Value) {
    let old = value.clone();
    match operation.applied_to(&old) {
        Some(new) => {
            *value = new;
            (true, old)
        }
        None => (false, old),
    }
}
