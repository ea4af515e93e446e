//! The client's face for several threads.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ChannelError;
use super::client::failure;
use super::keeper::{Keeper, go_on};
use super::wait::{Ended, Waiter};
use crate::duplex::{
    AcquireError, ClientCore, FrameBytes, FramePlace, Options, Poll, Segment, Semaphore, Sequence,
    Side, Waiting,
};
use crate::sys::process::deadline_in;

/// A client of an in-place channel for several threads: clones are the same client.
/// Bookkeeping is under a lock; waiting is outside of it, each thread for its own slot.
#[derive(Clone, Debug)]
pub struct SharedDuplexClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    core: Mutex<ClientCore>,
    /// Requests that ended with the server, and whether they may have been changed.
    lost: Mutex<Vec<(Sequence, bool)>>,
    /// What waiting threads have learned, for the next ones; at most one per thread.
    waiters: Mutex<Vec<Waiter>>,
    waiting: Waiting,
    segment: Segment,
    seat: Mutex<Seat>,
    /// Rung when the keeper is back in its seat.
    is_back: Condvar,
}

/// Where the keeper is, unless a thread has taken it to reconnect.
#[derive(Debug)]
struct Seat {
    keeper: Option<Keeper>,
    is_taken: bool,
}

impl SharedDuplexClient {
    pub(super) fn new(
        core: ClientCore,
        segment: Segment,
        keeper: Option<Keeper>,
        waiting: Waiting,
        lost: Vec<(Sequence, bool)>,
    ) -> SharedDuplexClient {
        SharedDuplexClient {
            inner: Arc::new(Inner {
                core: Mutex::new(core),
                lost: Mutex::new(lost),
                waiters: Mutex::default(),
                waiting,
                segment,
                seat: Mutex::new(Seat {
                    keeper,
                    is_taken: false,
                }),
                is_back: Condvar::new(),
            }),
        }
    }

    /// The channel's memory.
    pub fn segment(&self) -> &Segment {
        &self.inner.segment
    }

    /// Sends `bytes` and answers the request's number. Waits for room if there is none.
    ///
    /// # Errors
    /// [`ChannelError::TimedOut`] if no room came in time; else as
    /// [`super::DuplexClient::send_request`].
    pub fn send_request(&self, bytes: &[u8], timeout: Duration) -> Result<Sequence, ChannelError> {
        self.send(bytes, Options::default(), timeout)
    }

    /// Sends `bytes`; nobody hears of the outcome. Waits for room if there is none.
    ///
    /// # Errors
    /// As [`SharedDuplexClient::send_request`].
    pub fn send_one_way(&self, bytes: &[u8], timeout: Duration) -> Result<Sequence, ChannelError> {
        let options = Options {
            one_way: true,
            ..Options::default()
        };
        self.send(bytes, options, timeout)
    }

    fn send(
        &self,
        bytes: &[u8],
        options: Options,
        timeout: Duration,
    ) -> Result<Sequence, ChannelError> {
        self.send_by(|core| core.submit(bytes, options), timeout)
    }

    /// Places something and rings the server. Waits for room if there is none.
    pub(super) fn send_by(
        &self,
        place: impl Fn(&mut ClientCore) -> Result<Sequence, AcquireError>,
        timeout: Duration,
    ) -> Result<Sequence, ChannelError> {
        let attempt = || {
            let mut core = self.core();
            let sent = place(&mut core);
            if sent.is_ok() {
                core.kick();
            }
            sent
        };
        match attempt() {
            Err(AcquireError::Full) => {}
            other => return Ok(other?),
        }
        let mut waiter = self.waiter();
        let segment = self.segment();
        let waited = waiter.wait(
            Semaphore::SpaceAvailable,
            u32::MAX,
            Some(timeout),
            |_| {
                segment.settle_room();
                match attempt() {
                    Err(AcquireError::Full) => None,
                    other => Some(other),
                }
            },
            || segment.mirror(Side::Client),
        );
        self.keep(waiter);
        match waited {
            Ok(sent) => Ok(sent?),
            Err(Ended::TimedOut) => Err(ChannelError::TimedOut),
            Err(Ended::Gone) => Err(ChannelError::Disconnected),
        }
    }

    /// Waits for the response of one request. After [`ChannelError::TimedOut`] it is
    /// still in flight.
    ///
    /// # Errors
    /// As [`super::DuplexClient::receive_for`].
    pub fn receive_for(
        &self,
        sequence: Sequence,
        timeout: Duration,
    ) -> Result<SharedResponse, ChannelError> {
        let poll = self.await_end(sequence, timeout)?;
        self.outcome(sequence, poll)
    }

    /// Waits until a request is finished, or nobody knows it.
    pub(super) fn await_end(
        &self,
        sequence: Sequence,
        timeout: Duration,
    ) -> Result<Poll, ChannelError> {
        let generation = self.segment().generation();
        let poll = self.core().poll(sequence);
        if poll != Poll::Pending {
            return Ok(poll);
        }
        let mut waiter = self.waiter();
        let segment = self.segment();
        let slot = sequence % u64::from(segment.geometry().slots);
        let waited = waiter.wait(
            Semaphore::ResponseReady,
            1 << (slot % 32),
            Some(timeout),
            |_| segment.is_answered(sequence).then_some(()),
            || segment.mirror(Side::Client),
        );
        self.keep(waiter);
        match waited {
            Ok(()) => {}
            Err(Ended::TimedOut) => return Err(ChannelError::TimedOut),
            Err(Ended::Gone) => {
                let mut core = self.core();
                // Unless another thread has gone on to the next server meanwhile.
                if !core.is_taking_over() && self.segment().generation() == generation {
                    self.end_all(&mut core);
                    drop(core);
                    self.tell_all();
                }
            }
        }
        Ok(self.core().poll(sequence))
    }

    /// Sends `bytes` and waits for the response, `timeout` for both. When it passes
    /// the request is cancelled.
    ///
    /// # Errors
    /// As [`SharedDuplexClient::send_request`] and [`SharedDuplexClient::receive_for`].
    pub fn call(&self, bytes: &[u8], timeout: Duration) -> Result<SharedResponse, ChannelError> {
        let begun = Instant::now();
        let sequence = self.send_request(bytes, timeout)?;
        let answer = self.receive_for(sequence, timeout.saturating_sub(begun.elapsed()));
        // Another thread that finds the server dead ends it too, and then knows how.
        if matches!(answer, Err(ChannelError::TimedOut)) && !self.cancel(sequence) {
            return self.receive_for(sequence, Duration::ZERO);
        }
        answer
    }

    /// As [`super::DuplexClient::cancel`]: false too where another thread found the server
    /// dead, which ended the request.
    pub fn cancel(&self, sequence: Sequence) -> bool {
        let cancelled = self.core().cancel(sequence);
        // It may have been answered, which nobody is rung for once more.
        self.tell_room();
        cancelled
    }

    /// Ends the channel; see [`super::DuplexClient::stop`].
    pub fn stop(&self) {
        self.core().mirror();
        self.segment().stop(Side::Client);
    }

    /// Ends all that is in flight; see [`super::DuplexClient::server_is_gone`].
    pub fn server_is_gone(&self) {
        self.end_all(&mut self.core());
        self.tell_all();
    }

    fn end_all(&self, core: &mut ClientCore) {
        let lost = core.server_died();
        lock(&self.inner.lost).extend(lost);
    }

    /// Wakes all threads of this process that wait.
    fn tell_all(&self) {
        self.segment().ring_all(Semaphore::ResponseReady);
        self.segment().ring_all(Semaphore::SpaceAvailable);
    }

    /// Goes on with the next server of the channel's name; see
    /// [`super::DuplexClient::reconnect`]. Threads that wait for responses get
    /// [`ChannelError::PeerDied`]; what they send until the new server has the memory is
    /// refused as [`ChannelError::Disconnected`]. Of several threads that call this for
    /// the same server one does it, and the others return when it is done, however late
    /// they come: nothing happens while the server is there. To leave one that is, say
    /// [`SharedDuplexClient::server_is_gone`] first.
    ///
    /// # Errors
    /// As [`super::DuplexClient::reconnect`].
    pub fn reconnect(&self, timeout: Duration) -> Result<(), ChannelError> {
        let deadline = deadline_in(timeout);
        let mut seat = lock(&self.inner.seat);
        while seat.is_taken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ChannelError::TimedOut);
            }
            let waited = self.inner.is_back.wait_timeout(seat, left);
            seat = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        // Else another thread's requests to the next server would be ended.
        if !self.segment().has_left(Side::Server) && !self.core().is_orphan() {
            return Ok(());
        }
        let mut keeper = seat.keeper.take();
        seat.is_taken = true;
        drop(seat);
        let begin = || {
            let mut core = self.core();
            core.set_taking_over(true);
            self.end_all(&mut core);
            drop(core);
            self.tell_all();
        };
        let taken = go_on(&mut keeper, self.segment(), deadline, begin);
        if taken.is_ok() {
            self.core().set_taking_over(false);
        }
        // What they have learned is of the former server.
        lock(&self.inner.waiters).clear();
        *lock(&self.inner.seat) = Seat {
            keeper,
            is_taken: false,
        };
        self.inner.is_back.notify_all();
        taken
    }

    /// Forgets that a request was lost; whether it may have been changed.
    pub(super) fn forget_lost(&self, sequence: Sequence) -> bool {
        let mut lost = lock(&self.inner.lost);
        let index = lost.iter().position(|(found, _)| *found == sequence);
        index.is_some_and(|index| lost.remove(index).1)
    }

    pub(super) fn outcome(
        &self,
        sequence: Sequence,
        poll: Poll,
    ) -> Result<SharedResponse, ChannelError> {
        let mut core = self.core();
        if poll == Poll::Response
            && let Some(place) = core.response_at(sequence)
        {
            return Ok(SharedResponse {
                client: self.clone(),
                sequence,
                place,
            });
        }
        let mut lost = lock(&self.inner.lost);
        let error = match lost.iter().position(|(found, _)| *found == sequence) {
            Some(index) => ChannelError::PeerDied {
                sequence,
                maybe_modified: lost.remove(index).1,
            },
            None => failure(&core, sequence, poll),
        };
        core.release(sequence);
        drop((core, lost));
        self.tell_room();
        Err(error)
    }

    /// Wakes threads of this process that wait for room.
    pub(super) fn tell_room(&self) {
        // Who waits announced itself before it looked under the lock, which this
        // thread has held since.
        let word = self.segment().semaphore(Semaphore::SpaceAvailable);
        if crate::duplex::event::has_waiters(word) {
            self.segment().ring_all(Semaphore::SpaceAvailable);
        }
    }

    pub(super) fn core(&self) -> MutexGuard<'_, ClientCore> {
        lock(&self.inner.core)
    }

    fn waiter(&self) -> Waiter {
        let known = lock(&self.inner.waiters).pop();
        known.unwrap_or_else(|| Waiter::new(self.segment(), Side::Client, self.inner.waiting))
    }

    fn keep(&self, waiter: Waiter) {
        lock(&self.inner.waiters).push(waiter);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        lock(&self.core).mirror();
        self.segment.stop(Side::Client);
    }
}

/// A response, where the server left it. Its room comes back when this is dropped.
#[derive(Debug)]
pub struct SharedResponse {
    client: SharedDuplexClient,
    sequence: Sequence,
    place: FramePlace,
}

impl SharedResponse {
    /// The request's number.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// Bytes of the response.
    pub fn len(&self) -> usize {
        self.place.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.place.is_empty()
    }

    /// Its bytes.
    pub fn view(&self) -> FrameBytes<'_> {
        self.client.segment().frame_bytes(self.place)
    }

    /// A copy of all bytes.
    pub fn copy_to_vec(&self) -> Vec<u8> {
        self.view().to_vec()
    }
}

impl Drop for SharedResponse {
    fn drop(&mut self) {
        self.client.core().release(self.sequence);
        self.client.tell_room();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
