//! One operation at a time: from the call to its return.

use std::time::Instant;

use crate::bare::Bare;
use crate::harness::{Goal, Latencies, Options, Outcome, Rounds};
use crate::members::{Members, PATIENCE, WRITTEN};

pub(crate) const CASES_TWO: &[&str] = &[
    "write-skeen/2",
    "cas-skeen/2",
    "write-sequencer/2",
    "cas-sequencer/2",
];
pub(crate) const CASES_THREE: &[&str] = &[
    "write-skeen/3",
    "cas-skeen/3",
    "write-sequencer/3",
    "cas-sequencer/3",
];
pub(crate) const CASES_FIVE: &[&str] = &[
    "write-skeen/5",
    "cas-skeen/5",
    "write-sequencer/5",
    "cas-sequencer/5",
];

const BASELINE: &str = "bare fan-out and back, same sockets and hand-offs";

pub(crate) fn run_two(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    run(options, 2, CASES_TWO)
}

pub(crate) fn run_three(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    run(options, 3, CASES_THREE)
}

pub(crate) fn run_five(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    run(options, 5, CASES_FIVE)
}

fn run(
    options: &Options,
    processes: usize,
    cases: &'static [&'static str],
) -> anyhow::Result<Vec<Outcome>> {
    let skeen = Members::start("skeen", processes)?;
    let sequencer = Members::start("sequencer", processes)?;
    let bare = Bare::start(processes - 1)?;
    let count = options.pick(200, 2_000);
    let mut latencies = Vec::new();
    for _ in 0..5 {
        latencies.push(Latencies::new()?);
    }
    let mut value = 0;
    let rounds = Rounds::run(options, 5, |variant, round| {
        let mut found = Latencies::new()?;
        for _ in 0..count {
            value += 1;
            let started = Instant::now();
            match variant {
                0 => skeen.variables.write(WRITTEN, value, PATIENCE)?,
                1 => swap(&skeen, value)?,
                2 => sequencer.variables.write(WRITTEN, value, PATIENCE)?,
                3 => swap(&sequencer, value)?,
                _ => bare.begin()?.wait()?,
            }
            found.record(started.elapsed().as_nanos() as u64);
        }
        if round > 0 {
            latencies[variant].add(&found)?;
        }
        Ok(found.at(0.5) / 1e3)
    })?;
    skeen.end()?;
    sequencer.end()?;
    bare.end()?;
    let outcomes = cases.iter().enumerate().map(|(variant, case)| {
        let baseline = (BASELINE, rounds.of(4));
        let outcome = Outcome::times(case, "us", rounds.of(variant), baseline)
            .latency("ordered", &latencies[variant])
            .latency("bare", &latencies[4]);
        if *case == "write-skeen/3" {
            outcome.goal(Goal::AtMost(1.5))
        } else {
            outcome
        }
    });
    Ok(outcomes.collect())
}

/// A swap that succeeds: nobody else writes.
fn swap(members: &Members, new: i64) -> anyhow::Result<()> {
    let held = members.variables.get(WRITTEN)?;
    let swapped = members
        .variables
        .compare_and_swap(WRITTEN, held, new, PATIENCE)?;
    anyhow::ensure!(swapped, "a swap failed although nobody else writes");
    Ok(())
}
