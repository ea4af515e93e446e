//! Operations per second of one initiator with several under way, three processes.

use std::collections::VecDeque;
use std::time::Instant;

use uffd_sync::client::variables::{Operation, Value};

use crate::bare::Bare;
use crate::harness::{Options, Outcome, Rounds};
use crate::members::{Members, PATIENCE, WRITTEN};

pub(crate) const CASES: &[&str] = &[
    "throughput-skeen/1",
    "throughput-skeen/16",
    "throughput-skeen/64",
    "throughput-sequencer/1",
    "throughput-sequencer/16",
    "throughput-sequencer/64",
];
const DEPTHS: [usize; 3] = [1, 16, 64];
const BASELINE: &str = "bare fan-out with as many under way";

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let skeen = Members::start("skeen", 3)?;
    let sequencer = Members::start("sequencer", 3)?;
    let bare = Bare::start(2)?;
    let count = options.pick(1_000, 6_000);
    let rounds = Rounds::run(options, 9, |variant, _| {
        let depth = DEPTHS[variant % 3];
        let started = Instant::now();
        match variant / 3 {
            0 => writes(&skeen, count, depth)?,
            1 => writes(&sequencer, count, depth)?,
            _ => exchanges(&bare, count, depth)?,
        }
        Ok(count as f64 / started.elapsed().as_secs_f64())
    })?;
    skeen.end()?;
    sequencer.end()?;
    bare.end()?;
    let outcomes = CASES.iter().enumerate().map(|(variant, case)| {
        let baseline = (BASELINE, rounds.of(6 + variant % 3));
        Outcome::times(case, "op/s", rounds.of(variant), baseline)
    });
    Ok(outcomes.collect())
}

fn writes(members: &Members, count: u64, depth: usize) -> anyhow::Result<()> {
    let mut under_way = VecDeque::new();
    for value in 0..count {
        if under_way.len() == depth {
            finish(under_way.pop_front())?;
        }
        let operation = Operation::Write(Value::Integer(value as i64));
        under_way.push_back(members.variables.begin(WRITTEN, operation)?);
    }
    while !under_way.is_empty() {
        finish(under_way.pop_front())?;
    }
    Ok(())
}

fn finish(pending: Option<uffd_sync::client::variables::Pending>) -> anyhow::Result<()> {
    if let Some(pending) = pending {
        pending.wait(PATIENCE)?;
    }
    Ok(())
}

fn exchanges(bare: &Bare, count: u64, depth: usize) -> anyhow::Result<()> {
    let mut under_way = VecDeque::new();
    for _ in 0..count {
        if under_way.len() == depth
            && let Some(first) = under_way.pop_front()
        {
            crate::bare::UnderWay::wait(first)?;
        }
        under_way.push_back(bare.begin()?);
    }
    for one in under_way {
        one.wait()?;
    }
    Ok(())
}
