//! The bare chain that a commit goes through, by the cheapest means for each step:
//!
//! ```text
//! writer --eventfd--> source --60 bytes of TCP--> replica --memcpy, futex--> reader
//! ```

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, ensure};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uffd_sync::shm::SharedMemory;
use uffd_sync::sys::futex;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::memfd;
use uffd_sync::sys::process::monotonic_ns;
use uffd_sync::units::PAGE_SIZE;

use crate::harness::{Channel, Child, Latencies};
use crate::nodes::{PATIENCE, value_of};
use crate::watch::time_series;

pub(crate) const ROLE_SOURCE: &str = "bare-source";
pub(crate) const ROLE_REPLICA: &str = "bare-replica";
pub(crate) const ROLE_READER: &str = "bare-reader";

/// As long as the update of a 4-byte change.
const MESSAGE: usize = 60;
/// Where the value stands in the shared page, and where the reader's futex.
const VALUE: u64 = 0;
const FUTEX: u64 = 64;

/// Waits for the doorbell and sends what the page holds, for ever.
pub(crate) fn serve_source(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let mut replica = TcpStream::connect(args.first().context("an address")?)?;
    replica.set_nodelay(true)?;
    let (_, fds) = channel.receive()?.context("no descriptors")?;
    let [doorbell, page] = <[OwnedFd; 2]>::try_from(fds)
        .ok()
        .context("two descriptors")?;
    let page = SharedMemory::new(Mapping::shared(page, PAGE_SIZE, Access::ReadOnly)?);
    let mut doorbell = File::from(doorbell);
    channel.send("ready", &[])?;
    let mut message = [0; MESSAGE];
    loop {
        doorbell.read_exact(&mut [0; 8])?;
        page.read(VALUE, &mut message[MESSAGE - 8..])?;
        replica.write_all(&message)?;
    }
}

/// Takes messages off the stream into a page and wakes who waits, until its end.
pub(crate) fn serve_replica(mut channel: Channel, _args: &[String]) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    channel.send(&listener.local_addr()?.to_string(), &[])?;
    let (mut source, _) = listener.accept()?;
    source.set_nodelay(true)?;
    let (_, mut fds) = channel.receive()?.context("no descriptor")?;
    let page = fds.pop().context("one descriptor")?;
    let page = SharedMemory::new(Mapping::shared(page, PAGE_SIZE, Access::ReadWrite)?);
    channel.send("ready", &[])?;
    let mut message = [0; MESSAGE];
    loop {
        match source.read_exact(&mut message) {
            // The source was ended first.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        page.write(VALUE, &message[MESSAGE - 8..])?;
        let word = page.atomic_u32(FUTEX);
        // SYNC(bare_chain): publishes the value; pairs with the reader's load.
        word.fetch_add(1, Ordering::Release);
        futex::wake(word, u32::MAX)?;
    }
}

/// Sleeps until the page shows each value of a series.
pub(crate) fn serve_reader(mut channel: Channel, _args: &[String]) -> anyhow::Result<()> {
    let (_, mut fds) = channel.receive()?.context("no descriptor")?;
    let page = fds.pop().context("one descriptor")?;
    let page = SharedMemory::new(Mapping::shared(page, PAGE_SIZE, Access::ReadOnly)?);
    let word = page.atomic_u32(FUTEX);
    channel.send("ready", &[])?;
    while let Some((line, _)) = channel.receive()? {
        let (first, count) = line.split_once(' ').context("FIRST COUNT")?;
        let first: u64 = first.parse()?;
        for seq in first..first + count.parse::<u64>()? {
            let end = Instant::now() + PATIENCE;
            loop {
                // SYNC(bare_chain): pairs with the replica's addition.
                let before = word.load(Ordering::Acquire);
                if page.load::<u64>(VALUE)? == value_of(seq) {
                    break;
                }
                ensure!(Instant::now() < end, "value {seq} does not come");
                futex::wait(word, before, Some(end))?;
            }
            channel.send(&monotonic_ns().to_string(), &[])?;
        }
    }
    Ok(())
}

/// The chain, with this process as its writer.
pub(crate) struct Chain {
    reader: Child,
    page: SharedMemory,
    doorbell: EventFd,
    _source: Child,
    _replica: Child,
}

impl Chain {
    /// Starts the three other processes; `cores` for the source and for the replica
    /// with its reader.
    pub(crate) fn start(cores: [Option<usize>; 2]) -> anyhow::Result<Self> {
        let page = memfd::create("bench-chain", PAGE_SIZE)?;
        let shown = memfd::create("bench-chain", PAGE_SIZE)?;
        let doorbell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let mut replica = Child::spawn(ROLE_REPLICA, cores[1], &[])?;
        let (address, _) = replica.hear()?;
        let mut source = Child::spawn(ROLE_SOURCE, cores[0], &[&address])?;
        let mut reader = Child::spawn(ROLE_READER, cores[1], &[])?;
        source.tell("take", &[doorbell.as_fd(), page.as_fd()])?;
        replica.tell("take", &[shown.as_fd()])?;
        reader.tell("take", &[shown.as_fd()])?;
        for child in [&mut source, &mut replica, &mut reader] {
            child.hear()?;
        }
        let page = SharedMemory::new(Mapping::shared(&page, PAGE_SIZE, Access::ReadWrite)?);
        Ok(Self {
            reader,
            page,
            doorbell,
            _source: source,
            _replica: replica,
        })
    }

    /// From ringing the doorbell to the reader awake, for each value of a series.
    pub(crate) fn time(&mut self, first: u64, count: u64) -> anyhow::Result<Latencies> {
        let (page, doorbell) = (&self.page, &self.doorbell);
        time_series(
            &mut self.reader,
            (first, count),
            |seq| Ok(page.store(VALUE, &value_of(seq))?),
            || doorbell.write(1).map(drop).map_err(Into::into),
        )
    }
}
