//! The bare echo: requests and replies of the same length over the same kind of socket,
//! with nothing done in between.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use anyhow::{Context, ensure};
use uffd_sync::space::frame::{REPLY_BYTES, REQUEST_BYTES};

use crate::harness::{Channel, Child};
use crate::line::{Line, Waits};
use crate::servers::PLACEMENT;
use crate::work::{Over, SEGMENT, Shape, Side, What};

pub(crate) const ROLE: &str = "space-echo";
/// Bytes received at once.
const ROOM: usize = 256 * 1024;

/// Lengths of a request and of its reply.
fn lengths(shape: Shape) -> (usize, usize) {
    match shape.what {
        What::Read => (REQUEST_BYTES, REPLY_BYTES + shape.len),
        What::Write => (REQUEST_BYTES + shape.len, REPLY_BYTES),
    }
}

/// The echoing process: arguments are the socket's path or `tcp`, both lengths, and how it
/// waits.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let [place, asked, answered, waits] = args else {
        anyhow::bail!("an echo needs a place, two lengths, and how to wait")
    };
    let (asked, answered): (usize, usize) = (asked.parse()?, answered.parse()?);
    let waits = Waits::of_name(waits);
    let mut stream = if place == "tcp" {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        channel.send(&listener.local_addr()?.port().to_string(), &[])?;
        let stream = listener.accept()?.0;
        stream.set_nodelay(true)?;
        Line::new(stream, waits)
    } else {
        let listener = UnixListener::bind(place)?;
        channel.send("ready", &[])?;
        Line::new(listener.accept()?.0, waits)
    };
    // As with a server, the bytes are those of a memory that is larger than a cache.
    let memory = vec![7; SEGMENT as usize];
    let mut at = 0;
    let mut room = vec![0; ROOM];
    let mut out = Vec::new();
    let mut partly = 0;
    loop {
        let bytes = stream.read(&mut room)?;
        if bytes == 0 {
            return Ok(());
        }
        partly += bytes;
        let whole = partly / asked;
        partly %= asked;
        out.clear();
        for _ in 0..whole {
            at = (at + 7 * answered) % (memory.len() - answered);
            out.extend_from_slice(&memory[at..at + answered]);
        }
        stream.write_all(&out)?;
    }
}

/// The asking side.
pub(crate) struct Echo {
    stream: Line,
    out: Vec<u8>,
    room: Vec<u8>,
    _child: Child,
}

impl Echo {
    pub(crate) fn start(over: Over, shape: Shape, waits: Waits) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let (asked, answered) = lengths(shape);
        let lengths = [asked.to_string(), answered.to_string()];
        let path = folder.path().join("echo");
        let place = match over {
            Over::Tcp => "tcp",
            Over::Unix => path.to_str().context("a plain path")?,
        };
        let [_, core] = PLACEMENT.cores();
        let args = [place, &lengths[0], &lengths[1], waits.name()];
        let mut child = Child::spawn(ROLE, core, &args)?;
        let told = child.hear()?.0;
        let stream = match over {
            Over::Tcp => Line::tcp(told.parse()?, waits)?,
            Over::Unix => Line::unix(&path, waits)?,
        };
        Ok(Self {
            stream,
            out: vec![1; asked * shape.depth],
            room: vec![0; (answered * shape.depth).min(ROOM)],
            _child: child,
        })
    }
}

impl Side for Echo {
    fn burst(&mut self, shape: Shape, _offsets: &[u64]) -> anyhow::Result<()> {
        let (_, answered) = lengths(shape);
        let Self {
            stream, out, room, ..
        } = self;
        // A long burst is sent in parts, so that both sides never send at once for ever.
        let parts = (out.len().max(answered * shape.depth) / ROOM).clamp(1, shape.depth);
        let each = shape.depth / parts;
        for part in out.chunks(out.len() / parts) {
            stream.write_all(part)?;
            let mut missing = answered * each;
            while missing > 0 {
                let most = missing.min(room.len());
                let bytes = stream.read(&mut room[..most])?;
                ensure!(bytes > 0, "the echo has ended");
                missing -= bytes;
            }
        }
        Ok(())
    }
}
