//! Regions to which nobody stores.
//!
//! ```text
//!                       found nothing, its pause is the longest one
//!   captured by timer -----------------------------------------------> asleep
//!          ^                                                              |
//!          +--- its writer has run, or did not for `IDLE_SCAN_MS` --------+
//!                      one look at each writer, not at each region
//! ```
//! A scan costs time for each page that the region has, and page tables that were not
//! read for a while are cold. A process that has not run since before the last scan
//! has stored nothing: its regions need none, and one look at its processor time answers
//! for all of them.
//!
//! I1. A region sleeps with a number of its writer's that was read before its last
//!     capture began; it is captured once the number is another one.
//! I2. What the number does not tell of (another process's stores) is found by a
//!     capture after `IDLE_SCAN_MS` at the latest.
//! I3. All captures that find nothing take `IDLE_SHARE_US` of a second at most: beyond
//!     that the pauses of such regions are stretched.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::Engine;
use super::keys::Key;
use super::regions::{Body, RegionEntry};
use super::timers::Timer;
use super::tracked::Tracked;
use crate::limits;
use crate::sys::activity::Activity;
use crate::words::{Mode, Publish};

const IDLE_SCAN: Duration = Duration::from_millis(limits::IDLE_SCAN_MS);

/// What a capture that finds nothing costs beside its scan.
const AROUND: Duration = Duration::from_micros(3);

/// Whether a region sleeps.
#[derive(Debug, Default)]
pub(super) struct Sleep {
    /// The writer's number, and since when.
    since: Option<(u64, Instant)>,
    /// Whether it stands in the list of its writer.
    listed: bool,
}

impl Sleep {
    pub(super) fn end(&mut self) {
        self.since = None;
    }
}

/// The writers of regions that sleep.
#[derive(Debug)]
pub(super) struct Idle {
    writers: HashMap<i32, Writer>,
    /// Those that cannot be looked at, until the next sweep: to try costs time as well.
    mute: HashSet<i32>,
    /// When they are looked at next, and the pause between two looks.
    look: Option<(Instant, Duration)>,
    /// Time spent since the last sweep on captures that found nothing.
    spent: Duration,
    /// Factor of the pauses between such captures.
    stretch: u64,
}

#[derive(Debug)]
struct Writer {
    activity: Activity,
    number: u64,
    /// A time after the number was read.
    read_at: Instant,
    regions: Vec<Key>,
    /// Whether none slept at the last look.
    unused: bool,
}

impl Default for Idle {
    fn default() -> Self {
        Self {
            writers: HashMap::new(),
            mute: HashSet::new(),
            look: None,
            spent: Duration::ZERO,
            stretch: 1,
        }
    }
}

impl Idle {
    /// Factor of the pauses between captures that find nothing.
    pub(super) fn stretch(&self) -> u64 {
        self.stretch
    }

    /// Counts a capture that found nothing.
    pub(super) fn found_nothing(&mut self, cost: Duration) {
        self.spent += cost + AROUND;
    }

    /// A second is over: what was spent in it says how much longer pauses have to be.
    pub(super) fn sweep(&mut self) {
        self.stretch = stretched(self.stretch, std::mem::take(&mut self.spent));
        self.mute.clear();
    }

    /// The number of a writer, if it was read before `began`; it is read anew for next
    /// time where it was not.
    fn number_before(&mut self, pid: i32, began: Instant) -> Option<u64> {
        if let Some(writer) = self.writers.get_mut(&pid) {
            return (writer.read_at <= began).then_some(writer.number);
        }
        if self.mute.contains(&pid) {
            return None;
        }
        let looked = Activity::of(pid).and_then(|activity| Ok((activity.read()?, activity)));
        let Ok((number, activity)) = looked else {
            self.mute.insert(pid);
            return None;
        };
        let writer = Writer {
            activity,
            number,
            read_at: Instant::now(),
            regions: Vec::new(),
            unused: false,
        };
        self.writers.insert(pid, writer);
        None
    }
}

/// The factor for the next second, after one in which captures with `stretch` took
/// `spent`.
fn stretched(stretch: u64, spent: Duration) -> u64 {
    let spent_us = u64::try_from(spent.as_micros()).unwrap_or(u64::MAX);
    let unstretched = spent_us.saturating_mul(stretch);
    unstretched
        .div_ceil(limits::IDLE_SHARE_US)
        .clamp(1, limits::PAUSE_CEILING_US)
}

impl Engine {
    /// Lets a region sleep whose capture that began at `began` found nothing, if its
    /// writer can be looked at instead.
    pub(super) fn rest(&mut self, key: Key, began: Instant) {
        let Some(tracked) = tracked_of(self.regions.get_mut(key)) else {
            return;
        };
        let may_sleep = tracked.mode == Mode::Async
            && tracked.publish == Publish::Timer
            && tracked.interval.is_longest()
            && !tracked.is_lost();
        let Some(pid) = tracked.living_writer().filter(|_| may_sleep) else {
            return;
        };
        let Some(number) = self.idle.number_before(pid, began) else {
            return;
        };
        let pause = Duration::from_micros(tracked.interval.idle_us());
        tracked.sleep.since = Some((number, self.now));
        tracked.due = None;
        if !std::mem::replace(&mut tracked.sleep.listed, true)
            && let Some(writer) = self.idle.writers.get_mut(&pid)
        {
            writer.regions.push(key);
        }
        self.plan_look(pause);
    }

    /// Has the writers looked at after `pause` at the latest, again and again.
    fn plan_look(&mut self, pause: Duration) {
        let at = self.now + pause;
        let (next, shortest) = self.idle.look.unwrap_or((at, pause));
        if at < next || self.idle.look.is_none() {
            self.timers.set(at, Timer::Idle);
        }
        self.idle.look = Some((next.min(at), shortest.min(pause)));
    }

    /// Looks which writers have run, and wakes their regions.
    pub(super) fn look_at_writers(&mut self) {
        let Some((_, pause)) = self.idle.look.filter(|(at, _)| *at <= self.now) else {
            return;
        };
        let mut awake = Vec::new();
        let (now, regions) = (self.now, &mut self.regions);
        self.idle.writers.retain(|_, writer| {
            let number = writer.activity.read().ok();
            let read_at = Instant::now();
            writer.regions.retain(|key| {
                let Some(tracked) = tracked_of(regions.get_mut(*key)) else {
                    return false;
                };
                let asleep = tracked.sleep.since.is_some_and(|(with, since)| {
                    Some(with) == number && now - since < IDLE_SCAN && tracked.due.is_none()
                });
                if !asleep {
                    tracked.sleep.listed = false;
                    if let Some((_, since)) = tracked.sleep.since.take() {
                        let pause = Duration::from_micros(tracked.interval.current());
                        tracked.due.get_or_insert(since + pause);
                        awake.push(*key);
                    }
                }
                asleep
            });
            // It serves what is captured from here on as well.
            (writer.number, writer.read_at) = (number.unwrap_or(0), read_at);
            let unused = writer.regions.is_empty();
            let again = std::mem::replace(&mut writer.unused, unused);
            number.is_some() && !(unused && again)
        });
        self.idle.look = None;
        if !self.idle.writers.is_empty() {
            self.plan_look(pause);
        }
        for key in awake {
            self.make_runnable(key);
        }
    }
}

fn tracked_of(entry: Option<&mut RegionEntry>) -> Option<&mut Tracked> {
    match entry {
        Some(RegionEntry {
            body: Body::Tracked(tracked),
            ..
        }) => Some(tracked),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_with_what_captures_of_nothing_would_take() {
        let share = Duration::from_micros(limits::IDLE_SHARE_US);
        assert_eq!(stretched(1, Duration::ZERO), 1);
        assert_eq!(stretched(1, share), 1);
        assert_eq!(stretched(1, share * 4), 4);
        // With that factor they take their share, and it stays.
        assert_eq!(stretched(4, share), 4);
        assert_eq!(stretched(4, share / 4), 1);
        assert_eq!(stretched(u64::MAX, Duration::MAX), limits::PAUSE_CEILING_US);
    }
}
