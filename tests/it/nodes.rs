//! Nodes as processes: started, asked, killed by id, reaped when dropped.
//!
//! Nothing here waits without a deadline, and no child outlives its handle.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uffd_sync::client::{Node, Reader};
use uffd_sync::wire::control::{NodeStatus, RegionStatus};

/// Longest wait for anything that has to happen; many times what it takes, since
/// tests share the machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The command under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_uffd-sync");

/// Whether the long forms run.
pub(crate) fn long() -> bool {
    std::env::var_os("UFFD_SYNC_LONG").is_some_and(|value| value == "1")
}

/// Looks again and again until there is something, for at most [`PATIENCE`].
#[track_caller]
pub(crate) fn await_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "waited {PATIENCE:?} in vain: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The same for a condition.
#[track_caller]
pub(crate) fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    await_some(what, || holds().then_some(()));
}

/// A folder for sockets and files, removed when dropped.
pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("uffd-sync-it-")
        .tempdir()
        .expect("a temporary folder")
}

/// Copies a program by another process: while this one had the copy open for writing, a
/// child of another test would inherit that and keep the copy from starting.
#[track_caller]
pub(crate) fn copy_program(program: &Path, copy: &Path) {
    let status = Command::new("cp").arg(program).arg(copy).status();
    assert!(status.is_ok_and(|status| status.success()), "no copy");
}

/// Lines that a process wrote to its standard error.
#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

/// A running `uffd-sync serve`.
pub(crate) struct NodeProcess {
    child: Child,
    name: String,
    socket: PathBuf,
    log: Arc<Log>,
    reading: Option<JoinHandle<()>>,
}

impl NodeProcess {
    /// Starts a node in `folder` and waits until it listens. `arguments` go behind
    /// `serve --socket .. --name ..`.
    #[track_caller]
    pub(crate) fn start<S: AsRef<OsStr>>(folder: &Path, name: &str, arguments: &[S]) -> Self {
        let socket = folder.join(format!("{name}.sock"));
        let mut command = Command::new(BINARY);
        command
            .arg("serve")
            .arg("--socket")
            .arg(&socket)
            .args(["--name", name])
            .args(arguments);
        Self::start_by(command, name, socket)
    }

    /// The same by a command that serves at `socket`, as another user for example.
    #[track_caller]
    pub(crate) fn start_by(mut command: Command, name: &str, socket: PathBuf) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let log = Arc::new(Log::default());
        let stderr = child.stderr.take().expect("standard error is a pipe");
        let reading = keep_lines(stderr, Arc::clone(&log));
        let mut node = Self {
            child,
            name: name.to_owned(),
            socket,
            log,
            reading: Some(reading),
        };
        node.await_ready();
        node
    }

    #[track_caller]
    fn await_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_logged("ready") {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                panic!("node {} ended with {status}:\n{}", self.name, self.tail());
            }
            assert!(Instant::now() < deadline, "node {} is not ready", self.name);
            self.wait_for_lines(Duration::from_millis(50));
        }
    }

    /// A node that others may follow.
    #[track_caller]
    pub(crate) fn source(folder: &Path, name: &str) -> Self {
        Self::start(folder, name, &["--listen", "127.0.0.1:0"])
    }

    /// A node that follows `sources`, and may be followed.
    #[track_caller]
    pub(crate) fn follower(folder: &Path, name: &str, sources: &[String]) -> Self {
        let mut arguments = vec!["--listen".to_owned(), "127.0.0.1:0".to_owned()];
        for source in sources {
            arguments.extend(["--follow".to_owned(), source.clone()]);
        }
        Self::start(folder, name, &arguments)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A connection to it.
    #[track_caller]
    pub(crate) fn connect(&self) -> Node {
        match Node::connect(&self.socket) {
            Ok(node) => node,
            Err(error) => panic!("node {}: {error:?}\n{}", self.name, self.tail()),
        }
    }

    #[track_caller]
    pub(crate) fn status(&self) -> NodeStatus {
        self.connect().status().expect("a status")
    }

    pub(crate) fn region(&self, name: &str) -> Option<RegionStatus> {
        let regions = self.status().regions;
        regions.into_iter().find(|region| region.name == name)
    }

    /// Where followers connect to.
    #[track_caller]
    pub(crate) fn listen(&self) -> SocketAddr {
        let listen = self.status().listen.expect("the node listens");
        listen.parse().expect("an address")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a living child");
    }

    /// Kills it at once and reaps it; its socket file stays.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    /// Waits for its end by itself.
    #[track_caller]
    pub(crate) fn await_end(&mut self, within: Duration) -> ExitStatus {
        match await_exit(&mut self.child, within) {
            Some(status) => status,
            None => panic!("node {} goes on:\n{}", self.name, self.tail()),
        }
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("the child can be waited for")
            .is_none()
    }

    /// Whether a line of its log holds `text`.
    pub(crate) fn has_logged(&self, text: &str) -> bool {
        let lines = self.log.lines.lock().expect("no reader panicked");
        lines.iter().any(|line| line.contains(text))
    }

    /// Waits for a line of its log that holds `text`.
    #[track_caller]
    pub(crate) fn await_log(&self, text: &str) -> String {
        let found = || {
            let lines = self.log.lines.lock().expect("no reader panicked");
            lines.iter().find(|line| line.contains(text)).cloned()
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = found() {
                return line;
            }
            assert!(
                Instant::now() < deadline,
                "node {} does not log {text:?}:\n{}",
                self.name,
                self.tail()
            );
            self.wait_for_lines(Duration::from_millis(50));
        }
    }

    fn wait_for_lines(&self, at_most: Duration) {
        let lines = self.log.lines.lock().expect("no reader panicked");
        drop(self.log.grown.wait_timeout(lines, at_most));
    }

    /// The last lines of its log.
    pub(crate) fn tail(&self) -> String {
        let lines = self.log.lines.lock().expect("no reader panicked");
        let from = lines.len().saturating_sub(40);
        lines[from..].join("\n")
    }

    fn end(&mut self) {
        // A child that has ended already cannot be killed, and need not.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reading) = self.reading.take() {
            let _ = reading.join();
        }
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            let text = format!("--- log of node {}\n{}\n", self.name, self.tail());
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }
}

fn keep_lines(stderr: ChildStderr, log: Arc<Log>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            log.lines.lock().expect("no reader panicked").push(line);
            log.grown.notify_all();
        }
    })
}

/// Waits for a child's end by itself, for at most `within`.
pub(crate) fn await_exit(child: &mut Child, within: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(status) = child.try_wait().expect("the child can be waited for") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a command that ended left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ran {
    /// Standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        match serde_json::from_slice(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("{error}: {}", self.text()),
        }
    }
}

/// Runs the command to its end, which has to come within [`PATIENCE`].
#[track_caller]
pub(crate) fn run<S: AsRef<OsStr>>(arguments: &[S], input: &[u8]) -> Ran {
    let mut child = Command::new(BINARY)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut stdin = child.stdin.take().expect("standard input is a pipe");
    let mut stdout = child.stdout.take().expect("standard output is a pipe");
    let mut stderr = child.stderr.take().expect("standard error is a pipe");
    std::thread::scope(|scope| {
        // A command that refuses its arguments does not read its input.
        scope.spawn(move || drop(stdin.write_all(input)));
        let out = scope.spawn(move || read_to_end(&mut stdout));
        let err = scope.spawn(move || read_to_end(&mut stderr));
        let status = await_exit(&mut child, PATIENCE);
        if status.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let stdout = out.join().expect("the reader ends");
        let stderr = err.join().expect("the reader ends");
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        let Some(status) = status else {
            panic!("the command does not end; it said: {stderr}");
        };
        Ran {
            code: status.code(),
            stdout,
            stderr,
        }
    })
}

fn read_to_end(from: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = from.read_to_end(&mut bytes);
    bytes
}

/// Runs the command against a node.
#[track_caller]
pub(crate) fn run_on(node: &NodeProcess, line: &str, input: &[u8]) -> Ran {
    let socket = node.socket().to_str().expect("a path in ASCII");
    let words: Vec<&str> = line.split(' ').chain(["--socket", socket]).collect();
    run(&words, input)
}

/// All bytes of a region and their epoch: of a replica as of one epoch, of a source
/// as they stand.
pub(crate) fn content(node: &NodeProcess, name: &str) -> Result<(Vec<u8>, u64), String> {
    let reader = Reader::attach(node.socket(), name).map_err(|error| format!("{error:?}"))?;
    content_of(&reader)
}

/// The same over an attachment.
pub(crate) fn content_of(reader: &Reader) -> Result<(Vec<u8>, u64), String> {
    let mut bytes = vec![0; reader.size() as usize];
    if matches!(
        reader.joined_status().role,
        uffd_sync::wire::control::Role::Replica
    ) {
        let read = reader.read_at_epoch(|view| view.read(0, &mut bytes));
        let (whole, epoch) = read.map_err(|error| format!("{error:?}"))?;
        whole.map_err(|error| format!("{error:?}"))?;
        return Ok((bytes, epoch.number));
    }
    reader
        .read(0, &mut bytes)
        .map_err(|error| format!("{error:?}"))?;
    Ok((bytes, reader.control().epoch()))
}

/// Waits until a region shows exactly `expected`.
#[track_caller]
pub(crate) fn await_content(node: &NodeProcess, name: &str, expected: &[u8]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = content(node, name);
        if seen.as_ref().is_ok_and(|(bytes, _)| bytes == expected) {
            return;
        }
        if Instant::now() >= deadline {
            let seen = seen.map(|(bytes, epoch)| (first_difference(&bytes, expected), epoch));
            panic!(
                "{name} does not become what is expected: {seen:?}; {:?}",
                node.region(name)
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where two contents differ first, for messages.
pub(crate) fn first_difference(seen: &[u8], expected: &[u8]) -> String {
    let at = seen.iter().zip(expected).position(|(a, b)| a != b);
    match at {
        Some(at) => {
            let count = seen.iter().zip(expected).filter(|(a, b)| a != b).count();
            format!(
                "{count} bytes differ, the first at {at}: {} for {}",
                seen[at], expected[at]
            )
        }
        None => format!("{} bytes for {}", seen.len(), expected.len()),
    }
}

/// Waits until the replica `name` follows.
#[track_caller]
pub(crate) fn await_following(node: &NodeProcess, name: &str) {
    await_that("the replica follows", || {
        node.region(name)
            .is_some_and(|region| region.state == "following")
    });
}
