//! The commands on a space as a shell has them.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::space::servers::Servers;

const SEGMENT: u64 = 1 << 20;

fn command(servers: &Servers, line: &str) -> Command {
    let mut command = servers.command();
    command
        .arg("space")
        .args(line.split(' '))
        .arg("--config")
        .arg(servers.file());
    command
}

#[track_caller]
fn run(servers: &Servers, line: &str, input: &[u8]) -> Output {
    let mut child = command(servers, line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        // A command that refuses its flags reads nothing.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("it ends");
    feeder.join().expect("fed");
    output
}

#[track_caller]
fn good(servers: &Servers, line: &str, input: &[u8]) -> Vec<u8> {
    let output = run(servers, line, input);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line}: {said}");
    output.stdout
}

#[track_caller]
fn json(servers: &Servers, line: &str, input: &[u8]) -> Value {
    serde_json::from_slice(&good(servers, line, input)).expect("JSON")
}

#[track_caller]
fn refused(servers: &Servers, line: &str, input: &[u8], code: i32) -> String {
    let output = run(servers, line, input);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{line}: {said}");
    said
}

#[test]
fn bytes_over_a_boundary_from_a_shell() {
    let servers = Servers::start(3, SEGMENT, "");
    good(&servers, "write --offset 1048574", b"42.17");
    assert_eq!(
        good(&servers, "read --offset 1048573 --len 7", b""),
        b"\x0042.17\0"
    );
    for over in ["tcp", "unix"] {
        let line = format!("read --offset 1048574 --len 5 --json --over {over}");
        let read = json(&servers, &line, b"");
        assert_eq!(
            (&read["hex"], &read["bytes"]),
            (&"34322e3137".into(), &5.into())
        );
    }
    let added = json(&servers, "fetch-add --offset 2MiB --add 5 --json", b"");
    assert_eq!((&added["before"], &added["after"]), (&0.into(), &5.into()));
    assert_eq!(
        good(&servers, "fetch-add --offset 2MiB --add -1", b""),
        b"5\n"
    );
    assert_eq!(
        good(&servers, "cas --offset 2MiB --expected 4 --new 0x10", b""),
        b"4\n"
    );
    let not = run(
        &servers,
        "cas --offset 2MiB --expected 4 --new 1 --json",
        b"",
    );
    assert_eq!(not.status.code(), Some(1));
    let not: Value = serde_json::from_slice(&not.stdout).expect("JSON");
    assert_eq!(
        (&not["before"], &not["exchanged"]),
        (&16.into(), &false.into())
    );
    good(&servers, "fill --offset 1MiB --len 1MiB --byte 0xff", b"");
    let whole = good(&servers, "read", b"");
    assert_eq!(whole.len(), 3 << 20);
    assert!(whole[1 << 20..2 << 20].iter().all(|byte| *byte == 0xff));
    assert_eq!(whole[(1 << 20) - 2..1 << 20], *b"42");
    let stat = json(&servers, "stat --json", b"");
    assert_eq!(stat["servers"].as_array().map(Vec::len), Some(3));
    assert_eq!(stat["servers"][1]["stat"]["server"], "s1");
    let table = String::from_utf8(good(&servers, "stat", b"")).expect("text");
    assert!(
        table.starts_with("SERVER") && table.contains("\ns1 "),
        "{table}"
    );
}

#[test]
fn a_stream_longer_than_what_is_under_way_comes_back_the_same() {
    let servers = Servers::start(2, 24 * SEGMENT, "");
    let bytes: Vec<u8> = (0..40_u32 << 20)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let wrote = json(&servers, "write --offset 3 --json", &bytes);
    assert_eq!(wrote["bytes"], bytes.len());
    let line = format!("read --offset 3 --len {}", bytes.len());
    assert!(good(&servers, &line, b"") == bytes);
    let file = servers.folder().join("copy.img");
    let line = format!("{line} --json --out {}", file.display());
    assert_eq!(json(&servers, &line, b"")["bytes"], bytes.len());
    assert!(std::fs::read(&file).expect("the copy") == bytes);
    // What is no ordinary file is written to as it is.
    good(&servers, "read --len 5 --out /dev/null", b"");
    let line = format!("write --file {}", file.display());
    good(&servers, &line, b"");
    assert!(good(&servers, "read --len 40MiB", b"") == bytes);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let servers = Servers::start(2, SEGMENT, "");
    let before = good(&servers, "read", b"");
    for line in [
        "read --offset 2097153",
        "read --offset 2097152 --len 1",
        "read --offset 1 --len 18446744073709551615",
        "read --offset 18446744073709551615 --len 1",
        "read --json",
        "fill --offset 2MiB --len 1",
        "fill --byte 256",
        "cas --offset 4 --expected 0 --new 1",
        "cas --offset 2MiB --expected 0 --new 1",
        "fetch-add --offset 18446744073709551608",
        "write --file /nonexistent",
        "write --file /",
        "read --deadline 0",
    ] {
        let said = refused(&servers, line, b"", 2);
        assert!(!said.is_empty(), "{line}");
    }
    let said = refused(&servers, "write --offset 2097150", b"abc", 2);
    assert!(said.contains("2097152"), "{said}");
    let file = servers.folder().join("long");
    std::fs::write(&file, vec![7; 2 << 20]).expect("written");
    refused(
        &servers,
        &format!("write --offset 1 --file {}", file.display()),
        b"",
        2,
    );
    assert!(good(&servers, "read", b"") == before);
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let mut servers = Servers::start(2, SEGMENT, "");
    servers.kill(1);
    let said = refused(
        &servers,
        "read --offset 1048570 --len 12 --deadline 200",
        b"",
        1,
    );
    let address = servers.address(1);
    for part in [
        "server s1",
        &address,
        "addresses 1048576..1048582",
        "cannot be reached",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("server s0"), "{said}");
    // The copy of yesterday is not given up for half a new one.
    let file = servers.folder().join("copy.img");
    std::fs::write(&file, b"yesterday").expect("written");
    let line = format!("read --deadline 200 --out {}", file.display());
    refused(&servers, &line, b"", 1);
    assert_eq!(std::fs::read(&file).expect("there"), b"yesterday");
    assert!(!servers.folder().join("copy.img.part").exists());
    let stat = run(&servers, "stat --json --deadline 200", b"");
    assert_eq!(stat.status.code(), Some(1));
    let stat: Value = serde_json::from_slice(&stat.stdout).expect("JSON");
    assert!(stat["servers"][0]["stat"].is_object() && stat["servers"][1]["error"].is_string());
}

#[test]
fn nothing_is_sent_in_the_clear_where_the_file_asks_for_tls() {
    let servers = Servers::start(1, SEGMENT, "");
    let mut text = std::fs::read_to_string(servers.file()).expect("the file");
    text.push_str("[tls]\nca = \"/a\"\ncert = \"/b\"\nkey = \"/c\"\n");
    std::fs::write(servers.file(), text).expect("written");
    for line in ["write", "read --len 1", "stat"] {
        let said = refused(&servers, line, b"secret", 2);
        assert!(said.contains("[tls]"), "{said}");
    }
}

#[test]
fn another_map_is_refused_with_both_digests() {
    let servers = Servers::start(1, SEGMENT, "");
    let text = std::fs::read_to_string(servers.file()).expect("the file");
    let other = servers.folder().join("other.cfg");
    std::fs::write(&other, text.replace(&SEGMENT.to_string(), "8192")).expect("written");
    let digest = |file: &std::path::Path| {
        let mut check = servers.command();
        let check = check
            .args(["space", "check", "--json", "--config"])
            .arg(file);
        let found: Value =
            serde_json::from_slice(&check.output().expect("run").stdout).expect("JSON");
        found["digest"].as_str().expect("a digest").to_owned()
    };
    let mut write = servers.command();
    let write = write
        .args(["space", "fill", "--len", "8", "--config"])
        .arg(&other)
        .output()
        .expect("run");
    assert_eq!(write.status.code(), Some(2));
    let said = String::from_utf8_lossy(&write.stderr).into_owned();
    assert!(
        said.contains(&digest(&other)) && said.contains(&digest(&servers.file())),
        "{said}"
    );
}
