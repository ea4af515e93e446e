//! Each option, rightly and wrongly used.

use super::*;

const ACK: u32 = 1;
const UNSUP: u32 = (1 << 31) + 1;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;
const TOO_BIG: u32 = (1 << 31) + 9;

/// HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO.
const WRITABLE: u16 = 0b1101_0110_1101;

fn greeted() -> Client {
    let mut client = Client::new();
    client.greet(FIXED | NO_ZEROES);
    client
}

/// The final reply to an option.
fn ask(client: &mut Client, number: u32, data: &[u8]) -> u32 {
    client.option(number, data);
    client.replies_of(number).last().expect("a reply").0
}

#[test]
fn the_greeting_comes_before_any_input() {
    let mut client = Client::new();
    client.run();
    assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\x00\x03");
    assert_eq!(client.next, Next::Input(4));
}

#[test]
fn export_name_answers_with_and_without_zeroes() {
    for (flags, zeroes) in [
        (FIXED, 124),
        (FIXED | NO_ZEROES, 0),
        (NO_ZEROES, 0),
        (0, 124),
    ] {
        let mut client = Client::new();
        client.greet(flags);
        client.option(1, b"server-1");
        assert_eq!(client.take_u64(), SEGMENT);
        assert_eq!(client.take_u16(), WRITABLE);
        assert!(client.take(zeroes).iter().all(|byte| *byte == 0));
        assert!(client.got.is_empty());
        assert_eq!(client.next, Next::Input(28));
    }
}

#[test]
fn the_default_export_is_the_first() {
    let mut client = greeted();
    client.option(1, b"");
    assert_eq!(client.take_u64(), 3 * SEGMENT);
}

#[test]
fn go_informs_of_what_is_wanted() {
    let mut client = greeted();
    client.option(7, &choice("", &[3, 1, 2, 99]));
    let replies = client.replies_of(7);
    let info = |kind: u16, body: &[u8]| (3, [&kind.to_be_bytes(), body].concat());
    let size = (3 * SEGMENT).to_be_bytes();
    let sizes = [1_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
    assert_eq!(
        replies,
        [
            info(0, &[&size[..], &WRITABLE.to_be_bytes()].concat()),
            info(1, b"all"),
            info(2, b"what all is"),
            info(3, &sizes),
            (ACK, Vec::new()),
        ]
    );
    assert_eq!(client.next, Next::Input(28));
}

#[test]
fn info_changes_nothing_and_a_wrong_name_ends_nothing() {
    let mut client = greeted();
    assert_eq!(ask(&mut client, 6, &choice("fixed", &[])), ACK);
    assert_eq!(ask(&mut client, 7, &choice("nothing", &[])), UNKNOWN);
    assert_eq!(ask(&mut client, 6, &choice("nothing", &[])), UNKNOWN);
    assert_eq!(ask(&mut client, 7, b"\0\0\0\x09all\0\0"), INVALID);
    assert_eq!(ask(&mut client, 7, &choice("all", &[])), ACK);
    assert_eq!(client.next, Next::Input(28));
}

#[test]
fn what_is_read_only_says_so() {
    let mut client = greeted();
    ask(&mut client, 8, &[]);
    client.option(6, &choice("fixed", &[]));
    let flags = &client.replies_of(6)[0].1[10..];
    // HAS_FLAGS, READ_ONLY, FLUSH, FUA, DF, MULTI_CONN, CACHE.
    assert_eq!(flags, 0b101_1000_1111_u16.to_be_bytes());
}

#[test]
fn the_list_has_them_all() {
    let mut client = greeted();
    client.option(3, &[]);
    let replies = client.replies_of(3);
    let named = |name: &str| (2, [text(name), format!("what {name} is").into()].concat());
    let all = [
        named("all"),
        named("server-1"),
        named("fixed"),
        (ACK, Vec::new()),
    ];
    assert_eq!(replies, all);
    assert_eq!(ask(&mut client, 3, b"x"), INVALID);
}

#[test]
fn an_option_that_is_not_known_is_passed_over() {
    let mut client = greeted();
    for number in [0, 4, 5, 9 + 2, 77, u32::MAX] {
        assert_eq!(ask(&mut client, number, &[7; 100]), UNSUP);
        assert_eq!(ask(&mut client, number, &[]), UNSUP);
    }
    assert_eq!(ask(&mut client, 77, &vec![7; 3 << 20]), UNSUP);
    assert_eq!(ask(&mut client, 7, &vec![7; (64 << 10) + 1]), TOO_BIG);
    assert_eq!(ask(&mut client, 7, &choice("all", &[])), ACK);
}

#[test]
fn abort_is_acknowledged_and_ends() {
    let mut client = greeted();
    assert_eq!(ask(&mut client, 2, &[]), ACK);
    assert_eq!(client.next, Next::Close(None));
}

#[test]
fn contexts_need_structured_replies() {
    let mut client = greeted();
    let query = contexts("all", &["base:allocation"]);
    assert_eq!(ask(&mut client, 10, &query), INVALID);
    assert_eq!(ask(&mut client, 9, &query), INVALID);
    assert_eq!(ask(&mut client, 8, b"x"), INVALID);
    assert_eq!(ask(&mut client, 8, &[]), ACK);
    let named = |id: u32| (4, [&id.to_be_bytes(), &b"base:allocation"[..]].concat());
    for (number, queries, expected) in [
        (10, vec!["base:allocation", "x:y"], Some(1)),
        (10, vec![], None),
        (10, vec!["base:"], None),
        (9, vec![], Some(0)),
        (9, vec!["base:"], Some(0)),
        (9, vec!["qemu:dirty-bitmap:"], None),
    ] {
        client.option(number, &contexts("all", &queries));
        let mut replies = client.replies_of(number);
        assert_eq!(replies.pop(), Some((ACK, Vec::new())), "{queries:?}");
        assert_eq!(replies.pop(), expected.map(named), "{number} {queries:?}");
    }
    assert_eq!(ask(&mut client, 10, &contexts("nothing", &[])), UNKNOWN);
}

#[test]
fn contexts_are_those_of_their_export() {
    for (asked, chosen, error) in [("all", "all", 0), ("", "all", 0), ("server-1", "all", 22)] {
        let mut client = greeted();
        ask(&mut client, 8, &[]);
        ask(&mut client, 10, &contexts(asked, &["base:allocation"]));
        ask(&mut client, 7, &choice(chosen, &[]));
        client.request(0, 7, 5, 0, 4096);
        let reply = &client.replies(&BTreeMap::new())[&5];
        assert_eq!(reply.error, error, "{asked} {chosen}");
    }
}

#[test]
fn what_ends_a_handshake() {
    let mut client = Client::new();
    client.greet(7);
    let flags = Violation::ClientFlags { flags: 7 };
    assert_eq!(client.next, Next::Close(Some(flags)));

    let mut client = greeted();
    client.send(&[9; 16]);
    assert!(matches!(
        client.next,
        Next::Close(Some(Violation::OptionMagic { .. }))
    ));

    let mut client = Client::new();
    client.greet(0);
    client.option(3, &[]);
    let option = Violation::NotFixed { option: 3 };
    assert_eq!(client.next, Next::Close(Some(option)));

    for name in [vec![b'x'; 5000], b"nothing".to_vec()] {
        let mut client = greeted();
        client.option(1, &name);
        assert_eq!(client.next, Next::Close(Some(Violation::NoSuchExport)));
    }

    let mut client = greeted();
    for _ in 0..256 {
        client.option(3, &[]);
    }
    assert!(!matches!(client.next, Next::Close(_)));
    client.option(3, &[]);
    assert_eq!(client.next, Next::Close(Some(Violation::Options)));
}
