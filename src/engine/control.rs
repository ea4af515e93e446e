//! Connections on the control socket: bytes and descriptors in, answers out.
//!
//! I1. A connection whose answer is not yet taken is not read from: a client that
//!     does not read costs one answer.
//! I2. What is buffered is at most one request and one read; descriptors that no
//!     request claims are closed with the connection.
//! I3. A connection that asks for much at once gets one slice of a turn, like a region.
//! I4. What a connection stands for ends with it: a reader's attachment, a writer's link.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::keys::Key;
use super::requests::{Call, Reply};
use super::{Engine, EngineError, Token};
use crate::limits;
use crate::sys::net::{self, Blocking, PeerCredentials};
use crate::sys::ring::{Completion, Op};
use crate::wire::control::{self, ControlError, RefusalCode, Request, Response};

/// Reads taken in one turn, so that a client that never stops sending holds nobody up.
const READS_PER_TURN: usize = 32;

/// One client of the control socket.
#[derive(Debug)]
pub(super) struct ControlConnection {
    socket: Arc<OwnedFd>,
    peer: PeerCredentials,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
    out: VecDeque<Outgoing>,
    /// Whether requests may be in the buffer that were left for the next turn.
    waiting: bool,
    /// Whether a request of it is answered later.
    deferred: bool,
    /// Regions that it reads.
    pub(super) reads: Vec<Key>,
    /// Regions that it handed over.
    pub(super) writes: Vec<Key>,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Engine {
    pub(super) fn accepted_control(&mut self, completion: Completion) -> Result<(), EngineError> {
        match completion.accepted {
            Some(socket) => self.adopt_control(socket),
            None => {
                if let Err(error) = completion.result {
                    self.accept_later(Token::UnixAccept, &error);
                    return Ok(());
                }
            }
        }
        Ok(self.accept_next(Token::UnixAccept)?)
    }

    /// Serves a connected stream socket from now on.
    pub(super) fn adopt_control(&mut self, socket: OwnedFd) {
        if self.controls.len() + self.peers.len() >= limits::MAX_CONNECTIONS as usize {
            tracing::warn!(
                limit = limits::MAX_CONNECTIONS,
                "connection refused: too many"
            );
            return;
        }
        let peer = match net::peer_credentials(&socket) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(%error, "connection refused: no credentials");
                return;
            }
        };
        let connection = ControlConnection {
            socket: Arc::new(socket),
            peer,
            buffer: Vec::new(),
            fds: Vec::new(),
            out: VecDeque::new(),
            waiting: false,
            deferred: false,
            reads: Vec::new(),
            writes: Vec::new(),
        };
        let key = self.controls.insert(connection);
        self.await_control(key);
    }

    fn await_control(&mut self, key: Key) {
        let Some(connection) = self.controls.get(key) else {
            return;
        };
        if connection.deferred {
            return;
        }
        let writable = !connection.out.is_empty() || connection.waiting;
        let token = if writable {
            Token::ControlWritable(key)
        } else {
            Token::Control(key)
        };
        let op = Op::Poll {
            fd: Arc::clone(&connection.socket),
            writable,
        };
        if let Err(error) = self.ring.submit(token.to_bits(), op) {
            tracing::error!(%error, "control connection dropped");
            self.close_control(key);
        }
    }

    pub(super) fn control_readable(&mut self, key: Key) {
        for _ in 0..READS_PER_TURN {
            match self.read_control(key) {
                Read::More => {}
                Read::Enough => break,
                Read::Closed => {
                    self.close_control(key);
                    return;
                }
            }
            if self.is_late() {
                break;
            }
        }
        self.await_control(key);
    }

    fn read_control(&mut self, key: Key) -> Read {
        let Some(connection) = self.controls.get_mut(key) else {
            return Read::Closed;
        };
        if !connection.out.is_empty() || connection.waiting {
            return Read::Enough;
        }
        let mut piece = vec![0; 64 * 1024];
        let max_fds = limits::MAX_CONTROL_FDS as usize;
        let received =
            match net::recv_with_fds(&*connection.socket, &mut piece, max_fds, Blocking::No) {
                Ok(received) => received,
                Err(error) if error.source.kind() == std::io::ErrorKind::WouldBlock => {
                    return Read::Enough;
                }
                Err(error) => {
                    tracing::debug!(%error, "control connection lost");
                    return Read::Closed;
                }
            };
        if received.bytes == 0 {
            return Read::Closed;
        }
        if received.truncated || connection.fds.len() + received.fds.len() > max_fds {
            tracing::warn!(
                pid = connection.peer.pid,
                limit = max_fds,
                "too many descriptors sent"
            );
            return Read::Closed;
        }
        connection.fds.extend(received.fds);
        connection
            .buffer
            .extend_from_slice(&piece[..received.bytes]);
        self.serve_requests(key)
    }

    fn serve_requests(&mut self, key: Key) -> Read {
        let mut served = 0;
        loop {
            let late = served > 0 && self.is_late();
            let Some(connection) = self.controls.get_mut(key) else {
                return Read::Closed;
            };
            connection.waiting = late;
            if connection.deferred || late || !connection.out.is_empty() {
                return Read::Enough;
            }
            served += 1;
            let decoded =
                control::decode::<Request>(&mut connection.buffer, limits::MAX_CONTROL_REQUEST);
            let reply = match decoded {
                Ok(None) => return Read::More,
                Ok(Some(message)) if message.body == Request::Variables => {
                    match self.hand_to_variables(key) {
                        Ok(()) => return Read::Closed,
                        Err(reply) => reply,
                    }
                }
                Ok(Some(message)) => {
                    let call = Call {
                        connection: key,
                        peer: connection.peer,
                        payload: message.payload,
                        fds: std::mem::take(&mut connection.fds),
                    };
                    match self.handle(message.body, call) {
                        Some(reply) => reply,
                        None => {
                            if let Some(connection) = self.controls.get_mut(key) {
                                connection.deferred = true;
                            }
                            return Read::Enough;
                        }
                    }
                }
                Err(ControlError::Json(error)) => Reply::refused(
                    RefusalCode::Invalid,
                    format!("the request cannot be read: {error}"),
                ),
                Err(error) => {
                    tracing::warn!(pid = connection.peer.pid, %error, "control connection closed");
                    return Read::Closed;
                }
            };
            if !self.answer(key, reply) {
                return Read::Closed;
            }
        }
    }

    /// Gives the connection away to those who serve ordered variables.
    fn hand_to_variables(&self, key: Key) -> Result<(), Reply> {
        let refused = |code, message: &str| Reply::refused(code, message.to_owned());
        let Some(door) = &self.settings.variables else {
            return Err(refused(
                RefusalCode::NotFound,
                "this node has no variables: its file has no table [variables]; \
                 `uffd-sync var init` prints one",
            ));
        };
        let socket = self.controls.get(key).map(|connection| &connection.socket);
        let socket = socket.and_then(|socket| socket.try_clone().ok());
        let taken = socket.is_some_and(|socket| door.try_send(socket).is_ok());
        if taken {
            return Ok(());
        }
        Err(refused(
            RefusalCode::Limit,
            "too many connections ask for variables at once; try again",
        ))
    }

    /// Queues one answer and sends what the socket takes at once.
    fn answer(&mut self, key: Key, reply: Reply) -> bool {
        let bytes = control::encode(&reply.response, &[]).or_else(|error| {
            let message = format!("the answer cannot be sent: {error}");
            control::encode(
                &Response::Refused {
                    code: RefusalCode::Failed,
                    message,
                },
                &[],
            )
        });
        let (Some(connection), Ok(bytes)) = (self.controls.get_mut(key), bytes) else {
            return false;
        };
        connection.out.push_back(Outgoing {
            bytes,
            sent: 0,
            fds: reply.fds,
        });
        connection.flush()
    }

    /// Answers a request that was put off, and goes on reading.
    pub(super) fn answer_later(&mut self, key: Key, reply: Reply) {
        let Some(connection) = self.controls.get_mut(key) else {
            return;
        };
        connection.deferred = false;
        // What came behind the request is looked at in a turn of its own.
        connection.waiting = true;
        if self.answer(key, reply) {
            self.await_control(key);
        } else {
            self.close_control(key);
        }
    }

    pub(super) fn control_writable(&mut self, key: Key) {
        let Some(connection) = self.controls.get_mut(key) else {
            return;
        };
        if !connection.flush() {
            self.close_control(key);
            return;
        }
        if connection.out.is_empty() {
            // What was read before the answer stalled may hold whole requests.
            if matches!(self.serve_requests(key), Read::Closed) {
                self.close_control(key);
                return;
            }
        }
        self.await_control(key);
    }

    fn close_control(&mut self, key: Key) {
        let Some(connection) = self.controls.remove(key) else {
            return;
        };
        self.forget_cuts(key);
        for region in connection.reads {
            self.forget_reader(region, key);
        }
        for region in connection.writes {
            self.link_ended(region, key);
        }
    }
}

enum Read {
    More,
    Enough,
    Closed,
}

impl ControlConnection {
    /// Sends what the socket takes; false if the connection is of no more use.
    fn flush(&mut self) -> bool {
        while let Some(outgoing) = self.out.front_mut() {
            let fds: Vec<_> = match outgoing.sent {
                0 => outgoing.fds.iter().map(AsFd::as_fd).collect(),
                _ => Vec::new(),
            };
            let rest = &outgoing.bytes[outgoing.sent..];
            match net::try_send_with_fds(&*self.socket, rest, &fds) {
                Ok(sent) => {
                    outgoing.sent += sent;
                    if outgoing.sent == outgoing.bytes.len() {
                        self.out.pop_front();
                    }
                }
                Err(error) if error.source.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::debug!(%error, "control connection lost while answering");
                    return false;
                }
            }
        }
        true
    }
}
