//! `region ...`: the regions of a running node, from a shell.
//!
//! A range is checked against the region before a byte is moved, so a wrong one
//! changes nothing. Reading walks in pieces of [`PIECE`]; each piece of a replica is
//! of one epoch.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use indicatif::ProgressBar;
use serde_json::json;

use super::NodeAt;
use super::args::{RegionCommand, Report};
use super::failure::{BadInput, bad_file};
use super::output::{Output, grouped, progress};
use super::status::{print_region, regions_table};
use crate::client::{Node, Reader, Writer};
use crate::limits;
use crate::region::ReadError;
use crate::sys::process::realtime_ns;
use crate::units::{ByteSize, MIB, checked_range};
use crate::wire::control::{RegionStatus, Role, Terms};
use crate::words::{Mode, Publish, RegionName, WriteKind};

/// Bytes moved at once.
const PIECE: u64 = MIB;
/// Time for the commit of what was written to a cooperative region.
const COMMIT_DEADLINE: Duration = Duration::from_secs(30);
/// Most bytes that `read --json` prints as hexadecimal digits.
const MAX_HEX: u64 = MIB;

/// Runs one of the commands.
pub(super) fn run(command: RegionCommand, node: &NodeAt) -> anyhow::Result<()> {
    match command {
        RegionCommand::Create {
            name,
            size,
            max_size,
            shared,
            cooperative,
            mode,
            publish,
            report,
        } => {
            if cooperative {
                let terms = cooperative_terms(mode, publish)?;
                return create_cooperative(report, node, &name, size, shared, terms);
            }
            check_held_mode(mode)?;
            let sizes = (size, max_size.unwrap_or(size));
            create(report, node, &name, sizes, shared, mode)
        }
        RegionCommand::Grow { name, size, report } => grow(report, node, &name, size),
        RegionCommand::List(report) => list(report, node),
        RegionCommand::Show { name, report } => show(report, node, &name),
        RegionCommand::Write {
            name,
            offset,
            file,
            report,
        } => write(report, node, &name, offset.0, file.as_deref()),
        RegionCommand::Read {
            name,
            offset,
            len,
            out,
            report,
        } => read(report, node, &name, offset.0, len, out.as_deref()),
        RegionCommand::Watch {
            name,
            count,
            report,
        } => watch(report, node, &name, count),
        RegionCommand::Digest { name, report } => digest(report, node, &name),
        RegionCommand::Track {
            name,
            file,
            size,
            shared,
            report,
        } => track(report, node, &name, &file, size, shared),
        RegionCommand::Cut { name, report } => cut(report, node, &name),
        RegionCommand::Remove { name, report } => {
            let mut node = Node::connect(node.path())?;
            node.remove(name.as_str())
                .with_context(|| format!("removing region {name}"))?;
            say(
                report,
                &json!({ "removed": name }),
                format_args!("removed {name}"),
            )
        }
    }
}

/// Prints one object or one line.
fn say(
    report: Report,
    object: &serde_json::Value,
    line: impl std::fmt::Display,
) -> anyhow::Result<()> {
    let mut out = Output::new();
    if report.json {
        out.json(object)?;
    } else {
        out.line(line)?;
    }
    Ok(out.done()?)
}

fn create(
    report: Report,
    node: &NodeAt,
    name: &RegionName,
    (size, max_size): (ByteSize, ByteSize),
    shared: bool,
    mode: Option<Mode>,
) -> anyhow::Result<()> {
    let mut node = Node::connect(node.path())?;
    node.create_held_with_room(name.as_str(), size.0, max_size.0, shared)
        .with_context(|| format!("creating region {name} of {size}"))?;
    let region = region_status(&mut node, name)?;
    done(report, &region, "created")?;
    match (&region.chosen, mode) {
        (Some(why), Some(_)) => note(report, format_args!("no mode is needed: {why}")),
        _ => Ok(()),
    }
}

fn cut(report: Report, node: &NodeAt, name: &RegionName) -> anyhow::Result<()> {
    let mut node = Node::connect(node.path())?;
    let epoch = node
        .cut(name.as_str())
        .with_context(|| format!("making a cut of region {name}"))?;
    say(
        report,
        &json!({ "region": name, "epoch": epoch }),
        format_args!("epoch {epoch}"),
    )
}

fn create_cooperative(
    report: Report,
    node: &NodeAt,
    name: &RegionName,
    size: ByteSize,
    shared: bool,
    terms: Terms,
) -> anyhow::Result<()> {
    let mut node = Node::connect(node.path())?;
    node.create_cooperative(name.as_str(), size.0, shared, terms)
        .with_context(|| format!("creating cooperative region {name} of {size}"))?;
    done(report, &region_status(&mut node, name)?, "created")
}

/// What all writers of a new cooperative region agree on. Which mode `auto` is depends on
/// the writer, so it is not one of them.
fn cooperative_terms(mode: Option<Mode>, publish: Option<Publish>) -> anyhow::Result<Terms> {
    let mode = mode.unwrap_or(Mode::Async);
    if mode == Mode::Auto {
        return Err(BadInput(
            "--mode auto: writers that come later have to know the mode; name async, sync, manual \
             or compare"
                .to_owned(),
        )
        .into());
    }
    Ok(Terms {
        mode,
        publish: publish.unwrap_or(Publish::Timer),
        interval_min_us: None,
        interval_max_us: None,
    })
}

fn grow(report: Report, node: &NodeAt, name: &RegionName, size: ByteSize) -> anyhow::Result<()> {
    let mut node = Node::connect(node.path())?;
    node.grow_held(name.as_str(), size.0)
        .with_context(|| format!("growing region {name}"))?;
    say(
        report,
        &json!({ "region": name, "size": size.0 }),
        format_args!("{name} has {size}"),
    )
}

/// A line for people behind what was reported.
fn note(report: Report, line: impl std::fmt::Display) -> anyhow::Result<()> {
    let mut out = Output::new();
    if !report.json {
        out.line(line)?;
    }
    Ok(out.done()?)
}

/// What the node holds has nothing to find, so there is nothing but `auto` to pick.
fn check_held_mode(mode: Option<Mode>) -> anyhow::Result<()> {
    match mode {
        None | Some(Mode::Auto) => Ok(()),
        Some(mode) => Err(BadInput(format!(
            "--mode {mode}: the node makes every change of a region that it holds itself; leave \
             --mode out, or let a program write the region (client::Writer) or a file be compared \
             (`region track`)"
        ))
        .into()),
    }
}

fn done(report: Report, region: &RegionStatus, verb: &str) -> anyhow::Result<()> {
    let size = ByteSize(region.size);
    let line = format!("{verb} {}: {size}", region.name);
    say(report, &serde_json::to_value(region)?, line)
}

/// The state of one region; an unknown name is bad input.
fn region_status(node: &mut Node, name: &RegionName) -> anyhow::Result<RegionStatus> {
    let status = node.status()?;
    let known = status.regions.len();
    status
        .regions
        .into_iter()
        .find(|region| region.name == name.as_str())
        .ok_or_else(|| {
            let node = status.node;
            BadInput(format!(
                "no region {name} on node {node}, which has {known}; `region list` names them"
            ))
            .into()
        })
}

fn list(report: Report, node: &NodeAt) -> anyhow::Result<()> {
    let regions = Node::connect(node.path())?.status()?.regions;
    let mut out = Output::new();
    if report.json {
        out.json(&regions)?;
    } else {
        out.table(&regions_table(&regions))?;
    }
    Ok(out.done()?)
}

fn show(report: Report, node: &NodeAt, name: &RegionName) -> anyhow::Result<()> {
    let region = region_status(&mut Node::connect(node.path())?, name)?;
    let mut out = Output::new();
    if report.json {
        out.json(&region)?;
    } else {
        print_region(&mut out, &region)?;
    }
    Ok(out.done()?)
}

fn write(
    report: Report,
    node_at: &NodeAt,
    name: &RegionName,
    offset: u64,
    file: Option<&Path>,
) -> anyhow::Result<()> {
    let mut node = Node::connect(node_at.path())?;
    let region = region_status(&mut node, name)?;
    let cooperative = region.kind == Some(WriteKind::Cooperative);
    if region.role != Role::Held && !cooperative {
        return Err(BadInput(format!(
            "region {name} is not held by the node: only what `region create` made is written so"
        ))
        .into());
    }
    let room = checked_range(offset, 0, region.size)
        .map(|_| region.size - offset)
        .with_context(|| format!("writing to region {name}"))?;
    let (mut input, len): (Box<dyn Read>, u64) = match file {
        Some(path) => {
            let naming = || format!("reading {}", path.display());
            let file = File::open(path).map_err(bad_file).with_context(naming)?;
            let metadata = file.metadata().with_context(naming)?;
            if metadata.is_file() {
                (Box::new(file), metadata.len())
            } else {
                buffered(file, room).with_context(naming)?
            }
        }
        None => buffered(io::stdin().lock(), room).context("reading standard input")?,
    };
    checked_range(offset, len, region.size).with_context(|| format!("writing to region {name}"))?;
    let sent = if cooperative {
        write_attached(node_at, name, offset, &mut input, len)?
    } else {
        write_held(&mut node, name, offset, &mut input, len)?
    };
    say(
        report,
        &json!({ "name": name, "offset": offset, "bytes": sent }),
        format_args!("wrote {} bytes at {offset} of {name}", grouped(sent)),
    )
}

/// Writes as one more of a cooperative region's writers, and commits.
fn write_attached(
    node: &NodeAt,
    name: &RegionName,
    offset: u64,
    input: &mut dyn Read,
    len: u64,
) -> anyhow::Result<u64> {
    let writer = Writer::attach(node.path(), name.as_str())
        .with_context(|| format!("attaching to region {name}"))?;
    let mut bytes = vec![0; PIECE.min(len) as usize];
    let guard = writer.write_guard()?;
    let mut done = 0;
    while done < len {
        let piece = &mut bytes[..PIECE.min(len - done) as usize];
        input
            .read_exact(piece)
            .context("reading the input, which became shorter meanwhile")?;
        writer.write(offset + done, piece)?;
        writer.mark_region_changed(offset + done, piece.len() as u64)?;
        done += piece.len() as u64;
    }
    guard
        .commit(COMMIT_DEADLINE)
        .with_context(|| format!("committing what was written to {name}"))?;
    Ok(done)
}

fn write_held(
    node: &mut Node,
    name: &RegionName,
    offset: u64,
    input: &mut dyn Read,
    len: u64,
) -> anyhow::Result<u64> {
    let bar = progress(len);
    let mut piece = vec![0; PIECE.min(len) as usize];
    let mut sent = 0;
    while sent < len {
        let want = PIECE.min(len - sent) as usize;
        input
            .read_exact(&mut piece[..want])
            .context("reading the input, which became shorter meanwhile")?;
        node.write_held(name.as_str(), offset + sent, &piece[..want])
            .with_context(|| format!("writing at {} of region {name}", offset + sent))?;
        sent += want as u64;
        bar.set_position(sent);
    }
    bar.finish_and_clear();
    Ok(sent)
}

/// Reads a stream of unknown length whole, at most one byte more than there is
/// `room` for, so that what does not fit is refused before anything is written.
fn buffered(stream: impl Read, room: u64) -> io::Result<(Box<dyn Read>, u64)> {
    let mut bytes = Vec::new();
    stream
        .take(room.saturating_add(1))
        .read_to_end(&mut bytes)?;
    let len = bytes.len() as u64;
    Ok((Box::new(io::Cursor::new(bytes)), len))
}

fn read(
    report: Report,
    node: &NodeAt,
    name: &RegionName,
    offset: u64,
    len: Option<ByteSize>,
    out_path: Option<&Path>,
) -> anyhow::Result<()> {
    let reader = attach(node, name)?;
    let size = reader.size();
    let len = len.map_or_else(|| size.saturating_sub(offset), |len| len.0);
    checked_range(offset, len, size).with_context(|| format!("reading region {name}"))?;
    if report.json && out_path.is_none() && len > MAX_HEX {
        let most = ByteSize(MAX_HEX);
        return Err(BadInput(format!(
            "--json prints at most {most} as hexadecimal digits; add --out FILE"
        ))
        .into());
    }
    let mut file = match out_path {
        Some(path) => Some(
            File::create(path)
                .map_err(bad_file)
                .with_context(|| format!("creating {}", path.display()))?,
        ),
        None => None,
    };
    let mut out = Output::new();
    let bar = if file.is_some() {
        progress(len)
    } else {
        ProgressBar::hidden()
    };
    let mut hex = String::new();
    let mut piece = vec![0; PIECE.min(len) as usize];
    let mut epoch = reader.control().epoch();
    let mut done = 0;
    while done < len {
        let want = PIECE.min(len - done) as usize;
        let piece = &mut piece[..want];
        epoch = read_piece(&reader, offset + done, piece)
            .with_context(|| format!("reading {want} bytes at {} of {name}", offset + done))?;
        match &mut file {
            Some(file) => file.write_all(piece).context("writing the output file")?,
            None if report.json => hex.push_str(&hex_of(piece)),
            None => out.bytes(piece)?,
        }
        done += want as u64;
        bar.set_position(done);
    }
    bar.finish_and_clear();
    if report.json {
        let mut object = json!({ "name": name, "offset": offset, "len": len, "epoch": epoch });
        object[if file.is_some() { "out" } else { "hex" }] = match out_path {
            Some(path) => json!(path),
            None => json!(hex),
        };
        out.json(&object)?;
    }
    Ok(out.done()?)
}

fn attach(node: &NodeAt, name: &RegionName) -> anyhow::Result<Reader> {
    Reader::attach(node.path(), name.as_str()).with_context(|| format!("attaching region {name}"))
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of one epoch of a replica, or what stands in a source right now, and the
/// epoch they belong to.
fn read_piece(reader: &Reader, offset: u64, piece: &mut [u8]) -> anyhow::Result<u64> {
    match reader.read_at_epoch(|view| view.read(offset, piece)) {
        Ok((whole, epoch)) => {
            whole?;
            Ok(epoch.number)
        }
        Err(ReadError::NotReplica) => {
            reader.read(offset, piece)?;
            Ok(reader.control().epoch())
        }
        Err(error) => Err(error.into()),
    }
}

/// One line per epoch that is seen; of epochs that follow each other faster than
/// they can be printed, the newest.
fn watch(
    report: Report,
    node: &NodeAt,
    name: &RegionName,
    count: Option<u64>,
) -> anyhow::Result<()> {
    let reader = attach(node, name)?;
    let mut node = Node::connect(node.path())?;
    let mut out = Output::new();
    let mut after = reader.control().epoch();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        match reader.wait_epoch(after, Duration::from_secs(1)) {
            Ok(epoch) => after = epoch,
            Err(ReadError::TimedOut) => {
                // Nothing new; ask whether the region is still there.
                region_status(&mut node, name)?;
                continue;
            }
            Err(error) => return Err(error).context("waiting for the next epoch"),
        }
        let region = region_status(&mut node, name)?;
        let kind = if region.cut { "cut" } else { "convergent" };
        let now = realtime_ns();
        if report.json {
            out.json_line(&json!({
                "epoch": after,
                "kind": kind,
                "time_ns": now,
                "bytes_changed": region.bytes_changed,
            }))?;
        } else {
            let changed = grouped(region.bytes_changed);
            let time = time_of_day(now);
            out.line(format_args!(
                "epoch {after:<8} {kind:<10} {time}  {changed} bytes changed"
            ))?;
            out.flush()?;
        }
        left -= 1;
    }
    Ok(out.done()?)
}

/// The time of day in UTC to the microsecond: `13:05:59.000042Z`.
fn time_of_day(realtime_ns: u64) -> String {
    let us = realtime_ns / 1_000;
    let seconds = us / 1_000_000 % 86_400;
    let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
    format!(
        "{hours:02}:{minutes:02}:{:02}.{:06}Z",
        seconds % 60,
        us % 1_000_000
    )
}

fn digest(report: Report, node: &NodeAt, name: &RegionName) -> anyhow::Result<()> {
    let reader = attach(node, name)?;
    let (digest, epoch, stable) = reader
        .digest()
        .with_context(|| format!("reading region {name}"))?;
    let digest = hex_of(&digest);
    let object = json!({ "name": name, "digest": digest, "epoch": epoch, "stable": stable });
    let note = if stable {
        ""
    } else {
        "  (changed while it was read)"
    };
    say(
        report,
        &object,
        format_args!("{digest}  {name}  epoch {epoch}{note}"),
    )
}

fn track(
    report: Report,
    node: &NodeAt,
    name: &RegionName,
    path: &Path,
    size: Option<ByteSize>,
    shared: bool,
) -> anyhow::Result<()> {
    let naming = || format!("tracking {}", path.display());
    let file = File::open(path).map_err(bad_file).with_context(naming)?;
    let metadata = file.metadata().with_context(naming)?;
    if !metadata.is_file() {
        return Err(BadInput("not a regular file".to_owned())).with_context(naming);
    }
    let size = size.map_or(metadata.len(), |size| size.0);
    if size == 0 || size > limits::MAX_REGION_BYTES {
        let most = ByteSize(limits::MAX_REGION_BYTES);
        let text = format!("{size} bytes; a region has 1 B to {most}, --size picks another");
        return Err(BadInput(text)).with_context(naming);
    }
    let mut node = Node::connect(node.path())?;
    node.track_file(name.as_str(), &file, size, shared)
        .with_context(naming)?;
    done(report, &region_status(&mut node, name)?, "tracking")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_day() {
        assert_eq!(time_of_day(0), "00:00:00.000000Z");
        let ns = (86_400 + 13 * 3_600 + 5 * 60 + 59) * 1_000_000_000 + 42_999;
        assert_eq!(time_of_day(ns), "13:05:59.000042Z");
    }

    #[test]
    fn a_stream_is_read_up_to_one_byte_too_many() {
        let (mut input, len) = buffered(&[7u8; 10][..], 4).expect("memory can be read");
        assert_eq!(len, 5);
        let mut bytes = Vec::new();
        input.read_to_end(&mut bytes).expect("memory can be read");
        assert_eq!(bytes, [7; 5]);
        let (_, len) = buffered(&[7u8; 3][..], u64::MAX).expect("memory can be read");
        assert_eq!(len, 3);
    }
}
