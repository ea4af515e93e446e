//! NBD over a Unix socket: the same `fio` job against `serve --nbd`, nbdkit's memory plugin
//! and `qemu-nbd` on a file in memory, one after the other in each round.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::harness::{Goal, Options, Outcome, Rounds, median};
use crate::servers::{Process, Servers};
use crate::work::{PATIENCE, SEGMENT, pattern};

pub(crate) const CASES: &[&str] = &[
    "nbd-read-4k",
    "nbd-write-4k",
    "nbd-read-4k-32",
    "nbd-write-4k-32",
    "nbd-read-4k-32/qemu-nbd",
    "nbd-write-4k-32/qemu-nbd",
];
const NBDKIT: &str = "nbdkit's memory plugin, same fio job";
const QEMU: &str = "qemu-nbd on a file in memory, same fio job";
/// The byte that is written.
const WRITTEN: u8 = 0x5a;
/// From this share of a processor on it is `fio` that is measured.
const SATURATED: f64 = 90.0;

/// One job.
#[derive(Clone, Copy)]
struct Job {
    case: &'static str,
    writes: bool,
    depth: u32,
}

const JOBS: [Job; 4] = [
    Job {
        case: CASES[0],
        writes: false,
        depth: 1,
    },
    Job {
        case: CASES[2],
        writes: false,
        depth: 32,
    },
    Job {
        case: CASES[1],
        writes: true,
        depth: 1,
    },
    Job {
        case: CASES[3],
        writes: true,
        depth: 32,
    },
];

/// What `fio` says of one run.
#[derive(Clone, Copy)]
struct Run {
    /// Operations per second.
    rate: f64,
    /// Mean time of one, in microseconds.
    time_us: f64,
    /// Of a processor, in percent.
    cpu: f64,
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn fio(options: &Options, job: Job, socket: &Path) -> anyhow::Result<Run> {
    let kind = if job.writes { "write" } else { "read" };
    let output = Command::new("fio")
        .args(["--name=job", "--ioengine=nbd", "--thread", "--bs=4k"])
        .arg(format!("--rw=rand{kind}"))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--size={SEGMENT}"))
        .args(["--time_based", "--output-format=json"])
        .arg(format!("--buffer_pattern={WRITTEN:#x}"))
        .arg(format!("--runtime={}", options.pick(1, 2)))
        .arg(format!("--uri={}", uri(socket)))
        .stdin(Stdio::null())
        .output()
        .context("running fio")?;
    ensure!(output.status.success(), "fio failed: {output:?}");
    // It says that it is connected first.
    let begin = output.stdout.iter().position(|byte| *byte == b'{');
    let report = &output.stdout[begin.context("a report of fio")?..];
    let said: serde_json::Value = serde_json::from_slice(report)?;
    let job = &said["jobs"][0];
    let number = |value: &serde_json::Value| value.as_f64().context("a number in fio's report");
    ensure!(job["error"] == 0, "fio met an error");
    Ok(Run {
        rate: number(&job[kind]["iops"])?,
        time_us: number(&job[kind]["lat_ns"]["mean"])? / 1000.0,
        cpu: number(&job["usr_cpu"])? + number(&job["sys_cpu"])?,
    })
}

/// A server of others on a socket of its own, with the pattern in it.
fn peer(mut command: Command, socket: &Path, image: &Path) -> anyhow::Result<Process> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let process = Process(child);
    let deadline = Instant::now() + PATIENCE;
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        ensure!(
            Instant::now() < deadline,
            "{} is not there",
            socket.display()
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let copied = Command::new("nbdcopy")
        .arg(image)
        .arg(uri(socket))
        .status()?;
    ensure!(copied.success(), "nbdcopy failed");
    Ok(process)
}

fn missing() -> Option<&'static str> {
    let tools = ["fio", "nbdcopy", "nbdkit", "qemu-nbd"];
    tools.into_iter().find(|tool| {
        let version = Command::new(tool).arg("--version").output();
        !version.is_ok_and(|output| output.status.success())
    })
}

/// Each block is as it was or as it was written to be.
fn verify(socket: &Path, folder: &Path) -> anyhow::Result<()> {
    let copy = folder.join("copy.raw");
    let copied = Command::new("nbdcopy")
        .arg(uri(socket))
        .arg(&copy)
        .status()?;
    ensure!(copied.success(), "nbdcopy failed");
    let found = fs::read(copy)?;
    let before = pattern(0, SEGMENT as usize);
    ensure!(found.len() == before.len(), "another size");
    for (at, (found, before)) in found.chunks(4096).zip(before.chunks(4096)).enumerate() {
        let written = found.iter().all(|byte| *byte == WRITTEN);
        ensure!(written || found == before, "block {at} has other bytes");
    }
    Ok(())
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    if let Some(tool) = missing() {
        let reason = format!("{tool} is not installed");
        let not_run = |case: &&'static str| Outcome::not_run(case, NBDKIT, reason.clone());
        return Ok(CASES.iter().map(not_run).collect());
    }
    let servers = Servers::start(1)?;
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let image = folder.path().join("image.raw");
    fs::write(&image, pattern(0, SEGMENT as usize))?;
    let sockets: [PathBuf; 3] = [
        servers.nbd_socket(),
        folder.path().join("nbdkit.sock"),
        folder.path().join("qemu.sock"),
    ];
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.arg("-f").arg("-U").arg(&sockets[1]);
    nbdkit.arg("memory").arg(SEGMENT.to_string());
    let _nbdkit = peer(nbdkit, &sockets[1], &image)?;
    let file = folder.path().join("qemu.raw");
    fs::copy(&image, &file)?;
    let mut qemu = Command::new("qemu-nbd");
    qemu.args(["-t", "-e", "8", "-f", "raw", "-x", "", "-k"]);
    let _qemu = peer(
        {
            qemu.arg(&sockets[2]).arg(&file);
            qemu
        },
        &sockets[2],
        &image,
    )?;
    let mut outcomes = Vec::new();
    for job in JOBS {
        if options.wants(job.case) {
            outcomes.extend(measure(options, job, &sockets)?);
        }
    }
    verify(&sockets[0], folder.path())?;
    Ok(outcomes)
}

fn measure(options: &Options, job: Job, sockets: &[PathBuf; 3]) -> anyhow::Result<Vec<Outcome>> {
    let deep = job.depth > 1;
    let variants = if deep { 3 } else { 2 };
    let mut cpus = Vec::new();
    let rounds = Rounds::run(options, variants, |variant, _| {
        let run = fio(options, job, &sockets[variant])?;
        if variant == 0 {
            cpus.push(run.cpu);
        }
        Ok(if deep { run.rate } else { run.time_us })
    })?;
    let (ours, theirs) = (rounds.of(0), (NBDKIT, rounds.of(1)));
    if !deep {
        let outcome = Outcome::times(job.case, "us", ours, theirs);
        return Ok(vec![outcome.goal(Goal::AtMost(1.1))]);
    }
    let cpu = median(&cpus);
    let outcome = Outcome::times(job.case, "/s", ours, theirs);
    let outcome = outcome.note(format!("fio used {cpu:.0} % of a processor"));
    let outcome = if cpu >= SATURATED && outcome.ratio < 1.0 {
        outcome.note("so it is fio that is measured, and there is no goal")
    } else {
        outcome.goal(Goal::AtLeast(1.0))
    };
    let case = CASES
        .iter()
        .find(|case| case.starts_with(job.case) && case.ends_with("qemu-nbd"));
    let qemu = case.map(|case| Outcome::times(case, "/s", ours, (QEMU, rounds.of(2))));
    Ok([outcome].into_iter().chain(qemu).collect())
}
