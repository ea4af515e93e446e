//! `demo`: two real nodes on loopback, a writer process whose region one of them
//! tracks, a reader process at the replica on the other, and what it all cost.
//!
//! ```text
//! writer --memfd--> node demo-source ==TCP 127.0.0.1==> node demo-replica --memfd--> reader
//!    ^ stdin, stdout                                                 stdin, stdout ^
//!    +------------------------ this process -------------------------+
//! ```
//!
//! Every step has a deadline. However this process ends, its children end: by kill
//! and wait on each path of its own, by the end of their input otherwise.

mod chain;
pub(super) mod children;
mod latency;
pub(super) mod reader;
mod report;
mod workload;
pub(super) mod writer;

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::DemoArgs;
use super::failure::{BadInput, FAILED, Reported};
use children::{Child, Said};
use reader::FromReader;
use report::{Cost, Outcome};
use workload::MIN_SIZE;
use writer::FromWriter;

use crate::client::{Node, Reader};
use crate::limits;
use crate::sys::process::{SignalFd, monotonic_ns};
use crate::units::{ByteSize, MIB};
use crate::wire::control::NodeStatus;
use crate::words::Mode;

/// Name of the region that is mirrored.
const REGION: &str = "demo";
/// How long starting, connecting and the first sync may take, beside the workload.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long the end may take: the last acknowledgement and the comparison.
const END_DEADLINE: Duration = Duration::from_secs(90);
/// Pause between two looks at something that has no event: a socket that is not
/// there yet, a status.
const LOOK: Duration = Duration::from_millis(20);
/// How long what a child said before it ended may be on its way.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Lines of children that wait to be read.
const EARS: usize = 64;
const SIGNALS: [i32; 3] = [nix::libc::SIGINT, nix::libc::SIGTERM, nix::libc::SIGHUP];

/// Runs the demonstration; ends with code 1 if source and replica differ.
pub(super) fn run(args: DemoArgs) -> anyhow::Result<()> {
    let size = args.region_size.0;
    if !(MIN_SIZE..=limits::MAX_REGION_BYTES).contains(&size) {
        let (least, most) = (ByteSize(MIN_SIZE), ByteSize(limits::MAX_REGION_BYTES));
        let text = format!(
            "--region-size {}: must be {least} to {most}",
            args.region_size
        );
        return Err(BadInput(text).into());
    }
    let signals = SignalFd::block(&SIGNALS)?;
    let scratch = Scratch::create()?;
    let bar = progress_bar(args.report.json);
    let mut stage = Stage::new(&scratch, signals, bar);
    let outcome = stage.play(args)?;
    stage.bar.finish_and_clear();
    drop(stage);
    report::print(&outcome, args.report.json)?;
    if outcome.verified {
        Ok(())
    } else {
        Err(Reported(FAILED).into())
    }
}

fn progress_bar(hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    // Standard error; nothing is drawn where that is no terminal.
    let bar = ProgressBar::new(1000);
    match ProgressStyle::with_template("{bar:40} {percent:>3} %  {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A folder for the sockets, removed on drop.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn create() -> anyhow::Result<Scratch> {
        let unique = format!("uffd-sync-demo-{}-{:x}", std::process::id(), monotonic_ns());
        let path = std::env::temp_dir().join(unique);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("creating {}", path.display()))?;
        Ok(Scratch { path })
    }

    fn socket(&self, node: &str) -> PathBuf {
        self.path.join(format!("{node}.sock"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed stays behind in the folder for such things.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The processes and what connects them; children first, so that they end first.
struct Stage<'a> {
    children: Vec<Child>,
    scratch: &'a Scratch,
    signals: SignalFd,
    mouth: SyncSender<Said>,
    ears: Receiver<Said>,
    bar: ProgressBar,
}

impl Stage<'_> {
    fn new(scratch: &Scratch, signals: SignalFd, bar: ProgressBar) -> Stage<'_> {
        let (mouth, ears) = sync_channel(EARS);
        Stage {
            children: Vec::new(),
            scratch,
            signals,
            mouth,
            ears,
            bar,
        }
    }

    fn play(&mut self, args: DemoArgs) -> anyhow::Result<Outcome> {
        let deadline = Instant::now() + START_DEADLINE;
        self.bar.set_message("starting two nodes");
        let mut source = self.start_node("demo-source", &["--listen", "127.0.0.1:0"], deadline)?;
        let address = source
            .status()?
            .listen
            .context("the source node does not listen")?;
        let writer = self.start_writer(args, deadline)?;
        let follow = format!("tcp://{address}/{REGION}");
        let mut replica = self.start_node("demo-replica", &["--follow", &follow], deadline)?;
        self.await_following(&mut replica, deadline)?;
        let reader = self.start_reader(args.mode, deadline)?;
        let before = Cost::of(&source.status()?, REGION)?;
        self.children[writer].tell("go")?;
        let (stores, commits) = self.await_writer(Duration::from_secs(args.seconds))?;
        let cost = Cost::of(&source.status()?, REGION)?.since(before);
        self.children[reader].no_more();
        let measured = self.await_reader()?;
        self.bar.set_message("comparing source and replica");
        let verified = self.compare()?;
        let torn = measured.torn().1;
        Ok(Outcome {
            verified: verified && torn.unwrap_or(0) == 0,
            mode: args.mode,
            seconds: args.seconds,
            region_size: args.region_size.0,
            stores,
            commits,
            cost,
            measured,
        })
    }

    /// Starts a node and connects to it once it answers.
    fn start_node(
        &mut self,
        name: &'static str,
        more: &[&str],
        deadline: Instant,
    ) -> anyhow::Result<Node> {
        let socket = self.scratch.socket(name);
        let path = path_text(&socket)?;
        let mut args = vec!["serve", "--socket", path, "--name", name];
        args.extend(["--log", "warn", "--until-eof"]);
        args.extend(more);
        let at = self.children.len();
        self.children.push(Child::start(name, args, None)?);
        loop {
            match Node::connect(&socket) {
                Ok(node) => return Ok(node),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).with_context(|| format!("waiting for node {name}"));
                }
                Err(_) => self.children[at].expect_alive()?,
            }
            self.look_for_signals()?;
            thread::sleep(LOOK);
        }
    }

    fn start_writer(&mut self, args: DemoArgs, deadline: Instant) -> anyhow::Result<usize> {
        let socket = self.scratch.socket("demo-source");
        let socket = path_text(&socket)?;
        let size = args.region_size.0.to_string();
        let seconds = args.seconds.to_string();
        let words = [
            "demo-writer",
            "--socket",
            socket,
            "--region",
            REGION,
            "--size",
            &size,
        ];
        let mode = args.mode.as_str();
        let words = words
            .into_iter()
            .chain(["--seconds", &seconds, "--mode", mode]);
        let child = Child::start("writer", words, Some(&self.mouth))?;
        self.children.push(child);
        match self.hear::<FromWriter>("writer", deadline)? {
            FromWriter::Ready => Ok(self.children.len() - 1),
            other => bail!("the writer process said {other:?} before it was ready"),
        }
    }

    fn start_reader(&mut self, mode: Mode, deadline: Instant) -> anyhow::Result<usize> {
        let socket = self.scratch.socket("demo-replica");
        let words = [
            "demo-reader",
            "--socket",
            path_text(&socket)?,
            "--region",
            REGION,
            "--mode",
            mode.as_str(),
        ];
        let child = Child::start("reader", words, Some(&self.mouth))?;
        self.children.push(child);
        match self.hear::<FromReader>("reader", deadline)? {
            FromReader::Ready => Ok(self.children.len() - 1),
            FromReader::Measured { .. } => bail!("the reader process ended before it began"),
        }
    }

    /// Waits until the replica is whole.
    fn await_following(&mut self, replica: &mut Node, deadline: Instant) -> anyhow::Result<()> {
        self.bar.set_message("first sync");
        loop {
            let status: NodeStatus = replica.status()?;
            let region = status.regions.iter().find(|region| region.name == REGION);
            let state = region.map_or("absent", |region| region.state.as_str());
            if state == "following" {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("the replica is still `{state}` after {START_DEADLINE:?}");
            }
            self.look_for_signals()?;
            thread::sleep(LOOK);
        }
    }

    /// Shows the writer's progress until it has finished: stores and commits made.
    fn await_writer(&mut self, workload: Duration) -> anyhow::Result<(u64, u64)> {
        let deadline = Instant::now() + workload + END_DEADLINE;
        loop {
            match self.hear("writer", deadline)? {
                FromWriter::Ready => bail!("the writer process started twice"),
                FromWriter::Progress { done, phase } => {
                    self.bar.set_position((done * 1000.0) as u64);
                    self.bar.set_message(phase);
                }
                FromWriter::Finished { stores, commits } => return Ok((stores, commits)),
            }
        }
    }

    fn await_reader(&mut self) -> anyhow::Result<FromReader> {
        match self.hear("reader", Instant::now() + END_DEADLINE)? {
            FromReader::Ready => bail!("the reader process started twice"),
            measured => Ok(measured),
        }
    }

    /// The next line of the child `who`; fails if any child ends, a signal comes or
    /// the deadline passes.
    fn hear<T: serde::de::DeserializeOwned>(
        &mut self,
        who: &str,
        deadline: Instant,
    ) -> anyhow::Result<T> {
        let mut ended: Option<(Instant, anyhow::Error)> = None;
        loop {
            match self.ears.recv_timeout(LOOK) {
                Ok(said) if said.who == who => {
                    let line = said
                        .line
                        .with_context(|| format!("the {who} process ended without a result"))?;
                    return serde_json::from_str(&line)
                        .with_context(|| format!("reading a line of the {who} process"));
                }
                // The other one ended or said too much; its own wait will tell.
                Ok(Said { who, line }) => bail!("the {who} process said {line:?} unasked"),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("nothing is left to hear"),
            }
            if Instant::now() >= deadline {
                bail!("the {who} process did not answer in time");
            }
            self.look_for_signals()?;
            if let Some((_, error)) = ended.take_if(|(since, _)| since.elapsed() > LAST_WORDS) {
                return Err(error);
            }
            for child in &mut self.children {
                if let Err(error) = child.expect_alive() {
                    ended.get_or_insert((Instant::now(), error));
                }
            }
        }
    }

    fn look_for_signals(&self) -> anyhow::Result<()> {
        match self.signals.read()? {
            None => Ok(()),
            Some(signal) => bail!("interrupted by signal {signal}; all processes were ended"),
        }
    }

    /// Compares the whole region byte for byte between the two nodes.
    fn compare(&self) -> anyhow::Result<bool> {
        let open = |node| {
            let path = self.scratch.socket(node);
            Reader::attach(&path, REGION).with_context(|| format!("attaching at {node}"))
        };
        let (source, replica) = (open("demo-source")?, open("demo-replica")?);
        if source.size() != replica.size() {
            return Ok(false);
        }
        let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
        let mut at = 0;
        while at < source.size() {
            let len = MIB.min(source.size() - at) as usize;
            source.read(at, &mut left[..len])?;
            replica.read(at, &mut right[..len])?;
            if left[..len] != right[..len] {
                return Ok(false);
            }
            at += len as u64;
            self.look_for_signals()?;
        }
        Ok(true)
    }
}

fn path_text(path: &Path) -> anyhow::Result<&str> {
    path.to_str()
        .context("the folder for temporary files has an odd name")
}
