//! Reads and changes of a segment on this host, straight in its memory.
//!
//! Invariants:
//! - I1: what is returned was whole, stripe by stripe, and the server lived after it was
//!   copied: no older life's bytes, none of a server that is gone.
//! - I2: memory that its owner could shorten is not mapped: a read never faults.
//! - I3: a change is made under the lock of its stripe, and counts as made only if the lock
//!   was this client's and the server lived when it was done.

use std::os::fd::OwnedFd;

use crate::shm::SharedMemory;
use crate::space::frame::{HAS_WRITING, Welcome};
use crate::space::locks::{MappedLocks, NotChanged};
use crate::space::stripes::MappedStripes;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};

/// Looks at a stripe that changes all the time, before the server is asked.
const TRIES: u32 = 64;

/// What a server lets this client do with its stripes.
#[derive(Debug)]
enum Way {
    Read(MappedStripes),
    Write(MappedLocks),
}

/// A segment and its stripes, mapped.
#[derive(Debug)]
pub(super) struct Local {
    data: SharedMemory,
    way: Way,
}

impl Local {
    /// Maps what came with a welcome; none if it is not what it should be: then the
    /// server is asked for its bytes as any other.
    pub(super) fn open(fds: &[OwnedFd], welcome: &Welcome, segment: u64) -> Option<Self> {
        let (data, way) = match fds {
            [data, stripes] => (data, Way::Read(MappedStripes::open(stripes, segment).ok()?)),
            [data, stripes, page] if welcome.flags & HAS_WRITING != 0 => {
                let locks = MappedLocks::open(stripes, page, segment).ok()?;
                (data, Way::Write(locks))
            }
            _ => return None,
        };
        let access = match way {
            Way::Read(_) => Access::ReadOnly,
            Way::Write(_) => Access::ReadWrite,
        };
        let is_sealed = memfd::seals(data).ok()?.contains(Seals::SHRINK);
        if !is_sealed || memfd::size(data).ok()? < segment {
            return None;
        }
        let data = SharedMemory::new(Mapping::shared(data, segment, access).ok()?);
        let this = Self { data, way };
        (this.stripes().incarnation() == welcome.incarnation).then_some(this)
    }

    fn stripes(&self) -> &MappedStripes {
        match &self.way {
            Way::Read(stripes) => stripes,
            Way::Write(locks) => locks.stripes(),
        }
    }

    /// Whether it can be changed.
    pub(super) fn is_writable(&self) -> bool {
        matches!(self.way, Way::Write(_))
    }

    /// Copies bytes of the segment into `out`. False if the server has to be asked.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> bool {
        let whole = self.stripes().read(&self.data, offset, out, TRIES);
        // Looked at after the copy: I1.
        matches!(whole, Ok(true)) && self.stripes().is_alive()
    }

    /// Runs `change` on the segment's memory under the lock of one stripe.
    ///
    /// # Errors
    /// [`NotChanged`]; `Busy` where it cannot be changed at all, too.
    #[inline]
    pub(super) fn change<R>(
        &self,
        stripe: u64,
        change: impl FnOnce(&SharedMemory) -> R,
    ) -> Result<R, NotChanged> {
        match &self.way {
            Way::Write(locks) if locks.stripes().is_alive() => {
                locks.change(stripe, TRIES, || change(&self.data))
            }
            _ => Err(NotChanged::Busy),
        }
    }
}
