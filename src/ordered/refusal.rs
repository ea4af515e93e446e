//! Why an operation, a frame or a whole component is refused.

use super::ids::{Incarnation, OperationId, ProcessId, VariableId};
use super::value::ValueError;
use crate::limits::{ORDERED_CLOCK_JUMP, ORDERED_WINDOW};

/// Why an operation was not taken; nothing of it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Only subscribers read, write or hear.
    #[error("process {process} does not subscribe to variable {variable}")]
    NotSubscribed {
        /// Who asked.
        process: ProcessId,
        /// For what.
        variable: VariableId,
    },
    /// No such variable is configured.
    #[error("variable {variable} is not configured")]
    NoVariable {
        /// What was asked for.
        variable: VariableId,
    },
    /// The value does not fit the variable.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// Not all peers were there yet since the start of this process.
    #[error("process {missing} has not been there and ready since this one started")]
    NotReady {
        /// One of those that are missing.
        missing: ProcessId,
    },
    /// As many operations are under way as may be; try again once one completed.
    #[error(
        "{ORDERED_WINDOW} operations are under way towards process {behind}; wait for one to complete"
    )]
    Busy {
        /// The process that has not delivered them; the process itself where its own
        /// operations have not completed.
        behind: ProcessId,
    },
    /// Nothing is delivered any more.
    #[error(transparent)]
    Unavailable(#[from] StopReason),
}

/// Why a component delivers nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum StopReason {
    /// A member started again without what it knew, or a second one has its number.
    #[error(
        "unavailable: process {process} lost its memory, or runs twice; start all processes anew under a higher session (`uffd-sync var reset`)"
    )]
    LostMemory {
        /// Which.
        process: ProcessId,
    },
    /// Logical time is used up.
    #[error(
        "unavailable: the logical clock of process {process} is used up; start all processes anew under a higher session (`uffd-sync var reset`)"
    )]
    ClockExhausted {
        /// Whose.
        process: ProcessId,
    },
}

/// Why a frame was not processed; the link is closed, and nothing was changed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The other one is not configured, or shares nothing with this process.
    #[error("process {process} has nothing to say to process {me}")]
    NotAPeer {
        /// The other one.
        process: ProcessId,
        /// This one.
        me: ProcessId,
    },
    /// The hello names another process than the one that was reached, or is meant for
    /// another.
    #[error("a hello from process {process} to process {to}, received by process {me}")]
    Misdirected {
        /// Whom it is from.
        process: ProcessId,
        /// Whom it is for.
        to: ProcessId,
        /// Who received it.
        me: ProcessId,
    },
    /// Subscriptions, types or order differ.
    #[error(
        "process {process} has another configuration of variables: make `[variables]` equal everywhere"
    )]
    Configuration {
        /// The other one.
        process: ProcessId,
    },
    /// The sessions differ.
    #[error(
        "process {process} is in session {theirs}, this one in session {ours}: start both under the higher one"
    )]
    Session {
        /// The other one.
        process: ProcessId,
        /// Its session.
        theirs: u64,
        /// Ours.
        ours: u64,
    },
    /// The variables that both subscribe to held something else at the start.
    #[error("process {process} started the session from other values")]
    StartValues {
        /// The other one.
        process: ProcessId,
    },
    /// The other one wants to go on where this one never was.
    #[error(
        "process {process} received message {received} and wants to resume; {first} to {last} can be sent"
    )]
    Resume {
        /// The other one.
        process: ProcessId,
        /// The last message that it claims to have.
        received: u64,
        /// The oldest one that is kept.
        first: u64,
        /// The newest one.
        last: u64,
    },
    /// Something else than a hello came first, or a second hello came.
    #[error("process {process} does not begin with its hello, or repeats it")]
    OutOfTurn {
        /// The other one.
        process: ProcessId,
    },
    /// A message is missing.
    #[error("message {found} from process {process} where {expected} has to come")]
    Gap {
        /// The other one.
        process: ProcessId,
        /// What had to come.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// A message that this order does not know.
    #[error("process {process} sent a message of another order")]
    WrongOrder {
        /// The other one.
        process: ProcessId,
    },
    /// The message is about a variable that one of the two does not subscribe to.
    #[error("process {process} does not subscribe to variable {variable}")]
    NotSubscribed {
        /// Who does not.
        process: ProcessId,
        /// To what.
        variable: VariableId,
    },
    /// An operation in the name of somebody else, or of another life.
    #[error("process {process} (life {incarnation:?}) may not send operation {id}")]
    Initiator {
        /// The sender.
        process: ProcessId,
        /// Its life.
        incarnation: Incarnation,
        /// The operation.
        id: OperationId,
    },
    /// The operation is not known, known already, or not at this stage.
    #[error("a message of process {process} about operation {id} does not fit what is known of it")]
    Operation {
        /// The sender.
        process: ProcessId,
        /// The operation.
        id: OperationId,
    },
    /// The value does not fit its variable.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The time is far ahead, used up, or behind what was promised.
    #[error(
        "time {time} from process {process} at clock {clock}: outside what may come (at most {ORDERED_CLOCK_JUMP} ahead)"
    )]
    Time {
        /// The sender.
        process: ProcessId,
        /// What it said.
        time: u64,
        /// This process's clock, or the least time that may come.
        clock: u64,
    },
    /// More operations than the window allows.
    #[error("process {process} has more than {ORDERED_WINDOW} operations under way")]
    Window {
        /// The sender.
        process: ProcessId,
    },
}
