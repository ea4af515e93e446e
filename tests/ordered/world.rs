//! One run from a seed: who subscribes to what, what is asked for when, and what goes
//! wrong. Real processes, real frame bytes; each direction of a connection is first-in
//! first-out, and which of all that is under way arrives next is a matter of chance.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use uffd_sync::ordered::oracle::{self, Acknowledged, Log};
use uffd_sync::ordered::{
    Action, Config, Event, FRAME_HEADER_BYTES, Frame, FrameHeader, Incarnation, Operation,
    OperationId, OrderKey, OrderKind, Outcome, Process, ProcessId, Rules, Start, SubmitError,
    Subscriptions, Value, ValueType, Variable, VariableId, merge_states,
};

use crate::linear::{Answer, Call, is_linearisable};
use crate::rng::Rng;

/// Most frames that may arrive until all is quiet once faults have ended.
const SETTLE_STEPS: u64 = 200_000;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    pub(crate) operations: u64,
    pub(crate) cuts: u64,
    pub(crate) half_open: u64,
    pub(crate) pauses: u64,
    pub(crate) crashes: u64,
    pub(crate) stopped: u64,
    pub(crate) harmless: u64,
    pub(crate) indeterminate: u64,
    pub(crate) resumed: u64,
    pub(crate) linearisable: u64,
}

impl Report {
    pub(crate) fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.cuts += other.cuts;
        self.half_open += other.half_open;
        self.pauses += other.pauses;
        self.crashes += other.crashes;
        self.stopped += other.stopped;
        self.harmless += other.harmless;
        self.indeterminate += other.indeterminate;
        self.resumed += other.resumed;
        self.linearisable += other.linearisable;
    }
}

/// One life of a process.
struct Life<R> {
    process: Process<R>,
    log: Log,
    paused: bool,
}

/// An operation as its caller sees it.
struct Asked {
    call: Call,
    variable: VariableId,
    /// Greatest keys that were completed before it began.
    floor: BTreeMap<VariableId, OrderKey>,
}

pub(crate) struct World<R> {
    rng: Rng,
    now: u64,
    subscriptions: Arc<Subscriptions>,
    order: OrderKind,
    strict: bool,
    /// Whether processes begin operations before their last ones completed.
    pipelined: bool,
    session: u64,
    start: Start,
    lives: Vec<Life<R>>,
    /// Logs of the lives that ended in this session.
    past: Vec<Log>,
    /// Which connections are there, as each of both ends sees it.
    connected: BTreeSet<(usize, usize)>,
    channels: BTreeMap<(usize, usize), VecDeque<Vec<u8>>>,
    asked: BTreeMap<OperationId, Asked>,
    acknowledged: Vec<Acknowledged>,
    latest: BTreeMap<VariableId, OrderKey>,
    /// The last message of each link.
    sent: BTreeMap<(usize, usize), u64>,
    report: Report,
}

impl<R: Rules> World<R> {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let processes = 2 + rng.below(4) as u32;
        let count = 1 + rng.below(4) as u32;
        let variables = (0..count).map(|id| {
            let mut all: Vec<u32> = (0..processes).collect();
            let size = 2 + rng.below(u64::from(processes) - 1) as usize;
            while all.len() > size {
                all.remove(rng.below(all.len() as u64) as usize);
            }
            Variable {
                id: VariableId(id),
                kind: rng.pick(&[ValueType::Integer, ValueType::Integer, ValueType::Bytes]),
                subscribers: all.into_iter().map(ProcessId).collect(),
            }
        });
        let variables: Vec<_> = variables.collect();
        let subscriptions = Subscriptions::new(variables).expect("usable subscriptions");
        let mut world = Self {
            now: 0,
            subscriptions: Arc::new(subscriptions),
            order: rng.pick(&[OrderKind::Skeen, OrderKind::Skeen, OrderKind::Sequencer]),
            strict: rng.once_in(3),
            pipelined: !rng.once_in(3),
            session: 1,
            start: Start::default(),
            lives: Vec::new(),
            past: Vec::new(),
            connected: BTreeSet::new(),
            channels: BTreeMap::new(),
            asked: BTreeMap::new(),
            acknowledged: Vec::new(),
            latest: BTreeMap::new(),
            sent: BTreeMap::new(),
            report: Report::default(),
            rng,
        };
        world.lives = (0..processes)
            .map(|me| world.life(me as usize, 0))
            .collect();
        world
    }

    /// A session with faults, one that loses a memory, and one that starts anew from what
    /// is left.
    pub(crate) fn run(mut self) -> Result<Report, String> {
        if !self.rng.once_in(4) {
            self.settle()?;
        }
        let steps = 100 + self.rng.below(500);
        self.disturbed(steps)?;
        self.settle()?;
        if !self.rng.once_in(4) {
            self.check(true)?;
            return Ok(self.report);
        }
        let steps = self.rng.below(100);
        self.disturbed(steps)?;
        let lost = self.rng.below(self.lives.len() as u64) as usize;
        self.crash(lost);
        self.disturbed(60)?;
        self.settle()?;
        self.check(false)?;
        self.check_stopped(lost)?;
        self.start_anew()?;
        self.disturbed(60)?;
        self.settle()?;
        self.check(true)?;
        Ok(self.report)
    }

    fn life(&mut self, me: usize, number: u64) -> Life<R> {
        let config = Config {
            me: ProcessId(me as u32),
            incarnation: Incarnation(1 + me as u64 + 100 * number + 1_000 * self.session),
            session: self.session,
            subscriptions: Arc::clone(&self.subscriptions),
            order: self.order,
            strict: self.strict,
        };
        Life {
            process: Process::with_rules(config, self.start.clone()).expect("a process"),
            log: Log {
                process: ProcessId(me as u32),
                deliveries: Vec::new(),
                complete: true,
            },
            paused: false,
        }
    }

    /// So many things happen, faults among them.
    fn disturbed(&mut self, steps: u64) -> Result<(), String> {
        for _ in 0..steps {
            let me = self.rng.below(self.lives.len() as u64) as usize;
            match self.rng.below(100) {
                0 => self.cut()?,
                1 => {
                    self.lives[me].paused = true;
                    self.report.pauses += 1;
                }
                2..=4 => self.lives[me].paused = false,
                5..=9 => {
                    self.connect_one()?;
                }
                10..=24 => self.submit(me)?,
                25 => {
                    for _ in 0..self.rng.below(20) {
                        self.submit(me)?;
                    }
                }
                _ => {
                    self.arrive()?;
                }
            }
        }
        Ok(())
    }

    /// Faults end: everything is connected, goes on and arrives.
    fn settle(&mut self) -> Result<(), String> {
        for life in &mut self.lives {
            life.paused = false;
        }
        for _ in 0..SETTLE_STEPS {
            let connected = self.connect_one()?;
            if !self.arrive()? && !connected {
                return Ok(());
            }
        }
        Err("it does not become quiet".to_owned())
    }

    fn pairs(&self) -> Vec<(usize, usize)> {
        let all = self.lives.iter().enumerate();
        let pairs =
            all.flat_map(|(one, life)| life.process.peers().map(move |p| (one, p.0 as usize)));
        pairs.filter(|(one, other)| one < other).collect()
    }

    /// Connects a pair of which at least one end has no connection.
    fn connect_one(&mut self) -> Result<bool, String> {
        let mut pairs = self.pairs();
        pairs.retain(|&(one, other)| {
            !self.connected.contains(&(one, other)) || !self.connected.contains(&(other, one))
        });
        if pairs.is_empty() {
            return Ok(false);
        }
        let (one, other) = self.rng.pick(&pairs);
        self.channels.remove(&(one, other));
        self.channels.remove(&(other, one));
        self.connected.extend([(one, other), (other, one)]);
        for (me, peer) in [(one, other), (other, one)] {
            let peer = ProcessId(peer as u32);
            self.step(me, Event::LinkUp { peer })?;
        }
        Ok(true)
    }

    /// Cuts one connection; sometimes one end does not notice.
    fn cut(&mut self) -> Result<(), String> {
        let pairs = self.pairs();
        if pairs.is_empty() {
            return Ok(());
        }
        let (one, other) = self.rng.pick(&pairs);
        let ends = if self.rng.once_in(2) {
            [(one, other), (other, one)]
        } else {
            [(other, one), (one, other)]
        };
        let half = self.rng.once_in(3);
        self.report.cuts += 1;
        self.report.half_open += u64::from(half);
        self.channels.remove(&(one, other));
        self.channels.remove(&(other, one));
        for (me, peer) in ends.into_iter().take(if half { 1 } else { 2 }) {
            if self.connected.remove(&(me, peer)) {
                let peer = ProcessId(peer as u32);
                self.step(me, Event::LinkDown { peer })?;
            }
        }
        Ok(())
    }

    /// A process ends, and another one starts in its place that knows nothing.
    fn crash(&mut self, me: usize) {
        self.report.crashes += 1;
        let number = self.past.len() as u64 + 1;
        let mut life = self.life(me, number);
        std::mem::swap(&mut life, &mut self.lives[me]);
        life.log.complete = false;
        self.past.push(life.log);
        for peer in 0..self.lives.len() {
            for key in [(me, peer), (peer, me)] {
                self.channels.remove(&key);
                self.sent.remove(&key);
            }
            self.connected.remove(&(me, peer));
            if self.connected.remove(&(peer, me)) {
                let event = Event::LinkDown {
                    peer: ProcessId(me as u32),
                };
                self.lives[peer].process.step(event, &mut Vec::new());
            }
        }
    }

    fn submit(&mut self, me: usize) -> Result<(), String> {
        let waits = !self.pipelined && self.lives[me].process.in_flight() > 0;
        if self.lives[me].paused || waits {
            return Ok(());
        }
        let process = ProcessId(me as u32);
        let of: Vec<_> = self
            .subscriptions
            .of(process)
            .map(|v| (v.id, v.kind))
            .collect();
        if of.is_empty() {
            return Ok(());
        }
        let (variable, kind) = self.rng.pick(&of);
        let operation = self.operation(kind);
        let mut actions = Vec::new();
        let begin = self.tick();
        let submitted = self.lives[me]
            .process
            .submit(variable, operation.clone(), &mut actions);
        match submitted {
            Ok(id) => {
                let asked = Asked {
                    call: Call {
                        begin,
                        end: None,
                        operation,
                    },
                    variable,
                    floor: self.latest.clone(),
                };
                self.asked.insert(id, asked);
                self.report.operations += 1;
            }
            Err(SubmitError::NotReady { .. } | SubmitError::Unavailable(_)) => {}
            Err(error) => return Err(error.to_string()),
        }
        self.carry_out(me, actions)
    }

    fn operation(&mut self, kind: ValueType) -> Operation {
        let mut value = || {
            let number = self.rng.below(4);
            match kind {
                ValueType::Integer => Value::Integer(number as i64),
                ValueType::Bytes => Value::bytes(&vec![7; number as usize]),
            }
        };
        let (expected, new) = (value(), value());
        match self.rng.below(4) {
            0 => Operation::Write(new),
            1 => Operation::Read,
            _ => Operation::CompareAndSwap { expected, new },
        }
    }

    /// One frame arrives; false if none is under way to a process that goes on.
    fn arrive(&mut self) -> Result<bool, String> {
        let keys = self.channels.keys().copied();
        let mut open: Vec<_> = keys.filter(|(_, to)| !self.lives[*to].paused).collect();
        open.retain(|key| !self.channels[key].is_empty());
        if open.is_empty() {
            return Ok(false);
        }
        let (from, to) = self.rng.pick(&open);
        let queue = self.channels.get_mut(&(from, to));
        let Some(bytes) = queue.and_then(VecDeque::pop_front) else {
            return Ok(false);
        };
        let peer = ProcessId(from as u32);
        let (head, body) = bytes
            .split_first_chunk::<FRAME_HEADER_BYTES>()
            .ok_or("a short frame")?;
        let header = FrameHeader::parse(head).map_err(|error| error.to_string())?;
        let frame = Frame::decode(&header, body).map_err(|error| error.to_string())?;
        self.step(to, Event::Frame { peer, frame })?;
        Ok(true)
    }

    fn step(&mut self, me: usize, event: Event) -> Result<(), String> {
        let mut actions = Vec::new();
        self.lives[me].process.step(event, &mut actions);
        self.carry_out(me, actions)
    }

    fn carry_out(&mut self, me: usize, actions: Vec<Action>) -> Result<(), String> {
        for action in actions {
            match action {
                Action::Send { peer, frame } => {
                    let mut bytes = Vec::new();
                    frame.encode(&mut bytes);
                    let peer = peer.0 as usize;
                    // What is sent into a connection that the other end gave up is lost.
                    if self.connected.contains(&(peer, me)) {
                        self.channels
                            .entry((me, peer))
                            .or_default()
                            .push_back(bytes);
                    }
                    if let Frame::Message { sequence, .. } = frame {
                        let last = self.sent.entry((me, peer)).or_default();
                        self.report.resumed += u64::from(sequence <= *last);
                        *last = sequence.max(*last);
                    }
                }
                Action::Deliver(delivery) => self.lives[me].log.deliveries.push(delivery),
                Action::Complete { id, outcome } => self.complete(id, outcome)?,
                Action::Unavailable { .. } => {
                    self.lives[me].log.complete = false;
                    self.report.stopped += 1;
                }
                Action::Ready => {}
                Action::Close { peer, reason } => {
                    return Err(format!("process {me} refuses process {peer}: {reason}"));
                }
            }
        }
        Ok(())
    }

    fn complete(&mut self, id: OperationId, outcome: Outcome) -> Result<(), String> {
        let now = self.tick();
        let Some(asked) = self.asked.get_mut(&id) else {
            return Err(format!("{id} completes before it was begun"));
        };
        let Outcome::Ordered { key, old, applied } = outcome else {
            self.report.indeterminate += 1;
            return Ok(());
        };
        let strict = self.strict || self.order == OrderKind::Sequencer;
        let shared = |other| {
            let pair = [asked.variable, other].map(|id| self.subscriptions.variable(id));
            let [Some(one), Some(other)] = pair else {
                return false;
            };
            one.subscribers.iter().any(|process| other.has(*process))
        };
        for (other, floor) in &asked.floor {
            let related = *other == asked.variable || (strict && shared(*other));
            if key <= *floor && related {
                return Err(format!("{key} was begun after {floor} had ended"));
            }
        }
        let answer = match asked.call.operation {
            Operation::Write(_) => Answer::Written,
            Operation::CompareAndSwap { .. } => Answer::Swapped(applied),
            Operation::Read => Answer::Found(old),
        };
        asked.call.end = Some((now, answer));
        let variable = asked.variable;
        let latest = self.latest.entry(variable).or_insert(key);
        *latest = key.max(*latest);
        self.acknowledged.push(Acknowledged {
            key,
            variable,
            applied,
        });
        Ok(())
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// The logs are those of one order; if `live`, everything has completed.
    fn check(&mut self, live: bool) -> Result<(), String> {
        if live {
            let open = self
                .asked
                .iter()
                .find(|(_, asked)| asked.call.end.is_none());
            if let Some((id, asked)) = open {
                return Err(format!("{id} on {} waits for ever", asked.variable));
            }
            if let Some(life) = self.lives.iter().find(|life| !life.process.is_ready()) {
                return Err(format!("process {} is not ready", life.log.process));
            }
        }
        let mut logs = self.past.clone();
        for life in &mut self.lives {
            // Lives before a stop may lack their ends; all others lack nothing.
            let mut log = life.log.clone();
            log.complete &= live;
            logs.push(log);
        }
        oracle::check(&self.subscriptions, &self.start, &logs, &self.acknowledged)
            .map_err(|breach| breach.to_string())?;
        for variable in self.subscriptions.variables() {
            let initial = self.start.values.get(&variable.id).cloned();
            let initial = initial.unwrap_or_else(|| variable.kind.initial());
            let of = self
                .asked
                .values()
                .filter(|asked| asked.variable == variable.id);
            let calls: Vec<_> = of.map(|asked| asked.call.clone()).collect();
            if self.pipelined {
                continue;
            }
            match is_linearisable(&calls, &initial) {
                Some(false) => return Err(format!("variable {}: not linearisable", variable.id)),
                Some(true) => self.report.linearisable += 1,
                None => {}
            }
        }
        Ok(())
    }

    /// Nobody of the component that `lost` a member goes on, unless that one had not
    /// been counted on.
    fn check_stopped(&mut self, lost: usize) -> Result<(), String> {
        let component = self.subscriptions.component(ProcessId(lost as u32));
        let mut of = component.iter().map(|p| &self.lives[p.0 as usize]);
        let stopped = |life: &Life<R>| life.process.stop_reason().is_some();
        if component.is_empty() || of.clone().all(|life| !stopped(life)) {
            self.report.harmless += 1;
            let mut acted = self.past.iter().any(|log| !log.deliveries.is_empty());
            acted &= !component.is_empty();
            return if acted {
                Err("a loss of memory is not noticed".to_owned())
            } else {
                Ok(())
            };
        }
        match of.find(|life| !stopped(life)) {
            Some(life) => Err(format!("process {} goes on", life.log.process)),
            None => Ok(()),
        }
    }

    /// All start anew under a higher session, from the state of those that went furthest.
    fn start_anew(&mut self) -> Result<(), String> {
        let lives = self.lives.iter();
        let states: Vec<_> = lives
            .map(|life| {
                (
                    life.log.process,
                    life.process.progress(),
                    life.process.state(),
                )
            })
            .collect();
        let given = states
            .iter()
            .map(|(process, last, state)| (*process, *last, state));
        let start = merge_states(&self.subscriptions, given);
        for life in &self.lives {
            for delivery in &life.log.deliveries {
                if delivery.key.time > start.time {
                    return Err(format!("{} is after the new start", delivery.key));
                }
            }
        }
        for variable in self.subscriptions.variables() {
            let logs = self.lives.iter().map(|life| &life.log.deliveries);
            let on = logs.flatten().filter(|d| d.variable == variable.id);
            let last = on.max_by_key(|d| d.key).map(|d| &d.new);
            if last.is_some_and(|last| start.values.get(&variable.id) != Some(last)) {
                return Err(format!("variable {} starts from an old value", variable.id));
            }
        }
        self.start = start;
        self.session += 1;
        self.past.clear();
        self.connected.clear();
        self.channels.clear();
        self.asked.clear();
        self.acknowledged.clear();
        self.latest.clear();
        self.sent.clear();
        self.lives = (0..self.lives.len()).map(|me| self.life(me, 0)).collect();
        Ok(())
    }
}
