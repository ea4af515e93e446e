//! Where a channel's memory comes from: new memory of its own, or a view of memory
//! that exists.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::{BadSegment, DuplexError, sys};
use crate::limits::DEFAULT_CHANNEL_SLOTS;
use crate::region::Region;
use crate::shm;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::units::{OutOfRange, checked_range, page_align_up};
use crate::words::{Mode, WriteKind};

/// A range of mapped memory; offsets are relative to its beginning.
#[derive(Clone, Debug)]
pub struct Window {
    memory: shm::SharedMemory,
    start: u64,
    len: u64,
}

impl Window {
    /// `offset .. offset + len` of `memory`.
    ///
    /// # Errors
    /// [`OutOfRange`] if that does not lie within it.
    pub fn new(memory: shm::SharedMemory, offset: u64, len: u64) -> Result<Window, OutOfRange> {
        let range = checked_range(offset, len, memory.len())?;
        Ok(Window {
            memory,
            start: range.start,
            len,
        })
    }

    /// Its bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory underneath, and where the window begins in it.
    pub fn memory(&self) -> (&shm::SharedMemory, u64) {
        (&self.memory, self.start)
    }

    /// The `count` words at `offset`, accessed by atomics only.
    ///
    /// # Errors
    /// [`OutOfRange`] if they are misaligned or do not lie within the window.
    #[inline]
    pub fn words(&self, offset: u64, count: usize) -> Result<&[AtomicU64], OutOfRange> {
        let len = (count as u64).saturating_mul(8);
        let range = checked_range(offset, len, self.len)?;
        self.memory.checked_words(self.start + range.start, count)
    }

    /// Copies `out.len()` bytes at `offset` into `out`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the window.
    #[inline]
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let range = checked_range(offset, out.len() as u64, self.len)?;
        self.memory.read(self.start + range.start, out)
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// As [`shm::SharedMemory::write`].
    #[inline]
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), shm::WriteError> {
        let range = checked_range(offset, bytes.len() as u64, self.len)?;
        self.memory.write(self.start + range.start, bytes)
    }
}

/// Where a channel's memory comes from.
pub trait MemoryProvider {
    /// Makes `len` bytes of zero memory, in whole pages, sealed against resizing.
    ///
    /// # Errors
    /// [`DuplexError::ViewAllocates`] where the memory exists already;
    /// [`DuplexError::Sys`].
    fn allocate(&mut self, len: u64) -> Result<(), DuplexError>;

    /// `offset .. offset + len` of the memory, mapped; `offset` a multiple of 64.
    /// Windows stay valid after [`MemoryProvider::unmap`].
    ///
    /// # Errors
    /// [`DuplexError::OutOfRange`], also for a misaligned offset;
    /// [`DuplexError::NotAllocated`].
    fn map(&self, offset: u64, len: u64) -> Result<Window, DuplexError>;

    /// Forgets the memory; it is unmapped with the last window of it.
    fn unmap(&mut self);
}

/// A window whose place is a multiple of 64.
fn aligned_window(
    memory: &shm::SharedMemory,
    offset: u64,
    len: u64,
    size: u64,
) -> Result<Window, DuplexError> {
    if !offset.is_multiple_of(super::space::UNIT) {
        return Err(OutOfRange { offset, len, size }.into());
    }
    Ok(Window::new(memory.clone(), offset, len)?)
}

/// New memory of a channel's own: a memfd, sealed against resizing, not inherited
/// by `fork`.
#[derive(Debug, Default)]
pub struct SharedMemory {
    memory: Option<(shm::SharedMemory, OwnedFd)>,
}

impl SharedMemory {
    /// Nothing allocated yet.
    pub fn new() -> SharedMemory {
        SharedMemory::default()
    }

    /// The memfd, taken out, to pass to peers.
    ///
    /// # Errors
    /// [`DuplexError::NotAllocated`].
    pub(super) fn into_fd(self) -> Result<OwnedFd, DuplexError> {
        self.memory
            .map(|(_, fd)| fd)
            .ok_or(DuplexError::NotAllocated)
    }
}

impl MemoryProvider for SharedMemory {
    fn allocate(&mut self, len: u64) -> Result<(), DuplexError> {
        let action = sys("allocating a channel's memory");
        let fd = memfd::create("uffd-sync-channel", page_align_up(len)).map_err(&action)?;
        memfd::add_seals(&fd, Seals::SHRINK | Seals::GROW | Seals::SEAL).map_err(&action)?;
        let mapping = Mapping::shared(&fd, len, Access::ReadWrite).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        self.memory = Some((shm::SharedMemory::new(mapping), fd));
        Ok(())
    }

    fn map(&self, offset: u64, len: u64) -> Result<Window, DuplexError> {
        let (memory, _) = self.memory.as_ref().ok_or(DuplexError::NotAllocated)?;
        aligned_window(memory, offset, len, memory.len())
    }

    fn unmap(&mut self) {
        self.memory = None;
    }
}

/// A region that a channel's payload is a part of.
#[derive(Clone, Debug)]
pub(super) struct InRegion {
    pub(super) region: Arc<Region>,
    /// Where the payload begins in it.
    pub(super) offset: u64,
}

/// A view of memory that exists: a part of a memfd, or of a cooperative region, whose
/// changes the server then marks ([`SharedMemoryView::of_region`]).
#[derive(Debug)]
pub struct SharedMemoryView {
    memory: Option<shm::SharedMemory>,
    fd: OwnedFd,
    offset: u64,
    len: u64,
    region: Option<InRegion>,
}

impl SharedMemoryView {
    /// The bytes `offset .. offset + len` of the memfd `fd`: `offset` a multiple of
    /// the page size, `len` one of 64.
    ///
    /// # Errors
    /// [`BadSegment::Unsealed`] if the file can shrink; [`DuplexError::OutOfRange`];
    /// [`DuplexError::Sys`] if it cannot be mapped for writing.
    pub fn new(fd: impl AsFd, offset: u64, len: u64) -> Result<SharedMemoryView, DuplexError> {
        let action = sys("mapping a view for a channel's payload");
        let seals = memfd::seals(&fd).map_err(&action)?;
        if !seals.contains(Seals::SHRINK) {
            return Err(BadSegment::Unsealed.into());
        }
        let size = memfd::size(&fd).map_err(&action)?;
        let range = checked_range(offset, len, size)?;
        if !offset.is_multiple_of(crate::units::PAGE_SIZE) {
            return Err(OutOfRange { offset, len, size }.into());
        }
        let mapping = Mapping::shared(&fd, range.end, Access::ReadWrite).map_err(&action)?;
        mapping.dont_fork().map_err(&action)?;
        let fd = fd.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|e| action(crate::sys::SysError::new("fcntl F_DUPFD_CLOEXEC", e)))?;
        Ok(SharedMemoryView {
            memory: Some(shm::SharedMemory::new(mapping)),
            fd,
            offset,
            len,
            region: None,
        })
    }

    /// The bytes `offset .. offset + len` of a cooperative region of this process, in mode
    /// `manual` (or `compare`): `offset` a multiple of the page size, `len` one of 64.
    ///
    /// The server marks each frame in the payload as changed before it hands the answer
    /// over, so that replicas are sent what was answered. The client needs to know
    /// nothing of the region. Epochs are convergent: what a client is writing at the
    /// moment may be in them. What it wrote and never handed over is not marked.
    ///
    /// # Errors
    /// [`DuplexError::ExclusiveRegion`], [`DuplexError::RegionMode`]; as
    /// [`SharedMemoryView::new`].
    pub fn of_region(
        region: &Arc<Region>,
        offset: u64,
        len: u64,
    ) -> Result<SharedMemoryView, DuplexError> {
        let options = region.options();
        if options.kind != WriteKind::Cooperative {
            return Err(DuplexError::ExclusiveRegion);
        }
        if !matches!(options.mode, Mode::Manual | Mode::Compare) {
            return Err(DuplexError::RegionMode { mode: options.mode });
        }
        // The file has whole pages.
        checked_range(offset, len, region.size())?;
        let view = SharedMemoryView::new(region.data_fd(), offset, len)?;
        let region = Arc::clone(region);
        Ok(SharedMemoryView {
            region: Some(InRegion { region, offset }),
            ..view
        })
    }

    /// The region that it is a part of.
    pub(super) fn region(&self) -> Option<&InRegion> {
        self.region.as_ref()
    }

    /// Where the view begins in its file.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Its bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// A duplicate of the file's descriptor.
    pub(super) fn clone_fd(&self) -> Result<OwnedFd, DuplexError> {
        let fd = self.fd.try_clone();
        fd.map_err(|e| {
            sys("duplicating a descriptor")(crate::sys::SysError::new("fcntl F_DUPFD_CLOEXEC", e))
        })
    }
}

impl MemoryProvider for SharedMemoryView {
    fn allocate(&mut self, len: u64) -> Result<(), DuplexError> {
        Err(DuplexError::ViewAllocates { len })
    }

    fn map(&self, offset: u64, len: u64) -> Result<Window, DuplexError> {
        let memory = self.memory.as_ref().ok_or(DuplexError::NotAllocated)?;
        checked_range(offset, len, self.len)?;
        aligned_window(memory, self.offset + offset, len, self.len)
    }

    fn unmap(&mut self) {
        self.memory = None;
    }
}

/// How a channel's memory is to be made.
#[derive(Debug)]
pub struct BufferConfig {
    pub(super) metadata_size: u64,
    pub(super) payload_size: u64,
    pub(super) slots: u32,
    pub(super) failpoints: bool,
    pub(super) view: Option<SharedMemoryView>,
}

impl BufferConfig {
    /// New memory: `metadata_bytes` for each side (its length word of 8 bytes
    /// included, rounded up to 8; 0 = no metadata), `payload_bytes` for frames beyond
    /// [`INLINE_BYTES`](super::INLINE_BYTES) (rounded up to 64; a frame takes its
    /// size, rounded up to 64, and 64).
    pub fn new(metadata_bytes: u64, payload_bytes: u64) -> BufferConfig {
        BufferConfig {
            metadata_size: metadata_bytes.saturating_add(7) / 8 * 8,
            payload_size: payload_bytes.saturating_add(63) / 64 * 64,
            slots: DEFAULT_CHANNEL_SLOTS as u32,
            failpoints: false,
            view: None,
        }
    }

    /// The payload lies in memory that exists; the rest in new memory.
    pub fn with_view(metadata_bytes: u64, view: SharedMemoryView) -> BufferConfig {
        let payload_size = view.len() / 64 * 64;
        BufferConfig {
            payload_size,
            view: Some(view),
            ..BufferConfig::new(metadata_bytes, 0)
        }
    }

    /// The same with so many slots: requests that can be in flight, a power of two
    /// from 8 to 1024; 64 if not said.
    #[must_use]
    pub fn slots(self, slots: u32) -> BufferConfig {
        BufferConfig { slots, ..self }
    }

    /// Whether the payload lies in memory that exists: then for one channel only.
    pub fn is_view(&self) -> bool {
        self.view.is_some()
    }

    /// The same with failpoints, for tests: slower, and either side can stop the other.
    #[must_use]
    pub fn failpoints(self) -> BufferConfig {
        BufferConfig {
            failpoints: true,
            ..self
        }
    }
}
