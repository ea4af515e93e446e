//! What other threads ask of the loop: a bounded queue and an eventfd.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use serde::{Deserialize, Serialize};

use super::OperationError;
use super::pending::Promise;
use super::reset::ResetError;
use super::status::LinkStatus;
use crate::limits;
use crate::ordered::{Operation, OrderKey, ProcessId, Start};
use crate::sys::SysError;
use crate::sys::process::EventFd;

/// What a process knows when it was stopped for a new session.
#[derive(Clone, Debug, Default)]
pub(super) struct Frozen {
    pub(super) session: u64,
    pub(super) last: Option<OrderKey>,
    pub(super) state: Start,
}

/// What the loop knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct LoopStatus {
    pub(super) session: u64,
    pub(super) state: String,
    pub(super) clock: u64,
    pub(super) delivered: u64,
    pub(super) last: Option<u64>,
    pub(super) in_flight: u64,
    pub(super) waiting: u64,
    pub(super) links: Vec<LinkStatus>,
}

/// An operation to be carried out.
pub(super) struct Submission {
    pub(super) variable: u32,
    pub(super) operation: Operation,
    pub(super) promise: Promise,
}

/// Anything else.
pub(super) enum Command {
    /// A connection to a peer was made, or why it was not.
    Dialled(ProcessId, Result<OwnedFd, String>),
    /// The callback has room again.
    Room,
    /// Stop delivering for good in this session, and say what is known.
    Freeze(SyncSender<Frozen>),
    /// Start anew.
    Begin {
        session: u64,
        start: Start,
        answer: SyncSender<Result<(), ResetError>>,
    },
    /// Say how it goes.
    Status(SyncSender<LoopStatus>),
    /// End.
    Stop,
}

/// The sending end, cheap to clone, usable from any thread.
///
/// Operations have a queue of their own: they wait where the order has no room for them,
/// and whoever asks how it goes does not wait behind them.
#[derive(Clone)]
pub(super) struct Commands {
    operations: Arc<ArrayQueue<Submission>>,
    queue: Arc<ArrayQueue<Command>>,
    bell: Arc<EventFd>,
    closed: Arc<AtomicBool>,
}

impl Commands {
    pub(super) fn new() -> Result<Self, SysError> {
        Ok(Self {
            operations: Arc::new(ArrayQueue::new(limits::MAX_COMMANDS as usize)),
            queue: Arc::new(ArrayQueue::new(limits::MAX_COMMANDS as usize)),
            bell: Arc::new(EventFd::new()?),
            closed: Arc::new(AtomicBool::new(false)),
        })
    }

    /// Hands an operation over; with too many waiting its promise says so.
    pub(super) fn submit(&self, submission: Submission) {
        if let Err(back) = self.operations.push(submission) {
            back.promise.complete(Err(OperationError::Full));
            return;
        }
        self.bell.ring();
        if self.is_closed() {
            // The loop may have looked for the last time before.
            self.close();
        }
    }

    /// Hands a command over; false if there was no room until the deadline, or nobody
    /// takes any.
    pub(super) fn send(&self, mut command: Command, deadline: Duration) -> bool {
        let until = Instant::now() + deadline;
        while !self.is_closed() {
            match self.queue.push(command) {
                Ok(()) => {
                    self.bell.ring();
                    return true;
                }
                Err(back) if Instant::now() < until => {
                    command = back;
                    std::thread::sleep(Duration::from_micros(100));
                }
                Err(_) => return false,
            }
        }
        false
    }

    /// Nothing is taken any more: what waits is told so by its drop.
    pub(super) fn close(&self) {
        // SYNC(variables_closed): pairs with `is_closed` behind a push.
        self.closed.store(true, Ordering::SeqCst);
        while self.operations.pop().is_some() {}
        while self.queue.pop().is_some() {}
    }

    pub(super) fn is_closed(&self) -> bool {
        // SYNC(variables_closed): either this sees it, or `close` finds what was pushed.
        self.closed.load(Ordering::SeqCst)
    }

    pub(super) fn take(&self) -> Option<Command> {
        self.queue.pop()
    }

    pub(super) fn take_operation(&self) -> Option<Submission> {
        self.operations.pop()
    }

    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }
}
