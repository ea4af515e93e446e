//! What a region's commit suffers while another region of the same node compares
//! its gigabyte with the twin.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use uffd_sync::client::Writer;
use uffd_sync::units::{GIB, MIB};
use uffd_sync::words::Mode;

use crate::harness::{Goal, Latencies, Options, Outcome, Rounds};
use crate::nodes::{PATIENCE, Pair};
use crate::watch::store;

const CASE: &str = "neighbour-commit-p99";

pub(crate) const CASES: &[&str] = &[CASE];

/// Pause between two commits, so that the engine sleeps in idle rounds.
const PAUSE: Duration = Duration::from_micros(500);

struct Subject<'a> {
    small: &'a Writer,
    /// Told to compare, and says that it does.
    compare: &'a AtomicBool,
    comparing: &'a AtomicBool,
    count: u64,
    next: u64,
    latencies: [Latencies; 2],
}

impl Subject<'_> {
    /// One round of one variant: p99 of `commit()` in microseconds.
    fn measure(&mut self, variant: usize, round: usize) -> anyhow::Result<f64> {
        let busy = variant == 1;
        self.compare.store(busy, Ordering::Relaxed);
        wait_until(|| self.comparing.load(Ordering::Relaxed) == busy)?;
        let mut latencies = Latencies::new()?;
        for _ in 0..self.count {
            std::thread::sleep(PAUSE);
            store(self.small, self.next)?;
            self.next += 1;
            let started = Instant::now();
            self.small.commit(PATIENCE)?;
            latencies.record(started.elapsed().as_nanos() as u64);
        }
        if round > 0 {
            self.latencies[variant].add(&latencies)?;
        }
        Ok(latencies.at(0.99) / 1e3)
    }
}

fn wait_until(condition: impl Fn() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        ensure!(Instant::now() < end, "the comparing thread does not answer");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Commits the large region over and over while told to: each commit compares it.
fn keep_comparing(
    large: &Writer,
    [stop, compare, comparing]: [&AtomicBool; 3],
) -> anyhow::Result<u64> {
    let mut compared = 0;
    while !stop.load(Ordering::Relaxed) {
        if !compare.load(Ordering::Relaxed) {
            comparing.store(false, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        comparing.store(true, Ordering::Relaxed);
        store(large, compared + 1)?;
        large.commit(PATIENCE)?;
        compared += 1;
    }
    Ok(compared)
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let pair = Pair::start([None; 2])?;
    let large = pair.writer("large", options.pick(128 * MIB, GIB), Mode::Compare, false)?;
    let small = pair.replicated("small", MIB, Mode::Async)?;
    let flags = [const { AtomicBool::new(false) }; 3];
    let [stop, compare, comparing] = &flags;
    let mut subject = Subject {
        small: &small,
        compare,
        comparing,
        count: options.pick(300, 2000),
        next: 1,
        latencies: [Latencies::new()?, Latencies::new()?],
    };
    let (rounds, compared) = std::thread::scope(|scope| {
        let other = scope.spawn(|| keep_comparing(&large, [stop, compare, comparing]));
        let rounds = Rounds::run(options, 2, |variant, round| subject.measure(variant, round));
        stop.store(true, Ordering::Relaxed);
        let compared = other
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"));
        anyhow::Ok((rounds?, compared??))
    })?;
    ensure!(
        compared as usize > options.rounds(),
        "the large region was compared {compared} times"
    );
    let status = pair.status(&pair.source_socket(), "large")?;
    ensure!(
        status.epoch > compared,
        "the large region's stores were not found"
    );
    pair.verify("small", &small)?;
    let (idle, busy) = (rounds.of(0), rounds.of(1));
    let outcome = Outcome::times(
        CASE,
        "us",
        busy,
        ("p99 of the same commit, node idle", idle),
    )
    .goal(Goal::AtMost(3.0))
    .latency("idle", &subject.latencies[0])
    .latency("comparing", &subject.latencies[1])
    .note(format!(
        "{} MiB compared {compared} times",
        large.size() / MIB
    ));
    drop((small, large));
    pair.end()?;
    Ok(vec![outcome])
}
