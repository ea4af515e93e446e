//! A memfd mapped twice, as a writer and as its engine see it.

use std::os::fd::OwnedFd;
use std::ptr;

use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::memfd;
use uffd_sync::units::PAGE_SIZE;

use crate::harness::Span;

/// Memory that the bench stores to, every page allocated.
pub(crate) struct Memory {
    pub(crate) writer: Mapping,
    pub(crate) fd: OwnedFd,
}

impl Memory {
    /// `pages` pages of memory, each of which holds its number.
    pub(crate) fn new(pages: u64) -> anyhow::Result<Self> {
        let len = pages * PAGE_SIZE;
        let fd = memfd::create("bench-track", len)?;
        let writer = Mapping::shared(&fd, len, Access::ReadWrite)?;
        let memory = Self { writer, fd };
        for page in 0..pages {
            memory.store(page, page);
        }
        Ok(memory)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.writer.len() / PAGE_SIZE
    }

    /// A store as programs make them: eight bytes, once.
    #[inline]
    pub(crate) fn store(&self, page: u64, value: u64) {
        assert!(page < self.pages());
        // SAFETY: required: eight aligned, writable bytes that no reference covers.
        // The page lies within the mapping (asserted); slices of it are made by
        // `as_slice` only, whose callers do not store meanwhile.
        unsafe { ptr::write_volatile(self.at(page).cast::<u64>(), value) }
    }

    /// What [`Memory::store`] stored.
    pub(crate) fn load(&self, page: u64) -> u64 {
        assert!(page < self.pages());
        // SAFETY: as for `store`, for reading.
        unsafe { ptr::read_volatile(self.at(page).cast::<u64>()) }
    }

    /// Overwrites a whole page.
    pub(crate) fn fill(&self, page: u64, bytes: &[u8; PAGE_SIZE as usize]) {
        assert!(page < self.pages());
        // SAFETY: required: as for `store`, for a whole page; `bytes` is elsewhere.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(page), bytes.len()) }
    }

    pub(crate) fn span(&self) -> Span {
        Span {
            address: self.writer.address(),
            len: self.writer.len(),
        }
    }

    fn at(&self, page: u64) -> *mut u8 {
        self.writer
            .as_ptr()
            .wrapping_add((page * PAGE_SIZE) as usize)
    }

    /// All of it; nobody stores while the slice lives.
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: required: mapped, initialised bytes that do not change while the
        // slice lives. The mapping is as long and lives with `self`; this program
        // has one thread that stores, and it holds no slice while it does.
        unsafe { std::slice::from_raw_parts(self.writer.as_ptr(), self.writer.len() as usize) }
    }
}
