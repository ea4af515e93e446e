//! A connection of a peer's client, which waits as it is told to.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use uffd_sync::limits::SPACE_SPIN_US;
use uffd_sync::sys::dial;
use uffd_sync::sys::net::Blocking;
use uffd_sync::sys::spin::Spinner;

use crate::work::PATIENCE;

/// Looks between two times that others may run: as many as a client of a space has.
const LOOKS: u32 = 8;

/// How bytes are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// Asleep.
    Asleep,
    /// By looking for a while first, as servers and clients of a space do.
    Looking,
}

impl Waits {
    /// As an argument of a child.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Asleep => "asleep",
            Self::Looking => "looking",
        }
    }

    pub(crate) fn of_name(name: &str) -> Self {
        match name {
            "looking" => Self::Looking,
            _ => Self::Asleep,
        }
    }
}

pub(crate) struct Line {
    fd: OwnedFd,
    spinner: Option<Spinner>,
}

impl Line {
    pub(crate) fn new(fd: impl Into<OwnedFd>, waits: Waits) -> Self {
        let most = Duration::from_micros(SPACE_SPIN_US);
        let spinner = (waits == Waits::Looking).then(|| Spinner::new(most, LOOKS));
        let fd = fd.into();
        Self { fd, spinner }
    }

    pub(crate) fn tcp(port: u16, waits: Waits) -> io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self::new(stream, waits))
    }

    pub(crate) fn unix(path: &Path, waits: Waits) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self::new(stream, waits))
    }
}

impl Read for Line {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let Self { fd, spinner } = self;
        let look = || match dial::recv(&*fd, room, Blocking::No) {
            Err(error) if error.is_would_block() => None,
            found => Some(found),
        };
        let found = spinner.as_mut().and_then(|spinner| spinner.wait_for(look));
        let received = found.unwrap_or_else(|| dial::recv(&*fd, room, Blocking::Yes));
        received.map_err(|error| error.source)
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        dial::send(&self.fd, bytes, &[], Blocking::Yes).map_err(|error| error.source)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
