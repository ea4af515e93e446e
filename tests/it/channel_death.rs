//! Death, standstill and replacement of either side, at every transition of a frame.
//!
//! The failpoint words of the channel's memory name the place; the side that reaches
//! it stands there until it is killed or let go.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use uffd_sync::client::channel::{ChannelError, DuplexClient};
use uffd_sync::duplex::{Failpoint, ItemError};

use super::channel_peer::{
    Order, Peer, Report, ask, call, connect, handle, join, kind_of, request, serve,
};
use super::nodes::{PATIENCE, await_some, await_that, folder};

/// Longest time in which a death is known to the other side. It takes a millisecond;
/// tests share the machine.
const SOON: Duration = Duration::from_secs(2);
/// Requests in a slot, and in the payload.
const LENGTHS: [usize; 2] = [16, 5000];

/// Calls on a thread while `act` runs, once somebody stands at `place`.
fn call_and(
    client: DuplexClient,
    place: Failpoint,
    len: usize,
    timeout_ms: u64,
    act: impl FnOnce(),
) -> (DuplexClient, Report, Duration) {
    let segment = client.segment().clone();
    segment.arm_failpoint(Some(place));
    let calling = std::thread::spawn(move || {
        let report = call(&client, &request(ask::UPPER, len), timeout_ms);
        (client, report, Instant::now())
    });
    await_that("somebody at the failpoint", || {
        segment.failpoint_reached() == place as u32
    });
    act();
    let acted = Instant::now();
    let (client, report, ended) = calling.join().expect("the caller");
    (client, report, ended.saturating_duration_since(acted))
}

#[track_caller]
fn works(client: &DuplexClient, len: usize) {
    let report = call(client, &request(ask::UPPER, len), 10_000);
    let Report::Response { bytes, .. } = report else {
        panic!("{report:?}");
    };
    assert_eq!(bytes, request(ask::UPPER, len).to_ascii_uppercase());
}

#[test]
fn a_server_killed_at_each_transition_and_the_next_one_goes_on() {
    let folder = folder();
    for (place, expected) in [
        (Failpoint::ServerBusy, "died"),
        (Failpoint::ServerHandler, "died modified"),
        (Failpoint::ServerResponse, "died modified"),
        // Handed over: the response is there, whoever died meanwhile. One worker stores
        // the completion after that.
        (Failpoint::ServerCompletion, "response"),
        (Failpoint::ServerPost, "response"),
    ] {
        for len in LENGTHS {
            let server = Peer::server(folder.path(), "a", true);
            let client = join(folder.path(), "a").expect("a client");
            works(&client, len);
            let mut server = Some(server);
            let kill = || server.take().expect("not yet killed").kill();
            let (mut client, report, took) = call_and(client, place, len, 20_000, kill);
            assert_eq!(report.kind(), expected, "{place:?} {len}: {report:?}");
            assert!(took < SOON, "{place:?} {len}: {took:?}");
            let refused = client.call(b"u", PATIENCE).map(drop);
            assert!(refused.is_err(), "{place:?}: nobody serves");

            client.segment().arm_failpoint(None);
            let _next = Peer::server(folder.path(), "a", true);
            client.reconnect(PATIENCE).expect("the next server");
            assert_eq!(client.segment().generation(), 2, "{place:?}");
            for len in LENGTHS {
                works(&client, len);
            }
        }
    }
}

/// A server with several workers stores the completion before it hands over.
#[test]
fn a_server_of_two_workers_killed_at_each_transition() {
    let folder = folder();
    for (place, expected) in [
        (Failpoint::ServerBusy, "died"),
        (Failpoint::ServerHandler, "died modified"),
        (Failpoint::ServerResponse, "died modified"),
        (Failpoint::ServerCompletion, "died modified"),
        (Failpoint::ServerPost, "response"),
    ] {
        for len in LENGTHS {
            let server = server_of_two(folder.path());
            let client = join(folder.path(), "a").expect("a client");
            works(&client, len);
            let kill = || server.kill();
            let (mut client, report, took) = call_and(client, place, len, 20_000, kill);
            assert_eq!(report.kind(), expected, "{place:?} {len}: {report:?}");
            assert!(took < SOON, "{place:?} {len}: {took:?}");
            client.segment().arm_failpoint(None);
            let _next = server_of_two(folder.path());
            client.reconnect(PATIENCE).expect("the next server");
            for len in LENGTHS {
                works(&client, len);
            }
        }
    }
}

fn server_of_two(folder: &std::path::Path) -> Peer {
    let mut server = Peer::start();
    server.carry_out(&Order::Serve {
        folder: folder.to_owned(),
        name: "a".to_owned(),
        clients: 1,
        workers: 2,
        failpoints: true,
    });
    server
}

#[test]
fn a_server_stopped_at_a_cancelled_request_gives_its_room_back_later() {
    let folder = folder();
    let server = Peer::server(folder.path(), "a", true);
    let client = join(folder.path(), "a").expect("a client");
    let segment = client.segment().clone();
    let mut slow = request(ask::SLEEP, 5000);
    slow[1] = 200;
    let first = client.send_request(&slow).expect("sent");
    let second = client
        .send_request(&request(ask::UPPER, 5000))
        .expect("sent");
    segment.arm_failpoint(Some(Failpoint::ServerCancelled));
    assert!(client.cancel(second), "the server sleeps");
    await_that("the server at the failpoint", || {
        segment.failpoint_reached() == Failpoint::ServerCancelled as u32
    });
    server.stop();
    segment.arm_failpoint(None);
    let answer = client
        .receive_for(first, PATIENCE)
        .expect("it was answered");
    assert_eq!(answer.len(), 5000);
    drop(answer);
    assert!(
        !client.wait_for_room(Duration::from_millis(50)),
        "it stands"
    );
    server.signal(Signal::SIGCONT);
    assert!(client.wait_for_room(PATIENCE), "it goes on");
    works(&client, 5000);
    client.mirror();
    assert_eq!(segment.status().expect("a status").free_bytes, 1 << 20);
}

#[test]
fn a_server_stopped_at_each_transition_costs_a_deadline_and_no_more() {
    let folder = folder();
    let server = Peer::server(folder.path(), "a", true);
    let mut client = join(folder.path(), "a").expect("a client");
    for place in [
        Failpoint::ServerBusy,
        Failpoint::ServerHandler,
        Failpoint::ServerResponse,
        Failpoint::ServerCompletion,
        Failpoint::ServerPost,
    ] {
        for len in LENGTHS {
            let segment = client.segment().clone();
            let stop = || {
                server.stop();
                segment.arm_failpoint(None);
            };
            let (back, report, _) = call_and(client, place, len, 300, stop);
            client = back;
            // One worker hands over before it stores the completion.
            let handed_over = [Failpoint::ServerCompletion, Failpoint::ServerPost];
            let expected = if handed_over.contains(&place) {
                "response"
            } else {
                "timed out"
            };
            assert_eq!(report.kind(), expected, "{place:?} {len}: {report:?}");
            server.signal(Signal::SIGCONT);
            works(&client, len);
        }
    }
    let free = || client.segment().status().expect("a status").free_bytes;
    await_that("all room back", || {
        works(&client, 16);
        free() == 1 << 20
    });
}

#[test]
fn a_client_killed_at_each_transition_makes_room_for_the_next() {
    let folder = folder();
    let server = serve(folder.path(), "a", 1, 1, true).expect("a server");
    for place in [
        Failpoint::ClientWriting,
        Failpoint::ClientRequest,
        Failpoint::ClientPost,
        Failpoint::ClientReading,
        Failpoint::ClientReleased,
    ] {
        for len in LENGTHS {
            let mut client = Peer::client(folder.path(), "a");
            let request = request(ask::UPPER, len);
            let aside = Order::CallAside {
                request,
                timeout_ms: 20_000,
            };
            let place = place as u32;
            client.carry_out(&Order::Arm { place });
            client.send(&aside);
            client.carry_out(&Order::AwaitReached { place });
            client.kill();
            let next = await_some("room for the next client", || {
                match join(folder.path(), "a") {
                    Ok(client) => Some(client),
                    Err(ChannelError::Connect(error)) => {
                        assert!(error.refusal().is_some(), "{error}");
                        None
                    }
                    Err(error) => panic!("{error}"),
                }
            });
            for len in LENGTHS {
                works(&next, len);
            }
            drop(next);
        }
    }
    assert!(server.is_running());
}

#[test]
fn a_client_stopped_at_each_transition_disturbs_nobody_and_goes_on() {
    let folder = folder();
    let _server = serve(folder.path(), "a", 2, 1, true).expect("a server");
    let other = join(folder.path(), "a").expect("a client");
    let mut client = Peer::client(folder.path(), "a");
    for place in [
        Failpoint::ClientWriting,
        Failpoint::ClientRequest,
        Failpoint::ClientPost,
        Failpoint::ClientReading,
        Failpoint::ClientReleased,
    ] {
        for len in LENGTHS {
            let place = place as u32;
            client.carry_out(&Order::Arm { place });
            client.send(&Order::CallAside {
                request: request(ask::UPPER, len),
                timeout_ms: 20_000,
            });
            client.carry_out(&Order::AwaitReached { place });
            client.stop();
            works(&other, len);
            client.signal(Signal::SIGCONT);
            // Disarmed by one thread, which lets the other one go on.
            client.send(&Order::Arm { place: 0 });
            let mut reports = [client.report(), client.report()];
            reports.sort_by_key(|report| report.kind() == "done");
            let kinds = [reports[0].kind(), reports[1].kind()];
            assert_eq!(kinds, ["response", "done"], "{place}: {reports:?}");
            // The client went away with its thread; a new one takes its place.
            client.carry_out(&connect(folder.path(), "a"));
        }
    }
}

#[test]
fn a_cancelled_request_meets_its_servers_death() {
    let folder = folder();
    let server = Peer::server(folder.path(), "a", true);
    let mut client = join(folder.path(), "a").expect("a client");
    let segment = client.segment().clone();
    let mut slow = request(ask::SLEEP, 16);
    slow[1] = 200;
    let first = client.send_request(&slow).expect("sent");
    let second = client.send_request(&request(ask::UPPER, 16)).expect("sent");
    segment.arm_failpoint(Some(Failpoint::ServerCancelled));
    assert!(client.cancel(second), "the server sleeps");
    await_that("the server at the failpoint", || {
        segment.failpoint_reached() == Failpoint::ServerCancelled as u32
    });
    server.kill();
    let response = client
        .receive_for(first, PATIENCE)
        .expect("it was answered");
    assert_eq!(response.len(), 16);
    drop(response);
    segment.arm_failpoint(None);
    let _next = Peer::server(folder.path(), "a", true);
    client.reconnect(PATIENCE).expect("the next server");
    works(&client, 16);
}

#[test]
fn threads_of_one_client_go_on_with_the_next_server_together() {
    let folder = folder();
    let first = Peer::server(folder.path(), "a", false);
    let client = join(folder.path(), "a").expect("a client").into_shared();
    let all_call = std::sync::Barrier::new(4);
    let done = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for len in [16, 60, 5000] {
            let (client, all_call, done) = (client.clone(), &all_call, &done);
            scope.spawn(move || {
                let asked = request(ask::UPPER, len);
                let answer = client.call(&asked, PATIENCE).expect("a server");
                assert_eq!(answer.len(), len);
                drop(answer);
                all_call.wait();
                // Until the server dies, whenever that is seen.
                let ended = loop {
                    if let Err(error) = client.call(&asked, PATIENCE) {
                        break error;
                    }
                };
                let expected = matches!(
                    ended,
                    ChannelError::PeerDied { .. } | ChannelError::Disconnected
                );
                assert!(expected, "{}", kind_of(&ended));
                client.reconnect(PATIENCE).expect("the next server");
                for _ in 0..200 {
                    let answer = client.call(&asked, PATIENCE).expect("the next server");
                    assert_eq!(answer.len(), len);
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        all_call.wait();
        first.kill();
        let next = Peer::server(folder.path(), "a", false);
        await_that("the next server's calls", || {
            done.load(Ordering::Relaxed) == 3
        });
        drop(next);
    });
}

#[test]
fn a_thread_that_reconnects_late_ends_nothing_of_the_others() {
    let folder = folder();
    let first = Peer::server(folder.path(), "a", false);
    let client = join(folder.path(), "a").expect("a client").into_shared();
    first.kill();
    let _next = Peer::server(folder.path(), "a", false);
    let lost = client.call(&request(ask::UPPER, 16), PATIENCE).map(drop);
    assert!(lost.is_err(), "its server was killed");
    client.reconnect(PATIENCE).expect("the next server");
    let generation = client.segment().generation();
    let mut slow = request(ask::SLEEP, 16);
    slow[1] = 100;
    let sent = client.send_request(&slow, PATIENCE).expect("sent");
    client.reconnect(PATIENCE).expect("it is there");
    assert_eq!(client.segment().generation(), generation);
    let answer = client.receive_for(sent, PATIENCE).expect("an answer");
    assert_eq!(answer.len(), 16);
    drop(answer);
    // Who wants another one than this says so.
    client.server_is_gone();
    client.reconnect(PATIENCE).expect("the same program again");
    assert!(client.segment().generation() > generation);
    client
        .call(&request(ask::UPPER, 16), PATIENCE)
        .expect("an answer");
}

#[test]
fn memory_is_handed_over_only_when_its_server_has_left_it() {
    let folder = folder();
    let server = Peer::server(folder.path(), "a", false);
    let mut client = join(folder.path(), "a").expect("a client");
    works(&client, 16);
    server.stop();
    let sent = client.send_request(&request(ask::UPPER, 16)).expect("sent");
    let late = client.reconnect(Duration::from_millis(100));
    assert!(matches!(late, Err(ChannelError::TimedOut)), "{late:?}");
    assert_eq!(client.segment().generation(), 1);
    server.signal(Signal::SIGCONT);
    client.reconnect(PATIENCE).expect("it left the memory");
    assert_eq!(client.segment().generation(), 2);
    // It may have been answered on the way out.
    if let Err(error) = client.receive_for(sent, PATIENCE).map(drop) {
        assert!(matches!(error, ChannelError::PeerDied { .. }), "{error:?}");
    }
    works(&client, 16);

    // A handler that runs ends first.
    let mut slow = request(ask::SLEEP, 16);
    slow[1] = 250;
    client.send_request(&slow).expect("sent");
    await_that("a busy server", || {
        client.segment().status().expect("a status").requests_read > 0
    });
    let begun = Instant::now();
    client.reconnect(PATIENCE).expect("it left the memory");
    assert!(begun.elapsed() > Duration::from_millis(100), "{begun:?}");
    works(&client, 5000);
}

#[test]
fn all_that_was_under_way_ends_once_each() {
    let folder = folder();
    let server = Peer::server(folder.path(), "a", false);
    let mut client = join(folder.path(), "a").expect("a client");
    let mut slow = request(ask::SLEEP, 16);
    slow[1] = 250;
    let sent: Vec<_> = (0..10)
        .map(|_| client.send_request(&slow).expect("sent"))
        .collect();
    await_that("a busy server", || {
        client.segment().status().expect("a status").requests_read > 0
    });
    server.kill();
    let begun = Instant::now();
    let mut died = Vec::new();
    let mut answered = 0;
    while died.len() + answered < sent.len() {
        match client.receive_response(PATIENCE) {
            Ok(_) => answered += 1,
            Err(ChannelError::PeerDied { sequence, .. }) => died.push(sequence),
            Err(error) => panic!("{}: {error}", kind_of(&error)),
        }
    }
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(died, sent[answered..], "each once, in order");
    let nothing = client.receive_response(PATIENCE).map(drop);
    assert!(
        matches!(nothing, Err(ChannelError::NothingInFlight)),
        "{nothing:?}"
    );

    let late = client.reconnect(Duration::from_millis(50));
    assert!(matches!(late, Err(ChannelError::Connect(_))), "{late:?}");
    let _next = Peer::server(folder.path(), "a", false);
    client.reconnect(PATIENCE).expect("the next server");
    works(&client, 5000);
}

#[test]
fn a_reconnect_waits_for_the_next_server_and_many_follow_each_other() {
    let folder = folder();
    let mut server = Peer::server(folder.path(), "a", false);
    let mut client = Peer::client(folder.path(), "a");
    for _ in 0..5 {
        client.send(&Order::CallOn { timeout_ms: 20_000 });
        server.kill();
        let report = client.report();
        let died = ["died", "died modified", "disconnected"].contains(&report.kind());
        assert!(died, "{report:?}");
        // It asks while nobody is there yet.
        client.send(&Order::Reconnect { timeout_ms: 20_000 });
        server = Peer::server(folder.path(), "a", false);
        assert_eq!(client.report(), Report::Done);
        let order = Order::Call {
            request: request(ask::UPPER, 777),
            timeout_ms: 10_000,
        };
        assert_eq!(client.order(&order).kind(), "response");
    }
}

#[test]
fn a_server_that_stops_in_order_says_so() {
    let folder = folder();
    let mut server = serve(folder.path(), "a", 1, 1, false).expect("a server");
    let mut client = Peer::client(folder.path(), "a");
    client.send(&Order::CallOn { timeout_ms: 20_000 });
    await_that("calls", || {
        let status = server.status().expect("a status");
        status.clients.first().is_some_and(|c| c.responses > 10)
    });
    server.stop();
    let report = client.report();
    assert!(
        ["stopped", "died", "handler", "disconnected"].contains(&report.kind()),
        "{report:?}"
    );
    server.stop();
    assert!(!server.is_running());
    let started = server.start(handle);
    assert!(started.is_err(), "a server starts once");
    assert!(client.order(&Order::Leave) == Report::Done);
}

#[test]
fn a_server_killed_in_the_middle_of_a_batch_leaves_what_it_answered() {
    let folder = folder();
    let server = Peer::server(folder.path(), "a", false);
    let mut client = join(folder.path(), "a").expect("a client");
    // The third and those behind it take a quarter of a second each.
    let mut items = vec![request(ask::UPPER, 40); 2];
    items.resize(60, [ask::SLEEP, 255].to_vec());
    let items: Vec<&[u8]> = items.iter().map(|item| &item[..]).collect();
    let sequence = client.send_batch(&items, 0).expect("room");
    await_that("two items answered", || {
        client
            .batch_progress(sequence)
            .is_some_and(|done| done >= 2)
    });
    server.kill();
    let answer = client.receive_batch(sequence, PATIENCE).expect("its end");
    let answered = answer.answered();
    assert!((2..60).contains(&answered), "{answered}");
    for (item, outcome) in answer.items().enumerate() {
        let outcome = outcome.map(|bytes| bytes.to_vec());
        let expected = match item {
            _ if item < answered => Ok(items[item].to_ascii_uppercase()),
            _ => Err(ItemError::PeerDied {
                maybe_modified: item == answered,
            }),
        };
        assert_eq!(outcome, expected, "item {item} of {answered} answered");
    }
    drop(answer);
    let _next = Peer::server(folder.path(), "a", false);
    client.reconnect(PATIENCE).expect("the next server");
    let again = client.call_batch(&items[..2], PATIENCE).expect("an answer");
    assert!(again.items().all(|item| item.is_ok()));
    drop(again);
    for len in LENGTHS {
        works(&client, len);
    }
}
