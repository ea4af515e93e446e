//! What `status` shows of a loop, and what is done once a second.

use std::time::Duration;

use super::keys::Key;
use super::regions::{Body, RegionEntry};
use super::{Engine, Tunables};
use crate::limits;
use crate::replicate::ShipperStatus;
use crate::sys::process::rss_bytes;
use crate::track::Audit;
use crate::units::{PAGE_SIZE, pages_for};
use crate::wire::control::{
    AttachmentStatus, AuditStatus, ExactStatus, HotStatus, NodeStatus, RegionStatus, ReplicaStatus,
};
use crate::words::{EpochKind, Generation, Mode, WriteKind};

/// Why a region that the node holds has no mode.
const HELD: &str = "the node makes every change itself: nothing has to be found";

impl Engine {
    pub(super) fn status(&mut self) -> NodeStatus {
        let mut regions: Vec<RegionStatus> = self
            .regions
            .iter()
            .map(|(_, entry)| entry.status(&self.settings.tunables))
            .collect();
        regions.sort_by(|a, b| a.name.cmp(&b.name));
        NodeStatus {
            node: self.settings.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            node_id: Generation(u128::from_le_bytes(self.node_id)).to_string(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            listen: self.listen.map(|addr| addr.to_string()),
            rss_bytes: rss_bytes(),
            buffer_bytes: self.pool.bytes() + self.spare.bytes(),
            connections: (self.controls.len() + self.peers.len()) as u64,
            bytes_sent: self.counters.bytes_sent,
            bytes_received: self.counters.bytes_received,
            longest_turn_us: std::mem::take(&mut self.counters.longest_turn).as_micros() as u64,
            turns: self.counters.turns,
            regions,
            space: self.settings.space.get().map(|space| space.status()),
            nbd: self.settings.nbd.as_ref().map(|nbd| nbd.status()),
        }
    }

    pub(super) fn region_status(&self, key: Key) -> Option<RegionStatus> {
        let entry = self.regions.get(key)?;
        Some(entry.status(&self.settings.tunables))
    }

    /// Rates, and replicas that stay away too long.
    pub(super) fn sweep(&mut self) {
        // A sweep is a second.
        self.pool.trim((limits::STAGING_KEPT_MS / 1000) as u32);
        self.idle.sweep();
        for key in self.regions.keys() {
            let Some(entry) = self.regions.get_mut(key) else {
                continue;
            };
            let statistics = &mut entry.statistics;
            let found = statistics.dirty_pages - statistics.dirty_pages_swept;
            statistics.dirty_pages_swept = statistics.dirty_pages;
            // A few seconds' mean: half of it is the last second.
            statistics.dirty_pages_per_s = (statistics.dirty_pages_per_s + found as f64) / 2.0;
            entry.publication.forget(self.now);
        }
    }

    /// Whether everything captured has been acknowledged by every follower.
    pub(super) fn drained(&self) -> bool {
        let settled = self.regions.iter().all(|(_, entry)| {
            let capturing = match &entry.body {
                Body::Tracked(tracked) => {
                    tracked.is_at_work() || tracked.due.is_some_and(|due| due <= self.now)
                }
                _ => false,
            };
            !capturing
                && entry.followers.iter().all(|follower| {
                    let status = entry.publication.status(follower.shipper);
                    status.is_none_or(|status| status.lag == 0)
                })
        });
        settled && self.runnable.is_empty() && self.peers.iter().all(|(_, peer)| !peer.is_sending())
    }
}

impl RegionEntry {
    pub(super) fn status(&self, tunables: &Tunables) -> RegionStatus {
        let pre_images = self.publication.pre_image_bytes();
        let (state, mode, publish, overhead) = match &self.body {
            Body::Tracked(tracked) => {
                let pool = tracked.faults.as_ref().map(|it| it.board().pool_bytes());
                let twin = tracked.twin.resident_bytes() + pool.unwrap_or(0);
                let (mode, publish) = (tracked.mode, tracked.publish);
                (tracked.state(), Some(mode), Some(publish), twin)
            }
            Body::Held(_) => ("live", None, None, 0),
            Body::Replica(replica) => {
                let staged = replica.applier.staged_bytes();
                (replica.state(), None, None, staged)
            }
        };
        let interval = match &self.body {
            Body::Tracked(tracked) => Duration::from_micros(tracked.interval.current()),
            _ => Duration::ZERO,
        };
        let (tracking, chosen, audit) = self.tracking(tunables);
        let (writer_pid, kind, attachments) = self.writers();
        let (source, applied) = match &self.body {
            Body::Replica(replica) => (Some(replica.spec.to_string()), Some(replica.counts())),
            _ => (None, None),
        };
        let replicas = self
            .publication
            .ids()
            .filter_map(|id| self.publication.status(id));
        RegionStatus {
            name: self.name.to_string(),
            size: self.size,
            max_size: self.max_size,
            resident_bytes: self.resident_bytes().unwrap_or(0),
            overhead_bytes: overhead + pre_images,
            role: self.role(),
            state: state.to_owned(),
            mode,
            tracking,
            chosen,
            publish,
            shared: self.shared,
            owner_uid: self.owner_uid,
            writer_pid,
            kind,
            attachments,
            generation: self.generation.to_string(),
            epoch: self.epoch,
            cut: self.kind == EpochKind::Cut,
            captures: self.statistics.captures,
            bytes_changed: self.statistics.bytes_changed,
            dirty_pages_per_s: self.statistics.dirty_pages_per_s,
            interval_us: interval.as_micros() as u64,
            capture_us: self.statistics.capture_us,
            full_compares: self.statistics.full_compares,
            last_loss: self.statistics.last_loss.clone(),
            losses: self.statistics.losses.status(),
            audit,
            hot: self.hot_status(),
            exact: self.exact_status(),
            readers: self.readers.len() as u64,
            source,
            replicas: replicas.map(replica_status).collect(),
            applied,
        }
    }

    /// A process that writes it, who may, and who does of several.
    fn writers(&self) -> (Option<i32>, Option<WriteKind>, Vec<AttachmentStatus>) {
        let Body::Tracked(tracked) = &self.body else {
            return (None, None, Vec::new());
        };
        match &tracked.crew {
            _ if tracked.is_file() => (None, None, Vec::new()),
            Some(crew) => {
                let kind = Some(WriteKind::Cooperative);
                (tracked.living_writer(), kind, crew.status(tracked))
            }
            None => {
                let pid = tracked.tracker.attachment().and(tracked.writer_pid);
                (pid, Some(WriteKind::Exclusive), Vec::new())
            }
        }
    }

    /// How changes are found now, why in that way, and how the audit of it gets on.
    fn tracking(&self, tunables: &Tunables) -> (Option<Mode>, Option<String>, Option<AuditStatus>) {
        match &self.body {
            Body::Tracked(tracked) => {
                let audit = Some(&tracked.audit).filter(|_| Audit::concerns(&tracked.tracker));
                (
                    Some(tracked.tracker.mode()),
                    tracked.chosen.clone(),
                    audit.map(|audit| audit.status(tunables.audit_period)),
                )
            }
            Body::Held(_) => (None, Some(HELD.to_owned()), None),
            Body::Replica(_) => (None, None, None),
        }
    }
}

impl RegionEntry {
    fn hot_status(&self) -> Option<HotStatus> {
        let Body::Tracked(tracked) = &self.body else {
            return None;
        };
        let (pages, after) = match (&tracked.faults, tracked.tracker.heat()) {
            (Some(faults), _) => (faults.board().stats().hot_pages, limits::HOT_CUTS),
            (None, Some(heat)) => (heat.pages(), heat.after()),
            _ => return None,
        };
        Some(HotStatus {
            pages,
            share: pages as f64 / pages_for(self.size).max(1) as f64,
            after,
        })
    }

    fn exact_status(&self) -> Option<ExactStatus> {
        let Body::Tracked(tracked) = &self.body else {
            return None;
        };
        let stats = tracked.faults.as_ref()?.board().stats();
        Some(ExactStatus {
            cuts: stats.cuts,
            withheld_us: stats.last_withheld_ns.div_ceil(1_000),
            longest_withheld_us: stats.longest_withheld_ns.div_ceil(1_000),
            faults: stats.faults,
            saved_pages: stats.saved_pages,
            pool_bytes: stats.slots * PAGE_SIZE,
            pool_used_bytes: stats.slots_used.min(stats.slots) * PAGE_SIZE,
            voided: stats.voided,
            hot_pages: stats.hot_pages,
            hot_after: limits::HOT_CUTS,
            dirty_pages: stats.dirty_pages,
        })
    }
}

fn replica_status(status: ShipperStatus) -> ReplicaStatus {
    ReplicaStatus {
        node: status.replica.name,
        state: status.state.as_str().to_owned(),
        acked_epoch: status.acked.unwrap_or(0),
        lag_epochs: status.lag,
        pending_bytes: status.pending_bytes,
        bytes_sent: status.bytes_sent,
        updates_sent: status.updates_sent,
    }
}
