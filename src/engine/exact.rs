//! Captures of a region in mode `sync`.
//!
//! ```text
//!          wanted               made              all steps done
//!   idle ---------> asked for ---------> capturing ---------------> epoch, a cut
//!                       ^                    |
//!                       +-- all, the cut was given up
//! ```
//! The fault thread rings at the first store after a cut: nothing is looked at while
//! nothing is stored.

use std::time::{Duration, Instant};

use super::{CommitSeen, Running, Tracked};
use crate::engine::losses::kind_of;
use crate::engine::regions::Statistics;
use crate::engine::requests::chain;
use crate::region::Control;
use crate::sys::process::realtime_ns;
use crate::track::exact::Lost;
use crate::track::{Capture, TrackError, Tracker};
use crate::words::{LossKind, Publish};

/// A cut that was asked for, and whose it is.
pub(super) struct Asked {
    number: u64,
    commit: Option<CommitSeen>,
    on_demand: bool,
    all: bool,
    /// Whether all who may store were members then.
    whole: bool,
}

impl Tracked {
    /// Whether cuts are made by a fault thread.
    pub(in crate::engine) fn is_exact(&self) -> bool {
        self.faults.is_some()
    }

    /// Whether a cut is being made, or what is dirty is not known until the next.
    pub(in crate::engine) fn awaits_cut(&self) -> bool {
        self.faults.as_ref().is_some_and(|faults| {
            let board = faults.board();
            self.asked.is_some() || board.lost().is_some() || board.is_void(board.made().number)
        })
    }

    /// Somebody asks for a cut: the number of the first one that begins from now on.
    pub(in crate::engine) fn want_cut(&mut self) -> u64 {
        self.cut_wanted = true;
        self.last_asked + 1
    }

    /// Goes on towards a capture; false while the fault thread is asked.
    pub(super) fn begin_exact(&mut self, control: &Control, statistics: &mut Statistics) -> bool {
        let Some(faults) = &self.faults else {
            return false;
        };
        let Some(asked) = self.asked.take() else {
            // Marks show what is found anyway.
            control.drain_marks(&mut Vec::new(), control.max_size());
            let commit = control.commit_pending().map(|request| CommitSeen {
                request,
                guard: control.guard_state(),
            });
            let all = self.lost.is_some();
            if let Some(reason) = self.lost.take()
                && statistics.captures > 0
            {
                statistics.full_compares += 1;
                statistics.last_loss = Some(reason);
            }
            self.due = None;
            let whole = self.crew.as_mut().is_none_or(|crew| {
                crew.take_torn();
                crew.is_complete()
            });
            self.last_asked = faults.ask(all);
            self.asked = Some(Asked {
                number: self.last_asked,
                commit,
                on_demand: std::mem::take(&mut self.cut_wanted),
                all,
                whole,
            });
            return false;
        };
        let made = faults.board().made();
        if made.number != asked.number {
            self.asked = Some(asked);
            return false;
        }
        if made.all && !asked.all {
            statistics.full_compares += 1;
            let reason = chain(&TrackError::Void);
            statistics.losses.note(LossKind::CutVoid, &reason);
            statistics.last_loss = Some(reason);
        }
        let board = std::sync::Arc::clone(faults.board());
        self.take_growth(control);
        let capture = match Capture::cut(board, made) {
            Ok(capture) => capture,
            Err(error) => {
                tracing::error!(error = chain(&error), "a cut cannot be captured");
                self.end_faults(chain(&error), Instant::now());
                return false;
            }
        };
        self.capture = Some(Running {
            capture,
            commit: asked.commit,
            source_time_ns: realtime_ns(),
            cost: Duration::ZERO,
            put_off_since: None,
            began: Instant::now(),
            lost: false,
            on_demand: asked.on_demand,
            whole: asked.whole,
        });
        true
    }

    /// What was copied of a cut is of no instant: the next one is of everything.
    pub(super) fn give_up_cut(
        &mut self,
        error: &TrackError,
        statistics: &mut Statistics,
        now: Instant,
    ) {
        tracing::warn!(error = chain(error), "a cut was given up");
        // A fault thread that ended is told of when it rings.
        if let (Some(kind), TrackError::Void) = (kind_of(error), error) {
            statistics.losses.note(kind, &chain(error));
        }
        if let Some(mut running) = self.capture.take() {
            running.capture.abandon();
            self.cut_wanted |= running.on_demand;
        }
        self.lose(chain(error), now);
    }

    /// The fault thread has rung. Says why, if it answers no faults any more.
    pub(in crate::engine) fn hear_faults(
        &mut self,
        statistics: &mut Statistics,
        now: Instant,
    ) -> Option<Lost> {
        let faults = self.faults.as_ref()?;
        faults.heard();
        let board = faults.board();
        if let Some(lost) = board.lost() {
            return Some(lost);
        }
        let is_idle = self.capture.is_none() && self.asked.is_none();
        if is_idle && board.is_void(board.made().number) && self.lost.is_none() {
            let reason = chain(&TrackError::Void);
            statistics.losses.note(LossKind::CutVoid, &reason);
            self.lose(reason, now);
        } else if is_idle
            && self.due.is_none()
            && self.publish == Publish::Timer
            && board.is_dirty()
        {
            self.due = Some(now + Duration::from_micros(self.interval.current()));
        }
        None
    }

    /// Ends exact tracking: what is left compares.
    pub(in crate::engine) fn end_faults(&mut self, reason: impl Into<String>, now: Instant) {
        if self.faults.take().is_none() {
            return;
        }
        self.asked = None;
        if self
            .capture
            .as_ref()
            .is_some_and(|it| it.capture.is_of_cut())
        {
            self.capture = None;
        }
        self.tracker = Tracker::Compare {
            attachments: self.tracker.take_attachments(),
        };
        self.lose(reason, now);
    }
}
