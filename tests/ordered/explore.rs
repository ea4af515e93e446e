//! An exhaustive explorer: from one state all that can happen next, depth first, each
//! state once. It runs the very processes that the engine runs; what it adds are
//! channels, scripts of operations and the checks.
//!
//! A state is known again by a 64-bit hash of everything in it, which shared pieces keep
//! with them: one step hashes one process and the channels.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use uffd_sync::ordered::oracle::{self, Acknowledged, Log};
use uffd_sync::ordered::{
    Action, Delivery, Event, Frame, Operation, OrderKey, OrderKind, Outcome, Process, ProcessId,
    Rules, Start, Subscriptions, VariableId,
};

use crate::config;

/// What is explored.
pub(crate) struct Setup {
    pub(crate) subscriptions: Arc<Subscriptions>,
    pub(crate) order: OrderKind,
    pub(crate) strict: bool,
    /// Of each process, the operations that it asks for, each once the one before
    /// completed, unless `pipelined`.
    pub(crate) scripts: Vec<Vec<(u32, Operation)>>,
    pub(crate) pipelined: bool,
    /// How often a link may be cut and resumed, at any moment.
    pub(crate) cuts: u32,
    /// The initiator judges its compare-and-swap when it submits it: a control.
    pub(crate) judged_early: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) states: u64,
    pub(crate) ends: u64,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Submit(usize),
    Arrive(usize, usize),
    Cut(usize, usize),
}

#[derive(Clone, Hash)]
struct Node<R> {
    process: Process<R>,
    log: Vec<Delivery>,
    completed: Vec<Completed>,
    /// What was submitted, with the greatest keys that were completed by then.
    submitted: Vec<BTreeMap<VariableId, OrderKey>>,
}

#[derive(Clone, Hash)]
struct Completed {
    key: OrderKey,
    variable: VariableId,
    applied: bool,
}

#[derive(Clone)]
struct State<R> {
    nodes: Vec<(Rc<Node<R>>, u64)>,
    /// What is under way from one to another.
    channels: BTreeMap<(usize, usize), VecDeque<Frame>>,
    /// The greatest completed key of each variable.
    latest: BTreeMap<VariableId, OrderKey>,
    cuts: u32,
}

/// Everything that can happen; the first breach ends it, with the steps that led there.
pub(crate) fn explore<R: Rules>(setup: &Setup) -> Result<Report, String> {
    let mut report = Report::default();
    let first = State::<R>::connected(setup);
    let mut seen = HashSet::from([first.fingerprint()]);
    report.states = 1;
    let steps = first.steps(setup);
    let mut path = vec![(first, steps, 0_usize)];
    while let Some((state, steps, _)) = path.last() {
        if steps.is_empty() {
            report.ends += 1;
            let found = state.check_end(setup);
            found.map_err(|why| told(&why, &path))?;
        }
        let Some((state, steps, next)) = path.last_mut() else {
            break;
        };
        let Some(&step) = steps.get(*next) else {
            path.pop();
            continue;
        };
        *next += 1;
        let mut after = state.clone();
        let stepped = after.take(setup, step);
        stepped.map_err(|why| told(&why, &path))?;
        if seen.insert(after.fingerprint()) {
            report.states += 1;
            let steps = after.steps(setup);
            path.push((after, steps, 0));
        }
    }
    Ok(report)
}

fn told<R>(why: &str, path: &[(State<R>, Vec<Step>, usize)]) -> String {
    let taken = path
        .iter()
        .filter_map(|(_, steps, next)| steps.get(next.checked_sub(1)?));
    format!("{why}; after {:?}", taken.collect::<Vec<_>>())
}

impl<R: Rules> State<R> {
    /// All processes with all hellos exchanged.
    fn connected(setup: &Setup) -> Self {
        let count = setup.scripts.len();
        let nodes = (0..count).map(|me| {
            let config = config(me as u32, &setup.subscriptions, setup.order, setup.strict);
            let node = Node {
                process: Process::with_rules(config, Start::default()).expect("a process"),
                log: Vec::new(),
                completed: Vec::new(),
                submitted: Vec::new(),
            };
            (Rc::new(node), 0)
        });
        let mut state = Self {
            nodes: nodes.collect(),
            channels: BTreeMap::new(),
            latest: BTreeMap::new(),
            cuts: 0,
        };
        for (one, other) in state.pairs() {
            state.connect(setup, one, other).expect("hellos fit");
        }
        while let Some(&(from, to)) = state.channels.keys().next() {
            state
                .take(setup, Step::Arrive(from, to))
                .expect("hellos fit");
        }
        assert!(state.nodes.iter().all(|(node, _)| node.process.is_ready()));
        state
    }

    fn pairs(&self) -> Vec<(usize, usize)> {
        let mut pairs = Vec::new();
        for (one, (node, _)) in self.nodes.iter().enumerate() {
            for peer in node.process.peers() {
                let other = peer.0 as usize;
                let missing = other < one && !pairs.contains(&(other, one));
                assert!(!missing, "both sides need the link");
                if one < other {
                    pairs.push((one, other));
                }
            }
        }
        pairs
    }

    fn connect(&mut self, setup: &Setup, one: usize, other: usize) -> Result<(), String> {
        for (me, peer) in [(one, other), (other, one)] {
            let peer = ProcessId(peer as u32);
            self.change(setup, me, |node, actions| {
                node.process.step(Event::LinkUp { peer }, actions);
            })?;
        }
        Ok(())
    }

    fn steps(&self, setup: &Setup) -> Vec<Step> {
        let mut steps = Vec::new();
        for (me, (node, _)) in self.nodes.iter().enumerate() {
            let idle = setup.pipelined || node.process.in_flight() == 0;
            if idle && node.submitted.len() < setup.scripts[me].len() {
                steps.push(Step::Submit(me));
            }
        }
        let arriving = self.channels.keys();
        steps.extend(arriving.map(|&(from, to)| Step::Arrive(from, to)));
        if self.cuts < setup.cuts && !steps.is_empty() {
            let pairs = self.pairs().into_iter();
            steps.extend(pairs.map(|(one, other)| Step::Cut(one, other)));
        }
        steps
    }

    fn take(&mut self, setup: &Setup, step: Step) -> Result<(), String> {
        match step {
            Step::Submit(me) => self.submit(setup, me),
            Step::Arrive(from, to) => {
                let queue = self
                    .channels
                    .get_mut(&(from, to))
                    .ok_or("nothing arrives")?;
                let frame = queue.pop_front().ok_or("nothing arrives")?;
                if queue.is_empty() {
                    self.channels.remove(&(from, to));
                }
                let peer = ProcessId(from as u32);
                self.change(setup, to, |node, actions| {
                    node.process.step(Event::Frame { peer, frame }, actions);
                })
            }
            Step::Cut(one, other) => {
                self.cuts += 1;
                self.channels.remove(&(one, other));
                self.channels.remove(&(other, one));
                self.connect(setup, one, other)
            }
        }
    }

    fn submit(&mut self, setup: &Setup, me: usize) -> Result<(), String> {
        let latest = self.latest.clone();
        let number = self.nodes[me].0.submitted.len();
        let (variable, operation) = setup.scripts[me][number].clone();
        let variable = VariableId(variable);
        let early = setup.judged_early;
        self.change(setup, me, |node, actions| {
            node.submitted.push(latest);
            let value = node.process.value(variable).expect("a subscriber");
            let sent = match (early, operation.applied_to(value)) {
                (false, _) => operation,
                (true, Some(new)) => Operation::Write(new),
                (true, None) => Operation::Read,
            };
            let taken = node.process.submit(variable, sent, actions);
            taken.expect("a ready process with room");
        })
    }

    /// Changes one process and carries out what it asks for.
    fn change(
        &mut self,
        setup: &Setup,
        me: usize,
        change: impl FnOnce(&mut Node<R>, &mut Vec<Action>),
    ) -> Result<(), String> {
        let mut actions = Vec::new();
        let node = Rc::make_mut(&mut self.nodes[me].0);
        change(node, &mut actions);
        for action in actions {
            match action {
                Action::Send { peer, frame } => {
                    let channel = self.channels.entry((me, peer.0 as usize));
                    channel.or_default().push_back(frame);
                }
                Action::Deliver(delivery) => node.log.push(delivery),
                Action::Complete {
                    id,
                    outcome: Outcome::Ordered { key, applied, .. },
                } => {
                    let number = id.number as usize - 1;
                    let variable = VariableId(setup.scripts[me][number].0);
                    let strict = setup.strict || setup.order == OrderKind::Sequencer;
                    for (other, floor) in &node.submitted[number] {
                        if key <= *floor && (*other == variable || strict) {
                            return Err(format!(
                                "{key} on {variable} was begun after {floor} on {other} had ended"
                            ));
                        }
                    }
                    let latest = self.latest.entry(variable).or_insert(key);
                    *latest = key.max(*latest);
                    node.completed.push(Completed {
                        key,
                        variable,
                        applied,
                    });
                }
                Action::Ready => {}
                action => return Err(format!("process {me} wants {action:?}")),
            }
        }
        let mut hasher = DefaultHasher::new();
        node.hash(&mut hasher);
        self.nodes[me].1 = hasher.finish();
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (_, hash) in &self.nodes {
            hash.hash(&mut hasher);
        }
        (&self.channels, &self.latest, self.cuts).hash(&mut hasher);
        hasher.finish()
    }

    /// Nothing can happen any more: everything has completed, and the logs are those of
    /// one order.
    fn check_end(&self, setup: &Setup) -> Result<(), String> {
        let (mut logs, mut acknowledged) = (Vec::new(), Vec::new());
        for (me, (node, _)) in self.nodes.iter().enumerate() {
            let script = &setup.scripts[me];
            if node.completed.len() != script.len() || node.process.waiting() != 0 {
                return Err(format!("process {me} waits for ever"));
            }
            let mut deliveries = node.log.clone();
            for delivery in &mut deliveries {
                let id = delivery.key.id;
                let asked = &setup.scripts[id.initiator.0 as usize][id.number as usize - 1];
                delivery.operation = asked.1.clone();
            }
            logs.push(Log {
                process: ProcessId(me as u32),
                deliveries,
                complete: true,
            });
            acknowledged.extend(node.completed.iter().map(|done| Acknowledged {
                key: done.key,
                variable: done.variable,
                applied: done.applied,
            }));
        }
        let start = Start::default();
        oracle::check(&setup.subscriptions, &start, &logs, &acknowledged)
            .map(|_| ())
            .map_err(|breach| breach.to_string())
    }
}
