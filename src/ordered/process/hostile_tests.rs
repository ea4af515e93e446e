//! Peers that do not keep to the rules: each is refused with the reason, and nothing is
//! changed by it.

use proptest::prelude::*;

use super::tests::{BOTH, Net, config, id, process, subscriptions, write};
use super::*;
use crate::limits::ORDERED_CLOCK_JUMP;

fn request(initiator: u32, variable: u32, operation: Operation, time: u64) -> Message {
    Message::Request {
        id: id(initiator, 1),
        variable: VariableId(variable),
        operation,
        time,
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

/// What process `me` of order skeen says to `message` from `from`.
fn skeen(me: usize, from: u32, message: Message) -> Refusal {
    Net::refused_message(OrderKind::Skeen, me, from, message)
}

/// The same with a sequencer, which is process 0.
fn sequencer(me: usize, from: u32, message: Message) -> Refusal {
    Net::refused_message(OrderKind::Sequencer, me, from, message)
}

fn not(process: u32, variable: u32) -> Refusal {
    Refusal::NotSubscribed {
        process: ProcessId(process),
        variable: VariableId(variable),
    }
}

fn submit(initiator: u32, variable: u32) -> Message {
    Message::Submit {
        id: id(initiator, 1),
        variable: VariableId(variable),
        operation: write(1),
    }
}

fn ordered(time: u64, initiator: u32, variable: u32) -> Message {
    Message::Ordered {
        key: OrderKey {
            time,
            id: id(initiator, 1),
        },
        variable: VariableId(variable),
        operation: write(1),
    }
}

#[test]
fn strangers_to_a_variable_are_refused() {
    // Process 0 does not subscribe to y, and process 2 not to x.
    assert_eq!(skeen(0, 1, request(1, 1, write(1), 1)), not(0, 1));
    assert_eq!(skeen(0, 2, request(2, 0, write(1), 1)), not(2, 0));
    assert_eq!(skeen(0, 2, request(2, 9, write(1), 1)), not(2, 9));
    assert_eq!(sequencer(0, 2, submit(2, 0)), not(2, 0));
    assert_eq!(sequencer(2, 0, ordered(1, 1, 0)), not(2, 0));
    assert_eq!(sequencer(1, 0, ordered(1, 2, 0)), not(2, 0));
}

#[test]
fn operations_of_others_and_values_that_do_not_fit_are_refused() {
    let of_bytes = skeen(0, 1, request(1, 2, write(1), 1));
    assert!(matches!(of_bytes, Refusal::Value(_)));
    let mut other_life = request(1, 0, write(1), 1);
    if let Message::Request { id, .. } = &mut other_life {
        id.incarnation = Incarnation(9);
    }
    let refusal = skeen(0, 1, other_life);
    assert!(matches!(refusal, Refusal::Initiator { .. }));
    let refusal = skeen(0, 1, request(2, 2, Operation::Read, 1));
    assert!(matches!(refusal, Refusal::Initiator { .. }));
}

#[test]
fn clocks_far_ahead_are_refused() {
    let process = ProcessId(1);
    let refused = |time| Refusal::Time {
        process,
        time,
        clock: 0,
    };
    for time in [ORDERED_CLOCK_JUMP + 1, u64::MAX] {
        assert_eq!(skeen(0, 1, request(1, 0, write(1), time)), refused(time));
    }
    let far = sequencer(1, 0, ordered(ORDERED_CLOCK_JUMP + 1, 2, 1));
    assert!(matches!(far, Refusal::Time { .. }));
    let again = sequencer(1, 0, ordered(0, 2, 1));
    assert!(
        matches!(again, Refusal::Time { .. }),
        "a key that does not rise"
    );
}

#[test]
fn what_does_not_fit_the_stage_or_the_order_is_refused() {
    let process = ProcessId(1);
    let unknown = |initiator| Refusal::Operation {
        process,
        id: id(initiator, 1),
    };
    let commit = Message::Commit {
        id: id(1, 1),
        time: 5,
        acknowledge: true,
    };
    assert_eq!(skeen(0, 1, commit), unknown(1));
    let (own, time) = (id(0, 1), 5);
    assert_eq!(skeen(0, 1, Message::Proposal { id: own, time }), unknown(0));
    assert_eq!(skeen(0, 1, Message::Committed { id: own }), unknown(0));
    let window = Refusal::Window { process };
    assert_eq!(skeen(0, 1, Message::Delivered { count: 1 }), window);
    let wrong = Refusal::WrongOrder { process };
    assert_eq!(skeen(0, 1, submit(1, 0)), wrong);
    assert_eq!(skeen(0, 1, ordered(1, 1, 0)), wrong);
    assert_eq!(sequencer(0, 1, request(1, 0, write(1), 1)), wrong);
    assert_eq!(sequencer(0, 1, ordered(1, 1, 0)), wrong, "process 0 counts");
    let process = ProcessId(2);
    let wrong = Refusal::WrongOrder { process };
    assert_eq!(sequencer(1, 2, submit(2, 1)), wrong);
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
