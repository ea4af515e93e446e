//! From entering `commit()` to the reader on the replica awake.
//!
//! Eight bytes change in a region all of whose pages are allocated, another page
//! each time. Four processes: this one writes; source node, replica node and reader
//! are others. The bare chain has the same four. Over two cores, writer and source
//! are on core 0, replica and reader on core 1, in both variants.

use std::time::Instant;

use uffd_sync::client::Writer;
use uffd_sync::sys::process::pin_to_cpu;
use uffd_sync::units::{GIB, MIB};
use uffd_sync::words::Mode;

use crate::chain::{Chain, Means};
use crate::harness::{BareScan, Goal, Latencies, Options, Outcome, Rounds};
use crate::nodes::{PATIENCE, Pair, span_of};
use crate::watch::{Watcher, store};

const MANUAL_FREE: &str = "commit-manual/free";
const ASYNC_FREE: &str = "commit-async/free";
const MANUAL_TWO_CORES: &str = "commit-manual/two-cores";
const ASYNC_TWO_CORES: &str = "commit-async/two-cores";

pub(crate) const CASES_FREE: &[&str] = &[MANUAL_FREE, ASYNC_FREE];
pub(crate) const CASES_TWO_CORES: &[&str] = &[MANUAL_TWO_CORES, ASYNC_TWO_CORES];

/// The variant that scans.
const SCAN: usize = 4;
const BASELINE: &str = "bare doorbell, 60 bytes of TCP, futex";

struct Subject {
    pair: Pair,
    manual: (Writer, Watcher),
    asynchronous: (Writer, Watcher),
    chain: Chain,
    /// The same with both nodes on an io_uring: what of the ratio is theirs.
    ring_chain: Chain,
    scan: BareScan,
    /// Values of one round, and the next value of each chain.
    count: u64,
    next: [u64; 4],
    latencies: [Latencies; 4],
    /// Of the calls alone: until `commit()` returned to the writer.
    returned: [Latencies; 2],
}

impl Subject {
    fn new(options: &Options, cores: [Option<usize>; 2]) -> anyhow::Result<Self> {
        let size = options.pick(128 * MIB, GIB);
        let pair = Pair::start(cores)?;
        let region = |name, mode| -> anyhow::Result<_> {
            let writer = pair.replicated(name, size, mode)?;
            let watcher = Watcher::start(&pair, name, cores[1])?;
            Ok((writer, watcher))
        };
        Ok(Self {
            manual: region("manual", Mode::Manual)?,
            asynchronous: region("async", Mode::Async)?,
            pair,
            chain: Chain::start(cores, Means::Calls)?,
            ring_chain: Chain::start(cores, Means::Ring)?,
            scan: BareScan::new(512)?,
            count: options.pick(100, 500),
            next: [1; 4],
            latencies: [
                Latencies::new()?,
                Latencies::new()?,
                Latencies::new()?,
                Latencies::new()?,
            ],
            returned: [Latencies::new()?, Latencies::new()?],
        })
    }

    /// One round of one variant: its median in microseconds.
    fn measure(&mut self, variant: usize, round: usize) -> anyhow::Result<f64> {
        if variant == SCAN {
            return self.bare_scan();
        }
        let series = (self.next[variant], self.count);
        self.next[variant] += self.count;
        let latencies = match variant {
            0 => commits(&mut self.manual, series, &mut self.returned[0])?,
            1 => commits(&mut self.asynchronous, series, &mut self.returned[1])?,
            2 => self.chain.time(series.0, series.1)?,
            _ => self.ring_chain.time(series.0, series.1)?,
        };
        if round > 0 {
            self.latencies[variant].add(&latencies)?;
        }
        Ok(latencies.at(0.5) / 1e3)
    }

    /// A scan of the asynchronous region, where nothing is dirty: every commit was
    /// captured before its reader saw it.
    fn bare_scan(&mut self) -> anyhow::Result<f64> {
        let span = span_of(&self.asynchronous.0);
        let started = Instant::now();
        let found = self.scan.protect(span)?.len();
        let time = started.elapsed();
        anyhow::ensure!(found == 0, "{found} ranges are dirty behind a commit");
        Ok(time.as_nanos() as f64 / 1e3)
    }
}

fn commits(
    (writer, watcher): &mut (Writer, Watcher),
    series: (u64, u64),
    returned: &mut Latencies,
) -> anyhow::Result<Latencies> {
    let writer = &*writer;
    watcher.time(
        series,
        |seq| store(writer, seq),
        || {
            let started = Instant::now();
            writer.commit(PATIENCE)?;
            returned.record(started.elapsed().as_nanos() as u64);
            Ok(())
        },
    )
}

pub(crate) fn run_free(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut subject = Subject::new(options, [None; 2])?;
    let rounds = Rounds::run(options, 5, |variant, round| subject.measure(variant, round))?;
    report(subject, &rounds, [MANUAL_FREE, ASYNC_FREE])
}

pub(crate) fn run_two_cores(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut subject = Subject::new(options, [Some(0), Some(1)])?;
    // A thread of its own, so that nothing else of this process stays pinned.
    let rounds = std::thread::scope(|scope| {
        let pinned = scope.spawn(|| {
            pin_to_cpu(0)?;
            Rounds::run_over_two_cores(options, 5, |variant, round| subject.measure(variant, round))
        });
        pinned
            .join()
            .map_err(|_| anyhow::anyhow!("the measuring thread panicked"))?
    })?;
    report(subject, &rounds, [MANUAL_TWO_CORES, ASYNC_TWO_CORES])
}

fn report(
    subject: Subject,
    rounds: &Rounds,
    [manual_case, async_case]: [&'static str; 2],
) -> anyhow::Result<Vec<Outcome>> {
    let Subject {
        pair,
        manual,
        asynchronous,
        latencies,
        returned,
        ..
    } = subject;
    pair.verify("manual", &manual.0)?;
    pair.verify("async", &asynchronous.0)?;
    let [manual_us, async_us, bare_us, ring_us, scan_us] =
        [0, 1, 2, 3, SCAN].map(|variant| rounds.of(variant));
    let [of_manual, of_async, of_bare, of_ring] = &latencies;
    let baseline = (BASELINE, bare_us);
    let allowed = 1.5 + 1.2 * scan_us / bare_us;
    let scanned = asynchronous.0.size() / MIB;
    let outcomes = vec![
        Outcome::times(manual_case, "us", manual_us, baseline)
            .goal(Goal::AtMost(1.5))
            .latency("manual", of_manual)
            .latency("commit() returned", &returned[0])
            .latency("bare", of_bare)
            .latency("bare, io_uring", of_ring)
            .note(format!(
                "the bare chain with both nodes on an io_uring: {ring_us:.1} us; against it {:.2}x",
                manual_us / ring_us
            )),
        Outcome::times(async_case, "us", async_us, baseline)
            .goal(Goal::AtMost(allowed))
            .latency("async", of_async)
            .latency("commit() returned", &returned[1])
            .note(format!(
                "goal: 1.5x + 1.2 bare scans of {scanned} MiB, {scan_us:.0} us each"
            )),
    ];
    drop((manual, asynchronous));
    pair.end()?;
    let placement = rounds.placement();
    let with_placement = |outcome: Outcome| {
        placement
            .iter()
            .fold(outcome, |outcome, words| outcome.note(words))
    };
    Ok(outcomes.into_iter().map(with_placement).collect())
}
