//! Finding 100 dirty pages in 1 GiB, every page of which is allocated.
//!
//! "Found" is measured over the steps of [`Capture`](uffd_sync::track::Capture)
//! until a look at the page map, outside the clock, shows that nothing dirty is
//! left: all of it is on the capture's work list then, and armed again. Copying,
//! diffing and updating the twin come after; the case `capture-100-of-1GiB`
//! includes them. Page tables are as warm for each variant: a look goes before.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::ensure;
use uffd_sync::units::{GIB, PAGE_SIZE};

use crate::harness::{BareScan, Goal, Options, Outcome, Rounds, median, pages_in, scattered};
use crate::tracked::Tracked;

const BARE: &str = "find-100-of-1GiB/bare-scan";
const MEMCMP: &str = "find-100-of-1GiB/memcmp";
const CAPTURE: &str = "capture-100-of-1GiB/bare-scan";
const CLEAN: &str = "clean-scan-1GiB/bare-scan";

pub(crate) const CASES: &[&str] = &[BARE, MEMCMP, CAPTURE, CLEAN];

const PAGES: u64 = GIB / PAGE_SIZE;
const DIRTY: usize = 100;

struct Subject {
    tracked: Tracked,
    scan: BareScan,
    dirty: Vec<u64>,
    /// Times of whole captures, in microseconds, of the rounds that count.
    whole: Vec<f64>,
}

impl Subject {
    fn new() -> anyhow::Result<Self> {
        let mut dirty = scattered(PAGES);
        dirty.truncate(DIRTY);
        dirty.sort_unstable();
        Ok(Self {
            tracked: Tracked::new(PAGES)?,
            scan: BareScan::new(512)?,
            dirty,
            whole: Vec::new(),
        })
    }

    fn dirty(&self, value: u64) {
        for page in &self.dirty {
            self.tracked.memory.store(*page, value ^ page);
        }
    }

    /// One round of one variant, in microseconds.
    fn measure(&mut self, variant: usize, round: usize) -> anyhow::Result<f64> {
        let value = ((round as u64 + 1) << 40) | ((variant as u64 + 1) << 32);
        if variant < 3 {
            self.dirty(value);
        }
        let found = pages_in(self.scan.look(self.tracked.memory.span())?);
        ensure!(
            found == if variant < 3 { DIRTY as u64 } else { 0 },
            "{found} pages are dirty"
        );
        let time = match variant {
            0 => self.capture(round)?,
            1 => self.bare(value, DIRTY as u64)?,
            2 => self.memcmp()?,
            3 => self.clean()?,
            _ => self.bare(value, 0)?,
        };
        Ok(time.as_nanos() as f64 / 1e3)
    }

    fn capture(&mut self, round: usize) -> anyhow::Result<Duration> {
        let (mut until_found, mut whole) = (Duration::ZERO, Duration::ZERO);
        let mut left = true;
        // A mapping is looked at from the side while its capture goes on.
        let (scan, span) = (&mut self.scan, self.tracked.memory.span());
        let mut failed = None;
        let captured = self.tracked.capture_in_steps(|step| {
            whole += step;
            if left {
                until_found += step;
                match scan.look(span) {
                    Ok(regions) => left = !regions.is_empty(),
                    Err(error) => failed = Some(error),
                }
            }
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        ensure!(
            captured.dirty_pages == DIRTY as u64,
            "the capture missed a page"
        );
        self.tracked.verify(&self.dirty)?;
        if round > 0 {
            self.whole.push(whole.as_nanos() as f64 / 1e3);
        }
        Ok(until_found)
    }

    fn bare(&mut self, value: u64, expected: u64) -> anyhow::Result<Duration> {
        let started = Instant::now();
        let found = pages_in(self.scan.protect(self.tracked.memory.span())?);
        let time = started.elapsed();
        ensure!(found == expected, "the bare scan found {found} pages");
        if expected > 0 {
            // The twin has not seen these stores, and no scan will report them.
            self.dirty(value ^ 1);
            self.settle()?;
        }
        Ok(time)
    }

    fn memcmp(&mut self) -> anyhow::Result<Duration> {
        let (old, new) = (&self.tracked.twin[..], self.tracked.memory.as_slice());
        let started = Instant::now();
        let pages = old
            .chunks_exact(PAGE_SIZE as usize)
            .zip(new.chunks_exact(PAGE_SIZE as usize));
        let differ = black_box(pages.filter(|(old, new)| old != new).count());
        let time = started.elapsed();
        ensure!(differ == DIRTY, "{differ} pages differ");
        self.settle()?;
        Ok(time)
    }

    fn clean(&mut self) -> anyhow::Result<Duration> {
        let (captured, time) = self.tracked.capture()?;
        ensure!(
            captured.extents.is_empty() && captured.dirty_pages == 0,
            "nothing was stored"
        );
        Ok(time)
    }

    fn settle(&mut self) -> anyhow::Result<()> {
        self.tracked.capture()?;
        self.tracked.verify(&self.dirty)
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut subject = Subject::new()?;
    let rounds = Rounds::run(options, 5, |variant, round| subject.measure(variant, round))?;
    subject.tracked.verify_all()?;
    let [find, bare, memcmp, clean, bare_clean] = [0, 1, 2, 3, 4].map(|v| rounds.of(v));
    let whole = median(&subject.whole);
    Ok(vec![
        Outcome::times(
            BARE,
            "us",
            find,
            ("bare PAGEMAP_SCAN that arms again", bare),
        )
        .goal(Goal::AtMost(1.2)),
        Outcome::less(MEMCMP, "us", find, ("comparing 1 GiB page by page", memcmp))
            .goal(Goal::AtLeast(100.0)),
        Outcome::times(
            CAPTURE,
            "us",
            whole,
            ("bare PAGEMAP_SCAN that arms again", bare),
        )
        .note(format!(
            "with copy, diff and twin; {:.0}x less than comparing",
            memcmp / whole
        )),
        Outcome::times(
            CLEAN,
            "us",
            clean,
            ("bare PAGEMAP_SCAN, nothing dirty", bare_clean),
        ),
    ])
}
