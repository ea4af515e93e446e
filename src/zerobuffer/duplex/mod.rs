//! Requests and responses over two buffers.
//!
//! ```text
//! DuplexClient                                   DuplexServer
//!   Writer  ---- <channel>_request  ---->  Reader (owner)
//!   Reader  <--- <channel>_response -----  Writer
//!   (owner)
//! ```
//! Version 1 numbers requests and responses independently of each other and knows no
//! error frames. So:
//! * I1: the n-th response answers the n-th request of the same client. The server
//!   answers in the order of the requests, each exactly once, failures included.
//! * I2: a failure is a frame that begins with a mark of 15 bytes and the [`Refusal`]; to a
//!   client of version 1 it is a response with odd bytes, but never a missing one,
//!   which would shift all that follow. A response of a handler that begins with
//!   the mark is refused. (An empty frame would be shorter; readers of version 1
//!   take it for a wrap marker and are lost then.)
//! * I3: requests of a client that has gone are dropped; a client joins when none are
//!   left, so it gets no stranger's response. (A client of version 1 does not wait:
//!   one that follows a client that died with requests on their way may get the
//!   responses to those.)

mod client;
mod server;

pub use client::{ClientOptions, DuplexClient, PendingRequest, Response};
pub use server::{DuplexServer, HandlerError, Reply, ServerOptions};

use super::error::Refusal;
use crate::limits::ZEROBUFFER_REFUSAL_BYTES;

/// What a refusal begins with: three bytes that no text has, and a word.
const MARK: [u8; 15] = *b"\xF5\xFF\xC1uffd-refused";
/// Mark and kind.
const REFUSAL_PREFIX: usize = MARK.len() + 1;

/// The bytes of a refusal, at most `max`, which is at least [`REFUSAL_PREFIX`].
fn refusal_frame(refusal: Refusal, detail: &str, max: u64) -> Vec<u8> {
    let kind = match refusal {
        Refusal::Failed => 1,
        Refusal::Panicked => 2,
        Refusal::Empty => 3,
    };
    let mut bytes = MARK.to_vec();
    bytes.push(kind);
    let room = max
        .saturating_sub(REFUSAL_PREFIX as u64)
        .min(ZEROBUFFER_REFUSAL_BYTES) as usize;
    let end = (0..=room.min(detail.len()))
        .rev()
        .find(|end| detail.is_char_boundary(*end))
        .unwrap_or(0);
    bytes.extend_from_slice(&detail.as_bytes()[..end]);
    bytes
}

/// What a refusal says, or none if the bytes are an ordinary response.
fn parse_refusal(bytes: &[u8]) -> Option<(Refusal, Box<str>)> {
    let rest = bytes.strip_prefix(&MARK)?;
    let (kind, detail) = rest.split_first()?;
    if detail.len() as u64 > ZEROBUFFER_REFUSAL_BYTES {
        return None;
    }
    let refusal = match kind {
        1 => Refusal::Failed,
        2 => Refusal::Panicked,
        3 => Refusal::Empty,
        _ => return None,
    };
    Some((refusal, String::from_utf8_lossy(detail).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_come_through_and_nothing_else_is_one() {
        let long = "ä".repeat(400);
        for refusal in [Refusal::Failed, Refusal::Panicked, Refusal::Empty] {
            for (detail, max, shown) in [
                ("no such image", 1 << 20, "no such image"),
                ("", 16, ""),
                ("no such image", 18, "no"),
                (&long, 1 << 20, &long[..200]),
                (&long, 16 + 3, "ä"),
            ] {
                let bytes = refusal_frame(refusal, detail, max);
                assert!(bytes.len() as u64 <= max);
                let (parsed, text) = parse_refusal(&bytes).expect("a refusal");
                assert_eq!((parsed, &*text), (refusal, shown));
            }
        }
        assert_eq!(parse_refusal(b""), None);
        assert_eq!(parse_refusal(&MARK), None);
        let mut other = refusal_frame(Refusal::Empty, "", 16);
        other[15] = 9;
        assert_eq!(parse_refusal(&other), None);
        other[15] = 1;
        other.resize(16 + 201, b'x');
        assert_eq!(parse_refusal(&other), None, "longer than any refusal");
    }
}
