//! Frames: what travels between two nodes, as plain bytes.
//!
//! A frame is a header of 32 bytes and a body of at most
//! [`MAX_BODY`](crate::limits::MAX_BODY) bytes; all numbers are little-endian.
//!
//! ```text
//!  0        2   3   4       6        8              12             16
//! ┌────────┬───┬───┬───────┬────────┬──────────────┬──────────────┐
//! │ magic  │ver│knd│ flags │ zero   │ region handle│ body length  │
//! ├────────┴───┴───┴───────┴────────┼──────────────┼──────────────┤
//! │ epoch (the update's id)         │ body CRC-32C │ header CRC   │
//! └─────────────────────────────────┴──────────────┴──────────────┘
//! 16                                24             28             32
//! ```
//!
//! An extent inside a body is `offset u64, length u32, bytes`. An update of four
//! bytes is 32 (header) + 12 (prefix) + 12 (extent) + 4 = 60 bytes.
//!
//! Invariants:
//! - I1: a frame that differs in any bit from the one encoded is refused.
//! - I2: no length is used before it was checked; a body is never longer than
//!   `MAX_BODY`, an extent never reaches beyond the region, extents of one body
//!   are sorted, disjoint and not empty.
//! - I3: nothing here reads a socket or a clock, and no input panics.
//!
//! On failure: a [`WireError`]; the connection it came from is of no more use,
//! since the place of the next header is not known.

mod body;
pub mod control;
mod encode;
mod extents;
pub mod follow;
mod frame;
mod message;
mod update;
pub mod variables;

pub use encode::FrameBuilder;
pub use extents::{ExtentReader, WireExtent};
pub use frame::{
    EXTENT_HEADER_BYTES, FLAG_COMING, FLAG_CUT, FLAG_WHOLE, HEADER_BYTES, Header, Kind, MAGIC,
    VERSION, WireError, check_body, parse_header,
};
pub use message::{
    Ack, DigestFrame, ErrorCode, ErrorFrame, Hello, Ping, RegionInfo, Resync, ResyncReason,
    Subscribe, SyncPlan, Unsubscribe,
};
pub use update::{Base, EndUpdate, StartUpdate, UPDATE_PREFIX_BYTES, UpdatePrefix, update_flags};

#[cfg(test)]
mod tests;
