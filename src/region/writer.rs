//! The writer's side of a region.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::control::check_sizes;
use super::guard::{Committer, held};
use super::layout::{ANSWER, ANSWERED, COMMIT_REQUEST};
use super::pulse::Waited;
use super::sparse::SparseData;
use super::{
    Control, Epoch, Identity, Pulse, RegionError, RegionKind, Typed, View, WriteGuard, sys,
};
use crate::shm::{FIRST_SEALS, LAST_SEALS, SharedMemory};
use crate::sys::SysError;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, HUGE_PAGE, Seals};
use crate::sys::process::EventFd;
use crate::units::{PAGE_SIZE, checked_range, page_align_up};
use crate::words::{EpochKind, Generation, Mode, Publish, RegionId, RegionName, WriteKind};

/// How a region is tracked and when its epochs are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionOptions {
    /// How changes are found.
    pub mode: Mode,
    /// When epochs are made.
    pub publish: Publish,
    /// Who may write it. Default exclusive: the memory is sealed, so that no second
    /// writable mapping and no write by descriptor is possible. A cooperative region
    /// cannot be sealed so, since further writers map it later: what is stored through a
    /// mapping that was not handed to the node, written by `pwrite(2)`, or punched out is
    /// not seen when it happens, only by the audit within its period.
    pub kind: WriteKind,
    /// Whether children made by `fork` are left without the memory. Default true: a
    /// child that stores into it gets `SIGSEGV`. Without it a child inherits the
    /// mapping and its stores change the region, but write-protection does not see
    /// them: only the audit does, within its period, and then the region is compared
    /// whole each time.
    pub dont_fork: bool,
    /// Whether the mapping is sealed (`mseal(2)`, Linux 6.10). Default false. Then no
    /// code of this process, however it came in, can unmap, move or map over the memory
    /// or change its access: tracking cannot be lost that way. The memory stays mapped
    /// until the process ends, also after the region was dropped: each region made
    /// costs its pages and address space for ever.
    pub mseal: bool,
    /// Greatest size that [`Region::grow`] may give it, in bytes; none: it does not
    /// grow. Costs address space for it on all sides, in mode `sync` 2 MiB of page
    /// tables per GiB too.
    pub max_size: Option<u64>,
    /// Whether the data consists of huge pages of 2 MiB, which the system has set apart
    /// (`vm.nr_hugepages`). Default false. Sizes are multiples of them; all of
    /// `max_size` is taken at once. A page is then what is armed, faults, and is
    /// compared when it was written: 2 MiB for each byte stored, and no page is ever
    /// left open as hot. Not in mode `sync`, which opens and saves small pages.
    pub huge_pages: bool,
}

impl Default for RegionOptions {
    /// Found by write-protection, published by timer.
    fn default() -> Self {
        Self {
            mode: Mode::Async,
            publish: Publish::Timer,
            kind: WriteKind::Exclusive,
            dont_fork: true,
            mseal: false,
            max_size: None,
            huge_pages: false,
        }
    }
}

/// What a writer needs of the engine that follows its region.
#[derive(Debug)]
pub struct EngineLink {
    /// Wakes the engine's loop.
    pub doorbell: EventFd,
    /// Tells whether the engine lives.
    pub pulse: Pulse,
}

/// What a region and the epochs of its commits share.
#[derive(Debug)]
pub(super) struct Shared {
    control: Control,
    link: Mutex<Option<Arc<EngineLink>>>,
}

impl Shared {
    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    pub(super) fn link(&self) -> Option<Arc<EngineLink>> {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.clone()
    }
}

/// Memory that this process writes, and that an engine can follow.
///
/// Threads may store into it by any means: [`Region::write`], typed fields,
/// [`Region::as_ptr`]. How the stores are found is the mode's matter. The memory
/// is not inherited by `fork` (unless [`RegionOptions::dont_fork`] is off), and nobody
/// else can ever map it for writing, unless it is cooperative: then each writing process
/// has a `Region` of its own over the same memory.
///
/// Memory: the pages that were written, 132 KiB of control page as it is used, and
/// one bit per page.
#[derive(Debug)]
pub struct Region {
    shared: Arc<Shared>,
    data: SparseData,
    control_fd: OwnedFd,
    options: RegionOptions,
    /// Marks of an exclusive region have one producer at a time.
    marks: Mutex<()>,
    growing: Mutex<()>,
    /// This process's place among the writers of a cooperative region.
    slot: AtomicU32,
    instance: u64,
}

/// Tells region objects of this process apart.
static NEXT_INSTANCE: AtomicU64 = AtomicU64::new(0);

/// Bytes copied at once from an earlier life.
const COPY_BYTES: usize = 64 * 1024;

/// Data of huge pages, mapped: that takes them.
fn huge_data(
    name: &str,
    size: u64,
    max_size: u64,
    mode: Mode,
) -> Result<(OwnedFd, Mapping), RegionError> {
    check_huge_size(size)?;
    check_huge_size(max_size)?;
    if mode == Mode::Sync {
        return Err(RegionError::HugeMode);
    }
    let huge = |source: SysError| RegionError::Huge {
        pages: max_size / HUGE_PAGE,
        source: source.with_remedy(
            "set enough huge pages of 2 MiB apart: sysctl vm.nr_hugepages, and \
             HugePages_Free in /proc/meminfo says how many are left; or leave huge_pages off",
        ),
    };
    let fd = memfd::create_huge(name, size).map_err(huge)?;
    let mapping = Mapping::with_room(&fd, size, max_size, Access::ReadWrite).map_err(huge)?;
    Ok((fd, mapping))
}

fn check_huge_size(size: u64) -> Result<(), RegionError> {
    if size.is_multiple_of(HUGE_PAGE) {
        Ok(())
    } else {
        Err(RegionError::HugeSize { size })
    }
}

impl Region {
    /// Makes a region of `size` zero bytes.
    ///
    /// # Errors
    /// [`RegionError::Size`] and [`RegionError::MaxSize`]; [`RegionError::Sys`] where the
    /// kernel refuses.
    pub fn create(
        name: &RegionName,
        size: u64,
        options: &RegionOptions,
    ) -> Result<Self, RegionError> {
        let max_size = options.max_size.unwrap_or(size);
        check_sizes(size, max_size)?;
        let action = sys("creating a region");
        let memfd_name = format!("uffd-sync:{name}");
        let is_shared = options.kind == WriteKind::Cooperative;
        if is_shared && max_size != size {
            return Err(RegionError::NotCooperative("max_size"));
        }
        if is_shared && options.huge_pages {
            return Err(RegionError::NotCooperative("huge_pages"));
        }
        let (fd, mapping) = if options.huge_pages {
            huge_data(&memfd_name, size, max_size, options.mode)?
        } else {
            let fd = memfd::create(&memfd_name, page_align_up(size)).map_err(&action)?;
            let mapping = Mapping::with_room(&fd, size, max_size, Access::ReadWrite);
            (fd, mapping.map_err(&action)?)
        };
        prepare(&mapping, options).map_err(&action)?;
        let alone = match options.kind {
            WriteKind::Exclusive => FIRST_SEALS,
            WriteKind::Cooperative => Seals::SHRINK,
        };
        memfd::add_seals(&fd, alone).map_err(&action)?;
        if size == max_size {
            memfd::add_seals(&fd, LAST_SEALS).map_err(&action)?;
        }
        let identity = Identity {
            name: name.clone(),
            id: RegionId::random(),
            size,
            max_size,
            kind: RegionKind::Source,
        };
        let (control, control_fd) = Control::create(&format!("{memfd_name}:control"), &identity)?;
        // The engine may be another user's: it reads the one and shares both with readers.
        memfd::let_others_read(&fd).map_err(&action)?;
        memfd::let_others_read(&control_fd).map_err(&action)?;
        Ok(Self::over(mapping, fd, control, control_fd, options))
    }

    /// Maps a cooperative region that another process made, as one more of its writers.
    /// Both descriptors are open for writing. `options` are those that its writers have
    /// agreed on.
    ///
    /// # Errors
    /// [`RegionError::Foreign`] if it is not the memory of a region, or sealed against
    /// further writers; [`RegionError::Sys`] where the kernel refuses.
    pub fn attach(
        data: OwnedFd,
        control_fd: OwnedFd,
        options: &RegionOptions,
    ) -> Result<Self, RegionError> {
        let action = sys("attaching to a cooperative region");
        let foreign = |problem| RegionError::Foreign {
            page: "cooperative region",
            problem,
        };
        let control = Control::open(&control_fd, Access::ReadWrite)?;
        if control.identity().kind != RegionKind::Source {
            return Err(foreign("no program writes it"));
        }
        let seals = memfd::seals(&data).map_err(&action)?;
        if !seals.contains(Seals::SHRINK) || seals.contains(Seals::FUTURE_WRITE) {
            return Err(foreign("its seals are others"));
        }
        let size = control.size();
        if memfd::size(&data).map_err(&action)? < size {
            return Err(foreign("it is too short"));
        }
        let mapping = map_for_writing(&data, size, options).map_err(&action)?;
        Ok(Self::over(mapping, data, control, control_fd, options))
    }

    fn over(
        mapping: Mapping,
        fd: OwnedFd,
        control: Control,
        control_fd: OwnedFd,
        options: &RegionOptions,
    ) -> Self {
        let size = control.size();
        Self {
            shared: Arc::new(Shared {
                control,
                link: Mutex::new(None),
            }),
            data: SparseData::new(SharedMemory::new(mapping), fd, size),
            control_fd,
            options: *options,
            marks: Mutex::new(()),
            growing: Mutex::new(()),
            slot: AtomicU32::new(0),
            instance: NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Makes a region with the content of an earlier life's data, which may be open
    /// for reading only. Holes and pages of zeros stay holes; what `old` has beyond
    /// `size` is left out.
    ///
    /// # Errors
    /// As for [`Region::create`], and if `old` cannot be read.
    pub fn create_from(
        name: &RegionName,
        old: BorrowedFd<'_>,
        size: u64,
        options: &RegionOptions,
    ) -> Result<Self, RegionError> {
        let region = Self::create(name, size, options)?;
        let action = sys("reading a region's earlier life");
        let mut buffer = vec![0; COPY_BYTES];
        let mut at = 0;
        while at < size {
            let Some(data) = memfd::next_data(old, at).map_err(&action)? else {
                break;
            };
            let end = data.end.min(size);
            at = data.start.max(at);
            while at < end {
                let len = (end - at).min(COPY_BYTES as u64) as usize;
                let read = memfd::read_at(old, &mut buffer[..len], at).map_err(&action)?;
                region.write_pages(at, &buffer[..read])?;
                at += len as u64;
            }
        }
        Ok(region)
    }

    /// Writes the pages of `bytes` that are not zero; data begins and ends at pages.
    fn write_pages(&self, offset: u64, bytes: &[u8]) -> Result<(), RegionError> {
        for (index, page) in bytes.chunks(PAGE_SIZE as usize).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                self.write(offset + index as u64 * PAGE_SIZE, page)?;
            }
        }
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &RegionName {
        &self.control().identity().name
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.data.size()
    }

    /// Greatest size that it can grow to, in bytes.
    pub fn max_size(&self) -> u64 {
        self.control().max_size()
    }

    /// Lengthens it to `new_size` bytes, of which those that are new are zero; nothing if
    /// it has that size. They may be stored to as soon as this returns. The epoch that
    /// has them is the next one: by timer soon, or that of the next commit.
    ///
    /// # Errors
    /// [`RegionError::BeyondMax`] and [`RegionError::Shrink`], with both numbers;
    /// [`RegionError::Sys`] where the kernel refuses. Nothing is changed then.
    pub fn grow(&self, new_size: u64) -> Result<(), RegionError> {
        let _one = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let (present, max_size) = (self.size(), self.max_size());
        if new_size > max_size {
            return Err(RegionError::BeyondMax {
                size: new_size,
                max_size,
            });
        }
        if new_size < present {
            return Err(RegionError::Shrink {
                size: new_size,
                present,
            });
        }
        if new_size == present {
            return Ok(());
        }
        if self.options.huge_pages {
            check_huge_size(new_size)?;
        }
        let action = sys("growing a region");
        memfd::grow(self.data.fd(), page_align_up(new_size)).map_err(&action)?;
        if new_size == max_size {
            memfd::add_seals(self.data.fd(), LAST_SEALS).map_err(&action)?;
        }
        self.control().set_size(new_size);
        self.data.set_size(new_size);
        if let Some(link) = self.shared.link() {
            // Growth alone is news too, and is no store that anybody would notice.
            link.doorbell.ring();
        }
        Ok(())
    }

    /// How it is tracked and published.
    pub fn options(&self) -> &RegionOptions {
        &self.options
    }

    /// The data memfd, to pass on. Nobody can write through it.
    pub fn data_fd(&self) -> BorrowedFd<'_> {
        self.data.fd().as_fd()
    }

    /// The control memfd, to pass to the engine.
    pub fn control_fd(&self) -> BorrowedFd<'_> {
        self.control_fd.as_fd()
    }

    /// This process's mapping of the data.
    pub fn mapping(&self) -> &Arc<Mapping> {
        self.memory().mapping()
    }

    /// The control page.
    pub fn control(&self) -> &Control {
        self.shared.control()
    }

    fn memory(&self) -> &SharedMemory {
        self.data.memory().expect("a writer's region is mapped")
    }

    /// Has the first page in the page table of this process, for others to look at.
    pub fn populate_first_page(&self) {
        let word = self.memory().atomic_u64(0);
        std::hint::black_box(word.load(Ordering::Relaxed));
    }

    /// This process's place among the writers; none in an exclusive region.
    pub fn slot(&self) -> Option<u32> {
        let cooperative = self.options.kind == WriteKind::Cooperative;
        cooperative.then(|| self.slot.load(Ordering::Relaxed))
    }

    /// The node has given this process a place.
    pub fn set_slot(&self, slot: u32) {
        self.slot.store(slot, Ordering::Relaxed);
    }

    pub(super) fn instance(&self) -> u64 {
        self.instance
    }

    /// Copies `out.len()` bytes at `offset`. Reading a hole does not allocate it.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), RegionError> {
        Ok(self.data.read(offset, out)?)
    }

    /// Stores `bytes` at `offset`. In mode `manual` they are to be marked as well.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`]; nothing is stored then.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), RegionError> {
        checked_range(offset, bytes.len() as u64, self.size())?;
        Ok(self.memory().write(offset, bytes)?)
    }

    /// A copy of the `T` at `offset`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`].
    pub fn load<T: FromBytes>(&self, offset: u64) -> Result<T, RegionError> {
        Ok(self.data.load(offset)?)
    }

    /// The field of type `T` at `offset`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] if it does not lie within the region.
    pub fn typed<T>(&self, offset: u64) -> Result<Typed<'_, T>, RegionError>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        checked_range(offset, size_of::<T>() as u64, self.size())?;
        Ok(Typed::new(self, offset))
    }

    /// The 8-byte word at an aligned `offset`, for atomics between threads and between the
    /// processes that write a cooperative region. Stores to it are tracked like all others.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] if it is misaligned or beyond the end.
    pub fn atomic_u64(&self, offset: u64) -> Result<&AtomicU64, RegionError> {
        checked_range(offset, 8, self.size())?;
        Ok(self.memory().checked_atomic_u64(offset)?)
    }

    /// A part of the region, for reading.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] if `range` does not lie within the region.
    pub fn view(&self, range: Range<u64>) -> Result<View<'_>, RegionError> {
        let len = range.end.saturating_sub(range.start);
        let range = checked_range(range.start, len, self.size())?;
        Ok(View::new(&self.data, range))
    }

    /// The first byte, for those who know what they do: [`Region::size`] bytes, as it
    /// is at the moment, are
    /// valid while the region lives. Stores through it are tracked like all others.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory().as_ptr()
    }

    /// Says that `len` bytes at `offset` were changed: they are shipped as they are
    /// when they are captured next. Costs two uncontended atomic operations and a
    /// lock of this process; never waits for the engine. A burst beyond
    /// [`MARK_RING_SLOTS`](crate::limits::MARK_RING_SLOTS) degrades to whole pages, which
    /// marks in a cooperative region are always.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`].
    pub fn mark_region_changed(&self, offset: u64, len: u64) -> Result<(), RegionError> {
        let mark = checked_range(offset, len, self.size())?;
        if self.options.kind == WriteKind::Cooperative {
            self.control().push_shared_mark(mark);
            return Ok(());
        }
        let _one = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        self.control().push_mark(mark);
        Ok(())
    }

    /// Begins a group of stores that are to be in one epoch. Waits for the commits
    /// that are in progress, and for none that begins later.
    ///
    /// # Errors
    /// [`RegionError::TooManyGuards`] beyond 32,767 at the same time, or 4,095 that wait.
    pub fn write_guard(&self) -> Result<WriteGuard<'_>, RegionError> {
        WriteGuard::take(self)
    }

    /// Makes an epoch of all that this thread has stored, and of what other threads
    /// have, and answers once the content is copied (before it is sent).
    ///
    /// The epoch is a cut if every other writing thread is in `commit()` too or
    /// outside of a guard. Guards are waited for during half of the deadline at most;
    /// then the commit goes on, and the epoch says that it is convergent. A thread that
    /// waits for a guard goes before a commit that began after it.
    ///
    /// # Errors
    /// [`RegionError::EngineGone`] if no engine is connected or it died: commit again
    /// once one is. [`RegionError::TimedOut`]; the epoch is made all the same, later.
    /// [`RegionError::OwnGuard`] if this thread holds a guard of the region.
    pub fn commit(&self, deadline: Duration) -> Result<Epoch, RegionError> {
        if held(self.instance) > 0 {
            return Err(RegionError::OwnGuard);
        }
        if self.shared.link().is_none_or(|it| !it.pulse.is_alive()) {
            return Err(RegionError::EngineGone);
        }
        let begun = Instant::now();
        let committer = Committer::enter(self.control(), self.slot(), begun + deadline / 2)?;
        self.commit_as(committer, begun, deadline)
    }

    pub(super) fn commit_as(
        &self,
        mut committer: Committer<'_>,
        begun: Instant,
        deadline: Duration,
    ) -> Result<Epoch, RegionError> {
        if held(self.instance) > 0 {
            return Err(RegionError::OwnGuard);
        }
        let link = self.shared.link().ok_or(RegionError::EngineGone)?;
        committer.wait_for_guards(begun + deadline / 2)?;
        let control = self.control();
        let before = control.generation();
        // SYNC(commit_request): publishes what was stored and marked before the commit;
        // pairs with the load in `commit_pending`.
        let requests = control.mem.atomic_u64(COMMIT_REQUEST);
        let request = requests.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        link.doorbell.ring();
        let answer = control.mem.atomic_u64(ANSWER);
        loop {
            // SYNC(commit_answer): pairs with the store in `answer_commit`.
            let now = answer.load(Ordering::Acquire);
            if now >= request {
                // Of this answer or of a later one, which holds this commit too.
                let answered = control.mem.atomic_u64(ANSWERED).load(Ordering::Relaxed);
                // If a new life began meanwhile, the epoch may be of the old one.
                let generation = if before.is_zero() {
                    control.generation()
                } else {
                    before
                };
                return Ok(self.epoch(answered, generation));
            }
            let word = control.mem.atomic_u32(ANSWER);
            match link
                .pulse
                .wait_with(word, now as u32, Some(begun + deadline))?
            {
                Waited::Look => {}
                Waited::TimedOut => return Err(RegionError::TimedOut),
                Waited::Gone if answer.load(Ordering::Acquire) >= request => {}
                Waited::Gone => return Err(RegionError::EngineGone),
            }
        }
    }

    fn epoch(&self, answered: u64, generation: Generation) -> Epoch {
        let kind = if answered & 1 == 1 {
            EpochKind::Cut
        } else {
            EpochKind::Convergent
        };
        Epoch {
            number: answered >> 1,
            kind,
            generation,
            shared: Arc::clone(&self.shared),
        }
    }

    /// From now on commits are answered by the engine behind `link`.
    pub fn connect_engine(&self, link: EngineLink) {
        let mut place = self
            .shared
            .link
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *place = Some(Arc::new(link));
    }

    /// From now on commits fail with [`RegionError::EngineGone`].
    pub fn disconnect_engine(&self) {
        let mut place = self
            .shared
            .link
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *place = None;
    }
}

/// A mapping that this process writes.
fn map_for_writing(fd: &OwnedFd, size: u64, options: &RegionOptions) -> Result<Mapping, SysError> {
    let mapping = Mapping::shared(fd, size, Access::ReadWrite)?;
    prepare(&mapping, options)?;
    Ok(mapping)
}

/// What the options ask of a mapping that is written.
fn prepare(mapping: &Mapping, options: &RegionOptions) -> Result<(), SysError> {
    if options.dont_fork {
        mapping.dont_fork()?;
    }
    if options.mseal {
        mapping.seal()?;
    }
    Ok(())
}
