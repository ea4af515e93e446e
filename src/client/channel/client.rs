//! The client's face for one thread at a time.

use std::cell::RefCell;
use std::time::Duration;

use super::keeper::{Keeper, go_on};
use super::link::Link;
use super::sentry::Sentry;
use super::wait::{Ended, HOT_LOOKS, Waiter};
use super::{ChannelError, SharedDuplexClient};
use crate::duplex::{
    AcquireError, ClientCore, FrameBytes, FramePlace, Grant, OpenLimits, Options, Poll, Presence,
    Segment, Semaphore, Sequence, Side, Waiting,
};
use crate::sys::process::deadline_in;
use crate::units::OutOfRange;

/// How a client behaves.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// How it waits for responses.
    pub waiting: Waiting,
    /// How long a server may take to let it in. Default 5 s.
    pub connect_timeout: Duration,
    /// What memory it takes from a server.
    pub limits: OpenLimits,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            waiting: Waiting::default(),
            connect_timeout: Duration::from_secs(5),
            limits: OpenLimits::default(),
        }
    }
}

/// A client of an in-place channel. It can move between threads; several threads at
/// a time use a [`SharedDuplexClient`].
///
/// A request is a frame: bytes that the server's handler changes where they lie. Up to
/// [`INLINE_BYTES`](crate::duplex::INLINE_BYTES) it takes a slot only, beyond that a
/// piece of the payload. Both come back when its [`Response`] is dropped.
///
/// ```no_run
/// # use std::time::Duration;
/// # fn f(client: uffd_sync::client::DuplexClient) -> Result<(), uffd_sync::client::ChannelError> {
/// let response = client.call(b"hello", Duration::from_secs(1))?;
/// println!("{}", String::from_utf8_lossy(&response.copy_to_vec()));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DuplexClient {
    pub(super) core: RefCell<ClientCore>,
    waiter: RefCell<Waiter>,
    /// Requests that ended with the server, and whether they may have been changed.
    lost: RefCell<Vec<(Sequence, bool)>>,
    segment: Segment,
    keeper: Option<Keeper>,
}

impl DuplexClient {
    /// The client of `segment`, which nobody else is or was.
    ///
    /// # Errors
    /// [`ChannelError::Thread`], [`ChannelError::Sys`] if its liveness cannot be shown.
    pub fn over(segment: Segment, options: ClientOptions) -> Result<DuplexClient, ChannelError> {
        DuplexClient::with_link(segment, None, options)
    }

    /// The same with the connection over which the memory came.
    pub(super) fn linked(
        segment: Segment,
        link: Link,
        options: ClientOptions,
    ) -> Result<DuplexClient, ChannelError> {
        DuplexClient::with_link(segment, Some(link), options)
    }

    fn with_link(
        segment: Segment,
        link: Option<Link>,
        options: ClientOptions,
    ) -> Result<DuplexClient, ChannelError> {
        let mut link = link;
        let keeper = Keeper::hold(&segment, Side::Client, &mut link)?;
        let waiter = Waiter::new(&segment, Side::Client, options.waiting)
            .kept_by(Sentry::new(&segment, Side::Client));
        Ok(DuplexClient {
            core: RefCell::new(ClientCore::new(&segment)),
            waiter: RefCell::new(waiter),
            lost: RefCell::default(),
            segment,
            keeper: Some(keeper),
        })
    }

    /// The channel's memory.
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// Sends `bytes` and answers the request's number; the response is to be received.
    ///
    /// # Errors
    /// [`ChannelError::Full`], [`ChannelError::TooLarge`], [`ChannelError::Stopped`],
    /// [`ChannelError::Disconnected`], [`ChannelError::Broken`]; nothing was sent.
    #[inline]
    pub fn send_request(&self, bytes: &[u8]) -> Result<Sequence, ChannelError> {
        let mut core = self.core.borrow_mut();
        match core.send_alone(bytes) {
            Some(sequence) => Ok(sequence),
            None => Ok(send_among_others(&mut core, bytes)?),
        }
    }

    /// Sends `bytes`; nobody hears of the outcome.
    ///
    /// # Errors
    /// As [`DuplexClient::send_request`].
    pub fn send_one_way(&self, bytes: &[u8]) -> Result<Sequence, ChannelError> {
        let options = Options {
            one_way: true,
            ..Options::default()
        };
        let mut core = self.core.borrow_mut();
        let sequence = core.submit(bytes, options)?;
        core.kick();
        Ok(sequence)
    }

    /// Places `bytes` as one of several requests; [`DuplexClient::kick`], or receiving,
    /// hands all of them over at once.
    ///
    /// # Errors
    /// As [`DuplexClient::send_request`].
    #[inline]
    pub fn submit(&self, bytes: &[u8]) -> Result<Sequence, ChannelError> {
        let sent = self.core.borrow_mut().submit(bytes, Options::default());
        Ok(sent?)
    }

    /// Hands over all that was submitted and rings the server for it.
    #[inline]
    pub fn kick(&self) {
        self.core.borrow_mut().kick();
    }

    /// Room for a request of `len` bytes, to be written where the server will read it.
    ///
    /// # Errors
    /// As [`DuplexClient::send_request`].
    pub fn acquire_request(&self, len: usize) -> Result<Request<'_>, ChannelError> {
        self.acquire_with(len, Options::default())
    }

    /// As [`DuplexClient::acquire_request`], with room for a longer response, or one-way.
    ///
    /// # Errors
    /// As [`DuplexClient::send_request`].
    pub fn acquire_with(&self, len: usize, options: Options) -> Result<Request<'_>, ChannelError> {
        let grant = self.core.borrow_mut().acquire(len, options);
        Ok(Request {
            grant: Some(grant?),
            client: self,
        })
    }

    /// Waits for whichever response comes first.
    ///
    /// # Errors
    /// [`ChannelError::TimedOut`], [`ChannelError::Handler`], [`ChannelError::PeerDied`]
    /// (once per request that was in flight), [`ChannelError::NothingInFlight`],
    /// [`ChannelError::Broken`].
    pub fn receive_response(&self, timeout: Duration) -> Result<Response<'_>, ChannelError> {
        if let Some(lost) = self.take_lost(None) {
            return Err(lost);
        }
        let found = {
            let mut core = self.core.borrow_mut();
            match core.poll_any(false) {
                Some(sequence) => Ok(sequence),
                None if core.in_flight() == 0 => return Err(ChannelError::NothingInFlight),
                None => {
                    let segment = &self.segment;
                    self.waiter.borrow_mut().wait(
                        Semaphore::ResponseReady,
                        u32::MAX,
                        Some(timeout),
                        |thorough| core.poll_any(thorough),
                        || segment.mirror(Side::Client),
                    )
                }
            }
        };
        match found {
            Ok(sequence) => self.outcome(sequence),
            Err(Ended::TimedOut) => Err(ChannelError::TimedOut),
            Err(Ended::Gone) => {
                self.server_is_gone();
                if let Some(sequence) = self.core.borrow_mut().poll_any(true) {
                    return self.outcome(sequence);
                }
                Err(self.take_lost(None).unwrap_or(ChannelError::Disconnected))
            }
        }
    }

    /// Waits for the response of one request. After [`ChannelError::TimedOut`] it is
    /// still in flight: wait again, or cancel it.
    ///
    /// # Errors
    /// As [`DuplexClient::receive_response`]; [`ChannelError::UnknownSequence`].
    #[inline]
    pub fn receive_for(
        &self,
        sequence: Sequence,
        timeout: Duration,
    ) -> Result<Response<'_>, ChannelError> {
        if self.waiter.borrow().is_hot() {
            let taken = self.core.borrow_mut().take_alone(sequence, HOT_LOOKS);
            if let Some(place) = taken {
                return Ok(Response {
                    client: self,
                    sequence,
                    place,
                });
            }
        }
        self.receive_later(sequence, timeout)
    }

    #[inline(never)]
    fn receive_later(
        &self,
        sequence: Sequence,
        timeout: Duration,
    ) -> Result<Response<'_>, ChannelError> {
        match self.wait_for(sequence, timeout) {
            Ok(Poll::Response) => self.response(sequence),
            Ok(_) => self.outcome(sequence),
            Err(Ended::TimedOut) => Err(ChannelError::TimedOut),
            Err(Ended::Gone) => {
                self.server_is_gone();
                self.outcome(sequence)
            }
        }
    }

    /// Waits until a request is finished, or nobody knows it.
    pub(super) fn wait_for(&self, sequence: Sequence, timeout: Duration) -> Result<Poll, Ended> {
        let mut core = self.core.borrow_mut();
        let segment = &self.segment;
        let slot = sequence & (u64::from(segment.geometry().slots) - 1);
        self.waiter.borrow_mut().wait(
            Semaphore::ResponseReady,
            1 << (slot % 32),
            Some(timeout),
            |_| match core.poll(sequence) {
                Poll::Pending => None,
                done => Some(done),
            },
            || segment.mirror(Side::Client),
        )
    }

    /// Sends `bytes` and waits for the response. When the deadline passes the request
    /// is cancelled.
    ///
    /// # Errors
    /// As [`DuplexClient::send_request`] and [`DuplexClient::receive_for`].
    #[inline]
    pub fn call(&self, bytes: &[u8], timeout: Duration) -> Result<Response<'_>, ChannelError> {
        let sequence = self.send_request(bytes)?;
        match self.receive_for(sequence, timeout) {
            Ok(response) => Ok(response),
            Err(error) => Err(self.give_up(sequence, error)),
        }
    }

    #[cold]
    fn give_up(&self, sequence: Sequence, error: ChannelError) -> ChannelError {
        if matches!(error, ChannelError::TimedOut) {
            self.cancel(sequence);
        }
        error
    }

    /// The response of `sequence` is not wanted any more. A server that has not begun
    /// it does not; its room comes back by itself. False if its response is there
    /// already, which keeps its room until it is received, or there is no such request.
    pub fn cancel(&self, sequence: Sequence) -> bool {
        self.core.borrow_mut().cancel(sequence)
    }

    /// Waits until the server has given room back: of one-way requests, or of those
    /// that were cancelled. True if it has; false if the time is up, or the server is gone,
    /// which sending then says.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        let waited = self.await_room(timeout);
        if waited == Err(Ended::Gone) {
            self.server_is_gone();
        }
        waited.is_ok()
    }

    fn await_room(&self, timeout: Duration) -> Result<(), Ended> {
        let mut core = self.core.borrow_mut();
        let segment = &self.segment;
        self.waiter.borrow_mut().wait(
            Semaphore::SpaceAvailable,
            u32::MAX,
            Some(timeout),
            |_| {
                segment.settle_room();
                core.reap_all().then_some(())
            },
            || segment.mirror(Side::Client),
        )
    }

    /// The server's metadata; empty if it has set none.
    ///
    /// # Errors
    /// [`ChannelError::Memory`] if what stands there is impossible.
    pub fn metadata(&self) -> Result<Vec<u8>, ChannelError> {
        Ok(self.segment.metadata(Side::Server)?)
    }

    /// Sets this client's metadata, once; the server hears of it before the first
    /// request that comes after.
    ///
    /// # Errors
    /// [`ChannelError::Memory`] if it is too long or was set before.
    pub fn set_metadata(&self, bytes: &[u8]) -> Result<(), ChannelError> {
        Ok(self.segment.set_metadata(Side::Client, bytes)?)
    }

    /// Whether a server is there and takes requests.
    pub fn is_connected(&self) -> bool {
        self.segment.presence(Side::Server) == Presence::Alive
            && !self.segment.is_stopped(Side::Server)
            && !self.segment.is_stopped(Side::Client)
    }

    /// Requests whose response was not received.
    pub fn in_flight(&self) -> u32 {
        self.core.borrow().in_flight()
    }

    /// Brings the OIEBs up to date.
    pub fn mirror(&self) {
        self.core.borrow().mirror();
    }

    /// Ends the channel: the server is told, nothing can be sent any more, responses
    /// that are there can be received.
    pub fn stop(&self) {
        self.core.borrow().mirror();
        self.segment.stop(Side::Client);
    }

    /// Ends all that is in flight because the server is gone: received as
    /// [`ChannelError::PeerDied`]. After that a new server may take the memory over
    /// ([`crate::duplex::ServerCore::take_over`]) and the channel goes on.
    pub fn server_is_gone(&self) {
        let lost = self.core.borrow_mut().server_died();
        self.lost.borrow_mut().extend(lost);
    }

    /// Goes on with the next server of the channel's name, within `timeout`: ends all
    /// that is in flight, as [`DuplexClient::server_is_gone`] does, waits until there is
    /// such a server, and hands it this channel's memory. Requests then go on where they
    /// stopped. If it fails it may be tried again.
    ///
    /// # Errors
    /// [`ChannelError::TimedOut`] if the server is still there at the end of the time,
    /// stopped (`SIGSTOP`) for example; [`ChannelError::Connect`] if no next one came
    /// or it refused; [`ChannelError::Stopped`] if this side stopped the channel;
    /// [`ChannelError::Disconnected`] if it was not made by name.
    pub fn reconnect(&mut self, timeout: Duration) -> Result<(), ChannelError> {
        let deadline = deadline_in(timeout);
        let mut keeper = self.keeper.take();
        let begin = || {
            self.server_is_gone();
            self.core.borrow_mut().set_taking_over(true);
        };
        let taken = go_on(&mut keeper, &self.segment, deadline, begin);
        self.keeper = keeper;
        taken?;
        self.core.get_mut().set_taking_over(false);
        // What it has learned is of the former server.
        let fresh = self.waiter.borrow().anew();
        self.waiter = RefCell::new(fresh);
        Ok(())
    }

    /// The same channel for several threads.
    pub fn into_shared(mut self) -> SharedDuplexClient {
        let keeper = self.keeper.take();
        let waiting = self.waiter.borrow().waiting();
        let core = self.core.replace(ClientCore::spare(&self.segment));
        let lost = self.lost.take();
        SharedDuplexClient::new(core, self.segment.clone(), keeper, waiting, lost)
    }

    /// The first lost request, or that of `sequence`, as an error.
    fn take_lost(&self, sequence: Option<Sequence>) -> Option<ChannelError> {
        let mut lost = self.lost.borrow_mut();
        let index = lost
            .iter()
            .position(|(found, _)| sequence.is_none_or(|sequence| sequence == *found))?;
        let (sequence, maybe_modified) = lost.remove(index);
        self.core.borrow_mut().release(sequence);
        Some(ChannelError::PeerDied {
            sequence,
            maybe_modified,
        })
    }

    /// Forgets that a request was lost; whether it may have been changed.
    pub(super) fn forget_lost(&self, sequence: Sequence) -> bool {
        let mut lost = self.lost.borrow_mut();
        let index = lost.iter().position(|(found, _)| *found == sequence);
        index.is_some_and(|index| lost.remove(index).1)
    }

    /// What a finished request ended as; one without a response is released.
    #[cold]
    pub(super) fn outcome(&self, sequence: Sequence) -> Result<Response<'_>, ChannelError> {
        if let Some(lost) = self.take_lost(Some(sequence)) {
            return Err(lost);
        }
        let poll = self.core.borrow_mut().poll(sequence);
        if poll == Poll::Response {
            return self.response(sequence);
        }
        let mut core = self.core.borrow_mut();
        let error = failure(&core, sequence, poll);
        core.release(sequence);
        Err(error)
    }

    #[inline]
    fn response(&self, sequence: Sequence) -> Result<Response<'_>, ChannelError> {
        match self.core.borrow().response_at(sequence) {
            Some(place) => Ok(Response {
                client: self,
                sequence,
                place,
            }),
            None => Err(ChannelError::UnknownSequence { sequence }),
        }
    }
}

/// A request that is not the only one, or has to be refused.
#[inline(never)]
fn send_among_others(core: &mut ClientCore, bytes: &[u8]) -> Result<Sequence, AcquireError> {
    let sequence = core.submit(bytes, Options::default())?;
    core.kick();
    Ok(sequence)
}

/// What a request that has no response ended as.
pub(super) fn failure(core: &ClientCore, sequence: Sequence, poll: Poll) -> ChannelError {
    match poll {
        Poll::Failed(code) => ChannelError::Handler {
            sequence,
            code,
            text: core.error_text(sequence),
        },
        Poll::Cancelled => ChannelError::Cancelled { sequence },
        Poll::Broken => ChannelError::Broken,
        Poll::Pending => ChannelError::TimedOut,
        Poll::Unknown | Poll::Response => ChannelError::UnknownSequence { sequence },
    }
}

impl Drop for DuplexClient {
    fn drop(&mut self) {
        if self.keeper.is_some() {
            self.stop();
        }
    }
}

/// A request that is being written, where the server will read it. Dropped without
/// being sent, it gives its room back.
#[derive(Debug)]
pub struct Request<'a> {
    client: &'a DuplexClient,
    grant: Option<Grant>,
}

impl<'a> Request<'a> {
    /// Bytes of the request.
    pub fn len(&self) -> usize {
        self.grant.as_ref().map_or(0, Grant::len)
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that request and response may take.
    pub fn capacity(&self) -> usize {
        self.grant.as_ref().map_or(0, Grant::capacity)
    }

    /// Makes it longer or shorter.
    ///
    /// # Errors
    /// [`OutOfRange`] beyond the capacity.
    pub fn set_len(&mut self, len: usize) -> Result<(), OutOfRange> {
        match &mut self.grant {
            Some(grant) => grant.set_len(len),
            None => Ok(()),
        }
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the request.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<(), OutOfRange> {
        match &mut self.grant {
            Some(grant) => self.client.core.borrow().write(grant, offset, bytes),
            None => Ok(()),
        }
    }

    /// Its bytes in the payload; none for one that fits in a slot.
    pub fn view(&self) -> Option<FrameBytes<'a>> {
        let place = self.grant.as_ref()?.place()?;
        Some(self.client.segment.frame_bytes(place))
    }

    /// Hands it over and rings the server.
    pub fn send(self) -> Sequence {
        let client = self.client;
        let sequence = self.submit();
        client.kick();
        sequence
    }

    /// Completes it, to be handed over by [`DuplexClient::kick`].
    pub fn submit(mut self) -> Sequence {
        match self.grant.take() {
            Some(grant) => self.client.core.borrow_mut().publish(grant),
            // Only `submit` takes it, and that consumes the request.
            None => 0,
        }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if let Some(grant) = self.grant.take() {
            self.client.core.borrow_mut().abandon(grant);
        }
    }
}

/// A response, where the server left it. Its room comes back when this is dropped.
#[derive(Debug)]
pub struct Response<'a> {
    client: &'a DuplexClient,
    sequence: Sequence,
    place: FramePlace,
}

impl<'a> Response<'a> {
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
    #[inline]
    pub fn view(&self) -> FrameBytes<'_> {
        self.client.segment.frame_bytes(self.place)
    }

    /// Copies `out.len()` bytes at `offset` into `out`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the response.
    #[inline]
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), OutOfRange> {
        self.view().read(offset, out)
    }

    /// A copy of all bytes.
    pub fn copy_to_vec(&self) -> Vec<u8> {
        self.view().to_vec()
    }
}

impl Drop for Response<'_> {
    #[inline]
    fn drop(&mut self) {
        self.client.core.borrow_mut().release(self.sequence);
    }
}
