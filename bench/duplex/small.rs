//! 64 bytes there and back.
//!
//! Where both sides sleep, all 64 bytes change. Where both poll, the first word
//! changes (`hot-64B`), so that what a round trip moves is one cache line, as much as
//! the bare one; or all of them (`hot-64B-bytes`), which moves two.

use uffd_sync::duplex::Waiting;
use uffd_sync::units::MIB;
use uffd_sync::zerobuffer::Wait;

use crate::bare::{self, SMALL};
use crate::contest::{Contest, Key, Results};
use crate::harness::{Goal, Options, Outcome, Placement};
use crate::link::{Job, Turn};
use crate::payload::Touch;
use crate::{inplace, peers, two_buffers};

const RING: u64 = MIB;

/// Calls of one turn that sleep on each side, and that poll on both.
const SLEEPING: Turn = Turn::of(1_500, 500);
const POLLING: Turn = Turn::of(60_000, 15_000);
const POLLING_OTHERS: Turn = Turn::of(20_000, 5_000);

/// Who takes part in every placement.
struct Sleepers {
    futex: Key,
    park: Key,
    default: Key,
    others: [Key; 5],
}

impl Sleepers {
    fn enter(contest: &mut Contest<'_>, placement: Placement) -> anyhow::Result<Self> {
        let job = Job::new(SMALL, Touch::Bytes);
        let ours = |waiting| inplace::variant(placement, waiting, RING, job);
        let event = peers::iceoryx(placement, SMALL, Touch::Bytes, peers::Wait::Event)?;
        let two = two_buffers::variant(placement, Wait::Park, RING, job)?;
        let unix = bare::unix(placement, SMALL, Touch::Bytes)?;
        let python = peers::python(placement, SMALL)?;
        // The default polls while the other side runs elsewhere.
        let default_turn = match placement {
            Placement::OneCore => SLEEPING,
            Placement::TwoCores | Placement::Free => POLLING_OTHERS,
        };
        Ok(Self {
            futex: contest.enter("futex ping-pong", Ok(bare::futex(placement)?), SLEEPING)?,
            park: contest.enter("channel, parking", Ok(ours(Waiting::Park)?), SLEEPING)?,
            default: contest.enter(
                "channel, default",
                Ok(ours(Waiting::Adaptive)?),
                default_turn,
            )?,
            others: [
                contest.enter("eventfd", Ok(bare::eventfd(placement)?), SLEEPING)?,
                contest.enter("Unix socket", Ok(unix), SLEEPING)?,
                contest.enter("iceoryx2, events", event, SLEEPING)?,
                contest.enter("two buffers, parking", Ok(two), SLEEPING)?,
                contest.enter("zerobuffer-ipc (Python)", python, Turn::of(50, 50))?,
            ],
        })
    }
}

pub(crate) const CASES_ONE_CORE: &[&str] = &[
    "parked-64B/one-core",
    "default-64B/one-core",
    "adaptive-64B/one-core",
    "parked-64B-vs-eventfd/one-core",
    "parked-64B-vs-unix/one-core",
    "parked-64B-vs-iceoryx2/one-core",
    "parked-64B-vs-two-buffers/one-core",
    "parked-64B-vs-zerobuffer-python/one-core",
];

pub(crate) fn run_one_core(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placement = Placement::OneCore;
    let mut contest = Contest::new(options, placement);
    let keys = Sleepers::enter(&mut contest, placement)?;
    let results = contest.run()?;
    let goals = [
        Some(Goal::AtMost(0.95)),
        Some(Goal::AtMost(0.70)),
        Some(Goal::AtMost(1.1)),
    ];
    Ok(sleeping_cases(&results, &keys, CASES_ONE_CORE, goals))
}

pub(crate) const CASES_FREE: &[&str] = &[
    "parked-64B/free",
    "default-64B/free",
    "adaptive-64B/free",
    "parked-64B-vs-eventfd/free",
    "parked-64B-vs-unix/free",
    "parked-64B-vs-iceoryx2/free",
    "parked-64B-vs-two-buffers/free",
    "parked-64B-vs-zerobuffer-python/free",
];

pub(crate) fn run_free(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placement = Placement::Free;
    let mut contest = Contest::new(options, placement);
    let keys = Sleepers::enter(&mut contest, placement)?;
    let results = contest.run()?;
    let goals = [None, None, Some(Goal::AtMost(1.1))];
    Ok(sleeping_cases(&results, &keys, CASES_FREE, goals))
}

/// The cases of those who sleep, in the order of their names.
fn sleeping_cases(
    results: &Results,
    keys: &Sleepers,
    cases: &[&'static str],
    goals: [Option<Goal>; 3],
) -> Vec<Outcome> {
    let first = [
        (keys.park, keys.futex),
        (keys.default, keys.futex),
        (keys.default, keys.park),
    ];
    let others = keys.others.map(|other| (keys.park, other));
    let pairs = first.into_iter().chain(others);
    let goals = goals.into_iter().chain([None; 5]);
    cases
        .iter()
        .zip(pairs.zip(goals))
        .map(|(case, ((ours, theirs), goal))| results.against(case, ours, theirs, goal))
        .collect()
}

pub(crate) const CASES_SLEEPING: &[&str] = &[
    "parked-64B/two-cores",
    "default-64B/two-cores",
    "adaptive-64B/two-cores",
    "parked-64B-vs-eventfd/two-cores",
    "parked-64B-vs-unix/two-cores",
    "parked-64B-vs-iceoryx2/two-cores",
    "parked-64B-vs-two-buffers/two-cores",
    "parked-64B-vs-zerobuffer-python/two-cores",
];

pub(crate) fn run_sleeping(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placement = Placement::TwoCores;
    let mut contest = Contest::new(options, placement);
    let keys = Sleepers::enter(&mut contest, placement)?;
    let results = contest.run()?;
    let goals = [None, None, Some(Goal::AtMost(1.1))];
    Ok(sleeping_cases(&results, &keys, CASES_SLEEPING, goals))
}

pub(crate) const CASES_HOT: &[&str] = &[
    "hot-64B/two-cores",
    "hot-64B-vs-iceoryx2/two-cores",
    "hot-64B-default/two-cores",
    "hot-64B-bytes/two-cores",
    "hot-64B-bytes-vs-iceoryx2/two-cores",
    "hot-64B-bytes-vs-two-buffers/two-cores",
    "batch-1/two-cores",
    "batch-8/two-cores",
    "batch-64/two-cores",
    "hot-64B-vs-bare-64B/two-cores",
    "hot-64B-bytes-vs-bare-64B/two-cores",
    "batch-8-of-slots/two-cores",
    "batch-64-of-slots/two-cores",
    "batch-64-vs-bare-64-words/two-cores",
    "bare-64-words/two-cores",
];

pub(crate) fn run_hot(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placement = Placement::TwoCores;
    let mut contest = Contest::new(options, placement);
    let [one, bytes] = [Touch::One, Touch::Bytes].map(|touch| Job::new(SMALL, touch));
    let ours = |waiting, job| inplace::variant(placement, waiting, RING, job);
    let spin = Waiting::Spin;
    let line = contest.enter("one cache line", Ok(bare::line(placement)?), POLLING)?;
    let hot = contest.enter("channel, polling", Ok(ours(spin, one)?), POLLING)?;
    let default = contest.enter(
        "channel, default",
        Ok(ours(Waiting::Adaptive, one)?),
        POLLING,
    )?;
    let all = contest.enter("channel, polling", Ok(ours(spin, bytes)?), POLLING)?;
    let packet = |touch| bare::packet(placement, touch);
    let bare_one = contest.enter("bare 64 bytes", Ok(packet(Touch::One)?), POLLING)?;
    let bare_all = contest.enter("bare 64 bytes", Ok(packet(Touch::Bytes)?), POLLING)?;
    let busy = |touch| peers::iceoryx(placement, SMALL, touch, peers::Wait::Busy);
    let their_one = contest.enter("iceoryx2, polling", busy(Touch::One)?, POLLING_OTHERS)?;
    let their_all = contest.enter("iceoryx2, polling", busy(Touch::Bytes)?, POLLING_OTHERS)?;
    let two = two_buffers::variant(placement, Wait::Spin, RING, bytes)?;
    let two = contest.enter("two buffers, polling", Ok(two), POLLING_OTHERS)?;
    let mut batches = Vec::new();
    for (name, size) in [("frame of 1", 1), ("frame of 8", 8), ("frame of 64", 64)] {
        let variant = Ok(inplace::frames(placement, spin, size)?);
        batches.push(contest.enter(name, variant, Turn::of(64_000, 0))?);
    }
    for (name, size) in [("8 slots, one kick", 8), ("64 slots, one kick", 64)] {
        let variant = Ok(inplace::batches(placement, spin, size)?);
        batches.push(contest.enter(name, variant, Turn::of(64_000, 0))?);
    }
    let bundle = contest.enter(
        "bare 64 words",
        Ok(bare::bundle(placement, 64)?),
        Turn::of(64_000, 0),
    )?;
    let results = contest.run()?;
    let lines = results.by_nearness(Goal::AtMost(1.15), Goal::AtMost(1.3));
    let times = results.by_nearness(Goal::AtLeast(6.0), Goal::AtLeast(4.5));
    let many = results.by_nearness(Goal::AtMost(0.06), Goal::AtMost(0.06));
    let case = |at: usize, ours, theirs, goal| results.against(CASES_HOT[at], ours, theirs, goal);
    Ok(vec![
        case(0, hot, line, lines),
        case(1, hot, their_one, times),
        case(2, default, line, None),
        case(3, all, line, None),
        case(4, all, their_all, times),
        case(5, all, two, None),
        case(6, batches[0], line, None),
        case(7, batches[1], line, None),
        case(8, batches[2], line, many),
        case(9, hot, bare_one, Some(Goal::AtMost(1.2))),
        case(10, all, bare_all, Some(Goal::AtMost(1.2))),
        case(11, batches[3], line, None),
        case(12, batches[4], line, None),
        case(13, batches[2], bundle, None),
        case(14, bundle, line, None),
    ])
}

pub(crate) const CASES_BATCHES_ONE_CORE: &[&str] = &[
    "parked-batch-1/one-core",
    "parked-batch-8/one-core",
    "parked-batch-64/one-core",
    "parked-batch-64-of-slots/one-core",
];

/// Batches where both sides sleep, per request against a futex ping-pong.
pub(crate) fn run_batches_one_core(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placement = Placement::OneCore;
    let mut contest = Contest::new(options, placement);
    let futex = contest.enter("futex ping-pong", Ok(bare::futex(placement)?), SLEEPING)?;
    let mut batches = Vec::new();
    for (name, size) in [("frame of 1", 1), ("frame of 8", 8), ("frame of 64", 64)] {
        let variant = inplace::frames(placement, Waiting::Park, size)?;
        batches.push(contest.enter(name, Ok(variant), Turn::of(1_000 * size, 0))?);
    }
    let variant = inplace::batches(placement, Waiting::Park, 64)?;
    batches.push(contest.enter("64 slots, one kick", Ok(variant), Turn::of(64_000, 0))?);
    let results = contest.run()?;
    Ok(CASES_BATCHES_ONE_CORE
        .iter()
        .zip(batches)
        .map(|(case, ours)| results.against(case, ours, futex, None))
        .collect())
}
