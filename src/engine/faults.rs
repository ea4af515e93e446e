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
//!
//! Failure: whatever the kernel refuses ends the thread, with the reason on the board;
//! the region is then compared.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::limits;
use crate::shm::SharedMemory;
use crate::sys::SysError;
use crate::sys::net::wait_readable;
use crate::sys::process::{EventFd, monotonic_ns};
use crate::sys::uffd::{Fault, Faults, Uffd};
use crate::track::TrackError;
use crate::track::exact::{Board, Cut, Cutter, Ground, Lost};
use crate::units::PAGE_SIZE;

/// Faults answered before the commands are looked at again.
const FAULTS_PER_TURN: u32 = 256;
/// How often what waits for slots is tried again, should no event tell.
const STARVED_PAUSE: Duration = Duration::from_millis(1);
/// Bytes of a page, for buffers.
const PAGE: usize = PAGE_SIZE as usize;

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
}

/// One writing process's mapping, as the thread uses it.
#[derive(Debug)]
pub(super) struct Writing {
    /// Where faults come from; owned by nobody else.
    pub(super) uffd: Uffd,
    /// Address of the mapping in that process.
    pub(super) base: u64,
}

/// A running fault thread; ended and joined on drop.
#[derive(Debug)]
pub(super) struct FaultThread {
    board: Arc<Board>,
    commands: Arc<EventFd>,
    events: Arc<EventFd>,
    events_fd: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FaultThread {
    /// Starts the thread for all mappings of one region, whose pages are all open.
    /// `memory` is the region.
    ///
    /// # Errors
    /// [`FaultThreadError`].
    pub(super) fn start(
        board: &Arc<Board>,
        memory: SharedMemory,
        writers: Vec<Writing>,
    ) -> Result<Self, FaultThreadError> {
        Self::start_with(board, memory, writers, Cutter::cut)
    }

    fn start_with(
        board: &Arc<Board>,
        memory: SharedMemory,
        writers: Vec<Writing>,
        make: Make,
    ) -> Result<Self, FaultThreadError> {
        let commands = Arc::new(EventFd::new()?);
        let events = Arc::new(EventFd::new()?);
        let events_fd = Arc::new(events.try_clone_fd()?);
        let stop = Arc::new(AtomicBool::new(false));
        let cutter = Cutter::new(Arc::clone(board), writers.len())?;
        let kernel = Kernel {
            board: Arc::clone(board),
            memory,
            writers: writers.into_iter().map(Source::new).collect(),
            turn: 0,
            buffer: Box::new([0; PAGE]),
            stop: Arc::clone(&stop),
        };
        let (heard, told) = (Arc::clone(&commands), Arc::clone(&events));
        let thread = std::thread::Builder::new()
            .name("uffd-sync-fault".to_owned())
            .spawn(move || run(kernel, cutter, &heard, &told, make))
            .map_err(FaultThreadError::Thread)?;
        Ok(Self {
            board: Arc::clone(board),
            commands,
            events,
            events_fd,
            stop,
            thread: Some(thread),
        })
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

    /// Silences the events.
    pub(super) fn heard(&self) {
        self.events.drain();
    }

    pub(super) fn board(&self) -> &Arc<Board> {
        &self.board
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.commands.ring();
        if let Some(thread) = self.thread.take() {
            // It looks at the flag before each call: this takes one call's time.
            let _ = thread.join();
        }
    }
}

/// The ground that cuts are made on: real mappings.
struct Kernel {
    board: Arc<Board>,
    memory: SharedMemory,
    writers: Vec<Source>,
    /// Which writer is asked for faults next.
    turn: usize,
    buffer: Box<[u8; PAGE]>,
    stop: Arc<AtomicBool>,
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

    /// Waits for a command, a fault or the end of `timeout`.
    fn wait(&self, commands: &EventFd, faults: bool, timeout: Option<Duration>) {
        let mut fds: [BorrowedFd<'_>; 1 + limits::MAX_WRITERS as usize] =
            [commands.as_fd(); 1 + limits::MAX_WRITERS as usize];
        let mut count = 1;
        if faults {
            for source in self.writers.iter().take(limits::MAX_WRITERS as usize) {
                fds[count] = source.writing.uffd.as_fd();
                count += 1;
            }
        }
        // A failure shows in the next call on the descriptors themselves.
        let _ = wait_readable(&fds[..count], timeout);
        commands.drain();
    }
}

impl Ground for Kernel {
    type Error = Lost;

    fn protect(&mut self, attachment: usize, pages: Range<u64>) -> Result<(), Lost> {
        self.check_stop()?;
        let source = &self.writers[attachment];
        let (start, len) = source.address(&pages);
        source.writing.uffd.protect(start, len).map_err(refused)
    }

    fn lift(&mut self, attachment: usize, pages: Range<u64>) -> Result<(), Lost> {
        let source = &self.writers[attachment];
        let (start, len) = source.address(&pages);
        source.writing.uffd.unprotect(start, len).map_err(refused)
    }

    fn save(&mut self, page: u64, slot: u32) {
        let start = page * PAGE_SIZE;
        let read = self.memory.read(start, &mut self.buffer[..]);
        debug_assert!(read.is_ok(), "pages of the region are mapped here");
        self.board.write_slot(slot, &self.buffer[..]);
    }

    fn next_fault(&mut self) -> Result<Option<(usize, u64)>, Lost> {
        self.check_stop()?;
        for _ in 0..self.writers.len() {
            let attachment = self.turn % self.writers.len();
            let Source { writing, faults } = &mut self.writers[attachment];
            if faults.is_empty() {
                writing.uffd.read_faults(faults).map_err(refused)?;
            }
            match faults.next() {
                Some(Fault::Protected { address }) => {
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
    board.prepare();
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
    loop {
        kernel.check_stop()?;
        if let Some(wanted) = cutter.wanted() {
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
        if answered > 0 {
            busy_until = Instant::now() + spin;
        } else if Instant::now() < busy_until {
            std::hint::spin_loop();
        } else {
            let pause = cutter.is_starved().then_some(STARVED_PAUSE);
            kernel.wait(commands, cutter.has_room(), pause);
        }
    }
}

#[cfg(test)]
mod tests;
