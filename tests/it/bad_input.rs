//! Wrong input on the command line, in files and on the control socket: a clear
//! answer, the right exit code, and nothing changed.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::sys::signal::Signal;
use uffd_sync::client;
use uffd_sync::region::{Region, RegionOptions};
use uffd_sync::sys::memfd::{self, Seals};
use uffd_sync::sys::net::{self, Blocking};
use uffd_sync::sys::process::PidFd;
use uffd_sync::sys::{pagemap::Pagemap, uffd::Uffd};
use uffd_sync::wire::control::{self, CONTROL_VERSION, HandOver, RefusalCode, Request, Response};
use uffd_sync::words::{Mode, Publish, WriteKind};

use super::nodes::{NodeProcess, PATIENCE, Ran, folder, run, run_on};

/// A node with one region, and what it must still be after each wrong thing.
struct Unchanged {
    node: NodeProcess,
    before: serde_json::Value,
    _folder: tempfile::TempDir,
}

impl Unchanged {
    fn new() -> Self {
        let folder = folder();
        let node = NodeProcess::source(folder.path(), "node");
        run_on(&node, "region create kept --size 64KiB --shared", b"");
        let wrote = run_on(&node, "region write kept --offset 5", b"kept content");
        assert_eq!(wrote.code, Some(0), "{wrote:?}");
        let before = state(&node);
        Self {
            node,
            before,
            _folder: folder,
        }
    }

    #[track_caller]
    fn check(&mut self) {
        assert!(
            self.node.is_alive(),
            "the node ended:\n{}",
            self.node.tail()
        );
        assert_eq!(state(&self.node), self.before);
    }

    /// Runs a command that has to be refused with exit code 2, naming `named`.
    #[track_caller]
    fn refuses(&mut self, line: &str, named: &str) {
        let ran = run_on(&self.node, line, b"input");
        refused(&ran, line, named);
        self.check();
    }
}

/// The regions and the digest of the one whose content matters.
fn state(node: &NodeProcess) -> serde_json::Value {
    let digest = run_on(node, "region digest kept --json", b"").json();
    let regions = node.status().regions;
    let names: Vec<_> = regions
        .iter()
        .map(|region| (&region.name, region.epoch))
        .collect();
    serde_json::json!({ "digest": digest["digest"], "regions": names })
}

#[track_caller]
fn refused(ran: &Ran, line: &str, named: &str) {
    assert_eq!(ran.code, Some(2), "{line}: {ran:?}");
    assert!(
        ran.stderr.contains(named),
        "{line}: {named:?} is not in {:?}",
        ran.stderr
    );
    assert!(ran.stdout.is_empty(), "{line}: {}", ran.text());
}

#[test]
fn the_command_line_refuses_wrong_names_sizes_and_ranges() {
    let mut node = Unchanged::new();
    let long_name = "n".repeat(65);
    let cases = [
        ("region show other", "other"),
        ("region read other", "other"),
        ("region write other", "other"),
        ("region digest other", "other"),
        ("region watch other", "other"),
        ("region remove other", "other"),
        ("region create kept --size 1MiB", "kept"),
        ("region create a/b --size 1MiB", "/"),
        ("region create .a --size 1MiB", "begins"),
        ("region create a --size 0", "0"),
        ("region create a --size 12XB", "12XB"),
        ("region create a --size 1.0000001KiB", "1.0000001KiB"),
        (
            "region create a --size 99999999999999999999GiB",
            "99999999999999999999GiB",
        ),
        ("region create a --size 5000TiB", ""),
        ("region create a --size=-1", "-1"),
        ("region create a --size 4KiB --mode async", "--mode async"),
        ("region create a --size 4KiB --mode fast", "fast"),
        ("region create a", "--size"),
        ("region write kept --offset 64KiB", "65536"),
        ("region write kept --offset 65532", "65532"),
        (
            "region write kept --offset 18446744073709551615",
            "18446744073709551615",
        ),
        (
            "region write kept --offset 18446744073709551616",
            "18446744073709551616",
        ),
        ("region read kept --offset 65530 --len 7", "65530"),
        (
            "region read kept --offset 18446744073709551615 --len 18446744073709551615",
            "",
        ),
        ("region track t --file /no/such/file", "/no/such/file"),
        ("region track t --file /dev", "/dev"),
        ("region track t --file /dev/null", "/dev/null"),
        ("region frobnicate kept", "frobnicate"),
        ("no-such-command", "no-such-command"),
    ];
    for (line, named) in cases {
        node.refuses(line, named);
    }
    node.refuses(&format!("region create {long_name} --size 1MiB"), "65");
}

#[test]
fn a_node_refuses_to_start_on_wrong_flags() {
    let folder = folder();
    let socket = folder.path().join("n.sock");
    let socket = socket.to_str().expect("a path in ASCII");
    let cases = [
        ("--listen 0.0.0.0:0", "--insecure"),
        ("--listen [::]:0", "--insecure"),
        ("--metrics 0.0.0.0:0", "--insecure"),
        ("--listen localhost", "localhost"),
        ("--listen 127.0.0.1:99999", "99999"),
        ("--follow http://h:1/r", "http://h:1/r"),
        ("--follow tcp://h/r", "tcp://h/r"),
        ("--follow tcp://h:1/a=c --follow tcp://h:1/b=c", "c"),
        ("--name a/b", "a/b"),
        ("--log =,=", ""),
        ("--config /no/such/file.toml", "/no/such/file.toml"),
        ("--frobnicate", "frobnicate"),
    ];
    for (flags, named) in cases {
        let line = format!("serve --socket {socket} {flags}");
        let ran = run(&line.split(' ').collect::<Vec<_>>(), b"");
        refused(&ran, &line, named);
        assert!(
            !folder.path().join("n.sock").exists(),
            "{line} left a socket"
        );
    }
}

#[test]
fn a_wrong_configuration_is_named_with_its_line() {
    let folder = folder();
    let file = folder.path().join("node.toml");
    let cases = [
        ("name = \"a\"\n\nlistne = \"127.0.0.1:0\"\n", 3, "listne"),
        ("interval_min_us = \"soon\"\n", 1, "interval_min_us"),
        (
            "name = \"a\"\nstaging_budget = \"12XB\"\n",
            2,
            "staging_budget",
        ),
        (
            "name = \"a\"\nfollow = [\n  \"tcp://h:1/r\",\n  \"tcp://h/r\",\n]\n",
            2,
            "follow",
        ),
        ("name = \"a\"\nname = \"b\"\n", 2, "name"),
        ("this is no toml\n", 1, ""),
    ];
    for (text, line, key) in cases {
        std::fs::write(&file, text).expect("a file in the temporary folder");
        let path = file.to_str().expect("a path in ASCII");
        let socket = folder.path().join("c.sock");
        let socket = socket.to_str().expect("a path in ASCII");
        let ran = run(&["serve", "--socket", socket, "--config", path], b"");
        refused(&ran, text, key);
        let place = format!("node.toml:{line}:");
        assert!(
            ran.stderr.contains(&place),
            "{place} is not in {:?}",
            ran.stderr
        );
    }
    std::fs::write(&file, "interval_min_us = 50000\ninterval_max_us = 1000\n").expect("a file");
    let path = file.to_str().expect("a path in ASCII");
    refused(
        &run(&["serve", "--config", path], b""),
        "intervals",
        "interval_min_us",
    );
}

#[test]
fn commands_without_a_node_fail_and_say_where_they_looked() {
    let folder = folder();
    let nowhere = folder.path().join("nowhere.sock");
    let nowhere = nowhere.to_str().expect("a path in ASCII");
    let file = folder.path().join("file");
    std::fs::write(&file, "no socket").expect("a file in the temporary folder");
    let file = file.to_str().expect("a path in ASCII");
    for path in [nowhere, file] {
        let ran = run(&["status", "--socket", path], b"");
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains(path), "{ran:?}");
    }
    assert_eq!(
        std::fs::read(file).expect("it is still there"),
        b"no socket"
    );
}

#[test]
fn sockets_are_replaced_when_stale_and_only_then() {
    let folder = folder();
    let path = folder.path().join("node.sock");
    let text = path.to_str().expect("a path in ASCII").to_owned();
    let serve = ["serve", "--socket", &text];

    // Something that is no socket stays.
    std::fs::write(&path, "mine").expect("a file in the temporary folder");
    let ran = run(&serve, b"");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains(&text), "{ran:?}");
    assert_eq!(std::fs::read(&path).expect("it is still there"), b"mine");
    std::fs::remove_file(&path).expect("it is ours");

    // An occupied one is refused, and its node is not disturbed.
    let node = NodeProcess::source(folder.path(), "node");
    let ran = run(&serve, b"");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains(&text), "{ran:?}");
    assert_eq!(node.status().node, "node");

    // Somebody else's listener too.
    node.kill();
    std::fs::remove_file(&path).expect("the stale socket");
    let listener = UnixListener::bind(&path).expect("a free path");
    let ran = run(&serve, b"");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    drop(listener);

    // The stale one that is left now is replaced.
    assert!(path.exists());
    let mut node = NodeProcess::source(folder.path(), "node");
    assert_eq!(node.status().node, "node");
    node.signal(Signal::SIGTERM);
    assert!(node.await_end(PATIENCE).success());
    assert!(!path.exists(), "a node that ends takes its socket away");
}

#[test]
fn doctor_says_3_if_and_only_if_something_required_is_missing() {
    let ran = run(&["doctor", "--json"], b"");
    let report: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("JSON");
    let text = report.to_string();
    let missing = text.contains("\"required\":true")
        && probes(&report).iter().any(|probe| {
            probe["required"] == true && !probe.to_string().to_lowercase().contains("works")
        });
    assert_eq!(ran.code, Some(if missing { 3 } else { 0 }), "{text}");
}

/// Every object in the report that says whether it is required.
fn probes(value: &serde_json::Value) -> Vec<&serde_json::Value> {
    match value {
        serde_json::Value::Array(items) => items.iter().flat_map(probes).collect(),
        serde_json::Value::Object(map) if map.contains_key("required") => vec![value],
        serde_json::Value::Object(map) => map.values().flat_map(probes).collect(),
        _ => Vec::new(),
    }
}

/// Sends bytes to the control socket and reads until the node closes or answers.
fn tell(node: &NodeProcess, bytes: &[u8]) -> Vec<u8> {
    let mut socket = UnixStream::connect(node.socket()).expect("the node listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let _ = socket.write_all(bytes);
    let _ = socket.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    answer
}

#[test]
fn garbage_on_the_control_socket_closes_that_connection_only() {
    let mut node = Unchanged::new();
    let hello = control::encode(
        &Request::Hello {
            version: CONTROL_VERSION,
        },
        b"",
    )
    .expect("short");
    let with_lengths = |json: u32, payload: u32| {
        let mut bytes = control::MAGIC.to_vec();
        bytes.extend(json.to_le_bytes());
        bytes.extend(payload.to_le_bytes());
        bytes
    };
    let cases: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0; 100_000],
        vec![0xFF; 3],
        with_lengths(u32::MAX, 0),
        with_lengths(10, u32::MAX),
        with_lengths(0, 0),
        [with_lengths(2, 0), b"{}".to_vec()].concat(),
        [with_lengths(9, 0), vec![0xC3; 9]].concat(),
        hello[..hello.len() - 1].to_vec(),
        [hello, b"and then garbage that goes on".to_vec()].concat(),
    ];
    for bytes in cases {
        tell(&node.node, &bytes);
        node.check();
    }
    // Half a message, then silence: others are served meanwhile.
    let mut silent = UnixStream::connect(node.node.socket()).expect("the node listens");
    silent
        .write_all(&with_lengths(100, 0))
        .expect("a few bytes");
    node.check();
}

/// One request with descriptors over a connection of its own.
pub(crate) fn ask(
    node: &NodeProcess,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Option<Response> {
    let socket = net::unix_connect(node.socket()).expect("the node listens");
    net::set_timeouts(&socket, Some(PATIENCE), Some(PATIENCE)).expect("a socket");
    let bytes = control::encode(request, b"").expect("short");
    net::send_with_fds(&socket, &bytes, fds).ok()?;
    let mut buffer = Vec::new();
    let mut piece = [0; 4096];
    loop {
        if let Some(message) = control::decode(&mut buffer, 1 << 20).expect("an answer") {
            return Some(message.body);
        }
        let received = net::recv_with_fds(&socket, &mut piece, 8, Blocking::Yes).ok()?;
        if received.bytes == 0 {
            return None;
        }
        buffer.extend_from_slice(&piece[..received.bytes]);
    }
}

#[track_caller]
pub(crate) fn invalid(response: Option<Response>) -> String {
    match response {
        Some(Response::Refused {
            code: RefusalCode::Invalid | RefusalCode::Failed,
            message,
        }) => message,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn another_version_of_the_control_socket_is_refused_by_name() {
    let mut node = Unchanged::new();
    match ask(
        &node.node,
        &Request::Hello {
            version: CONTROL_VERSION + 1,
        },
        &[],
    ) {
        Some(Response::Refused {
            code: RefusalCode::Version,
            message,
        }) => {
            assert!(
                message.contains(&(CONTROL_VERSION + 1).to_string()),
                "{message}"
            );
        }
        other => panic!("not refused: {other:?}"),
    }
    node.check();
}

/// The descriptors of a right hand-over, to be made wrong one at a time.
pub(crate) struct Offer {
    pub(crate) region: Region,
    pidfd: PidFd,
    uffd: Uffd,
    pub(crate) pagemap: Pagemap,
}

pub(crate) const OFFERED: u64 = 64 * 1024;

impl Offer {
    pub(crate) fn new() -> Self {
        let name = "offered".parse().expect("a name");
        let region = Region::create(&name, OFFERED, &RegionOptions::default()).expect("a region");
        let uffd = Uffd::open_async().expect("userfaultfd");
        uffd.register_wp(region.mapping())
            .expect("write-protection");
        Self {
            region,
            pidfd: PidFd::own().expect("a pidfd"),
            uffd,
            pagemap: Pagemap::open_self().expect("the page map"),
        }
    }

    pub(crate) fn request(&self) -> HandOver {
        HandOver {
            name: "offered".into(),
            size: OFFERED,
            max_size: None,
            mode: Mode::Async,
            publish: Publish::Timer,
            shared: true,
            base: self.region.mapping().address(),
            interval_min_us: None,
            interval_max_us: None,
            chosen: None,
            kind: WriteKind::Exclusive,
            slot: None,
        }
    }

    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 5] {
        [
            self.region.data_fd(),
            self.region.control_fd(),
            self.pidfd.as_fd(),
            self.uffd.as_fd(),
            self.pagemap.as_fd(),
        ]
    }
}

#[test]
fn a_hand_over_of_wrong_descriptors_is_refused() {
    let mut node = Unchanged::new();
    let offer = Offer::new();
    let (pipe, _other_end) = std::io::pipe().expect("a pipe");
    let pipe = OwnedFd::from(pipe);
    let unsealed = memfd::create("unsealed", OFFERED).expect("a memfd");
    let short = memfd::create("short", 4096).expect("a memfd");
    memfd::add_seals(&short, Seals::SHRINK | Seals::FUTURE_WRITE | Seals::SEAL).expect("seals");
    let file = std::fs::File::open("/proc/self/status").expect("a file");
    let named = ["memfd", "control page", "pidfd", "userfaultfd", "pagemap"];
    let wrong = [pipe.as_fd(), unsealed.as_fd(), short.as_fd(), file.as_fd()];
    for at in 0..offer.fds().len() {
        for fd in wrong {
            let mut fds = offer.fds();
            fds[at] = fd;
            let request = Request::HandOver(offer.request());
            let message = invalid(ask(&node.node, &request, &fds));
            assert!(message.contains(named[at]), "{}: {message}", named[at]);
            node.check();
        }
    }
    for count in 0..5 {
        let request = Request::HandOver(offer.request());
        invalid(ask(&node.node, &request, &offer.fds()[..count]));
        node.check();
    }
    // The same request with the right ones is carried out.
    match ask(
        &node.node,
        &Request::HandOver(offer.request()),
        &offer.fds(),
    ) {
        Some(Response::HandedOver { .. }) => {}
        other => panic!("refused: {other:?}"),
    }
}

#[test]
fn a_hand_over_that_lies_about_its_place_is_refused() {
    let mut node = Unchanged::new();
    let offer = Offer::new();
    let lies: [fn(&mut HandOver); 6] = [
        |offer| offer.size = OFFERED * 2,
        |offer| offer.size = 0,
        |offer| offer.size = u64::MAX,
        |offer| offer.base = u64::MAX - 4095,
        |offer| offer.base += 1,
        |offer| offer.name = "../etc".into(),
    ];
    for lie in lies {
        let mut request = offer.request();
        lie(&mut request);
        invalid(ask(&node.node, &Request::HandOver(request), &offer.fds()));
        node.check();
    }
    // A name that is taken by a region of another kind.
    let mut request = offer.request();
    request.name = "kept".into();
    match ask(&node.node, &Request::HandOver(request), &offer.fds()) {
        Some(Response::Refused {
            code: RefusalCode::Exists,
            ..
        }) => {}
        other => panic!("not refused: {other:?}"),
    }
    node.check();
}

#[test]
fn too_many_descriptors_close_the_connection() {
    let mut node = Unchanged::new();
    let fd = memfd::create("one", 4096).expect("a memfd");
    let many = vec![fd.as_fd(); 100];
    let answer = ask(&node.node, &Request::Status, &many);
    assert!(
        !matches!(answer, Some(Response::Status(_))),
        "a hundred descriptors were taken"
    );
    node.check();
    let before = open_fds(&node.node);
    for _ in 0..50 {
        ask(&node.node, &Request::Status, &many);
    }
    node.check();
    assert!(open_fds(&node.node) <= before + 4, "descriptors leak");
}

pub(crate) fn open_fds(node: &NodeProcess) -> usize {
    let folder = format!("/proc/{}/fd", node.pid());
    std::fs::read_dir(folder).expect("a living process").count()
}

#[test]
fn a_reader_with_a_wrong_hold_page_is_refused() {
    let mut node = Unchanged::new();
    let request = Request::Attach {
        name: "kept".into(),
    };
    let unsealed = memfd::create("hold", 4096).expect("a memfd");
    let (pipe, _other_end) = std::io::pipe().expect("a pipe");
    let pipe = OwnedFd::from(pipe);
    for fds in [
        &[unsealed.as_fd()][..],
        &[pipe.as_fd()],
        &[],
        &[pipe.as_fd(), pipe.as_fd()],
    ] {
        invalid(ask(&node.node, &request, fds));
        node.check();
    }
}

#[test]
fn a_taken_name_and_a_second_writer_are_refused() {
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let options = client::WriterOptions::default();
    let first = client::Writer::create(node.socket(), "one", 8192, &options).expect("a region");
    let mut second = super::writer::WriterProcess::start();
    let report = second.order(&super::writer::Order::Create {
        socket: node.socket().to_owned(),
        name: "one".into(),
        size: 8192,
        mode: "async".into(),
        publish: "timer".into(),
        more: super::writer::More::default(),
    });
    match report {
        super::writer::Report::Failed { error } => assert!(error.contains("Exists"), "{error}"),
        other => panic!("two writers of one region: {other:?}"),
    }
    let ran = run_on(&node, "region remove one", b"");
    assert_eq!(
        ran.code,
        Some(2),
        "a region with a living writer is not removed: {ran:?}"
    );
    first.write(0, b"still").expect("it is inside");
    first
        .commit(Duration::from_secs(10))
        .expect("the first writer goes on");
}

#[test]
fn more_connections_than_there_may_be_are_refused() {
    uffd_sync::sys::process::raise_fd_limit();
    let mut node = Unchanged::new();
    let most = uffd_sync::limits::MAX_CONNECTIONS as usize;
    let mut open: Vec<UnixStream> = (0..most + 10)
        .map(|_| UnixStream::connect(node.node.socket()).expect("the node listens"))
        .collect();
    let mut closed = 0;
    super::nodes::await_that("those beyond the limit are closed", || {
        closed = open
            .iter_mut()
            .map(is_closed)
            .filter(|closed| *closed)
            .count();
        closed >= 10
    });
    assert!(closed < 20, "{closed} connections were closed");
    assert!(node.node.is_alive());
    drop(open);
    super::nodes::await_that("there is room again", || {
        client::Node::connect(node.node.socket()).is_ok()
    });
    node.check();
}

fn is_closed(socket: &mut UnixStream) -> bool {
    socket.set_nonblocking(true).expect("a socket");
    match socket.read(&mut [0; 64]) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}
