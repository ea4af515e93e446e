//! `space ...`: the one file of an address space, checked and shown; its bytes, read and
//! written.

pub mod args;
mod cells;
mod transfer;

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::output::{Align, Output, table};
use crate::client::space::{Space, SpaceOptions};
pub use args::SpaceCommand;
use args::{CheckArgs, MapArgs, Reach};

use crate::node::space_file;
use crate::space::SpaceMap;
use crate::units::ByteSize;

pub(super) fn run(command: SpaceCommand) -> anyhow::Result<()> {
    match command {
        SpaceCommand::Check(args) => check(&args),
        SpaceCommand::Map(args) => show(&args),
        SpaceCommand::Read(args) => transfer::read(&args),
        SpaceCommand::Write(args) => transfer::write(&args),
        SpaceCommand::Fill(args) => transfer::fill(&args),
        SpaceCommand::Cas(args) => cells::compare_exchange(&args),
        SpaceCommand::FetchAdd(args) => cells::fetch_add(&args),
        SpaceCommand::Stat(args) => cells::stat(&args),
    }
}

/// A client of the space that a command names.
fn open(reach: &Reach) -> anyhow::Result<Space> {
    let config = space_file::load(&reach.config)?;
    let options = SpaceOptions {
        deadline: reach.deadline.map(Duration::from_millis),
        transport: reach.over.into(),
        sockets: reach.sockets.clone(),
        no_mapping: false,
    };
    Ok(Space::connect_with(config, options)?)
}

/// What a range is in, for errors.
fn of(config: &Path) -> String {
    format!("the space of {}", config.display())
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
    let parts = map.split(offset, len).with_context(|| of(&args.config))?;
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
