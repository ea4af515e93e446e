//! Further processes: this program again, with a hidden argument.
//!
//! A child's standard input is one end of a socket over which lines and
//! descriptors go both ways. It ends when the other end is closed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use uffd_sync::sys::net::{self, Blocking};
use uffd_sync::sys::process::pin_to_cpu;

/// Longest silence on a channel while something is waited for.
const PATIENCE: Duration = Duration::from_secs(90);
/// Time that a child has to end by itself once its channel is closed.
const GRACE: Duration = Duration::from_secs(10);
const MAX_FDS: usize = 8;
/// Stands for no particular core among a child's arguments.
const ANYWHERE: &str = "-";

/// What a child process may be told to be.
pub(crate) struct Role {
    pub(crate) name: &'static str,
    pub(crate) run: fn(Channel, &[String]) -> anyhow::Result<()>,
}

impl Role {
    pub(crate) const fn of(
        name: &'static str,
        run: fn(Channel, &[String]) -> anyhow::Result<()>,
    ) -> Self {
        Self { name, run }
    }
}

/// Runs the role that the arguments name: role, core, what else it takes.
pub(super) fn serve(roles: &[Role], args: &[String]) -> anyhow::Result<()> {
    // A bench that is killed takes its children along.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let [name, core, rest @ ..] = args else {
        bail!("a child needs a role and a core")
    };
    let role = roles
        .iter()
        .find(|role| role.name == name)
        .context("no such role")?;
    if core != ANYWHERE {
        pin_to_cpu(core.parse()?)?;
    }
    let channel = Channel::new(std::io::stdin().as_fd().try_clone_to_owned()?, None)?;
    (role.run)(channel, rest).with_context(|| format!("in the {name} process"))
}

/// A child process; killed by its id when dropped, unless it has ended by then.
/// Started by the main thread only: children die with the thread that made them.
pub(crate) struct Child {
    process: std::process::Child,
    channel: Option<Channel>,
    role: &'static str,
}

impl Child {
    /// Starts this program as `role`, on one core or anywhere.
    pub(crate) fn spawn(
        role: &'static str,
        core: Option<usize>,
        args: &[&str],
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        Self::spawn_program(&program, &["--child", role], role, core, args)
    }

    /// Starts another program that keeps to the same lines: `leading` arguments, a
    /// core or `-`, then `args`.
    pub(crate) fn spawn_program(
        program: &Path,
        leading: &[&str],
        role: &'static str,
        core: Option<usize>,
        args: &[&str],
    ) -> anyhow::Result<Self> {
        let (ours, theirs) = net::unix_pair()?;
        let process = Command::new(program)
            .args(leading)
            .arg(core.map_or_else(|| ANYWHERE.to_owned(), |core| core.to_string()))
            .args(args)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting the {role} process"))?;
        Ok(Self {
            process,
            channel: Some(Channel::new(ours, Some(PATIENCE))?),
            role,
        })
    }

    /// Sends a line with descriptors.
    pub(crate) fn tell(&mut self, line: &str, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        self.channel()?.send(line, fds)
    }

    /// Waits for a line.
    pub(crate) fn hear(&mut self) -> anyhow::Result<(String, Vec<OwnedFd>)> {
        let role = self.role;
        let heard = self
            .channel()?
            .receive()
            .with_context(|| format!("from the {role} process"))?;
        heard.with_context(|| format!("the {role} process has ended"))
    }

    /// Sends a line and waits for the answer.
    pub(crate) fn ask(&mut self, line: &str) -> anyhow::Result<String> {
        self.tell(line, &[])?;
        Ok(self.hear()?.0)
    }

    fn channel(&mut self) -> anyhow::Result<&mut Channel> {
        self.channel.as_mut().context("the channel is closed")
    }

    /// Its process id, good until this is dropped.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().cast_signed())
    }

    /// Processor time that it has used.
    pub(crate) fn cpu_time(&self) -> anyhow::Result<Duration> {
        Ok(clock_gettime(clock_getcpuclockid(self.pid())?)?.into())
    }

    /// Stops it where it stands; it keeps its memory and uses no processor.
    pub(crate) fn pause(&self) -> anyhow::Result<()> {
        kill(self.pid(), Signal::SIGSTOP)?;
        waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED))?;
        Ok(())
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) -> anyhow::Result<()> {
        Ok(kill(self.pid(), Signal::SIGCONT)?)
    }

    /// Closes the channel and waits for a good end.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.channel = None;
        let deadline = Instant::now() + GRACE;
        loop {
            if let Some(status) = self.process.try_wait()? {
                ensure!(
                    status.success(),
                    "the {} process ended with {status}",
                    self.role
                );
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the {} process does not end",
                self.role
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !matches!(self.process.try_wait(), Ok(Some(_))) {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// One end of a socket that carries lines and descriptors.
pub(crate) struct Channel {
    socket: OwnedFd,
    /// A child waits for ever: its watchdog and the end of the stream bound it.
    patience: Option<Duration>,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Channel {
    fn new(socket: OwnedFd, patience: Option<Duration>) -> anyhow::Result<Self> {
        net::set_timeouts(&socket, None, Some(PATIENCE))?;
        Ok(Self {
            socket,
            patience,
            buffer: Vec::new(),
            fds: Vec::new(),
        })
    }

    pub(crate) fn send(&mut self, line: &str, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        let bytes = format!("{line}\n").into_bytes();
        let mut sent = net::send_with_fds(&self.socket, &bytes, fds)?;
        while sent < bytes.len() {
            sent += net::send_with_fds(&self.socket, &bytes[sent..], &[])?;
        }
        Ok(())
    }

    /// The next line with the descriptors that came until its end; none at the end
    /// of the stream.
    pub(crate) fn receive(&mut self) -> anyhow::Result<Option<(String, Vec<OwnedFd>)>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8(self.buffer.drain(..=end).collect())?;
                return Ok(Some((
                    line.trim_end().to_owned(),
                    std::mem::take(&mut self.fds),
                )));
            }
            let readable = net::wait_readable(&[self.socket.as_fd()], self.patience)?;
            ensure!(readable, "no line within {:?}", self.patience);
            let mut piece = [0; 64 * 1024];
            let got = net::recv_with_fds(&self.socket, &mut piece, MAX_FDS, Blocking::Yes)?;
            if got.bytes == 0 {
                return Ok(None);
            }
            self.fds.extend(got.fds);
            self.buffer.extend_from_slice(&piece[..got.bytes]);
        }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
