//! The service before the exports: TCP, how many are served, what is counted, and replies
//! that wait for a replica.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use uffd_sync::space::frame::{Operation, Status};

use super::pattern;
use super::tools::{Tool, are_missing};
use crate::nodes::{NodeProcess, PATIENCE, await_that, folder, run_on};
use crate::space::servers::{Servers, own_address};
use crate::space::wire::Wire;

const SEGMENT: u64 = 1 << 20;

/// A client of a few lines that has chosen an export, or tries to.
struct Raw(UnixStream);

impl Raw {
    fn silent(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("somebody listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        Self(stream)
    }

    /// None if it was turned away.
    fn connect(path: &Path, export: &str) -> Option<Self> {
        let mut raw = Self::silent(path);
        raw.0.read_exact(&mut [0; 18]).ok()?;
        let len = export.len() as u32;
        let choice = [
            &[0, 0, 0, 3][..],
            b"IHAVEOPT",
            &[0, 0, 0, 1],
            &len.to_be_bytes(),
        ]
        .concat();
        raw.0.write_all(&choice).ok()?;
        raw.0.write_all(export.as_bytes()).ok()?;
        raw.0.read_exact(&mut [0; 10]).ok()?;
        Some(raw)
    }

    fn read_five(&mut self) -> [u8; 5] {
        let request = [&[0x25, 0x60, 0x95, 0x13][..], &[0; 20], &[0, 0, 0, 5]].concat();
        self.0.write_all(&request).expect("sent");
        let mut reply = [0; 21];
        self.0.read_exact(&mut reply).expect("a reply");
        assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        reply[16..].try_into().expect("five bytes")
    }

    fn has_ended(&mut self) -> bool {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).is_ok()
    }
}

fn node_with_a_region(folder: &Path) -> (NodeProcess, PathBuf) {
    let socket = folder.join("nbd.sock");
    let place = format!("unix:{}", socket.display());
    let node = NodeProcess::start(folder, "node", &["--nbd", &place]);
    assert_eq!(
        run_on(&node, "region create r --size 4096", &[]).code,
        Some(0)
    );
    assert_eq!(
        run_on(&node, "region write r --offset 0", b"bytes").code,
        Some(0)
    );
    (node, socket)
}

#[test]
fn one_too_many_is_turned_away_and_nobody_else() {
    let folder = folder();
    let (node, socket) = node_with_a_region(folder.path());
    let connect = || Raw::connect(&socket, "r");
    let mut clients: Vec<_> = (0..256).map(|_| connect().expect("a place")).collect();
    assert!(connect().is_none(), "the 257th");
    for client in &mut clients {
        assert_eq!(&client.read_five(), b"bytes");
    }
    let nbd = node.status().nbd.expect("it serves NBD");
    assert_eq!((nbd.clients, nbd.turned_away), (256, 1));
    assert_eq!(
        (nbd.exports[0].connections, nbd.exports[0].requests),
        (256, 256)
    );
    drop(clients.pop());
    await_that("a place that is free again", || connect().is_some());
    assert_eq!(&clients[0].read_five(), b"bytes");
}

#[test]
fn the_silent_keep_nobody_out() {
    let folder = folder();
    let (node, socket) = node_with_a_region(folder.path());
    let mut silent: Vec<_> = (0..64).map(|_| Raw::silent(&socket)).collect();
    await_that("all of them", || {
        node.status().nbd.is_some_and(|nbd| nbd.clients == 64)
    });
    let mut client = Raw::connect(&socket, "r").expect("a place");
    assert_eq!(&client.read_five(), b"bytes");
    assert!(silent[0].has_ended(), "the one that was silent for longest");
    // Nor do they stay.
    for client in &mut silent {
        assert!(client.has_ended());
    }
    assert_eq!(
        &client.read_five(),
        b"bytes",
        "who has chosen may be silent"
    );
}

#[test]
fn the_space_over_tcp_and_its_figures() {
    if are_missing(&["nbdcopy", "nbdsh"]) {
        return;
    }
    let mut servers = Servers::planned(2, SEGMENT, "");
    let host = own_address();
    servers.start_one(0, &["--nbd", &format!("tcp://{host}")]);
    servers.start_one(1, &[]);
    let image = servers.folder().join("in.raw");
    let bytes = pattern(2 * SEGMENT);
    fs::write(&image, &bytes).expect("written");
    let uri = |export: &str| format!("nbd://{host}/{export}");
    Tool::new("nbdcopy").arg(&image).arg(uri("all")).succeeds();
    let back = servers.folder().join("out.raw");
    Tool::new("nbdcopy").arg(uri("")).arg(&back).succeeds();
    assert!(fs::read(&back).expect("read") == bytes);
    let script = format!(
        "h.set_strict_mode(0)\nh.connect_uri('{}')\n\
         try: h.pread(1, {SEGMENT})\nexcept nbd.Error as e: assert e.errno == 'EINVAL'",
        uri("server-1")
    );
    Tool::new("nbdsh").args(["-c", &script]).succeeds();
    let output = servers
        .command()
        .args(["space", "stat", "--json", "--config"])
        .arg(servers.file())
        .output()
        .expect("ends");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("\"server-1\""), "{said}");
    let nbd = servers.server(0).status().nbd.expect("it serves NBD");
    let of_space = servers.server(0).status().space.expect("a space").nbd;
    assert_eq!(
        of_space.map(|nbd| nbd.exports.len()),
        Some(nbd.exports.len())
    );
    let errors: Vec<_> = nbd
        .exports
        .iter()
        .map(|one| (&*one.name, one.errors))
        .collect();
    assert_eq!(errors, [("all", 0), ("server-1", 1)]);
    assert!(nbd.exports[0].connected >= 2 && nbd.exports[0].requests > 2);
    assert!(servers.server(1).status().nbd.is_none());
}

/// A server whose replies wait for a replica, with NBD on a Unix socket.
struct Replicated {
    servers: Servers,
    replica: NodeProcess,
    _there: tempfile::TempDir,
}

impl Replicated {
    fn start(deadline_ms: u64) -> Self {
        let more = format!("durability = \"replica\"\n[limits]\ndeadline_ms = {deadline_ms}\n");
        let mut servers = Servers::planned(1, SEGMENT, &more);
        let host = servers.address(0);
        let host = host.split_once(':').expect("a port").0;
        let listen = format!("{host}:7422");
        let socket = format!("unix:{}", servers.folder().join("nbd.sock").display());
        servers.start_one(0, &["--listen", &listen, "--nbd", &socket]);
        let there = folder();
        let source = format!("tcp://{listen}/space-s0=copy");
        let replica = NodeProcess::follower(there.path(), "replica", &[source]);
        let started = Self {
            servers,
            replica,
            _there: there,
        };
        started.await_replica();
        started
    }

    fn await_replica(&self) {
        let (mut wire, _) = Wire::greeted(&self.servers, 0);
        await_that("the replica to acknowledge", || {
            wire.ask(Operation::Fill, 0, 1, &[1]).0.status == Status::Done
        });
    }

    fn changes(&self) -> u64 {
        self.servers
            .server(0)
            .status()
            .space
            .expect("a space")
            .changes
    }

    fn path(&self, name: &str) -> PathBuf {
        self.servers.folder().join(name)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///all?socket={}", self.path("nbd.sock").display())
    }
}

#[test]
fn a_reply_waits_for_the_replica() {
    if are_missing(&["nbdsh"]) {
        return;
    }
    let running = Replicated::start(60_000);
    let before = running.changes();
    running.replica.signal(Signal::SIGSTOP);
    let done = running.path("done");
    let script = format!(
        "h.connect_uri('{}'); h.pwrite(b'kept', 8192); open('{}', 'w').close(); \
         assert h.pread(4, 8192) == b'kept'",
        running.uri(),
        done.display()
    );
    let writing = Tool::new("nbdsh").args(["-c", &script]).start();
    await_that("the write to be made", || running.changes() > before);
    // As long as the replica stands still, whatever else is answered.
    for _ in 0..100 {
        assert!(running.changes() > before && !done.exists());
    }
    running.replica.signal(Signal::SIGCONT);
    writing.succeeds();
}

#[test]
fn a_late_replica_is_an_error() {
    if are_missing(&["nbdsh"]) {
        return;
    }
    let running = Replicated::start(500);
    running.replica.signal(Signal::SIGSTOP);
    let script = format!(
        r#"
h.connect_uri("{}")
for call in (lambda: h.pwrite(b"alone", 8192), lambda: h.zero(512, 0)):
    try:
        call()
        raise SystemExit("nobody has acknowledged it")
    except nbd.Error as error:
        assert error.errno == "EIO", error.errno
assert h.pread(5, 8192) == b"alone"
"#,
        running.uri()
    );
    Tool::new("nbdsh").args(["-c", &script]).succeeds();
    let status = running.servers.server(0).status();
    let exports = status.nbd.expect("it serves NBD").exports;
    assert_eq!((&*exports[0].name, exports[0].errors), ("all", 2));
    running.replica.signal(Signal::SIGCONT);
    running.await_replica();
    let script = format!(
        "h.connect_uri('{}'); h.pwrite(b'kept', 8192)",
        running.uri()
    );
    Tool::new("nbdsh").args(["-c", &script]).succeeds();
}
