//! What NBD connections of a server have done on other servers: a bounded queue to whoever
//! reaches them, and back.
//!
//! - I1: each errand that was sent comes back once, unless its bearer is gone for good.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_queue::ArrayQueue;

use crate::limits::MAX_NBD_ERRANDS;
use crate::nbd::{Failure, Unit};
use crate::sys::SysError;
use crate::sys::process::EventFd;

/// What is to be done with the bytes of a unit.
#[derive(Debug)]
pub enum What {
    /// Read them.
    Read,
    /// Store these.
    Write(Vec<u8>),
    /// Set them to zero.
    Zero,
    /// Ask which of them are holes.
    Holes,
}

impl What {
    /// Bytes that `unit` has wait.
    pub(super) fn weight(&self, unit: Unit) -> u64 {
        match self {
            Self::Holes => 0,
            _ => unit.len.into(),
        }
    }
}

/// What an errand brought.
#[derive(Debug)]
pub enum Went {
    /// The bytes of a read; otherwise none.
    Bytes(Vec<u8>),
    /// What the range consists of, from its beginning on: bytes, and whether they are a
    /// hole. None where that is not told.
    Runs(Vec<(u64, bool)>),
}

/// A unit on its way out.
#[derive(Debug)]
pub struct Errand {
    pub(super) connection: u64,
    /// Rises with each connection that is made.
    pub serial: u64,
    /// Addresses of the space.
    pub unit: Unit,
    /// What is to be done there.
    pub what: What,
}

impl Errand {
    /// The answer to it.
    pub fn done(&self, went: Result<Went, Failure>) -> Done {
        Done {
            connection: self.connection,
            weight: self.what.weight(self.unit),
            unit: self.unit,
            went,
        }
    }
}

/// A unit on its way back.
#[derive(Debug)]
pub struct Done {
    pub(super) connection: u64,
    pub(super) unit: Unit,
    pub(super) weight: u64,
    pub(super) went: Result<Went, Failure>,
}

/// Both ways. Two are equal if they are the same.
#[derive(Debug)]
pub struct Errands {
    asked: ArrayQueue<Errand>,
    asked_bell: EventFd,
    done: ArrayQueue<Done>,
    done_bell: EventFd,
    closed: AtomicBool,
}

impl PartialEq for Errands {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Errands {}

impl Errands {
    /// Empty queues.
    ///
    /// # Errors
    /// [`SysError`] if the kernel gives no eventfd.
    pub fn new() -> Result<Arc<Self>, SysError> {
        Ok(Arc::new(Self {
            asked: ArrayQueue::new(MAX_NBD_ERRANDS as usize),
            asked_bell: EventFd::new()?,
            done: ArrayQueue::new(MAX_NBD_ERRANDS as usize),
            done_bell: EventFd::new()?,
            closed: AtomicBool::new(false),
        }))
    }

    pub(super) fn send(&self, errand: Errand) -> bool {
        let sent = self.asked.push(errand).is_ok();
        self.asked_bell.ring();
        sent
    }

    pub(super) fn take_done(&self) -> Option<Done> {
        self.done.pop()
    }

    pub(super) fn done_bell(&self) -> &EventFd {
        &self.done_bell
    }

    /// The next thing to do.
    pub fn next(&self) -> Option<Errand> {
        self.asked.pop()
    }

    /// Readable when there is something to do; to be drained before [`next`](Self::next).
    pub fn bell(&self) -> &EventFd {
        &self.asked_bell
    }

    /// Brings an answer back. There is room: no more are on their way than it holds.
    pub fn finish(&self, done: Done) {
        let _ = self.done.push(done);
        self.done_bell.ring();
    }

    /// Nothing more is to be done.
    pub fn close(&self) {
        // SYNC(errands_closed): pairs with is_closed, which is asked after the bell.
        self.closed.store(true, Ordering::Release);
        self.asked_bell.ring();
    }

    /// Whether nothing more is to be done.
    pub fn is_closed(&self) -> bool {
        // SYNC(errands_closed): pairs with close.
        self.closed.load(Ordering::Acquire)
    }
}
