//! How fast dirty pages become extents and the twin their new content.
//!
//! Every page of a region far larger than the caches is dirty; the capture scans,
//! arms, copies, diffs and updates the twin. The baseline copies the same pages from
//! the same mapping to private memory of the twin's kind, touched before; it runs in
//! the same rounds. Source and destination are cold: each was last used one whole
//! region ago.

use std::time::Instant;

use anyhow::ensure;
use uffd_sync::sys::map::PrivateMemory;
use uffd_sync::units::{MIB, PAGE_SIZE};

use crate::harness::{Goal, Options, Outcome, Rounds};
use crate::tracked::Tracked;

const SPARSE: &str = "capture/sparse";
const ALL: &str = "capture/all-bytes";

pub(crate) const CASES: &[&str] = &[SPARSE, ALL];

const PAGE: usize = PAGE_SIZE as usize;
const LOW_BITS: u8 = 0x7F;

struct Subject {
    tracked: Tracked,
    copy: PrivateMemory,
}

impl Subject {
    fn new(pages: u64) -> anyhow::Result<Self> {
        let mut copy = PrivateMemory::new(pages * PAGE_SIZE)?;
        copy.advise_huge(0..pages * PAGE_SIZE);
        copy.fill(1);
        let mut subject = Self {
            tracked: Tracked::new(pages)?,
            copy,
        };
        // From the page numbers to a pattern that each round changes byte by byte.
        subject.fill(usize::from(LOW_BITS));
        subject.tracked.capture()?;
        subject.tracked.verify_all()?;
        Ok(subject)
    }

    fn bytes(&self) -> u64 {
        self.tracked.memory.writer.len()
    }

    /// One round of one variant, in GB/s of pages.
    fn measure(&mut self, variant: usize, round: usize) -> anyhow::Result<f64> {
        let seconds = match variant {
            0 => self.sparse(round)?,
            1 => self.all(round)?,
            2 => self.memcpy(self.copy.len())?,
            _ => self.memcpy(PAGE)?,
        };
        Ok(self.bytes() as f64 / seconds / 1e9)
    }

    fn sparse(&mut self, round: usize) -> anyhow::Result<f64> {
        let pages = self.tracked.memory.pages();
        for page in 0..pages {
            // All eight bytes change in each round: the pattern's are below 0x80.
            let byte = 0x80 | round as u64;
            self.tracked
                .memory
                .store(page, byte * 0x0101_0101_0101_0101);
        }
        self.captured(8 * pages)
    }

    fn all(&mut self, round: usize) -> anyhow::Result<f64> {
        self.fill(round);
        self.captured(self.bytes())
    }

    /// Bytes below 0x80, each one more than `round - 1` would make it, modulo 0x80.
    fn fill(&self, round: usize) {
        let mut pattern = [0u8; PAGE];
        for (place, byte) in pattern.iter_mut().enumerate() {
            *byte = (place as u8).wrapping_mul(31).wrapping_add(round as u8) & LOW_BITS;
        }
        for page in 0..self.tracked.memory.pages() {
            self.tracked.memory.fill(page, &pattern);
        }
    }

    fn captured(&mut self, expected: u64) -> anyhow::Result<f64> {
        let (captured, time) = self.tracked.capture()?;
        ensure!(
            captured.dirty_pages == self.tracked.memory.pages(),
            "the capture missed a page"
        );
        ensure!(
            captured.changed_bytes == expected,
            "{} bytes changed",
            captured.changed_bytes
        );
        self.tracked.verify_all()?;
        Ok(time.as_secs_f64())
    }

    fn memcpy(&mut self, piece: usize) -> anyhow::Result<f64> {
        let source = self.tracked.memory.as_slice();
        let started = Instant::now();
        for (to, from) in self.copy.chunks_mut(piece).zip(source.chunks(piece)) {
            to.copy_from_slice(from);
        }
        let time = started.elapsed();
        ensure!(self.copy[..] == *source, "the copy is not the source");
        Ok(time.as_secs_f64())
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut subject = Subject::new(options.pick(128, 512) * MIB / PAGE_SIZE)?;
    let rounds = Rounds::run(options, 4, |variant, round| subject.measure(variant, round))?;
    let [sparse, all, memcpy, by_page] = [0, 1, 2, 3].map(|variant| rounds.of(variant));
    let baseline = ("memcpy of the same pages, cold to cold", memcpy);
    let note = format!("memcpy page by page: {by_page:.2} GB/s");
    Ok(vec![
        Outcome::times(SPARSE, "GB/s", sparse, baseline)
            .goal(Goal::AtLeast(0.4))
            .note(&note),
        Outcome::times(ALL, "GB/s", all, baseline)
            .goal(Goal::AtLeast(0.25))
            .note(&note),
    ])
}
