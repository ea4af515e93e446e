//! The fault thread of one region in mode `sync`: answers stores that wait, makes cuts.
//!
//! ```text
//!                      commands (eventfd)
//!   engine's loop ------------------------> fault thread ----- protect, lift ---> writer's
//!        ^         asked, freed slots        |  ^                                 mapping
//!        |         events (eventfd)          |  +------------ faults ------------ stores
//!        +-----------------------------------+
//!            made, first store, given up, lost
//! ```
//!
//! I1. The thread owns the region's userfaultfds alone: when this process dies, or the
//!     thread ends, the kernel lets every store go on.
//! I2. From its start on it allocates nothing, takes no lock and logs nothing: a store
//!     may wait for it that holds whatever lock its program has.
//! I3. What it tells the loop stands in the [`Board`] before the event rings.
//! I4. Writers join and leave by a queue that it takes from before each cut, so one that
//!     was handed over before a cut is asked for is part of that cut. What it needs of them
//!     was allocated before, and goes back to be freed elsewhere.
//! I5. A writer may unmap its mapping once it was said to leave, also in the middle of a
//!     cut: what is refused for it from then on is no loss.
//!
//! Failure: whatever the kernel refuses ends the thread, with the reason on the board;
//! the region is then compared. But of a cooperative region a process whose memory is
//! gone can store nothing any more: only that one leaves, and the loop is told.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use crate::limits;
use crate::shm::SharedMemory;
use crate::sys::net::wait_readable;
use crate::sys::process::{EventFd, monotonic_ns};
use crate::sys::uffd::{Fault, Faults, Uffd};
use crate::sys::{SysError, memfd};
use crate::track::TrackError;
use crate::track::exact::{Armed, Board, Cut, Cutter, Ground, Lost};
use crate::units::PAGE_SIZE;

/// Faults answered before the commands are looked at again.
const FAULTS_PER_TURN: u32 = 256;
/// How often what waits for slots is tried again, should no event tell.
const STARVED_PAUSE: Duration = Duration::from_millis(1);
/// Bytes of a page, for buffers.
const PAGE: usize = PAGE_SIZE as usize;
/// Writers of one region.
const WRITERS: usize = limits::MAX_WRITERS as usize;
/// Changes that wait for the thread: writers that join come from a part of it only, so that
/// there is room for all to leave, however often some come and go during a long cut.
const CHANGES: usize = 4 * WRITERS;

/// A fault thread that could not be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum FaultThreadError {
    /// No eventfd.
    #[error("cannot make the doorbells of a fault thread")]
    Sys(#[from] SysError),
    /// No memory for its tables.
    #[error("cannot make the tables of a fault thread")]
    Track(#[from] TrackError),
    /// No thread.
    #[error("cannot start a fault thread")]
    Thread(#[source] std::io::Error),
    /// Writers join and leave faster than the thread takes notice of.
    #[error("a fault thread has not yet taken notice of {WRITERS} writers that came or went")]
    Busy,
}

/// One writing process's mapping, as the thread uses it.
#[derive(Debug)]
pub(super) struct Writing {
    /// Where faults come from; owned by nobody else.
    pub(super) uffd: Uffd,
    /// Address of the mapping in that process.
    pub(super) base: u64,
}

/// A region's bytes, as the thread reads them.
#[derive(Debug)]
pub(super) struct Content {
    /// The mapping here, with its room to grow.
    pub(super) memory: SharedMemory,
    /// The file that is mapped.
    pub(super) fd: OwnedFd,
}

impl Content {
    /// Copies a page of a region that has `present` pages for certain. Whether there is
    /// anything behind them only the file can tell: a writer that claims to have stored
    /// there may have handed over other memory, and a load from the mapping would kill.
    fn read_page(&self, page: u64, present: u64, out: &mut [u8; PAGE]) {
        let start = page * PAGE_SIZE;
        if page < present {
            let read = self.memory.read(start, out);
            debug_assert!(read.is_ok(), "pages of the region are mapped here");
            return;
        }
        let read = memfd::read_at(&self.fd, out, start).unwrap_or(0);
        out[read..].fill(0);
    }
}

/// A writer that comes or goes.
enum Change {
    Join(Box<Newcomer>),
    Leave { slot: usize },
}

/// What the thread has of one writer; made and freed elsewhere.
struct Newcomer {
    slot: usize,
    source: Source,
    armed: Armed,
}

/// What it does not need any more.
type Left = (Option<Box<Newcomer>>, Option<Armed>);

/// What the thread and the loop tell each other of writers.
struct Traffic {
    changes: ArrayQueue<Change>,
    left: ArrayQueue<Left>,
    /// Slots whose process was found without memory.
    gone: AtomicU64,
    /// Of each slot: ends of its writers that the thread has not taken notice of.
    leaving: [AtomicU32; WRITERS],
}

/// A running fault thread. Ended on drop, which does not wait for that: it may be in a
/// call that waits for a lock of the writer's address space.
#[derive(Debug)]
pub(super) struct FaultThread {
    board: Arc<Board>,
    commands: Arc<EventFd>,
    events: Arc<EventFd>,
    events_fd: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    traffic: Arc<Traffic>,
}

impl std::fmt::Debug for Traffic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Traffic").finish_non_exhaustive()
    }
}

impl FaultThread {
    /// Starts the thread for all mappings of one region, whose pages are all open.
    ///
    /// # Errors
    /// [`FaultThreadError`].
    pub(super) fn start(
        board: &Arc<Board>,
        content: Content,
        writers: Vec<Writing>,
    ) -> Result<Self, FaultThreadError> {
        Self::start_with(board, content, writers, Cutter::cut)
    }

    /// The same for a cooperative region that nobody writes yet.
    ///
    /// # Errors
    /// [`FaultThreadError`].
    pub(super) fn start_empty(
        board: &Arc<Board>,
        content: Content,
    ) -> Result<Self, FaultThreadError> {
        Self::run_with(board, content, Vec::new(), true, Cutter::cut)
    }

    fn start_with(
        board: &Arc<Board>,
        content: Content,
        writers: Vec<Writing>,
        make: Make,
    ) -> Result<Self, FaultThreadError> {
        Self::run_with(board, content, writers, false, make)
    }

    fn run_with(
        board: &Arc<Board>,
        content: Content,
        writers: Vec<Writing>,
        cooperative: bool,
        make: Make,
    ) -> Result<Self, FaultThreadError> {
        let commands = Arc::new(EventFd::new()?);
        let events = Arc::new(EventFd::new()?);
        let events_fd = Arc::new(events.try_clone_fd()?);
        let stop = Arc::new(AtomicBool::new(false));
        let cutter = Cutter::new(Arc::clone(board), writers.len())?;
        let traffic = Arc::new(Traffic {
            changes: ArrayQueue::new(CHANGES),
            left: ArrayQueue::new(2 * CHANGES),
            gone: AtomicU64::new(0),
            leaving: std::array::from_fn(|_| AtomicU32::new(0)),
        });
        let mut places: Vec<Option<Box<Newcomer>>> = Vec::with_capacity(WRITERS);
        for (slot, writing) in writers.into_iter().enumerate().take(WRITERS) {
            // Its arming is the cutter's already.
            let newcomer = Newcomer {
                slot,
                source: Source::new(writing),
                armed: Armed::vacant(),
            };
            places.push(Some(Box::new(newcomer)));
        }
        places.resize_with(WRITERS, || None);
        let kernel = Kernel {
            board: Arc::clone(board),
            content,
            writers: places,
            cooperative,
            turn: 0,
            buffer: Box::new([0; PAGE]),
            stop: Arc::clone(&stop),
            traffic: Arc::clone(&traffic),
        };
        let (heard, told) = (Arc::clone(&commands), Arc::clone(&events));
        std::thread::Builder::new()
            .name("uffd-sync-fault".to_owned())
            .spawn(move || run(kernel, cutter, &heard, &told, make))
            .map_err(FaultThreadError::Thread)?;
        Ok(Self {
            board: Arc::clone(board),
            commands,
            events,
            events_fd,
            stop,
            traffic,
        })
    }

    /// One more process writes: its stores wait from now on, if it comes armed, or from
    /// the next cut on, which has to be of everything.
    ///
    /// # Errors
    /// [`FaultThreadError::Track`], [`FaultThreadError::Busy`].
    pub(super) fn join(
        &self,
        slot: u32,
        writing: Writing,
        is_armed: bool,
    ) -> Result<(), FaultThreadError> {
        if self.traffic.changes.len() >= WRITERS {
            return Err(FaultThreadError::Busy);
        }
        let newcomer = Box::new(Newcomer {
            slot: slot as usize,
            source: Source::new(writing),
            armed: Armed::new(self.board.pages(), is_armed)?,
        });
        self.change(Change::Join(newcomer))
    }

    /// A process writes no more: its stores wait no more either.
    ///
    /// # Errors
    /// [`FaultThreadError::Busy`].
    pub(super) fn leave(&self, slot: u32) -> Result<(), FaultThreadError> {
        let slot = slot as usize;
        // SYNC(leaving): comes before the process learns that it may unmap; pairs with the
        // load in `has_left`, after the kernel's refusal that the unmapping leads to.
        self.traffic.leaving[slot].fetch_add(1, Ordering::Release);
        self.change(Change::Leave { slot })
    }

    fn change(&self, change: Change) -> Result<(), FaultThreadError> {
        let full = self.traffic.changes.push(change).is_err();
        self.commands.ring();
        if full {
            return Err(FaultThreadError::Busy);
        }
        Ok(())
    }

    /// Slots of writers that were found without memory since this was asked last.
    pub(super) fn take_gone(&self) -> u64 {
        self.traffic.gone.swap(0, Ordering::Relaxed)
    }

    /// Asks for the next cut, once the capture of the last one has ended; its number.
    pub(super) fn ask(&self, all: bool) -> u64 {
        let number = self.board.ask(all);
        self.commands.ring();
        number
    }

    /// Slots came back: a store may wait for one.
    pub(super) fn freed(&self) {
        if self.board.is_starved() {
            self.commands.ring();
        }
    }

    /// Readable when something happened.
    pub(super) fn events(&self) -> &Arc<OwnedFd> {
        &self.events_fd
    }

    /// Silences the events, and frees what writers left behind.
    pub(super) fn heard(&self) {
        self.events.drain();
        while self.traffic.left.pop().is_some() {}
    }

    pub(super) fn board(&self) -> &Arc<Board> {
        &self.board
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.commands.ring();
    }
}

/// The ground that cuts are made on: real mappings.
struct Kernel {
    board: Arc<Board>,
    content: Content,
    /// By slot.
    writers: Vec<Option<Box<Newcomer>>>,
    /// Whether one that is gone is no loss to the others.
    cooperative: bool,
    /// Which writer is asked for faults next.
    turn: usize,
    buffer: Box<[u8; PAGE]>,
    stop: Arc<AtomicBool>,
    traffic: Arc<Traffic>,
}

struct Source {
    writing: Writing,
    faults: Faults,
}

impl Source {
    fn new(writing: Writing) -> Self {
        Self {
            writing,
            faults: Faults::new(),
        }
    }

    fn address(&self, pages: &Range<u64>) -> (u64, u64) {
        let start = self.writing.base + pages.start * PAGE_SIZE;
        (start, (pages.end - pages.start) * PAGE_SIZE)
    }
}

impl Kernel {
    fn check_stop(&self) -> Result<(), Lost> {
        if self.stop.load(Ordering::Relaxed) {
            Err(Lost::Ended)
        } else {
            Ok(())
        }
    }

    /// Waits for a command, a fault or the end of `timeout`; whether it was for a fault.
    fn wait(&self, commands: &EventFd, faults: bool, timeout: Option<Duration>) -> bool {
        let mut fds: [BorrowedFd<'_>; 1 + WRITERS] = [commands.as_fd(); 1 + WRITERS];
        let mut count = 1;
        if faults {
            for writer in self.writers.iter().flatten().take(WRITERS) {
                fds[count] = writer.source.writing.uffd.as_fd();
                count += 1;
            }
        }
        // A failure shows in the next call on the descriptors themselves.
        let ready = wait_readable(&fds[..count], timeout).unwrap_or(true);
        let commanded = commands.drain() > 0;
        ready && !commanded
    }

    /// Sees to it that waiting waits, whatever a writer has done to a descriptor that it
    /// has kept.
    fn unblock(&self) {
        for writer in self.writers.iter().flatten() {
            let _ = writer.source.writing.uffd.unblock();
        }
    }

    /// Takes notice of who came and went; whether the loop is to be told.
    fn take_changes(&mut self, cutter: &mut Cutter) -> bool {
        let mut changed = false;
        while let Some(change) = self.traffic.changes.pop() {
            let left = match change {
                Change::Join(mut newcomer) => {
                    let slot = newcomer.slot;
                    // What stays in its place is never looked at.
                    let armed = std::mem::replace(&mut newcomer.armed, Armed::vacant());
                    let old = cutter.join(slot, armed);
                    (self.writers[slot].replace(newcomer), Some(old))
                }
                Change::Leave { slot } => {
                    cutter.forget(slot);
                    self.traffic.leaving[slot].fetch_sub(1, Ordering::Relaxed);
                    (self.writers[slot].take(), None)
                }
            };
            // Without room it is dropped here: no store waits for it any more.
            drop(self.traffic.left.push(left));
            changed = true;
        }
        changed
    }

    /// One of several writers has no memory any more.
    fn is_gone(&self, attachment: usize, lost: Lost) -> bool {
        let gone = self.cooperative && lost == Lost::Refused { errno: ESRCH };
        if gone {
            self.traffic
                .gone
                .fetch_or(1 << attachment, Ordering::Relaxed);
        }
        gone
    }

    /// One of several writers was said to leave, and has unmapped its mapping.
    fn has_left(&self, attachment: usize, lost: Lost) -> bool {
        // SYNC(leaving): pairs with the addition in `leave`.
        lost == Lost::Refused { errno: ENOENT }
            && self.traffic.leaving[attachment].load(Ordering::Acquire) > 0
    }

    fn change_protection(
        &self,
        attachment: usize,
        pages: &Range<u64>,
        call: fn(&Uffd, u64, u64) -> Result<(), SysError>,
    ) -> Result<(), Lost> {
        let Some(writer) = &self.writers[attachment] else {
            return Ok(());
        };
        let (start, len) = writer.source.address(pages);
        match call(&writer.source.writing.uffd, start, len).map_err(refused) {
            Err(lost) if self.is_gone(attachment, lost) || self.has_left(attachment, lost) => {
                Ok(())
            }
            result => result,
        }
    }
}

impl Ground for Kernel {
    type Error = Lost;

    fn protect(&mut self, attachment: usize, pages: Range<u64>) -> Result<(), Lost> {
        self.check_stop()?;
        self.change_protection(attachment, &pages, Uffd::protect)
    }

    fn lift(&mut self, attachment: usize, pages: Range<u64>) -> Result<(), Lost> {
        self.change_protection(attachment, &pages, Uffd::unprotect)
    }

    fn save(&mut self, page: u64, slot: u32) {
        let present = self.board.present();
        self.content.read_page(page, present, &mut self.buffer);
        self.board.write_slot(slot, &self.buffer[..]);
    }

    fn next_fault(&mut self) -> Result<Option<(usize, u64)>, Lost> {
        self.check_stop()?;
        for _ in 0..self.writers.len() {
            let attachment = self.turn % self.writers.len();
            let Some(writer) = &mut self.writers[attachment] else {
                self.turn = attachment + 1;
                continue;
            };
            let Source { writing, faults } = &mut writer.source;
            if faults.is_empty()
                && let Err(error) = writing.uffd.read_faults(faults)
            {
                let lost = refused(error);
                if !self.is_gone(attachment, lost) {
                    return Err(lost);
                }
                self.turn = attachment + 1;
                continue;
            }
            match faults.next() {
                Some(Fault::Protected { address }) => {
                    if faults.is_empty() {
                        // Others come first, however fast this one stores.
                        self.turn = attachment + 1;
                    }
                    let page = address.wrapping_sub(writing.base) / PAGE_SIZE;
                    if address < writing.base || page >= self.board.pages() {
                        return Err(Lost::Foreign { event: 0x12 });
                    }
                    return Ok(Some((attachment, page)));
                }
                Some(Fault::Foreign { event }) => return Err(Lost::Foreign { event }),
                None => self.turn = attachment + 1,
            }
        }
        Ok(None)
    }

    fn now_ns(&mut self) -> u64 {
        monotonic_ns()
    }
}

/// The answer of each call once the memory of the process is gone.
const ESRCH: i32 = nix::libc::ESRCH;
/// The answer if a part of the mapping is not there or not registered.
const ENOENT: i32 = nix::libc::ENOENT;

fn refused(error: SysError) -> Lost {
    Lost::Refused {
        errno: error.raw_os_error().unwrap_or(0),
    }
}

/// How a cut is made: tests have other ways than [`Cutter::cut`].
type Make = fn(&mut Cutter, &mut Kernel, bool) -> Result<Cut, Lost>;

/// The thread: serves until it is told to end or tracking is lost.
fn run(mut kernel: Kernel, mut cutter: Cutter, commands: &EventFd, events: &EventFd, make: Make) {
    let board = Arc::clone(&kernel.board);
    // Told before the userfaultfds are closed, which lets whoever waits go on.
    let _farewell = Farewell {
        board: &board,
        events,
    };
    board.prepare(|| kernel.check_stop().is_ok());
    let Err(lost) = serve(&mut kernel, &mut cutter, commands, events, make);
    board.set_lost(lost);
}

/// Tells the loop that no fault is answered any more, however the thread ends.
struct Farewell<'a> {
    board: &'a Board,
    events: &'a EventFd,
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        if self.board.lost().is_none() {
            self.board.set_lost(Lost::Ended);
        }
        self.events.ring();
    }
}

fn serve(
    kernel: &mut Kernel,
    cutter: &mut Cutter,
    commands: &EventFd,
    events: &EventFd,
    make: Make,
) -> Result<std::convert::Infallible, Lost> {
    let spin = Duration::from_micros(limits::FAULT_SPIN_US);
    let mut busy_until = Instant::now();
    let mut awaited = false;
    loop {
        kernel.check_stop()?;
        // Looked at before who came: whoever was there when it was asked for is part of it.
        let wanted = cutter.wanted();
        let told = kernel.traffic.gone.load(Ordering::Relaxed);
        if kernel.take_changes(cutter) {
            events.ring();
        }
        if let Some(wanted) = wanted {
            make(cutter, kernel, wanted.all)?;
            events.ring();
            continue;
        }
        let mut answered = 0;
        while cutter.has_room() && answered < FAULTS_PER_TURN {
            let Some((attachment, page)) = kernel.next_fault()? else {
                break;
            };
            if cutter.fault(kernel, attachment, page)? {
                events.ring();
            }
            answered += 1;
        }
        if cutter.is_starved() && cutter.retry(kernel)? {
            events.ring();
        }
        if kernel.traffic.gone.load(Ordering::Relaxed) & !told != 0 {
            events.ring();
        }
        if std::mem::take(&mut awaited) && answered == 0 {
            kernel.unblock();
        }
        if answered > 0 {
            busy_until = Instant::now() + spin;
        } else if Instant::now() < busy_until {
            std::hint::spin_loop();
        } else {
            let pause = cutter.is_starved().then_some(STARVED_PAUSE);
            awaited = kernel.wait(commands, cutter.has_room(), pause);
        }
    }
}

#[cfg(test)]
mod tests;
