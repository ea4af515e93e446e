//! One client's channel over the lives of several servers: servers that hold no liveness
//! word, threads that reconnect at the same time, want of descriptors in the middle.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use uffd_sync::client::channel::{ChannelError, ConnectError};
use uffd_sync::duplex::layout::LAYOUT_VERSION;
use uffd_sync::duplex::rendezvous::{Answer, ChannelKind, MESSAGE_BYTES, Welcome};
use uffd_sync::duplex::{BufferConfig, Posts, Presence, Segment, Semaphore, ServerCore, Side};
use uffd_sync::sys::net;

use super::channel_peer::{Order, Peer, Report, ask, call, connect, join, request};
use super::channels::socket_of;
use super::nodes::{PATIENCE, await_that, folder};

/// Longest time in which something is known that takes a millisecond.
const SOON: Duration = Duration::from_secs(2);

/// A server by hand that never holds its liveness word. It answers its first client in
/// upper case for as many requests as it is given leave, then hangs up.
struct Wordless {
    leave: std::sync::mpsc::Sender<()>,
    thread: JoinHandle<()>,
    segment: Receiver<Segment>,
}

impl Wordless {
    fn start(folder: &Path, name: &str) -> Wordless {
        let listener = UnixListener::bind(socket_of(folder, name)).expect("a socket");
        let path = socket_of(folder, name);
        let (leave, given) = channel();
        let (tell, segment) = channel();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            std::fs::remove_file(path).expect("our socket");
            let segment = greet(&stream);
            let core = ServerCore::new(&segment, 1);
            tell.send(segment).expect("test");
            while given.recv_timeout(PATIENCE).is_ok() {
                answer_one(&core);
            }
        });
        Wordless {
            leave,
            thread,
            segment,
        }
    }

    fn let_answer(&self) {
        self.leave.send(()).expect("it serves");
    }

    /// It hangs up, without a word.
    fn end(self) {
        drop(self.leave);
        self.thread.join().expect("the server");
    }
}

fn greet(mut stream: &UnixStream) -> Segment {
    let mut hello = [0; MESSAGE_BYTES];
    stream.read_exact(&mut hello).expect("a hello");
    let segment = Segment::create(&BufferConfig::new(64, 1 << 20)).expect("memory");
    let welcome = Welcome {
        version: LAYOUT_VERSION,
        features: segment.geometry().features.bits(),
        kind: ChannelKind::InPlace,
        generation: 1,
        fds: 1,
        body_bytes: 0,
    };
    let answer = Answer::Welcome(welcome).encode();
    net::send_with_fds(stream, &answer, &segment.fds()).expect("sent");
    segment
}

fn answer_one(core: &ServerCore) {
    let mut posts = Posts::new();
    let begun = Instant::now();
    let claim = loop {
        if let Some(claim) = core.claim(&mut posts) {
            break claim;
        }
        assert!(begun.elapsed() < PATIENCE, "no request came");
        std::thread::yield_now();
    };
    core.begin_handler(&claim);
    let len = claim.len();
    let bytes = core.bytes(&claim, len);
    bytes.update_chunks(|_, chunk| chunk.make_ascii_uppercase());
    core.respond(claim, len, &mut posts);
    core.post(&mut posts);
}

#[test]
fn a_server_that_holds_no_word_is_there_until_it_hangs_up() {
    let folder = folder();
    let server = Wordless::start(folder.path(), "a");
    let client = join(folder.path(), "a").expect("a client").into_shared();
    let segment = server.segment.recv_timeout(PATIENCE).expect("its memory");
    assert_eq!(segment.presence(Side::Server), Presence::Absent);
    let asked = request(ask::UPPER, 5000);
    let sent = client.send_request(&asked, PATIENCE).expect("room");
    // Another thread that comes too late does not take the memory from it.
    client
        .reconnect(Duration::from_millis(50))
        .expect("it is there");
    assert_eq!(client.segment().generation(), 1);
    let late = client
        .receive_for(sent, Duration::from_millis(50))
        .map(drop);
    assert!(matches!(late, Err(ChannelError::TimedOut)), "{late:?}");
    server.let_answer();
    let answer = client.receive_for(sent, PATIENCE).expect("an answer");
    assert_eq!(answer.copy_to_vec(), asked.to_ascii_uppercase());
    drop(answer);

    let sent = client.send_request(&asked, PATIENCE).expect("room");
    let waiting = std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| (client.receive_for(sent, PATIENCE).map(drop), Instant::now()));
        let word = segment.semaphore(Semaphore::ResponseReady);
        await_that("a sleeping client", || {
            word.load(Ordering::Relaxed) as u32 != 0
        });
        let ended = Instant::now();
        server.end();
        let (outcome, at) = waiting.join().expect("the caller");
        (outcome, at.saturating_duration_since(ended))
    });
    let (outcome, took) = waiting;
    assert!(
        matches!(outcome, Err(ChannelError::PeerDied { .. })),
        "{outcome:?}"
    );
    assert!(took < SOON, "{took:?}");
    let _next = Peer::server(folder.path(), "a", false);
    client.reconnect(PATIENCE).expect("the next server");
    client.call(&asked, PATIENCE).expect("an answer");
}

/// Each waits for as long as it said, whatever the others do.
#[test]
fn threads_that_reconnect_keep_their_own_deadlines_and_end_at_a_stop() {
    let folder = folder();
    let server = Peer::server(folder.path(), "a", false);
    let client = join(folder.path(), "a").expect("a client").into_shared();
    server.kill();
    let lost = client.call(&request(ask::UPPER, 16), PATIENCE).map(drop);
    assert!(lost.is_err(), "its server was killed");
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let long = scope.spawn(|| {
            begun.store(true, Ordering::Release);
            client.reconnect(6 * PATIENCE)
        });
        await_that("the other thread", || begun.load(Ordering::Acquire));
        let started = Instant::now();
        for _ in 0..3 {
            let short = client.reconnect(Duration::from_millis(30));
            let expected = matches!(
                short,
                Err(ChannelError::TimedOut | ChannelError::Connect(ConnectError::NoChannel { .. }))
            );
            assert!(expected, "{short:?}");
        }
        assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
        let stopped = Instant::now();
        client.stop();
        let outcome = long.join().expect("the other thread");
        assert!(matches!(outcome, Err(ChannelError::Stopped)), "{outcome:?}");
        assert!(stopped.elapsed() < SOON, "{:?}", stopped.elapsed());
    });
}

/// A server that is asked in vain finds the hello when it goes on, and takes the memory:
/// nothing may be sent before both agree on where to begin.
#[test]
fn a_server_that_takes_over_late_is_sent_nothing_before_it_was_asked_again() {
    let folder = folder();
    let first = Peer::server(folder.path(), "a", false);
    let mut client = join(folder.path(), "a").expect("a client");
    first.kill();
    let next = Peer::server(folder.path(), "a", false);
    next.stop();
    let late = client.reconnect(Duration::from_millis(100));
    let is_late = matches!(
        late,
        Err(ChannelError::Connect(ConnectError::TimedOut { .. }))
    );
    assert!(is_late, "{late:?}");
    next.signal(Signal::SIGCONT);
    await_that("the hello found", || client.segment().generation() > 1);
    for _ in 0..100 {
        let sent = client.send_request(&request(ask::UPPER, 16));
        assert!(matches!(sent, Err(ChannelError::Disconnected)), "{sent:?}");
    }
    client.reconnect(PATIENCE).expect("it is there");
    let served = call(&client, &request(ask::UPPER, 16), 10_000);
    assert_eq!(served.kind(), "response", "{served:?}");
}

#[test]
fn a_reconnect_that_lacks_descriptors_may_be_tried_again() {
    let folder = folder();
    let mut server = Peer::server(folder.path(), "a", false);
    let mut client = Peer::client(folder.path(), "a");
    let mut failures = 0;
    for count in 0..6 {
        server.kill();
        server = Peer::server(folder.path(), "a", false);
        client.carry_out(&Order::LeaveDescriptors { count });
        match client.order(&Order::Reconnect { timeout_ms: 2_000 }) {
            Report::Done => {}
            Report::Failed { text, .. } => {
                assert!(!text.is_empty());
                failures += 1;
            }
            other => panic!("{other:?}"),
        }
        client.carry_out(&Order::LeaveDescriptors { count: 100 });
        client.carry_out(&Order::Reconnect { timeout_ms: 20_000 });
        let order = Order::Call {
            request: request(ask::UPPER, 777),
            timeout_ms: 10_000,
        };
        assert_eq!(client.order(&order).kind(), "response", "{count}");
    }
    assert!(failures >= 2, "{failures}");
    drop(server);
}

#[test]
fn the_metadata_of_a_server_is_there_from_the_first_moment() {
    let folder = folder();
    let server = super::channel_peer::serve(folder.path(), "a", 2, 1, false).expect("a server");
    let long = server
        .set_metadata(&[7; 57])
        .expect_err("64 with their length");
    let text = long.to_string();
    assert!(text.contains("57") && text.contains("56"), "{text}");
    server.set_metadata(b"server").expect("it fits");
    server.set_metadata(b"again").expect_err("once");
    for _ in 0..2 {
        let client = join(folder.path(), "a").expect("a client");
        assert_eq!(client.metadata().expect("metadata"), b"server");
        let oieb = client.segment().oieb(Side::Server);
        assert_eq!(
            (oieb.metadata_written_bytes, oieb.metadata_free_bytes),
            (8 + 6, 64 - 14)
        );
    }
}

#[test]
fn a_client_joins_after_another_has_left_a_crowd_of_connections() {
    let folder = folder();
    let server = super::channel_peer::serve(folder.path(), "a", 1, 1, false).expect("a server");
    for _ in 0..200 {
        drop(UnixStream::connect(server.socket()).expect("a server"));
    }
    let client = join(folder.path(), "a").expect("a client");
    let served = call(&client, &request(ask::UPPER, 99), 10_000);
    assert_eq!(served.kind(), "response");
    let mut other = Peer::start();
    let refused = other.order(&connect(folder.path(), "a"));
    assert_eq!(refused.kind(), "connect", "{refused:?}");
}
