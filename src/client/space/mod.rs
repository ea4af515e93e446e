//! A client of an address space: one range of bytes over the memory of several servers.
//!
//! ```no_run
//! use std::path::Path;
//! use uffd_sync::client::space::Space;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut space = Space::connect(Path::new("mcomp.cfg"))?;
//! space.write(1 << 30, b"over a boundary or not")?;
//! let mut bytes = [0; 4];
//! space.read(1 << 30, &mut bytes)?;
//! let before = space.fetch_add(4096, 1)?;
//! match space.compare_exchange(4096, before + 1, 0)? {
//!     Ok(_) => println!("it was {before} + 1, now it is 0"),
//!     Err(other) => println!("somebody else made it {other}"),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Many operations at once, from one thread:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use uffd_sync::client::space::{Answer, Space};
//! # let mut space = Space::connect(std::path::Path::new("mcomp.cfg"))?;
//! let tickets: Vec<_> = (0..16)
//!     .map(|at| space.submit_read(at * 4096, 4096))
//!     .collect::<Result<_, _>>()?;
//! for ticket in tickets {
//!     let Answer::Bytes(page) = space.wait(ticket)? else { unreachable!() };
//!     assert_eq!(page.len(), 4096);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What holds:
//! - S1: an operation on one server is atomic there within each 64 KiB of its segment; one
//!   over several servers is split, its parts run side by side, and each part that fails is
//!   reported on its own. The others were carried out.
//! - S2: a read that fails says so; it never gives zeros for bytes that are gone. What is in
//!   the buffer after a failure means nothing.
//! - S3: a change that was sent and has no reply is [`Failure::Indeterminate`], never sent
//!   again and never called failed. A read is asked again after a reconnection.
//! - S4: operations of one `Space` on one server are carried out in the order in which they
//!   were submitted, but for reads that are asked again.
//! - S5: a server whose memory was lost answers nothing more to this client,
//!   [`Failure::SegmentLost`], until it [accepts that](Space::accept_loss).
//! - S6: no call waits longer than the deadline without a reply in between. Time between
//!   two calls does not count.
//!
//! Of a server on this host, reached over its Unix socket, the memory is mapped, and reads
//! are copies out of it, whole stripe by stripe, while nothing of this client is under way
//! there. With `local_writers` changes are copies into it too, under the locks of stripes.
//!
//! There is no thread here and no lock: a `Space` belongs to one thread at a time. Servers
//! are connected to when they are first needed.

mod batch;
mod drive;
mod error;
mod gateway;
mod lane;
mod local;
mod mapped;
mod operations;
mod socket;
mod submit;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use batch::{Batch, BatchAnswer};
pub use drive::Wanted;
pub use error::{
    BatchError, Failure, PartError, PartsError, ReachError, ReplyError, SpaceError, Unanswered,
};
pub use gateway::Gateway;
pub use operations::Ticket;
pub use submit::Answer;

use super::Node;
use crate::engine::space_file;
use crate::limits;
use crate::space::frame::{Hello, VERSION, WANTS_MAPPING, WANTS_WRITING};
use crate::space::{SpaceConfig, SpaceMap};
use crate::sys::spin::Spinner;
use lane::Lane;
use local::Local;
use operations::Operations;
use socket::Socket;

/// Over what a server is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Its Unix socket where there is one on this host, else TCP.
    #[default]
    Auto,
    /// TCP.
    Tcp,
    /// Its Unix socket, on this host only.
    Unix,
}

/// How a [`Space`] works.
#[derive(Clone, Debug, Default)]
pub struct SpaceOptions {
    /// Longest wait without a reply [default: `deadline_ms` of the file].
    pub deadline: Option<Duration>,
    /// Over what servers are reached.
    pub transport: Transport,
    /// Folder of the servers' Unix sockets [default: where a node has its own].
    pub sockets: Option<PathBuf>,
    /// Asks every server for its bytes, also one on this host whose memory can be mapped.
    pub no_mapping: bool,
}

/// One server as this client has it.
#[derive(Debug)]
struct Link {
    lane: Lane,
    socket: Socket,
    /// The segment's memory, as long as the connection lives.
    local: Option<Local>,
    /// When something was last asked of it.
    used: Instant,
}

/// A client of an address space; see the [module](self).
///
/// Memory: for each server that is spoken to 64 KiB to receive into, at most 256 KiB of
/// requests that wait for the socket, and one reply of at most 1 MiB; and the bytes of what
/// was submitted.
#[derive(Debug)]
pub struct Space {
    config: SpaceConfig,
    links: Box<[Link]>,
    operations: Operations,
    hello: Hello,
    deadline: Duration,
    /// What was submitted and whose answer was not taken, by age.
    submitted: VecDeque<Ticket>,
    /// When deadlines are looked at next.
    next_look: Option<Instant>,
    /// When its caller last let it work: time spent elsewhere is nobody's delay.
    attended: Instant,
    /// How it waits for a reply.
    spinner: Spinner,
}

/// The Unix socket of server `name` of the space `map` in `folder`.
pub fn local_socket(folder: &Path, map: &SpaceMap, name: &str) -> PathBuf {
    folder.join(format!(
        "space-{}-{name}.sock",
        socket::short(&map.digest())
    ))
}

impl Space {
    /// A client of the space that the file at `path` describes.
    ///
    /// # Errors
    /// [`SpaceError::File`], [`SpaceError::Tls`]. No server is asked yet.
    pub fn connect(path: &Path) -> Result<Self, SpaceError> {
        Self::connect_with(space_file::load(path)?, SpaceOptions::default())
    }

    /// The same for a file that was read, with options.
    ///
    /// # Errors
    /// [`SpaceError::Tls`]; no server is asked before something is asked for.
    ///
    /// # Panics
    /// If the kernel gives no random bytes.
    pub fn connect_with(config: SpaceConfig, options: SpaceOptions) -> Result<Self, SpaceError> {
        if config.tls.is_some() {
            return Err(SpaceError::Tls);
        }
        let mut client = [0; 16];
        getrandom::fill(&mut client).expect("the kernel gives random bytes");
        let deadline = options
            .deadline
            .unwrap_or(Duration::from_millis(config.limits.deadline_ms))
            .max(Duration::from_millis(1));
        let map = &config.map;
        let hello = Hello {
            versions: (VERSION, VERSION),
            map: map.digest(),
            server: 0,
            flags: match (options.no_mapping, config.local_writers) {
                (true, _) => 0,
                (false, false) => WANTS_MAPPING,
                (false, true) => WANTS_MAPPING | WANTS_WRITING,
            },
            client: u128::from_le_bytes(client),
            incarnation: Default::default(),
        };
        let folder = options.sockets.or_else(|| {
            let node = Node::default_socket();
            node.parent().map(Path::to_owned)
        });
        let now = Instant::now();
        let links = map.servers().iter().enumerate().map(|(at, server)| {
            let unix = folder
                .as_deref()
                .filter(|_| options.transport != Transport::Tcp)
                .map(|folder| local_socket(folder, map, server.name.as_str()));
            let tcp = (options.transport != Transport::Unix).then(|| server.address.clone());
            Link {
                lane: Lane::new(at as u32),
                socket: Socket::new(unix, tcp, deadline, now),
                local: None,
                used: now,
            }
        });
        Ok(Self {
            links: links.collect(),
            config,
            operations: Operations::new(),
            hello,
            deadline,
            submitted: VecDeque::new(),
            next_look: None,
            attended: now,
            spinner: Spinner::new(Duration::from_micros(limits::SPACE_SPIN_US), drive::LOOKS),
        })
    }

    /// Bytes of the whole space.
    pub fn size(&self) -> u64 {
        self.config.map.size()
    }

    /// Which server holds which addresses.
    pub fn map(&self) -> &SpaceMap {
        &self.config.map
    }

    /// The file that it was made from.
    pub fn config(&self) -> &SpaceConfig {
        &self.config
    }

    /// Goes on with what the server called `name` has now, after its memory was lost.
    /// Whether there was such a loss.
    ///
    /// # Errors
    /// [`SpaceError::NoServer`].
    pub fn accept_loss(&mut self, name: &str) -> Result<bool, SpaceError> {
        let at = self.position(name)?;
        Ok(self.links[at].lane.accept_loss())
    }

    /// Whether reads from the server called `name` are copies out of its mapped memory now.
    ///
    /// # Errors
    /// [`SpaceError::NoServer`].
    pub fn is_mapped(&self, name: &str) -> Result<bool, SpaceError> {
        Ok(self.links[self.position(name)?].local.is_some())
    }

    /// Whether changes on the server called `name` are made in its mapped memory now, while
    /// nothing else of this client is under way there.
    ///
    /// # Errors
    /// [`SpaceError::NoServer`].
    pub fn is_writable(&self, name: &str) -> Result<bool, SpaceError> {
        let local = self.links[self.position(name)?].local.as_ref();
        Ok(local.is_some_and(Local::is_writable))
    }

    fn position(&self, name: &str) -> Result<usize, SpaceError> {
        let found = self.config.map.position(name);
        found.ok_or_else(|| SpaceError::NoServer { name: name.into() })
    }
}
