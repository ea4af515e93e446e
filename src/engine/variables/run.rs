//! The loop of one process: one thread, one ring, the order as a value.
//!
//! ```text
//!   reap completions -> frames, commands -> Process -> actions -> sends -> wait
//! ```
//!
//! - I1: all that a turn leads to is sent by the one system call at its end.
//! - I2: while the callback is behind, nothing is received and nothing is submitted: the
//!   kernel's buffers fill, and peers wait in turn.
//! - I3: what is queued for a peer is bounded by the windows of the order; the connection
//!   of one that tells receipts of what it never took is closed.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::OperationError;
use super::commands::{Command, Commands, Frozen, LoopStatus, Submission};
use super::config::{Address, VariablesConfig};
use super::hearing::{Change, Hearing, Notice};
use super::links::{Connection, Peer};
use super::pending::{Completed, Promise};
use super::reset::ResetError;
use crate::engine::keys::{Key, Keyed};
use crate::limits;
use crate::ordered::{
    Action, Config, Delivery, Event, FRAME_HEADER_BYTES, Incarnation, Operation, OrderKind,
    Outcome, Process, ProcessId, Start, SubmitError, Subscriptions, ValueType, Variable,
    VariableId,
};
use crate::sys::SysError;
use crate::sys::ring::{Completion, Op, Ring};

/// Entries of the submission queue.
const RING_ENTRIES: u32 = 128;
/// How often pings, deadlines and dialling are looked at.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// How long a listening socket rests after a failure.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What a completion belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Listen,
    Bell,
    Recv(Key),
    Send(Key),
}

impl Token {
    pub(super) fn to_bits(self) -> u64 {
        let (kind, key) = match self {
            Self::Listen => (0, 0),
            Self::Bell => (1, 0),
            Self::Recv(key) => (2, key.to_bits()),
            Self::Send(key) => (3, key.to_bits()),
        };
        kind << Key::BITS | key
    }

    fn from_bits(bits: u64) -> Option<Self> {
        let key = Key::from_bits(bits & ((1 << Key::BITS) - 1));
        Some(match bits >> Key::BITS {
            0 => Self::Listen,
            1 => Self::Bell,
            2 => Self::Recv(key),
            3 => Self::Send(key),
            _ => return None,
        })
    }
}

/// One process with its connections. Made and run on one thread.
pub(super) struct Loop {
    pub(super) config: Arc<VariablesConfig>,
    pub(super) session: u64,
    subscriptions: Arc<Subscriptions>,
    incarnation: Incarnation,
    /// None while frozen.
    pub(super) process: Option<Process>,
    /// What was known when it was frozen.
    frozen: Frozen,
    hearing: Arc<Hearing>,
    pub(super) commands: Commands,
    pub(super) ring: Ring,
    bell: Arc<OwnedFd>,
    listener: Option<Arc<OwnedFd>>,
    listen_at: Option<Instant>,
    pub(super) connections: Keyed<Connection>,
    pub(super) peers: BTreeMap<ProcessId, Peer>,
    /// Connections with something to send.
    pub(super) unsent: Vec<Key>,
    /// Bytes that may wait to be sent over one connection.
    pub(super) most_unsent: usize,
    promises: HashMap<u64, Promise>,
    /// An operation that the window has no room for yet.
    held: Option<Submission>,
    pub(super) actions: Vec<Action>,
    pub(super) now: Instant,
    delivered: u64,
    /// Whether nothing is taken because the callback is behind.
    pub(super) stalled: bool,
    stopping: bool,
}

/// The order among peers that the configuration asks for.
pub(super) fn order_of(config: &VariablesConfig) -> OrderKind {
    match config.order {
        super::config::OrderKind::Sequencer => OrderKind::Sequencer,
        _ => OrderKind::Skeen,
    }
}

impl Loop {
    /// Makes ring, listener and process.
    pub(super) fn new(
        config: Arc<VariablesConfig>,
        subscriptions: Arc<Subscriptions>,
        incarnation: Incarnation,
        hearing: Arc<Hearing>,
        commands: Commands,
    ) -> Result<Self, super::StartError> {
        let me = ProcessId(config.process);
        let listener = match config.own_address() {
            Some(address) => Some(Arc::new(super::links::listen(address)?)),
            None => None,
        };
        let peers = subscriptions.peers(me, order_of(&config));
        let now = Instant::now();
        let peers = peers.into_iter().map(|id| {
            let address = config.address_of(id.0).cloned();
            // The one with the greater number dials.
            (id, Peer::new(address, (id < me).then_some(now)))
        });
        let mut this = Self {
            session: config.session,
            process: None,
            frozen: Frozen::default(),
            peers: peers.collect(),
            bell: Arc::new(commands.bell().try_clone_fd()?),
            ring: Ring::new(RING_ENTRIES)?,
            subscriptions,
            incarnation,
            hearing,
            commands,
            config,
            listener,
            listen_at: None,
            connections: Keyed::new(),
            unsent: Vec::new(),
            most_unsent: 0,
            promises: HashMap::new(),
            held: None,
            actions: Vec::new(),
            now,
            delivered: 0,
            stalled: false,
            stopping: false,
        };
        let process = Process::new(this.core(this.session), Start::default())?;
        this.most_unsent = most_unsent(&this.subscriptions, &process);
        this.process = Some(process);
        this.await_bell()?;
        this.accept_next();
        Ok(this)
    }

    fn core(&self, session: u64) -> Config {
        Config {
            me: ProcessId(self.config.process),
            incarnation: self.incarnation,
            session,
            subscriptions: Arc::clone(&self.subscriptions),
            order: order_of(&self.config),
            strict: self.config.strict,
        }
    }

    fn await_bell(&mut self) -> Result<(), SysError> {
        let op = Op::Poll {
            fd: Arc::clone(&self.bell),
            writable: false,
        };
        self.ring.submit(Token::Bell.to_bits(), op)
    }

    fn accept_next(&mut self) {
        let Some(socket) = &self.listener else { return };
        let op = Op::Accept {
            socket: Arc::clone(socket),
        };
        if let Err(error) = self.ring.submit(Token::Listen.to_bits(), op) {
            tracing::warn!(%error, "no connections are taken for a moment");
            self.listen_at = Some(self.now + ACCEPT_PAUSE);
        }
    }

    /// Runs until it is stopped.
    pub(super) fn run(mut self) -> Result<(), SysError> {
        let mut tick = self.now;
        while !self.stopping {
            let wait = tick.saturating_duration_since(Instant::now());
            self.ring.enter(Some(wait))?;
            self.now = Instant::now();
            while let Some(completion) = self.ring.next() {
                self.dispatch(completion)?;
            }
            self.retry_held();
            if self.now >= tick {
                tick = self.now + TICK;
                self.look_after_links();
                if self.listen_at.is_some_and(|at| at <= self.now) {
                    self.listen_at = None;
                    self.accept_next();
                }
            }
            self.flush();
        }
        Ok(())
    }

    fn dispatch(&mut self, completion: Completion) -> Result<(), SysError> {
        match Token::from_bits(completion.token) {
            Some(Token::Bell) => {
                self.commands.bell().drain();
                self.take_commands();
                self.await_bell()?;
            }
            Some(Token::Listen) => {
                match (completion.accepted, completion.result) {
                    (Some(socket), _) => self.accepted(socket),
                    (None, Err(error)) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        self.listen_at = Some(self.now + ACCEPT_PAUSE);
                        return Ok(());
                    }
                    (None, Ok(_)) => {}
                }
                self.accept_next();
            }
            Some(Token::Recv(key)) => self.received(key, completion),
            Some(Token::Send(key)) => self.sent(key, completion),
            None => {}
        }
        Ok(())
    }

    fn take_commands(&mut self) {
        while let Some(command) = self.commands.take() {
            self.obey(command);
            self.carry_out();
        }
        self.take_operations();
    }

    /// Takes operations as long as the order has room for them.
    fn take_operations(&mut self) {
        while self.held.is_none() && !self.stalled {
            let Some(submission) = self.commands.take_operation() else {
                return;
            };
            self.submit(submission);
            self.carry_out();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Dialled(peer, outcome) => self.dialled(peer, outcome),
            Command::Room => self.go_on(),
            Command::Freeze(answer) => {
                // Whoever asked may have given up.
                let _ = answer.try_send(self.freeze());
            }
            Command::Begin {
                session,
                start,
                answer,
            } => {
                let _ = answer.try_send(self.begin(session, start));
            }
            Command::Status(answer) => {
                let _ = answer.try_send(self.status());
            }
            Command::Stop => self.stopping = true,
        }
    }

    fn submit(&mut self, submission: Submission) {
        if !submission.promise.take() {
            return;
        }
        let Some(process) = &mut self.process else {
            submission.promise.complete(Err(OperationError::Frozen));
            return;
        };
        let id = VariableId(submission.variable);
        match process.submit(id, submission.operation.clone(), &mut self.actions) {
            Ok(id) => {
                self.promises.insert(id.number, submission.promise);
            }
            Err(reason @ (SubmitError::Busy { .. } | SubmitError::NotReady { .. })) => {
                submission.promise.put_back(reason);
                self.held = Some(submission);
            }
            Err(error) => submission.promise.complete(Err(error.into())),
        }
    }

    /// Takes up what waited for room, where there may be some now.
    fn retry_held(&mut self) {
        if !self.stalled
            && let Some(held) = self.held.take()
        {
            self.submit(held);
            self.carry_out();
            self.take_operations();
        }
    }

    /// Carries out what the process has decided.
    pub(super) fn carry_out(&mut self) {
        let mut actions = std::mem::take(&mut self.actions);
        while !actions.is_empty() {
            for action in actions.drain(..) {
                match action {
                    Action::Send { peer, frame } => self.queue(peer, &frame),
                    Action::Deliver(delivery) => self.deliver(delivery),
                    Action::Complete { id, outcome } => {
                        self.complete(id.number, outcome);
                    }
                    Action::Ready => tracing::info!("all peers are there"),
                    Action::Close { peer, reason } => self.refuse(peer, reason),
                    Action::Unavailable { reason } => {
                        tracing::error!(%reason, "ordered variables stopped");
                        self.hearing.deliver(Notice::Unavailable(reason));
                    }
                }
            }
            // Closing a connection may have led to more.
            std::mem::swap(&mut actions, &mut self.actions);
        }
        self.actions = actions;
        if !self.stalled && self.hearing.is_full() {
            self.stalled = true;
        }
    }

    fn deliver(&mut self, delivery: Delivery) {
        self.delivered += 1;
        if delivery.applied {
            self.hearing.deliver(Notice::Change(Change {
                key: delivery.key,
                variable: delivery.variable.0,
                old: delivery.old,
                new: delivery.new,
                swap: matches!(delivery.operation, Operation::CompareAndSwap { .. }),
                initiator: Some(delivery.key.id.initiator),
            }));
        }
    }

    fn complete(&mut self, number: u64, outcome: Outcome) {
        let Some(promise) = self.promises.remove(&number) else {
            return;
        };
        promise.complete(match outcome {
            Outcome::Ordered { key, old, applied } => Ok(Completed {
                key,
                applied,
                old: Some(old),
            }),
            Outcome::Indeterminate => Err(OperationError::Indeterminate),
        });
    }

    /// The callback has caught up.
    fn go_on(&mut self) {
        self.stalled = false;
        for key in self.connections.keys() {
            if let Some(connection) = self.connections.get_mut(key) {
                connection.heard = self.now;
            }
            self.frames_of(key);
            self.receive_next(key);
        }
        self.take_operations();
    }

    /// Ends the session here; asked again, it says the same again, since what a failed
    /// reset was told must not be lost to the next one.
    fn freeze(&mut self) -> Frozen {
        for key in self.connections.keys() {
            self.close(key, "a new session is begun");
        }
        // Dropped, they say what they know.
        self.promises.clear();
        self.held = None;
        if let Some(process) = self.process.take() {
            self.frozen = Frozen {
                session: self.session,
                last: process.progress(),
                state: process.state(),
            };
        }
        self.frozen.clone()
    }

    fn begin(&mut self, session: u64, start: Start) -> Result<(), ResetError> {
        let present = self.session;
        if session <= present {
            return Err(ResetError::Session { session, present });
        }
        let process = Process::new(self.core(session), start).map_err(super::StartError::from)?;
        self.freeze();
        let state = process.state();
        self.hearing.deliver(Notice::Resync {
            time: state.time,
            values: state
                .values
                .iter()
                .map(|(id, value)| (id.0, value.clone()))
                .collect(),
        });
        self.session = session;
        self.delivered = 0;
        self.process = Some(process);
        for peer in self.peers.values_mut() {
            peer.dial_soon(self.now);
        }
        tracing::info!(session, "a new session of the ordered variables began");
        Ok(())
    }

    fn status(&self) -> LoopStatus {
        let process = self.process.as_ref();
        let state = match process.map(Process::stop_reason) {
            None => "frozen".to_owned(),
            Some(None) if process.is_some_and(|process| !process.is_ready()) => {
                "waiting for peers".to_owned()
            }
            Some(None) => "running".to_owned(),
            Some(Some(reason)) => reason.to_string(),
        };
        LoopStatus {
            session: self.session,
            state,
            clock: process.map_or(0, Process::clock),
            delivered: self.delivered,
            last: process.and_then(Process::last_key).map(|key| key.time),
            in_flight: process.map_or(0, Process::in_flight) as u64,
            waiting: process.map_or(0, Process::waiting) as u64,
            links: self.link_states(),
        }
    }

    /// Feeds the process one event.
    pub(super) fn step(&mut self, event: Event) {
        if let Some(process) = &mut self.process {
            process.step(event, &mut self.actions);
        }
        self.carry_out();
    }
}

/// Twice what waits for a peer that keeps to its windows: the operations with their
/// values, the other messages of the link, receipts and notes.
fn most_unsent(subscriptions: &Subscriptions, process: &Process) -> usize {
    const HEADS: usize = FRAME_HEADER_BYTES + 48;
    let bytes = |one: &Variable| one.kind == ValueType::Bytes;
    let longest = if subscriptions.variables().any(bytes) {
        limits::MAX_VARIABLE_BYTES as usize
    } else {
        size_of::<i64>()
    };
    let messages = process.link_capacity();
    let operations = match process.config().order {
        OrderKind::Skeen => limits::ORDERED_WINDOW as usize,
        OrderKind::Sequencer => messages,
    };
    let notes = 2 * limits::MAX_VARIABLE_NOTE as usize;
    2 * (operations * (HEADS + 2 * longest) + messages * HEADS + notes)
}

/// The words for an address in messages.
pub(super) fn said(address: Option<&Address>) -> String {
    address.map_or_else(|| "nowhere".to_owned(), Address::to_string)
}
