//! Whether what is scanned is still what the writer stores into.
//!
//! A mapping that was moved or unmapped scans as clean, for ever. So once a second
//! the registration of a slice of each tracked mapping is asked for; what is missing
//! makes the region one that is compared, which needs no mapping at all.

use super::Engine;
use super::regions::{Body, RegionEntry};
use super::tracked::Tracked;
use crate::track::Tracker;
use crate::units::MIB;

/// Bytes of one region asked about at once: about 0.2 ms where all is in use.
const SLICE: u64 = 64 * MIB;

impl Engine {
    /// Looks at the next regions in turn, as far as one slice of a turn goes.
    pub(super) fn audit(&mut self) {
        let keys = self.regions.keys();
        for _ in 0..keys.len() {
            self.audit_next += 1;
            let key = keys[self.audit_next % keys.len()];
            let Some(RegionEntry {
                name,
                body: Body::Tracked(tracked),
                ..
            }) = self.regions.get_mut(key)
            else {
                continue;
            };
            if !tracked.audit() {
                tracing::warn!(region = %name, "the writer's mapping is not tracked any more: comparing from now on");
                tracked.lose("the writer's mapping was moved or unmapped", self.now);
                self.make_runnable(key);
            }
            if self.is_late() {
                return;
            }
        }
    }
}

impl Tracked {
    /// Asks about one slice of the mapping; false if some of it is not tracked any more,
    /// and the region is compared from then on.
    fn audit(&mut self) -> bool {
        let Tracker::Async { attachment } = &self.tracker else {
            return true;
        };
        let Some(pagemap) = &attachment.pagemap else {
            return true;
        };
        let from = self.audited;
        let to = attachment.len.min(from + SLICE);
        self.audited = if to >= attachment.len { 0 } else { to };
        let (start, end) = (attachment.base + from, attachment.base + to);
        let whole = pagemap
            .tracked_bytes(start, end)
            .is_ok_and(|tracked| tracked >= end - start);
        // The end of the process is noticed by other means, and is no alarm.
        if whole || attachment.has_exited() {
            return true;
        }
        self.tracker = Tracker::Compare {
            attachment: self.tracker.take_attachment(),
        };
        false
    }
}
