//! Named semaphores in the form of glibc.
//!
//! ```text
//! 0        4         8         12                     32
//! | value  | waiters | private | zeros                |     little-endian
//! ```
//! The first two are the word of [`super::count`]. `private` is 128: the futex is
//! shared between processes. `sem_open("/NAME")` makes it as `/dev/shm/sem.NAME`.
#![cfg_attr(
    test,
    allow(unsafe_code, reason = "the C library's semaphores, to test against")
)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Instant;

use super::{SharedMemory, count};
use crate::sys::futex::{self, Wake};
use crate::sys::map::{Access, Mapping};
use crate::sys::{SysError, memfd, posix_shm};

/// Bytes of a semaphore's file.
const BYTES: u64 = 32;
/// `LLL_SHARED`, what glibc stores into `private` of a named semaphore.
const SHARED: i32 = 128;
const EINVAL: i32 = nix::errno::Errno::EINVAL as i32;

#[cfg(target_endian = "big")]
compile_error!("glibc keeps the value in the word's other half on big-endian machines");

/// One mapped semaphore.
#[derive(Debug)]
pub struct Semaphore {
    memory: SharedMemory,
}

impl Semaphore {
    /// Makes the semaphore `name` with value 0, in place of what has that name.
    ///
    /// # Errors
    /// As for [`posix_shm::unnamed`] and [`posix_shm::unlink`].
    pub fn create(name: &str, mode: u32) -> Result<Semaphore, SysError> {
        let fd = posix_shm::unnamed(mode)?;
        posix_shm::resize(&fd, BYTES, true)?;
        memfd::write_at(&fd, &SHARED.to_le_bytes(), 8)?;
        posix_shm::unlink(&object_of(name))?;
        posix_shm::link(&fd, &object_of(name))?;
        Semaphore::map(&fd)
    }

    /// Opens the semaphore `name`.
    ///
    /// # Errors
    /// `ENOENT` if there is none, `EINVAL` if the file of that name is none.
    pub fn open(name: &str) -> Result<Semaphore, SysError> {
        let fd = posix_shm::open(&object_of(name))?;
        if memfd::size(&fd)? < BYTES || !memfd::is_regular_file(&fd)? {
            return Err(SysError::os("sem_open", EINVAL));
        }
        Semaphore::map(&fd)
    }

    /// Takes the name away. Says whether there was one.
    ///
    /// # Errors
    /// `EACCES` or `EPERM` if it belongs to another user.
    pub fn unlink(name: &str) -> Result<bool, SysError> {
        posix_shm::unlink(&object_of(name))
    }

    fn map(fd: &OwnedFd) -> Result<Semaphore, SysError> {
        let mapping = Mapping::shared(fd, BYTES, Access::ReadWrite)?;
        mapping.dont_fork()?;
        let memory = SharedMemory::new(mapping);
        Ok(Semaphore { memory })
    }

    #[inline]
    fn word(&self) -> &AtomicU64 {
        self.memory.atomic_u64(0)
    }

    /// The half that sleepers sleep on.
    #[inline]
    fn futex(&self) -> &AtomicU32 {
        self.memory.atomic_u32(0)
    }

    /// Raises the value by one and wakes a sleeper, if any. No system call if
    /// nobody sleeps.
    ///
    /// # Errors
    /// Whatever `futex` says.
    #[inline]
    pub fn post(&self) -> Result<(), SysError> {
        self.post_many(1)
    }

    /// As that many [`Semaphore::post`], in one go; all or, where
    /// [`count::VALUE_MAX`] would be exceeded, none of them.
    ///
    /// # Errors
    /// Whatever `futex` says.
    #[inline]
    pub fn post_many(&self, times: u16) -> Result<(), SysError> {
        if count::post(self.word(), times) {
            futex::wake(self.futex(), u32::from(times))?;
        }
        Ok(())
    }

    /// Lowers the value by one, if it is not zero.
    #[inline]
    pub fn try_acquire(&self) -> bool {
        count::try_lower(self.word())
    }

    /// The value, at this moment.
    #[inline]
    pub fn value(&self) -> u64 {
        count::value(self.word())
    }

    /// Lowers the value to zero and says what it was.
    #[inline]
    pub fn take_all(&self) -> u64 {
        count::take_all(self.word())
    }

    /// Lowers the value by one, sleeping until it is not zero or `deadline` has
    /// passed: `false` then.
    ///
    /// # Errors
    /// Whatever `futex` says.
    pub fn wait(&self, deadline: Instant) -> Result<bool, SysError> {
        count::wait(self.word(), || {
            let ended = futex::wait(self.futex(), 0, Some(deadline))?;
            Ok(ended != Wake::TimedOut && Instant::now() < deadline)
        })
    }
}

fn object_of(name: &str) -> String {
    format!("sem.{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::process_id;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    fn fresh(what: &str) -> (String, Semaphore) {
        let name = format!("uffd-sync-test-{}-{what}", process_id());
        let semaphore = Semaphore::create(&name, 0o600).expect("a semaphore");
        (name, semaphore)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn it_counts_and_its_bytes_are_glibcs() {
        let (name, semaphore) = fresh("bytes");
        let other = Semaphore::open(&name).expect("the same");
        assert!(!other.try_acquire());
        semaphore.post().expect("post");
        semaphore.post_many(2).expect("post");
        let fd = posix_shm::open(&object_of(&name)).expect("its file");
        let mut bytes = [0xFF; 40];
        assert_eq!(memfd::read_at(&fd, &mut bytes, 0).expect("read"), 32);
        let mut expected = [0; 32];
        (expected[0], expected[8]) = (3, 128);
        assert_eq!(bytes[..32], expected);
        assert!(other.try_acquire());
        assert_eq!((other.take_all(), other.value()), (2, 0));
        other.word().store(count::VALUE_MAX - 1, Ordering::Relaxed);
        semaphore.post_many(9).expect("post");
        semaphore.post().expect("post");
        semaphore.post().expect("post");
        assert_eq!(semaphore.value(), count::VALUE_MAX, "a full one stays full");
        assert!(Semaphore::unlink(&name).expect("unlink"));
        assert!(Semaphore::open(&name).is_err());
    }

    #[test]
    fn the_c_library_uses_it_too() {
        let (name, semaphore) = fresh("libc");
        let path = std::ffi::CString::new(format!("/{name}")).expect("a name");
        // SAFETY: required: a NUL-terminated name; it is a local `CString`.
        let foreign = unsafe { libc::sem_open(path.as_ptr(), 0) };
        assert!(!foreign.is_null());
        semaphore.post().expect("post");
        // SAFETY: required: a semaphore that is open; it was just opened and is
        // closed below.
        unsafe {
            assert_eq!(libc::sem_trywait(foreign), 0);
            assert_ne!(libc::sem_trywait(foreign), 0);
            assert_eq!(libc::sem_post(foreign), 0);
        }
        assert!(semaphore.wait(soon()).expect("wait"));
        // Each sleeps in turn until the other posts.
        let address = foreign as usize;
        let peer = std::thread::spawn(move || {
            for _ in 0..1000 {
                // SAFETY: required: an open semaphore; closed after this thread ended.
                unsafe { libc::sem_wait(address as *mut libc::sem_t) };
            }
        });
        for _ in 0..1000 {
            semaphore.post().expect("post");
        }
        peer.join().expect("the peer");
        let word = semaphore.word().load(Ordering::Relaxed);
        assert_eq!(word, 0, "no value and no waiter is left");
        // SAFETY: required: an open semaphore that nobody uses any more.
        unsafe { libc::sem_close(foreign) };
        Semaphore::unlink(&name).expect("unlink");
    }

    #[test]
    fn waiting_ends_by_a_post_or_by_the_deadline() {
        let (name, semaphore) = fresh("wait");
        let semaphore = Arc::new(semaphore);
        let past = Instant::now();
        assert!(!semaphore.wait(past).expect("wait"));
        assert!(
            !semaphore
                .wait(past + Duration::from_millis(5))
                .expect("wait")
        );
        assert_eq!(semaphore.word().load(Ordering::Relaxed), 0);
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let semaphore = Arc::clone(&semaphore);
                std::thread::spawn(move || {
                    for _ in 0..2000 {
                        assert!(semaphore.wait(soon()).expect("wait"));
                    }
                })
            })
            .collect();
        for _ in 0..3000 {
            semaphore.post_many(2).expect("post");
        }
        for waiter in waiters {
            waiter.join().expect("a waiter");
        }
        assert_eq!(semaphore.word().load(Ordering::Relaxed), 0);
        Semaphore::unlink(&name).expect("unlink");
    }
}
