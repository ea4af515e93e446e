//! Plain bytes over connected sockets, without waiting and without more than one call.

use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

use super::SysError;

/// Sends what there is room for and says how many bytes that was.
///
/// # Errors
/// Kind `WouldBlock` where there is no room at all; `EPIPE` and others where the peer is
/// gone.
pub fn try_send(socket: impl AsFd, bytes: &[u8]) -> Result<usize, SysError> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match send(socket.as_fd().as_raw_fd(), bytes, flags) {
            Err(nix::errno::Errno::EINTR) => {}
            sent => return sent.map_err(|error| SysError::new("send", error)),
        }
    }
}

/// Receives what is there and says how many bytes that was; 0 at the end of the stream.
///
/// # Errors
/// Kind `WouldBlock` where there is nothing yet; others where the connection is lost.
pub fn try_receive(socket: impl AsFd, bytes: &mut [u8]) -> Result<usize, SysError> {
    loop {
        match recv(socket.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT) {
            Err(nix::errno::Errno::EINTR) => {}
            received => return received.map_err(|error| SysError::new("recv", error)),
        }
    }
}

/// Has the kernel find out whether a silent peer's host is still there, after the time that
/// the system has set for that (`net.ipv4.tcp_keepalive_time`).
///
/// # Errors
/// Whatever `setsockopt` says.
pub fn keep_alive(socket: impl AsFd) -> Result<(), SysError> {
    setsockopt(&socket, sockopt::KeepAlive, &true)
        .map_err(|error| SysError::new("SO_KEEPALIVE", error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::net;

    #[test]
    fn it_sends_what_there_is_room_for() {
        let (ours, theirs) = net::unix_pair().expect("a pair");
        let bytes = vec![7; 8 << 20];
        let mut sent = 0;
        let error = loop {
            match try_send(&ours, &bytes) {
                Ok(count) => sent += count,
                Err(error) => break error,
            }
        };
        assert!(error.is_would_block() && sent > 0);
        drop(theirs);
        let gone = try_send(&ours, &bytes).expect_err("nobody is there");
        assert!(!gone.is_would_block());
    }
}
