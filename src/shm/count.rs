//! The word of a counting semaphore, as glibc lays it out (2.21 and later, 64-bit).
//!
//! | half | meaning |
//! |---|---|
//! | low | the value, at most [`VALUE_MAX`]; the futex word |
//! | high | how many sleep, or are about to |
//!
//! ```text
//! post:  value += 1 -> anybody counted? wake one
//! wait:  waiters += 1 -> value not 0? value -= 1, waiters -= 1
//!                        0? sleep while the value is 0, look again
//! ```
//! Both halves are one word, so a post learns in the same instruction whether
//! somebody sleeps and saves the system call if not.
//!
//! Invariant I1: who sleeps has counted itself before it looked at the value for the
//! last time, so no post is missed. A sleeper that is killed stays counted: later
//! posts then call the kernel in vain, which costs time and nothing else.
//!
//! Sleeping and waking are the caller's: the algorithm is the same in a model.

use super::sync::{AtomicU64, Ordering};

/// Greatest value: glibc's `SEM_VALUE_MAX`.
pub const VALUE_MAX: u64 = i32::MAX as u64;

const VALUE: u64 = 0xFFFF_FFFF;
const WAITER: u64 = 1 << 32;

/// Raises the value by `count`, or leaves it where [`VALUE_MAX`] would be exceeded.
/// Whether somebody is to be woken.
#[inline]
pub fn post(word: &AtomicU64, count: u16) -> bool {
    let count = u64::from(count);
    // SYNC(count): publishes what the poster did before; pairs with `lower` and
    // `take_all`. One instruction instead of a loop: the sum stays far from the
    // waiters' half, since what is too much is taken back at once.
    let before = word.fetch_add(count, Ordering::Release);
    if (before & VALUE) + count > VALUE_MAX {
        word.fetch_sub(count, Ordering::Relaxed);
    }
    before >= WAITER
}

/// The value, at this moment.
#[inline]
pub fn value(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed) & VALUE
}

/// Lowers the value by one, if it is not zero.
#[inline]
pub fn try_lower(word: &AtomicU64) -> bool {
    lower(word, 0)
}

#[inline]
fn lower(word: &AtomicU64, waiters: u64) -> bool {
    let mut now = word.load(Ordering::Relaxed);
    while now & VALUE != 0 {
        let next = (now - 1).wrapping_sub(waiters);
        // SYNC(count): sees what the poster did; pairs with `post`.
        match word.compare_exchange_weak(now, next, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(other) => now = other,
        }
    }
    false
}

/// Lowers the value to zero and says what it was.
#[inline]
pub fn take_all(word: &AtomicU64) -> u64 {
    // SYNC(count): sees what the posters did, also where the value is zero; pairs
    // with `post`.
    let before = word.fetch_and(!VALUE, Ordering::Acquire);
    before & VALUE
}

/// Lowers the value by one, calling `sleep` while it is zero: that sleeps while the
/// value is zero, until it is woken, and says whether to look again. `false` when it
/// said no and the value was still zero.
///
/// # Errors
/// What `sleep` says.
pub fn wait<E>(word: &AtomicU64, mut sleep: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
    if try_lower(word) {
        return Ok(true);
    }
    word.fetch_add(WAITER, Ordering::Relaxed);
    loop {
        if lower(word, WAITER) {
            return Ok(true);
        }
        let again = sleep();
        if !matches!(again, Ok(true)) {
            // A post between the last look and here is taken, not left behind.
            if lower(word, WAITER) {
                return Ok(true);
            }
            word.fetch_sub(WAITER, Ordering::Relaxed);
            return again;
        }
    }
}
