//! Making frames: a header whose lengths and checksums are filled in last.

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::checksum::{Crc32c, crc32c};
use crate::limits::{MAX_BODY, MAX_CHUNK, MAX_EXTENTS_PER_FRAME};

use super::frame::{EXTENT_HEADER_BYTES, HEADER_BYTES, Kind, MAGIC, RawHeader, VERSION};

/// A frame under construction. Memory: the frame, at most `MAX_BODY` + 32 bytes.
#[derive(Clone, Debug)]
pub struct FrameBuilder {
    bytes: Vec<u8>,
    kind: Kind,
    flags: u16,
    region: u32,
    epoch: u64,
    data: u64,
    extents: u64,
    /// Checksum of the body up to `summed`.
    sum: Crc32c,
    summed: usize,
}

/// Bytes copied between two updates of the checksum: it reads them from the first-level
/// cache, not from where the whole frame ends up.
const HOT: usize = 8 * 1024;

impl FrameBuilder {
    /// Begins a frame of `kind` about the region with handle `region`.
    pub fn new(kind: Kind, flags: u16, region: u32, epoch: u64) -> Self {
        Self::with_capacity(kind, flags, region, epoch, 64)
    }

    /// The same, with room for a body of `body_len` bytes.
    pub fn with_capacity(kind: Kind, flags: u16, region: u32, epoch: u64, body_len: usize) -> Self {
        Self::reusing(
            Vec::with_capacity(HEADER_BYTES + body_len),
            (kind, flags, region, epoch),
        )
    }

    /// The same in the memory of a frame that is not needed any more.
    pub fn reusing(
        mut bytes: Vec<u8>,
        (kind, flags, region, epoch): (Kind, u16, u32, u64),
    ) -> Self {
        bytes.clear();
        bytes.resize(HEADER_BYTES, 0);
        Self {
            bytes,
            kind,
            flags,
            region,
            epoch,
            data: 0,
            extents: 0,
            sum: Crc32c::new(),
            summed: HEADER_BYTES,
        }
    }

    /// Appends `bytes` to the body.
    pub fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// How many bytes of extents still fit; 0 once the frame has all the extents it may hold.
    pub fn room(&self) -> u64 {
        if self.extents >= MAX_EXTENTS_PER_FRAME {
            0
        } else {
            MAX_CHUNK - self.data
        }
    }

    /// Appends an extent of `len` bytes that `fill` writes.
    ///
    /// # Panics
    /// If `len` is 0 or greater than [`room`](Self::room).
    pub fn extent_with(&mut self, offset: u64, len: u64, fill: impl FnOnce(&mut [u8])) {
        self.extent_header(offset, len);
        let at = self.bytes.len();
        self.bytes.resize(at + len as usize, 0);
        fill(&mut self.bytes[at..]);
    }

    /// Appends an extent with the content `bytes`.
    ///
    /// # Panics
    /// As [`extent_with`](Self::extent_with).
    pub fn extent(&mut self, offset: u64, bytes: &[u8]) {
        self.extent_header(offset, bytes.len() as u64);
        for piece in bytes.chunks(HOT) {
            self.put(piece);
            if piece.len() == HOT {
                self.sum_up();
            }
        }
    }

    fn sum_up(&mut self) {
        self.sum.update(&self.bytes[self.summed..]);
        self.summed = self.bytes.len();
    }

    fn extent_header(&mut self, offset: u64, len: u64) {
        assert!(
            len > 0 && len <= self.room(),
            "an extent of {len} bytes where {} fit",
            self.room()
        );
        let wire_len = u32::try_from(len).expect("no longer than MAX_CHUNK");
        self.put(&offset.to_le_bytes()).put(&wire_len.to_le_bytes());
        self.data += len;
        self.extents += 1;
    }

    /// Bytes of the extents so far.
    pub fn data_bytes(&self) -> u64 {
        self.data
    }

    /// The finished frame.
    ///
    /// # Panics
    /// If the body is longer than `MAX_BODY`, which no encoder here makes.
    pub fn finish(mut self) -> Vec<u8> {
        self.sum_up();
        let body = &self.bytes[HEADER_BYTES..];
        assert!(body.len() as u64 <= MAX_BODY, "a body of {}", body.len());
        let mut header = RawHeader {
            magic: U16::new(MAGIC),
            version: VERSION,
            kind: self.kind as u8,
            flags: U16::new(self.flags),
            reserved: U16::ZERO,
            region: U32::new(self.region),
            body_len: U32::new(body.len() as u32),
            epoch: U64::new(self.epoch),
            body_crc: U32::new(self.sum.value()),
            header_crc: U32::ZERO,
        };
        header.header_crc = U32::new(crc32c(&header.as_bytes()[..HEADER_BYTES - 4]));
        self.bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        self.bytes
    }
}

const _: () = assert!(
    MAX_CHUNK + EXTENT_HEADER_BYTES as u64 * MAX_EXTENTS_PER_FRAME + 64 <= MAX_BODY,
    "a full chunk with all its extents and a prefix is a body"
);
