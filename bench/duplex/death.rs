//! From killing a process to who waits for it knowing.
//!
//! The process that is killed is a child that holds 64 MiB, as a server with a large
//! payload does. The clock starts before the signal is sent and stops in the thread
//! that waited. The bare wait is for the same word of the same kind of process; one for
//! a process that does nothing but hold a word is shown beside it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uffd_sync::client::{
    ChannelError, ClientOptions, DuplexClient, InPlaceDuplexServer, ServerOptions,
};
use uffd_sync::duplex::{BufferConfig, OpenLimits, Segment, Side};
use uffd_sync::shm::SharedMemory;
use uffd_sync::sys::futex::{self, Lifeline, OWNER_DIED};
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::memfd;
use uffd_sync::units::{MIB, PAGE_SIZE};

use crate::harness::{
    Channel, Child, Goal, Latencies, Options, Outcome, Placement, Rounds, median,
};
use crate::inplace::PATIENCE;

pub(crate) const ROLE: &str = "robust";
pub(crate) const ROLE_CHANNEL: &str = "killed-server";

pub(crate) const CASES: &[&str] = &["killed/free", "killed-vs-small-process/free"];
pub(crate) const CASES_PINNED: &[&str] = &["killed/one-core", "killed/two-cores"];

/// Memory of the process that is killed.
const BALLAST: u64 = 64 * MIB;

/// Until the waiting thread sleeps in its wait.
const ASLEEP: Duration = Duration::from_millis(30);

/// Touched memory, so that its death takes as long as that of a real server.
pub(crate) fn ballast() -> Vec<u8> {
    let mut memory = vec![0; BALLAST as usize];
    memory
        .iter_mut()
        .step_by(PAGE_SIZE as usize)
        .for_each(|byte| *byte = 1);
    std::hint::black_box(memory)
}

/// Holds a word until it is killed.
pub(crate) fn serve(mut channel: Channel, _args: &[String]) -> anyhow::Result<()> {
    let (_, mut fds) = channel.receive()?.context("no descriptor")?;
    let page = fds.pop().context("one descriptor")?;
    let mapping = Mapping::shared(page, PAGE_SIZE, Access::ReadWrite)?;
    let _memory = ballast();
    let _held = Lifeline::hold(Arc::new(mapping), 0)?;
    channel.send("held", &[])?;
    channel.receive()?;
    Ok(())
}

/// Kills `pid` from another thread while `wait` waits for that; the nanoseconds from
/// one to the other.
pub(crate) fn kill_and_wait(
    pid: Pid,
    wait: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let killed = std::thread::scope(|scope| {
        let killer = scope.spawn(move || {
            std::thread::sleep(ASLEEP);
            let started = Instant::now();
            kill(pid, Signal::SIGKILL).map(|()| started)
        });
        wait()?;
        let ended = Instant::now();
        let started = killer
            .join()
            .map_err(|_| anyhow::anyhow!("the killing thread panicked"))??;
        anyhow::Ok(ended - started)
    })?;
    Ok(killed.as_nanos() as f64)
}

/// A bare robust futex whose holder is killed.
pub(crate) fn bare(placement: Placement) -> anyhow::Result<f64> {
    let fd = memfd::create("bench-robust", PAGE_SIZE)?;
    let mut child = Child::spawn(ROLE, placement.cores()[1], &[])?;
    child.tell("take", &[fd.as_fd()])?;
    child.hear()?;
    let page = SharedMemory::new(Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite)?);
    kill_and_wait(child.pid(), || await_death(page.atomic_u32(0)))
}

/// Sleeps on a robust word until its holder is dead.
fn await_death(word: &AtomicU32) -> anyhow::Result<()> {
    loop {
        let now = word.load(Ordering::Acquire);
        if now & OWNER_DIED != 0 {
            return Ok(());
        }
        ensure!(futex::is_held(now), "the word was given back");
        futex::wait(word, now, None)?;
    }
}

/// Serves a channel whose only request is never answered, until it is killed.
pub(crate) fn serve_channel(mut channel: Channel, _args: &[String]) -> anyhow::Result<()> {
    let _memory = ballast();
    let server = InPlaceDuplexServer::new(ServerOptions::default())?;
    server.start(|_| {
        loop {
            std::thread::park();
        }
    })?;
    let segment = Segment::create(&BufferConfig::new(PAGE_SIZE, MIB))?;
    let _serving = server.serve_segment(&segment, false)?;
    channel.send("open", &segment.fds())?;
    channel.receive()?;
    Ok(())
}

/// A call under way whose server is killed; `bare` waits for the server's word alone.
fn call(placement: Placement, bare: bool) -> anyhow::Result<f64> {
    let mut server = Child::spawn(ROLE_CHANNEL, placement.cores()[1], &[])?;
    let (_, fds) = server.hear()?;
    let segment = Segment::open(fds, OpenLimits::default())?;
    let client = DuplexClient::over(segment, ClientOptions::default())?;
    let sequence = client.send_request(b"never answered")?;
    if bare {
        let word = client.segment().lifeline_word(Side::Server);
        return kill_and_wait(server.pid(), || await_death(word));
    }
    kill_and_wait(server.pid(), || {
        match client.receive_for(sequence, PATIENCE) {
            Err(ChannelError::PeerDied { .. }) => Ok(()),
            other => bail!("the call ended as {other:?}"),
        }
    })
}

/// Times of a call, of a bare wait for its server's word, and of one for a small process.
struct Deaths {
    rounds: Rounds,
    latencies: [Latencies; 3],
}

impl Deaths {
    fn measure(options: &Options, placement: Placement) -> anyhow::Result<Deaths> {
        let mut latencies = [Latencies::new()?, Latencies::new()?, Latencies::new()?];
        // Every variant is a process that is made for the occasion.
        let rounds = Rounds::run(options, 3, |variant, round| {
            let mut times = Vec::new();
            for _ in 0..options.pick(1, 5) {
                let ns = match variant {
                    0 => call(placement, false)?,
                    1 => call(placement, true)?,
                    _ => bare(placement)?,
                };
                if round > 0 {
                    latencies[variant].record(ns as u64);
                }
                times.push(ns);
            }
            Ok(median(&times))
        })?;
        Ok(Deaths { rounds, latencies })
    }

    fn case(&self, case: &'static str, baseline: &'static str, of: usize) -> Outcome {
        let [calls, ..] = &self.latencies;
        Outcome::times(
            case,
            "us",
            self.rounds.of(0) / 1e3,
            (baseline, self.rounds.of(of) / 1e3),
        )
        .latency("channel", calls)
        .latency("bare", &self.latencies[of])
    }
}

const SAME: &str = "bare robust futex, same process";

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let deaths = Deaths::measure(options, Placement::Free)?;
    Ok(vec![
        deaths.case(CASES[0], SAME, 1).goal(Goal::AtMost(1.5)),
        deaths.case(CASES[1], "bare robust futex, small process", 2),
    ])
}

/// The same with each process on a core of its own, and both on one.
pub(crate) fn run_pinned(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let placements = [Placement::OneCore, Placement::TwoCores];
    let cases = CASES_PINNED.iter().zip(placements);
    cases
        .map(|(case, placement)| {
            let deaths = Deaths::measure(options, placement)?;
            Ok(deaths.case(case, SAME, 1).goal(Goal::AtMost(1.5)))
        })
        .collect()
}
