//! `PAGEMAP_SCAN`: which pages of a mapping were written since they were armed.
//!
//! The descriptor of `/proc/PID/pagemap` can be passed to another process, which
//! then scans that process's memory. A process that has exited scans as clean,
//! on some kernels without an error (others answer `ESRCH`): whoever scans
//! another process watches its pidfd as well.
//!
//! Order of use: scan and protect, then copy, then send. What is written after
//! the scan is reported by the next one; copying first loses stores.
//!
//! After an error the marks of a part of the range may be gone already: what was
//! to be scanned is then compared whole.
#![allow(unsafe_code, reason = "an ioctl that nix does not have")]

use std::fs::File;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::{SysError, check, duplicate, kind_of};
use crate::units::pages_for;

/// `PAGEMAP_SCAN`: `_IOWR('f', 16, struct pm_scan_arg)`, 96 bytes.
const PAGEMAP_SCAN: u64 = 0xC060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WPALLOWED: u64 = 1 << 0;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_HUGE: u64 = 1 << 6;
/// `f_type` of a file in `/proc`.
const PROC_SUPER_MAGIC: u64 = 0x9FA0;
/// Ranges taken from the kernel in one call: 12 KiB of stack.
const BATCH: usize = 512;

/// `struct pm_scan_arg` of `include/uapi/linux/fs.h`, Linux 6.18.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = {
    assert!(size_of::<ScanArg>() == 96);
    assert!(size_of::<PageRegion>() == 24);
};

/// What a scan does to the pages it reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// They stay reported.
    Leave,
    /// They are protected again in the same step: the next store is reported anew.
    Protect,
}

/// An open `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct Pagemap(OwnedFd);

impl Pagemap {
    /// Opens this process's own.
    ///
    /// # Errors
    /// `ENOENT` where `/proc` is not mounted, `EACCES` where the process may not
    /// be inspected (not dumpable).
    pub fn open_self() -> Result<Pagemap, SysError> {
        let file = File::open("/proc/self/pagemap").map_err(|e| {
            SysError::new("open /proc/self/pagemap", e).with_remedy(
                "mount /proc with the process visible, and keep the process dumpable (prctl PR_SET_DUMPABLE)",
            )
        })?;
        Ok(Pagemap(file.into()))
    }

    /// Takes a descriptor that another process passed.
    ///
    /// # Errors
    /// `EINVAL` if it is not a `pagemap` of `/proc`.
    pub fn from_fd(fd: OwnedFd) -> Result<Pagemap, SysError> {
        let refuse = || SysError::os("taking a pagemap", libc::EINVAL);
        let fs = nix::sys::statfs::fstatfs(&fd).map_err(|e| SysError::new("fstatfs", e))?;
        if fs.filesystem_type().0 as u64 != PROC_SUPER_MAGIC {
            return Err(refuse());
        }
        let path = kind_of(&fd)?;
        let name = path.file_name().and_then(|name| name.to_str());
        if !matches!(name, Some("pagemap" | "pagemap (deleted)")) {
            return Err(refuse());
        }
        Ok(Pagemap(fd))
    }

    /// A duplicate, to pass on.
    ///
    /// # Errors
    /// `EMFILE` if the process is out of descriptors.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, SysError> {
        duplicate(self)
    }

    /// Appends the address ranges within `start .. end` that were written since
    /// they were protected, in rising order, and answers where the scan stopped:
    /// at `end`, or before it once `max_ranges` ranges or `max_pages` pages were
    /// found. Go on from there.
    ///
    /// `start` and `end` are page addresses of one mapping, registered in
    /// asynchronous mode and protected once by [`super::uffd::Uffd::protect`].
    /// Adjacent ranges are merged within one call.
    ///
    /// # Errors
    /// `EPERM` (with [`Then::Protect`]) if a part is not registered so; `EINVAL`
    /// if a limit is 0; `ENOTTY` on a kernel without the call. After an error
    /// treat the whole range as unknown.
    pub fn scan_written(
        &self,
        start: u64,
        end: u64,
        out: &mut Vec<Range<u64>>,
        max_ranges: usize,
        max_pages: u64,
        then: Then,
    ) -> Result<u64, SysError> {
        if max_ranges == 0 || max_pages == 0 {
            return Err(SysError::os("PAGEMAP_SCAN without room", libc::EINVAL));
        }
        let flags = match then {
            Then::Leave => 0,
            Then::Protect => PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        };
        let first = out.len();
        let mut at = start;
        let mut pages_left = max_pages;
        while at < end && pages_left > 0 {
            let room = max_ranges.saturating_sub(out.len() - first);
            if room == 0 {
                break;
            }
            let question = ScanArg {
                flags,
                max_pages: pages_left,
                ..scan(at, end, PAGE_IS_WRITTEN)
            };
            at = self.ask(question, room, &mut |region| {
                pages_left = pages_left.saturating_sub(pages_for(region.end - region.start));
                match out[first..].last_mut() {
                    Some(last) if last.end == region.start => last.end = region.end,
                    _ => out.push(region),
                }
            })?;
        }
        Ok(at)
    }

    /// How many bytes of `start .. end` are still registered for asynchronous
    /// write-protection; less than asked means that a mapping was moved, unmapped
    /// or unregistered.
    ///
    /// # Errors
    /// `ENOTTY` on a kernel without the call.
    pub fn tracked_bytes(&self, start: u64, end: u64) -> Result<u64, SysError> {
        self.bytes_of(start, end, PAGE_IS_WPALLOWED)
    }

    /// Calls `add` with the parts of `start .. end` whose stores wait, of a mapping that is
    /// registered in synchronous mode, in rising order. Pages that were never there count
    /// as such wherever something is mapped, whether or not it is registered.
    ///
    /// # Errors
    /// `ESRCH` if the process is gone, `ENOTTY` on a kernel without the call.
    pub fn protected(
        &self,
        start: u64,
        end: u64,
        add: &mut dyn FnMut(Range<u64>),
    ) -> Result<(), SysError> {
        let mut at = start;
        while at < end {
            let question = ScanArg {
                category_inverted: PAGE_IS_WRITTEN,
                ..scan(at, end, PAGE_IS_WRITTEN)
            };
            at = self.ask(question, BATCH, add)?;
        }
        Ok(())
    }

    /// How many bytes of `start .. end` are mapped by huge pages now.
    ///
    /// # Errors
    /// `ENOTTY` on a kernel without the call.
    pub fn huge_bytes(&self, start: u64, end: u64) -> Result<u64, SysError> {
        self.bytes_of(start, end, PAGE_IS_HUGE)
    }

    fn bytes_of(&self, start: u64, end: u64, category: u64) -> Result<u64, SysError> {
        let mut total = 0;
        let mut at = start;
        while at < end {
            let question = scan(at, end, category);
            at = self.ask(question, BATCH, &mut |range| {
                total += range.end - range.start;
            })?;
        }
        Ok(total)
    }

    /// One call: at most `room` ranges go to `add`; answers where the walk ended.
    fn ask(
        &self,
        mut arg: ScanArg,
        room: usize,
        add: &mut dyn FnMut(Range<u64>),
    ) -> Result<u64, SysError> {
        let mut regions = [const { MaybeUninit::<PageRegion>::uninit() }; BATCH];
        arg.vec = regions.as_mut_ptr() as u64;
        arg.vec_len = room.min(BATCH) as u64;
        // SAFETY: required: `arg` is a valid `struct pm_scan_arg` whose `vec` has
        // room for `vec_len` ranges. Both are locals; `vec_len <= BATCH`.
        let found = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let found = check("PAGEMAP_SCAN", found.into()).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOTTY) => e.with_remedy("use Linux 6.7 or newer"),
            _ => e,
        })? as usize;
        for region in &regions[..found.min(BATCH)] {
            // SAFETY: required: the element is initialised. The kernel says how
            // many it wrote, and they are the first ones.
            let region = unsafe { region.assume_init() };
            add(region.start..region.end);
        }
        if arg.walk_end <= arg.start {
            return Err(SysError::os("PAGEMAP_SCAN without progress", libc::EIO));
        }
        Ok(arg.walk_end)
    }
}

/// A question for pages of one category in `start .. end`, without a limit.
fn scan(start: u64, end: u64, category: u64) -> ScanArg {
    ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 0,
        category_inverted: 0,
        category_mask: category,
        category_anyof_mask: 0,
        return_mask: category,
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
