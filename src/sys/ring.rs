//! io_uring as a list of operations in flight, each owning what it works on.
//!
//! ```text
//! submit(token, op) --> slab: op, its buffers, its descriptor --> kernel
//! next() <-- Completion { token, result, op } <-- slab entry taken out
//! ```
//! Nothing is submitted and nothing completes outside [`Ring::enter`] (but for a
//! full submission queue): one system call per turn of the loop hands over what
//! was submitted, waits, and collects.
//!
//! Invariants:
//! * I1: whatever the kernel was told an address of (buffer, list of buffers, socket address)
//!   stays allocated, unmoved and untouched until the operation's completion was
//!   taken: it lies on the heap, owned by the slab entry.
//! * I2: an operation's descriptor stays open as long, by its `Arc`.
//! * I3: each operation completes exactly once. The number in a completion is
//!   slab key and generation together, so a late cancel hits nobody else.
//!
//! On drop all operations are cancelled and waited for; what does not come back
//! in time is leaked, never freed under the kernel's hands.
#![allow(
    unsafe_code,
    reason = "submission of entries that point to buffers, and accepted descriptors"
)]

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use slab::Slab;

use super::SysError;
use super::buffer::Buffer;

/// Most operations in flight in one ring.
pub const MAX_IN_FLIGHT: usize = 65_536;
/// Marks the completion of a cancel, which nobody waits for.
const CANCEL: u64 = u64::MAX;
/// How long a dropped ring waits for what it cancelled.
const DROP_DEADLINE: Duration = Duration::from_secs(1);
/// Most buffers that one operation sends.
pub const MAX_PARTS: usize = 16;
/// Bytes of a send from which on a thread of the kernel copies them, beside this one: to
/// copy a megabyte into a socket takes 0.4 ms, to hand it over some microseconds.
const ASIDE: usize = 64 * 1024;
/// Operations that `doctor` and [`Ring::new`] need, with their names.
const NEEDED: [(u8, &str); 7] = [
    (opcode::Accept::CODE, "accept"),
    (opcode::Connect::CODE, "connect"),
    (opcode::Recv::CODE, "recv"),
    (opcode::Send::CODE, "send"),
    (opcode::SendMsg::CODE, "sendmsg"),
    (opcode::PollAdd::CODE, "poll"),
    (opcode::AsyncCancel2::CODE, "cancel"),
];

/// Bytes to send, the operation's own or shared with other sends.
#[derive(Clone, Debug)]
pub enum SendBuf {
    /// For this send alone.
    Owned(Vec<u8>),
    /// The same bytes to several peers.
    Shared(Arc<[u8]>),
}

impl AsRef<[u8]> for SendBuf {
    fn as_ref(&self) -> &[u8] {
        match self {
            SendBuf::Owned(bytes) => bytes,
            SendBuf::Shared(bytes) => bytes,
        }
    }
}

/// Something for the kernel to do, with all that it needs.
#[derive(Debug)]
pub enum Op {
    /// Takes one connection: [`Completion::accepted`], closed on exec.
    Accept {
        /// A listening socket.
        socket: Arc<OwnedFd>,
    },
    /// Connects an unconnected TCP socket.
    Connect {
        /// Made by [`super::net::tcp_socket_for`].
        socket: Arc<OwnedFd>,
        /// Where to.
        addr: SocketAddr,
    },
    /// One receive behind what is in `buf`; the result is the number of bytes, by
    /// which `buf` has grown, 0 at the end of the stream.
    Recv {
        /// A connected, blocking socket.
        socket: Arc<OwnedFd>,
        /// Where the bytes go: into its spare capacity, which is not written before.
        buf: Buffer,
        /// Length that `buf` has at most afterwards; no more than its capacity.
        upto: usize,
    },
    /// Sends `buf[from..]`; the result is the number of bytes, which may be fewer, even
    /// none where no thread was to be had for many.
    Send {
        /// A connected, blocking socket.
        socket: Arc<OwnedFd>,
        /// What to send.
        buf: SendBuf,
        /// First byte to send.
        from: usize,
    },
    /// Sends all of `bufs`, one behind the other, from byte `from` of them on; else as
    /// [`Op::Send`].
    SendAll {
        /// A connected, blocking socket.
        socket: Arc<OwnedFd>,
        /// What to send; at most [`MAX_PARTS`].
        bufs: Vec<SendBuf>,
        /// First byte to send.
        from: usize,
    },
    /// Waits once until `fd` is readable (or writable, or hung up).
    Poll {
        /// What to watch.
        fd: Arc<OwnedFd>,
        /// Whether to wait for room to write instead.
        writable: bool,
    },
}

/// An operation that is done, with everything that it owned.
#[derive(Debug)]
pub struct Completion {
    /// What was given to [`Ring::submit`].
    pub token: u64,
    /// Bytes moved, events polled, or 0; or the kernel's error: `ECANCELED` after
    /// a cancel (or the bytes moved before it), `EINTR` where it has to be
    /// submitted again.
    pub result: io::Result<u32>,
    /// The operation.
    pub op: Op,
    /// The connection, if it was an accept that succeeded.
    pub accepted: Option<OwnedFd>,
}

/// How a ring was set up; shown by `doctor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// `SINGLE_ISSUER | DEFER_TASKRUN`: completions are made inside `enter` only.
    Deferred,
    /// `COOP_TASKRUN`: completions wait for the next system call.
    Cooperative,
    /// Neither: completions interrupt the thread.
    Plain,
}

/// A socket address as the kernel reads it; boxed, for I1.
#[repr(C)]
union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// What several buffers are sent by; it points into the operation's own (I1).
struct Message {
    header: libc::msghdr,
    parts: Vec<libc::iovec>,
}

struct InFlight {
    token: u64,
    generation: u32,
    op: Op,
    address: Option<Box<Address>>,
    message: Option<Box<Message>>,
    /// Whether a kernel thread does it.
    aside: bool,
    cancelled: bool,
}

/// A ring of one thread.
pub struct Ring {
    ring: IoUring,
    setup: Setup,
    in_flight: Slab<InFlight>,
    generation: u32,
    to_cancel: VecDeque<u64>,
    /// Whether kernel threads are not to be had: nothing is left to them any more.
    alone: bool,
    /// `SINGLE_ISSUER`: the thread that made it is the one that may use it.
    _not_send: PhantomData<*mut ()>,
}

impl Ring {
    /// A ring with room for `entries` submissions per turn (rounded up to a power
    /// of two) and four times as many completions; more of either are not lost,
    /// only slower.
    ///
    /// # Errors
    /// `EPERM`, `ENOSYS` or `ENOMEM` where the system refuses, with the remedy.
    pub fn new(entries: u32) -> Result<Ring, SysError> {
        let (ring, setup) = build(entries).map_err(|source| {
            let errno = source.raw_os_error();
            let error = SysError::new("io_uring_setup", source);
            match errno {
                Some(libc::EPERM) => error.with_remedy(
                    "sysctl kernel.io_uring_disabled=0, and allow io_uring in the container's seccomp profile",
                ),
                Some(libc::ENOSYS) => error.with_remedy(
                    "use a kernel with CONFIG_IO_URING=y, and allow io_uring in the container's seccomp profile",
                ),
                Some(libc::ENOMEM) => error.with_remedy("raise the locked memory limit (ulimit -l)"),
                _ => error,
            }
        })?;
        Ok(Ring {
            ring,
            setup,
            in_flight: Slab::new(),
            generation: 0,
            to_cancel: VecDeque::new(),
            alone: false,
            _not_send: PhantomData,
        })
    }

    /// How it was set up.
    pub fn setup(&self) -> Setup {
        self.setup
    }

    /// The names of needed operations that the kernel does not have.
    ///
    /// # Errors
    /// Whatever `io_uring_register` says.
    pub fn missing_operations(&self) -> Result<Vec<&'static str>, SysError> {
        let mut probe = io_uring::Probe::new();
        self.ring
            .submitter()
            .register_probe(&mut probe)
            .map_err(|e| SysError::new("IORING_REGISTER_PROBE", e))?;
        let missing = NEEDED.iter().filter(|(code, _)| !probe.is_supported(*code));
        Ok(missing.map(|(_, name)| *name).collect())
    }

    /// Queues an operation for the next [`Ring::enter`]. Tokens need not be unique.
    ///
    /// # Errors
    /// `EINVAL` if `upto` leaves nothing to receive, or `from` lies beyond what is to be
    /// sent, `EBUSY` beyond [`MAX_IN_FLIGHT`]; whatever `io_uring_enter` says if
    /// the queue was full. The operation is dropped then.
    pub fn submit(&mut self, token: u64, op: Op) -> Result<(), SysError> {
        let fits = match &op {
            Op::Recv { buf, upto, .. } => buf.len() < *upto && *upto <= buf.capacity(),
            Op::Send { buf, from, .. } => *from <= buf.as_ref().len(),
            Op::SendAll { bufs, from, .. } => bufs.len() <= MAX_PARTS && *from <= bytes_of(bufs),
            _ => true,
        };
        if !fits {
            return Err(SysError::os("submitting a transfer", libc::EINVAL));
        }
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Err(SysError::os("submitting one more operation", libc::EBUSY));
        }
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let address = match &op {
            Op::Connect { addr, .. } => Some(Box::new(Address::of(addr))),
            _ => None,
        };
        let (message, bytes) = match &op {
            Op::SendAll { bufs, from, .. } => {
                (Some(Message::of(bufs, *from)), bytes_of(bufs) - from)
            }
            Op::Send { buf, from, .. } => (None, buf.as_ref().len() - from),
            _ => (None, 0),
        };
        let key = self.in_flight.insert(InFlight {
            token,
            generation,
            op,
            address,
            message,
            aside: bytes >= ASIDE && !self.alone,
            cancelled: false,
        });
        let mut entry = entry_for(&mut self.in_flight[key]).user_data(number_of(key, generation));
        if self.in_flight[key].aside {
            entry = entry.flags(Flags::ASYNC);
        }
        // SAFETY: required: what the entry points to stays valid until completion. I1, I2.
        if let Err(e) = unsafe { self.push(&entry) } {
            self.in_flight.remove(key);
            return Err(e);
        }
        Ok(())
    }

    /// Cancels all operations with that token, at the next [`Ring::enter`]. Each
    /// still completes: with `ECANCELED`, or as it would have if it was faster.
    pub fn cancel(&mut self, token: u64) {
        for (key, op) in &mut self.in_flight {
            if op.token == token {
                op.cancelled = true;
                self.to_cancel.push_back(number_of(key, op.generation));
            }
        }
    }

    /// Hands everything queued to the kernel, and waits until at least one
    /// completion can be taken or `timeout` passed; `Some(ZERO)` does not wait,
    /// `None` waits for ever. Does not wait either if completions are at hand.
    ///
    /// # Errors
    /// Whatever `io_uring_enter` says, other than that it was interrupted or timed out.
    pub fn enter(&mut self, timeout: Option<Duration>) -> Result<(), SysError> {
        self.queue_cancels()?;
        let at_hand = !self.ring.completion().is_empty();
        let answer = if at_hand || timeout == Some(Duration::ZERO) {
            let queue = self.ring.submission();
            let idle = queue.is_empty() && !queue.taskrun() && !queue.cq_overflow();
            drop(queue);
            if idle {
                return Ok(());
            }
            self.ring.submit()
        } else {
            match timeout {
                None => self.ring.submit_and_wait(1),
                Some(timeout) => {
                    let timeout = Timespec::from(timeout);
                    let args = SubmitArgs::new().timespec(&timeout);
                    self.ring.submitter().submit_with_args(1, &args)
                }
            }
        };
        match answer {
            Ok(_) => Ok(()),
            // EBUSY: completions have to be taken before more is accepted.
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::ETIME | libc::EBUSY) => Ok(()),
                _ => Err(SysError::new("io_uring_enter", e)),
            },
        }
    }

    /// The next completion at hand. Calls nothing.
    #[allow(
        clippy::should_implement_trait,
        reason = "a ring is not an iterator: more may come after None"
    )]
    pub fn next(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            if entry.user_data() == CANCEL {
                continue;
            }
            let (key, generation) = split(entry.user_data());
            let known = self.in_flight.get(key);
            if known.is_none_or(|known| known.generation != generation) {
                debug_assert!(false, "a completion of nothing in flight");
                continue;
            }
            let done = self.in_flight.remove(key);
            let mut answer = entry.result();
            if answer == -libc::ECANCELED && done.aside && !done.cancelled {
                // The kernel could not start a thread, for want of processes most likely
                // (`io_wq_enqueue` in `io_uring/io-wq.c`): nothing was sent.
                (self.alone, answer) = (true, 0);
            }
            return Some(completion(done, answer));
        }
    }

    /// Whether [`Ring::enter`] without waiting would find something to do, as far
    /// as the kernel has said: two loads, for a loop that spins for a while.
    pub fn has_work(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    /// Operations whose completion was not taken yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn queue_cancels(&mut self) -> Result<(), SysError> {
        while let Some(&number) = self.to_cancel.front() {
            let cancel = CancelBuilder::user_data(number);
            let entry = opcode::AsyncCancel2::new(cancel).build().user_data(CANCEL);
            // SAFETY: required: the entry points to nothing. It holds a number.
            unsafe { self.push(&entry)? };
            self.to_cancel.pop_front();
        }
        Ok(())
    }

    /// Queues an entry, making room if there is none.
    ///
    /// # Safety
    /// What the entry points to stays valid until its completion.
    unsafe fn push(&mut self, entry: &Entry) -> Result<(), SysError> {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(SysError::new("io_uring_enter", e)),
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let all = self.in_flight.iter();
        self.to_cancel = all.map(|(key, op)| number_of(key, op.generation)).collect();
        let deadline = Instant::now() + DROP_DEADLINE;
        while !self.in_flight.is_empty() && Instant::now() < deadline {
            if self.enter(Some(Duration::from_millis(10))).is_err() {
                break;
            }
            while self.next().is_some() {}
        }
        // I1: the kernel may still write there.
        std::mem::forget(std::mem::take(&mut self.in_flight));
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("setup", &self.setup)
            .field("in_flight", &self.in_flight.len())
            .finish_non_exhaustive()
    }
}

/// The best ring that the kernel makes.
fn build(entries: u32) -> io::Result<(IoUring, Setup)> {
    let builder = || {
        let mut builder = IoUring::builder();
        builder
            .setup_clamp()
            .setup_cqsize(entries.next_power_of_two().saturating_mul(4))
            .dontfork();
        builder
    };
    let mut deferred = builder();
    deferred
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all();
    let mut cooperative = builder();
    cooperative
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all();
    for (builder, setup) in [
        (deferred, Setup::Deferred),
        (cooperative, Setup::Cooperative),
    ] {
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, setup)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(e),
        }
    }
    builder().build(entries).map(|ring| (ring, Setup::Plain))
}

/// What the kernel gives back with a completion: key below, generation above.
fn number_of(key: usize, generation: u32) -> u64 {
    debug_assert!(key < MAX_IN_FLIGHT);
    u64::from(generation) << 32 | key as u64
}

fn split(number: u64) -> (usize, u32) {
    ((number & 0xFFFF_FFFF) as usize, (number >> 32) as u32)
}

fn fd_of(fd: &Arc<OwnedFd>) -> Fd {
    Fd(fd.as_raw_fd())
}

/// A length as the kernel takes it; a longer transfer is a short one.
fn length(bytes: usize) -> u32 {
    bytes.min(i32::MAX as usize) as u32
}

fn bytes_of(bufs: &[SendBuf]) -> usize {
    bufs.iter().map(|buf| buf.as_ref().len()).sum()
}

impl Message {
    /// Of what lies behind the first `skip` bytes of `bufs`.
    fn of(bufs: &[SendBuf], mut skip: usize) -> Box<Message> {
        let mut parts = Vec::with_capacity(bufs.len());
        for buf in bufs {
            let part = &buf.as_ref()[skip.min(buf.as_ref().len())..];
            skip -= buf.as_ref().len() - part.len();
            if !part.is_empty() {
                parts.push(libc::iovec {
                    iov_base: part.as_ptr().cast_mut().cast(),
                    iov_len: part.len(),
                });
            }
        }
        // SAFETY: required: zeros are a `struct msghdr`: it consists of numbers and
        // pointers, of which null is one.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iovlen = parts.len() as _;
        Box::new(Message { header, parts })
    }
}

/// The submission entry; it points into what `op` owns on the heap (I1).
fn entry_for(op: &mut InFlight) -> Entry {
    match &mut op.op {
        Op::Accept { socket } => {
            opcode::Accept::new(fd_of(socket), std::ptr::null_mut(), std::ptr::null_mut())
                .flags(libc::SOCK_CLOEXEC)
                .build()
        }
        Op::Connect { socket, addr } => {
            let len = match addr {
                SocketAddr::V4(_) => size_of::<libc::sockaddr_in>(),
                SocketAddr::V6(_) => size_of::<libc::sockaddr_in6>(),
            };
            let address = op.address.as_deref().map_or(std::ptr::null(), |address| {
                std::ptr::from_ref(address).cast()
            });
            opcode::Connect::new(fd_of(socket), address, len as u32).build()
        }
        Op::Recv { socket, buf, upto } => {
            let room = *upto - buf.len();
            opcode::Recv::new(fd_of(socket), buf.end_ptr(), length(room)).build()
        }
        Op::Send { socket, buf, from } => {
            let part = &buf.as_ref()[*from..];
            opcode::Send::new(fd_of(socket), part.as_ptr(), length(part.len()))
                .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
                .build()
        }
        Op::SendAll { socket, .. } => {
            let message = op
                .message
                .as_deref_mut()
                .map_or(std::ptr::null(), |message| {
                    // Only now that the parts have their final place.
                    message.header.msg_iov = message.parts.as_mut_ptr();
                    &raw const message.header
                });
            opcode::SendMsg::new(fd_of(socket), message)
                .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                .build()
        }
        Op::Poll { fd, writable } => {
            let events = if *writable {
                libc::POLLOUT
            } else {
                libc::POLLIN
            };
            opcode::PollAdd::new(fd_of(fd), events as u32).build()
        }
    }
}

fn completion(mut done: InFlight, answer: i32) -> Completion {
    let mut result = match u32::try_from(answer) {
        Ok(count) => Ok(count),
        Err(_) => Err(io::Error::from_raw_os_error(answer.saturating_neg())),
    };
    let mut accepted = None;
    if let (Op::Accept { .. }, Ok(_)) = (&done.op, &result) {
        // SAFETY: required: an open descriptor without an owner. The kernel just
        // installed it, and each completion is taken once (I3).
        accepted = Some(unsafe { OwnedFd::from_raw_fd(answer) });
        result = Ok(0);
    }
    if let (Op::Recv { buf, .. }, Ok(count)) = (&mut done.op, &result) {
        let len = buf.len() + *count as usize;
        assert!(len <= buf.capacity(), "the kernel wrote what it was given");
        // SAFETY: required: `count` bytes behind the old length are initialised and within
        // the capacity. The kernel wrote them, into memory that nobody else touched
        // (I1); the bound was just checked.
        unsafe { buf.grow(*count as usize) };
    }
    Completion {
        token: done.token,
        result,
        op: done.op,
        accepted,
    }
}

impl Address {
    fn of(addr: &SocketAddr) -> Address {
        match addr {
            SocketAddr::V4(addr) => Address {
                v4: libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: addr.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(addr.ip().octets()),
                    },
                    sin_zero: [0; 8],
                },
            },
            SocketAddr::V6(addr) => Address {
                v6: libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: addr.port().to_be(),
                    sin6_flowinfo: addr.flowinfo(),
                    sin6_addr: libc::in6_addr {
                        s6_addr: addr.ip().octets(),
                    },
                    sin6_scope_id: addr.scope_id(),
                },
            },
        }
    }
}

#[cfg(test)]
mod tests;
