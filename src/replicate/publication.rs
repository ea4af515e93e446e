//! The source's side of one region: its epochs, and a shipper for each replica.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::checksum::{Digest, digest};
use crate::limits::{
    MAX_ACKED_SLOTS, MAX_BODY, MAX_CHUNK, MAX_REPLICAS, PREIMAGE_DIVISOR, PREIMAGE_MIN,
    RESUME_WINDOW_MS, SPARE_FRAMES,
};
use crate::track::{ExtentSet, PreImages};
use crate::wire::{
    Ack, Base, DigestFrame, HEADER_BYTES, Header, Kind, RegionInfo, Resync, Subscribe, SyncPlan,
    UpdatePrefix, WireError,
};
use crate::words::{EpochKind, Generation};

use super::shipper::{Encoded, Shared, Shipper, View, single_cost};

const RESUME_WINDOW: Duration = Duration::from_millis(RESUME_WINDOW_MS);

/// Who follows: the same over reconnects of one replica.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ReplicaKey {
    /// The replica's node.
    pub node: [u8; 16],
    /// Its number for the subscription.
    pub subscription: u32,
    /// The node's name, for people; not part of what is compared.
    pub name: String,
}

impl ReplicaKey {
    fn is_same(&self, other: &ReplicaKey) -> bool {
        (self.node, self.subscription) == (other.node, other.subscription)
    }
}

/// One connection of one replica to one region; a new one gets a new id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShipperId(u64);

/// What a finished capture made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureInfo {
    /// The new epoch, greater than the one before.
    pub epoch: u64,
    /// What it promises.
    pub kind: EpochKind,
    /// When it was made, nanoseconds of the real-time clock.
    pub source_time_ns: u64,
}

/// A capture under way, as far as it has got.
#[derive(Clone, Copy, Debug)]
pub struct Coming<'a> {
    /// The epoch that it will be.
    pub epoch: u64,
    /// When it began, nanoseconds of the real-time clock; what `CaptureInfo` will say.
    pub source_time_ns: u64,
    /// What it has changed so far, or more.
    pub changed: &'a ExtentSet,
    /// Below this offset neither `changed` nor the content changes again, unless
    /// [`PreImages::give_up_coming`] is called first.
    pub settled: u64,
}

/// Memory of frames that were sent, for others to be made in: fresh memory costs more
/// than the bytes that are put into it. At most `SPARE_FRAMES` are kept.
#[derive(Debug, Default)]
pub struct Spare(Vec<Vec<u8>>);

impl Spare {
    /// Takes a frame that is not needed any more; small ones are dropped.
    pub fn give(&mut self, frame: Vec<u8>) {
        let fits = (MAX_CHUNK..=2 * MAX_BODY).contains(&(frame.capacity() as u64));
        if fits && (self.0.len() as u64) < SPARE_FRAMES {
            self.0.push(frame);
        }
    }

    /// Memory for a frame with a body of `body_len` bytes, which it may outgrow.
    pub(super) fn take(&mut self, body_len: usize) -> Vec<u8> {
        let kept = self.0.pop();
        kept.unwrap_or_else(|| Vec::with_capacity(HEADER_BYTES + body_len))
    }

    /// Bytes that it keeps.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|frame| frame.capacity() as u64).sum()
    }

    /// Gives all of it back.
    pub fn clear(&mut self) {
        self.0 = Vec::new();
    }
}

/// A frame to send.
#[derive(Clone, Debug)]
pub enum Out {
    /// For this replica.
    Owned(Vec<u8>),
    /// Encoded once for several.
    Shared(Arc<[u8]>),
}

impl AsRef<[u8]> for Out {
    fn as_ref(&self) -> &[u8] {
        match self {
            Out::Owned(bytes) => bytes,
            Out::Shared(bytes) => bytes,
        }
    }
}

/// A replica that cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubscribeError {
    /// As many replicas follow as may.
    #[error("{MAX_REPLICAS} replicas follow the region already")]
    TooMany,
}

/// A frame of a replica that breaks the protocol: close its connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The body is not what its kind has.
    #[error("refused a frame of a replica")]
    Wire(#[from] WireError),
    /// An epoch is acknowledged that was not sent.
    #[error("epoch {epoch} is acknowledged, which was not sent")]
    Ack {
        /// The epoch.
        epoch: u64,
    },
    /// Digests came that were not asked for, or not in their order.
    #[error("digests from chunk {first_chunk} on are not the ones that come next")]
    Digests {
        /// The first chunk in the frame.
        first_chunk: u64,
    },
    /// The frame has no place on the source's side of a region.
    #[error("a {kind:?} frame came to a source")]
    Unexpected {
        /// Its kind.
        kind: Kind,
    },
}

/// Where one replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShipperState {
    /// It shows the newest epoch.
    InStep,
    /// Updates are waiting or on their way.
    Behind,
    /// An update in parts is being sent.
    Sending,
    /// Its digests are being compared.
    Comparing,
    /// Its connection is gone; it can resume for `RESUME_WINDOW_MS`.
    Gone,
}

impl ShipperState {
    /// The word for status output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InStep => "in step",
            Self::Behind => "behind",
            Self::Sending => "sending",
            Self::Comparing => "comparing",
            Self::Gone => "gone",
        }
    }
}

/// One replica, for status output.
#[derive(Clone, Debug)]
pub struct ShipperStatus {
    /// Who it is.
    pub replica: ReplicaKey,
    /// The epoch that it acknowledged, if any of this generation.
    pub acked: Option<u64>,
    /// Epochs between that and the newest; all of them if none is acknowledged.
    pub lag: u64,
    /// Where it stands.
    pub state: ShipperState,
    /// Bytes that it may lack, in flight or not.
    pub pending_bytes: u64,
    /// Bytes of frames made for it.
    pub bytes_sent: u64,
    /// Updates made for it.
    pub updates_sent: u64,
    /// Since when an update waits for its ack.
    pub waiting_since: Option<Instant>,
}

/// The source's side of one region and all its replicas.
///
/// `content` in all calls is the twin: all bytes of the region as of the epoch last
/// [`captured`](Self::captured), or between that and the next one while
/// [`set_busy`](Self::set_busy) is on.
///
/// Memory: for each replica three sets of extents (pending, open, in flight) of at most
/// about 1 MiB or one bit per page each, digests of `size / 4096` bytes while it is
/// compared, and the pre-images of the region.
#[derive(Debug)]
pub struct Publication {
    shared: Shared,
    shippers: BTreeMap<ShipperId, Shipper>,
    next_id: u64,
}

impl Publication {
    /// A region of `size` bytes at `epoch` that frames name by `handle`. Pre-images may
    /// take `max(size / PREIMAGE_DIVISOR, PREIMAGE_MIN)` bytes.
    pub fn new(handle: u32, generation: Generation, epoch: u64, size: u64) -> Self {
        let budget = (size / PREIMAGE_DIVISOR).max(PREIMAGE_MIN);
        Self::with_budget(handle, generation, epoch, size, budget)
    }

    /// The same with a budget of its own for pre-images.
    pub fn with_budget(
        handle: u32,
        generation: Generation,
        epoch: u64,
        size: u64,
        preimage_bytes: u64,
    ) -> Self {
        Self {
            shared: Shared {
                handle,
                generation,
                size,
                max_size: size,
                epoch,
                kind: EpochKind::Convergent,
                source_time_ns: 0,
                busy: false,
                pre: PreImages::new(size, preimage_bytes),
                encoded: None,
            },
            shippers: BTreeMap::new(),
            next_id: 1,
        }
    }

    /// The region may grow to `max_size` bytes; replicas are told when they begin.
    pub fn set_max_size(&mut self, max_size: u64) {
        self.shared.max_size = max_size.max(self.shared.size);
    }

    /// The region has `size` bytes from the next epoch on; what is new is zero until that
    /// one says otherwise. Each replica is told before the first update that has them, one
    /// that is being compared begins anew. Nothing if the size is no greater.
    pub fn grow(&mut self, size: u64) {
        let shared = &mut self.shared;
        if size <= shared.size {
            return;
        }
        shared.size = size;
        shared.max_size = shared.max_size.max(size);
        // What was made is of the size before.
        shared.encoded = None;
        shared.pre.grow(size);
        for shipper in self.shippers.values_mut() {
            shipper.grow(size, &mut shared.pre);
        }
    }

    /// Its size, in bytes.
    pub fn size(&self) -> u64 {
        self.shared.size
    }

    /// A capture is done: `content` is the region as of `info.epoch`, and differs from
    /// the epoch before in `extents` at most. Ends [`set_busy`](Self::set_busy).
    ///
    /// # Panics
    /// If `extents` or `content` are of another size.
    pub fn captured(&mut self, info: CaptureInfo, extents: &ExtentSet, content: &[u8]) {
        assert_eq!(content.len() as u64, self.shared.size, "the whole region");
        debug_assert!(info.epoch > self.shared.epoch, "epochs rise");
        let before = self.shared.epoch;
        let shared = &mut self.shared;
        (shared.epoch, shared.kind) = (info.epoch, info.kind);
        shared.source_time_ns = info.source_time_ns;
        shared.busy = false;
        shared.encoded = None;
        if self.shippers.values().any(|shipper| shipper.is_at(before))
            && UpdatePrefix::can_name(before, info.epoch)
            && single_cost(extents).is_some()
        {
            // Made at once, so that it can go out while the next capture runs.
            let frame = shared.single(Base::Epoch(before), extents, content);
            shared.encoded = Some(Encoded {
                base: before,
                epoch: info.epoch,
                frame: frame.into(),
            });
        }
        for shipper in self.shippers.values_mut() {
            shipper.captured(info, extents, &mut shared.pre);
        }
    }

    /// While on, the content is between two epochs: only what is pinned or encoded
    /// already goes out. Turn it on before a capture changes the first byte, and off
    /// when it ended without having changed any.
    pub fn set_busy(&mut self, busy: bool) {
        self.shared.busy = busy;
    }

    /// Where a capture puts aside what open updates still need.
    pub fn pre_images(&mut self) -> &mut PreImages {
        &mut self.shared.pre
    }

    /// Bytes copied aside for open updates.
    pub fn pre_image_bytes(&self) -> u64 {
        self.shared.pre.used_bytes()
    }

    /// A replica begins to follow, or comes back. `present` holds at least all bytes of
    /// the content that are not zero. Send the info, then [`poll`](Self::poll).
    ///
    /// # Errors
    /// [`SubscribeError::TooMany`]; replicas that went away make room, oldest first.
    pub fn subscribe(
        &mut self,
        now: Instant,
        replica: ReplicaKey,
        wish: &Subscribe,
        present: &ExtentSet,
    ) -> Result<(ShipperId, RegionInfo), SubscribeError> {
        let same = |(id, s): (&ShipperId, &Shipper)| s.key.is_same(&replica).then_some(*id);
        let known = self.shippers.iter().find_map(same);
        if known.is_none() {
            self.make_room()?;
        }
        let mut known = known.and_then(|id| self.shippers.remove(&id));
        let shared = &mut self.shared;
        if let Some(shipper) = &mut known {
            shipper.disconnected(now, &mut shared.pre);
        }
        let round = known
            .as_ref()
            .map_or(1, |known| known.round.wrapping_add(1));
        let adoptable = !wish.fresh && wish.generation == shared.generation;
        let resumed = known.filter(|_| adoptable).and_then(|mut shipper| {
            let goes_on = shipper.adopt(wish.have_epoch, shared.epoch, &mut shared.pre);
            goes_on.then_some(shipper)
        });
        let (shipper, plan) = match resumed {
            Some(mut shipper) => {
                (shipper.round, shipper.gone_since) = (round, None);
                shipper.told_size = shared.size;
                shipper.key = replica;
                (shipper, SyncPlan::Resume)
            }
            None if wish.fresh => {
                let shipper = Shipper::everything(replica, round, present.clone());
                (shipper, SyncPlan::Everything)
            }
            None => {
                let shipper = Shipper::digests(replica, round, shared.size);
                (shipper, SyncPlan::Digests)
            }
        };
        let info = shipper.info(shared, plan);
        let id = ShipperId(self.next_id);
        self.next_id += 1;
        self.shippers.insert(id, shipper);
        Ok((id, info))
    }

    /// The next frame for one replica; call until `None`, as long as there is room to
    /// send. `None` also for an id that is no more.
    pub fn poll(&mut self, id: ShipperId, now: Instant, content: &[u8]) -> Option<Out> {
        self.poll_coming(id, now, (content, None), &mut Spare::default())
    }

    /// The same while a capture that changes much is under way: a replica that is in
    /// step gets what is settled of the coming epoch at once, so that capturing and
    /// sending go on side by side. Frames are made in memory from `spare`.
    pub fn poll_coming(
        &mut self,
        id: ShipperId,
        now: Instant,
        (content, coming): (&[u8], Option<Coming<'_>>),
        spare: &mut Spare,
    ) -> Option<Out> {
        let shipper = self.shippers.get_mut(&id)?;
        let view = View {
            content,
            coming: coming.filter(|coming| coming.epoch > self.shared.epoch),
        };
        shipper.poll(now, &mut self.shared, &view, spare)
    }

    /// Whether [`poll`](Self::poll) may have something for the replica. It can still be
    /// `None` while two other epochs are pinned.
    pub fn wants_poll(&self, id: ShipperId) -> bool {
        let shipper = self.shippers.get(&id);
        shipper.is_some_and(|shipper| shipper.wants_poll(&self.shared))
    }

    /// Takes an ACK, RESYNC or DIGEST whose checksums were checked.
    ///
    /// # Errors
    /// [`ProtocolError`]: close the connection and call [`disconnected`](Self::disconnected).
    pub fn handle_frame(
        &mut self,
        id: ShipperId,
        now: Instant,
        header: &Header,
        body: &[u8],
    ) -> Result<(), ProtocolError> {
        match header.kind {
            Kind::Ack => self.handle_ack(id, now, &Ack::decode(header, body)?),
            Kind::Resync => {
                self.handle_resync(id, &Resync::decode(header, body)?);
                Ok(())
            }
            Kind::Digest => self.handle_digests(id, &DigestFrame::decode(header, body)?),
            kind => Err(ProtocolError::Unexpected { kind }),
        }
    }

    /// A replica shows an epoch.
    ///
    /// # Errors
    /// [`ProtocolError::Ack`] for an epoch that was not sent.
    pub fn handle_ack(
        &mut self,
        id: ShipperId,
        now: Instant,
        ack: &Ack,
    ) -> Result<(), ProtocolError> {
        match self.shippers.get_mut(&id) {
            Some(shipper) => shipper.handle_ack(now, ack),
            None => Ok(()),
        }
    }

    /// A replica lost an update: what it did not acknowledge is pending again.
    pub fn handle_resync(&mut self, id: ShipperId, resync: &Resync) {
        if let Some(shipper) = self.shippers.get_mut(&id) {
            shipper.handle_resync(resync, &mut self.shared);
        }
    }

    /// Takes digests of a replica's chunks; [`digest_step`](Self::digest_step) compares.
    ///
    /// # Errors
    /// [`ProtocolError::Digests`] if they are not the ones that come next.
    pub fn handle_digests(
        &mut self,
        id: ShipperId,
        frame: &DigestFrame,
    ) -> Result<(), ProtocolError> {
        match self.shippers.get_mut(&id) {
            Some(shipper) => shipper.handle_digests(frame),
            None => Ok(()),
        }
    }

    /// Compares up to `chunks` chunks of `DIGEST_CHUNK` bytes with what a replica sent;
    /// true when there is nothing more to compare now.
    pub fn digest_step(&mut self, id: ShipperId, content: &[u8], chunks: u64) -> bool {
        self.digest_step_with(id, chunks, &mut |chunk| {
            digest(&content[chunk.start as usize..chunk.end as usize])
        })
    }

    /// The same with a way to the digest of a range of the content that need not read
    /// it, as of a hole.
    pub fn digest_step_with(
        &mut self,
        id: ShipperId,
        chunks: u64,
        ours: &mut dyn FnMut(Range<u64>) -> Digest,
    ) -> bool {
        match self.shippers.get_mut(&id) {
            Some(shipper) => shipper.digest_step(self.shared.size, chunks, ours),
            None => true,
        }
    }

    /// Whether the id is that of a replica which follows or may resume.
    pub fn knows(&self, id: ShipperId) -> bool {
        self.shippers.contains_key(&id)
    }

    /// Epochs that open updates hold; when it falls, replicas that waited for a place
    /// are to be polled.
    pub fn held_open(&self) -> usize {
        self.shared.pre.targets()
    }

    /// Whether a replica is being compared.
    pub fn is_digesting(&self, id: ShipperId) -> bool {
        self.shippers.get(&id).is_some_and(Shipper::is_digesting)
    }

    /// The connection of a replica is gone; it may come back.
    pub fn disconnected(&mut self, id: ShipperId, now: Instant) {
        if let Some(shipper) = self.shippers.get_mut(&id)
            && !shipper.disconnected(now, &mut self.shared.pre)
        {
            self.shippers.remove(&id);
        }
    }

    /// A replica follows no longer: nothing is kept for it.
    pub fn unsubscribe(&mut self, id: ShipperId) {
        if let Some(mut shipper) = self.shippers.remove(&id) {
            shipper.close_open(&mut self.shared.pre);
        }
    }

    /// Forgets replicas that went away longer ago than `RESUME_WINDOW_MS`.
    pub fn forget(&mut self, now: Instant) {
        self.shippers.retain(|_, shipper| {
            shipper
                .gone_since
                .is_none_or(|since| now < since + RESUME_WINDOW)
        });
    }

    /// When [`forget`](Self::forget) has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        let gone = self.shippers.values().filter_map(|s| s.gone_since);
        gone.min().map(|since| since + RESUME_WINDOW)
    }

    /// Another life of the region begins: replicas that are connected are compared by
    /// digest, others are forgotten. Also ends [`set_busy`](Self::set_busy).
    pub fn restart(&mut self, generation: Generation, epoch: u64) {
        self.shippers
            .retain(|_, shipper| shipper.gone_since.is_none());
        let shared = &mut self.shared;
        for shipper in self.shippers.values_mut() {
            shipper.restart(&mut shared.pre);
        }
        (shared.generation, shared.epoch) = (generation, epoch);
        (shared.kind, shared.source_time_ns) = (EpochKind::Convergent, 0);
        (shared.busy, shared.encoded) = (false, None);
    }

    /// The epochs acknowledged, descending, at most `MAX_ACKED_SLOTS`.
    pub fn acked(&self) -> Vec<u64> {
        let mut acked: Vec<u64> = self.shippers.values().filter_map(|s| s.acked).collect();
        acked.sort_unstable_by(|a, b| b.cmp(a));
        acked.truncate(MAX_ACKED_SLOTS as usize);
        acked
    }

    /// All replicas that are known.
    pub fn ids(&self) -> impl Iterator<Item = ShipperId> + '_ {
        self.shippers.keys().copied()
    }

    /// Where one replica stands.
    pub fn status(&self, id: ShipperId) -> Option<ShipperStatus> {
        let shipper = self.shippers.get(&id)?;
        let epoch = self.shared.epoch;
        Some(ShipperStatus {
            replica: shipper.key.clone(),
            acked: shipper.acked,
            lag: epoch - shipper.acked.unwrap_or(0).min(epoch),
            state: shipper.state(&self.shared),
            pending_bytes: shipper.unacked_bytes(),
            bytes_sent: shipper.bytes_sent,
            updates_sent: shipper.updates_sent,
            waiting_since: shipper.waiting_since,
        })
    }

    /// The epoch last captured.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// This life of the region.
    pub fn generation(&self) -> Generation {
        self.shared.generation
    }

    /// The handle that frames name the region by.
    pub fn handle(&self) -> u32 {
        self.shared.handle
    }

    fn make_room(&mut self) -> Result<(), SubscribeError> {
        if (self.shippers.len() as u64) < MAX_REPLICAS {
            return Ok(());
        }
        let gone = self.shippers.iter();
        let oldest = gone
            .filter_map(|(id, shipper)| Some((shipper.gone_since?, *id)))
            .min()
            .ok_or(SubscribeError::TooMany)?;
        self.shippers.remove(&oldest.1);
        Ok(())
    }
}
