//! A program that writes a region: this test binary again, as a process of its own
//! that takes orders on its standard input and reports on its standard output.
//!
//! Each order is a line of JSON; each report is a line that begins with `@`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use uffd_sync::client::{Writer, WriterOptions};
use uffd_sync::words::{EpochKind, Mode, Publish, WriteKind};

use super::crew::{self, Share};
use super::deeds::{Deed, Doer};
use super::nodes::PATIENCE;
use super::pattern::{self, Numbers, PAGE};

/// Set in the environment of a process that is a writer.
pub(crate) const ROLE: &str = "UFFD_SYNC_IT_WRITER";

/// What a writer is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Makes its region on the node at `socket`.
    Create {
        socket: PathBuf,
        name: String,
        size: u64,
        mode: String,
        publish: String,
        more: More,
    },
    /// Attaches to a cooperative region.
    Attach { socket: PathBuf, name: String },
    /// Lets its region go.
    Detach,
    /// Does what one of several writers does.
    Share(Share),
    /// Does something unruly.
    Do(Deed),
    /// Stores a file at the region's beginning.
    Load { path: PathBuf },
    /// Stores bytes.
    Write { offset: u64, bytes: Vec<u8> },
    /// Stores `len` times `byte`.
    Fill { offset: u64, len: u64, byte: u8 },
    /// Says that bytes changed.
    Mark { offset: u64, len: u64 },
    /// Commits, and waits for that many acks.
    Commit { acks: usize, deadline_ms: u64 },
    /// Writes the region's content to a file.
    Dump { path: PathBuf },
    /// Stores step after step until the next order, and reports each.
    Run { seed: u64, from: u64 },
    /// Ends what runs until the next order.
    Stop,
    /// Stores a counter all over the region and times each store.
    Beat,
    /// Commits once a millisecond until the next order and writes the sum of the content
    /// at each epoch to `log`; commit `bulk_at` rewrites the whole region.
    Storm {
        seed: u64,
        bulk_at: u64,
        hot_pages: u64,
        log: PathBuf,
    },
    /// Moves amounts between accounts, one per page, from several threads.
    Bank { threads: u64, guarded: bool },
}

/// Options of a region that most tests leave alone.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct More {
    pub(crate) may_fork: bool,
    pub(crate) mseal: bool,
    pub(crate) exact: bool,
    pub(crate) marks: bool,
    pub(crate) cooperative: bool,
    /// Pause between captures, so long that no timer finds anything.
    pub(crate) rare: bool,
}

/// What a writer answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Report {
    Done,
    Created {
        resumed: bool,
    },
    Epoch {
        number: u64,
        cut: bool,
    },
    /// A step is stored whole.
    Stored {
        step: u64,
    },
    /// [`Order::Run`] ended; `next` is not begun.
    Stopped {
        next: u64,
    },
    Beaten {
        stores: u64,
        longest_us: u64,
    },
    Moved {
        transactions: u64,
        commits: u64,
    },
    /// A deed was done, with what there is to say about it.
    Did {
        text: String,
    },
    Failed {
        error: String,
    },
}

/// A writer process; killed and reaped when dropped.
pub(crate) struct WriterProcess {
    child: Child,
    orders: ChildStdin,
    reports: Receiver<Report>,
    reading: Option<JoinHandle<()>>,
}

impl WriterProcess {
    #[track_caller]
    pub(crate) fn start() -> Self {
        let own = std::env::current_exe().expect("the path of this program");
        Self::start_by(Command::new(own))
    }

    /// The same by a command that runs this program, as another user for example.
    #[track_caller]
    pub(crate) fn start_by(mut command: Command) -> Self {
        let mut child = command
            .args([
                "--exact",
                "writer_process",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("this program starts again");
        let orders = child.stdin.take().expect("standard input is a pipe");
        let stdout = child.stdout.take().expect("standard output is a pipe");
        let (sender, reports) = channel();
        let reading = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The test harness speaks on the same stream, also in front of a report.
                let Some((_, json)) = line.split_once('@') else {
                    continue;
                };
                if let Ok(report) = serde_json::from_str(json) {
                    let _ = sender.send(report);
                }
            }
        });
        Self {
            child,
            orders,
            reports,
            reading: Some(reading),
        }
    }

    /// A writer with its region.
    #[track_caller]
    pub(crate) fn with_region(
        socket: &Path,
        name: &str,
        size: u64,
        mode: Mode,
        publish: Publish,
    ) -> Self {
        let mut writer = Self::start();
        let resumed = writer.create(socket, name, size, mode, publish);
        assert!(!resumed, "a new region has no earlier life");
        writer
    }

    /// Makes its region; true if it began with earlier content.
    #[track_caller]
    pub(crate) fn create(
        &mut self,
        socket: &Path,
        name: &str,
        size: u64,
        mode: Mode,
        publish: Publish,
    ) -> bool {
        match self.try_create(socket, name, size, mode, publish, More::default()) {
            Report::Created { resumed } => resumed,
            other => panic!("no region: {other:?}"),
        }
    }

    /// Tries to make its region.
    #[track_caller]
    pub(crate) fn try_create(
        &mut self,
        socket: &Path,
        name: &str,
        size: u64,
        mode: Mode,
        publish: Publish,
        more: More,
    ) -> Report {
        self.order(&Order::Create {
            socket: socket.to_owned(),
            name: name.to_owned(),
            size,
            mode: mode.to_string(),
            publish: publish.to_string(),
            more,
        })
    }

    /// Has it do something; what it says about it, or how it failed.
    #[track_caller]
    pub(crate) fn deed(&mut self, deed: Deed) -> Result<String, String> {
        match self.order(&Order::Do(deed)) {
            Report::Did { text } => Ok(text),
            Report::Failed { error } => Err(error),
            other => panic!("unexpected report {other:?}"),
        }
    }

    pub(crate) fn send(&mut self, order: &Order) {
        let mut line = serde_json::to_string(order).expect("orders are plain");
        line.push('\n');
        self.orders
            .write_all(line.as_bytes())
            .expect("the writer takes orders");
    }

    /// The next report.
    #[track_caller]
    pub(crate) fn report(&self) -> Report {
        match self.reports.recv_timeout(PATIENCE) {
            Ok(report) => report,
            Err(error) => panic!("the writer does not report: {error}"),
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

    #[track_caller]
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.carry_out(&Order::Write {
            offset,
            bytes: bytes.to_vec(),
        });
    }

    /// Commits and waits for `acks` replicas; the epoch and whether it is a cut.
    #[track_caller]
    pub(crate) fn commit(&mut self, acks: usize) -> (u64, bool) {
        match self.order(&Order::Commit {
            acks,
            deadline_ms: 30_000,
        }) {
            Report::Epoch { number, cut } => (number, cut),
            other => panic!("no epoch: {other:?}"),
        }
    }

    /// The last step that a running writer reports within `time`; on a machine that lets it
    /// wait for longer, the first one after.
    #[track_caller]
    pub(crate) fn steps_within(&self, time: Duration) -> u64 {
        let begun = Instant::now();
        let mut last = None;
        loop {
            let time = last.map_or(PATIENCE, |_| time);
            let left = time.saturating_sub(begun.elapsed());
            match (self.reports.recv_timeout(left), last) {
                (Ok(Report::Stored { step }), _) => last = Some(step),
                (Ok(other), _) => panic!("unexpected report {other:?}"),
                (Err(RecvTimeoutError::Timeout), Some(last)) => return last,
                (Err(RecvTimeoutError::Timeout), None) => panic!("the writer stands still"),
                (Err(RecvTimeoutError::Disconnected), _) => panic!("the writer ended"),
            }
        }
    }

    /// Ends a run; the first step that is not stored.
    #[track_caller]
    pub(crate) fn stop_run(&mut self) -> u64 {
        self.send(&Order::Stop);
        loop {
            match self.report() {
                Report::Stored { .. } => {}
                Report::Stopped { next } => return next,
                other => panic!("unexpected report {other:?}"),
            }
        }
    }

    /// Kills it at once; the last step of a run that it reported, if any.
    pub(crate) fn kill(mut self) -> Option<u64> {
        self.end();
        let mut last = None;
        while let Ok(report) = self.reports.try_recv() {
            if let Report::Stored { step } = report {
                last = Some(step);
            }
        }
        last
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a living child");
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reading) = self.reading.take() {
            let _ = reading.join();
        }
    }
}

impl Drop for WriterProcess {
    fn drop(&mut self) {
        self.end();
    }
}

/// The writer's side: takes orders until its standard input ends.
pub(crate) fn serve_orders() {
    let (sender, orders) = channel();
    // Reading has a thread of its own, so that a run can be stopped.
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let order = serde_json::from_str(&line).expect("an order");
            if sender.send(order).is_err() {
                return;
            }
        }
    });
    let mut program = Program {
        orders,
        region: None,
        doer: Doer::default(),
    };
    while let Ok(order) = program.orders.recv() {
        let report = program
            .carry_out(order)
            .unwrap_or_else(|error| Report::Failed {
                error: format!("{error:?}"),
            });
        say(&report);
    }
}

pub(super) fn say(report: &Report) {
    let line = format!(
        "@{}\n",
        serde_json::to_string(report).expect("reports are plain")
    );
    let mut stdout = std::io::stdout().lock();
    // Nobody listens any more only when the test is over.
    let _ = stdout
        .write_all(line.as_bytes())
        .and_then(|()| stdout.flush());
}

pub(super) type Outcome = Result<Report, Box<dyn std::error::Error>>;

struct Program {
    orders: Receiver<Order>,
    region: Option<Writer>,
    doer: Doer,
}

impl Program {
    fn create(&mut self, order: &Order) -> Outcome {
        let Order::Create {
            socket,
            name,
            size,
            mode,
            publish,
            more,
        } = order
        else {
            return Err("no order to make a region".into());
        };
        let pause = more.rare.then_some(Duration::from_secs(60));
        let options = WriterOptions {
            mode: mode.parse()?,
            publish: publish.parse()?,
            dont_fork: !more.may_fork,
            mseal: more.mseal,
            exact: more.exact,
            marks: more.marks,
            kind: match more.cooperative {
                true => WriteKind::Cooperative,
                false => WriteKind::Exclusive,
            },
            interval_min: pause,
            interval_max: pause,
            ..WriterOptions::default()
        };
        let region = Writer::create(socket, name, *size, &options)?;
        let resumed = region.is_resumed();
        self.region = Some(region);
        Ok(Report::Created { resumed })
    }

    /// Makes, joins or leaves a region, if that is the order.
    fn change_region(&mut self, order: &Order) -> Option<Outcome> {
        match order {
            Order::Create { .. } => return Some(self.create(order)),
            Order::Attach { socket, name } => match Writer::attach(socket, name) {
                Ok(region) => self.region = Some(region),
                Err(error) => return Some(Err(error.into())),
            },
            Order::Detach => self.region = None,
            _ => return None,
        }
        Some(Ok(Report::Done))
    }

    fn carry_out(&mut self, order: Order) -> Outcome {
        if let Some(outcome) = self.change_region(&order) {
            return outcome;
        }
        if let Order::Do(deed) = &order {
            let text = self.doer.carry_out(self.region.as_ref(), deed)?;
            return Ok(Report::Did { text });
        }
        let region = self.region.as_ref().ok_or("no region yet")?;
        match order {
            Order::Share(share) => crew::work(region, &self.orders, &share),
            Order::Create { .. }
            | Order::Attach { .. }
            | Order::Detach
            | Order::Do(_)
            | Order::Stop => Ok(Report::Done),
            Order::Load { path } => {
                region.write(0, &std::fs::read(path)?)?;
                Ok(Report::Done)
            }
            Order::Write { offset, bytes } => {
                region.write(offset, &bytes)?;
                Ok(Report::Done)
            }
            Order::Fill { offset, len, byte } => {
                region.write(offset, &vec![byte; len as usize])?;
                Ok(Report::Done)
            }
            Order::Mark { offset, len } => {
                region.mark_region_changed(offset, len)?;
                Ok(Report::Done)
            }
            Order::Commit { acks, deadline_ms } => {
                let deadline = Duration::from_millis(deadline_ms);
                let epoch = region.commit(deadline)?;
                if acks > 0 {
                    epoch.wait_acked(acks, deadline)?;
                }
                let cut = epoch.kind == EpochKind::Cut;
                Ok(Report::Epoch {
                    number: epoch.number,
                    cut,
                })
            }
            Order::Dump { path } => {
                let mut bytes = vec![0; region.size() as usize];
                region.read(0, &mut bytes)?;
                std::fs::write(path, bytes)?;
                Ok(Report::Done)
            }
            Order::Run { seed, from } => run_pattern(region, &self.orders, seed, from),
            Order::Beat => beat(region, &self.orders),
            Order::Storm {
                seed,
                bulk_at,
                hot_pages,
                log,
            } => {
                let storm = Storm::over(region, seed, hot_pages)?;
                storm.rage(region, &self.orders, bulk_at, &log)
            }
            Order::Bank { threads, guarded } => bank(region, &self.orders, threads, guarded),
        }
    }
}

/// Whether another order is waiting, which ends what runs.
pub(super) fn is_told(orders: &Receiver<Order>) -> bool {
    !matches!(orders.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty))
}

fn run_pattern(region: &Writer, orders: &Receiver<Order>, seed: u64, from: u64) -> Outcome {
    let mut step = from;
    while !is_told(orders) {
        for store in pattern::step(seed, step, region.size()) {
            region.write(store.offset, &store.bytes)?;
        }
        say(&Report::Stored { step });
        step += 1;
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(Report::Stopped { next: step })
}

fn beat(region: &Writer, orders: &Receiver<Order>) -> Outcome {
    let pages = region.size() / PAGE as u64;
    let (mut stores, mut longest) = (0u64, Duration::ZERO);
    while !is_told(orders) {
        for _ in 0..64 {
            let offset = stores % pages * PAGE as u64;
            stores += 1;
            let started = Instant::now();
            region.write(offset, &stores.to_le_bytes())?;
            longest = longest.max(started.elapsed());
        }
    }
    Ok(Report::Beaten {
        stores,
        longest_us: longest.as_micros() as u64,
    })
}

/// Commits of few bytes in hot pages, with the content's sum at each epoch.
struct Storm {
    numbers: Numbers,
    hot_pages: u64,
    model: Vec<u8>,
    sums: Vec<u128>,
    total: u128,
}

impl Storm {
    fn over(
        region: &Writer,
        seed: u64,
        hot_pages: u64,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let mut model = vec![0; region.size() as usize];
        region.read(0, &mut model)?;
        let mut storm = Self {
            numbers: Numbers::new(seed),
            hot_pages,
            model,
            sums: Vec::new(),
            total: 0,
        };
        storm.sum_all();
        Ok(storm)
    }

    fn sum_all(&mut self) {
        let pages = self.model.chunks(PAGE).enumerate();
        self.sums = pages
            .map(|(page, bytes)| pattern::page_sum(page as u64, bytes))
            .collect();
        self.total = self
            .sums
            .iter()
            .fold(0, |total, sum| total.wrapping_add(*sum));
    }

    fn store(&mut self, region: &Writer, page: u64) -> Outcome {
        let len = 1 + self.numbers.below(200) as usize;
        let at = page as usize * PAGE + self.numbers.below((PAGE - len) as u64) as usize;
        let bytes = self.numbers.bytes(len);
        region.write(at as u64, &bytes)?;
        self.model[at..at + len].copy_from_slice(&bytes);
        let start = page as usize * PAGE;
        let sum = pattern::page_sum(page, &self.model[start..start + PAGE]);
        let old = std::mem::replace(&mut self.sums[page as usize], sum);
        self.total = self.total.wrapping_sub(old).wrapping_add(sum);
        Ok(Report::Done)
    }

    fn rage(
        mut self,
        region: &Writer,
        orders: &Receiver<Order>,
        bulk_at: u64,
        log: &Path,
    ) -> Outcome {
        let mut lines = String::new();
        let pages = self.model.len() as u64 / PAGE as u64;
        let mut next = Instant::now();
        let mut number = 0;
        while !is_told(orders) {
            number += 1;
            if number == bulk_at {
                self.model = self.numbers.bytes(self.model.len());
                region.write(0, &self.model)?;
                self.sum_all();
            }
            for _ in 0..3 {
                // Spread over the region, but few, so that they fit the pre-images.
                let page = self.numbers.below(self.hot_pages) * (pages / self.hot_pages);
                self.store(region, page)?;
            }
            let epoch = region.commit(Duration::from_secs(30))?;
            lines.push_str(&format!("{} {}\n", epoch.number, self.total));
            next += Duration::from_millis(1);
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        std::fs::write(log, lines)?;
        Ok(Report::Done)
    }
}

/// What every account begins with.
pub(crate) const AMOUNT: u64 = 1_000_000;

fn bank(region: &Writer, orders: &Receiver<Order>, threads: u64, guarded: bool) -> Outcome {
    let accounts = region.size() / PAGE as u64;
    for account in 0..accounts {
        region.write(account * PAGE as u64, &AMOUNT.to_le_bytes())?;
    }
    if guarded {
        region.commit(Duration::from_secs(30))?;
    }
    say(&Report::Done);
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let movers: Vec<_> = (0..threads)
            .map(|thread| {
                let stop = Arc::clone(&stop);
                scope.spawn(move || move_amounts(region, thread, threads, guarded, &stop))
            })
            .collect();
        while !is_told(orders) {
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::Relaxed);
        let (mut transactions, mut commits) = (0, 0);
        for mover in movers {
            let (moved, committed) = mover.join().map_err(|_| "a mover panicked")??;
            transactions += moved;
            commits += committed;
        }
        Ok(Report::Moved {
            transactions,
            commits,
        })
    })
}

/// Moves amounts between accounts that belong to this thread alone, from a low page to
/// a high one; with a guard around each move and a commit after some of them.
fn move_amounts(
    region: &Writer,
    thread: u64,
    threads: u64,
    guarded: bool,
    stop: &AtomicBool,
) -> Result<(u64, u64), String> {
    let accounts = region.size() / PAGE as u64;
    let own = accounts / threads;
    let mut numbers = Numbers::new(thread);
    let (mut moved, mut commits) = (0, 0);
    let text = |error: &dyn std::error::Error| format!("{error:?}");
    while !stop.load(Ordering::Relaxed) {
        let offset = |index: u64| (index * threads + thread) * PAGE as u64;
        let (from, to) = (
            offset(numbers.below(own / 2)),
            offset(own / 2 + numbers.below(own / 2)),
        );
        let guard = guarded
            .then(|| region.write_guard())
            .transpose()
            .map_err(|e| text(&e))?;
        let change = |at: u64, by: u64| -> Result<(), String> {
            let mut bytes = [0; 8];
            region.read(at, &mut bytes).map_err(|e| text(&e))?;
            let amount = u64::from_le_bytes(bytes).wrapping_add(by);
            region
                .write(at, &amount.to_le_bytes())
                .map_err(|e| text(&e))
        };
        let amount = 1 + numbers.below(100);
        change(from, amount.wrapping_neg())?;
        change(to, amount)?;
        drop(guard);
        moved += 1;
        if guarded && numbers.below(8) == 0 {
            region
                .commit(Duration::from_secs(30))
                .map_err(|e| text(&e))?;
            commits += 1;
        }
    }
    Ok((moved, commits))
}
