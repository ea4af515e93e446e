//! Reading a mapping without allocating its holes.
//!
//! A load from a hole of a memfd allocates the page. So a page is read through the
//! mapping only once the file has said that it is data, and through the file until
//! then. Data never becomes a hole again while this lives: the seals forbid
//! punching and truncating, and the engine's own memory only grows.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromBytes;

use crate::shm::SharedMemory;
use crate::sys::memfd;
use crate::units::{OutOfRange, PAGE_SIZE, checked_range, page_of, pages_for};

/// A region's data: mapping, file, and which pages are known to be data.
///
/// Memory: one bit per page.
#[derive(Debug)]
pub(super) struct SparseData {
    /// None where the file may shrink: a load beyond its end would kill.
    memory: Option<SharedMemory>,
    fd: OwnedFd,
    /// Bytes that are known to be in the file; only rises.
    size: AtomicU64,
    known: Box<[AtomicU64]>,
}

impl SparseData {
    /// `memory` maps the greatest size of `fd`, of which the file has `size` bytes now.
    pub(super) fn new(memory: SharedMemory, fd: OwnedFd, size: u64) -> Self {
        let words = pages_for(memory.len()).div_ceil(64);
        Self {
            memory: Some(memory),
            fd,
            size: AtomicU64::new(size),
            known: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// A file that others may truncate: it is read by calls only.
    pub(super) fn unmapped(fd: OwnedFd, size: u64) -> Self {
        Self {
            memory: None,
            fd,
            size: AtomicU64::new(size),
            known: Box::default(),
        }
    }

    pub(super) fn memory(&self) -> Option<&SharedMemory> {
        self.memory.as_ref()
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// The file has `size` bytes now. Nothing where that is no more than was known, or
    /// more than is mapped.
    pub(super) fn set_size(&self, size: u64) {
        let room = self.memory.as_ref().map_or(0, SharedMemory::len);
        if size <= room {
            self.size.fetch_max(size, Ordering::Relaxed);
        }
    }

    /// Copies live bytes.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let range = checked_range(offset, out.len() as u64, self.size())?;
        let Some(memory) = &self.memory else {
            self.read_file(offset, out);
            return Ok(());
        };
        if self.all_known(offset, range.end) {
            return memory.read(offset, out);
        }
        let mut at = offset;
        while at < range.end {
            let stop = range.end.min((page_of(at) + 1) * PAGE_SIZE);
            let piece = &mut out[(at - offset) as usize..(stop - offset) as usize];
            // A memory file cannot fail to be read; should it, a page allocated too
            // many is the lesser evil.
            let known = self.all_known(at, stop) || self.learn(page_of(at));
            if known || !self.read_file(at, piece) {
                memory.read(at, piece)?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Reads through the file; what it does not have, or cannot give, counts as zeros.
    fn read_file(&self, offset: u64, out: &mut [u8]) -> bool {
        let read = memfd::read_at(&self.fd, out, offset);
        out[*read.as_ref().unwrap_or(&0)..].fill(0);
        read.is_ok()
    }

    /// A copy of the `T` at `offset`.
    pub(super) fn load<T: FromBytes>(&self, offset: u64) -> Result<T, OutOfRange> {
        let len = size_of::<T>() as u64;
        let range = checked_range(offset, len, self.size())?;
        if let Some(memory) = &self.memory
            && self.all_known(offset, range.end)
        {
            return memory.load(offset);
        }
        let mut bytes = vec![0; size_of::<T>()];
        self.read(offset, &mut bytes)?;
        T::read_from_bytes(&bytes).map_err(|_| OutOfRange {
            offset,
            len,
            size: self.size(),
        })
    }

    fn all_known(&self, start: u64, end: u64) -> bool {
        (page_of(start)..pages_for(end)).all(|page| {
            let word = &self.known[(page / 64) as usize];
            word.load(Ordering::Relaxed) >> (page % 64) & 1 == 1
        })
    }

    /// Asks the file whether `page` is data, and remembers the run that it lies in.
    #[cold]
    fn learn(&self, page: u64) -> bool {
        let from = page * PAGE_SIZE;
        let Ok(Some(data)) = memfd::next_data(&self.fd, from) else {
            return false;
        };
        if page_of(data.start) > page {
            return false;
        }
        for page in page..pages_for(data.end.min(self.size())) {
            let word = &self.known[(page / 64) as usize];
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
        true
    }
}
