//! What the writer of a demonstration stores, and where: pure values.
//!
//! ```text
//! page:  | 64 bytes for a cell | counters, and what the bulk rewrite fills      |
//! cell:  | count u64 | stamp u64 (monotonic ns) | link of chain 0 | link of chain 1 |
//!        cells on every stride-th page, links (16 bytes each) on every fourth of them
//! ```
//!
//! I1. Counters and the bulk rewrite never touch the first 64 bytes of a page, so
//!     a cell changes only by its own stores and its stamp is always a time.

use super::chain::{CHAINS, LINKS};
use crate::units::{MIB, PAGE_SIZE};

/// Smallest region of a demonstration: a page for each cell.
pub(super) const MIN_SIZE: u64 = MIB;
/// Cells whose stores the timer finds.
pub(super) const TIMER_CELLS: u64 = 240;
/// Cells that are stored to before a commit.
pub(super) const COMMIT_CELLS: u64 = 16;
/// All of them: those of the timer first.
pub(super) const CELLS: u64 = TIMER_CELLS + COMMIT_CELLS;
/// Bytes of a cell: a counter and the time of its last store.
pub(super) const CELL_BYTES: usize = 16;
const RESERVED: u64 = 64;

const _: () = {
    assert!(CELLS.is_multiple_of(LINKS), "links lie on pages of cells");
    assert!(
        (1 + CHAINS) * CELL_BYTES as u64 <= RESERVED,
        "nothing else is there"
    );
};

/// The parts of the workload, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Single counters in far pages, some thousand a second.
    Counters,
    /// Two thousand counters at once, then a pause.
    Bursts,
    /// A quarter of the region written anew, once.
    Bulk,
    /// A record of three fields and `commit()`, over and over.
    Commits,
}

impl Phase {
    /// What the screen says.
    pub(super) fn title(self) -> &'static str {
        match self {
            Phase::Counters => "scattered counters",
            Phase::Bursts => "bursts",
            Phase::Bulk => "bulk rewrite of a quarter",
            Phase::Commits => "commits",
        }
    }

    /// The part that the workload is in after `done` (0 to 1) of its time.
    pub(super) fn at(done: f64) -> Phase {
        match done {
            done if done < 0.35 => Phase::Counters,
            done if done < 0.55 => Phase::Bursts,
            done if done < 0.70 => Phase::Bulk,
            _ => Phase::Commits,
        }
    }
}

/// Offset of cell `index` (below [`CELLS`]) in a region of `size` bytes.
pub(super) fn cell_offset(index: u64, size: u64) -> u64 {
    let stride = (size / PAGE_SIZE / CELLS).max(1) * PAGE_SIZE;
    index % CELLS * stride
}

/// Offset of link `link` (below [`LINKS`]) of chain `chain` (below [`CHAINS`]).
pub(super) fn chain_offset(chain: u64, link: u64, size: u64) -> u64 {
    cell_offset(link * (CELLS / LINKS), size) + (1 + chain % CHAINS) * CELL_BYTES as u64
}

/// A cell's bytes.
pub(super) fn cell(count: u64, stamp_ns: u64) -> [u8; CELL_BYTES] {
    let mut bytes = [0; CELL_BYTES];
    bytes[..8].copy_from_slice(&count.to_le_bytes());
    bytes[8..].copy_from_slice(&stamp_ns.to_le_bytes());
    bytes
}

/// Count and stamp out of a cell's bytes.
pub(super) fn parse_cell(bytes: [u8; CELL_BYTES]) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, stamp @ ..] = bytes;
    let count = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    (count, u64::from_le_bytes(stamp))
}

/// Where the bulk rewrite stores: the part of each page of the second quarter that
/// belongs to no cell, as offsets; each piece is [`BULK_PIECE`] bytes.
pub(super) fn bulk_offsets(size: u64) -> impl Iterator<Item = u64> {
    let pages = size / PAGE_SIZE;
    (pages / 4..pages / 2).map(|page| page * PAGE_SIZE + RESERVED)
}

/// Bytes of one piece of the bulk rewrite.
pub(super) const BULK_PIECE: usize = (PAGE_SIZE - RESERVED) as usize;

/// A repeatable stream of places (xorshift64*, Vigna 2014); no secret needs it.
pub(super) struct Places {
    state: u64,
    size: u64,
}

impl Places {
    pub(super) fn new(seed: u64, size: u64) -> Places {
        let state = seed | 1;
        Places { state, size }
    }

    pub(super) fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Offset of a counter of 8 bytes anywhere in the region, beside the cells.
    pub(super) fn counter(&mut self) -> u64 {
        let page = self.next() % (self.size / PAGE_SIZE);
        let slot = self.next() % ((PAGE_SIZE - RESERVED) / 8);
        page * PAGE_SIZE + RESERVED + slot * 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn phases_come_in_order_and_all_come() {
        let mut seen: Vec<Phase> = (0..=100).map(|n| Phase::at(f64::from(n) / 100.0)).collect();
        seen.dedup();
        let all = [Phase::Counters, Phase::Bursts, Phase::Bulk, Phase::Commits];
        assert_eq!(seen, all);
    }

    proptest! {
        #[test]
        fn nothing_but_its_own_store_touches_a_cell(pages in 256u64..100_000, seed: u64) {
            let size = pages * PAGE_SIZE;
            let mut cells: Vec<u64> = (0..CELLS).map(|i| cell_offset(i, size)).collect();
            prop_assert!(cells.iter().all(|at| at + CELL_BYTES as u64 <= size));
            cells.dedup();
            prop_assert_eq!(cells.len() as u64, CELLS);
            let mut places = Places::new(seed, size);
            for _ in 0..100 {
                let at = places.counter();
                prop_assert!(at + 8 <= size && at % PAGE_SIZE >= RESERVED);
            }
            for at in bulk_offsets(size) {
                prop_assert!(at % PAGE_SIZE == RESERVED && at + BULK_PIECE as u64 <= size);
            }
        }

        #[test]
        fn cells_round_trip(count: u64, stamp: u64) {
            prop_assert_eq!(parse_cell(cell(count, stamp)), (count, stamp));
        }
    }
}
