//! The two OIEBs: the counters as the seed of this protocol lays them out.
//!
//! The control block holds the truth; each OIEB field is a copy that its owner makes
//! when it goes to sleep, now and then while busy, for a status, and at close.
//!
//! | field | OIEB_Request, owner | OIEB_Response, owner |
//! |---|---|---|
//! | version, sizes | creator, once | creator, once |
//! | metadata_free, metadata_written | client | server |
//! | payload_free_bytes | client | client |
//! | payload_written_bytes, _count | client | server |
//! | payload_read_count | server | client |
//! | writer_pid | client | server |
//! | reader_pid | server | client |

use std::sync::atomic::Ordering;

use super::layout::{
    METADATA, OIEB_REQUEST, OIEB_RESPONSE, OIEB_VERSION, client_counter, line, oieb, server_counter,
};
use super::segment::Segment;
use super::state::Side;

/// A copy of one OIEB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Oieb {
    /// Length 88 in the low half, version 2.0.0.0 in the high half.
    pub operation_size: u64,
    /// Bytes for metadata, the length word included.
    pub metadata_size: u64,
    /// Bytes of it not written.
    pub metadata_free_bytes: u64,
    /// Bytes of it written, the length word included.
    pub metadata_written_bytes: u64,
    /// Bytes of payload.
    pub payload_size: u64,
    /// Bytes of it in no frame.
    pub payload_free_bytes: u64,
    /// Bytes ever written.
    pub payload_written_bytes: u64,
    /// Frames ever written.
    pub payload_written_count: u64,
    /// Frames ever read by the other side.
    pub payload_read_count: u64,
    /// Process that writes; 0 = none yet.
    pub writer_pid: u64,
    /// Process that reads; 0 = none yet.
    pub reader_pid: u64,
}

impl Segment {
    /// A copy of the OIEB of requests (`Side::Client` writes them) or of responses.
    pub fn oieb(&self, writer: Side) -> Oieb {
        let base = base_of(writer);
        let word = |offset| {
            self.control()
                .atomic_u64(base + offset)
                .load(Ordering::Relaxed)
        };
        Oieb {
            operation_size: word(oieb::VERSION),
            metadata_size: word(oieb::METADATA_SIZE),
            metadata_free_bytes: word(oieb::METADATA_FREE),
            metadata_written_bytes: word(oieb::METADATA_WRITTEN),
            payload_size: word(oieb::PAYLOAD_SIZE),
            payload_free_bytes: word(oieb::PAYLOAD_FREE),
            payload_written_bytes: word(oieb::WRITTEN_BYTES),
            payload_written_count: word(oieb::WRITTEN_COUNT),
            payload_read_count: word(oieb::READ_COUNT),
            writer_pid: word(oieb::WRITER_PID),
            reader_pid: word(oieb::READER_PID),
        }
    }

    /// Creator: what never changes, and all of the payload free.
    pub(super) fn init_oiebs(&self) {
        let geometry = self.geometry();
        for side in [Side::Client, Side::Server] {
            let base = base_of(side);
            self.set(base + oieb::VERSION, OIEB_VERSION);
            self.set(base + oieb::METADATA_SIZE, geometry.metadata_size);
            self.set(base + oieb::METADATA_FREE, geometry.metadata_size);
            self.set(base + oieb::PAYLOAD_SIZE, geometry.payload_size);
            self.set(base + oieb::PAYLOAD_FREE, geometry.payload_size);
        }
    }

    /// Copies the counters of `side` into the fields that it owns.
    pub fn mirror(&self, side: Side) {
        let counter = |line, word: usize| self.lines().line(line).0[word].load(Ordering::Relaxed);
        let (own, other) = match side {
            Side::Client => (OIEB_REQUEST, OIEB_RESPONSE),
            Side::Server => (OIEB_RESPONSE, OIEB_REQUEST),
        };
        let (bytes, count, read) = match side {
            Side::Client => {
                let free = counter(line::CLIENT_COUNTERS, client_counter::FREE_BYTES);
                self.set(OIEB_REQUEST + oieb::PAYLOAD_FREE, free);
                self.set(OIEB_RESPONSE + oieb::PAYLOAD_FREE, free);
                (
                    counter(line::CLIENT_COUNTERS, client_counter::WRITTEN_BYTES),
                    counter(line::CLIENT_COUNTERS, client_counter::WRITTEN_COUNT),
                    counter(line::CLIENT_COUNTERS, client_counter::READ_COUNT),
                )
            }
            Side::Server => (
                counter(line::SERVER_COUNTERS, server_counter::WRITTEN_BYTES),
                counter(line::SERVER_COUNTERS, server_counter::WRITTEN_COUNT),
                counter(line::SERVER_COUNTERS, server_counter::READ_COUNT),
            ),
        };
        self.set(own + oieb::WRITTEN_BYTES, bytes);
        self.set(own + oieb::WRITTEN_COUNT, count);
        self.set(other + oieb::READ_COUNT, read);
    }

    /// Notes this process as `side`.
    pub(super) fn set_pid(&self, side: Side, pid: u64) {
        let (own, other) = match side {
            Side::Client => (OIEB_REQUEST, OIEB_RESPONSE),
            Side::Server => (OIEB_RESPONSE, OIEB_REQUEST),
        };
        self.set(own + oieb::WRITER_PID, pid);
        self.set(other + oieb::READER_PID, pid);
    }

    /// Notes how much of its metadata `side` has written.
    pub(super) fn mirror_metadata(&self, side: Side, written: u64) {
        let base = base_of(side);
        let free = self.geometry().metadata_size.saturating_sub(written);
        self.set(base + oieb::METADATA_WRITTEN, written);
        self.set(base + oieb::METADATA_FREE, free);
    }

    fn set(&self, offset: u64, value: u64) {
        self.control()
            .atomic_u64(offset)
            .store(value, Ordering::Relaxed);
    }
}

fn base_of(writer: Side) -> u64 {
    match writer {
        Side::Client => OIEB_REQUEST,
        Side::Server => OIEB_RESPONSE,
    }
}

const _: () = assert!(OIEB_RESPONSE + oieb::READER_PID + 8 == METADATA);
