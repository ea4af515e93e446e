//! Regions: named memory in one memfd, with a control page beside it.
//!
//! ```text
//! writer process                     engine                      reader process
//! Region ---- data memfd (rw, sealed) --------> twin
//!   |         control memfd (rw) <------------> Control
//!   |         doorbell, pulse                      |
//!   '- marks, guard, commit request                '--> replica data ---> RegionReader
//!                                                       control (ro) --->   hold page
//! ```
//! The data is sealed so that the writer's one mapping is the only writable one
//! there ever is; whoever comes after it makes new memory with the old content
//! and a new generation. The control memfd is sealed against resizing only: the
//! writer and the engine both write it, and each takes what it reads there for
//! hostile input. A cooperative region has several `Region`s over the same two memfds,
//! in as many processes; its data is sealed against resizing only.
//!
//! - I1: offsets and lengths are checked against the size that the control page tells,
//!   copied out and bounded by the identity; never against `fstat`. A size that is new
//!   counts once the file was seen to have so much: it never gets less (see *Growth*).
//! - I2: no word of the control page is used to index memory before it was
//!   copied and bounded.
//! - I3: data is never given out as a slice: views and typed fields copy.
//!
//! # Growth
//! A region with a `max_size` has address space for it from the beginning, on all sides.
//! ```text
//! writer   file longer -> size word -> stores behind the old end
//! engine   capture begins: size word -> is the file so long? -> twin longer
//!            async   armed and compared from the old end on, the pages of which may have
//!                    been stored to before they were armed; then the scan goes on
//!            sync    all of `max_size` is armed at the first cut; the size is read
//!                    after the cut, so no page of the cut lies behind it
//! replica  is told the size before the first update that has it, grows its file, and
//!          shows the size with that update's epoch
//! ```
//! The data of such a region is sealed against shrinking and writing, but neither against
//! growing nor against further seals before it has its greatest size.
//!
//! When the engine dies, commits fail with [`RegionError::EngineGone`] and readers
//! with [`ReadError::SourceGone`] within a millisecond: its pulse stops.

mod control;
mod epoch;
mod guard;
mod hold;
mod layout;
mod marks;
mod pulse;
mod reader;
#[cfg(test)]
mod reader_tests;
mod sparse;
mod view;
mod writer;
#[cfg(test)]
mod writer_tests;

pub use control::{Control, GuardState, Identity, RegionKind, Stats};
pub use epoch::Epoch;
pub use guard::WriteGuard;
pub use hold::HoldPage;
pub use pulse::{Pulse, PulseHolder};
pub use reader::{Digest32, ReadEpoch, ReadError, RegionReader};
pub use view::{Typed, View, field_len};
pub use writer::{EngineLink, Region, RegionOptions};

use crate::limits::{MAX_ACKED_SLOTS, MAX_REGION_BYTES};
use crate::shm::WriteError;
use crate::sys::SysError;
use crate::sys::memfd::HUGE_PAGE;
use crate::units::OutOfRange;

/// What failed about a region.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// A size that no region has.
    #[error("a region of {size} bytes; 1 to {MAX_REGION_BYTES} are possible")]
    Size {
        /// Size that was asked for, in bytes.
        size: u64,
    },
    /// A greatest size below the size.
    #[error("a region of {size} bytes whose greatest size is {max_size} bytes")]
    MaxSize {
        /// Size that was asked for, in bytes.
        size: u64,
        /// Greatest size that was asked for, in bytes.
        max_size: u64,
    },
    /// Huge pages that the system does not give.
    #[error("a region of {pages} huge pages of {HUGE_PAGE} bytes")]
    Huge {
        /// Pages that were asked for.
        pages: u64,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// A size that is no multiple of the pages'.
    #[error("{size} bytes are no multiple of {HUGE_PAGE}, the size of the region's pages")]
    HugeSize {
        /// Size that was asked for, in bytes.
        size: u64,
    },
    /// Huge pages in a mode that works on small ones.
    #[error("mode sync opens and saves single small pages; use it without huge pages, or async")]
    HugeMode,
    /// An option that only a region with one writer has.
    #[error("a cooperative region has no {0}; leave it out, or make the region exclusive")]
    NotCooperative(
        /// The option's name.
        &'static str,
    ),
    /// Growth beyond the greatest size.
    #[error(
        "cannot grow to {size} bytes; the region was made with a greatest size of \
         {max_size} bytes"
    )]
    BeyondMax {
        /// Size that was asked for, in bytes.
        size: u64,
        /// Greatest size, in bytes.
        max_size: u64,
    },
    /// A size below the present one.
    #[error("cannot shrink to {size} bytes; the region has {present} bytes and never gets smaller")]
    Shrink {
        /// Size that was asked for, in bytes.
        size: u64,
        /// Size that the region has, in bytes.
        present: u64,
    },
    /// A range that does not lie within the region.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// A write that was refused.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The kernel refused.
    #[error("{action}")]
    Sys {
        /// What was attempted.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// Memory that somebody passed is not what it should be.
    #[error("the memory that was passed is not a {page}: {problem}")]
    Foreign {
        /// What it should be.
        page: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// No engine is connected, or it died before it answered. What was stored is
    /// in the region; commit again once a new one is connected.
    #[error("no engine answers for this region")]
    EngineGone,
    /// The deadline passed.
    #[error("not done within the deadline")]
    TimedOut,
    /// The calling thread holds a guard of this region and would wait for itself:
    /// use [`WriteGuard::commit`].
    #[error("this thread holds a write guard of the region that it commits")]
    OwnGuard,
    /// More guards or commits at the same time than a word can count.
    #[error("too many write guards at the same time")]
    TooManyGuards,
    /// More replicas than the control page tells about.
    #[error("{replicas} replicas to wait for; at most {MAX_ACKED_SLOTS} can be")]
    Replicas {
        /// Number that was asked for.
        replicas: usize,
    },
    /// The region started a new life, in which older epochs mean nothing.
    #[error("the region's generation changed")]
    GenerationChanged,
}

fn sys(action: &'static str) -> impl Fn(SysError) -> RegionError {
    move |source| RegionError::Sys { action, source }
}
