//! Channels by name: makes servers and clients that find each other through a socket
//! in one folder.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::immutable::{AnyDuplexClient, ImmutableServer, two_buffer_client};
use super::link::{Link, hello};
use super::named::NamedServer;
use super::rendezvous::{ConnectError, ask, channel_socket, channels_folder};
use super::report::ServerStatus;
use super::{ChannelError, ClientOptions, DuplexClient, ServerOptions};
use crate::duplex::rendezvous::{Ask, ChannelName};
use crate::duplex::{BufferConfig, OpenLimits};
use crate::sys::process::deadline_in;
use crate::zerobuffer;

/// How long a server may take to say how it is.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);

/// Makes channels whose servers have their sockets in one folder.
///
/// ```no_run
/// use std::time::Duration;
/// use uffd_sync::client::channel::{ClientOptions, DuplexChannelFactory, ServerOptions};
/// use uffd_sync::duplex::BufferConfig;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let factory = DuplexChannelFactory::new();
/// let (name, config) = ("loud".parse()?, BufferConfig::new(0, 16 << 20));
/// let server = factory.create_in_place_server(&name, config, ServerOptions::default())?;
/// server.start(|frame| {
///     frame.update_chunks(|bytes| bytes.make_ascii_uppercase());
///     Ok(())
/// })?;
///
/// // In another process, as a rule:
/// let client = factory.create_in_place_client(&name, ClientOptions::default())?;
/// let response = client.call(b"hello", Duration::from_secs(1))?;
/// assert_eq!(response.copy_to_vec(), b"HELLO");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DuplexChannelFactory {
    folder: PathBuf,
    /// Whether the folder is this crate's own, to be made where it is missing.
    is_default: bool,
}

impl Default for DuplexChannelFactory {
    fn default() -> Self {
        Self::new()
    }
}

impl DuplexChannelFactory {
    /// Channels of this user: in the folder that [`channels_folder`] names.
    pub fn new() -> Self {
        let named = std::env::var_os(super::FOLDER_VARIABLE);
        DuplexChannelFactory {
            folder: channels_folder(),
            is_default: named.is_none_or(|folder| folder.is_empty()),
        }
    }

    /// Channels in a folder that exists.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        DuplexChannelFactory {
            folder: folder.into(),
            is_default: false,
        }
    }

    /// The socket of a channel's server.
    pub fn socket(&self, name: &ChannelName) -> PathBuf {
        channel_socket(&self.folder, name)
    }

    /// Takes the name for a server that makes memory of `config` for each client. It
    /// takes clients once it has a handler: [`NamedServer::start`].
    ///
    /// # Errors
    /// [`ChannelError::Connect`] if the name is taken or its socket cannot be made;
    /// [`ChannelError::Memory`] for an impossible configuration, [`ChannelError::Clients`],
    /// [`ChannelError::Workers`].
    pub fn create_in_place_server(
        &self,
        name: &ChannelName,
        config: BufferConfig,
        options: ServerOptions,
    ) -> Result<NamedServer, ChannelError> {
        self.make_default_folder();
        NamedServer::new(self.socket(name), name, config, options)
    }

    fn make_default_folder(&self) {
        if self.is_default {
            // What cannot be made is said by the bind that fails in it.
            let _ = make_folder(&self.folder);
        }
    }

    /// Joins the in-place server of the name, within the deadline of the options.
    ///
    /// # Errors
    /// [`ChannelError::Connect`], which tells a missing server, a refusal and a peer that
    /// cannot be trusted apart; [`ChannelError::Thread`], [`ChannelError::Sys`].
    pub fn create_in_place_client(
        &self,
        name: &ChannelName,
        options: ClientOptions,
    ) -> Result<DuplexClient, ChannelError> {
        let (link, segment) = Link::attach(
            self.socket(name),
            name.clone(),
            options.limits,
            deadline_in(options.connect_timeout),
        )?;
        DuplexClient::linked(segment, link, options)
    }

    /// Takes the name for a server of two buffers, which serves at once. Clients of other
    /// implementations of version 1 find it too: its buffers have the channel's name.
    ///
    /// # Errors
    /// [`ChannelError::Connect`] if the name is taken or its socket cannot be made;
    /// [`ChannelError::TwoBuffers`].
    pub fn create_immutable_server<H>(
        &self,
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
        self.make_default_folder();
        ImmutableServer::new(self.socket(name), name, options, handler)
    }

    /// Joins the server of the name, of whichever kind it is: in place where version and
    /// features allow, with two buffers where the server says so, or where only a server
    /// of version 1 has the name.
    ///
    /// # Errors
    /// As [`DuplexChannelFactory::create_in_place_client`]; [`ChannelError::TwoBuffers`].
    pub fn create_client(
        &self,
        name: &ChannelName,
        options: ClientOptions,
    ) -> Result<AnyDuplexClient, ChannelError> {
        match self.create_in_place_client(name, options) {
            Ok(client) => Ok(AnyDuplexClient::InPlace(client)),
            Err(error) => two_buffer_client(name, error, options.connect_timeout),
        }
    }

    /// The state of the server of the name.
    ///
    /// # Errors
    /// [`ChannelError::Connect`].
    pub fn status(&self, name: &ChannelName) -> Result<ServerStatus, ChannelError> {
        status_at(&self.socket(name), name)
    }
}

/// Asks the server at `socket` for its state.
pub(super) fn status_at(socket: &Path, name: &ChannelName) -> Result<ServerStatus, ChannelError> {
    let hello = hello(Ask::Status, 0, 0, OpenLimits::default());
    let granted = ask(socket, name, &hello, &[], deadline_in(STATUS_DEADLINE))?;
    let status = serde_json::from_slice(&granted.body);
    status.map_err(|_| {
        let (name, what) = (name.clone(), "a status that cannot be read, or one");
        ConnectError::Mismatch { name, what }.into()
    })
}

/// Makes `.../uffd-sync/channels`, for this user alone.
fn make_folder(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let mut make = std::fs::DirBuilder::new();
    make.mode(0o700);
    for folder in folder.parent().into_iter().chain([folder]) {
        match make.create(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
