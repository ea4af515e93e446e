//! How fast a program stores while it is tracked all the time, by the pause between
//! captures.
//!
//! One thread, on a core of its own, stores eight bytes to random places of a region
//! without a pause; the node in this process has the other core. The value is its rate, once
//! pages are as hot as they get, as a share of the rate in memory that nobody tracks. Each
//! round measures one way after the other, and the untracked memory first. The staleness
//! is the mean time from one capture to the next, as the node counts them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use uffd_sync::client::{Node as Client, Writer, WriterOptions};
use uffd_sync::limits;
use uffd_sync::node::{Node, NodeConfig};
use uffd_sync::sys::process::pin_to_cpu;
use uffd_sync::units::{MIB, PAGE_SIZE};

use crate::harness::{Goal, Options, Outcome, median};
use crate::memory::Memory;

const SIZE: u64 = 256 * MIB;
const SIZE_QUICK: u64 = 16 * MIB;
const WRITER_CORE: usize = 0;
const NODE_CORE: usize = 1;
const PATIENCE: Duration = Duration::from_secs(60);

/// How a region is tracked.
#[derive(Clone, Copy)]
struct Way {
    case: &'static str,
    /// The pause in microseconds; 0: the node's default, which adapts.
    pause_us: u64,
    /// Captures in a row after which a page is left open.
    hot_after: u64,
}

const fn way(case: &'static str, pause_us: u64, hot_after: u64) -> Way {
    Way {
        case,
        pause_us,
        hot_after,
    }
}

const K: u64 = limits::HOT_CAPTURES;

const WAYS: [Way; 10] = [
    way("throughput-random/default", 0, K),
    way("throughput-random/1ms", 1_000, K),
    way("throughput-random/5ms", 5_000, K),
    way("throughput-random/20ms", 20_000, K),
    way("throughput-random/100ms", 100_000, K),
    way("throughput-random/500ms", 500_000, K),
    way("throughput-random/hot-after-1", 0, 1),
    way("throughput-random/hot-after-4", 0, 4),
    way("throughput-random/hot-after-16", 0, 16),
    way("throughput-random/never-hot", 0, 0),
];

pub(crate) const CASES: &[&str] = &[
    WAYS[0].case,
    WAYS[1].case,
    WAYS[2].case,
    WAYS[3].case,
    WAYS[4].case,
    WAYS[5].case,
    WAYS[6].case,
    WAYS[7].case,
    WAYS[8].case,
    WAYS[9].case,
];

/// What one way gave.
struct Tracked {
    rate: f64,
    staleness_ms: f64,
    hot_share: f64,
}

struct Bench {
    size: u64,
    time: Duration,
}

/// A node with one region, every page of it allocated, captured once.
struct Scene {
    // The region before its node.
    region: Writer,
    control: Client,
    node: Node,
}

impl Scene {
    fn new(size: u64, hot_after: u64, options: &WriterOptions) -> anyhow::Result<Self> {
        let node = Node::embedded(&NodeConfig {
            hot_after,
            ..NodeConfig::default()
        })?;
        let connect = || -> anyhow::Result<Client> { Ok(Client::from_socket(node.connect()?)?) };
        let region = Writer::create_over(connect()?, "throughput", size, options)?;
        for page in 0..size / PAGE_SIZE {
            region.write(page * PAGE_SIZE, &(page + 1).to_le_bytes())?;
        }
        region.commit(PATIENCE)?;
        Ok(Self {
            region,
            control: connect()?,
            node,
        })
    }

    /// Captures made, and the share of pages that are hot.
    fn captures(&mut self) -> anyhow::Result<(u64, f64)> {
        let status = self.control.status()?;
        let region = status.regions.first().context("the region is there")?;
        ensure!(region.full_compares == 0, "tracking was lost");
        let hot = region.hot.context("tracked by write-protection")?;
        Ok((region.captures, hot.share))
    }

    fn end(self) -> anyhow::Result<()> {
        drop(self.region);
        drop(self.control);
        Ok(self.node.stop()?)
    }
}

impl Bench {
    /// What the writer does while it is tracked.
    fn rate(&self, scene: &mut Scene) -> anyhow::Result<Tracked> {
        let (words, time) = (self.size / 8, self.time);
        let base = scene.region.as_ptr() as usize;
        let warm = AtomicBool::new(false);
        let (rate, captures, elapsed) = std::thread::scope(|scope| {
            let is_warm = &warm;
            let thread = scope.spawn(move || {
                pin_to_cpu(WRITER_CORE)?;
                // Long enough for pages to get as hot as they will.
                store_for(base, words, 2 * time);
                is_warm.store(true, Ordering::Release);
                Ok::<f64, anyhow::Error>(store_for(base, words, time))
            });
            while !warm.load(Ordering::Acquire) && !thread.is_finished() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let (before, started) = (scene.captures().map(|it| it.0), Instant::now());
            let rate = thread
                .join()
                .map_err(|_| anyhow::anyhow!("the writer broke"))??;
            let elapsed = started.elapsed();
            let after = scene.captures()?;
            Ok::<_, anyhow::Error>((rate, (after.0 - before?, after.1), elapsed))
        })?;
        Ok(Tracked {
            rate,
            staleness_ms: elapsed.as_secs_f64() * 1e3 / captures.0.max(1) as f64,
            hot_share: captures.1,
        })
    }

    fn tracked(&self, way: Way) -> anyhow::Result<Tracked> {
        let pause = (way.pause_us > 0).then(|| Duration::from_micros(way.pause_us));
        let options = WriterOptions {
            interval_min: pause,
            interval_max: pause,
            ..WriterOptions::default()
        };
        let mut scene = Scene::new(self.size, way.hot_after, &options)?;
        let tracked = self.rate(&mut scene)?;
        scene.end()?;
        Ok(tracked)
    }

    /// The same stores into plain memory of the same kind.
    fn untracked(&self) -> anyhow::Result<f64> {
        let memory = Memory::new(self.size / PAGE_SIZE)?;
        let (base, words) = (memory.writer.as_ptr() as usize, self.size / 8);
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                pin_to_cpu(WRITER_CORE)?;
                Ok(store_for(base, words, self.time))
            });
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("the writer broke"))?
        })
    }
}

/// Millions of stores per second to random ones of `words` words at `base`.
fn store_for(base: usize, words: u64, time: Duration) -> f64 {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let (started, mut stores) = (Instant::now(), 0_u64);
    while started.elapsed() < time {
        for _ in 0..1_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let word = (base as *mut u64).wrapping_add((state % words) as usize);
            // SAFETY: required: eight aligned, writable bytes. The word lies within the
            // memory at `base`, which the callers keep mapped.
            unsafe { word.write_volatile(state) };
        }
        stores += 1_000;
    }
    stores as f64 / started.elapsed().as_secs_f64() / 1e6
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    pin_to_cpu(NODE_CORE).context("this case needs two cores")?;
    let bench = Bench {
        size: options.pick(SIZE_QUICK, SIZE),
        time: Duration::from_millis(options.pick(50, 1_000)),
    };
    let ways: Vec<Way> = WAYS
        .into_iter()
        .filter(|way| options.wants(way.case))
        .collect();
    let mut plain = Vec::new();
    let mut found: Vec<Vec<Tracked>> = ways.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.pick(1, 2) {
        plain.push(bench.untracked()?);
        for (list, way) in found.iter_mut().zip(&ways) {
            list.push(bench.tracked(*way)?);
        }
    }
    crate::sync::pin_anywhere()?;
    let outcome = |(list, way): (&Vec<Tracked>, &Way)| {
        let of = |value: fn(&Tracked) -> f64| median(&list.iter().map(value).collect::<Vec<_>>());
        let baseline = ("the same stores untracked", median(&plain));
        let outcome =
            Outcome::times(way.case, "Mstores/s", of(|it| it.rate), baseline).note(format!(
                "{} MiB; a capture each {:.1} ms; {:.0} % of the pages hot",
                bench.size / MIB,
                of(|it| it.staleness_ms),
                100.0 * of(|it| it.hot_share),
            ));
        if way.case == WAYS[0].case {
            outcome.goal(Goal::AtLeast(0.7))
        } else {
            outcome
        }
    };
    Ok(found.iter().zip(&ways).map(outcome).collect())
}
