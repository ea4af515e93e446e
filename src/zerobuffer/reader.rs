//! The end that owns a buffer and reads from it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::BufferConfig;
use super::error::{Gone, Side, ZeroBufferError, sys};
use super::layout::*;
use super::ring::{Damage, Found, ReadCursor, ReleaseQueue};
use super::segment::{Created, Ownership, Segment};
use super::wait::{Peer, Waiter, next_look};
use crate::shm::Semaphore;
use crate::sys::process::deadline_in;
use crate::units::{OutOfRange, checked_range};

/// Reads frames from a buffer that it owns: it makes it, and with it everything of
/// that name goes away again.
///
/// Several frames may be held at a time and released in any order; their bytes go
/// back to the writer in the order in which they were read.
#[derive(Debug)]
pub struct Reader {
    shared: Arc<Shared>,
    cursor: ReadCursor,
    waiter: Waiter,
    writer: Peer,
    stop: Arc<AtomicBool>,
    damage: Option<Damage>,
    _ownership: Ownership,
}

/// What frames share with their reader.
#[derive(Debug)]
struct Shared {
    segment: Arc<Segment>,
    queue: Mutex<ReleaseQueue>,
    /// Posted by the writer for each frame.
    written: Semaphore,
    /// Posted for each frame released.
    released: Semaphore,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, ReleaseQueue> {
        // No code that can panic runs while it is locked.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what can be given back.
    fn give_back(&self, queue: &mut ReleaseQueue) {
        loop {
            let given = queue.give_back();
            if given.bytes > 0 {
                self.segment.give_back(given.bytes);
            }
            if given.frames == 0 {
                return;
            }
            // A wake-up that fails costs the writer a look later: it does not sleep
            // longer than until its next look at the peer.
            let _ = self.released.post_many(given.frames);
        }
    }
}

impl Reader {
    /// Makes the buffer `name`. What a dead reader left under that name is replaced.
    ///
    /// Costs the buffer's size in `/dev/shm`, reserved at once unless the
    /// configuration says otherwise.
    ///
    /// # Errors
    /// [`ZeroBufferError::Name`], [`ZeroBufferError::Size`];
    /// [`ZeroBufferError::NameTaken`] if a living reader has it;
    /// [`ZeroBufferError::Foreign`] if something else does;
    /// [`ZeroBufferError::Sys`] where the kernel refuses, for want of room for
    /// example.
    pub fn create(name: &str, config: &BufferConfig) -> Result<Reader, ZeroBufferError> {
        Reader::create_as(BufferName::new(name)?, config)
    }

    pub(super) fn create_as(
        name: BufferName,
        config: &BufferConfig,
    ) -> Result<Reader, ZeroBufferError> {
        Reader::create_stopped_by(name, config, Arc::default())
    }

    /// One that `stop` ends, within 20 ms if nobody posts.
    pub(super) fn create_stopped_by(
        name: BufferName,
        config: &BufferConfig,
        stop: Arc<AtomicBool>,
    ) -> Result<Reader, ZeroBufferError> {
        let Created {
            ownership,
            segment,
            written,
            released,
        } = Ownership::create(name, config)?;
        let cursor = ReadCursor::new(segment.blocks.payload);
        let shared = Shared {
            segment,
            queue: Mutex::default(),
            written,
            released,
        };
        Ok(Reader {
            shared: Arc::new(shared),
            cursor,
            waiter: Waiter::new(config.wait),
            writer: Peer::new(Side::Writer, WRITER_PID),
            stop,
            damage: None,
            _ownership: ownership,
        })
    }

    /// The next frame, waiting for it for at most `timeout`.
    ///
    /// Frames of a writer that has gone are handed out before its going is told. A
    /// new writer may follow it: its frames come as if nothing had happened, their
    /// numbers going on or beginning at 1.
    ///
    /// # Errors
    /// [`ZeroBufferError::TimedOut`]; [`ZeroBufferError::PeerGone`] within 20 ms of
    /// the writer's death, and at every call until there is another one;
    /// [`ZeroBufferError::Damaged`], then at every later call;
    /// [`ZeroBufferError::Stopped`] after [`Stopper::stop`].
    pub fn read(&mut self, timeout: Duration) -> Result<Frame, ZeroBufferError> {
        if self.damage.is_none() && self.shared.written.try_acquire() {
            if let Some(frame) = self.take()? {
                return Ok(frame);
            }
            self.shared.written.take_all();
        }
        self.read_slowly(deadline_in(timeout))
    }

    #[cold]
    fn read_slowly(&mut self, deadline: Instant) -> Result<Frame, ZeroBufferError> {
        let mut deeply = false;
        loop {
            if self.stop.load(Ordering::Acquire) {
                return Err(ZeroBufferError::Stopped);
            }
            // Before the look for frames: what a writer wrote before it went is read.
            let writer = self.look_at_writer(deeply)?;
            if let Some(frame) = self.take()? {
                // Its post, if it is not still to come.
                self.shared.written.try_acquire();
                return Ok(frame);
            }
            if let Some(Err(gone)) = writer {
                return Err(self.writer.error(gone));
            }
            let now = Instant::now();
            if deadline <= now {
                // One look at the process for those who never wait.
                if deeply {
                    return Err(ZeroBufferError::TimedOut);
                }
                deeply = true;
                continue;
            }
            let written = &self.shared.written;
            let posted = self.waiter.acquire(written, next_look(deadline))?;
            if posted {
                if let Some(frame) = self.take()? {
                    return Ok(frame);
                }
                // More posts than frames: a stranger's, or a stop.
                self.shared.written.take_all();
            }
            deeply = !posted;
        }
    }

    /// The next frame if there is one.
    ///
    /// # Errors
    /// As for [`Reader::read`] with a timeout of zero.
    pub fn try_read(&mut self) -> Result<Option<Frame>, ZeroBufferError> {
        match self.read(Duration::ZERO) {
            Ok(frame) => Ok(Some(frame)),
            Err(ZeroBufferError::TimedOut) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn look_at_writer(
        &mut self,
        deeply: bool,
    ) -> Result<Option<Result<(), Gone>>, ZeroBufferError> {
        let Reader { writer, shared, .. } = self;
        writer.look(&shared.segment, deeply)
    }

    /// Moves over the next frame, if there is one.
    fn take(&mut self) -> Result<Option<Frame>, ZeroBufferError> {
        if let Some(damage) = self.damage {
            return Err(damage.into());
        }
        let segment = &self.shared.segment;
        let mut queue = self.shared.queue();
        let (passed, free) = (self.cursor.passed(), segment.free());
        let read_pos = segment.word(READ_POS);
        let found = self
            .cursor
            .next(&mut queue, read_pos, free, |at| segment.header(at));
        if self.cursor.passed() != passed {
            segment.set_word(READ_POS, self.cursor.pos());
            segment.set_word(READ_COUNT, self.cursor.passed());
            self.shared.give_back(&mut queue);
        }
        drop(queue);
        match found {
            Ok(None) => Ok(None),
            Ok(Some(found)) => {
                self.writer.heard();
                let shared = Arc::clone(&self.shared);
                Ok(Some(Frame { shared, found }))
            }
            Err(damage) => {
                self.damage = Some(damage);
                Err(damage.into())
            }
        }
    }

    /// A copy of the metadata, or none if the writer has not written any.
    ///
    /// # Errors
    /// [`ZeroBufferError::Damaged`] if its length cannot be.
    pub fn metadata(&self) -> Result<Option<Vec<u8>>, ZeroBufferError> {
        self.shared.segment.metadata()
    }

    /// Waits for a writer for at most `timeout`. Whether there is one.
    ///
    /// # Errors
    /// [`ZeroBufferError::Damaged`]; [`ZeroBufferError::Stopped`].
    pub fn wait_writer(&mut self, timeout: Duration) -> Result<bool, ZeroBufferError> {
        let deadline = deadline_in(timeout);
        let pause = Duration::from_millis(crate::limits::ZEROBUFFER_ATTACH_POLL_MS);
        loop {
            if let Some(Ok(())) = self.look_at_writer(true)? {
                return Ok(true);
            }
            if self.stop.load(Ordering::Acquire) {
                return Err(ZeroBufferError::Stopped);
            }
            if deadline <= Instant::now() {
                return Ok(false);
            }
            // A writer that attaches posts nothing: there is only looking.
            std::thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
        }
    }

    /// The process that writes, or wrote last; 0 if none ever did, as far as was
    /// looked.
    pub fn writer_pid(&self) -> u64 {
        self.writer.pid()
    }

    /// The process that the writer's word names at this moment.
    pub(super) fn named_writer(&self) -> u64 {
        self.shared.segment.word(WRITER_PID)
    }

    /// Number that the next frame has, unless it comes from a new writer.
    pub fn next_sequence(&self) -> u64 {
        self.cursor.expected()
    }

    /// Bytes of the ring, 16 more than the largest frame's data.
    pub fn payload_size(&self) -> u64 {
        self.shared.segment.blocks.payload
    }

    /// Ends [`Reader::read`] from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper {
            stop: Arc::clone(&self.stop),
            shared: Arc::clone(&self.shared),
        }
    }
}

/// Ends a reader's waiting, at once and for good.
#[derive(Clone, Debug)]
pub struct Stopper {
    stop: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Stopper {
    /// Every waiting [`Reader::read`], now or later, ends with
    /// [`ZeroBufferError::Stopped`] once it has nothing more to read at once.
    pub fn stop(&self) {
        // SYNC(zerobuffer_stop): seen by whom the post wakes; pairs with the loads in
        // `Reader::read_slowly` and `Reader::wait_writer`.
        self.stop.store(true, Ordering::Release);
        // A post without a frame, which readers disregard. If the wake-up fails, the
        // reader looks in 20 ms.
        let _ = self.shared.written.post();
    }

    /// The flag that it raises.
    pub(super) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Whether [`Stopper::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        // SYNC(zerobuffer_stop): pairs with `stop`.
        self.stop.load(Ordering::Acquire)
    }
}

/// A frame in the ring; its bytes go back to the writer when it is dropped.
///
/// The writer does not touch them until then if it keeps the rules; it can, so no
/// slice is ever made of them.
#[derive(Debug)]
pub struct Frame {
    shared: Arc<Shared>,
    found: Found,
}

impl Frame {
    /// Number of the frame, counted by its writer.
    pub fn sequence(&self) -> u64 {
        self.found.sequence
    }

    /// Bytes of data, at least 1.
    pub fn len(&self) -> u64 {
        self.found.len
    }

    /// Never: version 1 has no empty frames.
    pub fn is_empty(&self) -> bool {
        self.found.len == 0
    }

    /// Copies `out.len()` bytes at `offset` of the data.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within it.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let range = checked_range(offset, out.len() as u64, self.found.len)?;
        self.shared.segment.read(self.found.at + range.start, out);
        Ok(())
    }

    /// A copy of all of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.read_to(&mut bytes);
        bytes
    }

    /// Replaces what `out` holds by a copy of all of it; saves the allocation where
    /// `out` has room.
    pub fn read_to(&self, out: &mut Vec<u8>) {
        out.resize(self.found.len as usize, 0);
        self.shared.segment.read(self.found.at, out);
    }

    /// The first byte, [`Frame::len`] of them valid while this lives, for those who
    /// know what they may do with memory that another process can write.
    pub fn as_ptr(&self) -> *const u8 {
        self.shared.segment.ptr(self.found.at)
    }

    /// Gives the bytes back; the same as dropping it.
    pub fn release(self) {}
}

impl Drop for Frame {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.release(self.found.ticket);
        self.shared.give_back(&mut queue);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // The name goes with `_ownership`; a writer that sleeps is told.
        self.shared.segment.set_word(READER_PID, 0);
        let _ = self.shared.released.post();
    }
}

/// The semaphores of a buffer: written, released.
pub(super) fn open_semaphores(
    name: &BufferName,
) -> Result<(Semaphore, Semaphore), ZeroBufferError> {
    let open = |name: String| {
        Semaphore::open(&name).map_err(|e| {
            if e.source.kind() == std::io::ErrorKind::NotFound {
                ZeroBufferError::NoBuffer
            } else {
                sys("opening a semaphore of a buffer")(e)
            }
        })
    };
    Ok((
        open(name.written_semaphore())?,
        open(name.released_semaphore())?,
    ))
}
