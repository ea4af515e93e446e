//! One client's channel over the lives of several servers: servers that hold no liveness
//! word, threads that reconnect at the same time, want of descriptors in the middle, and
//! many threads that go on through kills and stops.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use uffd_sync::client::channel::{ChannelError, ConnectError, SharedDuplexClient};
use uffd_sync::duplex::layout::LAYOUT_VERSION;
use uffd_sync::duplex::rendezvous::{Answer, ChannelKind, MESSAGE_BYTES, Welcome};
use uffd_sync::duplex::{
    BufferConfig, ItemError, Posts, Presence, Segment, Semaphore, Sequence, ServerCore, Side,
};
use uffd_sync::sys::net;

use super::channel_peer::{Order, Peer, Report, ask, call, connect, join, kind_of, request};
use super::channels::socket_of;
use super::nodes::{PATIENCE, await_that, folder, long};

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

/// What each request of the storm ended as.
#[derive(Default)]
struct Counts {
    answered: AtomicU64,
    died: AtomicU64,
    refused: AtomicU64,
}

impl Counts {
    fn now(&self) -> [u64; 3] {
        [&self.answered, &self.died, &self.refused].map(|count| count.load(Ordering::Relaxed))
    }

    #[track_caller]
    fn await_answers(&self, more: u64, client: &SharedDuplexClient) {
        let (before, begun) = (self.now(), Instant::now());
        while self.now()[0] < before[0] + more {
            let status = client.segment().status();
            assert!(
                begun.elapsed() < PATIENCE,
                "answered, died, refused: {before:?}, now {:?}: {status:?}",
                self.now()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Threads of one client send everything there is while their server is killed, stopped
/// for a while, or ends in order, again and again.
#[test]
fn threads_go_on_through_kills_and_stops() {
    let folder = folder();
    let lives = if long() { 60 } else { 8 };
    let serve = || {
        let mut server = Peer::start();
        server.carry_out(&Order::Serve {
            folder: folder.path().to_owned(),
            name: "a".to_owned(),
            clients: 1,
            workers: 3,
            failpoints: false,
        });
        server
    };
    let mut server = serve();
    let client = join(folder.path(), "a").expect("a client").into_shared();
    let (counts, is_over) = (Counts::default(), AtomicBool::new(false));
    let server = std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (client, counts, is_over) = (client.clone(), &counts, &is_over);
            scope.spawn(move || storm(&client, thread, counts, is_over));
        }
        let over = scopeguard(&is_over);
        for life in 0..lives {
            counts.await_answers(300, &client);
            match life % 3 {
                0 => server.kill(),
                1 => {
                    server.stop();
                    server.signal(Signal::SIGCONT);
                    drop(server);
                }
                // Its standard input ends, and with that the program, in order.
                _ => server.leave(),
            }
            server = serve();
        }
        counts.await_answers(300, &client);
        drop(over);
        server
    });
    // Nothing was lost on the way: all of the channel fits into it once more.
    let whole = vec![b'u'; (1 << 20) - 64];
    let answer = client.call(&whole, PATIENCE).expect("all room is back");
    assert_eq!(answer.len(), whole.len());
    drop(answer);
    drop(server);
    assert!(client.segment().generation() > lives);
    let died = counts.died.load(Ordering::Relaxed);
    let refused = counts.refused.load(Ordering::Relaxed);
    assert!(died + refused > 0, "nobody noticed anything");
}

/// Ends the storm when the test ends, however it ends.
fn scopeguard(is_over: &AtomicBool) -> impl Drop + '_ {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    Over(is_over)
}

fn storm(client: &SharedDuplexClient, thread: u64, counts: &Counts, is_over: &AtomicBool) {
    let mut number = thread;
    while !is_over.load(Ordering::Relaxed) {
        number = number
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let outcome = one_of_all(client, number >> 33);
        let counter = match &outcome {
            Ok(()) => &counts.answered,
            Err(ChannelError::PeerDied { .. }) => &counts.died,
            Err(_) => &counts.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let Err(error) = outcome else { continue };
        let expected = matches!(
            error,
            ChannelError::PeerDied { .. }
                | ChannelError::Disconnected
                | ChannelError::Stopped
                | ChannelError::TimedOut
        );
        assert!(expected, "{}: {error:?}", kind_of(&error));
        match client.reconnect(Duration::from_millis(200)) {
            Ok(())
            | Err(ChannelError::TimedOut | ChannelError::Connect(_) | ChannelError::Stopped) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn one_of_all(client: &SharedDuplexClient, pick: u64) -> Result<(), ChannelError> {
    let len = [3, 100, 700, 20_000][(pick >> 8) as usize % 4];
    let asked = request(ask::UPPER, len);
    let right = asked.to_ascii_uppercase();
    match pick % 6 {
        0 => {
            let items = [&asked[..], &asked[..3], &asked[..2]];
            let answer = client.call_batch(&items, PATIENCE)?;
            let mut died = 0;
            for (item, asked) in answer.items().zip(items) {
                match item {
                    Ok(bytes) => assert_eq!(bytes.to_vec(), right[..asked.len()]),
                    Err(ItemError::PeerDied { .. }) => died += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            assert_eq!(died, 3 - answer.answered());
            Ok(())
        }
        1 => client.send_one_way(&asked, PATIENCE).map(drop),
        2 => {
            let sequence = client.send_request(&asked, PATIENCE)?;
            let_go(client, sequence);
            Ok(())
        }
        3 => {
            let first = client.send_request(&asked, PATIENCE)?;
            // Who holds an answer while it waits for room may wait for itself.
            let second = client.send_request(&asked, Duration::from_millis(50));
            let second = second.inspect_err(|_| let_go(client, first))?;
            let answers = [second, first].map(|sent| client.receive_for(sent, PATIENCE));
            for answer in answers {
                assert_eq!(answer?.copy_to_vec(), right);
            }
            Ok(())
        }
        _ => {
            let answer = client.call(&asked, PATIENCE)?;
            assert_eq!(answer.copy_to_vec(), right);
            Ok(())
        }
    }
}

/// Cancels it; what was answered, or ended with its server, is taken instead.
fn let_go(client: &SharedDuplexClient, sequence: Sequence) {
    if !client.cancel(sequence) {
        let taken = client.receive_for(sequence, Duration::ZERO).map(drop);
        let expected = matches!(taken, Ok(()) | Err(ChannelError::PeerDied { .. }));
        assert!(expected, "{taken:?}");
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
