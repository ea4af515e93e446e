//! Total order by agreement (Skeen's algorithm; Birman and Joseph 1987): each subscriber
//! proposes a time, the initiator takes one greater than all of them, and everybody
//! delivers in the order of these times.
//!
//! ```text
//! initiator      clock += 1;  Request(clock)  ------------>  clock = max(clock, time) + 1
//!                                                            proposal = clock
//!                max of all + 1 = time        <-- Proposal
//!                clock = max(clock, time)     -- Commit -->  clock = max(clock, time)
//! ```
//!
//! The queue holds each operation under the least key that it can still get: its proposal
//! plus one while it is undecided, its final key afterwards. The first of the queue is
//! delivered if it is decided, since nothing can come before it: undecided ones are
//! behind it by their least key, and later ones get times above the clock, which the
//! commit raised.

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;

use super::frame::Message;
use super::ids::{OperationId, OrderKey, ProcessId, VariableId};
use super::refusal::Refusal;
use super::rules::Rules;
use super::subscriptions::Variable;
use super::value::Operation;
use crate::limits::{ORDERED_CLOCK_JUMP, ORDERED_TIME_CEILING};

/// What an event leads to, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// To one process.
    Send(ProcessId, Message),
    /// To all subscribers of the variable but this process.
    Spread(VariableId, Message),
    /// The next operation of the order.
    Deliver(OrderKey, VariableId, Operation),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pending {
    variable: VariableId,
    operation: Operation,
    proposal: u64,
    decided: Option<u64>,
}

/// An own operation whose proposals are collected.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Voting {
    /// Bits of the subscribers whose proposals are missing.
    missing: u32,
    highest: u64,
    acknowledge: bool,
}

/// Clock, queue and open votes of one process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Skeen<R> {
    me: ProcessId,
    clock: u64,
    pending: BTreeMap<OperationId, Pending>,
    /// The least key of each pending operation.
    queue: BTreeSet<OrderKey>,
    voting: BTreeMap<OperationId, Voting>,
    rules: PhantomData<R>,
}

impl<R: Rules> Skeen<R> {
    /// A process whose keys are later than `clock`.
    pub(super) fn new(me: ProcessId, clock: u64) -> Self {
        Self {
            me,
            clock,
            pending: BTreeMap::new(),
            queue: BTreeSet::new(),
            voting: BTreeMap::new(),
            rules: PhantomData,
        }
    }

    pub(super) fn clock(&self) -> u64 {
        self.clock
    }

    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Begins an own operation.
    pub(super) fn submit(
        &mut self,
        id: OperationId,
        variable: &Variable,
        operation: Operation,
        acknowledge: bool,
        out: &mut Vec<Effect>,
    ) {
        self.clock += 1;
        let request = Message::Request {
            id,
            variable: variable.id,
            operation: operation.clone(),
            time: self.clock,
        };
        out.push(Effect::Spread(variable.id, request));
        let time = self.propose(id, variable.id, operation, self.clock);
        let own = variable.bit(self.me).unwrap_or(0);
        let voting = Voting {
            missing: variable.bits() & !own,
            highest: time,
            acknowledge,
        };
        self.voting.insert(id, voting);
        self.decide(id, out);
    }

    /// A request of a peer; the caller has checked who may send what.
    pub(super) fn request(
        &mut self,
        from: ProcessId,
        (id, variable, operation): (OperationId, VariableId, Operation),
        time: u64,
        out: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        if self.pending.contains_key(&id) {
            return Err(Refusal::Operation { process: from, id });
        }
        self.check_time(from, time)?;
        let time = self.propose(id, variable, operation, time);
        out.push(Effect::Send(from, Message::Proposal { id, time }));
        Ok(())
    }

    /// A proposal for an own operation.
    pub(super) fn proposal(
        &mut self,
        from: ProcessId,
        variable_of: impl Fn(VariableId) -> Option<u32>,
        id: OperationId,
        time: u64,
        out: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.check_time(from, time)?;
        let unfit = Refusal::Operation { process: from, id };
        let pending = self.pending.get(&id).ok_or(unfit)?;
        let voting = self.voting.get_mut(&id).ok_or(unfit)?;
        let bit = variable_of(pending.variable).ok_or(unfit)?;
        if voting.missing & bit == 0 {
            return Err(unfit);
        }
        voting.missing &= !bit;
        voting.highest = voting.highest.max(time);
        self.decide(id, out);
        Ok(())
    }

    /// The initiator's decision.
    pub(super) fn commit(
        &mut self,
        from: ProcessId,
        id: OperationId,
        time: u64,
        out: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        self.check_time(from, time)?;
        let unfit = Refusal::Operation { process: from, id };
        let pending = self.pending.get(&id).ok_or(unfit)?;
        if pending.decided.is_some() {
            return Err(unfit);
        }
        if time <= pending.proposal {
            return Err(Refusal::Time {
                process: from,
                time,
                clock: pending.proposal,
            });
        }
        self.decided(id, time, out);
        Ok(())
    }

    /// Refuses a time that would bring the clock near its end, or far ahead at once.
    fn check_time(&self, from: ProcessId, time: u64) -> Result<(), Refusal> {
        let ahead = time.saturating_sub(self.clock);
        if ahead <= ORDERED_CLOCK_JUMP && time < ORDERED_TIME_CEILING {
            return Ok(());
        }
        Err(Refusal::Time {
            process: from,
            time,
            clock: self.clock,
        })
    }

    fn propose(
        &mut self,
        id: OperationId,
        variable: VariableId,
        operation: Operation,
        time: u64,
    ) -> u64 {
        self.clock = self.clock.max(time) + 1;
        let proposal = self.clock;
        let least = Self::place(id, proposal, proposal + 1);
        self.queue.insert(least);
        let pending = Pending {
            variable,
            operation,
            proposal,
            decided: None,
        };
        self.pending.insert(id, pending);
        proposal
    }

    /// Commits an own operation if no proposal is missing.
    fn decide(&mut self, id: OperationId, out: &mut Vec<Effect>) {
        let Some(voting) = self.voting.get(&id).filter(|voting| voting.missing == 0) else {
            return;
        };
        let (time, acknowledge) = (voting.highest + 1, voting.acknowledge);
        self.voting.remove(&id);
        if let Some(pending) = self.pending.get(&id) {
            let commit = Message::Commit {
                id,
                time,
                acknowledge,
            };
            out.push(Effect::Spread(pending.variable, commit));
        }
        self.decided(id, time, out);
    }

    fn decided(&mut self, id: OperationId, time: u64, out: &mut Vec<Effect>) {
        if R::COMMIT_RAISES_CLOCK {
            self.clock = self.clock.max(time);
        }
        if let Some(pending) = self.pending.get_mut(&id) {
            pending.decided = Some(time);
            let proposal = pending.proposal;
            self.queue.remove(&Self::place(id, proposal, proposal + 1));
            self.queue.insert(Self::place(id, proposal, time));
        }
        if !R::WAITS_ITS_TURN {
            self.deliver(Self::place(id, 0, time), id, out);
        } else if R::ONE_QUEUE {
            while self.deliver_first(|_| true, out) {}
        } else if let Some(variable) = self.pending.get(&id).map(|pending| pending.variable) {
            while self.deliver_first(|pending| pending.variable == variable, out) {}
        }
    }

    /// Delivers the first operation among `eligible` ones if it is decided.
    fn deliver_first(
        &mut self,
        eligible: impl Fn(&Pending) -> bool,
        out: &mut Vec<Effect>,
    ) -> bool {
        let pending = &self.pending;
        let mut queue = self
            .queue
            .iter()
            .map(|place| (place, Self::operation_at(pending, place)));
        let first = queue.find(|(_, found)| found.is_some_and(|(_, pending)| eligible(pending)));
        let Some((&place, Some((id, first)))) = first else {
            return false;
        };
        if first.decided.is_none() {
            return false;
        }
        self.deliver(place, id, out);
        true
    }

    fn deliver(&mut self, place: OrderKey, id: OperationId, out: &mut Vec<Effect>) {
        let Some(pending) = self.pending.remove(&id) else {
            return;
        };
        let time = pending.decided.unwrap_or(place.time);
        self.queue.remove(&Self::place(id, pending.proposal, time));
        let key = OrderKey { time, id };
        out.push(Effect::Deliver(key, pending.variable, pending.operation));
    }

    /// The key that orders the queue.
    fn place(id: OperationId, proposal: u64, time: u64) -> OrderKey {
        if R::TIES_BY_ID {
            return OrderKey { time, id };
        }
        // Proposals of a process rise, so they tell the order of arrival.
        let arrival = OperationId {
            number: proposal,
            ..OperationId::default()
        };
        OrderKey { time, id: arrival }
    }

    fn operation_at<'a>(
        pending: &'a BTreeMap<OperationId, Pending>,
        place: &OrderKey,
    ) -> Option<(OperationId, &'a Pending)> {
        if R::TIES_BY_ID {
            return Some((place.id, pending.get(&place.id)?));
        }
        let arrived = |pending: &Pending| pending.proposal == place.id.number;
        let found = pending.iter().find(|(_, pending)| arrived(pending))?;
        Some((*found.0, found.1))
    }
}
