//! What a connection speaks: bytes in, bytes out.

use super::core::Core;
use super::errands::Done;
use super::native::Native;
use super::nbd::Connected;
use super::outbox::Outbox;
use crate::engine::keys::Key;
use crate::sys::process::PidFd;

/// What was taken from the front of the bytes received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// So many bytes; more may be taken of what follows.
    Bytes(usize),
    /// So many bytes; others are to have their turn before more is taken.
    Turn(usize),
    /// So many bytes; no more is taken before something of it is completed.
    Waits(usize),
    /// Nothing: what stands there is whole with that many bytes.
    Needs(usize),
    /// Nothing more ever: the connection ends once what was answered has gone.
    Farewell,
}

/// Why a connection ends at once.
pub(crate) type Broken = String;

/// The protocol of one connection, with its state.
pub(crate) enum Speaks {
    Native(Native),
    Nbd(Box<Connected>),
}

impl Speaks {
    /// The name of its connection.
    pub(super) fn placed(&mut self, key: Key) {
        match self {
            Self::Native(_) => {}
            Self::Nbd(nbd) => nbd.placed(key),
        }
    }

    /// The process that connected, where it may be allowed to write by mapping.
    pub(super) fn connected_by(&mut self, process: PidFd) {
        match self {
            Self::Native(native) => native.connected_by(process),
            Self::Nbd(_) => {}
        }
    }

    /// The peer sends nothing more.
    pub(super) fn ended_by_peer(&mut self) {
        match self {
            Self::Native(native) => native.ended_by_peer(),
            Self::Nbd(_) => {}
        }
    }

    /// Something that it waited for is done.
    pub(super) fn completed(&mut self, done: &Done, core: &Core, out: &mut Outbox) {
        match self {
            Self::Native(_) => {}
            Self::Nbd(nbd) => nbd.completed(done, core, out),
        }
    }

    /// Takes one frame, or whatever else is next, from the front of `input`, carries it
    /// out and puts the answer into `out`.
    pub(super) fn take(
        &mut self,
        input: &[u8],
        core: &mut Core,
        out: &mut Outbox,
    ) -> Result<Taken, Broken> {
        match self {
            Self::Native(native) => native.take(input, core, out),
            Self::Nbd(nbd) => nbd.take(input, core, out),
        }
    }

    /// Whether its greeting was accepted: such a connection may be silent.
    pub(super) fn is_greeted(&self) -> bool {
        match self {
            Self::Native(native) => native.is_greeted(),
            // It was, where it was accepted.
            Self::Nbd(_) => true,
        }
    }

    /// A reply that waited for a replica's acknowledgement goes without it. False if it
    /// says nothing that needs one.
    pub(super) fn not_acknowledged(&self, reply: &mut [u8]) -> bool {
        match self {
            Self::Native(_) => Native::not_acknowledged(reply),
            Self::Nbd(nbd) => nbd.not_acknowledged(reply),
        }
    }

    /// The connection has ended.
    pub(super) fn ended(&self, core: &mut Core) {
        match self {
            Self::Native(native) => native.ended(core),
            Self::Nbd(nbd) => nbd.ended(core),
        }
    }
}
