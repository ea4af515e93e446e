//! Servers of a space as users run them, and clients of them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use uffd_sync::client::space::{Answer, Space, SpaceOptions, Transport};
use uffd_sync::space::SpaceConfig;
use uffd_sync::sys::process::pin_to_cpu;

use crate::harness::Placement;
use crate::work::{Over, PATIENCE, SEGMENT, Shape, Side, What, check, pattern};

/// A process that is killed by its id and reaped when dropped.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `start` with the core that servers have in every comparison; what it starts
/// inherits it. The client has the other one.
pub(crate) fn on_their_core<T: Send>(
    start: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let [_, Some(core)] = PLACEMENT.cores() else {
        return start();
    };
    let started = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin_to_cpu(core)?;
            start()
        });
        thread.join()
    });
    started.map_err(|_| anyhow::anyhow!("starting a server panicked"))?
}

/// Where client and server run: both sides of a comparison alike.
pub(crate) const PLACEMENT: Placement = Placement::TwoCores;

/// The servers of one space.
pub(crate) struct Servers {
    _running: Vec<Process>,
    folder: tempfile::TempDir,
    config: SpaceConfig,
}

impl Servers {
    /// Starts `count` servers and writes the pattern everywhere.
    pub(crate) fn start(count: usize) -> anyhow::Result<Self> {
        Self::start_with(count, "")
    }

    /// The same with more lines in their file.
    pub(crate) fn start_with(count: usize, more: &str) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut text = format!("segment_size = {SEGMENT}\nservers = [\n");
        let held: Vec<_> = (0..count)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<_, _>>()?;
        for (at, listener) in held.iter().enumerate() {
            let address = listener.local_addr()?;
            text += &format!("{{ name = \"s{at}\", address = \"{address}\" }},\n");
        }
        drop(held);
        text += "]\n";
        text += more;
        let file = folder.path().join("mcomp.cfg");
        fs::write(&file, &text)?;
        let config = SpaceConfig::parse(&text, &file)?;
        let mut running = Vec::new();
        for at in 0..count {
            running.push(start(folder.path(), &file, at)?);
        }
        let servers = Self {
            _running: running,
            folder,
            config,
        };
        let mut space = servers.connect(Over::Unix, true)?;
        let whole = pattern(0, SEGMENT as usize);
        for at in 0..count as u64 {
            space.write(at * SEGMENT, &whole)?;
        }
        Ok(servers)
    }

    pub(crate) fn connect(&self, over: Over, no_mapping: bool) -> anyhow::Result<Space> {
        let options = SpaceOptions {
            deadline: Some(PATIENCE),
            transport: match over {
                Over::Tcp => Transport::Tcp,
                Over::Unix => Transport::Unix,
            },
            sockets: Some(self.folder.path().join("uffd-sync")),
            no_mapping,
        };
        Ok(Space::connect_with(self.config.clone(), options)?)
    }

    /// Where the first server serves NBD.
    pub(crate) fn nbd_socket(&self) -> PathBuf {
        nbd_socket(self.folder.path(), 0)
    }

    /// Everything is as it was written: what was moved is what it should be.
    pub(crate) fn verify(&self) -> anyhow::Result<()> {
        let mut space = self.connect(Over::Tcp, true)?;
        let whole = pattern(0, SEGMENT as usize);
        let mut found = vec![0; whole.len()];
        for at in 0..self.config.map.servers().len() as u64 {
            space.read(at * SEGMENT, &mut found)?;
            ensure!(
                found == whole,
                "server {at} has other bytes than were written"
            );
        }
        Ok(())
    }
}

fn nbd_socket(folder: &Path, at: usize) -> PathBuf {
    folder.join(format!("s{at}.nbd"))
}

fn start(folder: &Path, file: &Path, at: usize) -> anyhow::Result<Process> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_uffd-sync"))
        .env("XDG_RUNTIME_DIR", folder)
        .args([
            "serve",
            "--until-eof",
            "--server",
            &format!("s{at}"),
            "--space",
        ])
        .arg(file)
        .arg("--nbd")
        .arg(format!("unix:{}", nbd_socket(folder, at).display()))
        .arg("--socket")
        .arg(folder.join(format!("s{at}.control")))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting a server")?;
    let stderr = child.stderr.take().context("its log")?;
    let process = Process(child);
    let mut lines = BufReader::new(stderr).lines();
    loop {
        let line = lines
            .next()
            .context("the server ended before it was ready")??;
        if line.contains("ready") {
            break;
        }
    }
    // What it says later must find a reader.
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
    Ok(process)
}

/// A client of a space, on the servers' addresses from `base` on.
pub(crate) struct Client {
    space: Space,
    base: u64,
    buffer: Vec<u8>,
    tickets: Vec<uffd_sync::client::space::Ticket>,
}

impl Client {
    pub(crate) fn new(servers: &Servers, over: Over, base: u64) -> anyhow::Result<Self> {
        Ok(Self {
            space: servers.connect(over, true)?,
            base,
            buffer: Vec::new(),
            tickets: Vec::new(),
        })
    }
}

impl Side for Client {
    fn burst(&mut self, shape: Shape, offsets: &[u64]) -> anyhow::Result<()> {
        let Self {
            space,
            base,
            buffer,
            tickets,
        } = self;
        if let [offset] = offsets {
            return match shape.what {
                What::Read => {
                    buffer.resize(shape.len, 0);
                    space.read(*base + offset, buffer)?;
                    check(*offset, buffer)
                }
                What::Write => {
                    stamp(buffer, *offset, shape.len);
                    Ok(space.write(*base + offset, buffer)?)
                }
            };
        }
        tickets.clear();
        for offset in offsets {
            tickets.push(match shape.what {
                What::Read => space.submit_read(*base + offset, shape.len as u64)?,
                What::Write => {
                    stamp(buffer, *offset, shape.len);
                    space.submit_write(*base + offset, &buffer[..])?
                }
            });
        }
        for (ticket, offset) in tickets.drain(..).zip(offsets) {
            match space.wait(ticket)? {
                Answer::Bytes(bytes) => check(*offset, &bytes)?,
                answer => ensure!(answer == Answer::Done, "{answer:?}"),
            }
        }
        Ok(())
    }
}

/// The bytes of a place, as cheap as a copy: all sides pay the same.
pub(crate) fn stamp(buffer: &mut Vec<u8>, offset: u64, len: usize) {
    use std::sync::OnceLock;
    static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
    let whole = WHOLE.get_or_init(|| pattern(0, SEGMENT as usize));
    buffer.clear();
    buffer.extend_from_slice(&whole[offset as usize..][..len]);
}
