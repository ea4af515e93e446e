//! How a side waits: by polling, by sleeping, or by what pays.
//!
//! | peer runs on | [`Waiting::Adaptive`] does |
//! |---|---|
//! | another CPU | polls for up to [`CHANNEL_SPIN_US`], then sleeps; after polls in vain it leaves polling out for a growing number of waits |
//! | the same CPU | yields a few times, so that the peer runs, then sleeps |
//! | not known | as another CPU |

use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{line, slot};
use super::segment::Segment;
use super::state::{self, Answer};
use super::{Sequence, event};
use crate::limits::CHANNEL_SPIN_US;
use crate::shm::high_half;
use crate::sys::futex;

/// How a side waits for the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Waiting {
    /// Poll, whatever it costs: lowest latency on a CPU of its own, hopeless on a
    /// shared one.
    Spin,
    /// Sleep at once.
    Park,
    /// Poll where that pays, else sleep.
    #[default]
    Adaptive,
}

/// The four event counts of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Semaphore {
    /// Client to server: requests were handed over.
    RequestReady,
    /// Server to client: answers were handed over.
    ResponseReady,
    /// Client to a server that drains: responses were read.
    ResponseConsumed,
    /// To a client that waits for room: room came back.
    SpaceAvailable,
}

impl Segment {
    /// The word of an event count, see [`super::event`].
    pub fn semaphore(&self, semaphore: Semaphore) -> &AtomicU64 {
        let index = match semaphore {
            Semaphore::RequestReady => line::REQUEST_READY,
            Semaphore::ResponseReady => line::RESPONSE_READY,
            Semaphore::ResponseConsumed => line::RESPONSE_CONSUMED,
            Semaphore::SpaceAvailable => line::SPACE_AVAILABLE,
        };
        &self.lines().line(index).0[0]
    }

    /// For who has announced to wait for room: sees all answers whose server did not
    /// see the announcement.
    pub fn settle_room(&self) {
        // SYNC(room): pairs with the look at the waiters in `ServerCore::post`.
        let word = self.semaphore(Semaphore::ResponseReady);
        word.fetch_add(0, Ordering::AcqRel);
    }

    /// Whether the slot says that request `sequence` of this side is finished, or
    /// something that it never may.
    #[inline]
    pub fn is_answered(&self, sequence: Sequence) -> bool {
        let mask = u64::from(self.geometry().slots) - 1;
        let line = self.slots().line((sequence & mask) as usize);
        line.prefetch_second_half();
        state::answer(&line.0[slot::STATE], sequence) != Answer::Pending
    }

    /// Posts an event count and wakes all who sleep on it.
    pub fn ring_all(&self, semaphore: Semaphore) {
        let word = self.semaphore(semaphore);
        if event::post(word) {
            // Refused only for an address that is not mapped.
            let _ = futex::wake(high_half(word), u32::MAX);
        }
    }
}

/// When a side that polls looks for the first time.
///
/// A look in vain takes the line away from the other side, which then has to fetch it
/// once more before it can hand anything over. So a side that has just handed over keeps
/// away from the line for about as long as the last answers took, and looks closely
/// only then.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    pauses: u32,
    /// Finds at the first look since it last became later.
    prompt: u32,
}

impl Pace {
    /// Longest time to keep away, in pauses of some 15 to 40 ns.
    const MOST: u32 = 16;
    /// Finds at the first look after which it may have been too late.
    const PATIENCE: u32 = 8;

    /// Keeps away from the line.
    #[inline]
    pub(super) fn hold_off(&self) {
        for _ in 0..self.pauses {
            std::hint::spin_loop();
        }
    }

    /// Learns that so many looks were in vain.
    #[inline]
    pub(super) fn found_after(&mut self, looks: u32) {
        if looks > 1 {
            self.pauses = (self.pauses + 1).min(Pace::MOST);
            self.prompt = 0;
        } else if looks == 0 {
            self.prompt += 1;
            if self.prompt > Pace::PATIENCE {
                self.pauses = self.pauses.saturating_sub(1);
                self.prompt = 0;
            }
        }
    }
}

/// What to do after a look in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Look again, until this long after the first look, in nanoseconds.
    PollFor(u64),
    /// Let others run, so many times, and look again after each.
    Yield(u32),
    /// Sleep.
    Sleep,
}

/// Times that a side lets a peer on the same CPU run before it sleeps.
const YIELDS: u32 = 4;
/// Waits without polling after many polls in vain: 2 to the power of this.
const MAX_BACK_OFF: u32 = 6;

/// What one waiting side has learned about polling.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spinner {
    waiting: Waiting,
    failures: u32,
    skip: u32,
}

impl Spinner {
    /// Knows nothing yet.
    pub fn new(waiting: Waiting) -> Spinner {
        Spinner {
            waiting,
            ..Spinner::default()
        }
    }

    /// The way of waiting that it was made for.
    pub fn waiting(&self) -> Waiting {
        self.waiting
    }

    /// What to do now that a first look was in vain. `cpu` is where this side runs,
    /// `peer` where the other one said it does.
    #[inline]
    pub fn pause(&mut self, cpu: u32, peer: Option<u32>) -> Pause {
        match self.waiting {
            Waiting::Spin => Pause::PollFor(u64::MAX),
            Waiting::Park => Pause::Sleep,
            Waiting::Adaptive if peer == Some(cpu) => Pause::Yield(YIELDS),
            Waiting::Adaptive if self.skip > 0 => {
                self.skip -= 1;
                Pause::Sleep
            }
            Waiting::Adaptive => Pause::PollFor(1000 * CHANNEL_SPIN_US),
        }
    }

    /// Polling found something.
    #[inline]
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Polling found nothing in its time. The first two failures cost nothing more.
    pub fn failed(&mut self) {
        self.failures = (self.failures + 1).min(MAX_BACK_OFF + 2);
        if self.failures > 2 {
            self.skip = 1 << (self.failures - 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polls_in_vain_become_rare_and_a_success_brings_them_back() {
        let mut spinner = Spinner::new(Waiting::Adaptive);
        let polls = |spinner: &mut Spinner, waits: u32| {
            let mut polls = 0;
            for _ in 0..waits {
                if let Pause::PollFor(_) = spinner.pause(0, Some(1)) {
                    polls += 1;
                    spinner.failed();
                }
            }
            polls
        };
        assert_eq!(polls(&mut spinner, 3), 3);
        assert!(polls(&mut spinner, 1000) < 25);
        while spinner.pause(0, None) == Pause::Sleep {}
        spinner.succeeded();
        assert_eq!(polls(&mut spinner, 2), 2);
    }

    #[test]
    fn the_first_look_comes_about_when_answers_do() {
        let mut pace = Pace::default();
        for answer in [10u32, 3, 40, 0] {
            for _ in 0..400 {
                pace.found_after(answer.saturating_sub(pace.pauses));
            }
            let expected = answer.min(Pace::MOST);
            let near = expected.saturating_sub(1)..=expected;
            assert!(near.contains(&pace.pauses), "{answer}: {}", pace.pauses);
        }
    }

    #[test]
    fn the_other_ways_are_what_they_say() {
        let mut spin = Spinner::new(Waiting::Spin);
        let mut park = Spinner::new(Waiting::Park);
        let mut adaptive = Spinner::new(Waiting::Adaptive);
        for _ in 0..100 {
            spin.failed();
            assert_eq!(spin.pause(1, Some(1)), Pause::PollFor(u64::MAX));
            assert_eq!(park.pause(1, Some(2)), Pause::Sleep);
            assert_eq!(adaptive.pause(1, Some(1)), Pause::Yield(YIELDS));
        }
        assert_eq!(park.waiting(), Waiting::Park);
    }
}
