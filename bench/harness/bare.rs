//! The kernel's own operations by plain system calls: what the crate is measured by.
//!
//! The only unsafe code that both benches share. Numbers and structures of `include/uapi/linux/userfaultfd.h` and
//! `include/uapi/linux/fs.h`, Linux 6.18.

#![allow(unsafe_code, reason = "bare system calls are the baseline")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use uffd_sync::units::PAGE_SIZE;

/// Mapped pages of this process.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    pub(crate) address: u64,
    pub(crate) len: u64,
}

const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const UFFDIO_WRITEPROTECT: u64 = 0xC018_AA06;
const PAGEMAP_SCAN: u64 = 0xC060_6610;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// `PAGEFAULT_FLAG_WP`, `WP_HUGETLBFS_SHMEM`, `WP_UNPOPULATED`, `WP_ASYNC`.
const FEATURES: u64 = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15;
const WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 2;
const WRITEPROTECT_MODE_WP: u64 = 1;
/// `PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC`.
const SCAN_AND_PROTECT: u64 = 3;
const PAGE_IS_WRITTEN: u64 = 2;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct PageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    categories: u64,
}

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

/// A userfaultfd over one mapping, without anything around it.
pub(crate) struct BareUffd(OwnedFd);

impl BareUffd {
    /// Registers a mapping for asynchronous write-protection.
    pub(crate) fn new(span: Span) -> io::Result<Self> {
        let uffd = Self(open()?);
        uffd.ask(UFFDIO_API, &mut [0xAA, FEATURES, 0])?;
        uffd.ask(
            UFFDIO_REGISTER,
            &mut [span.address, span.len, REGISTER_MODE_WP, 0],
        )?;
        Ok(uffd)
    }

    /// Registers a mapping for synchronous write-protection: stores wait.
    pub(crate) fn new_sync(span: Span) -> io::Result<Self> {
        let uffd = Self(open()?);
        uffd.ask(UFFDIO_API, &mut [0xAA, FEATURES & !WP_ASYNC, 0])?;
        uffd.ask(
            UFFDIO_REGISTER,
            &mut [span.address, span.len, REGISTER_MODE_WP, 0],
        )?;
        Ok(uffd)
    }

    /// Lifts the protection of all of it.
    pub(crate) fn lift(&self, span: Span) -> io::Result<()> {
        self.ask(UFFDIO_WRITEPROTECT, &mut [span.address, span.len, 0])
    }

    /// Reads one fault and lifts its page; false if none waits.
    pub(crate) fn answer_one(&self) -> io::Result<bool> {
        let mut message = [0u64; 4];
        // SAFETY: required: 32 writable bytes; they are a local.
        let got = unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
        if got != 32 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock => Ok(false),
                _ => Err(error),
            };
        }
        let address = message[2];
        let len = PAGE_SIZE;
        self.lift(Span { address, len }).map(|()| true)
    }

    /// Waits for a fault.
    pub(crate) fn wait(&self, time: std::time::Duration) -> io::Result<()> {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: required: one `struct pollfd`; it is a local.
        let answer = unsafe { libc::poll(&raw mut poll, 1, time.as_millis() as i32) };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Protects all of it.
    pub(crate) fn protect(&self, span: Span) -> io::Result<()> {
        self.ask(
            UFFDIO_WRITEPROTECT,
            &mut [span.address, span.len, WRITEPROTECT_MODE_WP],
        )
    }

    fn ask<const N: usize>(&self, request: u64, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: required: the structure that the request takes. Each of the three
        // used here consists of 64-bit words only, as many as its number's size
        // field says: 24, 32 and 24 bytes.
        let answer = unsafe { libc::ioctl(self.0.as_raw_fd(), request, words.as_mut_ptr()) };
        if answer < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    for extra in [0, UFFD_USER_MODE_ONLY] {
        // SAFETY: required: nothing; the call takes numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | extra) };
        if fd >= 0 {
            // SAFETY: required: an open descriptor without an owner; just made.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        }
    }
    Err(io::Error::last_os_error())
}

/// `/proc/self/pagemap` and room for the answer.
pub(crate) struct BareScan {
    pagemap: File,
    regions: Vec<PageRegion>,
}

impl BareScan {
    /// One that takes up to `room` ranges.
    pub(crate) fn new(room: usize) -> io::Result<Self> {
        Ok(Self {
            pagemap: File::open("/proc/self/pagemap")?,
            regions: vec![PageRegion::default(); room],
        })
    }

    /// Scans and protects in one call.
    pub(crate) fn protect(&mut self, span: Span) -> io::Result<&[PageRegion]> {
        self.scan(span, SCAN_AND_PROTECT)
    }

    /// Looks only.
    pub(crate) fn look(&mut self, span: Span) -> io::Result<&[PageRegion]> {
        self.scan(span, 0)
    }

    fn scan(&mut self, span: Span, flags: u64) -> io::Result<&[PageRegion]> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start: span.address,
            end: span.address + span.len,
            walk_end: 0,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: PAGE_IS_WRITTEN,
            category_anyof_mask: 0,
            return_mask: PAGE_IS_WRITTEN,
        };
        // SAFETY: required: a `struct pm_scan_arg` whose `vec` has room for
        // `vec_len` ranges. It is the vector just named, borrowed exclusively.
        let found = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        match usize::try_from(found) {
            Ok(found) => Ok(&self.regions[..found]),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

/// Number of pages in the ranges of a scan.
pub(crate) fn pages_in(regions: &[PageRegion]) -> u64 {
    regions
        .iter()
        .map(|region| (region.end - region.start) / PAGE_SIZE)
        .sum()
}
