//! A ring of slots between one producer and one consumer, and bits for what it has
//! no room for: the words, not the slots.
//!
//! ```text
//! producer: place(head, tail) -> fill the slot -> publish(head)
//! consumer: filled(head, tail) -> read the slots -> release(tail)
//! full:     set(bits) -> announce(overflow)    consumer: announced(overflow) -> take(bits)
//! ```
//! The counts only rise, wrapping; a slot's place is its count modulo the slots. The
//! slots are relaxed atomics: on either side they are touched between the two calls
//! only.
//!
//! - I1: a slot is filled before it is published, read before it is released.
//! - I2: bits are set before they are announced, and the announcement is taken back
//!   before they are taken: what is set later is announced again.

use super::sync::{AtomicU32, AtomicU64, Ordering};

/// The producer's next count, or `None` while all `slots` are filled.
pub fn place(head: &AtomicU64, tail: &AtomicU64, slots: u64) -> Option<u64> {
    let next = head.load(Ordering::Relaxed);
    // SYNC(mark_room): the slot was read before it is filled again; pairs with
    // `release`.
    let read = tail.load(Ordering::Acquire);
    (next.wrapping_sub(read) < slots).then_some(next)
}

/// The producer has filled the slot of `count`.
pub fn publish(head: &AtomicU64, count: u64) {
    // SYNC(mark_slot): publishes the slot, and what was stored before it; pairs with
    // `filled`.
    head.store(count.wrapping_add(1), Ordering::Release);
}

/// The first count that the consumer has not read, and how many there are; more than
/// the slots if the words are not those of a ring.
pub fn filled(head: &AtomicU64, tail: &AtomicU64) -> (u64, u64) {
    // SYNC(mark_slot): pairs with `publish`.
    let end = head.load(Ordering::Acquire);
    let first = tail.load(Ordering::Relaxed);
    (first, end.wrapping_sub(first))
}

/// The consumer has read all slots below `count`.
pub fn release(tail: &AtomicU64, count: u64) {
    // SYNC(mark_room): pairs with `place`.
    tail.store(count, Ordering::Release);
}

/// The producer sets bits.
pub fn set(word: &AtomicU64, bits: u64) {
    // SYNC(mark_bits): publishes what was stored before; pairs with `take`.
    word.fetch_or(bits, Ordering::Release);
}

/// The producer has set bits.
pub fn announce(overflow: &AtomicU32) {
    // SYNC(mark_overflow): publishes the bits; pairs with `announced`.
    overflow.swap(1, Ordering::Release);
}

/// Whether bits were announced since this was asked last.
pub fn announced(overflow: &AtomicU32) -> bool {
    // SYNC(mark_overflow): bits set after this are announced again; pairs with
    // `announce`.
    overflow.load(Ordering::Relaxed) != 0 && overflow.swap(0, Ordering::AcqRel) != 0
}

/// The consumer takes the bits of a word.
pub fn take(word: &AtomicU64) -> u64 {
    if word.load(Ordering::Relaxed) == 0 {
        return 0;
    }
    // SYNC(mark_bits): pairs with `set`.
    word.swap(0, Ordering::Acquire)
}
