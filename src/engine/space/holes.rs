//! Where a segment has memory and where it has none, found out bit by bit.
//!
//! The kernel says where memory begins without looking at much; where it ends, it looks for
//! page by page, up to the end of a gigabyte, while nobody else is served. So the end is
//! looked for here, a bounded number of pages at a time, and what was found is kept.
//!
//! - I1: what was memory once is memory for good: segments are sealed against punching.
//! - I2: what cannot be found out counts as memory.

use std::ops::Range;
use std::os::fd::OwnedFd;

use crate::sys::memfd;
use crate::units::PAGE_SIZE;

/// Runs of memory that are kept, in the order of their places.
const KNOWN: usize = 1024;

/// What is known of one segment.
#[derive(Debug)]
pub(super) struct Holes {
    /// The segment's memory; none if holes are not told.
    data: Option<OwnedFd>,
    /// Whole pages; no two touch.
    known: Vec<Range<u64>>,
}

impl Holes {
    pub(super) fn new(data: Option<OwnedFd>) -> Self {
        Self {
            data,
            known: Vec::new(),
        }
    }

    /// Whether there is something to be told.
    pub(super) fn are_told(&self) -> bool {
        self.data.is_some()
    }

    /// The first memory in `offset .. end`, as (start, stop): before it there is none, and
    /// nothing is said of what follows it. (end, end) if there is none at all. Asks the
    /// kernel once for each page, and takes that from `looks`, which is not to be 0.
    pub(super) fn next_data(&mut self, offset: u64, end: u64, looks: &mut u32) -> (u64, u64) {
        if self.data.is_none() {
            return (offset, end);
        }
        let start = match self.known_at(offset) {
            Some(_) => offset,
            None => self.first_data(offset, looks).clamp(offset, end),
        };
        if start == end {
            return (end, end);
        }
        let page = start - start % PAGE_SIZE;
        let mut stop = page + PAGE_SIZE;
        while stop < end {
            if let Some(known) = self.known_at(stop) {
                stop = known.end;
            } else if *looks > 0 && self.first_data(stop, looks) == stop {
                stop += PAGE_SIZE;
            } else {
                break;
            }
        }
        self.keep(page..stop);
        (start, stop.min(end))
    }

    /// The first byte of memory from `offset` on.
    fn first_data(&self, offset: u64, looks: &mut u32) -> u64 {
        *looks = looks.saturating_sub(1);
        match self.data.as_ref().map(|fd| memfd::first_data(fd, offset)) {
            Some(Ok(found)) => found.unwrap_or(u64::MAX),
            Some(Err(_)) | None => offset,
        }
    }

    fn known_at(&self, offset: u64) -> Option<Range<u64>> {
        let behind = self.known.partition_point(|run| run.end <= offset);
        self.known
            .get(behind)
            .filter(|run| run.start <= offset)
            .cloned()
    }

    fn keep(&mut self, run: Range<u64>) {
        let first = self.known.partition_point(|one| one.end < run.start);
        let last = self.known.partition_point(|one| one.start <= run.end);
        let touched = &self.known[first..last];
        let start = touched
            .first()
            .map_or(run.start, |one| one.start.min(run.start));
        let end = touched.last().map_or(run.end, |one| one.end.max(run.end));
        self.known.splice(first..last, std::iter::once(start..end));
        if self.known.len() > KNOWN {
            // Short runs, which are found again as fast.
            self.known.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::shm::SharedMemory;
    use crate::sys::map::{Access, Mapping};

    const PAGES: u64 = 48;

    /// A segment with memory in these pages.
    fn with(pages: &[u64]) -> (SharedMemory, OwnedFd) {
        let fd = memfd::create("holes", PAGES * PAGE_SIZE).expect("memfd");
        let map = Mapping::shared(&fd, PAGES * PAGE_SIZE, Access::ReadWrite).expect("map");
        let memory = SharedMemory::new(map);
        for page in pages {
            memory.write(page * PAGE_SIZE + 7, b"x").expect("within");
        }
        (memory, fd)
    }

    #[test]
    fn the_end_is_found_a_few_pages_at_a_time_and_kept() {
        let (_memory, fd) = with(&(4..40).collect::<Vec<_>>());
        let mut holes = Holes::new(Some(fd));
        let end = PAGES * PAGE_SIZE;
        let mut looks = 5;
        let found = holes.next_data(100, end, &mut looks);
        assert_eq!(found, (4 * PAGE_SIZE, 9 * PAGE_SIZE));
        assert_eq!(looks, 0);
        // What was found costs nothing.
        let mut looks = 1;
        let found = holes.next_data(5 * PAGE_SIZE + 1, 9 * PAGE_SIZE - 1, &mut looks);
        assert_eq!(found, (5 * PAGE_SIZE + 1, 9 * PAGE_SIZE - 1));
        assert_eq!(looks, 1);
        let mut looks = 100;
        let found = holes.next_data(0, end, &mut looks);
        assert_eq!(found, (4 * PAGE_SIZE, 40 * PAGE_SIZE));
        assert_eq!(holes.next_data(41 * PAGE_SIZE, end, &mut looks), (end, end));
        assert_eq!(holes.known.len(), 1);
        let mut none = Holes::new(None);
        assert_eq!(none.next_data(3, 5, &mut looks), (3, 5), "not told");
    }

    proptest! {
        /// However few looks there are, and while memory comes up: holes are holes.
        #[test]
        fn it_finds_what_is_there(
            steps in proptest::collection::vec((0..PAGES, 0..PAGES * PAGE_SIZE, 1u32..9), 1..30),
        ) {
            let (memory, fd) = with(&[]);
            let mut holes = Holes::new(Some(fd));
            let mut there = [false; PAGES as usize];
            for (page, offset, looks) in steps {
                memory.write(page * PAGE_SIZE, b"x").expect("within");
                there[page as usize] = true;
                let end = PAGES * PAGE_SIZE - 5;
                let offset = offset.min(end - 1);
                let (start, stop) = holes.next_data(offset, end, &mut looks.clone());
                let is_there = |at: u64| there[(at / PAGE_SIZE) as usize];
                prop_assert!(offset <= start && start <= stop && stop <= end);
                prop_assert!(start == end || stop > start);
                prop_assert!((offset..start).step_by(64).all(|at| !is_there(at)));
                prop_assert!((start..stop).step_by(64).all(is_there));
                let sorted = holes.known.windows(2).all(|pair| pair[0].end < pair[1].start);
                prop_assert!(sorted, "{:?}", holes.known);
            }
        }
    }
}
