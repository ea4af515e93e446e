//! `channel bench`: round trips over a served channel, verified and counted.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::json;

use super::args::BenchArgs;
use super::factory;
use super::operations::{Operation, OperationError, OperationKind, OwnBytes};
use super::times::Times;
use crate::cli::failure::BadInput;
use crate::cli::output::{Output, about, grouped};
use crate::client::channel::{ChannelError, ClientOptions, DuplexClient};
use crate::limits;

/// Measures and reports.
pub(super) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let name = &args.target.name;
    if args.bytes.0 > limits::MAX_CHANNEL_PAYLOAD {
        let most = limits::MAX_CHANNEL_PAYLOAD;
        let text = format!(
            "--bytes {}: at most {most} bytes go through a channel",
            args.bytes
        );
        return Err(BadInput(text).into());
    }
    let factory = factory(&args.target);
    let described = factory.status(name)?.operation;
    let operation = Operation::from_description(&described);
    let request = request(args.bytes.0 as usize, operation.as_ref());
    let expected = operation.map(|operation| expected(&operation, &request));
    let options = ClientOptions {
        waiting: args.wait.into(),
        connect_timeout: args.timeout.0,
        ..ClientOptions::default()
    };
    let client = factory.create_in_place_client(name, options)?;
    let run = Run {
        client: &client,
        request: &request,
        expected: expected.as_deref(),
        args,
    };
    let measured = Duration::from_secs(args.seconds);
    run.for_time(measured / 10)
        .and_then(|_| run.for_time(measured))
        .map(|(times, took)| (times, took.as_secs_f64()))
        .with_context(|| format!("calling channel {name}"))
        .and_then(|(times, seconds)| print(args, &described, request.len(), &times, seconds))
}

/// Random-looking bytes, or an image of about that size for a blur.
fn request(len: usize, operation: Option<&Operation>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    if operation.is_some_and(|operation| operation.kind == OperationKind::Blur) {
        // A square of what is left beside a header of at most 20 bytes, one pixel at least.
        let side = ((len.saturating_sub(20) / 3) as f64).sqrt() as usize;
        let side = side.clamp(1, 65_535);
        bytes.extend(format!("P6 {side} {side} 255\n").into_bytes());
        let pixels = (0..side * side * 3).map(|at| (at * 31 + at / 97) as u8);
        bytes.extend(pixels);
        return bytes;
    }
    bytes.extend((0..len).map(|at| (at * 31 + at / 97) as u8));
    bytes
}

/// What the server has to make of it.
fn expected(operation: &Operation, request: &[u8]) -> Vec<u8> {
    let place = OwnBytes(RefCell::new(request.to_vec()));
    match operation.apply(&place) {
        Ok(()) | Err(OperationError::Image(_)) => place.0.into_inner(),
        Err(OperationError::Place(never)) => match never {},
    }
}

struct Run<'a> {
    client: &'a DuplexClient,
    request: &'a [u8],
    expected: Option<&'a [u8]>,
    args: &'a BenchArgs,
}

impl Run<'_> {
    /// Keeps `depth` requests under way for some time.
    fn for_time(&self, time: Duration) -> anyhow::Result<(Times, Duration)> {
        let mut times = Times::new();
        let begun = Instant::now();
        let mut under_way = std::collections::VecDeque::new();
        while begun.elapsed() < time {
            while under_way.len() < self.args.depth as usize {
                let sent = Instant::now();
                match self.client.send_request(self.request) {
                    Ok(sequence) => under_way.push_back((sequence, sent)),
                    // No room for one more: as many as there is room for, then.
                    Err(ChannelError::Full) if !under_way.is_empty() => break,
                    Err(error) => return Err(error.into()),
                }
            }
            self.take(&mut under_way, &mut times)?;
        }
        while !under_way.is_empty() {
            self.take(&mut under_way, &mut times)?;
        }
        Ok((times, begun.elapsed()))
    }

    fn take(
        &self,
        under_way: &mut std::collections::VecDeque<(u64, Instant)>,
        times: &mut Times,
    ) -> anyhow::Result<()> {
        let Some((sequence, sent)) = under_way.pop_front() else {
            return Ok(());
        };
        let response = self.client.receive_for(sequence, self.args.timeout.0)?;
        times.record(sent.elapsed());
        if let Some(expected) = self.expected
            && !is_equal(&response.view(), expected)
        {
            anyhow::bail!("response {sequence} is not what the operation makes of the request");
        }
        Ok(())
    }
}

/// Compares a piece at a time, without room for the whole response.
fn is_equal(found: &crate::duplex::FrameBytes<'_>, expected: &[u8]) -> bool {
    let mut piece = [0; 4096];
    found.len() == expected.len()
        && expected
            .chunks(piece.len())
            .enumerate()
            .all(|(number, part)| {
                let piece = &mut piece[..part.len()];
                found.read(number * 4096, piece).is_ok() && piece == part
            })
}

fn print(
    args: &BenchArgs,
    described: &str,
    bytes: usize,
    times: &Times,
    seconds: f64,
) -> anyhow::Result<()> {
    let calls = times.count();
    let (per_second, summary) = (calls as f64 / seconds, times.summary());
    let verified = Operation::from_description(described).is_some();
    let mut out = Output::new();
    if args.report.json {
        out.json(&json!({
            "channel": args.target.name.as_str(),
            "operation": described,
            "bytes": bytes,
            "depth": args.depth,
            "seconds": seconds,
            "calls": calls,
            "calls_per_second": per_second,
            "bytes_per_second": per_second * bytes as f64,
            "verified": verified,
            "round_trip_us": summary,
        }))?;
    } else {
        let name = &args.target.name;
        out.line(format_args!(
            "channel {name}, {described}: {bytes} bytes, {} under way",
            args.depth
        ))?;
        out.line(format_args!("round trip  {summary}"))?;
        let rate = grouped(per_second as u64);
        let speed = about((per_second * bytes as f64) as u64);
        let note = if verified {
            "each verified"
        } else {
            "not verified"
        };
        let calls = grouped(calls);
        out.line(format_args!(
            "{calls} calls, {note}; {rate} calls/s, {speed}/s each way"
        ))?;
    }
    Ok(out.done()?)
}
