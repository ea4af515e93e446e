//! A node: configuration, the engine on a thread of its own, metrics.
//!
//! `uffd-sync serve` runs one for a host; a program can run one inside itself, on a
//! thread, without any socket file:
//!
//! ```no_run
//! use std::time::Duration;
//! use uffd_sync::client::{self, Writer, WriterOptions};
//! use uffd_sync::node::{Node, NodeConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let node = Node::embedded(&NodeConfig::default())?;
//! let connection = client::Node::from_socket(node.connect()?)?;
//! let region = Writer::create_over(connection, "prices", 1 << 20, &WriterOptions::default())?;
//! region.write(0, b"stored, found, shipped")?;
//! region.commit(Duration::from_secs(1))?;
//! drop(region);
//! node.stop()?;
//! # Ok(())
//! # }
//! ```

mod config;
mod metrics;
mod nbd;
pub mod space;
pub mod space_file;
mod variables;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

pub use config::{ConfigError, ConfigSource, Differences, NodeConfig, NodeFlags, default_socket};
pub use metrics::MetricsError;
pub use nbd::{NBD_PORT, NbdError, NbdPlace, NbdPlaceError};

use crate::engine::variables::StartError;
use crate::engine::{
    CommandError, Commands, Engine, EngineError, NbdFigures, Reloader, Settings, Tunables,
};
use crate::limits;
use crate::sys::behaviour::Behaviour;
use crate::sys::{SysError, net, process};

/// Why a node could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration is not one.
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    /// The engine could not start, or its ring failed.
    #[error("the node cannot run")]
    Engine(#[from] EngineError),
    /// The engine takes no commands.
    #[error("the engine cannot be reached")]
    Command(#[from] CommandError),
    /// A socket pair or a thread is not to be had.
    #[error("the system refuses what a node needs")]
    System(#[from] SysError),
    /// No thread for the engine.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
    /// The segment cannot be lent.
    #[error("the space cannot be served")]
    Space(#[from] space::SpaceError),
    /// The ordered variables cannot be served.
    #[error("the variables cannot be served")]
    Variables(#[from] StartError),
    /// NBD clients cannot be served.
    #[error(transparent)]
    Nbd(#[from] NbdError),
    /// The metrics cannot be served.
    #[error("the metrics cannot be served")]
    Metrics(#[from] MetricsError),
    /// The engine's thread panicked.
    #[error("the engine's thread ended by a panic")]
    Panicked,
}

/// A node inside this program: an engine on a thread of its own.
///
/// Dropping it stops the engine after it drained, for at most
/// [`crate::limits::DRAIN_DEADLINE_MS`].
#[derive(Debug)]
pub struct Node {
    commands: Commands,
    listen: Option<SocketAddr>,
    thread: Option<JoinHandle<Result<(), EngineError>>>,
    metrics: Option<metrics::Server>,
    nbd: Option<nbd::Service>,
    figures: Option<Arc<NbdFigures>>,
    _variables: Option<variables::Service>,
}

impl Node {
    /// Starts a node that serves its control socket and whatever else `config` names.
    ///
    /// # Errors
    /// What of it is not to be had; nothing is left running then.
    pub fn start(config: &NodeConfig) -> Result<Self, NodeError> {
        Self::spawn(config, settings(config, true), None)?.with_nbd(config, None)
    }

    /// Starts a node without a control socket: only [`Node::connect`] reaches it.
    ///
    /// # Errors
    /// What of it is not to be had; nothing is left running then.
    pub fn embedded(config: &NodeConfig) -> Result<Self, NodeError> {
        Self::spawn(config, settings(config, false), None)?.with_nbd(config, None)
    }

    /// Serves the NBD clients that `config` names a place for. On failure nothing is left
    /// running.
    fn with_nbd(
        mut self,
        config: &NodeConfig,
        lent: Option<nbd::OfSpace>,
    ) -> Result<Self, NodeError> {
        self.nbd = serve_nbd(config, &self.commands, self.figures.clone(), lent)?;
        Ok(self)
    }

    fn spawn(
        config: &NodeConfig,
        mut settings: Settings,
        reloader: Option<Reloader>,
    ) -> Result<Self, NodeError> {
        config.validate()?;
        let (variables, door) = serve_variables(config)?;
        settings.variables = door;
        let figures = settings.nbd.clone();
        let commands = Commands::new()?;
        let for_engine = commands.clone();
        let (told, started) = mpsc::sync_channel(1);
        // The ring belongs to the thread that made it.
        let body = move || match Engine::new(settings, for_engine, reloader) {
            Ok(engine) => {
                let _ = told.send(Ok(engine.listen_address()));
                engine.run()
            }
            Err(error) => {
                let _ = told.send(Err(error));
                Ok(())
            }
        };
        let builder = std::thread::Builder::new().name("uffd-sync".to_owned());
        let thread = builder.spawn(body).map_err(NodeError::Thread)?;
        let listen = started.recv().map_err(|_| NodeError::Panicked)??;
        let metrics = metrics::serve(config.metrics, &commands);
        let mut node = Self {
            commands,
            listen,
            thread: Some(thread),
            metrics: None,
            nbd: None,
            figures,
            _variables: variables,
        };
        // On failure the drop of `node` ends the engine.
        node.metrics = metrics?;
        Ok(node)
    }

    /// A socket connected to the node's control interface.
    ///
    /// # Errors
    /// If no socket pair is to be had or the engine is too far behind.
    pub fn connect(&self) -> Result<OwnedFd, NodeError> {
        let (ours, engines) = net::unix_pair()?;
        self.commands.adopt(engines)?;
        Ok(ours)
    }

    /// The address that followers connect to, with the real port.
    pub fn listen_address(&self) -> Option<SocketAddr> {
        self.listen
    }

    /// Drains and stops.
    ///
    /// # Errors
    /// What ended the engine, if it was not this.
    pub fn stop(mut self) -> Result<(), NodeError> {
        self.end()
    }

    /// Waits until the engine ends by itself, as by `SIGTERM`.
    fn wait(&mut self) -> Result<(), NodeError> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let ended = thread.join().map_err(|_| NodeError::Panicked)?;
        ended.map_err(NodeError::Engine)
    }

    fn end(&mut self) -> Result<(), NodeError> {
        (self.metrics, self.nbd) = (None, None);
        if self.thread.is_none() {
            return Ok(());
        }
        // An engine that takes no commands any more has ended by itself.
        while let Err(CommandError::Full) = self.commands.stop() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.wait()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "the engine ended badly");
        }
    }
}

/// Runs a node on this thread until `SIGTERM` or `SIGINT`; `SIGHUP` loads the
/// configuration again and takes over what can change. `ready` is called once
/// everything listens, with the address for followers.
///
/// # Errors
/// What could not start, or what ended the engine.
pub fn serve(
    source: &ConfigSource,
    ready: impl FnOnce(&NodeConfig, Option<SocketAddr>),
    reload_log: impl Fn(&str) + Send + 'static,
) -> Result<(), NodeError> {
    let config = source.load()?;
    process::raise_fd_limit();
    process::keep_freed_memory(limits::KEPT_FREE as u32);
    let commands = Commands::new()?;
    // Blocked before the threads of the variables start, which inherit that.
    let _signals =
        process::SignalFd::block(&[nix::libc::SIGTERM, nix::libc::SIGINT, nix::libc::SIGHUP])?;
    if let Some(flags) = &source.flags.space {
        let reloader = reloader(source, &config, reload_log);
        return serve_space(&config, flags, reloader, ready);
    }
    let (_variables, door) = serve_variables(&config)?;
    let settings = Settings {
        signals: true,
        variables: door,
        ..settings(&config, true)
    };
    let figures = settings.nbd.clone();
    let engine = Engine::new(
        settings,
        commands.clone(),
        Some(reloader(source, &config, reload_log)),
    )?;
    // After the engine blocked its signals, so that these threads inherit that.
    let _metrics = metrics::serve(config.metrics, &commands)?;
    let _nbd = serve_nbd(&config, &commands, figures, None)?;
    tell_behaviour();
    ready(&config, engine.listen_address());
    Ok(engine.run()?)
}

/// The same with a segment that is lent to a space: the engine has a thread of its own,
/// since the segment is handed to it like any program's region.
fn serve_space(
    config: &NodeConfig,
    flags: &space::SpaceFlags,
    reloader: Reloader,
    ready: impl FnOnce(&NodeConfig, Option<SocketAddr>),
) -> Result<(), NodeError> {
    let settings = Settings {
        signals: true,
        ..settings(config, true)
    };
    let watched = Arc::clone(&settings.space);
    let node = Node::spawn(config, settings, Some(reloader))?;
    let lent = space::serve(flags, config, &node)?;
    let server = lent.server;
    // Nobody else sets it.
    let _ = watched.set(server.watch());
    let of_space = nbd::OfSpace {
        exports: lent.exports,
        arrivals: server.arrivals(),
    };
    let mut node = node.with_nbd(config, Some(of_space))?;
    tell_behaviour();
    ready(config, node.listen_address());
    node.wait()
}

/// Serves NBD clients, where the configuration names a place for them.
fn serve_nbd(
    config: &NodeConfig,
    commands: &Commands,
    figures: Option<Arc<NbdFigures>>,
    lent: Option<nbd::OfSpace>,
) -> Result<Option<nbd::Service>, NbdError> {
    let start = |figures| nbd::Service::start(config, commands, figures, lent);
    figures.map(start).transpose()
}

/// Starts the variables that the configuration names, with the engine's door to them.
type Served = (Option<variables::Service>, Option<SyncSender<OwnedFd>>);

fn serve_variables(config: &NodeConfig) -> Result<Served, NodeError> {
    let Some(variables) = config.ordered_variables() else {
        return Ok((None, None));
    };
    let (service, door) = variables::serve(&variables)?;
    tracing::info!(process = variables.process, order = %variables.order, "ordered variables");
    Ok((Some(service), Some(door)))
}

/// Says once what the kernel's scans do, and what that rules out.
fn tell_behaviour() {
    let found = Behaviour::of_process();
    match found.allows_tracking() {
        Ok(()) => tracing::info!(found = %found, "page-map scans tried"),
        Err(denied) => {
            tracing::warn!(found = %found, %denied, "mode async is refused on this kernel");
        }
    }
}

fn reloader(
    source: &ConfigSource,
    config: &NodeConfig,
    reload_log: impl Fn(&str) + Send + 'static,
) -> Reloader {
    let (source, mut current) = (source.clone(), config.clone());
    Box::new(move || {
        let next = match source.load() {
            Ok(next) => next,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "kept the old settings"
                );
                return None;
            }
        };
        let differences = current.reloadable_differences(&next);
        for key in &differences.needs_restart {
            tracing::warn!(key, "takes effect only after a restart");
        }
        reload_log(&next.log);
        let tunables = tunables(&next);
        current = next;
        Some(tunables)
    })
}

fn tunables(config: &NodeConfig) -> Tunables {
    Tunables {
        interval_min: Duration::from_micros(config.interval_min_us),
        interval_max: Duration::from_micros(config.interval_max_us),
        mark_max_delay: Duration::from_micros(config.mark_max_delay_us),
        audit_period: Duration::from_millis(config.audit_period_ms),
        hot_after: config.hot_after,
        follow: config.follow.clone(),
    }
}

fn settings(config: &NodeConfig, with_socket: bool) -> Settings {
    Settings {
        name: config.name.clone(),
        socket: with_socket.then(|| config.socket.clone()),
        listen: config.listen,
        staging_budget: config.staging_budget,
        signals: false,
        variables: None,
        space: Arc::default(),
        nbd: (!config.nbd.is_empty()).then(Arc::default),
        tunables: tunables(config),
    }
}
