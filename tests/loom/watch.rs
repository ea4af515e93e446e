//! The sentry of sleepers without time-outs: no order of asking and of its rounds leaves
//! a sleeper asleep beyond its deadline, or beyond the other side's death.
//!
//! Time is what the sentry sleeps for: where it sleeps until a deadline, that passes at
//! once. A sleeper left asleep is a deadlock.

use std::ops::ControlFlow;

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;
use uffd_sync::duplex::event;
use uffd_sync::duplex::watch::{Asked, NEVER, Watch};
use uffd_sync::shm::sync::AtomicU64;

use crate::futex::Futex;

const ALIVE: u32 = 7;

type Ask = fn(&Watch, u32, u64) -> Asked;
/// How the sentry tells sleepers that something has happened.
type Tell = fn(&Shared);

struct Shared {
    watch: Watch,
    /// Of the sentry: its bell and the other side's word, as the kernel waits for both.
    post: Futex,
    word: AtomicU32,
    semaphore: AtomicU64,
    sleepers: Futex,
    /// Deadlines that have passed: those up to this one.
    now: AtomicU64,
}

impl Shared {
    fn wake(&self) {
        if event::post(&self.semaphore) {
            self.sleepers.wake_all();
        }
    }

    fn ring(&self) {
        self.watch.call();
        self.post.wake_all();
    }
}

/// Sleeps until its deadline has passed or the other side is gone.
fn sleep(shared: &Shared, ask: Ask, until: u64) {
    let ended = || {
        let late = shared.now.load(Ordering::Relaxed) >= until;
        let gone = shared.word.load(Ordering::Acquire) != ALIVE;
        (late || gone).then_some(())
    };
    let ended = event::wait(&shared.semaphore, ended, |sequence| {
        let asked = ask(&shared.watch, shared.word.load(Ordering::Acquire), until);
        if asked.ring {
            shared.ring();
        }
        match asked.watched {
            true => shared.sleepers.sleep(&shared.semaphore, sequence),
            // It would sleep with a time-out.
            false => thread::yield_now(),
        }
        ControlFlow::Continue(())
    });
    ended.expect("never gives up");
}

/// `rounds` wake-ups for a reason.
fn stand(shared: &Shared, tell: Tell, rounds: usize) {
    let mut before = ALIVE;
    let mut done = 0;
    while done < rounds {
        let bell = shared.watch.bell().load(Ordering::Acquire);
        let word = shared.word.load(Ordering::Acquire);
        let until = shared.watch.begin(word);
        if word != before {
            before = word;
            done += 1;
            tell(shared);
            continue;
        }
        if until != NEVER {
            shared.now.fetch_max(until, Ordering::Relaxed);
            shared.watch.expire();
            tell(shared);
            done += 1;
            continue;
        }
        shared.post.sleep_while(|| {
            shared.watch.bell().load(Ordering::Relaxed) == bell
                && shared.word.load(Ordering::Relaxed) == word
        });
    }
}

fn check(deadlines: &'static [u64], dies: bool, ask: Ask, tell: Tell) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            watch: Watch::default(),
            post: Futex::new(),
            word: AtomicU32::new(ALIVE),
            semaphore: AtomicU64::new(0),
            sleepers: Futex::new(),
            now: AtomicU64::new(0),
        }));
        // It has stood there before.
        let _ = shared.watch.begin(ALIVE);
        let sleepers: Vec<_> = deadlines
            .iter()
            .map(|until| thread::spawn(move || sleep(shared, ask, *until)))
            .collect();
        let sentry = thread::spawn(move || stand(shared, tell, 1));
        if dies {
            shared.word.store(0, Ordering::Release);
            shared.post.wake_all();
        }
        for sleeper in sleepers {
            sleeper.join().expect("thread");
        }
        sentry.join().expect("thread");
    });
}

#[test]
fn a_deadline_is_kept() {
    check(&[5], false, Watch::ask, Shared::wake);
}

#[test]
fn a_death_is_told() {
    check(&[NEVER], true, Watch::ask, Shared::wake);
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_a_sleeper_that_does_not_call() {
    fn ask(watch: &Watch, word: u32, until: u64) -> Asked {
        Asked {
            ring: false,
            ..watch.ask(word, until)
        }
    }
    check(&[5], false, ask, Shared::wake);
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_a_death_that_is_not_posted() {
    check(&[NEVER], true, Watch::ask, |_| {});
}

#[test]
#[should_panic(expected = "deadlock")]
fn control_a_sleeper_that_takes_any_word_for_watched() {
    fn ask(_: &Watch, _: u32, _: u64) -> Asked {
        Asked {
            watched: true,
            ring: false,
        }
    }
    check(&[5], false, ask, Shared::wake);
}
