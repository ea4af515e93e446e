//! The client's connection to a server: made by name, watched for its end, made again
//! to the next server of that name, which then goes on with the client's memory.
//!
//! I1. Memory of a server is opened with every number in it checked, within the limits.
//! I2. Memory is handed over only after the old connection was closed: a server that is
//!     still there sees its client go first.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::rendezvous::{ConnectError, ask};
use crate::duplex::layout::LAYOUT_VERSION;
use crate::duplex::rendezvous::{Ask, ChannelKind, ChannelName, Hello, Refusal};
use crate::duplex::{Features, OpenLimits, Segment, Side};
use crate::sys::net;

/// First pause before a server is looked for again; doubled up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// Last pause.
const LAST_PAUSE: Duration = Duration::from_millis(50);

/// A hello of this library, which names the features that `limits` allow.
pub(super) fn hello(ask: Ask, generation: u64, fds: usize, limits: OpenLimits) -> Hello {
    let mut features = Features::all();
    features.set(Features::FAILPOINTS, limits.failpoints);
    Hello {
        versions: (LAYOUT_VERSION, LAYOUT_VERSION),
        features: features.bits(),
        ask,
        generation,
        fds: fds as u32,
    }
}

/// A client's connection.
#[derive(Debug)]
pub(super) struct Link {
    path: PathBuf,
    name: ChannelName,
    limits: OpenLimits,
    /// None between the old server and the next.
    connection: Option<OwnedFd>,
}

impl Link {
    /// Joins the server that listens at `path`; the channel's memory.
    pub(super) fn attach(
        path: PathBuf,
        name: ChannelName,
        limits: OpenLimits,
        deadline: Instant,
    ) -> Result<(Link, Segment), ConnectError> {
        let granted = ask(
            &path,
            &name,
            &hello(Ask::Attach, 0, 0, limits),
            &[],
            deadline,
        )?;
        if granted.welcome.kind != ChannelKind::InPlace {
            return Err(ConnectError::TwoBuffers { name });
        }
        let segment =
            Segment::open(granted.fds, limits).map_err(|source| ConnectError::Memory {
                name: name.clone(),
                source,
            })?;
        let what = if segment.generation() != granted.welcome.generation {
            Some("a generation")
        } else if segment.geometry().features.bits() != granted.welcome.features {
            Some("features")
        } else {
            None
        };
        if let Some(what) = what {
            return Err(ConnectError::Mismatch { name, what });
        }
        let link = Link {
            path,
            name,
            limits,
            connection: Some(granted.connection),
        };
        Ok((link, segment))
    }

    /// Hands the memory to the server that has the name now, or gets it before the
    /// deadline; the new generation. All that was in flight has to have ended before.
    pub(super) fn take_over(
        &mut self,
        segment: &Segment,
        deadline: Instant,
    ) -> Result<u64, ConnectError> {
        self.hang_up();
        let mut pause = FIRST_PAUSE;
        loop {
            let fds = segment.fds();
            let hello = hello(Ask::TakeOver, segment.generation(), fds.len(), self.limits);
            let error = match ask(&self.path, &self.name, &hello, &fds, deadline) {
                Ok(granted) => {
                    let generation = granted.welcome.generation;
                    self.connection = Some(granted.connection);
                    return Ok(generation);
                }
                Err(error) => error,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if !may_pass(&error) || left.is_zero() || segment.is_stopped(Side::Client) {
                return Err(error);
            }
            std::thread::sleep(pause.min(left));
            pause = (2 * pause).min(LAST_PAUSE);
        }
    }

    /// What is readable once the server is gone; none between two servers.
    pub(super) fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }

    /// Ends the connection for the server. Who watches a copy of it sees when the server
    /// has ended it too, and not before.
    pub(super) fn hang_up(&mut self) {
        if let Some(connection) = self.connection.take() {
            // Refused only where it has ended already.
            let _ = net::end_sending(&connection);
        }
    }
}

/// Whether another try may end better: there is no server yet, or the one that is
/// there has not noticed yet that its client went.
fn may_pass(error: &ConnectError) -> bool {
    match error {
        ConnectError::NoChannel { .. } | ConnectError::Closed { .. } => true,
        ConnectError::Refused { refusal, .. } => {
            // Served: by a hello of this client that it gave up, as long as that takes.
            matches!(
                refusal,
                Refusal::Clients { .. } | Refusal::Stopping | Refusal::Served { .. }
            )
        }
        _ => false,
    }
}
