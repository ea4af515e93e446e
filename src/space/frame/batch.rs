//! Several operations in one request.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FrameError, ITEM_BYTES, ITEM_RESULT_BYTES, Operation, Request};
use crate::limits::MAX_SPACE_BATCH;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawItem {
    offset: U64,
    len: U32,
    body_len: U32,
    operation: u8,
    zero: [u8; 7],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawItemResult {
    value: U64,
    len: U32,
    flags: u8,
    zero: [u8; 3],
}

const _: () = {
    assert!(size_of::<RawItem>() == ITEM_BYTES);
    assert!(size_of::<RawItemResult>() == ITEM_RESULT_BYTES);
};

/// One operation of a batch: a header of [`ITEM_BYTES`], then its body, then zeros up to a
/// multiple of 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item<'a> {
    /// Neither a batch, a stat nor a ping.
    pub operation: Operation,
    /// First byte in the segment.
    pub offset: u64,
    /// Bytes of the range.
    pub len: u32,
    /// As a request of that operation has it.
    pub body: &'a [u8],
}

impl Item<'_> {
    /// Appends it to the body of a batch.
    pub fn append_to(&self, body: &mut Vec<u8>) {
        let raw = RawItem {
            offset: self.offset.into(),
            len: self.len.into(),
            body_len: (self.body.len() as u32).into(),
            operation: self.operation as u8,
            zero: [0; 7],
        };
        body.extend_from_slice(raw.as_bytes());
        append_padded(body, self.body);
    }
}

/// What became of one operation of a batch: a header of [`ITEM_RESULT_BYTES`], then the
/// bytes of a read, then zeros up to a multiple of 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ItemResult<'a> {
    /// As in a reply.
    pub value: u64,
    /// As in a reply.
    pub flags: u8,
    /// As in a reply.
    pub body: &'a [u8],
}

impl ItemResult<'_> {
    /// Appends it to the body of a reply.
    pub fn append_to(&self, body: &mut Vec<u8>) {
        let raw = RawItemResult {
            value: self.value.into(),
            len: (self.body.len() as u32).into(),
            flags: self.flags,
            zero: [0; 3],
        };
        body.extend_from_slice(raw.as_bytes());
        append_padded(body, self.body);
    }
}

fn append_padded(body: &mut Vec<u8>, bytes: &[u8]) {
    let padding = bytes.len().next_multiple_of(8) - bytes.len();
    body.extend_from_slice(bytes);
    body.resize(body.len() + padding, 0);
}

/// The items of a batch whose request has `count` of them. Each is checked when it comes.
///
/// # Errors
/// [`FrameError::TooLong`] for more than [`MAX_SPACE_BATCH`] items.
pub fn items(
    count: u32,
    body: &[u8],
) -> Result<impl Iterator<Item = Result<Item<'_>, FrameError>>, FrameError> {
    check_count(count)?;
    let mut rest = body;
    let parse = move |index| {
        let (raw, behind) =
            RawItem::ref_from_prefix(rest).map_err(|_| FrameError::Item { index })?;
        super::check_zero("item", &raw.zero)?;
        let (bytes, behind) =
            padded(behind, raw.body_len.get()).ok_or(FrameError::Item { index })?;
        rest = behind;
        check_rest(index, count, rest)?;
        let operation = Operation::of(raw.operation)?;
        if matches!(
            operation,
            Operation::Batch | Operation::Stat | Operation::Ping | Operation::Holes
        ) {
            return Err(FrameError::NoItem { operation });
        }
        let request = Request {
            id: 0,
            epoch: 0,
            operation,
            offset: raw.offset.get(),
            len: raw.len.get(),
        };
        let expected = request.body_len().unwrap_or(0);
        if expected != bytes.len() as u64 {
            return Err(FrameError::Body {
                operation,
                len: request.len,
                found: raw.body_len.get(),
                expected,
            });
        }
        Ok(Item {
            operation,
            offset: request.offset,
            len: request.len,
            body: bytes,
        })
    };
    Ok((0..count).map(parse))
}

/// The results of a batch of `count` items.
///
/// # Errors
/// [`FrameError::TooLong`] for more than [`MAX_SPACE_BATCH`] items.
pub fn item_results(
    count: u32,
    body: &[u8],
) -> Result<impl Iterator<Item = Result<ItemResult<'_>, FrameError>>, FrameError> {
    check_count(count)?;
    let mut rest = body;
    let parse = move |index| {
        let (raw, behind) =
            RawItemResult::ref_from_prefix(rest).map_err(|_| FrameError::Item { index })?;
        super::check_zero("item's result", &raw.zero)?;
        let (bytes, behind) = padded(behind, raw.len.get()).ok_or(FrameError::Item { index })?;
        rest = behind;
        check_rest(index, count, rest)?;
        Ok(ItemResult {
            value: raw.value.get(),
            flags: raw.flags,
            body: bytes,
        })
    };
    Ok((0..count).map(parse))
}

fn check_count(count: u32) -> Result<(), FrameError> {
    if u64::from(count) <= MAX_SPACE_BATCH {
        return Ok(());
    }
    Err(FrameError::TooLong {
        what: "a batch",
        len: count.into(),
        most: MAX_SPACE_BATCH,
    })
}

/// Nothing may follow the last one.
fn check_rest(index: u32, count: u32, rest: &[u8]) -> Result<(), FrameError> {
    if index + 1 == count && !rest.is_empty() {
        return Err(FrameError::Item { index });
    }
    Ok(())
}

/// The first `len` bytes, and what follows their padding.
fn padded(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let padded = (len as usize).checked_next_multiple_of(8)?;
    let (own, rest) = bytes.split_at_checked(padded)?;
    Some((&own[..len as usize], rest))
}
