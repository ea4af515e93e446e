//! The extents of an update's body, each checked before it is given out.

use crate::limits::{MAX_CHUNK, MAX_EXTENTS_PER_FRAME};
use crate::units::checked_range;

use super::frame::{EXTENT_HEADER_BYTES, WireError};

/// One changed byte run inside a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireExtent<'a> {
    /// Where it lies in the region.
    pub offset: u64,
    /// Its new content; never empty.
    pub bytes: &'a [u8],
}

/// Walks the extents of a body (I2: sorted, disjoint, not empty, inside the region).
///
/// Ends after the first error.
#[derive(Clone, Debug)]
pub struct ExtentReader<'a> {
    rest: &'a [u8],
    region_size: u64,
    from: u64,
    index: u32,
    data: u64,
}

impl<'a> ExtentReader<'a> {
    /// The extents in `body`, which is what follows the prefix of a SINGLE or the
    /// whole body of a CHUNK. Extents before `from` are refused: pass the end of
    /// the previous chunk, or 0.
    pub fn new(body: &'a [u8], region_size: u64, from: u64) -> Self {
        Self {
            rest: body,
            region_size,
            from,
            index: 0,
            data: 0,
        }
    }

    /// Where the last extent ended; the next one must not begin before it.
    pub fn end(&self) -> u64 {
        self.from
    }

    /// Bytes of the extents given out so far.
    pub fn data_bytes(&self) -> u64 {
        self.data
    }

    /// Number of extents given out so far.
    pub fn extent_count(&self) -> u32 {
        self.index
    }

    /// Bytes of the body that were not looked at yet.
    pub fn rest_len(&self) -> usize {
        self.rest.len()
    }

    fn read(&mut self) -> Result<WireExtent<'a>, WireError> {
        let index = self.index;
        let bad = |offset, what| WireError::ExtentOrder {
            index,
            offset,
            what,
        };
        let Some((head, rest)) = self.rest.split_at_checked(EXTENT_HEADER_BYTES) else {
            return Err(bad(self.from, "its offset and length are cut off"));
        };
        let (offset, len) = head.split_at(8);
        let offset = u64::from_le_bytes(offset.try_into().expect("eight bytes"));
        let len = u32::from_le_bytes(len.try_into().expect("four bytes"));
        let range = checked_range(offset, len.into(), self.region_size)
            .map_err(|source| WireError::Extent { index, source })?;
        if len == 0 {
            return Err(bad(offset, "it is empty"));
        }
        if offset < self.from {
            return Err(bad(offset, "it begins before the end of the one before"));
        }
        if u64::from(index) >= MAX_EXTENTS_PER_FRAME {
            return Err(bad(offset, "there are too many for one frame"));
        }
        let Some((bytes, rest)) = rest.split_at_checked(len as usize) else {
            return Err(bad(offset, "its bytes are cut off"));
        };
        if self.data + u64::from(len) > MAX_CHUNK {
            return Err(bad(offset, "there are too many bytes for one frame"));
        }
        self.rest = rest;
        self.from = range.end;
        self.index += 1;
        self.data += u64::from(len);
        Ok(WireExtent { offset, bytes })
    }
}

impl<'a> Iterator for ExtentReader<'a> {
    type Item = Result<WireExtent<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let extent = self.read();
        if extent.is_err() {
            self.rest = &[];
        }
        Some(extent)
    }
}
