//! Hearing of changes: one watch over everything under the prefix, resumed from the
//! revision behind the last one that was delivered.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::hearing::{Change, Notice};
use super::gateway::{Change as Told, ClusterError, KeyValue, Watched, encoded};
use super::mark::Mark;
use super::{Shared, change_key, kind_of, locked, name, text_of, value_of};
use crate::ordered::{Value, ValueType};

/// Silence after which the watch is begun anew, at the next endpoint: a member that was
/// stopped says nothing, not even that.
const SILENCE: Duration = Duration::from_secs(2);
/// Pause after a watch that failed.
const PAUSE: Duration = Duration::from_millis(50);
/// How long the cluster may take to answer at the start.
const START_DEADLINE: Duration = Duration::from_secs(5);

/// Makes the keys that are missing, reads all values, and says the revision they are of.
pub(super) fn begin(shared: &Shared) -> Result<u64, ClusterError> {
    let until = Instant::now() + START_DEADLINE;
    loop {
        match make_keys(shared).and_then(|()| read_all(shared)) {
            Ok((revision, values)) => {
                shared.hearing.set(values);
                shared.delivered.store(revision, Ordering::Release);
                return Ok(revision);
            }
            Err(error) if Instant::now() >= until => return Err(error),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::debug!(error, "etcd: tried again");
                std::thread::sleep(PAUSE);
            }
        }
    }
}

fn make_keys(shared: &Shared) -> Result<(), ClusterError> {
    for (&variable, &kind) in &shared.kinds {
        make_key(shared, variable, kind)?;
    }
    Ok(())
}

/// A comparison by value never holds for a key that does not exist.
pub(super) fn make_key(
    shared: &Shared,
    variable: u32,
    kind: ValueType,
) -> Result<(), ClusterError> {
    let key = encoded(&shared.value_key(variable));
    let value = encoded(&text_of(&kind.initial()));
    shared.gateway.txn(&json!({
        "compare": [{ "key": key, "target": "VERSION", "result": "EQUAL", "version": "0" }],
        "success": [{ "request_put": { "key": key, "value": value } }],
    }))?;
    Ok(())
}

fn read_all(shared: &Shared) -> Result<(u64, BTreeMap<u32, Value>), ClusterError> {
    let begin = format!("{}v/", shared.prefix).into_bytes();
    let end = format!("{}v0", shared.prefix).into_bytes();
    let range = shared.gateway.range(&begin, Some(&end))?;
    let mut values: BTreeMap<_, _> = shared
        .kinds
        .iter()
        .map(|(id, kind)| (*id, kind.initial()))
        .collect();
    for kv in &range.kvs {
        if let Some((variable, value)) = readable(shared, kv) {
            values.insert(variable, value);
        }
    }
    Ok((range.header.revision, values))
}

/// The variable and its value, if this process subscribes to it and it is one.
fn readable(shared: &Shared, kv: &KeyValue) -> Option<(u32, Value)> {
    let variable = shared.variable_of(&kv.key)?;
    let kind = kind_of(shared, variable)?;
    let value = value_of(kind, &kv.value);
    if value.is_none() {
        let variable = name(variable);
        tracing::warn!(%variable, ?kind, "another program put something else into its key");
    }
    Some((variable, value?))
}

/// Watches until the variables are stopped.
pub(super) fn run(shared: &Shared, mut revision: u64) {
    while !shared.stopping.load(Ordering::Relaxed) {
        match watch(shared, &mut revision) {
            Ok(()) => {}
            Err(error) => {
                let endpoint = shared.gateway.current();
                if !error.is_silence() {
                    *locked(&shared.trouble) = Some(error.to_string());
                    std::thread::sleep(PAUSE);
                }
                if shared.gateway.endpoints() > 1 {
                    shared.gateway.turn_away(endpoint);
                }
            }
        }
    }
}

/// One watch to its end.
fn watch(shared: &Shared, revision: &mut u64) -> Result<(), ClusterError> {
    let (begin, end) = shared.all_keys();
    let range = (&begin[..], &end[..]);
    let mut watch = shared.gateway.watch(range, *revision + 1, SILENCE)?;
    while !shared.stopping.load(Ordering::Relaxed) {
        let told = shared.gateway.next(&mut watch)?;
        if told.created {
            *locked(&shared.trouble) = None;
            // A member that lags behind says so, too; the read is linearisable.
            if told.header.revision < *revision && went_back(shared, *revision)? {
                tracing::error!(
                    revision = *revision,
                    "the etcd cluster is behind what it had told: it lost its memory, or was \
                     restored from a backup"
                );
                return resync(shared, revision);
            }
        }
        if told.compact_revision > 0 {
            return resync(shared, revision);
        }
        deliver(shared, &told, revision);
        if told.canceled {
            return Ok(());
        }
    }
    Ok(())
}

/// Whether the cluster has not come as far as it had told.
fn went_back(shared: &Shared, revision: u64) -> Result<bool, ClusterError> {
    let range = shared.gateway.range(shared.prefix.as_bytes(), None)?;
    Ok(range.header.revision < revision)
}

/// Changes were compacted away, or undone: what everything is now, in place of them.
fn resync(shared: &Shared, revision: &mut u64) -> Result<(), ClusterError> {
    make_keys(shared)?;
    let (read, values) = read_all(shared)?;
    shared.resyncs.fetch_add(1, Ordering::Relaxed);
    tracing::warn!(
        from = *revision,
        to = read,
        "all values are read anew from etcd"
    );
    wait_for_room(shared);
    shared.hearing.deliver(Notice::Resync {
        time: read,
        values: values.into_iter().collect(),
    });
    *revision = read;
    shared.delivered.store(read, Ordering::Release);
    shared.advance(read);
    Ok(())
}

fn wait_for_room(shared: &Shared) {
    while shared.hearing.is_full() && !shared.stopping.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Delivers the changes of one message; those of one revision belong to one operation.
fn deliver(shared: &Shared, told: &Watched, revision: &mut u64) {
    let mut events = &told.events[..];
    while let Some(first) = events.first() {
        let at = first.kv.mod_revision;
        let count = events
            .iter()
            .take_while(|event| event.kv.mod_revision == at)
            .count();
        let (together, rest) = events.split_at(count);
        events = rest;
        if at <= *revision {
            continue;
        }
        for notice in notices(shared, at, together) {
            wait_for_room(shared);
            shared.changes.fetch_add(1, Ordering::Relaxed);
            shared.hearing.deliver(notice);
        }
        *revision = at;
        shared.advance(at);
    }
}

fn notices(shared: &Shared, revision: u64, together: &[Told]) -> Vec<Notice> {
    let mark = together
        .iter()
        .find(|event| shared.is_mark(&event.kv.key))
        .and_then(|event| Mark::parse(&event.kv.value));
    let mut notices = Vec::new();
    for event in together {
        let kv = &event.kv;
        let Some((variable, kind)) = shared
            .variable_of(&kv.key)
            .and_then(|id| Some((id, kind_of(shared, id)?)))
        else {
            continue;
        };
        let old = shared
            .hearing
            .value(variable)
            .unwrap_or_else(|| kind.initial());
        let new = if event.kind.as_deref() == Some("DELETE") {
            kind.initial()
        } else if let Some((_, new)) = readable(shared, kv) {
            new
        } else {
            continue;
        };
        // A key that a process just made holds what everybody takes it to hold.
        if kv.version == 1 && mark.is_none() && new == old {
            continue;
        }
        notices.push(Notice::Change(Change {
            key: change_key(revision, mark.map(|mark| mark.id)),
            variable,
            old,
            new,
            swap: mark.is_some_and(|mark| mark.swap),
            initiator: mark.map(|mark| mark.id.initiator),
        }));
    }
    notices
}
