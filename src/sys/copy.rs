//! Copies that leave the caches alone.
#![allow(unsafe_code, reason = "non-temporal stores are intrinsics")]

/// Copies shorter than this are not worth the fence behind them, in bytes.
const LEAST: usize = 4096;

/// Copies `src` to `dst` past the caches, for data that is far larger than they are: the
/// destination is not read into them first, which saves a third of the memory's
/// traffic. The stores are complete when it returns.
///
/// # Panics
/// If the lengths differ.
pub fn stream(dst: &mut [u8], src: &[u8]) {
    assert_eq!(dst.len(), src.len(), "a copy has one length");
    #[cfg(target_arch = "x86_64")]
    if src.len() >= LEAST {
        let head = dst.as_ptr().align_offset(BLOCK).min(dst.len());
        let body = (dst.len() - head) / BLOCK * BLOCK;
        dst[..head].copy_from_slice(&src[..head]);
        let (end, rest) = (&mut dst[head..], &src[head..]);
        stream_blocks(&mut end[..body], &rest[..body]);
        end[body..].copy_from_slice(&rest[body..]);
        return;
    }
    dst.copy_from_slice(src);
}

/// Bytes stored at once: a cache line.
#[cfg(target_arch = "x86_64")]
const BLOCK: usize = 64;

/// `dst` begins at a multiple of `BLOCK`, and both are whole blocks of one length.
#[cfg(target_arch = "x86_64")]
fn stream_blocks(dst: &mut [u8], src: &[u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    assert!(dst.as_ptr().addr().is_multiple_of(BLOCK) && dst.len() == src.len());
    for (to, from) in dst.chunks_exact_mut(BLOCK).zip(src.chunks_exact(BLOCK)) {
        let (to, from) = (to.as_mut_ptr(), from.as_ptr());
        // SAFETY: required: 64 readable bytes at `from`, 64 writable ones at `to`, which is
        // aligned to 16, and SSE2. Both are chunks of that length; `dst` is aligned to
        // 64 (asserted) and so is each of its chunks; x86-64 has SSE2.
        unsafe {
            let (to, from) = (to.cast::<__m128i>(), from.cast::<__m128i>());
            let block = [
                _mm_loadu_si128(from),
                _mm_loadu_si128(from.add(1)),
                _mm_loadu_si128(from.add(2)),
                _mm_loadu_si128(from.add(3)),
            ];
            for (index, part) in block.into_iter().enumerate() {
                _mm_stream_si128(to.add(index), part);
            }
        }
    }
    // SAFETY: required: SSE. x86-64 has it. Non-temporal stores are ordered by a fence
    // only: what is published after this call must not be seen before them.
    unsafe { _mm_sfence() };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_any_place_and_length_are_exact() {
        let src: Vec<u8> = (0..20_000u32).map(|i| ((i * 7) >> 2) as u8).collect();
        for (at, from, len) in [
            (0, 0, 20_000 - 64),
            (1, 0, LEAST),
            (63, 12, LEAST + 63),
            (17, 5, 9_999),
            (3, 3, LEAST - 1),
            (0, 9, 0),
        ] {
            let mut dst = vec![0xAA; 20_100];
            stream(&mut dst[at..at + len], &src[from..from + len]);
            assert_eq!(dst[at..at + len], src[from..from + len]);
            assert!(
                dst[..at]
                    .iter()
                    .chain(&dst[at + len..])
                    .all(|byte| *byte == 0xAA)
            );
        }
    }
}
