//! Which bytes of the payload are whose: the client's own account, never shared.
//!
//! ```text
//! 0                head            tail                 size
//! | released ...... | frame | frame | free .............. |
//! | frame | free .. | frame | frame | frame | wrap marker |   once it went round
//! ```
//! A ring of blocks, each a multiple of 64 bytes with a header of 64 in front. What
//! does not fit behind the tail goes to the beginning, and a marker fills the rest,
//! so that the ring can be walked. An empty ring begins at 0 again, and one hot
//! frame stays in the cache. The head moves over the released ones at the front:
//! a frame released early waits for those before it.
//!
//! Memory: one entry of 32 bytes per block, at most two blocks per slot.

use std::collections::VecDeque;

/// Unit of all blocks, in bytes; also the size of a frame's header.
pub(super) const UNIT: u64 = 64;

/// A block as it was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// What [`Space::release`] wants to hear.
    pub(super) block: u64,
    /// Where the header lies.
    pub(super) offset: u64,
    /// Where a wrap marker has to be written, and the length it covers.
    pub(super) wrap: Option<(u64, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    offset: u64,
    len: u64,
    released: bool,
}

/// The account of one payload.
#[derive(Debug)]
pub(super) struct Space {
    size: u64,
    tail: u64,
    used: u64,
    /// Number of the front block.
    first: u64,
    blocks: VecDeque<Block>,
}

impl Space {
    /// All of `size` bytes free, a multiple of [`UNIT`].
    pub(super) fn new(size: u64, slots: usize) -> Space {
        Space {
            size,
            tail: 0,
            used: 0,
            first: 0,
            blocks: VecDeque::with_capacity(2 * slots + 2),
        }
    }

    /// The longest data that fits when all is free, in bytes.
    pub(super) fn largest(&self) -> u64 {
        self.size.saturating_sub(UNIT)
    }

    /// Bytes in no block.
    pub(super) fn free_bytes(&self) -> u64 {
        self.size - self.used
    }

    /// Places a block for `len` bytes of data, at most [`Space::largest`].
    pub(super) fn allocate(&mut self, len: u64) -> Option<Placed> {
        let need = len.div_ceil(UNIT) * UNIT + UNIT;
        let head = match self.blocks.front() {
            None => {
                self.tail = 0;
                0
            }
            Some(front) => front.offset,
        };
        if self.tail < head || (self.tail == head && !self.blocks.is_empty()) {
            return (need <= head - self.tail).then(|| self.push(need, None));
        }
        let behind = self.size - self.tail;
        if need <= behind {
            return Some(self.push(need, None));
        }
        if need > head {
            return None;
        }
        let wrap = (behind > 0).then_some((self.tail, behind));
        if behind > 0 {
            self.push(behind, None);
            if let Some(marker) = self.blocks.back_mut() {
                marker.released = true;
            }
        }
        self.tail = 0;
        Some(self.push(need, wrap))
    }

    fn push(&mut self, len: u64, wrap: Option<(u64, u64)>) -> Placed {
        let placed = Placed {
            block: self.first + self.blocks.len() as u64,
            offset: self.tail,
            wrap,
        };
        self.blocks.push_back(Block {
            offset: self.tail,
            len,
            released: false,
        });
        self.tail += len;
        self.used += len;
        placed
    }

    /// Gives a block back.
    pub(super) fn release(&mut self, block: u64) {
        let index = block.wrapping_sub(self.first) as usize;
        if let Some(block) = self.blocks.get_mut(index) {
            block.released = true;
        }
        while let Some(front) = self.blocks.front() {
            if !front.released {
                break;
            }
            self.used -= front.len;
            self.first += 1;
            self.blocks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The space as a list of what lies where, searched from end to end.
    #[derive(Default)]
    struct Naive {
        blocks: Vec<(u64, std::ops::Range<u64>)>,
    }

    impl Naive {
        fn add(&mut self, placed: &Placed, len: u64, size: u64) {
            let range = placed.offset..placed.offset + UNIT + len.div_ceil(UNIT) * UNIT;
            assert!(
                range.end <= size && range.start.is_multiple_of(UNIT),
                "{range:?}"
            );
            for (_, other) in &self.blocks {
                assert!(
                    range.end <= other.start || other.end <= range.start,
                    "{range:?}"
                );
            }
            if let Some((at, len)) = placed.wrap {
                assert_eq!(
                    (at + len, placed.offset),
                    (size, 0),
                    "a marker fills the tail"
                );
                assert!(len >= UNIT && len.is_multiple_of(UNIT));
                assert!(self.blocks.iter().all(|(_, other)| other.end <= at));
            }
            self.blocks.push((placed.block, range));
        }
    }

    proptest! {
        #[test]
        fn blocks_never_overlap_and_all_space_comes_back(
            units in 2u64..40,
            steps in prop::collection::vec((any::<bool>(), 0u64..1400, any::<usize>()), 1..200),
        ) {
            let size = units * UNIT;
            let mut space = Space::new(size, 16);
            let mut naive = Naive::default();
            for (allocate, len, pick) in steps {
                if allocate {
                    let len = len % (space.largest() + 1);
                    match space.allocate(len) {
                        Some(placed) => naive.add(&placed, len, size),
                        None => prop_assert!(!naive.blocks.is_empty(), "{len} of {size} refused"),
                    }
                } else if !naive.blocks.is_empty() {
                    let (block, _) = naive.blocks.remove(pick % naive.blocks.len());
                    space.release(block);
                }
                let used: u64 = naive.blocks.iter().map(|(_, r)| r.end - r.start).sum();
                prop_assert!(space.free_bytes() <= size - used);
                prop_assert!(space.blocks.len() <= 2 * (units as usize) + 2);
            }
            for (block, _) in naive.blocks.drain(..) {
                space.release(block);
            }
            prop_assert_eq!(space.free_bytes(), size);
            let again = space.allocate(space.largest());
            prop_assert_eq!(again.map(|placed| placed.offset), Some(0));
        }
    }

    #[test]
    fn a_wrap_at_every_offset() {
        let size = 16 * UNIT;
        for first in 1..15 {
            for second in 1..=15 {
                let mut space = Space::new(size, 16);
                let a = space.allocate((first - 1) * UNIT).expect("room");
                let b = space.allocate(0).expect("room");
                space.release(a.block);
                let tail = first + 1;
                let placed = space.allocate((second - 1) * UNIT);
                let expected = if second <= 16 - tail {
                    Some((tail * UNIT, None))
                } else if second <= first {
                    let wrap = (tail < 16).then_some((tail * UNIT, (16 - tail) * UNIT));
                    Some((0, wrap))
                } else {
                    None
                };
                let placed = placed.map(|placed| (placed.offset, placed.wrap));
                assert_eq!(placed, expected, "{first} {second}");
                space.release(b.block);
            }
        }
    }

    #[test]
    fn what_was_not_allocated_is_not_released() {
        let mut space = Space::new(4 * UNIT, 8);
        let placed = space.allocate(UNIT).expect("room");
        space.release(placed.block + 1);
        space.release(u64::MAX);
        assert_eq!(space.free_bytes(), 2 * UNIT);
        space.release(placed.block);
        space.release(placed.block);
        assert_eq!(space.free_bytes(), 4 * UNIT);
        assert_eq!(Space::new(0, 8).largest(), 0);
        assert!(Space::new(0, 8).allocate(0).is_none());
    }
}
