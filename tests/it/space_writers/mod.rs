//! Clients that write a segment by mapping: real processes, killed, stopped and hostile.

mod process;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use process::{Deed, WriterProcess, local_client};
pub(crate) use process::{ROLE, serve};
use serde_json::Value;
use uffd_sync::client::space::{Space, SpaceOptions, Transport};
use uffd_sync::space::SpaceConfig;

use crate::nodes::{self, PATIENCE, await_that};
use crate::space::servers::Servers;

/// Four stripes.
const SEGMENT: u64 = 4 << 16;

/// Where cells lie, and how long they are: within a stripe each.
const CELLS: [(u64, usize); 3] = [(0, 4096), (1 << 16, 1 << 16), (2 * (1 << 16) + 24, 40_000)];

/// Where a number lies that all count up.
const COUNTER: u64 = 3 << 16;

/// A lease that a busy machine does not outlast.
const PATIENT: &str = "local_writers = true\n[limits]\nwriter_lease_ms = 60000\n";
const PROMPT: &str = "local_writers = true\n";

fn cell(tag: u64, len: usize) -> Vec<u8> {
    let word = |at: u64| tag.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ at;
    (0..len as u64 / 8)
        .flat_map(|at| word(at).to_le_bytes())
        .collect()
}

/// Whether all of it is of one write.
fn is_whole(bytes: &[u8]) -> bool {
    let words = bytes.chunks_exact(8).enumerate();
    let mut tags =
        words.map(|(at, word)| u64::from_le_bytes(word.try_into().expect("eight")) ^ at as u64);
    let first = tags.next();
    tags.all(|tag| Some(tag) == first)
}

fn config(servers: &Servers) -> SpaceConfig {
    let text = std::fs::read_to_string(servers.file()).expect("the file");
    SpaceConfig::parse(&text, &servers.file()).expect("a space")
}

fn by_tcp(servers: &Servers) -> Space {
    let options = SpaceOptions {
        deadline: Some(PATIENCE),
        transport: Transport::Tcp,
        sockets: None,
        no_mapping: true,
    };
    Space::connect_with(config(servers), options).expect("a client")
}

fn by_mapping(servers: &Servers) -> Space {
    let mut space = local_client(config(servers), &servers.socket(0));
    space.read(0, &mut [0; 8]).expect("connected");
    assert!(space.is_writable("s0").expect("a server"));
    space
}

fn writers_of(space: &mut Space) -> Value {
    let (_, said) = space.stat().remove(0);
    let said: Value = serde_json::from_str(&said.expect("said")).expect("JSON");
    said["local_writers"].clone()
}

#[test]
fn what_is_written_by_mapping_is_read_by_all() {
    let servers = Servers::start(2, SEGMENT, PATIENT);
    let (mut local, mut remote) = (by_mapping(&servers), by_tcp(&servers));
    local.read(SEGMENT, &mut [0; 8]).expect("connected");
    assert!(local.is_writable("s1").expect("a server"));
    let before = remote.stat();
    let end = 2 * SEGMENT;
    let mut model = vec![0u8; end as usize];
    for edge in (0..=end).step_by(1 << 16) {
        for start in edge.saturating_sub(1)..=(edge + 1).min(end) {
            for len in [1, 3, 4096, 1 << 16, (1 << 16) + 2, SEGMENT + 2] {
                if start + len > end {
                    continue;
                }
                let range = start as usize..(start + len) as usize;
                let bytes: Vec<u8> = (0..len).map(|at| (at ^ start ^ len) as u8).collect();
                if len % 2 == 0 {
                    local.write(start, &bytes).expect("written");
                    model[range].copy_from_slice(&bytes);
                } else {
                    local.fill(start, len, bytes[0]).expect("filled");
                    model[range].fill(bytes[0]);
                }
            }
        }
    }
    for offset in [0, SEGMENT - 8, SEGMENT, end - 8] {
        let before = local.fetch_add(offset, 5).expect("added");
        assert_eq!(
            remote.fetch_add(offset, 1).expect("added"),
            before.wrapping_add(5)
        );
        let (found, new) = (before.wrapping_add(6), before.wrapping_add(7));
        assert_eq!(
            local.compare_exchange(offset, found, new).expect("asked"),
            Ok(found)
        );
        assert_eq!(
            local.compare_exchange(offset, found, 0).expect("asked"),
            Err(new)
        );
        model[offset as usize..][..8].copy_from_slice(&new.to_le_bytes());
    }
    for space in [&mut local, &mut remote] {
        let mut whole = vec![0; end as usize];
        space.read(0, &mut whole).expect("read");
        assert!(whole == model);
        assert!(space.write(end - 1, b"ab").is_err() && space.fill(end, 1, 0).is_err());
        assert!(space.fetch_add(4, 1).is_err() && space.fetch_add(end, 1).is_err());
        space.write(end, b"").expect("nothing at the end");
        assert!(space.write(end + 1, b"").is_err());
    }
    // The servers did none of the writes themselves.
    for ((_, before), (_, after)) in before.into_iter().zip(remote.stat()) {
        let [before, after] = [before, after].map(|said| {
            let said: Value = serde_json::from_str(&said.expect("said")).expect("JSON");
            said["written_bytes"].as_u64().expect("a number")
        });
        assert_eq!(after - before, 16, "two fetch-adds of the other client");
    }
}

#[test]
fn no_cell_of_several_writers_is_torn_and_no_number_lost() {
    let servers = Servers::start(1, SEGMENT, PATIENT);
    let mut remote = by_tcp(&servers);
    for (offset, len) in CELLS {
        remote.write(offset, &cell(0, len)).expect("written");
    }
    let mut writers = [1, 2].map(|seed| WriterProcess::start(&servers, Deed::Beat { seed }));
    for writer in &writers {
        assert_eq!(writer.report(), "writable");
    }
    let time = Duration::from_secs(if nodes::long() { 20 } else { 2 });
    let (until, ends) = (Instant::now() + time, AtomicBool::new(false));
    let own = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut local, mut seen) = (by_mapping(&servers), 0);
            while !ends.load(Ordering::Relaxed) {
                for (offset, len) in CELLS {
                    let mut bytes = vec![0; len];
                    local.read(offset, &mut bytes).expect("read");
                    assert!(is_whole(&bytes), "torn at {offset}, by mapping");
                    seen += 1;
                }
            }
            seen
        });
        let (mut own, mut tag) = (0u64, 3);
        while Instant::now() < until && !reader.is_finished() {
            for (offset, len) in CELLS {
                tag += 16;
                let mut bytes = vec![0; len];
                remote.read(offset, &mut bytes).expect("read");
                assert!(is_whole(&bytes), "torn at {offset}, by TCP");
                remote.write(offset, &cell(tag, len)).expect("written");
            }
            remote.fetch_add(COUNTER, 1).expect("added");
            own += 1;
        }
        ends.store(true, Ordering::Relaxed);
        assert!(reader.join().expect("nothing torn") > 0);
        own
    });
    let mut counted = own;
    for writer in &mut writers {
        let said = writer.finish();
        let (writes, unknown) = said.split_once(' ').expect("two numbers");
        assert_eq!(unknown, "0", "nothing was taken over");
        let rounds = writes.parse::<u64>().expect("a number") / (CELLS.len() as u64 + 1);
        assert!(rounds > 0);
        counted += rounds;
    }
    assert_eq!(remote.fetch_add(COUNTER, 0).expect("read"), counted);
    let counts = writers_of(&mut remote);
    for figure in ["killed", "taken_over", "repaired"] {
        assert_eq!(counts[figure], 0, "{counts}");
    }
}

/// A write to a stripe whose holder does not go on, and what the server says of it then.
#[track_caller]
fn write_over(servers: &Servers, stripe: u64) -> Value {
    let mut remote = by_tcp(servers);
    let new = cell(5, 4096);
    remote.write(stripe << 16, &new).expect("written");
    let mut found = vec![0; 4096];
    remote.read(stripe << 16, &mut found).expect("read");
    assert!(found == new, "a late store");
    let counts = writers_of(&mut remote);
    assert_eq!(counts["taken_over"], 1, "{counts}");
    let range = &counts["maybe_modified"][0];
    assert_eq!(range["first"], stripe << 16, "{counts}");
    assert_eq!(range["end"], (stripe + 1) << 16, "{counts}");
    counts
}

#[test]
fn a_holder_that_was_killed_is_followed_at_once() {
    // With a lease that nobody would wait for.
    let servers = Servers::start(1, SEGMENT, PATIENT);
    let mut holder = WriterProcess::start(&servers, Deed::Stay { stripe: 2 });
    assert_eq!(holder.report(), "in the middle");
    let mut local = by_mapping(&servers);
    local.write(0, b"other stripes go on").expect("written");
    holder.signal(Signal::SIGKILL);
    let counts = write_over(&servers, 2);
    assert_eq!(counts["killed"], 0, "{counts}");
    assert_eq!(holder.ended_by(), Some(9));
    local.write(2 << 16, b"and this one").expect("written");
    assert_eq!(writers_of(&mut local)["writing"], 1);
}

#[test]
fn a_holder_that_was_stopped_is_killed_and_the_others_go_on() {
    let servers = Servers::start(1, SEGMENT, PROMPT);
    let mut holder = WriterProcess::start(&servers, Deed::Stay { stripe: 1 });
    assert_eq!(holder.report(), "in the middle");
    holder.signal(Signal::SIGSTOP);
    assert!(holder.is_there(), "nobody wants its stripe yet");
    let counts = write_over(&servers, 1);
    assert_eq!(counts["killed"], 1, "{counts}");
    assert_eq!(holder.ended_by(), Some(9));
    let table = servers.command();
    let said = stat(table, &servers);
    assert!(said.contains("maybe modified: 65536..131072"), "{said}");
    let mut local = by_mapping(&servers);
    local.write(1 << 16, &cell(6, 4096)).expect("written");
    let mut found = vec![0; 4096];
    by_tcp(&servers).read(1 << 16, &mut found).expect("read");
    assert!(found == cell(6, 4096));
}

fn stat(mut command: std::process::Command, servers: &Servers) -> String {
    let command = command
        .args(["space", "stat", "--config"])
        .arg(servers.file());
    let output = command.output().expect("run");
    assert!(output.status.success());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn who_writes_over_all_locks_stops_nobody_and_has_nobody_killed() {
    let servers = Servers::start(1, SEGMENT, PROMPT);
    // It holds nothing for as long as anybody may be blamed.
    let mut local = by_mapping(&servers);
    let mut scribblers = [1, 2].map(|seed| WriterProcess::start(&servers, Deed::Scribble { seed }));
    for scribbler in &scribblers {
        assert_eq!(scribbler.report(), "scribbles");
    }
    let mut remote = by_tcp(&servers);
    for round in 0..20u64 {
        let stripe = round % 4;
        remote
            .write(stripe << 16, &cell(round, 4096))
            .expect("answered");
        remote.fetch_add(COUNTER + 8192, 1).expect("answered");
        let mut bytes = [0; 64];
        local.read(stripe << 16, &mut bytes).expect("answered");
    }
    let counts = writers_of(&mut remote);
    assert!(counts["repaired"].as_u64() > Some(0), "{counts}");
    for scribbler in &mut scribblers {
        scribbler.signal(Signal::SIGKILL);
        scribbler.ended_by();
    }
    await_that("both are gone", || writers_of(&mut remote)["writing"] == 1);
    for stripe in 0..4u64 {
        remote.write(stripe << 16, &cell(9, 4096)).expect("written");
        local.write(stripe << 16, &cell(8, 4096)).expect("written");
        let mut found = vec![0; 4096];
        remote.read(stripe << 16, &mut found).expect("read");
        assert!(found == cell(8, 4096));
    }
}

#[test]
fn a_server_that_dies_takes_its_writers_word_with_it() {
    let mut servers = Servers::start(1, SEGMENT, PATIENT);
    let mut local = by_mapping(&servers);
    local.write(0, b"before").expect("written");
    servers.kill(0);
    servers.start_one(0, &[]);
    let error = local.write(0, b"behind").expect_err("the memory is gone");
    assert!(
        error.is_segment_lost() || error.is_indeterminate(),
        "{error}"
    );
    local.accept_loss("s0").expect("a server");
    await_that("it writes again", || local.write(0, b"anew").is_ok());
    let mut found = [1; 6];
    by_tcp(&servers).read(0, &mut found).expect("read");
    assert_eq!(&found, b"anew\0\0");
}

#[test]
fn who_the_server_cannot_kill_may_not_write() {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_none());
        use std::io::Write;
        let _ = std::io::stderr().write_all(b"SKIP only root can act as another user\n");
        return;
    }
    let mut servers = Servers::planned(1, SEGMENT, PROMPT);
    let folder = servers.folder().to_owned();
    let own = |path: &std::path::Path| {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("given away");
    };
    own(&folder);
    let binary = folder.join("uffd-sync-command");
    nodes::copy_program(std::path::Path::new(nodes::BINARY), &binary);
    let mut command = std::process::Command::new(&binary);
    let as_planned = servers.serve_command("s0", &[]);
    command.args(as_planned.get_args());
    for (name, value) in as_planned.get_envs() {
        command.env(name, value.expect("set"));
    }
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    servers.start_by(0, command);
    let asks = WriterProcess::start(&servers, Deed::Ask);
    assert_eq!(asks.report(), "may not");
    let mut local = local_client(config(&servers), &servers.socket(0));
    local.write(0, b"by the socket").expect("written");
    assert!(!local.is_writable("s0").expect("a server"));
    let mut found = [0; 13];
    by_tcp(&servers).read(0, &mut found).expect("read");
    assert_eq!(&found, b"by the socket");
}

#[test]
fn without_leave_nobody_writes() {
    let servers = Servers::start(1, SEGMENT, "");
    let asks = WriterProcess::start(&servers, Deed::Ask);
    assert_eq!(asks.report(), "may not");
    assert_eq!(writers_of(&mut by_tcp(&servers)), Value::Null);
}
