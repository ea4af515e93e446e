//! Mode `sync` and writers that mean harm, or are in the way without meaning it: mappings
//! that go while nothing is stored, and regions at rest.

use uffd_sync::units::MIB;
use uffd_sync::words::{LossKind, Mode, Publish};

use super::deeds::{Deed, pages};
use super::exact::may_be_exact;
use super::nodes::{NodeProcess, await_that, folder, long};
use super::watched::Watched;
use super::writer::{More, Order, Report, WriterProcess};

#[test]
fn nothing_stored_is_no_standstill_and_nothing_committed_is() {
    if !may_be_exact() {
        return;
    }
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let mut resting =
        WriterProcess::with_region(node.socket(), "resting", MIB, Mode::Sync, Publish::Timer);
    resting.write(5, b"the last for long");
    let mut holding =
        WriterProcess::with_region(node.socket(), "holding", MIB, Mode::Sync, Publish::Commit);
    holding.commit(0);
    holding.write(5, b"never committed");
    let standstill = |name| {
        let losses = node.region(name).expect("it is there").losses;
        losses
            .into_iter()
            .find(|it| it.kind == LossKind::Standstill)
    };
    await_that("the standstill is told", || standstill("holding").is_some());
    let told = standstill("holding").expect("just seen");
    assert!(told.reason.contains("has not committed"), "{told:?}");
    // It had nothing to do for as long.
    await_that("the other has rested for longer", || {
        let audit = node.region("resting").and_then(|it| it.audit);
        audit.is_some_and(|it| it.mapping_rounds >= 14)
    });
    assert_eq!(node.region("resting").expect("it is there").losses, []);
}

#[test]
fn a_mapping_that_goes_while_nothing_is_stored_is_noticed_in_mode_sync() {
    if !may_be_exact() {
        return;
    }
    let (offset, len) = (pages(16), pages(8));
    let day = 86_400_000;
    for deed in [
        Deed::MoveAway { offset, len },
        Deed::Unmap { offset, len },
        Deed::MapOver {
            offset,
            len,
            byte: 0xEE,
        },
    ] {
        let mut watched = Watched::audited(day, MIB, Mode::Sync, Publish::Timer, More::default());
        watched.deed(deed.clone());
        watched.await_loss(&[LossKind::Untracked]);
        if let Deed::MoveAway { .. } = deed {
            // What is stored there is followed all the same.
            watched.deed(Deed::StoreMoved {
                offset: pages(2) + 1,
                byte: 0xA7,
            });
            watched.expect(pages(18) + 1, &[0xA7]);
        }
        watched.store(pages(100), b"and beside it");
        watched.await_equal();
        let region = watched.region();
        assert_eq!(region.mode, Some(Mode::Sync));
        assert_eq!(region.tracking, Some(Mode::Compare), "{deed:?}");
        let refused = watched.source.connect().cut(super::watched::REGION);
        let refused = refused.expect_err("no cuts are made any more").to_string();
        assert!(refused.contains("unmapped, moved"), "{refused}");
    }
}

#[test]
fn the_audit_of_mappings_takes_nothing_in_use_for_gone() {
    if !may_be_exact() {
        return;
    }
    let mut watched = Watched::new(8 * MIB, Mode::Sync, Publish::Timer, More::default());
    watched.writer.send(&Order::Beat);
    let rounds = |watched: &Watched| {
        let audit = watched.region().audit.expect("it is audited");
        audit.mapping_rounds
    };
    let enough = rounds(&watched) + if long() { 60 } else { 5 };
    await_that("the audit gets round while pages are stored to", || {
        rounds(&watched) >= enough
    });
    let Report::Beaten { stores, .. } = watched.writer.order(&Order::Stop) else {
        panic!("not the end of a beat");
    };
    assert!(stores > 0);
    watched.expect_no_loss();
}
