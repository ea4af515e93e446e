//! The ordered variables of a node, and the commands that ask for them.
//!
//! The engine hands a control connection over once it asked for variables; here each has
//! a thread of its own, since an ordered operation waits for other processes.
//!
//! - I1: at most [`limits::MAX_VARIABLE_CLIENTS`] connections are served at once; more are
//!   told so.
//! - I2: a client that does not read, or asks for nothing, ends with the node.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::variables::{
    Change, Completed, Notice, OperationError, Saved, StartError, Variables, VariablesConfig,
    merge_saved,
};
use crate::limits;
use crate::ordered::{Operation, OrderKey, Value, ValueType, VariableId};
use crate::sys::SysError;
use crate::sys::net::{self, Blocking};
use crate::wire::control;
use crate::wire::variables::{Denied, Line, Place, Request, Response, Row, Shown};

/// How often a thread that waits looks whether the node ends.
const LOOK: Duration = Duration::from_millis(200);
/// How long a client may take to read an answer.
const SEND_DEADLINE: Duration = Duration::from_secs(10);
/// Longest wait of an operation, whatever a client asks for.
const MAX_DEADLINE_MS: u64 = 3_600_000;
/// How long the connections may take to say that the node ends.
const END_DEADLINE: Duration = Duration::from_secs(1);
/// Notices that a watch may be behind.
const WATCH_NOTICES: usize = 16_384;

/// The variables with those that they are served to; all end when it is dropped.
#[derive(Debug)]
pub(super) struct Service {
    stopping: Arc<AtomicBool>,
    /// Connections that are served.
    open: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the variables of a node. Connections come through the sender, which the engine
/// is given.
pub(super) fn serve(
    config: &VariablesConfig,
) -> Result<(Service, SyncSender<OwnedFd>), StartError> {
    let variables = Arc::new(Variables::start_silent(config.clone())?);
    let (door, arrived) = sync_channel(limits::MAX_VARIABLE_CLIENTS as usize);
    let stopping = Arc::new(AtomicBool::new(false));
    let open = Arc::new(AtomicU64::new(0));
    let (flag, count) = (Arc::clone(&stopping), Arc::clone(&open));
    let thread = std::thread::Builder::new()
        .name("variables-serve".into())
        .spawn(move || accept(&arrived, &variables, &flag, &count))
        .map_err(StartError::Thread)?;
    let thread = Some(thread);
    let service = Service {
        stopping,
        open,
        thread,
    };
    Ok((service, door))
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has ended, by a panic or not.
            let _ = thread.join();
        }
        let until = Instant::now() + END_DEADLINE;
        while self.open.load(Ordering::Relaxed) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn accept(
    arrived: &Receiver<OwnedFd>,
    variables: &Arc<Variables>,
    stopping: &Arc<AtomicBool>,
    open: &Arc<AtomicU64>,
) {
    while !stopping.load(Ordering::Relaxed) {
        let socket = match arrived.recv_timeout(LOOK) {
            Ok(socket) => socket,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let mut client = Client {
            socket,
            buffer: Vec::new(),
            variables: Arc::clone(variables),
            stopping: Arc::clone(stopping),
        };
        if open.fetch_add(1, Ordering::Relaxed) >= limits::MAX_VARIABLE_CLIENTS {
            open.fetch_sub(1, Ordering::Relaxed);
            let message = format!(
                "{} commands use variables already",
                limits::MAX_VARIABLE_CLIENTS
            );
            // A client that is gone needs no answer.
            let _ = client.refuse(Denied::Failed, message);
            continue;
        }
        let count = Arc::clone(open);
        let body = move || {
            match client.serve() {
                Err(error) if error.source.kind() == std::io::ErrorKind::WouldBlock => {
                    tracing::warn!(
                        patience = ?SEND_DEADLINE,
                        "a command that took nothing of its answers was cut off"
                    );
                }
                Err(error) => tracing::debug!(%error, "a connection about variables ended"),
                Ok(()) => {}
            }
            count.fetch_sub(1, Ordering::Relaxed);
        };
        let thread = std::thread::Builder::new().name("variables-client".into());
        if let Err(error) = thread.spawn(body) {
            open.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "no thread for a connection about variables");
        }
    }
}

struct Client {
    socket: OwnedFd,
    buffer: Vec<u8>,
    variables: Arc<Variables>,
    stopping: Arc<AtomicBool>,
}

/// Why a request is not carried out.
struct Refusal(Denied, String);

impl From<OperationError> for Refusal {
    fn from(error: OperationError) -> Self {
        let code = match &error {
            OperationError::Indeterminate => Denied::Indeterminate,
            OperationError::Refused(refused) => {
                use crate::ordered::SubmitError as S;
                let code = match refused {
                    S::NotSubscribed { .. } | S::NoVariable { .. } | S::Value(_) => Denied::Invalid,
                    _ => Denied::Failed,
                };
                return Self(code, refused.to_string());
            }
            _ => Denied::Failed,
        };
        Self(code, error.to_string())
    }
}

impl Client {
    fn serve(&mut self) -> Result<(), SysError> {
        net::set_timeouts(&self.socket, Some(LOOK), Some(SEND_DEADLINE))?;
        // The node's answer to the request that led here.
        let done = control::encode(&control::Response::Done, &[]).unwrap_or_default();
        self.send_bytes(&done)?;
        while let Some(request) = self.next()? {
            match request {
                Ok(Request::Watch { variables }) => return self.watch(&variables),
                Ok(request) => {
                    let answer = self.answer(request);
                    let answer = answer.unwrap_or_else(|Refusal(code, message)| {
                        Response::Refused { code, message }
                    });
                    self.send(&answer)?;
                }
                Err(message) => {
                    self.refuse(Denied::Invalid, message)?;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The next request, or why it is none; nothing at the end of the stream.
    fn next(&mut self) -> Result<Option<Result<Request, String>>, SysError> {
        loop {
            let found = control::decode::<Request>(&mut self.buffer, limits::MAX_VARIABLE_REQUEST);
            match found {
                Ok(Some(message)) => return Ok(Some(Ok(message.body))),
                Ok(None) => {}
                Err(error) => return Ok(Some(Err(format!("the request cannot be read: {error}")))),
            }
            if self.receive()? {
                return Ok(None);
            }
        }
    }

    /// Receives something; true at the end of the stream, or of the node.
    fn receive(&mut self) -> Result<bool, SysError> {
        let mut piece = [0; 16 * 1024];
        match net::recv_with_fds(&self.socket, &mut piece, 1, Blocking::Yes) {
            Ok(received) => {
                self.buffer.extend_from_slice(&piece[..received.bytes]);
                Ok(received.bytes == 0)
            }
            Err(error) if error.source.kind() == std::io::ErrorKind::WouldBlock => {
                Ok(self.stopping.load(Ordering::Relaxed))
            }
            Err(error) => Err(error),
        }
    }

    fn send(&self, response: &Response) -> Result<(), SysError> {
        match control::encode(response, &[]) {
            Ok(bytes) => self.send_bytes(&bytes),
            Err(error) => self.refuse(Denied::Failed, format!("the answer is too long: {error}")),
        }
    }

    fn refuse(&self, code: Denied, message: String) -> Result<(), SysError> {
        match control::encode(&Response::Refused { code, message }, &[]) {
            Ok(bytes) => self.send_bytes(&bytes),
            Err(_) => Ok(()),
        }
    }

    fn send_bytes(&self, bytes: &[u8]) -> Result<(), SysError> {
        let mut sent = 0;
        while sent < bytes.len() {
            sent += net::send_with_fds(&self.socket, &bytes[sent..], &[])?;
        }
        Ok(())
    }

    fn answer(&self, request: Request) -> Result<Response, Refusal> {
        let deadline = |ms: u64| Duration::from_millis(ms.min(MAX_DEADLINE_MS));
        match request {
            Request::Get {
                variable,
                ordered,
                deadline_ms,
            } => {
                let (id, _) = self.find(&variable)?;
                let value = if ordered {
                    self.variables.read_ordered(id, deadline(deadline_ms))?
                } else {
                    self.variables.get(id)?
                };
                let value = shown(&value);
                Ok(Response::Value { value })
            }
            Request::Set {
                variable,
                value,
                deadline_ms,
            } => {
                let (id, kind) = self.find(&variable)?;
                let operation = Operation::Write(read(&variable, id, kind, &value)?);
                let done = self
                    .variables
                    .carry_out(id, operation, deadline(deadline_ms))?;
                Ok(done_response(&done))
            }
            Request::Cas {
                variable,
                expected,
                new,
                deadline_ms,
            } => {
                let (id, kind) = self.find(&variable)?;
                let expected = read(&variable, id, kind, &expected)?;
                let new = read(&variable, id, kind, &new)?;
                let operation = Operation::CompareAndSwap { expected, new };
                let done = self
                    .variables
                    .carry_out(id, operation, deadline(deadline_ms))?;
                Ok(done_response(&done))
            }
            Request::List => Ok(self.list()),
            Request::Status => self.status(),
            Request::Freeze => {
                let saved = self.variables.freeze().map_err(failed)?;
                let saved = serde_json::to_value(saved).map_err(failed)?;
                Ok(Response::Saved { saved })
            }
            Request::Renew { saved } => self.renew(saved),
            Request::Watch { .. } => Err(Refusal(Denied::Invalid, "not here".into())),
        }
    }

    fn find(&self, variable: &str) -> Result<(u32, ValueType), Refusal> {
        let config = self.variables.config();
        match config.find(variable) {
            Some(found) => Ok((found.id, found.kind.into())),
            None => {
                let names: Vec<_> = config
                    .variables
                    .iter()
                    .map(|one| one.name.as_str())
                    .collect();
                let message = format!("no variable {variable:?}; there are {}", names.join(", "));
                Err(Refusal(Denied::Invalid, message))
            }
        }
    }

    fn list(&self) -> Response {
        let config = self.variables.config();
        let row = |one: &crate::engine::variables::Definition| Row {
            id: one.id,
            name: one.name.as_str().to_owned(),
            kind: one.kind.to_string(),
            subscribers: one.subscribers.clone(),
            value: self.variables.get(one.id).ok().as_ref().map(shown),
        };
        let variables = config.variables.iter().map(row).collect();
        Response::List { variables }
    }

    fn status(&self) -> Result<Response, Refusal> {
        let silent = || Refusal(Denied::Failed, "the variables do not answer".into());
        let status = self.variables.status().ok_or_else(silent)?;
        let status = serde_json::to_value(status).map_err(failed)?;
        Ok(Response::Status { status })
    }

    fn renew(&self, saved: Vec<serde_json::Value>) -> Result<Response, Refusal> {
        let wrong = |error: serde_json::Error| {
            Refusal(Denied::Invalid, format!("not a saved state: {error}"))
        };
        let saved: Result<Vec<Saved>, _> = saved.into_iter().map(serde_json::from_value).collect();
        let merged =
            merge_saved(self.variables.config(), &saved.map_err(wrong)?).map_err(failed)?;
        self.variables.renew(&merged).map_err(failed)?;
        let session = merged.session;
        Ok(Response::Renewed { session })
    }

    fn watch(&self, names: &[String]) -> Result<(), SysError> {
        let wanted: Result<Vec<u32>, Refusal> =
            names.iter().map(|name| Ok(self.find(name)?.0)).collect();
        let stream = wanted.and_then(|wanted| {
            let wanted = (!names.is_empty()).then_some(wanted);
            Ok(self.variables.subscribe(wanted.as_deref(), WATCH_NOTICES)?)
        });
        let mut stream = match stream {
            Ok(stream) => stream,
            Err(Refusal(code, message)) => return self.refuse(code, message),
        };
        // The client knows by this that nothing is missed from here on.
        self.send(&self.list())?;
        while !self.stopping.load(Ordering::Relaxed) {
            match stream.next_within(LOOK) {
                Ok(Some(notice)) => self.send(&self.told(&notice))?,
                Ok(None) => {
                    if self.has_left()? {
                        return Ok(());
                    }
                }
                Err(end) => {
                    let reason = end.to_string();
                    return self.send(&Response::Ended { reason });
                }
            }
        }
        let reason = "the node ends".to_owned();
        self.send(&Response::Ended { reason })
    }

    fn has_left(&self) -> Result<bool, SysError> {
        use std::os::fd::AsFd;
        let there = net::wait_readable(&[self.socket.as_fd()], Some(Duration::from_millis(1)))?;
        if !there {
            return Ok(false);
        }
        let mut piece = [0; 64];
        let received = net::recv_with_fds(&self.socket, &mut piece, 1, Blocking::No)?;
        Ok(received.bytes == 0)
    }

    fn told(&self, notice: &Notice) -> Response {
        match notice {
            Notice::Change(change) => Response::Change(line(self.variables.config(), change)),
            Notice::Resync { time, values } => Response::Resync {
                time: *time,
                values: values
                    .iter()
                    .map(|(id, value)| (*id, shown(value)))
                    .collect(),
            },
            Notice::Unavailable(reason) => Response::Unavailable {
                reason: reason.to_string(),
            },
        }
    }
}

fn failed(error: impl std::error::Error) -> Refusal {
    Refusal(Denied::Failed, error.to_string())
}

fn done_response(done: &Completed) -> Response {
    Response::Done {
        key: place(done.key),
        applied: done.applied,
        old: done.old.as_ref().map(shown),
    }
}

/// A value for messages.
fn shown(value: &Value) -> Shown {
    match value {
        Value::Integer(number) => Shown::Number(*number),
        Value::Bytes(bytes) => Shown::of_bytes(bytes),
    }
}

fn place(key: OrderKey) -> Place {
    Place {
        time: key.time,
        initiator: key.id.initiator.0,
        incarnation: key.id.incarnation.0,
        number: key.id.number,
    }
}

/// A change as `var watch --json` prints it.
fn line(config: &VariablesConfig, change: &Change) -> Line {
    let name = config.definition(change.variable);
    Line {
        key: place(change.key),
        variable: change.variable,
        name: name.map_or_else(String::new, |one| one.name.as_str().to_owned()),
        old: shown(&change.old),
        new: shown(&change.new),
        operation: if change.swap { "cas" } else { "write" }.to_owned(),
        initiator: change.initiator.map(|process| process.0),
    }
}

/// The value that was written on a command line or in JSON, for a variable of that kind.
fn read(name: &str, id: u32, kind: ValueType, value: &Shown) -> Result<Value, Refusal> {
    let wrong = |text: String| Refusal(Denied::Invalid, text);
    match (kind, value) {
        (ValueType::Integer, Shown::Number(number)) => Ok(Value::Integer(*number)),
        (ValueType::Integer, Shown::Text(text)) => {
            let number = text.parse().map_err(|_| {
                wrong(format!(
                    "variable {name} holds an i64, and {text:?} is none"
                ))
            });
            Ok(Value::Integer(number?))
        }
        (ValueType::Integer, Shown::Hex { .. }) => {
            Err(wrong(format!("variable {name} holds an i64, not bytes")))
        }
        (ValueType::Bytes, value) => {
            let bytes = match value {
                Shown::Number(number) => number.to_string().into_bytes(),
                other => other
                    .bytes()
                    .ok_or_else(|| wrong("not hexadecimal digits, or too many".into()))?,
            };
            let value = Value::bytes(&bytes);
            value
                .check(VariableId(id), kind)
                .map_err(|error| wrong(error.to_string()))?;
            Ok(value)
        }
    }
}
