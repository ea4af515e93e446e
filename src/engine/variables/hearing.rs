//! Who hears of changes, and what everybody may look at without asking: the values as
//! delivered here, one thread that calls back, and bounded streams.
//!
//! ```text
//!  order --> deliver() --> values (get)
//!                     \--> streams, each bounded: a slow one is ended, never thinned out
//!                      \-> queue --> callback thread --> the program's callback
//! ```
//!
//! - I1: all hear the same notices in the same order.
//! - I2: whoever delivers looks at [`Hearing::is_full`] first and reads nothing more from
//!   its peers while it is: a slow callback slows its peers down, and costs no memory.
//! - I3: on the callback's thread [`in_callback`] is true; an ordered call there is an
//!   error, since what it would wait for waits for it.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::limits;
use crate::ordered::{OrderKey, ProcessId, StopReason, Value};

/// One change of one variable, as every subscriber hears it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its place in the order; places rise.
    pub key: OrderKey,
    /// Which variable.
    pub variable: u32,
    /// What it held before.
    pub old: Value,
    /// What it holds now; may equal `old`.
    pub new: Value,
    /// Whether it was a compare-and-swap.
    pub swap: bool,
    /// The process that asked for it; none for a change by another program of the etcd
    /// cluster.
    pub initiator: Option<ProcessId>,
}

/// What a callback or a stream hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A variable changed.
    Change(Change),
    /// Changes were missed, and this is what all variables hold now: the etcd cluster had
    /// compacted them away, or all processes started anew.
    Resync {
        /// Place in the order up to which everything is contained.
        time: u64,
        /// Variables in the order of their ids.
        values: Vec<(u32, Value)>,
    },
    /// Nothing changes any more until all processes start anew.
    Unavailable(StopReason),
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub enum StreamEnd {
    /// The notices were taken more slowly than they came.
    #[error(
        "the stream fell behind by more than {capacity} notices and was ended; subscribe again and read the values"
    )]
    Overrun {
        /// Notices that it holds.
        capacity: usize,
    },
    /// The variables were stopped.
    #[error("the variables were stopped")]
    Stopped,
}

thread_local! {
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is calling back.
pub(super) fn in_callback() -> bool {
    IN_CALLBACK.get()
}

#[derive(Debug, Default)]
struct StreamState {
    notices: VecDeque<Notice>,
    end: Option<StreamEnd>,
}

#[derive(Debug)]
struct StreamSlot {
    wanted: Option<Vec<u32>>,
    capacity: usize,
    state: Mutex<StreamState>,
    grown: Condvar,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change below is complete before anything that can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bounded stream of notices, in order and without gaps until its end.
#[derive(Debug)]
pub struct Subscription(Arc<StreamSlot>);

impl Subscription {
    /// The next notice; none if there is no other within `deadline`.
    ///
    /// # Errors
    /// [`StreamEnd`], after the notices that came before the end.
    pub fn next_within(&mut self, deadline: Duration) -> Result<Option<Notice>, StreamEnd> {
        let until = super::pending::until(deadline);
        let mut state = locked(&self.0.state);
        loop {
            if let Some(notice) = state.notices.pop_front() {
                return Ok(Some(notice));
            }
            if let Some(end) = state.end {
                return Err(end);
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return Ok(None);
            };
            let woken = self.0.grown.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Waits for each notice; ends after [`StreamEnd::Stopped`], or with an overrun as its
/// last item.
impl Iterator for Subscription {
    type Item = Result<Notice, StreamEnd>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_within(Duration::from_secs(3600)) {
                Ok(Some(notice)) => return Some(Ok(notice)),
                Ok(None) => {}
                Err(StreamEnd::Stopped) => return None,
                Err(end) => {
                    locked(&self.0.state).end = Some(StreamEnd::Stopped);
                    return Some(Err(end));
                }
            }
        }
    }
}

#[derive(Default)]
struct Queue {
    notices: VecDeque<Notice>,
    closed: bool,
    /// Whether the callback panicked: nobody is called any more.
    deaf: bool,
    /// Whether somebody waits for room.
    stalled: bool,
}

/// What is known and who wants to know.
pub(super) struct Hearing {
    values: Mutex<BTreeMap<u32, Value>>,
    /// Why nothing changes any more, if so; for streams that begin after that was told.
    unavailable: Mutex<Option<StopReason>>,
    streams: Mutex<Vec<Weak<StreamSlot>>>,
    queue: Mutex<Queue>,
    grown: Condvar,
    /// Whether there is a callback at all.
    called_back: bool,
}

impl Hearing {
    pub(super) fn new(values: BTreeMap<u32, Value>, called_back: bool) -> Self {
        Self {
            values: Mutex::new(values),
            unavailable: Mutex::default(),
            streams: Mutex::default(),
            queue: Mutex::default(),
            grown: Condvar::new(),
            called_back,
        }
    }

    /// What a variable holds as delivered here.
    pub(super) fn value(&self, variable: u32) -> Option<Value> {
        locked(&self.values).get(&variable).cloned()
    }

    /// Replaces all values without telling anybody: what a start finds.
    pub(super) fn set(&self, values: BTreeMap<u32, Value>) {
        *locked(&self.values) = values;
    }

    pub(super) fn values(&self) -> BTreeMap<u32, Value> {
        locked(&self.values).clone()
    }

    /// A stream of the notices about some variables, or about all. Where nothing changes
    /// any more, that is the first thing it says.
    pub(super) fn subscribe(&self, wanted: Option<Vec<u32>>, capacity: usize) -> Subscription {
        let most = limits::MAX_STREAM_NOTICES as usize;
        let slot = Arc::new(StreamSlot {
            wanted,
            capacity: capacity.clamp(1, most),
            state: Mutex::default(),
            grown: Condvar::new(),
        });
        // Under the lock of the values, as deliveries are: none is heard half.
        let _values = locked(&self.values);
        let unavailable = locked(&self.unavailable).map(Notice::Unavailable);
        locked(&slot.state).notices.extend(unavailable);
        let mut streams = locked(&self.streams);
        // Those that were dropped since the last delivery are not kept until the next.
        streams.retain(|stream| stream.strong_count() > 0);
        streams.push(Arc::downgrade(&slot));
        drop(streams);
        Subscription(slot)
    }

    /// Tells everybody, and changes the values first.
    pub(super) fn deliver(&self, notice: Notice) {
        let mut values = locked(&self.values);
        match &notice {
            Notice::Change(change) => {
                values.insert(change.variable, change.new.clone());
            }
            Notice::Resync { values: all, .. } => {
                values.extend(all.iter().cloned());
                *locked(&self.unavailable) = None;
            }
            Notice::Unavailable(reason) => *locked(&self.unavailable) = Some(*reason),
        }
        self.stream(&notice);
        drop(values);
        if self.called_back {
            let mut queue = locked(&self.queue);
            if !queue.deaf {
                queue.notices.push_back(notice);
                self.grown.notify_one();
            }
        }
    }

    fn stream(&self, notice: &Notice) {
        let mut streams = locked(&self.streams);
        if streams.is_empty() {
            return;
        }
        streams.retain(|stream| {
            let Some(stream) = stream.upgrade() else {
                return false;
            };
            let wants = match (notice, &stream.wanted) {
                (Notice::Change(change), Some(wanted)) => wanted.contains(&change.variable),
                _ => true,
            };
            if !wants {
                return true;
            }
            let mut state = locked(&stream.state);
            let full = state.notices.len() >= stream.capacity;
            if full {
                state.end = Some(StreamEnd::Overrun {
                    capacity: stream.capacity,
                });
            } else {
                state.notices.push_back(notice.clone());
            }
            stream.grown.notify_one();
            !full
        });
    }

    /// Whether the callback is so far behind that nothing more may be delivered for now;
    /// then [`Hearing::call_back`] tells when there is room.
    pub(super) fn is_full(&self) -> bool {
        let mut queue = locked(&self.queue);
        queue.stalled |= queue.notices.len() >= limits::MAX_CALLBACKS_WAITING as usize;
        queue.stalled
    }

    /// Calls back until [`Hearing::close`]; `room` is called when deliveries may go on.
    pub(super) fn call_back(&self, mut callback: impl FnMut(&Notice), room: impl Fn()) {
        IN_CALLBACK.set(true);
        let _ears = Ears {
            hearing: self,
            room: &room,
        };
        let mut queue = locked(&self.queue);
        loop {
            if queue.stalled && queue.notices.len() <= limits::MAX_CALLBACKS_WAITING as usize / 2 {
                queue.stalled = false;
                room();
            }
            if let Some(notice) = queue.notices.pop_front() {
                drop(queue);
                callback(&notice);
                queue = locked(&self.queue);
            } else if queue.closed {
                return;
            } else {
                let woken = self.grown.wait(queue);
                queue = woken.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Ends all streams, and the callbacks once those that wait were made.
    pub(super) fn close(&self) {
        for stream in locked(&self.streams)
            .drain(..)
            .filter_map(|one| one.upgrade())
        {
            locked(&stream.state).end = Some(StreamEnd::Stopped);
            stream.grown.notify_all();
        }
        locked(&self.queue).closed = true;
        self.grown.notify_all();
    }
}

/// On its drop nobody is called any more; a callback that panicked stalls nobody.
struct Ears<'a, F: Fn()> {
    hearing: &'a Hearing,
    room: &'a F,
}

impl<F: Fn()> Drop for Ears<'_, F> {
    fn drop(&mut self) {
        let mut queue = locked(&self.hearing.queue);
        queue.deaf = true;
        queue.notices.clear();
        let stalled = std::mem::take(&mut queue.stalled);
        drop(queue);
        if stalled {
            (self.room)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(variable: u32, new: i64) -> Notice {
        Notice::Change(Change {
            key: OrderKey::default(),
            variable,
            old: Value::Integer(0),
            new: Value::Integer(new),
            swap: false,
            initiator: None,
        })
    }

    fn hearing() -> Hearing {
        let values = (0..3).map(|id| (id, Value::Integer(0))).collect();
        Hearing::new(values, true)
    }

    #[test]
    fn a_stream_hears_what_it_wants_and_no_more() {
        let hearing = hearing();
        let mut stream = hearing.subscribe(Some(vec![1]), 10);
        for (variable, value) in [(0, 5), (1, 6), (2, 7), (1, 8)] {
            hearing.deliver(change(variable, value));
        }
        assert_eq!(hearing.value(1), Some(Value::Integer(8)));
        hearing.close();
        let heard: Vec<_> = stream.by_ref().collect();
        assert_eq!(heard, [Ok(change(1, 6)), Ok(change(1, 8))]);
    }

    #[test]
    fn streams_that_were_dropped_are_forgotten() {
        let hearing = hearing();
        for _ in 0..100 {
            drop(hearing.subscribe(None, 1));
        }
        assert_eq!(locked(&hearing.streams).len(), 1);
    }

    #[test]
    fn a_stream_is_waited_for_without_a_bound() {
        let hearing = Arc::new(hearing());
        let mut stream = hearing.subscribe(None, 1);
        let there = Arc::clone(&hearing);
        let teller = std::thread::spawn(move || there.deliver(change(0, 1)));
        assert_eq!(stream.next_within(Duration::MAX), Ok(Some(change(0, 1))));
        teller.join().expect("no panic");
    }

    #[test]
    fn who_comes_late_hears_that_nothing_changes_any_more() {
        let hearing = hearing();
        let process = ProcessId(2);
        let stopped = Notice::Unavailable(StopReason::LostMemory { process });
        hearing.deliver(stopped.clone());
        let mut late = hearing.subscribe(Some(vec![1]), 1);
        assert_eq!(late.next_within(Duration::ZERO), Ok(Some(stopped)));
        let resync = Notice::Resync {
            time: 5,
            values: vec![(1, Value::Integer(9))],
        };
        hearing.deliver(resync.clone());
        assert_eq!(late.next_within(Duration::ZERO), Ok(Some(resync)));
        let mut later = hearing.subscribe(None, 1);
        assert_eq!(later.next_within(Duration::ZERO), Ok(None));
    }

    #[test]
    fn a_slow_stream_is_ended_not_thinned_out() {
        let hearing = hearing();
        let mut stream = hearing.subscribe(None, 2);
        for value in 0..5 {
            hearing.deliver(change(0, value));
        }
        let heard: Vec<_> = stream.by_ref().collect();
        let end = Err(StreamEnd::Overrun { capacity: 2 });
        assert_eq!(heard, [Ok(change(0, 0)), Ok(change(0, 1)), end]);
    }

    #[test]
    fn a_slow_callback_is_waited_for() {
        let hearing = Arc::new(hearing());
        let most = limits::MAX_CALLBACKS_WAITING;
        for value in 0..most {
            assert!(!hearing.is_full());
            hearing.deliver(change(0, value as i64));
        }
        assert!(hearing.is_full());
        let (told, room) = std::sync::mpsc::channel();
        let there = Arc::clone(&hearing);
        let caller = std::thread::spawn(move || {
            let mut heard = 0;
            there.call_back(
                |_| {
                    assert!(in_callback());
                    heard += 1;
                },
                || {
                    // The test may have seen enough.
                    let _ = told.send(());
                },
            );
            heard
        });
        room.recv_timeout(Duration::from_secs(30))
            .expect("told of room");
        assert!(!hearing.is_full());
        assert!(!in_callback());
        hearing.close();
        assert_eq!(caller.join().expect("no panic"), most);
    }

    #[test]
    fn a_callback_that_panics_stalls_nobody() {
        let hearing = Arc::new(hearing());
        let there = Arc::clone(&hearing);
        let caller = std::thread::spawn(move || {
            there.call_back(|_| panic!("as the test wants"), || {});
        });
        hearing.deliver(change(0, 1));
        assert!(caller.join().is_err());
        for value in 0..=limits::MAX_CALLBACKS_WAITING {
            assert!(!hearing.is_full());
            hearing.deliver(change(0, value as i64));
        }
    }
}
