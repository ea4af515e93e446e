//! Cooperative regions with real processes: several write one region, come, go and die.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use uffd_sync::client::{Reader, Writer};
use uffd_sync::units::MIB;
use uffd_sync::wire::control::Terms;
use uffd_sync::words::{EpochKind, LossKind, Mode, Publish, WriteKind};

use super::crew::{Chains, Share};
use super::exact::may_be_exact;
use super::nodes::{
    NodeProcess, PATIENCE, await_content, await_following, await_that, folder, long, run_on,
};
use super::pattern::{Numbers, PAGE};
use super::writer::{AMOUNT, More, Order, Report, WriterProcess};

pub(crate) const REGION: &str = "shared";

/// A node with a cooperative region, a follower, and processes that write it.
pub(crate) struct Crew {
    pub(crate) writers: Vec<WriterProcess>,
    follower: NodeProcess,
    pub(crate) source: NodeProcess,
    folder: tempfile::TempDir,
}

impl Crew {
    #[track_caller]
    pub(crate) fn new(size: u64, mode: Mode, publish: Publish, writers: usize) -> Self {
        let folder = folder();
        let source = NodeProcess::source(folder.path(), "source");
        let mut node = source.connect();
        node.create_cooperative(REGION, size, true, terms(mode, publish))
            .expect("a cooperative region");
        let follow = [format!("tcp://{}/{REGION}", source.listen())];
        let follower = NodeProcess::follower(folder.path(), "follower", &follow);
        let mut crew = Self {
            writers: Vec::new(),
            follower,
            source,
            folder,
        };
        for _ in 0..writers {
            crew.join();
        }
        await_following(&crew.follower, REGION);
        crew
    }

    #[track_caller]
    fn join(&mut self) -> &mut WriterProcess {
        let writer = attached(self.source.socket());
        self.writers.push(writer);
        self.writers.last_mut().expect("one was pushed")
    }

    fn share_all(&mut self, share: impl Fn(u64) -> Share) {
        for (number, writer) in self.writers.iter_mut().enumerate() {
            writer.send(&Order::Share(share(number as u64)));
        }
    }

    /// What the first writer's memory holds.
    #[track_caller]
    fn content(&mut self) -> Vec<u8> {
        let path = self.folder.path().join("dump");
        self.writers[0].carry_out(&Order::Dump { path: path.clone() });
        std::fs::read(path).expect("the dump")
    }

    /// Waits until the replica holds what the first writer's memory does.
    #[track_caller]
    pub(crate) fn await_equal(&mut self) {
        let content = self.content();
        await_content(&self.follower, REGION, &content);
    }

    /// Kills the node of the writers, and starts another one there after `meanwhile`.
    #[track_caller]
    fn kill_source(&mut self, meanwhile: impl FnOnce()) {
        let folder = self.folder.path();
        // Something has to stand in its place meanwhile.
        let other = NodeProcess::source(folder, "other");
        std::mem::replace(&mut self.source, other).kill();
        meanwhile();
        self.source = NodeProcess::source(folder, "source");
    }

    pub(crate) fn attachments(&self) -> Vec<(u32, i32, String)> {
        let region = self.source.region(REGION).expect("it is there");
        let all = region.attachments.into_iter();
        all.map(|it| (it.slot, it.pid, it.state)).collect()
    }
}

pub(crate) fn terms(mode: Mode, publish: Publish) -> Terms {
    Terms {
        mode,
        publish,
        interval_min_us: None,
        interval_max_us: None,
    }
}

/// A process that has attached; it runs when nobody else wants to, or a small machine
/// would make few cuts.
#[track_caller]
pub(crate) fn attached(socket: &Path) -> WriterProcess {
    let mut command = Command::new("nice");
    let own = std::env::current_exe().expect("the path of this program");
    command.args(["-n", "10"]).arg(own);
    let mut writer = WriterProcess::start_by(command);
    writer.carry_out(&Order::Attach {
        socket: socket.to_owned(),
        name: REGION.to_owned(),
    });
    writer
}

#[track_caller]
fn stores_of(report: Report) -> u64 {
    match report {
        Report::Beaten { stores, .. } => stores,
        other => panic!("not the end of a share: {other:?}"),
    }
}

fn writers_come_go_and_die(mode: Mode) {
    let mut crew = Crew::new(MIB, mode, Publish::Timer, 3);
    let mut model = vec![0; MIB as usize];
    let mut store = |writer: &mut WriterProcess, offset: usize, byte: u8, len: usize| {
        writer.write(offset as u64, &vec![byte; len]);
        let (offset_u64, len_u64) = (offset as u64, len as u64);
        writer.carry_out(&Order::Mark {
            offset: offset_u64,
            len: len_u64,
        });
        model[offset..offset + len].fill(byte);
        model.clone()
    };
    let mut expected = Vec::new();
    for number in 0..3 {
        // Each has pages of its own, and all share one.
        let writer = &mut crew.writers[number];
        store(writer, number * 70_000, number as u8 + 1, 60_000);
        expected = store(writer, 900_000 + number, number as u8 + 11, 1);
    }
    await_content(&crew.follower, REGION, &expected);
    let status = crew.source.region(REGION).expect("it is there");
    assert_eq!(status.kind, Some(WriteKind::Cooperative));
    let pids: Vec<i32> = crew.writers.iter().map(|it| it.pid() as i32).collect();
    let seen: Vec<i32> = status.attachments.iter().map(|it| it.pid).collect();
    assert_eq!(seen, pids);
    assert!(status.attachments.iter().all(|it| it.mode == mode));

    // One lets it go, one is killed at once after a store; the third goes on.
    crew.writers[1].carry_out(&Order::Detach);
    store(&mut crew.writers[2], 500_000, 77, 3);
    crew.writers[2].signal(Signal::SIGKILL);
    await_that("both are gone", || crew.attachments().len() == 1);
    expected = store(&mut crew.writers[0], 600_000, 78, 30_000);
    await_content(&crew.follower, REGION, &expected);

    // A fourth comes, and the first goes, who came first.
    crew.join();
    crew.writers[0].signal(Signal::SIGKILL);
    await_that("the first is gone", || crew.attachments().len() == 1);
    expected = store(&mut crew.writers[3], 0, 79, 100);
    await_content(&crew.follower, REGION, &expected);

    let generation = crew.source.region(REGION).expect("it is there").generation;
    crew.writers[3].write(4_242, b"the last");
    crew.writers[3].signal(Signal::SIGKILL);
    expected[4_242..4_250].copy_from_slice(b"the last");
    await_content(&crew.follower, REGION, &expected);
    await_that("nobody writes it", || {
        let region = crew.source.region(REGION).expect("it is there");
        region.state == "unattended" && region.attachments.is_empty()
    });
    // Its memory is there still, and the next one goes on with it.
    crew.writers.clear();
    crew.join();
    assert_eq!(crew.content(), expected);
    crew.writers[0].write(4_242, b"the next");
    crew.writers[0].carry_out(&Order::Mark {
        offset: 4_242,
        len: 8,
    });
    expected[4_242..4_250].copy_from_slice(b"the next");
    await_content(&crew.follower, REGION, &expected);
    let region = crew.source.region(REGION).expect("it is there");
    assert_eq!(region.generation, generation, "it is the same life");
    assert_eq!(region.tracking, Some(mode), "{region:?}");
}

#[test]
fn writers_come_go_and_die_in_mode_async() {
    writers_come_go_and_die(Mode::Async);
}

#[test]
fn writers_come_go_and_die_in_mode_sync() {
    if may_be_exact() {
        writers_come_go_and_die(Mode::Sync);
    }
}

#[test]
fn writers_come_go_and_die_in_mode_manual() {
    writers_come_go_and_die(Mode::Manual);
}

/// Reads cuts at the replica until `wanted` were seen; each holds a prefix of all chains.
/// `meanwhile` is called after each with its number.
#[track_caller]
fn check_cuts(reader: &Reader, chains: &mut Chains, wanted: u64, mut meanwhile: impl FnMut(u64)) {
    let deadline = Instant::now() + PATIENCE * if long() { 14 } else { 2 };
    let (mut seen, mut after) = (0, 0);
    while seen < wanted {
        assert!(Instant::now() < deadline, "only {seen} cuts were seen");
        let _ = reader.wait_epoch(after, Duration::from_millis(200));
        let Ok((content, epoch)) = reader.read_at_epoch(|view| view.to_vec()) else {
            continue;
        };
        if epoch.number == after {
            continue;
        }
        after = epoch.number;
        if epoch.kind == EpochKind::Cut {
            seen += 1;
            assert!(chains.is_whole(&content), "cut {after} is torn");
            meanwhile(seen);
        }
    }
}

fn no_cut_is_torn_over(processes: usize) {
    if !may_be_exact() {
        return;
    }
    const PAGES: u64 = 128;
    let size = PAGES * PAGE as u64;
    let mut crew = Crew::new(size, Mode::Sync, Publish::Timer, processes);
    let all = processes as u64;
    crew.share_all(|number| Share::Chains {
        number,
        all,
        pages: PAGES,
    });
    let reader = Reader::attach(crew.follower.socket(), REGION).expect("a reader");
    let mut chains = Chains::new(PAGES);
    let wanted = if long() { 10_000 } else { 150 };
    check_cuts(&reader, &mut chains, wanted, |_| {});
    for writer in &mut crew.writers {
        assert!(stores_of(writer.order(&Order::Stop)) > 0);
    }
    let (relay, least) = chains.last(processes);
    assert!(relay > all && least > 0, "they stand: {relay}, {least}");
    let exact = crew.source.region(REGION).and_then(|it| it.exact);
    assert_eq!(exact.expect("figures").voided, 0);
    crew.await_equal();
}

#[test]
fn no_cut_is_torn_over_two_processes() {
    no_cut_is_torn_over(2);
}

#[test]
fn no_cut_is_torn_over_eight_processes() {
    no_cut_is_torn_over(8);
}

#[test]
fn processes_join_in_the_middle_of_cuts_and_are_killed_at_random() {
    if !may_be_exact() {
        return;
    }
    const PAGES: u64 = 96;
    let mut crew = Crew::new(PAGES * PAGE as u64, Mode::Sync, Publish::Timer, 1);
    let chain = |number| {
        Order::Share(Share::MapStorm {
            number,
            pages: PAGES,
        })
    };
    crew.writers[0].send(&chain(0));
    let reader = Reader::attach(crew.follower.socket(), REGION).expect("a reader");
    let mut chains = Chains::new(PAGES);
    let mut numbers = Numbers::new(7);
    // A chain goes on where a killed one of its number stood.
    let mut others: Vec<Option<WriterProcess>> = (0..4).map(|_| None).collect();
    let socket = crew.source.socket().to_owned();
    let wanted = if long() { 2_000 } else { 120 };
    check_cuts(&reader, &mut chains, wanted, |seen| {
        if seen % 6 != 0 {
            return;
        }
        let at = numbers.below(4) as usize;
        match others[at].take() {
            Some(writer) => {
                let _ = writer.kill();
            }
            None => {
                let mut writer = attached(&socket);
                writer.send(&chain(at as u64 + 1));
                others[at] = Some(writer);
            }
        }
    });
    drop(others);
    assert!(stores_of(crew.writers[0].order(&Order::Stop)) > 0);
    await_that("the others are gone", || crew.attachments().len() == 1);
    crew.await_equal();
    let region = crew.source.region(REGION).expect("it is there");
    assert_eq!(region.tracking, Some(Mode::Sync), "{region:?}");
}

#[test]
fn no_store_of_eight_threads_in_several_processes_is_lost() {
    let mut crew = Crew::new(MIB, Mode::Async, Publish::Timer, 4);
    crew.share_all(|number| Share::Count { number, threads: 2 });
    let captures = |crew: &Crew| crew.source.region(REGION).expect("it is there").captures;
    let enough = captures(&crew) + if long() { 300 } else { 60 };
    await_that("captures go on", || captures(&crew) >= enough);
    for writer in &mut crew.writers {
        assert!(stores_of(writer.order(&Order::Stop)) > 0);
    }
    crew.await_equal();
    let region = crew.source.region(REGION).expect("it is there");
    assert_eq!(region.losses, [], "everything was found by scans");
}

#[test]
fn transactions_over_processes_are_never_seen_torn() {
    const ACCOUNTS: u64 = 240;
    let size = ACCOUNTS * PAGE as u64;
    let mut crew = Crew::new(size, Mode::Async, Publish::Commit, 3);
    for number in 0..3 {
        let fill = number == 0;
        let share = Share::Bank {
            number: number as u64,
            all: 3,
            fill,
        };
        crew.writers[number].send(&Order::Share(share));
        assert_eq!(crew.writers[number].report(), Report::Done);
    }
    let reader = Reader::attach(crew.follower.socket(), REGION).expect("a reader");
    let deadline = Instant::now() + 2 * PATIENCE;
    let (mut cuts, mut after) = (0, 0);
    let wanted = if long() { 10_000 } else { 500 };
    while cuts < wanted {
        assert!(Instant::now() < deadline, "only {cuts} cuts were seen");
        let _ = reader.wait_epoch(after, Duration::from_millis(200));
        let Some((sum, number, kind)) = balance(&reader, ACCOUNTS) else {
            continue;
        };
        if number != after && kind == EpochKind::Cut && sum != 0 {
            assert_eq!(sum, ACCOUNTS * AMOUNT, "epoch {number} tears a transaction");
            cuts += 1;
        }
        after = number;
    }
    for writer in &mut crew.writers {
        match writer.order(&Order::Stop) {
            Report::Moved { commits, .. } => assert!(commits > 0),
            other => panic!("unexpected report {other:?}"),
        }
    }
}

fn balance(reader: &Reader, accounts: u64) -> Option<(u64, u64, EpochKind)> {
    let sum = reader.read_at_epoch(|view| {
        (0..accounts).fold(0u64, |sum, account| {
            let amount = view.load::<u64>(account * PAGE as u64);
            sum.wrapping_add(amount.expect("accounts lie inside"))
        })
    });
    let (sum, epoch) = sum.ok()?;
    Some((sum, epoch.number, epoch.kind))
}

#[test]
fn the_guard_of_a_killed_process_holds_nobody_up() {
    let mut crew = Crew::new(MIB, Mode::Async, Publish::Commit, 3);
    let (_, cut) = crew.writers[0].commit(0);
    assert!(cut);
    for round in 0..4u8 {
        let mut dying = attached(crew.source.socket());
        let offset = 5_000 + u64::from(round);
        dying.carry_out(&Order::Share(Share::Hold { offset, byte: 9 }));
        // Others commit meanwhile: it is waited for, and after half of the time no more.
        let commit = Order::Commit {
            acks: 0,
            deadline_ms: 60_000,
        };
        crew.writers[1].send(&commit);
        await_that("a commit waits", || {
            crew.source
                .region(REGION)
                .is_some_and(|it| it.attachments.len() == 4)
        });
        let killed = Instant::now();
        let _ = dying.kill();
        let report = crew.writers[1].report();
        assert!(killed.elapsed() < Duration::from_secs(20), "{report:?}");
        let Report::Epoch { cut, .. } = report else {
            panic!("no epoch: {report:?}");
        };
        assert!(!cut, "what the dead one began may be half done");
        // Guards and commits take turns as before.
        let (_, cut) = crew.writers[2].commit(0);
        assert!(cut, "round {round}");
        let holds = Share::Hold { offset: 1, byte: 1 };
        crew.writers[0].carry_out(&Order::Share(holds));
        assert_eq!(crew.writers[0].order(&Order::Stop), Report::Done);
    }
    await_that("they are gone", || crew.attachments().len() == 3);
}

#[test]
fn a_killed_engine_lets_all_writers_go_on_and_they_come_back() {
    if !may_be_exact() {
        return;
    }
    const PAGES: u64 = 128;
    let mut crew = Crew::new(PAGES * PAGE as u64, Mode::Sync, Publish::Timer, 3);
    let mut before = crew.attachments();
    before.sort_unstable();
    crew.share_all(|number| Share::Chains {
        number,
        all: 3,
        pages: PAGES,
    });
    for round in 0..2 {
        await_that("cuts are made", || {
            let exact = crew.source.region(REGION).and_then(|it| it.exact);
            exact.is_some_and(|it| it.cuts > 5)
        });
        crew.kill_source(|| {});
        await_that("all come back", || {
            let mut now = match crew.source.region(REGION) {
                Some(_) => crew.attachments(),
                None => Vec::new(),
            };
            now.sort_unstable();
            now == before
        });
        // Once all are there and everything was compared, epochs are cuts again.
        let follow = [format!("tcp://{}/{REGION}", crew.source.listen())];
        let name = format!("follower-{round}");
        crew.follower = NodeProcess::follower(crew.folder.path(), &name, &follow);
        await_following(&crew.follower, REGION);
        let reader = Reader::attach(crew.follower.socket(), REGION).expect("a reader");
        check_cuts(&reader, &mut Chains::new(PAGES), 20, |_| {});
    }
    for writer in &mut crew.writers {
        let report = writer.order(&Order::Stop);
        let Report::Beaten { longest_us, .. } = report else {
            panic!("{report:?}");
        };
        assert!(longest_us < 10_000_000, "a store waited {longest_us} us");
    }
    crew.await_equal();
}

#[test]
fn a_process_that_dies_with_the_engine_is_not_waited_for() {
    let mut crew = Crew::new(MIB, Mode::Async, Publish::Commit, 2);
    let mut dying = attached(crew.source.socket());
    dying.carry_out(&Order::Share(Share::Hold { offset: 7, byte: 7 }));
    crew.kill_source(|| {
        let _ = dying.kill();
    });
    await_that("the living come back", || {
        let region = crew.source.region(REGION);
        region.is_some_and(|it| {
            let writing = it.attachments.iter().filter(|it| it.state == "writing");
            writing.count() == 2
        })
    });
    await_that("the dead one is forgotten", || {
        crew.attachments().len() == 2
    });
    crew.writers[0].commit(0);
    let (_, cut) = crew.writers[1].commit(0);
    assert!(cut);
}

#[test]
fn a_stopped_engine_holds_all_writers_up_and_they_go_on() {
    if !may_be_exact() {
        return;
    }
    const PAGES: u64 = 64;
    let mut crew = Crew::new(PAGES * PAGE as u64, Mode::Sync, Publish::Timer, 3);
    crew.share_all(|number| Share::MapStorm {
        number,
        pages: PAGES,
    });
    await_that("captures run", || {
        crew.source
            .region(REGION)
            .is_some_and(|region| region.captures > 20)
    });
    crew.source.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(1));
    crew.source.signal(Signal::SIGCONT);
    for writer in &mut crew.writers {
        assert!(stores_of(writer.order(&Order::Stop)) > 0);
    }
    crew.await_equal();
}

/// A thread of a child that stands still; none where this process may not do that.
#[allow(
    clippy::print_stderr,
    reason = "a skipped test says so where the test runner shows it"
)]
fn held(thread: i32) -> Option<unruly::Held> {
    match unruly::Held::hold(thread) {
        Ok(held) => Some(held),
        Err(error) => {
            let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
            assert!(!required, "ptrace: {error}");
            eprintln!("SKIP ptrace: {error}");
            None
        }
    }
}

#[test]
fn a_cut_that_the_engine_does_not_capture_in_time_is_given_up() {
    if !may_be_exact() {
        return;
    }
    // Room for 256 pages: far fewer than are stored to in a second.
    let mut crew = Crew::new(8 * MIB, Mode::Sync, Publish::Timer, 2);
    crew.share_all(|number| Share::Count { number, threads: 1 });
    let exact = |crew: &Crew| {
        let region = crew.source.region(REGION).expect("it is there");
        region.exact.expect("it is tracked exactly")
    };
    let deadline = Instant::now() + PATIENCE;
    while exact(&crew).voided == 0 {
        assert!(Instant::now() < deadline, "no cut is given up");
        // The loop stands still, its fault thread does not; often enough in a capture.
        let Some(held) = held(crew.source.pid() as i32) else {
            return;
        };
        std::thread::sleep(Duration::from_millis(2 * uffd_sync::limits::CUT_STALL_MS));
        drop(held);
    }
    let before = exact(&crew).cuts;
    await_that("cuts go on", || exact(&crew).cuts > before + 3);
    for writer in &mut crew.writers {
        assert!(stores_of(writer.order(&Order::Stop)) > 1_000);
    }
    crew.await_equal();
    let region = crew.source.region(REGION).expect("it is there");
    let void = region.losses.iter().find(|it| it.kind == LossKind::CutVoid);
    assert!(void.is_some(), "{:?}", region.losses);
    assert!(region.full_compares > 0 && region.tracking == Some(Mode::Sync));
}

#[test]
fn a_writer_makes_a_cooperative_region_and_another_ends_it() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    let mut first = WriterProcess::start();
    let more = More {
        cooperative: true,
        ..More::default()
    };
    let create = |writer: &mut WriterProcess| {
        let (mode, publish) = (Mode::Async, Publish::Commit);
        writer.try_create(source.socket(), REGION, MIB, mode, publish, more)
    };
    assert_eq!(create(&mut first), Report::Created { resumed: false });
    let mut second = attached(source.socket());
    let refused = create(&mut WriterProcess::start());
    assert!(
        matches!(&refused, Report::Failed { error } if error.contains("attach")),
        "{refused:?}"
    );
    first.write(0, b"first");
    let _ = first.kill();
    await_that("it goes on without the first", || {
        let region = source.region(REGION).expect("it is there");
        region.attachments.len() == 1 && region.state == "live"
    });
    second.write(5, b", second");
    second.commit(0);
    let read = run_on(&source, &format!("region read {REGION} --len 13"), b"");
    assert_eq!(read.text(), "first, second");
    let refused = source.connect().remove(REGION).expect_err("it is written");
    assert!(refused.to_string().contains("still writes"), "{refused}");
    let _ = second.kill();
    await_that("nobody writes it", || {
        source
            .region(REGION)
            .is_some_and(|it| it.state == "unattended")
    });
    // Whoever makes it anew starts from what is there.
    let mut third = WriterProcess::start();
    assert_eq!(create(&mut third), Report::Created { resumed: true });
    let _ = third.kill();
    await_that("nobody writes it", || {
        source
            .region(REGION)
            .is_some_and(|it| it.state == "unattended")
    });
    source.connect().remove(REGION).expect("nobody writes it");
}

#[test]
fn a_cooperative_region_from_a_shell() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    let made = run_on(
        &source,
        &format!("region create {REGION} --size 64KiB --cooperative --mode manual --json"),
        b"",
    );
    assert_eq!(made.json()["kind"], "cooperative");
    assert_eq!(made.json()["state"], "unattended");
    let wrote = run_on(
        &source,
        &format!("region write {REGION} --offset 9"),
        b"shell",
    );
    assert_eq!(wrote.code, Some(0), "{wrote:?}");
    let writer = Writer::attach(source.socket(), REGION).expect("one more writer");
    let mut bytes = [0; 5];
    writer.read(9, &mut bytes).expect("inside");
    assert_eq!(&bytes, b"shell");
    let shown = run_on(&source, &format!("region show {REGION}"), b"").text();
    assert!(
        shown.contains("writing") && shown.contains("cooperative"),
        "{shown}"
    );
    for line in [
        "region create other --size 64KiB --cooperative --mode auto",
        "region create other --size 64KiB --publish commit",
        "region write shared --offset 64KiB",
    ] {
        assert_eq!(run_on(&source, line, b"x").code, Some(2), "{line}");
    }
    source
        .connect()
        .create_held("held", 4096, false)
        .expect("a held region");
    let refused = Writer::attach(source.socket(), "held").expect_err("the node writes it");
    assert!(refused.to_string().contains("not cooperative"), "{refused}");
}
