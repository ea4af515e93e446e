//! The crate inside a program: nodes on threads of their own, writers and readers in
//! one process.

use std::time::Duration;

use uffd_sync::client::{self, Reader, Writer, WriterOptions};
use uffd_sync::mark_field_changed;
use uffd_sync::node::{Node, NodeConfig};
use uffd_sync::region::{ReadError, RegionError};
use uffd_sync::sys::memfd;
use uffd_sync::units::{GIB, MIB};
use uffd_sync::wire::control::RegionStatus;
use uffd_sync::words::{EpochKind, Mode, Publish};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::nodes::{PATIENCE, await_some, await_that, long};

/// Two embedded nodes, the second of which follows a region of the first.
struct Embedded {
    follower: Node,
    source: Node,
}

impl Embedded {
    fn following(region: &str) -> Self {
        let config = NodeConfig {
            name: "source".into(),
            listen: Some("127.0.0.1:0".parse().expect("an address")),
            ..NodeConfig::default()
        };
        let source = Node::embedded(&config).expect("a node");
        let address = source.listen_address().expect("it listens");
        let config = NodeConfig {
            name: "follower".into(),
            ..NodeConfig::default()
        };
        let follower = Node::embedded(&config).expect("a node");
        let spec = format!("tcp://{address}/{region}=copy");
        connect(&follower)
            .follow(&spec)
            .expect("a source that can be followed");
        Self { follower, source }
    }

    fn writer(&self, name: &str, size: u64, options: &WriterOptions) -> Writer {
        Writer::create_over(connect(&self.source), name, size, options).expect("a region")
    }

    /// An attachment to the replica, once it is there.
    fn reader(&self, size: u64) -> Reader {
        await_some("the replica has its size", || {
            let status = status_of(&self.follower, "copy")?;
            (status.size == size && status.state == "following").then_some(())
        });
        Reader::attach_over(connect(&self.follower), "copy").expect("the replica can be read")
    }
}

fn connect(node: &Node) -> client::Node {
    client::Node::from_socket(node.connect().expect("the engine runs")).expect("it answers")
}

fn status_of(node: &Node, name: &str) -> Option<RegionStatus> {
    let status = connect(node).status().expect("a status");
    status
        .regions
        .into_iter()
        .find(|region| region.name == name)
}

fn commit_options() -> WriterOptions {
    WriterOptions {
        publish: Publish::Commit,
        ..WriterOptions::default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Quote {
    bid: u64,
    ask: u64,
    name: [u8; 16],
}

#[test]
fn a_program_embeds_everything() {
    let nodes = Embedded::following("quotes");
    let region = nodes.writer("quotes", MIB, &commit_options());
    let quote = region.typed::<Quote>(4096 * 3 + 8).expect("it is inside");
    assert_eq!(
        quote.get(),
        Quote {
            bid: 0,
            ask: 0,
            name: [0; 16]
        }
    );
    quote.set(&Quote {
        bid: 7,
        ask: 9,
        name: *b"sixteen letters!",
    });
    quote.update(|quote| quote.bid += 1);
    assert!(
        region.typed::<Quote>(MIB - 31).is_err(),
        "it would reach beyond the end"
    );
    let epoch = region.commit(PATIENCE).expect("the engine answers");
    assert_eq!(epoch.kind, EpochKind::Cut);
    let stats = region.control().stats();
    assert_eq!(stats.commits, 1, "the control page tells what was done");
    assert!(stats.captures >= 1 && stats.changed_bytes > 0);
    let reader = nodes.reader(MIB);
    epoch
        .wait_acked(1, PATIENCE)
        .expect("the replica acknowledges");

    let seen = reader.read_at_epoch(|view| view.load::<Quote>(4096 * 3 + 8));
    let (seen, read) = seen.expect("an epoch can be read");
    assert_eq!(seen.expect("it is inside").bid, 8);
    assert_eq!((read.number, read.kind), (epoch.number, EpochKind::Cut));
    let (_, cut) = reader
        .read_cut(PATIENCE, |_| ())
        .expect("the newest epoch is a cut");
    assert_eq!(cut.number, epoch.number);
    assert_eq!(reader.generation(), region.control().generation());

    nodes.source.stop().expect("it drains");
    assert!(matches!(
        region.commit(Duration::from_secs(5)),
        Err(RegionError::EngineGone)
    ));
    nodes.follower.stop().expect("it drains");
    assert!(matches!(
        reader.wait_epoch(epoch.number, PATIENCE),
        Err(ReadError::SourceGone)
    ));
}

#[test]
fn readers_wait_for_epochs_and_deadlines_pass() {
    let nodes = Embedded::following("r");
    let region = nodes.writer("r", 8192, &commit_options());
    region.write(0, &1u64.to_le_bytes()).expect("it is inside");
    let first = region.commit(PATIENCE).expect("the engine answers");
    let reader = nodes.reader(8192);
    first
        .wait_acked(1, PATIENCE)
        .expect("the replica acknowledges");
    let nothing = reader.wait_epoch(first.number, Duration::from_millis(50));
    assert!(matches!(nothing, Err(ReadError::TimedOut)), "{nothing:?}");
    let late = first.wait_acked(2, Duration::from_millis(50));
    assert!(matches!(late, Err(RegionError::TimedOut)), "{late:?}");
    assert!(matches!(
        first.wait_acked(17, PATIENCE),
        Err(RegionError::Replicas { .. })
    ));

    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut after = first.number;
            let mut seen = Vec::new();
            while seen.last() != Some(&200) {
                after = reader.wait_epoch(after, PATIENCE).expect("epochs come");
                let value = reader.read_at_epoch(|view| view.load::<u64>(0));
                let (value, epoch) = value.expect("an epoch can be read");
                assert!(epoch.number >= after);
                seen.push(value.expect("it is inside"));
            }
            seen
        });
        for value in 2..=200u64 {
            region.write(0, &value.to_le_bytes()).expect("it is inside");
            region.commit(PATIENCE).expect("the engine answers");
        }
        let seen = waiting.join().expect("the reader ends");
        assert!(seen.is_sorted(), "time goes back: {seen:?}");
    });
    let own = Reader::attach_over(connect(&nodes.source), "r").expect("a source can be read");
    let refused = own.read_at_epoch(|_| ());
    assert!(matches!(refused, Err(ReadError::NotReplica)), "{refused:?}");
}

#[test]
fn marked_fields_ship_and_unmarked_ones_wait() {
    let nodes = Embedded::following("m");
    let options = WriterOptions {
        mode: Mode::Manual,
        ..WriterOptions::default()
    };
    let region = nodes.writer("m", 16384, &options);
    let reader = nodes.reader(16384);
    let quote = region.typed::<Quote>(0).expect("it is inside");
    quote.set(&Quote {
        bid: 1,
        ask: 2,
        name: [3; 16],
    });
    mark_field_changed!(region, Quote, ask).expect("it is inside");
    let shown = || {
        let seen = reader.read_at_epoch(|view| view.load::<Quote>(0)).ok()?;
        seen.0.ok()
    };
    await_that("the marked field is shown", || {
        shown().is_some_and(|quote| quote.ask == 2)
    });
    let quote = shown().expect("an epoch can be read");
    assert_eq!(
        (quote.bid, quote.name),
        (0, [0; 16]),
        "only marks are looked at"
    );
    mark_field_changed!(region, 0, Quote, name).expect("it is inside");
    await_that("the other field follows", || {
        shown().is_some_and(|quote| quote.name == [3; 16])
    });
    assert!(region.mark_region_changed(16000, 385).is_err());
    assert!(region.mark_region_changed(u64::MAX, 2).is_err());

    // More marks than the ring holds are not lost.
    for at in 0..2 * uffd_sync::limits::MARK_RING_SLOTS {
        let offset = 32 + at % 16000;
        region.write(offset, &[0xCC]).expect("it is inside");
        region.mark_region_changed(offset, 1).expect("it is inside");
    }
    await_that("all marked bytes are shown", || {
        let seen = reader.read_at_epoch(|view| view.to_vec());
        seen.is_ok_and(|(bytes, _)| {
            let end = 32 + 2 * uffd_sync::limits::MARK_RING_SLOTS as usize;
            bytes[32..end].iter().all(|byte| *byte == 0xCC)
        })
    });
}

#[test]
fn a_thread_that_holds_a_guard_cannot_wait_for_itself() {
    let nodes = Embedded::following("g");
    let region = nodes.writer("g", 4096, &commit_options());
    let guard = region.write_guard().expect("a guard");
    let refused = region.commit(PATIENCE);
    assert!(matches!(refused, Err(RegionError::OwnGuard)), "{refused:?}");
    region.write(9, b"guarded").expect("it is inside");
    let epoch = guard.commit(PATIENCE).expect("a guard commits");
    assert_eq!(epoch.kind, EpochKind::Cut);
    // Another thread's guard keeps a commit waiting, not for ever.
    std::thread::scope(|scope| {
        let (told, holding) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let region = &region;
        scope.spawn(move || {
            let _guard = region.write_guard().expect("a guard");
            told.send(()).expect("the test listens");
            let _ = released.recv_timeout(PATIENCE);
        });
        holding
            .recv_timeout(PATIENCE)
            .expect("the other thread holds a guard");
        region.write(9, b"late").expect("it is inside");
        match region.commit(Duration::from_millis(100)) {
            Err(RegionError::TimedOut) => {}
            Ok(epoch) => assert_eq!(epoch.kind, EpochKind::Convergent),
            Err(other) => panic!("{other:?}"),
        }
        drop(release);
    });
    let epoch = region.commit(PATIENCE).expect("the engine answers");
    assert_eq!(epoch.kind, EpochKind::Cut);
}

#[test]
fn a_region_of_100_gib_costs_what_is_stored() {
    let size = 100 * GIB;
    let nodes = Embedded::following("sparse");
    let region = nodes.writer("sparse", size, &WriterOptions::default());
    let places = [0, 3 * GIB + 17, 57 * GIB - 2, size - 5];
    for (at, place) in places.iter().enumerate() {
        region
            .write(*place, &[at as u8 + 1; 5])
            .expect("it is inside");
    }
    let epoch = region.commit(PATIENCE).expect("the engine answers");
    let reader = nodes.reader(size);
    epoch
        .wait_acked(1, PATIENCE)
        .expect("the replica acknowledges");
    for (at, place) in places.iter().enumerate() {
        let mut bytes = [0; 5];
        let read = reader.read_at_epoch(|view| view.read(*place, &mut bytes));
        read.expect("an epoch can be read").0.expect("it is inside");
        assert_eq!(bytes, [at as u8 + 1; 5]);
    }
    // Looking at a hole allocates nothing, on either side.
    let mut hole = [1; 64];
    reader.read(40 * GIB, &mut hole).expect("it is inside");
    assert_eq!(hole, [0; 64]);
    region.read(41 * GIB, &mut hole).expect("it is inside");
    let most = 8 * MIB;
    let resident = memfd::resident_bytes(region.data_fd()).expect("a memfd");
    assert!(resident <= most, "{resident} bytes in the region");
    for (node, name) in [(&nodes.source, "sparse"), (&nodes.follower, "copy")] {
        let status = status_of(node, name).expect("it is there");
        assert!(
            status.resident_bytes <= most,
            "{name}: {} bytes",
            status.resident_bytes
        );
        assert!(
            status.overhead_bytes <= 2 * most,
            "{name}: {} beside",
            status.overhead_bytes
        );
    }
}

#[test]
fn a_one_byte_region_works() {
    let nodes = Embedded::following("tiny");
    let region = nodes.writer("tiny", 1, &commit_options());
    let reader = nodes.reader(1);
    for value in 1..=50u8 {
        region.write(0, &[value]).expect("it is inside");
        let epoch = region.commit(PATIENCE).expect("the engine answers");
        epoch
            .wait_acked(1, PATIENCE)
            .expect("the replica acknowledges");
        let seen = reader
            .read_at_epoch(|view| view.to_vec())
            .expect("an epoch can be read");
        assert_eq!(seen.0, [value]);
    }
    assert!(region.write(1, &[1]).is_err());
    assert!(region.write(0, &[1, 2]).is_err());
}

#[test]
fn an_epoch_of_nothing_is_none() {
    let nodes = Embedded::following("same");
    let region = nodes.writer("same", 65536, &commit_options());
    region.write(0, &[5; 100]).expect("it is inside");
    let first = region.commit(PATIENCE).expect("the engine answers");
    // The same bytes again: a page is dirty and nothing differs.
    region.write(0, &[5; 100]).expect("it is inside");
    let second = region.commit(PATIENCE).expect("the engine answers");
    assert_eq!(second.number, first.number);
    assert_eq!(second.kind, EpochKind::Cut);
}

#[test]
fn a_dropped_writer_leaves_its_content_to_the_next() {
    let nodes = Embedded::following("life");
    for publish in [Publish::Commit, Publish::Timer] {
        let options = WriterOptions {
            publish,
            ..WriterOptions::default()
        };
        let region = nodes.writer("life", 65536, &options);
        let reader = nodes.reader(65536);
        let text = format!("stored before the end, {publish}");
        region.write(70, text.as_bytes()).expect("it is inside");
        drop(region);
        await_that("the last stores are shipped", || {
            let mut bytes = vec![0; text.len()];
            let read = reader.read_at_epoch(|view| view.read(70, &mut bytes));
            read.is_ok() && bytes == text.as_bytes()
        });
        await_that("the region waits for a writer", || {
            status_of(&nodes.source, "life").is_some_and(|region| region.state == "orphaned")
        });
        let next = nodes.writer("life", 65536, &options);
        assert!(next.is_resumed());
        let mut bytes = vec![0; text.len()];
        next.read(70, &mut bytes).expect("it is inside");
        assert_eq!(bytes, text.as_bytes());
        let other_size =
            Writer::create_over(connect(&nodes.source), "life", 4096, &options).map(drop);
        assert!(other_size.is_err(), "two writers of one region");
        drop(next);
        connect(&nodes.source)
            .remove("life")
            .expect("nobody writes it");
    }
}

#[test]
fn many_small_regions_live_on_one_node() {
    uffd_sync::sys::process::raise_fd_limit();
    // Three descriptors each, in this one process that other tests share.
    let count = if long() { 4_000 } else { 200 };
    let nodes = Embedded::following("r0");
    let mut node = connect(&nodes.source);
    for index in 0..count {
        node.create_held(&format!("r{index}"), 100, index % 2 == 0)
            .expect("a region");
    }
    for index in 0..count {
        let text = index.to_string();
        node.write_held(&format!("r{index}"), 3, text.as_bytes())
            .expect("it is inside");
    }
    let status = node.status().expect("a status");
    assert_eq!(status.regions.len(), count);
    assert!(status.regions.iter().all(|region| region.epoch == 1));
    let address = nodes.source.listen_address().expect("it listens");
    let mut follower = connect(&nodes.follower);
    for index in (2..20).step_by(2) {
        follower
            .follow(&format!("tcp://{address}/r{index}"))
            .expect("it can be followed");
    }
    await_that("all replicas follow", || {
        let regions = follower.status().expect("a status").regions;
        regions.len() == 10 && regions.iter().all(|region| region.epoch == 1)
    });
    let last = Reader::attach_over(connect(&nodes.follower), "r18").expect("it can be read");
    let bytes = last
        .read_at_epoch(|view| view.to_vec())
        .expect("an epoch can be read")
        .0;
    assert_eq!(&bytes[..6], b"\0\0\x0018\0");
    for index in 0..count {
        node.remove(&format!("r{index}")).expect("it is there");
    }
    assert!(node.status().expect("a status").regions.is_empty());
}
