//! Without privileges, without some system calls, not to be inspected: what works goes
//! on, what does not says why, and mode `auto` picks what is left.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::libc::{self, ENOSYS, EPERM};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use uffd_sync::units::MIB;
use uffd_sync::words::{Mode, Publish};

use super::deeds::{Deed, Way, pages};
use super::nodes::{BINARY, NodeProcess, await_content, await_some, folder};
use super::pattern::Numbers;
use super::writer::{More, Report, WriterProcess};

/// Set in the environment of a process that becomes the command without some calls.
pub(crate) const ROLE: &str = "UFFD_SYNC_IT_FORBIDDEN";

/// An ordinary user without a home, processes or files.
const NOBODY: u32 = 65_534;
const REGION: &str = "region";

/// What such a process is told.
#[derive(Serialize, Deserialize)]
struct Forbidden {
    calls: Vec<i64>,
    errno: i32,
    program: PathBuf,
    arguments: Vec<String>,
}

/// Takes the calls away and becomes the command.
pub(crate) fn become_command(order: &OsStr) {
    let order: Forbidden = serde_json::from_str(order.to_str().expect("text")).expect("an order");
    unruly::forbid(&order.calls, order.errno).expect("a filter");
    let mut command = Command::new(order.program);
    let error = command.args(order.arguments).env_remove(ROLE).exec();
    panic!("the command does not start: {error}");
}

/// A command that runs ours without `calls`.
fn forbidden(calls: &[i64], errno: i32, arguments: &[&str]) -> Command {
    let order = Forbidden {
        calls: calls.to_vec(),
        errno,
        program: BINARY.into(),
        arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
    };
    let mut command = Command::new(std::env::current_exe().expect("the path of this program"));
    command
        .args([
            "--exact",
            "forbidden_process",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(
            ROLE,
            serde_json::to_string(&order).expect("an order is plain"),
        );
    command
}

/// Says that a test cannot run here, or fails where it has to.
#[track_caller]
pub(crate) fn skip(reason: &str) {
    let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|value| value == "1");
    assert!(!required, "{reason}");
    let _ = writeln!(std::io::stderr(), "SKIP {reason}");
}

fn is_root() -> bool {
    uffd_sync::sys::process::effective_uid() == 0
}

/// A folder that everybody may look into, with a copy of `program` in it.
fn open_folder(program: &Path) -> (TempDir, PathBuf) {
    let folder = folder();
    let copy = folder.path().join("program");
    super::nodes::copy_program(program, &copy);
    for path in [folder.path(), &copy] {
        let everybody = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(path, everybody).expect("our own");
    }
    (folder, copy)
}

/// A command that runs `program` as [`NOBODY`], or as the ordinary user that this is.
fn as_nobody(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/").env_remove("XDG_RUNTIME_DIR");
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

/// A node of this user, and a writer without privileges that may speak to it.
struct Unprivileged {
    node: NodeProcess,
    writer: WriterProcess,
    model: Vec<u8>,
    folder: TempDir,
}

impl Unprivileged {
    fn new() -> Self {
        let (folder, copy) = open_folder(&std::env::current_exe().expect("this program"));
        let node = NodeProcess::source(folder.path(), "node");
        let all = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(node.socket(), all).expect("our socket");
        Self {
            node,
            writer: WriterProcess::start_by(as_nobody(&copy)),
            model: vec![0; MIB as usize],
            folder,
        }
    }

    fn create(&mut self, mode: Mode, publish: Publish, more: More) -> Report {
        self.writer
            .try_create(self.node.socket(), REGION, MIB, mode, publish, more)
    }

    #[track_caller]
    fn expect_refused(&mut self, mode: Mode, more: More, named: &str) {
        match self.create(mode, Publish::Timer, more) {
            Report::Failed { error } => assert!(error.contains(named), "{named}: {error}"),
            other => panic!("not refused: {other:?}"),
        }
    }

    /// What is stored and what the kernel writes is followed, in `mode`.
    #[track_caller]
    fn expect_followed(&mut self, mode: Mode) {
        let follow = [format!("tcp://{}/{REGION}", self.node.listen())];
        let follower = NodeProcess::follower(self.folder.path(), "follower", &follow);
        for round in 0..3u8 {
            let at = pages(u64::from(round) * 20) as usize + 4_000;
            let bytes = [round + 1; 500];
            self.writer.write(at as u64, &bytes);
            self.model[at..at + 500].copy_from_slice(&bytes);
            self.mark(mode, at as u64, 500);
            let path = self.folder.path().join(format!("taken-{round}"));
            let bytes = Numbers::new(round.into()).bytes(5_000);
            std::fs::write(&path, &bytes).expect("a file");
            let offset = pages(200);
            let way = Way::Read;
            let took = self.writer.deed(Deed::Take { way, offset, path });
            took.expect("the kernel writes");
            self.model[offset as usize..offset as usize + 5_000].copy_from_slice(&bytes);
            self.mark(mode, offset, 5_000);
            await_content(&follower, REGION, &self.model);
        }
        let region = self.node.region(REGION).expect("it is there");
        assert_eq!(region.tracking, Some(mode));
        assert_eq!(region.losses, []);
    }

    fn mark(&mut self, mode: Mode, offset: u64, len: u64) {
        if mode == Mode::Manual {
            let mark = super::writer::Order::Mark { offset, len };
            self.writer.carry_out(&mark);
        }
    }

    /// Why the node says that the mode was picked.
    fn chosen(&self) -> String {
        let region = self.node.region(REGION).expect("it is there");
        region.chosen.expect("auto says why")
    }
}

const CREATED: Report = Report::Created { resumed: false };

#[test]
fn an_unprivileged_writer_is_tracked_by_a_privileged_engine() {
    for mode in [Mode::Async, Mode::Auto] {
        let mut scene = Unprivileged::new();
        assert_eq!(scene.create(mode, Publish::Timer, More::default()), CREATED);
        scene.expect_followed(Mode::Async);
        if mode == Mode::Auto {
            assert!(scene.chosen().contains("lowest cost"), "{}", scene.chosen());
            scene.node.await_log("mode picked by auto");
        }
    }
}

/// Whether an ordinary user's userfaultfd tells of faults of the kernel.
fn everybody_handles_faults_of_the_kernel() -> bool {
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let device = std::fs::metadata("/dev/userfaultfd").map(|it| it.permissions().mode());
    sysctl.is_ok_and(|value| value.trim() == "1") || device.is_ok_and(|mode| mode & 0o6 == 0o6)
}

#[test]
fn an_unprivileged_writer_makes_cuts_with_a_privileged_engine() {
    let mut scene = Unprivileged::new();
    let created = scene.create(Mode::Sync, Publish::Timer, More::default());
    assert_eq!(created, CREATED);
    let follow = [format!("tcp://{}/{REGION}", scene.node.listen())];
    let follower = NodeProcess::follower(scene.folder.path(), "follower", &follow);
    for round in 0..3u64 {
        let at = pages(20 * round) + 4_000;
        scene.writer.write(at, &[round as u8 + 1; 500]);
        let at = at as usize;
        scene.model[at..at + 500].fill(round as u8 + 1);
        await_content(&follower, REGION, &scene.model);
        // What the kernel stores into a page that is armed cannot wait for an answer.
        let path = scene.folder.path().join(format!("taken-{round}"));
        std::fs::write(&path, [0xAB; 300]).expect("a file");
        let (way, offset) = (Way::Read, pages(200 + round));
        let took = scene.writer.deed(Deed::Take { way, offset, path });
        if everybody_handles_faults_of_the_kernel() {
            took.expect("the kernel writes");
            scene.model[offset as usize..offset as usize + 300].fill(0xAB);
        } else {
            let refused = took.expect_err("it cannot wait");
            assert!(refused.contains("Bad address"), "{refused}");
        }
        await_content(&follower, REGION, &scene.model);
        scene.node.connect().cut(REGION).expect("a cut");
    }
    let region = scene.node.region(REGION).expect("it is there");
    assert!(region.cut, "{region:?}");
    assert_eq!((region.tracking, region.losses), (Some(Mode::Sync), vec![]));
}

#[test]
fn a_privileged_writer_and_an_unprivileged_engine() {
    if !is_root() {
        skip("only root can have an engine of another user");
        return;
    }
    for mode in [Mode::Async, Mode::Sync] {
        a_privileged_writer_is_followed(mode);
    }
}

fn a_privileged_writer_is_followed(mode: Mode) {
    let (folder, copy) = open_folder(Path::new(BINARY));
    let place = folder.path().join("nobody");
    std::fs::create_dir(&place).expect("a folder");
    nix::unistd::chown(&place, Some(NOBODY.into()), Some(NOBODY.into())).expect("root may");
    let socket = place.join("node.sock");
    let mut command = as_nobody(&copy);
    let path = socket.to_str().expect("a path in ASCII");
    command.args([
        "serve",
        "--name",
        "node",
        "--listen",
        "127.0.0.1:0",
        "--socket",
        path,
    ]);
    let node = NodeProcess::start_by(command, "node", socket);
    let mut writer = WriterProcess::start();
    let socket = node.socket().to_owned();
    let (timer, more) = (Publish::Timer, More::default());
    let created = writer.try_create(&socket, REGION, MIB, mode, timer, more);
    assert_eq!(created, CREATED);
    let mut model = vec![0; MIB as usize];
    writer.write(5_000, b"by a privileged writer");
    model[5_000..5_022].copy_from_slice(b"by a privileged writer");
    let follow = [format!("tcp://{}/{REGION}", node.listen())];
    let follower = NodeProcess::follower(folder.path(), "follower", &follow);
    await_content(&follower, REGION, &model);
    writer.write(90_000, b"again");
    model[90_000..90_005].copy_from_slice(b"again");
    await_content(&follower, REGION, &model);
    let region = node.region(REGION).expect("it is there");
    assert_eq!((region.tracking, region.losses), (Some(mode), vec![]));
}

#[test]
fn without_userfaultfd_async_is_refused_with_its_remedy_and_auto_compares() {
    // Refused as by a container's filter, and as by a kernel that has none.
    for (errno, named) in [(EPERM, "seccomp"), (ENOSYS, "CONFIG_USERFAULTFD")] {
        let mut scene = Unprivileged::new();
        let calls = vec![libc::SYS_userfaultfd];
        let forbid = Deed::Forbid { calls, errno };
        scene.writer.deed(forbid).expect("a filter");
        scene.expect_refused(Mode::Async, More::default(), named);
        let exact = More {
            exact: true,
            ..More::default()
        };
        scene.expect_refused(Mode::Auto, exact, "Unmet");
        assert!(scene.node.status().regions.is_empty(), "nothing was left");
        let created = scene.create(Mode::Auto, Publish::Timer, More::default());
        assert_eq!(created, CREATED);
        assert!(scene.chosen().contains(named), "{}", scene.chosen());
        scene.expect_followed(Mode::Compare);
    }
}

#[test]
fn without_userfaultfd_a_program_that_marks_gets_manual() {
    let mut scene = Unprivileged::new();
    let calls = vec![libc::SYS_userfaultfd];
    let forbid = Deed::Forbid {
        calls,
        errno: EPERM,
    };
    scene.writer.deed(forbid).expect("a filter");
    let marks = More {
        marks: true,
        ..More::default()
    };
    assert_eq!(scene.create(Mode::Auto, Publish::Timer, marks), CREATED);
    assert!(scene.chosen().contains("marks"), "{}", scene.chosen());
    scene.expect_followed(Mode::Manual);
}

#[test]
fn a_process_that_may_not_be_inspected_says_so() {
    let mut scene = Unprivileged::new();
    scene.writer.deed(Deed::HideMemory).expect("prctl");
    scene.expect_refused(Mode::Async, More::default(), "PR_SET_DUMPABLE");
    let created = scene.create(Mode::Auto, Publish::Timer, More::default());
    assert_eq!(created, CREATED);
    assert!(scene.chosen().contains("pagemap"), "{}", scene.chosen());
    scene.expect_followed(Mode::Compare);
}

#[test]
fn a_writer_without_descriptors_fails_and_nothing_is_left() {
    let mut scene = Unprivileged::new();
    for spare in [0, 1, 3, 5] {
        let limit = Deed::LimitFiles { spare };
        if spare > 0 {
            // The hard limit only goes down: each needs a process of its own.
            let program = scene.folder.path().join("program");
            scene.writer = WriterProcess::start_by(as_nobody(&program));
        }
        scene.writer.deed(limit).expect("a lower limit");
        scene.expect_refused(Mode::Async, More::default(), "Too many open files");
        assert!(scene.node.status().regions.is_empty(), "{spare} to spare");
    }
    assert!(scene.node.is_alive());
}

#[test]
fn what_the_node_holds_needs_no_mode_and_doctor_tells_what_auto_picks() {
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let made = super::nodes::run_on(&node, "region create held --size 4KiB --mode auto", b"");
    assert_eq!(made.code, Some(0), "{made:?}");
    assert!(made.text().contains("no mode is needed"), "{made:?}");
    let shown = super::nodes::run_on(&node, "region show held --json", b"").json();
    assert!(
        shown["chosen"].is_string() && shown["mode"].is_null(),
        "{shown}"
    );
    node.await_log("page-map scans tried");
    let doctor = super::nodes::run(&["doctor", "--json"], b"").json();
    let choices = doctor["auto"].as_array().expect("choices");
    assert_eq!(choices.len(), 4, "{doctor}");
    let scans = doctor["features"].as_array().expect("features");
    let scans = scans.iter().filter_map(|feature| feature["name"].as_str());
    assert!(scans.filter(|name| name.starts_with("scan-")).count() >= 8);
    for choice in choices {
        let waits = choice["exact"] == true && choice["publish"] == "timer";
        let mode = if waits { "sync" } else { "async" };
        assert_eq!(choice["mode"], mode, "{choice}");
        assert!(
            !choice["reason"].as_str().unwrap_or("").is_empty(),
            "{choice}"
        );
    }
}

#[test]
fn without_io_uring_a_node_says_what_to_do() {
    let folder = folder();
    let socket = folder.path().join("node.sock");
    let socket = socket.to_str().expect("a path in ASCII");
    let calls = [libc::SYS_io_uring_setup];
    for arguments in [&["serve", "--socket", socket][..], &["doctor"]] {
        let output = forbidden(&calls, EPERM, arguments)
            .output()
            .expect("it runs");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert_eq!(output.status.code(), Some(3), "{arguments:?}: {text}");
        assert!(text.contains("io_uring_disabled"), "{arguments:?}: {text}");
    }
}

#[test]
fn a_node_without_userfaultfd_tracks_writers_that_have_it() {
    let folder = folder();
    let socket = folder.path().join("node.sock");
    let path = socket.to_str().expect("a path in ASCII");
    let arguments = [
        "serve",
        "--name",
        "node",
        "--listen",
        "127.0.0.1:0",
        "--socket",
        path,
    ];
    let command = forbidden(&[libc::SYS_userfaultfd], ENOSYS, &arguments);
    let node = NodeProcess::start_by(command, "node", socket.clone());
    node.await_log("not tried: userfaultfd failed");
    let mut writer =
        WriterProcess::with_region(node.socket(), REGION, MIB, Mode::Async, Publish::Timer);
    let follow = [format!("tcp://{}/{REGION}", node.listen())];
    let follower = NodeProcess::follower(folder.path(), "follower", &follow);
    writer.write(70_000, b"tracked all the same");
    let mut model = vec![0; MIB as usize];
    model[70_000..70_020].copy_from_slice(b"tracked all the same");
    await_content(&follower, REGION, &model);
    let tracking = await_some("its state", || node.region(REGION)).tracking;
    assert_eq!(tracking, Some(Mode::Async));
}
