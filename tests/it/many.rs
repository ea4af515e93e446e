//! Limits: very many regions, a very large one, very small ones, very many connections.

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use uffd_sync::client::{Node, Reader, Writer, WriterOptions};
use uffd_sync::limits;
use uffd_sync::units::{GIB, MIB, PAGE_SIZE};
use uffd_sync::wire::control::RefusalCode;
use uffd_sync::words::{EpochKind, Mode, Publish};

use super::nodes::{
    BINARY, NodeProcess, PATIENCE, await_content, await_that, content, folder, long,
};

/// A node that may open `files` descriptors, as an operator would allow it to.
#[track_caller]
fn node_with_files(folder: &std::path::Path, files: u64) -> NodeProcess {
    let socket = folder.join("many.sock");
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\"")])
        .arg(BINARY)
        .arg("serve")
        .arg("--socket")
        .arg(&socket)
        .args(["--name", "many", "--listen", "127.0.0.1:0"]);
    NodeProcess::start_by(command, "many", socket)
}

/// Two descriptors for each region, and what the node needs itself. Where the hard limit
/// of open files cannot be raised it decides how many there are.
#[test]
fn thousands_of_tiny_regions_hold_nobody_up() {
    let folder = folder();
    let count: u64 = if long() { 10_000 } else { 1_000 };
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let count = count.min((hard - 500) / 2);
    let node = node_with_files(folder.path(), hard.min(2 * count + 500));
    let mut control = node.connect();
    let name = |index: u64| format!("tiny-{index}");
    for index in 0..count {
        let size = 1 + index % PAGE_SIZE;
        let made = control.create_held(&name(index), size, true);
        made.unwrap_or_else(|error| panic!("region {index}: {error}"));
        control
            .write_held(&name(index), size - 1, &[index as u8 | 1])
            .expect("within");
    }
    // A program's region among them is as quick as if it was alone.
    let options = WriterOptions {
        mode: Mode::Manual,
        publish: Publish::Commit,
        ..WriterOptions::default()
    };
    let writer = Writer::create(node.socket(), "program", MIB, &options).expect("room for it");
    let mut slowest = Duration::ZERO;
    let status = std::thread::scope(|scope| {
        let asking = scope.spawn(|| (0..5).map(|_| node.status()).next_back());
        while !asking.is_finished() {
            let begun = Instant::now();
            writer
                .write(8, &slowest.as_nanos().to_le_bytes())
                .expect("within");
            writer.commit(PATIENCE).expect("an engine");
            slowest = slowest.max(begun.elapsed());
        }
        asking.join().expect("an answer").expect("five of them")
    });
    assert_eq!(status.regions.len() as u64, count + 1);
    assert!(
        slowest < Duration::from_secs(5),
        "a commit took {slowest:?}"
    );
    for index in [0, count / 2, count - 1] {
        let size = 1 + index % PAGE_SIZE;
        let (bytes, epoch) = content(&node, &name(index)).expect("readable");
        assert_eq!(
            (bytes.len() as u64, bytes.last(), epoch),
            (size, Some(&(index as u8 | 1)), 1)
        );
    }
    let follow = format!("tcp://{}/{}", node.listen(), name(count - 1));
    let follower = NodeProcess::follower(folder.path(), "follower", &[follow]);
    let (expected, _) = content(&node, &name(count - 1)).expect("readable");
    await_content(&follower, &name(count - 1), &expected);
    control.remove(&name(7)).expect("it is there");
    assert_eq!(node.status().regions.len() as u64, count);
}

#[test]
fn a_node_without_descriptors_refuses_and_goes_on() {
    let folder = folder();
    let node = node_with_files(folder.path(), 200);
    let mut control = node.connect();
    let mut made = 0;
    let refusal = loop {
        match control.create_held(&format!("r{made}"), 1, false) {
            Ok(()) => made += 1,
            Err(error) => break error,
        }
        assert!(made < 200, "more regions than descriptors");
    };
    assert!(made > 20, "{made} regions: {refusal}");
    assert_eq!(refusal.refusal(), Some(RefusalCode::Failed), "{refusal}");
    control.remove("r0").expect("it is there");
    control.remove("r1").expect("it is there");
    control.create_held("again", 1, false).expect("room again");
    assert_eq!(node.status().regions.len(), made - 1);
}

#[test]
fn a_sparse_region_of_100_gib_costs_what_is_in_it() {
    const SIZE: u64 = 100 * GIB;
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    for mode in [Mode::Manual, Mode::Async] {
        // Arming needs 2 MiB of page tables for each GiB and takes some seconds.
        if mode == Mode::Async && !long() {
            continue;
        }
        let name = format!("sparse-{mode}");
        let options = WriterOptions {
            mode,
            publish: Publish::Commit,
            ..WriterOptions::default()
        };
        let writer = match Writer::create(source.socket(), &name, SIZE, &options) {
            Ok(writer) => writer,
            Err(error) => {
                skip(&error);
                continue;
            }
        };
        let places = [0, 17 * GIB + 5, 50 * GIB - 3, SIZE - 8];
        for (index, place) in places.into_iter().enumerate() {
            writer.write(place, &[index as u8 + 1; 8]).expect("within");
            writer.mark_region_changed(place, 8).expect("within");
        }
        writer.commit(PATIENCE).expect("an engine");
        let follow = format!("tcp://{}/{name}", source.listen());
        let follower = NodeProcess::follower(folder.path(), &format!("of-{mode}"), &[follow]);
        super::nodes::await_following(&follower, &name);
        let last = |node: &NodeProcess, byte: u8| {
            let reader = Reader::attach(node.socket(), &name).ok()?;
            let look = |view: uffd_sync::region::View<'_>| {
                places.map(|place| view.load::<[u8; 8]>(place).is_ok_and(|it| it[0] != 0))
                    == [true; 4]
                    && view.load::<u8>(SIZE - 1).is_ok_and(|it| it == byte)
            };
            reader.read_at_epoch(look).ok().map(|it| it.0)
        };
        await_that("the replica has it", || last(&follower, 4) == Some(true));
        writer.write(SIZE - 1, &[9]).expect("within");
        writer.mark_region_changed(SIZE - 1, 1).expect("within");
        let begun = Instant::now();
        writer.commit(PATIENCE).expect("an engine");
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{:?}",
            begun.elapsed()
        );
        await_that("the replica follows", || last(&follower, 9) == Some(true));
        for node in [&source, &follower] {
            let region = node.region(&name).expect("it is there");
            assert!(region.resident_bytes <= 8 * PAGE_SIZE, "{mode}: {region:?}");
            assert!(region.overhead_bytes <= 8 * PAGE_SIZE, "{mode}: {region:?}");
            let rss = node.status().rss_bytes;
            assert!(rss < 200 * MIB, "{mode}: a node of {rss} bytes");
        }
    }
}

#[allow(
    clippy::print_stderr,
    reason = "a skipped test says so where the test runner shows it"
)]
fn skip(error: &dyn std::error::Error) {
    let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
    assert!(!required, "{error}: {:?}", error.source());
    eprintln!("SKIP {error}: {:?}", error.source());
}

#[test]
fn regions_of_a_byte_and_a_page_and_epochs_of_nothing() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    for mode in [Mode::Async, Mode::Sync, Mode::Manual, Mode::Compare] {
        for size in [1, PAGE_SIZE] {
            let name = format!("tiny-{mode}-{size}");
            let options = WriterOptions {
                mode,
                publish: Publish::Commit,
                ..WriterOptions::default()
            };
            let writer = match Writer::create(source.socket(), &name, size, &options) {
                Ok(writer) => writer,
                Err(error) => {
                    skip(&error);
                    continue;
                }
            };
            let first = writer.commit(PATIENCE).expect("an engine");
            let again = writer.commit(PATIENCE).expect("an engine");
            assert_eq!(first.number, again.number, "{name}: nothing was stored");
            assert_eq!(again.kind, EpochKind::Cut);
            let follow = format!("tcp://{}/{name}", source.listen());
            let follower = NodeProcess::follower(folder.path(), &name, &[follow]);
            await_content(&follower, &name, &vec![0; size as usize]);
            writer.write(size - 1, &[7]).expect("within");
            writer.mark_region_changed(size - 1, 1).expect("within");
            let next = writer.commit(PATIENCE).expect("an engine");
            assert_eq!(next.number, again.number + 1, "{name}");
            next.wait_acked(1, PATIENCE).expect("the replica has it");
            let mut expected = vec![0; size as usize];
            expected[size as usize - 1] = 7;
            await_content(&follower, &name, &expected);
        }
    }
}

#[test]
fn a_thousand_connections_at_once() {
    let folder = folder();
    let node = node_with_files(folder.path(), 5_000);
    let count = 1_000;
    let mut connections: Vec<Node> = (0..count).map(|_| node.connect()).collect();
    connections[0]
        .create_held("shared", 4096, true)
        .expect("room");
    for (index, connection) in connections.iter_mut().enumerate() {
        connection
            .write_held("shared", index as u64 % 4096, &[1])
            .unwrap_or_else(|error| panic!("connection {index}: {error}"));
    }
    let status = connections[count - 1].status().expect("an answer");
    assert!(status.connections >= count as u64, "{}", status.connections);
    assert_eq!(status.regions[0].epoch, count as u64);
    drop(connections);
    await_that("the node knows that they are gone", || {
        node.status().connections <= 2
    });
    assert!(limits::MAX_CONNECTIONS > count as u64);
}
