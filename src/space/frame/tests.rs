//! Frames as they are encoded and read back, and bytes that are none.

use proptest::prelude::*;

use super::*;

fn hello() -> Hello {
    Hello {
        versions: (1, 3),
        map: [7; 16],
        server: 2,
        flags: WANTS_MAPPING,
        client: 1 << 100,
        incarnation: Incarnation(9),
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: VERSION,
        refusal: Refusal::Map,
        map: [8; 16],
        server: 1,
        flags: HAS_REPLICA,
        incarnation: Incarnation(u128::MAX),
        segment_size: 1 << 30,
        epoch: 4,
        max_in_flight: 1024,
    }
}

fn request(operation: Operation, len: u32) -> Request {
    Request {
        id: 77,
        epoch: 5,
        operation,
        offset: u64::MAX,
        len,
    }
}

fn body_of(operation: Operation, len: u32) -> Vec<u8> {
    let bytes = request(operation, len).body_len().unwrap_or(0);
    vec![3; bytes as usize]
}

/// All that differ from `bytes` in one bit are refused.
fn every_bit_counts<const N: usize>(bytes: [u8; N], decodes: impl Fn(&[u8; N]) -> bool) {
    assert!(decodes(&bytes));
    for bit in 0..8 * N {
        let mut other = bytes;
        other[bit / 8] ^= 1 << (bit % 8);
        assert!(!decodes(&other), "bit {bit}");
    }
}

#[test]
fn greetings_come_back_as_they_were() {
    assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
    assert_eq!(Welcome::decode(&welcome().encode()), Ok(welcome()));
    every_bit_counts(hello().encode(), |bytes| Hello::decode(bytes).is_ok());
    every_bit_counts(welcome().encode(), |bytes| Welcome::decode(bytes).is_ok());
    let http = Hello::decode(&[b'G'; HELLO_BYTES]);
    assert!(matches!(http, Err(FrameError::Magic { .. })));
}

#[test]
fn requests_and_replies_come_back_as_they_were() {
    for operation in Operation::ALL.iter().copied() {
        let body = body_of(operation, 40);
        let request = request(operation, 40);
        let bytes = request.encode(&body);
        let header = RequestHeader::decode(&bytes).expect("whole");
        assert_eq!(header.request, request);
        assert_eq!(header.body_len as usize, body.len());
        header.check_body(&body).expect("whole");
        every_bit_counts(bytes, |bytes| RequestHeader::decode(bytes).is_ok());
    }
    for status in Status::ALL.iter().copied() {
        let reply = Reply {
            id: 5,
            epoch: 6,
            operation: Operation::Read,
            status,
            flags: EXCHANGED,
            value: 1 << 63,
        };
        let bytes = reply.encode(b"bytes");
        let header = ReplyHeader::decode(&bytes).expect("whole");
        assert_eq!((header.reply, header.body_len), (reply, 5));
        header.check_body(b"bytes").expect("whole");
        assert!(header.check_body(b"bytex").is_err());
        every_bit_counts(bytes, |bytes| ReplyHeader::decode(bytes).is_ok());
    }
}

/// What a later version may put there is not passed over by this one.
#[test]
fn reserved_bytes_are_zero() {
    for at in 33..40 {
        let mut bytes = request(Operation::Read, 8).encode(b"");
        bytes[at] = 1;
        seal(&mut bytes);
        let refused = RequestHeader::decode(&bytes);
        assert!(matches!(refused, Err(FrameError::Reserved { .. })), "{at}");
    }
    let mut item = Vec::new();
    Item {
        operation: Operation::Read,
        offset: 0,
        len: 8,
        body: b"",
    }
    .append_to(&mut item);
    item[17] = 1;
    let refused = items(1, &item).expect("one").next();
    assert!(matches!(refused, Some(Err(FrameError::Reserved { .. }))));
}

#[test]
fn bodies_fit_their_operations() {
    for (operation, len, body) in [
        (Operation::Read, 8, 1),
        (Operation::Write, 8, 7),
        (Operation::Fill, 8, 8),
        (Operation::CompareExchange, 8, 8),
        (Operation::FetchAdd, 8, 16),
        (Operation::Ping, 0, 1),
        (Operation::Holes, 8, 8),
    ] {
        let bytes = request(operation, len).encode(&vec![0; body]);
        let refused = RequestHeader::decode(&bytes);
        assert!(
            matches!(refused, Err(FrameError::Body { .. })),
            "{operation:?}"
        );
    }
}

#[test]
fn a_stated_length_is_not_believed() {
    let mut bytes = request(Operation::Batch, 1).encode(&[]);
    for claimed in [MAX_REQUEST_BODY as u32 + 1, u32::MAX] {
        bytes[28..32].copy_from_slice(&claimed.to_le_bytes());
        seal(&mut bytes);
        let refused = RequestHeader::decode(&bytes);
        assert!(matches!(refused, Err(FrameError::TooLong { .. })));
    }
}

proptest! {
    #[test]
    fn batches_come_back_as_they_were(
        parts in prop::collection::vec((0u64.., 0usize..40, 0u8..4), 1..=64)
    ) {
        let mut body = Vec::new();
        let mut results = Vec::new();
        let mut expected = Vec::new();
        for (offset, len, kind) in &parts {
            let operation = Operation::ALL[usize::from(*kind)];
            let bytes = body_of(operation, *len as u32);
            expected.push((operation, *offset, *len as u32, bytes.clone()));
            let (operation, offset, len) = (operation, *offset, *len as u32);
            Item { operation, offset, len, body: &bytes }.append_to(&mut body);
            ItemResult { value: offset, flags: 1, body: &bytes }.append_to(&mut results);
        }
        let count = parts.len() as u32;
        for (index, item) in items(count, &body).expect("few").enumerate() {
            let item = item.expect("whole");
            let found = (item.operation, item.offset, item.len, item.body.to_vec());
            prop_assert_eq!(&found, &expected[index]);
        }
        for (index, found) in item_results(count, &results).expect("few").enumerate() {
            prop_assert_eq!(found.expect("whole").body, &expected[index].3[..]);
        }
        // Cut short, or with something behind it, it is none.
        let short = items(count, &body[..body.len() - 1]).expect("few").last();
        prop_assert!(short.expect("one").is_err());
        body.push(0);
        let long = items(count, &body).expect("few").last();
        prop_assert!(long.expect("one").is_err());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), count in 0u32..70) {
        if let Ok(found) = items(count, &bytes) {
            found.for_each(drop);
        }
        if let Ok(found) = item_results(count, &bytes) {
            found.for_each(drop);
        }
    }
}
