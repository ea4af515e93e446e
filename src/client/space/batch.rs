//! Several operations in one request for each server.

use super::error::{BatchError, SpaceError};
use crate::limits;
use crate::space::SpaceMap;
use crate::space::frame::{EXCHANGED, Item, ItemResult, Operation};
use crate::units::checked_range;

/// Operations that are sent together. Those on one server are carried out one behind the
/// other with nothing between, all of them or none; servers know nothing of each other.
///
/// At most 64 of them and 1 MiB in all, read, written and filled; none over two servers.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    items: Vec<Planned>,
}

#[derive(Clone, Debug)]
struct Planned {
    operation: Operation,
    offset: u64,
    len: u64,
    body: Vec<u8>,
}

/// What an operation of a batch came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BatchAnswer {
    /// A write or a fill was made.
    Done,
    /// What was read.
    Bytes(Vec<u8>),
    /// A compare-exchange: the value that was there, as a failure if it was not the
    /// expected one.
    Exchanged(Result<u64, u64>),
    /// A fetch-add: what was there before.
    Value(u64),
}

impl Batch {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads `len` bytes.
    pub fn read(&mut self, offset: u64, len: u64) -> &mut Self {
        self.add(Operation::Read, offset, len, Vec::new())
    }

    /// Writes `bytes`.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> &mut Self {
        self.add(Operation::Write, offset, bytes.len() as u64, bytes.into())
    }

    /// Sets `len` bytes to `byte`.
    pub fn fill(&mut self, offset: u64, len: u64, byte: u8) -> &mut Self {
        self.add(Operation::Fill, offset, len, vec![byte])
    }

    /// Replaces the 8 bytes at `offset`, a little-endian number, if they are `expected`.
    pub fn compare_exchange(&mut self, offset: u64, expected: u64, new: u64) -> &mut Self {
        let body = [expected.to_le_bytes(), new.to_le_bytes()].concat();
        self.add(Operation::CompareExchange, offset, 8, body)
    }

    /// Adds to the 8 bytes at `offset`, a little-endian number, wrapping around.
    pub fn fetch_add(&mut self, offset: u64, addend: u64) -> &mut Self {
        self.add(Operation::FetchAdd, offset, 8, addend.to_le_bytes().into())
    }

    /// How many operations it has.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn add(&mut self, operation: Operation, offset: u64, len: u64, body: Vec<u8>) -> &mut Self {
        self.items.push(Planned {
            operation,
            offset,
            len,
            body,
        });
        self
    }
}

/// One server's share of a batch.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) server: u32,
    pub(super) items: u32,
    /// Where its body ends among those of all shares; it begins where the one before ends.
    pub(super) end: usize,
    /// First address, for reports.
    pub(super) address: u64,
}

/// A batch as it is sent.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) shares: Vec<Share>,
    pub(super) bodies: Vec<u8>,
    pub(super) changes: bool,
    /// Of each item in the caller's order: server and operation.
    order: Vec<(u32, Operation)>,
}

impl Plan {
    /// # Errors
    /// Items beyond the end, misaligned, over two servers, too many or too long.
    pub(super) fn of(batch: &Batch, map: &SpaceMap) -> Result<Self, SpaceError> {
        let count = batch.items.len();
        if count == 0 || count as u64 > limits::MAX_SPACE_BATCH {
            return Err(BatchError::Count { count }.into());
        }
        let mut placed = Vec::with_capacity(count);
        let mut bytes: u64 = 0;
        for (index, item) in batch.items.iter().enumerate() {
            checked_range(item.offset, item.len, map.size())?;
            check_alignment(item.operation, item.offset)?;
            let at = map.locate(item.offset.min(map.size() - 1))?;
            // Sums of lengths that each lie within the space.
            bytes = bytes.saturating_add(item.len);
            if at.offset + item.len > map.segment_size() {
                return Err(BatchError::Crosses { index }.into());
            }
            if bytes > limits::MAX_SPACE_OPERATION {
                return Err(BatchError::TooLong { bytes }.into());
            }
            placed.push((at.server as u32, at.offset, item));
        }
        let mut plan = Self {
            shares: Vec::new(),
            bodies: Vec::new(),
            changes: batch.items.iter().any(|item| item.operation.changes()),
            order: placed.iter().map(|(s, _, i)| (*s, i.operation)).collect(),
        };
        for (server, _, first) in &placed {
            if plan.shares.iter().any(|share| share.server == *server) {
                continue;
            }
            let of_it = placed.iter().filter(|(at, _, _)| at == server);
            let mut items = 0;
            for (_, offset, item) in of_it {
                items += 1;
                Item {
                    operation: item.operation,
                    offset: *offset,
                    len: item.len as u32,
                    body: &item.body,
                }
                .append_to(&mut plan.bodies);
            }
            plan.shares.push(Share {
                server: *server,
                items,
                end: plan.bodies.len(),
                address: first.offset,
            });
        }
        Ok(plan)
    }

    /// The answers in the caller's order; none if the replies do not answer it.
    pub(super) fn answers(&self, replies: &[(u32, Vec<u8>)]) -> Option<Vec<BatchAnswer>> {
        let mut results = Vec::with_capacity(self.shares.len());
        for share in &self.shares {
            let (_, body) = replies.iter().find(|(server, _)| *server == share.server)?;
            let items = crate::space::frame::item_results(share.items, body).ok()?;
            let items: Vec<ItemResult<'_>> = items.collect::<Result<_, _>>().ok()?;
            results.push((share.server, items.into_iter()));
        }
        let mut answers = Vec::with_capacity(self.order.len());
        for (server, operation) in &self.order {
            let (_, items) = results.iter_mut().find(|(at, _)| at == server)?;
            let found = items.next()?;
            answers.push(match operation {
                Operation::Read => BatchAnswer::Bytes(found.body.to_vec()),
                Operation::CompareExchange if found.flags & EXCHANGED != 0 => {
                    BatchAnswer::Exchanged(Ok(found.value))
                }
                Operation::CompareExchange => BatchAnswer::Exchanged(Err(found.value)),
                Operation::FetchAdd => BatchAnswer::Value(found.value),
                _ => BatchAnswer::Done,
            });
        }
        Some(answers)
    }
}

/// # Errors
/// [`SpaceError::Misaligned`] for 8 bytes at another address than a multiple of 8.
pub(super) fn check_alignment(operation: Operation, offset: u64) -> Result<(), SpaceError> {
    let aligned = matches!(operation, Operation::CompareExchange | Operation::FetchAdd);
    if aligned && !offset.is_multiple_of(8) {
        return Err(SpaceError::Misaligned { offset });
    }
    Ok(())
}
