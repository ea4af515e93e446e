//! The peers' client and server processes: `uffd-sync-peers PEER SIDE CORE ARGS...`.
//!
//! Standard input is one end of a socket over which lines go both ways:
//!
//! | to | line | answer |
//! |---|---|---|
//! | server | `go N` | `ready`, then N requests are served |
//! | client | `go CALLS TIMED IDLE_US FIRST` | `NS VALUE:COUNT ...` |
//!
//! A client makes CALLS calls that are timed together (NS), then TIMED calls timed
//! one by one with a pause of IDLE_US before each: filling the request and reading
//! the response lie outside of these clocks. Requests are numbered from FIRST on.

mod iceoryx;
#[allow(dead_code, reason = "the bench uses the rest")]
#[path = "../../../bench/duplex/payload.rs"]
mod payload;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Stands for no particular core.
const ANYWHERE: &str = "-";

fn main() -> anyhow::Result<()> {
    // A bench that is killed takes its peers along.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [peer, side, core, rest @ ..] = args.as_slice() else {
        bail!("usage: uffd-sync-peers PEER SIDE CORE ARGS...")
    };
    if core != ANYWHERE {
        let mut cores = CpuSet::new();
        cores.set(core.parse()?)?;
        sched_setaffinity(Pid::from_raw(0), &cores)?;
    }
    let lines = Lines::new()?;
    match (peer.as_str(), side.as_str()) {
        ("iceoryx2", "server") => iceoryx::serve(lines, rest),
        ("iceoryx2", "client") => iceoryx::call(lines, rest),
        _ => bail!("no such peer or side: {peer} {side}"),
    }
}

/// The socket that standard input is.
struct Lines {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Lines {
    fn new() -> anyhow::Result<Self> {
        let reader = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
        Ok(Self {
            writer: reader.try_clone()?,
            reader: BufReader::new(reader),
        })
    }

    /// The numbers behind `go`; none at the end of the stream.
    fn go(&mut self) -> anyhow::Result<Option<Vec<u64>>> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let numbers = line.trim_end().strip_prefix("go ").context("go N...")?;
        let numbers = numbers.split(' ').map(str::parse);
        Ok(Some(numbers.collect::<Result<_, _>>()?))
    }

    fn say(&mut self, line: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.writer, "{line}")?)
    }
}

/// What a client process is asked to do, and its answer.
fn serve_calls(
    mut lines: Lines,
    mut call: impl FnMut(u64, bool) -> anyhow::Result<Duration>,
) -> anyhow::Result<()> {
    while let Some(numbers) = lines.go()? {
        let [calls, timed, idle_us, first] = numbers[..] else {
            bail!("go CALLS TIMED IDLE_US FIRST")
        };
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
        let started = Instant::now();
        for seq in first..first + calls {
            call(seq, false)?;
        }
        let total = started.elapsed().as_nanos();
        for seq in first + calls..first + calls + timed {
            if idle_us > 0 {
                std::thread::sleep(Duration::from_micros(idle_us));
            }
            histogram.saturating_record(call(seq, true)?.as_nanos() as u64);
        }
        let mut answer = total.to_string();
        for value in histogram.iter_recorded() {
            let (ns, count) = (value.value_iterated_to(), value.count_at_value());
            answer.push_str(&format!(" {ns}:{count}"));
        }
        lines.say(&answer)?;
    }
    Ok(())
}

/// Fails where a response is not what the request asked for.
fn check(is_answer: bool, seq: u64) -> anyhow::Result<()> {
    ensure!(is_answer, "the response to request {seq} is wrong");
    Ok(())
}
