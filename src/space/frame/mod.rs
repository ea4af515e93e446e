//! What travels between a client and one server of a space, as plain bytes.
//!
//! ```text
//! client                              server
//!   | HELLO 80 (map digest, position)   |
//!   |---------------------------------->|  another map, version or position: refused,
//!   | WELCOME 96 (incarnation, bounds)  |  with what the server has
//!   |<----------------------------------|  (Unix socket, if wished: + descriptors)
//!   | REQUEST 48, body                  |
//!   |==================================>|  many under way; each answered once,
//!   | REPLY 48, body                    |  in the order of their execution
//!   |<==================================|
//! ```
//!
//! All numbers are little-endian. Each header ends with its own CRC-32C and names that of
//! its body, so a length is believed only after the header is known to be whole.
//!
//! | operation | `len` | request body | reply `value` | reply body |
//! |---|---|---|---|---|
//! | [`Operation::Read`] | bytes | | 0 | the bytes |
//! | [`Operation::Write`] | bytes | the bytes | 0 | |
//! | [`Operation::Fill`] | bytes | one byte | 0 | |
//! | [`Operation::CompareExchange`] | 8 | expected u64, new u64 | what was there | |
//! | [`Operation::FetchAdd`] | 8 | addend u64, wraps | what was there | |
//! | [`Operation::Batch`] | items | items, see [`Item`] | 0 | results, see [`ItemResult`] |
//! | [`Operation::Stat`] | 0 | | 0 | JSON |
//! | [`Operation::Ping`] | 0 | | 0 | |
//! | [`Operation::Holes`] | bytes, of any length | | 0 | runs, see [`runs`] |
//!
//! Invariants:
//! - I1: a header that differs in any bit from the one encoded is refused.
//! - I2: a parsed request is well-formed: its body is as long as its operation says, and no
//!   longer than [`MAX_REQUEST_BODY`]. Whether its range lies in the segment only the server
//!   knows.
//! - I3: nothing here reads a socket or a clock, allocates from a peer's number, or panics.
//!
//! On failure: a [`FrameError`]; the connection is of no more use, since the place of the
//! next header is not known.

mod batch;
mod greeting;
mod holes;
#[cfg(test)]
mod tests;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use batch::{Item, ItemResult, item_results, items};
pub use greeting::{Hello, Welcome};
pub use holes::{append_run, runs};

use crate::checksum::crc32c;
use crate::limits::{MAX_SPACE_BATCH, MAX_SPACE_OPERATION};

/// First four bytes of a hello and of a welcome.
pub const MAGIC: [u8; 4] = *b"uSpc";
/// Version of these frames.
pub const VERSION: u16 = 1;
/// Length of a hello, in bytes.
pub const HELLO_BYTES: usize = 80;
/// Length of a welcome or refusal, in bytes.
pub const WELCOME_BYTES: usize = 96;
/// Length of a request's header, in bytes.
pub const REQUEST_BYTES: usize = 48;
/// Length of a reply's header, in bytes.
pub const REPLY_BYTES: usize = 48;
/// Length of an item's header in a batch, in bytes.
pub const ITEM_BYTES: usize = 24;
/// Length of the header of an item's result, in bytes.
pub const ITEM_RESULT_BYTES: usize = 16;
/// Longest body of a request: the longest write, or a batch of as many bytes.
pub const MAX_REQUEST_BODY: u64 = MAX_SPACE_OPERATION + (ITEM_BYTES as u64 + 8) * MAX_SPACE_BATCH;
/// Longest body of a reply: the longest read, or a batch of as many bytes.
pub const MAX_REPLY_BODY: u64 =
    MAX_SPACE_OPERATION + (ITEM_RESULT_BYTES as u64 + 8) * MAX_SPACE_BATCH;

/// Which life of a segment: its bytes are the same memory only as long as this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Incarnation(pub u128);

impl std::fmt::Display for Incarnation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Bytes that are none of these frames.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first bytes are another protocol's.
    #[error("no greeting of a space: it begins with {found:02x?} instead of {MAGIC:02x?}")]
    Magic {
        /// The four bytes found.
        found: [u8; 4],
    },
    /// A checksum does not match.
    #[error("the {what}'s checksum is {computed:#010x}, it says {stated:#010x}")]
    Checksum {
        /// Of what.
        what: &'static str,
        /// Computed over what was received.
        computed: u32,
        /// Stated in it.
        stated: u32,
    },
    /// A number of an operation or a status that does not exist.
    #[error("{what} {number} is not known")]
    Unknown {
        /// Of what.
        what: &'static str,
        /// The number.
        number: u16,
    },
    /// A body that does not fit its operation.
    #[error("a body of {found} bytes for {operation:?} of {len}; it has {expected}")]
    Body {
        /// The operation.
        operation: Operation,
        /// The length of its range.
        len: u32,
        /// What the header says.
        found: u32,
        /// What it has to be.
        expected: u64,
    },
    /// Bytes that have no meaning yet, and are not zero.
    #[error("reserved bytes of the {what} are not zero")]
    Reserved {
        /// Of what.
        what: &'static str,
    },
    /// A length beyond any frame.
    #[error("{what} of {len}, at most {most}")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// The length stated.
        len: u64,
        /// The greatest one.
        most: u64,
    },
    /// A batch whose items do not make up its body.
    #[error("item {index} of the batch does not lie in its body")]
    Item {
        /// Its position, from 0.
        index: u32,
    },
    /// A batch with something in it that a batch does not have.
    #[error("{operation:?} cannot be part of a batch")]
    NoItem {
        /// The operation.
        operation: Operation,
    },
}

macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident: $repr:ty, $what:literal { $($(#[$case_doc:meta])* $case:ident = $number:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name { $($(#[$case_doc])* $case = $number,)+ }

        impl $name {
            /// All of them.
            pub const ALL: &[$name] = &[$($name::$case),+];

            fn of(number: $repr) -> Result<$name, FrameError> {
                Self::ALL.iter().copied().find(|known| *known as $repr == number).ok_or(
                    FrameError::Unknown { what: $what, number: u16::from(number) },
                )
            }
        }
    };
}

numbers! {
    /// What is asked of a server.
    Operation: u8, "operation" {
        /// Copies bytes out.
        Read = 1,
        /// Copies bytes in.
        Write = 2,
        /// Sets all bytes to one value.
        Fill = 3,
        /// Replaces 8 aligned bytes if they are what is expected.
        CompareExchange = 4,
        /// Adds to 8 aligned bytes, wrapping around.
        FetchAdd = 5,
        /// Several of the above, carried out one behind the other with nothing between.
        Batch = 6,
        /// How the server goes.
        Stat = 7,
        /// Nothing: a sign of life.
        Ping = 8,
        /// Which parts of a range have memory. Only for servers that [tell](TELLS_HOLES).
        Holes = 9,
    }
}

impl Operation {
    /// Whether it may change the segment.
    pub fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Stat | Self::Ping | Self::Holes)
    }
}

numbers! {
    /// How an operation went.
    Status: u16, "status" {
        /// Carried out.
        Done = 0,
        /// The range does not lie in the segment; nothing was changed.
        OutOfRange = 1,
        /// Not 8 bytes at a multiple of 8; nothing was changed.
        Misaligned = 2,
        /// Longer than an operation may be; nothing was changed.
        TooLong = 3,
        /// A batch that is none; nothing was changed.
        Malformed = 4,
        /// More unanswered operations than the server allows; nothing was changed.
        TooMany = 5,
        /// The server ends; nothing was changed.
        Stopping = 6,
        /// Carried out here, but no replica has acknowledged it in time: if this server
        /// is lost, so may be the operation.
        NotAcknowledged = 7,
    }
}

numbers! {
    /// Why a server turns a client away.
    Refusal: u16, "refusal" {
        /// It does not.
        None = 0,
        /// None of the client's versions is spoken here.
        Version = 1,
        /// The client has another map.
        Map = 2,
        /// This is another server of the space.
        Server = 3,
        /// As many clients as the file allows are here already.
        Clients = 4,
        /// The server ends.
        Stopping = 5,
    }
}

/// Flag of a hello: descriptors of the segment are wanted, to read it by mapping.
pub const WANTS_MAPPING: u32 = 1;
/// Flag of a hello: descriptors to write the segment by mapping are wanted too.
pub const WANTS_WRITING: u32 = 2;
/// Flag of a welcome: descriptors of the segment and of its stripes came with it.
pub const HAS_MAPPING: u32 = 1;
/// Flag of a welcome: replies follow the replica's acknowledgement.
pub const HAS_REPLICA: u32 = 2;
/// Flag of a welcome: [`Operation::Holes`] is answered.
pub const TELLS_HOLES: u32 = 4;
/// Flag of a welcome, besides [`HAS_MAPPING`]: the descriptors are for writing, and a third
/// one is that of the client's own page.
pub const HAS_WRITING: u32 = 8;
/// Flag of a reply to a compare-exchange: it was exchanged.
pub const EXCHANGED: u8 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRequest {
    id: U64,
    epoch: U64,
    offset: U64,
    len: U32,
    body_len: U32,
    operation: u8,
    flags: u8,
    zero: [u8; 6],
    body_crc: U32,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawReply {
    id: U64,
    epoch: U64,
    value: U64,
    body_len: U32,
    operation: u8,
    flags: u8,
    status: U16,
    zero: [u8; 8],
    body_crc: U32,
    crc: U32,
}

const _: () = {
    assert!(size_of::<RawRequest>() == REQUEST_BYTES);
    assert!(size_of::<RawReply>() == REPLY_BYTES);
};

/// Writes the CRC-32C of all but the last four bytes into those.
fn seal(bytes: &mut [u8]) {
    let end = bytes.len() - 4;
    let crc = crc32c(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
}

fn check_seal(what: &'static str, bytes: &[u8]) -> Result<(), FrameError> {
    let end = bytes.len() - 4;
    let mut stated = [0; 4];
    stated.copy_from_slice(&bytes[end..]);
    compare(what, crc32c(&bytes[..end]), u32::from_le_bytes(stated))
}

fn check_zero(what: &'static str, reserved: &[u8]) -> Result<(), FrameError> {
    if reserved.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    Err(FrameError::Reserved { what })
}

fn compare(what: &'static str, computed: u32, stated: u32) -> Result<(), FrameError> {
    if computed == stated {
        return Ok(());
    }
    Err(FrameError::Checksum {
        what,
        computed,
        stated,
    })
}

/// What a request asks, without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Named in the reply; the client's own choice.
    pub id: u64,
    /// Highest snapshot epoch that the client has seen.
    pub epoch: u64,
    /// What to do.
    pub operation: Operation,
    /// First byte in the segment.
    pub offset: u64,
    /// Bytes of the range; of a batch its items.
    pub len: u32,
}

/// A request's header as it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// What it asks.
    pub request: Request,
    /// Bytes of the body that follows.
    pub body_len: u32,
    body_crc: u32,
}

impl Request {
    /// The header of this request with `body`.
    ///
    /// # Panics
    /// If the body is longer than [`MAX_REQUEST_BODY`].
    pub fn encode(&self, body: &[u8]) -> [u8; REQUEST_BYTES] {
        assert!(body.len() as u64 <= MAX_REQUEST_BODY, "a body is bounded");
        let raw = RawRequest {
            id: self.id.into(),
            epoch: self.epoch.into(),
            offset: self.offset.into(),
            len: self.len.into(),
            body_len: (body.len() as u32).into(),
            operation: self.operation as u8,
            flags: 0,
            zero: [0; 6],
            body_crc: crc32c(body).into(),
            crc: 0.into(),
        };
        let mut bytes: [u8; REQUEST_BYTES] = zerocopy::transmute!(raw);
        seal(&mut bytes);
        bytes
    }

    /// Length that the body of such a request has; none where it has to be looked at.
    fn body_len(&self) -> Option<u64> {
        Some(match self.operation {
            Operation::Read | Operation::Stat | Operation::Ping | Operation::Holes => 0,
            Operation::Write => u64::from(self.len),
            Operation::Fill => 1,
            Operation::CompareExchange => 16,
            Operation::FetchAdd => 8,
            Operation::Batch => return None,
        })
    }
}

impl RequestHeader {
    /// From bytes. A range too long for any operation is left to
    /// [`Status::TooLong`], as long as its body can be passed over.
    ///
    /// # Errors
    /// [`FrameError`]; the connection has to end.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<RequestHeader, FrameError> {
        let raw: &RawRequest = zerocopy::transmute_ref!(bytes);
        check_seal("request", bytes)?;
        check_zero("request", &raw.zero)?;
        check_zero("request", &[raw.flags])?;
        let request = Request {
            id: raw.id.get(),
            epoch: raw.epoch.get(),
            operation: Operation::of(raw.operation)?,
            offset: raw.offset.get(),
            len: raw.len.get(),
        };
        let body_len = raw.body_len.get();
        if u64::from(body_len) > MAX_REQUEST_BODY {
            return Err(FrameError::TooLong {
                what: "a request's body",
                len: body_len.into(),
                most: MAX_REQUEST_BODY,
            });
        }
        match request.body_len() {
            Some(expected) if expected != u64::from(body_len) => Err(FrameError::Body {
                operation: request.operation,
                len: request.len,
                found: body_len,
                expected,
            }),
            _ => Ok(RequestHeader {
                request,
                body_len,
                body_crc: raw.body_crc.get(),
            }),
        }
    }

    /// Whether `body` is the one that was sent.
    ///
    /// # Errors
    /// [`FrameError::Checksum`]; the connection has to end.
    pub fn check_body(&self, body: &[u8]) -> Result<(), FrameError> {
        compare("request body", crc32c(body), self.body_crc)
    }
}

/// What a reply says, without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Of the request.
    pub id: u64,
    /// Snapshot epoch that the server has reached.
    pub epoch: u64,
    /// Of the request.
    pub operation: Operation,
    /// How it went.
    pub status: Status,
    /// [`EXCHANGED`].
    pub flags: u8,
    /// See the table of the module.
    pub value: u64,
}

/// A reply's header as it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    /// What it says.
    pub reply: Reply,
    /// Bytes of the body that follows.
    pub body_len: u32,
    body_crc: u32,
}

impl Reply {
    /// The header of this reply with `body`.
    ///
    /// # Panics
    /// If the body is longer than [`MAX_REPLY_BODY`].
    pub fn encode(&self, body: &[u8]) -> [u8; REPLY_BYTES] {
        assert!(body.len() as u64 <= MAX_REPLY_BODY, "a body is bounded");
        let raw = RawReply {
            id: self.id.into(),
            epoch: self.epoch.into(),
            value: self.value.into(),
            body_len: (body.len() as u32).into(),
            operation: self.operation as u8,
            flags: self.flags,
            status: (self.status as u16).into(),
            zero: [0; 8],
            body_crc: crc32c(body).into(),
            crc: 0.into(),
        };
        let mut bytes: [u8; REPLY_BYTES] = zerocopy::transmute!(raw);
        seal(&mut bytes);
        bytes
    }
}

impl ReplyHeader {
    /// From bytes.
    ///
    /// # Errors
    /// [`FrameError`]; the connection has to end.
    pub fn decode(bytes: &[u8; REPLY_BYTES]) -> Result<ReplyHeader, FrameError> {
        let raw: &RawReply = zerocopy::transmute_ref!(bytes);
        check_seal("reply", bytes)?;
        check_zero("reply", &raw.zero)?;
        let body_len = raw.body_len.get();
        if u64::from(body_len) > MAX_REPLY_BODY {
            return Err(FrameError::TooLong {
                what: "a reply's body",
                len: body_len.into(),
                most: MAX_REPLY_BODY,
            });
        }
        Ok(ReplyHeader {
            reply: Reply {
                id: raw.id.get(),
                epoch: raw.epoch.get(),
                operation: Operation::of(raw.operation)?,
                status: Status::of(raw.status.get())?,
                flags: raw.flags,
                value: raw.value.get(),
            },
            body_len,
            body_crc: raw.body_crc.get(),
        })
    }

    /// Whether `body` is the one that was sent.
    ///
    /// # Errors
    /// [`FrameError::Checksum`]; the connection has to end.
    pub fn check_body(&self, body: &[u8]) -> Result<(), FrameError> {
        compare("reply body", crc32c(body), self.body_crc)
    }
}
