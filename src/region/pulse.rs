//! The pulse: one page by which all processes of a host know that the engine
//! lives.
//!
//! The engine's thread holds a word of it as a robust futex; when it dies, by
//! whatever cause, the kernel marks the word and wakes a waiter before it tears
//! any memory down. Everybody else maps the page read-only and waits for the word
//! together with the word that is wanted. The kernel wakes one waiter, so a woken
//! one wakes the others.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::control::wake_all;
use super::{RegionError, sys};
use crate::shm::SharedMemory;
use crate::sys::futex::{self, Lifeline, Wake};
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::units::PAGE_SIZE;

/// The robust word: the thread's number while it lives.
const WORD: u64 = 0x00;
/// "uffdpls" and the layout's version.
const MAGIC_AT: u64 = 0x08;
const MAGIC: u64 = u64::from_le_bytes(*b"uffdpls\x01");

/// The engine's pulse, as others see it.
#[derive(Clone, Debug)]
pub struct Pulse(SharedMemory);

/// The thread that made it keeps the pulse beating until it dies or drops this.
#[derive(Debug)]
pub struct PulseHolder {
    memory: SharedMemory,
    _lifeline: Lifeline,
}

impl Pulse {
    /// Makes a page that the calling thread holds, and a read-only descriptor of it
    /// to pass on.
    ///
    /// # Errors
    /// [`RegionError::Sys`] where the kernel refuses; a thread holds one at most.
    pub fn create() -> Result<(PulseHolder, OwnedFd), RegionError> {
        let action = sys("creating a pulse page");
        let fd = memfd::create("uffd-sync-pulse", PAGE_SIZE).map_err(&action)?;
        let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        let seals = Seals::FUTURE_WRITE | Seals::SHRINK | Seals::GROW | Seals::SEAL;
        memfd::add_seals(&fd, seals).map_err(&action)?;
        let memory = SharedMemory::new(mapping);
        memory.store(MAGIC_AT, &MAGIC)?;
        let lifeline = Lifeline::hold(Arc::clone(memory.mapping()), WORD).map_err(&action)?;
        let fd = memfd::reopen_read_only(&fd).map_err(&action)?;
        let holder = PulseHolder {
            memory,
            _lifeline: lifeline,
        };
        Ok((holder, fd))
    }

    /// Maps a page that the engine passed.
    ///
    /// # Errors
    /// [`RegionError::Foreign`] if it is not a pulse page.
    pub fn open(fd: impl AsFd) -> Result<Self, RegionError> {
        let action = sys("opening a pulse page");
        let foreign = |problem| RegionError::Foreign {
            page: "pulse page",
            problem,
        };
        let seals = memfd::seals(&fd).map_err(&action)?;
        if !seals.contains(Seals::SHRINK | Seals::GROW | Seals::FUTURE_WRITE) {
            return Err(foreign("it is not sealed"));
        }
        if memfd::size(&fd).map_err(&action)? != PAGE_SIZE {
            return Err(foreign("its length is another"));
        }
        let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadOnly).map_err(&action)?;
        let memory = SharedMemory::new(mapping);
        if memory.load::<u64>(MAGIC_AT)? != MAGIC {
            return Err(foreign("its magic number is another"));
        }
        Ok(Self(memory))
    }

    /// Whether the engine lives.
    pub fn is_alive(&self) -> bool {
        futex::is_held(self.word().load(Ordering::Acquire))
    }

    /// The word, to wait for together with others.
    pub fn word(&self) -> &AtomicU32 {
        self.0.atomic_u32(WORD)
    }

    /// Sleeps while `word` holds `expected` and the engine lives, until `deadline`.
    pub(super) fn wait_with(
        &self,
        word: &AtomicU32,
        expected: u32,
        deadline: Option<Instant>,
    ) -> Result<Waited, RegionError> {
        let pulse = self.word().load(Ordering::Acquire);
        if !futex::is_held(pulse) {
            return Ok(Waited::Gone);
        }
        let woken = futex::wait_any(&[(word, expected), (self.word(), pulse)], deadline)
            .map_err(sys("waiting for the engine"))?;
        if !self.is_alive() {
            // The kernel woke one of those who wait.
            wake_all(self.word());
            return Ok(Waited::Gone);
        }
        Ok(match woken {
            Wake::TimedOut => Waited::TimedOut,
            Wake::Woken | Wake::Changed => Waited::Look,
        })
    }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// Look at the word again.
    Look,
    /// The engine is dead.
    Gone,
    /// The deadline passed.
    TimedOut,
}

impl PulseHolder {
    /// A look at the own pulse.
    pub fn pulse(&self) -> Pulse {
        Pulse(self.memory.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_pulse_stops_with_its_thread_and_all_who_wait_learn_of_it() {
        let (send, receive) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let engine = std::thread::spawn(move || {
            let (holder, fd) = Pulse::create().unwrap();
            assert!(holder.pulse().is_alive());
            send.send(fd).unwrap();
            let _ = stopped.recv();
            // What a killed thread cannot do either: give the word back.
            std::mem::forget(holder);
        });
        let fd = receive.recv().unwrap();
        let pulse = Pulse::open(&fd).unwrap();
        assert!(pulse.is_alive());
        let waiters: Vec<_> = (0..4)
            .map(|_| {
                let pulse = pulse.clone();
                std::thread::spawn(move || {
                    let word = AtomicU32::new(1);
                    let end = Instant::now() + Duration::from_secs(20);
                    loop {
                        match pulse.wait_with(&word, 1, Some(end)).unwrap() {
                            Waited::Look => {}
                            other => return other,
                        }
                    }
                })
            })
            .collect();
        drop(stop);
        engine.join().unwrap();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), Waited::Gone);
        }
        assert!(!pulse.is_alive());
        let word = AtomicU32::new(0);
        assert_eq!(pulse.wait_with(&word, 0, None).unwrap(), Waited::Gone);
    }

    #[test]
    fn other_memory_is_no_pulse() {
        let unsealed = memfd::create("pulse-test", PAGE_SIZE).unwrap();
        assert!(matches!(
            Pulse::open(&unsealed),
            Err(RegionError::Foreign { .. })
        ));
        let seals = Seals::FUTURE_WRITE | Seals::SHRINK | Seals::GROW;
        memfd::add_seals(&unsealed, seals).unwrap();
        assert!(matches!(
            Pulse::open(&unsealed),
            Err(RegionError::Foreign { .. })
        ));
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(matches!(Pulse::open(&reader), Err(RegionError::Sys { .. })));
    }
}
