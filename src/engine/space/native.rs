//! The space's own protocol on one connection.

use super::core::Core;
use super::outbox::Outbox;
use super::speaks::{Broken, Taken};
use crate::engine::keys::Key;
use crate::limits::SPACE_TURN;
use crate::space::frame::{
    self, HAS_MAPPING, HAS_REPLICA, HAS_WRITING, HELLO_BYTES, Hello, Operation, REPLY_BYTES,
    REQUEST_BYTES, Refusal, Reply, ReplyHeader, Request, RequestHeader, Status, TELLS_HOLES,
    WANTS_MAPPING, WANTS_WRITING, Welcome,
};
use crate::sys::process::PidFd;

/// One client's connection: greeting, then requests.
pub(crate) struct Native {
    /// Whether it comes over a Unix socket, which can carry descriptors.
    is_local: bool,
    state: State,
    /// The client's own number, for the log.
    client: u128,
    /// The header at the front, once it was checked.
    header: Option<RequestHeader>,
    /// The process that connected, until it has greeted.
    process: Option<PidFd>,
    /// The client among those that write by mapping.
    writer: Option<Key>,
    ended_by_peer: bool,
    /// Work since others had their turn, in bytes.
    turn: u64,
}

/// What a request costs besides the bytes that it moves, as bytes.
const REQUEST_COST: u64 = 1024;
/// What it costs to say how the server goes.
const STAT_COST: u64 = 32 * REQUEST_COST;
/// What it may cost to find out what is a hole.
const HOLES_COST: u64 = SPACE_TURN / 2;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Welcomed,
    TurnedAway,
}

impl Native {
    pub(super) fn new(is_local: bool) -> Self {
        Self {
            is_local,
            state: State::Greeting,
            client: 0,
            header: None,
            process: None,
            writer: None,
            ended_by_peer: false,
            turn: 0,
        }
    }

    pub(super) fn connected_by(&mut self, process: PidFd) {
        self.process = Some(process);
    }

    pub(super) fn ended_by_peer(&mut self) {
        self.ended_by_peer = true;
    }

    pub(super) fn is_greeted(&self) -> bool {
        self.state == State::Welcomed
    }

    pub(super) fn ended(&self, core: &mut Core) {
        if self.state == State::Welcomed {
            core.clients -= 1;
        }
        if let (Some(writer), Some(writers)) = (self.writer, &mut core.writers) {
            writers.left(writer, self.ended_by_peer);
        }
    }

    pub(super) fn take(
        &mut self,
        input: &[u8],
        core: &mut Core,
        out: &mut Outbox,
    ) -> Result<Taken, Broken> {
        match self.state {
            State::Welcomed => self.request(input, core, out),
            State::Greeting => self.greeting(input, core, out),
            State::TurnedAway => Ok(Taken::Farewell),
        }
    }

    fn greeting(
        &mut self,
        input: &[u8],
        core: &mut Core,
        out: &mut Outbox,
    ) -> Result<Taken, Broken> {
        let Some((hello, _)) = input.split_first_chunk::<HELLO_BYTES>() else {
            return Ok(Taken::Needs(HELLO_BYTES));
        };
        let hello = Hello::decode(hello).map_err(|error| error.to_string())?;
        let refusal = refusal_of(&hello, core);
        self.client = hello.client;
        self.state = if refusal == Refusal::None {
            core.clients += 1;
            State::Welcomed
        } else {
            core.turned_away += 1;
            tracing::info!(?refusal, "a client was turned away");
            State::TurnedAway
        };
        let mut flags = if core.nbd.knows_holes() {
            TELLS_HOLES
        } else {
            0
        };
        if core.card.replicated {
            flags |= HAS_REPLICA;
        }
        let mapped = self.is_local && hello.flags & WANTS_MAPPING != 0 && core.can_be_mapped();
        if mapped && refusal == Refusal::None {
            flags |= HAS_MAPPING;
            out.with_descriptors = true;
            if hello.flags & WANTS_WRITING != 0
                && let (Some(process), Some(writers)) = (self.process.take(), &mut core.writers)
                && let Some((writer, descriptors)) = writers.admit(process)
            {
                flags |= HAS_WRITING;
                self.writer = Some(writer);
                out.own_descriptors = descriptors;
            }
        }
        let welcome = Welcome {
            version: frame::VERSION,
            refusal,
            map: core.card.map,
            server: core.card.position,
            flags,
            incarnation: core.card.incarnation,
            segment_size: core.card.segment_size,
            epoch: 0,
            max_in_flight: core.card.max_in_flight,
        };
        out.bytes().extend(welcome.encode());
        Ok(Taken::Bytes(HELLO_BYTES))
    }

    fn request(
        &mut self,
        input: &[u8],
        core: &mut Core,
        out: &mut Outbox,
    ) -> Result<Taken, Broken> {
        let Some((bytes, rest)) = input.split_first_chunk::<REQUEST_BYTES>() else {
            return Ok(Taken::Needs(REQUEST_BYTES));
        };
        // A body that comes in pieces has its header checked once.
        let header = match self.header.take() {
            Some(header) => header,
            None => RequestHeader::decode(bytes).map_err(|error| error.to_string())?,
        };
        let body_len = header.body_len as usize;
        let Some(body) = rest.get(..body_len) else {
            self.header = Some(header);
            return Ok(Taken::Needs(REQUEST_BYTES + body_len));
        };
        header.check_body(body).map_err(|error| error.to_string())?;
        let request = &header.request;
        let too_many = out.unanswered() as u64 >= u64::from(core.card.max_in_flight);
        let from = out.bytes().len();
        let bytes = out.bytes();
        bytes.resize(from + REPLY_BYTES, 0);
        let moved = core.moved_bytes();
        self.turn += REQUEST_COST;
        let reply = if too_many {
            refused(request, Status::TooMany)
        } else if core.stopping {
            refused(request, Status::Stopping)
        } else if request.operation == Operation::Stat {
            bytes.extend(core.stat());
            self.turn += STAT_COST;
            refused(request, Status::Done)
        } else if request.operation == Operation::Holes {
            self.turn += HOLES_COST;
            refused(request, core.holes(request, bytes))
        } else {
            match core.execute(request, body, bytes) {
                Some(reply) => reply,
                None => {
                    bytes.truncate(from);
                    self.header = Some(header);
                    return Ok(Taken::Waits(0));
                }
            }
        };
        core.record(self.client, request, reply.status);
        let (header, body) = bytes[from..].split_at_mut(REPLY_BYTES);
        header.copy_from_slice(&reply.encode(body));
        out.reply(from, core.barrier());
        self.turn += core.moved_bytes() - moved;
        let taken = REQUEST_BYTES + body_len;
        if self.turn < SPACE_TURN {
            return Ok(Taken::Bytes(taken));
        }
        self.turn = 0;
        Ok(Taken::Turn(taken))
    }

    /// A change keeps its outcome, but says that no replica has it. False if it is no
    /// change.
    pub(super) fn not_acknowledged(reply: &mut [u8]) -> bool {
        let Some((bytes, body)) = reply.split_first_chunk_mut::<REPLY_BYTES>() else {
            return false;
        };
        let Ok(header) = ReplyHeader::decode(bytes) else {
            return false;
        };
        let promised = header.reply.status == Status::Done && header.reply.operation.changes();
        if promised {
            let reply = Reply {
                status: Status::NotAcknowledged,
                ..header.reply
            };
            *bytes = reply.encode(body);
        }
        promised
    }
}

/// A reply that says no more than its status.
fn refused(request: &Request, status: Status) -> Reply {
    Reply {
        id: request.id,
        epoch: 0,
        operation: request.operation,
        status,
        flags: 0,
        value: 0,
    }
}

fn refusal_of(hello: &Hello, core: &Core) -> Refusal {
    let card = &core.card;
    if !(hello.versions.0..=hello.versions.1).contains(&frame::VERSION) {
        Refusal::Version
    } else if hello.map != card.map {
        Refusal::Map
    } else if hello.server != card.position {
        Refusal::Server
    } else if core.stopping {
        Refusal::Stopping
    } else if core.clients >= card.max_clients {
        Refusal::Clients
    } else {
        Refusal::None
    }
}
