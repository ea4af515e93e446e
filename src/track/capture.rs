//! One capture: dirty pages -> byte diff against the twin -> extents.
//!
//! ```text
//! async    scan and protect a span, hot pages apart -> copy and compare its written pages in one pass
//!          -> diff of the blocks that differ -> twin
//! sync     pages of a cut -> copied, or taken from where they were saved -> diff -> twin
//! manual   drained marks -> copy exactly those bytes -> twin
//! compare  walk the file's data, and the twin's pages outside of it, -> diff -> twin
//! ```
//! A capture is advanced in steps of at most [`CAPTURE_STEP_PAGES`] pages, so that
//! one region holds nobody up. While it is under way the twin is between epochs.
//!
//! - I1: a page is protected before it is copied, never after: a store that the
//!   copy missed is reported again.
//! - I2: the twin changes by what was copied once into a private buffer, so it
//!   equals what is sent, byte for byte.
//! - I3: a page taken from a scan stays on the work list until the twin has it:
//!   its dirty bit is gone.
//! - I4: no hole of the region is allocated by reading it.
//! - I5: a capture is of the size that the twin had when it began. What lies behind is
//!   not armed before the capture that has it, so no mark of it is lost meanwhile; the
//!   page that the old end lies in is armed and compared once more.
//!
//! Failure: after any error of a scan the dirty bits of a part may be gone. The
//! step answers [`Step::Lost`] and everything is compared by [`Capture::full`].
//! What was moved into the twin until then is noted in the twin itself, so the
//! capture that ends next reports it: no capture that is lost, or dropped and
//! followed by a full one, loses an extent.

mod collect;
mod cut;

use std::collections::VecDeque;
use std::ops::Range;

use cut::Cutting;

use super::attachment::ARM_SPAN;
use super::diff::{changed_blocks, diff_blocks};
use super::{
    DIFF_GAP, ExtentSet, NoRoom, PAGE, PreImages, Source, TrackError, Tracker, Twin, WhenFull,
};
use crate::limits::CAPTURE_STEP_PAGES;
use crate::shm::Ahead;
use crate::units::{GIB, MIB, PAGE_SIZE, page_align_up, page_of, pages_for};

/// Bytes read at once by a comparison: the copy, its twin and the diff stay in the
/// first-level cache.
const BATCH: usize = 4 * PAGE;
/// Bytes looked at by one scan: 0.3 ms where nothing was written.
const SCAN_SPAN: u64 = GIB;
/// Ranges taken from one scan.
const SCAN_RANGES: usize = 1024;
/// Pages taken from one scan, some 35 us: each call that protects interrupts the
/// processors on which the writer runs.
pub(super) const SCAN_PAGES: u64 = 1024;
/// Pages that are protected in the time that one is copied and compared in.
const PROTECTED_PER_PAGE: u64 = 16;
/// Clean pages that cost a scan as much as one copied page costs a capture.
const SCANNED_PER_PAGE: u64 = SCAN_SPAN / PAGE_SIZE / CAPTURE_STEP_PAGES;
/// Pages that arming one span counts for.
const ARM_COST: u64 = 64;
/// Bytes of a huge page.
const HUGE_SPAN: u64 = 2 * MIB;
/// Runs kept in a plain list before they are merged into the set.
const RUNS_AT_ONCE: usize = 8192;

/// What a capture found.
#[derive(Debug)]
pub struct Captured {
    /// What changed, byte-exact until there is too much of it.
    pub extents: ExtentSet,
    /// Pages reported or marked as written; in comparisons, pages that differ.
    pub dirty_pages: u64,
    /// Bytes of all extents before any degrading.
    pub changed_bytes: u64,
    /// Pages looked at.
    pub scanned_pages: u64,
}

/// Where a capture stands after a step.
#[derive(Debug)]
pub enum Step {
    /// More is to be done.
    More,
    /// A page could not be put aside for an open update. Nothing is lost; go on
    /// later, with [`WhenFull::Abort`] if it cannot wait.
    NoRoom,
    /// The twin is the new content.
    Done(Captured),
    /// Tracking was lost: start [`Capture::full`].
    Lost(TrackError),
}

/// One capture in progress, advanced in bounded steps.
///
/// Memory: 16 bytes for each changed run up to the bound of [`ExtentSet`], then
/// one bit per page, both in the twin; some thousand work items.
#[derive(Debug)]
pub struct Capture {
    marks: VecDeque<Range<u64>>,
    work: VecDeque<Range<u64>>,
    phase: Phase,
    /// Of what cut this is, in mode `sync`.
    cut: Option<Cutting>,
    /// The region's size at the last capture, if it has grown since: what lies behind it
    /// was never armed.
    grown_from: Option<u64>,
    buffer: Box<[u8; BATCH]>,
    /// Data of the file as it was found last: to find its end costs time for each page.
    data: Range<u64>,
    scratch: Vec<Range<u64>>,
    /// Found in this step, ascending; noted in the twin when it ends.
    runs: Vec<Range<u64>>,
    dirty_pages: u64,
    changed_bytes: u64,
    scanned_pages: u64,
}

#[derive(Debug)]
enum Phase {
    /// One writer's mapping after the other, of as many as there were at its start.
    Scan {
        of: usize,
        count: usize,
        at: u64,
    },
    /// The pages of a cut, from this one on.
    Cut {
        page: u64,
    },
    Compare(Walk),
    Finished,
}

/// A comparison's place in the region.
#[derive(Debug)]
struct Walk {
    at: u64,
    /// Protected up to here, if it protects at all.
    armed: Option<u64>,
    /// The data run that `at` lies in or before; empty: to be asked for.
    data: Range<u64>,
}

impl Walk {
    /// The same over what lies behind `from`, a page's begin, which is to be armed.
    fn behind(from: u64) -> Self {
        Self {
            at: from,
            armed: Some(from),
            data: 0..0,
        }
    }
}

/// What one step works with.
struct Turn<'a> {
    tracker: &'a mut Tracker,
    source: &'a Source,
    twin: &'a mut Twin,
    pre: &'a mut PreImages,
    when_full: WhenFull,
    left: u64,
}

enum Stop {
    NoRoom,
    Lost(TrackError),
}

impl From<NoRoom> for Stop {
    fn from(_: NoRoom) -> Self {
        Self::NoRoom
    }
}

impl From<TrackError> for Stop {
    fn from(error: TrackError) -> Self {
        Self::Lost(error)
    }
}

impl Capture {
    /// A capture of what was written or marked since the last one. `marks` are
    /// shipped as they are, whether or not their bytes changed; what lies beyond
    /// the region is ignored.
    pub fn dirty(tracker: &Tracker, mut marks: Vec<Range<u64>>) -> Self {
        let phase = match tracker {
            Tracker::Async { attachments, .. } if !attachments.is_empty() => Phase::Scan {
                of: 0,
                count: attachments.len(),
                at: 0,
            },
            // What is written is found by cuts, and marks would show what came after.
            // And where nobody writes nothing is.
            Tracker::Async { .. } | Tracker::Manual { .. } | Tracker::Sync { .. } => {
                Phase::Finished
            }
            Tracker::Compare { .. } => Phase::Compare(Walk::new(false)),
        };
        marks.retain(|mark| !mark.is_empty());
        marks.sort_unstable_by_key(|mark| mark.start);
        marks.dedup_by(|next, last| {
            let joins = next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
        Self::new(phase, marks.into())
    }

    /// A capture that trusts nothing: it protects everything again, where the tracker
    /// protects, and compares all data of the file, and what the twin holds outside
    /// of it, with the twin.
    pub fn full() -> Self {
        Self::new(Phase::Compare(Walk::new(true)), VecDeque::new())
    }

    /// The region has grown since the last capture, from `size` bytes: in mode `async`
    /// what lies behind is armed and compared instead of scanned.
    pub fn grown_from(mut self, size: u64) -> Self {
        self.grown_from = Some(size);
        self
    }

    fn new(phase: Phase, marks: VecDeque<Range<u64>>) -> Self {
        Self {
            marks,
            work: VecDeque::new(),
            phase,
            cut: None,
            grown_from: None,
            buffer: Box::new([0; BATCH]),
            data: 0..0,
            scratch: Vec::new(),
            runs: Vec::new(),
            dirty_pages: 0,
            changed_bytes: 0,
            scanned_pages: 0,
        }
    }

    /// Goes on for at most [`CAPTURE_STEP_PAGES`] pages.
    pub fn step(
        &mut self,
        tracker: &mut Tracker,
        source: &Source,
        twin: &mut Twin,
        pre: &mut PreImages,
        when_full: WhenFull,
    ) -> Step {
        let mut turn = Turn {
            tracker,
            source,
            twin,
            pre,
            when_full,
            left: CAPTURE_STEP_PAGES,
        };
        let result = self.advance(&mut turn);
        self.note(turn.twin);
        match result {
            Ok(false) => Step::More,
            Ok(true) => Step::Done(Captured {
                extents: twin.take_changed(),
                dirty_pages: self.dirty_pages,
                changed_bytes: self.changed_bytes,
                scanned_pages: self.scanned_pages,
            }),
            Err(Stop::NoRoom) => Step::NoRoom,
            Err(Stop::Lost(error)) => Step::Lost(error),
        }
    }

    /// Bytes of the runs found so far.
    pub fn changed_bytes(&self) -> u64 {
        self.changed_bytes
    }

    /// Below this offset the twin does not change again, nor what it notes as changed,
    /// unless the capture is lost.
    pub fn settled(&self, size: u64) -> u64 {
        let next = match &self.phase {
            // Pages that were saved are taken before those that come first.
            _ if self.cut.is_some() => 0,
            Phase::Cut { page } => page * PAGE_SIZE,
            Phase::Scan { of, count, at } if of + 1 == *count => *at,
            // The next writer may have stored anywhere.
            Phase::Scan { .. } => 0,
            Phase::Compare(walk) => walk.at,
            Phase::Finished => size,
        };
        let work = self.work.front().map_or(next, |work| work.start.min(next));
        let mark = match (self.marks.front(), &self.phase) {
            (None, _) => size,
            (Some(mark), Phase::Finished) => mark.start,
            // Pages are looked at once more after the marks.
            (Some(_), _) => 0,
        };
        work.min(mark).min(size)
    }

    fn advance(&mut self, turn: &mut Turn<'_>) -> Result<bool, Stop> {
        self.check_cut()?;
        while turn.left > 0 {
            if self.take_saved(turn)? {
                continue;
            }
            if let Some(mark) = self.marks.pop_front() {
                self.take_mark(turn, mark)?;
            } else if let Some(range) = self.work.pop_front() {
                self.take_work(turn, range)?;
            } else {
                match self.phase {
                    Phase::Scan { of, count, at } => self.scan(turn, of, count, at)?,
                    Phase::Cut { page } => self.take_cut_pages(turn, page)?,
                    Phase::Compare(_) => {
                        self.compare(turn)?;
                        self.note_walked();
                    }
                    Phase::Finished => {
                        self.end_cut()?;
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Ships up to a batch of a marked range as it is, and puts the rest back.
    fn take_mark(&mut self, turn: &mut Turn<'_>, mark: Range<u64>) -> Result<(), Stop> {
        let end = mark.end.min(turn.twin.size());
        let mut at = mark.start;
        if at >= end {
            return Ok(());
        }
        let page = page_of(at);
        let stop = end.min((page + 1) * PAGE_SIZE);
        let piece = &mut self.buffer[..(stop - at) as usize];
        // Only a page that the twin knows is known not to be a hole.
        if turn.twin.touched().contains(page) {
            turn.source.copy(at, piece)?;
        } else {
            turn.source.read(at, piece)?;
        }
        let within = (at % PAGE_SIZE) as usize;
        let old = turn.twin.page(page);
        if old[within..within + piece.len()] != *piece {
            if let Err(full) = turn.pre.before_change(page, old, turn.when_full) {
                self.marks.push_front(mark);
                return Err(full.into());
            }
            turn.twin.write(at, piece);
        }
        let piece_len = stop - at;
        self.found(at..stop, turn.twin);
        self.changed_bytes += piece_len;
        self.dirty_pages += 1;
        self.scanned_pages += 1;
        turn.left -= 1;
        at = stop;
        if at < end {
            self.marks.push_front(at..end);
        }
        Ok(())
    }

    /// Captures written pages until the turn is over, and puts the rest back.
    fn take_work(&mut self, turn: &mut Turn<'_>, range: Range<u64>) -> Result<(), Stop> {
        let mut at = range.start;
        let mut result = Ok(());
        while at < range.end && turn.left > 0 && result.is_ok() {
            let end = range.end.min(at + PAGE_SIZE);
            let next = if end < range.end {
                Some(end)
            } else {
                self.work.front().map(|range| range.start)
            };
            match self.take_page(turn, at..end, next) {
                Ok(changed) => {
                    let news = turn.tracker.note_compared(page_of(at), changed);
                    turn.left -= 1;
                    self.dirty_pages += u64::from(news);
                    at = end;
                }
                Err(stop) => result = Err(stop),
            }
        }
        if at < range.end {
            self.work.push_front(at..range.end);
        }
        result
    }

    /// Captures one page, and says whether it had changed; the one at `next` is the next.
    fn take_page(
        &mut self,
        turn: &mut Turn<'_>,
        bytes: Range<u64>,
        next: Option<u64>,
    ) -> Result<bool, Stop> {
        let ahead = next.map(|offset| Ahead {
            offset,
            old: turn.twin.page(page_of(offset)),
        });
        let old = turn.twin.page(page_of(bytes.start));
        let new = &mut self.buffer[..(bytes.end - bytes.start) as usize];
        let blocks = turn.source.copy_changed(bytes.start, new, old, ahead)?;
        Ok(self.absorb_page(turn, bytes, 0, blocks)?)
    }

    fn slot(&mut self, bytes: Range<u64>) -> &mut [u8] {
        &mut self.buffer[..(bytes.end - bytes.start) as usize]
    }

    /// Moves the buffer, which holds `bytes` of the region, into the twin page by page.
    fn absorb(&mut self, turn: &mut Turn<'_>, bytes: Range<u64>) -> (Absorbed, Result<(), Stop>) {
        let mut done = Absorbed {
            stop: bytes.start,
            changed: 0,
        };
        while done.stop < bytes.end {
            let end = bytes.end.min(done.stop + PAGE_SIZE);
            let place = (done.stop - bytes.start) as usize;
            let new = &self.buffer[place..place + (end - done.stop) as usize];
            let blocks = changed_blocks(turn.twin.page(page_of(done.stop)), new);
            match self.absorb_page(turn, done.stop..end, place, blocks) {
                Ok(changed) => done.changed += u64::from(changed),
                Err(full) => return (done, Err(full.into())),
            }
            turn.left = turn.left.saturating_sub(1);
            done.stop = end;
        }
        (done, Ok(()))
    }

    /// Moves the changed `blocks` of a page, which stands at `place` in the buffer, into
    /// the twin; whether anything had changed.
    fn absorb_page(
        &mut self,
        turn: &mut Turn<'_>,
        bytes: Range<u64>,
        place: usize,
        blocks: u64,
    ) -> Result<bool, NoRoom> {
        if blocks == 0 {
            return Ok(false);
        }
        let (page, at) = (page_of(bytes.start), bytes.start);
        let new = &self.buffer[place..place + (bytes.end - at) as usize];
        let old = turn.twin.page(page);
        self.scratch.clear();
        diff_blocks(old, new, blocks, at, DIFF_GAP, &mut self.scratch);
        turn.pre.before_change(page, old, turn.when_full)?;
        for run in &self.scratch {
            let from = place + (run.start - at) as usize;
            let to = place + (run.end - at) as usize;
            turn.twin.write(run.start, &self.buffer[from..to]);
            self.changed_bytes += run.end - run.start;
        }
        for index in 0..self.scratch.len() {
            self.found(self.scratch[index].clone(), turn.twin);
        }
        Ok(true)
    }

    fn found(&mut self, run: Range<u64>, twin: &mut Twin) {
        match self.runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            Some(last) if last.end > run.start => {
                // Scanned pages after marks: a new ascending list.
                self.note(twin);
                self.runs.push(run);
            }
            _ => self.runs.push(run),
        }
        if self.runs.len() >= RUNS_AT_ONCE {
            self.note(twin);
        }
    }

    /// Moves the list of runs to where no failure can lose it.
    fn note(&mut self, twin: &mut Twin) {
        twin.note_changed(&self.runs);
        self.runs.clear();
    }

    /// Compares the next piece of the region with the twin.
    fn compare(&mut self, turn: &mut Turn<'_>) -> Result<(), Stop> {
        let Phase::Compare(walk) = &mut self.phase else {
            return Ok(());
        };
        let size = turn.twin.size();
        if walk.at >= size {
            self.phase = Phase::Finished;
            return Ok(());
        }
        let limit = walk.arm(turn)?.min(size);
        let at = walk.at;
        if walk.data.end <= at {
            // Nothing behind is data: the hole goes on to the limit.
            let data = turn.source.next_data(at)?.unwrap_or(limit..limit);
            walk.data = data.start / PAGE_SIZE * PAGE_SIZE..data.end.max(data.start + 1);
            walk.data.start = walk.data.start.clamp(at, limit);
            // A run that begins before the limit is known to its end, wherever that is.
            let most = if walk.data.start < limit { size } else { limit };
            walk.data.end = walk.data.end.clamp(walk.data.start, most);
            turn.twin.advise_huge(walk.data.clone());
            turn.left -= 1;
        }
        if at < walk.data.start {
            return self.compare_hole(turn, at);
        }
        if walk.data.is_empty() {
            return Ok(());
        }
        let batch = (BATCH as u64).min(turn.left.max(1) * PAGE_SIZE);
        let data_end = (pages_for(walk.data.end) * PAGE_SIZE).min(limit);
        let end = data_end.min(at + batch);
        turn.source.read(at, self.slot(at..end))?;
        self.patch(turn.twin, at..end);
        self.compare_with(turn, at..end)
    }

    /// Looks for pages that the twin still holds in a hole that begins at `at`.
    fn compare_hole(&mut self, turn: &mut Turn<'_>, at: u64) -> Result<(), Stop> {
        let Phase::Compare(walk) = &mut self.phase else {
            return Ok(());
        };
        let hole_end = walk.data.start;
        // No look beyond this piece: a large hole comes in many of them.
        let pages = page_of(at)..pages_for(hole_end);
        match turn.twin.touched().next_in(pages) {
            Some(page) => {
                let start = (page * PAGE_SIZE).max(at);
                let end = (start + PAGE_SIZE).min(hole_end);
                self.slot(start..end).fill(0);
                self.compare_with(turn, start..end)
            }
            None => {
                self.scanned_pages += pages_for(hole_end - at);
                walk.at = hole_end;
                Ok(())
            }
        }
    }

    /// Absorbs the buffer and moves the walk behind what was absorbed.
    fn compare_with(&mut self, turn: &mut Turn<'_>, bytes: Range<u64>) -> Result<(), Stop> {
        let (done, result) = self.absorb(turn, bytes.clone());
        self.dirty_pages += done.changed;
        self.scanned_pages += pages_for(done.stop - bytes.start);
        self.settle(bytes.start..done.stop);
        if let Phase::Compare(walk) = &mut self.phase {
            walk.at = done.stop;
        }
        result
    }
}

/// Asks for huge pages of the twin where written pages begin to fill a span that is
/// wholly data. `data` is the run of data that was found last.
fn advise_huge(
    turn: &Turn<'_>,
    data: &mut Range<u64>,
    written: Range<u64>,
) -> Result<(), TrackError> {
    let mut start = written.start / HUGE_SPAN * HUGE_SPAN;
    while start < written.end {
        let end = start + HUGE_SPAN;
        let touched = turn.twin.touched().next_in(page_of(start)..page_of(end));
        if end <= turn.twin.size() && touched.is_none() {
            if start < data.start || data.end < end {
                *data = turn.source.next_data(start)?.unwrap_or(0..0);
            }
            if data.start <= start && end <= data.end {
                turn.twin.advise_huge(start..end);
            }
        }
        start = end;
    }
    Ok(())
}

/// How far a batch went into the twin.
struct Absorbed {
    /// Everything below is in the twin.
    stop: u64,
    /// Pages that differed.
    changed: u64,
}

impl Walk {
    fn new(arms: bool) -> Self {
        Self {
            at: 0,
            armed: arms.then_some(0),
            data: 0..0,
        }
    }

    /// Protects on, if the walk has come to the end of what is protected; up to where
    /// it may go.
    fn arm(&mut self, turn: &mut Turn<'_>) -> Result<u64, TrackError> {
        let armable = turn.tracker.armable();
        let (Some(armed), Some(first)) = (self.armed, armable.first()) else {
            self.armed = None;
            return Ok(u64::MAX);
        };
        if armed > self.at {
            return Ok(armed);
        }
        let end = first.len.min(page_align_up(turn.twin.size()));
        let len = ARM_SPAN.min(end.saturating_sub(armed));
        let mut living = 0;
        for attachment in armable {
            match attachment.arm_range(armed, len) {
                Ok(()) => living += 1,
                // Who has exited writes no more: comparing is all that is left to do.
                Err(TrackError::WriterExited) => {}
                Err(error) => return Err(error),
            }
        }
        if living == 0 {
            self.armed = None;
            return Ok(u64::MAX);
        }
        // What was a hole may have become data before it was protected; data stays
        // data, and to find its end again costs time for each page of it.
        if !self.data.contains(&self.at) {
            self.data = 0..0;
        }
        self.armed = Some(armed + len);
        turn.tracker
            .forget_heat(page_of(armed)..pages_for(armed + len));
        turn.left = turn.left.saturating_sub(living * ARM_COST).max(1);
        Ok(armed + len)
    }
}
