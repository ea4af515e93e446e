//! What is seen of a server: status, metrics, the log of operations.

use uffd_sync::space::frame::{Operation, Status};

use super::servers::Servers;
use super::wire::Wire;
use crate::nodes::{await_some, folder};

const MIB: u64 = 1 << 20;

#[test]
fn a_server_shows_how_it_goes_and_logs_what_it_did() {
    let logs = folder();
    let path = logs.path().join("space.log");
    let servers = Servers::start(1, MIB, &format!("[log]\npath = {path:?}\n"));
    let (mut wire, life) = Wire::greeted(&servers, 0);
    wire.ask(Operation::Write, 4096, 3, b"abc");
    let (reply, _) = wire.ask(Operation::Read, MIB, 1, b"");
    assert_eq!(reply.status, Status::OutOfRange);
    let (_, json) = wire.ask(Operation::Stat, 0, 0, b"");
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(json["incarnation"], life.to_string());
    assert_eq!(
        (&json["operations"], &json["refused"]),
        (&1.into(), &1.into())
    );

    let space = servers.server(0).status().space.expect("a space");
    assert_eq!(
        (space.server.as_str(), space.clients, space.written_bytes),
        ("s0", 1, 3)
    );
    let shown = servers
        .command()
        .args(["status", "--socket"])
        .arg(servers.server(0).socket())
        .output()
        .expect("ends");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(
        shown.contains("s0") && shown.contains(&life.to_string()),
        "{shown}"
    );

    let own = logs.path().join("space-s0.log");
    let lines = await_some("two lines in the log", || {
        let text = std::fs::read_to_string(&own).ok()?;
        (text.lines().count() >= 2).then_some(text)
    });
    let lines: Vec<_> = lines.lines().collect();
    assert!(lines[0].ends_with(" Write 4096 3 Done"), "{lines:?}");
    assert!(
        lines[1].ends_with(" Read 1048576 1 OutOfRange"),
        "{lines:?}"
    );
}
