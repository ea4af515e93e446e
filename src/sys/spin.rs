//! Looking again and again for a while before sleeping, where that pays.
//!
//! To be woken costs microseconds, and tens of them where the processor had gone to sleep
//! too, or is a guest's. Who is answered sooner than that had better look than sleep.
//!
//! ```text
//! waits that looked in vain, one behind the other:   1   2   3   4   5 ..
//! waits that sleep at once behind them:              0   0   2   4   8 .. 64
//! ```
//! - I1: a wait looks for as long as it may and no longer, but for the time that others had
//!   this processor meanwhile: who is waited for may need it.
//! - I2: where others need the processor, nobody looks for long: it is left to them.
//! - I3: who never finds anything looks in one wait of 65.

use std::time::{Duration, Instant};

/// Who lets others run and is back this late was not alone.
const OTHERS: Duration = Duration::from_micros(10);
/// Waits in vain that cost nothing more.
const FREE: u32 = 2;
/// Waits without a look behind many in vain: 2 to the power of this.
const MAX_BACK_OFF: u32 = 6;

/// What somebody who waits again and again has learned.
#[derive(Clone, Debug)]
pub struct Spinner {
    most: Duration,
    looks: u32,
    failures: u32,
    skip: u32,
}

impl Spinner {
    /// Looks for `most` at a time, and `looks` times before it lets others run: once in a
    /// microsecond or so.
    pub fn new(most: Duration, looks: u32) -> Self {
        Self {
            most,
            looks,
            failures: 0,
            skip: 0,
        }
    }

    /// What `look` finds, if that is soon; else it is time to sleep.
    pub fn wait_for<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        let began = Instant::now();
        loop {
            for _ in 0..self.looks {
                if let Some(found) = look() {
                    self.failures = 0;
                    return Some(found);
                }
                std::hint::spin_loop();
            }
            let looked = Instant::now();
            std::thread::yield_now();
            let now = Instant::now();
            if now - looked > OTHERS || now - began >= self.most {
                self.failed();
                // What came while others ran was not found by looking.
                return look();
            }
        }
    }

    fn failed(&mut self) {
        self.failures = (self.failures + 1).min(MAX_BACK_OFF + FREE);
        if self.failures > FREE {
            self.skip = 1 << (self.failures - FREE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks of a wait that finds nothing, or finds something at the third look.
    fn looks(spinner: &mut Spinner, finds: bool) -> u32 {
        let mut count = 0;
        let found = spinner.wait_for(|| {
            count += 1;
            (finds && count == 3).then_some(())
        });
        assert_eq!(found.is_some(), finds && count > 0);
        count
    }

    #[test]
    fn looking_in_vain_is_given_up_and_tried_again() {
        // Without any time, a wait is one round of looks and a last one.
        let mut spinner = Spinner::new(Duration::ZERO, 4);
        let waits: Vec<u32> = (0..12).map(|_| looks(&mut spinner, false)).collect();
        assert_eq!(waits, [5, 5, 5, 0, 0, 5, 0, 0, 0, 0, 5, 0]);
        let seldom = (0..6500).filter(|_| looks(&mut spinner, false) > 0).count();
        assert!((98..=105).contains(&seldom), "{seldom} of 6500");
        while looks(&mut spinner, true) == 0 {}
        let again: Vec<u32> = (0..3).map(|_| looks(&mut spinner, false)).collect();
        assert_eq!(again, [5, 5, 5], "one success and it looks as before");
    }

    #[test]
    fn what_comes_late_is_found_but_nothing_is_learned_from_it() {
        let mut spinner = Spinner::new(Duration::ZERO, 1);
        let mut late = || {
            let mut count = 0;
            spinner.wait_for(|| {
                count += 1;
                (count == 2).then_some(())
            })
        };
        let found: Vec<bool> = (0..4).map(|_| late().is_some()).collect();
        assert_eq!(found, [true, true, true, false]);
    }
}
