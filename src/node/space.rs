//! `serve --space FILE --server NAME`: the segment that this host lends to a space.
//!
//! Invariants:
//! - I1: a server that others can reach without protection is refused, unless it was said
//!   that this is meant.
//! - I2: each start is a new life of the segment, and says so by its incarnation; unless it
//!   begins with what a replica has of the life before.
//! - I3: with `durability = "replica"` the segment is the region `space-NAME` of the node,
//!   shared, with one page more than the segment:
//!
//! ```text
//! byte 0              k        k + 8        k + 16             k + 32        k + 48
//! | the segment       | magic  | version 1  | incarnation 128  | map digest  | position u32 | zero
//! ```

mod segment;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Node;
use super::config::{NodeConfig, default_socket, is_loopback};
use super::space_file::{self, SpaceFileError};
use crate::client::ClientError;
use crate::engine::space::{
    Errands, Place, SpaceServer, SpaceServerConfig, SpaceServerError, WritersConfig, exports_of,
};
use crate::nbd::Exports;
use crate::region::{ReadError, RegionError};
use crate::space::frame::Incarnation;
use crate::space::map::ServerAddress;
use crate::space::{Durability, Server, SpaceMap};
use crate::sys::SysError;
use crate::units::OutOfRange;
use crate::wire::follow::FollowSpec;
use crate::words::RegionName;

/// Which server of which space a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceFlags {
    /// The file of the space.
    pub file: PathBuf,
    /// The name of the server in it.
    pub server: String,
    /// Path of its Unix socket; [`socket_of`] if none.
    pub socket: Option<PathBuf>,
    /// The way to the other servers for them; without it they get only what lies here.
    pub errands: Option<Arc<Errands>>,
    /// The replicas of an earlier life with the newest of which the segment begins:
    /// `tcp://HOST:PORT/REGION`.
    pub recover: Vec<FollowSpec>,
}

/// Why a segment cannot be lent.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// The file is none.
    #[error("the space's file cannot be used")]
    File(#[from] SpaceFileError),
    /// The name is not in the file.
    #[error("{} has no server {name:?}; it has {}", file.display(), Names(map))]
    NoServer {
        /// The file that was named.
        file: PathBuf,
        /// The name asked for.
        name: Box<str>,
        /// The servers that there are.
        map: Box<SpaceMap>,
    },
    /// The address of the server means nothing here.
    #[error("server {name}: {address} is no address of a host")]
    Address {
        /// The server.
        name: RegionName,
        /// What the file has.
        address: Box<str>,
        /// What the resolver said.
        #[source]
        source: Option<io::Error>,
    },
    /// Other hosts reach the address, and nothing protects it.
    #[error(
        "server {name}: {address} can be reached from other hosts and nothing encrypts or \
         authenticates it; use a loopback address such as 127.0.0.1, or pass --insecure if the \
         network is trusted"
    )]
    Exposed {
        /// The server.
        name: RegionName,
        /// Its address.
        address: SocketAddr,
    },
    /// The file asks for TLS.
    #[error(
        "{} has [tls], which is not spoken here: take it out of the file, and pass --insecure \
         where the network is trusted",
        file.display()
    )]
    Tls {
        /// The file.
        file: PathBuf,
    },
    /// Replies are to wait for a replica, and no node can follow this one.
    #[error(
        "the space has durability = \"replica\", and this node cannot be followed: pass --listen \
         ADDR:PORT, and let another node follow tcp://ADDR:PORT/{region}"
    )]
    Unfollowed {
        /// The region that holds the segment.
        region: RegionName,
    },
    /// There is nothing that the segment could be filled from.
    #[error(
        "--recover: segments of this space have no replicas; its file has durability = \"memory\""
    )]
    NoReplicas,
    /// The node does not take the segment, or not follow its replica.
    #[error("the node does not take the segment")]
    Client(#[from] ClientError),
    /// The node cannot be reached from inside.
    #[error("the node cannot be reached")]
    Node(#[source] Box<super::NodeError>),
    /// The replica cannot be read.
    #[error("{source_name}: the replica cannot be read")]
    Replica {
        /// Which.
        source_name: Box<str>,
        /// Why.
        #[source]
        source: ReadError,
    },
    /// The replica holds something else.
    #[error("{source_name}: {problem}; nothing was taken over")]
    OtherReplica {
        /// Which.
        source_name: Box<str>,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The segment's memory cannot be made.
    #[error("the segment's memory is not to be had")]
    Region(#[from] RegionError),
    /// The kernel refuses a descriptor.
    #[error("the segment's memory cannot be passed on")]
    System(#[from] SysError),
    /// The region is shorter than the segment.
    #[error("the segment does not fit its region")]
    Segment(#[from] OutOfRange),
    /// The server does not start.
    #[error("server {name} of the space does not start")]
    Server {
        /// The server.
        name: RegionName,
        /// Why.
        #[source]
        source: SpaceServerError,
    },
}

impl SpaceError {
    /// Whether a file or a flag is what has to be changed.
    pub fn is_bad_input(&self) -> bool {
        matches!(
            self,
            Self::NoServer { .. }
                | Self::Address { .. }
                | Self::Exposed { .. }
                | Self::Tls { .. }
                | Self::Unfollowed { .. }
                | Self::NoReplicas
                | Self::OtherReplica { .. }
        )
    }
}

struct Names<'a>(&'a SpaceMap);

impl std::fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, server) in self.0.servers().iter().enumerate() {
            if at > 0 {
                f.write_str(", ")?;
            }
            f.write_str(server.name.as_str())?;
        }
        Ok(())
    }
}

/// Where the server called `name` listens on its own host: beside the default control
/// socket, named by the map's digest and the server.
pub fn socket_of(map: &SpaceMap, name: &str) -> PathBuf {
    let mut short = String::new();
    for byte in &map.digest()[..6] {
        short.push_str(&format!("{byte:02x}"));
    }
    let file = format!("space-{short}-{name}.sock");
    default_socket().with_file_name(file)
}

/// Starts the server that `flags` name, on a node that runs.
pub(super) fn serve(
    flags: &SpaceFlags,
    node_config: &NodeConfig,
    node: &Node,
) -> Result<Lent, SpaceError> {
    let config = space_file::load(&flags.file)?;
    let position = position_of(&config.map, flags)?;
    if config.tls.is_some() {
        let file = flags.file.clone();
        return Err(SpaceError::Tls { file });
    }
    let server = config.map.servers()[position].clone();
    let address = address_of(&server, &server.address, node_config.insecure)?;
    let socket = flags.socket.clone();
    let socket = socket.unwrap_or_else(|| socket_of(&config.map, server.name.as_str()));
    let made = match config.durability {
        Durability::Memory if !flags.recover.is_empty() => return Err(SpaceError::NoReplicas),
        Durability::Memory => segment::in_memory(&config, &server)?,
        Durability::Replica if node_config.listen.is_none() => {
            let region = segment::region_name(&server.name);
            return Err(SpaceError::Unfollowed { region });
        }
        Durability::Replica => segment::with_replica(&config, position, &flags.recover, node)?,
    };
    let incarnation = made.incarnation;
    let doors = vec![Place::Tcp(address), Place::Unix(socket)];
    let settings = SpaceServerConfig {
        position,
        incarnation,
        limits: config.limits.clone(),
        doors,
        errands: flags.errands.clone(),
        data: Some(made.data),
        writers: made.writable.map(|data| WritersConfig {
            data,
            lease: Duration::from_millis(config.limits.writer_lease_ms),
        }),
        replica: made.replica,
        log: config.log.clone(),
        map: config.map.clone(),
        nbd: node.figures.clone(),
    };
    let started = SpaceServer::start(settings, made.memory);
    let started = started.map_err(|source| SpaceError::Server {
        name: server.name.clone(),
        source,
    })?;
    tell(&server, &started, incarnation);
    Ok(Lent {
        exports: exports_of(&config.map, position, flags.errands.is_some()),
        server: started,
    })
}

/// A segment that is lent, and what NBD clients can choose of its space.
pub(super) struct Lent {
    pub(super) server: SpaceServer,
    pub(super) exports: Exports,
}

fn tell(server: &Server, started: &SpaceServer, incarnation: Incarnation) {
    let places: Vec<String> = started.places().iter().map(ToString::to_string).collect();
    tracing::info!(
        server = %server.name,
        places = places.join(", "),
        %incarnation,
        "lends its segment"
    );
}

fn position_of(map: &SpaceMap, flags: &SpaceFlags) -> Result<usize, SpaceError> {
    map.position(&flags.server)
        .ok_or_else(|| SpaceError::NoServer {
            file: flags.file.clone(),
            name: flags.server.as_str().into(),
            map: Box::new(map.clone()),
        })
}

/// The address of a host that `server` listens at.
fn address_of(
    server: &Server,
    address: &ServerAddress,
    insecure: bool,
) -> Result<SocketAddr, SpaceError> {
    let refused = |source| SpaceError::Address {
        name: server.name.clone(),
        address: address.to_string().into(),
        source,
    };
    let place = (address.host.as_str(), address.port);
    let mut found = place
        .to_socket_addrs()
        .map_err(|error| refused(Some(error)))?;
    let address = found.next().ok_or_else(|| refused(None))?;
    if !insecure && !is_loopback(address.ip()) {
        return Err(SpaceError::Exposed {
            name: server.name.clone(),
            address,
        });
    }
    Ok(address)
}
