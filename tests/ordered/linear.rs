//! A checker of linearisability (Wing and Gong 1993, with Lowe's memory of what was
//! tried, 2017) for one variable: is there an order of the operations that keeps to what
//! was before what in time, in which each one has the answer that it gave?
//!
//! It knows nothing of keys, so it also judges the histories of other engines. An
//! operation whose outcome is unknown may have happened at any time after its begin, or
//! never.

use std::collections::HashSet;

use uffd_sync::ordered::{Operation, Value};

/// One operation as its caller saw it.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// When it was begun; any unit, the same for all.
    pub(crate) begin: u64,
    /// When it ended, and how; none for an unknown outcome.
    pub(crate) end: Option<(u64, Answer)>,
    pub(crate) operation: Operation,
}

/// What a caller was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A write was done.
    Written,
    /// Whether a compare-and-swap succeeded.
    Swapped(bool),
    /// What a read found.
    Found(Value),
}

impl Call {
    fn ended(&self) -> u64 {
        self.end.as_ref().map_or(u64::MAX, |(end, _)| *end)
    }

    /// The value after the call, if `value` before it explains its answer.
    fn explained(&self, value: &Value) -> Option<Value> {
        let new = self.operation.applied_to(value);
        let fits = match self.end.as_ref().map(|(_, answer)| answer) {
            None | Some(Answer::Written) => true,
            Some(Answer::Swapped(succeeded)) => *succeeded == new.is_some(),
            Some(Answer::Found(found)) => found == value,
        };
        fits.then(|| new.unwrap_or_else(|| value.clone()))
    }
}

/// Most steps of a search; beyond it a history is not judged.
const MAX_STEPS: u64 = 200_000;

/// Whether the calls on one variable, which held `initial` before, are linearisable;
/// none if that is not known after [`MAX_STEPS`]: time is exponential in the number of
/// calls that overlap, at worst.
pub(crate) fn is_linearisable(calls: &[Call], initial: &Value) -> Option<bool> {
    let mut order: Vec<&Call> = calls.iter().collect();
    order.sort_by_key(|call| call.begin);
    let mut placed = vec![false; order.len()];
    let mut tried: HashSet<(Vec<u64>, Value)> = HashSet::new();
    // The calls placed so far, with the value before each.
    let mut path: Vec<(usize, Value)> = Vec::new();
    let (mut value, mut from) = (initial.clone(), 0);
    for _ in 0..MAX_STEPS {
        let known = (0..order.len()).all(|at| placed[at] || order[at].end.is_none());
        if known {
            return Some(true);
        }
        let next = candidates(&order, &placed)
            .skip_while(|at| *at < from)
            .find_map(|at| {
                let after = order[at].explained(&value)?;
                placed[at] = true;
                let is_new = tried.insert((bits(&placed), after.clone()));
                placed[at] = false;
                is_new.then_some((at, after))
            });
        match next {
            Some((at, after)) => {
                placed[at] = true;
                path.push((at, std::mem::replace(&mut value, after)));
                from = 0;
            }
            None => {
                let Some((at, before)) = path.pop() else {
                    return Some(false);
                };
                placed[at] = false;
                value = before;
                from = at + 1;
            }
        }
    }
    None
}

/// Those that may come next: begun before any other open one ended.
fn candidates<'a>(order: &'a [&Call], placed: &[bool]) -> impl Iterator<Item = usize> + use<'a> {
    let open: Vec<usize> = (0..order.len()).filter(|at| !placed[*at]).collect();
    let first_end = open.iter().map(|at| order[*at].ended()).min();
    let first_end = first_end.unwrap_or(u64::MAX);
    open.into_iter()
        .take_while(move |at| order[*at].begin <= first_end)
}

fn bits(placed: &[bool]) -> Vec<u64> {
    let words = placed.chunks(64);
    let word = |chunk: &[bool]| {
        chunk
            .iter()
            .rev()
            .fold(0, |sum, bit| sum << 1 | u64::from(*bit))
    };
    words.map(word).collect()
}

mod tests {
    use super::*;

    fn call(begin: u64, end: u64, operation: Operation, answer: Answer) -> Call {
        let end = Some((end, answer));
        Call {
            begin,
            end,
            operation,
        }
    }

    fn write(begin: u64, end: u64, value: i64) -> Call {
        call(begin, end, Operation::Write(value.into()), Answer::Written)
    }

    fn cas(begin: u64, end: u64, expected: i64, new: i64, succeeded: bool) -> Call {
        let operation = Operation::CompareAndSwap {
            expected: expected.into(),
            new: new.into(),
        };
        call(begin, end, operation, Answer::Swapped(succeeded))
    }

    fn read(begin: u64, end: u64, found: i64) -> Call {
        call(begin, end, Operation::Read, Answer::Found(found.into()))
    }

    fn unknown(call: Call) -> Call {
        Call { end: None, ..call }
    }

    fn holds(calls: &[Call]) -> bool {
        is_linearisable(calls, &Value::Integer(0)).expect("few calls overlap")
    }

    #[test]
    fn good_histories_are_linearisable() {
        assert!(holds(&[]));
        assert!(holds(&[write(0, 1, 5), read(2, 3, 5)]));
        // Overlapping writes: either may come first, and both reads say which.
        assert!(holds(&[
            write(0, 9, 1),
            write(0, 9, 2),
            read(3, 4, 2),
            read(5, 6, 1)
        ]));
        assert!(holds(&[
            cas(0, 9, 0, 1, true),
            cas(0, 9, 0, 2, false),
            read(10, 11, 1)
        ]));
        assert!(holds(&[
            cas(0, 9, 1, 2, true),
            write(5, 6, 1),
            read(10, 11, 2)
        ]));
        // Unknown: it happened, happened later, or never did.
        assert!(holds(&[
            unknown(write(0, 0, 7)),
            read(5, 6, 0),
            read(7, 8, 7)
        ]));
        assert!(holds(&[unknown(write(0, 0, 7)), read(5, 6, 0)]));
        assert!(holds(&[
            unknown(cas(0, 0, 3, 7, true)),
            write(5, 6, 3),
            read(7, 8, 7)
        ]));
        // Ends and begins at the same moment overlap.
        assert!(holds(&[write(0, 5, 1), read(5, 6, 0)]));
    }

    #[test]
    fn bad_histories_are_not() {
        assert!(!holds(&[write(0, 1, 5), read(2, 3, 0)]), "a stale read");
        assert!(
            !holds(&[read(0, 1, 5), write(2, 3, 5)]),
            "a read of the future"
        );
        let both = [cas(0, 9, 0, 1, true), cas(0, 9, 0, 2, true)];
        assert!(!holds(&both), "two successes from one value");
        let none = [cas(0, 9, 0, 1, false), cas(0, 9, 0, 2, false)];
        assert!(!holds(&none), "nobody succeeded");
        let twice = [
            write(0, 9, 1),
            write(0, 9, 2),
            read(10, 11, 1),
            read(12, 13, 2),
        ];
        assert!(!holds(&twice), "the value changes without a write");
        let back = [unknown(write(0, 0, 7)), read(5, 6, 7), read(7, 8, 0)];
        assert!(!holds(&back), "an unknown write is undone");
        let early = [unknown(write(5, 0, 7)), read(1, 2, 7)];
        assert!(
            !holds(&early),
            "an unknown write takes effect before it began"
        );
        let lost = [write(0, 1, 1), write(2, 3, 2), cas(4, 5, 1, 9, true)];
        assert!(!holds(&lost), "a comparison with a value of the past");
    }

    #[test]
    fn histories_of_a_cell_hold_and_break_when_one_answer_is_changed() {
        let mut rng = crate::rng::Rng::new(7);
        for round in 0..60 {
            let (mut value, mut calls) = (Value::Integer(0), Vec::new());
            for at in 0..24 {
                // Takes effect at 10 * at, between begin and end.
                let (begin, end) = (10 * at + 40 - rng.below(20), 10 * at + 40 + rng.below(20));
                let mut made = match rng.below(3) {
                    0 => write(begin, end, at as i64),
                    1 => cas(begin, end, rng.below(at + 1) as i64, at as i64, true),
                    _ => read(begin, end, 0),
                };
                let after = made.operation.applied_to(&value);
                let answer = match made.operation {
                    Operation::Write(_) => Answer::Written,
                    Operation::CompareAndSwap { .. } => Answer::Swapped(after.is_some()),
                    Operation::Read => Answer::Found(value.clone()),
                };
                made.end = Some((end, answer)).filter(|_| !rng.once_in(10));
                value = after.unwrap_or(value);
                calls.push(made);
            }
            assert!(holds(&calls), "round {round}");
            calls.push(read(1_000, 1_001, -1));
            assert!(!holds(&calls), "round {round}: a value that nobody wrote");
        }
    }
}
