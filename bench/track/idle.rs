//! What a region costs while nobody stores to it.
//!
//! Two processes, each with a node of its own: one tracks an allocated region of
//! 1 GiB in mode `async` with the default interval, the other tracks nothing. The
//! value is the processor time that a whole process uses in one second.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use uffd_sync::client::{self, Writer, WriterOptions};
use uffd_sync::node::{Node, NodeConfig};
use uffd_sync::units::{GIB, PAGE_SIZE};

use crate::harness::{Channel, Child, Options, Outcome, Rounds};

pub(crate) const ROLE: &str = "idle";
const CASE: &str = "idle/1GiB-async";

pub(crate) const CASES: &[&str] = &[CASE];

const PATIENCE: Duration = Duration::from_secs(60);

/// A process with a node, and a region unless its size is 0.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let size: u64 = args.first().context("a size")?.parse()?;
    let node = Node::embedded(&NodeConfig::default())?;
    let region = (size > 0).then(|| region(&node, size)).transpose()?;
    channel.send("ready", &[])?;
    while let Some((line, _)) = channel.receive()? {
        let answer = match (line.as_str(), &region) {
            ("cpu", _) => {
                let used = Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?);
                used.as_nanos().to_string()
            }
            // Still tracked: a store makes an epoch.
            ("store", Some(region)) => {
                let before = region.control().epoch();
                region.write(size / 2, b"stored at last")?;
                (region.commit(PATIENCE)?.number - before).to_string()
            }
            (other, _) => bail!("{other} is no order"),
        };
        channel.send(&answer, &[])?;
    }
    drop(region);
    Ok(node.stop()?)
}

fn region(node: &Node, size: u64) -> anyhow::Result<Writer> {
    let connection = client::Node::from_socket(node.connect()?)?;
    let region = Writer::create_over(connection, "idle", size, &WriterOptions::default())?;
    for page in 0..size / PAGE_SIZE {
        region.write(page * PAGE_SIZE, &(page + 1).to_le_bytes())?;
    }
    let before = region.control().epoch();
    let end = Instant::now() + PATIENCE;
    // Its timer makes epochs until everything was captured, and none from then on.
    let mut seen = before;
    let mut still = Instant::now();
    while still.elapsed() < Duration::from_millis(200) {
        ensure!(Instant::now() < end, "the region does not come to rest");
        std::thread::sleep(Duration::from_millis(5));
        let epoch = region.control().epoch();
        if epoch != seen || epoch == 0 {
            (seen, still) = (epoch, Instant::now());
        }
    }
    Ok(region)
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
    let mut children = [
        Child::spawn(ROLE, None, &[&GIB.to_string()])?,
        Child::spawn(ROLE, None, &["0"])?,
    ];
    for child in &mut children {
        child.hear()?;
    }
    let time = options.pick(Duration::from_millis(200), Duration::from_secs(1));
    let rounds = Rounds::run(options, 2, |variant, _| {
        measure(&mut children[variant], time)
    })?;
    let [mut tracking, nothing] = children;
    let epochs: u64 = tracking.ask("store")?.parse()?;
    ensure!(epochs > 0, "the store was not found");
    tracking.end()?;
    nothing.end()?;
    let baseline = ("the same node without a region", rounds.of(1));
    Ok(vec![Outcome::times(
        CASE,
        "us of CPU per s",
        rounds.of(0),
        baseline,
    )])
}
