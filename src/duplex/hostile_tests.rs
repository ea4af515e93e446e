//! A peer that stores anything anywhere.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::layout::{control, line, slot};
use super::tests::{opened, sides};
use super::*;
use crate::sys::memfd::{self, Seals};

/// The bytes of a channel's memory, and a new memfd of them, sealed as told.
fn copy_of(segment: &Segment) -> Vec<u8> {
    let total = segment.geometry().total;
    let mut bytes = vec![0; total as usize];
    segment.control().read(0, &mut bytes).expect("read");
    bytes
}

fn memory_of(bytes: &[u8], seals: Seals) -> OwnedFd {
    let fd = memfd::create("hostile", bytes.len() as u64).expect("memfd");
    memfd::write_at(&fd, bytes, 0).expect("write");
    memfd::add_seals(&fd, seals).expect("seal");
    fd
}

const SEALED: Seals = Seals::SHRINK.union(Seals::GROW);

fn open(bytes: &[u8]) -> Result<Segment, DuplexError> {
    Segment::open(vec![memory_of(bytes, SEALED)], OpenLimits::default())
}

fn small() -> Segment {
    Segment::create(&BufferConfig::new(64, 4096).slots(8)).expect("segment")
}

#[test]
fn every_word_of_the_identity_is_checked() {
    let segment = small();
    let bytes = copy_of(&segment);
    assert_eq!(
        open(&bytes).expect("unchanged").channel_id(),
        segment.channel_id()
    );
    let identity = segment.geometry().control as usize;
    let fields = [
        (0, 8),
        (8, 8),
        (identity + control::ID_MAGIC as usize, 8),
        (identity + control::ID_LAYOUT as usize, 4),
        (identity + control::ID_FEATURES as usize, 4),
        (identity + control::ID_SLOTS as usize, 4),
        (identity + control::ID_RESERVED as usize, 4),
        (identity + control::ID_METADATA_SIZE as usize, 8),
        (identity + control::ID_PAYLOAD_OFFSET as usize, 8),
        (identity + control::ID_PAYLOAD_SIZE as usize, 8),
        (identity + 0x48, 8),
        (identity + 0x78, 8),
    ];
    for (at, len) in fields {
        for value in [
            0u64,
            1,
            3,
            16,
            64,
            4096,
            1 << 31,
            u64::MAX,
            u64::MAX - 63,
            1 << 40,
        ] {
            let mut changed = bytes.clone();
            changed[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            if changed == bytes {
                continue;
            }
            match open(&changed) {
                Err(DuplexError::Bad(_) | DuplexError::OutOfRange(_)) => {}
                // Another size of tables that fits the same memory is a channel too, and
                // one without batches.
                Ok(other) => {
                    let sizes = [
                        control::ID_SLOTS,
                        control::ID_PAYLOAD_SIZE,
                        control::ID_FEATURES,
                    ];
                    assert!(sizes.contains(&((at - identity) as u64)), "{at} {value}");
                    assert_eq!(other.geometry().total, bytes.len() as u64);
                }
                Err(other) => panic!("{at} {value}: {other:?}"),
            }
        }
    }
}

#[test]
fn memory_of_another_kind_is_refused() {
    let segment = small();
    let bytes = copy_of(&segment);
    let limits = OpenLimits::default();
    let bad = |fds: Vec<OwnedFd>, limits| match Segment::open(fds, limits) {
        Err(DuplexError::Bad(bad)) => bad,
        other => panic!("{other:?}"),
    };
    for seals in [Seals::empty(), Seals::SHRINK, Seals::GROW] {
        assert!(matches!(
            bad(vec![memory_of(&bytes, seals)], limits),
            BadSegment::Unsealed
        ));
    }
    let (socket, _other) = crate::sys::net::unix_pair().expect("pair");
    assert!(matches!(bad(vec![socket], limits), BadSegment::Unsealed));
    assert!(matches!(
        bad(vec![], limits),
        BadSegment::Descriptors { found: 0, .. }
    ));
    let twice = || vec![memory_of(&bytes, SEALED), memory_of(&bytes, SEALED)];
    assert!(matches!(
        bad(twice(), limits),
        BadSegment::Descriptors { found: 2, .. }
    ));
    let mut longer = bytes.clone();
    longer.extend([0; 4096]);
    assert!(matches!(
        bad(vec![memory_of(&longer, SEALED)], limits),
        BadSegment::Length { .. }
    ));
    assert!(matches!(
        bad(vec![memory_of(&bytes[..4096], SEALED)], limits),
        BadSegment::Length { .. }
    ));
    let max_bytes = bytes.len() as u64 - 1;
    let one = vec![memory_of(&bytes, SEALED)];
    assert!(matches!(
        bad(
            one,
            OpenLimits {
                max_bytes,
                ..limits
            }
        ),
        BadSegment::TooLong { .. }
    ));
    // Sealed against writing it cannot be a channel either.
    let fd = memory_of(&bytes, SEALED | Seals::FUTURE_WRITE);
    assert!(matches!(
        Segment::open(vec![fd], limits),
        Err(DuplexError::Sys { .. })
    ));
}

#[test]
fn a_view_shares_existing_memory_and_allocates_none() {
    let fd = memfd::create("view", 64 << 10).expect("memfd");
    assert!(matches!(
        SharedMemoryView::new(&fd, 0, 4096),
        Err(DuplexError::Bad(BadSegment::Unsealed))
    ));
    memfd::add_seals(&fd, SEALED).expect("seal");
    assert!(SharedMemoryView::new(&fd, 64, 4096).is_err());
    assert!(SharedMemoryView::new(&fd, 4096, 64 << 10).is_err());
    let mut view = SharedMemoryView::new(&fd, 4096, 8192).expect("view");
    assert!(matches!(
        view.allocate(5),
        Err(DuplexError::ViewAllocates { len: 5 })
    ));
    assert!(view.map(8192, 1).is_err() && view.map(32, 1).is_err());
    let window = view.map(64, 100).expect("map");
    view.unmap();
    assert!(matches!(view.map(0, 1), Err(DuplexError::NotAllocated)));
    window.write(0, b"still mapped").expect("write");
    let view = SharedMemoryView::new(&fd, 4096, 8192).expect("view");
    let segment = Segment::create(&BufferConfig::with_view(0, view)).expect("segment");
    let other = opened(&segment);
    let mut client = ClientCore::new(&segment);
    client
        .submit(&[7; 500], Options::default())
        .expect("submit");
    client.kick();
    let server = ServerCore::new(&other, 1);
    let mut posts = Posts::new();
    let claim = server.claim(&mut posts).expect("request");
    let bytes = server.bytes(&claim, 500);
    assert_eq!(bytes.to_vec(), [7; 500]);
    let at = 4096 + bytes.payload_offset().expect("not inline");
    bytes.write(0, b"changed").expect("write");
    let mut seen = [0; 7];
    memfd::read_at(&fd, &mut seen, at).expect("pread");
    assert_eq!(&seen, b"changed");
    server.respond(claim, 500, &mut posts);
    let mut unallocated = SharedMemory::new();
    assert!(matches!(
        unallocated.map(0, 1),
        Err(DuplexError::NotAllocated)
    ));
    unallocated.allocate(100).expect("allocate");
    assert_eq!(unallocated.map(0, 4096).expect("map").len(), 4096);
}

#[test]
fn impossible_numbers_for_a_new_channel_are_refused() {
    for slots in [0, 1, 4, 7, 9, 2048] {
        let config = BufferConfig::new(0, 64).slots(slots);
        assert!(matches!(
            Segment::create(&config),
            Err(DuplexError::Bad(BadSegment::Slots { .. }))
        ));
    }
    for (metadata, payload) in [(u64::MAX, 0), (2 << 20, 0), (0, u64::MAX), (0, 3 << 30)] {
        let config = BufferConfig::new(metadata, payload);
        assert!(matches!(Segment::create(&config), Err(DuplexError::Bad(_))));
    }
}

#[test]
fn metadata_is_bounded_and_written_once() {
    let segment = small();
    let other = opened(&segment);
    assert!(matches!(
        segment.set_metadata(Side::Client, &[1; 57]),
        Err(DuplexError::MetadataTooLong {
            len: 57,
            capacity: 56
        })
    ));
    segment.set_metadata(Side::Client, &[1; 56]).expect("set");
    assert!(matches!(
        other.set_metadata(Side::Client, b"x"),
        Err(DuplexError::MetadataTwice)
    ));
    assert_eq!(other.metadata(Side::Client).expect("metadata"), [1; 56]);
    assert_eq!(other.oieb(Side::Client).metadata_free_bytes, 0);
    assert_eq!(other.metadata(Side::Server).expect("metadata"), [0u8; 0]);
    segment.control().store(0xB0 + 64, &57u64).expect("store");
    assert!(matches!(
        other.metadata(Side::Server),
        Err(DuplexError::MetadataCorrupted {
            len: 57,
            capacity: 56
        })
    ));
    let none = Segment::create(&BufferConfig::new(0, 0)).expect("segment");
    assert!(none.set_metadata(Side::Server, b"x").is_err());
    assert_eq!(none.metadata(Side::Server).expect("metadata"), [0u8; 0]);
}

/// A value that hits edges often.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..=u64::from(u8::MAX),
        any::<u32>().prop_map(|low| u64::from(low) << 32 | 80),
        Just(u64::MAX),
        Just((80 << 32) | 80),
        Just(u64::MAX - 63),
    ]
}

proptest! {
    #[test]
    fn a_server_survives_any_slot(
        words in prop::collection::vec(word(), 5),
        len in any::<usize>(),
        fail in any::<bool>(),
    ) {
        let (_client, server) = sides(4096);
        let segment = server.segment();
        let index = 1;
        for (at, word) in words.iter().enumerate().skip(1) {
            segment.slots().line(index).0[at].store(*word, Ordering::Relaxed);
        }
        state::hand_over(&segment.slots().line(index).0[0], 1, State::Request);
        let mut posts = Posts::new();
        let claim = server.claim(&mut posts).expect("a request, whatever it is");
        prop_assert!(claim.len() <= claim.capacity());
        prop_assert!(claim.capacity() <= 4096);
        server.begin_handler(&claim);
        let bytes = server.bytes(&claim, claim.capacity());
        prop_assert_eq!(bytes.len(), claim.capacity());
        bytes.update_chunks(|_, chunk| chunk.fill(9));
        prop_assert!(bytes.to_vec().iter().all(|byte| *byte == 9));
        if fail {
            server.fail(claim, ErrorCode(7), &"é".repeat(200), &mut posts);
        } else {
            server.respond(claim, len, &mut posts);
        }
        server.post(&mut posts);
        prop_assert!(server.claim(&mut posts).is_none());
    }

    #[test]
    fn a_client_survives_any_answer(
        header in prop::collection::vec(word(), 5),
        ring in prop::collection::vec(word(), 16),
        own_sequence in any::<bool>(),
        state in 0u64..12,
    ) {
        let (mut client, _server) = sides(4096);
        let segment = client.segment().clone();
        let sequences: Vec<_> = [10, 600, 10]
            .map(|len| client.submit(&vec![1; len], Options::default()).expect("submit"))
            .into();
        for (at, word) in ring.iter().enumerate() {
            segment.ring().word(at).store(*word, Ordering::Relaxed);
        }
        let slot_line = segment.slots().line(2);
        for (at, word) in header.iter().enumerate() {
            slot_line.0[at].store(*word, Ordering::Relaxed);
        }
        if own_sequence {
            slot_line.0[slot::STATE].store(2 << 8 | state, Ordering::Relaxed);
        }
        for _ in 0..10 {
            if let Some(sequence) = client.poll_any(true) {
                prop_assert!(sequences.contains(&sequence));
                prop_assert!(client.response(sequence).is_some_and(|bytes| bytes.len() <= 640));
                prop_assert!(client.error_text(sequence).len() <= 3 * 256);
                prop_assert!(client.release(sequence));
            }
        }
        for sequence in [2, 0, 4, u64::MAX, 2 + 8] {
            let _ = client.poll(sequence);
            let _ = client.cancel(sequence);
        }
        let _ = client.server_died();
        prop_assert_eq!(client.in_flight(), 0);
        let sent = client.submit(&[1; 100], Options::default());
        prop_assert!(matches!(sent, Err(AcquireError::NoServer | AcquireError::Broken)));
    }

    #[test]
    fn a_client_with_one_request_survives_any_answer(
        header in prop::collection::vec(word(), 5),
        own_sequence in any::<bool>(),
        state in 0u64..12,
    ) {
        let (mut client, server) = sides(4096);
        let segment = client.segment().clone();
        client.submit(b"first", Options::default()).expect("submit");
        client.kick();
        let mut posts = Posts::new();
        let claim = server.claim(&mut posts).expect("request");
        server.respond(claim, 5, &mut posts);
        prop_assert_eq!(client.poll_any(true), Some(1));
        prop_assert!(client.release(1));
        let sequence = client.send_alone(&[1; 60]).expect("nothing else is under way");
        let slot_line = segment.slots().line(0);
        for (at, word) in header.iter().enumerate() {
            slot_line.0[at].store(*word, Ordering::Relaxed);
        }
        if own_sequence {
            slot_line.0[slot::STATE].store(sequence << 8 | state, Ordering::Relaxed);
        }
        if let Some(place) = client.take_alone(sequence, 3) {
            prop_assert_eq!(place.len(), 60, "its own length or none");
        }
        if client.poll(sequence) != Poll::Pending {
            prop_assert!(client.response(sequence).is_some_and(|bytes| bytes.len() <= INLINE_BYTES));
            prop_assert!(client.release(sequence));
        }
        let _ = client.server_died();
        prop_assert_eq!(client.in_flight(), 0);
    }

    #[test]
    fn counters_and_semaphores_may_hold_anything(words in prop::collection::vec(any::<u64>(), 40)) {
        let (mut client, server) = sides(4096);
        let segment = client.segment().clone();
        for (at, word) in words.iter().enumerate() {
            let index = [
                line::REQUEST_READY,
                line::RESPONSE_READY,
                line::RESPONSE_CONSUMED,
                line::SPACE_AVAILABLE,
                line::SERVER_COUNTERS,
            ][at % 5];
            segment.lines().line(index).0[at / 5].store(*word, Ordering::Relaxed);
        }
        client.submit(b"x", Options::default()).expect("submit");
        client.kick();
        let mut posts = Posts::new();
        let claim = server.claim(&mut posts).expect("request");
        server.respond(claim, 1, &mut posts);
        server.post(&mut posts);
        prop_assert_eq!(client.poll_any(true), Some(1));
        prop_assert!(client.release(1));
        let _ = (segment.status().expect("status"), server.unread(), segment.oieb(Side::Server));
        let _ = client.server_died();
        let taken = ServerCore::take_over(&segment, 2);
        prop_assert!(!taken.has_request());
    }
}

#[test]
fn a_generation_goes_round_and_is_never_0() {
    let segment = small();
    let at = segment.geometry().control + control::ID_GENERATION;
    let word = segment.control().atomic_u64(at);
    for (found, next) in [(1, 2), (u64::MAX - 1, u64::MAX), (u64::MAX, 1), (0, 1)] {
        word.store(found, Ordering::Relaxed);
        assert_eq!(segment.raise_generation(), next);
        assert_eq!(segment.generation(), next);
    }
}
