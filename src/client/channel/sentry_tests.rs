//! Sleeps without a time-out end for every reason that there is, and whatever the other
//! side does to the words that both have.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::tests::{PATIENCE, opened};
use super::*;
use crate::duplex::{BufferConfig, Segment, Semaphore, Side, Waiting};
use crate::sys::futex;

/// A deadline that a test waits for.
const SOON: Duration = Duration::from_millis(50);

/// A client and a server that have both slept often enough to be kept by their sentries.
/// The handler of a request `wait` waits for the gate.
fn kept(workers: usize) -> (Segment, DuplexClient, ChannelHandle, Sender<()>) {
    let options = ServerOptions {
        workers,
        waiting: Waiting::Park,
        ..ServerOptions::default()
    };
    let (gate, opens): (Sender<()>, Receiver<()>) = channel();
    let opens = Mutex::new(opens);
    let server = InPlaceDuplexServer::new(options).expect("server");
    let handler = move |frame: &mut Frame<'_>| {
        if frame.view().to_vec() == b"wait" {
            let waited = opens.lock().expect("gate").recv_timeout(PATIENCE);
            return waited.map_err(|_| HandlerError::new("never let go"));
        }
        std::thread::sleep(Duration::from_micros(200));
        Ok(())
    };
    server.start(handler).expect("start");
    let segment = Segment::create(&BufferConfig::new(0, 4096)).expect("segment");
    let handle = server.serve_segment(&segment, false).expect("serve");
    let options = ClientOptions {
        waiting: Waiting::Park,
        ..ClientOptions::default()
    };
    let client = DuplexClient::over(opened(&segment), options).expect("client");
    for _ in 0..100 {
        client.call(b"x", PATIENCE).expect("an answer");
    }
    (segment, client, handle, gate)
}

#[test]
fn a_deadline_ends_a_kept_sleep_and_the_next_one_too() {
    let (_segment, client, handle, gate) = kept(1);
    let sent = client.send_request(b"wait").expect("room");
    // A longer one first: what it asked for is no help to the shorter ones.
    for time in [4 * SOON, SOON, SOON / 5, SOON] {
        let begun = Instant::now();
        let late = client.receive_for(sent, time).map(drop);
        assert!(matches!(late, Err(ChannelError::TimedOut)), "{late:?}");
        assert!(begun.elapsed() >= time && begun.elapsed() < PATIENCE / 4);
    }
    gate.send(()).expect("the handler waits");
    client.receive_for(sent, PATIENCE).expect("an answer");
    drop(client);
    handle.join();
}

#[test]
fn a_death_ends_a_kept_sleep() {
    let (segment, client, handle, gate) = kept(1);
    let sent = client.send_request(b"wait").expect("room");
    let word = segment.lifeline_word(Side::Server);
    let died = futex::OWNER_DIED | futex::WAITERS;
    let begun = Instant::now();
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Whether or not the client sleeps by then; as the kernel does it.
            std::thread::sleep(SOON / 5);
            word.store(died, Ordering::Release);
            let _ = futex::wake(word, 1);
        });
        client.receive_for(sent, 2 * PATIENCE).map(drop)
    });
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    let told = matches!(ended, Err(ChannelError::PeerDied { sequence, .. }) if sequence == sent);
    assert!(told, "{ended:?}");
    gate.send(()).expect("the handler waits");
    drop(client);
    handle.join();
}

/// Stores an old value of `semaphore` for as long as `body` runs.
fn while_forged(segment: &Segment, semaphore: Semaphore, body: impl FnOnce()) {
    let is_over = AtomicBool::new(false);
    let word = segment.semaphore(semaphore);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let old = word.load(Ordering::Acquire) & !u64::from(u32::MAX);
            while !is_over.load(Ordering::Acquire) {
                word.store(old, Ordering::Release);
                std::thread::yield_now();
            }
        });
        body();
        is_over.store(true, Ordering::Release);
    });
}

#[test]
fn a_server_that_takes_posts_back_does_not_hold_a_deadline_up() {
    let (segment, client, handle, gate) = kept(1);
    let sent = client.send_request(b"wait").expect("room");
    while_forged(&segment, Semaphore::ResponseReady, || {
        for _ in 0..20 {
            let begun = Instant::now();
            let late = client.receive_for(sent, SOON / 10).map(drop);
            assert!(matches!(late, Err(ChannelError::TimedOut)), "{late:?}");
            assert!(begun.elapsed() < PATIENCE / 4);
        }
    });
    gate.send(()).expect("the handler waits");
    drop(client);
    handle.join();
}

#[test]
fn a_client_that_takes_posts_back_does_not_hold_a_stop_up() {
    let (segment, client, handle, _gate) = kept(3);
    while_forged(&segment, Semaphore::RequestReady, || {
        // All of them sleep by then, or soon.
        std::thread::sleep(SOON);
        let begun = Instant::now();
        handle.stop();
        handle.join();
        assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    });
    drop(client);
}
