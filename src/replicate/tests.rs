//! Publication and applier face to face, without a link between them.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::limits::{
    DIGEST_CHUNK, MAX_CHUNK, MAX_REPLICAS, MAX_UNACKED, RESUME_WINDOW_MS, UPDATE_DEADLINE_MS,
};
use crate::track::{ExtentSet, WhenFull};
use crate::units::PAGE_SIZE;
use crate::wire::{
    Ack, DigestFrame, FLAG_COMING, FLAG_CUT, FLAG_WHOLE, FrameBuilder, HEADER_BYTES, Header, Kind,
    RegionInfo, Resync, ResyncReason, StartUpdate, Subscribe, SyncPlan, check_body, parse_header,
};
use crate::words::{EpochKind, Generation};

const BUDGET: u64 = 64 << 20;

fn parse(frame: &[u8]) -> (Header, Vec<u8>) {
    let header = parse_header(frame.first_chunk().unwrap()).unwrap();
    let body = frame[HEADER_BYTES..].to_vec();
    check_body(&header, &body).unwrap();
    (header, body)
}

fn key(number: u8) -> ReplicaKey {
    ReplicaKey {
        node: [number; 16],
        subscription: 1,
        name: "right".into(),
    }
}

/// A source of `size` bytes with one replica that is in step.
mod growth;

struct Pair {
    now: Instant,
    content: Vec<u8>,
    publication: Publication,
    id: ShipperId,
    applier: Applier,
    memory: Vec<u8>,
}

impl Pair {
    fn new(size: u64, budget: u64) -> Self {
        let now = Instant::now();
        let mut publication = Publication::new(7, Generation(9), 1, size);
        let applier = Applier::new(size, budget);
        let wish = applier.subscribe("r".parse().unwrap(), 1);
        let present = ExtentSet::new(size);
        let (id, info) = publication.subscribe(now, key(1), &wish, &present).unwrap();
        let mut pair = Self {
            now,
            content: vec![0; size as usize],
            publication,
            id,
            applier,
            memory: vec![0; size as usize],
        };
        pair.applier.handle_info(now, &info).unwrap();
        pair.settle();
        assert_eq!(pair.applier.have_epoch(), Some(1));
        pair
    }

    fn capture(&mut self, changes: &[(u64, &[u8])]) {
        let mut extents = ExtentSet::new(self.content.len() as u64);
        for (offset, bytes) in changes {
            let range = *offset..offset + bytes.len() as u64;
            for page in range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE) {
                let start = (page * PAGE_SIZE) as usize;
                let end = (start + PAGE_SIZE as usize).min(self.content.len());
                let pre = self.publication.pre_images();
                pre.before_change(page, &self.content[start..end], WhenFull::Abort)
                    .unwrap();
            }
            self.content[range.start as usize..range.end as usize].copy_from_slice(bytes);
            extents.insert(range);
        }
        let info = CaptureInfo {
            epoch: self.publication.epoch() + 1,
            kind: EpochKind::Cut,
            source_time_ns: 4,
        };
        self.publication.captured(info, &extents, &self.content);
    }

    fn poll(&mut self) -> Option<Vec<u8>> {
        let out = self.publication.poll(self.id, self.now, &self.content)?;
        Some(out.as_ref().to_vec())
    }

    fn poll_all(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.poll()).collect()
    }

    fn take(&mut self, frame: &[u8]) -> Applied {
        let (header, body) = parse(frame);
        if header.kind == Kind::RegionInfo {
            let info = RegionInfo::decode(&header, &body).unwrap();
            self.applier.handle_info(self.now, &info).unwrap();
            return Applied::Staged;
        }
        self.applier.handle_frame(self.now, &header, body).unwrap()
    }

    fn apply(&mut self, applied: Applied) {
        if let Applied::Apply(update) | Applied::InPlace(update) = applied {
            let epoch = update.epoch;
            let mut job = ApplyJob::new(update);
            while !job.step(&mut self.memory, 10_000) {}
            self.applier.applied(epoch);
        }
    }

    /// Frames of the replica to the source; true if there were any.
    fn answer(&mut self) -> bool {
        let mut any = self.publication.is_digesting(self.id);
        loop {
            while let Some((chunk, bytes)) = self.applier.wants_digest() {
                let bytes = &self.memory[bytes.start as usize..bytes.end as usize];
                self.applier
                    .push_digest(chunk, crate::checksum::digest(bytes));
            }
            let Some(frame) = self.applier.poll(self.now) else {
                while !self.publication.digest_step(self.id, &self.content, 3) {}
                return any;
            };
            any = true;
            let (header, body) = parse(&frame);
            self.publication
                .handle_frame(self.id, self.now, &header, &body)
                .unwrap();
        }
    }

    /// Exchanges frames until neither side has any.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let frames = self.poll_all();
            for frame in &frames {
                let applied = self.take(frame);
                self.apply(applied);
            }
            if !self.answer() && frames.is_empty() {
                return;
            }
        }
        panic!("frames without end");
    }

    fn reconnect(&mut self) -> RegionInfo {
        self.publication.disconnected(self.id, self.now);
        self.applier.disconnected();
        let wish = self.applier.subscribe("r".parse().unwrap(), 1);
        let present = ExtentSet::all(self.content.len() as u64);
        let (id, info) = self
            .publication
            .subscribe(self.now, key(1), &wish, &present)
            .unwrap();
        self.id = id;
        self.applier.handle_info(self.now, &info).unwrap();
        info
    }

    fn assert_equal(&self) {
        assert_eq!(self.applier.have_epoch(), Some(self.publication.epoch()));
        assert_eq!(self.applier.state(), ReplicaState::Following);
        assert!(self.memory == self.content, "the contents differ");
        let status = self.publication.status(self.id).unwrap();
        assert_eq!(status.state, ShipperState::InStep);
        assert_eq!((status.lag, status.pending_bytes), (0, 0));
    }
}

#[test]
fn a_small_change_is_one_frame_of_sixty_bytes() {
    let mut pair = Pair::new(1 << 20, BUDGET);
    pair.capture(&[(4096, &[1, 2, 3, 4])]);
    let frames = pair.poll_all();
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0].len(), 60);
    assert!(parse(&frames[0]).0.has(FLAG_CUT));
    let applied = pair.take(&frames[0]);
    pair.apply(applied);
    pair.settle();
    pair.assert_equal();
    assert_eq!(pair.publication.acked(), [2]);
}

#[test]
fn scattered_fields_are_one_frame() {
    let mut pair = Pair::new(1 << 20, BUDGET);
    let fields: Vec<(u64, Vec<u8>)> = (0..50u64)
        .map(|i| (i * 20_000 + 3, vec![i as u8 + 1; 1 + i as usize % 9]))
        .collect();
    let changes: Vec<(u64, &[u8])> = fields.iter().map(|(at, b)| (*at, &b[..])).collect();
    pair.capture(&changes);
    let frames = pair.poll_all();
    let bound = 48 + fields.iter().map(|(_, b)| b.len() + 16).sum::<usize>();
    assert_eq!(frames.len(), 1);
    assert!(frames[0].len() <= bound, "{} > {bound}", frames[0].len());
}

#[test]
fn one_byte_more_than_a_chunk_goes_in_parts() {
    let mut pair = Pair::new(1 << 20, BUDGET);
    pair.capture(&[(10, &vec![7; MAX_CHUNK as usize])]);
    assert_eq!(pair.poll_all().len(), 1, "a full chunk is a single update");
    pair.reconnect();
    pair.settle();
    pair.capture(&[(10, &vec![8; MAX_CHUNK as usize + 1])]);
    let frames = pair.poll_all();
    let kinds: Vec<Kind> = frames.iter().map(|frame| parse(frame).0.kind).collect();
    assert_eq!(
        kinds,
        [
            Kind::StartUpdate,
            Kind::UpdateChunk,
            Kind::UpdateChunk,
            Kind::EndUpdate
        ]
    );
    for frame in &frames[..3] {
        assert!(matches!(pair.take(frame), Applied::Staged));
        assert_eq!(pair.memory[10], 7, "nothing is applied before the end");
    }
    let applied = pair.take(&frames[3]);
    pair.apply(applied);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn replicas_at_one_epoch_share_a_frame() {
    let mut pair = Pair::new(1 << 16, BUDGET);
    let wish = Applier::new(1 << 16, BUDGET).subscribe("r".parse().unwrap(), 1);
    let none = ExtentSet::new(1 << 16);
    let now = pair.now;
    let (second, info) = pair
        .publication
        .subscribe(now, key(2), &wish, &none)
        .unwrap();
    assert!(pair.publication.poll(second, now, &pair.content).is_some());
    let ack = Ack {
        round: info.round,
        epoch: 1,
    };
    pair.publication.handle_ack(second, now, &ack).unwrap();
    pair.capture(&[(5, b"shared")]);
    // Made at once, so it goes out although the next capture has begun.
    pair.publication.set_busy(true);
    let frames = [pair.id, second].map(|id| pair.publication.poll(id, now, &pair.content));
    let [Some(Out::Shared(first)), Some(Out::Shared(second))] = frames else {
        panic!("both get a shared frame");
    };
    assert!(std::sync::Arc::ptr_eq(&first, &second));
}

#[test]
fn a_replica_behind_gets_epochs_merged_and_no_queue() {
    let mut pair = Pair::new(1 << 16, BUDGET);
    let mut sent = 0;
    for i in 0..3 * MAX_UNACKED {
        pair.capture(&[(i * 8, &i.to_le_bytes())]);
        sent += pair.poll_all().len() as u64;
    }
    assert_eq!(sent, MAX_UNACKED);
    // Nothing arrived: all of it is in the next update, once.
    pair.reconnect();
    let frames = pair.poll_all();
    assert_eq!(frames.len(), 1);
    assert!(frames[0].len() as u64 <= 60 + 3 * MAX_UNACKED * 8);
    let applied = pair.take(&frames[0]);
    pair.apply(applied);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn an_open_update_stays_at_its_epoch() {
    let mut pair = Pair::new(1 << 20, BUDGET);
    pair.capture(&[(0, &vec![1; 1 << 20])]);
    let then = pair.content.clone();
    let mut frames = vec![pair.poll().unwrap(), pair.poll().unwrap()];
    pair.capture(&[(0, &vec![2; 1 << 20])]);
    frames.extend(std::iter::from_fn(|| {
        let frame = pair.poll()?;
        (parse(&frame).0.epoch == 2).then_some(frame)
    }));
    for frame in &frames {
        let applied = pair.take(frame);
        pair.apply(applied);
    }
    assert_eq!(pair.applier.have_epoch(), Some(2));
    assert!(pair.memory == then, "epoch 2 as it was");
}

#[test]
fn a_lost_middle_is_dropped_at_the_deadline_and_asked_for() {
    let mut pair = Pair::new(1 << 20, BUDGET);
    pair.capture(&[(0, &vec![1; 1 << 20])]);
    let frames = pair.poll_all();
    pair.take(&frames[0]);
    pair.take(&frames[1]);
    assert!(pair.applier.poll(pair.now).is_none());
    let deadline = pair.now + Duration::from_millis(UPDATE_DEADLINE_MS);
    assert_eq!(pair.applier.next_deadline(), Some(deadline));
    pair.now = deadline;
    let (header, body) = parse(&pair.applier.poll(deadline).unwrap());
    let resync = Resync::decode(&header, &body).unwrap();
    assert_eq!(
        (resync.have_epoch, resync.reason),
        (Some(1), ResyncReason::Deadline)
    );
    assert_eq!(pair.applier.state(), ReplicaState::Resyncing);
    assert_eq!(pair.applier.staged_bytes(), 0);
    // The rest of the dropped update comes still, and changes nothing.
    for frame in &frames[3..] {
        assert!(matches!(pair.take(frame), Applied::Staged));
    }
    pair.publication.handle_resync(pair.id, &resync);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn an_update_is_not_overdue_while_the_replica_does_not_read() {
    let mut pair = Pair::new(1 << 20, 600_000);
    let mut handed_out = Vec::new();
    for value in 1..4 {
        let len = if value == 1 { 250_000 } else { 500_000 };
        pair.capture(&[(0, &vec![value; len])]);
        let frames = pair.poll_all();
        // Two updates wait to be applied, the third is open.
        let taken = if value < 3 { frames.len() } else { 2 };
        for frame in &frames[..taken] {
            handed_out.push(pair.take(frame));
        }
    }
    assert!(!pair.applier.accepts_frames());
    pair.now += Duration::from_millis(3 * UPDATE_DEADLINE_MS);
    assert!(pair.applier.poll(pair.now).is_none(), "nothing is lost");
    for applied in handed_out {
        pair.apply(applied);
    }
    assert!(pair.applier.accepts_frames());
    assert_eq!(pair.applier.dropped_updates(), 0);
    pair.reconnect();
    pair.settle();
    pair.assert_equal();
}

#[test]
fn a_chunk_that_comes_twice_is_refused() {
    let mut pair = Pair::new(1 << 20, BUDGET);
    pair.capture(&[(0, &vec![1; 1 << 20])]);
    let frames = pair.poll_all();
    pair.take(&frames[0]);
    pair.take(&frames[1]);
    let (header, body) = parse(&frames[1]);
    assert!(matches!(
        pair.applier.handle_frame(pair.now, &header, body),
        Err(ApplyError::Wire(_))
    ));
    assert_eq!(pair.reconnect().plan, SyncPlan::Resume);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn a_damaged_update_is_asked_for_again() {
    let mut pair = Pair::new(1 << 16, BUDGET);
    pair.capture(&[(0, b"one")]);
    let (header, _) = parse(&pair.poll().unwrap());
    assert!(pair.applier.handle_damaged(&header));
    pair.capture(&[(9, b"two")]);
    let frame = pair.poll().unwrap();
    assert!(matches!(
        pair.take(&frame),
        Applied::Dropped(ResyncReason::Gap)
    ));
    pair.settle();
    pair.assert_equal();
}

#[test]
fn a_resync_with_nothing_missing_is_answered() {
    let mut pair = Pair::new(1 << 16, BUDGET);
    pair.capture(&[(0, b"one")]);
    pair.settle();
    let header = Header {
        kind: Kind::SingleUpdate,
        flags: 0,
        region: 7,
        body_len: 0,
        epoch: 3,
        body_crc: 0,
    };
    assert!(pair.applier.handle_damaged(&header));
    assert_eq!(pair.applier.state(), ReplicaState::Resyncing);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn above_the_budget_an_update_goes_in_place() {
    let mut pair = Pair::new(1 << 20, 300_000);
    pair.capture(&[(0, &vec![1; 1 << 20])]);
    let frames = pair.poll_all();
    let applied = pair.take(&frames[1]);
    assert!(matches!(applied, Applied::Dropped(_)), "no START yet");
    pair.settle();
    pair.capture(&[(0, &vec![2; 1 << 20])]);
    let frames = pair.poll_all();
    assert!(matches!(pair.take(&frames[0]), Applied::Staged));
    let applied = pair.take(&frames[1]);
    assert!(matches!(applied, Applied::InPlace(_)));
    pair.apply(applied);
    assert_eq!(pair.applier.state(), ReplicaState::Syncing);
    // The link breaks: what is half new stays unreadable until it is whole.
    assert_eq!(pair.reconnect().plan, SyncPlan::Resume);
    assert_eq!(pair.applier.state(), ReplicaState::Syncing);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn a_coming_epoch_is_staged_up_to_the_budget_and_ends_as_what_it_is() {
    const SIZE: u64 = 1 << 20;
    for (budget, in_place) in [(BUDGET, 0), (400_000, 3)] {
        let mut pair = Pair::new(SIZE, budget);
        pair.publication.set_busy(true);
        pair.content.fill(7);
        let all = ExtentSet::all(SIZE);
        let mut placed = 0;
        for settled in [MAX_CHUNK - 1, MAX_CHUNK, 2 * MAX_CHUNK + 9, SIZE] {
            let coming = Coming {
                epoch: 2,
                source_time_ns: 4,
                changed: &all,
                settled,
            };
            let (id, now) = (pair.id, pair.now);
            while let Some(out) = pair.publication.poll_coming(
                id,
                now,
                (&pair.content, Some(coming)),
                &mut Spare::default(),
            ) {
                assert!(settled >= MAX_CHUNK, "nothing but full frames");
                let applied = pair.take(out.as_ref());
                placed += u64::from(matches!(applied, Applied::InPlace(_)));
                pair.apply(applied);
            }
            assert!(pair.poll().is_none(), "nothing without the capture");
        }
        assert_eq!((pair.applier.have_epoch(), placed), (Some(1), in_place));
        let info = CaptureInfo {
            epoch: 2,
            kind: EpochKind::Cut,
            source_time_ns: 4,
        };
        pair.publication.captured(info, &all, &pair.content);
        let frames = pair.poll_all();
        let applied = pair.take(&frames[0]);
        assert!(matches!(&applied, Applied::Apply(u) if u.kind == EpochKind::Cut));
        pair.apply(applied);
        pair.settle();
        pair.assert_equal();
    }
}

#[test]
fn an_update_that_was_given_up_starts_again() {
    let size = 64 * PAGE_SIZE + 5;
    let mut pair = Pair::new(size.max(MAX_CHUNK * 2), BUDGET);
    let size = pair.content.len();
    pair.publication = Publication::with_budget(7, Generation(9), 1, size as u64, PAGE_SIZE);
    assert_eq!(pair.reconnect().plan, SyncPlan::Digests);
    pair.settle();
    pair.capture(&[(0, &vec![1; size])]);
    let started: Vec<Vec<u8>> = (0..2).map(|_| pair.poll().unwrap()).collect();
    for frame in &started {
        pair.take(frame);
    }
    pair.capture(&[(0, &vec![2; size])]);
    let next = pair.poll().unwrap();
    assert_eq!(parse(&next).0.kind, Kind::StartUpdate);
    assert_eq!(parse(&next).0.epoch, 3);
    pair.take(&next);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn only_chunks_that_differ_travel_after_a_new_life() {
    let size = 10 * DIGEST_CHUNK;
    let mut pair = Pair::new(size, BUDGET);
    let noise: Vec<u8> = (0..size).map(|i| ((i * 7) >> 3) as u8).collect();
    pair.capture(&[(0, &noise)]);
    pair.settle();
    let before = pair.publication.status(pair.id).unwrap().bytes_sent;
    pair.content[3 * DIGEST_CHUNK as usize] ^= 1;
    pair.publication.restart(Generation(10), 1);
    pair.settle();
    pair.assert_equal();
    assert_eq!(pair.applier.generation(), Generation(10));
    let sent = pair.publication.status(pair.id).unwrap().bytes_sent - before;
    assert!(sent < DIGEST_CHUNK + 300, "{sent} bytes");
}

#[test]
fn a_chunk_that_changes_while_it_is_compared_is_not_left_out() {
    let size = 4 * DIGEST_CHUNK;
    let mut pair = Pair::new(size, BUDGET);
    pair.publication.restart(Generation(10), 1);
    let info = pair.poll().unwrap();
    pair.take(&info);
    while let Some((chunk, bytes)) = pair.applier.wants_digest() {
        let bytes = &pair.memory[bytes.start as usize..bytes.end as usize];
        pair.applier
            .push_digest(chunk, crate::checksum::digest(bytes));
    }
    let (header, body) = parse(&pair.applier.poll(pair.now).unwrap());
    let (id, now) = (pair.id, pair.now);
    pair.publication
        .handle_frame(id, now, &header, &body)
        .unwrap();
    pair.publication.digest_step(id, &pair.content, 2);
    pair.capture(&[
        (100, b"after it was compared"),
        (3 * DIGEST_CHUNK, b"before"),
    ]);
    assert!(pair.poll().is_none(), "nothing is sent while comparing");
    pair.settle();
    pair.assert_equal();
}

#[test]
fn who_was_away_too_long_is_compared() {
    let mut pair = Pair::new(1 << 16, BUDGET);
    pair.publication.disconnected(pair.id, pair.now);
    let deadline = pair.now + Duration::from_millis(RESUME_WINDOW_MS);
    assert_eq!(pair.publication.next_deadline(), Some(deadline));
    pair.now = deadline;
    pair.publication.forget(deadline);
    assert_eq!(pair.reconnect().plan, SyncPlan::Digests);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn too_many_replicas_are_refused_but_gone_ones_make_room() {
    let mut pair = Pair::new(1 << 16, BUDGET);
    let wish = Applier::new(1 << 16, BUDGET).subscribe("r".parse().unwrap(), 1);
    let none = ExtentSet::new(1 << 16);
    let subscribe = |pair: &mut Pair, number: u8| {
        let now = pair.now;
        pair.publication.subscribe(now, key(number), &wish, &none)
    };
    for number in 2..=MAX_REPLICAS as u8 {
        subscribe(&mut pair, number).unwrap();
    }
    assert_eq!(subscribe(&mut pair, 200), Err(SubscribeError::TooMany));
    pair.publication.disconnected(pair.id, pair.now);
    assert!(subscribe(&mut pair, 200).is_ok());
}

#[test]
fn what_the_source_may_not_claim() {
    let mut pair = Pair::new(1 << 16, BUDGET);
    let info = RegionInfo {
        handle: 7,
        subscription: 1,
        round: 2,
        generation: Generation(9),
        size: 1 << 15,
        max_size: 1 << 17,
        epoch: 1,
        plan: SyncPlan::Digests,
    };
    let now = pair.now;
    let mut refused = |info: RegionInfo| pair.applier.handle_info(now, &info).unwrap_err();
    assert!(matches!(refused(info), ApplyError::Size { .. }));
    let size = 1 << 16;
    let plan = SyncPlan::Resume;
    let other = Generation(8);
    let (info, resume) = (
        RegionInfo { size, ..info },
        RegionInfo { size, plan, ..info },
    );
    let resume = RegionInfo {
        generation: other,
        ..resume
    };
    assert!(matches!(refused(resume), ApplyError::Plan { .. }));
    let plan = SyncPlan::Everything;
    assert!(matches!(
        refused(RegionInfo { plan, ..info }),
        ApplyError::Plan { .. }
    ));
    let start = StartUpdate {
        prefix: crate::wire::UpdatePrefix {
            base: crate::wire::Base::Epoch(1),
            source_time_ns: 0,
        },
        total_bytes: (1 << 16) + 1,
        coming: false,
    };
    let (header, body) = parse(&start.encode(7, 2, EpochKind::Cut));
    assert!(matches!(
        pair.applier.handle_frame(now, &header, body),
        Err(ApplyError::Total { .. })
    ));
    let (header, body) = parse(&FrameBuilder::new(Kind::SingleUpdate, 0, 8, 2).finish());
    assert!(matches!(
        pair.applier.handle_frame(now, &header, body),
        Err(ApplyError::NotFollowed { handle: 8, .. })
    ));
}

/// A frame about region 7 out of small numbers, so that many of them fit together.
fn any_frame() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let extents = proptest::collection::vec((0u64..5_000, 0u32..40), 0..4);
    (0usize..15, 0u16..8, 0u64..6, 0u32..4, 0u64..9_000, extents).prop_map(
        |(kind, flags, epoch, small, total, extents)| {
            let kind = Kind::ALL[kind];
            let flags = flags & (FLAG_CUT | FLAG_WHOLE | FLAG_COMING);
            let mut frame = FrameBuilder::new(kind, 0, 7, epoch);
            match kind {
                Kind::SingleUpdate | Kind::StartUpdate => {
                    let distance = if flags & FLAG_WHOLE != 0 { 0 } else { small };
                    frame.put(&distance.to_le_bytes()).put(&[0; 8]);
                }
                Kind::EndUpdate => {
                    frame.put(&small.to_le_bytes()).put(&[0; 4]);
                }
                _ => {}
            }
            match kind {
                Kind::SingleUpdate | Kind::UpdateChunk => {
                    for (offset, len) in extents {
                        frame.put(&offset.to_le_bytes()).put(&len.to_le_bytes());
                        frame.put(&vec![3; len as usize]);
                    }
                }
                Kind::StartUpdate | Kind::EndUpdate => {
                    frame.put(&total.to_le_bytes());
                }
                Kind::Ack => {
                    return parse(
                        &Ack {
                            round: small,
                            epoch,
                        }
                        .encode(7),
                    );
                }
                Kind::Resync => {
                    let resync = Resync {
                        round: small,
                        have_epoch: (epoch < 5).then_some(epoch),
                        reason: ResyncReason::Gap,
                    };
                    return parse(&resync.encode(7));
                }
                Kind::Digest => {
                    let digests = DigestFrame {
                        round: small,
                        first_chunk: total % 3,
                        digests: vec![[1; 16]; 1 + epoch as usize % 2],
                    };
                    return parse(&digests.encode(7));
                }
                _ => {
                    frame.put(&total.to_le_bytes());
                }
            }
            let (mut header, body) = parse(&frame.finish());
            header.flags = flags;
            (header, body)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any frames in any order: no panic, staging bounded, epochs never fall.
    #[test]
    fn appliers_bear_any_frames(
        frames in proptest::collection::vec((any_frame(), 0u64..3_000, 0u8..8), 1..60),
        budget in 0u64..9_000,
    ) {
        const SIZE: u64 = 8_000;
        let mut now = Instant::now();
        let mut applier = Applier::new(SIZE, budget);
        let mut memory = vec![0; SIZE as usize];
        let mut generation = 1;
        let mut round = 0;
        for ((header, body), wait, action) in frames {
            now += Duration::from_millis(wait);
            match action {
                0 => {
                    round += 1;
                    generation += u128::from(wait % 2 == 0);
                    let plan = [SyncPlan::Resume, SyncPlan::Everything, SyncPlan::Digests][wait as usize % 3];
                    let info = RegionInfo {
                        handle: 7, subscription: 1, round, generation: Generation(generation), size: SIZE, max_size: SIZE, epoch: 1, plan,
                    };
                    let _ = applier.handle_info(now, &info);
                }
                1 if wait % 4 == 0 => applier.disconnected(),
                1 => {
                    applier.handle_damaged(&header);
                }
                _ => {}
            }
            let before = (applier.generation(), applier.have_epoch());
            if let Ok(Applied::Apply(update) | Applied::InPlace(update)) =
                applier.handle_frame(now, &header, body)
            {
                prop_assert!(update.extents().all(|e| e.offset + e.bytes.len() as u64 <= SIZE));
                let epoch = update.epoch;
                let mut job = ApplyJob::new(update);
                while !job.step(&mut memory, 100) {}
                applier.applied(epoch);
            }
            prop_assert!(applier.staged_bytes() <= budget + 12 * 8_000);
            if before.0 == applier.generation() {
                prop_assert!(applier.have_epoch() >= before.1);
            }
            while let Some((chunk, _)) = applier.wants_digest() {
                applier.push_digest(chunk, [0; 16]);
            }
            for _ in 0..9 {
                if let Some(frame) = applier.poll(now) {
                    parse(&frame);
                }
            }
            prop_assert!(applier.poll(now).is_none(), "polling comes to an end");
            let _ = (applier.state(), applier.next_deadline());
        }
    }

    /// Any frames in any order: no panic, no update beyond the content.
    #[test]
    fn publications_bear_any_frames(
        frames in proptest::collection::vec((any_frame(), 0u64..3_000, 0u8..8), 1..60),
    ) {
        const SIZE: u64 = 2 * DIGEST_CHUNK + 9;
        let now = Instant::now();
        let mut content = vec![0; SIZE as usize];
        let mut publication = Publication::new(7, Generation(1), 1, SIZE);
        let mut id = None;
        for ((header, body), number, action) in frames {
            match (action, id) {
                (0, _) | (_, None) => {
                    let wish = Subscribe {
                        name: "r".parse().unwrap(),
                        subscription: 1,
                        generation: Generation(u128::from(number % 2)),
                        have_epoch: (number % 3 > 0).then_some(number % 9),
                        fresh: number % 5 == 0,
                    };
                    let present = ExtentSet::all(SIZE);
                    let (new, _) = publication.subscribe(now, key(1), &wish, &present).unwrap();
                    id = Some(new);
                }
                (1, Some(id)) => publication.disconnected(id, now),
                (2, _) if number % 8 == 0 => publication.restart(Generation(1), 1),
                (3, _) => {
                    let mut extents = ExtentSet::new(SIZE);
                    extents.insert(number..number + 50);
                    content[number as usize..number as usize + 50].fill(number as u8);
                    let info = CaptureInfo {
                        epoch: publication.epoch() + 1, kind: EpochKind::Cut, source_time_ns: 0,
                    };
                    publication.captured(info, &extents, &content);
                }
                (_, Some(id)) => {
                    let _ = publication.handle_frame(id, now, &header, &body);
                }
            }
            let Some(id) = id else { continue };
            publication.digest_step(id, &content, number % 4);
            for _ in 0..number % 20 {
                if let Some(out) = publication.poll(id, now, &content) {
                    parse(out.as_ref());
                }
            }
            let _ = (publication.status(id), publication.acked(), publication.wants_poll(id));
        }
    }
}
