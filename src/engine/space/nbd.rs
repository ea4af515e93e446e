//! One connection that speaks NBD, with what its export consists of: this server's segment,
//! worked on at once, and other servers', asked by an [`Errands`] queue.
//!
//! ```text
//! socket --> nbd::Session --> unit in this segment --> executor ---------> reply
//!                        \--> any other unit --> Errands --> gateway's thread
//!                                   reply <-- completed <-- bell <--'
//! ```
//! I1: units with the gateway, and their bytes, are bounded over all connections; beyond it
//!     a session waits and is asked again at the next completion.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::core::Core;
use super::errands::{Done, Errand, Errands, Went, What};
use super::holes::Holes;
use super::outbox::Outbox;
use super::speaks::{Broken, Taken};
use crate::engine::keys::Key;
use crate::engine::{Counted, Seat};
use crate::limits::{MAX_NBD_ERRANDS, NBD_STAGED_BY_ALL};
use crate::nbd::{
    Answer, Backing, Counts, Export, Exports, Extent, Failure, Kind, Next, Session, Unit, Zeroing,
};
use crate::space::SpaceMap;
use crate::space::frame::{Operation, Request, Status};
use crate::units::checked_range;

/// A simple reply without an error, which is what a held reply to a change is.
const DONE: [u8; 8] = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0];
/// EIO in its place.
const EIO: [u8; 4] = [0, 0, 0, 5];
/// Pages that one question of block status looks at: 16 MiB of memory, in about a
/// millisecond.
const LOOKS: u32 = 4096;

/// What all NBD connections of a server share.
pub(crate) struct Nbd {
    errands: Option<Arc<Errands>>,
    /// First address of this server's segment.
    start: u64,
    holes: Holes,
    /// Connections so far.
    serial: u64,
    /// Units with the gateway, and their bytes.
    out: (u64, u64),
    /// Connections that wait for any completion, by age.
    waiting: Vec<Key>,
}

/// The exports of the server at `position` of a space; with a way to the others all of
/// theirs too.
pub fn exports_of(map: &SpaceMap, position: usize, elsewhere: bool) -> Exports {
    let segment = map.segment_size();
    let mut exports = Vec::new();
    if elsewhere || map.servers().len() == 1 {
        exports.push(Export {
            name: "all".into(),
            description: "the whole space".into(),
            base: 0,
            size: map.size(),
            segment,
            read_only: false,
            newest: None,
        });
    }
    for (at, server) in map.servers().iter().enumerate() {
        if elsewhere || at == position {
            exports.push(Export {
                name: format!("server-{at}").into(),
                description: format!("the segment of server {}", server.name).into(),
                base: map.addresses(at).start,
                size: segment,
                segment,
                read_only: false,
                newest: None,
            });
        }
    }
    Exports::new(exports).expect("a map has segments, and each its own number")
}

impl Nbd {
    pub(super) fn new(
        map: &SpaceMap,
        position: usize,
        errands: Option<Arc<Errands>>,
        data: Option<OwnedFd>,
    ) -> Self {
        Self {
            errands,
            start: map.addresses(position).start,
            holes: Holes::new(data),
            serial: 0,
            out: (0, 0),
            waiting: Vec::new(),
        }
    }

    /// Whether the holes of the segment are known.
    pub(super) fn knows_holes(&self) -> bool {
        self.holes.are_told()
    }

    /// What `offset .. end` of the segment consists of, from its beginning on: bytes, and
    /// whether they are a hole; at most `most` runs, and not more than takes a moment.
    pub(super) fn runs(
        &mut self,
        offset: u64,
        end: u64,
        most: usize,
        mut run: impl FnMut(u64, bool),
    ) {
        let (mut at, mut left, mut looks) = (offset, most, LOOKS);
        while at < end && left > 0 && looks > 0 {
            let (start, stop) = self.holes.next_data(at, end, &mut looks);
            let hole = start > at;
            let len = (if hole { start } else { stop } - at).max(1);
            run(len, hole);
            at += len;
            left -= 1;
        }
    }

    /// The way to other servers.
    pub(super) fn errands(&self) -> Option<&Arc<Errands>> {
        self.errands.as_ref()
    }

    /// The next unit that came back from the gateway.
    pub(super) fn next_done(&mut self) -> Option<Done> {
        let done = self.errands.as_ref()?.take_done()?;
        let (units, bytes) = self.out;
        self.out = (units - 1, bytes - done.weight);
        Some(done)
    }

    /// Connections that are to be asked again, in this order, after those in `served` had
    /// something completed: whoever waits has what became free before them, or a few busy
    /// ones would keep it for good.
    pub(super) fn take_waiting(&mut self, served: &[Key]) -> Vec<Key> {
        let mut order = std::mem::take(&mut self.waiting);
        for key in served {
            if !order.contains(key) {
                order.push(*key);
            }
        }
        order
    }

    fn wait(&mut self, key: Key) {
        if !self.waiting.contains(&key) {
            self.waiting.push(key);
        }
    }
}

/// An NBD client that has chosen an export of this server, on its way to the loop.
pub struct Arrived {
    /// Its socket; everything that it was to be sent so far has gone.
    pub socket: OwnedFd,
    /// Its session, with the export chosen.
    pub session: Session,
    /// What was received of it and not taken.
    pub input: Vec<u8>,
    /// Its place among all NBD clients.
    pub seat: Seat,
    /// What it does is counted here.
    pub counted: Counted,
}

impl fmt::Debug for Arrived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrived")
            .field("export", &self.session.export())
            .finish_non_exhaustive()
    }
}

/// The state of one connection.
pub(crate) struct Connected {
    session: Session,
    key: Option<Key>,
    serial: u64,
    counted: Counted,
    _seat: Seat,
}

impl Connected {
    /// The connection of a client that has arrived.
    pub(super) fn new(session: Session, counted: Counted, seat: Seat, nbd: &mut Nbd) -> Self {
        nbd.serial += 1;
        Self {
            session,
            key: None,
            serial: nbd.serial,
            counted,
            _seat: seat,
        }
    }

    /// The connection's name in completions.
    pub(super) fn placed(&mut self, key: Key) {
        self.key = Some(key);
    }

    pub(super) fn ended(&self, core: &mut Core) {
        if let Some(key) = self.key {
            core.nbd.waiting.retain(|waiting| *waiting != key);
        }
    }

    /// What the session has had since the last time.
    fn count(&mut self) {
        let counts = self.session.take_counts();
        if counts != Counts::default() {
            self.counted.add(counts.requests, counts.errors);
        }
    }

    pub(super) fn take(
        &mut self,
        input: &[u8],
        core: &mut Core,
        out: &mut Outbox,
    ) -> Result<Taken, Broken> {
        let Some(key) = self.key else {
            return Ok(Taken::Farewell);
        };
        let from = out.bytes().len();
        let mut segment = Segment {
            core,
            key,
            serial: self.serial,
        };
        let advanced = self.session.advance(input, out.bytes(), &mut segment);
        if out.bytes().len() > from {
            out.reply(from, core.barrier());
        }
        self.count();
        Ok(match advanced.next {
            Next::More => Taken::Bytes(advanced.consumed),
            Next::Turn => Taken::Turn(advanced.consumed),
            Next::Input(needs) if advanced.consumed == 0 => Taken::Needs(needs),
            Next::Input(_) => Taken::Bytes(advanced.consumed),
            Next::Completion => {
                core.nbd.wait(key);
                Taken::Waits(advanced.consumed)
            }
            Next::Close(None) => Taken::Farewell,
            Next::Close(Some(violation)) => return Err(violation.to_string()),
        })
    }

    /// A unit came back from the gateway.
    pub(super) fn completed(&mut self, done: &Done, core: &Core, out: &mut Outbox) {
        let from = out.bytes().len();
        match &done.went {
            Ok(Went::Bytes(bytes)) => self.session.completed(done.unit, Ok(bytes), out.bytes()),
            Ok(Went::Runs(runs)) => {
                let extents = runs.iter().copied().map(extent_of).collect();
                self.session.told(done.unit, extents, out.bytes());
            }
            Err(failure) => self
                .session
                .completed(done.unit, Err(*failure), out.bytes()),
        }
        if out.bytes().len() > from {
            out.reply(from, core.barrier());
        }
        self.count();
    }

    /// NBD has no reply for a change that was made and may be lost: it is an error. False
    /// if it is none already, or a read.
    pub(super) fn not_acknowledged(&self, reply: &mut [u8]) -> bool {
        let promised = reply.len() == 16 && reply.starts_with(&DONE);
        if promised {
            reply[4..8].copy_from_slice(&EIO);
            self.counted.add(0, 1);
        }
        promised
    }
}

/// The memory of the space as one connection has it.
struct Segment<'a> {
    core: &'a mut Core,
    key: Key,
    serial: u64,
}

impl Segment<'_> {
    /// Offset in this server's segment, if the unit lies in it.
    fn here(&self, address: u64, len: u64) -> Option<u64> {
        let offset = address.checked_sub(self.core.nbd.start)?;
        checked_range(offset, len, self.core.card.segment_size).ok()?;
        Some(offset)
    }

    fn execute(
        &mut self,
        operation: Operation,
        (offset, len): (u64, u32),
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Answer {
        let request = Request {
            id: 0,
            epoch: 0,
            operation,
            offset,
            len,
        };
        if self.core.stopping {
            return Answer::Failed(Failure::Stopping);
        }
        let Some(reply) = self.core.execute(&request, body, out) else {
            // Others wait for the same: all are asked again together.
            return Answer::Busy;
        };
        let status = reply.status;
        self.core.record(self.serial.into(), &request, status);
        match status {
            Status::Done => Answer::Done,
            _ => Answer::Failed(Failure::Io),
        }
    }

    fn elsewhere(&mut self, unit: Unit, what: impl FnOnce() -> What) -> Answer {
        let nbd = &mut self.core.nbd;
        let Some(errands) = &nbd.errands else {
            return Answer::Failed(Failure::Invalid);
        };
        if errands.is_closed() {
            return Answer::Failed(Failure::Io);
        }
        let what = what();
        let (units, bytes) = nbd.out;
        let staged = bytes + what.weight(unit);
        if units >= MAX_NBD_ERRANDS || (units > 0 && staged > NBD_STAGED_BY_ALL) {
            return Answer::Busy;
        }
        let errand = Errand {
            connection: self.key.to_bits(),
            serial: self.serial,
            unit,
            what,
        };
        if !errands.send(errand) {
            return Answer::Busy;
        }
        nbd.out = (units + 1, staged);
        Answer::Later
    }
}

impl Backing for Segment<'_> {
    fn read(&mut self, unit: Unit, out: &mut Vec<u8>) -> Answer {
        match self.here(unit.address, unit.len.into()) {
            Some(offset) => self.execute(Operation::Read, (offset, unit.len), &[], out),
            None => self.elsewhere(unit, || What::Read),
        }
    }

    fn write(&mut self, unit: Unit, bytes: &[u8]) -> Answer {
        match self.here(unit.address, unit.len.into()) {
            Some(offset) => {
                let place = (offset, unit.len);
                self.execute(Operation::Write, place, bytes, &mut Vec::new())
            }
            None => self.elsewhere(unit, || What::Write(bytes.to_vec())),
        }
    }

    /// The segment cannot be punched, its memory is sealed: what is a hole stays one, what
    /// is memory becomes zeros.
    fn zero(&mut self, unit: Unit, how: Zeroing) -> Answer {
        let Some(offset) = self.here(unit.address, unit.len.into()) else {
            return self.elsewhere(unit, || What::Zero);
        };
        let end = offset + u64::from(unit.len);
        let (mut at, mut looks) = (offset, u32::MAX);
        while at < end {
            let (start, stop) = match how {
                Zeroing::Allocated => (at, end),
                Zeroing::Sparse | Zeroing::Discard => {
                    self.core.nbd.holes.next_data(at, end, &mut looks)
                }
            };
            if start < stop {
                let place = (start, (stop - start) as u32);
                let answer = self.execute(Operation::Fill, place, &[0], &mut Vec::new());
                if answer != Answer::Done {
                    return answer;
                }
            }
            at = stop.max(at + 1);
        }
        Answer::Done
    }

    /// What lies on one server, which is the beginning of a longer range.
    fn extents(&mut self, mut unit: Unit, most: usize, into: &mut Vec<Extent>) -> Answer {
        let segment = self.core.card.segment_size;
        let left = segment - unit.address % segment;
        unit.len = u64::from(unit.len).min(left) as u32;
        let Some(offset) = self.here(unit.address, unit.len.into()) else {
            return self.elsewhere(unit, || What::Holes);
        };
        let end = offset + u64::from(unit.len);
        let nbd = &mut self.core.nbd;
        nbd.runs(offset, end, most, |len, hole| {
            into.push(extent_of((len, hole)))
        });
        Answer::Done
    }
}

fn extent_of((len, hole): (u64, bool)) -> Extent {
    let kind = Kind::of_hole(hole);
    Extent { len, kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_goes_before_who_was_just_served() {
        let server = |name: &str, port: u16| crate::space::Server {
            name: name.parse().expect("a name"),
            address: format!("h:{port}").parse().expect("an address"),
        };
        let map = SpaceMap::new(4096, vec![server("a", 1), server("b", 2)]).expect("a map");
        let mut nbd = Nbd::new(&map, 0, None, None);
        let key = Key::from_bits;
        for bits in [9, 4, 9, 7] {
            nbd.wait(key(bits));
        }
        let order = nbd.take_waiting(&[key(2), key(4), key(2)]);
        assert_eq!(order, [9, 4, 7, 2].map(key));
        assert!(nbd.take_waiting(&[]).is_empty());
    }
}
