//! `space read`, `space write`, `space fill`: streams of any length through bounded memory.
//!
//! Invariants:
//! - I1: at most [`AHEAD`] pieces are under way and as many wait, of [`PIECE`] bytes each.
//! - I2: what is known not to fit is refused before a byte is written: files by their length,
//!   other input if it ends within the first [`AHEAD`] pieces.
//! - I3: a file that a read goes to is replaced once all of it came, or not at all.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use indicatif::ProgressBar;
use serde_json::json;

use super::super::args::Report;
use super::super::failure::{BadInput, bad_file};
use super::super::output::{Output, grouped, progress};
use super::args::{FillArgs, ReadArgs, WriteArgs};
use super::{of, open};
use crate::client::space::{Answer, Space, Ticket};
use crate::units::{ByteSize, MIB, checked_range};

/// Bytes of one operation; pieces end at multiples of it.
const PIECE: u64 = MIB;
/// Operations under way.
const AHEAD: usize = 16;
/// Bytes of one fill.
const FILL_PIECE: u64 = 64 * MIB;
/// Most bytes that `read --json` prints as hexadecimal digits.
const MAX_HEX: u64 = MIB;

pub(super) fn read(args: &ReadArgs) -> anyhow::Result<()> {
    let mut space = open(&args.reach)?;
    let (offset, size) = (args.offset.0, space.size());
    let len = args.len.map_or(size.saturating_sub(offset), |len| len.0);
    let naming = || of(&args.reach.config);
    checked_range(offset, len, size).with_context(naming)?;
    let json = args.reach.report.json;
    if json && args.out.is_none() && len > MAX_HEX {
        let most = ByteSize(MAX_HEX);
        return Err(BadInput(format!(
            "--json prints at most {most} as hexadecimal digits; add --out FILE"
        ))
        .into());
    }
    match &args.out {
        Some(path) => {
            let creating = || format!("creating {}", path.display());
            let target = Target::create(path)
                .map_err(bad_file)
                .with_context(creating)?;
            let bar = progress(len);
            let written = || format!("writing {}", path.display());
            copy_out(&mut space, offset, len, &bar, |bytes| {
                (&target.file).write_all(bytes).with_context(written)
            })
            .with_context(naming)?;
            target.keep().with_context(written)?;
            bar.finish_and_clear();
            let report = json!({ "offset": offset, "bytes": len, "out": path });
            say(
                args.reach.report,
                &report,
                format_args!("read {} bytes", grouped(len)),
            )
        }
        None if json => {
            let mut hex = String::with_capacity(2 * len as usize);
            copy_out(&mut space, offset, len, &ProgressBar::hidden(), |bytes| {
                hex.extend(bytes.iter().map(|byte| format!("{byte:02x}")));
                Ok(())
            })
            .with_context(naming)?;
            let mut out = Output::new();
            out.json(&json!({ "offset": offset, "bytes": len, "hex": hex }))?;
            Ok(out.done()?)
        }
        None => {
            let mut out = Output::new();
            copy_out(&mut space, offset, len, &ProgressBar::hidden(), |bytes| {
                Ok(out.bytes(bytes)?)
            })
            .with_context(naming)?;
            Ok(out.done()?)
        }
    }
}

/// Where a read goes: beside the file that it is to be, until it is whole. What was there
/// stays as it was if a server fails.
struct Target {
    file: File,
    /// The file beside and the one to be; none where the path is no ordinary file.
    part: Option<(PathBuf, PathBuf)>,
}

impl Target {
    fn create(path: &Path) -> io::Result<Self> {
        let there = fs::metadata(path).ok();
        if there.as_ref().is_some_and(|there| !there.is_file()) {
            let file = File::create(path)?;
            return Ok(Self { file, part: None });
        }
        // Behind links, which stay.
        let whole = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut beside = whole.clone().into_os_string();
        beside.push(".part");
        let beside = PathBuf::from(beside);
        let file = File::create(&beside)?;
        if let Some(there) = there {
            file.set_permissions(there.permissions())?;
        }
        let part = Some((beside, whole));
        Ok(Self { file, part })
    }

    fn keep(mut self) -> io::Result<()> {
        match self.part.take() {
            Some((beside, whole)) => fs::rename(beside, whole),
            None => Ok(()),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some((beside, _)) = &self.part {
            // What is left of it says by its name that it is not whole.
            let _ = fs::remove_file(beside);
        }
    }
}

/// Reads a range in pieces, several under way, and hands them over in order.
fn copy_out(
    space: &mut Space,
    offset: u64,
    len: u64,
    bar: &ProgressBar,
    mut sink: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (mut asked, mut done) = (0, 0);
    let mut tickets = VecDeque::new();
    while done < len {
        while asked < len && tickets.len() < AHEAD {
            let piece = piece_at(offset + asked, PIECE).min(len - asked);
            tickets.push_back(space.submit_read(offset + asked, piece)?);
            asked += piece;
        }
        let Some(ticket) = tickets.pop_front() else {
            break;
        };
        let answer = space.wait(ticket);
        let answer = answer.with_context(|| format!("{} bytes were read before", grouped(done)))?;
        if let Answer::Bytes(bytes) = answer {
            sink(&bytes)?;
            done += bytes.len() as u64;
        }
        bar.set_position(done);
    }
    Ok(())
}

pub(super) fn write(args: &WriteArgs) -> anyhow::Result<()> {
    let mut space = open(&args.reach)?;
    let naming = || of(&args.reach.config);
    let offset = args.offset.0;
    checked_range(offset, 0, space.size()).with_context(naming)?;
    let (mut input, known): (Box<dyn Read>, Option<u64>) = match &args.file {
        Some(path) => open_input(path)?,
        None => (Box::new(io::stdin().lock()), None),
    };
    if let Some(len) = known {
        checked_range(offset, len, space.size()).with_context(naming)?;
    }
    let bar = known.map_or_else(ProgressBar::hidden, progress);
    let written = copy_in(&mut space, offset, &mut *input, &bar).with_context(naming)?;
    bar.finish_and_clear();
    let report = json!({ "offset": offset, "bytes": written });
    let line = format!("wrote {} bytes at {offset}", grouped(written));
    say(args.reach.report, &report, line)
}

fn open_input(path: &Path) -> anyhow::Result<(Box<dyn Read>, Option<u64>)> {
    let naming = || format!("reading {}", path.display());
    let file = File::open(path).map_err(bad_file).with_context(naming)?;
    let metadata = file.metadata().with_context(naming)?;
    if metadata.is_dir() {
        return Err(BadInput(format!("{} is a folder", path.display())).into());
    }
    let len = metadata.is_file().then_some(metadata.len());
    Ok((Box::new(file), len))
}

/// Writes a stream in pieces, several under way. Says how many bytes it had.
fn copy_in(
    space: &mut Space,
    offset: u64,
    input: &mut dyn Read,
    bar: &ProgressBar,
) -> anyhow::Result<u64> {
    let size = space.size();
    let mut waiting = VecDeque::new();
    let mut got = 0;
    let mut ended = false;
    let mut next = |got: &mut u64| -> anyhow::Result<Option<Vec<u8>>> {
        let want = piece_at(offset.saturating_add(*got), PIECE);
        let mut piece = Vec::with_capacity(want as usize);
        let read = { &mut *input }.take(want).read_to_end(&mut piece);
        *got += read.context("reading the input")? as u64;
        Ok((!piece.is_empty()).then_some(piece))
    };
    while waiting.len() < AHEAD && !ended {
        match next(&mut got)? {
            Some(piece) => waiting.push_back(piece),
            None => ended = true,
        }
    }
    if ended {
        checked_range(offset, got, size)?;
    }
    let (mut sent, mut done) = (0, 0);
    let mut tickets: VecDeque<(Ticket, u64)> = VecDeque::new();
    loop {
        match waiting.pop_front() {
            Some(piece) => {
                let len = piece.len() as u64;
                if checked_range(offset + sent, len, size).is_err() {
                    finish(space, &mut tickets, &mut done, bar)?;
                    bail!(
                        "the input does not end where the space does, at {size}: the first {} \
                         bytes of it were written, at {offset}",
                        grouped(done)
                    );
                }
                tickets.push_back((space.submit_write(offset + sent, piece)?, len));
                space.progress();
                sent += len;
            }
            None if tickets.is_empty() => return Ok(done),
            None => {}
        }
        if tickets.len() >= AHEAD || waiting.is_empty() {
            take(space, &mut tickets, &mut done, bar)?;
        }
        if !ended && waiting.is_empty() {
            match next(&mut got)? {
                Some(piece) => waiting.push_back(piece),
                None => ended = true,
            }
        }
    }
}

fn finish(
    space: &mut Space,
    tickets: &mut VecDeque<(Ticket, u64)>,
    done: &mut u64,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    while !tickets.is_empty() {
        take(space, tickets, done, bar)?;
    }
    Ok(())
}

/// Waits for the oldest piece.
fn take(
    space: &mut Space,
    tickets: &mut VecDeque<(Ticket, u64)>,
    done: &mut u64,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let Some((ticket, len)) = tickets.pop_front() else {
        return Ok(());
    };
    let answer = space.wait(ticket);
    answer.with_context(|| {
        let under_way = tickets.iter().map(|(_, len)| len).sum::<u64>();
        format!(
            "{} bytes were written before, of {} behind them nothing is said",
            grouped(*done),
            grouped(under_way)
        )
    })?;
    *done += len;
    bar.set_position(*done);
    Ok(())
}

pub(super) fn fill(args: &FillArgs) -> anyhow::Result<()> {
    let mut space = open(&args.reach)?;
    let (offset, size) = (args.offset.0, space.size());
    let len = args.len.map_or(size.saturating_sub(offset), |len| len.0);
    let naming = || of(&args.reach.config);
    checked_range(offset, len, size).with_context(naming)?;
    let bar = progress(len);
    let (mut asked, mut done) = (0, 0);
    let mut tickets = VecDeque::new();
    while done < len {
        while asked < len && tickets.len() < AHEAD {
            let piece = piece_at(offset + asked, FILL_PIECE).min(len - asked);
            let ticket = space.submit_fill(offset + asked, piece, args.byte);
            tickets.push_back((ticket.with_context(naming)?, piece));
            asked += piece;
        }
        take(&mut space, &mut tickets, &mut done, &bar).with_context(naming)?;
    }
    bar.finish_and_clear();
    let report = json!({ "offset": offset, "bytes": len, "byte": args.byte });
    let line = format!(
        "filled {} bytes at {offset} with {}",
        grouped(len),
        args.byte
    );
    say(args.reach.report, &report, line)
}

/// Bytes from `address` to the next multiple of `piece`.
fn piece_at(address: u64, piece: u64) -> u64 {
    piece - address % piece
}

/// Prints one object, or one line.
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
