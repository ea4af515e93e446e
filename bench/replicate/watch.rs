//! The reader process: sleeps until the replica shows each value of a series.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use uffd_sync::client::{Reader, Writer};
use uffd_sync::region::ReadError;
use uffd_sync::sys::process::monotonic_ns;

use crate::harness::{Channel, Child, Latencies};
use crate::nodes::{PATIENCE, Pair, place_of, value_of};

pub(crate) const ROLE: &str = "reader";

/// Pause before each commit of a series, so that every process of the chain sleeps.
const PAUSE: Duration = Duration::from_micros(200);

/// Attaches, then for each `FIRST COUNT` answers one time for each value seen.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let [socket, name] = args else {
        bail!("a reader needs a socket and a region")
    };
    let reader = Reader::attach(socket, name)?;
    let mut epoch = reader.control().epoch();
    channel.send("attached", &[])?;
    while let Some((line, _)) = channel.receive()? {
        let (first, count) = line.split_once(' ').context("FIRST COUNT")?;
        let first: u64 = first.parse()?;
        for seq in first..first + count.parse::<u64>()? {
            let seen = wait_for(&reader, seq, &mut epoch)?;
            channel.send(&seen.to_string(), &[])?;
        }
    }
    Ok(())
}

/// The time at which the replica was seen to show value `seq`.
fn wait_for(reader: &Reader, seq: u64, epoch: &mut u64) -> anyhow::Result<u64> {
    let place = place_of(seq, reader.size());
    loop {
        match reader.read_at_epoch(|view| view.load::<u64>(place)) {
            Ok((Ok(value), read)) if value == value_of(seq) => {
                let seen = monotonic_ns();
                *epoch = read.number;
                return Ok(seen);
            }
            Ok((Ok(_), read)) => *epoch = read.number.max(*epoch),
            // In place, since it is larger than the staging budget.
            Err(ReadError::Syncing) => {}
            Ok((Err(error), _)) => return Err(error.into()),
            Err(error) => return Err(error.into()),
        }
        reader.wait_epoch(*epoch, PATIENCE)?;
    }
}

/// A process that watches a replica.
pub(crate) struct Watcher(Child);

impl Watcher {
    pub(crate) fn start(pair: &Pair, name: &str, core: Option<usize>) -> anyhow::Result<Self> {
        let socket = pair.replica_socket();
        let mut child = Child::spawn(ROLE, core, &[&socket.to_string_lossy(), name])?;
        child.hear()?;
        Ok(Self(child))
    }

    /// For each of `count` values from `first` on: `store` it, then `publish` it under
    /// the clock until the reader has seen it.
    pub(crate) fn time(
        &mut self,
        (first, count): (u64, u64),
        store: impl FnMut(u64) -> anyhow::Result<()>,
        publish: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Latencies> {
        time_series(&mut self.0, (first, count), store, publish)
    }
}

/// What [`Watcher::time`] does, with any process that answers as it does.
pub(crate) fn time_series(
    child: &mut Child,
    (first, count): (u64, u64),
    mut store: impl FnMut(u64) -> anyhow::Result<()>,
    mut publish: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Latencies> {
    let mut latencies = Latencies::new()?;
    child.tell(&format!("{first} {count}"), &[])?;
    for seq in first..first + count {
        std::thread::sleep(PAUSE);
        store(seq)?;
        let begun = monotonic_ns();
        publish()?;
        let seen: u64 = child.hear()?.0.parse()?;
        ensure!(seen > begun, "value {seq} was seen before it was published");
        latencies.record(seen - begun);
    }
    Ok(latencies)
}

/// Stores value `seq` at its place, marked.
pub(crate) fn store(writer: &Writer, seq: u64) -> anyhow::Result<()> {
    let place = place_of(seq, writer.size());
    writer.write(place, &value_of(seq).to_le_bytes())?;
    writer.mark_region_changed(place, 8)?;
    Ok(())
}
