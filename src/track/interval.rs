//! The pause between two captures by timer.
//!
//! A scan costs the writer too (its page tables are locked meanwhile, and each page that
//! is armed is another fault), so the pause adapts to both:
//!
//! - where nothing is found it doubles, up to [`IDLE_MAX_US`]: the first store after a
//!   rest is not told of, and waits that long;
//! - where captures are costly it grows, so that they take no more than about a tenth of
//!   the time, up to the longest pause.
//!
//! The longest pause is the staleness limit and wins over both. Only regions in which
//! nothing is found, and of which there are so many that looking at them all would keep
//! the engine busy, are looked at less often still.

use crate::limits::{IDLE_MAX_US, PAUSE_CEILING_US};

/// Pauses between captures for each unit of time spent in one.
const PAUSE_PER_COST: u64 = 9;

/// An adaptive pause in microseconds, between two bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval {
    min_us: u64,
    max_us: u64,
    current_us: u64,
}

impl Interval {
    /// Starts at the shortest pause; a `max_us` below `min_us` counts as `min_us`.
    pub fn new(min_us: u64, max_us: u64) -> Self {
        Self {
            min_us,
            max_us: max_us.max(min_us),
            current_us: min_us,
        }
    }

    /// The pause until the next capture, after one that took `cost_us` and found
    /// `dirty_pages`; if that is none, `stretch` times as long as otherwise.
    pub fn after_capture(&mut self, cost_us: u64, dirty_pages: u64, stretch: u64) -> u64 {
        let wanted = if dirty_pages > 0 {
            self.min_us
        } else {
            let doubled = self.current_us.saturating_mul(2).max(1);
            doubled.min(IDLE_MAX_US.max(self.min_us))
        };
        self.current_us = wanted
            .max(cost_us.saturating_mul(PAUSE_PER_COST))
            .clamp(self.min_us, self.max_us);
        if dirty_pages == 0 && stretch > 1 {
            let longest = self.max_us.max(PAUSE_CEILING_US);
            self.current_us = self.current_us.saturating_mul(stretch).min(longest);
        }
        self.current_us
    }

    /// Whether it has found nothing for so long that it does not grow any more.
    pub fn is_longest(&self) -> bool {
        self.current_us >= self.idle_us()
    }

    /// The pause where nothing is found, unstretched, in microseconds.
    pub fn idle_us(&self) -> u64 {
        IDLE_MAX_US.clamp(self.min_us, self.max_us)
    }

    /// The pause as last computed, in microseconds.
    pub fn current(&self) -> u64 {
        self.current_us
    }

    /// The shortest and the longest pause, in microseconds.
    pub fn bounds(&self) -> (u64, u64) {
        (self.min_us, self.max_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_regions_are_looked_at_less_and_busy_ones_at_once() {
        let mut interval = Interval::new(1_000, 20_000);
        let idle: Vec<u64> = (0..6).map(|_| interval.after_capture(10, 0, 1)).collect();
        assert_eq!(idle, [2_000, 4_000, 8_000, 16_000, 20_000, 20_000]);
        assert_eq!(interval.after_capture(10, 1, 1), 1_000);
        assert_eq!(interval.current(), 1_000);
    }

    #[test]
    fn captures_take_a_tenth_of_the_time_at_most_but_staleness_wins() {
        let mut interval = Interval::new(1_000, 20_000);
        assert_eq!(interval.after_capture(500, 7, 1), 4_500);
        assert_eq!(interval.after_capture(u64::MAX, 7, 1), 20_000);
        let mut odd = Interval::new(0, 0);
        assert_eq!(odd.after_capture(5, 0, 1), 0);
        assert_eq!(Interval::new(9, 3).bounds(), (9, 9));
    }

    #[test]
    fn what_rests_is_looked_at_sooner_than_what_is_costly() {
        let mut interval = Interval::new(1_000, 100_000);
        assert_eq!(interval.after_capture(50_000, 9, 1), 100_000);
        for _ in 0..9 {
            interval.after_capture(10, 0, 1);
        }
        assert_eq!(interval.current(), IDLE_MAX_US);
        assert!(interval.is_longest());
        let mut slow = Interval::new(50_000, 100_000);
        assert_eq!(slow.after_capture(10, 0, 1), 50_000);
        assert!(slow.is_longest());
    }

    #[test]
    fn what_is_stretched_comes_back_with_the_first_change() {
        let mut interval = Interval::new(1_000, 20_000);
        assert_eq!(interval.after_capture(10, 1, 7), 1_000);
        assert!(!interval.is_longest());
        assert_eq!(interval.after_capture(10, 0, 7), 14_000);
        assert_eq!(interval.after_capture(10, 0, 7), 140_000);
        assert!(interval.is_longest());
        assert_eq!(interval.after_capture(10, 0, 1), 20_000);
        assert_eq!(interval.after_capture(10, 0, u64::MAX), PAUSE_CEILING_US);
        assert_eq!(interval.after_capture(10, 2, u64::MAX), 1_000);
    }
}
