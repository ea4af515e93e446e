//! The counting semaphore: no post is missed, and what was done before it is seen.

use std::convert::Infallible;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use uffd_sync::shm::count;

/// The word, what the posts publish, and a futex: as in the kernel, a lock makes
/// looking at the word and going to sleep one step.
struct Model {
    word: AtomicU64,
    data: AtomicU64,
    lock: Mutex<()>,
    sleepers: Condvar,
}

impl Model {
    fn new() -> Arc<Model> {
        Arc::new(Model {
            word: AtomicU64::new(0),
            data: AtomicU64::new(0),
            lock: Mutex::new(()),
            sleepers: Condvar::new(),
        })
    }

    fn wake(&self) {
        let _lock = self.lock.lock().expect("the lock");
        self.sleepers.notify_one();
    }

    fn sleep(&self) {
        let lock = self.lock.lock().expect("the lock");
        if count::value(&self.word) == 0 {
            drop(self.sleepers.wait(lock).expect("the lock"));
        }
    }

    fn wait(&self) {
        let lowered = count::wait(&self.word, || {
            self.sleep();
            Ok::<_, Infallible>(true)
        });
        assert_eq!(lowered, Ok(true));
        assert_ne!(self.data.load(Ordering::Relaxed), 0, "posted but not seen");
    }
}

type Post = fn(&AtomicU64) -> bool;

/// `posters` post once each, `waiters` wait once each; a lost wake-up is a deadlock.
/// Every order of events with at most that many preemptions.
fn check(posters: usize, waiters: usize, preemptions: usize, post: Post) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        let model = Model::new();
        let posting: Vec<_> = (0..posters)
            .map(|_| {
                let model = Arc::clone(&model);
                thread::spawn(move || {
                    model.data.fetch_add(1, Ordering::Relaxed);
                    if post(&model.word) {
                        model.wake();
                    }
                })
            })
            .collect();
        let waiting: Vec<_> = (1..waiters)
            .map(|_| {
                let model = Arc::clone(&model);
                thread::spawn(move || model.wait())
            })
            .collect();
        model.wait();
        for thread in posting.into_iter().chain(waiting) {
            thread.join().expect("no deadlock");
        }
        assert_eq!(count::take_all(&model.word), (posters - waiters) as u64);
        assert_eq!(
            model.word.load(Ordering::Relaxed),
            0,
            "nobody is left counted"
        );
    });
}

fn post(word: &AtomicU64) -> bool {
    count::post(word, 1)
}

#[test]
fn one_poster_and_one_waiter() {
    check(1, 1, 3, post);
}

#[test]
fn two_posters_and_one_waiter() {
    check(2, 1, 3, post);
}

#[test]
fn two_posters_and_two_waiters() {
    check(2, 2, 2, post);
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_that_looks_for_sleepers_before_it_raises_the_value() {
    fn early(word: &AtomicU64) -> bool {
        let sleeps = word.load(Ordering::Relaxed) >= 1 << 32;
        count::post(word, 1);
        sleeps
    }
    check(1, 1, 3, early);
}

#[test]
#[should_panic(expected = "posted but not seen")]
fn control_without_release() {
    fn relaxed(word: &AtomicU64) -> bool {
        word.fetch_add(1, Ordering::Relaxed) >= 1 << 32
    }
    check(1, 1, 3, relaxed);
}
