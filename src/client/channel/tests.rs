//! Client and server over one memory, in one process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::duplex::{BufferConfig, OpenLimits, Segment, Side, Waiting};

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn opened(segment: &Segment) -> Segment {
    let fds = segment.fds().into_iter().map(|fd| fd.try_clone_to_owned());
    let fds = fds.collect::<Result<_, _>>().expect("descriptors");
    Segment::open(fds, OpenLimits::default()).expect("open")
}

pub(super) fn server(options: ServerOptions) -> InPlaceDuplexServer {
    let server = InPlaceDuplexServer::new(options).expect("server");
    server
        .start(|frame| {
            frame.update_chunks(|chunk| chunk.iter_mut().for_each(|byte| *byte ^= 0xFF));
            Ok(())
        })
        .expect("start");
    server
}

fn pair(options: ServerOptions) -> (DuplexClient, InPlaceDuplexServer, ChannelHandle) {
    let segment = Segment::create(&BufferConfig::new(256, 1 << 20)).expect("segment");
    let server = server(options);
    let handle = server.serve_segment(&segment, false).expect("serve");
    let waiting = options.waiting;
    let client = DuplexClient::over(
        opened(&segment),
        ClientOptions {
            waiting,
            ..ClientOptions::default()
        },
    )
    .expect("client");
    (client, server, handle)
}

#[test]
fn calls_of_every_kind_of_waiting() {
    for waiting in [Waiting::Spin, Waiting::Park, Waiting::Adaptive] {
        let options = ServerOptions {
            waiting,
            ..ServerOptions::default()
        };
        let (client, server, handle) = pair(options);
        let rounds = if waiting == Waiting::Spin { 20 } else { 300 };
        for round in 0..rounds {
            let request = vec![round as u8; [0, 5, 112, 113, 5000][round % 5]];
            let response = client.call(&request, PATIENCE).expect("call");
            let expected: Vec<u8> = request.iter().map(|byte| byte ^ 0xFF).collect();
            assert_eq!(response.copy_to_vec(), expected);
        }
        server.stop();
        handle.join();
        assert!(matches!(
            client.call(b"x", PATIENCE),
            Err(ChannelError::Stopped)
        ));
    }
}

#[test]
fn batches_are_answered_and_may_be_received_in_any_order() {
    let options = ServerOptions {
        workers: 4,
        ..ServerOptions::default()
    };
    let (client, server, handle) = pair(options);
    for _ in 0..50 {
        let sent: Vec<_> = (0..64u8)
            .map(|i| client.submit(&[i; 40]).expect("submit"))
            .collect();
        assert!(matches!(client.submit(b"x"), Err(ChannelError::Full)));
        client.kick();
        let picked = client.receive_for(sent[17], PATIENCE).expect("one of them");
        assert_eq!(picked.copy_to_vec(), [17 ^ 0xFF; 40]);
        drop(picked);
        let mut seen = vec![sent[17]];
        for _ in 1..64 {
            let response = client.receive_response(PATIENCE).expect("any of them");
            let index = sent.iter().position(|sent| *sent == response.sequence());
            let index = index.expect("one that was sent") as u8;
            assert_eq!(response.copy_to_vec(), [index ^ 0xFF; 40]);
            seen.push(response.sequence());
        }
        seen.sort_unstable();
        assert_eq!(seen, sent);
    }
    assert!(matches!(
        client.receive_response(PATIENCE),
        Err(ChannelError::NothingInFlight)
    ));
    drop(client);
    handle.join();
    assert_eq!(server.clients(), 0);
}

#[test]
fn failures_reach_the_client_with_their_sequence() {
    let segment = Segment::create(&BufferConfig::new(256, 1 << 16)).expect("segment");
    let server = InPlaceDuplexServer::new(ServerOptions::default()).expect("server");
    let failures = Arc::new(AtomicUsize::new(0));
    let count = failures.clone();
    server.on_error(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    server
        .start(|frame| match frame.len() {
            1 => Err(HandlerError::with_code(0x123, "no such thing")),
            2 => panic!("on purpose"),
            3 => frame.data_mut().map(drop),
            _ => Ok(frame.set_len(10_000)?),
        })
        .expect("start");
    let handle = server.serve_segment(&segment, false).expect("serve");
    let client = DuplexClient::over(opened(&segment), ClientOptions::default()).expect("client");
    let expected = [
        "no such thing",
        "on purpose",
        "this server does not",
        "offset 0 + length",
    ];
    let mut newest = 0;
    for (len, expected) in (1..).zip(expected) {
        match client.call(&vec![0; len], PATIENCE) {
            Err(ChannelError::Handler { sequence, text, .. }) => {
                assert!(sequence > newest, "{sequence} after {newest}");
                newest = sequence;
                assert!(text.starts_with(expected), "{text}");
            }
            other => panic!("{other:?}"),
        }
    }
    drop(client);
    handle.join();
    assert_eq!(failures.load(Ordering::Relaxed), 4);
    assert_eq!(segment.status().expect("status").failed, 4);
}

#[test]
fn several_threads_share_a_client() {
    let options = ServerOptions {
        workers: 2,
        ..ServerOptions::default()
    };
    let segment = Segment::create(&BufferConfig::new(0, 8 << 10).slots(8)).expect("segment");
    let server = server(options);
    let handle = server.serve_segment(&segment, false).expect("serve");
    let client = DuplexClient::over(opened(&segment), ClientOptions::default()).expect("client");
    let client = client.into_shared();
    std::thread::scope(|scope| {
        for thread in 0..6u8 {
            let client = client.clone();
            scope.spawn(move || {
                for round in 0..200usize {
                    let len = [3, 64, 700, 1500][round % 4];
                    let response = client.call(&vec![thread; len], PATIENCE).expect("call");
                    assert_eq!(response.copy_to_vec(), vec![thread ^ 0xFF; len]);
                    // Who waits for room with a response in hand waits for itself.
                    drop(response);
                    if round % 10 == 0 {
                        client
                            .send_one_way(&[thread; 100], PATIENCE)
                            .expect("one-way");
                    }
                }
            });
        }
    });
    drop(client);
    handle.join();
    let status = segment.status().expect("status");
    assert_eq!(status.requests, 6 * 220);
    assert_eq!(status.requests_read, status.requests);
}

#[test]
fn a_deadline_cancels_a_call_and_its_room_comes_back() {
    let segment = Segment::create(&BufferConfig::new(0, 4096).slots(8)).expect("segment");
    let server = InPlaceDuplexServer::new(ServerOptions::default()).expect("server");
    let (release, gate) = std::sync::mpsc::channel::<()>();
    let gate = std::sync::Mutex::new(gate);
    server
        .start(move |_| {
            let gate = gate.lock().expect("gate");
            gate.recv_timeout(PATIENCE)
                .map_err(|_| HandlerError::new("never let go"))
        })
        .expect("start");
    let handle = server.serve_segment(&segment, false).expect("serve");
    let client = DuplexClient::over(opened(&segment), ClientOptions::default()).expect("client");
    let begun = Instant::now();
    let soon = Duration::from_millis(20);
    assert!(matches!(
        client.call(&[1; 2000], soon),
        Err(ChannelError::TimedOut)
    ));
    assert!(begun.elapsed() >= soon && begun.elapsed() < PATIENCE);
    let queued = client.send_request(&[2; 1800]).expect("room for a second");
    assert!(client.cancel(queued));
    assert!(matches!(
        client.send_request(&[3; 2000]),
        Err(ChannelError::Full)
    ));
    release.send(()).expect("the handler waits");
    let begun = Instant::now();
    while client.send_request(&[3; 2000]).is_err() {
        assert!(client.wait_for_room(PATIENCE), "room comes back");
        assert!(begun.elapsed() < PATIENCE);
    }
    release.send(()).expect("the handler waits");
    assert_eq!(
        client.receive_response(PATIENCE).expect("response").len(),
        2000
    );
    assert!(!client.cancel(queued));
    drop(client);
    handle.join();
}

#[test]
fn metadata_is_told_once_before_requests() {
    let segment = Segment::create(&BufferConfig::new(64, 0)).expect("segment");
    let server = server(ServerOptions::default());
    let (tell, told) = std::sync::mpsc::channel();
    server.on_init(move |metadata| tell.send(metadata.to_vec()).expect("test"));
    let handle = server.serve_segment(&segment, false).expect("serve");
    segment.set_metadata(Side::Server, b"server").expect("set");
    let client = DuplexClient::over(opened(&segment), ClientOptions::default()).expect("client");
    assert_eq!(client.metadata().expect("metadata"), b"server");
    client.call(b"x", PATIENCE).expect("call");
    assert!(told.try_recv().is_err());
    client.set_metadata(b"client").expect("set");
    assert!(client.set_metadata(b"again").is_err());
    for _ in 0..3 {
        client.call(b"x", PATIENCE).expect("call");
    }
    drop(client);
    handle.join();
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [b"client".to_vec()]);
}

/// Serves `segment` by hand in a thread that dies with its word held, once `until`
/// was reached: the kernel sees no difference to a process that was killed.
pub(super) fn server_that_dies(
    segment: &Segment,
    handler_begun: bool,
) -> std::thread::JoinHandle<()> {
    use crate::duplex::{Posts, ServerCore};
    use crate::sys::futex::Lifeline;
    let segment = segment.clone();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let core = ServerCore::new(&segment, 1);
        let (mapping, offset) = segment.lifeline_place(Side::Server);
        std::mem::forget(Lifeline::hold(mapping, offset).expect("hold"));
        ready.send(()).expect("test");
        let begun = Instant::now();
        let mut posts = Posts::new();
        loop {
            assert!(begun.elapsed() < PATIENCE, "no request came");
            if let Some(claim) = core.claim(&mut posts) {
                if handler_begun {
                    core.begin_handler(&claim);
                }
                // Time for the client to fall asleep and to begin watching.
                std::thread::sleep(Duration::from_millis(15));
                return;
            }
            std::thread::yield_now();
        }
    });
    is_ready
        .recv_timeout(PATIENCE)
        .expect("the server is there");
    thread
}

#[test]
fn a_dead_server_is_an_error_and_a_new_one_goes_on() {
    for handler_begun in [false, true] {
        for payload in [60, 600] {
            let segment = Segment::create(&BufferConfig::new(0, 1 << 16)).expect("segment");
            let dying = server_that_dies(&segment, handler_begun);
            let client =
                DuplexClient::over(opened(&segment), ClientOptions::default()).expect("client");
            let first = client.send_request(&vec![1; payload]).expect("send");
            let second = client.send_request(&vec![2; payload]).expect("send");
            match client.receive_for(first, PATIENCE) {
                Err(ChannelError::PeerDied {
                    sequence,
                    maybe_modified,
                }) => {
                    assert_eq!((sequence, maybe_modified), (first, handler_begun));
                }
                other => panic!("{other:?}"),
            }
            match client.receive_response(PATIENCE) {
                Err(ChannelError::PeerDied {
                    sequence,
                    maybe_modified,
                }) => {
                    assert_eq!((sequence, maybe_modified), (second, false));
                }
                other => panic!("{other:?}"),
            }
            assert!(!client.is_connected());
            dying.join().expect("the server");
            let server = server(ServerOptions::default());
            let handle = server.serve_segment(&segment, true).expect("serve");
            assert_eq!(segment.generation(), 2);
            let response = client.call(&[3; 500], PATIENCE).expect("call");
            assert_eq!(response.copy_to_vec(), [3 ^ 0xFF; 500]);
            drop(response);
            client.mirror();
            assert_eq!(segment.status().expect("status").free_bytes, 1 << 16);
            drop(client);
            handle.join();
        }
    }
}

#[test]
fn a_server_ends_when_its_client_dies() {
    use crate::sys::futex::Lifeline;
    let options = ServerOptions {
        workers: 3,
        waiting: Waiting::Park,
        ..ServerOptions::default()
    };
    let segment = Segment::create(&BufferConfig::new(0, 4096)).expect("segment");
    let server = server(options);
    let handle = server.serve_segment(&segment, false).expect("serve");
    let other = opened(&segment);
    std::thread::spawn(move || {
        let mut core = crate::duplex::ClientCore::new(&other);
        let (mapping, offset) = other.lifeline_place(Side::Client);
        std::mem::forget(Lifeline::hold(mapping, offset).expect("hold"));
        core.submit(b"never received", Default::default())
            .expect("submit");
        core.kick();
        // Time for the workers to see it alive.
        std::thread::sleep(Duration::from_millis(30));
    })
    .join()
    .expect("the client");
    handle.join();
    assert_eq!(server.clients(), 0);
    assert_eq!(segment.status().expect("status").requests_read, 1);
}

#[test]
fn another_sign_of_death_ends_waits_too() {
    let segment = Segment::create(&BufferConfig::new(0, 4096)).expect("segment");
    let client = DuplexClient::over(segment.clone(), ClientOptions::default()).expect("client");
    let sequence = client.send_request(b"to nobody").expect("send");
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(5));
            segment.set_lost(Side::Server, true);
        });
        let answer = client.receive_for(sequence, PATIENCE);
        assert!(matches!(
            answer,
            Err(ChannelError::PeerDied {
                maybe_modified: false,
                ..
            })
        ));
    });
    assert!(begun.elapsed() < PATIENCE / 2);
    assert!(matches!(
        client.send_request(b"x"),
        Err(ChannelError::Disconnected)
    ));
}

#[test]
fn eight_workers_answer_out_of_order() {
    let options = ServerOptions {
        workers: 8,
        ..ServerOptions::default()
    };
    let segment = Segment::create(&BufferConfig::new(0, 64 << 10)).expect("segment");
    let server = InPlaceDuplexServer::new(options).expect("server");
    server
        .start(|frame| {
            let mut first = [0; 8];
            frame.view().read(0, &mut first)?;
            let value = u64::from_le_bytes(first);
            // A delay of 0 to 200 us, different for each request.
            let delay = value.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56;
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_micros(delay * 200 / 255) {
                std::thread::yield_now();
            }
            Ok(frame.view().write(0, &(value * 3).to_le_bytes())?)
        })
        .expect("start");
    let handle = server.serve_segment(&segment, false).expect("serve");
    let client = DuplexClient::over(opened(&segment), ClientOptions::default()).expect("client");
    let (mut sent, mut received, mut turned) = (0u64, 0u64, 0);
    let mut expected = std::collections::BTreeMap::new();
    let mut newest = 0;
    while received < 2000 {
        let size = if sent % 3 == 0 { 700 } else { 16 };
        let mut request = vec![0; size];
        request[..8].copy_from_slice(&sent.to_le_bytes());
        if sent < 2000 {
            match client.send_request(&request) {
                Ok(sequence) => {
                    expected.insert(sequence, sent);
                    sent += 1;
                    continue;
                }
                Err(ChannelError::Full) => {}
                Err(other) => panic!("{other}"),
            }
        }
        let response = client.receive_response(PATIENCE).expect("response");
        let mut first = [0; 8];
        response.read(0, &mut first).expect("read");
        let value = expected.remove(&response.sequence()).expect("once each");
        assert_eq!(u64::from_le_bytes(first), value * 3);
        turned += u32::from(response.sequence() < newest);
        newest = newest.max(response.sequence());
        received += 1;
    }
    assert!(expected.is_empty());
    assert!(turned > 0, "nothing was answered out of order");
    drop(client);
    handle.join();
}

/// Parked round trips with random delays between the last look and the sleep. No
/// wait may be ended by its time-out when its word had changed.
#[test]
fn parked_round_trips_do_not_stall() {
    let long = std::env::var_os("UFFD_SYNC_LONG").is_some_and(|value| value == "1");
    let rounds = if long { 1_000_000 } else { 3_000 };
    let options = ServerOptions {
        waiting: Waiting::Park,
        ..ServerOptions::default()
    };
    let config = BufferConfig::new(0, 4096).failpoints();
    let segment = Segment::create(&config).expect("segment");
    segment.arm_delays();
    let server = server(options);
    let handle = server.serve_segment(&segment, false).expect("serve");
    let waiting = Waiting::Park;
    let client = DuplexClient::over(
        segment.clone(),
        ClientOptions {
            waiting,
            ..ClientOptions::default()
        },
    )
    .expect("client");
    for round in 0..rounds {
        let response = client.call(&[round as u8; 8], PATIENCE).expect("call");
        assert_eq!(response.copy_to_vec(), [round as u8 ^ 0xFF; 8]);
    }
    for side in [Side::Client, Side::Server] {
        assert_eq!(segment.late_wakes(side), 0, "{side:?}");
    }
    client.mirror();
    // Both sides have slept since their last change, or do so now.
    let begun = Instant::now();
    loop {
        let status = segment.status().expect("status");
        let (request, response) = (segment.oieb(Side::Client), segment.oieb(Side::Server));
        let equal = request.payload_written_count == status.requests
            && request.payload_read_count == status.requests_read
            && response.payload_written_count == status.responses
            && response.payload_read_count == status.responses_read
            && status.responses_read == rounds as u64;
        if equal {
            break;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{request:?} {response:?} {status:?}"
        );
        std::thread::yield_now();
    }
    drop(client);
    handle.join();
    assert_eq!(
        segment.oieb(Side::Server).payload_written_count,
        rounds as u64
    );
}

/// Lets whoever stands at a failpoint go when the test ends, however it ends.
struct Disarm<'a>(&'a Segment);

impl Drop for Disarm<'_> {
    fn drop(&mut self) {
        self.0.arm_failpoint(None);
    }
}

#[test]
fn every_failpoint_stops_its_side_and_lets_it_go() {
    use crate::duplex::Failpoint;
    let config = BufferConfig::new(0, 1 << 16).failpoints();
    let segment = Segment::create(&config).expect("segment");
    let server = server(ServerOptions::default());
    let handle = server.serve_segment(&segment, false).expect("serve");
    let client = DuplexClient::over(segment.clone(), ClientOptions::default()).expect("client");
    let client = client.into_shared();
    for place in Failpoint::ALL {
        for len in [10, 1000] {
            segment.arm_failpoint(Some(place));
            std::thread::scope(|scope| {
                let _disarm = Disarm(&segment);
                let call = scope.spawn(|| {
                    let response = client.call(&vec![7; len], PATIENCE).expect("call");
                    response.copy_to_vec()
                });
                if place == Failpoint::ServerCancelled {
                    // Never reached by a call that nobody cancels.
                    call.join().expect("caller");
                    return;
                }
                let begun = Instant::now();
                while segment.failpoint_reached() != place as u32 {
                    assert!(begun.elapsed() < PATIENCE, "{place:?} was not reached");
                    std::thread::yield_now();
                }
                segment.arm_failpoint(None);
                assert_eq!(call.join().expect("caller"), vec![7 ^ 0xFF; len]);
            });
        }
    }
    drop(client);
    handle.join();
}
