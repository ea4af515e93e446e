use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::limits::{MAX_VARIABLE_BYTES, ORDERED_CLOCK_JUMP};
use crate::ordered::{ValueError, ValueType, Variable, merge_states};

/// Some processes with all that is under way between them, first-in first-out.
struct Net {
    processes: Vec<Process>,
    wire: VecDeque<(usize, usize, Frame)>,
    delivered: Vec<Vec<Delivery>>,
    completed: Vec<(OperationId, Outcome)>,
    /// What was closed or became unavailable, and by whom.
    told: Vec<(usize, Action)>,
    /// The frames that were sent, of all.
    frames: usize,
}

/// x{0,1} y{1,2} z{0,1,2}, the last one of bytes.
fn subscriptions() -> Arc<Subscriptions> {
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

fn config(me: u32, order: OrderKind, strict: bool) -> Config {
    Config {
        me: ProcessId(me),
        incarnation: Incarnation(u64::from(me) + 1),
        session: 1,
        subscriptions: subscriptions(),
        order,
        strict,
    }
}

fn process(config: Config) -> Process {
    Process::new(config, Start::default()).expect("a process")
}

impl Net {
    fn of(processes: Vec<Process>) -> Self {
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

    fn new(order: OrderKind, strict: bool) -> Self {
        Self::of(
            (0..3)
                .map(|me| process(config(me, order, strict)))
                .collect(),
        )
    }

    fn connect(&mut self, one: usize, other: usize) {
        self.wire
            .retain(|(from, to, _)| (*from, *to) != (one, other) && (*from, *to) != (other, one));
        for (me, peer) in [(one, other), (other, one)] {
            let peer = ProcessId(peer as u32);
            self.step(me, Event::LinkUp { peer });
        }
    }

    fn step(&mut self, me: usize, event: Event) {
        let mut actions = Vec::new();
        self.processes[me].step(event, &mut actions);
        self.carry_out(me, actions);
    }

    fn submit(
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

    fn carry_out(&mut self, me: usize, actions: Vec<Action>) {
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
    fn run(&mut self) {
        while let Some((from, to, frame)) = self.wire.pop_front() {
            let peer = ProcessId(from as u32);
            self.step(to, Event::Frame { peer, frame });
        }
    }

    /// What process `me` says to a frame from `from`: the refusal, with nothing changed.
    fn refused(&mut self, me: usize, from: u32, frame: Frame) -> Refusal {
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
    fn refused_message(order: OrderKind, me: usize, from: u32, message: Message) -> Refusal {
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

fn write(value: i64) -> Operation {
    Operation::Write(value.into())
}

fn id(initiator: u32, number: u64) -> OperationId {
    OperationId {
        initiator: ProcessId(initiator),
        incarnation: Incarnation(u64::from(initiator) + 1),
        number,
    }
}

fn request(initiator: u32, variable: u32, operation: Operation, time: u64) -> Message {
    Message::Request {
        id: id(initiator, 1),
        variable: VariableId(variable),
        operation,
        time,
    }
}

const BOTH: [OrderKind; 2] = [OrderKind::Skeen, OrderKind::Sequencer];

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
fn a_hello_that_does_not_fit_is_refused() {
    let other = |change: fn(&mut Config), start: Start| {
        let mut net = Net::of(vec![process(config(0, OrderKind::Skeen, false))]);
        let mut config = config(1, OrderKind::Skeen, false);
        change(&mut config);
        let mut actions = Vec::new();
        let mut one = Process::new(config, start).expect("a process");
        one.step(Event::LinkUp { peer: ProcessId(0) }, &mut actions);
        let Some(Action::Send { frame, .. }) = actions.pop() else {
            panic!("a hello comes first");
        };
        net.processes[0].step(Event::LinkUp { peer: ProcessId(1) }, &mut Vec::new());
        let Frame::Hello(hello) = frame else {
            panic!("a hello comes first")
        };
        let early = net.processes[0].check_hello(&hello);
        let refusal = net.refused(0, 1, frame);
        assert!(early == Err(refusal) || matches!(refusal, Refusal::Misdirected { .. }));
        refusal
    };
    let process = ProcessId(1);
    let session = Refusal::Session {
        process,
        theirs: 2,
        ours: 1,
    };
    assert_eq!(
        other(|config| config.session = 2, Start::default()),
        session
    );
    let configuration = Refusal::Configuration { process };
    assert_eq!(
        other(
            |config| config.order = OrderKind::Sequencer,
            Start::default()
        ),
        configuration
    );
    let mut start = Start::default();
    start.values.insert(VariableId(0), 1.into());
    assert_eq!(other(|_| (), start), Refusal::StartValues { process });
    let misdirected = other(|config| config.me = ProcessId(2), Start::default());
    assert!(matches!(misdirected, Refusal::Misdirected { .. }));
}

#[test]
fn what_comes_before_a_hello_or_from_nowhere_is_refused() {
    let mut net = Net::of(vec![process(config(0, OrderKind::Skeen, false))]);
    let out_of_turn = Refusal::OutOfTurn {
        process: ProcessId(1),
    };
    net.processes[0].step(Event::LinkUp { peer: ProcessId(1) }, &mut Vec::new());
    for frame in [
        Frame::Ready,
        Frame::Received { sequence: 0 },
        Frame::Stopped {
            reason: StopReason::LostMemory {
                process: ProcessId(1),
            },
        },
        Frame::Message {
            sequence: 1,
            message: Message::Delivered { count: 0 },
        },
    ] {
        assert_eq!(net.refused(0, 1, frame), out_of_turn);
    }
    let stranger = net.refused(0, 7, Frame::Ready);
    assert!(matches!(stranger, Refusal::NotAPeer { .. }));
    let mut net = Net::new(OrderKind::Skeen, false);
    let gap = net.refused(
        0,
        1,
        Frame::Message {
            sequence: 2,
            message: Message::Delivered { count: 0 },
        },
    );
    assert!(matches!(
        gap,
        Refusal::Gap {
            expected: 1,
            found: 2,
            ..
        }
    ));
}

#[test]
fn hostile_messages_are_refused_with_the_reason() {
    let skeen = |me, from, message| Net::refused_message(OrderKind::Skeen, me, from, message);
    let process = ProcessId(1);
    // Process 0 does not subscribe to y, and process 2 not to x.
    let not = |process, variable| Refusal::NotSubscribed {
        process: ProcessId(process),
        variable: VariableId(variable),
    };
    assert_eq!(skeen(0, 1, request(1, 1, write(1), 1)), not(0, 1));
    assert_eq!(skeen(0, 2, request(2, 0, write(1), 1)), not(2, 0));
    assert_eq!(skeen(0, 2, request(2, 9, write(1), 1)), not(2, 9));
    assert!(matches!(
        skeen(0, 1, request(1, 2, write(1), 1)),
        Refusal::Value(_)
    ));
    let other_life = Message::Request {
        id: OperationId {
            incarnation: Incarnation(9),
            ..id(1, 1)
        },
        variable: VariableId(0),
        operation: write(1),
        time: 1,
    };
    assert!(matches!(skeen(0, 1, other_life), Refusal::Initiator { .. }));
    assert!(matches!(
        skeen(0, 1, request(2, 2, Operation::Read, 1)),
        Refusal::Initiator { .. }
    ));
    // A clock far ahead, by any message that has one.
    let time = ORDERED_CLOCK_JUMP + 1;
    let jump = Refusal::Time {
        process,
        time,
        clock: 0,
    };
    assert_eq!(skeen(0, 1, request(1, 0, write(1), time)), jump);
    assert_eq!(
        skeen(0, 1, request(1, 0, write(1), u64::MAX)),
        Refusal::Time {
            process,
            time: u64::MAX,
            clock: 0
        }
    );
    let unknown = Refusal::Operation {
        process,
        id: id(1, 1),
    };
    assert_eq!(
        skeen(
            0,
            1,
            Message::Commit {
                id: id(1, 1),
                time: 5,
                acknowledge: true
            }
        ),
        unknown
    );
    let unknown = Refusal::Operation {
        process,
        id: id(0, 1),
    };
    assert_eq!(
        skeen(
            0,
            1,
            Message::Proposal {
                id: id(0, 1),
                time: 5
            }
        ),
        unknown
    );
    assert_eq!(skeen(0, 1, Message::Committed { id: id(0, 1) }), unknown);
    assert_eq!(
        skeen(0, 1, Message::Delivered { count: 1 }),
        Refusal::Window { process }
    );
    let submit = Message::Submit {
        id: id(1, 1),
        variable: VariableId(0),
        operation: write(1),
    };
    let ordered = Message::Ordered {
        key: OrderKey {
            time: 1,
            id: id(1, 1),
        },
        variable: VariableId(0),
        operation: write(1),
    };
    let wrong = Refusal::WrongOrder { process };
    assert_eq!(skeen(0, 1, submit.clone()), wrong);
    assert_eq!(skeen(0, 1, ordered.clone()), wrong);
    let sequencer =
        |me, from, message| Net::refused_message(OrderKind::Sequencer, me, from, message);
    assert_eq!(sequencer(0, 1, request(1, 0, write(1), 1)), wrong);
    assert_eq!(
        sequencer(0, 1, ordered),
        wrong,
        "process 0 counts, not process 1"
    );
    let process = ProcessId(2);
    let not_counting = Message::Submit {
        id: id(2, 1),
        variable: VariableId(1),
        operation: write(1),
    };
    assert_eq!(
        sequencer(1, 2, not_counting),
        Refusal::WrongOrder { process }
    );
    assert_eq!(
        sequencer(
            0,
            2,
            Message::Submit {
                id: id(2, 1),
                variable: VariableId(0),
                operation: write(1)
            }
        ),
        not(2, 0)
    );
    let far = Message::Ordered {
        key: OrderKey {
            time: ORDERED_CLOCK_JUMP + 1,
            id: id(2, 1),
        },
        variable: VariableId(1),
        operation: write(1),
    };
    assert!(matches!(sequencer(1, 0, far), Refusal::Time { .. }));
}

#[test]
fn a_commit_below_its_proposal_and_a_second_one_are_refused() {
    let mut net = Net::new(OrderKind::Skeen, false);
    let frame = |sequence, message| Frame::Message { sequence, message };
    let peer = ProcessId(1);
    let first = frame(1, request(1, 2, Operation::Read, 10));
    net.step(0, Event::Frame { peer, frame: first });
    let commit = |time| Message::Commit {
        id: id(1, 1),
        time,
        acknowledge: false,
    };
    let mut early = Net {
        processes: vec![net.processes[0].clone()],
        ..Net::of(Vec::new())
    };
    let refusal = early.refused(0, 1, frame(2, commit(11)));
    assert!(
        matches!(refusal, Refusal::Time { clock: 11, .. }),
        "{refusal:?}"
    );
    // Another process's request is undecided, so the first commit does not deliver.
    let second = Message::Request {
        id: id(2, 1),
        variable: VariableId(2),
        operation: Operation::Read,
        time: 1,
    };
    net.step(
        0,
        Event::Frame {
            peer: ProcessId(2),
            frame: frame(1, second),
        },
    );
    net.step(
        0,
        Event::Frame {
            peer,
            frame: frame(2, commit(20)),
        },
    );
    assert!(net.told.is_empty() && net.processes[0].waiting() == 2);
    let twice = net.refused(0, 1, frame(3, commit(21)));
    assert_eq!(
        twice,
        Refusal::Operation {
            process: peer,
            id: id(1, 1)
        }
    );
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
fn a_clock_that_is_used_up_stops_the_component() {
    let last = Start {
        time: ORDERED_TIME_CEILING / 2,
        ..Start::default()
    };
    let beyond = Start {
        time: last.time + 1,
        ..Start::default()
    };
    assert!(matches!(
        Process::new(config(0, OrderKind::Skeen, false), beyond),
        Err(StartError::Time { .. })
    ));
    let processes = (0..3).map(|me| {
        Process::new(config(me, OrderKind::Skeen, false), last.clone()).expect("a process")
    });
    let mut net = Net::of(processes.collect());
    // Process 1 pushes the clock of process 0 as far as it is let.
    let mut sequence = 0;
    let mut time = last.time;
    loop {
        sequence += 1;
        time += ORDERED_CLOCK_JUMP - 1;
        let message = Message::Request {
            id: id(1, sequence),
            variable: VariableId(0),
            operation: Operation::Read,
            time,
        };
        net.step(
            0,
            Event::Frame {
                peer: ProcessId(1),
                frame: Frame::Message { sequence, message },
            },
        );
        if !net.told.is_empty() || sequence >= ORDERED_WINDOW {
            break;
        }
        assert!(net.processes[0].clock() < ORDERED_TIME_CEILING);
    }
    // The window ends it long before the clock does.
    assert_eq!(sequence, ORDERED_WINDOW);
    net.submit(0, 0, Operation::Read).expect("taken");
}

fn hostile() -> impl Strategy<Value = (u32, u64, Message)> {
    let operations = prop_oneof![
        Just(Operation::Read),
        (0..3i64).prop_map(write),
        Just(Operation::Write(Value::bytes(b"abc"))),
    ];
    let times = prop_oneof![0..40u64, Just(ORDERED_CLOCK_JUMP), Just(u64::MAX)];
    let whole = (0..3u32, 1..4u64, 0..4u32, operations, times);
    let message =
        (whole, 0..8).prop_map(|((initiator, number, variable, operation, time), kind)| {
            let (id, variable) = (id(initiator, number), VariableId(variable));
            match kind {
                0 | 1 => Message::Request {
                    id,
                    variable,
                    operation,
                    time,
                },
                2 => Message::Proposal { id, time },
                3 => Message::Commit {
                    id,
                    time,
                    acknowledge: true,
                },
                4 => Message::Committed { id },
                5 => Message::Submit {
                    id,
                    variable,
                    operation,
                },
                6 => Message::Ordered {
                    key: OrderKey { time, id },
                    variable,
                    operation,
                },
                _ => Message::Delivered { count: time },
            }
        });
    (0..4u32, 0..3u64, message)
}

proptest! {
    /// Whatever peers say, nothing panics, what is refused changes nothing, and keys rise.
    #[test]
    fn hostile_peers_break_nothing(
        order in prop::sample::select(BOTH.to_vec()),
        frames in prop::collection::vec(hostile(), 1..60),
    ) {
        let mut net = Net::new(order, false);
        net.submit(0, 0, write(1)).expect("taken");
        net.submit(0, 2, Operation::Read).expect("taken");
        let mut sequences = [0u64; 4];
        for (from, skip, message) in frames {
            let peer = ProcessId(from);
            let sequence = sequences[from as usize] + u64::from(skip != 1);
            let mut before = net.processes[0].clone();
            let closed = net.told.len();
            net.step(0, Event::Frame { peer, frame: Frame::Message { sequence, message } });
            if net.told.len() > closed {
                before.step(Event::LinkDown { peer }, &mut Vec::new());
                prop_assert_eq!(&before, &net.processes[0]);
                // It comes again, as the process that it was.
                let hello = Hello {
                    process: peer,
                    to: ProcessId(0),
                    incarnation: Incarnation(u64::from(from) + 1),
                    session: 1,
                    ready: true,
                    known: None,
                    received: 0,
                    configuration: before.configuration,
                    start: before.start.digest(&subscriptions(), ProcessId(0), peer),
                };
                net.step(0, Event::LinkUp { peer });
                net.step(0, Event::Frame { peer, frame: Frame::Hello(hello) });
            } else if skip != 1 {
                sequences[from as usize] += 1;
            }
        }
        let keys: Vec<_> = net.delivered[0].iter().map(|d| d.key).collect();
        prop_assert!(keys.is_sorted_by(|one, other| one < other));
    }
}
