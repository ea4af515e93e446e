//! The reply to a question for holes: runs, from the beginning of the range on; of a long
//! range only its beginning.
//!
//! ```text
//! bit 63     62                          0
//! | hole? |  bytes of the run, not 0     |     8 bytes each, little-endian
//! ```

/// Set where there is no memory.
const HOLE: u64 = 1 << 63;

/// Appends one run.
pub fn append_run(out: &mut Vec<u8>, len: u64, hole: bool) {
    let bits = len & !HOLE | if hole { HOLE } else { 0 };
    out.extend_from_slice(&bits.to_le_bytes());
}

/// The runs of a body: bytes, and whether they are a hole. Their sum is a peer's number.
pub fn runs(body: &[u8]) -> impl Iterator<Item = (u64, bool)> {
    let (words, _) = body.as_chunks::<8>();
    words.iter().map(|word| {
        let bits = u64::from_le_bytes(*word);
        (bits & !HOLE, bits & HOLE != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_back_as_they_were() {
        let all = [(1, true), (4096, false), ((1 << 63) - 1, true)];
        let mut body = Vec::new();
        for (len, hole) in all {
            append_run(&mut body, len, hole);
        }
        assert!(runs(&body).eq(all));
        assert_eq!(runs(&body[..15]).count(), 1, "half a run is none");
    }
}
