//! A frame that goes back and forth in one slot, handed over by its state word.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use uffd_sync::duplex::State;
use uffd_sync::duplex::state::{self, Answer};

struct Slot {
    state: AtomicU64,
    len: AtomicU64,
    bytes: AtomicU64,
    response: AtomicU64,
}

type HandOver = fn(&AtomicU64, u64, State);
type IsRequest = fn(&AtomicU64, u64) -> bool;
type Finished = fn(&AtomicU64, u64) -> Answer;

/// A client sends `laps` requests through the one slot of a channel; the server adds
/// 1 to each. What either side finds has to be what the other left.
fn check(laps: u64, request: HandOver, respond: HandOver, is_request: IsRequest, answer: Finished) {
    loom::model(move || {
        let slot = Arc::new(Slot {
            state: AtomicU64::new(0),
            len: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            response: AtomicU64::new(0),
        });
        let server = {
            let slot = slot.clone();
            thread::spawn(move || {
                for sequence in 1..=laps {
                    while !is_request(&slot.state, sequence) {
                        thread::yield_now();
                    }
                    assert_eq!(slot.len.load(Ordering::Relaxed), sequence, "a stale header");
                    let bytes = slot.bytes.load(Ordering::Relaxed);
                    assert_eq!(bytes, 100 * sequence, "a stale request");
                    state::note(&slot.state, sequence, State::ServerBusy);
                    slot.bytes.store(bytes + 1, Ordering::Relaxed);
                    slot.response.store(10 * sequence, Ordering::Relaxed);
                    respond(&slot.state, sequence, State::Response);
                }
            })
        };
        for sequence in 1..=laps {
            slot.bytes.store(100 * sequence, Ordering::Relaxed);
            slot.len.store(sequence, Ordering::Relaxed);
            request(&slot.state, sequence, State::Request);
            loop {
                match answer(&slot.state, sequence) {
                    Answer::Pending => thread::yield_now(),
                    Answer::Done(State::Response) => break,
                    other => panic!("{other:?}"),
                }
            }
            let response = slot.response.load(Ordering::Relaxed);
            assert_eq!(response, 10 * sequence, "a stale response");
            let bytes = slot.bytes.load(Ordering::Relaxed);
            assert_eq!(bytes, 100 * sequence + 1, "a stale response");
        }
        server.join().expect("the server");
    });
}

#[test]
fn frames_come_back_as_the_server_left_them() {
    check(
        2,
        state::hand_over,
        state::hand_over,
        state::is_request,
        state::answer,
    );
}

#[test]
#[should_panic(expected = "a stale")]
fn control_a_request_handed_over_without_release() {
    check(
        1,
        state::note,
        state::hand_over,
        state::is_request,
        state::answer,
    );
}

#[test]
#[should_panic(expected = "a stale")]
fn control_a_request_taken_without_acquire() {
    fn is_request(word: &AtomicU64, sequence: u64) -> bool {
        word.load(Ordering::Relaxed) == state::pack(sequence, State::Request)
    }
    check(
        1,
        state::hand_over,
        state::hand_over,
        is_request,
        state::answer,
    );
}

/// A client that looks for its answer twice, without letting the server run between.
fn look_twice(respond: HandOver, answer: Finished) {
    loom::model(move || {
        let state = Arc::new(AtomicU64::new(0));
        let response = Arc::new(AtomicU64::new(0));
        state::hand_over(&state, 1, State::Request);
        let server = {
            let (state, response) = (state.clone(), response.clone());
            thread::spawn(move || {
                response.store(10, Ordering::Relaxed);
                respond(&state, 1, State::Response);
            })
        };
        for _ in 0..2 {
            if answer(&state, 1) == Answer::Done(State::Response) {
                let response = response.load(Ordering::Relaxed);
                assert_eq!(response, 10, "a stale response");
            }
        }
        server.join().expect("the server");
    });
}

#[test]
fn a_response_is_seen_with_its_answer() {
    look_twice(state::hand_over, state::answer);
}

#[test]
#[should_panic(expected = "a stale response")]
fn control_a_response_handed_over_without_release() {
    look_twice(state::note, state::answer);
}

#[test]
#[should_panic(expected = "a stale response")]
fn control_an_answer_taken_without_acquire() {
    fn answer(word: &AtomicU64, sequence: u64) -> Answer {
        if word.load(Ordering::Relaxed) == state::pack(sequence, State::Response) {
            Answer::Done(State::Response)
        } else {
            Answer::Pending
        }
    }
    look_twice(state::hand_over, answer);
}

/// Slots of the model of laps, less 1.
const MASK: u64 = 3;

type Awaited = fn(u64, u64, &dyn Fn(u64) -> bool) -> Option<u64>;
type Order = fn(u64, u64) -> Vec<u64>;

/// A client sends `batches` of requests from `first` on, each after the answers to the one
/// before, and goes back to slot 0 between two of them where `goes_back`. The server has
/// to take all of them in their order.
fn laps(first: u64, batches: &'static [u64], goes_back: bool, awaited: Awaited, order: Order) {
    loom::model(move || {
        let slots: Arc<Vec<AtomicU64>> = Arc::new((0..=MASK).map(|_| AtomicU64::new(0)).collect());
        let mut sent = Vec::new();
        let mut next = first;
        for count in batches {
            if goes_back && !sent.is_empty() {
                next = state::next_lap(next, MASK);
            }
            sent.push((next, next + count));
            next += count;
        }
        let client = {
            let (slots, sent) = (slots.clone(), sent.clone());
            thread::spawn(move || {
                for (begun, end) in sent {
                    for sequence in order(begun, end) {
                        let word = &slots[(sequence & MASK) as usize];
                        state::hand_over(word, sequence, State::Request);
                    }
                    for sequence in begun..end {
                        let word = &slots[(sequence & MASK) as usize];
                        while state::answer(word, sequence) == Answer::Pending {
                            thread::yield_now();
                        }
                    }
                }
            })
        };
        let mut cursor = first;
        for expected in sent.iter().flat_map(|(begun, end)| *begun..*end) {
            let found = loop {
                let is_there =
                    |sequence: u64| state::is_request(&slots[(sequence & MASK) as usize], sequence);
                match awaited(cursor, MASK, &is_there) {
                    Some(found) => break found,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(found, expected, "a request was passed over");
            cursor = found + 1;
            state::hand_over(&slots[(found & MASK) as usize], found, State::Response);
        }
        client.join().expect("the client");
    });
}

fn as_built(cursor: u64, mask: u64, is_there: &dyn Fn(u64) -> bool) -> Option<u64> {
    state::awaited(cursor, mask, is_there)
}

fn order_as_built(begun: u64, end: u64) -> Vec<u64> {
    state::hand_over_order(begun, end, MASK).collect()
}

#[test]
fn a_client_that_goes_back_to_slot_0_is_found_there() {
    laps(1, &[1, 1], true, as_built, order_as_built);
    laps(2, &[1, 2], true, as_built, order_as_built);
}

#[test]
fn a_batch_across_slot_0_is_taken_in_order() {
    laps(3, &[2], false, as_built, order_as_built);
    laps(2, &[3], false, as_built, order_as_built);
}

#[test]
#[should_panic(expected = "a request was passed over")]
fn control_a_lap_taken_without_a_second_look() {
    fn awaited(cursor: u64, mask: u64, is_there: &dyn Fn(u64) -> bool) -> Option<u64> {
        let lap = state::next_lap(cursor, mask);
        if is_there(cursor) {
            return Some(cursor);
        }
        is_there(lap).then_some(lap)
    }
    laps(3, &[2], false, awaited, order_as_built);
}

#[test]
#[should_panic(expected = "a request was passed over")]
fn control_a_batch_across_slot_0_handed_over_backwards() {
    fn order(begun: u64, end: u64) -> Vec<u64> {
        (begun..end).rev().collect()
    }
    laps(3, &[2], false, as_built, order);
}
