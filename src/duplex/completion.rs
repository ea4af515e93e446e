//! The completion ring: which frames were finished, in the order in which they were.
//!
//! ```text
//! entry: | sequence, low 32 bits | ticket, low 16 bits | slot, 16 bits |   at ticket % length
//! ```
//! For each answered request (not for one-way ones) the server draws a ticket, from
//! 1 on, stores the entry at the ticket's place, and **then** hands the frame over;
//! with several workers entries may become visible in another order than drawn. A
//! server with one worker may hand over first: its entries stand in the order of their
//! tickets all the same, and its post comes after both. The
//! client knows from the ticket in the entry whether it is the one that it waits for,
//! an older one, or one of a lap further. An entry whose frame is not handed over yet
//! stays at the head and is looked at again.
//!
//! - I1: the ring has twice as many places as there are slots. From drawing the ticket
//!   until the client learns of the frame it keeps its slot, so at most `slots - 1`
//!   older and `slots - 1` newer ones can be finished meanwhile: its place is not used
//!   again before, neither overwritten nor overwriting.
//! - I2: when nothing is in flight, as many tickets are drawn as frames were learned
//!   of: the client may then go on behind them without having read the ring.
//! - I3: an entry is a hint. The client believes it only if its own record of that
//!   slot is in flight with that sequence, and the slot's state says so too; so
//!   nothing needs ordering here.

use crate::shm::sync::{AtomicU64, Ordering};

/// An entry as found: what a server claims to have finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Low half of the frame's sequence.
    pub sequence: u32,
    /// Its slot; at most 65535, not checked against the table.
    pub slot: u16,
}

/// What stands at the place of a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// An older entry: nothing yet.
    Nothing,
    /// The ticket's entry.
    Entry(Entry),
    /// A later entry: the ticket's own was overwritten, since the client had
    /// learned of its frame from the slot.
    Overwritten,
}

/// The number of places for so many slots.
pub const fn places(slots: u32) -> u32 {
    2 * slots
}

/// Server: stores the entry of `ticket` at its place, before the frame is handed over.
#[inline]
pub fn push(place: &AtomicU64, ticket: u64, sequence: u64, slot: u16) {
    let entry = sequence << 32 | (ticket & 0xFFFF) << 16 | u64::from(slot);
    place.store(entry, Ordering::Relaxed);
}

/// Client: what stands at the place of `ticket`.
#[inline]
pub fn find(place: &AtomicU64, ticket: u64) -> Found {
    let entry = place.load(Ordering::Relaxed);
    let ahead = ((entry >> 16) as u16).wrapping_sub(ticket as u16);
    match ahead {
        0 => Found::Entry(Entry {
            sequence: (entry >> 32) as u32,
            slot: entry as u16,
        }),
        1..=0x7FFF => Found::Overwritten,
        _ => Found::Nothing,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn tickets_tell_laps_apart() {
        let place = AtomicU64::new(0);
        assert_eq!(find(&place, 1), Found::Nothing);
        assert_eq!(find(&place, 128), Found::Nothing);
        for ticket in [1, 129, 0xFFFF, 0x1_0000, 0x1_0000 + 128, u64::MAX] {
            push(&place, ticket, 0x1_2345_6789_u64, 63);
            let entry = Entry {
                sequence: 0x2345_6789,
                slot: 63,
            };
            assert_eq!(find(&place, ticket), Found::Entry(entry));
            assert_eq!(find(&place, ticket.wrapping_add(128)), Found::Nothing);
            assert_eq!(find(&place, ticket.wrapping_sub(128)), Found::Overwritten);
        }
    }
}
