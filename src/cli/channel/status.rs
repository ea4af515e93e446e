//! `channel status`: a server and the channels of its clients.

use super::args::StatusArgs;
use super::factory;
use crate::cli::output::{Align, Output, about, grouped, table};
use crate::client::channel::ServerStatus;

/// Shows the server of a name.
pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let status = factory(&args.target).status(&args.target.name)?;
    let mut out = Output::new();
    if args.report.json {
        out.json(&status)?;
    } else {
        print(&mut out, &status)?;
    }
    Ok(out.done()?)
}

fn print(out: &mut Output, status: &ServerStatus) -> anyhow::Result<()> {
    let connected = status.clients.len();
    let mut facts = table([("CHANNEL", Align::Left), (&status.name, Align::Left)]);
    for (name, value) in [
        ("kind", status.kind.clone()),
        ("operation", status.operation.clone()),
        ("pid", status.pid.to_string()),
        ("workers", status.workers.to_string()),
        ("waiting", status.waiting.clone()),
        ("clients", format!("{connected} of {}", status.max_clients)),
        ("ever", grouped(status.clients_total)),
    ] {
        facts.add_row([name.to_owned(), value]);
    }
    out.table(&facts)?;
    if status.clients.is_empty() {
        return Ok(());
    }
    out.line("")?;
    let mut rows = table([
        ("CLIENT", Align::Right),
        ("GENERATION", Align::Right),
        ("REQUESTS", Align::Right),
        ("RESPONSES", Align::Right),
        ("READ", Align::Right),
        ("FAILED", Align::Right),
        ("PAYLOAD", Align::Right),
        ("FREE", Align::Right),
        ("RESIDENT", Align::Right),
    ]);
    for client in &status.clients {
        rows.add_row([
            client.pid.to_string(),
            client.generation.to_string(),
            grouped(client.requests),
            grouped(client.responses),
            grouped(client.responses_read),
            grouped(client.failed),
            about(client.payload_bytes),
            about(client.free_bytes),
            about(client.resident_bytes),
        ]);
    }
    out.table(&rows)?;
    Ok(())
}
