//! One server of an address space: a thread with a ring of its own that lends a segment.
//!
//! ```text
//!   clients: TCP, Unix socket          loop (one thread, one ring)
//!   requests  ----- receive -----> frames --> executor --> segment, stripes
//!   replies   <---- send at once -----------------'            |
//!   clients on this host <--- map both, read only -------------+
//! ```
//! What an operation does is decided by [`crate::space::execute`], a value; here are the
//! sockets. All operations on the segment run on this thread, so each is atomic. NBD clients
//! are accepted elsewhere; those that chose an export of the space [arrive](Arrivals) here.
//!
//! - I1: a client is answered before its request is forgotten, or its connection ends; in
//!   the order of execution.
//! - I2: nobody changes the segment but this thread and, under locks that it shares with
//!   them, clients on this host that were admitted for that.
//! - I3: everything that a peer makes this server keep is bounded: connections, those that
//!   have not greeted, bytes received, replies that are not read.
//!
//! A failure of one connection ends that one; a failure of the ring ends the server, which
//! its clients learn by their connections and the liveness word.

mod commands;
mod connection;
mod core;
mod errands;
mod holes;
mod live;
mod log;
mod native;
mod nbd;
mod outbox;
mod run;
mod safety;
mod speaks;
#[cfg(test)]
mod tests;
mod writers;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use self::core::Core;
use commands::{Command, Commands};
pub use errands::{Done, Errand, Errands, Went, What};
pub use live::SpaceWatch;
use log::Log;
use nbd::Nbd;
pub use nbd::{Arrived, exports_of};
use run::{Loop, OpenDoor};
use safety::Safety;
pub use safety::{MakeSafe, Replica};
use writers::Writers;
pub use writers::WritersConfig;

use crate::engine::NbdFigures;
use crate::space::SpaceMap;
use crate::space::config::{OperationLog, SpaceLimits};
use crate::space::execute::Executor;
use crate::space::frame::Incarnation;
use crate::space::locks::Locks;
use crate::space::memory::Memory;
use crate::space::stripes::Stripes;
use crate::sys::{SysError, net};
use crate::wire::control::SpaceStatus;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On TCP; port 0 takes a free one.
    Tcp(SocketAddr),
    /// On a Unix socket of this path.
    Unix(PathBuf),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// What a server has to know.
#[derive(Debug)]
pub struct SpaceServerConfig {
    /// The map of the whole space.
    pub map: SpaceMap,
    /// This server's position in it, from 0.
    pub position: usize,
    /// The life of the segment.
    pub incarnation: Incarnation,
    /// Bounds.
    pub limits: SpaceLimits,
    /// Where it listens.
    pub doors: Vec<Place>,
    /// The segment's memory, open for reading only, for clients on this host to map; none
    /// if they are not to.
    pub data: Option<OwnedFd>,
    /// How clients on this host write it by mapping, if they may. Not together with a
    /// replica, which would not get their changes.
    pub writers: Option<WritersConfig>,
    /// The way to the other servers of the space, for NBD clients that are served here;
    /// without it they only get what lies here.
    pub errands: Option<Arc<Errands>>,
    /// What NBD clients do, if there are to be any; for the status.
    pub nbd: Option<Arc<NbdFigures>>,
    /// How changes become safe, if replies wait for that.
    pub replica: Option<Replica>,
    /// The log of operations, if there is to be one.
    pub log: Option<OperationLog>,
}

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SpaceServerError {
    /// The map has no such position, or the memory has another size.
    #[error(
        "a segment of {memory} bytes for position {position} of {servers} servers of {expected} bytes"
    )]
    Segment {
        /// The position asked for.
        position: usize,
        /// Servers that there are.
        servers: usize,
        /// Bytes of the memory.
        memory: u64,
        /// Bytes that it should have.
        expected: u64,
    },
    /// A place cannot be listened at.
    #[error("cannot listen at {place}")]
    Listen {
        /// Which.
        place: Place,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// The log of operations cannot be written.
    #[error("cannot write the log of operations beside {}", path.display())]
    Log {
        /// The path in the configuration.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The system refuses what the loop needs.
    #[error("the server of the space cannot run; `uffd-sync doctor` says what is missing")]
    Kernel(#[from] SysError),
    /// No thread.
    #[error("cannot start a thread for the server of the space")]
    Thread(#[source] std::io::Error),
    /// The thread ended before it said anything.
    #[error("the thread of the server of the space ended at its start")]
    Ended,
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct SpaceServer {
    commands: Commands,
    places: Vec<Place>,
    watch: SpaceWatch,
    thread: Option<JoinHandle<()>>,
}

/// Brings NBD clients to a server, from any thread.
#[derive(Clone, Debug)]
pub struct Arrivals(Commands);

impl Arrivals {
    /// Hands a client over; it is hung up on if too much waits for the server.
    pub fn bring(&self, arrived: Arrived) {
        self.0.send(Command::Adopt(Box::new(arrived)));
    }
}

impl SpaceServer {
    /// Listens and serves from a thread of its own until it is stopped.
    ///
    /// # Errors
    /// [`SpaceServerError`]; nothing is left running then.
    pub fn start(
        config: SpaceServerConfig,
        memory: Box<dyn Memory + Send>,
    ) -> Result<Self, SpaceServerError> {
        let servers = config.map.servers().len();
        let expected = config.map.segment_size();
        if config.position >= servers || memory.len() != expected {
            return Err(SpaceServerError::Segment {
                position: config.position,
                servers,
                memory: memory.len(),
                expected,
            });
        }
        let doors = config
            .doors
            .iter()
            .map(open)
            .collect::<Result<Vec<_>, _>>()?;
        let places = doors.iter().map(|(_, place)| place.clone()).collect();
        let doors: Vec<OpenDoor> = doors.into_iter().map(|(door, _)| door).collect();
        let (stripes, descriptors) = make_stripes(&config, expected)?;
        let errands = config.errands.clone();
        let holes = descriptors.first().map(|data| data.try_clone()).transpose();
        let holes = holes.map_err(SpaceServerError::Thread)?;
        let nbd = Nbd::new(&config.map, config.position, errands, holes);
        let writers = config.writers.as_ref();
        let writers = writers.map(|writers| make_writers(writers, &stripes, expected));
        let mut core = Core::new(&config, Executor::new(Some(stripes)), memory, nbd);
        core.writers = writers.transpose()?.flatten();
        let watch = core.watch().clone();
        if let Some(log) = &config.log {
            let figures = Arc::clone(&watch.figures);
            let started = Log::start(log, &watch.server, figures);
            core.log = Some(started.map_err(|source| SpaceServerError::Log {
                path: log.path.clone(),
                source,
            })?);
        }
        let commands = Commands::new()?;
        let replica = config.replica;
        let safety = replica.map(|replica| Safety::start(replica, commands.clone()));
        let safety = safety.transpose().map_err(SpaceServerError::Thread)?;
        let theirs = commands.clone();
        let (told, started) = mpsc::sync_channel(1);
        // The ring belongs to the thread that made it.
        let body = move || match Loop::new(core, doors, descriptors, safety, theirs) {
            Ok(made) => {
                let _ = told.send(Ok(()));
                if let Err(error) = made.run() {
                    tracing::error!(%error, "the server of the space ended");
                }
            }
            Err(error) => {
                let _ = told.send(Err(error));
            }
        };
        let thread = std::thread::Builder::new().name("space".into()).spawn(body);
        let thread = thread.map_err(SpaceServerError::Thread)?;
        started.recv().map_err(|_| SpaceServerError::Ended)??;
        Ok(Self {
            commands,
            places,
            watch,
            thread: Some(thread),
        })
    }

    /// The first TCP address that it listens at, with the real port.
    pub fn address(&self) -> Option<SocketAddr> {
        self.places.iter().find_map(|place| match place {
            Place::Tcp(address) => Some(*address),
            Place::Unix(_) => None,
        })
    }

    /// All places that it listens at, in the order of the configuration.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Where NBD clients are brought that have chosen what it serves.
    pub fn arrivals(&self) -> Arrivals {
        Arrivals(self.commands.clone())
    }

    /// Looks at it from other threads, as long as they like.
    pub fn watch(&self) -> SpaceWatch {
        self.watch.clone()
    }

    /// How it goes.
    pub fn status(&self) -> SpaceStatus {
        self.watch.status()
    }

    /// Answers what was received, and ends.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        while !self.commands.send(Command::Stop) && !thread.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.join().is_err() {
            tracing::error!("the server of the space ended by a panic");
        }
        for place in &self.places {
            if let Place::Unix(path) = place {
                // Somebody may have removed it already.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

impl Drop for SpaceServer {
    fn drop(&mut self) {
        self.end();
    }
}

/// The stripes of a segment, and what clients on this host are passed to read by them.
fn make_stripes(
    config: &SpaceServerConfig,
    segment: u64,
) -> Result<(Stripes, Vec<Arc<OwnedFd>>), SpaceServerError> {
    let stripes = match &config.writers {
        Some(_) => Stripes::create_locked(segment, config.incarnation)?,
        None => Stripes::create(segment, config.incarnation)?,
    };
    let Some(data) = &config.data else {
        return Ok((stripes, Vec::new()));
    };
    let data = data.try_clone().map_err(SpaceServerError::Thread)?;
    let descriptors = vec![Arc::new(data), stripes.descriptor()];
    Ok((stripes, descriptors))
}

/// What clients that write share with the server.
fn make_writers(
    config: &WritersConfig,
    stripes: &Stripes,
    segment: u64,
) -> Result<Option<Writers>, SpaceServerError> {
    let (Some(locks), Some(writable)) = (Locks::of(stripes), stripes.writable()) else {
        return Ok(None);
    };
    let data = config.data.try_clone().map_err(SpaceServerError::Thread)?;
    let shared = [Arc::new(data), writable];
    Ok(Some(Writers::new(locks, shared, segment, config.lease)))
}

/// A listening socket and its real place.
fn open(place: &Place) -> Result<(OpenDoor, Place), SpaceServerError> {
    let refused = |source| SpaceServerError::Listen {
        place: place.clone(),
        source,
    };
    let (socket, place) = match place {
        Place::Tcp(address) => {
            let socket = net::tcp_listen(*address).map_err(refused)?;
            let address = net::local_addr(&socket)?;
            (socket, Place::Tcp(address))
        }
        Place::Unix(path) => {
            let socket = net::unix_listen(path).map_err(refused)?;
            (socket, place.clone())
        }
    };
    let open = OpenDoor {
        socket: Arc::new(socket),
        is_local: matches!(place, Place::Unix(_)),
    };
    Ok((open, place))
}
