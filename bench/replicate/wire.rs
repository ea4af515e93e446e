//! Bytes on the wire for each byte changed, by pattern; against whole dirty pages.
//!
//! Counted by the source node as what it sent of the region's updates, frame
//! headers included; TCP's own headers and acknowledgements are not.

use anyhow::ensure;
use uffd_sync::client::Writer;
use uffd_sync::units::{MIB, PAGE_SIZE};
use uffd_sync::words::Mode;

use crate::harness::{Options, Outcome};
use crate::nodes::{PATIENCE, Pair};

const SIZE: u64 = 64 * MIB;

/// A pattern: name, runs of changed bytes, bytes in each, distance of their starts.
struct Pattern {
    case: &'static str,
    runs: u64,
    bytes: u64,
    stride: u64,
}

const PATTERNS: [Pattern; 6] = [
    Pattern {
        case: "wire/one-integer-of-4-bytes",
        runs: 1,
        bytes: 4,
        stride: 8,
    },
    Pattern {
        case: "wire/100-fields-of-8-bytes-far-apart",
        runs: 100,
        bytes: 8,
        stride: 5 * PAGE_SIZE,
    },
    Pattern {
        case: "wire/1000-records-of-64-bytes-of-256",
        runs: 1000,
        bytes: 64,
        stride: 256,
    },
    Pattern {
        case: "wire/every-second-word-of-64-pages",
        runs: 64 * 256,
        bytes: 8,
        stride: 16,
    },
    Pattern {
        case: "wire/one-byte-in-each-of-1000-pages",
        runs: 1000,
        bytes: 1,
        stride: PAGE_SIZE,
    },
    Pattern {
        case: "wire/1000-whole-pages",
        runs: 1000,
        bytes: PAGE_SIZE,
        stride: PAGE_SIZE,
    },
];

pub(crate) const CASES: &[&str] = &[
    PATTERNS[0].case,
    PATTERNS[1].case,
    PATTERNS[2].case,
    PATTERNS[3].case,
    PATTERNS[4].case,
    PATTERNS[5].case,
];

impl Pattern {
    fn changed(&self) -> u64 {
        self.runs * self.bytes
    }

    fn pages(&self) -> u64 {
        let touched = (0..self.runs).flat_map(|run| {
            let start = run * self.stride;
            start / PAGE_SIZE..=(start + self.bytes - 1) / PAGE_SIZE
        });
        let mut pages: Vec<u64> = touched.collect();
        pages.dedup();
        pages.len() as u64
    }

    fn apply(&self, writer: &Writer) -> anyhow::Result<()> {
        let mut bytes = vec![0; self.bytes as usize];
        for run in 0..self.runs {
            let at = run * self.stride;
            writer.read(at, &mut bytes)?;
            bytes
                .iter_mut()
                .for_each(|byte| *byte = byte.wrapping_add(1));
            writer.write(at, &bytes)?;
        }
        Ok(())
    }
}

pub(crate) fn run(_options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let pair = Pair::start([None; 2])?;
    let writer = pair.replicated("region", SIZE, Mode::Async)?;
    let mut outcomes = Vec::new();
    for pattern in &PATTERNS {
        let mut epoch = writer.commit(PATIENCE)?.number;
        let before = pair.bytes_sent("region", epoch)?;
        pattern.apply(&writer)?;
        let after = writer.commit(PATIENCE)?;
        ensure!(after.number > epoch, "{} changed nothing", pattern.case);
        epoch = after.number;
        let sent = pair.bytes_sent("region", epoch)? - before;
        pair.verify("region", &writer)?;
        let changed = pattern.changed() as f64;
        let per_byte = sent as f64 / changed;
        let whole = (pattern.pages() * PAGE_SIZE) as f64 / changed;
        let outcome = Outcome::less(
            pattern.case,
            "bytes per byte",
            per_byte,
            ("whole dirty pages without headers", whole),
        );
        outcomes.push(outcome.note(format!("{sent} bytes for {} changed", pattern.changed())));
    }
    drop(writer);
    pair.end()?;
    Ok(outcomes)
}
