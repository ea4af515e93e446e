//! A program that is one side of a channel through the library: this test binary again,
//! as a process of its own that takes orders on its standard input and reports on its
//! standard output.
//!
//! Each order is a line of JSON; each report is a line that begins with `@`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use uffd_sync::client::channel::{
    ChannelError, ClientOptions, DuplexChannelFactory, DuplexClient, Frame, HandlerError,
    NamedServer, ServerOptions,
};
use uffd_sync::duplex::{BufferConfig, Failpoint, OpenLimits, Segment, Waiting};

use super::nodes::{PATIENCE, await_that};

/// Set in the environment of a process that is one side of a channel.
pub(crate) const ROLE: &str = "UFFD_SYNC_IT_CHANNEL";

/// What a handler does with a request, by its first byte.
pub(crate) mod ask {
    /// Upper case.
    pub(crate) const UPPER: u8 = b'u';
    /// Sleeps for as many milliseconds as the second byte says, then as `UPPER`.
    pub(crate) const SLEEP: u8 = b's';
    /// Answers an error.
    pub(crate) const FAIL: u8 = b'f';
    /// Panics.
    pub(crate) const PANIC: u8 = b'p';
    /// Makes the response longer than its place.
    pub(crate) const GROW: u8 = b'g';
}

/// What a side is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Serves `name` in `folder`.
    Serve {
        folder: PathBuf,
        name: String,
        clients: u32,
        workers: u32,
        failpoints: bool,
    },
    /// Becomes a client.
    Connect { folder: PathBuf, name: String },
    /// Arms a failpoint of the client's channel; 0 disarms.
    Arm { place: u32 },
    /// Waits until somebody stands at the failpoint.
    AwaitReached { place: u32 },
    /// Calls.
    Call { request: Vec<u8>, timeout_ms: u64 },
    /// The same on a thread of its own; reported when done.
    CallAside { request: Vec<u8>, timeout_ms: u64 },
    /// Calls until an error comes, and reports it.
    CallOn { timeout_ms: u64 },
    /// Connects to the next server of the name.
    Reconnect { timeout_ms: u64 },
    /// Leaves this process so many descriptors, of at most 256.
    LeaveDescriptors { count: usize },
    /// Gives the client up.
    Leave,
}

/// What a side answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Report {
    Done,
    Response {
        bytes: Vec<u8>,
        took_us: u64,
    },
    Failed {
        kind: String,
        text: String,
        took_us: u64,
    },
}

impl Report {
    /// The kind of error, or `response`, or `done`.
    pub(crate) fn kind(&self) -> &str {
        match self {
            Report::Done => "done",
            Report::Response { .. } => "response",
            Report::Failed { kind, .. } => kind,
        }
    }
}

/// One side of a channel; killed and reaped when dropped.
pub(crate) struct Peer {
    child: Child,
    orders: Option<ChildStdin>,
    reports: Receiver<Report>,
    reading: Option<JoinHandle<()>>,
}

impl Peer {
    #[track_caller]
    pub(crate) fn start() -> Self {
        let own = std::env::current_exe().expect("the path of this program");
        let line = [
            "--exact",
            "channel_process",
            "--nocapture",
            "--test-threads=1",
        ];
        let mut child = Command::new(own)
            .args(line)
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("this program starts again");
        let orders = child.stdin.take().expect("standard input is a pipe");
        let stdout = child.stdout.take().expect("standard output is a pipe");
        let (sender, reports) = channel();
        let reading = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The test harness speaks on the same stream, also in front of a report.
                let report = line.split_once('@').map(|(_, json)| json);
                if let Some(Ok(report)) = report.map(serde_json::from_str) {
                    let _ = sender.send(report);
                }
            }
        });
        Self {
            child,
            orders: Some(orders),
            reports,
            reading: Some(reading),
        }
    }

    /// A server of one client with one worker.
    #[track_caller]
    pub(crate) fn server(folder: &Path, name: &str, failpoints: bool) -> Self {
        let mut peer = Self::start();
        peer.carry_out(&Order::Serve {
            folder: folder.to_owned(),
            name: name.to_owned(),
            clients: 1,
            workers: 1,
            failpoints,
        });
        peer
    }

    /// A client.
    #[track_caller]
    pub(crate) fn client(folder: &Path, name: &str) -> Self {
        let mut peer = Self::start();
        peer.carry_out(&connect(folder, name));
        peer
    }

    pub(crate) fn send(&mut self, order: &Order) {
        let mut line = serde_json::to_string(order).expect("orders are plain");
        line.push('\n');
        let orders = self.orders.as_mut().expect("it was not told to leave");
        let written = orders.write_all(line.as_bytes());
        written.expect("the peer takes orders");
    }

    /// The next report.
    #[track_caller]
    pub(crate) fn report(&self) -> Report {
        match self.reports.recv_timeout(PATIENCE) {
            Ok(report) => report,
            Err(error) => panic!("the peer does not report: {error}"),
        }
    }

    /// Gives an order and takes the report on it.
    #[track_caller]
    pub(crate) fn order(&mut self, order: &Order) -> Report {
        self.send(order);
        self.report()
    }

    /// The same for orders that are answered by `Done`.
    #[track_caller]
    pub(crate) fn carry_out(&mut self, order: &Order) {
        let report = self.order(order);
        assert_eq!(report, Report::Done, "{order:?}");
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a living child");
    }

    /// Stops it by `SIGSTOP`; returns once each of its threads stands.
    #[track_caller]
    pub(crate) fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        let stands = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
            // The state stands behind the name, which is in round brackets.
            let state = stat
                .ok()
                .and_then(|s| Some(s.rsplit_once(") ")?.1.starts_with('T')));
            state.unwrap_or(true)
        };
        await_that("a stopped process", || {
            std::fs::read_dir(&tasks).expect("our child").all(stands)
        });
    }

    pub(crate) fn kill(mut self) {
        self.end();
    }

    /// Ends its standard input, upon which it ends in order, and waits for that.
    #[track_caller]
    pub(crate) fn leave(mut self) {
        self.orders = None;
        let ended = super::nodes::await_exit(&mut self.child, PATIENCE);
        assert!(ended.is_some(), "it does not end");
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reading) = self.reading.take() {
            let _ = reading.join();
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.end();
    }
}

pub(crate) fn connect(folder: &Path, name: &str) -> Order {
    Order::Connect {
        folder: folder.to_owned(),
        name: name.to_owned(),
    }
}

/// A request of `len` bytes at least for the handler.
pub(crate) fn request(ask: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![ask, 0];
    bytes.resize(len.max(2), b'x');
    bytes
}

/// The handler of all servers of these tests.
pub(crate) fn handle(frame: &mut Frame<'_>) -> Result<(), HandlerError> {
    let mut head = [0; 2];
    let view = frame.view();
    let len = view.len().min(2);
    view.read(0, &mut head[..len]).expect("within the frame");
    match head[0] {
        ask::FAIL => Err(HandlerError::new("the handler does not like it")),
        ask::PANIC => panic!("the handler panics as it was asked to"),
        ask::GROW => {
            let capacity = frame.capacity();
            frame.set_len(capacity + 1)?;
            Ok(())
        }
        _ => {
            if head[0] == ask::SLEEP {
                std::thread::sleep(Duration::from_millis(head[1].into()));
            }
            view.update_chunks(|_, bytes| bytes.make_ascii_uppercase());
            Ok(())
        }
    }
}

/// The word of an error.
pub(crate) fn kind_of(error: &ChannelError) -> &'static str {
    match error {
        ChannelError::Connect(_) => "connect",
        ChannelError::Full => "full",
        ChannelError::TooLarge { .. } => "too large",
        ChannelError::Stopped => "stopped",
        ChannelError::Broken => "broken",
        ChannelError::TimedOut => "timed out",
        ChannelError::PeerDied {
            maybe_modified: true,
            ..
        } => "died modified",
        ChannelError::PeerDied { .. } => "died",
        ChannelError::Disconnected => "disconnected",
        ChannelError::Handler { .. } => "handler",
        _ => "other",
    }
}

/// The peer's side: takes orders until its standard input ends.
pub(crate) fn serve_orders() {
    let mut program = Program::default();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let order = serde_json::from_str(&line).expect("an order");
        if let Some(report) = program.carry_out(order) {
            say(&report);
        }
    }
}

fn say(report: &Report) {
    let line = format!("@{}\n", serde_json::to_string(report).expect("plain"));
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes()).expect("somebody listens");
    out.flush().expect("somebody listens");
}

#[derive(Default)]
struct Program {
    server: Option<NamedServer>,
    client: Option<DuplexClient>,
    /// Of the client, which may be away on a thread.
    segment: Option<Segment>,
    held: Vec<std::fs::File>,
}

impl Program {
    fn client(&self) -> &DuplexClient {
        self.client.as_ref().expect("connected before")
    }

    fn segment(&self) -> &Segment {
        self.segment.as_ref().expect("connected before")
    }

    fn carry_out(&mut self, order: Order) -> Option<Report> {
        let begun = Instant::now();
        let done = match order {
            Order::Serve {
                folder,
                name,
                clients,
                workers,
                failpoints,
            } => serve(&folder, &name, clients, workers, failpoints)
                .map(|server| self.server = Some(server)),
            Order::Connect { folder, name } => join(&folder, &name).map(|client| {
                self.segment = Some(client.segment().clone());
                self.client = Some(client);
            }),
            Order::Arm { place } => {
                let place = Failpoint::ALL.into_iter().find(|p| *p as u32 == place);
                self.segment().arm_failpoint(place);
                Ok(())
            }
            Order::AwaitReached { place } => {
                let segment = self.segment();
                await_that("somebody at a failpoint", || {
                    segment.failpoint_reached() == place
                });
                Ok(())
            }
            Order::Call {
                request,
                timeout_ms,
            } => return Some(call(self.client(), &request, timeout_ms)),
            Order::CallAside {
                request,
                timeout_ms,
            } => {
                self.call_aside(request, timeout_ms);
                return None;
            }
            Order::CallOn { timeout_ms } => return Some(self.call_on(timeout_ms)),
            Order::Reconnect { timeout_ms } => {
                let timeout = Duration::from_millis(timeout_ms);
                let client = self.client.as_mut().expect("connected before");
                client.reconnect(timeout)
            }
            Order::LeaveDescriptors { count } => {
                self.leave_descriptors(count);
                Ok(())
            }
            Order::Leave => {
                self.client = None;
                Ok(())
            }
        };
        Some(match done {
            Ok(()) => Report::Done,
            Err(error) => failed(&error, begun),
        })
    }

    /// The client goes with the thread.
    fn call_aside(&mut self, request: Vec<u8>, timeout_ms: u64) {
        let client = self.client.take().expect("connected before");
        std::thread::spawn(move || {
            let report = call(&client, &request, timeout_ms);
            // Its place is free before anybody hears of it.
            drop(client);
            say(&report);
        });
    }

    fn call_on(&self, timeout_ms: u64) -> Report {
        let mut length = 0;
        loop {
            length = (length + 61) % 5000;
            let request = request(ask::UPPER, length);
            match call(self.client(), &request, timeout_ms) {
                Report::Response { .. } => {}
                failed => return failed,
            }
        }
    }

    /// Takes descriptors until the limit, then gives `count` back.
    fn leave_descriptors(&mut self, count: usize) {
        self.held.clear();
        setrlimit(Resource::RLIMIT_NOFILE, 256, 256).expect("a lower limit is allowed");
        while let Ok(file) = std::fs::File::open("/dev/null") {
            self.held.push(file);
        }
        let kept = self.held.len().saturating_sub(count);
        self.held.truncate(kept);
    }
}

/// Serves with [`handle`].
pub(crate) fn serve(
    folder: &Path,
    name: &str,
    clients: u32,
    workers: u32,
    failpoints: bool,
) -> Result<NamedServer, ChannelError> {
    let mut config = BufferConfig::new(64, 1 << 20);
    if failpoints {
        config = config.failpoints();
    }
    let options = ServerOptions {
        workers: workers as usize,
        waiting: Waiting::Park,
        max_clients: clients as usize,
        ..ServerOptions::default()
    };
    let name = name.parse().expect("a name");
    let factory = DuplexChannelFactory::in_folder(folder);
    let server = factory.create_in_place_server(&name, config, options)?;
    server.start(handle)?;
    Ok(server)
}

/// Connects.
pub(crate) fn join(folder: &Path, name: &str) -> Result<DuplexClient, ChannelError> {
    let limits = OpenLimits {
        failpoints: true,
        ..OpenLimits::default()
    };
    let options = ClientOptions {
        waiting: Waiting::Park,
        limits,
        ..ClientOptions::default()
    };
    let name = name.parse().expect("a name");
    DuplexChannelFactory::in_folder(folder).create_in_place_client(&name, options)
}

/// Calls and says what came of it.
pub(crate) fn call(client: &DuplexClient, request: &[u8], timeout_ms: u64) -> Report {
    let begun = Instant::now();
    match client.call(request, Duration::from_millis(timeout_ms)) {
        Ok(response) => Report::Response {
            bytes: response.copy_to_vec(),
            took_us: begun.elapsed().as_micros() as u64,
        },
        Err(error) => failed(&error, begun),
    }
}

fn failed(error: &ChannelError, begun: Instant) -> Report {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    Report::Failed {
        kind: kind_of(error).to_owned(),
        text,
        took_us: begun.elapsed().as_micros() as u64,
    }
}
