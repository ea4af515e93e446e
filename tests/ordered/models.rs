//! The configurations that decide whether an order is one, each explored whole; and for
//! each rule of the algorithm a control that leaves it out and has to be caught.

use uffd_sync::ordered::{Exact, Operation, OrderKind, Rules, Value};

use crate::explore::{Report, Setup, explore};
use crate::{is_long, subscriptions};

fn write(value: i64) -> Operation {
    Operation::Write(Value::Integer(value))
}

fn cas(expected: i64, new: i64) -> Operation {
    Operation::CompareAndSwap {
        expected: Value::Integer(expected),
        new: Value::Integer(new),
    }
}

fn setup(lists: &[&[u32]], scripts: Vec<Vec<(u32, Operation)>>) -> Setup {
    Setup {
        subscriptions: subscriptions(lists),
        order: OrderKind::Skeen,
        strict: false,
        scripts,
        pipelined: false,
        cuts: 0,
        judged_early: false,
    }
}

/// x{0,1}: two operations at the same time.
fn pair(one: Operation, other: Operation) -> Setup {
    setup(&[&[0, 1]], vec![vec![(0, one)], vec![(0, other)]])
}

/// x and y, both {0,1}: each process writes both, the other way round.
fn two_variables() -> Setup {
    let scripts = vec![
        vec![(0, write(1)), (1, write(2))],
        vec![(1, write(3)), (0, write(4))],
    ];
    setup(&[&[0, 1], &[0, 1]], scripts)
}

/// x{0,1} y{1,2} z{2,0}: any two logs agree and there still may be no order.
fn ring() -> Setup {
    let scripts = vec![
        vec![(0, write(1))],
        vec![(1, write(2))],
        vec![(2, write(3))],
    ];
    setup(&[&[0, 1], &[1, 2], &[2, 0]], scripts)
}

/// x{0,1} y{1,2} z{0,1,2}: a write and two compare-and-swaps.
fn overlapping() -> Setup {
    let scripts = vec![
        vec![(0, write(10))],
        vec![(2, cas(0, 30))],
        vec![(2, cas(0, 40))],
    ];
    setup(&[&[0, 1], &[1, 2], &[0, 1, 2]], scripts)
}

/// The same with a third one on y.
fn overlapping_more() -> Setup {
    let scripts = vec![
        vec![(0, write(10)), (2, cas(0, 20))],
        vec![(1, cas(0, 30))],
        vec![(2, cas(0, 40))],
    ];
    setup(&[&[0, 1], &[1, 2], &[0, 1, 2]], scripts)
}

/// Everything that can happen is in order.
fn holds(setup: &Setup) -> Report {
    let report = explore::<Exact>(setup).unwrap_or_else(|why| panic!("{why}"));
    println!("{report:?}");
    assert!(report.ends > 1, "one interleaving is no model: {report:?}");
    report
}

/// A broken rule is caught.
fn caught<R: Rules>(setup: &Setup) {
    match explore::<R>(setup) {
        Ok(report) => panic!("nothing found in {report:?}"),
        Err(why) => println!("{why}"),
    }
}

fn with(setup: Setup, order: OrderKind, strict: bool) -> Setup {
    Setup {
        order,
        strict,
        ..setup
    }
}

#[test]
fn two_operations_on_one_variable_have_one_order() {
    for order in [OrderKind::Skeen, OrderKind::Sequencer] {
        for strict in [false, true] {
            holds(&with(pair(write(1), write(2)), order, strict));
            holds(&with(pair(write(1), cas(0, 2)), order, strict));
            holds(&with(pair(cas(0, 1), cas(0, 2)), order, strict));
        }
    }
}

#[test]
fn two_variables_have_one_order() {
    holds(&two_variables());
    holds(&with(two_variables(), OrderKind::Sequencer, false));
    let pipelined = Setup {
        pipelined: true,
        ..two_variables()
    };
    holds(&pipelined);
}

#[test]
fn a_ring_has_one_order() {
    holds(&ring());
    holds(&with(ring(), OrderKind::Sequencer, false));
}

#[test]
fn overlapping_subscriptions_have_one_order() {
    holds(&with(overlapping(), OrderKind::Sequencer, false));
    holds(&with(overlapping_more(), OrderKind::Sequencer, false));
    holds(&overlapping());
    if is_long() {
        holds(&overlapping_more());
    }
}

#[test]
fn a_link_may_be_cut_at_any_moment() {
    let cut = |setup| Setup { cuts: 1, ..setup };
    holds(&cut(pair(write(1), cas(0, 2))));
    holds(&cut(with(
        pair(write(1), cas(0, 2)),
        OrderKind::Skeen,
        true,
    )));
    let sequencer = with(pair(cas(0, 1), cas(0, 2)), OrderKind::Sequencer, false);
    holds(&cut(sequencer));
    if is_long() {
        holds(&cut(two_variables()));
        holds(&Setup {
            cuts: 2,
            ..pair(write(1), cas(0, 2))
        });
    }
}

macro_rules! control {
    ($name:ident, $rule:ident) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        struct $name;
        impl Rules for $name {
            const $rule: bool = false;
        }
    };
}

control!(CommitKeepsClock, COMMIT_RAISES_CLOCK);
control!(TiesByArrival, TIES_BY_ID);
control!(QueuePerVariable, ONE_QUEUE);
control!(AppliedAtCommit, WAITS_ITS_TURN);
control!(ShareTwo, SHARE_ANY);

#[test]
fn a_commit_that_does_not_raise_the_clock_is_caught() {
    // Process 1's clock is ahead, which process 0 learns from the time of x alone.
    let ahead = setup(
        &[&[0, 1], &[1], &[0]],
        vec![
            vec![(0, write(1)), (2, write(2))],
            vec![(1, write(3)), (1, write(4))],
        ],
    );
    holds(&ahead);
    caught::<CommitKeepsClock>(&ahead);
}

#[test]
fn ties_by_arrival_are_caught() {
    caught::<TiesByArrival>(&pair(write(1), write(2)));
}

#[test]
fn a_queue_per_variable_is_caught() {
    caught::<QueuePerVariable>(&two_variables());
    caught::<QueuePerVariable>(&ring());
}

#[test]
fn application_at_the_commit_is_caught() {
    caught::<AppliedAtCommit>(&pair(write(1), write(2)));
}

#[test]
fn a_verdict_of_the_initiator_is_caught() {
    let early = Setup {
        judged_early: true,
        ..pair(cas(0, 1), cas(0, 2))
    };
    caught::<Exact>(&early);
}

#[test]
fn sequencers_of_pairs_are_caught_in_the_ring() {
    caught::<ShareTwo>(&with(ring(), OrderKind::Sequencer, false));
}
