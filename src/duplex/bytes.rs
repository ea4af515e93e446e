//! The bytes of a frame, wherever they lie: in its slot or in the payload.

use std::sync::atomic::Ordering;

use super::layout::{INLINE_BYTES, slot};
use super::memory::Window;
use super::segment::Segment;
use crate::shm::{Line, Lines};
use crate::units::{OutOfRange, checked_range};

/// Bytes that are copied at a time by [`FrameBytes::update_chunks`].
const CHUNK: usize = 16 << 10;

/// Where a frame's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the slot of this index.
    Slot(usize),
    /// At this offset of the payload.
    Payload(u64),
}

/// Where a frame's bytes lie, without holding on to the memory.
#[derive(Clone, Copy, Debug)]
pub struct FramePlace {
    pub(super) place: Place,
    pub(super) len: u32,
}

impl FramePlace {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Segment {
    /// The bytes of a frame of this segment; those of another one's are bytes of
    /// this one nevertheless, and within it.
    #[inline]
    pub fn frame_bytes(&self, frame: FramePlace) -> FrameBytes<'_> {
        FrameBytes {
            slots: self.slots(),
            payload: self.payload(),
            place: frame.place,
            len: frame.len,
        }
    }
}

/// The bytes of one frame: copied in and out, never borrowed, since the other side
/// could change them at any time.
#[derive(Clone, Copy, Debug)]
pub struct FrameBytes<'a> {
    pub(super) slots: &'a Lines,
    pub(super) payload: &'a Window,
    pub(super) place: Place,
    pub(super) len: u32,
}

impl FrameBytes<'_> {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where they begin in the payload; none for a frame that lies in its slot.
    pub fn payload_offset(&self) -> Option<u64> {
        match self.place {
            Place::Slot(_) => None,
            Place::Payload(offset) => Some(offset),
        }
    }

    /// Copies `out.len()` bytes at `offset` into `out`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the frame.
    #[inline]
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), OutOfRange> {
        checked_range(offset as u64, out.len() as u64, u64::from(self.len))?;
        match self.place {
            Place::Slot(index) => {
                read_inline(self.slots.line(index), offset, out);
                Ok(())
            }
            Place::Payload(start) => self.payload.read(start + offset as u64, out),
        }
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the frame.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), OutOfRange> {
        let out_of_range = OutOfRange {
            offset: offset as u64,
            len: bytes.len() as u64,
            size: u64::from(self.len),
        };
        checked_range(out_of_range.offset, out_of_range.len, out_of_range.size)?;
        match self.place {
            Place::Slot(index) => {
                write_inline(self.slots.line(index), offset, bytes);
                Ok(())
            }
            Place::Payload(start) => self
                .payload
                .write(start + offset as u64, bytes)
                .map_err(|_| out_of_range),
        }
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len as usize];
        // The range is the frame's own, which was checked against the payload.
        let _ = self.read(0, &mut out);
        out
    }

    /// Changes all bytes through a buffer of 16 KiB: each chunk is copied out, given
    /// to `update` with its offset, and copied back.
    pub fn update_chunks(&self, mut update: impl FnMut(usize, &mut [u8])) {
        let mut buffer = [0; CHUNK];
        let mut at = 0;
        while at < self.len() {
            let take = CHUNK.min(self.len() - at);
            let chunk = &mut buffer[..take];
            if self.read(at, chunk).is_err() {
                return;
            }
            update(at, chunk);
            if self.write(at, chunk).is_err() {
                return;
            }
            at += take;
        }
    }
}

/// Stores `bytes` as the first inline bytes; what follows in the last word is zero.
/// The words beside the state come last: they are in the line that the other side
/// polls, which is then taken from it once, for them and the state together.
#[inline]
pub(super) fn fill_inline(line: &Line, bytes: &[u8]) {
    let words = &line.0[slot::INLINE..];
    let (whole, rest) = bytes.as_chunks::<8>();
    let whole = &whole[..whole.len().min(words.len())];
    if !rest.is_empty()
        && let Some(word) = words.get(whole.len())
    {
        let mut last = [0; 8];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        word.store(u64::from_le_bytes(last), Ordering::Relaxed);
    }
    for (word, chunk) in words.iter().zip(whole).rev() {
        word.store(u64::from_le_bytes(*chunk), Ordering::Relaxed);
    }
}

/// Reads inline bytes; the caller has checked the range against the frame.
#[inline]
fn read_inline(line: &Line, offset: usize, out: &mut [u8]) {
    let words = &line.0[slot::INLINE..];
    if offset == 0 {
        let (whole, rest) = out.as_chunks_mut::<8>();
        for (word, chunk) in words.iter().zip(whole.iter_mut()) {
            *chunk = word.load(Ordering::Relaxed).to_le_bytes();
        }
        if !rest.is_empty()
            && let Some(word) = words.get(whole.len())
        {
            let last = word.load(Ordering::Relaxed).to_le_bytes();
            for (to, from) in rest.iter_mut().zip(last) {
                *to = from;
            }
        }
        return;
    }
    for (at, byte) in out.iter_mut().enumerate() {
        let at = offset + at;
        *byte = words[at / 8].load(Ordering::Relaxed).to_le_bytes()[at % 8];
    }
}

/// Writes inline bytes; the caller has checked the range against the frame.
#[inline]
fn write_inline(line: &Line, offset: usize, bytes: &[u8]) {
    if offset == 0 && bytes.len().is_multiple_of(8) {
        fill_inline(line, bytes);
        return;
    }
    let mut all = [0; INLINE_BYTES];
    read_inline(line, 0, &mut all);
    all[offset..offset + bytes.len()].copy_from_slice(bytes);
    fill_inline(line, &all);
}
