//! Reads of a segment on this host, straight from its memory.
//!
//! Invariants:
//! - I1: what is returned was whole, stripe by stripe, and the server lived after it was
//!   copied: no older life's bytes, none of a server that is gone.
//! - I2: memory that its owner could shorten is not mapped: a read never faults.

use std::os::fd::OwnedFd;

use crate::shm::SharedMemory;
use crate::space::frame::Welcome;
use crate::space::stripes::MappedStripes;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};

/// Looks at a stripe that changes all the time, before the server is asked.
const TRIES: u32 = 64;

/// A segment and its stripes, mapped.
#[derive(Debug)]
pub(super) struct Local {
    data: SharedMemory,
    stripes: MappedStripes,
}

impl Local {
    /// Maps what came with a welcome; none if it is not what it should be: then the
    /// server is asked for its bytes as any other.
    pub(super) fn open(fds: &[OwnedFd], welcome: &Welcome, segment: u64) -> Option<Self> {
        let [data, stripes] = fds else { return None };
        let stripes = MappedStripes::open(stripes, segment).ok()?;
        let is_sealed = memfd::seals(data).ok()?.contains(Seals::SHRINK);
        let is_this_life = stripes.incarnation() == welcome.incarnation;
        if !is_sealed || !is_this_life || memfd::size(data).ok()? < segment {
            return None;
        }
        let mapping = Mapping::shared(data, segment, Access::ReadOnly).ok()?;
        let data = SharedMemory::new(mapping);
        Some(Self { data, stripes })
    }

    /// Copies bytes of the segment into `out`. False if the server has to be asked.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> bool {
        let whole = self.stripes.read(&self.data, offset, out, TRIES);
        // Looked at after the copy: I1.
        matches!(whole, Ok(true)) && self.stripes.is_alive()
    }
}
