//! What can become of an operation on a space, server by server.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::checksum::Digest;
use crate::engine::space_file::SpaceFileError;
use crate::limits;
use crate::space::frame::{FrameError, Incarnation, Operation, Refusal, Status};
use crate::space::map::ServerAddress;
use crate::sys::SysError;
use crate::units::OutOfRange;
use crate::words::RegionName;

/// An operation on a space that was not carried out as asked.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// The file does not describe a space.
    #[error(transparent)]
    File(#[from] SpaceFileError),
    /// The file asks for TLS, which is not spoken here. Nothing was asked.
    #[error("the file has [tls], which is not spoken here: nothing is sent in the clear instead")]
    Tls,
    /// The range does not lie in the space. Nothing was asked of any server.
    #[error("the range does not lie in the space")]
    OutOfRange(#[from] OutOfRange),
    /// Eight bytes at an address that is no multiple of 8. Nothing was asked.
    #[error("address {offset} is no multiple of 8, as compare-exchange and fetch-add need it")]
    Misaligned {
        /// The address.
        offset: u64,
    },
    /// A batch that no server takes. Nothing was asked.
    #[error("the batch cannot be sent")]
    Batch(#[from] BatchError),
    /// The caller's part: more was submitted than answers were taken.
    #[error("{count} operations were submitted and their answers not taken; wait for some of them")]
    Full {
        /// How many there are.
        count: usize,
    },
    /// The caller's part: no such operation is under way, or its answer was taken.
    #[error("that ticket's answer was taken already, or is another space's")]
    Ticket,
    /// No server of that name.
    #[error("the space has no server called {name}")]
    NoServer {
        /// The name.
        name: Box<str>,
    },
    /// Servers did not carry their parts out, or nobody knows whether they did.
    #[error(transparent)]
    Parts(Box<PartsError>),
}

impl SpaceError {
    /// What became of each part that failed; empty if nothing was asked of any server.
    pub fn parts(&self) -> &[PartError] {
        match self {
            Self::Parts(parts) => &parts.failed,
            _ => &[],
        }
    }

    /// Whether some part may have been carried out and nobody knows.
    pub fn is_indeterminate(&self) -> bool {
        let unknown = |part: &PartError| matches!(part.why, Failure::Indeterminate { .. });
        self.parts().iter().any(unknown)
    }

    /// Whether the memory that some part spoke of is gone.
    pub fn is_segment_lost(&self) -> bool {
        let lost = |part: &PartError| matches!(part.why, Failure::SegmentLost { .. });
        self.parts().iter().any(lost)
    }
}

/// The parts of an operation that failed. All others were carried out.
#[derive(Debug)]
pub struct PartsError {
    /// Servers that the operation touched.
    pub of: usize,
    /// At least one.
    pub failed: Vec<PartError>,
}

impl fmt::Display for PartsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { of, failed } = self;
        if *of > 1 {
            write!(f, "{} of {of} parts failed: ", failed.len())?;
        }
        for (at, part) in failed.iter().enumerate() {
            let between = if at > 0 { "; " } else { "" };
            write!(f, "{between}{part}")?;
        }
        Ok(())
    }
}

impl std::error::Error for PartsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // Of several, each says its cause in its own words above.
        match &self.failed[..] {
            [one] => std::error::Error::source(&one.why),
            _ => None,
        }
    }
}

/// What became of one server's part.
#[derive(Clone, Debug, thiserror::Error)]
#[error(
    "server {server} at {address}, addresses {}..{}: {why}",
    range.start, range.end
)]
pub struct PartError {
    /// Its name.
    pub server: RegionName,
    /// Where it is reached over the network.
    pub address: ServerAddress,
    /// The addresses that this is said of. Of a part in several pieces, from the first one
    /// that failed; those before it were carried out.
    pub range: Range<u64>,
    /// What became of them.
    #[source]
    pub why: Failure,
}

/// Why a part was not carried out, or is not known to have been.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// The server lives, its memory of before does not. Nothing was changed. Every
    /// operation on it fails so until [`Space::accept_loss`](super::Space::accept_loss).
    #[error(
        "its segment was lost: this is incarnation {found}, what was read and written before \
         was in {known}"
    )]
    SegmentLost {
        /// The life that this client knew.
        known: Incarnation,
        /// The life that is there now.
        found: Incarnation,
    },
    /// A change was sent and no reply came: it may have been carried out or not.
    #[error("nobody knows whether the change was made: {why}")]
    Indeterminate {
        /// Why there is no reply.
        why: Unanswered,
    },
    /// No connection within the deadline. Nothing was changed.
    #[error("cannot be reached")]
    Unreachable {
        /// What the last attempt met.
        #[source]
        source: Arc<ReachError>,
    },
    /// Connected, and no reply within the deadline. Nothing was changed.
    #[error("no reply within the deadline")]
    TimedOut,
    /// The server refused the operation. Nothing was changed.
    #[error("refused: {}", said(*status))]
    Refused {
        /// What it said.
        status: Status,
    },
    /// Carried out by the server, but no replica has it yet: if this server is lost, so
    /// may be the operation.
    #[error("carried out, but no replica acknowledged it in time")]
    NotAcknowledged,
    /// The server has another map. Nothing was changed.
    #[error(
        "has another map: digest {} there, {} here; give both machines the same file",
        Hex(theirs),
        Hex(ours)
    )]
    OtherMap {
        /// Digest of this client's map.
        ours: Digest,
        /// Digest of the server's.
        theirs: Digest,
    },
    /// The server turned this client away. Nothing was changed.
    #[error("turns this client away: {}", turned(*refusal))]
    TurnedAway {
        /// Why.
        refusal: Refusal,
    },
    /// The server sent what no server sends. Nothing was changed, as far as it is known.
    #[error("its reply cannot be believed")]
    Broken {
        /// What it was.
        #[source]
        source: ReplyError,
    },
}

/// Why a change has no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// By mapping: the server took the stripe over before the change was done, or died.
    #[error("its stripe was taken over, or the server died, before it was done")]
    TakenOver,
    /// The connection ended first.
    #[error("the connection ended before the reply")]
    Connection,
    /// The deadline passed first.
    #[error("no reply within the deadline")]
    Deadline,
    /// What came could not be believed.
    #[error("the reply could not be believed")]
    Reply,
}

/// Bytes that are no reply to what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// No reply at all.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A reply to nothing that was asked, or the second one.
    #[error("a reply to request {id}, which is not under way")]
    Id {
        /// The number it names.
        id: u64,
    },
    /// A reply of another kind.
    #[error("{found:?} answered to {asked:?}")]
    Operation {
        /// What was asked.
        asked: Operation,
        /// What was answered.
        found: Operation,
    },
    /// A body of another length than was asked for.
    #[error("{found} bytes answered to {operation:?} of {expected}")]
    Length {
        /// What was asked.
        operation: Operation,
        /// How many bytes it has.
        expected: u64,
        /// How many came.
        found: u64,
    },
}

/// Why a server could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// Nothing was tried yet when the time was over.
    #[error("the deadline passed before a connection was made")]
    Waiting,
    /// The host's name means nothing.
    #[error("its host cannot be resolved")]
    Resolve(#[source] std::io::Error),
    /// The kernel could not connect, or the connection failed.
    #[error("the connection failed")]
    Io(#[from] SysError),
    /// It closed the connection instead of a greeting.
    #[error("the connection ended before the server's greeting")]
    Ended,
    /// Connected, but no greeting in time.
    #[error("no greeting within {} ms", limits::SPACE_GREETING_MS)]
    Silent,
    /// What answers is no server of a space.
    #[error("what answers is no server of a space")]
    Greeting(#[from] FrameError),
    /// The server greets as another one.
    #[error("server {found} of the space answers, {expected} was asked for (counted from 0)")]
    Position {
        /// Position that was asked for.
        expected: u32,
        /// Position of the one that answers.
        found: u32,
    },
    /// It takes no clients now.
    #[error("turned away: {}", turned(*.0))]
    Busy(Refusal),
}

/// A batch that no server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// None, or too many.
    #[error("{count} items; a batch has 1 to {}", limits::MAX_SPACE_BATCH)]
    Count {
        /// How many there are.
        count: usize,
    },
    /// The bytes of all items.
    #[error("{bytes} bytes in all items; at most {}", limits::MAX_SPACE_OPERATION)]
    TooLong {
        /// How many there are.
        bytes: u64,
    },
    /// An item over two servers, which cannot be carried out as one.
    #[error("item {index} lies on more than one server")]
    Crosses {
        /// Its position, from 0.
        index: usize,
    },
}

struct Hex<'a>(&'a Digest);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn said(status: Status) -> &'static str {
    match status {
        Status::Done => "nothing is wrong",
        Status::OutOfRange => "the range does not lie in its segment",
        Status::Misaligned => "not 8 bytes at a multiple of 8",
        Status::TooLong => "longer than an operation may be",
        Status::Malformed => "a batch that is none",
        Status::TooMany => "more unanswered operations than it allows",
        Status::Stopping => "it ends",
        Status::NotAcknowledged => "no replica acknowledged it",
    }
}

fn turned(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::None => "for no reason",
        Refusal::Version => "it speaks another version",
        Refusal::Map => "it has another map",
        Refusal::Server => "it is another server of the space",
        Refusal::Clients => "it has as many clients as its file allows",
        Refusal::Stopping => "it ends",
    }
}
