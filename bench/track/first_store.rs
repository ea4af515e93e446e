//! What the first store to an armed page costs the writer.
//!
//! Each variant stores once to every page of its memory, in the same scattered
//! order, and is then armed again outside the clock: the crate's by a capture, the
//! bare kernel by `UFFDIO_WRITEPROTECT`, the third by mprotect. Three quarters of
//! the stores are timed as a whole, which gives the value; the rest one by one,
//! which gives the distribution (a reading of the clock, some 25 ns, included).

use std::time::Instant;

use anyhow::ensure;

use crate::harness::{
    BareScan, BareUffd, Goal, Latencies, Options, Outcome, Rounds, pages_in, scattered,
};
use crate::memory::Memory;
use crate::segv::Handler;
use crate::tracked::Tracked;

const BARE: &str = "first-store/bare-kernel";
const SIGSEGV: &str = "first-store/mprotect-sigsegv";
const UNTRACKED: &str = "first-store/untracked";

pub(crate) const CASES: &[&str] = &[BARE, SIGSEGV, UNTRACKED];

struct Subjects {
    order: Vec<u64>,
    tracked: Tracked,
    bare: (Memory, BareUffd, BareScan),
    segv: (Memory, Handler),
    untracked: Memory,
    latencies: [Latencies; 4],
}

impl Subjects {
    fn new(pages: u64) -> anyhow::Result<Self> {
        let bare = Memory::new(pages)?;
        let uffd = BareUffd::new(bare.span())?;
        uffd.protect(bare.span())?;
        let segv = Memory::new(pages)?;
        let handler = Handler::install(&segv)?;
        Ok(Self {
            order: scattered(pages),
            tracked: Tracked::new(pages)?,
            bare: (bare, uffd, BareScan::new(1024)?),
            segv: (segv, handler),
            untracked: Memory::new(pages)?,
            latencies: [
                Latencies::new()?,
                Latencies::new()?,
                Latencies::new()?,
                Latencies::new()?,
            ],
        })
    }

    /// One round of one variant: nanoseconds per store.
    fn measure(&mut self, variant: usize, round: usize) -> anyhow::Result<f64> {
        let seed = (round as u64 + 1) << 32;
        let (order, latencies) = (&self.order, &mut self.latencies[variant]);
        let pages = order.len() as u64;
        match variant {
            0 => {
                let ns = stores(&self.tracked.memory, order, seed, latencies);
                let (captured, _) = self.tracked.capture()?;
                ensure!(captured.dirty_pages == pages, "the capture missed a page");
                self.tracked.verify(order)?;
                verify(&self.tracked.memory, seed)?;
                Ok(ns)
            }
            1 => {
                let (memory, uffd, scan) = &mut self.bare;
                let ns = stores(memory, order, seed, latencies);
                ensure!(
                    pages_in(scan.look(memory.span())?) == pages,
                    "the scan missed a page"
                );
                verify(memory, seed)?;
                uffd.protect(memory.span())?;
                Ok(ns)
            }
            2 => {
                let (memory, handler) = &self.segv;
                handler.protect()?;
                let ns = stores(memory, order, seed, latencies);
                ensure!(handler.dirty() == pages, "the handler missed a page");
                verify(memory, seed)?;
                Ok(ns)
            }
            _ => {
                let ns = stores(&self.untracked, order, seed, latencies);
                verify(&self.untracked, seed)?;
                Ok(ns)
            }
        }
    }
}

fn stores(memory: &Memory, order: &[u64], seed: u64, latencies: &mut Latencies) -> f64 {
    let (whole, single) = order.split_at(order.len() / 4 * 3);
    let started = Instant::now();
    for page in whole {
        memory.store(*page, seed | *page);
    }
    let ns = started.elapsed().as_nanos() as f64 / whole.len() as f64;
    let mut before = Instant::now();
    for page in single {
        memory.store(*page, seed | *page);
        let after = Instant::now();
        latencies.record((after - before).as_nanos() as u64);
        before = after;
    }
    ns
}

fn verify(memory: &Memory, seed: u64) -> anyhow::Result<()> {
    let good = (0..memory.pages()).all(|page| memory.load(page) == seed | page);
    ensure!(good, "the memory does not hold what was stored");
    Ok(())
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut subjects = Subjects::new(options.pick(4096, 32_768))?;
    let rounds = Rounds::run(options, 4, |variant, round| {
        subjects.measure(variant, round)
    })?;
    let [async_ns, bare_ns, segv_ns, plain_ns] = [0, 1, 2, 3].map(|variant| rounds.of(variant));
    let [ours, bare, segv, plain] = &subjects.latencies;
    Ok(vec![
        Outcome::times(
            BARE,
            "ns",
            async_ns,
            ("the same fault by plain system calls", bare_ns),
        )
        .goal(Goal::AtMost(1.1))
        .latency("async", ours)
        .latency("bare", bare),
        Outcome::less(
            SIGSEGV,
            "ns",
            async_ns,
            ("mprotect and a SIGSEGV handler", segv_ns),
        )
        .goal(Goal::AtLeast(4.0))
        .latency("mprotect", segv),
        Outcome::times(
            UNTRACKED,
            "ns",
            async_ns,
            ("a store to an untracked page", plain_ns),
        )
        .latency("untracked", plain),
    ])
}
