//! What `uffd-sync var status` shows of one process. A value.

use serde::{Deserialize, Serialize};

/// One process's ordered variables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VariablesStatus {
    /// Which member this is.
    pub process: u32,
    /// `skeen`, `sequencer` or `etcd`.
    pub order: String,
    /// Number of the session.
    pub session: u64,
    /// This life of the process, 16 hexadecimal digits.
    pub incarnation: String,
    /// `running`, `frozen` (waiting for a new session), or why nothing is delivered.
    pub state: String,
    /// Whether operations wait for every subscriber's acknowledgement.
    pub strict: bool,
    /// Logical time; of an etcd cluster its revision.
    pub clock: u64,
    /// Operations delivered here in this session; of an etcd cluster the changes.
    pub delivered: u64,
    /// Time of the last one.
    pub last: Option<u64>,
    /// Own operations that have not completed.
    pub in_flight: u64,
    /// Operations of all processes that wait for their turn; with an etcd cluster own ones
    /// that were not sent yet.
    pub waiting: u64,
    /// Times that all values were read anew; of an etcd cluster.
    pub resyncs: u64,
    /// Connections to the others.
    pub links: Vec<LinkStatus>,
}

/// The connection to one other process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The other one.
    pub process: u32,
    /// Where it is reached.
    pub address: String,
    /// `linked`, `greeting`, `dialling`, or `away`.
    pub state: String,
    /// Connections made so far.
    pub connections: u64,
    /// Why the last one ended or was refused.
    pub trouble: Option<String>,
}
