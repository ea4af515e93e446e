//! Figures of a running server, for whoever looks, without asking the loop.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::engine::NbdFigures;
use crate::space::frame::Incarnation;
use crate::wire::control::{LocalWriters, SpaceStatus};

/// What the loop counts; written by it alone.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) clients: AtomicU64,
    pub(super) turned_away: AtomicU64,
    pub(super) broken: AtomicU64,
    pub(super) operations: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) changes: AtomicU64,
    pub(super) unacknowledged: AtomicU64,
    pub(super) log_lines: AtomicU64,
    pub(super) log_dropped: AtomicU64,
    writers: Mutex<Option<LocalWriters>>,
}

impl Figures {
    pub(super) fn show_writers(&self, writers: Option<LocalWriters>) {
        *self.writers.lock().unwrap_or_else(PoisonError::into_inner) = writers;
    }
}

/// Who the server is, with its figures. Cheap to clone, usable from any thread.
#[derive(Clone, Debug)]
pub struct SpaceWatch {
    pub(super) figures: Arc<Figures>,
    pub(super) server: Arc<str>,
    pub(super) position: u32,
    pub(super) incarnation: Incarnation,
    pub(super) segment_size: u64,
    pub(super) replicated: bool,
    pub(super) nbd: Option<Arc<NbdFigures>>,
}

impl SpaceWatch {
    /// How the server goes. The figures need not be of one instant.
    pub fn status(&self) -> SpaceStatus {
        let of = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        let figures = &*self.figures;
        SpaceStatus {
            server: self.server.to_string(),
            position: self.position,
            incarnation: self.incarnation.to_string(),
            segment_size: self.segment_size,
            durability: if self.replicated { "replica" } else { "memory" }.to_owned(),
            clients: of(&figures.clients),
            turned_away: of(&figures.turned_away),
            broken: of(&figures.broken),
            operations: of(&figures.operations),
            refused: of(&figures.refused),
            read_bytes: of(&figures.read_bytes),
            written_bytes: of(&figures.written_bytes),
            changes: of(&figures.changes),
            unacknowledged: of(&figures.unacknowledged),
            log_lines: of(&figures.log_lines),
            log_dropped: of(&figures.log_dropped),
            nbd: self.nbd.as_ref().map(|nbd| nbd.status()),
            local_writers: {
                let writers = figures.writers.lock();
                writers.unwrap_or_else(PoisonError::into_inner).clone()
            },
        }
    }
}
