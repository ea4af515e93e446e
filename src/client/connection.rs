//! A blocking connection to a node's control socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::ClientError;
use super::variables::VariablesLink;
use crate::limits;
use crate::sys::net::{self, Blocking};
use crate::wire::control::{self, CONTROL_VERSION, NodeStatus, Request, Response, Terms};

/// How long one request may take before the connection counts as broken.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// A connection to a node's control socket: one request, one answer, in order.
///
/// Memory: the longest answer received so far.
#[derive(Debug)]
pub struct Node {
    socket: OwnedFd,
    name: String,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// An answer with what came along.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    pub(super) fds: Vec<OwnedFd>,
}

impl Node {
    /// The socket that `uffd-sync serve` makes when it is told no other:
    /// `$XDG_RUNTIME_DIR/uffd-sync/node.sock`, else `/run/uffd-sync/node.sock`.
    pub fn default_socket() -> PathBuf {
        let base = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
        base.map_or_else(|| PathBuf::from("/run"), PathBuf::from)
            .join("uffd-sync/node.sock")
    }

    /// Connects to the node that serves the socket at `path`.
    ///
    /// # Errors
    /// If nothing serves it, if it is no socket, or if the node speaks another version.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let socket = net::unix_connect(path).map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::from_socket(socket)
    }

    /// Speaks over a connected stream socket, as an embedded engine hands it out.
    ///
    /// # Errors
    /// If the other end does not answer as a node of this version.
    pub fn from_socket(socket: OwnedFd) -> Result<Self, ClientError> {
        net::set_timeouts(&socket, Some(ANSWER_DEADLINE), Some(ANSWER_DEADLINE))?;
        let mut node = Self {
            socket,
            name: String::new(),
            buffer: Vec::new(),
            fds: Vec::new(),
        };
        match node
            .request(
                &Request::Hello {
                    version: CONTROL_VERSION,
                },
                &[],
                &[],
            )?
            .response
        {
            Response::Welcome { node: name, .. } => node.name = name,
            other => return Err(ClientError::unexpected("hello", &other)),
        }
        Ok(node)
    }

    /// Says goodbye and waits until the node has taken notice, for `deadline` at most:
    /// what this connection stood for is over then.
    pub(super) fn leave(self, deadline: Duration) {
        let end = Instant::now() + deadline;
        if net::end_sending(&self.socket).is_err() {
            return;
        }
        let mut rest = [0; 64];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let there = net::wait_readable(&[self.socket.as_fd()], Some(left));
            if left.is_zero() || !there.is_ok_and(|there| there) {
                return;
            }
            // Nothing comes any more but the end.
            match net::recv_with_fds(&self.socket, &mut rest, 1, Blocking::No) {
                Ok(received) if received.bytes > 0 => {}
                _ => return,
            }
        }
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's whole state.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn status(&mut self) -> Result<NodeStatus, ClientError> {
        match self.request(&Request::Status, &[], &[])?.response {
            Response::Status(status) => Ok(*status),
            other => Err(ClientError::unexpected("status", &other)),
        }
    }

    /// Makes a region of `size` bytes whose memory the node holds and writes;
    /// it lives as long as the node.
    ///
    /// # Errors
    /// If the name is taken or the size is out of range.
    pub fn create_held(&mut self, name: &str, size: u64, shared: bool) -> Result<(), ClientError> {
        self.create_held_with_room(name, size, size, shared)
    }

    /// The same for a region that [`Node::grow_held`] may give up to `max_size` bytes.
    ///
    /// # Errors
    /// As for [`Node::create_held`], and if `max_size` is less than `size`.
    pub fn create_held_with_room(
        &mut self,
        name: &str,
        size: u64,
        max_size: u64,
        shared: bool,
    ) -> Result<(), ClientError> {
        let request = Request::RegionCreate {
            name: name.to_owned(),
            size,
            max_size: (max_size != size).then_some(max_size),
            shared,
            cooperative: None,
        };
        self.expect_done("region create", &request, &[], &[])
    }

    /// Makes a cooperative region of `size` bytes, which programs write by
    /// [`Writer::attach`](super::Writer::attach); nobody does yet.
    ///
    /// # Errors
    /// If the name is taken, the size is out of range, or this kernel cannot track in
    /// that mode.
    pub fn create_cooperative(
        &mut self,
        name: &str,
        size: u64,
        shared: bool,
        terms: Terms,
    ) -> Result<(), ClientError> {
        let request = Request::RegionCreate {
            name: name.to_owned(),
            size,
            max_size: None,
            shared,
            cooperative: Some(terms),
        };
        self.expect_done("region create", &request, &[], &[])
    }

    /// Lengthens a region that the node holds to `size` bytes, as one epoch; what is new
    /// is zero.
    ///
    /// # Errors
    /// If there is no such region, the node does not hold it, or `size` is less than it
    /// has or more than it was made with room for.
    pub fn grow_held(&mut self, name: &str, size: u64) -> Result<(), ClientError> {
        let request = Request::RegionGrow {
            name: name.to_owned(),
            size,
        };
        self.expect_done("region grow", &request, &[], &[])
    }

    /// Writes `bytes` at `offset` of a region that the node holds. Pieces of up to
    /// 1 MiB are each one epoch; a longer write is several.
    ///
    /// # Errors
    /// If there is no such region, the node does not hold it, or the range lies beyond its end.
    pub fn write_held(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), ClientError> {
        let mut at = offset;
        for piece in bytes.chunks(limits::MAX_CONTROL_PAYLOAD as usize) {
            let request = Request::RegionWrite {
                name: name.to_owned(),
                offset: at,
            };
            self.expect_done("region write", &request, piece, &[])?;
            at = at.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Ends a region on this node.
    ///
    /// # Errors
    /// If there is none, or it belongs to another user, or its writer is alive.
    pub fn remove(&mut self, name: &str) -> Result<(), ClientError> {
        let request = Request::RegionRemove {
            name: name.to_owned(),
        };
        self.expect_done("region remove", &request, &[], &[])
    }

    /// Makes an epoch of the region `name` that is one exact instant between this call
    /// and its return, without help from its writer, and says its number. If nothing
    /// was stored since the last epoch, and that is a cut, it is that one.
    ///
    /// # Errors
    /// If there is no such region, it is not tracked in mode `sync`, or no cut could be
    /// made in time.
    pub fn cut(&mut self, name: &str) -> Result<u64, ClientError> {
        let request = Request::Cut {
            name: name.to_owned(),
        };
        match self.request(&request, &[], &[])?.response {
            Response::Cut { epoch } => Ok(epoch),
            other => Err(ClientError::unexpected("cut", &other)),
        }
    }

    /// Follows the first `size` bytes of an open file by comparing them.
    ///
    /// # Errors
    /// If the name is taken or the descriptor is no regular file.
    pub fn track_file(
        &mut self,
        name: &str,
        file: impl AsFd,
        size: u64,
        shared: bool,
    ) -> Result<(), ClientError> {
        let request = Request::TrackFile {
            name: name.to_owned(),
            size,
            shared,
        };
        self.expect_done("region track", &request, &[], &[file.as_fd()])
    }

    /// Follows a region of another node: `tcp://HOST:PORT/REGION[=LOCAL]`.
    ///
    /// # Errors
    /// If the source cannot be read or the local name is taken.
    pub fn follow(&mut self, source: &str) -> Result<(), ClientError> {
        let request = Request::Follow {
            source: source.to_owned(),
        };
        self.expect_done("follow", &request, &[], &[])
    }

    /// Ends a replica and stops following its source.
    ///
    /// # Errors
    /// If there is no such replica.
    pub fn unfollow(&mut self, name: &str) -> Result<(), ClientError> {
        let request = Request::Unfollow {
            name: name.to_owned(),
        };
        self.expect_done("unfollow", &request, &[], &[])
    }

    /// Speaks of the node's ordered variables over this connection from now on.
    ///
    /// # Errors
    /// If the node has none, or serves too many who ask for them.
    pub fn into_variables(mut self) -> Result<VariablesLink, ClientError> {
        self.expect_done("variables", &Request::Variables, &[], &[])?;
        Ok(VariablesLink::new(self.socket, self.buffer))
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn expect_done(
        &mut self,
        what: &'static str,
        request: &Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        match self.request(request, payload, fds)?.response {
            Response::Done => Ok(()),
            other => Err(ClientError::unexpected(what, &other)),
        }
    }

    /// Sends one request and waits for its answer; a refusal is an error.
    pub(super) fn request(
        &mut self,
        request: &Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, ClientError> {
        let bytes = control::encode(request, payload)?;
        let mut sent = 0;
        while sent < bytes.len() {
            // Descriptors go with the first byte of the message.
            let fds = if sent == 0 { fds } else { &[] };
            sent += net::send_with_fds(&self.socket, &bytes[sent..], fds)?;
        }
        loop {
            let message = control::decode(&mut self.buffer, limits::MAX_CONTROL_ANSWER)?;
            if let Some(message) = message {
                let fds = std::mem::take(&mut self.fds);
                return match message.body {
                    Response::Refused { code, message } => {
                        Err(ClientError::Refused { code, message })
                    }
                    response => Ok(Answer { response, fds }),
                };
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> Result<(), ClientError> {
        let mut piece = [0; 16 * 1024];
        let max_fds = limits::MAX_CONTROL_FDS as usize;
        let received = net::recv_with_fds(&self.socket, &mut piece, max_fds, Blocking::Yes)?;
        if received.bytes == 0 {
            return Err(ClientError::Closed);
        }
        if received.truncated || self.fds.len() + received.fds.len() > max_fds {
            return Err(ClientError::Descriptors { expected: max_fds });
        }
        self.fds.extend(received.fds);
        self.buffer.extend_from_slice(&piece[..received.bytes]);
        Ok(())
    }
}
