//! Ordered variables: every interleaving of small configurations, long runs from seeds
//! with cut links, pauses and lost memory, and the checker of linearisability.
//!
//! `UFFD_SYNC_SEED=N` runs one seed of the simulator alone, `UFFD_SYNC_LONG=1` runs
//! 10,000 and the larger configurations.

#![allow(
    clippy::print_stdout,
    reason = "what was explored, for who asks with --nocapture"
)]

mod explore;
mod linear;
mod models;
#[path = "../sim/rng.rs"]
mod rng;
mod sim;
mod world;

use std::sync::Arc;

use uffd_sync::ordered::{
    Config, Incarnation, OrderKind, ProcessId, Subscriptions, ValueType, Variable, VariableId,
};

/// Integers, numbered from 0, with these subscribers.
fn subscriptions(lists: &[&[u32]]) -> Arc<Subscriptions> {
    let variables = lists.iter().zip(0..).map(|(list, id)| Variable {
        id: VariableId(id),
        kind: ValueType::Integer,
        subscribers: list.iter().map(|&process| ProcessId(process)).collect(),
    });
    Arc::new(Subscriptions::new(variables).expect("usable subscriptions"))
}

/// Process `me` in its first life of session 1.
fn config(me: u32, subscriptions: &Arc<Subscriptions>, order: OrderKind, strict: bool) -> Config {
    Config {
        me: ProcessId(me),
        incarnation: Incarnation(u64::from(me) + 100),
        session: 1,
        subscriptions: Arc::clone(subscriptions),
        order,
        strict,
    }
}

fn is_long() -> bool {
    std::env::var_os("UFFD_SYNC_LONG").is_some_and(|value| value == "1")
}
