//! Byte layout of a buffer (drawn in the room's documentation) and its names.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::error::ZeroBufferError;
use crate::limits::{ZEROBUFFER_MAX_BYTES, ZEROBUFFER_NAME_BYTES};

/// What [`Oieb::size`] holds in version 1.
pub(super) const OIEB_BYTES: u64 = 128;
/// Version 1.0.0 as its four bytes.
pub(super) const VERSION: [u8; 4] = [1, 0, 0, 0];
/// All blocks begin at a multiple of this and are as long.
pub(super) const BLOCK: u64 = 64;
/// Length of what stands in front of a frame's data.
pub(super) const HEADER_BYTES: u64 = 16;
/// Length of what stands in front of the metadata.
pub(super) const METADATA_PREFIX: u64 = 8;
/// What follows a duplex channel's name in the names of its two buffers.
pub(super) const REQUEST_SUFFIX: &str = "_request";
pub(super) const RESPONSE_SUFFIX: &str = "_response";

/// Operation Info Exchange Block, at offset 0. The fields from `payload_free_bytes`
/// on are accessed as atomics at the offsets below; the structure is for making one
/// and for a first look.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Oieb {
    pub(super) size: u32,
    pub(super) version: [u8; 4],
    pub(super) metadata_size: u64,
    pub(super) metadata_free_bytes: u64,
    pub(super) metadata_written_bytes: u64,
    pub(super) payload_size: u64,
    pub(super) payload_free_bytes: u64,
    pub(super) payload_write_pos: u64,
    pub(super) payload_read_pos: u64,
    pub(super) payload_written_count: u64,
    pub(super) payload_read_count: u64,
    pub(super) writer_pid: u64,
    pub(super) reader_pid: u64,
    pub(super) reserved: [u64; 4],
}

pub(super) const METADATA_FREE: u64 = 0x10;
pub(super) const METADATA_WRITTEN: u64 = 0x18;
pub(super) const FREE_BYTES: u64 = 0x28;
pub(super) const WRITE_POS: u64 = 0x30;
pub(super) const READ_POS: u64 = 0x38;
pub(super) const WRITTEN_COUNT: u64 = 0x40;
pub(super) const READ_COUNT: u64 = 0x48;
pub(super) const WRITER_PID: u64 = 0x50;
pub(super) const READER_PID: u64 = 0x58;

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Oieb>() as u64 == OIEB_BYTES);
    assert!(offset_of!(Oieb, version) == 4);
    assert!(offset_of!(Oieb, metadata_size) == 0x08);
    assert!(offset_of!(Oieb, metadata_free_bytes) as u64 == METADATA_FREE);
    assert!(offset_of!(Oieb, metadata_written_bytes) as u64 == METADATA_WRITTEN);
    assert!(offset_of!(Oieb, payload_size) == 0x20);
    assert!(offset_of!(Oieb, payload_free_bytes) as u64 == FREE_BYTES);
    assert!(offset_of!(Oieb, payload_write_pos) as u64 == WRITE_POS);
    assert!(offset_of!(Oieb, payload_read_pos) as u64 == READ_POS);
    assert!(offset_of!(Oieb, payload_written_count) as u64 == WRITTEN_COUNT);
    assert!(offset_of!(Oieb, payload_read_count) as u64 == READ_COUNT);
    assert!(offset_of!(Oieb, writer_pid) as u64 == WRITER_PID);
    assert!(offset_of!(Oieb, reader_pid) as u64 == READER_PID);
    assert!(offset_of!(Oieb, reserved) == 0x60);
    assert!(size_of::<FrameHeader>() as u64 == HEADER_BYTES);
};

/// What stands in front of each frame's data; all zero it is a wrap marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct FrameHeader {
    pub(super) size: u64,
    pub(super) sequence: u64,
}

impl FrameHeader {
    /// The next frame stands at the ring's beginning.
    pub(super) const WRAP: FrameHeader = FrameHeader {
        size: 0,
        sequence: 0,
    };
}

/// Sizes of a buffer's blocks, each a multiple of [`BLOCK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    pub(super) metadata: u64,
    pub(super) payload: u64,
}

impl Blocks {
    /// The blocks for at least that many bytes of each.
    pub(super) fn for_sizes(metadata: u64, payload: u64) -> Result<Blocks, ZeroBufferError> {
        let refused = ZeroBufferError::Size { metadata, payload };
        if metadata == 0 || payload == 0 {
            return Err(refused);
        }
        let aligned = |bytes: u64| bytes.checked_next_multiple_of(BLOCK);
        match (aligned(metadata), aligned(payload)) {
            (Some(metadata), Some(payload)) => {
                let blocks = Blocks { metadata, payload };
                blocks.total().map(|_| blocks).ok_or(refused)
            }
            _ => Err(refused),
        }
    }

    /// The blocks that an existing buffer of `len` bytes declares, checked.
    pub(super) fn of(oieb: &Oieb, len: u64) -> Result<Blocks, ZeroBufferError> {
        let foreign = |problem| Err(ZeroBufferError::Foreign { problem });
        if u64::from(oieb.size) != OIEB_BYTES {
            return foreign("the first word is not 128, the size of version 1's block");
        }
        if oieb.version[0] != VERSION[0] {
            return foreign("its version is not 1");
        }
        let blocks = Blocks {
            metadata: oieb.metadata_size,
            payload: oieb.payload_size,
        };
        let aligned = |bytes: u64| bytes != 0 && bytes.is_multiple_of(BLOCK);
        if !aligned(blocks.metadata) || !aligned(blocks.payload) {
            return foreign("its blocks are not multiples of 64 bytes");
        }
        match blocks.total() {
            Some(total) if total <= len => Ok(blocks),
            _ => foreign("its blocks are larger than the shared memory"),
        }
    }

    /// Length of the shared memory, if it is within the limit.
    pub(super) fn total(&self) -> Option<u64> {
        self.metadata
            .checked_add(self.payload)?
            .checked_add(OIEB_BYTES)
            .filter(|total| *total <= ZEROBUFFER_MAX_BYTES)
    }

    /// Offset of the ring in the shared memory.
    pub(super) fn ring(&self) -> u64 {
        OIEB_BYTES + self.metadata
    }

    /// Longest data that a frame can have.
    pub(super) fn max_frame(&self) -> u64 {
        self.payload - HEADER_BYTES
    }
}

/// The name of a buffer, and of what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BufferName(Box<str>);

impl BufferName {
    /// A file name of at most [`ZEROBUFFER_NAME_BYTES`] that no semaphore has.
    pub(super) fn new(name: &str) -> Result<BufferName, ZeroBufferError> {
        let refuse = |problem| Err(ZeroBufferError::Name { problem });
        if name.is_empty() || name == "." || name == ".." {
            return refuse("is empty, `.` or `..`");
        }
        if name.len() as u64 > ZEROBUFFER_NAME_BYTES {
            return refuse("is longer than 245 bytes (236 for a duplex channel)");
        }
        if name.contains('/') || name.chars().any(char::is_control) {
            return refuse("holds a slash or a control character");
        }
        if name.starts_with("sem.") {
            return refuse("begins with `sem.`, as the files of semaphores do");
        }
        Ok(BufferName(name.into()))
    }

    /// The two buffers of a duplex channel: requests, responses.
    pub(super) fn of_channel(channel: &str) -> Result<(BufferName, BufferName), ZeroBufferError> {
        BufferName::new(channel)?;
        let buffer = |suffix| BufferName::new(&format!("{channel}{suffix}"));
        Ok((buffer(REQUEST_SUFFIX)?, buffer(RESPONSE_SUFFIX)?))
    }

    /// Name of the shared memory.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The semaphore posted once for each frame written.
    pub(super) fn written_semaphore(&self) -> String {
        format!("sem-w-{}", self.0)
    }

    /// The semaphore posted once for each frame released.
    pub(super) fn released_semaphore(&self) -> String {
        format!("sem-r-{}", self.0)
    }

    /// Name of the lock files.
    pub(super) fn lock_file(&self) -> String {
        format!("{}.lock", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_file_names_with_room_for_what_is_added() {
        for name in ["a", "camera 1", "über", &"x".repeat(245), ".hidden"] {
            assert!(BufferName::new(name).is_ok(), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a\0b",
            "a\n",
            "sem.x",
            &"x".repeat(246),
        ] {
            assert!(BufferName::new(name).is_err(), "{name}");
        }
        let longest = "x".repeat(236);
        let (request, response) = BufferName::of_channel(&longest).expect("236 bytes");
        assert!(BufferName::of_channel(&"x".repeat(237)).is_err());
        assert_eq!(response.as_str().len(), 245);
        for name in [request, response] {
            assert!(format!("sem.{}", name.written_semaphore()).len() <= 255);
            assert!(name.lock_file().len() <= 255);
        }
    }

    #[test]
    fn blocks_are_whole_and_checked_against_the_memory() {
        let blocks = Blocks::for_sizes(1, 65).expect("small ones");
        assert_eq!((blocks.metadata, blocks.payload), (64, 128));
        assert_eq!(
            (blocks.total(), blocks.ring(), blocks.max_frame()),
            (Some(320), 192, 112)
        );
        for (metadata, payload) in [
            (0, 1),
            (1, 0),
            (u64::MAX, 1),
            (1, u64::MAX),
            (1 << 62, 1 << 62),
        ] {
            assert!(Blocks::for_sizes(metadata, payload).is_err());
        }
        let good = Oieb {
            size: 128,
            version: VERSION,
            metadata_size: 64,
            payload_size: 128,
            ..Oieb::default()
        };
        assert_eq!(Blocks::of(&good, 320).expect("whole"), blocks);
        for bad in [
            Oieb { size: 88, ..good },
            Oieb {
                version: [2, 0, 0, 0],
                ..good
            },
            Oieb {
                metadata_size: 0,
                ..good
            },
            Oieb {
                metadata_size: 63,
                ..good
            },
            Oieb {
                payload_size: 0,
                ..good
            },
            Oieb {
                payload_size: 129,
                ..good
            },
            Oieb {
                payload_size: 192,
                ..good
            },
            Oieb {
                payload_size: u64::MAX - 63,
                ..good
            },
            Oieb {
                metadata_size: u64::MAX - 63,
                ..good
            },
        ] {
            assert!(Blocks::of(&bad, 320).is_err(), "{bad:?}");
        }
    }
}
