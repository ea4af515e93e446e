//! Mode `sync` with real processes: cuts on demand, deaths on either side, no work where
//! nothing is stored.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use uffd_sync::client::{Node, Reader, Writer, WriterOptions};
use uffd_sync::node::NodeConfig;
use uffd_sync::units::MIB;
use uffd_sync::wire::control::RefusalCode;
use uffd_sync::words::{EpochKind, Mode, Publish};

use super::nodes::{NodeProcess, PATIENCE, await_content, await_that, folder, run, run_on};
use super::scenarios::{Pair, REGION};
use super::writer::{Order, Report, WriterProcess};

/// Whether this process may do what the mode needs; the writers it starts may as well.
#[allow(
    clippy::print_stderr,
    reason = "a skipped test says so where the test runner shows it"
)]
pub(crate) fn may_be_exact() -> bool {
    match uffd_sync::sys::uffd::Uffd::open_sync() {
        Ok(_) => true,
        Err(error) => {
            let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
            assert!(!required, "userfaultfd: {error}");
            eprintln!("SKIP userfaultfd: {error}");
            false
        }
    }
}

fn end_beat(writer: &mut WriterProcess) -> (u64, u64) {
    match writer.order(&Order::Stop) {
        Report::Beaten { stores, longest_us } => (stores, longest_us),
        other => panic!("not the end of a beat: {other:?}"),
    }
}

#[test]
fn every_epoch_is_a_cut_without_help_from_the_writer() {
    if !may_be_exact() {
        return;
    }
    let mut pair = Pair::new(MIB, Mode::Sync, Publish::Timer);
    pair.store(4000, &[0xEE; 9000]);
    pair.await_equal();
    let region = pair.source.region(REGION).expect("it is there");
    assert!(region.cut, "{region:?}");
    let exact = region.exact.expect("figures of exact tracking");
    assert!(exact.cuts >= 2 && exact.faults >= 1, "{exact:?}");
    assert_eq!(exact.voided, 0);
    let (_, cut) = pair.writer.commit(1);
    assert!(cut);
}

#[test]
fn nothing_is_done_while_nothing_is_stored() {
    if !may_be_exact() {
        return;
    }
    let mut pair = Pair::new(MIB, Mode::Sync, Publish::Timer);
    pair.store(0, b"awake");
    pair.await_equal();
    let cuts = |pair: &Pair| {
        let region = pair.source.region(REGION).expect("it is there");
        region.exact.expect("figures").cuts
    };
    let before = cuts(&pair);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(cuts(&pair), before, "nobody stored");
    pair.store(MIB - 7, b"awake!");
    pair.await_equal();
    assert!(cuts(&pair) > before);
}

#[test]
fn a_reader_asks_for_a_cut() {
    if !may_be_exact() {
        return;
    }
    let mut pair = Pair::new(MIB, Mode::Sync, Publish::Commit);
    let reader = Reader::attach(pair.source.socket(), REGION).expect("a reader");
    let before = pair.source.region(REGION).expect("it is there").epoch;
    pair.writer.write(77, b"nobody commits this");
    let epoch = reader.cut().expect("a cut");
    assert_eq!(epoch, before + 1);
    let follower = Reader::attach(pair.follower.socket(), REGION).expect("a reader");
    if follower.control().epoch() < epoch {
        follower.wait_epoch(epoch - 1, PATIENCE).expect("it comes");
    }
    let read = follower.read_cut(PATIENCE, |view| view.load::<[u8; 19]>(77));
    let (bytes, seen) = read.expect("a cut");
    assert_eq!(&bytes.expect("inside"), b"nobody commits this");
    assert_eq!((seen.number, seen.kind), (epoch, EpochKind::Cut));

    assert_eq!(reader.cut().expect("again"), epoch, "nothing was stored");
    pair.writer.write(77, b"once more");
    let ran = run_on(&pair.source, &format!("region cut {REGION} --json"), b"");
    assert_eq!(ran.json()["epoch"], epoch + 1);
    // Who asks is not held up by one who asked before, and a connection takes more.
    let mut nodes: Vec<Node> = (0..4).map(|_| pair.source.connect()).collect();
    std::thread::scope(|scope| {
        for node in &mut nodes {
            scope.spawn(|| {
                for _ in 0..20 {
                    node.cut(REGION).expect("a cut");
                    node.status().expect("and a status");
                }
            });
        }
    });
}

#[test]
fn cuts_are_refused_where_they_cannot_be_made() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "a");
    let _writer =
        WriterProcess::with_region(source.socket(), "plain", MIB, Mode::Async, Publish::Timer);
    let mut node = source.connect();
    let refused = node.cut("plain").expect_err("only commits cut");
    assert_eq!(refused.refusal(), Some(RefusalCode::Unsupported));
    assert!(refused.to_string().contains("sync"), "{refused}");
    let absent = node.cut("absent").expect_err("there is none");
    assert_eq!(absent.refusal(), Some(RefusalCode::NotFound));
    node.create_held("held", 4096, false)
        .expect("a held region");
    node.write_held("held", 0, b"1").expect("a write");
    assert_eq!(node.cut("held").expect("each write is one"), 1);
    let follower = NodeProcess::follower(
        folder.path(),
        "b",
        &[format!("tcp://{}/plain=copy", source.listen())],
    );
    await_that("the replica is there", || follower.region("copy").is_some());
    let refused = follower.connect().cut("copy").expect_err("it is a replica");
    assert_eq!(refused.refusal(), Some(RefusalCode::Unsupported));
}

#[test]
fn the_last_stores_of_a_killed_writer_are_shipped() {
    if !may_be_exact() {
        return;
    }
    let mut pair = Pair::new(MIB, Mode::Sync, Publish::Commit);
    pair.writer.write(123, b"stored and not committed");
    pair.writer.write(MIB - 9, b"the end");
    pair.model[123..147].copy_from_slice(b"stored and not committed");
    let end = pair.model.len() - 9;
    pair.model[end..end + 7].copy_from_slice(b"the end");
    pair.writer.signal(Signal::SIGKILL);
    await_content(&pair.follower, REGION, &pair.model);
    let region = pair.source.region(REGION).expect("the node keeps it");
    assert_eq!((region.state.as_str(), region.exact), ("orphaned", None));
}

#[test]
fn a_killed_engine_lets_the_writer_go_on_and_a_new_one_takes_over() {
    if !may_be_exact() {
        return;
    }
    let folder = folder();
    let mut source = NodeProcess::source(folder.path(), "a");
    let mut writer =
        WriterProcess::with_region(source.socket(), "r", 8 * MIB, Mode::Sync, Publish::Timer);
    for round in 0..3u8 {
        await_that("the region is tracked", || {
            source
                .region("r")
                .is_some_and(|region| region.exact.is_some_and(|it| it.cuts > 2))
                || {
                    // Each store makes a cut.
                    writer.write(u64::from(round), &[round]);
                    false
                }
        });
        // Killed while stores wait all the time: a beat runs over all pages.
        writer.send(&Order::Beat);
        let begun = source
            .region("r")
            .and_then(|it| it.exact)
            .map_or(0, |it| it.cuts);
        await_that("cuts are made under the beat", || {
            source
                .region("r")
                .and_then(|it| it.exact)
                .is_some_and(|it| it.cuts > begun + 5)
        });
        source.kill();
        let killed = Instant::now();
        let (stores, longest_us) = end_beat(&mut writer);
        assert!(stores > 0);
        assert!(
            killed.elapsed() < Duration::from_secs(10),
            "the writer goes on: {longest_us} us"
        );
        assert!(longest_us < 2_000_000, "a store waited {longest_us} us");
        source = NodeProcess::source(folder.path(), "a");
        await_that("the writer hands over again", || {
            source.region("r").is_some()
        });
    }
    let path = folder.path().join("dump");
    writer.carry_out(&Order::Dump { path: path.clone() });
    let model = std::fs::read(path).expect("the dump");
    await_content(&source, "r", &model);
    source.connect().cut("r").expect("tracked exactly again");
}

#[test]
fn a_stopped_engine_holds_stores_up_and_then_goes_on() {
    if !may_be_exact() {
        return;
    }
    let mut pair = Pair::new(MIB, Mode::Sync, Publish::Timer);
    pair.writer.send(&Order::Beat);
    await_that("captures run", || {
        pair.source
            .region(REGION)
            .is_some_and(|region| region.captures > 20)
    });
    pair.source.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(1));
    pair.source.signal(Signal::SIGCONT);
    let (stores, longest_us) = end_beat(&mut pair.writer);
    assert!(stores > 100, "{stores} stores");
    assert!(longest_us < 20_000_000, "{longest_us} us");
    let folder = folder();
    let path = folder.path().join("dump");
    pair.writer.carry_out(&Order::Dump { path: path.clone() });
    pair.model = std::fs::read(path).expect("the dump");
    pair.await_equal();
}

#[test]
fn a_program_embeds_an_engine_that_answers_its_own_faults() {
    if !may_be_exact() {
        return;
    }
    let node = uffd_sync::node::Node::embedded(&NodeConfig::default()).expect("a node");
    let connect = || Node::from_socket(node.connect().expect("it runs")).expect("it answers");
    let options = WriterOptions {
        mode: Mode::Sync,
        ..WriterOptions::default()
    };
    let region = Writer::create_over(connect(), "own", MIB, &options).expect("a region");
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let region = &region;
            scope.spawn(move || {
                for number in 0..500u64 {
                    let page = (number * 37 + thread) % 256;
                    let at = page * 4096 + thread * 8;
                    region.write(at, &number.to_le_bytes()).expect("a store");
                }
            });
        }
    });
    let epoch = region.commit(PATIENCE).expect("a commit");
    assert_eq!(epoch.kind, EpochKind::Cut);
    let reader = Reader::attach_over(connect(), "own").expect("a reader");
    drop(region);
    // Dropped, it is compared once more and stands still.
    await_that("the node notices", || {
        let status = connect().status().expect("a status");
        status.regions.iter().any(|it| it.state == "orphaned")
    });
    let refused = reader.cut().expect_err("there is no writer");
    assert_eq!(refused.refusal(), Some(RefusalCode::Unsupported));
    let mut last = [0; 8];
    reader
        .read(499 * 37 % 256 * 4096, &mut last)
        .expect("still readable");
    assert_eq!(u64::from_le_bytes(last), 499);
    node.stop().expect("it drains");
}

#[test]
fn the_demonstration_checks_every_epoch() {
    if !may_be_exact() {
        return;
    }
    let ran = run(
        &[
            "demo",
            "--mode",
            "sync",
            "--seconds",
            "2",
            "--region-size",
            "8MiB",
            "--json",
        ],
        b"",
    );
    let report = ran.json();
    assert_eq!(report["torn"], 0, "{report}");
    assert_eq!(report["verified"], true);
    assert!(report["epochs_checked"].as_u64() > Some(10), "{report}");
}
