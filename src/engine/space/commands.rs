//! What other threads ask of the loop: a bounded queue and an eventfd.

use std::sync::Arc;

use crossbeam_queue::ArrayQueue;

use super::nbd::Arrived;
use crate::limits;
use crate::sys::SysError;
use crate::sys::process::EventFd;

/// Something to be done between two requests.
#[derive(Debug)]
pub(super) enum Command {
    /// All changes up to this one are safe, or not within their time.
    Settled { change: u64, is_safe: bool },
    /// An NBD client that has chosen what is served here.
    Adopt(Box<Arrived>),
    /// End.
    Stop,
}

/// The sending end, cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub(super) struct Commands {
    queue: Arc<ArrayQueue<Command>>,
    bell: Arc<EventFd>,
}

impl Commands {
    pub(super) fn new() -> Result<Self, SysError> {
        Ok(Self {
            queue: Arc::new(ArrayQueue::new(limits::MAX_COMMANDS as usize)),
            bell: Arc::new(EventFd::new()?),
        })
    }

    /// Hands a command over; false if there is no room.
    pub(super) fn send(&self, command: Command) -> bool {
        let sent = self.queue.push(command).is_ok();
        self.bell.ring();
        sent
    }

    pub(super) fn take(&self) -> Option<Command> {
        self.queue.pop()
    }

    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }
}
