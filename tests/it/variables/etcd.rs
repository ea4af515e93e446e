//! Order by an etcd cluster: Debian's etcd, one member and three, killed and stopped.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uffd_sync::client::variables::{
    Address, EtcdConfig, Notice, Operation, OperationError, OrderKind, Value, ValueKind, Variables,
    VariablesConfig,
};

use super::free;
use super::linear::{Answer, Call, is_linearisable};
use super::relay::Relay;
use crate::nodes::{await_that, folder};

const PATIENCE: Duration = Duration::from_secs(60);

fn is_there() -> bool {
    let there = Command::new("etcd").arg("--version").output().is_ok();
    let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
    assert!(
        there || !required,
        "etcd is missing: apt-get install etcd-server"
    );
    if !there {
        use std::io::Write as _;
        let _ = std::io::stderr().write_all(b"SKIP etcd is missing: apt-get install etcd-server\n");
    }
    there
}

/// One member, killed and reaped when dropped.
struct Member {
    child: Child,
    client: SocketAddr,
}

impl Member {
    fn start(folder: &Path, at: usize, client: SocketAddr, peers: &[SocketAddr]) -> Self {
        let cluster: Vec<_> = (0..)
            .zip(peers)
            .map(|(at, peer)| format!("m{at}=http://{peer}"))
            .collect();
        let child = Command::new("etcd")
            .args([
                "--name",
                &format!("m{at}"),
                "--logger",
                "zap",
                "--log-level",
                "error",
            ])
            .arg("--data-dir")
            .arg(folder.join(format!("m{at}")))
            .args(["--listen-client-urls", &format!("http://{client}")])
            .args(["--advertise-client-urls", &format!("http://{client}")])
            .args(["--listen-peer-urls", &format!("http://{}", peers[at])])
            .args([
                "--initial-advertise-peer-urls",
                &format!("http://{}", peers[at]),
            ])
            .args(["--initial-cluster", &cluster.join(",")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd starts");
        Self { child, client }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("a living child");
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cluster(folder: &Path, members: usize) -> Vec<Member> {
    let peers: Vec<_> = (0..members).map(|_| free()).collect();
    let all: Vec<_> = (0..members)
        .map(|at| Member::start(folder, at, free(), &peers))
        .collect();
    for member in &all {
        await_that("etcd listens", || TcpStream::connect(member.client).is_ok());
    }
    all
}

fn config(process: u32, endpoints: &[String]) -> VariablesConfig {
    let name = |text: &str| text.parse().expect("a name");
    let mut config = VariablesConfig::new(process).order(OrderKind::Etcd);
    for id in 0..3 {
        config = config.member(id, Address::Unix(format!("/unused/{id}").into()));
    }
    config.etcd = Some(EtcdConfig {
        endpoints: endpoints.to_vec(),
        timeout_ms: Some(500),
        ..EtcdConfig::default()
    });
    config
        .variable(0, name("left"), ValueKind::I64, [0, 1])
        .variable(1, name("right"), ValueKind::I64, [1, 2])
        .variable(2, name("total"), ValueKind::I64, [0, 1, 2])
        .variable(3, name("text"), ValueKind::Bytes, [0, 1, 2])
}

struct Party {
    variables: Variables,
    heard: Receiver<Notice>,
}

fn parties(members: &[Member]) -> Vec<Party> {
    let endpoint = |member: &Member| format!("http://{}", member.client);
    let endpoints: Vec<_> = members.iter().map(endpoint).collect();
    (0..3)
        .map(|process| {
            let mut endpoints = endpoints.clone();
            endpoints.rotate_left(process as usize % members.len());
            party(process, &endpoints)
        })
        .collect()
}

/// Starts as soon as the cluster serves.
fn party(process: u32, endpoints: &[String]) -> Party {
    let (told, heard) = mpsc::channel();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let told = told.clone();
        let callback = move |notice: &Notice| {
            // The test may have ended.
            let _ = told.send(notice.clone());
        };
        match Variables::start(config(process, endpoints), callback) {
            Ok(variables) => return Party { variables, heard },
            Err(error) if Instant::now() > deadline => panic!("{error:?}"),
            // The cluster elects its leader.
            Err(_) => {}
        }
    }
}

impl Party {
    /// The changes up to the one of variable 3 to `last`.
    fn changes_to(&self, last: &str) -> Vec<(u64, u32, Value, Value)> {
        let mut all = Vec::new();
        loop {
            match self.heard.recv_timeout(PATIENCE).expect("a notice") {
                Notice::Change(change) => {
                    let end = change.variable == 3 && change.new == Value::bytes(last.as_bytes());
                    all.push((change.key.time, change.variable, change.old, change.new));
                    if end {
                        return all;
                    }
                }
                other => panic!("{other:?} in place of a change"),
            }
        }
    }
}

#[test]
fn one_member_orders_and_judges() {
    if !is_there() {
        return;
    }
    let folder = folder();
    let members = cluster(folder.path(), 1);
    let all = parties(&members);
    let [zero, one, two] = &all[..] else {
        panic!("three")
    };
    zero.variables.write(0, 10, PATIENCE).expect("written");
    assert_eq!(
        zero.variables.get(0),
        Ok(Value::Integer(10)),
        "its own write is seen"
    );
    let swap = |party: &Party, expected: i64, new: i64| {
        party
            .variables
            .compare_and_swap(2, expected, new, PATIENCE)
            .expect("decided")
    };
    assert!(swap(zero, 0, 20));
    assert!(!swap(two, 0, 30));
    assert!(swap(one, 20, 20), "an equal value is a success");
    assert_eq!(
        two.variables.read_ordered(2, PATIENCE),
        Ok(Value::Integer(20))
    );
    let long = vec![0xFF; 16 * 1024];
    one.variables
        .write(3, Value::bytes(&long), PATIENCE)
        .expect("written");
    one.variables
        .write(3, Value::bytes(b"end"), PATIENCE)
        .expect("written");
    assert!(
        two.variables.write(0, 1, PATIENCE).is_err(),
        "not a subscriber"
    );
    let heard: Vec<_> = all.iter().map(|party| party.changes_to("end")).collect();
    let kinds: Vec<u32> = heard[0].iter().map(|change| change.1).collect();
    assert_eq!(kinds, [0, 2, 2, 3, 3]);
    assert_eq!(heard[0][1..], heard[2][..], "the same places and values");
    assert_eq!(heard[0], heard[1]);
}

/// While one process cannot reach the cluster its changes are compacted away: it hears
/// what everything holds, instead of a gap that nobody tells of.
#[test]
fn compacted_changes_become_a_resync() {
    if !is_there() {
        return;
    }
    let folder = folder();
    let members = cluster(folder.path(), 1);
    let relay = Relay::to(members[0].client);
    let direct = vec![format!("http://{}", members[0].client)];
    let writer = party(1, &direct);
    let cut_off = party(2, &[format!("http://{}", relay.address())]);
    writer
        .variables
        .write(3, Value::bytes(b"a"), PATIENCE)
        .expect("written");
    cut_off.changes_to("a");
    relay.close(true);
    for number in 0..5 {
        writer
            .variables
            .write(2, number, PATIENCE)
            .expect("written");
    }
    let revision = writer.variables.status().expect("an answer").clock;
    let url = format!("{}/v3/kv/compaction", direct[0]);
    let mut answer = ureq::post(url)
        .send(format!("{{\"revision\":\"{revision}\"}}"))
        .expect("an answer");
    answer.body_mut().read_to_string().expect("text");
    relay.close(false);
    match cut_off.heard.recv_timeout(PATIENCE).expect("a notice") {
        Notice::Resync { time, values } => {
            assert_eq!(time, revision);
            assert!(values.contains(&(2, Value::Integer(4))), "{values:?}");
        }
        other => panic!("{other:?} in place of a resync"),
    }
    assert_eq!(cut_off.variables.get(2), Ok(Value::Integer(4)));
    writer
        .variables
        .write(3, Value::bytes(b"b"), PATIENCE)
        .expect("written");
    assert_eq!(cut_off.changes_to("b").len(), 1, "and goes on from there");
}

/// Nobody can say what became of an operation whose cluster is gone.
#[test]
fn without_the_cluster_the_outcome_is_indeterminate() {
    if !is_there() {
        return;
    }
    let folder = folder();
    let members = cluster(folder.path(), 1);
    let alone = party(1, &[format!("http://{}", members[0].client)]);
    alone.variables.write(2, 1, PATIENCE).expect("written");
    members[0].signal(Signal::SIGSTOP);
    // Long enough for a worker to take it up on a busy machine.
    let deadline = Duration::from_secs(2);
    let outcome = alone.variables.compare_and_swap(2, 1, 2, deadline);
    assert_eq!(outcome, Err(OperationError::Indeterminate), "never false");
    members[0].signal(Signal::SIGCONT);
    // It may still be carried out, once.
    for tries in 0.. {
        let held = alone.variables.read_ordered(2, PATIENCE).expect("read");
        assert!(
            [Value::Integer(1), Value::Integer(2)].contains(&held),
            "{held}"
        );
        if alone.variables.compare_and_swap(2, held, 3, PATIENCE) == Ok(true) {
            break;
        }
        assert!(tries < 2, "it was carried out twice");
    }
    assert_eq!(
        alone.variables.read_ordered(2, PATIENCE),
        Ok(Value::Integer(3))
    );
}

/// Counts up from what was last heard, or reads in order; what came of it, and when.
fn swap_or_read(variables: &Variables, now: impl Fn() -> u64) -> Call {
    let begin = now();
    let deadline = Duration::from_secs(20);
    let held = variables.get(2).expect("a subscriber");
    let Value::Integer(number) = held else {
        panic!("a number")
    };
    let operation = if begin.is_multiple_of(4) {
        Operation::Read
    } else {
        let new = Value::Integer(number + 1);
        Operation::CompareAndSwap {
            expected: held,
            new,
        }
    };
    let answer = match variables.carry_out(2, operation.clone(), deadline) {
        Ok(done) if operation == Operation::Read => {
            Some(Answer::Found(done.old.expect("an answer of a read")))
        }
        Ok(done) => Some(Answer::Swapped(done.applied)),
        Err(OperationError::Indeterminate) => None,
        Err(error) => panic!("{error}"),
    };
    Call {
        begin,
        end: answer.map(|answer| (now(), answer)),
        operation,
    }
}

/// Three members, of which one is killed and one stopped for a while: what was answered
/// holds, and all hear the same.
#[test]
fn members_die_and_stand_still() {
    if !is_there() {
        return;
    }
    let folder = folder();
    let mut members = cluster(folder.path(), 3);
    let all = parties(&members);
    let started = Instant::now();
    let now = move || started.elapsed().as_nanos() as u64;
    let counts: Vec<Vec<Call>> = std::thread::scope(|scope| {
        let counting: Vec<_> = all
            .iter()
            .map(|party| {
                let variables = &party.variables;
                scope.spawn(move || (0..60).map(|_| swap_or_read(variables, now)).collect())
            })
            .collect();
        members[1].signal(Signal::SIGSTOP);
        // As long as it stands still; the others go on meanwhile.
        std::thread::sleep(Duration::from_millis(1500));
        members[1].signal(Signal::SIGCONT);
        drop(members.remove(0));
        let all = counting.into_iter();
        all.map(|one| one.join().expect("no panic")).collect()
    });
    let history: Vec<Call> = counts.into_iter().flatten().collect();
    let is = is_linearisable(&history, &Value::Integer(0));
    assert_ne!(is, Some(false), "{history:?}");
    let with = |answer: Option<Answer>| {
        let same = |call: &&Call| call.end.as_ref().map(|(_, answer)| answer) == answer.as_ref();
        history.iter().filter(same).count() as i64
    };
    let (swapped, unknown) = (with(Some(Answer::Swapped(true))), with(None));
    let held = all[2].variables.read_ordered(2, PATIENCE).expect("read");
    let Value::Integer(held) = held else {
        panic!("a number")
    };
    assert!(
        (swapped..=swapped + unknown).contains(&held),
        "{held} after {swapped} swaps and {unknown} unknown"
    );
    assert!(swapped > 20, "{swapped}");
    let done = Operation::Write(Value::bytes(b"end"));
    all[0]
        .variables
        .carry_out(3, done, PATIENCE)
        .expect("written");
    let heard: Vec<_> = all.iter().map(|party| party.changes_to("end")).collect();
    assert_eq!(heard[0], heard[1]);
    assert_eq!(heard[1], heard[2]);
    let mut last = 0;
    for (time, _, old, new) in heard[0].iter().filter(|change| change.1 == 2) {
        assert!(*time > last, "places rise");
        last = *time;
        let (Value::Integer(old), Value::Integer(new)) = (old, new) else {
            panic!("numbers")
        };
        assert_eq!(old + 1, *new, "each swap found what the one before left");
    }
}

fn post(client: SocketAddr, path: &str, body: &str) -> String {
    let mut answer = ureq::post(format!("http://{client}{path}"))
        .config()
        .http_status_as_error(false)
        .build()
        .send(body)
        .expect("an answer");
    answer.body_mut().read_to_string().expect("text")
}

#[test]
fn a_user_logs_in_and_nobody_else_gets_in() {
    if !is_there() {
        return;
    }
    let folder = folder();
    let members = cluster(folder.path(), 1);
    let client = members[0].client;
    let direct = vec![format!("http://{client}")];
    drop(party(0, &direct));
    for (path, body) in [
        ("role/add", r#"{"name":"root"}"#),
        ("user/add", r#"{"name":"root","password":"secret"}"#),
        ("user/grant", r#"{"user":"root","role":"root"}"#),
        ("enable", "{}"),
    ] {
        let said = post(client, &format!("/v3/auth/{path}"), body);
        assert!(!said.contains("\"error\""), "{path}: {said}");
    }
    let refused = Variables::start_silent(config(0, &direct)).expect_err("no user");
    let said = format!("{refused:?}");
    assert!(said.contains("Refused"), "{said}");
    let with = |password: &str| {
        let path = folder.path().join("password");
        std::fs::write(&path, format!("{password}\n")).expect("written");
        let mut config = config(0, &direct);
        let etcd = config.etcd.as_mut().expect("a table");
        etcd.user = Some("root".to_owned());
        etcd.password_file = Some(path);
        Variables::start_silent(config)
    };
    assert!(with("wrong").is_err(), "a wrong password");
    let variables = with("secret").expect("logged in");
    variables.write(0, 7, PATIENCE).expect("written");
    assert_eq!(
        variables.get(0),
        Ok(Value::Integer(7)),
        "its watch is let in, too"
    );
}

/// An authority, and what it signed for this host.
fn certificates(folder: &Path) -> bool {
    let openssl = |arguments: &str| {
        Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(folder)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    std::fs::write(folder.join("san"), "subjectAltName=IP:127.0.0.1\n").expect("written");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!(
        "req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=ca -days 2"
    )) && openssl(&format!(
        "req {key} -keyout own.key -out own.csr -subj /CN=own"
    )) && openssl(
        "x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out own.pem",
    )
}

#[test]
fn a_cluster_with_certificates() {
    if !is_there() {
        return;
    }
    let folder = folder();
    if !certificates(folder.path()) {
        let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
        assert!(!required, "openssl is missing: apt-get install openssl");
        return;
    }
    let at = |name: &str| folder.path().join(name);
    let (client, peer) = (free(), free());
    let child = Command::new("etcd")
        .arg("--data-dir")
        .arg(at("data"))
        .args(["--listen-client-urls", &format!("https://{client}")])
        .args(["--advertise-client-urls", &format!("https://{client}")])
        .args(["--listen-peer-urls", &format!("http://{peer}")])
        .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
        .args(["--initial-cluster", &format!("default=http://{peer}")])
        .arg("--client-cert-auth")
        .arg("--trusted-ca-file")
        .arg(at("ca.pem"))
        .arg("--cert-file")
        .arg(at("own.pem"))
        .arg("--key-file")
        .arg(at("own.key"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd starts");
    let member = Member { child, client };
    await_that("etcd listens", || TcpStream::connect(member.client).is_ok());
    let with = |own: bool| {
        let mut config = config(0, &[format!("https://{client}")]);
        let etcd = config.etcd.as_mut().expect("a table");
        etcd.ca = Some(at("ca.pem"));
        if own {
            etcd.cert = Some(at("own.pem"));
            etcd.key = Some(at("own.key"));
        }
        Variables::start_silent(config)
    };
    let variables = with(true).expect("let in");
    variables.write(0, 7, PATIENCE).expect("written");
    assert_eq!(variables.get(0), Ok(Value::Integer(7)));
    assert!(with(false).is_err(), "without a certificate");
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// What another program does to the keys is seen and said as it is.
#[test]
fn other_programs_change_keys() {
    if !is_there() {
        return;
    }
    let folder = folder();
    let members = cluster(folder.path(), 1);
    let client = members[0].client;
    let alone = party(0, &[format!("http://{client}")]);
    let variables = &alone.variables;
    variables.write(2, 5, PATIENCE).expect("written");
    let key = base64("/uffd-sync/variables/v/2");
    let remove = || {
        let body = format!("{{\"key\":\"{key}\"}}");
        let said = post(client, "/v3/kv/deleterange", &body);
        assert!(said.contains("\"deleted\":\"1\""), "{said}");
    };
    remove();
    let removed = variables.carry_out(2, Operation::Read, PATIENCE);
    assert_eq!(removed.expect("read").old, Some(Value::Integer(0)));
    let swap = |expected: i64, new: i64| {
        let (expected, new) = (expected.into(), new.into());
        let operation = Operation::CompareAndSwap { expected, new };
        let done = variables
            .carry_out(2, operation, PATIENCE)
            .expect("decided");
        (done.applied, done.old)
    };
    assert_eq!(swap(5, 6), (false, Some(Value::Integer(0))));
    assert_eq!(swap(0, 7), (true, Some(Value::Integer(0))));
    remove();
    assert!(swap(0, 0).0, "an equal value is a success");
    let body = format!("{{\"key\":\"{key}\",\"value\":\"{}\"}}", base64("seven"));
    post(client, "/v3/kv/put", &body);
    let error = variables.read_ordered(2, PATIENCE).expect_err("no number");
    assert!(matches!(error, OperationError::Foreign { .. }), "{error}");
    assert_eq!(swap(0, 7), (false, None));
    variables.write(2, 8, PATIENCE).expect("written");
    let held = variables.read_ordered(2, PATIENCE);
    assert_eq!(held, Ok(Value::Integer(8)));
    variables
        .write(3, Value::bytes(b"end"), PATIENCE)
        .expect("written");
    let heard: Vec<_> = alone
        .changes_to("end")
        .into_iter()
        .map(|(_, variable, _, new)| (variable, new))
        .collect();
    let numbers = [5, 0, 7, 0, 0, 8].map(|number| (2, Value::Integer(number)));
    assert_eq!(heard[..6], numbers);
    let status = variables.status().expect("an answer");
    assert_eq!(status.delivered, 7, "{status:?}");
}

/// A cluster that was set back tells nothing of what is lost; its revisions do.
#[test]
fn a_cluster_that_lost_its_memory_becomes_a_resync() {
    if !is_there() {
        return;
    }
    let folder = folder();
    let (client, peer) = (free(), free());
    let member = Member::start(folder.path(), 0, client, &[peer]);
    let alone = party(0, &[format!("http://{client}")]);
    for number in 0..20 {
        alone.variables.write(2, number, PATIENCE).expect("written");
    }
    let before = alone.variables.status().expect("an answer").clock;
    drop(member);
    std::fs::remove_dir_all(folder.path().join("m0")).expect("removed");
    let _member = Member::start(folder.path(), 0, client, &[peer]);
    let resync = loop {
        match alone.heard.recv_timeout(PATIENCE).expect("a notice") {
            Notice::Change(_) => {}
            other => break other,
        }
    };
    match resync {
        Notice::Resync { time, values } => {
            assert!(time < before, "{time} is not before {before}");
            assert!(values.contains(&(2, Value::Integer(0))), "{values:?}");
        }
        other => panic!("{other:?} in place of a resync"),
    }
    assert_eq!(alone.variables.get(2), Ok(Value::Integer(0)));
    let swapped = alone.variables.compare_and_swap(2, 0, 3, PATIENCE);
    assert_eq!(swapped, Ok(true));
    assert_eq!(alone.variables.get(2), Ok(Value::Integer(3)));
}

/// Those that one process begins on one variable keep their order, whoever carries them.
#[test]
fn operations_on_one_variable_keep_their_order() {
    if !is_there() {
        return;
    }
    let folder = folder();
    let members = cluster(folder.path(), 1);
    let alone = party(0, &[format!("http://{}", members[0].client)]);
    let begin = |variable, value| {
        let operation = Operation::Write(value);
        alone.variables.begin(variable, operation).expect("begun")
    };
    let under_way: Vec<_> = (1..=100)
        .flat_map(|number| [0, 2].map(|variable| begin(variable, Value::Integer(number))))
        .collect();
    for pending in under_way {
        pending.wait(PATIENCE).expect("written");
    }
    begin(3, Value::bytes(b"end"))
        .wait(PATIENCE)
        .expect("written");
    let heard = alone.changes_to("end");
    for variable in [0, 2] {
        let of = heard.iter().filter(|change| change.1 == variable);
        let values: Vec<_> = of.map(|change| change.3.clone()).collect();
        let expected: Vec<_> = (1..=100).map(Value::Integer).collect();
        assert_eq!(values, expected, "variable {variable}");
    }
}
