//! The writer of a demonstration: a process of its own that stores into its region
//! as any program would, and lets the node find out.
//!
//! It speaks in lines of JSON: `Ready`, then, once told to go, `Progress` some ten
//! times a second, and at the end `Finished`. It keeps its region until its standard
//! input ends.

use std::io::{self, BufRead};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::super::NodeAt;
use super::super::args::DemoWriterArgs;
use super::super::output::Output;
use super::chain::{self, CHAINS};
use super::workload::{
    BULK_PIECE, COMMIT_CELLS, Phase, Places, TIMER_CELLS, bulk_offsets, cell, cell_offset,
};
use crate::client::{Writer, WriterOptions};
use crate::sys::process::monotonic_ns;
use crate::words::Mode;

/// Pause between two groups of scattered counters.
const COUNTER_PAUSE: Duration = Duration::from_micros(500);
/// Pause between two bursts.
const BURST_PAUSE: Duration = Duration::from_millis(40);
/// Pause between two commits.
const COMMIT_PAUSE: Duration = Duration::from_micros(500);
/// How long one commit may take.
const COMMIT_DEADLINE: Duration = Duration::from_secs(10);
/// How long the replica may take to acknowledge the last epoch.
const ACK_DEADLINE: Duration = Duration::from_secs(60);
const PROGRESS_PAUSE: Duration = Duration::from_millis(100);

/// What the writer says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "writer", rename_all = "snake_case")]
pub(super) enum FromWriter {
    /// The region is there.
    Ready,
    /// The workload is under way.
    Progress {
        /// Part of the time that has passed, 0 to 1.
        done: f64,
        /// What it does at present.
        phase: String,
    },
    /// The workload is over and the replica has acknowledged all of it.
    Finished {
        /// Stores made, the bulk rewrite counted by pieces.
        stores: u64,
        /// Commits among them.
        commits: u64,
    },
}

/// Runs the writer to its end.
pub(in super::super) fn run(args: &DemoWriterArgs, node: &NodeAt) -> anyhow::Result<()> {
    let options = WriterOptions {
        shared: true,
        mode: args.mode,
        ..WriterOptions::default()
    };
    let region = Writer::create(node.path(), args.region.as_str(), args.size.0, &options)
        .context("creating the region of the demonstration")?;
    let mut out = Output::new();
    out.json_line(&FromWriter::Ready)?;
    let mut input = io::stdin().lock();
    let mut line = String::new();
    if input
        .read_line(&mut line)
        .context("waiting for the start")?
        == 0
    {
        return Ok(());
    }
    let mut work = Work {
        region: Arc::new(region),
        places: Places::new(0x5eed, args.size.0),
        size: args.size.0,
        stores: 0,
        commits: 0,
        bulk_done: false,
    };
    let time = Duration::from_secs(args.seconds);
    if args.mode == Mode::Sync {
        work.run_with_chains(time, &mut out)?;
    } else {
        work.run(time, &mut out)?;
    }
    work.publish()?;
    out.json_line(&FromWriter::Finished {
        stores: work.stores,
        commits: work.commits,
    })?;
    // The region lives as long as this process: until the content was compared.
    while matches!(input.read_line(&mut line), Ok(n) if n > 0) {
        line.clear();
    }
    Ok(())
}

struct Work {
    region: Arc<Writer>,
    places: Places,
    size: u64,
    stores: u64,
    commits: u64,
    bulk_done: bool,
}

impl Work {
    fn run(&mut self, time: Duration, out: &mut Output) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut told = begin;
        loop {
            let passed = begin.elapsed();
            if passed >= time {
                break;
            }
            let done = passed.as_secs_f64() / time.as_secs_f64();
            let phase = Phase::at(done);
            if told.elapsed() >= PROGRESS_PAUSE {
                told = Instant::now();
                let phase = phase.title().to_owned();
                out.json_line(&FromWriter::Progress { done, phase })?;
            }
            match phase {
                Phase::Counters => self.counters(8, COUNTER_PAUSE)?,
                Phase::Bursts => self.counters(2_000, BURST_PAUSE)?,
                Phase::Bulk => self.bulk()?,
                Phase::Commits => self.record()?,
            }
        }
        Ok(())
    }

    /// The same while threads store chains, which the reader checks at every epoch.
    fn run_with_chains(&mut self, time: Duration, out: &mut Output) -> anyhow::Result<()> {
        let stop = AtomicBool::new(false);
        let region = Arc::clone(&self.region);
        let chained = thread::scope(|scope| {
            let (region, stop) = (&region, &stop);
            let chains = (0..CHAINS)
                .map(|chain| scope.spawn(move || chain::store(region, chain, stop)))
                .collect::<Vec<_>>();
            let result = self.run(time, out);
            stop.store(true, Ordering::Relaxed);
            let mut stores = 0;
            for chain in chains {
                let stored = chain.join().map_err(|_| anyhow::anyhow!("a chain broke"))?;
                stores += 2 * stored.context("storing a chain")?;
            }
            result.map(|()| stores)
        })?;
        self.stores += chained;
        Ok(())
    }

    fn publish(&self) -> anyhow::Result<()> {
        let epoch = self
            .region
            .commit(COMMIT_DEADLINE)
            .context("the last commit")?;
        epoch
            .wait_acked(1, ACK_DEADLINE)
            .context("waiting for the replica to acknowledge the last epoch")
    }

    /// Adds one to `count` counters, then to one with a stamp.
    fn counters(&mut self, count: u64, pause: Duration) -> anyhow::Result<()> {
        for _ in 0..count {
            let at = self.places.counter();
            let mut counter = [0; 8];
            self.region.read(at, &mut counter)?;
            let counter = u64::from_le_bytes(counter).wrapping_add(1);
            self.region.write(at, &counter.to_le_bytes())?;
        }
        self.stores += count;
        self.stamp_timer_cell()?;
        thread::sleep(pause);
        Ok(())
    }

    fn bulk(&mut self) -> anyhow::Result<()> {
        if self.bulk_done {
            // One rewrite is enough; the rest of its time goes to counters.
            return self.counters(8, COUNTER_PAUSE);
        }
        self.bulk_done = true;
        let mut piece = [0; BULK_PIECE];
        for at in bulk_offsets(self.size) {
            for word in piece.chunks_exact_mut(8) {
                word.copy_from_slice(&self.places.next().to_le_bytes());
            }
            self.region.write(at, &piece)?;
            self.stores += 1;
        }
        self.stamp_timer_cell()
    }

    /// A record of two counters and a stamp, published by a commit.
    fn record(&mut self) -> anyhow::Result<()> {
        for _ in 0..2 {
            let at = self.places.counter();
            self.region.write(at, &self.commits.to_le_bytes())?;
        }
        self.commits += 1;
        self.stores += 3;
        let index = TIMER_CELLS + self.commits % COMMIT_CELLS;
        let bytes = cell(self.commits, monotonic_ns());
        self.region.write(cell_offset(index, self.size), &bytes)?;
        self.region.commit(COMMIT_DEADLINE).context("committing")?;
        thread::sleep(COMMIT_PAUSE);
        Ok(())
    }

    fn stamp_timer_cell(&mut self) -> anyhow::Result<()> {
        self.stores += 1;
        let index = self.places.next() % TIMER_CELLS;
        let bytes = cell(self.stores, monotonic_ns());
        self.region.write(cell_offset(index, self.size), &bytes)?;
        Ok(())
    }
}
