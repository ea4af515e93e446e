//! Batches: against a naive model, against peers that store anything, and cut short by
//! the server's death.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::layout::slot;
use super::tests::{opened, sides};
use super::*;
use crate::limits::MAX_BATCH_ITEMS;

/// What the server does with an item.
#[derive(Clone, Debug)]
enum Does {
    /// Changes each byte, and makes the response this long at most.
    Answers(usize),
    /// Fails with a text of so many characters.
    Fails(usize),
}

fn does() -> impl Strategy<Value = Does> {
    prop_oneof![
        4 => (0..60usize).prop_map(Does::Answers),
        1 => (0..400usize).prop_map(Does::Fails),
    ]
}

fn item() -> impl Strategy<Value = (Vec<u8>, Does)> {
    (prop::collection::vec(any::<u8>(), 0..40), does())
}

/// Serves one batch; what each item has to end as.
fn serve(server: &ServerCore, does: &[Does]) -> Vec<Result<Vec<u8>, ItemError>> {
    let mut posts = Posts::new();
    let claim = server.claim(&mut posts).expect("a request");
    assert!(claim.is_batch() && !claim.is_malformed());
    server.begin_handler(&claim);
    let batch = server.batch(&claim).expect("a batch");
    assert_eq!(batch.len(), does.len());
    let mut expected = Vec::new();
    for (item, does) in does.iter().enumerate() {
        assert_eq!(batch.done(), item);
        let asked = batch.request(item).expect("a length");
        match does {
            Does::Answers(most) => {
                let len = (*most).min(batch.room());
                let bytes = batch.bytes(item, len.max(asked));
                bytes.update_chunks(|_, chunk| chunk.iter_mut().for_each(|byte| *byte ^= 0x55));
                expected.push(Ok(bytes.first(len).to_vec()));
                batch.respond(item, asked, len);
            }
            Does::Fails(len) => {
                let text = "é".repeat(*len);
                let code = ErrorCode(0x100 + item as u32);
                batch.fail(item, code, &text);
                let room = (batch.room() - 8).min(256).min(text.len()) & !1;
                let text = text[..room].to_owned();
                expected.push(Err(ItemError::Handler { code, text }));
            }
        }
    }
    let len = claim.len();
    server.respond(claim, len, &mut posts);
    server.post(&mut posts);
    expected
}

fn outcomes(client: &ClientCore, batch: &Batch) -> Vec<Result<Vec<u8>, ItemError>> {
    let items = batch.items(client.segment());
    items.map(|item| item.map(|bytes| bytes.to_vec())).collect()
}

proptest! {
    #[test]
    fn each_item_ends_as_if_it_had_come_alone(
        batches in prop::collection::vec(
            (prop::collection::vec(item(), 1..40), 0..64usize, any::<bool>()), 1..6),
    ) {
        let (mut client, server) = sides(1 << 16);
        for (items, capacity, by_grant) in batches {
            let requests: Vec<&[u8]> = items.iter().map(|(bytes, _)| &bytes[..]).collect();
            let does: Vec<Does> = items.iter().map(|(_, does)| does.clone()).collect();
            let longest = requests.iter().map(|request| request.len()).max().expect("one");
            let sequence = if by_grant {
                let room = capacity.max(longest);
                let mut grant = client.acquire_batch(items.len(), room).expect("room");
                prop_assert!(grant.room() >= room && grant.len() == items.len());
                for (item, request) in requests.iter().enumerate() {
                    client.write_item(&mut grant, item, &[0xEE; 8]).expect("any first");
                    client.write_item(&mut grant, item, request).expect("within");
                }
                let too_long = vec![0; grant.room() + 1];
                prop_assert!(client.write_item(&mut grant, 0, &too_long).is_err());
                prop_assert!(client.write_item(&mut grant, items.len(), b"").is_err());
                client.publish_batch(grant)
            } else {
                client.submit_batch(&requests, capacity).expect("room")
            };
            client.kick();
            prop_assert!(client.is_batch(sequence));
            prop_assert_eq!(client.batch_progress(sequence), Some(0));
            prop_assert!(client.batch(sequence).is_none());
            let expected = serve(&server, &does);
            prop_assert_eq!(client.batch_progress(sequence), Some(items.len()));
            prop_assert_eq!(client.poll_any(true), Some(sequence));
            let batch = client.batch(sequence).expect("answered");
            prop_assert_eq!((batch.len(), batch.answered()), (items.len(), items.len()));
            prop_assert_eq!(outcomes(&client, &batch), expected);
            for (item, outcome) in outcomes(&client, &batch).into_iter().enumerate() {
                let alone = batch.item(client.segment(), item).map(|bytes| bytes.to_vec());
                prop_assert_eq!(alone, outcome);
            }
            let beyond = batch.item(client.segment(), items.len());
            let no_such_item = matches!(beyond, Err(ItemError::NoSuchItem { .. }));
            prop_assert!(no_such_item);
            // An ordinary request in between.
            let plain = client.submit(&[1; 200], Options::default()).expect("room");
            client.kick();
            prop_assert!(!client.is_batch(plain) && client.batch(plain).is_none());
            let mut posts = Posts::new();
            let claim = server.claim(&mut posts).expect("a request");
            prop_assert!(!claim.is_batch() && server.batch(&claim).is_none());
            server.respond(claim, 3, &mut posts);
            prop_assert_eq!(client.poll(plain), Poll::Response);
            prop_assert!(client.release(sequence) && client.release(plain));
            prop_assert!(!client.is_batch(sequence) || client.batch(sequence).is_none());
        }
        client.mirror();
        let status = client.segment().status().expect("status");
        prop_assert_eq!(status.free_bytes, 1 << 16);
    }

    /// A server that stores anything in the frame of a batch that is the client's.
    #[test]
    fn a_client_survives_any_answered_batch(
        words in prop::collection::vec((0..24usize, any::<u64>()), 0..30),
        lengths in prop::collection::vec((0..6u32, prop_oneof![
            0..80u32, Just(1 << 31), (0..80u32).prop_map(|len| 1 << 31 | len), any::<u32>(),
        ]), 0..8),
        died in any::<bool>(),
    ) {
        let (mut client, server) = sides(4096);
        let items: [&[u8]; 6] = [b"a", b"bb", b"", b"dddddddd", b"e", b"f"];
        let sequence = client.submit_batch(&items, 16).expect("room");
        client.kick();
        let mut posts = Posts::new();
        let claim = server.claim(&mut posts).expect("a request");
        server.begin_handler(&claim);
        let payload = server.segment().payload();
        // Its data begins behind the block's header; 5 words of header and table.
        let frame = payload.words(64, 24).expect("words");
        for (at, word) in words {
            frame[at].store(word, Ordering::Relaxed);
        }
        for (item, length) in lengths {
            let word = &frame[2 + item as usize / 2];
            let shift = 32 * (item % 2);
            let kept = word.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
            word.store(kept | u64::from(length) << shift, Ordering::Relaxed);
        }
        prop_assert!(client.batch_progress(sequence).is_some_and(|done| done <= 6));
        if died {
            prop_assert_eq!(client.server_died(), [(sequence, true)]);
        } else {
            let len = claim.len();
            server.respond(claim, len, &mut posts);
            prop_assert_eq!(client.poll(sequence), Poll::Response);
        }
        let batch = client.batch(sequence).expect("at its end").after_death(died);
        prop_assert!(batch.answered() <= 6);
        let found = outcomes(&client, &batch);
        prop_assert_eq!(found.len(), 6);
        for outcome in found {
            match outcome {
                Ok(bytes) => prop_assert!(bytes.len() <= 16),
                Err(ItemError::Handler { text, .. }) => prop_assert!(text.len() <= 3 * 8),
                Err(ItemError::PeerDied { .. }) => prop_assert!(died),
                Err(ItemError::Broken) => {}
                Err(other) => panic!("{other}"),
            }
        }
        prop_assert!(client.release(sequence));
    }

    /// A client that stores anything in the frame and the slot of a batch that is the
    /// server's.
    #[test]
    fn a_server_survives_any_batch(
        header in prop::collection::vec(prop_oneof![
            any::<u64>(),
            (0..70u64, 0..70u64).prop_map(|(room, items)| room << 32 | items),
            (0..70u64).prop_map(|items| 16 << 32 | items),
        ], 2),
        lengths in prop::collection::vec(any::<u32>(), 8),
        offset in prop_oneof![(0..80u64).prop_map(|at| at * 64), any::<u64>()],
        capacity in prop_oneof![0..5000u64, any::<u64>()],
        len in prop_oneof![0..5000u32, any::<u32>()],
        flags in prop_oneof![Just(slot::BATCH), Just(slot::BATCH | slot::IN_SLOT), any::<u32>()],
    ) {
        let (_client, server) = sides(4096);
        let segment = server.segment().clone();
        let payload = segment.payload();
        if let Ok(words) = payload.words(offset, 6) {
            for (word, value) in words.iter().zip(&header) {
                word.store(*value, Ordering::Relaxed);
            }
            for (word, pair) in words[2..].iter().zip(lengths.as_chunks::<2>().0) {
                let both = u64::from(pair[1]) << 32 | u64::from(pair[0]);
                word.store(both, Ordering::Relaxed);
            }
        }
        let slot_line = segment.slots().line(1);
        let length = u64::from(flags) << 32 | u64::from(len);
        slot_line.0[slot::LENGTH].store(length, Ordering::Relaxed);
        slot_line.0[slot::OFFSET].store(offset, Ordering::Relaxed);
        slot_line.0[slot::CAPACITY].store(capacity, Ordering::Relaxed);
        state::hand_over(&slot_line.0[slot::STATE], 1, State::Request);
        let mut posts = Posts::new();
        let claim = server.claim(&mut posts).expect("a request, whatever it is");
        if let Some(batch) = server.batch(&claim) {
            prop_assert!(!claim.is_malformed());
            prop_assert!((1..=MAX_BATCH_ITEMS as usize).contains(&batch.len()));
            prop_assert!(batch.len() * batch.room() < claim.len());
            for item in 0..batch.len() {
                let asked = batch.request(item);
                prop_assert!(asked.is_none_or(|asked| asked <= batch.room()));
                let bytes = batch.bytes(item, usize::MAX);
                prop_assert_eq!(bytes.len(), batch.room());
                bytes.update_chunks(|_, chunk| chunk.fill(9));
                match asked {
                    Some(asked) => batch.respond(item, asked, batch.room()),
                    None => batch.fail(item, ErrorCode::MALFORMED, &"é".repeat(300)),
                }
            }
            prop_assert_eq!(batch.done(), batch.len());
        }
        server.fail(claim, ErrorCode::MALFORMED, "no batch", &mut posts);
        server.post(&mut posts);
        prop_assert!(server.claim(&mut posts).is_none());
    }
}

#[test]
fn batches_beyond_the_limits_are_refused_and_change_nothing() {
    let (mut client, server) = sides(4096);
    let no_items: [&[u8]; 0] = [];
    let most = MAX_BATCH_ITEMS;
    assert_eq!(
        client.submit_batch(&no_items, 8),
        Err(AcquireError::Items { items: 0, most })
    );
    let many = vec![&b"x"[..]; most as usize + 1];
    assert!(matches!(
        client.submit_batch(&many, 0),
        Err(AcquireError::Items { .. })
    ));
    for capacity in [5000, 1 << 31, usize::MAX - 7, usize::MAX] {
        assert!(
            matches!(
                client.submit_batch(&[b"x"], capacity),
                Err(AcquireError::TooLarge { .. })
            ),
            "{capacity}"
        );
    }
    let held = client.acquire_batch(10, 300).expect("room");
    assert_eq!(client.submit_batch(&[b"x"], 3000), Err(AcquireError::Full));
    client.abandon_batch(held);
    client.submit_batch(&[b"x"], 3000).expect("room again");
    client.kick();
    assert_eq!(serve(&server, &[Does::Answers(1)]).len(), 1);

    let (mut client, _server) = sides(0);
    assert!(matches!(
        client.submit_batch(&[b"x"], 0),
        Err(AcquireError::TooLarge { largest: 112, .. })
    ));
}

#[test]
fn memory_for_a_peer_without_batches_has_none() {
    let config = BufferConfig::new(0, 4096).slots(8);
    let plain = Segment::create_for(&config, Features::empty()).expect("segment");
    assert_eq!(plain.geometry().features, Features::empty());
    let mut client = ClientCore::new(&opened(&plain));
    assert!(!client.has_batches());
    assert_eq!(
        client.submit_batch(&[b"x"], 0),
        Err(AcquireError::NoBatches)
    );
    let all = Segment::create_for(&config, Features::all()).expect("segment");
    assert_eq!(all.geometry().features, Features::BATCHES);
}

/// Items before the one that the server died at can be read, with several workers too.
#[test]
fn a_server_that_dies_in_the_middle_leaves_what_it_answered() {
    for workers in [1, 3] {
        for answered in 0..=4 {
            let segment = Segment::create(&BufferConfig::new(0, 4096).slots(8)).expect("segment");
            let server = ServerCore::new(&segment, workers);
            let mut client = ClientCore::new(&opened(&segment));
            let items: [&[u8]; 4] = [b"one", b"two", b"three", b"four"];
            let sequence = client.submit_batch(&items, 0).expect("room");
            client.kick();
            let mut posts = Posts::new();
            let claim = server.claim(&mut posts).expect("a request");
            server.begin_handler(&claim);
            let batch = server.batch(&claim).expect("a batch");
            for (item, bytes) in items.iter().enumerate().take(answered) {
                batch.bytes(item, 2).write(0, b"->").expect("within");
                batch.respond(item, bytes.len(), bytes.len());
            }
            assert_eq!(client.batch_progress(sequence), Some(answered));
            drop(claim);
            assert_eq!(client.server_died(), [(sequence, true)]);
            let batch = client.batch(sequence).expect("ended").after_death(true);
            assert_eq!(batch.answered(), answered);
            for (item, outcome) in outcomes(&client, &batch).into_iter().enumerate() {
                if item < answered {
                    let expected = [b"->", &items[item][2..]].concat();
                    assert_eq!(outcome, Ok(expected));
                } else {
                    let maybe_modified = item == answered;
                    assert_eq!(outcome, Err(ItemError::PeerDied { maybe_modified }));
                }
            }
            let next = ServerCore::take_over(&segment, workers);
            assert!(client.release(sequence));
            let again = client.submit_batch(&items, 0).expect("room");
            client.kick();
            serve(&next, &[const { Does::Answers(9) }; 4]);
            assert_eq!(client.poll(again), Poll::Response);
        }
    }
}
