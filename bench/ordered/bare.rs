//! The bare fan-out: the same hand-offs between caller and loop, the same ring, one
//! message of the length of a request to each peer, and its echo from all of them.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use crossbeam_queue::ArrayQueue;
use uffd_sync::sys::buffer::Buffer;
use uffd_sync::sys::net;
use uffd_sync::sys::process::EventFd;
use uffd_sync::sys::ring::{Op, Ring, SendBuf};

use crate::harness::{Channel, Child};
use crate::members::PATIENCE;

pub(crate) const ROLE: &str = "ordered-bare";
/// Length of a request for a number: header, ids, times, the value.
const MESSAGE: usize = 88;
const ROOM: usize = 128 * 1024;
const BELL: u64 = 0;
const RECV: u64 = 100;
const SEND: u64 = 200;

/// The echoing process.
pub(crate) fn serve(mut channel: Channel, _: &[String]) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    channel.send(&listener.local_addr()?.port().to_string(), &[])?;
    let (stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let socket: Arc<OwnedFd> = Arc::new(stream.into());
    let mut ring = Ring::new(64)?;
    let mut buffer = Some(Buffer::Heap(Vec::with_capacity(ROOM)));
    loop {
        if let Some(buf) = buffer.take() {
            let upto = buf.capacity();
            let socket = Arc::clone(&socket);
            ring.submit(RECV, Op::Recv { socket, buf, upto })?;
        }
        ring.enter(Some(Duration::from_secs(1)))?;
        while let Some(done) = ring.next() {
            if let Op::Recv { mut buf, .. } = done.op {
                let count = done.result? as usize;
                if count == 0 {
                    return Ok(());
                }
                let whole = buf.len() / MESSAGE * MESSAGE;
                if whole > 0 {
                    let echo = SendBuf::Owned(buf[..whole].to_vec());
                    let socket = Arc::clone(&socket);
                    let from = 0;
                    ring.submit(
                        SEND,
                        Op::Send {
                            socket,
                            buf: echo,
                            from,
                        },
                    )?;
                }
                buf.drain_front(whole);
                buffer = Some(buf);
            }
        }
    }
}

#[derive(Default)]
struct Slot {
    done: Mutex<bool>,
    changed: Condvar,
}

/// An exchange under way.
pub(crate) struct UnderWay(Arc<Slot>);

impl UnderWay {
    pub(crate) fn wait(self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        let mut done = self.0.done.lock().unwrap_or_else(PoisonError::into_inner);
        while !*done {
            let left = until.checked_duration_since(Instant::now());
            let left = left.context("the bare fan-out does not answer")?;
            let woken = self.0.changed.wait_timeout(done, left);
            done = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

/// The initiator's side, with a loop of its own.
pub(crate) struct Bare {
    queue: Arc<ArrayQueue<Arc<Slot>>>,
    bell: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    children: Vec<Child>,
}

impl Bare {
    /// Connects to so many echoing processes.
    pub(crate) fn start(peers: usize) -> anyhow::Result<Self> {
        let mut children = Vec::new();
        let mut sockets = Vec::new();
        for _ in 0..peers {
            let mut child = Child::spawn(ROLE, None, &[])?;
            let port: u16 = child.hear()?.0.parse()?;
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
            net::set_nodelay(&stream)?;
            sockets.push(Arc::new(OwnedFd::from(stream)));
            children.push(child);
        }
        let queue = Arc::new(ArrayQueue::new(256));
        let (bell, stop) = (Arc::new(EventFd::new()?), Arc::new(AtomicBool::new(false)));
        let parts = (Arc::clone(&queue), Arc::clone(&bell), Arc::clone(&stop));
        let body = move || run(&sockets, &parts.0, &parts.1, &parts.2);
        let thread = Some(
            std::thread::Builder::new()
                .name("bare".into())
                .spawn(body)?,
        );
        Ok(Self {
            queue,
            bell,
            stop,
            thread,
            children,
        })
    }

    pub(crate) fn begin(&self) -> anyhow::Result<UnderWay> {
        let slot = Arc::<Slot>::default();
        let pushed = self.queue.push(Arc::clone(&slot));
        ensure!(pushed.is_ok(), "too many exchanges under way");
        self.bell.ring();
        Ok(UnderWay(slot))
    }

    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            ended.map_err(|_| anyhow::anyhow!("the bare loop panicked"))??;
        }
        for child in self.children.drain(..) {
            child.end()?;
        }
        Ok(())
    }
}

struct Peer {
    socket: Arc<OwnedFd>,
    out: Vec<u8>,
    sending: bool,
    answered: u64,
}

fn run(
    sockets: &[Arc<OwnedFd>],
    queue: &ArrayQueue<Arc<Slot>>,
    bell: &EventFd,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let mut ring = Ring::new(64)?;
    let fd = Arc::new(bell.try_clone_fd()?);
    let poll = || Op::Poll {
        fd: Arc::clone(&fd),
        writable: false,
    };
    ring.submit(BELL, poll())?;
    let mut peers = Vec::new();
    for (at, socket) in sockets.iter().enumerate() {
        receive(
            &mut ring,
            at,
            socket,
            Buffer::Heap(Vec::with_capacity(ROOM)),
        )?;
        peers.push(Peer {
            socket: Arc::clone(socket),
            out: Vec::new(),
            sending: false,
            answered: 0,
        });
    }
    let mut waiting: VecDeque<Arc<Slot>> = VecDeque::new();
    let mut completed = 0;
    while !stop.load(Ordering::Relaxed) {
        ring.enter(Some(Duration::from_secs(1)))?;
        while let Some(done) = ring.next() {
            match (done.token, done.op) {
                (BELL, _) => {
                    bell.drain();
                    while let Some(slot) = queue.pop() {
                        waiting.push_back(slot);
                        for peer in &mut peers {
                            peer.out.extend([7; MESSAGE]);
                        }
                    }
                    ring.submit(BELL, poll())?;
                }
                (token, Op::Recv { mut buf, .. }) => {
                    ensure!(done.result? > 0, "a peer is gone");
                    let at = (token - RECV) as usize;
                    let whole = buf.len() / MESSAGE;
                    peers[at].answered += whole as u64;
                    buf.drain_front(whole * MESSAGE);
                    let socket = Arc::clone(&peers[at].socket);
                    receive(&mut ring, at, &socket, buf)?;
                }
                (token, _) => peers[(token - SEND) as usize].sending = false,
            }
        }
        let all = peers.iter().map(|peer| peer.answered).min().unwrap_or(0);
        while completed < all {
            completed += 1;
            let slot = waiting.pop_front().context("an answer to nothing")?;
            *slot.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
            slot.changed.notify_all();
        }
        send_all(&mut ring, &mut peers)?;
    }
    Ok(())
}

/// Hands what is queued to the kernel, one send at a time per peer.
fn send_all(ring: &mut Ring, peers: &mut [Peer]) -> anyhow::Result<()> {
    for (at, peer) in peers.iter_mut().enumerate() {
        if !peer.sending && !peer.out.is_empty() {
            peer.sending = true;
            let op = Op::Send {
                socket: Arc::clone(&peer.socket),
                buf: SendBuf::Owned(std::mem::take(&mut peer.out)),
                from: 0,
            };
            ring.submit(SEND + at as u64, op)?;
        }
    }
    Ok(())
}

fn receive(ring: &mut Ring, at: usize, socket: &Arc<OwnedFd>, buf: Buffer) -> anyhow::Result<()> {
    let upto = buf.capacity();
    let socket = Arc::clone(socket);
    Ok(ring.submit(RECV + at as u64, Op::Recv { socket, buf, upto })?)
}
