//! Stores that wait: what a synchronous userfaultfd tells, and what frees whoever waits.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::sys::map::Access;
use crate::sys::{memfd, net, or_skip};
use crate::units::PAGE_SIZE;

const PAGES: u64 = 4;
const PATIENCE: Duration = Duration::from_secs(10);

/// Armed memory of this process whose stores wait.
struct Armed {
    uffd: Option<Uffd>,
    mapping: Mapping,
}

impl Armed {
    fn new() -> Option<Armed> {
        let uffd = or_skip("userfaultfd", Uffd::open_sync())?;
        let fd = memfd::create("uffd", PAGES * PAGE_SIZE).expect("memfd");
        let mapping = Mapping::shared(&fd, PAGES * PAGE_SIZE, Access::ReadWrite).expect("map");
        uffd.register_wp(&mapping).expect("register");
        uffd.protect(mapping.address(), mapping.len()).expect("arm");
        Some(Armed {
            uffd: Some(uffd),
            mapping,
        })
    }

    fn uffd(&self) -> &Uffd {
        self.uffd.as_ref().expect("open")
    }

    fn word(&self, page: u64) -> &AtomicU32 {
        self.mapping.word(page * PAGE_SIZE).expect("a word")
    }

    fn address(&self, page: u64) -> u64 {
        self.mapping.address() + page * PAGE_SIZE
    }

    /// The next message.
    fn fault(&self, faults: &mut Faults) -> Fault {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.uffd().read_faults(faults).expect("read") > 0 {
                return faults.next().expect("there is one");
            }
            assert!(Instant::now() < deadline, "no fault");
            let fds = [self.uffd().as_fd()];
            net::wait_readable(&fds, Some(PATIENCE)).expect("poll");
        }
    }
}

#[test]
fn a_store_waits_until_its_page_is_lifted() {
    let Some(armed) = Armed::new() else { return };
    let mut faults = Faults::new();
    assert_eq!(armed.uffd().read_faults(&mut faults).expect("read"), 0);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| armed.word(2).store(7, Ordering::Release));
        let address = armed.address(2);
        assert_eq!(armed.fault(&mut faults), Fault::Protected { address });
        assert_eq!(armed.word(2).load(Ordering::Acquire), 0, "it waits");
        // Woken without being lifted, it comes again.
        armed.uffd().wake(address, PAGE_SIZE).expect("wake");
        assert_eq!(armed.fault(&mut faults), Fault::Protected { address });
        armed.uffd().unprotect(address, PAGE_SIZE).expect("lift");
        writer.join().expect("the writer");
    });
    assert_eq!(armed.word(2).load(Ordering::Acquire), 7);
    armed.word(2).store(8, Ordering::Release);
    assert_eq!(armed.uffd().read_faults(&mut faults).expect("read"), 0);
}

#[test]
fn messages_come_in_batches() {
    let Some(armed) = Armed::new() else { return };
    let mut faults = Faults::new();
    std::thread::scope(|scope| {
        for page in 0..PAGES {
            let armed = &armed;
            scope.spawn(move || armed.word(page).store(1, Ordering::Release));
        }
        let mut seen = Vec::new();
        while (seen.len() as u64) < PAGES {
            let Fault::Protected { address } = armed.fault(&mut faults) else {
                panic!("not a store");
            };
            // What was read is kept until it was taken.
            let kept = faults.end - faults.next;
            let again = armed.uffd().read_faults(&mut faults).expect("read");
            assert!(kept == 0 || again == kept / MESSAGE);
            seen.push((address - armed.mapping.address()) / PAGE_SIZE);
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3]);
        let (base, len) = (armed.mapping.address(), armed.mapping.len());
        armed.uffd().unprotect(base, len).expect("lift");
    });
}

#[test]
fn closing_the_descriptor_frees_whoever_waits_even_after_its_message_was_read() {
    let Some(mut armed) = Armed::new() else {
        return;
    };
    let fd = armed.uffd().try_clone_fd().expect("dup");
    let mut faults = Faults::new();
    let mapping = &armed.mapping;
    let writer = |page: u64| {
        let word = mapping.word(page * PAGE_SIZE).expect("a word");
        move || word.store(1, Ordering::Release)
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(writer(0));
        let reading = Uffd::from_fd(fd).expect("a userfaultfd");
        let deadline = Instant::now() + PATIENCE;
        while reading.read_faults(&mut faults).expect("read") == 0 {
            assert!(Instant::now() < deadline, "no fault");
            std::thread::yield_now();
        }
        let second = scope.spawn(writer(1));
        drop(armed.uffd.take());
        assert!(!first.is_finished(), "the duplicate holds it");
        drop(reading);
        first.join().expect("freed");
        second.join().expect("freed");
    });
}

#[test]
fn foreign_messages_are_told_apart() {
    let mut faults = Faults::new();
    faults.bytes[0] = EVENT_PAGEFAULT;
    faults.end = MESSAGE;
    let missing = Fault::Foreign {
        event: EVENT_PAGEFAULT,
    };
    assert_eq!(faults.next(), Some(missing), "not of write-protection");
    assert_eq!(faults.next(), None);
}

#[test]
fn descriptors_in_messages_that_nobody_takes_are_closed() {
    use std::io::Read;
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let mut faults = Faults::new();
    for (at, fd) in [writer.try_clone().expect("dup"), writer]
        .into_iter()
        .enumerate()
    {
        let message = &mut faults.bytes[at * MESSAGE..(at + 1) * MESSAGE];
        message[0] = EVENT_FORK;
        let number = OwnedFd::from(fd).into_raw_fd() as u64;
        message[8..16].copy_from_slice(&number.to_ne_bytes());
    }
    faults.end = 2 * MESSAGE;
    let fork = Fault::Foreign { event: EVENT_FORK };
    assert_eq!(faults.next(), Some(fork));
    drop(faults);
    let deadline = Some(PATIENCE);
    assert!(net::wait_readable(&[reader.as_fd()], deadline).expect("poll"));
    assert_eq!(reader.read(&mut [0; 8]).expect("its end"), 0);
}

#[test]
fn reading_never_waits_although_the_descriptor_is_made_blocking() {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let Some(armed) = Armed::new() else { return };
    let uffd = armed.uffd();
    let flags = OFlag::from_bits_retain(fcntl(uffd, FcntlArg::F_GETFL).expect("open"));
    let blocking = FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK);
    fcntl(uffd, blocking).expect("open");
    let (told, hears) = std::sync::mpsc::channel();
    let fd = uffd.try_clone_fd().expect("dup");
    std::thread::spawn(move || {
        let uffd = Uffd::wrap(fd);
        let read = uffd.read_faults(&mut Faults::new());
        let _ = told.send((read.expect("nothing is there"), uffd.unblock()));
    });
    let (read, was_blocking) = hears.recv_timeout(PATIENCE).expect("it waits for ever");
    assert_eq!(read, 0);
    // Where reads need the flag it was set by the read.
    assert!(was_blocking.is_ok());
    assert!(!uffd.unblock().expect("open"), "the flag is shared");
}
