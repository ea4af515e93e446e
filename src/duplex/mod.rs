//! In-place duplex channels: a client writes a request into shared memory, the
//! server changes it there, and the client reads the response from the same bytes.
//!
//! ```text
//! client process                 one memfd                    server process
//! ClientCore --- slot: header, inline bytes, state word ---> ServerCore
//!     |     \--- payload: frames too large for a slot ------/    |
//!     |  request_ready ------------------------------------> claim()
//!   poll() <------------------------------------ response_ready  |
//!     '- release() -> response_consumed        space_available <-' (one-way)
//! ```
//! Everything here is values over memory: no socket, no clock, no thread. The
//! blocking faces are in [`crate::client`].
//!
//! - I1: sequence N lives in slot `N % slots`. The server takes requests strictly in
//!   sequence by comparing one word; it may answer them in any order.
//! - I2: each word has one owner at a time; the state word hands a frame over
//!   ([`State`]). No read-modify-write on a line that the other side polls.
//! - I3: the client alone allocates and gives back space, by its own account; nothing
//!   in shared memory decides whether its bytes are free.
//! - I4: what the other side stored is copied once, then checked: by the client against
//!   what it asked for, by the server against the geometry, which was checked
//!   when the memory was opened.
//!
//! Many small requests travel in one frame where that pays ([`ClientCore::submit_batch`]):
//! one hand-over, one wake-up and one answer for all, each with an outcome of its own.
//!
//! What a hostile peer can do: spoil the frames it shares, answer wrongly, or not at
//! all. It cannot make this side touch memory outside of the channel, wait beyond a
//! deadline, or hold more memory than the channel has.

pub mod completion;
pub mod event;
pub mod state;
pub mod watch;

#[cfg(not(loom))]
mod batch;
#[cfg(all(test, not(loom)))]
mod batch_tests;
#[cfg(not(loom))]
mod bytes;
#[cfg(not(loom))]
mod client;
#[cfg(not(loom))]
mod ends;
#[cfg(not(loom))]
mod failpoint;
#[cfg(all(test, not(loom)))]
mod hostile_tests;
#[cfg(not(loom))]
mod lane;
#[cfg(not(loom))]
pub mod layout;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod oieb;
#[cfg(not(loom))]
mod record;
#[cfg(not(loom))]
pub mod rendezvous;
#[cfg(not(loom))]
mod request;
#[cfg(not(loom))]
mod segment;
#[cfg(not(loom))]
mod server;
#[cfg(not(loom))]
mod space;
#[cfg(all(test, not(loom)))]
mod tests;
#[cfg(not(loom))]
mod waiting;

#[cfg(not(loom))]
pub use batch::{Batch, BatchGrant, BatchWords, ItemError};
#[cfg(not(loom))]
pub use bytes::{FrameBytes, FramePlace};
#[cfg(not(loom))]
pub use client::ClientCore;
#[cfg(not(loom))]
pub use failpoint::Failpoint;
#[cfg(not(loom))]
pub use layout::{Features, Geometry, INLINE_BYTES};
#[cfg(not(loom))]
pub use memory::{BufferConfig, MemoryProvider, SharedMemory, SharedMemoryView, Window};
#[cfg(not(loom))]
pub use oieb::Oieb;
#[cfg(not(loom))]
pub use request::{AcquireError, Grant, Options, Poll};
#[cfg(not(loom))]
pub use segment::{ChannelId, ChannelStatus, OpenLimits, Presence, Segment};
#[cfg(not(loom))]
pub use server::{Claim, Posts, Seen, ServerCore};
pub use state::{Side, State};
#[cfg(not(loom))]
pub use waiting::{Pause, Semaphore, Spinner, Waiting};

/// Number of a request within its channel: 1, 2, 3, ...; never used again.
pub type Sequence = u64;

/// Why a handler's frame failed, as the client sees it. Codes from
/// [`ErrorCode::FIRST_OWN`] on are the program's own.
#[cfg(not(loom))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorCode(pub u32);

#[cfg(not(loom))]
impl ErrorCode {
    /// The handler answered an error without a code.
    pub const HANDLER: ErrorCode = ErrorCode(1);
    /// The handler panicked.
    pub const PANIC: ErrorCode = ErrorCode(2);
    /// The response is longer than the frame's capacity.
    pub const TOO_LONG: ErrorCode = ErrorCode(3);
    /// The frame's header is impossible.
    pub const MALFORMED: ErrorCode = ErrorCode(4);
    /// The server stopped before it took the request.
    pub const STOPPED: ErrorCode = ErrorCode(5);
    /// First of the codes that programs give a meaning to.
    pub const FIRST_OWN: ErrorCode = ErrorCode(0x100);
}

#[cfg(not(loom))]
impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            ErrorCode::HANDLER => f.write_str("handler error"),
            ErrorCode::PANIC => f.write_str("handler panicked"),
            ErrorCode::TOO_LONG => f.write_str("response longer than the frame"),
            ErrorCode::MALFORMED => f.write_str("malformed frame"),
            ErrorCode::STOPPED => f.write_str("server stopped"),
            ErrorCode(code) => write!(f, "error {code:#x}"),
        }
    }
}

/// What is wrong with memory that is to be a channel's.
#[cfg(not(loom))]
#[derive(Debug, thiserror::Error)]
pub enum BadSegment {
    /// Another number of descriptors than the features say.
    #[error("{found} descriptors, expected {expected}")]
    Descriptors {
        /// How many came.
        found: usize,
        /// How many there have to be.
        expected: usize,
    },
    /// It could be resized under its users.
    #[error("the memory is not sealed against resizing")]
    Unsealed,
    /// Its length is not that of its layout.
    #[error("the memory has {found} bytes, its layout {expected}")]
    Length {
        /// Bytes of the file.
        found: u64,
        /// Bytes that the layout needs.
        expected: u64,
    },
    /// It is larger than whoever opens it accepts.
    #[error("the memory has {found} bytes, at most {limit} are accepted")]
    TooLong {
        /// Bytes of the file.
        found: u64,
        /// Bytes that are accepted.
        limit: u64,
    },
    /// It does not begin like a channel.
    #[error("magic {found:#018x} instead of a channel's")]
    Magic {
        /// What stands there.
        found: u64,
    },
    /// A layout of another version.
    #[error("layout version {found}, this is {expected}")]
    Version {
        /// Its version.
        found: u32,
        /// This library's.
        expected: u32,
    },
    /// Features that this library does not know, or that were not asked for.
    #[error("feature bits {bits:#x} that are not known or not wanted")]
    Features {
        /// The bits.
        bits: u32,
    },
    /// A number of slots that no channel has.
    #[error("{slots} slots; a power of two from 8 to 1024 is possible")]
    Slots {
        /// Number that stands there.
        slots: u32,
    },
    /// A size of metadata that no channel has.
    #[error("metadata of {metadata_size} bytes; a multiple of 8 up to 1 MiB is possible")]
    MetadataSize {
        /// Bytes.
        metadata_size: u64,
    },
    /// A size of payload that no channel has.
    #[error("payload of {payload_size} bytes; a multiple of 64 up to 2 GiB is possible")]
    PayloadSize {
        /// Bytes.
        payload_size: u64,
    },
    /// A place of the payload that the layout does not allow.
    #[error("payload at {found:#x} instead of {expected:#x}")]
    PayloadOffset {
        /// What stands there.
        found: u64,
        /// What the layout says.
        expected: u64,
    },
    /// Two places that have to say the same do not.
    #[error("{what} is {found} in one place and {expected} in another")]
    Disagree {
        /// Which number.
        what: &'static str,
        /// One value.
        found: u64,
        /// The other.
        expected: u64,
    },
}

/// What failed about a channel's memory.
#[cfg(not(loom))]
#[derive(Debug, thiserror::Error)]
pub enum DuplexError {
    /// The memory is not a channel's, or the numbers for a new one are impossible.
    #[error("that is no memory of a channel")]
    Bad(#[from] BadSegment),
    /// The kernel refused.
    #[error("{action}")]
    Sys {
        /// What was attempted.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: crate::sys::SysError,
    },
    /// A range that does not lie within the memory.
    #[error(transparent)]
    OutOfRange(#[from] crate::units::OutOfRange),
    /// A write that was refused.
    #[error(transparent)]
    Write(#[from] crate::shm::WriteError),
    /// A view of existing memory was asked for new memory.
    #[error("a view of existing memory cannot allocate {len} bytes")]
    ViewAllocates {
        /// Bytes that were asked for.
        len: u64,
    },
    /// An exclusive region has one writable mapping, its writer's; a channel has two more.
    #[error("an exclusive region takes no second writable mapping; make it cooperative")]
    ExclusiveRegion,
    /// The region is followed by its writers' page tables, which a channel's stores are not in.
    #[error(
        "a region in mode {mode} looks for stores of its writers and finds a channel's only by \
         its audit; make it in mode manual, whose marks the channel sets"
    )]
    RegionMode {
        /// The mode that it has.
        mode: crate::words::Mode,
    },
    /// The memory that a client handed over lies in another region, or place, than this
    /// server's.
    #[error("the payload is not the part of the region that this server serves")]
    OtherRegion,
    /// A provider was used before it had memory.
    #[error("no memory was allocated yet")]
    NotAllocated,
    /// This side's metadata was written already.
    #[error("the metadata of this side is written once, and was")]
    MetadataTwice,
    /// More metadata than there is room for.
    #[error("{len} bytes of metadata; the channel has room for {capacity}")]
    MetadataTooLong {
        /// Bytes that were given.
        len: u64,
        /// Bytes that fit.
        capacity: u64,
    },
    /// The other side's metadata claims a length that does not fit.
    #[error("the peer's metadata claims {len} bytes; the channel has room for {capacity}")]
    MetadataCorrupted {
        /// Bytes it claims.
        len: u64,
        /// Bytes that fit.
        capacity: u64,
    },
}

#[cfg(not(loom))]
fn sys(action: &'static str) -> impl Fn(crate::sys::SysError) -> DuplexError {
    move |source| DuplexError::Sys { action, source }
}
