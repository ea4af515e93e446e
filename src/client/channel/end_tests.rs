//! How waits end, and what is told before what: short deadlines, deaths, stops, floods.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use super::tests::{PATIENCE, opened, server, server_that_dies};
use super::*;
use crate::duplex::{BufferConfig, Segment, Semaphore, Side, Waiting};

fn client_of(segment: &Segment, waiting: Waiting) -> DuplexClient {
    let options = ClientOptions {
        waiting,
        ..ClientOptions::default()
    };
    DuplexClient::over(opened(segment), options).expect("client")
}

#[test]
fn who_asks_again_and_again_by_short_times_learns_of_a_death() {
    for waiting in [Waiting::Spin, Waiting::Park, Waiting::Adaptive] {
        for is_shared in [false, true] {
            let segment = Segment::create(&BufferConfig::new(0, 4096)).expect("segment");
            let dying = server_that_dies(&segment, false);
            let client = client_of(&segment, waiting);
            let sent = client.send_request(b"never answered").expect("room");
            dying.join().expect("the server");
            let ended = match is_shared {
                false => client.receive_for(sent, Duration::ZERO).map(drop),
                true => {
                    let client = client.into_shared();
                    client.receive_for(sent, Duration::ZERO).map(drop)
                }
            };
            let died =
                matches!(&ended, Err(ChannelError::PeerDied { sequence, .. }) if *sequence == sent);
            assert!(died, "{waiting:?} {is_shared}: {ended:?}");
        }
    }
}

#[test]
fn a_deadline_of_nothing_and_one_that_never_comes() {
    for waiting in [Waiting::Spin, Waiting::Park, Waiting::Adaptive] {
        let segment = Segment::create(&BufferConfig::new(0, 4096)).expect("segment");
        let server = InPlaceDuplexServer::new(ServerOptions::default()).expect("server");
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let gate = std::sync::Mutex::new(gate);
        let handler = move |_: &mut Frame<'_>| {
            let gate = gate.lock().expect("gate");
            let released = gate.recv_timeout(PATIENCE);
            released.map_err(|_| HandlerError::new("never let go"))
        };
        server.start(handler).expect("start");
        let handle = server.serve_segment(&segment, false).expect("serve");
        let client = client_of(&segment, waiting);
        let sent = client.send_request(b"x").expect("room");
        for short in [Duration::ZERO, Duration::from_nanos(1)] {
            let begun = Instant::now();
            let late = client.receive_for(sent, short).map(drop);
            assert!(matches!(late, Err(ChannelError::TimedOut)), "{late:?}");
            assert!(begun.elapsed() < PATIENCE / 4);
        }
        assert!(!client.wait_for_room(Duration::ZERO));
        release.send(()).expect("the handler waits");
        let answer = client.receive_for(sent, Duration::MAX).expect("an answer");
        assert_eq!(answer.len(), 1);
        drop(answer);
        let client = client.into_shared();
        let sent = client.send_request(b"xy", Duration::MAX).expect("room");
        release.send(()).expect("the handler waits");
        let answer = client.receive_for(sent, Duration::MAX).expect("an answer");
        assert_eq!(answer.len(), 2);
        drop((answer, client));
        handle.join();
    }
}

#[test]
fn a_flood_of_one_way_requests_ends_with_its_server() {
    let segment = Segment::create(&BufferConfig::new(0, 4096)).expect("segment");
    let dying = server_that_dies(&segment, true);
    let client = client_of(&segment, Waiting::Adaptive);
    let begun = Instant::now();
    let ended = loop {
        assert!(begun.elapsed() < PATIENCE, "it goes on without a server");
        match client.send_one_way(&[7; 200]) {
            Ok(_) => {}
            Err(ChannelError::Full) => {
                client.wait_for_room(PATIENCE);
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(ended, ChannelError::Disconnected), "{ended}");
    dying.join().expect("the server");
}

#[test]
fn a_flood_of_one_way_requests_is_served_whole_by_every_pool() {
    for workers in [1, 4] {
        let options = ServerOptions {
            workers,
            ..ServerOptions::default()
        };
        let segment = Segment::create(&BufferConfig::new(0, 8192).slots(8)).expect("segment");
        let server = InPlaceDuplexServer::new(options).expect("server");
        let sum = Arc::new(AtomicUsize::new(0));
        let added = sum.clone();
        let handler = move |frame: &mut Frame<'_>| {
            let mut first = [0];
            frame.view().read(0, &mut first)?;
            added.fetch_add(usize::from(first[0]), Ordering::Relaxed);
            Ok(())
        };
        server.start(handler).expect("start");
        let handle = server.serve_segment(&segment, false).expect("serve");
        let client = client_of(&segment, Waiting::Adaptive);
        let mut expected = 0;
        for number in 0..5000usize {
            let len = [1, 112, 113, 3000][number % 4];
            let content = vec![number as u8; len];
            expected += usize::from(number as u8);
            while let Err(error) = client.send_one_way(&content) {
                assert!(matches!(error, ChannelError::Full), "{error}");
                assert!(client.wait_for_room(PATIENCE), "room comes back");
            }
        }
        // All requests before this one are taken when it is answered.
        let last = loop {
            match client.call(&[0], PATIENCE) {
                Err(ChannelError::Full) => assert!(client.wait_for_room(PATIENCE)),
                other => break other.map(drop),
            }
        };
        last.expect("an answer");
        drop(client);
        handle.join();
        assert_eq!(sum.load(Ordering::Relaxed), expected, "{workers} workers");
    }
}

/// Other workers may have requests at the same moment: none of them is served before the
/// callback has returned.
#[test]
fn no_worker_serves_before_the_metadata_was_told() {
    let options = ServerOptions {
        workers: 4,
        ..ServerOptions::default()
    };
    let segment = Segment::create(&BufferConfig::new(64, 0)).expect("segment");
    let server = InPlaceDuplexServer::new(options).expect("server");
    let (told, early) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let (begin, begun) = sync_channel(1);
    let (has_told, was_early) = (told.clone(), early.clone());
    server.on_init(move |_| {
        begin.send(()).expect("test");
        let started = Instant::now();
        // For as long as a worker that does not wait would need to serve one.
        while was_early.load(Ordering::Acquire) == 0 && started.elapsed().as_millis() < 100 {
            std::thread::yield_now();
        }
        has_told.store(true, Ordering::Release);
    });
    let count = early.clone();
    let handler = move |_: &mut Frame<'_>| {
        if !told.load(Ordering::Acquire) {
            count.fetch_add(1, Ordering::Release);
        }
        Ok(())
    };
    server.start(handler).expect("start");
    let handle = server.serve_segment(&segment, false).expect("serve");
    let client = client_of(&segment, Waiting::Park);
    client.set_metadata(b"client").expect("set");
    let first = client.send_request(b"first").expect("room");
    begun.recv_timeout(PATIENCE).expect("the callback runs");
    let sent: Vec<_> = (0..8)
        .map(|_| client.send_request(b"x").expect("room"))
        .collect();
    for sequence in sent.into_iter().chain([first]) {
        client.receive_for(sequence, PATIENCE).expect("an answer");
    }
    drop(client);
    handle.join();
    assert_eq!(early.load(Ordering::Acquire), 0);
}

/// A client takes back the announcement of the worker that sleeps: the server's stop does
/// not depend on it.
#[test]
fn a_client_that_forges_event_counts_does_not_hold_up_the_stop() {
    let options = ServerOptions {
        workers: 3,
        waiting: Waiting::Park,
        ..ServerOptions::default()
    };
    let segment = Segment::create(&BufferConfig::new(0, 4096)).expect("segment");
    let server = server(options);
    let handle = server.serve_segment(&segment, false).expect("serve");
    let client = client_of(&segment, Waiting::Park);
    client.call(b"x", PATIENCE).expect("call");
    let (end, ended) = sync_channel(1);
    let joining = std::thread::spawn(move || {
        handle.join();
        end.send(()).expect("test");
    });
    let word = segment.semaphore(Semaphore::RequestReady);
    let begun = Instant::now();
    let mut is_stopped = false;
    while let Err(error) = ended.recv_timeout(Duration::from_micros(200)) {
        assert!(begun.elapsed() < PATIENCE, "{error}: the workers sleep on");
        word.store(0, Ordering::Release);
        // By then all of them have slept for longer than they do without a look.
        if !is_stopped && begun.elapsed() > Duration::from_millis(60) {
            server.stop();
            is_stopped = true;
        }
    }
    joining.join().expect("the thread that waited");
    assert!(segment.is_stopped(Side::Server));
    drop(client);
}

/// All kinds of requests by several threads while the server stops: each ends, as what it
/// may end as.
#[test]
fn a_stop_in_the_middle_ends_each_request_of_every_thread() {
    for round in 0..20 {
        let options = ServerOptions {
            workers: 1 + round % 4,
            drain: Duration::from_millis(20 * (round as u64 % 2)),
            ..ServerOptions::default()
        };
        let segment = Segment::create(&BufferConfig::new(0, 16 << 10).slots(16)).expect("segment");
        let server = server(options);
        let handle = server.serve_segment(&segment, false).expect("serve");
        let client = client_of(&segment, Waiting::Adaptive).into_shared();
        let calls = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let (client, calls) = (client.clone(), &calls);
                scope.spawn(move || {
                    while let Ok(()) = act(&client, thread, calls.fetch_add(1, Ordering::Relaxed)) {
                    }
                });
            }
            let begun = Instant::now();
            while calls.load(Ordering::Relaxed) < 100 * (1 + round % 3) {
                assert!(begun.elapsed() < PATIENCE, "calls");
                std::thread::yield_now();
            }
            server.stop();
        });
        handle.join();
    }
}

/// One call; an error is one that a stop may cause.
fn act(client: &SharedDuplexClient, thread: u8, number: usize) -> Result<(), ()> {
    let asked = vec![thread; [10, 700, 100][number % 3]];
    let changed: Vec<u8> = asked.iter().map(|byte| byte ^ 0xFF).collect();
    let outcome = match number % 5 {
        0 => {
            let items = [&asked[..], &asked[..5]];
            client.call_batch(&items, PATIENCE).map(|answer| {
                for (item, asked) in answer.items().zip(items) {
                    match item {
                        Ok(bytes) => assert_eq!(bytes.to_vec(), changed[..asked.len()]),
                        Err(error) => {
                            assert!(matches!(error, crate::duplex::ItemError::PeerDied { .. }));
                        }
                    }
                }
            })
        }
        1 => client.send_one_way(&asked, PATIENCE).map(drop),
        2 => client.send_request(&asked, PATIENCE).map(|sequence| {
            if !client.cancel(sequence) {
                drop(client.receive_for(sequence, Duration::ZERO));
            }
        }),
        _ => client
            .call(&asked, PATIENCE)
            .map(|answer| assert_eq!(answer.copy_to_vec(), changed)),
    };
    outcome.map_err(|error| {
        let expected = matches!(
            error,
            ChannelError::Stopped | ChannelError::PeerDied { .. } | ChannelError::Disconnected
        );
        assert!(expected, "{error:?}");
    })
}
