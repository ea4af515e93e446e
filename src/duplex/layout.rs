//! Byte layout of a channel's memory (drawn in the manual, channels).
//!
//! ```text
//! 0x0000  OIEB_Request 88 | 0x0058 OIEB_Response 88
//! 0x00B0  Metadata_Req    | Metadata_Resp              metadata_size each, u64 length first
//! C       control block, C = align_up(0xB0 + 2 * metadata_size, 128)
//!   +0x000 identity          once, by who creates it; the magic last
//!   +0x080 client's presence +0x100 server's presence   changed seldom
//!   +0x180 request_ready     +0x200 response_ready      event counts
//!   +0x280 response_consumed +0x300 space_available
//!   +0x380 failpoints
//!   +0x400 client's counters +0x480 server's counters   changed at each call
//!   +0x500 completion ring   2 * slots words
//!   ...    wishes            slots words, rounded up to 128 bytes
//!   ...    slot table        slots * 128 bytes
//! payload_offset = align_up(end, 4096)                  payload_size bytes
//! ```
//! Little-endian throughout. Lines of 128 bytes, each with one writing side, except
//! the event counts, the slots (owned by whom the state word says) and the payload.

use super::{BadSegment, completion};
use crate::limits::{
    MAX_CHANNEL_METADATA, MAX_CHANNEL_PAYLOAD, MAX_CHANNEL_SLOTS, MIN_CHANNEL_SLOTS,
};
use crate::units::{PAGE_SIZE, page_align_up};

/// "uffddpx" and the layout's version, as a number; stored last.
pub const MAGIC: u64 = u64::from_le_bytes(*b"uffddpx\x02");
/// Raised with every change of this layout.
pub const LAYOUT_VERSION: u32 = 2;

bitflags::bitflags! {
    /// What a channel's memory has beyond the ordinary.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u32 {
        /// The payload lies in a second descriptor, at `payload_offset` of it.
        const VIEW = 1;
        /// Both sides stop where the failpoint word says; for tests.
        const FAILPOINTS = 2;
        /// Frames may be batches. Left out for a client that does not know them.
        const BATCHES = 4;
    }
}

impl Features {
    /// What memory can do without: left out where one side does not know it.
    pub const OPTIONAL: Features = Features::BATCHES;
}

/// The version word of an OIEB: 88 bytes long, version 2.0.0.0.
pub(super) const OIEB_VERSION: u64 = 88 | 2 << 32;
/// Offset of the OIEB of requests.
pub(super) const OIEB_REQUEST: u64 = 0x00;
/// Offset of the OIEB of responses.
pub(super) const OIEB_RESPONSE: u64 = 0x58;
/// Offset of the client's metadata.
pub(super) const METADATA: u64 = 0xB0;

/// Offsets within an OIEB.
pub(super) mod oieb {
    pub(in super::super) const VERSION: u64 = 0x00;
    pub(in super::super) const METADATA_SIZE: u64 = 0x08;
    pub(in super::super) const METADATA_FREE: u64 = 0x10;
    pub(in super::super) const METADATA_WRITTEN: u64 = 0x18;
    pub(in super::super) const PAYLOAD_SIZE: u64 = 0x20;
    pub(in super::super) const PAYLOAD_FREE: u64 = 0x28;
    pub(in super::super) const WRITTEN_BYTES: u64 = 0x30;
    pub(in super::super) const WRITTEN_COUNT: u64 = 0x38;
    pub(in super::super) const READ_COUNT: u64 = 0x40;
    pub(in super::super) const WRITER_PID: u64 = 0x48;
    pub(in super::super) const READER_PID: u64 = 0x50;
}

/// Offsets within the control block, in bytes.
pub(super) mod control {
    pub(in super::super) const ID_MAGIC: u64 = 0x00;
    pub(in super::super) const ID_LAYOUT: u64 = 0x08;
    pub(in super::super) const ID_FEATURES: u64 = 0x0C;
    pub(in super::super) const ID_GENERATION: u64 = 0x10;
    pub(in super::super) const ID_SLOTS: u64 = 0x18;
    pub(in super::super) const ID_RESERVED: u64 = 0x1C;
    pub(in super::super) const ID_METADATA_SIZE: u64 = 0x20;
    pub(in super::super) const ID_PAYLOAD_OFFSET: u64 = 0x28;
    pub(in super::super) const ID_PAYLOAD_SIZE: u64 = 0x30;
    pub(in super::super) const ID_CHANNEL: u64 = 0x38;
    /// Presence of the client, then of the server, 128 bytes each.
    pub(in super::super) const CLIENT: u64 = 0x080;
    pub(in super::super) const SERVER: u64 = 0x100;
    pub(in super::super) const FAILPOINTS: u64 = 0x380;
    /// Bytes in front of the completion ring.
    pub(in super::super) const BYTES: u64 = 0x500;
}

/// Offsets within a presence line.
pub(super) mod presence {
    /// Robust futex word of who lives.
    pub(in super::super) const ROBUST: u64 = 0x00;
    /// CPU it runs on, plus 1; 0 = not known.
    pub(in super::super) const CPU: u64 = 0x04;
    /// 1 once the side has stopped.
    pub(in super::super) const STOP: u64 = 0x08;
    /// The word whose low half that is.
    pub(in super::super) const STOP_WORD: usize = 1;
    /// Sleeps of this side that ended by time although they should have been woken.
    pub(in super::super) const LATE: u64 = 0x10;
}

/// Lines of the control block that calls touch, as indices into it.
pub(super) mod line {
    pub(in super::super) const CLIENT: usize = 1;
    pub(in super::super) const SERVER: usize = 2;
    pub(in super::super) const REQUEST_READY: usize = 3;
    pub(in super::super) const RESPONSE_READY: usize = 4;
    pub(in super::super) const RESPONSE_CONSUMED: usize = 5;
    pub(in super::super) const SPACE_AVAILABLE: usize = 6;
    pub(in super::super) const CLIENT_COUNTERS: usize = 8;
    pub(in super::super) const SERVER_COUNTERS: usize = 9;
    pub(in super::super) const COUNT: usize = 10;
}

/// Words of the client's counters.
pub(super) mod client_counter {
    pub(in super::super) const WRITTEN_COUNT: usize = 0;
    pub(in super::super) const WRITTEN_BYTES: usize = 1;
    /// Responses read.
    pub(in super::super) const READ_COUNT: usize = 2;
    /// Bytes of the payload in no frame.
    pub(in super::super) const FREE_BYTES: usize = 3;
    /// Frames that are being filled in.
    pub(in super::super) const WRITING: usize = 4;
    /// Sequence of the next request, unless a lap begins.
    pub(in super::super) const NEXT: usize = 5;
}

/// Words of the server's counters.
pub(super) mod server_counter {
    /// Requests taken.
    pub(in super::super) const READ_COUNT: usize = 0;
    pub(in super::super) const WRITTEN_COUNT: usize = 1;
    pub(in super::super) const WRITTEN_BYTES: usize = 2;
    /// Sequence whose handler runs, of a server with one worker; 0 = none.
    pub(in super::super) const SERVING: usize = 3;
    /// Requests that ended as failed.
    pub(in super::super) const FAILED: usize = 4;
}

/// Slots that are fetched ahead of the one that is read, where many are in flight.
pub(super) const LINES_AHEAD: u64 = 4;

/// Words of a slot.
pub(super) mod slot {
    /// `sequence << 8 | state`.
    pub(in super::super) const STATE: usize = 0;
    /// `flags << 32 | length`; of a failed frame `error << 32 | length`.
    pub(in super::super) const LENGTH: usize = 1;
    /// Inline data from this word on.
    pub(in super::super) const INLINE: usize = 2;
    /// Words of inline data.
    pub(in super::super) const INLINE_WORDS: usize = 14;
    /// Instead of inline data: offset of the data in the payload.
    pub(in super::super) const OFFSET: usize = 2;
    /// Instead of inline data: its capacity.
    pub(in super::super) const CAPACITY: usize = 3;
    /// Nobody waits for a response.
    pub(in super::super) const ONE_WAY: u32 = 1;
    /// The data lies in the slot.
    pub(in super::super) const IN_SLOT: u32 = 2;
    /// The frame, in the payload, is a batch.
    pub(in super::super) const BATCH: u32 = 4;
}

/// Largest frame, in bytes, that lies in its slot and takes no payload.
pub const INLINE_BYTES: usize = 8 * slot::INLINE_WORDS;

/// Header of a block in the payload, 64 bytes: kind u32, reserved u32, length u64
/// (whole block), sequence u64, slot u32; the rest zero.
pub(super) mod block {
    pub(in super::super) const FRAME: u32 = 0x4D41_5246;
    pub(in super::super) const WRAP: u32 = 0x5041_5257;
}

const _: () = {
    assert!(OIEB_RESPONSE == OIEB_REQUEST + 88 && METADATA == 2 * 88);
    assert!(oieb::READER_PID + 8 == 88);
    assert!(control::ID_CHANNEL + 16 <= control::CLIENT);
    assert!(control::BYTES == 128 * line::COUNT as u64);
    assert!(control::FAILPOINTS == 128 * 7);
    assert!(slot::INLINE + slot::INLINE_WORDS == 16);
    assert!(MAX_CHANNEL_PAYLOAD <= u32::MAX as u64);
    assert!(completion::places(MAX_CHANNEL_SLOTS as u32) < 1 << 15);
};

/// Where everything lies in a channel's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Slots, a power of two.
    pub slots: u32,
    /// Bytes of each side's metadata, the length word included; a multiple of 8.
    pub metadata_size: u64,
    /// Offset of the control block.
    pub control: u64,
    /// Offset of the completion ring.
    pub ring: u64,
    /// Offset of the client's wishes: a word per slot, the last sequence of it that
    /// was cancelled.
    pub wishes: u64,
    /// Offset of the slot table.
    pub table: u64,
    /// Offset of the payload, in the second descriptor if it is a view.
    pub payload_offset: u64,
    /// Bytes of payload, a multiple of 64.
    pub payload_size: u64,
    /// What is out of the ordinary.
    pub features: Features,
    /// Bytes of the first descriptor.
    pub total: u64,
}

impl Geometry {
    /// The layout for these numbers. `view_offset` is used for a view only.
    ///
    /// # Errors
    /// [`BadSegment`] that names the number and its bound.
    pub(super) fn new(
        slots: u32,
        metadata_size: u64,
        payload_size: u64,
        features: Features,
        view_offset: u64,
    ) -> Result<Geometry, BadSegment> {
        let possible = MIN_CHANNEL_SLOTS..=MAX_CHANNEL_SLOTS;
        if !possible.contains(&u64::from(slots)) || !slots.is_power_of_two() {
            return Err(BadSegment::Slots { slots });
        }
        if metadata_size > MAX_CHANNEL_METADATA || !metadata_size.is_multiple_of(8) {
            return Err(BadSegment::MetadataSize { metadata_size });
        }
        if payload_size > MAX_CHANNEL_PAYLOAD || !payload_size.is_multiple_of(super::space::UNIT) {
            return Err(BadSegment::PayloadSize { payload_size });
        }
        let control = control_offset(metadata_size);
        let ring = control + control::BYTES;
        let ring_bytes = 8 * u64::from(completion::places(slots));
        let wishes = ring + ring_bytes.next_multiple_of(128);
        let table = wishes + (8 * u64::from(slots)).next_multiple_of(128);
        let end = page_align_up(table + 128 * u64::from(slots));
        let is_view = features.contains(Features::VIEW);
        Ok(Geometry {
            slots,
            metadata_size,
            control,
            ring,
            wishes,
            table,
            payload_offset: if is_view { view_offset } else { end },
            payload_size,
            features,
            total: if is_view {
                end
            } else {
                end + page_align_up(payload_size)
            },
        })
    }

    /// Bytes of metadata that each side can set.
    pub fn metadata_capacity(&self) -> u64 {
        self.metadata_size.saturating_sub(8)
    }
}

/// Where the control block lies behind metadata of this size.
pub(super) fn control_offset(metadata_size: u64) -> u64 {
    (METADATA + 2 * metadata_size).next_multiple_of(128)
}

const _: () = assert!(PAGE_SIZE.is_multiple_of(128));
