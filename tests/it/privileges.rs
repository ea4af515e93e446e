//! Without privileges: everything works for an ordinary user, and nobody reaches
//! another user's node.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use super::nodes::{BINARY, NodeProcess, PATIENCE, await_exit, folder, run_on};

/// An ordinary user without a home, processes or files.
const NOBODY: u32 = 65_534;

fn is_root() -> bool {
    uffd_sync::sys::process::effective_uid() == 0
}

/// Runs the command as [`NOBODY`], or as the ordinary user that this is already.
fn run_as_nobody(arguments: &[&str]) -> (Option<i32>, String, String) {
    let folder = folder();
    let copy = folder.path().join("uffd-sync");
    let everybody = std::fs::Permissions::from_mode(0o755);
    super::nodes::copy_program(std::path::Path::new(BINARY), &copy);
    std::fs::set_permissions(folder.path(), everybody.clone()).expect("our folder");
    std::fs::set_permissions(&copy, everybody).expect("our copy");
    let mut command = Command::new(&copy);
    command
        .args(arguments)
        .current_dir("/")
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut child = command.spawn().expect("the command starts");
    let status = await_exit(&mut child, PATIENCE);
    if status.is_none() {
        let _ = child.kill();
    }
    let output = child.wait_with_output().expect("the child is ours");
    let status = status.expect("the command ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn an_ordinary_user_needs_no_privileges() {
    let line = ["demo", "--seconds", "1", "--region-size", "2MiB", "--json"];
    let (code, stdout, stderr) = run_as_nobody(&line);
    assert_eq!(code, Some(0), "{stdout} {stderr}");
    let demo: serde_json::Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(demo["verified"], true, "{demo}");
    let (code, stdout, stderr) = run_as_nobody(&["doctor"]);
    assert_eq!(code, Some(0), "{stdout} {stderr}");
}

#[test]
fn another_user_does_not_reach_a_node() {
    if !is_root() {
        // Not a missing feature: without privileges there is no other user to be.
        let _ = std::io::stderr().write_all(b"SKIP only root can act as another user\n");
        return;
    }
    let folder = folder();
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).expect("our folder");
    let node = NodeProcess::source(folder.path(), "node");
    assert_eq!(
        run_on(&node, "region create own --size 4KiB", b"").code,
        Some(0)
    );
    let socket = node.socket().to_str().expect("a path in ASCII");
    for line in [
        ["status", "--socket", socket, "--json"],
        ["region", "list", "--socket", socket],
    ] {
        let (code, stdout, stderr) = run_as_nobody(&line);
        assert_eq!(code, Some(1), "{stdout} {stderr}");
        assert!(
            stdout.is_empty() && stderr.contains(socket),
            "{stdout} {stderr}"
        );
    }
    assert_eq!(node.status().regions.len(), 1);
}
