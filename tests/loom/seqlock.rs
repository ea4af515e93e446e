//! The sequence lock: a reader accepts whole epochs only.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::thread;
use uffd_sync::shm::seqlock;

/// Two words that the writer keeps equal to the epoch, under a seqlock.
struct Shared {
    version: AtomicU64,
    data: [AtomicU64; 2],
}

impl Shared {
    fn new() -> Arc<Shared> {
        Arc::new(Shared {
            version: AtomicU64::new(seqlock::version_of(0)),
            data: [AtomicU64::new(0), AtomicU64::new(0)],
        })
    }

    fn write(&self, epoch: u64) {
        for word in &self.data {
            word.store(epoch, Ordering::Relaxed);
        }
    }

    fn read(&self) -> [u64; 2] {
        [0, 1].map(|i| self.data[i].load(Ordering::Relaxed))
    }
}

type Begin = fn(&AtomicU64);
type End = fn(&AtomicU64, u64);
type Validate = fn(&AtomicU64, u64) -> bool;

/// A writer makes `epochs` epochs while a reader reads twice; what the reader
/// accepts has to be one whole epoch, the one that it was told.
fn check(epochs: u64, begin: Begin, end: End, validate: Validate) {
    loom::model(move || {
        let shared = Shared::new();
        let writer = {
            let shared = shared.clone();
            thread::spawn(move || {
                for epoch in 1..=epochs {
                    begin(&shared.version);
                    shared.write(epoch);
                    end(&shared.version, epoch);
                }
            })
        };
        let mut last = 0;
        for _ in 0..2 {
            let Some(begun) = seqlock::read_begin(&shared.version) else {
                continue;
            };
            let copy = shared.read();
            if validate(&shared.version, begun) {
                let epoch = seqlock::epoch_of(begun);
                assert_eq!(copy, [epoch; 2], "a torn or stale copy was accepted");
                assert!(epoch >= last, "epochs rise");
                last = epoch;
            }
        }
        writer.join().expect("the writer");
        assert_eq!(
            seqlock::read_begin(&shared.version),
            Some(seqlock::version_of(epochs))
        );
    });
}

#[test]
fn a_seqlock_reader_accepts_whole_epochs_only() {
    check(2, seqlock::begin, seqlock::end, seqlock::read_validate);
}

#[test]
#[should_panic(expected = "a torn or stale copy was accepted")]
fn control_without_the_writers_fence() {
    fn begin(version: &AtomicU64) {
        let now = version.load(Ordering::Relaxed);
        version.store(now | 1, Ordering::Relaxed);
    }
    check(2, begin, seqlock::end, seqlock::read_validate);
}

#[test]
#[should_panic(expected = "a torn or stale copy was accepted")]
fn control_without_publishing_by_release() {
    fn end(version: &AtomicU64, epoch: u64) {
        version.store(seqlock::version_of(epoch), Ordering::Relaxed);
    }
    check(1, seqlock::begin, end, seqlock::read_validate);
}

#[test]
#[should_panic(expected = "a torn or stale copy was accepted")]
fn control_without_the_readers_fence() {
    fn validate(version: &AtomicU64, begun: u64) -> bool {
        version.load(Ordering::Relaxed) == begun
    }
    check(2, seqlock::begin, seqlock::end, validate);
}

#[test]
#[should_panic(expected = "a torn or stale copy was accepted")]
fn control_without_a_busy_bit() {
    fn begin(_: &AtomicU64) {
        fence(Ordering::Release);
    }
    check(2, begin, seqlock::end, seqlock::read_validate);
}
