//! Changes made safe by a replica, many at once.
//!
//! ```text
//! loop: change 7, 8, 9 --wanted = 9--> thread: commit, wait for an acknowledgement
//! loop: change 10, 11                          |
//!       replies up to 9 go  <--- Safe(9) ------'   then wanted = 11, and so on
//! ```
//! I1: a change is said to be safe only after a commit that began behind it was
//!     acknowledged.
//! I2: one commit is under way at most; what comes meanwhile shares the next one.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::commands::{Command, Commands};
use crate::region::RegionError;

/// Brings all that was changed before the call to a replica, within the time given.
pub type MakeSafe = Box<dyn FnMut(Duration) -> Result<(), RegionError> + Send>;

/// How changes become safe.
pub struct Replica {
    /// What does it.
    pub make_safe: MakeSafe,
    /// How long it may take, before clients are told that no replica has acknowledged.
    pub deadline: Duration,
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Wanted {
    change: u64,
    stopping: bool,
}

#[derive(Debug, Default)]
struct Shared {
    wanted: Mutex<Wanted>,
    grown: Condvar,
}

/// The loop's end. Dropping it ends the thread once its commit has ended.
#[derive(Debug)]
pub(super) struct Safety {
    shared: Arc<Shared>,
    asked: u64,
    thread: Option<JoinHandle<()>>,
}

impl Safety {
    pub(super) fn start(replica: Replica, commands: Commands) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("space-commit".into())
            .spawn(move || commit(&theirs, replica, &commands))?;
        Ok(Self {
            shared,
            asked: 0,
            thread: Some(thread),
        })
    }

    /// Asks for all changes up to this one.
    pub(super) fn want(&mut self, change: u64) {
        if change > self.asked {
            self.asked = change;
            let mut wanted = self.shared.lock();
            wanted.change = change;
            self.shared.grown.notify_one();
        }
    }
}

impl Drop for Safety {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.grown.notify_one();
        if let Some(thread) = self.thread.take() {
            // It has ended, by a panic or not.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next change to be made safe; none at the end.
    fn next(&self, done: u64) -> Option<u64> {
        let wanted = self.lock();
        let waits = |wanted: &mut Wanted| wanted.change <= done && !wanted.stopping;
        let wanted = self.grown.wait_while(wanted, waits);
        let wanted = wanted.unwrap_or_else(PoisonError::into_inner);
        (!wanted.stopping).then_some(wanted.change)
    }
}

fn commit(shared: &Shared, mut replica: Replica, commands: &Commands) {
    let mut done = 0;
    let mut failing = false;
    while let Some(change) = shared.next(done) {
        let outcome = (replica.make_safe)(replica.deadline);
        let is_safe = outcome.is_ok();
        match outcome {
            Err(error) if !failing => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "no replica acknowledges; clients are told so"
                );
            }
            Ok(()) if failing => tracing::info!("a replica acknowledges again"),
            _ => {}
        }
        failing = !is_safe;
        done = change;
        while !commands.send(Command::Settled { change, is_safe }) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_meanwhile_shares_the_next_commit() {
        let commands = Commands::new().expect("a bell");
        let (begun, has_begun) = std::sync::mpsc::channel();
        let (go_on, may_go_on) = std::sync::mpsc::channel();
        let make_safe = Box::new(move |_| {
            begun.send(()).expect("heard");
            match may_go_on.recv() {
                Ok(true) => Ok(()),
                _ => Err(RegionError::TimedOut),
            }
        });
        let replica = Replica {
            make_safe,
            deadline: Duration::from_secs(1),
        };
        let mut safety = Safety::start(replica, commands.clone()).expect("started");
        let settled = || loop {
            if let Some(Command::Settled { change, is_safe }) = commands.take() {
                return (change, is_safe);
            }
            std::thread::yield_now();
        };
        safety.want(1);
        has_begun.recv().expect("a first commit");
        for change in [1, 2, 5, 4, 7] {
            safety.want(change);
        }
        go_on.send(true).expect("waits");
        assert_eq!(settled(), (1, true));
        has_begun.recv().expect("a second commit");
        go_on.send(false).expect("waits");
        assert_eq!(settled(), (7, false));
        drop(safety);
        assert!(has_begun.try_recv().is_err(), "nothing was left");
    }
}
