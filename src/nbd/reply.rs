//! Replies as bytes.

use zerocopy::IntoBytes;

use super::backing::{Extent, Failure};
use super::numbers::{
    CHUNK_MAGIC, OPTION_REPLY_MAGIC, RawChunk, RawOptionReply, RawSimpleReply, SIMPLE_REPLY_MAGIC,
    chunk,
};

/// A reply to an option.
pub(super) fn to_option(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let raw = RawOptionReply {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        kind: kind.into(),
        len: (len as u32).into(),
    };
    out.extend_from_slice(raw.as_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// A simple reply; the data of a successful read follows it.
pub(super) fn simple(out: &mut Vec<u8>, cookie: u64, error: u32) {
    let raw = RawSimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: cookie.into(),
    };
    out.extend_from_slice(raw.as_bytes());
}

fn begin_chunk(out: &mut Vec<u8>, cookie: u64, kind: u16, done: bool, len: u32) {
    let raw = RawChunk {
        magic: CHUNK_MAGIC.into(),
        flags: if done { chunk::DONE } else { 0 }.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        len: len.into(),
    };
    out.extend_from_slice(raw.as_bytes());
}

/// The head of a chunk of `len` bytes at `offset` of the export; they follow it.
pub(super) fn data_chunk(out: &mut Vec<u8>, cookie: u64, offset: u64, len: u32, done: bool) {
    begin_chunk(out, cookie, chunk::OFFSET_DATA, done, len + 8);
    out.extend_from_slice(&offset.to_be_bytes());
}

/// The chunk that says that there is nothing more.
pub(super) fn last_chunk(out: &mut Vec<u8>, cookie: u64) {
    begin_chunk(out, cookie, chunk::NONE, true, 0);
}

/// A last chunk that names an error.
pub(super) fn error_chunk(out: &mut Vec<u8>, cookie: u64, failure: Failure) {
    let text = failure.text().as_bytes();
    begin_chunk(out, cookie, chunk::ERROR, true, 6 + text.len() as u32);
    out.extend_from_slice(&failure.number().to_be_bytes());
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text);
}

/// The answer to a question of block status in the context of number `id`. Each extent
/// fits 32 bits.
pub(super) fn status_chunk(
    out: &mut Vec<u8>,
    cookie: u64,
    id: u32,
    extents: &[Extent],
    done: bool,
) {
    let len = 4 + 8 * extents.len() as u32;
    begin_chunk(out, cookie, chunk::BLOCK_STATUS, done, len);
    out.extend_from_slice(&id.to_be_bytes());
    for extent in extents {
        out.extend_from_slice(&(extent.len as u32).to_be_bytes());
        out.extend_from_slice(&extent.kind.bits().to_be_bytes());
    }
}

/// How a request without data in its reply went.
pub(super) fn outcome(out: &mut Vec<u8>, cookie: u64, structured: bool, went: Result<(), Failure>) {
    match went {
        Ok(()) => simple(out, cookie, 0),
        Err(failure) if structured => error_chunk(out, cookie, failure),
        Err(failure) => simple(out, cookie, failure.number()),
    }
}
