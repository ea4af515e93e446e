//! The bare chain that a commit goes through, by the cheapest means for each step:
//!
//! ```text
//! writer --eventfd--> source --60 bytes of TCP--> replica --memcpy, futex--> reader
//! ```
//!
//! Source and replica wait by blocking calls, or each on an io_uring, as nodes do.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, ensure};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uffd_sync::shm::SharedMemory;
use uffd_sync::sys::buffer::Buffer;
use uffd_sync::sys::futex;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::memfd;
use uffd_sync::sys::process::monotonic_ns;
use uffd_sync::sys::ring::{Completion, Op, Ring, SendBuf};
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

/// How source and replica wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Means {
    /// In `read(2)`.
    Calls,
    /// In `io_uring_enter(2)`.
    Ring,
}

impl Means {
    const fn word(self) -> &'static str {
        match self {
            Self::Calls => "calls",
            Self::Ring => "ring",
        }
    }

    fn of(args: &[String]) -> Self {
        match args.last() {
            Some(word) if word == Self::Ring.word() => Self::Ring,
            _ => Self::Calls,
        }
    }
}

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
    if Means::of(args) == Means::Ring {
        return serve_source_by_ring(doorbell, &page, replica);
    }
    let mut message = [0; MESSAGE];
    loop {
        doorbell.read_exact(&mut [0; 8])?;
        page.read(VALUE, &mut message[MESSAGE - 8..])?;
        replica.write_all(&message)?;
    }
}

fn serve_source_by_ring(
    mut doorbell: File,
    page: &SharedMemory,
    replica: TcpStream,
) -> anyhow::Result<()> {
    let mut ring = Ring::new(8)?;
    let bell = Arc::new(OwnedFd::from(doorbell.try_clone()?));
    let socket = Arc::new(OwnedFd::from(replica));
    loop {
        let op = Op::Poll {
            fd: Arc::clone(&bell),
            writable: false,
        };
        ring.submit(0, op)?;
        while !matches!(next(&mut ring)?.op, Op::Poll { .. }) {}
        doorbell.read_exact(&mut [0; 8])?;
        let mut message = vec![0; MESSAGE];
        page.read(VALUE, &mut message[MESSAGE - 8..])?;
        let op = Op::Send {
            socket: Arc::clone(&socket),
            buf: SendBuf::Owned(message),
            from: 0,
        };
        ring.submit(0, op)?;
    }
}

/// The next completion, with a system call only if none is at hand.
fn next(ring: &mut Ring) -> anyhow::Result<Completion> {
    loop {
        if let Some(completion) = ring.next() {
            return Ok(completion);
        }
        ring.enter(None)?;
    }
}

/// Takes messages off the stream into a page and wakes who waits, until its end.
pub(crate) fn serve_replica(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    channel.send(&listener.local_addr()?.to_string(), &[])?;
    let (mut source, _) = listener.accept()?;
    source.set_nodelay(true)?;
    let (_, mut fds) = channel.receive()?.context("no descriptor")?;
    let page = fds.pop().context("one descriptor")?;
    let page = SharedMemory::new(Mapping::shared(page, PAGE_SIZE, Access::ReadWrite)?);
    channel.send("ready", &[])?;
    if Means::of(args) == Means::Ring {
        return serve_replica_by_ring(source, &page);
    }
    let mut message = [0; MESSAGE];
    loop {
        match source.read_exact(&mut message) {
            // The source was ended first.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        show(&page, &message)?;
    }
}

fn serve_replica_by_ring(source: TcpStream, page: &SharedMemory) -> anyhow::Result<()> {
    let mut ring = Ring::new(8)?;
    let socket = Arc::new(OwnedFd::from(source));
    let mut message = Buffer::from(Vec::with_capacity(MESSAGE));
    loop {
        let op = Op::Recv {
            socket: Arc::clone(&socket),
            buf: message,
            upto: MESSAGE,
        };
        ring.submit(0, op)?;
        let completion = next(&mut ring)?;
        let Op::Recv { buf, .. } = completion.op else {
            anyhow::bail!("something else was asked for");
        };
        if completion.result? == 0 {
            return Ok(());
        }
        message = buf;
        if message.len() == MESSAGE {
            show(page, &message)?;
            message.truncate(0);
        }
    }
}

/// Puts a message's value into the page and wakes who waits.
fn show(page: &SharedMemory, message: &[u8]) -> anyhow::Result<()> {
    page.write(VALUE, &message[MESSAGE - 8..])?;
    let word = page.atomic_u32(FUTEX);
    // SYNC(bare_chain): publishes the value; pairs with the reader's load.
    word.fetch_add(1, Ordering::Release);
    futex::wake(word, u32::MAX)?;
    Ok(())
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
    pub(crate) fn start(cores: [Option<usize>; 2], means: Means) -> anyhow::Result<Self> {
        let page = memfd::create("bench-chain", PAGE_SIZE)?;
        let shown = memfd::create("bench-chain", PAGE_SIZE)?;
        let doorbell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let mut replica = Child::spawn(ROLE_REPLICA, cores[1], &[means.word()])?;
        let (address, _) = replica.hear()?;
        let mut source = Child::spawn(ROLE_SOURCE, cores[0], &[&address, means.word()])?;
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
