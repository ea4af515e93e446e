//! The hold page: a reader's way to have the next apply wait for it.
//!
//! One page, written by one reader, looked at by the engine; so a hostile reader
//! disturbs only itself. While the word is raised the engine puts the next apply
//! off, for at most [`HOLD_MAX_MS`](crate::limits::HOLD_MAX_MS). An apply that had
//! begun before the engine looked goes on, so the reader still validates what it
//! copied.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use super::{RegionError, sys};
use crate::shm::SharedMemory;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::units::PAGE_SIZE;

/// 1 while the reader wants the content to stay.
const WORD: u64 = 0x00;

/// A reader's hold page: its own, or the engine's look at it.
#[derive(Clone, Debug)]
pub struct HoldPage(SharedMemory);

impl HoldPage {
    /// The reader's side: makes one, and a descriptor to pass to the engine.
    ///
    /// # Errors
    /// [`RegionError::Sys`] where the kernel refuses.
    pub fn create() -> Result<(Self, OwnedFd), RegionError> {
        let action = sys("creating a hold page");
        let fd = memfd::create("uffd-sync-hold", PAGE_SIZE).map_err(&action)?;
        memfd::add_seals(&fd, Seals::SHRINK | Seals::GROW | Seals::SEAL).map_err(&action)?;
        let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        Ok((Self(SharedMemory::new(mapping)), fd))
    }

    /// The engine's side: maps what a reader passed, for reading.
    ///
    /// # Errors
    /// [`RegionError::Foreign`] if it is not one page sealed against resizing.
    pub fn open(fd: impl AsFd) -> Result<Self, RegionError> {
        let action = sys("opening a hold page");
        let foreign = |problem| RegionError::Foreign {
            page: "hold page",
            problem,
        };
        let seals = memfd::seals(&fd).map_err(&action)?;
        if !seals.contains(Seals::SHRINK | Seals::GROW) {
            return Err(foreign("it is not sealed against resizing"));
        }
        if memfd::size(&fd).map_err(&action)? != PAGE_SIZE {
            return Err(foreign("its length is another"));
        }
        let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadOnly).map_err(&action)?;
        Ok(Self(SharedMemory::new(mapping)))
    }

    /// Whether the reader asks the next apply to wait.
    pub fn is_raised(&self) -> bool {
        self.0.atomic_u32(WORD).load(Ordering::Acquire) != 0
    }

    /// Raises it until what is returned is dropped.
    pub(super) fn raise(&self) -> Raised<'_> {
        self.0.atomic_u32(WORD).store(1, Ordering::Release);
        Raised(self)
    }
}

/// A hold that is raised.
pub(super) struct Raised<'a>(&'a HoldPage);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.0.atomic_u32(WORD).store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_sees_a_raised_hold_and_refuses_other_memory() {
        let (hold, fd) = HoldPage::create().unwrap();
        let engine = HoldPage::open(&fd).unwrap();
        assert!(!engine.is_raised());
        let raised = hold.raise();
        assert!(engine.is_raised());
        drop(raised);
        assert!(!engine.is_raised());
        let unsealed = memfd::create("hold-test", PAGE_SIZE).unwrap();
        assert!(HoldPage::open(&unsealed).is_err());
        let long = memfd::create("hold-test", 2 * PAGE_SIZE).unwrap();
        memfd::add_seals(&long, Seals::SHRINK | Seals::GROW).unwrap();
        assert!(HoldPage::open(&long).is_err());
    }
}
