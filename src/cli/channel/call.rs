//! `channel call`: one request from a file or a pipe, its response to a file or a pipe.

use std::fs::File;
use std::io::{Read, Write};
use std::time::Instant;

use anyhow::Context;
use serde_json::json;

use super::args::CallArgs;
use super::factory;
use super::times::Times;
use crate::cli::failure::BadInput;
use crate::cli::output::{Output, grouped};
use crate::client::channel::{AnyDuplexClient, ClientOptions};
use crate::limits;

/// Most bytes that `--json` prints as hexadecimal digits.
const MAX_HEX: usize = 1 << 20;

/// Calls and writes the response.
pub(super) fn run(args: &CallArgs) -> anyhow::Result<()> {
    let request = request(args)?;
    let name = &args.target.name;
    let options = ClientOptions {
        connect_timeout: args.timeout.0,
        ..ClientOptions::default()
    };
    let mut client = factory(&args.target).create_client(name, options)?;
    let mut times = Times::new();
    let response = calls(args, &mut client, &request, &mut times)
        .with_context(|| format!("calling channel {name}"))?;
    if args.report.json && args.out.is_none() && response.len() > MAX_HEX {
        let text = "--json prints at most 1 MiB as hexadecimal digits; add --out FILE";
        return Err(BadInput(text.to_owned()).into());
    }
    if let Some(path) = &args.out {
        let writing = || format!("writing {}", path.display());
        let mut file = File::create(path)
            .map_err(|error| BadInput(error.to_string()))
            .with_context(writing)?;
        file.write_all(&response).with_context(writing)?;
    }
    let mut out = Output::new();
    if args.report.json {
        let mut report = json!({
            "channel": name.as_str(),
            "bytes": request.len(),
            "response_bytes": response.len(),
            "calls": args.count,
            "round_trip_us": times.summary(),
        });
        report[if args.out.is_some() { "out" } else { "hex" }] = match &args.out {
            Some(path) => json!(path),
            None => json!(hex_of(&response)),
        };
        out.json(&report)?;
    } else if args.out.is_none() {
        out.bytes(&response)?;
    } else if args.count > 1 {
        let count = grouped(args.count);
        out.line(format_args!("{count} calls: {}", times.summary()))?;
    }
    Ok(out.done()?)
}

/// The request's bytes: at most what any channel can carry.
fn request(args: &CallArgs) -> anyhow::Result<Vec<u8>> {
    if let Some(folder) = args.out.as_deref().and_then(|out| out.parent())
        && !folder.as_os_str().is_empty()
        && !folder.is_dir()
    {
        let text = format!(
            "no folder {} for --out",
            args.out
                .as_ref()
                .map_or_else(String::new, |o| o.display().to_string())
        );
        return Err(BadInput(text).into());
    }
    let most = limits::MAX_CHANNEL_PAYLOAD;
    let mut bytes = Vec::new();
    let read = |from: &mut dyn Read, bytes: &mut Vec<u8>| from.take(most + 1).read_to_end(bytes);
    match &args.file {
        Some(path) => {
            let reading = || format!("reading {}", path.display());
            let mut file = File::open(path)
                .map_err(|error| BadInput(error.to_string()))
                .with_context(reading)?;
            read(&mut file, &mut bytes).with_context(reading)?
        }
        None => read(&mut std::io::stdin().lock(), &mut bytes).context("reading standard input")?,
    };
    if bytes.len() as u64 > most {
        let text = format!("the request is longer than {most} bytes, the most of any channel");
        return Err(BadInput(text).into());
    }
    Ok(bytes)
}

fn calls(
    args: &CallArgs,
    client: &mut AnyDuplexClient,
    request: &[u8],
    times: &mut Times,
) -> anyhow::Result<Vec<u8>> {
    let mut first: Option<Vec<u8>> = None;
    for number in 1..=args.count {
        let begun = Instant::now();
        let response = client.call(request, args.timeout.0)?;
        times.record(begun.elapsed());
        match &first {
            None => first = Some(response),
            Some(first) if *first == response => {}
            Some(_) => anyhow::bail!("response {number} differs from the first"),
        }
    }
    Ok(first.unwrap_or_default())
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
