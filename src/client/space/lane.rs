//! What is under way between this client and one server, as a value: requests go in as
//! runs, bytes come out; bytes of replies go in, operations are answered.
//!
//! ```text
//!            runs (not yet asked for)         flights (asked for, by number)
//! submit ──> [ op 7: 3 MiB ][ op 8: 8 B ] ──> | 40 | 41 | 42 | ──> replies in any order
//!                     pieces of at most 1 MiB   base
//! out: requests that wait for the socket       tail: a long body, sent from where it is
//! ```
//!
//! Invariants:
//! - I1: the number of a flight is `base` plus its place; a reply to any other number, or the
//!   second one to the same, ends the connection.
//! - I2: a change whose last byte went to the kernel is never sent again; one whose last byte
//!   did not go cannot have been carried out, since a server takes no request in part.
//! - I3: what came is put in its place before its checksum is known; the operation is
//!   answered only after.
//! - I4: memory is bounded by [`OUT_BYTES`], [`INBOX_BYTES`], one reply's body, and a flight
//!   for each request since the oldest unanswered one: at most `limit` unanswered ones, and
//!   [`FLIGHTS`] in all, beyond which the connection is given up.
//! - I5: runs wait in the order in which they were submitted, also those that had been asked
//!   for and have to be asked again.
//!
//! On failure the connection ends: reads go back to their place in the queue, changes that
//! were sent are reported as unknown.

use std::collections::VecDeque;
use std::ops::Range;

use super::error::{Failure, ReplyError, Unanswered};
use super::operations::{Lent, Operations, Ticket};
use crate::limits;
use crate::space::frame::{
    Incarnation, Operation, REPLY_BYTES, Reply, ReplyHeader, Request, Status, TELLS_HOLES, Welcome,
};

/// Requests gathered for one send.
const OUT_BYTES: usize = 256 * 1024;
/// Bodies up to this length are copied behind their header; longer ones are sent from where
/// they are.
const COPIED_BODY: usize = 16 * 1024;
/// Bytes received at once where they have no place yet.
const INBOX_BYTES: usize = 64 * 1024;
/// From this length on, what is missing of a body is received where it belongs.
const DIRECT_BYTES: usize = 32 * 1024;

/// Requests behind one that is never answered, before another connection is made.
const FLIGHTS: usize = 4 * limits::SPACE_CLIENT_IN_FLIGHT as usize;

/// A part of an operation that one server has to carry out, not yet asked for.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) ticket: Ticket,
    pub(super) operation: Operation,
    /// Whether it must not be sent twice.
    pub(super) changes: bool,
    /// First byte in the segment.
    pub(super) offset: u64,
    /// Bytes of the range; of a batch its items.
    pub(super) len: u64,
    /// Where its bytes begin among those of the operation.
    pub(super) at: u64,
    /// Length of a body that the operation does not say.
    pub(super) body_len: u32,
    /// First address, for reports.
    pub(super) address: u64,
}

impl Run {
    /// The first piece of it, and what is left behind that.
    fn cut(mut self) -> (Run, Option<Run>) {
        const MOST: u64 = limits::MAX_SPACE_OPERATION;
        let is_range = matches!(
            self.operation,
            Operation::Read | Operation::Write | Operation::Fill
        );
        if !is_range || self.len <= MOST {
            return (self, None);
        }
        // Pieces end where stripes do.
        let len = MOST - self.offset % MOST;
        let mut rest = self.clone();
        self.len = len;
        rest.offset += len;
        rest.len -= len;
        rest.address += len;
        if self.operation != Operation::Fill {
            rest.at += len;
        }
        (self, Some(rest))
    }

    /// Its body among the operation's bytes.
    fn body(&self) -> Range<usize> {
        let at = self.at as usize;
        match self.operation {
            Operation::Write => at..at + self.len as usize,
            Operation::Read | Operation::Stat | Operation::Ping => 0..0,
            _ => at..at + self.body_len as usize,
        }
    }

    fn addresses(&self) -> Range<u64> {
        let len = match self.operation {
            Operation::Batch => 0,
            _ => self.len,
        };
        self.address..self.address + len
    }

    /// Its place among all that were submitted to one server: I5.
    fn order(&self) -> (u64, u64) {
        (self.ticket.serial, self.offset)
    }

    /// Bytes that it makes a server or a socket hold.
    fn weight(&self) -> u64 {
        match self.operation {
            Operation::Fill | Operation::Holes => 1,
            Operation::Batch => u64::from(self.body_len),
            _ => self.len,
        }
    }
}

/// A request that was encoded and has no reply yet.
#[derive(Debug)]
struct Flight {
    piece: Run,
    /// Where it ends among all bytes encoded on this connection.
    end: u64,
    /// Its caller waits no more.
    is_given_up: bool,
}

/// A long body behind `out`.
#[derive(Debug)]
struct Tail {
    ticket: Ticket,
    range: Range<usize>,
}

/// A reply whose body is not yet whole.
#[derive(Debug)]
struct Arriving {
    header: ReplyHeader,
    /// Place among the flights.
    flight: usize,
    /// Where it belongs; none: the scratch.
    place: Option<(Ticket, usize)>,
    got: usize,
}

/// All that is under way with one server.
#[derive(Debug)]
pub(super) struct Lane {
    server: u32,
    known: Option<Incarnation>,
    found: Option<Incarnation>,
    runs: VecDeque<Run>,
    flights: VecDeque<Option<Flight>>,
    base: u64,
    /// Flights without a reply, those of them that nobody waits for, and their bytes.
    live: usize,
    given_up: usize,
    weight: u64,
    limit: usize,
    /// Whether the server says which parts of its segment are holes.
    tells_holes: bool,
    out: Vec<u8>,
    out_at: usize,
    tail: Option<Tail>,
    /// Bytes encoded on this connection, and those that the kernel took.
    encoded: u64,
    taken: u64,
    inbox: Box<[u8]>,
    inbox_at: Range<usize>,
    arriving: Option<Arriving>,
    scratch: Vec<u8>,
    /// Nothing more is asked over this connection: the server ends, or leaves something
    /// unanswered for good.
    is_closing: bool,
    /// Bytes came since somebody last gave up waiting.
    was_heard: bool,
}

impl Lane {
    pub(super) fn new(server: u32) -> Self {
        Self {
            server,
            known: None,
            found: None,
            runs: VecDeque::new(),
            flights: VecDeque::new(),
            base: 1,
            live: 0,
            given_up: 0,
            weight: 0,
            limit: 1,
            tells_holes: false,
            out: Vec::new(),
            out_at: 0,
            tail: None,
            encoded: 0,
            taken: 0,
            inbox: Box::default(),
            inbox_at: 0..0,
            arriving: None,
            scratch: Vec::new(),
            is_closing: false,
            was_heard: false,
        }
    }

    /// The life of the segment that this client knows.
    pub(super) fn known(&self) -> Option<Incarnation> {
        self.known
    }

    /// Why nothing is asked of this server any more, if so.
    pub(super) fn loss(&self) -> Option<Failure> {
        let (known, found) = (self.known?, self.found?);
        Some(Failure::SegmentLost { known, found })
    }

    /// Takes the server's new life for the known one. Whether there was one.
    pub(super) fn accept_loss(&mut self) -> bool {
        let found = self.found.take();
        self.known = found.or(self.known);
        found.is_some()
    }

    /// Whether nothing waits to be asked or answered.
    pub(super) fn is_idle(&self) -> bool {
        self.live == 0 && self.runs.is_empty()
    }

    /// Whether a reply is owed.
    pub(super) fn is_owed(&self) -> bool {
        self.live > 0
    }

    /// Whether the connection has served its time: nothing is asked over it any more, and
    /// nobody waits for what it owes.
    pub(super) fn is_over(&self) -> bool {
        self.is_closing && self.live == self.given_up
    }

    /// Bytes that wait for the socket.
    pub(super) fn waiting(&self) -> usize {
        let tail = self.tail.as_ref().map_or(0, |tail| tail.range.len());
        self.out.len() - self.out_at + tail
    }

    /// Takes a run on; fails it at once where the segment is lost.
    pub(super) fn push(&mut self, operations: &mut Operations, run: Run) {
        match self.loss() {
            Some(why) => {
                operations.failed(run.ticket, self.server, run.addresses(), why);
            }
            None => {
                operations.opened(run.ticket);
                self.runs.push_back(run);
            }
        }
    }

    /// A connection was made, and the server greeted.
    pub(super) fn welcomed(&mut self, operations: &mut Operations, welcome: &Welcome) {
        debug_assert!(self.live == 0, "a new connection owes nothing");
        if self.inbox.is_empty() {
            self.inbox = vec![0; INBOX_BYTES].into();
        }
        let most = limits::SPACE_CLIENT_IN_FLIGHT as usize;
        self.limit = (welcome.max_in_flight as usize).clamp(1, most);
        self.tells_holes = welcome.flags & TELLS_HOLES != 0;
        operations.epoch = operations.epoch.max(welcome.epoch);
        match self.known {
            None => self.known = Some(welcome.incarnation),
            Some(known) if known == welcome.incarnation => self.found = None,
            Some(_) => self.found = Some(welcome.incarnation),
        }
        if let Some(why) = self.loss() {
            self.fail_runs(operations, &why);
        }
    }

    /// Fails all that was not yet asked for.
    pub(super) fn fail_runs(&mut self, operations: &mut Operations, why: &Failure) {
        for run in self.runs.drain(..) {
            operations.failed(run.ticket, self.server, run.addresses(), why.clone());
            operations.closed(run.ticket);
        }
    }

    /// Encodes what may be asked for now.
    pub(super) fn encode(&mut self, operations: &mut Operations, lent: &Lent<'_>) {
        while self.tail.is_none() && !self.is_closing && self.out.len() < OUT_BYTES {
            let Some(run) = self.runs.pop_front() else {
                return;
            };
            if run.operation == Operation::Holes && !self.tells_holes {
                // An older server would end the connection; this is an answer too.
                operations.closed(run.ticket);
                continue;
            }
            let (piece, rest) = run.cut();
            let window = self.weight + piece.weight() > limits::SPACE_WINDOW && self.live > 0;
            if self.live >= self.limit || window {
                // Put together again: cutting is cheap and changes nothing else.
                let mut whole = piece;
                whole.len += rest.map_or(0, |rest| rest.len);
                self.runs.push_front(whole);
                return;
            }
            let range = piece.body();
            let Some(body) = operations.body(lent, piece.ticket, range.clone()) else {
                // Its caller gave up.
                continue;
            };
            let request = Request {
                id: self.base + self.flights.len() as u64,
                epoch: operations.epoch,
                operation: piece.operation,
                offset: piece.offset,
                // At most MAX_SPACE_OPERATION, or the items of a batch.
                len: piece.len as u32,
            };
            self.out.extend_from_slice(&request.encode(body));
            self.encoded += (crate::space::frame::REQUEST_BYTES + body.len()) as u64;
            if body.len() <= COPIED_BODY {
                self.out.extend_from_slice(body);
            } else {
                let ticket = piece.ticket;
                self.tail = Some(Tail { ticket, range });
            }
            // One run less, one flight more; and the rest of the run is one.
            if let Some(rest) = rest {
                operations.opened(piece.ticket);
                self.runs.push_front(rest);
            }
            self.live += 1;
            self.weight += piece.weight();
            self.flights.push_back(Some(Flight {
                piece,
                end: self.encoded,
                is_given_up: false,
            }));
            self.is_closing |= self.flights.len() >= FLIGHTS;
        }
    }

    /// What the socket is to send next, in two parts; both empty if there is nothing.
    pub(super) fn sending<'a>(
        &'a self,
        operations: &'a Operations,
        lent: &'a Lent<'_>,
    ) -> (&'a [u8], &'a [u8]) {
        let tail = self.tail.as_ref();
        let body = tail.and_then(|tail| operations.body(lent, tail.ticket, tail.range.clone()));
        (&self.out[self.out_at..], body.unwrap_or_default())
    }

    /// The kernel took `bytes` of them.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.taken += bytes as u64;
        let first = bytes.min(self.out.len() - self.out_at);
        self.out_at += first;
        if self.out_at == self.out.len() {
            self.out.clear();
            self.out_at = 0;
        }
        if let Some(tail) = &mut self.tail {
            tail.range.start += bytes - first;
            if tail.range.is_empty() {
                self.tail = None;
            }
        }
    }

    /// Where the next bytes from the socket go; never empty while connected.
    pub(super) fn room<'a>(
        &'a mut self,
        operations: &'a mut Operations,
        lent: &'a mut Lent<'_>,
    ) -> &'a mut [u8] {
        if let Some(arriving) = &self.arriving
            && self.inbox_at.is_empty()
        {
            let len = arriving.header.body_len as usize;
            if len - arriving.got >= DIRECT_BYTES {
                return match arriving.place {
                    Some((ticket, at)) => operations
                        .destination(lent, ticket, at + arriving.got..at + len)
                        .unwrap_or(&mut self.scratch[arriving.got..len]),
                    None => &mut self.scratch[arriving.got..len],
                };
            }
        }
        if self.inbox_at.is_empty() {
            self.inbox_at = 0..0;
        } else if self.inbox_at.end == self.inbox.len() {
            // A header in two pieces: what is left is shorter than one.
            self.inbox.copy_within(self.inbox_at.clone(), 0);
            self.inbox_at = 0..self.inbox_at.len();
        }
        &mut self.inbox[self.inbox_at.end..]
    }

    /// `bytes` came into the [`room`](Self::room), with the same operations and loan.
    ///
    /// # Errors
    /// What cannot be believed; the connection has to end.
    pub(super) fn received(
        &mut self,
        operations: &mut Operations,
        lent: &mut Lent<'_>,
        bytes: usize,
    ) -> Result<(), ReplyError> {
        self.was_heard = true;
        let was_direct = self.inbox_at.is_empty()
            && self.arriving.as_ref().is_some_and(|arriving| {
                arriving.header.body_len as usize - arriving.got >= DIRECT_BYTES
            });
        if !was_direct {
            self.inbox_at.end += bytes;
        } else if let Some(arriving) = &mut self.arriving {
            arriving.got += bytes;
        }
        loop {
            if self.arriving.is_none() {
                let from = self.inbox_at.start;
                let Some(header) = self.inbox[from..self.inbox_at.end].first_chunk() else {
                    return Ok(());
                };
                let header = ReplyHeader::decode(header)?;
                self.inbox_at.start += REPLY_BYTES;
                self.arriving = Some(self.begin(operations, header)?);
            }
            if !self.fill_body(operations, lent) {
                return Ok(());
            }
            self.finish(operations, lent)?;
        }
    }

    /// Finds what a reply answers and where its body belongs.
    fn begin(
        &mut self,
        operations: &Operations,
        header: ReplyHeader,
    ) -> Result<Arriving, ReplyError> {
        let Reply { id, operation, .. } = header.reply;
        let place = id
            .checked_sub(self.base)
            .and_then(|at| usize::try_from(at).ok());
        let known = place.and_then(|at| Some((at, self.flights.get(at)?.as_ref()?)));
        let (flight, Flight { piece, .. }) = known.ok_or(ReplyError::Id { id })?;
        if piece.operation != operation {
            return Err(ReplyError::Operation {
                asked: piece.operation,
                found: operation,
            });
        }
        let expected = match (header.reply.status, operation) {
            (Status::Done, Operation::Read) => Some(piece.len),
            (Status::Done | Status::NotAcknowledged, Operation::Stat | Operation::Batch) => None,
            (Status::Done, Operation::Holes) => None,
            _ => Some(0),
        };
        let found = u64::from(header.body_len);
        if expected.is_some_and(|expected| expected != found) {
            return Err(ReplyError::Length {
                operation,
                expected: expected.unwrap_or(0),
                found,
            });
        }
        let is_placed = operation == Operation::Read && operations.find(piece.ticket).is_some();
        let place = is_placed.then_some((piece.ticket, piece.at as usize));
        if found > 0 {
            // Of a read too: its caller may give up before it is whole.
            self.scratch.clear();
            if place.is_none() || found as usize >= DIRECT_BYTES {
                self.scratch.resize(found as usize, 0);
            }
        }
        Ok(Arriving {
            header,
            flight,
            place,
            got: 0,
        })
    }

    /// Moves what is in the inbox to the body that is arriving. Whether it is whole.
    fn fill_body(&mut self, operations: &mut Operations, lent: &mut Lent<'_>) -> bool {
        let Some(arriving) = &mut self.arriving else {
            return false;
        };
        let len = arriving.header.body_len as usize;
        let bytes = (len - arriving.got).min(self.inbox_at.len());
        let from = self.inbox_at.start..self.inbox_at.start + bytes;
        let range = arriving.got..arriving.got + bytes;
        let place = match arriving.place {
            Some((ticket, at)) => {
                operations.destination(lent, ticket, at + range.start..at + range.end)
            }
            None => self.scratch.get_mut(range),
        };
        if let Some(place) = place {
            place.copy_from_slice(&self.inbox[from]);
        }
        self.inbox_at.start += bytes;
        arriving.got += bytes;
        arriving.got == len
    }

    /// A reply is whole.
    fn finish(
        &mut self,
        operations: &mut Operations,
        lent: &mut Lent<'_>,
    ) -> Result<(), ReplyError> {
        let Some(arriving) = self.arriving.take() else {
            return Ok(());
        };
        let Arriving { header, place, .. } = arriving;
        let len = header.body_len as usize;
        match place {
            Some((ticket, at)) => {
                // A read that was given up has nobody to be told.
                if let Some(bytes) = operations.destination(lent, ticket, at..at + len) {
                    header.check_body(bytes)?;
                }
            }
            None => header.check_body(self.scratch.get(..len).unwrap_or_default())?,
        }
        let flight = self.flights[arriving.flight].take();
        let Some(Flight {
            piece, is_given_up, ..
        }) = flight
        else {
            return Err(ReplyError::Id {
                id: header.reply.id,
            });
        };
        self.live -= 1;
        self.given_up -= usize::from(is_given_up);
        self.weight -= piece.weight();
        while let Some(None) = self.flights.front() {
            self.flights.pop_front();
            self.base += 1;
        }
        operations.epoch = operations.epoch.max(header.reply.epoch);
        self.conclude(operations, piece, &header.reply, len);
        Ok(())
    }

    fn conclude(&mut self, operations: &mut Operations, piece: Run, reply: &Reply, len: usize) {
        let ticket = piece.ticket;
        let why = match reply.status {
            Status::Done => {
                if piece.operation != Operation::Read
                    && len > 0
                    && let Some(found) = operations.find_mut(ticket)
                {
                    let body = self.scratch.get(..len).unwrap_or_default();
                    found.bodies.push((self.server, body.to_vec()));
                }
                return operations.answered(ticket, reply);
            }
            Status::Stopping => {
                // Nothing was changed: it waits for the server's next life, or the deadline.
                self.is_closing = true;
                return self.ask_again(piece);
            }
            Status::NotAcknowledged => Failure::NotAcknowledged,
            status => Failure::Refused { status },
        };
        operations.failed(ticket, self.server, piece.addresses(), why);
        operations.closed(ticket);
        self.drop_runs_of(operations, ticket);
    }

    /// Puts a piece back to where it stood: I5.
    fn ask_again(&mut self, piece: Run) {
        let order = piece.order();
        let place = self.runs.partition_point(|run| run.order() < order);
        self.runs.insert(place, piece);
    }

    /// A part that failed is not gone on with.
    fn drop_runs_of(&mut self, operations: &mut Operations, ticket: Ticket) {
        let server = self.server;
        self.runs.retain(|run| {
            if run.ticket != ticket {
                return true;
            }
            let why = Failure::TimedOut;
            // Only the range counts: the part has its reason already.
            operations.failed(ticket, server, run.addresses(), why);
            operations.closed(ticket);
            false
        });
    }

    /// The connection ended. `broken` says that the server sent what cannot be believed:
    /// then reads fail too, since asking again would find the same.
    pub(super) fn disconnected(&mut self, operations: &mut Operations, broken: Option<ReplyError>) {
        let mut again = Vec::new();
        for Flight { piece, end, .. } in self.flights.drain(..).flatten() {
            let went = end <= self.taken;
            let why = match (&broken, piece.changes && went) {
                (None, true) => Failure::Indeterminate {
                    why: Unanswered::Connection,
                },
                (Some(_), true) => Failure::Indeterminate {
                    why: Unanswered::Reply,
                },
                (Some(source), false) if went => Failure::Broken {
                    source: source.clone(),
                },
                _ => {
                    again.push(piece);
                    continue;
                }
            };
            operations.failed(piece.ticket, self.server, piece.addresses(), why);
            operations.closed(piece.ticket);
        }
        for piece in again {
            self.ask_again(piece);
        }
        let failed: Vec<Ticket> = {
            let server = self.server;
            let of = self.runs.iter().map(|run| run.ticket);
            of.filter(|ticket| operations.has_failed_at(*ticket, server))
                .collect()
        };
        for ticket in failed {
            self.drop_runs_of(operations, ticket);
        }
        self.base = 1;
        (self.live, self.given_up, self.weight) = (0, 0, 0);
        self.out.clear();
        self.out_at = 0;
        self.tail = None;
        (self.encoded, self.taken) = (0, 0);
        self.inbox_at = 0..0;
        self.arriving = None;
        self.is_closing = false;
    }

    /// The caller of `ticket` gives up: reports what is open of it here, with `unsent` for
    /// what was never asked for. Whether the connection has to end: half a request was
    /// sent and the rest of it is the caller's, or nothing at all came since somebody gave
    /// up before.
    pub(super) fn abandon(
        &mut self,
        operations: &mut Operations,
        ticket: Ticket,
        unsent: &Failure,
    ) -> bool {
        let mut is_silent = false;
        for flight in self.flights.iter_mut().flatten() {
            let piece = &flight.piece;
            if piece.ticket != ticket {
                continue;
            }
            self.given_up += usize::from(!std::mem::replace(&mut flight.is_given_up, true));
            is_silent = !self.was_heard;
            let why = if piece.changes {
                Failure::Indeterminate {
                    why: Unanswered::Deadline,
                }
            } else {
                Failure::TimedOut
            };
            operations.failed(ticket, self.server, piece.addresses(), why);
        }
        let server = self.server;
        self.runs.retain(|run| {
            if run.ticket == ticket {
                operations.failed(ticket, server, run.addresses(), unsent.clone());
            }
            run.ticket != ticket
        });
        self.was_heard = false;
        is_silent || self.tail.as_ref().is_some_and(|tail| tail.ticket == ticket)
    }
}
