//! The default way of waiting against parking at once, where polling is of no use:
//! after a pause, and while the server works for longer than it pays to poll.

use std::time::Duration;

use uffd_sync::duplex::Waiting;
use uffd_sync::units::MIB;

use crate::bare::{self, SMALL};
use crate::contest::Contest;
use crate::harness::{Goal, Options, Outcome, Placement};
use crate::inplace;
use crate::link::{Job, Turn};
use crate::payload::Touch;

pub(crate) const CASES_ONE_CORE: &[&str] = &[
    "adaptive-idle-1ms/one-core",
    "adaptive-work-5us/one-core",
    "adaptive-work-100us/one-core",
    "parked-idle-1ms/one-core",
];
pub(crate) const CASES_TWO_CORES: &[&str] = &[
    "adaptive-idle-1ms/two-cores",
    "adaptive-work-5us/two-cores",
    "adaptive-work-100us/two-cores",
    "parked-idle-1ms/two-cores",
];
pub(crate) const CASES_FREE: &[&str] = &[
    "adaptive-idle-1ms/free",
    "adaptive-work-5us/free",
    "adaptive-work-100us/free",
    "parked-idle-1ms/free",
];

pub(crate) fn run_one_core(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    run(options, Placement::OneCore, CASES_ONE_CORE)
}

pub(crate) fn run_two_cores(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    run(options, Placement::TwoCores, CASES_TWO_CORES)
}

pub(crate) fn run_free(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    run(options, Placement::Free, CASES_FREE)
}

fn run(
    options: &Options,
    placement: Placement,
    cases: &[&'static str],
) -> anyhow::Result<Vec<Outcome>> {
    let mut contest = Contest::new(options, placement);
    let pauses = Turn {
        idle: Duration::from_millis(1),
        ..Turn::of(0, 100)
    };
    let kinds = [
        (Duration::ZERO, pauses),
        (Duration::from_micros(5), Turn::of(1_000, 500)),
        (Duration::from_micros(100), Turn::of(150, 100)),
    ];
    let mut pairs = Vec::new();
    for (work, turn) in kinds {
        let job = Job {
            work,
            ..Job::new(SMALL, Touch::Bytes)
        };
        let ours = |waiting| inplace::variant(placement, waiting, MIB, job);
        let default = Ok(ours(Waiting::Adaptive)?);
        let default = contest.enter("channel, default", default, turn)?;
        let park = contest.enter("channel, parking", Ok(ours(Waiting::Park)?), turn)?;
        pairs.push((default, park, Some(Goal::AtMost(1.1))));
    }
    let futex = contest.enter("futex ping-pong", Ok(bare::futex(placement)?), pauses)?;
    let (_, parked, _) = pairs[0];
    pairs.push((parked, futex, None));
    let results = contest.run()?;
    Ok(cases
        .iter()
        .zip(pairs)
        .map(|(case, (ours, theirs, goal))| results.against(case, ours, theirs, goal))
        .collect())
}
