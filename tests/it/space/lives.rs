//! How servers begin and end: names, addresses, one at a time, and each life for itself.

use std::process::{Command, Output, Stdio};

use uffd_sync::space::frame::{Incarnation, Operation, Status};

use super::servers::Servers;
use super::wire::Wire;
use crate::nodes;

const MIB: u64 = 1 << 20;

/// Runs a server that has to be refused; says its exit code and what it said.
#[track_caller]
fn refused(mut command: Command) -> (Option<i32>, String) {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let pid = child.id();
    let (told, ended) = std::sync::mpsc::channel();
    let waiting = std::thread::spawn(move || {
        let _ = told.send(child.wait_with_output());
    });
    let Ok(output) = ended.recv_timeout(nodes::PATIENCE) else {
        let pid = nix::unistd::Pid::from_raw(pid as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        panic!("the server runs");
    };
    waiting.join().expect("ended");
    let Output { status, stderr, .. } = output.expect("waited for");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn a_server_that_is_killed_comes_back_as_another_life() {
    let mut servers = Servers::start(2, MIB, "");
    let (mut wire, first) = Wire::greeted(&servers, 1);
    assert_ne!(first, Incarnation(0));
    let (reply, _) = wire.ask(Operation::Write, 100, 5, b"bytes");
    assert_eq!(reply.status, Status::Done);
    let (mut other, other_life) = Wire::greeted(&servers, 0);
    servers.kill(1);
    assert!(wire.is_ended());
    servers.start_one(1, &[]);
    let (mut wire, second) = Wire::greeted(&servers, 1);
    assert_ne!(first, second, "the bytes are others");
    assert_eq!(wire.ask(Operation::Read, 100, 5, b"").1, [0; 5]);
    assert_eq!(other.ask(Operation::Ping, 0, 0, b"").0.status, Status::Done);
    assert_eq!(Wire::greeted(&servers, 0).1, other_life, "the same life");
}

#[test]
fn a_server_that_is_told_to_end_answers_what_it_has_and_leaves_no_socket() {
    let mut servers = Servers::start(1, MIB, "");
    let (mut wire, _) = Wire::greeted(&servers, 0);
    for at in 0..100 {
        wire.send(Operation::FetchAdd, 8 * at, 8, &1u64.to_le_bytes());
    }
    assert_eq!(
        wire.try_receive().expect("the first").0.status,
        Status::Done
    );
    servers.terminate(0);
    let rest = std::iter::from_fn(|| wire.try_receive().ok()).count();
    assert_eq!(rest, 99, "what arrived was answered");
    assert!(!servers.socket(0).exists());
}

#[test]
fn what_cannot_be_served_is_refused_with_the_reason() {
    let mut servers = Servers::start(1, MIB, "");
    let (code, said) = refused(servers.serve_command("nobody", &[]));
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("no server \"nobody\"") && said.contains("s0"),
        "{said}"
    );

    // Another process that takes itself for the same server.
    let mut twice = servers.command();
    twice
        .args(["serve", "--name", "again", "--server", "s0", "--socket"])
        .arg(servers.folder().join("again.control"))
        .arg("--space")
        .arg(servers.file());
    let (code, said) = refused(twice);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cannot listen at"), "{said}");

    // Its port is taken by something else.
    servers.terminate(0);
    let taken = std::net::TcpListener::bind(servers.address(0)).expect("bound");
    let (code, said) = refused(servers.serve_command("s0", &[]));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&servers.address(0)), "{said}");
    drop(taken);
    servers.start_one(0, &[]);
    Wire::greeted(&servers, 0);
}

#[test]
fn an_address_that_others_reach_has_to_be_meant() {
    let servers = Servers::planned(1, MIB, "");
    let text = std::fs::read_to_string(servers.file()).expect("read");
    let (host, port) = servers.address(0).split_once(':').map_or_else(
        || panic!("an address"),
        |(host, port)| (host.to_owned(), port.to_owned()),
    );
    let write = |text: String| std::fs::write(servers.file(), text).expect("written");
    write(text.replace(&format!("{host}:{port}"), "0.0.0.0:7"));
    let (code, said) = refused(servers.serve_command("s0", &[]));
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("--insecure"), "{said}");
    write(text.replace(&host, "no.such.host.invalid"));
    let (code, said) = refused(servers.serve_command("s0", &[]));
    assert_eq!(code, Some(2), "{said}");
    let tls = "[tls]\nca = \"/a\"\ncert = \"/b\"\nkey = \"/c\"\n";
    write(format!("{text}\n{tls}"));
    let (code, said) = refused(servers.serve_command("s0", &[]));
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("[tls]"), "{said}");
}
