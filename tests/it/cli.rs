//! The commands against several nodes: regions that follow each other, files that are
//! compared, reports for programs, signals.

use std::io::Write;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::nodes::{
    NodeProcess, PATIENCE, Ran, await_content, await_following, await_that, folder, run, run_on,
};

#[track_caller]
fn works(node: &NodeProcess, line: &str, input: &[u8]) -> Ran {
    let ran = run_on(node, line, input);
    assert_eq!(ran.code, Some(0), "{line}: {ran:?}");
    ran
}

#[test]
fn files_go_into_a_region_and_out_of_it() {
    let folder = folder();
    let node = NodeProcess::start::<&str>(folder.path(), "node", &[]);
    assert_eq!(
        node.status().listen,
        None,
        "nothing listens on TCP unless it is told to"
    );
    let created = works(&node, "region create prices --size 3MiB --json", b"").json();
    assert_eq!(created["size"], 3 << 20);
    works(&node, "region write prices --offset 4KiB", b"42.17");
    let read = works(&node, "region read prices --offset 4095 --len 7", b"");
    assert_eq!(read.stdout, b"\x0042.17\0");

    // A file in, a file out, longer than one piece.
    let content: Vec<u8> = (0..(3u32 << 20)).map(|at| (at / 4099) as u8).collect();
    let (from, to) = (folder.path().join("in"), folder.path().join("out"));
    std::fs::write(&from, &content).expect("a file");
    works(
        &node,
        &format!("region write prices --file {}", from.display()),
        b"",
    );
    works(
        &node,
        &format!("region read prices --out {}", to.display()),
        b"",
    );
    assert!(std::fs::read(&to).expect("the file") == content);

    let digest = works(&node, "region digest prices --json", b"").json();
    assert_eq!(digest["digest"], blake3::hash(&content).to_hex().as_str());
    assert_eq!(digest["stable"], true);
    let shown = works(&node, "region show prices --json", b"").json();
    assert_eq!(
        (&shown["role"], &shown["epoch"]),
        (&"held".into(), &digest["epoch"])
    );
    for line in [
        "region list",
        "region show prices",
        "status",
        "region digest prices",
    ] {
        let text = works(&node, line, b"").text();
        assert!(text.contains("prices"), "{line}: {text}");
    }
    works(&node, "region remove prices", b"");
    assert_eq!(run_on(&node, "region show prices", b"").code, Some(2));
    assert_eq!(
        works(&node, "region list --json", b"").json(),
        serde_json::json!([])
    );
}

#[test]
fn json_of_every_report_parses() {
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    works(&node, "region create r --size 8KiB --shared", b"");
    works(&node, "region write r", b"bytes");
    let status = works(&node, "status --json", b"").json();
    assert_eq!(status["node"], "node");
    assert_eq!(status["regions"][0]["name"], "r");
    assert_eq!(status["listen"], node.listen().to_string());
    let read = works(&node, "region read r --len 5 --json", b"").json();
    assert_eq!(read["hex"], "6279746573");
    let written = works(&node, "region write r --json --offset 8191", b"x").json();
    assert_eq!(written["bytes"], 1);
    works(&node, "region remove r --json", b"").json();
    for line in [&["limits", "--json"][..], &["doctor", "--json"]] {
        let ran = run(line, b"");
        assert!(
            serde_json::from_slice::<serde_json::Value>(&ran.stdout).is_ok(),
            "{ran:?}"
        );
    }
    let limits = run(&["limits"], b"").text();
    assert!(limits.contains("MAX_CHUNK"), "{limits}");
    for line in [
        &["completions", "bash"][..],
        &["completions", "fish"],
        &["man"],
    ] {
        let ran = run(line, b"");
        assert_eq!(ran.code, Some(0), "{line:?}");
        assert!(ran.text().contains("uffd-sync"), "{line:?}");
    }
}

#[test]
fn two_nodes_by_hand_and_a_third_that_follows_the_second() {
    let folder = folder();
    let first = NodeProcess::source(folder.path(), "first");
    works(&first, "region create a --size 1MiB --shared", b"");
    works(&first, "region write a --offset 100", b"before");
    let second = NodeProcess::follower(
        folder.path(),
        "second",
        &[format!("tcp://{}/a=copy", first.listen())],
    );
    let third = NodeProcess::follower(
        folder.path(),
        "third",
        &[format!("tcp://{}/copy=again", second.listen())],
    );
    let mut expected = vec![0; 1 << 20];
    expected[100..106].copy_from_slice(b"before");
    await_content(&second, "copy", &expected);
    await_content(&third, "again", &expected);
    for round in 0..20u8 {
        works(
            &first,
            &format!("region write a --offset {}", 5000 * usize::from(round)),
            &[round; 9],
        );
        let at = 5000 * usize::from(round);
        expected[at..at + 9].fill(round);
    }
    await_content(&third, "again", &expected);
    await_content(&second, "copy", &expected);
    let digests = [(&first, "a"), (&second, "copy"), (&third, "again")]
        .map(|(node, name)| works(node, &format!("region digest {name} --json"), b"").json());
    assert_eq!(digests[0]["digest"], digests[1]["digest"]);
    assert_eq!(digests[0]["digest"], digests[2]["digest"]);
    assert_eq!(
        digests[0]["epoch"], digests[2]["epoch"],
        "epochs go through as they are"
    );

    // A replica is not written by hand, and goes on when its source is gone.
    assert_eq!(run_on(&second, "region write copy", b"x").code, Some(2));
    first.kill();
    await_that("the second is without a source", || {
        second
            .region("copy")
            .is_some_and(|region| region.state == "connecting")
    });
    await_content(&third, "again", &expected);
}

#[test]
fn a_file_is_tracked_by_comparing_it() {
    let folder = folder();
    let file = tempfile::Builder::new()
        .tempfile_in("/dev/shm")
        .expect("a file in /dev/shm");
    let mut content = vec![3; 300_000];
    std::fs::write(file.path(), &content).expect("the file");
    let source = NodeProcess::source(folder.path(), "source");
    let line = format!(
        "region track maps --file {} --shared",
        file.path().display()
    );
    works(&source, &line, b"");
    let follow = [format!("tcp://{}/maps", source.listen())];
    let follower = NodeProcess::follower(folder.path(), "follower", &follow);
    await_content(&follower, "maps", &content);
    let region = source.region("maps").expect("it is there");
    assert_eq!(serde_json::to_value(region.role).expect("a word"), "file");

    // Stored by somebody who knows nothing of it.
    let mut open = std::fs::OpenOptions::new()
        .write(true)
        .open(file.path())
        .expect("the file");
    open.write_all(b"beginning").expect("the file");
    content[..9].copy_from_slice(b"beginning");
    await_content(&follower, "maps", &content);

    // Truncated by somebody: what is missing is zeros, and the node survives.
    open.set_len(1000).expect("the file");
    content[1000..].fill(0);
    await_content(&follower, "maps", &content);
    assert!(source.status().uptime_ms > 0);
}

#[test]
fn sigterm_drains_and_ends_in_time() {
    let folder = folder();
    let mut source = NodeProcess::source(folder.path(), "source");
    works(&source, "region create r --size 1MiB --shared", b"");
    let follow = [format!("tcp://{}/r", source.listen())];
    let mut follower = NodeProcess::follower(folder.path(), "follower", &follow);
    await_following(&follower, "r");
    works(&source, "region write r", b"the last words");
    let bound = Duration::from_millis(uffd_sync::limits::DRAIN_DEADLINE_MS) + PATIENCE / 6;
    source.signal(Signal::SIGTERM);
    assert!(source.await_end(bound).success());
    let read = works(&follower, "region read r --len 14", b"");
    assert_eq!(read.stdout, b"the last words");
    follower.signal(Signal::SIGINT);
    assert!(follower.await_end(bound).success());
    assert!(!follower.socket().exists());
}

#[test]
fn a_stopped_follower_does_not_hold_up_the_end() {
    let folder = folder();
    let mut source = NodeProcess::source(folder.path(), "source");
    works(&source, "region create r --size 1MiB --shared", b"");
    let follow = [format!("tcp://{}/r", source.listen())];
    let follower = NodeProcess::follower(folder.path(), "follower", &follow);
    await_following(&follower, "r");
    follower.signal(Signal::SIGSTOP);
    works(&source, "region write r", b"nobody takes it");
    let bound = Duration::from_millis(uffd_sync::limits::DRAIN_DEADLINE_MS) + PATIENCE / 6;
    source.signal(Signal::SIGTERM);
    assert!(source.await_end(bound).success());
}

#[test]
fn sighup_takes_over_what_can_change() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    for name in ["one", "two"] {
        works(
            &source,
            &format!("region create {name} --size 4KiB --shared"),
            b"",
        );
    }
    let file = folder.path().join("node.toml");
    let follow = |name: &str| format!("follow = [\"tcp://{}/{name}\"]\n", source.listen());
    std::fs::write(&file, follow("one")).expect("a file");
    let path = file.to_str().expect("a path in ASCII");
    let node = NodeProcess::start(folder.path(), "node", &["--config", path]);
    await_following(&node, "one");

    // A wrong file changes nothing.
    std::fs::write(&file, "folow = []\n").expect("a file");
    node.signal(Signal::SIGHUP);
    node.await_log("kept the old settings");
    assert!(node.region("one").is_some());

    std::fs::write(&file, follow("two")).expect("a file");
    node.signal(Signal::SIGHUP);
    await_that("the other region is followed instead", || {
        let names: Vec<_> = node
            .status()
            .regions
            .into_iter()
            .map(|r| (r.name, r.state))
            .collect();
        names == [("two".to_owned(), "following".to_owned())]
    });
}

#[test]
fn a_region_may_come_later_than_its_follower_and_come_again_with_another_size() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    let follow = [format!("tcp://{}/late", source.listen())];
    let follower = NodeProcess::follower(folder.path(), "follower", &follow);
    follower.await_log("late");
    for (size, text) in [(8192, "first"), (100_000, "second"), (5, "third")] {
        works(
            &source,
            &format!("region create late --size {size} --shared"),
            b"",
        );
        works(&source, "region write late", text.as_bytes());
        let mut expected = text.as_bytes().to_vec();
        expected.resize(size, 0);
        await_content(&follower, "late", &expected);
        works(&source, "region remove late", b"");
    }
    // Its last content stays until it is followed no longer.
    let read = works(&follower, "region read late", b"");
    assert_eq!(read.stdout, b"third");
    works(&follower, "region remove late", b"");
    assert_eq!(follower.region("late"), None);
}
