//! What the regions of a node are to those who export them, and which of their pages were
//! changed since which epoch.
//!
//! ```text
//! capture, apply, write:  extents of epoch 7 --> [7] in each grain that they touch
//! asked, since epoch 5:   grains with more than 5
//! ```
//! I1: a grain says no less than the last epoch that changed it, at the latest when that
//!     epoch is published.
//! I2: another life of the region begins with a table of its own; the one before says of
//!     everything that it was changed, to whoever still has it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use zerocopy::FromZeros;

use super::Engine;
use super::regions::RegionEntry;
use crate::limits::MAX_CHANGE_GRAINS;
use crate::track::ExtentSet;
use crate::units::PAGE_SIZE;
use crate::wire::control::Role;
use crate::words::{Generation, RegionId, RegionName};

/// One region, as it is now.
#[derive(Clone, Debug)]
pub struct Exported {
    /// Its name.
    pub name: RegionName,
    /// Id of its memory.
    pub id: RegionId,
    /// Bytes.
    pub size: u64,
    /// Whether other hosts may have it.
    pub shared: bool,
    /// Whose it is.
    pub owner_uid: u32,
    /// Who writes it.
    pub role: Role,
    /// Its life.
    pub generation: Generation,
    /// Its newest epoch.
    pub epoch: u64,
    /// What was changed since when, if that is kept.
    pub changes: Option<Arc<Changes>>,
}

/// The last epoch that changed each part of one life of a region.
///
/// Memory: 8 bytes for each grain, at most [`MAX_CHANGE_GRAINS`] of them; a grain is a page,
/// or as many as that takes. Written by one thread, read by any.
#[derive(Debug)]
pub struct Changes {
    generation: Generation,
    /// Bytes of a grain, a power of two.
    grain: u64,
    /// All of it counts as changed by this one.
    whole: AtomicU64,
    /// Bytes that the region has had.
    size: AtomicU64,
    void: AtomicBool,
    last: Vec<AtomicU64>,
}

impl Changes {
    /// A region of `size` bytes that may grow to `max_size`, and of which nothing is known
    /// before `epoch`. None if there is no memory for it.
    pub(super) fn new(
        generation: Generation,
        epoch: u64,
        (size, max_size): (u64, u64),
    ) -> Option<Arc<Self>> {
        let mut grain = PAGE_SIZE;
        while max_size.div_ceil(grain) > MAX_CHANGE_GRAINS {
            grain *= 2;
        }
        let grains = max_size.div_ceil(grain) as usize;
        Some(Arc::new(Self {
            generation,
            grain,
            whole: AtomicU64::new(epoch),
            size: AtomicU64::new(size),
            void: AtomicBool::new(false),
            last: AtomicU64::new_vec_zeroed(grains).ok()?,
        }))
    }

    /// `epoch` changes these bytes, and those by which the region is larger than it was.
    /// Called before the epoch is published, which is what orders the stores.
    fn note(&self, epoch: u64, extents: &ExtentSet) {
        let before = self.size.fetch_max(extents.size(), Ordering::Relaxed);
        if extents.is_all() {
            self.whole.fetch_max(epoch, Ordering::Relaxed);
            return;
        }
        self.set(epoch, before..extents.size());
        for range in extents.ranges() {
            self.set(epoch, range);
        }
    }

    fn set(&self, epoch: u64, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let grains = (range.start / self.grain) as usize..range.end.div_ceil(self.grain) as usize;
        for last in self.last.get(grains).unwrap_or_default() {
            last.store(epoch, Ordering::Relaxed);
        }
    }

    /// This life is over.
    fn end(&self) {
        // SYNC(changes_void): before the next life is published; pairs with since.
        self.void.store(true, Ordering::Release);
    }

    /// What `range` consists of, from its beginning on: lengths, and whether that much was
    /// changed after `epoch` of the life `generation`. At most `most` runs; all of it was in
    /// any other life.
    pub fn since(
        &self,
        (generation, epoch): (Generation, u64),
        range: Range<u64>,
        most: usize,
    ) -> Vec<(u64, bool)> {
        let all = self.whole.load(Ordering::Relaxed) > epoch || generation != self.generation;
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut at = range.start;
        while at < range.end && !all {
            let grain = at / self.grain;
            let until = ((grain + 1) * self.grain).min(range.end);
            let last = self.last.get(grain as usize);
            let changed = last.is_none_or(|last| last.load(Ordering::Relaxed) > epoch);
            let full = runs.len() == most;
            match runs.last_mut() {
                Some((len, same)) if *same == changed => *len += until - at,
                _ if full => break,
                _ => runs.push((until - at, changed)),
            }
            at = until;
        }
        // SYNC(changes_void): pairs with end; asked last, so that what was read above is
        // of this life.
        if all || self.void.load(Ordering::Acquire) {
            return vec![(range.end - range.start, true)];
        }
        runs
    }
}

/// `epoch` is about to be published with these changes, where that is kept.
pub(super) fn note(changes: &Option<Arc<Changes>>, epoch: u64, extents: &ExtentSet) {
    if let Some(changes) = changes {
        changes.note(epoch, extents);
    }
}

/// Another life is about to begin with `epoch`, with content that compares with nothing
/// before.
pub(super) fn renew(
    changes: &mut Option<Arc<Changes>>,
    (generation, epoch): (Generation, u64),
    sizes: (u64, u64),
) {
    if let Some(before) = changes.take() {
        before.end();
        *changes = Changes::new(generation, epoch, sizes);
    }
}

impl Engine {
    /// All regions, by name.
    pub(super) fn exported(&self) -> Vec<Exported> {
        let exported = |entry: &RegionEntry| Exported {
            name: entry.name.clone(),
            id: entry.control.identity().id,
            size: entry.size,
            shared: entry.shared,
            owner_uid: entry.owner_uid,
            role: entry.role(),
            generation: entry.generation,
            epoch: entry.epoch,
            changes: entry.changes.clone(),
        };
        let mut all: Vec<Exported> = self
            .regions
            .iter()
            .map(|(_, entry)| exported(entry))
            .collect();
        all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIFE: Generation = Generation(7);

    fn changes(size: u64, max_size: u64) -> Arc<Changes> {
        Changes::new(LIFE, 10, (size, max_size)).expect("memory")
    }

    fn extents(size: u64, ranges: &[(u64, u64)]) -> ExtentSet {
        let mut set = ExtentSet::new(size);
        for (start, end) in ranges {
            set.insert(*start..*end);
        }
        set
    }

    #[test]
    fn what_was_changed_since_when() {
        let page = PAGE_SIZE;
        let changes = changes(8 * page, 8 * page);
        let since = |epoch| changes.since((LIFE, epoch), 0..8 * page, 100);
        assert_eq!(since(9), [(8 * page, true)], "before anything is known");
        assert_eq!(since(10), [(8 * page, false)]);
        changes.note(
            11,
            &extents(8 * page, &[(page, page + 1), (5 * page - 1, 5 * page + 1)]),
        );
        changes.note(12, &extents(8 * page, &[(0, 1)]));
        let expected = [(2, true), (2, false), (2, true), (2, false)];
        assert_eq!(
            since(10),
            expected.map(|(pages, changed)| (pages * page, changed))
        );
        assert_eq!(since(11), [(page, true), (7 * page, false)]);
        assert_eq!(since(12), [(8 * page, false)]);
        assert_eq!(
            changes.since((LIFE, 10), page + 7..5 * page, 1),
            [(page - 7, true)]
        );
        let other = changes.since((Generation(8), 12), 3..9, 5);
        assert_eq!(other, [(6, true)], "another life");
        changes.note(13, &ExtentSet::all(8 * page));
        assert_eq!(
            (since(12), since(13)),
            (vec![(8 * page, true)], vec![(8 * page, false)])
        );
        changes.end();
        assert_eq!(since(13), [(8 * page, true)]);
    }

    #[test]
    fn what_a_region_grew_by_is_changed_and_the_table_is_bounded() {
        let changes = changes(PAGE_SIZE, 4 * PAGE_SIZE);
        changes.note(11, &extents(3 * PAGE_SIZE, &[]));
        let grown = changes.since((LIFE, 10), 0..3 * PAGE_SIZE, 9);
        assert_eq!(grown, [(PAGE_SIZE, false), (2 * PAGE_SIZE, true)]);
        let large = 64 << 30;
        let changes = self::changes(large, large);
        assert!(changes.last.len() as u64 <= MAX_CHANGE_GRAINS);
        changes.note(11, &extents(large, &[(large - 1, large)]));
        let runs = changes.since((LIFE, 10), 0..large, 9);
        assert_eq!(
            runs,
            [(large - changes.grain, false), (changes.grain, true)]
        );
    }

    proptest! {
        #[test]
        fn no_changed_byte_is_missed(
            notes in proptest::collection::vec((0u64..40_000, 1u64..9_000), 1..12),
            since in 10u64..24,
            start in 0u64..40_000,
        ) {
            let size = 50_000;
            let changes = changes(size, size);
            let mut model = vec![0u64; size as usize];
            for (epoch, (at, len)) in (11..).zip(&notes) {
                let range = *at..(at + len).min(size);
                model[range.start as usize..range.end as usize].fill(epoch);
                changes.note(epoch, &extents(size, &[(range.start, range.end)]));
            }
            let mut at = start;
            for (len, changed) in changes.since((LIFE, since), start..size, 1000) {
                let bytes = &model[at as usize..(at + len) as usize];
                prop_assert!(changed || bytes.iter().all(|last| *last <= since));
                // Nor is more said than the pages that were touched.
                let page = |at: u64| (at / PAGE_SIZE) as usize * PAGE_SIZE as usize;
                let pages = page(at)..(page(at + len - 1) + PAGE_SIZE as usize).min(model.len());
                prop_assert!(!changed || model[pages].iter().any(|last| *last > since));
                at += len;
            }
            prop_assert_eq!(at, size);
        }
    }
}
