//! The capture of a cut: what the fault thread saved in time, and the region itself for
//! all other pages.
//!
//! A page is copied first and its word looked at after that: unless it says that the
//! page was saved, the copy is the content at the cut. So nothing is claimed before it
//! is in the twin, and a page that finds no room for pre-images is simply copied again.

use std::ops::Range;
use std::sync::Arc;

use super::{BATCH, Capture, PAGE, Phase, Stop, Turn, Walk};
use crate::track::exact::{Board, Cut, PageSet};
use crate::track::{TrackError, Twin};
use crate::units::{PAGE_SIZE, page_of, pages_for};

/// A cut that is being captured.
#[derive(Debug)]
pub(super) struct Cutting {
    board: Arc<Board>,
    cut: Cut,
    /// Pages taken from their slots before the walk over everything came to them.
    taken: PageSet,
    /// A saved page that found no room.
    waiting: Option<(u64, u32)>,
}

impl Capture {
    /// A capture of a cut that was made: of the pages written before it, or of all.
    ///
    /// # Errors
    /// [`TrackError::Memory`] if there is no room for its tables.
    pub fn cut(board: Arc<Board>, cut: Cut) -> Result<Self, TrackError> {
        let phase = if cut.all {
            Phase::Compare(Walk::new(false))
        } else {
            Phase::Cut { page: 0 }
        };
        let taken = PageSet::new(if cut.all { board.pages() } else { 0 })?;
        let mut capture = Self::new(phase, Default::default());
        capture.cut = Some(Cutting {
            board,
            cut,
            taken,
            waiting: None,
        });
        Ok(capture)
    }

    /// Whether what is captured is a cut that the fault thread made.
    pub fn is_of_cut(&self) -> bool {
        self.cut.is_some()
    }

    /// Gives a cut up: nothing is saved for it any more.
    pub fn abandon(&mut self) {
        if let Some(cutting) = self.cut.take() {
            cutting.board.finish(cutting.cut.number);
        }
    }

    /// Whether what was copied so far is of the cut.
    pub(super) fn check_cut(&self) -> Result<(), Stop> {
        let Some(cutting) = &self.cut else {
            return Ok(());
        };
        if cutting.board.is_void(cutting.cut.number) {
            return Err(TrackError::Void.into());
        }
        match cutting.board.lost() {
            Some(lost) => Err(TrackError::Exact(lost).into()),
            None => Ok(()),
        }
    }

    /// Takes one page out of its slot, so that the slots come back soon; false if none
    /// waits.
    pub(super) fn take_saved(&mut self, turn: &mut Turn<'_>) -> Result<bool, Stop> {
        let Some(cutting) = &mut self.cut else {
            return Ok(false);
        };
        let board = Arc::clone(&cutting.board);
        let next = cutting.waiting.take().or_else(|| board.next_saved());
        let Some((page, slot)) = next else {
            return Ok(false);
        };
        let start = page * PAGE_SIZE;
        let is_behind = matches!(&self.phase, Phase::Compare(walk) if start < walk.at);
        if is_behind || matches!(self.phase, Phase::Finished) {
            board.release(page, slot);
            return Ok(true);
        }
        if start >= turn.twin.size() {
            // Stored to behind the end that was told when the cut was made.
            board.release(page, slot);
            return Ok(true);
        }
        let end = turn.twin.size().min(start + PAGE_SIZE);
        board.read_slot(slot, &mut self.buffer[..(end - start) as usize]);
        if let (_, Err(stop)) = self.absorb(turn, start..end) {
            if let Some(cutting) = &mut self.cut {
                cutting.waiting = Some((page, slot));
            }
            return Err(stop);
        }
        board.release(page, slot);
        if let Some(cutting) = &self.cut {
            if cutting.cut.all {
                cutting.taken.insert(page);
            } else {
                board.set(cutting.cut.number).remove(page..page + 1);
                self.dirty_pages += 1;
            }
        }
        // Runs have to rise: what the walk finds next may lie before this page.
        self.note(turn.twin);
        Ok(true)
    }

    /// Captures the next pages of the cut, up to a batch.
    pub(super) fn take_cut_pages(&mut self, turn: &mut Turn<'_>, from: u64) -> Result<(), Stop> {
        let Some(cutting) = &self.cut else {
            return Err(TrackError::Incomplete.into());
        };
        let size = turn.twin.size();
        let Some(run) = cutting.board.set(cutting.cut.number).next_run(from) else {
            self.phase = Phase::Finished;
            return Ok(());
        };
        if run.start >= pages_for(size) {
            self.phase = Phase::Finished;
            return Ok(());
        }
        let most = ((BATCH / PAGE) as u64).min(turn.left);
        let pages = run.start..run.end.min(run.start + most).min(pages_for(size));
        let bytes = pages.start * PAGE_SIZE..(pages.end * PAGE_SIZE).min(size);
        // A page that was opened but not stored to may be a hole.
        let is_data = pages.clone().all(|page| turn.twin.touched().contains(page));
        if is_data {
            turn.source.copy(bytes.start, self.slot(bytes.clone()))?;
        } else {
            turn.source.read(bytes.start, self.slot(bytes.clone()))?;
        }
        self.patch(turn.twin, bytes.clone());
        let (done, result) = self.absorb(turn, bytes.clone());
        self.settle(bytes.start..done.stop);
        let captured = pages_for(done.stop - bytes.start);
        if let Some(cutting) = &self.cut {
            // What is left in the set is what is left to do, also for whoever ends it.
            let set = cutting.board.set(cutting.cut.number);
            set.remove(pages.start..pages.start + captured);
        }
        self.dirty_pages += captured;
        self.scanned_pages += captured;
        self.phase = Phase::Cut {
            page: pages.start + captured,
        };
        result
    }

    /// Puts what was saved in the place of what was copied of the live `bytes`.
    pub(super) fn patch(&mut self, twin: &Twin, bytes: Range<u64>) {
        let Some(cutting) = &self.cut else {
            return;
        };
        for page in page_of(bytes.start)..pages_for(bytes.end) {
            let place = (page * PAGE_SIZE - bytes.start) as usize;
            let end = bytes.end.min((page + 1) * PAGE_SIZE) - bytes.start;
            let target = &mut self.buffer[place..end as usize];
            if cutting.taken.contains(page) {
                target.copy_from_slice(twin.page(page));
            } else if let Some(slot) = cutting.board.word(page).saved() {
                cutting.board.read_slot(slot, target);
            }
        }
    }

    /// The twin has `bytes`: nothing is to be saved for them any more.
    pub(super) fn settle(&self, bytes: Range<u64>) {
        if let Some(cutting) = &self.cut {
            for page in page_of(bytes.start)..pages_for(bytes.end) {
                cutting.board.settle(page);
            }
        }
    }

    /// Tells the fault thread how far a walk over everything has come.
    pub(super) fn note_walked(&self) {
        if let (Some(cutting), Phase::Compare(walk)) = (&self.cut, &self.phase) {
            cutting.board.walked(page_of(walk.at));
        }
    }

    /// The last word on a cut: whether all that was copied is of it.
    pub(super) fn end_cut(&mut self) -> Result<(), Stop> {
        self.check_cut()?;
        if let Some(cutting) = &self.cut {
            cutting.board.finish(cutting.cut.number);
        }
        Ok(())
    }
}
