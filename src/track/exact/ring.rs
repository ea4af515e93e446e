//! A bounded queue of numbers from one thread to one other, without waiting: slots
//! that are free again go one way, pages that were saved go the other.
//!
//! - I1: `head <= tail <= head + len`; only the sender moves `tail`, only the receiver
//!   `head`.

use crate::shm::sync::{AtomicU64, Ordering};

/// A queue of numbers with one sender and one receiver.
///
/// Memory: 8 bytes per entry. A second sender or receiver loses numbers or hands one
/// out twice.
#[derive(Debug)]
pub struct Ring {
    entries: Box<[AtomicU64]>,
    head: AtomicU64,
    tail: AtomicU64,
}

impl Ring {
    /// An empty one with room for `len` numbers, rounded up to a power of two.
    pub fn new(len: usize) -> Self {
        let len = len.max(1).next_power_of_two();
        Self {
            entries: (0..len).map(|_| AtomicU64::new(0)).collect(),
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
        }
    }

    fn entry(&self, at: u64) -> &AtomicU64 {
        &self.entries[(at & (self.entries.len() as u64 - 1)) as usize]
    }

    /// Sender: appends a number; false if there is no room.
    pub fn push(&self, number: u64) -> bool {
        let tail = self.tail.load(Ordering::Relaxed);
        // SYNC(ring_room): the entry was read before it is written again; pairs with
        // the store of the head in `pop`.
        let head = self.head.load(Ordering::Acquire);
        if tail - head >= self.entries.len() as u64 {
            return false;
        }
        self.entry(tail).store(number, Ordering::Relaxed);
        // SYNC(ring_entry): publishes the entry, and what the sender did before with
        // what it names; pairs with the load of the tail in `pop`.
        self.tail.store(tail + 1, Ordering::Release);
        true
    }

    /// Receiver: takes the oldest number.
    pub fn pop(&self) -> Option<u64> {
        let head = self.head.load(Ordering::Relaxed);
        // SYNC(ring_entry): pairs with the store of the tail in `push`.
        if self.tail.load(Ordering::Acquire) == head {
            return None;
        }
        let number = self.entry(head).load(Ordering::Relaxed);
        // SYNC(ring_room): pairs with the load of the head in `push`.
        self.head.store(head + 1, Ordering::Release);
        Some(number)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_in_order_and_no_more_than_there_is_room_for() {
        let ring = Ring::new(3);
        assert_eq!(ring.pop(), None);
        for lap in 0..5 {
            for number in 0..4 {
                assert!(ring.push(lap * 10 + number));
            }
            assert!(!ring.push(99), "rounded up to four");
            for number in 0..4 {
                assert_eq!(ring.pop(), Some(lap * 10 + number));
            }
        }
        assert_eq!(ring.pop(), None);
    }
}
