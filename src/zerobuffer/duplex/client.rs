//! The end that asks.

use std::time::{Duration, Instant};

use super::super::error::{Side, ZeroBufferError};
use super::super::layout::{BufferName, READER_PID, WRITER_PID};
use super::super::segment::Segment;
use super::super::writer::Reserved;
use super::super::{BufferConfig, Frame, Gone, Reader, Wait, Writer};
use super::{MARK, REFUSAL_PREFIX, parse_refusal};
use crate::limits::{
    ZEROBUFFER_ATTACH_POLL_MS, ZEROBUFFER_PEER_CHECK_MS, ZEROBUFFER_REFUSAL_BYTES,
};
use crate::shm::WriteError;
use crate::sys::process::deadline_in;
use crate::units::{MIB, OutOfRange};

/// What a client is made with.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// Its response buffer, which it owns, and how it waits for responses. By default
    /// 4 KiB of metadata and 16 MiB of payload.
    pub response: BufferConfig,
    /// How it waits for room for requests.
    pub wait: Wait,
    /// How long it waits for the server, and for a client before it to be gone.
    /// Default 5 s.
    pub connect_timeout: Duration,
}

impl ClientOptions {
    /// With that response buffer, whose way of waiting goes for both directions.
    pub fn new(response: BufferConfig) -> ClientOptions {
        ClientOptions {
            response,
            wait: response.wait,
            ..ClientOptions::default()
        }
    }
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            response: BufferConfig::new(4096, 16 * MIB),
            wait: Wait::default(),
            connect_timeout: Duration::from_secs(5),
        }
    }
}

/// The one client of a duplex channel. Its server is a [`DuplexServer`](super::DuplexServer)
/// or one of another implementation of version 1.
#[derive(Debug)]
pub struct DuplexClient {
    requests: Writer,
    responses: Reader,
    /// The request that the next response answers.
    next_answer: u64,
}

impl DuplexClient {
    /// Joins the channel.
    ///
    /// # Errors
    /// When `connect_timeout` is over: [`ZeroBufferError::NoBuffer`] if there is no
    /// server, [`ZeroBufferError::WriterTaken`] or [`ZeroBufferError::NameTaken`] if it
    /// has a client, [`ZeroBufferError::TimedOut`] if requests of a client that is
    /// gone are still unanswered. At once: [`ZeroBufferError::Name`],
    /// [`ZeroBufferError::Foreign`], [`ZeroBufferError::Sys`].
    pub fn connect(
        channel: &str,
        options: &ClientOptions,
    ) -> Result<DuplexClient, ZeroBufferError> {
        let (request, response) = BufferName::of_channel(channel)?;
        let deadline = deadline_in(options.connect_timeout);
        let pause = Duration::from_millis(ZEROBUFFER_ATTACH_POLL_MS);
        while let Err(error) = is_free(&request) {
            let passing = matches!(
                error,
                ZeroBufferError::NoBuffer
                    | ZeroBufferError::WriterTaken { .. }
                    | ZeroBufferError::TimedOut
            );
            if !passing || deadline <= Instant::now() {
                return Err(error);
            }
            std::thread::sleep(pause);
        }
        let responses = Reader::create_as(response, &options.response)?;
        let requests = Writer::attach_as(&request, options.wait)?;
        Ok(DuplexClient {
            next_answer: requests.next_sequence(),
            requests,
            responses,
        })
    }

    /// Metadata for the server, once in the request buffer's life.
    ///
    /// # Errors
    /// As for [`Writer::set_metadata`].
    pub fn set_metadata(&mut self, bytes: &[u8]) -> Result<(), ZeroBufferError> {
        self.requests.set_metadata(bytes)
    }

    /// Sends a request and answers with its number. Waits for room for at most
    /// `timeout`.
    ///
    /// # Errors
    /// As for [`Writer::write`].
    pub fn send(&mut self, bytes: &[u8], timeout: Duration) -> Result<u64, ZeroBufferError> {
        self.requests.write(bytes, timeout)
    }

    /// Room for a request of `len` bytes, to be filled in place and sent by
    /// [`PendingRequest::send`].
    ///
    /// # Errors
    /// As for [`Writer::write`].
    pub fn acquire(
        &mut self,
        len: u64,
        timeout: Duration,
    ) -> Result<PendingRequest<'_>, ZeroBufferError> {
        self.requests.reserve(len, timeout).map(PendingRequest)
    }

    /// Requests that no response was received for.
    pub fn unanswered(&self) -> u64 {
        self.requests.next_sequence().wrapping_sub(self.next_answer)
    }

    /// The next response, in the order of the requests.
    ///
    /// # Errors
    /// [`ZeroBufferError::Refused`] with the request's number if the server has none
    /// for it; [`ZeroBufferError::TimedOut`]; [`ZeroBufferError::PeerGone`] within
    /// 40 ms of the server's death; [`ZeroBufferError::NoSuchRequest`] for a response
    /// that nobody asked for; [`ZeroBufferError::Damaged`].
    pub fn receive(&mut self, timeout: Duration) -> Result<Response, ZeroBufferError> {
        let deadline = deadline_in(timeout);
        let frame = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // The response buffer does not know of a server that has never answered.
            let slice = left.min(Duration::from_millis(ZEROBUFFER_PEER_CHECK_MS));
            match self.responses.read(slice) {
                Ok(frame) => break frame,
                Err(ZeroBufferError::TimedOut) => {}
                Err(error) => return Err(error),
            }
            if !self.requests.is_reader_connected()? {
                return Err(ZeroBufferError::PeerGone {
                    side: Side::Reader,
                    pid: self.requests.reader_pid(),
                    gone: Gone::Died,
                });
            }
            if left.is_zero() {
                return Err(ZeroBufferError::TimedOut);
            }
        };
        let sequence = self.next_answer;
        if self.unanswered() == 0 {
            return Err(ZeroBufferError::NoSuchRequest { sequence });
        }
        self.next_answer = sequence.wrapping_add(1);
        match refusal_of(&frame) {
            Some((refusal, detail)) => Err(ZeroBufferError::Refused {
                sequence,
                refusal,
                detail,
            }),
            None => Ok(Response { sequence, frame }),
        }
    }

    /// The response to request `sequence`; those of earlier requests are dropped.
    ///
    /// # Errors
    /// As for [`DuplexClient::receive`]; [`ZeroBufferError::NoSuchRequest`] if it was
    /// received before or not sent.
    pub fn receive_for(
        &mut self,
        sequence: u64,
        timeout: Duration,
    ) -> Result<Response, ZeroBufferError> {
        if sequence < self.next_answer || sequence >= self.requests.next_sequence() {
            return Err(ZeroBufferError::NoSuchRequest { sequence });
        }
        let deadline = deadline_in(timeout);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.receive(left) {
                Ok(response) if response.sequence != sequence => {}
                Err(ZeroBufferError::Refused { sequence: of, .. }) if of != sequence => {}
                other => return other,
            }
        }
    }

    /// Sends a request and waits for its response. Responses to requests before it
    /// that were not received are dropped.
    ///
    /// # Errors
    /// As for [`DuplexClient::send`] and [`DuplexClient::receive_for`]. After
    /// [`ZeroBufferError::TimedOut`] the request stands; its response is dropped by
    /// the next call.
    pub fn call(&mut self, bytes: &[u8], timeout: Duration) -> Result<Response, ZeroBufferError> {
        let deadline = deadline_in(timeout);
        let sequence = self.send(bytes, timeout)?;
        self.receive_for(sequence, deadline.saturating_duration_since(Instant::now()))
    }

    /// Whether a server reads requests and has joined the response buffer.
    ///
    /// # Errors
    /// [`ZeroBufferError::Damaged`].
    pub fn is_server_connected(&mut self) -> Result<bool, ZeroBufferError> {
        Ok(self.requests.is_reader_connected()? && self.responses.wait_writer(Duration::ZERO)?)
    }

    /// Longest data of a request, in bytes.
    pub fn max_request(&self) -> u64 {
        self.requests.max_frame()
    }
}

/// Whether a client can join: there is a server, no client, and no request left.
fn is_free(request: &BufferName) -> Result<(), ZeroBufferError> {
    let segment = Segment::open(request)?;
    if !segment.is_alive(READER_PID) {
        return Err(ZeroBufferError::NoBuffer);
    }
    if segment.is_alive(WRITER_PID) {
        return Err(ZeroBufferError::WriterTaken {
            pid: segment.word(WRITER_PID),
        });
    }
    if segment.free() != segment.blocks.payload {
        return Err(ZeroBufferError::TimedOut);
    }
    Ok(())
}

fn refusal_of(frame: &Frame) -> Option<(super::Refusal, Box<str>)> {
    let longest = REFUSAL_PREFIX as u64 + ZEROBUFFER_REFUSAL_BYTES;
    if frame.len() < REFUSAL_PREFIX as u64 || frame.len() > longest {
        return None;
    }
    let mut first = [0; MARK.len()];
    let begins = frame.read(0, &mut first).is_ok() && first == MARK;
    begins.then(|| parse_refusal(&frame.to_vec())).flatten()
}

/// Room for a request, in the ring; dropped, nothing is sent.
#[derive(Debug)]
pub struct PendingRequest<'a>(Reserved<'a>);

impl PendingRequest<'_> {
    /// Bytes of the request.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Never: version 1 has no empty frames.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number that it will have.
    pub fn sequence(&self) -> u64 {
        self.0.sequence()
    }

    /// Copies `bytes` to `offset` of the request.
    ///
    /// # Errors
    /// [`WriteError`] if they do not lie within it.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.0.write(offset, bytes)
    }

    /// As [`Reserved::as_ptr`].
    pub fn as_ptr(&mut self) -> *mut u8 {
        self.0.as_ptr()
    }

    /// Sends it and answers with its number.
    ///
    /// # Errors
    /// As for [`Reserved::commit`].
    pub fn send(self) -> Result<u64, ZeroBufferError> {
        self.0.commit()
    }
}

/// A response, in the ring; its bytes go back to the server when it is dropped.
#[derive(Debug)]
pub struct Response {
    sequence: u64,
    frame: Frame,
}

impl Response {
    /// Number of the request that it answers.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The frame that holds it.
    pub fn frame(&self) -> &Frame {
        &self.frame
    }

    /// Bytes, at least 1.
    pub fn len(&self) -> u64 {
        self.frame.len()
    }

    /// Never: version 1 has no empty frames.
    pub fn is_empty(&self) -> bool {
        self.frame.is_empty()
    }

    /// Copies `out.len()` bytes at `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within it.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        self.frame.read(offset, out)
    }

    /// A copy of all of it.
    pub fn to_vec(&self) -> Vec<u8> {
        self.frame.to_vec()
    }
}
