//! The header of every frame, and the checks before a body is believed.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::limits::MAX_BODY;
use crate::units::OutOfRange;

/// First two bytes of every frame: `uF` as a little-endian number.
pub const MAGIC: u16 = u16::from_le_bytes(*b"uF");
/// Version of the frames that this crate speaks.
pub const VERSION: u8 = 2;
/// Length of a frame's header, in bytes.
pub const HEADER_BYTES: usize = 32;
/// Length of an extent's offset and length on the wire, in bytes.
pub const EXTENT_HEADER_BYTES: usize = 12;

/// Flag of an update: its epoch is an exact instant of the source.
pub const FLAG_CUT: u16 = 1;
/// Flag of an update: it makes the replica whole whatever epoch it had before
/// (first sync, or the differing chunks after a comparison by digest).
pub const FLAG_WHOLE: u16 = 2;
/// Flag of a START: the update begins before its epoch is complete. The total is a bound
/// that the END makes exact, and the END has [`FLAG_CUT`] where the epoch is a cut.
pub const FLAG_COMING: u16 = 4;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// First frame of the node that dialled: versions, identity, limits.
    Hello = 1,
    /// The answer to it.
    Welcome = 2,
    /// A replica asks to follow a region.
    Subscribe = 3,
    /// The source says which life of the region follows, and how it starts.
    RegionInfo = 4,
    /// A replica shows an epoch.
    Ack = 5,
    /// Asks for a sign of life.
    Ping = 6,
    /// The answer to it.
    Pong = 7,
    /// Digests of a replica's chunks.
    Digest = 8,
    /// A replica lost an update and asks for what is missing.
    Resync = 9,
    /// Something was refused; the text says what.
    Error = 10,
    /// A replica follows a region no longer.
    Unsubscribe = 11,
    /// A whole update in one frame.
    SingleUpdate = 16,
    /// First frame of an update in parts.
    StartUpdate = 17,
    /// A part of it.
    UpdateChunk = 18,
    /// Its end: count and total.
    EndUpdate = 19,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Kind; 15] = [
        Kind::Hello,
        Kind::Welcome,
        Kind::Subscribe,
        Kind::RegionInfo,
        Kind::Ack,
        Kind::Ping,
        Kind::Pong,
        Kind::Digest,
        Kind::Resync,
        Kind::Error,
        Kind::Unsubscribe,
        Kind::SingleUpdate,
        Kind::StartUpdate,
        Kind::UpdateChunk,
        Kind::EndUpdate,
    ];

    fn from_number(number: u8) -> Option<Kind> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// Whether the frame belongs to an update (the four kinds from 16 on).
    pub fn is_update(self) -> bool {
        self as u8 >= Kind::SingleUpdate as u8
    }

    fn flags_allowed(self) -> u16 {
        match self {
            Kind::SingleUpdate => FLAG_CUT | FLAG_WHOLE,
            Kind::StartUpdate => FLAG_CUT | FLAG_WHOLE | FLAG_COMING,
            Kind::EndUpdate => FLAG_CUT,
            _ => 0,
        }
    }
}

/// A frame that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first two bytes are not a frame's.
    #[error("not a frame: it begins with {found:#06x} instead of {MAGIC:#06x}")]
    Magic {
        /// The two bytes found, as a number.
        found: u16,
    },
    /// The header's checksum does not match.
    #[error("the frame header's checksum is {computed:#010x}, it says {stated:#010x}")]
    HeaderChecksum {
        /// Computed over the header as received.
        computed: u32,
        /// Stated in the header.
        stated: u32,
    },
    /// The body's checksum does not match.
    #[error("the frame body's checksum is {computed:#010x}, the header says {stated:#010x}")]
    BodyChecksum {
        /// Computed over the body as received.
        computed: u32,
        /// Stated in the header.
        stated: u32,
    },
    /// The frame is of a version that is not spoken here.
    #[error("frame of version {found}, this node speaks version {VERSION}")]
    Version {
        /// The version found.
        found: u8,
    },
    /// Reserved bytes are not zero, or flags are set that the kind does not have.
    #[error("reserved bits are set: flags {flags:#06x}, reserved {reserved:#06x}")]
    Reserved {
        /// The flags found.
        flags: u16,
        /// The reserved field found.
        reserved: u16,
    },
    /// The kind is not known.
    #[error("unknown kind of frame {found}")]
    Kind {
        /// The number found.
        found: u8,
    },
    /// The body is longer than any frame's.
    #[error("frame body of {len} bytes, at most {MAX_BODY} are taken")]
    TooLong {
        /// The length stated.
        len: u64,
    },
    /// The body does not have the length that the header states.
    #[error("frame body of {found} bytes, the header says {stated}")]
    Length {
        /// Bytes given.
        found: usize,
        /// Bytes stated in the header.
        stated: u32,
    },
    /// The body of a frame is too short, too long or has fields out of their range.
    #[error("malformed body of a {kind:?} frame: {what}")]
    Malformed {
        /// The kind of the frame.
        kind: Kind,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An extent reaches beyond the region.
    #[error("extent {index} of the frame lies outside of the region")]
    Extent {
        /// Its place in the frame.
        index: u32,
        /// The check that failed.
        #[source]
        source: OutOfRange,
    },
    /// Extents are empty, not sorted, overlap, or are more than a frame may hold.
    #[error("extent {index} at offset {offset}: {what}")]
    ExtentOrder {
        /// Its place in the frame.
        index: u32,
        /// Its offset in the region.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// The header as it lies on the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: U16,
    pub(super) version: u8,
    pub(super) kind: u8,
    pub(super) flags: U16,
    pub(super) reserved: U16,
    pub(super) region: U32,
    pub(super) body_len: U32,
    pub(super) epoch: U64,
    pub(super) body_crc: U32,
    pub(super) header_crc: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(std::mem::offset_of!(RawHeader, region) == 8);
    assert!(std::mem::offset_of!(RawHeader, epoch) == 16);
    assert!(std::mem::offset_of!(RawHeader, header_crc) == 28);
};

/// A header that was checked: magic, checksum, version, kind, flags and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// [`FLAG_CUT`], [`FLAG_WHOLE`] and [`FLAG_COMING`].
    pub flags: u16,
    /// The handle that the source gave the region; 0 where no region is meant.
    pub region: u32,
    /// Length of the body in bytes, at most `MAX_BODY`.
    pub body_len: u32,
    /// The epoch, which is the update's id; 0 where none is meant.
    pub epoch: u64,
    /// CRC-32C of the body.
    pub body_crc: u32,
}

impl Header {
    /// Whether all of `flag`'s bits are set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag == flag
    }

    /// Length of header and body, in bytes.
    pub fn frame_len(&self) -> usize {
        HEADER_BYTES + self.body_len as usize
    }
}

/// Reads and checks a header; nothing is known of the body yet.
///
/// # Errors
/// [`WireError`] for anything that [`FrameBuilder`](super::FrameBuilder) would not have made.
pub fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
    let raw: RawHeader = zerocopy::transmute!(*bytes);
    if raw.magic.get() != MAGIC {
        return Err(WireError::Magic {
            found: raw.magic.get(),
        });
    }
    let computed = crc32c(&bytes[..HEADER_BYTES - 4]);
    if computed != raw.header_crc.get() {
        return Err(WireError::HeaderChecksum {
            computed,
            stated: raw.header_crc.get(),
        });
    }
    if raw.version != VERSION {
        return Err(WireError::Version { found: raw.version });
    }
    let kind = Kind::from_number(raw.kind).ok_or(WireError::Kind { found: raw.kind })?;
    if raw.flags.get() & !kind.flags_allowed() != 0 || raw.reserved.get() != 0 {
        return Err(WireError::Reserved {
            flags: raw.flags.get(),
            reserved: raw.reserved.get(),
        });
    }
    if u64::from(raw.body_len.get()) > MAX_BODY {
        return Err(WireError::TooLong {
            len: raw.body_len.get().into(),
        });
    }
    Ok(Header {
        kind,
        flags: raw.flags.get(),
        region: raw.region.get(),
        body_len: raw.body_len.get(),
        epoch: raw.epoch.get(),
        body_crc: raw.body_crc.get(),
    })
}

/// Checks that `body` is the one that `header` announced: length and checksum.
///
/// # Errors
/// [`WireError::Length`] or [`WireError::BodyChecksum`].
pub fn check_body(header: &Header, body: &[u8]) -> Result<(), WireError> {
    if body.len() != header.body_len as usize {
        return Err(WireError::Length {
            found: body.len(),
            stated: header.body_len,
        });
    }
    let computed = crc32c(body);
    if computed == header.body_crc {
        Ok(())
    } else {
        Err(WireError::BodyChecksum {
            computed,
            stated: header.body_crc,
        })
    }
}
