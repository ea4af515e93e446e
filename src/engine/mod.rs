//! The loop that joins the kernel to the protocols: one thread, one ring.
//!
//! ```text
//!            control sockets        doorbells, pidfds      TCP to other nodes
//!                  |                        |                     |
//!   turn:   reap completions  ->  timers  ->  work in slices  ->  send  ->  wait
//!                  |                        |                     |
//!              requests              captures, applies      frames in and out
//! ```
//!
//! I1. A turn reaps first and acts after; work beyond one slice waits for the next turn,
//!     so one region's gigabyte does not hold up another's commit.
//! I2. A completion whose owner is gone finds nothing (`keys`): it is dropped.
//! I3. Nothing here blocks but the wait at the end of a turn.
//!
//! A failure of one connection or region ends that one and is logged; a failure of
//! the ring ends the loop with an error.

mod apply;
mod audit;
mod commands;
mod control;
mod crew;
mod cuts;
mod dial;
mod exports;
mod faults;
mod framing;
mod hand_over;
mod held;
mod idle;
mod inbound;
mod keys;
mod losses;
mod nbd_figures;
mod peers;
mod regions;
mod requests;
mod sources;
pub mod space;
pub mod space_file;
mod status;
mod timers;
mod tracked;
pub mod variables;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use commands::Command;
pub use commands::{CommandError, Commands, Tunables};
use control::ControlConnection;
use cuts::WaitsForCut;
pub use exports::{Changes, Exported};
use idle::Idle;
use keys::{Key, Keyed};
pub use nbd_figures::{Counted, NbdFigures, Seat};
use peers::Peer;
use regions::RegionEntry;
use space::SpaceWatch;
use timers::{Timer, Timers};

use crate::limits;
use crate::region::{Pulse, PulseHolder, RegionError};
use crate::replicate::Spare;
use crate::sys::SysError;
use crate::sys::behaviour::Behaviour;
use crate::sys::buffer::Pool;
use crate::sys::net;
use crate::sys::process::SignalFd;
use crate::sys::ring::{Completion, Op, Ring};
use crate::words::{LossKind, RegionName};

/// Entries of the submission queue; the ring flushes when it is full.
const RING_ENTRIES: u32 = 256;

/// How long a listening socket rests after a failure.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a loop needs to know before it starts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The node's name, as other nodes see it.
    pub name: String,
    /// Path of the control socket; none for an engine that only serves adopted connections.
    pub socket: Option<PathBuf>,
    /// Address for followers; none for no TCP.
    pub listen: Option<SocketAddr>,
    /// Bytes of one update that are staged before it is applied.
    pub staging_budget: u64,
    /// Whether `SIGTERM`, `SIGINT` and `SIGHUP` are taken as events.
    pub signals: bool,
    /// Where connections that ask for ordered variables are handed over; none for a node
    /// without variables.
    pub variables: Option<SyncSender<OwnedFd>>,
    /// The segment that this process lends, once it does; for the status.
    pub space: Arc<OnceLock<SpaceWatch>>,
    /// What NBD clients do, where regions are exported to them; for the status, and a
    /// reason to keep what was changed when.
    pub nbd: Option<Arc<NbdFigures>>,
    /// What can change later.
    pub tunables: Tunables,
}

/// Reads the settings that may change anew, when `SIGHUP` asks for it.
pub type Reloader = Box<dyn FnMut() -> Option<Tunables> + Send>;

/// Why a loop could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The control socket could not be made.
    #[error("cannot serve the control socket {path}", path = path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// The address for followers could not be taken.
    #[error("cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// io_uring, an eventfd or a signalfd is missing.
    #[error("the engine's loop cannot run; `uffd-sync doctor` says what is missing")]
    Kernel(#[from] SysError),
    /// The page that tells of the engine's life could not be made.
    #[error("the engine's liveness page cannot be made")]
    Pulse(#[from] RegionError),
}

/// What a completion belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    UnixAccept,
    TcpAccept,
    Signals,
    Commands,
    Control(Key),
    ControlWritable(Key),
    PeerRecv(Key),
    PeerSend(Key),
    PeerConnect(Key),
    Doorbell(Key),
    WriterExit(Key),
    Faults(Key),
    /// A writer of a cooperative region, by its slot.
    MemberExit(u8, Key),
}

/// Tokens of this kind and the next ones: one for each slot of a cooperative region.
const MEMBER_EXIT: u64 = 0x40;
const MEMBER_EXIT_END: u64 = MEMBER_EXIT + limits::MAX_WRITERS;

impl Token {
    fn to_bits(self) -> u64 {
        let (kind, key) = match self {
            Self::UnixAccept => (0, None),
            Self::TcpAccept => (1, None),
            Self::Signals => (2, None),
            Self::Commands => (3, None),
            Self::Control(key) => (4, Some(key)),
            Self::ControlWritable(key) => (5, Some(key)),
            Self::PeerRecv(key) => (6, Some(key)),
            Self::PeerSend(key) => (7, Some(key)),
            Self::PeerConnect(key) => (8, Some(key)),
            Self::Doorbell(key) => (9, Some(key)),
            Self::WriterExit(key) => (10, Some(key)),
            Self::Faults(key) => (11, Some(key)),
            Self::MemberExit(slot, key) => (MEMBER_EXIT + u64::from(slot), Some(key)),
        };
        kind << Key::BITS | key.map_or(0, Key::to_bits)
    }

    fn from_bits(bits: u64) -> Option<Self> {
        let key = Key::from_bits(bits & ((1 << Key::BITS) - 1));
        Some(match bits >> Key::BITS {
            0 => Self::UnixAccept,
            1 => Self::TcpAccept,
            2 => Self::Signals,
            3 => Self::Commands,
            4 => Self::Control(key),
            5 => Self::ControlWritable(key),
            6 => Self::PeerRecv(key),
            7 => Self::PeerSend(key),
            8 => Self::PeerConnect(key),
            9 => Self::Doorbell(key),
            10 => Self::WriterExit(key),
            11 => Self::Faults(key),
            kind @ MEMBER_EXIT..MEMBER_EXIT_END => {
                Self::MemberExit((kind - MEMBER_EXIT) as u8, key)
            }
            _ => return None,
        })
    }
}

/// Counters of one loop.
#[derive(Debug, Default)]
struct Counters {
    turns: u64,
    longest_turn: Duration,
    bytes_sent: u64,
    bytes_received: u64,
}

/// One node's loop with all that it serves. Made and run on one thread.
pub struct Engine {
    settings: Settings,
    node_id: [u8; 16],
    started: Instant,
    now: Instant,
    ring: Ring,
    unix: Option<Arc<OwnedFd>>,
    tcp: Option<Arc<OwnedFd>>,
    listen: Option<SocketAddr>,
    signals: Option<(SignalFd, Arc<OwnedFd>)>,
    reloader: Option<Reloader>,
    commands: Commands,
    command_bell: Arc<OwnedFd>,
    /// Read-only, for those who have to notice this engine's death.
    pulse: OwnedFd,
    _life: PulseHolder,
    controls: Keyed<ControlConnection>,
    peers: Keyed<Peer>,
    regions: Keyed<RegionEntry>,
    /// Connections whose request for a cut is not answered yet.
    cuts: Vec<WaitsForCut>,
    names: HashMap<RegionName, Key>,
    next_handle: u32,
    timers: Timers,
    runnable: VecDeque<Key>,
    /// Connections whose apply is complete, or whose frames waited for the next turn:
    /// they are taken at the end of a turn.
    resumed: Vec<Key>,
    counters: Counters,
    /// What the kernel's scans do: modes that rely on something else are refused.
    behaviour: &'static Behaviour,
    /// What bulk is received into.
    pool: Pool,
    /// What bulk is sent from.
    spare: Spare,
    stopping: Option<Instant>,
    /// Regions with audit work left.
    audits: VecDeque<Key>,
    /// Whether a timer for it is set.
    auditing: bool,
    /// Listening sockets that take nothing for a moment.
    deaf: Vec<Token>,
    /// Regions that sleep, and their writers.
    idle: Idle,
}

impl Engine {
    /// Makes the ring, the sockets and the liveness page.
    ///
    /// # Errors
    /// Which of them is not to be had, and why.
    pub fn new(
        settings: Settings,
        commands: Commands,
        reloader: Option<Reloader>,
    ) -> Result<Self, EngineError> {
        let signals = if settings.signals {
            let signals =
                SignalFd::block(&[nix::libc::SIGTERM, nix::libc::SIGINT, nix::libc::SIGHUP])?;
            let fd = Arc::new(signals.try_clone_fd()?);
            Some((signals, fd))
        } else {
            None
        };
        let unix = settings.socket.as_ref().map(|path| {
            net::unix_listen(path).map_err(|source| EngineError::Socket {
                path: path.clone(),
                source,
            })
        });
        let unix = unix.transpose()?.map(Arc::new);
        let tcp = settings.listen.map(|addr| {
            net::tcp_listen(addr).map_err(|source| EngineError::Listen { addr, source })
        });
        let tcp = tcp.transpose()?.map(Arc::new);
        let listen = tcp.as_ref().map(net::local_addr).transpose()?;
        let (life, pulse) = Pulse::create()?;
        let mut node_id = [0; 16];
        crate::words::Generation::random()
            .0
            .to_le_bytes()
            .clone_into(&mut node_id);
        let now = Instant::now();
        let mut engine = Self {
            node_id,
            started: now,
            now,
            ring: Ring::new(RING_ENTRIES)?,
            unix,
            tcp,
            listen,
            signals,
            reloader,
            command_bell: Arc::new(commands.bell().try_clone_fd()?),
            commands,
            pulse,
            _life: life,
            controls: Keyed::new(),
            peers: Keyed::new(),
            regions: Keyed::new(),
            cuts: Vec::new(),
            names: HashMap::new(),
            next_handle: 1,
            timers: Timers::default(),
            runnable: VecDeque::new(),
            resumed: Vec::new(),
            counters: Counters::default(),
            behaviour: Behaviour::of_process(),
            // As much again as one update: what is applied is not free yet while the next comes.
            pool: Pool::new(limits::MAX_BODY, 2 * settings.staging_budget),
            spare: Spare::default(),
            stopping: None,
            audits: VecDeque::new(),
            auditing: false,
            deaf: Vec::new(),
            idle: Idle::default(),
            settings,
        };
        engine.start()?;
        Ok(engine)
    }

    /// Address that followers connect to, with the real port.
    pub fn listen_address(&self) -> Option<SocketAddr> {
        self.listen
    }

    /// Serves until `SIGTERM`, `SIGINT` or [`Commands::stop`], then drains for at
    /// most [`limits::DRAIN_DEADLINE_MS`].
    ///
    /// # Errors
    /// If the ring itself fails.
    pub fn run(mut self) -> Result<(), EngineError> {
        while !self.finished() {
            self.turn()?;
        }
        self.close();
        Ok(())
    }

    fn start(&mut self) -> Result<(), EngineError> {
        for token in [Token::UnixAccept, Token::TcpAccept] {
            self.accept_next(token)?;
        }
        if let Some((_, fd)) = &self.signals {
            let op = Op::Poll {
                fd: Arc::clone(fd),
                writable: false,
            };
            self.ring.submit(Token::Signals.to_bits(), op)?;
        }
        let op = Op::Poll {
            fd: Arc::clone(&self.command_bell),
            writable: false,
        };
        self.ring.submit(Token::Commands.to_bits(), op)?;
        self.timers
            .set(self.now + Duration::from_secs(1), Timer::Sweep);
        self.follow_all(&self.settings.tunables.follow.clone());
        Ok(())
    }

    /// Takes the next connection of a listening socket, unless the node is stopping.
    fn accept_next(&mut self, token: Token) -> Result<(), SysError> {
        let socket = match token {
            Token::UnixAccept => &self.unix,
            _ => &self.tcp,
        };
        if let Some(socket) = socket
            && self.stopping.is_none()
        {
            let op = Op::Accept {
                socket: Arc::clone(socket),
            };
            self.ring.submit(token.to_bits(), op)?;
        }
        Ok(())
    }

    /// A connection could not be taken, for want of descriptors most likely: the next
    /// attempt waits, since the kernel would refuse it at once as well.
    fn accept_later(&mut self, token: Token, error: &std::io::Error) {
        tracing::warn!(%error, "cannot accept a connection");
        if !self.deaf.contains(&token) {
            self.deaf.push(token);
            self.timers.set(self.now + ACCEPT_PAUSE, Timer::Listen);
        }
    }

    fn listen_again(&mut self) {
        for token in std::mem::take(&mut self.deaf) {
            if let Err(error) = self.accept_next(token) {
                self.accept_later(token, &std::io::Error::other(error));
            }
        }
    }

    fn turn(&mut self) -> Result<(), EngineError> {
        let wait = if self.runnable.is_empty() && self.resumed.is_empty() {
            let next = self
                .timers
                .next()
                .map(|at| at.saturating_duration_since(Instant::now()));
            next.unwrap_or(Duration::from_secs(1))
        } else {
            Duration::ZERO
        };
        self.ring.enter(Some(wait))?;
        self.now = Instant::now();
        while let Some(completion) = self.ring.next() {
            self.dispatch(completion)?;
        }
        while let Some(timer) = self.timers.pop_due(self.now) {
            self.fire(timer);
        }
        self.work();
        self.resume_peers();
        self.counters.turns += 1;
        self.counters.longest_turn = self.counters.longest_turn.max(self.now.elapsed());
        if !self.runnable.is_empty() {
            // Bulk work goes on: whoever waits for this core, a writer or a reader that
            // was just woken, goes first instead of after the scheduler's slice.
            std::thread::yield_now();
        }
        Ok(())
    }

    fn dispatch(&mut self, completion: Completion) -> Result<(), EngineError> {
        let Some(token) = Token::from_bits(completion.token) else {
            return Ok(());
        };
        match token {
            Token::UnixAccept => self.accepted_control(completion)?,
            Token::TcpAccept => self.accepted_peer(completion)?,
            Token::Signals => self.take_signals()?,
            Token::Commands => self.take_commands()?,
            Token::Control(key) => self.control_readable(key),
            Token::ControlWritable(key) => self.control_writable(key),
            Token::PeerRecv(key) => self.peer_received(key, completion),
            Token::PeerSend(key) => self.peer_sent(key, completion),
            Token::PeerConnect(key) => self.peer_connected(key, completion),
            Token::Doorbell(key) => self.doorbell_rang(key),
            Token::WriterExit(key) => self.writer_left(key, LossKind::WriterExited),
            Token::Faults(key) => self.faults_rang(key),
            Token::MemberExit(slot, key) => self.member_exited(key, slot.into()),
        }
        Ok(())
    }

    /// Whether this turn has used up its slice: what can wait is left to the next.
    fn is_late(&self) -> bool {
        self.now.elapsed() >= Duration::from_micros(limits::SLICE_US)
    }

    fn fire(&mut self, timer: Timer) {
        match timer {
            Timer::Region(key) => self.region_timer(key),
            Timer::Peer(key) => self.peer_timer(key),
            Timer::Dial(key) => self.dial_due(key),
            Timer::Listen => self.listen_again(),
            Timer::Audit => self.audit(),
            Timer::Cuts => self.refuse_late_cuts(),
            Timer::Idle => self.look_at_writers(),
            Timer::Sweep => {
                self.sweep();
                self.begin_audit();
                self.timers
                    .set(self.now + Duration::from_secs(1), Timer::Sweep);
            }
        }
    }

    /// One slice of captures and applies: each region in turn gets one step until
    /// the slice is used up or nothing is left.
    fn work(&mut self) {
        let end = self.now + Duration::from_micros(limits::SLICE_US);
        for _ in 0..self.runnable.len() {
            let Some(key) = self.runnable.pop_front() else {
                break;
            };
            let Some(entry) = self.regions.get_mut(key) else {
                continue;
            };
            entry.queued = false;
            self.work_on(key);
            if Instant::now() >= end {
                break;
            }
        }
    }

    /// Puts a region into the queue of those with work, once.
    fn make_runnable(&mut self, key: Key) {
        if let Some(entry) = self.regions.get_mut(key)
            && !entry.queued
        {
            entry.queued = true;
            self.runnable.push_back(key);
        }
    }

    fn take_signals(&mut self) -> Result<(), EngineError> {
        let Some((signals, fd)) = &self.signals else {
            return Ok(());
        };
        let mut taken = Vec::new();
        while let Some(signal) = signals.read()? {
            taken.push(signal);
        }
        let op = Op::Poll {
            fd: Arc::clone(fd),
            writable: false,
        };
        self.ring.submit(Token::Signals.to_bits(), op)?;
        for signal in taken {
            if signal == nix::libc::SIGHUP {
                match self.reloader.as_mut().and_then(|reload| reload()) {
                    Some(tunables) => self.reload(tunables),
                    None => tracing::info!("nothing to reload"),
                }
            } else {
                tracing::info!(signal, "draining");
                self.begin_stop();
            }
        }
        Ok(())
    }

    fn take_commands(&mut self) -> Result<(), EngineError> {
        self.commands.bell().drain();
        let op = Op::Poll {
            fd: Arc::clone(&self.command_bell),
            writable: false,
        };
        self.ring.submit(Token::Commands.to_bits(), op)?;
        while let Some(command) = self.commands.take() {
            match command {
                Command::Adopt(socket) => self.adopt_control(socket),
                Command::Reload(tunables) => self.reload(tunables),
                Command::Resolved(key, addresses) => self.resolved(key, addresses),
                Command::Status(answer, waiting) => {
                    let _ = answer.push(self.status());
                    waiting.unpark();
                }
                Command::Regions(answer, waiting) => {
                    let _ = answer.push(self.exported());
                    waiting.unpark();
                }
                Command::Stop => self.begin_stop(),
            }
        }
        Ok(())
    }

    fn reload(&mut self, tunables: Tunables) {
        // Old ones first: a local name may get another source.
        for spec in self.settings.tunables.follow.clone() {
            if !tunables.follow.contains(&spec) {
                self.stop_following(&spec);
            }
        }
        self.follow_all(&tunables.follow);
        self.settings.tunables = tunables;
        self.retune();
        tracing::info!("settings reloaded");
    }

    fn begin_stop(&mut self) {
        if self.stopping.is_some() {
            return;
        }
        let bound = Duration::from_millis(limits::DRAIN_DEADLINE_MS);
        self.stopping = Some(self.now + bound);
        self.timers.set(self.now + bound, Timer::Sweep);
        self.capture_everything();
    }

    /// Whether the loop was told to end and either nothing is pending or time is up.
    fn finished(&self) -> bool {
        self.stopping
            .is_some_and(|deadline| Instant::now() >= deadline || self.drained())
    }

    fn close(&mut self) {
        if let Some(path) = self.unix.as_ref().and(self.settings.socket.as_ref()) {
            // The path may be another node's by now only if somebody removed ours.
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove the control socket");
            }
        }
        tracing::info!("stopped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_ring() {
        let key = Keyed::new().insert(());
        for token in [
            Token::UnixAccept,
            Token::TcpAccept,
            Token::Signals,
            Token::Commands,
            Token::Control(key),
            Token::ControlWritable(key),
            Token::PeerRecv(key),
            Token::PeerSend(key),
            Token::PeerConnect(key),
            Token::Doorbell(key),
            Token::WriterExit(key),
            Token::Faults(key),
            Token::MemberExit(0, key),
            Token::MemberExit(31, key),
        ] {
            assert_eq!(Token::from_bits(token.to_bits()), Some(token));
        }
        assert_eq!(Token::from_bits(u64::MAX), None);
    }
}
