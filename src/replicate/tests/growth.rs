//! A region that grows while replicas follow it.

use proptest::prelude::*;

use super::*;
use crate::limits::DIGEST_CHUNK;

impl Pair {
    /// The region has `size` bytes from the next capture on.
    fn grow(&mut self, size: u64) {
        self.publication.grow(size);
        self.content.resize(size as usize, 0);
    }

    /// What a replica's node does first with every info.
    fn make_room(&mut self) {
        let size = self.content.len().max(self.memory.len());
        self.memory.resize(size, 0);
    }
}

#[test]
fn a_replica_in_step_is_told_in_front_of_the_update() {
    let mut pair = Pair::new(5000, BUDGET);
    pair.grow(20_000);
    pair.capture(&[(4999, b"over the old end"), (19_999, &[7])]);
    let frames = pair.poll_all();
    let kinds: Vec<Kind> = frames.iter().map(|frame| parse(frame).0.kind).collect();
    assert_eq!(kinds, [Kind::RegionInfo, Kind::SingleUpdate]);
    let (header, body) = parse(&frames[0]);
    let info = RegionInfo::decode(&header, &body).unwrap();
    assert_eq!((info.plan, info.size), (SyncPlan::Grow, 20_000));
    pair.make_room();
    for frame in frames {
        let applied = pair.take(&frame);
        pair.apply(applied);
    }
    pair.settle();
    pair.assert_equal();
}

#[test]
fn growth_alone_is_an_epoch() {
    let mut pair = Pair::new(4096, BUDGET);
    pair.grow(8192);
    pair.capture(&[]);
    pair.make_room();
    pair.settle();
    pair.assert_equal();
    assert_eq!(pair.applier.size(), 8192);
}

#[test]
fn an_update_under_way_keeps_its_epoch_and_size() {
    let mut pair = Pair::new(1 << 20, BUDGET);
    pair.capture(&[(0, &vec![5; 1 << 20])]);
    let first = pair.poll().unwrap();
    assert_eq!(parse(&first).0.kind, Kind::StartUpdate);
    let _ = pair.take(&first);
    pair.grow(3 << 20);
    pair.capture(&[(17, b"later"), (2 << 20, &[9; 100])]);
    pair.make_room();
    let mut told = false;
    for frame in pair.poll_all() {
        let kind = parse(&frame).0.kind;
        told |= kind == Kind::RegionInfo;
        let applied = pair.take(&frame);
        if kind == Kind::EndUpdate && !told {
            let Applied::Apply(update) = &applied else {
                panic!("the first update is whole");
            };
            assert_eq!((update.epoch, update.data_bytes), (2, 1 << 20));
        }
        pair.apply(applied);
    }
    assert!(told);
    pair.settle();
    pair.assert_equal();
}

#[test]
fn one_that_is_compared_begins_anew_and_one_that_was_away_resumes() {
    let mut pair = Pair::new(4 * DIGEST_CHUNK, BUDGET);
    pair.capture(&[(10, b"known")]);
    pair.settle();
    pair.publication.disconnected(pair.id, pair.now);
    pair.applier.disconnected();
    pair.grow(6 * DIGEST_CHUNK);
    pair.capture(&[(5 * DIGEST_CHUNK, b"while it was away")]);
    pair.make_room();
    let info = pair.reconnect();
    assert!(info.resume());
    assert_eq!(info.size, 6 * DIGEST_CHUNK);
    pair.settle();
    pair.assert_equal();

    pair.publication.restart(Generation(10), 9);
    let frame = pair.poll().unwrap();
    let _ = pair.take(&frame);
    assert!(pair.publication.is_digesting(pair.id));
    pair.grow(7 * DIGEST_CHUNK + 5);
    pair.capture(&[(7 * DIGEST_CHUNK, b"abcde")]);
    pair.make_room();
    pair.settle();
    pair.assert_equal();
}

#[test]
fn what_growth_may_not_be() {
    let mut pair = Pair::new(1 << 16, BUDGET);
    let info = RegionInfo {
        handle: 7,
        subscription: 1,
        round: 1,
        generation: Generation(9),
        size: 1 << 17,
        max_size: 1 << 20,
        epoch: 1,
        plan: SyncPlan::Grow,
    };
    let now = pair.now;
    let mut refused = |info: RegionInfo| pair.applier.handle_info(now, &info).unwrap_err();
    let shrinks = RegionInfo { size: 1, ..info };
    assert!(matches!(refused(shrinks), ApplyError::Size { .. }));
    let generation = Generation(1);
    let other = RegionInfo { generation, ..info };
    assert!(matches!(refused(other), ApplyError::Size { .. }));
    let round = RegionInfo { round: 5, ..info };
    assert!(matches!(refused(round), ApplyError::Plan { .. }));
    pair.capture(&[(0, &vec![5; 1 << 16])]);
    let start = StartUpdate {
        prefix: crate::wire::UpdatePrefix {
            base: crate::wire::Base::Epoch(1),
            source_time_ns: 0,
        },
        total_bytes: 10,
        coming: false,
    };
    let (header, body) = parse(&start.encode(7, 2, EpochKind::Cut));
    pair.applier.handle_frame(now, &header, body).unwrap();
    let mut refused = |info: RegionInfo| pair.applier.handle_info(now, &info).unwrap_err();
    assert!(
        matches!(refused(info), ApplyError::Plan { .. }),
        "not in the middle of an update"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn replicas_follow_whatever_grows_when(
        steps in proptest::collection::vec((0u8..6, 0u64..400_000, 1usize..300_000), 1..30)
    ) {
        let mut pair = Pair::new(5000, BUDGET);
        for (what, at, len) in steps {
            let size = pair.content.len() as u64;
            match what {
                0 => {
                    pair.grow(size + at);
                    pair.capture(&[]);
                    pair.make_room();
                }
                1 => {
                    pair.make_room();
                    pair.reconnect();
                }
                2 => {
                    if let Some(frame) = pair.poll() {
                        let applied = pair.take(&frame);
                        pair.apply(applied);
                    }
                }
                3 => pair.settle(),
                _ => {
                    let start = at % size;
                    let end = size.min(start + len as u64);
                    let bytes = vec![at as u8 | 1; (end - start) as usize];
                    pair.capture(&[(start, &bytes)]);
                }
            }
        }
        pair.make_room();
        pair.settle();
        // What came back with a lost connection goes with the next update, also if the
        // replica had it.
        pair.capture(&[(0, b"the last")]);
        pair.settle();
        pair.assert_equal();
    }
}
