//! A lock that the server may take from a client: two words that whoever is in it keeps
//! equal are never found unequal by another who is, nor by a reader.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;
use uffd_sync::shm::lease::{self, Client, Stand};

const PLACE: u64 = 3;

struct Page {
    word: AtomicU64,
    own: [AtomicU64; 2],
    data: [AtomicU64; 2],
    is_dead: AtomicBool,
}

impl Page {
    fn new() -> Arc<Page> {
        Arc::new(Page {
            word: AtomicU64::new(0),
            own: [AtomicU64::new(0), AtomicU64::new(0)],
            data: [AtomicU64::new(0), AtomicU64::new(0)],
            is_dead: AtomicBool::new(false),
        })
    }

    fn client(&self, at: usize) -> Client<'_> {
        Client {
            word: &self.word,
            own: &self.own[at],
            owner: at as u16 + 1,
            place: PLACE,
        }
    }

    /// What one that is in the lock does.
    fn change(&self, value: u64) {
        let [one, other] = self.read();
        assert_eq!(one, other, "torn");
        for word in &self.data {
            word.store(value, Ordering::Relaxed);
        }
    }

    fn read(&self) -> [u64; 2] {
        [0, 1].map(|at| self.data[at].load(Ordering::Relaxed))
    }
}

fn change_as_client(page: &Page, at: usize) {
    let client = page.client(at);
    if let Some(held) = client.try_enter() {
        page.change(at as u64 + 1);
        assert!(client.leave(held), "nobody took it");
    }
}

#[test]
fn two_clients_and_a_reader() {
    loom::model(|| {
        let page = Page::new();
        let clients = [0, 1].map(|at| {
            let page = page.clone();
            thread::spawn(move || change_as_client(&page, at))
        });
        if let Some(begun) = lease::read_begin(&page.word) {
            let [one, other] = page.read();
            if lease::read_validate(&page.word, begun) {
                assert_eq!(one, other, "torn");
            }
        }
        for client in clients {
            client.join().expect("a client");
        }
        let [one, other] = page.read();
        assert_eq!(one, other, "torn");
    });
}

/// A client changes the bytes while the server takes the lock from one that only wants it,
/// as if its lease was over. `enter` is the client's way in; `seizes` is what the server
/// takes a lock from.
fn against_server(enter: fn(&Page) -> Option<lease::Held>, seizes: fn(Stand) -> bool) {
    loom::model(move || {
        let page = Page::new();
        let client = {
            let page = page.clone();
            thread::spawn(move || {
                if let Some(held) = enter(&page) {
                    page.change(1);
                    page.client(0).leave(held);
                }
            })
        };
        match lease::try_take(&page.word) {
            Ok(()) => {
                page.change(9);
                lease::free(&page.word, true);
            }
            Err(found) if lease::owner_of(found) == 1 => {
                let stand = lease::look(&page.word, found, &page.own[0], PLACE);
                assert_ne!(stand, Stand::Denies, "it says so itself");
                let taken = match stand {
                    _ if !seizes(stand) => false,
                    Stand::Wants => lease::take_unused(&page.word, found, &page.own[0], PLACE),
                    _ => lease::take_over(&page.word, found),
                };
                if taken {
                    page.change(9);
                    lease::free(&page.word, true);
                }
            }
            Err(_) => {}
        }
        client.join().expect("the client");
        let [one, other] = page.read();
        assert_eq!(one, other, "torn");
    });
}

#[test]
fn a_lock_is_taken_from_who_only_wants_it() {
    against_server(
        |page| page.client(0).try_enter(),
        |stand| stand == Stand::Wants,
    );
}

/// What has to be killed first: the stores of one that holds it come late.
#[test]
#[should_panic(expected = "torn")]
fn control_of_a_lock_taken_from_a_holder_that_lives() {
    against_server(
        |page| page.client(0).try_enter(),
        |stand| matches!(stand, Stand::Holds(_)),
    );
}

/// The server does not look again at what the owner says.
#[test]
#[should_panic(expected = "torn")]
fn control_of_a_server_that_does_not_look_again() {
    loom::model(|| {
        let page = Page::new();
        let client = {
            let page = page.clone();
            thread::spawn(move || {
                if let Some(held) = page.client(0).try_enter() {
                    page.change(1);
                    page.client(0).leave(held);
                }
            })
        };
        if let Err(found) = lease::try_take(&page.word)
            && lease::owner_of(found) == 1
            && lease::look(&page.word, found, &page.own[0], PLACE) == Stand::Wants
            && lease::take_over(&page.word, found)
        {
            page.change(9);
            lease::free(&page.word, true);
        }
        client.join().expect("the client");
        let [one, other] = page.read();
        assert_eq!(one, other, "torn");
    });
}

/// A client dies in the middle: what it left is not equal, and whoever takes over makes it
/// so before anybody else is in.
#[test]
fn a_dead_holder_is_followed() {
    loom::model(|| {
        let page = Page::new();
        let first = {
            let page = page.clone();
            thread::spawn(move || {
                if page.client(0).try_enter().is_some() {
                    page.data[0].store(7, Ordering::Relaxed);
                }
                page.is_dead.store(true, Ordering::Release);
            })
        };
        let second = {
            let page = page.clone();
            thread::spawn(move || change_as_client(&page, 1))
        };
        if page.is_dead.load(Ordering::Acquire)
            && let Err(found) = lease::try_take(&page.word)
            && lease::owner_of(found) == 1
            && lease::take_over(&page.word, found)
        {
            page.data[1].store(page.read()[0], Ordering::Relaxed);
            lease::free(&page.word, true);
        }
        first.join().expect("the first client");
        second.join().expect("the second client");
        if lease::owner_of(page.word.load(Ordering::Acquire)) == 0 {
            let [one, other] = page.read();
            assert_eq!(one, other, "torn");
        }
    });
}
