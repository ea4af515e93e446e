//! A set of pages with one owner at a time, who may be another thread the next time.
//!
//! Two levels: a bit per page, and a bit per 64 pages that says whether any of them is
//! a member. So looking through a sparse set, and clearing it, costs what is in it.
//!
//! - I1: only the owner changes it. Ownership goes over with a release store and an
//!   acquire load of something else ([`super::Board`]: the number of a cut).
//! - I2: a bit of the upper level is set if and only if its word is not zero.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use zerocopy::FromZeros;

use super::super::TrackError;

/// A set of page numbers below a bound.
///
/// Memory: `pages / 8` bytes, taken as members come.
#[derive(Debug)]
pub struct PageSet {
    words: Vec<AtomicU64>,
    upper: Vec<AtomicU64>,
    count: AtomicU64,
    pages: u64,
}

impl PageSet {
    /// An empty set of numbers below `pages`.
    ///
    /// # Errors
    /// [`TrackError::Memory`] if there is no room for it.
    pub fn new(pages: u64) -> Result<Self, TrackError> {
        let words = pages.div_ceil(64) as usize;
        Ok(Self {
            words: AtomicU64::new_vec_zeroed(words).map_err(|_| TrackError::Memory)?,
            upper: AtomicU64::new_vec_zeroed(words.div_ceil(64)).map_err(|_| TrackError::Memory)?,
            count: AtomicU64::new(0),
            pages,
        })
    }

    /// A set that never has a member. Allocates nothing.
    pub fn none() -> Self {
        Self {
            words: Vec::new(),
            upper: Vec::new(),
            count: AtomicU64::new(0),
            pages: 0,
        }
    }

    /// The bound that all members lie below.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many members there are.
    pub fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// Whether `page` is a member; numbers beyond the bound are not.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize].load(Relaxed) >> (page % 64) & 1 == 1
    }

    /// Adds `page`; true if it was not a member before.
    ///
    /// # Panics
    /// If it is not below the bound.
    pub fn insert(&self, page: u64) -> bool {
        assert!(page < self.pages, "page {page} beyond {}", self.pages);
        let word = (page / 64) as usize;
        let bits = self.words[word].load(Relaxed);
        let bit = 1 << (page % 64);
        if bits & bit != 0 {
            return false;
        }
        self.words[word].store(bits | bit, Relaxed);
        let upper = &self.upper[word / 64];
        upper.store(upper.load(Relaxed) | 1 << (word % 64), Relaxed);
        self.count.store(self.count() + 1, Relaxed);
        true
    }

    /// Removes all of `pages`.
    pub fn remove(&self, pages: Range<u64>) {
        let end = pages.end.min(self.pages);
        let mut at = pages.start;
        while at < end {
            let stop = end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            self.mask_out((at / 64) as usize, mask);
            at = stop;
        }
    }

    fn mask_out(&self, word: usize, mask: u64) {
        let bits = self.words[word].load(Relaxed);
        if bits & mask == 0 {
            return;
        }
        let left = bits & !mask;
        self.words[word].store(left, Relaxed);
        let removed = u64::from((bits & mask).count_ones());
        self.count.store(self.count() - removed, Relaxed);
        if left == 0 {
            let upper = &self.upper[word / 64];
            upper.store(upper.load(Relaxed) & !(1 << (word % 64)), Relaxed);
        }
    }

    /// Removes all members.
    pub fn clear(&self) {
        for (index, upper) in self.upper.iter().enumerate() {
            let mut used = upper.load(Relaxed);
            if used == 0 {
                continue;
            }
            while used != 0 {
                let word = index * 64 + used.trailing_zeros() as usize;
                self.words[word].store(0, Relaxed);
                used &= used - 1;
            }
            upper.store(0, Relaxed);
        }
        self.count.store(0, Relaxed);
    }

    /// The first member at or after `from`.
    pub fn next(&self, from: u64) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let mut word = (from / 64) as usize;
        let here = self.words[word].load(Relaxed) & u64::MAX << (from % 64);
        if here != 0 {
            return Some(word as u64 * 64 + u64::from(here.trailing_zeros()));
        }
        word += 1;
        let mut index = word / 64;
        let mut used = self.upper.get(index)?.load(Relaxed) & u64::MAX << (word % 64);
        while used == 0 {
            index += 1;
            used = self.upper.get(index)?.load(Relaxed);
        }
        word = index * 64 + used.trailing_zeros() as usize;
        let bits = self.words[word].load(Relaxed);
        Some(word as u64 * 64 + u64::from(bits.trailing_zeros()))
    }

    /// The first run of adjacent members at or after `from`.
    pub fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.next(from)?;
        let mut end = start + 1;
        while end < self.pages {
            let absent = !self.words[(end / 64) as usize].load(Relaxed) >> (end % 64);
            if absent != 0 {
                end += u64::from(absent.trailing_zeros());
                break;
            }
            end = (end / 64 + 1) * 64;
        }
        Some(start..end.min(self.pages))
    }

    /// The members in rising order, of a set that does not change meanwhile.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let page = self.next(from)?;
            from = page + 1;
            Some(page)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_like_a_vector_of_bools(
            pages in 1u64..9000,
            ops in proptest::collection::vec((0u8..4, 0u64..9000, 0u64..200), 0..80),
        ) {
            let set = PageSet::new(pages).unwrap();
            let mut model = vec![false; pages as usize];
            for (op, at, run) in ops {
                let at = at % pages;
                let end = (at + run).min(pages);
                match op {
                    0 => prop_assert_eq!(
                        set.insert(at),
                        !std::mem::replace(&mut model[at as usize], true)
                    ),
                    1 => {
                        for page in at..end {
                            set.insert(page);
                        }
                        model[at as usize..end as usize].fill(true);
                    }
                    2 => {
                        set.remove(at..end);
                        model[at as usize..end as usize].fill(false);
                    }
                    _ if run == 0 => {
                        set.clear();
                        model.fill(false);
                    }
                    _ => prop_assert_eq!(set.contains(at), model[at as usize]),
                }
                prop_assert_eq!(set.count(), model.iter().filter(|b| **b).count() as u64);
                let next = (at..pages).find(|page| model[*page as usize]);
                prop_assert_eq!(set.next(at), next);
                let run = next.map(|start| {
                    let end = (start..pages).find(|page| !model[*page as usize]);
                    start..end.unwrap_or(pages)
                });
                prop_assert_eq!(set.next_run(at), run);
            }
            let members: Vec<u64> = set.iter().collect();
            let expected: Vec<u64> = (0..pages).filter(|at| model[*at as usize]).collect();
            prop_assert_eq!(members, expected);
        }
    }
}
