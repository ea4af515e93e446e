//! Slices of memory that another process could write, and promises not to.
#![allow(
    unsafe_code,
    reason = "slices of memory whose other writer is trusted to stay away"
)]

use std::ops::{Deref, DerefMut, Range};

use super::SharedMemory;
use crate::units::{OutOfRange, checked_range};

/// A witness that the other processes of some shared memory keep the protocol by
/// which its parts are handed over. With it a part is a plain slice.
#[derive(Clone, Copy, Debug)]
pub struct PeerTrust(());

impl PeerTrust {
    /// Trusts every process that maps the memory this witness is used with.
    ///
    /// # Safety
    /// As long as the witness or a copy of it is in use: no process touches a part
    /// of the memory while it is handed over to this one (of a channel: a frame that
    /// is in the server's hands), and no two parts that are handed over overlap. A
    /// peer that does otherwise makes this program's behaviour undefined.
    pub const unsafe fn new() -> PeerTrust {
        PeerTrust(())
    }

    /// The same for a test, whose clients wait while a frame is the server's.
    #[cfg(test)]
    pub(crate) const fn in_tests() -> PeerTrust {
        PeerTrust(())
    }

    /// The bytes `offset .. offset + len`, which were handed over to the caller.
    /// Made once per hand-over.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the memory.
    #[inline]
    pub(crate) fn bytes(
        self,
        memory: &SharedMemory,
        offset: u64,
        len: u64,
    ) -> Result<TrustedBytes<'_>, OutOfRange> {
        Ok(TrustedBytes {
            range: checked_range(offset, len, memory.len())?,
            memory,
        })
    }
}

/// Bytes of shared memory that are this object's alone while it lives.
#[derive(Debug)]
pub struct TrustedBytes<'a> {
    memory: &'a SharedMemory,
    range: Range<u64>,
}

impl TrustedBytes<'_> {
    fn len(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: required: the result lies within the mapping, which `memory`
        // keeps; the range was checked when this was made.
        unsafe { self.memory.as_ptr().add(self.range.start as usize) }
    }
}

impl Deref for TrustedBytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: required: `len` readable bytes that nobody changes while the
        // slice lives. The range was checked; nobody else touches it, in this
        // process (one object per hand-over) or another, which whoever made the
        // `PeerTrust` promised.
        unsafe { std::slice::from_raw_parts(self.start(), self.len()) }
    }
}

impl DerefMut for TrustedBytes<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; the object is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::{Access, Mapping};
    use crate::sys::memfd;
    use crate::units::PAGE_SIZE;

    #[test]
    fn trusted_bytes_are_those_of_the_memory() {
        let fd = memfd::create("trust", PAGE_SIZE).expect("memfd");
        let mapping = Mapping::shared(fd, PAGE_SIZE, Access::ReadWrite).expect("map");
        let memory = SharedMemory::new(mapping);
        // SAFETY: required: nobody else touches the bytes; nobody has the memory.
        let trust = unsafe { PeerTrust::new() };
        let mut bytes = trust.bytes(&memory, 10, 4).expect("in range");
        bytes.copy_from_slice(b"abcd");
        assert_eq!(&bytes[1..3], b"bc");
        assert_eq!(memory.load::<[u8; 4]>(10), Ok(*b"abcd"));
        assert!(trust.bytes(&memory, PAGE_SIZE - 3, 4).is_err());
        assert!(trust.bytes(&memory, u64::MAX, 4).is_err());
    }
}
