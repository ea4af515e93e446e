//! Byte layout of the control memfd (drawn in the manual, shared layouts).
//!
//! Everything is little-endian, in lines of 128 bytes (two cache lines, since the
//! prefetcher fetches pairs), each written by one side only. Words are accessed
//! by atomics; the identity is written once, before anybody else has the memory.

use crate::limits::{MARK_RING_SLOTS, MAX_ACKED_SLOTS, MAX_NAME_BYTES, MAX_WRITERS};
use crate::units::{PAGE_SIZE, pages_for};

/// "uffdctl" and the layout's version, as a number; stored last.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"uffdctl\x01");
/// Raised with every change of this layout.
pub(super) const LAYOUT_VERSION: u32 = 3;

/// Identity, written once by who creates it. Field offsets within it:
/// layout version u32, kind u32, size u64, region id u128, length of the name u32,
/// reserved u32, name, greatest size u64; the magic last.
pub(super) const IDENTITY: u64 = 0x000;
pub(super) const ID_LAYOUT: u64 = IDENTITY;
pub(super) const ID_KIND: u64 = IDENTITY + 0x04;
pub(super) const ID_SIZE: u64 = IDENTITY + 0x08;
pub(super) const ID_REGION: u64 = IDENTITY + 0x10;
pub(super) const ID_NAME_LEN: u64 = IDENTITY + 0x20;
pub(super) const ID_NAME: u64 = IDENTITY + 0x28;
pub(super) const ID_MAX_SIZE: u64 = ID_NAME + MAX_NAME_BYTES;
pub(super) const ID_MAGIC: u64 = IDENTITY + 0xF8;

/// Engine: what is published.
pub(super) const ENGINE: u64 = 0x100;
/// `epoch << 1 | busy`; the low half is a futex word.
pub(super) const VERSION: u64 = ENGINE;
/// 1 = the epoch is a cut. Under the version.
pub(super) const KIND: u64 = ENGINE + 0x08;
/// 1 = a replica that is not whole yet. Under the version.
pub(super) const SYNCING: u64 = ENGINE + 0x0C;
/// Time of the capture at the source, nanoseconds since 1970. Under the version.
pub(super) const SOURCE_TIME: u64 = ENGINE + 0x10;
/// Counts changes of the acknowledged epochs; a futex word.
pub(super) const ACK_SEQ: u64 = ENGINE + 0x18;
/// `count << 1 | busy` over the two words of the generation.
pub(super) const GENERATION_SEQ: u64 = ENGINE + 0x20;
pub(super) const GENERATION_LOW: u64 = ENGINE + 0x28;
pub(super) const GENERATION_HIGH: u64 = ENGINE + 0x30;

/// Engine: the answer to commits.
pub(super) const ANSWER_LINE: u64 = 0x180;
/// The highest request that is answered; the low half is a futex word.
pub(super) const ANSWER: u64 = ANSWER_LINE;
/// `epoch << 1 | cut` of that answer.
pub(super) const ANSWERED: u64 = ANSWER_LINE + 0x08;

/// Engine: the newest acknowledged epochs, highest first.
pub(super) const ACKED: u64 = 0x200;

/// Writer: commits and guards.
pub(super) const WRITER: u64 = 0x280;
/// Counts commits asked for.
pub(super) const COMMIT_REQUEST: u64 = WRITER;
/// Guards and commits, as [`crate::shm::turns`] says; the low half is a futex word.
pub(super) const GUARD: u64 = WRITER + 0x08;
/// Counts guards taken, wrapping.
pub(super) const GUARD_ENTRIES: u64 = WRITER + 0x10;
/// Thread that commits, 0 if none.
pub(super) const GUARD_OWNER: u64 = WRITER + 0x14;

/// Engine: statistics, `STATISTICS_WORDS` numbers.
pub(super) const STATISTICS: u64 = 0x300;
pub(super) const STATISTICS_WORDS: u64 = 8;

/// Writer: marks published.
pub(super) const MARK_HEAD: u64 = 0x400;
/// Engine: marks taken.
pub(super) const MARK_TAIL: u64 = 0x480;
/// Writer raises it after setting bits, the engine clears it before taking them.
pub(super) const MARK_OVERFLOW: u64 = 0x500;

/// Writers of a cooperative region: the guard word of odd lives, as [`GUARD`] that of
/// even ones.
pub(super) const GUARD_ODD: u64 = 0x580;
/// Engine: the guard word's life, as [`crate::shm::lives`] says.
pub(super) const GUARD_LIFE: u64 = 0x600;
/// Engine: for each slot the process that has it, 0 if none: u32.
pub(super) const OWNERS: u64 = 0x640;

/// Who writes the data (the writer, or the engine): the size now, never less than it was.
pub(super) const SIZE: u64 = 0x700;

/// Writers: for each slot two words, of even and of odd lives: how many of its threads
/// use the guard word. u32 each, one line for each slot.
pub(super) const HELD: u64 = 0x800;
pub(super) const HELD_LINE: u64 = 64;

/// Writer: the ring's slots, {offset u64, length u64} each.
pub(super) const MARK_RING: u64 = PAGE_SIZE;
pub(super) const MARK_SLOT: u64 = 16;
/// Marks beyond the ring: one bit for each chunk of pages, set by the writer,
/// cleared by the engine.
pub(super) const MARK_BITMAP: u64 = MARK_RING + MARK_RING_SLOTS * MARK_SLOT;
/// Bits in it: enough for single pages up to 2 GiB.
pub(super) const MARK_BITS: u64 = 1 << 19;

/// Length of the control memfd, whatever the region's size.
pub(super) const CONTROL_BYTES: u64 = MARK_BITMAP + MARK_BITS / 8;

const _: () = {
    assert!(ID_MAX_SIZE + 8 <= ID_MAGIC);
    assert!(ID_MAGIC + 8 == ENGINE);
    assert!(GENERATION_HIGH + 8 <= ANSWER_LINE);
    assert!(ACKED + 8 * MAX_ACKED_SLOTS <= WRITER);
    assert!(STATISTICS + 8 * STATISTICS_WORDS <= MARK_HEAD);
    assert!(MARK_OVERFLOW + 128 <= GUARD_ODD);
    assert!(OWNERS + 4 * MAX_WRITERS <= SIZE);
    assert!(SIZE + 128 <= HELD);
    assert!(HELD + HELD_LINE * MAX_WRITERS <= MARK_RING);
    assert!(MARK_BITMAP.is_multiple_of(PAGE_SIZE));
    assert!(CONTROL_BYTES == 0x21000);
};

/// Pages that one bit of the bitmap of marks stands for.
pub(super) const fn pages_per_bit(size: u64) -> u64 {
    let pages = pages_for(size).div_ceil(MARK_BITS);
    if pages == 0 { 1 } else { pages }
}
