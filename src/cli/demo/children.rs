//! The processes of a demonstration: started from this executable, heard line by
//! line, killed and reaped by id when their owner goes, whatever the reason.
//!
//! Each child's standard input is a pipe that ends with this process, and each
//! child ends with its standard input: not even `kill -9` of the demonstration
//! leaves one behind.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::SyncSender;
use std::thread;

use anyhow::Context;

/// What a child said, or that it has closed its output.
pub(in super::super) struct Said {
    /// Which child: the name it was started with.
    pub(in super::super) who: &'static str,
    /// One line; none at the end.
    pub(in super::super) line: Option<String>,
}

/// A running child process; killed and reaped on drop.
pub(in super::super) struct Child {
    who: &'static str,
    process: std::process::Child,
    stdin: Option<ChildStdin>,
}

impl Child {
    /// Starts this executable with `args`; lines go to `ears` where it has a voice.
    pub(in super::super) fn start<A: AsRef<OsStr>>(
        who: &'static str,
        args: impl IntoIterator<Item = A>,
        ears: Option<&SyncSender<Said>>,
    ) -> anyhow::Result<Child> {
        let executable = std::env::current_exe().context("finding this executable")?;
        let output = if ears.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        let mut process = Command::new(executable)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(output)
            // A group of its own: Ctrl-C reaches the parent alone, which ends them in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting the {who} process"))?;
        let stdin = process.stdin.take();
        let voice = process.stdout.take();
        let child = Child {
            who,
            process,
            stdin,
        };
        if let (Some(voice), Some(ears)) = (voice, ears) {
            let ears = ears.clone();
            thread::Builder::new()
                .name(format!("hears-{who}"))
                .spawn(move || listen(who, voice, &ears))
                .context("starting a thread")?;
        }
        Ok(child)
    }

    /// Sends one line to the child.
    pub(in super::super) fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("the pipe is closed")?;
        writeln!(stdin, "{line}").with_context(|| format!("telling the {} process", self.who))
    }

    /// Ends the child's standard input: it reports and exits.
    pub(in super::super) fn no_more(&mut self) {
        self.stdin = None;
    }

    /// Fails if the process has ended although it was not asked to.
    pub(in super::super) fn expect_alive(&mut self) -> anyhow::Result<()> {
        match self.process.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => anyhow::bail!("the {} process ended early: {status}", self.who),
            Err(error) => Err(error).with_context(|| format!("watching the {} process", self.who)),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Fails only if it has ended and was reaped, and then both do nothing.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn listen(who: &'static str, voice: ChildStdout, ears: &SyncSender<Said>) {
    for line in BufReader::new(voice).lines() {
        let Ok(line) = line else { break };
        let line = Some(line);
        if ears.send(Said { who, line }).is_err() {
            return;
        }
    }
    // The receiver may be gone already; then nobody waits for this.
    let _ = ears.send(Said { who, line: None });
}

/// Calls `then` once standard input has ended, from a thread of its own.
pub(in super::super) fn on_end_of_input(
    then: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    thread::Builder::new()
        .name("end-of-input".to_owned())
        .spawn(move || {
            let mut lines = std::io::stdin().lock();
            let mut sink = String::new();
            while matches!(lines.read_line(&mut sink), Ok(n) if n > 0) {
                sink.clear();
            }
            then();
        })
        .context("starting a thread")?;
    Ok(())
}
