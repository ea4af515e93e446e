//! The ring against a plain queue: same frames, same order, nothing overwritten.

use std::cell::RefCell;
use std::collections::VecDeque;

use proptest::prelude::*;

use super::layout::{FrameHeader, HEADER_BYTES};
use super::ring::*;

/// A ring in plain memory with both ends of it.
struct Model {
    size: u64,
    headers: RefCell<std::collections::BTreeMap<u64, FrameHeader>>,
    /// Which frame a byte belongs to that is not free, 0 for none.
    owner: Vec<u64>,
    free: u64,
    write_pos: u64,
    read_pos: u64,
    written: u64,
    sequence: u64,
    cursor: ReadCursor,
    queue: ReleaseQueue,
    /// What a queue would hold: sequence, length.
    expected: VecDeque<(u64, u64)>,
    held: Vec<(Found, u64)>,
}

impl Model {
    fn new(size: u64) -> Model {
        Model {
            size,
            headers: RefCell::default(),
            owner: vec![0; size as usize],
            free: size,
            write_pos: 0,
            read_pos: 0,
            written: 0,
            sequence: 1,
            cursor: ReadCursor::new(size),
            queue: ReleaseQueue::default(),
            expected: VecDeque::new(),
            held: Vec::new(),
        }
    }

    fn put(&mut self, at: u64, len: u64, header: FrameHeader) {
        let mut headers = self.headers.borrow_mut();
        let end = at + HEADER_BYTES + len;
        let stale: Vec<u64> = headers
            .range(at.saturating_sub(15)..end)
            .map(|(k, _)| *k)
            .collect();
        for key in stale {
            headers.remove(&key);
        }
        headers.insert(at, header);
    }

    /// Writes if there is room, as a writer does.
    fn write(&mut self, len: u64) -> bool {
        let Some(place) = place(self.size, self.write_pos, len) else {
            assert!(len + HEADER_BYTES > self.size);
            return false;
        };
        if self.free < place.need {
            return false;
        }
        assert!(place.need >= place.takes);
        if place.restart {
            assert_eq!(self.free, self.size);
            self.read_pos = 0;
        }
        if let Some(at) = place.marker {
            assert!(at + HEADER_BYTES <= self.size, "the marker has room");
            self.put(at, 0, FrameHeader::WRAP);
            self.written += 1;
        }
        let end = place.at + HEADER_BYTES + len;
        assert!(end <= self.size, "a frame lies within the ring");
        for byte in &mut self.owner[place.at as usize..end as usize] {
            assert_eq!(*byte, 0, "nothing is overwritten");
            *byte = self.sequence;
        }
        let header = FrameHeader {
            size: len,
            sequence: self.sequence,
        };
        self.put(place.at, len, header);
        self.write_pos = place.end;
        self.free -= place.takes;
        self.written += 1;
        self.expected.push_back((self.sequence, len));
        self.sequence += 1;
        true
    }

    fn header(&self, at: u64) -> FrameHeader {
        *self
            .headers
            .borrow()
            .get(&at)
            .expect("a header stands there")
    }

    fn read(&mut self) -> bool {
        let found = self
            .cursor
            .next(&mut self.queue, self.read_pos, self.free, |at| {
                *self
                    .headers
                    .borrow()
                    .get(&at)
                    .expect("a header stands there")
            })
            .expect("nothing is damaged");
        self.read_pos = self.cursor.pos();
        let given = self.queue.give_back();
        assert_eq!(given.frames, 0);
        self.free += given.bytes;
        let Some(found) = found else {
            assert!(self.expected.is_empty());
            assert_eq!(self.cursor.passed(), self.written);
            return false;
        };
        let (sequence, len) = self.expected.pop_front().expect("a frame was written");
        assert_eq!((found.sequence, found.len), (sequence, len));
        self.held.push((found, sequence));
        true
    }

    fn release(&mut self, which: usize) {
        if self.held.is_empty() {
            return;
        }
        let (found, sequence) = self.held.remove(which % self.held.len());
        let from = (found.at - HEADER_BYTES) as usize;
        for byte in &mut self.owner[from..(found.at + found.len) as usize] {
            assert_eq!(*byte, sequence, "a held frame is whole");
            *byte = 0;
        }
        // What is released early stays taken: the model's memory is free for it,
        // the ring's count is not.
        self.queue.release(found.ticket);
        let given = self.queue.give_back();
        self.free += given.bytes;
        assert!(self.free <= self.size);
        if self.held.is_empty() {
            assert_eq!(self.queue.held(), 0, "all is given back");
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64),
    Read,
    Release(usize),
}

fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..size / 3).prop_map(Step::Write),
        1 => (1..size).prop_map(Step::Write),
        1 => (size.saturating_sub(40).max(1)..size + 4).prop_map(Step::Write),
        4 => Just(Step::Read),
        4 => (0..8usize).prop_map(Step::Release),
    ];
    prop::collection::vec(step, 1..200)
}

fn run(size: u64, steps: &[Step]) {
    let mut model = Model::new(size);
    for step in steps {
        match step {
            Step::Write(len) => {
                model.write(*len);
            }
            Step::Read => {
                model.read();
            }
            Step::Release(which) => model.release(*which),
        }
    }
    while model.read() {}
    while !model.held.is_empty() {
        model.release(0);
    }
    assert_eq!(model.free, model.size, "an idle ring is empty");
    for len in [
        size - HEADER_BYTES,
        1,
        size - HEADER_BYTES - 1,
        size - HEADER_BYTES,
    ] {
        assert!(
            model.write(len),
            "an empty ring takes every frame that fits at all"
        );
        assert!(model.read());
        model.release(0);
    }
}

proptest! {
    #[test]
    fn it_is_a_queue(
        (size, steps) in (1..9u64).prop_map(|n| n * 64).prop_flat_map(|size| (Just(size), steps(size)))
    ) {
        run(size, &steps);
    }

    #[test]
    fn words_from_outside_never_lead_astray(
        read_pos in prop_oneof![0..300u64, any::<u64>()],
        free in prop_oneof![0..300u64, any::<u64>()],
        size in prop_oneof![0..300u64, any::<u64>()],
        sequence in prop_oneof![0..4u64, any::<u64>()],
        begin in 0..240u64,
    ) {
        let mut model = Model::new(256);
        if begin > 0 {
            model.write(begin);
            model.read();
            model.release(0);
        }
        let header = FrameHeader { size, sequence };
        let (mut cursor, mut queue) = (model.cursor, model.queue);
        for _ in 0..4 {
            match cursor.next(&mut queue, read_pos, free, |at| {
                assert!(at + HEADER_BYTES <= 256);
                header
            }) {
                Ok(Some(found)) => prop_assert!(found.at + found.len <= 256),
                Ok(None) => prop_assert!(queue.held() + free <= 256),
                Err(_) => break,
            }
        }
    }
}

#[test]
fn wrapping_at_every_offset() {
    const SIZE: u64 = 256;
    for first in 1..=SIZE - HEADER_BYTES {
        for second in 1..=SIZE - HEADER_BYTES {
            let mut model = Model::new(SIZE);
            for len in [first, second, first] {
                if !model.write(len) {
                    while model.read() {}
                    while !model.held.is_empty() {
                        model.release(0);
                    }
                    assert!(model.write(len), "{first} {second}");
                }
            }
            while model.read() {}
        }
    }
}

#[test]
fn no_tail_is_left_that_a_header_does_not_fit_into() {
    for size in [64u64, 128, 192, 256] {
        for pos in 0..size {
            if size - pos < HEADER_BYTES {
                continue;
            }
            for len in 1..=size - HEADER_BYTES {
                let place = place(size, pos, len).expect("it fits into an empty ring");
                let tail = size - place.end;
                assert!(
                    tail >= HEADER_BYTES || place.at == 0,
                    "{size} {pos} {len}: {place:?}"
                );
                assert!(place.need <= size);
            }
        }
    }
    // What has to leave one (a frame nearly as large as the ring) is followed by a
    // restart, so a reader never gets to it.
    let nearly = place(256, 0, 256 - 16 - 9).expect("it fits");
    assert_eq!(nearly.end, 247);
    assert!(place(256, 247, 1).expect("it fits").restart);
    assert_eq!(place(256, 0, 241), None);
    assert_eq!(place(256, 0, u64::MAX), None);
}

#[test]
fn a_tail_of_an_older_writer_is_passed_without_a_marker() {
    for tail in 1..HEADER_BYTES {
        let mut cursor = ReadCursor::new(256);
        let mut queue = ReleaseQueue::default();
        let first = FrameHeader {
            size: 256 - 16 - tail,
            sequence: 1,
        };
        let second = FrameHeader {
            size: 8,
            sequence: 2,
        };
        let found = cursor.next(&mut queue, 0, tail, |_| first);
        let found = found.expect("whole").expect("a frame");
        queue.release(found.ticket);
        assert_eq!(queue.give_back().bytes, 256 - tail);
        let found = cursor.next(&mut queue, 256 - tail, 256 - tail - 24, |at| {
            assert_eq!(at, 0);
            second
        });
        assert_eq!(found.expect("whole").expect("a frame").at, 16);
        assert_eq!(cursor.passed(), 3, "the tail counts as a marker does");
        assert_eq!(
            queue.give_back().bytes,
            tail,
            "nothing is held in front of it"
        );
    }
}

#[test]
fn what_is_released_early_waits() {
    let mut model = Model::new(256);
    for _ in 0..4 {
        assert!(model.write(32));
    }
    while model.read() {}
    for _ in 0..3 {
        model.release(1);
        assert_eq!(model.free, 256 - 4 * 48);
    }
    // The negative control: given back at once, these bytes would let a writer
    // overwrite the first frame, which is still held.
    assert!(model.owner[..48].iter().all(|owner| *owner == 1));
    model.queue.release(1 << 40);
    model.release(0);
    assert_eq!(model.free, 256);
    model.queue.release(0);
    assert_eq!(model.queue.give_back(), GivenBack::default());
}

#[test]
fn damage_is_named() {
    let next = |read_pos, free, size, sequence| {
        let header = FrameHeader { size, sequence };
        ReadCursor::new(256).next(&mut ReleaseQueue::default(), read_pos, free, |_| header)
    };
    assert!(matches!(next(0, 100, 140, 1), Ok(Some(_))));
    assert!(
        matches!(next(0, 256, 9, 9), Ok(None)),
        "nothing was written"
    );
    assert!(matches!(
        next(0, 100, 141, 1),
        Err(Damage::FrameLength { room: 156, .. })
    ));
    assert!(matches!(
        next(0, 100, u64::MAX, 1),
        Err(Damage::FrameLength { .. })
    ));
    assert!(matches!(
        next(0, 100, 8, 2),
        Err(Damage::Sequence { expected: 1, .. })
    ));
    assert!(matches!(next(0, 100, 0, 0), Err(Damage::Marker { at: 0 })));
    assert!(matches!(next(0, 257, 8, 1), Err(Damage::FreeBytes { .. })));
    assert!(matches!(next(1, 100, 8, 1), Err(Damage::Position { .. })));
}

#[test]
fn the_last_number_is_found_in_the_present_lap() {
    let mut model = Model::new(256);
    let last = |model: &Model| last_sequence(256, model.write_pos, |at| model.header(at));
    for turn in 0..500u64 {
        let len = 1 + turn * 37 % 100;
        while !model.write(len) {
            assert!(model.read());
            model.release(0);
        }
        let found = last(&model);
        assert_eq!(found, Some(model.sequence - 1), "turn {turn}");
    }
    let nonsense = FrameHeader {
        size: 1 << 63,
        sequence: 1,
    };
    assert_eq!(last_sequence(256, 64, |_| nonsense), None);
    assert_eq!(last_sequence(256, 64, |_| FrameHeader::WRAP), None);
    assert_eq!(last_sequence(256, 0, |_| FrameHeader::WRAP), None);
}
