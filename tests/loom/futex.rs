//! The kernel's part of a futex: compare and sleep are one step, and so is waking.

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Condvar, Mutex};
use uffd_sync::duplex::event;

/// The sleepers of one word.
pub(crate) struct Futex {
    bucket: Mutex<()>,
    sleepers: Condvar,
}

impl Futex {
    pub(crate) fn new() -> Futex {
        Futex {
            bucket: Mutex::new(()),
            sleepers: Condvar::new(),
        }
    }

    /// Sleeps if the word's sequence is still `expected`.
    pub(crate) fn sleep(&self, word: &AtomicU64, expected: u32) {
        self.sleep_while(|| event::sequence_of(word.load(Ordering::Relaxed)) == expected);
    }

    /// Sleeps if the word is as it was.
    pub(crate) fn sleep_while(&self, is_same: impl Fn() -> bool) {
        let bucket = self.bucket.lock().expect("bucket");
        if is_same() {
            let _awake = self.sleepers.wait(bucket).expect("bucket");
        }
    }

    pub(crate) fn wake_all(&self) {
        let _bucket = self.bucket.lock().expect("bucket");
        self.sleepers.notify_all();
    }
}
