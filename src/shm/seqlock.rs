//! A sequence lock over one 64-bit version: one writer, any number of readers.
//!
//! | version | meaning |
//! |---|---|
//! | `epoch << 1` | the data is that of `epoch` |
//! | `epoch << 1 \| 1` | the writer is changing the data; it was that of `epoch` |
//!
//! ```text
//! writer:  begin(v) -> change the data -> end(v, epoch)
//! reader:  read_begin(v) -> copy the data -> read_validate(v, begun)? else again
//! ```
//! The data is read and written by relaxed atomics or by instructions that the
//! compiler does not look into ([`super::SharedMemory`]); a reader uses its copy
//! only once it was validated. A writer that dies in the middle leaves the
//! version odd for ever: readers bound their tries.
//!
//! Invariant I1: between two equal even versions read by `read_begin` and
//! `read_validate` no data was changed.

use super::sync::{AtomicU64, Ordering, fence};

/// The version of data that stands at `epoch`.
pub const fn version_of(epoch: u64) -> u64 {
    epoch << 1
}

/// The epoch of a version, busy or not.
pub const fn epoch_of(version: u64) -> u64 {
    version >> 1
}

/// Whether the version says that the data is being changed.
pub const fn is_busy(version: u64) -> bool {
    version & 1 == 1
}

/// The writer is about to change the data. Harmless if it was said already.
pub fn begin(version: &AtomicU64) {
    let now = version.load(Ordering::Relaxed);
    version.store(now | 1, Ordering::Relaxed);
    // SYNC(seqlock_busy): no change of the data is seen before the busy bit;
    // pairs with the fence in `read_validate`.
    fence(Ordering::Release);
}

/// The data is whole and that of `epoch`.
pub fn end(version: &AtomicU64, epoch: u64) {
    // SYNC(seqlock_epoch): publishes the data; pairs with the load in `read_begin`.
    version.store(version_of(epoch), Ordering::Release);
}

/// The version to read under, or `None` while the data is being changed.
pub fn read_begin(version: &AtomicU64) -> Option<u64> {
    // SYNC(seqlock_epoch): pairs with the store in `end`.
    let now = version.load(Ordering::Acquire);
    (!is_busy(now)).then_some(now)
}

/// Whether what was copied since [`read_begin`] answered `begun` is whole.
pub fn read_validate(version: &AtomicU64, begun: u64) -> bool {
    // SYNC(seqlock_busy): what was copied is older than the version read below;
    // pairs with the fence in `begin`.
    fence(Ordering::Acquire);
    version.load(Ordering::Relaxed) == begun
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_change_between_begin_and_validate_is_noticed() {
        let version = AtomicU64::new(version_of(7));
        let begun = read_begin(&version).expect("not busy");
        assert!(read_validate(&version, begun));
        begin(&version);
        begin(&version);
        assert_eq!(read_begin(&version), None);
        assert!(!read_validate(&version, begun));
        assert_eq!(epoch_of(version.load(Ordering::Relaxed)), 7);
        end(&version, 8);
        assert!(!read_validate(&version, begun));
        assert_eq!(read_begin(&version).map(epoch_of), Some(8));
    }
}
