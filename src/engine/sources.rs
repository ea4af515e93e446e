//! Regions that are written on this node: hand-over, captures, epochs, the writer's end.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::crew::{Crew, new_doorbell};
use super::exports;
use super::faults::{Content, FaultThread, Writing};
use super::hand_over::{Parts, check_mapping, check_mode, check_writer, open_control};
use super::keys::Key;
use super::losses::{Losses, kind_of_lost, printable};
use super::regions::{Body, RegionEntry};
use super::requests::{
    Call, NewEntry, Refusal, Reply, check_size, check_sizes, duplicate, not_found, parse_name,
    read_only,
};
use super::timers::Timer;
use super::tracked::{Finished, Progress, Start, Tracked};
use super::{Engine, Token};
use crate::limits;
use crate::region::RegionKind;
use crate::replicate::CaptureInfo;
use crate::shm::SharedMemory;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd;
use crate::sys::ring::Op;
use crate::track::{Attachment, Interval, Source, Tracker, Twin};
use crate::units::{PAGE_SIZE, pages_for};
use crate::wire::control::{HandOver, RefusalCode, Response};
use crate::words::{EpochKind, Generation, LossKind, Mode, Publish, RegionName, WriteKind};

impl Engine {
    /// Takes over the tracking of a writer's region.
    pub(super) fn hand_over(&mut self, offer: HandOver, mut call: Call) -> Result<Reply, Refusal> {
        let name = parse_name(&offer.name)?;
        let max_size = checked_max_size(&offer)?;
        let fds = std::mem::take(&mut call.fds);
        if let Some(key) = self.crew_of(&name, &offer, &fds, &call)? {
            let parts = Parts::take(&offer, fds)?;
            return self.join(key, &offer, parts.attachment, &call, false);
        }
        let earlier = self.earlier_life(&name, &call)?;
        check_mode(offer.mode, self.behaviour)?;
        let parts = Parts::take(&offer, fds)?;
        check_writer(&parts.attachment, call.peer.pid)?;
        check_mapping(offer.mode, &parts.attachment)?;
        let control = open_control(&parts.control, offer.size, max_size)?;
        let doorbell = new_doorbell()?;
        let fds = vec![duplicate(&doorbell)?, self.pulse_fd()?];
        let data_fd = Arc::new(read_only(&parts.data)?);
        let control_fd = read_only(&parts.control)?;
        let data = duplicate(&parts.data)?;
        let (alone, first) = match offer.kind {
            WriteKind::Exclusive => (Some(parts.attachment), None),
            WriteKind::Cooperative => (None, Some(parts.attachment)),
        };
        let mut tracked = self.tracked(&offer, data, alone, earlier)?;
        if first.is_some() {
            tracked.crew = Some(Crew::new(parts.data, parts.control, &control, self.now));
        }
        tracked.hear(doorbell)?;
        tracked.chosen = offer.chosen.as_deref().map(printable);
        if let Some(reason) = &tracked.chosen {
            tracing::info!(region = %name, mode = %offer.mode, reason, "mode picked by auto");
        }
        let generation = Generation::random();
        let new = NewEntry {
            name,
            size: offer.size,
            max_size,
            shared: offer.shared,
            owner_uid: call.peer.uid,
            generation,
            kind: RegionKind::Source,
            data_fd,
            body: Body::Tracked(Box::new(tracked)),
        };
        let mut losses = Losses::default();
        if let Some(key) = earlier {
            if let Some(entry) = self.regions.get_mut(key) {
                losses = std::mem::take(&mut entry.statistics.losses);
            }
            self.drop_region(key, "a new writer took over");
        }
        let mut entry = self.entry_around(new, control, control_fd);
        entry.statistics.losses = losses;
        let key = self.add_region(entry);
        self.watch_writer(key);
        if let Some(first) = first {
            let joined = self.join(key, &offer, first, &call, true);
            if joined.is_err() {
                self.drop_region(key, "its first writer could not be taken on");
            }
            return joined;
        }
        self.note_writes(call.connection, key);
        self.make_runnable(key);
        let generation = generation.to_string();
        let slot = 0;
        Ok(Reply::new(Response::HandedOver { generation, slot }, fds))
    }

    /// What the loop keeps of a region that was handed over. The twin is that of its
    /// earlier life, if there is one.
    pub(super) fn tracked(
        &mut self,
        offer: &HandOver,
        data: OwnedFd,
        attachment: Option<Attachment>,
        earlier: Option<Key>,
    ) -> Result<Tracked, Refusal> {
        let max_size = offer.max_size.unwrap_or(offer.size);
        let memory = Mapping::with_room(&data, offer.size, max_size, Access::ReadOnly)
            .map_err(|error| Refusal::failed("cannot map the region", &error))?;
        let writer_pid = attachment.as_ref().and_then(|it| it.pidfd.pid().ok());
        let tracker = match offer.kind {
            WriteKind::Exclusive => Tracker::new(offer.mode, attachment),
            WriteKind::Cooperative => Tracker::empty(offer.mode, offer.size),
        };
        let mut tracker =
            tracker.map_err(|e| Refusal::failed("tracking cannot be taken over", &e))?;
        tracker.set_hot_after(self.settings.tunables.hot_after);
        if memfd::page_bytes(&data).is_ok_and(|bytes| bytes > PAGE_SIZE) {
            tracker.set_huge();
        }
        if let Tracker::Sync { board, .. } = &tracker {
            board.set_present(pages_for(offer.size));
        }
        let memory = SharedMemory::new(memory);
        let content = Content {
            memory: memory.clone(),
            fd: duplicate(&data)?,
        };
        let faults = self.start_faults(&mut tracker, content, offer.kind)?;
        let own_bounds = (offer.interval_min_us, offer.interval_max_us);
        let interval = self.interval_for(offer.mode, own_bounds);
        let twin = match earlier.and_then(|key| self.take_twin(key, offer.size, max_size)) {
            Some(twin) => twin,
            None => Twin::with_room(offer.size, max_size)
                .map_err(|e| Refusal::failed("no memory for the twin", &e))?,
        };
        let source = Source::Mapped { memory, fd: data };
        let start = Start {
            twin,
            tracker,
            source,
            writer_pid,
            mode: offer.mode,
            publish: offer.publish,
            interval,
            own_bounds,
            faults,
        };
        Ok(Tracked::new(start, self.now))
    }

    /// The thread that answers the faults of a region in mode `sync`.
    fn start_faults(
        &self,
        tracker: &mut Tracker,
        content: Content,
        kind: WriteKind,
    ) -> Result<Option<FaultThread>, Refusal> {
        let Tracker::Sync { attachments, board } = tracker else {
            return Ok(None);
        };
        let running = self.regions.iter().filter(|(_, entry)| match &entry.body {
            Body::Tracked(tracked) => tracked.is_exact(),
            _ => false,
        });
        if running.count() >= limits::MAX_FAULT_THREADS as usize {
            return Err(Refusal::new(
                RefusalCode::Limit,
                format!(
                    "the node has {} regions in mode sync already",
                    limits::MAX_FAULT_THREADS
                ),
            ));
        }
        let mut writers = Vec::new();
        for attachment in attachments {
            let uffd = attachment.uffd.take();
            let uffd = uffd.ok_or_else(|| Refusal::invalid("mode sync needs a userfaultfd"))?;
            let base = attachment.base;
            writers.push(Writing { uffd, base });
        }
        let started = match kind {
            WriteKind::Exclusive => FaultThread::start(board, content, writers),
            // Writers join one by one.
            WriteKind::Cooperative => FaultThread::start_empty(board, content),
        };
        started
            .map(Some)
            .map_err(|e| Refusal::failed("faults cannot be answered", &e))
    }

    /// The entry of that name if its writer is gone or is the caller itself.
    fn earlier_life(&self, name: &RegionName, call: &Call) -> Result<Option<Key>, Refusal> {
        if !self.names.contains_key(name) {
            self.free_name(name.as_str())?;
            return Ok(None);
        }
        let key = self.owned_region(name.as_str(), call)?;
        let (living, several) = match self.regions.get(key).map(|entry| &entry.body) {
            Some(Body::Tracked(tracked)) if !tracked.is_file() => {
                (tracked.living_writer(), tracked.crew.is_some())
            }
            _ => {
                return Err(Refusal::new(
                    RefusalCode::Exists,
                    format!("{name} exists and is not written by a program; choose another name"),
                ));
            }
        };
        match living {
            Some(pid) if several || pid != call.peer.pid => Err(Refusal::new(
                RefusalCode::Exists,
                already_written(name.as_str(), pid),
            )),
            _ => Ok(Some(key)),
        }
    }

    /// The content that followers know, so that a new life ships only what differs.
    fn take_twin(&mut self, key: Key, size: u64, max_size: u64) -> Option<Twin> {
        let entry = self.regions.get_mut(key)?;
        match &mut entry.body {
            Body::Tracked(tracked)
                if (entry.size, entry.max_size) == (size, max_size) && !tracked.is_capturing() =>
            {
                let empty = Twin::new(size).ok()?;
                Some(std::mem::replace(&mut tracked.twin, empty))
            }
            _ => None,
        }
    }

    pub(super) fn previous_life(&mut self, name: &str, call: &Call) -> Result<Reply, Refusal> {
        let key = self.owned_region(name, call)?;
        let entry = self.regions.get(key).ok_or_else(|| not_found(name))?;
        let Body::Tracked(tracked) = &entry.body else {
            return Err(Refusal::new(
                RefusalCode::Unsupported,
                format!("{name} is not a region that a program writes"),
            ));
        };
        if let Some(pid) = tracked.living_writer() {
            return Err(Refusal::new(
                RefusalCode::Exists,
                already_written(name, pid),
            ));
        }
        let fds = vec![duplicate(&entry.data_fd)?];
        Ok(Reply::new(Response::PreviousLife { size: entry.size }, fds))
    }

    /// Follows an open file by comparing it.
    pub(super) fn track_file(
        &mut self,
        name: &str,
        size: u64,
        shared: bool,
        mut call: Call,
    ) -> Result<(), Refusal> {
        let name = self.free_name(name)?;
        check_size(size)?;
        let (Some(fd), true) = (call.fds.pop(), call.fds.is_empty()) else {
            return Err(Refusal::invalid("one descriptor goes along: the file"));
        };
        let regular = memfd::is_regular_file(&fd);
        if !regular.map_err(|e| Refusal::failed("cannot look at the file", &e))? {
            return Err(Refusal::invalid(
                "what is to be tracked is not a regular file",
            ));
        }
        let data_fd = Arc::new(read_only(&fd)?);
        let own_bounds = (None, None);
        let tracked = Tracked::new(
            Start {
                twin: Twin::new(size).map_err(|e| Refusal::failed("no memory for the twin", &e))?,
                tracker: Tracker::Compare {
                    attachments: Vec::new(),
                },
                source: Source::File { fd, size },
                writer_pid: None,
                mode: Mode::Compare,
                publish: Publish::Timer,
                interval: self.interval_for(Mode::Compare, own_bounds),
                own_bounds,
                faults: None,
            },
            self.now,
        );
        let entry = self.new_entry(NewEntry {
            name,
            size,
            max_size: size,
            shared,
            owner_uid: call.peer.uid,
            generation: Generation::random(),
            kind: RegionKind::Source,
            data_fd,
            body: Body::Tracked(Box::new(tracked)),
        })?;
        let key = self.add_region(entry);
        self.make_runnable(key);
        Ok(())
    }

    fn interval_for(&self, mode: Mode, own: (Option<u64>, Option<u64>)) -> Interval {
        let tunables = &self.settings.tunables;
        let max = match mode {
            Mode::Manual => tunables.mark_max_delay.min(tunables.interval_max),
            _ => tunables.interval_max,
        };
        let bounds = limits::PAUSE_FLOOR_US..=limits::PAUSE_CEILING_US;
        let max = own.1.unwrap_or(max.as_micros() as u64);
        let max = max.clamp(*bounds.start(), *bounds.end());
        let min = own.0.unwrap_or(tunables.interval_min.as_micros() as u64);
        Interval::new(min.clamp(*bounds.start(), max), max)
    }

    /// New bounds for all regions after a reload.
    pub(super) fn retune(&mut self) {
        for key in self.regions.keys() {
            let bounds = match self.regions.get(key).map(|entry| &entry.body) {
                Some(Body::Tracked(tracked)) => (tracked.mode, tracked.own_bounds),
                _ => continue,
            };
            let interval = self.interval_for(bounds.0, bounds.1);
            if let Some(RegionEntry {
                body: Body::Tracked(tracked),
                ..
            }) = self.regions.get_mut(key)
            {
                tracked.interval = interval;
                tracked
                    .tracker
                    .set_hot_after(self.settings.tunables.hot_after);
            }
        }
    }

    pub(super) fn watch_writer(&mut self, key: Key) {
        self.await_doorbell(key);
        self.await_faults(key);
        let Some(RegionEntry {
            body: Body::Tracked(tracked),
            ..
        }) = self.regions.get(key)
        else {
            return;
        };
        if tracked.crew.is_some() {
            return;
        }
        let Some(pidfd) = tracked
            .tracker
            .attachment()
            .and_then(|a| duplicate(&a.pidfd).ok())
        else {
            return;
        };
        let op = Op::Poll {
            fd: Arc::new(pidfd),
            writable: false,
        };
        if let Err(error) = self.ring.submit(Token::WriterExit(key).to_bits(), op) {
            tracing::error!(%error, "a writer's end will only be noticed by its silence");
        }
    }

    fn await_doorbell(&mut self, key: Key) {
        let Some(RegionEntry {
            body: Body::Tracked(tracked),
            ..
        }) = self.regions.get(key)
        else {
            return;
        };
        let Some((_, fd)) = &tracked.doorbell else {
            return;
        };
        let op = Op::Poll {
            fd: Arc::clone(fd),
            writable: false,
        };
        if let Err(error) = self.ring.submit(Token::Doorbell(key).to_bits(), op) {
            tracing::error!(%error, "a region's doorbell is not heard any more");
        }
    }

    pub(super) fn doorbell_rang(&mut self, key: Key) {
        if let Some(RegionEntry {
            body: Body::Tracked(tracked),
            ..
        }) = self.regions.get_mut(key)
            && let Some((doorbell, _)) = &tracked.doorbell
        {
            doorbell.drain();
            // A commit does not wait behind other regions' background work, but takes
            // turns with other commits.
            if self.is_late() {
                self.make_runnable(key);
            } else {
                self.work_on(key);
            }
            self.await_doorbell(key);
        }
    }

    fn await_faults(&mut self, key: Key) {
        let Some(RegionEntry {
            body: Body::Tracked(tracked),
            ..
        }) = self.regions.get(key)
        else {
            return;
        };
        let Some(faults) = &tracked.faults else {
            return;
        };
        let op = Op::Poll {
            fd: Arc::clone(faults.events()),
            writable: false,
        };
        if let Err(error) = self.ring.submit(Token::Faults(key).to_bits(), op) {
            tracing::error!(%error, "a region's faults are not heard of any more");
        }
    }

    /// The fault thread of a region tells: a cut, a first store, a loss.
    pub(super) fn faults_rang(&mut self, key: Key) {
        let now = self.now;
        self.hear_of_members(key);
        let Some(entry) = self.regions.get_mut(key) else {
            return;
        };
        let Body::Tracked(tracked) = &mut entry.body else {
            return;
        };
        if let Some(lost) = tracked.hear_faults(&mut entry.statistics, now) {
            let exited = tracked.living_writer().is_none();
            match kind_of_lost(lost) {
                Some(kind) => entry.statistics.losses.note(kind, &lost.to_string()),
                None => drop(tracked.memory_gone.get_or_insert(now)),
            }
            tracing::warn!(region = %entry.name, %lost, exited, "stores are not tracked exactly any more: comparing");
            tracked.end_faults(lost.to_string(), now);
            self.refuse_cuts(key, &lost.to_string());
        }
        if self.is_late() {
            self.make_runnable(key);
        } else {
            self.work_on(key);
        }
        self.await_faults(key);
    }

    /// The last stores of a writer that is gone are still in the memory. Its end shows
    /// by its exit, or by the end of the connection that it handed the region over on:
    /// a program that drops its region unmaps it, and scans find nothing any more.
    pub(super) fn writer_left(&mut self, key: Key, kind: LossKind) {
        let now = self.now;
        if let Some(entry) = self.regions.get_mut(key)
            && let Body::Tracked(tracked) = &mut entry.body
            && tracked.tracker.attachment().is_some()
        {
            let attachment = tracked.tracker.attachment();
            if kind == LossKind::LinkEnded && attachment.is_some_and(is_ending) {
                // Its end, or the audit, will tell which of the two it is.
                tracked.link_ended = true;
                tracked.memory_gone.get_or_insert(now);
                return;
            }
            let exited = attachment.is_none_or(Attachment::has_exited);
            let (kind, reason) = match kind {
                LossKind::WriterReplaced => (kind, "the writing process runs another program"),
                _ if exited => (LossKind::WriterExited, "the writer exited"),
                _ => (
                    kind,
                    "the writer's link ended: it dropped the region, or ended",
                ),
            };
            tracing::info!(region = %entry.name, pid = tracked.writer_pid, %kind, reason, "writer is gone");
            entry.statistics.losses.note(kind, reason);
            tracked.doorbell = None;
            tracked.end_faults(reason, now);
            tracked.compare_from_now_on();
            tracked.tracker.take_attachments();
            tracked.lose(reason, now);
            self.ring.cancel(Token::Doorbell(key).to_bits());
            self.ring.cancel(Token::Faults(key).to_bits());
            self.ring.cancel(Token::WriterExit(key).to_bits());
            self.refuse_cuts(key, reason);
            self.make_runnable(key);
        }
    }

    /// One slice of a region's work, whatever its kind.
    pub(super) fn work_on(&mut self, key: Key) {
        self.serve_followers(key);
        match self.regions.get(key).map(|entry| &entry.body) {
            Some(Body::Tracked(_)) => self.work_on_capture(key),
            Some(Body::Replica(_)) => self.work_on_apply(key),
            _ => {}
        }
    }

    fn work_on_capture(&mut self, key: Key) {
        let Some(entry) = self.regions.get_mut(key) else {
            return;
        };
        let Body::Tracked(tracked) = &mut entry.body else {
            return;
        };
        if let Some(crew) = &mut tracked.crew {
            crew.settle_guards(&entry.control);
        }
        let budget = Duration::from_micros(limits::WORK_STEP_US);
        let progress = tracked.work(
            &entry.control,
            entry.publication.pre_images(),
            &mut entry.statistics,
            self.now,
            budget,
        );
        // From its first capture on the region is as large as its twin.
        entry.size = tracked.twin.size();
        entry.publication.grow(entry.size);
        let shows_nothing = entry.epoch == entry.first_epoch;
        entry
            .publication
            .set_busy(tracked.is_capturing() || shows_nothing);
        match progress {
            Progress::Idle => self.set_region_timer(key),
            Progress::Asked => {}
            Progress::More => self.make_runnable(key),
            Progress::Later(at) => self.set_timer(key, at),
            Progress::Done(finished) => self.publish_capture(key, finished),
        }
    }

    fn publish_capture(&mut self, key: Key, finished: Finished) {
        let Some(entry) = self.regions.get_mut(key) else {
            return;
        };
        let Body::Tracked(tracked) = &mut entry.body else {
            return;
        };
        let Finished {
            captured,
            kind,
            request,
            cut,
            source_time_ns,
            cost,
            grown,
            began,
        } = finished;
        let by_commit = request.is_some();
        entry.statistics.captured(&captured, by_commit, cost);
        // An epoch says more than the last one if bytes changed, or if it is a cut
        // and the last was not.
        let news = !captured.extents.is_empty()
            || grown
            || entry.epoch == entry.first_epoch
            || (kind == EpochKind::Cut && entry.kind != EpochKind::Cut);
        if news {
            entry.epoch += 1;
            entry.kind = kind;
            let info = CaptureInfo {
                epoch: entry.epoch,
                kind,
                source_time_ns,
            };
            let extents = &captured.extents;
            exports::note(&entry.changes, entry.epoch, extents);
            entry.control.publish_begin();
            let watched = !entry.readers.is_empty();
            entry
                .control
                .publish(entry.epoch, kind, source_time_ns, watched);
            entry.publication.captured(info, extents, &tracked.twin);
        }
        let stretch = self.idle.stretch();
        tracked.schedule(cost, captured.dirty_pages, stretch, Instant::now());
        let interval_us = tracked.interval.current();
        let statistics = entry.statistics.shared(interval_us);
        entry.control.set_stats(&statistics);
        if captured.dirty_pages == 0 && !by_commit {
            self.idle.found_nothing(cost);
            self.rest(key, began);
        }
        // Without news too: what was asked for while the capture went on waits.
        self.pump_followers(key);
        if let Some(request) = request {
            // What was captured leaves before the writer is woken: on a busy machine
            // its wake-up would delay the replica's.
            if news && let Err(error) = self.ring.enter(Some(Duration::ZERO)) {
                tracing::error!(%error, "the ring does not take submissions");
            }
            if let Some(entry) = self.regions.get_mut(key) {
                entry
                    .control
                    .answer_commit(request, entry.epoch, entry.kind);
            }
        }
        if let Some(number) = cut {
            self.answer_cuts(key, number);
        }
        self.capture_next(key);
    }

    /// What was asked for while a capture went on is begun at once, the rest in time.
    fn capture_next(&mut self, key: Key) {
        let again = self.regions.get(key).is_some_and(|entry| {
            let waits = matches!(&entry.body, Body::Tracked(tracked) if tracked.cut_wanted);
            waits || entry.control.commit_pending().is_some()
        });
        if again {
            self.make_runnable(key);
        } else {
            self.set_region_timer(key);
        }
    }

    fn set_region_timer(&mut self, key: Key) {
        if let Some(RegionEntry {
            body: Body::Tracked(tracked),
            ..
        }) = self.regions.get(key)
            && let Some(due) = tracked.due
        {
            self.set_timer(key, due);
        }
    }

    /// Makes sure that the region is looked at by `at`.
    pub(super) fn set_timer(&mut self, key: Key, at: Instant) {
        if let Some(entry) = self.regions.get_mut(key)
            && entry.timer.is_none_or(|set| at < set)
        {
            entry.timer = Some(at);
            self.timers.set(at, Timer::Region(key));
        }
    }

    pub(super) fn region_timer(&mut self, key: Key) {
        if let Some(entry) = self.regions.get_mut(key) {
            entry.timer = None;
            self.make_runnable(key);
        }
    }

    /// What writers stored last is captured before the node ends.
    pub(super) fn capture_everything(&mut self) {
        for key in self.regions.keys() {
            if let Some(RegionEntry {
                body: Body::Tracked(tracked),
                ..
            }) = self.regions.get_mut(key)
                && tracked.publish == Publish::Timer
            {
                tracked.due = Some(self.now);
                self.make_runnable(key);
            }
        }
    }

    pub(super) fn drop_region(&mut self, key: Key, reason: &str) {
        let Some(entry) = self.regions.remove(key) else {
            return;
        };
        self.names.remove(&entry.name);
        tracing::info!(region = %entry.name, reason, "region ended");
        entry.control.retire();
        self.refuse_cuts(key, reason);
        self.ring.cancel(Token::Doorbell(key).to_bits());
        self.ring.cancel(Token::Faults(key).to_bits());
        self.ring.cancel(Token::WriterExit(key).to_bits());
        if let Body::Tracked(tracked) = &entry.body {
            for attachment in tracked.tracker.attachments() {
                let token = Token::MemberExit(attachment.slot as u8, key);
                self.ring.cancel(token.to_bits());
            }
        }
        for follower in &entry.followers {
            self.close_peer(follower.peer, reason);
        }
        if let Body::Replica(replica) = &entry.body
            && let Some(peer) = replica.peer
        {
            self.close_peer(peer, reason);
        }
    }
}

fn already_written(name: &str, pid: i32) -> String {
    format!(
        "process {pid} writes {name} already; a region has one writer, unless it is cooperative: \
         attach to it then"
    )
}

/// Whether a process that still counts as living has no memory any more: it exits, or
/// it became another program.
pub(super) fn is_ending(attachment: &Attachment) -> bool {
    let Some(pagemap) = attachment.pagemap.as_ref() else {
        return false;
    };
    let first = pagemap.tracked_bytes(attachment.base, attachment.base + PAGE_SIZE);
    let gone = first.is_err_and(|error| error.raw_os_error() == Some(nix::libc::ESRCH));
    gone && !attachment.has_exited()
}

/// The greatest size that an offered region has.
fn checked_max_size(offer: &HandOver) -> Result<u64, Refusal> {
    let max_size = offer.max_size.unwrap_or(offer.size);
    check_sizes(offer.size, max_size)?;
    if offer.kind == WriteKind::Cooperative && max_size != offer.size {
        return Err(Refusal::invalid(
            "a cooperative region does not grow; leave max_size out",
        ));
    }
    Ok(max_size)
}
