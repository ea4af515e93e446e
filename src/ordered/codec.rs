//! The bytes of a [`Frame`]: a header of 32 bytes and a body, little-endian.
//!
//! ```text
//!  0        4       5      6       8          12         16         24         28         32
//!  | "UVAR" | vers. | kind | flags | body len | body crc | sequence | reserved | head crc |
//! ```
//!
//! The header's own checksum covers its first 28 bytes. Lengths are checked against
//! [`limits`](crate::limits) before anything is kept for them; whatever a peer sends,
//! decoding ends with a value or a [`FrameError`].

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::frame::{Frame, Hello, Message};
use super::ids::{Incarnation, OperationId, OrderKey, ProcessId, VariableId};
use super::refusal::StopReason;
use super::value::{Operation, Value};
use crate::checksum::crc32c;
use crate::limits::MAX_VARIABLE_BYTES;

/// Length of a frame's header, in bytes.
pub const FRAME_HEADER_BYTES: usize = 32;

const MAGIC: u32 = u32::from_le_bytes(*b"UVAR");
const VERSION: u8 = 1;
/// A commit whose receipt is to be acknowledged.
const FLAG_ACKNOWLEDGE: u16 = 1;
/// A hello of a process that takes messages.
const FLAG_READY: u16 = 1;
const MAX_BODY: u64 = size_of::<OperationBody>() as u64 + 2 * MAX_VARIABLE_BYTES;

const KIND_HELLO: u8 = 1;
const KIND_RECEIVED: u8 = 2;
const KIND_STOPPED: u8 = 3;
const KIND_READY: u8 = 4;
const KIND_REQUEST: u8 = 16;
const KIND_PROPOSAL: u8 = 17;
const KIND_COMMIT: u8 = 18;
const KIND_COMMITTED: u8 = 19;
const KIND_DELIVERED: u8 = 20;
const KIND_SUBMIT: u8 = 24;
const KIND_ORDERED: u8 = 25;

/// Why bytes are no frame; the connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Something else speaks here.
    #[error("frame begins with {found:#010x}, not with \"UVAR\"")]
    Magic {
        /// What it begins with.
        found: u32,
    },
    /// Another version of this protocol.
    #[error("protocol version {found}; this is version {VERSION}")]
    Version {
        /// The other version.
        found: u8,
    },
    /// Bytes were changed on their way.
    #[error("checksum {computed:#010x} where {stated:#010x} is stated")]
    Checksum {
        /// Of what arrived.
        computed: u32,
        /// Of what was sent.
        stated: u32,
    },
    /// A kind that does not exist.
    #[error("frame of kind {found}")]
    Kind {
        /// The kind.
        found: u8,
    },
    /// A body of a length that its kind cannot have.
    #[error("frame of kind {kind} with a body of {len} bytes")]
    Length {
        /// The kind.
        kind: u8,
        /// Its body's length, in bytes.
        len: u64,
    },
    /// A field with a value that it cannot have, or a reserved one that is not zero.
    #[error("frame of kind {kind} with an impossible {field}")]
    Field {
        /// The kind.
        kind: u8,
        /// The field's name.
        field: &'static str,
    },
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: u8,
    kind: u8,
    flags: U16,
    body_len: U32,
    body_crc: U32,
    sequence: U64,
    reserved: U32,
    header_crc: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HelloBody {
    process: U32,
    to: U32,
    incarnation: U64,
    session: U64,
    /// 0 for none.
    known: U64,
    received: U64,
    configuration: [u8; 16],
    start: [u8; 16],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct StoppedBody {
    reason: U32,
    process: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Id {
    initiator: U32,
    reserved: U32,
    incarnation: U64,
    number: U64,
}

/// Before the bytes of the first value, which those of the second follow.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OperationBody {
    id: Id,
    /// The initiator's clock, the key's time, or 0.
    time: U64,
    variable: U32,
    /// 0 read, 1 write, 2 compare-and-swap.
    operation: u8,
    /// 0 integers of 8 bytes, 1 bytes; 0 for a read.
    values: u8,
    reserved: U16,
    first_len: U32,
    second_len: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct TimeBody {
    id: Id,
    time: U64,
}

const _: () = {
    assert!(size_of::<RawHeader>() == FRAME_HEADER_BYTES);
    assert!(std::mem::offset_of!(RawHeader, sequence) == 16);
    assert!(std::mem::offset_of!(RawHeader, header_crc) == 28);
    assert!(size_of::<HelloBody>() == 72);
    assert!(size_of::<StoppedBody>() == 8);
    assert!(size_of::<OperationBody>() == 48);
    assert!(std::mem::offset_of!(OperationBody, first_len) == 40);
    assert!(size_of::<TimeBody>() == 32);
};

/// A header that was checked; its body may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    kind: u8,
    flags: u16,
    sequence: u64,
    body_len: u32,
    body_crc: u32,
}

impl FrameHeader {
    /// Reads and checks a header; nothing is known of the body yet.
    ///
    /// # Errors
    /// [`FrameError`] for anything that [`Frame::encode`] would not have made.
    pub fn parse(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, FrameError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic.get() != MAGIC {
            let found = raw.magic.get();
            return Err(FrameError::Magic { found });
        }
        check_crc(&bytes[..FRAME_HEADER_BYTES - 4], raw.header_crc.get())?;
        if raw.version != VERSION {
            return Err(FrameError::Version { found: raw.version });
        }
        let (kind, len) = (raw.kind, u64::from(raw.body_len.get()));
        let fits = match kind {
            KIND_HELLO => len == size_of::<HelloBody>() as u64,
            KIND_RECEIVED | KIND_READY => len == 0,
            KIND_STOPPED | KIND_DELIVERED => len == 8,
            KIND_PROPOSAL | KIND_COMMIT | KIND_COMMITTED => len == size_of::<TimeBody>() as u64,
            KIND_REQUEST | KIND_SUBMIT | KIND_ORDERED => {
                (size_of::<OperationBody>() as u64..=MAX_BODY).contains(&len)
            }
            found => return Err(FrameError::Kind { found }),
        };
        if !fits {
            return Err(FrameError::Length { kind, len });
        }
        let allowed = match kind {
            KIND_COMMIT => FLAG_ACKNOWLEDGE,
            KIND_HELLO => FLAG_READY,
            _ => 0,
        };
        field(kind, "flag", raw.flags.get() & !allowed == 0)?;
        field(kind, "reserved field", raw.reserved.get() == 0)?;
        let numbered = !matches!(kind, KIND_HELLO | KIND_STOPPED | KIND_READY);
        field(kind, "sequence", numbered || raw.sequence.get() == 0)?;
        Ok(Self {
            kind,
            flags: raw.flags.get(),
            sequence: raw.sequence.get(),
            body_len: raw.body_len.get(),
            body_crc: raw.body_crc.get(),
        })
    }

    /// Length of the body that follows, in bytes; at most some 32 KiB.
    pub fn body_len(&self) -> usize {
        self.body_len as usize
    }
}

impl Frame {
    /// Appends header and body to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([0; FRAME_HEADER_BYTES]);
        let (kind, flags, sequence) = self.encode_body(out);
        let body = &out[start + FRAME_HEADER_BYTES..];
        let mut header = RawHeader {
            magic: MAGIC.into(),
            version: VERSION,
            kind,
            flags: flags.into(),
            body_len: (body.len() as u32).into(),
            body_crc: crc32c(body).into(),
            sequence: sequence.into(),
            reserved: 0.into(),
            header_crc: 0.into(),
        };
        header.header_crc = crc32c(&header.as_bytes()[..FRAME_HEADER_BYTES - 4]).into();
        out[start..start + FRAME_HEADER_BYTES].copy_from_slice(header.as_bytes());
    }

    fn encode_body(&self, out: &mut Vec<u8>) -> (u8, u16, u64) {
        match self {
            Self::Hello(hello) => {
                out.extend(HelloBody::from(hello).as_bytes());
                (KIND_HELLO, if hello.ready { FLAG_READY } else { 0 }, 0)
            }
            Self::Ready => (KIND_READY, 0, 0),
            Self::Received { sequence } => (KIND_RECEIVED, 0, *sequence),
            Self::Stopped { reason } => {
                let (number, process) = match reason {
                    StopReason::LostMemory { process } => (1, process),
                    StopReason::ClockExhausted { process } => (2, process),
                };
                let body = StoppedBody {
                    reason: number.into(),
                    process: process.0.into(),
                };
                out.extend(body.as_bytes());
                (KIND_STOPPED, 0, 0)
            }
            Self::Message { sequence, message } => {
                let (kind, flags) = message.encode(out);
                (kind, flags, *sequence)
            }
        }
    }

    /// Reads the body that belongs to `header`.
    ///
    /// # Errors
    /// [`FrameError`] for anything that [`Frame::encode`] would not have made.
    pub fn decode(header: &FrameHeader, body: &[u8]) -> Result<Self, FrameError> {
        let kind = header.kind;
        if body.len() != header.body_len() {
            let len = body.len() as u64;
            return Err(FrameError::Length { kind, len });
        }
        check_crc(body, header.body_crc)?;
        let sequence = header.sequence;
        match kind {
            KIND_HELLO => Hello::decode(header, body).map(Self::Hello),
            KIND_READY => Ok(Self::Ready),
            KIND_RECEIVED => Ok(Self::Received { sequence }),
            KIND_STOPPED => {
                let raw: StoppedBody = read(kind, body)?;
                let process = ProcessId(raw.process.get());
                let reason = match raw.reason.get() {
                    1 => StopReason::LostMemory { process },
                    2 => StopReason::ClockExhausted { process },
                    _ => {
                        return Err(FrameError::Field {
                            kind,
                            field: "reason",
                        });
                    }
                };
                Ok(Self::Stopped { reason })
            }
            _ => {
                let message = Message::decode(header, body)?;
                Ok(Self::Message { sequence, message })
            }
        }
    }
}

impl Message {
    fn encode(&self, out: &mut Vec<u8>) -> (u8, u16) {
        match self {
            Self::Request {
                id,
                variable,
                operation,
                time,
            } => {
                encode_operation(out, *id, *time, *variable, operation);
                (KIND_REQUEST, 0)
            }
            Self::Submit {
                id,
                variable,
                operation,
            } => {
                encode_operation(out, *id, 0, *variable, operation);
                (KIND_SUBMIT, 0)
            }
            Self::Ordered {
                key,
                variable,
                operation,
            } => {
                encode_operation(out, key.id, key.time, *variable, operation);
                (KIND_ORDERED, 0)
            }
            Self::Proposal { id, time } => {
                encode_time(out, *id, *time);
                (KIND_PROPOSAL, 0)
            }
            Self::Commit {
                id,
                time,
                acknowledge,
            } => {
                encode_time(out, *id, *time);
                let flags = if *acknowledge { FLAG_ACKNOWLEDGE } else { 0 };
                (KIND_COMMIT, flags)
            }
            Self::Committed { id } => {
                encode_time(out, *id, 0);
                (KIND_COMMITTED, 0)
            }
            Self::Delivered { count } => {
                out.extend(count.to_le_bytes());
                (KIND_DELIVERED, 0)
            }
        }
    }

    fn decode(header: &FrameHeader, body: &[u8]) -> Result<Self, FrameError> {
        let kind = header.kind;
        match kind {
            KIND_DELIVERED => {
                let count: U64 = read(kind, body)?;
                Ok(Self::Delivered { count: count.get() })
            }
            KIND_PROPOSAL | KIND_COMMIT | KIND_COMMITTED => {
                let raw: TimeBody = read(kind, body)?;
                let (id, time) = (raw.id.decode(kind)?, raw.time.get());
                Ok(match kind {
                    KIND_PROPOSAL => Self::Proposal { id, time },
                    KIND_COMMIT => Self::Commit {
                        id,
                        time,
                        acknowledge: header.flags & FLAG_ACKNOWLEDGE != 0,
                    },
                    _ => {
                        field(kind, "time", time == 0)?;
                        Self::Committed { id }
                    }
                })
            }
            _ => {
                let (id, time, variable, operation) = decode_operation(kind, body)?;
                Ok(match kind {
                    KIND_REQUEST => Self::Request {
                        id,
                        variable,
                        operation,
                        time,
                    },
                    KIND_SUBMIT => {
                        field(kind, "time", time == 0)?;
                        Self::Submit {
                            id,
                            variable,
                            operation,
                        }
                    }
                    _ => Self::Ordered {
                        key: OrderKey { time, id },
                        variable,
                        operation,
                    },
                })
            }
        }
    }
}

impl From<&Hello> for HelloBody {
    fn from(hello: &Hello) -> Self {
        Self {
            process: hello.process.0.into(),
            to: hello.to.0.into(),
            incarnation: hello.incarnation.0.into(),
            session: hello.session.into(),
            known: hello.known.unwrap_or_default().0.into(),
            received: hello.received.into(),
            configuration: hello.configuration,
            start: hello.start,
        }
    }
}

impl Hello {
    fn decode(header: &FrameHeader, body: &[u8]) -> Result<Self, FrameError> {
        let raw: HelloBody = read(KIND_HELLO, body)?;
        field(KIND_HELLO, "incarnation", raw.incarnation.get() != 0)?;
        Ok(Self {
            process: ProcessId(raw.process.get()),
            to: ProcessId(raw.to.get()),
            incarnation: Incarnation(raw.incarnation.get()),
            session: raw.session.get(),
            ready: header.flags & FLAG_READY != 0,
            known: Some(Incarnation(raw.known.get())).filter(|known| known.0 != 0),
            received: raw.received.get(),
            configuration: raw.configuration,
            start: raw.start,
        })
    }
}

impl From<OperationId> for Id {
    fn from(id: OperationId) -> Self {
        Self {
            initiator: id.initiator.0.into(),
            reserved: 0.into(),
            incarnation: id.incarnation.0.into(),
            number: id.number.into(),
        }
    }
}

impl Id {
    fn decode(&self, kind: u8) -> Result<OperationId, FrameError> {
        field(kind, "reserved field", self.reserved.get() == 0)?;
        let id = OperationId {
            initiator: ProcessId(self.initiator.get()),
            incarnation: Incarnation(self.incarnation.get()),
            number: self.number.get(),
        };
        field(kind, "id", id.incarnation.0 != 0 && id.number != 0)?;
        Ok(id)
    }
}

fn encode_time(out: &mut Vec<u8>, id: OperationId, time: u64) {
    let body = TimeBody {
        id: id.into(),
        time: time.into(),
    };
    out.extend(body.as_bytes());
}

fn encode_operation(
    out: &mut Vec<u8>,
    id: OperationId,
    time: u64,
    variable: VariableId,
    operation: &Operation,
) {
    let (number, first, second) = match operation {
        Operation::Read => (0, None, None),
        Operation::Write(value) => (1, Some(value), None),
        Operation::CompareAndSwap { expected, new } => (2, Some(expected), Some(new)),
    };
    let len = |value: Option<&Value>| match value {
        None => 0,
        Some(Value::Integer(_)) => 8,
        Some(Value::Bytes(bytes)) => bytes.len() as u32,
    };
    let body = OperationBody {
        id: id.into(),
        time: time.into(),
        variable: variable.0.into(),
        operation: number,
        values: u8::from(matches!(first, Some(Value::Bytes(_)))),
        reserved: 0.into(),
        first_len: len(first).into(),
        second_len: len(second).into(),
    };
    out.extend(body.as_bytes());
    for value in [first, second].into_iter().flatten() {
        match value {
            Value::Integer(number) => out.extend(number.to_le_bytes()),
            Value::Bytes(bytes) => out.extend(bytes.iter()),
        }
    }
}

fn decode_operation(
    kind: u8,
    body: &[u8],
) -> Result<(OperationId, u64, VariableId, Operation), FrameError> {
    let wrong_len = FrameError::Length {
        kind,
        len: body.len() as u64,
    };
    let (raw, values) = OperationBody::read_from_prefix(body).map_err(|_| wrong_len)?;
    field(kind, "reserved field", raw.reserved.get() == 0)?;
    let (first, second) = (
        u64::from(raw.first_len.get()),
        u64::from(raw.second_len.get()),
    );
    let longest = first.max(second);
    field(kind, "length", longest <= MAX_VARIABLE_BYTES)?;
    if first + second != values.len() as u64 {
        return Err(wrong_len);
    }
    let (first, second) = values.split_at(first as usize);
    let one = |bytes| decode_value(kind, raw.values, bytes);
    let operation = match raw.operation {
        0 => {
            field(kind, "value", values.is_empty() && raw.values == 0)?;
            Operation::Read
        }
        1 => {
            field(kind, "value", second.is_empty())?;
            Operation::Write(one(first)?)
        }
        2 => Operation::CompareAndSwap {
            expected: one(first)?,
            new: one(second)?,
        },
        _ => {
            return Err(FrameError::Field {
                kind,
                field: "operation",
            });
        }
    };
    let variable = VariableId(raw.variable.get());
    Ok((raw.id.decode(kind)?, raw.time.get(), variable, operation))
}

fn decode_value(kind: u8, values: u8, bytes: &[u8]) -> Result<Value, FrameError> {
    match values {
        0 => read::<U64>(kind, bytes).map(|raw| Value::Integer(raw.get().cast_signed())),
        1 => Ok(Value::bytes(bytes)),
        _ => Err(FrameError::Field {
            kind,
            field: "value",
        }),
    }
}

fn read<T: FromBytes>(kind: u8, bytes: &[u8]) -> Result<T, FrameError> {
    T::read_from_bytes(bytes).map_err(|_| FrameError::Length {
        kind,
        len: bytes.len() as u64,
    })
}

fn field(kind: u8, field: &'static str, fits: bool) -> Result<(), FrameError> {
    if fits {
        Ok(())
    } else {
        Err(FrameError::Field { kind, field })
    }
}

fn check_crc(bytes: &[u8], stated: u32) -> Result<(), FrameError> {
    let computed = crc32c(bytes);
    if computed == stated {
        Ok(())
    } else {
        Err(FrameError::Checksum { computed, stated })
    }
}

#[cfg(test)]
mod tests;
