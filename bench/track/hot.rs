//! What a store costs in a page that is written in every epoch.
//!
//! Two regions tracked by the crate, one that leaves such pages open (the default), one
//! that arms them again at each capture. Each round stores once to every page, in the same
//! scattered order, and ends with a capture outside the clock; the first rounds, in which
//! no page is hot yet, come before. What the comparing costs the node instead is a note.

use std::time::{Duration, Instant};

use anyhow::ensure;
use uffd_sync::limits;

use crate::harness::{Goal, Options, Outcome, Rounds, median, scattered};
use crate::tracked::Tracked;

const REARMED: &str = "hot-store/re-armed";

pub(crate) const CASES: &[&str] = &[REARMED];

/// Pages of each region, all of them hot.
const PAGES: u64 = 1024;
/// Epochs in one round: a single pass over warm pages is too short to time.
const EPOCHS: u64 = 16;

struct Subject {
    tracked: Tracked,
    captures: Vec<f64>,
}

impl Subject {
    fn new(hot_after: u64) -> anyhow::Result<Self> {
        let mut tracked = Tracked::new(PAGES)?;
        tracked.set_hot_after(hot_after);
        Ok(Self {
            tracked,
            captures: Vec::new(),
        })
    }

    /// Nanoseconds per store over some epochs.
    fn round(&mut self, order: &[u64], seed: u64) -> anyhow::Result<f64> {
        let mut storing = Duration::ZERO;
        for epoch in 0..EPOCHS {
            let value = (seed * EPOCHS + epoch + 1) << 32;
            let started = Instant::now();
            for page in order {
                self.tracked.memory.store(*page, value | *page);
            }
            storing += started.elapsed();
            let (captured, took) = self.tracked.capture()?;
            ensure!(captured.dirty_pages == PAGES, "the capture missed a page");
            self.tracked.verify(order)?;
            self.captures.push(took.as_nanos() as f64 / PAGES as f64);
        }
        Ok(storing.as_nanos() as f64 / (EPOCHS * PAGES) as f64)
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let order = scattered(PAGES);
    let mut subjects = [Subject::new(limits::HOT_CAPTURES)?, Subject::new(0)?];
    let rounds = Rounds::run(options, 2, |variant, round| {
        subjects[variant].round(&order, round as u64)
    })?;
    ensure!(
        subjects[0].tracked.hot_pages() == PAGES && subjects[1].tracked.hot_pages() == 0,
        "the pages are not as hot as they should be"
    );
    for subject in &subjects {
        subject.tracked.verify_all()?;
    }
    let [open, armed] = [0, 1].map(|variant| median(&subjects[variant].captures));
    Ok(vec![
        Outcome::less(
            REARMED,
            "ns",
            rounds.of(0),
            ("the page armed again at each capture", rounds.of(1)),
        )
        .goal(Goal::AtLeast(10.0))
        .note(format!(
            "{PAGES} pages, one store to each per epoch; hot after {} captures; the capture \
             takes {open:.0} ns per page, {armed:.0} ns where it arms",
            limits::HOT_CAPTURES
        )),
    ])
}
