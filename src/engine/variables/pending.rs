//! An operation under way, from the caller's side: handed in, completed once, or given
//! up by a caller whose time is over.
//!
//! ```text
//!   Waiting --take()--> Taken --complete()--> Done
//!      |                  |
//!      +--give up: never carried out (NotSent)
//!                         +--give up: nobody knows (Indeterminate)
//! ```
//!
//! - I1: an operation that its caller gave up while it was `Waiting` is never sent.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::OperationError;
use super::hearing::in_callback;
use crate::ordered::{OrderKey, SubmitError, Value};

/// What an operation came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completed {
    /// Its place in the order.
    pub key: OrderKey,
    /// Whether it changed the variable: a write always, a compare-and-swap that found what
    /// it expected.
    pub applied: bool,
    /// What the variable held before it; the answer of an ordered read. None where the
    /// answer of the etcd cluster was lost and the outcome was found by its mark.
    pub old: Option<Value>,
}

#[derive(Debug)]
enum State {
    /// Not sent yet, and why, where that is known.
    Waiting(Option<SubmitError>),
    Taken,
    /// The outcome is known and not delivered here yet.
    Known(Result<Completed, OperationError>),
    Done(Result<Completed, OperationError>),
    GivenUp,
}

#[derive(Debug)]
struct Slot {
    state: Mutex<State>,
    changed: Condvar,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment: nothing is left half done by a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The caller's end.
#[derive(Debug)]
pub struct Pending(Arc<Slot>);

/// The end of who carries it out; dropped without an answer, nobody knows the outcome.
#[derive(Debug)]
pub(super) struct Promise(Arc<Slot>);

/// Longest wait that is counted; what is longer, for ever among it, is that long.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// When a wait of `deadline` from now ends.
pub(super) fn until(deadline: Duration) -> Instant {
    Instant::now() + deadline.min(LONGEST)
}

pub(super) fn pending() -> (Pending, Promise) {
    let slot = Arc::new(Slot {
        state: Mutex::new(State::Waiting(None)),
        changed: Condvar::new(),
    });
    (Pending(Arc::clone(&slot)), Promise(slot))
}

impl Pending {
    /// Waits until the operation is delivered here.
    ///
    /// # Errors
    /// [`OperationError::InCallback`] in a callback, where it is not waited for.
    /// [`OperationError::NotSent`] if `deadline` passed before it was sent: it is not
    /// carried out. [`OperationError::Indeterminate`] if it was sent and its outcome is not
    /// known by then: it may be carried out, before or after.
    pub fn wait(self, deadline: Duration) -> Result<Completed, OperationError> {
        if in_callback() {
            return Err(OperationError::InCallback);
        }
        let until = until(deadline);
        let mut state = self.0.lock();
        loop {
            if let State::Done(_) = &*state {
                break;
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                break;
            };
            let woken = self.0.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        match std::mem::replace(&mut *state, State::GivenUp) {
            State::Done(result) | State::Known(result) => result,
            State::Waiting(reason) => Err(OperationError::NotSent { deadline, reason }),
            State::Taken | State::GivenUp => Err(OperationError::Indeterminate),
        }
    }

    /// Whether [`Pending::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        matches!(*self.0.lock(), State::Done(_))
    }
}

impl Promise {
    /// Takes the operation up; false if its caller has given it up.
    pub(super) fn take(&self) -> bool {
        let mut state = self.0.lock();
        match *state {
            State::Waiting(_) => {
                *state = State::Taken;
                true
            }
            State::Taken => true,
            State::Known(_) | State::Done(_) | State::GivenUp => false,
        }
    }

    /// It was not sent after all, and waits again for what `reason` names.
    pub(super) fn put_back(&self, reason: SubmitError) {
        let mut state = self.0.lock();
        if matches!(*state, State::Taken) {
            *state = State::Waiting(Some(reason));
        }
    }

    /// Whether nobody waits for it any more.
    pub(super) fn is_given_up(&self) -> bool {
        matches!(*self.0.lock(), State::GivenUp)
    }

    /// Says the outcome for a caller whose time ends before it is delivered here.
    pub(super) fn known(&self, result: Result<Completed, OperationError>) {
        let mut state = self.0.lock();
        if matches!(*state, State::Waiting(_) | State::Taken) {
            *state = State::Known(result);
        }
    }

    /// What is known was delivered.
    pub(super) fn release(self) {
        let mut state = self.0.lock();
        if let State::Known(result) = &*state {
            *state = State::Done(result.clone());
            drop(state);
            self.0.changed.notify_all();
        }
    }

    pub(super) fn complete(self, result: Result<Completed, OperationError>) {
        self.settle(result);
    }

    fn settle(&self, result: Result<Completed, OperationError>) {
        let mut state = self.0.lock();
        if matches!(*state, State::Waiting(_) | State::Taken) {
            *state = State::Done(result);
            drop(state);
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let (taken, known) = {
            let state = self.0.lock();
            let known = match &*state {
                State::Known(result) => Some(result.clone()),
                _ => None,
            };
            (matches!(*state, State::Taken), known)
        };
        if let Some(result) = known {
            *self.0.lock() = State::Done(result);
            self.0.changed.notify_all();
            return;
        }
        self.settle(Err(if taken {
            OperationError::Indeterminate
        } else {
            OperationError::Stopped
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ordered::ProcessId;

    const SHORT: Duration = Duration::from_millis(1);

    #[test]
    fn what_was_given_up_before_it_was_taken_is_never_sent() {
        let (pending, promise) = pending();
        let error = pending.wait(SHORT).expect_err("nobody answers");
        assert!(matches!(error, OperationError::NotSent { .. }));
        assert!(!promise.take(), "it must not be sent any more");
    }

    #[test]
    fn what_was_not_sent_says_what_it_waited_for() {
        let (pending, promise) = pending();
        let missing = SubmitError::NotReady {
            missing: ProcessId(7),
        };
        assert!(promise.take());
        promise.put_back(missing);
        let error = pending.wait(SHORT).expect_err("nobody answers");
        let text = error.to_string();
        assert!(text.contains("process 7 has not been there"), "{text}");
        assert!(!promise.take(), "it must not be sent any more");
    }

    #[test]
    fn a_wait_may_be_for_ever() {
        let (pending, promise) = pending();
        drop(promise);
        let error = pending.wait(Duration::MAX).expect_err("stopped");
        assert!(matches!(error, OperationError::Stopped));
    }

    #[test]
    fn what_was_taken_and_not_answered_is_indeterminate() {
        let (pending, promise) = pending();
        assert!(promise.take());
        let error = pending.wait(SHORT).expect_err("nobody answers");
        assert!(matches!(error, OperationError::Indeterminate));
    }

    #[test]
    fn a_dropped_promise_says_what_it_knows() {
        let (one, promise) = pending();
        drop(promise);
        let error = one.wait(Duration::from_secs(9)).expect_err("stopped");
        assert!(matches!(error, OperationError::Stopped));
        let (two, promise) = pending();
        assert!(promise.take());
        drop(promise);
        let error = two.wait(Duration::from_secs(9)).expect_err("unknown");
        assert!(matches!(error, OperationError::Indeterminate));
    }

    #[test]
    fn an_answer_wakes_its_caller() {
        let (pending, promise) = pending();
        let answer = Completed {
            key: OrderKey::default(),
            applied: true,
            old: Some(Value::Integer(1)),
        };
        let same = answer.clone();
        let thread = std::thread::spawn(move || {
            assert!(promise.take());
            promise.complete(Ok(same));
        });
        let got = pending.wait(Duration::from_secs(30));
        assert_eq!(got.expect("answered"), answer);
        thread.join().expect("no panic");
    }
}
