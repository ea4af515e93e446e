//! The only way to touch memory that another process may write.
//!
//! [`SharedMemory`] copies in and out and hands out atomics; it never makes a
//! slice or a reference to plain data, since what another process stores at any
//! moment would make that unsound. [`OwnedMemory`] is memory that nobody but
//! this process can ever write, which the kernel's seals guarantee, and so is a
//! plain slice. [`Lines`] are words for hot paths, checked once when the layout is
//! opened. [`seqlock`] is the protocol by which copies of more than one
//! word are told whole from torn, [`turns`] the one by which guards and commits take
//! turns, [`lives`] the one by which a word that a dead process
//! counts in is given up, [`lease`] that of a lock that can be taken from its holder, [`queue`] the one by which a writer hands marks over, [`count`] that of a
//! counting semaphore, of which [`Semaphore`] is the named kind.
pub mod count;
pub mod lease;
#[cfg(not(loom))]
mod lines;
pub mod lives;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod owned;
#[cfg(not(loom))]
mod page;
pub mod queue;
#[cfg(not(loom))]
mod semaphore;
pub mod seqlock;
pub mod sync;
#[cfg(not(loom))]
mod trust;
pub mod turns;

#[cfg(not(loom))]
pub use lines::{KeptLine, Line, Lines, high_half, prefetch_to_write};
#[cfg(not(loom))]
pub use memory::{SharedMemory, WriteError};
#[cfg(not(loom))]
pub use owned::OwnedMemory;
#[cfg(not(loom))]
pub(crate) use owned::{FIRST_SEALS, LAST_SEALS};
#[cfg(not(loom))]
pub use page::{Ahead, BLOCK};
#[cfg(not(loom))]
pub use semaphore::Semaphore;
#[cfg(not(loom))]
pub use trust::{PeerTrust, TrustedBytes};
