//! One page of shared memory, copied and compared in one pass.
#![allow(
    unsafe_code,
    reason = "copies from memory that other processes may write"
)]

use super::SharedMemory;
use crate::units::{OutOfRange, PAGE_SIZE, checked_range};

/// Bytes of a page, for arrays.
const PAGE: usize = PAGE_SIZE as usize;
/// Bytes that one bit of an answer stands for; a cache line.
pub const BLOCK: usize = 64;

const _: () = assert!(PAGE / BLOCK == 64, "one bit of a u64 for each block");

/// A page that is copied and compared next: its place in the shared memory, and what
/// it is compared with.
#[derive(Clone, Copy, Debug)]
pub struct Ahead<'a> {
    /// Where it begins; a hint, so any number does no harm.
    pub offset: u64,
    /// Its old content.
    pub old: &'a [u8],
}

impl SharedMemory {
    /// Copies the page at `offset` into `out` and says which of its blocks of
    /// [`BLOCK`] bytes differ from `old`: bit `i` for block `i`. Each byte is loaded
    /// once, so `out` is exactly what was compared. The lines of `ahead` are asked for
    /// meanwhile: pages far apart cost a third less so.
    ///
    /// # Errors
    /// [`OutOfRange`] if the page does not lie within the memory.
    #[inline]
    pub fn read_changed(
        &self,
        offset: u64,
        out: &mut [u8; PAGE],
        old: &[u8; PAGE],
        ahead: Option<Ahead<'_>>,
    ) -> Result<u64, OutOfRange> {
        let range = checked_range(offset, PAGE_SIZE, self.len())?;
        let hint = ahead.map(|next| {
            let from = self.as_ptr().cast_const();
            (from.wrapping_add(next.offset as usize), next.old.as_ptr())
        });
        // SAFETY: required: a page of readable bytes at the source, of initialised
        // ones at `old`, of writable ones at `out`, the last two no part of the
        // mapping. The range was checked against the mapping, which `self` keeps; the
        // other two are arrays that are borrowed, and no slice is ever made of the
        // mapping.
        unsafe {
            let from = self.as_ptr().add(range.start as usize);
            Ok(copy_compare(from, out.as_mut_ptr(), old.as_ptr(), hint))
        }
    }
}

/// Copies a page and compares it with `old`; bit `i` is set where block `i` differs.
///
/// # Safety
/// `from` and `old` are readable and `to` writable for a page; `to` overlaps neither.
/// Others may change what `from` points to. `hint` may point anywhere.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_compare(
    from: *const u8,
    to: *mut u8,
    old: *const u8,
    hint: Option<(*const u8, *const u8)>,
) -> u64 {
    let mut changed = 0;
    for block in 0..PAGE / BLOCK {
        let at = block * BLOCK;
        if let Some((next, next_old)) = hint {
            prefetch(next.wrapping_add(at));
            prefetch(next_old.wrapping_add(at));
        }
        // SAFETY: required: a block that lies within the page that the caller
        // promises. `at + BLOCK <= PAGE`.
        let differs = unsafe { copy_compare_block(from.add(at), to.add(at), old.add(at)) };
        changed |= u64::from(differs) << block;
    }
    changed
}

/// Copies [`BLOCK`] bytes and says whether they differ from `old`.
///
/// # Safety
/// As for [`copy_compare`], for one block.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_compare_block(from: *const u8, to: *mut u8, old: *const u8) -> bool {
    let equal: u32;
    // SAFETY: required: what the caller promises. The instructions are opaque to the
    // compiler, so a concurrent store is no data race of the language; each byte of
    // `from` is loaded once, and what was loaded is stored and compared. SSE2 is part
    // of x86-64.
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
            "movdqu {e}, [{old}]",
            "movdqu {f}, [{old} + 16]",
            "pcmpeqb {a}, {e}",
            "pcmpeqb {b}, {f}",
            "movdqu {e}, [{old} + 32]",
            "movdqu {f}, [{old} + 48]",
            "pcmpeqb {c}, {e}",
            "pcmpeqb {d}, {f}",
            "pand {a}, {b}",
            "pand {c}, {d}",
            "pand {a}, {c}",
            "pmovmskb {equal:e}, {a}",
            from = in(reg) from,
            to = in(reg) to,
            old = in(reg) old,
            equal = out(reg) equal,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            c = out(xmm_reg) _,
            d = out(xmm_reg) _,
            e = out(xmm_reg) _,
            f = out(xmm_reg) _,
            options(nostack, preserves_flags),
        );
    }
    equal != 0xFFFF
}

/// Asks for a cache line.
#[cfg(target_arch = "x86_64")]
#[inline]
fn prefetch(line: *const u8) {
    use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: required: nothing; a prefetch of any address at all neither faults nor
    // changes what a program sees.
    unsafe { _mm_prefetch(line.cast(), _MM_HINT_T0) }
}

/// Copies a page and compares it with `old`; bit `i` is set where block `i` differs.
///
/// # Safety
/// `from` and `old` are readable and `to` writable for a page; `to` overlaps neither.
/// Others may change what `from` points to.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy_compare(
    from: *const u8,
    to: *mut u8,
    old: *const u8,
    _hint: Option<(*const u8, *const u8)>,
) -> u64 {
    // SAFETY: required: what the caller promises, which is what the copy needs; from
    // then on both pages are this process's own.
    let (new, old) = unsafe {
        super::memory::copy_bytes(from, to, PAGE);
        (
            std::slice::from_raw_parts(to.cast_const(), PAGE),
            std::slice::from_raw_parts(old, PAGE),
        )
    };
    let blocks = new.chunks(BLOCK).zip(old.chunks(BLOCK)).enumerate();
    blocks.fold(0, |changed, (block, (a, b))| {
        changed | u64::from(a != b) << block
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::{Access, Mapping};
    use crate::sys::memfd;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tells_each_block_that_differs_and_copies_what_it_compared(
            changes in prop::collection::vec(0..PAGE, 0..20),
            fill in any::<u8>(),
            page in 0u64..2,
        ) {
            let fd = memfd::create("page", 2 * PAGE_SIZE).expect("memfd");
            let map = Mapping::shared(&fd, 2 * PAGE_SIZE, Access::ReadWrite).expect("map");
            let memory = SharedMemory::new(map);
            let old = [fill; PAGE];
            let mut new = old;
            let mut expected = 0u64;
            for at in changes {
                new[at] = !fill;
                expected |= 1 << (at / BLOCK);
            }
            memory.write(page * PAGE_SIZE, &new).expect("write");
            let mut out = [1; PAGE];
            let ahead = Ahead { offset: u64::MAX - page, old: &old };
            let found = memory.read_changed(page * PAGE_SIZE, &mut out, &old, Some(ahead));
            prop_assert_eq!(found, Ok(expected));
            prop_assert_eq!(out, new);
        }
    }

    #[test]
    fn a_page_beyond_the_memory_is_refused() {
        let fd = memfd::create("page", PAGE_SIZE).expect("memfd");
        let map = Mapping::shared(&fd, PAGE_SIZE, Access::ReadOnly).expect("map");
        let memory = SharedMemory::new(map);
        let (mut out, old) = ([0; PAGE], [0; PAGE]);
        for offset in [1, PAGE_SIZE, u64::MAX, u64::MAX - PAGE_SIZE] {
            let read = memory.read_changed(offset, &mut out, &old, None);
            assert!(read.is_err(), "{offset}");
        }
        assert_eq!(memory.read_changed(0, &mut out, &old, None), Ok(0));
    }
}
