//! Two-buffer channels, byte for byte those of ZeroBuffer version 1.
//!
//! A **buffer** is a ring of frames in named shared memory. Its [`Reader`] makes and
//! owns it; one [`Writer`] at a time joins it. A **duplex channel** is two of them:
//! `<channel>_request`, owned by the [`DuplexServer`], and `<channel>_response`, owned
//! by the [`DuplexClient`].
//!
//! ```text
//! /dev/shm/NAME                        all numbers little-endian
//! 0x00 u32 128 | 4 x u8 version 1 0 0 0
//! 0x08 u64 metadata_size        0x10 u64 metadata_free_bytes
//! 0x18 u64 metadata_written_bytes
//! 0x20 u64 payload_size         0x28 u64 payload_free_bytes    (atomic add and subtract)
//! 0x30 u64 payload_write_pos    0x38 u64 payload_read_pos      (moves when a frame is read)
//! 0x40 u64 payload_written_count 0x48 u64 payload_read_count   (frames and wrap markers)
//! 0x50 u64 writer_pid           0x58 u64 reader_pid            (stored last)
//! 0x60 4 x u64 reserved
//! 0x80 u64 length, metadata ...                                metadata_size bytes
//!      ring of frames                                          payload_size bytes
//!
//! frame    u64 size | u64 sequence, from 1 | size bytes        packed, not aligned
//! marker   u64 0    | u64 0          the next frame stands at the ring's beginning
//!
//! /dev/shm/sem.sem-w-NAME   posted once for each frame written (none for a marker)
//! /dev/shm/sem.sem-r-NAME   posted once for each frame released
//! /tmp/zerobuffer/NAME.lock, <temporary folder>/zerobuffer/locks/NAME.lock
//!                           locked by the reader for life (`flock`)
//! ```
//! The semaphores are glibc's ([`crate::shm::Semaphore`]).
//!
//! # Order of things
//! * A writer stores header and data, then its position, then takes the free bytes
//!   (release), then counts, then posts. A reader knows by the free bytes (acquire)
//!   how much there is; a post only wakes it. A post that was lost with its writer,
//!   or one too many, does no harm.
//! * A reader moves its position when it reads; free bytes grow when a frame is
//!   released, strictly in the order of reading ([`Frame`]).
//! * A writer that finds the ring empty and its frame too large for what is left
//!   behind its position sets both positions to 0. So every frame of up to
//!   `payload_size - 16` bytes gets through.
//!
//! # What differs from other implementations, within the format
//! * A frame is refused at once only if it never fits.
//! * Tails of 1 to 15 bytes, which no reader can see a marker in, are not left.
//! * A new writer goes on with its predecessor's numbers; a reader accepts that, and
//!   a beginning at 1.
//! * A peer is known by a descriptor of its process: a number given to another
//!   process is not taken for it.
//! * The object's mode is 0600 unless [`BufferConfig::mode`] says otherwise.
//!
//! # Trust
//! Both processes can write all of the memory. What a peer stores is copied out and
//! checked before it is used; at worst an operation fails with
//! [`ZeroBufferError::Damaged`]. Named memory cannot be sealed: whoever may write it
//! may truncate it, and the next access is then a `SIGBUS`.

pub mod duplex;
mod error;
mod layout;
mod reader;
mod ring;
#[cfg(test)]
mod ring_tests;
mod segment;
#[cfg(test)]
mod tests;
mod wait;
mod writer;

pub use duplex::{
    ClientOptions, DuplexClient, DuplexServer, HandlerError, Reply, Response, ServerOptions,
};
pub use error::{Gone, Refusal, Side, ZeroBufferError};
pub use reader::{Frame, Reader, Stopper};
pub use ring::Damage;
pub use wait::Wait;
pub use writer::{Reserved, Writer};

use crate::units::{KIB, MIB};

/// What a buffer is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferConfig {
    /// Bytes for metadata with its length of 8 bytes, rounded up to 64. At least 1.
    pub metadata_bytes: u64,
    /// Bytes of the ring, rounded up to 64; each frame takes 16 more than its data.
    /// At least 1.
    pub payload_bytes: u64,
    /// Who may open it, as for `chmod`. Default 0600; other implementations make 0666.
    pub mode: u32,
    /// Whether its memory is taken when it is made. Without (the default is with),
    /// a full `/dev/shm` is a `SIGBUS` at the first store, not an error when it is
    /// made, and a large buffer costs nothing before it is used.
    pub reserve: bool,
    /// How its reader waits.
    pub wait: Wait,
}

impl BufferConfig {
    /// That many bytes of each, the rest by default.
    pub fn new(metadata_bytes: u64, payload_bytes: u64) -> BufferConfig {
        BufferConfig {
            metadata_bytes,
            payload_bytes,
            ..BufferConfig::default()
        }
    }
}

impl Default for BufferConfig {
    /// 1 KiB of metadata and 1 MiB of payload.
    fn default() -> BufferConfig {
        BufferConfig {
            metadata_bytes: KIB,
            payload_bytes: MIB,
            mode: 0o600,
            reserve: true,
            wait: Wait::default(),
        }
    }
}
