//! One link: what two processes say to each other arrives once and in order, over as
//! many connections as it takes.
//!
//! ```text
//!  sent and received:  1 2 3 4 | 5 6 7 | 8 ...
//!                      told ^    kept ^   ^ next
//! ```
//!
//! Messages are numbered from 1 and kept until the other side told their receipt, which
//! it does every `ORDERED_RECEIPT_EVERY` messages and at each hello. A connection begins
//! with a hello in each direction; then what the other side did not receive is sent
//! again. A hello of another life is never a resume.
//!
//! A process takes messages once it has greeted all of its peers, and begins operations
//! of its own once all of them said that they have, too (`Ready`). So whoever acts is
//! known by its life to somebody who acts, and a process that lost its memory learns that
//! from the hellos before it delivers anything. Until a process is ready, its peers may
//! come and go in other lives: none of these has done anything.
//!
//! How much is kept is bounded by the windows of what is sent over it (`capacity`); the
//! link itself refuses nothing that keeps to them.

use std::collections::VecDeque;

use super::frame::{Frame, Hello, Message};
use super::ids::{Incarnation, ProcessId};
use super::refusal::Refusal;
use crate::limits::ORDERED_RECEIPT_EVERY;

/// What a hello leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The link goes on; what was missed is to be sent.
    Resumed,
    /// One of both lost its memory.
    Lost(ProcessId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Down,
    /// A connection is there; the other side's hello is not.
    Greeting,
    Up,
}

/// This side of the link to one peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Link {
    peer: ProcessId,
    state: State,
    /// The peer's life, once its hello came.
    life: Option<Incarnation>,
    /// Whether the peer takes messages in this life.
    ready: bool,
    /// Whether this side said so of itself over this connection.
    said_ready: bool,
    /// Sent or to be sent, and not told received; the last one has number `sent`.
    kept: VecDeque<Message>,
    sent: u64,
    received: u64,
    /// The last receipt that was told.
    told: u64,
    capacity: usize,
}

impl Link {
    pub(super) fn new(peer: ProcessId, capacity: usize) -> Self {
        Self {
            peer,
            state: State::Down,
            life: None,
            ready: false,
            said_ready: false,
            kept: VecDeque::new(),
            sent: 0,
            received: 0,
            told: 0,
            capacity,
        }
    }

    /// Whether a connection is there, over which the hello was sent.
    pub(super) fn is_connected(&self) -> bool {
        self.state != State::Down
    }

    /// Whether both hellos were exchanged.
    pub(super) fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// Whether the peer said that it takes messages.
    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    /// The peer takes messages from here on.
    pub(super) fn set_ready(&mut self) -> Result<(), Refusal> {
        if self.state != State::Up || self.ready {
            return Err(Refusal::OutOfTurn { process: self.peer });
        }
        self.ready = true;
        Ok(())
    }

    /// The peer's life, once known.
    pub(super) fn life(&self) -> Option<Incarnation> {
        self.life
    }

    /// Whether one more message may be kept.
    pub(super) fn has_room(&self) -> bool {
        self.kept.len() < self.capacity
    }

    /// Whether the peer is still to be told that this side takes messages; it is told by
    /// the answer.
    pub(super) fn say_ready(&mut self) -> bool {
        let due = self.is_up() && !self.said_ready;
        self.said_ready |= due;
        due
    }

    /// A connection is there: the hello is due, which says whether this side is `ready`.
    pub(super) fn connected(&mut self, ready: bool) {
        self.state = State::Greeting;
        self.said_ready = ready;
    }

    /// The connection is gone.
    pub(super) fn disconnected(&mut self) {
        self.state = State::Down;
    }

    /// The last message received.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Whether this link would go on after `hello`; changes nothing. `ready` is whether
    /// this process takes messages: before that it has counted on nobody.
    pub(super) fn judge(
        &self,
        hello: &Hello,
        me: (ProcessId, Incarnation),
        ready: bool,
    ) -> Result<Greeting, Refusal> {
        if hello.known.is_some_and(|known| known != me.1) {
            return Ok(Greeting::Lost(me.0));
        }
        if ready && self.life.is_some_and(|life| life != hello.incarnation) {
            return Ok(Greeting::Lost(self.peer));
        }
        let first = self.sent - self.kept.len() as u64;
        if hello.received < first || hello.received > self.sent {
            return Err(Refusal::Resume {
                process: self.peer,
                received: hello.received,
                first: first + 1,
                last: self.sent,
            });
        }
        Ok(Greeting::Resumed)
    }

    /// The peer's hello came; `Resumed` puts the link up.
    pub(super) fn greet(
        &mut self,
        hello: &Hello,
        me: (ProcessId, Incarnation),
        ready: bool,
    ) -> Result<Greeting, Refusal> {
        if self.state != State::Greeting {
            return Err(Refusal::OutOfTurn { process: self.peer });
        }
        let greeting = self.judge(hello, me, ready)?;
        if greeting == Greeting::Resumed {
            let same = self.life == Some(hello.incarnation);
            self.ready = hello.ready || (self.ready && same);
            self.life = Some(hello.incarnation);
            self.forget(hello.received);
            self.told = self.received;
            self.state = State::Up;
        }
        Ok(greeting)
    }

    /// All that the other side has not told received, in order.
    pub(super) fn missed(&self) -> impl Iterator<Item = Frame> {
        let first = self.sent - self.kept.len() as u64 + 1;
        let numbered = (first..).zip(&self.kept);
        numbered.map(|(sequence, message)| Frame::Message {
            sequence,
            message: message.clone(),
        })
    }

    /// Keeps a message, and gives the frame to send now if the peer takes it.
    pub(super) fn send(&mut self, message: Message) -> Option<Frame> {
        self.sent += 1;
        let frame = (self.is_up() && self.ready).then(|| Frame::Message {
            sequence: self.sent,
            message: message.clone(),
        });
        self.kept.push_back(message);
        frame
    }

    /// Whether message `sequence` is to be processed; a repeated one is not.
    pub(super) fn expects(&self, sequence: u64) -> Result<bool, Refusal> {
        if self.state != State::Up {
            return Err(Refusal::OutOfTurn { process: self.peer });
        }
        if sequence > self.received + 1 || sequence == 0 {
            return Err(Refusal::Gap {
                process: self.peer,
                expected: self.received + 1,
                found: sequence,
            });
        }
        Ok(sequence == self.received + 1)
    }

    /// The expected message was processed; gives the receipt if one is due.
    pub(super) fn processed(&mut self) -> Option<Frame> {
        self.received += 1;
        if self.received - self.told < ORDERED_RECEIPT_EVERY || !self.is_up() {
            return None;
        }
        self.told = self.received;
        let sequence = self.received;
        Some(Frame::Received { sequence })
    }

    /// The other side told what it received.
    pub(super) fn receipt(&mut self, sequence: u64) -> Result<(), Refusal> {
        if self.state != State::Up {
            return Err(Refusal::OutOfTurn { process: self.peer });
        }
        if sequence > self.sent {
            return Err(Refusal::Gap {
                process: self.peer,
                expected: self.sent,
                found: sequence,
            });
        }
        self.forget(sequence);
        Ok(())
    }

    fn forget(&mut self, received: u64) {
        let first = self.sent - self.kept.len() as u64;
        let known = received.saturating_sub(first) as usize;
        self.kept.drain(..known.min(self.kept.len()));
    }
}
