//! Many small requests at once: a batch goes to one worker, is rung for once and
//! answered once, and each of its items has an outcome of its own.
//!
//! ```text
//! call_batch(&[a, b, c]) --- one frame ---> handler(a), handler(b), handler(c)
//! BatchResponse::items() <-- one answer --- Ok(bytes) | Err(ItemError) for each
//! ```
//! A server that dies in the middle leaves what it had answered: those items can be
//! read, the one it was at may have been changed, the others were not touched.

use std::time::Duration;

use super::ChannelError;
use super::client::DuplexClient;
use super::shared::SharedDuplexClient;
use super::wait::Ended;
use crate::duplex::{Batch, BatchGrant, FrameBytes, ItemError, Segment, Sequence};
use crate::units::OutOfRange;

impl DuplexClient {
    /// Whether this channel's server takes batches; one of another version may not.
    pub fn has_batches(&self) -> bool {
        self.core.borrow().has_batches()
    }

    /// Sends `items`, up to [`MAX_BATCH_ITEMS`](crate::limits::MAX_BATCH_ITEMS), as one
    /// batch and waits for its end. Each item has room for a response as long as the
    /// longest request of all. When the deadline passes the batch is cancelled; one
    /// that a worker has begun is finished all the same.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # fn f(client: uffd_sync::client::DuplexClient) -> Result<(), uffd_sync::client::ChannelError> {
    /// let answers = client.call_batch(&[b"one", b"two", b"three"], Duration::from_secs(1))?;
    /// for answer in answers.items() {
    ///     match answer {
    ///         Ok(bytes) => println!("{}", String::from_utf8_lossy(&bytes.to_vec())),
    ///         Err(error) => eprintln!("{error}"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`DuplexClient::send_batch`] and [`DuplexClient::receive_batch`].
    pub fn call_batch(
        &self,
        items: &[&[u8]],
        timeout: Duration,
    ) -> Result<BatchResponse<'_>, ChannelError> {
        let sequence = self.send_batch(items, 0)?;
        let received = self.receive_batch(sequence, timeout);
        if matches!(received, Err(ChannelError::TimedOut)) {
            self.cancel(sequence);
        }
        received
    }

    /// Sends `items` as one batch, each with room for a response of `capacity` bytes, or
    /// as long as the longest request of all. It is received by
    /// [`DuplexClient::receive_batch`]; received as any other response it is its frame's
    /// bytes. It takes room in the payload, however small it is: 80 bytes, 4 for each
    /// item and what all of them have room for, in units of 64.
    ///
    /// # Errors
    /// [`ChannelError::Items`], [`ChannelError::NoBatches`]; as
    /// [`DuplexClient::send_request`].
    pub fn send_batch(&self, items: &[&[u8]], capacity: usize) -> Result<Sequence, ChannelError> {
        let mut core = self.core.borrow_mut();
        let sequence = core.submit_batch(items, capacity)?;
        core.kick();
        Ok(sequence)
    }

    /// Room for a batch of `items` requests, each of up to `capacity` bytes with its
    /// response, to be written where the server will read them.
    ///
    /// # Errors
    /// As [`DuplexClient::send_batch`].
    pub fn acquire_batch(
        &self,
        items: usize,
        capacity: usize,
    ) -> Result<BatchRequest<'_>, ChannelError> {
        let grant = self.core.borrow_mut().acquire_batch(items, capacity)?;
        Ok(BatchRequest {
            client: self,
            grant: Some(grant),
        })
    }

    /// Items of a batch in flight that were answered so far; none if there is no such
    /// batch.
    pub fn batch_progress(&self, sequence: Sequence) -> Option<usize> {
        self.core.borrow().batch_progress(sequence)
    }

    /// Waits for the end of a batch: all items answered, or the server gone, which is
    /// then the outcome of those that were not ([`ItemError::PeerDied`]). After
    /// [`ChannelError::TimedOut`] it is still in flight.
    ///
    /// # Errors
    /// [`ChannelError::TimedOut`]; [`ChannelError::Handler`] if the frame as a whole was
    /// refused; [`ChannelError::Broken`]; [`ChannelError::UnknownSequence`] if it is no
    /// batch in flight.
    pub fn receive_batch(
        &self,
        sequence: Sequence,
        timeout: Duration,
    ) -> Result<BatchResponse<'_>, ChannelError> {
        if !self.core.borrow().is_batch(sequence) {
            return Err(ChannelError::UnknownSequence { sequence });
        }
        match self.wait_for(sequence, timeout) {
            Ok(_) => {}
            Err(Ended::TimedOut) => return Err(ChannelError::TimedOut),
            Err(Ended::Gone) => self.server_is_gone(),
        }
        let batch = self.core.borrow().batch(sequence);
        match batch {
            Some(batch) => Ok(BatchAnswer {
                client: self,
                sequence,
                batch: batch.after_death(self.forget_lost(sequence)),
            }),
            None => match self.outcome(sequence) {
                Err(error) => Err(error),
                // A batch that was answered was found above.
                Ok(_) => Err(ChannelError::UnknownSequence { sequence }),
            },
        }
    }
}

/// A batch that is being written, where the server will read it. Dropped without being
/// sent, it gives its room back.
#[derive(Debug)]
pub struct BatchRequest<'a> {
    client: &'a DuplexClient,
    grant: Option<BatchGrant>,
}

impl BatchRequest<'_> {
    /// Number of items.
    pub fn len(&self) -> usize {
        self.grant.as_ref().map_or(0, BatchGrant::len)
    }

    /// Whether it has none: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that request and response of each item may take.
    pub fn room(&self) -> usize {
        self.grant.as_ref().map_or(0, BatchGrant::room)
    }

    /// Stores the request of an item; one that is never stored is empty.
    ///
    /// # Errors
    /// [`OutOfRange`] if there is no such item, or it has less room.
    pub fn write(&mut self, item: usize, bytes: &[u8]) -> Result<(), OutOfRange> {
        match &mut self.grant {
            Some(grant) => self.client.core.borrow().write_item(grant, item, bytes),
            None => Ok(()),
        }
    }

    /// Hands it over and rings the server.
    pub fn send(mut self) -> Sequence {
        let mut core = self.client.core.borrow_mut();
        let sequence = match self.grant.take() {
            Some(grant) => core.publish_batch(grant),
            // Only this takes it, and consumes the request.
            None => 0,
        };
        core.kick();
        sequence
    }
}

impl Drop for BatchRequest<'_> {
    fn drop(&mut self) {
        if let Some(grant) = self.grant.take() {
            self.client.core.borrow_mut().abandon_batch(grant);
        }
    }
}

/// Whose response a batch is: it has the memory, and takes the room back.
pub trait Holder {
    /// The channel's memory.
    fn memory(&self) -> &Segment;
    /// The response of `sequence` is not needed any more.
    fn give_back(&self, sequence: Sequence);
}

impl Holder for &DuplexClient {
    fn memory(&self) -> &Segment {
        self.segment()
    }

    fn give_back(&self, sequence: Sequence) {
        self.core.borrow_mut().release(sequence);
    }
}

impl Holder for SharedDuplexClient {
    fn memory(&self) -> &Segment {
        self.segment()
    }

    fn give_back(&self, sequence: Sequence) {
        self.core().release(sequence);
        self.tell_room();
    }
}

/// The batch of a [`DuplexClient`] at its end.
pub type BatchResponse<'a> = BatchAnswer<&'a DuplexClient>;
/// The batch of a [`SharedDuplexClient`] at its end.
pub type SharedBatchResponse = BatchAnswer<SharedDuplexClient>;

/// A batch at its end, where the server left it. Its room comes back when this is
/// dropped.
#[derive(Debug)]
pub struct BatchAnswer<H: Holder> {
    client: H,
    sequence: Sequence,
    batch: Batch,
}

impl<H: Holder> BatchAnswer<H> {
    /// The batch's number.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.batch.len()
    }

    /// Whether it has none: never.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Items that were answered, failed ones included; all, unless the server died.
    pub fn answered(&self) -> usize {
        self.batch.answered()
    }

    /// What became of each item, in order.
    pub fn items(&self) -> impl ExactSizeIterator<Item = Result<FrameBytes<'_>, ItemError>> {
        self.batch.items(self.client.memory())
    }

    /// What became of one item.
    ///
    /// # Errors
    /// [`ItemError`].
    pub fn item(&self, item: usize) -> Result<FrameBytes<'_>, ItemError> {
        self.batch.item(self.client.memory(), item)
    }
}

impl<H: Holder> Drop for BatchAnswer<H> {
    fn drop(&mut self) {
        self.client.give_back(self.sequence);
    }
}

impl SharedDuplexClient {
    /// As [`DuplexClient::call_batch`], `timeout` for room and answer together.
    ///
    /// # Errors
    /// As [`SharedDuplexClient::send_request`] and [`DuplexClient::call_batch`].
    pub fn call_batch(
        &self,
        items: &[&[u8]],
        timeout: Duration,
    ) -> Result<SharedBatchResponse, ChannelError> {
        let begun = std::time::Instant::now();
        let sequence = self.send_batch(items, 0, timeout)?;
        let left = timeout.saturating_sub(begun.elapsed());
        let received = self.receive_batch(sequence, left);
        // As in `SharedDuplexClient::call`.
        if matches!(received, Err(ChannelError::TimedOut)) && !self.cancel(sequence) {
            return self.receive_batch(sequence, Duration::ZERO);
        }
        received
    }

    /// As [`DuplexClient::send_batch`]. Waits for room if there is none.
    ///
    /// # Errors
    /// As [`SharedDuplexClient::send_request`] and [`DuplexClient::send_batch`].
    pub fn send_batch(
        &self,
        items: &[&[u8]],
        capacity: usize,
        timeout: Duration,
    ) -> Result<Sequence, ChannelError> {
        self.send_by(|core| core.submit_batch(items, capacity), timeout)
    }

    /// As [`DuplexClient::receive_batch`].
    ///
    /// # Errors
    /// As [`DuplexClient::receive_batch`].
    pub fn receive_batch(
        &self,
        sequence: Sequence,
        timeout: Duration,
    ) -> Result<SharedBatchResponse, ChannelError> {
        if !self.core().is_batch(sequence) {
            return Err(ChannelError::UnknownSequence { sequence });
        }
        let poll = self.await_end(sequence, timeout)?;
        let batch = self.core().batch(sequence);
        match batch {
            Some(batch) => Ok(BatchAnswer {
                client: self.clone(),
                sequence,
                batch: batch.after_death(self.forget_lost(sequence)),
            }),
            None => match self.outcome(sequence, poll) {
                Err(error) => Err(error),
                // A batch that was answered was found above.
                Ok(_) => Err(ChannelError::UnknownSequence { sequence }),
            },
        }
    }
}
