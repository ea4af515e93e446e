//! Many small requests in one frame: one hand-over, one wake-up, one answer.
//!
//! ```text
//! frame, in the payload; the slot's flags say BATCH
//! +0x00 u32 items       1 to MAX_BATCH_ITEMS
//! +0x04 u32 room        bytes that each item has, a multiple of 8, 8 at least
//! +0x08 u32 done        items that the server is done with
//! +0x0C u32 zero
//! +0x10 u32 x items     length of each; of a failed one with FAILED
//!       (rounded up to 8)
//!       room x items    the bytes of each; of a failed one u32 code, u32 0, text
//! ```
//! One worker takes the whole frame and goes through the items in order, from `done`
//! on. All items have the same room, so that each lies where its number says and
//! nothing of what a peer stores decides where another one is looked for.
//!
//! - I1: the frame's state word hands over everything, as for any other frame. `done` is
//!   looked at only when the server is dead, or out of curiosity: then the items before
//!   it are answered, the one at it may have been changed, those behind it were not
//!   touched.
//! - I2: the server copies the first word once per turn at the batch and checks it
//!   against the frame; the client goes by what it asked for. An item's length is copied
//!   once and is at most the room.
//! - I3: a frame of a batch lies in the payload only: in a slot each item's answer would
//!   take the line away from a client that polls it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::bytes::{FrameBytes, cut, fill_words};
use super::client::ClientCore;
use super::failpoint::Failpoint;
use super::layout::{Features, INLINE_BYTES, slot};
use super::memory::Window;
use super::record::Phase;
use super::request::{AcquireError, Poll};
use super::segment::Segment;
use super::{ErrorCode, Sequence};
use crate::limits::{MAX_BATCH_ITEMS, MAX_CHANNEL_ERROR_BYTES};
use crate::shm::prefetch_to_write;
use crate::units::{OutOfRange, checked_range};

/// Words in front of the table of lengths.
const HEADER: usize = 2;
/// Bit of a length: the item failed.
const FAILED: u32 = 1 << 31;
/// Bytes in front of a failed item's text.
const CODE_BYTES: u32 = 8;
/// Cache lines of a batch that are fetched at once.
const LINES_AT_ONCE: usize = 48;

const _: () = assert!(MAX_BATCH_ITEMS < FAILED as u64);

/// How many items a batch has, and what room each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) items: u32,
    pub(super) room: u32,
}

impl Shape {
    /// For so many items of up to `capacity` bytes each. None beyond the limits.
    fn new(items: usize, capacity: usize) -> Option<Shape> {
        let room = capacity.max(CODE_BYTES as usize);
        let room = u32::try_from(room.checked_next_multiple_of(8)?);
        Shape::checked(u32::try_from(items).ok()?, room.ok()?)
    }

    fn checked(items: u32, room: u32) -> Option<Shape> {
        let counts = items > 0 && u64::from(items) <= MAX_BATCH_ITEMS;
        let fits = (CODE_BYTES..FAILED).contains(&room) && room.is_multiple_of(8);
        (counts && fits).then_some(Shape { items, room })
    }

    fn word(self) -> u64 {
        u64::from(self.room) << 32 | u64::from(self.items)
    }

    /// Words in front of the first item.
    fn first(self) -> usize {
        HEADER + (self.items as usize).div_ceil(2)
    }

    fn room_words(self) -> usize {
        self.room as usize / 8
    }

    /// Words of the whole frame.
    fn words(self) -> usize {
        self.first() + self.items as usize * self.room_words()
    }

    fn bytes(self) -> u64 {
        8 * self.words() as u64
    }
}

/// How one item of a batch ended, as it stands in the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// With a response of this length.
    Response(u32),
    /// Failed, with a code and a text of this length.
    Failed(u32),
    /// The length is impossible.
    Broken,
}

/// The words of a batch, of which `shape` was checked.
#[derive(Clone, Copy, Debug)]
pub struct BatchWords<'a> {
    words: &'a [AtomicU64],
    shape: Shape,
    /// Where they lie in the payload.
    offset: u64,
}

impl<'a> BatchWords<'a> {
    /// The batch of this shape at `offset` of the payload.
    fn new(payload: &'a Window, offset: u64, shape: Shape) -> Result<Self, OutOfRange> {
        Ok(BatchWords {
            words: payload.words(offset, shape.words())?,
            shape,
            offset,
        })
    }

    /// The batch that a client says to have stored in `len` bytes at `offset`: the
    /// server's way. None if it cannot be one.
    pub(super) fn open(payload: &'a Window, offset: u64, len: u32) -> Option<Self> {
        let header = payload.words(offset, HEADER).ok()?;
        let [word, done] = [0, 1].map(|at| header[at].load(Ordering::Relaxed));
        let shape = Shape::checked(word as u32, (word >> 32) as u32)?;
        let whole = checked_range(0, shape.bytes(), u64::from(len)).is_ok();
        // A server that goes on after a handler's panic finds its own count.
        (whole && done >> 32 == 0).then_some(())?;
        BatchWords::new(payload, offset, shape).ok()
    }

    /// Fetches it, if it is not long, for a side that is going to write to all of it.
    #[inline]
    pub fn prefetch(&self) {
        prefetch_to_write(self.words, LINES_AT_ONCE);
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.shape.items as usize
    }

    /// Never: a batch has an item at least.
    pub fn is_empty(&self) -> bool {
        self.shape.items == 0
    }

    /// Bytes that each item has.
    pub fn room(&self) -> usize {
        self.shape.room as usize
    }

    fn length(&self, item: usize) -> u32 {
        let word = self.words[HEADER + item / 2].load(Ordering::Relaxed);
        (word >> (32 * (item % 2))) as u32
    }

    fn set_length(&self, item: usize, length: u32) {
        let word = &self.words[HEADER + item / 2];
        let shift = 32 * (item % 2);
        let others = word.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
        word.store(others | u64::from(length) << shift, Ordering::Relaxed);
    }

    #[inline]
    fn room_of(&self, item: usize) -> (&'a [AtomicU64], u64) {
        let words = self.shape.room_words();
        let at = self.shape.first() + item * words;
        (&self.words[at..at + words], self.offset + 8 * at as u64)
    }

    /// The first `len` bytes of an item's room, or all of it.
    ///
    /// # Panics
    /// If there is no such item.
    #[inline]
    pub fn bytes(&self, item: usize, len: usize) -> FrameBytes<'a> {
        let (words, offset) = self.room_of(item);
        FrameBytes::of_words(words, u32::try_from(len).unwrap_or(u32::MAX), offset)
    }

    /// Server: the length of an item's request; none if it is impossible.
    ///
    /// # Panics
    /// If there is no such item.
    #[inline]
    pub fn request(&self, item: usize) -> Option<usize> {
        let length = self.length(item);
        (length <= self.shape.room).then_some(length as usize)
    }

    /// Server: answers an item whose request has `asked` bytes with its first `len`
    /// bytes, at most its room.
    #[inline]
    pub fn respond(&self, item: usize, asked: usize, len: usize) {
        if len != asked {
            self.set_length(item, len.min(self.room()) as u32);
        }
        self.step(item);
    }

    /// Server: answers an item with an error, and as much of its text as the room and
    /// [`MAX_CHANNEL_ERROR_BYTES`] allow.
    #[cold]
    pub fn fail(&self, item: usize, code: ErrorCode, text: &str) {
        let room = u64::from(self.shape.room - CODE_BYTES).min(MAX_CHANNEL_ERROR_BYTES);
        let text = cut(text, room as usize).as_bytes();
        let (words, _) = self.room_of(item);
        words[0].store(u64::from(code.0), Ordering::Relaxed);
        fill_words(&words[1..], text);
        self.set_length(item, FAILED | text.len() as u32);
        self.step(item);
    }

    #[inline]
    fn step(&self, item: usize) {
        // SYNC(batch_done): who sees the count sees the answers before it; pairs with the
        // load in `done`.
        self.words[1].store(item as u64 + 1, Ordering::Release);
    }

    /// Items that were answered, by the server's account; at most all.
    pub fn done(&self) -> usize {
        // SYNC(batch_done): pairs with the store in `step`.
        let done = self.words[1].load(Ordering::Acquire);
        done.min(u64::from(self.shape.items)) as usize
    }

    #[inline]
    fn ended(&self, item: usize) -> Ended {
        let length = self.length(item);
        if length <= self.shape.room {
            return Ended::Response(length);
        }
        match length & !FAILED {
            text if length & FAILED != 0 && text <= self.shape.room - CODE_BYTES => {
                Ended::Failed(text)
            }
            _ => Ended::Broken,
        }
    }

    #[cold]
    fn failure(&self, item: usize, len: u32) -> ItemError {
        let (words, offset) = self.room_of(item);
        let code = ErrorCode(words[0].load(Ordering::Relaxed) as u32);
        let len = len.min(MAX_CHANNEL_ERROR_BYTES as u32);
        let text = FrameBytes::of_words(&words[1..], len, offset + 8).to_vec();
        ItemError::Handler {
            code,
            text: String::from_utf8_lossy(&text).into_owned(),
        }
    }
}

/// Why an item of a batch has no response.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ItemError {
    /// The handler failed, or its answer could not be taken.
    #[error("{code}: {text}")]
    Handler {
        /// Kind of failure.
        code: ErrorCode,
        /// The handler's words, as far as the item had room.
        text: String,
    },
    /// The server died, or left, before it answered.
    #[error(
        "the server died or stopped before it answered; the bytes {}",
        if *maybe_modified { "may have been changed" } else { "were not touched" }
    )]
    PeerDied {
        /// Whether a handler was at it.
        maybe_modified: bool,
    },
    /// The server stored a length that no item can have.
    #[error("the server broke the protocol of the channel")]
    Broken,
    /// There is no such item.
    #[error("item {item} of a batch of {items}")]
    NoSuchItem {
        /// What was asked for.
        item: usize,
        /// Items that there are.
        items: usize,
    },
}

/// A batch that has come to its end, without holding on to the memory.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    offset: u64,
    shape: Shape,
    /// Items that were answered.
    done: u32,
    /// Whether the first one that was not may have been changed.
    maybe_modified: bool,
}

impl Batch {
    /// Number of items.
    pub fn len(&self) -> usize {
        self.shape.items as usize
    }

    /// Never: a batch has an item at least.
    pub fn is_empty(&self) -> bool {
        self.shape.items == 0
    }

    /// Items that were answered, failed ones included; all, unless the server died.
    pub fn answered(&self) -> usize {
        self.done as usize
    }

    /// The same, of a server that died, and that may have been at an item if
    /// `maybe_modified`: as [`ClientCore::server_died`] said.
    #[must_use]
    pub fn after_death(self, maybe_modified: bool) -> Batch {
        Batch {
            maybe_modified,
            ..self
        }
    }

    /// What became of each item, in order, in the memory of the channel that it came
    /// from.
    pub fn items<'a>(
        &self,
        segment: &'a Segment,
    ) -> impl ExactSizeIterator<Item = Result<FrameBytes<'a>, ItemError>> + use<'a> {
        let batch = *self;
        // It lies within the payload of its own channel, and perhaps of no other one.
        let words = BatchWords::new(segment.payload(), self.offset, self.shape).ok();
        (0..self.len()).map(move |item| match &words {
            Some(words) => batch.look(words, item),
            None => Err(ItemError::Broken),
        })
    }

    /// What became of one item.
    ///
    /// # Errors
    /// [`ItemError`].
    pub fn item<'a>(&self, segment: &'a Segment, item: usize) -> Result<FrameBytes<'a>, ItemError> {
        if item >= self.len() {
            let items = self.len();
            return Err(ItemError::NoSuchItem { item, items });
        }
        match BatchWords::new(segment.payload(), self.offset, self.shape) {
            Ok(words) => self.look(&words, item),
            Err(_) => Err(ItemError::Broken),
        }
    }

    #[inline]
    fn look<'a>(&self, words: &BatchWords<'a>, item: usize) -> Result<FrameBytes<'a>, ItemError> {
        if item >= self.done as usize {
            let maybe_modified = self.maybe_modified && item == self.done as usize;
            return Err(ItemError::PeerDied { maybe_modified });
        }
        match words.ended(item) {
            Ended::Response(len) => Ok(words.bytes(item, len as usize)),
            Ended::Failed(len) => Err(words.failure(item, len)),
            Ended::Broken => Err(ItemError::Broken),
        }
    }
}

/// A batch that is being filled in. Give it to [`ClientCore::publish_batch`] or
/// [`ClientCore::abandon_batch`]; dropped, it keeps its room until the channel ends.
#[derive(Debug)]
#[must_use = "publish or abandon it"]
pub struct BatchGrant {
    pub(super) block: u64,
    pub(super) data: u64,
    pub(super) shape: Shape,
}

impl BatchGrant {
    /// Number of items.
    pub fn len(&self) -> usize {
        self.shape.items as usize
    }

    /// Never: a batch has an item at least.
    pub fn is_empty(&self) -> bool {
        self.shape.items == 0
    }

    /// Bytes that each item's request and response may take.
    pub fn room(&self) -> usize {
        self.shape.room as usize
    }
}

impl ClientCore {
    /// Room for a batch of `items` requests, each of up to `capacity` bytes with its
    /// response; each is empty until it is stored. It takes 16 bytes, 4 for each item,
    /// and for each item its capacity, rounded up to 8 bytes.
    ///
    /// # Errors
    /// [`AcquireError::Items`], [`AcquireError::NoBatches`]; as [`ClientCore::acquire`].
    pub fn acquire_batch(
        &mut self,
        items: usize,
        capacity: usize,
    ) -> Result<BatchGrant, AcquireError> {
        let grant = self.place_batch(items, capacity)?;
        let words = self.batch_words(&grant)?.words;
        for word in &words[1..grant.shape.first()] {
            word.store(0, Ordering::Relaxed);
        }
        self.grant_one();
        Ok(grant)
    }

    fn place_batch(&mut self, items: usize, capacity: usize) -> Result<BatchGrant, AcquireError> {
        if !self.has_batches() {
            return Err(AcquireError::NoBatches);
        }
        let most = MAX_BATCH_ITEMS;
        let (len, largest) = (capacity as u64, self.largest());
        if items == 0 || items as u64 > most {
            return Err(AcquireError::Items { items, most });
        }
        let shape = Shape::new(items, capacity).ok_or(AcquireError::TooLarge { len, largest })?;
        let len = shape.bytes().max(INLINE_BYTES as u64 + 1);
        let bytes = u32::try_from(len).map_err(|_| AcquireError::TooLarge { len, largest })?;
        self.close_lane();
        self.reserve(bytes as usize)?;
        let (block, data) = self.allocate(bytes as usize)?;
        Ok(BatchGrant { block, data, shape })
    }

    /// Whether the channel's other side knows batches.
    pub fn has_batches(&self) -> bool {
        let features = self.segment().geometry().features;
        features.contains(Features::BATCHES)
    }

    fn complete_batch(&mut self, grant: &BatchGrant) -> Sequence {
        self.pass(Failpoint::ClientWriting);
        let len = grant.shape.bytes() as u32;
        let capacity = len.max(INLINE_BYTES as u32 + 1).next_multiple_of(64);
        let place = Some((grant.block, grant.data));
        let sequence = self.complete(len, capacity, slot::BATCH, place);
        self.records[(sequence & self.mask) as usize].batch = grant.shape;
        sequence
    }

    /// Where the batch `sequence` lies, if it is one that is in flight or not released.
    fn batch_at(&self, sequence: Sequence) -> Option<(u64, Shape)> {
        let record = &self.records[(sequence & self.mask) as usize];
        let is_batch = record.batch.items > 0 && record.sequence == sequence;
        let (_, data) = record.place.filter(|_| is_batch)?;
        Some((data, record.batch))
    }

    fn batch_words(&self, grant: &BatchGrant) -> Result<BatchWords<'_>, AcquireError> {
        // The place is the account's own and lies within the payload.
        BatchWords::new(self.segment().payload(), grant.data, grant.shape)
            .map_err(|_| AcquireError::Broken)
    }

    /// Stores the request of one item.
    ///
    /// # Errors
    /// [`OutOfRange`] if there is no such item, or it has less room.
    pub fn write_item(
        &self,
        grant: &mut BatchGrant,
        item: usize,
        bytes: &[u8],
    ) -> Result<(), OutOfRange> {
        let shape = grant.shape;
        checked_range(item as u64, 1, shape.items.into())?;
        checked_range(0, bytes.len() as u64, shape.room.into())?;
        let batch = BatchWords::new(self.segment().payload(), grant.data, shape)?;
        fill_words(batch.room_of(item).0, bytes);
        batch.set_length(item, bytes.len() as u32);
        Ok(())
    }

    /// Completes a batch, to be handed over by [`ClientCore::kick`].
    pub fn publish_batch(&mut self, grant: BatchGrant) -> Sequence {
        if let Ok(batch) = self.batch_words(&grant) {
            batch.words[0].store(grant.shape.word(), Ordering::Relaxed);
        }
        self.ungrant_one();
        self.complete_batch(&grant)
    }

    /// Gives the room of a batch back that is not sent after all.
    pub fn abandon_batch(&mut self, grant: BatchGrant) {
        self.ungrant_one();
        self.space.release(grant.block);
    }

    /// Places `items` as one batch, each with room for a response of `capacity` bytes,
    /// or as many as the longest of them has. To be handed over by [`ClientCore::kick`].
    ///
    /// # Errors
    /// As [`ClientCore::acquire_batch`].
    pub fn submit_batch(
        &mut self,
        items: &[&[u8]],
        capacity: usize,
    ) -> Result<Sequence, AcquireError> {
        let longest = items.iter().map(|item| item.len()).max().unwrap_or(0);
        let grant = self.place_batch(items.len(), capacity.max(longest))?;
        let batch = self.batch_words(&grant)?;
        let (pairs, last) = items.as_chunks::<2>();
        let lengths = &batch.words[HEADER..];
        for (word, [even, odd]) in lengths.iter().zip(pairs) {
            let both = (odd.len() as u64) << 32 | even.len() as u64;
            word.store(both, Ordering::Relaxed);
        }
        if let ([item], Some(word)) = (last, lengths.get(pairs.len())) {
            word.store(item.len() as u64, Ordering::Relaxed);
        }
        let rooms = &batch.words[grant.shape.first()..];
        let rooms = rooms.chunks_exact(grant.shape.room_words());
        for (room, item) in rooms.zip(items) {
            match <[u8; 8]>::try_from(*item) {
                Ok(word) => room[0].store(u64::from_le_bytes(word), Ordering::Relaxed),
                Err(_) => fill_words(room, item),
            }
        }
        batch.words[1].store(0, Ordering::Relaxed);
        batch.words[0].store(grant.shape.word(), Ordering::Relaxed);
        Ok(self.complete_batch(&grant))
    }

    /// Whether `sequence` is a batch that is in flight, or was not released.
    pub fn is_batch(&self, sequence: Sequence) -> bool {
        self.batch_at(sequence).is_some()
    }

    /// Items of a batch in flight that were answered, by the server's account; none if
    /// there is no such batch.
    pub fn batch_progress(&self, sequence: Sequence) -> Option<usize> {
        let (offset, shape) = self.batch_at(sequence)?;
        let words = BatchWords::new(self.segment().payload(), offset, shape);
        words.ok().map(|words| words.done())
    }

    /// A batch that has come to its end: whole, or by the death of its server
    /// ([`Batch::after_death`]). None if it has not, or `sequence` is no batch's, or ended
    /// otherwise: [`ClientCore::poll`] says how.
    pub fn batch(&self, sequence: Sequence) -> Option<Batch> {
        let (offset, shape) = self.batch_at(sequence)?;
        let words = BatchWords::new(self.segment().payload(), offset, shape).ok()?;
        let done = match self.records[(sequence & self.mask) as usize].phase {
            Phase::Done(Poll::Response) => shape.items,
            Phase::Done(Poll::Cancelled) => words.done() as u32,
            _ => return None,
        };
        words.prefetch();
        Some(Batch {
            offset,
            shape,
            done,
            maybe_modified: false,
        })
    }
}
