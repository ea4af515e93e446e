//! Clients of NBD that nobody here wrote: libnbd's tools, QEMU's, `fio`, a hostile shell.
//!
//! The gateway is server 0 of three; the segments are no multiple of a stripe, so that
//! nothing lies where it would be convenient.

mod hostile;
mod regions;
mod service;
mod tools;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use uffd_sync::client::space::{Space, SpaceOptions};
use uffd_sync::space::SpaceConfig;

use super::servers::Servers;
use tools::{Tool, are_missing};

const SEGMENT: u64 = (3 << 20) + 4096 * 5;
const SPACE: u64 = 3 * SEGMENT;

/// Three servers, the first of which serves NBD on a Unix socket.
struct Exported {
    servers: Servers,
}

impl Exported {
    #[track_caller]
    fn start() -> Self {
        let mut servers = Servers::planned(3, SEGMENT, "");
        let socket = format!("unix:{}", servers.folder().join("nbd.sock").display());
        servers.start_one(0, &["--nbd", &socket]);
        servers.start_one(1, &[]);
        servers.start_one(2, &[]);
        Self { servers }
    }

    fn uri(&self, export: &str) -> String {
        let socket = self.servers.folder().join("nbd.sock");
        format!("nbd+unix:///{export}?socket={}", socket.display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.servers.folder().join(name)
    }

    /// A client of the space by its own protocol.
    fn space(&self) -> Space {
        let text = fs::read_to_string(self.servers.file()).expect("read");
        let config = SpaceConfig::parse(&text, &self.servers.file()).expect("a space");
        let options = SpaceOptions {
            deadline: Some(Duration::from_secs(20)),
            sockets: Some(self.servers.folder().join("uffd-sync")),
            ..SpaceOptions::default()
        };
        Space::connect_with(config, options).expect("a client")
    }

    /// A file of the size of the space with bytes that tell their place.
    fn image(&self, name: &str) -> (PathBuf, Vec<u8>) {
        let bytes = pattern(SPACE);
        let path = self.path(name);
        fs::write(&path, &bytes).expect("written");
        (path, bytes)
    }
}

fn pattern(len: u64) -> Vec<u8> {
    let word = |at: u64| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 7).to_le_bytes();
    (0..len / 8).flat_map(word).collect()
}

#[test]
fn the_exports_say_what_they_are() {
    if are_missing(&["nbdinfo"]) {
        return;
    }
    let exported = Exported::start();
    let said = Tool::new("nbdinfo")
        .args(["--json", &exported.uri("")])
        .says();
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(said["protocol"], "newstyle-fixed");
    assert_eq!(said["structured"], true);
    let export = &said["exports"][0];
    assert_eq!(export["export-size"], SPACE);
    assert_eq!(export["contexts"][0], "base:allocation");
    for (field, value) in [
        ("is_read_only", false),
        ("can_cache", true),
        ("can_df", true),
        ("can_fast_zero", true),
        ("can_flush", true),
        ("can_fua", true),
        ("can_multi_conn", true),
        ("can_trim", true),
        ("can_zero", true),
    ] {
        assert_eq!(export[field], value, "{field}");
    }
    for (field, bytes) in [
        ("block_size_minimum", 1),
        ("block_size_preferred", 4096),
        ("block_size_maximum", 32 << 20),
    ] {
        assert_eq!(export[field], bytes, "{field}");
    }
    let uri = exported.uri("");
    let said = Tool::new("nbdinfo").args(["--list", "--json", &uri]).says();
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let exports = said["exports"].as_array().expect("a list");
    let names: Vec<_> = exports
        .iter()
        .map(|export| &export["export-name"])
        .collect();
    assert_eq!(names, ["all", "server-0", "server-1", "server-2"]);
    assert_eq!(exports[2]["export-size"], SEGMENT);
}

#[test]
fn a_whole_space_is_copied_there_and_back() {
    if are_missing(&["nbdcopy"]) {
        return;
    }
    let exported = Exported::start();
    let (image, bytes) = exported.image("in.raw");
    let uri = exported.uri("all");
    Tool::new("nbdcopy").arg(&image).arg(&uri).succeeds();
    let mut seen = vec![0; SPACE as usize];
    exported.space().read(0, &mut seen).expect("read");
    assert!(seen == bytes, "what was copied in is there");
    let back = exported.path("out.raw");
    Tool::new("nbdcopy").arg(&uri).arg(&back).succeeds();
    assert!(fs::read(&back).expect("read") == bytes);
    // One server's export is its part, seen from any of them.
    for at in 0..3 {
        let part = exported.path("part.raw");
        let uri = exported.uri(&format!("server-{at}"));
        Tool::new("nbdcopy").arg(&uri).arg(&part).succeeds();
        let start = (at * SEGMENT) as usize;
        let expected = &bytes[start..start + SEGMENT as usize];
        assert!(fs::read(&part).expect("read") == expected, "server {at}");
        fs::remove_file(&part).expect("removed");
    }
}

#[test]
fn holes_are_told_and_zeroing_keeps_them() {
    if are_missing(&["nbdinfo", "qemu-io"]) {
        return;
    }
    let exported = Exported::start();
    let uri = exported.uri("server-0");
    let map = || {
        let said = Tool::new("nbdinfo").args(["--map", "--json", &uri]).says();
        let said: Vec<serde_json::Value> = serde_json::from_str(&said).expect("JSON");
        let extent = |one: &serde_json::Value| (one["length"].as_u64(), one["type"].as_u64());
        said.iter().map(extent).collect::<Vec<_>>()
    };
    assert_eq!(map(), [(Some(SEGMENT), Some(3))], "nothing is there yet");
    let writes = ["-c", "write -P 7 64k 8k", "-c", "write -z -u 1M 512k"];
    let run = Tool::new("qemu-io").args(["-f", "raw"]).args(writes);
    run.arg(&uri).succeeds();
    let rest = SEGMENT - (72 << 10);
    let expected = [(64 << 10, 3), (8 << 10, 0), (rest, 3)];
    assert_eq!(map(), expected.map(|(len, kind)| (Some(len), Some(kind))));
}

/// What no server has memory for is neither read nor written, wherever it lies.
#[test]
fn a_sparse_space_is_copied_sparse() {
    if are_missing(&["nbdinfo", "nbdcopy", "qemu-img"]) {
        return;
    }
    let exported = Exported::start();
    let uri = exported.uri("all");
    let map = || {
        let said = Tool::new("nbdinfo").args(["--map", "--json", &uri]).says();
        let said: Vec<serde_json::Value> = serde_json::from_str(&said).expect("JSON");
        let number = |one: &serde_json::Value| one.as_u64().expect("a number");
        let extent = |one: &serde_json::Value| (number(&one["length"]), number(&one["type"]));
        said.iter().map(extent).collect::<Vec<_>>()
    };
    assert_eq!(map(), [(SPACE, 3)], "nothing is there yet");
    // Over both edges, and in the midst of the last segment.
    let page = 4096;
    let mut space = exported.space();
    for at in [SEGMENT - page, 2 * SEGMENT - page] {
        space
            .write(at, &vec![7; 2 * page as usize])
            .expect("written");
    }
    space.write(SPACE - 10 * page, b"a page").expect("written");
    let expected = [
        (SEGMENT - page, 3),
        (2 * page, 0),
        (SEGMENT - 2 * page, 3),
        (2 * page, 0),
        (SEGMENT - 11 * page, 3),
        (page, 0),
        (9 * page, 3),
    ];
    assert_eq!(map(), expected);
    let read = || {
        let space = exported.servers.server(2).status().space;
        space.expect("a space").read_bytes
    };
    let before = read();
    let (raw, back) = (exported.path("raw"), exported.path("back"));
    Tool::new("nbdcopy").arg(&uri).arg(&raw).succeeds();
    let read = read() - before;
    assert!(read < SEGMENT / 8, "{read} bytes were read of {SEGMENT}");
    let convert = ["convert", "-f", "raw", "-O", "raw"];
    Tool::new("qemu-img")
        .args(convert)
        .arg(&uri)
        .arg(&back)
        .succeeds();
    let mut whole = vec![0; SPACE as usize];
    space.read(0, &mut whole).expect("read");
    assert!(fs::read(&raw).expect("read") == whole);
    assert!(fs::read(&back).expect("read") == whole);
}

#[test]
fn qemu_io_reads_the_patterns_that_it_wrote() {
    if are_missing(&["qemu-io"]) {
        return;
    }
    let exported = Exported::start();
    let edge = SEGMENT;
    let mut commands = vec![
        "write -P 0x11 0 1M".to_owned(),
        format!("write -P 0x22 {} 8k", edge - 4096),
        format!("write -f -P 0x33 {} 513", 2 * edge - 100),
        format!("aio_write -P 0x44 {} 2M", edge + (1 << 20)),
        "aio_flush".to_owned(),
        "read -P 0x11 0 1M".to_owned(),
        format!("read -P 0x22 {} 8k", edge - 4096),
        format!("read -P 0x33 {} 513", 2 * edge - 100),
        format!("read -P 0x44 {} 1M", edge + (1 << 20)),
    ];
    commands.push("write -z 4k 8k".to_owned());
    commands.push("read -P 0 4k 8k".to_owned());
    commands.push("read -P 0x11 0 4k".to_owned());
    commands.push("discard 512k 64k".to_owned());
    commands.push("flush".to_owned());
    let mut tool = Tool::new("qemu-io").args(["-f", "raw"]);
    for command in &commands {
        tool = tool.args(["-c", command]);
    }
    let said = tool.arg(exported.uri("all")).says();
    assert!(!said.contains("Pattern verification failed"), "{said}");
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn qemu_img_converts_and_compares() {
    if are_missing(&["qemu-img"]) {
        return;
    }
    let exported = Exported::start();
    let (image, _) = exported.image("in.raw");
    let uri = exported.uri("all");
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw"];
    Tool::new("qemu-img")
        .args(convert)
        .arg(&image)
        .arg(&uri)
        .succeeds();
    let compare = ["compare", "-f", "raw", "-F", "raw"];
    Tool::new("qemu-img")
        .args(compare)
        .arg(&image)
        .arg(&uri)
        .succeeds();
    let mut space = exported.space();
    space.write(SEGMENT + 5, b"another byte").expect("written");
    let code = Tool::new("qemu-img")
        .args(compare)
        .arg(&image)
        .arg(&uri)
        .code();
    assert_eq!(code, Some(1), "a difference is seen");
}

/// `fio` writes at random, verifies each block by its checksum, and so do others beside it
/// while clients of the space's own protocol count in a part that is left to them.
#[test]
fn fio_verifies_what_it_wrote_beside_others() {
    if are_missing(&["fio", "nbdcopy"]) {
        return;
    }
    let exported = Exported::start();
    let job = |name: &str, export: &str, size: u64, bs: &str| {
        Tool::new("fio")
            .arg(format!("--name={name}"))
            .args(["--ioengine=nbd", "--rw=randrw", "--iodepth=16"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--thread"])
            .arg(format!("--bsrange={bs}"))
            .arg(format!("--size={size}"))
            .arg(format!("--io_size={}", 2 * size))
            .arg(format!("--uri={}", exported.uri(export)))
            .start()
    };
    // The last two pages of server 2 belong to the counters.
    let jobs = [
        job("zero", "server-0", SEGMENT / 4096 * 4096, "512-64k"),
        job("one", "server-1", SEGMENT / 4096 * 4096, "4k-4k"),
        job("two", "server-2", SEGMENT - 8192, "4k-256k"),
    ];
    let counter = SPACE - 4096;
    let counting = |rounds: u64| {
        let mut space = exported.space();
        std::thread::spawn(move || {
            for _ in 0..rounds {
                space.fetch_add(counter, 1).expect("counted");
            }
        })
    };
    let native: Vec<_> = (0..3).map(|_| counting(500)).collect();
    for job in jobs {
        job.succeeds();
    }
    for thread in native {
        thread.join().expect("a client that counted");
    }
    assert_eq!(exported.space().fetch_add(counter, 0).expect("read"), 1500);
}

#[test]
fn a_lost_segment_is_an_error_for_who_knew_it_and_only_for_them() {
    if are_missing(&["nbdsh"]) {
        return;
    }
    let mut exported = Exported::start();
    let uri = exported.uri("all");
    let go_on = exported.path("go-on");
    let known = exported.path("known");
    let script = format!(
        r#"
import os, time
h.connect_uri("{uri}")
h.pwrite(b"known", {SEGMENT})
open("{known}", "w").close()
while not os.path.exists("{go_on}"): time.sleep(0.005)
for _ in range(3):
    try:
        h.pread(5, {SEGMENT})
        raise SystemExit("the bytes are gone, and it was told others")
    except nbd.Error as error:
        assert error.errno == "EIO", error.errno
assert len(h.pread(4096, 0)) == 4096
"#,
        known = known.display(),
        go_on = go_on.display(),
    );
    let running = Tool::new("nbdsh").args(["-c", &script]).start();
    crate::nodes::await_that("the client has written", || known.exists());
    exported.servers.kill(1);
    exported.servers.start_one(1, &[]);
    fs::write(&go_on, "").expect("written");
    running.succeeds();
    let later = format!("h.connect_uri('{uri}'); assert h.pread(5, {SEGMENT}) == bytes(5)");
    Tool::new("nbdsh").args(["-c", &later]).succeeds();
}
