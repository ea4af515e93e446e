//! Regions that this node holds itself: each write is an epoch.

use std::ops::Range;

use super::Engine;
use super::exports;
use super::keys::Key;
use super::regions::Body;
use crate::replicate::CaptureInfo;
use crate::sys::SysError;
use crate::sys::process::realtime_ns;
use crate::track::{ExtentSet, WhenFull};
use crate::units::{PAGE_SIZE, page_of};
use crate::words::EpochKind;

impl Engine {
    /// Gives a region that this node holds `size` bytes, which it has room for, as one
    /// epoch.
    pub(super) fn grow_held(&mut self, key: Key, size: u64) -> Result<(), SysError> {
        let Some(entry) = self.regions.get_mut(key) else {
            return Ok(());
        };
        let Body::Held(memory) = &mut entry.body else {
            return Ok(());
        };
        if size <= entry.size {
            return Ok(());
        }
        memory.grow(size)?;
        entry.size = size;
        entry.publication.grow(size);
        self.change_held(key, 0..0, &[]);
        Ok(())
    }

    /// Writes into a region that this node holds, as one epoch.
    pub(super) fn apply_held(&mut self, key: Key, range: Range<u64>, bytes: &[u8]) {
        if !range.is_empty() {
            self.change_held(key, range, bytes);
        }
    }

    fn change_held(&mut self, key: Key, range: Range<u64>, bytes: &[u8]) {
        let Some(entry) = self.regions.get_mut(key) else {
            return;
        };
        let Body::Held(memory) = &mut entry.body else {
            return;
        };
        let pre = entry.publication.pre_images();
        save_pages(pre, memory, range.clone());
        entry.control.publish_begin();
        memory[range.start as usize..range.end as usize].copy_from_slice(bytes);
        entry.control.set_size(entry.size);
        entry.epoch += 1;
        entry.kind = EpochKind::Cut;
        let mut extents = ExtentSet::new(entry.size);
        extents.insert(range);
        exports::note(&entry.changes, entry.epoch, &extents);
        let source_time_ns = realtime_ns();
        let watched = !entry.readers.is_empty();
        entry
            .control
            .publish(entry.epoch, EpochKind::Cut, source_time_ns, watched);
        entry.statistics.captures += 1;
        entry.statistics.bytes_changed += extents.bytes();
        let info = CaptureInfo {
            epoch: entry.epoch,
            kind: EpochKind::Cut,
            source_time_ns,
        };
        entry.publication.captured(info, &extents, memory);
        self.pump_followers(key);
    }
}

/// Saves the old content of the pages of `range` for updates still being sent.
pub(super) fn save_pages(pre: &mut crate::track::PreImages, content: &[u8], range: Range<u64>) {
    if pre.is_idle() || range.is_empty() {
        return;
    }
    for page in page_of(range.start)..=page_of(range.end - 1) {
        let start = (page * PAGE_SIZE) as usize;
        let end = content.len().min(start + PAGE_SIZE as usize);
        // Writes that are answered never wait: the slowest update starts again instead.
        let _ = pre.before_change(page, &content[start..end], WhenFull::Abort);
    }
}
