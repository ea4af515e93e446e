//! The channel of two buffers, version 1: requests in one ring, responses in another.
//!
//! The server reads the request where it lies and writes the response where it will
//! lie, so that each byte is copied at most once.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use uffd_sync::zerobuffer::duplex::{ClientOptions, DuplexClient, DuplexServer, ServerOptions};
use uffd_sync::zerobuffer::{BufferConfig, Wait};
use zerocopy::IntoBytes;

use crate::harness::{Channel, Child, Placement};
use crate::link::{Job, Link, Linked, Variant, channel_name, work};
use crate::payload::fill;

pub(crate) const ROLE: &str = "two-buffers";

const METADATA: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(20);

fn wait_name(wait: Wait) -> &'static str {
    match wait {
        Wait::Park => "park",
        Wait::Spin => "spin",
        Wait::Adaptive => "adaptive",
    }
}

fn wait_by_name(name: &str) -> anyhow::Result<Wait> {
    [Wait::Park, Wait::Spin, Wait::Adaptive]
        .into_iter()
        .find(|wait| wait_name(*wait) == name)
        .context("no such way of waiting")
}

fn config(ring: u64, wait: Wait) -> BufferConfig {
    BufferConfig {
        wait,
        // Otherwise all of it would be resident from the beginning.
        reserve: false,
        ..BufferConfig::new(METADATA, ring)
    }
}

/// Serves until its channel is closed: NAME WAIT RING_BYTES, then the job.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let [name, wait, ring, job @ ..] = args else {
        bail!("NAME WAIT RING_BYTES JOB...")
    };
    let (wait, ring, job) = (wait_by_name(wait)?, ring.parse()?, Job::from_args(job)?);
    let mut options = ServerOptions::default();
    options.request = config(ring, wait);
    options.wait = wait;
    let server = DuplexServer::start(name, options, move |frame, reply| {
        let len = frame.len() as usize / 8;
        reply.reserve(frame.len())?;
        // SAFETY: required: valid, aligned, and written by nobody else meanwhile.
        // Frames here are multiples of 8 and so is where they lie; the request is
        // this process's until it is released, the response until it is sent.
        let (request, response) = unsafe {
            (
                std::slice::from_raw_parts(frame.as_ptr().cast::<u64>(), len),
                std::slice::from_raw_parts_mut(reply.as_ptr().cast::<u64>(), len),
            )
        };
        job.touch.apply_to(request, response);
        work(job.work);
        Ok(())
    })?;
    channel.send("open", &[])?;
    while channel.receive()?.is_some() {
        channel.send("still here", &[])?;
    }
    ensure!(server.stop(PATIENCE), "the server does not stop");
    Ok(())
}

struct TwoLink {
    // Gone before the server is.
    client: DuplexClient,
    server: Child,
    job: Job,
    words: Vec<u64>,
    spins: bool,
}

impl Link for TwoLink {
    fn begin(&mut self, _calls: u64) -> anyhow::Result<()> {
        if self.spins {
            self.server.resume()?;
            self.server.ask("awake?")?;
        }
        Ok(())
    }

    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration> {
        let Job { len, touch, .. } = self.job;
        fill(&mut self.words, seq);
        let mut request = self.client.acquire(len, PATIENCE)?;
        request.write(0, self.words.as_bytes())?;
        let started = timed.then(Instant::now);
        request.send()?;
        let response = self.client.receive(PATIENCE)?;
        let time = started.map_or(Duration::ZERO, |at| at.elapsed());
        ensure!(
            response.len() == len,
            "a response of {} bytes",
            response.len()
        );
        response.read(0, self.words.as_mut_bytes())?;
        let good = touch.is_answer(&self.words, seq);
        ensure!(good, "response {seq} is wrong");
        Ok(time)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        if self.spins {
            self.server.pause()?;
        }
        Ok(())
    }

    fn server(&self) -> &Child {
        &self.server
    }
}

impl Drop for TwoLink {
    fn drop(&mut self) {
        // A paused server could not clean up.
        let _ = self.server.resume();
    }
}

impl TwoLink {
    fn start(
        name: &str,
        placement: Placement,
        wait: Wait,
        rings: [u64; 2],
        job: Job,
    ) -> anyhow::Result<Self> {
        let ring = rings[0].to_string();
        let mut args = vec![name, wait_name(wait), ring.as_str()];
        let job_args = job.to_args();
        args.extend(job_args.iter().map(String::as_str));
        let mut server = Child::spawn(ROLE, placement.cores()[1], &args)?;
        server.hear()?;
        let options = ClientOptions {
            response: config(rings[1], wait),
            wait,
            ..ClientOptions::default()
        };
        let mut link = Self {
            client: DuplexClient::connect(name, &options)?,
            server,
            job,
            words: vec![0; job.len as usize / 8],
            spins: wait == Wait::Spin,
        };
        link.end()?;
        Ok(link)
    }
}

/// The channel with two rings of `ring` bytes.
pub(crate) fn variant(
    placement: Placement,
    wait: Wait,
    ring: u64,
    job: Job,
) -> anyhow::Result<Box<dyn Variant>> {
    let link = TwoLink::start(&channel_name(), placement, wait, [ring; 2], job)?;
    Ok(Box::new(Linked::new(link)))
}

/// Bytes of shared memory that a channel with such rings for requests and responses
/// has resident after `calls` calls.
pub(crate) fn resident(
    request_ring: u64,
    response_ring: u64,
    job: Job,
    calls: u64,
) -> anyhow::Result<f64> {
    let name = channel_name();
    let rings = [request_ring, response_ring];
    let mut link = TwoLink::start(&name, Placement::Free, Wait::Park, rings, job)?;
    for seq in 0..calls {
        link.call(seq, false)?;
    }
    let mut blocks = 0;
    for side in ["request", "response"] {
        blocks += std::fs::metadata(format!("/dev/shm/{name}_{side}"))?.blocks();
    }
    Ok((blocks * 512) as f64)
}
