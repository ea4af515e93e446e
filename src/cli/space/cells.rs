//! `space cas`, `space fetch-add`, `space stat`: numbers in the space, and its servers.

use anyhow::Context as _;
use serde_json::{Value, json};

use super::super::failure::{FAILED, Reported};
use super::super::output::{Align, Output, table};
use super::args::{CasArgs, FetchAddArgs, StatArgs};
use super::{of, open};
use crate::units::ByteSize;
use crate::wire::control::SpaceStatus;

pub(super) fn compare_exchange(args: &CasArgs) -> anyhow::Result<()> {
    let mut space = open(&args.reach)?;
    let found = space
        .compare_exchange(args.offset.0, args.expected, args.new)
        .with_context(|| of(&args.reach.config))?;
    let (Ok(before) | Err(before)) = found;
    let mut out = Output::new();
    if args.reach.report.json {
        out.json(&json!({
            "offset": args.offset.0,
            "before": before,
            "exchanged": found.is_ok(),
        }))?;
    } else {
        out.line(before)?;
    }
    out.done()?;
    match found {
        Ok(_) => Ok(()),
        Err(_) => Err(Reported(FAILED).into()),
    }
}

pub(super) fn fetch_add(args: &FetchAddArgs) -> anyhow::Result<()> {
    let mut space = open(&args.reach)?;
    let before = space
        .fetch_add(args.offset.0, args.add)
        .with_context(|| of(&args.reach.config))?;
    let mut out = Output::new();
    if args.reach.report.json {
        let after = before.wrapping_add(args.add);
        out.json(&json!({ "offset": args.offset.0, "before": before, "after": after }))?;
    } else {
        out.line(before)?;
    }
    Ok(out.done()?)
}

/// Code 1 if any server did not answer; the report says which, and why.
pub(super) fn stat(args: &StatArgs) -> anyhow::Result<()> {
    let mut space = open(&args.reach)?;
    let said = space.stat();
    let all_answered = said.iter().all(|(_, said)| said.is_ok());
    let mut out = Output::new();
    let read = |text: &str| serde_json::from_str(text).unwrap_or(Value::from(text));
    if args.reach.report.json {
        let servers: Vec<_> = said
            .iter()
            .map(|(name, said)| match said {
                Ok(text) => json!({ "name": name, "stat": read(text) }),
                Err(error) => json!({ "name": name, "error": chain(error) }),
            })
            .collect();
        out.json(&json!({ "size": space.size(), "servers": servers }))?;
    } else {
        let mut rows = table([
            ("SERVER", Align::Left),
            ("LIFE", Align::Left),
            ("DURABILITY", Align::Left),
            ("CLIENTS", Align::Right),
            ("OPERATIONS", Align::Right),
            ("CHANGES", Align::Right),
            ("READ", Align::Right),
            ("WRITTEN", Align::Right),
            ("REFUSED", Align::Right),
        ]);
        let mut notes = Vec::new();
        for (name, said) in &said {
            match said.as_ref().map(|text| serde_json::from_str(text)) {
                Ok(Ok(status)) => {
                    rows.add_row(row(name.as_str(), &status));
                    notes.extend(suspects(name.as_str(), &status));
                }
                Ok(Err(_)) => notes.push(format!("{name}: its answer is of another version")),
                Err(error) => notes.push(format!("{name}: {}", chain(error))),
            }
        }
        out.table(&rows)?;
        for line in notes {
            out.line(line)?;
        }
    }
    out.done()?;
    if all_answered {
        return Ok(());
    }
    Err(Reported(FAILED).into())
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text += &format!(": {next}");
        cause = next.source();
    }
    text
}

/// What a server took over from clients that write by mapping.
fn suspects(name: &str, status: &SpaceStatus) -> Vec<String> {
    let Some(writers) = &status.local_writers else {
        return Vec::new();
    };
    let ranges = writers.maybe_modified.iter();
    ranges
        .map(|one| format!("{name}: maybe modified: {}", plain(&one.to_string(), 160)))
        .collect()
}

/// The beginning of a server's words, without what a terminal would obey.
fn plain(text: &str, most: usize) -> String {
    let words = text.chars().filter(|c| !c.is_control());
    words.take(most).collect()
}

fn row(name: &str, status: &SpaceStatus) -> [String; 9] {
    [
        name.to_owned(),
        plain(&status.incarnation, 8),
        plain(&status.durability, 16),
        status.clients.to_string(),
        status.operations.to_string(),
        status.changes.to_string(),
        ByteSize(status.read_bytes).to_string(),
        ByteSize(status.written_bytes).to_string(),
        status.refused.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_does_not_command_the_terminal() {
        assert_eq!(plain("me\u{1b}[2Jm\u{9b}o\nry", 16), "me[2Jmory");
        assert_eq!(plain("replicated", 4), "repl");
    }
}
