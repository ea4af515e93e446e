//! Which pages of an `async` region are hot: written in so many captures in a row that
//! arming them again costs the writer a fault each time and tells nothing new.
//!
//! ```text
//!          reported in `after` captures in a row
//!   cold ------------------------------------------> hot
//!    ^   armed at each capture                        |  left open, compared at each capture
//!    |                                                |
//!    +------------------------------------------------+
//!          equal to the twin at COOL captures in a row: armed again, then copied
//! ```
//!
//! - I1: a page that is hot is not armed, so each scan reports it, and a capture
//!   compares each page that was reported: no store to a hot page is lost.
//! - I2: a page that turns cold is armed before it is copied, in the same capture.
//! - I3: whoever arms pages by other means calls [`Heat::forget`]: what is armed is not hot.
//!
//! Whether a page is hot is a matter of cost alone. The captures in between are counted
//! modulo 256, so a page written every 257th time counts as one written each time.

use std::ops::Range;

use crate::bitmap::Bitmap;
use crate::units::{MIB, PAGE_SIZE};

/// Captures in a row that find a hot page equal to the twin before it is armed again.
pub(super) const COOL: u8 = 2;
/// Pages of a span, the unit in which hot pages are collected: 2 MiB.
pub(super) const SPAN_PAGES: u64 = 2 * MIB / PAGE_SIZE;
/// Set in a cell's upper half: the page is hot, and the rest counts idle captures.
const HOT: u8 = 0x80;
/// Greatest count of a cell.
const MOST: u8 = HOT - 1;

/// The heat of a region's pages.
///
/// Memory: 8 bytes for each 2 MiB of the region, and 1 KiB for each 2 MiB in which
/// anything was reported.
#[derive(Debug)]
pub struct Heat {
    spans: Vec<Option<Box<Span>>>,
    /// Spans with hot pages.
    hot_spans: Bitmap,
    hot: u64,
    after: u64,
    never: bool,
    /// The present capture, modulo 256.
    capture: u8,
}

#[derive(Debug)]
struct Span {
    /// For each page: when it was reported last, and in how many captures in a row.
    cells: [Cell; SPAN_PAGES as usize],
    hot: u16,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    capture: u8,
    /// Captures in a row, or [`HOT`] and idle captures in a row.
    count: u8,
}

impl Heat {
    /// No page of `pages` is hot. A page becomes hot when it is reported in `after`
    /// captures in a row; never if `after` is 0.
    pub fn new(pages: u64, after: u64) -> Self {
        let spans = pages.div_ceil(SPAN_PAGES);
        Self {
            spans: (0..spans).map(|_| None).collect(),
            hot_spans: Bitmap::new(spans),
            hot: 0,
            after,
            never: false,
            capture: 0,
        }
    }

    /// Hot pages.
    pub fn pages(&self) -> u64 {
        self.hot
    }

    /// Captures in a row after which a page is hot; 0 if none ever is.
    pub fn after(&self) -> u64 {
        self.after
    }

    /// Another number of captures from now on; with 0 all pages turn cold at the next.
    pub fn set_after(&mut self, after: u64) {
        self.after = if self.never { 0 } else { after };
    }

    /// No page ever gets hot: of a mapping of huge pages, in which no small one can be
    /// armed alone.
    pub(super) fn never(&mut self) {
        (self.never, self.after) = (true, 0);
    }

    /// A capture begins.
    pub(super) fn begin(&mut self) {
        self.capture = self.capture.wrapping_add(1);
    }

    /// The first page of the first span with hot pages from the span of `page` on.
    pub(super) fn next_hot_span(&self, page: u64) -> Option<u64> {
        Some(self.hot_spans.next(page / SPAN_PAGES)? * SPAN_PAGES)
    }

    /// The page behind the spans with hot pages that begin with that of `page`.
    pub(super) fn hot_spans_end(&self, page: u64) -> u64 {
        let run = self.hot_spans.next_run(page / SPAN_PAGES);
        run.map_or(page, |run| run.end * SPAN_PAGES)
    }

    /// Whether `page` is left open.
    pub fn is_hot(&self, page: u64) -> bool {
        let span = self.spans.get((page / SPAN_PAGES) as usize);
        span.and_then(Option::as_ref)
            .is_some_and(|span| span.cells[(page % SPAN_PAGES) as usize].count & HOT != 0)
    }

    /// A scan reported `page`; whether it is to be open after this capture. Asked again
    /// within one capture the answer is the same.
    pub(super) fn reported(&mut self, page: u64) -> bool {
        let index = (page / SPAN_PAGES) as usize;
        if self.after == 0 && !self.hot_spans.contains(index as u64) {
            return false;
        }
        let Some(place) = self.spans.get_mut(index) else {
            return false;
        };
        let span = place.get_or_insert_with(|| {
            Box::new(Span {
                cells: [Cell::default(); SPAN_PAGES as usize],
                hot: 0,
            })
        });
        let cell = &mut span.cells[(page % SPAN_PAGES) as usize];
        if cell.count & HOT != 0 {
            let stays = self.after > 0 && cell.count & !HOT < COOL;
            cell.capture = self.capture;
            if !stays {
                cell.count = 0;
                self.cooled(index, 1);
            }
            return stays;
        }
        if cell.count > 0 && cell.capture == self.capture {
            return false;
        }
        let in_a_row = cell.count > 0 && cell.capture == self.capture.wrapping_sub(1);
        cell.capture = self.capture;
        cell.count = if in_a_row {
            cell.count.saturating_add(1).min(MOST)
        } else {
            1
        };
        if u64::from(cell.count) < self.after || self.after == 0 {
            return false;
        }
        cell.count = HOT;
        span.hot += 1;
        self.hot += 1;
        self.hot_spans.insert(index as u64);
        true
    }

    /// A page that was reported was compared with the twin; whether it was hot.
    pub(super) fn compared(&mut self, page: u64, changed: bool) -> bool {
        let span = self.spans.get_mut((page / SPAN_PAGES) as usize);
        let Some(span) = span.and_then(Option::as_mut) else {
            return false;
        };
        let cell = &mut span.cells[(page % SPAN_PAGES) as usize];
        if cell.count & HOT == 0 {
            return false;
        }
        let idle = cell.count & !HOT;
        cell.count = HOT | if changed { 0 } else { (idle + 1).min(MOST) };
        true
    }

    /// `pages` are armed, or not tracked any more: none of them is hot.
    pub(super) fn forget(&mut self, pages: Range<u64>) {
        let mut at = pages.start;
        while at < pages.end {
            let Some(index) = self.hot_spans.next(at / SPAN_PAGES) else {
                return;
            };
            at = at.max(index * SPAN_PAGES);
            let end = pages.end.min((index + 1) * SPAN_PAGES);
            let mut cooled = 0;
            if let Some(span) = self.spans[index as usize].as_mut() {
                for page in at..end.max(at) {
                    let cell = &mut span.cells[(page % SPAN_PAGES) as usize];
                    cooled += u16::from(cell.count & HOT != 0);
                    *cell = Cell::default();
                }
            }
            if cooled > 0 {
                self.cooled(index as usize, cooled);
            }
            at = (index + 1) * SPAN_PAGES;
        }
    }

    fn cooled(&mut self, index: usize, pages: u16) {
        self.hot -= u64::from(pages);
        if let Some(span) = self.spans[index].as_mut() {
            span.hot -= pages;
            if span.hot == 0 {
                self.hot_spans.remove(index as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_get_hot_in_a_row_only_and_cool_when_nothing_changes() {
        let mut heat = Heat::new(3 * SPAN_PAGES, 3);
        let page = SPAN_PAGES + 7;
        for (round, reported) in [true, true, false, true, true, true]
            .into_iter()
            .enumerate()
        {
            heat.begin();
            let hot = reported && heat.reported(page);
            assert_eq!(hot, round == 5, "round {round}");
            assert_eq!(reported && heat.reported(page), hot, "asked twice");
        }
        assert_eq!((heat.pages(), heat.next_hot_span(0)), (1, Some(SPAN_PAGES)));
        for changed in [false, true, false] {
            heat.begin();
            assert!(heat.reported(page) && heat.compared(page, changed));
        }
        heat.begin();
        assert!(heat.reported(page) && heat.compared(page, false));
        heat.begin();
        assert!(!heat.reported(page), "equal twice in a row: armed");
        assert!(!heat.compared(page, true) && !heat.is_hot(page));
        assert_eq!((heat.pages(), heat.next_hot_span(0)), (0, None));
    }

    #[test]
    fn switched_off_nothing_is_hot_and_what_was_turns_cold() {
        let mut heat = Heat::new(10, 1);
        heat.begin();
        assert!(heat.reported(3) && heat.reported(4));
        heat.set_after(0);
        heat.begin();
        assert!(!heat.reported(3) && !heat.reported(5));
        assert_eq!(heat.pages(), 1);
        heat.forget(0..10);
        assert_eq!((heat.pages(), heat.is_hot(4)), (0, false));
        let mut off = Heat::new(u64::from(u32::MAX), 0);
        off.begin();
        assert!(!off.reported(1 << 31));
    }

    #[test]
    fn forgetting_goes_page_by_page_over_spans() {
        let mut heat = Heat::new(4 * SPAN_PAGES, 1);
        heat.begin();
        for page in [0, SPAN_PAGES - 1, SPAN_PAGES, 3 * SPAN_PAGES] {
            assert!(heat.reported(page));
        }
        heat.forget(1..SPAN_PAGES + 1);
        assert!(heat.is_hot(0) && heat.is_hot(3 * SPAN_PAGES));
        assert!(!heat.is_hot(SPAN_PAGES - 1) && !heat.is_hot(SPAN_PAGES));
        assert_eq!(heat.pages(), 2);
        assert_eq!(heat.next_hot_span(1), Some(0));
        assert_eq!(heat.next_hot_span(SPAN_PAGES), Some(3 * SPAN_PAGES));
        assert_eq!(heat.hot_spans_end(7), SPAN_PAGES);
    }
}
