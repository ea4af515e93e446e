//! Regions that grow: by their writer and by the node that holds them, under load, seen
//! by replicas, replicas of replicas and readers, over the death of a node.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use uffd_sync::client::{Node, Reader, Writer, WriterOptions};
use uffd_sync::region::RegionError;
use uffd_sync::units::{KIB, MIB, PAGE_SIZE};
use uffd_sync::wire::control::RefusalCode;
use uffd_sync::words::{Mode, Publish};

use super::nodes::{
    NodeProcess, PATIENCE, await_content, await_some, await_that, content, folder, run_on,
};

const REGION: &str = "region";
const SIZE: u64 = 3 * PAGE_SIZE + 100;
const MAX: u64 = 64 * MIB;

/// A node with a region that can grow, and one that follows it.
struct Scene {
    writer: Writer,
    follower: NodeProcess,
    source: NodeProcess,
    folder: TempDir,
    mode: Mode,
}

impl Scene {
    /// None where this process cannot track in that mode.
    #[track_caller]
    fn new(mode: Mode, publish: Publish) -> Option<Self> {
        let folder = folder();
        let source = NodeProcess::source(folder.path(), "source");
        let options = WriterOptions {
            mode,
            publish,
            max_size: Some(MAX),
            ..WriterOptions::default()
        };
        let writer = match Writer::create(source.socket(), REGION, SIZE, &options) {
            Ok(writer) => writer,
            Err(error) => return skip(&error),
        };
        let follow = format!("tcp://{}/{REGION}", source.listen());
        let follower = NodeProcess::follower(folder.path(), "follower", &[follow]);
        Some(Self {
            writer,
            follower,
            source,
            folder,
            mode,
        })
    }

    #[track_caller]
    fn store(&self, offset: u64, bytes: &[u8]) {
        self.writer.write(offset, bytes).expect("within the region");
        if self.mode == Mode::Manual {
            let marked = self.writer.mark_region_changed(offset, bytes.len() as u64);
            marked.expect("within the region");
        }
    }

    /// Waits until the replica has the writer's size and bytes.
    #[track_caller]
    fn await_equal(&self, node: &NodeProcess) {
        let mut bytes = vec![0; self.writer.size() as usize];
        self.writer.read(0, &mut bytes).expect("all of it");
        await_that("the replica has the size", || {
            let size = node.region(REGION).map(|region| region.size);
            size == Some(bytes.len() as u64)
        });
        await_content(node, REGION, &bytes);
    }
}

#[allow(
    clippy::print_stderr,
    reason = "a skipped test says so where the test runner shows it"
)]
fn skip<T>(error: &dyn std::error::Error) -> Option<T> {
    let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
    assert!(!required, "{error}: {:?}", error.source());
    eprintln!("SKIP {error}: {:?}", error.source());
    None
}

#[test]
fn replicas_follow_a_region_that_grows_in_each_mode() {
    for mode in [Mode::Async, Mode::Sync, Mode::Manual, Mode::Compare] {
        let Some(scene) = Scene::new(mode, Publish::Timer) else {
            continue;
        };
        scene.store(0, b"before");
        scene.await_equal(&scene.follower);
        // Growth alone is news.
        scene.writer.grow(SIZE + 5000).expect("room");
        scene.await_equal(&scene.follower);
        for step in 1..=5u64 {
            let old = scene.writer.size();
            scene
                .writer
                .grow(old + step * 700 * KIB + 13)
                .expect("room");
            scene.store(old - 3, b"over the old end");
            scene.store(scene.writer.size() - 4, b"last");
            scene.store(step * 5000, &step.to_le_bytes());
            scene.await_equal(&scene.follower);
        }
        scene.writer.grow(MAX).expect("room");
        scene.store(MAX - 1, &[9]);
        scene.await_equal(&scene.follower);
        let status = scene.source.region(REGION).expect("it is there");
        assert_eq!((status.size, status.max_size), (MAX, MAX));
        assert_eq!(status.full_compares, 0, "{mode}: {status:?}");
        assert!(status.resident_bytes < 2 * MIB, "{mode}: holes stay holes");
        let replica = scene.follower.region(REGION).expect("it is there");
        assert!(replica.resident_bytes < 2 * MIB, "{mode}: {replica:?}");
    }
}

#[test]
fn growth_goes_on_under_endless_stores_and_scans() {
    for mode in [Mode::Async, Mode::Sync] {
        let Some(scene) = Scene::new(mode, Publish::Timer) else {
            continue;
        };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 1..=2u64 {
                let (region, stop) = (&scene.writer, &stop);
                scope.spawn(move || {
                    let mut x = thread;
                    while !stop.load(Ordering::Relaxed) {
                        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let size = region.size();
                        // Half of it near the end, which moves.
                        let back = if x & 1 << 20 == 0 { size } else { 8 * KIB };
                        let at = size - 8 - (x >> 33) % (back - 8);
                        region.write(at, &x.to_le_bytes()).expect("within");
                    }
                });
            }
            for step in 0..200 {
                let size = scene.writer.size();
                scene
                    .writer
                    .grow(size + 3 * PAGE_SIZE + 11 * step)
                    .expect("room");
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
        });
        scene.await_equal(&scene.follower);
        let status = scene.source.region(REGION).expect("it is there");
        assert_eq!(status.full_compares, 0, "{mode}: {status:?}");
    }
}

/// Each epoch holds the size that it was made with in its first word: growth and the
/// stores after it come in one commit.
#[test]
fn readers_see_the_size_with_the_epoch_that_includes_it() {
    let Some(scene) = Scene::new(Mode::Async, Publish::Commit) else {
        return;
    };
    let publish = |size: u64| {
        scene.writer.grow(size).expect("room");
        scene.store(0, &size.to_le_bytes());
        scene.store(size - 8, &size.to_le_bytes());
        scene.writer.commit(PATIENCE).expect("an engine")
    };
    publish(SIZE);
    let reader = await_some("the replica can be read", || {
        let reader = Reader::attach(scene.follower.socket(), REGION).ok()?;
        reader.read_at_epoch(|_| ()).ok()?;
        Some(reader)
    });
    assert_eq!((reader.size(), reader.max_size()), (SIZE, MAX));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (reader, done) = (&reader, &done);
        let reading = scope.spawn(move || {
            let (mut reads, mut sizes) = (0u64, std::collections::BTreeSet::new());
            while !done.load(Ordering::Relaxed) {
                let look = |view: uffd_sync::region::View<'_>| {
                    let last = view.len() - 8;
                    (view.len(), view.load::<u64>(0), view.load::<u64>(last))
                };
                if let Ok(((len, first, last), epoch)) = reader.read_at_epoch(look) {
                    let (first, last) = (first.expect("within"), last.expect("within"));
                    assert_eq!((first, last), (len, len), "epoch {epoch:?}");
                    sizes.insert(len);
                    reads += 1;
                }
            }
            (reads, sizes.len())
        });
        for step in 1..=150u64 {
            // One by one, so that the reader meets most of them.
            let epoch = publish(SIZE + step * 50_000);
            epoch.wait_acked(1, PATIENCE).expect("the replica has it");
        }
        let size = scene.writer.size();
        await_that("the reader sees the last size", || reader.size() == size);
        done.store(true, Ordering::Relaxed);
        let (reads, sizes) = reading.join().expect("no reader panicked");
        assert!(reads > 100 && sizes > 3, "{reads} reads of {sizes} sizes");
    });
    // Somebody who reads the writer's own memory sees it too.
    let live = Reader::attach(scene.source.socket(), REGION).expect("it is there");
    scene.writer.grow(SIZE + 20 * MIB).expect("room");
    assert_eq!(live.size(), SIZE + 20 * MIB);
    let mut byte = [1];
    live.read(SIZE + 20 * MIB - 1, &mut byte).expect("within");
    assert_eq!(byte, [0]);
}

#[test]
fn too_much_and_too_little_is_refused_with_both_numbers() {
    let Some(scene) = Scene::new(Mode::Async, Publish::Timer) else {
        return;
    };
    let beyond = scene.writer.grow(MAX + 1).expect_err("beyond");
    assert!(
        matches!(beyond, RegionError::BeyondMax { size, max_size } if size == MAX + 1 && max_size == MAX)
    );
    let shrunk = scene.writer.grow(SIZE - 1).expect_err("less");
    assert!(
        matches!(shrunk, RegionError::Shrink { size, present } if size == SIZE - 1 && present == SIZE)
    );
    assert_eq!(scene.writer.size(), SIZE);
    let mut node = Node::connect(scene.source.socket()).expect("a node");
    let refused = node.grow_held(REGION, 2 * SIZE).expect_err("not held");
    assert_eq!(refused.refusal(), Some(RefusalCode::Unsupported));
}

#[test]
fn a_region_that_the_node_holds_grows_by_command() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    let run = |line: &str| run_on(&source, line, b"");
    let made = run("region create region --size 5000 --max-size 1MiB --shared");
    assert_eq!(made.code, Some(0), "{made:?}");
    let follow = format!("tcp://{}/{REGION}", source.listen());
    let middle = NodeProcess::start(
        folder.path(),
        "middle",
        &["--listen", "127.0.0.1:0", "--follow", &follow],
    );
    let follow = format!("tcp://{}/{REGION}", middle.listen());
    let last = NodeProcess::follower(folder.path(), "last", &[follow]);
    let grown = run("region grow region --size 300KiB --json").json();
    assert_eq!(grown["size"], 300 * KIB);
    let mut node = Node::connect(source.socket()).expect("a node");
    node.write_held(REGION, 300 * KIB - 4, b"last")
        .expect("within");
    node.write_held(REGION, 4999, b"over the old end")
        .expect("within");
    let mut expected = vec![0; 300 * KIB as usize];
    expected[4999..5015].copy_from_slice(b"over the old end");
    expected[300 * KIB as usize - 4..].copy_from_slice(b"last");
    for node in [&middle, &last] {
        await_that("each follower has it", || {
            content(node, REGION).is_ok_and(|it| it.0 == expected)
        });
        let status = node.region(REGION).expect("it is there");
        assert_eq!((status.size, status.max_size), (300 * KIB, MIB));
    }
    for (size, bound) in [("2MiB", "1048576"), ("100", "307200")] {
        let refused = run(&format!("region grow region --size {size}"));
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains(bound), "{refused:?}");
    }
    let wrong = run("region create other --size 2MiB --max-size 1MiB");
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
}

/// The engine dies, the region grows meanwhile, and the next engine takes over; then the
/// writer goes and a successor finds the grown content.
#[test]
fn growth_survives_the_node_and_the_writer() {
    for mode in [Mode::Async, Mode::Sync] {
        let Some(scene) = Scene::new(mode, Publish::Timer) else {
            continue;
        };
        scene.writer.grow(MIB).expect("room");
        scene.store(MIB - 4, b"here");
        scene.await_equal(&scene.follower);
        let listen = scene.source.listen().to_string();
        let Scene {
            writer,
            source,
            follower,
            folder,
            mode,
        } = scene;
        source.kill();
        writer.grow(2 * MIB).expect("room");
        writer.write(2 * MIB - 5, b"there").expect("within");
        let source = NodeProcess::start(folder.path(), "source", &["--listen", &listen]);
        let scene = Scene {
            writer,
            source,
            follower,
            folder,
            mode,
        };
        scene.await_equal(&scene.follower);
        let Scene {
            writer,
            source,
            follower,
            ..
        } = scene;
        drop(writer);
        await_that("the node knows that the writer is gone", || {
            source
                .region(REGION)
                .is_some_and(|it| it.writer_pid.is_none())
        });
        let options = WriterOptions {
            mode,
            max_size: Some(MAX),
            ..WriterOptions::default()
        };
        let next = Writer::create(source.socket(), REGION, SIZE, &options).expect("a successor");
        assert!(next.is_resumed());
        assert_eq!(next.size(), 2 * MIB);
        next.grow(3 * MIB).expect("room");
        next.write(3 * MIB - 2, b"on").expect("within");
        await_that("the replica follows the successor", || {
            content(&follower, REGION)
                .is_ok_and(|it| it.0.len() as u64 == 3 * MIB && it.0.ends_with(b"on"))
        });
    }
}

/// Sets huge pages apart for the test, and gives them back.
struct HugePages(Option<String>);

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn reserve(count: u64) -> Option<Self> {
        let free = || -> Option<u64> {
            let text = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = text.lines().find(|it| it.starts_with("HugePages_Free"))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        if free()? >= count {
            return Some(Self(None));
        }
        let before = std::fs::read_to_string(NR_HUGEPAGES).ok()?;
        let wanted = before.trim().parse::<u64>().ok()? + count;
        std::fs::write(NR_HUGEPAGES, wanted.to_string()).ok()?;
        let pages = Self(Some(before));
        (free()? >= count).then_some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = std::fs::write(NR_HUGEPAGES, before.trim());
        }
    }
}

#[test]
fn a_region_of_huge_pages_is_followed_or_refused_with_the_reason() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    let options = |mode| WriterOptions {
        mode,
        max_size: Some(8 * MIB),
        huge_pages: true,
        ..WriterOptions::default()
    };
    let create = |mode, size| Writer::create(source.socket(), REGION, size, &options(mode));
    let odd = create(Mode::Async, MIB).expect_err("no multiple");
    assert!(
        chain(&odd).contains("multiple of 2097152"),
        "{}",
        chain(&odd)
    );
    let exact = create(Mode::Sync, 4 * MIB).expect_err("not in this mode");
    assert!(chain(&exact).contains("mode sync"), "{}", chain(&exact));
    let Some(_pages) = HugePages::reserve(8) else {
        let none = create(Mode::Async, 4 * MIB).expect_err("none are there");
        assert!(chain(&none).contains("vm.nr_hugepages"), "{}", chain(&none));
        let _: Option<()> = skip(&none);
        return;
    };
    for mode in [Mode::Async, Mode::Manual, Mode::Compare] {
        let writer = create(mode, 4 * MIB).unwrap_or_else(|e| panic!("{mode}: {}", chain(&e)));
        let follow = format!("tcp://{}/{REGION}", source.listen());
        let follower = NodeProcess::follower(folder.path(), &format!("of-{mode}"), &[follow]);
        let mut expected = vec![0; 4 * MIB as usize];
        for round in 1..=6u8 {
            // One huge page each time, the other now and then.
            let places = [5000, 3 * MIB + u64::from(round)];
            for place in &places[..1 + usize::from(round % 2)] {
                writer.write(*place, &[round; 3]).expect("within");
                writer.mark_region_changed(*place, 3).expect("within");
                expected[*place as usize..*place as usize + 3].fill(round);
            }
            await_content(&follower, REGION, &expected);
        }
        assert!(writer.grow(5 * MIB).is_err(), "no multiple");
        writer.grow(8 * MIB).expect("room");
        writer.write(8 * MIB - 1, &[1]).expect("within");
        writer.mark_region_changed(8 * MIB - 1, 1).expect("within");
        expected.resize(8 * MIB as usize, 0);
        expected[8 * MIB as usize - 1] = 1;
        await_that("the replica has grown", || {
            content(&follower, REGION).is_ok_and(|it| it.0 == expected)
        });
        let region = source.region(REGION).expect("it is there");
        assert_eq!(region.full_compares, 0, "{mode}: {region:?}");
        drop(writer);
        await_that("the writer is gone", || {
            source
                .region(REGION)
                .is_some_and(|it| it.writer_pid.is_none())
        });
        source.connect().remove(REGION).expect("it is there");
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
