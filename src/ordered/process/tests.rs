//! Processes that keep to the rules: completion, windows, lost memory; and the network
//! that the tests run them in.

use std::collections::VecDeque;

use super::*;
use crate::limits::MAX_VARIABLE_BYTES;
use crate::ordered::{ValueError, ValueType, Variable, merge_states};

/// Some processes with all that is under way between them, first-in first-out.
pub(super) struct Net {
    pub(super) processes: Vec<Process>,
    pub(super) wire: VecDeque<(usize, usize, Frame)>,
    pub(super) delivered: Vec<Vec<Delivery>>,
    pub(super) completed: Vec<(OperationId, Outcome)>,
    /// What was closed or became unavailable, and by whom.
    pub(super) told: Vec<(usize, Action)>,
    /// The frames that were sent, of all.
    pub(super) frames: usize,
}

/// x{0,1} y{1,2} z{0,1,2}, the last one of bytes.
pub(super) fn subscriptions() -> Arc<Subscriptions> {
    let lists: [&[u32]; 3] = [&[0, 1], &[1, 2], &[0, 1, 2]];
    let variables = lists.iter().zip(0..).map(|(list, id)| Variable {
        id: VariableId(id),
        kind: if id == 2 {
            ValueType::Bytes
        } else {
            ValueType::Integer
        },
        subscribers: list.iter().map(|&p| ProcessId(p)).collect(),
    });
    Arc::new(Subscriptions::new(variables).expect("usable subscriptions"))
}

pub(super) fn config(me: u32, order: OrderKind, strict: bool) -> Config {
    Config {
        me: ProcessId(me),
        incarnation: Incarnation(u64::from(me) + 1),
        session: 1,
        subscriptions: subscriptions(),
        order,
        strict,
    }
}

pub(super) fn process(config: Config) -> Process {
    Process::new(config, Start::default()).expect("a process")
}

impl Net {
    pub(super) fn of(processes: Vec<Process>) -> Self {
        let delivered = processes.iter().map(|_| Vec::new()).collect();
        let mut net = Self {
            processes,
            wire: VecDeque::new(),
            delivered,
            completed: Vec::new(),
            told: Vec::new(),
            frames: 0,
        };
        for one in 0..net.processes.len() {
            for other in 0..one {
                net.connect(one, other);
            }
        }
        net.run();
        net
    }

    pub(super) fn new(order: OrderKind, strict: bool) -> Self {
        Self::of(
            (0..3)
                .map(|me| process(config(me, order, strict)))
                .collect(),
        )
    }

    pub(super) fn connect(&mut self, one: usize, other: usize) {
        self.wire
            .retain(|(from, to, _)| (*from, *to) != (one, other) && (*from, *to) != (other, one));
        for (me, peer) in [(one, other), (other, one)] {
            let peer = ProcessId(peer as u32);
            self.step(me, Event::LinkUp { peer });
        }
    }

    pub(super) fn step(&mut self, me: usize, event: Event) {
        let mut actions = Vec::new();
        self.processes[me].step(event, &mut actions);
        self.carry_out(me, actions);
    }

    pub(super) fn submit(
        &mut self,
        me: usize,
        variable: u32,
        operation: Operation,
    ) -> Result<OperationId, SubmitError> {
        let mut actions = Vec::new();
        let result = self.processes[me].submit(VariableId(variable), operation, &mut actions);
        self.carry_out(me, actions);
        result
    }

    pub(super) fn carry_out(&mut self, me: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { peer, frame } => {
                    self.frames += 1;
                    self.wire.push_back((me, peer.0 as usize, frame));
                }
                Action::Deliver(delivery) => self.delivered[me].push(delivery),
                Action::Complete { id, outcome } => self.completed.push((id, outcome)),
                Action::Ready => {}
                other => self.told.push((me, other)),
            }
        }
    }

    /// Carries frames until nothing is under way.
    pub(super) fn run(&mut self) {
        while let Some((from, to, frame)) = self.wire.pop_front() {
            let peer = ProcessId(from as u32);
            self.step(to, Event::Frame { peer, frame });
        }
    }

    /// What process `me` says to a frame from `from`: the refusal, with nothing changed.
    pub(super) fn refused(&mut self, me: usize, from: u32, frame: Frame) -> Refusal {
        let peer = ProcessId(from);
        let mut before = self.processes[me].clone();
        let mut actions = Vec::new();
        self.processes[me].step(Event::Frame { peer, frame }, &mut actions);
        before.step(Event::LinkDown { peer }, &mut Vec::new());
        assert_eq!(
            before, self.processes[me],
            "a refused frame changes nothing"
        );
        assert_eq!(actions.len(), 1, "{actions:?}");
        self.processes[me].step(Event::LinkUp { peer }, &mut actions);
        match actions.swap_remove(0) {
            Action::Close {
                peer: closed,
                reason,
            } if closed == peer => reason,
            action => panic!("not refused: {action:?}"),
        }
    }

    /// What a ready process says to `message` as the next one from a ready peer.
    pub(super) fn refused_message(
        order: OrderKind,
        me: usize,
        from: u32,
        message: Message,
    ) -> Refusal {
        let mut net = Self::new(order, false);
        net.refused(
            me,
            from,
            Frame::Message {
                sequence: 1,
                message,
            },
        )
    }
}

pub(super) fn write(value: i64) -> Operation {
    Operation::Write(value.into())
}

pub(super) fn id(initiator: u32, number: u64) -> OperationId {
    OperationId {
        initiator: ProcessId(initiator),
        incarnation: Incarnation(u64::from(initiator) + 1),
        number,
    }
}

pub(super) const BOTH: [OrderKind; 2] = [OrderKind::Skeen, OrderKind::Sequencer];

#[test]
fn operations_complete_and_everybody_delivers_them() {
    for order in BOTH {
        let mut net = Net::new(order, false);
        net.submit(0, 0, write(5)).expect("taken");
        net.run();
        let swap = |expected: i64, new: i64| Operation::CompareAndSwap {
            expected: expected.into(),
            new: new.into(),
        };
        net.submit(1, 0, swap(5, 6)).expect("taken");
        net.run();
        net.submit(0, 0, swap(5, 7)).expect("taken");
        net.run();
        net.submit(1, 0, Operation::Read).expect("taken");
        net.run();
        let ends = net.completed.iter().map(|(_, outcome)| match outcome {
            Outcome::Ordered { old, applied, .. } => (old.clone(), *applied),
            Outcome::Indeterminate => panic!("nothing was lost"),
        });
        let ends: Vec<_> = ends.collect();
        let expected: [(i64, bool); 4] = [(0, true), (5, true), (6, false), (6, false)];
        assert_eq!(ends, expected.map(|(old, applied)| (old.into(), applied)));
        assert_eq!(net.delivered[0], net.delivered[1]);
        assert_eq!(net.delivered[0].len(), 4);
        assert!(net.delivered[2].is_empty(), "no subscriber");
        assert_eq!(
            net.processes[1].value(VariableId(0)),
            Ok(&Value::Integer(6))
        );
        assert!(net.told.is_empty());
    }
}

#[test]
fn messages_are_as_many_as_the_manual_says() {
    let messages = |order, strict| {
        let mut net = Net::new(order, strict);
        let before = net.frames;
        net.submit(1, 2, Operation::Write(Value::bytes(b"x")))
            .expect("taken");
        net.run();
        assert_eq!(net.completed.len(), 1);
        net.frames - before
    };
    assert_eq!(messages(OrderKind::Skeen, false), 6, "3 (n - 1)");
    assert_eq!(messages(OrderKind::Skeen, true), 8, "4 (n - 1)");
    assert_eq!(messages(OrderKind::Sequencer, false), 3, "n");
}

#[test]
fn only_subscribers_of_a_ready_component_operate() {
    let not = |process, variable| SubmitError::NotSubscribed {
        process: ProcessId(process),
        variable: VariableId(variable),
    };
    let mut net = Net::new(OrderKind::Skeen, false);
    assert_eq!(net.submit(2, 0, write(1)), Err(not(2, 0)));
    assert_eq!(net.submit(0, 1, Operation::Read), Err(not(0, 1)));
    assert_eq!(net.processes[0].value(VariableId(1)), Err(not(0, 1)));
    let variable = VariableId(9);
    assert_eq!(
        net.submit(0, 9, write(1)),
        Err(SubmitError::NoVariable { variable })
    );
    let type_error = net.submit(0, 2, write(1));
    assert!(matches!(
        type_error,
        Err(SubmitError::Value(ValueError::Type { .. }))
    ));
    let longest = vec![0; MAX_VARIABLE_BYTES as usize];
    net.submit(0, 2, Operation::Write(Value::bytes(&longest)))
        .expect("taken");
    let beyond = vec![0; MAX_VARIABLE_BYTES as usize + 1];
    let too_long = net.submit(0, 2, Operation::Write(Value::bytes(&beyond)));
    assert!(matches!(
        too_long,
        Err(SubmitError::Value(ValueError::TooLong { .. }))
    ));
    let mut alone = process(config(0, OrderKind::Skeen, false));
    let missing = alone.submit(VariableId(0), write(1), &mut Vec::new());
    let expected = SubmitError::NotReady {
        missing: ProcessId(1),
    };
    assert_eq!(missing, Err(expected));
    assert_eq!(
        alone,
        process(config(0, OrderKind::Skeen, false)),
        "nothing is kept of it"
    );
}

#[test]
fn a_window_bounds_what_is_under_way_and_opens_again() {
    for order in BOTH {
        let mut net = Net::new(order, false);
        let mut taken = 0;
        for round in 0..20 {
            loop {
                match net.submit(1, 2, Operation::Write(Value::bytes(&[round]))) {
                    Ok(_) => taken += 1,
                    Err(SubmitError::Busy { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            assert!(net.processes[1].in_flight() as u64 <= ORDERED_WINDOW);
            // Others begin some as well, and a link is cut with all of it under way.
            let other = Operation::Write(Value::bytes(b"other"));
            net.submit(0, 2, other.clone()).expect("room");
            net.submit(2, 2, other).expect("room");
            net.connect(1, 2);
            net.run();
            assert!(net.told.is_empty(), "{:?}", net.told);
        }
        assert!(taken > 15 * ORDERED_WINDOW, "{taken} in 20 rounds");
        assert_eq!(net.completed.len() as u64, taken + 40);
        assert_eq!(net.delivered[0], net.delivered[2]);
        assert_eq!(net.processes[0].waiting(), 0);
    }
}

#[test]
fn a_strict_operation_waits_for_every_commit() {
    for strict in [false, true] {
        let mut net = Net::new(OrderKind::Skeen, strict);
        net.submit(1, 2, Operation::Read).expect("taken");
        // All but what goes to process 2 after its proposal.
        let mut held = Vec::new();
        while let Some((from, to, frame)) = net.wire.pop_front() {
            if matches!(
                &frame,
                Frame::Message {
                    message: Message::Commit { .. },
                    ..
                }
            ) && to == 2
            {
                held.push((from, to, frame));
                continue;
            }
            let peer = ProcessId(from as u32);
            net.step(to, Event::Frame { peer, frame });
        }
        assert_eq!(net.completed.len(), usize::from(!strict));
        assert_eq!(net.delivered[1].len(), 1, "delivered it is");
        net.wire.extend(held);
        net.run();
        assert_eq!(net.completed.len(), 1);
    }
}

#[test]
fn a_lost_memory_stops_the_component_until_all_start_anew() {
    for order in BOTH {
        let mut net = Net::new(order, false);
        net.submit(1, 0, write(7)).expect("taken");
        net.run();
        net.submit(1, 0, write(8)).expect("taken");
        // Process 0 starts again, and only process 2 hears of it at first.
        let mut reborn = config(0, order, false);
        reborn.incarnation = Incarnation(99);
        net.processes[0] = process(reborn);
        net.wire.clear();
        net.connect(0, 2);
        net.run();
        let reason = StopReason::LostMemory {
            process: ProcessId(0),
        };
        for (me, process) in net.processes.iter().enumerate() {
            assert_eq!(
                process.stop_reason(),
                Some(reason),
                "process {me}, {order:?}"
            );
        }
        let last = net.completed.last().map(|(_, outcome)| outcome.clone());
        assert_eq!(last, Some(Outcome::Indeterminate));
        let told = net
            .told
            .iter()
            .filter(|(_, action)| *action == Action::Unavailable { reason });
        assert_eq!(told.count(), 3, "each one once");
        assert_eq!(
            net.submit(2, 1, write(1)),
            Err(SubmitError::Unavailable(reason))
        );
        assert_eq!(
            net.processes[1].value(VariableId(0)),
            Ok(&Value::Integer(7))
        );
        let states: Vec<_> = net.processes[1..]
            .iter()
            .map(|p| (p.config().me, p.last_key(), p.state()))
            .collect();
        let start = merge_states(&subscriptions(), states.iter().map(|(p, k, s)| (*p, *k, s)));
        let anew = (0..3).map(|me| {
            let mut config = config(me, order, false);
            config.session = 2;
            Process::new(config, start.clone()).expect("a process")
        });
        let mut net = Net::of(anew.collect());
        assert_eq!(
            net.processes[0].value(VariableId(0)),
            Ok(&Value::Integer(7))
        );
        net.submit(0, 0, write(9)).expect("taken");
        net.run();
        assert!(
            net.delivered[1]
                .last()
                .is_some_and(|d| d.key.time > start.time)
        );
    }
}

#[test]
fn what_was_delivered_counts_whatever_the_clocks_say() {
    let mut net = Net::new(OrderKind::Skeen, false);
    net.submit(0, 0, write(7)).expect("taken");
    // Process 1 never has the commit, and process 2's requests raise its clock.
    for _ in 0..20 {
        while let Some((from, to, frame)) = net.wire.pop_front() {
            let commit = matches!(
                &frame,
                Frame::Message {
                    message: Message::Commit { .. },
                    ..
                }
            );
            if !(commit && (from, to) == (0, 1)) {
                let peer = ProcessId(from as u32);
                net.step(to, Event::Frame { peer, frame });
            }
        }
        net.submit(2, 1, write(1)).expect("taken");
    }
    assert!(net.delivered[1].is_empty());
    assert!(net.processes[1].clock() > net.processes[0].clock());
    assert_eq!(net.processes[1].progress(), None);
    let merged = |all: &[&Process]| {
        let states: Vec<_> = all
            .iter()
            .map(|p| (p.config().me, p.progress(), p.state()))
            .collect();
        merge_states(&subscriptions(), states.iter().map(|(p, k, s)| (*p, *k, s)))
    };
    let start = merged(&[&net.processes[1], &net.processes[0], &net.processes[2]]);
    assert_eq!(start.values[&VariableId(0)], Value::Integer(7));
    // A member of the next session that delivered nothing yet knows more than one that
    // is new, and not less than one that is still in the session before.
    let mut next = config(0, OrderKind::Skeen, false);
    next.session = 2;
    let next = Process::new(next, start.clone()).expect("a process");
    let fresh = process(config(1, OrderKind::Skeen, false));
    assert!(next.progress() > net.processes[0].progress());
    let again = merged(&[&fresh, &next]);
    assert_eq!(again.values[&VariableId(0)], Value::Integer(7));
}

#[test]
fn a_restart_before_anybody_is_ready_does_no_harm() {
    for order in BOTH {
        // Process 0 is met by process 1 alone, which waits for process 2.
        let one = process(config(0, order, false));
        let mut net = Net::of(vec![one, process(config(1, order, false))]);
        assert!(!net.processes[0].is_ready() && !net.processes[1].is_ready());
        let mut reborn = config(0, order, false);
        reborn.incarnation = Incarnation(99);
        let all = vec![
            process(reborn),
            net.processes.remove(1),
            process(config(2, order, false)),
        ];
        let mut net = Net::of(all);
        assert!(net.processes.iter().all(Process::is_ready), "{order:?}");
        net.submit(0, 0, write(1)).expect("taken");
        net.run();
        assert_eq!(net.completed.len(), 1);
        assert!(net.told.is_empty());
    }
}
