//! The two checksums: CRC-32C for what a wire may flip, BLAKE3 for what decides
//! whether bytes are sent at all.

use std::sync::LazyLock;

use crate::limits::DIGEST_CHUNK;

/// A 128-bit digest of content, the first half of its BLAKE3 hash.
pub type Digest = [u8; 16];

/// CRC-32C (Castagnoli, as in iSCSI, RFC 3720) of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    // The algorithm yields 32 bits in a u64.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// CRC-32C of bytes that come in pieces.
#[derive(Clone, Copy, Debug)]
pub struct Crc32c(crc_fast::Digest);

impl Crc32c {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))
    }

    /// Goes on with `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all of them.
    pub fn value(&self) -> u32 {
        self.0.finalize() as u32
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

/// The 128-bit digest of `bytes`.
pub fn digest(bytes: &[u8]) -> Digest {
    let hash = blake3::hash(bytes);
    let mut digest = [0; 16];
    digest.copy_from_slice(&hash.as_bytes()[..16]);
    digest
}

/// The digest of `len` zero bytes: that of a hole, which need not be read.
pub fn digest_of_zeros(len: u64) -> Digest {
    static CHUNK: LazyLock<Digest> = LazyLock::new(|| digest(&[0; DIGEST_CHUNK as usize]));
    if len == DIGEST_CHUNK {
        *CHUNK
    } else {
        digest(&vec![0; len as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_values_of_the_specifications() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        let mut pieces = Crc32c::new();
        for piece in [&b"1234"[..], b"", b"56789"] {
            pieces.update(piece);
        }
        assert_eq!(pieces.value(), 0xE306_9283);
        // The first half of the BLAKE3 hash of the empty input.
        assert_eq!(digest(b"")[..4], [0xAF, 0x13, 0x49, 0xB9]);
    }
}
