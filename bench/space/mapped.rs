//! Reads of a segment on this host from its memory, against memcpy of as many bytes.

use std::hint::black_box;
use std::time::Instant;

use anyhow::ensure;

use crate::harness::{Goal, Options, Outcome, Rounds, scattered};
use crate::servers::Servers;
use crate::work::{Over, SEGMENT, check, pattern};

const PAGE: &str = "mapped-4k";
const LARGE: &str = "mapped-1m";
pub(crate) const CASES: &[&str] = &[PAGE, LARGE];

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let servers = Servers::start(1)?;
    let mut space = servers.connect(Over::Unix, false)?;
    // The first one is asked of the server; with its connection comes the memory.
    space.read(0, &mut [0; 8])?;
    ensure!(space.is_mapped("s0")?, "the segment was not mapped");
    let own = pattern(0, SEGMENT as usize);
    let mut outcomes = Vec::new();
    for (name, len, count) in [(PAGE, 4096, 8192), (LARGE, 1 << 20, 32)] {
        let count = options.pick(count / 4, count);
        let places: Vec<u64> = scattered(SEGMENT / len as u64)
            .into_iter()
            .take(count)
            .map(|place| place * len as u64)
            .collect();
        let mut out = vec![0; len];
        let rounds = Rounds::run(options, 2, |variant, _| {
            let begun = Instant::now();
            for offset in &places {
                match variant {
                    0 => space.read(*offset, &mut out)?,
                    _ => black_box(&mut out[..])
                        .copy_from_slice(black_box(&own[*offset as usize..][..len])),
                }
                check(*offset, &out)?;
            }
            Ok(begun.elapsed().as_nanos() as f64 / places.len() as f64)
        })?;
        let memcpy = ("memcpy of as many bytes", rounds.of(1));
        let outcome = Outcome::times(name, "ns", rounds.of(0), memcpy);
        outcomes.push(outcome.goal(Goal::AtMost(1.5)));
    }
    Ok(outcomes)
}
