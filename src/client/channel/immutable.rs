//! Channels of two buffers under the same names, and a client that takes either kind.
//!
//! | at the name | what a client becomes |
//! |---|---|
//! | a socket whose server attaches it | in place, of the version and features that both have |
//! | a socket whose server says that it has two buffers | a client of version 1 |
//! | no socket, but the shared memory of a version 1 server of any implementation | a client of version 1 |

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::acceptor::{Acceptor, Bell, HalfOpen, Host, Joined};
use super::report::ServerStatus;
use super::{ChannelError, ConnectError, DuplexClient};
use crate::duplex::layout::LAYOUT_VERSION;
use crate::duplex::rendezvous::{ChannelKind, ChannelName, Offer, Refusal, Welcome};
use crate::sys::net::PeerCredentials;
use crate::sys::process::process_id;
use crate::zerobuffer;

/// How long a handler that runs may take when its server stops.
const STOP_PATIENCE: Duration = Duration::from_millis(crate::limits::DRAIN_DEADLINE_MS);

/// A server whose requests stay as they are and whose responses lie in a buffer of
/// their own; it stops when it is dropped.
#[derive(Debug)]
pub struct ImmutableServer {
    server: Option<zerobuffer::DuplexServer>,
    acceptor: Option<Acceptor>,
    socket: PathBuf,
}

impl ImmutableServer {
    pub(super) fn new<H>(
        socket: PathBuf,
        name: &ChannelName,
        options: zerobuffer::ServerOptions,
        handler: H,
    ) -> Result<ImmutableServer, ChannelError>
    where
        H: FnMut(
                &zerobuffer::Frame,
                &mut zerobuffer::Reply<'_>,
            ) -> Result<(), zerobuffer::HandlerError>
            + Send
            + 'static,
    {
        let host = TwoBuffers(name.clone());
        let acceptor = Acceptor::start(&socket, name, Bell::new()?, host, HalfOpen::default())?;
        let server = zerobuffer::DuplexServer::start(name.as_str(), options, handler)?;
        Ok(ImmutableServer {
            server: Some(server),
            acceptor: Some(acceptor),
            socket,
        })
    }

    /// The socket that tells clients of which kind the channel is.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether it serves.
    pub fn is_running(&self) -> bool {
        let server = self.server.as_ref();
        server.is_some_and(zerobuffer::DuplexServer::is_running)
    }

    /// Ends it; waits for a handler that runs for at most 3 s.
    pub fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            // A handler that takes longer goes on by itself.
            let _ = server.stop(STOP_PATIENCE);
        }
        self.acceptor = None;
    }
}

impl Drop for ImmutableServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Says that there is nothing to attach here, but two buffers.
struct TwoBuffers(ChannelName);

impl Host for TwoBuffers {
    type Client = ();

    fn offer(&self) -> Offer {
        Offer {
            versions: (0, LAYOUT_VERSION),
            features: 0,
        }
    }

    fn welcome(&self, version: u32) -> Welcome {
        Welcome {
            version,
            features: 0,
            kind: ChannelKind::TwoBuffers,
            generation: 0,
            fds: 0,
            body_bytes: 0,
        }
    }

    fn attach(&mut self, _: PeerCredentials, _: u32) -> Result<Joined<()>, Refusal> {
        Err(Refusal::Kind)
    }

    fn take_over(
        &mut self,
        _: PeerCredentials,
        _: Vec<std::os::fd::OwnedFd>,
        _: u64,
    ) -> Result<Joined<()>, Refusal> {
        Err(Refusal::Kind)
    }

    fn has_ended(&self, (): &()) -> bool {
        true
    }

    fn leave(&self, (): (), _: std::os::fd::OwnedFd) {}

    fn status(&self, _: &mut dyn Iterator<Item = &()>) -> Vec<u8> {
        let status = ServerStatus {
            name: self.0.to_string(),
            kind: "two-buffers".to_owned(),
            pid: process_id(),
            operation: String::new(),
            workers: 1,
            waiting: String::new(),
            max_clients: 1,
            clients_total: 0,
            clients: Vec::new(),
        };
        serde_json::to_vec(&status).unwrap_or_default()
    }
}

/// A client of a channel of either kind.
#[derive(Debug)]
pub enum AnyDuplexClient {
    /// The request is changed where it lies.
    InPlace(DuplexClient),
    /// The response has a buffer of its own.
    TwoBuffers(zerobuffer::DuplexClient),
}

impl AnyDuplexClient {
    /// Sends `bytes` and waits for the response, a copy of it.
    ///
    /// # Errors
    /// As [`DuplexClient::call`]; [`ChannelError::TwoBuffers`].
    pub fn call(&mut self, bytes: &[u8], timeout: Duration) -> Result<Vec<u8>, ChannelError> {
        match self {
            AnyDuplexClient::InPlace(client) => {
                client.call(bytes, timeout).map(|r| r.copy_to_vec())
            }
            AnyDuplexClient::TwoBuffers(client) => Ok(client.call(bytes, timeout)?.to_vec()),
        }
    }
}

/// A client of version 1 where `error` does not rule out that there is a server of it.
pub(super) fn two_buffer_client(
    name: &ChannelName,
    error: ChannelError,
    timeout: Duration,
) -> Result<AnyDuplexClient, ChannelError> {
    let is_said =
        matches!(&error, ChannelError::Connect(error) if error.refusal() == Some(Refusal::Kind));
    let is_absent = matches!(
        &error,
        ChannelError::Connect(ConnectError::NoChannel { .. })
    );
    if !is_said && !is_absent {
        return Err(error);
    }
    let options = zerobuffer::ClientOptions {
        // Where nothing speaks for a server, one look is enough.
        connect_timeout: if is_said { timeout } else { Duration::ZERO },
        ..zerobuffer::ClientOptions::default()
    };
    match zerobuffer::DuplexClient::connect(name.as_str(), &options) {
        Ok(client) => Ok(AnyDuplexClient::TwoBuffers(client)),
        Err(zerobuffer::ZeroBufferError::NoBuffer) => Err(error),
        Err(error) => Err(error.into()),
    }
}
