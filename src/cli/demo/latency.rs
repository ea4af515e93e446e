//! Latencies of a demonstration: recorded in nanoseconds, told in microseconds.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Longest latency that is told apart; a minute, longer than a demonstration waits.
const LONGEST_NS: u64 = 60_000_000_000;

/// Records latencies to three digits, at most about 250 KiB of memory.
pub(super) struct Recorder {
    histogram: Histogram<u64>,
}

impl Recorder {
    pub(super) fn new() -> Recorder {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3)
            .expect("constant bounds that the histogram accepts");
        Recorder { histogram }
    }

    pub(super) fn record(&mut self, ns: u64) {
        self.histogram.saturating_record(ns.max(1));
    }

    pub(super) fn summary(&self) -> Latencies {
        let at = |quantile| us(self.histogram.value_at_quantile(quantile));
        Latencies {
            count: self.histogram.len(),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: us(self.histogram.max()),
        }
    }
}

/// Nanoseconds as microseconds with one digit behind the point.
fn us(ns: u64) -> f64 {
    (ns as f64 / 100.0).round() / 10.0
}

/// A distribution in microseconds; all zero if nothing was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Latencies {
    /// How many were recorded.
    pub(super) count: u64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_in_microseconds() {
        let mut recorder = Recorder::new();
        assert_eq!(recorder.summary(), Latencies::default());
        for us in 1..=1000 {
            recorder.record(us * 1000);
        }
        let summary = recorder.summary();
        assert_eq!(summary.count, 1000);
        assert!((summary.p50 - 500.0).abs() <= 1.0, "{summary:?}");
        assert!((summary.p99 - 990.0).abs() <= 1.0, "{summary:?}");
        assert!((summary.max - 1000.0).abs() <= 1.0, "{summary:?}");
        recorder.record(u64::MAX);
        assert!(recorder.summary().max >= 59_000_000.0);
    }
}
