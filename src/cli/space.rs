//! `space ...`: the one file of an address space, checked and shown.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::args::Report;
use super::output::{Align, Output, table};
use crate::node::space_file;
use crate::space::SpaceMap;
use crate::units::ByteSize;

pub(super) const EXAMPLES: &str = "\
Examples:
  uffd-sync space check --config mcomp.cfg          is the file whole and right?
  uffd-sync space map --config mcomp.cfg            which server holds which addresses
  uffd-sync space map --config mcomp.cfg --offset 1GiB --len 4KiB

The file is the same on every machine of the space. Machines compare the digest that both
commands print: it covers segment_size, names and addresses, no comments.";

/// The commands on an address space.
#[derive(Debug, Subcommand)]
pub enum SpaceCommand {
    /// Reads the file and says what is wrong with it, or what it describes
    Check(CheckArgs),
    /// Shows which server holds which addresses, or the parts of a range
    Map(MapArgs),
}

/// Flags of `space check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The file of the space
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    #[command(flatten)]
    report: Report,
}

/// Flags of `space map`.
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The file of the space
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// First address of a range, whose parts are shown instead of the whole map
    #[arg(long, value_name = "SIZE")]
    pub offset: Option<ByteSize>,
    /// Bytes of that range
    #[arg(long, value_name = "SIZE", default_value = "1", requires = "offset")]
    pub len: ByteSize,
    #[command(flatten)]
    report: Report,
}

pub(super) fn run(command: SpaceCommand) -> anyhow::Result<()> {
    match command {
        SpaceCommand::Check(args) => check(&args),
        SpaceCommand::Map(args) => show(&args),
    }
}

fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let config = space_file::load(&args.config)?;
    let map = &config.map;
    let mut out = Output::new();
    if args.report.json {
        out.json(&json!({
            "valid": true,
            "digest": digest(map),
            "segment_size": map.segment_size(),
            "servers": map.servers().len(),
            "size": map.size(),
            "log": config.log.is_some(),
            "tls": config.tls.is_some(),
            "snapshot": config.snapshot.is_some(),
        }))?;
    } else {
        out.line(format_args!(
            "{}: {} servers of {}, {} in all",
            args.config.display(),
            map.servers().len(),
            ByteSize(map.segment_size()),
            ByteSize(map.size()),
        ))?;
        out.line(format_args!("digest of the map: {}", digest(map)))?;
    }
    Ok(out.done()?)
}

fn show(args: &MapArgs) -> anyhow::Result<()> {
    let config = space_file::load(&args.config)?;
    let map = &config.map;
    let whole = (0, map.size());
    let (offset, len) = args
        .offset
        .map_or(whole, |ByteSize(offset)| (offset, args.len.0));
    let parts = map
        .split(offset, len)
        .with_context(|| format!("the space of {}", args.config.display()))?;
    let mut out = Output::new();
    if args.report.json {
        let parts: Vec<Value> = parts
            .map(|part| {
                let server = &map.servers()[part.server];
                json!({
                    "server": server.name.as_str(),
                    "address": server.address,
                    "first": offset + part.of_range.start,
                    "end": offset + part.of_range.end,
                    "segment_offset": part.offset,
                })
            })
            .collect();
        out.json(&json!({ "digest": digest(map), "size": map.size(), "parts": parts }))?;
    } else {
        let mut rows = table([
            ("SERVER", Align::Left),
            ("ADDRESS", Align::Left),
            ("FIRST", Align::Right),
            ("LAST", Align::Right),
            ("IN ITS SEGMENT", Align::Right),
        ]);
        for part in parts {
            let server = &map.servers()[part.server];
            rows.add_row([
                server.name.as_str(),
                &server.address.to_string(),
                &(offset + part.of_range.start).to_string(),
                &(offset + part.of_range.end - 1).to_string(),
                &part.offset.to_string(),
            ]);
        }
        out.table(&rows)?;
        out.line(format_args!("\ndigest of the map: {}", digest(map)))?;
    }
    Ok(out.done()?)
}

fn digest(map: &SpaceMap) -> String {
    map.digest()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
