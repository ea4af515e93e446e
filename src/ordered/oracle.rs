//! The order oracle: reads what each process delivered, and says what is broken.
//!
//! Each process's log is its deliveries in their order. The merged log of all of them,
//! sorted by key, is the total order; every log has to be exactly the part of it that its
//! process subscribes to. That is stronger than comparing logs two by two, which a ring of
//! three processes passes while no total order exists.
//!
//! What is checked ([`Breach`] has one case for each): keys rise within a log; a key has
//! one content everywhere; nothing is missing, doubled or heard by a non-subscriber; what
//! was acknowledged is there with the same verdict; values and verdicts equal a replay.
//!
//! Time is linear in the entries, but for the sort of the merged log. The logs may come
//! from anywhere: deliveries, the lines of `uffd-sync var watch --json`, an etcd cluster's
//! revisions. Where a log has only what was applied, all have to.

use std::collections::{BTreeMap, HashMap};

use super::ids::{OperationId, OrderKey, ProcessId, VariableId};
use super::process::Delivery;
use super::start::{Start, apply};
use super::subscriptions::Subscriptions;

/// What one process delivered in one life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The process.
    pub process: ProcessId,
    /// What it delivered, in this order.
    pub deliveries: Vec<Delivery>,
    /// Whether it ran to the end; one that was killed, stopped or cut off may lack what
    /// comes after its last entry.
    pub complete: bool,
}

/// An own operation that completed with a place in the order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    /// The place that its initiator was told.
    pub key: OrderKey,
    /// The variable.
    pub variable: VariableId,
    /// The verdict that its initiator was told.
    pub applied: bool,
}

/// What a check of logs without a breach went over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Operations in the merged log.
    pub operations: u64,
    /// Entries of all logs.
    pub entries: u64,
    /// Operations that were applied.
    pub applied: u64,
}

/// What is broken; the first that is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// A key is not greater than the one before it.
    #[error("process {process}, entry {entry}: key {key} does not follow {before}")]
    NotRising {
        /// Whose log.
        process: ProcessId,
        /// Which entry, from 0.
        entry: usize,
        /// Its key.
        key: OrderKey,
        /// The key before it.
        before: OrderKey,
    },
    /// One operation under two keys.
    #[error("operation {id} has the keys of time {one} and {other}")]
    TwoKeys {
        /// The operation.
        id: OperationId,
        /// One time.
        one: u64,
        /// Another one.
        other: u64,
    },
    /// One key with two contents.
    #[error("key {key}: process {one} and process {other} delivered different contents")]
    Content {
        /// The key.
        key: OrderKey,
        /// One of the two.
        one: ProcessId,
        /// The other one.
        other: ProcessId,
    },
    /// A process heard what it does not subscribe to.
    #[error(
        "process {process} delivered {key} on variable {variable}, which it does not subscribe to"
    )]
    NotSubscribed {
        /// Whose log.
        process: ProcessId,
        /// The key.
        key: OrderKey,
        /// The variable.
        variable: VariableId,
    },
    /// An operation in somebody's name who does not subscribe.
    #[error("operation {key} on variable {variable} is of a process that does not subscribe to it")]
    Initiator {
        /// The key.
        key: OrderKey,
        /// The variable.
        variable: VariableId,
    },
    /// A process lacks an operation that it subscribes to.
    #[error("process {process} did not deliver {key} on variable {variable}")]
    Missing {
        /// Whose log.
        process: ProcessId,
        /// The key.
        key: OrderKey,
        /// The variable.
        variable: VariableId,
    },
    /// An acknowledged operation is nowhere, or elsewhere, or has another verdict.
    #[error(
        "acknowledged operation {key} on variable {variable} is not delivered as it was acknowledged"
    )]
    Acknowledged {
        /// The key that its initiator was told.
        key: OrderKey,
        /// The variable.
        variable: VariableId,
    },
    /// A value or verdict differs from that of a replay.
    #[error("{key} on variable {variable}: old value, new value or verdict differs from a replay")]
    Replay {
        /// The key.
        key: OrderKey,
        /// The variable.
        variable: VariableId,
    },
}

/// Checks `logs` and what was `acknowledged` against each other.
///
/// Without the log of some process, its operations are still known from the other
/// subscribers' logs. A life that ended by losing its memory has a log of its own, which
/// is not complete.
///
/// # Errors
/// The first [`Breach`].
pub fn check(
    subscriptions: &Subscriptions,
    start: &Start,
    logs: &[Log],
    acknowledged: &[Acknowledged],
) -> Result<Summary, Breach> {
    let mut summary = Summary::default();
    let mut contents: HashMap<OperationId, (ProcessId, &Delivery)> = HashMap::new();
    for log in logs {
        check_log(subscriptions, log)?;
        summary.entries += log.deliveries.len() as u64;
        for delivery in &log.deliveries {
            let id = delivery.key.id;
            let (first, known) = *contents.entry(id).or_insert((log.process, delivery));
            compare((first, known), (log.process, delivery))?;
        }
    }
    for told in acknowledged {
        let found = contents.get(&told.key.id).map(|(_, delivery)| *delivery);
        let same = |d: &&Delivery| {
            (d.key, d.variable, d.applied) == (told.key, told.variable, told.applied)
        };
        if found.filter(same).is_none() {
            return Err(Breach::Acknowledged {
                key: told.key,
                variable: told.variable,
            });
        }
    }
    let mut merged: Vec<&Delivery> = contents.into_values().map(|(_, d)| d).collect();
    merged.sort_unstable_by_key(|delivery| delivery.key);
    check_restrictions(subscriptions, logs, &merged)?;
    summary.operations = merged.len() as u64;
    summary.applied = replay(subscriptions, start, &merged)?;
    Ok(summary)
}

fn check_log(subscriptions: &Subscriptions, log: &Log) -> Result<(), Breach> {
    let process = log.process;
    let mut before: Option<OrderKey> = None;
    for (entry, delivery) in log.deliveries.iter().enumerate() {
        let (key, variable) = (delivery.key, delivery.variable);
        if let Some(before) = before.filter(|before| *before >= key) {
            return Err(Breach::NotRising {
                process,
                entry,
                key,
                before,
            });
        }
        before = Some(key);
        let found = subscriptions.variable(variable);
        if !found.is_some_and(|found| found.has(process)) {
            return Err(Breach::NotSubscribed {
                process,
                key,
                variable,
            });
        }
        if !found.is_some_and(|found| found.has(key.id.initiator)) {
            return Err(Breach::Initiator { key, variable });
        }
    }
    Ok(())
}

fn compare(
    (one, first): (ProcessId, &Delivery),
    (other, second): (ProcessId, &Delivery),
) -> Result<(), Breach> {
    if first.key != second.key {
        return Err(Breach::TwoKeys {
            id: first.key.id,
            one: first.key.time,
            other: second.key.time,
        });
    }
    if first != second {
        let key = first.key;
        return Err(Breach::Content { key, one, other });
    }
    Ok(())
}

/// Each log is the merged one restricted to its subscriptions: walks all of them at once.
fn check_restrictions(
    subscriptions: &Subscriptions,
    logs: &[Log],
    merged: &[&Delivery],
) -> Result<(), Breach> {
    let mut of_process: BTreeMap<ProcessId, Vec<usize>> = BTreeMap::new();
    for (index, log) in logs.iter().enumerate() {
        of_process.entry(log.process).or_default().push(index);
    }
    let mut next = vec![0; logs.len()];
    for delivery in merged {
        let found = subscriptions.variable(delivery.variable);
        let subscribers = found.map_or(&[][..], |found| &found.subscribers);
        let indices = subscribers.iter().filter_map(|p| of_process.get(p));
        for &index in indices.flatten() {
            let log = &logs[index];
            let there = log.deliveries.get(next[index]);
            if there.is_some_and(|there| there.key == delivery.key) {
                next[index] += 1;
            } else if there.is_some() || log.complete {
                return Err(Breach::Missing {
                    process: log.process,
                    key: delivery.key,
                    variable: delivery.variable,
                });
            }
        }
    }
    Ok(())
}

/// The operations in their order, from the start values; gives how many were applied.
fn replay(
    subscriptions: &Subscriptions,
    start: &Start,
    merged: &[&Delivery],
) -> Result<u64, Breach> {
    let variables = subscriptions.variables();
    let mut values: BTreeMap<_, _> = variables.map(|v| (v.id, start.value(v))).collect();
    let mut count = 0;
    for delivery in merged {
        let breach = Breach::Replay {
            key: delivery.key,
            variable: delivery.variable,
        };
        let value = values.get_mut(&delivery.variable).ok_or(breach)?;
        let (applied, old) = apply(value, &delivery.operation);
        if (applied, &old, &*value) != (delivery.applied, &delivery.old, &delivery.new) {
            return Err(breach);
        }
        count += u64::from(applied);
    }
    Ok(count)
}

#[cfg(test)]
mod tests;
