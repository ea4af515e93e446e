//! Processes, events between them, signals, clocks, and this process's limits.
//!
//! [`PidFd`] refers to one process for ever, also after its number was used
//! again. [`EventFd`] is a doorbell between processes. Descriptors that a peer
//! passed are checked for their kind and never waited on by a blocking call.
#![allow(
    unsafe_code,
    reason = "pidfd and scheduling system calls that nix does not have"
)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::EfdFlags;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SfdFlags;
use nix::time::{ClockId, clock_gettime};

use super::{SysError, check, duplicate, kind_of};
use crate::units::PAGE_SIZE;

/// A process, by a descriptor that stays with it.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens the process that has the number `pid` now.
    ///
    /// # Errors
    /// `ESRCH` if there is none.
    pub fn open(pid: i32) -> Result<PidFd, SysError> {
        // SAFETY: required: nothing; the call takes numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = check("pidfd_open", fd)?;
        // SAFETY: required: an open descriptor without an owner; the kernel just made it.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// This process.
    ///
    /// # Errors
    /// `EMFILE` if the process is out of descriptors.
    pub fn own() -> Result<PidFd, SysError> {
        PidFd::open(nix::unistd::getpid().as_raw())
    }

    /// The process that connected the Unix socket whose other end `socket` is, whatever its
    /// number has been used for since.
    ///
    /// # Errors
    /// `ENOPROTOOPT` before Linux 6.5; `ESRCH` or `EINVAL` if it is gone already.
    pub fn of_peer(socket: impl AsFd) -> Result<PidFd, SysError> {
        /// `include/uapi/asm-generic/socket.h`, which x86, Arm and RISC-V use.
        const SO_PEERPIDFD: libc::c_int = 77;
        let mut pidfd: libc::c_int = -1;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: required: `len` writable bytes at the value, and a writable length. Both
        // are locals, of the type that the option has.
        let answer = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERPIDFD,
                (&raw mut pidfd).cast(),
                &raw mut len,
            )
        };
        check("SO_PEERPIDFD", answer.into())?;
        // SAFETY: required: an open descriptor without an owner; the kernel just made it.
        PidFd::from_fd(unsafe { OwnedFd::from_raw_fd(pidfd) })
    }

    /// Takes a descriptor that another process passed.
    ///
    /// # Errors
    /// `EINVAL` if it is not a pidfd.
    pub fn from_fd(fd: OwnedFd) -> Result<PidFd, SysError> {
        let kind = kind_of(&fd)?;
        let kind = kind.to_string_lossy();
        if kind != "anon_inode:[pidfd]" && !kind.starts_with("pidfd:[") {
            return Err(SysError::os("taking a pidfd", libc::EINVAL));
        }
        Ok(PidFd(fd))
    }

    /// The process's number in this PID namespace; -1 once it was reaped.
    ///
    /// # Errors
    /// [`SysError`] where `/proc` is not mounted.
    pub fn pid(&self) -> Result<i32, SysError> {
        let path = format!("/proc/self/fdinfo/{}", self.0.as_raw_fd());
        let text = std::fs::read_to_string(path)
            .map_err(|e| SysError::new("read /proc/self/fdinfo", e))?;
        text.lines()
            .find_map(|line| line.strip_prefix("Pid:"))
            .and_then(|number| number.trim().parse().ok())
            .ok_or_else(|| SysError::os("reading a pidfd's number", libc::EINVAL))
    }

    /// Whether the process has exited. Does not wait.
    ///
    /// # Errors
    /// Whatever `poll` says.
    pub fn has_exited(&self) -> Result<bool, SysError> {
        is_ready(self.as_fd(), PollFlags::POLLIN)
    }

    /// Sends the process a signal.
    ///
    /// # Errors
    /// `ESRCH` if it has exited, `EPERM` if it belongs to another user.
    pub fn kill(&self, signal: i32) -> Result<(), SysError> {
        // SAFETY: required: the third argument is null or a `siginfo_t`. It is null.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        check("pidfd_send_signal", answer).map(drop)
    }

    /// A duplicate, to pass on.
    ///
    /// # Errors
    /// `EMFILE` if the process is out of descriptors.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, SysError> {
        duplicate(self)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A doorbell: readable once rung, until drained.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A silent one, nonblocking, closed on exec.
    ///
    /// # Errors
    /// `EMFILE` if the process is out of descriptors.
    pub fn new() -> Result<EventFd, SysError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        nix::sys::eventfd::EventFd::from_flags(flags)
            .map(|event| EventFd(event.into()))
            .map_err(|e| SysError::new("eventfd", e))
    }

    /// Takes a descriptor that another process passed.
    ///
    /// # Errors
    /// `EINVAL` if it is not an eventfd.
    pub fn from_fd(fd: OwnedFd) -> Result<EventFd, SysError> {
        if kind_of(&fd)?.as_os_str() != "anon_inode:[eventfd]" {
            return Err(SysError::os("taking an eventfd", libc::EINVAL));
        }
        Ok(EventFd(fd))
    }

    /// Rings. A doorbell rung 2^64 - 2 times without being drained stays rung.
    ///
    /// For a doorbell that this process made, or that one made which it trusts:
    /// whoever shares it can make it block.
    pub fn ring(&self) {
        // The only failure of a doorbell is a full counter, and that is rung.
        let _ = nix::unistd::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Silences it and says how often it was rung; 0 if it was silent. Does not
    /// wait, even if a peer has made its descriptor blocking.
    pub fn drain(&self) -> u64 {
        let mut count = 0u64;
        let part = libc::iovec {
            iov_base: (&raw mut count).cast(),
            iov_len: size_of::<u64>(),
        };
        // SAFETY: required: one part of eight writable bytes; it is a local.
        let read =
            unsafe { libc::preadv2(self.0.as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
        if read == 8 { count } else { 0 }
    }

    /// A duplicate, to pass on.
    ///
    /// # Errors
    /// `EMFILE` if the process is out of descriptors.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, SysError> {
        duplicate(self)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Signals of this process as something to read.
#[derive(Debug)]
pub struct SignalFd(nix::sys::signalfd::SignalFd);

impl SignalFd {
    /// Keeps `signals` from interrupting this thread and those it starts later,
    /// and delivers them here. Call it before the first thread is started.
    ///
    /// # Errors
    /// `EINVAL` for a number that is no signal.
    pub fn block(signals: &[i32]) -> Result<SignalFd, SysError> {
        let mut set = SigSet::empty();
        for &signal in signals {
            let signal = Signal::try_from(signal).map_err(|e| SysError::new("signal number", e))?;
            set.add(signal);
        }
        set.thread_block()
            .map_err(|e| SysError::new("pthread_sigmask", e))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        nix::sys::signalfd::SignalFd::with_flags(&set, flags)
            .map(SignalFd)
            .map_err(|e| SysError::new("signalfd", e))
    }

    /// The next signal that has arrived, if any. Does not wait.
    ///
    /// # Errors
    /// Whatever `read` says.
    pub fn read(&self) -> Result<Option<i32>, SysError> {
        let info = self
            .0
            .read_signal()
            .map_err(|e| SysError::new("read of a signalfd", e))?;
        Ok(info.map(|info| info.ssi_signo.cast_signed()))
    }

    /// A duplicate, for a poll that outlives a borrow.
    ///
    /// # Errors
    /// `EMFILE` if the process is out of descriptors.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, SysError> {
        duplicate(self)
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Time since boot in nanoseconds (`CLOCK_MONOTONIC`), the same for all
/// processes of this host.
pub fn monotonic_ns() -> u64 {
    clock_ns(ClockId::CLOCK_MONOTONIC)
}

/// Time since 1970 in nanoseconds (`CLOCK_REALTIME`).
pub fn realtime_ns() -> u64 {
    clock_ns(ClockId::CLOCK_REALTIME)
}

/// The instant `timeout` from now. What is longer than a year, for ever among it, is that
/// long: no clock shows the sum of now and [`Duration::MAX`].
pub fn deadline_in(timeout: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + timeout.min(FAR)
}

fn clock_ns(clock: ClockId) -> u64 {
    // The two clocks exist on every Linux: there is no failure to report.
    let now = clock_gettime(clock).unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
    now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
}

/// The user that this process acts as.
pub fn effective_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// The calling thread's number, as futexes and `/proc` know it.
pub fn thread_id() -> i32 {
    nix::unistd::gettid().as_raw()
}

/// This process's number.
pub fn process_id() -> i32 {
    nix::unistd::getpid().as_raw()
}

/// The CPU that the calling thread runs on at the moment: a load from the C
/// library's thread area, where it registered one (2.35 and later), else a call
/// into the vDSO. `u32::MAX` where neither answers.
#[inline]
pub fn current_cpu() -> u32 {
    // SAFETY: required: nothing; the function has no arguments and always returns.
    let cpu = unsafe { libc::sched_getcpu() };
    u32::try_from(cpu).unwrap_or(u32::MAX)
}

/// Lets the calling thread run on one CPU only.
///
/// # Errors
/// `EINVAL` if there is no such CPU or the process may not use it.
pub fn pin_to_cpu(cpu: usize) -> Result<(), SysError> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu).map_err(|e| SysError::new("CPU number", e))?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)
        .map_err(|e| SysError::new("sched_setaffinity", e))
}

/// Lets the allocator keep up to `bytes` that were freed, instead of giving them
/// back and faulting them in again with the next large buffer. For programs that
/// are a node and nothing else: it changes the whole process.
pub fn keep_freed_memory(bytes: u32) {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    #[cfg(target_env = "gnu")]
    // SAFETY: required: nothing; the calls set numbers inside of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, bytes.min(32 << 20));
        libc::mallopt(libc::M_TRIM_THRESHOLD, bytes);
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = bytes;
}

/// Raises this process's limit of open descriptors as far as it may, and says
/// what it is now.
pub fn raise_fd_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 0;
    };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

/// This process's resident memory in bytes; 0 where `/proc` is not mounted.
pub fn rss_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok())
        .map_or(0, |pages| pages.saturating_mul(PAGE_SIZE))
}

/// Whether `fd` has one of `events` now. Does not wait.
pub(super) fn is_ready(fd: BorrowedFd<'_>, events: PollFlags) -> Result<bool, SysError> {
    let mut fds = [PollFd::new(fd, events)];
    loop {
        match nix::poll::poll(&mut fds, PollTimeout::ZERO) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(SysError::new("poll", e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{memfd, pagemap::Pagemap, uffd::Uffd};
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn a_doorbell_counts_and_falls_silent() {
        let bell = EventFd::new().expect("eventfd");
        let other = EventFd::from_fd(bell.try_clone_fd().expect("dup")).expect("an eventfd");
        assert_eq!(bell.drain(), 0);
        other.ring();
        other.ring();
        assert!(is_ready(bell.as_fd(), PollFlags::POLLIN).expect("poll"));
        assert_eq!(bell.drain(), 2);
        assert_eq!(bell.drain(), 0);
    }

    #[test]
    fn draining_a_blocking_eventfd_of_a_peer_does_not_wait() {
        let fd = nix::sys::eventfd::EventFd::from_flags(EfdFlags::empty()).expect("eventfd");
        let bell = EventFd::from_fd(fd.into()).expect("an eventfd");
        assert_eq!(bell.drain(), 0);
        let full = (u64::MAX - 1).to_ne_bytes();
        nix::unistd::write(&bell, &full).expect("fill");
        assert_eq!(bell.drain(), u64::MAX - 1);
    }

    #[test]
    fn a_full_doorbell_stays_rung_and_blocks_nobody() {
        let bell = EventFd::new().expect("eventfd");
        let full = (u64::MAX - 1).to_ne_bytes();
        nix::unistd::write(&bell, &full).expect("fill");
        bell.ring();
        assert_eq!(bell.drain(), u64::MAX - 1);
    }

    #[test]
    fn other_kinds_of_descriptor_are_refused() {
        let file = || memfd::create("kind", 4096).expect("memfd");
        assert!(EventFd::from_fd(file()).is_err());
        assert!(PidFd::from_fd(file()).is_err());
        assert!(Uffd::from_fd(file()).is_err());
        assert!(Pagemap::from_fd(file()).is_err());
        let bell = || {
            EventFd::new()
                .and_then(|b| b.try_clone_fd())
                .expect("eventfd")
        };
        assert!(PidFd::from_fd(bell()).is_err());
        assert!(Uffd::from_fd(bell()).is_err());
        let stat = std::fs::File::open("/proc/self/stat").expect("open");
        assert!(Pagemap::from_fd(stat.into()).is_err());
        let folder = tempfile::tempdir().expect("a folder");
        let fake = std::fs::File::create_new(folder.path().join("pagemap")).expect("create");
        assert!(Pagemap::from_fd(fake.into()).is_err());
        let own = Pagemap::open_self().expect("open");
        assert!(Pagemap::from_fd(own.try_clone_fd().expect("dup")).is_ok());
    }

    #[test]
    fn a_process_is_known_by_its_pidfd_until_after_its_death() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("spawn");
        let pid = child.id().cast_signed();
        let pidfd = PidFd::open(pid).expect("pidfd");
        let copy = PidFd::from_fd(pidfd.try_clone_fd().expect("dup")).expect("a pidfd");
        assert_eq!(copy.pid().expect("a number"), pid);
        assert!(!copy.has_exited().expect("poll"));
        pidfd.kill(libc::SIGKILL).expect("kill");
        child.wait().expect("wait");
        assert!(copy.has_exited().expect("poll"));
        assert_eq!(copy.pid().expect("a number"), -1);
        let error = pidfd.kill(0).expect_err("gone");
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
        let own = PidFd::own().expect("pidfd");
        assert_eq!(own.pid().expect("a number"), process_id());
    }

    #[test]
    fn the_process_behind_a_socket_is_known() {
        let (one, _other) = crate::sys::net::unix_pair().expect("a pair");
        let peer = PidFd::of_peer(&one).expect("its process");
        assert_eq!(peer.pid().expect("a number"), process_id());
        peer.kill(0).expect("this process may signal itself");
        let bell = EventFd::new().expect("eventfd");
        assert!(PidFd::of_peer(&bell).is_err(), "no socket");
    }

    #[test]
    fn blocked_signals_are_read() {
        let signals = SignalFd::block(&[libc::SIGUSR2, libc::SIGHUP]).expect("signalfd");
        assert_eq!(signals.read().expect("read"), None);
        nix::sys::signal::raise(Signal::SIGUSR2).expect("raise");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_ready(signals.as_fd(), PollFlags::POLLIN).expect("poll") {
            assert!(Instant::now() < deadline);
        }
        assert_eq!(signals.read().expect("read"), Some(libc::SIGUSR2));
        assert!(SignalFd::block(&[9999]).is_err());
    }

    #[test]
    fn clocks_numbers_and_limits() {
        let (before, wall) = (monotonic_ns(), realtime_ns());
        assert!(wall > 1_600_000_000_000_000_000 && monotonic_ns() >= before);
        assert!(thread_id() > 0 && rss_bytes() > 100_000);
        let thread = std::thread::spawn(|| (thread_id(), pin_to_cpu(1 << 20)));
        let (other, beyond) = thread.join().expect("a thread");
        assert_ne!(other, thread_id());
        assert!(beyond.is_err());
        assert!(raise_fd_limit() >= 64);
    }
}
