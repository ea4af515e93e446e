//! Memory under the crate's own tracking, driven as the engine drives it.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use uffd_sync::shm::SharedMemory;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::track::{
    Attachment, Capture, Captured, PreImages, Source, Step, Tracker, Twin, WhenFull,
};
use uffd_sync::units::PAGE_SIZE;
use uffd_sync::words::Mode;

use crate::memory::Memory;

/// Longest that one capture may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Tracked {
    pub(crate) memory: Memory,
    pub(crate) twin: Twin,
    tracker: Tracker,
    source: Source,
    pre: PreImages,
}

fn never_hot(mut tracker: Tracker) -> Tracker {
    tracker.set_hot_after(0);
    tracker
}

impl Tracked {
    /// `pages` pages, captured once and armed.
    pub(crate) fn new(pages: u64) -> anyhow::Result<Self> {
        let memory = Memory::new(pages)?;
        let size = pages * PAGE_SIZE;
        let attachment = Attachment::for_region(&memory.writer, Mode::Async)?;
        let reader = Mapping::shared(&memory.fd, size, Access::ReadOnly)?;
        let source = Source::Mapped {
            memory: SharedMemory::new(reader),
            fd: memory.fd.try_clone()?,
        };
        let mut tracked = Self {
            memory,
            twin: Twin::new(size)?,
            tracker: never_hot(Tracker::new(Mode::Async, Some(attachment))?),
            source,
            pre: PreImages::new(size, size),
        };
        tracked.finish(Capture::full(), |_| {})?;
        tracked.verify_all()?;
        Ok(tracked)
    }

    /// Captures in a row after which a page is left open; none ever is at first, since
    /// most cases are about what finding and arming costs.
    pub(crate) fn set_hot_after(&mut self, captures: u64) {
        self.tracker.set_hot_after(captures);
    }

    pub(crate) fn hot_pages(&self) -> u64 {
        self.tracker.heat().map_or(0, |heat| heat.pages())
    }

    /// A capture of what was stored, and the time it took.
    pub(crate) fn capture(&mut self) -> anyhow::Result<(Captured, Duration)> {
        let started = Instant::now();
        let capture = Capture::dirty(&self.tracker, Vec::new());
        let captured = self.finish(capture, |_| {})?;
        Ok((captured, started.elapsed()))
    }

    /// The same, with the time of each step.
    pub(crate) fn capture_in_steps(
        &mut self,
        mut after_step: impl FnMut(Duration),
    ) -> anyhow::Result<Captured> {
        let capture = Capture::dirty(&self.tracker, Vec::new());
        self.finish(capture, &mut after_step)
    }

    fn finish(
        &mut self,
        mut capture: Capture,
        mut after_step: impl FnMut(Duration),
    ) -> anyhow::Result<Captured> {
        let limit = Instant::now() + PATIENCE;
        loop {
            let started = Instant::now();
            let step = capture.step(
                &mut self.tracker,
                &self.source,
                &mut self.twin,
                &mut self.pre,
                WhenFull::Abort,
            );
            after_step(started.elapsed());
            match step {
                Step::More => ensure!(Instant::now() < limit, "a capture does not end"),
                Step::Done(captured) => return Ok(captured),
                Step::NoRoom => bail!("no update is open, yet there is no room beside it"),
                Step::Lost(error) => return Err(error.into()),
            }
        }
    }

    /// Whether the twin has what was stored to `pages`.
    pub(crate) fn verify(&self, pages: &[u64]) -> anyhow::Result<()> {
        for page in pages {
            let twin = self.twin.page(*page);
            let stored = self.memory.load(*page).to_ne_bytes();
            ensure!(
                twin[..8] == stored,
                "the twin misses what was stored to page {page}"
            );
        }
        Ok(())
    }

    /// Whether the twin is the memory, byte for byte.
    pub(crate) fn verify_all(&self) -> anyhow::Result<()> {
        ensure!(
            self.twin[..] == *self.memory.as_slice(),
            "the twin is not what the memory holds"
        );
        Ok(())
    }
}
