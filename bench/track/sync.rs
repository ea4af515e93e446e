//! What exact tracking costs the writer: one fault, and the longest store during a cut.
//!
//! The region is that of a node in this process; its threads have one core, the writer
//! the other. Each store of the fault case runs into a page that was armed and captured
//! before. In the stall cases the writer stores without a pause to random pages of a
//! share of the region, and cuts are asked for meanwhile; the value is the median over
//! the cuts of the longest store that was under way between the request and the answer.
//! What it is compared with is one `UFFDIO_WRITEPROTECT` over everything: the stall of a
//! cut that arms all in one withheld pass, before any of its other costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use uffd_sync::client::{self, Writer, WriterOptions};
use uffd_sync::node::{Node, NodeConfig};
use uffd_sync::sys::process::pin_to_cpu;
use uffd_sync::units::{GIB, MIB, PAGE_SIZE};
use uffd_sync::words::{Mode, Publish};

use crate::harness::{BareUffd, Goal, Latencies, Options, Outcome, Rounds, median, scattered};
use crate::memory::Memory;

const FAULT: &str = "sync-fault/bare-kernel";
const HOT: &str = "sync-stall/1GiB-hot-3%";

const CUT: &str = "sync-cut/1GiB-like-64MiB";

pub(crate) const CUT_CASES: &[&str] = &[CUT];

pub(crate) const FAULT_CASES: &[&str] = &[FAULT];

/// Size, pages dirtied per thousand, name.
const STALLS: [(u64, u64, &str); 9] = [
    (64 * MIB, 1, "sync-stall/64MiB-0.1%"),
    (64 * MIB, 10, "sync-stall/64MiB-1%"),
    (64 * MIB, 100, "sync-stall/64MiB-10%"),
    (256 * MIB, 1, "sync-stall/256MiB-0.1%"),
    (256 * MIB, 10, "sync-stall/256MiB-1%"),
    (256 * MIB, 100, "sync-stall/256MiB-10%"),
    (GIB, 1, "sync-stall/1GiB-0.1%"),
    (GIB, 10, "sync-stall/1GiB-1%"),
    (GIB, 100, "sync-stall/1GiB-10%"),
];

pub(crate) const STALL_CASES: &[&str] = &[
    STALLS[0].2,
    STALLS[1].2,
    STALLS[2].2,
    STALLS[3].2,
    STALLS[4].2,
    STALLS[5].2,
    STALLS[6].2,
    STALLS[7].2,
    STALLS[8].2,
    HOT,
];

const PATIENCE: Duration = Duration::from_secs(60);
/// Where the writer runs, and where the node.
const WRITER_CORE: usize = 0;
const NODE_CORE: usize = 1;

/// A node with one region in mode `sync`, every page of it allocated.
struct Region {
    // The region before its node.
    region: Arc<Writer>,
    control: client::Node,
    node: Node,
}

impl Region {
    /// Called on the node's core: its threads inherit it.
    fn new(size: u64) -> anyhow::Result<Self> {
        let node = Node::embedded(&NodeConfig::default())?;
        let connect =
            || -> anyhow::Result<client::Node> { Ok(client::Node::from_socket(node.connect()?)?) };
        let options = WriterOptions {
            mode: Mode::Sync,
            publish: Publish::Commit,
            ..WriterOptions::default()
        };
        let region = Writer::create_over(connect()?, "sync", size, &options)?;
        for page in 0..size / PAGE_SIZE {
            region.write(page * PAGE_SIZE, &(page + 1).to_le_bytes())?;
        }
        region.commit(PATIENCE)?;
        Ok(Self {
            region: Arc::new(region),
            control: connect()?,
            node,
        })
    }

    /// The last withheld pass, in microseconds.
    fn withheld_us(&mut self) -> anyhow::Result<f64> {
        let status = self.control.status()?;
        let region = status.regions.first().context("the region is there")?;
        let exact = region.exact.context("tracked exactly")?;
        ensure!(exact.voided == 0, "a cut was given up");
        Ok(exact.withheld_us as f64)
    }

    fn end(self) -> anyhow::Result<()> {
        drop(self.region);
        drop(self.control);
        Ok(self.node.stop()?)
    }
}

/// Runs a closure on a thread of its own on the writer's core.
fn on_writer_core<T: Send>(work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin_to_cpu(WRITER_CORE)?;
            Ok::<T, anyhow::Error>(work())
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the writer broke"))?
    })
}

pub(crate) fn run_faults(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    pin_to_cpu(NODE_CORE).context("this case needs two cores")?;
    let pages = options.pick(1024, 8192);
    let order = scattered(pages);
    let mut ours = Region::new(pages * PAGE_SIZE)?;
    let bare = Memory::new(pages)?;
    let uffd = Arc::new(BareUffd::new_sync(bare.span())?);
    let stop = Arc::new(AtomicBool::new(false));
    let server = serve_bare(&uffd, &stop);
    let mut latencies = [Latencies::new()?, Latencies::new()?];
    let rounds = Rounds::run(options, 2, |variant, round| {
        let seed = (round as u64 + 1) << 32;
        let latencies = &mut latencies[variant];
        if variant == 0 {
            ours.control.cut("sync")?;
            let region = &ours.region;
            let base = region.as_ptr();
            let base = base as usize;
            return on_writer_core(|| {
                time_stores(&order, latencies, |page| {
                    let at = (base as *mut u8).wrapping_add((page * PAGE_SIZE) as usize);
                    // SAFETY: required: eight aligned, writable bytes. The page lies
                    // within the region, whose mapping lives with `ours`.
                    unsafe { std::ptr::write_volatile(at.cast::<u64>(), seed | page) }
                })
            });
        }
        uffd.protect(bare.span())?;
        on_writer_core(|| time_stores(&order, latencies, |page| bare.store(page, seed | page)))
    })?;
    stop.store(true, Ordering::Relaxed);
    server
        .join()
        .map_err(|_| anyhow::anyhow!("the bare thread broke"))??;
    // All that was stored is in the next cut.
    let before = ours.region.control().epoch();
    let epoch = ours.control.cut("sync")?;
    ensure!(epoch > before, "the stores were not found");
    ours.end()?;
    pin_anywhere()?;
    Ok(vec![
        Outcome::times(
            FAULT,
            "ns",
            rounds.of(0),
            ("a bare thread that reads and lifts", rounds.of(1)),
        )
        .goal(Goal::AtMost(1.15))
        .latency("sync", &latencies[0])
        .latency("bare", &latencies[1]),
    ])
}

/// Nanoseconds per store.
fn time_stores(order: &[u64], latencies: &mut Latencies, mut store: impl FnMut(u64)) -> f64 {
    let started = Instant::now();
    let mut before = started;
    for page in order {
        store(*page);
        let after = Instant::now();
        latencies.record((after - before).as_nanos() as u64);
        before = after;
    }
    started.elapsed().as_nanos() as f64 / order.len() as f64
}

/// Answers faults by plain system calls, waiting as the crate's thread does.
fn serve_bare(uffd: &Arc<BareUffd>, stop: &Arc<AtomicBool>) -> JoinHandle<std::io::Result<()>> {
    let (uffd, stop) = (Arc::clone(uffd), Arc::clone(stop));
    std::thread::spawn(move || {
        let spin = Duration::from_micros(30);
        let mut busy_until = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            if uffd.answer_one()? {
                busy_until = Instant::now() + spin;
            } else if Instant::now() >= busy_until {
                uffd.wait(Duration::from_millis(10))?;
            }
        }
        Ok(())
    })
}

/// Gives all cores back: later cases choose for themselves.
pub(crate) fn pin_anywhere() -> anyhow::Result<()> {
    let mut all = nix::sched::CpuSet::new();
    for core in 0..std::thread::available_parallelism()?.get().max(2) {
        all.set(core)?;
    }
    Ok(nix::sched::sched_setaffinity(
        nix::unistd::Pid::from_raw(0),
        &all,
    )?)
}

/// A thread that stores without a pause.
struct Storing {
    stop: Arc<AtomicBool>,
    longest_ns: Arc<AtomicU64>,
    stores: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Storing {
    fn start(region: &Arc<Writer>, pages: Vec<u64>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let longest_ns = Arc::new(AtomicU64::new(0));
        let stores = Arc::new(AtomicU64::new(0));
        let region = Arc::clone(region);
        let (told, longest, count) = (
            Arc::clone(&stop),
            Arc::clone(&longest_ns),
            Arc::clone(&stores),
        );
        let thread = std::thread::spawn(move || {
            pin_to_cpu(WRITER_CORE)?;
            let mut state = 0x9E37_79B9_7F4A_7C15_u64;
            let mut before = Instant::now();
            while !told.load(Ordering::Relaxed) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let page = pages[(state % pages.len() as u64) as usize];
                region.write(page * PAGE_SIZE + 8, &state.to_le_bytes())?;
                let after = Instant::now();
                let took = (after - before).as_nanos() as u64;
                before = after;
                if took > longest.load(Ordering::Relaxed) {
                    longest.store(took, Ordering::Relaxed);
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Self {
            stop,
            longest_ns,
            stores,
            thread,
        }
    }

    /// Waits until the writer has made `count` more stores.
    fn await_stores(&self, count: u64) -> anyhow::Result<()> {
        let goal = self.stores.load(Ordering::Relaxed) + count;
        let end = Instant::now() + PATIENCE;
        while self.stores.load(Ordering::Relaxed) < goal {
            ensure!(Instant::now() < end, "the writer stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn end(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the writer broke"))?
    }
}

/// Medians over cuts of the longest store and of the withheld pass, in microseconds.
fn stall(region: &mut Region, dirty: u64, cuts: usize) -> anyhow::Result<(f64, f64)> {
    let size = region.region.size();
    let mut pages = scattered(size / PAGE_SIZE);
    pages.truncate(dirty.max(1) as usize);
    let storing = Storing::start(&region.region, pages);
    let (mut longest, mut withheld) = (Vec::new(), Vec::new());
    for cut in 0..=cuts {
        storing.await_stores(4 * dirty)?;
        storing.longest_ns.store(0, Ordering::Relaxed);
        region.control.cut("sync")?;
        let worst = storing.longest_ns.load(Ordering::Relaxed);
        if cut > 0 {
            longest.push(worst as f64 / 1e3);
            withheld.push(region.withheld_us()?);
        }
    }
    storing.end()?;
    Ok((median(&longest), median(&withheld)))
}

/// One pass over everything by the bare kernel, in microseconds.
fn bare_pass(size: u64, rounds: usize) -> anyhow::Result<f64> {
    let memory = Memory::new(size / PAGE_SIZE)?;
    let uffd = BareUffd::new_sync(memory.span())?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        uffd.lift(memory.span())?;
        let started = Instant::now();
        uffd.protect(memory.span())?;
        times.push(started.elapsed().as_nanos() as f64 / 1e3);
    }
    uffd.lift(memory.span())?;
    Ok(median(&times))
}

pub(crate) fn run_stalls(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for size in [64 * MIB, 256 * MIB, GIB] {
        let hot = (size == GIB).then_some((size, 30, HOT));
        let cases = STALLS.iter().copied().filter(|case| case.0 == size);
        let wanted: Vec<_> = cases
            .chain(hot)
            .filter(|case| options.wants(case.2))
            .collect();
        if wanted.is_empty() || (options.quick && size == GIB) {
            continue;
        }
        let bare = bare_pass(size, 5)?;
        pin_to_cpu(NODE_CORE).context("this case needs two cores")?;
        let mut region = Region::new(size)?;
        for (_, per_thousand, name) in wanted {
            let dirty = size / PAGE_SIZE * per_thousand / 1000;
            let cuts = match name {
                HOT => 30,
                _ => options.pick(3, 11),
            };
            let (worst, withheld) = stall(&mut region, dirty, cuts)?;
            let baseline = ("one bare pass over everything", bare);
            let outcome = Outcome::less(name, "us", worst, baseline).note(format!(
                "median of {cuts} cuts' longest stores; {dirty} pages stored to without pause; \
                 faults withheld for {withheld:.0} us"
            ));
            outcomes.push(if name == HOT {
                outcome.goal(Goal::AtLeast(8.0))
            } else {
                outcome
            });
        }
        region.end()?;
        pin_anywhere()?;
    }
    Ok(outcomes)
}

/// Microseconds from asking for a cut to its answer, with `dirty` pages stored to before.
fn cut_us(region: &mut Region, dirty: u64, value: u64) -> anyhow::Result<f64> {
    let mut pages = scattered(region.region.size() / PAGE_SIZE);
    pages.truncate(dirty as usize);
    for page in pages {
        region
            .region
            .write(page * PAGE_SIZE + 16, &value.to_le_bytes())?;
    }
    let before = region.region.control().epoch();
    let started = Instant::now();
    let epoch = region.control.cut("sync")?;
    let took = started.elapsed().as_nanos() as f64 / 1e3;
    ensure!(epoch > before, "the stores were not found");
    Ok(took)
}

/// A cut costs what was dirtied: 16 times the size, the same pages dirtied.
pub(crate) fn run_cuts(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let large = options.pick(256 * MIB, GIB);
    let dirty = 64 * MIB / PAGE_SIZE / 10;
    pin_to_cpu(NODE_CORE).context("this case needs two cores")?;
    let mut regions = [Region::new(large)?, Region::new(64 * MIB)?];
    let rounds = Rounds::run(options, 2, |variant, round| {
        cut_us(&mut regions[variant], dirty, round as u64 + 1)
    })?;
    for region in regions {
        region.end()?;
    }
    pin_anywhere()?;
    Ok(vec![
        Outcome::times(
            CUT,
            "us",
            rounds.of(0),
            ("a cut of 64 MiB, as many pages dirtied", rounds.of(1)),
        )
        .goal(Goal::AtMost(2.0))
        .note(format!("{dirty} pages, scattered over {} MiB", large / MIB)),
    ])
}
