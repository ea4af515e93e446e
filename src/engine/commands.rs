//! How other threads speak to the loop: a bounded queue and an eventfd.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::Thread;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use super::exports::Exported;
use super::keys::Key;
use crate::limits;
use crate::sys::SysError;
use crate::sys::process::EventFd;
use crate::wire::control::NodeStatus;
use crate::wire::follow::FollowSpec;

/// What can be changed while the loop runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Tunables {
    /// Shortest pause between two timer captures of a region.
    pub interval_min: Duration,
    /// Longest pause between two timer captures: the staleness limit.
    pub interval_max: Duration,
    /// Time within which marked bytes are shipped without a commit.
    pub mark_max_delay: Duration,
    /// Time in which the audit compares a region whole.
    pub audit_period: Duration,
    /// Captures in a row after which a page of an `async` region is left open; 0 for never.
    pub hot_after: u64,
    /// Regions of other nodes to follow.
    pub follow: Vec<FollowSpec>,
}

/// One command.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve this connected stream socket as a control connection.
    Adopt(OwnedFd),
    /// Use other settings from now on.
    Reload(Tunables),
    /// Addresses of a source's host, or why there are none.
    Resolved(Key, Result<Vec<SocketAddr>, std::io::Error>),
    /// Put the status here and wake the thread that waits for it.
    Status(Arc<ArrayQueue<NodeStatus>>, Thread),
    /// Put the regions here and wake the thread that waits for them.
    Regions(Arc<ArrayQueue<Vec<Exported>>>, Thread),
    /// Drain and end.
    Stop,
}

/// The sending end, cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct Commands {
    queue: Arc<ArrayQueue<Command>>,
    bell: Arc<EventFd>,
}

/// The engine does not take a command.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Too many are waiting already.
    #[error(
        "{} commands wait for the engine already; try again",
        limits::MAX_COMMANDS
    )]
    Full,
}

impl Commands {
    /// An empty queue.
    ///
    /// # Errors
    /// If the kernel has no eventfd to give.
    pub fn new() -> Result<Self, SysError> {
        Ok(Self {
            queue: Arc::new(ArrayQueue::new(limits::MAX_COMMANDS as usize)),
            bell: Arc::new(EventFd::new()?),
        })
    }

    /// Hands a connected stream socket to the engine, which serves it like a
    /// connection to its control socket.
    ///
    /// # Errors
    /// [`CommandError::Full`] if the engine is too far behind.
    pub fn adopt(&self, socket: OwnedFd) -> Result<(), CommandError> {
        self.send(Command::Adopt(socket))
    }

    /// Replaces the settings that can change while the loop runs.
    ///
    /// # Errors
    /// [`CommandError::Full`] if the engine is too far behind.
    pub fn reload(&self, tunables: Tunables) -> Result<(), CommandError> {
        self.send(Command::Reload(tunables))
    }

    /// Makes the engine drain and end, as `SIGTERM` does.
    ///
    /// # Errors
    /// [`CommandError::Full`] if the engine is too far behind.
    pub fn stop(&self) -> Result<(), CommandError> {
        self.send(Command::Stop)
    }

    /// The node's state, asked of the engine; none if it does not answer in time.
    pub fn status(&self, deadline: Duration) -> Option<NodeStatus> {
        self.ask(Command::Status, deadline)
    }

    /// The node's regions, asked of the engine; none if it does not answer in time.
    pub fn regions(&self, deadline: Duration) -> Option<Vec<Exported>> {
        self.ask(Command::Regions, deadline)
    }

    fn ask<A>(
        &self,
        question: impl FnOnce(Arc<ArrayQueue<A>>, Thread) -> Command,
        deadline: Duration,
    ) -> Option<A> {
        let answer = Arc::new(ArrayQueue::new(1));
        let until = Instant::now() + deadline;
        let command = question(Arc::clone(&answer), std::thread::current());
        self.send(command).ok()?;
        loop {
            if let Some(answer) = answer.pop() {
                return Some(answer);
            }
            std::thread::park_timeout(until.checked_duration_since(Instant::now())?);
        }
    }

    pub(crate) fn send(&self, command: Command) -> Result<(), CommandError> {
        self.queue.push(command).map_err(|_| CommandError::Full)?;
        self.bell.ring();
        Ok(())
    }

    pub(crate) fn take(&self) -> Option<Command> {
        self.queue.pop()
    }

    pub(crate) fn bell(&self) -> &EventFd {
        &self.bell
    }
}
