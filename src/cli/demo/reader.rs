//! The reader of a demonstration: waits at the replica for epochs and measures how
//! old the stamps in them are when it wakes.
//!
//! The latency of a store is the time from its stamp, taken just before the store,
//! to the reader's return from the wait for the epoch that first shows it. Both
//! clocks are the host's monotonic one. A cell that was stored to again before an
//! epoch was made counts with its newest stamp.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::super::NodeAt;
use super::super::args::DemoReaderArgs;
use super::super::output::Output;
use super::chain::{CHAINS, LINKS, is_whole};
use super::children::on_end_of_input;
use super::latency::{Latencies, Recorder};
use super::workload::{CELL_BYTES, CELLS, TIMER_CELLS, cell_offset, chain_offset, parse_cell};
use crate::client::Reader;
use crate::region::ReadError;
use crate::sys::process::monotonic_ns;
use crate::words::Mode;

/// Longest wait for an epoch before the reader looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// What the reader says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "reader", rename_all = "snake_case")]
pub(super) enum FromReader {
    /// It waits for epochs.
    Ready,
    /// It was told to end.
    Measured {
        /// Epochs it woke for.
        epochs: u64,
        /// Epochs whose chains it checked; none where there are no chains.
        checked: Option<u64>,
        /// Those among them that were no instant of the source.
        torn: Option<u64>,
        /// Store to reader awake, found by timer.
        latency_us: Latencies,
        /// Entry of `commit()` to reader awake.
        commit_latency_us: Latencies,
    },
}

impl FromReader {
    /// Epochs whose chains were checked, and those that were torn.
    pub(super) fn torn(&self) -> (Option<u64>, Option<u64>) {
        match self {
            Self::Ready => (None, None),
            Self::Measured { checked, torn, .. } => (*checked, *torn),
        }
    }
}

/// Measures until standard input ends.
pub(in super::super) fn run(args: &DemoReaderArgs, node: &NodeAt) -> anyhow::Result<()> {
    let reader = Reader::attach(node.path(), args.region.as_str())
        .context("attaching the replica of the demonstration")?;
    let ended = Arc::new(AtomicBool::new(false));
    let end = Arc::clone(&ended);
    // Relaxed: the flag carries nothing but itself.
    on_end_of_input(move || end.store(true, Ordering::Relaxed))?;
    let mut out = Output::new();
    out.json_line(&FromReader::Ready)?;
    let mut seen = Seen::new(reader.size());
    let mut after = reader.control().epoch();
    let mut epochs = 0;
    let has_chains = args.mode == Mode::Sync;
    let (mut checked, mut torn) = (0, 0);
    while !ended.load(Ordering::Relaxed) {
        match reader.wait_epoch(after, LOOK) {
            Ok(epoch) => after = epoch,
            Err(ReadError::TimedOut) => continue,
            Err(error) => return Err(error).context("waiting for an epoch of the replica"),
        }
        let now = monotonic_ns();
        epochs += 1;
        seen.look(&reader, now)?;
        if has_chains {
            check_chains(&reader, &mut checked, &mut torn)?;
        }
    }
    out.json_line(&FromReader::Measured {
        epochs,
        checked: has_chains.then_some(checked),
        torn: has_chains.then_some(torn),
        latency_us: seen.timer.summary(),
        commit_latency_us: seen.commit.summary(),
    })?;
    Ok(out.done()?)
}

/// Counts an epoch at which the chains are not of one instant.
fn check_chains(reader: &Reader, checked: &mut u64, torn: &mut u64) -> anyhow::Result<()> {
    let size = reader.size();
    let read = reader.read_at_epoch(|view| {
        let mut chains = [[(0, 0); LINKS as usize]; CHAINS as usize];
        for (chain, links) in chains.iter_mut().enumerate() {
            for (link, numbers) in links.iter_mut().enumerate() {
                let at = chain_offset(chain as u64, link as u64, size);
                *numbers = (view.load(at)?, view.load(at + 8)?);
            }
        }
        Ok::<_, crate::units::OutOfRange>(chains)
    });
    match read {
        Ok((chains, _)) => {
            *checked += 1;
            *torn += u64::from(!chains?.iter().all(is_whole));
            Ok(())
        }
        Err(ReadError::Overrun | ReadError::Syncing) => Ok(()),
        Err(error) => Err(error).context("reading the chains at the replica"),
    }
}

/// The counts of all cells as last seen, and what was measured.
struct Seen {
    size: u64,
    counts: Vec<u64>,
    timer: Recorder,
    commit: Recorder,
}

impl Seen {
    fn new(size: u64) -> Seen {
        Seen {
            size,
            counts: vec![0; CELLS as usize],
            timer: Recorder::new(),
            commit: Recorder::new(),
        }
    }

    fn look(&mut self, reader: &Reader, now_ns: u64) -> anyhow::Result<()> {
        let size = self.size;
        let read = reader.read_at_epoch(|view| {
            let mut cells = [[0; CELL_BYTES]; CELLS as usize];
            for (index, cell) in cells.iter_mut().enumerate() {
                view.read(cell_offset(index as u64, size), cell)?;
            }
            Ok::<_, crate::units::OutOfRange>(cells)
        });
        let cells = match read {
            Ok((cells, _)) => cells?,
            // Updates come too fast to see one whole, or the replica is being
            // synced: the next epoch shows the same cells.
            Err(ReadError::Overrun | ReadError::Syncing) => return Ok(()),
            Err(error) => return Err(error).context("reading the replica"),
        };
        for (index, cell) in cells.into_iter().enumerate() {
            let (count, stamp) = parse_cell(cell);
            if self.counts[index] == count {
                continue;
            }
            self.counts[index] = count;
            // An epoch newer than the one that woke may show stores made since.
            if stamp < now_ns {
                let recorder = if (index as u64) < TIMER_CELLS {
                    &mut self.timer
                } else {
                    &mut self.commit
                };
                recorder.record(now_ns - stamp);
            }
        }
        Ok(())
    }
}
