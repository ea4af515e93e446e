//! Shared words in lines of 128 bytes, for paths where a check per word is too
//! much: the table is checked once, when it is made.
//!
//! 128 bytes are two cache lines, which the prefetcher fetches as a pair.
#![allow(unsafe_code, reason = "references to words of shared memory")]

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::SharedMemory;
use crate::sys::map::Mapping;
use crate::units::{OutOfRange, checked_range};

/// Words in a line.
const WORDS: usize = 16;

/// Sixteen words that are accessed by atomics only.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct Line(pub [AtomicU64; WORDS]);

const _: () = assert!(size_of::<Line>() == 128);

impl Line {
    /// Asks for the first half of the line, which will be read soon.
    #[inline]
    pub fn prefetch(&self) {
        self.prefetch_word(0);
    }

    /// Asks for the second half of the line, while the first is on its way.
    #[inline]
    pub fn prefetch_second_half(&self) {
        self.prefetch_word(WORDS / 2);
    }

    #[inline]
    fn prefetch_word(&self, word: usize) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: required: nothing; a prefetch of any address has no effect that
        // a program can observe, and this one is mapped.
        unsafe {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.0[word].as_ptr().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = word;
    }
}

/// Asks for the first `most` cache lines that `words` lie in, to be written soon: the
/// other side's copies go, in one transfer for reading and writing.
#[inline]
pub fn prefetch_to_write(words: &[AtomicU64], most: usize) {
    for word in words.iter().step_by(WORDS / 2).take(most) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: required: nothing; as for `Line::prefetch_word`. 64-bit processors that
        // do not know the instruction take it for none. Written out, since the
        // compiler's hint of that name becomes one for reading.
        unsafe {
            core::arch::asm!(
                "prefetchw [{}]",
                in(reg) word.as_ptr(),
                options(nostack, preserves_flags, readonly),
            );
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = word;
    }
}

/// The high half of a word, as the kernel's futex calls want it. Only the kernel
/// and comparisons against it look through this reference.
#[inline]
pub fn high_half(word: &AtomicU64) -> &AtomicU32 {
    let at = word.as_ptr().cast::<u32>();
    let half = usize::from(cfg!(target_endian = "little"));
    // SAFETY: required: an aligned u32 that lives as long as the reference and is
    // accessed by atomics only. It is half of an aligned u64 that is borrowed for
    // as long and of which only atomic accesses are made.
    unsafe { AtomicU32::from_ptr(at.add(half)) }
}

/// A table of lines in shared memory, which it keeps mapped.
#[derive(Clone, Debug)]
pub struct Lines {
    first: NonNull<Line>,
    count: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: required: the object may be used from any thread. It hands out shared
// references to atomics only, and the mapping it keeps is `Send` and `Sync`.
unsafe impl Send for Lines {}
// SAFETY: as for `Send`.
unsafe impl Sync for Lines {}

impl Lines {
    /// The `count` lines at `offset` of `memory`, which has to be writable if
    /// anything is ever stored to them.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the memory or `offset` is not a
    /// multiple of 128.
    pub fn new(memory: &SharedMemory, offset: u64, count: usize) -> Result<Lines, OutOfRange> {
        let out_of_range = OutOfRange {
            offset,
            len: count as u64,
            size: memory.len(),
        };
        let len = (count as u64)
            .checked_mul(size_of::<Line>() as u64)
            .ok_or(out_of_range)?;
        let range = checked_range(offset, len, memory.len())?;
        if !offset.is_multiple_of(align_of::<Line>() as u64) {
            return Err(out_of_range);
        }
        // SAFETY: required: the result lies within the mapping; just checked.
        let first = unsafe { memory.as_ptr().add(range.start as usize) };
        Ok(Lines {
            first: NonNull::new(first.cast()).ok_or(out_of_range)?,
            count,
            _mapping: memory.mapping().clone(),
        })
    }

    /// Number of lines.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The line at `index`.
    ///
    /// # Panics
    /// If there is none.
    #[inline]
    pub fn line(&self, index: usize) -> &Line {
        assert!(index < self.count, "line {index} of {}", self.count);
        // SAFETY: required: `count` aligned lines from `first` on, mapped for as
        // long as the reference, accessed by atomics only. `new` checked range and
        // alignment (a mapping starts at a page), `_mapping` keeps them mapped,
        // and copies that others make of them count as another process's accesses.
        unsafe { self.first.add(index).as_ref() }
    }

    /// The line at `index` as an object that keeps it mapped, for paths where even
    /// looking it up is too much.
    ///
    /// # Panics
    /// If there is none.
    pub fn keep(&self, index: usize) -> KeptLine {
        KeptLine {
            line: NonNull::from(self.line(index)),
            _mapping: self._mapping.clone(),
        }
    }

    /// The word at `index`, counted through all lines.
    ///
    /// # Panics
    /// If there is none.
    #[inline]
    pub fn word(&self, index: usize) -> &AtomicU64 {
        &self.line(index / WORDS).0[index % WORDS]
    }
}

/// One line of a table, which it keeps mapped.
#[derive(Clone, Debug)]
pub struct KeptLine {
    line: NonNull<Line>,
    _mapping: Arc<Mapping>,
}

// SAFETY: required: the object may be used from any thread. It hands out shared
// references to atomics only, and the mapping it keeps is `Send` and `Sync`.
unsafe impl Send for KeptLine {}
// SAFETY: as for `Send`.
unsafe impl Sync for KeptLine {}

impl Deref for KeptLine {
    type Target = Line;

    #[inline]
    fn deref(&self) -> &Line {
        // SAFETY: required: a line that is mapped for as long as the reference and
        // accessed by atomics only. `Lines::keep` took it from a table, and
        // `_mapping` keeps it mapped.
        unsafe { self.line.as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::Access;
    use crate::sys::memfd;
    use crate::units::PAGE_SIZE;
    use std::sync::atomic::Ordering;

    fn memory() -> SharedMemory {
        let fd = memfd::create("lines", PAGE_SIZE).expect("memfd");
        SharedMemory::new(Mapping::shared(fd, PAGE_SIZE, Access::ReadWrite).expect("map"))
    }

    #[test]
    fn lines_are_the_words_of_the_memory() {
        let memory = memory();
        let lines = Lines::new(&memory, 128, 2).expect("lines");
        lines.word(17).store(7 << 32 | 5, Ordering::Relaxed);
        lines.line(1).prefetch_second_half();
        let kept = lines.keep(1);
        kept.0[2].store(9, Ordering::Relaxed);
        assert_eq!(lines.word(18).load(Ordering::Relaxed), 9);
        assert_eq!(memory.load::<u64>(256 + 8), Ok(7 << 32 | 5));
        assert_eq!(high_half(lines.word(17)).load(Ordering::Relaxed), 7);
        for (offset, count) in [(64, 1), (4096, 1), (0, 33), (128, usize::MAX)] {
            assert!(Lines::new(&memory, offset, count).is_err(), "{offset}");
        }
    }

    #[test]
    #[should_panic(expected = "line 2 of 2")]
    fn a_line_beyond_the_table_is_a_mistake() {
        let memory = memory();
        let lines = Lines::new(&memory, 128, 2).expect("lines");
        let _ = lines.line(2);
    }
}
