//! A process that takes part, told what to do line by line; what it said is kept.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use uffd_sync::ordered::oracle::{self, Acknowledged, Log};
use uffd_sync::ordered::{
    Delivery, Operation, OrderKey, ProcessId, Start, Subscriptions, Value, VariableId,
};

use crate::nodes::BINARY;

/// A callback, as a party says it.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Changed {
    pub(crate) key: OrderKey,
    pub(crate) variable: u32,
    pub(crate) old: i64,
    pub(crate) new: i64,
    pub(crate) swap: bool,
}

/// An own operation that completed.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Own {
    pub(crate) key: OrderKey,
    pub(crate) variable: u32,
    pub(crate) applied: bool,
    pub(crate) old: i64,
    pub(crate) expected: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Ready,
    Change(Changed),
    Done(Own),
    Idle,
    Failed,
}

#[derive(Default)]
pub(crate) struct Said {
    pub(crate) heard: Vec<Changed>,
    pub(crate) own: Vec<Own>,
    idle: u64,
    failed: bool,
    ended: bool,
}

/// A running party; killed and reaped when dropped.
pub(crate) struct Party {
    child: Child,
    stdin: Option<ChildStdin>,
    said: Arc<(Mutex<Said>, Condvar)>,
    reading: Option<JoinHandle<()>>,
    asked: u64,
}

impl Party {
    /// Starts the party of that number by a file with a table `[variables]`.
    pub(crate) fn start(config: &Path, process: u32) -> Self {
        let mut child = Command::new(BINARY)
            .args(["var-demo-process", "--process", &process.to_string()])
            .arg("--config")
            .arg(config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("a pipe");
        let said: Arc<(Mutex<Said>, Condvar)> = Arc::default();
        let there = Arc::clone(&said);
        let reading = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { break };
                let line = serde_json::from_str(&line).expect("a line of a party");
                let mut said = there.0.lock().expect("no panic");
                match line {
                    Line::Ready | Line::Idle => said.idle += 1,
                    Line::Change(change) => said.heard.push(change),
                    Line::Done(own) => said.own.push(own),
                    Line::Failed => said.failed = true,
                }
                drop(said);
                there.1.notify_all();
            }
            there.0.lock().expect("no panic").ended = true;
            there.1.notify_all();
        });
        Self {
            child,
            stdin,
            said,
            reading: Some(reading),
            asked: 1,
        }
    }

    pub(crate) fn tell(&mut self, order: &str) {
        self.asked += 1;
        let stdin = self.stdin.as_mut().expect("not ended");
        writeln!(stdin, "{order}").expect("the party lives");
    }

    /// Waits until it has done all that it was told.
    #[track_caller]
    pub(crate) fn await_idle(&self, within: Duration) {
        let asked = self.asked;
        self.await_that(within, |said| {
            assert!(!said.failed && !said.ended, "the party failed");
            said.idle >= asked
        });
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.said.0.lock().expect("no panic").idle >= self.asked
    }

    #[track_caller]
    fn await_that(&self, within: Duration, holds: impl Fn(&Said) -> bool) {
        let deadline = Instant::now() + within;
        let mut said = self.said.0.lock().expect("no panic");
        while !holds(&said) {
            assert!(Instant::now() < deadline, "not within {within:?}");
            let woken = self.said.1.wait_timeout(said, Duration::from_millis(200));
            said = woken.expect("no panic").0;
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a living child");
    }

    /// Lets it end, and gives what it said.
    #[track_caller]
    pub(crate) fn end(mut self, within: Duration) -> Said {
        if let Some(mut stdin) = self.stdin.take() {
            writeln!(stdin, "end").expect("the party lives");
        }
        self.await_that(within, |said| said.ended);
        std::mem::take(&mut *self.said.0.lock().expect("no panic"))
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reading) = self.reading.take() {
            let _ = reading.join();
        }
    }
}

/// The order oracle over what all parties said, and every answer against the merged
/// order; gives the number of changes.
#[track_caller]
pub(crate) fn verify(subscriptions: &Subscriptions, said: &[Said]) -> usize {
    let delivery = |change: &Changed| {
        let (old, new) = (Value::Integer(change.old), Value::Integer(change.new));
        let operation = if change.swap {
            let (expected, new) = (old.clone(), new.clone());
            Operation::CompareAndSwap { expected, new }
        } else {
            Operation::Write(new.clone())
        };
        Delivery {
            key: change.key,
            variable: VariableId(change.variable),
            operation,
            old,
            new,
            applied: true,
        }
    };
    let logs: Vec<Log> = (0..)
        .zip(said)
        .map(|(process, said)| Log {
            process: ProcessId(process),
            deliveries: said.heard.iter().map(delivery).collect(),
            complete: true,
        })
        .collect();
    let own = || said.iter().flat_map(|said| &said.own);
    let acknowledged: Vec<Acknowledged> = own()
        .filter(|own| own.applied)
        .map(|own| Acknowledged {
            key: own.key,
            variable: VariableId(own.variable),
            applied: true,
        })
        .collect();
    let start = Start::default();
    oracle::check(subscriptions, &start, &logs, &acknowledged).expect("one order");
    let mut merged: Vec<&Changed> = said.iter().flat_map(|said| &said.heard).collect();
    merged.sort_by_key(|change| change.key);
    merged.dedup_by_key(|change| change.key);
    for variable in 0..3 {
        let changes: Vec<_> = merged.iter().filter(|c| c.variable == variable).collect();
        for own in own().filter(|own| own.variable == variable) {
            let before = changes.partition_point(|change| change.key < own.key);
            let held = before.checked_sub(1).map_or(0, |last| changes[last].new);
            assert_eq!(held, own.old, "{own:?}");
            if let Some(expected) = own.expected {
                assert_eq!(own.applied, expected == held, "{own:?}");
            }
        }
    }
    merged.len()
}
