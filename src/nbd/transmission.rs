//! Requests of a client that has chosen its export.
//!
//! ```text
//! request -> single: one unit of the backing, one reply
//!         -> long:   Current, piece by piece -> Flight counts those under way -> one reply
//! ```
//!
//! - I1: a `Flight` is there for each request of which a unit is with the backing or a piece
//!   is still to be made; its reply ends with the last of them.
//! - I2: a read that has to come in one piece and is longer than a piece of the backing
//!   (`Current::Stream`) has the connection to itself.

mod status;

use slab::Slab;

use super::backing::{Answer, Backing, Extent, Failure, Unit, Zeroing};
use super::command::{Command, Request};
use super::export::Export;
use super::handshake::Agreed;
use super::numbers::REQUEST_BYTES;
use super::reply;
use super::session::{Advanced, Next, Violation};
use crate::limits::{
    MAX_NBD_IN_FLIGHT, MAX_SPACE_OPERATION, NBD_PIECE, NBD_STAGED, NBD_TURN, NBD_ZERO_PIECE,
    SPACE_STRIPE,
};

/// A request of which something is under way.
#[derive(Debug)]
struct Flight {
    cookie: u64,
    reads: bool,
    /// Units with the backing.
    left: u32,
    /// Whether all units have been made.
    whole: bool,
    failed: Option<Failure>,
    /// Of a question of block status: extents that the answer may have.
    status: Option<usize>,
}

/// Offsets of the export that are still to be done.
#[derive(Clone, Copy, Debug)]
struct Span {
    at: u64,
    end: u64,
}

impl Span {
    fn of(request: &Request) -> Self {
        Self {
            at: request.offset,
            end: request.offset + u64::from(request.len),
        }
    }

    fn left(&self) -> u64 {
        self.end - self.at
    }
}

/// The request that is being worked on.
#[derive(Clone, Copy, Debug)]
enum Current {
    None,
    /// Takes a payload and cuts it in pieces.
    Write(u32, Span),
    /// Passes over the payload of a request that is refused.
    Skip(u64, u64, Failure),
    Zero(u32, Span, Zeroing),
    /// A read whose reply is several chunks.
    Chunks(u32, Span),
    /// A read whose reply is one run of bytes.
    Stream(u32, Span, Sent),
    /// Zeros in place of bytes that could not be read, and then the error.
    Pad(u64, u64, Failure),
}

/// How much of a stream was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Nothing,
    Begun,
}

/// What a step ended with.
enum Step {
    /// Go on with what follows these bytes.
    On(usize),
    Stop(Next),
}

/// A connection behind its handshake.
pub(super) struct Transmission {
    pub(super) export: Export,
    agreed: Agreed,
    flights: Slab<Flight>,
    staged: u64,
    current: Current,
    /// Work since others had their turn, in bytes.
    turn: u64,
    /// The client said that nothing more comes.
    ending: bool,
    broken: Option<Violation>,
    extents: Vec<Extent>,
    counts: Counts,
}

/// What a connection has had, since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests taken.
    pub requests: u64,
    /// Requests answered by an error.
    pub errors: u64,
}

impl Transmission {
    pub(super) fn new(agreed: Agreed) -> Self {
        Self {
            export: agreed.export.clone(),
            agreed,
            flights: Slab::new(),
            staged: 0,
            current: Current::None,
            turn: 0,
            ending: false,
            broken: None,
            extents: Vec::new(),
            counts: Counts::default(),
        }
    }

    pub(super) fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
    }

    pub(super) fn waiting(&self) -> (usize, u64) {
        (self.flights.len(), self.staged)
    }

    pub(super) fn advance(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
    ) -> Advanced {
        let (mut consumed, start) = (0, out.len());
        let next = loop {
            if let Some(violation) = self.broken {
                break Next::Close(Some(violation));
            }
            if self.turn >= NBD_TURN {
                self.turn = 0;
                break Next::Turn;
            }
            if out.len() > start {
                break Next::More;
            }
            match self.step(&input[consumed..], out, backing) {
                Step::On(used) => consumed += used,
                Step::Stop(next) => break next,
            }
        };
        Advanced { consumed, next }
    }

    fn step(&mut self, input: &[u8], out: &mut Vec<u8>, backing: &mut dyn Backing) -> Step {
        match self.current {
            Current::None if self.ending && self.flights.is_empty() => {
                Step::Stop(Next::Close(None))
            }
            Current::None if self.ending => Step::Stop(Next::Completion),
            Current::None => {
                let step = self.begin(input, out, backing);
                self.counts.requests += u64::from(matches!(step, Step::On(_)));
                step
            }
            Current::Skip(cookie, left, failure) => self.skip(input, out, (cookie, left, failure)),
            Current::Write(flight, span) => self.write_piece(input, out, backing, (flight, span)),
            Current::Zero(flight, span, how) => self.zero_piece(out, backing, (flight, span, how)),
            Current::Chunks(flight, span) => self.chunk(out, backing, (flight, span)),
            Current::Stream(flight, span, sent) => self.stream(out, backing, (flight, span, sent)),
            Current::Pad(cookie, left, failure) => self.pad(out, (cookie, left, failure)),
        }
    }

    /// Whether a unit that stages `bytes` has to wait for others.
    fn full(&self, bytes: u64) -> bool {
        let staged = self.staged > 0 && self.staged + bytes > NBD_STAGED;
        staged || self.flights.len() as u64 >= MAX_NBD_IN_FLIGHT
    }

    /// The next request, from its header on.
    fn begin(&mut self, input: &[u8], out: &mut Vec<u8>, backing: &mut dyn Backing) -> Step {
        let request = match Request::decode(input) {
            Ok(Some(request)) => request,
            Ok(None) => return Step::Stop(Next::Input(REQUEST_BYTES)),
            Err(violation) => return Step::Stop(Next::Close(Some(violation))),
        };
        if self.full(u64::from(request.len).min(MAX_SPACE_OPERATION)) {
            return Step::Stop(Next::Completion);
        }
        self.turn += SPACE_STRIPE / 64;
        let header = Step::On(REQUEST_BYTES);
        let cookie = request.cookie;
        let command = match request.judge(&self.export, &self.agreed) {
            Ok(command) => command,
            Err(failure) if request.payload() > 0 => {
                self.current = Current::Skip(cookie, request.payload().into(), failure);
                return header;
            }
            Err(failure) => {
                self.refuse(out, &request, failure);
                return header;
            }
        };
        match command {
            Command::Disconnect => self.ending = true,
            Command::Nothing => reply::simple(out, cookie, 0),
            Command::Status { one } => return self.status(out, backing, &request, one),
            Command::Zero(how) => return self.zero(out, backing, &request, how),
            Command::Read { whole } => return self.read(out, backing, &request, whole),
            Command::Write => return self.write(input, out, backing, &request),
        }
        header
    }

    fn refuse(&mut self, out: &mut Vec<u8>, request: &Request, failure: Failure) {
        self.fail(out, request.cookie, failure);
    }

    /// The one reply to a request that failed.
    fn fail(&mut self, out: &mut Vec<u8>, cookie: u64, failure: Failure) {
        self.counts.errors += 1;
        reply::outcome(out, cookie, self.agreed.structured, Err(failure));
    }

    /// A flight of which nothing is under way yet.
    fn open(&mut self, request: &Request) -> u32 {
        let flight = Flight {
            cookie: request.cookie,
            reads: request.reads(),
            left: 0,
            whole: false,
            failed: None,
            status: None,
        };
        self.flights.insert(flight) as u32
    }

    fn unit(&self, flight: u32, offset: u64, len: u64) -> Unit {
        Unit {
            address: self.export.base + offset,
            len: len as u32,
            flight,
        }
    }

    /// The unit of a request that is one; its flight is there only if it is needed.
    fn single(&self, request: &Request) -> Unit {
        let flight = self.flights.vacant_key() as u32;
        self.unit(flight, request.offset, request.len.into())
    }

    fn wait_for(&mut self, request: &Request) {
        let flight = self.open(request);
        self.staged += u64::from(request.len);
        let flight = &mut self.flights[flight as usize];
        (flight.left, flight.whole) = (1, true);
    }

    fn zero(
        &mut self,
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
        request: &Request,
        how: Zeroing,
    ) -> Step {
        if u64::from(request.len) > NBD_ZERO_PIECE {
            let flight = self.open(request);
            self.current = Current::Zero(flight, Span::of(request), how);
            return Step::On(REQUEST_BYTES);
        }
        self.turn += u64::from(request.len);
        let answer = match request.len {
            0 => Answer::Done,
            _ => backing.zero(self.single(request), how),
        };
        self.answered(out, request, answer, REQUEST_BYTES)
    }

    /// The reply to a request that was one unit and reads nothing; the request takes
    /// `bytes` of the input.
    fn answered(
        &mut self,
        out: &mut Vec<u8>,
        request: &Request,
        answer: Answer,
        bytes: usize,
    ) -> Step {
        match answer {
            Answer::Busy => return Step::Stop(Next::Completion),
            Answer::Later => self.wait_for(request),
            Answer::Done => reply::simple(out, request.cookie, 0),
            Answer::Failed(failure) => self.refuse(out, request, failure),
        }
        Step::On(bytes)
    }

    fn read(
        &mut self,
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
        request: &Request,
        whole: bool,
    ) -> Step {
        let header = Step::On(REQUEST_BYTES);
        let (cookie, structured) = (request.cookie, self.agreed.structured);
        let len = u64::from(request.len);
        if len > NBD_PIECE {
            let (flight, span) = (self.open(request), Span::of(request));
            self.current = if whole || !structured {
                Current::Stream(flight, span, Sent::Nothing)
            } else {
                Current::Chunks(flight, span)
            };
            return header;
        }
        if len == 0 {
            match structured {
                true => reply::last_chunk(out, cookie),
                false => reply::simple(out, cookie, 0),
            }
            return header;
        }
        self.turn += len;
        let start = out.len();
        match structured {
            true => reply::data_chunk(out, cookie, request.offset, request.len, true),
            false => reply::simple(out, cookie, 0),
        }
        let answer = append(backing, self.single(request), out);
        if answer != Answer::Done {
            out.truncate(start);
        }
        match answer {
            Answer::Done => {}
            Answer::Busy => return Step::Stop(Next::Completion),
            Answer::Later => self.wait_for(request),
            Answer::Failed(failure) => self.refuse(out, request, failure),
        }
        header
    }

    fn write(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
        request: &Request,
    ) -> Step {
        let len = request.len as usize;
        let whole = REQUEST_BYTES + len;
        let fits = u64::from(request.len) <= MAX_SPACE_OPERATION;
        if let (true, Some(payload)) = (fits, input.get(REQUEST_BYTES..whole)) {
            self.turn += u64::from(request.len);
            let answer = match len {
                0 => Answer::Done,
                _ => backing.write(self.single(request), payload),
            };
            return self.answered(out, request, answer, whole);
        }
        if u64::from(request.len) <= SPACE_STRIPE {
            return Step::Stop(Next::Input(whole));
        }
        let flight = self.open(request);
        self.current = Current::Write(flight, Span::of(request));
        Step::On(REQUEST_BYTES)
    }

    fn skip(&mut self, input: &[u8], out: &mut Vec<u8>, at: (u64, u64, Failure)) -> Step {
        let (cookie, left, failure) = at;
        let used = (input.len() as u64).min(left);
        if used == 0 {
            return Step::Stop(Next::Input(1));
        }
        self.turn += used;
        self.current = Current::Skip(cookie, left - used, failure);
        if used == left {
            self.current = Current::None;
            self.fail(out, cookie, failure);
        }
        Step::On(used as usize)
    }

    fn write_piece(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
        (flight, span): (u32, Span),
    ) -> Step {
        let there = (input.len() as u64).min(span.left()).min(NBD_PIECE);
        let end = match span.at + there {
            end if end == span.end => end,
            end => match self.export.last_stripe_end(span.at, end) {
                Some(end) => end,
                None => return Step::Stop(Next::Input(self.wanted(span))),
            },
        };
        let len = end - span.at;
        if self.full(len) {
            return Step::Stop(Next::Completion);
        }
        self.turn += len;
        let unit = self.unit(flight, span.at, len);
        let answer = backing.write(unit, &input[..len as usize]);
        if answer == Answer::Busy {
            return Step::Stop(Next::Completion);
        }
        let span = Span { at: end, ..span };
        self.current = match span.left() {
            0 => Current::None,
            _ => Current::Write(flight, span),
        };
        self.piece_answered(out, unit, answer, span.left() == 0);
        Step::On(len as usize)
    }

    /// Bytes from the beginning of a span that make its next piece.
    fn wanted(&self, span: Span) -> usize {
        let piece = span.at + NBD_PIECE;
        let end = match piece < span.end {
            true => self.export.last_stripe_end(span.at, piece).unwrap_or(piece),
            false => span.end,
        };
        (end - span.at) as usize
    }

    fn zero_piece(
        &mut self,
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
        (flight, span, how): (u32, Span, Zeroing),
    ) -> Step {
        let most = span.at + NBD_ZERO_PIECE;
        let end = match self.export.last_stripe_end(span.at, most) {
            Some(end) if most < span.end => end,
            _ => span.end.min(most),
        };
        let len = end - span.at;
        if self.full(len) {
            return Step::Stop(Next::Completion);
        }
        self.turn += len;
        let unit = self.unit(flight, span.at, len);
        let answer = backing.zero(unit, how);
        if answer == Answer::Busy {
            return Step::Stop(Next::Completion);
        }
        let span = Span { at: end, ..span };
        self.current = match span.left() {
            0 => Current::None,
            _ => Current::Zero(flight, span, how),
        };
        self.piece_answered(out, unit, answer, span.left() == 0);
        Step::On(0)
    }

    fn chunk(
        &mut self,
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
        (key, span): (u32, Span),
    ) -> Step {
        let (len, after) = self.next_read(span);
        if self.full(len) {
            return Step::Stop(Next::Completion);
        }
        self.turn += len;
        let last = after.left() == 0;
        let flight = &self.flights[key as usize];
        let done = last && flight.left == 0 && flight.failed.is_none();
        let (start, unit) = (out.len(), self.unit(key, span.at, len));
        reply::data_chunk(out, flight.cookie, span.at, unit.len, done);
        let answer = append(backing, unit, out);
        if answer != Answer::Done {
            out.truncate(start);
        }
        if answer == Answer::Busy {
            return Step::Stop(Next::Completion);
        }
        self.current = match last {
            true => Current::None,
            false => Current::Chunks(key, after),
        };
        if answer == Answer::Done && done {
            self.flights.remove(key as usize);
        } else {
            self.piece_answered(out, unit, answer, last);
        }
        Step::On(0)
    }

    /// The length of the next piece of a read, and what is left behind it.
    fn next_read(&self, span: Span) -> (u64, Span) {
        let len = self.wanted(span) as u64;
        let at = span.at + len;
        (len, Span { at, ..span })
    }

    fn stream(
        &mut self,
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
        (key, span, sent): (u32, Span, Sent),
    ) -> Step {
        let flight = &self.flights[key as usize];
        if self.flights.len() > 1 || flight.left > 0 {
            return Step::Stop(Next::Completion);
        }
        let (len, _) = self.next_read(span);
        self.turn += len;
        let (start, unit) = (out.len(), self.unit(key, span.at, len));
        if sent == Sent::Nothing {
            self.begin_stream(out, key, span);
        }
        match append(backing, unit, out) {
            Answer::Done => self.streamed(out, key, span, Ok(len)),
            Answer::Busy => {
                out.truncate(start);
                return Step::Stop(Next::Completion);
            }
            Answer::Later => {
                out.truncate(start);
                self.staged += len;
                self.flights[key as usize].left = 1;
            }
            Answer::Failed(failure) => {
                out.truncate(start);
                self.streamed(out, key, span, Err(failure));
            }
        }
        Step::On(0)
    }

    fn begin_stream(&self, out: &mut Vec<u8>, key: u32, span: Span) {
        let cookie = self.flights[key as usize].cookie;
        match self.agreed.structured {
            true => reply::data_chunk(out, cookie, span.at, span.left() as u32, false),
            false => reply::simple(out, cookie, 0),
        }
    }

    /// Goes on behind a piece of a stream that was appended, or could not be read.
    fn streamed(&mut self, out: &mut Vec<u8>, key: u32, span: Span, went: Result<u64, Failure>) {
        let Current::Stream(_, _, sent) = self.current else {
            return;
        };
        let (cookie, structured) = (self.flights[key as usize].cookie, self.agreed.structured);
        self.current = match went {
            Ok(len) if len < span.left() => {
                let at = span.at + len;
                Current::Stream(key, Span { at, ..span }, Sent::Begun)
            }
            Ok(_) => {
                if structured {
                    reply::last_chunk(out, cookie);
                }
                Current::None
            }
            Err(failure) if sent == Sent::Nothing => {
                self.fail(out, cookie, failure);
                Current::None
            }
            Err(failure) if structured => Current::Pad(cookie, span.left(), failure),
            Err(_) => {
                self.broken = Some(Violation::ReadBroke);
                Current::None
            }
        };
        if !matches!(self.current, Current::Stream(..)) {
            self.flights.remove(key as usize);
        }
    }

    fn pad(&mut self, out: &mut Vec<u8>, (cookie, left, failure): (u64, u64, Failure)) -> Step {
        let len = left.min(NBD_PIECE);
        self.turn += len;
        out.resize(out.len() + len as usize, 0);
        self.current = Current::Pad(cookie, left - len, failure);
        if len == left {
            self.current = Current::None;
            self.counts.errors += 1;
            reply::error_chunk(out, cookie, failure);
        }
        Step::On(0)
    }

    /// A piece was made of a flight's request; `last` if it was the last one.
    fn piece_answered(&mut self, out: &mut Vec<u8>, unit: Unit, answer: Answer, last: bool) {
        let flight = &mut self.flights[unit.flight as usize];
        flight.whole |= last;
        match answer {
            Answer::Done | Answer::Busy => {}
            Answer::Later => {
                flight.left += 1;
                self.staged += u64::from(unit.len);
            }
            Answer::Failed(failure) => flight.failed = flight.failed.or(Some(failure)),
        }
        self.land(out, unit.flight);
    }

    /// Ends a flight of which nothing is left, with its reply.
    fn land(&mut self, out: &mut Vec<u8>, key: u32) {
        let flight = &self.flights[key as usize];
        if !flight.whole || flight.left > 0 {
            return;
        }
        let flight = self.flights.remove(key as usize);
        let structured = self.agreed.structured;
        match flight.failed {
            None if flight.reads && structured => reply::last_chunk(out, flight.cookie),
            None => reply::simple(out, flight.cookie, 0),
            Some(failure) => self.fail(out, flight.cookie, failure),
        }
    }

    pub(super) fn completed(
        &mut self,
        unit: Unit,
        went: Result<&[u8], Failure>,
        out: &mut Vec<u8>,
    ) {
        let Some(flight) = self.flights.get_mut(unit.flight as usize) else {
            return;
        };
        if flight.left == 0 {
            return;
        }
        if flight.status.is_none() {
            self.staged = self.staged.saturating_sub(unit.len.into());
        }
        flight.left -= 1;
        let went = match went {
            Ok(bytes) if flight.reads && bytes.len() != unit.len as usize => Err(Failure::Io),
            other => other,
        };
        if let Current::Stream(key, span, sent) = self.current
            && key == unit.flight
        {
            if let (Ok(bytes), Sent::Nothing) = (went, sent) {
                self.begin_stream(out, key, span);
                out.extend_from_slice(bytes);
            } else if let Ok(bytes) = went {
                out.extend_from_slice(bytes);
            }
            return self.streamed(out, key, span, went.map(|bytes| bytes.len() as u64));
        }
        match went {
            Ok(bytes) if flight.reads => self.read_completed(out, unit, bytes),
            Ok(_) => self.land(out, unit.flight),
            Err(failure) => {
                flight.failed = flight.failed.or(Some(failure));
                self.land(out, unit.flight);
            }
        }
    }

    /// Bytes of a read that is a chunk of its own, or the whole of a simple reply.
    fn read_completed(&mut self, out: &mut Vec<u8>, unit: Unit, bytes: &[u8]) {
        let flight = &self.flights[unit.flight as usize];
        let (cookie, ends) = (flight.cookie, flight.whole && flight.left == 0);
        let done = ends && flight.failed.is_none();
        if self.agreed.structured {
            let offset = unit.address - self.export.base;
            reply::data_chunk(out, cookie, offset, unit.len, done);
        } else {
            reply::simple(out, cookie, 0);
        }
        out.extend_from_slice(bytes);
        if done {
            self.flights.remove(unit.flight as usize);
        } else {
            self.land(out, unit.flight);
        }
    }
}

/// Appends a unit's bytes; a backing that appends another number of them has failed.
fn append(backing: &mut dyn Backing, unit: Unit, out: &mut Vec<u8>) -> Answer {
    let start = out.len();
    match backing.read(unit, out) {
        Answer::Done if out.len() - start != unit.len as usize => Answer::Failed(Failure::Io),
        answer => answer,
    }
}
