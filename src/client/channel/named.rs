//! A server under a name: the acceptor in front of an [`InPlaceDuplexServer`], and what
//! connects the two.
//!
//! ```text
//! Acceptor thread --attach, take over--> Registry --serve_segment--> InPlaceDuplexServer
//!     |  a connection's end                 |  one handle per client      |  threads
//!     '---------- Client dropped ---------->'-- stop of that channel ---->'
//! ```
//!
//! I1. A client has a place as long as it is connected. Channels of clients that are
//!     gone, whose requests are still in the handler, are at most as many again.
//! I2. Memory that is handed over is opened as anything from a stranger; a server that
//!     is alive, or another generation than the hello's, refuses it.
//! I3. Stop ends in this order: no new client, the channels (each client is told), the
//!     connections, the name.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::acceptor::{Acceptor, Bell, HalfOpen, Host, Joined, resources};
use super::report::{ClientStatus, ServerStatus};
use super::server::Served;
use super::{
    ChannelError, ChannelHandle, Frame, HandlerError, HandlerFailure, InPlaceDuplexServer,
    ServerOptions,
};
use crate::duplex::layout::LAYOUT_VERSION;
use crate::duplex::rendezvous::{ChannelKind, ChannelName, Offer, Refusal, Welcome};
use crate::duplex::{
    BufferConfig, DuplexError, Features, OpenLimits, Presence, Segment, Side, Waiting,
};
use crate::limits;
use crate::shm::PeerTrust;
use crate::sys::net::PeerCredentials;
use crate::sys::process::{deadline_in, process_id};

/// Longest description, in bytes.
const MAX_DESCRIPTION: usize = 64;
/// Pause between two looks at a channel that is to end.
const LOOK: Duration = Duration::from_millis(1);

/// A server of in-place channels that clients find by its name; it stops when it is
/// dropped.
///
/// Memory: that of one [`BufferConfig`] for each connected client.
#[derive(Debug)]
pub struct NamedServer {
    registry: Arc<Registry>,
    socket: PathBuf,
    name: ChannelName,
    acceptor: Option<Acceptor>,
}

/// What the acceptor's thread and the server's owner share.
#[derive(Debug)]
struct Registry {
    server: InPlaceDuplexServer,
    config: BufferConfig,
    features: Features,
    name: ChannelName,
    /// Bytes of metadata that its memory has room for.
    metadata_capacity: u64,
    metadata: OnceLock<Vec<u8>>,
    description: Mutex<String>,
    served: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    total: u64,
    connected: usize,
    channels: Vec<ChannelHandle>,
}

impl NamedServer {
    pub(super) fn new(
        socket: PathBuf,
        name: &ChannelName,
        config: BufferConfig,
        options: ServerOptions,
    ) -> Result<NamedServer, ChannelError> {
        let most = limits::MAX_CHANNEL_CLIENTS as usize;
        let most = if config.is_view() { 1 } else { most };
        if options.max_clients == 0 || options.max_clients > most {
            let clients = options.max_clients;
            return Err(ChannelError::Clients { clients, most });
        }
        // Impossible numbers are found before the name is taken.
        let geometry = *Segment::create(&config)?.geometry();
        let registry = Arc::new(Registry {
            server: InPlaceDuplexServer::new(options)?,
            config,
            features: geometry.features,
            name: name.clone(),
            metadata_capacity: geometry.metadata_capacity(),
            metadata: OnceLock::new(),
            description: Mutex::default(),
            served: Mutex::default(),
        });
        let host = ChannelHost(Arc::clone(&registry));
        let bell = Bell::new()?;
        let acceptor = Acceptor::start(&socket, name, bell, host, HalfOpen::default())?;
        Ok(NamedServer {
            registry,
            socket,
            name: name.clone(),
            acceptor: Some(acceptor),
        })
    }

    /// Sets the handler; from now on clients are taken. See [`InPlaceDuplexServer::start`].
    ///
    /// # Errors
    /// [`ChannelError::StartedTwice`].
    pub fn start(
        &self,
        handler: impl Fn(&mut Frame<'_>) -> Result<(), HandlerError> + Send + Sync + 'static,
    ) -> Result<(), ChannelError> {
        self.registry.server.start(handler)
    }

    /// As [`NamedServer::start`], for clients that are trusted: see
    /// [`InPlaceDuplexServer::start_trusting`].
    ///
    /// # Errors
    /// [`ChannelError::StartedTwice`].
    pub fn start_trusting(
        &self,
        trust: PeerTrust,
        handler: impl Fn(&mut Frame<'_>) -> Result<(), HandlerError> + Send + Sync + 'static,
    ) -> Result<(), ChannelError> {
        self.registry.server.start_trusting(trust, handler)
    }

    /// Called once per client with its metadata; set it before [`NamedServer::start`].
    pub fn on_init(&self, callback: impl Fn(&[u8]) + Send + Sync + 'static) {
        self.registry.server.on_init(callback);
    }

    /// Called for each request that failed; set it before [`NamedServer::start`].
    pub fn on_error(&self, callback: impl Fn(&HandlerFailure) + Send + Sync + 'static) {
        self.registry.server.on_error(callback);
    }

    /// Sets the metadata that each client finds from its first moment on
    /// ([`super::DuplexClient::metadata`]), once; set it before [`NamedServer::start`].
    /// Memory that comes from a former server keeps what that one wrote.
    ///
    /// # Errors
    /// [`DuplexError::MetadataTooLong`], [`DuplexError::MetadataTwice`].
    pub fn set_metadata(&self, bytes: &[u8]) -> Result<(), ChannelError> {
        let (len, capacity) = (bytes.len() as u64, self.registry.metadata_capacity);
        if len > capacity {
            return Err(DuplexError::MetadataTooLong { len, capacity }.into());
        }
        let set = self.registry.metadata.set(bytes.to_vec());
        set.map_err(|_| DuplexError::MetadataTwice.into())
    }

    /// What its status says that it does; cut at 64 bytes.
    pub fn describe(&self, text: &str) {
        let mut description = lock(&self.registry.description);
        description.clear();
        for character in text.chars() {
            if description.len() + character.len_utf8() > MAX_DESCRIPTION {
                break;
            }
            description.push(character);
        }
    }

    /// Its name.
    pub fn name(&self) -> &ChannelName {
        &self.name
    }

    /// The socket that clients connect to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether it has a handler and was not stopped.
    pub fn is_running(&self) -> bool {
        self.registry.server.is_running()
    }

    /// The memory of each client's channel that is served.
    pub fn segments(&self) -> Vec<Segment> {
        let served = lock(&self.registry.served);
        let running = served.channels.iter().filter(|c| !c.is_finished());
        running.map(|c| c.segment().clone()).collect()
    }

    /// The server and its clients, as others see it too.
    ///
    /// # Errors
    /// [`ChannelError::Connect`] if it does not answer itself any more.
    pub fn status(&self) -> Result<ServerStatus, ChannelError> {
        super::factory::status_at(&self.socket, &self.name)
    }

    /// Ends it: requests that are there are answered, clients are told, the name is
    /// free. Waits for handlers that run, for at most 3 s beside the drain that its
    /// options allow; one that takes longer goes on by itself.
    pub fn stop(&mut self) {
        self.registry.stop();
        self.acceptor = None;
    }
}

impl Drop for NamedServer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Registry {
    fn stop(&self) {
        self.server.stop();
        let patience = Duration::from_millis(limits::DRAIN_DEADLINE_MS);
        let deadline = deadline_in(patience.saturating_add(self.server.options().drain));
        let channels = std::mem::take(&mut lock(&self.served).channels);
        for channel in channels {
            while !channel.is_finished() && Instant::now() < deadline {
                std::thread::sleep(LOOK);
            }
            if channel.is_finished() {
                channel.join();
            }
        }
    }

    fn serve(
        self: &Arc<Self>,
        peer: PeerCredentials,
        segment: &Segment,
        take_over: bool,
    ) -> Result<Client, Refusal> {
        if let Some(metadata) = self.metadata.get() {
            // It fits; what stands there already is a former server's.
            let _ = segment.set_metadata(Side::Server, metadata);
        }
        let handle = self.server.serve_segment(segment, take_over);
        let handle = handle.map_err(|error| match &error {
            ChannelError::Stopped | ChannelError::NotStarted => Refusal::Stopping,
            ChannelError::Sys(error) => resources(error),
            ChannelError::Thread(error) => {
                let errno = error.raw_os_error().unwrap_or(0).unsigned_abs();
                Refusal::Resources { errno }
            }
            _ => Refusal::Memory,
        })?;
        let channel = handle.served();
        let mut served = lock(&self.served);
        served.channels.retain(|channel| !channel.is_finished());
        served.total += 1;
        served.connected += 1;
        served.channels.push(handle);
        drop(served);
        Ok(Client {
            registry: Arc::clone(self),
            pid: peer.pid,
            served: channel,
        })
    }

    fn check_room(&self) -> Result<(), Refusal> {
        if !self.server.is_running() {
            return Err(Refusal::Stopping);
        }
        let max = self.server.options().max_clients;
        let connected = lock(&self.served).connected;
        // The memory of a view is one channel's until that has ended.
        let most = if self.config.is_view() { max } else { 2 * max };
        if connected < max && self.server.clients() < most {
            return Ok(());
        }
        Err(Refusal::Clients {
            clients: connected as u32,
            max: max as u32,
        })
    }
}

/// A client as long as its connection lives; its channel ends with it.
struct Client {
    registry: Arc<Registry>,
    pid: i32,
    served: Served,
}

impl Client {
    fn status(&self) -> Option<ClientStatus> {
        let segment = self.served.segment();
        segment.mirror(Side::Server);
        let status = segment.status().ok()?;
        Some(ClientStatus {
            pid: self.pid,
            id: status.id.to_string(),
            generation: status.generation,
            requests: status.requests,
            requests_read: status.requests_read,
            responses: status.responses,
            responses_read: status.responses_read,
            failed: status.failed,
            payload_bytes: status.geometry.payload_size,
            free_bytes: status.free_bytes,
            resident_bytes: status.resident_bytes,
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Its liveness word may never have been held: the connection's end counts as well.
        // Not joined: its handler may run for long. It is forgotten when it has ended.
        self.served.client_left();
        lock(&self.registry.served).connected -= 1;
    }
}

struct ChannelHost(Arc<Registry>);

impl Host for ChannelHost {
    type Client = Client;

    fn offer(&self) -> Offer {
        Offer {
            versions: (LAYOUT_VERSION, LAYOUT_VERSION),
            features: (self.0.features - Features::OPTIONAL).bits(),
        }
    }

    fn welcome(&self, version: u32) -> Welcome {
        Welcome {
            version,
            features: self.0.features.bits(),
            kind: ChannelKind::InPlace,
            generation: 0,
            fds: 0,
            body_bytes: 0,
        }
    }

    fn attach(&mut self, peer: PeerCredentials, known: u32) -> Result<Joined<Client>, Refusal> {
        self.0.check_room()?;
        let known = Features::from_bits_truncate(known);
        let segment =
            Segment::create_for(&self.0.config, known).map_err(|error| refusal_of(&error))?;
        let copies = segment
            .fds()
            .iter()
            .map(|fd| fd.try_clone_to_owned())
            .collect();
        let fds: Vec<OwnedFd> = match copies {
            Ok(fds) => fds,
            Err(error) => {
                let error: std::io::Error = error;
                let errno = error.raw_os_error().unwrap_or(0).unsigned_abs();
                return Err(Refusal::Resources { errno });
            }
        };
        let client = self.0.serve(peer, &segment, false)?;
        Ok(Joined {
            client,
            fds,
            generation: segment.generation(),
            features: segment.geometry().features.bits(),
        })
    }

    fn take_over(
        &mut self,
        peer: PeerCredentials,
        fds: Vec<OwnedFd>,
        generation: u64,
    ) -> Result<Joined<Client>, Refusal> {
        self.0.check_room()?;
        let limits = OpenLimits {
            failpoints: self.0.features.contains(Features::FAILPOINTS),
            ..OpenLimits::default()
        };
        let segment = Segment::open(fds, limits);
        let segment = segment.and_then(|segment| segment.served_as(&self.0.config));
        let segment = segment.map_err(|error| refusal_of(&error))?;
        let has_server = segment.presence(Side::Server) == Presence::Alive;
        if has_server || segment.generation() != generation {
            let generation = segment.generation();
            return Err(Refusal::Served { generation });
        }
        let client = self.0.serve(peer, &segment, true)?;
        Ok(Joined {
            client,
            fds: Vec::new(),
            generation: segment.generation(),
            features: segment.geometry().features.bits(),
        })
    }

    fn has_ended(&self, client: &Client) -> bool {
        client.served.is_finished()
    }

    fn leave(&self, client: Client, socket: OwnedFd) {
        client.served.close_at_end(socket);
    }

    fn status(&self, clients: &mut dyn Iterator<Item = &Client>) -> Vec<u8> {
        let options = self.0.server.options();
        let waiting = match options.waiting {
            Waiting::Spin => "spin",
            Waiting::Park => "park",
            Waiting::Adaptive => "adaptive",
        };
        let status = ServerStatus {
            name: self.0.name.to_string(),
            kind: "in-place".to_owned(),
            pid: process_id(),
            operation: lock(&self.0.description).clone(),
            workers: options.workers as u32,
            waiting: waiting.to_owned(),
            max_clients: options.max_clients as u32,
            clients_total: lock(&self.0.served).total,
            clients: clients.filter_map(Client::status).collect(),
        };
        serde_json::to_vec(&status).unwrap_or_default()
    }
}

fn refusal_of(error: &DuplexError) -> Refusal {
    match error {
        DuplexError::Sys { source, .. } => resources(source),
        _ => Refusal::Memory,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a status costs at most: the fields of a client with all digits they can have.
const CLIENT_STATUS_BYTES: u64 = 512;

const _: () = assert!(
    (limits::MAX_CHANNEL_CLIENTS + 1) * CLIENT_STATUS_BYTES <= limits::MAX_CHANNEL_STATUS,
    "the status of all clients is a status"
);
