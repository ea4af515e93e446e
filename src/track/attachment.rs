//! One writing process's mapping of a region, as its tracker sees it.
//!
//! The writer opens and registers; the engine, in the same process or another,
//! arms and scans through the descriptors it was given (they work
//! from another process, even where the writer runs unprivileged).

use std::os::fd::OwnedFd;

use super::TrackError;
use crate::sys::behaviour::Behaviour;
use crate::sys::map::Mapping;
use crate::sys::pagemap::Pagemap;
use crate::sys::process::PidFd;
use crate::sys::uffd::Uffd;
use crate::units::{PAGE_SIZE, checked_range, page_align_up};
use crate::words::Mode;

/// Pages protected by one call while a whole mapping is armed: 0.25 ms at 60 ns
/// each.
pub(super) const ARM_SPAN: u64 = 4096 * PAGE_SIZE;

/// No such process: the answer of protecting and scanning once the address space is
/// gone (`include/uapi/asm-generic/errno-base.h`).
pub(super) const ESRCH: i32 = 3;

/// What tracking needs of one writing process.
#[derive(Debug)]
pub struct Attachment {
    /// Write-protects the mapping; with [`Mode::Async`] and [`Mode::Sync`] only.
    pub uffd: Option<Uffd>,
    /// Reports the pages written; with [`Mode::Async`] and [`Mode::Sync`] only.
    pub pagemap: Option<Pagemap>,
    /// The process: a dead one scans as clean.
    pub pidfd: PidFd,
    /// Address of the mapping in that process.
    pub base: u64,
    /// Length of the mapping in bytes, whole pages.
    pub len: u64,
    /// Tells it apart among the writers of one region.
    pub slot: u32,
}

impl Attachment {
    /// The writer's side: opens what `mode` needs for a mapping of this process and
    /// registers it. Nothing is protected yet: the engine arms.
    ///
    /// # Errors
    /// [`TrackError::Open`] where the kernel refuses, with its remedy;
    /// [`TrackError::Denied`] if its scans do not behave as tracking needs it.
    pub fn for_region(mapping: &Mapping, mode: Mode) -> Result<Self, TrackError> {
        let open = |source| TrackError::Open { source };
        let (mut uffd, mut pagemap) = (None, None);
        if protects(mode) {
            let opened = match mode {
                Mode::Sync => Uffd::open_sync(),
                _ => Uffd::open_async(),
            };
            let opened = opened.map_err(open)?;
            Behaviour::of_process().allows_tracking()?;
            opened.register_wp(mapping).map_err(open)?;
            uffd = Some(opened);
            pagemap = Some(Pagemap::open_self().map_err(open)?);
        }
        Ok(Self {
            uffd,
            pagemap,
            pidfd: PidFd::own().map_err(open)?,
            base: mapping.address(),
            len: mapping.len(),
            slot: 0,
        })
    }

    /// The engine's side: takes what a writer passed for a region of `size` bytes and
    /// checks that each descriptor is of the kind it is said to be.
    ///
    /// # Errors
    /// [`TrackError::Open`] for a descriptor of another kind,
    /// [`TrackError::Incomplete`] if one that `mode` needs is missing,
    /// [`TrackError::Range`] if the address range is not that of such a mapping.
    pub fn from_parts(
        mode: Mode,
        uffd: Option<OwnedFd>,
        pagemap: Option<OwnedFd>,
        pidfd: OwnedFd,
        base: u64,
        size: u64,
    ) -> Result<Self, TrackError> {
        let open = |source| TrackError::Open { source };
        let len = page_align_up(size);
        let fits = checked_range(base, len, u64::MAX - PAGE_SIZE).is_ok();
        if len == 0 || !fits || !base.is_multiple_of(PAGE_SIZE) {
            return Err(TrackError::Range { base, len });
        }
        let (mut kept_uffd, mut kept_pagemap) = (None, None);
        if protects(mode) {
            let uffd = uffd.ok_or(TrackError::Incomplete)?;
            let pagemap = pagemap.ok_or(TrackError::Incomplete)?;
            kept_uffd = Some(Uffd::from_fd(uffd).map_err(open)?);
            kept_pagemap = Some(Pagemap::from_fd(pagemap).map_err(open)?);
        }
        Ok(Self {
            uffd: kept_uffd,
            pagemap: kept_pagemap,
            pidfd: PidFd::from_fd(pidfd).map_err(open)?,
            base,
            len,
            slot: 0,
        })
    }

    /// Write-protects everything, at about 60 ns a page; what is in it counts as
    /// captured from now on. [`super::Capture::full`] arms in slices by itself.
    ///
    /// # Errors
    /// [`TrackError::Arm`]; [`TrackError::WriterExited`] if the process is gone.
    pub fn arm(&self) -> Result<(), TrackError> {
        let mut at = 0;
        while at < self.len {
            let len = ARM_SPAN.min(self.len - at);
            self.arm_range(at, len)?;
            at += len;
        }
        Ok(())
    }

    /// Write-protects `len` bytes at `offset` of the region, whole pages. Does
    /// nothing in modes that do not write-protect.
    ///
    /// # Errors
    /// As for [`Attachment::arm`].
    pub fn arm_range(&self, offset: u64, len: u64) -> Result<(), TrackError> {
        let Some(uffd) = &self.uffd else {
            return Ok(());
        };
        uffd.protect(self.base + offset, len)
            .map_err(|source| match source.raw_os_error() {
                Some(ESRCH) => TrackError::WriterExited,
                _ => TrackError::Arm {
                    offset,
                    len,
                    source,
                },
            })
    }

    /// Lifts the protection of `len` bytes at `offset`, whole pages: they count as
    /// written until they are armed again.
    ///
    /// # Errors
    /// As for [`Attachment::arm`].
    pub(super) fn open_range(&self, offset: u64, len: u64) -> Result<(), TrackError> {
        let Some(uffd) = &self.uffd else {
            return Ok(());
        };
        uffd.unprotect(self.base + offset, len)
            .map_err(|source| match source.raw_os_error() {
                Some(ESRCH) => TrackError::WriterExited,
                _ => TrackError::Arm {
                    offset,
                    len,
                    source,
                },
            })
    }

    /// Whether the writing process has exited; an unreadable answer counts as yes.
    pub fn has_exited(&self) -> bool {
        self.pidfd.has_exited().unwrap_or(true)
    }
}

/// Whether a mode write-protects, and so needs a userfaultfd and a page map.
fn protects(mode: Mode) -> bool {
    matches!(mode, Mode::Async | Mode::Sync)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::Access;
    use crate::sys::memfd;
    use crate::sys::process::EventFd;

    fn other_fd() -> OwnedFd {
        EventFd::new().unwrap().try_clone_fd().unwrap()
    }

    fn own_pid() -> OwnedFd {
        PidFd::own().unwrap().try_clone_fd().unwrap()
    }

    #[test]
    fn descriptors_of_other_kinds_are_refused() {
        let take = Attachment::from_parts;
        assert!(take(Mode::Manual, None, None, own_pid(), 4096, 10).is_ok());
        for base in [0x1001, u64::MAX - 4095, u64::MAX - 8191] {
            assert!(matches!(
                take(Mode::Manual, None, None, own_pid(), base, 8192),
                Err(TrackError::Range { .. })
            ));
        }
        assert!(matches!(
            take(Mode::Manual, None, None, own_pid(), 4096, u64::MAX),
            Err(TrackError::Range { .. })
        ));
        assert!(matches!(
            take(Mode::Manual, None, None, other_fd(), 4096, 10),
            Err(TrackError::Open { .. })
        ));
        assert!(matches!(
            take(Mode::Async, Some(other_fd()), None, own_pid(), 4096, 10),
            Err(TrackError::Incomplete)
        ));
        assert!(matches!(
            take(
                Mode::Async,
                Some(other_fd()),
                Some(other_fd()),
                own_pid(),
                4096,
                10
            ),
            Err(TrackError::Open { .. })
        ));
    }

    #[test]
    fn modes_without_protection_open_no_userfaultfd() {
        let fd = memfd::create("track-test", 4096).unwrap();
        let mapping = Mapping::shared(&fd, 4096, Access::ReadWrite).unwrap();
        let attachment = Attachment::for_region(&mapping, Mode::Manual).unwrap();
        assert!(attachment.uffd.is_none() && attachment.pagemap.is_none());
        assert!(!attachment.has_exited());
        attachment.arm().unwrap();
    }
}
