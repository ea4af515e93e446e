//! Frames that lie in the payload. The client's filling in and reading lie outside of
//! the clock; what the server does to the bytes lies within.

use uffd_sync::duplex::Waiting;
use uffd_sync::units::{KIB, MIB};
use uffd_sync::zerobuffer::Wait;

use crate::contest::Contest;
use crate::harness::{Goal, Options, Outcome, Placement};
use crate::link::{Job, Turn};
use crate::payload::{Touch, WIDTH};
use crate::{alone, bare, inplace, peers, two_buffers};

/// Payload of the channel, and each ring of the two-buffer channel.
const RING: u64 = 8 * MIB;

const TURN: Turn = Turn::of(0, 60);

pub(crate) const CASES_HOT: &[&str] = &[
    "hot-1MiB-bytes/two-cores",
    "hot-1MiB-bytes-vs-iceoryx2/two-cores",
    "hot-1MiB-bytes-vs-unix/two-cores",
    "hot-1MiB-bytes-vs-two-buffers/two-cores",
    "hot-1MiB-one-vs-two-buffers/two-cores",
    "hot-1MiB-lines-vs-iceoryx2/two-cores",
    "hot-1MiB-lines-vs-unix/two-cores",
];

pub(crate) fn run_hot(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placement = Placement::TwoCores;
    let mut contest = Contest::new(options, placement);
    let [bytes, one, lines] =
        [Touch::Bytes, Touch::One, Touch::Lines].map(|touch| Job::new(MIB, touch));
    let ours = |job| inplace::variant(placement, Waiting::Spin, RING, job);
    let two = |job| two_buffers::variant(placement, Wait::Spin, RING, job);
    let alone = alone::variant(placement, bytes)?;
    let alone = contest.enter("the computation alone", Ok(alone), TURN)?;
    let all = contest.enter("channel, polling", Ok(ours(bytes)?), TURN)?;
    let first = contest.enter("channel, polling", Ok(ours(one)?), TURN)?;
    let some = contest.enter("channel, polling", Ok(ours(lines)?), TURN)?;
    let busy = |touch| peers::iceoryx(placement, MIB, touch, peers::Wait::Busy);
    let busy_lines = contest.enter("iceoryx2, polling", busy(Touch::Lines)?, TURN)?;
    let busy = contest.enter("iceoryx2, polling", busy(Touch::Bytes)?, TURN)?;
    let unix = bare::unix(placement, MIB, Touch::Bytes)?;
    let unix = contest.enter("Unix socket", Ok(unix), TURN)?;
    let unix_lines = bare::unix(placement, MIB, Touch::Lines)?;
    let unix_lines = contest.enter("Unix socket", Ok(unix_lines), TURN)?;
    let two_all = contest.enter("two buffers, polling", Ok(two(bytes)?), TURN)?;
    let two_first = contest.enter("two buffers, polling", Ok(two(one)?), TURN)?;
    let results = contest.run()?;
    let near = |goal| results.by_nearness(Some(goal), None).flatten();
    let always = |bound| Some(Goal::AtLeast(bound));
    let case = |at: usize, ours, theirs, goal| results.against(CASES_HOT[at], ours, theirs, goal);
    Ok(vec![
        case(0, all, alone, near(Goal::AtMost(1.25))),
        case(1, all, busy, near(Goal::AtLeast(3.0))),
        case(2, all, unix, near(Goal::AtLeast(15.0))),
        case(3, all, two_all, always(1.6)),
        case(4, first, two_first, always(3.0)),
        case(5, some, busy_lines, near(Goal::AtLeast(3.0))),
        case(6, some, unix_lines, near(Goal::AtLeast(15.0))),
    ])
}

pub(crate) const CASES_PARKED_ONE_CORE: &[&str] = &[
    "parked-1MiB-bytes-vs-two-buffers/one-core",
    "parked-1MiB-one-vs-two-buffers/one-core",
    "parked-1MiB-bytes-vs-unix/one-core",
    "parked-1MiB-bytes-vs-iceoryx2/one-core",
];

pub(crate) fn run_parked_one_core(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    run_parked(options, Placement::OneCore, CASES_PARKED_ONE_CORE)
}

pub(crate) const CASES_PARKED_TWO_CORES: &[&str] = &[
    "parked-1MiB-bytes-vs-two-buffers/two-cores",
    "parked-1MiB-one-vs-two-buffers/two-cores",
    "parked-1MiB-bytes-vs-unix/two-cores",
    "parked-1MiB-bytes-vs-iceoryx2/two-cores",
];

pub(crate) fn run_parked_two_cores(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    run_parked(options, Placement::TwoCores, CASES_PARKED_TWO_CORES)
}

fn run_parked(
    options: &Options,
    placement: Placement,
    cases: &[&'static str],
) -> anyhow::Result<Vec<Outcome>> {
    let mut contest = Contest::new(options, placement);
    let [bytes, one] = [Touch::Bytes, Touch::One].map(|touch| Job::new(MIB, touch));
    let ours = |job| inplace::variant(placement, Waiting::Park, RING, job);
    let two = |job| two_buffers::variant(placement, Wait::Park, RING, job);
    let all = contest.enter("channel, parking", Ok(ours(bytes)?), TURN)?;
    let first = contest.enter("channel, parking", Ok(ours(one)?), TURN)?;
    let two_all = contest.enter("two buffers, parking", Ok(two(bytes)?), TURN)?;
    let two_first = contest.enter("two buffers, parking", Ok(two(one)?), TURN)?;
    let unix = bare::unix(placement, MIB, Touch::Bytes)?;
    let unix = contest.enter("Unix socket", Ok(unix), TURN)?;
    let event = peers::iceoryx(placement, MIB, Touch::Bytes, peers::Wait::Event)?;
    let event = contest.enter("iceoryx2, events", event, TURN)?;
    let results = contest.run()?;
    let pairs = [
        (all, two_all, Some(Goal::AtLeast(1.15))),
        (first, two_first, Some(Goal::AtLeast(1.8))),
        (all, unix, None),
        (all, event, None),
    ];
    Ok(cases
        .iter()
        .zip(pairs)
        .map(|(case, (ours, theirs, goal))| results.against(case, ours, theirs, goal))
        .collect())
}

pub(crate) const CASES_IMAGE: &[&str] = &[
    "blur-3MB/two-cores",
    "blur-3MB-vs-iceoryx2/two-cores",
    "blur-3MB-vs-unix/two-cores",
    "blur-3MB-vs-two-buffers/two-cores",
];

/// An RGB image of 1024 x 1024, blurred.
pub(crate) fn run_image(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placement = Placement::TwoCores;
    let job = Job::new((3 * WIDTH * WIDTH) as u64, Touch::Blur);
    let turn = Turn::of(0, 10);
    let mut contest = Contest::new(options, placement);
    let alone = alone::variant(placement, job)?;
    let alone = contest.enter("the computation alone", Ok(alone), turn)?;
    let ours = inplace::variant(placement, Waiting::Adaptive, RING, job)?;
    let ours = contest.enter("channel, default", Ok(ours), turn)?;
    let busy = peers::iceoryx(placement, job.len, job.touch, peers::Wait::Busy)?;
    let busy = contest.enter("iceoryx2, polling", busy, turn)?;
    let unix = bare::unix(placement, job.len, job.touch)?;
    let unix = contest.enter("Unix socket", Ok(unix), turn)?;
    let two = two_buffers::variant(placement, Wait::Adaptive, RING, job)?;
    let two = contest.enter("two buffers, default", Ok(two), turn)?;
    let results = contest.run()?;
    let theirs = [alone, busy, unix, two];
    Ok(CASES_IMAGE
        .iter()
        .zip(theirs)
        .map(|(case, theirs)| results.against(case, ours, theirs, None))
        .collect())
}

/// Sizes and touches without a goal.
pub(crate) const CASES_SIZES: &[&str] = &[
    "hot-4KiB-nothing/two-cores",
    "hot-4KiB-lines/two-cores",
    "hot-4KiB-bytes/two-cores",
    "hot-64KiB-nothing/two-cores",
    "hot-64KiB-lines/two-cores",
    "hot-64KiB-bytes/two-cores",
    "hot-1MiB-nothing/two-cores",
    "hot-1MiB-lines/two-cores",
];

pub(crate) fn run_sizes(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placement = Placement::TwoCores;
    let sizes = [4 * KIB, 64 * KIB, MIB];
    let touches = [Touch::Nothing, Touch::Lines, Touch::Bytes];
    let jobs = sizes
        .iter()
        .flat_map(|size| touches.iter().map(|touch| Job::new(*size, *touch)));
    let mut outcomes = Vec::new();
    for (case, job) in CASES_SIZES.iter().zip(jobs) {
        let turn = Turn::of(0, if job.len == MIB { 60 } else { 600 });
        let mut contest = Contest::new(options, placement);
        let ours = inplace::variant(placement, Waiting::Spin, RING, job)?;
        let ours = contest.enter("channel, polling", Ok(ours), turn)?;
        let busy = peers::iceoryx(placement, job.len, job.touch, peers::Wait::Busy)?;
        let busy = contest.enter("iceoryx2, polling", busy, turn)?;
        let unix = bare::unix(placement, job.len, job.touch)?;
        let unix = contest.enter("Unix socket", Ok(unix), turn)?;
        let two = two_buffers::variant(placement, Wait::Spin, RING, job)?;
        let two = contest.enter("two buffers, polling", Ok(two), turn)?;
        let results = contest.run()?;
        let mut outcome = results.against(case, ours, busy, None);
        for (name, key) in [("Unix socket", unix), ("two buffers, polling", two)] {
            let us = results.ns(key) / 1e3;
            outcome = outcome.note(format!("{name}: {us:.2} us"));
        }
        outcomes.push(outcome);
    }
    Ok(outcomes)
}
