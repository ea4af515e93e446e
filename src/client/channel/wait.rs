//! Waiting for the other side: look, poll, sleep, and notice its death.

use std::cell::Cell;
use std::hint::spin_loop;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::yield_now;
use std::time::{Duration, Instant};

use super::sentry::Sentry;
use crate::duplex::watch::NEVER;
use crate::duplex::{Pause, Presence, Segment, Semaphore, Side, Spinner, Waiting, event};
use crate::limits::CHANNEL_PROBE_MS;
use crate::shm::high_half;
use crate::sys::futex;
use crate::sys::process::{current_cpu, monotonic_ns};

/// Looks before anything else where polling paid the last time, some 2 us: the answer
/// of a busy peer comes within them.
pub(super) const HOT_LOOKS: u32 = 256;
/// Looks between two readings of the clock.
const LOOKS: u32 = 32;

/// Time after a time-out within which a changed word counts as a wake-up that was late.
const LATE_NS: u64 = 100_000;

/// Why a wait ended without what was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The time is up.
    TimedOut,
    /// The other side died or left.
    Gone,
}

/// One thread's way of waiting for the other side of a channel.
#[derive(Debug)]
pub(super) struct Waiter {
    segment: Segment,
    /// Lets it sleep without a time-out.
    sentry: Option<Arc<Sentry>>,
    own: Side,
    peer: Side,
    spinner: Spinner,
    /// Polling found something the last time.
    is_hot: bool,
    /// The CPU last published.
    cpu: u32,
    /// The generation in which the other side was last seen alive; 0 = it has not come.
    seen: u64,
    /// Of the random delays that a test may ask for.
    seed: u64,
}

impl Waiter {
    pub(super) fn new(segment: &Segment, own: Side, waiting: Waiting) -> Waiter {
        Waiter {
            segment: segment.clone(),
            sentry: None,
            own,
            peer: match own {
                Side::Client => Side::Server,
                Side::Server => Side::Client,
            },
            spinner: Spinner::new(waiting),
            is_hot: false,
            cpu: u32::MAX,
            seen: 0,
            seed: monotonic_ns() | 1,
        }
    }

    /// With a sentry, which is of this segment and side.
    pub(super) fn kept_by(self, sentry: Arc<Sentry>) -> Waiter {
        Waiter {
            sentry: Some(sentry),
            ..self
        }
    }

    /// One that has learned nothing yet.
    pub(super) fn anew(&self) -> Waiter {
        Waiter {
            sentry: self.sentry.clone(),
            ..Waiter::new(&self.segment, self.own, self.waiting())
        }
    }

    pub(super) fn waiting(&self) -> Waiting {
        self.spinner.waiting()
    }

    /// Whether polling paid the last time.
    #[inline]
    pub(super) fn is_hot(&self) -> bool {
        self.is_hot
    }

    /// Waits until `ready` answers something; it is asked with `true` where a look
    /// may cost more. `mask` has a bit for each wake-up that matters. `before_sleep`
    /// runs before each sleep. The clock starts after the first microsecond.
    #[inline]
    pub(super) fn wait<T>(
        &mut self,
        semaphore: Semaphore,
        mask: u32,
        timeout: Option<Duration>,
        mut ready: impl FnMut(bool) -> Option<T>,
        before_sleep: impl FnMut(),
    ) -> Result<T, Ended> {
        if self.is_hot {
            for look in 0..HOT_LOOKS {
                if let Some(found) = ready(look % 8 == 7) {
                    return Ok(found);
                }
                // Without it the poll takes the line back from who is about to write it.
                spin_loop();
            }
        } else if let Some(found) = ready(true) {
            return Ok(found);
        }
        self.wait_longer(semaphore, mask, timeout, ready, before_sleep)
    }

    fn wait_longer<T>(
        &mut self,
        semaphore: Semaphore,
        mask: u32,
        timeout: Option<Duration>,
        mut ready: impl FnMut(bool) -> Option<T>,
        before_sleep: impl FnMut(),
    ) -> Result<T, Ended> {
        let cpu = self.publish_cpu();
        let peer_cpu = self.segment.cpu(self.peer);
        self.is_hot = false;
        let polled = match self.spinner.pause(cpu, peer_cpu) {
            Pause::Sleep => None,
            Pause::Yield(times) => self.yield_to_peer(times, &mut ready),
            Pause::PollFor(longest_ns) => self.poll(longest_ns, timeout, &mut ready)?,
        };
        match polled {
            Some(found) => Ok(found),
            None => self.sleep(semaphore, mask, timeout, ready, before_sleep),
        }
    }

    fn publish_cpu(&mut self) -> u32 {
        let cpu = current_cpu();
        if cpu != self.cpu {
            self.cpu = cpu;
            self.segment.publish_cpu(self.own, cpu);
        }
        cpu
    }

    fn yield_to_peer<T>(
        &mut self,
        times: u32,
        ready: &mut impl FnMut(bool) -> Option<T>,
    ) -> Option<T> {
        for _ in 0..times {
            yield_now();
            if let Some(found) = ready(true) {
                return Some(found);
            }
        }
        None
    }

    /// Polls for a while. `None` = sleep.
    fn poll<T>(
        &mut self,
        longest_ns: u64,
        timeout: Option<Duration>,
        ready: &mut impl FnMut(bool) -> Option<T>,
    ) -> Result<Option<T>, Ended> {
        let begun = monotonic_ns();
        let given = timeout.map_or(u64::MAX, nanoseconds);
        loop {
            for look in 0..LOOKS {
                if let Some(found) = ready(look % 8 == 7) {
                    self.spinner.succeeded();
                    self.is_hot = true;
                    return Ok(Some(found));
                }
                spin_loop();
            }
            let spent = monotonic_ns().saturating_sub(begun);
            let is_late = spent >= given;
            // Who asks by a short time again and again has to learn of it too.
            if (is_late || longest_ns == u64::MAX) && self.is_gone() {
                return ready(true).map(Some).ok_or(Ended::Gone);
            }
            if is_late {
                return Err(Ended::TimedOut);
            }
            if spent >= longest_ns {
                self.spinner.failed();
                return Ok(None);
            }
            let cpu = self.publish_cpu();
            if self.waiting() == Waiting::Adaptive && self.segment.cpu(self.peer) == Some(cpu) {
                return Ok(None);
            }
        }
    }

    /// Sleeps until the semaphore is posted, again and again.
    fn sleep<T>(
        &mut self,
        semaphore: Semaphore,
        mask: u32,
        timeout: Option<Duration>,
        mut ready: impl FnMut(bool) -> Option<T>,
        mut before_sleep: impl FnMut(),
    ) -> Result<T, Ended> {
        let (segment, sentry) = (self.segment.clone(), self.sentry.clone());
        let word = segment.semaphore(semaphore);
        let half = high_half(word);
        let (own, seen) = (segment.signs().1, Cell::new(0));
        let mut until = None;
        let (mut probing, mut ended) = (false, Ended::TimedOut);
        let found = event::wait(
            word,
            || {
                // Before the look: what is said after it changes the word.
                seen.set(segment.signs().0);
                ready(true)
            },
            |sequence| {
                let now = timeout.map_or(0, |_| monotonic_ns());
                let until = *until.get_or_insert_with(|| match timeout {
                    Some(timeout) => now.saturating_add(nanoseconds(timeout)),
                    None => NEVER,
                });
                let alive = segment.lifeline_word(self.peer);
                // SYNC(lifeline): what the peer did before it left is seen by `ready`.
                let value = alive.load(Ordering::Acquire);
                let keeper = sentry.as_ref().filter(|_| !probing);
                // Before the looks: what it saw when it began they see too.
                let kept = keeper.and_then(|sentry| sentry.keep(value, until));
                if self.is_gone() {
                    // The kernel woke one sleeper; each wakes the next.
                    let _ = futex::wake(alive, u32::MAX);
                    ended = Ended::Gone;
                    return ControlFlow::Break(());
                }
                if now >= until {
                    return ControlFlow::Break(());
                }
                before_sleep();
                if segment.has_failpoints() {
                    segment.delay_if_armed(&mut self.seed);
                }
                if kept.is_some() && segment.signs().0 == seen.get() {
                    let slept = futex::wait_masked(half, sequence, mask, NEVER);
                    probing = slept.is_err();
                    return ControlFlow::Continue(());
                }
                if !probing {
                    probing = doze(&segment, self.own, (semaphore, sequence), mask, until);
                    return ControlFlow::Continue(());
                }
                let left = Duration::from_nanos(until.saturating_sub(monotonic_ns()));
                let deadline = Instant::now().checked_add(left);
                let words = [(half, sequence), (alive, value), (own, seen.get())];
                match futex::wait_any(&words, deadline) {
                    Ok(_) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            },
        );
        if probing && self.is_gone() {
            // As above: the wake-up may have been this sleeper's, who has what it wants.
            let _ = futex::wake(segment.lifeline_word(self.peer), u32::MAX);
        }
        found.ok_or(ended)
    }

    /// Whether the other side died, or left.
    pub(super) fn is_gone(&mut self) -> bool {
        match self.segment.presence(self.peer) {
            Presence::Alive => {
                self.seen = self.segment.generation();
                false
            }
            Presence::Died => true,
            // A server that holds no word is not its predecessor that has gone.
            Presence::Absent => {
                self.seen == self.segment.generation() || self.segment.is_stopped(self.peer)
            }
        }
    }
}

/// Sleeps while the semaphore has that sequence, until it is posted, `until`, or for
/// [`CHANNEL_PROBE_MS`]. True if in vain: the next sleep has to end for more reasons.
fn doze(
    segment: &Segment,
    own: Side,
    (semaphore, sequence): (Semaphore, u32),
    mask: u32,
    until: u64,
) -> bool {
    let word = segment.semaphore(semaphore);
    let soon = monotonic_ns() + 1_000_000 * CHANNEL_PROBE_MS;
    let slept = futex::wait_masked(high_half(word), sequence, mask, until.min(soon));
    let in_vain = matches!(slept, Ok(futex::Wake::TimedOut) | Err(_));
    let changed = event::sequence_of(word.load(Ordering::Relaxed)) != sequence;
    // Found later it may have changed after the time-out, while this thread did not run.
    let in_time = || monotonic_ns() < soon.saturating_add(LATE_NS);
    if in_vain && changed && in_time() {
        segment.note_late_wake(own);
    }
    in_vain
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
