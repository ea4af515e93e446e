//! A region that a writer process (or a file) changes: its twin, its capture in
//! progress and when the next one is due. A value: the loop gives it time.
//!
//! ```text
//!             timer, doorbell, marks                    all steps done
//!   idle ------------------------------> capturing ------------------> epoch
//!                                           |  ^
//!                        no room for        |  | up to 100 ms later, or at once
//!                        pre-images         v  | for a commit: drop a pin
//!                                        put off
//! ```
//!
//! I1. A commit is answered only by a capture that began after its request was seen.
//! I2. An epoch is a cut only if no thread was inside a guard before and after the
//!     capture, none entered in between, and the commit that asked for it still waits.
//! I3. When tracking was lost for any reason the next capture compares everything.
//! I4. In mode `sync` a capture begins with a cut that the fault thread makes ([`exact`]),
//!     and every epoch is one.

#[path = "exact.rs"]
mod exact;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::audit::Audit;
use super::crew::Crew;
use super::faults::FaultThread;
use super::idle::Sleep;
use super::losses::kind_of;
use super::regions::Statistics;
use super::requests::{Refusal, duplicate};
use crate::limits;
use crate::region::{Control, GuardState};
use crate::replicate::Coming;
use crate::sys::memfd;
use crate::sys::process::{EventFd, realtime_ns};
use crate::track::{
    Capture, Captured, ExtentSet, Interval, PreImages, Source, Step, Tracker, Twin, WhenFull,
};
use crate::units::{PAGE_SIZE, pages_for};
use crate::words::{EpochKind, Mode, Publish};
use exact::Asked;

/// Everything the loop keeps of a tracked region beside its entry.
pub(super) struct Tracked {
    pub(super) twin: Twin,
    pub(super) tracker: Tracker,
    pub(super) source: Source,
    pub(super) doorbell: Option<(EventFd, Arc<std::os::fd::OwnedFd>)>,
    pub(super) writer_pid: Option<i32>,
    pub(super) mode: Mode,
    /// Why it is this mode, if the writer left that to `auto`.
    pub(super) chosen: Option<String>,
    pub(super) publish: Publish,
    pub(super) interval: Interval,
    /// Bounds that the writer asked for, in microseconds.
    pub(super) own_bounds: (Option<u64>, Option<u64>),
    pub(super) audit: Audit,
    /// Whether the connection of the hand-over ended and the process has not yet.
    pub(super) link_ended: bool,
    /// Since when a process that counts as living has had no memory: it exits, which
    /// takes a moment, or it became another program.
    pub(super) memory_gone: Option<Instant>,
    capture: Option<Running>,
    /// Why the next capture has to compare everything.
    lost: Option<String>,
    /// When the next timer capture is due; none where only commits publish, and while
    /// the region sleeps.
    pub(super) due: Option<Instant>,
    /// Whether it sleeps, see `idle`.
    pub(super) sleep: Sleep,
    /// Of a cooperative region: its writers.
    pub(super) crew: Option<Crew>,
    /// In mode `sync`: who answers the writer's faults.
    pub(super) faults: Option<FaultThread>,
    /// A cut that the fault thread was asked for.
    asked: Option<Asked>,
    /// Whether somebody waits for a cut beside commits and the timer.
    pub(super) cut_wanted: bool,
    /// The last cut that was asked for.
    last_asked: u64,
    /// Whether the capture in progress, or the next, is the first of a greater size.
    grown: bool,
    /// A size that was claimed and that the file does not have: told once.
    unfounded: u64,
}

struct Running {
    capture: Capture,
    commit: Option<CommitSeen>,
    source_time_ns: u64,
    cost: Duration,
    put_off_since: Option<Instant>,
    began: Instant,
    /// Whether tracking was lost in this capture already.
    lost: bool,
    /// Whether it serves those who asked for a cut.
    on_demand: bool,
    /// Whether all who may store were seen when it began.
    whole: bool,
}

/// A commit request and the guard's state when the capture for it began.
#[derive(Clone, Copy)]
struct CommitSeen {
    request: u64,
    guard: GuardState,
}

/// What came of working on a capture.
pub(super) enum Progress {
    /// Nothing is in progress.
    Idle,
    /// Call again in the next turn.
    More,
    /// Call again at that time.
    Later(Instant),
    /// The fault thread will tell.
    Asked,
    /// A capture is complete.
    Done(Finished),
}

/// A complete capture, not yet published.
pub(super) struct Finished {
    pub(super) captured: Captured,
    pub(super) kind: EpochKind,
    /// The request that it answers.
    pub(super) request: Option<u64>,
    /// In mode `sync`: which cut it is.
    pub(super) cut: Option<u64>,
    pub(super) source_time_ns: u64,
    pub(super) cost: Duration,
    /// Whether the region has a greater size with it.
    pub(super) grown: bool,
    /// When it began, or later, but before anything was looked at.
    pub(super) began: Instant,
}

/// What a tracked region starts with.
pub(super) struct Start {
    pub(super) twin: Twin,
    pub(super) tracker: Tracker,
    pub(super) source: Source,
    pub(super) writer_pid: Option<i32>,
    pub(super) mode: Mode,
    pub(super) publish: Publish,
    pub(super) interval: Interval,
    pub(super) own_bounds: (Option<u64>, Option<u64>),
    pub(super) faults: Option<FaultThread>,
}

impl Tracked {
    pub(super) fn new(start: Start, now: Instant) -> Self {
        let Start {
            twin,
            tracker,
            source,
            writer_pid,
            mode,
            publish,
            ..
        } = start;
        Self {
            twin,
            tracker,
            source,
            doorbell: None,
            writer_pid,
            mode,
            chosen: None,
            publish,
            interval: start.interval,
            own_bounds: start.own_bounds,
            audit: Audit::new(now),
            link_ended: false,
            memory_gone: None,
            capture: None,
            // The first capture reads everything that is there.
            lost: Some("first capture".to_owned()),
            due: Some(now),
            sleep: Sleep::default(),
            crew: None,
            faults: start.faults,
            asked: None,
            cut_wanted: false,
            last_asked: 0,
            grown: false,
            unfounded: 0,
        }
    }

    /// Takes a greater size over, if the writer told one and its file has it; from which.
    /// In mode `sync` after the cut that is captured, so that no page of it lies behind
    /// the size; else after the marks were taken, for the same reason.
    fn take_growth(&mut self, control: &Control) -> Option<u64> {
        let (claimed, old) = (control.size(), self.twin.size());
        if self.is_file() || claimed <= old || claimed == self.unfounded {
            return None;
        }
        let real = memfd::size(self.source.fd());
        if !real.is_ok_and(|real| real >= claimed) {
            tracing::warn!(
                claimed,
                "a writer tells a size that its memory does not have"
            );
            self.unfounded = claimed;
            return None;
        }
        if let Tracker::Sync { board, .. } = &self.tracker {
            board.set_present(pages_for(claimed));
        }
        self.twin.grow(claimed);
        self.grown = true;
        Some(old)
    }

    /// Commits ring here from now on.
    pub(super) fn hear(&mut self, doorbell: EventFd) -> Result<(), Refusal> {
        let fd = Arc::new(duplicate(&doorbell)?);
        self.doorbell = Some((doorbell, fd));
        Ok(())
    }

    pub(super) fn is_file(&self) -> bool {
        matches!(self.source, Source::File { .. })
    }

    /// The pages that the twin holds anything in.
    pub(super) fn present(&self) -> ExtentSet {
        let size = self.twin.size();
        let mut present = ExtentSet::new(size);
        for pages in self.twin.touched().runs() {
            present.insert(pages.start * PAGE_SIZE..(pages.end * PAGE_SIZE).min(size));
        }
        present
    }

    /// The capture under way, if it changes so much that it is shipped while it goes on.
    pub(super) fn coming(&self, epoch: u64) -> Option<Coming<'_>> {
        let running = self.capture.as_ref()?;
        let much = running.capture.changed_bytes() >= limits::EARLY_MIN;
        much.then(|| Coming {
            epoch: epoch + 1,
            source_time_ns: running.source_time_ns,
            changed: self.twin.changed(),
            settled: running.capture.settled(self.twin.size()),
        })
    }

    pub(super) fn is_capturing(&self) -> bool {
        self.capture.is_some()
    }

    /// Whether a capture is in progress or about to begin.
    pub(super) fn is_at_work(&self) -> bool {
        self.capture.is_some() || self.asked.is_some()
    }

    /// The writer's process id while it lives.
    pub(super) fn living_writer(&self) -> Option<i32> {
        if self.crew.is_some() {
            let mut living = self.tracker.attachments().iter();
            return living.find(|it| !it.has_exited())?.pidfd.pid().ok();
        }
        let attachment = self.tracker.attachment()?;
        if self.link_ended || attachment.has_exited() {
            None
        } else {
            self.writer_pid
        }
    }

    /// The next capture compares everything. It is due at once, except where a writer
    /// that lives publishes by commits: before the next one a transaction may be open.
    pub(super) fn lose(&mut self, reason: impl Into<String>, now: Instant) {
        self.lost = Some(reason.into());
        let may_be_open = self.publish == Publish::Commit && self.living_writer().is_some();
        self.due = (!may_be_open).then_some(now);
    }

    /// Whether the next capture compares everything.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// Gives write-protection up, for a mapping that it does not hold for any more.
    pub(super) fn compare_from_now_on(&mut self) {
        self.tracker = Tracker::Compare {
            attachments: self.tracker.take_attachments(),
        };
        // A capture of what was reported would end as if nothing else had changed.
        if self.capture.is_some() {
            self.restart_whole();
        }
    }

    /// Work done on the capture in progress.
    pub(super) fn work_done(&self) -> Duration {
        self.capture
            .as_ref()
            .map_or(Duration::ZERO, |running| running.cost)
    }

    /// Whether somebody is there who may still change the memory.
    pub(super) fn has_source(&self) -> bool {
        self.is_file() || self.tracker.attachment().is_some()
    }

    /// Whether a capture is wanted at `now`.
    fn wanted(&self, control: &Control, now: Instant) -> bool {
        control.commit_pending().is_some()
            || self.cut_wanted
            || (self.publish == Publish::Timer && self.has_grown(control))
            || self.due.is_some_and(|due| due <= now)
    }

    /// Whether the writer tells a size that no capture has taken over.
    fn has_grown(&self, control: &Control) -> bool {
        let claimed = control.size();
        claimed > self.twin.size() && claimed != self.unfounded && !self.is_file()
    }

    /// Works on the region for at most `budget`.
    pub(super) fn work(
        &mut self,
        control: &Control,
        pre: &mut PreImages,
        statistics: &mut Statistics,
        now: Instant,
        budget: Duration,
    ) -> Progress {
        if self.capture.is_none() {
            if self.asked.is_none() && !self.wanted(control, now) {
                return Progress::Idle;
            }
            if self.is_exact() {
                if !self.begin_exact(control, statistics) {
                    let still = self.is_exact();
                    return if still {
                        Progress::Asked
                    } else {
                        Progress::More
                    };
                }
            } else {
                self.begin(control, statistics);
            }
        }
        let started = Instant::now();
        let outcome = self.steps(control, pre, statistics, now, started + budget);
        if let Some(running) = &mut self.capture {
            running.cost += started.elapsed();
        }
        if let Some(faults) = &self.faults {
            faults.freed();
        }
        match outcome {
            Some(Step::Done(captured)) => match self.capture.take() {
                Some(running) => Progress::Done(self.finish(running, captured, control)),
                None => Progress::Idle,
            },
            Some(Step::NoRoom) => Progress::Later(now + Duration::from_millis(2)),
            _ => Progress::More,
        }
    }

    fn begin(&mut self, control: &Control, statistics: &mut Statistics) {
        let seen = |request| CommitSeen {
            request,
            guard: control.guard_state(),
        };
        let commit = control.commit_pending().map(seen);
        let mut marks = Vec::new();
        control.drain_marks(&mut marks, control.max_size());
        let grown_from = self.take_growth(control);
        let capture = match self.lost.take() {
            Some(reason) => {
                if statistics.captures > 0 {
                    statistics.full_compares += 1;
                    statistics.last_loss = Some(reason);
                }
                Capture::full()
            }
            None => match grown_from {
                Some(size) => Capture::dirty(&self.tracker, marks).grown_from(size),
                None => Capture::dirty(&self.tracker, marks),
            },
        };
        self.due = None;
        self.sleep.end();
        let whole = match &mut self.crew {
            Some(crew) => !crew.take_torn() && crew.is_complete(),
            None => true,
        };
        self.capture = Some(Running {
            capture,
            commit,
            source_time_ns: realtime_ns(),
            cost: Duration::ZERO,
            put_off_since: None,
            began: Instant::now(),
            lost: false,
            on_demand: false,
            whole,
        });
    }

    /// Steps until the capture is done, has no room, or the time is over (none).
    fn steps(
        &mut self,
        control: &Control,
        pre: &mut PreImages,
        statistics: &mut Statistics,
        now: Instant,
        end: Instant,
    ) -> Option<Step> {
        let bound = Duration::from_millis(limits::CAPTURE_POSTPONE_MS);
        loop {
            let running = self.capture.as_mut()?;
            let waited = running
                .put_off_since
                .is_some_and(|since| now - since >= bound);
            let starved = self
                .faults
                .as_ref()
                .is_some_and(|it| it.board().is_starved());
            let urgent =
                waited || starved || running.commit.is_some() || control.commit_pending().is_some();
            let when_full = if urgent {
                WhenFull::Abort
            } else {
                WhenFull::PutOff
            };
            let step = running.capture.step(
                &mut self.tracker,
                &self.source,
                &mut self.twin,
                pre,
                when_full,
            );
            match step {
                Step::More if Instant::now() < end => {}
                Step::More => return None,
                Step::NoRoom => {
                    running.put_off_since.get_or_insert(now);
                    return Some(Step::NoRoom);
                }
                Step::Lost(error) if running.capture.is_of_cut() => {
                    self.give_up_cut(&error, statistics, now);
                    return None;
                }
                Step::Lost(error) => {
                    pre.give_up_coming();
                    tracing::warn!(error = super::requests::chain(&error), "tracking lost");
                    statistics.full_compares += 1;
                    let reason = super::requests::chain(&error);
                    match kind_of(&error) {
                        Some(kind) => statistics.losses.note(kind, &reason),
                        None => drop(self.memory_gone.get_or_insert(now)),
                    }
                    statistics.last_loss = Some(reason);
                    // What cannot be armed again is compared from now on.
                    let again = std::mem::replace(&mut running.lost, true);
                    running.capture = Capture::full();
                    if again {
                        self.compare_from_now_on();
                    }
                }
                done => return Some(done),
            }
        }
    }

    /// What was moved into the twin until now is noted there: nothing of it is lost.
    pub(super) fn restart_whole(&mut self) {
        if let Some(running) = &mut self.capture {
            running.capture = Capture::full();
        }
    }

    fn finish(&mut self, running: Running, captured: Captured, control: &Control) -> Finished {
        let still_quiet = running
            .commit
            .is_some_and(|seen| seen.guard.is_cut(&control.guard_state()));
        let exact = running.capture.is_of_cut();
        let whole = running.whole && self.crew.as_ref().is_none_or(Crew::is_complete);
        Finished {
            kind: if (still_quiet || exact) && whole {
                EpochKind::Cut
            } else {
                EpochKind::Convergent
            },
            request: running.commit.map(|seen| seen.request),
            cut: running.capture.is_of_cut().then_some(self.last_asked),
            source_time_ns: running.source_time_ns,
            cost: running.cost,
            grown: std::mem::take(&mut self.grown),
            began: running.began,
            captured,
        }
    }

    /// Plans the next timer capture after one that found `dirty_pages`; after one that
    /// found none the pause is `stretch` times as long.
    pub(super) fn schedule(
        &mut self,
        cost: Duration,
        dirty_pages: u64,
        stretch: u64,
        now: Instant,
    ) {
        let cost_us = u64::try_from(cost.as_micros()).unwrap_or(u64::MAX);
        let pause = self.interval.after_capture(cost_us, dirty_pages, stretch);
        let nothing_new = self
            .faults
            .as_ref()
            .is_some_and(|it| !it.board().is_dirty());
        let by_timer = self.publish == Publish::Timer && self.has_source() && !nothing_new;
        if self.due.is_none() && by_timer {
            self.due = Some(now + Duration::from_micros(pause));
        }
    }
}
