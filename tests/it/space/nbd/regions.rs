//! Regions of a node by name, read by libnbd's and QEMU's tools.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use uffd_sync::client::{Writer, WriterOptions};
use uffd_sync::words::{Mode, Publish};

use super::pattern;
use super::tools::{Tool, are_missing};
use crate::nodes::{NodeProcess, await_following, await_that, folder, run_on};
use crate::space::servers::own_address;

const PAGE: u64 = 4096;
const SIZE: u64 = 64 * PAGE + 100;
const DEADLINE: Duration = Duration::from_secs(20);

/// A node that serves NBD on a Unix socket.
struct Served {
    node: NodeProcess,
    folder: TempDir,
}

impl Served {
    #[track_caller]
    fn start(more: &[&str]) -> Self {
        let folder = folder();
        let place = format!("unix:{}", folder.path().join("nbd.sock").display());
        let arguments = [&["--nbd", &place], more].concat();
        let node = NodeProcess::start(folder.path(), "node", &arguments);
        Self { node, folder }
    }

    fn uri(&self, export: &str) -> String {
        let socket = self.path("nbd.sock");
        format!("nbd+unix:///{export}?socket={}", socket.display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A region that this process writes, an epoch with each commit. Comparing needs
    /// nothing of the kernel.
    #[track_caller]
    fn writer(&self, name: &str, shared: bool) -> Writer {
        let options = WriterOptions {
            mode: Mode::Compare,
            publish: Publish::Commit,
            shared,
            ..WriterOptions::default()
        };
        Writer::create(self.node.socket(), name, SIZE, &options).expect("a region")
    }

    #[track_caller]
    fn run(&self, line: &str, input: &[u8]) {
        let ran = run_on(&self.node, line, input);
        assert_eq!(ran.code, Some(0), "{line}: {}", ran.stderr);
    }

    fn exports(&self, uri: &str) -> Vec<serde_json::Value> {
        let said = Tool::new("nbdinfo").args(["--list", "--json", uri]).says();
        let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        said["exports"].as_array().expect("a list").clone()
    }

    /// What `nbdinfo --map` shows of a context: lengths and types.
    #[track_caller]
    fn map(&self, export: &str, context: &str) -> Vec<(u64, u64)> {
        let map = format!("--map={context}");
        let said = Tool::new("nbdinfo")
            .args(["--json", &map, &self.uri(export)])
            .says();
        let said: Vec<serde_json::Value> = serde_json::from_str(&said).expect(&said);
        let number = |one: &serde_json::Value| one.as_u64().expect("a number");
        let extent = |one: &serde_json::Value| (number(&one["length"]), number(&one["type"]));
        said.iter().map(extent).collect()
    }
}

fn names(exports: &[serde_json::Value]) -> Vec<&str> {
    let name = |export: &'_ serde_json::Value| export["export-name"].as_str().map(str::len);
    assert!(exports.iter().all(|export| name(export).is_some()));
    let all = exports
        .iter()
        .filter_map(|export| export["export-name"].as_str());
    all.collect()
}

#[test]
fn regions_are_read_by_name_and_never_written() {
    if are_missing(&["nbdinfo", "nbdcopy", "nbdsh"]) {
        return;
    }
    let served = Served::start(&[]);
    assert_eq!(served.exports(&served.uri("")).len(), 0);
    let writer = served.writer("prices", false);
    let bytes = pattern(SIZE + 8)[..SIZE as usize].to_vec();
    writer.write(0, &bytes).expect("written");
    writer.commit(DEADLINE).expect("an epoch");
    served.run("region create held --size 8192", &[]);
    let exports = served.exports(&served.uri(""));
    assert_eq!(names(&exports), ["held", "prices"]);
    for export in &exports {
        assert_eq!(export["is_read_only"], true, "{export}");
    }
    assert_eq!(exports[1]["export-size"], SIZE);
    let copy = served.path("copy");
    Tool::new("nbdcopy")
        .arg(served.uri("prices"))
        .arg(&copy)
        .succeeds();
    assert!(fs::read(&copy).expect("read") == bytes);
    let script = format!(
        r#"
h.set_strict_mode(0)
h.connect_uri("{uri}")
size = {SIZE}
assert h.get_size() == size
def refused(errno, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errno == errno, error
    else:
        raise SystemExit("not refused")
refused("EPERM", lambda: h.pwrite(b"x", 0))
refused("EPERM", lambda: h.pwrite(bytes(1 << 20), 0))
refused("EPERM", lambda: h.trim(4096, 0))
refused("EPERM", lambda: h.zero(4096, 0))
refused("EINVAL", lambda: h.pread(2, size - 1))
assert len(h.pread(100, size - 100)) == 100
h.flush()
"#,
        uri = served.uri("prices"),
    );
    Tool::new("nbdsh").args(["-c", &script]).succeeds();
    let mut seen = vec![0; SIZE as usize];
    writer.read(0, &mut seen).expect("read");
    assert!(seen == bytes, "nothing was written");
    let status = served.node.status().nbd.expect("it serves NBD");
    let of = |name: &str| status.exports.iter().find(|one| one.name == name);
    let prices = of("prices").expect("it was connected to");
    assert!(prices.connected >= 2 && prices.requests > 5);
    assert_eq!(prices.errors, 5);
}

#[test]
fn holes_and_what_was_changed_since_an_epoch() {
    if are_missing(&["nbdinfo", "qemu-img"]) {
        return;
    }
    let served = Served::start(&[]);
    served.run("region create r --size 65536", &[]);
    let write = |offset: u64, len: usize| {
        let line = format!("region write r --offset {offset}");
        served.run(&line, &vec![7; len]);
        served.node.region("r").expect("it is there").epoch
    };
    assert_eq!(served.map("r", "base:allocation"), [(65536, 3)]);
    let first = write(3 * PAGE, 10);
    let holes = [(3 * PAGE, 3), (PAGE, 0), (12 * PAGE, 3)];
    assert_eq!(served.map("r", "base:allocation"), holes);
    let second = write(PAGE - 1, 2);
    let dirty = |epoch: u64| served.map("r", &format!("x-uffd:dirty-{epoch}"));
    assert_eq!(dirty(second), [(65536, 0)]);
    assert_eq!(dirty(first), [(2 * PAGE, 1), (14 * PAGE, 0)]);
    let all = [(2 * PAGE, 1), (PAGE, 0), (PAGE, 1), (12 * PAGE, 0)];
    assert_eq!(dirty(first - 1), all);
    // With the life that it is of; in any other one everything is another.
    let life = served.node.region("r").expect("it is there").generation;
    assert_eq!(
        dirty(first),
        served.map("r", &format!("x-uffd:dirty-{first}-{life}"))
    );
    let other = served.map("r", &format!("x-uffd:dirty-{second}-{}", "1".repeat(32)));
    assert_eq!(other, [(65536, 1)]);
    // An epoch that has not been is none.
    let future = format!("--map=x-uffd:dirty-{}", second + 1);
    let code = Tool::new("nbdinfo")
        .args([&future, &served.uri("r")])
        .code();
    assert_eq!(code, Some(1));
    assert_eq!(
        served.map("r", &format!("qemu:dirty-bitmap:dirty-{first}")),
        dirty(first)
    );
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=r,\
         x-dirty-bitmap=qemu:dirty-bitmap:dirty-{first}",
        served.path("nbd.sock").display()
    );
    let said = Tool::new("qemu-img")
        .args(["map", "--output=json", "--image-opts", &image])
        .says();
    let said: Vec<serde_json::Value> = serde_json::from_str(&said).expect("JSON");
    // QEMU shows what is dirty as what is no data.
    let data: Vec<_> = said
        .iter()
        .map(|one| (&one["length"], &one["data"]))
        .collect();
    assert_eq!(data.len(), 2, "{said:?}");
    assert_eq!(
        (data[0].0.as_u64(), data[0].1.as_bool()),
        (Some(2 * PAGE), Some(false))
    );
    assert_eq!(data[1].1.as_bool(), Some(true));
}

/// Only what is not read again is what was changed: a copy that is brought up to date by
/// the map is the same as one that is made anew.
#[test]
fn a_copy_is_brought_up_to_date_by_what_was_changed() {
    if are_missing(&["nbdinfo", "nbdsh"]) {
        return;
    }
    let served = Served::start(&[]);
    let writer = served.writer("r", false);
    writer
        .write(0, &pattern(SIZE + 8)[..SIZE as usize])
        .expect("written");
    writer.commit(DEADLINE).expect("an epoch");
    let mut copy = vec![0; SIZE as usize];
    writer.read(0, &mut copy).expect("read");
    for round in 0..5_u64 {
        let before = served.node.region("r").expect("it is there").epoch;
        for at in 0..3 {
            let offset = (round * 7919 + at * 104_729) % (SIZE - 20);
            writer
                .write(offset, &[round as u8 + 1; 20])
                .expect("written");
        }
        writer.commit(DEADLINE).expect("an epoch");
        let map = served.map("r", &format!("x-uffd:dirty-{before}"));
        let dirty: u64 = map.iter().filter(|one| one.1 == 1).map(|one| one.0).sum();
        assert!((1..=6 * PAGE).contains(&dirty), "{dirty} bytes for 60");
        let mut at = 0;
        for (len, kind) in map {
            if kind == 1 {
                let place = at as usize..(at + len) as usize;
                writer.read(at, &mut copy[place]).expect("read");
            }
            at += len;
        }
        let mut whole = vec![0; SIZE as usize];
        writer.read(0, &mut whole).expect("read");
        assert!(copy == whole, "round {round}");
    }
}

/// Each word of a replica has the same number at every epoch, and so has each read.
#[test]
fn a_replica_is_read_by_whole_epochs() {
    if are_missing(&["nbdsh"]) {
        return;
    }
    let there = folder();
    let source = NodeProcess::source(there.path(), "source");
    let options = WriterOptions {
        mode: Mode::Compare,
        publish: Publish::Commit,
        ..WriterOptions::default()
    };
    let size = 32 * PAGE;
    let writer = Writer::create(source.socket(), "r", size, &options).expect("a region");
    let follow = format!("tcp://{}/r", source.listen());
    let served = Served::start(&["--follow", &follow]);
    let write = |number: u64| {
        let words = number.to_le_bytes().repeat(size as usize / 8);
        writer.write(0, &words).expect("written");
        writer.commit(DEADLINE).expect("an epoch");
    };
    write(1);
    await_following(&served.node, "r");
    let script = format!(
        r#"
import time
h.connect_uri("{uri}")
assert h.is_read_only()
seen = set()
end = time.monotonic() + 60
while len(seen) < 20:
    bytes = h.pread({size}, 0)
    assert bytes == bytes[:8] * ({size} // 8), "a torn epoch"
    seen.add(str(bytes[:8]))
    assert time.monotonic() < end
"#,
        uri = served.uri("r"),
    );
    let mut running = Tool::new("nbdsh").args(["-c", &script]).start();
    let mut number = 1;
    while !running.has_ended() {
        number += 1;
        write(number);
    }
    running.succeeds();
}

#[test]
fn a_region_that_is_gone_is_an_error_and_no_zeros() {
    if are_missing(&["nbdsh"]) {
        return;
    }
    let served = Served::start(&[]);
    served.run("region create r --size 8192 --max-size 65536", &[]);
    served.run("region write r --offset 0", b"known");
    let (known, go_on) = (served.path("known"), served.path("go-on"));
    let script = format!(
        r#"
import os, time
h.connect_uri("{uri}")
assert h.pread(5, 0) == b"known"
open("{known}", "w").close()
while not os.path.exists("{go_on}"): time.sleep(0.005)
assert h.get_size() == 8192
for _ in range(3):
    try:
        h.pread(5, 0)
        raise SystemExit("it is gone, and another was read")
    except nbd.Error as error:
        assert error.errno == "EIO", error.errno
"#,
        uri = served.uri("r"),
        known = known.display(),
        go_on = go_on.display(),
    );
    let running = Tool::new("nbdsh").args(["-c", &script]).start();
    await_that("the client has read", || known.exists());
    // It grows, which who is connected does not see; then it goes, and another one comes.
    served.run("region grow r --size 65536", &[]);
    let read = |uri: &str| format!("h.connect_uri('{uri}'); assert h.get_size() == 65536");
    Tool::new("nbdsh")
        .args(["-c", &read(&served.uri("r"))])
        .succeeds();
    served.run("region remove r", &[]);
    served.run("region create r --size 65536", &[]);
    fs::write(&go_on, "").expect("written");
    running.succeeds();
    // The only region is what clients get that name none.
    Tool::new("nbdsh")
        .args(["-c", &read(&served.uri(""))])
        .succeeds();
}

#[test]
fn over_tcp_only_what_is_shared_is_seen() {
    if are_missing(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    let host = own_address();
    let served = Served::start(&["--nbd", &format!("tcp://{host}")]);
    let secret = served.writer("secret", false);
    let shared = served.writer("shared", true);
    shared.write(8, b"for all").expect("written");
    let uri = |export: &str| format!("nbd://{host}/{export}");
    assert_eq!(names(&served.exports(&uri(""))), ["shared"]);
    assert_eq!(
        names(&served.exports(&served.uri(""))),
        ["secret", "shared"]
    );
    let copy = served.path("copy");
    Tool::new("nbdcopy")
        .arg(uri("shared"))
        .arg(&copy)
        .succeeds();
    assert_eq!(fs::read(&copy).expect("read")[8..15], *b"for all");
    let code = Tool::new("nbdinfo").arg(uri("secret")).code();
    assert_eq!(code, Some(1));
    drop(secret);
}

#[test]
fn tcp_beyond_loopback_is_refused() {
    let folder = folder();
    let socket = folder.path().join("node.sock");
    let socket = socket.to_str().expect("a path in ASCII");
    let words = ["serve", "--socket", socket, "--nbd", "tcp://0.0.0.0"];
    let ran = crate::nodes::run(&words, &[]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("--insecure"), "{}", ran.stderr);
}
