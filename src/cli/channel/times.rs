//! Round trips: recorded in nanoseconds, told in microseconds.

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest time that is told apart: a day, the longest time that a call may take.
const LONGEST_NS: u64 = 86_400_000_000_000;

/// Records times to three digits, at most about 300 KiB of memory.
pub(super) struct Times {
    histogram: Histogram<u64>,
}

/// A distribution in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

impl Times {
    pub(super) fn new() -> Times {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3)
            .expect("constant bounds that the histogram accepts");
        Times { histogram }
    }

    pub(super) fn record(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.histogram.saturating_record(ns.max(1));
    }

    pub(super) fn count(&self) -> u64 {
        self.histogram.len()
    }

    pub(super) fn summary(&self) -> Summary {
        let at = |quantile| self.histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Summary {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.histogram.max() as f64 / 1000.0,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary {
            p50,
            p90,
            p99,
            p999,
            max,
        } = self;
        write!(
            f,
            "p50 {p50:.2} us, p90 {p90:.2} us, p99 {p99:.2} us, p99.9 {p999:.2} us, max {max:.2} us"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_in_microseconds() {
        let mut times = Times::new();
        for us in 1..=1000 {
            times.record(Duration::from_micros(us));
        }
        let summary = times.summary();
        assert_eq!(times.count(), 1000);
        for (found, expected) in [
            (summary.p50, 500.0),
            (summary.p90, 900.0),
            (summary.p99, 990.0),
            (summary.p999, 999.0),
            (summary.max, 1000.0),
        ] {
            assert!((found - expected).abs() <= 1.0, "{summary}");
        }
        times.record(Duration::MAX);
        assert!(times.summary().max > 8e10);
    }
}
