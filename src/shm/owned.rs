//! A memfd that only this process can ever write.
#![allow(unsafe_code, reason = "slices of memory that only this process writes")]

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::sys::SysError;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::units::page_align_up;

/// Memory whose only writer is this object, for ever; other processes map it
/// for reading.
///
/// Invariant I1: the memory's one writable mapping is `mapping`. It was made
/// before anybody else had the descriptor, and the seals added right after it
/// (`FUTURE_WRITE | SHRINK`, and `GROW | SEAL` at its greatest length) forbid another
/// one, writing by system calls, punching holes and shrinking, to all, for ever. The
/// mapping is not inherited by `fork`.
///
/// So a plain slice is sound. Readers in other processes see stores as they come
/// and need a [`super::seqlock`].
#[derive(Debug)]
pub struct OwnedMemory {
    mapping: Mapping,
    /// Open for reading: of thousands of such memories each descriptor counts.
    fd: Arc<OwnedFd>,
    /// Open for growing, until it has its greatest length.
    growing: Option<OwnedFd>,
    len: usize,
    room: u64,
}

/// What nobody may do from the beginning, and what nobody may do once the memory has its
/// greatest length: no seal can be added after `SEAL`, and none lifts `GROW`.
pub(crate) const FIRST_SEALS: Seals = Seals::FUTURE_WRITE.union(Seals::SHRINK);
pub(crate) const LAST_SEALS: Seals = Seals::GROW.union(Seals::SEAL);

impl OwnedMemory {
    /// `len` zero bytes, of which none is allocated before it is touched. The
    /// file and the mapping are rounded up to whole pages.
    ///
    /// # Errors
    /// Whatever creating, mapping or sealing says; `EINVAL` if `len` is zero.
    pub fn create(name: &str, len: u64) -> Result<OwnedMemory, SysError> {
        Self::with_room(name, len, len)
    }

    /// The same with address space for `room` bytes, to which it may [`grow`](Self::grow).
    ///
    /// # Errors
    /// As for [`OwnedMemory::create`]; `EINVAL` if `room` is less than `len`.
    pub fn with_room(name: &str, len: u64, room: u64) -> Result<OwnedMemory, SysError> {
        let fd = memfd::create(name, page_align_up(len))?;
        let mapping = Mapping::with_room(&fd, len, room, Access::ReadWrite)?;
        mapping.dont_fork()?;
        memfd::add_seals(&fd, FIRST_SEALS)?;
        if len == room {
            memfd::add_seals(&fd, LAST_SEALS)?;
        }
        Ok(OwnedMemory {
            mapping,
            fd: Arc::new(memfd::reopen_read_only(&fd)?),
            growing: (len < room).then_some(fd),
            len: len as usize,
            room,
        })
    }

    /// Lengthens it to `len` bytes, of which those that are new are zero; nothing if it
    /// has them. Readers see the file grow; what they are told of it is another matter.
    ///
    /// # Errors
    /// `EINVAL` beyond its room; whatever lengthening the file says.
    pub fn grow(&mut self, len: u64) -> Result<(), SysError> {
        if len > self.room {
            return Err(SysError::os("growing beyond the room", libc::EINVAL));
        }
        if len <= self.len as u64 {
            return Ok(());
        }
        let Some(fd) = &self.growing else {
            return Ok(());
        };
        memfd::grow(fd, page_align_up(len))?;
        if len == self.room {
            memfd::add_seals(fd, LAST_SEALS)?;
            self.growing = None;
        }
        self.len = len as usize;
        Ok(())
    }

    /// The greatest length that it can have.
    pub fn room(&self) -> u64 {
        self.room
    }

    /// The memfd, open for reading, to pass to readers.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The same, to keep.
    pub fn shared_fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// The writable mapping, whole pages; for what has to know its address.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Bytes that are allocated.
    ///
    /// # Errors
    /// Whatever `fstat` says.
    pub fn resident_bytes(&self) -> Result<u64, SysError> {
        memfd::resident_bytes(self.fd.as_fd())
    }
}

impl Deref for OwnedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: required: `len` readable bytes that nobody changes while the
        // slice lives. `len` is no more than the file has (`with_room`, `grow`) and
        // than the mapping's length; by I1 only this object writes, and it is borrowed.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr(), self.len) }
    }
}

impl DerefMut for OwnedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE_SIZE;

    #[test]
    fn only_its_maker_writes_it() {
        let mut memory = OwnedMemory::create("owned", 3 * PAGE_SIZE + 1).expect("memory");
        assert_eq!(memory.len() as u64, 3 * PAGE_SIZE + 1);
        assert_eq!(memory.resident_bytes().expect("fstat"), 0);
        let reader = Mapping::shared(memory.fd(), 4 * PAGE_SIZE, Access::ReadOnly).expect("map");
        let reader = crate::shm::SharedMemory::new(reader);
        memory[5] = 7;
        memory[3 * PAGE_SIZE as usize] = 8;
        assert_eq!(reader.load::<u8>(5), Ok(7));
        assert_eq!(reader.load::<u8>(3 * PAGE_SIZE), Ok(8));
        assert_eq!(memory.resident_bytes().expect("fstat"), 2 * PAGE_SIZE);
        assert!(memfd::write_at(memory.fd(), &[1], 0).is_err());
        assert!(Mapping::shared(memory.fd(), PAGE_SIZE, Access::ReadWrite).is_err());
        let again = memfd::add_seals(memory.fd(), Seals::WRITE);
        assert!(again.is_err(), "sealed for good");
        assert_eq!(memfd::size(memory.fd()).expect("fstat"), 4 * PAGE_SIZE);
        assert!(OwnedMemory::create("owned", 0).is_err());
    }

    #[test]
    fn it_grows_to_its_room_and_no_further() {
        let mut memory = OwnedMemory::with_room("owned", 10, 3 * PAGE_SIZE).expect("memory");
        let reader = Mapping::with_room(memory.fd(), 10, 3 * PAGE_SIZE, Access::ReadOnly);
        let reader = crate::shm::SharedMemory::new(reader.expect("map"));
        memory[9] = 1;
        memory.grow(5).expect("it has them");
        memory.grow(PAGE_SIZE + 1).expect("room");
        memory[PAGE_SIZE as usize] = 2;
        assert_eq!(reader.load::<u8>(PAGE_SIZE), Ok(2));
        assert!(memory.grow(3 * PAGE_SIZE + 1).is_err());
        assert_eq!(memory.len() as u64, PAGE_SIZE + 1);
        assert!(memfd::grow(memory.fd(), PAGE_SIZE).is_err(), "no shrinking");
        memory.grow(3 * PAGE_SIZE).expect("room");
        let seals = memfd::seals(memory.fd()).expect("seals");
        assert!(seals.contains(FIRST_SEALS | LAST_SEALS));
        assert!(memfd::grow(memory.fd(), 4 * PAGE_SIZE).is_err(), "sealed");
        assert!(memory[10..PAGE_SIZE as usize].iter().all(|byte| *byte == 0));
    }
}
