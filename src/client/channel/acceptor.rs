//! The server's side of the rendezvous: one thread that takes connections, answers
//! hellos, and learns from a connection's end that its client is gone.
//!
//! ```text
//! connect -> HELLO --64 bytes--> asked the host --granted--> LIVE --end--> left
//!              | 5 s, garbage        | refused or status
//!              v                     v
//!            closed <--5 s-------- ANSWER (bytes still to be sent)
//! ```
//!
//! I1. At most `MAX_CHANNEL_HALF_OPEN` connections are in HELLO or ANSWER; further ones
//!     wait in the kernel's queue, and each that is there ends at its deadline.
//! I2. A client of another user, unless that is root, gets a refusal before a byte of its is read.
//! I3. What a connection holds (its client at the host) is given back when it ends, for
//!     whatever reason.
//! I4. Without a descriptor to accept with, a reserved one is given up for the moment of
//!     a refusal: who connects learns why, and the queue does not stand.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::rendezvous::{ConnectError, is_trusted};
use crate::duplex::rendezvous::{
    Answer, Ask, ChannelName, Hello, MESSAGE_BYTES, Offer, Refusal, Welcome,
};
use crate::limits;
use crate::sys::SysError;
use crate::sys::net::{self, Blocking, PeerCredentials, Watched};
use crate::sys::process::{EventFd, effective_uid};

/// Pause after a connection that could be neither taken nor refused.
const PAUSE: Duration = Duration::from_millis(50);

/// What half-open connections may cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct HalfOpen {
    /// How many there are at most.
    pub(super) most: usize,
    /// How long a connection may take to say what it wants, and to take its answer.
    pub(super) deadline: Duration,
}

impl Default for HalfOpen {
    fn default() -> HalfOpen {
        HalfOpen {
            most: limits::MAX_CHANNEL_HALF_OPEN as usize,
            deadline: Duration::from_millis(limits::HANDSHAKE_DEADLINE_MS),
        }
    }
}

/// What a host gives to a client that joins.
pub(super) struct Joined<C> {
    /// What lives as long as the connection.
    pub(super) client: C,
    /// Descriptors that go with the answer.
    pub(super) fds: Vec<OwnedFd>,
    /// Generation of the memory.
    pub(super) generation: u64,
    /// Its feature bits.
    pub(super) features: u32,
}

/// What stands behind an acceptor: a server that is asked, in the acceptor's thread.
pub(super) trait Host: Send + 'static {
    /// What it keeps for one client; handed to [`Host::leave`] when the connection ends.
    type Client: Send;

    /// What is compared with each hello.
    fn offer(&self) -> Offer;
    /// Kind, and whatever else the answer says besides the numbers of one client.
    fn welcome(&self, version: u32) -> Welcome;
    /// A channel with memory of its own, for a client that knows these features.
    fn attach(
        &mut self,
        peer: PeerCredentials,
        known: u32,
    ) -> Result<Joined<Self::Client>, Refusal>;
    /// A channel with the memory of one whose server died.
    fn take_over(
        &mut self,
        peer: PeerCredentials,
        fds: Vec<OwnedFd>,
        generation: u64,
    ) -> Result<Joined<Self::Client>, Refusal>;
    /// Whether a client's channel has come to an end although its connection has not.
    fn has_ended(&self, client: &Self::Client) -> bool;
    /// The client hung up, or the server stops. Closing `socket` tells the client that
    /// nobody uses its channel's memory here any more.
    fn leave(&self, client: Self::Client, socket: OwnedFd);
    /// The state of the server and of its `clients` as JSON, at most
    /// `MAX_CHANNEL_STATUS` bytes.
    fn status(&self, clients: &mut dyn Iterator<Item = &Self::Client>) -> Vec<u8>;
}

/// Makes an acceptor's thread look at its stop flag.
#[derive(Clone, Debug)]
pub(super) struct Bell {
    event: Arc<EventFd>,
    stop: Arc<AtomicBool>,
}

impl Bell {
    pub(super) fn new() -> Result<Bell, SysError> {
        Ok(Bell {
            event: Arc::new(EventFd::new()?),
            stop: Arc::default(),
        })
    }

    fn stop(&self) {
        // SYNC(acceptor_stop): read by `Loop::run` after the bell; pairs with its load.
        self.stop.store(true, Ordering::Release);
        self.event.ring();
    }

    fn is_stopping(&self) -> bool {
        // SYNC(acceptor_stop): pairs with the store in `stop`.
        self.stop.load(Ordering::Acquire)
    }
}

/// A name taken: the socket that listens and its file, which goes with it.
#[derive(Debug)]
struct Name {
    listener: OwnedFd,
    path: PathBuf,
    inode: u64,
}

impl Name {
    fn take(path: &Path, name: &ChannelName) -> Result<Name, ConnectError> {
        let failed = |source: SysError| {
            let (name, path) = (name.clone(), path.to_owned());
            match source.raw_os_error() {
                Some(nix::libc::EADDRINUSE) => ConnectError::NameTaken { name, path },
                _ => ConnectError::Socket { name, path, source },
            }
        };
        let listener = net::unix_listen(path).map_err(failed)?;
        let inode = inode_of(path).unwrap_or(0);
        Ok(Name {
            listener,
            path: path.to_owned(),
            inode,
        })
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // Only our own: somebody may have removed it and taken the name since. While the
        // listener is open no other server takes the file for a stale one.
        if inode_of(&self.path) == Some(self.inode) {
            // A file that cannot be removed is a stale one for the next server.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    std::fs::symlink_metadata(path)
        .ok()
        .map(|found| found.ino())
}

/// A listening name and the thread that answers there; ends both when dropped.
#[derive(Debug)]
pub(super) struct Acceptor {
    bell: Bell,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    /// Takes the name and begins to answer.
    pub(super) fn start<H: Host>(
        path: &Path,
        name: &ChannelName,
        bell: Bell,
        host: H,
        half_open: HalfOpen,
    ) -> Result<Acceptor, ConnectError> {
        let accepting = Loop {
            name: Name::take(path, name)?,
            half_open,
            reserve: File::open("/dev/null").ok(),
            bell: bell.clone(),
            host,
            connections: Vec::new(),
            own: effective_uid(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("accept-{name}"))
            .spawn(move || accepting.run())
            .map_err(|source| ConnectError::Io {
                name: name.clone(),
                source: SysError::new("starting the thread that accepts clients", source),
            })?;
        let thread = Some(thread);
        Ok(Acceptor { bell, thread })
    }

    /// Gives the name back and ends all connections; returns when that is done.
    pub(super) fn stop(&mut self) {
        self.bell.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has ended it as well.
            let _ = thread.join();
        }
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A connection between its accept and its end.
struct Connection<C> {
    stage: Stage<C>,
    socket: OwnedFd,
    peer: PeerCredentials,
}

enum Stage<C> {
    Hello {
        bytes: Vec<u8>,
        fds: Vec<OwnedFd>,
        deadline: Instant,
    },
    Answer {
        bytes: Vec<u8>,
        sent: usize,
        deadline: Instant,
    },
    Live(C),
}

impl<C> Stage<C> {
    fn deadline(&self) -> Option<Instant> {
        match self {
            Stage::Hello { deadline, .. } | Stage::Answer { deadline, .. } => Some(*deadline),
            Stage::Live(_) => None,
        }
    }
}

/// What becomes of a connection that was looked at.
enum Next {
    Stays,
    Ends,
}

struct Loop<H: Host> {
    name: Name,
    half_open: HalfOpen,
    reserve: Option<File>,
    bell: Bell,
    host: H,
    connections: Vec<Connection<H::Client>>,
    own: u32,
}

impl<H: Host> Loop<H> {
    fn run(mut self) {
        while !self.bell.is_stopping() {
            let (ready, may_accept) = self.wait();
            self.bell.event.drain();
            // From the last to the first, so that one that ends moves none not yet seen.
            for at in (0..self.connections.len()).rev() {
                if matches!(self.look_at(at, ready[at]), Next::Ends) {
                    let ended = self.connections.swap_remove(at);
                    self.end(ended);
                }
            }
            if may_accept {
                self.accept();
            }
        }
        for connection in std::mem::take(&mut self.connections) {
            self.end(connection);
        }
    }

    fn end(&self, connection: Connection<H::Client>) {
        if let Stage::Live(client) = connection.stage {
            self.host.leave(client, connection.socket);
        }
    }

    /// Waits for something to do; which connections are ready, and whether one waits to
    /// be accepted.
    fn wait(&self) -> (Vec<bool>, bool) {
        let mut watched = vec![watch(&*self.bell.event, false)];
        watched.extend(self.connections.iter().map(|connection| {
            let for_room = matches!(connection.stage, Stage::Answer { .. });
            watch(&connection.socket, for_room)
        }));
        let deadlines = self.connections.iter().filter_map(|c| c.stage.deadline());
        if deadlines.clone().count() < self.half_open.most {
            watched.push(watch(&self.name.listener, false));
        }
        let timeout = deadlines.min().map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            left + Duration::from_millis(1)
        });
        if net::poll_each(&mut watched, timeout).is_err() {
            // Out of kernel memory for the call itself: once more, a little later.
            std::thread::sleep(PAUSE);
        }
        let count = self.connections.len();
        let ready = watched[1..=count].iter().map(|one| one.ready).collect();
        (ready, watched.get(count + 1).is_some_and(|one| one.ready))
    }

    fn accept(&mut self) {
        match net::try_accept(&self.name.listener) {
            Ok(socket) => self.greet(socket),
            Err(error) if error.is_would_block() => {}
            Err(error) => self.refuse_without_descriptor(&error),
        }
        if self.reserve.is_none() {
            self.reserve = File::open("/dev/null").ok();
        }
    }

    fn greet(&mut self, socket: OwnedFd) {
        // Who cannot be asked for credentials is gone already.
        let Ok(peer) = net::peer_credentials(&socket) else {
            return;
        };
        if !is_trusted(peer.uid, self.own) {
            let (server, client) = (self.own, peer.uid);
            refuse(&socket, Refusal::User { server, client });
            return;
        }
        let stage = Stage::Hello {
            bytes: Vec::with_capacity(MESSAGE_BYTES),
            fds: Vec::new(),
            deadline: Instant::now() + self.half_open.deadline,
        };
        self.connections.push(Connection {
            socket,
            peer,
            stage,
        });
    }

    /// Takes the connection with the reserved descriptor and says why it ends.
    fn refuse_without_descriptor(&mut self, error: &SysError) {
        tracing::warn!(%error, "a client cannot be accepted");
        if self.reserve.take().is_none() {
            std::thread::sleep(PAUSE);
            return;
        }
        if let Ok(socket) = net::try_accept(&self.name.listener) {
            refuse(&socket, resources(error));
        }
    }

    fn look_at(&mut self, at: usize, ready: bool) -> Next {
        let connection = &mut self.connections[at];
        let now = Instant::now();
        if connection.stage.deadline().is_some_and(|end| end <= now) {
            tracing::debug!(pid = connection.peer.pid, "a client took too long");
            return Next::Ends;
        }
        match &mut connection.stage {
            Stage::Live(client) => {
                // Nothing is said on a live connection: what can be read is its end.
                if ready || self.host.has_ended(client) {
                    tracing::debug!(pid = connection.peer.pid, "a client is gone");
                    return Next::Ends;
                }
                Next::Stays
            }
            Stage::Answer { bytes, sent, .. } => match send(&connection.socket, bytes, sent) {
                Ok(false) => Next::Stays,
                Ok(true) | Err(_) => Next::Ends,
            },
            Stage::Hello { bytes, fds, .. } if ready => {
                match receive(&connection.socket, bytes, fds) {
                    Ok(true) => self.answer(at),
                    Ok(false) => Next::Stays,
                    Err(refusal) => {
                        if let Some(refusal) = refusal {
                            refuse(&connection.socket, refusal);
                        }
                        Next::Ends
                    }
                }
            }
            Stage::Hello { .. } => Next::Stays,
        }
    }

    /// A hello is whole: does what it asks.
    fn answer(&mut self, at: usize) -> Next {
        let connection = &mut self.connections[at];
        let Stage::Hello { bytes, fds, .. } = &mut connection.stage else {
            return Next::Ends;
        };
        let fds = std::mem::take(fds);
        let hello = <&[u8; MESSAGE_BYTES]>::try_from(&bytes[..])
            .ok()
            .and_then(|bytes| Hello::decode(bytes).ok())
            .filter(|hello| hello.fds as usize == fds.len());
        let peer = connection.peer;
        let asked = match hello {
            Some(hello) => self.ask(peer, &hello, fds),
            None => Err(Refusal::Malformed),
        };
        let connection = &mut self.connections[at];
        let (stage, bytes, fds) = match asked {
            Ok(Asked::Joined(welcome, joined)) => {
                let bytes = Answer::Welcome(welcome).encode().to_vec();
                (Some(Stage::Live(joined.client)), bytes, joined.fds)
            }
            Ok(Asked::Status(welcome, body)) => {
                let mut bytes = Answer::Welcome(welcome).encode().to_vec();
                bytes.extend_from_slice(&body);
                (None, bytes, Vec::new())
            }
            Err(refusal) => {
                tracing::info!(pid = peer.pid, %refusal, "refused a client");
                let bytes = Answer::Refused(refusal).encode().to_vec();
                (None, bytes, Vec::new())
            }
        };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent = match net::try_send_with_fds(&connection.socket, &bytes, &fds) {
            Ok(sent) => sent,
            Err(error) => {
                tracing::debug!(pid = peer.pid, %error, "a client went before its answer");
                return Next::Ends;
            }
        };
        match stage {
            // A socket that nothing was sent on takes an answer whole.
            Some(_) if sent < bytes.len() => return Next::Ends,
            Some(stage) => connection.stage = stage,
            None if sent == bytes.len() => return Next::Ends,
            None => {
                connection.stage = Stage::Answer {
                    bytes,
                    sent,
                    deadline: Instant::now() + self.half_open.deadline,
                }
            }
        }
        Next::Stays
    }

    fn ask(
        &mut self,
        peer: PeerCredentials,
        hello: &Hello,
        fds: Vec<OwnedFd>,
    ) -> Result<Asked<H::Client>, Refusal> {
        // A state can be asked for by every version: it has no layout.
        if hello.ask == Ask::Status {
            let live = self.connections.iter().filter_map(|c| match &c.stage {
                Stage::Live(client) => Some(client),
                _ => None,
            });
            let body = self.host.status(&mut { live });
            let mut welcome = self.host.welcome(hello.versions.1);
            (welcome.features, welcome.body_bytes) = (0, body.len() as u32);
            return Ok(Asked::Status(welcome, body));
        }
        let version = self.host.offer().compare(hello)?;
        let joined = match hello.ask {
            Ask::TakeOver => self.host.take_over(peer, fds, hello.generation)?,
            _ => self.host.attach(peer, hello.features)?,
        };
        let mut welcome = self.host.welcome(version);
        welcome.generation = joined.generation;
        welcome.features = joined.features;
        welcome.fds = joined.fds.len() as u32;
        Ok(Asked::Joined(welcome, joined))
    }
}

enum Asked<C> {
    Joined(Welcome, Joined<C>),
    Status(Welcome, Vec<u8>),
}

fn watch(fd: &impl AsFd, for_room: bool) -> Watched<'_> {
    Watched {
        fd: fd.as_fd(),
        for_room,
        ready: false,
    }
}

/// The refusal that says what the kernel ran out of.
pub(super) fn resources(error: &SysError) -> Refusal {
    let errno = error.raw_os_error().unwrap_or(0).unsigned_abs();
    Refusal::Resources { errno }
}

/// Says why, if the socket takes it at once; the connection ends after it.
fn refuse(socket: &OwnedFd, refusal: Refusal) {
    // Who does not take it sees the end without a reason.
    let _ = net::try_send_with_fds(socket, &Answer::Refused(refusal).encode(), &[]);
}

/// Sends what is left; true when all is sent.
fn send(socket: &OwnedFd, bytes: &[u8], sent: &mut usize) -> Result<bool, SysError> {
    match net::try_send_with_fds(socket, &bytes[*sent..], &[]) {
        Ok(count) => *sent += count,
        Err(error) if error.is_would_block() => {}
        Err(error) => return Err(error),
    }
    Ok(*sent == bytes.len())
}

/// Takes what has come of a hello; true when it is whole, the refusal (none for an end)
/// when it never will be.
fn receive(
    socket: &OwnedFd,
    bytes: &mut Vec<u8>,
    fds: &mut Vec<OwnedFd>,
) -> Result<bool, Option<Refusal>> {
    let mut room = [0; MESSAGE_BYTES];
    let room = &mut room[..MESSAGE_BYTES - bytes.len()];
    let max_fds = limits::MAX_CHANNEL_FDS as usize;
    let received = match net::recv_with_fds(socket, room, max_fds, Blocking::No) {
        Ok(received) if received.bytes == 0 => return Err(None),
        Ok(received) => received,
        Err(error) if error.is_would_block() => return Ok(false),
        Err(_) => return Err(None),
    };
    if received.truncated && received.fds.len() < max_fds {
        let errno = nix::libc::EMFILE.unsigned_abs();
        return Err(Some(Refusal::Resources { errno }));
    }
    if received.truncated || fds.len() + received.fds.len() > max_fds {
        return Err(Some(Refusal::Malformed));
    }
    fds.extend(received.fds);
    bytes.extend_from_slice(&room[..received.bytes]);
    Ok(bytes.len() == MESSAGE_BYTES)
}
