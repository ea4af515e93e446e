//! Which of two words counts at present, when one may have to be given up: who counts in
//! a word and dies leaves a number behind that nobody can take back.
//!
//! ```text
//! life 0        1            2
//! word A ----+  word B ---+  word A, anew
//!            |            |
//!    a holder died     and again
//! ```
//! Each process has two words of its own beside: how many of its threads use the word of
//! an even life, and that of an odd one. So what a dead process leaves behind in them is
//! told from what the living hold, and the word itself is given up whole.
//!
//! - I1: a thread is counted in its process's own word before it looks at the life again
//!   and until it is done with the word of that life. So who sees a later life, and none of
//!   the living counted in the one before, knows that nobody is left in it.
//! - I2: a word is used again only once nobody living is counted in the life before.

use super::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// Which of two words a life uses.
pub const fn parity(life: u32) -> usize {
    (life % 2) as usize
}

/// Begins to use the word of the present life, which is answered. `held` are the
/// process's own words.
pub fn enter(life: &AtomicU32, held: [&AtomicU32; 2]) -> u32 {
    loop {
        // SYNC(guard_life): the word of this life was made anew; pairs with `begin_next`.
        let now = life.load(Ordering::Acquire);
        held[parity(now)].fetch_add(1, Ordering::Relaxed);
        // SYNC(guard_held): whoever does not see this count sees to it that the life seen
        // below is another; pairs with the fence in `is_drained`.
        fence(Ordering::SeqCst);
        if life.load(Ordering::Acquire) == now {
            return now;
        }
        leave(now, held);
    }
}

/// The thread is done with the word of `life`.
pub fn leave(life: u32, held: [&AtomicU32; 2]) {
    // A process that was given up meanwhile counts from 0 again.
    // SYNC(guard_drained): what was stored under a guard of that life is seen by who finds
    // none held; pairs with the loads in `is_drained`.
    let _ = held[parity(life)].fetch_update(Ordering::Release, Ordering::Relaxed, |count| {
        count.checked_sub(1)
    });
}

/// Whether none of these own words of one parity counts anybody; ask after the life was
/// seen that follows.
pub fn is_drained<'a>(mut held: impl Iterator<Item = &'a AtomicU32>) -> bool {
    // SYNC(guard_held): pairs with the fence in `enter`.
    fence(Ordering::SeqCst);
    // SYNC(guard_drained): pairs with `leave`.
    held.all(|count| count.load(Ordering::Acquire) == 0)
}

/// Begins the next life with `word`, which nobody living is counted in: [`is_drained`].
pub fn begin_next(life: &AtomicU32, word: &AtomicU64) {
    word.store(0, Ordering::Relaxed);
    let now = life.load(Ordering::Relaxed);
    // SYNC(guard_life): publishes the word; pairs with `enter`.
    life.store(now.wrapping_add(1), Ordering::Release);
}

/// The life at present.
pub fn look(life: &AtomicU32) -> u32 {
    // SYNC(guard_life): pairs with `begin_next`.
    life.load(Ordering::Acquire)
}
