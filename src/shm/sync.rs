//! Where the lock-free code takes its atomics from: the standard library, or
//! loom under `--cfg loom`, which runs it under every order of events.

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
