//! The computation without any channel: a process that does the server's job on
//! memory of its own, filling it in outside of the clock as a client would.

use std::time::Instant;

use anyhow::{Context, ensure};

use crate::harness::{Channel, Child, Latencies, Placement};
use crate::link::{Job, Measured, Turn, Variant, work};
use crate::payload::fill;

pub(crate) const ROLE: &str = "alone";

/// Answers `go N` with the median of N times, in nanoseconds.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let job = Job::from_args(args)?;
    let mut words = vec![0u64; job.len as usize / 8];
    while let Some((line, _)) = channel.receive()? {
        let count: u64 = line.strip_prefix("go ").context("go N")?.parse()?;
        let mut times = Vec::new();
        for seq in 1..=count {
            fill(&mut words, seq);
            let started = Instant::now();
            job.touch.apply_to_all(std::hint::black_box(&mut words));
            work(job.work);
            times.push(started.elapsed().as_nanos().to_string());
            ensure!(job.touch.is_answer(&words, seq), "computed wrongly");
        }
        channel.send(&times.join(" "), &[])?;
    }
    Ok(())
}

struct Alone(Child);

impl Variant for Alone {
    fn turn(&mut self, turn: Turn) -> anyhow::Result<Measured> {
        let answer = self.0.ask(&format!("go {}", turn.calls + turn.timed))?;
        let mut latencies = Latencies::new()?;
        for ns in answer.split(' ') {
            latencies.record(ns.parse()?);
        }
        Ok(Measured {
            per_call_ns: f64::NAN,
            latencies,
            cpu_ns: f64::NAN,
        })
    }
}

/// The job alone, where the server would do it.
pub(crate) fn variant(placement: Placement, job: Job) -> anyhow::Result<Box<dyn Variant>> {
    let args = job.to_args();
    let args = args.each_ref().map(String::as_str);
    let child = Child::spawn(ROLE, placement.cores()[1], &args)?;
    Ok(Box::new(Alone(child)))
}
