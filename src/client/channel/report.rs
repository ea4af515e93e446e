//! What a channel server says of itself: JSON behind the answer to a status hello.

use serde::{Deserialize, Serialize};

/// A server and the channels of its clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Name of the channel.
    pub name: String,
    /// `in-place` or `two-buffers`.
    pub kind: String,
    /// The server's process.
    pub pid: i32,
    /// What the server says it does, for example `echo`; may be empty.
    pub operation: String,
    /// Threads that serve one client's requests.
    pub workers: u32,
    /// How the server waits: `spin`, `park` or `adaptive`.
    pub waiting: String,
    /// Clients that it takes at a time.
    pub max_clients: u32,
    /// Clients that ever joined.
    pub clients_total: u64,
    /// Clients that are connected.
    pub clients: Vec<ClientStatus>,
}

/// One client's channel, as the server finds its memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientStatus {
    /// The client's process.
    pub pid: i32,
    /// Id of the memory, 32 hexadecimal digits.
    pub id: String,
    /// Servers that have served this memory.
    pub generation: u64,
    /// Requests written.
    pub requests: u64,
    /// Requests that the server took.
    pub requests_read: u64,
    /// Responses written, failed ones included.
    pub responses: u64,
    /// Responses read.
    pub responses_read: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
    /// Bytes of it in no frame.
    pub free_bytes: u64,
    /// Bytes that the memory takes.
    pub resident_bytes: u64,
}
