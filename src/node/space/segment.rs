//! The memory of a segment: a region of this process, with a replica or without.

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::little_endian::{U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::SpaceError;
use crate::checksum::Digest;
use crate::client::{self, ClientError, Reader, Writer, WriterOptions};
use crate::engine::space::Replica;
use crate::node::Node;
use crate::region::{ReadError, Region, RegionOptions};
use crate::space::frame::Incarnation;
use crate::space::locks::shared_segment;
use crate::space::memory::{Gate, Memory, Segment};
use crate::space::{Server, SpaceConfig};
use crate::sys::memfd;
use crate::units::{MIB, PAGE_SIZE};
use crate::wire::follow::FollowSpec;
use crate::words::{Generation, Mode, Publish, RegionName};

/// Bytes copied at once from a replica.
const COPY_BYTES: usize = MIB as usize;
/// How long a replica of the life before may take to be found.
const FIND_DEADLINE: Duration = Duration::from_secs(30);
/// How long it may take to get here without getting on: what is equal is compared, and not
/// seen to come.
const SYNC_DEADLINE: Duration = Duration::from_secs(120);
/// Pause between two looks at it.
const RECOVER_PAUSE: Duration = Duration::from_millis(10);

/// A segment, and what the server does with it.
pub(super) struct Made {
    pub(super) incarnation: Incarnation,
    pub(super) memory: Box<dyn Memory + Send>,
    /// Open for reading only.
    pub(super) data: OwnedFd,
    /// The same for writing, where clients may.
    pub(super) writable: Option<OwnedFd>,
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
    /// How often the segment was recovered.
    recoveries: U64,
    rest: [u8; 4],
}

impl Page {
    fn of(
        config: &SpaceConfig,
        position: usize,
        incarnation: Incarnation,
        recoveries: u64,
    ) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION.into(),
            zero: [0; 4],
            incarnation: incarnation.0.into(),
            map: config.map.digest(),
            position: (position as u32).into(),
            recoveries: recoveries.into(),
            rest: [0; 4],
        }
    }
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

/// What the replica of the life before is called while it is copied: never as the segment.
fn former_name(at: usize) -> RegionName {
    let name = format!("space.recover.{at}").parse();
    name.expect("short, and of what names have")
}

/// A segment that is lost with this process. No node looks at it, and so nothing is kept
/// of it twice.
pub(super) fn in_memory(config: &SpaceConfig, server: &Server) -> Result<Made, SpaceError> {
    let size = config.map.segment_size();
    let incarnation = Incarnation(Generation::random().0);
    if config.local_writers {
        // No region: nobody else may map one of those for writing.
        let (memory, data) = shared_segment(region_name(&server.name).as_str(), size)?;
        return Ok(Made {
            incarnation,
            memory: Box::new(memory),
            data: memfd::reopen_read_only(&data)?,
            writable: Some(data),
            replica: None,
        });
    }
    let region = Region::create(&region_name(&server.name), size, &RegionOptions::default())?;
    let data = memfd::reopen_read_only(region.data_fd())?;
    Ok(Made {
        incarnation,
        memory: Box::new(Segment::new(Box::new(region), size, None)?),
        data,
        writable: None,
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
/// begins with the newest that `recover` has of the life before, if any are given.
pub(super) fn with_replica(
    config: &SpaceConfig,
    position: usize,
    recover: &[FollowSpec],
    node: &Node,
) -> Result<Made, SpaceError> {
    let size = config.map.segment_size();
    let name = &config.map.servers()[position].name;
    let former = Former::newest(recover, config, position, node)?;
    let fresh = Incarnation(Generation::random().0);
    let incarnation = former.as_ref().map_or(fresh, |former| former.incarnation);
    let recoveries = former
        .as_ref()
        .map_or(0, |former| former.age.recoveries + 1);
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
        let page = Page::of(config, position, incarnation, recoveries);
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
        writable: None,
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
    generation: Generation,
    age: Age,
}

/// How far a replica came. Replicas of one life are ordered by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Age {
    recoveries: u64,
    epoch: u64,
}

impl Former {
    /// The newest of several replicas. A reply waits for one of them, so the others may be
    /// older, and nothing in them says so.
    fn newest(
        sources: &[FollowSpec],
        config: &SpaceConfig,
        position: usize,
        node: &Node,
    ) -> Result<Option<Self>, SpaceError> {
        let mut newest: Option<Self> = None;
        for (at, source) in sources.iter().enumerate() {
            let found = Self::find(source, at, config, position, node)?;
            let Some(other) = newest.take() else {
                newest = Some(found);
                continue;
            };
            if let Some(problem) = found.is_unlike(&other) {
                return Err(SpaceError::OtherReplica {
                    source_name: found.source.as_str().into(),
                    problem,
                });
            }
            let (newer, older) = match found.age > other.age {
                true => (found, other),
                false => (other, found),
            };
            tracing::info!(
                newer = newer.source,
                older = older.source,
                epochs_behind = newer.age.epoch.saturating_sub(older.age.epoch),
                "one replica has more than another"
            );
            older.forget(node)?;
            newest = Some(newer);
        }
        Ok(newest)
    }

    /// Why it cannot be said which of two replicas is newer.
    fn is_unlike(&self, other: &Self) -> Option<&'static str> {
        if self.incarnation != other.incarnation {
            return Some("it holds another life than the replica before; name only one of them");
        }
        let same = self.age.recoveries == other.age.recoveries;
        if same && self.generation != other.generation {
            return Some("two servers went on with this life; name only one replica");
        }
        None
    }

    fn find(
        source: &FollowSpec,
        at: usize,
        config: &SpaceConfig,
        position: usize,
        node: &Node,
    ) -> Result<Self, SpaceError> {
        let local = former_name(at);
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
        let until = Instant::now() + FIND_DEADLINE;
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
            generation: reader.generation(),
            reader,
            local,
            source: shown,
            incarnation: Incarnation(page.incarnation.get()),
            age: Age {
                recoveries: page.recoveries.get(),
                epoch,
            },
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
            if epoch.number != self.age.epoch {
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
        tracing::info!(source = self.source, epoch = self.age.epoch, "recovered");
        Ok(())
    }

    fn forget(self, node: &Node) -> Result<(), SpaceError> {
        drop(self.reader);
        Ok(connect(node)?.unfollow(self.local.as_str())?)
    }
}

/// Waits until a replica that was asked for is whole; as long as it takes while it gets on.
fn await_following(node: &Node, local: &RegionName, shown: &str) -> Result<(), SpaceError> {
    let mut control = connect(node)?;
    let mut until = Instant::now() + FIND_DEADLINE;
    let mut seen = None;
    loop {
        let regions = control.status()?.regions;
        let found = regions.iter().find(|region| region.name == local.as_str());
        if found.is_some_and(|region| region.state == "following") {
            return Ok(());
        }
        let now = Instant::now();
        let coming = found.filter(|region| region.state != "connecting");
        // A source that is not whole itself says nothing more for ever.
        let progress = coming.map(|region| (region.bytes_changed, region.resident_bytes));
        if progress.is_some() && progress != seen {
            (seen, until) = (progress, now + SYNC_DEADLINE);
        }
        if now >= until {
            return Err(SpaceError::Replica {
                source_name: shown.into(),
                source: ReadError::TimedOut,
            });
        }
        std::thread::sleep(RECOVER_PAUSE);
    }
}
