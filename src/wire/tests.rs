//! Golden bytes, round trips, and what is refused.

use proptest::prelude::*;

use super::*;
use crate::limits::{MAX_BODY, MAX_CHUNK, MAX_EXTENTS_PER_FRAME};
use crate::words::{EpochKind, Generation};

const REGION: u64 = 1 << 20;

fn header_of(frame: &[u8]) -> Header {
    parse_header(frame[..HEADER_BYTES].try_into().unwrap()).unwrap()
}

/// Parses a frame the way a connection does.
fn parse(frame: &[u8]) -> Result<(Header, Vec<u8>), WireError> {
    let (head, body) = frame.split_at(HEADER_BYTES);
    let header = parse_header(head.try_into().unwrap())?;
    check_body(&header, body)?;
    Ok((header, body.to_vec()))
}

fn single(base: Base, extents: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let epoch = 41;
    let flags = update_flags(EpochKind::Cut, base);
    let mut frame = FrameBuilder::new(Kind::SingleUpdate, flags, 7, epoch);
    let prefix = UpdatePrefix {
        base,
        source_time_ns: 1_000_000_007,
    };
    frame.put(&prefix.to_bytes(epoch));
    for (offset, bytes) in extents {
        frame.extent(*offset, bytes);
    }
    frame.finish()
}

fn hello() -> Hello {
    Hello {
        min_version: VERSION,
        max_version: VERSION,
        max_body: MAX_BODY as u32,
        node: *b"0123456789abcdef",
        incarnation: 3,
        name: "left".into(),
    }
}

fn subscribe() -> Subscribe {
    Subscribe {
        name: "orders".parse().unwrap(),
        subscription: 9,
        generation: Generation(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
        have_epoch: Some(40),
        fresh: false,
    }
}

fn info() -> RegionInfo {
    RegionInfo {
        handle: 7,
        subscription: 9,
        round: 2,
        generation: subscribe().generation,
        size: REGION,
        max_size: 4 * REGION,
        epoch: 41,
        plan: SyncPlan::Resume,
    }
}

fn digests() -> DigestFrame {
    DigestFrame {
        round: 2,
        first_chunk: 4,
        digests: vec![[0xAA; 16], [0x55; 16]],
    }
}

/// One frame of each kind, as it lies in `tests/data/`.
fn golden() -> Vec<(&'static str, Vec<u8>)> {
    let resync = Resync {
        round: 2,
        have_epoch: Some(40),
        reason: ResyncReason::Gap,
    };
    let error = ErrorFrame {
        code: ErrorCode::UnknownRegion,
        subscription: 9,
        text: "no region orders".into(),
    };
    let start = StartUpdate {
        prefix: UpdatePrefix {
            base: Base::Nothing,
            source_time_ns: 5,
        },
        total_bytes: 300_000,
        coming: false,
    };
    let end = EndUpdate {
        chunks: 2,
        total_bytes: 300_000,
        kind: EpochKind::Convergent,
    };
    let mut chunk = FrameBuilder::new(Kind::UpdateChunk, 0, 7, 41);
    chunk.extent(0, b"first");
    chunk.extent(4096, b"second");
    vec![
        ("hello", hello().encode(Kind::Hello)),
        ("welcome", hello().encode(Kind::Welcome)),
        ("subscribe", subscribe().encode()),
        ("region_info", info().encode()),
        (
            "ack",
            Ack {
                round: 2,
                epoch: 41,
            }
            .encode(7),
        ),
        ("ping", Ping { number: 77 }.encode(Kind::Ping)),
        ("pong", Ping { number: 77 }.encode(Kind::Pong)),
        ("digest", digests().encode(7)),
        ("resync", resync.encode(7)),
        ("error", error.encode()),
        ("unsubscribe", Unsubscribe { subscription: 9 }.encode()),
        (
            "single_update",
            single(Base::Epoch(40), &[(0x1000, vec![1, 2, 3, 4])]),
        ),
        ("start_update", start.encode(7, 41, EpochKind::Convergent)),
        ("update_chunk", chunk.finish()),
        ("end_update", end.encode(7, 41)),
    ]
}

/// With `UFFD_SYNC_WRITE_GOLDEN=1` the files are written instead of compared.
#[test]
fn golden_bytes_have_not_changed() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let frames = golden();
    assert_eq!(frames.len(), Kind::ALL.len(), "one of each kind");
    for (name, bytes) in frames {
        let path = folder.join(format!("{name}.bin"));
        if std::env::var_os("UFFD_SYNC_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        let stored = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(stored, bytes, "{name}");
        parse(&stored).unwrap();
    }
}

/// The bytes drawn in the manual are those of the golden file.
#[test]
fn the_manual_shows_the_golden_bytes() {
    let manual = include_str!("../manual/wire_format.md");
    let (_, example) = manual.split_once("## An example").unwrap();
    let drawn = example.split("```").nth(1).unwrap();
    let bytes: Vec<u8> = drawn
        .lines()
        .skip(1)
        // Behind the offset, before the words.
        .flat_map(|line| line[4..line.len().min(53)].split_whitespace())
        .filter(|word| word.len() == 2)
        .filter_map(|word| u8::from_str_radix(word, 16).ok())
        .collect();
    let (_, frame) = golden()
        .into_iter()
        .find(|(name, _)| *name == "single_update")
        .unwrap();
    assert_eq!(bytes, frame);
}

#[test]
fn four_bytes_cost_sixty() {
    let frame = single(Base::Epoch(40), &[(0x1000, vec![1, 2, 3, 4])]);
    assert_eq!(frame.len(), 60);
    let fields: Vec<_> = (1..20u64)
        .map(|i| (i * 5000, vec![i as u8; i as usize]))
        .collect();
    let bound = 48 + fields.iter().map(|f| f.1.len() + 16).sum::<usize>();
    assert!(single(Base::Epoch(40), &fields).len() <= bound);
}

#[test]
fn every_flipped_bit_is_refused() {
    for (name, frame) in golden() {
        for bit in 0..frame.len() * 8 {
            let mut broken = frame.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&broken).is_err(), "{name}, bit {bit}");
        }
    }
}

#[test]
fn headers_that_say_too_much() {
    let resealed = |change: &dyn Fn(&mut [u8])| {
        let mut frame = hello().encode(Kind::Hello);
        change(&mut frame);
        let crc = crate::checksum::crc32c(&frame[..28]);
        frame[28..32].copy_from_slice(&crc.to_le_bytes());
        parse_header(frame[..32].try_into().unwrap())
    };
    assert!(resealed(&|_| ()).is_ok());
    assert!(matches!(
        resealed(&|f| f[0] = 0),
        Err(WireError::Magic { .. })
    ));
    assert_eq!(
        resealed(&|f| f[2] = 1),
        Err(WireError::Version { found: 1 })
    );
    assert_eq!(resealed(&|f| f[3] = 12), Err(WireError::Kind { found: 12 }));
    assert!(matches!(
        resealed(&|f| f[4] = 1),
        Err(WireError::Reserved { .. })
    ));
    assert!(matches!(
        resealed(&|f| f[6] = 1),
        Err(WireError::Reserved { .. })
    ));
    let long = u32::try_from(MAX_BODY + 1).unwrap().to_le_bytes();
    assert!(matches!(
        resealed(&|f| f[12..16].copy_from_slice(&long)),
        Err(WireError::TooLong { .. })
    ));
}

#[test]
fn extents_that_reach_too_far() {
    let read = |extents: &[(u64, u32)], size: u64, from: u64| {
        let mut body = Vec::new();
        for (offset, len) in extents {
            body.extend(offset.to_le_bytes());
            body.extend(len.to_le_bytes());
            body.extend(vec![9; (*len as usize).min(100)]);
        }
        ExtentReader::new(&body, size, from).try_for_each(|e| e.map(|_| ()))
    };
    assert_eq!(read(&[(0, 4), (4, 4)], 8, 0), Ok(()));
    assert!(matches!(
        read(&[(5, 4)], 8, 0),
        Err(WireError::Extent { index: 0, .. })
    ));
    assert!(read(&[(u64::MAX, 4)], u64::MAX, 0).is_err());
    assert!(read(&[(0, 0)], 8, 0).is_err(), "an empty one");
    assert!(read(&[(0, 4), (3, 4)], 8, 0).is_err(), "an overlap");
    assert!(
        read(&[(0, 4)], 8, 1).is_err(),
        "before the last chunk's end"
    );
    assert!(read(&[(0, 101)], 1000, 0).is_err(), "cut off");
    let many: Vec<_> = (0..=MAX_EXTENTS_PER_FRAME).map(|i| (i * 2, 1)).collect();
    assert!(read(&many, REGION, 0).is_err());
    assert!(read(&many[1..], REGION, 0).is_ok());
}

#[test]
fn a_full_frame_is_a_frame() {
    let mut frame = FrameBuilder::new(Kind::UpdateChunk, 0, 1, 1);
    let each = MAX_CHUNK / MAX_EXTENTS_PER_FRAME;
    for i in 0..MAX_EXTENTS_PER_FRAME {
        frame.extent_with(i * each, each, |out| out.fill(1));
    }
    assert_eq!(frame.room(), 0);
    let (_, body) = parse(&frame.finish()).unwrap();
    let mut extents = ExtentReader::new(&body, MAX_CHUNK, 0);
    assert!(extents.by_ref().all(|extent| extent.is_ok()));
    assert_eq!(extents.data_bytes(), MAX_CHUNK);
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let error = ErrorFrame {
        code: ErrorCode::Protocol,
        subscription: 0,
        text: "ä".repeat(150),
    };
    let frame = error.encode();
    let decoded = ErrorFrame::decode(&header_of(&frame), &frame[HEADER_BYTES..]).unwrap();
    assert_eq!(decoded.text, "ä".repeat(100));
}

/// Decodes as the kind says and encodes again; what is taken must come out the same.
fn again(header: &Header, body: &[u8]) -> Result<Vec<u8>, WireError> {
    let kind = crate::words::EpochKind::Convergent;
    Ok(match header.kind {
        Kind::Hello | Kind::Welcome => Hello::decode(header, body)?.encode(header.kind),
        Kind::Subscribe => Subscribe::decode(header, body)?.encode(),
        Kind::RegionInfo => RegionInfo::decode(header, body)?.encode(),
        Kind::Ack => Ack::decode(header, body)?.encode(header.region),
        Kind::Ping | Kind::Pong => Ping::decode(header, body)?.encode(header.kind),
        Kind::Digest => DigestFrame::decode(header, body)?.encode(header.region),
        Kind::Resync => Resync::decode(header, body)?.encode(header.region),
        Kind::Error => ErrorFrame::decode(header, body)?.encode(),
        Kind::Unsubscribe => Unsubscribe::decode(header, body)?.encode(),
        Kind::StartUpdate => {
            StartUpdate::decode(header, body)?.encode(header.region, header.epoch, kind)
        }
        Kind::EndUpdate => EndUpdate::decode(header, body)?.encode(header.region, header.epoch),
        Kind::SingleUpdate | Kind::UpdateChunk => {
            let mut frame =
                FrameBuilder::new(header.kind, header.flags, header.region, header.epoch);
            let mut extents = body;
            if header.kind == Kind::SingleUpdate {
                let (prefix, rest) = UpdatePrefix::decode(header, body)?;
                frame.put(&prefix.to_bytes(header.epoch));
                extents = rest;
            }
            for extent in ExtentReader::new(extents, REGION, 0) {
                let extent = extent?;
                frame.extent(extent.offset, extent.bytes);
            }
            frame.finish()
        }
    })
}

proptest! {
    #[test]
    fn arbitrary_headers_never_panic(bytes in any::<[u8; 32]>()) {
        prop_assert!(parse_header(&bytes).is_err());
    }

    /// Any body under a valid header: refused, or the same bytes again.
    #[test]
    fn arbitrary_bodies_never_panic(
        kind in 0usize..15,
        flags in 0u16..4,
        epoch in any::<u64>(),
        body in proptest::collection::vec(prop_oneof![Just(0u8), Just(1u8), any::<u8>()], 0..120),
    ) {
        let kind = Kind::ALL[kind];
        let flags = if matches!(kind, Kind::SingleUpdate | Kind::StartUpdate) { flags } else { 0 };
        let header = Header { kind, flags, region: 3, body_len: body.len() as u32, epoch, body_crc: 0 };
        if let Ok(frame) = again(&header, &body) {
            prop_assert_eq!(&frame[HEADER_BYTES..], &body[..]);
        }
    }

    /// Golden frames with a few bytes changed under a fresh checksum.
    #[test]
    fn changed_frames_never_panic(
        which in 0usize..15,
        changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..6),
        cut in 0usize..8,
    ) {
        let (_, frame) = golden().swap_remove(which);
        let header = header_of(&frame);
        let mut body = frame[HEADER_BYTES..].to_vec();
        for (at, value) in changes {
            let at = at as usize % body.len();
            body[at] = value;
        }
        body.truncate(body.len().saturating_sub(cut.saturating_sub(4)));
        if let Ok(frame) = again(&header, &body) {
            prop_assert_eq!(&frame[HEADER_BYTES..], &body[..]);
        }
    }

    #[test]
    fn updates_survive_the_way(
        gaps in proptest::collection::vec((1u64..500, 1usize..200), 0..40),
        base in proptest::option::of(0u64..=41),
        fill in any::<u8>(),
    ) {
        let mut at = 0;
        let mut extents = Vec::new();
        for (gap, len) in gaps {
            at += gap;
            extents.push((at, vec![fill; len]));
            at += len as u64;
        }
        let base = base.map_or(Base::Nothing, Base::Epoch);
        let (header, body) = parse(&single(base, &extents)).unwrap();
        prop_assert_eq!((header.kind, header.epoch, header.region), (Kind::SingleUpdate, 41, 7));
        prop_assert!(header.has(FLAG_CUT));
        let (prefix, rest) = UpdatePrefix::decode(&header, &body).unwrap();
        prop_assert_eq!(prefix.base, base);
        let read: Vec<_> = ExtentReader::new(rest, REGION, 0)
            .map(|e| e.map(|e| (e.offset, e.bytes.to_vec())))
            .collect::<Result<_, _>>()
            .unwrap();
        prop_assert_eq!(read, extents);
    }
}
