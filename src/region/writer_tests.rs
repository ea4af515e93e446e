//! Writers against an engine that is a thread of this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::*;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::sys::process::EventFd;
use crate::units::{GIB, MIB, PAGE_SIZE};
use crate::words::{EpochKind, Generation, Mode, Publish, RegionName, WriteKind};

const LONG: Duration = Duration::from_secs(30);

pub(super) fn name() -> RegionName {
    "region-test".parse().unwrap()
}

fn manual() -> RegionOptions {
    RegionOptions {
        mode: Mode::Manual,
        publish: Publish::Commit,
        ..RegionOptions::default()
    }
}

/// What the engine is to check of each epoch: its content and kind.
type Check = Box<dyn FnMut(&[u8], EpochKind) + Send>;

/// An engine that answers commits, with whole reads for captures.
struct Engine {
    stop: Arc<AtomicBool>,
    silent: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    fn start(region: &Region, mut check: Check) -> Self {
        let control = Control::open(region.control_fd(), Access::ReadWrite).unwrap();
        let data = region.data_fd().try_clone_to_owned().unwrap();
        let size = region.size() as usize;
        let doorbell = EventFd::new().unwrap();
        let ours = EventFd::from_fd(doorbell.try_clone_fd().unwrap()).unwrap();
        let (stop, silent) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (send, receive) = mpsc::channel();
        let (stopped, is_silent) = (Arc::clone(&stop), Arc::clone(&silent));
        let thread = std::thread::spawn(move || {
            let (_holder, fd) = Pulse::create().unwrap();
            control.set_generation(Generation(7));
            send.send(fd).unwrap();
            let mut epoch = 0;
            let mut content = vec![0; size];
            let mut rings = 0;
            while !stopped.load(Ordering::Acquire) {
                let pending = control.commit_pending();
                let (Some(request), false) = (pending, is_silent.load(Ordering::Acquire)) else {
                    std::thread::yield_now();
                    continue;
                };
                rings += ours.drain();
                let before = control.guard_state();
                memfd::read_at(&data, &mut content, 0).unwrap();
                let kind = if before.is_cut(&control.guard_state()) {
                    EpochKind::Cut
                } else {
                    EpochKind::Convergent
                };
                epoch += 1;
                check(&content, kind);
                control.publish_begin();
                control.publish_end(epoch, kind, 1);
                control.answer_commit(request, epoch, kind);
                control.set_acked(&[epoch]);
            }
            rings += ours.drain();
            assert!(rings > 0 || epoch == 0, "a commit rings");
        });
        let pulse = Pulse::open(receive.recv().unwrap()).unwrap();
        region.connect_engine(EngineLink { doorbell, pulse });
        Self {
            stop,
            silent,
            thread: Some(thread),
        }
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn a_commit_answers_with_the_epoch_that_holds_it() {
    let region = Region::create(&name(), MIB, &manual()).unwrap();
    assert!(matches!(region.commit(LONG), Err(RegionError::EngineGone)));
    let (send, receive) = mpsc::channel();
    let mut engine = Engine::start(
        &region,
        Box::new(move |content, _| send.send(content[70_000]).unwrap()),
    );
    for value in 1..50 {
        region.write(70_000, &[value]).unwrap();
        let epoch = region.commit(LONG).unwrap();
        assert_eq!(receive.recv().unwrap(), value);
        assert_eq!(
            (epoch.number, epoch.kind),
            (u64::from(value), EpochKind::Cut)
        );
        assert_eq!(epoch.generation, Generation(7));
        epoch.wait_acked(1, LONG).unwrap();
        epoch.wait_acked(0, Duration::ZERO).unwrap();
        assert!(matches!(
            epoch.wait_acked(2, Duration::from_millis(1)),
            Err(RegionError::TimedOut)
        ));
        assert!(matches!(
            epoch.wait_acked(17, LONG),
            Err(RegionError::Replicas { replicas: 17 })
        ));
    }
    assert_eq!(region.control().guard_owner(), 0);
    let last = region.commit(LONG).unwrap();
    engine.end();
    assert!(matches!(
        last.wait_acked(2, LONG),
        Err(RegionError::EngineGone)
    ));
    region.control().set_generation(Generation(8));
    assert!(matches!(
        last.wait_acked(1, LONG),
        Err(RegionError::GenerationChanged)
    ));
    assert!(matches!(region.commit(LONG), Err(RegionError::EngineGone)));
}

#[test]
fn an_engine_that_dies_or_is_silent_ends_the_commit() {
    let region = Region::create(&name(), MIB, &manual()).unwrap();
    let mut engine = Engine::start(&region, Box::new(|_, _| {}));
    engine.silent.store(true, Ordering::Release);
    assert!(matches!(
        region.commit(Duration::from_millis(20)),
        Err(RegionError::TimedOut)
    ));
    std::thread::scope(|scope| {
        let commit = scope.spawn(|| region.commit(LONG));
        while region.control().guard_state().committers == 0 {
            std::thread::yield_now();
        }
        engine.end();
        let begun = Instant::now();
        assert!(matches!(
            commit.join().unwrap(),
            Err(RegionError::EngineGone)
        ));
        assert!(begun.elapsed() < Duration::from_secs(5));
    });
    // The next engine answers what the last one did not.
    assert!(region.control().commit_pending().is_some());
    let _engine = Engine::start(&region, Box::new(|_, _| {}));
    region.commit(LONG).unwrap();
    assert_eq!(region.control().commit_pending(), None);
}

/// Threads store the same number in four far places under a guard. Every epoch
/// that says it is a cut shows four equal numbers, for each thread.
#[test]
fn guarded_stores_are_never_torn_in_a_cut() {
    const THREADS: u64 = 3;
    const SIZE: u64 = 512 * 1024;
    let place = |thread: u64, part: u64| part * (SIZE / 4) + thread * PAGE_SIZE;
    let region = Region::create(&name(), SIZE, &manual()).unwrap();
    let (cuts, torn) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (cut_count, torn_count) = (Arc::clone(&cuts), Arc::clone(&torn));
    let _engine = Engine::start(
        &region,
        Box::new(move |content, kind| {
            if kind != EpochKind::Cut {
                return;
            }
            cut_count.fetch_add(1, Ordering::Relaxed);
            for thread in 0..THREADS {
                let numbers = [0, 1, 2, 3].map(|part| {
                    let at = place(thread, part) as usize;
                    u64::read_from_bytes(&content[at..at + 8]).unwrap()
                });
                let whole = numbers.iter().all(|n| *n == numbers[0]);
                torn_count.fetch_add(u64::from(!whole), Ordering::Relaxed);
            }
        }),
    );
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let region = &region;
            scope.spawn(move || {
                for number in 1..400u64 {
                    let guard = region.write_guard().unwrap();
                    for part in 0..4 {
                        region
                            .write(place(thread, part), &number.to_le_bytes())
                            .unwrap();
                    }
                    if number % 2 == 0 {
                        guard.commit(LONG).unwrap();
                    } else {
                        drop(guard);
                        if number % 3 == 0 {
                            region.commit(LONG).unwrap();
                        }
                    }
                }
            });
        }
    });
    assert!(cuts.load(Ordering::Relaxed) > 100);
    assert_eq!(torn.load(Ordering::Relaxed), 0);
    let state = region.control().guard_state();
    assert_eq!((state.shared, state.committers), (0, 0));
    assert_eq!(state.entries, 399 * THREADS as u32);
}

#[test]
fn a_guard_that_stays_makes_the_epoch_convergent_and_the_own_one_is_an_error() {
    let region = Region::create(&name(), MIB, &manual()).unwrap();
    let _engine = Engine::start(&region, Box::new(|_, _| {}));
    let guard = region.write_guard().unwrap();
    let nested = region.write_guard().unwrap();
    assert!(matches!(region.commit(LONG), Err(RegionError::OwnGuard)));
    assert!(matches!(nested.commit(LONG), Err(RegionError::OwnGuard)));
    std::thread::scope(|scope| {
        let commit = scope.spawn(|| region.commit(Duration::from_millis(200)));
        // A thread that holds a guard may take another one while a commit waits.
        while region.control().guard_state().committers == 0 {
            std::thread::yield_now();
        }
        drop(region.write_guard().unwrap());
        let epoch = commit.join().unwrap().unwrap();
        assert_eq!(epoch.kind, EpochKind::Convergent);
    });
    let epoch = guard.commit(LONG).unwrap();
    assert_eq!(epoch.kind, EpochKind::Cut);
    drop(region.write_guard().unwrap());
    assert_eq!(region.control().guard_state().shared, 0);
}

/// Three threads commit without a pause, so that one of them always does.
#[test]
fn commits_without_end_keep_no_guard_waiting() {
    let region = Region::create(&name(), PAGE_SIZE, &manual()).unwrap();
    let mut engine = Engine::start(&region, Box::new(|_, _| {}));
    let (stop, commits) = (AtomicBool::new(false), AtomicU64::new(0));
    let longest = std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    region.commit(LONG).unwrap();
                    commits.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // However this thread fares, the others have to end.
        let guards = scope.spawn(|| {
            let mut longest = 0;
            for _ in 0..300 {
                let begun = commits.load(Ordering::Relaxed);
                drop(region.write_guard().unwrap());
                longest = longest.max(commits.load(Ordering::Relaxed) - begun);
            }
            longest
        });
        let end = Instant::now() + LONG;
        while !guards.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::Relaxed);
        guards.join().unwrap()
    });
    engine.end();
    // One turn's and what is counted before a thread that was woken runs.
    assert!(longest < 2_000, "a guard waited for {longest} commits");
    let state = region.control().guard_state();
    assert_eq!((state.shared, state.committers), (0, 0));
    assert_eq!(state.entries, 300);
}

#[test]
fn nobody_else_ever_writes_the_data() {
    let region = Region::create(&name(), 100_000, &manual()).unwrap();
    region.write(99_999, &[7]).unwrap();
    let fd = region.data_fd();
    assert!(memfd::write_at(fd, &[1], 0).is_err());
    assert!(Mapping::shared(fd, 100_000, Access::ReadWrite).is_err());
    assert!(memfd::add_seals(fd, Seals::WRITE).is_err());
    let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
    assert!(file.set_len(10).is_err() && file.set_len(GIB).is_err());
    assert!(region.write(99_999, &[1, 2]).is_err());
    assert!(region.write(u64::MAX, &[1]).is_err());
    assert!(region.read(100_000, &mut [0]).is_err());
    assert!(region.mark_region_changed(99_999, 2).is_err());
    assert!(region.mark_region_changed(u64::MAX, u64::MAX).is_err());
    let range = std::ops::Range { start: 9, end: 8 };
    assert!(region.view(range).unwrap().is_empty());
    assert!(region.view(0..100_001).is_err());
    for size in [0, u64::MAX, crate::limits::MAX_REGION_BYTES + 1] {
        assert!(matches!(
            Region::create(&name(), size, &manual()),
            Err(RegionError::Size { .. })
        ));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Order {
    id: u64,
    price: u32,
    inner: Inner,
}

#[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Inner {
    amount: u16,
    flags: u16,
}

#[test]
fn fields_are_stored_and_marked_to_the_byte() {
    let region = Region::create(&name(), MIB, &manual()).unwrap();
    let field = region.typed::<Order>(1001).unwrap();
    let order = Order {
        id: 1,
        price: 2,
        inner: Inner {
            amount: 3,
            flags: 4,
        },
    };
    field.set(&order);
    field.update(|it| it.price += 40);
    assert_eq!(field.get().price, 42);
    assert_eq!(region.load::<u64>(1001).unwrap(), 1);
    let view = region.view(1001..1017).unwrap();
    assert_eq!(view.load::<u32>(8).unwrap(), 42);
    assert_eq!(view.to_vec().len(), 16);
    assert!(view.load::<u64>(9).is_err());
    assert!(region.typed::<Order>(MIB - 15).is_err());
    let base = 1001;
    crate::mark_field_changed!(region, base, Order, price).unwrap();
    crate::mark_field_changed!(region, Order, inner.flags).unwrap();
    field.mark_changed().unwrap();
    assert!(crate::mark_field_changed!(region, u64::MAX, Order, price).is_err());
    let mut marks = Vec::new();
    region.control().drain_marks(&mut marks, MIB);
    assert_eq!(marks, [1009..1013, 14..16, 1001..1017]);
}

#[test]
fn a_new_life_has_the_old_content_and_the_old_holes() {
    let size = 256 * MIB + 5;
    let old = Region::create(&name(), size, &manual()).unwrap();
    old.write(3 * MIB + 7, b"content").unwrap();
    old.write(size - 1, b"!").unwrap();
    old.write(100 * MIB, &[0; 8192]).unwrap();
    let fd = memfd::reopen_read_only(old.data_fd()).unwrap();
    use std::os::fd::AsFd;
    let new = Region::create_from(&name(), fd.as_fd(), size, &manual()).unwrap();
    assert_ne!(new.control().identity().id, old.control().identity().id);
    let mut bytes = [0; 7];
    new.read(3 * MIB + 7, &mut bytes).unwrap();
    assert_eq!(&bytes, b"content");
    assert_eq!(new.load::<u8>(size - 1).unwrap(), b'!');
    new.view(0..64 * MIB).unwrap().to_vec();
    let resident = memfd::resident_bytes(new.data_fd()).unwrap();
    assert_eq!(resident, 2 * PAGE_SIZE, "zeros and holes take nothing");
    let less = Region::create_from(&name(), fd.as_fd(), 3 * MIB + 10, &manual()).unwrap();
    assert_eq!(less.load::<[u8; 3]>(3 * MIB + 7).unwrap(), *b"con");
}

#[test]
fn control_pages_are_checked_before_use() {
    use super::layout::*;
    let region = Region::create(&name(), MIB, &manual()).unwrap();
    let fd = region.control_fd();
    let opened = Control::open(fd, Access::ReadOnly).unwrap();
    assert_eq!(opened.identity(), region.control().identity());
    assert_eq!(opened.generation(), Generation::ZERO);
    region.control().set_generation(Generation(u128::MAX - 5));
    assert_eq!(opened.generation(), Generation(u128::MAX - 5));
    let stats = Stats {
        captures: 1,
        commits: 2,
        dirty_pages: 3,
        changed_bytes: 4,
        interval_us: 5,
        lost: 6,
    };
    region.control().set_stats(&stats);
    assert_eq!(opened.stats(), stats);

    let words: [(u64, u64); 8] = [
        (ID_MAGIC, 0),
        (ID_LAYOUT, 2 | 1 << 32),
        (ID_LAYOUT, 3 | 9 << 32),
        (ID_SIZE, 0),
        (ID_SIZE, u64::MAX),
        (ID_MAX_SIZE, 1),
        (ID_MAX_SIZE, u64::MAX),
        (ID_NAME_LEN, u64::from(u32::MAX)),
    ];
    for (offset, value) in words {
        let word = region.control().mem.atomic_u64(offset);
        let before = word.swap(value, Ordering::AcqRel);
        let refused = Control::open(fd, Access::ReadOnly);
        assert!(
            matches!(
                refused,
                Err(RegionError::Foreign { .. }
                    | RegionError::Size { .. }
                    | RegionError::MaxSize { .. })
            ),
            "{offset:#x} = {value:#x}: {refused:?}"
        );
        word.store(before, Ordering::Release);
    }
    region.control().mem.write(ID_NAME, &[0xFF; 8]).unwrap();
    assert!(Control::open(fd, Access::ReadOnly).is_err());
    assert_eq!(opened.identity().name, name(), "the copy stands");

    let unsealed = memfd::create("control-test", CONTROL_BYTES).unwrap();
    assert!(Control::open(&unsealed, Access::ReadOnly).is_err());
    memfd::add_seals(&unsealed, Seals::SHRINK | Seals::GROW).unwrap();
    assert!(Control::open(&unsealed, Access::ReadOnly).is_err());
    let short = memfd::create("control-test", PAGE_SIZE).unwrap();
    memfd::add_seals(&short, Seals::SHRINK | Seals::GROW).unwrap();
    assert!(Control::open(&short, Access::ReadOnly).is_err());
}

#[test]
fn a_region_grows_to_its_greatest_size_and_no_further() {
    let options = RegionOptions {
        max_size: Some(MIB),
        ..manual()
    };
    let small = Region::create(&name(), 2 * MIB, &options);
    assert!(matches!(small, Err(RegionError::MaxSize { .. })));
    let region = Region::create(&name(), 5000, &options).unwrap();
    let seals = || memfd::seals(region.data_fd()).unwrap();
    assert!(seals().contains(Seals::FUTURE_WRITE | Seals::SHRINK));
    assert!(!seals().intersects(Seals::GROW | Seals::SEAL));
    assert!(region.write(5000, &[1]).is_err());
    let too_much = region.grow(MIB + 1).unwrap_err();
    assert!(too_much.to_string().contains("1048577") && too_much.to_string().contains("1048576"));
    let too_little = region.grow(4999).unwrap_err();
    assert!(too_little.to_string().contains("4999") && too_little.to_string().contains("5000"));
    region.grow(5000).unwrap();
    region.grow(10_000).unwrap();
    region.write(9_999, &[7]).unwrap();
    assert!(region.write(10_000, &[1]).is_err());
    assert_eq!((region.size(), region.control().size()), (10_000, 10_000));
    let opened = Control::open(region.control_fd(), Access::ReadOnly).unwrap();
    assert_eq!((opened.size(), opened.identity().size), (10_000, 5000));
    region.grow(MIB).unwrap();
    assert!(seals().contains(Seals::GROW | Seals::SEAL));
    assert_eq!(region.load::<u8>(9_999).unwrap(), 7);
    assert_eq!(region.load::<u8>(MIB - 1).unwrap(), 0);
    let word = opened.mem.atomic_u64(super::layout::SIZE);
    assert_eq!(word.load(Ordering::Acquire), MIB);
    let ours = region.control().mem.atomic_u64(super::layout::SIZE);
    for (hostile, seen) in [(0, 5000), (u64::MAX, MIB)] {
        ours.store(hostile, Ordering::Release);
        assert_eq!(opened.size(), seen, "bounded by the identity");
    }
}

#[test]
fn what_a_cooperative_region_cannot_have_is_refused_by_name() {
    let cooperative = RegionOptions {
        kind: WriteKind::Cooperative,
        ..RegionOptions::default()
    };
    let growing = RegionOptions {
        max_size: Some(2 * PAGE_SIZE),
        ..cooperative
    };
    let huge = RegionOptions {
        huge_pages: true,
        ..cooperative
    };
    let name = "shared".parse().expect("a name");
    for (options, says) in [(growing, "max_size"), (huge, "huge_pages")] {
        let error = Region::create(&name, PAGE_SIZE, &options).expect_err(says);
        assert!(error.to_string().contains(says), "{error}");
    }
}
