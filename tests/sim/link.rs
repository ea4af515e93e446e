//! A connection: two pipes with a rate, which may be cut at any byte.

use uffd_sync::wire::{HEADER_BYTES, Header, WireError, check_body, parse_header};

/// One direction.
#[derive(Debug, Default)]
pub(crate) struct Pipe {
    /// Sent, not arrived.
    wire: Vec<u8>,
    /// Arrived, not read.
    arrived: Vec<u8>,
}

/// What a reader finds at the front of a pipe.
pub(crate) enum Read {
    Frame(Header, Vec<u8>),
    Damaged(Header),
    Broken(WireError),
    Nothing { progress: bool },
}

impl Pipe {
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.wire.extend_from_slice(bytes);
    }

    pub(crate) fn unsent(&self) -> usize {
        self.wire.len()
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.wire.is_empty() && self.arrived.is_empty()
    }

    /// Moves up to `bytes` on; false if nothing was there to move.
    pub(crate) fn carry(&mut self, bytes: usize) -> bool {
        let count = bytes.min(self.wire.len());
        self.arrived.extend_from_slice(&self.wire[..count]);
        self.wire.drain(..count);
        count > 0
    }

    /// Takes one whole frame, if it is there.
    pub(crate) fn read(&mut self) -> Read {
        let progress = !self.arrived.is_empty();
        let Some(head) = self.arrived.first_chunk::<HEADER_BYTES>() else {
            return Read::Nothing { progress };
        };
        let header = match parse_header(head) {
            Ok(header) => header,
            Err(error) => return Read::Broken(error),
        };
        if self.arrived.len() < header.frame_len() {
            return Read::Nothing { progress };
        }
        let body = self.arrived[HEADER_BYTES..header.frame_len()].to_vec();
        self.arrived.drain(..header.frame_len());
        match check_body(&header, &body) {
            Ok(()) => Read::Frame(header, body),
            Err(WireError::BodyChecksum { .. }) => Read::Damaged(header),
            Err(error) => Read::Broken(error),
        }
    }
}

/// A connection between a replica and the source.
#[derive(Debug, Default)]
pub(crate) struct Link {
    pub(crate) down: Pipe,
    pub(crate) up: Pipe,
}
