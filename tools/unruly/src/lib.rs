//! What programs do to memory that somebody else tracks: unmapping and moving it,
//! forking, letting the kernel write into it, forbidding themselves system calls.
//!
//! For tests only, which may hold no `unsafe` of their own. The functions take bare
//! addresses and break what Rust relies on, on purpose: a process that calls them plays
//! a program written in any language, and is thrown away afterwards. Memory is reached
//! through addresses alone, so that no reference to it exists here.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

mod filter;
mod held;
mod ring;

pub use filter::forbid;
pub use held::Held;
pub use ring::Ring;

fn answer(answer: i64) -> io::Result<i64> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// Unmaps `len` bytes at `at`.
pub fn unmap(at: u64, len: u64) -> io::Result<()> {
    // SAFETY: required: nothing uses the range afterwards. The process is a test's.
    answer(unsafe { libc::munmap(at as *mut _, len as usize) }.into()).map(drop)
}

/// Moves a mapping to where there is room, and says where that is.
pub fn move_away(at: u64, len: u64) -> io::Result<u64> {
    // A mapping that does not grow is moved only if it is told where to.
    // SAFETY: required: no memory in use is replaced. The kernel picks a free place.
    let place = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if place == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: required: both ranges are this function's to give. The place was just
    // made for it, and the old range is the caller's to lose.
    let moved = unsafe {
        libc::mremap(
            at as *mut _,
            len as usize,
            len as usize,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            place,
        )
    };
    if moved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(moved as u64)
}

/// Maps memory of this process alone over `len` bytes at `at`.
pub fn map_over(at: u64, len: u64) -> io::Result<()> {
    // SAFETY: required: nothing relies on what was mapped there. The process is a test's.
    let mapped = unsafe {
        libc::mmap(
            at as *mut _,
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes `len` bytes at `at` read-only, or writable again.
pub fn set_writable(at: u64, len: u64, writable: bool) -> io::Result<()> {
    let write = if writable { libc::PROT_WRITE } else { 0 };
    // SAFETY: required: nobody stores into what becomes read-only. The caller's matter.
    answer(unsafe { libc::mprotect(at as *mut _, len as usize, libc::PROT_READ | write) }.into())
        .map(drop)
}

/// Drops the page-table entries of `len` bytes at `at` (`MADV_DONTNEED`).
pub fn drop_entries(at: u64, len: u64) -> io::Result<()> {
    // SAFETY: required: the content stays. It is memory of a file.
    answer(unsafe { libc::madvise(at as *mut _, len as usize, libc::MADV_DONTNEED) }.into())
        .map(drop)
}

/// Punches a hole through the mapping (`MADV_REMOVE`): the bytes become zero.
pub fn punch(at: u64, len: u64) -> io::Result<()> {
    // SAFETY: required: nobody relies on the content. The caller's matter.
    answer(unsafe { libc::madvise(at as *mut _, len as usize, libc::MADV_REMOVE) }.into()).map(drop)
}

/// Stores one byte.
pub fn store(at: u64, byte: u8) {
    // SAFETY: required: a writable byte. The caller's matter: if there is none the
    // process ends, which is what some tests want to see.
    unsafe { (at as *mut u8).write_volatile(byte) }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with that code.
    Exit(i32),
    /// By a signal.
    Signal(i32),
}

/// Forks a child that stores `byte` at each of `places`, and waits for its end.
pub fn store_in_a_fork(places: &[u64], byte: u8) -> io::Result<End> {
    // SAFETY: required: the child of a process with threads takes no lock. It stores
    // and leaves.
    let child = unsafe { libc::fork() };
    if child == 0 {
        for place in places {
            store(*place, byte);
        }
        // SAFETY: required: nothing; the process ends here.
        unsafe { libc::_exit(0) }
    }
    answer(child.into())?;
    let mut status = 0;
    // SAFETY: required: a place for the status. It is a local.
    answer(unsafe { libc::waitpid(child, &raw mut status, 0) }.into())?;
    Ok(if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Exit(libc::WEXITSTATUS(status))
    })
}

/// `read(2)` of up to `len` bytes to `at`.
pub fn read_to(from: impl AsFd, at: u64, len: u64) -> io::Result<u64> {
    let fd = from.as_fd().as_raw_fd();
    // SAFETY: required: writable bytes, or the call fails. The caller's matter.
    answer(unsafe { libc::read(fd, at as *mut _, len as usize) } as i64).map(|n| n as u64)
}

/// `recv(2)` of up to `len` bytes to `at`.
pub fn receive_to(from: impl AsFd, at: u64, len: u64) -> io::Result<u64> {
    let fd = from.as_fd().as_raw_fd();
    // SAFETY: as for `read_to`.
    answer(unsafe { libc::recv(fd, at as *mut _, len as usize, 0) } as i64).map(|n| n as u64)
}

/// `preadv(2)` from the file's beginning to two halves of `len` bytes at `at`.
pub fn read_vector_to(from: impl AsFd, at: u64, len: u64) -> io::Result<u64> {
    let fd = from.as_fd().as_raw_fd();
    let half = len / 2;
    let part = |at: u64, len: u64| libc::iovec {
        iov_base: at as *mut _,
        iov_len: len as usize,
    };
    let parts = [part(at, half), part(at + half, len - half)];
    // SAFETY: as for `read_to`, of each part.
    answer(unsafe { libc::preadv(fd, parts.as_ptr(), 2, 0) } as i64).map(|n| n as u64)
}

/// `process_vm_writev(2)` of `bytes` to `at` of the process `pid`.
pub fn write_to_process(pid: i32, at: u64, bytes: &[u8]) -> io::Result<u64> {
    let local = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let remote = libc::iovec {
        iov_base: at as *mut _,
        iov_len: bytes.len(),
    };
    // SAFETY: required: the local part is readable; it is a slice. The remote one is
    // checked by the kernel.
    let written =
        unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    answer(written as i64).map(|n| n as u64)
}

/// Lets this process be inspected, or not (`PR_SET_DUMPABLE`).
pub fn set_dumpable(dumpable: bool) -> io::Result<()> {
    // SAFETY: required: nothing; the call takes numbers.
    answer(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, u64::from(dumpable), 0, 0, 0) }.into())
        .map(drop)
}

/// Keeps a descriptor open over `exec`.
pub fn keep_over_exec(fd: i32) -> io::Result<()> {
    // SAFETY: required: nothing; the call takes numbers.
    answer(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into()).map(drop)
}

/// Lets this process end with the thread that started it, if that is not too late.
pub fn end_with_parent() -> io::Result<()> {
    // SAFETY: required: nothing; the call takes numbers.
    answer(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) }.into()).map(drop)
}

/// Ends the registration of `len` bytes at `at` with the userfaultfd `fd`.
pub fn unregister(fd: i32, at: u64, len: u64) -> io::Result<()> {
    /// `UFFDIO_UNREGISTER`: `_IOR(0xAA, 0x01, struct uffdio_range)`, 16 bytes.
    const UFFDIO_UNREGISTER: u64 = 0x8010_AA01;
    let range = [at, len];
    // SAFETY: required: a readable `struct uffdio_range`. It is a local of two numbers.
    answer(unsafe { libc::ioctl(fd, UFFDIO_UNREGISTER, range.as_ptr()) }.into()).map(drop)
}
