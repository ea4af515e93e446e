//! The ring of marks and its bits: no mark is lost, and who finds a mark sees what was
//! stored before it.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use loom::thread;
use uffd_sync::shm::queue;

const SLOTS: u64 = 2;
const MARKS: u64 = 3;

struct Shared {
    head: AtomicU64,
    tail: AtomicU64,
    overflow: AtomicU32,
    bits: AtomicU64,
    slots: [AtomicU64; SLOTS as usize],
    data: [AtomicU64; MARKS as usize],
}

/// What a control does differently.
#[derive(Clone, Copy)]
struct Steps {
    publish: fn(&AtomicU64, u64),
    set: fn(&AtomicU64, u64),
    /// Whether the announcement is taken back before the bits are taken.
    announced_first: bool,
    /// Whether slots are read before they are released.
    read_first: bool,
}

const RIGHT: Steps = Steps {
    publish: queue::publish,
    set: queue::set,
    announced_first: true,
    read_first: true,
};

impl Shared {
    fn new() -> Arc<Shared> {
        Arc::new(Shared {
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            overflow: AtomicU32::new(0),
            bits: AtomicU64::new(0),
            slots: std::array::from_fn(|_| AtomicU64::new(u64::MAX)),
            data: std::array::from_fn(|_| AtomicU64::new(0)),
        })
    }

    /// Stores what mark `mark` stands for, then marks it.
    fn push(&self, mark: u64, steps: Steps) {
        self.data[mark as usize].store(1, Ordering::Relaxed);
        match queue::place(&self.head, &self.tail, SLOTS) {
            Some(count) => {
                self.slots[(count % SLOTS) as usize].store(mark, Ordering::Relaxed);
                (steps.publish)(&self.head, count);
            }
            None => {
                (steps.set)(&self.bits, 1 << mark);
                queue::announce(&self.overflow);
            }
        }
    }

    /// Bits of the marks found; what each stands for has to be seen.
    fn drain(&self, steps: Steps) -> u64 {
        let (first, count) = queue::filled(&self.head, &self.tail);
        assert!(count <= SLOTS, "a distance that no ring has");
        if !steps.read_first {
            queue::release(&self.tail, first + count);
            thread::yield_now();
        }
        let mut found = 0;
        for index in first..first + count {
            let mark = self.slots[(index % SLOTS) as usize].load(Ordering::Relaxed);
            assert!(mark < MARKS, "a slot was read that is not filled");
            assert_eq!(found & 1 << mark, 0, "a mark was found twice");
            found |= 1 << mark;
        }
        if steps.read_first && count > 0 {
            queue::release(&self.tail, first + count);
        }
        if steps.announced_first {
            if queue::announced(&self.overflow) {
                found |= queue::take(&self.bits);
            }
        } else if self.overflow.load(Ordering::Acquire) != 0 {
            found |= queue::take(&self.bits);
            queue::announced(&self.overflow);
        }
        for mark in (0..MARKS).filter(|mark| found & 1 << mark != 0) {
            let stored = self.data[mark as usize].load(Ordering::Relaxed);
            assert_eq!(stored, 1, "a mark came before what it stands for");
        }
        found
    }
}

/// A writer marks more than the ring holds while the engine drains twice.
fn check(steps: Steps) {
    loom::model(move || {
        let shared = Shared::new();
        let writer = {
            let shared = shared.clone();
            thread::spawn(move || (0..MARKS).for_each(|mark| shared.push(mark, steps)))
        };
        let mut found = shared.drain(steps);
        found |= shared.drain(steps);
        writer.join().expect("the writer");
        found |= shared.drain(steps);
        assert_eq!(found, (1 << MARKS) - 1, "a mark was lost");
    });
}

#[test]
fn no_mark_is_lost_or_comes_too_early() {
    check(RIGHT);
}

#[test]
#[should_panic(expected = "a slot was read that is not filled")]
fn control_without_publishing_a_slot() {
    fn publish(head: &AtomicU64, count: u64) {
        head.store(count + 1, Ordering::Relaxed);
    }
    check(Steps { publish, ..RIGHT });
}

/// Two marks by bits alone; the second may be taken with the first's announcement.
fn check_bits(steps: Steps) {
    loom::model(move || {
        let shared = Shared::new();
        let writer = {
            let shared = shared.clone();
            thread::spawn(move || {
                for mark in 0..2 {
                    shared.data[mark as usize].store(1, Ordering::Relaxed);
                    (steps.set)(&shared.bits, 1 << mark);
                    queue::announce(&shared.overflow);
                }
            })
        };
        let found = shared.drain(steps);
        writer.join().expect("the writer");
        assert_eq!(found | shared.drain(steps), 0b11, "a mark was lost");
    });
}

#[test]
fn no_bit_is_lost_or_comes_too_early() {
    check_bits(RIGHT);
}

#[test]
#[should_panic(expected = "a mark came before what it stands for")]
fn control_without_publishing_by_bits() {
    fn set(word: &AtomicU64, bits: u64) {
        word.fetch_or(bits, Ordering::Relaxed);
    }
    check_bits(Steps { set, ..RIGHT });
}

#[test]
#[should_panic(expected = "a mark was lost")]
fn control_of_an_announcement_taken_back_after_the_bits() {
    check_bits(Steps {
        announced_first: false,
        ..RIGHT
    });
}

#[test]
#[should_panic(expected = "a mark was")]
fn control_of_slots_released_before_they_are_read() {
    check(Steps {
        read_first: false,
        ..RIGHT
    });
}
