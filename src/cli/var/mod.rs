//! `var ...`: ordered variables of a running node, from a shell; and their demonstration.

pub mod args;
mod check;
mod demo;
pub(super) mod party;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde_json::json;

use super::NodeAt;
use super::args::Report;
use super::failure::{BadInput, FAILED, Reported};
use super::output::{Align, Output, table};
use crate::client::variables::VariablesLink;
use crate::client::{ClientError, Node};
use crate::engine::variables::{DEFAULT_FILE, VariablesStatus};
use crate::wire::variables::{Line, Request, Response, Row, Shown};
use args::{Patience, VarCommand};

/// How long what is no ordered operation may take.
const ANSWER: Duration = Duration::from_secs(10);

/// Runs one of the commands.
pub(super) fn run(command: VarCommand, node: &NodeAt) -> anyhow::Result<()> {
    match command {
        VarCommand::Get {
            variable,
            ordered,
            patience,
            report,
        } => get(node, variable, ordered, patience, report),
        VarCommand::Set {
            variable,
            value,
            patience,
            report,
        } => {
            let deadline_ms = patience.deadline;
            let value = Shown::Text(value);
            let request = Request::Set {
                variable,
                value,
                deadline_ms,
            };
            change(node, &request, patience, report)
        }
        VarCommand::Cas {
            variable,
            expected,
            new,
            patience,
            report,
        } => {
            let request = Request::Cas {
                variable,
                expected: Shown::Text(expected),
                new: Shown::Text(new),
                deadline_ms: patience.deadline,
            };
            change(node, &request, patience, report)
        }
        VarCommand::Watch {
            variables,
            count,
            report,
        } => watch(node, variables, count, report),
        VarCommand::List(report) => list(node, report),
        VarCommand::Status(report) => status(node, report),
        VarCommand::Reset { with, save, load } => match (save, load.is_empty()) {
            (Some(path), _) => save_to(node, &path),
            (None, false) => load_from(node, &load),
            (None, true) => reset_all(node, &with),
        },
        VarCommand::Init => {
            let mut out = Output::new();
            out.bytes(DEFAULT_FILE.as_bytes())?;
            Ok(out.done()?)
        }
        VarCommand::Demo {
            operations,
            order,
            report,
        } => demo::run(operations, &order, report),
    }
}

fn link(path: &Path) -> anyhow::Result<VariablesLink> {
    Ok(Node::connect(path)?.into_variables()?)
}

fn unexpected(response: &Response) -> anyhow::Error {
    anyhow::anyhow!("the node answered something else: {response:?}")
}

fn get(
    node: &NodeAt,
    variable: String,
    ordered: bool,
    patience: Patience,
    report: Report,
) -> anyhow::Result<()> {
    let request = Request::Get {
        variable: variable.clone(),
        ordered,
        deadline_ms: patience.deadline,
    };
    let deadline = Duration::from_millis(patience.deadline);
    let value = match link(&node.path())?.ask(&request, deadline)? {
        Response::Value { value } => value,
        other => return Err(unexpected(&other)),
    };
    let mut out = Output::new();
    if report.json {
        out.json(&json!({ "variable": variable, "value": value, "ordered": ordered }))?;
    } else {
        out.line(value)?;
    }
    Ok(out.done()?)
}

fn change(
    node: &NodeAt,
    request: &Request,
    patience: Patience,
    report: Report,
) -> anyhow::Result<()> {
    let deadline = Duration::from_millis(patience.deadline);
    let (key, applied, old) = match link(&node.path())?.ask(request, deadline)? {
        Response::Done { key, applied, old } => (key, applied, old),
        other => return Err(unexpected(&other)),
    };
    let mut out = Output::new();
    if report.json {
        out.json(&json!({ "applied": applied, "key": key, "old": old }))?;
    } else if !applied {
        let held = old.map_or_else(|| "something else".to_owned(), |old| on_one_line(&old));
        out.line(format_args!("not swapped: it held {held}"))?;
    }
    out.done()?;
    if applied {
        Ok(())
    } else {
        Err(Reported(FAILED).into())
    }
}

fn watch(
    node: &NodeAt,
    variables: Vec<String>,
    count: Option<u64>,
    report: Report,
) -> anyhow::Result<()> {
    let mut link = link(&node.path())?;
    link.watch(variables)?;
    let mut out = Output::new();
    if !report.json {
        out.line("TIME        VARIABLE          OLD -> NEW")?;
        out.flush()?;
    }
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        match link.hear().map_err(broken_off)? {
            Response::Change(line) => {
                left -= 1;
                if report.json {
                    out.json_line(&line)?;
                } else {
                    out.line(in_words(&line))?;
                    out.flush()?;
                }
            }
            Response::Unavailable { reason } | Response::Ended { reason } => {
                out.done()?;
                anyhow::bail!(reason);
            }
            resync @ Response::Resync { .. } if report.json => out.json_line(&resync)?,
            Response::Resync { time, .. } => {
                out.line(format_args!(
                    "{time:<10}  changes were missed; read the values"
                ))?;
                out.flush()?;
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(out.done()?)
}

/// What the end of a watch without a word means.
fn broken_off(error: ClientError) -> anyhow::Error {
    match error {
        ClientError::Closed => anyhow::anyhow!(
            "the watch broke off: the node was killed, or cut it off since nothing was read \
             for seconds, which its log says; watch again and read the values"
        ),
        other => other.into(),
    }
}

/// A value on one line of a terminal, whatever its bytes are.
fn on_one_line(value: &Shown) -> String {
    let mut line = String::new();
    for c in value.to_string().chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

fn in_words(line: &Line) -> String {
    let by = line.initiator.map_or_else(
        || "another program".to_owned(),
        |id| format!("process {id}"),
    );
    format!(
        "{:<10}  {:<16}  {} -> {}  ({} by {by})",
        line.key.time,
        line.name,
        on_one_line(&line.old),
        on_one_line(&line.new),
        line.operation
    )
}

fn list_of(path: &Path) -> anyhow::Result<Vec<Row>> {
    match link(path)?.ask(&Request::List, ANSWER)? {
        Response::List { variables } => Ok(variables),
        other => Err(unexpected(&other)),
    }
}

fn list(node: &NodeAt, report: Report) -> anyhow::Result<()> {
    let variables = list_of(&node.path())?;
    let mut out = Output::new();
    if report.json {
        out.json(&variables)?;
        return Ok(out.done()?);
    }
    let mut rows = table([
        ("ID", Align::Right),
        ("NAME", Align::Left),
        ("TYPE", Align::Left),
        ("SUBSCRIBERS", Align::Left),
        ("VALUE", Align::Left),
    ]);
    for one in &variables {
        let subscribers: Vec<_> = one.subscribers.iter().map(u32::to_string).collect();
        let value = one.value.as_ref();
        rows.add_row([
            one.id.to_string(),
            one.name.clone(),
            one.kind.clone(),
            subscribers.join(","),
            value.map_or_else(|| "(not a subscriber)".to_owned(), on_one_line),
        ]);
    }
    out.table(&rows)?;
    Ok(out.done()?)
}

fn status_of(path: &Path) -> anyhow::Result<serde_json::Value> {
    match link(path)?.ask(&Request::Status, ANSWER)? {
        Response::Status { status } => Ok(status),
        other => Err(unexpected(&other)),
    }
}

fn status(node: &NodeAt, report: Report) -> anyhow::Result<()> {
    let status = status_of(&node.path())?;
    let mut out = Output::new();
    if report.json {
        out.json(&status)?;
        return Ok(out.done()?);
    }
    let status: VariablesStatus = serde_json::from_value(status).context("reading the status")?;
    out.line(format_args!(
        "process {}  order {}{}  session {}  {}",
        status.process,
        status.order,
        if status.strict { " (strict)" } else { "" },
        status.session,
        status.state
    ))?;
    out.line(format_args!(
        "clock {}  delivered {}  in flight {}  waiting {}  resyncs {}",
        status.clock, status.delivered, status.in_flight, status.waiting, status.resyncs
    ))?;
    let mut rows = table([
        ("PROCESS", Align::Right),
        ("STATE", Align::Left),
        ("CONNECTIONS", Align::Right),
        ("ADDRESS", Align::Left),
        ("TROUBLE", Align::Left),
    ]);
    for link in &status.links {
        rows.add_row([
            link.process.to_string(),
            link.state.clone(),
            link.connections.to_string(),
            link.address.clone(),
            link.trouble.clone().unwrap_or_default(),
        ]);
    }
    out.table(&rows)?;
    Ok(out.done()?)
}

fn freeze(path: &Path) -> anyhow::Result<serde_json::Value> {
    match link(path)?.ask(&Request::Freeze, ANSWER)? {
        Response::Saved { saved } => Ok(saved),
        other => Err(unexpected(&other)),
    }
}

fn renew(path: &Path, saved: &[serde_json::Value]) -> anyhow::Result<u64> {
    let saved = saved.to_vec();
    match link(path)?.ask(&Request::Renew { saved }, ANSWER)? {
        Response::Renewed { session } => Ok(session),
        other => Err(unexpected(&other)),
    }
}

/// Makes the file first, so that nobody is stopped for a path that cannot be written; and
/// never in place of one that is there, which may know more than a node that restarted.
fn save_to(node: &NodeAt, path: &Path) -> anyhow::Result<()> {
    let made = std::fs::File::create_new(path);
    let mut file = made.map_err(|error| {
        let path = path.display();
        BadInput(format!("creating {path}: {error}; nothing was stopped"))
    })?;
    let written = freeze(&node.path()).and_then(|saved| {
        let text = serde_json::to_vec_pretty(&saved)?;
        let whole = file.write_all(&text).and_then(|()| file.sync_all());
        whole.with_context(|| format!("writing {}", path.display()))
    });
    if written.is_err() {
        // Empty or cut short it is of no use, and in the way of the next attempt.
        let _ = std::fs::remove_file(path);
    }
    written
}

fn load_from(node: &NodeAt, files: &[std::path::PathBuf]) -> anyhow::Result<()> {
    let mut saved = Vec::new();
    for path in files {
        let text = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let state = serde_json::from_slice(&text);
        saved.push(state.map_err(|error| BadInput(format!("{}: {error}", path.display())))?);
    }
    tell_session(renew(&node.path(), &saved)?)
}

/// Freezes every member first, so that nothing is delivered behind the merged state.
fn reset_all(node: &NodeAt, with: &[std::path::PathBuf]) -> anyhow::Result<()> {
    let own = node.path();
    let all: Vec<&Path> = std::iter::once(own.as_path())
        .chain(with.iter().map(std::path::PathBuf::as_path))
        .collect();
    check_members(&all)?;
    let mut saved = Vec::new();
    for path in &all {
        saved.push(freeze(path).with_context(|| format!("stopping {}", path.display()))?);
    }
    let mut session = 0;
    for path in &all {
        session = renew(path, &saved).with_context(|| format!("starting {}", path.display()))?;
    }
    tell_session(session)
}

/// Every member has to be named, and once: one that was forgotten would otherwise leave
/// the others stopped for good.
fn check_members(paths: &[&Path]) -> anyhow::Result<()> {
    let mut named: BTreeMap<u32, &Path> = BTreeMap::new();
    let mut members = BTreeSet::new();
    for path in paths {
        let status: VariablesStatus = serde_json::from_value(status_of(path)?)?;
        if status.order == "etcd" {
            // Says itself that there is nothing to begin anew.
            return Ok(());
        }
        let process = status.process;
        if let Some(other) = named.insert(process, path) {
            let (one, other) = (other.display(), path.display());
            let text = format!("{one} and {other} are both process {process}; nothing was stopped");
            return Err(BadInput(text).into());
        }
        for one in list_of(path)? {
            members.extend(one.subscribers);
        }
    }
    match members.iter().find(|member| !named.contains_key(member)) {
        None => Ok(()),
        Some(missing) => Err(BadInput(format!(
            "what process {missing} knows is missing: name the control socket of its node \
             with --with, too, or use --save and --load; nothing was stopped"
        ))
        .into()),
    }
}

fn tell_session(session: u64) -> anyhow::Result<()> {
    let mut out = Output::new();
    out.line(format_args!("session {session} began"))?;
    Ok(out.done()?)
}
