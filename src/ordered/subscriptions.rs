//! Who subscribes to what: static, equal everywhere, compared by digest at the hello.

use std::collections::{BTreeMap, BTreeSet};

use super::ids::{ProcessId, VariableId};
use super::refusal::SubmitError;
use super::value::ValueType;
use crate::checksum::{Digest, digest};
use crate::limits::{MAX_VARIABLE_PROCESSES, MAX_VARIABLES};

/// One variable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Variable {
    /// Its number.
    pub id: VariableId,
    /// What it holds.
    pub kind: ValueType,
    /// Who reads, writes and hears it; [`Subscriptions::new`] sorts them.
    pub subscribers: Vec<ProcessId>,
}

/// How operations get their places.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum OrderKind {
    /// By agreement of a variable's subscribers; only they exchange messages.
    #[default]
    Skeen,
    /// By one process of each component, the one with the smallest number.
    Sequencer,
}

/// All variables with their subscribers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subscriptions {
    variables: BTreeMap<VariableId, Variable>,
}

/// Why subscriptions cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubscriptionError {
    /// Two variables with one number.
    #[error("variable {variable} is configured twice")]
    Twice {
        /// The number.
        variable: VariableId,
    },
    /// Nobody, or somebody twice.
    #[error("variable {variable} has no subscriber, or one of them twice")]
    Subscribers {
        /// The variable.
        variable: VariableId,
    },
    /// More than [`MAX_VARIABLES`].
    #[error("more than {MAX_VARIABLES} variables")]
    TooManyVariables,
    /// More than [`MAX_VARIABLE_PROCESSES`].
    #[error("{count} processes; at most {MAX_VARIABLE_PROCESSES} may share variables")]
    TooManyProcesses {
        /// How many there are.
        count: usize,
    },
}

impl Variable {
    /// Whether `process` is a subscriber.
    pub fn has(&self, process: ProcessId) -> bool {
        self.subscribers.binary_search(&process).is_ok()
    }

    /// The bit of `process` in a word of subscribers; none if it is not one.
    pub(super) fn bit(&self, process: ProcessId) -> Option<u32> {
        let index = self.subscribers.binary_search(&process).ok()?;
        Some(1 << index)
    }

    /// The bits of all subscribers.
    pub(super) fn bits(&self) -> u32 {
        u32::MAX >> (32 - self.subscribers.len())
    }
}

impl Subscriptions {
    /// Checks and keeps them, each variable's subscribers sorted.
    ///
    /// # Errors
    /// [`SubscriptionError`] for what is double, empty or too many.
    pub fn new(variables: impl IntoIterator<Item = Variable>) -> Result<Self, SubscriptionError> {
        let mut kept = BTreeMap::new();
        for mut variable in variables {
            let id = variable.id;
            variable.subscribers.sort_unstable();
            let doubled = variable.subscribers.windows(2).any(|two| two[0] == two[1]);
            if doubled || variable.subscribers.is_empty() {
                return Err(SubscriptionError::Subscribers { variable: id });
            }
            if kept.insert(id, variable).is_some() {
                return Err(SubscriptionError::Twice { variable: id });
            }
            if kept.len() as u64 > MAX_VARIABLES {
                return Err(SubscriptionError::TooManyVariables);
            }
        }
        let subscriptions = Self { variables: kept };
        let count = subscriptions.processes().len();
        if count as u64 > MAX_VARIABLE_PROCESSES {
            return Err(SubscriptionError::TooManyProcesses { count });
        }
        Ok(subscriptions)
    }

    /// One variable.
    pub fn variable(&self, id: VariableId) -> Option<&Variable> {
        self.variables.get(&id)
    }

    /// All variables, by number.
    pub fn variables(&self) -> impl Iterator<Item = &Variable> {
        self.variables.values()
    }

    /// Those that `process` subscribes to, by number.
    pub fn of(&self, process: ProcessId) -> impl Iterator<Item = &Variable> {
        self.variables.values().filter(move |v| v.has(process))
    }

    /// Everyone who subscribes to anything.
    pub fn processes(&self) -> BTreeSet<ProcessId> {
        let all = self.variables.values().flat_map(|v| &v.subscribers);
        all.copied().collect()
    }

    /// The variable, if `process` subscribes to it.
    ///
    /// # Errors
    /// [`SubmitError::NoVariable`] or [`SubmitError::NotSubscribed`].
    pub fn check(
        &self,
        process: ProcessId,
        variable: VariableId,
    ) -> Result<&Variable, SubmitError> {
        let found = self
            .variable(variable)
            .ok_or(SubmitError::NoVariable { variable })?;
        if found.has(process) {
            Ok(found)
        } else {
            Err(SubmitError::NotSubscribed { process, variable })
        }
    }

    /// Whom `process` needs a link to: all that share a variable with it, and with a
    /// sequencer that one as well (or all of the component, for the sequencer itself).
    pub fn peers(&self, process: ProcessId, order: OrderKind) -> BTreeSet<ProcessId> {
        let mut peers: BTreeSet<_> = self
            .of(process)
            .flat_map(|v| &v.subscribers)
            .copied()
            .collect();
        if order == OrderKind::Sequencer {
            let component = self.component(process);
            match component.first() {
                Some(&first) if first == process => peers = component,
                first => peers.extend(first),
            }
        }
        peers.remove(&process);
        peers
    }

    /// The processes that are joined to `process` by variables that share any
    /// subscriber, itself included; empty if it subscribes to nothing.
    pub fn component(&self, process: ProcessId) -> BTreeSet<ProcessId> {
        let first = self.first_of_components();
        let Some(own) = first.get(&process) else {
            return BTreeSet::new();
        };
        let joined = first.iter().filter(|(_, first)| *first == own);
        joined.map(|(process, _)| *process).collect()
    }

    /// The smallest process of each process's component.
    fn first_of_components(&self) -> BTreeMap<ProcessId, ProcessId> {
        let all = self.processes().into_iter();
        let mut first: BTreeMap<_, _> = all.map(|process| (process, process)).collect();
        // Each round carries it over one more variable; there are at most as many rounds
        // as processes.
        let mut changed = true;
        while changed {
            changed = false;
            for variable in self.variables.values() {
                let of = variable.subscribers.iter();
                let Some(&smallest) = of.filter_map(|process| first.get(process)).min() else {
                    continue;
                };
                for process in &variable.subscribers {
                    changed |= first.insert(*process, smallest) != Some(smallest);
                }
            }
        }
        first
    }

    /// The sequencer of each variable: the smallest process of its component, where two
    /// variables belong together if they share at least `shared` subscribers.
    pub(super) fn sequencers(&self, shared: usize) -> BTreeMap<VariableId, ProcessId> {
        if shared == 1 {
            let first = self.first_of_components();
            let of = |v: &Variable| Some((v.id, *first.get(v.subscribers.first()?)?));
            return self.variables.values().filter_map(of).collect();
        }
        let mut sequencers = BTreeMap::new();
        for variable in self.variables.values() {
            if let Some(&first) = self.joined(variable, shared).first() {
                sequencers.insert(variable.id, first);
            }
        }
        sequencers
    }

    /// The subscribers of all variables that are joined to `from`, directly or by others.
    fn joined(&self, from: &Variable, shared: usize) -> BTreeSet<ProcessId> {
        let mut seen = BTreeSet::from([from.id]);
        let mut open = vec![from];
        let mut processes = BTreeSet::new();
        while let Some(variable) = open.pop() {
            processes.extend(variable.subscribers.iter().copied());
            for other in self.variables.values() {
                let common = other.subscribers.iter().filter(|p| variable.has(**p));
                if !seen.contains(&other.id) && common.count() >= shared {
                    seen.insert(other.id);
                    open.push(other);
                }
            }
        }
        processes
    }

    /// The digest that peers compare: of `order` and of every variable's number, kind and
    /// subscribers.
    pub fn digest(&self, order: OrderKind) -> Digest {
        let mut bytes = vec![1, order as u8];
        for variable in self.variables.values() {
            bytes.extend(variable.id.0.to_le_bytes());
            bytes.push(variable.kind as u8);
            bytes.extend((variable.subscribers.len() as u32).to_le_bytes());
            for process in &variable.subscribers {
                bytes.extend(process.0.to_le_bytes());
            }
        }
        digest(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subscriptions(lists: &[&[u32]]) -> Subscriptions {
        let variables = lists.iter().enumerate().map(|(id, list)| Variable {
            id: VariableId(id as u32),
            kind: ValueType::Integer,
            subscribers: list.iter().map(|&p| ProcessId(p)).collect(),
        });
        Subscriptions::new(variables).expect("usable subscriptions")
    }

    #[test]
    fn components_are_joined_by_any_shared_subscriber() {
        let ring = subscriptions(&[&[0, 1], &[1, 2], &[2, 0], &[7, 8]]);
        let first: BTreeSet<_> = [0, 1, 2].map(ProcessId).into();
        assert_eq!(ring.component(ProcessId(2)), first);
        assert_eq!(ring.component(ProcessId(5)), BTreeSet::new());
        let any: Vec<_> = ring.sequencers(1).into_values().map(|p| p.0).collect();
        assert_eq!(any, [0, 0, 0, 7]);
        let two: Vec<_> = ring.sequencers(2).into_values().map(|p| p.0).collect();
        assert_eq!(two, [0, 1, 0, 7], "each pair on its own");
    }

    /// Time in the square of their number would be minutes, in its cube days.
    #[test]
    fn as_many_variables_as_there_may_be_are_joined_at_once() {
        let begun = std::time::Instant::now();
        let chain: Vec<[u32; 2]> = (0..MAX_VARIABLES as u32)
            .map(|id| [id % 30, id % 30 + 1])
            .collect();
        let chain: Vec<&[u32]> = chain.iter().rev().map(|pair| &pair[..]).collect();
        let all = subscriptions(&chain);
        let sequencers = all.sequencers(1);
        assert_eq!(sequencers.len() as u64, MAX_VARIABLES);
        assert!(sequencers.values().all(|first| *first == ProcessId(0)));
        assert_eq!(all.component(ProcessId(30)).len(), 31);
        assert_eq!(all.peers(ProcessId(0), OrderKind::Sequencer).len(), 30);
        let took = begun.elapsed();
        assert!(took < std::time::Duration::from_secs(20), "{took:?}");
    }

    #[test]
    fn peers_are_who_shares_a_variable_and_the_sequencer() {
        let chain = subscriptions(&[&[0, 1], &[1, 2], &[2, 3]]);
        let of = |process, order| -> Vec<u32> {
            let peers = chain.peers(ProcessId(process), order);
            peers.into_iter().map(|p| p.0).collect()
        };
        assert_eq!(of(3, OrderKind::Skeen), [2]);
        assert_eq!(of(3, OrderKind::Sequencer), [0, 2]);
        assert_eq!(of(0, OrderKind::Skeen), [1]);
        assert_eq!(of(0, OrderKind::Sequencer), [1, 2, 3]);
        assert_eq!(of(9, OrderKind::Sequencer), [0u32; 0]);
    }

    #[test]
    fn the_digest_tells_every_difference() {
        let base = subscriptions(&[&[0, 1], &[1, 2]]);
        let skeen = base.digest(OrderKind::Skeen);
        assert_eq!(
            skeen,
            subscriptions(&[&[1, 0], &[2, 1]]).digest(OrderKind::Skeen)
        );
        assert_ne!(skeen, base.digest(OrderKind::Sequencer));
        assert_ne!(
            skeen,
            subscriptions(&[&[0, 1], &[1, 3]]).digest(OrderKind::Skeen)
        );
        assert_ne!(
            skeen,
            subscriptions(&[&[0, 1, 1 << 8], &[2]]).digest(OrderKind::Skeen)
        );
        let mut bytes = base.clone();
        if let Some(variable) = bytes.variables.get_mut(&VariableId(0)) {
            variable.kind = ValueType::Bytes;
        }
        assert_ne!(skeen, bytes.digest(OrderKind::Skeen));
    }

    #[test]
    fn what_is_double_empty_or_too_much_is_refused() {
        let variable = |id, list: &[u32]| Variable {
            id: VariableId(id),
            kind: ValueType::Integer,
            subscribers: list.iter().map(|&p| ProcessId(p)).collect(),
        };
        let refused = |variables: Vec<Variable>| Subscriptions::new(variables).unwrap_err();
        let id = VariableId(3);
        let subscribers = SubscriptionError::Subscribers { variable: id };
        assert_eq!(refused(vec![variable(3, &[])]), subscribers);
        assert_eq!(refused(vec![variable(3, &[1, 1])]), subscribers);
        let twice = SubscriptionError::Twice { variable: id };
        assert_eq!(refused(vec![variable(3, &[1]), variable(3, &[2])]), twice);
        let everyone: Vec<u32> = (0..33).collect();
        let count = SubscriptionError::TooManyProcesses { count: 33 };
        assert_eq!(refused(vec![variable(3, &everyone)]), count);
        let most = Subscriptions::new(vec![variable(3, &everyone[1..])]).expect("32 may share");
        assert_eq!(most.variable(id).map(Variable::bits), Some(u32::MAX));
    }
}
