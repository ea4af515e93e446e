//! A client that writes by mapping: this test binary again, as a process of its own.
//!
//! Each report is a line that begins with `@`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use uffd_sync::client::space::{Space, SpaceOptions, Transport};
use uffd_sync::shm::SharedMemory;
use uffd_sync::space::SpaceConfig;
use uffd_sync::space::frame::{
    HAS_WRITING, Hello, Incarnation, WANTS_MAPPING, WANTS_WRITING, WELCOME_BYTES, Welcome,
};
use uffd_sync::space::locks::MappedLocks;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::net::{self, Blocking};

use crate::nodes::PATIENCE;
use crate::space::servers::Servers;

/// Set in the environment of a process that is such a client.
pub(crate) const ROLE: &str = "UFFD_SYNC_IT_SPACE_WRITER";

/// What it does.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Deed {
    /// Writes cells of its own tags until its standard input ends.
    Beat { seed: u64 },
    /// Enters the lock of a stripe, writes the first half of a cell, and stays.
    Stay { stripe: u64 },
    /// Stores into all locks whatever confuses most, until it is killed.
    Scribble { seed: u64 },
    /// Says whether it may write.
    Ask,
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    deed: Deed,
    file: PathBuf,
    socket: PathBuf,
}

/// One of them, killed and reaped when dropped.
pub(super) struct WriterProcess {
    child: Child,
    reports: Receiver<String>,
}

impl WriterProcess {
    #[track_caller]
    pub(super) fn start(servers: &Servers, deed: Deed) -> Self {
        let order = Order {
            deed,
            file: servers.file(),
            socket: servers.socket(0),
        };
        let order = serde_json::to_string(&order).expect("plain");
        let own = std::env::current_exe().expect("the path of this program");
        let mut child = Command::new(own)
            .args(["--exact", "space_writer_process", "--nocapture"])
            .env(ROLE, order)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program starts again");
        let stdout = child.stdout.take().expect("a pipe");
        let (sender, reports) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The test harness speaks on the same stream.
                if let Some((_, said)) = line.split_once('@') {
                    let _ = sender.send(said.to_owned());
                }
            }
        });
        Self { child, reports }
    }

    /// What it says next.
    #[track_caller]
    pub(super) fn report(&self) -> String {
        self.reports.recv_timeout(PATIENCE).expect("it says so")
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("it is there");
    }

    pub(super) fn is_there(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Waits for its end by a signal.
    #[track_caller]
    pub(super) fn ended_by(&mut self) -> Option<i32> {
        let until = Instant::now() + PATIENCE;
        while self.is_there() {
            assert!(Instant::now() < until, "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.child.wait().expect("wait").signal()
    }

    /// Has it come to its end by itself.
    #[track_caller]
    pub(super) fn finish(&mut self) -> String {
        drop(self.child.stdin.take());
        self.report()
    }
}

impl Drop for WriterProcess {
    fn drop(&mut self) {
        // Ended already, as a rule.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody listens any more only when the test is over.
    let _ = writeln!(out, "@{text}").and_then(|()| out.flush());
}

/// The process's side.
pub(crate) fn serve(order: &str) {
    let order: Order = serde_json::from_str(order).expect("an order");
    let text = std::fs::read_to_string(&order.file).expect("the file");
    let config = SpaceConfig::parse(&text, &order.file).expect("a space");
    match order.deed {
        Deed::Beat { seed } => beat(config, &order.socket, seed),
        Deed::Stay { stripe } => stay(&Raw::connect(&config, &order.socket), stripe),
        Deed::Scribble { seed } => scribble(&Raw::connect(&config, &order.socket), seed),
        Deed::Ask => {
            let raw = Raw::try_connect(&config, &order.socket);
            say(if raw.is_some() { "may" } else { "may not" });
        }
    }
}

pub(super) fn local_client(config: SpaceConfig, socket: &Path) -> Space {
    let options = SpaceOptions {
        deadline: Some(PATIENCE),
        transport: Transport::Unix,
        sockets: socket.parent().map(Path::to_owned),
        no_mapping: false,
    };
    Space::connect_with(config, options).expect("a client")
}

fn beat(config: SpaceConfig, socket: &Path, seed: u64) {
    let (ended, ends) = channel::<()>();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        drop(ended);
    });
    let mut space = local_client(config, socket);
    let name = space.map().servers()[0].name.clone();
    let (mut tag, mut unknown, mut writes) = (seed, 0u64, 0u64);
    space.read(0, &mut [0; 8]).expect("connected");
    say(if space.is_writable(name.as_str()).expect("a server") {
        "writable"
    } else {
        "not writable"
    });
    while ends.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
        for (offset, len) in super::CELLS {
            tag += 16;
            match space.write(offset, &super::cell(tag, len)) {
                Ok(()) => writes += 1,
                Err(error) if error.is_indeterminate() => unknown += 1,
                Err(error) => panic!("{error}"),
            }
        }
        space.fetch_add(super::COUNTER, 1).expect("added");
        writes += 1;
    }
    say(&format!("{writes} {unknown}"));
}

/// A client without the library.
struct Raw {
    locks: MappedLocks,
    data: SharedMemory,
    segment: u64,
    _stream: UnixStream,
}

impl Raw {
    fn connect(config: &SpaceConfig, socket: &Path) -> Self {
        Self::try_connect(config, socket).expect("it may write")
    }

    fn try_connect(config: &SpaceConfig, socket: &Path) -> Option<Self> {
        let mut stream = UnixStream::connect(socket).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let hello = Hello {
            versions: (1, 1),
            map: config.map.digest(),
            server: 0,
            flags: WANTS_MAPPING | WANTS_WRITING,
            client: 9,
            incarnation: Incarnation(0),
        };
        stream.write_all(&hello.encode()).expect("sent");
        let (mut bytes, mut fds) = (Vec::new(), Vec::<OwnedFd>::new());
        while bytes.len() < WELCOME_BYTES {
            let mut piece = [0; WELCOME_BYTES];
            let rest = &mut piece[..WELCOME_BYTES - bytes.len()];
            let got = net::recv_with_fds(&stream, rest, 4, Blocking::Yes).expect("more");
            assert!(got.bytes > 0 && !got.truncated);
            bytes.extend(&piece[..got.bytes]);
            fds.extend(got.fds);
        }
        let welcome = Welcome::decode(&bytes.try_into().expect("as many")).expect("a welcome");
        if welcome.flags & HAS_WRITING == 0 {
            assert_eq!(fds.len(), 2, "only to read");
            for fd in &fds {
                assert!(Mapping::shared(fd, 4096, Access::ReadWrite).is_err());
            }
            return None;
        }
        let segment = welcome.segment_size;
        let [data, stripes, page] = &fds[..] else {
            panic!("{} descriptors", fds.len());
        };
        let mapping = Mapping::shared(data, segment, Access::ReadWrite).expect("mapped");
        Some(Self {
            locks: MappedLocks::open(stripes, page, segment).expect("locks"),
            data: SharedMemory::new(mapping),
            segment,
            _stream: stream,
        })
    }
}

fn stay(raw: &Raw, stripe: u64) {
    let held = loop {
        if let Some(held) = raw.locks.lock(stripe).try_enter() {
            break held;
        }
        std::thread::yield_now();
    };
    let half = &super::cell(77, 4096)[..2048];
    raw.data.write(stripe << 16, half).expect("within");
    say("in the middle");
    let _ = std::io::stdin().read(&mut [0]);
    // Whoever comes this far was neither killed nor stopped for good.
    raw.data.write((stripe << 16) + 2048, half).expect("within");
    say(&format!("left {}", raw.locks.lock(stripe).leave(held)));
}

fn scribble(raw: &Raw, seed: u64) {
    say("scribbles");
    let mut state = seed | 1;
    loop {
        for stripe in 0..raw.segment.div_ceil(1 << 16) {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let lock = raw.locks.lock(stripe);
            let word = match state % 5 {
                0 => 0xFFFF,
                1 => state >> 7,
                2 => (state % 4) | (state << 32),
                3 => 1 << 16,
                _ => 2 << 32 | 1,
            };
            lock.word.store(word, Ordering::Relaxed);
            if state.is_multiple_of(3) {
                lock.own.store(state >> 3, Ordering::Relaxed);
            }
        }
    }
}
