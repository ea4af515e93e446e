//! Acceptor and client's rendezvous against each other, and each against a peer that
//! does not keep to it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::acceptor::{Acceptor, Bell, HalfOpen, Host, Joined};
use super::rendezvous::{ConnectError, Granted, ask, channel_socket};
use crate::duplex::rendezvous::{
    Answer, Ask, ChannelKind, ChannelName, Hello, MESSAGE_BYTES, Offer, Refusal, Welcome,
};
use crate::limits::{MAX_CHANNEL_FDS, MAX_CHANNEL_STATUS};
use crate::sys::net::{self, Blocking, PeerCredentials};
use crate::sys::process::{deadline_in, process_id};
use crate::sys::{SysError, memfd};

const PATIENCE: Duration = Duration::from_secs(20);
const OFFER: Offer = Offer {
    versions: (2, 3),
    features: 0b11,
};
const ATTACH: Hello = Hello {
    versions: (1, 3),
    features: 0b111,
    ask: Ask::Attach,
    generation: 0,
    fds: 0,
};
const WELCOME: Welcome = Welcome {
    version: 3,
    features: OFFER.features,
    kind: ChannelKind::InPlace,
    generation: 7,
    fds: 1,
    body_bytes: 0,
};

/// Tells when it is dropped.
struct Client {
    gone: Sender<i32>,
    peer: i32,
    ended: Arc<AtomicBool>,
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.gone.send(self.peer);
    }
}

struct TestHost {
    gone: Sender<i32>,
    ended: Arc<AtomicBool>,
    clients_left: u32,
    status_bytes: usize,
}

impl Host for TestHost {
    type Client = Client;

    fn offer(&self) -> Offer {
        OFFER
    }

    fn welcome(&self, version: u32) -> Welcome {
        Welcome {
            version,
            generation: 0,
            fds: 0,
            ..WELCOME
        }
    }

    fn attach(&mut self, peer: PeerCredentials, _: u32) -> Result<Joined<Client>, Refusal> {
        let refusal = Refusal::Clients { clients: 1, max: 1 };
        self.clients_left = self.clients_left.checked_sub(1).ok_or(refusal)?;
        Ok(Joined {
            client: Client {
                gone: self.gone.clone(),
                peer: peer.pid,
                ended: Arc::clone(&self.ended),
            },
            fds: vec![memfd::create("given", 4096).expect("memfd")],
            generation: 7,
            features: OFFER.features,
        })
    }

    fn take_over(
        &mut self,
        peer: PeerCredentials,
        fds: Vec<OwnedFd>,
        generation: u64,
    ) -> Result<Joined<Client>, Refusal> {
        assert_eq!(memfd::name(&fds[0]).expect("name"), "handed");
        let joined = self.attach(peer, OFFER.features)?;
        Ok(Joined {
            fds: Vec::new(),
            generation: generation + 1,
            ..joined
        })
    }

    fn has_ended(&self, client: &Client) -> bool {
        client.ended.load(Ordering::Acquire)
    }

    fn leave(&self, _: Client, _: OwnedFd) {}

    fn status(&self, clients: &mut dyn Iterator<Item = &Client>) -> Vec<u8> {
        let mut body = vec![b' '; self.status_bytes];
        body[0] = b'0' + clients.count() as u8;
        body
    }
}

/// An acceptor in a folder of its own.
struct Server {
    folder: TempDir,
    acceptor: Acceptor,
    gone: Receiver<i32>,
    ended: Arc<AtomicBool>,
}

fn name() -> ChannelName {
    "test".parse().expect("a name")
}

impl Server {
    fn start(clients: u32, half_open: HalfOpen) -> Server {
        let folder = tempfile::tempdir().expect("a folder");
        let (gone, told) = channel();
        let ended = Arc::new(AtomicBool::new(false));
        let host = TestHost {
            gone,
            ended: Arc::clone(&ended),
            clients_left: clients,
            status_bytes: MAX_CHANNEL_STATUS as usize,
        };
        let bell = Bell::new().expect("a bell");
        let path = channel_socket(folder.path(), &name());
        let acceptor = Acceptor::start(&path, &name(), bell, host, half_open);
        Server {
            folder,
            acceptor: acceptor.expect("the name is free"),
            gone: told,
            ended,
        }
    }

    fn path(&self) -> PathBuf {
        channel_socket(self.folder.path(), &name())
    }

    fn ask(&self, hello: Hello) -> Result<Granted, ConnectError> {
        let handed = memfd::create("handed", 4096).expect("memfd");
        let fds = [handed.as_fd()];
        let fds = &fds[..hello.fds as usize];
        ask(&self.path(), &name(), &hello, fds, deadline_in(PATIENCE))
    }

    /// A connection that has said nothing yet.
    fn connect(&self) -> OwnedFd {
        let socket = net::unix_connect(&self.path()).expect("a server");
        net::set_timeouts(&socket, Some(PATIENCE), Some(PATIENCE)).expect("timeouts");
        socket
    }
}

/// All that comes until the connection's end.
fn rest(socket: &OwnedFd) -> Vec<u8> {
    let (mut all, mut piece) = (Vec::new(), [0; 256]);
    loop {
        match net::recv_with_fds(socket, &mut piece, 0, Blocking::Yes) {
            Ok(received) if received.bytes == 0 => return all,
            Ok(received) => all.extend_from_slice(&piece[..received.bytes]),
            Err(error) if error.raw_os_error() == Some(nix::libc::ECONNRESET) => return all,
            Err(error) => panic!("{error}: {}", error.source),
        }
    }
}

fn refusal_in(bytes: &[u8]) -> Refusal {
    match Answer::decode(bytes.try_into().expect("one answer")) {
        Ok(Answer::Refused(refusal)) => refusal,
        other => panic!("no refusal: {other:?}"),
    }
}

#[test]
fn a_client_joins_and_is_missed_when_its_connection_ends() {
    let server = Server::start(2, HalfOpen::default());
    let granted = server.ask(ATTACH).expect("welcome");
    assert_eq!(granted.welcome, WELCOME);
    assert_eq!(memfd::name(&granted.fds[0]).expect("name"), "given");
    let take_over = Hello {
        ask: Ask::TakeOver,
        generation: 40,
        fds: 1,
        ..ATTACH
    };
    let taken = server.ask(take_over).expect("welcome");
    assert_eq!((taken.welcome.generation, taken.fds.len()), (41, 0));
    let refused = server.ask(ATTACH).expect_err("two are all");
    let full = Refusal::Clients { clients: 1, max: 1 };
    assert_eq!(refused.refusal(), Some(full));
    drop(granted);
    assert_eq!(server.gone.recv_timeout(PATIENCE), Ok(process_id()));
    assert!(server.gone.try_recv().is_err(), "the other one stays");
}

#[test]
fn versions_and_features_are_compared_before_anything_is_given() {
    let server = Server::start(1, HalfOpen::default());
    let old = Hello {
        versions: (0, 1),
        ..ATTACH
    };
    let refused = server.ask(old).expect_err("too old");
    assert_eq!(refused.refusal(), Some(Refusal::Version { min: 2, max: 3 }));
    let plain = Hello {
        features: 1,
        ..ATTACH
    };
    let refused = server.ask(plain).expect_err("knows too little");
    assert_eq!(refused.refusal(), Some(Refusal::Features { missing: 2 }));
    server.ask(ATTACH).expect("nobody took the place");
}

#[test]
fn a_long_status_arrives_whole_whoever_asks() {
    let server = Server::start(1, HalfOpen::default());
    let _client = server.ask(ATTACH).expect("welcome");
    let hello = Hello {
        ask: Ask::Status,
        versions: (9, 9),
        features: 0,
        ..ATTACH
    };
    let status = server.ask(hello).expect("a state");
    assert_eq!(status.body.len() as u64, MAX_CHANNEL_STATUS);
    assert_eq!(status.body[0], b'1');
}

#[test]
fn a_channel_that_ended_ends_its_connection_and_stop_ends_all() {
    let mut server = Server::start(2, HalfOpen::default());
    let first = server.ask(ATTACH).expect("welcome");
    server.ended.store(true, Ordering::Release);
    // It looks when anybody comes.
    drop(server.connect());
    assert_eq!(rest(&first.connection), b"");
    server.gone.recv_timeout(PATIENCE).expect("missed");
    server.ended.store(false, Ordering::Release);

    let second = server.ask(ATTACH).expect("welcome");
    let silent = server.connect();
    server.acceptor.stop();
    assert!(!server.path().exists(), "the name is free");
    assert_eq!(rest(&second.connection), b"");
    assert_eq!(rest(&silent), b"");
    let nobody = server.ask(ATTACH).expect_err("nobody listens");
    assert!(matches!(nobody, ConnectError::NoChannel { .. }), "{nobody}");
}

#[test]
fn a_name_is_taken_once_and_a_stale_socket_is_replaced() {
    let server = Server::start(1, HalfOpen::default());
    let (gone, _told) = channel();
    let host = |gone: &Sender<i32>| TestHost {
        gone: gone.clone(),
        ended: Arc::default(),
        clients_left: 1,
        status_bytes: 1,
    };
    let start = |path: &PathBuf| {
        let bell = Bell::new().expect("a bell");
        Acceptor::start(path, &name(), bell, host(&gone), HalfOpen::default())
    };
    let taken = start(&server.path()).expect_err("a server answers there");
    assert!(matches!(taken, ConnectError::NameTaken { .. }), "{taken}");
    server.ask(ATTACH).expect("the first still answers");

    let folder = tempfile::tempdir().expect("a folder");
    let path = channel_socket(folder.path(), &name());
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    drop(start(&path).expect("nobody answers there"));
    std::fs::write(&path, "precious").expect("written");
    let other = start(&path).expect_err("not a socket");
    assert!(matches!(other, ConnectError::Socket { .. }), "{other}");
    let nowhere = folder.path().join("none/test.sock");
    let other = start(&nowhere).expect_err("no folder");
    assert!(matches!(other, ConnectError::Socket { .. }), "{other}");
}

#[test]
fn hostile_hellos_are_refused_and_change_nothing() {
    let server = Server::start(1, HalfOpen::default());
    let file = memfd::create("extra", 4096).expect("memfd");
    let take_over = Hello {
        ask: Ask::TakeOver,
        generation: 1,
        fds: 1,
        ..ATTACH
    };
    let too_many = [file.as_fd(); MAX_CHANNEL_FDS as usize + 1];
    for (bytes, fds) in [
        ([0; MESSAGE_BYTES], &too_many[..0]),
        ([0xFF; MESSAGE_BYTES], &too_many[..0]),
        (ATTACH.encode(), &too_many[..1]),
        (ATTACH.encode(), &too_many[..]),
        (take_over.encode(), &too_many[..0]),
        (take_over.encode(), &too_many[..2]),
    ] {
        let socket = server.connect();
        net::send_with_fds(&socket, &bytes, fds).expect("sent");
        assert_eq!(refusal_in(&rest(&socket)), Refusal::Malformed);
    }
    // In pieces it is a hello all the same.
    let socket = server.connect();
    let old = Hello {
        versions: (0, 0),
        ..ATTACH
    };
    for byte in old.encode() {
        net::send_with_fds(&socket, &[byte], &[]).expect("sent");
    }
    assert_eq!(
        refusal_in(&rest(&socket)),
        Refusal::Version { min: 2, max: 3 }
    );
    server.ask(ATTACH).expect("nobody took the place");
}

#[test]
fn half_open_connections_are_few_and_end_in_time() {
    let half_open = HalfOpen {
        most: 3,
        deadline: Duration::from_millis(200),
    };
    let server = Server::start(1, half_open);
    let idle: Vec<_> = (0..8).map(|_| server.connect()).collect();
    for socket in &idle[..4] {
        // Half a hello does not prolong it.
        net::send_with_fds(socket, &ATTACH.encode()[..32], &[]).expect("sent");
    }
    // Behind them all: it is its turn when they have had theirs.
    let begun = Instant::now();
    server.ask(ATTACH).expect("served in the end");
    assert!(
        begun.elapsed() >= half_open.deadline,
        "somebody was not limited"
    );
    for socket in &idle {
        assert_eq!(rest(socket), b"");
    }
}

/// A server made by hand: what `serve` does with the one connection it gets.
fn against(serve: impl FnOnce(OwnedFd) + Send, timeout: Duration) -> Result<Granted, ConnectError> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = channel_socket(folder.path(), &name());
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            serve(stream.into());
        });
        ask(&path, &name(), &ATTACH, &[], deadline_in(timeout))
    })
}

#[test]
fn hostile_servers_are_found_out() {
    let file = || memfd::create("extra", 4096).expect("memfd");
    let answer = |welcome: Welcome, count: usize| {
        move |socket: OwnedFd| {
            let fds = [file(), file(), file()];
            let fds: Vec<_> = fds[..count].iter().map(AsFd::as_fd).collect();
            let bytes = Answer::Welcome(welcome).encode();
            net::send_with_fds(&socket, &bytes, &fds).expect("sent");
        }
    };
    against(answer(WELCOME, 1), PATIENCE).expect("an honest one");
    for (welcome, count) in [
        (WELCOME, 0),
        (WELCOME, 2),
        (WELCOME, 3),
        (
            Welcome {
                version: 4,
                ..WELCOME
            },
            1,
        ),
        (
            Welcome {
                features: 8,
                ..WELCOME
            },
            1,
        ),
    ] {
        let error = against(answer(welcome, count), PATIENCE).expect_err("not as asked");
        assert!(matches!(error, ConnectError::Mismatch { .. }), "{error}");
    }
    let noise = |socket: OwnedFd| {
        net::send_with_fds(&socket, &[7; MESSAGE_BYTES], &[]).expect("sent");
    };
    let error = against(noise, PATIENCE).expect_err("noise");
    assert!(matches!(error, ConnectError::Protocol { .. }), "{error}");
    let error = against(drop, PATIENCE).expect_err("no answer");
    assert!(matches!(error, ConnectError::Closed { .. }), "{error}");
    let begun = Instant::now();
    let dribble = |socket: OwnedFd| {
        let mut bytes = Answer::Welcome(WELCOME).encode().into_iter();
        let pause = Duration::from_millis(20);
        let stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(pause)).expect("a timeout");
        let mut hello = [0; MESSAGE_BYTES];
        let read = net::recv_with_fds(&stream, &mut hello, 0, Blocking::Yes).expect("a hello");
        assert_eq!(read.bytes, hello.len());
        // Until the client goes away.
        while net::send_with_fds(&stream, &[bytes.next().unwrap_or(0)], &[]).is_ok() {
            let mut nothing = [0; 1];
            let _: Result<_, SysError> =
                net::recv_with_fds(&stream, &mut nothing, 0, Blocking::Yes);
        }
    };
    let error = against(dribble, Duration::from_millis(300)).expect_err("too slow");
    assert!(matches!(error, ConnectError::TimedOut { .. }), "{error}");
    assert!(begun.elapsed() < PATIENCE);
}

/// Nobody accepts, and no more fit into the queue in front.
#[test]
fn a_server_that_accepts_nobody_costs_the_deadline_and_no_more() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = channel_socket(folder.path(), &name());
    let _listener = net::unix_listen(&path).expect("a socket");
    let soon = Duration::from_millis(50);
    let mut waiting = Vec::new();
    while let Ok(socket) = net::unix_connect_within(&path, soon) {
        waiting.push(socket);
        assert!(waiting.len() < 1000, "a queue without an end");
    }
    let begun = Instant::now();
    let late = ask(&path, &name(), &ATTACH, &[], deadline_in(soon)).map(drop);
    assert!(
        matches!(late, Err(ConnectError::TimedOut { .. })),
        "{late:?}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
}
