//! The recorded change: step `n` of pattern `seed` stores the same bytes at the same
//! places whoever asks, so that what has to be there can be computed anew.

use std::ops::Range;

/// One store of a step.
pub(crate) struct Store {
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Store {
    pub(crate) fn range(&self) -> Range<usize> {
        self.offset as usize..self.offset as usize + self.bytes.len()
    }
}

/// A generator of numbers that are the same everywhere (splitmix64).
#[derive(Clone)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to `end`, without it.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// The stores of one step: mostly a few small fields far apart, sometimes a burst
/// over several pages, rarely a long rewrite.
pub(crate) fn step(seed: u64, number: u64, size: u64) -> Vec<Store> {
    let mut numbers = Numbers::new(seed ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93));
    let (stores, longest) = match number % 64 {
        63 => (1, 128 * 1024),
        15 | 31 | 47 => (1, 12 * 1024),
        _ => (1 + numbers.below(6), 48),
    };
    (0..stores)
        .map(|_| {
            let len = (1 + numbers.below(longest)).min(size);
            let offset = numbers.below(size - len + 1);
            Store {
                offset,
                bytes: numbers.bytes(len as usize),
            }
        })
        .collect()
}

/// Applies steps to a model of the region.
pub(crate) fn apply(model: &mut [u8], seed: u64, steps: Range<u64>) {
    for number in steps {
        for store in step(seed, number, model.len() as u64) {
            model[store.range()].copy_from_slice(&store.bytes);
        }
    }
}

/// What one page adds to the sum that stands for a whole region's content: pages
/// that change are exchanged in the sum without looking at the others.
pub(crate) fn page_sum(page: u64, bytes: &[u8]) -> u128 {
    let digest = u128::from_le_bytes(uffd_sync::checksum::digest(bytes));
    digest.wrapping_mul(u128::from(page) * 2 + 1)
}

/// The sum over all pages.
pub(crate) fn content_sum(bytes: &[u8]) -> u128 {
    let pages = bytes.chunks(PAGE).enumerate();
    pages.fold(0, |sum, (page, bytes)| {
        sum.wrapping_add(page_sum(page as u64, bytes))
    })
}

/// Bytes in a page.
pub(crate) const PAGE: usize = 4096;
