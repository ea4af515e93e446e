//! What all variants of a case have in common: calls, timed together or one by one.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::time::{ClockId, clock_gettime};
use uffd_sync::sys::process::{monotonic_ns, process_id};

use crate::harness::{Child, Latencies};
use crate::payload::Touch;

/// What one turn of a variant consists of.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Turn {
    /// Calls timed together, filling and reading included.
    pub(crate) calls: u64,
    /// Calls after those, timed one by one from sending to having the response.
    pub(crate) timed: u64,
    /// Pause before each of the latter.
    pub(crate) idle: Duration,
}

impl Turn {
    /// So many calls timed together, and so many one by one, without pauses.
    pub(crate) const fn of(calls: u64, timed: u64) -> Self {
        Self {
            calls,
            timed,
            idle: Duration::ZERO,
        }
    }
}

/// What a server does with each request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// Bytes of request and response, a multiple of 8.
    pub(crate) len: u64,
    pub(crate) touch: Touch,
    /// Processor time beyond that.
    pub(crate) work: Duration,
}

impl Job {
    pub(crate) fn new(len: u64, touch: Touch) -> Self {
        Self {
            len,
            touch,
            work: Duration::ZERO,
        }
    }

    /// As a server's arguments.
    pub(crate) fn to_args(self) -> [String; 3] {
        let work = self.work.as_nanos();
        [
            self.len.to_string(),
            self.touch.name().to_owned(),
            work.to_string(),
        ]
    }

    pub(crate) fn from_args(args: &[String]) -> anyhow::Result<Self> {
        let [len, touch, work] = args else {
            bail!("LEN_BYTES TOUCH WORK_NS")
        };
        Ok(Self {
            len: len.parse()?,
            touch: touch.parse().map_err(anyhow::Error::msg)?,
            work: Duration::from_nanos(work.parse()?),
        })
    }
}

/// A name that no other channel has, of this run or another one.
pub(crate) fn channel_name() -> String {
    static CHANNELS: AtomicU32 = AtomicU32::new(0);
    let number = CHANNELS.fetch_add(1, Ordering::Relaxed);
    format!("uffd-sync-bench-{}-{number}", process_id())
}

/// What a turn found.
pub(crate) struct Measured {
    /// Mean of the calls timed together.
    pub(crate) per_call_ns: f64,
    /// Of those timed one by one.
    pub(crate) latencies: Latencies,
    /// Processor time per call, both processes.
    pub(crate) cpu_ns: f64,
}

impl Measured {
    /// The number that a turn stands for: the mean of the calls timed together, or
    /// where there are none the median of the others.
    pub(crate) fn value_ns(&self) -> f64 {
        if self.per_call_ns.is_nan() {
            self.latencies.at(0.5)
        } else {
            self.per_call_ns
        }
    }
}

/// One side of a comparison, with all of its processes.
pub(crate) trait Variant: Send {
    /// Makes the calls of a turn; every response is checked.
    fn turn(&mut self, turn: Turn) -> anyhow::Result<Measured>;
}

/// A client in this process, of a server in another one.
pub(crate) trait Link: Send {
    /// Tells the server how many requests come.
    fn begin(&mut self, calls: u64) -> anyhow::Result<()>;

    /// Fills request number `seq`, sends it, and checks the response. Returns the
    /// time between sending and having the response if it is to be timed, else 0.
    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration>;

    /// After the last call of a turn: the server rests.
    fn end(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    fn server(&self) -> &Child;
}

/// A link as a variant.
pub(crate) struct Linked<L> {
    link: L,
    next: u64,
}

impl<L: Link> Linked<L> {
    pub(crate) fn new(link: L) -> Self {
        Self { link, next: 1 }
    }
}

impl<L: Link> Variant for Linked<L> {
    fn turn(&mut self, turn: Turn) -> anyhow::Result<Measured> {
        let first = self.next;
        self.next += turn.calls + turn.timed;
        let mut latencies = Latencies::new()?;
        self.link.begin(turn.calls + turn.timed)?;
        let cpu = cpu_times(self.link.server())?;
        let started = Instant::now();
        for seq in first..first + turn.calls {
            self.link.call(seq, false)?;
        }
        let together = started.elapsed();
        for seq in first + turn.calls..self.next {
            if !turn.idle.is_zero() {
                std::thread::sleep(turn.idle);
            }
            latencies.record(self.link.call(seq, true)?.as_nanos() as u64);
        }
        let cpu = cpu_times(self.link.server())? - cpu;
        self.link.end()?;
        Ok(Measured {
            per_call_ns: per(together, turn.calls),
            latencies,
            cpu_ns: per(cpu, turn.calls + turn.timed),
        })
    }
}

/// Mean nanoseconds; NaN where there were no calls.
pub(crate) fn per(time: Duration, calls: u64) -> f64 {
    if calls == 0 {
        f64::NAN
    } else {
        time.as_nanos() as f64 / calls as f64
    }
}

/// Processor time of this process and of the server.
fn cpu_times(server: &Child) -> anyhow::Result<Duration> {
    let own = Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?);
    Ok(own + server.cpu_time()?)
}

/// A client and a server that are both further processes and keep to the lines of
/// `tools/peers`.
pub(crate) struct Peers {
    client: Child,
    server: Child,
    next: u64,
}

impl Peers {
    /// Two processes that have just been started, the server first.
    pub(crate) fn new(server: Child, client: Child) -> Self {
        Self {
            client,
            server,
            next: 1,
        }
    }

    fn cpu_time(&self) -> anyhow::Result<Duration> {
        Ok(self.client.cpu_time()? + self.server.cpu_time()?)
    }
}

impl Variant for Peers {
    fn turn(&mut self, turn: Turn) -> anyhow::Result<Measured> {
        let count = turn.calls + turn.timed;
        self.server.ask(&format!("go {count}"))?;
        let before = self.cpu_time()?;
        let idle = turn.idle.as_micros();
        let line = format!("go {} {} {idle} {}", turn.calls, turn.timed, self.next);
        let answer = self.client.ask(&line)?;
        let cpu = self.cpu_time()? - before;
        self.next += count;
        let (together, values) = match answer.split_once(' ') {
            Some((together, values)) => (together, values),
            None => (answer.as_str(), ""),
        };
        let mut latencies = Latencies::new()?;
        for pair in values.split_whitespace() {
            let (ns, times) = pair.split_once(':').context("VALUE:COUNT")?;
            latencies.record_many(ns.parse()?, times.parse()?);
        }
        Ok(Measured {
            per_call_ns: per(Duration::from_nanos(together.parse()?), turn.calls),
            latencies,
            cpu_ns: per(cpu, count),
        })
    }
}

/// Keeps a processor busy, as a server does that has something to work out.
pub(crate) fn work(time: Duration) {
    if time.is_zero() {
        return;
    }
    let end = monotonic_ns() + time.as_nanos() as u64;
    while monotonic_ns() < end {
        std::hint::spin_loop();
    }
}
