//! Cuts on demand: a request that is answered once the epoch is there.
//!
//! I1. A request is answered by a cut that was begun after it was heard, or refused with
//!     a reason within [`limits::CUT_DEADLINE_MS`].
//! I2. A connection that waits for its cut is not read from.

use std::time::{Duration, Instant};

use super::keys::Key;
use super::regions::Body;
use super::requests::{Call, Refusal, Reply, not_found};
use super::timers::Timer;
use super::{Engine, requests};
use crate::limits;
use crate::wire::control::RefusalCode;
use crate::words::Mode;

/// A connection that asked for a cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitsForCut {
    region: Key,
    connection: Key,
    deadline: Instant,
    /// The first cut that began after the request.
    number: u64,
}

impl Engine {
    /// Begins a cut of `name`; none for an answer that comes later.
    pub(super) fn request_cut(
        &mut self,
        name: &str,
        call: &Call,
    ) -> Result<Option<Reply>, Refusal> {
        let key = self.owned_region(name, call)?;
        let Some(entry) = self.regions.get_mut(key) else {
            return Err(not_found(name));
        };
        let number = match &mut entry.body {
            // Each write is one epoch.
            Body::Held(_) => {
                let epoch = entry.epoch;
                return Ok(Some(requests::cut_made(epoch)));
            }
            Body::Tracked(tracked) if tracked.is_exact() => tracked.want_cut(),
            Body::Tracked(tracked) if tracked.mode == Mode::Sync => {
                let reason = entry.statistics.last_loss.as_deref();
                return Err(Refusal::new(
                    RefusalCode::Unsupported,
                    format!(
                        "{name} was tracked in mode sync and is compared now, which makes no \
                         cuts: {}",
                        reason.unwrap_or("its tracking was lost")
                    ),
                ));
            }
            Body::Tracked(tracked) => {
                return Err(Refusal::new(
                    RefusalCode::Unsupported,
                    format!(
                        "{name} is tracked in mode {}, where only its writer's commits make cuts; \
                         its writer has to ask for mode sync",
                        tracked.tracker.mode()
                    ),
                ));
            }
            Body::Replica(_) => {
                return Err(Refusal::new(
                    RefusalCode::Unsupported,
                    format!("{name} is a replica; ask the node of its source for a cut"),
                ));
            }
        };
        let deadline = self.now + Duration::from_millis(limits::CUT_DEADLINE_MS);
        self.cuts.push(WaitsForCut {
            region: key,
            connection: call.connection,
            deadline,
            number,
        });
        self.timers.set(deadline, Timer::Cuts);
        self.make_runnable(key);
        Ok(None)
    }

    /// Cut `number` of a region is an epoch.
    pub(super) fn answer_cuts(&mut self, region: Key, number: u64) {
        let Some(epoch) = self.regions.get(region).map(|entry| entry.epoch) else {
            return;
        };
        for waits in self.take_cuts(|it| it.region == region && it.number <= number) {
            self.answer_later(waits.connection, requests::cut_made(epoch));
        }
    }

    /// The region ends or can make no cuts any more.
    pub(super) fn refuse_cuts(&mut self, region: Key, reason: &str) {
        for waits in self.take_cuts(|it| it.region == region) {
            let message = format!("no cut was made: {reason}");
            let reply = Reply::refused(RefusalCode::Failed, message);
            self.answer_later(waits.connection, reply);
        }
    }

    pub(super) fn refuse_late_cuts(&mut self) {
        let now = self.now;
        for waits in self.take_cuts(|it| it.deadline <= now) {
            let message = format!("no cut was made within {} ms", limits::CUT_DEADLINE_MS);
            let reply = Reply::refused(RefusalCode::Failed, message);
            self.answer_later(waits.connection, reply);
        }
    }

    /// The connection is gone.
    pub(super) fn forget_cuts(&mut self, connection: Key) {
        self.cuts.retain(|it| it.connection != connection);
    }

    fn take_cuts(&mut self, which: impl Fn(&WaitsForCut) -> bool) -> Vec<WaitsForCut> {
        let taken = self.cuts.iter().copied().filter(|it| which(it)).collect();
        self.cuts.retain(|it| !which(it));
        taken
    }
}
