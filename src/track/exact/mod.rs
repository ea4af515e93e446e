//! Exact tracking: a cut of a region that its writers neither help with nor notice.
//!
//! ```text
//!  rounds: arm what is dirty,      withheld pass: arm      copy-before-write: a store to a
//!  faults are answered             the rest, no fault      page of the cut waits until the
//!  between spans                   is answered             page is in a slot
//! --------------------------------|--------------------|-----------------------------------
//!                                                      ^ the cut: an exact instant
//! ```
//! One thread ([`Cutter`]) makes all changes of protection of a region and answers all
//! of its faults. So *while it arms it does not answer*: that is all that withholding
//! is, and no flag and no lock is needed for it. Every store that was complete before
//! the pass ended is in the cut, every other one waited.
//!
//! The engine captures the cut meanwhile, page by page, from the region itself; what
//! is stored to in between it finds in the slots of the [`Board`]. Neither side waits
//! for the other, unless the slots are used up: then stores wait, up to a deadline
//! after which the cut is void, everything is let go and the region is compared.
//!
//! # Several writers
//!
//! ```text
//!           joins open                joins armed
//!  vacant --------------> open        vacant ---------------+
//!    ^                     | arming of everything           v
//!    |                     +----------------------------> armed <---+
//!    |  leaves, its memory gone                             |  |     | withheld pass
//!    +------------------------------------------------------+  +-----+ of all that are armed
//! ```
//! Each writing process is an attachment with a userfaultfd of its own; one thread has
//! them all. A cut goes in this order: who joined or left is taken notice of; whoever is
//! open is armed whole; rounds over all attachments, faults of all of them answered in
//! between; then the withheld pass over all of them, and only then a fault of any of them
//! is answered. A process that joins arms its own mapping before it hands it over, and so
//! whatever it stores waits until the thread has it: it may join in the middle of a cut.
//! One that comes back after the node had died stores meanwhile: it joins open, and the
//! next cut is of everything. The pages that an attachment has left open when its process
//! dies stay members of the dirty set, so its last stores are in the next cut.
//!
//! - I1: a page is protected and lifted by the cutter's thread only, but for the arming of
//!   a mapping that the thread does not have yet.
//! - I2: no fault is answered between the first protecting of the withheld pass and the
//!   moment at which all pages of the cut are pending, over all attachments.
//! - I3: "captured" belongs to the region, "lifted" to the attachment.
//! - I4: nothing is allocated, no lock is taken and nothing is logged while a store
//!   may wait.

mod board;
mod cutter;
pub mod ring;
mod set;
pub mod word;

pub use board::{Board, ExactStats};
#[cfg(test)]
pub(crate) use cutter::Badly;
pub use cutter::{Armed, Cutter, Ground};
pub use set::PageSet;

use super::attachment::ESRCH;

/// A cut: its number, and what it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Rises by one with each cut; 0 before the first.
    pub number: u64,
    /// Whether all pages belong to it, or only those written since the cut before.
    pub all: bool,
}

/// Why a region is not tracked exactly any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The kernel refused to protect or to lift: `ESRCH` after the process has exited,
    /// `ENOENT` if a part of its mapping was unmapped, moved or unregistered.
    #[error("the writer's mapping cannot be protected any more: {}", refusal(*errno))]
    Refused {
        /// The error number.
        errno: i32,
    },
    /// The descriptor told of something that was never asked for.
    #[error("the writer's userfaultfd tells of other things than stores (event {event:#x})")]
    Foreign {
        /// `uffd_msg.event`.
        event: u8,
    },
    /// The thread that answers faults has ended.
    #[error("the thread that answers faults has ended")]
    Ended,
}

/// `include/uapi/asm-generic/errno-base.h`.
const ENOENT: i32 = 2;

/// What a refusal of the kernel means here.
fn refusal(errno: i32) -> String {
    match errno {
        ENOENT => "a part of it is unmapped, moved, mapped over or unregistered".to_owned(),
        ESRCH => "the process has ended, or has no memory any more".to_owned(),
        other => std::io::Error::from_raw_os_error(other).to_string(),
    }
}

const FOREIGN: u32 = 1 << 16;
const ENDED: u32 = 1 << 17;

impl Lost {
    fn code(self) -> u32 {
        match self {
            Self::Refused { errno } => errno.unsigned_abs().clamp(1, 0xFFFF),
            Self::Foreign { event } => FOREIGN | u32::from(event),
            Self::Ended => ENDED,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => None,
            ENDED => Some(Self::Ended),
            code if code & FOREIGN != 0 => Some(Self::Foreign { event: code as u8 }),
            errno => Some(Self::Refused {
                errno: errno as i32,
            }),
        }
    }
}
