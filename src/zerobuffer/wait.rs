//! Waiting for a semaphore, and for the peer's death.

use std::time::{Duration, Instant};

use super::error::{Gone, Side, ZeroBufferError, sys};
use super::segment::Segment;
use crate::limits::{SPIN_MAX_US, ZEROBUFFER_PEER_CHECK_MS};
use crate::shm::Semaphore;
use crate::sys::process::PidFd;

/// How an end waits for the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    /// Sleeps at once: no processor time, a wake-up of the kernel for each wait.
    Park,
    /// Never sleeps. For two processors that have nothing else to do.
    Spin,
    /// Spins up to 30 us, less where that was in vain before, then sleeps.
    #[default]
    Adaptive,
}

/// Looks between two readings of the clock.
const LOOKS: u32 = 32;
/// Waits after which spinning is tried again where it was given up.
const RETRY: u32 = 256;
/// Below this a spin costs more than it can save.
const WORTH_IT: Duration = Duration::from_micros(2);
const FULL: Duration = Duration::from_micros(SPIN_MAX_US);

/// How long it pays to spin: the whole time after a success, half of it after each
/// failure, and not at all where it failed again and again, but for a try now and
/// then.
#[derive(Clone, Debug)]
pub(super) struct SpinBudget {
    time: Duration,
    skipped: u32,
}

impl SpinBudget {
    pub(super) fn new() -> SpinBudget {
        SpinBudget {
            time: FULL,
            skipped: 0,
        }
    }

    /// Time to spin in the wait that begins now.
    pub(super) fn begin(&mut self) -> Duration {
        if self.time.is_zero() {
            self.skipped += 1;
            if self.skipped == RETRY {
                self.skipped = 0;
                return FULL;
            }
        }
        self.time
    }

    /// Says how a spin ended.
    pub(super) fn ended(&mut self, found: bool) {
        self.time = if found { FULL } else { self.time / 2 };
        if self.time < WORTH_IT {
            self.time = Duration::ZERO;
        }
    }
}

/// One end's way of waiting.
#[derive(Clone, Debug)]
pub(super) struct Waiter {
    wait: Wait,
    budget: SpinBudget,
}

impl Waiter {
    pub(super) fn new(wait: Wait) -> Waiter {
        Waiter {
            wait,
            budget: SpinBudget::new(),
        }
    }

    /// Lowers the semaphore by one, waiting until `deadline`; `false` if it stayed
    /// zero.
    pub(super) fn acquire(
        &mut self,
        semaphore: &Semaphore,
        deadline: Instant,
    ) -> Result<bool, ZeroBufferError> {
        if semaphore.try_acquire() {
            return Ok(true);
        }
        match self.wait {
            Wait::Spin => return Ok(spin(semaphore, deadline)),
            Wait::Park => {}
            Wait::Adaptive => {
                let time = self.budget.begin();
                if !time.is_zero() {
                    let until = deadline.min(Instant::now() + time);
                    let found = spin(semaphore, until);
                    self.budget.ended(found);
                    if found {
                        return Ok(true);
                    }
                }
            }
        }
        semaphore
            .wait(deadline)
            .map_err(sys("waiting for a semaphore"))
    }
}

fn spin(semaphore: &Semaphore, until: Instant) -> bool {
    loop {
        for _ in 0..LOOKS {
            if semaphore.value() != 0 && semaphore.try_acquire() {
                return true;
            }
            std::hint::spin_loop();
        }
        if until <= Instant::now() {
            return false;
        }
    }
}

/// When to look next whether the peer lives: at the deadline or before.
pub(super) fn next_look(deadline: Instant) -> Instant {
    deadline.min(Instant::now() + Duration::from_millis(ZEROBUFFER_PEER_CHECK_MS))
}

/// The process at the other end, held by a descriptor: its number may go to another
/// process, the descriptor does not.
#[derive(Debug)]
pub(super) struct Peer {
    side: Side,
    /// Its place in the shared memory.
    offset: u64,
    pid: u64,
    /// It was there, although nobody looked in time to learn its number.
    was_there: bool,
    process: Option<PidFd>,
    gone: Option<Gone>,
}

impl Peer {
    /// Nobody yet.
    pub(super) fn new(side: Side, offset: u64) -> Peer {
        Peer {
            side,
            offset,
            pid: 0,
            was_there: false,
            process: None,
            gone: None,
        }
    }

    /// Whether a process of that number runs.
    pub(super) fn is_running(pid: i32) -> bool {
        match PidFd::open(pid) {
            Ok(process) => !process.has_exited().unwrap_or(false),
            // A number that is no process's; anything else (no descriptors left)
            // says nothing about the process.
            Err(e) => !matches!(
                e.raw_os_error().map(nix::errno::Errno::from_raw),
                Some(nix::errno::Errno::ESRCH | nix::errno::Errno::EINVAL)
            ),
        }
    }

    /// Its number, 0 if it was never looked at.
    pub(super) fn pid(&self) -> u64 {
        self.pid
    }

    /// Something came from it.
    #[inline]
    pub(super) fn heard(&mut self) {
        self.was_there = true;
    }

    /// Looks at the shared memory and, if `deeply`, at the process. Whether it is
    /// there; `None` if nobody ever was.
    pub(super) fn look(
        &mut self,
        segment: &Segment,
        deeply: bool,
    ) -> Result<Option<Result<(), Gone>>, ZeroBufferError> {
        let named = segment.pid(self.offset)?;
        let pid = u64::from(named.cast_unsigned());
        if pid == 0 {
            self.process = None;
            if self.was_there {
                self.gone.get_or_insert(Gone::Left);
            }
        } else if pid != self.pid || self.gone == Some(Gone::Left) {
            (self.pid, self.was_there, self.gone) = (pid, true, None);
            match PidFd::open(named) {
                Ok(process) => self.process = Some(process),
                Err(_) if !Peer::is_running(named) => self.gone = Some(Gone::Died),
                Err(e) => return Err(sys("opening the peer's process")(e)),
            }
        }
        if deeply && self.gone.is_none() {
            let exited = match &self.process {
                Some(process) => process
                    .has_exited()
                    .map_err(sys("looking at the peer's process"))?,
                None => false,
            };
            if exited {
                self.gone = Some(Gone::Died);
            }
        }
        Ok(match (self.gone, self.pid) {
            (Some(gone), _) => Some(Err(gone)),
            (None, 0) => None,
            (None, _) => Some(Ok(())),
        })
    }

    /// The error that says how it went.
    pub(super) fn error(&self, gone: Gone) -> ZeroBufferError {
        ZeroBufferError::PeerGone {
            side: self.side,
            pid: self.pid,
            gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_in_vain_is_given_up_and_tried_again() {
        let mut budget = SpinBudget::new();
        let mut spun = Duration::ZERO;
        for _ in 0..RETRY * 10 {
            let time = budget.begin();
            spun += time;
            if !time.is_zero() {
                budget.ended(false);
            }
        }
        assert!(spun < FULL * 14, "{spun:?} spun in vain");
        let mut waits = 0;
        while budget.begin().is_zero() {
            waits += 1;
            assert!(waits <= RETRY);
        }
        budget.ended(true);
        assert_eq!(budget.begin(), FULL, "one success and it spins again");
    }
}
