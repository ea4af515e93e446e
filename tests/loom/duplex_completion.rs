//! The completion ring: a client that skips it when nothing is in flight, and reads
//! it otherwise, misses no frame of any worker.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use uffd_sync::duplex::State;
use uffd_sync::duplex::completion::{self, Found};
use uffd_sync::duplex::state::{self, Answer};

const SLOTS: u64 = 4;

struct Channel {
    states: Vec<AtomicU64>,
    ring: Vec<AtomicU64>,
    ticket: AtomicU64,
}

impl Channel {
    fn new() -> Arc<Channel> {
        let words = |count: u64| (0..count).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Channel {
            states: words(SLOTS),
            ring: words(u64::from(completion::places(SLOTS as u32))),
            ticket: AtomicU64::new(1),
        })
    }

    fn state(&self, sequence: u64) -> &AtomicU64 {
        &self.states[(sequence % SLOTS) as usize]
    }

    fn place(&self, ticket: u64) -> &AtomicU64 {
        &self.ring[(ticket % (2 * SLOTS)) as usize]
    }

    fn publish(&self, sequence: u64) {
        state::hand_over(self.state(sequence), sequence, State::Request);
    }

    fn await_request(&self, sequence: u64) {
        while !state::is_request(self.state(sequence), sequence) {
            thread::yield_now();
        }
    }

    fn push(&self, sequence: u64) {
        let ticket = self.ticket.fetch_add(1, Ordering::Relaxed);
        let slot = (sequence % SLOTS) as u16;
        completion::push(self.place(ticket), ticket, sequence, slot);
    }

    fn hand_over(&self, sequence: u64) {
        state::hand_over(self.state(sequence), sequence, State::Response);
    }
}

type Serve = fn(&Channel, u64);

fn serve(channel: &Channel, sequence: u64) {
    channel.push(sequence);
    channel.hand_over(sequence);
}

fn serve_the_other_way(channel: &Channel, sequence: u64) {
    channel.hand_over(sequence);
    channel.push(sequence);
}

/// Request 1 is learned of from its slot alone; then 2 and 3 are sent, of which only
/// 3 is answered, by another worker. The ring has to tell of it.
fn skip_then_read(serve: Serve) {
    loom::model(move || {
        let channel = Channel::new();
        channel.publish(1);
        let workers = [1, 3].map(|sequence| {
            let channel = channel.clone();
            thread::spawn(move || {
                channel.await_request(sequence);
                serve(&channel, sequence);
            })
        });
        while state::answer(channel.state(1), 1) == Answer::Pending {
            thread::yield_now();
        }
        // Nothing is in flight and one frame is known: the next ticket is 2.
        let mut ticket = 2;
        channel.publish(2);
        channel.publish(3);
        for worker in workers {
            worker.join().expect("worker");
        }
        let found = loop {
            match completion::find(channel.place(ticket), ticket) {
                Found::Nothing => panic!("frame 3 was missed"),
                Found::Entry(entry) if entry.sequence == 3 => break entry,
                _ => ticket += 1,
            }
        };
        assert_eq!(u64::from(found.slot), 3 % SLOTS);
        let done = state::answer(channel.state(3), 3);
        assert_eq!(done, Answer::Done(State::Response));
    });
}

#[test]
fn the_ring_may_be_skipped_when_nothing_is_in_flight() {
    skip_then_read(serve);
}

#[test]
#[should_panic(expected = "frame 3 was missed")]
fn control_an_entry_stored_after_the_hand_over() {
    skip_then_read(serve_the_other_way);
}

/// Two workers, two frames: the client reads the ring only, and takes an entry whose
/// frame is not handed over yet for one to be looked at again.
#[test]
fn entries_of_two_workers_are_all_found() {
    loom::model(|| {
        let channel = Channel::new();
        channel.publish(1);
        channel.publish(2);
        let workers = [1, 2].map(|sequence| {
            let channel = channel.clone();
            thread::spawn(move || {
                channel.await_request(sequence);
                serve(&channel, sequence);
            })
        });
        let mut seen = [false; 3];
        let mut ticket = 1;
        while ticket <= 2 {
            let Found::Entry(entry) = completion::find(channel.place(ticket), ticket) else {
                thread::yield_now();
                continue;
            };
            let sequence = u64::from(entry.sequence);
            if state::answer(channel.state(sequence), sequence) == Answer::Pending {
                thread::yield_now();
                continue;
            }
            assert!(!std::mem::replace(&mut seen[sequence as usize], true));
            ticket += 1;
        }
        for worker in workers {
            worker.join().expect("worker");
        }
    });
}
