//! Total order by one process of each component: it counts, and everybody delivers what
//! arrives from it, in the order of its links. n messages for n subscribers, two one-way
//! delays at the initiator. It hears of all operations of its component, and delivers
//! those that it subscribes to.

use std::collections::BTreeMap;

use super::frame::Message;
use super::ids::{OperationId, OrderKey, ProcessId, VariableId};
use super::refusal::Refusal;
use super::rules::Rules;
use super::skeen::Effect;
use super::subscriptions::{Subscriptions, Variable};
use super::value::Operation;
use crate::limits::{ORDERED_CLOCK_JUMP, ORDERED_TIME_CEILING};

/// This process's part in it: whose turn it is to count, and how far that went.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sequencer {
    me: ProcessId,
    /// Who counts for each variable.
    counts_for: BTreeMap<VariableId, ProcessId>,
    /// The last time given out, if this process counts.
    given: u64,
    /// The last time that came from each other process that counts.
    heard: BTreeMap<ProcessId, u64>,
    start: u64,
}

impl Sequencer {
    /// A process whose keys are later than `start`.
    pub(super) fn new<R: Rules>(me: ProcessId, start: u64, subscriptions: &Subscriptions) -> Self {
        Self {
            me,
            counts_for: subscriptions.sequencers(if R::SHARE_ANY { 1 } else { 2 }),
            given: start,
            heard: BTreeMap::new(),
            start,
        }
    }

    /// The latest time known here.
    pub(super) fn clock(&self) -> u64 {
        let heard = self.heard.values().copied().max();
        self.given.max(heard.unwrap_or(self.start))
    }

    pub(super) fn of(&self, variable: VariableId) -> Option<ProcessId> {
        self.counts_for.get(&variable).copied()
    }

    /// Begins an own operation.
    pub(super) fn submit(
        &mut self,
        id: OperationId,
        variable: &Variable,
        operation: Operation,
        out: &mut Vec<Effect>,
    ) {
        match self.of(variable.id) {
            Some(counting) if counting != self.me => {
                let submit = Message::Submit {
                    id,
                    variable: variable.id,
                    operation,
                };
                out.push(Effect::Send(counting, submit));
            }
            _ => self.count(id, variable, operation, out),
        }
    }

    /// A peer's operation that this process has to count.
    pub(super) fn submitted(
        &mut self,
        from: ProcessId,
        (id, variable, operation): (OperationId, &Variable, Operation),
        out: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        if self.of(variable.id) != Some(self.me) {
            return Err(Refusal::WrongOrder { process: from });
        }
        self.count(id, variable, operation, out);
        Ok(())
    }

    /// The next operation, from the process that counts.
    pub(super) fn ordered(
        &mut self,
        from: ProcessId,
        (key, variable, operation): (OrderKey, VariableId, Operation),
        out: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        if self.of(variable) != Some(from) {
            return Err(Refusal::WrongOrder { process: from });
        }
        let last = self.heard.get(&from).copied().unwrap_or(self.start);
        let ahead = key.time.saturating_sub(last);
        if !(1..=ORDERED_CLOCK_JUMP).contains(&ahead) || key.time >= ORDERED_TIME_CEILING {
            return Err(Refusal::Time {
                process: from,
                time: key.time,
                clock: last,
            });
        }
        self.heard.insert(from, key.time);
        out.push(Effect::Deliver(key, variable, operation));
        Ok(())
    }

    fn count(
        &mut self,
        id: OperationId,
        variable: &Variable,
        operation: Operation,
        out: &mut Vec<Effect>,
    ) {
        self.given += 1;
        let key = OrderKey {
            time: self.given,
            id,
        };
        let ordered = Message::Ordered {
            key,
            variable: variable.id,
            operation: operation.clone(),
        };
        out.push(Effect::Spread(variable.id, ordered));
        if variable.has(self.me) {
            out.push(Effect::Deliver(key, variable.id, operation));
        }
    }
}
