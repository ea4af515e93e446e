//! Memory files: creation, seals, sizes, holes, reading and writing at offsets.
//!
//! A region's data lives in a memfd whose seals decide who may ever write it
//! (`include/uapi/linux/fcntl.h`, Linux 6.18):
//!
//! | seal | forbids from now on |
//! |---|---|
//! | [`Seals::SHRINK`] | truncating below the present size: no `SIGBUS` in readers |
//! | [`Seals::GROW`] | growing |
//! | [`Seals::FUTURE_WRITE`] | `write`, `pwrite`, hole punching and new writable mappings; mappings that exist keep writing |
//! | [`Seals::WRITE`] | the same, and refuses while a writable mapping exists |
//! | [`Seals::SEAL`] | further seals |

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat};
use nix::unistd::{Whence, ftruncate, lseek64};

use super::{SysError, kind_of};
use crate::units::{MIB, PAGE_SIZE};

/// Bytes of a huge page that [`create_huge`] uses.
pub const HUGE_PAGE: u64 = 2 * MIB;

bitflags::bitflags! {
    /// What is forbidden on a memory file for the rest of its life.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Seals: u32 {
        /// `F_SEAL_SEAL`: no further seals.
        const SEAL = 0x1;
        /// `F_SEAL_SHRINK`: no truncation below the present size.
        const SHRINK = 0x2;
        /// `F_SEAL_GROW`: no growth.
        const GROW = 0x4;
        /// `F_SEAL_WRITE`: no writing at all.
        const WRITE = 0x8;
        /// `F_SEAL_FUTURE_WRITE`: no writing but through writable mappings that exist already.
        const FUTURE_WRITE = 0x10;
        const _ = !0;
    }
}

/// Creates a memory file of `size` bytes, all zero, mode 0600, closed on exec,
/// open for sealing. `name` shows in `/proc/PID/maps` and need not be unique.
///
/// # Errors
/// [`SysError`] if the name is longer than 249 bytes or holds a NUL, the process
/// is out of descriptors, or the system is configured to refuse.
pub fn create(name: &str, size: u64) -> Result<OwnedFd, SysError> {
    create_of(name, size, None)
}

/// The same of pages of [`HUGE_PAGE`] bytes each, which the system has set apart; `size`
/// is a multiple of them. They are taken when the file is mapped.
///
/// # Errors
/// As for [`create`]; `ENOSYS` on a kernel without such pages.
pub fn create_huge(name: &str, size: u64) -> Result<OwnedFd, SysError> {
    create_of(name, size, Some(memfd::HugetlbSize::Huge2MB))
}

/// Bytes of the pages that a memory file consists of: the smallest that its protection and
/// its marks are told apart by.
///
/// # Errors
/// Whatever `fstatfs` says.
pub fn page_bytes(fd: impl AsFd) -> Result<u64, SysError> {
    /// `HUGETLBFS_MAGIC` of `include/uapi/linux/magic.h`.
    const HUGETLBFS: u64 = 0x9584_58f6;
    let fs = nix::sys::statfs::fstatfs(fd).map_err(|e| SysError::new("fstatfs", e))?;
    if fs.filesystem_type().0 as u64 & u64::from(u32::MAX) == HUGETLBFS {
        Ok(fs.block_size() as u64)
    } else {
        Ok(PAGE_SIZE)
    }
}

fn create_of(name: &str, size: u64, huge: Option<memfd::HugetlbSize>) -> Result<OwnedFd, SysError> {
    let file = memfd::MemfdOptions::new()
        .close_on_exec(true)
        .allow_sealing(true)
        .hugetlb(huge)
        .create(name)
        .map_err(|e| {
            let source = match e {
                memfd::Error::Create(e) => e,
                other => std::io::Error::other(other),
            };
            let refused = source.raw_os_error() == Some(libc::EACCES);
            let error = SysError::new("memfd_create", source);
            if refused {
                error.with_remedy("sysctl vm.memfd_noexec=1")
            } else {
                error
            }
        })?
        .into_file();
    let fd = OwnedFd::from(file);
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|e| SysError::new("fchmod", e))?;
    let len = i64::try_from(size).map_err(|_| SysError::os("ftruncate", libc::EFBIG))?;
    ftruncate(&fd, len).map_err(|e| SysError::new("ftruncate", e))?;
    Ok(fd)
}

/// Lengthens a memory file to `size` bytes; what is new is zero.
///
/// # Errors
/// `EPERM` if [`Seals::GROW`] is set, or [`Seals::SHRINK`] and `size` is less than it has.
pub fn grow(fd: impl AsFd, size: u64) -> Result<(), SysError> {
    let len = i64::try_from(size).map_err(|_| SysError::os("ftruncate", libc::EFBIG))?;
    ftruncate(fd, len).map_err(|e| SysError::new("ftruncate", e))
}

/// Adds `seals` to those that `fd` has. They cannot be taken away again.
///
/// # Errors
/// `EPERM` if [`Seals::SEAL`] is set, `EBUSY` for [`Seals::WRITE`] while a
/// writable mapping exists, `EINVAL` if `fd` is not a memory file.
pub fn add_seals(fd: impl AsFd, seals: Seals) -> Result<(), SysError> {
    let flags = SealFlag::from_bits_retain(seals.bits().cast_signed());
    fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(flags)).map_err(|e| SysError::new("F_ADD_SEALS", e))?;
    Ok(())
}

/// The seals that `fd` has.
///
/// # Errors
/// `EINVAL` if `fd` is not a memory file.
pub fn seals(fd: impl AsFd) -> Result<Seals, SysError> {
    let bits =
        fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS).map_err(|e| SysError::new("F_GET_SEALS", e))?;
    Ok(Seals::from_bits_retain(bits.cast_unsigned()))
}

/// The size of a file in bytes.
///
/// # Errors
/// Whatever `fstat` says.
pub fn size(fd: impl AsFd) -> Result<u64, SysError> {
    let stat = fstat(fd).map_err(|e| SysError::new("fstat", e))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// The bytes that a file takes in memory (or on disk), holes not counted.
///
/// # Errors
/// Whatever `fstat` says.
pub fn resident_bytes(fd: impl AsFd) -> Result<u64, SysError> {
    let stat = fstat(fd).map_err(|e| SysError::new("fstat", e))?;
    Ok(u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512))
}

/// Whether `fd` is a regular file; memory files are.
///
/// # Errors
/// Whatever `fstat` says.
pub fn is_regular_file(fd: impl AsFd) -> Result<bool, SysError> {
    let stat = fstat(fd).map_err(|e| SysError::new("fstat", e))?;
    Ok(SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG)
}

/// The first run of bytes at or after `from` that is not a hole, or `None` up
/// to the end of the file. Where the file system does not know its holes, all of
/// `from .. size` is one run.
///
/// Moves the file offset, which nothing here relies on. With another process
/// writing or punching, the answer holds for the moment of the call only.
///
/// # Errors
/// Whatever `lseek` says.
pub fn next_data(fd: impl AsFd, from: u64) -> Result<Option<Range<u64>>, SysError> {
    let fd = fd.as_fd();
    let Ok(offset) = i64::try_from(from) else {
        return Ok(None);
    };
    let start = match lseek64(fd, offset, Whence::SeekData) {
        Ok(start) => u64::try_from(start).unwrap_or(from),
        Err(Errno::ENXIO) => return Ok(None),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {
            let end = size(fd)?;
            return Ok((from < end).then_some(from..end));
        }
        Err(e) => return Err(SysError::new("lseek SEEK_DATA", e)),
    };
    match lseek64(fd, start.cast_signed(), Whence::SeekHole) {
        // A hole punched between the two calls: one byte, so that the caller moves on.
        Ok(end) => Ok(Some(start..end.cast_unsigned().max(start + 1))),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(SysError::new("lseek SEEK_HOLE", e)),
    }
}

/// The first byte at `from` or behind it that has memory, or lies in a page that has; none
/// up to the end. Does not look for the end of that memory, as [`next_data`] does.
///
/// # Errors
/// Whatever `lseek` says.
pub fn first_data(fd: impl AsFd, from: u64) -> Result<Option<u64>, SysError> {
    let Ok(offset) = i64::try_from(from) else {
        return Ok(None);
    };
    match lseek64(fd.as_fd(), offset, Whence::SeekData) {
        Ok(start) => Ok(Some(u64::try_from(start).unwrap_or(from))),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(SysError::new("lseek SEEK_DATA", e)),
    }
}

/// Reads up to `buf.len()` bytes at `offset`: fewer at the end of the file only,
/// 0 beyond it. Allocates nothing where the file has holes.
///
/// # Errors
/// Whatever `pread` says.
pub fn read_at(fd: impl AsFd, buf: &mut [u8], offset: u64) -> Result<usize, SysError> {
    let fd = fd.as_fd();
    let mut done = 0;
    while done < buf.len() {
        let at = offset
            .checked_add(done as u64)
            .and_then(|at| i64::try_from(at).ok())
            .ok_or_else(|| SysError::os("pread", libc::EOVERFLOW))?;
        match nix::sys::uio::pread(fd, &mut buf[done..], at) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(SysError::new("pread", e)),
        }
    }
    Ok(done)
}

/// Writes all of `bytes` at `offset` and says how many were written, which is
/// less than asked only where the device is full.
///
/// # Errors
/// `EPERM` if the file is sealed; whatever else `pwrite` says.
pub fn write_at(fd: impl AsFd, bytes: &[u8], offset: u64) -> Result<usize, SysError> {
    let fd = fd.as_fd();
    let mut done = 0;
    while done < bytes.len() {
        let at = offset
            .checked_add(done as u64)
            .and_then(|at| i64::try_from(at).ok())
            .ok_or_else(|| SysError::os("pwrite", libc::EOVERFLOW))?;
        match nix::sys::uio::pwrite(fd, &bytes[done..], at) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(SysError::new("pwrite", e)),
        }
    }
    Ok(done)
}

/// Lets other users open the file again for reading. A memory file has no path: only
/// who was passed a descriptor, or may inspect a process that has one, gets that far.
///
/// # Errors
/// `EPERM` if it belongs to another user.
pub fn let_others_read(fd: impl AsFd) -> Result<(), SysError> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
    fchmod(fd, mode).map_err(|e| SysError::new("fchmod", e))
}

/// A descriptor of the same file that can read it but not write it.
///
/// # Errors
/// `ENOENT` where `/proc` is not mounted; `EACCES` if the file's mode forbids it.
pub fn reopen_read_only(fd: impl AsFd) -> Result<OwnedFd, SysError> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    nix::fcntl::open(
        Path::new(&path),
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| SysError::new("open /proc/self/fd", e))
}

/// Whether `fd` is open for reading only.
///
/// # Errors
/// Whatever `fcntl` says.
pub fn is_read_only(fd: impl AsFd) -> Result<bool, SysError> {
    let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL).map_err(|e| SysError::new("F_GETFL", e))?;
    Ok(OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY)
}

/// Whether two descriptors are of the same file.
///
/// # Errors
/// Whatever `fstat` says.
pub fn is_same(a: impl AsFd, b: impl AsFd) -> Result<bool, SysError> {
    let of = |fd: BorrowedFd<'_>| fstat(fd).map_err(|e| SysError::new("fstat", e));
    let (a, b) = (of(a.as_fd())?, of(b.as_fd())?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

/// What a memory file was called when it was created, for messages.
///
/// # Errors
/// [`SysError`] where `/proc` is not mounted.
pub fn name(fd: impl AsFd) -> Result<String, SysError> {
    let path = kind_of(fd)?;
    let text = path.to_string_lossy();
    let text = text.strip_prefix("/memfd:").unwrap_or(&text);
    Ok(text.strip_suffix(" (deleted)").unwrap_or(text).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::{Access, Mapping};
    use crate::units::PAGE_SIZE;
    use nix::fcntl::FallocateFlags;

    fn eperm<T: std::fmt::Debug>(result: Result<T, SysError>) {
        let error = result.expect_err("sealed");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
    }

    #[test]
    fn a_new_one_is_zero_private_and_named() {
        let fd = create("zebra", 3 * PAGE_SIZE).expect("memfd");
        assert_eq!(size(&fd).expect("fstat"), 3 * PAGE_SIZE);
        assert_eq!(resident_bytes(&fd).expect("fstat"), 0);
        let executable = Seals::from_bits_retain(0x20);
        assert_eq!(seals(&fd).expect("seals") - executable, Seals::empty());
        assert_eq!(name(&fd).expect("name"), "zebra");
        assert!(is_regular_file(&fd).expect("fstat"));
        let mode = fstat(&fd).expect("fstat").st_mode & 0o777;
        assert_eq!(mode, 0o600);
        let flags = fcntl(&fd, FcntlArg::F_GETFD).expect("flags");
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        assert!(create("a\0b", 1).is_err());
        assert!(create(&"x".repeat(300), 1).is_err());
        assert!(create("huge", u64::MAX).is_err());
    }

    #[test]
    fn after_future_write_only_the_mapping_that_exists_writes() {
        let fd = create("sealed", 2 * PAGE_SIZE).expect("memfd");
        let before = Mapping::shared(&fd, 2 * PAGE_SIZE, Access::ReadWrite).expect("map");
        add_seals(&fd, Seals::FUTURE_WRITE | Seals::SHRINK | Seals::GROW).expect("seal");
        add_seals(&fd, Seals::SEAL).expect("seal");
        eperm(write_at(&fd, &[1], 0));
        eperm(Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite));
        eperm(ftruncate(&fd, 1).map_err(|e| SysError::new("ftruncate", e)));
        eperm(ftruncate(&fd, 1 << 20).map_err(|e| SysError::new("ftruncate", e)));
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        eperm(
            nix::fcntl::fallocate(&fd, punch, 0, 4096).map_err(|e| SysError::new("fallocate", e)),
        );
        eperm(add_seals(&fd, Seals::WRITE));
        let word = before.word(0).expect("a word");
        word.store(5, std::sync::atomic::Ordering::Relaxed);
        let mut bytes = [0; 4];
        assert_eq!(read_at(&fd, &mut bytes, 0).expect("pread"), 4);
        assert_eq!(u32::from_ne_bytes(bytes), 5);
        Mapping::shared(&fd, PAGE_SIZE, Access::ReadOnly).expect("readers may map");
    }

    #[test]
    fn a_read_only_reopening_cannot_write() {
        let fd = create("ro", PAGE_SIZE).expect("memfd");
        let reader = reopen_read_only(&fd).expect("open");
        assert!(is_read_only(&reader).expect("flags") && !is_read_only(&fd).expect("flags"));
        let error = write_at(&reader, &[1], 0).expect_err("read-only");
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert!(Mapping::shared(&reader, PAGE_SIZE, Access::ReadWrite).is_err());
        write_at(&fd, &[7], 9).expect("pwrite");
        let mut byte = [0];
        assert_eq!(read_at(&reader, &mut byte, 9).expect("pread"), 1);
        assert_eq!(byte, [7]);
    }

    #[test]
    fn data_is_found_between_holes() {
        let fd = create("sparse", 64 * PAGE_SIZE).expect("memfd");
        let next = |from| next_data(&fd, from).expect("seek");
        assert_eq!(next(0), None);
        for page in [3, 4, 40] {
            write_at(&fd, &[1], page * PAGE_SIZE).expect("pwrite");
        }
        assert_eq!(next(0), Some(3 * PAGE_SIZE..5 * PAGE_SIZE));
        let inside = 4 * PAGE_SIZE + 7;
        assert_eq!(next(inside), Some(inside..5 * PAGE_SIZE));
        assert_eq!(next(5 * PAGE_SIZE), Some(40 * PAGE_SIZE..41 * PAGE_SIZE));
        assert_eq!(next(41 * PAGE_SIZE), None);
        assert_eq!(next(u64::MAX), None);
        assert_eq!(resident_bytes(&fd).expect("fstat"), 3 * PAGE_SIZE);
    }

    #[test]
    fn reads_end_at_the_end_and_what_is_no_memory_file_has_no_seals() {
        let fd = create("short", 10).expect("memfd");
        assert_eq!(read_at(&fd, &mut [0; 8], 6).expect("pread"), 4);
        assert_eq!(read_at(&fd, &mut [0; 8], 10).expect("pread"), 0);
        assert!(read_at(&fd, &mut [0; 8], u64::MAX).is_err());
        assert!(write_at(&fd, &[0; 8], u64::MAX - 2).is_err());
        let (socket, _other) = crate::sys::net::unix_pair().expect("pair");
        assert!(!is_regular_file(&socket).expect("fstat"));
        let error = seals(&socket).expect_err("no memory file");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
