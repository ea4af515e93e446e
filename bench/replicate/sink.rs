//! The bare receiver of bulk data, and its sender: chunks with a CRC-32C over TCP,
//! staged until the last one has arrived, then copied to their final place.
//!
//! ```text
//! stream:  total | chunk: len, crc, 0 or pages ... | bytes ...
//! ```
//! Staging memory is as large as the data and cold: new to the process in each
//! transfer, as memory that a replica stages one update in is. The bare first sync goes
//! straight into the final place, which is new too.

use std::io::{IoSlice, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use anyhow::{Context, bail, ensure};
use uffd_sync::checksum::crc32c;
use uffd_sync::limits::MAX_CHUNK;
use uffd_sync::shm::OwnedMemory;
use uffd_sync::sys::map::PrivateMemory;
use uffd_sync::sys::process::monotonic_ns;
use uffd_sync::units::PAGE_SIZE;

use crate::harness::{Channel, Child};

pub(crate) const ROLE: &str = "sink";

const CHUNK: usize = MAX_CHUNK as usize;
const PAGE: usize = PAGE_SIZE as usize;
/// Bytes of a number on the stream.
const NUMBER: usize = 8;

/// Memory of the sender or the receiver, every page allocated.
pub(crate) fn allocated(size: u64) -> anyhow::Result<OwnedMemory> {
    let mut memory = OwnedMemory::create("bench-sink", size)?;
    memory.fill(1);
    Ok(memory)
}

/// The sink process: for each transfer answers the time at which its memory held all
/// of it, and for `digest` the checksum of its memory.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let size: u64 = args.first().context("a size")?.parse()?;
    let mut sink = Sink {
        memory: allocated(size)?,
        staging: PrivateMemory::new(size)?,
        pages: Vec::new(),
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    channel.send(&listener.local_addr()?.to_string(), &[])?;
    let (mut stream, _) = listener.accept()?;
    while let Some((line, _)) = channel.receive()? {
        if line != "fresh" && line != "placed" {
            sink.staging = PrivateMemory::new(size)?;
            sink.staging.advise_huge(0..size);
        }
        let answer = match line.as_str() {
            "region" => sink.take_region(&mut stream)?,
            "pages" => sink.take_pages(&mut stream)?,
            "fresh" => {
                sink.memory = OwnedMemory::create("bench-sink", size)?;
                0
            }
            "placed" => sink.take_placed(&mut stream)?,
            "digest" => u64::from(crc32c(&sink.memory)),
            other => bail!("{other} is no order"),
        };
        channel.send(&answer.to_string(), &[])?;
    }
    Ok(())
}

struct Sink {
    memory: OwnedMemory,
    staging: PrivateMemory,
    /// Numbers of the pages in staging.
    pages: Vec<u64>,
}

impl Sink {
    fn take_region(&mut self, stream: &mut TcpStream) -> anyhow::Result<u64> {
        for chunk in self.staging.chunks_mut(CHUNK) {
            let crc = number(stream)?;
            stream.read_exact(chunk)?;
            ensure!(u64::from(crc32c(chunk)) == crc, "a chunk is damaged");
        }
        self.memory.copy_from_slice(&self.staging);
        Ok(monotonic_ns())
    }

    /// Straight into the final place, chunk by chunk.
    fn take_placed(&mut self, stream: &mut TcpStream) -> anyhow::Result<u64> {
        for chunk in self.memory.chunks_mut(CHUNK) {
            let crc = number(stream)?;
            stream.read_exact(chunk)?;
            ensure!(u64::from(crc32c(chunk)) == crc, "a chunk is damaged");
        }
        Ok(monotonic_ns())
    }

    fn take_pages(&mut self, stream: &mut TcpStream) -> anyhow::Result<u64> {
        let mut left = number(stream)? as usize;
        self.pages.clear();
        let mut filled = 0;
        while left > 0 {
            let count = left.min(CHUNK / PAGE);
            let crc = number(stream)?;
            for _ in 0..count {
                self.pages.push(number(stream)?);
            }
            let chunk = &mut self.staging[filled..filled + count * PAGE];
            stream.read_exact(chunk)?;
            ensure!(u64::from(crc32c(chunk)) == crc, "a chunk is damaged");
            filled += chunk.len();
            left -= count;
        }
        for (page, content) in self.pages.iter().zip(self.staging.chunks(PAGE)) {
            let at = *page as usize * PAGE;
            self.memory[at..at + PAGE].copy_from_slice(content);
        }
        Ok(monotonic_ns())
    }
}

fn number(stream: &mut TcpStream) -> anyhow::Result<u64> {
    let mut bytes = [0; NUMBER];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The sender's end.
pub(crate) struct Sender {
    sink: Child,
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Bytes sent so far, headers included.
    pub(crate) bytes_sent: u64,
}

impl Sender {
    /// Starts a sink of `size` bytes and connects to it.
    pub(crate) fn start(size: u64) -> anyhow::Result<Self> {
        let mut sink = Child::spawn(ROLE, None, &[&size.to_string()])?;
        let (address, _) = sink.hear()?;
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            sink,
            stream,
            buffer: vec![0; CHUNK],
            bytes_sent: 0,
        })
    }

    /// Streams all of `memory`; the time at which the sink held it.
    pub(crate) fn send_region(&mut self, memory: &[u8]) -> anyhow::Result<u64> {
        self.stream_region("region", memory)
    }

    /// Gives the sink memory that nothing was ever in.
    pub(crate) fn freshen(&mut self) -> anyhow::Result<()> {
        self.sink.ask("fresh")?;
        Ok(())
    }

    /// Streams all of `memory` into its place, without staging; the time as above.
    pub(crate) fn place_region(&mut self, memory: &[u8]) -> anyhow::Result<u64> {
        self.stream_region("placed", memory)
    }

    fn stream_region(&mut self, order: &str, memory: &[u8]) -> anyhow::Result<u64> {
        self.sink.tell(order, &[])?;
        for chunk in memory.chunks(CHUNK) {
            let crc = u64::from(crc32c(chunk)).to_le_bytes();
            self.bytes_sent += send(&mut self.stream, &crc, chunk)?;
        }
        Ok(self.sink.hear()?.0.parse()?)
    }

    /// Sends whole pages of `memory`, each copied aside before it is summed, since
    /// live memory may change under the checksum; the time at which the sink held them.
    pub(crate) fn send_pages(&mut self, memory: &[u8], pages: &[u64]) -> anyhow::Result<u64> {
        self.sink.tell("pages", &[])?;
        let mut header = (pages.len() as u64).to_le_bytes().to_vec();
        for some in pages.chunks(CHUNK / PAGE) {
            let chunk = &mut self.buffer[..some.len() * PAGE];
            for (page, place) in some.iter().zip(chunk.chunks_mut(PAGE)) {
                let at = *page as usize * PAGE;
                place.copy_from_slice(&memory[at..at + PAGE]);
            }
            header.extend(u64::from(crc32c(chunk)).to_le_bytes());
            header.extend(some.iter().flat_map(|page| page.to_le_bytes()));
            self.bytes_sent += send(&mut self.stream, &header, chunk)?;
            header.clear();
        }
        Ok(self.sink.hear()?.0.parse()?)
    }

    /// Whether the sink holds `memory`.
    pub(crate) fn verify(&mut self, memory: &[u8]) -> anyhow::Result<()> {
        let theirs: u64 = self.sink.ask("digest")?.parse()?;
        ensure!(
            theirs == u64::from(crc32c(memory)),
            "the sink does not hold what was sent"
        );
        Ok(())
    }
}

/// Writes both parts, in one call if the socket takes them; how many bytes they have.
fn send(stream: &mut TcpStream, header: &[u8], chunk: &[u8]) -> anyhow::Result<u64> {
    let total = header.len() + chunk.len();
    let mut sent = stream.write_vectored(&[IoSlice::new(header), IoSlice::new(chunk)])?;
    if sent < header.len() {
        stream.write_all(&header[sent..])?;
        sent = header.len();
    }
    stream.write_all(&chunk[sent - header.len()..])?;
    Ok(total as u64)
}
