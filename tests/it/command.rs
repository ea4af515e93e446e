//! The command as a shell sees it: exit codes, what is printed where, and what bad
//! input leaves unchanged.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Longest time that anything here may take.
const DEADLINE: Duration = Duration::from_secs(20);

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uffd-sync"));
    command.env_remove("XDG_RUNTIME_DIR").stdin(Stdio::null());
    command
}

/// Runs the command with the words of `line` and the node at `socket`.
fn run(socket: &Path, line: &str) -> Output {
    let mut command = command();
    command.args(line.split(' ')).arg("--socket").arg(socket);
    finish(command, &[])
}

/// Runs a command to its end with `input`, killed at the deadline.
fn finish(mut command: Command, input: &[u8]) -> Output {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the command starts");
    // It may end before it has read all: then the pipe breaks, which is fine.
    let _ = child.stdin.take().expect("a pipe").write_all(input);
    let pid = Pid::from_raw(child.id() as i32);
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    match finished.recv_timeout(DEADLINE) {
        Ok(output) => output.expect("the command can be waited for"),
        Err(_) => {
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
            panic!("{command:?} did not end in {DEADLINE:?}");
        }
    }
}

#[track_caller]
fn expect_code(output: &Output, code: i32) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(
        output.status.code(),
        Some(code),
        "stdout: {out}\nstderr: {err}"
    );
    (out, err)
}

#[track_caller]
fn json(output: &Output) -> Value {
    let (out, _) = expect_code(output, 0);
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

/// A node that serves in a folder of its own; killed on drop.
struct Serve {
    child: Child,
    log: mpsc::Receiver<String>,
    folder: TempDir,
}

impl Serve {
    fn start(more: &[&str]) -> Serve {
        let folder = tempfile::tempdir().expect("a scratch folder");
        Serve::start_in(folder, more)
    }

    fn start_in(folder: TempDir, more: &[&str]) -> Serve {
        let mut child = command()
            .args(["serve", "--name", "here", "--socket"])
            .arg(folder.path().join("node.sock"))
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the node starts");
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let (tell, log) = mpsc::channel();
        std::thread::spawn(move || {
            stderr
                .lines()
                .map_while(Result::ok)
                .all(|l| tell.send(l).is_ok())
        });
        let serve = Serve { child, log, folder };
        serve.wait_for_log("ready");
        serve
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("node.sock")
    }

    fn wait_for_log(&self, text: &str) -> String {
        let mut seen = Vec::new();
        let deadline = Instant::now() + DEADLINE;
        while let Ok(line) = self
            .log
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if line.contains(text) {
                return line;
            }
            seen.push(line);
        }
        panic!("the log never said {text:?}:\n{}", seen.join("\n"));
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).expect("the node is there");
    }

    /// Waits until the node has ended by itself.
    fn ended(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        // The log ends when the node does.
        while Instant::now() < deadline {
            match self.log.recv_timeout(DEADLINE) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("the node does not end"),
            }
        }
        self.child.wait().expect("the node can be waited for")
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn bad_input_ends_with_code_2_and_says_what_was_wrong() {
    let nowhere = Path::new("/nonexistent/node.sock");
    for (line, says) in [
        ("region create a/b --size 1MiB", "a/b"),
        ("region create a --size 12XB", "12XB"),
        (
            "region create a --size 99999999999999999999",
            "99999999999999999999",
        ),
        ("region read a --offset -1", "-1"),
        ("region watch a --count x", "x"),
        ("serve --listen 0.0.0.0:7411", "--insecure"),
        ("serve --listen nowhere", "nowhere"),
        ("serve --follow http://a:1/b", "tcp://"),
        ("serve --log =loud=", "log"),
        ("demo --region-size 4KiB", "--region-size"),
        ("nonsense", "nonsense"),
    ] {
        let (out, err) = expect_code(&run(nowhere, line), 2);
        assert!(err.contains(says), "{line}: {err}");
        assert_eq!(out, "", "{line}");
    }
}

#[test]
fn a_bad_configuration_is_named_with_its_line() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let file = folder.path().join("node.toml");
    fs::write(&file, "name = \"a\"\nsokcet = \"x\"\n").expect("a written file");
    let line = format!("serve --config {}", file.display());
    let socket = folder.path().join("node.sock");
    let (_, err) = expect_code(&run(&socket, &line), 2);
    assert!(err.contains("node.toml:2: key `sokcet`"), "{err}");
    assert!(!socket.exists(), "nothing was made");
}

#[test]
fn no_node_and_a_socket_that_is_none() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let absent = folder.path().join("absent.sock");
    let (_, err) = expect_code(&run(&absent, "status"), 1);
    assert!(
        err.starts_with("uffd-sync: ") && err.contains("uffd-sync serve"),
        "{err}"
    );
    let file = folder.path().join("file");
    fs::write(&file, "precious").expect("a written file");
    let (_, err) = expect_code(&run(&file, "serve"), 1);
    assert!(err.contains("file"), "{err}");
    assert_eq!(fs::read(&file).expect("still there"), b"precious");
}

#[test]
fn reports_need_no_node() {
    let limits = json(&finish_words(&["limits", "--json"]));
    let limits = limits.as_array().expect("an array");
    assert!(
        limits
            .iter()
            .any(|limit| limit["name"] == "MAX_CHUNK" && limit["value"] == 262_144)
    );
    let (man, _) = expect_code(&finish_words(&["man"]), 0);
    assert!(man.contains(".TH uffd-sync 1"), "{man}");
    for shell in ["bash", "zsh", "fish"] {
        let (script, _) = expect_code(&finish_words(&["completions", shell]), 0);
        assert!(script.contains("uffd-sync"), "{shell}");
    }
    let doctor = finish_words(&["doctor", "--json"]);
    let ready = doctor.status.code() == Some(0);
    let (out, _) = expect_code(&doctor, if ready { 0 } else { 3 });
    let found: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(found["ready"], ready);
    assert!(
        found["features"]
            .as_array()
            .is_some_and(|list| !list.is_empty())
    );
}

fn finish_words(words: &[&str]) -> Output {
    let mut command = command();
    command.args(words);
    finish(command, &[])
}

#[test]
fn a_pipe_closed_early_is_no_failure() {
    let mut child = command()
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("the command ends");
    let (_, err) = expect_code(&output, 0);
    assert_eq!(err, "");
}

#[test]
fn a_region_from_a_shell() {
    let node = Serve::start(&[]);
    let socket = node.socket();
    let made = json(&run(&socket, "region create prices --size 1MiB --json"));
    assert_eq!(
        (&made["name"], &made["size"]),
        (&"prices".into(), &(1 << 20).into())
    );

    let mut write = command();
    write
        .args(["region", "write", "prices", "--offset", "4KiB", "--socket"])
        .arg(&socket);
    expect_code(&finish(write, b"42.17"), 0);
    let (out, _) = expect_code(&run(&socket, "region read prices --offset 4095 --len 7"), 0);
    assert_eq!(out.as_bytes(), b"\x0042.17\0");
    let read = json(&run(
        &socket,
        "region read prices --offset 4KiB --len 5 --json",
    ));
    assert_eq!(read["hex"], "34322e3137");

    let (list, _) = expect_code(&run(&socket, "region list"), 0);
    assert!(
        list.lines()
            .next()
            .is_some_and(|head| head.starts_with("REGION ")),
        "{list}"
    );
    assert!(list.contains("prices"), "{list}");
    let status = json(&run(&socket, "status --json"));
    assert_eq!(status["node"], "here");
    assert_eq!(status["regions"][0]["name"], "prices");
    expect_code(&run(&socket, "region show prices"), 0);

    let digest = json(&run(&socket, "region digest prices --json"));
    let mut content = vec![0; 1 << 20];
    content[4096..4101].copy_from_slice(b"42.17");
    assert_eq!(digest["digest"], blake3::hash(&content).to_hex().as_str());
    assert_eq!(digest["stable"], true);

    expect_code(&run(&socket, "region remove prices"), 0);
    expect_code(&run(&socket, "region show prices"), 2);
}

#[test]
fn wrong_names_and_ranges_change_nothing() {
    let node = Serve::start(&[]);
    let socket = node.socket();
    expect_code(&run(&socket, "region create a --size 8KiB"), 0);
    let before = json(&run(&socket, "region digest a --json"));
    for line in [
        "region create a --size 8KiB",
        "region create b --size 0",
        "region create b --size 5000TiB",
        "region show none",
        "region read none",
        "region read a --offset 8193",
        "region read a --offset 8192 --len 1",
        "region read a --offset 1 --len 18446744073709551615",
        "region write none",
        "region write a --offset 8193",
        "region write a --file /nonexistent",
        "region track b --file /nonexistent",
        "region track b --file /dev/null",
        "region watch none",
        "region digest none",
        "region remove none",
    ] {
        let (out, err) = expect_code(&run(&socket, line), 2);
        assert!(err.starts_with("uffd-sync: "), "{line}: {err}");
        assert_eq!(out, "", "{line}");
    }
    let mut write = command();
    write
        .args(["region", "write", "a", "--offset", "4096", "--socket"])
        .arg(&socket);
    let (_, err) = expect_code(&finish(write, &[7; 4097]), 2);
    assert!(err.contains("4096") && err.contains("8192"), "{err}");
    let after = json(&run(&socket, "region digest a --json"));
    assert_eq!(before["digest"], after["digest"]);
    assert_eq!(
        json(&run(&socket, "region list --json"))
            .as_array()
            .map(Vec::len),
        Some(1)
    );
}

#[test]
fn watch_prints_a_line_per_epoch() {
    let node = Serve::start(&[]);
    let socket = node.socket();
    expect_code(&run(&socket, "region create a --size 8KiB"), 0);
    let mut watch = command()
        .args(["region", "watch", "a", "--count", "2", "--json", "--socket"])
        .arg(&socket)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the command starts");
    // The reader has joined once the node counts it.
    let deadline = Instant::now() + DEADLINE;
    while json(&run(&socket, "region show a --json"))["readers"] != 1 {
        assert!(Instant::now() < deadline, "the watcher never joined");
    }
    let mut lines = BufReader::new(watch.stdout.take().expect("a pipe")).lines();
    for round in [b"one", b"two"] {
        let mut write = command();
        write
            .args(["region", "write", "a", "--socket"])
            .arg(&socket);
        expect_code(&finish(write, round), 0);
        let line = lines.next().expect("a line").expect("text");
        let line: Value = serde_json::from_str(&line).expect("JSON");
        assert!(line["epoch"].as_u64() > Some(0), "{line}");
        assert!(line["bytes_changed"].as_u64() >= Some(2), "{line}");
    }
    assert!(watch.wait().expect("it ends").success());
}

#[test]
fn a_tracked_file_and_its_replica() {
    let node = Serve::start(&["--listen", "127.0.0.1:0"]);
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file in memory");
    file.write_all(&[3; 10_000]).expect("written");
    let line = format!(
        "region track maps --file {} --shared --json",
        file.path().display()
    );
    assert_eq!(json(&run(&node.socket(), &line))["size"], 10_000);
    let read = "region read maps --offset 9999 --len 1";
    let (out, _) = expect_code(&run(&node.socket(), read), 0);
    assert_eq!(out.as_bytes(), [3]);

    let status = json(&run(&node.socket(), "status --json"));
    let address = status["listen"].as_str().expect("an address");
    let other = Serve::start(&["--follow", &format!("tcp://{address}/maps=copy")]);
    let read = "region read copy --offset 9999 --len 1";
    let deadline = Instant::now() + DEADLINE;
    // Until the first sync there is no region yet, or none that is whole.
    while run(&other.socket(), read).stdout != [3] {
        assert!(Instant::now() < deadline, "the content never came");
    }
    file.as_file_mut()
        .write_all_at(&[4], 9_999)
        .expect("written again");
    while run(&other.socket(), read).stdout != [4] {
        assert!(Instant::now() < deadline, "the change never came");
    }
}

#[test]
fn an_occupied_socket_is_refused_and_a_stale_one_replaced() {
    let node = Serve::start(&[]);
    let (_, err) = expect_code(&run(&node.socket(), "serve"), 1);
    assert!(err.contains("node.sock"), "{err}");
    expect_code(&run(&node.socket(), "status"), 0);

    let folder = tempfile::tempdir().expect("a scratch folder");
    drop(UnixListener::bind(folder.path().join("node.sock")).expect("a socket"));
    let node = Serve::start_in(folder, &[]);
    expect_code(&run(&node.socket(), "status"), 0);
}

#[test]
fn sigterm_ends_a_node_and_takes_its_socket_along() {
    let mut node = Serve::start(&[]);
    node.signal(Signal::SIGTERM);
    assert_eq!(node.ended().code(), Some(0));
    assert!(!node.socket().exists());
}

#[test]
fn sighup_takes_over_what_can_change() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let file = folder.path().join("node.toml");
    fs::write(&file, "interval_max_us = 20000\n").expect("a written file");
    let path = file.to_str().expect("a plain path").to_owned();
    let node = Serve::start_in(folder, &["--config", &path]);
    fs::write(
        &file,
        "interval_max_us = 30000\nstaging_budget = \"64MiB\"\n",
    )
    .expect("written");
    node.signal(Signal::SIGHUP);
    let line = node.wait_for_log("restart");
    assert!(line.contains("staging_budget"), "{line}");
    fs::write(&file, "interval_max_us = \"soon\"\n").expect("written");
    node.signal(Signal::SIGHUP);
    node.wait_for_log("kept the old settings");
    expect_code(&run(&node.socket(), "status"), 0);
}

#[test]
fn metrics_are_served_as_text() {
    let port = {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        socket.local_addr().expect("an address").port()
    };
    let address = format!("127.0.0.1:{port}");
    let node = Serve::start(&["--metrics", &address]);
    expect_code(&run(&node.socket(), "region create a --size 8KiB"), 0);
    let mut stream = TcpStream::connect(&address).expect("the metrics answer");
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        .expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(
        answer.contains("# TYPE") && answer.contains("region=\"a\""),
        "{answer}"
    );
}

#[test]
fn a_demonstration_ends_verified() {
    let mut demo = command();
    demo.args(["demo", "--seconds", "1", "--region-size", "4MiB", "--json"]);
    let found = json(&finish(demo, &[]));
    assert_eq!(found["verified"], true);
    for key in [
        "bytes_changed",
        "bytes_on_wire",
        "full_copy_bytes",
        "updates",
    ] {
        assert!(found[key].as_u64() > Some(0), "{key}: {found}");
    }
    for key in ["latency_us", "commit_latency_us"] {
        assert!(found[key]["count"].as_u64() > Some(0), "{key}: {found}");
        assert!(found[key]["p50"].as_f64() > Some(0.0), "{key}: {found}");
    }
}

#[test]
fn a_demonstration_that_is_interrupted_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let mut demo = command()
            .args(["demo", "--seconds", "600", "--region-size", "1MiB"])
            .env("TMPDIR", scratch.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the demonstration starts");
        let deadline = Instant::now() + DEADLINE;
        let children = loop {
            let children = children_of(demo.id());
            // Two nodes, the writer, the reader.
            if children.len() == 4 {
                break children;
            }
            assert!(Instant::now() < deadline, "only {children:?} started");
        };
        let pid = Pid::from_raw(demo.id() as i32);
        nix::sys::signal::kill(pid, signal).expect("the demonstration is there");
        let status = demo.wait().expect("it ends");
        assert!(!status.success());
        while let Some(left) = children.iter().find(|pid| is_running(**pid)) {
            assert!(
                Instant::now() < deadline,
                "{signal}: process {left} is left"
            );
        }
        if signal == Signal::SIGINT {
            assert_eq!(status.code(), Some(1));
            let left = fs::read_dir(scratch.path()).expect("the folder").count();
            assert_eq!(left, 0, "sockets are left");
        }
    }
}

fn children_of(pid: u32) -> Vec<u32> {
    let file = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// Whether the process is there and not only waits to be reaped.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, state)| !state.starts_with('Z'))
}
