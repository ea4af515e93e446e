//! A checker of linearisability (Wing and Gong 1993, with Lowe's memory of what was tried,
//! 2017) for one 8-byte number: is there an order of the operations that keeps to what was
//! before what in time, in which each one has the answer that it gave?
//!
//! An operation whose outcome is unknown may have happened at any time after its begin, or
//! never.

use std::collections::HashSet;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Read,
    Write(u64),
    Add(u64),
    Exchange { expected: u64, new: u64 },
}

/// One operation as its caller saw it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    /// When it was begun; any unit, the same for all.
    pub(super) begin: u64,
    /// When it ended, and what was there before; none for an unknown outcome.
    pub(super) end: Option<(u64, u64)>,
    pub(super) asked: Asked,
}

impl Call {
    fn ended(&self) -> u64 {
        self.end.map_or(u64::MAX, |(end, _)| end)
    }

    /// The number after the call, if `number` before it explains its answer.
    fn explained(&self, number: u64) -> Option<u64> {
        let after = match self.asked {
            Asked::Read => number,
            Asked::Write(new) => new,
            Asked::Add(addend) => number.wrapping_add(addend),
            Asked::Exchange { expected, new } if number == expected => new,
            Asked::Exchange { .. } => number,
        };
        let fits = match (self.asked, self.end) {
            // A write says nothing of what it replaced.
            (Asked::Write(_), _) | (_, None) => true,
            (_, Some((_, found))) => found == number,
        };
        fits.then_some(after)
    }
}

/// Most steps of a search; beyond it a history is not judged.
const MAX_STEPS: u64 = 2_000_000;

/// Whether the calls are linearisable; none if that is not known after [`MAX_STEPS`].
pub(super) fn is_linearisable(calls: &[Call], initial: u64) -> Option<bool> {
    let mut order = calls.to_vec();
    order.sort_by_key(|call| call.begin);
    let mut placed = vec![false; order.len()];
    let mut tried: HashSet<(Vec<bool>, u64)> = HashSet::new();
    let mut path: Vec<(usize, u64)> = Vec::new();
    // Nothing before it is open.
    let mut first = 0;
    let (mut number, mut from) = (initial, 0);
    for _ in 0..MAX_STEPS {
        while first < order.len() && placed[first] {
            first += 1;
        }
        if (first..order.len()).all(|at| placed[at] || order[at].end.is_none()) {
            return Some(true);
        }
        let open = || (first..order.len()).filter(|at| !placed[*at]);
        let mut first_end = u64::MAX;
        for at in open() {
            if order[at].begin > first_end {
                break;
            }
            first_end = first_end.min(order[at].ended());
        }
        let may_be_next = open().take_while(|at| order[*at].begin <= first_end);
        let next = may_be_next.filter(|at| *at >= from).find_map(|at| {
            let after = order[at].explained(number)?;
            let mut with = placed[first..].to_vec();
            with[at - first] = true;
            with.extend(first.to_le_bytes().map(|byte| byte & 1 == 1));
            with.extend((0..16).map(|bit| first >> bit & 1 == 1));
            tried.insert((with, after)).then_some((at, after))
        });
        match next {
            Some((at, after)) => {
                placed[at] = true;
                path.push((at, std::mem::replace(&mut number, after)));
                from = 0;
            }
            None => {
                let Some((at, before)) = path.pop() else {
                    return Some(false);
                };
                placed[at] = false;
                first = first.min(at);
                number = before;
                from = at + 1;
            }
        }
    }
    None
}

fn call(begin: u64, end: u64, asked: Asked, found: u64) -> Call {
    let end = Some((end, found));
    Call { begin, end, asked }
}

fn write(begin: u64, end: u64, new: u64) -> Call {
    call(begin, end, Asked::Write(new), 0)
}

fn read(begin: u64, end: u64, found: u64) -> Call {
    call(begin, end, Asked::Read, found)
}

fn unknown(call: Call) -> Call {
    Call { end: None, ..call }
}

fn holds(calls: &[Call]) -> bool {
    is_linearisable(calls, 0).expect("few calls overlap")
}

#[test]
fn good_histories_are_linearisable() {
    let exchange = |expected, new| Asked::Exchange { expected, new };
    assert!(holds(&[]));
    assert!(holds(&[write(0, 1, 5), read(2, 3, 5)]));
    let either = [write(0, 9, 1), write(0, 9, 2), read(3, 4, 2), read(5, 6, 1)];
    assert!(holds(&either));
    assert!(holds(&[
        call(0, 9, exchange(0, 1), 0),
        call(0, 9, exchange(0, 2), 1),
        read(10, 11, 1),
    ]));
    assert!(holds(&[
        call(0, 9, Asked::Add(3), 4),
        call(0, 9, Asked::Add(4), 0),
        read(10, 11, 7),
    ]));
    assert!(holds(&[
        unknown(write(0, 0, 7)),
        read(5, 6, 0),
        read(7, 8, 7)
    ]));
    assert!(holds(&[unknown(write(0, 0, 7)), read(5, 6, 0)]));
    assert!(holds(&[write(0, 5, 1), read(5, 6, 0)]), "they overlap");
}

#[test]
fn bad_histories_are_not() {
    let exchange = |expected, new| Asked::Exchange { expected, new };
    assert!(!holds(&[write(0, 1, 5), read(2, 3, 0)]), "a stale read");
    assert!(!holds(&[read(0, 1, 5), write(2, 3, 5)]), "of the future");
    let both = [call(0, 9, exchange(0, 1), 0), call(0, 9, exchange(0, 2), 0)];
    assert!(!holds(&both), "two successes from one value");
    let lost = [call(0, 9, Asked::Add(1), 0), call(0, 9, Asked::Add(1), 0)];
    assert!(!holds(&lost), "an addition was lost");
    let back = [unknown(write(0, 0, 7)), read(5, 6, 7), read(7, 8, 0)];
    assert!(!holds(&back), "an unknown write is undone");
    let early = [unknown(write(5, 0, 7)), read(1, 2, 7)];
    assert!(!holds(&early), "it takes effect before it began");
    let twice = [write(0, 1, 1), unknown(write(2, 0, 2)), write(3, 4, 3)];
    let seen = [read(5, 6, 2), read(7, 8, 3)];
    assert!(
        !holds(&[&twice[..], &seen[..]].concat()),
        "a value comes back"
    );
    let order = [read(0, 1, 0), write(0, 9, 1), read(2, 3, 1), read(4, 5, 0)];
    assert!(!holds(&order), "a value that was seen is gone again");
}

#[test]
fn histories_of_a_cell_hold_and_break_when_one_answer_is_changed() {
    let mut rng = crate::rng::Rng::new(7);
    for _ in 0..40 {
        let (mut number, mut calls) = (0, Vec::new());
        for at in 0..40 {
            // Takes effect at 10 * at + 40, between begin and end.
            let begin = 10 * at + 40 - rng.below(20);
            let end = 10 * at + 40 + rng.below(20);
            let asked = match rng.below(4) {
                0 => Asked::Write(1000 + at),
                1 => Asked::Add(1 << rng.below(40)),
                2 => Asked::Exchange {
                    expected: number,
                    new: 5000 + at,
                },
                _ => Asked::Read,
            };
            let made = call(begin, end, asked, number);
            number = made.explained(number).expect("its own answer");
            calls.push(made);
        }
        assert!(holds(&calls));
        let reads = calls
            .iter_mut()
            .rev()
            .find(|call| call.asked == Asked::Read);
        if let Some(Call {
            end: Some((_, found)),
            ..
        }) = reads
        {
            *found ^= 1 << 60;
            assert!(!holds(&calls));
        }
    }
}
