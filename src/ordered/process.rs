//! One process that takes part: order, links, values and own operations, joined.
//!
//! [`Process::submit`] and [`Process::step`] are all that changes it; both append
//! [`Action`]s, which are to be carried out in their order.

#[cfg(test)]
mod hostile_tests;
mod receive;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::frame::{Frame, Hello, Message};
use super::ids::{Incarnation, OperationId, OrderKey, ProcessId, VariableId};
use super::link::Link;
use super::refusal::{Refusal, StopReason, SubmitError};
use super::rules::{Exact, Rules};
use super::sequencer::Sequencer;
use super::skeen::{Effect, Skeen};
use super::start::{Start, StartError, apply};
use super::subscriptions::{OrderKind, Subscriptions};
use super::value::{Operation, Value};
use crate::checksum::Digest;
use crate::limits::{ORDERED_TIME_CEILING, ORDERED_WINDOW};

/// Who a process is and what all of them agree on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// This process.
    pub me: ProcessId,
    /// This life of it: random, not 0, another one after each loss of memory.
    pub incarnation: Incarnation,
    /// The session: equal everywhere, higher each time that all start anew.
    pub session: u64,
    /// Equal everywhere; compared at the hello.
    pub subscriptions: Arc<Subscriptions>,
    /// Equal everywhere; compared at the hello.
    pub order: OrderKind,
    /// Own operations complete only once every subscriber acknowledged the commit, so
    /// that whoever is told of it by other ways comes later in the order. Costs one more
    /// one-way delay and n - 1 messages with [`OrderKind::Skeen`]; a sequencer gives it
    /// for nothing.
    pub strict: bool,
}

/// What happens to a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// There is a connection to this peer; an older one is gone.
    LinkUp {
        /// Whom it leads to.
        peer: ProcessId,
    },
    /// The connection to this peer is gone; there is no other one.
    LinkDown {
        /// Whom it led to.
        peer: ProcessId,
    },
    /// A frame came over the connection that the last [`Event::LinkUp`] told of.
    Frame {
        /// From whom.
        peer: ProcessId,
        /// What.
        frame: Frame,
    },
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send over the connection to this peer, after what was sent before.
    Send {
        /// To whom.
        peer: ProcessId,
        /// What.
        frame: Frame,
    },
    /// All peers are there and ready: operations are taken from here on. Comes once; a
    /// process without peers is ready from the start ([`Process::is_ready`]).
    Ready,
    /// The next operation of the order: log it, and call back if
    /// [`Delivery::applied`].
    Deliver(Delivery),
    /// An own operation ended.
    Complete {
        /// Which.
        id: OperationId,
        /// How.
        outcome: Outcome,
    },
    /// Close the connection to this peer; it may be dialled again.
    Close {
        /// To whom.
        peer: ProcessId,
        /// Why.
        reason: Refusal,
    },
    /// Nothing is delivered any more; comes once, after the completions that it causes.
    Unavailable {
        /// Why.
        reason: StopReason,
    },
}

/// One operation at its place in the order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Delivery {
    /// Its place; greater than that of every delivery before.
    pub key: OrderKey,
    /// The variable, which this process subscribes to.
    pub variable: VariableId,
    /// What was asked for.
    pub operation: Operation,
    /// What the variable held before.
    pub old: Value,
    /// What it holds now; equals `old` where nothing was applied, and may otherwise.
    pub new: Value,
    /// Whether it was a write, or a compare-and-swap that succeeded.
    pub applied: bool,
}

/// How an own operation ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It has its place in the order.
    Ordered {
        /// The place.
        key: OrderKey,
        /// What the variable held there before: the answer of a read.
        old: Value,
        /// Whether it was a write, or a compare-and-swap that succeeded.
        applied: bool,
    },
    /// It may have been applied elsewhere, or not; the component is unavailable.
    Indeterminate,
}

/// What is known of one peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Peer {
    link: Link,
    /// Own operations that it has to deliver, and how many of them it told delivered.
    asked: u64,
    answered: u64,
    /// The greatest number of an operation that it sent.
    number: u64,
    /// Its operations that wait here, were delivered here, and were told so.
    waiting: u64,
    delivered: u64,
    told: u64,
}

/// An own operation that has not completed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Own {
    variable: VariableId,
    /// Bits of the subscribers whose acknowledgement of the commit is waited for.
    missing: u32,
    outcome: Option<Outcome>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Ordering<R> {
    Skeen(Skeen<R>),
    Sequencer(Sequencer),
}

/// One process; see the [module](super).
///
/// Memory: values of its variables, and for each peer at most `6 * ORDERED_WINDOW`
/// messages (with a sequencer `(processes + 3) * ORDERED_WINDOW`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Process<R = Exact> {
    config: Config,
    start: Start,
    configuration: Digest,
    ordering: Ordering<R>,
    peers: BTreeMap<ProcessId, Peer>,
    values: BTreeMap<VariableId, Value>,
    own: BTreeMap<u64, Own>,
    number: u64,
    last: Option<OrderKey>,
    /// Whether all peers have been there in this life: messages are taken.
    greeted: bool,
    /// Whether all of them said the same: operations are taken.
    ready: bool,
    stopped: Option<StopReason>,
}

impl Process<Exact> {
    /// A process at the start of a session, without connections.
    ///
    /// # Errors
    /// [`StartError`] for an incarnation of 0 and start values that do not fit.
    pub fn new(config: Config, start: Start) -> Result<Self, StartError> {
        Self::with_rules(config, start)
    }
}

impl<R: Rules> Process<R> {
    /// [`Process::new`] under rules of which some may be broken, for models.
    ///
    /// # Errors
    /// As for [`Process::new`].
    pub fn with_rules(config: Config, mut start: Start) -> Result<Self, StartError> {
        if config.incarnation.0 == 0 {
            return Err(StartError::Incarnation);
        }
        let (me, subscriptions) = (config.me, &config.subscriptions);
        start.check(subscriptions)?;
        let values: BTreeMap<_, _> = subscriptions
            .of(me)
            .map(|v| (v.id, start.value(v)))
            .collect();
        start.values.clone_from(&values);
        let capacity = link_capacity(config.order, subscriptions);
        let peers = subscriptions.peers(me, config.order);
        let peers = peers
            .into_iter()
            .map(|peer| (peer, Peer::new(peer, capacity)));
        let peers: BTreeMap<_, _> = peers.collect();
        Ok(Self {
            configuration: subscriptions.digest(config.order),
            ordering: match config.order {
                OrderKind::Skeen => Ordering::Skeen(Skeen::new(me, start.time)),
                OrderKind::Sequencer => {
                    Ordering::Sequencer(Sequencer::new::<R>(me, start.time, subscriptions))
                }
            },
            greeted: peers.is_empty(),
            ready: peers.is_empty(),
            peers,
            values,
            own: BTreeMap::new(),
            number: 0,
            last: None,
            stopped: None,
            config,
            start,
        })
    }

    /// Begins an operation; [`Action::Complete`] ends it, which may already be among the
    /// `actions` of this call.
    ///
    /// # Errors
    /// [`SubmitError`]; then nothing of it was sent.
    pub fn submit(
        &mut self,
        variable: VariableId,
        operation: Operation,
        actions: &mut Vec<Action>,
    ) -> Result<OperationId, SubmitError> {
        let subscriptions = Arc::clone(&self.config.subscriptions);
        let found = subscriptions.check(self.config.me, variable)?;
        operation.check(variable, found.kind)?;
        if let Some(reason) = self.stopped {
            return Err(reason.into());
        }
        if self.clock() >= ORDERED_TIME_CEILING - 2 {
            let process = self.config.me;
            let reason = StopReason::ClockExhausted { process };
            self.stop(reason, actions);
            return Err(reason.into());
        }
        if !self.ready {
            let missing = self.missing_peer().unwrap_or(self.config.me);
            return Err(SubmitError::NotReady { missing });
        }
        self.check_window(&found.subscribers)?;
        self.number += 1;
        let id = OperationId {
            initiator: self.config.me,
            incarnation: self.config.incarnation,
            number: self.number,
        };
        for subscriber in &found.subscribers {
            if let Some(peer) = self.peers.get_mut(subscriber) {
                peer.asked += 1;
            }
        }
        let strict = self.config.strict && self.config.order == OrderKind::Skeen;
        let others = found.bits() & !found.bit(self.config.me).unwrap_or(0);
        let own = Own {
            variable,
            missing: if strict { others } else { 0 },
            outcome: None,
        };
        self.own.insert(id.number, own);
        let mut effects = Vec::new();
        match &mut self.ordering {
            Ordering::Skeen(skeen) => skeen.submit(id, found, operation, strict, &mut effects),
            Ordering::Sequencer(counting) => {
                counting.submit(id, found, operation, &mut effects);
            }
        }
        self.carry_out(effects, actions);
        Ok(id)
    }

    /// One event; what it leads to is appended to `actions`.
    pub fn step(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::LinkUp { peer } => self.link_up(peer, actions),
            Event::LinkDown { peer } => {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.link.disconnected();
                }
            }
            Event::Frame { peer, frame } => {
                if let Err(reason) = self.receive(peer, frame, actions) {
                    if let Some(peer) = self.peers.get_mut(&peer) {
                        peer.link.disconnected();
                    }
                    actions.push(Action::Close { peer, reason });
                }
            }
        }
    }

    /// What `variable` holds here after the last delivery: sequentially consistent, not
    /// linearisable.
    ///
    /// # Errors
    /// [`SubmitError::NotSubscribed`] and [`SubmitError::NoVariable`].
    pub fn value(&self, variable: VariableId) -> Result<&Value, SubmitError> {
        self.config.subscriptions.check(self.config.me, variable)?;
        self.values
            .get(&variable)
            .ok_or(SubmitError::NoVariable { variable })
    }

    /// What this process knows, for the start of the next session
    /// ([`merge_states`](super::merge_states)).
    pub fn state(&self) -> Start {
        Start {
            time: self.clock(),
            values: self.values.clone(),
        }
    }

    /// What it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The last delivered key; none before the first delivery of the session.
    pub fn last_key(&self) -> Option<OrderKey> {
        self.last
    }

    /// How far it is in the order, to be compared by [`merge_states`](super::merge_states):
    /// the last delivered key, or the place before all keys of this session where it began
    /// from known values; none where it knows of nothing. Its clock would not do, which
    /// operations raise long before they are delivered.
    pub fn progress(&self) -> Option<OrderKey> {
        let began = (self.start.time > 0).then(|| OrderKey {
            time: self.start.time,
            id: OperationId::default(),
        });
        self.last.or(began)
    }

    /// Why nothing is delivered any more, if so.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.stopped
    }

    /// The latest logical time known here.
    pub fn clock(&self) -> u64 {
        match &self.ordering {
            Ordering::Skeen(skeen) => skeen.clock(),
            Ordering::Sequencer(counting) => counting.clock(),
        }
    }

    /// Whom it needs a link to, by number.
    pub fn peers(&self) -> impl Iterator<Item = ProcessId> {
        self.peers.keys().copied()
    }

    /// Whether operations are taken: all peers have been there and ready in this life,
    /// and nobody lost its memory.
    pub fn is_ready(&self) -> bool {
        self.ready && self.stopped.is_none()
    }

    /// A peer that has not been there, or not said that it is ready.
    pub fn missing_peer(&self) -> Option<ProcessId> {
        let mut peers = self.peers.iter();
        peers
            .find(|(_, peer)| !peer.link.is_ready())
            .map(|(id, _)| *id)
    }

    /// Whether a connection to `peer` is there and both hellos were exchanged.
    pub fn is_linked(&self, peer: ProcessId) -> bool {
        self.peers.get(&peer).is_some_and(|peer| peer.link.is_up())
    }

    /// Messages that are kept for one peer at most, until it told their receipt.
    pub fn link_capacity(&self) -> usize {
        link_capacity(self.config.order, &self.config.subscriptions)
    }

    /// Own operations that have not completed; at most [`ORDERED_WINDOW`].
    pub fn in_flight(&self) -> usize {
        self.own.len()
    }

    /// Operations of all processes that wait for their turn here.
    pub fn waiting(&self) -> usize {
        match &self.ordering {
            Ordering::Skeen(skeen) => skeen.pending(),
            Ordering::Sequencer(_) => 0,
        }
    }

    /// Whether a connection that begins with `hello` may take the place of the one that
    /// is there; changes nothing. A hello of another life is taken: it stops all.
    ///
    /// # Errors
    /// [`Refusal`], as the frame itself would be refused.
    pub fn check_hello(&self, hello: &Hello) -> Result<(), Refusal> {
        let me = (self.config.me, self.config.incarnation);
        self.compare(hello.process, hello)?;
        let unknown = Refusal::NotAPeer {
            process: hello.process,
            me: self.config.me,
        };
        let peer = self.peers.get(&hello.process).ok_or(unknown)?;
        peer.link.judge(hello, me, self.greeted).map(|_| ())
    }

    /// Refuses an operation as long as too many are under way.
    fn check_window(&self, subscribers: &[ProcessId]) -> Result<(), SubmitError> {
        let me = self.config.me;
        if self.own.len() as u64 >= ORDERED_WINDOW {
            return Err(SubmitError::Busy { behind: me });
        }
        for behind in subscribers {
            let Some(peer) = self.peers.get(behind) else {
                continue;
            };
            let open = peer.asked - peer.answered;
            if open >= ORDERED_WINDOW || !peer.link.has_room() {
                return Err(SubmitError::Busy { behind: *behind });
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, effects: Vec<Effect>, actions: &mut Vec<Action>) {
        for effect in effects {
            match effect {
                Effect::Send(to, message) => self.send(to, message, actions),
                Effect::Spread(variable, message) => {
                    let subscriptions = Arc::clone(&self.config.subscriptions);
                    let found = subscriptions.variable(variable);
                    let all = found.map_or(&[][..], |found| &found.subscribers);
                    let me = self.config.me;
                    for &to in all.iter().filter(|to| **to != me) {
                        self.send(to, message.clone(), actions);
                    }
                }
                Effect::Deliver(key, variable, operation) => {
                    self.deliver(key, variable, operation, actions);
                }
            }
        }
    }

    fn send(&mut self, to: ProcessId, message: Message, actions: &mut Vec<Action>) {
        if let Some(peer) = self.peers.get_mut(&to)
            && let Some(frame) = peer.link.send(message)
        {
            actions.push(Action::Send { peer: to, frame });
        }
    }

    fn deliver(
        &mut self,
        key: OrderKey,
        variable: VariableId,
        operation: Operation,
        actions: &mut Vec<Action>,
    ) {
        let Some(value) = self.values.get_mut(&variable) else {
            return;
        };
        let (applied, old) = apply(value, &operation);
        let delivery = Delivery {
            key,
            variable,
            operation,
            old: old.clone(),
            new: value.clone(),
            applied,
        };
        actions.push(Action::Deliver(delivery));
        self.last = Some(key);
        if key.id.initiator == self.config.me {
            if let Some(own) = self.own.get_mut(&key.id.number) {
                own.outcome = Some(Outcome::Ordered { key, old, applied });
            }
            self.complete(key.id, actions);
        } else {
            self.count_delivery(key.id.initiator, actions);
        }
    }

    /// Opens the initiator's window, a quarter of it at a time.
    fn count_delivery(&mut self, initiator: ProcessId, actions: &mut Vec<Action>) {
        let Some(peer) = self.peers.get_mut(&initiator) else {
            return;
        };
        peer.waiting = peer.waiting.saturating_sub(1);
        peer.delivered += 1;
        if peer.delivered - peer.told >= ORDERED_WINDOW / 4 {
            peer.told = peer.delivered;
            let count = peer.delivered;
            self.send(initiator, Message::Delivered { count }, actions);
        }
    }

    /// Completes an own operation that was delivered and acknowledged.
    fn complete(&mut self, id: OperationId, actions: &mut Vec<Action>) {
        let done = |own: &&Own| own.missing == 0 && own.outcome.is_some();
        if self.own.get(&id.number).filter(done).is_none() {
            return;
        }
        if let Some(outcome) = self.own.remove(&id.number).and_then(|own| own.outcome) {
            actions.push(Action::Complete { id, outcome });
        }
    }

    /// Ends everything: what is under way has an unknown outcome.
    fn stop(&mut self, reason: StopReason, actions: &mut Vec<Action>) {
        if self.stopped.is_some() {
            return;
        }
        self.stopped = Some(reason);
        for (peer, known) in &mut self.peers {
            // Behind our hello, whether or not the other one has come yet.
            if known.link.is_connected() {
                let frame = Frame::Stopped { reason };
                actions.push(Action::Send { peer: *peer, frame });
            }
        }
        for number in std::mem::take(&mut self.own).into_keys() {
            let id = OperationId {
                initiator: self.config.me,
                incarnation: self.config.incarnation,
                number,
            };
            let outcome = Outcome::Indeterminate;
            actions.push(Action::Complete { id, outcome });
        }
        actions.push(Action::Unavailable { reason });
    }
}

fn link_capacity(order: OrderKind, subscriptions: &Subscriptions) -> usize {
    let windows = match order {
        OrderKind::Skeen => 5,
        OrderKind::Sequencer => subscriptions.processes().len() as u64 + 2,
    };
    (windows * ORDERED_WINDOW) as usize
}

impl Peer {
    fn new(peer: ProcessId, capacity: usize) -> Self {
        Self {
            link: Link::new(peer, capacity),
            asked: 0,
            answered: 0,
            number: 0,
            waiting: 0,
            delivered: 0,
            told: 0,
        }
    }
}
