//! A request before it is handed over, what can go wrong with it, and what became
//! of it.

use super::ErrorCode;
use super::bytes::{FramePlace, Place};
use super::layout::INLINE_BYTES;
use crate::units::OutOfRange;

/// Why a request could not be placed; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcquireError {
    /// All slots or all space are taken: release a response, or wait for one.
    #[error("all slots or all of the payload are in use")]
    Full,
    /// It never fits.
    #[error("a request of {len} bytes; the largest that this channel takes has {largest}")]
    TooLarge {
        /// Bytes that were asked for, the capacity for the response included.
        len: u64,
        /// Bytes that fit.
        largest: u64,
    },
    /// More items than a batch has, or none.
    #[error("a batch of {items} items; 1 to {most} are possible")]
    Items {
        /// What was asked for.
        items: usize,
        /// Most that are possible.
        most: u64,
    },
    /// The server does not know batches.
    #[error("the channel's server takes no batches")]
    NoBatches,
    /// This side or the server has stopped the channel.
    #[error("the channel was stopped")]
    Stopped,
    /// The server stored what no server may store; the channel is of no use any more.
    #[error("the server broke the protocol of the channel")]
    Broken,
    /// The server died, and no new one has taken the memory over.
    #[error("the channel has no server")]
    NoServer,
}

/// How a request is placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Bytes that the response may take; at least the request's length.
    pub capacity: usize,
    /// Nobody waits for a response; the space comes back by itself.
    pub one_way: bool,
}

/// Room for a request that is being filled in. Give it to [`ClientCore::publish`](super::ClientCore::publish)
/// or [`ClientCore::abandon`](super::ClientCore::abandon); dropped, it keeps its room until the channel ends.
#[derive(Debug)]
#[must_use = "publish or abandon it"]
pub struct Grant {
    pub(super) len: u32,
    pub(super) capacity: u32,
    pub(super) one_way: bool,
    pub(super) room: Room,
}

#[derive(Debug)]
pub(super) enum Room {
    /// To be copied into the slot, which is not known yet.
    Inline([u8; INLINE_BYTES]),
    Payload {
        block: u64,
        data: u64,
    },
}

impl Grant {
    /// Bytes of the request.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that request and response may take.
    pub fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// Where its bytes lie in the payload; none if they go into a slot.
    pub fn place(&self) -> Option<FramePlace> {
        match self.room {
            Room::Inline(_) => None,
            Room::Payload { data, .. } => Some(FramePlace {
                place: Place::Payload(data),
                len: self.len,
            }),
        }
    }

    /// Makes the request longer or shorter.
    ///
    /// # Errors
    /// [`OutOfRange`] beyond the capacity.
    pub fn set_len(&mut self, len: usize) -> Result<(), OutOfRange> {
        crate::units::checked_range(0, len as u64, u64::from(self.capacity))?;
        self.len = len as u32;
        Ok(())
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poll {
    /// Not finished.
    Pending,
    /// The response is there: read it, then release it.
    Response,
    /// The handler failed: release it.
    Failed(ErrorCode),
    /// It was cancelled, or its server died: release it.
    Cancelled,
    /// The server stored what it may not store: release it.
    Broken,
    /// No such request is in flight.
    Unknown,
}
