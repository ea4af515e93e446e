//! Requests, read and judged.

use zerocopy::FromBytes;

use super::backing::{Failure, Zeroing};
use super::export::Export;
use super::handshake::Agreed;
use super::numbers::{REQUEST_BYTES, REQUEST_MAGIC, RawRequest, command, flag};
use super::session::Violation;
use crate::limits::MAX_NBD_PAYLOAD;
use crate::units::checked_range;

/// A request's header as it came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
    flags: u16,
    command: u16,
}

/// What a request asks, judged: its range lies in the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read {
        whole: bool,
    },
    Write,
    Zero(Zeroing),
    Status {
        one: bool,
    },
    /// Flush or cache.
    Nothing,
    Disconnect,
}

impl Request {
    /// From the beginning of `input`, if it is all there.
    pub(super) fn decode(input: &[u8]) -> Result<Option<Self>, Violation> {
        let Some(Ok(raw)) = input.get(..REQUEST_BYTES).map(RawRequest::ref_from_bytes) else {
            return Ok(None);
        };
        if raw.magic.get() != REQUEST_MAGIC {
            return Err(Violation::RequestMagic {
                found: raw.magic.get(),
            });
        }
        Ok(Some(Self {
            cookie: raw.cookie.get(),
            offset: raw.offset.get(),
            len: raw.len.get(),
            flags: raw.flags.get(),
            command: raw.command.get(),
        }))
    }

    /// Bytes that follow the header, whether the request is carried out or not.
    pub(super) fn payload(&self) -> u32 {
        if self.command == command::WRITE {
            self.len
        } else {
            0
        }
    }

    /// Whether it is answered by chunks where replies are structured, errors included.
    pub(super) fn reads(&self) -> bool {
        self.command == command::READ
    }

    /// What it asks, or why not.
    pub(super) fn judge(&self, export: &Export, agreed: &Agreed) -> Result<Command, Failure> {
        if self.command == command::DISC {
            return Ok(Command::Disconnect);
        }
        let allowed = match self.command {
            command::READ if agreed.structured => flag::DF,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        };
        // FUA is valid for all commands, and changes none.
        if self.flags & !(allowed | flag::FUA) != 0 {
            return Err(Failure::Invalid);
        }
        let has = |flag: u16| self.flags & flag != 0;
        let command = match self.command {
            command::READ => Command::Read {
                whole: has(flag::DF),
            },
            command::WRITE => Command::Write,
            command::TRIM => Command::Zero(Zeroing::Discard),
            command::WRITE_ZEROES if has(flag::NO_HOLE) => Command::Zero(Zeroing::Allocated),
            command::WRITE_ZEROES => Command::Zero(Zeroing::Sparse),
            command::BLOCK_STATUS if !agreed.contexts.is_empty() && self.len > 0 => {
                Command::Status {
                    one: has(flag::REQ_ONE),
                }
            }
            command::CACHE => Command::Nothing,
            command::FLUSH if self.offset == 0 && self.len == 0 => Command::Nothing,
            _ => return Err(Failure::Invalid),
        };
        let writes = matches!(command, Command::Write | Command::Zero(_));
        if writes && export.read_only {
            return Err(Failure::ReadOnly);
        }
        let carries = matches!(command, Command::Write | Command::Read { .. });
        if carries && u64::from(self.len) > MAX_NBD_PAYLOAD {
            return Err(Failure::Invalid);
        }
        match checked_range(self.offset, self.len.into(), export.size) {
            Ok(_) => Ok(command),
            Err(_) if writes && self.command != command::TRIM => Err(Failure::NoSpace),
            Err(_) => Err(Failure::Invalid),
        }
    }
}
