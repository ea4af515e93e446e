//! What a handler gets: one frame, to be changed where it lies.

use std::borrow::Cow;

use crate::duplex::{Claim, ErrorCode, FrameBytes, Sequence, ServerCore};
use crate::shm::{PeerTrust, TrustedBytes};
use crate::units::{OutOfRange, checked_range};

/// A handler's failure, as it reaches the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {text}")]
pub struct HandlerError {
    /// Kind; programs use [`ErrorCode::FIRST_OWN`] and up.
    pub code: ErrorCode,
    /// In words; what is beyond the frame's room or 256 bytes is cut off.
    pub text: Cow<'static, str>,
}

impl HandlerError {
    /// A failure of the general kind.
    pub fn new(text: impl Into<Cow<'static, str>>) -> HandlerError {
        HandlerError {
            code: ErrorCode::HANDLER,
            text: text.into(),
        }
    }

    /// A failure of a kind of the program's own.
    pub fn with_code(code: u32, text: impl Into<Cow<'static, str>>) -> HandlerError {
        HandlerError {
            code: ErrorCode(code),
            text: text.into(),
        }
    }
}

impl From<OutOfRange> for HandlerError {
    fn from(error: OutOfRange) -> HandlerError {
        HandlerError::new(error.to_string())
    }
}

/// A request in the handler's hands; what it is left as is the response.
#[derive(Debug)]
pub struct Frame<'a> {
    core: &'a ServerCore,
    claim: &'a Claim,
    /// All bytes that the response may have.
    room: FrameBytes<'a>,
    /// Its number within its batch.
    item: Option<usize>,
    len: usize,
    trust: Option<PeerTrust>,
    bytes: Option<TrustedBytes<'a>>,
}

impl<'a> Frame<'a> {
    /// The request `claim`, which has these bytes.
    #[inline(always)]
    pub(super) fn new(
        core: &'a ServerCore,
        claim: &'a Claim,
        room: FrameBytes<'a>,
        trust: Option<PeerTrust>,
    ) -> Frame<'a> {
        Frame {
            core,
            claim,
            room,
            item: None,
            len: claim.len(),
            trust,
            bytes: None,
        }
    }

    /// From now on it is an item of the batch: its number, its bytes, and its request's
    /// length.
    #[inline(always)]
    pub(super) fn take_item(&mut self, item: usize, room: FrameBytes<'a>, len: usize) {
        self.item = Some(item);
        self.room = room;
        self.len = len;
        self.bytes = None;
    }

    /// The number of the request within its batch, from 0; none if it came alone.
    pub fn item(&self) -> Option<usize> {
        self.item
    }

    /// The request's number, which the response keeps; items of a batch have that of
    /// the batch.
    pub fn sequence(&self) -> Sequence {
        self.claim.sequence()
    }

    /// Bytes of the request, or of the response once set.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that the response may have: what the client reserved.
    pub fn capacity(&self) -> usize {
        self.room.len()
    }

    /// Whether nobody waits for the response.
    pub fn is_one_way(&self) -> bool {
        self.claim.is_one_way()
    }

    /// Sets the response's length. Bytes beyond the request's are whatever an earlier
    /// frame left there.
    ///
    /// # Errors
    /// [`OutOfRange`] beyond the capacity.
    pub fn set_len(&mut self, len: usize) -> Result<(), OutOfRange> {
        checked_range(0, len as u64, self.capacity() as u64)?;
        self.len = len;
        Ok(())
    }

    /// Its bytes, to be copied in and out.
    #[inline]
    pub fn view(&self) -> FrameBytes<'_> {
        self.room.first(self.len)
    }

    /// Changes all bytes through a buffer of 16 KiB; see [`FrameBytes::update_chunks`].
    pub fn update_chunks(&mut self, mut update: impl FnMut(&mut [u8])) {
        self.view().update_chunks(|_, chunk| update(chunk));
    }

    /// Its bytes as a slice, where they lie: only of a server that was started with
    /// trust in its clients.
    ///
    /// # Errors
    /// [`HandlerError`] if it was not.
    pub fn data_mut(&mut self) -> Result<&mut [u8], HandlerError> {
        if self.bytes.is_none() {
            self.bytes = match (self.trust, self.room.payload_offset()) {
                (Some(trust), Some(at)) => self.core.trusted_part(at, self.room.len(), trust),
                (Some(trust), None) => self.core.trusted_bytes(self.claim, trust),
                (None, _) => None,
            };
        }
        match &mut self.bytes {
            Some(bytes) => Ok(&mut bytes[..self.len]),
            None => Err(HandlerError::new(
                "this server does not trust its clients with slices of their frames; \
                 start it by `start_trusting`, or use `view`",
            )),
        }
    }
}
