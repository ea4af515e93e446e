//! Bytes of one connection to another node: frames in, frames out. Values; the
//! loop moves the buffers in and out of the ring.
//!
//! Small frames are cut out of a window that one receive fills. The body of a
//! large frame is received straight into the buffer that becomes the staged
//! update, a block of the node's pool, so bulk data is touched once by the kernel and
//! once by the checksum, in memory that is there already.
//!
//! I1. While a receive is in flight the reader owns no buffer and gives no frame.
//! I2. A body is reserved only after its length passed `parse_header`.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::limits;
use crate::sys::buffer::{Buffer, Pool};
use crate::sys::ring::{MAX_PARTS, SendBuf};
use crate::units::MIB;
use crate::wire::{HEADER_BYTES, Header, WireError, check_body, parse_header};

/// Size of the window that small frames are cut from, in bytes.
const WINDOW: usize = 64 * 1024;

/// Shortest body that a block of the pool is taken for, in bytes.
const BULK: usize = 64 * 1024;

/// A header and its body, or what is wrong with the body.
pub(crate) type Framed = (Header, Result<Buffer, WireError>);

/// Cuts a stream into frames.
#[derive(Debug)]
pub(crate) struct FrameReader {
    pool: Pool,
    window: Buffer,
    /// First byte of the window that was not taken yet.
    start: usize,
    body: Option<Partial>,
}

#[derive(Debug)]
struct Partial {
    header: Header,
    bytes: Buffer,
}

impl FrameReader {
    pub(crate) fn new(pool: Pool) -> Self {
        Self {
            pool,
            window: Vec::with_capacity(WINDOW).into(),
            start: 0,
            body: None,
        }
    }

    /// Bytes of a body that are still to come; 0 between frames.
    pub(crate) fn missing(&self) -> usize {
        let rest = |body: &Partial| body.header.body_len as usize - body.bytes.len();
        self.body.as_ref().map_or(0, rest)
    }

    /// Whether a frame's body has come in part.
    pub(crate) fn inside_body(&self) -> bool {
        self.body.is_some()
    }

    /// Whether the stream stands inside a frame: an end here is a cut.
    pub(crate) fn inside_frame(&self) -> bool {
        self.body.is_some() || self.start != self.window.len()
    }

    /// Takes the buffer that the next receive appends to, and the length up to which.
    pub(crate) fn take_buffer(&mut self) -> (Buffer, usize) {
        if let Some(body) = &mut self.body {
            let len = body.header.body_len as usize;
            // The next header as well: the body behind it then has a buffer of its own
            // from its first byte on.
            let upto = body.bytes.capacity().min(len + HEADER_BYTES);
            return (std::mem::take(&mut body.bytes), upto);
        }
        self.window.drain_front(self.start);
        self.start = 0;
        (std::mem::take(&mut self.window), WINDOW)
    }

    /// Gives the buffer back with what was received in it.
    pub(crate) fn give_back(&mut self, buffer: Buffer) {
        match &mut self.body {
            Some(body) => {
                let len = body.header.body_len as usize;
                body.bytes = buffer;
                if body.bytes.len() > len {
                    self.window.drain_front(self.start);
                    self.start = 0;
                    self.window.extend_from_slice(&body.bytes[len..]);
                    body.bytes.truncate(len);
                }
            }
            None => self.window = buffer,
        }
    }

    /// The next whole frame; its body, or why that is damaged, which leaves the rest
    /// of the stream as good as it was.
    ///
    /// # Errors
    /// What makes the rest of the stream meaningless.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Framed>, WireError> {
        if self.body.is_none() {
            let Some(raw) = self.window[self.start..].first_chunk::<HEADER_BYTES>() else {
                return Ok(None);
            };
            let header = parse_header(raw)?;
            self.start += HEADER_BYTES;
            let len = header.body_len as usize;
            let block = (len >= BULK).then(|| self.pool.take()).flatten();
            let mut bytes = match block {
                Some(block) => Buffer::Block(block),
                None => Vec::with_capacity(len + HEADER_BYTES).into(),
            };
            let at_hand = len.min(self.window.len() - self.start);
            bytes.extend_from_slice(&self.window[self.start..self.start + at_hand]);
            self.start += at_hand;
            self.body = Some(Partial { header, bytes });
        }
        match self.body.take() {
            Some(body) if body.bytes.len() == body.header.body_len as usize => {
                let whole = check_body(&body.header, &body.bytes).map(|()| body.bytes);
                Ok(Some((body.header, whole)))
            }
            partial => {
                self.body = partial;
                Ok(None)
            }
        }
    }
}

/// What waits to be sent on one connection, in order.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<SendBuf>,
    bytes: usize,
}

/// Bytes of several frames that one send carries: each send costs a wake-up of the one
/// who copies, and one of the one who has the next made.
const AT_ONCE: usize = MIB as usize;

/// Small frames are joined up to this length, in bytes, so that one send carries them.
const JOIN: usize = 16 * 1024;

impl Outbox {
    /// Whether producers should go on.
    pub(crate) fn has_room(&self) -> bool {
        self.bytes < limits::MAX_SEND_QUEUE as usize
    }

    /// Whether answers pile up beyond what producers would ever queue.
    pub(crate) fn is_flooded(&self) -> bool {
        self.bytes > 2 * limits::MAX_SEND_QUEUE as usize
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(crate) fn push(&mut self, frame: Vec<u8>) {
        self.bytes += frame.len();
        match self.queue.back_mut() {
            Some(SendBuf::Owned(last)) if last.len() + frame.len() <= JOIN => last.extend(frame),
            _ => self.queue.push_back(SendBuf::Owned(frame)),
        }
    }

    pub(crate) fn push_shared(&mut self, frame: Arc<[u8]>) {
        self.bytes += frame.len();
        self.queue.push_back(SendBuf::Shared(frame));
    }

    /// Whether what waits is worth a send of its own while more is made.
    pub(crate) fn is_bulk(&self) -> bool {
        self.bytes >= BULK
    }

    /// Takes what the next send carries, in order: at least one buffer, and as many as
    /// together are no longer than [`AT_ONCE`].
    pub(crate) fn take(&mut self) -> Option<Vec<SendBuf>> {
        let mut taken = vec![self.queue.pop_front()?];
        let mut bytes = taken[0].as_ref().len();
        while let Some(next) = self.queue.front()
            && taken.len() < MAX_PARTS
            && bytes + next.as_ref().len() <= AT_ONCE
        {
            bytes += next.as_ref().len();
            taken.extend(self.queue.pop_front());
        }
        self.bytes -= bytes;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{FrameBuilder, Kind};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sends_carry_what_was_queued_in_order(
            lens in proptest::collection::vec((1usize..400_000, any::<bool>()), 1..40),
        ) {
            let mut outbox = Outbox::default();
            let (mut queued, mut sent) = (Vec::new(), Vec::new());
            for (number, (len, shared)) in lens.into_iter().enumerate() {
                let frame = vec![number as u8; len];
                queued.extend_from_slice(&frame);
                if shared {
                    outbox.push_shared(frame.into());
                } else {
                    outbox.push(frame);
                }
            }
            while let Some(bufs) = outbox.take() {
                let bytes: usize = bufs.iter().map(|buf| buf.as_ref().len()).sum();
                prop_assert!(bufs.len() == 1 || bytes <= AT_ONCE);
                prop_assert!(bufs.len() <= MAX_PARTS);
                bufs.iter().for_each(|buf| sent.extend_from_slice(buf.as_ref()));
            }
            prop_assert!(outbox.is_empty() && outbox.has_room() && !outbox.is_bulk());
            prop_assert_eq!(sent, queued);
        }

        #[test]
        fn frames_survive_any_cut(
            lens in proptest::collection::vec(0usize..100_000, 1..5),
            cuts in proptest::collection::vec(1usize..70_000, 1..50),
        ) {
            let bodies: Vec<Vec<u8>> = lens.iter().map(|len| vec![*len as u8; *len]).collect();
            let stream: Vec<u8> = bodies
                .iter()
                .flat_map(|body| {
                    let mut frame = FrameBuilder::new(Kind::UpdateChunk, 0, 1, 1);
                    frame.put(body);
                    frame.finish()
                })
                .collect();
            let mut reader = FrameReader::new(Pool::new(limits::MAX_BODY, 32 << 20));
            let mut seen = Vec::new();
            let (mut at, mut cut) = (0, cuts.iter().cycle());
            while at < stream.len() {
                let (mut buffer, upto) = reader.take_buffer();
                let n = (*cut.next().unwrap()).min(upto - buffer.len()).min(stream.len() - at);
                buffer.extend_from_slice(&stream[at..at + n]);
                reader.give_back(buffer);
                at += n;
                while let Some((_, body)) = reader.next_frame().unwrap() {
                    seen.push(body.unwrap().to_vec());
                }
            }
            prop_assert_eq!(seen, bodies);
            prop_assert!(!reader.inside_frame());
        }
    }
}
