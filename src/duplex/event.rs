//! The four semaphores: event counts in one 64-bit word each.
//!
//! ```text
//! 63              32 31               0
//! |    sequence     |     waiters     |      the sequence is the futex word
//! ```
//! ```text
//! poster:  store what is waited for (Release) -> post() -> true? wake sleepers of the sequence
//! waiter:  wait(): waiters + 1 -> { sequence; ready? leave; sleep while the sequence is that } -> waiters - 1
//! ```
//! They start at 0 and never accumulate: a post that finds no waiter leaves
//! nothing behind but a higher sequence. Any number of posters and waiters, in any
//! number of processes.
//!
//! - I1: post and announcement change the same word, so one of them is first. Is it
//!   the post, then the waiter sees what was stored before it; is it the announcement,
//!   then the poster sees a waiter, and the sequence that the waiter sleeps on is
//!   either older than the post (the kernel refuses to sleep, or the wake-up ends the
//!   sleep) or was read after it (and the waiter saw what was stored).
//! - I2: a waiter that is killed leaves the count too high; posts then wake nobody at
//!   the price of a system call, and no wake-up is lost. [`forget_waiters`] mends it.

use std::ops::ControlFlow;

use crate::shm::sync::{AtomicU64, Ordering};

/// One post, in the high half.
const POST: u64 = 1 << 32;

/// The sequence of a word, which is the futex word that waiters sleep on.
#[inline]
pub const fn sequence_of(word: u64) -> u32 {
    (word >> 32) as u32
}

/// The number of announced waiters of a word.
#[inline]
pub const fn waiters_of(word: u64) -> u32 {
    word as u32
}

/// Says that something happened. True if somebody may be asleep, who then has to
/// be woken at the word's high half.
#[inline]
#[must_use = "sleepers have to be woken"]
pub fn post(word: &AtomicU64) -> bool {
    // SYNC(event_post): publishes what was stored before; pairs with `wait`.
    waiters_of(word.fetch_add(POST, Ordering::AcqRel)) != 0
}

/// Whether somebody has announced to wait. Only a hint: without a post a waiter
/// that comes a moment later is not seen.
#[inline]
pub fn has_waiters(word: &AtomicU64) -> bool {
    waiters_of(word.load(Ordering::Relaxed)) != 0
}

/// Waits until `ready` answers something. `sleep` is to block while the word's
/// sequence is what it is given, may end at any time, and says by `Break` that
/// waiting ends: `ready` is then asked once more.
pub fn wait<T>(
    word: &AtomicU64,
    mut ready: impl FnMut() -> Option<T>,
    mut sleep: impl FnMut(u32) -> ControlFlow<()>,
) -> Option<T> {
    // SYNC(event_post): what was stored before an earlier post is seen by `ready`;
    // a later post sees this waiter.
    word.fetch_add(1, Ordering::AcqRel);
    let found = loop {
        // SYNC(event_post): what was stored before the post that made this sequence
        // is seen by `ready`.
        let sequence = sequence_of(word.load(Ordering::Acquire));
        if let Some(found) = ready() {
            break Some(found);
        }
        if sleep(sequence).is_break() {
            break ready();
        }
    };
    word.fetch_sub(1, Ordering::Release);
    found
}

/// Takes back the announcements of waiters that died. Only for who knows that
/// none is alive.
pub fn forget_waiters(word: &AtomicU64) {
    word.fetch_and(!(POST - 1), Ordering::AcqRel);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn posts_without_waiters_wake_nobody_and_wrap() {
        let word = AtomicU64::new(u64::MAX << 32);
        assert!(!post(&word));
        assert_eq!(word.load(Ordering::Relaxed), 0);
        word.store(3, Ordering::Relaxed);
        assert!(post(&word) && has_waiters(&word));
        forget_waiters(&word);
        assert!(!has_waiters(&word));
        assert_eq!(sequence_of(word.load(Ordering::Relaxed)), 1);
    }

    #[test]
    fn a_waiter_looks_once_more_when_its_time_is_up() {
        let word = AtomicU64::new(0);
        let mut looks = 0;
        let found = wait(
            &word,
            || {
                looks += 1;
                (looks == 3).then_some(looks)
            },
            |sequence| match sequence {
                0 if !post(&word) => ControlFlow::Break(()),
                0 => ControlFlow::Continue(()),
                _ => ControlFlow::Break(()),
            },
        );
        assert_eq!(found, Some(3));
        assert_eq!(word.load(Ordering::Relaxed), POST);
    }
}
