//! Blocking faces of in-place channels: a client that sends requests and waits for
//! responses, and a server whose handler changes each frame where it lies.
//!
//! ```text
//! DuplexClient ------- one Segment per client -------- InPlaceDuplexServer
//!   keeper thread holds the client's word                 first worker holds the server's
//!   waits: poll, then sleep on response_ready              waits: poll, then sleep on request_ready
//! ```
//! [`DuplexChannelFactory`] brings the two together by name, through a Unix socket:
//!
//! ```text
//! create_in_place_client -- hello --> FOLDER/NAME.sock: Acceptor of a NamedServer
//!         Segment       <- memfd --   one Segment per client, served until its
//!         stays connected ----------- connection ends or its word says that it died
//! reconnect -- the same memfd ------> the next server of that name
//! ```
//!
//! Each wait has a deadline, and ends within a millisecond of the other side's death:
//! a sleeper that has slept for 10 ms also watches the word that the kernel marks
//! when its holder dies.

mod acceptor;
#[cfg(test)]
mod acceptor_tests;
mod batch;
#[cfg(test)]
mod batch_tests;
mod client;
#[cfg(test)]
mod end_tests;
mod factory;
mod frame;
mod immutable;
mod keeper;
mod link;
mod named;
mod rendezvous;
mod report;
mod sentry;
#[cfg(test)]
mod sentry_tests;
mod server;
mod shared;
#[cfg(test)]
mod tests;
mod wait;

pub use batch::{BatchAnswer, BatchRequest, BatchResponse, Holder, SharedBatchResponse};
pub use client::{ClientOptions, DuplexClient, Request, Response};
pub use factory::DuplexChannelFactory;
pub use frame::{Frame, HandlerError};
pub use immutable::{AnyDuplexClient, ImmutableServer};
pub use named::NamedServer;
pub use rendezvous::{ConnectError, FOLDER_VARIABLE, channel_socket, channels_folder};
pub use report::{ClientStatus, ServerStatus};
pub use server::{ChannelHandle, HandlerFailure, InPlaceDuplexServer, ServerOptions};
pub use shared::{SharedDuplexClient, SharedResponse};

use crate::duplex::{AcquireError, DuplexError, ErrorCode, Sequence};
use crate::sys::SysError;
use crate::units::OutOfRange;

/// What failed about a channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The channel's memory.
    #[error(transparent)]
    Memory(#[from] DuplexError),
    /// The other side was not found, or refused.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The channel has two buffers, and something about them failed.
    #[error(transparent)]
    TwoBuffers(#[from] crate::zerobuffer::ZeroBufferError),
    /// All slots or all of the payload are in use: receive a response first, or
    /// wait for room.
    #[error("all slots or all of the payload are in use; receive a response first")]
    Full,
    /// A request that never fits.
    #[error("a request of {len} bytes; the largest that this channel takes has {largest}")]
    TooLarge {
        /// Bytes that were asked for, capacity for the response included.
        len: u64,
        /// Bytes that fit.
        largest: u64,
    },
    /// More items than a batch has, or none.
    #[error("a batch of {items} items; 1 to {most} are possible")]
    Items {
        /// What was asked for.
        items: usize,
        /// Most that are possible.
        most: u64,
    },
    /// The server does not know batches: send the requests one by one.
    #[error("the channel's server takes no batches; send the requests one by one")]
    NoBatches,
    /// This side or the other has stopped the channel.
    #[error("the channel was stopped")]
    Stopped,
    /// The other side stored what it never may; the channel is of no use any more.
    #[error("the other side broke the protocol of the channel")]
    Broken,
    /// The deadline passed. The request is still in flight, unless [`DuplexClient::call`]
    /// made it, which cancels it.
    #[error("no response within the deadline")]
    TimedOut,
    /// The other side died, or left with the request unanswered.
    #[error(
        "the server died or stopped before it answered request {sequence}; its bytes {}",
        if *maybe_modified { "may have been changed" } else { "were not touched" }
    )]
    PeerDied {
        /// The request.
        sequence: Sequence,
        /// Whether a handler was at it.
        maybe_modified: bool,
    },
    /// The server is gone and no new one was connected to.
    #[error("the channel has no server; reconnect")]
    Disconnected,
    /// The handler failed, or its answer could not be taken.
    #[error("request {sequence} failed: {code}: {text}")]
    Handler {
        /// The request.
        sequence: Sequence,
        /// Kind of failure.
        code: ErrorCode,
        /// The handler's words, as far as the frame had room.
        text: String,
    },
    /// The request was cancelled.
    #[error("request {sequence} was cancelled")]
    Cancelled {
        /// The request.
        sequence: Sequence,
    },
    /// No such request is in flight.
    #[error("request {sequence} is not in flight")]
    UnknownSequence {
        /// What was asked for.
        sequence: Sequence,
    },
    /// Nothing to wait for.
    #[error("no request is in flight")]
    NothingInFlight,
    /// More worker threads, or fewer, than a channel has.
    #[error(
        "{workers} workers; 1 to {} are possible",
        crate::limits::MAX_CHANNEL_WORKERS
    )]
    Workers {
        /// What was asked for.
        workers: usize,
    },
    /// More clients at a time, or fewer, than a server takes.
    #[error("{clients} clients; 1 to {most} are possible")]
    Clients {
        /// What was asked for.
        clients: usize,
        /// Most that are possible: one where the payload is a view.
        most: usize,
    },
    /// The server was started before.
    #[error("the server was started already")]
    StartedTwice,
    /// The server has no handler yet.
    #[error("the server was not started")]
    NotStarted,
    /// A range that does not lie within the frame.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The kernel refused.
    #[error("the channel's liveness cannot be kept or watched")]
    Sys(#[from] SysError),
    /// No thread could be started.
    #[error("cannot start a thread for the channel")]
    Thread(#[source] std::io::Error),
}

impl From<AcquireError> for ChannelError {
    fn from(error: AcquireError) -> ChannelError {
        match error {
            AcquireError::Full => ChannelError::Full,
            AcquireError::TooLarge { len, largest } => ChannelError::TooLarge { len, largest },
            AcquireError::Items { items, most } => ChannelError::Items { items, most },
            AcquireError::NoBatches => ChannelError::NoBatches,
            AcquireError::Stopped => ChannelError::Stopped,
            AcquireError::Broken => ChannelError::Broken,
            AcquireError::NoServer => ChannelError::Disconnected,
        }
    }
}
