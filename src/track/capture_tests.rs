//! Captures against real mappings of this and of a child process.

#![allow(
    clippy::single_range_in_vec_init,
    reason = "lists of marks, some of length one"
)]

use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::limits;
use crate::shm::SharedMemory;
use crate::sys::map::{Access, Mapping};
use crate::sys::pagemap::Then;
use crate::sys::{memfd, net, or_skip};
use crate::units::MIB;

/// A writer's mapping and all that an engine has of it, in one process.
struct Bench {
    writer: SharedMemory,
    source: Source,
    tracker: Tracker,
    twin: Twin,
    pre: PreImages,
    size: u64,
}

impl Bench {
    fn new(size: u64, mode: Mode) -> Option<Self> {
        Self::with_room(size, size, mode)
    }

    fn with_room(size: u64, room: u64, mode: Mode) -> Option<Self> {
        let fd = memfd::create("track-test", size).unwrap();
        let mapping = Mapping::with_room(&fd, size, room, Access::ReadWrite).unwrap();
        let attachment = match Attachment::for_region(&mapping, mode) {
            Ok(attachment) => attachment,
            Err(TrackError::Open { source }) => return or_skip("async tracking", Err(source)),
            Err(other) => panic!("{other}"),
        };
        let reader = Mapping::with_room(&fd, size, room, Access::ReadOnly).unwrap();
        let mut bench = Self {
            writer: SharedMemory::new(mapping),
            source: Source::Mapped {
                memory: SharedMemory::new(reader),
                fd,
            },
            tracker: Tracker::new(mode, Some(attachment)).unwrap(),
            twin: Twin::with_room(size, room).unwrap(),
            pre: PreImages::new(size, size),
            size,
        };
        bench.run(Capture::full());
        Some(bench)
    }

    fn step(&mut self, capture: &mut Capture, when_full: WhenFull) -> Step {
        capture.step(
            &mut self.tracker,
            &self.source,
            &mut self.twin,
            &mut self.pre,
            when_full,
        )
    }

    fn run(&mut self, mut capture: Capture) -> Captured {
        let limit = Instant::now() + Duration::from_secs(60);
        loop {
            assert!(Instant::now() < limit, "a capture comes to an end");
            match self.step(&mut capture, WhenFull::Abort) {
                Step::More => {}
                Step::Done(captured) => return captured,
                other => panic!("{other:?}"),
            }
        }
    }

    fn hot_pages(&self) -> u64 {
        self.tracker.heat().unwrap().pages()
    }

    fn dirty(&mut self, marks: Vec<Range<u64>>) -> Captured {
        let capture = Capture::dirty(&self.tracker, marks);
        self.run(capture)
    }

    fn live(&self) -> Vec<u8> {
        let mut live = vec![0; self.size as usize];
        let read = memfd::read_at(self.source.fd(), &mut live, 0).unwrap();
        assert_eq!(read, live.len());
        live
    }
}

/// What a replica does with a capture.
fn apply(replica: &mut [u8], extents: &ExtentSet, content: &[u8]) {
    for range in extents.ranges() {
        let range = range.start as usize..range.end as usize;
        replica[range.clone()].copy_from_slice(&content[range]);
    }
}

type Writes = Vec<(u64, Vec<u8>)>;

fn writes(size: u64) -> impl Strategy<Value = Vec<(Writes, bool)>> {
    let bytes = prop_oneof![
        4 => proptest::collection::vec(0u8..2, 1..40),
        1 => proptest::collection::vec(any::<u8>(), 5000..9000),
    ];
    let round = proptest::collection::vec((0..size, bytes), 0..8);
    proptest::collection::vec((round, any::<bool>()), 1..6)
}

fn follows_random_writes(mode: Mode, rounds: Vec<(Writes, bool)>) -> Result<(), TestCaseError> {
    const SIZE: u64 = 300 * PAGE_SIZE + 1000;
    let Some(mut bench) = Bench::new(SIZE, mode) else {
        return Ok(());
    };
    bench.tracker.set_hot_after(1);
    let mut replica = vec![0; SIZE as usize];
    for (writes, full) in rounds {
        let mut marks = Vec::new();
        for (at, bytes) in &writes {
            let end = (at + bytes.len() as u64).min(SIZE);
            bench
                .writer
                .write(*at, &bytes[..(end - at) as usize])
                .unwrap();
            marks.push(*at..end);
        }
        let live = bench.live();
        let captured = if full {
            bench.run(Capture::full())
        } else if mode == Mode::Manual {
            bench.dirty(marks.clone())
        } else {
            bench.dirty(Vec::new())
        };
        prop_assert!(bench.twin[..] == live[..], "the twin is the content");
        apply(&mut replica, &captured.extents, &bench.twin);
        prop_assert!(replica == live, "the extents carry every change");
        if mode == Mode::Manual && !full {
            let mut marked = ExtentSet::new(SIZE);
            marks.into_iter().for_each(|mark| marked.insert(mark));
            prop_assert_eq!(&captured.extents, &marked);
        } else {
            let written: u64 = writes.iter().map(|w| w.1.len() as u64).sum();
            // Runs that nearly touch join, and a page mostly changed goes whole.
            prop_assert!(captured.extents.bytes() <= 3 * written + 16 * written);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn async_captures_follow_random_writes(rounds in writes(300 * PAGE_SIZE)) {
        follows_random_writes(Mode::Async, rounds)?;
    }

    #[test]
    fn manual_captures_ship_what_is_marked(rounds in writes(300 * PAGE_SIZE)) {
        follows_random_writes(Mode::Manual, rounds)?;
    }

    #[test]
    fn comparisons_follow_random_writes(rounds in writes(300 * PAGE_SIZE)) {
        follows_random_writes(Mode::Compare, rounds)?;
    }
}

#[test]
fn four_bytes_are_four_bytes_and_the_same_value_is_nothing() {
    let Some(mut bench) = Bench::new(MIB, Mode::Async) else {
        return;
    };
    // A page that is left open is reported whether or not it was stored to.
    bench.tracker.set_hot_after(0);
    bench.writer.write(70_000, &7u32.to_le_bytes()).unwrap();
    let captured = bench.dirty(Vec::new());
    assert_eq!(captured.extents.ranges().next(), Some(70_000..70_001));
    assert_eq!((captured.dirty_pages, captured.changed_bytes), (1, 1));
    assert_eq!(captured.scanned_pages, 256);
    bench.writer.write(70_000, &7u32.to_le_bytes()).unwrap();
    let same = bench.dirty(Vec::new());
    assert!(same.extents.is_empty());
    assert_eq!(same.dirty_pages, 1, "a store of the same value is a store");
    let marked = bench.dirty(vec![70_000..70_004, 70_002..70_008, 2 * MIB..3 * MIB]);
    assert_eq!(marked.extents.ranges().next(), Some(70_000..70_008));
    assert_eq!(bench.dirty(Vec::new()).dirty_pages, 0);
}

#[test]
fn a_page_written_each_time_is_left_open_and_armed_again_when_it_rests() {
    let Some(mut bench) = Bench::new(8 * MIB, Mode::Async) else {
        return;
    };
    let hot = [3 * PAGE_SIZE, 5 * MIB];
    for round in 1..=limits::HOT_CAPTURES + 3 {
        for page in hot {
            bench.writer.write(page, &round.to_le_bytes()).unwrap();
        }
        // Beside each a page that is cold.
        bench.writer.write(round * 7 * PAGE_SIZE, &[1]).unwrap();
        let captured = bench.dirty(Vec::new());
        assert_eq!((captured.dirty_pages, captured.extents.bytes()), (3, 3));
        let expected = if round >= limits::HOT_CAPTURES { 2 } else { 0 };
        assert_eq!(bench.hot_pages(), expected, "after {round} captures");
        assert!(bench.live() == bench.twin[..]);
    }
    for left in [2, 2, 0] {
        let captured = bench.dirty(Vec::new());
        assert!(captured.extents.is_empty(), "nothing was stored");
        assert_eq!(bench.hot_pages(), left);
    }
    assert_eq!(bench.dirty(Vec::new()).dirty_pages, 0, "all is armed");
    bench.writer.write(hot[1], &[9]).unwrap();
    assert_eq!(bench.dirty(Vec::new()).extents.bytes(), 1);
}

#[test]
fn whoever_does_not_compare_hot_pages_loses_their_stores() {
    let Some(mut bench) = Bench::new(MIB, Mode::Async) else {
        return;
    };
    bench.tracker.set_hot_after(1);
    bench.writer.write(5000, &[1]).unwrap();
    bench.dirty(Vec::new());
    assert_eq!(bench.hot_pages(), 1);
    bench.writer.write(5000, &[2]).unwrap();
    // As a control: arming alone, as if a page that is open had not been written.
    bench.tracker.attachment().unwrap().arm().unwrap();
    assert!(bench.dirty(Vec::new()).extents.is_empty());
    assert_ne!(bench.live(), bench.twin[..], "the store is lost");
    bench.run(Capture::full());
    assert_eq!(bench.hot_pages(), 0, "what is armed is not hot");
    assert!(bench.live() == bench.twin[..]);
}

#[test]
fn many_cold_runs_between_few_hot_pages_are_armed_too() {
    let Some(mut bench) = Bench::new(4 * MIB, Mode::Async) else {
        return;
    };
    bench.tracker.set_hot_after(2);
    let hot = [0, 300, 511, 512, 700];
    for round in 1..=6u64 {
        for page in hot {
            bench
                .writer
                .write(page * PAGE_SIZE, &[round as u8])
                .unwrap();
        }
        // Every other page, now and then: more runs than gaps between hot pages.
        if round % 3 == 0 {
            for page in (1..1024).step_by(2) {
                bench
                    .writer
                    .write(page * PAGE_SIZE, &[round as u8])
                    .unwrap();
            }
        }
        bench.dirty(Vec::new());
        assert!(bench.live() == bench.twin[..]);
        let expected = if round >= 2 { 5 } else { 0 };
        assert_eq!(bench.hot_pages(), expected, "round {round}");
    }
    bench.tracker.set_hot_after(0);
    bench.dirty(Vec::new());
    assert_eq!(bench.hot_pages(), 0, "switched off");
    assert_eq!(bench.dirty(Vec::new()).dirty_pages, 0, "and armed");
}

#[test]
fn a_region_grows_while_it_is_stored_to() {
    const MAX: u64 = 32 * MIB;
    let (mut size, step) = (3 * PAGE_SIZE + 100, 9 * PAGE_SIZE + 700);
    let Some(mut bench) = Bench::with_room(size, MAX, Mode::Async) else {
        return;
    };
    bench.tracker.set_hot_after(2);
    let (writer, fd) = (bench.writer.clone(), bench.source.fd().try_clone().unwrap());
    let told = Arc::new(std::sync::atomic::AtomicU64::new(size));
    let tells = Arc::clone(&told);
    let thread = std::thread::spawn(move || {
        let mut x = 1u64;
        while size + step < MAX {
            // The file first, then the word, then stores behind the old end.
            size += step;
            memfd::grow(&fd, size.next_multiple_of(PAGE_SIZE)).unwrap();
            tells.store(size, std::sync::atomic::Ordering::Release);
            writer.write(size - step, &x.to_le_bytes()).unwrap();
            for store in 0..100 {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let back = if store % 2 == 0 { step.min(size) } else { size };
                let at = size - 8 - (x >> 33) % (back - 8);
                writer.write(at, &x.to_le_bytes()).unwrap();
            }
        }
    });
    let mut replica = Vec::new();
    loop {
        let over = thread.is_finished();
        let (old, new) = (bench.size, told.load(std::sync::atomic::Ordering::Acquire));
        let mut capture = Capture::dirty(&bench.tracker, Vec::new());
        if new > old {
            bench.size = new;
            bench.twin.grow(new);
            bench.pre.grow(new);
            capture = capture.grown_from(old);
        }
        let captured = bench.run(capture);
        replica.resize(bench.size as usize, 0);
        apply(&mut replica, &captured.extents, &bench.twin);
        if over {
            break;
        }
    }
    thread.join().unwrap();
    assert!(bench.size > MAX - 2 * step);
    assert!(replica == bench.live());
    let resident = memfd::resident_bytes(bench.source.fd()).unwrap();
    assert!(resident <= bench.size.next_multiple_of(PAGE_SIZE));
}

/// The order that loses stores, as a control: copying before protecting.
#[test]
fn copying_before_the_scan_loses_a_store_and_scanning_first_does_not() {
    let Some(mut bench) = Bench::new(MIB, Mode::Async) else {
        return;
    };
    let scan = |bench: &Bench, then| {
        let attachment = bench.tracker.attachment().unwrap();
        let mut found = Vec::new();
        let end = attachment.base + attachment.len;
        let pagemap = attachment.pagemap.as_ref().unwrap();
        pagemap
            .scan_written(attachment.base, end, &mut found, 64, 1024, then)
            .unwrap();
        found.len()
    };
    let mut copy = [0u8; 1];
    bench.writer.write(5000, &[1]).unwrap();
    assert_eq!(scan(&bench, Then::Leave), 1);
    bench.source.copy(5000, &mut copy).unwrap();
    bench.writer.write(5000, &[2]).unwrap();
    assert_eq!(scan(&bench, Then::Protect), 1);
    assert_eq!(copy, [1]);
    assert_eq!(scan(&bench, Then::Leave), 0, "the second store is lost");

    bench.writer.write(9000, &[1]).unwrap();
    assert_eq!(scan(&bench, Then::Protect), 1);
    bench.writer.write(9000, &[2]).unwrap();
    bench.source.copy(9000, &mut copy).unwrap();
    assert_eq!(
        scan(&bench, Then::Leave),
        1,
        "reported again, whatever the copy holds"
    );
    bench.run(Capture::full());
    assert_eq!(bench.twin[9000], 2);
    assert_eq!(bench.twin[5000], 2);
}

#[test]
fn a_writer_that_never_pauses_is_followed_to_its_last_store() {
    follow_to_the_last_store(limits::HOT_CAPTURES, 4 * MIB);
}

#[test]
fn so_is_one_whose_pages_get_hot_and_cold_all_the_time() {
    follow_to_the_last_store(1, 16 * MIB);
    follow_to_the_last_store(2, 16 * MIB);
}

/// One thread stores all over a region, half of it to 64 pages, while captures go on.
fn follow_to_the_last_store(hot_after: u64, size: u64) {
    let Some(mut bench) = Bench::new(size, Mode::Async) else {
        return;
    };
    bench.tracker.set_hot_after(hot_after);
    let writer = bench.writer.clone();
    let thread = std::thread::spawn(move || {
        let mut x = 1u64;
        for store in 0..200_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let span = if store % 2 == 0 { size } else { 64 * PAGE_SIZE };
            let at = (x >> 33) % (span - 8) / 8 * 8;
            writer.write(at, &x.to_le_bytes()).unwrap();
        }
    });
    let mut replica = vec![0; size as usize];
    let (mut rounds, mut hottest) = (0, 0);
    loop {
        let over = thread.is_finished();
        let captured = bench.dirty(Vec::new());
        apply(&mut replica, &captured.extents, &bench.twin);
        hottest = hottest.max(bench.hot_pages());
        rounds += 1;
        if over {
            break;
        }
    }
    thread.join().unwrap();
    assert!(rounds > 1);
    assert!(hottest > 0 || hot_after > 2, "no page got hot");
    assert!(replica == bench.live());
}

#[test]
fn sparse_regions_stay_sparse() {
    const SIZE: u64 = 512 * MIB;
    for mode in [Mode::Manual, Mode::Compare, Mode::Async] {
        let Some(mut bench) = Bench::new(SIZE, mode) else {
            continue;
        };
        bench.writer.write(100 * MIB, &[1; 5000]).unwrap();
        bench.writer.write(SIZE - 1, &[1]).unwrap();
        let before = memfd::resident_bytes(bench.source.fd()).unwrap();
        assert_eq!(before, 3 * PAGE_SIZE);
        let full = bench.run(Capture::full());
        assert_eq!(full.extents.bytes(), 5001);
        assert_eq!(full.scanned_pages, SIZE / PAGE_SIZE);
        assert_eq!(full.dirty_pages, 3);
        bench.dirty(vec![200 * MIB..200 * MIB + 9000]);
        let after = memfd::resident_bytes(bench.source.fd()).unwrap();
        assert_eq!(after, before, "{mode}: holes were not allocated");
        assert_eq!(bench.twin.resident_bytes(), 3 * PAGE_SIZE);
    }
}

#[test]
fn what_became_a_hole_or_was_cut_off_reads_as_zeros() {
    let fd = memfd::create("track-test", 64 * PAGE_SIZE).unwrap();
    let file = std::fs::File::from(fd.as_fd().try_clone_to_owned().unwrap());
    memfd::write_at(&fd, &vec![3; 64 * PAGE], 0).unwrap();
    let size = 60 * PAGE_SIZE + 7;
    let source = Source::File { fd, size };
    let mut tracker = Tracker::new(Mode::Compare, None).unwrap();
    let mut twin = Twin::new(size).unwrap();
    let mut pre = PreImages::new(size, size);
    let mut run = |twin: &mut Twin| {
        let mut capture = Capture::dirty(&tracker, Vec::new());
        loop {
            match capture.step(&mut tracker, &source, twin, &mut pre, WhenFull::PutOff) {
                Step::More => {}
                Step::Done(captured) => return captured,
                other => panic!("{other:?}"),
            }
        }
    };
    assert!(run(&mut twin).extents.is_all());
    file.set_len(20 * PAGE_SIZE + 5).unwrap();
    let captured = run(&mut twin);
    assert_eq!(
        captured.extents.ranges().next(),
        Some(20 * PAGE_SIZE..size),
        "a page mostly changed goes whole"
    );
    assert!(twin[20 * PAGE + 5..].iter().all(|byte| *byte == 0));
    assert!(twin[..20 * PAGE + 5].iter().all(|byte| *byte == 3));
    file.set_len(0).unwrap();
    run(&mut twin);
    assert!(twin.iter().all(|byte| *byte == 0));
    assert!(run(&mut twin).extents.is_empty());
}

#[test]
fn without_room_nothing_is_lost_and_open_updates_stay_whole() {
    for mode in [Mode::Async, Mode::Manual, Mode::Compare] {
        let size = 64 * PAGE_SIZE;
        let Some(mut bench) = Bench::new(size, mode) else {
            continue;
        };
        bench.pre = PreImages::new(size, 5 * PAGE_SIZE);
        let ones = vec![1u8; size as usize];
        bench.writer.write(0, &ones).unwrap();
        bench.run(Capture::full());
        let mut pinned = ExtentSet::new(size);
        pinned.insert(0..size);
        bench.pre.pin(1, &pinned).unwrap();
        bench.writer.write(0, &vec![2u8; size as usize]).unwrap();
        let marks = Range {
            start: 0,
            end: size,
        };
        let mut capture = Capture::dirty(&bench.tracker, vec![marks]);
        let mut put_off = 0;
        let captured = loop {
            let when_full = if put_off < 3 {
                WhenFull::PutOff
            } else {
                WhenFull::Abort
            };
            match bench.step(&mut capture, when_full) {
                Step::More => {}
                Step::NoRoom => {
                    put_off += 1;
                    let mut old = vec![0; size as usize];
                    assert!(bench.pre.read(1, 0, &mut old, &bench.twin));
                    assert!(old == ones, "the pinned epoch reads whole");
                    assert_eq!(bench.pre.used_bytes(), 5 * PAGE_SIZE);
                }
                Step::Done(captured) => break captured,
                Step::Lost(error) => panic!("{error}"),
            }
        };
        assert_eq!(put_off, 3, "{mode}");
        assert!(!bench.pre.is_alive(1));
        assert!(captured.extents.is_all(), "{mode}: {:?}", captured.extents);
        assert!(bench.twin.iter().all(|byte| *byte == 2));
    }
}

#[test]
fn a_capture_that_is_lost_loses_no_extent() {
    // More than one scan takes.
    let pages = 2 * capture::SCAN_PAGES;
    let Some(mut bench) = Bench::new(pages * PAGE_SIZE, Mode::Async) else {
        return;
    };
    bench
        .writer
        .write(0, &vec![9; bench.size as usize])
        .unwrap();
    let mut capture = Capture::dirty(&bench.tracker, Vec::new());
    assert!(matches!(
        bench.step(&mut capture, WhenFull::PutOff),
        Step::More
    ));
    let Some(attachment) = bench.tracker.attachment() else {
        panic!("async")
    };
    let uffd = attachment.uffd.as_ref().unwrap();
    uffd.unregister(bench.writer.mapping()).unwrap();
    let lost = loop {
        match bench.step(&mut capture, WhenFull::PutOff) {
            Step::More => {}
            Step::Lost(error) => break error,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(lost, TrackError::Scan { .. }), "{lost:?}");
    let refused = bench.step(&mut Capture::full(), WhenFull::PutOff);
    assert!(
        matches!(refused, Step::Lost(TrackError::Arm { .. })),
        "what cannot be armed says so: {refused:?}"
    );
    bench.tracker = Tracker::new(Mode::Compare, None).unwrap();
    let full = bench.run(Capture::full());
    assert!(full.extents.is_all(), "with what the lost one had taken");
    assert!(bench.twin.iter().all(|byte| *byte == 9));
}

const CHILD: &str = "UFFD_SYNC_TEST_TRACK_CHILD";

/// Not a test of its own: the writing process of the test below.
#[test]
fn child_writer() {
    let Some(path) = std::env::var_os(CHILD) else {
        return;
    };
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let fd = memfd::create("track-child", MIB).unwrap();
    let mapping = Mapping::shared(&fd, MIB, Access::ReadWrite).unwrap();
    let attachment = Attachment::for_region(&mapping, Mode::Async).unwrap();
    let writer = SharedMemory::new(mapping);
    writer.write(3 * MIB / 4, b"before").unwrap();
    let fds = [
        fd.as_fd(),
        attachment.uffd.as_ref().unwrap().as_fd(),
        attachment.pagemap.as_ref().unwrap().as_fd(),
        attachment.pidfd.as_fd(),
    ];
    net::send_with_fds(&stream, &attachment.base.to_le_bytes(), &fds).unwrap();
    let mut word = [0u8; 1];
    while stream.read_exact(&mut word).is_ok() {
        writer
            .write(u64::from(word[0]) * PAGE_SIZE + 1, &word)
            .unwrap();
        net::send_with_fds(&stream, &word, &[]).unwrap();
    }
}

struct Writer {
    process: Child,
    stream: UnixStream,
    fds: Vec<OwnedFd>,
    base: u64,
}

impl Writer {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "track::capture_tests::child_writer"])
            .env(CHILD, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut base = [0; 8];
        let received = net::recv_with_fds(&stream, &mut base, 8, net::Blocking::Yes).unwrap();
        assert_eq!((received.bytes, received.fds.len()), (8, 4));
        Self {
            process,
            stream,
            fds: received.fds,
            base: u64::from_le_bytes(base),
        }
    }

    fn store(&mut self, page: u8) {
        net::send_with_fds(&self.stream, &[page], &[]).unwrap();
        self.stream.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn another_process_is_tracked_and_its_last_stores_survive_it() {
    let probe = memfd::create("probe", PAGE_SIZE).unwrap();
    let probe = Mapping::shared(&probe, PAGE_SIZE, Access::ReadWrite).unwrap();
    if let Err(TrackError::Open { source }) = Attachment::for_region(&probe, Mode::Async) {
        or_skip::<()>("async tracking", Err(source));
        return;
    }
    let mut child = Writer::start();
    let mut fds = std::mem::take(&mut child.fds).into_iter();
    let fd = fds.next().unwrap();
    let attachment = Attachment::from_parts(
        Mode::Async,
        fds.next(),
        fds.next(),
        fds.next().unwrap(),
        child.base,
        MIB,
    )
    .unwrap();
    assert_eq!(attachment.pidfd.pid().unwrap(), child.process.id() as i32);
    let mapping = Mapping::shared(&fd, MIB, Access::ReadOnly).unwrap();
    let mut bench = Bench {
        writer: SharedMemory::new(Mapping::shared(&fd, MIB, Access::ReadOnly).unwrap()),
        source: Source::Mapped {
            memory: SharedMemory::new(mapping),
            fd,
        },
        tracker: Tracker::new(Mode::Async, Some(attachment)).unwrap(),
        twin: Twin::new(MIB).unwrap(),
        pre: PreImages::new(MIB, MIB),
        size: MIB,
    };
    bench.run(Capture::full());
    assert_eq!(&bench.twin[3 * MIB as usize / 4..][..6], b"before");
    child.store(5);
    let captured = bench.dirty(Vec::new());
    assert_eq!(
        captured.extents.ranges().next(),
        Some(5 * PAGE_SIZE + 1..5 * PAGE_SIZE + 2)
    );

    child.store(7);
    child.process.kill().unwrap();
    child.process.wait().unwrap();
    let mut capture = Capture::dirty(&bench.tracker, Vec::new());
    let lost = loop {
        match bench.step(&mut capture, WhenFull::PutOff) {
            Step::More => {}
            other => break other,
        }
    };
    assert!(
        matches!(lost, Step::Lost(TrackError::WriterExited)),
        "a dead writer scans as clean, and that is noticed: {lost:?}"
    );
    assert_eq!(bench.twin[7 * PAGE + 1], 0);
    bench.run(Capture::full());
    assert_eq!(bench.twin[7 * PAGE + 1], 7);
    let armed = bench.tracker.attachment().unwrap().arm();
    assert!(matches!(armed, Err(TrackError::WriterExited)), "{armed:?}");
}
