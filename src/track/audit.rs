//! The audit: whether the twin still is what the writer's memory holds.
//!
//! ```text
//! twin   |====|====|====|====|   compared page by page, a bounded step at a time
//! memory |====|====|=/==|====|
//!                    ^ differs: reported as written?  yes: the next capture's matter
//!                                                     no:  nobody saw this store
//! ```
//! Write-protection belongs to one mapping of one process; what is written by another
//! way leaves the page clean and the twin old. The audit finds it.
//!
//! - I1: a page is read before it is asked for, never after: a store that was read
//!   and that tracking sees has lifted the protection of its page, and no capture
//!   arms it in between. So a page that differs and is clean was written unseen.
//! - I2: between captures only: while one is under way pages are armed and not yet
//!   in the twin.
//! - I3: no hole is allocated by looking at it.

use std::ops::Range;
use std::sync::atomic::{Ordering, fence};

use super::attachment::ESRCH;
use super::exact::Board;
use super::{Attachment, Heat, PAGE, Source, TrackError, Tracker, Twin};
use crate::limits::AUDIT_STEP_PAGES;
use crate::sys::SysError;
use crate::sys::pagemap::{Pagemap, Then};
use crate::units::{PAGE_SIZE, page_of, pages_for};

/// What one step found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// Bytes of the region that are behind the audit now and were not before.
    pub bytes: u64,
    /// The first page that differs although nothing reported it, and how many there
    /// are in this step.
    pub unseen: Option<(u64, u64)>,
    /// Whether the region's end was reached; the next step begins anew.
    pub round: bool,
}

/// A comparison of a region with its twin that goes round for ever.
///
/// Memory: some words.
#[derive(Debug, Default)]
pub struct Audit {
    at: u64,
    /// The data run that `at` lies in or before; empty: to be asked for.
    data: Range<u64>,
}

impl Audit {
    /// Where it stands, in bytes.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Whether there is something to find: only stores that write-protection did not
    /// see. In mode `manual` what is not marked may differ, and `compare` compares all.
    pub fn concerns(tracker: &Tracker) -> bool {
        matches!(tracker, Tracker::Async { .. } | Tracker::Sync { .. })
    }

    /// Compares up to [`AUDIT_STEP_PAGES`] pages, and at most `upto` bytes of the region.
    /// Not while a capture is under way or, in mode `sync`, a cut is asked for or void.
    ///
    /// # Errors
    /// [`TrackError::Read`]; [`TrackError::Scan`] if the kernel does not answer
    /// whether a page was written.
    pub fn step(
        &mut self,
        tracker: &Tracker,
        source: &Source,
        twin: &Twin,
        upto: u64,
    ) -> Result<Looked, TrackError> {
        let size = twin.size();
        let begun = self.at;
        if self.data.start > begun {
            // What was a hole may hold data by now, which captures have seen.
            self.data = 0..0;
        }
        let end = size.min(page_of(begun.saturating_add(upto)).max(page_of(begun) + 1) * PAGE_SIZE);
        let mut suspects = Vec::new();
        let mut left = AUDIT_STEP_PAGES;
        while self.at < end && left > 0 {
            left -= 1;
            let page = match self.next_page(source, twin, end)? {
                Some(page) => page,
                None => break,
            };
            if self.differs(source, twin, page)? {
                suspects.push(page);
            }
            self.at = ((page + 1) * PAGE_SIZE).min(size);
        }
        let unseen = unseen(tracker, &suspects)?;
        let bytes = self.at - begun;
        let round = self.at >= size;
        if round {
            *self = Self::default();
        }
        Ok(Looked {
            bytes,
            unseen,
            round,
        })
    }

    /// The next page below `end` that holds something on either side; none moves to `end`.
    fn next_page(
        &mut self,
        source: &Source,
        twin: &Twin,
        end: u64,
    ) -> Result<Option<u64>, TrackError> {
        if self.data.end <= self.at {
            // Nothing behind is data: a hole to the region's end and beyond.
            let data = source.next_data(self.at)?;
            self.data = data.unwrap_or(u64::MAX - 1..u64::MAX);
        }
        let (at, data) = (page_of(self.at), page_of(self.data.start.max(self.at)));
        let hole = at..data.min(pages_for(end));
        let page = twin.touched().next_in(hole).unwrap_or(data);
        if page * PAGE_SIZE >= end {
            self.at = end;
            return Ok(None);
        }
        Ok(Some(page))
    }

    fn differs(&self, source: &Source, twin: &Twin, page: u64) -> Result<bool, TrackError> {
        let start = page * PAGE_SIZE;
        let known = twin.page(page);
        let mut bytes = [0; PAGE];
        let bytes = &mut bytes[..known.len()];
        if start + PAGE_SIZE > self.data.start {
            source.copy(start, bytes)?;
        }
        Ok(bytes != known)
    }
}

impl Attachment {
    /// How many of `bytes` of the region, whole pages, stores are seen to through this
    /// mapping. Where it is less, something was unmapped, moved, mapped over or
    /// unregistered. Not while a cut is asked for, under way or void.
    ///
    /// # Errors
    /// What the kernel refuses: `ESRCH` if the memory is gone.
    pub fn tracked_bytes(&self, tracker: &Tracker, bytes: Range<u64>) -> Result<u64, SysError> {
        let len = bytes.end - bytes.start;
        let Some(pagemap) = &self.pagemap else {
            return Ok(len);
        };
        let (start, end) = (self.base + bytes.start, self.base + bytes.end);
        match tracker {
            Tracker::Async { .. } => pagemap.tracked_bytes(start, end),
            Tracker::Sync { board, .. } => {
                // Whatever is found once may have been in the middle of a change.
                let open = self.unexplained(board, pagemap, bytes.clone())?;
                let open = match open {
                    0 => 0,
                    _ => self.unexplained(board, pagemap, bytes)?,
                };
                Ok(len - open)
            }
            _ => Ok(len),
        }
    }

    /// Bytes whose stores do not wait although nothing was stored there since the last cut.
    fn unexplained(
        &self,
        board: &Board,
        pagemap: &Pagemap,
        bytes: Range<u64>,
    ) -> Result<u64, SysError> {
        let mut open = Vec::new();
        let mut at = bytes.start;
        let base = self.base;
        let (start, end) = (base + bytes.start, base + bytes.end);
        pagemap.protected(start, end, &mut |range| {
            let (from, to) = (
                range.start.saturating_sub(base),
                range.end.saturating_sub(base),
            );
            if from > at {
                open.push(at..from);
            }
            at = at.max(to);
        })?;
        if bytes.end > at {
            open.push(at..bytes.end);
        }
        // What was found open comes first, as in `unseen_by`.
        fence(Ordering::Acquire);
        let written = board.set(board.made().number + 1);
        let pages = open
            .into_iter()
            .flat_map(|open| page_of(open.start)..pages_for(open.end));
        Ok(pages.filter(|page| !written.contains(*page)).count() as u64 * PAGE_SIZE)
    }
}

impl Tracker {
    /// Whether something was stored to `bytes`, whole pages, that no capture has taken;
    /// in mode `async`. Looks at up to 64 ranges; pages that are left open are reported
    /// without a store too, and so are compared with the twin.
    pub fn is_stored_to(&self, bytes: Range<u64>, twin: &Twin, source: &Source) -> bool {
        let Self::Async {
            attachments, heat, ..
        } = self
        else {
            return false;
        };
        attachments
            .iter()
            .any(|attachment| is_stored_through(attachment, heat, bytes.clone(), (twin, source)))
    }
}

/// The same for one mapping.
fn is_stored_through(
    attachment: &Attachment,
    heat: &Heat,
    bytes: Range<u64>,
    (twin, source): (&Twin, &Source),
) -> bool {
    const RANGES: usize = 64;
    let Some(pagemap) = &attachment.pagemap else {
        return false;
    };
    let (start, end) = (attachment.base + bytes.start, attachment.base + bytes.end);
    let mut found = Vec::new();
    let most = 4 * RANGES as u64;
    let scan = pagemap.scan_written(start, end, &mut found, RANGES, most, Then::Leave);
    scan.is_ok()
        && found.iter().any(|range| {
            let pages =
                page_of(range.start - attachment.base)..page_of(range.end - attachment.base);
            pages
                .into_iter()
                .any(|page| !heat.is_hot(page) || differs(source, twin, page))
        })
}

/// Whether an allocated page differs from the twin; one that cannot be read does not.
fn differs(source: &Source, twin: &Twin, page: u64) -> bool {
    if page * PAGE_SIZE >= twin.size() {
        return false;
    }
    let known = twin.page(page);
    let mut bytes = [0; PAGE];
    let bytes = &mut bytes[..known.len()];
    source.copy(page * PAGE_SIZE, bytes).is_ok() && bytes != known
}

/// The first of `pages` that was not written since it was armed, and how many there are.
fn unseen(tracker: &Tracker, pages: &[u64]) -> Result<Option<(u64, u64)>, TrackError> {
    let attachments = match tracker {
        Tracker::Async { attachments, .. } => attachments,
        Tracker::Sync { board, .. } => return Ok(unseen_by(board, pages)),
        _ => return Ok(None),
    };
    let mut found = None;
    let mut written = Vec::new();
    for run in pages.chunk_by(|page, next| page + 1 == *next) {
        written.clear();
        for attachment in attachments {
            ask_written(attachment, run, &mut written)?;
        }
        for page in run {
            let at = page * PAGE_SIZE;
            if !written.iter().any(|range| range.contains(&at)) {
                let (_, count) = found.get_or_insert((*page, 0));
                *count += 1;
            }
        }
    }
    Ok(found)
}

/// Appends what one writer has stored to of a run of pages, as offsets in the region.
fn ask_written(
    attachment: &Attachment,
    run: &[u64],
    written: &mut Vec<Range<u64>>,
) -> Result<(), TrackError> {
    let pagemap = attachment.pagemap.as_ref().ok_or(TrackError::Incomplete)?;
    let offset = run[0] * PAGE_SIZE;
    let start = attachment.base + offset;
    let end = start + run.len() as u64 * PAGE_SIZE;
    let mut ranges = Vec::new();
    pagemap
        .scan_written(start, end, &mut ranges, run.len(), u64::MAX, Then::Leave)
        .map_err(|source| match source.raw_os_error() {
            Some(ESRCH) => TrackError::WriterExited,
            _ => TrackError::Scan { offset, source },
        })?;
    let base = attachment.base;
    written.extend(
        ranges
            .iter()
            .map(|range| range.start.saturating_sub(base)..range.end.saturating_sub(base)),
    );
    Ok(())
}

/// The same where faults are answered: a page is a member before its store goes on.
fn unseen_by(board: &Board, pages: &[u64]) -> Option<(u64, u64)> {
    // What was read of the pages comes first; the fault thread's system call, which let
    // the store go on, stands between the two on its side.
    fence(Ordering::Acquire);
    let written = board.set(board.made().number + 1);
    let mut clean = pages.iter().filter(|page| !written.contains(**page));
    let first = clean.next()?;
    Some((*first, 1 + clean.count() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::SharedMemory;
    use crate::sys::map::{Access, Mapping};
    use crate::sys::{memfd, or_skip};
    use crate::track::{Capture, PreImages, Step, WhenFull};
    use crate::units::MIB;
    use crate::words::Mode;

    /// A tracked region whose memfd is not sealed, so that it can be written unseen.
    struct Scene {
        writer: SharedMemory,
        fd: std::os::fd::OwnedFd,
        tracker: Tracker,
        source: Source,
        twin: Twin,
        pre: PreImages,
        audit: Audit,
    }

    impl Scene {
        fn new(size: u64) -> Option<Self> {
            let fd = memfd::create("audit", size).unwrap();
            let mapping = Mapping::shared(&fd, size, Access::ReadWrite).unwrap();
            let attachment = match Attachment::for_region(&mapping, Mode::Async) {
                Ok(attachment) => attachment,
                Err(TrackError::Open { source }) => {
                    or_skip::<()>("async tracking", Err(source));
                    return None;
                }
                Err(error) => panic!("{error:?}"),
            };
            let memory = Mapping::shared(&fd, size, Access::ReadOnly).unwrap();
            let source = Source::Mapped {
                memory: SharedMemory::new(memory),
                fd: fd.try_clone().unwrap(),
            };
            Some(Self {
                writer: SharedMemory::new(mapping),
                fd,
                tracker: Tracker::new(Mode::Async, Some(attachment)).unwrap(),
                source,
                twin: Twin::new(size).unwrap(),
                pre: PreImages::new(size, size),
                audit: Audit::default(),
            })
        }

        fn capture(&mut self, mut capture: Capture) {
            loop {
                let step = capture.step(
                    &mut self.tracker,
                    &self.source,
                    &mut self.twin,
                    &mut self.pre,
                    WhenFull::Abort,
                );
                match step {
                    Step::More => {}
                    Step::Done(_) => return,
                    other => panic!("{other:?}"),
                }
            }
        }

        /// One round: the pages found, by their first of each step, and all of them.
        fn round(&mut self, upto: u64) -> (Option<u64>, u64) {
            let (mut first, mut count) = (None, 0);
            let mut bytes = 0;
            loop {
                let looked = self
                    .audit
                    .step(&self.tracker, &self.source, &self.twin, upto)
                    .unwrap();
                if let Some((page, more)) = looked.unseen {
                    first = first.or(Some(page));
                    count += more;
                }
                bytes += looked.bytes;
                if looked.round {
                    assert_eq!(bytes, self.twin.size());
                    return (first, count);
                }
            }
        }
    }

    #[test]
    fn a_hole_that_was_filled_and_captured_meanwhile_is_no_finding() {
        let Some(mut scene) = Scene::new(MIB) else {
            return;
        };
        scene.capture(Capture::full());
        let step = |scene: &mut Scene, upto| {
            let Scene {
                audit,
                tracker,
                source,
                twin,
                ..
            } = scene;
            audit.step(tracker, source, twin, upto).unwrap()
        };
        // The audit begins in what is one hole to the end.
        assert_eq!(step(&mut scene, PAGE_SIZE).unseen, None);
        scene.writer.write(0, &[7; MIB as usize]).unwrap();
        scene.capture(Capture::dirty(&scene.tracker, Vec::new()));
        let mut looked = step(&mut scene, u64::MAX);
        while !looked.round {
            assert_eq!(looked.unseen, None);
            looked = step(&mut scene, u64::MAX);
        }
        assert_eq!(looked.unseen, None);
    }

    #[test]
    fn stores_that_were_seen_are_no_finding_and_others_are() {
        let size = 3 * MIB + 100;
        let Some(mut scene) = Scene::new(size) else {
            return;
        };
        scene.writer.write(5000, &[1; 9000]).unwrap();
        scene.writer.write(size - 50, &[2; 50]).unwrap();
        scene.capture(Capture::full());
        assert_eq!(scene.round(u64::MAX), (None, 0));
        // Seen and not yet captured: in data and in a hole.
        scene.writer.write(5100, &[3; 10]).unwrap();
        scene.writer.write(MIB, &[4; 10]).unwrap();
        assert_eq!(scene.round(PAGE_SIZE), (None, 0));
        // Written through the file: in data, in a hole, and at the unaligned end.
        for at in [5200, 2 * MIB, 2 * MIB + 3 * PAGE_SIZE, size - 1] {
            memfd::write_at(&scene.fd, &[9], at).unwrap();
        }
        // Page 1 is dirty already: its unseen byte goes with the next capture.
        assert_eq!(scene.round(10 * PAGE_SIZE), (Some(512), 3));
        scene.capture(Capture::dirty(&scene.tracker, Vec::new()));
        assert_eq!(scene.round(u64::MAX), (Some(512), 3));
        scene.capture(Capture::full());
        assert_eq!(scene.round(u64::MAX), (None, 0));
        let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let at = (2 * MIB).cast_signed();
        nix::fcntl::fallocate(&scene.fd, punch, at, PAGE_SIZE.cast_signed()).unwrap();
        assert_eq!(scene.round(u64::MAX), (Some(512), 1));
        let before = memfd::resident_bytes(&scene.fd).unwrap();
        scene.round(7 * PAGE_SIZE);
        let after = memfd::resident_bytes(&scene.fd).unwrap();
        assert_eq!(before, after, "looking allocates nothing");
    }
}
