//! The loop of one server: one thread, one ring, the segment worked on by nobody else.
//!
//! - I1: whatever the ring is told waits for is submitted and waited for at the end of a
//!   turn; replies are sent by a call of their own before it, so that they never wait for
//!   anything.
//! - I2: a turn is bounded by what its connections may have waiting.
//! - I3: after a turn that served somebody the ring is looked at for a while before the
//!   thread sleeps, as long as that finds requests now and then.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::commands::{Command, Commands};
use super::connection::Connection;
use super::core::Core;
use super::errands::Errands;
use super::outbox::Outbox;
use super::safety::Safety;
use super::writers::LOOK;
use crate::engine::keys::{Key, Keyed};
use crate::limits;
use crate::sys::SysError;
use crate::sys::buffer::Buffer;
use crate::sys::futex::Lifeline;
use crate::sys::ring::{Completion, MAX_IN_FLIGHT, Op, Ring};
use crate::sys::spin::Spinner;

/// Entries of the submission queue.
const RING_ENTRIES: u32 = 256;
/// The ring has room for all connections, each receiving and waiting for room to send, and
/// for what the server itself waits for: without that it would end.
const _: () = assert!(
    2 * (limits::MAX_SPACE_CLIENTS + limits::MAX_NBD_CLIENTS + limits::MAX_HALF_OPEN) + 512
        <= MAX_IN_FLIGHT as u64
);
/// How often deadlines are looked at, while there are any.
const TICK: Duration = Duration::from_millis(100);
/// Looks at the ring between two times that others may run.
const LOOKS: u32 = 64;
/// How long replies may take to go when the server ends.
const DRAIN: Duration = Duration::from_millis(500);

/// What a completion belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Door(u32),
    Bell,
    Errands,
    Recv(Key),
    Room(Key),
    /// A client that writes by mapping has died.
    Death(Key),
}

impl Token {
    pub(super) fn to_bits(self) -> u64 {
        let (kind, rest) = match self {
            Self::Door(door) => (0, u64::from(door)),
            Self::Bell => (1, 0),
            Self::Recv(key) => (2, key.to_bits()),
            Self::Room(key) => (3, key.to_bits()),
            Self::Errands => (4, 0),
            Self::Death(key) => (5, key.to_bits()),
        };
        kind << Key::BITS | rest
    }

    fn from_bits(bits: u64) -> Option<Self> {
        let rest = bits & ((1 << Key::BITS) - 1);
        Some(match bits >> Key::BITS {
            0 => Self::Door(rest as u32),
            1 => Self::Bell,
            2 => Self::Recv(Key::from_bits(rest)),
            3 => Self::Room(Key::from_bits(rest)),
            4 => Self::Errands,
            5 => Self::Death(Key::from_bits(rest)),
            _ => return None,
        })
    }
}

/// A listening socket.
pub(super) struct OpenDoor {
    pub(super) socket: Arc<OwnedFd>,
    /// Whether it is a Unix socket.
    pub(super) is_local: bool,
}

/// One server with its connections. Made and run on one thread.
pub(super) struct Loop {
    pub(super) core: Core,
    pub(super) ring: Ring,
    pub(super) doors: Vec<OpenDoor>,
    /// Doors where nothing could be accepted; tried again at the next tick.
    closed_doors: Vec<u32>,
    /// Whether the last try to accept a client failed, which was said.
    refusing: bool,
    pub(super) connections: Keyed<Connection>,
    /// In the order of their arrival; some may have greeted since, or gone.
    pub(super) half_open: VecDeque<Key>,
    /// Connections with a deadline.
    pub(super) watched: usize,
    /// Where replies are made.
    pub(super) scratch: Outbox,
    pub(super) spare: Vec<Buffer>,
    /// Whether the turn carried out what a client had sent.
    pub(super) has_served: bool,
    spinner: Spinner,
    /// Connections with more to carry out.
    pub(super) again: VecDeque<Key>,
    /// Connections with an operation that waits for a client which writes by mapping.
    blocked: BTreeSet<Key>,
    /// Connections with replies that wait for a change to be safe.
    pub(super) held: Vec<Key>,
    /// All changes up to this one are.
    pub(super) safe: u64,
    /// What clients on this host map: the segment and its stripes.
    pub(super) descriptors: Vec<Arc<OwnedFd>>,
    commands: Commands,
    bell: Arc<OwnedFd>,
    /// What other servers were asked for, and the bell of its answers.
    errands: Option<(Arc<Errands>, Arc<OwnedFd>)>,
    ends_at: Option<Instant>,
    /// Brings changes to a replica, where replies wait for that.
    pub(super) safety: Option<Safety>,
    _life: Option<Lifeline>,
}

impl Loop {
    pub(super) fn new(
        core: Core,
        doors: Vec<OpenDoor>,
        descriptors: Vec<Arc<OwnedFd>>,
        safety: Option<Safety>,
        commands: Commands,
    ) -> Result<Self, SysError> {
        let stripes = core.executor.stripes();
        let life = stripes.map(|stripes| stripes.live()).transpose()?;
        let errands = core.nbd.errands().map(|errands| {
            let bell = errands.done_bell().try_clone_fd()?;
            Ok::<_, SysError>((Arc::clone(errands), Arc::new(bell)))
        });
        let errands = errands.transpose()?;
        let mut this = Self {
            errands,
            safe: if core.card.replicated { 0 } else { u64::MAX },
            core,
            ring: Ring::new(RING_ENTRIES)?,
            closed_doors: (0..doors.len() as u32).collect(),
            refusing: false,
            doors,
            connections: Keyed::new(),
            half_open: VecDeque::new(),
            watched: 0,
            scratch: Outbox::default(),
            spare: Vec::new(),
            has_served: false,
            spinner: Spinner::new(Duration::from_micros(limits::SPACE_SPIN_US), LOOKS),
            again: VecDeque::new(),
            blocked: BTreeSet::new(),
            held: Vec::new(),
            descriptors,
            bell: Arc::new(commands.bell().try_clone_fd()?),
            commands,
            ends_at: None,
            safety,
            _life: life,
        };
        this.await_bell()?;
        this.await_errands()?;
        this.open_doors();
        Ok(this)
    }

    fn await_bell(&mut self) -> Result<(), SysError> {
        let op = Op::Poll {
            fd: Arc::clone(&self.bell),
            writable: false,
        };
        self.ring.submit(Token::Bell.to_bits(), op)
    }

    fn await_errands(&mut self) -> Result<(), SysError> {
        let Some((_, bell)) = &self.errands else {
            return Ok(());
        };
        let op = Op::Poll {
            fd: Arc::clone(bell),
            writable: false,
        };
        self.ring.submit(Token::Errands.to_bits(), op)
    }

    fn open_doors(&mut self) {
        for door in std::mem::take(&mut self.closed_doors) {
            let socket = Arc::clone(&self.doors[door as usize].socket);
            let op = Op::Accept { socket };
            if let Err(error) = self.ring.submit(Token::Door(door).to_bits(), op) {
                tracing::warn!(%error, "no clients are taken for a moment");
                self.closed_doors.push(door);
            }
        }
    }

    /// Runs until it is stopped.
    pub(super) fn run(mut self) -> Result<(), SysError> {
        let mut tick = Instant::now();
        loop {
            let wait = self.wait(tick);
            self.look_around(wait)?;
            self.ring.enter(wait)?;
            while let Some(completion) = self.ring.next() {
                self.dispatch(completion)?;
            }
            self.core.show();
            if !self.blocked.is_empty() {
                self.look_at_blocked();
            }
            for _ in 0..self.again.len() {
                if let Some(key) = self.again.pop_front() {
                    self.go_on(key);
                }
            }
            if self.needs_ticks() {
                let now = Instant::now();
                if now >= tick {
                    tick = now + TICK;
                    self.look_after(now);
                    self.open_doors();
                }
                if self
                    .ends_at
                    .is_some_and(|at| at <= now || self.is_drained())
                {
                    return Ok(());
                }
            }
        }
    }

    fn needs_ticks(&self) -> bool {
        self.watched > 0 || !self.closed_doors.is_empty() || self.ends_at.is_some()
    }

    /// How long the kernel may wait for the next completion; for ever where nothing has a
    /// deadline, which saves it the timer.
    fn wait(&self, tick: Instant) -> Option<Duration> {
        if !self.again.is_empty() {
            return Some(Duration::ZERO);
        }
        let ticks = self.needs_ticks();
        let wait = ticks.then(|| tick.saturating_duration_since(Instant::now()));
        if self.blocked.is_empty() {
            return wait;
        }
        Some(wait.map_or(LOOK, |wait| wait.min(LOOK)))
    }

    /// What came of letting one connection go on, with regard to clients that write by
    /// mapping.
    pub(super) fn mind_writers(&mut self, key: Key) {
        let Some(writers) = &mut self.core.writers else {
            return;
        };
        if writers.take_blocked() {
            self.blocked.insert(key);
        }
        for key in writers.take_gone() {
            self.ring.cancel(Token::Death(key).to_bits());
        }
        for (key, fd) in writers.take_fresh() {
            let op = Op::Poll {
                fd,
                writable: false,
            };
            // Without it the death is found when somebody waits for the client.
            if let Err(error) = self.ring.submit(Token::Death(key).to_bits(), op) {
                tracing::warn!(%error, "a client's death is not waited for");
            }
        }
    }

    /// Tries operations again that wait for clients which write by mapping.
    fn look_at_blocked(&mut self) {
        let Some(writers) = &mut self.core.writers else {
            return;
        };
        if writers.look(Instant::now()) {
            self.try_blocked();
        }
    }

    fn try_blocked(&mut self) {
        for key in std::mem::take(&mut self.blocked) {
            self.go_on(key);
        }
        if self.blocked.is_empty()
            && let Some(writers) = &mut self.core.writers
        {
            writers.rest();
        }
    }

    /// Where the next request is likely to come at once, to look for it is quicker than to
    /// be woken by it.
    fn look_around(&mut self, wait: Option<Duration>) -> Result<(), SysError> {
        let has_served = std::mem::take(&mut self.has_served);
        if !has_served || wait == Some(Duration::ZERO) {
            return Ok(());
        }
        let Self { ring, spinner, .. } = self;
        ring.enter(Some(Duration::ZERO))?;
        // What is found is taken by whoever enters the ring next.
        spinner.wait_for(|| ring.has_work().then_some(()));
        Ok(())
    }

    fn dispatch(&mut self, completion: Completion) -> Result<(), SysError> {
        match Token::from_bits(completion.token) {
            Some(Token::Recv(key)) => self.received(key, completion),
            Some(Token::Room(key)) => self.room(key),
            Some(Token::Door(door)) => {
                self.closed_doors.push(door);
                match (completion.accepted, completion.result) {
                    (Some(socket), _) => {
                        self.refusing = false;
                        self.accepted(door as usize, socket);
                    }
                    // Tried again at the next tick: out of descriptors it fails at once.
                    (None, Err(error)) => {
                        if !std::mem::replace(&mut self.refusing, true) {
                            tracing::warn!(%error, "cannot accept a client");
                        }
                        return Ok(());
                    }
                    (None, Ok(_)) => {}
                }
                if !self.core.stopping {
                    self.open_doors();
                }
            }
            Some(Token::Bell) => {
                self.commands.bell().drain();
                while let Some(command) = self.commands.take() {
                    self.obey(command);
                }
                self.await_bell()?;
            }
            Some(Token::Errands) => {
                if let Some((errands, _)) = &self.errands {
                    errands.done_bell().drain();
                }
                self.errands_done();
                self.await_errands()?;
            }
            Some(Token::Death(key)) => {
                if let Some(writers) = &mut self.core.writers {
                    writers.died(key);
                    self.try_blocked();
                }
            }
            None => {}
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Settled { change, is_safe } => self.settled(change, is_safe),
            Command::Adopt(arrived) => self.arrived(*arrived),
            Command::Stop => {
                self.core.stopping = true;
                self.ends_at = Some(Instant::now() + DRAIN);
            }
        }
    }

    fn is_drained(&self) -> bool {
        self.connections
            .iter()
            .all(|(_, one)| one.out.waiting() == 0)
    }
}
