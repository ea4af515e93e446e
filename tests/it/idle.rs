//! The region of a process that sleeps: left alone, and captured as soon as it wakes.

use std::time::{Duration, Instant};

use uffd_sync::units::PAGE_SIZE;
use uffd_sync::words::{Mode, Publish};

use super::nodes::await_some;
use super::watched::Watched;
use super::writer::More;

/// Time in which a region that is scanned at its longest pause is captured 25 times.
const WINDOW: Duration = Duration::from_millis(500);
/// Captures in that time of one whose writer sleeps: one each 500 ms, and its edges.
const FEW: u64 = 5;
/// Far longer than a store takes to be found, whatever else the machine does.
const SOON: Duration = Duration::from_secs(5);

#[test]
fn the_region_of_a_process_that_sleeps_is_scanned_seldom_and_no_store_is_missed() {
    let mut watched = Watched::audited(
        60_000,
        64 * PAGE_SIZE,
        Mode::Async,
        Publish::Timer,
        More::default(),
    );
    for round in 1..=20u8 {
        let captured = await_some("it is left alone", || {
            let before = watched.region().captures;
            std::thread::sleep(WINDOW);
            let captured = watched.region().captures - before;
            (captured <= FEW).then_some(captured)
        });
        assert!(captured <= FEW);
        let stored = Instant::now();
        watched.store(u64::from(round) * PAGE_SIZE + 7, &[round; 100]);
        watched.await_equal();
        assert!(
            stored.elapsed() < SOON,
            "found after {:?}",
            stored.elapsed()
        );
    }
    watched.expect_no_loss();
}

#[test]
fn stores_just_before_and_after_a_short_sleep_are_found() {
    let mut watched = Watched::audited(
        60_000,
        64 * PAGE_SIZE,
        Mode::Async,
        Publish::Timer,
        More::default(),
    );
    // Pauses around that between two looks, so that stores meet each moment of it.
    for round in 0..150u64 {
        let offset = round % 64 * PAGE_SIZE + round;
        watched.store(offset, &round.to_le_bytes());
        std::thread::sleep(Duration::from_micros(round * 977 % 45_000));
    }
    let stored = Instant::now();
    watched.await_equal();
    assert!(
        stored.elapsed() < SOON,
        "found after {:?}",
        stored.elapsed()
    );
    watched.expect_no_loss();
}
