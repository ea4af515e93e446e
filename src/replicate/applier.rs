//! The replica's side of one (source, region): which frames become epochs.
//!
//! ```text
//!            info: Everything           WHOLE update
//!   Fresh ────────────────────> (Syncing, in place) ──────> Following <─┐
//!            info: Digests          staged │                │    │      │ next update
//!   Resyncing <── gap, damage, deadline, other generation ──┘    └──────┘
//! ```
//!
//! - I1: an update without WHOLE is taken iff `base <= head < epoch`, where `head` is
//!   the newest epoch handed to the caller; `epoch <= head` is ignored and acked.
//! - I2: between two epochs the caller gets nothing of an update, unless the update
//!   goes in place: then the state is `Syncing` and nothing may be read.
//! - I3: staged bytes never exceed what START declared, nor the budget; nothing is
//!   reserved for a declaration. A coming epoch, whose START knows only a bound, is
//!   staged until the budget is used up and goes in place from there on.
//! - I4: from when a WHOLE update is expected until it is applied, nothing is acked and
//!   no epoch is claimed.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::checksum::Digest;
use crate::limits::{
    DIGEST_CHUNK, MAX_DIGESTS_PER_FRAME, MAX_PENDING_EXTENTS, MAX_UNACKED, UPDATE_DEADLINE_MS,
};
use crate::sys::buffer::Buffer;
use crate::units::pages_for;
use crate::wire::{
    Ack, Base, DigestFrame, EndUpdate, ExtentReader, FLAG_CUT, Header, Kind, RegionInfo, Resync,
    ResyncReason, StartUpdate, Subscribe, SyncPlan, UPDATE_PREFIX_BYTES, UpdatePrefix, WireError,
};
use crate::words::{EpochKind, Generation, RegionName};

use super::apply::{Part, Update};

const UPDATE_DEADLINE: Duration = Duration::from_millis(UPDATE_DEADLINE_MS);

/// A frame that breaks the protocol: the connection is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// The frame's body is not what its kind has.
    #[error("refused a frame of an update")]
    Wire(#[from] WireError),
    /// No region info came before it, or it names another region.
    #[error("a {kind:?} frame for region handle {handle}, which is not followed")]
    NotFollowed {
        /// The frame's kind.
        kind: Kind,
        /// The handle in it.
        handle: u32,
    },
    /// The frame has no place on the replica's side of a region.
    #[error("a {kind:?} frame came to a replica")]
    Unexpected {
        /// The frame's kind.
        kind: Kind,
    },
    /// The source's region does not have the replica's size.
    #[error("the source's region has {source_bytes} bytes, the replica {replica_bytes}")]
    Size {
        /// Size that the source says.
        source_bytes: u64,
        /// Size of the replica.
        replica_bytes: u64,
    },
    /// The plan does not fit what the replica has.
    #[error("the source starts with {plan:?}, which does not fit what the replica has")]
    Plan {
        /// The plan refused.
        plan: SyncPlan,
    },
    /// An update would take the replica back.
    #[error("a whole update to epoch {epoch} while epoch {have} is shown")]
    Backwards {
        /// The update's epoch.
        epoch: u64,
        /// The replica's.
        have: u64,
    },
    /// An update declares more bytes than the region has.
    #[error("an update of {total_bytes} bytes for a region of {size_bytes}")]
    Total {
        /// Bytes declared.
        total_bytes: u64,
        /// Size of the region.
        size_bytes: u64,
    },
}

/// What became of a frame.
#[derive(Debug)]
pub enum Applied {
    /// It was staged, or only moved the state.
    Staged,
    /// An update is whole: apply it behind all handed out before, show its epoch, then
    /// call [`Applier::applied`].
    Apply(Update),
    /// A piece of an update too large to stage: from now until the next
    /// [`Applied::Apply`] is applied the content may not be read. Apply it behind all
    /// handed out before, then call [`Applier::applied`] too.
    InPlace(Update),
    /// It belongs to an epoch that the replica has already.
    Ignored,
    /// An update was dropped; [`Applier::poll`] asks for what is missing.
    Dropped(ResyncReason),
}

/// What a replica can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    /// Nothing came yet; its memory is zero.
    Fresh,
    /// An update is going in place: no epoch can be shown.
    Syncing,
    /// It shows the source's epochs as they come.
    Following,
    /// It shows the last whole epoch while it asks for what is missing.
    Resyncing,
}

impl ReplicaState {
    /// The word for status output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Syncing => "syncing",
            Self::Following => "following",
            Self::Resyncing => "resyncing",
        }
    }
}

/// What the replica's memory holds once all that was handed out is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zero,
    Torn,
    Whole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Stage,
    InPlace,
    /// Its frames are expected but not wanted; `ack`: because the epoch is shown already.
    Skip {
        ack: bool,
    },
}

#[derive(Debug)]
struct Open {
    update: Update,
    mode: Mode,
    whole: bool,
    declared: u64,
    /// Whether `declared` is a bound, since the epoch was not complete at START.
    coming: bool,
    chunks: u32,
    extents: u64,
    /// Bytes of memory that its bodies hold.
    staged: u64,
    /// Bytes of extents that were handed out to go in place.
    placed: u64,
    end: u64,
    last_frame: Instant,
}

#[derive(Debug)]
struct Digesting {
    next: u64,
    total: u64,
    batch: Vec<Digest>,
}

/// An update handed out and not applied yet.
#[derive(Debug)]
struct Handed {
    epoch: u64,
    generation: Generation,
    bytes: u64,
    /// Whether the epoch is whole with it.
    ends: bool,
    /// Whether it does not build on what was there.
    whole: bool,
}

/// What was asked for and has not been answered.
#[derive(Debug)]
struct Asked {
    again_at: Instant,
    pause: Duration,
}

/// The replica's side of one region, see the module.
///
/// Memory: at most the budget plus one frame staged, and what the caller was given
/// and has not applied.
#[derive(Debug)]
pub struct Applier {
    size: u64,
    budget: u64,
    info: Option<RegionInfo>,
    generation: Generation,
    content: Content,
    /// Applied, of `generation`.
    have: Option<u64>,
    /// Handed out, of `generation`.
    head: Option<u64>,
    queue: VecDeque<Handed>,
    queued_bytes: u64,
    whole_expected: bool,
    /// Whether a WHOLE update of this round or an earlier one that it resumed is
    /// applied: `have` says what the replica holds.
    claimable: bool,
    open: Option<Open>,
    digesting: Option<Digesting>,
    lost: Option<ResyncReason>,
    asked: Option<Asked>,
    ack_due: bool,
    dropped: u64,
}

impl Applier {
    /// For a replica of `size` bytes that is all zero; updates of up to `budget` bytes
    /// are staged.
    pub fn new(size: u64, budget: u64) -> Self {
        Self {
            size,
            budget,
            info: None,
            generation: Generation::ZERO,
            content: Content::Zero,
            have: None,
            head: None,
            queue: VecDeque::new(),
            queued_bytes: 0,
            whole_expected: true,
            claimable: false,
            open: None,
            digesting: None,
            lost: None,
            asked: None,
            ack_due: false,
            dropped: 0,
        }
    }

    /// For a replica whose memory holds something of unknown age: it is compared by
    /// digest before anything is sent.
    pub fn with_content(size: u64, budget: u64) -> Self {
        Self {
            content: Content::Whole,
            ..Self::new(size, budget)
        }
    }

    /// What to subscribe with, after a new connection is there.
    pub fn subscribe(&self, name: RegionName, subscription: u32) -> Subscribe {
        Subscribe {
            name,
            subscription,
            generation: self.generation,
            have_epoch: self.claimed(),
            fresh: self.content == Content::Zero,
        }
    }

    /// Takes the source's answer to a subscription, or its news that another life of
    /// the region has begun; an open update is dropped then. Or its news that the region
    /// has grown: the caller's memory has at least `info.size` bytes, and the next update
    /// shows them. The same life may come back grown too.
    ///
    /// # Errors
    /// [`ApplyError::Size`] and [`ApplyError::Plan`].
    pub fn handle_info(&mut self, now: Instant, info: &RegionInfo) -> Result<(), ApplyError> {
        let same_life = info.generation == self.generation;
        let grows = same_life && info.size > self.size;
        if info.size != self.size && !grows {
            return Err(ApplyError::Size {
                source_bytes: info.size,
                replica_bytes: self.size,
            });
        }
        if info.plan == SyncPlan::Grow {
            return self.handle_growth(info);
        }
        let fits = match info.plan {
            SyncPlan::Resume => same_life,
            SyncPlan::Everything => self.content == Content::Zero,
            SyncPlan::Digests => true,
            SyncPlan::Grow => false,
        };
        if !fits {
            return Err(ApplyError::Plan { plan: info.plan });
        }
        self.drop_open();
        self.size = info.size;
        if !same_life {
            self.generation = info.generation;
            (self.have, self.head) = (None, None);
        }
        self.whole_expected |= !info.resume() || self.head.is_none();
        self.claimable &= !self.whole_expected;
        self.digesting = (info.plan == SyncPlan::Digests).then(|| Digesting {
            next: 0,
            total: self.size.div_ceil(DIGEST_CHUNK),
            batch: Vec::new(),
        });
        self.info = Some(*info);
        (self.lost, self.asked, self.ack_due) = (None, None, false);
        self.note_progress(now);
        Ok(())
    }

    /// The region has another size from the next update on, which none may have begun.
    fn handle_growth(&mut self, info: &RegionInfo) -> Result<(), ApplyError> {
        let fits = |known: &RegionInfo| {
            (known.handle, known.round) == (info.handle, info.round)
                && known.generation == info.generation
                && self.open.is_none()
                && self.digesting.is_none()
        };
        if !self.info.as_ref().is_some_and(fits) {
            return Err(ApplyError::Plan { plan: info.plan });
        }
        self.size = info.size;
        Ok(())
    }

    /// Takes a frame of an update whose checksums were checked.
    ///
    /// # Errors
    /// [`ApplyError`]: close the connection and call [`disconnected`](Self::disconnected).
    pub fn handle_frame(
        &mut self,
        now: Instant,
        header: &Header,
        body: impl Into<Buffer>,
    ) -> Result<Applied, ApplyError> {
        let body = body.into();
        let followed = self.info.map(|info| info.handle);
        if followed != Some(header.region) {
            return Err(ApplyError::NotFollowed {
                kind: header.kind,
                handle: header.region,
            });
        }
        match header.kind {
            Kind::SingleUpdate => self.single(header, body),
            Kind::StartUpdate => self.start(now, header, &body),
            Kind::UpdateChunk => self.chunk(now, header, body),
            Kind::EndUpdate => self.end(header, &body),
            kind => Err(ApplyError::Unexpected { kind }),
        }
    }

    /// A frame with a good header came with a damaged body: what it belonged to is
    /// dropped. True if it was an update's.
    pub fn handle_damaged(&mut self, header: &Header) -> bool {
        if header.kind.is_update() && self.info.is_some() {
            self.lose(ResyncReason::Mismatch);
            true
        } else {
            false
        }
    }

    /// Bytes of a frame that is not complete yet came: the source is alive, so an
    /// open update is not overdue.
    pub fn note_progress(&mut self, now: Instant) {
        if let Some(open) = &mut self.open {
            open.last_frame = now;
        }
        if let Some(asked) = &mut self.asked {
            asked.again_at = now + asked.pause;
        }
    }

    /// The oldest update or piece of one that was handed out and not yet applied, which
    /// is of `epoch`, is applied and, if whole, shown. The ack comes from [`poll`](Self::poll).
    pub fn applied(&mut self, epoch: u64) {
        let Some(handed) = self.queue.pop_front() else {
            return;
        };
        debug_assert_eq!(handed.epoch, epoch, "updates are applied in their order");
        self.queued_bytes -= handed.bytes;
        if handed.ends && handed.generation == self.generation {
            self.claimable |= handed.whole && !self.whole_expected;
            self.have = Some(handed.epoch);
            self.ack_due = true;
        }
    }

    /// The next frame for the source: RESYNC, ACK or DIGEST. Call until `None`.
    pub fn poll(&mut self, now: Instant) -> Option<Vec<u8>> {
        let info = self.info?;
        if !self.accepts_frames() {
            // The rest may well be there: it is this side that does not read.
            self.note_progress(now);
        }
        if self
            .open
            .as_ref()
            .is_some_and(|open| now >= open.last_frame + UPDATE_DEADLINE)
        {
            self.lose(ResyncReason::Deadline);
        }
        if let Some(asked) = self.asked.as_mut().filter(|asked| now >= asked.again_at) {
            asked.pause = (asked.pause * 2).min(UPDATE_DEADLINE * 12);
            self.lost.get_or_insert(ResyncReason::Deadline);
        }
        if let Some(reason) = self.lost.take() {
            let pause = self.asked.as_ref().map_or(UPDATE_DEADLINE, |a| a.pause);
            self.asked = Some(Asked {
                again_at: now + pause,
                pause,
            });
            let resync = Resync {
                round: info.round,
                have_epoch: self.claimed(),
                reason,
            };
            return Some(resync.encode(info.handle));
        }
        if std::mem::take(&mut self.ack_due)
            && let Some(epoch) = self.claimed()
        {
            let round = info.round;
            return Some(Ack { round, epoch }.encode(info.handle));
        }
        self.poll_digests(&info)
    }

    /// The link is gone: an open update is dropped. What was handed out is still to be
    /// applied.
    pub fn disconnected(&mut self) {
        self.drop_open();
        self.info = None;
        self.digesting = None;
        (self.lost, self.asked, self.ack_due) = (None, None, false);
    }

    /// When [`poll`](Self::poll) has something to do although nothing came.
    pub fn next_deadline(&self) -> Option<Instant> {
        let open = self.open.as_ref().map(|open| open.last_frame);
        let overdue = open.map(|last| last + UPDATE_DEADLINE);
        let again = self.asked.as_ref().map(|asked| asked.again_at);
        overdue.into_iter().chain(again).min()
    }

    /// What the replica can show.
    pub fn state(&self) -> ReplicaState {
        match self.content {
            Content::Zero => ReplicaState::Fresh,
            Content::Torn => ReplicaState::Syncing,
            Content::Whole if self.info.is_none() || self.whole_expected => ReplicaState::Resyncing,
            Content::Whole if self.lost.is_some() || self.asked.is_some() => {
                ReplicaState::Resyncing
            }
            Content::Whole => ReplicaState::Following,
        }
    }

    /// The newest epoch applied, of [`generation`](Self::generation).
    pub fn have_epoch(&self) -> Option<u64> {
        self.have
    }

    /// The source's life that is followed; ZERO before the first region info.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Size of the region, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory staged for an open update.
    pub fn staged_bytes(&self) -> u64 {
        let staged = self.open.as_ref().map(|open| open.update.staged_bytes());
        staged.unwrap_or(0)
    }

    /// Whether the caller may read another frame. False while updates that were handed
    /// out and not applied hold more than the budget: memory stays below twice the
    /// budget then, plus a frame.
    pub fn accepts_frames(&self) -> bool {
        (self.queue.len() as u64) < MAX_UNACKED && self.queued_bytes <= self.budget
    }

    /// Updates and pieces of them handed out and not applied yet.
    pub fn unapplied(&self) -> usize {
        self.queue.len()
    }

    /// Updates dropped since the start.
    pub fn dropped_updates(&self) -> u64 {
        self.dropped
    }

    /// The bytes whose digest is wanted next, and the index of that chunk; `None` if
    /// none is wanted now.
    pub fn wants_digest(&self) -> Option<(u64, Range<u64>)> {
        let digesting = self.digesting.as_ref()?;
        let full = digesting.batch.len() as u64 >= MAX_DIGESTS_PER_FRAME;
        if full || digesting.next >= digesting.total || !self.queue.is_empty() {
            return None;
        }
        let start = digesting.next * DIGEST_CHUNK;
        Some((digesting.next, start..(start + DIGEST_CHUNK).min(self.size)))
    }

    /// The digest of the chunk that [`wants_digest`](Self::wants_digest) named; any
    /// other is left out.
    pub fn push_digest(&mut self, chunk: u64, digest: Digest) {
        if let Some(digesting) = &mut self.digesting
            && digesting.next == chunk
        {
            digesting.batch.push(digest);
            digesting.next += 1;
        }
    }

    fn poll_digests(&mut self, info: &RegionInfo) -> Option<Vec<u8>> {
        let digesting = self.digesting.as_mut()?;
        let complete = digesting.next == digesting.total;
        let full = digesting.batch.len() as u64 >= MAX_DIGESTS_PER_FRAME;
        if !(full || complete) {
            return None;
        }
        let digests = std::mem::take(&mut digesting.batch);
        let first_chunk = digesting.next - digests.len() as u64;
        if complete {
            self.digesting = None;
        }
        if digests.is_empty() {
            return None;
        }
        let frame = DigestFrame {
            round: info.round,
            first_chunk,
            digests,
        };
        Some(frame.encode(info.handle))
    }

    /// The epoch that is told to the source (I4).
    fn claimed(&self) -> Option<u64> {
        self.have.filter(|_| self.claimable)
    }

    fn drop_open(&mut self) {
        if let Some(open) = self.open.take()
            && !matches!(open.mode, Mode::Skip { .. })
        {
            self.dropped += 1;
        }
    }

    fn lose(&mut self, reason: ResyncReason) -> Applied {
        self.drop_open();
        if self.asked.is_none() {
            self.lost.get_or_insert(reason);
        }
        Applied::Dropped(reason)
    }

    /// Whether an update may be taken: `Ok(None)` yes, `Ok(Some(..))` what became of it.
    fn refuses(&mut self, epoch: u64, base: Base) -> Result<Option<Applied>, ApplyError> {
        let head = self.head;
        match base {
            Base::Nothing if self.whole_expected => match head.filter(|have| *have > epoch) {
                Some(have) => Err(ApplyError::Backwards { epoch, have }),
                None => Ok(None),
            },
            _ if !self.whole_expected && head.is_some_and(|head| epoch <= head) => {
                (self.lost, self.asked, self.ack_due) = (None, None, true);
                Ok(Some(Applied::Ignored))
            }
            Base::Nothing => Ok(None),
            Base::Epoch(base) => {
                let builds = !self.whole_expected && head.is_some_and(|head| base <= head);
                Ok((!builds).then(|| self.lose(ResyncReason::Gap)))
            }
        }
    }

    /// Hands an update out: it is the newest from here on.
    fn hand_out(&mut self, update: Update, whole: bool) -> Applied {
        self.head = Some(update.epoch);
        self.enqueue(&update, true, whole);
        self.content = Content::Whole;
        self.whole_expected = false;
        (self.lost, self.asked) = (None, None);
        Applied::Apply(update)
    }

    fn enqueue(&mut self, update: &Update, ends: bool, whole: bool) {
        let bytes = update.staged_bytes();
        self.queue.push_back(Handed {
            epoch: update.epoch,
            generation: self.generation,
            bytes,
            ends,
            whole,
        });
        self.queued_bytes += bytes;
    }

    fn empty_update(&self, header: &Header, prefix: &UpdatePrefix) -> Update {
        Update {
            epoch: header.epoch,
            kind: if header.has(FLAG_CUT) {
                EpochKind::Cut
            } else {
                EpochKind::Convergent
            },
            source_time_ns: prefix.source_time_ns,
            data_bytes: 0,
            size: self.size,
            parts: Vec::new(),
        }
    }

    fn single(&mut self, header: &Header, body: Buffer) -> Result<Applied, ApplyError> {
        let (prefix, extents) = UpdatePrefix::decode(header, &body)?;
        let mut reader = ExtentReader::new(extents, self.size, 0);
        reader.try_for_each(|extent| extent.map(|_| ()))?;
        let data_bytes = reader.data_bytes();
        // The source gave up what was open.
        self.drop_open();
        if let Some(refused) = self.refuses(header.epoch, prefix.base)? {
            return Ok(refused);
        }
        let mut update = self.empty_update(header, &prefix);
        update.data_bytes = data_bytes;
        update.parts.push(Part {
            body,
            from: UPDATE_PREFIX_BYTES,
        });
        Ok(self.hand_out(update, prefix.base == Base::Nothing))
    }

    fn start(&mut self, now: Instant, header: &Header, body: &[u8]) -> Result<Applied, ApplyError> {
        let start = StartUpdate::decode(header, body)?;
        if start.total_bytes > self.size {
            return Err(ApplyError::Total {
                total_bytes: start.total_bytes,
                size_bytes: self.size,
            });
        }
        self.drop_open();
        let refused = self.refuses(header.epoch, start.prefix.base)?;
        let mode = match &refused {
            Some(Applied::Ignored) => Mode::Skip { ack: true },
            Some(_) => Mode::Skip { ack: false },
            // Where nothing can be shown anyway, staging would only cost memory.
            None if self.content != Content::Whole => Mode::InPlace,
            None if start.total_bytes > self.budget && !start.coming => Mode::InPlace,
            None => Mode::Stage,
        };
        if refused.is_none() {
            (self.lost, self.asked) = (None, None);
        }
        self.open = Some(Open {
            update: self.empty_update(header, &start.prefix),
            mode,
            whole: start.prefix.base == Base::Nothing,
            declared: start.total_bytes,
            coming: start.coming,
            chunks: 0,
            extents: 0,
            staged: 0,
            placed: 0,
            end: 0,
            last_frame: now,
        });
        Ok(refused.unwrap_or(Applied::Staged))
    }

    /// The open update that a CHUNK or END of `epoch` belongs to.
    fn opened(&mut self, epoch: u64) -> Result<&mut Open, Applied> {
        match &self.open {
            Some(open) if open.update.epoch == epoch => {}
            // What follows a dropped START is expected until the source has heard of it.
            None if self.lost.is_some() || self.asked.is_some() => return Err(Applied::Staged),
            _ => return Err(self.lose(ResyncReason::Mismatch)),
        }
        Ok(self.open.as_mut().expect("it was just looked at"))
    }

    fn chunk(
        &mut self,
        now: Instant,
        header: &Header,
        body: Buffer,
    ) -> Result<Applied, ApplyError> {
        let (size, budget) = (self.size, self.budget);
        let open = match self.opened(header.epoch) {
            Ok(open) => open,
            Err(applied) => return Ok(applied),
        };
        open.last_frame = now;
        let mut reader = ExtentReader::new(&body, size, open.end);
        reader.try_for_each(|extent| extent.map(|_| ()))?;
        // Of a coming epoch it says that the source lives.
        if reader.extent_count() == 0 && !open.coming {
            return Err(ApplyError::Wire(WireError::Malformed {
                kind: Kind::UpdateChunk,
                what: "it has no extents",
            }));
        }
        let data = reader.data_bytes();
        open.end = reader.end();
        open.chunks = open.chunks.saturating_add(1);
        open.extents += u64::from(reader.extent_count());
        open.update.data_bytes += data;
        if open.update.data_bytes > open.declared {
            return Ok(self.lose(ResyncReason::Mismatch));
        }
        // Exact extents, or pages, cut where a frame ends; bounds what headers cost.
        if open.extents > MAX_PENDING_EXTENTS + 2 * pages_for(open.declared) + 64 {
            return Ok(self.lose(ResyncReason::TooLarge));
        }
        let part_bytes = body.capacity() as u64;
        let part = Part { body, from: 0 };
        match open.mode {
            Mode::Skip { .. } => Ok(Applied::Staged),
            _ if part.body.is_empty() => Ok(Applied::Staged),
            Mode::Stage if !open.coming || open.staged + part_bytes <= budget => {
                open.staged += part_bytes;
                open.update.parts.push(part);
                Ok(Applied::Staged)
            }
            Mode::Stage | Mode::InPlace => {
                (open.mode, open.staged) = (Mode::InPlace, 0);
                let mut parts = std::mem::take(&mut open.update.parts);
                parts.push(part);
                let piece = Update {
                    data_bytes: open.update.data_bytes - open.placed,
                    parts,
                    ..open.update
                };
                open.placed = open.update.data_bytes;
                self.content = Content::Torn;
                self.enqueue(&piece, false, false);
                Ok(Applied::InPlace(piece))
            }
        }
    }

    fn end(&mut self, header: &Header, body: &[u8]) -> Result<Applied, ApplyError> {
        let end = EndUpdate::decode(header, body)?;
        if let Err(applied) = self.opened(header.epoch) {
            return Ok(applied);
        }
        let Some(mut open) = self.open.take() else {
            return Ok(Applied::Staged);
        };
        if open.coming {
            // No more than was declared came: each chunk was looked at.
            open.declared = open.declared.min(end.total_bytes);
            open.update.kind = end.kind;
        }
        let whole = open.update.data_bytes == open.declared
            && end.total_bytes == open.declared
            && end.chunks == open.chunks
            && (open.coming || end.kind == EpochKind::Convergent);
        match open.mode {
            Mode::Skip { ack } => {
                self.ack_due |= ack;
                Ok(if ack {
                    Applied::Ignored
                } else {
                    Applied::Staged
                })
            }
            _ if !whole => {
                self.dropped += 1;
                Ok(self.lose(ResyncReason::Mismatch))
            }
            _ => {
                debug_assert!(open.whole || !self.whole_expected);
                Ok(self.hand_out(open.update, open.whole))
            }
        }
    }
}
