//! Runs from seeds; a seed that fails is printed.

use uffd_sync::ordered::{Exact, Rules};

use crate::is_long;
use crate::world::{Report, World};

fn seeds() -> std::ops::Range<u64> {
    let one = std::env::var("UFFD_SYNC_SEED").ok();
    match one.and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..if is_long() { 10_000 } else { 500 },
    }
}

fn run<R: Rules>(seed: u64) -> Result<Report, String> {
    World::<R>::new(seed).run()
}

/// Every `of`th seed, from `first`.
fn run_some(first: u64, of: u64) -> Report {
    let mut sum = Report::default();
    for seed in seeds().filter(|seed| seed % of == first) {
        let report = run::<Exact>(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        sum.add(&report);
    }
    sum
}

#[test]
fn one_order_whatever_happens() {
    let halves = [0, 1].map(|first| std::thread::spawn(move || run_some(first, 2)));
    let mut sum = Report::default();
    for half in halves {
        match half.join() {
            Ok(report) => sum.add(&report),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    println!("{sum:?}");
    let reached = [
        ("operations", sum.operations),
        ("cuts", sum.cuts),
        ("half-open connections", sum.half_open),
        ("pauses", sum.pauses),
        ("crashes", sum.crashes),
        ("stops", sum.stopped),
        ("crashes of who shares nothing", sum.harmless),
        ("unknown outcomes", sum.indeterminate),
        ("histories that are linearisable", sum.linearisable),
        ("messages sent again", sum.resumed),
    ];
    if std::env::var_os("UFFD_SYNC_SEED").is_none() {
        for (name, count) in reached {
            assert!(count > 0, "no {name} in {sum:?}");
        }
    }
}

macro_rules! broken {
    ($test:ident, $name:ident, $rule:ident) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        struct $name;
        impl Rules for $name {
            const $rule: bool = false;
        }

        #[test]
        fn $test() {
            let found = (0..500).find_map(|seed| Some((seed, run::<$name>(seed).err()?)));
            let (seed, why) = found.expect("a broken rule has to be noticed");
            println!("seed {seed}: {why}");
        }
    };
}

broken!(
    a_commit_that_keeps_the_clock_is_noticed,
    CommitKeepsClock,
    COMMIT_RAISES_CLOCK
);
broken!(ties_by_arrival_are_noticed, TiesByArrival, TIES_BY_ID);
broken!(a_queue_per_variable_is_noticed, QueuePerVariable, ONE_QUEUE);
broken!(
    application_at_the_commit_is_noticed,
    AppliedAtCommit,
    WAITS_ITS_TURN
);
broken!(sequencers_of_pairs_are_noticed, ShareTwo, SHARE_ANY);
