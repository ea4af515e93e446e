//! Five processes count one variable up by compare-and-swap, each from what it last heard.

use std::time::{Duration, Instant};

use uffd_sync::client::variables::Value;

use crate::harness::{Options, Outcome, Rounds};
use crate::members::{COUNTED, Members, PATIENCE, count};

pub(crate) const CASES: &[&str] = &["contention/5"];

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut members = Members::start("skeen", 5)?;
    let time = options.pick(Duration::from_millis(200), Duration::from_secs(1));
    let mut shares: Vec<f64> = Vec::new();
    let mut tried = (0, 0);
    let rounds = Rounds::run(options, 2, |variant, round| {
        let before = held(&members)?;
        let started = Instant::now();
        let mut wins = Vec::new();
        if variant == 0 {
            for child in &mut members.children {
                child.tell(&format!("count {}", time.as_millis()), &[])?;
            }
        }
        let own = count(&members.variables, time)?;
        wins.push(own.1);
        let mut tries = own.0;
        if variant == 0 {
            for child in &mut members.children {
                let (line, _) = child.hear()?;
                let mut words = line.split(' ').map(str::parse::<u64>);
                tries += words.next().unwrap_or(Ok(0))?;
                wins.push(words.next().unwrap_or(Ok(0))?);
            }
        }
        let spent = started.elapsed().as_secs_f64();
        let all: u64 = wins.iter().sum();
        let counted = held(&members)? - before;
        anyhow::ensure!(
            counted == all as i64,
            "counted {counted}, {all} successes told"
        );
        if variant == 0 && round > 0 {
            let least = wins.iter().min().copied().unwrap_or(0);
            let most = wins.iter().max().copied().unwrap_or(1);
            shares.push(least as f64 / most.max(1) as f64);
            tried = (tried.0 + tries, tried.1 + all);
        }
        Ok(all as f64 / spent)
    })?;
    members.end()?;
    let baseline = ("one process alone", rounds.of(1));
    let fairness = crate::harness::median(&shares);
    Ok(vec![
        Outcome::times(CASES[0], "successes/s", rounds.of(0), baseline)
            .note(format!("fairness: the least successful process has {fairness:.2} of the most successful one's"))
            .note(format!("{} of {} tries succeeded", tried.1, tried.0)),
    ])
}

fn held(members: &Members) -> anyhow::Result<i64> {
    match members.variables.read_ordered(COUNTED, PATIENCE)? {
        Value::Integer(held) => Ok(held),
        Value::Bytes(_) => anyhow::bail!("the counter is no number"),
    }
}
