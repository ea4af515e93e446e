//! What brings NBD clients of one server to the other servers of its space: a thread with a
//! [`Space`] of its own.
//!
//! ```text
//! server's loop --Errands, bell--> gateway --submit--> Space --> other servers
//!       ^--------- bell, Done ------------'<---poll---'
//! ```
//! I1: an NBD connection that was there before the memory of a server was lost gets errors
//!     from that server for as long as it lasts: it may have seen what is gone. One that is
//!     made later begins with what is there.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use super::error::{Failure as Why, SpaceError};
use super::submit::Answer;
use super::{Space, SpaceOptions, Ticket};
use crate::engine::space::{Errand, Errands, Went, What};
use crate::nbd::Failure;
use crate::space::SpaceConfig;
use crate::sys::net::{self, Watched};

/// A running gateway. Dropping it ends it; what is under way then is answered with an error.
#[derive(Debug)]
pub struct Gateway {
    errands: Arc<Errands>,
    thread: Option<JoinHandle<()>>,
}

impl Gateway {
    /// Does the errands of a server by a client of its own.
    ///
    /// # Errors
    /// What the system says if there is no thread to be had.
    pub fn start(
        config: SpaceConfig,
        options: SpaceOptions,
        errands: Arc<Errands>,
    ) -> std::io::Result<Self> {
        let theirs = Arc::clone(&errands);
        let body = move || match Space::connect_with(config, options) {
            Ok(space) => Bearer::new(space, theirs).run(),
            Err(error) => {
                tracing::error!(%error, "NBD clients reach no other server");
                give_back(&theirs);
            }
        };
        let thread = std::thread::Builder::new().name("nbd-gateway".into());
        Ok(Self {
            errands,
            thread: Some(thread.spawn(body)?),
        })
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.errands.close();
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Err(_)) = ended {
            tracing::error!("the gateway of the NBD clients ended by a panic");
        }
    }
}

/// Answers all errands that wait, and lets no more come: nobody is there to do them.
fn give_back(errands: &Errands) {
    errands.close();
    while let Some(errand) = errands.next() {
        errands.finish(errand.done(Err(Failure::Io)));
    }
}

struct Bearer {
    space: Space,
    errands: Arc<Errands>,
    under_way: HashMap<Ticket, Errand>,
    /// Of each server whose memory was lost: the last connection that was there before.
    losses: HashMap<usize, u64>,
    /// The last connection that was heard of.
    newest: u64,
}

/// However it ends: no client waits for what nobody brings.
impl Drop for Bearer {
    fn drop(&mut self) {
        for (_, errand) in self.under_way.drain() {
            self.errands.finish(errand.done(Err(Failure::Io)));
        }
        give_back(&self.errands);
    }
}

impl Bearer {
    fn new(space: Space, errands: Arc<Errands>) -> Self {
        Self {
            space,
            errands,
            under_way: HashMap::new(),
            losses: HashMap::new(),
            newest: 0,
        }
    }

    fn run(mut self) {
        while !self.errands.is_closed() {
            self.errands.bell().drain();
            while let Some(errand) = self.errands.next() {
                self.submit(errand);
            }
            self.space.progress();
            while let Some((ticket, answer)) = self.space.poll() {
                self.finish(ticket, answer);
            }
            self.sleep();
        }
    }

    fn submit(&mut self, mut errand: Errand) {
        self.newest = self.newest.max(errand.serial);
        if self.is_from_before_a_loss(&errand) {
            return self.errands.finish(errand.done(Err(Failure::Io)));
        }
        let (address, len) = (errand.unit.address, u64::from(errand.unit.len));
        let submitted = match &mut errand.what {
            What::Read => self.space.submit_read(address, len),
            What::Write(bytes) => self.space.submit_write(address, std::mem::take(bytes)),
            What::Zero => self.space.submit_fill(address, len, 0),
            What::Holes => self.space.submit_holes(address, len),
        };
        match submitted {
            Ok(ticket) => {
                self.under_way.insert(ticket, errand);
            }
            Err(error) => {
                tracing::warn!(%error, "an NBD request could not be passed on");
                self.errands.finish(errand.done(Err(Failure::Io)));
            }
        }
    }

    fn is_from_before_a_loss(&self, errand: &Errand) -> bool {
        if self.losses.is_empty() {
            return false;
        }
        let unit = errand.unit;
        let parts = self.space.map().split(unit.address, unit.len.into());
        let is_before = |server: usize| {
            let last = self.losses.get(&server);
            last.is_some_and(|last| errand.serial <= *last)
        };
        parts.is_ok_and(|mut parts| parts.any(|part| is_before(part.server)))
    }

    fn finish(&mut self, ticket: Ticket, answer: Result<Answer, SpaceError>) {
        let Some(errand) = self.under_way.remove(&ticket) else {
            return;
        };
        let went = match answer {
            Ok(Answer::Bytes(bytes)) => Ok(Went::Bytes(bytes)),
            Ok(Answer::Runs(runs)) => Ok(Went::Runs(runs)),
            Ok(_) => Ok(Went::Bytes(Vec::new())),
            Err(error) => {
                tracing::warn!(%error, "an NBD request failed on another server");
                self.accept_losses(&error);
                Err(Failure::Io)
            }
        };
        self.errands.finish(errand.done(went));
    }

    fn accept_losses(&mut self, error: &SpaceError) {
        for part in error.parts() {
            if !matches!(part.why, Why::SegmentLost { .. }) {
                continue;
            }
            let name = part.server.as_str();
            if let (Some(server), Ok(true)) = (
                self.space.map().position(name),
                self.space.accept_loss(name),
            ) {
                self.losses.insert(server, self.newest);
            }
        }
    }

    fn sleep(&self) {
        let wanted = self.space.descriptors();
        let mut watched: Vec<_> = wanted
            .into_iter()
            .map(|wanted| Watched {
                fd: wanted.fd,
                for_room: wanted.for_room,
                ready: false,
            })
            .collect();
        watched.push(Watched {
            fd: self.errands.bell().as_fd(),
            for_room: false,
            ready: false,
        });
        let alarm = self.space.next_alarm();
        let time = alarm.map(|at| at.saturating_duration_since(Instant::now()));
        // What poll cannot do, the next step meets again.
        let _ = net::poll_each(&mut watched, time);
    }
}
