//! The writers of a cooperative region: who joins, who leaves, who died.
//!
//! ```text
//!              Enlist             maps, arms, hands over            link ends, exits
//!   stranger ---------> invited ------------------------> member -------------------> gone
//!                                                           |  ^
//!                                           the node dies   |  |  hands over again
//!                                                           v  |
//!                                                           away
//! ```
//! No process owns the region: it lives in the node, made by its first writer or on
//! request, and goes on while any writer is left. With none it is unattended: its memory
//! stays, and the next one to attach goes on with it.
//!
//! I1. A slot is one living process's: the control page says whose, and the guards that a
//!     process used are told from others' by it.
//! I2. While a process that wrote under an earlier node lives and has not come back, its
//!     stores are not seen, so no epoch is a cut, for [`limits::AWAY_DEADLINE_MS`] at most;
//!     when it has come back everything is compared.
//! I3. A member that goes changes nothing for the others: its userfaultfd is closed, its
//!     guards are nobody's. In modes that find its last stores in its page tables everything
//!     is compared; in mode `sync` they are members of the dirty set already.
//! I4. What a dead member's guard was about may be half done: the first epoch after its
//!     death is no cut, except in mode `sync`, whose cuts are instants and know no guards.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::faults::Writing;
use super::hand_over::{check_armed, check_mapping, check_mode, check_writer, open_control};
use super::keys::Key;
use super::regions::{Body, RegionEntry};
use super::requests::{
    Call, NewEntry, Refusal, Reply, check_size, duplicate, not_found, read_only,
};
use super::sources::is_ending;
use super::tracked::Tracked;
use super::{Engine, Token};
use crate::limits;
use crate::region::{Control, Region, RegionKind, RegionOptions};
use crate::sys::memfd;
use crate::sys::process::{EventFd, PidFd};
use crate::sys::ring::Op;
use crate::track::Attachment;
use crate::wire::control::{AttachmentStatus, HandOver, RefusalCode, Response, Terms};
use crate::words::{Generation, LossKind, Mode, Publish, RegionName, WriteKind};

/// How long the end of a process may take after its memory is gone.
const ENDING: Duration = Duration::from_millis(900);

/// The writers of one region, and what a further one needs of it.
pub(super) struct Crew {
    /// Open for writing, as the control page is.
    data: OwnedFd,
    control: OwnedFd,
    members: Vec<Member>,
    away: Vec<Away>,
    /// When those who are away are given up.
    patience: Instant,
    /// Whether a member died with a guard, and no epoch was begun since.
    torn: bool,
    /// Whether the guard word is to be given up as soon as it can be.
    stale: bool,
}

/// One writing process. Its mapping stands in the tracker, under the same slot.
struct Member {
    slot: u32,
    pid: i32,
    connection: Key,
    link_ended: bool,
    memory_gone: Option<Instant>,
}

/// A process that wrote under an earlier node.
struct Away {
    slot: u32,
    pid: i32,
}

impl Crew {
    /// Nobody writes yet; whom the control page knows from an earlier node is away.
    pub(super) fn new(data: OwnedFd, control: OwnedFd, page: &Control, now: Instant) -> Self {
        let slots = 0..limits::MAX_WRITERS as u32;
        let away = slots.map(|slot| Away {
            slot,
            pid: page.owner(slot),
        });
        Self {
            data,
            control,
            members: Vec::new(),
            away: away.filter(|it| it.pid != 0).collect(),
            patience: now + Duration::from_millis(limits::AWAY_DEADLINE_MS),
            torn: false,
            stale: false,
        }
    }

    /// Whether all who may store into the region are members.
    pub(super) fn is_complete(&self) -> bool {
        self.away.is_empty()
    }

    /// Whether what a dead member has left behind may be half done; told once.
    pub(super) fn take_torn(&mut self) -> bool {
        std::mem::take(&mut self.torn)
    }

    /// A place for a process: the one it had, or a free one.
    fn place(&self, wanted: Option<u32>, pid: i32) -> Result<u32, Refusal> {
        let taken = |slot: u32| self.members.iter().any(|it| it.slot == slot);
        let owner = |slot: u32| self.away.iter().find(|it| it.slot == slot);
        if let Some(slot) = wanted {
            let is_own = owner(slot).is_none_or(|it| it.pid == pid);
            if u64::from(slot) < limits::MAX_WRITERS && !taken(slot) && is_own {
                return Ok(slot);
            }
            return Err(Refusal::invalid(format!(
                "place {slot} among the region's writers is another process's"
            )));
        }
        let mut slots = 0..limits::MAX_WRITERS as u32;
        slots
            .find(|slot| !taken(*slot) && owner(*slot).is_none())
            .ok_or_else(|| {
                Refusal::new(
                    RefusalCode::Limit,
                    format!("the region has {} writers already", limits::MAX_WRITERS),
                )
            })
    }

    /// How its members do.
    pub(super) fn status(&self, tracked: &Tracked) -> Vec<AttachmentStatus> {
        let mode = tracked.tracker.mode();
        let status = |slot, pid, state: &str| AttachmentStatus {
            slot,
            pid,
            mode,
            state: state.to_owned(),
        };
        let members = self.members.iter().map(|it| {
            let ending = it.link_ended || it.memory_gone.is_some();
            status(it.slot, it.pid, if ending { "ending" } else { "writing" })
        });
        let away = self.away.iter().map(|it| status(it.slot, it.pid, "away"));
        members.chain(away).collect()
    }

    /// Gives the guard word up if a dead process has left something in it.
    pub(super) fn settle_guards(&mut self, control: &Control) {
        if self.stale && control.replace_guard() {
            self.stale = false;
        }
    }

    /// The process of a slot uses no guard any more.
    fn forget_guards(&mut self, slot: u32, control: &Control) {
        if control.take_slot(slot) {
            (self.torn, self.stale) = (true, true);
        }
        self.settle_guards(control);
    }

    /// Forgets those who were away and died there, or have been for so long that the
    /// number may be another process's; whether there are any.
    fn bury(&mut self, control: &Control, now: Instant) -> bool {
        let late = now >= self.patience;
        let lives =
            |pid: i32| !late && PidFd::open(pid).is_ok_and(|it| !it.has_exited().unwrap_or(true));
        let dead: Vec<u32> = self
            .away
            .iter()
            .filter(|it| !lives(it.pid))
            .map(|it| it.slot)
            .collect();
        self.away.retain(|it| !dead.contains(&it.slot));
        for slot in &dead {
            self.forget_guards(*slot, control);
        }
        !dead.is_empty()
    }

    /// Members whose process lives and has no memory any more: it runs another program.
    fn replaced(&self, now: Instant) -> Vec<u32> {
        let gone = |it: &&Member| {
            let since = it.memory_gone;
            since.is_some_and(|since| now.duration_since(since) >= ENDING)
        };
        self.members.iter().filter(gone).map(|it| it.slot).collect()
    }
}

impl Engine {
    /// A cooperative region in memory that the node makes: nobody writes it yet.
    pub(super) fn create_cooperative(
        &mut self,
        name: &str,
        size: u64,
        shared: bool,
        terms: &Terms,
        call: &Call,
    ) -> Result<(), Refusal> {
        let name = self.free_name(name)?;
        check_size(size)?;
        check_mode(terms.mode, self.behaviour)?;
        let options = RegionOptions {
            mode: terms.mode,
            publish: terms.publish,
            kind: WriteKind::Cooperative,
            ..RegionOptions::default()
        };
        let region = Region::create(&name, size, &options)
            .map_err(|e| Refusal::failed("cannot make the region's memory", &e))?;
        let (data, control_fd) = (
            duplicate(region.data_fd())?,
            duplicate(region.control_fd())?,
        );
        let control = open_control(&control_fd, size, size)?;
        let offer = HandOver {
            name: name.to_string(),
            size,
            max_size: None,
            mode: terms.mode,
            publish: terms.publish,
            shared,
            base: 0,
            interval_min_us: terms.interval_min_us,
            interval_max_us: terms.interval_max_us,
            chosen: None,
            kind: WriteKind::Cooperative,
            slot: None,
        };
        let mut tracked = self.tracked(&offer, duplicate(&data)?, None, None)?;
        let page = read_only(&control_fd)?;
        let data_fd = Arc::new(read_only(&data)?);
        tracked.crew = Some(Crew::new(data, control_fd, &control, self.now));
        tracked.hear(new_doorbell()?)?;
        let new = NewEntry {
            name,
            size,
            max_size: size,
            shared,
            owner_uid: call.peer.uid,
            generation: Generation::random(),
            kind: RegionKind::Source,
            data_fd,
            body: Body::Tracked(Box::new(tracked)),
        };
        let entry = self.entry_around(new, control, page);
        let key = self.add_region(entry);
        self.watch_writer(key);
        self.make_runnable(key);
        Ok(())
    }

    /// The memory of a cooperative region, for one more writer.
    pub(super) fn enlist(&mut self, name: &str, call: &Call) -> Result<Reply, Refusal> {
        let key = self.owned_region(name, call)?;
        let entry = self.regions.get(key).ok_or_else(|| not_found(name))?;
        let (tracked, crew) = match &entry.body {
            Body::Tracked(tracked) => (tracked, tracked.crew.as_ref()),
            _ => return Err(not_cooperative(name)),
        };
        let crew = crew.ok_or_else(|| not_cooperative(name))?;
        let fds = vec![duplicate(&crew.data)?, duplicate(&crew.control)?];
        let terms = Terms {
            mode: tracked.mode,
            publish: tracked.publish,
            interval_min_us: tracked.own_bounds.0,
            interval_max_us: tracked.own_bounds.1,
        };
        let (size, shared) = (entry.size, entry.shared);
        let response = Response::Enlisted {
            size,
            shared,
            terms,
        };
        Ok(Reply::new(response, fds))
    }

    /// The cooperative region of that name, if what is handed over is its memory.
    pub(super) fn crew_of(
        &self,
        name: &RegionName,
        offer: &HandOver,
        fds: &[OwnedFd],
        call: &Call,
    ) -> Result<Option<Key>, Refusal> {
        if offer.kind != WriteKind::Cooperative || !self.names.contains_key(name) {
            return Ok(None);
        }
        let key = self.owned_region(name.as_str(), call)?;
        let Some(RegionEntry {
            body: Body::Tracked(tracked),
            size,
            ..
        }) = self.regions.get(key)
        else {
            return Ok(None);
        };
        let (Some(crew), [data, control, ..]) = (&tracked.crew, fds) else {
            return Ok(None);
        };
        let same = |a: &OwnedFd, b: &OwnedFd| memfd::is_same(a, b).unwrap_or(false);
        if !same(data, &crew.data) || !same(control, &crew.control) {
            return Ok(None);
        }
        if (offer.size, offer.mode, offer.publish) != (*size, tracked.mode, tracked.publish) {
            return Err(Refusal::invalid(format!(
                "{name} has {size} bytes, mode {} and epochs by {}, as its writers have agreed; \
                 offered were {}, {} and {}",
                tracked.mode, tracked.publish, offer.size, offer.mode, offer.publish
            )));
        }
        Ok(Some(key))
    }

    /// One more process writes a region. Whoever comes with its mapping armed has not
    /// stored yet; any other one is compared.
    pub(super) fn join(
        &mut self,
        key: Key,
        offer: &HandOver,
        attachment: Attachment,
        call: &Call,
        is_new: bool,
    ) -> Result<Reply, Refusal> {
        check_writer(&attachment, call.peer.pid)?;
        check_mapping(offer.mode, &attachment)?;
        let is_armed = !is_new && offer.slot.is_none();
        if is_armed {
            check_armed(&attachment)?;
        }
        let pidfd = Arc::new(duplicate(&attachment.pidfd)?);
        let pulse = self.pulse_fd()?;
        let (connection, now) = (call.connection, self.now);
        let Some(RegionEntry {
            body: Body::Tracked(tracked),
            control,
            generation,
            ..
        }) = self.regions.get_mut(key)
        else {
            return Err(not_found(&offer.name));
        };
        let Some((doorbell, _)) = &tracked.doorbell else {
            return Err(not_cooperative(&offer.name));
        };
        let fds = vec![duplicate(doorbell)?, pulse];
        let generation = generation.to_string();
        let slot = tracked.seat(offer, attachment, connection, is_armed, control, now)?;
        self.note_writes(connection, key);
        let op = Op::Poll {
            fd: pidfd,
            writable: false,
        };
        let token = Token::MemberExit(slot as u8, key);
        if let Err(error) = self.ring.submit(token.to_bits(), op) {
            tracing::error!(%error, "a writer's end will only be noticed by its silence");
        }
        self.make_runnable(key);
        Ok(Reply::new(Response::HandedOver { generation, slot }, fds))
    }

    /// A region's writer ends with this connection.
    pub(super) fn note_writes(&mut self, connection: Key, region: Key) {
        if let Some(connection) = self.controls.get_mut(connection) {
            let regions = &self.regions;
            connection.writes.retain(|old| regions.get(*old).is_some());
            if !connection.writes.contains(&region) {
                connection.writes.push(region);
            }
        }
    }

    /// The connection that a region was handed over on has ended.
    pub(super) fn link_ended(&mut self, key: Key, connection: Key) {
        let now = self.now;
        let Some(Body::Tracked(tracked)) = self.regions.get_mut(key).map(|it| &mut it.body) else {
            return;
        };
        let Tracked { crew, tracker, .. } = &mut **tracked;
        let Some(crew) = crew else {
            return self.writer_left(key, LossKind::LinkEnded);
        };
        let mut left = Vec::new();
        for member in &mut crew.members {
            if member.connection != connection {
                continue;
            }
            let attachments = tracker.attachments();
            let attachment = attachments.iter().find(|it| it.slot == member.slot);
            member.link_ended = true;
            if attachment.is_some_and(is_ending) {
                // Its end, or the sweep, will tell which of the two it is.
                member.memory_gone.get_or_insert(now);
            } else {
                left.push(member.slot);
            }
        }
        for slot in left {
            self.member_left(key, slot, LossKind::LinkEnded);
        }
    }

    /// The process of a member may have exited.
    pub(super) fn member_exited(&mut self, key: Key, slot: u32) {
        if let Some(Body::Tracked(tracked)) = self.regions.get(key).map(|it| &it.body)
            && let Some(attachment) = tracked.attachment_of(slot)
            && attachment.has_exited()
        {
            self.member_left(key, slot, LossKind::WriterExited);
        }
    }

    /// A member writes no more: the others go on.
    fn member_left(&mut self, key: Key, slot: u32, kind: LossKind) {
        let now = self.now;
        let Some(entry) = self.regions.get_mut(key) else {
            return;
        };
        let Body::Tracked(tracked) = &mut entry.body else {
            return;
        };
        let Some(attachment) = tracked.tracker.detach(slot) else {
            return;
        };
        let Some(crew) = &mut tracked.crew else {
            return;
        };
        let member = crew.members.iter().position(|it| it.slot == slot);
        let pid = member.map_or(0, |at| crew.members.remove(at).pid);
        crew.forget_guards(slot, &entry.control);
        let (kind, what) = match kind {
            LossKind::WriterReplaced => (kind, "runs another program"),
            _ if attachment.has_exited() => (LossKind::WriterExited, "exited"),
            _ => (kind, "let the region go, or its link ended"),
        };
        let reason = format!("process {pid} {what}");
        let left = crew.members.len();
        tracing::info!(region = %entry.name, slot, %kind, reason, left, "a writer is gone");
        entry.statistics.losses.note(kind, &reason);
        self.ring
            .cancel(Token::MemberExit(slot as u8, key).to_bits());
        let refused = tracked.faults.as_ref().map(|faults| faults.leave(slot));
        match refused {
            Some(Err(error)) => {
                let reason = super::requests::chain(&error);
                tracked.end_faults(reason.clone(), now);
                self.refuse_cuts(key, &reason);
            }
            // What it stored is in the dirty set; the last one's is shipped at once.
            Some(Ok(())) if left == 0 => tracked.due = Some(now),
            Some(Ok(())) => {}
            None => {
                tracked.restart_whole();
                tracked.lose(reason, now);
            }
        }
        self.make_runnable(key);
    }

    /// What a region's fault thread has found of its members.
    pub(super) fn hear_of_members(&mut self, key: Key) {
        let now = self.now;
        let Some(Body::Tracked(tracked)) = self.regions.get_mut(key).map(|it| &mut it.body) else {
            return;
        };
        let Some(faults) = &tracked.faults else {
            return;
        };
        let gone = faults.take_gone();
        let Some(crew) = tracked.crew.as_mut().filter(|_| gone != 0) else {
            return;
        };
        for member in &mut crew.members {
            if gone >> member.slot & 1 == 1 {
                member.memory_gone.get_or_insert(now);
            }
        }
    }

    /// Once a second: who has no memory any more, and who died while it was away.
    pub(super) fn muster(&mut self, key: Key) {
        let now = self.now;
        let Some(entry) = self.regions.get_mut(key) else {
            return;
        };
        let Body::Tracked(tracked) = &mut entry.body else {
            return;
        };
        let Some(crew) = &mut tracked.crew else {
            return;
        };
        crew.settle_guards(&entry.control);
        let replaced = crew.replaced(now);
        if crew.bury(&entry.control, now) {
            tracked.lose("a writer of an earlier node is gone", now);
            self.make_runnable(key);
        }
        for slot in replaced {
            self.member_left(key, slot, LossKind::WriterReplaced);
        }
    }
}

impl Tracked {
    /// How its writers do.
    pub(super) fn state(&self) -> &'static str {
        let alive = self.is_file() || self.tracker.attachment().is_some();
        match (alive, &self.crew) {
            (true, _) => "live",
            (false, Some(_)) => "unattended",
            (false, None) => "orphaned",
        }
    }

    /// The mapping of the writer in a slot.
    pub(super) fn attachment_of(&self, slot: u32) -> Option<&Attachment> {
        let attachments = self.tracker.attachments();
        attachments.iter().find(|it| it.slot == slot)
    }

    /// Gives a process a place among the writers, which is answered.
    fn seat(
        &mut self,
        offer: &HandOver,
        mut attachment: Attachment,
        connection: Key,
        is_armed: bool,
        control: &Control,
        now: Instant,
    ) -> Result<u32, Refusal> {
        let pid = attachment
            .pidfd
            .pid()
            .map_err(|e| Refusal::failed("cannot read the pidfd", &e))?;
        let Some(crew) = &mut self.crew else {
            return Err(not_cooperative(&offer.name));
        };
        let slot = crew.place(offer.slot, pid)?;
        attachment.slot = slot;
        if let Some(faults) = &self.faults {
            let uffd = attachment.uffd.take();
            let uffd = uffd.ok_or_else(|| Refusal::invalid("mode sync needs a userfaultfd"))?;
            let base = attachment.base;
            faults
                .join(slot, Writing { uffd, base }, is_armed)
                .map_err(|e| Refusal::failed("its faults cannot be answered", &e))?;
        } else if self.mode == Mode::Sync {
            // Nobody answers faults of this region any more: no store is to wait for one.
            attachment.uffd = None;
        }
        self.tracker.attachments_mut().push(attachment);
        let was_away = crew.away.iter().any(|it| it.slot == slot);
        crew.away.retain(|it| it.slot != slot);
        crew.members.push(Member {
            slot,
            pid,
            connection,
            link_ended: false,
            memory_gone: None,
        });
        control.give_slot(slot, pid);
        tracing::info!(region = offer.name, pid, slot, "a writer joined");
        if !is_armed {
            let reason = if was_away {
                "a writer came back"
            } else {
                "a writer came with what it had stored"
            };
            self.lose(reason, now);
        } else if self.publish == Publish::Timer && self.due.is_none() {
            self.due = Some(now + Duration::from_micros(self.interval.current()));
        }
        Ok(slot)
    }

    /// The memory of a member is gone; its end, or the sweep, will tell why. False in
    /// an exclusive region.
    pub(super) fn note_memory_gone(&mut self, slot: u32, now: Instant) -> bool {
        let Some(crew) = &mut self.crew else {
            return false;
        };
        if let Some(member) = crew.members.iter_mut().find(|it| it.slot == slot) {
            member.memory_gone.get_or_insert(now);
        }
        true
    }
}

pub(super) fn new_doorbell() -> Result<EventFd, Refusal> {
    EventFd::new().map_err(|e| Refusal::failed("cannot make a doorbell", &e))
}

fn not_cooperative(name: &str) -> Refusal {
    Refusal::new(
        RefusalCode::Unsupported,
        format!(
            "{name} is not cooperative: it has one writer, if any; `region create --cooperative` \
             or a writer of kind cooperative make one that several processes write"
        ),
    )
}
