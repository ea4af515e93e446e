//! A peer that knows the layout and nothing of this crate: `tests/data/inplace_peer.py`,
//! client and server of an in-place channel against the library.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::channel_peer::{ask, call, join, request, serve};
use super::nodes::{PATIENCE, await_exit, await_some, await_that, folder};

const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/inplace_peer.py");
const CALLS: &str = "500";

/// The peer as a process, or none where there is no Python.
fn start(side: &str, socket: &Path) -> Option<Child> {
    let python = Command::new("python3")
        .args([
            "-c",
            "import os, mmap; os.memfd_create; os.MFD_ALLOW_SEALING",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !python.is_ok_and(|status| status.success()) {
        let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
        assert!(!required, "python3 is missing, or has no memfd_create");
        let line = b"SKIP python3 is missing, or has no memfd_create\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line);
        return None;
    }
    let child = Command::new("python3")
        .args([PEER, side])
        .arg(socket)
        .arg(CALLS)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    Some(child.expect("python3 starts"))
}

#[track_caller]
fn ends_well(mut child: Child) {
    let status = await_exit(&mut child, PATIENCE);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
}

#[test]
fn a_python_client_of_a_rust_server() {
    let folder = folder();
    let server = serve(folder.path(), "a", 1, 1, false).expect("a server");
    let Some(client) = start("client", &folder.path().join("a.sock")) else {
        return;
    };
    ends_well(client);
    await_that("the end of the connection", || {
        server.status().expect("a status").clients.is_empty()
    });
    // Its place is free again, for a client of this library.
    let client = join(folder.path(), "a").expect("a client");
    assert_eq!(
        call(&client, &request(ask::UPPER, 9), 10_000).kind(),
        "response"
    );
}

#[test]
fn a_rust_client_of_a_python_server() {
    let folder = folder();
    let socket = folder.path().join("a.sock");
    let Some(server) = start("server", &socket) else {
        return;
    };
    let client = await_some("the server", || join(folder.path(), "a").ok());
    for number in 0..CALLS.parse().expect("a number") {
        let request = request(ask::UPPER, number * 97 % 70_000);
        let response = client.call(&request, PATIENCE).expect("a response");
        assert!(response.copy_to_vec() == request.to_ascii_uppercase());
    }
    drop(client);
    ends_well(server);
    assert!(!socket.exists());
}

/// It holds no robust futex: the end of the connection alone tells of its death.
#[test]
fn a_python_server_that_is_killed_is_missed() {
    let folder = folder();
    let Some(mut server) = start("server", &folder.path().join("a.sock")) else {
        return;
    };
    let client = await_some("the server", || join(folder.path(), "a").ok());
    let works = call(&client, &request(ask::UPPER, 100), 10_000);
    assert_eq!(works.kind(), "response");
    server.kill().expect("our child");
    server.wait().expect("our child");
    let begun = Instant::now();
    let report = call(&client, &request(ask::UPPER, 100), 20_000);
    assert!(
        ["died", "disconnected"].contains(&report.kind()),
        "{report:?}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
}
