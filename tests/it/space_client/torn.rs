//! Cells that say of themselves which write they are of: one that mixes two was torn.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{PATIENT, WAYS, Way, client};
use crate::space::servers::Servers;

/// Four stripes.
const SEGMENT: u64 = 4 << 16;

/// Where the cells lie in the space, and how long they are: within a stripe each.
const CELLS: [(u64, usize); 4] = [
    (0, 4096),
    (1 << 16, 1 << 16),
    (2 * (1 << 16) + 24, 40_000),
    (SEGMENT + (1 << 16) - 64, 64),
];

fn cell(tag: u64, len: usize) -> Vec<u8> {
    let word = |at: u64| tag.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ at;
    (0..len as u64 / 8)
        .flat_map(|at| word(at).to_le_bytes())
        .collect()
}

/// Whether all of it is of one write.
fn is_whole(bytes: &[u8]) -> bool {
    let words = bytes.chunks_exact(8).enumerate();
    let mut tags =
        words.map(|(at, word)| u64::from_le_bytes(word.try_into().expect("eight")) ^ at as u64);
    let first = tags.next();
    tags.all(|tag| Some(tag) == first)
}

#[test]
fn the_detector_finds_what_is_torn() {
    let (one, other) = (cell(1, 4096), cell(2, 4096));
    assert!(is_whole(&one) && is_whole(&other));
    for cut in [8, 16, 2048, 4088] {
        assert!(!is_whole(&[&one[..cut], &other[cut..]].concat()));
    }
    assert!(!is_whole(&[0; 64]), "nobody wrote it");
}

#[test]
fn no_cell_within_a_stripe_is_torn() {
    let servers = Servers::start(2, SEGMENT, "");
    let mut first = client(&servers, Way::Tcp, PATIENT);
    for (offset, len) in CELLS {
        first.write(offset, &cell(0, len)).expect("written");
    }
    let is_long = std::env::var_os("UFFD_SYNC_LONG").is_some_and(|long| long == "1");
    let time = Duration::from_secs(if is_long { 20 } else { 2 });
    let ends = AtomicBool::new(false);
    let until = Instant::now() + time;
    std::thread::scope(|scope| {
        let (servers, ends) = (&servers, &ends);
        for writer in 1..3 {
            scope.spawn(move || {
                let mut space = client(servers, WAYS[writer % 2], PATIENT);
                let mut tag = writer as u64;
                while !ends.load(Ordering::Relaxed) {
                    for (offset, len) in CELLS {
                        tag += 2;
                        space.write(offset, &cell(tag, len)).expect("written");
                    }
                }
            });
        }
        let readers = WAYS.map(|way| {
            scope.spawn(move || {
                let mut space = client(servers, way, PATIENT);
                let mut seen = 0;
                while !ends.load(Ordering::Relaxed) {
                    for (offset, len) in CELLS {
                        let mut bytes = vec![0; len];
                        space.read(offset, &mut bytes).expect("read");
                        assert!(is_whole(&bytes), "torn at {offset}, {way:?}");
                        seen += 1;
                    }
                }
                seen
            })
        });
        // Ends early if a reader has found something.
        while Instant::now() < until && readers.iter().all(|reader| !reader.is_finished()) {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        ends.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().expect("nothing torn") > 0);
        }
    });
}
