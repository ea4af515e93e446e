//! What one replica may lack, and the update that is being sent to it.
//!
//! ```text
//!   capture ──> pending ── poll: SINGLE ───────────────> in flight ── ack ──> gone
//!                  ^  └─── poll: START ─> open ─ END ──────^   │
//!                  └── loss of the link, resync, given up ─────┘
//! ```
//!
//! - I1: pending, open and in flight together hold all bytes that differ between the
//!   acknowledged epoch and the source's epoch now.
//! - I2: an open update reads through its pin, so that it is its target epoch.
//! - I3: an update starts while the content is an epoch; or, of the coming epoch, during
//!   the capture that makes it. Such a one reads only what the capture has settled, is
//!   given up if the capture begins anew, and ends after the capture has.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::checksum::Digest;
use crate::limits::{
    DIGEST_CHUNK, MAX_CHUNK, MAX_EXTENTS_PER_FRAME, MAX_PENDING_EXTENTS, MAX_UNACKED,
    UPDATE_DEADLINE_MS,
};
use crate::track::{ExtentSet, PreImages};
use crate::units::PAGE_SIZE;
use crate::wire::{
    Ack, Base, DigestFrame, EXTENT_HEADER_BYTES, EndUpdate, FrameBuilder, Kind, RegionInfo, Resync,
    StartUpdate, SyncPlan, UPDATE_PREFIX_BYTES, UpdatePrefix, update_flags,
};
use crate::words::{EpochKind, Generation};

use super::publication::{
    CaptureInfo, Coming, Out, ProtocolError, ReplicaKey, ShipperState, Spare,
};

/// Longest silence in an update whose capture finds nothing more for a while.
const SIGN_OF_LIFE: Duration = Duration::from_millis(UPDATE_DEADLINE_MS / 4);

/// What updates are read from.
pub(super) struct View<'a> {
    pub(super) content: &'a [u8],
    pub(super) coming: Option<Coming<'a>>,
}

/// What all shippers of a region share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) handle: u32,
    pub(super) generation: Generation,
    pub(super) size: u64,
    pub(super) max_size: u64,
    pub(super) epoch: u64,
    pub(super) kind: EpochKind,
    pub(super) source_time_ns: u64,
    pub(super) busy: bool,
    pub(super) pre: PreImages,
    pub(super) encoded: Option<Encoded>,
}

/// A SINGLE that all replicas at `base` can share.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) base: u64,
    pub(super) epoch: u64,
    pub(super) frame: Arc<[u8]>,
}

impl Shared {
    /// The frame of `extents` as one update from `base` to the epoch now.
    pub(super) fn single(&self, base: Base, extents: &ExtentSet, content: &[u8]) -> Vec<u8> {
        let cost = single_cost(extents).unwrap_or_default();
        let headers = UPDATE_PREFIX_BYTES + EXTENT_HEADER_BYTES * cost.ranges as usize;
        let mut frame = FrameBuilder::with_capacity(
            Kind::SingleUpdate,
            update_flags(self.kind, base),
            self.handle,
            self.epoch,
            headers + cost.bytes as usize,
        );
        frame.put(&self.prefix(base).to_bytes(self.epoch));
        for range in extents.ranges() {
            frame.extent(
                range.start,
                &content[range.start as usize..range.end as usize],
            );
        }
        frame.finish()
    }

    fn prefix(&self, base: Base) -> UpdatePrefix {
        UpdatePrefix {
            base,
            source_time_ns: self.source_time_ns,
        }
    }

    fn encoded_from(&self, base: Option<u64>) -> Option<Arc<[u8]>> {
        let encoded = self.encoded.as_ref()?;
        let fits = encoded.epoch == self.epoch && Some(encoded.base) == base;
        fits.then(|| Arc::clone(&encoded.frame))
    }
}

/// What a set of extents costs as one frame.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    ranges: u64,
    bytes: u64,
}

/// The cost of `extents` as a SINGLE; `None` if they do not fit one.
pub(super) fn single_cost(extents: &ExtentSet) -> Option<Cost> {
    let mut cost = Cost::default();
    for range in extents.ranges() {
        cost.ranges += 1;
        cost.bytes += range.end - range.start;
        if cost.ranges > MAX_EXTENTS_PER_FRAME || cost.bytes > MAX_CHUNK {
            return None;
        }
    }
    Some(cost)
}

/// Whether a frame would be full of what `extents` have within `range`.
fn fills_frame(extents: &ExtentSet, range: Range<u64>) -> bool {
    let (mut at, mut bytes) = (range.start, 0);
    for _ in 0..MAX_EXTENTS_PER_FRAME {
        let Some(found) = extents
            .next_range(at)
            .filter(|found| found.start < range.end)
        else {
            return false;
        };
        bytes += found.end.min(range.end) - found.start;
        if bytes >= MAX_CHUNK {
            return true;
        }
        at = found.end;
    }
    true
}

#[derive(Debug)]
struct InFlight {
    epoch: u64,
    extents: ExtentSet,
    /// How much of `MAX_PENDING_EXTENTS` it counts for.
    weight: u64,
}

/// An update in parts that is being sent.
#[derive(Debug)]
struct Open {
    epoch: u64,
    extents: ExtentSet,
    cursor: u64,
    chunks: u32,
    sent: u64,
    stage: Stage,
    last_frame: Instant,
}

/// How much of an open update's epoch is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It was complete when the update began.
    Complete,
    /// Its capture goes on; `extents` are empty until it ends.
    Coming,
    /// Its capture has ended since: the END says the kind.
    Came(EpochKind),
}

impl Open {
    /// The next chunk: what there is between the cursor and `limit`, as far as it fits.
    fn chunk(
        &mut self,
        limit: u64,
        shared: &mut Shared,
        view: &View<'_>,
        spare: &mut Spare,
    ) -> Vec<u8> {
        let content = view.content;
        let extents = match (&view.coming, self.stage) {
            (Some(coming), Stage::Coming) => coming.changed,
            _ => &self.extents,
        };
        let mut frame = FrameBuilder::reusing(
            spare.take(MAX_CHUNK.min(shared.size) as usize + 1024),
            (Kind::UpdateChunk, 0, shared.handle, self.epoch),
        );
        let from = self.cursor;
        while frame.room() > 0
            && let Some(range) = extents.next_range(self.cursor)
            && range.start < limit
        {
            let end = range.end.min(limit).min(range.start + frame.room());
            if shared.pre.is_untouched(self.epoch) {
                let bytes = &content[range.start as usize..end as usize];
                frame.extent(range.start, bytes);
            } else {
                frame.extent_with(range.start, end - range.start, |out| {
                    shared.pre.read(self.epoch, range.start, out, content);
                });
            }
            self.cursor = end;
        }
        self.chunks += 1;
        self.sent += frame.data_bytes();
        // What lies before the page of the cursor is not read again.
        let sent_from = from / PAGE_SIZE * PAGE_SIZE;
        shared.pre.sent(self.epoch, sent_from..self.cursor);
        frame.finish()
    }
}

#[derive(Debug)]
struct Digesting {
    received: u64,
    compared: u64,
    total: u64,
    queue: VecDeque<Digest>,
}

/// The source's side of one replica.
#[derive(Debug)]
pub(super) struct Shipper {
    pub(super) key: ReplicaKey,
    pub(super) round: u32,
    pub(super) gone_since: Option<Instant>,
    pub(super) acked: Option<u64>,
    pub(super) bytes_sent: u64,
    pub(super) updates_sent: u64,
    pub(super) waiting_since: Option<Instant>,
    digesting: Option<Digesting>,
    announce_info: bool,
    announce_epoch: bool,
    /// The size that the replica was told last.
    pub(super) told_size: u64,
    /// The newest epoch sent whole, or acked; `None`: the next update is WHOLE.
    shipped: Option<u64>,
    /// The newest epoch that was ever sent whole in this round's life: what an ack,
    /// late because the update was still being applied, may name.
    highest: Option<u64>,
    /// Epoch of the first WHOLE update sent in this round.
    whole_sent: Option<u64>,
    pending: ExtentSet,
    in_flight: VecDeque<InFlight>,
    open: Option<Open>,
}

impl Shipper {
    /// For a replica that gets `pending` in a WHOLE update.
    pub(super) fn everything(key: ReplicaKey, round: u32, pending: ExtentSet) -> Self {
        Self {
            key,
            round,
            gone_since: None,
            acked: None,
            bytes_sent: 0,
            updates_sent: 0,
            waiting_since: None,
            digesting: None,
            announce_info: false,
            announce_epoch: false,
            told_size: pending.size(),
            shipped: None,
            highest: None,
            whole_sent: None,
            pending,
            in_flight: VecDeque::new(),
            open: None,
        }
    }

    /// For a replica that sends its digests first.
    pub(super) fn digests(key: ReplicaKey, round: u32, size: u64) -> Self {
        let mut shipper = Self::everything(key, round, ExtentSet::new(size));
        shipper.begin_digests();
        shipper
    }

    fn begin_digests(&mut self) {
        self.pending.clear();
        self.in_flight.clear();
        (self.acked, self.shipped) = (None, None);
        (self.highest, self.whole_sent) = (None, None);
        self.waiting_since = None;
        let total = self.pending.size().div_ceil(DIGEST_CHUNK);
        self.digesting = (total > 0).then(|| Digesting {
            received: 0,
            compared: 0,
            total,
            queue: VecDeque::new(),
        });
    }

    /// Begins anew by digests, on the same connection: the info goes out with `poll`.
    pub(super) fn restart(&mut self, pre: &mut PreImages) {
        self.close_open(pre);
        self.round = self.round.wrapping_add(1);
        self.announce_info = true;
        self.begin_digests();
    }

    pub(super) fn info(&self, shared: &Shared, plan: SyncPlan) -> RegionInfo {
        RegionInfo {
            handle: shared.handle,
            subscription: self.key.subscription,
            round: self.round,
            generation: shared.generation,
            size: shared.size,
            max_size: shared.max_size,
            epoch: shared.epoch,
            plan,
        }
    }

    /// The region has `size` bytes now. Digests of a part of it are of no use.
    pub(super) fn grow(&mut self, size: u64, pre: &mut PreImages) {
        self.pending.grow(size);
        for update in &mut self.in_flight {
            update.extents.grow(size);
        }
        if let Some(open) = &mut self.open {
            open.extents.grow(size);
        }
        if self.digesting.is_some() {
            self.restart(pre);
        }
    }

    /// The news of a size that the replica was not told, in front of the next update.
    fn poll_growth(&mut self, shared: &Shared) -> Option<Vec<u8>> {
        if self.told_size == shared.size || self.open.is_some() || self.digesting.is_some() {
            return None;
        }
        self.told_size = shared.size;
        Some(self.info(shared, SyncPlan::Grow).encode())
    }

    /// A capture is complete: the open update of it gets its extents, else they pend.
    pub(super) fn captured(&mut self, info: CaptureInfo, extents: &ExtentSet, pre: &mut PreImages) {
        if let Some(open) = self
            .open
            .as_mut()
            .filter(|open| open.stage == Stage::Coming)
        {
            let from = open.cursor;
            if open.epoch == info.epoch && pre.complete(info.epoch, extents, from) {
                open.stage = Stage::Came(info.kind);
                open.extents.clone_from(extents);
                return;
            }
            self.close_open(pre);
        }
        self.pending.union(extents);
    }

    /// Whether the next update is that from `epoch`, so that a shared frame is of use.
    pub(super) fn is_at(&self, epoch: u64) -> bool {
        self.gone_since.is_none() && self.shipped == Some(epoch) && self.open.is_none()
    }

    pub(super) fn is_digesting(&self) -> bool {
        self.digesting.is_some()
    }

    fn unpin(&mut self, pre: &mut PreImages) -> Option<Open> {
        let open = self.open.take()?;
        pre.unpin(open.epoch);
        Some(open)
    }

    /// Gives up the open update; its extents are pending again.
    pub(super) fn close_open(&mut self, pre: &mut PreImages) {
        if let Some(open) = self.unpin(pre) {
            self.pending.union(&open.extents);
        }
    }

    /// All that was not acked is pending again.
    fn return_in_flight(&mut self, pre: &mut PreImages) {
        self.close_open(pre);
        for update in self.in_flight.drain(..) {
            self.pending.union(&update.extents);
        }
        self.shipped = self.acked;
        self.waiting_since = None;
    }

    /// The link is gone. False if nothing is known that a resume could use.
    pub(super) fn disconnected(&mut self, now: Instant, pre: &mut PreImages) -> bool {
        self.return_in_flight(pre);
        self.announce_info = false;
        self.gone_since.get_or_insert(now);
        self.digesting.is_none()
    }

    /// Goes on from what the replica says it has; false if that fits nothing that is
    /// known here, and digests have to decide.
    pub(super) fn adopt(&mut self, have: Option<u64>, epoch: u64, pre: &mut PreImages) -> bool {
        let known = match (self.acked, have) {
            _ if self.digesting.is_some() => false,
            (None, None) => true,
            (Some(acked), Some(have)) => acked <= have && have <= epoch,
            (None, Some(have)) => {
                have <= epoch && self.whole_sent.is_some_and(|whole| whole <= have)
            }
            (Some(_), None) => false,
        };
        if known {
            if let Some(have) = have {
                self.acknowledge(have);
            }
            self.return_in_flight(pre);
        }
        known
    }

    pub(super) fn handle_ack(&mut self, now: Instant, ack: &Ack) -> Result<(), ProtocolError> {
        if ack.round != self.round || self.digesting.is_some() {
            return Ok(());
        }
        let claimable = match (self.acked, self.whole_sent) {
            (None, whole) => whole.is_some_and(|whole| whole <= ack.epoch),
            (Some(_), _) => true,
        };
        if !claimable || self.highest.is_none_or(|highest| ack.epoch > highest) {
            return Err(ProtocolError::Ack { epoch: ack.epoch });
        }
        self.acknowledge(ack.epoch);
        self.waiting_since = (!self.in_flight.is_empty()).then_some(now);
        Ok(())
    }

    fn acknowledge(&mut self, epoch: u64) {
        while self
            .in_flight
            .front()
            .is_some_and(|update| update.epoch <= epoch)
        {
            self.in_flight.pop_front();
        }
        self.acked = self.acked.max(Some(epoch));
        self.shipped = self.shipped.max(self.acked);
        self.highest = self.highest.max(self.acked);
    }

    pub(super) fn handle_resync(&mut self, resync: &Resync, shared: &mut Shared) {
        if resync.round != self.round || self.digesting.is_some() {
            return;
        }
        if self.adopt(resync.have_epoch, shared.epoch, &mut shared.pre) {
            // Even if nothing is missing the replica has to hear that.
            self.announce_epoch = true;
        } else {
            self.restart(&mut shared.pre);
        }
    }

    pub(super) fn handle_digests(&mut self, frame: &DigestFrame) -> Result<(), ProtocolError> {
        if frame.round != self.round {
            return Ok(());
        }
        let refused = ProtocolError::Digests {
            first_chunk: frame.first_chunk,
        };
        let Some(digesting) = &mut self.digesting else {
            return Err(refused);
        };
        let count = frame.digests.len() as u64;
        if frame.first_chunk != digesting.received || count > digesting.total - digesting.received {
            return Err(refused);
        }
        digesting.received += count;
        digesting.queue.extend(&frame.digests);
        Ok(())
    }

    /// Compares up to `chunks` chunks; true when there is nothing more to compare now.
    ///
    /// The content may be between two epochs: a chunk that equals it then differs from
    /// the coming epoch only in extents which that capture makes pending, and no
    /// update starts before it.
    pub(super) fn digest_step(
        &mut self,
        size: u64,
        chunks: u64,
        ours: &mut dyn FnMut(Range<u64>) -> Digest,
    ) -> bool {
        let Some(digesting) = &mut self.digesting else {
            return true;
        };
        for _ in 0..chunks {
            let Some(theirs) = digesting.queue.pop_front() else {
                break;
            };
            let start = digesting.compared * DIGEST_CHUNK;
            let end = (start + DIGEST_CHUNK).min(size);
            if ours(start..end) != theirs {
                self.pending.insert(start..end);
            }
            digesting.compared += 1;
        }
        let nothing_now = digesting.queue.is_empty();
        if digesting.compared == digesting.total {
            self.digesting = None;
        }
        nothing_now
    }

    /// Whether `poll` has something to do, as far as is known without trying.
    pub(super) fn wants_poll(&self, shared: &Shared) -> bool {
        self.gone_since.is_none()
            && (self.announce_info
                || self.open.is_some()
                || self.told_size != shared.size
                || (self.wants_update(shared) && self.window_open() && !shared.busy))
    }

    fn wants_update(&self, shared: &Shared) -> bool {
        self.digesting.is_none() && (self.announce_epoch || self.shipped != Some(shared.epoch))
    }

    fn window_open(&self) -> bool {
        let weight: u64 = self.in_flight.iter().map(|update| update.weight).sum();
        (self.in_flight.len() as u64) < MAX_UNACKED && weight < MAX_PENDING_EXTENTS
    }

    pub(super) fn poll(
        &mut self,
        now: Instant,
        shared: &mut Shared,
        view: &View<'_>,
        spare: &mut Spare,
    ) -> Option<Out> {
        if self.gone_since.is_some() {
            return None;
        }
        let out = if std::mem::take(&mut self.announce_info) {
            // A restart always compares, unless there is nothing to compare.
            self.told_size = shared.size;
            Out::Owned(self.info(shared, SyncPlan::Digests).encode())
        } else if let Some(frame) = self.poll_open(now, shared, view, spare) {
            Out::Owned(frame)
        } else if self.open.is_some() {
            return None;
        } else if let Some(frame) = self.poll_growth(shared) {
            Out::Owned(frame)
        } else if let Some(coming) = &view.coming
            && shared.busy
        {
            Out::Owned(self.poll_coming(now, shared, coming)?)
        } else {
            self.poll_update(now, shared, view.content)?
        };
        self.bytes_sent += out.as_ref().len() as u64;
        Some(out)
    }

    /// The next part of the open update, if there is one that is still whole.
    fn poll_open(
        &mut self,
        now: Instant,
        shared: &mut Shared,
        view: &View<'_>,
        spare: &mut Spare,
    ) -> Option<Vec<u8>> {
        let open = self.open.as_mut()?;
        let is_coming = open.stage == Stage::Coming;
        if !shared.pre.is_alive(open.epoch) || (is_coming && !shared.busy) {
            self.close_open(&mut shared.pre);
            return None;
        }
        let (extents, limit) = match (&view.coming, is_coming) {
            (_, false) => (&open.extents, shared.size),
            (Some(coming), true) if coming.epoch == open.epoch => (coming.changed, coming.settled),
            _ => return None,
        };
        let silent = now.saturating_duration_since(open.last_frame) >= SIGN_OF_LIFE;
        if is_coming && !silent && !fills_frame(extents, open.cursor..limit) {
            return None;
        }
        let more = extents.next_range(open.cursor);
        if more.is_some_and(|range| range.start < limit) || is_coming {
            open.last_frame = now;
            return Some(open.chunk(limit, shared, view, spare));
        }
        let end = EndUpdate {
            chunks: open.chunks,
            total_bytes: open.sent,
            kind: match open.stage {
                Stage::Came(kind) => kind,
                _ => EpochKind::Convergent,
            },
        };
        let open = self.unpin(&mut shared.pre)?;
        let frame = end.encode(shared.handle, open.epoch);
        self.shipped_whole(now, open.epoch, open.extents, MAX_PENDING_EXTENTS / 2);
        Some(frame)
    }

    /// Notes that all frames of an update were given out.
    fn shipped_whole(&mut self, now: Instant, epoch: u64, extents: ExtentSet, weight: u64) {
        if self.acked.is_none() {
            self.whole_sent.get_or_insert(epoch);
        }
        self.shipped = Some(epoch);
        self.highest = self.highest.max(self.shipped);
        self.updates_sent += 1;
        self.waiting_since.get_or_insert(now);
        self.in_flight.push_back(InFlight {
            epoch,
            extents,
            weight,
        });
    }

    /// The START of the coming epoch, for a replica that lacks nothing else.
    fn poll_coming(
        &mut self,
        now: Instant,
        shared: &mut Shared,
        coming: &Coming<'_>,
    ) -> Option<Vec<u8>> {
        let base = self.shipped.filter(|base| *base == shared.epoch)?;
        let in_step = self.digesting.is_none() && !self.announce_epoch && self.pending.is_empty();
        if !in_step
            || !self.window_open()
            || !UpdatePrefix::can_name(base, coming.epoch)
            || !fills_frame(coming.changed, 0..coming.settled)
        {
            return None;
        }
        shared.pre.pin_coming(coming.epoch).ok()?;
        let start = StartUpdate {
            prefix: UpdatePrefix {
                base: Base::Epoch(base),
                source_time_ns: coming.source_time_ns,
            },
            total_bytes: shared.size,
            coming: true,
        };
        self.open = Some(Open {
            epoch: coming.epoch,
            extents: ExtentSet::new(shared.size),
            cursor: 0,
            chunks: 0,
            sent: 0,
            stage: Stage::Coming,
            last_frame: now,
        });
        Some(start.encode(shared.handle, coming.epoch, EpochKind::Convergent))
    }

    /// A new update: a SINGLE, or the START of one in parts.
    fn poll_update(&mut self, now: Instant, shared: &mut Shared, content: &[u8]) -> Option<Out> {
        if !self.wants_update(shared) || !self.window_open() {
            return None;
        }
        let empty = ExtentSet::new(shared.size);
        if let Some(frame) = shared.encoded_from(self.shipped) {
            let weight = single_cost(&self.pending).map_or(MAX_PENDING_EXTENTS, |c| c.ranges);
            let extents = std::mem::replace(&mut self.pending, empty);
            self.announce_epoch = false;
            self.shipped_whole(now, shared.epoch, extents, weight);
            return Some(Out::Shared(frame));
        }
        if shared.busy {
            return None;
        }
        // A base too far back to be named: I1 makes the update whole all the same.
        let base = match self.shipped {
            Some(base) if UpdatePrefix::can_name(base, shared.epoch) => Base::Epoch(base),
            _ => Base::Nothing,
        };
        if let Some(cost) = single_cost(&self.pending) {
            let frame = shared.single(base, &self.pending, content);
            let extents = std::mem::replace(&mut self.pending, empty);
            self.announce_epoch = false;
            let shareable = matches!(base, Base::Epoch(base) if base < shared.epoch);
            let out = match self.shipped.filter(|_| shareable) {
                Some(base) => {
                    let frame: Arc<[u8]> = frame.into();
                    shared.encoded = Some(Encoded {
                        base,
                        epoch: shared.epoch,
                        frame: Arc::clone(&frame),
                    });
                    Out::Shared(frame)
                }
                None => Out::Owned(frame),
            };
            self.shipped_whole(now, shared.epoch, extents, cost.ranges);
            return Some(out);
        }
        shared.pre.pin(shared.epoch, &self.pending).ok()?;
        self.announce_epoch = false;
        let extents = std::mem::replace(&mut self.pending, empty);
        let start = StartUpdate {
            prefix: shared.prefix(base),
            total_bytes: extents.bytes(),
            coming: false,
        };
        self.open = Some(Open {
            epoch: shared.epoch,
            extents,
            cursor: 0,
            chunks: 0,
            sent: 0,
            stage: Stage::Complete,
            last_frame: now,
        });
        Some(Out::Owned(start.encode(
            shared.handle,
            shared.epoch,
            shared.kind,
        )))
    }

    /// Bytes that are not acknowledged.
    pub(super) fn unacked_bytes(&self) -> u64 {
        let open = self.open.as_ref().map_or(0, |open| open.extents.bytes());
        let in_flight: u64 = self.in_flight.iter().map(|u| u.extents.bytes()).sum();
        self.pending.bytes() + open + in_flight
    }

    pub(super) fn state(&self, shared: &Shared) -> ShipperState {
        if self.gone_since.is_some() {
            ShipperState::Gone
        } else if self.digesting.is_some() {
            ShipperState::Comparing
        } else if self.open.is_some() {
            ShipperState::Sending
        } else if self.acked == Some(shared.epoch) {
            ShipperState::InStep
        } else {
            ShipperState::Behind
        }
    }
}
