//! Writes to a segment on this host in its memory, against memcpy of as many bytes.

use std::hint::black_box;
use std::time::Instant;

use anyhow::ensure;

use crate::harness::{Options, Outcome, Rounds, scattered};
use crate::servers::Servers;
use crate::work::{Over, SEGMENT, pattern};

const PAGE: &str = "written-4k";
const LARGE: &str = "written-1m";
pub(crate) const CASES: &[&str] = &[PAGE, LARGE];

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let servers = Servers::start_with(1, "local_writers = true\n")?;
    let mut space = servers.connect(Over::Unix, false)?;
    // The first one is asked of the server; with its connection comes the memory.
    space.read(0, &mut [0; 8])?;
    ensure!(
        space.is_writable("s0")?,
        "the segment was not mapped to be written"
    );
    let source = pattern(0, SEGMENT as usize);
    let mut own = source.clone();
    let mut outcomes = Vec::new();
    for (name, len, count) in [(PAGE, 4096, 8192), (LARGE, 1 << 20, 32)] {
        let count = options.pick(count / 4, count);
        let places: Vec<u64> = scattered(SEGMENT / len as u64)
            .into_iter()
            .take(count)
            .map(|place| place * len as u64)
            .collect();
        let rounds = Rounds::run(options, 2, |variant, _| {
            let begun = Instant::now();
            for offset in &places {
                let range = *offset as usize..*offset as usize + len;
                let bytes = black_box(&source[range.clone()]);
                match variant {
                    0 => space.write(*offset, bytes)?,
                    _ => black_box(&mut own[range]).copy_from_slice(bytes),
                }
            }
            Ok(begun.elapsed().as_nanos() as f64 / places.len() as f64)
        })?;
        let memcpy = ("memcpy of as many bytes", rounds.of(1));
        outcomes.push(Outcome::times(name, "ns", rounds.of(0), memcpy));
    }
    // What was written over is the same everywhere only if each byte went to its place.
    servers.verify()?;
    Ok(outcomes)
}
