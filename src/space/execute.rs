//! Carries operations out on a segment, one behind the other.
//!
//! ```text
//! request, body --> check whole --> stripes odd --> change --> stripes even --> reply
//!                       |
//!                       +--> a status that says what is wrong; nothing was changed
//! ```
//!
//! Invariants:
//! - I1: an operation is checked whole before the first byte changes: one that is refused
//!   has changed nothing, a batch included.
//! - I2: who runs it is one thread, so each operation is atomic with respect to all others
//!   that come this way; readers by mapping see each stripe of it whole or not at all.
//! - I3: nothing is allocated from a peer's number before it was compared with its limit.

use super::frame::{EXCHANGED, FrameError, Item, ItemResult, Operation, Reply, Request, Status};
use super::memory::Memory;
use super::stripes::Stripes;
use crate::limits::{MAX_SPACE_OPERATION, SPACE_STRIPE};
use crate::units::checked_range;

/// What was done since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Operations carried out, those in batches each for itself.
    pub operations: u64,
    /// Operations refused.
    pub refused: u64,
    /// Bytes copied out.
    pub read_bytes: u64,
    /// Bytes changed, the same ones each time.
    pub written_bytes: u64,
}

/// Carries out operations on one segment.
#[derive(Debug)]
pub struct Executor {
    stripes: Option<Stripes>,
    /// Number of the last operation that changed something.
    changes: u64,
    counts: Counts,
}

/// What an operation comes to, besides its bytes.
#[derive(Clone, Copy, Default)]
struct Outcome {
    value: u64,
    flags: u8,
}

impl Executor {
    /// With `stripes` where readers map the segment.
    pub fn new(stripes: Option<Stripes>) -> Self {
        Self {
            stripes,
            changes: 0,
            counts: Counts::default(),
        }
    }

    /// How many operations have changed something; the number of the last one.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The sequences that readers by mapping look at.
    pub fn stripes(&self) -> Option<&Stripes> {
        self.stripes.as_ref()
    }

    /// Carries out one request with its body and appends the body of its reply to `out`;
    /// nothing if it is refused. [`Operation::Stat`] and [`Operation::Holes`] are
    /// left to whoever knows the server.
    pub fn execute(
        &mut self,
        memory: &mut dyn Memory,
        request: &Request,
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Reply {
        let changes = request.operation.changes();
        if changes {
            memory.begin();
        }
        let outcome = match request.operation {
            Operation::Batch => self.batch(memory, request.len, body, out),
            operation => {
                let item = Item {
                    operation,
                    offset: request.offset,
                    len: request.len,
                    body,
                };
                check(memory.len(), &item).map(|()| {
                    self.changes += u64::from(operation.changes());
                    self.single(memory, &item, out)
                })
            }
        };
        if changes {
            memory.end();
        }
        let (status, outcome) = match outcome {
            Ok(outcome) => (Status::Done, outcome),
            Err(status) => {
                self.counts.refused += 1;
                (status, Outcome::default())
            }
        };
        Reply {
            id: request.id,
            epoch: 0,
            operation: request.operation,
            status,
            flags: outcome.flags,
            value: outcome.value,
        }
    }

    /// One operation that was checked.
    fn single(&mut self, memory: &mut dyn Memory, item: &Item<'_>, out: &mut Vec<u8>) -> Outcome {
        self.counts.operations += 1;
        let (offset, len) = (item.offset, u64::from(item.len));
        match item.operation {
            Operation::Read => {
                let from = out.len();
                out.resize(from + len as usize, 0);
                memory.read(offset, &mut out[from..]);
                self.counts.read_bytes += len;
                Outcome::default()
            }
            Operation::Write | Operation::Fill => {
                self.counts.written_bytes += len;
                for (start, end) in pieces(offset, len) {
                    self.begin(start, end - start);
                    if item.operation == Operation::Write {
                        let of_body = (start - offset) as usize..(end - offset) as usize;
                        memory.write(start, &item.body[of_body]);
                    } else {
                        memory.fill(start, end - start, item.body[0]);
                    }
                    self.end(start, end - start);
                }
                memory.changed(offset, len);
                Outcome::default()
            }
            Operation::CompareExchange => {
                let found = memory.load_u64(offset);
                let exchanged = found == word(item.body, 0);
                if exchanged {
                    self.store(memory, offset, word(item.body, 8));
                }
                Outcome {
                    value: found,
                    flags: if exchanged { EXCHANGED } else { 0 },
                }
            }
            Operation::FetchAdd => {
                let value = memory.load_u64(offset);
                self.store(memory, offset, value.wrapping_add(word(item.body, 0)));
                Outcome { value, flags: 0 }
            }
            Operation::Batch | Operation::Stat | Operation::Ping | Operation::Holes => {
                Outcome::default()
            }
        }
    }

    fn store(&mut self, memory: &mut dyn Memory, offset: u64, value: u64) {
        self.begin(offset, 8);
        memory.store_u64(offset, value);
        self.end(offset, 8);
        memory.changed(offset, 8);
        self.counts.written_bytes += 8;
    }

    fn begin(&self, offset: u64, len: u64) {
        if let Some(stripes) = &self.stripes {
            stripes.begin(offset, len);
        }
    }

    fn end(&self, offset: u64, len: u64) {
        if let Some(stripes) = &self.stripes {
            stripes.end(offset, len);
        }
    }

    fn batch(
        &mut self,
        memory: &mut dyn Memory,
        count: u32,
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Outcome, Status> {
        let mut changes = false;
        let mut moved = 0;
        if count == 0 && !body.is_empty() {
            return Err(Status::Malformed);
        }
        for item in all(count, body)? {
            let item = item.map_err(|_| Status::Malformed)?;
            check(memory.len(), &item)?;
            changes |= item.operation.changes();
            // What is written has come with the request, whose body is bounded.
            if matches!(item.operation, Operation::Read | Operation::Fill) {
                moved += u64::from(item.len);
            }
        }
        if moved > MAX_SPACE_OPERATION {
            return Err(Status::TooLong);
        }
        self.changes += u64::from(changes);
        // Each stripe is left odd until the last item is done: nobody reads in between.
        // What was found whole above is so still.
        for item in all(count, body)?.flatten() {
            self.raise(&item);
        }
        let mut bytes = Vec::new();
        for item in all(count, body)?.flatten() {
            bytes.clear();
            let outcome = self.in_batch(memory, &item, &mut bytes);
            let result = ItemResult {
                value: outcome.value,
                flags: outcome.flags,
                body: &bytes,
            };
            result.append_to(out);
        }
        for item in all(count, body)?.flatten() {
            if item.operation.changes() {
                self.end(item.offset, item.len.into());
            }
        }
        Ok(Outcome::default())
    }

    fn raise(&self, item: &Item<'_>) {
        if item.operation.changes() {
            self.begin(item.offset, item.len.into());
        }
    }

    /// An item of a batch, whose stripes stay as they were raised.
    fn in_batch(
        &mut self,
        memory: &mut dyn Memory,
        item: &Item<'_>,
        bytes: &mut Vec<u8>,
    ) -> Outcome {
        let stripes = self.stripes.take();
        let outcome = self.single(memory, item, bytes);
        self.stripes = stripes;
        outcome
    }
}

fn all(
    count: u32,
    body: &[u8],
) -> Result<impl Iterator<Item = Result<Item<'_>, FrameError>>, Status> {
    super::frame::items(count, body).map_err(|_| Status::Malformed)
}

/// Whether an operation can be carried out; a body as its operation has it is taken for
/// granted.
fn check(size: u64, item: &Item<'_>) -> Result<(), Status> {
    let len = u64::from(item.len);
    match item.operation {
        Operation::Stat | Operation::Ping => return Ok(()),
        Operation::Batch | Operation::Holes => return Err(Status::Malformed),
        _ if len > MAX_SPACE_OPERATION => return Err(Status::TooLong),
        Operation::CompareExchange | Operation::FetchAdd
            if len != 8 || !item.offset.is_multiple_of(8) =>
        {
            return Err(Status::Misaligned);
        }
        _ => {}
    }
    checked_range(item.offset, len, size).map_err(|_| Status::OutOfRange)?;
    Ok(())
}

/// A range in pieces that each lie in one stripe.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut at, end) = (offset, offset + len);
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / SPACE_STRIPE + 1) * SPACE_STRIPE);
        (start < end).then_some((start, at))
    })
}

/// The word at `at` of a body that is long enough for its operation.
fn word(body: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    if let Some(found) = body.get(at..at + 8) {
        bytes.copy_from_slice(found);
    }
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::frame::{Incarnation, item_results};
    use super::*;

    const SIZE: u64 = 3 * SPACE_STRIPE;

    fn request(operation: Operation, offset: u64, len: u32) -> Request {
        Request {
            id: 9,
            epoch: 0,
            operation,
            offset,
            len,
        }
    }

    struct Server {
        executor: Executor,
        memory: Vec<u8>,
    }

    impl Server {
        fn new() -> Self {
            let stripes = Stripes::create(SIZE, Incarnation(1)).expect("stripes");
            Self {
                executor: Executor::new(Some(stripes)),
                memory: vec![0; SIZE as usize],
            }
        }

        fn ask(&mut self, request: Request, body: &[u8]) -> (Reply, Vec<u8>) {
            let mut out = b"before".to_vec();
            let reply = self
                .executor
                .execute(&mut self.memory, &request, body, &mut out);
            assert_eq!((reply.id, reply.operation), (9, request.operation));
            assert_eq!(&out[..6], b"before");
            (reply, out.split_off(6))
        }

        fn stripes_are_even(&self) -> bool {
            let stripes = self.executor.stripes().expect("made with them");
            let mapped = super::super::stripes::MappedStripes::open(&stripes.descriptor(), SIZE);
            let fd = crate::sys::memfd::create("data", SIZE).expect("memfd");
            let map =
                crate::sys::map::Mapping::shared(&fd, SIZE, crate::sys::map::Access::ReadOnly);
            let data = crate::shm::SharedMemory::new(map.expect("map"));
            let mut all = vec![0; SIZE as usize];
            mapped
                .expect("opened")
                .read(&data, 0, &mut all, 1)
                .expect("within")
        }
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn each_operation_does_what_it_says() {
        let mut server = Server::new();
        let over = SPACE_STRIPE - 2;
        let (reply, body) = server.ask(request(Operation::Write, over, 4), b"abcd");
        assert_eq!((reply.status, body.len()), (Status::Done, 0));
        let (_, body) = server.ask(request(Operation::Read, over - 1, 6), b"");
        assert_eq!(body, b"\0abcd\0");
        server.ask(request(Operation::Fill, 0, 3), b"x");
        let (_, body) = server.ask(request(Operation::Read, 0, 4), b"");
        assert_eq!(body, b"xxx\0");

        let (reply, _) = server.ask(request(Operation::FetchAdd, 16, 8), &words(&[u64::MAX]));
        assert_eq!(reply.value, 0);
        let (reply, _) = server.ask(request(Operation::FetchAdd, 16, 8), &words(&[3]));
        assert_eq!(reply.value, u64::MAX);
        let exchange = request(Operation::CompareExchange, 16, 8);
        let (reply, _) = server.ask(exchange, &words(&[7, 8]));
        assert_eq!((reply.value, reply.flags), (2, 0));
        let (reply, _) = server.ask(exchange, &words(&[2, 8]));
        assert_eq!((reply.value, reply.flags), (2, EXCHANGED));
        assert_eq!(server.memory.load_u64(16), 8);
        let (reply, _) = server.ask(request(Operation::Ping, u64::MAX, 0), b"");
        assert_eq!(reply.status, Status::Done);
        assert_eq!(server.executor.changes(), 6);
        assert!(server.stripes_are_even());
    }

    #[test]
    fn what_cannot_be_done_changes_nothing() {
        let mut server = Server::new();
        let long = MAX_SPACE_OPERATION as u32 + 1;
        for (operation, offset, len, status) in [
            (Operation::Read, SIZE, 1, Status::OutOfRange),
            (Operation::Read, u64::MAX, 1, Status::OutOfRange),
            (Operation::Read, u64::MAX, u32::MAX, Status::TooLong),
            (Operation::Read, u64::MAX - 7, 0, Status::OutOfRange),
            (Operation::Write, SIZE - 1, 16, Status::OutOfRange),
            (Operation::Fill, u64::MAX - 15, 16, Status::OutOfRange),
            (Operation::Fill, 0, long, Status::TooLong),
            (Operation::FetchAdd, 4, 8, Status::Misaligned),
            (Operation::FetchAdd, 8, 4, Status::Misaligned),
            (Operation::FetchAdd, u64::MAX - 7, 8, Status::OutOfRange),
            (Operation::CompareExchange, SIZE, 8, Status::OutOfRange),
        ] {
            let (reply, body) = server.ask(request(operation, offset, len), &[0xEE; 16]);
            assert_eq!(reply.status, status, "{operation:?} {offset} {len}");
            assert!(body.is_empty());
        }
        assert_eq!(server.memory, vec![0; SIZE as usize]);
        assert_eq!(server.executor.changes(), 0);
        assert_eq!(server.executor.counts().refused, 11);
        let (reply, _) = server.ask(request(Operation::Read, SIZE, 0), b"");
        assert_eq!(reply.status, Status::Done, "nothing at the end");
    }

    fn batch(items: &[Item<'_>]) -> (Request, Vec<u8>) {
        let mut body = Vec::new();
        for item in items {
            item.append_to(&mut body);
        }
        (request(Operation::Batch, 0, items.len() as u32), body)
    }

    #[test]
    fn a_batch_is_carried_out_whole_or_not_at_all() {
        let mut server = Server::new();
        let add = words(&[5]);
        let item = |operation, offset, len, body| Item {
            operation,
            offset,
            len,
            body,
        };
        let mut items = vec![
            item(Operation::Write, 8, 3, &b"abc"[..]),
            item(Operation::FetchAdd, 64, 8, &add),
            item(Operation::Read, 6, 7, b""),
        ];
        let (request, body) = batch(&items);
        let (reply, body) = server.ask(request, &body);
        assert_eq!(reply.status, Status::Done);
        let results: Result<Vec<_>, _> = item_results(3, &body).expect("three").collect();
        let results = results.expect("whole");
        assert_eq!(results[2].body, b"\0\0abc\0\0");
        assert_eq!(server.memory.load_u64(64), 5);
        assert!(server.stripes_are_even());
        let before = server.memory.clone();

        items.push(item(Operation::Read, SIZE, 1, b""));
        let (request, body) = batch(&items);
        let (reply, out) = server.ask(request, &body);
        assert_eq!((reply.status, out.len()), (Status::OutOfRange, 0));
        let mut wrong = request;
        wrong.len = 3;
        assert_eq!(server.ask(wrong, &body).0.status, Status::Malformed);
        wrong.len = 65;
        assert_eq!(server.ask(wrong, &body).0.status, Status::Malformed);
        wrong.len = 0;
        assert_eq!(server.ask(wrong, &body).0.status, Status::Malformed);
        assert_eq!(server.ask(wrong, b"").0.status, Status::Done);
        let most = MAX_SPACE_OPERATION as u32 / 8;
        let reads = [item(Operation::Read, 0, most, b""); 9];
        let (request, body) = batch(&reads);
        assert_eq!(server.ask(request, &body).0.status, Status::TooLong);
        // A fill of many stripes takes a few bytes to ask for.
        let fills = [item(Operation::Fill, 0, SIZE as u32, b"x"); 6];
        let (request, body) = batch(&fills);
        assert_eq!(server.ask(request, &body).0.status, Status::TooLong);
        assert_eq!(server.memory, before);
    }

    fn any_operation() -> impl Strategy<Value = (Operation, u64, u32, Vec<u8>)> {
        let offset = prop_oneof![
            0..SIZE + 20,
            (0..4u64).prop_flat_map(|at| {
                let edge = at * SPACE_STRIPE;
                edge.saturating_sub(9)..edge + 9
            }),
            (0..SIZE / 8).prop_map(|word| word * 8),
            u64::MAX - 20..=u64::MAX,
        ];
        let operation = prop_oneof![
            Just(Operation::Read),
            Just(Operation::Write),
            Just(Operation::Fill),
            Just(Operation::CompareExchange),
            Just(Operation::FetchAdd),
        ];
        let len = prop_oneof![Just(8u32), 0..200u32, 60_000..70_000u32];
        (operation, offset, len, any::<u8>()).prop_map(|(operation, offset, len, seed)| {
            let body = match operation {
                Operation::Write => (0..len).map(|at| seed.wrapping_add(at as u8)).collect(),
                Operation::Fill => vec![seed],
                Operation::CompareExchange => words(&[u64::from(seed % 2), 1]),
                Operation::FetchAdd => words(&[u64::from(seed)]),
                _ => Vec::new(),
            };
            (operation, offset, len, body)
        })
    }

    proptest! {
        /// A vector and the plainest code are the model.
        #[test]
        fn it_does_what_a_vector_does(
            operations in prop::collection::vec(any_operation(), 1..30),
        ) {
            let mut server = Server::new();
            let mut model = vec![0u8; SIZE as usize];
            for (operation, offset, len, body) in operations {
                let (reply, out) = server.ask(request(operation, offset, len), &body);
                let atomic = matches!(operation, Operation::CompareExchange | Operation::FetchAdd);
                let end = u128::from(offset) + u128::from(len);
                let expected = if atomic && (len != 8 || offset % 8 != 0) {
                    Status::Misaligned
                } else if end > u128::from(SIZE) {
                    Status::OutOfRange
                } else {
                    Status::Done
                };
                prop_assert_eq!(reply.status, expected);
                if expected != Status::Done {
                    continue;
                }
                let place = &mut model[offset as usize..end as usize];
                match operation {
                    Operation::Read => prop_assert_eq!(&out, place),
                    Operation::Write => place.copy_from_slice(&body),
                    Operation::Fill => place.fill(body[0]),
                    _ => {
                        let found = word(place, 0);
                        prop_assert_eq!(reply.value, found);
                        if operation == Operation::FetchAdd {
                            let sum = found.wrapping_add(word(&body, 0));
                            place.copy_from_slice(&sum.to_le_bytes());
                        } else if found == word(&body, 0) {
                            place.copy_from_slice(&body[8..]);
                        }
                    }
                }
            }
            prop_assert_eq!(&server.memory, &model);
            prop_assert!(server.stripes_are_even());
        }
    }
}
