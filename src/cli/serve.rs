//! `serve`: logs, readiness, and the node itself.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use anyhow::Context;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use super::args::ServeArgs;
use super::demo::children::on_end_of_input;
use crate::client::space::{Gateway, SpaceOptions};
use crate::engine::space::Errands;
use crate::node::space::SpaceFlags;
use crate::node::{self, ConfigSource, NodeConfig, NodeFlags};
use crate::sys::process::PidFd;
use crate::wire::follow::FollowSpec;

/// Runs a node until it is told to end.
pub(super) fn run(args: ServeArgs, socket: Option<PathBuf>) -> anyhow::Result<()> {
    let until_eof = args.until_eof;
    let mut source = ConfigSource {
        file: args.config,
        flags: NodeFlags {
            name: args.name.map(|name| name.as_str().to_owned()),
            socket,
            listen: args.listen,
            insecure: args.insecure,
            metrics: args.metrics,
            follow: args.follow,
            log: args.log,
            space: space_of((args.space, args.server), args.space_socket, args.recover),
            nbd: args.nbd,
        },
    };
    // Read here for the log and the socket's folder; the node reads it for the rest.
    let config = source.load()?;
    let log = start_log(&config.log)?;
    if let Some(space) = source
        .flags
        .space
        .as_mut()
        .filter(|_| !config.nbd.is_empty())
    {
        space.errands = Some(Errands::new().context("serving NBD")?);
    }
    let beside = source.flags.space.as_ref();
    if config.socket == node::default_socket() || beside.is_some_and(|it| it.socket.is_none()) {
        make_default_folder()?;
    }
    let lent = source.flags.space.clone();
    let mut gateway = None;
    let ready = |config: &NodeConfig, listen: Option<std::net::SocketAddr>| {
        // After the engine blocked its signals, so that this thread inherits that.
        gateway = lent.and_then(|flags| start_gateway(&flags));
        tell_ready(config, listen);
        if until_eof && let Err(error) = end_with_input() {
            tracing::error!(%error, "this node will not end with its input");
        }
    };
    let served = node::serve(&source, ready, move |filter| change_log(&log, filter));
    tell_manager(sd_notify::NotifyState::Stopping);
    drop(gateway);
    served.context("serving")
}

fn space_of(
    (file, server): (Option<PathBuf>, Option<String>),
    socket: Option<PathBuf>,
    recover: Vec<FollowSpec>,
) -> Option<SpaceFlags> {
    // Neither is given without the other.
    let (file, server) = file.zip(server)?;
    Some(SpaceFlags {
        file,
        server,
        socket,
        recover,
        errands: None,
    })
}

/// What brings NBD clients to the other servers of the space.
fn start_gateway(flags: &SpaceFlags) -> Option<Gateway> {
    let errands = flags.errands.clone()?;
    // It was read before, or the node would not be ready.
    let config = node::space_file::load(&flags.file);
    let started = config.map(|config| Gateway::start(config, SpaceOptions::default(), errands));
    match started {
        Ok(Ok(gateway)) => Some(gateway),
        Ok(Err(error)) => {
            tracing::error!(%error, "NBD clients reach no other server");
            None
        }
        Err(error) => {
            tracing::error!(%error, "NBD clients reach no other server");
            None
        }
    }
}

/// Makes the folder of the default sockets, for this user alone. Any other socket is
/// put where the user has a folder for it.
fn make_default_folder() -> anyhow::Result<()> {
    let socket = node::default_socket();
    let Some(folder) = socket.parent() else {
        return Ok(());
    };
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("creating {}", folder.display()))
        }
        _ => Ok(()),
    }
}

pub(super) type LogHandle = reload::Handle<EnvFilter, Registry>;

/// Logs to standard error, colours only where that is a terminal.
pub(super) fn start_log(filter: &str) -> anyhow::Result<LogHandle> {
    let filter = EnvFilter::try_new(filter).context("reading the log filter")?;
    let (filter, handle) = reload::Layer::new(filter);
    let colours = io::IsTerminal::is_terminal(&io::stderr());
    tracing_subscriber::registry()
        .with(filter)
        .with(fmt::layer().with_writer(io::stderr).with_ansi(colours))
        .try_init()
        .context("starting the log")?;
    Ok(handle)
}

/// Takes over a filter that was validated with the rest of the configuration.
fn change_log(handle: &LogHandle, filter: &str) {
    let changed = EnvFilter::try_new(filter).map(|filter| handle.reload(filter));
    match changed {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "kept the old log filter"),
        Err(error) => tracing::error!(%error, "kept the old log filter"),
    }
}

fn tell_ready(config: &NodeConfig, listen: Option<std::net::SocketAddr>) {
    let socket = config.socket.display();
    match listen {
        Some(listen) => tracing::info!(name = config.name, %socket, %listen, "ready"),
        None => tracing::info!(name = config.name, %socket, "ready, no TCP"),
    }
    tell_manager(sd_notify::NotifyState::Ready);
}

/// Tells the service manager, where there is one.
pub(super) fn tell_manager(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// Ends this process as `SIGTERM` does once standard input ends; called when the
/// engine has taken the signals over.
fn end_with_input() -> anyhow::Result<()> {
    let own = PidFd::own()?;
    on_end_of_input(move || {
        if let Err(error) = own.kill(nix::libc::SIGTERM) {
            tracing::error!(%error, "cannot end with the input");
        }
    })
}
