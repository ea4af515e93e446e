//! Bytes that no client sends.

use proptest::prelude::*;

use super::*;

#[test]
fn lengths_without_end_cost_nothing() {
    let mut client = Client::new();
    client.greet(FIXED);
    client.option_of(7, u32::MAX, &[1; 4096]);
    client.option_of(77, u32::MAX, &[1; 4096]);
    assert!(client.session.waiting() == (0, 0));
    assert!(client.input.is_empty(), "what comes is passed over");

    let mut client = Client::connected("all", false);
    client.request(0, 1, 1, 0, u32::MAX);
    client.send(&vec![0; 1 << 20]);
    assert!(client.input.is_empty(), "what comes is passed over");
    assert!(client.memory.seen.is_empty());
}

#[test]
fn a_request_that_is_none_ends_the_connection() {
    let mut client = Client::connected("all", true);
    client.send(&[0x25; 28]);
    let magic = Violation::RequestMagic { found: 0x2525_2525 };
    assert_eq!(client.next, Next::Close(Some(magic)));
    client.send(&request(0, 0, 1, 0, 8));
    assert!(client.got.is_empty(), "nothing is carried out any more");
}

#[test]
fn completions_that_nobody_waits_for_change_nothing() {
    let mut client = Client::connected("all", true);
    client.memory.later = true;
    client.request(0, 0, 1, 0, 8);
    let unit = client.memory.kept[0].unit;
    client.complete(0);
    client.got.clear();
    for went in [Ok(&[0; 8][..]), Err(Failure::Io)] {
        client.session.completed(unit, went, &mut client.out);
    }
    assert!(client.out.is_empty());
}

#[test]
fn a_backing_that_returns_another_length_has_failed() {
    let mut client = Client::connected("all", true);
    client.memory.later = true;
    client.request(0, 0, 1, 0, 8);
    let unit = client.memory.kept[0].unit;
    client.session.completed(unit, Ok(&[0; 7]), &mut client.out);
    client.got.extend(client.out.drain(..));
    assert_eq!(client.replies(&BTreeMap::new())[&1].error, 5);
}

#[test]
fn a_call_makes_a_bounded_reply() {
    let mut client = Client::connected("all", true);
    let asked: Vec<u8> = (0..64)
        .flat_map(|cookie| request(0, 0, cookie, 0, 1 << 20))
        .collect();
    let mut at = 0;
    for _ in 0..100 {
        let mut out = Vec::new();
        let rest = &asked[at..];
        let advanced = client.session.advance(rest, &mut out, &mut client.memory);
        at += advanced.consumed;
        assert!(matches!(advanced.next, Next::More | Next::Turn));
        assert!(out.len() as u64 <= NBD_PIECE + 28);
    }
}

#[test]
fn a_client_that_only_zeroes_lets_others_have_their_turn() {
    let mut client = Client::connected("all", true);
    let asked: Vec<u8> = (0..64)
        .flat_map(|cookie| request(0, 6, cookie, 0, 1 << 20))
        .collect();
    let (mut at, mut turns) = (0, 0);
    while at < asked.len() {
        let mut out = Vec::new();
        let rest = &asked[at..];
        let advanced = client.session.advance(rest, &mut out, &mut client.memory);
        at += advanced.consumed;
        turns += usize::from(advanced.next == Next::Turn);
    }
    assert!(turns > 20, "{turns} turns for 64 MiB");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Random bytes at any place of a connection: no panic, no reply without end.
    #[test]
    fn random_bytes(
        whole in 0..4_usize,
        pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20),
        later: bool,
    ) {
        let mut client = match whole {
            0 => Client::new(),
            1 => {
                let mut client = Client::new();
                client.greet(FIXED);
                client
            }
            2 => Client::connected("all", true),
            _ => Client::connected("server-1", false),
        };
        client.memory.later = later;
        for piece in &pieces {
            client.send(piece);
            client.complete_all();
        }
    }

    /// Headers that are right and numbers in them that are not.
    #[test]
    fn random_numbers(
        options in proptest::collection::vec(
            (0..13_u32, any::<u32>(), proptest::collection::vec(any::<u8>(), 0..60)), 0..10),
        requests in proptest::collection::vec(
            (any::<u16>(), 0..10_u16, any::<u64>(), any::<u64>(), any::<u32>()), 0..20),
    ) {
        let mut client = Client::new();
        client.greet(FIXED);
        for (number, len, data) in &options {
            let len = if len % 2 == 0 { data.len() as u32 } else { *len };
            client.option_of(*number, len, data);
        }
        let mut client = Client::connected("all", true);
        client.memory.later = true;
        for (flags, command, cookie, offset, len) in &requests {
            client.request(*flags, *command, *cookie, *offset, *len);
            client.complete_all();
        }
    }
}
