//! Each command, and a model of many.

use proptest::prelude::*;

use super::*;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// One request alone and its reply.
fn ask(client: &mut Client, flags: u16, command: u16, offset: u64, len: u32) -> Reply {
    client.request(flags, command, 9, offset, len);
    let fits = len <= 32 << 20;
    if command == WRITE {
        client.send(&vec![0x5a; len as usize]);
    }
    client.complete_all();
    let reads = if command == READ && fits {
        BTreeMap::from([(9, (offset, len))])
    } else {
        BTreeMap::new()
    };
    let mut replies = client.replies(&reads);
    let reply = replies.remove(&9).expect("a reply");
    assert!(reply.done && replies.is_empty());
    reply
}

#[test]
fn golden_bytes_of_replies() {
    let mut client = Client::connected("all", false);
    client.request(0, READ, 0x0102, 0, 2);
    let simple = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\x01\x02\x00\x07";
    assert_eq!(client.take(18), simple);
    let mut client = Client::connected("all", true);
    client.request(0, READ, 0x0102, 0, 2);
    let chunk =
        b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\x01\x02\0\0\0\x0a\0\0\0\0\0\0\0\0\x00\x07";
    assert_eq!(client.take(30), chunk);
    assert!(client.got.is_empty());
}

#[test]
fn errors_are_those_of_the_table() {
    let end = 3 * SEGMENT;
    for (export, flags, command, offset, len, error) in [
        ("all", 0, READ, end, 1, EINVAL),
        ("all", 0, READ, u64::MAX, 2, EINVAL),
        ("all", 0, READ, 0, (32 << 20) + 1, EINVAL),
        ("all", 0, WRITE, end, 1, ENOSPC),
        ("all", 0, WRITE, u64::MAX - 1, 4, ENOSPC),
        ("all", 0, WRITE, 0, (32 << 20) + 1, EINVAL),
        ("all", 0, TRIM, end - 1, 2, EINVAL),
        ("all", 0, ZEROES, end - 1, 2, ENOSPC),
        ("all", 0, CACHE, end, 1, EINVAL),
        ("all", 0, STATUS, end, 1, EINVAL),
        ("all", 0, STATUS, 0, 0, EINVAL),
        ("all", 0, FLUSH, 1, 0, EINVAL),
        ("all", 0, FLUSH, 0, 1, EINVAL),
        ("all", 0, 8, 0, 0, EINVAL),
        ("all", 0, 0xffff, 0, 1, EINVAL),
        ("all", 2, READ, 0, 1, EINVAL),
        ("all", 4, WRITE, 0, 1, EINVAL),
        ("all", 8, READ, 0, 1, EINVAL),
        ("all", 16, TRIM, 0, 1, EINVAL),
        ("all", 0x8000, ZEROES, 0, 1, EINVAL),
        ("fixed", 0, WRITE, 0, 1, EPERM),
        ("fixed", 0, WRITE, 1 << 40, 70000, EPERM),
        ("fixed", 0, TRIM, 0, 1, EPERM),
        ("fixed", 2, ZEROES, 0, 1, EPERM),
        ("all", 1, READ, 0, 1, 0),
        ("all", 1, WRITE, 0, 1, 0),
        ("all", 1, FLUSH, 0, 0, 0),
        ("all", 1, TRIM, end - 1, 1, 0),
        ("all", 1 | 2 | 16, ZEROES, 0, 4096, 0),
        ("all", 1, CACHE, 0, 1 << 20, 0),
        ("all", 0, READ, end, 0, 0),
        ("all", 0, WRITE, end, 0, 0),
    ] {
        for structured in [true, false] {
            let mut client = Client::connected(export, structured);
            let before = client.memory.bytes.clone();
            let reply = ask(&mut client, flags, command, offset, len);
            let what = format!("{export} {flags:#x} {command} {offset} {len} {structured}");
            assert_eq!(reply.error, error, "{what}");
            assert_eq!(client.next, Next::Input(28), "{what}");
            assert!(error == 0 || client.memory.bytes == before, "{what}");
            assert!(error == 0 || client.memory.seen.is_empty(), "{what}");
            assert_eq!(ask(&mut client, 0, READ, 0, 8).data.len(), 8);
        }
    }
}

#[test]
fn without_structured_replies_there_is_no_df_and_no_status() {
    let mut client = Client::connected("all", false);
    assert_eq!(ask(&mut client, 4, READ, 0, 8).error, EINVAL);
    assert_eq!(ask(&mut client, 0, STATUS, 0, 8).error, EINVAL);
}

#[test]
fn long_requests_go_in_pieces_that_end_with_stripes() {
    for later in [false, true] {
        let mut client = Client::connected("all", true);
        client.memory.later = later;
        let (offset, len) = (SEGMENT - 70_000, SEGMENT as u32 + 100_000);
        assert_eq!(ask(&mut client, 0, WRITE, offset, len).error, 0);
        let range = offset as usize..offset as usize + len as usize;
        assert!(
            client.memory.bytes[range.clone()]
                .iter()
                .all(|b| *b == 0x5a)
        );
        let seen = std::mem::take(&mut client.memory.seen);
        for (address, len) in &seen[..seen.len() - 1] {
            let end = address + u64::from(*len);
            let in_segment = end % SEGMENT;
            assert!(in_segment.is_multiple_of(64 << 10), "a piece ends at {end}");
            assert!(u64::from(*len) <= NBD_PIECE);
        }
        let reply = ask(&mut client, 0, READ, offset, len);
        assert!(reply.data == client.memory.bytes[range.clone()]);
        assert_eq!(reply.filled, len as usize);
        assert!(reply.chunks > 1);
        let reply = ask(&mut client, 4, READ, offset, len);
        assert!(reply.data == client.memory.bytes[range.clone()]);
        assert_eq!(reply.chunks, 2, "the data and the end");
        assert_eq!(ask(&mut client, 0, ZEROES, offset, len).error, 0);
        assert!(client.memory.bytes[range].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_long_simple_read_is_one_run_of_bytes() {
    for later in [false, true] {
        let mut client = Client::connected("all", false);
        client.memory.later = later;
        let len = 3 * SEGMENT as u32 - 5;
        let reply = ask(&mut client, 0, READ, 5, len);
        assert!(reply.data == client.memory.bytes[5..]);
    }
}

#[test]
fn a_stream_waits_for_what_is_under_way() {
    let mut client = Client::connected("all", false);
    client.memory.later = true;
    client.request(0, READ, 1, 0, 4096);
    client.request(0, READ, 2, 0, 2 << 20);
    client.request(0, READ, 3, 0, 4096);
    assert_eq!(client.memory.kept.len(), 1, "the long one waits");
    client.complete_all();
    let reads = [(1, (0, 4096)), (2, (0, 2 << 20)), (3, (0, 4096))];
    let replies = client.replies(&BTreeMap::from(reads));
    assert_eq!(replies.len(), 3);
    assert!(replies.values().all(|reply| reply.done));
}

#[test]
fn a_read_that_fails_half_way() {
    // In chunks: an error in place of the rest.
    let mut client = Client::connected("all", true);
    client.memory.later = true;
    client.request(0, READ, 1, 0, 1 << 20);
    client.complete(0);
    client.memory.fails = true;
    client.complete_all();
    let replies = client.replies(&BTreeMap::from([(1, (0, 1 << 20))]));
    assert!(replies[&1].done && replies[&1].error == EIO);
    // In one chunk: padded, then the error.
    client.memory.fails = false;
    client.request(4, READ, 2, 0, 2 << 20);
    client.complete(0);
    client.memory.fails = true;
    client.complete_all();
    let replies = client.replies(&BTreeMap::from([(2, (0, 2 << 20))]));
    assert!(replies[&2].done && replies[&2].error == EIO);
    assert_eq!(replies[&2].filled, 2 << 20);
    assert_eq!(client.next, Next::Input(28));
    // Simply: before the first byte an error, behind it the end.
    for done in [0, 1] {
        let mut client = Client::connected("all", false);
        client.memory.later = true;
        client.request(0, READ, 1, 0, 1 << 20);
        for _ in 0..done {
            client.complete(0);
        }
        client.memory.fails = true;
        client.complete_all();
        let broke = Next::Close(Some(Violation::ReadBroke));
        assert_eq!(client.next == broke, done > 0);
    }
}

#[test]
fn a_failed_piece_fails_the_whole_write() {
    let mut client = Client::connected("all", true);
    client.memory.later = true;
    client.request(0, WRITE, 1, 0, 1 << 20);
    client.grain = 100_000;
    client.send(&vec![1; 1 << 20]);
    assert!(client.memory.kept.len() > 1);
    client.memory.fails = true;
    client.complete(1);
    client.memory.fails = false;
    client.complete_all();
    let replies = client.replies(&BTreeMap::new());
    assert_eq!((replies.len(), replies[&1].error), (1, EIO));
    assert_eq!(ask(&mut client, 0, WRITE, 0, 8).error, 0);
}

#[test]
fn block_status_is_cut_to_the_question() {
    let mut client = Client::connected("all", true);
    let extent = |len, hole| Extent {
        len,
        kind: Kind::of_hole(hole),
    };
    for (holes, flags, len, expected) in [
        (vec![], 0, 4096, vec![(4096, 0)]),
        (vec![extent(0, true)], 0, 9, vec![(9, 0)]),
        (vec![extent(1 << 40, true)], 0, 100, vec![(100, 3)]),
        (
            vec![extent(10, true), extent(5, true), extent(7, false)],
            0,
            20,
            vec![(15, 3), (5, 0)],
        ),
        (
            vec![extent(10, true), extent(7, false)],
            8,
            20,
            vec![(10, 3)],
        ),
    ] {
        client.memory.holes = holes;
        let reply = ask(&mut client, flags, STATUS, 0, len);
        assert_eq!(reply.extents, expected);
    }
}

#[test]
fn block_status_that_comes_later_is_cut_too_and_can_fail() {
    let mut client = Client::connected("all", true);
    client.memory.later = true;
    client.memory.holes = [(9, true), (1 << 40, false)]
        .map(|(len, hole)| Extent {
            len,
            kind: Kind::of_hole(hole),
        })
        .to_vec();
    for (cookie, flags) in [(1, 0), (2, 8), (3, 0)] {
        client.request(flags, STATUS, cookie, 5, 20);
    }
    client.complete(1);
    client.complete(0);
    client.memory.fails = true;
    client.complete(0);
    let replies = client.replies(&BTreeMap::new());
    assert_eq!(replies[&1].extents, [(9, 3), (11, 0)]);
    assert_eq!(replies[&2].extents, [(9, 3)]);
    assert_eq!((replies[&3].error, replies[&3].extents.len()), (EIO, 0));
    assert_eq!(client.session.waiting(), (0, 0));
}

#[test]
fn a_disconnect_waits_for_what_is_under_way() {
    let mut client = Client::connected("all", false);
    client.memory.later = true;
    client.send(&[request(0, WRITE, 1, 0, 4), b"abcd".to_vec()].concat());
    client.request(0, DISC, 2, 0, 0);
    client.send(b"whatever comes then");
    assert_eq!(client.next, Next::Completion);
    client.complete_all();
    assert_eq!(client.next, Next::Close(None));
    assert_eq!(client.memory.bytes[..4], *b"abcd");
    assert_eq!(client.replies(&BTreeMap::new()).len(), 1);
}

#[test]
fn requests_that_wait_are_bounded() {
    let mut client = Client::connected("all", true);
    client.memory.later = true;
    for cookie in 0..600 {
        client.request(0, READ, cookie, cookie * 8, 8);
    }
    assert_eq!(client.next, Next::Completion);
    assert_eq!(client.session.waiting(), (256, 256 * 8));
    client.complete_all();
    let reads: BTreeMap<_, _> = (0..600).map(|cookie| (cookie, (cookie * 8, 8))).collect();
    assert_eq!(client.replies(&reads).len(), 600);
}

/// One request as proptest makes them up.
#[derive(Clone, Debug)]
struct Asked {
    flags: u16,
    command: u16,
    offset: u64,
    len: u32,
}

fn asked() -> impl Strategy<Value = Asked> {
    let end = 3 * SEGMENT;
    let offset = prop_oneof![0..end, Just(SEGMENT - 1), Just(end - 3), any::<u64>()];
    let len = prop_oneof![4 => 0..9000_u32, 2 => 60_000..70_000_u32, 1 => 0..2_000_000_u32];
    let flags = prop_oneof![6 => Just(0_u16), 3 => 0..32_u16];
    let command = prop_oneof![4 => 0..2_u16, 2 => 3..9_u16];
    (flags, command, offset, len).prop_map(|(flags, command, offset, len)| Asked {
        flags,
        command,
        offset,
        len,
    })
}

/// The error that a request should get, as a list of sentences.
fn expected(asked: &Asked, structured: bool) -> u32 {
    let valid = match asked.command {
        READ if structured => 1 | 4,
        ZEROES => 1 | 2 | 16,
        STATUS => 1 | 8,
        _ => 1,
    };
    let outside = asked
        .offset
        .checked_add(asked.len.into())
        .is_none_or(|end| end > 3 * SEGMENT);
    let known = matches!(asked.command, READ | WRITE | TRIM | CACHE | ZEROES);
    let status = asked.command == STATUS && structured && asked.len > 0;
    let flush = asked.command == FLUSH && asked.offset == 0 && asked.len == 0;
    if asked.flags & !valid != 0 || !(known || status || flush) {
        EINVAL
    } else if outside && matches!(asked.command, WRITE | ZEROES) {
        ENOSPC
    } else if outside {
        EINVAL
    } else {
        0
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes in whatever pieces: one reply each, with the memory's bytes.
    #[test]
    fn requests_get_what_a_plain_memory_gives(
        all in proptest::collection::vec(asked(), 1..12),
        structured: bool,
        later: bool,
        grain in prop_oneof![Just(usize::MAX), 1000..100_000_usize],
        pick: usize,
    ) {
        let mut client = Client::connected("all", structured);
        client.memory.later = later;
        client.grain = grain;
        let mut model = client.memory.bytes.clone();
        for (cookie, asked) in all.iter().enumerate() {
            let Asked { flags, command, offset, len } = *asked;
            client.request(flags, command, cookie as u64, offset, len);
            if command == WRITE {
                client.send(&vec![cookie as u8; len as usize]);
            }
            while !client.memory.kept.is_empty() {
                let index = pick % client.memory.kept.len();
                client.complete(index);
            }
            let error = expected(asked, structured);
            let reads = match (command, error) {
                (READ, 0) => BTreeMap::from([(cookie as u64, (offset, len))]),
                _ => BTreeMap::new(),
            };
            let replies = client.replies(&reads);
            prop_assert_eq!(replies.len(), 1);
            let reply = &replies[&(cookie as u64)];
            prop_assert!(reply.done);
            prop_assert_eq!(reply.error, error, "{:?}", asked);
            if error == 0 {
                let range = offset as usize..(offset + u64::from(len)) as usize;
                match command {
                    READ => prop_assert!(reply.data == model[range]),
                    WRITE => model[range].fill(cookie as u8),
                    TRIM | ZEROES => model[range].fill(0),
                    _ => {}
                }
            }
            prop_assert!(model == client.memory.bytes);
        }
    }

    /// Many at once, answered in any order: each gets one reply.
    #[test]
    fn requests_at_once_get_one_reply_each(
        all in proptest::collection::vec(asked(), 1..40),
        structured: bool,
        busy: bool,
        pick: usize,
    ) {
        let mut client = Client::connected("all", structured);
        client.memory.later = true;
        client.memory.busy = busy;
        let mut sent = Vec::new();
        let mut reads = BTreeMap::new();
        for (cookie, asked) in all.iter().enumerate() {
            let Asked { flags, command, offset, len } = *asked;
            sent.extend(request(flags, command, cookie as u64, offset, len));
            if command == WRITE {
                sent.extend(vec![0; len as usize]);
            }
            if command == READ && expected(asked, structured) == 0 {
                reads.insert(cookie as u64, (offset, len));
            }
        }
        client.send(&sent);
        while !client.memory.kept.is_empty() {
            let index = pick % client.memory.kept.len();
            client.complete(index);
        }
        let replies = client.replies(&reads);
        prop_assert_eq!(replies.len(), all.len());
        for (cookie, asked) in all.iter().enumerate() {
            let reply = &replies[&(cookie as u64)];
            prop_assert!(reply.done);
            prop_assert_eq!(reply.error, expected(asked, structured), "{:?}", asked);
        }
        prop_assert_eq!(client.session.waiting(), (0, 0));
    }
}
