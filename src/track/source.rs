//! Where a capture reads the region's bytes.

use std::ops::Range;
use std::os::fd::OwnedFd;

use super::diff::changed_blocks;
use super::{PAGE, TrackError};
use crate::shm::{Ahead, SharedMemory};
use crate::sys::memfd;

/// A region's live content, which its writer may change at any moment.
#[derive(Debug)]
pub enum Source {
    /// A memfd that cannot shrink, mapped here too: pages known to be written are
    /// copied from the mapping, all others are read from the file, since a load
    /// from a hole would allocate it.
    Mapped {
        /// The mapping, at least as long as the region.
        memory: SharedMemory,
        /// The file that is mapped.
        fd: OwnedFd,
    },
    /// Any file. Others may truncate it: what is missing reads as zeros, and no
    /// load can fault.
    File {
        /// The file.
        fd: OwnedFd,
        /// Bytes of it that are the region.
        size: u64,
    },
}

impl Source {
    /// The file underneath.
    pub fn fd(&self) -> &OwnedFd {
        match self {
            Self::Mapped { fd, .. } | Self::File { fd, .. } => fd,
        }
    }

    /// Copies bytes of pages that are known to be allocated.
    pub(super) fn copy(&self, offset: u64, out: &mut [u8]) -> Result<(), TrackError> {
        match self {
            Self::Mapped { memory, .. } => Ok(memory.read(offset, out)?),
            Self::File { .. } => self.read(offset, out),
        }
    }

    /// Copies a page that is known to be allocated, or what the region has of its last
    /// one, and says which of its blocks differ from `old`. `ahead` comes next.
    pub(super) fn copy_changed(
        &self,
        offset: u64,
        out: &mut [u8],
        old: &[u8],
        ahead: Option<Ahead<'_>>,
    ) -> Result<u64, TrackError> {
        if let Self::Mapped { memory, .. } = self
            && let (Ok(out), Ok(old)) = (
                <&mut [u8; PAGE]>::try_from(&mut *out),
                <&[u8; PAGE]>::try_from(old),
            )
        {
            return Ok(memory.read_changed(offset, out, old, ahead)?);
        }
        self.copy(offset, out)?;
        Ok(changed_blocks(old, out))
    }

    /// Reads bytes through the file, which allocates nothing; zeros behind its end.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), TrackError> {
        let len = out.len() as u64;
        let read = memfd::read_at(self.fd(), out, offset).map_err(|source| TrackError::Read {
            offset,
            len,
            source,
        })?;
        out[read..].fill(0);
        Ok(())
    }

    /// The first run of data that ends behind `from`, clipped to begin there.
    pub(super) fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, TrackError> {
        let data = memfd::next_data(self.fd(), from).map_err(|source| TrackError::Read {
            offset: from,
            len: 0,
            source,
        })?;
        Ok(data.map(|data| data.start.max(from)..data.end.max(from)))
    }
}
