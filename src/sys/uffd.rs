//! userfaultfd in write-protect mode, asynchronous or synchronous.
//!
//! Asynchronous (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7): the kernel answers a store
//! to a protected page itself: it lifts the protection of that page and goes on.
//! Which pages lost their protection is what `PAGEMAP_SCAN` then reports
//! ([`super::pagemap`]).
//!
//! Synchronous: a store to a protected page waits until whoever reads the
//! descriptor ([`Uffd::read_faults`]) lifts the protection. A message that was read
//! is not delivered again; closing the last duplicate of the descriptor, as the
//! kernel does for a process that dies, lets every waiting thread go on.
//!
//! Protection belongs to one mapping of one process; what is written by other ways
//! is not seen (the tests in `facts.rs` name the ways).
//!
//! The descriptor works from another process: its calls act on the address
//! space of the process that opened it. After that process has exited they
//! answer `ESRCH`.
#![allow(
    unsafe_code,
    reason = "system calls that nix does not have, and ownership of the descriptor"
)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use userfaultfd::RegisterMode;

use super::map::Mapping;
use super::{SysError, check, duplicate, kind_of};
use crate::units::{PAGE_SIZE, checked_range};

/// `UFFDIO_API`: `_IOWR(0xAA, 0x3F, struct uffdio_api)`, 24 bytes.
const UFFDIO_API: u64 = 0xC018_AA3F;
/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`: `_IO(0xAA, 0x00)`.
const USERFAULTFD_IOC_NEW: u64 = 0xAA00;
/// The value that `uffdio_api.api` has to hold.
const API: u64 = 0xAA;
/// Answers of `EAGAIN` (the address space is changing) taken before giving up.
const MAX_RETRIES: u32 = 10_000;

bitflags::bitflags! {
    /// Features asked of the kernel, bits of `uffdio_api.features`
    /// (`include/uapi/linux/userfaultfd.h`, Linux 6.18).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Write-protect faults exist.
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// Write-protection of shared memory and huge pages (Linux 5.19).
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Pages that were never touched can be protected too (Linux 6.4).
        const WP_UNPOPULATED = 1 << 13;
        /// The kernel lifts protection by itself (Linux 6.7).
        const WP_ASYNC = 1 << 15;
    }
}

/// Messages taken from the kernel by one read: 2 KiB.
const FAULTS_AT_ONCE: usize = 64;
/// Bytes of a `struct uffd_msg` (`include/uapi/linux/userfaultfd.h`).
const MESSAGE: usize = 32;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
/// `UFFD_PAGEFAULT_FLAG_WP`: the page is there and protected.
const FLAG_WP: u64 = 1 << 1;

/// What a descriptor in synchronous mode tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A store to the protected page at this address waits.
    Protected {
        /// The page's address in the registering process.
        address: u64,
    },
    /// Something that the modes of this crate never ask the kernel for: whoever
    /// opened the descriptor wants other things of it.
    Foreign {
        /// `uffd_msg.event`.
        event: u8,
    },
}

/// Messages that were read and not yet taken. Allocates nothing.
#[derive(Debug)]
pub struct Faults {
    bytes: [u8; FAULTS_AT_ONCE * MESSAGE],
    next: usize,
    end: usize,
}

impl Faults {
    /// None yet.
    pub fn new() -> Faults {
        Faults {
            bytes: [0; FAULTS_AT_ONCE * MESSAGE],
            next: 0,
            end: 0,
        }
    }

    /// Whether all were taken.
    pub fn is_empty(&self) -> bool {
        self.next == self.end
    }
}

impl Drop for Faults {
    /// What nobody took may carry descriptors.
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

impl Default for Faults {
    fn default() -> Self {
        Self::new()
    }
}

impl Iterator for Faults {
    type Item = Fault;

    fn next(&mut self) -> Option<Fault> {
        if self.is_empty() {
            return None;
        }
        let message = &self.bytes[self.next..self.next + MESSAGE];
        self.next += MESSAGE;
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&message[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        let event = message[0];
        let address = word(16);
        if event == EVENT_PAGEFAULT && word(8) & FLAG_WP != 0 {
            return Some(Fault::Protected { address });
        }
        if event == EVENT_FORK {
            // SAFETY: required: an open descriptor without an owner. Reading a fork
            // event makes one in the reading process, whose number the message
            // carries in its second word; messages come from the kernel only.
            drop(unsafe { OwnedFd::from_raw_fd(word(8) as u32 as i32) });
        }
        Some(Fault::Foreign { event })
    }
}

/// How the descriptor was had; shown by `doctor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenedBy {
    /// `userfaultfd(2)`, able to handle faults of the kernel too.
    SystemCall,
    /// `userfaultfd(2)` with `UFFD_USER_MODE_ONLY`, as unprivileged processes may.
    UserModeOnly,
    /// `/dev/userfaultfd`.
    Device,
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);

/// A userfaultfd, nonblocking and closed on exec. Closing the last duplicate
/// stops the tracking of what was registered with it.
#[derive(Debug)]
pub struct Uffd(userfaultfd::Uffd);

impl Uffd {
    /// Opens one for this process in asynchronous write-protect mode.
    ///
    /// # Errors
    /// `EPERM` or `ENOSYS` where the system refuses, `EINVAL` where the kernel is
    /// too old; each with its remedy.
    pub fn open_async() -> Result<Uffd, SysError> {
        Uffd::open(Features::all()).map(|(uffd, _)| uffd)
    }

    /// Opens one for this process in synchronous write-protect mode: stores to
    /// protected pages wait until they are answered.
    ///
    /// # Errors
    /// As for [`Uffd::open_async`].
    pub fn open_sync() -> Result<Uffd, SysError> {
        let features = Features::all() - Features::WP_ASYNC;
        Uffd::open(features).map(|(uffd, _)| uffd)
    }

    /// Opens one with the given features, and says how it was had.
    ///
    /// # Errors
    /// As for [`Uffd::open_async`].
    pub fn open(features: Features) -> Result<(Uffd, OpenedBy), SysError> {
        let (fd, opened_by) = open_fd()?;
        let mut api = UffdioApi {
            api: API,
            features: features.bits(),
            ioctls: 0,
        };
        // SAFETY: required: a valid pointer to a `struct uffdio_api` that the
        // kernel may write. It is a local of the asserted size.
        let answer = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        check("UFFDIO_API", answer.into()).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => {
                e.with_remedy("use Linux 6.7 or newer with CONFIG_PTE_MARKER_UFFD_WP=y")
            }
            _ => e,
        })?;
        Ok((Uffd::wrap(fd), opened_by))
    }

    /// Takes a descriptor that another process passed. It is nonblocking from now on,
    /// until that process changes it: the flag is shared with its duplicate.
    ///
    /// # Errors
    /// `EINVAL` if it is not a userfaultfd.
    pub fn from_fd(fd: OwnedFd) -> Result<Uffd, SysError> {
        if kind_of(&fd)?.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(SysError::os("taking a userfaultfd", libc::EINVAL));
        }
        let uffd = Uffd::wrap(fd);
        uffd.unblock()?;
        Ok(uffd)
    }

    /// Makes it nonblocking if a process that has a duplicate made it blocking; whether it
    /// was. A blocking one counts as broken for `poll(2)`, which then never waits.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn unblock(&self) -> Result<bool, SysError> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let refused = |e| SysError::new("fcntl of a userfaultfd", e);
        let flags = fcntl(self, FcntlArg::F_GETFL).map_err(refused)?;
        let flags = OFlag::from_bits_retain(flags);
        let is_blocking = !flags.contains(OFlag::O_NONBLOCK);
        if is_blocking {
            fcntl(self, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(refused)?;
        }
        Ok(is_blocking)
    }

    fn wrap(fd: OwnedFd) -> Uffd {
        // SAFETY: required: an open descriptor that nobody else closes.
        // `into_raw_fd` gives up the only owner.
        Uffd(unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) })
    }

    /// A duplicate, to pass on. The tracking lives until all are closed.
    ///
    /// # Errors
    /// `EMFILE` if the process is out of descriptors.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, SysError> {
        duplicate(self)
    }

    /// Registers a whole mapping of this process for write-protection. Nothing is
    /// protected yet.
    ///
    /// # Errors
    /// `EBUSY` if another userfaultfd has it, `EINVAL` if its memory cannot be
    /// write-protected (a file that is not in memory).
    pub fn register_wp(&self, mapping: &Mapping) -> Result<(), SysError> {
        self.0
            .register_with_mode(
                mapping.as_ptr().cast(),
                mapping.len() as usize,
                RegisterMode::WRITE_PROTECT,
            )
            .map_err(|e| convert("UFFDIO_REGISTER", e))?;
        Ok(())
    }

    /// Ends the registration of a whole mapping.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn unregister(&self, mapping: &Mapping) -> Result<(), SysError> {
        self.0
            .unregister(mapping.as_ptr().cast(), mapping.len() as usize)
            .map_err(|e| convert("UFFDIO_UNREGISTER", e))
    }

    /// Ends the registration of `len` bytes at `offset` of a mapping, whole pages.
    ///
    /// # Errors
    /// `EINVAL` if the range is not whole pages of the mapping.
    pub(super) fn unregister_part(
        &self,
        mapping: &Mapping,
        offset: u64,
        len: u64,
    ) -> Result<(), SysError> {
        let inside = checked_range(offset, len, mapping.len()).is_ok();
        if !inside || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(SysError::os("UFFDIO_UNREGISTER", libc::EINVAL));
        }
        let at = mapping.as_ptr().wrapping_add(offset as usize);
        self.0
            .unregister(at.cast(), len as usize)
            .map_err(|e| convert("UFFDIO_UNREGISTER", e))
    }

    /// Protects `len` bytes at address `start` of the registering process: the
    /// next store to each page is noticed. Both are multiples of the page size.
    ///
    /// # Errors
    /// `ESRCH` if that process has exited, `ENOENT` if the range is not registered.
    pub fn protect(&self, start: u64, len: u64) -> Result<(), SysError> {
        retry(|| self.0.write_protect(start as *mut _, len as usize))
    }

    /// Lifts protection: all of the range counts as written again.
    ///
    /// # Errors
    /// As for [`Uffd::protect`].
    pub fn unprotect(&self, start: u64, len: u64) -> Result<(), SysError> {
        retry(|| {
            self.0
                .remove_write_protection(start as *mut _, len as usize, true)
        })
    }
}

impl Uffd {
    /// Takes the messages that wait, up to a batch, and says how many there are; 0 if
    /// none waits. What was left in `faults` is kept for later: nothing is read then.
    /// Does not wait, even if a peer has made its descriptor blocking.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn read_faults(&self, faults: &mut Faults) -> Result<usize, SysError> {
        while faults.is_empty() {
            match self.read_now(&mut faults.bytes) {
                Ok(read) => {
                    faults.next = 0;
                    faults.end = read / MESSAGE * MESSAGE;
                    break;
                }
                Err(libc::EAGAIN) => return Ok(0),
                Err(libc::EINTR) => {}
                Err(errno) => return Err(SysError::os("read of a userfaultfd", errno)),
            }
        }
        Ok((faults.end - faults.next) / MESSAGE)
    }

    /// One read that never waits; else the error number.
    fn read_now(&self, bytes: &mut [u8]) -> Result<usize, i32> {
        let part = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: required: one part of writable bytes that stay where they are during
        // the call. It is `bytes`, borrowed for longer than that.
        let read =
            unsafe { libc::preadv2(self.0.as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
        if let Ok(read) = usize::try_from(read) {
            return Ok(read);
        }
        match nix::errno::Errno::last_raw() {
            // Before Linux 6.10 the flag alone says whether a read waits: it is set again
            // just before, so only a peer that changes it in that moment is waited for.
            libc::EOPNOTSUPP => {
                self.unblock()
                    .map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
                nix::unistd::read(self, bytes).map_err(|errno| errno as i32)
            }
            errno => Err(errno),
        }
    }

    /// Lets threads that wait for a page of the range try again, without lifting
    /// anything.
    ///
    /// # Errors
    /// As for [`Uffd::protect`].
    pub fn wake(&self, start: u64, len: u64) -> Result<(), SysError> {
        self.0
            .wake(start as *mut _, len as usize)
            .map_err(|e| convert("UFFDIO_WAKE", e))
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: required: the descriptor stays open while it is borrowed. The
        // inner object closes it on drop only, and it is borrowed with `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

fn retry(mut call: impl FnMut() -> userfaultfd::Result<()>) -> Result<(), SysError> {
    let mut tries = 0;
    loop {
        match call().map_err(|e| convert("UFFDIO_WRITEPROTECT", e)) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && tries < MAX_RETRIES => {
                tries += 1;
                std::thread::yield_now();
            }
            other => return other,
        }
    }
}

fn convert(call: &'static str, error: userfaultfd::Error) -> SysError {
    match error {
        userfaultfd::Error::SystemError(errno) => SysError::os(call, errno as i32),
        other => SysError::new(call, std::io::Error::other(other)),
    }
}

/// A bare userfaultfd, by the first way that works.
fn open_fd() -> Result<(OwnedFd, OpenedBy), SysError> {
    const UFFD_USER_MODE_ONLY: libc::c_int = 1;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    match system_call(flags) {
        Ok(fd) => return Ok((fd, OpenedBy::SystemCall)),
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
            return Err(e.with_remedy("use a kernel with CONFIG_USERFAULTFD=y"));
        }
        Err(e) => return Err(e),
    }
    // Before what is had by itself and handles no faults of the kernel.
    if let Ok(fd) = device(flags) {
        return Ok((fd, OpenedBy::Device));
    }
    match system_call(flags | UFFD_USER_MODE_ONLY) {
        Ok(fd) => Ok((fd, OpenedBy::UserModeOnly)),
        Err(refused) => Err(refused.with_remedy(
            "allow userfaultfd(2) in the container's seccomp profile, or give read-write access to /dev/userfaultfd",
        )),
    }
}

fn system_call(flags: libc::c_int) -> Result<OwnedFd, SysError> {
    // SAFETY: required: nothing; the call takes one number and no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = check("userfaultfd", fd)?;
    // SAFETY: required: an open descriptor without an owner; the kernel just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn device(flags: libc::c_int) -> Result<OwnedFd, SysError> {
    let device = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .map_err(|e| SysError::new("open /dev/userfaultfd", e))?;
    // SAFETY: required: the argument is what the request wants: a number of flags.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    let fd = check("USERFAULTFD_IOC_NEW", fd.into())?;
    // SAFETY: required: an open descriptor without an owner; the kernel just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
#[path = "uffd_tests.rs"]
mod tests;
