//! What wakes sleepers in time who sleep without a time-out.
//!
//! A sleep that the kernel ends at a certain time needs a timer, armed for each sleep and
//! taken back at each wake-up: a tenth of a round trip between sleepers. So they sleep
//! for as long as it takes, and one thread of their side, the sentry, watches the other
//! side's liveness word and the earliest of their deadlines for all of them. It wakes
//! them by a post to the semaphore that they sleep on; whoever has time left sleeps on.
//!
//! ```text
//! sleeper: sequence -> enter() -> ask(word, until) -> call? -> look -> sleep -> leave()
//! sentry:  bell -> word -> begin(word) -> sleep while word and bell are that, until armed
//!          -> word changed: post    armed passed: expire(), post    -> again
//! ```
//! - I1: a deadline is lowered before `armed` is looked at, and `armed` is stored before
//!   the deadline is looked at, so that one of the two sees the other: the sentry is up
//!   no later than the earliest deadline, or it is called.
//! - I2: a deadline is raised by [`Watch::expire`] alone, which a post follows: who had
//!   asked before it is awake and asks again. What stays behind of sleepers that woke
//!   early costs one wake-up of the sentry per deadline.
//! - I3: a sleeper compares the liveness word with what the sentry says that it sleeps
//!   on; a change of that word is a post.
//! - I4: the semaphore is the other side's memory too, which may take a post back before
//!   a sleeper is asleep. So the sentry wakes again until a sleeper that it has counted
//!   has left, by numbers that only this process has.

use crate::shm::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// No deadline.
pub const NEVER: u64 = u64::MAX;

/// What sleepers and the sentry of one side have in common.
#[derive(Debug)]
pub struct Watch {
    /// The value of the other side's liveness word that the sentry sleeps on; 0 of none.
    watched: AtomicU32,
    /// Changed to call the sentry.
    bell: AtomicU32,
    /// The earliest deadline that was asked for since the last one passed.
    earliest: AtomicU64,
    /// When the sentry gets up by itself.
    armed: AtomicU64,
    /// Sleepers that have entered, and those that have left.
    entered: AtomicU64,
    left: AtomicU64,
}

/// Sleepers, as the sentry counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sleepers {
    /// Those that have not left.
    pub asleep: u64,
    /// Those that ever left.
    pub left: u64,
}

/// What a sleeper has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Asked {
    /// It may sleep without a time-out: it will be woken.
    pub watched: bool,
    /// The sentry is to be called first.
    pub ring: bool,
}

impl Default for Watch {
    fn default() -> Watch {
        Watch {
            watched: AtomicU32::new(0),
            bell: AtomicU32::new(0),
            earliest: AtomicU64::new(NEVER),
            armed: AtomicU64::new(NEVER),
            entered: AtomicU64::new(0),
            left: AtomicU64::new(0),
        }
    }
}

impl Watch {
    /// Sleeper: from now on the sentry counts it.
    #[inline]
    pub fn enter(&self) {
        // SYNC(watch_count): before the sleep; pairs with `sleepers`, behind a post.
        self.entered.fetch_add(1, Ordering::AcqRel);
    }

    /// Sleeper: it is awake, whether or not it has slept.
    #[inline]
    pub fn leave(&self) {
        self.left.fetch_add(1, Ordering::AcqRel);
    }

    /// Sentry: who is to be woken.
    pub fn sleepers(&self) -> Sleepers {
        let left = self.left.load(Ordering::Acquire);
        // SYNC(watch_count): pairs with `enter`.
        let entered = self.entered.load(Ordering::Acquire);
        Sleepers {
            asleep: entered.saturating_sub(left),
            left,
        }
    }

    /// Sleeper, between reading its semaphore's sequence and sleeping on it: asks to be
    /// woken when the other side's liveness word, a held one, is not `word` any more, and
    /// at `until`, if not [`NEVER`].
    #[inline]
    pub fn ask(&self, word: u32, until: u64) -> Asked {
        // SYNC(watch_word): the sentry sleeps on that value; pairs with `begin`.
        if self.watched.load(Ordering::Acquire) != word {
            return Asked {
                watched: false,
                ring: true,
            };
        }
        Asked {
            watched: true,
            ring: self.lower(until),
        }
    }

    /// Asks for a deadline. True if the sentry would be late.
    #[inline]
    fn lower(&self, until: u64) -> bool {
        let mut earliest = self.earliest.load(Ordering::Relaxed);
        while until < earliest {
            let (stored, seen) = (Ordering::AcqRel, Ordering::Relaxed);
            match self
                .earliest
                .compare_exchange_weak(earliest, until, stored, seen)
            {
                Ok(_) => {
                    // SYNC(watch_deadline): lowered before `armed` is read; pairs with
                    // the fence in `begin`.
                    fence(Ordering::SeqCst);
                    return self.armed.load(Ordering::Relaxed) > until;
                }
                Err(now) => earliest = now,
            }
        }
        false
    }

    /// The word that calls the sentry: changed by [`Watch::call`], to be read before
    /// [`Watch::begin`] and slept on.
    pub fn bell(&self) -> &AtomicU32 {
        &self.bell
    }

    /// Calls the sentry, which is then to be woken at [`Watch::bell`].
    pub fn call(&self) {
        // SYNC(watch_bell): pairs with the sentry's load of it.
        self.bell.fetch_add(1, Ordering::Release);
    }

    /// Sentry: from now on it sleeps on `word`, 0 if the other side is not there, until
    /// the time that this answers.
    #[must_use]
    pub fn begin(&self, word: u32) -> u64 {
        // SYNC(watch_word): pairs with `ask`.
        self.watched.store(word, Ordering::Release);
        let mut earliest = self.earliest.load(Ordering::Relaxed);
        loop {
            self.armed.store(earliest, Ordering::Relaxed);
            // SYNC(watch_deadline): stored before `earliest` is read; pairs with the
            // fence in `lower`.
            fence(Ordering::SeqCst);
            let now = self.earliest.load(Ordering::Relaxed);
            if now == earliest {
                return earliest;
            }
            earliest = now;
        }
    }

    /// Sentry: what was asked for has passed. A post to its side's semaphores follows.
    pub fn expire(&self) {
        // Before the post, so that who sees the post asks anew.
        self.earliest.swap(NEVER, Ordering::AcqRel);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const WORD: u32 = 7;

    #[test]
    fn nobody_sleeps_for_ever_before_the_sentry_does_for_that_word() {
        let watch = Watch::default();
        let refused = Asked {
            watched: false,
            ring: true,
        };
        assert_eq!(watch.ask(WORD, 5), refused);
        assert_eq!(watch.begin(WORD), NEVER);
        assert_eq!(watch.ask(WORD + 1, 5), refused);
        assert!(watch.ask(WORD, NEVER).watched);
        assert_eq!(watch.begin(0), NEVER);
        assert_eq!(watch.ask(WORD, NEVER), refused);
    }

    #[test]
    fn the_sentry_is_called_for_an_earlier_deadline_only() {
        let watch = Watch::default();
        let _ = watch.begin(WORD);
        assert!(watch.ask(WORD, 100).ring);
        assert_eq!(watch.begin(WORD), 100);
        assert!(!watch.ask(WORD, 100).ring && !watch.ask(WORD, 250).ring);
        assert!(!watch.ask(WORD, NEVER).ring);
        assert!(watch.ask(WORD, 99).ring);
        assert_eq!(watch.begin(WORD), 99);
        watch.expire();
        assert_eq!(watch.begin(WORD), NEVER);
        assert!(watch.ask(WORD, 250).ring, "it had gone to sleep for good");
    }
}
