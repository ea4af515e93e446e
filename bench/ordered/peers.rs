//! Other ways to have one order of small values: each is started here, on a port and in
//! a folder of its own, and ended by its id. One that is not installed is named as not run.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::harness::{Goal, Latencies, Options, Outcome, Rounds};
use crate::members::{Members, PATIENCE, WRITTEN};

const ETCD: &str = "etcd-fsync";
const ETCD_FAST: &str = "etcd-no-fsync";
const REDIS: &str = "redis";
const NATS: &str = "nats";
pub(crate) const CASES: &[&str] = &[ETCD, ETCD_FAST, REDIS, NATS];

/// A server process, killed and reaped when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(program: &str, args: &[&str]) -> anyhow::Result<Server> {
    let child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Ok(Server(
        child.with_context(|| format!("starting {program}"))?,
    ))
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn connect(port: u16) -> anyhow::Result<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// One way to write a small value.
trait Peer {
    fn write(&mut self, value: u64) -> anyhow::Result<()>;
}

/// A put through the JSON gateway, over one kept connection.
struct Etcd {
    _server: Server,
    agent: ureq::Agent,
    url: String,
}

impl Etcd {
    fn start(folder: &Path, fsync: bool) -> anyhow::Result<Self> {
        let (client, peer) = (free_port()?, free_port()?);
        let data = folder.join(format!("etcd-{fsync}"));
        let (client, peer) = (
            format!("http://127.0.0.1:{client}"),
            format!("http://127.0.0.1:{peer}"),
        );
        let cluster = format!("default={peer}");
        let data = data.display().to_string();
        let mut args = vec![
            "--data-dir",
            &data,
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &cluster,
        ];
        if !fsync {
            args.push("--unsafe-no-fsync");
        }
        let server = start("etcd", &args)?;
        let agent = ureq::Agent::config_builder()
            .no_delay(true)
            .build()
            .new_agent();
        let url = format!("{client}/v3/kv/put");
        let mut this = Self {
            _server: server,
            agent,
            url,
        };
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = this.write(0) {
            ensure!(Instant::now() < deadline, "etcd does not serve: {error:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(this)
    }
}

impl Peer for Etcd {
    fn write(&mut self, value: u64) -> anyhow::Result<()> {
        // "a", and eight digits without padding to think about.
        let body = format!("{{\"key\":\"YQ==\",\"value\":\"{value:08}\"}}");
        let mut answer = self.agent.post(&self.url).send(body)?;
        let text = answer.body_mut().read_to_string()?;
        ensure!(text.contains("revision"), "etcd answered {text}");
        Ok(())
    }
}

/// `SET` and `WAIT 1`, sent together, with one replica.
struct Redis {
    _servers: [Server; 2],
    stream: BufReader<TcpStream>,
}

impl Redis {
    fn start(folder: &Path) -> anyhow::Result<Self> {
        let (port, other) = (free_port()?, free_port()?);
        let mut servers = Vec::new();
        for (port, of) in [(port, None), (other, Some(port))] {
            let data = folder.join(format!("redis-{port}"));
            std::fs::create_dir(&data)?;
            let (port, data) = (port.to_string(), data.display().to_string());
            let mut args = vec![
                "--port",
                &port,
                "--bind",
                "127.0.0.1",
                "--dir",
                &data,
                "--save",
                "",
                "--appendonly",
                "no",
            ];
            let of = of.map(|port: u16| port.to_string());
            if let Some(of) = &of {
                args.extend(["--replicaof", "127.0.0.1", of]);
            }
            servers.push(start("redis-server", &args)?);
        }
        let stream = BufReader::new(connect(port)?);
        let _servers = servers
            .try_into()
            .map_err(|_| anyhow::anyhow!("two servers"))?;
        let mut this = Self { _servers, stream };
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = this.write(0) {
            ensure!(Instant::now() < deadline, "no replica answers: {error:#}");
        }
        Ok(this)
    }
}

impl Peer for Redis {
    fn write(&mut self, value: u64) -> anyhow::Result<()> {
        let text = format!(
            "*3\r\n$3\r\nSET\r\n$1\r\na\r\n$8\r\n{value:08}\r\n*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n$4\r\n1000\r\n"
        );
        self.stream.get_mut().write_all(text.as_bytes())?;
        let (mut set, mut wait) = (String::new(), String::new());
        self.stream.read_line(&mut set)?;
        self.stream.read_line(&mut wait)?;
        ensure!(
            set.trim() == "+OK" && wait.trim() == ":1",
            "redis answered {set}{wait}"
        );
        Ok(())
    }
}

/// A put into a JetStream stream kept in memory, as a key-value bucket is one.
struct Nats {
    _server: Server,
    stream: BufReader<TcpStream>,
}

impl Nats {
    fn start(folder: &Path) -> anyhow::Result<Self> {
        let port = free_port()?;
        let store = folder.join("nats").display().to_string();
        let args = [
            "-js",
            "-a",
            "127.0.0.1",
            "-p",
            &port.to_string(),
            "-sd",
            &store,
        ];
        let server = start("nats-server", &args)?;
        let stream = BufReader::new(connect(port)?);
        let mut this = Self {
            _server: server,
            stream,
        };
        this.say("CONNECT {\"verbose\":false,\"headers\":false}\r\nSUB inbox 1\r\n")?;
        let body = "{\"name\":\"KV_b\",\"subjects\":[\"$KV.b.>\"],\"max_msgs_per_subject\":1,\"storage\":\"memory\"}";
        this.say(&format!(
            "PUB $JS.API.STREAM.CREATE.KV_b inbox {}\r\n{body}\r\n",
            body.len()
        ))?;
        let made = this.message()?;
        ensure!(!made.contains("\"error\""), "no bucket: {made}");
        Ok(this)
    }

    fn say(&mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.stream.get_mut().write_all(text.as_bytes())?)
    }

    /// The payload of the next message.
    fn message(&mut self) -> anyhow::Result<String> {
        loop {
            let mut line = String::new();
            ensure!(
                self.stream.read_line(&mut line)? > 0,
                "nats closed the connection"
            );
            if line.starts_with("PING") {
                self.say("PONG\r\n")?;
            } else if line.starts_with("MSG") {
                let mut payload = String::new();
                self.stream.read_line(&mut payload)?;
                return Ok(payload);
            }
        }
    }
}

impl Peer for Nats {
    fn write(&mut self, value: u64) -> anyhow::Result<()> {
        self.say(&format!("PUB $KV.b.a inbox 8\r\n{value:08}\r\n"))?;
        let answer = self.message()?;
        ensure!(answer.contains("\"seq\""), "nats answered {answer}");
        Ok(())
    }
}

struct Case {
    name: &'static str,
    what: &'static str,
    program: &'static str,
    goal: Option<Goal>,
    /// Writes of one round.
    counts: (u64, u64),
    start: fn(&Path) -> anyhow::Result<Box<dyn Peer>>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let cases = [
        Case {
            name: ETCD,
            what: "one etcd node, put by its JSON gateway, fsync",
            program: "etcd",
            goal: Some(Goal::AtLeast(5.0)),
            counts: (20, 100),
            start: |folder| Ok(Box::new(Etcd::start(folder, true)?)),
        },
        Case {
            name: ETCD_FAST,
            what: "one etcd node, put by its JSON gateway, no fsync",
            program: "etcd",
            goal: None,
            counts: (50, 300),
            start: |folder| Ok(Box::new(Etcd::start(folder, false)?)),
        },
        Case {
            name: REDIS,
            what: "Redis, SET and WAIT 1 with one replica",
            program: "redis-server",
            goal: None,
            counts: (50, 500),
            start: |folder| Ok(Box::new(Redis::start(folder)?)),
        },
        Case {
            name: NATS,
            what: "NATS JetStream, key-value put, one server, in memory",
            program: "nats-server",
            goal: None,
            counts: (100, 1_000),
            start: |folder| Ok(Box::new(Nats::start(folder)?)),
        },
    ];
    // On the disk of the build, where fsync costs what it costs.
    let folder = tempfile::Builder::new()
        .prefix("ordered-peers-")
        .tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target"))?;
    let members = Members::start("skeen", 3)?;
    let mut outcomes = Vec::new();
    for case in cases {
        if !options.wants(case.name) {
            continue;
        }
        outcomes.push(measure(options, &members, folder.path(), case)?);
    }
    members.end()?;
    Ok(outcomes)
}

fn measure(
    options: &Options,
    members: &Members,
    folder: &Path,
    case: Case,
) -> anyhow::Result<Outcome> {
    if Command::new(case.program)
        .arg("--version")
        .output()
        .is_err()
    {
        let reason = format!("{} is not installed", case.program);
        return Ok(Outcome::not_run(case.name, case.what, reason));
    }
    let mut peer = (case.start)(folder)?;
    let count = options.pick(case.counts.0, case.counts.1);
    let mut latencies = [Latencies::new()?, Latencies::new()?];
    let mut value = 0;
    let rounds = Rounds::run(options, 2, |variant, round| {
        let mut found = Latencies::new()?;
        for _ in 0..count {
            value += 1;
            let started = Instant::now();
            match variant {
                0 => members.variables.write(WRITTEN, value as i64, PATIENCE)?,
                _ => peer.write(value)?,
            }
            found.record(started.elapsed().as_nanos() as u64);
        }
        if round > 0 {
            latencies[variant].add(&found)?;
        }
        Ok(found.at(0.5) / 1e3)
    })?;
    let mut outcome = Outcome::less(case.name, "us", rounds.of(0), (case.what, rounds.of(1)))
        .latency("ordered write, 3 processes", &latencies[0])
        .latency("peer", &latencies[1]);
    if let Some(goal) = case.goal {
        outcome = outcome.goal(goal);
    }
    Ok(outcome)
}
