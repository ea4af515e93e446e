//! Connections to other nodes: dialled or accepted, greeted, probed, closed.
//!
//! ```text
//!  dialled:   CONNECTING -> GREETING (hello sent) -> OPEN (welcome came)
//!  accepted:                GREETING              -> OPEN (hello came, welcome sent)
//! ```
//!
//! I1. One receive and one send are in flight at most, so a stream never reorders.
//! I2. Frames are not cut from the stream while an apply is in progress: the kernel's
//!     buffers fill and the source stops, nothing is queued here.
//! I3. A connection that does not get to OPEN in time, or is silent for too long, is closed.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::framing::{FrameReader, Outbox};
use super::keys::Key;
use super::timers::Timer;
use super::{Engine, EngineError, Token};
use crate::limits;
use crate::replicate::ShipperId;
use crate::sys::buffer::{Buffer, Pool};
use crate::sys::net;
use crate::sys::ring::{Completion, Op, SendBuf};
use crate::wire::{ErrorCode, ErrorFrame, Header, Hello, Kind, Ping, VERSION, WireError};

/// Bytes that a receive brings where the sender is fast: from here on the rest of a body
/// is waited for as a whole.
const FAST: usize = 32 * 1024;

/// A connection to another node.
pub(super) struct Peer {
    pub(super) socket: Arc<OwnedFd>,
    pub(super) remote: String,
    pub(super) side: Side,
    pub(super) phase: Phase,
    pub(super) hello: Option<Hello>,
    pub(super) subscriptions: Vec<Subscription>,
    /// Frames wait until an apply is complete.
    pub(super) paused: bool,
    pub(super) reader: FrameReader,
    pub(super) outbox: Outbox,
    receiving: bool,
    /// Whether the last receive brought much.
    fast: bool,
    /// Bytes that have to be there before the kernel says so.
    least: usize,
    sending: bool,
    pub(super) closing: bool,
    /// Whole frames may be left in the reader for the next turn.
    pub(super) waiting: bool,
    heard: Instant,
    opened: Instant,
    pings: u64,
}

/// Which end this node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The other node follows regions of this one.
    Source,
    /// This node follows: the replica that the connection is for.
    Replica(Key),
}

/// How far a connection has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Connecting,
    Greeting,
    Open,
}

/// A region that the other node follows over this connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subscription {
    pub(super) number: u32,
    pub(super) handle: u32,
    pub(super) region: Key,
    pub(super) shipper: ShipperId,
}

impl Peer {
    fn new(
        (socket, remote): (OwnedFd, String),
        pool: &Pool,
        side: Side,
        phase: Phase,
        now: Instant,
    ) -> Self {
        Self {
            socket: Arc::new(socket),
            remote,
            side,
            phase,
            hello: None,
            subscriptions: Vec::new(),
            paused: false,
            reader: FrameReader::new(pool.clone()),
            outbox: Outbox::default(),
            receiving: false,
            fast: false,
            least: 1,
            sending: false,
            closing: false,
            waiting: false,
            heard: now,
            opened: now,
            pings: 0,
        }
    }

    /// Whether bulk waits although nothing is on its way.
    pub(super) fn may_send_bulk(&self) -> bool {
        !self.sending && self.phase != Phase::Connecting && self.outbox.is_bulk()
    }

    /// Whether anything still waits to be sent.
    pub(super) fn is_sending(&self) -> bool {
        self.sending || !self.outbox.is_empty()
    }
}

impl Engine {
    pub(super) fn accepted_peer(&mut self, completion: Completion) -> Result<(), EngineError> {
        if let Some(socket) = completion.accepted {
            let half_open = self
                .peers
                .iter()
                .filter(|(_, peer)| peer.side == Side::Source && peer.phase != Phase::Open)
                .count();
            let all = self.peers.len() + self.controls.len();
            let most = limits::MAX_CONNECTIONS - limits::RESERVED_CONNECTIONS;
            if all >= most as usize || half_open >= limits::MAX_HALF_OPEN as usize {
                tracing::warn!(connections = all, half_open, "follower refused: too many");
            } else {
                self.greet(socket);
            }
        } else if let Err(error) = completion.result {
            self.accept_later(Token::TcpAccept, &error);
            return Ok(());
        }
        Ok(self.accept_next(Token::TcpAccept)?)
    }

    fn greet(&mut self, socket: OwnedFd) {
        let remote = net::remote_addr(&socket).map_or_else(|_| "?".into(), |addr| addr.to_string());
        if let Err(error) = net::set_nodelay(&socket) {
            tracing::debug!(%error, remote, "small frames may wait");
        }
        let phase = Phase::Greeting;
        let peer = Peer::new((socket, remote), &self.pool, Side::Source, phase, self.now);
        let key = self.peers.insert(peer);
        self.timers.set(self.now + HANDSHAKE, Timer::Peer(key));
        self.receive(key);
    }

    /// Starts a connection for a replica.
    pub(super) fn connect_peer(
        &mut self,
        addr: SocketAddr,
        region: Key,
    ) -> Result<Key, crate::sys::SysError> {
        let socket = net::tcp_socket_for(&addr)?;
        net::set_nodelay(&socket)?;
        let side = Side::Replica(region);
        let ends = (socket, addr.to_string());
        let peer = Peer::new(ends, &self.pool, side, Phase::Connecting, self.now);
        let op = Op::Connect {
            socket: Arc::clone(&peer.socket),
            addr,
        };
        let key = self.peers.insert(peer);
        self.ring.submit(Token::PeerConnect(key).to_bits(), op)?;
        self.timers.set(self.now + HANDSHAKE, Timer::Peer(key));
        Ok(key)
    }

    pub(super) fn peer_connected(&mut self, key: Key, completion: Completion) {
        if let Err(error) = completion.result {
            self.close_peer(key, &format!("cannot connect: {error}"));
            return;
        }
        let hello = self.own_hello();
        if let Some(peer) = self.peers.get_mut(key) {
            peer.phase = Phase::Greeting;
            peer.heard = self.now;
            self.send(key, hello.encode(Kind::Hello));
            self.receive(key);
        }
    }

    pub(super) fn own_hello(&self) -> Hello {
        Hello {
            min_version: VERSION,
            max_version: VERSION,
            max_body: limits::MAX_BODY as u32,
            node: self.node_id,
            incarnation: 0,
            name: self.settings.name.clone(),
        }
    }

    /// Queues a frame and starts sending.
    pub(super) fn send(&mut self, key: Key, frame: Vec<u8>) {
        if let Some(peer) = self.peers.get_mut(key) {
            peer.outbox.push(frame);
            if peer.outbox.is_flooded() {
                self.close_peer(key, "it asks and takes no answers");
                return;
            }
            self.start_send(key);
        }
    }

    pub(super) fn start_send(&mut self, key: Key) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        if peer.sending || peer.phase == Phase::Connecting {
            return;
        }
        let Some(bufs) = peer.outbox.take() else {
            return;
        };
        self.submit_send(key, bufs, 0);
    }

    fn submit_send(&mut self, key: Key, mut bufs: Vec<SendBuf>, from: usize) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        peer.sending = true;
        let socket = Arc::clone(&peer.socket);
        let op = match (bufs.len(), bufs.pop()) {
            (1, Some(buf)) => Op::Send { socket, buf, from },
            (_, last) => {
                bufs.extend(last);
                Op::SendAll { socket, bufs, from }
            }
        };
        if let Err(error) = self.ring.submit(Token::PeerSend(key).to_bits(), op) {
            self.close_peer(key, &format!("cannot send: {error}"));
        }
    }

    /// Starts sending what waits at once, so that it goes out while more is made.
    pub(super) fn send_now(&mut self, key: Key) {
        self.start_send(key);
        if let Err(error) = self.ring.enter(Some(Duration::ZERO)) {
            tracing::error!(%error, "the ring does not take submissions");
        }
    }

    pub(super) fn peer_sent(&mut self, key: Key, completion: Completion) {
        let (bufs, from) = match completion.op {
            Op::Send { buf, from, .. } => (vec![buf], from),
            Op::SendAll { bufs, from, .. } => (bufs, from),
            _ => return,
        };
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        peer.sending = false;
        let sent = match completion.result {
            Ok(sent) => sent as usize,
            Err(error) => {
                self.close_peer(key, &format!("cannot send: {error}"));
                return;
            }
        };
        self.counters.bytes_sent += sent as u64;
        let all: usize = bufs.iter().map(|buf| buf.as_ref().len()).sum();
        if from + sent < all {
            self.submit_send(key, bufs, from + sent);
            return;
        }
        for buf in bufs {
            if let SendBuf::Owned(frame) = buf {
                self.spare.give(frame);
            }
        }
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        if peer.closing && peer.outbox.is_empty() {
            self.close_peer(key, "all is said");
            return;
        }
        let (side, bulk) = (peer.side, peer.outbox.is_bulk());
        if bulk {
            self.send_now(key);
        }
        if let Side::Replica(region) = side {
            self.room_for_digests(region);
        }
        self.pump_peer(key);
        self.start_send(key);
    }

    pub(super) fn receive(&mut self, key: Key) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        if peer.receiving || peer.paused || peer.waiting {
            return;
        }
        peer.receiving = true;
        // From a fast sender the rest of a body comes at once: being woken for each
        // segment of it would cost both sides more than the copy. A slow one's bytes
        // are taken as they come, since they say that it lives.
        let least = if peer.fast {
            peer.reader.missing().max(1)
        } else {
            1
        };
        if least != peer.least && net::set_least_received(&*peer.socket, least).is_ok() {
            peer.least = least;
        }
        let (buf, upto) = peer.reader.take_buffer();
        let op = Op::Recv {
            socket: Arc::clone(&peer.socket),
            buf,
            upto,
        };
        if let Err(error) = self.ring.submit(Token::PeerRecv(key).to_bits(), op) {
            self.close_peer(key, &format!("cannot receive: {error}"));
        }
    }

    pub(super) fn peer_received(&mut self, key: Key, completion: Completion) {
        let Op::Recv { buf, .. } = completion.op else {
            return;
        };
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        peer.receiving = false;
        let received = *completion.result.as_ref().unwrap_or(&0) as usize;
        peer.fast = received >= FAST;
        peer.reader.give_back(buf);
        match completion.result {
            Err(error) => {
                self.close_peer(key, &format!("cannot receive: {error}"));
                return;
            }
            // It says no more, but may still read what it was answered.
            Ok(0) if peer.side == Side::Source && peer.is_sending() => {
                peer.closing = true;
                return;
            }
            Ok(0) => {
                let reason = if peer.reader.inside_frame() {
                    "cut inside a frame"
                } else {
                    "closed by the other node"
                };
                self.close_peer(key, reason);
                return;
            }
            Ok(_) => {}
        }
        peer.heard = self.now;
        self.counters.bytes_received += received as u64;
        self.take_frames(key);
        self.note_progress(key);
        self.receive(key);
    }

    /// Handles whole frames until there is none, an apply is in progress, or the turn
    /// has lasted long enough.
    pub(super) fn take_frames(&mut self, key: Key) {
        let mut taken = 0;
        loop {
            let late = taken > 0 && self.is_late();
            let Some(peer) = self.peers.get_mut(key) else {
                return;
            };
            peer.waiting = false;
            if peer.paused || peer.receiving || peer.closing {
                return;
            }
            if late {
                peer.waiting = true;
                self.resumed.push(key);
                return;
            }
            taken += 1;
            match peer.reader.next_frame() {
                Ok(Some((header, Ok(body)))) => self.take_frame(key, header, body),
                Ok(Some((header, Err(error)))) => self.damaged_frame(key, &header, &error),
                Ok(None) => return,
                Err(error) => {
                    let reason = super::requests::chain(&error);
                    self.refuse_peer(key, ErrorCode::Protocol, 0, &reason);
                }
            }
        }
    }

    /// A body was damaged on its way: what it belonged to is asked for again.
    fn damaged_frame(&mut self, key: Key, header: &Header, error: &WireError) {
        let side = self.peers.get(key).map(|peer| (peer.side, peer.phase));
        if let Some((Side::Replica(region), Phase::Open)) = side
            && self.update_damaged(region, header)
        {
            return;
        }
        let reason = super::requests::chain(error);
        self.refuse_peer(key, ErrorCode::Protocol, 0, &reason);
    }

    fn take_frame(&mut self, key: Key, header: Header, body: Buffer) {
        let Some(peer) = self.peers.get(key) else {
            return;
        };
        let taken = match (header.kind, peer.side, peer.phase) {
            (Kind::Hello, Side::Source, Phase::Greeting) => self.hello_came(key, &header, &body),
            (Kind::Welcome, Side::Replica(_), Phase::Greeting) => {
                self.welcome_came(key, &header, &body)
            }
            (Kind::Ping, _, Phase::Open) => {
                Ping::decode(&header, &body).map(|ping| self.send(key, ping.encode(Kind::Pong)))
            }
            (Kind::Pong, _, Phase::Open) => Ping::decode(&header, &body).map(|_| ()),
            (Kind::Error, ..) => ErrorFrame::decode(&header, &body).map(|error| {
                self.close_peer(key, &format!("the other node refused: {}", error.text));
            }),
            (_, Side::Source, Phase::Open) => self.follower_frame(key, &header, &body),
            (_, Side::Replica(region), Phase::Open) => {
                return self.source_frame(key, region, header, body);
            }
            _ => {
                self.refuse_peer(key, ErrorCode::Protocol, 0, "a frame before the greeting");
                return;
            }
        };
        if let Err(error) = taken {
            let reason = super::requests::chain(&error);
            self.refuse_peer(key, ErrorCode::Protocol, 0, &reason);
        }
    }

    /// Says why, then closes once that is sent.
    pub(super) fn refuse_peer(&mut self, key: Key, code: ErrorCode, subscription: u32, text: &str) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        tracing::warn!(remote = peer.remote, reason = text, "connection refused");
        peer.closing = true;
        let frame = ErrorFrame {
            code,
            subscription,
            text: text.to_owned(),
        };
        self.send(key, frame.encode());
    }

    pub(super) fn peer_timer(&mut self, key: Key) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        if peer.phase != Phase::Open || peer.closing {
            if self.now - peer.opened >= HANDSHAKE {
                self.close_peer(key, "no greeting in time");
            } else {
                let at = peer.opened + HANDSHAKE;
                self.timers.set(at, Timer::Peer(key));
            }
            return;
        }
        let silence = self.now - peer.heard;
        // While frames wait for an apply, silence is this node's own doing.
        if silence >= Duration::from_millis(limits::PEER_DEADLINE_MS) && !peer.paused {
            self.close_peer(key, "silent for too long");
            return;
        }
        self.timers.set(self.now + PING, Timer::Peer(key));
        if silence >= PING {
            // Whatever of a body is there says that it lives.
            if peer.least > 1 && net::set_least_received(&*peer.socket, 1).is_ok() {
                (peer.fast, peer.least) = (false, 1);
            }
            peer.pings += 1;
            let ping = Ping { number: peer.pings };
            self.send(key, ping.encode(Kind::Ping));
        }
    }

    /// Ends a connection; what was in flight to a replica is pending again.
    pub(super) fn close_peer(&mut self, key: Key, reason: &str) {
        let Some(peer) = self.peers.remove(key) else {
            return;
        };
        tracing::info!(remote = peer.remote, reason, "connection ended");
        let _ = net::shutdown(&*peer.socket);
        for token in [
            Token::PeerRecv(key),
            Token::PeerSend(key),
            Token::PeerConnect(key),
        ] {
            self.ring.cancel(token.to_bits());
        }
        for subscription in &peer.subscriptions {
            if let Some(entry) = self.regions.get_mut(subscription.region) {
                entry.followers.retain(|follower| follower.peer != key);
                entry
                    .publication
                    .disconnected(subscription.shipper, self.now);
                entry.publish_acks();
            }
        }
        if let Side::Replica(region) = peer.side {
            self.source_lost(region, key);
        }
    }
}

const HANDSHAKE: Duration = Duration::from_millis(limits::HANDSHAKE_DEADLINE_MS);
pub(super) const PING: Duration = Duration::from_millis(limits::PING_INTERVAL_MS);
