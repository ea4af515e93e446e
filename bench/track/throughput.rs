//! How fast a program stores while it is tracked all the time, by the pause between
//! captures.
//!
//! One thread, on a core of its own, stores eight bytes to random places of a region for
//! a while; the node in this process has the other core. The value is its rate as a share
//! of the rate in the same kind of region without tracking (mode `manual`, no marks). Each
//! round measures one pause after the other, and the untracked region first. The staleness
//! is the mean time from one capture's begin to the next one's, as the node counts them.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use uffd_sync::client::{Node as Client, Writer, WriterOptions};
use uffd_sync::node::{Node, NodeConfig};
use uffd_sync::sys::process::pin_to_cpu;
use uffd_sync::units::{MIB, PAGE_SIZE};
use uffd_sync::words::Mode;

use crate::harness::{Goal, Options, Outcome, median};

const SIZE: u64 = 256 * MIB;
const SIZE_QUICK: u64 = 16 * MIB;
const WRITER_CORE: usize = 0;
const NODE_CORE: usize = 1;
const PATIENCE: Duration = Duration::from_secs(60);

/// Pauses in microseconds, name; 0: the node's default, which adapts.
const PAUSES: [(u64, &str); 8] = [
    (0, "throughput-random/default"),
    (1_000, "throughput-random/1ms"),
    (5_000, "throughput-random/5ms"),
    (20_000, "throughput-random/20ms"),
    (50_000, "throughput-random/50ms"),
    (100_000, "throughput-random/100ms"),
    (200_000, "throughput-random/200ms"),
    (500_000, "throughput-random/500ms"),
];

pub(crate) const CASES: &[&str] = &[
    PAUSES[0].1,
    PAUSES[1].1,
    PAUSES[2].1,
    PAUSES[3].1,
    PAUSES[4].1,
    PAUSES[5].1,
    PAUSES[6].1,
    PAUSES[7].1,
];

/// What one pause gave.
struct Tracked {
    rate: f64,
    staleness_ms: f64,
    hot_share: f64,
}

struct Bench {
    node: Node,
    size: u64,
    time: Duration,
}

impl Bench {
    fn connect(&self) -> anyhow::Result<Client> {
        Ok(Client::from_socket(self.node.connect()?)?)
    }

    /// A region with every page allocated, captured once.
    fn region(&self, options: &WriterOptions) -> anyhow::Result<Writer> {
        let region = Writer::create_over(self.connect()?, "throughput", self.size, options)?;
        for page in 0..self.size / PAGE_SIZE {
            region.write(page * PAGE_SIZE, &(page + 1).to_le_bytes())?;
        }
        region.commit(PATIENCE)?;
        Ok(region)
    }

    /// Millions of stores per second.
    fn rate(&self, region: &Writer) -> anyhow::Result<f64> {
        let (base, words, time) = (region.as_ptr() as usize, self.size / 8, self.time);
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                pin_to_cpu(WRITER_CORE)?;
                let mut state = 0x9E37_79B9_7F4A_7C15_u64;
                let mut store = |count: u64| {
                    for _ in 0..count {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        let word = (base as *mut u64).wrapping_add((state % words) as usize);
                        // SAFETY: required: eight aligned, writable bytes. The word lies
                        // within the region, whose mapping outlives the thread.
                        unsafe { word.write_volatile(state) };
                    }
                };
                // Long enough for pages to get as hot as they will.
                let warm_up = Instant::now() + time / 2;
                while Instant::now() < warm_up {
                    store(1_000);
                }
                let (started, mut stores) = (Instant::now(), 0_u64);
                while started.elapsed() < time {
                    store(1_000);
                    stores += 1_000;
                }
                Ok::<f64, anyhow::Error>(stores as f64 / started.elapsed().as_secs_f64() / 1e6)
            });
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("the writer broke"))?
        })
    }

    fn untracked(&self) -> anyhow::Result<f64> {
        self.rate(&self.region(&WriterOptions {
            mode: Mode::Manual,
            ..WriterOptions::default()
        })?)
    }

    fn tracked(&self, pause_us: u64) -> anyhow::Result<Tracked> {
        let pause = (pause_us > 0).then(|| Duration::from_micros(pause_us));
        let region = self.region(&WriterOptions {
            interval_min: pause,
            interval_max: pause,
            ..WriterOptions::default()
        })?;
        let mut control = self.connect()?;
        let mut captures = || -> anyhow::Result<(u64, f64)> {
            let status = control.status()?;
            let region = status.regions.first().context("the region is there")?;
            ensure!(region.full_compares == 0, "tracking was lost");
            let hot = region.hot.context("tracked by write-protection")?;
            Ok((region.captures, hot.share))
        };
        let (started, (before, _)) = (Instant::now(), captures()?);
        let rate = self.rate(&region)?;
        let (after, hot_share) = captures()?;
        let elapsed_ms = started.elapsed().as_secs_f64() * 1e3;
        Ok(Tracked {
            rate,
            staleness_ms: elapsed_ms / (after - before).max(1) as f64,
            hot_share,
        })
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    pin_to_cpu(NODE_CORE).context("this case needs two cores")?;
    let bench = Bench {
        node: Node::embedded(&NodeConfig::default())?,
        size: options.pick(SIZE_QUICK, SIZE),
        time: Duration::from_millis(options.pick(100, 1_500)),
    };
    let pauses: Vec<_> = PAUSES.iter().filter(|it| options.wants(it.1)).collect();
    let mut plain = Vec::new();
    let mut found: Vec<Vec<Tracked>> = pauses.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.pick(1, 3) {
        plain.push(bench.untracked()?);
        for (list, (pause, _)) in found.iter_mut().zip(&pauses) {
            list.push(bench.tracked(*pause)?);
        }
    }
    bench.node.stop()?;
    crate::sync::pin_anywhere()?;
    let outcome = |(list, (pause, name)): (&Vec<Tracked>, &&(u64, &'static str))| {
        let of = |value: fn(&Tracked) -> f64| median(&list.iter().map(value).collect::<Vec<_>>());
        let baseline = ("the same stores untracked", median(&plain));
        let outcome = Outcome::times(name, "Mstores/s", of(|it| it.rate), baseline).note(format!(
            "{} MiB; a capture each {:.1} ms; {:.0} % of the pages hot",
            bench.size / MIB,
            of(|it| it.staleness_ms),
            100.0 * of(|it| it.hot_share),
        ));
        if *pause == 0 && !options.quick {
            outcome.goal(Goal::AtLeast(0.7))
        } else {
            outcome
        }
    };
    Ok(found.iter().zip(&pauses).map(outcome).collect())
}
