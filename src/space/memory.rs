//! The bytes that one server lends, as the executor sees them.

use std::ops::Deref;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::region::Region;
use crate::shm::SharedMemory;
use crate::units::{OutOfRange, checked_range};

/// Bytes of a segment. Ranges were checked against [`Memory::len`] before; one that does
/// not lie within it does nothing.
pub trait Memory {
    /// Bytes, the same for life.
    fn len(&self) -> u64;

    /// Whether there are none, which no segment has.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes out.
    fn read(&self, offset: u64, out: &mut [u8]);

    /// Copies bytes in.
    fn write(&mut self, offset: u64, bytes: &[u8]);

    /// Sets `len` bytes to `byte`.
    fn fill(&mut self, offset: u64, len: u64, byte: u8);

    /// The little-endian word at `offset`, a multiple of 8.
    fn load_u64(&self, offset: u64) -> u64;

    /// Stores the word at `offset`, a multiple of 8, as one.
    fn store_u64(&mut self, offset: u64, value: u64);

    /// Says that bytes were changed, for whoever copies the segment elsewhere.
    fn changed(&mut self, offset: u64, len: u64);

    /// Changes begin that belong together: nobody copies the segment elsewhere before
    /// [`Memory::end`].
    fn begin(&mut self) {}

    /// They are done.
    fn end(&mut self) {}
}

/// Keeps whoever copies a segment away from changes that are half done.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    is_taken: bool,
    /// Whether somebody waits to copy: changes let it go first, else they would keep it
    /// waiting for ever.
    copies: bool,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, blocked: impl Fn(&GateState) -> bool) -> MutexGuard<'_, GateState> {
        let free = self.freed.wait_while(self.state(), |state| blocked(state));
        let mut state = free.unwrap_or_else(PoisonError::into_inner);
        state.is_taken = true;
        state
    }

    fn leave(&self) {
        self.state().is_taken = false;
        self.freed.notify_all();
    }

    /// Runs `copy` while no change is half done, before changes that begin now.
    pub fn between_changes<R>(&self, copy: impl FnOnce() -> R) -> R {
        self.state().copies = true;
        self.take(|state| state.is_taken).copies = false;
        let copied = copy();
        self.leave();
        copied
    }

    fn change(&self) {
        drop(self.take(|state| state.is_taken || state.copies));
    }
}

/// Bytes that are written at once where many are to be the same.
const FILL_BYTES: usize = 4096;

/// A segment that lies at the beginning of a region of this process.
#[derive(Debug)]
pub struct Segment<R> {
    region: R,
    len: u64,
    gate: Option<Arc<Gate>>,
}

impl<R: Deref<Target = Region>> Segment<R> {
    /// The first `len` bytes of `region`. With a gate each change is marked in the region,
    /// for the engine that follows it, and makes those wait who use the gate to commit.
    ///
    /// # Errors
    /// [`OutOfRange`] if the region is shorter.
    pub fn new(region: R, len: u64, gate: Option<Arc<Gate>>) -> Result<Self, OutOfRange> {
        checked_range(0, len, region.size())?;
        Ok(Self { region, len, gate })
    }

    fn store(&mut self, offset: u64, bytes: &[u8]) {
        // The range was checked by who calls: a region is refused nothing else.
        let stored = self.region.write(offset, bytes);
        debug_assert!(stored.is_ok(), "a checked range");
    }
}

impl<R: Deref<Target = Region>> Memory for Segment<R> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, out: &mut [u8]) {
        let read = self.region.read(offset, out);
        debug_assert!(read.is_ok(), "a checked range");
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.store(offset, bytes);
    }

    fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        let block = [byte; FILL_BYTES];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(FILL_BYTES as u64);
            self.store(offset + done, &block[..piece as usize]);
            done += piece;
        }
    }

    fn load_u64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn store_u64(&mut self, offset: u64, value: u64) {
        if let Ok(word) = self.region.atomic_u64(offset) {
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }

    fn changed(&mut self, offset: u64, len: u64) {
        if self.gate.is_some() {
            let marked = self.region.mark_region_changed(offset, len);
            debug_assert!(marked.is_ok(), "a checked range");
        }
    }

    fn begin(&mut self) {
        if let Some(gate) = &self.gate {
            gate.change();
        }
    }

    fn end(&mut self) {
        if let Some(gate) = &self.gate {
            gate.leave();
        }
    }
}

/// A segment that clients on this host map too. Nobody copies it elsewhere.
impl Memory for SharedMemory {
    fn len(&self) -> u64 {
        Self::len(self)
    }

    fn read(&self, offset: u64, out: &mut [u8]) {
        let read = Self::read(self, offset, out);
        debug_assert!(read.is_ok(), "a checked range");
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let written = Self::write(self, offset, bytes);
        debug_assert!(written.is_ok(), "a checked range");
    }

    fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        fill(self, offset, len, byte);
    }

    fn load_u64(&self, offset: u64) -> u64 {
        let word = self.checked_atomic_u64(offset);
        word.map_or(0, |word| u64::from_le(word.load(Ordering::Relaxed)))
    }

    fn store_u64(&mut self, offset: u64, value: u64) {
        if let Ok(word) = self.checked_atomic_u64(offset) {
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }

    fn changed(&mut self, _offset: u64, _len: u64) {}
}

/// Sets bytes of shared memory whose range was checked.
pub fn fill(memory: &SharedMemory, offset: u64, len: u64, byte: u8) {
    let block = [byte; FILL_BYTES];
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(FILL_BYTES as u64);
        let written = memory.write(offset + done, &block[..piece as usize]);
        debug_assert!(written.is_ok(), "a checked range");
        done += piece;
    }
}

/// Memory of this process alone.
impl Memory for Vec<u8> {
    fn len(&self) -> u64 {
        self.as_slice().len() as u64
    }

    fn read(&self, offset: u64, out: &mut [u8]) {
        let from = offset as usize;
        if let Some(bytes) = self.get(from..from.saturating_add(out.len())) {
            out.copy_from_slice(bytes);
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let from = offset as usize;
        if let Some(place) = self.get_mut(from..from.saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
    }

    fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        let from = offset as usize;
        if let Some(place) = self.get_mut(from..from.saturating_add(len as usize)) {
            place.fill(byte);
        }
    }

    fn load_u64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn store_u64(&mut self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    fn changed(&mut self, _offset: u64, _len: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::RegionOptions;
    use crate::units::PAGE_SIZE;

    #[test]
    fn a_region_is_memory_like_any_other() {
        let name = "segment".parse().expect("a name");
        let region = Region::create(&name, 3 * PAGE_SIZE, &RegionOptions::default());
        let mut segment =
            Segment::new(Box::new(region.expect("made")), 2 * PAGE_SIZE, None).expect("shorter");
        let mut plain = vec![0u8; 2 * PAGE_SIZE as usize];
        let both: [&mut dyn Memory; 2] = [&mut segment, &mut plain];
        let seen = both.map(|memory| {
            memory.write(4090, b"over the edge");
            memory.fill(100, 5000, 7);
            memory.store_u64(8, 0x0123_4567_89AB_CDEF);
            memory.changed(0, memory.len());
            let mut all = vec![1; memory.len() as usize];
            memory.read(0, &mut all);
            (memory.load_u64(8), all)
        });
        assert_eq!(seen[0], seen[1]);
        let whole = Segment::new(segment.region, 3 * PAGE_SIZE + 1, None);
        assert!(whole.is_err(), "longer than its region");
    }

    #[test]
    fn nobody_copies_what_is_half_done() {
        let name = "segment".parse().expect("a name");
        let region = Region::create(&name, PAGE_SIZE, &RegionOptions::default());
        let region = Arc::new(region.expect("made"));
        let gate = Arc::new(Gate::default());
        let gates = Some(Arc::clone(&gate));
        let mut segment = Segment::new(Arc::clone(&region), PAGE_SIZE, gates).expect("as long");
        let changes = std::thread::spawn(move || {
            for value in 1..=2000u64 {
                segment.begin();
                segment.store_u64(0, value);
                segment.store_u64(4088, value);
                segment.end();
            }
        });
        let mut copies = 0;
        while !changes.is_finished() || copies == 0 {
            let [first, last] = gate
                .between_changes(|| [0, 4088].map(|at| region.load::<u64>(at).expect("within")));
            assert_eq!(first, last);
            copies += 1;
        }
        changes.join().expect("ended");
    }
}
