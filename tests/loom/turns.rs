//! Guards and commits: what a committer sees once it is quiet holds still, and whoever
//! waits is let in by the end of the turn.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use uffd_sync::shm::turns::{self, Entry, Full, Turn};

/// Two words that guards keep equal.
struct Shared {
    word: AtomicU64,
    data: [AtomicU64; 2],
}

impl Shared {
    fn new() -> Arc<Shared> {
        Arc::new(Shared {
            word: AtomicU64::new(0),
            data: [AtomicU64::new(0), AtomicU64::new(0)],
        })
    }

    fn read(&self) -> [u64; 2] {
        [0, 1].map(|i| self.data[i].load(Ordering::Relaxed))
    }

    fn wait(&self, wanted: impl Fn(u64) -> bool) {
        while !wanted(turns::look(&self.word)) {
            thread::yield_now();
        }
    }

    /// One more in both words, under a guard.
    fn write(&self, leave: Leave) {
        if let Entry::After(turn) = turns::enter_shared(&self.word, false).expect("room") {
            self.wait(|now| turns::has_ended(now, turn));
        }
        for word in &self.data {
            word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        leave(&self.word);
    }

    /// A capture while nobody writes.
    fn commit(&self, enter: Enter) {
        if let Entry::After(turn) = enter(&self.word).expect("room") {
            self.wait(|now| turns::has_ended(now, turn));
        }
        self.wait(turns::is_quiet);
        let copy = self.read();
        let again = self.read();
        assert_eq!(
            [copy[1], again[0], again[1]],
            [copy[0]; 3],
            "no exact instant"
        );
        turns::leave_commit(&self.word);
    }
}

type Leave = fn(&AtomicU64) -> bool;
type Enter = fn(&AtomicU64) -> Result<Entry, Full>;

/// One thread writes under a guard while another commits twice.
fn check(leave: Leave, enter: Enter) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let shared = Shared::new();
        let writer = {
            let shared = shared.clone();
            thread::spawn(move || shared.write(leave))
        };
        shared.commit(enter);
        shared.commit(enter);
        writer.join().expect("the writer");
        let end = turns::look(&shared.word);
        assert_eq!((turns::shared_of(end), turns::committers_of(end)), (0, 0));
        assert_eq!(shared.read(), [1; 2]);
    });
}

#[test]
fn a_quiet_word_means_that_nobody_writes() {
    check(turns::leave_shared, turns::enter_commit);
}

#[test]
#[should_panic(expected = "no exact instant")]
fn control_without_publishing_what_a_guard_stored() {
    fn leave(word: &AtomicU64) -> bool {
        word.fetch_sub(turns::SHARED, Ordering::Relaxed);
        true
    }
    check(leave, turns::enter_commit);
}

#[test]
#[should_panic(expected = "no exact instant")]
fn control_of_a_committer_that_is_not_counted() {
    fn enter(_: &AtomicU64) -> Result<Entry, Full> {
        Ok(Entry::Given)
    }
    check(turns::leave_shared, enter);
}

type Join = fn(&AtomicU64) -> Option<Turn>;

/// A guard waits for a commit while another thread comes to commit and stays: the end
/// of the first commit lets the guard in, and the other one after it.
fn check_turns(join: Join) {
    loom::model(move || {
        let word = Arc::new(AtomicU64::new(0));
        assert_eq!(turns::enter_commit(&word), Ok(Entry::Given));
        let Ok(Entry::After(waits)) = turns::enter_shared(&word, false) else {
            panic!("somebody commits");
        };
        let other = {
            let word = word.clone();
            thread::spawn(move || join(&word))
        };
        turns::leave_commit(&word);
        let joined = other.join().expect("the other one");
        let now = turns::look(&word);
        assert!(turns::has_ended(now, waits), "the guard still waits");
        assert_eq!(turns::shared_of(now), 1);
        if let Some(turn) = joined {
            assert!(turns::has_ended(now, turn), "what was queued has its turn");
        }
        assert_eq!(turns::committers_of(now), 1);
        assert!(turns::leave_shared(&word), "the committer is woken");
        turns::leave_commit(&word);
        assert_eq!(turns::committers_of(turns::look(&word)), 0);
    });
}

#[test]
fn the_end_of_a_turn_lets_in_who_waits() {
    check_turns(|word| match turns::enter_commit(word).expect("room") {
        Entry::After(turn) => Some(turn),
        Entry::Given => None,
    });
}

#[test]
#[should_panic(expected = "the guard still waits")]
fn control_of_a_committer_that_joins_a_turn_that_is_waited_for() {
    check_turns(|word| {
        word.fetch_add(turns::COMMITTER, Ordering::AcqRel);
        None
    });
}

/// A queued committer gives up while the turn ends: it is queued no more, or it commits.
#[test]
fn giving_up_and_being_let_in_exclude_each_other() {
    loom::model(|| {
        let word = Arc::new(AtomicU64::new(0));
        assert_eq!(turns::enter_commit(&word), Ok(Entry::Given));
        let Ok(Entry::After(_)) = turns::enter_shared(&word, false) else {
            panic!("somebody commits");
        };
        let Ok(Entry::After(queued)) = turns::enter_commit(&word) else {
            panic!("a guard waits");
        };
        let other = {
            let word = word.clone();
            thread::spawn(move || turns::cancel_commit(&word, queued))
        };
        turns::leave_commit(&word);
        let gave_up = other.join().expect("the other one");
        let now = turns::look(&word);
        assert_eq!(turns::committers_of(now), u64::from(!gave_up));
        assert_eq!(turns::shared_of(now), 1);
    });
}
