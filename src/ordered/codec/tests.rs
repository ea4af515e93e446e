//! Frames of all kinds there and back, damaged, and made up.

use proptest::prelude::*;

use super::*;

fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

fn read_back(bytes: &[u8]) -> Result<Frame, FrameError> {
    let (head, body) = bytes
        .split_first_chunk()
        .expect("tests give whole headers at least");
    Frame::decode(&FrameHeader::parse(head)?, body)
}

fn ids() -> impl Strategy<Value = OperationId> {
    (any::<u32>(), 1..u64::MAX, 1..u64::MAX).prop_map(|(initiator, incarnation, number)| {
        OperationId {
            initiator: ProcessId(initiator),
            incarnation: Incarnation(incarnation),
            number,
        }
    })
}

fn operations() -> impl Strategy<Value = Operation> {
    let integers = any::<i64>().prop_map(Value::Integer);
    let bytes = prop::collection::vec(any::<u8>(), 0..40).prop_map(|v| Value::bytes(&v));
    let (write_integer, write_bytes) = (integers.clone(), bytes.clone());
    prop_oneof![
        Just(Operation::Read),
        write_integer.prop_map(Operation::Write),
        write_bytes.prop_map(Operation::Write),
        (integers.clone(), integers)
            .prop_map(|(expected, new)| Operation::CompareAndSwap { expected, new }),
        (bytes.clone(), bytes)
            .prop_map(|(expected, new)| Operation::CompareAndSwap { expected, new }),
    ]
}

fn messages() -> impl Strategy<Value = Message> {
    let whole = (ids(), any::<u32>(), operations(), any::<u64>());
    prop_oneof![
        (whole, 0..3).prop_map(|((id, variable, operation, time), which)| {
            let variable = VariableId(variable);
            match which {
                0 => Message::Request {
                    id,
                    variable,
                    operation,
                    time,
                },
                1 => Message::Submit {
                    id,
                    variable,
                    operation,
                },
                _ => Message::Ordered {
                    key: OrderKey { time, id },
                    variable,
                    operation,
                },
            }
        }),
        (ids(), any::<u64>(), any::<bool>(), 0..3).prop_map(|(id, time, acknowledge, which)| {
            match which {
                0 => Message::Proposal { id, time },
                1 => Message::Commit {
                    id,
                    time,
                    acknowledge,
                },
                _ => Message::Committed { id },
            }
        }),
        any::<u64>().prop_map(|count| Message::Delivered { count }),
    ]
}

fn hellos() -> impl Strategy<Value = Hello> {
    let who = (any::<u32>(), any::<u32>(), 1..u64::MAX, any::<u64>());
    let rest = (any::<bool>(), any::<u64>(), any::<u64>());
    (who, rest, any::<[u8; 16]>(), any::<[u8; 16]>()).prop_map(
        |(who, rest, configuration, start)| Hello {
            process: ProcessId(who.0),
            to: ProcessId(who.1),
            incarnation: Incarnation(who.2),
            session: who.3,
            ready: rest.0,
            known: Some(Incarnation(rest.1)).filter(|known| known.0 != 0),
            received: rest.2,
            configuration,
            start,
        },
    )
}

fn frames() -> impl Strategy<Value = Frame> {
    prop_oneof![
        4 => (any::<u64>(), messages())
            .prop_map(|(sequence, message)| Frame::Message { sequence, message }),
        1 => hellos().prop_map(Frame::Hello),
        1 => any::<u64>().prop_map(|sequence| Frame::Received { sequence }),
        1 => (any::<u32>(), any::<bool>()).prop_map(|(process, lost)| {
            let process = ProcessId(process);
            Frame::Stopped {
                reason: if lost {
                    StopReason::LostMemory { process }
                } else {
                    StopReason::ClockExhausted { process }
                },
            }
        }),
        1 => Just(Frame::Ready),
    ]
}

/// Puts right checksums on a frame that was tampered with.
fn seal(bytes: &mut [u8]) {
    let (head, body) = bytes.split_at_mut(FRAME_HEADER_BYTES);
    head[12..16].copy_from_slice(&crc32c(body).to_le_bytes());
    let crc = crc32c(&head[..28]);
    head[28..].copy_from_slice(&crc.to_le_bytes());
}

proptest! {
    #[test]
    fn every_frame_comes_back_as_it_was(frame in frames()) {
        prop_assert_eq!(read_back(&bytes_of(&frame)), Ok(frame));
    }

    #[test]
    fn a_flipped_bit_is_noticed(frame in frames(), at in any::<prop::sample::Index>(), bit in 0..8) {
        let mut bytes = bytes_of(&frame);
        let at = at.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        prop_assert!(read_back(&bytes).is_err());
    }

    /// With right checksums a changed byte gives another frame or an error; what is
    /// accepted is written the same way again: there is one form of each frame.
    #[test]
    fn a_hostile_byte_gives_a_frame_or_an_error(
        frame in frames(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut bytes = bytes_of(&frame);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        seal(&mut bytes);
        if let Ok(frame) = read_back(&bytes) {
            prop_assert_eq!(bytes_of(&frame), bytes);
        }
    }

    #[test]
    fn a_hostile_body_gives_a_frame_or_an_error(
        frame in frames(),
        body in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        let mut bytes = bytes_of(&frame);
        bytes.truncate(FRAME_HEADER_BYTES);
        bytes.extend(&body);
        bytes[8..12].copy_from_slice(&(body.len() as u32).to_le_bytes());
        seal(&mut bytes);
        if let Ok(frame) = read_back(&bytes) {
            prop_assert_eq!(bytes_of(&frame), bytes);
        }
    }
}

#[test]
fn lengths_beyond_the_limit_are_refused_by_the_header() {
    let id = OperationId {
        initiator: ProcessId(1),
        incarnation: Incarnation(2),
        number: 3,
    };
    let request = |len: u64| Frame::Message {
        sequence: 1,
        message: Message::Submit {
            id,
            variable: VariableId(4),
            operation: Operation::CompareAndSwap {
                expected: Value::bytes(&vec![5; len as usize]),
                new: Value::bytes(&vec![6; len as usize]),
            },
        },
    };
    let longest = request(MAX_VARIABLE_BYTES);
    assert_eq!(read_back(&bytes_of(&longest)), Ok(longest));
    let beyond = bytes_of(&request(MAX_VARIABLE_BYTES + 1));
    let head = beyond.first_chunk().expect("a header");
    let kind = KIND_SUBMIT;
    let len = MAX_BODY + 2;
    assert_eq!(
        FrameHeader::parse(head),
        Err(FrameError::Length { kind, len })
    );
    // One value longer than allowed, within the length of the frame.
    let mut uneven = bytes_of(&request(MAX_VARIABLE_BYTES));
    let (first, second) = (MAX_VARIABLE_BYTES as u32 + 1, MAX_VARIABLE_BYTES as u32 - 1);
    uneven[FRAME_HEADER_BYTES + 40..][..4].copy_from_slice(&first.to_le_bytes());
    uneven[FRAME_HEADER_BYTES + 44..][..4].copy_from_slice(&second.to_le_bytes());
    seal(&mut uneven);
    let field = FrameError::Field {
        kind,
        field: "length",
    };
    assert_eq!(read_back(&uneven), Err(field));
}

#[test]
fn the_layout_is_the_one_of_the_manual() {
    let commit = Frame::Message {
        sequence: 0x0102_0304_0506_0708,
        message: Message::Commit {
            id: OperationId {
                initiator: ProcessId(0x11),
                incarnation: Incarnation(0x2222),
                number: 0x3333,
            },
            time: 0x4444,
            acknowledge: true,
        },
    };
    let bytes = bytes_of(&commit);
    let mut golden = b"UVAR\x01\x12\x01\x00\x20\x00\x00\x00".to_vec();
    golden.extend(crc32c(&bytes[32..]).to_le_bytes());
    golden.extend([8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0]);
    golden.extend(crc32c(&golden).to_le_bytes());
    golden.extend([0x11, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend([0x22, 0x22, 0, 0, 0, 0, 0, 0]);
    golden.extend([0x33, 0x33, 0, 0, 0, 0, 0, 0]);
    golden.extend([0x44, 0x44, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes, golden);
}

#[test]
fn something_else_is_told_apart() {
    let mut bytes = bytes_of(&Frame::Ready);
    let other = *b"GET / HTTP/1.1\r\nHost: localhost\r\n";
    let found = u32::from_le_bytes(*b"GET ");
    let magic = Err(FrameError::Magic { found });
    assert_eq!(
        FrameHeader::parse(other.first_chunk().expect("long enough")),
        magic
    );
    bytes[4] = 2;
    seal(&mut bytes);
    assert_eq!(read_back(&bytes), Err(FrameError::Version { found: 2 }));
    bytes[4] = 1;
    bytes[5] = 99;
    seal(&mut bytes);
    assert_eq!(read_back(&bytes), Err(FrameError::Kind { found: 99 }));
}
