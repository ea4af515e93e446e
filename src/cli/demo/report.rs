//! What a demonstration found: one JSON object or a table.

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::super::output::{Align, Output, about, grouped, table};
use super::latency::Latencies;
use super::reader::FromReader;
use crate::units::ByteSize;
use crate::wire::control::NodeStatus;
use crate::words::Mode;

/// What mirroring the region cost so far, as the source node counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cost {
    /// Bytes that captures found changed.
    pub(super) bytes_changed: u64,
    /// Bytes of updates sent to the replica, headers included.
    pub(super) bytes_on_wire: u64,
    /// Updates sent.
    pub(super) updates: u64,
    /// Captures made.
    pub(super) captures: u64,
}

impl Cost {
    /// The cost of `region` with its one replica out of a status.
    pub(super) fn of(status: &NodeStatus, region: &str) -> anyhow::Result<Cost> {
        let region = status
            .regions
            .iter()
            .find(|found| found.name == region)
            .context("the source node has lost the region")?;
        let [replica] = region.replicas.as_slice() else {
            bail!("{} replicas instead of one", region.replicas.len());
        };
        Ok(Cost {
            bytes_changed: region.bytes_changed,
            bytes_on_wire: replica.bytes_sent,
            updates: replica.updates_sent,
            captures: region.captures,
        })
    }

    /// What came on top of `before`.
    pub(super) fn since(self, before: Cost) -> Cost {
        Cost {
            bytes_changed: self.bytes_changed.saturating_sub(before.bytes_changed),
            bytes_on_wire: self.bytes_on_wire.saturating_sub(before.bytes_on_wire),
            updates: self.updates.saturating_sub(before.updates),
            captures: self.captures.saturating_sub(before.captures),
        }
    }
}

/// All that was found.
pub(super) struct Outcome {
    /// Whether source and replica are equal, byte for byte.
    pub(super) verified: bool,
    pub(super) mode: Mode,
    pub(super) seconds: u64,
    pub(super) region_size: u64,
    pub(super) stores: u64,
    pub(super) commits: u64,
    pub(super) cost: Cost,
    pub(super) measured: FromReader,
}

impl Outcome {
    /// What sending the whole region once per update would have cost.
    fn full_copy_bytes(&self) -> u64 {
        self.cost.updates.saturating_mul(self.region_size)
    }

    fn measured(&self) -> (u64, Latencies, Latencies) {
        match self.measured {
            FromReader::Ready => Default::default(),
            FromReader::Measured {
                epochs,
                latency_us,
                commit_latency_us,
                ..
            } => (epochs, latency_us, commit_latency_us),
        }
    }

    fn json(&self) -> Value {
        let (epochs, latency_us, commit_latency_us) = self.measured();
        json!({
            "verified": self.verified,
            "mode": self.mode,
            "epochs_checked": self.measured.torn().0,
            "torn": self.measured.torn().1,
            "seconds": self.seconds,
            "region_size": self.region_size,
            "stores": self.stores,
            "commits": self.commits,
            "captures": self.cost.captures,
            "updates": self.cost.updates,
            "epochs_seen": epochs,
            "bytes_changed": self.cost.bytes_changed,
            "bytes_on_wire": self.cost.bytes_on_wire,
            "full_copy_bytes": self.full_copy_bytes(),
            "latency_us": latency_us,
            "commit_latency_us": commit_latency_us,
        })
    }
}

/// Prints the outcome.
pub(super) fn print(outcome: &Outcome, as_json: bool) -> anyhow::Result<()> {
    let mut out = Output::new();
    if as_json {
        out.json(&outcome.json())?;
        return Ok(out.done()?);
    }
    let size = ByteSize(outcome.region_size);
    let seconds = outcome.seconds;
    out.line(format_args!(
        "A region of {size}, mirrored from one node to another over TCP on loopback.\n\
         Workload, {seconds} s: scattered counters, bursts, one rewrite of a quarter, commits.\n"
    ))?;
    let (cost, full) = (&outcome.cost, outcome.full_copy_bytes());
    let mut rows = table([
        ("WHAT", Align::Left),
        ("COUNT", Align::Right),
        ("", Align::Left),
    ]);
    let wire_per_changed = ratio(cost.bytes_on_wire, cost.bytes_changed);
    for (name, number, note) in [
        ("stores", grouped(outcome.stores), String::new()),
        ("commits", grouped(outcome.commits), String::new()),
        ("updates", grouped(cost.updates), String::new()),
        (
            "bytes changed",
            grouped(cost.bytes_changed),
            about(cost.bytes_changed),
        ),
        (
            "bytes on the wire",
            grouped(cost.bytes_on_wire),
            format!(
                "{}, {wire_per_changed} per byte changed",
                about(cost.bytes_on_wire)
            ),
        ),
        (
            "whole region per update",
            grouped(full),
            format!(
                "{}, {} times as much",
                about(full),
                ratio(full, cost.bytes_on_wire)
            ),
        ),
    ] {
        rows.add_row([name.to_owned(), number, note]);
    }
    out.table(&rows)?;
    out.line("")?;
    print_latencies(&mut out, outcome)?;
    if let (Some(checked), Some(torn)) = outcome.measured.torn() {
        out.line(format_args!(
            "\nEpochs checked at the replica to be one instant of the source: {}, torn: {}.",
            grouped(checked),
            grouped(torn)
        ))?;
    }
    let verdict = if outcome.verified {
        format!(
            "Source and replica are equal: {} bytes compared.",
            grouped(outcome.region_size)
        )
    } else {
        "SOURCE AND REPLICA DIFFER.".to_owned()
    };
    out.line(format_args!("\n{verdict}"))?;
    Ok(out.done()?)
}

fn print_latencies(out: &mut Output, outcome: &Outcome) -> anyhow::Result<()> {
    let (_, timer, commit) = outcome.measured();
    let mut rows = table([
        ("LATENCY us", Align::Left),
        ("p50", Align::Right),
        ("p99", Align::Right),
        ("p99.9", Align::Right),
        ("max", Align::Right),
        ("count", Align::Right),
    ]);
    for (name, found) in [
        ("store -> reader awake", timer),
        ("commit() -> reader awake", commit),
    ] {
        let us = |value: f64| format!("{value:.1}");
        rows.add_row([
            name.to_owned(),
            us(found.p50),
            us(found.p99),
            us(found.p999),
            us(found.max),
            grouped(found.count),
        ]);
    }
    out.table(&rows)?;
    Ok(())
}

/// How many times `b` goes into `a`, with three digits.
fn ratio(a: u64, b: u64) -> String {
    if b == 0 {
        return "-".to_owned();
    }
    match a as f64 / b as f64 {
        ratio if ratio < 10.0 => format!("{ratio:.2}"),
        ratio if ratio < 100.0 => format!("{ratio:.1}"),
        ratio => grouped(ratio.round() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(verified: bool) -> Outcome {
        Outcome {
            verified,
            mode: Mode::Sync,
            seconds: 5,
            region_size: 1 << 20,
            stores: 7,
            commits: 2,
            cost: Cost {
                bytes_changed: 40,
                bytes_on_wire: 120,
                updates: 3,
                captures: 4,
            },
            measured: FromReader::Measured {
                epochs: 3,
                checked: Some(3),
                torn: Some(0),
                latency_us: Latencies::default(),
                commit_latency_us: Latencies::default(),
            },
        }
    }

    #[test]
    fn the_object_has_what_programs_read() {
        let object = outcome(true).json();
        assert_eq!(object["verified"], true);
        assert_eq!(object["torn"], 0);
        assert_eq!(object["bytes_changed"], 40);
        assert_eq!(object["bytes_on_wire"], 120);
        assert_eq!(object["full_copy_bytes"], 3 << 20);
        assert_eq!(object["updates"], 3);
        for latency in ["latency_us", "commit_latency_us"] {
            for quantile in ["p50", "p99", "p999", "max"] {
                assert!(
                    object[latency][quantile].is_number(),
                    "{latency} {quantile}"
                );
            }
        }
        assert_eq!(outcome(false).json()["verified"], false);
    }

    #[test]
    fn cost_is_counted_from_the_start_of_the_workload() {
        let before = outcome(true).cost;
        let after = Cost {
            updates: 10,
            ..before
        };
        assert_eq!(after.since(before).updates, 7);
        assert_eq!(after.since(before).bytes_changed, 0);
    }

    #[test]
    fn ratios_in_three_digits() {
        assert_eq!(ratio(1, 0), "-");
        assert_eq!(ratio(3, 2), "1.50");
        assert_eq!(ratio(123, 10), "12.3");
        assert_eq!(ratio(1_234_567, 1), "1 234 567");
    }
}
