//! What all connections of a server share: the segment, who it is, what was counted.

use serde_json::json;

use super::SpaceServerConfig;
use crate::checksum::Digest;
use crate::space::execute::Executor;
use crate::space::frame::{Incarnation, Reply, Request};
use crate::space::memory::Memory;

/// What a server says of itself in greetings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Card {
    pub(crate) map: Digest,
    pub(crate) position: u32,
    pub(crate) incarnation: Incarnation,
    pub(crate) segment_size: u64,
    pub(crate) max_in_flight: u32,
    pub(crate) max_clients: u64,
    /// Whether replies to changes follow a replica's acknowledgement.
    pub(crate) replicated: bool,
}

/// The segment with the one thread's means to work on it.
pub(crate) struct Core {
    pub(crate) card: Card,
    pub(crate) executor: Executor,
    pub(crate) memory: Box<dyn Memory + Send>,
    name: String,
    /// Clients that were welcomed and are still there.
    pub(crate) clients: u64,
    /// Clients that were turned away.
    pub(crate) turned_away: u64,
    /// Connections that ended for what they sent.
    pub(crate) broken: u64,
    pub(crate) stopping: bool,
    can_be_mapped: bool,
}

impl Core {
    pub(super) fn new(
        config: &SpaceServerConfig,
        executor: Executor,
        memory: Box<dyn Memory + Send>,
        can_be_mapped: bool,
    ) -> Self {
        let map = &config.map;
        Self {
            card: Card {
                map: map.digest(),
                position: config.position as u32,
                incarnation: config.incarnation,
                segment_size: map.segment_size(),
                // Bounded by `limits::MAX_SPACE_IN_FLIGHT`.
                max_in_flight: config.limits.max_in_flight as u32,
                max_clients: config.limits.max_clients,
                replicated: false,
            },
            executor,
            memory,
            name: map.servers()[config.position].name.to_string(),
            clients: 0,
            turned_away: 0,
            broken: 0,
            stopping: false,
            can_be_mapped,
        }
    }

    /// Whether clients on this host may map the segment.
    pub(crate) fn can_be_mapped(&self) -> bool {
        self.can_be_mapped
    }

    /// How the server goes, as the reply to a stat has it.
    pub(crate) fn stat(&self) -> Vec<u8> {
        self.status().to_json().to_string().into_bytes()
    }

    /// Carries out a request of any protocol; what its reply consists of besides the header
    /// is appended to `out`.
    pub(crate) fn execute(&mut self, request: &Request, body: &[u8], out: &mut Vec<u8>) -> Reply {
        self.executor
            .execute(self.memory.as_mut(), request, body, out)
    }

    /// Number of the change that a reply given now has to wait for.
    pub(crate) fn barrier(&self) -> u64 {
        if self.card.replicated {
            self.executor.changes()
        } else {
            0
        }
    }

    /// How the server goes.
    pub(super) fn status(&self) -> SpaceStatus {
        let counts = self.executor.counts();
        SpaceStatus {
            server: self.name.clone(),
            position: self.card.position,
            incarnation: self.card.incarnation,
            segment_size: self.card.segment_size,
            clients: self.clients,
            turned_away: self.turned_away,
            broken: self.broken,
            operations: counts.operations,
            refused: counts.refused,
            read_bytes: counts.read_bytes,
            written_bytes: counts.written_bytes,
            changes: self.executor.changes(),
        }
    }
}

/// How a server of a space goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceStatus {
    /// Its name.
    pub server: String,
    /// Its position among the servers, from 0.
    pub position: u32,
    /// The life of its segment.
    pub incarnation: Incarnation,
    /// Bytes of its segment.
    pub segment_size: u64,
    /// Clients that were welcomed and are there.
    pub clients: u64,
    /// Clients that were turned away.
    pub turned_away: u64,
    /// Connections that were ended for what they sent.
    pub broken: u64,
    /// Operations carried out, those in batches each for itself.
    pub operations: u64,
    /// Operations refused.
    pub refused: u64,
    /// Bytes copied out.
    pub read_bytes: u64,
    /// Bytes changed.
    pub written_bytes: u64,
    /// Requests that changed something.
    pub changes: u64,
}

impl SpaceStatus {
    /// As the reply to a stat has it.
    pub fn to_json(&self) -> serde_json::Value {
        json!({
            "server": self.server,
            "position": self.position,
            "incarnation": self.incarnation.to_string(),
            "segment_size": self.segment_size,
            "clients": self.clients,
            "turned_away": self.turned_away,
            "broken": self.broken,
            "operations": self.operations,
            "refused": self.refused,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "changes": self.changes,
        })
    }
}
