//! The only place that calls the kernel.
//!
//! Each file wraps one family of system calls in types that own what they
//! create and give it back on drop. Nothing here knows what a region, a frame
//! or a replica is. Above this room no code holds a raw descriptor or a raw
//! address of a mapping; below it there is only the kernel.
//!
//! Errors: every call answers with [`SysError`], which names the call, chains
//! the kernel's error, and carries the remedy where the kernel refuses for a
//! reason that its administrator can change.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

pub mod activity;
pub mod behaviour;
pub mod buffer;
pub mod copy;
pub mod dial;
#[cfg(test)]
mod facts;
pub mod futex;
pub mod map;
pub mod memfd;
pub mod net;
pub mod pagemap;
pub mod posix_shm;
pub mod probe;
pub mod process;
pub mod ring;
pub mod spin;
pub mod stream;
pub mod uffd;

/// A system call that failed.
#[derive(Debug, thiserror::Error)]
pub struct SysError {
    /// What was called, as its manual page names it.
    pub call: &'static str,
    /// What an administrator can do about it, where there is something.
    pub remedy: Option<&'static str>,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl fmt::Display for SysError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed", self.call)?;
        match self.remedy {
            Some(remedy) => write!(f, " (remedy: {remedy})"),
            None => Ok(()),
        }
    }
}

impl SysError {
    /// The kernel's error number, if it was the kernel that refused.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// Whether the call would have had to wait.
    pub fn is_would_block(&self) -> bool {
        self.source.kind() == io::ErrorKind::WouldBlock
    }

    pub(crate) fn new(call: &'static str, source: impl Into<io::Error>) -> SysError {
        SysError {
            call,
            remedy: None,
            source: source.into(),
        }
    }

    /// The error that the calling thread's last system call left in `errno`.
    pub(crate) fn last(call: &'static str) -> SysError {
        SysError::new(call, io::Error::last_os_error())
    }

    pub(crate) fn os(call: &'static str, errno: i32) -> SysError {
        SysError::new(call, io::Error::from_raw_os_error(errno))
    }

    pub(crate) fn with_remedy(mut self, remedy: &'static str) -> SysError {
        self.remedy = Some(remedy);
        self
    }
}

/// The answer of a call that says -1 for failure, as a result.
fn check(call: &'static str, answer: libc::c_long) -> Result<libc::c_long, SysError> {
    if answer < 0 {
        Err(SysError::last(call))
    } else {
        Ok(answer)
    }
}

/// What `/proc/self/fd/N` says the descriptor refers to, for example
/// `anon_inode:[eventfd]`.
fn kind_of(fd: impl AsFd) -> Result<std::path::PathBuf, SysError> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    std::fs::read_link(path).map_err(|e| {
        SysError::new("readlink /proc/self/fd", e).with_remedy("mount /proc in this namespace")
    })
}

/// A duplicate of a descriptor, closed on exec.
fn duplicate(fd: impl AsFd) -> Result<std::os::fd::OwnedFd, SysError> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|e| SysError::new("fcntl F_DUPFD_CLOEXEC", e))
}

/// For tests of what not every kernel or sandbox has: `None` after printing
/// `SKIP`, or a panic where a skip may not be (`UFFD_SYNC_REQUIRE_ALL=1`).
#[cfg(test)]
#[allow(
    clippy::print_stderr,
    reason = "a skipped test says so where the test runner shows it"
)]
pub(crate) fn or_skip<T>(what: &str, result: Result<T, SysError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
            assert!(!required, "{what}: {error}: {}", error.source);
            eprintln!("SKIP {what}: {error}: {}", error.source);
            None
        }
    }
}
