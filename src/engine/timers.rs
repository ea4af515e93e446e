//! When the loop has to look at something again. A value: time is an argument.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use super::keys::Key;

/// What a timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A region's next capture, hold or deadline.
    Region(Key),
    /// A connection to another node: handshake, ping, silence.
    Peer(Key),
    /// Dialling a source again.
    Dial(Key),
    /// A listening socket that rested takes connections again.
    Listen,
    /// Requests for cuts that took too long.
    Cuts,
    /// The writers of regions that sleep.
    Idle,
    /// What is left of this second's audit.
    Audit,
    /// Once a second: rates, forgotten replicas, new audit work.
    Sweep,
}

/// Timers in order of time. An entry that is no longer wanted fires all the same:
/// whoever it is for looks at its own state and may do nothing.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, Timer)>>,
}

impl Timers {
    pub(crate) fn set(&mut self, at: Instant, timer: Timer) {
        self.heap.push(Reverse((at, timer)));
    }

    /// The earliest time in the table.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes one timer whose time has come.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Timer> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse((_, timer))| timer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn fires_in_order_of_time_and_not_early() {
        let start = Instant::now();
        let mut timers = Timers::default();
        timers.set(start + Duration::from_millis(2), Timer::Sweep);
        let key = Key::from_bits(5);
        timers.set(start + Duration::from_millis(1), Timer::Dial(key));
        assert_eq!(timers.pop_due(start), None);
        let late = start + Duration::from_millis(3);
        assert_eq!(timers.pop_due(late), Some(Timer::Dial(key)));
        assert_eq!(timers.pop_due(late), Some(Timer::Sweep));
        assert_eq!(timers.pop_due(late), None);
    }
}
