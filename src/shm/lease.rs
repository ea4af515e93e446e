//! A lock that says who holds it, and that can be taken over from a holder that does not
//! go on, without ever letting two at the same bytes.
//!
//! ```text
//! the word of what is locked:   | turns 32            | zero 15 | wanted 1 | owner 16 |
//! each owner's own word:        | count 24 | place 38                      | state 2  |
//!
//! enter:  own := wants ──> word: free ──> owner ──> own := holds ──> word still mine?
//! leave:  word: owner ──> free, turns + 1 ──> own := idle
//! ```
//! | word | meaning |
//! |---|---|
//! | owner 0 | nobody changes the bytes; they are those of turn `turns` |
//! | owner 0, wanted | the same; only the server may enter |
//! | owner 1..=65534 | a client is about to change them, or does |
//! | owner 65535 | the server does |
//!
//! The words lie where every owner can store anything; an owner's own word lies where only
//! that owner and the server can. So what a word says of its owner is believed only if the
//! owner itself says so too: nobody can be blamed for a lock that it does not hold.
//!
//! Invariants:
//! - I1: between two loads of a word that say the same turn and no owner, nobody that keeps
//!   to this protocol has changed the bytes: the word is at once the sequence of a
//!   [`super::seqlock`] (unless it was changed 2^32 times meanwhile).
//! - I2: of an owner that keeps to it, the own word says `wants` or `holds` whenever a word
//!   names it, but for a lock that was given back to it too late, which it does not use.
//! - I3: an owner stores to the bytes only after its own word says `holds` and it has seen
//!   the word still its own. So from one that `wants` a lock can be taken as it is; from one
//!   that `holds` only when it will never run again.
//!
//! On failure: an owner that dies in the middle leaves the word as it is, and its own word
//! says where.

use super::sync::{AtomicU64, Ordering, fence};

/// The owner that is the server.
pub const SERVER: u16 = u16::MAX;
/// Most places that an own word can name.
pub const MAX_PLACES: u64 = 1 << PLACE_BITS;

const OWNER: u64 = 0xFFFF;
const WANTED: u64 = 1 << 16;
const TURN: u64 = 1 << 32;
const TURNS: u64 = !(TURN - 1);

const STATE: u64 = 3;
const WANTS: u64 = 1;
const HOLDS: u64 = 2;
const PLACE_BITS: u32 = 38;
const PLACE_AT: u32 = 2;
const COUNT_AT: u32 = PLACE_BITS + PLACE_AT;

/// Changes of the wanted bit that a holder puts up with while it leaves: the server makes
/// one at most.
const LEAVING_TRIES: u32 = 64;

/// Who holds the lock of this word; 0 is nobody.
pub const fn owner_of(word: u64) -> u16 {
    (word & OWNER) as u16
}

/// Whether two words say the same but for who wants in.
pub const fn is_same(one: u64, other: u64) -> bool {
    (one ^ other) & !WANTED == 0
}

/// Whether the server waits for it.
pub const fn is_wanted(word: u64) -> bool {
    word & WANTED != 0
}

/// The word that follows a change: the next turn, nobody in it.
const fn next_turn(word: u64) -> u64 {
    (word & TURNS).wrapping_add(TURN)
}

/// What an owner says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    /// It is nowhere.
    Idle,
    /// It is about to enter this place, and has changed nothing.
    Wants(u64),
    /// It may be changing the bytes of this place.
    Holds(u64),
}

/// What an owner's own word says.
pub const fn says(own: u64) -> Says {
    let place = (own >> PLACE_AT) & (MAX_PLACES - 1);
    match own & STATE {
        WANTS => Says::Wants(place),
        HOLDS => Says::Holds(place),
        _ => Says::Idle,
    }
}

/// One client's way to one lock.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// The lock.
    pub word: &'a AtomicU64,
    /// The client's own word, used by one thread at a time.
    pub own: &'a AtomicU64,
    /// Its number, neither 0 nor [`SERVER`].
    pub owner: u16,
    /// Which lock it is, less than [`MAX_PLACES`].
    pub place: u64,
}

/// A lock that a client holds.
#[derive(Debug)]
#[must_use]
pub struct Held {
    word: u64,
    own: u64,
}

impl Client<'_> {
    /// Enters if nobody is in it and the server does not wait for it.
    #[inline]
    pub fn try_enter(&self) -> Option<Held> {
        let now = self.word.load(Ordering::Relaxed);
        if now & (OWNER | WANTED) != 0 {
            return None;
        }
        let count = (self.own.load(Ordering::Relaxed) >> COUNT_AT).wrapping_add(1);
        let own = count << COUNT_AT | self.place << PLACE_AT;
        self.own.store(own | WANTS, Ordering::Relaxed);
        let mine = now | u64::from(self.owner);
        // SYNC(lease_owner): whoever sees this owner sees that it wants it; pairs with
        // `look`. SYNC(lease_free): and the bytes of the holder before; pairs with `leave`
        // and `free`.
        let entered = (self.word).compare_exchange(now, mine, Ordering::AcqRel, Ordering::Relaxed);
        if entered.is_err() {
            self.idle(own);
            return None;
        }
        self.own.store(own | HOLDS, Ordering::Relaxed);
        // SYNC(lease_taken): who takes the lock over and does not see `holds` is seen here;
        // pairs with the fence in `take_over`. It also keeps the changes of the bytes behind
        // the word, for readers.
        fence(Ordering::SeqCst);
        let held = Held { word: mine, own };
        if is_same(self.word.load(Ordering::Relaxed), mine) {
            return Some(held);
        }
        self.idle(own);
        None
    }

    /// Leaves. False if the lock was taken over meanwhile: then others may have changed the
    /// bytes at the same time.
    #[inline]
    pub fn leave(&self, held: Held) -> bool {
        let mut now = self.word.load(Ordering::Relaxed);
        let mut left = false;
        for _ in 0..LEAVING_TRIES {
            if !is_same(now, held.word) {
                break;
            }
            let next = next_turn(now) | now & WANTED;
            // SYNC(lease_free): publishes the bytes; pairs with `try_enter`, `try_take` and
            // `read_begin`.
            let changed =
                (self.word).compare_exchange(now, next, Ordering::Release, Ordering::Relaxed);
            match changed {
                Ok(_) => {
                    left = true;
                    break;
                }
                Err(found) => now = found,
            }
        }
        self.idle(held.own);
        left
    }

    fn idle(&self, own: u64) {
        // SYNC(lease_idle): who sees this sees the word as it was left; pairs with `look`.
        self.own.store(own, Ordering::Release);
    }
}

/// The server enters if nobody is in it; else what the word says.
pub fn try_take(word: &AtomicU64) -> Result<(), u64> {
    let now = word.load(Ordering::Relaxed);
    if owner_of(now) != 0 {
        return Err(now);
    }
    let mine = now & TURNS | u64::from(SERVER);
    // SYNC(lease_free): the bytes of the holder before; pairs with `leave`.
    word.compare_exchange(now, mine, Ordering::Acquire, Ordering::Relaxed)?;
    // SYNC(lease_busy): no change of the bytes is seen before the word; pairs with the fence
    // in `read_validate`.
    fence(Ordering::Release);
    Ok(())
}

/// The server leaves a lock that it is in. The turn is over only if it changed the bytes.
pub fn free(word: &AtomicU64, changed: bool) {
    let now = word.load(Ordering::Relaxed);
    let next = if changed { next_turn(now) } else { now & TURNS };
    // SYNC(lease_free): publishes the bytes; pairs with `try_enter` and `read_begin`.
    word.store(next, Ordering::Release);
}

/// Has clients stay away until the server was in it. Nothing if the word has changed from
/// what was `found`.
pub fn want(word: &AtomicU64, found: u64) {
    // Whoever fails here finds something else the next time.
    let _ = word.compare_exchange(found, found | WANTED, Ordering::Relaxed, Ordering::Relaxed);
}

/// How the owner of a lock stands to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    /// The word says something else by now.
    Moved,
    /// The owner that the word names does not say so: the word is wrong.
    Denies,
    /// It is about to enter.
    Wants,
    /// It may be changing the bytes; the number is another one each time it enters.
    Holds(u64),
}

/// How the owner that `found` names, whose own word is `own`, stands to the lock at `place`.
pub fn look(word: &AtomicU64, found: u64, own: &AtomicU64, place: u64) -> Stand {
    // SYNC(lease_owner): pairs with `try_enter`.
    if !is_same(word.load(Ordering::Acquire), found) {
        return Stand::Moved;
    }
    // SYNC(lease_idle): pairs with the store in `Client::idle`.
    let said = own.load(Ordering::Acquire);
    match says(said) {
        Says::Holds(at) if at == place => Stand::Holds(said),
        Says::Wants(at) if at == place => Stand::Wants,
        _ if is_same(word.load(Ordering::Relaxed), found) => Stand::Denies,
        _ => Stand::Moved,
    }
}

/// The server enters a lock whose word says `found`, whoever that names. False if it says
/// something else by now. Allowed for an owner that will never run again, for none at all,
/// and, within [`take_unused`], for one that wants it.
pub fn take_over(word: &AtomicU64, found: u64) -> bool {
    let mine = found & TURNS | u64::from(SERVER);
    for now in [found & !WANTED, found | WANTED] {
        // SYNC(lease_free): as in `try_take`.
        let taken = word.compare_exchange(now, mine, Ordering::AcqRel, Ordering::Relaxed);
        if taken.is_ok() {
            // SYNC(lease_taken): an owner that is not seen to hold it sees that it does not;
            // pairs with the fence in `try_enter`. SYNC(lease_busy): as in `try_take`.
            fence(Ordering::SeqCst);
            return true;
        }
    }
    false
}

/// Takes the lock at `place` over from the owner that `found` names, whose own word is `own`
/// and said that it [`Stand::Wants`] it. False if the word says something else by now, or the
/// owner turns out to hold it: then it has it as before.
pub fn take_unused(word: &AtomicU64, found: u64, own: &AtomicU64, place: u64) -> bool {
    if !take_over(word, found) {
        return false;
    }
    // SYNC(lease_idle): what an owner has done that left meanwhile is seen.
    if says(own.load(Ordering::Acquire)) != Says::Holds(place) {
        return true;
    }
    // An owner that saw the lock gone keeps away: then this word is wrong, and found out.
    word.store(found & !WANTED, Ordering::Release);
    false
}

/// The word to read under, or none while somebody changes the bytes.
#[inline]
pub fn read_begin(word: &AtomicU64) -> Option<u64> {
    // SYNC(lease_free): pairs with `leave` and `free`.
    let now = word.load(Ordering::Acquire);
    (owner_of(now) == 0).then_some(now)
}

/// Whether what was copied since [`read_begin`] is whole.
#[inline]
pub fn read_validate(word: &AtomicU64, begun: u64) -> bool {
    // SYNC(lease_busy): what was copied is older than the word read below; pairs with the
    // fences in `try_take`, `take_over` and `try_enter`.
    fence(Ordering::Acquire);
    is_same(word.load(Ordering::Relaxed), begun)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const PLACE: u64 = 7;

    fn client<'a>(word: &'a AtomicU64, own: &'a AtomicU64, owner: u16) -> Client<'a> {
        Client {
            word,
            own,
            owner,
            place: PLACE,
        }
    }

    #[test]
    fn one_at_a_time_and_each_turn_counted() {
        let (word, one, two) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let (first, second) = (client(&word, &one, 1), client(&word, &two, 2));
        let begun = read_begin(&word).expect("free");
        let held = first.try_enter().expect("free");
        assert_eq!(owner_of(word.load(Ordering::Relaxed)), 1);
        assert!(second.try_enter().is_none() && read_begin(&word).is_none());
        assert_eq!(says(two.load(Ordering::Relaxed)), Says::Idle);
        assert_eq!(says(one.load(Ordering::Relaxed)), Says::Holds(PLACE));
        let found = try_take(&word).expect_err("held");
        assert!(matches!(look(&word, found, &one, PLACE), Stand::Holds(_)));
        want(&word, found);
        assert!(first.leave(held));
        assert!(!read_validate(&word, begun));
        assert!(second.try_enter().is_none(), "the server waits");
        let begun = read_begin(&word).expect("free");
        try_take(&word).expect("free");
        free(&word, false);
        assert!(read_validate(&word, begun), "nothing changed");
        let held = second.try_enter().expect("free");
        assert!(second.leave(held));
        assert_eq!(word.load(Ordering::Relaxed), 2 << 32);
    }

    #[test]
    fn the_last_turn_is_followed_by_the_first() {
        let (word, own) = (AtomicU64::new(TURNS), AtomicU64::new(u64::MAX << COUNT_AT));
        let client = client(&word, &own, 3);
        let held = client.try_enter().expect("free");
        assert!(client.leave(held));
        assert_eq!(word.load(Ordering::Relaxed), 0);
        try_take(&word).expect("free");
        free(&word, true);
        assert_eq!(word.load(Ordering::Relaxed), TURN);
    }

    #[test]
    fn a_word_that_names_the_wrong_one_is_found_out() {
        let (word, own) = (AtomicU64::new(0), AtomicU64::new(0));
        word.store(5 << 32 | 4, Ordering::Relaxed);
        let found = try_take(&word).expect_err("held, it says");
        assert_eq!(look(&word, found, &own, PLACE), Stand::Denies);
        let elsewhere = Client {
            word: &AtomicU64::new(0),
            place: PLACE + 1,
            ..client(&word, &own, 4)
        };
        let held = elsewhere.try_enter().expect("free");
        assert_eq!(look(&word, found, &own, PLACE), Stand::Denies);
        assert!(elsewhere.leave(held));
        assert!(take_over(&word, found | WANTED));
        assert_eq!(look(&word, found, &own, PLACE), Stand::Moved);
        free(&word, true);
        assert_eq!(word.load(Ordering::Relaxed), 6 << 32);
        assert!(!take_over(&word, found));
    }

    #[test]
    fn a_holder_sees_that_its_lock_was_taken() {
        let (word, own) = (AtomicU64::new(0), AtomicU64::new(0));
        let client = client(&word, &own, 1);
        let held = client.try_enter().expect("free");
        let found = word.load(Ordering::Relaxed);
        assert!(take_over(&word, found));
        free(&word, true);
        assert!(!client.leave(held));
        assert_eq!(says(own.load(Ordering::Relaxed)), Says::Idle);
        let held = client.try_enter().expect("free");
        let found = word.load(Ordering::Relaxed);
        assert!(!take_unused(&word, found, &own, PLACE), "it holds it");
        assert!(client.leave(held));
    }
}
