//! Small shared variables with one total order: every process that subscribes to a
//! variable hears its changes in the same place of the same order.
//!
//! The example of three processes that subscribe to overlapping sets, line by line; a test
//! runs all three and compares what their callbacks print, and `uffd-sync var demo` does it
//! with processes of their own:
//!
//! ```no_run
//! # use std::time::Duration;
//! # use uffd_sync::client::variables::{Address, Notice, ValueKind, Variables, VariablesConfig};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Define subscriptions (variable -> list of subscriber processes)
//! let subscriptions = [
//!     (0, "left", vec![0, 1]),      // Variable 0: processes 0 and 1 subscribe
//!     (1, "right", vec![1, 2]),     // Variable 1: processes 1 and 2 subscribe
//!     (2, "total", vec![0, 1, 2]),  // Variable 2: all processes subscribe
//! ];
//!
//! // Callback function for variable changes
//! let on_variable_change = |notice: &Notice| {
//!     if let Notice::Change(change) = notice {
//!         println!("Variable {} changed to {}", change.variable, change.new);
//!     }
//! };
//!
//! // Create the variables of process 0 of 3; process n listens on port 10000 + n
//! let mut config = VariablesConfig::new(0);
//! for process in 0..3 {
//!     config = config.member(process, Address::Tcp("127.0.0.1".into(), 10000 + process as u16));
//! }
//! for (variable, name, subscribers) in subscriptions {
//!     config = config.variable(variable, name.parse()?, ValueKind::I64, subscribers);
//! }
//!
//! // Start
//! let variables = Variables::start(config, on_variable_change)?;
//! let deadline = Duration::from_secs(10);
//!
//! // Write to a variable
//! variables.write(0, 10, deadline)?;
//!
//! // Compare and swap
//! let success = variables.compare_and_swap(0, 10, 20, deadline)?;
//!
//! // Read a variable
//! let value = variables.get(0)?;
//!
//! // Stop
//! variables.stop();
//! # let _ = (success, value);
//! # Ok(())
//! # }
//! ```
//!
//! What is promised, and what is not, says [the manual](crate::manual).

mod link;

pub use link::VariablesLink;

pub use crate::engine::variables::{
    Address, Change, ClusterError, Completed, Definition, EtcdConfig, LinkStatus, Member, Notice,
    OperationError, OrderKind, Pending, ResetError, Saved, StartError, StreamEnd, Subscription,
    ValueKind, Variables, VariablesConfig, VariablesError, VariablesStatus, merge_saved,
};
pub use crate::ordered::{Operation, OrderKey, StopReason, SubmitError, Value};
