//! A fixed-size set of small numbers (pages, chunks), one bit each.

use std::ops::Range;

/// A set of numbers below a length fixed at creation.
///
/// Memory: `len / 8` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    len: u64,
    ones: u64,
}

impl Bitmap {
    /// An empty set of numbers below `len`.
    pub fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).expect("a bitmap fits in the address space");
        Self {
            words: vec![0; words],
            len,
            ones: 0,
        }
    }

    /// Raises the bound to `len`; a lower one changes nothing.
    pub fn grow(&mut self, len: u64) {
        if len > self.len {
            let words = usize::try_from(len.div_ceil(64));
            self.words
                .resize(words.expect("a bitmap fits in the address space"), 0);
            self.len = len;
        }
    }

    /// The bound that all members lie below.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no number is a member.
    pub fn is_empty(&self) -> bool {
        self.ones == 0
    }

    /// How many numbers are members.
    pub fn count(&self) -> u64 {
        self.ones
    }

    /// Whether `bit` is a member; numbers beyond the bound are not.
    pub fn contains(&self, bit: u64) -> bool {
        bit < self.len && self.words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
    }

    /// Adds `bit`; true if it was not a member before.
    ///
    /// # Panics
    /// If `bit` is not below [`Bitmap::len`].
    pub fn insert(&mut self, bit: u64) -> bool {
        assert!(bit < self.len, "bit {bit} beyond a bitmap of {}", self.len);
        let word = &mut self.words[(bit / 64) as usize];
        let fresh = *word >> (bit % 64) & 1 == 0;
        *word |= 1 << (bit % 64);
        self.ones += u64::from(fresh);
        fresh
    }

    /// Adds all of `bits`.
    ///
    /// # Panics
    /// If the range ends beyond [`Bitmap::len`].
    pub fn insert_range(&mut self, bits: Range<u64>) {
        assert!(
            bits.end <= self.len,
            "range ends at {} beyond a bitmap of {}",
            bits.end,
            self.len
        );
        let mut at = bits.start;
        while at < bits.end {
            let end = bits.end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
            let word = &mut self.words[(at / 64) as usize];
            self.ones += u64::from((mask & !*word).count_ones());
            *word |= mask;
            at = end;
        }
    }

    /// Removes `bit`; true if it was a member.
    pub fn remove(&mut self, bit: u64) -> bool {
        let was = self.contains(bit);
        if was {
            self.words[(bit / 64) as usize] &= !(1 << (bit % 64));
            self.ones -= 1;
        }
        was
    }

    /// Removes all members.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.ones = 0;
    }

    /// Adds every member of `other`.
    ///
    /// # Panics
    /// If the two bounds differ.
    pub fn union(&mut self, other: &Bitmap) {
        assert_eq!(self.len, other.len, "bitmaps of different length");
        self.ones = 0;
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
            self.ones += u64::from(a.count_ones());
        }
    }

    /// The first member at or after `from`.
    pub fn next(&self, from: u64) -> Option<u64> {
        self.find(from..self.len, false)
    }

    /// The first member of `bits`, looking no further than its end.
    pub fn next_in(&self, bits: Range<u64>) -> Option<u64> {
        self.find(bits, false)
    }

    /// The first run of adjacent members that begins at or after `from`.
    pub fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.find(from..self.len, false)?;
        Some(start..self.find(start..self.len, true).unwrap_or(self.len))
    }

    /// All runs of adjacent members, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from)?;
            from = run.end;
            Some(run)
        })
    }

    fn find(&self, bits: Range<u64>, inverted: bool) -> Option<u64> {
        let end = bits.end.min(self.len);
        if bits.start >= end {
            return None;
        }
        let flip = if inverted { u64::MAX } else { 0 };
        let (first, last) = ((bits.start / 64) as usize, ((end - 1) / 64) as usize);
        let mask = u64::MAX << (bits.start % 64);
        let mut word = (self.words[first] ^ flip) & mask;
        let mut index = first;
        while word == 0 {
            if index == last {
                return None;
            }
            index += 1;
            word = self.words[index] ^ flip;
        }
        let bit = index as u64 * 64 + u64::from(word.trailing_zeros());
        (bit < end).then_some(bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_like_a_vector_of_bools(
            len in 1u64..300,
            ops in proptest::collection::vec((0u8..3, 0u64..300, 0u64..80), 0..60),
        ) {
            let mut bitmap = Bitmap::new(len);
            let mut model = vec![false; len as usize];
            for (op, at, run) in ops {
                let at = at % len;
                match op {
                    0 => prop_assert_eq!(bitmap.insert(at), !std::mem::replace(&mut model[at as usize], true)),
                    1 => prop_assert_eq!(bitmap.remove(at), std::mem::replace(&mut model[at as usize], false)),
                    _ => {
                        let end = (at + run).min(len);
                        bitmap.insert_range(at..end);
                        model[at as usize..end as usize].fill(true);
                    }
                }
                prop_assert_eq!(bitmap.count(), model.iter().filter(|b| **b).count() as u64);
            }
            let members: Vec<u64> = bitmap.runs().flatten().collect();
            let expected: Vec<u64> = (0..len).filter(|i| model[*i as usize]).collect();
            prop_assert_eq!(&members, &expected);
            for (start, end) in [(0, len), (len / 3, len / 2), (len / 2, len + 70), (len, 0)] {
                let within = expected.iter().copied().find(|bit| (start..end).contains(bit));
                prop_assert_eq!(bitmap.next_in(start..end), within);
            }
        }
    }
}
