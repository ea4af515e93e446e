//! The control page: what a region's writer, the engine and readers tell each
//! other (layout in `layout.rs`, drawn in the manual).
//!
//! | word | written by | read by |
//! |---|---|---|
//! | identity | who creates it, once | all |
//! | version, kind, time, generation, acked, answer | engine | writer, readers |
//! | commit request, guard | writer | engine |
//! | mark head, ring | writer | engine |
//! | mark tail | engine | writer |
//! | owners of slots, life of the guard word | engine | writers |
//!
//! A reader's copy of the generation is consistent by a sequence of its own; the
//! epoch's kind and time by the version, which is the data's sequence lock.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::layout::*;
use super::{RegionError, sys};
use crate::limits::{MAX_ACKED_SLOTS, MAX_NAME_BYTES, MAX_REGION_BYTES};
use crate::shm::{SharedMemory, seqlock, turns};
use crate::sys::futex;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::words::{EpochKind, Generation, RegionId, RegionName};

/// Who writes a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionKind {
    /// A program whose stores are tracked.
    Source,
    /// The node itself, on request.
    Held,
    /// The node, following another one: epochs can be read whole.
    Replica,
}

/// What a region is, for as long as its memory lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its name.
    pub name: RegionName,
    /// Id of this memory.
    pub id: RegionId,
    /// Size in bytes that it was made with.
    pub size: u64,
    /// Greatest size that it can grow to, in bytes; [`Identity::size`] if it cannot.
    pub max_size: u64,
    /// Who writes it.
    pub kind: RegionKind,
}

/// Who writes at the moment, as the guard word tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardState {
    /// Write guards held.
    pub shared: u16,
    /// Threads in `commit()`.
    pub committers: u16,
    /// Guards ever taken, wrapping: a difference means that somebody wrote.
    pub entries: u32,
    /// Times that the guard word was given up because a process died in it.
    pub life: u32,
}

impl GuardState {
    /// Whether nobody writes: all are in `commit()` or outside of a guard.
    pub fn is_quiet(&self) -> bool {
        self.shared == 0 && self.committers > 0
    }

    /// Whether what was captured between `self` and `after` is an exact instant.
    pub fn is_cut(&self, after: &GuardState) -> bool {
        self.is_quiet()
            && after.is_quiet()
            && (self.entries, self.life) == (after.entries, after.life)
    }
}

/// The engine's numbers about a region, for programs that attach to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Captures made.
    pub captures: u64,
    /// Commits answered.
    pub commits: u64,
    /// Pages found written.
    pub dirty_pages: u64,
    /// Bytes found changed.
    pub changed_bytes: u64,
    /// Present pause between captures by timer, in microseconds.
    pub interval_us: u64,
    /// Times that tracking was lost and everything compared.
    pub lost: u64,
}

/// One side's mapping of a control page.
#[derive(Clone, Debug)]
pub struct Control {
    pub(super) mem: SharedMemory,
    identity: Identity,
}

/// Value of the syncing word of a page that shows nothing any more.
const RETIRED: u32 = 2;
const PAGE: &str = "control page";

fn foreign(problem: &'static str) -> RegionError {
    RegionError::Foreign {
        page: PAGE,
        problem,
    }
}

impl Control {
    /// Makes one, sealed against resizing. The descriptor is for passing on; reopen
    /// it read-only for readers.
    ///
    /// # Errors
    /// [`RegionError::Size`]; [`RegionError::Sys`] where the kernel refuses.
    pub fn create(name: &str, identity: &Identity) -> Result<(Self, OwnedFd), RegionError> {
        check_sizes(identity.size, identity.max_size)?;
        let action = sys("creating a control page");
        let fd = memfd::create(name, CONTROL_BYTES).map_err(&action)?;
        let mapping = Mapping::shared(&fd, CONTROL_BYTES, Access::ReadWrite).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        memfd::add_seals(&fd, Seals::SHRINK | Seals::GROW | Seals::SEAL).map_err(&action)?;
        let mem = SharedMemory::new(mapping);
        let name = identity.name.as_str().as_bytes();
        mem.store(ID_LAYOUT, &LAYOUT_VERSION)?;
        mem.store(ID_KIND, &kind_code(identity.kind))?;
        mem.store(ID_SIZE, &identity.size)?;
        mem.store(ID_REGION, &identity.id.0)?;
        mem.store(ID_NAME_LEN, &(name.len() as u32))?;
        mem.write(ID_NAME, name)?;
        mem.store(ID_MAX_SIZE, &identity.max_size)?;
        mem.store(SIZE, &identity.size)?;
        // A replica has nothing to show before its engine says that it is whole.
        let syncing = u32::from(identity.kind == RegionKind::Replica);
        mem.store(SYNCING, &syncing)?;
        // SYNC(control_identity): publishes the identity; pairs with `open`.
        mem.atomic_u64(ID_MAGIC).store(MAGIC, Ordering::Release);
        let identity = identity.clone();
        Ok((Self { mem, identity }, fd))
    }

    /// Maps one that somebody passed. Its identity is checked and copied; no word of
    /// it is trusted later.
    ///
    /// # Errors
    /// [`RegionError::Foreign`] if it is not a control page; [`RegionError::Sys`] where
    /// the kernel refuses.
    pub fn open(fd: impl AsFd, access: Access) -> Result<Self, RegionError> {
        let action = sys("opening a control page");
        let seals = memfd::seals(&fd).map_err(&action)?;
        if !seals.contains(Seals::SHRINK | Seals::GROW) {
            return Err(foreign("it is not sealed against resizing"));
        }
        if memfd::size(&fd).map_err(&action)? != CONTROL_BYTES {
            return Err(foreign("its length is another"));
        }
        let mapping = Mapping::shared(&fd, CONTROL_BYTES, access).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        let mem = SharedMemory::new(mapping);
        // SYNC(control_identity): pairs with the store in `create`.
        if mem.atomic_u64(ID_MAGIC).load(Ordering::Acquire) != MAGIC {
            return Err(foreign("its magic number is another"));
        }
        if mem.load::<u32>(ID_LAYOUT)? != LAYOUT_VERSION {
            return Err(foreign("its layout is of another version"));
        }
        let kind = match mem.load::<u32>(ID_KIND)? {
            1 => RegionKind::Source,
            2 => RegionKind::Held,
            3 => RegionKind::Replica,
            _ => return Err(foreign("its kind is unknown")),
        };
        let size = mem.load::<u64>(ID_SIZE)?;
        let max_size = mem.load::<u64>(ID_MAX_SIZE)?;
        check_sizes(size, max_size)?;
        let name_len = u64::from(mem.load::<u32>(ID_NAME_LEN)?);
        let mut name = [0; MAX_NAME_BYTES as usize];
        mem.read(ID_NAME, &mut name)?;
        let name = name
            .get(..name_len.min(MAX_NAME_BYTES + 1) as usize)
            .and_then(|name| std::str::from_utf8(name).ok())
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| foreign("its name is not a name"))?;
        let identity = Identity {
            name,
            id: RegionId(mem.load(ID_REGION)?),
            size,
            max_size,
            kind,
        };
        Ok(Self { mem, identity })
    }

    /// What the region is, as copied when this was created or opened.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Size of the region now, in bytes: a claim of whoever writes it, within the bounds
    /// of the identity. Whether the data has so much is for the file to say.
    pub fn size(&self) -> u64 {
        // SYNC(size): what was stored behind the old end comes after the size; pairs
        // with the store in `set_size`.
        let size = self.mem.atomic_u64(SIZE).load(Ordering::Acquire);
        size.clamp(self.identity.size, self.identity.max_size)
    }

    /// Greatest size that it can have, in bytes.
    pub fn max_size(&self) -> u64 {
        self.identity.max_size
    }

    /// Tells a new size; one that is less than it was is not told. Who publishes epochs
    /// calls it between [`Control::publish_begin`] and [`Control::publish_end`].
    pub fn set_size(&self, size: u64) {
        // SYNC(size): the file has grown before; pairs with the load in `size`.
        self.mem.atomic_u64(SIZE).fetch_max(size, Ordering::Release);
    }

    /// `epoch << 1 | busy` as it stands.
    pub fn version(&self) -> u64 {
        self.mem.atomic_u64(VERSION).load(Ordering::Acquire)
    }

    /// The published epoch; while it is being changed, the one before.
    pub fn epoch(&self) -> u64 {
        seqlock::epoch_of(self.version())
    }

    /// Whether the content is being changed.
    pub fn is_busy(&self) -> bool {
        seqlock::is_busy(self.version())
    }

    pub(super) fn version_word(&self) -> &std::sync::atomic::AtomicU64 {
        self.mem.atomic_u64(VERSION)
    }

    /// The low half of the version, to wait on.
    pub(super) fn version_futex(&self) -> &AtomicU32 {
        self.mem.atomic_u32(VERSION)
    }

    /// Kind, `syncing` and source time of the epoch; whole only under the version.
    pub(super) fn epoch_words(&self) -> (EpochKind, bool, u64) {
        let kind = match self.mem.atomic_u32(KIND).load(Ordering::Relaxed) {
            1 => EpochKind::Cut,
            _ => EpochKind::Convergent,
        };
        let syncing = self.mem.atomic_u32(SYNCING).load(Ordering::Relaxed) != 0;
        let time = self.mem.atomic_u64(SOURCE_TIME).load(Ordering::Relaxed);
        (kind, syncing, time)
    }

    /// The region's present life; [`Generation::ZERO`] before the engine has set one.
    pub fn generation(&self) -> Generation {
        let seq = self.mem.atomic_u64(GENERATION_SEQ);
        // The engine changes it rarely and in two stores; who cannot read it in this
        // many tries reads garbage on purpose.
        for _ in 0..1000 {
            let Some(begun) = seqlock::read_begin(seq) else {
                std::hint::spin_loop();
                continue;
            };
            let low = self.mem.atomic_u64(GENERATION_LOW).load(Ordering::Relaxed);
            let high = self.mem.atomic_u64(GENERATION_HIGH).load(Ordering::Relaxed);
            if seqlock::read_validate(seq, begun) {
                return Generation(u128::from(high) << 64 | u128::from(low));
            }
        }
        Generation::ZERO
    }

    /// The engine's numbers; each is whole, they may be of different moments.
    pub fn stats(&self) -> Stats {
        let word = |index: u64| {
            let word = self.mem.atomic_u64(STATISTICS + 8 * index);
            word.load(Ordering::Relaxed)
        };
        Stats {
            captures: word(0),
            commits: word(1),
            dirty_pages: word(2),
            changed_bytes: word(3),
            interval_us: word(4),
            lost: word(5),
        }
    }

    /// The acknowledged epochs, highest first; 0 where there is no such replica.
    pub fn acked(&self) -> [u64; MAX_ACKED_SLOTS as usize] {
        std::array::from_fn(|slot| {
            let word = self.mem.atomic_u64(ACKED + 8 * slot as u64);
            // SYNC(acked): pairs with the stores in `set_acked`.
            word.load(Ordering::Acquire)
        })
    }
}

/// The engine's side. All of it needs the mapping to be writable.
impl Control {
    /// The content is about to change: readers wait or try again.
    pub fn publish_begin(&self) {
        seqlock::begin(self.version_word());
    }

    /// The content is that of `epoch`. Wakes every reader that waits: each of them
    /// wants the new epoch, and there are at most
    /// [`MAX_READERS`](crate::limits::MAX_READERS).
    pub fn publish_end(&self, epoch: u64, kind: EpochKind, source_time_ns: u64) {
        self.publish(epoch, kind, source_time_ns, true);
    }

    /// The same; wakes nobody where nobody has joined who could wait.
    pub fn publish(&self, epoch: u64, kind: EpochKind, source_time_ns: u64, watched: bool) {
        let code = u32::from(kind == EpochKind::Cut);
        self.mem.atomic_u32(KIND).store(code, Ordering::Relaxed);
        let time = self.mem.atomic_u64(SOURCE_TIME);
        time.store(source_time_ns, Ordering::Relaxed);
        seqlock::end(self.version_word(), epoch);
        if watched {
            wake_all(self.version_futex());
        }
    }

    /// Sets the epoch without any content having changed: for a new life.
    pub fn set_epoch(&self, epoch: u64, kind: EpochKind, source_time_ns: u64) {
        self.publish_begin();
        self.publish_end(epoch, kind, source_time_ns);
    }

    /// Says whether a replica is not whole yet, which is what it begins as; readers are
    /// refused meanwhile. Call it between [`Control::publish_begin`] and [`Control::publish_end`].
    pub fn set_syncing(&self, syncing: bool) {
        let word = self.mem.atomic_u32(SYNCING);
        word.store(u32::from(syncing), Ordering::Relaxed);
    }

    /// This memory shows nothing any more: the region ended, or goes on in other
    /// memory. Whoever waits is woken and told.
    pub fn retire(&self) {
        let word = self.mem.atomic_u32(SYNCING);
        word.store(RETIRED, Ordering::Relaxed);
        // Busy for ever, and another value than any that somebody sleeps on.
        let version = self.version_word();
        let busy = (version.load(Ordering::Relaxed) | 1).wrapping_add(2);
        // SYNC(retire): publishes the flag; pairs with `is_retired` after a look at the version.
        version.store(busy, Ordering::Release);
        wake_all(self.version_futex());
    }

    /// Whether [`Control::retire`] was called.
    pub fn is_retired(&self) -> bool {
        // SYNC(retire): who saw the last version sees the flag.
        std::sync::atomic::fence(Ordering::Acquire);
        self.mem.atomic_u32(SYNCING).load(Ordering::Relaxed) == RETIRED
    }

    /// Starts a new life of the region: commits of the old one find their epochs
    /// void.
    pub fn set_generation(&self, generation: Generation) {
        let seq = self.mem.atomic_u64(GENERATION_SEQ);
        let count = seqlock::epoch_of(seq.load(Ordering::Relaxed));
        seqlock::begin(seq);
        let (low, high) = (generation.0 as u64, (generation.0 >> 64) as u64);
        self.mem
            .atomic_u64(GENERATION_LOW)
            .store(low, Ordering::Relaxed);
        self.mem
            .atomic_u64(GENERATION_HIGH)
            .store(high, Ordering::Relaxed);
        seqlock::end(seq, count.wrapping_add(1));
        self.set_acked(&[]);
    }

    /// The newest commit that was asked for and is not answered.
    pub fn commit_pending(&self) -> Option<u64> {
        // SYNC(commit_request): what was stored before the commit is captured after
        // this; pairs with the addition in `commit`.
        let request = self.mem.atomic_u64(COMMIT_REQUEST).load(Ordering::Acquire);
        let answer = self.mem.atomic_u64(ANSWER).load(Ordering::Relaxed);
        (request > answer).then_some(request)
    }

    /// Answers all commits up to `request`: their stores are in `epoch`.
    pub fn answer_commit(&self, request: u64, epoch: u64, kind: EpochKind) {
        let answered = epoch << 1 | u64::from(kind == EpochKind::Cut);
        let word = self.mem.atomic_u64(ANSWERED);
        word.store(answered, Ordering::Relaxed);
        // SYNC(commit_answer): publishes the epoch; pairs with the load in `commit`.
        let word = self.mem.atomic_u64(ANSWER);
        word.store(request, Ordering::Release);
        wake_all(self.mem.atomic_u32(ANSWER));
    }

    /// Who writes at the moment. Look before and after a capture:
    /// [`GuardState::is_cut`].
    pub fn guard_state(&self) -> GuardState {
        // SYNC(guard): a guard that was given back counts in `entries` read below;
        // pairs with the release of the guard.
        let life = self.guard_life();
        let word = turns::look(self.guard_word(life));
        // Whoever holds one of an earlier life writes too.
        let earlier = u16::from(!self.is_drained(life));
        GuardState {
            shared: (turns::shared_of(word) as u16).saturating_add(earlier),
            committers: turns::committers_of(word) as u16,
            entries: self.mem.atomic_u32(GUARD_ENTRIES).load(Ordering::Relaxed),
            life,
        }
    }

    /// Tells which epochs replicas have acknowledged, highest first; those beyond
    /// [`MAX_ACKED_SLOTS`] are left out.
    pub fn set_acked(&self, acked: &[u64]) {
        for slot in 0..MAX_ACKED_SLOTS as usize {
            let epoch = acked.get(slot).copied().unwrap_or(0);
            let word = self.mem.atomic_u64(ACKED + 8 * slot as u64);
            // SYNC(acked): pairs with the loads in `acked`.
            word.store(epoch, Ordering::Release);
        }
        let seq = self.mem.atomic_u32(ACK_SEQ);
        // SYNC(ack_seq): who sees it changed sees the epochs; pairs with the load in
        // `Epoch::wait_acked`.
        seq.fetch_add(1, Ordering::Release);
        wake_all(seq);
    }

    /// Tells the engine's numbers.
    pub fn set_stats(&self, stats: &Stats) {
        let words = [
            stats.captures,
            stats.commits,
            stats.dirty_pages,
            stats.changed_bytes,
            stats.interval_us,
            stats.lost,
        ];
        for (index, value) in words.into_iter().enumerate() {
            let word = self.mem.atomic_u64(STATISTICS + 8 * index as u64);
            word.store(value, Ordering::Relaxed);
        }
    }
}

const _: () = assert!(STATISTICS_WORDS >= 6, "the numbers have room");

/// Wakes everybody who waits for `word`.
pub(super) fn wake_all(word: &AtomicU32) {
    // The kernel refuses only addresses that are not mapped, and this one is.
    let _ = futex::wake(word, u32::MAX);
}

pub(super) fn check_size(size: u64) -> Result<(), RegionError> {
    if size == 0 || size > MAX_REGION_BYTES {
        return Err(RegionError::Size { size });
    }
    Ok(())
}

/// A size and the greatest one that it can grow to.
pub(super) fn check_sizes(size: u64, max_size: u64) -> Result<(), RegionError> {
    check_size(size)?;
    check_size(max_size)?;
    if max_size < size {
        return Err(RegionError::MaxSize { size, max_size });
    }
    Ok(())
}

fn kind_code(kind: RegionKind) -> u32 {
    match kind {
        RegionKind::Source => 1,
        RegionKind::Held => 2,
        RegionKind::Replica => 3,
    }
}
