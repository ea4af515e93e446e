//! Ranges one byte before, on and after every boundary, over every way to the servers.

use uffd_sync::client::space::{Batch, BatchAnswer, SpaceError};

use super::{PATIENT, WAYS, Way, client};
use crate::space::servers::Servers;

/// Three stripes.
const SEGMENT: u64 = 3 << 16;

#[test]
fn every_way_sees_the_same_bytes_at_every_boundary() {
    let servers = Servers::start(3, SEGMENT, "");
    let mut clients = WAYS.map(|way| client(&servers, way, PATIENT));
    // The second look at a server on this host is at its memory.
    clients.iter_mut().for_each(|space| {
        space
            .read(0, &mut vec![0; 3 * SEGMENT as usize])
            .expect("read");
    });
    assert!(clients[2].is_mapped("s1").expect("a server"));
    assert!(!clients[1].is_mapped("s1").expect("a server"));
    let end = 3 * SEGMENT;
    let mut model = vec![0; end as usize];
    let mut turn = 0;
    for edge in (0..=end).step_by(1 << 16) {
        for start in edge.saturating_sub(1)..=(edge + 1).min(end) {
            for len in [
                1,
                2,
                3,
                4096,
                (1 << 16) - 1,
                (1 << 16) + 1,
                SEGMENT,
                SEGMENT + 2,
            ] {
                if start + len > end {
                    continue;
                }
                turn += 1;
                let range = start as usize..(start + len) as usize;
                let bytes: Vec<u8> = (0..len).map(|at| (at ^ turn) as u8).collect();
                let writer = turn as usize % clients.len();
                clients[writer].write(start, &bytes).expect("written");
                model[range.clone()].copy_from_slice(&bytes);
                let mut found = vec![0; len as usize];
                for (space, way) in clients.iter_mut().zip(WAYS) {
                    space.read(start, &mut found).expect("read");
                    assert!(found == model[range.clone()], "{len} at {start}, {way:?}");
                }
            }
        }
    }
    for space in &mut clients {
        let mut whole = vec![0; end as usize];
        space.read(0, &mut whole).expect("read");
        assert!(whole == model);
    }
}

#[test]
fn numbers_at_the_ends_of_segments() {
    let servers = Servers::start(2, SEGMENT, "");
    for way in WAYS {
        let mut space = client(&servers, way, PATIENT);
        for offset in [0, SEGMENT - 8, SEGMENT, 2 * SEGMENT - 8] {
            let before = space.fetch_add(offset, 1).expect("added");
            let exchanged = space.compare_exchange(offset, before + 1, before + 5);
            assert_eq!(exchanged.expect("asked"), Ok(before + 1));
            let mut bytes = [0; 8];
            space.read(offset, &mut bytes).expect("read");
            assert_eq!(u64::from_le_bytes(bytes), before + 5, "{way:?}");
        }
        let misaligned = space.fetch_add(SEGMENT - 4, 1);
        assert!(matches!(misaligned, Err(SpaceError::Misaligned { .. })));
    }
}

#[test]
fn offsets_near_the_greatest_number_are_refused() {
    let servers = Servers::start(2, SEGMENT, "");
    let mut space = client(&servers, Way::Mapped, PATIENT);
    space.write(0, &[7; 16]).expect("written");
    for back in [0, 1, 7, 8, 15, 4095, SEGMENT] {
        let offset = u64::MAX - back;
        let mut bytes = [9; 16];
        let refused = |result: Result<(), SpaceError>| {
            assert!(
                matches!(result, Err(SpaceError::OutOfRange(_))),
                "{offset}: {result:?}"
            );
        };
        refused(space.read(offset, &mut bytes));
        refused(space.write(offset, &bytes));
        refused(space.fill(offset, 1, 1));
        refused(space.fill(1, offset, 1));
        refused(space.fetch_add(offset / 8 * 8, 1).map(drop));
        assert_eq!(bytes, [9; 16]);
    }
    let mut bytes = [0; 16];
    space.read(0, &mut bytes).expect("read");
    assert_eq!(bytes, [7; 16]);
}

#[test]
fn batches_over_two_servers() {
    let servers = Servers::start(2, SEGMENT, "");
    let mut space = client(&servers, Way::Tcp, PATIENT);
    let mut batch = Batch::new();
    batch
        .write(SEGMENT - 3, b"end")
        .write(SEGMENT, b"begin")
        .fetch_add(8, 41)
        .fetch_add(8, 1)
        .read(SEGMENT - 3, 3)
        .compare_exchange(8, 42, 7);
    let answers = space.batch(&batch).expect("carried out");
    assert_eq!(answers[3], BatchAnswer::Value(41));
    assert_eq!(answers[4], BatchAnswer::Bytes(b"end".to_vec()));
    assert_eq!(answers[5], BatchAnswer::Exchanged(Ok(42)));
    let mut bytes = [0; 8];
    space.read(SEGMENT - 3, &mut bytes).expect("read");
    assert_eq!(&bytes, b"endbegin");
}

#[test]
fn a_space_of_the_documentation() {
    let servers = Servers::start(2, 1 << 20, "");
    let mut space = client(&servers, Way::Unix, PATIENT);
    space
        .write(1 << 20, b"over a boundary or not")
        .expect("written");
    let mut bytes = [0; 4];
    space.read(1 << 20, &mut bytes).expect("read");
    assert_eq!(&bytes, b"over");
    let before = space.fetch_add(4096, 1).expect("added");
    assert_eq!(
        space.compare_exchange(4096, before + 1, 0).expect("asked"),
        Ok(1)
    );
    let tickets: Vec<_> = (0..16)
        .map(|at| space.submit_read(at * 4096, 4096).expect("room"))
        .collect();
    for ticket in tickets {
        space.wait(ticket).expect("read");
    }
    for (name, said) in space.stat() {
        let said: serde_json::Value = serde_json::from_str(&said.expect("said")).expect("JSON");
        assert_eq!(said["server"], name.as_str());
        assert!(said["operations"].as_u64() > Some(0));
    }
}
