//! Unix and TCP sockets, descriptors passed over them, and who is at the other end.
//!
//! All sockets are closed on exec and blocking: the ring waits in the kernel, and
//! calls that must not wait say so one by one (`MSG_DONTWAIT`).
#![allow(
    unsafe_code,
    reason = "recvmsg and sendmsg with descriptors: ownership of what arrives"
)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, connect, listen,
    setsockopt, socket, socketpair, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::time::{TimeVal, TimeValLike};

use super::process::PidFd;
use super::{SysError, check, duplicate};

/// Connections that wait to be accepted before the kernel refuses more.
const BACKLOG: i32 = 128;
/// How long a connection to a Unix socket may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long another process may be busy with the same socket's folder.
const LOCK_DEADLINE: Duration = Duration::from_secs(1);
/// How long an address may stay in use by a process that was killed.
const REBIND_DEADLINE: Duration = Duration::from_secs(1);
/// Most descriptors in one message, both ways.
const MAX_FDS: usize = 32;
/// Descriptors that one call waits for.
const MAX_WAITED: usize = 16;
/// Room for the control message that carries them.
const CONTROL_BYTES: usize = 16 + 4 * MAX_FDS;

/// Who connected, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process number in this namespace; 0 if it is of another one.
    pub pid: i32,
    /// Effective user at the time of `connect`.
    pub uid: u32,
    /// Effective group at the time of `connect`.
    pub gid: u32,
}

/// Whether a call may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// Until the socket's timeouts.
    Yes,
    /// Never: an error of kind `WouldBlock` instead.
    No,
}

/// What [`recv_with_fds`] got.
#[derive(Debug)]
pub struct Received {
    /// Bytes put into the buffer; 0 at the end of the stream.
    pub bytes: usize,
    /// Descriptors that came with them, closed on exec.
    pub fds: Vec<OwnedFd>,
    /// More descriptors came than were asked for; the surplus was closed.
    pub truncated: bool,
}

/// Listens on a Unix socket at `path`, mode 0600. A socket that nobody answers
/// at is replaced.
///
/// # Errors
/// `EADDRINUSE` if somebody answers there, `ENOTSOCK` if `path` is something
/// else, `ENAMETOOLONG` beyond 107 bytes; whatever the folder's mode says.
pub fn unix_listen(path: &Path) -> Result<OwnedFd, SysError> {
    let address = UnixAddr::new(path).map_err(|e| SysError::new("Unix socket path", e))?;
    let _lock = lock_folder_of(path)?;
    let fd = unix_socket()?;
    // The socket file takes over the socket's own mode, without a moment in between.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|e| SysError::new("fchmod", e))?;
    match bind(fd.as_raw_fd(), &address) {
        Ok(()) => {}
        Err(nix::Error::EADDRINUSE) => {
            remove_stale(path)?;
            bind(fd.as_raw_fd(), &address).map_err(|e| SysError::new("bind", e))?;
        }
        Err(e) => return Err(SysError::new("bind", e)),
    }
    listen_on(&fd)?;
    Ok(fd)
}

/// Two processes that find the same stale socket must not replace each other's
/// fresh one: the folder is locked while one looks and binds.
fn lock_folder_of(path: &Path) -> Result<Flock<File>, SysError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = File::open(folder).map_err(|e| SysError::new("open the socket's folder", e))?;
    let deadline = Instant::now() + LOCK_DEADLINE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::Error::EWOULDBLOCK)) if Instant::now() < deadline => {
                file = back;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err((_, e)) => return Err(SysError::new("flock of the socket's folder", e)),
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SysError> {
    let found = std::fs::symlink_metadata(path).map_err(|e| SysError::new("lstat", e))?;
    if !found.file_type().is_socket() {
        return Err(SysError::os("bind over a file", libc::ENOTSOCK));
    }
    let stale = match unix_connect(path) {
        Err(e) => e.raw_os_error() == Some(libc::ECONNREFUSED),
        // A killed process's ring is torn down after the process: until then its
        // socket still takes connections that nobody will serve.
        Ok(listener) => is_of_the_dead(&listener)?,
    };
    if !stale {
        return Err(SysError::os("bind to an occupied socket", libc::EADDRINUSE));
    }
    std::fs::remove_file(path).map_err(|e| SysError::new("unlink of a stale socket", e))
}

/// Whether the process at the other end of a connection has exited.
fn is_of_the_dead(connection: &OwnedFd) -> Result<bool, SysError> {
    let pid = peer_credentials(connection)?.pid;
    // 0: a process of another namespace, which cannot be looked at.
    if pid == 0 {
        return Ok(false);
    }
    match PidFd::open(pid) {
        Ok(process) => process.has_exited(),
        Err(e) => Ok(e.raw_os_error() == Some(libc::ESRCH)),
    }
}

/// Connects to a Unix socket, within five seconds.
///
/// # Errors
/// `ENOENT` if nothing is there, `ECONNREFUSED` if nobody listens, `EAGAIN` if
/// the listener does not accept in time.
pub fn unix_connect(path: &Path) -> Result<OwnedFd, SysError> {
    unix_connect_within(path, CONNECT_DEADLINE)
}

/// Connects to a Unix socket within `longest`.
///
/// # Errors
/// As [`unix_connect`].
pub fn unix_connect_within(path: &Path, longest: Duration) -> Result<OwnedFd, SysError> {
    let address = UnixAddr::new(path).map_err(|e| SysError::new("Unix socket path", e))?;
    let fd = unix_socket()?;
    set_timeouts(&fd, None, Some(longest))?;
    connect(fd.as_raw_fd(), &address).map_err(|e| SysError::new("connect", e))?;
    set_timeouts(&fd, None, None)?;
    Ok(fd)
}

/// Two connected Unix sockets.
///
/// # Errors
/// `EMFILE` if the process is out of descriptors.
pub fn unix_pair() -> Result<(OwnedFd, OwnedFd), SysError> {
    socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|e| SysError::new("socketpair", e))
}

fn unix_socket() -> Result<OwnedFd, SysError> {
    socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(|e| SysError::new("socket", e))
}

fn listen_on(fd: &OwnedFd) -> Result<(), SysError> {
    let backlog = Backlog::new(BACKLOG).map_err(|e| SysError::new("listen", e))?;
    listen(fd, backlog).map_err(|e| SysError::new("listen", e))
}

/// Listens on a TCP address; port 0 takes a free one ([`local_addr`] says which).
/// An address in use is tried again for a second: the ring of a killed process
/// keeps its listener a little longer than the process lives.
///
/// # Errors
/// `EADDRINUSE`, `EADDRNOTAVAIL`, `EACCES` for a port below 1024.
pub fn tcp_listen(addr: SocketAddr) -> Result<OwnedFd, SysError> {
    let deadline = Instant::now() + REBIND_DEADLINE;
    loop {
        match TcpListener::bind(addr) {
            Ok(listener) => return Ok(listener.into()),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(SysError::new("bind", e)),
        }
    }
}

/// The address that a TCP socket is bound to.
///
/// # Errors
/// Of kind `InvalidInput` if it is no TCP socket.
pub fn local_addr(fd: impl AsFd) -> Result<SocketAddr, SysError> {
    TcpListener::from(duplicate(fd)?)
        .local_addr()
        .map_err(|e| SysError::new("getsockname", e))
}

/// An unconnected TCP socket of the family of `addr`.
///
/// # Errors
/// `EMFILE` if the process is out of descriptors.
pub fn tcp_socket_for(addr: &SocketAddr) -> Result<OwnedFd, SysError> {
    let family = match addr {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| SysError::new("socket", e))
}

/// Sends small segments at once.
///
/// # Errors
/// `EOPNOTSUPP` if it is no TCP socket.
pub fn set_nodelay(fd: impl AsFd) -> Result<(), SysError> {
    setsockopt(&fd, sockopt::TcpNoDelay, &true).map_err(|e| SysError::new("TCP_NODELAY", e))
}

/// Lets a receive that waits be woken only when `bytes` are there, or no more can come.
///
/// # Errors
/// Whatever `setsockopt` says.
pub fn set_least_received(fd: impl AsFd, bytes: usize) -> Result<(), SysError> {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    // SAFETY: required: an integer of the length given. It lives on this stack, and the
    // kernel only reads it during the call.
    let answer = unsafe {
        nix::libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            nix::libc::SOL_SOCKET,
            nix::libc::SO_RCVLOWAT,
            std::ptr::from_ref(&bytes).cast(),
            size_of::<i32>() as u32,
        )
    };
    check("SO_RCVLOWAT", answer.into()).map(|_| ())
}

/// Asks the kernel for socket buffers of `bytes` each way (it doubles the number
/// and caps it); `None` leaves one alone.
///
/// # Errors
/// Whatever `setsockopt` says.
pub fn set_buffers(
    fd: impl AsFd,
    recv: Option<usize>,
    send: Option<usize>,
) -> Result<(), SysError> {
    if let Some(bytes) = recv {
        setsockopt(&fd, sockopt::RcvBuf, &bytes).map_err(|e| SysError::new("SO_RCVBUF", e))?;
    }
    if let Some(bytes) = send {
        setsockopt(&fd, sockopt::SndBuf, &bytes).map_err(|e| SysError::new("SO_SNDBUF", e))?;
    }
    Ok(())
}

/// Ends a connection both ways: whoever waits on it, here or there, is told.
///
/// # Errors
/// `ENOTCONN` if it is not connected.
pub fn shutdown(fd: impl AsFd) -> Result<(), SysError> {
    nix::sys::socket::shutdown(fd.as_fd().as_raw_fd(), Shutdown::Both)
        .map_err(|e| SysError::new("shutdown", e))
}

/// Says that nothing more comes from this end: the other one reads the end of the
/// connection, and this one learns when the other closes it.
///
/// # Errors
/// `ENOTCONN` if it is not connected.
pub fn end_sending(fd: impl AsFd) -> Result<(), SysError> {
    nix::sys::socket::shutdown(fd.as_fd().as_raw_fd(), Shutdown::Write)
        .map_err(|e| SysError::new("shutdown", e))
}

/// Who is at the other end of a Unix socket.
///
/// # Errors
/// Whatever `getsockopt` says.
pub fn peer_credentials(fd: impl AsFd) -> Result<PeerCredentials, SysError> {
    let peer = nix::sys::socket::getsockopt(&fd, sockopt::PeerCredentials)
        .map_err(|e| SysError::new("SO_PEERCRED", e))?;
    Ok(PeerCredentials {
        pid: peer.pid(),
        uid: peer.uid(),
        gid: peer.gid(),
    })
}

/// Bounds blocking receives and sends; `None` lets them wait for ever. A wait
/// that ends so is an error of kind `WouldBlock`.
///
/// # Errors
/// Whatever `setsockopt` says.
pub fn set_timeouts(
    fd: impl AsFd,
    recv: Option<Duration>,
    send: Option<Duration>,
) -> Result<(), SysError> {
    setsockopt(&fd, sockopt::ReceiveTimeout, &timeval(recv))
        .map_err(|e| SysError::new("SO_RCVTIMEO", e))?;
    setsockopt(&fd, sockopt::SendTimeout, &timeval(send))
        .map_err(|e| SysError::new("SO_SNDTIMEO", e))
}

/// Zero means for ever, so the shortest time is a microsecond.
fn timeval(time: Option<Duration>) -> TimeVal {
    let micros = time.map_or(0, |time| {
        i64::try_from(time.as_micros().max(1)).unwrap_or(i64::MAX)
    });
    TimeVal::microseconds(micros)
}

/// The address of a connected TCP socket's other end.
///
/// # Errors
/// `ENOTCONN` if it is not connected.
pub fn remote_addr(fd: impl AsFd) -> Result<SocketAddr, SysError> {
    TcpStream::from(duplicate(fd)?)
        .peer_addr()
        .map_err(|e| SysError::new("getpeername", e))
}

/// Waits until one of `fds` (1 to 16) is readable or at its end; false after
/// `timeout`, which is rounded to milliseconds, at least one. Allocates nothing.
///
/// # Errors
/// `EINVAL` for no or too many descriptors; what `poll(2)` refuses.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> Result<bool, SysError> {
    let too_many = || SysError::os("poll", libc::EINVAL);
    let first = fds.first().ok_or_else(too_many)?;
    let mut polled: [PollFd<'_>; MAX_WAITED] =
        std::array::from_fn(|at| PollFd::new(*fds.get(at).unwrap_or(first), PollFlags::POLLIN));
    let polled = polled.get_mut(..fds.len()).ok_or_else(too_many)?;
    poll_until(polled, timeout)
}

fn poll_until(polled: &mut [PollFd<'_>], timeout: Option<Duration>) -> Result<bool, SysError> {
    let timeout = match timeout {
        Some(time) => PollTimeout::try_from(time.as_millis().max(1)).unwrap_or(PollTimeout::MAX),
        None => PollTimeout::NONE,
    };
    loop {
        match poll(polled, timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(SysError::new("poll", error)),
        }
    }
}

/// A descriptor that [`poll_each`] looks at.
#[derive(Debug)]
pub struct Watched<'fd> {
    /// Which one.
    pub fd: BorrowedFd<'fd>,
    /// Whether room to send counts too, besides something to read, an end or an error.
    pub for_room: bool,
    /// Answer: whether one of these is there.
    pub ready: bool,
}

/// Waits until one of `watched` is ready and says of each whether it is; all are not
/// after `timeout`.
///
/// # Errors
/// What `poll(2)` refuses.
pub fn poll_each(watched: &mut [Watched<'_>], timeout: Option<Duration>) -> Result<(), SysError> {
    let mut polled: Vec<_> = watched
        .iter()
        .map(|one| {
            let room = if one.for_room {
                PollFlags::POLLOUT
            } else {
                PollFlags::empty()
            };
            PollFd::new(one.fd, PollFlags::POLLIN | room)
        })
        .collect();
    poll_until(&mut polled, timeout)?;
    for (one, polled) in watched.iter_mut().zip(&polled) {
        one.ready = polled.any().unwrap_or(true);
    }
    Ok(())
}

/// Waits until there is room to send, or the connection is at its end; false after `timeout`.
///
/// # Errors
/// What `poll(2)` refuses.
pub fn wait_for_room(fd: impl AsFd, timeout: Duration) -> Result<bool, SysError> {
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    poll_until(&mut polled, Some(timeout))
}

/// Takes a connection that waits at a listener, closed on exec. Does not wait, if no
/// other thread takes connections from the same listener.
///
/// # Errors
/// Kind `WouldBlock` if there is none; `EMFILE` or `ENFILE` without a descriptor for it.
pub fn try_accept(listener: impl AsFd) -> Result<OwnedFd, SysError> {
    if !super::process::is_ready(listener.as_fd(), PollFlags::POLLIN)? {
        return Err(SysError::os("accept", libc::EAGAIN));
    }
    let fd = listener.as_fd().as_raw_fd();
    let accepted = nix::sys::socket::accept4(fd, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| SysError::new("accept", e))?;
    // SAFETY: required: an open descriptor without an owner; the kernel just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(accepted) })
}

/// Sends `bytes` (at least one) with copies of `fds` (at most 32) attached to the
/// first of them, and says how many bytes went. Waits for room; the rest of a
/// short send goes by plain writes, without the descriptors.
///
/// # Errors
/// `EPIPE` if the peer is gone, `EINVAL` without bytes or with too many descriptors.
pub fn send_with_fds(
    fd: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, SysError> {
    send_message(fd.as_fd(), bytes, fds, Blocking::Yes)
}

/// The same without waiting: an error of kind `WouldBlock` if there is no room.
///
/// # Errors
/// As for [`send_with_fds`].
pub fn try_send_with_fds(
    fd: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, SysError> {
    send_message(fd.as_fd(), bytes, fds, Blocking::No)
}

/// Room for control messages, aligned as their headers want it.
#[repr(C, align(8))]
struct ControlRoom([MaybeUninit<u8>; CONTROL_BYTES]);

impl ControlRoom {
    fn new() -> ControlRoom {
        ControlRoom([MaybeUninit::zeroed(); CONTROL_BYTES])
    }
}

/// A message header over one part and the first `control_len` bytes of `room`.
fn header(part: &mut libc::iovec, room: &mut ControlRoom, control_len: usize) -> libc::msghdr {
    // SAFETY: required: all-zero is a valid `msghdr`. It is plain numbers and null
    // pointers (and padding in some C libraries, which is why it is not a literal).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    if control_len > 0 {
        message.msg_control = room.0.as_mut_ptr().cast();
        message.msg_controllen = control_len as _;
    }
    message
}

fn flags_for(blocking: Blocking) -> libc::c_int {
    match blocking {
        Blocking::Yes => 0,
        Blocking::No => libc::MSG_DONTWAIT,
    }
}

fn send_message(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    blocking: Blocking,
) -> Result<usize, SysError> {
    if fds.len() > MAX_FDS || bytes.is_empty() {
        return Err(SysError::os("sendmsg", libc::EINVAL));
    }
    let mut room = ControlRoom::new();
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let payload = size_of_val(fds) as u32;
    // SAFETY: required: nothing; the two calls compute sizes.
    let (space, len) = unsafe { (libc::CMSG_SPACE(payload), libc::CMSG_LEN(payload)) };
    let control_len = if fds.is_empty() { 0 } else { space as usize };
    let message = header(&mut part, &mut room, control_len);
    if !fds.is_empty() {
        // SAFETY: required: the room holds a header and `payload` bytes. It has
        // `CONTROL_BYTES` >= CMSG_SPACE of MAX_FDS numbers, is aligned for a
        // header, and the number of descriptors was checked above. A BorrowedFd is
        // a plain descriptor number (repr(transparent)).
        unsafe {
            let control = libc::CMSG_FIRSTHDR(&raw const message);
            (*control).cmsg_level = libc::SOL_SOCKET;
            (*control).cmsg_type = libc::SCM_RIGHTS;
            (*control).cmsg_len = len as _;
            std::ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(control),
                payload as usize,
            );
        }
    }
    let flags = libc::MSG_NOSIGNAL | flags_for(blocking);
    loop {
        // SAFETY: required: a valid message whose parts are readable; all locals
        // or borrowed for the length of the call, and sendmsg writes none of them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        match check("sendmsg", sent as libc::c_long) {
            Err(e) if e.source.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(|sent| sent as usize),
        }
    }
}

/// Receives once: bytes into `buf` and up to `max_fds` descriptors (at most 32).
/// Surplus descriptors are closed and `truncated` says so.
///
/// # Errors
/// Kind `WouldBlock` if nothing is there and it may not wait, or a timeout passed.
pub fn recv_with_fds(
    fd: impl AsFd,
    buf: &mut [u8],
    max_fds: usize,
    blocking: Blocking,
) -> Result<Received, SysError> {
    let socket = fd.as_fd();
    let mut room = ControlRoom::new();
    let mut part = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let payload = (max_fds.min(MAX_FDS) * size_of::<i32>()) as u32;
    // SAFETY: required: nothing; the call computes a size.
    let space = unsafe { libc::CMSG_SPACE(payload) } as usize;
    let mut message = header(&mut part, &mut room, space);
    let flags = libc::MSG_CMSG_CLOEXEC | flags_for(blocking);
    let bytes = loop {
        // SAFETY: required: a valid message whose parts are writable; all are
        // locals or borrowed exclusively for the length of the call.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
        match check("recvmsg", got as libc::c_long) {
            Err(e) if e.source.kind() == io::ErrorKind::Interrupted => {}
            other => break other? as usize,
        }
    };
    let mut fds = take_fds(&message);
    let surplus = fds.len() > max_fds;
    fds.truncate(max_fds);
    Ok(Received {
        bytes,
        fds,
        truncated: surplus || message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// All descriptors in a received message, each given its owner.
fn take_fds(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: required: a message that recvmsg has filled in, whose control room
    // is still there. The caller's, borrowed. The kernel's lengths are those of
    // what it wrote.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !control.is_null() {
        // SAFETY: required: `control` points to a whole header within the room:
        // CMSG_FIRSTHDR and CMSG_NXTHDR answer null otherwise.
        let (head, data) = unsafe { (&*control, libc::CMSG_DATA(control)) };
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_RIGHTS {
            let whole: usize = head.cmsg_len as _;
            let bytes = whole - (data as usize - control as usize);
            for i in 0..bytes / size_of::<i32>() {
                // SAFETY: required: the i-th number lies within the data, and is
                // an open descriptor without an owner: the kernel installed it.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(data.cast::<i32>().add(i).read_unaligned())
                });
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        control = unsafe { libc::CMSG_NXTHDR(message, control) };
    }
    fds
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd;
    use crate::sys::process::{effective_uid, process_id};
    use std::os::unix::fs::PermissionsExt;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn errno<T: std::fmt::Debug>(result: Result<T, SysError>) -> Option<i32> {
        result.expect_err("refused").raw_os_error()
    }

    #[test]
    fn a_stale_socket_is_replaced_and_an_occupied_one_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        assert_eq!(errno(unix_connect(&path)), Some(libc::ENOENT));
        let first = unix_listen(&path).expect("listen");
        let mode = std::fs::metadata(&path).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(errno(unix_listen(&path)), Some(libc::EADDRINUSE));
        let client = unix_connect(&path).expect("still the first");
        drop(first);
        // A process that another test is just starting may have a copy for a moment.
        let deadline = Instant::now() + PATIENCE;
        while let Ok(socket) = unix_connect(&path) {
            assert!(Instant::now() < deadline, "somebody still listens");
            drop(socket);
        }
        assert_eq!(errno(unix_connect(&path)), Some(libc::ECONNREFUSED));
        let second = unix_listen(&path).expect("replaced");
        unix_connect(&path).expect("the second");
        drop((client, second));
    }

    #[test]
    fn what_is_no_socket_stays_and_long_paths_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        std::fs::write(&path, "precious").expect("write");
        assert_eq!(errno(unix_listen(&path)), Some(libc::ENOTSOCK));
        assert_eq!(std::fs::read(&path).expect("read"), b"precious");
        let long = folder.path().join("x".repeat(108));
        assert_eq!(errno(unix_listen(&long)), Some(libc::ENAMETOOLONG));
        let nowhere = folder.path().join("none/socket");
        assert_eq!(errno(unix_listen(&nowhere)), Some(libc::ENOENT));
    }

    #[test]
    fn descriptors_arrive_and_surplus_ones_are_closed() {
        let (a, b) = unix_pair().expect("pair");
        let file = memfd::create("passed", 4096).expect("memfd");
        // Its peer notices when the last copy of this one is closed.
        let (passed, peer) = unix_pair().expect("pair");
        send_with_fds(&a, b"hello", &[file.as_fd(), passed.as_fd()]).expect("send");
        drop(passed);
        let mut buf = [0; 16];
        let got = recv_with_fds(&b, &mut buf, 2, Blocking::No).expect("recv");
        assert_eq!((&buf[..got.bytes], got.fds.len()), (&b"hello"[..], 2));
        assert!(!got.truncated);
        assert_eq!(memfd::name(&got.fds[0]).expect("name"), "passed");
        let flags = nix::fcntl::fcntl(&got.fds[0], nix::fcntl::FcntlArg::F_GETFD);
        assert_eq!(flags.expect("flags") & libc::FD_CLOEXEC, libc::FD_CLOEXEC);

        let [_, passed] = <[OwnedFd; 2]>::try_from(got.fds).expect("two");
        let all = [file.as_fd(), file.as_fd(), passed.as_fd()];
        send_with_fds(&a, b"x", &all).expect("send");
        drop(passed);
        let open = recv_with_fds(&peer, &mut buf, 0, Blocking::No);
        assert!(open.expect_err("in flight is open").is_would_block());
        let got = recv_with_fds(&b, &mut buf, 1, Blocking::No).expect("recv");
        assert_eq!((got.bytes, got.fds.len(), got.truncated), (1, 1, true));
        set_timeouts(&peer, Some(PATIENCE), None).expect("timeouts");
        let end = recv_with_fds(&peer, &mut buf, 0, Blocking::Yes).expect("recv");
        assert_eq!(end.bytes, 0, "the surplus was closed");

        send_with_fds(&a, b"x", &[file.as_fd()]).expect("send");
        let got = recv_with_fds(&b, &mut buf, 0, Blocking::No).expect("recv");
        assert_eq!((got.fds.len(), got.truncated), (0, true));
    }

    #[test]
    fn waiting_is_bounded_and_ends_are_seen() {
        let (a, b) = unix_pair().expect("pair");
        let mut buf = [0; 1];
        let nothing = recv_with_fds(&b, &mut buf, 1, Blocking::No).expect_err("nothing there");
        assert!(nothing.is_would_block());
        set_timeouts(&b, Some(Duration::from_millis(5)), None).expect("timeouts");
        let late = recv_with_fds(&b, &mut buf, 1, Blocking::Yes).expect_err("nothing comes");
        assert!(late.is_would_block());
        let bulk = vec![0; 1 << 20];
        while let Ok(sent) = try_send_with_fds(&a, &bulk, &[]) {
            assert!(sent > 0);
        }
        set_timeouts(&a, None, Some(Duration::from_millis(5))).expect("timeouts");
        let full = send_with_fds(&a, &bulk, &[]).expect_err("no room comes");
        assert!(full.is_would_block());
        assert!(send_with_fds(&a, &[], &[]).is_err());
        assert!(send_with_fds(&a, b"x", &[b.as_fd(); 33]).is_err());
        let mine = peer_credentials(&a).expect("credentials");
        assert_eq!((mine.uid, mine.pid), (effective_uid(), process_id()));
        drop(a);
        let mut rest = vec![0; 1 << 20];
        set_timeouts(&b, Some(PATIENCE), None).expect("timeouts");
        while recv_with_fds(&b, &mut rest, 1, Blocking::Yes)
            .expect("recv")
            .bytes
            > 0
        {}
        assert_eq!(errno(send_with_fds(&b, b"x", &[])), Some(libc::EPIPE));
    }

    #[test]
    fn connections_are_taken_and_watched_each_for_itself() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = unix_listen(&path).expect("listen");
        let none = try_accept(&listener).expect_err("nobody connected");
        assert!(none.is_would_block());
        let client = unix_connect(&path).expect("connect");
        let server = try_accept(&listener).expect("the client");
        let (bell, silent) = unix_pair().expect("pair");
        let look = |for_room, timeout| {
            let mut watched = [server.as_fd(), bell.as_fd()].map(|fd| Watched {
                fd,
                for_room,
                ready: false,
            });
            poll_each(&mut watched, Some(timeout)).expect("poll");
            watched.map(|one| one.ready)
        };
        assert_eq!(look(false, Duration::from_millis(1)), [false, false]);
        assert_eq!(look(true, PATIENCE), [true, true]);
        send_with_fds(&client, b"x", &[]).expect("send");
        assert_eq!(look(false, PATIENCE), [true, false]);
        drop(silent);
        assert_eq!(
            look(false, PATIENCE),
            [true, true],
            "an end is something to read"
        );
    }

    #[test]
    fn tcp_addresses_of_both_families() {
        for addr in ["127.0.0.1:0", "[::1]:0"] {
            let addr: SocketAddr = addr.parse().expect("an address");
            let listener = match tcp_listen(addr) {
                Ok(listener) => listener,
                Err(_) if addr.is_ipv6() => continue, // Switched off on some hosts.
                Err(e) => panic!("{e}"),
            };
            let bound = local_addr(&listener).expect("address");
            assert_eq!(bound.ip(), addr.ip());
            assert_ne!(bound.port(), 0);
            assert_eq!(errno(tcp_listen(bound)), Some(libc::EADDRINUSE));
            let socket = tcp_socket_for(&bound).expect("socket");
            set_nodelay(&socket).expect("nodelay");
            assert_eq!(errno(shutdown(&socket)), Some(libc::ENOTCONN));
        }
        let (unix, _other) = unix_pair().expect("pair");
        assert!(local_addr(&unix).is_err());
    }
}
