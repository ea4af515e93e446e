//! Mode `sync` and writers that mean harm, or are in the way without meaning it: what they
//! do to the descriptors they gave away, memory that is not the region's, coming and going
//! in the middle of cuts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use uffd_sync::client::Writer;
use uffd_sync::region::{Region, RegionOptions};
use uffd_sync::shm::SharedMemory;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::memfd::{self, Seals};
use uffd_sync::sys::net;
use uffd_sync::track::Attachment;
use uffd_sync::units::MIB;
use uffd_sync::wire::control::{self, HandOver, Request};
use uffd_sync::words::{LossKind, Mode, Publish, WriteKind};

use super::bad_input::{ask, invalid};
use super::cooperative::{REGION, attached, terms};
use super::deeds::{Deed, pages};
use super::exact::may_be_exact;
use super::nodes::{NodeProcess, await_content, await_that, folder, long};
use super::watched::Watched;
use super::writer::{More, Order, Report, WriterProcess};

/// A region with its hand-over in mode `sync`, done by hand.
struct Own {
    region: Region,
    attachment: Attachment,
    /// What is said to be the region's mapping.
    base: u64,
}

const SIZE: u64 = pages(1);
const MAX_SIZE: u64 = pages(64);

impl Own {
    /// `elsewhere` is registered in the place of the region's own mapping.
    fn new(elsewhere: Option<&Mapping>) -> Self {
        let options = RegionOptions {
            mode: Mode::Sync,
            max_size: Some(MAX_SIZE),
            ..RegionOptions::default()
        };
        let name = "own".parse().expect("a name");
        let region = Region::create(&name, SIZE, &options).expect("a region");
        let mapping = elsewhere.unwrap_or(region.mapping());
        let attachment = Attachment::for_region(mapping, Mode::Sync).expect("tracking");
        let base = mapping.address();
        Self {
            region,
            attachment,
            base,
        }
    }

    /// As its duplicate in the node then is as well.
    fn set_blocking(&self) {
        let uffd = self.attachment.uffd.as_ref().expect("mode sync");
        let flags = fcntl(uffd, FcntlArg::F_GETFL).expect("it is open");
        let flags = OFlag::from_bits_retain(flags) - OFlag::O_NONBLOCK;
        fcntl(uffd, FcntlArg::F_SETFL(flags)).expect("it is ours too");
    }

    fn offer(&self) -> HandOver {
        HandOver {
            name: "own".into(),
            size: SIZE,
            max_size: Some(MAX_SIZE),
            mode: Mode::Sync,
            publish: Publish::Timer,
            shared: true,
            base: self.base,
            interval_min_us: None,
            interval_max_us: None,
            chosen: None,
            kind: WriteKind::Exclusive,
            slot: None,
        }
    }

    fn fds(&self) -> [BorrowedFd<'_>; 5] {
        let attachment = &self.attachment;
        [
            self.region.data_fd(),
            self.region.control_fd(),
            attachment.pidfd.as_fd(),
            attachment.uffd.as_ref().expect("mode sync").as_fd(),
            attachment.pagemap.as_ref().expect("mode sync").as_fd(),
        ]
    }

    /// Hands it over; the link, which has to be kept.
    fn over(&self, node: &NodeProcess) -> OwnedFd {
        let link = net::unix_connect(node.socket()).expect("the node listens");
        let request = control::encode(&Request::HandOver(self.offer()), b"").expect("short");
        net::send_with_fds(&link, &request, &self.fds()).expect("a request");
        let mut piece = [0; 4096];
        let got = net::recv_with_fds(&link, &mut piece, 8, net::Blocking::Yes).expect("answer");
        let answer = String::from_utf8_lossy(&piece[..got.bytes]);
        assert!(answer.contains("handed_over"), "{answer}");
        link
    }
}

fn cuts_of(node: &NodeProcess, name: &str) -> u64 {
    let region = node.region(name);
    region.and_then(|it| it.exact).map_or(0, |it| it.cuts)
}

/// Processor time that a process has used, in ticks of the clock.
fn ticks_of(node: &NodeProcess) -> u64 {
    let path = format!("/proc/{}/stat", node.pid());
    let stat = std::fs::read_to_string(path).expect("it runs");
    let (_, fields) = stat.rsplit_once(") ").expect("its name");
    let mut fields = fields.split(' ').skip(11);
    let mut next = || fields.next().and_then(|it| it.parse::<u64>().ok());
    next().expect("user") + next().expect("system")
}

#[test]
fn a_userfaultfd_that_its_writer_makes_blocking_holds_nobody_up() {
    if !may_be_exact() {
        return;
    }
    let folder = folder();
    let mut node = NodeProcess::source(folder.path(), "node");
    let own = Arc::new(Own::new(None));
    own.set_blocking();
    let link = own.over(&node);
    await_that("cuts are made", || cuts_of(&node, "own") > 0);
    // By a thread that nobody waits for: without an answer it never ends.
    let store = |round: u64| {
        let own = Arc::clone(&own);
        std::thread::spawn(move || own.region.write(round, &[7]));
    };
    for round in 0..5 {
        // Cleared each time, while the thread sleeps in its poll or serves.
        own.set_blocking();
        let before = cuts_of(&node, "own");
        store(round);
        await_that("cuts go on", || cuts_of(&node, "own") > before);
    }
    // A descriptor that counts as broken would have the thread go round without a rest.
    own.set_blocking();
    store(9);
    let (before, begun) = (ticks_of(&node), Instant::now());
    await_that("three rounds of the audit", || {
        let audit = node.region("own").and_then(|it| it.audit);
        audit.is_some_and(|it| it.mapping_rounds >= 3)
    });
    let used = (ticks_of(&node) - before) as f64 / 100.0;
    let took = begun.elapsed();
    assert!(
        used < 0.5 * took.as_secs_f64() + 0.3,
        "{used} s of processor time in {took:?}"
    );
    own.set_blocking();
    drop(link);
    await_that("it is let go", || {
        node.region("own").is_some_and(|it| it.state == "orphaned")
    });
    assert!(node.is_alive());
}

#[test]
fn faults_of_memory_that_is_not_the_regions_kill_nobody() {
    if !may_be_exact() {
        return;
    }
    let folder = folder();
    let mut node = NodeProcess::source(folder.path(), "node");
    let fd = memfd::create("elsewhere", MAX_SIZE).expect("a memfd");
    let elsewhere = Mapping::shared(&fd, MAX_SIZE, Access::ReadWrite).expect("a mapping");
    let own = Own::new(Some(&elsewhere));
    let link = own.over(&node);
    let memory = SharedMemory::new(elsewhere);
    let stop = Arc::new(AtomicBool::new(false));
    for thread in 1..3 {
        let (memory, stop) = (memory.clone(), Arc::clone(&stop));
        // Nobody waits for them: if the node dies they wait until `own` ends.
        std::thread::spawn(move || {
            // Behind the end of what the region's file has.
            while !stop.load(Ordering::Relaxed) {
                for page in (thread..64).step_by(2) {
                    let word = memory.atomic_u64(pages(page));
                    word.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    let enough = if long() { 300 } else { 40 };
    await_that("many cuts, or its death", || {
        cuts_of_or_dead(&mut node) >= enough
    });
    assert!(node.is_alive(), "the node died of it:\n{}", node.tail());
    stop.store(true, Ordering::Relaxed);
    let region = node.region("own").expect("it answers");
    assert_eq!(region.size, SIZE);
    drop((link, own));
}

#[test]
fn huge_pages_that_may_be_missing_later_are_refused() {
    if !may_be_exact() {
        return;
    }
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let own = Own::new(None);
    let huge = match memfd::create_huge("huge", 2 * MIB) {
        Ok(huge) => huge,
        Err(error) => {
            super::refused_calls::skip(&error.to_string());
            return;
        }
    };
    let seals = Seals::FUTURE_WRITE | Seals::SHRINK | Seals::SEAL;
    memfd::add_seals(&huge, seals).expect("it is ours");
    let mut fds = own.fds();
    fds[0] = huge.as_fd();
    for (mode, kind) in [
        (Mode::Sync, WriteKind::Exclusive),
        (Mode::Async, WriteKind::Cooperative),
    ] {
        let offer = HandOver {
            size: 2 * MIB,
            max_size: None,
            mode,
            kind,
            ..own.offer()
        };
        let refused = invalid(ask(&node, &Request::HandOver(offer), &fds));
        assert!(refused.contains("huge_pages"), "{refused}");
    }
    assert!(node.status().regions.is_empty());
}

/// Cuts of the region; as many as there can be if the node is dead.
fn cuts_of_or_dead(node: &mut NodeProcess) -> u64 {
    if !node.is_alive() {
        return u64::MAX;
    }
    let Ok(mut client) = uffd_sync::client::Node::connect(node.socket()) else {
        return 0;
    };
    let status = client.status().ok();
    let region = status.and_then(|it| it.regions.into_iter().find(|it| it.name == "own"));
    region.and_then(|it| it.exact).map_or(0, |it| it.cuts)
}

/// Processes that live on and let the region go while cuts are made of all writers.
fn comes_and_goes(mode: Mode) {
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let mut client = node.connect();
    client
        .create_cooperative(REGION, 4 * MIB, true, terms(mode, Publish::Timer))
        .expect("a cooperative region");
    let mut steady = attached(node.socket());
    steady.send(&Order::Beat);
    await_that("captures run", || {
        node.region(REGION).is_some_and(|it| it.captures > 5)
    });
    let rounds = if long() { 2_000 } else { 150 };
    for round in 0..rounds {
        let guest = Writer::attach(node.socket(), REGION).expect("there is room");
        for page in 0..64 {
            let at = pages(page * 16) + 2_048;
            guest.write(at, &[round as u8]).expect("inside");
        }
        drop(guest);
    }
    let Report::Beaten { stores, .. } = steady.order(&Order::Stop) else {
        panic!("not the end of a beat");
    };
    assert!(stores > 0);
    let region = node.region(REGION).expect("it is there");
    assert_eq!(region.tracking, Some(mode), "{:?}", region.losses);
    let strange = region
        .losses
        .iter()
        .find(|it| it.kind != LossKind::LinkEnded);
    assert_eq!(strange, None);
    assert_eq!(region.attachments.len(), 1, "nobody else is left");
    let path = folder.path().join("dump");
    steady.carry_out(&Order::Dump { path: path.clone() });
    let content = std::fs::read(path).expect("the dump");
    await_content(&node, REGION, &content);
}

#[test]
fn writers_that_come_and_go_in_living_processes_cost_the_others_nothing() {
    if may_be_exact() {
        comes_and_goes(Mode::Sync);
    }
}

#[test]
fn writers_that_come_and_go_in_mode_async_leave_no_errors() {
    comes_and_goes(Mode::Async);
}

#[test]
fn nothing_stored_is_no_standstill_and_nothing_committed_is() {
    if !may_be_exact() {
        return;
    }
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let mut resting =
        WriterProcess::with_region(node.socket(), "resting", MIB, Mode::Sync, Publish::Timer);
    resting.write(5, b"the last for long");
    let mut holding =
        WriterProcess::with_region(node.socket(), "holding", MIB, Mode::Sync, Publish::Commit);
    holding.commit(0);
    holding.write(5, b"never committed");
    let standstill = |name| {
        let losses = node.region(name).expect("it is there").losses;
        losses
            .into_iter()
            .find(|it| it.kind == LossKind::Standstill)
    };
    await_that("the standstill is told", || standstill("holding").is_some());
    let told = standstill("holding").expect("just seen");
    assert!(told.reason.contains("has not committed"), "{told:?}");
    // It had nothing to do for as long.
    await_that("the other has rested for longer", || {
        let audit = node.region("resting").and_then(|it| it.audit);
        audit.is_some_and(|it| it.mapping_rounds >= 14)
    });
    assert_eq!(node.region("resting").expect("it is there").losses, []);
}

#[test]
fn a_mapping_that_goes_while_nothing_is_stored_is_noticed_in_mode_sync() {
    if !may_be_exact() {
        return;
    }
    let (offset, len) = (pages(16), pages(8));
    let day = 86_400_000;
    for deed in [
        Deed::MoveAway { offset, len },
        Deed::Unmap { offset, len },
        Deed::MapOver {
            offset,
            len,
            byte: 0xEE,
        },
    ] {
        let mut watched = Watched::audited(day, MIB, Mode::Sync, Publish::Timer, More::default());
        watched.deed(deed.clone());
        watched.await_loss(&[LossKind::Untracked]);
        if let Deed::MoveAway { .. } = deed {
            // What is stored there is followed all the same.
            watched.deed(Deed::StoreMoved {
                offset: pages(2) + 1,
                byte: 0xA7,
            });
            watched.expect(pages(18) + 1, &[0xA7]);
        }
        watched.store(pages(100), b"and beside it");
        watched.await_equal();
        let region = watched.region();
        assert_eq!(region.mode, Some(Mode::Sync));
        assert_eq!(region.tracking, Some(Mode::Compare), "{deed:?}");
        let refused = watched.source.connect().cut(super::watched::REGION);
        let refused = refused.expect_err("no cuts are made any more").to_string();
        assert!(refused.contains("unmapped, moved"), "{refused}");
    }
}

#[test]
fn the_audit_of_mappings_takes_nothing_in_use_for_gone() {
    if !may_be_exact() {
        return;
    }
    let mut watched = Watched::new(8 * MIB, Mode::Sync, Publish::Timer, More::default());
    watched.writer.send(&Order::Beat);
    let rounds = |watched: &Watched| {
        let audit = watched.region().audit.expect("it is audited");
        audit.mapping_rounds
    };
    let enough = rounds(&watched) + if long() { 15 } else { 5 };
    await_that("the audit gets round while pages are stored to", || {
        rounds(&watched) >= enough
    });
    let Report::Beaten { stores, .. } = watched.writer.order(&Order::Stop) else {
        panic!("not the end of a beat");
    };
    assert!(stores > 0);
    watched.expect_no_loss();
}
