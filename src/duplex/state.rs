//! The state of a frame: one word per slot, `sequence << 8 | state`.
//!
//! Whoever's turn it is owns the slot and the frame's bytes, and hands both over by
//! a plain store of the word. The other side compares the whole word with the one
//! that it waits for, so that a frame of another lap is never taken for it.
//!
//! | state | owner | next, by that owner |
//! |---|---|---|
//! | `FREE` | client | `CLIENT_WRITING`, `REQUEST` |
//! | `CLIENT_WRITING` | client | `REQUEST`, `FREE` |
//! | `REQUEST` | server | `SERVER_BUSY`, `RESPONSE`, `FAILED`, `CANCELLED`, `RELEASED` (one-way); `POISONED` by the client of a dead server |
//! | `SERVER_BUSY` | server | `RESPONSE`, `FAILED`, `RELEASED` (one-way); `POISONED` likewise |
//! | `RESPONSE`, `FAILED` | client | `CLIENT_READING`, `RELEASED`, and what follows on `FREE` |
//! | `CLIENT_READING` | client | `RELEASED` |
//! | `CANCELLED` | client | what follows on `RELEASED` |
//! | `RELEASED` | client | what follows on `FREE` |
//! | `POISONED` | client | what follows on `RELEASED` |
//!
//! A side leaves out a state that nothing but its own record needs where the store
//! would take the line away from the other side's poll: `CLIENT_WRITING`,
//! `CLIENT_READING` and `RELEASED` by the client, and `SERVER_BUSY` by a server with
//! one worker, whose `serving` word says the same. With failpoints every state is
//! stored.

use crate::shm::sync::{AtomicU64, Ordering};

/// Which side's turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client.
    Client,
    /// The server.
    Server,
}

/// The state of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Never used, or given back.
    Free = 0,
    /// The client fills it in.
    ClientWriting = 1,
    /// Ready for the server.
    Request = 2,
    /// The handler runs.
    ServerBusy = 3,
    /// The handler is done; ready for the client.
    Response = 4,
    /// The handler failed; ready for the client.
    Failed = 5,
    /// The client reads it.
    ClientReading = 6,
    /// Nobody needs it any more.
    Released = 7,
    /// The client asked for that in time: the handler did not run.
    Cancelled = 8,
    /// Its server died before it was answered.
    Poisoned = 9,
}

impl State {
    /// All states.
    pub const ALL: [State; 10] = [
        State::Free,
        State::ClientWriting,
        State::Request,
        State::ServerBusy,
        State::Response,
        State::Failed,
        State::ClientReading,
        State::Released,
        State::Cancelled,
        State::Poisoned,
    ];

    /// The state of a word, if there is such a state.
    pub const fn of(word: u64) -> Option<State> {
        let code = (word & 0xFF) as usize;
        if code < State::ALL.len() {
            Some(State::ALL[code])
        } else {
            None
        }
    }

    /// Who may change it.
    pub const fn owner(self) -> Side {
        match self {
            State::Request | State::ServerBusy => Side::Server,
            _ => Side::Client,
        }
    }

    /// Whether its owner, or the client of one that died, may change it to `next`, which
    /// may belong to a later frame in the same slot.
    pub const fn may_become(self, next: State) -> bool {
        use State::{
            Cancelled, ClientReading, ClientWriting, Failed, Free, Poisoned, Released, Request,
            Response, ServerBusy,
        };
        match self {
            Free | Released | Cancelled | Poisoned => {
                matches!(next, ClientWriting | Request)
                    || matches!((self, next), (Cancelled | Poisoned, Released))
            }
            ClientWriting => matches!(next, Request | Free),
            Request => matches!(
                next,
                ServerBusy | Response | Failed | Cancelled | Released | Poisoned
            ),
            ServerBusy => matches!(next, Response | Failed | Released | Poisoned),
            Response | Failed => {
                matches!(next, ClientReading | Released | ClientWriting | Request)
            }
            ClientReading => matches!(next, Released),
        }
    }
}

/// The word of `sequence` in `state`.
#[inline]
pub const fn pack(sequence: u64, state: State) -> u64 {
    sequence << 8 | state as u64
}

/// The first sequence from `sequence` on that lies in slot 0, where `mask` is the
/// number of slots less 1.
#[inline]
pub const fn next_lap(sequence: u64, mask: u64) -> u64 {
    (sequence + mask) & !mask
}

/// The sequence of a word.
#[inline]
pub const fn sequence_of(word: u64) -> u64 {
    word >> 8
}

/// Hands the frame over: everything stored before is seen by who finds this state.
#[inline]
pub fn hand_over(word: &AtomicU64, sequence: u64, state: State) {
    // SYNC(frame): publishes header and bytes; pairs with `is_request` and `answer`.
    word.store(pack(sequence, state), Ordering::Release);
}

/// Notes a state that keeps the frame on the same side.
#[inline]
pub fn note(word: &AtomicU64, sequence: u64, state: State) {
    word.store(pack(sequence, state), Ordering::Relaxed);
}

/// Whether the slot holds the request `sequence`; if so its header and bytes are seen.
#[inline]
pub fn is_request(word: &AtomicU64, sequence: u64) -> bool {
    // SYNC(frame): pairs with the client's `hand_over`.
    word.load(Ordering::Acquire) == pack(sequence, State::Request)
}

/// The request that follows where `cursor` would be the next, if it is there: that one,
/// or the first of the next lap, since a client with nothing in flight goes back to
/// slot 0. `is_there` is [`is_request`] for the slot of a sequence.
#[inline]
pub fn awaited(cursor: u64, mask: u64, is_there: impl Fn(u64) -> bool) -> Option<u64> {
    if is_there(cursor) {
        return Some(cursor);
    }
    let lap = next_lap(cursor, mask);
    if !is_there(lap) {
        return None;
    }
    // A client that did not go back hands the former over before the latter, so it is
    // seen now if it was not there above.
    Some(if is_there(cursor) { cursor } else { lap })
}

/// The order in which a batch of requests is handed over: the last one first, so that
/// the server finds it whole and does not ask for lines that are being written. But what
/// lies before slot 0 comes before what lies behind it, or the server takes the latter
/// for a lap that was begun.
#[inline]
pub fn hand_over_order(begun: u64, end: u64, mask: u64) -> impl Iterator<Item = u64> {
    let lap = next_lap(begun, mask).min(end);
    (begun..lap).rev().chain((lap..end).rev())
}

/// What a client finds in the slot of a request that it published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The server has not finished it.
    Pending,
    /// It is the client's again, in this state.
    Done(State),
    /// Something that the server may not store there.
    Foreign(u64),
}

/// What became of the request `sequence`; if done its header and bytes are seen.
#[inline]
pub fn answer(word: &AtomicU64, sequence: u64) -> Answer {
    // SYNC(frame): pairs with the server's `hand_over`.
    let found = word.load(Ordering::Acquire);
    if found == pack(sequence, State::Request) {
        return Answer::Pending;
    }
    if found == pack(sequence, State::Response) {
        return Answer::Done(State::Response);
    }
    slow_answer(found, sequence)
}

#[cold]
fn slow_answer(found: u64, sequence: u64) -> Answer {
    match State::of(found) {
        _ if sequence_of(found) != sequence => Answer::Foreign(found),
        Some(State::Request | State::ServerBusy) => Answer::Pending,
        Some(
            state @ (State::Response
            | State::Failed
            | State::Released
            | State::Cancelled
            | State::Poisoned),
        ) => Answer::Done(state),
        _ => Answer::Foreign(found),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// The table of the module, written out: what may follow on what.
    const NEXT: [(State, &[State]); 10] = {
        use State::*;
        [
            (Free, &[ClientWriting, Request]),
            (ClientWriting, &[Request, Free]),
            (
                Request,
                &[ServerBusy, Response, Failed, Cancelled, Released, Poisoned],
            ),
            (ServerBusy, &[Response, Failed, Released, Poisoned]),
            (Response, &[ClientReading, Released, ClientWriting, Request]),
            (Failed, &[ClientReading, Released, ClientWriting, Request]),
            (ClientReading, &[Released]),
            (Released, &[ClientWriting, Request]),
            (Cancelled, &[Released, ClientWriting, Request]),
            (Poisoned, &[Released, ClientWriting, Request]),
        ]
    };

    #[test]
    fn every_pair_of_states() {
        for (code, (from, next)) in NEXT.into_iter().enumerate() {
            assert_eq!(from as usize, code);
            assert_eq!(State::of(pack(77, from)), Some(from));
            for to in State::ALL {
                assert_eq!(from.may_become(to), next.contains(&to), "{from:?} > {to:?}");
            }
            let server = matches!(from, State::Request | State::ServerBusy);
            assert_eq!(from.owner() == Side::Server, server, "{from:?}");
        }
        for code in 10..=255 {
            assert_eq!(State::of(5 << 8 | code), None);
        }
    }

    #[test]
    fn a_client_believes_only_what_a_server_may_store() {
        let word = AtomicU64::new(0);
        for state in State::ALL {
            word.store(pack(9, state), Ordering::Relaxed);
            assert_eq!(is_request(&word, 9), state == State::Request);
            assert!(!is_request(&word, 8) && !is_request(&word, 9 + 64));
            let expected = match state {
                State::Request | State::ServerBusy => Answer::Pending,
                State::Free | State::ClientWriting | State::ClientReading => {
                    Answer::Foreign(pack(9, state))
                }
                done => Answer::Done(done),
            };
            assert_eq!(answer(&word, 9), expected);
            assert_eq!(answer(&word, 10), Answer::Foreign(pack(9, state)));
        }
        word.store(9 << 8 | 200, Ordering::Relaxed);
        assert!(matches!(answer(&word, 9), Answer::Foreign(_)));
    }
}
