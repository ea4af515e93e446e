//! Several processes in one program, over Unix sockets in a folder of their own.

use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

fn config(folder: &Path, process: u32, order: OrderKind) -> VariablesConfig {
    let name = |text: &str| text.parse().expect("a name");
    let mut config = VariablesConfig::new(process).order(order);
    for id in 0..3 {
        config = config.member(id, Address::Unix(folder.join(format!("{id}.sock"))));
    }
    config
        .variable(0, name("left"), ValueKind::I64, [0, 1])
        .variable(1, name("right"), ValueKind::I64, [1, 2])
        .variable(2, name("total"), ValueKind::I64, [0, 1, 2])
        .variable(3, name("text"), ValueKind::Bytes, [0, 1, 2])
}

struct Party {
    variables: Variables,
    heard: Receiver<Notice>,
}

fn party(config: VariablesConfig) -> Party {
    let (told, heard): (SyncSender<Notice>, _) = mpsc::sync_channel(100_000);
    let callback = move |notice: &Notice| {
        // The test may have ended.
        let _ = told.send(notice.clone());
    };
    let variables = Variables::start(config, callback).expect("started");
    Party { variables, heard }
}

fn parties(folder: &Path, order: OrderKind) -> Vec<Party> {
    (0..3).map(|id| party(config(folder, id, order))).collect()
}

impl Party {
    /// The next `count` changes: variable and new value.
    fn changes(&self, count: usize) -> Vec<(u32, Value)> {
        let next = || match self.heard.recv_timeout(PATIENCE).expect("a notice") {
            Notice::Change(change) => (change.variable, change.new),
            other => panic!("{other:?} in place of a change"),
        };
        (0..count).map(|_| next()).collect()
    }
}

#[test]
fn three_processes_hear_the_same_order() {
    for order in [OrderKind::Skeen, OrderKind::Sequencer] {
        let folder = tempfile::tempdir().expect("a folder");
        let all = parties(folder.path(), order);
        let write = |process: usize, variable, value: i64| {
            let written = all[process].variables.write(variable, value, PATIENCE);
            written.expect("written");
        };
        write(0, 0, 10);
        write(1, 0, 15);
        write(2, 1, 7);
        let swap = |process: usize, expected: i64, new: i64| {
            let swapped = all[process]
                .variables
                .compare_and_swap(2, expected, new, PATIENCE);
            swapped.expect("decided")
        };
        assert!(swap(0, 0, 20));
        assert!(!swap(2, 0, 30), "it does not hold 0 any more");
        assert_eq!(
            all[1].variables.read_ordered(2, PATIENCE),
            Ok(Value::Integer(20))
        );
        assert_eq!(all[1].changes(4)[3], (2, Value::Integer(20)));
        let number = Value::Integer;
        assert_eq!(
            all[0].changes(3),
            [(0, number(10)), (0, number(15)), (2, number(20))]
        );
        assert_eq!(all[2].changes(2), [(1, number(7)), (2, number(20))]);
        assert_eq!(all[0].variables.get(2), Ok(number(20)));
    }
}

#[test]
fn strangers_to_a_variable_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let alone = party(config(folder.path(), 2, OrderKind::Skeen)).variables;
    let refused = |error: OperationError| {
        matches!(
            error,
            OperationError::Refused(SubmitError::NotSubscribed { .. })
        )
    };
    assert!(refused(
        alone.write(0, 1, PATIENCE).expect_err("not a subscriber")
    ));
    assert!(refused(alone.get(0).expect_err("not a subscriber")));
    assert!(refused(
        alone
            .read_ordered(0, PATIENCE)
            .expect_err("not a subscriber")
    ));
    assert!(refused(
        alone
            .subscribe(Some(&[0]), 1)
            .expect_err("not a subscriber")
    ));
    let long = vec![0; crate::limits::MAX_VARIABLE_BYTES as usize + 1];
    let error = alone
        .write(3, Value::bytes(&long), PATIENCE)
        .expect_err("too long");
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(
        alone.write(1, Value::bytes(b"1"), PATIENCE).is_err(),
        "another type"
    );
    assert!(alone.write(9, 1, PATIENCE).is_err(), "no such variable");
    // Its peers are not there: nothing is sent, and nothing will be.
    let error = alone
        .write(1, 1, Duration::from_millis(20))
        .expect_err("alone");
    assert!(matches!(error, OperationError::NotSent { .. }), "{error}");
}

#[test]
fn the_longest_value_goes_round() {
    let folder = tempfile::tempdir().expect("a folder");
    let all = parties(folder.path(), OrderKind::Skeen);
    let long = Value::bytes(&vec![7; crate::limits::MAX_VARIABLE_BYTES as usize]);
    all[0]
        .variables
        .write(3, long.clone(), PATIENCE)
        .expect("written");
    let swapped = all[1]
        .variables
        .compare_and_swap(3, long.clone(), Value::bytes(b""), PATIENCE);
    assert_eq!(swapped, Ok(true));
    assert_eq!(all[2].changes(2), [(3, long), (3, Value::bytes(b""))]);
}

/// A callback that asks for an ordered operation is told that it must not, at once.
#[test]
fn callbacks_that_call_back_are_refused_and_may_look() {
    let folder = tempfile::tempdir().expect("a folder");
    let others: Vec<_> = (1..3)
        .map(|id| party(config(folder.path(), id, OrderKind::Skeen)))
        .collect();
    let own: Arc<OnceLock<Arc<Variables>>> = Arc::default();
    let (told, heard) = mpsc::sync_channel(16);
    let there = Arc::clone(&own);
    let callback = move |_: &Notice| {
        let variables = there.get().expect("set before the first write");
        let write = variables.write(0, 99, PATIENCE);
        // The test may have ended.
        let _ = told.send((write, variables.get(0)));
    };
    let variables = Variables::start(config(folder.path(), 0, OrderKind::Skeen), callback);
    let variables = Arc::new(variables.expect("started"));
    assert!(own.set(Arc::clone(&variables)).is_ok());
    variables.write(0, 5, PATIENCE).expect("written");
    let (write, seen) = heard.recv_timeout(PATIENCE).expect("called back");
    assert_eq!(write, Err(OperationError::InCallback));
    assert_eq!(seen, Ok(Value::Integer(5)));
    drop(others);
}

#[test]
fn many_in_flight_keep_their_order_and_fit_the_window() {
    let folder = tempfile::tempdir().expect("a folder");
    let all = parties(folder.path(), OrderKind::Skeen);
    std::thread::scope(|scope| {
        for Party { variables, .. } in &all {
            scope.spawn(move || {
                let mut under_way = std::collections::VecDeque::new();
                for number in 0..500 {
                    let operation = Operation::Write(Value::Integer(number));
                    under_way.push_back(variables.begin(2, operation).expect("begun"));
                    if under_way.len() == 64 {
                        let first = under_way.pop_front().expect("64 of them");
                        first.wait(PATIENCE).expect("written");
                    }
                }
                for pending in under_way {
                    pending.wait(PATIENCE).expect("written");
                }
            });
        }
    });
    let orders: Vec<_> = all.iter().map(|party| party.changes(1500)).collect();
    assert!(
        orders[0] == orders[1] && orders[1] == orders[2],
        "orders differ"
    );
}

#[test]
fn a_slow_callback_slows_everybody_down_and_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let fast = [0, 1].map(|id| party(config(folder.path(), id, OrderKind::Skeen)));
    let (go, gate) = mpsc::channel::<()>();
    let (told, heard) = mpsc::channel();
    let mut waited = false;
    let callback = move |notice: &Notice| {
        if !waited {
            waited = gate.recv_timeout(PATIENCE).is_ok();
        }
        // The test may have ended.
        let _ = told.send(notice.clone());
    };
    let slow = Variables::start(config(folder.path(), 2, OrderKind::Skeen), callback);
    let slow = slow.expect("started");
    let total = crate::limits::MAX_CALLBACKS_WAITING as i64 + 2_000;
    let writer = &fast[0].variables;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut under_way = std::collections::VecDeque::new();
            for number in 0..total {
                if under_way.len() == 32 {
                    let first: Pending = under_way.pop_front().expect("32 of them");
                    first.wait(PATIENCE).expect("written");
                }
                let operation = Operation::Write(Value::Integer(number));
                under_way.push_back(writer.begin(2, operation).expect("begun"));
            }
            for pending in under_way {
                pending.wait(PATIENCE).expect("written");
            }
        });
        // The fast ones come as far as the slow one's queue allows; then it is let go.
        fast[1].changes(crate::limits::MAX_CALLBACKS_WAITING as usize);
        go.send(()).expect("it waits");
    });
    for number in 0..total {
        match heard.recv_timeout(PATIENCE).expect("a notice") {
            Notice::Change(change) => assert_eq!(change.new, Value::Integer(number)),
            other => panic!("{other:?}"),
        }
    }
    drop(slow);
}

#[test]
fn lost_memory_is_unavailable_until_a_new_session() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut all = parties(folder.path(), OrderKind::Skeen);
    all[0].variables.write(2, 5, PATIENCE).expect("written");
    let written = all[0].variables.write(3, Value::bytes(b"kept"), PATIENCE);
    written.expect("written");
    drop(all.remove(2));
    all.push(party(config(folder.path(), 2, OrderKind::Skeen)));
    let unavailable = |party: &Party| {
        let skip = |notice: &Notice| matches!(notice, Notice::Change(_));
        let next = || party.heard.recv_timeout(PATIENCE).expect("a notice");
        let first = std::iter::repeat_with(next).find(|notice| !skip(notice));
        assert!(matches!(first, Some(Notice::Unavailable(_))), "{first:?}");
    };
    unavailable(&all[0]);
    unavailable(&all[1]);
    let error = all[0]
        .variables
        .write(2, 6, PATIENCE)
        .expect_err("unavailable");
    assert!(
        matches!(error, OperationError::Refused(SubmitError::Unavailable(_))),
        "{error}"
    );
    let saved: Vec<_> = all
        .iter()
        .map(|party| party.variables.freeze().expect("frozen"))
        .collect();
    let error = all[1].variables.write(2, 6, PATIENCE).expect_err("frozen");
    assert_eq!(error, OperationError::Frozen);
    let again = all[0].variables.freeze().expect("frozen");
    assert_eq!(again, saved[0], "asked again it says the same");
    let merged = merge_saved(all[0].variables.config(), &saved).expect("merged");
    for party in &all {
        party.variables.renew(&merged).expect("renewed");
    }
    assert!(
        all[0].variables.renew(&merged).is_err(),
        "not a later session"
    );
    assert_eq!(all[2].variables.get(2), Ok(Value::Integer(5)));
    assert_eq!(all[2].variables.get(3), Ok(Value::bytes(b"kept")));
    all[2].variables.write(2, 6, PATIENCE).expect("written");
    assert_eq!(
        all[0].variables.read_ordered(2, PATIENCE),
        Ok(Value::Integer(6))
    );
}

#[test]
fn a_differing_configuration_is_refused_and_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = party(config(folder.path(), 0, OrderKind::Skeen));
    let mut other = config(folder.path(), 1, OrderKind::Skeen);
    other.variables[1].kind = ValueKind::Bytes;
    let second = party(other);
    for (party, peer) in [(&first, 1), (&second, 0)] {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = party.variables.status().expect("an answer");
            let link = status.links.iter().find(|link| link.process == peer);
            let trouble = link
                .and_then(|link| link.trouble.clone())
                .unwrap_or_default();
            if trouble.contains("variable 1 (right) is of type") {
                break;
            }
            assert!(Instant::now() < deadline, "{trouble}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
