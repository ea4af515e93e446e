//! Bytes over a connected stream socket: connections that are begun without waiting,
//! and sends and receives that say one by one whether they may wait.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike,
    SockaddrStorage, UnixAddr, connect, getpeername, getsockopt, recv as recv_call,
    send as send_call, sendmsg, socket, sockopt,
};

use super::SysError;
use super::net::Blocking;

/// A connection that is being made.
#[derive(Debug)]
pub struct Begun {
    /// The socket; calls on it do not wait until [`finish`] said that it is connected.
    pub fd: OwnedFd,
    /// Whether it is connected already. If not, it has room to send once it is, or failed.
    pub connected: bool,
}

/// Begins a connection to a TCP address.
///
/// # Errors
/// What `socket(2)` and `connect(2)` refuse at once.
pub fn begin_tcp(address: SocketAddr) -> Result<Begun, SysError> {
    match address {
        SocketAddr::V4(address) => begin(AddressFamily::Inet, &SockaddrIn::from(address)),
        SocketAddr::V6(address) => begin(AddressFamily::Inet6, &SockaddrIn6::from(address)),
    }
}

/// Begins a connection to the Unix socket at `path`.
///
/// # Errors
/// `ENOENT` and `ECONNREFUSED` if nobody listens there, `EAGAIN` if too many wait,
/// `ENAMETOOLONG` beyond 107 bytes.
pub fn begin_unix(path: &Path) -> Result<Begun, SysError> {
    let address = UnixAddr::new(path).map_err(|e| SysError::new("Unix socket path", e))?;
    begin(AddressFamily::Unix, &address)
}

fn begin(family: AddressFamily, address: &impl SockaddrLike) -> Result<Begun, SysError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd =
        socket(family, SockType::Stream, flags, None).map_err(|e| SysError::new("socket", e))?;
    let connected = match connect(fd.as_raw_fd(), address) {
        Ok(()) => true,
        // An interrupted one goes on by itself.
        Err(nix::Error::EINPROGRESS | nix::Error::EINTR) => false,
        Err(e) => return Err(SysError::new("connect", e)),
    };
    Ok(Begun { fd, connected })
}

/// Whether the connection is made that [`begin_tcp`] or [`begin_unix`] began: from there on
/// calls on it may wait. There is room to send once it is, or has failed.
///
/// # Errors
/// What `connect(2)` would have said.
pub fn finish(fd: impl AsFd) -> Result<bool, SysError> {
    let answer = getsockopt(&fd, sockopt::SocketError).map_err(|e| SysError::new("SO_ERROR", e))?;
    if answer != 0 {
        return Err(SysError::os("connect", answer));
    }
    match getpeername::<SockaddrStorage>(fd.as_fd().as_raw_fd()) {
        Ok(_) => {}
        Err(nix::Error::ENOTCONN) => return Ok(false),
        Err(e) => return Err(SysError::new("getpeername", e)),
    }
    let of = |e| SysError::new("fcntl", e);
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).map_err(of)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).map_err(of)?;
    Ok(true)
}

/// Sends `first` and `second`, one behind the other, as far as there is room, and says how
/// many bytes of both went.
///
/// # Errors
/// Kind `WouldBlock` if there is no room and it may not wait, or the socket's timeout
/// passed; `EPIPE` or `ECONNRESET` if the peer is gone.
pub fn send(
    fd: impl AsFd,
    first: &[u8],
    second: &[u8],
    blocking: Blocking,
) -> Result<usize, SysError> {
    let socket = fd.as_fd().as_raw_fd();
    let flags = MsgFlags::MSG_NOSIGNAL | flags_for(blocking);
    loop {
        // One part goes by the cheaper call.
        let sent = match (first, second) {
            (one, []) | ([], one) => send_call(socket, one, flags),
            _ => {
                let parts = [IoSlice::new(first), IoSlice::new(second)];
                sendmsg::<()>(socket, &parts, &[], flags, None)
            }
        };
        match sent {
            Err(nix::Error::EINTR) => {}
            other => return other.map_err(|e| SysError::new("send", e)),
        }
    }
}

/// Receives what is there, at most as much as `into` holds; 0 at the end of the stream.
///
/// # Errors
/// Kind `WouldBlock` if nothing is there and it may not wait, or the socket's timeout
/// passed; `ECONNRESET` if the peer is gone.
pub fn recv(fd: impl AsFd, into: &mut [u8], blocking: Blocking) -> Result<usize, SysError> {
    let socket = fd.as_fd().as_raw_fd();
    loop {
        match recv_call(socket, into, flags_for(blocking)) {
            Err(nix::Error::EINTR) => {}
            other => return other.map_err(|e| SysError::new("recv", e)),
        }
    }
}

/// Whether the other end has closed the connection, or it failed, with nothing left to
/// receive. Takes nothing out of it.
pub fn has_ended(fd: impl AsFd) -> bool {
    let mut byte = [0];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv_call(fd.as_fd().as_raw_fd(), &mut byte, flags) {
        Ok(bytes) => bytes == 0,
        Err(nix::Error::EINTR) => false,
        Err(e) => io::Error::from(e).kind() != io::ErrorKind::WouldBlock,
    }
}

fn flags_for(blocking: Blocking) -> MsgFlags {
    match blocking {
        Blocking::Yes => MsgFlags::empty(),
        Blocking::No => MsgFlags::MSG_DONTWAIT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::net;

    #[test]
    fn two_parts_arrive_as_one_stream_and_the_end_is_seen() {
        let (a, b) = net::unix_pair().expect("a pair");
        assert_eq!(send(&a, b"ab", b"cd", Blocking::No).expect("room"), 4);
        assert_eq!(send(&a, b"", b"e", Blocking::No).expect("room"), 1);
        assert!(!has_ended(&b));
        drop(a);
        let mut got = [0; 8];
        assert!(!has_ended(&b), "something is left to receive");
        assert_eq!(recv(&b, &mut got, Blocking::Yes).expect("there"), 5);
        assert_eq!(&got[..5], b"abcde");
        assert_eq!(recv(&b, &mut got, Blocking::Yes).expect("the end"), 0);
        assert!(has_ended(&b));
        assert!(send(&b, b"x", b"", Blocking::Yes).is_err());
    }

    #[test]
    fn nothing_there_is_said_without_waiting() {
        let (a, _b) = net::unix_pair().expect("a pair");
        let nothing = recv(&a, &mut [0], Blocking::No).expect_err("nothing");
        assert!(nothing.is_would_block());
    }

    #[test]
    fn a_connection_is_made_without_waiting() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let begun = begin_tcp(address).expect("begun");
        let mut watched = [net::Watched {
            fd: begun.fd.as_fd(),
            for_room: true,
            ready: false,
        }];
        net::poll_each(&mut watched, None).expect("poll");
        assert!(finish(&begun.fd).expect("connected"));
        drop(listener);
        let refused = begin_tcp(address).and_then(|begun| {
            let mut watched = [net::Watched {
                fd: begun.fd.as_fd(),
                for_room: true,
                ready: false,
            }];
            net::poll_each(&mut watched, None)?;
            finish(&begun.fd)
        });
        assert!(refused.is_err());
        let missing = begin_unix(Path::new("/nonexistent/socket")).expect_err("nobody");
        assert_eq!(missing.raw_os_error(), Some(nix::libc::ENOENT));
    }
}
