//! Changes of segments on this host by mapping, where their servers let this client.
//!
//! A range is changed stripe by stripe from its front on, as far as that goes without
//! waiting; what is left goes to the servers like any other.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::{PartError, PartsError, SpaceError, Unanswered};
use super::{Failure, Link, Space};
use crate::shm::SharedMemory;
use crate::space::locks::{NotChanged, pieces};
use crate::space::memory::fill;

impl Link {
    /// The segment's memory, if it can be changed and no change that was submitted before
    /// would be overtaken.
    fn to_change(&self) -> Option<&super::local::Local> {
        let local = self.local.as_ref().filter(|local| local.is_writable())?;
        (self.lane.is_idle() && self.lane.loss().is_none()).then_some(local)
    }
}

impl Space {
    /// Copies bytes; how many of them, from the front.
    pub(super) fn write_mapped(&self, offset: u64, bytes: &[u8]) -> Result<usize, SpaceError> {
        let done = self.change_mapped(offset, bytes.len() as u64, |data, at, range| {
            let piece = &bytes[range.start as usize..range.end as usize];
            let written = data.write(at, piece);
            debug_assert!(written.is_ok(), "a range of the map");
        })?;
        Ok(done as usize)
    }

    /// Sets bytes; how many of them, from the front.
    pub(super) fn fill_mapped(&self, offset: u64, len: u64, byte: u8) -> Result<u64, SpaceError> {
        self.change_mapped(offset, len, |data, at, range| {
            fill(data, at, range.end - range.start, byte);
        })
    }

    /// Changes a word by `next`, which may leave it as it is. What was there; none if its
    /// server is to be asked.
    pub(super) fn update_mapped(
        &self,
        offset: u64,
        next: impl Fn(u64) -> Option<u64>,
    ) -> Result<Option<u64>, SpaceError> {
        if !offset.is_multiple_of(8) {
            return Ok(None);
        }
        let mut found = None;
        self.change_mapped(offset, 8, |data, at, _| {
            found = data
                .checked_atomic_u64(at)
                .ok()
                .map(|word| update(word, &next));
        })?;
        Ok(found)
    }

    /// Runs `change` for each piece of a range under its stripe's lock: memory, offset in
    /// the segment, place in the range. How much of the range was changed.
    #[inline]
    fn change_mapped(
        &self,
        offset: u64,
        len: u64,
        mut change: impl FnMut(&SharedMemory, u64, Range<u64>),
    ) -> Result<u64, SpaceError> {
        let mut done = 0;
        // What does not lie in the space is refused where servers are asked.
        for part in self.config.map.split(offset, len).into_iter().flatten() {
            let Some(local) = self.links[part.server].to_change() else {
                break;
            };
            let part_len = part.of_range.end - part.of_range.start;
            for (stripe, piece) in pieces(part.offset, part_len) {
                let in_range = piece.start - part.offset + part.of_range.start
                    ..piece.end - part.offset + part.of_range.start;
                let end = in_range.end;
                let changed =
                    local.change(stripe, |data| change(data, piece.start, in_range.clone()));
                match changed {
                    Ok(()) => done = end,
                    Err(NotChanged::Busy) => return Ok(done),
                    Err(NotChanged::Unknown) => {
                        let range = offset + in_range.start..offset + end;
                        return Err(self.unknown(part.server, range));
                    }
                }
            }
        }
        Ok(done)
    }

    #[cold]
    fn unknown(&self, server: usize, range: Range<u64>) -> SpaceError {
        let at = &self.config.map.servers()[server];
        let why = Failure::Indeterminate {
            why: Unanswered::TakenOver,
        };
        let failed = PartError {
            server: at.name.clone(),
            address: at.address.clone(),
            range,
            why,
        };
        SpaceError::Parts(Box::new(PartsError {
            of: 1,
            failed: vec![failed],
        }))
    }
}

fn update(word: &AtomicU64, next: impl Fn(u64) -> Option<u64>) -> u64 {
    // Nobody else changes it meanwhile: the lock of its stripe is held.
    let found = u64::from_le(word.load(Ordering::Relaxed));
    if let Some(next) = next(found) {
        word.store(next.to_le(), Ordering::Relaxed);
    }
    found
}
