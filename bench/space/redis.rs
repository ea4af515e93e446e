//! Redis as the peer: one string as long as a segment, GETRANGE and SETRANGE, by its own
//! protocol over a connection of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::line::{Line, Waits};
use crate::servers::{Process, stamp};
use crate::work::{Over, PATIENCE, SEGMENT, Shape, Side, What, check, pattern};

/// A server on a port and a Unix socket of its own, without anything kept on disk.
pub(crate) struct Redis {
    _process: Process,
    port: u16,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

/// Whether there is one to compare with.
pub(crate) fn is_installed() -> bool {
    let version = Command::new("redis-server").arg("--version").output();
    version.is_ok_and(|output| output.status.success())
}

impl Redis {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("redis.sock");
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(folder.path())
            .arg("--unixsocket")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting redis-server")?;
        let redis = Self {
            _process: Process(child),
            port,
            path,
            _folder: folder,
        };
        let deadline = Instant::now() + PATIENCE;
        let mut client = loop {
            match redis.connect(Over::Unix) {
                Ok(client) => break client,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        client.set(0, &pattern(0, SEGMENT as usize))?;
        client.answer_number()?;
        Ok(redis)
    }

    pub(crate) fn connect(&self, over: Over) -> anyhow::Result<Client> {
        // Its client waits as ours does.
        let stream = match over {
            Over::Tcp => Line::tcp(self.port, Waits::Looking)?,
            Over::Unix => Line::unix(&self.path, Waits::Looking)?,
        };
        Ok(Client {
            stream: BufReader::with_capacity(64 * 1024, stream),
            out: Vec::new(),
            buffer: Vec::new(),
            line: Vec::new(),
        })
    }
}

/// One connection.
pub(crate) struct Client {
    stream: BufReader<Line>,
    out: Vec<u8>,
    buffer: Vec<u8>,
    line: Vec<u8>,
}

impl Client {
    fn set(&mut self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
        self.out.clear();
        put_set(&mut self.out, offset, bytes);
        Ok(self.stream.get_mut().write_all(&self.out)?)
    }

    /// The rest of a line that begins with `kind`, as a number.
    fn number(&mut self, kind: u8) -> anyhow::Result<u64> {
        self.line.clear();
        self.stream.read_until(b'\n', &mut self.line)?;
        let text = String::from_utf8_lossy(&self.line);
        ensure!(self.line.first() == Some(&kind), "Redis answered {text:?}");
        Ok(text[1..].trim().parse()?)
    }

    fn answer_number(&mut self) -> anyhow::Result<u64> {
        self.number(b':')
    }

    fn answer_bytes(&mut self) -> anyhow::Result<()> {
        let len = self.number(b'$')? as usize;
        self.buffer.resize(len + 2, 0);
        self.stream.read_exact(&mut self.buffer)?;
        self.buffer.truncate(len);
        Ok(())
    }
}

fn put_set(out: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let digits = offset.to_string();
    let head = format!(
        "*4\r\n$8\r\nSETRANGE\r\n$1\r\ns\r\n${}\r\n{digits}\r\n${}\r\n",
        digits.len(),
        bytes.len()
    );
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

fn put_get(out: &mut Vec<u8>, offset: u64, len: usize) {
    let (first, last) = (offset.to_string(), (offset + len as u64 - 1).to_string());
    let head = format!(
        "*4\r\n$8\r\nGETRANGE\r\n$1\r\ns\r\n${}\r\n{first}\r\n${}\r\n{last}\r\n",
        first.len(),
        last.len()
    );
    out.extend_from_slice(head.as_bytes());
}

impl Side for Client {
    fn burst(&mut self, shape: Shape, offsets: &[u64]) -> anyhow::Result<()> {
        self.out.clear();
        for offset in offsets {
            match shape.what {
                What::Read => put_get(&mut self.out, *offset, shape.len),
                What::Write => {
                    stamp(&mut self.buffer, *offset, shape.len);
                    put_set(&mut self.out, *offset, &self.buffer);
                }
            }
        }
        self.stream.get_mut().write_all(&self.out)?;
        for offset in offsets {
            match shape.what {
                What::Read => {
                    self.answer_bytes()?;
                    check(*offset, &self.buffer)?;
                }
                What::Write => {
                    self.answer_number()?;
                }
            }
        }
        Ok(())
    }
}
