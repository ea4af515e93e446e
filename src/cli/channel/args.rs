//! The flags of `channel ...` as clap reads them.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::image::MAX_SIGMA;
use super::operations::OperationKind;
use crate::cli::args::Report;
use crate::duplex::rendezvous::ChannelName;
use crate::limits;
use crate::units::ByteSize;

pub(in crate::cli) const EXAMPLES: &str = "\
Examples:
  uffd-sync channel serve img --op blur &           a server that blurs images in place
  uffd-sync channel call img --file photo.ppm --out out.ppm
  uffd-sync channel serve loud --op upper &
  echo hello | uffd-sync channel call loud          prints HELLO
  uffd-sync channel bench loud --bytes 4KiB         latencies over that channel
  uffd-sync channel status loud

A channel is shared memory between one client and one server of this host: the request
is changed where it lies and becomes the response. The server's socket is
$UFFD_SYNC_CHANNELS/NAME.sock, else $XDG_RUNTIME_DIR/uffd-sync/channels/NAME.sock, else
/run/uffd-sync/channels/NAME.sock; both sides are of the same user, or root.";

const SERVE_EXAMPLES: &str = "\
Operations:
  echo    leaves the request as it is
  xor     combines each byte with 0x5A; done twice it is as before
  upper   turns the letters a-z into A-Z
  blur    Gaussian blur of an image: the request is a binary PPM file (P6, 255)

Examples:
  uffd-sync channel serve img --op blur --payload 64MiB --sigma 4
  uffd-sync channel serve jobs --op xor --workers 4 --clients 8 --wait park

Signals:
  SIGTERM, SIGINT   finish the requests that are being served, tell the clients, end";

const CALL_EXAMPLES: &str = "\
Examples:
  uffd-sync channel call img --file photo.ppm --out out.ppm
  echo hello | uffd-sync channel call loud
  uffd-sync channel call img --file photo.ppm --count 100 --json --out out.ppm";

const BENCH_EXAMPLES: &str = "\
Each response is compared with what the server's operation makes of the request.

Examples:
  uffd-sync channel bench loud
  uffd-sync channel bench loud --bytes 1MiB --seconds 5 --json
  uffd-sync channel bench loud --wait park --depth 16";

/// The commands on channels.
#[derive(Debug, Subcommand)]
pub enum ChannelCommand {
    /// Serves a channel with a built-in operation until it is told to end
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(ServeArgs),
    /// Sends a file or standard input as one request and writes the response
    #[command(after_help = CALL_EXAMPLES)]
    Call(CallArgs),
    /// Measures round trips over a served channel
    #[command(after_help = BENCH_EXAMPLES)]
    Bench(BenchArgs),
    /// Shows a server and its clients' channels
    Status(StatusArgs),
}

/// Which channel, and where servers have their sockets.
#[derive(Debug, Args)]
pub struct Target {
    /// Name of the channel: letters, digits, `.`, `_`, `-`
    pub name: ChannelName,
    /// Folder of the servers' sockets [default: $UFFD_SYNC_CHANNELS, else
    /// $XDG_RUNTIME_DIR/uffd-sync/channels, else /run/uffd-sync/channels]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// How a side waits for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Wait {
    /// Looks again and again; for sides that have a core each
    Spin,
    /// Sleeps at once
    Park,
    /// Spins for at most 30 us where the other side runs on another core, then sleeps
    Adaptive,
}

/// Flags of `channel serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    #[allow(
        missing_docs,
        reason = "a doc here would become the command's help text"
    )]
    pub target: Target,
    /// What is done to each request
    #[arg(long, value_name = "OP")]
    pub op: OperationKind,
    /// Threads that serve each client's requests
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_WORKERS)))]
    pub workers: u32,
    /// How the server waits for requests
    #[arg(long, default_value = "adaptive", value_name = "HOW")]
    pub wait: Wait,
    /// Bytes that the requests of one client can take at a time
    #[arg(long, default_value = "16MiB", value_name = "S")]
    pub payload: ByteSize,
    /// Clients that may be connected at a time, each with memory of its own
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=limits::MAX_CHANNEL_CLIENTS as i64))]
    pub clients: u32,
    /// Standard deviation of the blur in pixels, above 0 and at most 20
    #[arg(long, default_value = "2", value_name = "PIXELS")]
    pub sigma: Sigma,
}

/// Most threads that serve one client's requests.
const MAX_WORKERS: u32 = 64;

/// Flags of `channel call`.
#[derive(Debug, Args)]
pub struct CallArgs {
    #[command(flatten)]
    #[allow(
        missing_docs,
        reason = "a doc here would become the command's help text"
    )]
    pub target: Target,
    /// File with the request [default: standard input]
    #[arg(long, value_name = "F")]
    pub file: Option<PathBuf>,
    /// File for the response [default: standard output]
    #[arg(long, value_name = "F")]
    pub out: Option<PathBuf>,
    /// Sends the same request this many times, one after the other; all responses have to
    /// be equal, one is written
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub count: u64,
    /// Time for each response, for example 500ms, 2s or 1m
    #[arg(long, default_value = "10s", value_name = "TIME")]
    pub timeout: Span,
    #[command(flatten)]
    #[allow(
        missing_docs,
        reason = "a doc here would become the command's help text"
    )]
    pub report: Report,
}

/// Flags of `channel bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    #[allow(
        missing_docs,
        reason = "a doc here would become the command's help text"
    )]
    pub target: Target,
    /// Bytes of each request
    #[arg(long, default_value = "64", value_name = "S")]
    pub bytes: ByteSize,
    /// Seconds of measuring, after a tenth of it for warming up
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// Requests under way at a time
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub depth: u32,
    /// How this side waits for responses
    #[arg(long, default_value = "adaptive", value_name = "HOW")]
    pub wait: Wait,
    /// Time for each response, for example 500ms, 2s or 1m
    #[arg(long, default_value = "10s", value_name = "TIME")]
    pub timeout: Span,
    #[command(flatten)]
    #[allow(
        missing_docs,
        reason = "a doc here would become the command's help text"
    )]
    pub report: Report,
}

/// Flags of `channel status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    #[allow(
        missing_docs,
        reason = "a doc here would become the command's help text"
    )]
    pub target: Target,
    #[command(flatten)]
    #[allow(
        missing_docs,
        reason = "a doc here would become the command's help text"
    )]
    pub report: Report,
}

/// A length of time as it is written on the command line: `500ms`, `2s`, `1.5s`, `1m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

/// A text that is no length of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a time is a number and us, ms, s or m, from 1us to 24 hours, for example 500ms")]
pub struct SpanError;

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        const DAY: f64 = 86_400.0;
        let digits = text.find(|c: char| c.is_ascii_alphabetic());
        let (number, unit) = text.split_at(digits.ok_or(SpanError)?);
        let scale = match unit {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            _ => return Err(SpanError),
        };
        let plain = number.chars().all(|c| c.is_ascii_digit() || c == '.');
        let number: f64 = number.parse().map_err(|_| SpanError)?;
        let seconds = number * scale;
        if !plain || !(1e-6..=DAY).contains(&seconds) {
            return Err(SpanError);
        }
        Ok(Span(Duration::from_secs_f64(seconds)))
    }
}

/// A blur's standard deviation in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sigma(pub f32);

/// A text that is no standard deviation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a standard deviation is a number above 0 and at most {MAX_SIGMA}")]
pub struct SigmaError;

impl FromStr for Sigma {
    type Err = SigmaError;

    fn from_str(text: &str) -> Result<Self, SigmaError> {
        let value: f32 = text.parse().map_err(|_| SigmaError)?;
        if value > 0.0 && value <= MAX_SIGMA {
            Ok(Sigma(value))
        } else {
            Err(SigmaError)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_people_write_them() {
        for (text, micros) in [
            ("1us", 1),
            ("500ms", 500_000),
            ("1.5s", 1_500_000),
            ("2m", 120_000_000),
            ("1440m", 86_400_000_000),
        ] {
            let span = text.parse::<Span>().expect(text);
            assert_eq!(span.0, Duration::from_micros(micros), "{text}");
        }
        for text in [
            "", "5", "s", "-1s", "0s", "1e3s", "infs", "NaNs", "1 s", "1h", "1441m", "0.1us",
        ] {
            assert_eq!(text.parse::<Span>(), Err(SpanError), "{text}");
        }
    }

    #[test]
    fn deviations_in_range() {
        assert_eq!("0.5".parse(), Ok(Sigma(0.5)));
        for text in ["0", "-1", "20.1", "NaN", "inf", "x", ""] {
            assert_eq!(text.parse::<Sigma>(), Err(SigmaError), "{text}");
        }
    }
}
