//! One connection, from the greeting to its end.

use std::sync::Arc;

use super::backing::{Backing, Extent, Failure, Unit};
use super::export::{Catalog, Export};
use super::handshake::{Handshake, Progress};
use super::transmission::{Counts, Transmission};
use crate::limits::NBD_REPLIES;

/// Why a client is hung up on: the place of its next request is not known, or the protocol
/// has no other way to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Flags that no client has.
    #[error("the client's flags are {flags:#010x}; 0x3 at most is known")]
    ClientFlags {
        /// All of them.
        flags: u32,
    },
    /// No option where one has to begin.
    #[error("an option begins with {found:#018x}")]
    OptionMagic {
        /// What stands there.
        found: u64,
    },
    /// An option by a client that does not speak fixed newstyle.
    #[error("option {option} by a client without fixed newstyle")]
    NotFixed {
        /// Its number.
        option: u32,
    },
    /// A handshake without end.
    #[error(
        "more than {} options and no export chosen",
        crate::limits::MAX_NBD_OPTIONS
    )]
    Options,
    /// `EXPORT_NAME` of something else; it has no reply for this.
    #[error("there is no export of the name that the client chose")]
    NoSuchExport,
    /// No request where one has to begin.
    #[error("a request begins with {found:#010x}")]
    RequestMagic {
        /// What stands there.
        found: u32,
    },
    /// The rest of a read failed whose beginning had been sent; simple replies cannot say it.
    #[error("a read failed after its first bytes were sent")]
    ReadBroke,
}

/// What a call of [`Session::advance`] ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// This many bytes have to be there, from the first one that was not consumed.
    Input(usize),
    /// A request was answered or a part of it; there may be more to do. To be called again
    /// once not too much output waits to be sent.
    More,
    /// The same, but others should have their turn before.
    Turn,
    /// Nothing can be done before a unit is [`completed`](Session::completed).
    Completion,
    /// The connection is to be closed when the output has been sent.
    Close(Option<Violation>),
}

/// How far a call of [`Session::advance`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advanced {
    /// Bytes of the input that are done with.
    pub consumed: usize,
    /// What it waits for.
    pub next: Next,
}

enum Phase {
    Handshake(Handshake),
    Transmission(Box<Transmission>),
    Over(Option<Violation>),
}

/// One client, from its first byte to its last.
///
/// Memory: the state itself is a few hundred bytes; what is staged for other servers is
/// bounded by [`NBD_STAGED`](crate::limits::NBD_STAGED) and belongs to the backing.
pub struct Session {
    exports: Arc<dyn Catalog>,
    phase: Phase,
}

impl Session {
    /// A client that has just connected. The first call of [`advance`](Self::advance), even
    /// without input, makes the greeting.
    pub fn new(exports: Arc<dyn Catalog>) -> Self {
        Self {
            exports,
            phase: Phase::Handshake(Handshake::new()),
        }
    }

    /// The export, once the client has chosen one.
    pub fn export(&self) -> Option<&Export> {
        match &self.phase {
            Phase::Transmission(transmission) => Some(&transmission.export),
            _ => None,
        }
    }

    /// What it has had since this was last called.
    pub fn take_counts(&mut self) -> Counts {
        match &mut self.phase {
            Phase::Transmission(transmission) => transmission.take_counts(),
            _ => Counts::default(),
        }
    }

    /// Works on what was received, up to one reply, which is appended to `out`: at most
    /// [`NBD_REPLIES`](crate::limits::NBD_REPLIES) bytes and one piece. What is not consumed
    /// has to come first in the next call.
    pub fn advance(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
    ) -> Advanced {
        let (mut consumed, start) = (0, out.len());
        let next = loop {
            if (out.len() - start) as u64 >= NBD_REPLIES && !matches!(self.phase, Phase::Over(_)) {
                break Next::More;
            }
            let rest = &input[consumed..];
            match &mut self.phase {
                Phase::Over(violation) => break Next::Close(*violation),
                Phase::Transmission(transmission) => {
                    let Advanced {
                        consumed: used,
                        next,
                    } = transmission.advance(rest, out, backing);
                    consumed += used;
                    if let Next::Close(violation) = next {
                        self.phase = Phase::Over(violation);
                    }
                    break next;
                }
                Phase::Handshake(handshake) => match handshake.step(&*self.exports, rest, out) {
                    Ok(Progress::Needs(bytes)) => break Next::Input(bytes),
                    Ok(Progress::Used(used)) => consumed += used,
                    Ok(Progress::Aborted(used)) => {
                        consumed += used;
                        self.phase = Phase::Over(None);
                    }
                    Ok(Progress::Chosen(used, agreed)) => {
                        consumed += used;
                        self.phase = Phase::Transmission(Box::new(Transmission::new(*agreed)));
                        // Whoever calls may look at the export before it is worked on, and
                        // the first request's reply is one of its own.
                        break Next::More;
                    }
                    Err(violation) => self.phase = Phase::Over(Some(violation)),
                },
            }
        };
        Advanced { consumed, next }
    }

    /// What became of a unit that was answered [`Later`](super::Answer::Later), with the
    /// bytes of a read. [`advance`](Self::advance) is to be called afterwards, even without
    /// new input.
    pub fn completed(&mut self, unit: Unit, went: Result<&[u8], Failure>, out: &mut Vec<u8>) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.completed(unit, went, out);
        }
    }

    /// The extents of a unit for which [`extents`](super::Backing::extents) were to come
    /// later; if they do not, it is [`completed`](Self::completed) with a failure.
    pub fn told(&mut self, unit: Unit, extents: Vec<Extent>, out: &mut Vec<u8>) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.told(unit, extents, out);
        }
    }

    /// Requests of which a part is with the backing, and bytes of theirs.
    pub fn waiting(&self) -> (usize, u64) {
        match &self.phase {
            Phase::Transmission(transmission) => transmission.waiting(),
            _ => (0, 0),
        }
    }
}
