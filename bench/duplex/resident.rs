//! Memory that a channel takes, and frames that fill it.

use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::ensure;
use uffd_sync::duplex::Waiting;
use uffd_sync::sys::memfd;
use uffd_sync::units::{KIB, MIB};
use zerocopy::IntoBytes;

use crate::harness::{Goal, Latencies, Options, Outcome, Placement, median};
use crate::inplace::{PATIENCE, Pair};
use crate::link::Job;
use crate::payload::{Touch, fill};
use crate::two_buffers;

pub(crate) const CASES: &[&str] = &["resident-filled", "resident-one-at-a-time"];

const RING: u64 = 8 * MIB;
/// Frames of one filling: as many as fit at the same time.
const FRAME: u64 = MIB - 4 * KIB;
const FRAMES: u64 = RING / MIB;
/// Response ring of a version-1 channel that is made without saying its size.
const V1_RING: u64 = 256 * MIB;

/// Bytes of a channel's memory that are there.
fn resident(pair: &Pair) -> anyhow::Result<f64> {
    let fds = pair.client.segment().fds();
    let each = fds.iter().map(|fd| memfd::resident_bytes(fd.as_fd()));
    Ok(each.sum::<Result<u64, _>>()? as f64)
}

/// As many requests at the same time as fit, then the responses.
fn fill_in_place(pair: &Pair) -> anyhow::Result<()> {
    let mut words = vec![0u64; FRAME as usize / 8];
    let mut sequences = Vec::new();
    for seq in 0..FRAMES {
        fill(&mut words, seq);
        sequences.push(pair.client.send_request(words.as_bytes())?);
    }
    for (seq, sequence) in sequences.into_iter().enumerate() {
        let response = pair.client.receive_for(sequence, PATIENCE)?;
        response.view().read(0, words.as_mut_bytes())?;
        let good = Touch::Lines.is_answer(&words, seq as u64);
        ensure!(good, "response {seq} is wrong");
    }
    Ok(())
}

/// What both kinds of channel keep resident once their rings have been used.
pub(crate) fn run(_options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let job = Job::new(FRAME, Touch::Lines);
    let filled = Pair::start(Placement::Free, Waiting::Park, RING, job)?;
    fill_in_place(&filled)?;
    let filled = resident(&filled)?;

    let single = Pair::start(Placement::Free, Waiting::Park, RING, job)?;
    let mut words = vec![0u64; FRAME as usize / 8];
    for seq in 0..2 * FRAMES {
        fill(&mut words, seq);
        let response = single.client.call(words.as_bytes(), PATIENCE)?;
        response.view().read(0, words.as_mut_bytes())?;
        ensure!(
            Touch::Lines.is_answer(&words, seq),
            "response {seq} is wrong"
        );
    }
    let single = resident(&single)?;

    let two = two_buffers::resident(RING, RING, job, 2 * FRAMES)?;
    let default = two_buffers::resident(RING, V1_RING, job, V1_RING / MIB + 2)?;
    let mib = MIB as f64;
    let case = |case, value: f64| {
        Outcome::times(
            case,
            "MiB",
            value / mib,
            ("two buffers of equal rings", two / mib),
        )
        .note(format!(
            "version 1 with its default response ring of 256 MiB: {:.1} MiB",
            default / mib
        ))
    };
    Ok(vec![
        case(CASES[0], filled).goal(Goal::AtMost(0.51)),
        case(CASES[1], single),
    ])
}

pub(crate) const CASES_LARGE: &[&str] = &["large-frame/two-cores"];
pub(crate) const CASES_LARGE_ONE_CORE: &[&str] = &["large-frame/one-core"];
pub(crate) const CASES_LARGE_FREE: &[&str] = &["large-frame/free"];

pub(crate) fn run_large(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    large(options, Placement::TwoCores, CASES_LARGE[0])
}

pub(crate) fn run_large_one_core(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    large(options, Placement::OneCore, CASES_LARGE_ONE_CORE[0])
}

pub(crate) fn run_large_free(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    large(options, Placement::Free, CASES_LARGE_FREE[0])
}

/// A payload of 100 MiB and one frame that takes nearly all of it.
fn large(
    options: &Options,
    placement: Placement,
    case: &'static str,
) -> anyhow::Result<Vec<Outcome>> {
    let payload = options.pick(20 * MIB, 100 * MIB);
    let job = Job::new(payload - 64 * KIB, Touch::Bytes);
    let pair = Pair::start(placement, Waiting::Adaptive, payload, job)?;
    let mut words = vec![0u64; job.len as usize / 8];
    let (mut calls, mut alone) = (Vec::new(), Vec::new());
    let mut latencies = Latencies::new()?;
    for seq in 0..4 {
        fill(&mut words, seq);
        let mut request = pair.client.acquire_request(job.len as usize)?;
        request.write(0, words.as_bytes())?;
        let started = Instant::now();
        let sequence = request.send();
        let response = pair.client.receive_for(sequence, PATIENCE)?;
        let time = started.elapsed().as_nanos() as f64;
        response.view().read(0, words.as_mut_bytes())?;
        ensure!(job.touch.is_answer(&words, seq), "response {seq} is wrong");
        fill(&mut words, seq);
        let started = Instant::now();
        job.touch.apply_to_all(std::hint::black_box(&mut words));
        alone.push(started.elapsed().as_nanos() as f64 / 1e6);
        if seq > 0 {
            latencies.record(time as u64);
            calls.push(time / 1e6);
        }
    }
    let baseline = ("the computation alone", median(&alone));
    let outcome = Outcome::times(case, "ms", median(&calls), baseline);
    Ok(vec![outcome.latency("channel, default", &latencies).note(
        format!("a frame of {} bytes in {payload}", job.len),
    )])
}
