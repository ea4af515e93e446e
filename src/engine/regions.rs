//! One region as the loop keeps it: what it is, where its content comes from, who
//! reads it and who follows it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::apply::Replica;
use super::exports::Changes;
use super::keys::Key;
use super::losses::Losses;
use super::tracked::Tracked;
use crate::region::{Control, HoldPage, Stats};
use crate::replicate::{Publication, ShipperId};
use crate::shm::OwnedMemory;
use crate::sys::SysError;
use crate::sys::memfd;
use crate::track::Captured;
use crate::wire::control::Role;
use crate::words::{EpochKind, Generation, RegionName};

/// A region of this node.
pub(super) struct RegionEntry {
    pub(super) name: RegionName,
    pub(super) size: u64,
    /// Greatest size that it can grow to.
    pub(super) max_size: u64,
    pub(super) shared: bool,
    pub(super) owner_uid: u32,
    pub(super) generation: Generation,
    pub(super) epoch: u64,
    /// The epoch that this life began after.
    pub(super) first_epoch: u64,
    pub(super) kind: EpochKind,
    pub(super) control: Control,
    /// Read-only, for those who join.
    pub(super) control_fd: OwnedFd,
    pub(super) data_fd: Arc<OwnedFd>,
    pub(super) publication: Publication,
    pub(super) followers: Vec<Follower>,
    pub(super) readers: Vec<Reader>,
    pub(super) body: Body,
    pub(super) statistics: Statistics,
    /// What was changed since when, where that is offered.
    pub(super) changes: Option<Arc<Changes>>,
    /// Whether it stands in the queue of regions with work.
    pub(super) queued: bool,
    /// Earliest timer set for it.
    pub(super) timer: Option<Instant>,
}

/// A replica elsewhere, connected now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Follower {
    pub(super) peer: Key,
    pub(super) shipper: ShipperId,
}

/// A process that joined read-only.
pub(super) struct Reader {
    pub(super) connection: Key,
    pub(super) hold: HoldPage,
    /// Since when its hold has been up, and whether its time is used up.
    pub(super) held_since: Option<Instant>,
}

/// Where the content comes from.
pub(super) enum Body {
    /// A writer process, or a file.
    Tracked(Box<Tracked>),
    /// This node, on request.
    Held(OwnedMemory),
    /// A region of another node.
    Replica(Box<Replica>),
}

/// Figures for `status`.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    pub(super) captures: u64,
    pub(super) commits: u64,
    pub(super) bytes_changed: u64,
    pub(super) dirty_pages: u64,
    /// Value of `dirty_pages` at the last sweep, and the rate since the one before.
    pub(super) dirty_pages_swept: u64,
    pub(super) dirty_pages_per_s: f64,
    pub(super) capture_us: u64,
    pub(super) full_compares: u64,
    pub(super) last_loss: Option<String>,
    pub(super) losses: Losses,
}

impl RegionEntry {
    pub(super) fn role(&self) -> Role {
        match &self.body {
            Body::Tracked(tracked) if tracked.is_file() => Role::File,
            Body::Tracked(_) => Role::Tracked,
            Body::Held(_) => Role::Held,
            Body::Replica(_) => Role::Replica,
        }
    }

    /// Bytes of memory that the data takes.
    pub(super) fn resident_bytes(&self) -> Result<u64, SysError> {
        memfd::resident_bytes(&self.data_fd)
    }

    /// Writes the acknowledged epochs where `wait_acked` looks for them.
    pub(super) fn publish_acks(&self) {
        self.control.set_acked(&self.publication.acked());
    }
}

impl Statistics {
    /// Counts a complete capture.
    pub(super) fn captured(&mut self, captured: &Captured, by_commit: bool, cost: Duration) {
        self.captures += 1;
        self.commits += u64::from(by_commit);
        self.bytes_changed += captured.changed_bytes;
        self.dirty_pages += captured.dirty_pages;
        self.capture_us = cost.as_micros() as u64;
    }

    /// What the control page tells, so that the writer sees what tracking costs
    /// without asking the node.
    pub(super) fn shared(&self, interval_us: u64) -> Stats {
        Stats {
            captures: self.captures,
            commits: self.commits,
            dirty_pages: self.dirty_pages,
            changed_bytes: self.bytes_changed,
            interval_us,
            lost: self.full_compares,
        }
    }
}
