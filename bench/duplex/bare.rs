//! The limits: what two processes need at least in order to hand something over and
//! back, by the cheapest means of each kind.
//!
//! ```text
//! page: word 0 = the client's turn    word 128 = the server's turn    256.. = 64 bytes,
//!                                                                     or a bundle
//! ```
//!
//! | kind | per hand-over |
//! |---|---|
//! | `line` | a store to the one line that the other polls |
//! | `packet` | 64 bytes from behind the polled word on, filled, changed and read: two lines |
//! | `bundle` | as many words as the batch has requests, likewise, behind one such store |
//! | `futex` | a store, a wake and a wait, whether or not anybody waits |
//! | `eventfd` | a write and a read |
//! | `unix` | the payload through a stream socket, written and read |

use std::fs::File;
use std::hint::spin_loop;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uffd_sync::shm::SharedMemory;
use uffd_sync::sys::futex;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::memfd;
use uffd_sync::units::PAGE_SIZE;
use zerocopy::IntoBytes;

use crate::harness::{Channel, Child, Latencies, Placement};
use crate::link::{Link, Linked, Measured, Turn, Variant, per};
use crate::payload::{Touch, fill};

pub(crate) const ROLE: &str = "bare";

/// Bytes in the page that travel with a hand-over.
pub(crate) const SMALL: u64 = 64;

const CLIENT_TURN: u64 = 0;
const SERVER_TURN: u64 = 128;
const PAYLOAD: u64 = 256;
/// Words of a packet of [`SMALL`] bytes, six of them beside the line's own word.
const PACKET_WORDS: usize = 8;

/// The page that both processes have.
struct Page(SharedMemory);

impl Page {
    fn open(fd: &OwnedFd) -> anyhow::Result<Self> {
        let mapping = Mapping::shared(fd, PAGE_SIZE, Access::ReadWrite)?;
        Ok(Self(SharedMemory::new(mapping)))
    }

    /// The payload, for whose turn it is.
    fn words(&mut self) -> &mut [u64] {
        // SAFETY: required: valid, aligned, and nobody else's for as long as it is
        // borrowed. It lies within the mapped page, 8-byte aligned; the two
        // processes use it in turns, and each handing-over is a Release store that
        // the other one loads with Acquire.
        unsafe {
            let first = self.0.as_ptr().add(PAYLOAD as usize).cast();
            std::slice::from_raw_parts_mut(first, SMALL as usize / 8)
        }
    }

    fn word(&self, at: u64) -> &AtomicU32 {
        self.0.atomic_u32(at)
    }

    fn line(&self) -> &AtomicU64 {
        self.0.atomic_u64(CLIENT_TURN)
    }

    /// The words of a bundle.
    fn bundle(&self, words: usize) -> impl Iterator<Item = &AtomicU64> {
        let at = (0..words as u64).map(|word| PAYLOAD + 8 * word);
        at.map(|at| self.0.atomic_u64(at))
    }

    /// A word of the packet behind the line's own.
    fn packet(&self, at: usize) -> &AtomicU64 {
        self.0.atomic_u64(CLIENT_TURN + 16 + 8 * at as u64)
    }
}

/// Says that it is the other's turn, whose word is `theirs`, and wakes it.
fn hand_over(theirs: &AtomicU32) -> anyhow::Result<()> {
    // SYNC(bare_turn): publishes the payload; pairs with the load of `take_turn`.
    theirs.fetch_add(1, Ordering::Release);
    futex::wake(theirs, 1)?;
    Ok(())
}

/// Sleeps until the word has moved on from `before`.
fn take_turn(own: &AtomicU32, before: u32) -> anyhow::Result<u32> {
    loop {
        futex::wait(own, before, None)?;
        // SYNC(bare_turn): pairs with `hand_over` in the other process.
        let now = own.load(Ordering::Acquire);
        if now != before {
            return Ok(now);
        }
    }
}

/// The server of each kind: KIND TOUCH LEN_BYTES.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let [kind, touch, len] = args else {
        bail!("KIND TOUCH LEN_BYTES")
    };
    let touch: Touch = touch.parse().map_err(anyhow::Error::msg)?;
    let (_, mut fds) = channel.receive()?.context("no descriptors")?;
    let mut serve: Box<dyn FnMut(u64) -> anyhow::Result<()>> = match kind.as_str() {
        "line" => {
            let page = Page::open(&fds[0])?;
            Box::new(move |count| serve_line(&page, count))
        }
        "packet" => {
            let page = Page::open(&fds[0])?;
            Box::new(move |count| serve_packets(&page, touch, count))
        }
        "bundle" => {
            let page = Page::open(&fds[0])?;
            let words = len.parse::<usize>()? / 8;
            Box::new(move |count| serve_bundles(&page, touch, words, count))
        }
        "futex" => {
            let mut page = Page::open(&fds[0])?;
            let mut before = 0;
            Box::new(move |count| {
                for _ in 0..count {
                    before = take_turn(page.word(SERVER_TURN), before)?;
                    touch.apply(page.words());
                    hand_over(page.word(CLIENT_TURN))?;
                }
                Ok(())
            })
        }
        "eventfd" => {
            let mut page = Page::open(&fds[0])?;
            let mut bells = Bells::new(fds.split_off(1))?;
            Box::new(move |count| {
                for _ in 0..count {
                    bells.wait()?;
                    touch.apply(page.words());
                    bells.ring()?;
                }
                Ok(())
            })
        }
        "unix" => {
            let mut socket = UnixStream::from(fds.remove(0));
            let mut words = vec![0u64; len.parse::<usize>()? / 8];
            Box::new(move |count| {
                for _ in 0..count {
                    socket.read_exact(words.as_mut_bytes())?;
                    touch.apply(&mut words);
                    socket.write_all(words.as_bytes())?;
                }
                Ok(())
            })
        }
        _ => bail!("no such kind: {kind}"),
    };
    while let Some((line, _)) = channel.receive()? {
        let count = line.strip_prefix("go ").context("go N")?.parse()?;
        channel.send("ready", &[])?;
        serve(count)?;
    }
    Ok(())
}

fn serve_line(page: &Page, count: u64) -> anyhow::Result<()> {
    let line = page.line();
    let mut next = line.load(Ordering::Relaxed) | 1;
    for _ in 0..count {
        // SYNC(bare_line): pairs with the store of the client's call.
        while line.load(Ordering::Acquire) != next {
            spin_loop();
        }
        line.store(next + 1, Ordering::Release);
        next += 2;
    }
    Ok(())
}

fn serve_packets(page: &Page, touch: Touch, count: u64) -> anyhow::Result<()> {
    let line = page.line();
    let mut next = line.load(Ordering::Relaxed) | 1;
    let changed = if touch == Touch::One { 1 } else { PACKET_WORDS };
    for _ in 0..count {
        // SYNC(bare_line): pairs with the store of the client's call.
        while line.load(Ordering::Acquire) != next {
            spin_loop();
        }
        let mut words = [0; PACKET_WORDS];
        for (at, word) in words[..changed].iter_mut().enumerate() {
            *word = page.packet(at).load(Ordering::Relaxed);
        }
        touch.apply(&mut words[..changed]);
        for (at, word) in words[..changed].iter().enumerate() {
            page.packet(at).store(*word, Ordering::Relaxed);
        }
        line.store(next + 1, Ordering::Release);
        next += 2;
    }
    Ok(())
}

fn serve_bundles(page: &Page, touch: Touch, words: usize, count: u64) -> anyhow::Result<()> {
    let line = page.line();
    let mut next = line.load(Ordering::Relaxed) | 1;
    for _ in 0..count {
        // SYNC(bare_line): pairs with the store of the client's call.
        while line.load(Ordering::Acquire) != next {
            spin_loop();
        }
        for word in page.bundle(words) {
            let mut request = [word.load(Ordering::Relaxed)];
            touch.apply(&mut request);
            word.store(request[0], Ordering::Relaxed);
        }
        line.store(next + 1, Ordering::Release);
        next += 2;
    }
    Ok(())
}

/// Two eventfds.
struct Bells {
    wait: File,
    ring: File,
}

impl Bells {
    fn new(fds: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let [wait, ring] = <[OwnedFd; 2]>::try_from(fds).ok().context("two eventfds")?;
        Ok(Self {
            wait: wait.into(),
            ring: ring.into(),
        })
    }

    fn ring(&mut self) -> anyhow::Result<()> {
        Ok(self.ring.write_all(&1u64.to_ne_bytes())?)
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        Ok(self.wait.read_exact(&mut [0; 8])?)
    }
}

fn begin(server: &mut Child, calls: u64) -> anyhow::Result<()> {
    server.ask(&format!("go {calls}"))?;
    Ok(())
}

fn wrong(seq: u64) -> anyhow::Error {
    anyhow::anyhow!("the response to request {seq} is wrong")
}

fn spawn(placement: Placement, kind: &str, touch: Touch, len: u64) -> anyhow::Result<Child> {
    let args = [kind, touch.name(), &len.to_string()];
    Child::spawn(ROLE, placement.cores()[1], &args)
}

fn page_for(server: &mut Child) -> anyhow::Result<Page> {
    let fd = memfd::create("bench-bare", PAGE_SIZE)?;
    server.tell("take", &[fd.as_fd()])?;
    Page::open(&fd)
}

struct LineLink(Child, Page);

impl Link for LineLink {
    fn begin(&mut self, calls: u64) -> anyhow::Result<()> {
        begin(&mut self.0, calls)
    }

    #[inline]
    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration> {
        let line = self.1.line();
        let mine = seq * 2 - 1;
        let started = timed.then(Instant::now);
        // SYNC(bare_line): pairs with the load of `serve_line`.
        line.store(mine, Ordering::Release);
        loop {
            let now = line.load(Ordering::Acquire);
            if now == mine + 1 {
                return Ok(started.map_or(Duration::ZERO, |at| at.elapsed()));
            }
            ensure!(now == mine, "the line holds {now} after {mine}");
            spin_loop();
        }
    }

    fn server(&self) -> &Child {
        &self.0
    }
}

/// The round trip of one cache line.
pub(crate) fn line(placement: Placement) -> anyhow::Result<Box<dyn Variant>> {
    let mut server = spawn(placement, "line", Touch::Nothing, 0)?;
    let page = page_for(&mut server)?;
    Ok(Box::new(Linked::new(LineLink(server, page))))
}

struct PacketLink {
    server: Child,
    page: Page,
    touch: Touch,
}

impl Link for PacketLink {
    fn begin(&mut self, calls: u64) -> anyhow::Result<()> {
        begin(&mut self.server, calls)
    }

    #[inline]
    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration> {
        let mut words = [0; PACKET_WORDS];
        fill(&mut words, seq);
        let line = self.page.line();
        let mine = seq * 2 - 1;
        let started = timed.then(Instant::now);
        for (at, word) in words.iter().enumerate().rev() {
            self.page.packet(at).store(*word, Ordering::Relaxed);
        }
        // SYNC(bare_line): pairs with the load of `serve_packets`.
        line.store(mine, Ordering::Release);
        loop {
            let now = line.load(Ordering::Acquire);
            if now == mine + 1 {
                break;
            }
            ensure!(now == mine, "the line holds {now} after {mine}");
            spin_loop();
        }
        let time = started.map_or(Duration::ZERO, |at| at.elapsed());
        for (at, word) in words.iter_mut().enumerate() {
            *word = self.page.packet(at).load(Ordering::Relaxed);
        }
        let good = self.touch.is_answer(&words, seq);
        good.then_some(time).ok_or_else(|| wrong(seq))
    }

    fn server(&self) -> &Child {
        &self.server
    }
}

/// The round trip of 64 bytes behind the word that is polled.
pub(crate) fn packet(placement: Placement, touch: Touch) -> anyhow::Result<Box<dyn Variant>> {
    let mut server = spawn(placement, "packet", touch, SMALL)?;
    let page = page_for(&mut server)?;
    Ok(Box::new(Linked::new(PacketLink {
        server,
        page,
        touch,
    })))
}

struct FutexLink {
    server: Child,
    page: Page,
    touch: Touch,
    before: u32,
}

impl Link for FutexLink {
    fn begin(&mut self, calls: u64) -> anyhow::Result<()> {
        begin(&mut self.server, calls)
    }

    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration> {
        fill(self.page.words(), seq);
        let started = timed.then(Instant::now);
        hand_over(self.page.word(SERVER_TURN))?;
        self.before = take_turn(self.page.word(CLIENT_TURN), self.before)?;
        let time = started.map_or(Duration::ZERO, |at| at.elapsed());
        let good = self.touch.is_answer(self.page.words(), seq);
        good.then_some(time).ok_or_else(|| wrong(seq))
    }

    fn server(&self) -> &Child {
        &self.server
    }
}

/// Two words, a wake and a wait on each side for each call.
pub(crate) fn futex(placement: Placement) -> anyhow::Result<Box<dyn Variant>> {
    let touch = Touch::Bytes;
    let mut server = spawn(placement, "futex", touch, SMALL)?;
    let page = page_for(&mut server)?;
    Ok(Box::new(Linked::new(FutexLink {
        server,
        page,
        touch,
        before: 0,
    })))
}

struct EventLink {
    server: Child,
    page: Page,
    bells: Bells,
    touch: Touch,
}

impl Link for EventLink {
    fn begin(&mut self, calls: u64) -> anyhow::Result<()> {
        begin(&mut self.server, calls)
    }

    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration> {
        fill(self.page.words(), seq);
        let started = timed.then(Instant::now);
        self.bells.ring()?;
        self.bells.wait()?;
        let time = started.map_or(Duration::ZERO, |at| at.elapsed());
        let good = self.touch.is_answer(self.page.words(), seq);
        good.then_some(time).ok_or_else(|| wrong(seq))
    }

    fn server(&self) -> &Child {
        &self.server
    }
}

/// A page and two eventfds.
pub(crate) fn eventfd(placement: Placement) -> anyhow::Result<Box<dyn Variant>> {
    let touch = Touch::Bytes;
    let mut server = spawn(placement, "eventfd", touch, SMALL)?;
    let page = memfd::create("bench-bare", PAGE_SIZE)?;
    let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC);
    let (there, back) = (event()?, event()?);
    server.tell("take", &[page.as_fd(), there.as_fd(), back.as_fd()])?;
    let own = [back.as_fd(), there.as_fd()].map(|fd| fd.try_clone_to_owned());
    let own = own.into_iter().collect::<Result<_, _>>()?;
    Ok(Box::new(Linked::new(EventLink {
        server,
        page: Page::open(&page)?,
        bells: Bells::new(own)?,
        touch,
    })))
}

/// Requests of one word each, all of them behind one hand-over.
struct Bundle {
    server: Child,
    page: Page,
    words: usize,
    next: u64,
}

impl Bundle {
    /// One there and back, of the requests from number `first` on; the hand-over is its
    /// `round`th.
    fn call(&mut self, round: u64, first: u64) -> anyhow::Result<()> {
        for (seq, word) in (first..).zip(self.page.bundle(self.words)) {
            let mut request = [0];
            fill(&mut request, seq);
            word.store(request[0], Ordering::Relaxed);
        }
        let (line, mine) = (self.page.line(), round * 2 - 1);
        // SYNC(bare_line): pairs with the load of `serve_bundles`.
        line.store(mine, Ordering::Release);
        while line.load(Ordering::Acquire) != mine + 1 {
            spin_loop();
        }
        for (seq, word) in (first..).zip(self.page.bundle(self.words)) {
            let answer = [word.load(Ordering::Relaxed)];
            ensure!(
                Touch::One.is_answer(&answer, seq),
                "response {seq} is wrong"
            );
        }
        Ok(())
    }
}

impl Variant for Bundle {
    /// `calls` are requests, `timed` is not used; the value is per request.
    fn turn(&mut self, turn: Turn) -> anyhow::Result<Measured> {
        let (words, first) = (self.words as u64, self.next);
        let rounds = turn.calls / words;
        self.next += rounds;
        begin(&mut self.server, rounds)?;
        let started = Instant::now();
        for round in first..self.next {
            self.call(round, round * words)?;
        }
        Ok(Measured {
            per_call_ns: per(started.elapsed(), rounds * words),
            latencies: Latencies::new()?,
            cpu_ns: f64::NAN,
        })
    }
}

/// So many requests of one word behind one cache line.
pub(crate) fn bundle(placement: Placement, words: usize) -> anyhow::Result<Box<dyn Variant>> {
    let mut server = spawn(placement, "bundle", Touch::One, 8 * words as u64)?;
    let page = page_for(&mut server)?;
    Ok(Box::new(Bundle {
        server,
        page,
        words,
        next: 1,
    }))
}

struct UnixLink {
    server: Child,
    socket: UnixStream,
    words: Vec<u64>,
    touch: Touch,
}

impl Link for UnixLink {
    fn begin(&mut self, calls: u64) -> anyhow::Result<()> {
        begin(&mut self.server, calls)
    }

    fn call(&mut self, seq: u64, timed: bool) -> anyhow::Result<Duration> {
        fill(&mut self.words, seq);
        let started = timed.then(Instant::now);
        self.socket.write_all(self.words.as_bytes())?;
        self.socket.read_exact(self.words.as_mut_bytes())?;
        let time = started.map_or(Duration::ZERO, |at| at.elapsed());
        let good = self.touch.is_answer(&self.words, seq);
        good.then_some(time).ok_or_else(|| wrong(seq))
    }

    fn server(&self) -> &Child {
        &self.server
    }
}

/// A stream socket that carries the payload both ways.
pub(crate) fn unix(
    placement: Placement,
    len: u64,
    touch: Touch,
) -> anyhow::Result<Box<dyn Variant>> {
    let mut server = spawn(placement, "unix", touch, len)?;
    let (ours, theirs) = UnixStream::pair()?;
    server.tell("take", &[theirs.as_fd()])?;
    Ok(Box::new(Linked::new(UnixLink {
        server,
        socket: ours,
        words: vec![0; len as usize / 8],
        touch,
    })))
}
