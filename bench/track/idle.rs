//! What regions cost while nobody stores to them.
//!
//! Processes with a node each: one tracks an allocated region of 1 GiB in mode `async`
//! with the default interval, one many small regions, one tracks nothing. The value is
//! the processor time that a whole process uses in one second. Where the writer is
//! busy, a thread of the same process wakes up every millisecond and stores elsewhere,
//! so that only looking at the region tells that nothing was stored there; its baseline
//! has the same thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use nix::time::{ClockId, clock_gettime};
use uffd_sync::client::{self, Writer, WriterOptions};
use uffd_sync::node::{Node, NodeConfig};
use uffd_sync::units::{GIB, PAGE_SIZE};

use crate::harness::{Channel, Child, Options, Outcome, Rounds};

pub(crate) const ROLE: &str = "idle";
const LARGE: &str = "idle/1GiB-async";
const BUSY: &str = "idle/1GiB-async-busy-writer";
const MANY: &str = "idle/many-async";
const MANY_BUSY: &str = "idle/many-async-busy-writer";

pub(crate) const CASES: &[&str] = &[LARGE, BUSY, MANY, MANY_BUSY];

const PATIENCE: Duration = Duration::from_secs(60);
/// Captures in a row that have to find nothing before a region counts as idle.
const QUIET: u64 = 3;
/// Size of each of many regions.
const SMALL: u64 = 16 * PAGE_SIZE;

/// A process with a node and regions: how many, how large, whether the writer is busy.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let [count, size, busy] = args else {
        bail!("COUNT SIZE BUSY")
    };
    let (count, size): (u64, u64) = (count.parse()?, size.parse()?);
    let node = Node::embedded(&NodeConfig::default())?;
    let regions: Vec<Writer> = (0..count)
        .map(|number| region(&node, number, size))
        .collect::<anyhow::Result<_>>()?;
    come_to_rest(&regions)?;
    let stop = AtomicBool::new(busy == "no");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let elsewhere = AtomicU64::new(0);
            while !stop.load(Ordering::Relaxed) {
                elsewhere.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let answered = answer(&mut channel, regions.first());
        stop.store(true, Ordering::Relaxed);
        answered
    })?;
    drop(regions);
    Ok(node.stop()?)
}

fn answer(channel: &mut Channel, region: Option<&Writer>) -> anyhow::Result<()> {
    channel.send("ready", &[])?;
    while let Some((line, _)) = channel.receive()? {
        let answer = match (line.as_str(), region) {
            ("cpu", _) => {
                let used = Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?);
                used.as_nanos().to_string()
            }
            // Still tracked: a store makes an epoch, by the timer.
            ("store", Some(region)) => {
                let before = region.control().epoch();
                let stored = Instant::now();
                region.write(region.size() / 2, b"stored at last")?;
                while region.control().epoch() == before {
                    ensure!(stored.elapsed() < PATIENCE, "the store was not found");
                    std::thread::sleep(Duration::from_micros(100));
                }
                stored.elapsed().as_micros().to_string()
            }
            (other, _) => bail!("{other} is no order"),
        };
        channel.send(&answer, &[])?;
    }
    Ok(())
}

fn region(node: &Node, number: u64, size: u64) -> anyhow::Result<Writer> {
    let connection = client::Node::from_socket(node.connect()?)?;
    let name = format!("idle-{number}");
    let region = Writer::create_over(connection, &name, size, &WriterOptions::default())?;
    for page in 0..size / PAGE_SIZE {
        region.write(page * PAGE_SIZE, &(page + 1).to_le_bytes())?;
    }
    Ok(region)
}

/// Waits until captures by timer find nothing any more, however long one takes.
fn come_to_rest(regions: &[Writer]) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    let stats = |region: &Writer| region.control().stats();
    let mut last: Vec<_> = regions.iter().map(stats).collect();
    let mut restless = true;
    while restless {
        ensure!(Instant::now() < end, "the regions do not come to rest");
        std::thread::sleep(Duration::from_millis(1));
        restless = false;
        for (region, last) in regions.iter().zip(&mut last) {
            let now = stats(region);
            if now.dirty_pages != last.dirty_pages || region.control().epoch() == 0 {
                *last = now;
            }
            restless |= now.captures < last.captures + QUIET;
        }
    }
    Ok(())
}

/// Processor time of a child over `time`, in microseconds per second.
fn measure(child: &mut Child, time: Duration) -> anyhow::Result<f64> {
    let before: u64 = child.ask("cpu")?.parse()?;
    let started = Instant::now();
    std::thread::sleep(time);
    let after: u64 = child.ask("cpu")?.parse()?;
    Ok((after - before) as f64 / 1e3 / started.elapsed().as_secs_f64())
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let many = options.pick(50, 300);
    let kinds = [
        (LARGE, 1, GIB, "no"),
        (BUSY, 1, GIB, "yes"),
        (MANY, many, SMALL, "no"),
        (MANY_BUSY, many, SMALL, "yes"),
        ("", 0, 0, "no"),
        ("", 0, 0, "yes"),
    ];
    let mut children = Vec::new();
    for (_, count, size, busy) in kinds {
        let args = [count.to_string(), size.to_string(), busy.to_owned()];
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        // One after the other: what they fill is not what is measured.
        let mut child = Child::spawn(ROLE, None, &args)?;
        child.hear()?;
        children.push(child);
    }
    let time = options.pick(Duration::from_millis(200), Duration::from_secs(1));
    let rounds = Rounds::run(options, kinds.len(), |variant, _| {
        measure(&mut children[variant], time)
    })?;
    let mut outcomes = Vec::new();
    for (variant, (case, count, _, busy)) in kinds.into_iter().enumerate() {
        let bare = if busy == "no" { 4 } else { 5 };
        if count > 0 {
            let found_us: u64 = children[variant].ask("store")?.parse()?;
            let baseline = ("the same node without a region", rounds.of(bare));
            let note = format!("{count} regions; the store after it was found in {found_us} us");
            outcomes.push(
                Outcome::times(case, "us of CPU per s", rounds.of(variant), baseline).note(&note),
            );
        }
    }
    for child in children {
        child.end()?;
    }
    Ok(outcomes)
}
