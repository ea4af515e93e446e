//! What can go wrong with a buffer, and with a request.

use std::fmt;

use super::ring::Damage;
use crate::sys::SysError;

/// One of the two processes at a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Owns the buffer and reads from it.
    Reader,
    /// Writes into it.
    Writer,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Reader => "reader",
            Side::Writer => "writer",
        })
    }
}

/// How a peer went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It closed its end.
    Left,
    /// Its process ended without closing.
    Died,
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Gone::Left => "has left",
            Gone::Died => "has died",
        })
    }
}

/// Why a server has no response to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The handler returned an error.
    Failed,
    /// The handler panicked.
    Panicked,
    /// The handler gave no response, or one without bytes, which version 1 has no
    /// frame for.
    Empty,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Failed => "the handler failed",
            Refusal::Panicked => "the handler panicked",
            Refusal::Empty => "the handler gave no response",
        })
    }
}

/// An operation on a buffer or a channel that failed.
#[derive(Debug, thiserror::Error)]
pub enum ZeroBufferError {
    /// The name cannot be that of a buffer.
    #[error("the buffer's name {problem}")]
    Name {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Sizes that no buffer can have.
    #[error(
        "a buffer of {metadata} bytes of metadata and {payload} of payload: each has to be at least 1, their sum at most 4 TiB"
    )]
    Size {
        /// Bytes of metadata asked for.
        metadata: u64,
        /// Bytes of payload asked for.
        payload: u64,
    },
    /// A living process reads from a buffer of that name.
    #[error("the name is taken by a reader{}", Pid(*pid))]
    NameTaken {
        /// Its process, 0 if it has not said yet.
        pid: u64,
    },
    /// A living process writes into the buffer.
    #[error("the buffer has a writer{}", Pid(*pid))]
    WriterTaken {
        /// Its process.
        pid: u64,
    },
    /// There is no buffer of that name: its reader makes it.
    #[error("there is no buffer of that name; its reader has to be there first")]
    NoBuffer,
    /// What has that name is no buffer of version 1.
    #[error("the shared memory of that name is no buffer of version 1: {problem}")]
    Foreign {
        /// What it was recognised by.
        problem: &'static str,
    },
    /// A frame that can never fit.
    #[error("a frame of {len} bytes; the buffer takes at most {max}")]
    TooLarge {
        /// Bytes of the frame.
        len: u64,
        /// Most bytes that a frame of this buffer can have.
        max: u64,
    },
    /// A frame without bytes: version 1 takes it for a wrap marker.
    #[error("a frame of 0 bytes; version 1 has none")]
    EmptyFrame,
    /// Metadata that does not fit.
    #[error("metadata of {len} bytes; the buffer takes at most {max}")]
    MetadataTooLong {
        /// Bytes of the metadata.
        len: u64,
        /// Most bytes that this buffer takes.
        max: u64,
    },
    /// Metadata is written once in a buffer's life.
    #[error("the metadata of this buffer was written before")]
    MetadataTwice,
    /// The deadline passed.
    #[error("nothing arrived within the time given")]
    TimedOut,
    /// The deadline passed and there was no room.
    #[error("no room for a frame of {len} bytes within the time given: {free} bytes are free")]
    Full {
        /// Bytes of the frame.
        len: u64,
        /// Bytes that are free; a part of them may lie where the frame does not fit.
        free: u64,
    },
    /// The peer is not there any more.
    #[error("the {side} (process {pid}) {gone}")]
    PeerGone {
        /// Which of the two.
        side: Side,
        /// Its process.
        pid: u64,
        /// How it went.
        gone: Gone,
    },
    /// The shared memory holds what no peer that keeps the rules writes. The
    /// object says so to every later call.
    #[error("the buffer is damaged")]
    Damaged(#[from] Damage),
    /// The server has no response to that request.
    #[error("request {sequence} was refused: {refusal}{}", Detail(detail))]
    Refused {
        /// The request.
        sequence: u64,
        /// Why.
        refusal: Refusal,
        /// What the handler said, at most [`ZEROBUFFER_REFUSAL_BYTES`](crate::limits::ZEROBUFFER_REFUSAL_BYTES).
        detail: Box<str>,
    },
    /// The response to that request is not to come any more: later ones arrived.
    #[error("the response to request {sequence} was taken before or never asked for")]
    NoSuchRequest {
        /// The request.
        sequence: u64,
    },
    /// Somebody asked the waiting side to stop.
    #[error("stopped while waiting")]
    Stopped,
    /// The kernel refused.
    #[error("{action}")]
    Sys {
        /// What was attempted.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: SysError,
    },
}

impl ZeroBufferError {
    /// Whether the same call may succeed later, with nothing done in between.
    pub fn is_timeout(&self) -> bool {
        matches!(
            self,
            ZeroBufferError::TimedOut | ZeroBufferError::Full { .. }
        )
    }
}

/// Wraps the kernel's answer into what was attempted.
pub(super) fn sys(action: &'static str) -> impl Fn(SysError) -> ZeroBufferError {
    move |source| ZeroBufferError::Sys { action, source }
}

struct Pid(u64);

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            pid => write!(f, " (process {pid})"),
        }
    }
}

struct Detail<'a>(&'a str);

impl fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            text => write!(f, ": {text}"),
        }
    }
}
