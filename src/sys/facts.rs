//! The facts about the kernel that everything here rests on, as tests.
//!
//! What needs a second process is played by this same test binary: it starts
//! itself with [`ROLE`] set, which makes the test `child` play that part.
#![allow(
    unsafe_code,
    reason = "reads, forks and mappings made as bare as they come"
)]

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::futex::{self, Lifeline, Wake};
use super::map::{Access, Mapping};
use super::memfd::{self, Seals};
use super::pagemap::{Pagemap, Then};
use super::process::PidFd;
use super::uffd::Uffd;
use super::{net, or_skip};
use crate::units::PAGE_SIZE;

const ROLE: &str = "UFFD_SYNC_TEST_ROLE";
const SOCKET: &str = "UFFD_SYNC_TEST_SOCKET";
const PATIENCE: Duration = Duration::from_secs(20);
const PAGES: u64 = 32;

/// A tracked region of this process.
struct Tracked {
    fd: OwnedFd,
    mapping: Mapping,
    uffd: Uffd,
    pagemap: Pagemap,
}

impl Tracked {
    /// All pages armed, none populated.
    fn new() -> Option<Tracked> {
        let uffd = or_skip("userfaultfd", Uffd::open_async())?;
        let fd = memfd::create("facts", PAGES * PAGE_SIZE).expect("memfd");
        let mapping = Mapping::shared(&fd, PAGES * PAGE_SIZE, Access::ReadWrite).expect("map");
        uffd.register_wp(&mapping).expect("register");
        uffd.protect(mapping.address(), mapping.len()).expect("arm");
        Some(Tracked {
            fd,
            mapping,
            uffd,
            pagemap: Pagemap::open_self().expect("pagemap"),
        })
    }

    fn store(&self, page: u64, value: u32) {
        store(&self.mapping, page, value);
    }

    fn scan(&self, then: Then) -> Vec<u64> {
        scan(&self.pagemap, self.mapping.address(), then)
    }
}

fn store(mapping: &Mapping, page: u64, value: u32) {
    let word = mapping.word(page * PAGE_SIZE).expect("a word");
    word.store(value, Ordering::Relaxed);
}

/// The pages reported, from the region's start.
fn scan(pagemap: &Pagemap, base: u64, then: Then) -> Vec<u64> {
    let mut ranges = Vec::new();
    let end = base + PAGES * PAGE_SIZE;
    let stopped = pagemap
        .scan_written(base, end, &mut ranges, 100, u64::MAX, then)
        .expect("scan");
    assert_eq!(stopped, end);
    ranges
        .into_iter()
        .flat_map(|range| (range.start - base) / PAGE_SIZE..(range.end - base) / PAGE_SIZE)
        .collect()
}

#[test]
fn stores_and_reads_into_the_mapping_are_seen() {
    let Some(tracked) = Tracked::new() else {
        return;
    };
    assert!(tracked.scan(Then::Leave).is_empty(), "nothing was stored");
    tracked.store(3, 7);
    assert_eq!(tracked.scan(Then::Protect), [3]);
    assert!(tracked.scan(Then::Protect).is_empty(), "armed again");
    tracked.store(3, 7);
    assert_eq!(tracked.scan(Then::Protect), [3], "the same value counts");

    let (mut writer, reader) = UnixStream::pair().expect("pair");
    writer.write_all(b"12345678").expect("write");
    let target = tracked
        .mapping
        .as_ptr()
        .wrapping_add(9 * PAGE_SIZE as usize);
    // SAFETY: required: eight writable bytes, within the mapping's tenth page.
    let got = unsafe { libc::read(reader.as_raw_fd(), target.cast(), 8) };
    assert_eq!(got, 8);
    assert_eq!(tracked.scan(Then::Protect), [9], "read(2) is seen");
}

#[test]
fn other_ways_of_writing_are_not_seen() {
    let Some(tracked) = Tracked::new() else {
        return;
    };
    for page in 0..PAGES {
        tracked.store(page, 1);
    }
    tracked.scan(Then::Protect);
    memfd::write_at(&tracked.fd, &[9], PAGE_SIZE).expect("pwrite");
    let second = Mapping::shared(&tracked.fd, PAGES * PAGE_SIZE, Access::ReadWrite).expect("map");
    store(&second, 2, 9);
    let word = tracked.mapping.word(3 * PAGE_SIZE).expect("a word");
    // SAFETY: required: the child of a process with threads calls nothing that
    // takes a lock. It stores once and leaves.
    match unsafe { libc::fork() } {
        0 => {
            word.store(9, Ordering::SeqCst);
            // SAFETY: required: nothing; the process ends here.
            unsafe { libc::_exit(0) }
        }
        child => {
            assert!(child > 0);
            let pid = nix::unistd::Pid::from_raw(child);
            nix::sys::wait::waitpid(pid, None).expect("the child ends");
        }
    }
    assert_eq!(word.load(Ordering::SeqCst), 9, "the fork did store");
    nix::fcntl::fallocate(
        &tracked.fd,
        nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
        4 * PAGE_SIZE as i64,
        PAGE_SIZE as i64,
    )
    .expect("punch");
    let reported = tracked.scan(Then::Protect);
    assert!(
        reported.iter().all(|page| !(1..=3).contains(page)),
        "{reported:?}"
    );
    let read = |page: u64| {
        let word = tracked.mapping.word(page * PAGE_SIZE).expect("a word");
        word.load(Ordering::Relaxed)
    };
    assert_eq!(read(4), 0, "the hole reads as zero");
    assert_ne!(read(1), 1, "and the others did change");
    assert_eq!((read(2), read(3)), (9, 9));
}

#[test]
fn a_fork_does_not_inherit_what_was_told_not_to_fork() {
    let fd = memfd::create("facts", PAGE_SIZE).expect("memfd");
    let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite).expect("map");
    mapping.dont_fork().expect("madvise");
    let word = mapping.word(0).expect("a word");
    // SAFETY: as above.
    match unsafe { libc::fork() } {
        0 => {
            word.store(9, Ordering::SeqCst);
            // SAFETY: required: nothing; the process ends here.
            unsafe { libc::_exit(0) }
        }
        child => {
            let pid = nix::unistd::Pid::from_raw(child);
            let status = nix::sys::wait::waitpid(pid, None).expect("the child ends");
            use nix::sys::wait::WaitStatus;
            assert!(matches!(status, WaitStatus::Signaled(..)), "{status:?}");
        }
    }
    assert_eq!(word.load(Ordering::SeqCst), 0);
}

#[test]
fn a_futex_word_in_an_armed_page_is_reported_without_a_store() {
    let Some(tracked) = Tracked::new() else {
        return;
    };
    tracked.store(5, 1);
    tracked.scan(Then::Protect);
    let word = tracked.mapping.word(5 * PAGE_SIZE).expect("a word");
    futex::wake(word, 1).expect("wake");
    assert_eq!(tracked.scan(Then::Protect), [5]);
}

#[test]
fn tracking_goes_on_after_sealing_and_the_owner_keeps_writing() {
    let Some(tracked) = Tracked::new() else {
        return;
    };
    let seals = Seals::FUTURE_WRITE | Seals::SHRINK | Seals::GROW | Seals::SEAL;
    memfd::add_seals(&tracked.fd, seals).expect("seal");
    tracked.store(1, 5);
    assert_eq!(tracked.scan(Then::Protect), [1]);
    let mut word = [0; 4];
    memfd::read_at(&tracked.fd, &mut word, PAGE_SIZE).expect("pread");
    assert_eq!(u32::from_ne_bytes(word), 5);
}

#[test]
fn scan_then_copy_keeps_stores_that_copy_then_scan_loses() {
    let Some(tracked) = Tracked::new() else {
        return;
    };
    let copy = || {
        let mut word = [0; 4];
        memfd::read_at(&tracked.fd, &mut word, 0).expect("pread");
        u32::from_ne_bytes(word)
    };
    // Right: the store that comes between is reported next time.
    tracked.store(0, 1);
    assert_eq!(tracked.scan(Then::Protect), [0]);
    tracked.store(0, 2);
    assert_eq!(copy(), 2);
    assert_eq!(tracked.scan(Then::Protect), [0]);
    // Wrong, the negative control: it is gone.
    tracked.store(0, 3);
    let stale = copy();
    tracked.store(0, 4);
    assert_eq!(tracked.scan(Then::Protect), [0]);
    assert!(tracked.scan(Then::Protect).is_empty());
    assert_ne!(stale, copy(), "the copy is stale and nothing says so");
}

#[test]
fn a_scan_with_little_room_goes_on_where_it_stopped() {
    let Some(tracked) = Tracked::new() else {
        return;
    };
    let stored: Vec<u64> = (0..PAGES).filter(|page| page % 5 < 2).collect();
    let (base, end) = (
        tracked.mapping.address(),
        tracked.mapping.address() + tracked.mapping.len(),
    );
    for (max_ranges, max_pages) in [(1, u64::MAX), (100, 1), (2, 3), (1, 1)] {
        stored.iter().for_each(|page| tracked.store(*page, 1));
        let mut found = Vec::new();
        let mut at = base;
        let mut calls = 0;
        while at < end {
            let mut ranges = Vec::new();
            let next = tracked
                .pagemap
                .scan_written(at, end, &mut ranges, max_ranges, max_pages, Then::Protect)
                .expect("scan");
            assert!(next > at && next <= end && ranges.len() <= max_ranges);
            let pages: Vec<u64> = ranges
                .iter()
                .flat_map(|range| (range.start - base) / PAGE_SIZE..(range.end - base) / PAGE_SIZE)
                .collect();
            assert!(pages.len() as u64 <= max_pages);
            found.extend(pages);
            at = next;
            calls += 1;
            assert!(calls <= 2 * PAGES, "no progress");
        }
        assert_eq!(found, stored, "{max_ranges} ranges, {max_pages} pages");
        assert!(tracked.scan(Then::Leave).is_empty(), "all armed again");
    }
    let nothing = tracked
        .pagemap
        .scan_written(base, end, &mut Vec::new(), 0, 1, Then::Leave);
    assert!(nothing.is_err());
}

#[test]
fn closing_the_last_userfaultfd_stops_tracking_silently() {
    let Some(tracked) = Tracked::new() else {
        return;
    };
    let (base, len) = (tracked.mapping.address(), tracked.mapping.len());
    let all = |pagemap: &Pagemap| pagemap.tracked_bytes(base, base + len).expect("scan");
    assert_eq!(all(&tracked.pagemap), len);
    let Tracked {
        uffd,
        pagemap,
        mapping,
        ..
    } = tracked;
    let duplicate = Uffd::from_fd(uffd.try_clone_fd().expect("dup")).expect("a userfaultfd");
    drop(uffd);
    assert_eq!(all(&pagemap), len, "a duplicate keeps it");
    duplicate.protect(base, PAGE_SIZE).expect("protect");
    drop(duplicate);
    // A process that another test is just starting may have a copy for a moment.
    let deadline = Instant::now() + PATIENCE;
    while all(&pagemap) != 0 {
        assert!(Instant::now() < deadline, "still tracked");
        std::thread::yield_now();
    }
    drop(mapping);
    assert_eq!(all(&pagemap), 0);
}

#[test]
fn unprotecting_reports_and_unregistering_ends_it() {
    let Some(tracked) = Tracked::new() else {
        return;
    };
    tracked.store(2, 1);
    tracked.scan(Then::Protect);
    let at = tracked.mapping.address() + 2 * PAGE_SIZE;
    tracked.uffd.unprotect(at, PAGE_SIZE).expect("unprotect");
    assert_eq!(tracked.scan(Then::Protect), [2]);
    tracked
        .uffd
        .unregister(&tracked.mapping)
        .expect("unregister");
    let error = tracked
        .uffd
        .protect(at, PAGE_SIZE)
        .expect_err("not registered");
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
}

#[test]
fn reading_a_hole_through_a_mapping_allocates_it_and_pread_does_not() {
    let fd = memfd::create("facts", PAGES * PAGE_SIZE).expect("memfd");
    let mut buf = vec![1; (PAGES * PAGE_SIZE) as usize];
    memfd::read_at(&fd, &mut buf, 0).expect("pread");
    assert_eq!(memfd::resident_bytes(&fd).expect("fstat"), 0);
    let mapping = Mapping::shared(&fd, PAGES * PAGE_SIZE, Access::ReadOnly).expect("map");
    for page in 0..PAGES {
        let word = mapping.word(page * PAGE_SIZE).expect("a word");
        assert_eq!(word.load(Ordering::Relaxed), 0);
    }
    let resident = memfd::resident_bytes(&fd).expect("fstat");
    assert_eq!(resident, PAGES * PAGE_SIZE);
}

/// A second process of this test binary, killed on drop.
struct Peer {
    child: Child,
    socket: OwnedFd,
}

impl Peer {
    fn start(role: &str) -> Peer {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("listen");
        let child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "sys::facts::child", "--nocapture"])
            .env(ROLE, role)
            .env(SOCKET, &path)
            .stdout(Stdio::null())
            .spawn()
            .expect("spawn");
        listener.set_nonblocking(true).expect("nonblocking");
        let deadline = Instant::now() + PATIENCE;
        let socket = loop {
            match listener.accept() {
                Ok((socket, _)) => break socket,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(Instant::now() < deadline, "the child does not connect");
                    std::thread::yield_now();
                }
                Err(e) => panic!("accept: {e}"),
            }
        };
        socket.set_nonblocking(false).expect("blocking");
        net::set_timeouts(&socket, Some(PATIENCE), Some(PATIENCE)).expect("timeouts");
        Peer {
            child,
            socket: socket.into(),
        }
    }

    /// Says one byte and waits for one byte.
    fn tell(&self, byte: u8) -> u8 {
        net::send_with_fds(&self.socket, &[byte], &[]).expect("send");
        let mut answer = [0];
        let got = net::recv_with_fds(&self.socket, &mut answer, 0, net::Blocking::Yes);
        assert_eq!(got.expect("an answer").bytes, 1);
        answer[0]
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test of its own: what the second process does.
#[test]
fn child() {
    let (Ok(role), Ok(path)) = (std::env::var(ROLE), std::env::var(SOCKET)) else {
        return;
    };
    let socket = net::unix_connect(Path::new(&path)).expect("connect");
    match role.as_str() {
        "writer" => play_writer(socket),
        "holder" => play_holder(socket),
        other => panic!("unknown role {other}"),
    }
}

/// Hands its tracking over, then stores 1 to the page that each byte names.
fn play_writer(socket: OwnedFd) {
    let tracked = Tracked::new().expect("the parent has tried");
    let own = PidFd::own().expect("pidfd");
    let fds = [
        tracked.fd.as_fd(),
        tracked.uffd.as_fd(),
        tracked.pagemap.as_fd(),
        own.as_fd(),
    ];
    let base = tracked.mapping.address().to_ne_bytes();
    net::send_with_fds(&socket, &base, &fds).expect("send");
    let mut socket = UnixStream::from(socket);
    let mut byte = [0];
    while socket.read_exact(&mut byte).is_ok() {
        tracked.store(u64::from(byte[0]), 1);
        socket.write_all(&byte).expect("answer");
    }
}

#[test]
fn dirt_is_found_from_another_process_and_not_in_a_dead_one() {
    if Tracked::new().is_none() {
        return;
    }
    let mut peer = Peer::start("writer");
    let mut base = [0; 8];
    let got = net::recv_with_fds(&peer.socket, &mut base, 8, net::Blocking::Yes).expect("recv");
    assert_eq!((got.bytes, got.fds.len(), got.truncated), (8, 4, false));
    let base = u64::from_ne_bytes(base);
    let mut fds = got.fds.into_iter();
    let mut fd = || fds.next().expect("a descriptor");
    let memory = fd();
    let uffd = Uffd::from_fd(fd()).expect("a userfaultfd");
    let pagemap = Pagemap::from_fd(fd()).expect("a pagemap");
    let pidfd = PidFd::from_fd(fd()).expect("a pidfd");
    assert_eq!(
        pidfd.pid().expect("a number"),
        peer.child.id().cast_signed()
    );

    assert_eq!(peer.tell(4), 4);
    assert_eq!(peer.tell(6), 6);
    assert_eq!(scan(&pagemap, base, Then::Protect), [4, 6]);
    assert!(scan(&pagemap, base, Then::Protect).is_empty());
    peer.tell(6);
    assert_eq!(scan(&pagemap, base, Then::Protect), [6]);
    peer.tell(9);
    uffd.protect(base, PAGES * PAGE_SIZE)
        .expect("arm from outside");
    assert!(scan(&pagemap, base, Then::Leave).is_empty());
    assert!(!pidfd.has_exited().expect("poll"));

    peer.tell(11);
    peer.kill();
    assert!(pidfd.has_exited().expect("poll"));
    // Kernels differ: the last store is never reported, with or without an error.
    let mut ranges = Vec::new();
    let end = base + PAGES * PAGE_SIZE;
    match pagemap.scan_written(base, end, &mut ranges, 100, u64::MAX, Then::Protect) {
        Ok(stopped) => assert_eq!(stopped, end),
        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ESRCH)),
    }
    assert!(ranges.is_empty());
    let error = uffd.protect(base, PAGE_SIZE).expect_err("nobody is there");
    assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    let mut word = [0; 4];
    memfd::read_at(&memory, &mut word, 11 * PAGE_SIZE).expect("pread");
    assert_eq!(u32::from_ne_bytes(word), 1, "but the memory survives it");
    assert_eq!(pidfd.pid().expect("a number"), -1);
}

#[test]
fn a_fork_neither_holds_nor_gives_back_its_parents_word() {
    let fd = memfd::create("facts", PAGE_SIZE).expect("memfd");
    let mapping = Arc::new(Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite).expect("map"));
    let held = Lifeline::hold(mapping, 0).expect("hold");
    let before = held.word().load(Ordering::Relaxed);
    // SAFETY: required: as above. The child frees one box, for which the C library
    // puts its allocator in order at a fork, and leaves.
    match unsafe { libc::fork() } {
        0 => {
            drop(held);
            // SAFETY: required: nothing; the process ends here.
            unsafe { libc::_exit(0) }
        }
        child => {
            let pid = nix::unistd::Pid::from_raw(child);
            nix::sys::wait::waitpid(pid, None).expect("the child ends");
        }
    }
    assert_eq!(held.word().load(Ordering::Relaxed), before);
    assert!(futex::is_held(before));
}

/// Takes a memfd, holds the word at 64 in it, and stays.
fn play_holder(socket: OwnedFd) {
    let mut byte = [0];
    let got = net::recv_with_fds(&socket, &mut byte, 1, net::Blocking::Yes).expect("recv");
    let mapping = Mapping::shared(&got.fds[0], PAGE_SIZE, Access::ReadWrite).expect("map");
    let _held = Lifeline::hold(Arc::new(mapping), 64).expect("hold");
    net::send_with_fds(&socket, &byte, &[]).expect("answer");
    // Until the parent kills this process, or is gone.
    let _ = net::recv_with_fds(&socket, &mut byte, 0, net::Blocking::Yes);
}

#[test]
fn a_killed_process_is_told_by_its_robust_word() {
    let fd = memfd::create("facts", PAGE_SIZE).expect("memfd");
    let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadOnly).expect("map");
    let word = mapping.word(64).expect("a word");
    let mut peer = Peer::start("holder");
    net::send_with_fds(&peer.socket, b"x", &[fd.as_fd()]).expect("send");
    let mut byte = [0];
    net::recv_with_fds(&peer.socket, &mut byte, 0, net::Blocking::Yes).expect("answer");
    let held = word.load(Ordering::Acquire);
    assert!(futex::is_held(held), "{held:#x}");
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let deadline = Some(Instant::now() + PATIENCE);
            futex::wait(word, held, deadline).expect("wait")
        });
        peer.kill();
        assert_ne!(waiter.join().expect("the waiter"), Wake::TimedOut);
    });
    let dead = word.load(Ordering::Acquire);
    assert!(!futex::is_held(dead));
    assert_eq!(dead, futex::OWNER_DIED | futex::WAITERS);
}
