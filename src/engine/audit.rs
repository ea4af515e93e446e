//! Whether what is known of a region's changes still is all there is to know.
//!
//! ```text
//! once a second: each tracked region is given an amount of work
//!     mapping   are stores to it still seen?                      all within 8 s
//!     content   does the twin equal what nobody reported?         all within `audit_period`
//!     watch     do stores wait, and no capture takes them?
//! every 2 ms, while work is left: one region after the other, 0.2 ms of it
//! ```
//! I1. What is due and could not be done is not piled up: at most one round is owed.
//! I2. The audit takes a tenth of a processor at most, however much there is to do;
//!     `status` shows how long a round really took.
//! I3. Whatever it finds is counted with its reason, and the region is compared whole.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::Engine;
use super::keys::Key;
use super::losses::kind_of;
use super::regions::{Body, RegionEntry};
use super::requests::chain;
use super::timers::Timer;
use super::tracked::Tracked;
use crate::limits;
use crate::region::Control;
use crate::track;
use crate::units::PAGE_SIZE;
use crate::wire::control::AuditStatus;
use crate::words::{LossKind, Publish};

/// The kernel's answer about a process whose memory is gone.
const ESRCH: i32 = nix::libc::ESRCH;

/// How long the end of a process may take after its memory is gone, before it counts as
/// one that became another program.
const ENDING: Duration = Duration::from_millis(900);

/// The audit of one region: where it stands, and what it still owes.
#[derive(Debug)]
pub(super) struct Audit {
    content: track::Audit,
    /// Bytes that are to be compared.
    owed: u64,
    /// What was granted and is less than a page.
    spare: u64,
    rounds: u64,
    round_began: Instant,
    last_round: Option<Duration>,
    /// Which writer's mapping is looked at.
    mapping_of: usize,
    mapping_at: u64,
    mapping_owed: u64,
    mapping_rounds: u64,
    /// A slice that was found open in parts: which mapping's, and where it begins.
    suspect: Option<(usize, u64)>,
    watch: Watch,
}

/// What is watched of a region's captures.
#[derive(Debug)]
struct Watch {
    captures: u64,
    /// Work that was done on the capture in progress.
    work: Duration,
    /// When one of the two grew last.
    moved: Instant,
    /// Whether stores were seen that no capture has taken.
    stored: bool,
    told: bool,
}

/// Something that was found.
struct Finding {
    kind: LossKind,
    reason: String,
}

impl Finding {
    fn new(kind: LossKind, reason: impl Into<String>) -> Self {
        Self {
            kind,
            reason: reason.into(),
        }
    }
}

impl Audit {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            content: track::Audit::default(),
            owed: 0,
            spare: 0,
            rounds: 0,
            round_began: now,
            last_round: None,
            mapping_of: 0,
            mapping_at: 0,
            mapping_owed: 0,
            mapping_rounds: 0,
            suspect: None,
            watch: Watch {
                captures: 0,
                work: Duration::ZERO,
                moved: now,
                stored: false,
                told: false,
            },
        }
    }

    pub(super) fn status(&self, period: Duration) -> AuditStatus {
        AuditStatus {
            period_ms: period.as_millis() as u64,
            rounds: self.rounds,
            last_round_ms: self.last_round.map(|time| time.as_millis() as u64),
            position: self.content.position(),
            mapping_rounds: self.mapping_rounds,
        }
    }

    /// The share of one second in a round of `period`.
    fn grant(&mut self, size: u64, mapped: u64, period: Duration) {
        let period_ms = (period.as_millis() as u64).max(1);
        // Bytes times milliseconds, so that small regions are not audited faster.
        let granted = u128::from(size) * 1_000 + u128::from(self.spare);
        let bytes = u64::try_from(granted / u128::from(period_ms)).unwrap_or(u64::MAX);
        let pages = bytes / PAGE_SIZE;
        let used = u128::from(pages * PAGE_SIZE) * u128::from(period_ms);
        self.spare = u64::try_from(granted - used).unwrap_or(0);
        let round = size.next_multiple_of(PAGE_SIZE);
        self.owed = (self.owed + pages * PAGE_SIZE).min(round);
        let mapping = (mapped / limits::MAPPING_DIVISOR).max(limits::MAPPING_SLICE);
        self.mapping_owed = mapping.min(mapped);
    }

    fn is_idle(&self) -> bool {
        self.owed == 0 && self.mapping_owed == 0
    }
}

impl Engine {
    /// Gives out the audit work of one second, and looks for regions that stand still.
    pub(super) fn begin_audit(&mut self) {
        let period = self.settings.tunables.audit_period;
        for key in self.regions.keys() {
            let Some(entry) = self.regions.get_mut(key) else {
                continue;
            };
            let captures = entry.statistics.captures;
            let Body::Tracked(tracked) = &mut entry.body else {
                continue;
            };
            let standstill = tracked.stands_still(&entry.control, captures, self.now);
            let replaced = match tracked.crew {
                Some(_) => None,
                None => tracked.replaced(self.now),
            };
            let waits = !tracked.audit.is_idle();
            if track::Audit::concerns(&tracked.tracker) {
                let attachments = tracked.tracker.attachments();
                let mapped = attachments.iter().map(|it| it.len).sum();
                tracked.audit.grant(entry.size, mapped, period);
                if !waits && !tracked.audit.is_idle() {
                    self.audits.push_back(key);
                }
            }
            for finding in standstill.into_iter().chain(replaced) {
                self.found(key, finding);
            }
            self.muster(key);
        }
        if !self.audits.is_empty() {
            self.audit_later();
        }
    }

    fn audit_later(&mut self) {
        if !self.auditing {
            self.auditing = true;
            let at = self.now + Duration::from_micros(limits::AUDIT_PAUSE_US);
            self.timers.set(at, Timer::Audit);
        }
    }

    /// One turn of the audit.
    pub(super) fn audit(&mut self) {
        self.auditing = false;
        let end = Instant::now() + Duration::from_micros(limits::AUDIT_TURN_US);
        for _ in 0..self.audits.len() {
            let Some(key) = self.audits.pop_front() else {
                break;
            };
            let Some(RegionEntry {
                body: Body::Tracked(tracked),
                ..
            }) = self.regions.get_mut(key)
            else {
                continue;
            };
            let finding = tracked.audit_until(end, self.now);
            if !tracked.audit.is_idle() {
                self.audits.push_back(key);
            }
            if let Some(finding) = finding {
                self.found(key, finding);
            }
            if Instant::now() >= end {
                break;
            }
        }
        if !self.audits.is_empty() {
            self.audit_later();
        }
    }

    /// Counts what was found and does what it calls for.
    fn found(&mut self, key: Key, finding: Finding) {
        let Some(entry) = self.regions.get_mut(key) else {
            return;
        };
        let Body::Tracked(tracked) = &mut entry.body else {
            return;
        };
        let Finding { kind, reason } = finding;
        if kind == LossKind::WriterReplaced && tracked.link_ended {
            return self.writer_left(key, kind);
        }
        tracing::warn!(region = %entry.name, %kind, reason, "tracking is not what it was");
        entry.statistics.losses.note(kind, &reason);
        match kind {
            LossKind::Standstill if tracked.publish == Publish::Commit => return,
            LossKind::Standstill => tracked.due = Some(self.now),
            LossKind::Untracked | LossKind::WriterReplaced => {
                tracked.end_faults(reason.as_str(), self.now);
                tracked.compare_from_now_on();
                tracked.lose(reason.as_str(), self.now);
                if kind == LossKind::WriterReplaced {
                    // The program that would have committed is gone, its process is not.
                    tracked.due = Some(self.now);
                }
                self.refuse_cuts(key, &reason);
            }
            _ => tracked.lose(reason, self.now),
        }
        self.make_runnable(key);
    }
}

impl Tracked {
    /// Works off what is owed until `end`; stops at the first finding.
    fn audit_until(&mut self, end: Instant, now: Instant) -> Option<Finding> {
        if !track::Audit::concerns(&self.tracker) {
            (self.audit.owed, self.audit.mapping_owed) = (0, 0);
            return None;
        }
        while self.audit.mapping_owed > 0 && self.knows_what_is_open() {
            let finding = self.audit_mapping(now);
            if finding.is_some() || Instant::now() >= end {
                return finding;
            }
        }
        if self.is_lost() && self.due.is_none() {
            // Not before a commit, whenever that comes.
            (self.audit.owed, self.audit.mapping_owed) = (0, 0);
        }
        // Between captures, and once there was one, the twin is what was reported.
        while self.audit.owed > 0 && !self.is_capturing() && !self.is_lost() && !self.awaits_cut() {
            let finding = self.audit_content(now);
            if finding.is_some() || Instant::now() >= end {
                return finding;
            }
        }
        None
    }

    /// In mode `sync`: whether all pages are armed but for those that were stored to.
    fn knows_what_is_open(&self) -> bool {
        !self.is_exact() || !(self.is_capturing() || self.is_lost() || self.awaits_cut())
    }

    /// Asks about one slice of the mapping: whether it is tracked still, and whether
    /// something was stored there.
    fn audit_mapping(&mut self, now: Instant) -> Option<Finding> {
        let attachments = self.tracker.attachments();
        let of = self.audit.mapping_of;
        let Some(attachment) = attachments.get(of) else {
            // Writers have left meanwhile: a round begins.
            (self.audit.mapping_of, self.audit.mapping_at) = (0, 0);
            if attachments.is_empty() {
                self.audit.mapping_owed = 0;
            }
            return None;
        };
        let is_last = of + 1 >= attachments.len();
        let from = self.audit.mapping_at;
        let to = attachment.len.min(from + limits::MAPPING_SLICE);
        let answer = attachment.tracked_bytes(&self.tracker, from..to);
        if !self.audit.watch.stored {
            self.audit.watch.stored = self
                .tracker
                .is_stored_to(from..to, &self.twin, &self.source);
        }
        let (mut gone, mut again) = (None, false);
        let len = attachment.len;
        let place = (of, from);
        let finding = match answer {
            Ok(tracked) if tracked >= to - from => None,
            // The end of the process is noticed by other means, and is no alarm.
            _ if attachment.has_exited() => None,
            Ok(tracked) => {
                // Where a cut of everything may arm it again it is looked at once more.
                again = self.is_exact() && self.audit.suspect != Some(place);
                let kind = if again {
                    LossKind::UnseenWrite
                } else {
                    LossKind::Untracked
                };
                let open = to - from - tracked;
                Some(Finding::new(kind, open_text(open, from..to)))
            }
            Err(error) if error.raw_os_error() == Some(ESRCH) => {
                gone = Some(attachment.slot);
                None
            }
            Err(error) => Some(Finding::new(LossKind::ScanError, chain(&error))),
        };
        self.audit.suspect = again.then_some(place);
        if again {
            return finding;
        }
        if let Some(slot) = gone
            && !self.note_memory_gone(slot, now)
        {
            self.memory_gone.get_or_insert(now);
        }
        let audit = &mut self.audit;
        audit.mapping_owed = audit.mapping_owed.saturating_sub(to - from);
        audit.mapping_at = to;
        if to >= len {
            audit.mapping_at = 0;
            audit.mapping_of = if is_last { 0 } else { of + 1 };
            audit.mapping_rounds += u64::from(is_last);
        }
        finding
    }

    fn audit_content(&mut self, now: Instant) -> Option<Finding> {
        let audit = &mut self.audit;
        let step = audit
            .content
            .step(&self.tracker, &self.source, &self.twin, audit.owed);
        let looked = match step {
            Ok(looked) => looked,
            Err(error) => {
                audit.owed = 0;
                let kind = kind_of(&error)?;
                return Some(Finding::new(kind, chain(&error)));
            }
        };
        audit.owed = audit.owed.saturating_sub(looked.bytes);
        if looked.round {
            audit.rounds += 1;
            audit.last_round = Some(now.duration_since(audit.round_began));
            audit.round_began = now;
        }
        let (page, count) = looked.unseen?;
        Some(Finding::new(
            LossKind::UnseenWrite,
            format!(
                "{count} pages, the first at offset {}, changed and were not reported: written \
                 through another mapping, by another process or into pinned memory",
                page * PAGE_SIZE
            ),
        ))
    }

    /// Whether a process whose memory is gone lives on, told once. An exit gives its
    /// memory back first, so it is given time to be seen.
    fn replaced(&mut self, now: Instant) -> Option<Finding> {
        let since = self.memory_gone?;
        let lives = !self.tracker.attachment()?.has_exited();
        if now.duration_since(since) < ENDING || !lives {
            return None;
        }
        self.memory_gone = None;
        Some(Finding::new(
            LossKind::WriterReplaced,
            "the writing process lives and its memory is gone: it runs another program",
        ))
    }

    /// Whether stores have waited for too long, told once.
    fn stands_still(&mut self, control: &Control, captures: u64, now: Instant) -> Option<Finding> {
        let work = self.work_done();
        let (timer, alive) = (self.publish == Publish::Timer, self.has_source());
        let asked = control.commit_pending().is_some();
        // Where the first store rings, nothing is captured while nothing is stored.
        let stored = self.faults.as_ref().map(|it| it.board().is_dirty());
        let rests = stored == Some(false) && !asked && !self.is_at_work();
        let pause = Duration::from_micros(self.interval.bounds().1);
        let bound = Duration::from_millis(limits::STANDSTILL_MS).max(3 * pause);
        let watch = &mut self.audit.watch;
        if captures != watch.captures || work != watch.work || !alive || rests {
            *watch = Watch {
                captures,
                work,
                moved: now,
                stored: false,
                told: false,
            };
            return None;
        }
        watch.stored |= stored == Some(true);
        let stands = now.duration_since(watch.moved);
        if watch.told || stands < bound || !(timer || asked || watch.stored) {
            return None;
        }
        watch.told = true;
        let seconds = stands.as_secs();
        let reason = match (asked, timer) {
            (true, _) => format!("a commit has waited for {seconds} s"),
            (false, true) => format!("nothing was captured for {seconds} s"),
            (false, false) => format!("the writer stores, and has not committed for {seconds} s"),
        };
        Some(Finding::new(LossKind::Standstill, reason))
    }
}

fn open_text(open: u64, slice: Range<u64>) -> String {
    format!(
        "{open} of {} bytes at offset {} of the writer's mapping are not tracked: unmapped, \
         moved, mapped over or unregistered",
        slice.end - slice.start,
        slice.start
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GIB, MIB};

    #[test]
    fn each_second_brings_its_share_of_a_round() {
        for (size, period_s) in [(1, 60), (5 * PAGE_SIZE, 60), (GIB + 5, 60), (MIB, 1)] {
            let mut audit = Audit::new(Instant::now());
            let period = Duration::from_secs(period_s);
            let mut done = 0;
            for _ in 0..10 * period_s {
                audit.grant(size, size, period);
                done += std::mem::take(&mut audit.owed);
            }
            let rounds = done as f64 / size as f64;
            assert!(
                done <= 10 * size.next_multiple_of(PAGE_SIZE) && done + PAGE_SIZE >= 10 * size,
                "{size} bytes: {rounds} rounds in 10 periods"
            );
        }
    }

    #[test]
    fn what_could_not_be_done_is_not_piled_up() {
        let mut audit = Audit::new(Instant::now());
        for _ in 0..1_000 {
            audit.grant(10 * MIB, 16 * GIB, Duration::from_secs(60));
        }
        assert_eq!((audit.owed, audit.mapping_owed), (10 * MIB, 2 * GIB));
    }
}
