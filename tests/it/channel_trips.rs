//! Parked round trips: both sides sleep, with random pauses between their last look and
//! each sleep, and no wake-up is lost.

use std::time::Duration;

use uffd_sync::client::channel::{DuplexChannelFactory, ServerOptions};
use uffd_sync::duplex::{BufferConfig, Side, Waiting};

use super::channel_peer::{Order, Peer, ask, connect, join, request};
use super::nodes::{PATIENCE, await_that, folder, long};

/// Round trips of one run.
fn trips() -> u64 {
    if long() { 1_000_000 } else { 20_000 }
}

/// A sleep ended by time although its word had changed is a lost wake-up, or a poster
/// that the scheduler held up for 10 ms between its post and its system call, which on
/// a busy machine happens now and then; a wrong algorithm loses one in some hundred.
fn most_late(trips: u64) -> u64 {
    1 + trips / 50_000
}

#[test]
fn no_wake_up_is_lost_in_parked_round_trips() {
    let folder = folder();
    let server = Peer::server(folder.path(), "a", true);
    let client = join(folder.path(), "a").expect("a client");
    client.segment().arm_delays();
    let request = request(ask::UPPER, 16);
    for number in 0..trips() {
        let response = client.call(&request, PATIENCE);
        assert!(
            response.is_ok(),
            "round trip {number}: {:?}",
            response.err()
        );
    }
    for side in [Side::Client, Side::Server] {
        let late = u64::from(client.segment().late_wakes(side));
        assert!(late <= most_late(trips()), "{side:?}: {late}");
    }
    assert_eq!(
        client.segment().status().expect("a status").responses,
        trips()
    );
    drop(server);
}

#[test]
fn many_processes_call_one_server() {
    let folder = folder();
    let factory = DuplexChannelFactory::in_folder(folder.path());
    let options = ServerOptions {
        workers: 2,
        waiting: Waiting::Park,
        max_clients: 6,
        ..ServerOptions::default()
    };
    let name = "a".parse().expect("a name");
    let server = factory
        .create_in_place_server(&name, BufferConfig::new(0, 1 << 16), options)
        .expect("a server");
    server
        .start(super::channel_peer::handle)
        .expect("started once");
    let mut clients: Vec<_> = (0..6).map(|_| Peer::start()).collect();
    for client in &mut clients {
        client.carry_out(&connect(folder.path(), "a"));
        client.send(&Order::CallOn { timeout_ms: 10_000 });
    }
    await_that("calls of all six", || {
        let status = server.status().expect("a status");
        status.clients.len() == 6 && status.clients.iter().all(|c| c.responses_read > 200)
    });
    // One goes without a word; the others do not notice.
    clients.pop().expect("six of them").kill();
    await_that("five clients", || {
        server.status().expect("a status").clients.len() == 5
    });
    let before = server.status().expect("a status");
    await_that("more calls of all five", || {
        let now = server.status().expect("a status");
        let pairs = now.clients.iter().zip(&before.clients);
        now.clients.len() == 5
            && pairs
                .into_iter()
                .all(|(n, b)| n.responses > b.responses + 100)
    });
    // Another takes its place.
    let next = join(folder.path(), "a").expect("room for one");
    assert!(next.call(b"u", Duration::from_secs(10)).is_ok());
}
