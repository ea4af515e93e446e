//! `var demo`: three processes, variables 0:{0,1}, 1:{1,2}, 2:{0,1,2}; each callback as it
//! comes, then the merged order and its check.

use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::json;

use super::super::args::Report;
use super::super::demo::children::{Child, Said};
use super::super::failure::{FAILED, Reported};
use super::super::output::Output;
use super::check::check;
use super::party::{Changed, Line, Own, SUBSCRIBERS};
use crate::ordered::{ProcessId, Subscriptions, ValueType, Variable, VariableId};

const NAMES: [&str; 3] = ["process-0", "process-1", "process-2"];
/// Longest silence of all three processes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines of children that wait to be read.
const EARS: usize = 1024;
/// Longest merged order that is printed whole.
const MOST_PRINTED: usize = 100;
/// What is asked of whom at first, with the words for it.
const SCRIPT: [(usize, &str, &str); 6] = [
    (0, "write 0 10", "Writing 10 to variable 0"),
    (1, "write 0 15", "Writing 15 to variable 0"),
    (2, "write 1 20", "Writing 20 to variable 1"),
    (0, "cas 2 0 30", "Compare-and-exchange variable 2: 0 -> 30"),
    (1, "cas 2 0 40", "Compare-and-exchange variable 2: 0 -> 40"),
    (
        2,
        "cas 2 30 50",
        "Compare-and-exchange variable 2: 30 -> 50",
    ),
];

struct Demo {
    children: Vec<Child>,
    ears: Receiver<Said>,
    heard: Vec<Vec<Changed>>,
    own: Vec<Vec<Own>>,
    idle: [u64; 3],
    /// Whether they were told to end.
    ending: bool,
    ended: [bool; 3],
    out: Output,
    json: bool,
}

/// Runs the demonstration and checks it.
pub(super) fn run(operations: u64, order: &str, report: Report) -> anyhow::Result<()> {
    let folder = crate::cli::var::demo::folder()?;
    let (told, ears) = sync_channel(EARS);
    let mut children = Vec::new();
    for (process, name) in NAMES.into_iter().enumerate() {
        let arguments = [
            "var-demo-process".to_owned(),
            "--process".to_owned(),
            process.to_string(),
            "--order".to_owned(),
            order.to_owned(),
            "--folder".to_owned(),
            folder.0.display().to_string(),
        ];
        children.push(Child::start(name, arguments, Some(&told))?);
    }
    drop(told);
    let mut demo = Demo {
        children,
        ears,
        heard: vec![Vec::new(); 3],
        own: vec![Vec::new(); 3],
        idle: [0; 3],
        ending: false,
        ended: [false; 3],
        out: Output::new(),
        json: report.json,
    };
    let started = Instant::now();
    demo.play(operations)?;
    demo.judge(order, started.elapsed())
}

/// A folder for the sockets, for this user alone; removed when dropped.
struct Folder(std::path::PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of it is in the folder for such things.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn folder() -> anyhow::Result<Folder> {
    use std::os::unix::fs::DirBuilderExt;
    let name = format!("uffd-sync-var-{}", crate::sys::process::process_id());
    let path = std::env::temp_dir().join(name);
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&path)
        .with_context(|| format!("creating {}", path.display()))?;
    Ok(Folder(path))
}

impl Demo {
    fn play(&mut self, operations: u64) -> anyhow::Result<()> {
        self.until(|demo| demo.idle == [1; 3])?;
        for (process, order, words) in SCRIPT {
            self.line(process, words)?;
            let before = self.idle[process];
            self.children[process].tell(order)?;
            self.until(|demo| demo.idle[process] > before)?;
        }
        if operations > 0 {
            let before = self.idle;
            for (process, child) in self.children.iter_mut().enumerate() {
                child.tell(&format!("random {operations} {} 4", 0x9E37_79B9 + process))?;
            }
            self.until(|demo| (0..3).all(|at| demo.idle[at] > before[at]))?;
        }
        // An ordered read comes behind all that was completed: what a process hears until
        // then is all there is.
        for (variable, _, subscribers) in SUBSCRIBERS {
            for process in subscribers.iter().map(|id| *id as usize) {
                let before = self.idle[process];
                self.children[process].tell(&format!("read {variable}"))?;
                self.until(|demo| demo.idle[process] > before)?;
            }
        }
        self.ending = true;
        for child in &mut self.children {
            child.tell("end")?;
        }
        self.until(|demo| demo.ended == [true; 3])
    }

    fn line(&mut self, process: usize, words: &str) -> anyhow::Result<()> {
        if !self.json {
            self.out.line(format_args!("[Process {process}] {words}"))?;
            self.out.flush()?;
        }
        Ok(())
    }

    /// Listens until that holds.
    fn until(&mut self, holds: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        while !holds(self) {
            let said = self.ears.recv_timeout(PATIENCE);
            let said = said.context("the processes say nothing any more")?;
            let process = NAMES.iter().position(|name| *name == said.who);
            let process = process.context("a line of nobody")?;
            match said.line {
                Some(line) => self.take(process, &line)?,
                None if !self.ending => bail!("process {process} ended before it was told to"),
                None => self.ended[process] = true,
            }
        }
        Ok(())
    }

    fn take(&mut self, process: usize, line: &str) -> anyhow::Result<()> {
        match serde_json::from_str(line).context("reading a line of a process")? {
            Line::Ready | Line::Idle => self.idle[process] += 1,
            Line::Done(own) => self.own[process].push(own),
            Line::Failed => bail!("process {process} failed"),
            Line::Change(change) => {
                if self.json {
                    self.out
                        .json_line(&json!({ "process": process, "callback": change }))?;
                } else {
                    let Changed { variable, new, .. } = change;
                    let words = format!("Callback: Variable {variable} changed to {new}");
                    self.line(process, &words)?;
                }
                self.heard[process].push(change);
            }
        }
        Ok(())
    }

    fn judge(mut self, order: &str, took: Duration) -> anyhow::Result<()> {
        let subscriptions = Subscriptions::new(SUBSCRIBERS.iter().map(|(id, _, all)| Variable {
            id: VariableId(*id),
            kind: ValueType::Integer,
            subscribers: all.iter().map(|id| ProcessId(*id)).collect(),
        }))?;
        let verdict = check(&subscriptions, &self.heard, &self.own);
        let callbacks: Vec<usize> = self.heard.iter().map(Vec::len).collect();
        let failure = verdict.as_ref().err().cloned();
        let merged = verdict
            .as_ref()
            .map_or(&[][..], |verified| &verified.merged);
        let answers = verdict.as_ref().map_or(0, |verified| verified.answers);
        if self.json {
            self.out.json(&json!({
                "order": order, "callbacks": callbacks, "operations": merged.len(),
                "answers": answers, "seconds": took.as_secs_f64(),
                "breach": failure, "order_verified": verdict.is_ok(),
            }))?;
        } else {
            self.print(merged)?;
            match &failure {
                None => self.out.line(format_args!(
                    "one order: {} changes, {callbacks:?} callbacks, {answers} answers checked",
                    merged.len()
                ))?,
                Some(breach) => self.out.line(format_args!("NOT ONE ORDER: {breach}"))?,
            }
        }
        self.out.done()?;
        match failure {
            None => Ok(()),
            Some(_) => Err(Reported(FAILED).into()),
        }
    }

    fn print(&mut self, merged: &[Changed]) -> anyhow::Result<()> {
        self.out.line("")?;
        self.out
            .line("Merged order (time, variable, change, by):")?;
        let skipped = merged.len().saturating_sub(MOST_PRINTED);
        if skipped > 0 {
            self.out.line(format_args!("  ... {skipped} more"))?;
        }
        for change in &merged[skipped..] {
            self.out.line(format_args!(
                "  {:>6}  variable {}  {} -> {}  process {}",
                change.key.time, change.variable, change.old, change.new, change.key.id.initiator
            ))?;
        }
        Ok(())
    }
}
