//! Blocking faces for programs: a connection to a node, a writer's region that
//! survives the node's death, and a reader's attachment.
//!
//! A program that wants its memory followed needs a node (`uffd-sync serve`, or
//! [`crate::node::Node`] inside itself), a region, and nothing else: it stores
//! into the region as into any memory.
//!
//! ```no_run
//! use std::time::Duration;
//! use uffd_sync::client::{Node, Writer, WriterOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let region = Writer::create(&Node::default_socket(), "prices", 1 << 20, &WriterOptions::default())?;
//! region.write(4096, b"42.17")?;                        // found by write-protection
//! let epoch = region.commit(Duration::from_secs(1))?;   // an exact instant
//! epoch.wait_acked(1, Duration::from_secs(1))?;         // one replica shows it
//! # Ok(())
//! # }
//! ```

pub mod channel;
mod connection;
mod reader;
pub mod space;
pub mod variables;
mod writer;

use std::path::PathBuf;

pub use channel::{
    ChannelError, ChannelHandle, ClientOptions, DuplexChannelFactory, DuplexClient, Frame,
    HandlerError, HandlerFailure, InPlaceDuplexServer, NamedServer, Request, Response,
    ServerOptions, SharedDuplexClient, SharedResponse,
};
pub use connection::Node;
pub use reader::Reader;
pub use writer::{Writer, WriterOptions};

use crate::region::RegionError;
use crate::sys::SysError;
use crate::wire::control::{self, ControlError, RefusalCode};
use crate::wire::variables::Denied;

/// A request to a node that failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing usable at the socket's path.
    #[error("no node answers at {path}; start one with `uffd-sync serve`, or name its socket", path = path.display())]
    Connect {
        /// Path that was tried.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// The connection failed in the middle of a request.
    #[error("the connection to the node failed")]
    Io(#[from] SysError),
    /// The node closed the connection in the middle of a request.
    #[error("the node closed the connection before it answered; its log says why")]
    Closed,
    /// What came is not a control message.
    #[error("the node's answer cannot be read")]
    Control(#[from] ControlError),
    /// The node refused; nothing changed.
    #[error("refused by the node: {message}")]
    Refused {
        /// Kind of refusal.
        code: RefusalCode,
        /// What was tried, what was wrong, what would be right.
        message: String,
    },
    /// The node answered something that does not belong to the request.
    #[error("the node answered {found} to a {request} request; are both of the same version?")]
    Unexpected {
        /// What was asked.
        request: &'static str,
        /// Kind of the answer.
        found: &'static str,
    },
    /// Descriptors that an answer must carry are missing, or there are too many.
    #[error("the node's answer does not carry the {expected} descriptors it has to")]
    Descriptors {
        /// How many there have to be.
        expected: usize,
    },
    /// The node keeps an earlier life of another size.
    #[error(
        "the node keeps {old} bytes of an earlier life of this region, not {new}; \
         use that size, or remove it with `uffd-sync region remove`"
    )]
    Size {
        /// Size of the earlier life.
        old: u64,
        /// Size that was asked for.
        new: u64,
    },
    /// The descriptors that came are those of another region.
    #[error("the node passed another region than the one it named")]
    OtherRegion,
    /// No thread for the link to the node.
    #[error("cannot start the thread that watches the node")]
    Thread(#[source] std::io::Error),
    /// The region itself could not be made or joined.
    #[error("the region cannot be used")]
    Region(#[from] RegionError),
    /// Tracking could not be set up in this process.
    #[error("the region's stores cannot be tracked")]
    Track(#[from] crate::track::TrackError),
    /// No mode keeps what was asked of `auto`.
    #[error("mode auto finds nothing to pick")]
    Unmet(#[from] crate::track::Unmet),
    /// The node did not carry a request about variables out.
    #[error("{message}")]
    Denied {
        /// Kind of refusal.
        code: Denied,
        /// What was tried and what was wrong.
        message: String,
    },
    /// The name is not a region name.
    #[error("that is no name for a region")]
    Name(#[from] crate::words::WordError),
}

impl ClientError {
    fn unexpected(request: &'static str, response: &control::Response) -> Self {
        let found = match response {
            control::Response::Welcome { .. } => "a welcome",
            control::Response::Done => "done",
            control::Response::Status(_) => "a status",
            control::Response::Attached { .. } => "an attachment",
            control::Response::PreviousLife { .. } => "a previous life",
            control::Response::HandedOver { .. } => "a hand-over",
            control::Response::Enlisted { .. } => "a cooperative region",
            control::Response::Cut { .. } => "a cut",
            control::Response::Refused { .. } => "a refusal",
        };
        Self::Unexpected { request, found }
    }

    /// The kind of refusal, if the node refused.
    pub fn refusal(&self) -> Option<RefusalCode> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}
