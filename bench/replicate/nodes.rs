//! Two nodes on loopback, a region on the first and its replica on the second.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tempfile::TempDir;
use uffd_sync::client::{self, Reader, Writer, WriterOptions};
use uffd_sync::node::{Node, NodeConfig};
use uffd_sync::units::PAGE_SIZE;
use uffd_sync::wire::control::{RegionStatus, ReplicaStatus};
use uffd_sync::words::{Mode, Publish};

use crate::harness::{Channel, Child, Span};

pub(crate) const ROLE: &str = "node";

/// Longest that a region of these benches takes to be replicated, or a commit.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The node process: says its address, and serves until its channel is closed.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let [name, socket] = args else {
        bail!("a node needs a name and a socket")
    };
    let config = NodeConfig {
        name: name.clone(),
        socket: PathBuf::from(socket),
        listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        ..NodeConfig::default()
    };
    let node = Node::start(&config)?;
    let address = node
        .listen_address()
        .context("a node that listens has an address")?;
    channel.send(&address.to_string(), &[])?;
    while channel.receive()?.is_some() {}
    Ok(node.stop()?)
}

/// A source node and a replica node.
pub(crate) struct Pair {
    source: Child,
    replica: Child,
    address: String,
    folder: TempDir,
}

impl Pair {
    /// Starts both; `cores` for the source and the replica, or anywhere.
    pub(crate) fn start(cores: [Option<usize>; 2]) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        let mut source = Child::spawn(ROLE, cores[0], &["source", &path("source.sock")])?;
        let mut replica = Child::spawn(ROLE, cores[1], &["replica", &path("replica.sock")])?;
        let (address, _) = source.hear()?;
        replica.hear()?;
        Ok(Self {
            source,
            replica,
            address,
            folder,
        })
    }

    pub(crate) fn source_socket(&self) -> PathBuf {
        self.folder.path().join("source.sock")
    }

    pub(crate) fn replica_socket(&self) -> PathBuf {
        self.folder.path().join("replica.sock")
    }

    /// Makes a region of this process on the source, without followers.
    pub(crate) fn writer(
        &self,
        name: &str,
        size: u64,
        mode: Mode,
        shared: bool,
    ) -> anyhow::Result<Writer> {
        let options = WriterOptions {
            mode,
            publish: Publish::Commit,
            shared,
            ..WriterOptions::default()
        };
        let writer = Writer::create(self.source_socket(), name, size, &options)?;
        for page in 0..size / PAGE_SIZE {
            writer.write(page * PAGE_SIZE, &page_start(page).to_le_bytes())?;
        }
        writer.mark_region_changed(0, size)?;
        writer.commit(PATIENCE)?;
        Ok(writer)
    }

    /// Makes a region all of whose pages hold something, follows it on the replica,
    /// and waits until that is whole.
    pub(crate) fn replicated(&self, name: &str, size: u64, mode: Mode) -> anyhow::Result<Writer> {
        let writer = self.writer(name, size, mode, true)?;
        let mut node = client::Node::connect(self.replica_socket())?;
        self.follow(&mut node, name)?;
        if let Err(error) = writer.commit(PATIENCE)?.wait_acked(1, PATIENCE) {
            let replica = self.status(&self.replica_socket(), name)?;
            let source = self.status(&self.source_socket(), name)?;
            let seen = format!("the first sync: {source:?} -> {replica:?}");
            return Err(anyhow::Error::new(error).context(seen));
        }
        Ok(writer)
    }

    /// Lets the replica node follow the source's region of that name.
    pub(crate) fn follow(&self, node: &mut client::Node, name: &str) -> anyhow::Result<()> {
        Ok(node.follow(&format!("tcp://{}/{name}", self.address))?)
    }

    /// Bytes of the region's updates that the source has sent, once the replica has
    /// acknowledged `epoch`.
    pub(crate) fn bytes_sent(&self, name: &str, epoch: u64) -> anyhow::Result<u64> {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status(&self.source_socket(), name)?;
            let replica: &ReplicaStatus = status.replicas.first().context("nobody follows")?;
            if replica.acked_epoch >= epoch {
                return Ok(replica.bytes_sent);
            }
            ensure!(
                Instant::now() < end,
                "epoch {epoch} is not acknowledged: {replica:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn status(&self, socket: &Path, name: &str) -> anyhow::Result<RegionStatus> {
        let status = client::Node::connect(socket)?.status()?;
        let found = status
            .regions
            .into_iter()
            .find(|region| region.name == name);
        found.with_context(|| format!("no region {name}"))
    }

    /// Compares source and replica byte for byte, by digests of the memory itself.
    pub(crate) fn verify(&self, name: &str, writer: &Writer) -> anyhow::Result<()> {
        let epoch = writer.commit(PATIENCE)?;
        epoch.wait_acked(1, PATIENCE)?;
        let source = Reader::attach(self.source_socket(), name)?.digest()?.0;
        let replica = Reader::attach(self.replica_socket(), name)?.digest()?.0;
        ensure!(source == replica, "the replica of {name} is not its source");
        Ok(())
    }

    /// Ends both nodes and demands that they end well.
    pub(crate) fn end(self) -> anyhow::Result<()> {
        self.replica.end()?;
        self.source.end()
    }
}

/// What a fresh region's pages begin with: nothing is zero.
fn page_start(page: u64) -> u64 {
    page + 1
}

/// The writer's mapping, for bare scans of it.
pub(crate) fn span_of(writer: &Writer) -> Span {
    Span {
        address: writer.mapping().address(),
        len: writer.mapping().len(),
    }
}

/// Where the value of number `seq` goes: another page each time.
pub(crate) fn place_of(seq: u64, size: u64) -> u64 {
    // A prime that no number of pages is a multiple of.
    let page = seq.wrapping_mul(7_919) % (size / PAGE_SIZE);
    page * PAGE_SIZE + 8 * (seq % 32)
}

/// Value of number `seq`: no page starts with it.
pub(crate) fn value_of(seq: u64) -> u64 {
    seq | 1 << 63
}
