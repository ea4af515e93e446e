//! The server: one handler, any number of channels, each with threads of its own.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::ChannelError;
use super::frame::{Frame, HandlerError};
use super::sentry::Sentry;
use super::wait::{HOT_LOOKS, Waiter};
use crate::duplex::{
    ChannelStatus, Claim, ErrorCode, Posts, Seen, Segment, Semaphore, Sequence, ServerCore, Side,
    Waiting,
};
use crate::limits::MAX_CHANNEL_WORKERS;
use crate::shm::PeerTrust;
use crate::sys::futex::Lifeline;

/// How a server behaves.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Threads per channel, 1 to [`MAX_CHANNEL_WORKERS`]. With one, requests are
    /// answered in order.
    pub workers: usize,
    /// How idle workers wait.
    pub waiting: Waiting,
    /// Clients at the same time.
    pub max_clients: usize,
    /// Time that a channel which is stopped gives its client to read what was answered.
    pub drain: Duration,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            workers: 1,
            waiting: Waiting::Adaptive,
            max_clients: 1,
            drain: Duration::ZERO,
        }
    }
}

/// A request whose handler failed, as the error callback gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandlerFailure {
    /// The request.
    pub sequence: Sequence,
    /// Of a batch: which of its items.
    pub item: Option<usize>,
    /// What went wrong.
    pub error: HandlerError,
}

type Handler = dyn Fn(&mut Frame<'_>) -> Result<(), HandlerError> + Send + Sync;
type OnInit = dyn Fn(&[u8]) + Send + Sync;
type OnError = dyn Fn(&HandlerFailure) + Send + Sync;
type StopHook = Box<dyn FnOnce() + Send>;

/// A server of in-place channels. Clones are the same server.
///
/// The handler gets each request as a [`Frame`] and leaves the response in it. Its
/// error or panic becomes the client's error for that request, never silence.
#[derive(Clone)]
pub struct InPlaceDuplexServer {
    service: Arc<Service>,
}

struct Service {
    options: ServerOptions,
    handler: OnceLock<(Box<Handler>, Option<PeerTrust>)>,
    on_init: OnceLock<Box<OnInit>>,
    on_error: OnceLock<Box<OnError>>,
    stopping: AtomicBool,
    channels: Mutex<Vec<Arc<Channel>>>,
    at_stop: Mutex<Vec<StopHook>>,
}

impl std::fmt::Debug for InPlaceDuplexServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InPlaceDuplexServer")
            .field("options", &self.service.options)
            .field("is_running", &self.is_running())
            .finish_non_exhaustive()
    }
}

impl InPlaceDuplexServer {
    /// A server that has no handler yet.
    ///
    /// # Errors
    /// [`ChannelError::Workers`].
    pub fn new(options: ServerOptions) -> Result<InPlaceDuplexServer, ChannelError> {
        let workers = options.workers;
        if workers == 0 || workers as u64 > MAX_CHANNEL_WORKERS {
            return Err(ChannelError::Workers { workers });
        }
        Ok(InPlaceDuplexServer {
            service: Arc::new(Service {
                options,
                handler: OnceLock::new(),
                on_init: OnceLock::new(),
                on_error: OnceLock::new(),
                stopping: AtomicBool::new(false),
                channels: Mutex::default(),
                at_stop: Mutex::default(),
            }),
        })
    }

    /// Sets the handler; channels can be served from now on. With several workers or
    /// clients it runs on several threads at the same time.
    ///
    /// # Errors
    /// [`ChannelError::StartedTwice`].
    pub fn start(
        &self,
        handler: impl Fn(&mut Frame<'_>) -> Result<(), HandlerError> + Send + Sync + 'static,
    ) -> Result<(), ChannelError> {
        self.start_with(Box::new(handler), None)
    }

    /// As [`InPlaceDuplexServer::start`], with [`Frame::data_mut`]: a slice of the frame
    /// where it lies, for clients that are trusted not to touch it meanwhile.
    ///
    /// # Errors
    /// [`ChannelError::StartedTwice`].
    pub fn start_trusting(
        &self,
        trust: PeerTrust,
        handler: impl Fn(&mut Frame<'_>) -> Result<(), HandlerError> + Send + Sync + 'static,
    ) -> Result<(), ChannelError> {
        self.start_with(Box::new(handler), Some(trust))
    }

    fn start_with(
        &self,
        handler: Box<Handler>,
        trust: Option<PeerTrust>,
    ) -> Result<(), ChannelError> {
        let set = self.service.handler.set((handler, trust));
        set.map_err(|_| ChannelError::StartedTwice)
    }

    /// Called once per channel with the client's metadata, before the first request
    /// that comes after it. Set it before the first channel is served.
    pub fn on_init(&self, callback: impl Fn(&[u8]) + Send + Sync + 'static) {
        let _ = self.service.on_init.set(Box::new(callback));
    }

    /// Called for each request that failed. Set it before the first channel is served.
    pub fn on_error(&self, callback: impl Fn(&HandlerFailure) + Send + Sync + 'static) {
        let _ = self.service.on_error.set(Box::new(callback));
    }

    /// Has `hook` run once when the server stops; at once if it has.
    pub fn at_stop(&self, hook: impl FnOnce() + Send + 'static) {
        let mut hooks = lock(&self.service.at_stop);
        if self.service.stopping.load(Ordering::Acquire) {
            drop(hooks);
            hook();
        } else {
            hooks.push(Box::new(hook));
        }
    }

    /// How it behaves.
    pub fn options(&self) -> &ServerOptions {
        &self.service.options
    }

    /// Whether it has a handler and was not stopped.
    pub fn is_running(&self) -> bool {
        self.service.handler.get().is_some() && !self.service.stopping.load(Ordering::Acquire)
    }

    /// Channels that are served at the moment.
    pub fn clients(&self) -> usize {
        let mut channels = lock(&self.service.channels);
        channels.retain(|channel| !channel.finished.load(Ordering::Acquire));
        channels.len()
    }

    /// A look at each channel that is served.
    pub fn status(&self) -> Vec<ChannelStatus> {
        let channels = lock(&self.service.channels).clone();
        let look = channels.iter().filter_map(|channel| {
            channel.core.mirror();
            channel.core.segment().status().ok()
        });
        look.collect()
    }

    /// Serves a channel until its client leaves or dies, or this server stops.
    /// Returns once the workers run and the liveness word is held. With `take_over`
    /// the memory had a server before, which is dead, and its client has ended all
    /// that was in flight ([`super::DuplexClient::server_is_gone`]).
    ///
    /// # Errors
    /// [`ChannelError::NotStarted`], [`ChannelError::Stopped`], [`ChannelError::Thread`],
    /// [`ChannelError::Sys`].
    pub fn serve_segment(
        &self,
        segment: &Segment,
        take_over: bool,
    ) -> Result<ChannelHandle, ChannelError> {
        let service = &self.service;
        if service.handler.get().is_none() {
            return Err(ChannelError::NotStarted);
        }
        let workers = service.options.workers;
        let core = match take_over {
            true => ServerCore::take_over(segment, workers),
            false => ServerCore::new(segment, workers),
        };
        let channel = Arc::new(Channel {
            core,
            sentry: Sentry::new(segment, Side::Server),
            service: service.clone(),
            ending: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            socket: Mutex::default(),
            greeted: OnceLock::new(),
        });
        {
            let mut channels = lock(&service.channels);
            if service.stopping.load(Ordering::Acquire) {
                return Err(ChannelError::Stopped);
            }
            channels.retain(|channel| !channel.finished.load(Ordering::Acquire));
            channels.push(channel.clone());
        }
        let (held, is_held) = sync_channel(1);
        let lead = channel.clone();
        let thread = thread::Builder::new()
            .name("uffd-sync-serve".to_owned())
            .spawn(move || lead.lead(&held));
        let thread = match thread {
            Ok(thread) => thread,
            Err(error) => {
                channel.finished.store(true, Ordering::Release);
                return Err(ChannelError::Thread(error));
            }
        };
        let handle = ChannelHandle {
            channel,
            thread: Some(thread),
        };
        match is_held.recv() {
            Ok(result) => result.map(|()| handle),
            Err(_) => Err(ChannelError::Stopped),
        }
    }

    /// Stops: no request is taken any more but those that are there; clients are told.
    /// Returns at once; [`ChannelHandle::join`] waits for a channel's end.
    pub fn stop(&self) {
        let hooks = {
            let mut hooks = lock(&self.service.at_stop);
            self.service.stopping.store(true, Ordering::Release);
            std::mem::take(&mut *hooks)
        };
        for hook in hooks {
            hook();
        }
        for channel in lock(&self.service.channels).iter() {
            channel.end();
        }
    }
}

/// A channel that is being served.
#[derive(Debug)]
pub struct ChannelHandle {
    channel: Arc<Channel>,
    thread: Option<JoinHandle<()>>,
}

impl ChannelHandle {
    /// Its memory.
    pub fn segment(&self) -> &Segment {
        self.channel.core.segment()
    }

    /// Whether its workers have ended.
    pub fn is_finished(&self) -> bool {
        self.channel.finished.load(Ordering::Acquire)
    }

    /// Stops it: requests that are there are answered, the client is told.
    pub fn stop(&self) {
        self.channel.end();
    }

    /// The same channel, for who does not wait for its end.
    pub(super) fn served(&self) -> Served {
        Served(self.channel.clone())
    }

    /// Waits until its workers have ended.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            // Its panics were caught.
            let _ = thread.join();
        }
    }
}

/// A channel that is being served, to be told that its client is gone.
#[derive(Clone, Debug)]
pub(super) struct Served(Arc<Channel>);

impl Served {
    pub(super) fn segment(&self) -> &Segment {
        self.0.core.segment()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.0.finished.load(Ordering::Acquire)
    }

    /// The client is gone, whatever its liveness word says, which stays as it is: it may
    /// go to another server with the memory.
    pub(super) fn client_left(&self) {
        self.segment().set_lost(Side::Client, true);
        self.0.end();
    }

    /// Closes `socket` when the workers have ended, or now if they have.
    pub(super) fn close_at_end(&self, socket: OwnedFd) {
        let mut kept = lock(&self.0.socket);
        if !self.is_finished() {
            *kept = Some(socket);
        }
    }
}

struct Channel {
    core: ServerCore,
    /// Of all its workers.
    sentry: Arc<Sentry>,
    service: Arc<Service>,
    ending: AtomicBool,
    finished: AtomicBool,
    /// Closed when nobody uses the memory any more.
    socket: Mutex<Option<OwnedFd>>,
    /// The client's metadata was told; set when its callback has returned.
    greeted: OnceLock<()>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("core", &self.core)
            .finish_non_exhaustive()
    }
}

/// What one worker has at hand.
struct Worker {
    waiter: Waiter,
    posts: Posts,
    /// What its handler has at the moment.
    claim: Option<Claim>,
    /// Of a batch: the item that it is at.
    item: usize,
}

impl Channel {
    fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.core.segment().stop(Side::Server);
    }

    /// The first worker's thread: holds the word while any worker works.
    fn lead(&self, held: &SyncSender<Result<(), ChannelError>>) {
        let segment = self.core.segment();
        let (mapping, offset) = segment.lifeline_place(Side::Server);
        match Lifeline::hold(mapping, offset) {
            Err(error) => {
                // Whoever made this thread waits for it.
                let _ = held.send(Err(error.into()));
            }
            Ok(_lifeline) => {
                thread::scope(|scope| {
                    let mut result = Ok(());
                    for _ in 1..self.service.options.workers {
                        let worker = thread::Builder::new()
                            .name("uffd-sync-work".to_owned())
                            .spawn_scoped(scope, || self.work());
                        if let Err(error) = worker {
                            result = Err(ChannelError::Thread(error));
                            self.end();
                            break;
                        }
                    }
                    let _ = held.send(result);
                    self.work();
                });
                self.core.mirror();
                self.drain();
                segment.stop(Side::Server);
            }
        }
        self.finished.store(true, Ordering::Release);
        // Whoever comes with one from now on finds it finished.
        drop(lock(&self.socket).take());
    }

    /// One worker: takes requests until the channel ends. A handler's panic ends the
    /// inner loop only, so that a request that does not panic has nothing to prepare.
    fn work(&self) {
        let waiting = self.service.options.waiting;
        let mut worker = Worker {
            waiter: Waiter::new(self.core.segment(), Side::Server, waiting)
                .kept_by(self.sentry.clone()),
            posts: Posts::new(),
            claim: None,
            item: 0,
        };
        loop {
            let worked = catch_unwind(AssertUnwindSafe(|| self.take_requests(&mut worker)));
            let Err(panic) = worked else { break };
            let error = HandlerError {
                code: ErrorCode::PANIC,
                ..HandlerError::new(panic_text(panic.as_ref()))
            };
            let Some(claim) = worker.claim.take() else {
                // It was no handler's.
                self.end();
                resume_unwind(panic);
            };
            if claim.is_batch() {
                // The others have their turn, with the same frame in hand.
                self.fail_item(worker.claim.insert(claim), worker.item, error);
                worker.item += 1;
                continue;
            }
            self.fail(claim, error, &mut worker.posts);
            if self.core.is_post_due(&worker.posts) {
                self.core.post(&mut worker.posts);
            }
        }
    }

    fn take_requests(&self, worker: &mut Worker) {
        let core = &self.core;
        let on_init = self.service.on_init.get().map(Box::as_ref);
        let Some(handler) = self.service.handler.get() else {
            // Nothing is served before there is one.
            return;
        };
        if worker.claim.is_some() {
            // A batch, one item of which panicked.
            self.serve_batch(handler, worker);
            if core.is_post_due(&worker.posts) {
                core.post(&mut worker.posts);
            }
        }
        loop {
            let seen = match worker.waiter.is_hot() {
                true => core.look_for_request(HOT_LOOKS, &mut worker.posts, &mut worker.claim),
                false => Seen::Nothing,
            };
            if let Seen::Alone(look) = seen {
                self.serve_alone(look, handler, on_init, worker);
            } else {
                let claimed = match seen {
                    Seen::Some => core.claim(&mut worker.posts),
                    _ => None,
                };
                let Some(claim) = claimed.or_else(|| self.wait_for_request(worker)) else {
                    return;
                };
                self.serve(claim, handler, on_init, worker);
            }
            while !core.is_post_due(&worker.posts) {
                let Some(claim) = core.claim(&mut worker.posts) else {
                    break;
                };
                self.serve(claim, handler, on_init, worker);
            }
            core.post(&mut worker.posts);
        }
    }

    /// The next request; none once the channel ends.
    #[inline(never)]
    fn wait_for_request(&self, worker: &mut Worker) -> Option<Claim> {
        let core = &self.core;
        let posts = &mut worker.posts;
        let waited = worker.waiter.wait(
            Semaphore::RequestReady,
            u32::MAX,
            None,
            |thorough| match core.claim(posts) {
                Some(claim) => Some(Some(claim)),
                None if thorough && self.is_ending() => Some(None),
                None => None,
            },
            || core.mirror(),
        );
        waited.ok().flatten()
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire) || self.core.segment().is_stopped(Side::Client)
    }

    /// Serves the request in the worker's hands that came alone: between seeing it and
    /// handing its answer over nothing is done but what the handler needs.
    #[inline(always)]
    fn serve_alone(
        &self,
        look: u32,
        (handler, trust): &(Box<Handler>, Option<PeerTrust>),
        on_init: Option<&OnInit>,
        worker: &mut Worker,
    ) {
        let core = &self.core;
        if let Some(on_init) = on_init {
            self.greet(on_init);
        }
        let Some(claim) = &worker.claim else { return };
        let mut frame = Frame::new(core, claim, core.bytes_alone(), *trust);
        let outcome = handler(&mut frame);
        let len = frame.len();
        if outcome.is_ok() && len == claim.len() {
            core.respond_alone(claim, look, &mut worker.posts);
            worker.claim = None;
        } else {
            self.conclude(outcome, len, worker);
        }
    }

    /// Answers the request in the worker's hands.
    #[inline(never)]
    fn conclude(&self, outcome: Result<(), HandlerError>, len: usize, worker: &mut Worker) {
        let Some(claim) = worker.claim.take() else {
            return;
        };
        match outcome {
            Ok(()) => self.core.respond(claim, len, &mut worker.posts),
            Err(error) => self.fail(claim, error, &mut worker.posts),
        }
    }

    #[inline]
    fn serve(
        &self,
        claim: Claim,
        service: &(Box<Handler>, Option<PeerTrust>),
        on_init: Option<&OnInit>,
        worker: &mut Worker,
    ) {
        if claim.is_cancelled() || claim.is_malformed() {
            self.turn_down(claim, &mut worker.posts);
            return;
        }
        if let Some(on_init) = on_init {
            self.greet(on_init);
        }
        self.core.begin_handler(&claim);
        // There it is found if the handler panics.
        let claim = worker.claim.insert(claim);
        if claim.is_batch() {
            worker.item = 0;
            self.serve_batch(service, worker);
            return;
        }
        let (handler, trust) = service;
        let room = self.core.bytes(claim, claim.capacity());
        let mut frame = Frame::new(&self.core, claim, room, *trust);
        let outcome = handler(&mut frame);
        let len = frame.len();
        self.conclude(outcome, len, worker);
    }

    /// Goes through the items of the batch in the worker's hands, from the one that it is
    /// at on, and answers it.
    #[inline(never)]
    fn serve_batch(
        &self,
        (handler, trust): &(Box<Handler>, Option<PeerTrust>),
        worker: &mut Worker,
    ) {
        let Some(claim) = &worker.claim else { return };
        let Some(batch) = self.core.batch(claim) else {
            if let Some(claim) = worker.claim.take() {
                self.turn_down(claim, &mut worker.posts);
            }
            return;
        };
        batch.prefetch();
        // One for all items: each changes what differs.
        let mut frame = Frame::new(&self.core, claim, batch.bytes(0, 0), *trust);
        for item in worker.item..batch.len() {
            // There it is found if the handler panics.
            worker.item = item;
            let Some(asked) = batch.request(item) else {
                self.fail_item(claim, item, malformed());
                continue;
            };
            frame.take_item(item, batch.bytes(item, batch.room()), asked);
            match handler(&mut frame) {
                Ok(()) => batch.respond(item, asked, frame.len()),
                Err(error) => self.fail_item(claim, item, error),
            }
        }
        if let Some(claim) = worker.claim.take() {
            let len = claim.len();
            self.core.respond(claim, len, &mut worker.posts);
        }
    }

    /// Answers one item of a batch with an error.
    #[cold]
    fn fail_item(&self, claim: &Claim, item: usize, error: HandlerError) {
        // A client that has spoilt the frame since gets no answer to the item.
        if let Some(batch) = self.core.batch(claim).filter(|batch| item < batch.len()) {
            batch.fail(item, error.code, &error.text);
        }
        self.tell_failure(HandlerFailure {
            sequence: claim.sequence(),
            item: Some(item),
            error,
        });
    }

    /// Answers a request without its handler.
    #[cold]
    fn turn_down(&self, claim: Claim, posts: &mut Posts) {
        if claim.is_cancelled() {
            self.core.skip(claim, posts);
            return;
        }
        self.fail(claim, malformed(), posts);
    }

    #[cold]
    fn fail(&self, claim: Claim, error: HandlerError, posts: &mut Posts) {
        let sequence = claim.sequence();
        self.core.fail(claim, error.code, &error.text, posts);
        self.tell_failure(HandlerFailure {
            sequence,
            item: None,
            error,
        });
    }

    fn tell_failure(&self, failure: HandlerFailure) {
        if let Some(on_error) = self.service.on_error.get() {
            // A callback's panic concerns nobody's request.
            let _ = catch_unwind(AssertUnwindSafe(|| on_error(&failure)));
        }
    }

    /// Tells the client's metadata, once there is any.
    fn greet(&self, on_init: &OnInit) {
        if self.greeted.get().is_some() {
            return;
        }
        let metadata = self.core.segment().metadata(Side::Client);
        let metadata = metadata.unwrap_or_default();
        if !metadata.is_empty() {
            // Other workers wait for its end with their requests.
            self.greeted.get_or_init(|| {
                let _ = catch_unwind(AssertUnwindSafe(|| on_init(&metadata)));
            });
        }
    }

    /// Gives the client time to read what was answered.
    fn drain(&self) {
        let core = &self.core;
        let drain = self.service.options.drain;
        if drain.is_zero() || core.segment().is_stopped(Side::Client) {
            return;
        }
        let mut waiter = Waiter::new(core.segment(), Side::Server, Waiting::Park);
        let begun = std::time::Instant::now();
        // The client rings only waiters that it happens to see: look again by the millisecond.
        while begun.elapsed() < drain {
            let waited = waiter.wait(
                Semaphore::ResponseConsumed,
                u32::MAX,
                Some(Duration::from_millis(1)),
                |_| {
                    let done = core.unread() == 0 || core.segment().is_stopped(Side::Client);
                    done.then_some(())
                },
                || (),
            );
            if waited.is_ok() || waiter.is_gone() {
                return;
            }
        }
    }
}

fn malformed() -> HandlerError {
    HandlerError {
        code: ErrorCode::MALFORMED,
        ..HandlerError::new("the frame's header is impossible")
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    match (
        panic.downcast_ref::<&'static str>(),
        panic.downcast_ref::<String>(),
    ) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "the handler panicked".to_owned(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
