//! Dirty tracking and capture: from a writer's stores to extents.
//!
//! ```text
//! writer's mapping --scan and protect--> dirty pages --copy once--> buffer
//!                                                                    | diff
//!                  extents <--------------------------------------- twin
//! ```
//!
//! The twin is the engine's private copy of the region as of the last epoch.
//! Updates are built from the twin, never from live memory; what an open update
//! still needs of an older epoch is kept in [`PreImages`].
//!
//! | mode | found by | promise |
//! |---|---|---|
//! | `async` | write-protection and scans of the page map | convergent; a cut at `commit()` |
//! | `sync` | faults that a thread answers, and passes in which it does not | every epoch is a cut |
//! | `manual` | the writer's marks | convergent within the configured delay; a cut at `commit()` |
//! | `compare` | comparing everything with the twin | convergent |

mod attachment;
mod audit;
mod capture;
#[cfg(test)]
mod capture_tests;
mod choice;
mod diff;
pub mod exact;
mod extents;
mod heat;
mod interval;
mod preimage;
mod source;
mod twin;

pub use attachment::Attachment;
pub use audit::{Audit, Looked};
pub use capture::{Capture, Captured, Step};
pub use choice::{Asked, Choice, Unmet, choose};
pub use diff::{DIFF_GAP, diff};
pub use extents::{Extent, ExtentSet};
pub use heat::Heat;
pub use interval::Interval;
pub use preimage::{Full, NoRoom, PreImages, WhenFull};
pub use source::Source;
pub use twin::Twin;

use std::sync::Arc;

use crate::limits;
use crate::sys::SysError;
use crate::sys::behaviour::Denied;
use crate::units::{OutOfRange, PAGE_SIZE, pages_for};
use crate::words::Mode;

/// Bytes of a page, for slices.
const PAGE: usize = PAGE_SIZE as usize;

/// Tracking that could not be set up, or that was lost.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// A descriptor could not be opened, registered or taken over.
    #[error("setting up the tracking of a mapping")]
    Open {
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// A descriptor that the mode needs is missing, or the mapping is too short.
    #[error("the attachment lacks what its mode needs")]
    Incomplete,
    /// The address range of an attachment is not that of a mapping.
    #[error("no mapping lies at address {base:#x} with {len} bytes")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Write-protecting failed.
    #[error("write-protecting {len} bytes at offset {offset}")]
    Arm {
        /// First byte within the region.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// A scan failed; the dirty bits of a part may be gone.
    #[error("scanning for written pages from offset {offset}")]
    Scan {
        /// Where the scan began.
        offset: u64,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// A scan did not move on.
    #[error("a scan for written pages stands still at offset {offset}")]
    NoProgress {
        /// Where it stands.
        offset: u64,
    },
    /// The content could not be read.
    #[error("reading {len} bytes at offset {offset} of a region")]
    Read {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// The mapping here is shorter than the region.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The kernel's scans do not behave as write-protection needs it.
    #[error("tracking by write-protection is refused")]
    Denied(#[from] Denied),
    /// No memory for the tables of exact tracking.
    #[error("no memory for the tables of exact tracking")]
    Memory,
    /// Stores waited too long for room to copy their pages, and were let go.
    #[error("a cut was given up: stores waited too long for room to copy their pages")]
    Void,
    /// Faults are not answered any more.
    #[error(transparent)]
    Exact(#[from] exact::Lost),
    /// The writing process has exited: what it stored last is found by comparing.
    #[error("the writing process has exited")]
    WriterExited,
}

/// How changes of one region are found.
#[derive(Debug)]
pub enum Tracker {
    /// Asynchronous write-protection and page-map scans; marks are shipped too.
    Async {
        /// The mappings of the writers; none where nobody writes.
        attachments: Vec<Attachment>,
        /// Pages of the first one that are left open, since they are written all the
        /// time; never any where several processes may write.
        heat: Heat,
        /// Whether no other process will ever write.
        alone: bool,
    },
    /// Synchronous write-protection and cuts.
    Sync {
        /// The mappings of the writers. Their userfaultfds are taken by who answers
        /// their faults.
        attachments: Vec<Attachment>,
        /// What the fault thread and the captures share.
        board: Arc<exact::Board>,
    },
    /// Marks only.
    Manual {
        /// The mappings of the writing processes, if the region has any.
        attachments: Vec<Attachment>,
    },
    /// Everything compared with the twin.
    Compare {
        /// The mappings of the writing processes, if the region has any.
        attachments: Vec<Attachment>,
    },
}

impl Tracker {
    /// The tracker for `mode`.
    ///
    /// # Errors
    /// [`TrackError::Incomplete`] if the mode needs an attachment, or descriptors of
    /// it, that are missing.
    pub fn new(mode: Mode, attachment: Option<Attachment>) -> Result<Self, TrackError> {
        let size = match (mode, &attachment) {
            (Mode::Async | Mode::Sync, None) => return Err(TrackError::Incomplete),
            (_, attachment) => attachment.as_ref().map_or(0, |it| it.len),
        };
        let mut tracker = Self::empty(mode, size)?;
        if let Self::Async { alone, .. } = &mut tracker {
            *alone = true;
        }
        tracker.set_hot_after(limits::HOT_CAPTURES);
        if let Some(attachment) = attachment {
            tracker.attach(attachment)?;
        }
        Ok(tracker)
    }

    /// The tracker for a region of `size` bytes that nobody writes yet and several
    /// processes may.
    ///
    /// # Errors
    /// [`TrackError::Memory`], [`TrackError::Open`] if there is no memory for its tables.
    pub fn empty(mode: Mode, size: u64) -> Result<Self, TrackError> {
        let attachments = Vec::new();
        Ok(match mode {
            Mode::Async => Self::Async {
                attachments,
                heat: Heat::new(pages_for(size), 0),
                alone: false,
            },
            Mode::Sync => Self::Sync {
                attachments,
                board: Arc::new(exact::Board::new(size)?),
            },
            Mode::Manual => Self::Manual { attachments },
            Mode::Compare => Self::Compare { attachments },
            // A choice that was not made is no way of tracking.
            Mode::Auto => return Err(TrackError::Incomplete),
        })
    }

    /// One more process writes.
    ///
    /// # Errors
    /// [`TrackError::Incomplete`] if the attachment lacks what the mode needs.
    pub fn attach(&mut self, attachment: Attachment) -> Result<(), TrackError> {
        let complete = match self {
            Self::Async { .. } => attachment.uffd.is_some() && attachment.pagemap.is_some(),
            Self::Sync { .. } => attachment.uffd.is_some(),
            _ => true,
        };
        if !complete {
            return Err(TrackError::Incomplete);
        }
        self.attachments_mut().push(attachment);
        Ok(())
    }

    /// A process writes no more. A capture under way has to begin anew.
    pub fn detach(&mut self, slot: u32) -> Option<Attachment> {
        let attachments = self.attachments_mut();
        let at = attachments.iter().position(|it| it.slot == slot)?;
        Some(attachments.remove(at))
    }

    /// The mode it tracks in.
    pub fn mode(&self) -> Mode {
        match self {
            Self::Async { .. } => Mode::Async,
            Self::Sync { .. } => Mode::Sync,
            Self::Manual { .. } => Mode::Manual,
            Self::Compare { .. } => Mode::Compare,
        }
    }

    /// The first writer's mapping, if there is a writing process.
    pub fn attachment(&self) -> Option<&Attachment> {
        self.attachments().first()
    }

    /// The mappings of all writing processes.
    pub fn attachments(&self) -> &[Attachment] {
        match self {
            Self::Async { attachments, .. }
            | Self::Sync { attachments, .. }
            | Self::Manual { attachments }
            | Self::Compare { attachments } => attachments,
        }
    }

    pub(crate) fn attachments_mut(&mut self) -> &mut Vec<Attachment> {
        match self {
            Self::Async { attachments, .. }
            | Self::Sync { attachments, .. }
            | Self::Manual { attachments }
            | Self::Compare { attachments } => attachments,
        }
    }

    /// Gives the attachments up; what is left compares.
    pub fn take_attachments(&mut self) -> Vec<Attachment> {
        let attachments = std::mem::take(self.attachments_mut());
        *self = Self::Compare {
            attachments: Vec::new(),
        };
        attachments
    }

    /// The mappings that are to be write-protected, in the mode that does so.
    fn armable(&self) -> &[Attachment] {
        match self {
            Self::Async { attachments, .. } => attachments,
            _ => &[],
        }
    }

    /// Which pages are left open; in mode `async`.
    pub fn heat(&self) -> Option<&Heat> {
        match self {
            Self::Async { heat, .. } => Some(heat),
            _ => None,
        }
    }

    /// Captures in a row after which a page is left open, from now on; 0 for never.
    /// Without effect in other modes than `async`, and where several may write.
    pub fn set_hot_after(&mut self, captures: u64) {
        if let Self::Async {
            heat, alone: true, ..
        } = self
        {
            heat.set_after(captures);
        }
    }

    /// The mapping consists of huge pages: none is ever left open.
    pub fn set_huge(&mut self) {
        if let Self::Async { heat, .. } = self {
            heat.never();
        }
    }

    /// Pages that were just armed are not open any more.
    fn forget_heat(&mut self, pages: std::ops::Range<u64>) {
        if let Self::Async { heat, .. } = self {
            heat.forget(pages);
        }
    }

    /// Notes whether a page that was reported had changed; whether that is news.
    fn note_compared(&mut self, page: u64, changed: bool) -> bool {
        match self {
            // An open page is reported whether or not it was written.
            Self::Async { heat, .. } => !heat.compared(page, changed) || changed,
            _ => true,
        }
    }
}
