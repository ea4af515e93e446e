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
pub(crate) const CASES_IMAGE_ONE_CORE: &[&str] = &[
    "blur-3MB/one-core",
    "blur-3MB-vs-iceoryx2/one-core",
    "blur-3MB-vs-unix/one-core",
    "blur-3MB-vs-two-buffers/one-core",
];
pub(crate) const CASES_IMAGE_FREE: &[&str] = &[
    "blur-3MB/free",
    "blur-3MB-vs-iceoryx2/free",
    "blur-3MB-vs-unix/free",
    "blur-3MB-vs-two-buffers/free",
];

pub(crate) fn run_image(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    image(options, Placement::TwoCores, CASES_IMAGE)
}

pub(crate) fn run_image_one_core(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    image(options, Placement::OneCore, CASES_IMAGE_ONE_CORE)
}

pub(crate) fn run_image_free(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    image(options, Placement::Free, CASES_IMAGE_FREE)
}

/// An RGB image of 1024 x 1024, blurred.
fn image(
    options: &Options,
    placement: Placement,
    cases: &[&'static str],
) -> anyhow::Result<Vec<Outcome>> {
    let job = Job::new((3 * WIDTH * WIDTH) as u64, Touch::Blur);
    let turn = Turn::of(0, 10);
    let mut contest = Contest::new(options, placement);
    let alone = alone::variant(placement, job)?;
    let alone = contest.enter("the computation alone", Ok(alone), turn)?;
    let ours = inplace::variant(placement, Waiting::Adaptive, RING, job)?;
    let ours = contest.enter("channel, default", Ok(ours), turn)?;
    let (name, wait) = iceoryx_for(placement);
    let iceoryx = peers::iceoryx(placement, job.len, job.touch, wait)?;
    let iceoryx = contest.enter(name, iceoryx, turn)?;
    let unix = bare::unix(placement, job.len, job.touch)?;
    let unix = contest.enter("Unix socket", Ok(unix), turn)?;
    let two = two_buffers::variant(placement, Wait::Adaptive, RING, job)?;
    let two = contest.enter("two buffers, default", Ok(two), turn)?;
    let results = contest.run()?;
    let theirs = [alone, iceoryx, unix, two];
    Ok(cases
        .iter()
        .zip(theirs)
        .map(|(case, theirs)| results.against(case, ours, theirs, None))
        .collect())
}

/// Polling is of use only where each side has a core of its own.
fn iceoryx_for(placement: Placement) -> (&'static str, peers::Wait) {
    match placement {
        Placement::TwoCores => ("iceoryx2, polling", peers::Wait::Busy),
        Placement::OneCore | Placement::Free => ("iceoryx2, events", peers::Wait::Event),
    }
}

/// Sizes and touches without a goal: where both sides poll, where both sleep, and by
/// default wherever the kernel puts them.
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
pub(crate) const CASES_SIZES_ONE_CORE: &[&str] = &[
    "parked-4KiB-nothing/one-core",
    "parked-4KiB-lines/one-core",
    "parked-4KiB-bytes/one-core",
    "parked-64KiB-nothing/one-core",
    "parked-64KiB-lines/one-core",
    "parked-64KiB-bytes/one-core",
    "parked-1MiB-nothing/one-core",
    "parked-1MiB-lines/one-core",
];
pub(crate) const CASES_SIZES_FREE: &[&str] = &[
    "default-4KiB-nothing/free",
    "default-4KiB-lines/free",
    "default-4KiB-bytes/free",
    "default-64KiB-nothing/free",
    "default-64KiB-lines/free",
    "default-64KiB-bytes/free",
    "default-1MiB-nothing/free",
    "default-1MiB-lines/free",
    "default-1MiB-bytes/free",
];

pub(crate) fn run_sizes(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let waits = (Waiting::Spin, Wait::Spin);
    let names = ("channel, polling", "two buffers, polling");
    sizes(options, Placement::TwoCores, CASES_SIZES, waits, names)
}

pub(crate) fn run_sizes_one_core(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let waits = (Waiting::Park, Wait::Park);
    let names = ("channel, parking", "two buffers, parking");
    sizes(
        options,
        Placement::OneCore,
        CASES_SIZES_ONE_CORE,
        waits,
        names,
    )
}

pub(crate) fn run_sizes_free(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let waits = (Waiting::Adaptive, Wait::Adaptive);
    let names = ("channel, default", "two buffers, default");
    sizes(options, Placement::Free, CASES_SIZES_FREE, waits, names)
}

fn sizes(
    options: &Options,
    placement: Placement,
    cases: &[&'static str],
    (waiting, two_wait): (Waiting, Wait),
    (our_name, two_name): (&'static str, &'static str),
) -> anyhow::Result<Vec<Outcome>> {
    let sizes = [4 * KIB, 64 * KIB, MIB];
    let touches = [Touch::Nothing, Touch::Lines, Touch::Bytes];
    let jobs = sizes
        .iter()
        .flat_map(|size| touches.iter().map(|touch| Job::new(*size, *touch)));
    let mut outcomes = Vec::new();
    for (case, job) in cases.iter().zip(jobs) {
        let turn = Turn::of(0, if job.len == MIB { 60 } else { 600 });
        let mut contest = Contest::new(options, placement);
        let ours = inplace::variant(placement, waiting, RING, job)?;
        let ours = contest.enter(our_name, Ok(ours), turn)?;
        let (name, wait) = iceoryx_for(placement);
        let iceoryx = peers::iceoryx(placement, job.len, job.touch, wait)?;
        let iceoryx = contest.enter(name, iceoryx, turn)?;
        let unix = bare::unix(placement, job.len, job.touch)?;
        let unix = contest.enter("Unix socket", Ok(unix), turn)?;
        let two = two_buffers::variant(placement, two_wait, RING, job)?;
        let two = contest.enter(two_name, Ok(two), turn)?;
        let results = contest.run()?;
        let has_iceoryx = results.ns(iceoryx).is_finite();
        let theirs = if has_iceoryx { iceoryx } else { unix };
        let mut outcome = results.against(case, ours, theirs, None);
        for (name, key) in [(name, iceoryx), ("Unix socket", unix), (two_name, two)] {
            let us = results.ns(key) / 1e3;
            if us.is_finite() {
                outcome = outcome.note(format!("{name}: {us:.2} us"));
            }
        }
        outcomes.push(outcome);
    }
    Ok(outcomes)
}
