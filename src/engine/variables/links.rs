//! The connections of one process: made, greeted, heard, and made again.
//!
//! ```text
//!  dial (the greater number) --> hello both ways --> frames --> lost --> dial after a pause
//!  accept (the smaller one)  -->
//! ```
//!
//! - I1: a connection belongs to nobody before its hello was checked; there are at most
//!   [`limits::MAX_HALF_OPEN`] such ones, each for [`limits::HANDSHAKE_DEADLINE_MS`].
//! - I2: a peer has one connection: a checked hello takes the place of an older one.
//! - I3: a peer that says nothing for [`limits::PEER_DEADLINE_MS`] has lost its connection;
//!   everybody says something each [`limits::PING_INTERVAL_MS`].
//! - I4: a frame that cannot be read or is refused ends its connection and nothing else.

use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::commands::Command;
use super::config::Address;
use super::notes::{self, Front, Note};
use super::run::{Loop, Token, said};
use super::status::LinkStatus;
use crate::engine::keys::Key;
use crate::limits;
use crate::ordered::{Event, FRAME_HEADER_BYTES, Frame, FrameHeader, Process, ProcessId, Refusal};
use crate::sys::buffer::Buffer;
use crate::sys::ring::{Completion, Op, SendBuf};
use crate::sys::{SysError, net};

/// Bytes that one receive takes; more than the longest frame and note.
const RECEIVE_BYTES: usize = 128 * 1024;
const _: () = assert!(
    limits::MAX_VARIABLE_NOTE + notes::PREFIX_BYTES as u64 <= RECEIVE_BYTES as u64,
    "a note is received whole"
);
/// How long one attempt to connect may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// How long what was refused is given to be read by the other side.
const FAREWELL: Duration = Duration::from_millis(500);

/// Another process.
pub(super) struct Peer {
    address: Option<Address>,
    pub(super) connection: Option<Key>,
    /// When to dial; none where the other side dials, or a connection is there.
    dial_at: Option<Instant>,
    /// Whether this side dials.
    dials: bool,
    dialling: bool,
    attempts: u32,
    connections: u64,
    trouble: Option<String>,
}

impl Peer {
    pub(super) fn new(address: Option<Address>, dial_at: Option<Instant>) -> Self {
        Self {
            address,
            connection: None,
            dial_at,
            dials: dial_at.is_some(),
            dialling: false,
            attempts: 0,
            connections: 0,
            trouble: None,
        }
    }

    pub(super) fn dial_soon(&mut self, now: Instant) {
        self.attempts = 0;
        if self.dials && self.connection.is_none() && !self.dialling {
            self.dial_at = Some(now);
        }
    }
}

/// One connected socket.
pub(super) struct Connection {
    socket: Arc<OwnedFd>,
    /// Whom it leads to, once that is known.
    peer: Option<ProcessId>,
    /// Whether the other side's hello was taken.
    greeted: bool,
    /// What was received and not looked at; none while the kernel has it.
    received: Option<Buffer>,
    out: Vec<u8>,
    sending: bool,
    opened: Instant,
    pub(super) heard: Instant,
    pinged: Instant,
    /// Set once it is only to be flushed.
    closing_at: Option<Instant>,
}

/// Listens where this process is reached.
pub(super) fn listen(address: &Address) -> Result<OwnedFd, super::StartError> {
    let failed = |source: SysError| super::StartError::Listen {
        address: address.clone(),
        source,
    };
    match address {
        Address::Unix(path) => net::unix_listen(path).map_err(failed),
        Address::Tcp(host, port) => {
            let found = (host.as_str(), *port).to_socket_addrs();
            let found = found
                .map_err(|error| failed(SysError::new("resolving the address", error)))?
                .next();
            let none = || SysError::os("resolving the address", nix::libc::EADDRNOTAVAIL);
            let address = found.ok_or_else(|| failed(none()))?;
            net::tcp_listen(address).map_err(failed)
        }
    }
}

/// Connects, waiting for no longer than a few seconds.
fn connect(address: &Address) -> Result<OwnedFd, String> {
    match address {
        Address::Unix(path) => net::unix_connect(path).map_err(|error| error.to_string()),
        Address::Tcp(host, port) => {
            let found = (host.as_str(), *port).to_socket_addrs();
            let mut last = "the host has no address".to_owned();
            for address in found.map_err(|error| error.to_string())? {
                match TcpStream::connect_timeout(&address, CONNECT_DEADLINE) {
                    Ok(stream) => return Ok(stream.into()),
                    Err(error) => last = error.to_string(),
                }
            }
            Err(last)
        }
    }
}

impl Loop {
    /// Dials, pings, and ends what has been silent for too long.
    pub(super) fn look_after_links(&mut self) {
        let due: Vec<_> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.dial_at.is_some_and(|at| at <= self.now))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.dial(id);
        }
        let silence = Duration::from_millis(limits::PEER_DEADLINE_MS);
        let handshake = Duration::from_millis(limits::HANDSHAKE_DEADLINE_MS);
        let interval = Duration::from_millis(limits::PING_INTERVAL_MS);
        for key in self.connections.keys() {
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            let since = |at: Instant| self.now.saturating_duration_since(at);
            if connection.closing_at.is_some_and(|at| at <= self.now) {
                self.close(key, "refused");
            } else if connection.closing_at.is_some() {
                // What it was told is on its way.
            } else if !connection.greeted && since(connection.opened) > handshake {
                self.close(key, "no hello in time");
            } else if connection.greeted && !self.stalled && since(connection.heard) > silence {
                self.close(key, "silent");
            } else if connection.greeted && since(connection.pinged) >= interval {
                connection.pinged = self.now;
                if connection.out.is_empty() && !connection.sending {
                    connection.out.extend(notes::ping());
                    self.unsent.push(key);
                }
            }
        }
    }

    fn dial(&mut self, id: ProcessId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        peer.dial_at = None;
        let (Some(address), false) = (peer.address.clone(), peer.dialling) else {
            return;
        };
        if peer.connection.is_some() || self.process.is_none() {
            return;
        }
        let commands = self.commands.clone();
        let body = move || {
            let outcome = connect(&address);
            // A loop that has ended takes nothing any more, and needs nothing.
            commands.send(Command::Dialled(id, outcome), CONNECT_DEADLINE);
        };
        let thread = std::thread::Builder::new().name("variables-dial".into());
        match thread.spawn(body) {
            Ok(_) => peer.dialling = true,
            Err(error) => self.dial_later(id, error.to_string()),
        }
    }

    /// Plans the next attempt: pauses double up to the longest.
    fn dial_later(&mut self, id: ProcessId, trouble: String) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        tracing::debug!(peer = %id, trouble, "not connected");
        peer.trouble = Some(trouble);
        if !peer.dials || peer.dialling {
            return;
        }
        let doubled = limits::RECONNECT_MIN_MS << peer.attempts.min(16);
        let pause = doubled.min(limits::RECONNECT_MAX_MS);
        peer.attempts = peer.attempts.saturating_add(1);
        peer.dial_at = Some(self.now + Duration::from_millis(pause));
    }

    pub(super) fn dialled(&mut self, id: ProcessId, outcome: Result<OwnedFd, String>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        peer.dialling = false;
        if self.process.is_none() || peer.connection.is_some() {
            return;
        }
        match outcome {
            Err(trouble) => self.dial_later(id, trouble),
            Ok(socket) => {
                let key = self.connected(socket);
                self.belongs_to(key, id);
                self.receive_next(key);
            }
        }
    }

    pub(super) fn accepted(&mut self, socket: OwnedFd) {
        let half_open = self.connections.iter().filter(|(_, one)| !one.greeted);
        let too_many = half_open.count() as u64 >= limits::MAX_HALF_OPEN;
        if too_many || self.process.is_none() {
            tracing::debug!(too_many, "connection refused");
            return;
        }
        let key = self.connected(socket);
        self.receive_next(key);
    }

    fn connected(&mut self, socket: OwnedFd) -> Key {
        // A Unix socket has no delay to switch off.
        let _ = net::set_nodelay(&socket);
        self.connections.insert(Connection {
            socket: Arc::new(socket),
            peer: None,
            greeted: false,
            received: Some(Buffer::Heap(Vec::with_capacity(RECEIVE_BYTES))),
            out: Vec::new(),
            sending: false,
            opened: self.now,
            heard: self.now,
            pinged: self.now,
            closing_at: None,
        })
    }

    /// From now on this connection is the one of `id`.
    fn belongs_to(&mut self, key: Key, id: ProcessId) {
        if let Some(peer) = self.peers.get_mut(&id) {
            let older = peer.connection.replace(key);
            peer.dial_at = None;
            peer.connections += 1;
            if let Some(older) = older {
                self.drop_connection(older);
                self.step(Event::LinkDown { peer: id });
            }
        }
        if let Some(connection) = self.connections.get_mut(key) {
            connection.peer = Some(id);
        }
        self.step(Event::LinkUp { peer: id });
    }

    /// Queues a frame for the connection of `peer`.
    pub(super) fn queue(&mut self, peer: ProcessId, frame: &Frame) {
        let Some(key) = self.peers.get(&peer).and_then(|peer| peer.connection) else {
            return;
        };
        if let Some(connection) = self.connections.get_mut(key) {
            if connection.out.is_empty() {
                self.unsent.push(key);
            }
            frame.encode(&mut connection.out);
            if connection.out.len() > self.most_unsent {
                tracing::warn!(%peer, "it tells receipts, and takes nothing of what is sent");
                self.close(key, "it takes nothing of what is sent");
            }
        }
    }

    /// Hands what is queued to the kernel, one send at a time per connection.
    pub(super) fn flush(&mut self) {
        let mut unsent = std::mem::take(&mut self.unsent);
        for key in unsent.drain(..) {
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            if connection.sending || connection.out.is_empty() {
                continue;
            }
            connection.sending = true;
            let op = Op::Send {
                socket: Arc::clone(&connection.socket),
                buf: SendBuf::Owned(std::mem::take(&mut connection.out)),
                from: 0,
            };
            self.submit_send(key, op);
        }
        self.unsent = unsent;
    }

    fn submit_send(&mut self, key: Key, op: Op) {
        if let Err(error) = self.ring.submit(Token::Send(key).to_bits(), op) {
            self.close(key, &error.to_string());
        }
    }

    pub(super) fn sent(&mut self, key: Key, completion: Completion) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let Op::Send {
            socket,
            mut buf,
            from,
        } = completion.op
        else {
            return;
        };
        let count = match completion.result {
            Ok(count) => count as usize,
            Err(error) if error.raw_os_error() == Some(nix::libc::EINTR) => 0,
            Err(error) => return self.close(key, &error.to_string()),
        };
        connection.pinged = self.now;
        let from = from + count;
        if from < buf.as_ref().len() {
            return self.submit_send(key, Op::Send { socket, buf, from });
        }
        connection.sending = false;
        if !connection.out.is_empty() {
            self.unsent.push(key);
        } else if let SendBuf::Owned(bytes) = &mut buf {
            // Its memory serves the next frames.
            bytes.clear();
            connection.out = std::mem::take(bytes);
        }
    }

    /// Asks for more, unless nothing is taken for now.
    pub(super) fn receive_next(&mut self, key: Key) {
        if self.stalled {
            return;
        }
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let Some(buf) = connection.received.take() else {
            return;
        };
        let op = Op::Recv {
            socket: Arc::clone(&connection.socket),
            upto: buf.capacity(),
            buf,
        };
        if let Err(error) = self.ring.submit(Token::Recv(key).to_bits(), op) {
            self.close(key, &error.to_string());
        }
    }

    pub(super) fn received(&mut self, key: Key, completion: Completion) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let Op::Recv { buf, .. } = completion.op else {
            return;
        };
        connection.received = Some(buf);
        match completion.result {
            Ok(0) => return self.close(key, "the other side closed it"),
            Ok(_) => connection.heard = self.now,
            Err(error) if error.raw_os_error() == Some(nix::libc::EINTR) => {}
            Err(error) => return self.close(key, &error.to_string()),
        }
        self.frames_of(key);
        self.receive_next(key);
    }

    /// Takes every whole frame out of what was received.
    pub(super) fn frames_of(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let Some(mut buffer) = connection.received.take() else {
            return;
        };
        let mut at = 0;
        while !self.stalled {
            match self.take_front(key, &buffer[at..]) {
                Ok(0) => break,
                Ok(taken) => at += taken,
                Err(reason) => {
                    self.close(key, &reason);
                    break;
                }
            }
        }
        buffer.drain_front(at);
        if let Some(connection) = self.connections.get_mut(key) {
            connection.received = Some(buffer);
        }
    }

    /// Takes one frame or note; says how many bytes it took, 0 if it is not whole yet.
    fn take_front(&mut self, key: Key, bytes: &[u8]) -> Result<usize, String> {
        let Some(connection) = self.connections.get(key) else {
            return Ok(0);
        };
        let greeted = connection.greeted;
        match notes::front(bytes) {
            Front::Unfinished => return Ok(0),
            Front::Broken => return Err("not a frame".to_owned()),
            Front::Ping(len) if greeted => return Ok(len),
            Front::Ping(_) => return Err("a ping before the hello".to_owned()),
            Front::Note(note, len) => {
                self.note(key, &note)?;
                return Ok(len);
            }
            Front::Frame => {}
        }
        let Some((header, rest)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return Ok(0);
        };
        let header = FrameHeader::parse(header).map_err(|error| error.to_string())?;
        let Some(body) = rest.get(..header.body_len()) else {
            return Ok(0);
        };
        let frame = Frame::decode(&header, body).map_err(|error| error.to_string())?;
        self.frame(key, frame)?;
        Ok(FRAME_HEADER_BYTES + header.body_len())
    }

    fn frame(&mut self, key: Key, frame: Frame) -> Result<(), String> {
        let Some(connection) = self.connections.get(key) else {
            return Ok(());
        };
        if connection.closing_at.is_some() {
            return Ok(());
        }
        let from = match (&frame, connection.peer) {
            (_, Some(peer)) => peer,
            (Frame::Hello(hello), None) => {
                let from = hello.process;
                if let Err(refusal) = self
                    .process
                    .as_ref()
                    .map_or(Ok(()), |process: &Process| process.check_hello(hello))
                {
                    self.say_refusal(key, refusal);
                    return Ok(());
                }
                self.belongs_to(key, from);
                from
            }
            _ => return Err("something before the hello".to_owned()),
        };
        let hello = matches!(frame, Frame::Hello(_));
        self.step(Event::Frame { peer: from, frame });
        if hello
            && let Some(connection) = self.connections.get_mut(key)
            && connection.closing_at.is_none()
        {
            connection.greeted = true;
            if let Some(peer) = self.peers.get_mut(&from) {
                peer.attempts = 0;
                peer.trouble = None;
            }
            tracing::info!(peer = %from, "linked");
        }
        Ok(())
    }

    /// The process refused what came over the connection of `peer`.
    pub(super) fn refuse(&mut self, peer: ProcessId, reason: Refusal) {
        let Some(key) = self.peers.get(&peer).and_then(|peer| peer.connection) else {
            return;
        };
        self.say_refusal(key, reason);
    }

    /// Tells the other side why, and closes once it was sent.
    fn say_refusal(&mut self, key: Key, reason: Refusal) {
        let text = reason.to_string();
        let note = Note::new(&self.config, self.session, text.clone());
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        tracing::warn!(peer = ?connection.peer, reason = text, "connection refused");
        connection.out.extend(note.encode());
        connection.greeted = false;
        connection.closing_at = Some(self.now + FAREWELL);
        self.unsent.push(key);
        if let Some(id) = connection.peer {
            self.forget(key, id, text);
        }
    }

    /// The other side says why it does not go on. What differs is told it in turn, if
    /// this side has not spoken yet.
    fn note(&mut self, key: Key, note: &Note) -> Result<(), String> {
        let from = ProcessId(note.process);
        // It is shown on terminals.
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        let reason: String = note.reason.chars().take(500).map(plain).collect();
        let difference = note.difference(&self.config, self.session);
        let text = match &difference {
            Some(difference) => format!("{reason}: {difference}"),
            None => reason,
        };
        tracing::warn!(peer = %from, reason = text, "refused by the other side");
        let Some(connection) = self.connections.get_mut(key) else {
            return Ok(());
        };
        let known = connection.peer.unwrap_or(from);
        if connection.closing_at.is_none() && difference.is_some() {
            let words = format!("process {} was told so", self.config.process);
            let note = Note::new(&self.config, self.session, words);
            connection.out.extend(note.encode());
            connection.greeted = false;
            connection.closing_at = Some(self.now + FAREWELL);
            self.unsent.push(key);
            if let Some(id) = connection.peer {
                self.forget(key, id, text);
            }
            return Ok(());
        }
        if let Some(peer) = self.peers.get_mut(&known) {
            peer.trouble = Some(text.clone());
        }
        Err(text)
    }

    /// The connection is not the one of `id` any more.
    fn forget(&mut self, key: Key, id: ProcessId, trouble: String) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if peer.connection != Some(key) {
            return;
        }
        peer.connection = None;
        self.step(Event::LinkDown { peer: id });
        self.dial_later(id, trouble);
    }

    /// Ends a connection; its peer is dialled again.
    pub(super) fn close(&mut self, key: Key, reason: &str) {
        let greeted = self.connections.get(key).is_some_and(|one| one.greeted);
        let Some(peer) = self.drop_connection(key) else {
            return;
        };
        if greeted {
            tracing::info!(%peer, reason, "link lost");
        } else {
            tracing::debug!(%peer, reason, "connection ended");
        }
        self.forget(key, peer, reason.to_owned());
    }

    /// Takes a connection out of the table, whoever it belongs to.
    fn drop_connection(&mut self, key: Key) -> Option<ProcessId> {
        let connection = self.connections.remove(key)?;
        self.ring.cancel(Token::Recv(key).to_bits());
        self.ring.cancel(Token::Send(key).to_bits());
        // It may be at its end already.
        let _ = net::shutdown(&*connection.socket);
        connection.peer
    }

    pub(super) fn link_states(&self) -> Vec<LinkStatus> {
        let of = |(id, peer): (&ProcessId, &Peer)| {
            let greeted = peer
                .connection
                .and_then(|key| self.connections.get(key))
                .map(|connection| connection.greeted);
            let state = match greeted {
                Some(true) => "linked",
                Some(false) => "greeting",
                None if peer.dialling || peer.dial_at.is_some() => "dialling",
                None => "away",
            };
            LinkStatus {
                process: id.0,
                address: said(peer.address.as_ref()),
                state: state.to_owned(),
                connections: peer.connections,
                trouble: peer.trouble.clone().filter(|_| greeted != Some(true)),
            }
        };
        self.peers.iter().map(of).collect()
    }
}
