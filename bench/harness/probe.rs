//! How far apart the first two cores are: the round trip of one cache line.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uffd_sync::sys::process::pin_to_cpu;

/// Below this a round trip stays within one complex of cores.
const NEAR_BELOW_NS: f64 = 150.0;
/// Above this somebody else was running on one of the two.
const DISTURBED_ABOVE_NS: f64 = 2_000.0;
/// Round trips in one batch, and batches of one probe.
const BATCH: u64 = 2_000;
const BATCHES: usize = 9;
/// Two threads that share a core take milliseconds for each round trip.
const GIVE_UP: Duration = Duration::from_millis(200);

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Nearness {
    /// The two cores share a cache.
    Near(f64),
    /// They do not.
    Far(f64),
    /// Somebody else ran on them, or there is one core only.
    Unknown,
}

#[repr(align(128))]
struct Line(AtomicU64);

impl Nearness {
    /// Bounces a cache line between cores 0 and 1.
    pub(crate) fn probe() -> Self {
        let (line, stop) = (Line(AtomicU64::new(0)), AtomicBool::new(false));
        let mut batches = std::thread::scope(|scope| {
            scope.spawn(|| {
                if pin_to_cpu(1).is_err() {
                    stop.store(true, Ordering::Relaxed);
                }
                let mut next = 1;
                while !stop.load(Ordering::Relaxed) {
                    // SYNC(bounce): pairs with the stores of `ask`, and each store
                    // here with its load.
                    if line.0.load(Ordering::Acquire) == next {
                        line.0.store(next + 1, Ordering::Release);
                        next += 2;
                    }
                    std::hint::spin_loop();
                }
            });
            let asks = scope.spawn(|| ask(&line, &stop));
            let batches = asks.join().unwrap_or_default();
            stop.store(true, Ordering::Relaxed);
            batches
        });
        batches.sort_by(f64::total_cmp);
        match batches.get(batches.len() / 2) {
            Some(ns) if *ns < NEAR_BELOW_NS => Self::Near(*ns),
            Some(ns) if *ns < DISTURBED_ABOVE_NS => Self::Far(*ns),
            _ => Self::Unknown,
        }
    }

    /// Whether two probes say the same.
    pub(crate) fn agrees_with(self, other: Self) -> bool {
        std::mem::discriminant(&self) == std::mem::discriminant(&other)
    }
}

/// Nanoseconds per round trip, batch by batch.
fn ask(line: &Line, stop: &AtomicBool) -> Vec<f64> {
    let begun = Instant::now();
    if pin_to_cpu(0).is_err() {
        return Vec::new();
    }
    let mut batches = Vec::new();
    let mut next = 0;
    while batches.len() < BATCHES && !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        for _ in 0..BATCH {
            // SYNC(bounce): as on the other core.
            line.0.store(next + 1, Ordering::Release);
            while line.0.load(Ordering::Acquire) != next + 2 {
                if stop.load(Ordering::Relaxed) || begun.elapsed() > GIVE_UP {
                    return batches;
                }
                std::hint::spin_loop();
            }
            next += 2;
        }
        batches.push(started.elapsed().as_nanos() as f64 / BATCH as f64);
    }
    batches
}

impl fmt::Display for Nearness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Near(ns) => write!(f, "near ({ns:.0} ns)"),
            Self::Far(ns) => write!(f, "far ({ns:.0} ns)"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}
