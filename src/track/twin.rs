//! The engine's private copy of a region as of the last epoch.
//!
//! - I1: a page that is not touched is zero; it takes no memory.
//! - I2: only a capture changes the twin, after [`super::PreImages::before_change`].

use std::ops::{Deref, Range};

use super::{ExtentSet, PAGE};
use crate::bitmap::Bitmap;
use crate::sys::SysError;
use crate::sys::map::PrivateMemory;
use crate::units::{PAGE_SIZE, page_of, pages_for};

static ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// A private copy of a region, as sparse as what was written to it.
///
/// Memory: the pages that ever held something other than zero, and one bit per
/// page of the region.
#[derive(Debug)]
pub struct Twin {
    memory: PrivateMemory,
    touched: Bitmap,
    /// What captures have changed since one ended last.
    changed: ExtentSet,
}

impl Twin {
    /// A twin of `size` zero bytes.
    ///
    /// # Errors
    /// [`SysError`] if the address space has no room for it.
    pub fn new(size: u64) -> Result<Self, SysError> {
        Ok(Self {
            memory: PrivateMemory::new(size)?,
            touched: Bitmap::new(pages_for(size)),
            changed: ExtentSet::new(size),
        })
    }

    /// A twin of `size` zero bytes that may grow to `room`.
    ///
    /// # Errors
    /// As for [`Twin::new`].
    pub fn with_room(size: u64, room: u64) -> Result<Self, SysError> {
        Ok(Self {
            memory: PrivateMemory::with_room(size, room)?,
            touched: Bitmap::new(pages_for(size)),
            changed: ExtentSet::new(size),
        })
    }

    /// Lengthens it to `size` bytes, those that are new being zero, or as far as it has
    /// room; a lesser size changes nothing.
    pub fn grow(&mut self, size: u64) {
        let size = self.memory.grow(size);
        self.touched.grow(pages_for(size));
        self.changed.grow(size);
    }

    /// Size of the region, in bytes.
    pub fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    /// The pages that were ever written with something other than zero.
    pub fn touched(&self) -> &Bitmap {
        &self.touched
    }

    /// Memory that the content takes, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.touched.count() * PAGE_SIZE
    }

    /// The content of one page, shorter at the region's end; reading it touches
    /// nothing.
    ///
    /// # Panics
    /// If the page lies beyond the region.
    pub fn page(&self, page: u64) -> &[u8] {
        let start = (page * PAGE_SIZE) as usize;
        let end = (start + PAGE).min(self.memory.len());
        if self.touched.contains(page) {
            &self.memory[start..end]
        } else {
            &ZERO_PAGE[..end - start]
        }
    }

    /// Writes `bytes` at `offset`. Zeros on a page that is zero leave it untouched.
    ///
    /// # Panics
    /// If the range ends beyond the region.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let room = (PAGE_SIZE - at % PAGE_SIZE) as usize;
            let piece = &bytes[done..bytes.len().min(done + room)];
            let page = page_of(at);
            if self.touched.contains(page) || piece != &ZERO_PAGE[..piece.len()] {
                self.memory[at as usize..at as usize + piece.len()].copy_from_slice(piece);
                self.touched.insert(page);
            }
            done += piece.len();
        }
    }

    /// Notes what a capture has changed, as ascending runs.
    pub(super) fn note_changed(&mut self, runs: &[Range<u64>]) {
        self.changed.extend_sorted(runs);
    }

    /// What the capture under way has changed so far.
    pub fn changed(&self) -> &ExtentSet {
        &self.changed
    }

    /// What captures have changed since this was asked last.
    pub(super) fn take_changed(&mut self) -> ExtentSet {
        let empty = ExtentSet::new(self.size());
        std::mem::replace(&mut self.changed, empty)
    }

    /// Asks for huge pages where whole 2 MiB spans of `bytes` are about to be filled.
    pub fn advise_huge(&self, bytes: Range<u64>) {
        self.memory.advise_huge(bytes);
    }
}

impl Deref for Twin {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_touch_nothing_and_pages_end_with_the_region() {
        let mut twin = Twin::new(PAGE_SIZE * 2 + 10).unwrap();
        twin.write(0, &[0; 2 * PAGE + 10]);
        assert!(twin.touched().is_empty());
        assert_eq!(twin.page(2).len(), 10);
        twin.write(PAGE_SIZE - 1, &[0, 7]);
        assert_eq!(twin.touched().runs().next(), Some(1..2));
        assert_eq!(twin.resident_bytes(), PAGE_SIZE);
        twin.write(PAGE_SIZE, &[0]);
        assert!(twin.iter().all(|byte| *byte == 0), "zeros overwrite");
    }
}
