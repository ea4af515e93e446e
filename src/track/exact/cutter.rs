//! The fault thread's half as a value: which page is armed where, what has to be saved
//! before it is lifted, and how a cut is made.
//!
//! What it does to the world goes through a [`Ground`]: the kernel in the engine,
//! plain memory in tests. After [`Cutter::new`] it allocates nothing.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use zerocopy::FromZeros;

use super::Cut;
use super::board::Board;
use super::set::PageSet;
use super::word::State;
use crate::limits;
use crate::track::TrackError;

/// Armed pages that are protected once more rather than made two calls of: a call
/// costs 0.8 us, a page within one 60 ns.
const BRIDGE: u64 = 12;
/// Pages armed or lifted in one call where all are: 0.25 ms.
const SPAN: u64 = 4096;
/// Calls between two looks for faults while pages are armed in rounds.
const CALLS_PER_LOOK: u32 = 16;
/// Faults answered at one look.
const FAULTS_PER_LOOK: u32 = 64;

/// What a cutter does its work on.
pub trait Ground {
    /// Why an operation failed: tracking is lost then.
    type Error;

    /// From now on the next store to each page of an attachment waits.
    ///
    /// # Errors
    /// As the ground says.
    fn protect(&mut self, attachment: usize, pages: Range<u64>) -> Result<(), Self::Error>;

    /// Lets stores to the pages go on, those that wait and later ones.
    ///
    /// # Errors
    /// As the ground says.
    fn lift(&mut self, attachment: usize, pages: Range<u64>) -> Result<(), Self::Error>;

    /// Copies a page as it stands into a slot of the board.
    fn save(&mut self, page: u64, slot: u32);

    /// A store that waits: attachment and page, both checked.
    ///
    /// # Errors
    /// As the ground says.
    fn next_fault(&mut self) -> Result<Option<(usize, u64)>, Self::Error>;

    /// A clock.
    fn now_ns(&mut self) -> u64;
}

/// One writing process's mapping.
#[derive(Debug)]
pub struct Armed {
    /// Pages that stores go to without a fault.
    open: PageSet,
    /// Where a writer that goes through memory in order comes next.
    expected: u64,
    /// How many pages were opened for it last.
    window: u64,
    /// Whether none of its pages is armed.
    all_open: bool,
    gone: bool,
}

/// The state of one region's fault thread.
///
/// Memory: 2 bytes per page, taken as pages are written, and a bit per page and
/// attachment.
#[derive(Debug)]
pub struct Cutter {
    board: Arc<Board>,
    made: u64,
    attachments: Vec<Armed>,
    /// Free slots beside those in the board's ring.
    stash: Vec<u32>,
    parked: Vec<(usize, u64)>,
    parked_since: u64,
    stall_ns: u64,
    /// Per page: successive cuts it was dirty in, and the low byte of the last.
    heat: Vec<u16>,
    hot_pages: u64,
    arming: bool,
    skips_hot_pages: bool,
}

impl Cutter {
    /// A cutter for `attachments` writers of one region, whose pages are all open. There
    /// is room for [`limits::MAX_WRITERS`].
    ///
    /// # Errors
    /// [`TrackError::Memory`] if there is no room for its tables.
    pub fn new(board: Arc<Board>, attachments: usize) -> Result<Self, TrackError> {
        let pages = board.pages();
        let slots = board.slots();
        let mut all = Vec::with_capacity(limits::MAX_WRITERS as usize);
        for place in 0..limits::MAX_WRITERS as usize {
            all.push(if place < attachments {
                Armed::new(pages, false)?
            } else {
                Armed::vacant()
            });
        }
        let stall = std::time::Duration::from_millis(limits::CUT_STALL_MS);
        Ok(Self {
            made: board.made().number,
            board,
            attachments: all,
            stash: (0..slots).collect(),
            parked: Vec::with_capacity(limits::MAX_PARKED as usize),
            parked_since: 0,
            stall_ns: stall.as_nanos() as u64,
            heat: u16::new_vec_zeroed(pages as usize).map_err(|_| TrackError::Memory)?,
            hot_pages: 0,
            arming: false,
            skips_hot_pages: true,
        })
    }

    /// Another deadline for stores that wait for room, in nanoseconds.
    pub fn set_stall(&mut self, stall_ns: u64) {
        self.stall_ns = stall_ns;
    }

    /// Whether further faults may be taken: there is room to remember one.
    pub fn has_room(&self) -> bool {
        self.parked.len() < limits::MAX_PARKED as usize
    }

    /// Whether stores wait for slots.
    pub fn is_starved(&self) -> bool {
        !self.parked.is_empty()
    }

    /// One more process writes from now on. What stood in its place, to be dropped where
    /// that may take its time.
    ///
    /// # Panics
    /// If there is no such place.
    pub fn join(&mut self, attachment: usize, armed: Armed) -> Armed {
        self.forget(attachment);
        std::mem::replace(&mut self.attachments[attachment], armed)
    }

    /// A process writes no more, or its memory is gone: nothing of it is armed any more.
    pub fn forget(&mut self, attachment: usize) {
        if let Some(armed) = self.attachments.get_mut(attachment) {
            armed.gone = true;
            armed.all_open = false;
            armed.open.clear();
        }
        self.parked.retain(|(of, _)| *of != attachment);
        self.board.set_starved(!self.parked.is_empty());
    }

    /// Answers a store that waits, or leaves it waiting while there is no slot. True
    /// if it is the first one since the last cut.
    ///
    /// # Errors
    /// What the ground refuses.
    pub fn fault<G: Ground>(
        &mut self,
        ground: &mut G,
        attachment: usize,
        page: u64,
    ) -> Result<bool, G::Error> {
        self.board.counters().faults.fetch_add(1, Relaxed);
        let armed = &self.attachments[attachment];
        if armed.all_open || armed.open.contains(page) {
            // One of several threads that ran into the same page.
            ground.lift(attachment, page..page + 1)?;
            return Ok(false);
        }
        let first = self.dirty().is_empty();
        if !self.keep(ground, page) {
            if self.parked.is_empty() {
                self.parked_since = ground.now_ns();
            }
            self.parked.push((attachment, page));
            self.board.set_starved(true);
            return Ok(false);
        }
        self.open(attachment, page);
        let end = self.open_window(ground, attachment, page);
        ground.lift(attachment, page..end)?;
        Ok(first)
    }

    /// Pages written since the last cut.
    fn dirty(&self) -> &PageSet {
        self.board.set(self.made + 1)
    }

    fn open(&self, attachment: usize, page: u64) {
        self.dirty().insert(page);
        self.attachments[attachment].open.insert(page);
    }

    /// Sees to it that the cut being captured has the page; false without a free slot.
    fn keep<G: Ground>(&mut self, ground: &mut G, page: u64) -> bool {
        if self.dirty().contains(page) {
            return true;
        }
        let word = self.board.word(page);
        let seen = word.state();
        match seen {
            State::Pending => {}
            State::None if self.board.is_ahead_of_walk(page) => {}
            _ => return true,
        }
        let Some(slot) = self.stash.pop().or_else(|| self.board.free_slot()) else {
            return false;
        };
        ground.save(page, slot);
        if word.save(seen, slot) {
            self.board.note_saved(page, slot);
        } else {
            self.stash.push(slot);
        }
        true
    }

    /// Opens pages behind `page` for a writer that goes through memory in order, twice
    /// as many each time; where the opened range ends.
    fn open_window<G: Ground>(&mut self, ground: &mut G, attachment: usize, page: u64) -> u64 {
        let armed = &mut self.attachments[attachment];
        let follows = armed.expected == page;
        armed.window = if follows {
            (armed.window * 2).min(limits::WINDOW_PAGES)
        } else {
            1
        };
        let mut end = page + 1;
        if !self.arming && !self.board.is_walking() {
            // Behind what is present there may be no memory to save.
            let limit = (page + self.attachments[attachment].window).min(self.board.present());
            while end < limit
                && !self.attachments[attachment].open.contains(end)
                && self.keep(ground, end)
            {
                self.open(attachment, end);
                end += 1;
            }
        }
        self.attachments[attachment].expected = end;
        end
    }

    /// Tries again what waits for slots; beyond the deadline the cut is void, which is
    /// what true means.
    ///
    /// # Errors
    /// What the ground refuses.
    pub fn retry<G: Ground>(&mut self, ground: &mut G) -> Result<bool, G::Error> {
        let mut given_up = false;
        while let Some((attachment, page)) = self.parked.last().copied() {
            if !self.keep(ground, page) {
                if ground.now_ns().saturating_sub(self.parked_since) >= self.stall_ns {
                    self.give_up(ground)?;
                    given_up = true;
                }
                break;
            }
            self.parked.pop();
            self.open(attachment, page);
            ground.lift(attachment, page..page + 1)?;
        }
        self.board.set_starved(!self.parked.is_empty());
        Ok(given_up)
    }

    /// Ends the cut that is being captured: all pages are opened, and so all stores go
    /// on. The next cut is of everything.
    ///
    /// # Errors
    /// What the ground refuses.
    pub fn give_up<G: Ground>(&mut self, ground: &mut G) -> Result<(), G::Error> {
        self.board.set_void(self.made);
        let pages = self.board.pages();
        for attachment in 0..self.attachments.len() {
            if self.attachments[attachment].gone {
                continue;
            }
            self.attachments[attachment].all_open = true;
            for start in (0..pages).step_by(SPAN as usize) {
                ground.lift(attachment, start..(start + SPAN).min(pages))?;
            }
        }
        self.parked.clear();
        Ok(())
    }

    /// The cut that the engine asks for, if any: the capture of the last one is over.
    pub fn wanted(&self) -> Option<Cut> {
        self.board.wanted(self.made)
    }

    /// Makes a cut.
    ///
    /// # Errors
    /// What the ground refuses.
    pub fn cut<G: Ground>(&mut self, ground: &mut G, all: bool) -> Result<Cut, G::Error> {
        // Nothing is pending any more, so nothing needs a slot.
        self.retry(ground)?;
        let all = all || self.attachments.iter().any(|it| it.all_open && !it.gone);
        self.arming = true;
        if all {
            self.arm_everything(ground)?;
        }
        self.rounds(ground)?;
        let begun = ground.now_ns();
        self.arm_open(ground)?;
        let cut = self.take_dirty(all);
        let withheld = ground.now_ns().saturating_sub(begun);
        self.arming = false;
        let counters = self.board.counters();
        counters.cuts.fetch_add(1, Relaxed);
        counters.last_withheld_ns.store(withheld, Relaxed);
        counters.longest_withheld_ns.fetch_max(withheld, Relaxed);
        self.board.publish(cut);
        Ok(cut)
    }

    /// Arms all pages, while faults are answered.
    fn arm_everything<G: Ground>(&mut self, ground: &mut G) -> Result<(), G::Error> {
        let pages = self.board.pages();
        for attachment in 0..self.attachments.len() {
            if self.attachments[attachment].gone {
                continue;
            }
            for start in (0..pages).step_by(SPAN as usize) {
                let span = start..(start + SPAN).min(pages);
                self.attachments[attachment].open.remove(span.clone());
                ground.protect(attachment, span)?;
                self.attachments[attachment].all_open = false;
                self.look(ground)?;
            }
        }
        Ok(())
    }

    /// Arms open pages, while faults are answered, until few are left.
    fn rounds<G: Ground>(&mut self, ground: &mut G) -> Result<(), G::Error> {
        let skip_hot = self.skips_hot_pages && self.hot_pages <= limits::HOT_WITHHELD_PAGES;
        for _ in 0..limits::CUT_ROUNDS {
            let open: u64 = self.attachments.iter().map(|it| it.open.count()).sum();
            let hot = if skip_hot { self.hot_pages } else { 0 };
            if open <= limits::CUT_ENOUGH_PAGES + hot {
                break;
            }
            for attachment in 0..self.attachments.len() {
                let mut at = 0;
                let mut calls = 0;
                while let Some(run) = self.next_open(attachment, at, skip_hot) {
                    at = run.end;
                    self.attachments[attachment].open.remove(run.clone());
                    calls += 1 + (run.end - run.start) as u32 / BRIDGE as u32;
                    ground.protect(attachment, run)?;
                    if calls >= CALLS_PER_LOOK {
                        calls = 0;
                        self.look(ground)?;
                    }
                }
                self.look(ground)?;
            }
        }
        Ok(())
    }

    /// The next run of open pages, with armed ones in between where that is cheaper,
    /// and no longer than a span.
    fn next_open(&self, attachment: usize, from: u64, skip_hot: bool) -> Option<Range<u64>> {
        let open = &self.attachments[attachment].open;
        let mut run = open.next_run(from)?;
        if skip_hot {
            while self.is_hot(run.start) {
                run.start += 1;
                if run.start == run.end {
                    run = open.next_run(run.end)?;
                }
            }
            let mut end = run.start + 1;
            while end < run.end && !self.is_hot(end) {
                end += 1;
            }
            return Some(run.start..end.min(run.start + SPAN));
        }
        while run.end - run.start < SPAN {
            match open.next_run(run.end) {
                Some(next) if next.start - run.end <= BRIDGE => run.end = next.end,
                _ => break,
            }
        }
        run.end = run.end.min(run.start + SPAN);
        Some(run)
    }

    /// Answers some of the faults that wait.
    fn look<G: Ground>(&mut self, ground: &mut G) -> Result<(), G::Error> {
        for _ in 0..FAULTS_PER_LOOK {
            let Some((attachment, page)) = ground.next_fault()? else {
                break;
            };
            self.fault(ground, attachment, page)?;
        }
        Ok(())
    }

    /// The withheld pass: arms what is open, in all attachments.
    fn arm_open<G: Ground>(&mut self, ground: &mut G) -> Result<(), G::Error> {
        for attachment in 0..self.attachments.len() {
            let mut at = 0;
            while let Some(run) = self.next_open(attachment, at, false) {
                at = run.end;
                ground.protect(attachment, run)?;
            }
            self.attachments[attachment].open.clear();
        }
        Ok(())
    }

    /// Makes what is dirty the cut's, before a fault is answered again.
    fn take_dirty(&mut self, all: bool) -> Cut {
        let number = self.made + 1;
        let mut hot = 0;
        for page in self.board.set(number).iter() {
            let word = self.board.word(page);
            let left = if all { word.clear() } else { word.pend() };
            if let Some(slot) = left {
                self.board.counters().slots_used.fetch_sub(1, Relaxed);
                self.stash.push(slot);
            }
            hot += u64::from(warm(&mut self.heat[page as usize], number));
        }
        self.board.begin_walk(all);
        self.made = number;
        self.hot_pages = hot;
        self.board.counters().hot_pages.store(hot, Relaxed);
        Cut { number, all }
    }

    fn is_hot(&self, page: u64) -> bool {
        let heat = self.heat[page as usize];
        u64::from(heat >> 8) >= limits::HOT_CUTS && heat as u8 == self.made as u8
    }
}

impl Armed {
    /// A mapping of `pages` pages, which are all armed or all open.
    ///
    /// # Errors
    /// [`TrackError::Memory`] if there is no room for its table.
    pub fn new(pages: u64, is_armed: bool) -> Result<Self, TrackError> {
        Ok(Self {
            open: PageSet::new(pages)?,
            expected: u64::MAX,
            window: 1,
            all_open: !is_armed,
            gone: false,
        })
    }

    /// A place that no process has. Allocates nothing.
    pub fn vacant() -> Self {
        Self {
            open: PageSet::none(),
            expected: u64::MAX,
            window: 1,
            all_open: false,
            gone: true,
        }
    }
}

/// Counts one more cut in which a page was dirty; whether it is hot now.
fn warm(heat: &mut u16, number: u64) -> bool {
    let follows = *heat as u8 == (number as u8).wrapping_sub(1);
    let cuts = if follows {
        (*heat >> 8).saturating_add(1).min(255)
    } else {
        1
    };
    *heat = cuts << 8 | u16::from(number as u8);
    u64::from(cuts) >= limits::HOT_CUTS
}

#[cfg(test)]
mod badly;
#[cfg(test)]
pub(crate) use badly::Badly;
#[cfg(test)]
mod tests;
