//! Collecting what was written in mode `async`: scans that protect, and around hot pages
//! scans that do not.
//!
//! ```text
//! spans of 2 MiB   | no hot page ....... | hot pages ........ | none ...
//! 1  scan          | and protect         | and leave          | and protect
//! 2  then protect  |                     | each reported cold run, or, if that is fewer
//!                  |                     | calls, scan and protect between the hot pages
//! 3  copy, compare   all that was reported, hot pages too
//! ```
//! A page is protected by a call of its own only if the scan just before has reported it:
//! one that is written in between would be clean and not on the work list.

use std::ops::Range;

use super::{Capture, Phase, SCAN_PAGES, SCAN_RANGES, SCAN_SPAN, SCANNED_PER_PAGE, Stop, Turn};
use super::{PROTECTED_PER_PAGE, Walk, advise_huge};
use crate::sys::pagemap::Then;
use crate::track::attachment::ESRCH;
use crate::track::heat::SPAN_PAGES;
use crate::track::{Attachment, Heat, TrackError, Tracker};
use crate::units::{PAGE_SIZE, page_align_up, page_of, pages_for};

/// Bytes of a span.
const SPAN: u64 = SPAN_PAGES * PAGE_SIZE;
/// A scan that protects costs 1.1 us, protecting a run 0.8 us.
const GAP_COST: usize = 11;
const RUN_COST: usize = 8;

/// What a collection works with: one mapping and its heat.
struct Collection<'a> {
    attachment: &'a Attachment,
    heat: &'a mut Heat,
    /// Byte ranges of the region that are to be captured, ascending.
    out: &'a mut Vec<Range<u64>>,
    /// Calls that protected beside the scan.
    calls: u64,
}

impl Capture {
    /// Scans the next piece of mapping `of` of `count` and protects what is reported
    /// and not hot; all that was reported goes on the work list.
    pub(super) fn scan(
        &mut self,
        turn: &mut Turn<'_>,
        of: usize,
        count: usize,
        at: u64,
    ) -> Result<(), Stop> {
        let size = turn.twin.size();
        let Tracker::Async {
            attachments, heat, ..
        } = &mut *turn.tracker
        else {
            return Err(TrackError::Incomplete.into());
        };
        let attachment = attachments.get(of).ok_or(TrackError::Incomplete)?;
        if attachment.len < size {
            return Err(TrackError::Incomplete.into());
        }
        if of == 0 && at == 0 {
            heat.begin();
        }
        // Of a region that has grown the old part: the rest is no page's yet.
        let limit = match self.grown_from {
            Some(size) => size / PAGE_SIZE * PAGE_SIZE,
            None => attachment.len.min(page_align_up(size)),
        };
        if at >= limit {
            self.phase = Phase::Compare(Walk::behind(limit));
            return Ok(());
        }
        self.scratch.clear();
        let mut collection = Collection {
            attachment,
            heat,
            out: &mut self.scratch,
            calls: 0,
        };
        let reached = collection.piece(at, limit.min(at + SCAN_SPAN))?;
        let calls = collection.calls;
        let is_over = reached >= limit;
        // A process that has exited may scan as clean.
        let is_gone = is_over && attachment.has_exited();
        let found = self.take_found(turn)?;
        let scanned = pages_for(reached - at);
        self.scanned_pages += scanned;
        let cost = scanned / SCANNED_PER_PAGE + found / PROTECTED_PER_PAGE + calls;
        turn.left = turn.left.saturating_sub(cost);
        self.phase = Phase::Scan {
            of,
            count,
            at: reached,
        };
        if is_gone {
            return Err(TrackError::WriterExited.into());
        }
        if is_over {
            // Only a region with one writer grows.
            self.phase = match (of + 1, self.grown_from) {
                (next, _) if next < count => Phase::Scan {
                    of: next,
                    count,
                    at: 0,
                },
                (_, Some(_)) => Phase::Compare(Walk::behind(limit)),
                (_, None) => Phase::Finished,
            };
        }
        Ok(())
    }
}

impl Capture {
    /// Puts what a scan reported on the work list, and says how many pages that is.
    fn take_found(&mut self, turn: &mut Turn<'_>) -> Result<u64, Stop> {
        let size = turn.twin.size();
        let mut found = 0;
        for index in 0..self.scratch.len() {
            let range = self.scratch[index].clone();
            let (start, stop) = (range.start, range.end.min(size));
            if start < stop {
                advise_huge(turn, &mut self.data, start..stop)?;
                found += pages_for(stop - start);
                self.work.push_back(start..stop);
            }
        }
        Ok(found)
    }
}

impl Collection<'_> {
    /// Collects from `at` on, up to where one scan goes: `end` at most.
    fn piece(&mut self, at: u64, end: u64) -> Result<u64, TrackError> {
        match self.heat.next_hot_span(page_of(at)) {
            Some(page) if page * PAGE_SIZE <= at => {
                let end = end.min(self.heat.hot_spans_end(page_of(at)) * PAGE_SIZE);
                let reached = self.ask(at..end, Then::Leave)?;
                let reported = std::mem::take(self.out);
                self.protect_cold(at..reached, &reported)?;
                Ok(reached)
            }
            hot => {
                let end = hot.map_or(end, |page| end.min(page * PAGE_SIZE));
                let reached = self.ask(at..end, Then::Protect)?;
                self.count_protected(0)?;
                Ok(reached)
            }
        }
    }

    /// One scan; what it reports is appended, as offsets. Answers where it stopped.
    fn ask(&mut self, bytes: Range<u64>, then: Then) -> Result<u64, TrackError> {
        let at = bytes.start;
        let pagemap = self.attachment.pagemap.as_ref();
        let pagemap = pagemap.ok_or(TrackError::Incomplete)?;
        let base = self.attachment.base;
        let first = self.out.len();
        let (start, end) = (base + at, base + bytes.end);
        let walk_end = pagemap
            .scan_written(start, end, self.out, SCAN_RANGES, SCAN_PAGES, then)
            .map_err(|source| match source.raw_os_error() {
                Some(ESRCH) => TrackError::WriterExited,
                _ => TrackError::Scan { offset: at, source },
            })?;
        let reached = walk_end.saturating_sub(base).min(bytes.end);
        if reached <= at {
            return Err(TrackError::NoProgress { offset: at });
        }
        for range in &mut self.out[first..] {
            let start = range.start.saturating_sub(base).clamp(at, reached);
            let end = range.end.saturating_sub(base).clamp(start, reached);
            *range = start..end;
        }
        Ok(reached)
    }

    /// What was appended from `first` on is protected: what of it is hot is opened again.
    fn count_protected(&mut self, first: usize) -> Result<(), TrackError> {
        for index in first..self.out.len() {
            let range = self.out[index].clone();
            let mut open: Option<Range<u64>> = None;
            for page in page_of(range.start)..pages_for(range.end) {
                if !self.heat.reported(page) {
                    self.open_run(open.take())?;
                } else if let Some(run) = &mut open {
                    run.end = page + 1;
                } else {
                    open = Some(page..page + 1);
                }
            }
            self.open_run(open)?;
        }
        Ok(())
    }

    fn open_run(&mut self, pages: Option<Range<u64>>) -> Result<(), TrackError> {
        let Some(pages) = pages else {
            return Ok(());
        };
        self.calls += 1;
        let (offset, len) = bytes_of(&pages);
        self.attachment.open_range(offset, len)
    }

    /// Protects what of `reported`, which lies within `bytes`, is cold, span by span.
    fn protect_cold(
        &mut self,
        bytes: Range<u64>,
        reported: &[Range<u64>],
    ) -> Result<(), TrackError> {
        let mut pieces = Vec::with_capacity(reported.len());
        for range in reported {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min((start / SPAN + 1) * SPAN);
                pieces.push(start..end);
                start = end;
            }
        }
        // Where nothing was reported nothing is to be protected.
        for pieces in pieces.chunk_by(|a, b| a.start / SPAN == b.start / SPAN) {
            let start = pieces[0].start / SPAN * SPAN;
            let span = start.max(bytes.start)..(start + SPAN).min(bytes.end);
            self.protect_in(span, pieces)?;
        }
        Ok(())
    }

    /// The same for the `reported` ranges of one span.
    fn protect_in(&mut self, span: Range<u64>, reported: &[Range<u64>]) -> Result<(), TrackError> {
        let (mut cold, mut hot) = (Vec::new(), Vec::new());
        for range in reported {
            for page in page_of(range.start)..pages_for(range.end) {
                let runs = if self.heat.reported(page) {
                    &mut hot
                } else {
                    &mut cold
                };
                append(runs, page..page + 1);
            }
        }
        if cold.len() * RUN_COST <= (hot.len() + 1) * GAP_COST {
            for run in &cold {
                let (offset, len) = bytes_of(run);
                self.attachment.arm_range(offset, len)?;
            }
            self.calls += cold.len() as u64;
            self.out.extend_from_slice(reported);
            return Ok(());
        }
        let first = self.out.len();
        let mut at = span.start;
        for run in &hot {
            let (offset, len) = bytes_of(run);
            self.protect_gap(at..offset)?;
            self.out.push(offset..offset + len);
            at = offset + len;
        }
        self.protect_gap(at..span.end)?;
        debug_assert!(self.out[first..].is_sorted_by_key(|range| range.start));
        Ok(())
    }

    /// Scans and protects what lies between two hot pages.
    fn protect_gap(&mut self, gap: Range<u64>) -> Result<(), TrackError> {
        let mut at = gap.start;
        while at < gap.end {
            let first = self.out.len();
            at = self.ask(at..gap.end, Then::Protect)?;
            self.calls += 1;
            self.count_protected(first)?;
        }
        Ok(())
    }
}

/// Adds pages that lie behind all of `runs`.
fn append(runs: &mut Vec<Range<u64>>, pages: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == pages.start => last.end = pages.end,
        _ => runs.push(pages),
    }
}

/// Offset and length of pages.
fn bytes_of(pages: &Range<u64>) -> (u64, u64) {
    (
        pages.start * PAGE_SIZE,
        (pages.end - pages.start) * PAGE_SIZE,
    )
}
