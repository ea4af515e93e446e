//! Marks: ranges that a writer says it has changed.
//!
//! A ring of {offset, length} in the control page, filled by the writer (one
//! thread at a time: the caller holds the region's lock), drained by the engine.
//! When the ring is full, bits are set instead, one for each chunk of pages; so
//! no mark is ever lost, it only gets coarser. In a cooperative region, whose marks come
//! from several processes at once, bits are all there is: setting them needs no order.
//!
//! ```text
//! writer: slot[head % n] = mark, head + 1 ---> engine: take slots tail..head
//! full:   bits |= chunks, overflow = 1   ----> overflow = 0, take and clear bits
//! ```
//! What the engine reads here is hostile input: a distance that no ring has means
//! that everything is marked, a range beyond the region is clipped or dropped.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::control::Control;
use super::layout::*;
use crate::limits::MARK_RING_SLOTS;
use crate::shm::queue;
use crate::units::{PAGE_SIZE, page_of, pages_for};

impl Control {
    /// The writer publishes one mark, a checked range. One thread at a time.
    pub(super) fn push_mark(&self, mark: Range<u64>) {
        if mark.is_empty() {
            return;
        }
        let head_word = self.mem.atomic_u64(MARK_HEAD);
        let tail_word = self.mem.atomic_u64(MARK_TAIL);
        let Some(head) = queue::place(head_word, tail_word, MARK_RING_SLOTS) else {
            return self.push_bits(mark);
        };
        let slot = MARK_RING + (head % MARK_RING_SLOTS) * MARK_SLOT;
        let (offset, len) = (self.mem.atomic_u64(slot), self.mem.atomic_u64(slot + 8));
        offset.store(mark.start, Ordering::Relaxed);
        len.store(mark.end - mark.start, Ordering::Relaxed);
        queue::publish(head_word, head);
    }

    /// The same from any number of threads and processes: the bits of its pages are set,
    /// whichever of them it is of.
    pub(super) fn push_shared_mark(&self, mark: Range<u64>) {
        if !mark.is_empty() {
            self.push_bits(mark);
        }
    }

    #[cold]
    fn push_bits(&self, mark: Range<u64>) {
        let chunk = pages_per_bit(self.max_size());
        let mut bit = page_of(mark.start) / chunk;
        let end = pages_for(mark.end).div_ceil(chunk);
        while bit < end {
            let stop = end.min((bit / 64 + 1) * 64);
            let bits = (u64::MAX >> (64 - (stop - bit))) << (bit % 64);
            let word = self.mem.atomic_u64(MARK_BITMAP + bit / 64 * 8);
            queue::set(word, bits);
            bit = stop;
        }
        queue::announce(self.mem.atomic_u32(MARK_OVERFLOW));
    }

    /// The engine takes all marks, each within `size`, and appends them to `out`: at
    /// most the ring's slots and one for each run of bits.
    pub fn drain_marks(&self, out: &mut Vec<Range<u64>>, size: u64) {
        let tail_word = self.mem.atomic_u64(MARK_TAIL);
        let (tail, count) = queue::filled(self.mem.atomic_u64(MARK_HEAD), tail_word);
        if count > MARK_RING_SLOTS {
            // No writer of ours does this; what it meant is unknown.
            out.push(0..size);
        } else {
            for index in 0..count {
                let place = tail.wrapping_add(index) % MARK_RING_SLOTS;
                let slot = MARK_RING + place * MARK_SLOT;
                let offset = self.mem.atomic_u64(slot).load(Ordering::Relaxed);
                let len = self.mem.atomic_u64(slot + 8).load(Ordering::Relaxed);
                let end = offset.saturating_add(len).min(size);
                if offset < end {
                    out.push(offset..end);
                }
            }
        }
        if count > 0 {
            queue::release(tail_word, tail.wrapping_add(count));
        }
        if queue::announced(self.mem.atomic_u32(MARK_OVERFLOW)) {
            self.take_bits(out, size);
        }
    }

    #[cold]
    fn take_bits(&self, out: &mut Vec<Range<u64>>, size: u64) {
        let bytes_per_bit = pages_per_bit(self.max_size()) * PAGE_SIZE;
        let first = out.len();
        for index in 0..MARK_BITS / 64 {
            let mut bits = queue::take(self.mem.atomic_u64(MARK_BITMAP + index * 8));
            while bits != 0 {
                let bit = index * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                let start = bit.saturating_mul(bytes_per_bit);
                let end = start.saturating_add(bytes_per_bit).min(size);
                match out[first..].last_mut() {
                    Some(last) if last.end == start && start < end => last.end = end,
                    _ if start < end => out.push(start..end),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::{Identity, RegionKind};
    use crate::units::{GIB, MIB};
    use crate::words::RegionId;

    fn control(size: u64) -> Control {
        let identity = Identity {
            name: "marks".parse().unwrap(),
            id: RegionId::random(),
            size,
            max_size: size,
            kind: RegionKind::Source,
        };
        Control::create("marks-test", &identity).unwrap().0
    }

    fn drain(control: &Control) -> Vec<Range<u64>> {
        let mut out = Vec::new();
        control.drain_marks(&mut out, control.size());
        out
    }

    #[test]
    fn marks_come_out_as_they_went_in() {
        let control = control(MIB);
        for round in 0..3 * MARK_RING_SLOTS / 1000 {
            let marks: Vec<_> = (0..1000)
                .map(|i| round + i * 16..round + i * 16 + 4)
                .collect();
            marks
                .iter()
                .for_each(|mark| control.push_mark(mark.clone()));
            assert_eq!(drain(&control), marks);
        }
        control.push_mark(5..5);
        assert!(drain(&control).is_empty());
    }

    #[test]
    fn a_full_ring_degrades_to_chunks_and_loses_nothing() {
        for size in [MIB, 64 * GIB] {
            let control = control(size);
            let chunk = pages_per_bit(size) * PAGE_SIZE;
            for i in 0..MARK_RING_SLOTS {
                control.push_mark(i..i + 1);
            }
            control.push_mark(size - 1..size);
            control.push_mark(chunk * 3 + 1..chunk * 5);
            let marks = drain(&control);
            assert_eq!(marks.len() as u64, MARK_RING_SLOTS + 2);
            assert_eq!(marks[MARK_RING_SLOTS as usize], chunk * 3..chunk * 5);
            assert_eq!(marks.last(), Some(&(size - chunk..size)));
            assert!(drain(&control).is_empty());
            control.push_mark(7..8);
            assert_eq!(drain(&control).len(), 1);
        }
    }

    #[test]
    fn hostile_words_do_no_harm() {
        let control = control(MIB);
        let head = control.mem.atomic_u64(MARK_HEAD);
        head.store(u64::MAX - 5, Ordering::Relaxed);
        assert_eq!(drain(&control).last(), Some(&(0..MIB)));
        assert!(drain(&control).is_empty());
        for (offset, len) in [(u64::MAX, u64::MAX), (MIB, 1), (0, 0), (MIB - 1, u64::MAX)] {
            let place = head.load(Ordering::Relaxed) % MARK_RING_SLOTS;
            let slot = MARK_RING + place * MARK_SLOT;
            control
                .mem
                .atomic_u64(slot)
                .store(offset, Ordering::Relaxed);
            control
                .mem
                .atomic_u64(slot + 8)
                .store(len, Ordering::Relaxed);
            head.fetch_add(1, Ordering::Release);
        }
        assert_eq!(drain(&control).last(), Some(&(MIB - 1..MIB)));
        for word in 0..MARK_BITS / 64 {
            let word = control.mem.atomic_u64(MARK_BITMAP + word * 8);
            word.store(u64::MAX, Ordering::Relaxed);
        }
        control
            .mem
            .atomic_u32(MARK_OVERFLOW)
            .store(u32::MAX, Ordering::Release);
        assert_eq!(drain(&control).last(), Some(&(0..MIB)));
    }

    #[test]
    fn marks_of_a_running_writer_are_all_seen() {
        let control = control(4 * MIB);
        let writer = control.clone();
        let thread = std::thread::spawn(move || {
            (0..200_000u64).for_each(|i| writer.push_mark(i * 20..i * 20 + 1));
        });
        let mut seen = vec![false; 200_000];
        loop {
            let over = thread.is_finished();
            for mark in drain(&control) {
                let first = mark.start.div_ceil(20) as usize;
                let last = (mark.end - 1) / 20;
                (first..=(last as usize).min(199_999)).for_each(|i| seen[i] = true);
            }
            if over {
                break;
            }
        }
        thread.join().unwrap();
        assert!(seen.iter().all(|seen| *seen));
    }
}
