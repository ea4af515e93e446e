//! The memory of a segment: a region of this process, with a replica or without.

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::little_endian::{U32, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::SpaceError;
use crate::checksum::Digest;
use crate::client::{self, ClientError, Reader, Writer, WriterOptions};
use crate::engine::space::Replica;
use crate::node::Node;
use crate::region::{ReadError, Region, RegionOptions};
use crate::space::frame::Incarnation;
use crate::space::memory::{Gate, Memory, Segment};
use crate::space::{Server, SpaceConfig};
use crate::sys::memfd;
use crate::units::{MIB, PAGE_SIZE};
use crate::wire::follow::FollowSpec;
use crate::words::{Generation, Mode, Publish, RegionName};

/// Bytes copied at once from a replica.
const COPY_BYTES: usize = MIB as usize;
/// How long a replica of the life before may take to get here, if it does not get on.
const RECOVER_DEADLINE: Duration = Duration::from_secs(30);
/// Pause between two looks at it.
const RECOVER_PAUSE: Duration = Duration::from_millis(10);

/// A segment, and what the server does with it.
pub(super) struct Made {
    pub(super) incarnation: Incarnation,
    pub(super) memory: Box<dyn Memory + Send>,
    /// Open for reading only.
    pub(super) data: OwnedFd,
    pub(super) replica: Option<Replica>,
}

/// The last page of a segment's region: whose it is, and which life.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Page {
    magic: [u8; 8],
    version: U32,
    zero: [u8; 4],
    incarnation: U128,
    map: Digest,
    position: U32,
    rest: [u8; 12],
}

const MAGIC: [u8; 8] = *b"uffdSGMT";
const VERSION: u32 = 1;

const _: () = assert!(size_of::<Page>() == 64);

/// The name of the region that holds a server's segment.
pub(super) fn region_name(server: &RegionName) -> RegionName {
    prefixed("space", server)
}

fn prefixed(prefix: &str, server: &RegionName) -> RegionName {
    // A name that is too long then stands for itself.
    let name = format!("{prefix}-{server}").parse();
    name.unwrap_or_else(|_| server.clone())
}

/// A segment that is lost with this process. No node looks at it, and so nothing is kept
/// of it twice.
pub(super) fn in_memory(config: &SpaceConfig, server: &Server) -> Result<Made, SpaceError> {
    let size = config.map.segment_size();
    let region = Region::create(&region_name(&server.name), size, &RegionOptions::default())?;
    let data = memfd::reopen_read_only(region.data_fd())?;
    Ok(Made {
        incarnation: Incarnation(Generation::random().0),
        memory: Box::new(Segment::new(Box::new(region), size, None)?),
        data,
        replica: None,
    })
}

/// A writer's region, shared between the server and the thread that commits it.
struct Written(Arc<Writer>);

impl Deref for Written {
    type Target = Region;

    fn deref(&self) -> &Region {
        &self.0
    }
}

/// A segment that other nodes can follow, and whose changes are committed to them; it
/// begins with what `recover` has of the life before, if that is given.
pub(super) fn with_replica(
    config: &SpaceConfig,
    position: usize,
    recover: Option<&FollowSpec>,
    node: &Node,
) -> Result<Made, SpaceError> {
    let size = config.map.segment_size();
    let name = &config.map.servers()[position].name;
    let former = recover.map(|source| Former::find(source, config, position, node));
    let former = former.transpose()?;
    let fresh = Incarnation(Generation::random().0);
    let incarnation = former.as_ref().map_or(fresh, |former| former.incarnation);
    let options = WriterOptions {
        mode: Mode::Manual,
        publish: Publish::Commit,
        ..WriterOptions::default()
    };
    let mut trouble = None;
    let fill = |region: &Region| {
        if let Some(former) = &former
            && let Err(error) = former.copy_to(region, size)
        {
            trouble = Some(error);
            // Only says that it goes no further: the reason is told below.
            return Err(ClientError::OtherRegion);
        }
        let page = Page {
            magic: MAGIC,
            version: VERSION.into(),
            zero: [0; 4],
            incarnation: incarnation.0.into(),
            map: config.map.digest(),
            position: (position as u32).into(),
            rest: [0; 12],
        };
        Ok(region.write(size, page.as_bytes())?)
    };
    let region_name = region_name(name);
    let whole = size + PAGE_SIZE;
    let made =
        Writer::create_filled_over(connect(node)?, region_name.as_str(), whole, &options, fill);
    if let Some(trouble) = trouble {
        return Err(trouble);
    }
    let writer = Arc::new(made?);
    if let Some(former) = former {
        former.forget(node)?;
    }
    let data = memfd::reopen_read_only(writer.data_fd())?;
    let gate = Arc::new(Gate::default());
    let committed = Arc::clone(&writer);
    let gates = Arc::clone(&gate);
    let make_safe = move |within: Duration| {
        let until = Instant::now() + within;
        let epoch = gates.between_changes(|| committed.commit(within))?;
        epoch.wait_acked(1, until.saturating_duration_since(Instant::now()))
    };
    Ok(Made {
        incarnation,
        memory: Box::new(Segment::new(Written(writer), size, Some(gate))?),
        data,
        replica: Some(Replica {
            make_safe: Box::new(make_safe),
            // So that clients hear of it before they give up themselves.
            deadline: Duration::from_millis(config.limits.deadline_ms / 2),
        }),
    })
}

fn connect(node: &Node) -> Result<client::Node, SpaceError> {
    let socket = node.connect();
    let socket = socket.map_err(|error| SpaceError::Node(Box::new(error)))?;
    Ok(client::Node::from_socket(socket)?)
}

/// What a replica has of the life before, followed for as long as it is copied.
struct Former {
    reader: Reader,
    local: RegionName,
    source: String,
    incarnation: Incarnation,
    epoch: u64,
}

impl Former {
    fn find(
        source: &FollowSpec,
        config: &SpaceConfig,
        position: usize,
        node: &Node,
    ) -> Result<Self, SpaceError> {
        let local = prefixed("recover", &config.map.servers()[position].name);
        let source = FollowSpec {
            local: local.clone(),
            ..source.clone()
        };
        connect(node)?.follow(&source.to_string())?;
        let shown = source.to_string();
        tracing::info!(source = shown, "looking for the life before");
        await_following(node, &local, &shown)?;
        let reader = Reader::attach_over(connect(node)?, local.as_str())?;
        let unreadable = |source| SpaceError::Replica {
            source_name: shown.as_str().into(),
            source,
        };
        let size = config.map.segment_size();
        let other = |problem| SpaceError::OtherReplica {
            source_name: shown.as_str().into(),
            problem,
        };
        if reader.size() != size + PAGE_SIZE {
            return Err(other("its size is not that of a segment of this space"));
        }
        let until = Instant::now() + RECOVER_DEADLINE;
        let (page, epoch) = loop {
            match reader.read_at_epoch(|view| view.load::<Page>(size)) {
                Ok((page, epoch)) => break (page?, epoch.number),
                Err(ReadError::Syncing | ReadError::Overrun) if Instant::now() < until => {
                    std::thread::sleep(RECOVER_PAUSE);
                }
                Err(error) => return Err(unreadable(error)),
            }
        };
        if page.magic != MAGIC || page.version.get() != VERSION {
            return Err(other("it holds no segment"));
        }
        if page.map != config.map.digest() || page.position.get() != position as u32 {
            return Err(other("it holds the segment of another space or server"));
        }
        Ok(Self {
            reader,
            local,
            source: shown,
            incarnation: Incarnation(page.incarnation.get()),
            epoch,
        })
    }

    /// Copies the segment; pages of zeros stay holes.
    fn copy_to(&self, region: &Region, size: u64) -> Result<(), SpaceError> {
        let mut bytes = vec![0; COPY_BYTES];
        let mut at = 0;
        while at < size {
            let len = (size - at).min(COPY_BYTES as u64) as usize;
            let piece = &mut bytes[..len];
            let read = self.reader.read_at_epoch(|view| view.read(at, piece));
            let (copied, epoch) = read.map_err(|source| SpaceError::Replica {
                source_name: self.source.as_str().into(),
                source,
            })?;
            copied?;
            if epoch.number != self.epoch {
                return Err(SpaceError::OtherReplica {
                    source_name: self.source.as_str().into(),
                    problem: "it changes, so the server that it follows lives",
                });
            }
            for (index, page) in piece.chunks(PAGE_SIZE as usize).enumerate() {
                if page.iter().any(|byte| *byte != 0) {
                    region.write(at + index as u64 * PAGE_SIZE, page)?;
                }
            }
            at += len as u64;
        }
        tracing::info!(source = self.source, epoch = self.epoch, "recovered");
        Ok(())
    }

    fn forget(self, node: &Node) -> Result<(), SpaceError> {
        drop(self.reader);
        Ok(connect(node)?.unfollow(self.local.as_str())?)
    }
}

/// Waits until a replica that was asked for is whole; as long as it takes while bytes come.
fn await_following(node: &Node, local: &RegionName, shown: &str) -> Result<(), SpaceError> {
    let mut control = connect(node)?;
    let mut until = Instant::now() + RECOVER_DEADLINE;
    loop {
        let regions = control.status()?.regions;
        let found = regions.iter().find(|region| region.name == local.as_str());
        match found.map(|region| region.state.as_str()) {
            Some("following") => return Ok(()),
            Some("syncing" | "resyncing") => until = Instant::now() + RECOVER_DEADLINE,
            _ if Instant::now() < until => {}
            _ => {
                return Err(SpaceError::Replica {
                    source_name: shown.into(),
                    source: ReadError::TimedOut,
                });
            }
        }
        std::thread::sleep(RECOVER_PAUSE);
    }
}
