//! Who writes under a guard and who commits, in turns: one 64-bit word.
//!
//! ```text
//!  63       52 51      42 41        32 31      16 15       0
//! | waiting  | queued    | committers | turn     | shared   |   low half: futex word
//! ```
//!
//! | committers | shared | meaning |
//! |---|---|---|
//! | 0 | 0 | nobody writes under a guard |
//! | 0 | n | n guards are held |
//! | c | n | c threads commit and wait for n guards |
//! | c | 0 | what is captured now is an exact instant |
//!
//! While somebody commits, who wants a guard is counted as waiting, and from then on
//! whoever else wants to commit is queued. The last committer to leave ends the turn:
//! in one step those who wait hold their guards and those who are queued commit.
//!
//! - I1: a guard is taken only while nobody commits, by the end of a turn, or by a
//!   thread that holds one already (it would wait for itself).
//! - I2: nobody joins a turn that a guard waits for, except by giving a guard back;
//!   so a turn that is waited for has at most as many committers more as there were
//!   guards, and whoever waits for a turn waits for one.
//! - I3: waiting and queued are 0 while committers is 0.
//!
//! A waiter sleeps on the low half, which no turn's end leaves as it was: the turn is
//! one further. It would miss its own turn only by sleeping through 65,536 of them to
//! the very number, none of which ends in order while it is counted among the shared.

use super::sync::{AtomicU64, Ordering};

/// One guard held.
pub const SHARED: u64 = 1;
const TURN: u64 = 1 << 16;
/// One thread that commits.
pub const COMMITTER: u64 = 1 << 32;
const QUEUED: u64 = 1 << 42;
const WAITING: u64 = 1 << 52;

/// Guards that are given without waiting; those who wait come on top.
pub const MAX_SHARED: u64 = 32_767;
/// Threads that commit, and as many that are queued.
pub const MAX_COMMITTERS: u64 = (1 << 10) - 1;
/// Threads that wait for a guard.
pub const MAX_WAITING: u64 = (1 << 12) - 1;

const _: () = assert!(
    MAX_SHARED + MAX_WAITING < TURN,
    "one turn's guards are counted"
);

/// The word cannot count one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A turn that somebody waits for the end of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn(u64);

/// What came of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It is given.
    Given,
    /// It is given when this turn ends: [`has_ended`].
    After(Turn),
}

/// Guards held.
pub const fn shared_of(now: u64) -> u64 {
    now % TURN
}

/// Threads that commit.
pub const fn committers_of(now: u64) -> u64 {
    now / COMMITTER % (QUEUED / COMMITTER)
}

/// The half to sleep on.
pub const fn futex_of(now: u64) -> u32 {
    now as u32
}

const fn turn_of(now: u64) -> u64 {
    now / TURN % (COMMITTER / TURN)
}

const fn queued_of(now: u64) -> u64 {
    now / QUEUED % (WAITING / QUEUED)
}

const fn waiting_of(now: u64) -> u64 {
    now / WAITING
}

/// Asks for a guard; `holds_one`: the thread has one already.
pub fn enter_shared(word: &AtomicU64, holds_one: bool) -> Result<Entry, Full> {
    let waits = |now| committers_of(now) > 0 && !holds_one;
    // SYNC(guard_free): what is stored under the guard comes after the commits that it
    // did not wait for; pairs with `leave_commit`.
    let before = word
        .fetch_update(Ordering::Acquire, Ordering::Relaxed, |now| {
            if waits(now) {
                (waiting_of(now) < MAX_WAITING).then(|| now + WAITING)
            } else {
                (shared_of(now) < MAX_SHARED).then(|| now + SHARED)
            }
        })
        .map_err(|_| Full)?;
    Ok(if waits(before) {
        Entry::After(Turn(turn_of(before)))
    } else {
        Entry::Given
    })
}

/// Gives a guard back; whether committers are to be woken.
pub fn leave_shared(word: &AtomicU64) -> bool {
    // SYNC(guard): what was stored under the guard is seen by who finds none held;
    // pairs with `is_quiet`.
    let before = word.fetch_sub(SHARED, Ordering::Release);
    shared_of(before) == 1 && committers_of(before) > 0
}

/// Asks to commit.
pub fn enter_commit(word: &AtomicU64) -> Result<Entry, Full> {
    // SYNC(guard): what other threads stored under guards before is seen; pairs with
    // `leave_shared`.
    let before = word
        .fetch_update(Ordering::Acquire, Ordering::Relaxed, |now| {
            if waiting_of(now) > 0 {
                (queued_of(now) < MAX_COMMITTERS).then(|| now + QUEUED)
            } else {
                (committers_of(now) < MAX_COMMITTERS).then(|| now + COMMITTER)
            }
        })
        .map_err(|_| Full)?;
    Ok(if waiting_of(before) > 0 {
        Entry::After(Turn(turn_of(before)))
    } else {
        Entry::Given
    })
}

/// Gives a guard back and commits in one step: no other guard comes in between.
/// Whether other committers are to be woken.
pub fn guard_to_commit(word: &AtomicU64) -> Result<bool, Full> {
    // SYNC(guard): what was stored under the guard is seen by who finds none held;
    // pairs with `is_quiet`.
    let before = word
        .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |now| {
            (committers_of(now) < MAX_COMMITTERS).then(|| now + COMMITTER - SHARED)
        })
        .map_err(|_| Full)?;
    Ok(shared_of(before) == 1 && committers_of(before) > 0)
}

/// Ends a commit, and its turn if it was the last; whether somebody is to be woken.
pub fn leave_commit(word: &AtomicU64) -> bool {
    let leave = |now| {
        if committers_of(now) > 1 {
            return now - COMMITTER;
        }
        let shared = shared_of(now) + waiting_of(now);
        let turn = (turn_of(now) + 1) % (COMMITTER / TURN);
        queued_of(now) * COMMITTER + turn * TURN + shared
    };
    // SYNC(guard_free): publishes the end of the commit; pairs with `enter_shared` and
    // `has_ended`.
    let before = word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |now| Some(leave(now)));
    before.is_ok_and(|now| committers_of(now) == 1 && now >= QUEUED)
}

/// Whether nobody holds a guard; a committer waits for it.
pub fn is_quiet(now: u64) -> bool {
    shared_of(now) == 0
}

/// The word is given up: whoever sleeps on it is to look again.
pub fn disturb(word: &AtomicU64) {
    // SYNC(guard_life): who sees this sees the life that follows.
    word.fetch_add(TURN, Ordering::Release);
}

/// Loads the word for [`is_quiet`] and [`has_ended`].
pub fn look(word: &AtomicU64) -> u64 {
    // SYNC(guard): pairs with `leave_shared`, `guard_to_commit`.
    // SYNC(guard_free): pairs with `leave_commit`.
    // SYNC(guard_life): pairs with `disturb`.
    word.load(Ordering::Acquire)
}

/// Whether a turn is over: who waited for it has what it asked for.
pub fn has_ended(now: u64, turn: Turn) -> bool {
    turn_of(now) != turn.0
}

/// Takes a request for a guard back; false if it was given meanwhile.
pub fn cancel_shared(word: &AtomicU64, turn: Turn) -> bool {
    cancel(word, turn, WAITING)
}

/// Takes a request to commit back; false if it was given meanwhile.
pub fn cancel_commit(word: &AtomicU64, turn: Turn) -> bool {
    cancel(word, turn, QUEUED)
}

fn cancel(word: &AtomicU64, turn: Turn, one: u64) -> bool {
    // SYNC(guard_free): if the turn is over, what came before its end is seen; pairs
    // with `leave_commit`.
    word.fetch_update(Ordering::Acquire, Ordering::Acquire, |now| {
        (!has_ended(now, turn)).then(|| now - one)
    })
    .is_ok()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn word() -> AtomicU64 {
        AtomicU64::new(u64::from(u16::MAX) * TURN)
    }

    fn turn(entry: Result<Entry, Full>) -> Turn {
        match entry {
            Ok(Entry::After(turn)) => turn,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_waiting_guard_ends_the_joining_and_has_its_turn_next() {
        let word = word();
        assert_eq!(enter_shared(&word, false), Ok(Entry::Given));
        assert_eq!(enter_commit(&word), Ok(Entry::Given));
        assert_eq!(enter_commit(&word), Ok(Entry::Given), "turns are shared");
        assert!(!is_quiet(look(&word)));
        assert_eq!(enter_shared(&word, true), Ok(Entry::Given), "its own");
        assert!(!leave_shared(&word));
        let waits = turn(enter_shared(&word, false));
        let queued = turn(enter_commit(&word));
        assert_eq!(guard_to_commit(&word), Ok(true), "who holds one joins");
        assert!(is_quiet(look(&word)));
        assert!(!leave_commit(&word) && !leave_commit(&word));
        assert!(!has_ended(look(&word), waits));
        assert!(leave_commit(&word), "two are to be woken");
        let now = look(&word);
        assert!(has_ended(now, waits) && has_ended(now, queued));
        assert_eq!((shared_of(now), committers_of(now)), (1, 1));
        assert!(!cancel_shared(&word, waits) && !cancel_commit(&word, queued));
        assert!(leave_shared(&word), "the one that was queued waits for it");
        assert!(!leave_commit(&word), "nobody else is there");
        assert_eq!(look(&word) / COMMITTER, 0);
    }

    #[test]
    fn who_gives_up_leaves_nothing_behind() {
        let word = word();
        assert_eq!(enter_commit(&word), Ok(Entry::Given));
        let waits = turn(enter_shared(&word, false));
        let queued = turn(enter_commit(&word));
        assert!(cancel_shared(&word, waits) && cancel_commit(&word, queued));
        assert_eq!(enter_commit(&word), Ok(Entry::Given), "none waits any more");
        assert!(!leave_commit(&word) && !leave_commit(&word));
        assert_eq!(shared_of(look(&word)), 0);
    }

    #[test]
    fn what_cannot_be_counted_is_refused_and_changes_nothing() {
        let word = word();
        for _ in 0..MAX_SHARED {
            assert_eq!(enter_shared(&word, false), Ok(Entry::Given));
        }
        assert_eq!(enter_shared(&word, false), Err(Full));
        for _ in 0..MAX_COMMITTERS {
            assert_eq!(enter_commit(&word), Ok(Entry::Given));
        }
        assert_eq!(enter_commit(&word), Err(Full));
        assert_eq!(guard_to_commit(&word), Err(Full));
        for _ in 0..MAX_WAITING {
            turn(enter_shared(&word, false));
        }
        assert_eq!(enter_shared(&word, false), Err(Full));
        for _ in 0..MAX_COMMITTERS {
            turn(enter_commit(&word));
        }
        assert_eq!(enter_commit(&word), Err(Full));
        for left in (0..MAX_COMMITTERS).rev() {
            assert_eq!(leave_commit(&word), left == 0);
        }
        let now = look(&word);
        assert_eq!(shared_of(now), MAX_SHARED + MAX_WAITING);
        assert_eq!(committers_of(now), MAX_COMMITTERS);
        assert!(now < QUEUED, "nobody is left out");
    }
}
