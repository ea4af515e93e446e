//! The shared memory of one buffer: its words, its frames, its making and removing.
//!
//! | word | stored by | protects |
//! |---|---|---|
//! | free bytes | both, by atomic addition and subtraction only | the ring: [`Segment::take`] publishes what was written, [`Segment::give_back`] that it was read |
//! | write position, written count, writer pid, metadata | writer | |
//! | read position, read count, reader pid | reader; the writer sends the read position back to 0 when the ring is empty | |
//!
//! A buffer is filled before it gets its name; `reader_pid` is stored last, when the
//! semaphores are there too.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::error::{ZeroBufferError, sys};
use super::layout::*;
use super::ring::Damage;
use super::{BufferConfig, wait::Peer};
use crate::limits::{ZEROBUFFER_LOCK_MS, ZEROBUFFER_ORPHAN_MS, ZEROBUFFER_SWEEP_FILES};
use crate::shm::Semaphore;
use crate::shm::SharedMemory;
use crate::sys::map::{Access, Mapping};
use crate::sys::posix_shm::{self, LockFile};
use crate::sys::process::process_id;
use crate::sys::{SysError, memfd};
use crate::units::checked_range;

/// Where the Python and C++ implementations keep their lock files; they do not ask
/// for the system's temporary folder.
const LOCK_FOLDER: &str = "/tmp/zerobuffer";

/// Where the C# implementation keeps its lock files.
fn other_lock_folder() -> PathBuf {
    std::env::temp_dir().join("zerobuffer").join("locks")
}

/// One side's mapping of a buffer.
#[derive(Debug)]
pub(super) struct Segment {
    memory: SharedMemory,
    fd: OwnedFd,
    pub(super) blocks: Blocks,
}

impl Segment {
    /// Maps what `name` leads to, checked.
    pub(super) fn open(name: &BufferName) -> Result<Segment, ZeroBufferError> {
        let fd = match posix_shm::open(name.as_str()) {
            Ok(fd) => fd,
            Err(e) if is_missing(&e) => return Err(ZeroBufferError::NoBuffer),
            Err(e) => return Err(sys("opening the shared memory of a buffer")(e)),
        };
        let action = sys("mapping the shared memory of a buffer");
        if !memfd::is_regular_file(&fd).map_err(&action)? {
            return Err(ZeroBufferError::Foreign {
                problem: "it is no regular file",
            });
        }
        let len = memfd::size(&fd).map_err(&action)?;
        if len == 0 {
            return Err(ZeroBufferError::NoBuffer);
        }
        if len < OIEB_BYTES {
            return Err(ZeroBufferError::Foreign {
                problem: "it is shorter than 128 bytes",
            });
        }
        let mapping = Mapping::shared(&fd, OIEB_BYTES, Access::ReadWrite).map_err(&action)?;
        let first: Oieb = load(&SharedMemory::new(mapping), 0);
        if first.size == 0 {
            // Other implementations name it first and fill it then.
            return Err(ZeroBufferError::NoBuffer);
        }
        let blocks = Blocks::of(&first, len)?;
        let total = blocks.total().unwrap_or(OIEB_BYTES);
        let mapping = Mapping::shared(&fd, total, Access::ReadWrite).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        let memory = SharedMemory::new(mapping);
        Ok(Segment { memory, fd, blocks })
    }

    /// Makes one without a name; nobody can open it yet.
    fn make(config: &BufferConfig) -> Result<Segment, ZeroBufferError> {
        let blocks = Blocks::for_sizes(config.metadata_bytes, config.payload_bytes)?;
        let total = blocks.total().unwrap_or(0);
        let action = sys("making the shared memory of a buffer");
        let fd = posix_shm::unnamed(config.mode).map_err(&action)?;
        posix_shm::resize(&fd, total, config.reserve).map_err(&action)?;
        let mapping = Mapping::shared(&fd, total, Access::ReadWrite).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        let memory = SharedMemory::new(mapping);
        let first = Oieb {
            size: OIEB_BYTES as u32,
            version: VERSION,
            metadata_size: blocks.metadata,
            metadata_free_bytes: blocks.metadata,
            payload_size: blocks.payload,
            payload_free_bytes: blocks.payload,
            ..Oieb::default()
        };
        store(&memory, 0, &first);
        Ok(Segment { memory, fd, blocks })
    }

    pub(super) fn word(&self, offset: u64) -> u64 {
        self.memory.atomic_u64(offset).load(Ordering::Acquire)
    }

    pub(super) fn set_word(&self, offset: u64, value: u64) {
        self.memory
            .atomic_u64(offset)
            .store(value, Ordering::Release);
    }

    /// Replaces a word if it holds `expected`.
    pub(super) fn replace_word(&self, offset: u64, expected: u64, value: u64) -> Result<(), u64> {
        self.memory
            .atomic_u64(offset)
            .compare_exchange(expected, value, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
    }

    /// Bytes that are free in the ring.
    #[inline]
    pub(super) fn free(&self) -> u64 {
        // SYNC(zerobuffer_free): sees the frames that were taken for, or that what
        // was given back was read; pairs with `take` and `give_back`.
        self.memory.atomic_u64(FREE_BYTES).load(Ordering::Acquire)
    }

    /// Takes free bytes: the frame written into them is there.
    #[inline]
    pub(super) fn take(&self, bytes: u64) {
        // SYNC(zerobuffer_free): publishes the frame; pairs with `free`.
        self.memory
            .atomic_u64(FREE_BYTES)
            .fetch_sub(bytes, Ordering::Release);
    }

    /// Gives bytes back: they were read.
    #[inline]
    pub(super) fn give_back(&self, bytes: u64) {
        // SYNC(zerobuffer_free): the reading is over; pairs with `free`.
        self.memory
            .atomic_u64(FREE_BYTES)
            .fetch_add(bytes, Ordering::Release);
    }

    /// A copy of the header at position `at` of the ring, `at + 16 <= size`.
    pub(super) fn header(&self, at: u64) -> FrameHeader {
        load(&self.memory, self.blocks.ring() + at)
    }

    pub(super) fn set_header(&self, at: u64, header: FrameHeader) {
        store(&self.memory, self.blocks.ring() + at, &header);
    }

    /// Copies out of the ring. The caller has checked the range against the ring.
    pub(super) fn read(&self, at: u64, out: &mut [u8]) {
        let done = self.memory.read(self.blocks.ring() + at, out);
        debug_assert!(done.is_ok(), "a range of the ring");
    }

    /// Copies into the ring. The caller has checked the range against the ring.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        let done = self.memory.write(self.blocks.ring() + at, bytes);
        debug_assert!(done.is_ok(), "a range of the ring");
    }

    /// Address of position `at` of the ring.
    pub(super) fn ptr(&self, at: u64) -> *mut u8 {
        self.memory
            .as_ptr()
            .wrapping_add((self.blocks.ring() + at) as usize)
    }

    /// A copy of the metadata, or none if none was written.
    pub(super) fn metadata(&self) -> Result<Option<Vec<u8>>, ZeroBufferError> {
        let written = self.word(METADATA_WRITTEN);
        if written == 0 {
            return Ok(None);
        }
        let len: u64 = load(&self.memory, OIEB_BYTES);
        let room = written
            .min(self.blocks.metadata)
            .saturating_sub(METADATA_PREFIX);
        if checked_range(0, len, room).is_err() {
            return Err(Damage::Metadata { len, room }.into());
        }
        let mut bytes = vec![0; len as usize];
        let done = self.memory.read(OIEB_BYTES + METADATA_PREFIX, &mut bytes);
        debug_assert!(done.is_ok(), "a range of the metadata block");
        Ok(Some(bytes))
    }

    /// Writes the metadata, once in the buffer's life.
    pub(super) fn set_metadata(&self, bytes: &[u8]) -> Result<(), ZeroBufferError> {
        let (len, max) = (bytes.len() as u64, self.blocks.metadata - METADATA_PREFIX);
        if len > max {
            return Err(ZeroBufferError::MetadataTooLong { len, max });
        }
        if self.word(METADATA_WRITTEN) != 0 {
            return Err(ZeroBufferError::MetadataTwice);
        }
        store(&self.memory, OIEB_BYTES, &len);
        let done = self.memory.write(OIEB_BYTES + METADATA_PREFIX, bytes);
        debug_assert!(done.is_ok(), "a range of the metadata block");
        let used = METADATA_PREFIX + len;
        self.set_word(METADATA_FREE, self.blocks.metadata - used);
        self.set_word(METADATA_WRITTEN, used);
        Ok(())
    }

    /// The process that `offset` names, 0 for none.
    pub(super) fn pid(&self, offset: u64) -> Result<i32, Damage> {
        let pid = self.word(offset);
        i32::try_from(pid).map_err(|_| Damage::Pid { pid })
    }

    /// Whether the process that `offset` names is alive and has this memory mapped;
    /// a number that another process has got since is not taken for it.
    pub(super) fn is_alive(&self, offset: u64) -> bool {
        match self.pid(offset) {
            Ok(0) | Err(_) => false,
            Ok(pid) => {
                Peer::is_running(pid) && posix_shm::is_mapped_by(pid, &self.fd).unwrap_or(true)
            }
        }
    }

    /// Whether `name` still leads to this memory.
    pub(super) fn is_linked(&self, name: &BufferName) -> bool {
        posix_shm::is_linked(&self.fd, name.as_str())
    }
}

fn is_missing(error: &SysError) -> bool {
    error.source.kind() == std::io::ErrorKind::NotFound
}

fn load<T: zerocopy::FromBytes>(memory: &SharedMemory, offset: u64) -> T {
    match memory.load(offset) {
        Ok(value) => value,
        Err(e) => unreachable!("a field of a layout that was checked: {e}"),
    }
}

fn store<T: zerocopy::IntoBytes + zerocopy::Immutable>(
    memory: &SharedMemory,
    offset: u64,
    value: &T,
) {
    let done = memory.store(offset, value);
    debug_assert!(done.is_ok(), "a field of a layout that was checked");
}

/// What the reader owns besides its mapping: the name, its locks and semaphores.
/// All of it goes with this object.
#[derive(Debug)]
pub(super) struct Ownership {
    name: BufferName,
    segment: std::sync::Arc<Segment>,
    /// Held for life; the last to go.
    _locks: [LockFile; 2],
}

/// What [`Ownership::create`] makes.
pub(super) struct Created {
    pub(super) ownership: Ownership,
    pub(super) segment: std::sync::Arc<Segment>,
    pub(super) written: Semaphore,
    pub(super) released: Semaphore,
}

impl Ownership {
    /// Makes a buffer under `name`, in place of what a dead owner left there.
    pub(super) fn create(
        name: BufferName,
        config: &BufferConfig,
    ) -> Result<Created, ZeroBufferError> {
        let segment = std::sync::Arc::new(Segment::make(config)?);
        sweep();
        let locks = lock(&name)?;
        clear(&name)?;
        let action = sys("making the semaphores of a buffer");
        let created = Created {
            written: Semaphore::create(&name.written_semaphore(), config.mode).map_err(&action)?,
            released: Semaphore::create(&name.released_semaphore(), config.mode)
                .map_err(&action)?,
            segment: std::sync::Arc::clone(&segment),
            ownership: Ownership {
                name,
                segment,
                _locks: locks,
            },
        };
        posix_shm::link(&created.segment.fd, created.ownership.name.as_str())
            .map_err(sys("naming the shared memory of a buffer"))?;
        created
            .segment
            .set_word(READER_PID, u64::from(process_id().cast_unsigned()));
        Ok(created)
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        self.segment.set_word(READER_PID, 0);
        // Somebody who took this reader for dead has put another buffer in its place:
        // the semaphores of that name are not its own any more either.
        let replaced = posix_shm::exists(self.name.as_str()) && !self.segment.is_linked(&self.name);
        if !replaced {
            remove(&self.name);
        }
    }
}

/// Takes the names of a buffer away; what cannot be taken away stays.
fn remove(name: &BufferName) {
    let _ = Semaphore::unlink(&name.written_semaphore());
    let _ = Semaphore::unlink(&name.released_semaphore());
    let _ = posix_shm::unlink(name.as_str());
}

/// Both lock files of `name`, or the error that says who has them.
fn lock(name: &BufferName) -> Result<[LockFile; 2], ZeroBufferError> {
    let file = name.lock_file();
    let take = |folder: &Path| {
        let path = folder.join(&file);
        let deadline = Instant::now() + Duration::from_millis(ZEROBUFFER_LOCK_MS);
        loop {
            let lock = LockFile::take(&path).map_err(sys("locking the name of a buffer"))?;
            if let Some(lock) = lock {
                return Ok(lock);
            }
            // Held without a living reader: one that begins or ends, or one that
            // clears up after the dead, and is done in a moment.
            let owner = Segment::open(name).ok();
            let pid = owner.as_ref().map_or(0, |owner| owner.word(READER_PID));
            let lives = owner.is_some_and(|owner| owner.is_alive(READER_PID));
            if lives || deadline <= Instant::now() {
                return Err(ZeroBufferError::NameTaken { pid });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    Ok([take(Path::new(LOCK_FOLDER))?, take(&other_lock_folder())?])
}

/// Removes what a dead owner of `name` left; the caller has its locks. A reader
/// whose lock file somebody removed is still recognised by its process.
fn clear(name: &BufferName) -> Result<(), ZeroBufferError> {
    match Segment::open(name) {
        Ok(old) if old.is_alive(READER_PID) => {
            return Err(ZeroBufferError::NameTaken {
                pid: old.word(READER_PID),
            });
        }
        // What is no buffer is somebody else's and stays.
        Err(error @ (ZeroBufferError::Foreign { .. } | ZeroBufferError::Sys { .. })) => {
            return Err(error);
        }
        Ok(_) | Err(_) => {}
    }
    posix_shm::unlink(name.as_str()).map_err(sys("removing the shared memory of a dead reader"))?;
    Ok(())
}

/// Removes the buffers whose owners died, as every reader of version 1 does when it
/// starts. What is in use, or belongs to other users, stays; failures are no matter.
fn sweep() {
    for folder in [Path::new(LOCK_FOLDER), &other_lock_folder()] {
        let Ok(entries) = std::fs::read_dir(folder) else {
            continue;
        };
        for entry in entries.flatten().take(ZEROBUFFER_SWEEP_FILES as usize) {
            let path = entry.path();
            let name = path
                .file_name()
                .and_then(|file| file.to_str())
                .and_then(|file| file.strip_suffix(".lock"))
                .and_then(|name| BufferName::new(name).ok());
            if let Some(name) = name {
                sweep_one(&name, &path);
            }
        }
    }
}

fn sweep_one(name: &BufferName, path: &Path) {
    // Looked at before the lock is tried: a lock tried at the wrong moment makes the
    // owner's own fail.
    let left_behind = || match Segment::open(name) {
        Ok(old) => !old.is_alive(READER_PID) && !old.is_alive(WRITER_PID),
        Err(ZeroBufferError::NoBuffer) => is_old(path),
        Err(_) => false,
    };
    if !left_behind() {
        return;
    }
    let Ok(Some(_lock)) = LockFile::take_left_behind(path) else {
        return;
    };
    if left_behind() {
        remove(name);
    }
}

fn is_old(path: &Path) -> bool {
    let age = std::fs::symlink_metadata(path)
        .and_then(|file| file.modified())
        .map(|modified| SystemTime::now().duration_since(modified));
    matches!(age, Ok(Ok(age)) if age >= Duration::from_millis(ZEROBUFFER_ORPHAN_MS))
}
