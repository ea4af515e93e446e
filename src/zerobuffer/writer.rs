//! The end that attaches to a buffer and writes into it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::error::{Side, ZeroBufferError};
use super::layout::*;
use super::reader::open_semaphores;
use super::ring::{Damage, Placement, last_sequence, place};
use super::segment::Segment;
use super::wait::{Peer, Wait, Waiter, next_look};
use crate::limits::{ZEROBUFFER_ATTACH_POLL_MS, ZEROBUFFER_CHECK_FRAMES};
use crate::shm::Semaphore;
use crate::shm::WriteError;
use crate::sys::process::{deadline_in, process_id};
use crate::units::checked_range;

/// Writes frames into a buffer that a [`Reader`](super::Reader), here or in another
/// process, owns. There is one writer at a time.
#[derive(Debug)]
pub struct Writer {
    segment: Segment,
    written: Semaphore,
    released: Semaphore,
    waiter: Waiter,
    reader: Peer,
    pos: u64,
    count: u64,
    sequence: u64,
    unchecked: u64,
    damage: Option<Damage>,
    stop: Arc<AtomicBool>,
}

impl Writer {
    /// Joins the buffer `name`.
    ///
    /// # Errors
    /// [`ZeroBufferError::NoBuffer`] if its reader has not made it;
    /// [`ZeroBufferError::PeerGone`] if its reader has gone;
    /// [`ZeroBufferError::WriterTaken`] if a living process writes into it;
    /// [`ZeroBufferError::Foreign`] if it is no buffer of version 1;
    /// [`ZeroBufferError::Name`], [`ZeroBufferError::Sys`].
    pub fn attach(name: &str, wait: Wait) -> Result<Writer, ZeroBufferError> {
        Writer::attach_as(&BufferName::new(name)?, wait)
    }

    /// Joins the buffer `name` once there is one that can be joined, for at most
    /// `timeout`.
    ///
    /// # Errors
    /// As for [`Writer::attach`], when the time is over; at once for what waiting does
    /// not change.
    pub fn attach_within(
        name: &str,
        wait: Wait,
        timeout: Duration,
    ) -> Result<Writer, ZeroBufferError> {
        let name = BufferName::new(name)?;
        let deadline = deadline_in(timeout);
        loop {
            let refused = match Writer::attach_as(&name, wait) {
                Err(
                    error @ (ZeroBufferError::NoBuffer
                    | ZeroBufferError::PeerGone { .. }
                    | ZeroBufferError::WriterTaken { .. }),
                ) => error,
                other => return other,
            };
            if deadline <= Instant::now() {
                return Err(refused);
            }
            std::thread::sleep(Duration::from_millis(ZEROBUFFER_ATTACH_POLL_MS));
        }
    }

    pub(super) fn attach_as(name: &BufferName, wait: Wait) -> Result<Writer, ZeroBufferError> {
        let segment = Segment::open(name)?;
        let mut reader = Peer::new(Side::Reader, READER_PID);
        match reader.look(&segment, true)? {
            // Its maker has not published itself yet, or has left.
            None => return Err(ZeroBufferError::NoBuffer),
            Some(Err(gone)) => return Err(reader.error(gone)),
            Some(Ok(())) if !segment.is_alive(READER_PID) => {
                return Err(reader.error(super::Gone::Died));
            }
            Some(Ok(())) => {}
        }
        let (written, released) = open_semaphores(name)?;
        if !segment.is_linked(name) {
            // Replaced meanwhile: the semaphores may be the new buffer's.
            return Err(ZeroBufferError::NoBuffer);
        }
        let before = segment.word(WRITER_PID);
        if segment.is_alive(WRITER_PID) {
            return Err(ZeroBufferError::WriterTaken { pid: before });
        }
        segment
            .replace_word(WRITER_PID, before, u64::from(process_id().cast_unsigned()))
            .map_err(|pid| ZeroBufferError::WriterTaken { pid })?;
        let mut writer = Writer {
            segment,
            written,
            released,
            waiter: Waiter::new(wait),
            reader,
            pos: 0,
            count: 0,
            sequence: 1,
            unchecked: 0,
            damage: None,
            stop: Arc::default(),
        };
        writer.resume()?;
        Ok(writer)
    }

    /// Goes on where the writer before stopped: readers of version 1 want its
    /// numbers to go on.
    fn resume(&mut self) -> Result<(), ZeroBufferError> {
        let size = self.segment.blocks.payload;
        let pos = self.segment.word(WRITE_POS);
        if pos > size {
            return Err(self.damaged(Damage::Position {
                found: pos,
                expected: 0,
                size,
            }));
        }
        self.count = self.segment.word(WRITTEN_COUNT);
        // Other implementations leave the position at the end of a full lap there.
        self.pos = if pos == size { 0 } else { pos };
        if self.count > 0 {
            let last = last_sequence(size, self.pos, |at| self.segment.header(at));
            self.sequence = last.map_or(1, |last| last.wrapping_add(1));
        }
        Ok(())
    }

    fn damaged(&mut self, damage: Damage) -> ZeroBufferError {
        self.damage = Some(damage);
        damage.into()
    }

    /// Writes the metadata, once in the buffer's life, whoever writes.
    ///
    /// # Errors
    /// [`ZeroBufferError::MetadataTwice`]; [`ZeroBufferError::MetadataTooLong`] with
    /// both lengths.
    pub fn set_metadata(&mut self, bytes: &[u8]) -> Result<(), ZeroBufferError> {
        self.segment.set_metadata(bytes)
    }

    /// Longest data of a frame, in bytes.
    pub fn max_frame(&self) -> u64 {
        self.segment.blocks.max_frame()
    }

    /// Number of the next frame.
    pub fn next_sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether all that was written was read and given back.
    pub fn is_drained(&self) -> bool {
        self.segment.free() == self.segment.blocks.payload
    }

    /// Whether the reader's process lives and has not left.
    ///
    /// # Errors
    /// [`ZeroBufferError::Damaged`].
    pub fn is_reader_connected(&mut self) -> Result<bool, ZeroBufferError> {
        Ok(matches!(
            self.reader.look(&self.segment, true)?,
            Some(Ok(()))
        ))
    }

    /// Writes a frame and answers with its number. Waits for room for at most
    /// `timeout`.
    ///
    /// # Errors
    /// [`ZeroBufferError::TooLarge`] and [`ZeroBufferError::EmptyFrame`] at once;
    /// [`ZeroBufferError::Full`]; [`ZeroBufferError::PeerGone`]: within 20 ms of the
    /// reader's death where there is no room, within 64 frames where there is;
    /// [`ZeroBufferError::Damaged`], then at every later call. Nothing was written
    /// then.
    pub fn write(&mut self, bytes: &[u8], timeout: Duration) -> Result<u64, ZeroBufferError> {
        let len = bytes.len() as u64;
        let place = self.room_for(len, timeout)?;
        self.fill(&place, 0, bytes);
        self.publish(&place, len)
    }

    /// Room in the ring for a frame of `len` bytes, to be filled in place. The reader
    /// sees it after [`Reserved::commit`]; dropped before, it never was.
    ///
    /// # Errors
    /// As for [`Writer::write`].
    pub fn reserve(
        &mut self,
        len: u64,
        timeout: Duration,
    ) -> Result<Reserved<'_>, ZeroBufferError> {
        let place = self.room_for(len, timeout)?;
        Ok(Reserved {
            writer: self,
            place,
            len,
        })
    }

    /// The place for a frame of `len` bytes, free.
    pub(super) fn room_for(
        &mut self,
        len: u64,
        timeout: Duration,
    ) -> Result<Placement, ZeroBufferError> {
        if let Some(damage) = self.damage {
            return Err(damage.into());
        }
        if len == 0 {
            return Err(ZeroBufferError::EmptyFrame);
        }
        let max = self.max_frame();
        let place = place(self.segment.blocks.payload, self.pos, len)
            .ok_or(ZeroBufferError::TooLarge { len, max })?;
        self.unchecked += 1;
        if self.segment.word(READER_PID) == 0 || self.unchecked >= ZEROBUFFER_CHECK_FRAMES {
            self.check_reader(true)?;
        }
        if self.free()? < place.need {
            self.wait_for_room(&place, len, deadline_in(timeout))?;
        }
        Ok(place)
    }

    fn free(&mut self) -> Result<u64, ZeroBufferError> {
        let (free, size) = (self.segment.free(), self.segment.blocks.payload);
        if free > size {
            return Err(self.damaged(Damage::FreeBytes {
                free,
                held: 0,
                size,
            }));
        }
        Ok(free)
    }

    fn check_reader(&mut self, deeply: bool) -> Result<(), ZeroBufferError> {
        self.unchecked = 0;
        match self.reader.look(&self.segment, deeply)? {
            Some(Err(gone)) => Err(self.reader.error(gone)),
            _ => Ok(()),
        }
    }

    #[cold]
    fn wait_for_room(
        &mut self,
        place: &Placement,
        len: u64,
        deadline: Instant,
    ) -> Result<(), ZeroBufferError> {
        let mut deeply = false;
        loop {
            // Old posts first: there is one for each frame released since the last
            // wait. What is released after this look is posted after it.
            self.released.take_all();
            let free = self.free()?;
            if free >= place.need {
                return Ok(());
            }
            self.check_reader(deeply)?;
            if self.stop.load(Ordering::Acquire) {
                return Err(ZeroBufferError::Stopped);
            }
            if deadline <= Instant::now() {
                if deeply {
                    return Err(ZeroBufferError::Full { len, free });
                }
                deeply = true;
                continue;
            }
            deeply = !self.waiter.acquire(&self.released, next_look(deadline))?;
        }
    }

    /// Whether the reader said that it leaves; cheap.
    pub(super) fn has_reader_left(&self) -> bool {
        self.segment.word(READER_PID) == 0
    }

    /// The process that reads.
    pub(super) fn reader_pid(&self) -> u64 {
        self.reader.pid()
    }

    /// Copies the first bytes of a frame that has its place and is not published yet.
    /// The caller has checked the length.
    pub(super) fn read_back(&self, place: &Placement, out: &mut [u8]) {
        self.segment.read(place.at + HEADER_BYTES, out);
    }

    /// Copies into a frame that has its place and is not published yet. The caller
    /// has checked the range.
    pub(super) fn fill(&self, place: &Placement, offset: u64, bytes: &[u8]) {
        self.segment.write(place.at + HEADER_BYTES + offset, bytes);
    }

    pub(super) fn ptr(&self, place: &Placement) -> *mut u8 {
        self.segment.ptr(place.at + HEADER_BYTES)
    }

    /// Publishes a frame of `len` bytes at the place it has.
    pub(super) fn publish(&mut self, place: &Placement, len: u64) -> Result<u64, ZeroBufferError> {
        let segment = &self.segment;
        if place.restart {
            // Nothing is unread and nothing held, so the reader does not move.
            segment.set_word(READ_POS, 0);
        }
        if let Some(at) = place.marker {
            segment.set_header(at, FrameHeader::WRAP);
            self.count = self.count.wrapping_add(1);
        }
        let sequence = self.sequence;
        segment.set_header(
            place.at,
            FrameHeader {
                size: len,
                sequence,
            },
        );
        self.pos = place.end;
        self.count = self.count.wrapping_add(1);
        self.sequence = sequence.wrapping_add(1);
        segment.set_word(WRITE_POS, self.pos);
        segment.take(place.takes);
        segment.set_word(WRITTEN_COUNT, self.count);
        self.written
            .post()
            .map_err(super::error::sys("waking the reader"))?;
        Ok(sequence)
    }

    /// Ends waiting for room from another thread once the flag is raised and the
    /// semaphore of released frames posted, or within 20 ms.
    pub(super) fn stop_by(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let own = u64::from(process_id().cast_unsigned());
        // Not if the reader, or a successor after a fork, has written another one.
        // Nothing is posted: readers of version 1 take every post for a frame.
        let _ = self.segment.replace_word(WRITER_PID, own, 0);
    }
}

/// Room for a frame, in the ring.
#[derive(Debug)]
pub struct Reserved<'a> {
    writer: &'a mut Writer,
    place: Placement,
    len: u64,
}

impl Reserved<'_> {
    /// Bytes of data.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: version 1 has no empty frames.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `bytes` to `offset` of the data.
    ///
    /// # Errors
    /// [`WriteError`] if they do not lie within it.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let range = checked_range(offset, bytes.len() as u64, self.len)?;
        self.writer.fill(&self.place, range.start, bytes);
        Ok(())
    }

    /// The first byte, [`Reserved::len`] of them valid while this lives, for those who
    /// know what they may do with memory that another process can write. What is not
    /// stored to holds what older frames left there.
    pub fn as_ptr(&mut self) -> *mut u8 {
        self.writer.ptr(&self.place)
    }

    /// Number that the frame will have.
    pub fn sequence(&self) -> u64 {
        self.writer.sequence
    }

    /// Hands it to the reader and answers with its number.
    ///
    /// # Errors
    /// [`ZeroBufferError::Sys`] if the reader could not be woken; it has the frame.
    pub fn commit(self) -> Result<u64, ZeroBufferError> {
        self.writer.publish(&self.place, self.len)
    }
}
