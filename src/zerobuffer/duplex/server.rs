//! The end that answers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::super::error::{Refusal, ZeroBufferError, sys};
use super::super::layout::BufferName;
use super::super::ring::Placement;
use super::super::{BufferConfig, Frame, Reader, Stopper, Wait, Writer};
use super::{MARK, refusal_frame};
use crate::limits::ZEROBUFFER_PEER_CHECK_MS;
use crate::shm::WriteError;
use crate::sys::SysError;
use crate::units::{MIB, checked_range};

/// Why a handler has no response; the client of this implementation gets its text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HandlerError(Box<str>);

impl HandlerError {
    /// An error that says `text`, of which 200 bytes reach the client.
    pub fn new(text: impl Into<Box<str>>) -> HandlerError {
        HandlerError(text.into())
    }
}

impl From<ZeroBufferError> for HandlerError {
    fn from(error: ZeroBufferError) -> HandlerError {
        HandlerError(error.to_string().into())
    }
}

impl From<WriteError> for HandlerError {
    fn from(error: WriteError) -> HandlerError {
        HandlerError(error.to_string().into())
    }
}

/// Told of the metadata.
type OnInit = Box<dyn FnMut(&[u8]) + Send>;
/// Told of what goes wrong.
type OnError = Box<dyn FnMut(&ZeroBufferError) + Send>;

/// What a server is made with.
pub struct ServerOptions {
    /// Its request buffer, which it owns, and how it waits for requests. By default
    /// 4 KiB of metadata and 16 MiB of payload.
    pub request: BufferConfig,
    /// How it waits for room for responses.
    pub wait: Wait,
    on_init: Option<OnInit>,
    on_error: Option<OnError>,
}

impl ServerOptions {
    /// With that request buffer, whose way of waiting goes for both directions.
    pub fn new(request: BufferConfig) -> ServerOptions {
        ServerOptions {
            request,
            wait: request.wait,
            on_init: None,
            on_error: None,
        }
    }

    /// Called with the client's metadata before its first request is handled, if it
    /// has written any.
    #[must_use]
    pub fn on_init(mut self, call: impl FnMut(&[u8]) + Send + 'static) -> ServerOptions {
        self.on_init = Some(Box::new(call));
        self
    }

    /// Called, on the serving thread, with what goes wrong: refused requests, a client
    /// that went, damage.
    #[must_use]
    pub fn on_error(
        mut self,
        call: impl FnMut(&ZeroBufferError) + Send + 'static,
    ) -> ServerOptions {
        self.on_error = Some(Box::new(call));
        self
    }
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions::new(BufferConfig::new(4096, 16 * MIB))
    }
}

impl std::fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerOptions")
            .field("request", &self.request)
            .field("wait", &self.wait)
            .finish_non_exhaustive()
    }
}

/// Answers the requests of a duplex channel on a thread of its own, one after the
/// other, each with a response of its own (the request is not changed). Clients may
/// come and go; there is no time within which one has to come.
#[derive(Debug)]
pub struct DuplexServer {
    stop: Arc<AtomicBool>,
    stopper: Stopper,
    ended: Receiver<()>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// How long a dropped server waits for its handler.
const DROP_PATIENCE: Duration = Duration::from_secs(2);

impl DuplexServer {
    /// Makes the channel and begins to serve it.
    ///
    /// `handler` looks at the request and puts the response into the [`Reply`]. If it
    /// fails, panics or gives none, the client gets a refusal in the response's place.
    ///
    /// # Errors
    /// As for [`Reader::create`]; [`ZeroBufferError::Sys`] if no thread can be started.
    pub fn start<H>(
        channel_name: &str,
        options: ServerOptions,
        handler: H,
    ) -> Result<DuplexServer, ZeroBufferError>
    where
        H: FnMut(&Frame, &mut Reply<'_>) -> Result<(), HandlerError> + Send + 'static,
    {
        let (request_name, response_name) = BufferName::of_channel(channel_name)?;
        let requests = Reader::create_as(request_name.clone(), &options.request)?;
        let stopper = requests.stopper();
        let stop = stopper.flag();
        let (done, ended) = channel();
        let serving = Serving {
            requests: Some(requests),
            request_name,
            response_name,
            responses: None,
            options,
            handler,
            stop: Arc::clone(&stop),
            has_client: false,
            client_pid: 0,
            _done: done,
        };
        let thread = std::thread::Builder::new()
            .name("zerobuffer".to_owned())
            .spawn(move || serving.run())
            .map_err(|e| sys("starting a server's thread")(SysError::new("clone", e)))?;
        Ok(DuplexServer {
            stop,
            stopper,
            ended,
            thread: Some(thread),
        })
    }

    /// Whether it serves. It ends by [`DuplexServer::stop`] only, or when the kernel
    /// refuses to make its buffer again after a client damaged it.
    pub fn is_running(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// Ends it: no request is begun any more. Waits for at most `timeout` for the one
    /// in the handler and says whether that was enough; a handler that goes on for
    /// longer is left alone, and the channel goes when it ends.
    pub fn stop(mut self, timeout: Duration) -> bool {
        self.end(timeout)
    }

    fn end(&mut self, timeout: Duration) -> bool {
        self.stop.store(true, Ordering::Release);
        self.stopper.stop();
        let Some(thread) = self.thread.take() else {
            return true;
        };
        // The sender goes when the serving is over, by whatever way.
        let ended = self.ended.recv_timeout(timeout);
        let in_time = !matches!(ended, Err(std::sync::mpsc::RecvTimeoutError::Timeout));
        if in_time {
            // Its handler's panics are caught; others' went to standard error.
            let _ = thread.join();
        }
        in_time
    }
}

impl Drop for DuplexServer {
    fn drop(&mut self) {
        self.end(DROP_PATIENCE);
    }
}

/// What runs on the server's thread.
struct Serving<H> {
    /// None only while it is made again.
    requests: Option<Reader>,
    request_name: BufferName,
    response_name: BufferName,
    responses: Option<Writer>,
    options: ServerOptions,
    handler: H,
    stop: Arc<AtomicBool>,
    has_client: bool,
    /// The process that wrote requests when the response buffer was joined: that of
    /// a client that was killed still looks as before, so another number is what
    /// tells that there is another buffer.
    client_pid: u64,
    /// Its going tells that the serving is over.
    _done: Sender<()>,
}

/// Room for a response has no deadline of its own: a client that lives and does not
/// read makes the server wait, one that goes ends the wait, and so does a stop.
const RESPONSE_PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);

impl<H> Serving<H>
where
    H: FnMut(&Frame, &mut Reply<'_>) -> Result<(), HandlerError>,
{
    fn run(mut self) {
        let idle = Duration::from_millis(ZEROBUFFER_PEER_CHECK_MS);
        while !self.stop.load(Ordering::Acquire) {
            let Some(requests) = &mut self.requests else {
                return;
            };
            match requests.read(idle) {
                Ok(request) => self.serve(request),
                Err(ZeroBufferError::TimedOut) => {
                    // Clients of version 1 ask whether the server has joined.
                    let _ = self.join_client();
                }
                Err(ZeroBufferError::Stopped) => return,
                Err(error @ ZeroBufferError::PeerGone { .. }) => {
                    self.responses = None;
                    if std::mem::take(&mut self.has_client) {
                        self.tell(&error);
                    }
                    if let Some(requests) = &mut self.requests {
                        let _ = requests.wait_writer(idle);
                    }
                }
                Err(error) => {
                    self.tell(&error);
                    if !self.begin_anew() {
                        return;
                    }
                }
            }
        }
    }

    /// A damaged buffer is of no use to any client: it is made anew.
    fn begin_anew(&mut self) -> bool {
        self.responses = None;
        self.has_client = false;
        self.requests = None;
        match Reader::create_stopped_by(
            self.request_name.clone(),
            &self.options.request,
            Arc::clone(&self.stop),
        ) {
            Ok(requests) => {
                self.requests = Some(requests);
                true
            }
            Err(error) => {
                self.tell(&error);
                false
            }
        }
    }

    fn tell(&mut self, error: &ZeroBufferError) {
        if let Some(call) = &mut self.options.on_error {
            // A callback that panics must not end the serving.
            let _ = catch_unwind(AssertUnwindSafe(|| call(error)));
        }
    }

    /// Joins the response buffer of the client that is there, unless that was done.
    fn join_client(&mut self) -> Result<(), ZeroBufferError> {
        if let Some(responses) = &mut self.responses {
            if responses.is_reader_connected()? {
                return Ok(());
            }
            self.responses = None;
        }
        let mut responses = Writer::attach_as(&self.response_name, self.options.wait)?;
        responses.stop_by(Arc::clone(&self.stop));
        self.responses = Some(responses);
        Ok(())
    }

    fn serve(&mut self, request: Frame) {
        if !self.has_client {
            self.has_client = true;
            self.first_request();
        }
        let client_pid = self.requests.as_ref().map_or(0, Reader::named_writer);
        let joined = match &self.responses {
            Some(responses) if client_pid == self.client_pid && !responses.has_reader_left() => {
                Ok(())
            }
            _ => self.join_client(),
        };
        if joined.is_ok() {
            self.client_pid = client_pid;
        }
        // The client of this request has gone: nobody waits for a response.
        let answered = joined.and_then(|()| self.answer(&request));
        if let Err(error) = answered {
            if matches!(error, ZeroBufferError::PeerGone { .. }) {
                self.responses = None;
            }
            self.tell(&error);
        }
    }

    fn first_request(&mut self) {
        let metadata = match &self.requests {
            Some(requests) => requests.metadata(),
            None => Ok(None),
        };
        match metadata {
            Ok(Some(metadata)) => {
                if let Some(mut call) = self.options.on_init.take() {
                    let _ = catch_unwind(AssertUnwindSafe(|| call(&metadata)));
                }
            }
            Ok(None) => {}
            Err(error) => self.tell(&error),
        }
    }

    /// Calls the handler and sends exactly one frame.
    fn answer(&mut self, request: &Frame) -> Result<(), ZeroBufferError> {
        let Some(writer) = &mut self.responses else {
            return Err(ZeroBufferError::NoBuffer);
        };
        let mut reply = Reply {
            writer,
            placed: None,
        };
        let handler = &mut self.handler;
        let outcome = catch_unwind(AssertUnwindSafe(|| handler(request, &mut reply)));
        let refused = match (outcome, reply.placed) {
            (Ok(Ok(())), Some((place, len))) => {
                if !reply.begins_as_refusal() {
                    return reply.writer.publish(&place, len).map(drop);
                }
                (
                    Refusal::Failed,
                    Box::from("the response begins as a refusal does"),
                )
            }
            (Ok(Ok(())), None) => (Refusal::Empty, Box::default()),
            (Ok(Err(error)), _) => (Refusal::Failed, error.0),
            (Err(_), _) => (Refusal::Panicked, Box::default()),
        };
        let (refusal, detail) = refused;
        let frame = refusal_frame(refusal, &detail, reply.writer.max_frame());
        reply.writer.write(&frame, RESPONSE_PATIENCE)?;
        self.tell(&ZeroBufferError::Refused {
            sequence: request.sequence(),
            refusal,
            detail,
        });
        Ok(())
    }
}

/// Where a handler puts its response: straight into the client's ring.
#[derive(Debug)]
pub struct Reply<'a> {
    writer: &'a mut Writer,
    placed: Option<(Placement, u64)>,
}

impl Reply<'_> {
    /// Gives `bytes` as the response, in place of what was given before.
    ///
    /// # Errors
    /// As for [`Reply::reserve`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ZeroBufferError> {
        self.reserve(bytes.len() as u64)?;
        if let Some((place, _)) = &self.placed {
            self.writer.fill(place, 0, bytes);
        }
        Ok(())
    }

    /// Gives a response of `len` bytes, in place of what was given before, to be filled
    /// by [`Reply::write_at`] or [`Reply::as_ptr`]. Waits for room as long as the client
    /// is there and the server is not stopped.
    ///
    /// # Errors
    /// [`ZeroBufferError::TooLarge`] with both lengths; [`ZeroBufferError::EmptyFrame`];
    /// [`ZeroBufferError::PeerGone`], [`ZeroBufferError::Stopped`].
    pub fn reserve(&mut self, len: u64) -> Result<(), ZeroBufferError> {
        self.placed = None;
        let place = self.writer.room_for(len, RESPONSE_PATIENCE)?;
        self.placed = Some((place, len));
        Ok(())
    }

    /// Copies `bytes` to `offset` of the response that was reserved.
    ///
    /// # Errors
    /// [`WriteError`] if they do not lie within it.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let len = self.placed.map_or(0, |(_, len)| len);
        let range = checked_range(offset, bytes.len() as u64, len)?;
        if let Some((place, _)) = &self.placed {
            self.writer.fill(place, range.start, bytes);
        }
        Ok(())
    }

    /// The first byte of the response that was reserved, null if none was; as
    /// [`Reserved::as_ptr`](crate::zerobuffer::Reserved::as_ptr).
    pub fn as_ptr(&mut self) -> *mut u8 {
        match &self.placed {
            Some((place, _)) => self.writer.ptr(place),
            None => std::ptr::null_mut(),
        }
    }

    /// Longest response, in bytes.
    pub fn max_len(&self) -> u64 {
        self.writer.max_frame()
    }

    fn begins_as_refusal(&self) -> bool {
        match &self.placed {
            Some((place, len)) if *len >= MARK.len() as u64 => {
                let mut first = [0; MARK.len()];
                self.writer.read_back(place, &mut first);
                first == MARK
            }
            _ => false,
        }
    }
}
