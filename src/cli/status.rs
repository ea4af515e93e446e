//! `status`, and the tables that `region list` and `region show` share with it.

use std::time::Duration;

use comfy_table::Table;

use super::NodeAt;
use super::args::Report;
use super::output::{Align, Output, about, grouped, table};
use crate::client::Node;
use crate::sys::process::realtime_ns;
use crate::units::ByteSize;
use crate::wire::control::{
    AuditStatus, ExactStatus, HotStatus, NbdExportStatus, NbdStatus, NodeStatus, RegionStatus,
    Role, SpaceStatus,
};

/// Shows the whole node.
pub(super) fn run(report: Report, node: &NodeAt) -> anyhow::Result<()> {
    let status = Node::connect(node.path())?.status()?;
    let mut out = Output::new();
    if report.json {
        out.json(&status)?;
        return Ok(out.done()?);
    }
    out.table(&node_table(&status))?;
    if let Some(space) = &status.space {
        out.line("")?;
        out.table(&space_table(space))?;
    }
    if let Some(nbd) = &status.nbd {
        out.line("")?;
        out.table(&nbd_table(nbd))?;
        if !nbd.exports.is_empty() {
            out.line("")?;
            out.table(&exports_table(&nbd.exports))?;
        }
    }
    if !status.regions.is_empty() {
        out.line("")?;
        out.table(&regions_table(&status.regions))?;
    }
    if status.regions.iter().any(|r| !r.attachments.is_empty()) {
        out.line("")?;
        out.table(&attachments_table(&status.regions))?;
    }
    if status.regions.iter().any(|r| !r.replicas.is_empty()) {
        out.line("")?;
        out.table(&replicas_table(&status.regions))?;
    }
    if status.regions.iter().any(|r| !r.losses.is_empty()) {
        out.line("")?;
        out.table(&losses_table(&status.regions))?;
    }
    Ok(out.done()?)
}

fn node_table(status: &NodeStatus) -> Table {
    let uptime = Duration::from_millis(status.uptime_ms);
    pairs([
        ("node", status.node.clone()),
        ("version", status.version.clone()),
        ("pid", status.pid.to_string()),
        ("up", up(uptime)),
        ("listen", dash(status.listen.as_deref())),
        ("memory", about(status.rss_bytes)),
        ("of it buffers", about(status.buffer_bytes)),
        ("connections", status.connections.to_string()),
        ("sent", about(status.bytes_sent)),
        ("received", about(status.bytes_received)),
        (
            "longest turn",
            format!("{} us", grouped(status.longest_turn_us)),
        ),
    ])
}

/// The segment that a node lends.
fn space_table(space: &SpaceStatus) -> Table {
    let mut rows = vec![
        ("segment of", space.server.clone()),
        ("position", space.position.to_string()),
        ("size", ByteSize(space.segment_size).to_string()),
        ("durability", space.durability.clone()),
        ("incarnation", space.incarnation.clone()),
        ("clients", space.clients.to_string()),
        ("operations", grouped(space.operations)),
        ("refused", grouped(space.refused)),
        ("read", about(space.read_bytes)),
        ("written", about(space.written_bytes)),
        ("not acknowledged", grouped(space.unacknowledged)),
        ("turned away", grouped(space.turned_away)),
        ("ended as broken", grouped(space.broken)),
        ("log lines", grouped(space.log_lines)),
        ("log dropped", grouped(space.log_dropped)),
    ];
    if let Some(writers) = &space.local_writers {
        rows.push(("write by mapping", writers.writing.to_string()));
        rows.push(("killed for a stripe", grouped(writers.killed)));
        rows.push(("stripes taken over", grouped(writers.taken_over)));
        rows.push(("locks repaired", grouped(writers.repaired)));
        let ranges = writers.maybe_modified.iter();
        rows.extend(ranges.map(|one| ("maybe modified", one.to_string())));
    }
    pairs(rows)
}

/// NBD clients of a node.
fn nbd_table(nbd: &NbdStatus) -> Table {
    pairs([
        ("NBD clients", nbd.clients.to_string()),
        ("turned away", grouped(nbd.turned_away)),
        ("hung up on", grouped(nbd.broken)),
    ])
}

/// What they have chosen, one export per line.
fn exports_table(exports: &[NbdExportStatus]) -> Table {
    let mut rows = table([
        ("EXPORT", Align::Left),
        ("CONNECTED", Align::Right),
        ("EVER", Align::Right),
        ("REQUESTS", Align::Right),
        ("ERRORS", Align::Right),
    ]);
    for export in exports {
        rows.add_row([
            export.name.clone(),
            export.connections.to_string(),
            grouped(export.connected),
            grouped(export.requests),
            grouped(export.errors),
        ]);
    }
    rows
}

/// All regions, one per line.
pub(super) fn regions_table(regions: &[RegionStatus]) -> Table {
    let mut rows = table([
        ("REGION", Align::Left),
        ("SIZE", Align::Right),
        ("RESIDENT", Align::Right),
        ("BESIDE", Align::Right),
        ("ROLE", Align::Left),
        ("STATE", Align::Left),
        ("MODE", Align::Left),
        ("SHARED", Align::Left),
        ("EPOCH", Align::Right),
        ("KIND", Align::Left),
        ("DIRTY/s", Align::Right),
        ("PAUSE us", Align::Right),
        ("GENERATION", Align::Left),
    ]);
    for region in regions {
        rows.add_row([
            region.name.clone(),
            ByteSize(region.size).to_string(),
            about(region.resident_bytes),
            about(region.overhead_bytes),
            role_name(region.role).to_owned(),
            region.state.clone(),
            dash(region.mode.map(|mode| mode.as_str())),
            yes_no(region.shared),
            region.epoch.to_string(),
            kind_name(region.cut).to_owned(),
            format!("{:.0}", region.dirty_pages_per_s),
            grouped(region.interval_us),
            // Eight digits tell the lives of a region apart; --json has all 32.
            region.generation.chars().take(8).collect(),
        ]);
    }
    rows
}

fn replicas_table(regions: &[RegionStatus]) -> Table {
    let mut rows = table([
        ("REGION", Align::Left),
        ("REPLICA AT", Align::Left),
        ("STATE", Align::Left),
        ("ACKED", Align::Right),
        ("LAG", Align::Right),
        ("PENDING", Align::Right),
        ("SENT", Align::Right),
        ("UPDATES", Align::Right),
    ]);
    for region in regions {
        for replica in &region.replicas {
            rows.add_row([
                region.name.clone(),
                replica.node.clone(),
                replica.state.clone(),
                replica.acked_epoch.to_string(),
                replica.lag_epochs.to_string(),
                about(replica.pending_bytes),
                about(replica.bytes_sent),
                grouped(replica.updates_sent),
            ]);
        }
    }
    rows
}

/// What happened to the tracking of regions: kind, how often, the last time and why.
fn losses_table(regions: &[RegionStatus]) -> Table {
    let mut rows = table([
        ("REGION", Align::Left),
        ("LOSS", Align::Left),
        ("TIMES", Align::Right),
        ("AGO", Align::Right),
        ("LAST REASON", Align::Left),
    ]);
    let now_ms = realtime_ns() / 1_000_000;
    for region in regions {
        for loss in &region.losses {
            let ago = Duration::from_millis(now_ms.saturating_sub(loss.at_ms));
            rows.add_row([
                region.name.clone(),
                loss.kind.to_string(),
                grouped(loss.count),
                up(ago),
                loss.reason.clone(),
            ]);
        }
    }
    rows
}

/// Who writes the cooperative ones of these regions.
fn attachments_table(regions: &[RegionStatus]) -> Table {
    let mut rows = table([
        ("REGION", Align::Left),
        ("SLOT", Align::Right),
        ("PID", Align::Right),
        ("MODE", Align::Left),
        ("STATE", Align::Left),
    ]);
    for region in regions {
        for writer in &region.attachments {
            rows.add_row([
                region.name.clone(),
                writer.slot.to_string(),
                writer.pid.to_string(),
                writer.mode.to_string(),
                writer.state.clone(),
            ]);
        }
    }
    rows
}

/// `3 rounds, the last in 59.9 s of 60.0 s`.
fn audit_text(audit: &AuditStatus) -> String {
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1_000.0);
    let period = seconds(audit.period_ms);
    match audit.last_round_ms {
        Some(last) => format!(
            "{} rounds, the last in {} of {period}",
            grouped(audit.rounds),
            seconds(last)
        ),
        None => format!("first round, {period}"),
    }
}

/// `12 (0.3 %), written in 4 captures in a row`.
fn hot_text(hot: &HotStatus) -> String {
    match hot.after {
        0 => format!("{}, none from now on", grouped(hot.pages)),
        after => format!(
            "{} ({:.1} %), written in {after} captures in a row",
            grouped(hot.pages),
            100.0 * hot.share
        ),
    }
}

/// `4 MiB`, or `4 MiB, up to 1 GiB`.
fn size_text(region: &RegionStatus) -> String {
    let size = ByteSize(region.size);
    if region.max_size > region.size {
        format!("{size}, up to {}", ByteSize(region.max_size))
    } else {
        size.to_string()
    }
}

/// All about one region.
pub(super) fn print_region(out: &mut Output, region: &RegionStatus) -> anyhow::Result<()> {
    out.table(&pairs([
        ("region", region.name.clone()),
        ("size", size_text(region)),
        ("resident", about(region.resident_bytes)),
        ("beside it", about(region.overhead_bytes)),
        ("role", role_name(region.role).to_owned()),
        ("source", dash(region.source.as_deref())),
        ("state", region.state.clone()),
        ("mode", dash(region.mode.map(|mode| mode.as_str()))),
        ("tracking", dash(region.tracking.map(|mode| mode.as_str()))),
        ("chosen", dash(region.chosen.as_deref())),
        (
            "publish",
            dash(region.publish.map(|publish| publish.as_str())),
        ),
        ("shared", yes_no(region.shared)),
        ("owner uid", region.owner_uid.to_string()),
        ("kind", dash(region.kind.map(|kind| kind.as_str()))),
        ("writer pid", dash(region.writer_pid)),
        ("generation", region.generation.clone()),
        (
            "epoch",
            format!("{} ({})", region.epoch, kind_name(region.cut)),
        ),
        ("captures", grouped(region.captures)),
        ("bytes changed", grouped(region.bytes_changed)),
        ("dirty pages/s", format!("{:.1}", region.dirty_pages_per_s)),
        ("pause", format!("{} us", grouped(region.interval_us))),
        ("last capture", format!("{} us", grouped(region.capture_us))),
        ("full compares", grouped(region.full_compares)),
        ("last loss", dash(region.last_loss.as_deref())),
        ("audit", dash(region.audit.as_ref().map(audit_text))),
        ("hot pages", dash(region.hot.as_ref().map(hot_text))),
        ("readers", region.readers.to_string()),
    ]))?;
    if let Some(exact) = &region.exact {
        print_exact(out, exact)?;
    }
    if let Some(applied) = region.applied {
        out.table(&pairs([
            ("applied", grouped(applied.applied)),
            ("ignored", grouped(applied.ignored)),
            ("dropped", grouped(applied.dropped)),
            ("resyncs", grouped(applied.resyncs)),
            ("held back", grouped(applied.held)),
        ]))?;
    }
    if !region.attachments.is_empty() {
        out.line("")?;
        out.table(&attachments_table(std::slice::from_ref(region)))?;
    }
    if !region.losses.is_empty() {
        out.line("")?;
        out.table(&losses_table(std::slice::from_ref(region)))?;
    }
    if !region.replicas.is_empty() {
        out.line("")?;
        out.table(&replicas_table(std::slice::from_ref(region)))?;
    }
    Ok(())
}

/// What exact tracking of a region costs.
fn print_exact(out: &mut Output, exact: &ExactStatus) -> anyhow::Result<()> {
    out.table(&pairs([
        ("cuts", grouped(exact.cuts)),
        (
            "last withheld",
            format!("{} us", grouped(exact.withheld_us)),
        ),
        (
            "longest withheld",
            format!("{} us", grouped(exact.longest_withheld_us)),
        ),
        ("faults", grouped(exact.faults)),
        ("saved pages", grouped(exact.saved_pages)),
        (
            "pool in use",
            format!(
                "{} of {}",
                about(exact.pool_used_bytes),
                about(exact.pool_bytes)
            ),
        ),
        ("voided", grouped(exact.voided)),
    ]))?;
    Ok(())
}

/// A table of names and values without a header.
fn pairs<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> Table {
    let mut pairs = Table::new();
    pairs.load_style(comfy_table::presets::NOTHING);
    for (name, value) in rows {
        // One width, so that tables under each other are in line.
        pairs.add_row([format!("{name:<14}"), value]);
    }
    for column in pairs.column_iter_mut() {
        column.set_padding((0, 2));
    }
    pairs
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Tracked => "tracked",
        Role::Held => "held",
        Role::File => "file",
        Role::Replica => "replica",
    }
}

fn kind_name(cut: bool) -> &'static str {
    if cut { "cut" } else { "convergent" }
}

fn yes_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

fn dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// A time as days, hours, minutes and seconds, the largest two that are not zero.
fn up(time: Duration) -> String {
    let seconds = time.as_secs();
    match (
        seconds / 86_400,
        seconds / 3_600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    ) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, _, _) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_two_units() {
        for (seconds, text) in [
            (0, "0 s"),
            (61, "1 min 1 s"),
            (3_600, "1 h 0 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(up(Duration::from_secs(seconds)), text);
        }
    }
}
