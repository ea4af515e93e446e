//! Hand-overs whose descriptors are right and belong to something else, that never come
//! whole, or for which the node has no descriptors left.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use uffd_sync::sys::net;
use uffd_sync::wire::control::{self, Request, Response};
use uffd_sync::words::{LossKind, Mode, Publish};

use super::bad_input::{OFFERED, Offer, ask, invalid, open_fds};
use super::deeds::pages;
use super::nodes::{BINARY, NodeProcess, PATIENCE, await_content, await_that, folder};
use super::watched;
use super::writer::WriterProcess;

/// A process that does nothing, killed when dropped.
struct Idle(std::process::Child);

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_page_map_or_an_address_of_something_else_is_refused() {
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let offer = Offer::new();
    let mut command = Command::new("sleep");
    let idle = Idle(
        command
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .expect("sleep"),
    );
    let other = File::open(format!("/proc/{}/pagemap", idle.0.id())).expect("our child");
    let other = OwnedFd::from(other);
    let mut fds = offer.fds();
    fds[4] = other.as_fd();
    let message = invalid(ask(&node, &Request::HandOver(offer.request()), &fds));
    assert!(message.contains("not registered"), "{message}");
    let base = offer.request().base;
    for elsewhere in [
        base + pages(1),
        base - pages(1),
        pages(16),
        base + (1 << 40),
    ] {
        let mut request = offer.request();
        request.base = elsewhere;
        let request = Request::HandOver(request);
        let message = invalid(ask(&node, &request, &offer.fds()));
        // No process has memory as far away as the last.
        let named = ["not registered", "cannot be scanned"];
        assert!(named.iter().any(|text| message.contains(text)), "{message}");
    }
    assert!(node.status().regions.is_empty());
}

#[test]
fn a_place_that_is_another_regions_is_found_by_the_audit() {
    let folder = folder();
    let node = watched::source(folder.path(), 1_000);
    let follow = [format!("tcp://{}/offered", node.listen())];
    let follower = NodeProcess::follower(folder.path(), "follower", &follow);
    let (offer, other) = (Offer::new(), Offer::new());
    let mut request = offer.request();
    request.base = other.request().base;
    // One link for the life of the region, as a writer has it.
    let link = net::unix_connect(node.socket()).expect("the node listens");
    let bytes = control::encode(&Request::HandOver(request), b"").expect("short");
    net::send_with_fds(&link, &bytes, &offer.fds()).expect("a request");
    let mut expected = vec![0; OFFERED as usize];
    await_content(&follower, "offered", &expected);
    offer
        .region
        .write(9_000, b"not where it is looked for")
        .expect("inside");
    expected[9_000..9_026].copy_from_slice(b"not where it is looked for");
    await_content(&follower, "offered", &expected);
    let losses = node.region("offered").expect("it is there").losses;
    assert!(
        losses.iter().any(|loss| loss.kind == LossKind::UnseenWrite),
        "{losses:?}"
    );
    drop(link);
}

#[test]
fn clients_that_go_before_their_hand_over_leave_nothing() {
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let offer = Offer::new();
    let bytes = control::encode(&Request::HandOver(offer.request()), b"").expect("short");
    let before = open_fds(&node);
    for round in 0..60 {
        let socket = net::unix_connect(node.socket()).expect("the node listens");
        match round % 3 {
            // Connected, and gone.
            0 => {}
            // The descriptors came, the rest of the request never does.
            1 => drop(net::send_with_fds(&socket, &bytes[..20], &offer.fds())),
            // All was sent, and nobody waits for the answer.
            _ => drop(net::send_with_fds(&socket, &bytes, &offer.fds())),
        }
    }
    await_that("what they left is closed", || {
        // The last of them may have made a region, whose writer is gone.
        let regions = node.status().regions;
        open_fds(&node) <= before + 16 * regions.len() && regions.len() <= 1
    });
    let answer = ask(&node, &Request::HandOver(offer.request()), &offer.fds());
    assert!(
        matches!(answer, Some(Response::HandedOver { .. })),
        "{answer:?}"
    );
}

#[test]
fn a_node_without_descriptors_refuses_and_goes_on() {
    let folder = folder();
    let socket = folder.path().join("node.sock");
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "ulimit -n 40 && exec \"$0\" serve --name node --socket \"$1\"",
        ])
        .arg(BINARY)
        .arg(&socket);
    let node = NodeProcess::start_by(command, "node", socket.clone());
    let mut first =
        WriterProcess::with_region(&socket, "first", OFFERED, Mode::Async, Publish::Timer);
    // Connections that each take a descriptor, until a hand-over finds none for its own.
    let mut held: Vec<UnixStream> = Vec::new();
    let offer = Offer::new();
    let request = control::encode(&Request::HandOver(offer.request()), b"").expect("short");
    let refused = |held: &mut Vec<UnixStream>| {
        let socket = net::unix_connect(node.socket()).expect("the kernel queues it");
        net::set_timeouts(&socket, Some(PATIENCE / 10), Some(PATIENCE)).expect("a socket");
        held.push(UnixStream::connect(node.socket()).expect("the kernel queues it"));
        let _ = net::send_with_fds(&socket, &request, &offer.fds());
        let mut piece = [0; 4096];
        let got = net::recv_with_fds(&socket, &mut piece, 8, net::Blocking::Yes);
        // Refused by an answer, by the end of the connection, or not even accepted.
        !got.is_ok_and(|got| String::from_utf8_lossy(&piece[..got.bytes]).contains("handed_over"))
    };
    let enough = (0..40).position(|_| refused(&mut held));
    assert!(
        enough.is_some(),
        "forty descriptors were enough for everything"
    );
    drop(held);
    await_that("the node answers again", || {
        uffd_sync::client::Node::connect(node.socket()).is_ok_and(|mut node| node.status().is_ok())
    });
    first.write(100, b"still followed");
    let before = node.region("first").expect("it is there").epoch;
    let (epoch, _) = first.commit(0);
    assert!(epoch >= before);
    assert_eq!(node.region("first").expect("it is there").losses, []);
}
