//! What the fault thread and the engine share of one region: preallocated, changed by
//! atomics only.
//!
//! ```text
//!   engine                                          fault thread
//!   ask(n)  -------- asked: n, all or dirty ------>  arms, withholds, cuts
//!   capture <------- made: n, set of pages --------
//!           <------- saved: (page, slot) ----------  copies before it lifts
//!           -------- free: slots ----------------->
//!           <------- voided: n, lost: why ---------
//! ```
//!
//! - I1: a cut is asked for only after the capture of the one before has ended; until
//!   then the set of its pages is the engine's, and the other set the fault thread's.
//! - I2: cut `n` gathers its pages in set `n % 2`.
//! - I3: `voided` is stored before any page of a voided cut is lifted without being
//!   saved, so a capture that ends and does not see it has copied the cut.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::FromZeros;

use super::ring::Ring;
use super::set::PageSet;
use super::word::{MAX_SLOTS, PageWord};
use super::{Cut, Lost};
use crate::limits;
use crate::shm::SharedMemory;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd;
use crate::track::TrackError;
use crate::units::{PAGE_SIZE, pages_for};

/// No capture of everything is under way.
const NOT_WALKING: u64 = u64::MAX;

/// Counters of one region, all since its tracking began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExactStats {
    /// Cuts made.
    pub cuts: u64,
    /// Longest pass with faults withheld, in nanoseconds.
    pub longest_withheld_ns: u64,
    /// The last such pass, in nanoseconds.
    pub last_withheld_ns: u64,
    /// Faults answered.
    pub faults: u64,
    /// Pages copied before they were written.
    pub saved_pages: u64,
    /// Slots that hold such copies now.
    pub slots_used: u64,
    /// Slots there are.
    pub slots: u64,
    /// Cuts that were given up.
    pub voided: u64,
    /// Pages that were dirty in [`limits::HOT_CUTS`] successive cuts, at the last one.
    pub hot_pages: u64,
    /// Pages written since the last cut.
    pub dirty_pages: u64,
}

/// The shared state of one region in mode `sync`.
///
/// Memory: 4 bytes and two bits per page, taken as pages are written, and the slots.
#[derive(Debug)]
pub struct Board {
    pages: u64,
    /// Pages of them that have memory.
    present: AtomicU64,
    words: Vec<PageWord>,
    pool: SharedMemory,
    slots: u32,
    free: Ring,
    saved: Ring,
    sets: [PageSet; 2],
    asked: AtomicU64,
    made: AtomicU64,
    voided: AtomicU64,
    lost: AtomicU32,
    starved: AtomicU32,
    walked: AtomicU64,
    counters: Counters,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) cuts: AtomicU64,
    pub(super) longest_withheld_ns: AtomicU64,
    pub(super) last_withheld_ns: AtomicU64,
    pub(super) faults: AtomicU64,
    pub(super) saved_pages: AtomicU64,
    pub(super) slots_used: AtomicU64,
    pub(super) voided: AtomicU64,
    pub(super) hot_pages: AtomicU64,
}

impl Board {
    /// The board of a region of `size` bytes with the default pool.
    ///
    /// # Errors
    /// [`TrackError::Memory`], [`TrackError::Open`] if there is no memory for it.
    pub fn new(size: u64) -> Result<Self, TrackError> {
        let share = size / limits::CUT_POOL_DIVISOR;
        let pool = share.clamp(limits::CUT_POOL_MIN, limits::CUT_POOL_MAX);
        let most = pages_for(size).max(1);
        Self::with_slots(size, (pool / PAGE_SIZE).min(most) as u32)
    }

    /// The same with room to save `slots` pages, at least one.
    ///
    /// # Errors
    /// As for [`Board::new`].
    pub fn with_slots(size: u64, slots: u32) -> Result<Self, TrackError> {
        let open = |source| TrackError::Open { source };
        let slots = slots.clamp(1, MAX_SLOTS - 1);
        let pages = pages_for(size);
        let bytes = u64::from(slots) * PAGE_SIZE;
        let fd = memfd::create("uffd-sync:cut-pool", bytes).map_err(open)?;
        let pool = Mapping::shared(&fd, bytes, Access::ReadWrite).map_err(open)?;
        Ok(Self {
            pages,
            present: AtomicU64::new(pages),
            words: PageWord::new_vec_zeroed(pages as usize).map_err(|_| TrackError::Memory)?,
            pool: SharedMemory::new(pool),
            slots,
            free: Ring::new(slots as usize),
            saved: Ring::new(2 * slots as usize),
            sets: [PageSet::new(pages)?, PageSet::new(pages)?],
            asked: AtomicU64::new(0),
            made: AtomicU64::new(0),
            voided: AtomicU64::new(0),
            lost: AtomicU32::new(0),
            starved: AtomicU32::new(0),
            walked: AtomicU64::new(NOT_WALKING),
            counters: Counters::default(),
        })
    }

    /// Pages of the region, those that it may grow to included.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that its memory is known to have: all, unless it was told otherwise. Those
    /// behind them are not looked at before a store to them was seen.
    pub fn present(&self) -> u64 {
        // SYNC(present): pairs with Board::set_present.
        self.present.load(Ordering::Acquire)
    }

    /// The memory was found to have its first `pages`.
    pub fn set_present(&self, pages: u64) {
        // SYNC(present): the memory was seen to have them; pairs with Board::present.
        self.present.store(pages.min(self.pages), Ordering::Release);
    }

    /// Slots of the pool.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Bytes of the pool.
    pub fn pool_bytes(&self) -> u64 {
        u64::from(self.slots) * PAGE_SIZE
    }

    /// The word of a page.
    ///
    /// # Panics
    /// If the page lies beyond the region.
    pub fn word(&self, page: u64) -> &PageWord {
        &self.words[page as usize]
    }

    /// The set in which cut `number` gathers its pages.
    pub fn set(&self, number: u64) -> &PageSet {
        &self.sets[(number % 2) as usize]
    }

    /// What was counted so far.
    pub fn stats(&self) -> ExactStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        ExactStats {
            cuts: get(&counters.cuts),
            longest_withheld_ns: get(&counters.longest_withheld_ns),
            last_withheld_ns: get(&counters.last_withheld_ns),
            faults: get(&counters.faults),
            saved_pages: get(&counters.saved_pages),
            slots_used: get(&counters.slots_used),
            slots: self.slots.into(),
            voided: get(&counters.voided),
            hot_pages: get(&counters.hot_pages),
            dirty_pages: self.set((get(&self.made) >> 1) + 1).count(),
        }
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Why tracking has ended, if it has.
    pub fn lost(&self) -> Option<Lost> {
        // SYNC(cut_lost): pairs with the store in `set_lost`.
        Lost::from_code(self.lost.load(Ordering::Acquire))
    }
}

/// The engine's end.
impl Board {
    /// Asks for the next cut: of what is dirty, or with `all` of everything, whatever
    /// is known. Wake the fault thread afterwards. Returns its number.
    pub fn ask(&self, all: bool) -> u64 {
        let number = (self.made.load(Ordering::Relaxed) >> 1) + 1;
        // SYNC(cut_asked): publishes that the capture before has ended, and its set
        // cleared; pairs with the load in `wanted`.
        let asked = number << 1 | u64::from(all);
        self.asked.store(asked, Ordering::Release);
        number
    }

    /// The cut made last.
    pub fn made(&self) -> Cut {
        // SYNC(cut_made): pairs with the store in `publish`.
        let made = self.made.load(Ordering::Acquire);
        Cut {
            number: made >> 1,
            all: made & 1 == 1,
        }
    }

    /// Whether cut `number` was given up: what was copied of it is of no instant.
    pub fn is_void(&self, number: u64) -> bool {
        // SYNC(cut_void): what was copied is older than the word read below; pairs with
        // the fence in `set_void`.
        std::sync::atomic::fence(Ordering::Acquire);
        self.voided.load(Ordering::Relaxed) == number
    }

    /// Whether a store waits for a free slot.
    pub fn is_starved(&self) -> bool {
        self.starved.load(Ordering::Relaxed) != 0
    }

    /// Whether something was written since the last cut.
    pub fn is_dirty(&self) -> bool {
        let made = self.made.load(Ordering::Relaxed) >> 1;
        !self.set(made + 1).is_empty()
    }

    /// The next page that was saved, with its slot, unless it was dealt with.
    pub fn next_saved(&self) -> Option<(u64, u32)> {
        while let Some(entry) = self.saved.pop() {
            let (page, slot) = (entry >> 24, entry as u32 & (MAX_SLOTS - 1));
            if self.word(page).saved() == Some(slot) {
                return Some((page, slot));
            }
        }
        None
    }

    /// Copies what a slot holds.
    pub fn read_slot(&self, slot: u32, out: &mut [u8]) {
        let offset = u64::from(slot) * PAGE_SIZE;
        let read = self.pool.read(offset, out);
        debug_assert!(read.is_ok(), "a slot lies within the pool");
    }

    /// The content of a pending page is where it belongs.
    pub fn settle(&self, page: u64) {
        if let Some(slot) = self.word(page).settle() {
            self.give_back(slot);
        }
    }

    /// The content of a saved page is where it belongs.
    pub fn release(&self, page: u64, slot: u32) {
        if self.word(page).release(slot) {
            self.give_back(slot);
        }
    }

    fn give_back(&self, slot: u32) {
        self.counters.slots_used.fetch_sub(1, Ordering::Relaxed);
        let kept = self.free.push(slot.into());
        debug_assert!(kept, "there are no more slots than entries");
    }

    /// In a capture of everything: all below `page` is where it belongs.
    pub fn walked(&self, page: u64) {
        // SYNC(walked): the copies are complete; pairs with the load in `needs_saving`.
        self.walked.store(page, Ordering::Release);
    }

    /// The capture of cut `number` has ended, well or not: nothing is to be saved for
    /// it any more, and its set is empty for the cut after the next.
    pub fn finish(&self, number: u64) {
        let set = self.set(number);
        for page in set.iter() {
            if let Some(slot) = self.word(page).clear() {
                self.give_back(slot);
            }
        }
        self.walked(NOT_WALKING);
        while let Some((page, slot)) = self.next_saved() {
            self.release(page, slot);
        }
        set.clear();
    }
}

/// The fault thread's end.
impl Board {
    /// The cut that the engine wants, if it is not made yet.
    pub(super) fn wanted(&self, made: u64) -> Option<Cut> {
        // SYNC(cut_asked): pairs with the store in `ask`.
        let asked = self.asked.load(Ordering::Acquire);
        (asked >> 1 > made).then_some(Cut {
            number: asked >> 1,
            all: asked & 1 == 1,
        })
    }

    pub(super) fn publish(&self, cut: Cut) {
        // SYNC(cut_made): publishes the set and the words of its pages; pairs with the
        // load in `made`.
        let made = cut.number << 1 | u64::from(cut.all);
        self.made.store(made, Ordering::Release);
    }

    /// What the fault thread begins a capture of everything with, before it answers a
    /// fault.
    pub(super) fn begin_walk(&self, all: bool) {
        let from = if all { 0 } else { NOT_WALKING };
        self.walked.store(from, Ordering::Relaxed);
    }

    /// Whether a capture of everything has still to come to `page`.
    pub(super) fn is_ahead_of_walk(&self, page: u64) -> bool {
        // SYNC(walked): a page behind the walk is lifted after it was copied; pairs
        // with the store in `walked`.
        page >= self.walked.load(Ordering::Acquire)
    }

    pub(super) fn is_walking(&self) -> bool {
        self.walked.load(Ordering::Relaxed) != NOT_WALKING
    }

    pub(super) fn free_slot(&self) -> Option<u32> {
        self.free.pop().map(|slot| slot as u32)
    }

    pub(super) fn note_saved(&self, page: u64, slot: u32) {
        self.counters.saved_pages.fetch_add(1, Ordering::Relaxed);
        self.counters.slots_used.fetch_add(1, Ordering::Relaxed);
        // Without room the walk over the pages finds it.
        let _ = self.saved.push(page << 24 | u64::from(slot));
    }

    /// Copies a page of the region into a slot.
    pub fn write_slot(&self, slot: u32, content: &[u8]) {
        let offset = u64::from(slot) * PAGE_SIZE;
        let written = self.pool.write(offset, content);
        debug_assert!(written.is_ok(), "a slot lies within the pool");
    }

    /// Touches the pool, so that no fault waits for its memory; as long as `go_on` says.
    pub fn prepare(&self, go_on: impl Fn() -> bool) {
        for slot in (0..self.slots).take_while(|_| go_on()) {
            self.write_slot(slot, &[0; 8]);
        }
    }

    pub(super) fn set_starved(&self, starved: bool) {
        self.starved.store(starved.into(), Ordering::Relaxed);
    }

    pub(super) fn set_void(&self, number: u64) {
        self.counters.voided.fetch_add(1, Ordering::Relaxed);
        self.voided.store(number, Ordering::Relaxed);
        // SYNC(cut_void): no page is lifted before; pairs with the fence in `is_void`.
        std::sync::atomic::fence(Ordering::Release);
    }

    /// Tracking has ended: nothing is answered any more.
    pub fn set_lost(&self, lost: Lost) {
        // SYNC(cut_lost): no page is let go before; pairs with the load in `lost`.
        self.lost.store(lost.code(), Ordering::Release);
        std::sync::atomic::fence(Ordering::Release);
    }
}
