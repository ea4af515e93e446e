//! A distribution of times.

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Times in nanoseconds, three digits, up to a minute.
#[derive(Clone)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, 60_000_000_000, 3)?))
    }

    pub(crate) fn record(&mut self, ns: u64) {
        self.0.saturating_record(ns.max(1));
    }

    /// Several times the same.
    pub(crate) fn record_many(&mut self, ns: u64, count: u64) {
        self.0.saturating_record_n(ns.max(1), count);
    }

    pub(crate) fn add(&mut self, other: &Self) -> anyhow::Result<()> {
        Ok(self.0.add(&other.0)?)
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len()
    }

    /// The value at `quantile`, 0.5 for the median, in nanoseconds.
    pub(crate) fn at(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64
    }
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |ns: u64| format!("{:.1?}", Duration::from_nanos(ns));
        let at = |quantile| show(self.0.value_at_quantile(quantile));
        write!(
            f,
            "p50 {} p90 {} p99 {} p99.9 {} max {} (n {})",
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            show(self.0.max()),
            self.0.len()
        )
    }
}
