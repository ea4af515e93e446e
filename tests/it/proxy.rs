//! A TCP proxy between a follower and its source: it reads frames, keeps a tape of
//! them, and delays, throttles, drops or cuts as a test says.
//!
//! ```text
//!   follower --> [ proxy ] --> source        the address that is followed is the
//!            <--           <--               proxy's; the source behind it may change
//! ```
//!
//! Frames are cut by their own two fields (length at byte 12, kind at byte 3), not by
//! the code under test.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

const HEADER: usize = 32;
const PIECE: usize = 16 * 1024;

pub(crate) const ACK: u8 = 5;
pub(crate) const RESYNC: u8 = 9;
pub(crate) const SINGLE: u8 = 16;
pub(crate) const START: u8 = 17;
pub(crate) const CHUNK: u8 = 18;
pub(crate) const END: u8 = 19;

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToFollower,
    ToSource,
}

/// What is seen of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) way: Way,
    pub(crate) kind: u8,
    pub(crate) epoch: u64,
    /// Header and body, in bytes.
    pub(crate) len: usize,
}

impl Frame {
    pub(crate) fn is_update(&self) -> bool {
        (SINGLE..=END).contains(&self.kind)
    }
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    Drop,
    /// So many of its bytes pass, then both ends are closed.
    CutAfter(usize),
    /// So many of its bytes pass, then both ends are reset.
    ResetAfter(usize),
    /// So many of its bytes pass, then nothing more passes either way; nothing is closed.
    SilenceAfter(usize),
    /// All of it passes, with one bit of that byte flipped.
    Flip(usize),
}

type Judge = Box<dyn FnMut(&Frame) -> Verdict + Send>;

struct Shared {
    target: Mutex<SocketAddr>,
    tape: Mutex<Vec<Frame>>,
    taped: Condvar,
    judge: Mutex<Option<Judge>>,
    /// Bytes per second to the follower; 0 is no limit.
    rate: AtomicU64,
    stalled: Mutex<bool>,
    moved: Condvar,
    stopping: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
    accepted: AtomicU64,
}

/// A proxy that ends with its last thread when dropped.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens for followers of the node at `target`.
    pub(crate) fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            tape: Mutex::default(),
            taped: Condvar::new(),
            judge: Mutex::new(None),
            rate: AtomicU64::new(0),
            stalled: Mutex::new(false),
            moved: Condvar::new(),
            stopping: AtomicBool::new(false),
            open: Mutex::default(),
            accepted: AtomicU64::new(0),
        });
        let for_thread = Arc::clone(&shared);
        let accepting = Some(std::thread::spawn(move || accept(&listener, &for_thread)));
        Self {
            shared,
            address,
            accepting,
        }
    }

    /// What a follower of `region` follows.
    pub(crate) fn source_of(&self, region: &str) -> String {
        format!("tcp://{}/{region}", self.address)
    }

    /// The node behind it from the next connection on.
    pub(crate) fn aim_at(&self, target: SocketAddr) {
        *self.shared.target.lock().expect("no pump panicked") = target;
    }

    /// Bytes per second to the follower from now on; 0 is no limit.
    pub(crate) fn throttle(&self, bytes_per_s: u64) {
        self.shared.rate.store(bytes_per_s, Ordering::Relaxed);
    }

    /// Stops or goes on reading, both ways.
    pub(crate) fn stall(&self, stalled: bool) {
        *self.shared.stalled.lock().expect("no pump panicked") = stalled;
        self.shared.moved.notify_all();
    }

    /// Asks `judge` about every frame from now on.
    pub(crate) fn judge(&self, judge: impl FnMut(&Frame) -> Verdict + Send + 'static) {
        *self.shared.judge.lock().expect("no pump panicked") = Some(Box::new(judge));
    }

    /// Lets every frame pass from now on.
    pub(crate) fn pass(&self) {
        *self.shared.judge.lock().expect("no pump panicked") = None;
    }

    /// Connections accepted so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Frames that came so far.
    pub(crate) fn mark(&self) -> usize {
        self.shared.tape.lock().expect("no pump panicked").len()
    }

    /// Frames that came since `mark`.
    pub(crate) fn since(&self, mark: usize) -> Vec<Frame> {
        self.shared.tape.lock().expect("no pump panicked")[mark..].to_vec()
    }

    /// Waits for a frame like that since `mark`.
    #[track_caller]
    pub(crate) fn await_frame(
        &self,
        mark: usize,
        what: &str,
        is: impl Fn(&Frame) -> bool,
    ) -> Frame {
        let deadline = Instant::now() + super::nodes::PATIENCE;
        let mut tape = self.shared.tape.lock().expect("no pump panicked");
        loop {
            if let Some(frame) = tape[mark..].iter().find(|frame| is(frame)) {
                return *frame;
            }
            assert!(
                Instant::now() < deadline,
                "no {what} on the wire: {:?}",
                &tape[mark..]
            );
            let waited = self
                .shared
                .taped
                .wait_timeout(tape, Duration::from_millis(50));
            tape = waited.expect("no pump panicked").0;
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.moved.notify_all();
        self.shared.cut();
        // Wakes the accepting thread, which then looks at the flag.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

impl Shared {
    fn cut(&self) {
        for socket in self.open.lock().expect("no pump panicked").drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn stops(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn wait_while_stalled(&self) {
        let mut stalled = self.stalled.lock().expect("no pump panicked");
        while *stalled && !self.stops() {
            let waited = self.moved.wait_timeout(stalled, Duration::from_millis(50));
            stalled = waited.expect("no pump panicked").0;
        }
    }

    fn verdict(&self, frame: &Frame) -> Verdict {
        let mut judge = self.judge.lock().expect("no pump panicked");
        judge.as_mut().map_or(Verdict::Pass, |judge| judge(frame))
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut pumps = Vec::new();
    while let Ok((follower, _)) = listener.accept() {
        if shared.stops() {
            break;
        }
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        let target = *shared.target.lock().expect("no pump panicked");
        let Ok(source) = TcpStream::connect_timeout(&target, Duration::from_secs(5)) else {
            continue;
        };
        if let Ok(threads) = join(follower, source, shared) {
            pumps.extend(threads);
        }
    }
    for pump in pumps {
        let _ = pump.join();
    }
}

/// What both pumps of one connection do at its end.
type Fate = Arc<AtomicU8>;
const CLOSED: u8 = 0;
const RESET: u8 = 1;
const SILENT: u8 = 2;

fn join(
    follower: TcpStream,
    source: TcpStream,
    shared: &Arc<Shared>,
) -> std::io::Result<[JoinHandle<()>; 2]> {
    for socket in [&follower, &source] {
        socket.set_nodelay(true)?;
        // Small buffers, so that the proxy's pace is soon the sender's.
        setsockopt(&socket.as_fd(), sockopt::RcvBuf, &(64 * 1024))?;
        setsockopt(&socket.as_fd(), sockopt::SndBuf, &(64 * 1024))?;
    }
    let mut open = shared.open.lock().expect("no pump panicked");
    open.extend([follower.try_clone()?, source.try_clone()?]);
    drop(open);
    let fate = Fate::default();
    let ways = [
        (Way::ToSource, follower.try_clone()?, source.try_clone()?),
        (Way::ToFollower, source, follower),
    ];
    Ok(ways.map(|(way, from, to)| {
        let (shared, fate) = (Arc::clone(shared), Arc::clone(&fate));
        std::thread::spawn(move || pump(way, from, to, &fate, &shared))
    }))
}

fn pump(way: Way, mut from: TcpStream, mut to: TcpStream, fate: &Fate, shared: &Shared) {
    move_frames(way, &mut from, &mut to, fate, shared);
    match fate.load(Ordering::Relaxed) {
        RESET => {
            for socket in [&from, &to] {
                let linger = libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                let _ = setsockopt(&socket.as_fd(), sockopt::Linger, &linger);
                // Wakes the other pump; the reset goes out with the last descriptor.
                let _ = socket.shutdown(Shutdown::Read);
            }
            shared.open.lock().expect("no pump panicked").clear();
        }
        SILENT => {
            // Both ends stay open and hear nothing until they give up.
            let mut rest = [0; PIECE];
            while !shared.stops() && from.read(&mut rest).is_ok_and(|n| n > 0) {}
        }
        _ => {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
    }
}

/// Moves frames until an end closes or a verdict ends it.
fn move_frames(way: Way, from: &mut TcpStream, to: &mut TcpStream, fate: &Fate, shared: &Shared) {
    let mut bytes = Vec::new();
    loop {
        shared.wait_while_stalled();
        let Some(frame) = read_frame(way, from, &mut bytes) else {
            return;
        };
        if fate.load(Ordering::Relaxed) != CLOSED {
            return;
        }
        let verdict = shared.verdict(&frame);
        shared.tape.lock().expect("no pump panicked").push(frame);
        shared.taped.notify_all();
        let (passing, end) = match verdict {
            Verdict::Pass => (frame.len, None),
            Verdict::Drop => (0, None),
            Verdict::Flip(at) => {
                bytes[at.min(frame.len - 1)] ^= 0x10;
                (frame.len, None)
            }
            Verdict::CutAfter(len) => (len, Some(CLOSED)),
            Verdict::ResetAfter(len) => (len, Some(RESET)),
            Verdict::SilenceAfter(len) => (len, Some(SILENT)),
        };
        if write_slowly(to, &bytes[..passing.min(frame.len)], way, shared).is_err() {
            return;
        }
        if let Some(end) = end {
            fate.store(end, Ordering::Relaxed);
            return;
        }
    }
}

/// One whole frame; none at the end of the stream.
fn read_frame(way: Way, from: &mut TcpStream, bytes: &mut Vec<u8>) -> Option<Frame> {
    bytes.resize(HEADER, 0);
    from.read_exact(bytes).ok()?;
    let body_len = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]) as usize;
    let mut epoch = [0; 8];
    epoch.copy_from_slice(&bytes[16..24]);
    let epoch = u64::from_le_bytes(epoch);
    let frame = Frame {
        way,
        kind: bytes[3],
        epoch,
        len: HEADER + body_len,
    };
    bytes.resize(frame.len, 0);
    from.read_exact(&mut bytes[HEADER..]).ok()?;
    Some(frame)
}

fn write_slowly(
    to: &mut TcpStream,
    bytes: &[u8],
    way: Way,
    shared: &Shared,
) -> std::io::Result<()> {
    for piece in bytes.chunks(PIECE) {
        shared.wait_while_stalled();
        to.write_all(piece)?;
        let rate = shared.rate.load(Ordering::Relaxed);
        if rate > 0 && way == Way::ToFollower {
            // The pace is the point of the proxy, not a wait for something.
            std::thread::sleep(Duration::from_nanos(
                piece.len() as u64 * 1_000_000_000 / rate,
            ));
        }
    }
    Ok(())
}
