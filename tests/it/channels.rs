//! Channel servers as processes of the command, and the command as their client.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::nodes::{BINARY, PATIENCE, await_some};

/// A running `uffd-sync channel serve`; killed and reaped when dropped.
pub(crate) struct ChannelServer {
    child: Child,
    log: Receiver<String>,
}

impl ChannelServer {
    /// Serves the channel `name` in `folder`; `line` holds the flags.
    #[track_caller]
    pub(crate) fn start(folder: &Path, name: &str, line: &str) -> Self {
        Self::try_start(folder, name, line).unwrap_or_else(|log| panic!("not ready: {log}"))
    }

    /// The same; what it said if it ended instead.
    pub(crate) fn try_start(folder: &Path, name: &str, line: &str) -> Result<Self, String> {
        let mut command = channel_command(folder, "serve", name);
        command.args(line.split_whitespace());
        Self::from_command(command)
    }

    /// The same for a command that has all its arguments.
    pub(crate) fn from_command(mut command: Command) -> Result<Self, String> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let (tell, log) = channel();
        std::thread::spawn(move || {
            let mut lines = stderr.lines().map_while(Result::ok);
            lines.all(|line| tell.send(line).is_ok())
        });
        let server = ChannelServer { child, log };
        let mut seen = String::new();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match server.log.recv_timeout(left) {
                Ok(line) if line.contains("serving channel") => return Ok(server),
                Ok(line) => seen += &line,
                Err(_) => return Err(seen),
            }
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("a living child");
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub(crate) fn ended(&mut self) -> ExitStatus {
        await_some("the end of a channel server", || {
            self.child.try_wait().expect("our child")
        })
    }

    /// Kills it and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for ChannelServer {
    fn drop(&mut self) {
        self.end();
    }
}

/// `channel VERB NAME --dir FOLDER`.
pub(crate) fn channel_command(folder: &Path, verb: &str, name: &str) -> Command {
    let mut command = Command::new(BINARY);
    command.args(["channel", verb, name]);
    command.args([OsStr::new("--dir"), folder.as_os_str()]);
    command
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ended {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_slice(&self.stdout).expect("JSON")
    }
}

/// Runs `channel VERB NAME` with the flags of `line` to its end.
#[track_caller]
pub(crate) fn channel_run(
    folder: &Path,
    verb: &str,
    name: &str,
    line: &str,
    input: &[u8],
) -> Ended {
    let mut command = channel_command(folder, verb, name);
    command.args(line.split_whitespace());
    to_its_end(command, input)
}

/// Runs a command with `input`; killed when it takes too long.
#[track_caller]
pub(crate) fn to_its_end(mut command: Command, input: &[u8]) -> Ended {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    // It may end before it has read all: then the pipe breaks, which is fine.
    let feeding = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let gather = |mut pipe: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut all = Vec::new();
            pipe.read_to_end(&mut all).map(|_| all).unwrap_or_default()
        })
    };
    let stdout = gather(Box::new(child.stdout.take().expect("a pipe")));
    let stderr = gather(Box::new(child.stderr.take().expect("a pipe")));
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().expect("our child") {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let stderr = stderr.join().expect("a reading thread");
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    let _ = feeding.join();
    let status = status.unwrap_or_else(|| panic!("{command:?} does not end: {stderr}"));
    Ended {
        code: status.code(),
        stdout: stdout.join().expect("a reading thread"),
        stderr,
    }
}

/// Where a channel's server listens.
pub(crate) fn socket_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.sock"))
}
