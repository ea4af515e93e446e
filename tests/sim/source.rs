//! The source: memory that is written, a twin, captures in steps, a publication.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

use uffd_sync::bitmap::Bitmap;
use uffd_sync::checksum::crc32c;
use uffd_sync::replicate::{CaptureInfo, Coming, Out, Publication, ShipperId, Spare};
use uffd_sync::track::{DIFF_GAP, ExtentSet, WhenFull, diff};
use uffd_sync::units::{PAGE_SIZE, page_of, pages_for};
use uffd_sync::wire::{FLAG_COMING, HEADER_BYTES, parse_header};
use uffd_sync::words::{EpochKind, Generation};

use crate::rng::Rng;

pub(crate) const HANDLE: u32 = 7;
/// Steps for which a capture by timer is put off before it gives updates up.
const PUT_OFF: u32 = 4;

#[derive(Debug)]
struct Capture {
    /// What is still to be copied, the lowest last.
    pages: Vec<u64>,
    ranges: Vec<Range<u64>>,
    changed: ExtentSet,
    commit: bool,
    put_off: u32,
}

#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) publication: Publication,
    /// The twin.
    pub(crate) content: Vec<u8>,
    /// What the writer stores into.
    live: Vec<u8>,
    dirty: Bitmap,
    capture: Option<Capture>,
    pub(crate) generation: Generation,
    pub(crate) epoch: u64,
    /// Checksum of the content at each epoch of each life.
    pub(crate) history: HashMap<(Generation, u64), u32>,
    pub(crate) put_off: u64,
    pub(crate) aborted: u64,
    /// Updates begun before their epoch was complete, and captures begun anew.
    pub(crate) early: u64,
    pub(crate) lost: u64,
    preimage_bytes: u64,
    /// The control: old content is not put aside.
    pub(crate) no_pre_images: bool,
    /// The control: updates of a capture that began anew go on.
    pub(crate) no_giving_up: bool,
    spare: Spare,
}

impl Source {
    pub(crate) fn new(size: u64, preimage_bytes: u64) -> Self {
        let generation = Generation(1);
        let mut source = Self {
            publication: Publication::with_budget(HANDLE, generation, 1, size, preimage_bytes),
            content: vec![0; size as usize],
            live: vec![0; size as usize],
            dirty: Bitmap::new(pages_for(size)),
            capture: None,
            generation,
            epoch: 1,
            history: HashMap::new(),
            put_off: 0,
            aborted: 0,
            early: 0,
            lost: 0,
            preimage_bytes,
            no_pre_images: false,
            no_giving_up: false,
            spare: Spare::default(),
        };
        source.remember();
        source
    }

    fn size(&self) -> u64 {
        self.content.len() as u64
    }

    fn remember(&mut self) {
        self.history
            .insert((self.generation, self.epoch), crc32c(&self.content));
    }

    /// Another process took over: a new life, nothing known of replicas.
    pub(crate) fn reborn(&mut self) {
        self.generation = Generation(self.generation.0 + 1);
        self.epoch = 1;
        let (size, budget) = (self.size(), self.preimage_bytes);
        self.publication = Publication::with_budget(HANDLE, self.generation, 1, size, budget);
        self.begin_life();
    }

    /// Another life in the same process: connections stay.
    pub(crate) fn restarted(&mut self) {
        self.generation = Generation(self.generation.0 + 1);
        self.epoch = 1;
        self.publication.restart(self.generation, self.epoch);
        self.begin_life();
    }

    fn begin_life(&mut self) {
        self.content.clone_from(&self.live);
        self.dirty.clear();
        self.capture = None;
        self.remember();
    }

    pub(crate) fn store(&mut self, offset: u64, len: u64, value: u64) {
        let end = (offset + len).min(self.size());
        let bytes = &mut self.live[offset as usize..end as usize];
        bytes.fill((value >> 7) as u8);
        for (i, byte) in bytes.iter_mut().step_by(97).enumerate() {
            *byte = (value.wrapping_mul(i as u64 | 1) >> 9) as u8;
        }
        if offset < end {
            self.dirty
                .insert_range(page_of(offset)..page_of(end - 1) + 1);
        }
    }

    /// The writer: scattered fields, runs, now and then everything, or zeros.
    pub(crate) fn random_stores(&mut self, rng: &mut Rng) {
        let size = self.size();
        match rng.below(40) {
            0 => self.store(0, size, rng.next()),
            1 => {
                // More places than one frame holds extents.
                let (step, value) = (40 + rng.below(40), rng.next());
                (0..size / step).for_each(|i| self.store(i * step, 1, value + i));
            }
            2 => {
                let (at, len) = (rng.below(size), rng.below(size / 2));
                self.store(at, len, 0);
            }
            3..8 => {
                let at = rng.below(size);
                self.store(at, rng.below(40_000), rng.next());
            }
            _ => {
                for _ in 0..rng.below(6) {
                    let at = rng.below(size);
                    self.store(at, 1 + rng.below(16), rng.next());
                }
            }
        }
    }

    pub(crate) fn is_capturing(&self) -> bool {
        self.capture.is_some()
    }

    /// Collects what is dirty; stores after this belong to the next capture unless
    /// their page was not copied yet.
    pub(crate) fn begin_capture(&mut self, commit: bool) {
        if let Some(capture) = &mut self.capture {
            capture.commit |= commit;
            return;
        }
        let pages: Vec<u64> = self.dirty.runs().flatten().collect();
        self.dirty.clear();
        self.publication.set_busy(true);
        self.capture = Some(Capture {
            pages: pages.into_iter().rev().collect(),
            ranges: Vec::new(),
            changed: ExtentSet::new(self.size()),
            commit,
            put_off: 0,
        });
    }

    /// Tracking was lost: all pages are looked at once more, those copied already too.
    pub(crate) fn lose_tracking(&mut self) {
        let pages = pages_for(self.size());
        if let Some(capture) = &mut self.capture {
            capture.pages = (0..pages).rev().collect();
            if !self.no_giving_up {
                self.publication.pre_images().give_up_coming();
            }
            self.lost += 1;
        }
    }

    /// The next frame for a replica; of the capture under way if `early`.
    pub(crate) fn poll(&mut self, id: ShipperId, now: Instant, early: bool) -> Option<Out> {
        let coming = self.capture.as_ref().filter(|_| early);
        let coming = coming.map(|capture| Coming {
            epoch: self.epoch + 1,
            source_time_ns: self.epoch + 1,
            changed: &capture.changed,
            settled: capture
                .pages
                .last()
                .map_or(self.content.len() as u64, |page| page * PAGE_SIZE),
        });
        let view = (&self.content[..], coming);
        let out = self
            .publication
            .poll_coming(id, now, view, &mut self.spare)?;
        let head = out.as_ref().first_chunk::<HEADER_BYTES>();
        let header = head.map(|head| parse_header(head).expect("it was just made"));
        self.early += u64::from(header.is_some_and(|header| header.has(FLAG_COMING)));
        Some(out)
    }

    /// Copies up to `pages` pages; finishes the epoch when all are done.
    pub(crate) fn step_capture(&mut self, pages: u64) {
        let Some(capture) = &mut self.capture else {
            return;
        };
        for _ in 0..pages {
            let Some(page) = capture.pages.last().copied() else {
                break;
            };
            let start = (page * PAGE_SIZE) as usize;
            let end = (start + PAGE_SIZE as usize).min(self.content.len());
            let mut ranges = Vec::new();
            diff(
                &self.content[start..end],
                &self.live[start..end],
                start as u64,
                DIFF_GAP,
                &mut ranges,
            );
            if !ranges.is_empty() && !self.no_pre_images {
                let full = match capture.commit || capture.put_off >= PUT_OFF {
                    true => WhenFull::Abort,
                    false => WhenFull::PutOff,
                };
                let pre = self.publication.pre_images();
                let before = pre.is_idle();
                if pre
                    .before_change(page, &self.content[start..end], full)
                    .is_err()
                {
                    capture.put_off += 1;
                    self.put_off += 1;
                    return;
                }
                self.aborted += u64::from(!before && pre.is_idle());
                assert!(
                    pre.used_bytes() <= pre.budget_bytes(),
                    "pre-images are bounded"
                );
            }
            self.content[start..end].copy_from_slice(&self.live[start..end]);
            for range in &ranges {
                capture.changed.insert(range.clone());
            }
            capture.ranges.extend(ranges);
            capture.pages.pop();
        }
        if capture.pages.is_empty() {
            self.finish_capture();
        }
    }

    fn finish_capture(&mut self) {
        let Some(capture) = self.capture.take() else {
            return;
        };
        if capture.ranges.is_empty() && !capture.commit {
            self.publication.set_busy(false);
            return;
        }
        self.epoch += 1;
        self.remember();
        let info = CaptureInfo {
            epoch: self.epoch,
            kind: match capture.commit {
                true => EpochKind::Cut,
                false => EpochKind::Convergent,
            },
            source_time_ns: self.epoch,
        };
        let mut extents = ExtentSet::new(self.size());
        for range in capture.ranges {
            extents.insert(range);
        }
        self.publication.captured(info, &extents, &self.content);
    }

    /// The pages that are not all zero.
    pub(crate) fn present(&self) -> ExtentSet {
        let mut present = ExtentSet::new(self.size());
        for (i, page) in self.content.chunks(PAGE_SIZE as usize).enumerate() {
            if *page != [0; PAGE_SIZE as usize][..page.len()] {
                let start = i as u64 * PAGE_SIZE;
                present.insert(start..start + page.len() as u64);
            }
        }
        present
    }

    pub(crate) fn is_captured(&self) -> bool {
        self.capture.is_none() && self.content == self.live
    }
}
