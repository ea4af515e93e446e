//! Mappings that own their address range and unmap it on drop.
//!
//! [`Mapping`] is shared memory of a file: other processes may write it at any
//! time, so no slice is ever made of it here; `shm/` reads and writes it.
//! [`PrivateMemory`] is this process's alone, so it is a plain slice.
//!
//! Invariants:
//! * I1: `ptr .. ptr + len` is mapped from creation to drop, by this object alone;
//!   a sealed mapping stays until the process ends.
//! * I2: a mapping of a file lies within the file at creation, but for the room to
//!   grow that was asked for, which nobody touches before the file has it; who shrinks
//!   an unsealed file later gets `SIGBUS` in its readers, so what comes from a peer
//!   is mapped only if it is sealed against shrinking.
#![allow(
    unsafe_code,
    reason = "mapping and unmapping memory, and making slices of private memory"
)]

use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::{SysError, check, memfd};
use crate::units::{MIB, PAGE_SIZE, checked_range, page_align_up};

/// Size and alignment of a huge page, in bytes.
const HUGE_PAGE: u64 = 2 * MIB;

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads only; a store is a `SIGSEGV`.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// Shared memory of a file, from its first byte on.
#[derive(Debug)]
pub struct Mapping {
    ptr: NonNull<u8>,
    len: u64,
    access: Access,
    /// Whether the kernel refuses to unmap it.
    sealed: AtomicBool,
}

// SAFETY: required: moving or sharing the object between threads is sound. It
// holds an address range that no thread owns, hands out raw pointers only, and
// unmaps the range in `drop`, which has exclusive access.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; no method changes the object behind `&self`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `fd`, rounded up to whole pages.
    ///
    /// # Errors
    /// `EINVAL` if `len` is zero or the file, in whole pages, is shorter;
    /// `EPERM` or `EACCES` if the file's seals or mode forbid the access.
    pub fn shared(fd: impl AsFd, len: u64, access: Access) -> Result<Mapping, SysError> {
        Self::with_room(fd, len, len, access)
    }

    /// Maps `room` bytes, of which the file has `len` now: what lies behind its end
    /// may be touched once the file has grown to it, and is a `SIGBUS` before.
    ///
    /// # Errors
    /// As for [`Mapping::shared`]; `EINVAL` if `room` is less than `len`.
    pub fn with_room(
        fd: impl AsFd,
        len: u64,
        room: u64,
        access: Access,
    ) -> Result<Mapping, SysError> {
        let fd = fd.as_fd();
        let must_have = page_align_up(len);
        if room < len {
            return Err(SysError::os("mmap of less than the file", libc::EINVAL));
        }
        let len = page_align_up(room);
        let map_len = usize::try_from(len)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or_else(|| SysError::os("mmap of zero bytes", libc::EINVAL))?;
        if page_align_up(memfd::size(fd)?) < must_have {
            return Err(SysError::os(
                "mmap beyond the end of the file",
                libc::EINVAL,
            ));
        }
        let prot = match access {
            Access::ReadOnly => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: required: the new mapping replaces no memory in use. No address
        // is asked for and MAP_FIXED is not given, so the kernel picks free range.
        let ptr = unsafe { mmap(None, map_len, prot, MapFlags::MAP_SHARED, fd, 0) }
            .map_err(|e| SysError::new("mmap", e))?;
        Ok(Mapping {
            ptr: ptr.cast(),
            len,
            access,
            sealed: AtomicBool::new(false),
        })
    }

    /// Mapped bytes, a multiple of the page size.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: an empty mapping cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first mapped byte; [`Mapping::len`] bytes are valid while this lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// What the mapping may be used for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The first byte's address, as the kernel's interfaces want it.
    pub fn address(&self) -> u64 {
        self.ptr.as_ptr() as u64
    }

    /// Leaves the mapping out of children made by `fork`: their stores would not
    /// be seen by write-protection.
    ///
    /// # Errors
    /// Whatever `madvise` says.
    pub fn dont_fork(&self) -> Result<(), SysError> {
        self.advise(MmapAdvise::MADV_DONTFORK)
    }

    /// Lets nothing in this process unmap, move or map over the memory, or change its
    /// access, for as long as the process lives (`mseal(2)`, Linux 6.10 on 64-bit
    /// machines). That cannot be undone: dropping the object leaves the memory mapped.
    ///
    /// # Errors
    /// `ENOSYS` on a kernel without the call, with the remedy.
    pub fn seal(&self) -> Result<(), SysError> {
        // The same number on all machines (`include/uapi/asm-generic/unistd.h`).
        const SYS_MSEAL: libc::c_long = 462;
        // SAFETY: required: nothing; the call changes what may be done to the range
        // later. I1 keeps it mapped, and `drop` leaves it alone from now on.
        let answer = unsafe { libc::syscall(SYS_MSEAL, self.ptr.as_ptr(), self.len as usize, 0) };
        check("mseal", answer).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM) => e.with_remedy(
                "use Linux 6.10 or newer on a 64-bit machine and allow mseal(2) in the \
                 container's seccomp profile, or leave the option mseal off",
            ),
            _ => e,
        })?;
        self.sealed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether it stays mapped until the process ends.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Relaxed)
    }

    /// The 32-bit word at `offset`, if it is aligned and lies within the mapping.
    /// Storing to a word of a read-only mapping is a `SIGSEGV`.
    pub(super) fn word(&self, offset: u64) -> Option<&AtomicU32> {
        let range = checked_range(offset, 4, self.len).ok()?;
        if !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: required: an aligned u32 that lives as long as the reference and
        // is accessed by atomics only. Range and alignment were just checked (a
        // mapping starts at a page), I1 keeps it mapped, and shared memory is
        // reached through atomics or `shm/` everywhere.
        Some(unsafe { AtomicU32::from_ptr(self.ptr.as_ptr().add(range.start as usize).cast()) })
    }

    /// Drops the page-table entries of whole pages, as memory pressure may; the
    /// file keeps its content, so nothing changes but the cost of the next access.
    ///
    /// # Errors
    /// `EINVAL` if the range is not whole pages of the mapping.
    pub(super) fn zap(&self, offset: u64, len: u64) -> Result<(), SysError> {
        let inside = checked_range(offset, len, self.len).is_ok();
        if !inside || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(SysError::os("madvise", libc::EINVAL));
        }
        // SAFETY: required: the range lies within the mapping (just checked), and
        // its content stays: on shared file memory DONTNEED drops entries only.
        unsafe {
            let at = self.ptr.add(offset as usize).cast();
            madvise(at, len as usize, MmapAdvise::MADV_DONTNEED)
        }
        .map_err(|e| SysError::new("madvise", e))
    }

    /// Asks for huge pages, where the system gives them to shared memory.
    ///
    /// # Errors
    /// `EINVAL` on a kernel that has none.
    pub(super) fn advise_huge(&self) -> Result<(), SysError> {
        self.advise(MmapAdvise::MADV_HUGEPAGE)
    }

    fn advise(&self, advice: MmapAdvise) -> Result<(), SysError> {
        // SAFETY: required: the range is mapped and the advice leaves its content
        // alone. I1; only DONTFORK and HUGEPAGE are ever given.
        unsafe { madvise(self.ptr.cast(), self.len as usize, advice) }
            .map_err(|e| SysError::new("madvise", e))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.is_sealed() {
            unmap(self.ptr, self.len);
        }
    }
}

/// Zeroed memory of this process alone: nothing is allocated before it is
/// touched, and it is left out of core dumps.
///
/// Worst case `len` bytes, rounded up to whole pages, once all was written.
#[derive(Debug)]
pub struct PrivateMemory {
    ptr: NonNull<u8>,
    /// Bytes mapped, whole pages.
    mapped: u64,
    /// Bytes of the slice.
    len: usize,
}

// SAFETY: required: the memory may be used from any one thread. It is private
// anonymous memory that this object alone refers to, like a `Box<[u8]>`.
unsafe impl Send for PrivateMemory {}
// SAFETY: as for `Send`; shared access gives `&[u8]` only.
unsafe impl Sync for PrivateMemory {}

impl PrivateMemory {
    /// `len` zero bytes, aligned to 2 MiB where that many.
    ///
    /// # Errors
    /// `ENOMEM` if the address space or its limit (`RLIMIT_AS`) is exhausted.
    pub fn new(len: u64) -> Result<PrivateMemory, SysError> {
        Self::with_room(len, len)
    }

    /// The same with address space for `room` bytes, to which it may [`grow`](Self::grow).
    ///
    /// # Errors
    /// As for [`PrivateMemory::new`].
    pub fn with_room(len: u64, room: u64) -> Result<PrivateMemory, SysError> {
        let too_large = || SysError::os("mmap of private memory", libc::ENOMEM);
        let mapped = page_align_up(len.max(room)).max(PAGE_SIZE);
        let slack = if mapped >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let asked = mapped
            .checked_add(slack)
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| isize::try_from(*n).is_ok())
            .and_then(NonZeroUsize::new)
            .ok_or_else(too_large)?;
        // SAFETY: required: no memory in use is replaced. No address is asked for.
        let base = unsafe {
            mmap_anonymous(
                None,
                asked,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }
        .map_err(|e| SysError::new("mmap", e))?
        .cast::<u8>();
        let head = if slack == 0 {
            0
        } else {
            (base.as_ptr() as u64).next_multiple_of(HUGE_PAGE) - base.as_ptr() as u64
        };
        // SAFETY: required: the results lie within the mapping just made. It has
        // `mapped + slack` bytes and `head` < 2 MiB = `slack`, or both are 0.
        let (ptr, end) = unsafe { (base.add(head as usize), base.add((head + mapped) as usize)) };
        if head > 0 {
            unmap(base, head);
        }
        if slack > head {
            unmap(end, slack - head);
        }
        let memory = PrivateMemory {
            ptr,
            mapped,
            len: len as usize,
        };
        memory.advise(0..mapped, MmapAdvise::MADV_DONTDUMP)?;
        Ok(memory)
    }

    /// Lengthens the slice to `len` bytes, or as far as there is room; says how long it is.
    pub fn grow(&mut self, len: u64) -> u64 {
        self.len = self.len.max(len.min(self.mapped) as usize);
        self.len as u64
    }

    /// Asks for huge pages in the whole 2 MiB spans inside `range`. A kernel that
    /// has none ignores it.
    pub fn advise_huge(&self, range: Range<u64>) {
        let start = range.start.div_ceil(HUGE_PAGE).saturating_mul(HUGE_PAGE);
        let end = range.end.min(self.mapped) / HUGE_PAGE * HUGE_PAGE;
        if start < end {
            // Advice: where it is refused, small pages do the same work slower.
            let _ = self.advise(start..end, MmapAdvise::MADV_HUGEPAGE);
        }
    }

    /// Turns the whole pages inside `range` back to zero and frees them; the
    /// last page counts as whole if `range` reaches the end.
    ///
    /// # Errors
    /// Whatever `madvise` says.
    pub fn discard(&mut self, range: Range<u64>) -> Result<(), SysError> {
        let start = page_align_up(range.start);
        let end = if range.end >= self.len as u64 {
            self.mapped
        } else {
            range.end / PAGE_SIZE * PAGE_SIZE
        };
        if start >= end {
            return Ok(());
        }
        self.advise(start..end, MmapAdvise::MADV_DONTNEED)
    }

    /// `range` lies within `0 .. self.mapped` and consists of whole pages.
    fn advise(&self, range: Range<u64>, advice: MmapAdvise) -> Result<(), SysError> {
        debug_assert!(range.start <= range.end && range.end <= self.mapped);
        // SAFETY: required: `range.start` is an offset into the mapping; the
        // callers above clip it to `mapped`.
        let at = unsafe { self.ptr.add(range.start as usize) };
        let len = (range.end - range.start) as usize;
        // SAFETY: required: the range is mapped, and nothing that refers to it
        // minds the advice. It lies within the mapping (above); DONTNEED, which
        // changes content, is given under `&mut self` only and zeroes are valid
        // bytes.
        unsafe { madvise(at.cast(), len, advice) }.map_err(|e| SysError::new("madvise", e))
    }
}

impl Deref for PrivateMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: required: `len` readable, initialised bytes that nobody changes
        // while the slice lives. I1 and `len <= mapped`; anonymous memory starts
        // as zeros; only this object refers to it, and it is borrowed.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for PrivateMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for PrivateMemory {
    fn drop(&mut self) {
        unmap(self.ptr, self.mapped);
    }
}

/// Gives back `len` bytes at `ptr`, which the caller owns and forgets.
fn unmap(ptr: NonNull<u8>, len: u64) {
    // SAFETY: required: nothing refers to the range any more. Private to this
    // file; called by the two `drop`s, whose objects alone own their ranges, and
    // for the ends of a fresh mapping that were never handed out.
    let result = unsafe { munmap(ptr.cast(), len as usize) };
    debug_assert!(result.is_ok(), "munmap of an owned range");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_mapping_never_reaches_beyond_its_file() {
        let fd = memfd::create("map", PAGE_SIZE + 1).expect("memfd");
        let mapping = Mapping::shared(&fd, PAGE_SIZE + 1, Access::ReadWrite).expect("map");
        assert_eq!(mapping.len(), 2 * PAGE_SIZE);
        assert_eq!(mapping.address() % PAGE_SIZE, 0);
        for len in [0, 2 * PAGE_SIZE + 1, u64::MAX] {
            let error = Mapping::shared(&fd, len, Access::ReadOnly).expect_err("too much");
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
        assert!(mapping.word(2 * PAGE_SIZE - 4).is_some());
        assert!(mapping.word(2 * PAGE_SIZE - 2).is_none());
        assert!(mapping.word(2 * PAGE_SIZE).is_none());
        assert!(mapping.word(u64::MAX).is_none());
        let word = mapping.word(0).expect("a word");
        word.store(3, Ordering::Relaxed);
        mapping.zap(0, PAGE_SIZE).expect("madvise");
        assert_eq!(word.load(Ordering::Relaxed), 3, "the file keeps it");
        assert!(mapping.zap(1, PAGE_SIZE).is_err());
        assert!(mapping.zap(0, 3 * PAGE_SIZE).is_err());
    }

    #[test]
    fn a_sealed_mapping_stays_as_it_is() {
        let fd = memfd::create("sealed", PAGE_SIZE).expect("memfd");
        let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite).expect("map");
        if crate::sys::or_skip("mseal", mapping.seal()).is_none() {
            return;
        }
        assert!(mapping.is_sealed());
        // SAFETY: required: nothing refers to the range afterwards. It is sealed, so
        // the call has to fail; the test ends if it does not.
        let refused = unsafe { munmap(mapping.ptr.cast(), PAGE_SIZE as usize) };
        assert_eq!(refused, Err(nix::errno::Errno::EPERM));
        mapping.dont_fork().expect("advice that changes no content");
        let at = mapping.ptr;
        mapping.word(0).expect("a word").store(5, Ordering::Relaxed);
        drop(mapping);
        // SAFETY: required: four readable bytes. The seal kept them mapped.
        assert_eq!(unsafe { at.cast::<u32>().read_volatile() }, 5);
    }

    #[test]
    fn private_memory_starts_as_zeros_and_goes_back_to_them() {
        let mut memory = PrivateMemory::new(3 * PAGE_SIZE + 5).expect("memory");
        assert_eq!(memory.len() as u64, 3 * PAGE_SIZE + 5);
        assert!(memory.iter().all(|byte| *byte == 0));
        memory.fill(7);
        memory.discard(1..2 * PAGE_SIZE + 1).expect("discard");
        let zeros = PAGE_SIZE as usize..2 * PAGE_SIZE as usize;
        for (i, byte) in memory.iter().enumerate() {
            assert_eq!(*byte == 0, zeros.contains(&i), "byte {i}");
        }
        memory.discard(0..u64::MAX).expect("discard");
        assert!(memory.iter().all(|byte| *byte == 0));
        memory.discard(5..5).expect("nothing");
        memory.discard(u64::MAX - 1..u64::MAX).expect("nothing");
    }

    #[test]
    fn large_private_memory_is_aligned_and_takes_advice() {
        let mut memory = PrivateMemory::new(5 * MIB + 1).expect("memory");
        assert_eq!(memory.as_ptr() as u64 % HUGE_PAGE, 0);
        memory.advise_huge(0..u64::MAX);
        memory.advise_huge(MIB..3 * MIB);
        memory.advise_huge(u64::MAX - 1..u64::MAX);
        memory[5 * MIB as usize] = 1;
        memory[0] = 2;
        assert_eq!(memory[5 * MIB as usize], 1);
        assert!(PrivateMemory::new(0).expect("memory").is_empty());
        assert!(PrivateMemory::new(u64::MAX).is_err());
    }
}
