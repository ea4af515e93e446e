//! Sets of changed bytes, bounded in memory.
//!
//! A set is exact up to [`MAX_PENDING_EXTENTS`] ranges; beyond that it degrades to
//! whole pages, and once every page is in it, to everything. A degraded set holds
//! at least what was put in, never less.
//!
//! - I1: exact ranges are sorted, not empty, and neither overlap nor touch.
//! - I2: no range ends beyond the region's size.

use std::ops::Range;

use crate::bitmap::Bitmap;
use crate::limits::MAX_PENDING_EXTENTS;
use crate::units::{PAGE_SIZE, page_of, pages_for};

/// A changed run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First byte within the region.
    pub offset: u64,
    /// Number of bytes.
    pub len: u32,
}

/// A set of bytes of a region, whose size only grows.
///
/// Memory: 16 bytes for each range while exact (1 MiB at most), then one bit for
/// each page.
#[derive(Clone, Debug)]
pub struct ExtentSet {
    size: u64,
    shape: Shape,
}

#[derive(Clone, Debug)]
enum Shape {
    Exact(Vec<Range<u64>>),
    Pages(Bitmap),
    All,
}

impl ExtentSet {
    /// An empty set for a region of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            shape: Shape::Exact(Vec::new()),
        }
    }

    /// The set of all bytes of a region of `size` bytes.
    pub fn all(size: u64) -> Self {
        Self {
            size,
            shape: Shape::All,
        }
    }

    /// Adds `ranges`, which are sorted, not empty and neither overlap nor touch. Costs a copy of
    /// them where they lie behind what is in the set, one pass over both otherwise.
    ///
    /// # Panics
    /// If they end beyond the region's size.
    pub fn extend_sorted(&mut self, ranges: &[Range<u64>]) {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
            return;
        };
        assert!(last.end <= self.size, "ranges end within the region");
        match &mut self.shape {
            Shape::Exact(own) if own.last().is_none_or(|own| own.end < first.start) => {
                own.extend_from_slice(ranges);
            }
            Shape::Exact(own) => *own = merge(own, ranges),
            Shape::Pages(pages) => {
                for range in ranges {
                    pages.insert_range(pages_of(range));
                }
            }
            Shape::All => {}
        }
        self.degrade();
    }

    /// Size of the region, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds the bytes of `range`; an empty one adds nothing.
    ///
    /// # Panics
    /// If the range ends beyond the region's size.
    pub fn insert(&mut self, range: Range<u64>) {
        assert!(
            range.end <= self.size,
            "range ends at {} beyond a region of {}",
            range.end,
            self.size
        );
        if range.is_empty() {
            return;
        }
        match &mut self.shape {
            Shape::Exact(ranges) => insert_exact(ranges, range),
            Shape::Pages(pages) => pages.insert_range(pages_of(&range)),
            Shape::All => {}
        }
        self.degrade();
    }

    /// Adds all bytes of `other`.
    ///
    /// # Panics
    /// If the two are of regions of different size.
    pub fn union(&mut self, other: &ExtentSet) {
        assert_eq!(self.size, other.size, "sets of regions of different size");
        match (&mut self.shape, &other.shape) {
            (Shape::All, _) => {}
            (_, Shape::All) => self.shape = Shape::All,
            (Shape::Exact(ours), Shape::Exact(theirs)) => {
                if ours.is_empty() {
                    ours.clone_from(theirs);
                } else if !theirs.is_empty() {
                    *ours = merge(ours, theirs);
                }
            }
            (Shape::Pages(ours), Shape::Pages(theirs)) => ours.union(theirs),
            (Shape::Pages(ours), Shape::Exact(theirs)) => {
                for range in theirs {
                    ours.insert_range(pages_of(range));
                }
            }
            (Shape::Exact(ours), Shape::Pages(theirs)) => {
                let mut pages = theirs.clone();
                for range in ours.iter() {
                    pages.insert_range(pages_of(range));
                }
                self.shape = Shape::Pages(pages);
            }
        }
        self.degrade();
    }

    /// The region has `size` bytes now, of which those that are new are not in the set; but
    /// where it is kept by pages, what is new of the last page is. A lesser size changes
    /// nothing.
    pub fn grow(&mut self, size: u64) {
        if size <= self.size {
            return;
        }
        match &mut self.shape {
            Shape::Exact(_) => {}
            Shape::Pages(pages) => pages.grow(pages_for(size)),
            Shape::All if self.size == 0 => self.shape = Shape::Exact(Vec::new()),
            Shape::All => self.shape = Shape::Exact(std::iter::once(0..self.size).collect()),
        }
        self.size = size;
    }

    /// Whether no byte is in the set.
    pub fn is_empty(&self) -> bool {
        match &self.shape {
            Shape::Exact(ranges) => ranges.is_empty(),
            Shape::Pages(pages) => pages.is_empty(),
            Shape::All => self.size == 0,
        }
    }

    /// Whether the set is known to hold every byte.
    pub fn is_all(&self) -> bool {
        match &self.shape {
            Shape::Exact(ranges) => ranges.first() == Some(&(0..self.size)),
            Shape::Pages(_) => false,
            Shape::All => true,
        }
    }

    /// How many bytes are in the set. Costs a pass over it.
    pub fn bytes(&self) -> u64 {
        self.ranges().map(|range| range.end - range.start).sum()
    }

    /// The maximal runs of bytes in the set, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let exact: &[Range<u64>] = match &self.shape {
            Shape::Exact(ranges) => ranges,
            _ => &[],
        };
        let mut from = match &self.shape {
            Shape::Exact(_) => self.size,
            _ => 0,
        };
        exact.iter().cloned().chain(std::iter::from_fn(move || {
            let range = self.next_range(from)?;
            from = range.end;
            Some(range)
        }))
    }

    /// What is left of the first run that ends behind `from`: it begins at `from` or
    /// later. A cursor that goes on at the end of each range sees each byte once.
    pub fn next_range(&self, from: u64) -> Option<Range<u64>> {
        if from >= self.size {
            return None;
        }
        match &self.shape {
            Shape::Exact(ranges) => {
                let range = ranges.get(ranges.partition_point(|range| range.end <= from))?;
                Some(range.start.max(from)..range.end)
            }
            Shape::Pages(pages) => {
                let run = pages.next_run(page_of(from))?;
                let end = (run.end * PAGE_SIZE).min(self.size);
                Some((run.start * PAGE_SIZE).max(from)..end)
            }
            Shape::All => Some(from..self.size),
        }
    }

    /// The pages that hold a byte of the set.
    pub fn pages(&self) -> Bitmap {
        let mut pages = Bitmap::new(pages_for(self.size));
        match &self.shape {
            Shape::Exact(ranges) => {
                for range in ranges {
                    pages.insert_range(pages_of(range));
                }
            }
            Shape::Pages(own) => pages.union(own),
            Shape::All => pages.insert_range(0..pages_for(self.size)),
        }
        pages
    }

    /// Whether a byte of `range` is in the set.
    pub fn intersects(&self, range: Range<u64>) -> bool {
        !range.is_empty()
            && self
                .next_range(range.start)
                .is_some_and(|found| found.start < range.end)
    }

    /// Removes everything; the set is exact again.
    pub fn clear(&mut self) {
        match &mut self.shape {
            Shape::Exact(ranges) => ranges.clear(),
            _ => self.shape = Shape::Exact(Vec::new()),
        }
    }

    /// Restores the bound after an addition.
    fn degrade(&mut self) {
        if let Shape::Exact(ranges) = &self.shape
            && ranges.len() as u64 > MAX_PENDING_EXTENTS
        {
            self.shape = Shape::Pages(self.pages());
        }
        if let Shape::Pages(pages) = &self.shape
            && pages.count() == pages.len()
        {
            self.shape = Shape::All;
        }
    }
}

impl PartialEq for ExtentSet {
    /// Equal sets hold the same bytes, however they are kept.
    fn eq(&self, other: &Self) -> bool {
        self.size == other.size && self.ranges().eq(other.ranges())
    }
}

impl Eq for ExtentSet {}

fn pages_of(range: &Range<u64>) -> Range<u64> {
    page_of(range.start)..pages_for(range.end)
}

fn insert_exact(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end >= range.start => {}
        _ => return ranges.push(range),
    }
    // What it touches: from the first that ends at its start or later to the last
    // that begins at its end or earlier.
    let first = ranges.partition_point(|r| r.end < range.start);
    let last = ranges.partition_point(|r| r.start <= range.end);
    if first == last {
        ranges.insert(first, range);
    } else {
        let start = ranges[first].start.min(range.start);
        let end = ranges[last - 1].end.max(range.end);
        ranges[first] = start..end;
        ranges.drain(first + 1..last);
    }
}

fn merge(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::with_capacity(a.len() + b.len());
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    loop {
        let next = match (a.peek(), b.peek()) {
            (Some(x), Some(y)) if x.start <= y.start => a.next(),
            (_, Some(_)) => b.next(),
            (_, None) => a.next(),
        };
        let Some(next) = next else { return out };
        match out.last_mut() {
            Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
            _ => out.push(next.clone()),
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of length one"
)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model_ranges(model: &[bool]) -> Vec<Range<u64>> {
        let mut out: Vec<Range<u64>> = Vec::new();
        for at in (0..model.len() as u64).filter(|i| model[*i as usize]) {
            match out.last_mut() {
                Some(last) if last.end == at => last.end += 1,
                _ => out.push(at..at + 1),
            }
        }
        out
    }

    fn degraded(set: &ExtentSet) -> ExtentSet {
        ExtentSet {
            size: set.size,
            shape: Shape::Pages(set.pages()),
        }
    }

    type Runs = Vec<(u64, u64)>;

    fn runs(size: u64, max: usize) -> impl Strategy<Value = Runs> {
        proptest::collection::vec((0..size, 0u64..size / 8), 0..max)
    }

    fn build(size: u64, list: &Runs, set: &mut ExtentSet, model: &mut [bool]) {
        for (at, len) in list {
            let end = (at + len).min(size);
            set.insert(*at..end);
            model[*at as usize..end as usize].fill(true);
        }
    }

    proptest! {
        #[test]
        fn exact_sets_behave_like_a_vector_of_bools(a in runs(500, 40), b in runs(500, 40), from in 0u64..520) {
            let size = 500;
            let (mut set, mut model) = (ExtentSet::new(size), vec![false; size as usize]);
            build(size, &a, &mut set, &mut model);
            prop_assert_eq!(set.ranges().collect::<Vec<_>>(), model_ranges(&model));
            let (mut other, mut second) = (ExtentSet::new(size), vec![false; size as usize]);
            build(size, &b, &mut other, &mut second);
            for (x, y) in model.iter_mut().zip(&second) {
                *x |= y;
            }
            set.union(&other);
            let expected = model_ranges(&model);
            prop_assert_eq!(set.ranges().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(set.bytes(), model.iter().filter(|x| **x).count() as u64);
            prop_assert_eq!(set.is_all(), model.iter().all(|x| *x));
            let rest = expected.iter().find(|r| r.end > from).map(|r| r.start.max(from)..r.end);
            prop_assert_eq!(set.next_range(from), rest);
            let probe = from..(from + 9).min(size).max(from);
            let hit = probe.clone().any(|i| i < size && model[i as usize]);
            prop_assert_eq!(set.intersects(probe), hit);
            let mut sorted = ExtentSet::new(size);
            let half = expected.len() / 2;
            sorted.extend_sorted(&expected[half..]);
            sorted.extend_sorted(&expected[..half]);
            sorted.extend_sorted(&expected);
            prop_assert_eq!(sorted, set);
        }

        #[test]
        fn page_sets_hold_whole_pages_clipped_to_the_size(a in runs(40_000, 6), b in runs(40_000, 6)) {
            let size = 40_000u64;
            let (mut set, mut model) = (ExtentSet::new(size), vec![false; size as usize]);
            build(size, &a, &mut set, &mut model);
            let (mut other, mut second) = (ExtentSet::new(size), vec![false; size as usize]);
            build(size, &b, &mut other, &mut second);
            let by_page: Vec<bool> = model
                .chunks(4096)
                .zip(second.chunks(4096))
                .flat_map(|(a, b)| vec![a.contains(&true) || b.contains(&true); a.len()])
                .collect();
            let expected = model_ranges(&by_page);
            for (mut left, right) in [
                (degraded(&set), other.clone()),
                (set.clone(), degraded(&other)),
                (degraded(&set), degraded(&other)),
            ] {
                left.union(&right);
                prop_assert_eq!(left.ranges().collect::<Vec<_>>(), expected.clone());
                prop_assert_eq!(left.pages().count(), by_page.chunks(4096).filter(|p| p[0]).count() as u64);
            }
        }
    }

    #[test]
    fn too_many_ranges_become_pages_and_then_everything() {
        let size = (MAX_PENDING_EXTENTS + 2) * 8;
        let mut set = ExtentSet::new(size);
        for i in 0..MAX_PENDING_EXTENTS {
            set.insert(i * 8..i * 8 + 1);
        }
        assert_eq!(set.bytes(), MAX_PENDING_EXTENTS);
        set.insert(MAX_PENDING_EXTENTS * 8..MAX_PENDING_EXTENTS * 8 + 1);
        assert!(matches!(set.shape, Shape::All), "every page had a range");
        assert_eq!(set.ranges().collect::<Vec<_>>(), vec![0..size]);
        set.clear();
        assert!(set.is_empty());

        let mut far = ExtentSet::new(size * 2);
        for i in 0..=MAX_PENDING_EXTENTS {
            far.insert(i * 8..i * 8 + 1);
        }
        assert!(matches!(far.shape, Shape::Pages(_)));
        assert!(!far.is_all());
        assert!(far.bytes() < far.size());
    }

    #[test]
    fn empty_regions_and_ranges() {
        let mut set = ExtentSet::new(0);
        set.insert(0..0);
        assert!(set.is_empty());
        assert!(ExtentSet::all(0).is_empty());
        assert_eq!(ExtentSet::all(10).bytes(), 10);
    }
}
