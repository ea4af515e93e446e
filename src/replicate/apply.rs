//! A checked update, and its way into a replica's memory in bounded steps.

use crate::limits::STREAM_COPY_MIN;
use crate::sys::buffer::Buffer;
use crate::sys::copy;
use crate::wire::{ExtentReader, WireExtent};
use crate::words::EpochKind;

/// One body as received; its extents begin at `from`.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) body: Buffer,
    pub(super) from: usize,
}

/// An update that was checked whole (or a piece of one that goes in place).
///
/// The bodies are kept as they were received; nothing is copied before it is applied.
#[derive(Clone, Debug)]
pub struct Update {
    /// The epoch that the replica has once it is applied.
    pub epoch: u64,
    /// What the epoch promises.
    pub kind: EpochKind,
    /// When the source made it, nanoseconds of its real-time clock.
    pub source_time_ns: u64,
    /// Bytes of all its extents.
    pub data_bytes: u64,
    pub(super) size: u64,
    pub(super) parts: Vec<Part>,
}

impl Update {
    /// Its extents, sorted and disjoint.
    pub fn extents(&self) -> impl Iterator<Item = WireExtent<'_>> {
        let reader = |part| ExtentReader::new(body_of(part), self.size, 0);
        self.parts.iter().flat_map(reader).flatten()
    }

    /// Bytes of memory that the bodies hold.
    pub fn staged_bytes(&self) -> u64 {
        let bodies = self.parts.iter().map(|part| part.body.capacity() as u64);
        bodies.sum()
    }
}

fn body_of(part: &Part) -> &[u8] {
    part.body.get(part.from..).unwrap_or(&[])
}

/// Applies an [`Update`] a few bytes at a time, so that no turn of a loop is held.
#[derive(Debug)]
pub struct ApplyJob {
    update: Update,
    part: usize,
    /// Where in the part's extents the next one begins.
    at: usize,
    /// Bytes of that extent which are written already.
    done: usize,
}

impl ApplyJob {
    /// A job that has done nothing yet.
    pub fn new(update: Update) -> Self {
        Self {
            update,
            part: 0,
            at: 0,
            done: 0,
        }
    }

    /// What is applied.
    pub fn update(&self) -> &Update {
        &self.update
    }

    /// Writes about `budget_bytes` more to `dst`, the whole region; true when all is
    /// written. At least one extent's piece is written in each step, and a part's
    /// memory is freed once it is written.
    pub fn step(&mut self, dst: &mut [u8], budget_bytes: u64) -> bool {
        let mut budget = usize::try_from(budget_bytes).unwrap_or(usize::MAX).max(1);
        while let Some(part) = self.update.parts.get_mut(self.part) {
            let body = body_of(part);
            let mut reader = ExtentReader::new(&body[self.at..], self.update.size, 0);
            let Some(Ok(extent)) = reader.next() else {
                // The end: an extent that is refused was refused before staging too.
                part.body = Buffer::default();
                (self.part, self.at, self.done) = (self.part + 1, 0, 0);
                continue;
            };
            if budget == 0 {
                return false;
            }
            let rest = &extent.bytes[self.done..];
            let piece = &rest[..rest.len().min(budget)];
            let start = extent.offset as usize + self.done;
            if let Some(out) = dst.get_mut(start..start + piece.len()) {
                if self.update.data_bytes >= STREAM_COPY_MIN {
                    copy::stream(out, piece);
                } else {
                    out.copy_from_slice(piece);
                }
            }
            // An extent's header costs about as much as a cache line of content.
            budget = budget.saturating_sub(piece.len() + 64);
            self.done += piece.len();
            if self.done == extent.bytes.len() {
                self.at = body.len() - reader.rest_len();
                self.done = 0;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{FrameBuilder, HEADER_BYTES, Kind};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn steps_of_any_size_write_the_same(
            gaps in proptest::collection::vec((0u64..50, 1usize..300, any::<bool>()), 1..30),
            steps in proptest::collection::vec(1u64..700, 1..20),
        ) {
            const SIZE: usize = 16_384;
            let mut model = vec![0u8; SIZE];
            let mut parts = Vec::new();
            let mut frame = FrameBuilder::new(Kind::UpdateChunk, 0, 1, 1);
            let mut at = 0;
            for (i, (gap, len, cut)) in gaps.into_iter().enumerate() {
                at += gap;
                let bytes = vec![i as u8 + 1; len];
                frame.extent(at, &bytes);
                model[at as usize..at as usize + len].copy_from_slice(&bytes);
                at += len as u64;
                if cut {
                    let next = FrameBuilder::new(Kind::UpdateChunk, 0, 1, 1);
                    let body = std::mem::replace(&mut frame, next).finish();
                    parts.push(Part { body: body.into(), from: HEADER_BYTES });
                }
            }
            parts.push(Part { body: frame.finish().into(), from: HEADER_BYTES });
            let update = Update {
                epoch: 1,
                kind: EpochKind::Cut,
                source_time_ns: 0,
                data_bytes: 0,
                size: SIZE as u64,
                parts,
            };
            let mut job = ApplyJob::new(update);
            let mut dst = vec![0u8; SIZE];
            let mut turns = 0;
            while !job.step(&mut dst, steps[turns % steps.len()]) {
                turns += 1;
                prop_assert!(turns < 100_000);
            }
            prop_assert_eq!(dst, model);
        }
    }
}
