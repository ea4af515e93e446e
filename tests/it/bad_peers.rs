//! Peers that speak garbage, another version, too much, half or nothing at all: they
//! are closed with the reason in the log, and nothing changes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use uffd_sync::limits;
use uffd_sync::wire::{self, Hello, Kind, VERSION};

use super::nodes::{
    NodeProcess, PATIENCE, await_content, await_following, await_that, folder, run_on,
};

/// A node with a shared region.
struct Host {
    node: NodeProcess,
    folder: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let folder = folder();
        let node = NodeProcess::source(folder.path(), "host");
        for line in [
            "region create shared --size 1MiB --shared",
            "region create own --size 4KiB",
        ] {
            assert_eq!(run_on(&node, line, b"").code, Some(0));
        }
        assert_eq!(
            run_on(&node, "region write shared --offset 7", b"content").code,
            Some(0)
        );
        Self { node, folder }
    }

    fn dial(&self) -> TcpStream {
        let socket = TcpStream::connect(self.node.listen()).expect("the node listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        socket.set_write_timeout(Some(PATIENCE)).expect("a socket");
        socket
    }

    /// It still serves a follower that behaves.
    #[track_caller]
    fn check(&mut self) {
        assert!(
            self.node.is_alive(),
            "the node ended:\n{}",
            self.node.tail()
        );
        let source = format!("tcp://{}/shared", self.node.listen());
        let follower = NodeProcess::follower(self.folder.path(), "good", &[source]);
        await_following(&follower, "shared");
        let mut expected = vec![0; 1 << 20];
        expected[7..14].copy_from_slice(b"content");
        await_content(&follower, "shared", &expected);
    }
}

fn hello(versions: (u8, u8)) -> Vec<u8> {
    let hello = Hello {
        min_version: versions.0,
        max_version: versions.1,
        max_body: limits::MAX_BODY as u32,
        node: [7; 16],
        incarnation: 0,
        name: "peer".into(),
    };
    hello.encode(Kind::Hello)
}

/// Reads until the node closes; a close that comes late fails.
#[track_caller]
fn await_close(socket: &mut TcpStream, within: Duration) -> Vec<u8> {
    let deadline = Instant::now() + within;
    socket.set_read_timeout(Some(within)).expect("a socket");
    let mut answer = Vec::new();
    // A reset is a close as well.
    let _ = socket.read_to_end(&mut answer);
    assert!(
        Instant::now() < deadline,
        "the node did not close within {within:?}"
    );
    answer
}

#[test]
fn garbage_from_a_peer_closes_its_connection() {
    let mut host = Host::new();
    let good = hello((VERSION, VERSION));
    let mut flipped_body = good.clone();
    *flipped_body.last_mut().expect("a body") ^= 1;
    let mut flipped_header = good.clone();
    flipped_header[8] ^= 1;
    let mut other_frame_version = good.clone();
    other_frame_version[2] = VERSION + 1;
    let mut endless = good.clone();
    endless[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = uffd_sync::checksum::crc32c(&endless[..28]);
    endless[28..32].copy_from_slice(&crc.to_le_bytes());
    let cases: [(&str, Vec<u8>); 7] = [
        (
            "another protocol",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(3),
        ),
        ("zeros", vec![0; 4096]),
        ("a flipped bit in the body", flipped_body),
        ("a flipped bit in the header", flipped_header),
        ("frames of another version", other_frame_version),
        ("a frame too long", endless),
        (
            "a frame before the greeting",
            wire::Ping { number: 1 }.encode(Kind::Ping),
        ),
    ];
    for (what, bytes) in cases {
        let mut socket = host.dial();
        socket.write_all(&bytes).expect("the node takes bytes");
        await_close(&mut socket, Duration::from_secs(4));
        assert!(host.node.is_alive(), "{what}");
    }
    host.node.await_log("refused");
    host.check();
}

#[test]
fn a_peer_of_another_version_is_told_so() {
    let mut host = Host::new();
    let mut socket = host.dial();
    socket
        .write_all(&hello((VERSION + 1, VERSION + 3)))
        .expect("the node takes bytes");
    let answer = await_close(&mut socket, Duration::from_secs(4));
    let text = String::from_utf8_lossy(&answer);
    assert!(text.contains("version"), "{text}");
    host.check();
}

#[test]
fn an_unknown_region_and_one_that_is_not_shared_look_alike() {
    let mut host = Host::new();
    let mut answers = Vec::new();
    for name in ["own", "nix"] {
        let mut socket = host.dial();
        let subscribe = wire::Subscribe {
            name: name.parse().expect("a name"),
            subscription: 1,
            generation: uffd_sync::words::Generation::ZERO,
            have_epoch: None,
            fresh: true,
        };
        socket
            .write_all(&hello((VERSION, VERSION)))
            .expect("the node takes bytes");
        socket
            .write_all(&subscribe.encode())
            .expect("the node takes bytes");
        socket
            .shutdown(std::net::Shutdown::Write)
            .expect("a socket");
        let answer = await_close(&mut socket, PATIENCE);
        // The names are of one length; checksums are bytes, not text.
        answers.push(answer.len());
    }
    assert_eq!(
        answers[0], answers[1],
        "the answer tells whether the region exists"
    );
    host.check();
}

#[test]
fn half_a_frame_and_then_silence_is_closed_after_the_deadline() {
    let mut host = Host::new();
    let good = hello((VERSION, VERSION));
    let deadline = Duration::from_millis(limits::HANDSHAKE_DEADLINE_MS);
    let mut silent: Vec<TcpStream> = [0, 1, 20, good.len() - 1]
        .into_iter()
        .map(|len| {
            let mut socket = host.dial();
            socket
                .write_all(&good[..len])
                .expect("the node takes bytes");
            socket
        })
        .collect();
    // And one that greets and then says nothing more, not even to a ping.
    let mut greeted = host.dial();
    greeted.write_all(&good).expect("the node takes bytes");
    for socket in &mut silent {
        await_close(socket, 2 * deadline + Duration::from_secs(5));
    }
    let silence = Duration::from_millis(limits::PEER_DEADLINE_MS);
    await_close(&mut greeted, 2 * silence + Duration::from_secs(5));
    host.check();
}

#[test]
fn half_open_connections_are_bounded() {
    let mut host = Host::new();
    let address = host.node.listen();
    let mut open: Vec<TcpStream> = (0..limits::MAX_HALF_OPEN + 6)
        .map(|_| TcpStream::connect(address).expect("the node listens"))
        .collect();
    // Those beyond the limit are closed at once, well before the deadline.
    let early = Duration::from_millis(limits::HANDSHAKE_DEADLINE_MS) / 2;
    let started = Instant::now();
    let mut closed = 0;
    while closed < 6 && started.elapsed() < early {
        closed = open
            .iter_mut()
            .map(is_closed)
            .filter(|closed| *closed)
            .count();
    }
    assert!(closed >= 6, "{closed} of {} are closed", open.len());
    let connections = host.node.status().connections;
    assert!(
        connections <= limits::MAX_HALF_OPEN + 2,
        "{connections} connections"
    );
    await_that("all are closed at the deadline", || {
        open.iter_mut().all(is_closed)
    });
    drop(open);
    host.check();
}

fn is_closed(socket: &mut TcpStream) -> bool {
    socket.set_nonblocking(true).expect("a socket");
    match socket.read(&mut [0; 64]) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

#[test]
fn a_source_that_speaks_garbage_changes_nothing() {
    let folder = folder();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound socket");
    listener.set_nonblocking(true).expect("a socket");
    let mut follower = NodeProcess::follower(
        folder.path(),
        "follower",
        &[format!("tcp://{address}/nothing")],
    );
    let mut dialled = 0;
    await_that("the follower dials again after each refusal", || {
        if let Ok((mut socket, _)) = listener.accept() {
            let garbage: [&[u8]; 3] = [b"HTTP/1.1 400 Bad Request\r\n\r\n........", &[0; 64], b""];
            let _ = socket.write_all(garbage[dialled % garbage.len()]);
            dialled += 1;
        }
        dialled >= 4
    });
    assert!(follower.is_alive());
    let region = follower.region("nothing").expect("the replica waits");
    assert_eq!(region.state, "connecting");
    assert_eq!(region.epoch, 0);
}
