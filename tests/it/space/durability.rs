//! `durability = "replica"`: what was acknowledged is there after the server was killed.

use uffd_sync::space::frame::{HAS_MAPPING, HAS_REPLICA, Hello, Operation, Status, WANTS_MAPPING};
use uffd_sync::wire::control::RegionStatus;

use super::servers::Servers;
use super::wire::{Wire, hello};
use crate::nodes::{NodeProcess, await_some, await_that, folder, long};
use crate::proxy::{Proxy, Verdict};

const MIB: u64 = 1 << 20;
const REPLICATED: &str = "durability = \"replica\"\n[limits]\ndeadline_ms = 4000\n";

/// A server that others may follow, at a port that stays.
fn listen(servers: &Servers) -> String {
    let host = servers.address(0);
    let host = host.split_once(':').expect("a port").0;
    format!("{host}:7422")
}

fn follower(servers: &Servers, folder: &std::path::Path) -> NodeProcess {
    let source = format!("tcp://{}/space-s0=copy", listen(servers));
    NodeProcess::follower(folder, "replica", &[source])
}

/// Writes the numbers behind `before`, which is there, until the server is gone; says the
/// last one that was acknowledged and the last one that was sent.
fn write_until_killed(mut wire: Wire, offset: u64, before: u64) -> (u64, u64) {
    let mut acknowledged = before;
    for value in before + 1.. {
        let mut cell = [0; 512];
        for word in cell.chunks_exact_mut(8) {
            word.copy_from_slice(&u64::to_le_bytes(value));
        }
        let mut bytes = super::wire::request(Operation::Write, offset, 512)
            .encode(&cell)
            .to_vec();
        bytes.extend(cell);
        if wire.put(&bytes).is_err() {
            return (acknowledged, value);
        }
        match wire.try_receive() {
            Ok((reply, _)) if reply.status == Status::Done => acknowledged = value,
            Ok((reply, _)) => assert_eq!(reply.status, Status::NotAcknowledged),
            Err(_) => return (acknowledged, value),
        }
    }
    unreachable!("the server is killed")
}

/// Kills and recovers again and again, under load.
#[test]
fn nothing_acknowledged_is_lost_with_the_server() {
    let mut servers = Servers::planned(1, MIB, REPLICATED);
    let listen = listen(&servers);
    servers.start_one(0, &["--listen", &listen]);
    let there = folder();
    let replica = follower(&servers, there.path());
    let source = format!("tcp://{}/copy", replica.listen());
    let first = Wire::tcp(&servers, 0).greet(&hello(&servers, 0));
    assert_eq!(first.flags & HAS_REPLICA, HAS_REPLICA);
    let mut values = [0; 4];
    for round in 0..if long() { 20 } else { 3 } {
        await_that("the replica to acknowledge", || {
            let (mut wire, _) = Wire::greeted(&servers, 0);
            wire.ask(Operation::Fill, MIB - 8, 1, &[round]).0.status == Status::Done
        });
        let cells: Vec<_> = (0..4u64)
            .map(|at| {
                let (wire, _) = Wire::greeted(&servers, 0);
                let before = values[at as usize];
                std::thread::spawn(move || write_until_killed(wire, at * 4096, before))
            })
            .collect();
        await_some("changes", || {
            let space = servers.server(0).status().space?;
            (space.changes > 200 + u64::from(round)).then_some(())
        });
        servers.kill(0);
        let written: Vec<_> = cells
            .into_iter()
            .map(|cell| cell.join().expect("a client's thread"))
            .collect();
        servers.start_one(0, &["--listen", &listen, "--recover", &source]);
        let (mut wire, life) = Wire::greeted(&servers, 0);
        assert_eq!(life, first.incarnation, "the same life goes on");
        for (at, (acknowledged, sent)) in written.into_iter().enumerate() {
            let (_, cell) = wire.ask(Operation::Read, at as u64 * 4096, 512, b"");
            let words: Vec<_> = cell
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().expect("eight")))
                .collect();
            assert!(
                words.iter().all(|word| *word == words[0]),
                "torn: {words:?}"
            );
            assert!(
                (acknowledged..=sent).contains(&words[0]),
                "{} after {acknowledged} was acknowledged and {sent} sent",
                words[0]
            );
            values[at] = words[0];
        }
    }
}

/// A reply waits for one replica: the other one may have missed what was acknowledged.
#[test]
fn of_several_replicas_the_newest_is_taken() {
    let mut servers = Servers::planned(1, MIB, REPLICATED);
    let listen = listen(&servers);
    servers.start_one(0, &["--listen", &listen]);
    let there = folder();
    let proxies = [0, 1].map(|_| Proxy::to(listen.parse().expect("an address")));
    let replicas: Vec<_> = proxies
        .iter()
        .enumerate()
        .map(|(at, proxy)| {
            let source = proxy.source_of("space-s0=copy");
            NodeProcess::follower(there.path(), &format!("replica{at}"), &[source])
        })
        .collect();
    let recover: Vec<_> = replicas
        .iter()
        .map(|replica| format!("tcp://{}/copy", replica.listen()))
        .collect();
    let life = Wire::greeted(&servers, 0).1;
    for (round, late) in proxies.iter().enumerate() {
        let copies = || replicas.iter().filter_map(|replica| replica.region("copy"));
        let source = servers.server(0).region("space-s0").expect("the segment");
        await_that("both to follow", || {
            let following = |copy: &RegionStatus| {
                copy.state == "following" && copy.generation == source.generation
            };
            copies().filter(following).count() == 2
        });
        late.judge(|frame| match frame.is_update() {
            true => Verdict::CutAfter(0),
            false => Verdict::Pass,
        });
        let (mut wire, _) = Wire::greeted(&servers, 0);
        let value = [round as u8 + 1; 8];
        let (reply, _) = wire.ask(Operation::Write, 4096, 8, &value);
        assert_eq!(reply.status, Status::Done);
        servers.kill(0);
        let epochs: Vec<_> = copies().map(|copy| copy.epoch).collect();
        assert!(epochs[round] < epochs[1 - round], "{epochs:?}");
        late.pass();
        let all = ["--recover", &recover[0], "--recover", &recover[1]];
        servers.start_one(0, &[&["--listen", &listen], &all[..]].concat());
        let (mut wire, found) = Wire::greeted(&servers, 0);
        assert_eq!(found, life, "the same life goes on");
        assert_eq!(wire.ask(Operation::Read, 4096, 8, b"").1, value);
    }
}

#[test]
fn what_may_still_be_lost_is_not_mapped() {
    let mut servers = Servers::planned(1, MIB, REPLICATED);
    let listen = listen(&servers);
    servers.start_one(0, &["--listen", &listen]);
    let wants = Hello {
        flags: WANTS_MAPPING,
        ..hello(&servers, 0)
    };
    let welcome = Wire::unix(&servers, 0).greet(&wants);
    assert_eq!(welcome.flags & HAS_MAPPING, 0);
}

#[test]
fn without_a_replica_clients_are_told_so() {
    let mut servers = Servers::planned(1, MIB, &REPLICATED.replace("4000", "400"));
    let listen = listen(&servers);
    servers.start_one(0, &["--listen", &listen]);
    let (mut wire, _) = Wire::greeted(&servers, 0);
    let (reply, _) = wire.ask(Operation::Write, 0, 5, b"alone");
    assert_eq!(reply.status, Status::NotAcknowledged);
    let (reply, body) = wire.ask(Operation::Read, 0, 5, b"");
    assert_eq!((reply.status, &body[..]), (Status::Done, &b"alone"[..]));
    let space = servers.server(0).status().space.expect("a space");
    assert_eq!(
        (space.unacknowledged, &space.durability[..]),
        (1, "replica")
    );

    let there = folder();
    let _replica = follower(&servers, there.path());
    await_that("the replica to acknowledge", || {
        wire.ask(Operation::Write, 0, 5, b"never").0.status == Status::Done
    });
}

#[test]
fn a_replica_of_something_else_is_not_taken_over() {
    let mut servers = Servers::planned(1, MIB, REPLICATED);
    let listen = listen(&servers);
    let output = servers
        .serve_command("s0", &[])
        .output()
        .expect("ends at once");
    assert_eq!(output.status.code(), Some(2), "no --listen: {output:?}");
    let there = folder();
    let other = NodeProcess::source(there.path(), "other");
    other
        .connect()
        .create_held("copy", 4096, true)
        .expect("made");
    let source = format!("tcp://{}/copy", other.listen());
    let refused = servers
        .serve_command("s0", &["--listen", &listen, "--recover", &source])
        .output()
        .expect("ends");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("its size is not that of a segment"), "{said}");
    servers.start_one(0, &["--listen", &listen]);
}
