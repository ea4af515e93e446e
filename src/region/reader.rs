//! A reader's side of a region: replicas by whole epochs, anything by live bytes.
//!
//! ```text
//! read_at_epoch:  even version -> closure -> same version?    READ_TRIES times
//!                 else raise the hold: the next apply waits -> again, HOLD_MAX_MS
//!                 else Overrun
//! ```
//! Whoever waits for an epoch sleeps on the low half of the version and on the
//! engine's pulse together. The engine wakes all of them with each epoch.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::hold::HoldPage;
use super::pulse::Waited;
use super::sparse::SparseData;
use super::{Control, Identity, Pulse, RegionError, RegionKind, View, sys};
use crate::limits::{HOLD_MAX_MS, READ_TRIES, UPDATE_DEADLINE_MS};
use crate::shm::{SharedMemory, seqlock};
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::sys::process::deadline_in;
use crate::units::{MIB, OutOfRange};
use crate::words::{EpochKind, Generation};

/// A 256-bit BLAKE3 digest of a region's whole content.
pub type Digest32 = [u8; 32];

/// The epoch that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadEpoch {
    /// Its number.
    pub number: u64,
    /// Whether it is an exact instant of the source.
    pub kind: EpochKind,
    /// When the source captured it, nanoseconds since 1970 by the source's clock.
    pub source_time_ns: u64,
}

/// A read that gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Updates came faster than the closure ends, beyond the time a hold is honoured.
    #[error("no whole epoch within {HOLD_MAX_MS} ms of holding")]
    Overrun,
    /// The engine that writes the replica died.
    #[error("the engine that writes this region is gone")]
    SourceGone,
    /// Only replicas show whole epochs.
    #[error("whole epochs can be read from replicas only")]
    NotReplica,
    /// The replica has not received everything yet.
    #[error("the replica is not whole yet")]
    Syncing,
    /// The region ended, or goes on in other memory: attach again.
    #[error("the region ended or was made anew; attach again")]
    Retired,
    /// The deadline passed.
    #[error("not within the deadline")]
    TimedOut,
    /// The range does not lie within the region.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// Waiting or reading failed.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// A read-only attachment to a region of this host.
#[derive(Debug)]
pub struct RegionReader {
    data: SparseData,
    control: Control,
    hold: HoldPage,
    pulse: Pulse,
}

impl RegionReader {
    /// Maps what the node passed: read-only descriptors of data and control, this
    /// reader's own hold page (which the engine has been given), the engine's pulse,
    /// and what the region is said to be.
    ///
    /// # Errors
    /// [`RegionError::Foreign`] if something is not what it should be, or if the
    /// control page is that of another region.
    pub fn open(
        data: OwnedFd,
        control: OwnedFd,
        hold: HoldPage,
        pulse: Pulse,
        identity: &Identity,
    ) -> Result<Self, RegionError> {
        let action = sys("attaching to a region");
        let foreign = |problem| RegionError::Foreign {
            page: "region",
            problem,
        };
        let control = Control::open(&control, Access::ReadOnly)?;
        if control.identity() != identity {
            return Err(foreign("its control page is that of another region"));
        }
        let (size, room) = (control.size(), control.max_size());
        // Files have no seals to ask for, but for those of shared memory.
        let seals = memfd::seals(&data);
        let data = if seals.is_ok_and(|seals| seals.contains(Seals::SHRINK)) {
            let mapping = Mapping::with_room(&data, size, room, Access::ReadOnly);
            let mapping = mapping.map_err(&action)?;
            SparseData::new(SharedMemory::new(mapping), data, size)
        } else if identity.kind == RegionKind::Source {
            SparseData::unmapped(data, size)
        } else {
            return Err(foreign("its data is not sealed against shrinking"));
        };
        Ok(Self {
            data,
            control,
            hold,
            pulse,
        })
    }

    /// What the region is.
    pub fn identity(&self) -> &Identity {
        self.control.identity()
    }

    /// Size in bytes, which may grow up to [`RegionReader::max_size`]. Of a replica it is
    /// that of the epoch shown now; inside [`RegionReader::read_at_epoch`] the view's
    /// length says how much the epoch read has.
    pub fn size(&self) -> u64 {
        let claimed = self.control.size();
        if claimed > self.data.size() {
            // What the file does not have would be a SIGBUS; it never shrinks.
            let real = memfd::size(self.data.fd());
            if real.is_ok_and(|real| real >= claimed) {
                self.data.set_size(claimed);
            }
        }
        claimed.min(self.data.size())
    }

    /// Greatest size that it can grow to, in bytes.
    pub fn max_size(&self) -> u64 {
        self.control.max_size()
    }

    /// The region's present life.
    pub fn generation(&self) -> Generation {
        self.control.generation()
    }

    /// The control page, for its numbers.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The first byte of the data, for loads by those who know what they do: they
    /// carry no promise across words, and a load from a hole allocates it. None for a
    /// followed file, which its owner may truncate under the reader.
    pub fn as_ptr(&self) -> Option<*const u8> {
        let memory = self.data.memory()?;
        Some(memory.as_ptr().cast_const())
    }

    /// Copies live bytes, which may mix epochs. Reading a hole does not allocate it.
    ///
    /// # Errors
    /// [`ReadError::OutOfRange`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        self.size();
        Ok(self.data.read(offset, out)?)
    }

    /// The data at or behind `from`: what lies before it and behind the last one are holes,
    /// which read as zeros. None where there is nothing but a hole.
    ///
    /// # Errors
    /// [`ReadError::Region`] if the file does not say.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, ReadError> {
        let found = memfd::next_data(self.data.fd(), from);
        Ok(found.map_err(sys("looking for the holes of a region"))?)
    }

    /// Whether the file has the first `len` bytes now. Only a followed file can get shorter;
    /// what it lost then reads as zeros.
    pub fn has(&self, len: u64) -> bool {
        self.data.memory().is_some() || memfd::size(self.data.fd()).is_ok_and(|has| has >= len)
    }

    /// Runs `read` on the content of one whole epoch. It may be run several times, may
    /// see torn bytes in all but the last of them, and should take less than
    /// [`HOLD_MAX_MS`]: copy out, then work.
    ///
    /// # Errors
    /// [`ReadError::NotReplica`], [`ReadError::Syncing`], [`ReadError::Overrun`];
    /// [`ReadError::SourceGone`] if the engine died in the middle of an update.
    pub fn read_at_epoch<R>(
        &self,
        mut read: impl FnMut(View<'_>) -> R,
    ) -> Result<(R, ReadEpoch), ReadError> {
        self.require_replica()?;
        for _ in 0..READ_TRIES {
            if let Some(whole) = self.try_read(&mut read)? {
                return Ok(whole);
            }
        }
        let _raised = self.hold.raise();
        let end = Instant::now() + Duration::from_millis(HOLD_MAX_MS);
        loop {
            if let Some(whole) = self.try_read(&mut read)? {
                return Ok(whole);
            }
            if Instant::now() >= end {
                return Err(ReadError::Overrun);
            }
        }
    }

    /// As [`RegionReader::read_at_epoch`], but waits for an epoch that is a cut.
    ///
    /// # Errors
    /// As there, and [`ReadError::TimedOut`].
    pub fn read_cut<R>(
        &self,
        deadline: Duration,
        mut read: impl FnMut(View<'_>) -> R,
    ) -> Result<(R, ReadEpoch), ReadError> {
        let end = deadline_in(deadline);
        loop {
            let (value, epoch) = self.read_at_epoch(&mut read)?;
            if epoch.kind == EpochKind::Cut {
                return Ok((value, epoch));
            }
            self.wait_until(epoch.number, end)?;
        }
    }

    /// Waits until an epoch later than `after` is published, and says which.
    ///
    /// # Errors
    /// [`ReadError::TimedOut`]; [`ReadError::SourceGone`] if the engine died.
    pub fn wait_epoch(&self, after: u64, deadline: Duration) -> Result<u64, ReadError> {
        self.wait_until(after, deadline_in(deadline))
    }

    fn wait_until(&self, after: u64, end: Instant) -> Result<u64, ReadError> {
        loop {
            let version = self.control.version();
            let epoch = seqlock::epoch_of(version);
            if epoch > after && !self.control.is_retired() {
                return Ok(epoch);
            }
            self.sleep(version, end)?;
        }
    }

    /// Sleeps while the version stands.
    fn sleep(&self, version: u64, end: Instant) -> Result<(), ReadError> {
        if self.control.is_retired() {
            return Err(ReadError::Retired);
        }
        let word = self.control.version_futex();
        match self.pulse.wait_with(word, version as u32, Some(end))? {
            Waited::Look => Ok(()),
            Waited::Gone => Err(ReadError::SourceGone),
            Waited::TimedOut => Err(ReadError::TimedOut),
        }
    }

    fn require_replica(&self) -> Result<(), ReadError> {
        match self.identity().kind {
            RegionKind::Replica => Ok(()),
            RegionKind::Source | RegionKind::Held => Err(ReadError::NotReplica),
        }
    }

    /// One try; none if an update came in between.
    fn try_read<R>(
        &self,
        read: &mut impl FnMut(View<'_>) -> R,
    ) -> Result<Option<(R, ReadEpoch)>, ReadError> {
        let word = self.control.version_word();
        let Some(begun) = seqlock::read_begin(word) else {
            self.wait_whole()?;
            return Ok(None);
        };
        let (kind, syncing, source_time_ns) = self.control.epoch_words();
        let value = (!syncing).then(|| read(View::new(&self.data, 0..self.size())));
        if !seqlock::read_validate(word, begun) {
            return Ok(None);
        }
        let epoch = ReadEpoch {
            number: seqlock::epoch_of(begun),
            kind,
            source_time_ns,
        };
        match value {
            Some(value) => Ok(Some((value, epoch))),
            None => Err(ReadError::Syncing),
        }
    }

    /// Waits for the end of an update that is being applied.
    fn wait_whole(&self) -> Result<(), ReadError> {
        let end = Instant::now() + Duration::from_millis(UPDATE_DEADLINE_MS);
        loop {
            let version = self.control.version();
            if !seqlock::is_busy(version) {
                return Ok(());
            }
            if self.control.epoch_words().1 && !self.control.is_retired() {
                return Err(ReadError::Syncing);
            }
            match self.sleep(version, end) {
                Err(ReadError::TimedOut) => return Err(ReadError::Overrun),
                other => other?,
            }
        }
    }

    /// Digest of the whole content, the epoch it was taken at, and whether the epoch
    /// stood still meanwhile (a writer's stores since its last epoch are not told by
    /// that). Costs a pass over the data; holes are not allocated.
    ///
    /// # Errors
    /// [`ReadError::Region`] if the data cannot be read.
    pub fn digest(&self) -> Result<(Digest32, u64, bool), ReadError> {
        let before = self.control.version();
        let digest = digest_of(self.data.fd(), self.size())?;
        let after = self.control.version();
        let stable = before == after && !seqlock::is_busy(before);
        Ok((digest, seqlock::epoch_of(after), stable))
    }
}

/// Digest of the first `size` bytes of a file; what is missing counts as zeros.
fn digest_of(fd: &OwnedFd, size: u64) -> Result<Digest32, RegionError> {
    let action = sys("reading a region for its digest");
    let zeros = vec![0; MIB as usize];
    let mut buffer = vec![0; MIB as usize];
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < size {
        let data = memfd::next_data(fd, at).map_err(&action)?;
        let data = data.map_or(size..size, |it| {
            it.start.clamp(at, size)..it.end.clamp(at, size)
        });
        while at < data.start {
            let len = (data.start - at).min(MIB) as usize;
            hasher.update(&zeros[..len]);
            at += len as u64;
        }
        while at < data.end {
            let piece = &mut buffer[..(data.end - at).min(MIB) as usize];
            let read = memfd::read_at(fd, piece, at).map_err(&action)?;
            piece[read..].fill(0);
            hasher.update(piece);
            at += piece.len() as u64;
        }
    }
    Ok(*hasher.finalize().as_bytes())
}
