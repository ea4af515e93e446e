//! Nodes that are members, and the commands that use them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use std::io::{BufRead, BufReader, Read};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::nodes::{BINARY, NodeProcess, PATIENCE, await_exit, await_some, await_that, folder};

fn write_table(folder: &Path, process: u32) -> PathBuf {
    let mut text = format!("[variables]\nprocess = {process}\nmember = [\n");
    for id in 0..3 {
        let path = folder.join(format!("vars-{id}.sock"));
        text.push_str(&format!(
            "{{ id = {id}, address = \"unix:{}\" }},\n",
            path.display()
        ));
    }
    text.push_str(
        "]\nvariable = [\n\
         { id = 0, name = \"left\", type = \"i64\", subscribers = [0, 1] },\n\
         { id = 1, name = \"right\", type = \"i64\", subscribers = [1, 2] },\n\
         { id = 2, name = \"label\", type = \"bytes\", subscribers = [0, 1, 2] },\n]\n",
    );
    let path = folder.join(format!("{process}.toml"));
    std::fs::write(&path, text).expect("written");
    path
}

fn node(folder: &Path, process: u32) -> NodeProcess {
    let path = write_table(folder, process);
    let arguments = ["--config".into(), path.into_os_string()];
    NodeProcess::start(folder, &format!("n{process}"), &arguments)
}

fn var(node: &NodeProcess, words: &[&str]) -> Output {
    Command::new(BINARY)
        .arg("var")
        .args(words)
        .arg("--socket")
        .arg(node.socket())
        .output()
        .expect("the command runs")
}

/// Exit code, and what was said on both streams.
fn said(node: &NodeProcess, words: &[&str]) -> (Option<i32>, String) {
    let output = var(node, words);
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code(), text)
}

#[track_caller]
fn done(node: &NodeProcess, words: &[&str]) -> String {
    let (code, text) = said(node, words);
    assert_eq!(code, Some(0), "{words:?}: {text}");
    text
}

#[track_caller]
fn fails(node: &NodeProcess, words: &[&str], code: i32, part: &str) {
    let (found, text) = said(node, words);
    assert!(
        found == Some(code) && text.contains(part),
        "{words:?}: {found:?} {text}"
    );
}

#[test]
fn commands_read_write_swap_and_watch() {
    let folder = folder();
    let all: Vec<_> = (0..3).map(|id| node(folder.path(), id)).collect();
    let mut watch = Command::new(BINARY)
        .args(["var", "watch", "--json", "--count", "2", "left", "--socket"])
        .arg(all[1].socket())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the command runs");
    let lines = BufReader::new(watch.stdout.take().expect("a pipe")).lines();
    // Its first line is due only after the node took its request.
    await_that("the watch is there", || {
        done(&all[0], &["set", "left", "0"]);
        done(&all[0], &["list"]).contains("left")
    });
    std::thread::scope(|scope| {
        let heard = scope.spawn(|| lines.map(|line| line.expect("a line")).collect::<Vec<_>>());
        await_some("two changes were heard", || {
            done(&all[0], &["set", "left", "-7"]);
            heard.is_finished().then_some(())
        });
        let heard = heard.join().expect("no panic");
        assert_eq!(heard.len(), 2);
        for line in heard {
            for part in [
                "\"key\":{\"time\":",
                "\"variable\":0",
                "\"name\":\"left\"",
                "\"initiator\":0",
            ] {
                assert!(line.contains(part), "{part} in {line}");
            }
        }
    });
    assert!(watch.wait().expect("ends").success());
    assert_eq!(done(&all[1], &["get", "left", "--ordered"]), "-7\n");
    done(&all[1], &["cas", "left", "-7", "8"]);
    fails(&all[0], &["cas", "left", "-7", "9"], 1, "it held 8");
    done(&all[2], &["set", "label", "some text"]);
    assert_eq!(done(&all[0], &["get", "label", "--ordered"]), "some text\n");
    fails(&all[0], &["get", "right"], 2, "does not subscribe");
    fails(&all[0], &["set", "right", "1"], 2, "does not subscribe");
    fails(&all[0], &["watch", "right"], 2, "does not subscribe");
    fails(&all[0], &["get", "none"], 2, "there are left, right, label");
    fails(&all[0], &["set", "left", "ten"], 2, "holds an i64");
    let long = "x".repeat(16 * 1024 + 1);
    fails(
        &all[0],
        &["set", "label", &long],
        2,
        "of 16385 bytes for variable 2; at most 16384",
    );
    let list = done(&all[0], &["list"]);
    assert!(
        list.contains("(not a subscriber)") && list.contains("some text"),
        "{list}"
    );
    let status = done(&all[0], &["status"]);
    assert!(
        status.contains("order skeen  session 1  running"),
        "{status}"
    );
    assert!(status.contains("linked"), "{status}");
    let plain = NodeProcess::start(folder.path(), "plain", &[] as &[&str]);
    fails(&plain, &["list"], 2, "uffd-sync var init");
    fails(&plain, &["reset"], 2, "no table [variables]");
}

#[test]
fn a_killed_member_is_unavailable_until_reset() {
    let folder = folder();
    let mut all: Vec<_> = (0..3).map(|id| node(folder.path(), id)).collect();
    done(&all[0], &["set", "left", "5"]);
    done(&all[2], &["set", "label", "kept"]);
    // What only the killed one delivered would be lost with it.
    assert_eq!(done(&all[0], &["get", "label", "--ordered"]), "kept\n");
    all.remove(2).kill();
    fails(
        &all[0],
        &["set", "label", "lost?", "--deadline", "300"],
        4,
        "not known",
    );
    all.push(node(folder.path(), 2));
    await_that("the loss is noticed", || {
        done(&all[0], &["status"]).contains("lost its memory")
    });
    fails(&all[0], &["set", "left", "6"], 1, "unavailable");
    let with: Vec<String> = all
        .iter()
        .map(|one| one.socket().display().to_string())
        .collect();
    let text = done(&all[0], &["reset", "--with", &with[1], "--with", &with[2]]);
    assert_eq!(text, "session 2 began\n");
    done(&all[1], &["set", "left", "6"]);
    assert_eq!(done(&all[0], &["get", "left", "--ordered"]), "6\n");
    let label = done(&all[2], &["get", "label"]);
    assert!(label == "kept\n" || label == "lost?\n", "{label}");
    // The same by files.
    let files: Vec<String> = (0..3)
        .map(|id| {
            folder
                .path()
                .join(format!("{id}.json"))
                .display()
                .to_string()
        })
        .collect();
    for (one, file) in all.iter().zip(&files) {
        done(one, &["reset", "--save", file]);
        fails(one, &["set", "label", "6"], 1, "new session");
    }
    let load = [
        "reset", "--load", &files[0], "--load", &files[1], "--load", &files[2],
    ];
    for one in &all {
        assert_eq!(done(one, &load), "session 3 began\n");
    }
    assert_eq!(done(&all[1], &["get", "left", "--ordered"]), "6\n");
}

#[test]
fn a_reset_that_forgets_a_member_stops_nobody() {
    let folder = folder();
    let all: Vec<_> = (0..3).map(|id| node(folder.path(), id)).collect();
    done(&all[0], &["set", "left", "5"]);
    let with: Vec<String> = all
        .iter()
        .map(|one| one.socket().display().to_string())
        .collect();
    let absent = folder.path().join("absent.sock").display().to_string();
    for (words, part) in [
        (&["reset"][..], "what process 1 knows is missing"),
        (
            &["reset", "--with", &with[1]],
            "what process 2 knows is missing",
        ),
        (
            &["reset", "--with", &with[1], "--with", &with[0]],
            "are both process 0",
        ),
    ] {
        fails(&all[0], words, 2, part);
    }
    let words = ["reset", "--with", &with[1], "--with", &absent];
    fails(&all[0], &words, 1, "no node answers at");
    let kept = folder.path().join("kept.json");
    std::fs::write(&kept, "{}").expect("written");
    for path in [&kept, &folder.path().join("none").join("a.json")] {
        let words = ["reset", "--save", &path.display().to_string()];
        fails(&all[0], &words, 2, "nothing was stopped");
    }
    assert_eq!(std::fs::read(&kept).expect("still there"), b"{}");
    for one in &all {
        let status = done(one, &["status"]);
        assert!(status.contains("session 1  running"), "{status}");
    }
    done(&all[0], &["set", "left", "6"]);
}

/// What all members know goes to each of them in one request.
#[test]
fn a_reset_carries_the_longest_values() {
    let folder = folder();
    let all: Vec<_> = (0..3).map(|id| node(folder.path(), id)).collect();
    let long = "\u{1}".repeat(16 * 1024);
    done(&all[0], &["set", "label", &long]);
    done(&all[0], &["cas", "label", &long, &long]);
    let with: Vec<String> = all
        .iter()
        .map(|one| one.socket().display().to_string())
        .collect();
    let words = ["reset", "--with", &with[1], "--with", &with[2]];
    assert_eq!(done(&all[0], &words), "session 2 began\n");
    assert_eq!(
        done(&all[2], &["get", "label", "--ordered"]),
        format!("{long}\n")
    );
}

/// The operator hears which member is missing, not that there is too much to do.
#[test]
fn an_operation_that_waits_for_a_member_names_it() {
    let folder = folder();
    let alone = node(folder.path(), 0);
    let words = ["set", "left", "5", "--deadline", "200"];
    fails(&alone, &words, 1, "process 1 has not been there");
    let words = ["get", "left", "--ordered", "--deadline", "200"];
    fails(&alone, &words, 1, "process 1 has not been there");
}

#[test]
fn the_printed_default_is_served_as_it_stands() {
    let folder = folder();
    let text = Command::new(BINARY).args(["var", "init"]).output();
    let text = text.expect("the command runs").stdout;
    let path = folder.path().join("node.toml");
    std::fs::write(&path, text).expect("written");
    let config = uffd_sync::node::ConfigSource {
        file: Some(path),
        flags: uffd_sync::node::NodeFlags::default(),
    };
    let config = config.load().expect("it loads");
    assert_eq!(
        config.variables.map(|variables| variables.variables.len()),
        Some(3)
    );
}

#[test]
fn a_wrong_table_is_refused_with_line_and_key() {
    let folder = folder();
    let right = std::fs::read_to_string(write_table(folder.path(), 0)).expect("written");
    for (from, to, words) in [
        ("type = \"bytes\"", "type = \"float\"", ":11: "),
        (
            "subscribers = [1, 2]",
            "subscribers = [1, 9]",
            "process 9 is not among",
        ),
        ("process = 0", "proces = 0", ":2: key `proces`"),
        ("unix:/", "tcp://10.0.0.1:7/", "tcp://HOST:PORT"),
    ] {
        let path = folder.path().join("wrong.toml");
        std::fs::write(&path, right.replace(from, to)).expect("written");
        let output = Command::new(BINARY)
            .args(["serve", "--socket"])
            .arg(folder.path().join("wrong.sock"))
            .arg("--config")
            .arg(&path)
            .output()
            .expect("the command runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words), "{words}: {text}");
    }
}

/// A value is what a subscriber likes it to be; a line is one change all the same.
#[test]
fn values_do_not_break_lines() {
    let folder = folder();
    let all: Vec<_> = (0..3).map(|id| node(folder.path(), id)).collect();
    let mut watch = Command::new(BINARY)
        .args(["var", "watch", "--count", "1", "label", "--socket"])
        .arg(all[1].socket())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the command runs");
    let mut lines = BufReader::new(watch.stdout.take().expect("a pipe")).lines();
    let mut next = || lines.next().expect("a line").expect("a line");
    assert!(next().starts_with("TIME"), "it watches from here on");
    let value = "a\n9  left  0 -> 7\u{1b}[2J";
    done(&all[0], &["set", "label", value]);
    let line = next();
    let escaped = "a\\n9  left  0 -> 7\\u{1b}[2J";
    assert!(line.contains(escaped), "{line}");
    assert!(watch.wait().expect("ends").success());
    let list = done(&all[1], &["list"]);
    assert!(
        list.contains(escaped) && list.lines().count() == 4,
        "{list}"
    );
    fails(&all[2], &["cas", "label", "b", "c"], 1, escaped);
    // As it is for whoever asks for the value alone.
    let got = done(&all[1], &["get", "label"]);
    assert_eq!(got, format!("{value}\n"));
}

/// Whoever watches hears why it ends, and the log says when a link was lost.
#[test]
fn a_watch_is_told_that_its_node_ends() {
    let folder = folder();
    let mut all: Vec<_> = (0..3).map(|id| node(folder.path(), id)).collect();
    done(&all[0], &["set", "left", "1"]);
    let watch = |node: &NodeProcess| {
        let mut watch = Command::new(BINARY)
            .args(["var", "watch", "--socket"])
            .arg(node.socket())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command runs");
        let mut heading = [0; 4];
        let stdout = watch.stdout.as_mut().expect("a pipe");
        stdout.read_exact(&mut heading).expect("a heading");
        watch
    };
    let (told, broken) = (watch(&all[1]), watch(&all[2]));
    let mut stopped = all.remove(1);
    stopped.signal(Signal::SIGTERM);
    assert!(stopped.await_end(PATIENCE).success());
    all.remove(1).kill();
    for (watch, words) in [(told, "the node ends"), (broken, "the node was killed")] {
        let output = watch.wait_with_output().expect("it ends");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(words), "{text}");
    }
    all[0].await_log("link lost");
}

/// A process of the demonstration that dies is noticed at once.
#[test]
fn a_demonstration_ends_with_its_processes() {
    let demo = Command::new(BINARY)
        .args(["var", "demo", "--operations", "1000000"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command runs");
    let children = format!("/proc/{0}/task/{0}/children", demo.id());
    let child = await_some("its processes are there", || {
        let text = std::fs::read_to_string(&children).expect("it runs");
        let all: Vec<i32> = text
            .split_whitespace()
            .filter_map(|id| id.parse().ok())
            .collect();
        (all.len() == 3).then(|| all[1])
    });
    kill(Pid::from_raw(child), Signal::SIGKILL).expect("a living child");
    let text = fails_in_time(demo);
    assert!(text.contains("ended before it was told to"), "{text}");
}

/// A watch that begins once nothing changes any more is told so, and does not wait.
#[test]
fn a_watch_that_comes_late_ends_as_well() {
    let folder = folder();
    let mut all: Vec<_> = (0..3).map(|id| node(folder.path(), id)).collect();
    done(&all[0], &["set", "label", "1"]);
    all.remove(2).kill();
    all.push(node(folder.path(), 2));
    await_that("the loss is noticed", || {
        done(&all[0], &["status"]).contains("lost its memory")
    });
    let watch = Command::new(BINARY)
        .args(["var", "watch", "--socket"])
        .arg(all[0].socket())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command runs");
    let text = fails_in_time(watch);
    assert!(text.contains("unavailable"), "{text}");
}

/// What a command said that fails by itself; it is killed if it does not end.
#[track_caller]
fn fails_in_time(mut child: Child) -> String {
    let Some(status) = await_exit(&mut child, PATIENCE) else {
        child.kill().expect("a living child");
        child.wait().expect("killed");
        panic!("it goes on");
    };
    let mut text = String::new();
    let stderr = child.stderr.as_mut().expect("a pipe");
    stderr.read_to_string(&mut text).expect("text");
    assert_eq!(status.code(), Some(1), "{text}");
    text
}
