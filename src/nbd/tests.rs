//! A session against a client and a backing that were written down naively: byte by byte
//! what the protocol's document says.

mod handshake;
mod hostile;
mod transmission;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::*;
use crate::limits::{NBD_PIECE, NBD_REPLIES, NBD_STAGED};

/// Memory that answers at once, or keeps what it is asked for until it is told to go on.
#[derive(Default)]
struct Memory {
    bytes: Vec<u8>,
    later: bool,
    /// Refuses every other unit until the next completion.
    busy: bool,
    refused: bool,
    fails: bool,
    kept: VecDeque<Kept>,
    holes: Vec<Extent>,
    /// Everything that was asked, for what is to be asked.
    seen: Vec<(u64, u32)>,
}

struct Kept {
    unit: Unit,
    what: What,
}

enum What {
    Read,
    Write(Vec<u8>),
    Zero,
    Holes,
}

impl Memory {
    fn new(len: usize) -> Self {
        let pattern: Vec<u8> = (0..65_521_u32)
            .map(|at| (at * 7 + at / 251) as u8)
            .collect();
        let mut bytes = pattern.repeat(len / pattern.len() + 1);
        bytes.truncate(len);
        Self {
            bytes,
            ..Self::default()
        }
    }

    fn range(&self, unit: Unit) -> std::ops::Range<usize> {
        let start = unit.address as usize;
        start..start + unit.len as usize
    }

    fn answer(&mut self, unit: Unit, what: What) -> Answer {
        self.refused = self.busy && !self.refused && !self.kept.is_empty();
        if self.refused {
            return Answer::Busy;
        }
        self.seen.push((unit.address, unit.len));
        assert!(
            self.range(unit).end <= self.bytes.len(),
            "{unit:?} was asked for"
        );
        assert!(unit.len > 0, "nothing was asked for");
        if self.fails {
            return Answer::Failed(Failure::Io);
        }
        if self.later {
            self.kept.push_back(Kept { unit, what });
            return Answer::Later;
        }
        self.carry_out(unit, what);
        Answer::Done
    }

    fn carry_out(&mut self, unit: Unit, what: What) -> Vec<u8> {
        let range = self.range(unit);
        match what {
            What::Read => return self.bytes[range].to_vec(),
            What::Write(bytes) => self.bytes[range].copy_from_slice(&bytes),
            What::Zero => self.bytes[range].fill(0),
            What::Holes => {}
        }
        Vec::new()
    }
}

impl Backing for Memory {
    fn read(&mut self, unit: Unit, out: &mut Vec<u8>) -> Answer {
        let answer = self.answer(unit, What::Read);
        if answer == Answer::Done {
            out.extend_from_slice(&self.bytes[self.range(unit)]);
        }
        answer
    }

    fn write(&mut self, unit: Unit, bytes: &[u8]) -> Answer {
        assert_eq!(bytes.len(), unit.len as usize);
        self.answer(unit, What::Write(bytes.to_vec()))
    }

    fn zero(&mut self, unit: Unit, _: Zeroing) -> Answer {
        self.answer(unit, What::Zero)
    }

    fn extents(&mut self, unit: Unit, _: usize, into: &mut Vec<Extent>) -> Answer {
        let answer = self.answer(unit, What::Holes);
        if answer == Answer::Done {
            into.extend_from_slice(&self.holes);
        }
        answer
    }
}

fn exports() -> Arc<Exports> {
    let export = |name: &str, base: u64, size: u64, read_only| Export {
        name: name.into(),
        description: format!("what {name} is").into(),
        base,
        size,
        segment: SEGMENT,
        read_only,
        newest: None,
    };
    let all = vec![
        export("all", 0, 3 * SEGMENT, false),
        export("server-1", SEGMENT, SEGMENT, false),
        export("fixed", 0, 4096, true),
    ];
    Arc::new(Exports::new(all).expect("exports"))
}

/// No multiple of a stripe, so that stripes end at odd places.
const SEGMENT: u64 = 5 * NBD_PIECE + 4096;

/// A client: what it sends, what it has been sent, and the session between.
struct Client {
    session: Session,
    memory: Memory,
    /// Sent and not yet taken.
    input: Vec<u8>,
    out: Vec<u8>,
    /// Received.
    got: VecDeque<u8>,
    next: Next,
    /// Bytes that a call is given at most, and that are sent to the client after it.
    grain: usize,
}

const FIXED: u32 = 1;
const NO_ZEROES: u32 = 2;

impl Client {
    fn new() -> Self {
        Self {
            session: Session::new(exports()),
            memory: Memory::new(3 * SEGMENT as usize),
            input: Vec::new(),
            out: Vec::new(),
            got: VecDeque::new(),
            next: Next::Turn,
            grain: usize::MAX,
        }
    }

    /// In transmission on `name`, with structured replies and the context if wished.
    fn connected(name: &str, structured: bool) -> Self {
        let mut client = Self::new();
        client.greet(FIXED | NO_ZEROES);
        if structured {
            client.option(8, &[]);
            client.replies_of(8);
            client.option(10, &contexts(name, &["base:allocation"]));
            client.replies_of(10);
        }
        client.option(7, &choice(name, &[]));
        let replies = client.replies_of(7);
        assert_eq!(replies.last().map(|reply| reply.0), Some(1), "accepted");
        client
    }

    fn greet(&mut self, flags: u32) {
        self.send(&flags.to_be_bytes());
        assert_eq!(self.take(18), b"NBDMAGICIHAVEOPT\x00\x03");
    }

    fn send(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
        self.run();
    }

    /// Goes on until the session waits for something that is not there.
    fn run(&mut self) {
        let mut offered = 0;
        loop {
            offered = offered.max(match self.next {
                Next::Input(needed) => needed,
                _ => 0,
            });
            if self.out.len() as u64 >= NBD_REPLIES {
                let sent = self.out.len().min(self.grain);
                self.got.extend(self.out.drain(..sent));
                continue;
            }
            let most = offered.saturating_add(self.grain).min(self.input.len());
            offered = 0;
            let advanced =
                self.session
                    .advance(&self.input[..most], &mut self.out, &mut self.memory);
            assert!(advanced.consumed <= most);
            self.input.drain(..advanced.consumed);
            let bound = NBD_REPLIES + NBD_STAGED + 2 * NBD_PIECE;
            assert!((self.out.len() as u64) < bound, "replies pile up");
            let (_, staged) = self.session.waiting();
            assert!(staged <= NBD_STAGED + (1 << 20), "{staged} bytes staged");
            let sent = self.out.len().min(self.grain);
            self.got.extend(self.out.drain(..sent));
            self.next = advanced.next;
            let stuck = match self.next {
                Next::Input(needed) => {
                    assert!(needed > 0 && needed <= NBD_PIECE as usize, "asks {needed}");
                    needed > self.input.len() && advanced.consumed == 0
                }
                Next::More | Next::Turn => false,
                Next::Completion | Next::Close(_) => advanced.consumed == 0,
            };
            if stuck {
                self.got.extend(self.out.drain(..));
                return;
            }
        }
    }

    /// Carries out the unit at `index` of those that are kept.
    fn complete(&mut self, index: usize) {
        let kept = self.memory.kept.remove(index).expect("something is kept");
        if self.memory.fails {
            self.session
                .completed(kept.unit, Err(Failure::Io), &mut self.out);
        } else if let What::Holes = kept.what {
            let holes = self.memory.holes.clone();
            self.session.told(kept.unit, holes, &mut self.out);
        } else {
            let bytes = self.memory.carry_out(kept.unit, kept.what);
            self.session.completed(kept.unit, Ok(&bytes), &mut self.out);
        }
        self.next = Next::Turn;
        self.run();
    }

    fn complete_all(&mut self) {
        while !self.memory.kept.is_empty() {
            self.complete(0);
        }
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        assert!(self.got.len() >= len, "{} of {len} bytes", self.got.len());
        self.got.drain(..len).collect()
    }

    fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().expect("2 bytes"))
    }

    fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().expect("4 bytes"))
    }

    fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().expect("8 bytes"))
    }

    fn option(&mut self, number: u32, data: &[u8]) {
        self.option_of(number, data.len() as u32, data);
    }

    fn option_of(&mut self, number: u32, len: u32, data: &[u8]) {
        let header = [&number.to_be_bytes()[..], &len.to_be_bytes()].concat();
        self.send(&[b"IHAVEOPT", &header[..], data].concat());
    }

    /// The replies to one option, up to the one that is final.
    fn replies_of(&mut self, number: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.take_u64(), 0x0003_e889_0455_65a9);
            assert_eq!(self.take_u32(), number);
            let kind = self.take_u32();
            let len = self.take_u32();
            replies.push((kind, self.take(len as usize)));
            if kind == 1 || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    fn request(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
        let request = request(flags, command, cookie, offset, len);
        self.send(&request);
    }

    /// All replies that have arrived, whole, by their cookies.
    fn replies(&mut self, reads: &BTreeMap<u64, (u64, u32)>) -> BTreeMap<u64, Reply> {
        let mut replies: BTreeMap<u64, Reply> = BTreeMap::new();
        while !self.got.is_empty() {
            let magic = self.take_u32();
            if magic == 0x6744_6698 {
                let error = self.take_u32();
                let cookie = self.take_u64();
                let mut reply = Reply {
                    error,
                    done: true,
                    ..Reply::default()
                };
                if let (0, Some((_, len))) = (error, reads.get(&cookie)) {
                    reply.data = self.take(*len as usize);
                }
                assert!(replies.insert(cookie, reply).is_none(), "{cookie} twice");
                continue;
            }
            assert_eq!(magic, 0x668e_33ef);
            self.chunk(reads, &mut replies);
        }
        replies
    }

    fn chunk(&mut self, reads: &BTreeMap<u64, (u64, u32)>, replies: &mut BTreeMap<u64, Reply>) {
        let (flags, kind) = (self.take_u16(), self.take_u16());
        let (cookie, len) = (self.take_u64(), self.take_u32());
        let reply = replies.entry(cookie).or_default();
        assert!(!reply.done, "a chunk behind the last one");
        reply.done = flags == 1;
        reply.chunks += 1;
        match kind {
            0 => assert!(reply.done && len == 0),
            1 => {
                let offset = self.take_u64();
                let bytes = self.take(len as usize - 8);
                let (start, whole) = reads[&cookie];
                assert!(offset >= start && !bytes.is_empty());
                let at = (offset - start) as usize;
                assert!(at + bytes.len() <= whole as usize);
                let reply = replies.get_mut(&cookie).expect("there");
                reply.data.resize(whole as usize, 0);
                reply.data[at..at + bytes.len()].copy_from_slice(&bytes);
                reply.filled += bytes.len();
            }
            5 => {
                assert_eq!(self.take_u32(), 1, "the context's number");
                assert!(len > 4 && (len - 4).is_multiple_of(8));
                let extents = (0..(len - 4) / 8)
                    .map(|_| (self.take_u32(), self.take_u32()))
                    .collect();
                replies.get_mut(&cookie).expect("there").extents = extents;
            }
            0x8001 => {
                let error = self.take_u32();
                let text = self.take_u16();
                assert_eq!(len, 6 + u32::from(text));
                let text = self.take(text.into());
                assert!(std::str::from_utf8(&text).is_ok() && error > 0);
                replies.get_mut(&cookie).expect("there").error = error;
            }
            other => panic!("a chunk of type {other}"),
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Reply {
    error: u32,
    done: bool,
    chunks: u32,
    filled: usize,
    data: Vec<u8>,
    extents: Vec<(u32, u32)>,
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    [
        &0x2560_9513_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn choice(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = text(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|info| info.to_be_bytes()));
    data
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = text(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| text(query)));
    data
}
