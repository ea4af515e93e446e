//! What the kernel writes into a region on the program's behalf is shipped in every
//! mode: seen like a store where it is one, else found by the audit.

use uffd_sync::sys::uffd::{Features, OpenedBy, Uffd};
use uffd_sync::units::MIB;
use uffd_sync::words::{LossKind, Mode, Publish};

use super::deeds::{Deed, Way, pages};
use super::nodes::{await_content, await_that};
use super::pattern::Numbers;
use super::watched::{REGION, Watched};
use super::writer::More;

/// Ways that go through the page tables like a store.
const SEEN: [Way; 4] = [Way::Read, Way::Receive, Way::ReadVector, Way::RingRead];

/// Has the kernel write numbers over three pages.
fn take(watched: &mut Watched, way: Way, offset: u64, seed: u64) {
    let bytes = Numbers::new(seed).bytes(9_000);
    let path = watched.folder.path().join("taken");
    std::fs::write(&path, &bytes).expect("a file in the temporary folder");
    watched.deed(Deed::Take { way, offset, path });
    watched.expect(offset, &bytes);
    watched.mark(offset, bytes.len() as u64);
}

fn every_way_is_shipped(mode: Mode, publish: Publish) {
    let mut watched = Watched::new(MIB, mode, publish, More::default());
    for round in 0..2 {
        for (index, way) in (0..).zip(SEEN) {
            take(
                &mut watched,
                way,
                pages(8 * index) + 100,
                10 * round + index,
            );
            if publish == Publish::Commit {
                watched.writer.commit(0);
            }
            // Each on its own, so that it is armed again before the next round.
            watched.await_equal();
        }
    }
    let protects = matches!(mode, Mode::Async | Mode::Sync);
    if protects {
        watched.await_audit();
    }
    watched.expect_no_loss();
    // It faults like a store, and copies afterwards into the page that it holds: one that is
    // armed in between changes unseen, and the audit finds it.
    for round in 0..2 {
        take(&mut watched, Way::ProcessWrite, pages(40) + 100, 90 + round);
        if publish == Publish::Commit {
            watched.writer.commit(0);
        }
        watched.await_equal();
    }
    let mut losses = watched.region().losses;
    losses.retain(|loss| !(protects && loss.kind == LossKind::UnseenWrite));
    assert_eq!(losses, []);
}

#[test]
fn what_the_kernel_writes_is_seen_by_write_protection() {
    every_way_is_shipped(Mode::Async, Publish::Timer);
}

#[test]
fn what_the_kernel_writes_is_in_a_commit() {
    every_way_is_shipped(Mode::Async, Publish::Commit);
}

#[test]
fn what_the_kernel_writes_is_shipped_when_it_is_marked() {
    every_way_is_shipped(Mode::Manual, Publish::Timer);
}

#[test]
fn what_the_kernel_writes_is_in_a_cut() {
    // Faults of the kernel wait for an answer only where that is allowed.
    match Uffd::open(Features::PAGEFAULT_FLAG_WP) {
        Ok((_, OpenedBy::SystemCall | OpenedBy::Device)) => {}
        _ => {
            super::refused_calls::skip("a privileged userfaultfd is missing");
            return;
        }
    }
    every_way_is_shipped(Mode::Sync, Publish::Timer);
}

#[test]
fn what_the_kernel_writes_is_found_by_comparing() {
    every_way_is_shipped(Mode::Compare, Publish::Timer);
}

#[test]
fn fixed_reads_into_pinned_memory_are_shipped_in_every_mode() {
    for mode in [Mode::Async, Mode::Sync, Mode::Manual, Mode::Compare] {
        let mut watched = Watched::new(MIB, mode, Publish::Timer, More::default());
        // Pinned before it is armed the next time: registered reads are stores nobody sees.
        watched.deed(Deed::Pin {
            offset: 0,
            len: pages(64),
        });
        watched.store(pages(200), b"so that a capture arms everything again");
        watched.await_equal();
        for round in 0..3 {
            take(
                &mut watched,
                Way::RingReadFixed,
                pages(10 + round) + 9,
                round,
            );
            watched.await_equal();
        }
        let losses = watched.region().losses;
        let unseen = losses.iter().any(|loss| loss.kind == LossKind::UnseenWrite);
        let protects = matches!(mode, Mode::Async | Mode::Sync);
        assert_eq!(unseen, protects, "{mode}: {losses:?}");
    }
}

#[test]
fn control_without_the_audit_fixed_reads_are_lost_until_the_writer_ends() {
    let day = 86_400_000;
    let more = More::default();
    let mut watched = Watched::audited(day, MIB, Mode::Async, Publish::Timer, more);
    watched.deed(Deed::Pin {
        offset: 0,
        len: pages(64),
    });
    watched.store(pages(200), b"so that a capture arms everything again");
    watched.await_equal();
    // A page that is left open is compared, whoever writes it.
    await_that("no page is hot", || {
        watched.region().hot.is_some_and(|hot| hot.pages == 0)
    });
    let stale = watched.model.clone();
    take(&mut watched, Way::RingReadFixed, pages(10), 1);
    let before = watched.region().captures;
    await_that("captures go on", || watched.region().captures > before + 10);
    await_content(&watched.follower, REGION, &stale);
    watched.expect_no_loss();
    // Its end is a loss, and then everything is compared.
    let Watched {
        writer,
        follower,
        model,
        source,
        ..
    } = watched;
    writer.kill();
    await_content(&follower, REGION, &model);
    drop(source);
}
