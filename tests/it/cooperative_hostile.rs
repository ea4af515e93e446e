//! Cooperative regions and what is not as it should be: descriptors and places of others,
//! stores that no seal forbids, too many writers.

use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;

use uffd_sync::client::{Node, Writer};
use uffd_sync::region::{Region, RegionOptions};
use uffd_sync::sys::net;
use uffd_sync::track::Attachment;
use uffd_sync::units::MIB;
use uffd_sync::wire::control::{self, HandOver, Request, Response};
use uffd_sync::words::{LossKind, Mode, Publish, WriteKind};

use super::cooperative::{Crew, REGION, attached, terms};
use super::deeds::{Deed, pages};
use super::exact::may_be_exact;
use super::nodes::{NodeProcess, await_content, await_that, folder};
use super::watched;

fn found_by_the_audit(mode: Mode) {
    let folder = folder();
    let source = watched::source(folder.path(), 1_000);
    source
        .connect()
        .create_cooperative(REGION, MIB, true, terms(mode, Publish::Timer))
        .expect("a region");
    let mut writers = [attached(source.socket()), attached(source.socket())];
    let mut expected = vec![0; MIB as usize];
    writers[0].write(0, &[5; 40_000]);
    expected[..40_000].fill(5);
    await_content(&source, REGION, &expected);
    let unseen = |source: &NodeProcess| {
        let losses = source.region(REGION).expect("it is there").losses;
        let unseen = losses.iter().find(|it| it.kind == LossKind::UnseenWrite);
        unseen.map_or(0, |it| it.count)
    };
    await_that("it is captured", || {
        source
            .region(REGION)
            .is_some_and(|it| it.bytes_changed >= 40_000)
    });
    let deeds = [
        Deed::WriteFile {
            offset: 9_000,
            byte: 7,
        },
        Deed::MapAgain {
            offset: 500_000,
            byte: 8,
        },
        Deed::Punch {
            offset: pages(4),
            len: pages(1),
        },
    ];
    let changed = |source: &NodeProcess| source.region(REGION).map_or(0, |it| it.bytes_changed);
    for deed in deeds {
        let before = (unseen(&source), changed(&source));
        writers[1].deed(deed).expect("no seal forbids it");
        await_that("the audit finds it", || unseen(&source) > before.0);
        // What changes while the region is compared is found by that.
        await_that("it is compared", || changed(&source) > before.1);
    }
    // Where the hole is nothing is armed before everything is.
    writers[1].write(pages(4) + 7, b"into the hole");
    let rounds = || {
        let audit = source.region(REGION).and_then(|it| it.audit);
        audit.map_or(0, |it| it.mapping_rounds)
    };
    let enough = rounds() + 3;
    await_that("the mappings are looked at", || rounds() >= enough);
    let region = source.region(REGION).expect("it is there");
    assert_eq!(region.tracking, Some(mode), "{region:?}");
}

#[test]
fn what_the_seals_do_not_prevent_is_found_by_the_audit() {
    found_by_the_audit(Mode::Async);
    if may_be_exact() {
        found_by_the_audit(Mode::Sync);
    }
}

/// What a further writer hands over, to be made wrong.
struct Joiner {
    region: Region,
    attachment: Attachment,
}

impl Joiner {
    fn new(node: &NodeProcess, name: &str, arms: bool) -> Self {
        let socket = net::unix_connect(node.socket()).expect("the node listens");
        let request = Request::Enlist {
            name: name.to_owned(),
        };
        let bytes = control::encode(&request, b"").expect("short");
        net::send_with_fds(&socket, &bytes, &[]).expect("a request");
        let mut piece = [0; 4096];
        let got = net::recv_with_fds(&socket, &mut piece, 8, net::Blocking::Yes).expect("answer");
        let [data, page] = got.fds.try_into().expect("two descriptors");
        let options = RegionOptions {
            kind: WriteKind::Cooperative,
            ..RegionOptions::default()
        };
        let region = Region::attach(data, page, &options).expect("a mapping");
        let attachment = Attachment::for_region(region.mapping(), Mode::Async).expect("tracking");
        region.populate_first_page();
        if arms {
            attachment.arm().expect("it is registered");
        }
        Self { region, attachment }
    }

    fn offer(&self) -> HandOver {
        HandOver {
            name: REGION.into(),
            size: MIB,
            max_size: None,
            mode: Mode::Async,
            publish: Publish::Timer,
            shared: true,
            base: self.region.mapping().address(),
            interval_min_us: None,
            interval_max_us: None,
            chosen: None,
            kind: WriteKind::Cooperative,
            slot: None,
        }
    }

    fn fds(&self) -> [BorrowedFd<'_>; 5] {
        [
            self.region.data_fd(),
            self.region.control_fd(),
            self.attachment.pidfd.as_fd(),
            self.attachment.uffd.as_ref().expect("async").as_fd(),
            self.attachment.pagemap.as_ref().expect("async").as_fd(),
        ]
    }
}

#[test]
fn what_is_not_a_further_writers_is_refused() {
    let mut crew = Crew::new(MIB, Mode::Async, Publish::Timer, 1);
    let ask = |offer: HandOver, fds: &[BorrowedFd<'_>]| {
        super::bad_input::ask(&crew.source, &Request::HandOver(offer), fds)
    };
    let message = |answer: Option<Response>| match answer {
        Some(Response::Refused { message, .. }) => message,
        other => panic!("not refused: {other:?}"),
    };
    let good = Joiner::new(&crew.source, REGION, true);
    // Another region's memory, and one of its two halves.
    let mut node = crew.source.connect();
    node.create_cooperative("other", MIB, true, terms(Mode::Async, Publish::Timer))
        .expect("another region");
    let foreign = Joiner::new(&crew.source, "other", true);
    message(ask(foreign.offer(), &foreign.fds()));
    for half in 0..2 {
        let mut fds = good.fds();
        fds[half] = foreign.fds()[half];
        message(ask(good.offer(), &fds));
    }
    // Another userfaultfd, which does not have that mapping, or a page map of another process.
    let stranger = Attachment::for_region(foreign.region.mapping(), Mode::Async);
    drop(stranger.expect_err("a mapping has one userfaultfd"));
    let idle = Command::new("sleep").arg("60").spawn().expect("sleep");
    let idle = Idle(idle);
    let pagemap = std::fs::File::open(format!("/proc/{}/pagemap", idle.0.id())).expect("ours");
    let mut fds = good.fds();
    fds[4] = pagemap.as_fd();
    message(ask(good.offer(), &fds));
    // Not armed, other terms, a place that is another's, or none.
    let open = Joiner::new(&crew.source, REGION, false);
    let said = message(ask(open.offer(), &open.fds()));
    assert!(said.contains("arms all of its mapping"), "{said}");
    let mut others = [good.offer(), good.offer(), good.offer()];
    others[0].mode = Mode::Sync;
    others[1].publish = Publish::Commit;
    others[2].size = MIB / 2;
    for offer in others {
        let said = message(ask(offer, &good.fds()));
        assert!(said.contains("agreed"), "{said}");
    }
    for slot in [0, 32, u32::MAX] {
        let slot = Some(slot);
        let said = message(ask(
            HandOver {
                slot,
                ..good.offer()
            },
            &good.fds(),
        ));
        assert!(said.contains("another process's"), "{said}");
    }
    assert_eq!(crew.attachments().len(), 1);
    let answer = ask(good.offer(), &good.fds());
    assert!(
        matches!(answer, Some(Response::HandedOver { .. })),
        "{answer:?}"
    );
    crew.writers[0].write(3, b"unaffected");
    crew.await_equal();
}

/// A process that does nothing, killed when dropped.
struct Idle(std::process::Child);

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn there_are_only_so_many_writers() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    let mut node: Node = source.connect();
    node.create_cooperative(REGION, 4096, true, terms(Mode::Manual, Publish::Timer))
        .expect("a region");
    let most = uffd_sync::limits::MAX_WRITERS as usize;
    let mut writers: Vec<Writer> = (0..most)
        .map(|_| Writer::attach(source.socket(), REGION).expect("there is room"))
        .collect();
    let refused = Writer::attach(source.socket(), REGION).expect_err("there is none");
    assert!(refused.to_string().contains("writers already"), "{refused}");
    drop(writers.pop());
    await_that("there is room again", || {
        source
            .region(REGION)
            .is_some_and(|it| it.attachments.len() < most)
    });
    writers.push(Writer::attach(source.socket(), REGION).expect("room"));
}
