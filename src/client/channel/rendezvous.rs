//! The client's way to a server: where its socket lies, who answers there, one hello
//! and one answer.
//!
//! | step | what is checked |
//! |---|---|
//! | name -> `FOLDER/NAME.sock` | the name is a file name |
//! | connect | somebody listens |
//! | `SO_PEERCRED` | the server belongs to this user or to root |
//! | hello, answer | magic, version, features, number of descriptors, within the deadline |
//!
//! I1. Nothing is sent to a server of another user, and no descriptor of its is used.
//! I2. The deadline is of the whole exchange: a server that answers byte by byte does
//!     not prolong it.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::duplex::DuplexError;
use crate::duplex::rendezvous::{
    Answer, ChannelName, Hello, MESSAGE_BYTES, Refusal, RendezvousError, Welcome,
};
use crate::sys::SysError;
use crate::sys::net::{self, Blocking};
use crate::sys::process::effective_uid;

/// Environment variable that names the folder of the sockets.
pub const FOLDER_VARIABLE: &str = "UFFD_SYNC_CHANNELS";
/// The user that every other trusts.
const ROOT: u32 = 0;

/// A rendezvous that failed, on either side.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody serves the name.
    #[error(
        "no server answers for channel {name} at {path}; start one with `uffd-sync channel serve {name}`",
        path = path.display()
    )]
    NoChannel {
        /// Name that was tried.
        name: ChannelName,
        /// Its socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// Another server has the name.
    #[error("the name {name} is taken: a server answers at {path}", path = path.display())]
    NameTaken {
        /// The name.
        name: ChannelName,
        /// Its socket.
        path: PathBuf,
    },
    /// The socket cannot be made or reached, for a reason of its folder or path.
    #[error(
        "the socket of channel {name} cannot be used at {path}; {FOLDER_VARIABLE} names another folder",
        path = path.display()
    )]
    Socket {
        /// Name of the channel.
        name: ChannelName,
        /// Path that was tried.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// The server belongs to another user.
    #[error("the server of channel {name} belongs to user {server}, not to {own} or root")]
    OtherUser {
        /// Name of the channel.
        name: ChannelName,
        /// The server's user.
        server: u32,
        /// This process's user.
        own: u32,
    },
    /// The server refused; nothing changed.
    #[error("channel {name} refused this client")]
    Refused {
        /// Name of the channel.
        name: ChannelName,
        /// Why.
        #[source]
        refusal: Refusal,
    },
    /// What came back is no answer.
    #[error("the server of channel {name} does not speak as one")]
    Protocol {
        /// Name of the channel.
        name: ChannelName,
        /// What is wrong with it.
        #[source]
        source: RendezvousError,
    },
    /// The answer grants something else than what was asked.
    #[error("the server of channel {name} grants {what} that was not asked for")]
    Mismatch {
        /// Name of the channel.
        name: ChannelName,
        /// Which part of the answer.
        what: &'static str,
    },
    /// This process may not have one more descriptor, so the memory did not arrive.
    #[error("no descriptor is left for the memory of channel {name}; raise `ulimit -n`")]
    OutOfDescriptors {
        /// Name of the channel.
        name: ChannelName,
    },
    /// The connection ended before the answer.
    #[error("the server of channel {name} closed the connection before it answered")]
    Closed {
        /// Name of the channel.
        name: ChannelName,
    },
    /// The deadline passed before the answer.
    #[error("the server of channel {name} did not answer in time")]
    TimedOut {
        /// Name of the channel.
        name: ChannelName,
    },
    /// The server's memory is not a channel's, or cannot be mapped.
    #[error("the memory of channel {name} cannot be used")]
    Memory {
        /// Name of the channel.
        name: ChannelName,
        /// What is wrong with it.
        #[source]
        source: DuplexError,
    },
    /// The channel is of the other kind.
    #[error("channel {name} has two buffers; this client is for one that is changed in place")]
    TwoBuffers {
        /// Name of the channel.
        name: ChannelName,
    },
    /// The kernel refused a call in the middle.
    #[error("the connection to the server of channel {name} failed")]
    Io {
        /// Name of the channel.
        name: ChannelName,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
}

impl ConnectError {
    /// Why the server refused, if it was the server that did.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            ConnectError::Refused { refusal, .. } => Some(*refusal),
            _ => None,
        }
    }
}

/// The folder of the sockets: what [`FOLDER_VARIABLE`] says, else
/// `$XDG_RUNTIME_DIR/uffd-sync/channels`, else `/run/uffd-sync/channels`.
pub fn channels_folder() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    folder_from(variable(FOLDER_VARIABLE), variable("XDG_RUNTIME_DIR"))
}

fn folder_from(own: Option<OsString>, runtime: Option<OsString>) -> PathBuf {
    own.map_or_else(
        || {
            runtime
                .map_or_else(|| PathBuf::from("/run"), PathBuf::from)
                .join("uffd-sync/channels")
        },
        PathBuf::from,
    )
}

/// Where the server of `name` listens.
pub fn channel_socket(folder: &Path, name: &ChannelName) -> PathBuf {
    folder.join(format!("{name}.sock"))
}

/// Whether a process of `peer` may be the other side of a channel of `own`.
pub(super) fn is_trusted(peer: u32, own: u32) -> bool {
    peer == own || peer == ROOT
}

/// What a server granted.
#[derive(Debug)]
pub(super) struct Granted {
    /// The connection: it stays open as long as the channel is used.
    pub(super) connection: OwnedFd,
    /// The answer's fields.
    pub(super) welcome: Welcome,
    /// Descriptors, as many as the answer says.
    pub(super) fds: Vec<OwnedFd>,
    /// What followed the answer, as long as it says.
    pub(super) body: Vec<u8>,
}

/// Asks the server of `name` at `path`.
pub(super) fn ask(
    path: &Path,
    name: &ChannelName,
    hello: &Hello,
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<Granted, ConnectError> {
    let connection = connect(path, name, deadline)?;
    let io = |source: SysError| match source.is_would_block() {
        true => ConnectError::TimedOut { name: name.clone() },
        false => ConnectError::Io {
            name: name.clone(),
            source,
        },
    };
    let peer = net::peer_credentials(&connection).map_err(io)?;
    let own = effective_uid();
    if !is_trusted(peer.uid, own) {
        return Err(ConnectError::OtherUser {
            name: name.clone(),
            server: peer.uid,
            own,
        });
    }
    send(&connection, &hello.encode(), fds, deadline).map_err(io)?;
    let mut incoming = Incoming {
        connection: connection.as_fd(),
        name,
        deadline,
        fds: Vec::new(),
    };
    let mut answer = [0; MESSAGE_BYTES];
    incoming.fill(&mut answer)?;
    let welcome = match Answer::decode(&answer) {
        Ok(Answer::Welcome(welcome)) => welcome,
        Ok(Answer::Refused(refusal)) => {
            let name = name.clone();
            return Err(ConnectError::Refused { name, refusal });
        }
        Err(source) => {
            let name = name.clone();
            return Err(ConnectError::Protocol { name, source });
        }
    };
    let mut body = vec![0; welcome.body_bytes as usize];
    incoming.fill(&mut body)?;
    let fds = incoming.fds;
    if let Some(what) = mismatch(hello, &welcome, fds.len()) {
        let name = name.clone();
        return Err(ConnectError::Mismatch { name, what });
    }
    Ok(Granted {
        connection,
        welcome,
        fds,
        body,
    })
}

/// What an answer grants beside what was asked.
fn mismatch(hello: &Hello, welcome: &Welcome, fds: usize) -> Option<&'static str> {
    let versions = hello.versions.0..=hello.versions.1;
    if fds != welcome.fds as usize {
        Some("a number of descriptors")
    } else if !versions.contains(&welcome.version) {
        Some("a version")
    } else if welcome.features & !hello.features != 0 {
        Some("features")
    } else {
        None
    }
}

fn send(
    connection: &OwnedFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), SysError> {
    let left = deadline.saturating_duration_since(Instant::now());
    net::set_timeouts(connection, None, Some(left))?;
    let mut sent = 0;
    while sent < bytes.len() {
        let fds = if sent == 0 { fds } else { &[] };
        match net::send_with_fds(connection, &bytes[sent..], fds) {
            Ok(count) => sent += count,
            // A server that refuses at once may have closed; its answer is there then.
            Err(error) if is_end(&error) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn connect(path: &Path, name: &ChannelName, deadline: Instant) -> Result<OwnedFd, ConnectError> {
    let left = deadline.saturating_duration_since(Instant::now());
    net::unix_connect_within(path, left).map_err(|source| {
        let (name, path) = (name.clone(), path.to_owned());
        match source.raw_os_error() {
            Some(nix::libc::ENOENT | nix::libc::ECONNREFUSED | nix::libc::ENOTDIR) => {
                ConnectError::NoChannel { name, path, source }
            }
            Some(nix::libc::EAGAIN) => ConnectError::TimedOut { name },
            _ => ConnectError::Socket { name, path, source },
        }
    })
}

fn is_end(error: &SysError) -> bool {
    let ends = [nix::libc::EPIPE, nix::libc::ECONNRESET];
    error.raw_os_error().is_some_and(|n| ends.contains(&n))
}

/// Bytes and descriptors that come in within a deadline.
struct Incoming<'a> {
    connection: BorrowedFd<'a>,
    name: &'a ChannelName,
    deadline: Instant,
    fds: Vec<OwnedFd>,
}

impl Incoming<'_> {
    /// Fills `room` whole, or says why not.
    fn fill(&mut self, room: &mut [u8]) -> Result<(), ConnectError> {
        let max_fds = crate::limits::MAX_CHANNEL_FDS as usize;
        let name = || self.name.clone();
        let mut filled = 0;
        while filled < room.len() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ConnectError::TimedOut { name: name() });
            }
            let received = net::set_timeouts(self.connection, Some(left), None).and_then(|()| {
                net::recv_with_fds(self.connection, &mut room[filled..], max_fds, Blocking::Yes)
            });
            let received = match received {
                Ok(received) => received,
                Err(error) if error.is_would_block() => {
                    return Err(ConnectError::TimedOut { name: name() });
                }
                Err(error) if is_end(&error) => {
                    return Err(ConnectError::Closed { name: name() });
                }
                Err(source) => {
                    let name = name();
                    return Err(ConnectError::Io { name, source });
                }
            };
            if received.bytes == 0 {
                return Err(ConnectError::Closed { name: name() });
            }
            if received.truncated && received.fds.len() < max_fds {
                return Err(ConnectError::OutOfDescriptors { name: name() });
            }
            if received.truncated || self.fds.len() + received.fds.len() > max_fds {
                let (name, what) = (name(), "a number of descriptors");
                return Err(ConnectError::Mismatch { name, what });
            }
            self.fds.extend(received.fds);
            filled += received.bytes;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_the_sockets() {
        let text = |s: &str| Some(OsString::from(s));
        for (own, runtime, folder) in [
            (text("/x"), text("/y"), "/x"),
            (None, text("/y"), "/y/uffd-sync/channels"),
            (None, None, "/run/uffd-sync/channels"),
        ] {
            assert_eq!(folder_from(own, runtime), Path::new(folder));
        }
        let name = "img".parse().expect("a name");
        let socket = channel_socket(Path::new("/x"), &name);
        assert_eq!(socket, Path::new("/x/img.sock"));
    }

    #[test]
    fn the_same_user_and_root_are_trusted() {
        assert!(is_trusted(7, 7) && is_trusted(0, 7) && is_trusted(0, 0));
        assert!(!is_trusted(8, 7) && !is_trusted(7, 0));
    }
}
