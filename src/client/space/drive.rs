//! What moves bytes: one server at a time where an operation touches one only, all of them
//! through `poll(2)` else.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::error::{ReachError, ReplyError};
use super::local::Local;
use super::operations::{Lent, Ticket};
use super::socket::Step;
use super::{Failure, Link, Space};
use crate::space::frame::{Hello, Incarnation};
use crate::sys::net::{self, Blocking, Watched};
use crate::sys::spin::Spinner;
use crate::sys::{SysError, dial};

/// Sends and receives on one connection before the next has its turn.
const ROUNDS: usize = 64;
/// Requests that are sent before anybody waits for their replies.
const SEND_FROM: usize = 16 * 1024;
/// Longest time for which one receive after the other waits in the kernel without a look at
/// the clock in between.
const SHORT: Duration = Duration::from_millis(10);

/// Looks for a reply between two times that others may run.
pub(super) const LOOKS: u32 = 8;

/// A descriptor that a program waits for before it calls [`Space::progress`] again.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'fd> {
    /// Which one. Something to read always counts.
    pub fd: BorrowedFd<'fd>,
    /// Whether room to send counts too.
    pub for_room: bool,
}

/// Why a connection is of no more use.
enum End {
    Io(ReachError),
    Broken(ReplyError),
}

impl From<SysError> for End {
    fn from(error: SysError) -> Self {
        Self::Io(error.into())
    }
}

impl Space {
    /// Sends, receives and reconnects as far as that is possible without waiting. (A host
    /// that is given by name is looked up, which may wait.)
    pub fn progress(&mut self) {
        self.step_all(Instant::now(), &mut Lent::Nothing);
    }

    /// What to wait for, until [`next_alarm`](Self::next_alarm) at most, before
    /// [`progress`](Self::progress) has something to do. Changes with every call of this
    /// space.
    pub fn descriptors(&self) -> Vec<Wanted<'_>> {
        let links = self.links.iter().filter_map(Link::wanted);
        links
            .map(|(fd, for_room)| Wanted { fd, for_room })
            .collect()
    }

    /// When [`progress`](Self::progress) has something to do although no descriptor is
    /// ready; none if nothing is under way.
    pub fn next_alarm(&self) -> Option<Instant> {
        let alarms = self.links.iter().filter_map(|link| {
            let alarm = link.socket.alarm();
            alarm.filter(|_| !link.lane.is_idle())
        });
        alarms.chain(self.operations.next_deadline()).min()
    }

    /// Goes on until an operation is done, be it by its deadline.
    pub(super) fn drive(&mut self, ticket: Ticket, lent: &mut Lent<'_>) {
        self.drive_alone(ticket, lent);
        if self.operations.is_done(ticket) {
            return;
        }
        // What was waited for there was not time spent elsewhere.
        self.attended = Instant::now();
        loop {
            let now = Instant::now();
            self.step_all(now, lent);
            if self.operations.is_done(ticket) {
                return;
            }
            self.sleep(now);
            self.attended = Instant::now();
        }
    }

    /// The short way: one connection, and a receive that looks for a while and then waits in
    /// the kernel.
    fn drive_alone(&mut self, ticket: Ticket, lent: &mut Lent<'_>) {
        let Some(found) = self.operations.find(ticket) else {
            return;
        };
        if found.parts != 1 || found.open == 0 {
            return;
        }
        let (at, began) = (
            found.server as usize,
            found.deadline.checked_sub(self.deadline),
        );
        let Self {
            links,
            operations,
            spinner,
            ..
        } = self;
        let link = &mut links[at];
        let mut is_first = true;
        while !operations.is_done(ticket) {
            let Some(fd) = link.socket.up() else { return };
            let lane = &mut link.lane;
            lane.encode(operations, lent);
            let moved = (|| {
                while lane.waiting() > 0 {
                    let (first, second) = lane.sending(operations, lent);
                    let bytes = dial::send(fd, first, second, Blocking::No)?;
                    lane.sent(bytes);
                }
                if !lane.is_owed() || lane.is_over() {
                    // The server ends: nothing is asked over this connection any more.
                    return Ok(false);
                }
                let in_time = || began.is_some_and(|began| began.elapsed() < SHORT);
                if !std::mem::take(&mut is_first) && !in_time() {
                    return Ok(false);
                }
                let room = lane.room(operations, lent);
                let bytes = await_bytes(spinner, fd, room)?;
                if bytes == 0 {
                    return Err(End::Io(ReachError::Ended));
                }
                let read = lane.received(operations, lent, bytes);
                read.map(|()| true).map_err(End::Broken)
            })();
            match moved {
                Ok(true) if !lane.is_over() => {}
                Err(End::Io(ReachError::Io(error))) if error.is_would_block() => return,
                Ok(_) => return,
                Err(end) => return self.end(at, Instant::now(), end),
            }
        }
    }

    /// Every connection that has something to do, once.
    fn step_all(&mut self, now: Instant, lent: &mut Lent<'_>) {
        let away = now.saturating_duration_since(self.attended);
        self.attended = now;
        if away > self.deadline / 2 {
            self.operations.prolong(now + self.deadline / 2);
            self.next_look = self.operations.next_deadline();
        }
        for at in 0..self.links.len() {
            if !self.links[at].lane.is_idle() {
                self.step(at, now, lent);
            }
        }
        if self.next_look.is_some_and(|look| now >= look) {
            let mut overdue = Vec::new();
            let patience = self.deadline;
            self.operations.overdue(now, patience, &mut overdue);
            for ticket in overdue {
                self.give_up(ticket, now);
            }
            self.next_look = self.operations.next_deadline();
        }
    }

    fn step(&mut self, at: usize, now: Instant, lent: &mut Lent<'_>) {
        let link = &mut self.links[at];
        if link.socket.up().is_none() {
            let hello = Hello {
                server: at as u32,
                incarnation: link.lane.known().unwrap_or(Incarnation(0)),
                ..self.hello
            };
            match link.socket.advance(now, &hello) {
                Step::Waits => return,
                Step::Refused(why) => return link.lane.fail_runs(&mut self.operations, &why),
                Step::Up(welcome, fds) => {
                    let segment = self.config.map.segment_size();
                    link.local = Local::open(&fds, &welcome, segment);
                    link.lane.welcomed(&mut self.operations, &welcome);
                }
            }
        }
        if let Err(end) = self.exchange(at, lent) {
            self.end(at, now, end);
        } else if self.links[at].lane.is_over() {
            self.end(at, now, End::Io(ReachError::Ended));
        }
    }

    /// Sends and receives on one connection without waiting.
    fn exchange(&mut self, at: usize, lent: &mut Lent<'_>) -> Result<(), End> {
        let Self {
            links, operations, ..
        } = self;
        let Link { lane, socket, .. } = &mut links[at];
        let Some(fd) = socket.up() else { return Ok(()) };
        for _ in 0..ROUNDS {
            lane.encode(operations, lent);
            let mut idle = true;
            if lane.waiting() > 0 {
                let (first, second) = lane.sending(operations, lent);
                match dial::send(fd, first, second, Blocking::No) {
                    Ok(bytes) => {
                        lane.sent(bytes);
                        idle = false;
                    }
                    Err(error) if error.is_would_block() => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if lane.is_owed() {
                let room = lane.room(operations, lent);
                match dial::recv(fd, room, Blocking::No) {
                    Ok(0) => return Err(End::Io(ReachError::Ended)),
                    Ok(bytes) => {
                        let read = lane.received(operations, lent, bytes);
                        read.map_err(End::Broken)?;
                        idle = false;
                    }
                    Err(error) if error.is_would_block() => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if idle {
                break;
            }
        }
        Ok(())
    }

    /// Sends what was submitted where it is much, so that the server works meanwhile.
    pub(super) fn send_if_much(&mut self, ticket: Ticket) {
        let Some(found) = self.operations.find(ticket) else {
            return;
        };
        let at = found.server as usize;
        let link = &mut self.links[at];
        if found.parts != 1 || link.socket.up().is_none() {
            return;
        }
        link.lane.encode(&mut self.operations, &Lent::Nothing);
        if link.lane.waiting() >= SEND_FROM
            && let Err(end) = self.send_all(at)
        {
            self.end(at, Instant::now(), end);
        }
    }

    /// Sends what was encoded. Replies are received only where the server takes no more
    /// before it is rid of them.
    fn send_all(&mut self, at: usize) -> Result<(), End> {
        let Self {
            links, operations, ..
        } = self;
        let Link { lane, socket, .. } = &mut links[at];
        while let Some(fd) = socket.up()
            && lane.waiting() > 0
        {
            let (first, second) = lane.sending(operations, &Lent::Nothing);
            match dial::send(fd, first, second, Blocking::No) {
                Ok(bytes) => lane.sent(bytes),
                Err(error) if error.is_would_block() => {
                    return self.exchange(at, &mut Lent::Nothing);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// A connection is of no more use.
    fn end(&mut self, at: usize, now: Instant, end: End) {
        let link = &mut self.links[at];
        link.local = None;
        let (why, broken) = match end {
            End::Io(why) => (why, None),
            End::Broken(reply) => (ReachError::Ended, Some(reply)),
        };
        link.lane.disconnected(&mut self.operations, broken);
        link.socket.lost(now, why);
    }

    /// Reports an operation as it stands.
    fn give_up(&mut self, ticket: Ticket, now: Instant) {
        for at in 0..self.links.len() {
            let link = &mut self.links[at];
            let unsent = match link.socket.up() {
                Some(_) => Failure::TimedOut,
                None => Failure::Unreachable {
                    source: link.socket.reason(),
                },
            };
            if link.lane.abandon(&mut self.operations, ticket, &unsent) {
                self.end(at, now, End::Io(ReachError::Ended));
            }
        }
        self.operations.end(ticket);
    }

    /// Until a connection has something to do, or the next alarm.
    fn sleep(&self, now: Instant) {
        let mut watched: Vec<Watched<'_>> = self
            .descriptors()
            .into_iter()
            .map(|wanted| Watched {
                fd: wanted.fd,
                for_room: wanted.for_room,
                ready: false,
            })
            .collect();
        let alarm = self.next_alarm();
        let time = alarm.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        // What poll cannot do, the next step meets again, until the deadline.
        let _ = net::poll_each(&mut watched, Some(time));
    }
}

/// Receives what comes next.
fn await_bytes(
    spinner: &mut Spinner,
    fd: BorrowedFd<'_>,
    room: &mut [u8],
) -> Result<usize, SysError> {
    let found = spinner.wait_for(|| match dial::recv(fd, room, Blocking::No) {
        Err(error) if error.is_would_block() => None,
        found => Some(found),
    });
    found.unwrap_or_else(|| dial::recv(fd, room, Blocking::Yes))
}

impl Link {
    /// What a poll has to wait for, if anything is under way.
    fn wanted(&self) -> Option<(BorrowedFd<'_>, bool)> {
        if self.lane.is_idle() {
            return None;
        }
        let (fd, for_room) = self.socket.watched()?;
        Some((fd, for_room || self.lane.waiting() > 0))
    }
}
