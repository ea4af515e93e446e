//! This node as a replica: frames of the source become epochs that readers see.
//!
//! ```text
//!   frame -> Applier -> job -> (readers' holds) -> busy, bytes, epoch -> ack
//!                        one at a time; its connection is not read meanwhile
//! ```
//!
//! I1. The epoch's version word is odd from before the first byte of an update is
//!     written until after the last; in place over several frames, all that time.
//! I2. A job that was begun is ended, even if its source is lost: half an update is
//!     never left where a whole one was.
//! I3. Updates are applied in the order they came in, also over a reconnect: a new
//!     connection is not read before the job of the one before has ended.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::Engine;
use super::exports;
use super::held::save_pages;
use super::keys::Key;
use super::peers::{PING, Phase, Side};
use super::regions::{Body, Reader, RegionEntry};
use super::requests::chain;
use super::timers::Timer;
use crate::checksum::{Digest, digest, digest_of_zeros};
use crate::limits;
use crate::replicate::{
    Applied, Applier, ApplyJob, CaptureInfo, ReplicaState, ShipperId, Spare, Update,
};
use crate::shm::OwnedMemory;
use crate::sys::buffer::Buffer;
use crate::track::{ExtentSet, Twin};
use crate::units::{page_of, pages_for};
use crate::wire::control::AppliedStatus;
use crate::wire::follow::FollowSpec;
use crate::wire::{ErrorCode, Header, Hello, Kind, RegionInfo, SyncPlan, WireError};

/// How often a reader's hold is looked at while an update waits for it.
const HOLD_LOOK: Duration = Duration::from_micros(250);
/// Longest time that one update waits for holds.
const HOLD_MAX: Duration = Duration::from_millis(limits::HOLD_MAX_MS);
/// Bytes written between two looks at the clock.
const APPLY_STEP: u64 = 256 * 1024;

/// A copy that follows a region of another node.
pub(super) struct Replica {
    pub(super) spec: FollowSpec,
    pub(super) memory: OwnedMemory,
    pub(super) applier: Applier,
    pub(super) peer: Option<Key>,
    /// Its number at the source: no other replica of this node has the same.
    pub(super) subscription: u32,
    pub(super) attempts: u32,
    /// When the source is dialled next; a timer that comes before it does nothing.
    pub(super) dial_at: Option<Instant>,
    /// Whether the source has told the region's size.
    pub(super) known: bool,
    job: Option<Job>,
    /// Whether the version word says busy.
    busy: bool,
    /// What went in place and is not yet an epoch.
    placed: Option<ExtentSet>,
    counts: AppliedStatus,
}

struct Job {
    apply: ApplyJob,
    in_place: bool,
    begun: bool,
    /// When it was first put off for a reader's hold.
    held_since: Option<Instant>,
    extents: ExtentSet,
}

impl Replica {
    pub(super) fn new(
        spec: FollowSpec,
        subscription: u32,
        memory: OwnedMemory,
        size: u64,
        budget: u64,
    ) -> Self {
        Self {
            spec,
            memory,
            applier: Applier::new(size, budget),
            peer: None,
            subscription,
            dial_at: None,
            attempts: 0,
            known: false,
            job: None,
            busy: false,
            placed: None,
            counts: AppliedStatus::default(),
        }
    }

    /// The word for `status`.
    pub(super) fn state(&self) -> &'static str {
        match self.applier.state() {
            _ if !self.known || self.peer.is_none() => "connecting",
            ReplicaState::Fresh => "syncing",
            state => state.as_str(),
        }
    }

    pub(super) fn counts(&self) -> AppliedStatus {
        AppliedStatus {
            dropped: self.applier.dropped_updates(),
            ..self.counts
        }
    }

    fn start(&mut self, update: Update, in_place: bool) {
        let size = self.applier.size();
        let ranges = update
            .extents()
            .map(|e| e.offset..e.offset + e.bytes.len() as u64);
        let extents = set_of(size, ranges);
        let apply = ApplyJob::new(update);
        self.job = Some(Job {
            apply,
            in_place,
            begun: false,
            held_since: None,
            extents,
        });
    }
}

impl Engine {
    pub(super) fn welcome_came(
        &mut self,
        key: Key,
        header: &Header,
        body: &[u8],
    ) -> Result<(), WireError> {
        let hello = Hello::decode(header, body)?;
        let Some(peer) = self.peers.get_mut(key) else {
            return Ok(());
        };
        let Side::Replica(region) = peer.side else {
            return Ok(());
        };
        peer.phase = Phase::Open;
        peer.hello = Some(hello);
        self.timers.set(self.now + PING, Timer::Peer(key));
        if let Some(RegionEntry {
            body: Body::Replica(replica),
            ..
        }) = self.regions.get(region)
        {
            // What an earlier connection brought goes first (I2, I3).
            peer.paused = replica.job.is_some();
            let subscribe = replica
                .applier
                .subscribe(replica.spec.region.clone(), replica.subscription);
            self.send(key, subscribe.encode());
        }
        Ok(())
    }

    /// A frame of the node that this one follows.
    pub(super) fn source_frame(&mut self, key: Key, region: Key, header: Header, body: Buffer) {
        let result = match header.kind {
            Kind::RegionInfo => RegionInfo::decode(&header, &body)
                .map_err(|error| chain(&error))
                .and_then(|info| self.info_came(key, region, &info)),
            _ => self.update_came(key, region, &header, body),
        };
        if let Err(reason) = result {
            self.refuse_peer(key, ErrorCode::Protocol, 0, &reason);
            return;
        }
        self.poll_applier(region);
    }

    fn info_came(&mut self, key: Key, region: Key, info: &RegionInfo) -> Result<(), String> {
        let differs = match self.regions.get(region) {
            Some(
                entry @ RegionEntry {
                    body: Body::Replica(replica),
                    ..
                },
            ) if replica.known && entry.grows_to(replica, info) => false,
            Some(
                entry @ RegionEntry {
                    body: Body::Replica(replica),
                    ..
                },
            ) => {
                let had = (replica.applier.size(), entry.max_size);
                !replica.known || had != (info.size, info.max_size)
            }
            _ => return Ok(()),
        };
        if differs {
            self.reshape(region, (info.size, info.max_size), key)?;
        }
        let now = self.now;
        let Some(entry) = self.regions.get_mut(region) else {
            return Ok(());
        };
        let Body::Replica(replica) = &mut entry.body else {
            return Ok(());
        };
        // Readers hear of it with the update that brings it.
        let grown = replica.memory.grow(info.size);
        grown.map_err(|error| chain(&error))?;
        replica
            .applier
            .handle_info(now, info)
            .map_err(|error| chain(&error))?;
        replica.attempts = 0;
        if info.plan == SyncPlan::Grow {
            tracing::debug!(region = %entry.name, size = info.size, "the source's region grows");
        } else {
            tracing::info!(region = %entry.name, plan = ?info.plan, size = info.size, "following");
        }
        self.make_runnable(region);
        Ok(())
    }

    /// Gives the replica memory of another size; whoever reads the old one has to join again.
    fn reshape(
        &mut self,
        region: Key,
        (size, max_size): (u64, u64),
        peer: Key,
    ) -> Result<(), String> {
        if size == 0 {
            return Err("the source's region has no bytes".to_owned());
        }
        let Some(entry) = self.regions.get(region) else {
            return Ok(());
        };
        let Body::Replica(replica) = &entry.body else {
            return Ok(());
        };
        let (name, spec, uid) = (entry.name.clone(), replica.spec.clone(), entry.owner_uid);
        let subscription = replica.subscription;
        let mut fresh = self
            .replica_entry(name, spec, uid, (size, max_size))
            .map_err(|refusal| refusal.message)?;
        if let Body::Replica(replica) = &mut fresh.body {
            replica.known = true;
            replica.peer = Some(peer);
            replica.subscription = subscription;
        }
        let Some(entry) = self.regions.get_mut(region) else {
            return Ok(());
        };
        fresh.queued = entry.queued;
        fresh.timer = entry.timer;
        let old = std::mem::replace(entry, fresh);
        old.control.retire();
        for follower in old.followers {
            self.close_peer(follower.peer, "the region has another size now");
        }
        Ok(())
    }

    fn update_came(
        &mut self,
        key: Key,
        region: Key,
        header: &Header,
        body: Buffer,
    ) -> Result<(), String> {
        let now = self.now;
        let Some(entry) = self.regions.get_mut(region) else {
            return Ok(());
        };
        let Body::Replica(replica) = &mut entry.body else {
            return Ok(());
        };
        let applied = replica.applier.handle_frame(now, header, body);
        match applied.map_err(|error| chain(&error))? {
            Applied::Staged => return Ok(()),
            Applied::Ignored => {
                replica.counts.ignored += 1;
                return Ok(());
            }
            Applied::Dropped(reason) => {
                tracing::warn!(region = %entry.name, ?reason, epoch = header.epoch, "update dropped");
                replica.counts.resyncs += 1;
                return Ok(());
            }
            Applied::Apply(update) => replica.start(update, false),
            Applied::InPlace(update) => replica.start(update, true),
        }
        if let Some(peer) = self.peers.get_mut(key) {
            peer.paused = true;
        }
        self.work_on_apply(region);
        Ok(())
    }

    /// Sends what the applier has to say and plans when it has to be asked again.
    fn poll_applier(&mut self, region: Key) {
        let now = self.now;
        let Some(entry) = self.regions.get_mut(region) else {
            return;
        };
        let Body::Replica(replica) = &mut entry.body else {
            return;
        };
        let Some(peer) = replica.peer else { return };
        let frames: Vec<_> = std::iter::from_fn(|| replica.applier.poll(now)).collect();
        let deadline = replica.applier.next_deadline();
        for frame in frames {
            self.send(peer, frame);
        }
        if let Some(at) = deadline {
            // A deadline that has passed was acted upon just now.
            self.set_timer(region, at.max(now + Duration::from_millis(1)));
        }
    }

    /// One slice of a replica's work: its update, or digests that the source wants.
    pub(super) fn work_on_apply(&mut self, region: Key) {
        let end = Instant::now() + Duration::from_micros(limits::WORK_STEP_US);
        let Some(entry) = self.regions.get_mut(region) else {
            return;
        };
        if !entry.has_job() {
            // A source that is slow to take digests gets them as it takes them.
            let peer = entry.source_peer().and_then(|peer| self.peers.get(peer));
            let room = peer.is_some_and(|peer| peer.outbox.has_room());
            if room && entry.digest_until(end) {
                self.make_runnable(region);
            }
            self.poll_applier(region);
            return;
        }
        if entry.is_held(self.now) {
            self.set_timer(region, self.now + HOLD_LOOK);
            return;
        }
        match entry.apply_until(end) {
            Turn::More => self.make_runnable(region),
            Turn::Placed => self.unpause(region),
            Turn::Shown => {
                self.pump_followers(region);
                self.unpause(region);
            }
        }
    }

    /// Lets the connection that waited for the job go on.
    fn unpause(&mut self, region: Key) {
        if let Some(RegionEntry {
            body: Body::Replica(replica),
            ..
        }) = self.regions.get_mut(region)
        {
            // It was this node that did not read meanwhile.
            replica.applier.note_progress(self.now);
        }
        self.poll_applier(region);
        let Some(RegionEntry {
            body: Body::Replica(replica),
            ..
        }) = self.regions.get(region)
        else {
            return;
        };
        if let Some(key) = replica.peer
            && let Some(peer) = self.peers.get_mut(key)
        {
            peer.paused = false;
            self.resumed.push(key);
        }
    }

    /// Goes on with connections whose job is complete, or whose frames waited.
    pub(super) fn resume_peers(&mut self) {
        for key in std::mem::take(&mut self.resumed) {
            self.take_frames(key);
            self.receive(key);
        }
    }

    /// The source takes more digests.
    pub(super) fn room_for_digests(&mut self, region: Key) {
        if let Some(RegionEntry {
            body: Body::Replica(replica),
            ..
        }) = self.regions.get(region)
            && replica.applier.wants_digest().is_some()
        {
            self.make_runnable(region);
        }
    }

    /// A part of a frame came: the source is alive, however slow.
    pub(super) fn note_progress(&mut self, key: Key) {
        if let Some(peer) = self.peers.get(key)
            && let Side::Replica(region) = peer.side
            && peer.reader.inside_body()
            && let Some(RegionEntry {
                body: Body::Replica(replica),
                ..
            }) = self.regions.get_mut(region)
        {
            replica.applier.note_progress(self.now);
        }
    }

    /// The body of a frame of an update is damaged; false if no update was.
    pub(super) fn update_damaged(&mut self, region: Key, header: &Header) -> bool {
        let Some(entry) = self.regions.get_mut(region) else {
            return false;
        };
        let Body::Replica(replica) = &mut entry.body else {
            return false;
        };
        if !replica.applier.handle_damaged(header) {
            return false;
        }
        tracing::warn!(region = %entry.name, epoch = header.epoch, "update damaged on its way");
        replica.counts.resyncs += 1;
        self.poll_applier(region);
        true
    }

    /// The connection of a replica is gone: another one is planned.
    pub(super) fn source_lost(&mut self, region: Key, peer: Key) {
        let Some(entry) = self.regions.get_mut(region) else {
            return;
        };
        let Body::Replica(replica) = &mut entry.body else {
            return;
        };
        if replica.peer != Some(peer) {
            return;
        }
        replica.peer = None;
        replica.applier.disconnected();
        self.dial_later(region, "connection lost");
    }
}

/// The set of ranges that are sorted and disjoint, but may touch.
fn set_of(size: u64, ranges: impl Iterator<Item = Range<u64>>) -> ExtentSet {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    let mut set = ExtentSet::new(size);
    set.extend_sorted(&joined);
    set
}

/// Digest of a part of a memfd. A hole is not read: that would allocate it.
fn digest_of_memory(memory: &[u8], fd: &OwnedFd, range: Range<u64>) -> Digest {
    match crate::sys::memfd::next_data(fd, range.start) {
        Ok(data) if data.as_ref().is_none_or(|data| data.start >= range.end) => {
            digest_of_zeros(range.end - range.start)
        }
        _ => digest(&memory[range.start as usize..range.end as usize]),
    }
}

/// The same of a twin, whose untouched pages are zero.
fn digest_of_twin(twin: &Twin, range: Range<u64>) -> Digest {
    let pages = page_of(range.start)..pages_for(range.end);
    match twin.touched().next_in(pages) {
        Some(_) => digest(&twin[range.start as usize..range.end as usize]),
        None => digest_of_zeros(range.end - range.start),
    }
}

/// What one slice of an apply came to.
enum Turn {
    More,
    Placed,
    Shown,
}

impl RegionEntry {
    /// Whether what the source tells is the same life, grown as it said it might.
    fn grows_to(&self, replica: &Replica, info: &RegionInfo) -> bool {
        info.generation == replica.applier.generation()
            && info.max_size == self.max_size
            && info.size >= replica.applier.size()
    }

    /// The connection to a replica's source.
    fn source_peer(&self) -> Option<Key> {
        match &self.body {
            Body::Replica(replica) => replica.peer,
            _ => None,
        }
    }

    fn has_job(&self) -> bool {
        matches!(&self.body, Body::Replica(replica) if replica.job.is_some())
    }

    /// Whether an update that was not begun has to wait for a reader's hold.
    fn is_held(&mut self, now: Instant) -> bool {
        let Body::Replica(replica) = &mut self.body else {
            return false;
        };
        let Some(job) = replica
            .job
            .as_mut()
            .filter(|job| !job.begun && !replica.busy)
        else {
            return false;
        };
        let mut held = false;
        // Every reader is looked at: a hold that came down has to be seen.
        for reader in &mut self.readers {
            held |= reader.holds(now);
        }
        if held && job.held_since.is_none() {
            job.held_since = Some(now);
            replica.counts.held += 1;
        }
        // However readers take turns, or play with their words, the update waits once.
        let waited = job.held_since.map_or(Duration::ZERO, |since| now - since);
        held && waited < HOLD_MAX
    }

    /// Computes digests that the source asked for; true if more are wanted.
    fn digest_until(&mut self, end: Instant) -> bool {
        let Body::Replica(replica) = &mut self.body else {
            return false;
        };
        while let Some((chunk, range)) = replica.applier.wants_digest() {
            let digest = digest_of_memory(&replica.memory, &self.data_fd, range);
            replica.applier.push_digest(chunk, digest);
            if Instant::now() >= end {
                return true;
            }
        }
        false
    }

    fn apply_until(&mut self, end: Instant) -> Turn {
        let Body::Replica(replica) = &mut self.body else {
            return Turn::Placed;
        };
        let Some(job) = &mut replica.job else {
            return Turn::Placed;
        };
        if !job.begun {
            job.begun = true;
            self.publication.set_busy(true);
            if !replica.busy {
                replica.busy = true;
                self.control.publish_begin();
                if job.in_place {
                    // Nobody waits for the end of what may take minutes.
                    self.control.set_syncing(true);
                }
            }
            let pre = self.publication.pre_images();
            for range in job.extents.ranges() {
                save_pages(pre, &replica.memory, range);
            }
        }
        while !job.apply.step(&mut replica.memory, APPLY_STEP) {
            if Instant::now() >= end {
                return Turn::More;
            }
        }
        self.end_job()
    }

    fn end_job(&mut self) -> Turn {
        let Body::Replica(replica) = &mut self.body else {
            return Turn::Placed;
        };
        let Some(job) = replica.job.take() else {
            return Turn::Placed;
        };
        let update = job.apply.update();
        self.statistics.bytes_changed += update.data_bytes;
        let mut extents = job.extents;
        if let Some(mut placed) = replica.placed.take() {
            placed.grow(extents.size());
            extents.union(&placed);
        }
        let (epoch, kind, source_time_ns) = (update.epoch, update.kind, update.source_time_ns);
        // Pieces count too: the applier acknowledges once all handed out are applied.
        replica.applier.applied(epoch);
        if job.in_place {
            self.control.set_syncing(true);
            replica.placed = Some(extents);
            return Turn::Placed;
        }
        replica.counts.applied += 1;
        let generation = replica.applier.generation();
        // Followers of this replica take epochs on as they are; another life, or the
        // same epoch made whole again, is compared with what they have.
        let goes_on = generation == self.generation && epoch > self.publication.epoch();
        if generation != self.generation {
            self.generation = generation;
            self.control.set_generation(generation);
        }
        self.size = extents.size();
        self.control.set_size(self.size);
        self.publication.grow(self.size);
        self.epoch = epoch;
        self.kind = kind;
        replica.busy = false;
        self.control.set_syncing(false);
        match goes_on {
            true => exports::note(&self.changes, epoch, &extents),
            false => {
                let sizes = (self.size, self.max_size);
                exports::renew(&mut self.changes, (generation, epoch), sizes);
            }
        }
        let watched = !self.readers.is_empty();
        self.control.publish(epoch, kind, source_time_ns, watched);
        if watched {
            // A reader that was woken goes before the ack, which takes as long as its wake-up.
            std::thread::yield_now();
        }
        self.publication.set_busy(false);
        let info = CaptureInfo {
            epoch,
            kind,
            source_time_ns,
        };
        if goes_on {
            let content = &replica.memory[..self.size as usize];
            self.publication.captured(info, &extents, content);
        } else {
            self.publication.restart(generation, epoch);
        }
        Turn::Shown
    }

    /// Whether other nodes may follow it now.
    pub(super) fn is_followable(&self) -> bool {
        let known = match &self.body {
            Body::Replica(replica) => replica.known,
            _ => true,
        };
        self.shared && known
    }
}

impl Reader {
    /// Whether its hold is up and has time left.
    fn holds(&mut self, now: Instant) -> bool {
        if !self.hold.is_raised() {
            self.held_since = None;
            return false;
        }
        let since = *self.held_since.get_or_insert(now);
        now - since < HOLD_MAX
    }
}

impl RegionEntry {
    /// Where content is not zero, as far as is known without reading it.
    pub(super) fn present(&self) -> ExtentSet {
        match &self.body {
            Body::Tracked(tracked) => tracked.present(),
            Body::Held(_) | Body::Replica(_) => self.data_ranges(),
        }
    }

    fn data_ranges(&self) -> ExtentSet {
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < self.size && ranges.len() < limits::MAX_PENDING_EXTENTS as usize {
            match crate::sys::memfd::next_data(&self.data_fd, at) {
                Ok(Some(range)) => {
                    ranges.push(range.start..range.end.min(self.size));
                    at = range.end;
                }
                Ok(None) => return set_of(self.size, ranges.into_iter()),
                Err(error) => {
                    tracing::debug!(%error, "holes are not told; everything counts as content");
                    return ExtentSet::all(self.size);
                }
            }
        }
        if at < self.size {
            ExtentSet::all(self.size)
        } else {
            set_of(self.size, ranges.into_iter())
        }
    }

    /// Compares up to `chunks` chunks with one follower's; true when done for now.
    pub(super) fn digest_step(&mut self, shipper: ShipperId, chunks: u64) -> bool {
        let (body, data_fd) = (&self.body, &self.data_fd);
        let mut ours = |range: Range<u64>| match body {
            Body::Tracked(tracked) => digest_of_twin(&tracked.twin, range),
            Body::Held(memory) => digest_of_memory(memory, data_fd, range),
            Body::Replica(replica) => digest_of_memory(&replica.memory, data_fd, range),
        };
        self.publication
            .digest_step_with(shipper, chunks, &mut ours)
    }

    /// The next frame for one follower.
    pub(super) fn poll_frame(
        &mut self,
        shipper: ShipperId,
        now: Instant,
        spare: &mut Spare,
    ) -> Option<crate::replicate::Out> {
        let (content, coming): (&[u8], _) = match &self.body {
            Body::Tracked(tracked) => (&tracked.twin, tracked.coming(self.epoch)),
            Body::Held(memory) => (memory, None),
            Body::Replica(replica) => (&replica.memory, None),
        };
        self.publication
            .poll_coming(shipper, now, (content, coming), spare)
    }

    /// Whether a capture is shipped while it goes on.
    pub(super) fn is_coming(&self) -> bool {
        matches!(&self.body, Body::Tracked(tracked) if tracked.coming(self.epoch).is_some())
    }
}
