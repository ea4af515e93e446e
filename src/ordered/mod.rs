//! Ordered variables, as values: one total order over all operations of all
//! processes, of which each process delivers the part that it subscribed to.
//!
//! ```text
//!                submit            Action::{Deliver, Complete, Unavailable}
//!                  |                          ^
//!  +---------------v--------------------------|---------------+
//!  | Process      values, windows, completion                 |
//!  |   +-----------------------+   +------------------------+ |
//!  |   | Skeen: one clock, one |or | Sequencer: one counter | |
//!  |   | queue per process     |   | per component          | |
//!  |   +-----------------------+   +------------------------+ |
//!  |   Link, one per peer: sequence numbers, resume           |
//!  +---------------^--------------------------|---------------+
//!                  |                          v
//!        Event::{LinkUp, Frame, LinkDown}   Action::{Send, Close}
//! ```
//!
//! No socket, clock or thread is in here: models explore it exhaustively, a simulator
//! runs it from a seed, and the engine runs the same type between its sockets.
//!
//! - I1: the keys ([`OrderKey`]) that a process delivers rise.
//! - I2: a key stands for the same operation everywhere.
//! - I3: of two processes that subscribe to a variable, one has delivered a prefix of
//!   the operations on it that the other has.
//! - I4: a message is processed once and in the order of its link, or not at all: what
//!   is refused is not received, and its link is closed.
//! - I5: what one process may ask of another is bounded by a window, so every queue is.
//!
//! If a process loses its memory, I3 cannot be kept; then all of them stop, and start
//! anew under a higher session ([`Start`]).

mod codec;
mod frame;
mod ids;
mod link;
pub mod oracle;
mod process;
mod refusal;
mod rules;
mod sequencer;
mod skeen;
mod start;
mod subscriptions;
mod value;

pub use codec::{FRAME_HEADER_BYTES, FrameError, FrameHeader};
pub use frame::{Frame, Hello, Message};
pub use ids::{Incarnation, OperationId, OrderKey, ProcessId, VariableId};
pub use process::{Action, Config, Delivery, Event, Outcome, Process};
pub use refusal::{Refusal, StopReason, SubmitError};
pub use rules::{Exact, Rules};
pub use start::{Start, StartError, merge_states};
pub use subscriptions::{OrderKind, SubscriptionError, Subscriptions, Variable};
pub use value::{Operation, Value, ValueError, ValueType};
