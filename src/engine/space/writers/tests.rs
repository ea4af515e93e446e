//! Clients whose memory is this process's, and whose lives are children's.

use std::process::{Child, Command};

use super::*;
use crate::limits::SPACE_STRIPE;
use crate::shm::lease::Held;
use crate::space::frame::Incarnation;
use crate::space::locks::{MappedLocks, shared_segment};
use crate::space::stripes::Stripes;

const SEGMENT: u64 = 4 * SPACE_STRIPE;
const LEASE: u64 = 20;

/// Clients whose memory is this process's, and whose life is a child's.
struct Clients {
    writers: Writers,
    now: Instant,
    _stripes: Stripes,
}

struct Sleeper {
    child: Child,
    key: Key,
    locks: MappedLocks,
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sleeper {
    fn enter(&self, stripe: u64) -> Held {
        self.locks.lock(stripe).try_enter().expect("free")
    }

    /// Whether its process ends within a generous time.
    fn ends(&mut self) -> bool {
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            if self.child.try_wait().expect("wait").is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn lives(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }
}

impl Clients {
    fn new() -> Self {
        let stripes = Stripes::create_locked(SEGMENT, Incarnation(1)).expect("made");
        let locks = Locks::of(&stripes).expect("with locks");
        let (_, data) = shared_segment("data", SEGMENT).expect("made");
        let shared = [Arc::new(data), stripes.writable().expect("with locks")];
        let lease = Duration::from_millis(LEASE);
        Self {
            writers: Writers::new(locks, shared, SEGMENT, lease),
            now: Instant::now(),
            _stripes: stripes,
        }
    }

    fn client(&mut self) -> Sleeper {
        let child = Command::new("sleep").arg("600").spawn().expect("started");
        let process = PidFd::open(child.id().cast_signed()).expect("its pidfd");
        let (key, fds) = self.writers.admit(process).expect("admitted");
        let [_, stripes, page] = &fds[..] else {
            panic!("three descriptors");
        };
        let locks = MappedLocks::open(stripes, page, SEGMENT).expect("mapped");
        Sleeper { child, key, locks }
    }

    fn holds(&mut self, stripe: u64) -> bool {
        let request = Request {
            id: 0,
            epoch: 0,
            operation: Operation::Write,
            offset: stripe * SPACE_STRIPE,
            len: 8,
        };
        let held = self.writers.hold(&request, &[0; 8]);
        if held {
            self.writers.let_go(true);
        }
        assert_eq!(self.writers.take_blocked(), !held);
        held
    }

    /// So many looks, a try with each; whether one of them had the lock.
    fn looks(&mut self, stripe: u64, count: u64) -> bool {
        (0..count).any(|_| {
            self.now += LOOK;
            assert!(self.writers.look(self.now));
            self.holds(stripe)
        })
    }

    fn counts(&self) -> (u64, u64, u64) {
        let counts = &self.writers.counts;
        (counts.killed, counts.taken_over, counts.repaired)
    }
}

#[test]
fn who_stays_for_longer_than_the_lease_is_killed_first() {
    let mut clients = Clients::new();
    let (mut stays, mut goes_on) = (clients.client(), clients.client());
    let _held = stays.enter(2);
    assert!(clients.holds(1), "another stripe");
    assert!(!clients.looks(2, LEASE - 1));
    assert!(
        !clients.writers.look(clients.now),
        "not a millisecond later"
    );
    assert!(stays.lives());
    assert!(!clients.looks(2, 2), "not before it is dead");
    assert!(stays.ends());
    assert!(clients.holds(2));
    assert_eq!(clients.counts(), (1, 1, 0));
    let suspect = clients.writers.counts.maybe_modified[0].clone();
    let range = (suspect.first, suspect.end);
    assert_eq!(range, (2 * SPACE_STRIPE, 3 * SPACE_STRIPE));
    assert!(suspect.why.contains("killed"), "{suspect}");
    let held = goes_on.enter(2);
    assert!(goes_on.locks.lock(2).leave(held) && goes_on.lives());
    assert_eq!(clients.writers.counts.writing, 1);
}

#[test]
fn who_only_works_on_is_never_killed() {
    let mut clients = Clients::new();
    let mut works = clients.client();
    for _ in 0..LEASE * 3 {
        let held = works.enter(0);
        assert!(!clients.looks(0, 1));
        assert!(works.locks.lock(0).leave(held));
        assert!(works.locks.lock(0).try_enter().is_none(), "it is wanted");
        assert!(clients.holds(0));
    }
    assert!(works.lives());
    assert_eq!(clients.counts(), (0, 0, 0));
}

#[test]
fn nobody_is_killed_for_what_others_say() {
    let mut clients = Clients::new();
    let (mut blamed, mut liar) = (clients.client(), clients.client());
    // A lock of its own at the same time is none of the one that is in the way.
    let _held = blamed.enter(3);
    for turn in 0..3u64 {
        liar.locks
            .lock(1)
            .word
            .store(turn << 32 | 1, std::sync::atomic::Ordering::Relaxed);
        assert!(clients.holds(1), "broken open at once");
    }
    assert_eq!(clients.counts(), (0, 0, 3));
    assert!(blamed.lives() && liar.lives());
}

#[test]
fn words_that_change_all_the_time_stop_nobody_for_ever() {
    let mut clients = Clients::new();
    let mut restless = clients.client();
    let mut gave_up = None;
    for look in 0..=LEASE * GIVE_UP_LEASES + 2 {
        // It enters anew before each look, although the server waits.
        let own = restless.locks.lock(1);
        own.word.store(0, std::sync::atomic::Ordering::Relaxed);
        let _held = restless.enter(1);
        if clients.looks(1, 1) {
            gave_up = Some(look);
            break;
        }
    }
    assert!(gave_up.is_some_and(|look| look > LEASE), "{gave_up:?}");
    assert!(restless.lives());
    let (killed, taken_over, repaired) = clients.counts();
    assert_eq!((killed, taken_over, repaired), (0, 1, 1));
}

#[test]
fn the_dead_make_room_at_once() {
    let mut clients = Clients::new();
    let mut dies = clients.client();
    let _held = dies.enter(0);
    assert!(!clients.holds(0));
    dies.child.kill().expect("killed");
    assert!(dies.ends());
    clients.writers.died(dies.key);
    assert!(clients.holds(0));
    assert_eq!(clients.counts(), (0, 1, 0));
    assert_eq!(clients.writers.take_gone(), [dies.key]);
    assert!(clients.writers.take_fresh().is_empty(), "it is gone");
    clients.writers.died(dies.key);
    assert_eq!(clients.counts(), (0, 1, 0));
}

#[test]
fn who_leaves_is_forgotten_and_who_does_not_know_is_kept() {
    let mut clients = Clients::new();
    let (leaves, is_left) = (clients.client(), clients.client());
    clients.writers.left(leaves.key, true);
    clients.writers.left(is_left.key, false);
    assert_eq!(clients.writers.counts.writing, 1);
    let _held = is_left.enter(0);
    clients.writers.left(is_left.key, true);
    assert_eq!(
        clients.writers.counts.writing, 1,
        "in the middle of something"
    );
}

#[test]
fn operations_lock_what_they_touch_and_nothing_that_is_refused() {
    let touched = |operation, offset, len, body: &[u8]| {
        let mut out = Vec::new();
        let request = Request {
            id: 0,
            epoch: 0,
            operation,
            offset,
            len,
        };
        touched_by(SEGMENT, &request, body, &mut out);
        out
    };
    let stripe = SPACE_STRIPE as u32;
    let over = SPACE_STRIPE - 1;
    assert_eq!(touched(Operation::Read, over, stripe + 2, &[]), [0, 1, 2]);
    assert_eq!(touched(Operation::FetchAdd, over + 1, 8, &[0; 8]), [1]);
    assert!(touched(Operation::Stat, 0, 0, &[]).is_empty());
    assert!(touched(Operation::Read, SEGMENT, 1, &[]).is_empty());
    assert!(touched(Operation::Fill, 0, u32::MAX, &[0]).is_empty());
    let mut body = Vec::new();
    for (offset, len) in [(3 * SPACE_STRIPE, 8), (over, 2), (0, 1), (SEGMENT, 1)] {
        let item = crate::space::frame::Item {
            operation: Operation::Read,
            offset,
            len,
            body: &[],
        };
        item.append_to(&mut body);
    }
    assert_eq!(touched(Operation::Batch, 0, 4, &body), [0, 1, 3]);
    assert!(touched(Operation::Batch, 0, 65, &body).is_empty());
}
