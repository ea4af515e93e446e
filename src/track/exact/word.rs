//! One page's part in the cut that is being captured: a word that the fault thread
//! and the engine both change, and for which neither ever waits.
//!
//! | word | meaning |
//! |---|---|
//! | `0` (none) | no capture needs the page from anybody |
//! | `1` (pending) | the page is armed, its live content is that of the cut |
//! | `slot << 2 \| 2` (saved) | lifted again; its content at the cut is in that slot |
//!
//! ```text
//! cut            fault thread   any -> pending          (or -> none, where all is captured)
//! store          fault thread   copy to a slot, pending -> saved, then lift
//! capture        engine         copy, look; take it if not saved, then pending -> none
//! slot used up   engine         saved -> none, then the slot is free
//! ```
//!
//! - I1: a page is lifted only after its word is neither pending nor about to become
//!   so: what the engine copied before it saw a word that is not saved is the content
//!   at the cut.
//! - I2: whoever changes a word from saved to something else owns the slot.

use crate::shm::sync::{AtomicU32, Ordering, fence};

const NONE: u32 = 0;
const PENDING: u32 = 1;
const SAVED: u32 = 2;

/// Slots are numbered below this.
pub const MAX_SLOTS: u32 = 1 << 24;

/// What a page's word says to the fault thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No capture needs the page, as far as its word goes.
    None,
    /// Its content is to be saved before it is lifted.
    Pending,
    /// It was saved.
    Saved(u32),
}

/// The word of one page.
#[derive(Debug)]
#[cfg_attr(not(loom), derive(zerocopy::FromZeros))]
#[repr(transparent)]
pub struct PageWord(AtomicU32);

impl PageWord {
    /// A page that no capture needs.
    pub fn new() -> Self {
        Self(AtomicU32::new(NONE))
    }

    /// Fault thread: what is to be done before the page is lifted.
    pub fn state(&self) -> State {
        // SYNC(page_taken): the engine has copied a page that is none, so the lifting
        // that follows comes after its copy; pairs with the exchange in `settle`.
        decode(self.0.load(Ordering::Acquire))
    }

    /// Fault thread, at a cut: the page belongs to it. A slot that an earlier capture
    /// left behind is the caller's.
    pub fn pend(&self) -> Option<u32> {
        slot_of(self.0.swap(PENDING, Ordering::AcqRel))
    }

    /// Whoever ends a capture: the page belongs to none. A slot that was left behind
    /// is the caller's.
    pub fn clear(&self) -> Option<u32> {
        slot_of(self.0.swap(NONE, Ordering::AcqRel))
    }

    /// Fault thread: the page, whose state was `seen`, is in `slot` now. False if the
    /// engine has taken it meanwhile: the slot is still the caller's.
    pub fn save(&self, seen: State, slot: u32) -> bool {
        let seen = if seen == State::Pending {
            PENDING
        } else {
            NONE
        };
        // SYNC(page_saved): publishes the slot's content, before the page is lifted;
        // pairs with the loads in `saved` and `settle`. A failure is the other end of
        // SYNC(page_taken).
        self.0
            .compare_exchange(seen, encode(slot), Ordering::Release, Ordering::Acquire)
            .is_ok()
    }

    /// Engine, after it has copied the live page: where the content at the cut is
    /// instead, if the page was lifted meanwhile.
    pub fn saved(&self) -> Option<u32> {
        // SYNC(page_saved): what was copied is older than the word read below; pairs
        // with the exchange in `save`.
        fence(Ordering::Acquire);
        slot_of(self.0.load(Ordering::Acquire))
    }

    /// Engine: the content at the cut is where it belongs, whoever's copy it was. A
    /// slot that the fault thread has filled is the caller's.
    pub fn settle(&self) -> Option<u32> {
        let mut now = PENDING;
        loop {
            // SYNC(page_taken): the copy is complete before the page is none; pairs with
            // the load in `state` and the failure in `save`.
            match self
                .0
                .compare_exchange(now, NONE, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(was) => return slot_of(was),
                // The fault thread saves a pending page once, so this ends.
                Err(NONE) => return None,
                Err(other) => now = other,
            }
        }
    }

    /// Engine: gives up `slot` if the page is saved there; true if it is the caller's
    /// now.
    pub fn release(&self, slot: u32) -> bool {
        self.0
            .compare_exchange(encode(slot), NONE, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

impl Default for PageWord {
    fn default() -> Self {
        Self::new()
    }
}

fn encode(slot: u32) -> u32 {
    slot << 2 | SAVED
}

fn decode(word: u32) -> State {
    match word {
        NONE => State::None,
        PENDING => State::Pending,
        saved => State::Saved(saved >> 2),
    }
}

fn slot_of(word: u32) -> Option<u32> {
    match decode(word) {
        State::Saved(slot) => Some(slot),
        _ => None,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_saved_once_and_its_slot_has_one_owner() {
        let word = PageWord::new();
        assert_eq!(word.pend(), None);
        assert_eq!(word.state(), State::Pending);
        assert!(word.save(State::Pending, 7));
        assert!(!word.save(State::Pending, 8), "it was saved");
        assert_eq!(word.saved(), Some(7));
        assert!(!word.release(8));
        assert!(word.release(7));
        assert_eq!(word.state(), State::None);
        assert_eq!(word.settle(), None);
    }

    #[test]
    fn what_was_left_behind_belongs_to_who_finds_it() {
        let word = PageWord::new();
        assert!(word.save(State::None, 3), "a page of a whole capture");
        assert_eq!(word.pend(), Some(3));
        assert!(!word.release(3));
        assert!(word.save(State::Pending, MAX_SLOTS - 1));
        assert_eq!(word.settle(), Some(MAX_SLOTS - 1));
        word.pend();
        assert_eq!(word.settle(), None);
        assert!(!word.save(State::Pending, 1), "the engine has it");
    }
}
