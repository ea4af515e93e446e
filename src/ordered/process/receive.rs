//! What a peer's frame leads to: every check stands before the first change.

use super::{Action, Ordering, Process};
use crate::limits::ORDERED_WINDOW;
use crate::ordered::frame::{Frame, Hello, Message};
use crate::ordered::ids::{OperationId, OrderKey, ProcessId, VariableId};
use crate::ordered::link::Greeting;
use crate::ordered::refusal::{Refusal, StopReason};
use crate::ordered::rules::Rules;
use crate::ordered::skeen::Effect;
use crate::ordered::subscriptions::{Subscriptions, Variable};
use crate::ordered::value::Operation;

impl<R: Rules> Process<R> {
    pub(super) fn link_up(&mut self, peer: ProcessId, actions: &mut Vec<Action>) {
        let me = self.config.me;
        let Some(known) = self.peers.get_mut(&peer) else {
            let reason = Refusal::NotAPeer { process: peer, me };
            actions.push(Action::Close { peer, reason });
            return;
        };
        known.link.connected(self.greeted);
        let hello = Hello {
            process: me,
            to: peer,
            incarnation: self.config.incarnation,
            session: self.config.session,
            ready: self.greeted,
            known: known.link.life().filter(|_| self.greeted),
            received: known.link.received(),
            configuration: self.configuration,
            start: self.start.digest(&self.config.subscriptions, me, peer),
        };
        let frame = Frame::Hello(hello);
        actions.push(Action::Send { peer, frame });
        if let Some(reason) = self.stopped {
            let frame = Frame::Stopped { reason };
            actions.push(Action::Send { peer, frame });
        }
    }

    pub(super) fn receive(
        &mut self,
        from: ProcessId,
        frame: Frame,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let me = self.config.me;
        let unknown = Refusal::NotAPeer { process: from, me };
        match frame {
            Frame::Hello(hello) => self.hello(from, &hello, actions),
            // Whoever stopped only says so.
            _ if self.stopped.is_some() => Ok(()),
            Frame::Ready => {
                let peer = self.peers.get_mut(&from).ok_or(unknown)?;
                peer.link.set_ready()?;
                self.go_on(from, actions);
                Ok(())
            }
            Frame::Received { sequence } => {
                let peer = self.peers.get_mut(&from).ok_or(unknown)?;
                peer.link.receipt(sequence)
            }
            Frame::Stopped { reason } => {
                let peer = self.peers.get(&from).ok_or(unknown)?;
                if !peer.link.is_up() {
                    return Err(Refusal::OutOfTurn { process: from });
                }
                self.stop(reason, actions);
                Ok(())
            }
            Frame::Message { sequence, message } => {
                let peer = self.peers.get(&from).ok_or(unknown)?;
                if !self.greeted || !peer.link.is_ready() {
                    return Err(Refusal::OutOfTurn { process: from });
                }
                if !peer.link.expects(sequence)? {
                    return Ok(());
                }
                // An answer needs room; who takes no receipts gets none.
                if !peer.link.has_room() {
                    return Err(Refusal::Window { process: from });
                }
                let mut effects = Vec::new();
                self.message(from, message, &mut effects, actions)?;
                self.carry_out(effects, actions);
                let peer = self.peers.get_mut(&from).ok_or(unknown)?;
                if let Some(frame) = peer.link.processed() {
                    actions.push(Action::Send { peer: from, frame });
                }
                Ok(())
            }
        }
    }

    fn hello(
        &mut self,
        from: ProcessId,
        hello: &Hello,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        self.compare(from, hello)?;
        let me = (self.config.me, self.config.incarnation);
        let unknown = Refusal::NotAPeer {
            process: from,
            me: me.0,
        };
        let peer = self.peers.get_mut(&from).ok_or(unknown)?;
        if self.stopped.is_some() {
            return Ok(());
        }
        match peer.link.greet(hello, me, self.greeted)? {
            Greeting::Resumed => {
                self.all_greeted(actions);
                self.go_on(from, actions);
            }
            Greeting::Lost(process) => {
                self.stop(StopReason::LostMemory { process }, actions);
            }
        }
        Ok(())
    }

    /// Tells it once all peers have been there.
    fn all_greeted(&mut self, actions: &mut Vec<Action>) {
        let mut links = self.peers.values().map(|peer| &peer.link);
        if !links.all(|link| link.life().is_some()) {
            return;
        }
        self.greeted = true;
        for (peer, known) in &mut self.peers {
            if known.link.say_ready() {
                let (peer, frame) = (*peer, Frame::Ready);
                actions.push(Action::Send { peer, frame });
            }
        }
    }

    /// A link is up, or its peer became ready: sends what that one did not receive.
    fn go_on(&mut self, from: ProcessId, actions: &mut Vec<Action>) {
        if let Some(peer) = self.peers.get(&from)
            && peer.link.is_ready()
        {
            let missed = peer.link.missed();
            actions.extend(missed.map(|frame| Action::Send { peer: from, frame }));
        }
        if !self.ready && self.greeted && self.missing_peer().is_none() {
            self.ready = true;
            actions.push(Action::Ready);
        }
    }

    /// Whether the other side takes part in the same thing.
    pub(super) fn compare(&self, from: ProcessId, hello: &Hello) -> Result<(), Refusal> {
        let (me, process) = (self.config.me, hello.process);
        if !self.peers.contains_key(&from) {
            return Err(Refusal::NotAPeer { process: from, me });
        }
        if process != from || hello.to != me {
            let to = hello.to;
            return Err(Refusal::Misdirected { process, to, me });
        }
        if hello.configuration != self.configuration {
            return Err(Refusal::Configuration { process });
        }
        if hello.session != self.config.session {
            return Err(Refusal::Session {
                process,
                theirs: hello.session,
                ours: self.config.session,
            });
        }
        if hello.start != self.start.digest(&self.config.subscriptions, me, process) {
            return Err(Refusal::StartValues { process });
        }
        Ok(())
    }

    fn message(
        &mut self,
        from: ProcessId,
        message: Message,
        effects: &mut Vec<Effect>,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let wrong = Refusal::WrongOrder { process: from };
        match (message, &self.ordering) {
            (Message::Delivered { count }, _) => self.answered(from, count),
            (
                Message::Request {
                    id,
                    variable,
                    operation,
                    time,
                },
                Ordering::Skeen(_),
            ) => self.request(from, (id, variable, operation), time, effects),
            (Message::Proposal { id, time }, Ordering::Skeen(_)) => {
                self.check_own(from, id)?;
                let subscriptions = self.config.subscriptions.clone();
                let bit = |v| subscriptions.variable(v).and_then(|v| v.bit(from));
                match &mut self.ordering {
                    Ordering::Skeen(skeen) => skeen.proposal(from, bit, id, time, effects),
                    Ordering::Sequencer(_) => Err(wrong),
                }
            }
            (
                Message::Commit {
                    id,
                    time,
                    acknowledge,
                },
                Ordering::Skeen(_),
            ) => self.commit(from, id, time, acknowledge, effects),
            (Message::Committed { id }, Ordering::Skeen(_)) => self.committed(from, id, actions),
            (
                Message::Submit {
                    id,
                    variable,
                    operation,
                },
                Ordering::Sequencer(_),
            ) => self.submitted(from, (id, variable, operation), effects),
            (
                Message::Ordered {
                    key,
                    variable,
                    operation,
                },
                Ordering::Sequencer(_),
            ) => self.ordered(from, (key, variable, operation), effects),
            _ => Err(wrong),
        }
    }

    /// The peer told how many own operations it delivered.
    fn answered(&mut self, from: ProcessId, count: u64) -> Result<(), Refusal> {
        let window = Refusal::Window { process: from };
        let peer = self.peers.get_mut(&from).ok_or(window)?;
        if count < peer.answered || count > peer.asked {
            return Err(window);
        }
        peer.answered = count;
        Ok(())
    }

    fn request(
        &mut self,
        from: ProcessId,
        (id, variable, operation): (OperationId, VariableId, Operation),
        time: u64,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let subscriptions = self.config.subscriptions.clone();
        self.check_operation(&subscriptions, from, self.config.me, (variable, &operation))?;
        self.check_sender(from, id)?;
        let window = Refusal::Window { process: from };
        let peer = self.peers.get_mut(&from).ok_or(window)?;
        if peer.waiting >= ORDERED_WINDOW {
            return Err(window);
        }
        if let Ordering::Skeen(skeen) = &mut self.ordering {
            skeen.request(from, (id, variable, operation), time, effects)?;
            peer.waiting += 1;
            peer.number = id.number;
        }
        Ok(())
    }

    fn commit(
        &mut self,
        from: ProcessId,
        id: OperationId,
        time: u64,
        acknowledge: bool,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        if id.initiator != from {
            return Err(Refusal::Operation { process: from, id });
        }
        if let Ordering::Skeen(skeen) = &mut self.ordering {
            skeen.commit(from, id, time, effects)?;
            if acknowledge {
                effects.push(Effect::Send(from, Message::Committed { id }));
            }
        }
        Ok(())
    }

    fn committed(
        &mut self,
        from: ProcessId,
        id: OperationId,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        self.check_own(from, id)?;
        let unfit = Refusal::Operation { process: from, id };
        let own = self.own.get_mut(&id.number).ok_or(unfit)?;
        let variable = self.config.subscriptions.variable(own.variable);
        let bit = variable.and_then(|v| v.bit(from)).ok_or(unfit)?;
        if own.missing & bit == 0 {
            return Err(unfit);
        }
        own.missing &= !bit;
        self.complete(id, actions);
        Ok(())
    }

    fn submitted(
        &mut self,
        from: ProcessId,
        (id, variable, operation): (OperationId, VariableId, Operation),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let subscriptions = self.config.subscriptions.clone();
        let found = self.check_operation(&subscriptions, from, from, (variable, &operation))?;
        self.check_sender(from, id)?;
        // Windows bound what waits for a subscriber; more is nobody's who keeps to them.
        let mut others = found.subscribers.iter().filter_map(|s| self.peers.get(s));
        if !others.all(|peer| peer.link.has_room()) {
            return Err(Refusal::Window { process: from });
        }
        if let Ordering::Sequencer(counting) = &mut self.ordering {
            counting.submitted(from, (id, found, operation), effects)?;
        }
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.number = id.number;
        }
        Ok(())
    }

    fn ordered(
        &mut self,
        from: ProcessId,
        (key, variable, operation): (OrderKey, VariableId, Operation),
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let subscriptions = self.config.subscriptions.clone();
        let (me, initiator) = (self.config.me, key.id.initiator);
        self.check_operation(&subscriptions, initiator, me, (variable, &operation))?;
        if initiator == me {
            self.check_own(from, key.id)?;
            let own = self.own.get(&key.id.number);
            if own.is_none_or(|own| own.variable != variable) {
                let id = key.id;
                return Err(Refusal::Operation { process: from, id });
            }
        }
        match &mut self.ordering {
            Ordering::Sequencer(counting) => {
                counting.ordered(from, (key, variable, operation), effects)
            }
            Ordering::Skeen(_) => Err(Refusal::WrongOrder { process: from }),
        }
    }

    /// Both the initiator and the receiver subscribe to the variable, and the values fit.
    fn check_operation<'a>(
        &self,
        subscriptions: &'a Subscriptions,
        initiator: ProcessId,
        receiver: ProcessId,
        (variable, operation): (VariableId, &Operation),
    ) -> Result<&'a Variable, Refusal> {
        let not = |process| Refusal::NotSubscribed { process, variable };
        let found = subscriptions.variable(variable).ok_or(not(initiator))?;
        if !found.has(initiator) {
            return Err(not(initiator));
        }
        if !found.has(receiver) {
            return Err(not(receiver));
        }
        operation.check(variable, found.kind)?;
        Ok(found)
    }

    /// An operation comes from its initiator, in its present life, with a new number.
    fn check_sender(&self, from: ProcessId, id: OperationId) -> Result<(), Refusal> {
        let peer = self.peers.get(&from);
        let life = peer.and_then(|peer| peer.link.life()).unwrap_or_default();
        if id.initiator != from || id.incarnation != life {
            return Err(Refusal::Initiator {
                process: from,
                incarnation: life,
                id,
            });
        }
        if peer.is_none_or(|peer| id.number <= peer.number) {
            return Err(Refusal::Operation { process: from, id });
        }
        Ok(())
    }

    /// The operation is one that this process began in this life.
    fn check_own(&self, from: ProcessId, id: OperationId) -> Result<(), Refusal> {
        let own = id.initiator == self.config.me && id.incarnation == self.config.incarnation;
        if own && self.own.contains_key(&id.number) {
            return Ok(());
        }
        Err(Refusal::Operation { process: from, id })
    }
}
