//! A channel's memory as a checked object: made by one side, opened by the other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::layout::{
    Features, Geometry, LAYOUT_VERSION, MAGIC, METADATA, OIEB_VERSION, control, control_offset,
    line, oieb, presence, server_counter,
};
use super::memory::{BufferConfig, InRegion, MemoryProvider, SharedMemory, Window};
use super::state::Side;
use super::waiting::Semaphore;
use super::{BadSegment, DuplexError, completion, event, sys};
use crate::limits::{MAX_CHANNEL_METADATA, MAX_CHANNEL_PAYLOAD};
use crate::shm::{self, Lines};
use crate::sys::futex;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::sys::process::process_id;
use crate::units::{MIB, checked_range};
use crate::words::Generation;

/// Random id of one channel's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChannelId(pub [u8; 16]);

impl std::fmt::Display for ChannelId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// What whoever opens memory accepts.
#[derive(Clone, Copy, Debug)]
pub struct OpenLimits {
    /// Longest memory, all descriptors together, in bytes.
    pub max_bytes: u64,
    /// Whether memory with failpoints is taken, by which the peer can stop this side
    /// for ever; for tests.
    pub failpoints: bool,
}

impl Default for OpenLimits {
    fn default() -> OpenLimits {
        OpenLimits {
            max_bytes: MAX_CHANNEL_PAYLOAD + 4 * MIB,
            failpoints: false,
        }
    }
}

/// Whether a side is there, by its liveness word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Nobody has come, or who was there left in order.
    Absent,
    /// A thread holds the word.
    Alive,
    /// Who held the word died.
    Died,
}

/// A look at a channel, each number as it stands in the control block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelStatus {
    /// Id of the memory.
    pub id: ChannelId,
    /// Servers that have served it.
    pub generation: u64,
    /// Where everything lies.
    pub geometry: Geometry,
    /// Whether the client lives.
    pub client: Presence,
    /// Whether the server lives.
    pub server: Presence,
    /// Requests written.
    pub requests: u64,
    /// Requests taken by the server.
    pub requests_read: u64,
    /// Responses written, failed ones included.
    pub responses: u64,
    /// Responses read by the client.
    pub responses_read: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Bytes of payload in no frame.
    pub free_bytes: u64,
    /// Bytes that the memory takes, all descriptors together.
    pub resident_bytes: u64,
}

/// One stop in [`Segment::signs`], above a bit for each side.
const ONE_STOP: u32 = 1 << 2;

/// The memory of one channel: mapped, with a geometry that was checked. Clones
/// share it.
#[derive(Clone, Debug)]
pub struct Segment(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    geometry: Geometry,
    id: ChannelId,
    /// All of the first descriptor.
    memory: shm::SharedMemory,
    /// The control block up to the ring.
    lines: Lines,
    ring: Lines,
    wishes: Lines,
    slots: Lines,
    payload: Window,
    fds: Vec<OwnedFd>,
    /// On the server's side: the region that the payload is a part of.
    region: Option<InRegion>,
    /// What this process knows from elsewhere, which no peer can take back: sides that are
    /// dead, as bits, and above them the number of times that a side of it stopped.
    signs: AtomicU32,
}

impl Segment {
    /// Makes the memory of a new channel, of generation 1.
    ///
    /// # Errors
    /// [`DuplexError::Bad`] for impossible numbers; [`DuplexError::Sys`].
    pub fn create(config: &BufferConfig) -> Result<Segment, DuplexError> {
        Segment::create_for(config, Features::all())
    }

    /// The same for a peer that knows no more than `known`: of [`Features::OPTIONAL`] the
    /// memory has what both know.
    ///
    /// # Errors
    /// As [`Segment::create`].
    pub fn create_for(config: &BufferConfig, known: Features) -> Result<Segment, DuplexError> {
        let mut features = Features::OPTIONAL & known;
        features.set(Features::VIEW, config.view.is_some());
        features.set(Features::FAILPOINTS, config.failpoints);
        let view_offset = config.view.as_ref().map_or(0, |view| view.offset());
        let geometry = Geometry::new(
            config.slots,
            config.metadata_size,
            config.payload_size,
            features,
            view_offset,
        )?;
        let mut own = SharedMemory::new();
        own.allocate(geometry.total)?;
        let payload = match &config.view {
            None => own.map(geometry.payload_offset, geometry.payload_size)?,
            Some(view) => view.map(0, geometry.payload_size)?,
        };
        let memory = own.map(0, geometry.total)?.memory().0.clone();
        let mut fds = vec![own.into_fd()?];
        if let Some(view) = &config.view {
            fds.push(view.clone_fd()?);
        }
        let id = ChannelId(Generation::random().0.to_be_bytes());
        let region = config.view.as_ref().and_then(|view| view.region());
        let segment = Segment::assemble(geometry, id, memory, payload, fds, region.cloned())?;
        segment.init_oiebs();
        segment.write_identity();
        Ok(segment)
    }

    /// Opens memory that a peer passed, which may be anything.
    ///
    /// # Errors
    /// [`DuplexError::Bad`] with what is wrong with it; [`DuplexError::Sys`].
    pub fn open(fds: Vec<OwnedFd>, limits: OpenLimits) -> Result<Segment, DuplexError> {
        let action = sys("opening a channel's memory");
        let Some(first) = fds.first() else {
            return Err(BadSegment::Descriptors {
                found: 0,
                expected: 1,
            }
            .into());
        };
        let mut found = 0u64;
        for fd in &fds {
            // What is no memory file has no seals.
            let seals = memfd::seals(fd).unwrap_or(Seals::empty());
            if !seals.contains(Seals::SHRINK | Seals::GROW) {
                return Err(BadSegment::Unsealed.into());
            }
            found = found.saturating_add(memfd::size(fd).map_err(&action)?);
        }
        if found > limits.max_bytes {
            return Err(BadSegment::TooLong {
                found,
                limit: limits.max_bytes,
            }
            .into());
        }
        let size = memfd::size(first).map_err(&action)?;
        let smallest = Geometry::new(8, 0, 0, Features::empty(), 0)?.total;
        if size < smallest {
            return Err(BadSegment::Length {
                found: size,
                expected: smallest,
            }
            .into());
        }
        let mapping = Mapping::shared(first, size, Access::ReadWrite).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        let memory = shm::SharedMemory::new(mapping);
        let (geometry, id) = read_identity(&memory)?;
        if geometry.features.contains(Features::FAILPOINTS) && !limits.failpoints {
            let bits = Features::FAILPOINTS.bits();
            return Err(BadSegment::Features { bits }.into());
        }
        if size != geometry.total {
            return Err(BadSegment::Length {
                found: size,
                expected: geometry.total,
            }
            .into());
        }
        let payload = open_payload(&fds, &memory, &geometry)?;
        Segment::assemble(geometry, id, memory, payload, fds, None)
    }

    /// Memory just opened, of a client that comes to the server with this configuration:
    /// if that has a region, the payload has to be the same part of it, and its changes
    /// are marked from now on.
    ///
    /// # Errors
    /// [`DuplexError::OtherRegion`]; [`DuplexError::Sys`].
    pub fn served_as(mut self, config: &BufferConfig) -> Result<Segment, DuplexError> {
        let Some(view) = &config.view else {
            return Ok(self);
        };
        let Some(region) = view.region() else {
            return Ok(self);
        };
        let geometry = *self.geometry();
        let place = (geometry.payload_offset, geometry.payload_size);
        let is_view = geometry.features.contains(Features::VIEW);
        let Some(inner) = Arc::get_mut(&mut self.0).filter(|_| is_view) else {
            return Err(DuplexError::OtherRegion);
        };
        let data = region.region.data_fd();
        let is_same = match inner.fds.get(1) {
            Some(fd) => memfd::is_same(fd, data).map_err(sys("comparing a payload's memory"))?,
            None => false,
        };
        if !is_same || place != (view.offset(), config.payload_size) {
            return Err(DuplexError::OtherRegion);
        }
        inner.region = Some(region.clone());
        Ok(self)
    }

    /// Whether changes of the payload have to be marked.
    pub(super) fn is_marked(&self) -> bool {
        self.0.region.is_some()
    }

    /// Says that bytes of the payload were changed; nothing if it is in no region.
    pub(super) fn mark(&self, range: std::ops::Range<u64>) {
        let Some(InRegion { region, offset }) = &self.0.region else {
            return;
        };
        let len = range.end.saturating_sub(range.start);
        // Within the payload, and that within the region: never refused.
        let _ = region.mark_region_changed(offset.saturating_add(range.start), len);
    }

    fn assemble(
        geometry: Geometry,
        id: ChannelId,
        memory: shm::SharedMemory,
        payload: Window,
        fds: Vec<OwnedFd>,
        region: Option<InRegion>,
    ) -> Result<Segment, DuplexError> {
        let ring_words = completion::places(geometry.slots) as usize;
        let lines = Lines::new(&memory, geometry.control, line::COUNT)?;
        let ring = Lines::new(&memory, geometry.ring, ring_words.div_ceil(16))?;
        let wish_lines = (geometry.slots as usize).div_ceil(16);
        let wishes = Lines::new(&memory, geometry.wishes, wish_lines)?;
        let slots = Lines::new(&memory, geometry.table, geometry.slots as usize)?;
        Ok(Segment(Arc::new(Inner {
            geometry,
            id,
            memory,
            lines,
            ring,
            wishes,
            slots,
            payload,
            fds,
            region,
            signs: AtomicU32::new(0),
        })))
    }

    /// The descriptors to pass to the other side.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.0.fds.iter().map(|fd| fd.as_fd()).collect()
    }

    /// Where everything lies.
    pub fn geometry(&self) -> &Geometry {
        &self.0.geometry
    }

    /// Id of this memory.
    pub fn channel_id(&self) -> ChannelId {
        self.0.id
    }

    /// Servers that have served this memory, the present one included; 1 for a new
    /// one. As the peer stores it.
    pub fn generation(&self) -> u64 {
        self.generation_word().load(Ordering::Acquire)
    }

    /// A new server begins: raises the generation, never to 0, and forgets waiters of the
    /// old one.
    pub fn raise_generation(&self) -> u64 {
        for index in [line::REQUEST_READY, line::RESPONSE_CONSUMED] {
            event::forget_waiters(&self.lines().line(index).0[0]);
        }
        let raised = |found: u64| Some(found.wrapping_add(1).max(1));
        // The closure always answers something.
        let found =
            self.generation_word()
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, raised);
        found.map_or(1, |found| found.wrapping_add(1).max(1))
    }

    /// Whether both sides stop at failpoints.
    pub fn has_failpoints(&self) -> bool {
        self.geometry().features.contains(Features::FAILPOINTS)
    }

    /// Sets the metadata of `side`, once.
    ///
    /// # Errors
    /// [`DuplexError::MetadataTwice`], [`DuplexError::MetadataTooLong`].
    pub fn set_metadata(&self, side: Side, bytes: &[u8]) -> Result<(), DuplexError> {
        let (len, capacity) = (bytes.len() as u64, self.geometry().metadata_capacity());
        if len > capacity {
            return Err(DuplexError::MetadataTooLong { len, capacity });
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let at = self.metadata_offset(side);
        let length = self.control().atomic_u64(at);
        if length.load(Ordering::Relaxed) != 0 {
            return Err(DuplexError::MetadataTwice);
        }
        self.control().write(at + 8, bytes)?;
        // SYNC(metadata): publishes the bytes; pairs with the load in `metadata`.
        length.store(len, Ordering::Release);
        self.mirror_metadata(side, len + 8);
        Ok(())
    }

    /// The metadata of `side`; empty if it set none yet.
    ///
    /// # Errors
    /// [`DuplexError::MetadataCorrupted`] if its length is impossible.
    pub fn metadata(&self, side: Side) -> Result<Vec<u8>, DuplexError> {
        let capacity = self.geometry().metadata_capacity();
        if capacity == 0 {
            return Ok(Vec::new());
        }
        let at = self.metadata_offset(side);
        // SYNC(metadata): pairs with the store in `set_metadata`.
        let len = self.control().atomic_u64(at).load(Ordering::Acquire);
        if checked_range(0, len, capacity).is_err() {
            return Err(DuplexError::MetadataCorrupted { len, capacity });
        }
        let mut out = vec![0; len as usize];
        self.control().read(at + 8, &mut out)?;
        Ok(out)
    }

    /// The liveness word of `side`: for [`futex::Lifeline::hold`], the mapping and the offset.
    pub fn lifeline_place(&self, side: Side) -> (Arc<Mapping>, u64) {
        let offset = self.presence_offset(side) + presence::ROBUST;
        (self.control().mapping().clone(), offset)
    }

    /// The liveness word of `side`, a futex word.
    pub fn lifeline_word(&self, side: Side) -> &AtomicU32 {
        let offset = self.presence_offset(side) + presence::ROBUST;
        self.control().atomic_u32(offset)
    }

    /// Says, for this process, whether `side` is known to be dead by another sign than
    /// its word: a connection that hung up, a pidfd. Who waits for it is woken.
    pub fn set_lost(&self, side: Side, lost: bool) {
        let bit = 1 << side as u32;
        if lost {
            // SYNC(signs): pairs with the load in `signs`.
            self.0.signs.fetch_or(bit, Ordering::Release);
            self.wake_own();
            self.ring_all(Semaphore::RequestReady);
            self.ring_all(Semaphore::ResponseReady);
            self.ring_all(Semaphore::SpaceAvailable);
        } else {
            self.0.signs.fetch_and(!bit, Ordering::Release);
        }
    }

    /// What this process knows of the channel from elsewhere: a number that changes with
    /// each [`Segment::set_lost`] and [`Segment::stop`], and the futex word that it is.
    /// Who sleeps on it too is woken by those whatever the peer does to the event counts.
    pub fn signs(&self) -> (u32, &AtomicU32) {
        let word = &self.0.signs;
        // SYNC(signs): pairs with the stores in `set_lost` and `stop`.
        (word.load(Ordering::Acquire), word)
    }

    /// Whether a side of this process has stopped the channel, which no peer can take back.
    pub fn has_stopped_here(&self) -> bool {
        self.signs().0 >= ONE_STOP
    }

    fn wake_own(&self) {
        // Refused only for an address that is not mapped.
        let _ = futex::wake(&self.0.signs, u32::MAX);
    }

    /// Whether `side` is there.
    pub fn presence(&self, side: Side) -> Presence {
        if self.signs().0 & 1 << side as u32 != 0 {
            return Presence::Died;
        }
        match self.lifeline_word(side).load(Ordering::Acquire) {
            word if futex::is_held(word) => Presence::Alive,
            word if word & futex::OWNER_DIED != 0 => Presence::Died,
            _ => Presence::Absent,
        }
    }

    /// The thread that holds the liveness word of `side`; 0 = none.
    pub fn holder(&self, side: Side) -> u32 {
        self.lifeline_word(side).load(Ordering::Relaxed) & futex::TID_MASK
    }

    /// Says that `side` died, for who knows it otherwise than by its word: its
    /// connection has ended. A word that nobody holds, since `side` never did or has given
    /// it back, says so too. Nothing changes where another one than `holder` holds the
    /// word: it came meanwhile.
    pub fn mark_died(&self, side: Side, holder: u32) {
        let word = self.lifeline_word(side);
        let died = |found| {
            let its_own = match futex::is_held(found) {
                true => found & futex::TID_MASK == holder,
                // Who stopped in order left in order.
                false => !self.is_stopped(side),
            };
            its_own.then_some(futex::OWNER_DIED | futex::WAITERS)
        };
        // SYNC(lifeline): in the place of the kernel; pairs with the loads of those who
        // ask whether it is held.
        let marked = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, died);
        if marked.is_ok() {
            // Refused only for an address that is not mapped.
            let _ = futex::wake(word, u32::MAX);
        }
    }

    /// Whether `side` came and has gone again: its word says that it died, or it gave the
    /// word back and has stopped. A side that never held its word is there until somebody
    /// marks it ([`Segment::mark_died`]).
    pub fn has_left(&self, side: Side) -> bool {
        match self.presence(side) {
            Presence::Alive => false,
            Presence::Died => true,
            Presence::Absent => self.is_stopped(side),
        }
    }

    /// Waits until the server is not there any more ([`Segment::has_left`]); false if it
    /// still is at the deadline, or when the client stops.
    pub fn wait_until_server_left(&self, deadline: std::time::Instant) -> bool {
        let side = Side::Server;
        let word = self.lifeline_word(side);
        loop {
            let (signs, own) = self.signs();
            // SYNC(lifeline): pairs with who gives the word back, or the kernel.
            let found = word.load(Ordering::Acquire);
            if self.has_left(side) {
                // The kernel wakes one waiter; each wakes the next.
                let _ = futex::wake(word, u32::MAX);
                return true;
            }
            if self.is_stopped(Side::Client) {
                return false;
            }
            match futex::wait_any(&[(word, found), (own, signs)], Some(deadline)) {
                Ok(futex::Wake::TimedOut) | Err(_) => return self.has_left(side),
                Ok(_) => {}
            }
        }
    }

    /// Notes this process as `side` of the channel.
    pub fn join(&self, side: Side) {
        self.set_pid(side, u64::from(process_id().unsigned_abs()));
        self.stop_word(side).store(0, Ordering::Release);
    }

    /// The CPU that `side` last said it runs on.
    #[inline]
    pub fn cpu(&self, side: Side) -> Option<u32> {
        self.cpu_word(side).load(Ordering::Relaxed).checked_sub(1)
    }

    /// Says that this side runs on `cpu`. Call it only when that changed: the other
    /// side keeps the line in its cache.
    pub fn publish_cpu(&self, side: Side, cpu: u32) {
        let code = cpu.wrapping_add(1);
        self.cpu_word(side).store(code, Ordering::Relaxed);
    }

    /// Whether `side` has stopped in order.
    #[inline]
    pub fn is_stopped(&self, side: Side) -> bool {
        self.stop_word(side).load(Ordering::Acquire) != 0
    }

    /// Says that `side` stops, and wakes whoever waits for it.
    pub fn stop(&self, side: Side) {
        self.stop_word(side).store(1, Ordering::Release);
        self.mirror(side);
        // SYNC(signs): pairs with the load in `signs`.
        self.0.signs.fetch_add(ONE_STOP, Ordering::Release);
        self.wake_own();
        for semaphore in [
            Semaphore::RequestReady,
            Semaphore::ResponseReady,
            Semaphore::ResponseConsumed,
            Semaphore::SpaceAvailable,
        ] {
            self.ring_all(semaphore);
        }
    }

    /// Sleeps of `side` that ended by time although the word that it slept on had
    /// changed: a lost wake-up, or a poster that was held up on its way to the kernel.
    pub fn late_wakes(&self, side: Side) -> u32 {
        self.late_word(side).load(Ordering::Relaxed)
    }

    /// Counts one; only `side` itself does.
    #[cold]
    pub fn note_late_wake(&self, side: Side) {
        self.late_word(side).fetch_add(1, Ordering::Relaxed);
    }

    /// A look at the channel.
    ///
    /// # Errors
    /// [`DuplexError::Sys`] if the kernel does not tell its size.
    pub fn status(&self) -> Result<ChannelStatus, DuplexError> {
        let counter = |index, word: usize| self.lines().line(index).0[word].load(Ordering::Relaxed);
        let mut resident_bytes = 0;
        for fd in &self.0.fds {
            resident_bytes +=
                memfd::resident_bytes(fd).map_err(sys("asking for the memory's size"))?;
        }
        Ok(ChannelStatus {
            id: self.channel_id(),
            generation: self.generation(),
            geometry: *self.geometry(),
            client: self.presence(Side::Client),
            server: self.presence(Side::Server),
            requests: counter(
                line::CLIENT_COUNTERS,
                super::layout::client_counter::WRITTEN_COUNT,
            ),
            requests_read: counter(line::SERVER_COUNTERS, server_counter::READ_COUNT),
            responses: counter(line::SERVER_COUNTERS, server_counter::WRITTEN_COUNT),
            responses_read: counter(
                line::CLIENT_COUNTERS,
                super::layout::client_counter::READ_COUNT,
            ),
            failed: counter(line::SERVER_COUNTERS, server_counter::FAILED),
            free_bytes: counter(
                line::CLIENT_COUNTERS,
                super::layout::client_counter::FREE_BYTES,
            ),
            resident_bytes,
        })
    }

    pub(super) fn control(&self) -> &shm::SharedMemory {
        &self.0.memory
    }

    pub(super) fn lines(&self) -> &Lines {
        &self.0.lines
    }

    pub(super) fn ring(&self) -> &Lines {
        &self.0.ring
    }

    /// The client's wishes: a word per slot.
    pub(super) fn wishes(&self) -> &Lines {
        &self.0.wishes
    }

    pub(super) fn slots(&self) -> &Lines {
        &self.0.slots
    }

    pub(super) fn payload(&self) -> &Window {
        &self.0.payload
    }

    pub(super) fn failpoint_words(&self) -> (&AtomicU32, &AtomicU32) {
        let at = self.geometry().control + control::FAILPOINTS;
        (
            self.control().atomic_u32(at),
            self.control().atomic_u32(at + 4),
        )
    }

    fn generation_word(&self) -> &AtomicU64 {
        let at = self.geometry().control + control::ID_GENERATION;
        self.control().atomic_u64(at)
    }

    fn metadata_offset(&self, side: Side) -> u64 {
        match side {
            Side::Client => METADATA,
            Side::Server => METADATA + self.geometry().metadata_size,
        }
    }

    fn presence_offset(&self, side: Side) -> u64 {
        let line = match side {
            Side::Client => control::CLIENT,
            Side::Server => control::SERVER,
        };
        self.geometry().control + line
    }

    fn cpu_word(&self, side: Side) -> &AtomicU32 {
        let at = self.presence_offset(side) + presence::CPU;
        self.control().atomic_u32(at)
    }

    fn stop_word(&self, side: Side) -> &AtomicU32 {
        let at = self.presence_offset(side) + presence::STOP;
        self.control().atomic_u32(at)
    }

    fn late_word(&self, side: Side) -> &AtomicU32 {
        let at = self.presence_offset(side) + presence::LATE;
        self.control().atomic_u32(at)
    }

    fn write_identity(&self) {
        let (memory, geometry) = (self.control(), self.geometry());
        let at = |offset| geometry.control + offset;
        let word = |offset, value| {
            memory
                .atomic_u64(at(offset))
                .store(value, Ordering::Relaxed)
        };
        let half = |offset, value| {
            memory
                .atomic_u32(at(offset))
                .store(value, Ordering::Relaxed)
        };
        half(control::ID_LAYOUT, LAYOUT_VERSION);
        half(control::ID_FEATURES, geometry.features.bits());
        word(control::ID_GENERATION, 1);
        half(control::ID_SLOTS, geometry.slots);
        word(control::ID_METADATA_SIZE, geometry.metadata_size);
        word(control::ID_PAYLOAD_OFFSET, geometry.payload_offset);
        word(control::ID_PAYLOAD_SIZE, geometry.payload_size);
        let [low, high] = [0, 8].map(|from| {
            let mut half = [0; 8];
            half.copy_from_slice(&self.0.id.0[from..from + 8]);
            u64::from_le_bytes(half)
        });
        word(control::ID_CHANNEL, low);
        word(control::ID_CHANNEL + 8, high);
        // SYNC(channel_magic): who sees the magic sees the identity; pairs with the
        // load in `read_identity`.
        let magic = memory.atomic_u64(at(control::ID_MAGIC));
        magic.store(MAGIC, Ordering::Release);
    }
}

/// Copies out and checks what the memory says about itself.
fn read_identity(memory: &shm::SharedMemory) -> Result<(Geometry, ChannelId), DuplexError> {
    let found = memory.load::<u64>(oieb::VERSION)?;
    agree("the OIEB's version", found, OIEB_VERSION)?;
    // The control block lies behind the metadata, whose size both tell.
    let metadata_size = memory.load::<u64>(oieb::METADATA_SIZE)?;
    if metadata_size > MAX_CHANNEL_METADATA || !metadata_size.is_multiple_of(8) {
        return Err(BadSegment::MetadataSize { metadata_size }.into());
    }
    let at = control_offset(metadata_size);
    checked_range(at, control::BYTES, memory.len())?;
    // SYNC(channel_magic): pairs with the store in `write_identity`.
    let magic = memory.atomic_u64(at).load(Ordering::Acquire);
    if magic != MAGIC {
        return Err(BadSegment::Magic { found: magic }.into());
    }
    let mut copy = [0; 128];
    memory.read(at, &mut copy)?;
    let long = |offset: u64| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&copy[offset as usize..offset as usize + 8]);
        u64::from_le_bytes(bytes)
    };
    let short = |offset: u64| (long(offset & !7) >> (8 * (offset & 7))) as u32;
    let found = short(control::ID_LAYOUT);
    if found != LAYOUT_VERSION {
        let expected = LAYOUT_VERSION;
        return Err(BadSegment::Version { found, expected }.into());
    }
    let bits = short(control::ID_FEATURES);
    let Some(features) = Features::from_bits(bits) else {
        let bits = bits & !Features::all().bits();
        return Err(BadSegment::Features { bits }.into());
    };
    let stated = long(control::ID_METADATA_SIZE);
    agree("the metadata's size", stated, metadata_size)?;
    let reserved = u64::from(short(control::ID_RESERVED));
    agree("a reserved word", reserved, 0)?;
    for offset in (control::ID_CHANNEL + 16..control::CLIENT).step_by(8) {
        agree("a reserved word", long(offset), 0)?;
    }
    let offset = long(control::ID_PAYLOAD_OFFSET);
    let geometry = Geometry::new(
        short(control::ID_SLOTS),
        metadata_size,
        long(control::ID_PAYLOAD_SIZE),
        features,
        offset,
    )?;
    if offset != geometry.payload_offset || !offset.is_multiple_of(crate::units::PAGE_SIZE) {
        return Err(BadSegment::PayloadOffset {
            found: offset,
            expected: geometry.payload_offset,
        }
        .into());
    }
    let mut id = [0; 16];
    id.copy_from_slice(&copy[control::ID_CHANNEL as usize..control::ID_CHANNEL as usize + 16]);
    Ok((geometry, ChannelId(id)))
}

fn agree(what: &'static str, found: u64, expected: u64) -> Result<(), BadSegment> {
    if found == expected {
        return Ok(());
    }
    Err(BadSegment::Disagree {
        what,
        found,
        expected,
    })
}

/// The payload's window, in the first descriptor or the second.
fn open_payload(
    fds: &[OwnedFd],
    memory: &shm::SharedMemory,
    geometry: &Geometry,
) -> Result<Window, DuplexError> {
    let is_view = geometry.features.contains(Features::VIEW);
    let expected = 1 + usize::from(is_view);
    if fds.len() != expected {
        return Err(BadSegment::Descriptors {
            found: fds.len(),
            expected,
        }
        .into());
    }
    let (offset, len) = (geometry.payload_offset, geometry.payload_size);
    if !is_view {
        return Ok(Window::new(memory.clone(), offset, len)?);
    }
    let action = sys("mapping a channel's payload");
    let size = memfd::size(&fds[1]).map_err(&action)?;
    let range = checked_range(offset, len, size)?;
    let mapping = Mapping::shared(&fds[1], range.end, Access::ReadWrite).map_err(&action)?;
    mapping.dont_fork().map_err(&action)?;
    Ok(Window::new(shm::SharedMemory::new(mapping), offset, len)?)
}
