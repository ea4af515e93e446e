//! `serve --nbd`: whoever speaks NBD reads the regions of the node by name, and reads and
//! writes the space that it lends a segment to.
//!
//! ```text
//! listeners --> accepting thread --> a thread per client --> region, read only
//!                                             \--> the space's loop, with the connection
//! ```
//! A thread per client: a read of a replica may wait for an update to end, which no loop
//! with other work should.
//!
//! - I1: at most [`MAX_NBD_CLIENTS`] are served, here and by the space's loop; more are hung
//!   up on. Of those that have not chosen at most [`MAX_HALF_OPEN`]: then the one that was
//!   there for longest goes.
//! - I2: dropping the service ends all its threads.

mod catalog;
mod guest;
mod memory;
mod place;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use catalog::{Peer, Visible};
use guest::Link;
pub use place::{NBD_PORT, NbdPlace, NbdPlaceError};

use super::config::{NodeConfig, is_loopback};
use crate::engine::space::Arrivals;
use crate::engine::{Commands, NbdFigures};
use crate::limits::{MAX_HALF_OPEN, MAX_NBD_CLIENTS};
use crate::nbd::Exports;
use crate::sys::net::{self, Watched};
use crate::sys::process::EventFd;
use crate::sys::{SysError, stream};

/// How long nobody is accepted after that has failed, as it does without descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Why NBD clients cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The address means nothing here.
    #[error("--nbd {place}: there is no address of that host")]
    Address {
        /// What was asked for.
        place: NbdPlace,
        /// What the resolver said.
        #[source]
        source: Option<io::Error>,
    },
    /// Other hosts reach the address, and nothing protects it.
    #[error(
        "--nbd {place}: {address} can be reached from other hosts and nothing encrypts or \
         authenticates it; use a loopback address such as 127.0.0.1, or pass --insecure if the \
         network is trusted"
    )]
    Exposed {
        /// What was asked for.
        place: NbdPlace,
        /// Its address.
        address: SocketAddr,
    },
    /// The place cannot be listened at.
    #[error("--nbd {place}: cannot listen there")]
    Listen {
        /// What was asked for.
        place: NbdPlace,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// The kernel refuses what the service needs.
    #[error("NBD clients cannot be served")]
    System(#[from] SysError),
    /// No thread.
    #[error("cannot start a thread for NBD clients")]
    Thread(#[source] io::Error),
}

/// What is served of a space.
#[derive(Debug)]
pub(super) struct OfSpace {
    pub(super) exports: Exports,
    pub(super) arrivals: Arrivals,
}

/// What all clients share.
#[derive(Debug)]
struct Shared {
    commands: Commands,
    figures: Arc<NbdFigures>,
    space: Option<OfSpace>,
    stopping: AtomicBool,
    /// Rings when a client's thread has ended, and at the end.
    bell: EventFd,
}

impl Shared {
    fn is_stopping(&self) -> bool {
        // SYNC(nbd_stop): pairs with the drop of the service.
        self.stopping.load(Ordering::Acquire)
    }
}

/// A running service; ends when dropped.
#[derive(Debug)]
pub(super) struct Service {
    shared: Arc<Shared>,
    paths: Vec<PathBuf>,
    thread: Option<JoinHandle<()>>,
}

struct Listener {
    socket: OwnedFd,
    is_local: bool,
}

struct Client {
    link: Arc<Link>,
    thread: JoinHandle<()>,
}

impl Service {
    /// Listens at the places of `config`.
    ///
    /// # Errors
    /// [`NbdError`]; nothing is left running then.
    pub(super) fn start(
        config: &NodeConfig,
        commands: &Commands,
        figures: Arc<NbdFigures>,
        space: Option<OfSpace>,
    ) -> Result<Self, NbdError> {
        let mut service = Self {
            shared: Arc::new(Shared {
                commands: commands.clone(),
                figures,
                space,
                stopping: AtomicBool::new(false),
                bell: EventFd::new()?,
            }),
            paths: Vec::new(),
            thread: None,
        };
        let mut listeners = Vec::new();
        for place in &config.nbd {
            let listener = listen(place, config.insecure)?;
            if let NbdPlace::Unix(path) = place {
                service.paths.push(path.clone());
            }
            listeners.push(listener);
        }
        let shared = Arc::clone(&service.shared);
        let body = move || Door::new(shared, listeners).run();
        let thread = std::thread::Builder::new().name("nbd".into()).spawn(body);
        service.thread = Some(thread.map_err(NbdError::Thread)?);
        Ok(service)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // SYNC(nbd_stop): seen at the latest when the bell rings or a socket ends.
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.bell.ring();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the service of NBD clients ended by a panic");
        }
        for path in &self.paths {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn listen(place: &NbdPlace, insecure: bool) -> Result<Listener, NbdError> {
    let refused = |source| NbdError::Listen {
        place: place.clone(),
        source,
    };
    let (socket, is_local) = match place {
        NbdPlace::Unix(path) => (net::unix_listen(path).map_err(refused)?, true),
        NbdPlace::Tcp(host) => {
            let nowhere = |source| NbdError::Address {
                place: place.clone(),
                source,
            };
            let found = (host.host.as_str(), host.port).to_socket_addrs();
            let mut found = found.map_err(|error| nowhere(Some(error)))?;
            let address = found.next().ok_or_else(|| nowhere(None))?;
            if !insecure && !is_loopback(address.ip()) {
                let place = place.clone();
                return Err(NbdError::Exposed { place, address });
            }
            (net::tcp_listen(address).map_err(refused)?, false)
        }
    };
    match net::local_addr(&socket) {
        Ok(address) if !is_local => tracing::info!(%address, "serves NBD"),
        _ => tracing::info!(%place, "serves NBD"),
    }
    Ok(Listener { socket, is_local })
}

/// Who accepts.
struct Door {
    shared: Arc<Shared>,
    listeners: Vec<Listener>,
    /// In the order of their arrival.
    clients: Vec<Client>,
}

impl Door {
    fn new(shared: Arc<Shared>, listeners: Vec<Listener>) -> Self {
        Self {
            shared,
            listeners,
            clients: Vec::new(),
        }
    }

    fn run(mut self) {
        let mut resting = false;
        loop {
            let ready = self.wait(resting);
            self.shared.bell.drain();
            if self.shared.is_stopping() {
                break;
            }
            self.clients.retain(|client| !client.thread.is_finished());
            resting = false;
            for at in ready {
                let listener = &self.listeners[at];
                match net::try_accept(&listener.socket) {
                    Ok(socket) => self.admit(socket, self.listeners[at].is_local),
                    Err(error) if error.is_would_block() => {}
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept an NBD client");
                        resting = true;
                    }
                }
            }
        }
        for client in &self.clients {
            client.link.hang_up();
        }
        for client in self.clients {
            if client.thread.join().is_err() {
                tracing::error!("the thread of an NBD client ended by a panic");
            }
        }
    }

    /// Waits for the bell and, unless that is to rest, for clients; at which listeners.
    fn wait(&self, resting: bool) -> Vec<usize> {
        let sockets = self.listeners.iter().map(|one| one.socket.as_fd());
        let sockets = sockets.take(if resting { 0 } else { usize::MAX });
        let bell = std::iter::once(self.shared.bell.as_fd());
        let mut watched: Vec<_> = bell
            .chain(sockets)
            .map(|fd| Watched {
                fd,
                for_room: false,
                ready: false,
            })
            .collect();
        // What poll cannot do, the next turn meets again.
        let _ = net::poll_each(&mut watched, resting.then_some(PAUSE));
        let ready = watched[1..].iter().enumerate();
        ready
            .filter(|(_, one)| one.ready)
            .map(|(at, _)| at)
            .collect()
    }

    fn admit(&mut self, socket: OwnedFd, is_local: bool) {
        let peer = if is_local {
            match net::peer_credentials(&socket) {
                Ok(peer) => Peer::Local(peer.uid),
                Err(error) => {
                    tracing::warn!(%error, "an NBD client without credentials");
                    return;
                }
            }
        } else {
            Peer::Remote
        };
        let Some(seat) = self.shared.figures.seat(MAX_NBD_CLIENTS) else {
            tracing::info!(limit = MAX_NBD_CLIENTS, "an NBD client was turned away");
            return;
        };
        let half_open = || self.clients.iter().filter(|one| one.link.is_half_open());
        if half_open().count() as u64 >= MAX_HALF_OPEN
            && let Some(eldest) = half_open().next()
        {
            eldest.link.give_up();
        }
        // A Unix socket has no delay to switch off, and no host to lose.
        let _ = net::set_nodelay(&socket);
        let _ = stream::keep_alive(&socket);
        let link = Link::new(socket);
        let visible = Arc::new(Visible {
            shared: Arc::clone(&self.shared),
            peer,
        });
        let (theirs, shared) = (Arc::clone(&link), Arc::clone(&self.shared));
        let body = move || {
            guest::serve(&theirs, visible, seat);
            shared.bell.ring();
        };
        let started = std::thread::Builder::new()
            .name("nbd-client".into())
            .spawn(body);
        match started {
            Ok(thread) => self.clients.push(Client { link, thread }),
            Err(error) => tracing::warn!(%error, "an NBD client gets no thread"),
        }
    }
}
