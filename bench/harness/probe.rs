//! How far apart the first two cores are: the round trip of one cache line.
//!
//! On a guest they move while a bench runs: two threads of one core, two cores that
//! share a cache, or two that do not.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uffd_sync::sys::process::pin_to_cpu;

/// Below this the two are threads of one core.
const SIBLING_BELOW_NS: f64 = 48.0;
/// Below this a round trip stays within one complex of cores.
const NEAR_BELOW_NS: f64 = 150.0;
/// Above this somebody else was running on one of the two.
const DISTURBED_ABOVE_NS: f64 = 2_000.0;
/// Round trips in one batch, and batches of one probe.
const BATCH: u64 = 2_000;
const BATCHES: usize = 9;
/// Two threads that share a core take milliseconds for each round trip.
const GIVE_UP: Duration = Duration::from_millis(200);
/// Looks at the line between two looks at the clock, which costs as much as ten.
const POLLS_PER_CLOCK: u32 = 1_000;

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Nearness {
    /// They are two threads of one core.
    Sibling(f64),
    /// The two cores share a cache.
    Near(f64),
    /// They do not.
    Far(f64),
    /// Somebody else ran on them, or there is one core only.
    Unknown,
}

#[repr(align(128))]
struct Line(AtomicU64);

impl Line {
    /// Polls until the line holds `value`; no if `give_up` says so before.
    fn becomes(&self, value: u64, give_up: impl Fn() -> bool) -> bool {
        loop {
            for _ in 0..POLLS_PER_CLOCK {
                // SYNC(bounce): pairs with the stores of the other core.
                if self.0.load(Ordering::Acquire) == value {
                    return true;
                }
                std::hint::spin_loop();
            }
            if give_up() {
                return false;
            }
        }
    }
}

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
                let give_up = || stop.load(Ordering::Relaxed);
                while line.becomes(next, give_up) {
                    line.0.store(next + 1, Ordering::Release);
                    next += 2;
                }
            });
            let asks = scope.spawn(|| ask(&line, &stop));
            let batches = asks.join().unwrap_or_default();
            stop.store(true, Ordering::Relaxed);
            batches
        });
        batches.sort_by(f64::total_cmp);
        match batches.get(batches.len() / 2) {
            Some(ns) if *ns < SIBLING_BELOW_NS => Self::Sibling(*ns),
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
            let give_up = || stop.load(Ordering::Relaxed) || begun.elapsed() > GIVE_UP;
            if !line.becomes(next + 2, give_up) {
                return batches;
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
            Self::Sibling(ns) => write!(f, "threads of one core ({ns:.0} ns)"),
            Self::Near(ns) => write!(f, "near ({ns:.0} ns)"),
            Self::Far(ns) => write!(f, "far ({ns:.0} ns)"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}
