//! What processes say to each other, as values; [`codec`](super::codec) has the bytes.

use super::ids::{Incarnation, OperationId, OrderKey, ProcessId, VariableId};
use super::refusal::StopReason;
use super::value::Operation;
use crate::checksum::Digest;

/// One frame of a connection between two processes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Frame {
    /// The first frame in each direction.
    Hello(Hello),
    /// The sender has greeted all of its peers; from here on it takes messages. Part of
    /// the hello where that is known then.
    Ready,
    /// All messages up to `sequence` were received and need not be kept.
    Received {
        /// The last message received; 0 for none.
        sequence: u64,
    },
    /// The sender delivers nothing any more, and neither may the receiver.
    Stopped {
        /// Why.
        reason: StopReason,
    },
    /// A message of the link, numbered from 1 without gaps.
    Message {
        /// Its number.
        sequence: u64,
        /// What it says.
        message: Message,
    },
}

/// Who is there, what it was configured with and where the link goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// The sender.
    pub process: ProcessId,
    /// Whom the sender takes the receiver for.
    pub to: ProcessId,
    /// The sender's life.
    pub incarnation: Incarnation,
    /// The session, which rises each time that all start anew.
    pub session: u64,
    /// Whether the sender takes messages already, as by [`Frame::Ready`].
    pub ready: bool,
    /// The receiver's life that the sender counts on: the one it greeted, once it is
    /// ready itself.
    pub known: Option<Incarnation>,
    /// The last message that the sender received over this link; 0 for none.
    pub received: u64,
    /// Of the order and all subscriptions.
    pub configuration: Digest,
    /// Of what the variables held at the start that both subscribe to.
    pub start: Digest,
}

/// What a link carries, each once and in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// Skeen, initiator to subscribers: propose a time for this operation.
    Request {
        /// The operation; its initiator is the sender.
        id: OperationId,
        /// On which variable.
        variable: VariableId,
        /// What.
        operation: Operation,
        /// The initiator's clock.
        time: u64,
    },
    /// Skeen, subscriber to initiator: not before this time.
    Proposal {
        /// The operation.
        id: OperationId,
        /// The subscriber's clock.
        time: u64,
    },
    /// Skeen, initiator to subscribers: at this time.
    Commit {
        /// The operation.
        id: OperationId,
        /// Its time, greater than every proposal.
        time: u64,
        /// Whether [`Message::Committed`] is waited for.
        acknowledge: bool,
    },
    /// Skeen, subscriber to initiator: the commit arrived.
    Committed {
        /// The operation.
        id: OperationId,
    },
    /// Sequencer, initiator to sequencer: give this operation its place.
    Submit {
        /// The operation; its initiator is the sender.
        id: OperationId,
        /// On which variable.
        variable: VariableId,
        /// What.
        operation: Operation,
    },
    /// Sequencer, to subscribers: the next operation.
    Ordered {
        /// Its place.
        key: OrderKey,
        /// On which variable.
        variable: VariableId,
        /// What.
        operation: Operation,
    },
    /// To an initiator: so many of its operations were delivered here; opens its window.
    Delivered {
        /// Since the start of the session.
        count: u64,
    },
}
