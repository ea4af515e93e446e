//! What all connections of a server share: the segment, who it is, what was counted.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::SpaceServerConfig;
use super::live::{Figures, SpaceWatch};
use super::log::Log;
use super::nbd::Nbd;
use super::writers::Writers;
use crate::checksum::Digest;
use crate::limits::MAX_SPACE_RUNS;
use crate::space::execute::Executor;
use crate::space::frame::{Incarnation, Reply, Request, Status, append_run};
use crate::space::memory::Memory;
use crate::units::checked_range;

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
    watch: SpaceWatch,
    pub(super) log: Option<Log>,
    /// Clients that were welcomed and are still there.
    pub(crate) clients: u64,
    /// Clients that were turned away.
    pub(crate) turned_away: u64,
    /// Connections that ended for what they sent.
    pub(crate) broken: u64,
    pub(crate) stopping: bool,
    /// What its NBD connections share.
    pub(crate) nbd: Nbd,
    can_be_mapped: bool,
    /// Clients on this host that write by mapping, where there may be any.
    pub(crate) writers: Option<Writers>,
}

impl Core {
    pub(super) fn new(
        config: &SpaceServerConfig,
        executor: Executor,
        memory: Box<dyn Memory + Send>,
        nbd: Nbd,
    ) -> Self {
        let map = &config.map;
        let card = Card {
            map: map.digest(),
            position: config.position as u32,
            incarnation: config.incarnation,
            segment_size: map.segment_size(),
            // Bounded by `limits::MAX_SPACE_IN_FLIGHT`.
            max_in_flight: config.limits.max_in_flight as u32,
            max_clients: config.limits.max_clients,
            replicated: config.replica.is_some(),
        };
        let watch = SpaceWatch {
            figures: Arc::default(),
            server: map.servers()[config.position].name.as_str().into(),
            position: card.position,
            incarnation: card.incarnation,
            segment_size: card.segment_size,
            replicated: card.replicated,
            nbd: config.nbd.clone(),
        };
        Self {
            card,
            executor,
            memory,
            watch,
            log: None,
            clients: 0,
            turned_away: 0,
            broken: 0,
            stopping: false,
            nbd,
            // By mapping one would see what may still be lost with this server.
            can_be_mapped: config.data.is_some() && config.replica.is_none(),
            writers: None,
        }
    }

    pub(super) fn watch(&self) -> &SpaceWatch {
        &self.watch
    }

    /// Notes an operation in the log, if there is one.
    pub(crate) fn record(&self, client: u128, request: &Request, status: Status) {
        if let Some(log) = &self.log {
            log.record(client, request, status);
        }
    }

    /// Shows what was counted to those who watch.
    pub(super) fn show(&mut self) {
        let counts = self.executor.counts();
        let figures: &Figures = &self.watch.figures;
        for (place, value) in [
            (&figures.clients, self.clients),
            (&figures.turned_away, self.turned_away),
            (&figures.broken, self.broken),
            (&figures.operations, counts.operations),
            (&figures.refused, counts.refused),
            (&figures.read_bytes, counts.read_bytes),
            (&figures.written_bytes, counts.written_bytes),
            (&figures.changes, self.executor.changes()),
        ] {
            place.store(value, Ordering::Relaxed);
        }
        let news = self.writers.as_mut().and_then(Writers::news);
        if news.is_some() {
            self.watch.figures.show_writers(news);
        }
    }

    /// How the server goes, as the reply to a stat has it.
    pub(crate) fn stat(&mut self) -> Vec<u8> {
        self.show();
        // Numbers and plain words: nothing in it cannot be written.
        serde_json::to_vec(&self.watch.status()).unwrap_or_default()
    }

    /// Appends what a range consists of.
    pub(crate) fn holes(&mut self, request: &Request, out: &mut Vec<u8>) -> Status {
        let (offset, len) = (request.offset, u64::from(request.len));
        if checked_range(offset, len, self.card.segment_size).is_err() {
            return Status::OutOfRange;
        }
        let most = MAX_SPACE_RUNS as usize;
        let append = |len, hole| append_run(out, len, hole);
        self.nbd.runs(offset, offset + len, most, append);
        Status::Done
    }

    /// Whether clients on this host may map the segment.
    pub(crate) fn can_be_mapped(&self) -> bool {
        self.can_be_mapped
    }

    /// Carries out a request of any protocol; what its reply consists of besides the header
    /// is appended to `out`. None if it has to wait for a client that writes by mapping:
    /// then nothing was done, and it is to be tried again.
    pub(crate) fn execute(
        &mut self,
        request: &Request,
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Option<Reply> {
        if let Some(writers) = &mut self.writers
            && !writers.hold(request, body)
        {
            return None;
        }
        let memory = self.memory.as_mut();
        let reply = self.executor.execute(memory, request, body, out);
        if let Some(writers) = &mut self.writers {
            writers.let_go(reply.status == Status::Done && request.operation.changes());
        }
        Some(reply)
    }

    /// Bytes that all operations so far have copied or set.
    pub(crate) fn moved_bytes(&self) -> u64 {
        let counts = self.executor.counts();
        counts.read_bytes + counts.written_bytes
    }

    /// Number of the change that a reply given now has to wait for.
    pub(crate) fn barrier(&self) -> u64 {
        if self.card.replicated {
            self.executor.changes()
        } else {
            0
        }
    }
}
