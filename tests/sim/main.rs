//! The deterministic cluster: real publication, real appliers, real frame bytes, a
//! virtual clock, and links that are slow, cut at any byte, or lose what they carry.
//!
//! Every epoch that a replica shows is compared with the source's content at that
//! epoch; once faults end, all become equal. A failing seed is printed;
//! `UFFD_SYNC_SEED=N` runs that one alone, `UFFD_SYNC_LONG=1` runs 10,000.

mod link;
mod replica;
mod rng;
mod source;
mod world;

use world::{Control, Report, World};

fn seeds(short: u64, long: u64) -> std::ops::Range<u64> {
    if let Some(seed) = std::env::var("UFFD_SYNC_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
    {
        return seed..seed + 1;
    }
    let is_long = std::env::var_os("UFFD_SYNC_LONG").is_some_and(|value| value == "1");
    0..if is_long { long } else { short }
}

fn run_all(replicas: usize, seeds: std::ops::Range<u64>) -> Report {
    let mut sum = Report::default();
    for seed in seeds {
        let report = World::new(seed, replicas, Control::None)
            .run()
            .unwrap_or_else(|why| panic!("seed {seed} with {replicas} replicas: {why}"));
        sum.epochs += report.epochs;
        sum.put_off += report.put_off;
        sum.aborted += report.aborted;
        sum.cuts += report.cuts;
        sum.early += report.early;
        sum.lost += report.lost;
        sum.replicas.shown += report.replicas.shown;
        sum.replicas.in_place += report.replicas.in_place;
        sum.replicas.in_parts += report.replicas.in_parts;
        sum.replicas.ignored += report.replicas.ignored;
        sum.replicas.dropped += report.replicas.dropped;
    }
    sum
}

/// Runs must reach what they are for.
fn assert_reached(report: &Report, what: &str) {
    let reached = [
        ("cuts", report.cuts),
        ("epochs shown", report.replicas.shown),
        ("updates in parts", report.replicas.in_parts),
        ("pieces in place", report.replicas.in_place),
        ("updates ignored", report.replicas.ignored),
        ("updates dropped", report.replicas.dropped),
        ("captures put off", report.put_off),
        ("updates given up", report.aborted),
        ("updates begun early", report.early),
        ("captures begun anew", report.lost),
    ];
    if std::env::var_os("UFFD_SYNC_SEED").is_none() {
        for (name, count) in reached {
            assert!(count > 0, "{what}: no {name} in {report:?}");
        }
    }
}

#[test]
fn two_nodes_show_only_epochs_of_the_source() {
    assert_reached(&run_all(1, seeds(200, 7_000)), "two nodes");
}

#[test]
fn three_replicas_show_only_epochs_of_the_source() {
    assert_reached(&run_all(3, seeds(100, 3_000)), "three replicas");
}

/// The first seed at which a broken rule is noticed.
fn noticed(control: Control) -> Option<(u64, String)> {
    (0..120).find_map(|seed| {
        let found = World::new(seed, 1, control).run().err()?;
        Some((seed, found))
    })
}

#[test]
fn without_pre_images_an_epoch_is_torn() {
    let (_, why) = noticed(Control::NoPreImages).expect("it has to be noticed");
    assert!(why.contains("differs from the source's"), "{why}");
}

#[test]
fn without_giving_up_what_a_lost_capture_began_an_epoch_is_torn() {
    let (_, why) = noticed(Control::NoGivingUp).expect("it has to be noticed");
    assert!(why.contains("differs from the source's"), "{why}");
}

#[test]
fn without_the_base_check_an_epoch_is_wrong() {
    let (_, why) = noticed(Control::NoBaseCheck).expect("it has to be noticed");
    assert!(why.contains("differs from the source's"), "{why}");
}

#[test]
fn without_keeping_extents_until_the_ack_an_epoch_is_wrong() {
    let (_, why) = noticed(Control::DropAtSend).expect("it has to be noticed");
    assert!(why.contains("differs from the source's"), "{why}");
}
