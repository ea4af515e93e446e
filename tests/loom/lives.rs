//! The lives of a guard word: who sees the next life and none of the living counted in the
//! one before has seen all that was done under that word.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;
use uffd_sync::shm::lives;

/// The control page's words, and two more that whoever uses the word of life 0 keeps equal.
struct Page {
    life: AtomicU32,
    held: [AtomicU32; 2],
    words: [AtomicU64; 2],
    data: [AtomicU64; 2],
}

impl Page {
    fn new() -> Arc<Page> {
        Arc::new(Page {
            life: AtomicU32::new(0),
            held: [AtomicU32::new(0), AtomicU32::new(0)],
            words: [AtomicU64::new(7), AtomicU64::new(7)],
            data: [AtomicU64::new(0), AtomicU64::new(0)],
        })
    }

    fn held(&self) -> [&AtomicU32; 2] {
        [&self.held[0], &self.held[1]]
    }

    fn read(&self) -> [u64; 2] {
        [0, 1].map(|at| self.data[at].load(Ordering::Relaxed))
    }
}

type Enter = fn(&Page) -> u32;
type Leave = fn(&Page, u32);

fn enter(page: &Page) -> u32 {
    lives::enter(&page.life, page.held())
}

fn leave(page: &Page, life: u32) {
    lives::leave(life, page.held());
}

/// One thread writes under the word of the life that it finds; the engine begins the next
/// one meanwhile, in which a third thread commits.
fn check(enter: Enter, leave: Leave) {
    loom::model(move || {
        let page = Page::new();
        let writer = {
            let page = page.clone();
            thread::spawn(move || {
                let life = enter(&page);
                if life == 0 {
                    for word in &page.data {
                        word.store(1, Ordering::Relaxed);
                    }
                } else {
                    let word = page.words[lives::parity(life)].load(Ordering::Relaxed);
                    assert_eq!(word, 0, "the word is the one of an earlier life");
                }
                leave(&page, life);
            })
        };
        let committer = {
            let page = page.clone();
            thread::spawn(move || {
                if lives::look(&page.life) == 1 && lives::is_drained([&page.held[0]].into_iter()) {
                    let first = page.read();
                    let again = page.read();
                    assert_eq!(first, again, "no exact instant");
                    assert_eq!(first[0], first[1], "no exact instant");
                }
            })
        };
        if lives::is_drained([&page.held[1]].into_iter()) {
            lives::begin_next(&page.life, &page.words[1]);
        }
        writer.join().expect("the writer");
        committer.join().expect("the committer");
        let left: Vec<u32> = page.held().map(|it| it.load(Ordering::Relaxed)).into();
        assert_eq!(left, [0, 0]);
    });
}

#[test]
fn nobody_of_an_earlier_life_is_overlooked() {
    check(enter, leave);
}

#[test]
#[should_panic(expected = "no exact instant")]
fn control_of_a_thread_that_does_not_look_at_the_life_again() {
    check(
        |page| {
            let life = page.life.load(Ordering::Acquire);
            page.held[lives::parity(life)].fetch_add(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            life
        },
        leave,
    );
}

#[test]
#[should_panic(expected = "no exact instant")]
fn control_of_a_thread_that_looks_again_without_a_fence() {
    check(
        |page| loop {
            let life = page.life.load(Ordering::Acquire);
            let own = &page.held[lives::parity(life)];
            own.fetch_add(1, Ordering::Relaxed);
            if page.life.load(Ordering::Relaxed) == life {
                return life;
            }
            own.fetch_sub(1, Ordering::Relaxed);
        },
        leave,
    );
}

#[test]
#[should_panic(expected = "no exact instant")]
fn control_of_leaving_without_publishing() {
    check(enter, |page, life| {
        page.held[lives::parity(life)].fetch_sub(1, Ordering::Relaxed);
    });
}
