//! The connection to one server: found, made, greeted, lost and made again, without
//! waiting.
//!
//! ```text
//! Down ──(retry time)──> Connecting ──> Greeting ──(welcome)──> Up
//!  ^                         |              |                    |
//!  +──── backoff <───────────+──────────────+────────────────────+  end, error, refusal
//! ```
//!
//! Each attempt takes the next way: the server's Unix socket if there is one on this host,
//! then each address that its host's name has. After all of them failed, the next round
//! waits, twice as long each time, at most [`BACKOFF_MOST`].

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::{Failure, ReachError};
use crate::checksum::Digest;
use crate::limits;
use crate::space::frame::{HELLO_BYTES, Hello, Refusal, WELCOME_BYTES, Welcome};
use crate::space::map::ServerAddress;
use crate::sys::dial;
use crate::sys::net::{self, Blocking};

const BACKOFF_LEAST: Duration = Duration::from_millis(5);
const BACKOFF_MOST: Duration = Duration::from_millis(250);
const GREETING: Duration = Duration::from_millis(limits::SPACE_GREETING_MS);
/// Descriptors that may come with a welcome: the segment's, the stripes', and a page of the
/// client's own.
const MAPPING_FDS: usize = 3;

#[derive(Clone, Debug)]
enum Way {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

#[derive(Debug)]
enum Stage {
    Down,
    Connecting { fd: OwnedFd, is_unix: bool },
    Greeting(Box<Greeting>),
    Up { fd: OwnedFd },
}

/// A connection over which both sides greet.
#[derive(Debug)]
struct Greeting {
    fd: OwnedFd,
    hello: [u8; HELLO_BYTES],
    sent: usize,
    welcome: [u8; WELCOME_BYTES],
    got: usize,
    fds: Vec<OwnedFd>,
}

/// What an [`advance`](Socket::advance) came to.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing more can be done now.
    Waits,
    /// Connected and greeted, with the descriptors that came along.
    Up(Box<Welcome>, Vec<OwnedFd>),
    /// No server will ever take this client as it is.
    Refused(Failure),
}

/// The connection to one server, or the lack of one.
#[derive(Debug)]
pub(super) struct Socket {
    unix: Option<PathBuf>,
    tcp: Option<ServerAddress>,
    ways: Vec<Way>,
    stage: Stage,
    /// When the present attempt is given up.
    give_up: Instant,
    /// Before this no attempt is made.
    retry_at: Instant,
    backoff: Duration,
    up_since: Instant,
    last: Option<Arc<ReachError>>,
    /// Time that one call may wait in the kernel.
    patience: Duration,
}

impl Socket {
    pub(super) fn new(
        unix: Option<PathBuf>,
        tcp: Option<ServerAddress>,
        patience: Duration,
        now: Instant,
    ) -> Self {
        Self {
            unix,
            tcp,
            ways: Vec::new(),
            stage: Stage::Down,
            give_up: now,
            retry_at: now,
            backoff: BACKOFF_LEAST,
            up_since: now,
            last: None,
            patience,
        }
    }

    /// The socket, once greeted.
    pub(super) fn up(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Up { fd } => Some(fd.as_fd()),
            _ => None,
        }
    }

    /// The socket to wait for, and whether for room to send.
    pub(super) fn watched(&self) -> Option<(BorrowedFd<'_>, bool)> {
        match &self.stage {
            Stage::Down => None,
            Stage::Connecting { fd, .. } => Some((fd.as_fd(), true)),
            Stage::Greeting(greeting) => Some((greeting.fd.as_fd(), greeting.sent < HELLO_BYTES)),
            Stage::Up { fd } => Some((fd.as_fd(), false)),
        }
    }

    /// When something is to be done here although no socket is ready.
    pub(super) fn alarm(&self) -> Option<Instant> {
        match self.stage {
            Stage::Down => Some(self.retry_at),
            Stage::Connecting { .. } | Stage::Greeting(_) => Some(self.give_up),
            Stage::Up { .. } => None,
        }
    }

    /// Why there is no connection.
    pub(super) fn reason(&self) -> Arc<ReachError> {
        let last = self.last.clone();
        last.unwrap_or_else(|| Arc::new(ReachError::Waiting))
    }

    /// The connection ended: another attempt may be made at once, unless it ended as soon
    /// as it was made.
    pub(super) fn lost(&mut self, now: Instant, why: ReachError) {
        self.stage = Stage::Down;
        self.last = Some(Arc::new(why));
        self.ways.clear();
        if now < self.up_since + BACKOFF_MOST {
            self.retry_at = now + self.backoff;
            self.backoff = (self.backoff * 2).min(BACKOFF_MOST);
        } else {
            self.backoff = BACKOFF_LEAST;
            self.retry_at = now;
        }
    }

    /// Goes as far as it can without waiting.
    pub(super) fn advance(&mut self, now: Instant, hello: &Hello) -> Step {
        loop {
            let stage = std::mem::replace(&mut self.stage, Stage::Down);
            let next = match stage {
                Stage::Up { .. } => {
                    self.stage = stage;
                    return Step::Waits;
                }
                Stage::Down if now < self.retry_at => return Step::Waits,
                Stage::Down => self.begin(now, hello),
                Stage::Connecting { fd, is_unix } => connected(fd, is_unix, hello),
                Stage::Greeting(greeting) => greet(greeting),
            };
            match next {
                Ok(Next::Again(stage)) => self.stage = stage,
                Ok(Next::Waits(stage)) if now < self.give_up => {
                    self.stage = stage;
                    return Step::Waits;
                }
                Ok(Next::Waits(_)) => self.failed(now, ReachError::Silent),
                Ok(Next::Welcome { fd, welcome, fds }) => match self.judge(now, hello, &welcome) {
                    Some(step) => return step,
                    None if welcome.refusal != Refusal::None => {}
                    None => match self.keep(now, fd) {
                        Ok(()) => return Step::Up(welcome, fds),
                        Err(why) => self.failed(now, why),
                    },
                },
                Err(why) => self.failed(now, why),
            }
        }
    }

    /// What a welcome that is none means; none if it is one, or the server is busy.
    fn judge(&mut self, now: Instant, hello: &Hello, welcome: &Welcome) -> Option<Step> {
        if welcome.refusal == Refusal::Map || welcome.map != hello.map {
            self.failed(now, ReachError::Busy(Refusal::Map));
            return Some(Step::Refused(Failure::OtherMap {
                ours: hello.map,
                theirs: welcome.map,
            }));
        }
        let versions = hello.versions.0..=hello.versions.1;
        match welcome.refusal {
            Refusal::None if !versions.contains(&welcome.version) => {
                let refusal = Refusal::Version;
                self.failed(now, ReachError::Busy(refusal));
                Some(Step::Refused(Failure::TurnedAway { refusal }))
            }
            Refusal::None if welcome.server == hello.server => None,
            Refusal::None | Refusal::Server => {
                // Somebody else's port for now: its own server may come back to it.
                let found = welcome.server;
                let expected = hello.server;
                self.failed(now, ReachError::Position { expected, found });
                Some(Step::Waits)
            }
            Refusal::Clients | Refusal::Stopping => {
                self.failed(now, ReachError::Busy(welcome.refusal));
                None
            }
            refusal => {
                self.failed(now, ReachError::Busy(refusal));
                Some(Step::Refused(Failure::TurnedAway { refusal }))
            }
        }
    }

    fn keep(&mut self, now: Instant, fd: OwnedFd) -> Result<(), ReachError> {
        let patience = Some(self.patience);
        net::set_timeouts(&fd, patience, patience)?;
        self.up_since = now;
        self.ways.clear();
        self.stage = Stage::Up { fd };
        Ok(())
    }

    /// An attempt failed: the next way at once, the next round later.
    fn failed(&mut self, now: Instant, why: ReachError) {
        self.stage = Stage::Down;
        self.last = Some(Arc::new(why));
        if self.ways.is_empty() {
            self.retry_at = now + self.backoff;
            self.backoff = (self.backoff * 2).min(BACKOFF_MOST);
        }
    }

    fn begin(&mut self, now: Instant, hello: &Hello) -> Result<Next, ReachError> {
        if self.ways.is_empty() {
            self.ways = self.find_ways()?;
        }
        let way = self.ways.pop().ok_or(ReachError::Waiting)?;
        self.give_up = now + GREETING;
        let (begun, is_unix) = match way {
            Way::Unix(path) => (dial::begin_unix(&path)?, true),
            Way::Tcp(address) => (dial::begin_tcp(address)?, false),
        };
        if begun.connected {
            return connected(begun.fd, is_unix, hello);
        }
        Ok(Next::Waits(Stage::Connecting {
            fd: begun.fd,
            is_unix,
        }))
    }

    /// All ways to the server, the first one last.
    fn find_ways(&self) -> Result<Vec<Way>, ReachError> {
        let mut ways = Vec::new();
        if let Some(ServerAddress { host, port }) = &self.tcp {
            // A literal address asks nobody; a name may wait for the resolver.
            let found = (host.as_str(), *port).to_socket_addrs();
            ways.extend(found.map_err(ReachError::Resolve)?.map(Way::Tcp));
        }
        ways.reverse();
        let unix = self.unix.as_ref();
        // Where there is another way, a socket that is not there is no failed attempt.
        let is_there = |path: &&PathBuf| self.tcp.is_none() || path.exists();
        ways.extend(unix.filter(is_there).cloned().map(Way::Unix));
        Ok(ways)
    }
}

enum Next {
    Again(Stage),
    Waits(Stage),
    Welcome {
        fd: OwnedFd,
        welcome: Box<Welcome>,
        fds: Vec<OwnedFd>,
    },
}

/// The greeting begins as soon as the connection is made.
fn connected(fd: OwnedFd, is_unix: bool, hello: &Hello) -> Result<Next, ReachError> {
    if !dial::finish(&fd)? {
        return Ok(Next::Waits(Stage::Connecting { fd, is_unix }));
    }
    if !is_unix {
        net::set_nodelay(&fd)?;
    }
    Ok(Next::Again(Stage::Greeting(Box::new(Greeting {
        fd,
        hello: hello.encode(),
        sent: 0,
        welcome: [0; WELCOME_BYTES],
        got: 0,
        fds: Vec::new(),
    }))))
}

fn greet(mut greeting: Box<Greeting>) -> Result<Next, ReachError> {
    let Greeting {
        fd,
        hello,
        sent,
        welcome,
        got,
        fds,
    } = &mut *greeting;
    let would_wait = loop {
        if *sent < HELLO_BYTES {
            match dial::send(&*fd, &hello[*sent..], &[], Blocking::No) {
                Ok(bytes) => *sent += bytes,
                Err(error) if error.is_would_block() => break true,
                Err(error) => return Err(error.into()),
            }
        } else if *got < WELCOME_BYTES {
            match net::recv_with_fds(&*fd, &mut welcome[*got..], MAPPING_FDS, Blocking::No) {
                Ok(received) if received.bytes == 0 => return Err(ReachError::Ended),
                Ok(received) => {
                    *got += received.bytes;
                    fds.extend(received.fds);
                    fds.truncate(MAPPING_FDS);
                }
                Err(error) if error.is_would_block() => break true,
                Err(error) => return Err(error.into()),
            }
        } else {
            break false;
        }
    };
    if would_wait {
        return Ok(Next::Waits(Stage::Greeting(greeting)));
    }
    let welcome = Box::new(Welcome::decode(welcome)?);
    let Greeting { fd, fds, .. } = *greeting;
    Ok(Next::Welcome { fd, welcome, fds })
}

/// First 12 hexadecimal digits of a map's digest.
pub(super) fn short(map: &Digest) -> String {
    map[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}
