//! Reading and writing the fields of a body, in their order.

use crate::words::Generation;

use super::encode::FrameBuilder;
use super::frame::{Header, Kind, WireError};

/// A body from its first byte to its last; every read says what was missing.
pub(super) struct Reader<'a> {
    kind: Kind,
    pub(super) rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(header: &Header, kind: Kind, body: &'a [u8]) -> Result<Self, WireError> {
        let reader = Self { kind, rest: body };
        if header.kind == kind {
            Ok(reader)
        } else {
            Err(reader.bad("the header names another kind"))
        }
    }

    pub(super) fn bad(&self, what: &'static str) -> WireError {
        WireError::Malformed {
            kind: self.kind,
            what,
        }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (bytes, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(self.bad("it is too short"))?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn generation(&mut self) -> Result<Generation, WireError> {
        Ok(Generation(u128::from_le_bytes(self.array()?)))
    }

    /// An epoch that may be missing: presence byte, seven zero bytes, epoch.
    pub(super) fn epoch(&mut self) -> Result<Option<u64>, WireError> {
        let present = self.u8()?;
        self.zero(7)?;
        match (present, self.u64()?) {
            (0, 0) => Ok(None),
            (1, epoch) => Ok(Some(epoch)),
            _ => Err(self.bad("the presence of an epoch is neither 0 nor 1")),
        }
    }

    pub(super) fn zero(&mut self, len: usize) -> Result<(), WireError> {
        if self.take(len)?.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err(self.bad("reserved bytes are set"))
        }
    }

    pub(super) fn text(&mut self, max: usize) -> Result<&'a str, WireError> {
        let len = usize::from(self.u8()?);
        if len > max {
            return Err(self.bad("a text is too long"));
        }
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|_| self.bad("a text is not UTF-8"))
    }

    pub(super) fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.bad("it is too long"))
        }
    }
}

pub(super) trait PutFields {
    fn put_epoch(&mut self, epoch: Option<u64>);
    fn put_text(&mut self, text: &str, max: usize);
}

impl PutFields for FrameBuilder {
    fn put_epoch(&mut self, epoch: Option<u64>) {
        self.put(&[u8::from(epoch.is_some()), 0, 0, 0, 0, 0, 0, 0]);
        self.put(&epoch.unwrap_or(0).to_le_bytes());
    }

    fn put_text(&mut self, text: &str, max: usize) {
        let mut end = text.len().min(max).min(255);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.put(&[end as u8]).put(&text.as_bytes()[..end]);
    }
}
