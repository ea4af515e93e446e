//! The bytes of a frame, wherever they lie: in its slot or in the payload.

use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::slot;
use super::memory::Window;
use super::segment::Segment;
use crate::shm::{Line, Lines};
use crate::units::{OutOfRange, checked_range};

/// Bytes that are copied at a time by [`FrameBytes::update_chunks`].
const CHUNK: usize = 16 << 10;
/// The same where all bytes of the frame are few: the buffer costs as much as they do.
const SMALL_CHUNK: usize = 128;

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
        FrameBytes::new(self.slots(), self.payload(), frame.place, frame.len)
    }
}

/// What a frame's bytes are copied from and to.
#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    /// Word by word.
    Words(&'a [AtomicU64]),
    /// As a whole, from this offset of the payload on.
    Payload(&'a Window, u64),
}

/// The bytes of one frame: copied in and out, never borrowed, since the other side
/// could change them at any time.
#[derive(Clone, Copy, Debug)]
pub struct FrameBytes<'a> {
    source: Source<'a>,
    len: u32,
    /// Where they begin in the payload; [`NOWHERE`] if they do not lie there.
    payload_offset: u64,
}

/// No offset of a payload.
const NOWHERE: u64 = u64::MAX;

impl<'a> FrameBytes<'a> {
    /// The bytes at `place` of a channel; its table and payload are given.
    #[inline]
    pub(super) fn new(slots: &'a Lines, payload: &'a Window, place: Place, len: u32) -> Self {
        match place {
            Place::Slot(index) => FrameBytes::of_slot(slots.line(index), len),
            Place::Payload(offset) => FrameBytes {
                source: Source::Payload(payload, offset),
                len,
                payload_offset: offset,
            },
        }
    }

    /// The first `len` inline bytes of a slot; the caller knows that it has so many.
    #[inline]
    pub(super) fn of_slot(line: &'a Line, len: u32) -> Self {
        FrameBytes {
            source: Source::Words(&line.0[slot::INLINE..]),
            len,
            payload_offset: NOWHERE,
        }
    }

    /// The first `len` bytes of `words`, which lie at `payload_offset`; as many as they
    /// have at most.
    #[inline]
    pub(super) fn of_words(words: &'a [AtomicU64], len: u32, payload_offset: u64) -> Self {
        FrameBytes {
            len: len.min(u32::try_from(8 * words.len()).unwrap_or(u32::MAX)),
            source: Source::Words(words),
            payload_offset,
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `len` of them, or all if there are not so many.
    #[inline]
    #[must_use]
    pub fn first(&self, len: usize) -> FrameBytes<'a> {
        FrameBytes {
            len: self.len.min(u32::try_from(len).unwrap_or(u32::MAX)),
            ..*self
        }
    }

    /// Where they begin in the payload; none for a frame that lies in its slot.
    pub fn payload_offset(&self) -> Option<u64> {
        Some(self.payload_offset).filter(|at| *at != NOWHERE)
    }

    /// Copies `out.len()` bytes at `offset` into `out`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the frame.
    #[inline]
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), OutOfRange> {
        checked_range(offset as u64, out.len() as u64, u64::from(self.len))?;
        match self.source {
            Source::Words(words) => {
                read_words(words, offset, out);
                Ok(())
            }
            Source::Payload(payload, start) => payload.read(start + offset as u64, out),
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
        match self.source {
            Source::Words(words) => {
                write_words(words, offset, bytes);
                Ok(())
            }
            Source::Payload(payload, start) => payload
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
        if self.len() <= SMALL_CHUNK {
            self.update_by(&mut [0; SMALL_CHUNK], &mut update);
        } else {
            self.update_by(&mut [0; CHUNK], &mut update);
        }
    }

    #[inline]
    fn update_by(&self, buffer: &mut [u8], update: &mut impl FnMut(usize, &mut [u8])) {
        let mut at = 0;
        while at < self.len() {
            let take = buffer.len().min(self.len() - at);
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
#[inline]
pub(super) fn fill_inline(line: &Line, bytes: &[u8]) {
    fill_words(&line.0[slot::INLINE..], bytes);
}

/// Stores `bytes` as the first bytes of `words`; what follows in the last word is zero.
/// The first words come last: of a slot they are in the line that the other side polls,
/// which is then taken from it once, for them and the state together.
#[inline]
pub(super) fn fill_words(words: &[AtomicU64], bytes: &[u8]) {
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

/// As much of `text` as `most` bytes hold, in whole characters.
pub(super) fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev();
    let end = end.into_iter().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

/// Reads bytes of `words`; the caller has checked the range against the frame.
#[inline]
fn read_words(words: &[AtomicU64], offset: usize, out: &mut [u8]) {
    if offset.is_multiple_of(8) {
        let words = &words[offset / 8..];
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

/// Writes bytes of `words` and leaves the others as they are; the caller has checked
/// the range against the frame.
#[inline]
fn write_words(words: &[AtomicU64], offset: usize, bytes: &[u8]) {
    if offset.is_multiple_of(8) && bytes.len().is_multiple_of(8) {
        fill_words(&words[offset / 8..], bytes);
        return;
    }
    let (first, end) = (offset / 8, (offset + bytes.len()).div_ceil(8));
    for (index, word) in words.iter().enumerate().take(end).skip(first).rev() {
        let mut value = word.load(Ordering::Relaxed).to_le_bytes();
        for (at, to) in value.iter_mut().enumerate() {
            let from = (8 * index + at).checked_sub(offset);
            if let Some(byte) = from.and_then(|from| bytes.get(from)) {
                *to = *byte;
            }
        }
        word.store(u64::from_le_bytes(value), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn words_are_the_bytes_of_a_vector(
            steps in prop::collection::vec(
                (0..60usize, prop::collection::vec(any::<u8>(), 0..60)), 1..20),
            len in 0..64u32,
        ) {
            let words: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(0)).collect();
            let bytes = FrameBytes::of_words(&words, len, 0);
            let mut model = vec![0u8; len as usize];
            for (offset, new) in steps {
                let written = bytes.write(offset, &new);
                match model.get_mut(offset..offset + new.len()) {
                    Some(place) => {
                        place.copy_from_slice(&new);
                        prop_assert!(written.is_ok());
                        let mut out = vec![1; new.len()];
                        prop_assert!(bytes.read(offset, &mut out).is_ok());
                        prop_assert_eq!(out, new);
                    }
                    None => prop_assert!(written.is_err()),
                }
                prop_assert_eq!(&bytes.to_vec(), &model);
            }
            bytes.update_chunks(|_, chunk| chunk.iter_mut().for_each(|byte| *byte ^= 1));
            model.iter_mut().for_each(|byte| *byte ^= 1);
            prop_assert_eq!(bytes.to_vec(), model);
            let beyond = words.iter().skip((len as usize).div_ceil(8));
            prop_assert!(beyond.into_iter().all(|word| word.load(Ordering::Relaxed) == 0));
        }
    }
}
