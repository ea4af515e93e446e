//! Batches between a client and a server of threads in one process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::tests::{PATIENCE, opened};
use super::*;
use crate::duplex::{BufferConfig, ErrorCode, Features, ItemError, Segment, Side, Waiting};
use crate::shm::PeerTrust;

fn client_of(segment: &Segment, waiting: Waiting) -> DuplexClient {
    let options = ClientOptions {
        waiting,
        ..ClientOptions::default()
    };
    DuplexClient::over(opened(segment), options).expect("client")
}

/// Turns each byte round; fails, panics or answers twice as long where the first byte
/// says so.
fn handle(frame: &mut Frame<'_>) -> Result<(), HandlerError> {
    let mut first = [0];
    let len = frame.len();
    if len > 0 {
        frame.view().read(0, &mut first)?;
    }
    match first[0] {
        b'f' => return Err(HandlerError::with_code(0x123, "no such thing")),
        b'p' => panic!("on purpose"),
        b'g' => frame.set_len(2 * len)?,
        _ => {}
    }
    frame.update_chunks(|chunk| chunk.iter_mut().for_each(|byte| *byte ^= 0xFF));
    frame.set_len(len)?;
    Ok(())
}

#[test]
fn batches_of_every_size_by_every_kind_of_waiting_and_pool() {
    for (waiting, workers) in [
        (Waiting::Spin, 1),
        (Waiting::Park, 1),
        (Waiting::Park, 3),
        (Waiting::Adaptive, 2),
    ] {
        let options = ServerOptions {
            waiting,
            workers,
            ..ServerOptions::default()
        };
        let segment = Segment::create(&BufferConfig::new(0, 1 << 20)).expect("segment");
        let server = InPlaceDuplexServer::new(options).expect("server");
        server.start(handle).expect("start");
        let serving = server.serve_segment(&segment, false).expect("serve");
        let client = client_of(&segment, waiting);
        let rounds = if waiting == Waiting::Spin { 5 } else { 60 };
        for round in 0..rounds {
            let count = [1, 2, 7, 64, 500][round % 5];
            let items: Vec<Vec<u8>> = (0..count).map(|i| vec![i as u8 | 0x80; i % 90]).collect();
            let items: Vec<&[u8]> = items.iter().map(|item| &item[..]).collect();
            let plain = client.send_request(&[1; 30]).expect("room");
            let answer = client.call_batch(&items, PATIENCE).expect("answer");
            assert_eq!((answer.len(), answer.answered()), (count, count));
            for (asked, found) in items.iter().zip(answer.items()) {
                let expected: Vec<u8> = asked.iter().map(|byte| byte ^ 0xFF).collect();
                assert_eq!(found.expect("response").to_vec(), expected);
            }
            drop(answer);
            let plain = client.receive_for(plain, PATIENCE).expect("response");
            assert_eq!(plain.copy_to_vec(), [0xFE; 30]);
        }
        assert!(matches!(
            client.receive_batch(1, PATIENCE),
            Err(ChannelError::UnknownSequence { sequence: 1 })
        ));
        client.mirror();
        assert_eq!(segment.status().expect("status").free_bytes, 1 << 20);
        drop(client);
        serving.join();
    }
}

#[test]
fn each_item_fails_alone() {
    let segment = Segment::create(&BufferConfig::new(0, 1 << 16)).expect("segment");
    let server = InPlaceDuplexServer::new(ServerOptions::default()).expect("server");
    let failures = Arc::new(AtomicUsize::new(0));
    let items_failed = failures.clone();
    server.on_error(move |failure| {
        let item = failure.item.expect("items only");
        items_failed.fetch_add(1 << (8 * item), Ordering::Relaxed);
    });
    server.start(handle).expect("start");
    let serving = server.serve_segment(&segment, false).expect("serve");
    let client = client_of(&segment, Waiting::Adaptive);
    let shared = client.into_shared();
    for _ in 0..3 {
        let sequence = shared
            .send_batch(&[b"p", b"a", b"f", b"gg", b"p"], 16, PATIENCE)
            .expect("room");
        let answer = shared.receive_batch(sequence, PATIENCE).expect("answer");
        let outcomes: Vec<_> = answer
            .items()
            .map(|item| item.map(|bytes| bytes.to_vec()))
            .collect();
        let failed = |code, text: &str| {
            let text = text.to_owned();
            Err(ItemError::Handler { code, text })
        };
        assert_eq!(
            outcomes,
            [
                failed(ErrorCode::PANIC, "on purpo"),
                Ok(vec![b'a' ^ 0xFF]),
                failed(ErrorCode(0x123), "no such "),
                Ok(vec![b'g' ^ 0xFF; 2]),
                failed(ErrorCode::PANIC, "on purpo"),
            ]
        );
        drop(answer);
        let answer = shared.call_batch(&[b"x"], PATIENCE).expect("answer");
        assert_eq!(answer.item(0).expect("response").to_vec(), [b'x' ^ 0xFF]);
    }
    drop(shared);
    serving.join();
    assert_eq!(failures.load(Ordering::Relaxed), 3 << 32 | 3 << 16 | 3);
}

#[test]
fn items_are_slices_for_a_server_that_trusts() {
    let segment = Segment::create(&BufferConfig::new(0, 1 << 16)).expect("segment");
    let server = InPlaceDuplexServer::new(ServerOptions::default()).expect("server");
    server
        .start_trusting(PeerTrust::in_tests(), |frame| {
            let (item, sequence) = (frame.item().expect("of a batch"), frame.sequence());
            let capacity = frame.capacity();
            frame.set_len(capacity)?;
            let data = frame.data_mut()?;
            data[0] = item as u8;
            data[1] = sequence as u8;
            data[2..].fill(7);
            frame.set_len(3 + item)?;
            Ok(())
        })
        .expect("start");
    let serving = server.serve_segment(&segment, false).expect("serve");
    let client = client_of(&segment, Waiting::Adaptive);
    let mut request = client.acquire_batch(3, 9).expect("room");
    assert_eq!((request.len(), request.room()), (3, 16));
    request.write(1, b"only one of them").expect("within");
    assert!(request.write(3, b"").is_err());
    let sequence = request.send();
    let answer = client.receive_batch(sequence, PATIENCE).expect("answer");
    let found: Vec<_> = answer
        .items()
        .map(|item| item.expect("ok").to_vec())
        .collect();
    let first = |item: u8| [item, sequence as u8];
    let expected: Vec<Vec<u8>> = (0..3)
        .map(|item| [&first(item)[..], &vec![7; 1 + usize::from(item)]].concat())
        .collect();
    assert_eq!(found, expected);
    drop(answer);
    // Not sent after all.
    drop(client.acquire_batch(100, 100).expect("room"));
    client.mirror();
    assert_eq!(segment.status().expect("status").free_bytes, 1 << 16);
    drop(client);
    serving.join();
}

#[test]
fn several_threads_send_batches_by_one_client_to_a_pool() {
    let options = ServerOptions {
        workers: 3,
        ..ServerOptions::default()
    };
    let segment = Segment::create(&BufferConfig::new(0, 8 << 10).slots(8)).expect("segment");
    let server = InPlaceDuplexServer::new(options).expect("server");
    server.start(handle).expect("start");
    let serving = server.serve_segment(&segment, false).expect("serve");
    let client = client_of(&segment, Waiting::Adaptive).into_shared();
    std::thread::scope(|scope| {
        for thread in 0..5u8 {
            let client = client.clone();
            scope.spawn(move || {
                for round in 0..100usize {
                    let item = vec![thread | 0x80; round % 30];
                    let items = vec![&item[..]; 1 + round % 50];
                    let answer = client.call_batch(&items, PATIENCE).expect("answer");
                    for found in answer.items() {
                        let expected = vec![(thread | 0x80) ^ 0xFF; round % 30];
                        assert_eq!(found.expect("response").to_vec(), expected);
                    }
                }
            });
        }
    });
    drop(client);
    serving.join();
}

#[test]
fn a_batch_that_is_too_late_is_cancelled_and_gives_its_room_back() {
    let segment = Segment::create(&BufferConfig::new(0, 4096).slots(8)).expect("segment");
    let client = client_of(&segment, Waiting::Park);
    let soon = std::time::Duration::from_millis(10);
    assert!(matches!(
        client.call_batch(&[b"a", b"b"], soon),
        Err(ChannelError::TimedOut)
    ));
    let server = InPlaceDuplexServer::new(ServerOptions::default()).expect("server");
    server.start(handle).expect("start");
    let serving = server.serve_segment(&segment, false).expect("serve");
    // Nobody was there: the next one's server skips the first.
    let answer = client.call_batch(&[&[0x80; 100][..]; 30], PATIENCE);
    assert_eq!(answer.expect("answer").answered(), 30);
    client.call(&[0x80; 3900], PATIENCE).expect("all room");
    drop(client);
    serving.join();
}

#[test]
fn the_death_of_a_server_ends_each_item() {
    for shared in [false, true] {
        let segment = Segment::create(&BufferConfig::new(0, 4096)).expect("segment");
        let client = client_of(&segment, Waiting::Park);
        let items: [&[u8]; 3] = [b"a", b"b", b"c"];
        // Its server is this thread, which answers one and is then known to be gone.
        let core = crate::duplex::ServerCore::new(&segment, 1);
        let sequence = client.send_batch(&items, 0).expect("room");
        let claim = core.claim(&mut Default::default()).expect("a request");
        core.begin_handler(&claim);
        core.batch(&claim).expect("a batch").respond(0, 1, 1);
        assert_eq!(client.batch_progress(sequence), Some(1));
        segment.set_lost(Side::Server, true);
        client.segment().set_lost(Side::Server, true);
        let died = |maybe_modified| Err(ItemError::PeerDied { maybe_modified });
        let expected = [Ok(b"a".to_vec()), died(true), died(false)];
        let found: Vec<_> = if shared {
            let client = client.into_shared();
            let ended = client.receive_batch(sequence, PATIENCE).expect("ended");
            assert_eq!(ended.answered(), 1);
            let items = ended.items();
            items.map(|item| item.map(|b| b.to_vec())).collect()
        } else {
            let ended = client.receive_batch(sequence, PATIENCE).expect("ended");
            assert_eq!(ended.answered(), 1);
            let items = ended.items();
            items.map(|item| item.map(|b| b.to_vec())).collect()
        };
        assert_eq!(found, expected);
    }
}

#[test]
fn a_server_without_batches_is_named() {
    let config = BufferConfig::new(0, 4096);
    let segment = Segment::create_for(&config, Features::empty()).expect("segment");
    let client = client_of(&segment, Waiting::Park);
    assert!(!client.has_batches());
    assert!(matches!(
        client.call_batch(&[b"a"], PATIENCE),
        Err(ChannelError::NoBatches)
    ));
    assert!(matches!(
        client.acquire_batch(1, 1),
        Err(ChannelError::NoBatches)
    ));
}
