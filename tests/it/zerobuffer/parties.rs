//! The ends of a two-buffer channel: this process, this test binary again as a process
//! of its own, and the published Python package. All take the same orders.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};
use uffd_sync::zerobuffer::{
    BufferConfig, ClientOptions, DuplexClient, DuplexServer, Frame, Reader, ServerOptions, Side,
    Wait, Writer, ZeroBufferError,
};

use crate::nodes::PATIENCE;

/// Set in the environment of a process that is a party.
pub(crate) const ROLE: &str = "UFFD_SYNC_IT_ZEROBUFFER";
/// Longest wait for a long order, 20,000 frames for example.
const LONG: Duration = Duration::from_secs(120);
/// The Python interpreter that has the package.
const PYTHON: &str = "UFFD_SYNC_ZEROBUFFER_PYTHON";

/// The bytes of frame `number`, the same in Python.
pub(crate) fn content(number: u64, size: u64) -> Vec<u8> {
    let begin = (number % 251) as usize;
    let whole: Vec<u8> = (0..=255).collect();
    let mut bytes = whole.repeat((begin + size as usize).div_ceil(256));
    bytes.drain(..begin);
    bytes.truncate(size as usize);
    bytes
}

/// Endless sizes between 1 and `most`, the same in Python.
pub(crate) fn sizes(seed: u64, most: u64) -> impl Iterator<Item = u64> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        1 + (state >> 33) % most
    })
}

/// The names of the Python package's exceptions, for comparison.
fn class_of(error: &ZeroBufferError) -> &'static str {
    match error {
        ZeroBufferError::TooLarge { .. } => "FrameTooLargeException",
        ZeroBufferError::Full { .. } => "BufferFullException",
        ZeroBufferError::EmptyFrame => "InvalidFrameSizeException",
        ZeroBufferError::MetadataTwice => "MetadataAlreadyWrittenException",
        ZeroBufferError::WriterTaken { .. } => "WriterAlreadyConnectedException",
        ZeroBufferError::PeerGone { side, .. } => match side {
            Side::Reader => "ReaderDeadException",
            Side::Writer => "WriterDeadException",
        },
        _ => "ZeroBufferException",
    }
}

/// This crate's ends, in this process.
#[derive(Default)]
pub(crate) struct Own {
    pub(crate) reader: Option<Reader>,
    pub(crate) writer: Option<Writer>,
    pub(crate) client: Option<DuplexClient>,
    server: Option<DuplexServer>,
    held: Option<Frame>,
    timeout: Duration,
}

impl Own {
    fn order(&mut self, order: &Value) -> Value {
        match self.carry_out(order) {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": class_of(&error), "text": error.to_string() }),
        }
    }

    fn carry_out(&mut self, order: &Value) -> Result<Value, ZeroBufferError> {
        let number = |key: &str| order[key].as_u64().unwrap_or(0);
        let text = |key: &str| order[key].as_str().unwrap_or("");
        let seconds = |key: &str, default: f64| {
            Duration::from_secs_f64(order[key].as_f64().unwrap_or(default))
        };
        match text("do") {
            "create" => {
                let config = BufferConfig::new(number("metadata"), number("payload"));
                self.reader = Some(Reader::create(text("name"), &config)?);
            }
            "attach" => {
                self.timeout = seconds("timeout", 5.0);
                self.writer = Some(Writer::attach(text("name"), Wait::Adaptive)?);
            }
            "set_metadata" => self.writer().set_metadata(text("text").as_bytes())?,
            "metadata" => {
                let metadata = self.reader().metadata()?;
                return Ok(json!(metadata.map(|bytes| {
                    String::from_utf8(bytes).expect("text was written")
                })));
            }
            "write" => {
                let in_place = order["in_place"].as_bool().unwrap_or(false);
                self.write(number("number"), number("size"), in_place)?;
            }
            "read" => {
                self.held = None;
                return match self.reader().read(seconds("timeout", 10.0)) {
                    Ok(frame) => {
                        let shown =
                            json!({ "sequence": frame.sequence(), "data": hex(&frame.to_vec()) });
                        self.held = Some(frame);
                        Ok(shown)
                    }
                    Err(ZeroBufferError::TimedOut) => Ok(Value::Null),
                    Err(error) => Err(error),
                };
            }
            "release" => self.held = None,
            "write_many" => {
                let sizes = sizes(number("seed"), number("most"));
                for (frame, size) in (0..number("count")).zip(sizes) {
                    self.write(frame, size, frame % 3 == 0)?;
                }
            }
            "read_many" => {
                let sizes = sizes(number("seed"), number("most"));
                for (frame, size) in (0..number("count")).zip(sizes) {
                    let found = self.reader().read(PATIENCE)?;
                    assert_eq!(found.to_vec(), content(frame, size), "frame {frame}");
                }
            }
            "close" => *self = Own::default(),
            "pid" => return Ok(json!(std::process::id())),
            _ => return self.carry_out_duplex(order),
        }
        Ok(Value::Null)
    }

    /// The orders of a duplex channel's ends.
    fn carry_out_duplex(&mut self, order: &Value) -> Result<Value, ZeroBufferError> {
        let number = |key: &str| order[key].as_u64().unwrap_or(0);
        let text = |key: &str| order[key].as_str().unwrap_or("");
        match text("do") {
            "serve" => {
                let config = BufferConfig::new(number("metadata"), number("payload"));
                let options = ServerOptions::new(config);
                let server = DuplexServer::start(text("channel"), options, |request, reply| {
                    let bytes: Vec<u8> = request.to_vec().iter().map(|byte| byte ^ 0xFF).collect();
                    Ok(reply.write(&bytes)?)
                });
                self.server = Some(server?);
            }
            "connect" => {
                let options = ClientOptions::default();
                self.client = Some(DuplexClient::connect(text("channel"), &options)?);
            }
            "send" => {
                let request = content(number("number"), number("size"));
                return Ok(json!(self.client().send(&request, PATIENCE)?));
            }
            "receive" => {
                let response = self.client().receive(PATIENCE)?;
                return Ok(json!({ "data": hex(&response.to_vec()) }));
            }
            other => return self.go_on(other, number("size")),
        }
        Ok(Value::Null)
    }

    /// What ends with the peer, or with this process, and answers first.
    fn go_on(&mut self, order: &str, size: u64) -> Result<Value, ZeroBufferError> {
        report(&json!({ "ok": "begun" }));
        for number in 0.. {
            match order {
                "write_on" => self.write(number, size, false)?,
                "read_on" => drop(self.reader().read(PATIENCE)?),
                "call_on" => drop(self.client().call(&content(number, size), PATIENCE)?),
                other => panic!("unknown order {other}"),
            }
        }
        Ok(Value::Null)
    }

    fn write(&mut self, number: u64, size: u64, in_place: bool) -> Result<(), ZeroBufferError> {
        let (bytes, timeout) = (content(number, size), self.timeout);
        if !in_place {
            return self.writer().write(&bytes, timeout).map(drop);
        }
        let mut frame = self.writer().reserve(size, timeout)?;
        frame.write(0, &bytes).expect("a range of the frame");
        frame.commit().map(drop)
    }

    pub(crate) fn reader(&mut self) -> &mut Reader {
        self.reader.as_mut().expect("the reader was made")
    }

    pub(crate) fn writer(&mut self) -> &mut Writer {
        self.writer.as_mut().expect("the writer was made")
    }

    pub(crate) fn client(&mut self) -> &mut DuplexClient {
        self.client.as_mut().expect("the client was made")
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Another process that takes orders; killed by its id and reaped when dropped.
pub(crate) struct Process {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<Value>,
}

impl Process {
    fn start(command: &mut Command, sign: &'static str) -> Process {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the process starts");
        let orders = child.stdin.take().expect("standard input is a pipe");
        let stdout = child.stdout.take().expect("standard output is a pipe");
        let (tell, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let answer = line
                    .strip_prefix(sign)
                    .and_then(|line| serde_json::from_str(line).ok());
                if answer.is_some_and(|answer| tell.send(answer).is_err()) {
                    return;
                }
            }
        });
        Process {
            child,
            orders,
            answers,
        }
    }

    /// This test binary, as a process of its own.
    pub(crate) fn own() -> Process {
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command
            .args(["zerobuffer::zerobuffer_process", "--exact", "--nocapture"])
            .env(ROLE, "1");
        Process::start(&mut command, "@")
    }

    /// The Python package, or none after saying `SKIP`.
    #[allow(
        clippy::print_stderr,
        reason = "a skipped test says so where the test runner shows it"
    )]
    pub(crate) fn python() -> Option<Process> {
        let Some(python) = std::env::var_os(PYTHON).filter(|path| !path.is_empty()) else {
            let reason = format!(
                "set {PYTHON} to a Python with zerobuffer-ipc[linux] 1.3.0 (.ci/run makes one)"
            );
            let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|all| all == "1");
            assert!(!required, "{reason}");
            eprintln!("SKIP {reason}");
            return None;
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/zerobuffer_peer.py");
        let mut command = Command::new(python);
        command.arg("-u").arg(script);
        Some(Process::start(&mut command, ""))
    }

    /// Gives an order and does not wait for the answer.
    pub(crate) fn begin(&mut self, order: &Value) {
        writeln!(self.orders, "{order}").expect("the process takes orders");
    }

    /// The answer to an order that was begun.
    #[track_caller]
    pub(crate) fn finish(&mut self) -> Value {
        self.answers
            .recv_timeout(LONG)
            .expect("the process answers")
    }

    pub(crate) fn order(&mut self, order: &Value) -> Value {
        self.begin(order);
        self.finish()
    }

    /// Ends it without a chance to clear up.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One end.
pub(crate) enum Party {
    Here(Box<Own>),
    There(Process),
}

impl Party {
    pub(crate) fn here() -> Party {
        Party::Here(Box::default())
    }

    pub(crate) fn order(&mut self, order: &Value) -> Value {
        match self {
            Party::Here(own) => own.order(order),
            Party::There(process) => process.order(order),
        }
    }

    /// The answer to an order that has to succeed.
    #[track_caller]
    pub(crate) fn done(&mut self, order: &Value) -> Value {
        let mut answer = self.order(order);
        assert!(answer.get("ok").is_some(), "{order}: {answer}");
        answer["ok"].take()
    }

    /// The name of the error that an order has to end with.
    #[track_caller]
    pub(crate) fn refused(&mut self, order: &Value) -> String {
        let answer = self.order(order);
        let error = answer["error"].as_str();
        error
            .unwrap_or_else(|| panic!("{order}: {answer}"))
            .to_owned()
    }
}

fn report(answer: &Value) {
    // The test runner has begun a line that it ends when this test is over.
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "\n@{answer}")
        .and_then(|()| stdout.flush())
        .expect("whoever gave the order listens");
}

/// Serves orders until its standard input ends.
pub(crate) fn serve_orders() {
    let mut own = Own::default();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let order = serde_json::from_str(&line).expect("orders are JSON");
        report(&own.order(&order));
    }
}
