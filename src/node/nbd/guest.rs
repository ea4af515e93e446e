//! One NBD client on a thread of its own: its handshake, and its region if it chooses one.
//!
//! ```text
//! accepted --> options --> an export of the space --> the space's loop has it from then on
//!                    \--> a region --> requests, each carried out at once
//! ```
//! - I1: a client that has not chosen has a deadline, and so has one that stays in the
//!   middle of a request or does not read.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::catalog::Visible;
use super::memory::Memory;
use crate::engine::space::Arrived;
use crate::engine::{Counted, Seat};
use crate::limits;
use crate::nbd::{Counts, Next, REQUEST_BYTES, Session, Violation};
use crate::sys::net::{self, Watched};
use crate::sys::{SysError, stream};

/// Bytes received at once, if no request asks for more.
const RECEIVE_BYTES: usize = 64 * 1024;

/// What the one who accepts keeps of a client.
#[derive(Debug)]
pub(super) struct Link {
    socket: Arc<OwnedFd>,
    has_chosen: AtomicBool,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> Arc<Self> {
        Arc::new(Self {
            socket: Arc::new(socket),
            has_chosen: AtomicBool::new(false),
        })
    }

    /// Whether it is still in its handshake.
    pub(super) fn is_half_open(&self) -> bool {
        !self.has_chosen.load(Ordering::Relaxed)
    }

    /// Hangs up, and counts it no more among those in their handshake.
    pub(super) fn give_up(&self) {
        self.has_chosen.store(true, Ordering::Relaxed);
        self.hang_up();
    }

    /// Hangs up.
    pub(super) fn hang_up(&self) {
        // It may be at its end already.
        let _ = net::shutdown(&*self.socket);
    }
}

/// Why a client is not served any more.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("it sent what is no NBD")]
    Broke(#[from] Violation),
    #[error("the connection is lost")]
    Lost(#[from] SysError),
    #[error("it closed the connection")]
    Closed,
    #[error("it did not get on in time")]
    Late,
}

/// Serves a client until it leaves, or belongs to the space.
pub(super) fn serve(link: &Arc<Link>, visible: Arc<Visible>, seat: Seat) {
    let figures = Arc::clone(&visible.shared.figures);
    let time = Duration::from_millis(limits::HANDSHAKE_DEADLINE_MS);
    let guest = Guest {
        link: Arc::clone(link),
        session: Session::new(Arc::clone(&visible) as Arc<_>),
        visible,
        seat,
        memory: Memory::default(),
        counted: None,
        input: Vec::new(),
        out: Vec::new(),
        greets_until: Instant::now() + time,
    };
    match guest.run() {
        Ok(()) => return,
        Err(Ended::Broke(violation)) => {
            figures.broke();
            tracing::info!(%violation, "an NBD client was hung up on for what it sent");
        }
        Err(error) => tracing::debug!(%error, "an NBD client's connection ended"),
    }
    link.hang_up();
}

struct Guest {
    link: Arc<Link>,
    visible: Arc<Visible>,
    seat: Seat,
    session: Session,
    memory: Memory,
    /// None before it has chosen.
    counted: Option<Counted>,
    /// Received and not taken.
    input: Vec<u8>,
    /// To be sent.
    out: Vec<u8>,
    greets_until: Instant,
}

impl Guest {
    /// Ends well where somebody else has the connection from now on.
    fn run(mut self) -> Result<(), Ended> {
        loop {
            let Self {
                session,
                input,
                out,
                memory,
                ..
            } = &mut self;
            let advanced = session.advance(input, out, memory);
            input.drain(..advanced.consumed);
            if self.counted.is_none()
                && let Some(export) = self.session.export()
            {
                let name = export.name.clone();
                self.link.has_chosen.store(true, Ordering::Relaxed);
                let counted = self.visible.shared.figures.connected(&name);
                if self.visible.is_of_space(&name) {
                    return self.hand_over(counted);
                }
                self.counted = Some(counted);
                self.memory = Memory::join(&self.visible, &name);
                continue;
            }
            self.count();
            match advanced.next {
                Next::More | Next::Turn if (self.out.len() as u64) < limits::NBD_REPLIES => {}
                Next::More | Next::Turn => self.flush()?,
                // What is read here is there at once.
                Next::Input(_) | Next::Completion if self.visible.shared.is_stopping() => {
                    self.flush()?;
                    return Err(Ended::Closed);
                }
                Next::Completion => return Err(Ended::Late),
                Next::Input(needs) => {
                    self.flush()?;
                    self.receive(needs)?;
                }
                Next::Close(violation) => {
                    self.flush()?;
                    return Err(violation.map_or(Ended::Closed, Ended::Broke));
                }
            }
        }
    }

    fn count(&mut self) {
        let counts = self.session.take_counts();
        if let Some(counted) = &self.counted
            && counts != Counts::default()
        {
            counted.add(counts.requests, counts.errors);
        }
    }

    fn hand_over(mut self, counted: Counted) -> Result<(), Ended> {
        self.flush()?;
        let Some(space) = &self.visible.shared.space else {
            return Err(Ended::Closed);
        };
        let socket = self.link.socket.try_clone();
        let socket = socket.map_err(|error| SysError::new("dup", error))?;
        space.arrivals.bring(Arrived {
            socket,
            session: self.session,
            input: self.input,
            seat: self.seat,
            counted,
        });
        Ok(())
    }

    /// How long it may take to get on; for ever between two requests.
    fn patience(&self, is_half: bool) -> Result<Option<Duration>, Ended> {
        if self.counted.is_none() {
            let left = self.greets_until.checked_duration_since(Instant::now());
            return left.map(Some).ok_or(Ended::Late);
        }
        Ok(is_half.then(|| Duration::from_millis(limits::SPACE_STALL_MS)))
    }

    fn wait(&self, for_room: bool, time: Option<Duration>) -> Result<(), Ended> {
        let mut watched = [Watched {
            fd: self.link.socket.as_fd(),
            for_room,
            ready: false,
        }];
        net::poll_each(&mut watched, time)?;
        if watched[0].ready {
            Ok(())
        } else {
            Err(Ended::Late)
        }
    }

    /// Receives until `needs` bytes are there.
    fn receive(&mut self, needs: usize) -> Result<(), Ended> {
        let room = needs.max(RECEIVE_BYTES);
        while self.input.len() < needs {
            let is_half = !self.input.is_empty() || needs < REQUEST_BYTES;
            self.wait(false, self.patience(is_half)?)?;
            let there = self.input.len();
            self.input.resize(room, 0);
            let received = stream::try_receive(&*self.link.socket, &mut self.input[there..]);
            self.input
                .truncate(there + *received.as_ref().unwrap_or(&0));
            match received {
                Ok(0) => return Err(Ended::Closed),
                Ok(_) => {}
                Err(error) if error.is_would_block() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends all that is to be sent.
    fn flush(&mut self) -> Result<(), Ended> {
        let mut sent = 0;
        while sent < self.out.len() {
            match stream::try_send(&*self.link.socket, &self.out[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.is_would_block() => self.await_room()?,
                Err(error) => return Err(error.into()),
            }
        }
        self.out.clear();
        Ok(())
    }

    /// A client that sends meanwhile does not make itself waited for: only room counts.
    fn await_room(&self) -> Result<(), Ended> {
        let time = self.patience(true)?.unwrap_or_default();
        if net::wait_for_room(&*self.link.socket, time)? {
            Ok(())
        } else {
            Err(Ended::Late)
        }
    }
}
