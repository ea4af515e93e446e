//! The channel that is measured: one payload, changed where it lies.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use uffd_sync::client::{
    ClientOptions, DuplexClient, Frame, HandlerError, InPlaceDuplexServer, ServerOptions,
};
use uffd_sync::duplex::{BufferConfig, FrameBytes, OpenLimits, Segment, Waiting};
use uffd_sync::shm::PeerTrust;
use uffd_sync::units::MIB;
use zerocopy::{FromBytes, IntoBytes};

use crate::harness::{Channel, Child, Latencies, Placement};
use crate::link::{Job, Link, Linked, Measured, Turn, Variant, per, work};
use crate::payload::{Touch, fill};

pub(crate) const ROLE: &str = "in-place";

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const METADATA: u64 = 4096;
/// Most requests of one frame.
const MOST_ITEMS: usize = 64;
/// Words of the requests that lie in their slot.
const SMALL_WORDS: usize = 8;

fn waiting_name(waiting: Waiting) -> &'static str {
    match waiting {
        Waiting::Park => "park",
        Waiting::Spin => "spin",
        Waiting::Adaptive => "adaptive",
    }
}

fn waiting_by_name(name: &str) -> anyhow::Result<Waiting> {
    [Waiting::Park, Waiting::Spin, Waiting::Adaptive]
        .into_iter()
        .find(|waiting| waiting_name(*waiting) == name)
        .context("no such way of waiting")
}

/// Does the job where the frame lies.
fn handle(job: Job, frame: &mut Frame<'_>) -> Result<(), HandlerError> {
    if frame.len() <= SMALL_WORDS * 8 {
        handle_small(job.touch, frame)?;
    } else {
        let words = <[u64]>::mut_from_bytes(frame.data_mut()?);
        let words = words.map_err(|_| HandlerError::new("not a whole number of words"))?;
        job.touch.apply_to_all(words);
    }
    work(job.work);
    Ok(())
}

fn handle_small(touch: Touch, frame: &Frame<'_>) -> Result<(), HandlerError> {
    let view = frame.view();
    let failed = |_| HandlerError::new("beyond the frame");
    match touch {
        Touch::Nothing => {}
        Touch::One => {
            let mut words = [0u64; 1];
            view.read(0, words.as_mut_bytes()).map_err(failed)?;
            touch.apply(&mut words);
            view.write(0, words.as_bytes()).map_err(failed)?;
        }
        Touch::Lines | Touch::Bytes | Touch::Blur => {
            let mut words = [0u64; SMALL_WORDS];
            let words = &mut words[..frame.len() / 8];
            view.read(0, words.as_mut_bytes()).map_err(failed)?;
            touch.apply(words);
            view.write(0, words.as_bytes()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Serves until its channel is closed: WAIT PAYLOAD_BYTES, then the job.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let [waiting, payload, job @ ..] = args else {
        bail!("WAIT PAYLOAD_BYTES JOB...")
    };
    let (waiting, job) = (waiting_by_name(waiting)?, Job::from_args(job)?);
    let server = InPlaceDuplexServer::new(ServerOptions {
        waiting,
        ..ServerOptions::default()
    })?;
    // SAFETY: required: no process touches a frame while it is in the server's hands.
    // The only client is the bench, which waits for each response.
    let trust = unsafe { PeerTrust::new() };
    server.start_trusting(trust, move |frame| handle(job, frame))?;
    let segment = Segment::create(&BufferConfig::new(METADATA, payload.parse()?))?;
    let serving = server.serve_segment(&segment, false)?;
    channel.send("open", &segment.fds())?;
    while channel.receive()?.is_some() {
        channel.send("still here", &[])?;
    }
    server.stop();
    serving.join();
    Ok(())
}

/// A client in this process and its server in another one.
pub(crate) struct Pair {
    pub(crate) client: DuplexClient,
    pub(crate) server: Child,
    spins: bool,
}

impl Pair {
    pub(crate) fn start(
        placement: Placement,
        waiting: Waiting,
        payload: u64,
        job: Job,
    ) -> anyhow::Result<Self> {
        let payload = payload.to_string();
        let mut args = vec![waiting_name(waiting), payload.as_str()];
        let job_args = job.to_args();
        args.extend(job_args.iter().map(String::as_str));
        let mut server = Child::spawn(ROLE, placement.cores()[1], &args)?;
        let (_, fds) = server.hear()?;
        let segment = Segment::open(fds, OpenLimits::default())?;
        let pair = Self {
            client: DuplexClient::over(
                segment,
                ClientOptions {
                    waiting,
                    ..ClientOptions::default()
                },
            )?,
            server,
            spins: waiting == Waiting::Spin,
        };
        pair.rest()?;
        Ok(pair)
    }

    /// A server that spins without end would disturb the other variants.
    fn rest(&self) -> anyhow::Result<()> {
        if self.spins {
            self.server.pause()?;
        }
        Ok(())
    }

    fn wake(&mut self) -> anyhow::Result<()> {
        if self.spins {
            self.server.resume()?;
            self.server.ask("awake?")?;
        }
        Ok(())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // A paused server could not stop.
        let _ = self.server.resume();
    }
}

/// Requests that lie in their slot.
struct SmallLink {
    pair: Pair,
    touch: Touch,
}

impl Link for SmallLink {
    fn begin(&mut self, _calls: u64) -> anyhow::Result<()> {
        self.pair.wake()
    }

    #[inline]
    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration> {
        let mut words = [0u64; SMALL_WORDS];
        fill(&mut words, seq);
        let started = timed.then(Instant::now);
        let response = self.pair.client.call(words.as_bytes(), PATIENCE)?;
        let time = started.map_or(Duration::ZERO, |at| at.elapsed());
        response.view().read(0, words.as_mut_bytes())?;
        ensure!(self.touch.is_answer(&words, seq), "response {seq} is wrong");
        Ok(time)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.pair.rest()
    }

    fn server(&self) -> &Child {
        &self.pair.server
    }
}

/// Requests that lie in the payload.
struct LargeLink {
    pair: Pair,
    job: Job,
    words: Vec<u64>,
}

impl Link for LargeLink {
    fn begin(&mut self, _calls: u64) -> anyhow::Result<()> {
        self.pair.wake()
    }

    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration> {
        fill(&mut self.words, seq);
        let client = &self.pair.client;
        let mut request = client.acquire_request(self.job.len as usize)?;
        request.write(0, self.words.as_bytes())?;
        let started = timed.then(Instant::now);
        let sequence = request.send();
        let response = client.receive_for(sequence, PATIENCE)?;
        let time = started.map_or(Duration::ZERO, |at| at.elapsed());
        response.view().read(0, self.words.as_mut_bytes())?;
        let good = self.job.touch.is_answer(&self.words, seq);
        ensure!(good, "response {seq} is wrong");
        Ok(time)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.pair.rest()
    }

    fn server(&self) -> &Child {
        &self.pair.server
    }
}

/// The channel with a payload of `payload` bytes.
pub(crate) fn variant(
    placement: Placement,
    waiting: Waiting,
    payload: u64,
    job: Job,
) -> anyhow::Result<Box<dyn Variant>> {
    let pair = Pair::start(placement, waiting, payload, job)?;
    Ok(if job.len == 8 * SMALL_WORDS as u64 {
        let touch = job.touch;
        Box::new(Linked::new(SmallLink { pair, touch }))
    } else {
        let words = vec![0; job.len as usize / 8];
        Box::new(Linked::new(LargeLink { pair, job, words }))
    })
}

/// Requests of one word, many of them handed over by one kick.
struct Batches {
    pair: Pair,
    size: u64,
    next: u64,
    form: Form,
}

/// What a batch travels as.
enum Form {
    /// A slot for each request; the numbers of those under way.
    Slots(Vec<u64>),
    /// One frame; what goes into it.
    Frame(Vec<[u8; 8]>),
}

impl Batches {
    fn start(
        placement: Placement,
        waiting: Waiting,
        size: u64,
        form: Form,
    ) -> anyhow::Result<Box<dyn Variant>> {
        let pair = Pair::start(placement, waiting, MIB, Job::new(8, Touch::One))?;
        Ok(Box::new(Self {
            pair,
            size,
            next: 1,
            form,
        }))
    }

    fn batch(&mut self) -> anyhow::Result<()> {
        let client = &self.pair.client;
        match &mut self.form {
            Form::Slots(sequences) => by_slots(client, self.next, self.size, sequences)?,
            Form::Frame(words) => by_frame(client, self.next, words)?,
        }
        self.next += self.size;
        Ok(())
    }
}

fn by_slots(
    client: &DuplexClient,
    first: u64,
    size: u64,
    sequences: &mut Vec<u64>,
) -> anyhow::Result<()> {
    sequences.clear();
    for seq in first..first + size {
        sequences.push(client.submit(&request_of(seq))?);
    }
    client.kick();
    for (seq, sequence) in (first..).zip(sequences) {
        let response = client.receive_for(*sequence, PATIENCE)?;
        check_answer(seq, response.view())?;
    }
    Ok(())
}

fn by_frame(client: &DuplexClient, first: u64, words: &mut [[u8; 8]]) -> anyhow::Result<()> {
    for (seq, bytes) in (first..).zip(&mut *words) {
        *bytes = request_of(seq);
    }
    let mut items = [&[][..]; MOST_ITEMS];
    for (item, bytes) in items.iter_mut().zip(&*words) {
        *item = bytes;
    }
    let answers = client.call_batch(&items[..words.len()], PATIENCE)?;
    for (seq, answer) in (first..).zip(answers.items()) {
        check_answer(seq, answer?)?;
    }
    Ok(())
}

fn request_of(seq: u64) -> [u8; 8] {
    let mut word = [0];
    fill(&mut word, seq);
    word[0].to_le_bytes()
}

fn check_answer(seq: u64, answer: FrameBytes<'_>) -> anyhow::Result<()> {
    let mut word = [0u64];
    answer.read(0, word.as_mut_bytes())?;
    ensure!(Touch::One.is_answer(&word, seq), "response {seq} is wrong");
    Ok(())
}

impl Variant for Batches {
    /// `calls` are requests, `timed` is not used; the value is per request.
    fn turn(&mut self, turn: Turn) -> anyhow::Result<Measured> {
        self.pair.wake()?;
        let batches = turn.calls / self.size;
        let started = Instant::now();
        for _ in 0..batches {
            self.batch()?;
        }
        let together = started.elapsed();
        self.pair.rest()?;
        Ok(Measured {
            per_call_ns: per(together, batches * self.size),
            latencies: Latencies::new()?,
            cpu_ns: f64::NAN,
        })
    }
}

/// Frames of `size` requests, at most [`MOST_ITEMS`].
pub(crate) fn frames(
    placement: Placement,
    waiting: Waiting,
    size: u64,
) -> anyhow::Result<Box<dyn Variant>> {
    ensure!(size as usize <= MOST_ITEMS, "{size} requests in a frame");
    let words = vec![[0; 8]; size as usize];
    Batches::start(placement, waiting, size, Form::Frame(words))
}

/// Batches of `size` requests in slots of their own.
pub(crate) fn batches(
    placement: Placement,
    waiting: Waiting,
    size: u64,
) -> anyhow::Result<Box<dyn Variant>> {
    Batches::start(placement, waiting, size, Form::Slots(Vec::new()))
}
