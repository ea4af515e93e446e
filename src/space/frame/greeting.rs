//! The first bytes both ways.

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    FrameError, HELLO_BYTES, Incarnation, MAGIC, Refusal, WELCOME_BYTES, check_seal, seal,
};
use crate::checksum::Digest;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHello {
    magic: [u8; 4],
    least_version: U16,
    greatest_version: U16,
    map: [u8; 16],
    server: U32,
    flags: U32,
    client: U128,
    incarnation: U128,
    zero: [u8; 12],
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawWelcome {
    magic: [u8; 4],
    version: U16,
    refusal: U16,
    map: [u8; 16],
    server: U32,
    flags: U32,
    incarnation: U128,
    segment_size: U64,
    epoch: U64,
    max_in_flight: U32,
    zero: [u8; 24],
    crc: U32,
}

const _: () = {
    assert!(size_of::<RawHello>() == HELLO_BYTES);
    assert!(size_of::<RawWelcome>() == WELCOME_BYTES);
};

fn check_magic(found: [u8; 4]) -> Result<(), FrameError> {
    if found == MAGIC {
        return Ok(());
    }
    Err(FrameError::Magic { found })
}

/// A client's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Least and greatest version that it speaks.
    pub versions: (u16, u16),
    /// Digest of its map.
    pub map: Digest,
    /// Position of the server that it means to reach.
    pub server: u32,
    /// [`WANTS_MAPPING`](super::WANTS_MAPPING), [`WANTS_WRITING`](super::WANTS_WRITING).
    pub flags: u32,
    /// Random number of the client, for the log of operations.
    pub client: u128,
    /// The life of the segment that it knows; 0 = none yet.
    pub incarnation: Incarnation,
}

impl Hello {
    /// As bytes.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let raw = RawHello {
            magic: MAGIC,
            least_version: self.versions.0.into(),
            greatest_version: self.versions.1.into(),
            map: self.map,
            server: self.server.into(),
            flags: self.flags.into(),
            client: self.client.into(),
            incarnation: self.incarnation.0.into(),
            zero: [0; 12],
            crc: 0.into(),
        };
        let mut bytes: [u8; HELLO_BYTES] = zerocopy::transmute!(raw);
        seal(&mut bytes);
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FrameError::Magic`] for another protocol, [`FrameError::Checksum`].
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, FrameError> {
        let raw: &RawHello = zerocopy::transmute_ref!(bytes);
        check_magic(raw.magic)?;
        check_seal("greeting", bytes)?;
        Ok(Hello {
            versions: (raw.least_version.get(), raw.greatest_version.get()),
            map: raw.map,
            server: raw.server.get(),
            flags: raw.flags.get(),
            client: raw.client.get(),
            incarnation: Incarnation(raw.incarnation.get()),
        })
    }
}

/// A server's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version spoken from here on.
    pub version: u16,
    /// Why not, or [`Refusal::None`].
    pub refusal: Refusal,
    /// Digest of the server's map.
    pub map: Digest,
    /// The server's position.
    pub server: u32,
    /// [`HAS_MAPPING`](super::HAS_MAPPING), [`HAS_REPLICA`](super::HAS_REPLICA),
    /// [`HAS_WRITING`](super::HAS_WRITING).
    pub flags: u32,
    /// The life of the segment.
    pub incarnation: Incarnation,
    /// Bytes of the segment.
    pub segment_size: u64,
    /// Snapshot epoch of the server.
    pub epoch: u64,
    /// Unanswered operations that one connection may have.
    pub max_in_flight: u32,
}

impl Welcome {
    /// As bytes.
    pub fn encode(&self) -> [u8; WELCOME_BYTES] {
        let raw = RawWelcome {
            magic: MAGIC,
            version: self.version.into(),
            refusal: (self.refusal as u16).into(),
            map: self.map,
            server: self.server.into(),
            flags: self.flags.into(),
            incarnation: self.incarnation.0.into(),
            segment_size: self.segment_size.into(),
            epoch: self.epoch.into(),
            max_in_flight: self.max_in_flight.into(),
            zero: [0; 24],
            crc: 0.into(),
        };
        let mut bytes: [u8; WELCOME_BYTES] = zerocopy::transmute!(raw);
        seal(&mut bytes);
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FrameError::Magic`], [`FrameError::Checksum`], [`FrameError::Unknown`].
    pub fn decode(bytes: &[u8; WELCOME_BYTES]) -> Result<Welcome, FrameError> {
        let raw: &RawWelcome = zerocopy::transmute_ref!(bytes);
        check_magic(raw.magic)?;
        check_seal("welcome", bytes)?;
        Ok(Welcome {
            version: raw.version.get(),
            refusal: Refusal::of(raw.refusal.get())?,
            map: raw.map,
            server: raw.server.get(),
            flags: raw.flags.get(),
            incarnation: Incarnation(raw.incarnation.get()),
            segment_size: raw.segment_size.get(),
            epoch: raw.epoch.get(),
            max_in_flight: raw.max_in_flight.get(),
        })
    }
}
