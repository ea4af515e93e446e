//! The thread that lets the others of its side sleep without a time-out: see
//! [`Watch`]. It is made when a side has slept often enough to be worth it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::duplex::watch::{NEVER, Watch};
use crate::duplex::{Presence, Segment, Semaphore, Side, event};
use crate::limits::CHANNEL_PROBE_MS;
use crate::shm::high_half;
use crate::sys::futex;
use crate::sys::process::monotonic_ns;

/// Sleeps of a side before it gets a sentry.
const SLEEPS: u32 = 16;

/// One side's: a client's for its one thread, a server's for all workers of a channel, who
/// have no deadlines.
#[derive(Debug)]
pub(super) struct Sentry {
    post: Arc<Post>,
    sleeps: AtomicU32,
    /// None if no thread could be had: all sleep with a time-out then.
    thread: OnceLock<Option<JoinHandle<()>>>,
}

/// A sleep that the sentry looks after.
#[derive(Debug)]
pub(super) struct Kept<'a>(&'a Watch);

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[derive(Debug)]
struct Post {
    watch: Watch,
    segment: Segment,
    own: Side,
    ending: AtomicBool,
}

impl Sentry {
    pub(super) fn new(segment: &Segment, own: Side) -> Arc<Sentry> {
        Arc::new(Sentry {
            post: Arc::new(Post {
                watch: Watch::default(),
                segment: segment.clone(),
                own,
                ending: AtomicBool::new(false),
            }),
            sleeps: AtomicU32::new(0),
            thread: OnceLock::new(),
        })
    }

    /// For a thread between reading its semaphore's sequence and sleeping on it: it may
    /// sleep without a time-out while it holds what this answers. It is woken when the
    /// other side's liveness word is not `word` any more, when [`Segment::signs`] change,
    /// and at `until` on [`monotonic_ns`]'s clock.
    pub(super) fn keep(&self, word: u32, until: u64) -> Option<Kept<'_>> {
        if self.thread.get().is_none() {
            self.call_up();
            return None;
        }
        if !futex::is_held(word) {
            return None;
        }
        self.post.watch.enter();
        let kept = Kept(&self.post.watch);
        let asked = self.post.watch.ask(word, until);
        if asked.ring {
            self.ring();
        }
        asked.watched.then_some(kept)
    }

    /// Counts a sleep without it; makes its thread after some.
    fn call_up(&self) {
        if self.sleeps.fetch_add(1, Ordering::Relaxed) < SLEEPS {
            return;
        }
        self.thread.get_or_init(|| {
            let post = self.post.clone();
            let thread = std::thread::Builder::new()
                .name("uffd-sync-watch".to_owned())
                .stack_size(64 << 10);
            thread.spawn(move || post.stand()).ok()
        });
    }

    fn ring(&self) {
        self.post.watch.call();
        // Without the kernel's help it would not have been asleep.
        let _ = futex::wake(self.post.watch.bell(), 1);
    }
}

impl Drop for Sentry {
    fn drop(&mut self) {
        self.post.ending.store(true, Ordering::Release);
        if let Some(Some(thread)) = self.thread.take() {
            self.ring();
            // Its panics concern nobody's request.
            let _ = thread.join();
        }
    }
}

impl Post {
    fn stand(&self) {
        let alive = self.segment.lifeline_word(self.peer());
        let mut before = None;
        loop {
            // SYNC(watch_bell): pairs with who calls.
            let bell = self.watch.bell().load(Ordering::Acquire);
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            // SYNC(lifeline): what the peer did before it left is seen by who is woken.
            let word = alive.load(Ordering::Acquire);
            let (signs, own) = self.segment.signs();
            let is_there = futex::is_held(word);
            let until = self.watch.begin(if is_there { word } else { 0 });
            if before.is_some_and(|before| before != (word, signs)) {
                // The kernel woke one sleeper of it; each wakes the next.
                let _ = futex::wake(alive, u32::MAX);
                self.rouse();
            }
            before = Some((word, signs));
            let words = [(self.watch.bell(), bell), (own, signs), (alive, word)];
            let words = if is_there { &words[..] } else { &words[..2] };
            match futex::wait_any(words, instant(until)) {
                Ok(futex::Wake::TimedOut) => {
                    self.watch.expire();
                    self.rouse();
                }
                Ok(_) => {}
                Err(_) => {
                    // Nobody is kept any more: all sleep with a time-out.
                    let _ = self.watch.begin(0);
                    self.rouse();
                    return;
                }
            }
        }
    }

    fn peer(&self) -> Side {
        match self.own {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }

    /// Wakes all that sleep, whatever the semaphores say, until one has woken; until all
    /// have where there is nothing left to wait for.
    fn rouse(&self) {
        let before = self.watch.sleepers();
        loop {
            self.wake_all();
            let now = self.watch.sleepers();
            let is_over = self.segment.presence(self.peer()) != Presence::Alive
                || self.segment.has_stopped_here();
            if now.asleep == 0 || (now.left != before.left && !is_over) {
                return;
            }
            let bell = self.watch.bell().load(Ordering::Acquire);
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            let soon = monotonic_ns() + 1_000_000 * CHANNEL_PROBE_MS;
            let _ = futex::wait_masked(self.watch.bell(), bell, u32::MAX, soon);
        }
    }

    fn wake_all(&self) {
        let semaphores = match self.own {
            Side::Client => [Semaphore::ResponseReady, Semaphore::SpaceAvailable],
            Side::Server => [Semaphore::RequestReady, Semaphore::ResponseConsumed],
        };
        for semaphore in semaphores {
            let word = self.segment.semaphore(semaphore);
            // Who counts the waiters is the other side too.
            let _ = event::post(word);
            let _ = futex::wake(high_half(word), u32::MAX);
        }
    }
}

/// None for never.
fn instant(until: u64) -> Option<Instant> {
    if until == NEVER {
        return None;
    }
    let left = until.saturating_sub(monotonic_ns());
    Instant::now().checked_add(Duration::from_nanos(left))
}
