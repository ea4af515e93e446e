//! Good logs, and logs that are each bad in one way.

use super::*;
use crate::ordered::{Incarnation, Operation, Value, ValueType, Variable};

/// x{0,1} y{1,2} z{2,0}.
fn ring() -> Subscriptions {
    let lists = [[0, 1], [1, 2], [2, 0]];
    let variables = lists.iter().zip(0..).map(|(list, id)| Variable {
        id: VariableId(id),
        kind: ValueType::Integer,
        subscribers: list.map(ProcessId).to_vec(),
    });
    Subscriptions::new(variables).expect("usable subscriptions")
}

fn key(time: u64, initiator: u32) -> OrderKey {
    let id = OperationId {
        initiator: ProcessId(initiator),
        incarnation: Incarnation(1),
        number: time,
    };
    OrderKey { time, id }
}

fn write(time: u64, initiator: u32, variable: u32, (old, new): (i64, i64)) -> Delivery {
    Delivery {
        key: key(time, initiator),
        variable: VariableId(variable),
        operation: Operation::Write(new.into()),
        old: old.into(),
        new: new.into(),
        applied: true,
    }
}

fn cas(time: u64, initiator: u32, variable: u32, asked: (i64, i64), found: i64) -> Delivery {
    let (expected, new) = (Value::Integer(asked.0), Value::Integer(asked.1));
    let applied = found == asked.0;
    Delivery {
        key: key(time, initiator),
        variable: VariableId(variable),
        operation: Operation::CompareAndSwap { expected, new },
        old: found.into(),
        new: if applied {
            asked.1.into()
        } else {
            found.into()
        },
        applied,
    }
}

/// Good logs of the ring, with writes and compare-and-swaps of both verdicts.
fn good() -> Vec<Log> {
    let all = [
        write(1, 0, 0, (0, 5)),
        write(2, 1, 1, (0, 6)),
        cas(3, 2, 2, (0, 7), 0),
        cas(4, 1, 0, (9, 8), 5),
        cas(5, 2, 1, (6, 6), 6),
        write(6, 0, 2, (7, 1)),
    ];
    let subscriptions = ring();
    let logs = (0..3).map(|process| {
        let process = ProcessId(process);
        let of = |d: &&Delivery| {
            subscriptions
                .variable(d.variable)
                .is_some_and(|v| v.has(process))
        };
        Log {
            process,
            deliveries: all.iter().filter(of).cloned().collect(),
            complete: true,
        }
    });
    logs.collect()
}

fn judged(logs: &[Log]) -> Result<Summary, Breach> {
    check(&ring(), &Start::default(), logs, &[])
}

#[test]
fn good_logs_are_good() {
    let summary = judged(&good()).expect("nothing is broken");
    assert_eq!(
        (summary.operations, summary.entries, summary.applied),
        (6, 12, 5)
    );
    let mut cut = good();
    cut[1].deliveries.truncate(1);
    cut[1].complete = false;
    judged(&cut).expect("a log that ends early is one");
    cut[2].deliveries.clear();
    cut[2].complete = false;
    judged(&cut).expect("and so is an empty one");
    assert_eq!(judged(&[]), Ok(Summary::default()));
}

#[test]
fn keys_that_do_not_rise_are_found() {
    let mut logs = good();
    logs[0].deliveries.swap(1, 2);
    assert!(matches!(
        judged(&logs),
        Err(Breach::NotRising { entry: 2, .. })
    ));
    let mut logs = good();
    let doubled = logs[0].deliveries[1].clone();
    logs[0].deliveries.insert(1, doubled);
    assert!(matches!(
        judged(&logs),
        Err(Breach::NotRising { entry: 2, .. })
    ));
}

#[test]
fn a_ring_without_an_order_is_found() {
    // Each two logs have one operation in common, and so cannot disagree; each process
    // sees its own before its neighbour's.
    let (x, y, z) = (
        write(1, 0, 0, (0, 1)),
        write(1, 1, 1, (0, 1)),
        write(1, 2, 2, (0, 1)),
    );
    let orders = [[x.clone(), z.clone()], [y.clone(), x], [z, y]];
    let logs = orders
        .into_iter()
        .zip(0..)
        .map(|(deliveries, process)| Log {
            process: ProcessId(process),
            deliveries: deliveries.to_vec(),
            complete: true,
        });
    let found = judged(&logs.collect::<Vec<_>>());
    assert!(matches!(
        found,
        Err(Breach::NotRising {
            process: ProcessId(1),
            ..
        })
    ));
}

#[test]
fn two_contents_of_a_key_are_found() {
    let mut logs = good();
    logs[1].deliveries[0].operation = Operation::Write(4.into());
    assert!(matches!(judged(&logs), Err(Breach::Content { .. })));
    let mut logs = good();
    logs[1].deliveries[2].applied = true;
    assert!(
        matches!(judged(&logs), Err(Breach::Content { .. })),
        "another verdict"
    );
}

#[test]
fn two_keys_of_an_operation_are_found() {
    let mut logs = good();
    logs[1].deliveries[2].key.time += 1;
    logs[1].deliveries[3].key.time += 1;
    logs[2].deliveries[2].key.time += 1;
    assert!(matches!(judged(&logs), Err(Breach::TwoKeys { .. })));
}

#[test]
fn what_is_missing_is_found() {
    for lost in 0..4 {
        let mut logs = good();
        let gone = logs[0].deliveries.remove(lost);
        let missing = Breach::Missing {
            process: ProcessId(0),
            key: gone.key,
            variable: gone.variable,
        };
        assert_eq!(judged(&logs), Err(missing));
        logs[0].complete = false;
        let found = judged(&logs);
        // The last one may still have been to come.
        assert_eq!(found.is_err(), lost < 3, "entry {lost}: {found:?}");
    }
}

#[test]
fn a_strangers_part_is_found() {
    let mut logs = good();
    let foreign = write(7, 0, 0, (5, 6));
    logs[2].deliveries.push(foreign);
    assert!(matches!(
        judged(&logs),
        Err(Breach::NotSubscribed {
            process: ProcessId(2),
            ..
        })
    ));
    let mut logs = good();
    for log in &mut logs[..2] {
        log.deliveries.push(write(7, 2, 0, (5, 6)));
    }
    assert!(matches!(judged(&logs), Err(Breach::Initiator { .. })));
}

#[test]
fn a_verdict_or_value_that_no_replay_gives_is_found() {
    // Everybody agrees, and all are wrong.
    let wrong: [fn(&mut Delivery); 3] = [
        |d| d.applied = true,
        |d| d.old = 4.into(),
        |d| d.new = 8.into(),
    ];
    for change in wrong {
        let mut logs = good();
        change(&mut logs[0].deliveries[2]);
        change(&mut logs[1].deliveries[2]);
        assert!(matches!(judged(&logs), Err(Breach::Replay { .. })));
    }
    let mut start = Start::default();
    start.values.insert(VariableId(0), 3.into());
    let found = check(&ring(), &start, &good(), &[]);
    assert!(matches!(found, Err(Breach::Replay { .. })), "another start");
}

#[test]
fn what_was_acknowledged_has_to_be_there() {
    let told = |delivery: &Delivery| Acknowledged {
        key: delivery.key,
        variable: delivery.variable,
        applied: delivery.applied,
    };
    let logs = good();
    let mut acknowledged: Vec<_> = logs[0].deliveries.iter().map(told).collect();
    check(&ring(), &Start::default(), &logs, &acknowledged).expect("all are there");
    let refused = |acknowledged: &[Acknowledged]| {
        let found = check(&ring(), &Start::default(), &logs, acknowledged);
        assert!(
            matches!(found, Err(Breach::Acknowledged { .. })),
            "{found:?}"
        );
    };
    acknowledged[2].applied = true;
    refused(&acknowledged);
    acknowledged[2] = told(&write(9, 0, 0, (5, 9)));
    refused(&acknowledged);
    acknowledged[2] = told(&logs[0].deliveries[2]);
    acknowledged[2].key.time += 1;
    refused(&acknowledged);
}
