//! The byte diff of a page against its twin.
//!
//! Which blocks of 64 bytes differ is known first (where the page was copied they were
//! compared in the same pass), so that equal data costs what a comparison of memory
//! costs. The changed 8-byte words of the others are counted, so that data that
//! changed altogether is one range at once. Else the changed blocks are looked at
//! again, from the cache, word by word; the ends of a run are exact to the byte.

use std::ops::Range;

use super::PAGE;
use crate::shm::BLOCK;

/// Equal bytes between two changed runs up to which they count as one: an extent
/// of its own costs 12 bytes on the wire and a step of the applier.
pub const DIFF_GAP: usize = 16;

const WORD: usize = 8;

/// Appends where `new` differs from `old` to `out`, as ascending ranges.
///
/// `base` is the offset of the two slices' first byte and is added to each range.
/// Runs with at most `gap` equal bytes between them are one range; a run that
/// begins within `gap` behind the last range of `out` extends it, so the pages of
/// a region can be given one after the other. If more than half of the 8-byte
/// words changed, the whole slice is one range.
///
/// # Panics
/// If the slices differ in length, or are longer than a page.
pub fn diff(old: &[u8], new: &[u8], base: u64, gap: usize, out: &mut Vec<Range<u64>>) {
    diff_blocks(old, new, changed_blocks(old, new), base, gap, out);
}

/// Which blocks of [`BLOCK`] bytes differ, the last of which may be shorter: bit `i`
/// for block `i`.
///
/// # Panics
/// As for [`diff`].
pub(super) fn changed_blocks(old: &[u8], new: &[u8]) -> u64 {
    assert_eq!(old.len(), new.len(), "a diff compares equal lengths");
    assert!(old.len() <= PAGE, "a diff compares a page at most");
    let (old_blocks, old_rest) = old.as_chunks::<BLOCK>();
    let (new_blocks, new_rest) = new.as_chunks::<BLOCK>();
    let mut changed = 0;
    for (block, (a, b)) in old_blocks.iter().zip(new_blocks).enumerate() {
        changed |= u64::from(a != b) << block;
    }
    if old_rest != new_rest {
        changed |= 1 << old_blocks.len();
    }
    changed
}

/// As [`diff`], of slices that differ in `blocks` at most.
pub(super) fn diff_blocks(
    old: &[u8],
    new: &[u8],
    blocks: u64,
    base: u64,
    gap: usize,
    out: &mut Vec<Range<u64>>,
) {
    if blocks == 0 {
        return;
    }
    let mut runs = Runs {
        base,
        gap: gap as u64,
        out,
    };
    let most = old.len().div_ceil(WORD) / 2;
    let mut changed = 0;
    for at in starts(blocks) {
        let end = new.len().min(at + BLOCK);
        changed += changed_words(&old[at..end], &new[at..end]);
        if changed > most {
            return runs.push(0, new.len());
        }
    }
    for at in starts(blocks) {
        let end = new.len().min(at + BLOCK);
        block_runs(&old[at..end], &new[at..end], at, gap, &mut runs);
    }
}

/// Where the blocks begin whose bits are set.
fn starts(mut blocks: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let block = (blocks != 0).then(|| blocks.trailing_zeros() as usize)?;
        blocks &= blocks - 1;
        Some(block * BLOCK)
    })
}

/// How many words differ, a rest of less than a word counted as one.
fn changed_words(old: &[u8], new: &[u8]) -> usize {
    let (old_words, old_rest) = old.as_chunks::<WORD>();
    let (new_words, new_rest) = new.as_chunks::<WORD>();
    let words = old_words.iter().zip(new_words);
    words.filter(|(a, b)| a != b).count() + usize::from(old_rest != new_rest)
}

/// Adds the runs of one block that begins at `at`.
fn block_runs(old: &[u8], new: &[u8], at: usize, gap: usize, runs: &mut Runs<'_>) {
    let (old_words, old_rest) = old.as_chunks::<WORD>();
    let (new_words, new_rest) = new.as_chunks::<WORD>();
    for (index, (a, b)) in old_words.iter().zip(new_words).enumerate() {
        let difference = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if difference == 0 {
            continue;
        }
        let start = at + index * WORD;
        if gap >= WORD - 2 {
            // No gap inside a word is wider than this, so the word is one run.
            let first = difference.trailing_zeros() as usize / 8;
            let last = WORD - 1 - difference.leading_zeros() as usize / 8;
            runs.push(start + first, start + last + 1);
        } else {
            changed_bytes(a, b, start, runs);
        }
    }
    changed_bytes(old_rest, new_rest, at + old_words.len() * WORD, runs);
}

fn changed_bytes(old: &[u8], new: &[u8], at: usize, runs: &mut Runs<'_>) {
    for (index, (a, b)) in old.iter().zip(new).enumerate() {
        if a != b {
            runs.push(at + index, at + index + 1);
        }
    }
}

/// The list under construction.
struct Runs<'a> {
    base: u64,
    gap: u64,
    out: &'a mut Vec<Range<u64>>,
}

impl Runs<'_> {
    fn push(&mut self, start: usize, end: usize) {
        let (start, end) = (self.base + start as u64, self.base + end as u64);
        match self.out.last_mut() {
            Some(last) if last.end <= start && start - last.end <= self.gap => last.end = end,
            _ => self.out.push(start..end),
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of length one"
)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Byte by byte, straight from the definition.
    fn naive(old: &[u8], new: &[u8], base: u64, gap: u64) -> Vec<Range<u64>> {
        let words = |s: &[u8]| s.chunks(8).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let (a, b) = (words(old), words(new));
        let changed = a.iter().zip(&b).filter(|(a, b)| a != b).count();
        if changed > a.len() / 2 {
            return vec![base..base + new.len() as u64];
        }
        let mut out: Vec<Range<u64>> = Vec::new();
        for i in (0..new.len()).filter(|i| old[*i] != new[*i]) {
            let at = base + i as u64;
            match out.last_mut() {
                Some(last) if at - last.end <= gap => last.end = at + 1,
                _ => out.push(at..at + 1),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            old in proptest::collection::vec(0u8..3, 0..600),
            edits in proptest::collection::vec((0usize..600, 1usize..40), 0..12),
            gap in 0usize..24,
            base in 0u64..10_000,
        ) {
            let mut new = old.clone();
            for (at, run) in edits {
                for byte in new.iter_mut().skip(at).take(run) {
                    *byte ^= 1;
                }
            }
            let mut out = Vec::new();
            diff(&old, &new, base, gap, &mut out);
            prop_assert_eq!(out, naive(&old, &new, base, gap as u64));
        }
    }

    #[test]
    fn a_run_over_two_slices_is_one_range() {
        let (old, mut new) = ([0u8; 256], [0u8; 256]);
        new[120..136].fill(1);
        let mut out = vec![0..4];
        diff(&old[..128], &new[..128], 0, DIFF_GAP, &mut out);
        diff(&old[128..], &new[128..], 128, DIFF_GAP, &mut out);
        assert_eq!(out, [0..4, 120..136]);
    }

    #[test]
    fn a_page_sent_whole_extends_a_range_that_is_near() {
        let (old, new) = ([0u8; 128], [1u8; 128]);
        let mut out = vec![0..4, 4000..4090];
        diff(&old, &new, 4096, DIFF_GAP, &mut out);
        assert_eq!(out, [0..4, 4000..4224]);
        let mut far = vec![0..4];
        diff(&old, &new, 4096, DIFF_GAP, &mut far);
        assert_eq!(far, [0..4, 4096..4224]);
    }

    #[test]
    fn a_page_mostly_changed_is_one_range() {
        let (old, mut new) = (vec![0u8; 4096], vec![0u8; 4096]);
        for word in new.chunks_mut(8).skip(1).step_by(2) {
            word[3] = 9;
        }
        let mut out = Vec::new();
        diff(&old, &new, 0, 0, &mut out);
        assert_eq!(out.len(), 256, "half of the words is not more than half");
        new[0] = 1;
        out.clear();
        diff(&old, &new, 0, 0, &mut out);
        assert_eq!(out, [0..4096]);
    }
}
