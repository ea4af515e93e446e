//! Buffers that the kernel receives into: on the heap, or blocks of a pool of huge pages.
//!
//! ```text
//! pool:  slab 0 [block|block|...|rest]  slab 1 [block|block|...|rest] ...
//!                  ^ take() the lowest free one, drop gives it back
//! ```
//! Bulk data passes through the same few memory again and again: fresh memory costs
//! more to fault in and zero than the data costs to copy. A slab that was not
//! used for a while goes back to the kernel.
//!
//! Invariants:
//! * I1: a block's bytes are reached through its one [`Block`] only: it stands on its
//!   slab's free list or belongs to one `Block`, never both.
//! * I2: a slab is unmapped only while all its blocks are free.
//! * I3: the first `len` bytes of a block are initialised (a slab starts as zeros).
#![allow(
    unsafe_code,
    reason = "several owned blocks in one mapping, and lengths that the kernel tells"
)]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::map::PrivateMemory;
use crate::units::{MIB, PAGE_SIZE};

/// Bytes of one slab: whole huge pages, few enough to be given back piece by piece.
const SLAB_BYTES: u64 = 16 * MIB;

/// A bounded pool of blocks of equal size. Clones are the same pool.
///
/// Memory: `max_bytes` at most, in slabs of 16 MiB; see [`Pool::bytes`].
#[derive(Clone, Debug)]
pub struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    block_bytes: usize,
    max_slabs: usize,
    slabs: Mutex<Vec<Option<Slab>>>,
}

#[derive(Debug)]
struct Slab {
    /// Keeps it mapped; its bytes are reached through `base` only (I1).
    _memory: PrivateMemory,
    base: NonNull<u8>,
    /// Blocks that nobody has.
    free: Vec<u32>,
    /// Calls of [`Pool::trim`] since a block was taken.
    idle: u32,
}

// SAFETY: required: a slab may be used from any thread. It owns its memory, which is
// `Send`; `base` points into that and is used under the pool's lock only.
unsafe impl Send for Slab {}

impl Pool {
    /// A pool of blocks of at least `block_bytes`, which takes nothing before it is used.
    pub fn new(block_bytes: u64, max_bytes: u64) -> Pool {
        let block_bytes = block_bytes.next_multiple_of(PAGE_SIZE).min(SLAB_BYTES);
        Pool {
            shared: Arc::new(Shared {
                block_bytes: block_bytes as usize,
                max_slabs: (max_bytes / SLAB_BYTES) as usize,
                slabs: Mutex::new(Vec::new()),
            }),
        }
    }

    /// An empty block; `None` if the pool is used up or memory is not to be had.
    pub fn take(&self) -> Option<Block> {
        let mut slabs = self.lock();
        let free = |slab: &Option<Slab>| slab.as_ref().is_some_and(|slab| !slab.free.is_empty());
        let at = match slabs.iter().position(free) {
            Some(at) => at,
            None => {
                let at = match slabs.iter().position(Option::is_none) {
                    Some(at) => at,
                    None if slabs.len() < self.shared.max_slabs => {
                        slabs.push(None);
                        slabs.len() - 1
                    }
                    None => return None,
                };
                slabs[at] = Some(self.slab()?);
                at
            }
        };
        let slab = slabs[at].as_mut()?;
        let index = slab.free.pop()?;
        slab.idle = 0;
        let start = index as usize * self.shared.block_bytes;
        // SAFETY: required: within the slab. Only whole blocks of it have an index.
        let ptr = unsafe { slab.base.add(start) };
        Some(Block {
            ptr,
            len: 0,
            capacity: self.shared.block_bytes,
            slab: at,
            index,
            pool: self.clone(),
        })
    }

    /// Bytes of memory that the pool holds, used or kept.
    pub fn bytes(&self) -> u64 {
        self.lock().iter().flatten().count() as u64 * SLAB_BYTES
    }

    /// Gives slabs back of which nothing was used in the last `kept` calls.
    pub fn trim(&self, kept: u32) {
        let most = SLAB_BYTES as usize / self.shared.block_bytes;
        for place in self.lock().iter_mut() {
            if let Some(slab) = place {
                let whole = slab.free.len() == most;
                slab.idle = if whole {
                    slab.idle.saturating_add(1)
                } else {
                    0
                };
                if whole && slab.idle > kept {
                    *place = None;
                }
            }
        }
    }

    fn slab(&self) -> Option<Slab> {
        let mut memory = PrivateMemory::new(SLAB_BYTES).ok()?;
        memory.advise_huge(0..SLAB_BYTES);
        let base = NonNull::from(&mut *memory).cast();
        let blocks = SLAB_BYTES as usize / self.shared.block_bytes;
        Some(Slab {
            _memory: memory,
            base,
            free: (0..blocks as u32).rev().collect(),
            idle: 0,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Slab>>> {
        // Nothing below can leave the list half changed.
        let slabs = self.shared.slabs.lock();
        slabs.unwrap_or_else(PoisonError::into_inner)
    }
}

/// A block of a [`Pool`]; dropping it gives it back.
#[derive(Debug)]
pub struct Block {
    ptr: NonNull<u8>,
    len: usize,
    capacity: usize,
    slab: usize,
    index: u32,
    pool: Pool,
}

// SAFETY: required: a block may be used from any one thread, and read from several. It
// owns its bytes (I1) as a `Vec<u8>` does, and the pool is `Send` and `Sync`.
unsafe impl Send for Block {}
// SAFETY: as for `Send`; shared access gives `&[u8]` only.
unsafe impl Sync for Block {}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: required: `len` initialised bytes that nobody changes while the slice
        // lives. I1, I3; the slab stays mapped while this block is taken (I2).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut slabs = self.pool.lock();
        if let Some(Some(slab)) = slabs.get_mut(self.slab) {
            slab.free.push(self.index);
        }
    }
}

/// Bytes that grow up to a capacity.
#[derive(Debug)]
pub enum Buffer {
    /// Memory of its own.
    Heap(Vec<u8>),
    /// A block of a pool.
    Block(Block),
}

impl Buffer {
    /// How long it can get without being moved.
    pub fn capacity(&self) -> usize {
        match self {
            Buffer::Heap(bytes) => bytes.capacity(),
            Buffer::Block(block) => block.capacity,
        }
    }

    /// Appends `bytes`.
    ///
    /// # Panics
    /// If they do not fit a block.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        match self {
            Buffer::Heap(own) => own.extend_from_slice(bytes),
            Buffer::Block(block) => {
                let from = block.len;
                assert!(bytes.len() <= block.capacity - from, "a block has its size");
                block.len += bytes.len();
                block[from..].copy_from_slice(bytes);
            }
        }
    }

    /// Removes what lies behind the first `len` bytes, if anything.
    pub fn truncate(&mut self, len: usize) {
        match self {
            Buffer::Heap(bytes) => bytes.truncate(len),
            Buffer::Block(block) => block.len = block.len.min(len),
        }
    }

    /// Removes the first `count` bytes.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn drain_front(&mut self, count: usize) {
        match self {
            Buffer::Heap(bytes) => drop(bytes.drain(..count)),
            Buffer::Block(block) => {
                block.copy_within(count.., 0);
                block.len -= count;
            }
        }
    }

    /// Where the bytes behind the last one go.
    pub(super) fn end_ptr(&mut self) -> *mut u8 {
        match self {
            Buffer::Heap(bytes) => bytes.spare_capacity_mut().as_mut_ptr().cast(),
            // SAFETY: required: at most one past the end of the block. `len` <= `capacity`.
            Buffer::Block(block) => unsafe { block.ptr.as_ptr().add(block.len) },
        }
    }

    /// Counts `count` more bytes in.
    ///
    /// # Safety
    /// They fit the capacity and were written at [`Buffer::end_ptr`].
    pub(super) unsafe fn grow(&mut self, count: usize) {
        match self {
            // SAFETY: the caller's promise.
            Buffer::Heap(bytes) => unsafe { bytes.set_len(bytes.len() + count) },
            Buffer::Block(block) => block.len += count,
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Buffer::Heap(bytes) => bytes,
            Buffer::Block(block) => block,
        }
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Buffer::Heap(Vec::new())
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Buffer::Heap(bytes)
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Buffer::Heap(self.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_apart_come_back_and_are_bounded() {
        let pool = Pool::new(300_000, 2 * SLAB_BYTES);
        assert_eq!(pool.bytes(), 0);
        let per_slab = SLAB_BYTES as usize / 303_104;
        let mut blocks: Vec<Buffer> = std::iter::from_fn(|| pool.take())
            .map(Buffer::Block)
            .collect();
        assert_eq!(blocks.len(), 2 * per_slab);
        assert_eq!(pool.bytes(), 2 * SLAB_BYTES);
        for (number, block) in blocks.iter_mut().enumerate() {
            assert!(block.is_empty() && block.capacity() == 303_104);
            block.extend_from_slice(&vec![number as u8; 303_104]);
        }
        for (number, block) in blocks.iter().enumerate() {
            assert!(block.iter().all(|byte| *byte == number as u8));
        }
        pool.trim(0);
        assert_eq!(pool.bytes(), 2 * SLAB_BYTES, "what is used stays");
        blocks.truncate(1);
        assert!(pool.take().is_some_and(|block| block.is_empty()));
        pool.trim(1);
        assert_eq!(pool.bytes(), 2 * SLAB_BYTES, "it may be wanted again soon");
        pool.trim(1);
        assert_eq!(pool.bytes(), SLAB_BYTES);
        drop(blocks);
        pool.trim(0);
        assert_eq!(pool.bytes(), 0);
        assert!(pool.take().is_some());
    }

    #[test]
    fn both_kinds_behave_alike() {
        let pool = Pool::new(4_000, SLAB_BYTES);
        let kinds = [Buffer::Block(pool.take().unwrap()), Vec::new().into()];
        for mut buffer in kinds {
            buffer.extend_from_slice(b"first, ");
            buffer.extend_from_slice(b"second");
            buffer.drain_front(7);
            buffer.extend_from_slice(b" third");
            buffer.truncate(6);
            buffer.truncate(100);
            assert_eq!(&buffer[..], b"second");
            assert_eq!(&buffer.clone()[..], b"second");
        }
        let none = Pool::new(4_000, SLAB_BYTES - 1);
        assert!(none.take().is_none());
    }
}
