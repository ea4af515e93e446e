//! The event count of channels: no order of posts and waits leaves a waiter asleep.
//!
//! A waiter left asleep is a deadlock, which loom reports by a panic in whatever runs
//! last; so what the threads share is leaked, for a drop there would panic once more.

use std::ops::ControlFlow;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use uffd_sync::duplex::event;

use crate::futex::Futex;

struct Shared {
    word: AtomicU64,
    futex: Futex,
    /// What is waited for, one per poster.
    done: Vec<AtomicU64>,
}

impl Shared {
    fn all_done(&self) -> Option<()> {
        let done = self
            .done
            .iter()
            .all(|done| done.load(Ordering::Relaxed) == 1);
        done.then_some(())
    }

    fn sleep(&self, sequence: u32) -> ControlFlow<()> {
        self.futex.sleep(&self.word, sequence);
        ControlFlow::Continue(())
    }
}

type Post = fn(&AtomicU64) -> bool;
type Wait = fn(&Shared);

fn wait(shared: &Shared) {
    event::wait(&shared.word, || shared.all_done(), |at| shared.sleep(at)).expect("never gives up");
}

/// Every poster posts once; every waiter waits for all of them.
fn check(posters: usize, waiters: usize, post: Post, wait: Wait) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(match posters + waiters {
        ..=3 => 3,
        4 => 2,
        _ => 1,
    });
    builder.check(move || {
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            word: AtomicU64::new(0),
            futex: Futex::new(),
            done: (0..posters).map(|_| AtomicU64::new(0)).collect(),
        }));
        let run_poster = move |shared: &Shared, index: usize| {
            shared.done[index].store(1, Ordering::Relaxed);
            if post(&shared.word) {
                shared.futex.wake_all();
            }
        };
        let mut threads = Vec::new();
        for index in 1..posters {
            threads.push(thread::spawn(move || run_poster(shared, index)));
        }
        for _ in 0..waiters {
            threads.push(thread::spawn(move || wait(shared)));
        }
        run_poster(shared, 0);
        for thread in threads {
            thread.join().expect("thread");
        }
        assert!(!event::has_waiters(&shared.word), "all have left");
    });
}

#[test]
fn one_poster_and_two_waiters() {
    check(1, 2, event::post, wait);
}

#[test]
fn one_poster_and_three_waiters() {
    check(1, 3, event::post, wait);
}

#[test]
fn two_posters_and_one_waiter() {
    check(2, 1, event::post, wait);
}

#[test]
fn two_posters_and_two_waiters() {
    check(2, 2, event::post, wait);
}

// With the thread that looks on that is as many as loom takes.
#[test]
fn two_posters_and_three_waiters() {
    check(2, 3, event::post, wait);
}

#[test]
fn three_posters_and_two_waiters() {
    check(3, 2, event::post, wait);
}

#[test]
fn three_posters_and_one_waiter() {
    check(3, 1, event::post, wait);
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_a_post_that_only_looks_for_waiters() {
    fn post(word: &AtomicU64) -> bool {
        if !event::has_waiters(word) {
            return false;
        }
        event::post(word)
    }
    check(1, 1, post, wait);
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_a_post_that_leaves_the_sequence() {
    fn post(word: &AtomicU64) -> bool {
        event::waiters_of(word.fetch_add(0, Ordering::AcqRel)) != 0
    }
    check(1, 1, post, wait);
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_a_post_without_release() {
    fn post(word: &AtomicU64) -> bool {
        event::waiters_of(word.fetch_add(1 << 32, Ordering::Relaxed)) != 0
    }
    check(1, 1, post, wait);
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_a_waiter_that_is_not_announced() {
    fn wait(shared: &Shared) {
        loop {
            let sequence = event::sequence_of(shared.word.load(Ordering::Acquire));
            if shared.all_done().is_some() {
                return;
            }
            let _ = shared.sleep(sequence);
        }
    }
    check(1, 1, event::post, wait);
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_a_waiter_that_looks_before_the_sequence() {
    fn wait(shared: &Shared) {
        shared.word.fetch_add(1, Ordering::AcqRel);
        while shared.all_done().is_none() {
            let sequence = event::sequence_of(shared.word.load(Ordering::Acquire));
            let _ = shared.sleep(sequence);
        }
        shared.word.fetch_sub(1, Ordering::Release);
    }
    check(1, 1, event::post, wait);
}

/// A swap of `sequence << 1 | waiter` in the high half, as it is often written: right
/// for one poster and one waiter only.
mod swapped {
    use super::*;

    fn post(word: &AtomicU64) -> bool {
        let now = word.load(Ordering::Relaxed) >> 32;
        let old = word.swap(((now >> 1) + 1) << 33, Ordering::AcqRel);
        (old >> 32) & 1 == 1
    }

    fn wait(shared: &Shared) {
        loop {
            let now = shared.word.load(Ordering::Acquire);
            if shared.all_done().is_some() {
                return;
            }
            let announced = now | 1 << 32;
            let order = Ordering::AcqRel;
            let set = shared
                .word
                .compare_exchange(now, announced, order, Ordering::Relaxed);
            if set.is_ok() {
                let _ = shared.sleep((announced >> 32) as u32);
            }
        }
    }

    #[test]
    fn one_of_each() {
        check(1, 1, post, wait);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn control_two_posters() {
        check(2, 1, post, wait);
    }
}

/// A waiter for room, and a server that answers a request which was cancelled late:
/// it rings the responses' word and only looks at the room's.
mod room {
    use super::*;

    struct Room {
        response: AtomicU64,
        room: Shared,
    }

    fn check(settle: fn(&AtomicU64)) {
        loom::model(move || {
            let shared: &'static Room = Box::leak(Box::new(Room {
                response: AtomicU64::new(0),
                room: Shared {
                    word: AtomicU64::new(0),
                    futex: Futex::new(),
                    done: vec![AtomicU64::new(0)],
                },
            }));
            let server = thread::spawn(|| {
                shared.room.done[0].store(1, Ordering::Release);
                let _ = event::post(&shared.response);
                if event::has_waiters(&shared.room.word) && event::post(&shared.room.word) {
                    shared.room.futex.wake_all();
                }
            });
            let found = event::wait(
                &shared.room.word,
                || {
                    settle(&shared.response);
                    shared.room.all_done()
                },
                |at| shared.room.sleep(at),
            );
            found.expect("never gives up");
            server.join().expect("server");
        });
    }

    #[test]
    fn late_room_is_not_missed() {
        check(|response| {
            response.fetch_add(0, Ordering::AcqRel);
        });
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn control_without_touching_the_word_that_is_rung() {
        check(|_| ());
    }
}
