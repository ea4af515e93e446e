//! Shared memory by copies and atomics.
#![allow(
    unsafe_code,
    reason = "copies from and to memory that other processes may write"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::sys::map::{Access, Mapping};
use crate::units::{OutOfRange, PAGE_SIZE, checked_range};

/// A write that was refused; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// It does not lie within the memory.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The memory is mapped for reading only.
    #[error("write at offset {offset} to memory that is mapped for reading only")]
    ReadOnly {
        /// First byte that was to be written.
        offset: u64,
    },
}

/// A mapping that other processes may write at any time. Clones share it; it is
/// unmapped with the last one.
///
/// A copy may mix bytes of before and after somebody's store; what is needed
/// whole is read under a [`super::seqlock`] or through an atomic.
#[derive(Clone, Debug)]
pub struct SharedMemory(Arc<Mapping>);

impl SharedMemory {
    /// All of `mapping`.
    pub fn new(mapping: Mapping) -> SharedMemory {
        SharedMemory(Arc::new(mapping))
    }

    /// The mapping underneath.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.0
    }

    /// Bytes, a multiple of the page size.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Never: an empty mapping cannot be made.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first byte, for those who know what they may do with it.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.as_ptr()
    }

    /// Copies `out.len()` bytes at `offset` into `out`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the memory.
    #[inline]
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let range = checked_range(offset, out.len() as u64, self.len())?;
        // SAFETY: required: `out.len()` readable bytes at the source, writable at
        // the target, not overlapping. The range was checked against the mapping,
        // which `self` keeps; a slice that is borrowed exclusively is never part
        // of it, since no slice is ever made of it.
        unsafe {
            copy_bytes(
                self.as_ptr().add(range.start as usize),
                out.as_mut_ptr(),
                out.len(),
            );
        }
        Ok(())
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`WriteError`] if they do not lie within the memory or it is read-only.
    #[inline]
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let range = checked_range(offset, bytes.len() as u64, self.len())?;
        if self.0.access() != Access::ReadWrite {
            return Err(WriteError::ReadOnly { offset });
        }
        // SAFETY: required: as for `read`, with the two sides changed over, and
        // the mapping writable, which was just checked.
        unsafe {
            copy_bytes(
                bytes.as_ptr(),
                self.as_ptr().add(range.start as usize),
                bytes.len(),
            );
        }
        Ok(())
    }

    /// A copy of the `T` at `offset`, which need not be aligned.
    ///
    /// # Errors
    /// [`OutOfRange`] if it does not lie within the memory.
    pub fn load<T: FromBytes>(&self, offset: u64) -> Result<T, OutOfRange> {
        let range = checked_range(offset, size_of::<T>() as u64, self.len())?;
        let mut value = std::mem::MaybeUninit::<T>::uninit();
        // SAFETY: required: as for `read`; the target is a local of `T`'s size.
        unsafe {
            copy_bytes(
                self.as_ptr().add(range.start as usize),
                value.as_mut_ptr().cast(),
                size_of::<T>(),
            );
        }
        // SAFETY: required: all bytes of the value are initialised and any bytes
        // are a `T`. They were just copied; `T: FromBytes`.
        Ok(unsafe { value.assume_init() })
    }

    /// Copies `value` to `offset`, which need not be aligned.
    ///
    /// # Errors
    /// As for [`SharedMemory::write`].
    pub fn store<T: IntoBytes + Immutable>(
        &self,
        offset: u64,
        value: &T,
    ) -> Result<(), WriteError> {
        self.write(offset, value.as_bytes())
    }

    /// The 32-bit word at `offset`, of a layout whose size was checked when the
    /// memory was opened. Storing to a word of read-only memory is a `SIGSEGV`.
    ///
    /// # Panics
    /// If it is misaligned or beyond the memory.
    #[inline]
    pub fn atomic_u32(&self, offset: u64) -> &AtomicU32 {
        match self.word::<4>(offset) {
            // SAFETY: required: an aligned u32 that lives as long as the reference,
            // accessed by atomics only. `word` checked it, and `copy_bytes`, which
            // others may use on it, counts as another process's access.
            Ok(word) => unsafe { AtomicU32::from_ptr(word.cast()) },
            Err(e) => panic!("a 32-bit word of a layout: {e}"),
        }
    }

    /// The 64-bit word at `offset`; otherwise as [`SharedMemory::atomic_u32`].
    ///
    /// # Panics
    /// If it is misaligned or beyond the memory.
    #[inline]
    pub fn atomic_u64(&self, offset: u64) -> &AtomicU64 {
        match self.checked_atomic_u64(offset) {
            Ok(word) => word,
            Err(e) => panic!("a 64-bit word of a layout: {e}"),
        }
    }

    /// The 64-bit word at an `offset` that comes from outside.
    ///
    /// # Errors
    /// [`OutOfRange`] if it is misaligned or beyond the memory.
    #[inline]
    pub fn checked_atomic_u64(&self, offset: u64) -> Result<&AtomicU64, OutOfRange> {
        let word = self.word::<8>(offset)?;
        // SAFETY: as for `atomic_u32`, with eight bytes.
        Ok(unsafe { AtomicU64::from_ptr(word.cast()) })
    }

    /// The `count` 64-bit words at an `offset` that comes from outside, of memory that
    /// is writable if anything is ever stored to them.
    ///
    /// # Errors
    /// [`OutOfRange`] if they are misaligned or beyond the memory.
    #[inline]
    pub fn checked_words(&self, offset: u64, count: usize) -> Result<&[AtomicU64], OutOfRange> {
        let out_of_range = OutOfRange {
            offset,
            len: count as u64,
            size: self.len(),
        };
        let len = (count as u64).checked_mul(8).ok_or(out_of_range)?;
        let range = checked_range(offset, len, self.len())?;
        if !offset.is_multiple_of(8) {
            return Err(out_of_range);
        }
        // SAFETY: required: `count` aligned words that live as long as the reference,
        // accessed by atomics only. Range and alignment were just checked (mappings
        // start at a page), `self` keeps the mapping, and `copy_bytes`, which others
        // may use on them, counts as another process's access.
        Ok(unsafe {
            let first = self.as_ptr().add(range.start as usize).cast::<AtomicU64>();
            std::slice::from_raw_parts(first, count)
        })
    }

    /// `N` bytes at `offset`, a multiple of `N`.
    #[inline]
    fn word<const N: u64>(&self, offset: u64) -> Result<*mut u8, OutOfRange> {
        let range = checked_range(offset, N, self.len())?;
        if !offset.is_multiple_of(N) {
            return Err(OutOfRange {
                offset,
                len: N,
                size: self.len(),
            });
        }
        // SAFETY: required: the result lies within the mapping; just checked.
        // Mappings start at a page, so a multiple of N is aligned to N.
        Ok(unsafe { self.as_ptr().add(range.start as usize) })
    }
}

/// Copies `len` bytes of which one side may be changed by others meanwhile.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes; they do not overlap.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    let ahead = to.addr().wrapping_sub(from.addr()) % PAGE_SIZE as usize;
    if len >= BLOCK && (1..BLOCK / 2).contains(&ahead) {
        // SAFETY: the caller's promise, and the length was just checked.
        return unsafe { copy_blocks(from, to, len) };
    }
    // SAFETY: required: what the caller promises. The instruction is opaque to
    // the compiler, so a concurrent store is no data race of the language: the
    // copy gets some bytes, which is all that is promised. The direction flag is
    // clear by the ABI.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Bytes that `copy_blocks` moves at once.
#[cfg(target_arch = "x86_64")]
const BLOCK: usize = 64;

/// `copy_bytes` by plain moves. Where the target lies 1 to 31 bytes behind the source,
/// counted modulo a page, some processors (Zen 3) take the string instruction's two sides
/// for overlapping ones and need 25 times as long.
///
/// # Safety
/// That of `copy_bytes`; `len` is at least `BLOCK`.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_blocks(from: *const u8, to: *mut u8, len: usize) {
    let block = |at: usize| {
        // SAFETY: required: `BLOCK` bytes from `at` on lie within `len`; the loop and the
        // last call below see to it. The rest is what the caller promises; opaque to the
        // compiler, as in `copy_bytes`.
        unsafe {
            core::arch::asm!(
                "movdqu {a}, [{from}]",
                "movdqu {b}, [{from} + 16]",
                "movdqu {c}, [{from} + 32]",
                "movdqu {d}, [{from} + 48]",
                "movdqu [{to}], {a}",
                "movdqu [{to} + 16], {b}",
                "movdqu [{to} + 32], {c}",
                "movdqu [{to} + 48], {d}",
                from = in(reg) from.add(at),
                to = in(reg) to.add(at),
                a = out(xmm_reg) _,
                b = out(xmm_reg) _,
                c = out(xmm_reg) _,
                d = out(xmm_reg) _,
                options(nostack, preserves_flags),
            );
        }
    };
    for at in (0..len - BLOCK).step_by(BLOCK) {
        block(at);
    }
    // The end, of which a part may be copied twice.
    block(len - BLOCK);
}

/// Copies `len` bytes of which one side may be changed by others meanwhile.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes; they do not overlap.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
    let together = (from as usize) % 8 == (to as usize) % 8;
    let mut at = 0;
    while at < len {
        // SAFETY: required: `at` and the seven bytes behind it lie within `len`
        // for a word, `at` for a byte, and words are aligned; the conditions say
        // so. The rest is what the caller promises; all accesses are atomic.
        unsafe {
            let (source, target) = (from.add(at).cast_mut(), to.add(at));
            if together && (target as usize) % 8 == 0 && len - at >= 8 {
                let word = AtomicU64::from_ptr(source.cast()).load(Relaxed);
                AtomicU64::from_ptr(target.cast()).store(word, Relaxed);
                at += 8;
            } else {
                let byte = AtomicU8::from_ptr(source).load(Relaxed);
                AtomicU8::from_ptr(target).store(byte, Relaxed);
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd;
    use proptest::prelude::*;
    use std::sync::atomic::Ordering;

    const LEN: u64 = 2 * PAGE_SIZE;

    fn memory(access: Access) -> SharedMemory {
        let fd = memfd::create("memory", LEN).expect("memfd");
        SharedMemory::new(Mapping::shared(fd, LEN, access).expect("map"))
    }

    #[test]
    fn two_mappings_see_the_same_bytes() {
        let fd = memfd::create("memory", LEN).expect("memfd");
        let [a, b] = [Access::ReadWrite, Access::ReadOnly]
            .map(|access| SharedMemory::new(Mapping::shared(&fd, LEN, access).expect("map")));
        a.write(4090, b"over the edge").expect("write");
        let mut out = [0; 13];
        b.read(4090, &mut out).expect("read");
        assert_eq!(&out, b"over the edge");
        a.store(17, &0x0123_4567_89AB_CDEF_u64).expect("store");
        assert_eq!(b.load::<u64>(17), Ok(0x0123_4567_89AB_CDEF));
        a.atomic_u64(64).store(9, Ordering::Release);
        assert_eq!(b.atomic_u64(64).load(Ordering::Acquire), 9);
        a.atomic_u32(72).store(4, Ordering::Release);
        assert_eq!(b.atomic_u32(72).load(Ordering::Acquire), 4);
        assert_eq!(b.write(5, b"x"), Err(WriteError::ReadOnly { offset: 5 }));
        assert!(b.write(LEN, b"x").is_err());
    }

    #[test]
    fn copies_to_any_place_of_a_page_are_exact() {
        let memory = memory(Access::ReadWrite);
        let bytes: Vec<u8> = (0..LEN).map(|at| (at * 7 / 3) as u8).collect();
        let mut out = vec![0; 2 * LEN as usize];
        let page = out.as_ptr().align_offset(PAGE_SIZE as usize);
        for ahead in [0, 1, 15, 31, 32, 33] {
            for len in [0, 63, 64, 65, 127, 128, 129, 1000, 4096, 5000] {
                memory.write(0, &vec![0; LEN as usize]).expect("written");
                out.fill(0xAA);
                let from = &bytes[page % 64..][..len];
                memory.write(ahead as u64, from).expect("written");
                let to = page + 2 * ahead;
                memory
                    .read(ahead as u64, &mut out[to..to + len])
                    .expect("read");
                assert_eq!(&out[to..to + len], from, "{ahead} {len}");
                let around = out[..to].iter().chain(&out[to + len..]);
                assert!(around.copied().all(|byte| byte == 0xAA), "{ahead} {len}");
                let behind = memory.load::<u8>((ahead + len) as u64);
                assert_eq!(behind, Ok(0), "{ahead} {len}");
            }
        }
    }

    #[test]
    fn words_from_outside_are_checked() {
        let memory = memory(Access::ReadOnly);
        assert!(memory.checked_atomic_u64(LEN - 8).is_ok());
        for offset in [4, LEN - 4, LEN, u64::MAX, u64::MAX - 7] {
            assert!(memory.checked_atomic_u64(offset).is_err(), "{offset}");
        }
    }

    #[test]
    fn runs_of_words_are_checked_too() {
        let memory = memory(Access::ReadWrite);
        let words = memory.checked_words(LEN - 24, 3).expect("the last three");
        words[2].store(7, Ordering::Relaxed);
        assert_eq!(memory.load::<u64>(LEN - 8), Ok(7));
        crate::shm::prefetch_to_write(words, 9);
        assert!(memory.checked_words(LEN, 0).is_ok_and(<[_]>::is_empty));
        for (offset, count) in [(4, 1), (LEN - 8, 2), (LEN + 8, 0), (u64::MAX - 7, 1)] {
            assert!(memory.checked_words(offset, count).is_err(), "{offset}");
        }
        for count in [usize::MAX, usize::MAX / 8 + 2, LEN as usize / 8 + 1] {
            assert!(memory.checked_words(0, count).is_err(), "{count}");
        }
    }

    #[test]
    #[should_panic(expected = "a 32-bit word of a layout")]
    fn a_misaligned_word_of_a_layout_is_a_mistake() {
        memory(Access::ReadOnly).atomic_u32(2);
    }

    proptest! {
        #[test]
        fn copies_are_those_of_a_vector(
            writes in prop::collection::vec(
                (0..LEN + 40, prop::collection::vec(any::<u8>(), 0..300)),
                1..20,
            ),
            at in prop_oneof![0..LEN + 40, Just(u64::MAX)],
            len in 0..600usize,
        ) {
            let memory = memory(Access::ReadWrite);
            let mut model = vec![0u8; LEN as usize];
            for (offset, bytes) in writes {
                let place = offset as usize..offset as usize + bytes.len();
                match model.get_mut(place) {
                    Some(place) => {
                        place.copy_from_slice(&bytes);
                        prop_assert!(memory.write(offset, &bytes).is_ok());
                    }
                    None => prop_assert!(memory.write(offset, &bytes).is_err()),
                }
            }
            let mut all = vec![1; LEN as usize];
            memory.read(0, &mut all).expect("read");
            prop_assert_eq!(&all, &model);
            let mut out = vec![1; len];
            let end = (at as usize).checked_add(len);
            match end.and_then(|end| model.get(at as usize..end)) {
                Some(place) => {
                    memory.read(at, &mut out).expect("read");
                    prop_assert_eq!(&out, place);
                }
                None => prop_assert!(memory.read(at, &mut out).is_err()),
            }
        }
    }
}
