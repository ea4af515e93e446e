//! What tells readers by mapping that a part of a segment is being changed.
//!
//! ```text
//! byte 0     8          12           16        24               40     64           4096
//! | magic    | version 1 | stripe size | stripes | incarnation 128 | zero | liveness u32 | u32 u32 u32 ..
//! ```
//! One sequence per stripe of [`SPACE_STRIPE`] bytes, odd
//! while the stripe is changed. A reader takes each stripe of its range for itself: an even
//! sequence, the copy, the same sequence again; else once more, a bounded number of times,
//! and then it asks over the network.
//!
//! Where clients on the host write too, it is version 2: a u64 per stripe, which is a lock
//! and a sequence at once ([`lease`]), and memory that they can write.
//!
//! Invariants:
//! - I1: between two equal even sequences of a stripe no byte of it was changed (unless it
//!   changed 2^31 times meanwhile).
//! - I2: only the server can write them: the memory is sealed. Those of version 2 can be
//!   written by whom the server gave a descriptor for that.
//!
//! On failure: a server that dies leaves a sequence odd for ever, and its liveness word
//! says that it is gone.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::frame::Incarnation;
use crate::limits::SPACE_STRIPE;
use crate::shm::{SharedMemory, lease};
use crate::sys::SysError;
use crate::sys::futex::{self, Lifeline};
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::units::{OutOfRange, PAGE_SIZE, checked_range, page_align_up};

/// First eight bytes of the memory.
pub const MAGIC: [u8; 8] = *b"uffdSTRP";
/// Version of the layout that the server alone writes.
pub const VERSION: u32 = 1;
/// Version of the layout with locks.
pub const LOCKED_VERSION: u32 = 2;
/// Bytes before the first sequence.
pub const HEADER_BYTES: u64 = PAGE_SIZE;
const VERSION_AT: u64 = 8;
const STRIPE_AT: u64 = 12;
const COUNT_AT: u64 = 16;
const INCARNATION_AT: u64 = 24;
/// Where the liveness word lies.
pub const LIVENESS_AT: u64 = 64;

const _: () = assert!(SPACE_STRIPE <= u32::MAX as u64);

/// Memory that holds no stripes of this layout.
#[derive(Debug, thiserror::Error)]
pub enum StripesError {
    /// The kernel refuses.
    #[error("mapping the stripes of a segment")]
    Sys(#[from] SysError),
    /// It is something else.
    #[error("these are no stripes of a segment: {problem}")]
    Foreign {
        /// What differs.
        problem: &'static str,
    },
    /// The range is not in the segment.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
}

fn stripes_of(len: u64) -> u64 {
    len.div_ceil(SPACE_STRIPE)
}

/// Bytes of the memory for a segment of `len` bytes.
fn memory_bytes(len: u64, version: u32) -> u64 {
    page_align_up(HEADER_BYTES + word_bytes(version) * stripes_of(len))
}

fn word_bytes(version: u32) -> u64 {
    if version == LOCKED_VERSION { 8 } else { 4 }
}

/// The stripes that a range touches.
pub(super) fn touched(offset: u64, len: u64) -> Range<u64> {
    if len == 0 {
        return 0..0;
    }
    offset / SPACE_STRIPE..(offset + len - 1) / SPACE_STRIPE + 1
}

/// The server's side.
#[derive(Debug)]
pub struct Stripes {
    memory: SharedMemory,
    read_only: Arc<OwnedFd>,
    /// What clients that write are given; none if there are no such ones.
    writable: Option<Arc<OwnedFd>>,
    segment: u64,
}

impl Stripes {
    /// For a segment of `len` bytes: 4 KiB, and 4 bytes for each 64 KiB.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn create(len: u64, incarnation: Incarnation) -> Result<Self, SysError> {
        Self::create_as(VERSION, len, incarnation)
    }

    /// With a lock for each stripe, for a segment that clients on this host write too: 4 KiB,
    /// and 8 bytes for each 64 KiB. Then [`begin`](Self::begin) and [`end`](Self::end) do
    /// nothing: who changes bytes holds their locks.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn create_locked(len: u64, incarnation: Incarnation) -> Result<Self, SysError> {
        Self::create_as(LOCKED_VERSION, len, incarnation)
    }

    fn create_as(version: u32, len: u64, incarnation: Incarnation) -> Result<Self, SysError> {
        let bytes = memory_bytes(len, version);
        let fd = memfd::create("uffd-sync-stripes", bytes)?;
        let mapping = Mapping::shared(&fd, bytes, Access::ReadWrite)?;
        mapping.dont_fork()?;
        let is_locked = version == LOCKED_VERSION;
        let mut seals = Seals::SHRINK | Seals::GROW | Seals::SEAL;
        seals.set(Seals::FUTURE_WRITE, !is_locked);
        memfd::add_seals(&fd, seals)?;
        let mut header = [0; 40];
        header[VERSION_AT as usize..][..4].copy_from_slice(&version.to_le_bytes());
        header[STRIPE_AT as usize..][..4].copy_from_slice(&(SPACE_STRIPE as u32).to_le_bytes());
        header[COUNT_AT as usize..][..8].copy_from_slice(&stripes_of(len).to_le_bytes());
        header[INCARNATION_AT as usize..].copy_from_slice(&incarnation.0.to_le_bytes());
        header[..8].copy_from_slice(&MAGIC);
        let memory = SharedMemory::new(mapping);
        let written = memory.write(0, &header);
        debug_assert!(written.is_ok(), "the header's own page");
        let read_only = Arc::new(memfd::reopen_read_only(&fd)?);
        Ok(Self {
            memory,
            read_only,
            writable: is_locked.then(|| Arc::new(fd)),
            segment: len,
        })
    }

    /// To pass to readers.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.read_only)
    }

    /// To pass to clients that write; none unless they were
    /// [made for that](Self::create_locked).
    pub fn writable(&self) -> Option<Arc<OwnedFd>> {
        self.writable.clone()
    }

    /// The memory with a lock for each stripe, if they have any, and the segment's bytes.
    pub(super) fn locks(&self) -> Option<(SharedMemory, u64)> {
        self.writable.as_ref()?;
        Some((self.memory.clone(), self.segment))
    }

    /// Says by the liveness word that the calling thread lives, until it dies or drops this.
    ///
    /// # Errors
    /// What the kernel refuses; a thread holds one such word.
    pub fn live(&self) -> Result<Lifeline, SysError> {
        Lifeline::hold(Arc::clone(self.memory.mapping()), LIVENESS_AT)
    }

    fn word(&self, stripe: u64) -> &AtomicU32 {
        self.memory.atomic_u32(HEADER_BYTES + 4 * stripe)
    }

    /// The bytes of a range are about to change. Harmless where that was said already.
    pub fn begin(&self, offset: u64, len: u64) {
        if self.writable.is_some() {
            return;
        }
        for stripe in touched(offset, len) {
            let word = self.word(stripe);
            let now = word.load(Ordering::Relaxed);
            word.store(now | 1, Ordering::Relaxed);
        }
        // SYNC(stripe_busy): no change is seen before the odd sequence; pairs with the
        // fence in `MappedStripes::read`.
        fence(Ordering::Release);
    }

    /// They are whole again. Harmless where that was said already.
    pub fn end(&self, offset: u64, len: u64) {
        if self.writable.is_some() {
            return;
        }
        for stripe in touched(offset, len) {
            let word = self.word(stripe);
            let now = word.load(Ordering::Relaxed);
            // SYNC(stripe_whole): publishes the bytes; pairs with the load in
            // `MappedStripes::read`.
            word.store(now.wrapping_add(now & 1), Ordering::Release);
        }
    }
}

/// A reader's side.
#[derive(Debug)]
pub struct MappedStripes {
    memory: SharedMemory,
    incarnation: Incarnation,
    segment: u64,
    version: u32,
}

impl MappedStripes {
    /// Maps the stripes of a segment of `segment` bytes from a descriptor that its server
    /// has passed.
    ///
    /// # Errors
    /// [`StripesError::Foreign`] if it is anything else.
    pub fn open(fd: &OwnedFd, segment: u64) -> Result<Self, StripesError> {
        Self::open_for(fd, segment, Access::ReadOnly)
    }

    /// The same, to enter its locks where it is to be written.
    pub(super) fn open_for(
        fd: &OwnedFd,
        segment: u64,
        access: Access,
    ) -> Result<Self, StripesError> {
        let foreign = |problem| StripesError::Foreign { problem };
        let seals = memfd::seals(fd)?;
        if !seals.contains(Seals::SHRINK) {
            return Err(foreign("the memory is not sealed"));
        }
        let is_locked = !seals.contains(Seals::FUTURE_WRITE);
        let version = if is_locked { LOCKED_VERSION } else { VERSION };
        let bytes = memory_bytes(segment, version);
        if memfd::size(fd)? != bytes {
            return Err(foreign("their number is another"));
        }
        let memory = SharedMemory::new(Mapping::shared(fd, bytes, access)?);
        if memory.load::<[u8; 8]>(0)? != MAGIC {
            return Err(foreign("the magic number is another"));
        }
        if u32::from_le(memory.load(VERSION_AT)?) != version {
            return Err(foreign("the version is another"));
        }
        if u64::from(u32::from_le(memory.load(STRIPE_AT)?)) != SPACE_STRIPE {
            return Err(foreign("their size is another"));
        }
        if u64::from_le(memory.load(COUNT_AT)?) != stripes_of(segment) {
            return Err(foreign("their number is another"));
        }
        let incarnation = Incarnation(u128::from_le(memory.load(INCARNATION_AT)?));
        Ok(Self {
            memory,
            incarnation,
            segment,
            version,
        })
    }

    /// The life of the segment that they belong to.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Whether they are locks too.
    pub fn is_locked(&self) -> bool {
        self.version == LOCKED_VERSION
    }

    /// The lock of a stripe of the segment.
    pub(super) fn lock(&self, stripe: u64) -> &AtomicU64 {
        self.memory.atomic_u64(HEADER_BYTES + 8 * stripe)
    }

    /// Whether the server lives.
    pub fn is_alive(&self) -> bool {
        futex::is_held(self.memory.atomic_u32(LIVENESS_AT).load(Ordering::Acquire))
    }

    /// Copies a range out of `data`, the segment's mapping, stripe by stripe, each whole.
    /// False if one of them did not stand still in `tries` tries.
    ///
    /// # Errors
    /// [`OutOfRange`] if the range is not in the segment, or `data` is shorter than it.
    pub fn read(
        &self,
        data: &SharedMemory,
        offset: u64,
        out: &mut [u8],
        tries: u32,
    ) -> Result<bool, OutOfRange> {
        let range = checked_range(offset, out.len() as u64, self.segment)?;
        for stripe in touched(offset, out.len() as u64) {
            let start = range.start.max(stripe * SPACE_STRIPE);
            let end = range.end.min((stripe + 1) * SPACE_STRIPE);
            let piece = &mut out[(start - offset) as usize..(end - offset) as usize];
            if !self.read_stripe(data, stripe, start, piece, tries)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_stripe(
        &self,
        data: &SharedMemory,
        stripe: u64,
        offset: u64,
        out: &mut [u8],
        tries: u32,
    ) -> Result<bool, OutOfRange> {
        if self.is_locked() {
            return self.read_locked(data, stripe, offset, out, tries);
        }
        let word = self.memory.atomic_u32(HEADER_BYTES + 4 * stripe);
        for _ in 0..tries {
            // SYNC(stripe_whole): pairs with the store in `Stripes::end`.
            let begun = word.load(Ordering::Acquire);
            if begun & 1 == 1 {
                std::hint::spin_loop();
                continue;
            }
            data.read(offset, out)?;
            // SYNC(stripe_busy): what was copied is older than the sequence read below;
            // pairs with the fence in `Stripes::begin`.
            fence(Ordering::Acquire);
            if word.load(Ordering::Relaxed) == begun {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn read_locked(
        &self,
        data: &SharedMemory,
        stripe: u64,
        offset: u64,
        out: &mut [u8],
        tries: u32,
    ) -> Result<bool, OutOfRange> {
        let word = self.lock(stripe);
        for _ in 0..tries {
            let Some(begun) = lease::read_begin(word) else {
                std::hint::spin_loop();
                continue;
            };
            data.read(offset, out)?;
            if lease::read_validate(word, begun) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 3 * SPACE_STRIPE;

    fn pair() -> (Stripes, MappedStripes) {
        let stripes = Stripes::create(SEGMENT, Incarnation(77)).expect("made");
        let mapped = MappedStripes::open(&stripes.descriptor(), SEGMENT).expect("mapped");
        (stripes, mapped)
    }

    fn memory(len: u64) -> SharedMemory {
        let fd = memfd::create("segment", len).expect("memfd");
        SharedMemory::new(Mapping::shared(fd, len, Access::ReadWrite).expect("map"))
    }

    #[test]
    fn a_stripe_that_changes_is_not_read() {
        let (stripes, mapped) = pair();
        let data = memory(SEGMENT);
        let mut out = [0; 16];
        let mut read = |offset| mapped.read(&data, offset, &mut out, 3).expect("within");
        let over_both = SPACE_STRIPE - 8;
        assert!(read(over_both));
        stripes.begin(SPACE_STRIPE, 1);
        stripes.begin(SPACE_STRIPE, SPACE_STRIPE);
        assert!(!read(over_both), "the second stripe changes");
        assert!(read(0), "the first one does not");
        stripes.end(SPACE_STRIPE, SPACE_STRIPE);
        stripes.end(SPACE_STRIPE, 1);
        assert!(read(over_both));
        stripes.begin(SEGMENT, 0);
        assert!(read(SEGMENT - 16), "nothing at the end changes");
        assert!(mapped.read(&data, SEGMENT - 8, &mut out, 3).is_err());
    }

    #[test]
    fn a_server_that_is_gone_is_seen() {
        let (stripes, mapped) = pair();
        assert_eq!(mapped.incarnation(), Incarnation(77));
        assert!(!mapped.is_alive(), "nobody said so yet");
        let life = stripes.live().expect("held");
        assert!(mapped.is_alive());
        drop(life);
        assert!(!mapped.is_alive());
    }

    #[test]
    fn other_memory_is_refused() {
        let (stripes, _) = pair();
        for len in [SEGMENT - 1 - SPACE_STRIPE, 2 * 1024 * SPACE_STRIPE] {
            let other = MappedStripes::open(&stripes.descriptor(), len);
            assert!(matches!(other, Err(StripesError::Foreign { .. })));
        }
        let fd = memfd::create("zeros", 2 * PAGE_SIZE).expect("memfd");
        let open = MappedStripes::open(&fd, SEGMENT);
        assert!(
            matches!(open, Err(StripesError::Foreign { .. })),
            "not sealed"
        );
        memfd::add_seals(&fd, Seals::SHRINK | Seals::FUTURE_WRITE).expect("seals");
        let open = MappedStripes::open(&fd, SEGMENT);
        assert!(matches!(open, Err(StripesError::Foreign { .. })), "zeros");
    }

    /// The writer's stores are in two halves; a reader that takes an unequal pair for whole
    /// is what the sequences are there to prevent.
    #[test]
    fn halves_are_never_mixed() {
        let (stripes, mapped) = pair();
        let data = memory(SEGMENT);
        let theirs = data.clone();
        let (told, done) = std::sync::mpsc::channel::<()>();
        let writer = std::thread::spawn(move || {
            let mut value = 0u64;
            while done.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                value += 1;
                stripes.begin(0, 4096);
                theirs.store(0, &value).expect("within");
                theirs.store(4088, &value).expect("within");
                stripes.end(0, 4096);
            }
            value
        });
        let (mut whole, mut changes, mut out) = (0, 0, [0; 4096]);
        let mut last = [0; 8];
        let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
        // However the two threads share the processors, some reads meet other values.
        while (whole < 1000 || changes < 10) && std::time::Instant::now() < until {
            if mapped.read(&data, 0, &mut out, 3).expect("within") {
                whole += 1;
                assert_eq!(out[..8], out[4088..], "torn");
                changes += u32::from(out[..8] != last);
                last.copy_from_slice(&out[..8]);
            }
        }
        drop(told);
        assert!(writer.join().expect("ended") > 0);
        assert!(changes >= 10, "{changes} changes in {whole} reads");
    }
}
