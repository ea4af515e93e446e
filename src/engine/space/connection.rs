//! One connection of a server, and how bytes come and go.
//!
//! ```text
//! receive (ring) -> buffer -> frames -> executor -> outbox -> send(2), at once
//!      ^                                              |
//!      +---- only while less than 4 MiB wait ---------+--- no room: poll (ring), send again
//! ```
//! I1: what waits for a peer that does not read is bounded: beyond it nothing is carried
//!     out for it and nothing received.
//! I2: a peer that stays in the middle of a frame, does not read, or does not greet, has a
//!     deadline.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::native::Native;
use super::nbd::{Arrived, Connected};
use super::outbox::Outbox;
use super::run::{Loop, Token};
use super::speaks::{Speaks, Taken};
use crate::engine::keys::Key;
use crate::limits;
use crate::sys::buffer::Buffer;
use crate::sys::process::PidFd;
use crate::sys::ring::{Completion, Op};
use crate::sys::{SysError, net, stream};

/// Bytes received at once, if no frame asks for more.
const RECEIVE_BYTES: usize = 64 * 1024;
/// How long a peer that was turned away may take to read why.
const FAREWELL: Duration = Duration::from_secs(2);
/// Larger buffers that are kept for the next large frames.
const SPARE_BUFFERS: usize = 4;
/// Replies of one connection that may wait to be sent.
const QUEUE_BYTES: usize = limits::SPACE_SEND_QUEUE as usize;
/// Replies that are sent before more are made: their reader works meanwhile.
const SEND_FROM: usize = 32 * 1024;
/// Replies that one connection may have made before others have their turn.
const TURN_BYTES: usize = 512 * 1024;

/// A peer's connection.
pub(super) struct Connection {
    pub(super) socket: Arc<OwnedFd>,
    pub(super) speaks: Speaks,
    /// None while the kernel receives into it.
    received: Option<Buffer>,
    /// What could not be sent at once.
    pub(super) out: Outbox,
    /// Whether room to send is waited for.
    blocked: bool,
    /// Nothing is taken any more; it ends once what waits has gone.
    leaving: bool,
    /// When it ends unless it gets on.
    deadline: Option<Instant>,
}

/// What the frames at hand came to.
enum Next {
    /// More has to come until so many bytes are there.
    Needs(usize),
    /// So many bytes of replies, enough to be sent; there is more.
    Much(usize),
    /// Others first.
    Turn,
    /// Something has to be completed.
    Waits,
    Farewell,
    Broken(String),
}

fn take_all(
    speaks: &mut Speaks,
    input: &[u8],
    this: &mut super::core::Core,
    out: &mut Outbox,
) -> (usize, Next) {
    let (mut at, before) = (0, out.waiting());
    loop {
        if out.waiting() > QUEUE_BYTES {
            return (at, Next::Turn);
        }
        let made = out.waiting() - before;
        if made >= SEND_FROM {
            return (at, Next::Much(made));
        }
        match speaks.take(&input[at..], this, out) {
            Ok(Taken::Bytes(count)) => at += count,
            Ok(Taken::Turn(count)) => return (at + count, Next::Turn),
            Ok(Taken::Waits(count)) => return (at + count, Next::Waits),
            Ok(Taken::Needs(count)) => return (at, Next::Needs(count)),
            Ok(Taken::Farewell) => return (at, Next::Farewell),
            Err(reason) => return (at, Next::Broken(reason)),
        }
    }
}

impl Loop {
    pub(super) fn accepted(&mut self, door: usize, socket: OwnedFd) {
        if self.core.stopping {
            return;
        }
        self.make_room();
        // A Unix socket has no delay to switch off, and no host to lose.
        let _ = net::set_nodelay(&socket);
        let _ = stream::keep_alive(&socket);
        let is_local = self.doors[door].is_local;
        let key = self.add(socket, Speaks::Native(Native::new(is_local)), &[]);
        if is_local && self.core.writers.is_some() {
            self.note_process(key);
        }
        self.half_open.push_back(key);
        self.set_deadline(
            key,
            Some(Duration::from_millis(limits::HANDSHAKE_DEADLINE_MS)),
        );
        self.go_on(key);
    }

    /// Keeps hold of the process of a client that may ask for writing by mapping.
    fn note_process(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        match PidFd::of_peer(&*connection.socket) {
            Ok(process) => connection.speaks.connected_by(process),
            Err(error) => tracing::warn!(%error, "a client may not write by mapping"),
        }
    }

    /// An NBD client has chosen what is served here.
    pub(super) fn arrived(&mut self, arrived: Arrived) {
        if self.core.stopping {
            return;
        }
        let Arrived {
            socket,
            session,
            input,
            seat,
            counted,
        } = arrived;
        let connected = Connected::new(session, counted, seat, &mut self.core.nbd);
        let key = self.add(socket, Speaks::Nbd(Box::new(connected)), &input);
        self.go_on(key);
    }

    fn add(&mut self, socket: OwnedFd, speaks: Speaks, input: &[u8]) -> Key {
        let mut received = Vec::with_capacity(RECEIVE_BYTES.max(input.len()));
        received.extend_from_slice(input);
        let key = self.connections.insert(Connection {
            socket: Arc::new(socket),
            speaks,
            received: Some(Buffer::Heap(received)),
            out: Outbox::default(),
            blocked: false,
            leaving: false,
            deadline: None,
        });
        if let Some(connection) = self.connections.get_mut(key) {
            connection.speaks.placed(key);
        }
        key
    }

    /// Gives what came back from other servers to who waits for it.
    pub(super) fn errands_done(&mut self) {
        let mut served = Vec::new();
        while let Some(done) = self.core.nbd.next_done() {
            let key = Key::from_bits(done.connection);
            served.push(key);
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            if connection.out.waiting() == 0 {
                connection.out = std::mem::take(&mut self.scratch);
            }
            connection
                .speaks
                .completed(&done, &self.core, &mut connection.out);
            if let Err(error) = self.flush(key) {
                self.close(key, &error.to_string());
            }
        }
        for key in self.core.nbd.take_waiting(&served) {
            self.go_on(key);
        }
    }

    /// Makes room for a new connection: of those that have said nothing yet, the one that
    /// has been silent for longest goes, so that silent ones keep nobody out.
    fn make_room(&mut self) {
        if (self.half_open.len() as u64) < limits::MAX_HALF_OPEN {
            return;
        }
        self.forget_greeted();
        if self.half_open.len() as u64 >= limits::MAX_HALF_OPEN
            && let Some(eldest) = self.half_open.pop_front()
        {
            self.close(eldest, "too many have not greeted");
        }
    }

    fn forget_greeted(&mut self) {
        let connections = &self.connections;
        let is_silent = |one: &Connection| !one.speaks.is_greeted();
        self.half_open
            .retain(|key| connections.get(*key).is_some_and(is_silent));
    }

    fn waiting(&self, key: Key) -> usize {
        let found = self.connections.get(key);
        found.map_or(0, |connection| connection.out.waiting())
    }

    fn is_unblocked(&self, key: Key) -> bool {
        let found = self.connections.get(key);
        found.is_some_and(|one| !one.blocked && !one.leaving)
    }

    fn set_deadline(&mut self, key: Key, time: Option<Duration>) {
        if let Some(connection) = self.connections.get_mut(key) {
            let before = connection.deadline.is_some();
            connection.deadline = time.map(|time| Instant::now() + time);
            self.watched = self.watched + usize::from(time.is_some()) - usize::from(before);
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
        self.has_served = true;
        match completion.result {
            Ok(0) => {
                connection.speaks.ended_by_peer();
                return self.close(key, "the other side closed it");
            }
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(nix::libc::EINTR) => {}
            Err(error) => return self.close(key, &error.to_string()),
        }
        self.go_on(key);
    }

    /// There is room to send, or should be.
    pub(super) fn room(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        connection.blocked = false;
        self.go_on(key);
    }

    /// Carries out what was received, sends what came of it, and receives more.
    pub(super) fn go_on(&mut self, key: Key) {
        let mut made = 0;
        let next = loop {
            let next = self.carry_out(key);
            if let Err(error) = self.flush(key) {
                return self.close(key, &error.to_string());
            }
            match next {
                Next::Much(bytes) if made < TURN_BYTES => made += bytes,
                Next::Much(_) => break Next::Turn,
                next => break next,
            }
        };
        self.after(key, next);
    }

    /// Carries out what was received, until its replies are to be sent.
    fn carry_out(&mut self, key: Key) -> Next {
        let Some(connection) = self.connections.get_mut(key) else {
            return Next::Needs(0);
        };
        // Replies are made in one place for all, as long as a peer takes them at once.
        if connection.out.waiting() == 0 {
            connection.out = std::mem::take(&mut self.scratch);
        }
        let mut next = Next::Needs(0);
        if let Some(mut buffer) = connection.received.take() {
            if connection.leaving {
                buffer.truncate(0);
            } else {
                let taken;
                let this = &mut self.core;
                (taken, next) =
                    take_all(&mut connection.speaks, &buffer, this, &mut connection.out);
                if taken == buffer.len() {
                    buffer.truncate(0);
                } else if taken > 0 {
                    buffer.drain_front(taken);
                }
            }
            connection.received = Some(buffer);
        }
        if self.core.writers.is_some() {
            self.mind_writers(key);
        }
        next
    }

    fn after(&mut self, key: Key, next: Next) {
        let needs = match next {
            Next::Needs(needs) => needs,
            Next::Turn | Next::Much(_) => {
                // What was received is not all carried out: nothing more is asked for. With
                // as much waiting as before it goes on when that has gone.
                if self.waiting(key) <= QUEUE_BYTES {
                    self.again.push_back(key);
                }
                return self.watch(key);
            }
            // Nor here: what it waits for makes it go on, and is not the peer's delay.
            Next::Waits if self.is_unblocked(key) => return self.set_deadline(key, None),
            Next::Waits => return self.watch(key),
            Next::Farewell => {
                self.leave(key);
                0
            }
            Next::Broken(reason) => {
                self.core.broken += 1;
                tracing::info!(reason, "a connection was ended for what it sent");
                return self.close(key, &reason);
            }
        };
        self.watch(key);
        self.receive_next(key, needs);
    }

    /// Sends what may go. What a peer has no room for stays with its connection.
    pub(super) fn flush(&mut self, key: Key) -> Result<(), SysError> {
        let Some(connection) = self.connections.get_mut(key) else {
            return Ok(());
        };
        let was_blocked = connection.blocked;
        while !connection.blocked {
            let bytes = connection.out.sendable(self.safe);
            if bytes.is_empty() {
                break;
            }
            let socket = connection.socket.as_fd();
            let sent = if connection.out.with_descriptors {
                let mut which = &connection.out.own_descriptors;
                if which.is_empty() {
                    which = &self.descriptors;
                }
                let descriptors: Vec<BorrowedFd<'_>> = which.iter().map(|fd| fd.as_fd()).collect();
                net::try_send_with_fds(socket, bytes, &descriptors)
            } else {
                stream::try_send(socket, bytes)
            };
            match sent {
                Ok(count) => {
                    connection.out.gone(count);
                    connection.out.with_descriptors = false;
                    connection.out.own_descriptors.clear();
                }
                Err(error) if error.is_would_block() => connection.blocked = true,
                Err(error) => return Err(error),
            }
        }
        if connection.blocked && !was_blocked {
            let fd = Arc::clone(&connection.socket);
            let op = Op::Poll { fd, writable: true };
            return self.ring.submit(Token::Room(key).to_bits(), op);
        }
        if connection.out.waiting() == 0 {
            // Its memory serves the next connection's replies.
            self.scratch = std::mem::take(&mut connection.out);
        } else if let Some(change) = connection.out.held_for(self.safe) {
            self.held.push(key);
            if let Some(safety) = &mut self.safety {
                safety.want(change);
            }
        }
        Ok(())
    }

    /// All changes up to this one are with a replica, or it is too late for that: replies
    /// that waited for it go, and say which.
    pub(super) fn settled(&mut self, change: u64, is_safe: bool) {
        let mut held = std::mem::take(&mut self.held);
        held.sort_unstable();
        held.dedup();
        let mut late = 0;
        for key in &held {
            if !is_safe && let Some(connection) = self.connections.get_mut(*key) {
                let Connection { speaks, out, .. } = connection;
                out.each_held(self.safe, change, |reply| {
                    late += u64::from(speaks.not_acknowledged(reply));
                });
            }
        }
        let figures = &self.core.watch().figures;
        figures.unacknowledged.fetch_add(late, Ordering::Relaxed);
        self.safe = self.safe.max(change);
        for key in held {
            self.go_on(key);
        }
    }

    /// Has a deadline watched where the peer is in the middle of something.
    fn watch(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        if connection.leaving {
            if connection.out.waiting() == 0 {
                // Ended both ways at once, what the peer has sent and is not read here
                // would take the farewell with it. It may have ended it already.
                let _ = net::end_sending(&*connection.socket);
            }
            return;
        }
        if !connection.speaks.is_greeted() {
            return;
        }
        let is_half = connection
            .received
            .as_ref()
            .is_some_and(|buffer| !buffer.is_empty());
        let time = Duration::from_millis(limits::SPACE_STALL_MS);
        if connection.blocked || is_half {
            self.set_deadline(key, Some(time));
        } else if connection.deadline.is_some() {
            self.set_deadline(key, None);
        }
    }

    /// Takes nothing more of a peer, and ends the connection once it has read the rest.
    fn leave(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        if !connection.leaving {
            connection.leaving = true;
            self.set_deadline(key, Some(FAREWELL));
        }
    }

    /// Asks for more, until a frame of `needs` bytes is there; unless too much waits to be
    /// sent.
    fn receive_next(&mut self, key: Key, needs: usize) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        if connection.out.waiting() > QUEUE_BYTES {
            return;
        }
        let Some(buffer) = connection.received.take() else {
            return;
        };
        let buf = fitting(&mut self.spare, buffer, needs);
        let op = Op::Recv {
            socket: Arc::clone(&connection.socket),
            // Of a large frame no more than itself, so that nothing has to be moved.
            upto: needs.max(RECEIVE_BYTES).min(buf.capacity()),
            buf,
        };
        if let Err(error) = self.ring.submit(Token::Recv(key).to_bits(), op) {
            self.close(key, &error.to_string());
        }
    }

    /// Ends a connection.
    pub(super) fn close(&mut self, key: Key, reason: &str) {
        let Some(connection) = self.connections.remove(key) else {
            return;
        };
        tracing::debug!(reason, "a client's connection ended");
        self.watched -= usize::from(connection.deadline.is_some());
        connection.speaks.ended(&mut self.core);
        self.ring.cancel(Token::Recv(key).to_bits());
        self.ring.cancel(Token::Room(key).to_bits());
        // It may be at its end already.
        let _ = net::shutdown(&*connection.socket);
    }

    /// Ends what did not get on in time.
    pub(super) fn look_after(&mut self, now: Instant) {
        for key in self.connections.keys() {
            let late = self.connections.get(key).and_then(|one| one.deadline);
            if late.is_some_and(|deadline| deadline <= now) {
                self.close(key, "it did not get on in time");
            }
        }
        self.forget_greeted();
    }
}

/// `buffer` if a frame of `needs` bytes fits, else a larger one with what is in it. A
/// larger one that is empty makes place for an ordinary one.
fn fitting(spare: &mut Vec<Buffer>, buffer: Buffer, needs: usize) -> Buffer {
    let is_large = buffer.capacity() > RECEIVE_BYTES;
    if needs > buffer.capacity() {
        let found = spare.iter().position(|one| one.capacity() >= needs);
        let mut large = match found {
            Some(at) => spare.swap_remove(at),
            None => Buffer::Heap(Vec::with_capacity(needs)),
        };
        large.extend_from_slice(&buffer);
        return large;
    }
    if is_large && buffer.is_empty() {
        if spare.len() < SPARE_BUFFERS {
            spare.push(buffer);
        }
        return Buffer::Heap(Vec::with_capacity(RECEIVE_BYTES));
    }
    buffer
}
