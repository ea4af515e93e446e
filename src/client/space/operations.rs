//! Operations under way: what each waits for, where its bytes are, how its parts went.
//!
//! ```text
//! submit ──> open = 1 per server touched ──> lanes cut pieces off, open += 1 each
//!                                            reply or failure,     open -= 1 each
//!            open = 0: done, the answer waits to be taken
//! ```
//!
//! Invariants:
//! - I1: `open` is the number of runs in lanes and pieces sent that speak of the operation.
//! - I2: a ticket is used once: its serial number never comes again.
//! - I3: bytes of an operation are its own, or those of the call that waits for it; no reply
//!   finds a place once neither is there.

use std::ops::Range;
use std::time::Instant;

use slab::Slab;

use super::batch::Plan;
use super::error::Failure;
use crate::space::frame::{EXCHANGED, Operation, Reply};

/// An operation that was submitted; [`Space::wait`](super::Space::wait) gives its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    pub(super) serial: u64,
    pub(super) slot: usize,
}

/// One operation under way.
#[derive(Debug)]
pub(super) struct Underway {
    serial: u64,
    pub(super) operation: Operation,
    /// Whether it must not be sent again once it was sent.
    pub(super) changes: bool,
    /// First address, for reports.
    pub(super) address: u64,
    /// Destination of a read, body of a change; empty if they are the caller's.
    pub(super) bytes: Vec<u8>,
    /// Whether [`Lent`] has the bytes.
    pub(super) is_lent: bool,
    /// I1.
    pub(super) open: u32,
    /// Servers touched.
    pub(super) parts: usize,
    /// The last of them.
    pub(super) server: u32,
    /// How the replies to a batch are put together.
    pub(super) plan: Option<Box<Plan>>,
    /// At most one for each server: position, addresses, why.
    pub(super) failed: Vec<(u32, Range<u64>, Failure)>,
    /// Of the last reply.
    pub(super) value: u64,
    /// Of the last reply.
    pub(super) exchanged: bool,
    /// Bodies of replies that are none of a read: server, bytes.
    pub(super) bodies: Vec<(u32, Vec<u8>)>,
    /// When the caller gives up.
    pub(super) deadline: Instant,
    /// A reply came since the deadline was set.
    pub(super) moved: bool,
    was_prolonged: bool,
}

/// What is asked for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) operation: Operation,
    pub(super) changes: bool,
    pub(super) address: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) is_lent: bool,
    pub(super) deadline: Instant,
    pub(super) plan: Option<Box<Plan>>,
}

/// All operations under way, and the bytes that the present call lends.
#[derive(Debug)]
pub(super) struct Operations {
    slots: Slab<Underway>,
    serial: u64,
    /// Highest snapshot epoch that any reply named.
    pub(super) epoch: u64,
}

/// Bytes of the one operation whose caller waits: a read's destination, or a body.
pub(super) enum Lent<'a> {
    Nothing,
    Destination(&'a mut [u8]),
    Body(&'a [u8]),
}

impl Operations {
    pub(super) fn new() -> Self {
        Self {
            slots: Slab::new(),
            serial: 0,
            epoch: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn begin(&mut self, asked: Asked) -> Ticket {
        self.serial += 1;
        let serial = self.serial;
        let slot = self.slots.insert(Underway {
            serial,
            operation: asked.operation,
            changes: asked.changes,
            address: asked.address,
            bytes: asked.bytes,
            is_lent: asked.is_lent,
            open: 0,
            parts: 0,
            server: 0,
            plan: asked.plan,
            failed: Vec::new(),
            value: 0,
            exchanged: false,
            bodies: Vec::new(),
            deadline: asked.deadline,
            moved: false,
            was_prolonged: false,
        });
        Ticket { serial, slot }
    }

    pub(super) fn find(&self, ticket: Ticket) -> Option<&Underway> {
        let found = self.slots.get(ticket.slot)?;
        (found.serial == ticket.serial).then_some(found)
    }

    pub(super) fn find_mut(&mut self, ticket: Ticket) -> Option<&mut Underway> {
        let found = self.slots.get_mut(ticket.slot)?;
        (found.serial == ticket.serial).then_some(found)
    }

    pub(super) fn is_done(&self, ticket: Ticket) -> bool {
        self.find(ticket).is_none_or(|found| found.open == 0)
    }

    pub(super) fn remove(&mut self, ticket: Ticket) -> Option<Underway> {
        self.find(ticket)?;
        Some(self.slots.remove(ticket.slot))
    }

    /// One more run or piece speaks of it.
    pub(super) fn opened(&mut self, ticket: Ticket) {
        if let Some(found) = self.find_mut(ticket) {
            found.open += 1;
        }
    }

    /// One less.
    pub(super) fn closed(&mut self, ticket: Ticket) {
        if let Some(found) = self.find_mut(ticket) {
            found.open = found.open.saturating_sub(1);
        }
    }

    /// A piece was carried out.
    pub(super) fn answered(&mut self, ticket: Ticket, reply: &Reply) {
        if let Some(found) = self.find_mut(ticket) {
            found.open = found.open.saturating_sub(1);
            found.value = reply.value;
            found.exchanged = reply.flags & EXCHANGED != 0;
            found.moved = true;
        }
    }

    /// What became of a server's part. The first report of a part counts, but that an
    /// outcome is unknown counts more than any other.
    pub(super) fn failed(
        &mut self,
        ticket: Ticket,
        server: u32,
        addresses: Range<u64>,
        why: Failure,
    ) {
        let Some(found) = self.find_mut(ticket) else {
            return;
        };
        match found.failed.iter_mut().find(|part| part.0 == server) {
            None => found.failed.push((server, addresses, why)),
            Some((_, known, known_why)) => {
                known.start = known.start.min(addresses.start);
                known.end = known.end.max(addresses.end);
                let is_unknown = |why: &_| matches!(why, Failure::Indeterminate { .. });
                if is_unknown(&why) && !is_unknown(known_why) {
                    *known_why = why;
                }
            }
        }
    }

    pub(super) fn has_failed_at(&self, ticket: Ticket, server: u32) -> bool {
        self.find(ticket)
            .is_none_or(|found| found.failed.iter().any(|part| part.0 == server))
    }

    /// Nothing speaks of it any more: its caller gave up.
    pub(super) fn end(&mut self, ticket: Ticket) {
        if let Some(found) = self.find_mut(ticket) {
            found.open = 0;
        }
    }

    /// Tickets whose deadline has passed at `now`; the deadline of those to which a reply
    /// came since it was set is moved on by `patience` instead.
    pub(super) fn overdue(
        &mut self,
        now: Instant,
        patience: std::time::Duration,
        out: &mut Vec<Ticket>,
    ) {
        for (slot, found) in &mut self.slots {
            if found.open == 0 || now < found.deadline {
                continue;
            }
            if std::mem::take(&mut found.moved) {
                found.deadline = now + patience;
                continue;
            }
            let serial = found.serial;
            out.push(Ticket { serial, slot });
        }
    }

    /// The caller comes back after it did something else: what it left open has
    /// until `deadline` at least, once.
    pub(super) fn prolong(&mut self, deadline: Instant) {
        for (_, found) in &mut self.slots {
            if !std::mem::replace(&mut found.was_prolonged, true) {
                found.deadline = found.deadline.max(deadline);
            }
        }
    }

    /// The earliest deadline of what is open.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let open = self.slots.iter().filter(|(_, found)| found.open > 0);
        open.map(|(_, found)| found.deadline).min()
    }

    /// The body bytes `range` of a change, if they are still there.
    pub(super) fn body<'a>(
        &'a self,
        lent: &'a Lent<'_>,
        ticket: Ticket,
        range: Range<usize>,
    ) -> Option<&'a [u8]> {
        let found = self.find(ticket)?;
        let bytes: &[u8] = match lent {
            Lent::Body(bytes) if found.is_lent => bytes,
            _ => &found.bytes,
        };
        bytes.get(range)
    }

    /// Where bytes `range` of a read go, if there still is such a place.
    pub(super) fn destination<'a>(
        &'a mut self,
        lent: &'a mut Lent<'_>,
        ticket: Ticket,
        range: Range<usize>,
    ) -> Option<&'a mut [u8]> {
        let found = self.find_mut(ticket)?;
        let bytes: &mut [u8] = match lent {
            Lent::Destination(bytes) if found.is_lent => bytes,
            _ => &mut found.bytes,
        };
        bytes.get_mut(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::space::error::Unanswered;

    fn asked(operation: Operation) -> Asked {
        Asked {
            operation,
            changes: operation.changes(),
            address: 100,
            bytes: vec![1, 2, 3],
            is_lent: false,
            deadline: Instant::now(),
            plan: None,
        }
    }

    #[test]
    fn a_ticket_of_an_operation_that_is_gone_finds_nothing() {
        let mut operations = Operations::new();
        let first = operations.begin(asked(Operation::Write));
        assert!(operations.remove(first).is_some());
        let second = operations.begin(asked(Operation::Write));
        assert_eq!(first.slot, second.slot, "the slot is used again");
        assert!(operations.find(first).is_none());
        let body = |ticket| operations.body(&Lent::Nothing, ticket, 1..3);
        assert_eq!(body(second), Some(&[2, 3][..]));
        assert_eq!(body(first), None);
        assert_eq!(operations.body(&Lent::Nothing, second, 1..4), None);
    }

    #[test]
    fn an_unknown_outcome_counts_more_than_a_failure() {
        let mut operations = Operations::new();
        let ticket = operations.begin(asked(Operation::Write));
        operations.failed(ticket, 1, 110..120, Failure::TimedOut);
        let why = Unanswered::Connection;
        operations.failed(ticket, 1, 105..110, Failure::Indeterminate { why });
        operations.failed(ticket, 1, 120..130, Failure::TimedOut);
        let found = operations.remove(ticket).expect("under way");
        let [(1, range, Failure::Indeterminate { .. })] = &found.failed[..] else {
            panic!("{:?}", found.failed)
        };
        assert_eq!(*range, 105..130);
    }
}
