//! The short way of a client that has one request at a time and nothing else.
//!
//! ```text
//! Closed --idle, at a send--> Open --send_alone--> InFlight --take_alone--> Done
//!    ^                          ^                     |                      |
//!    |                          '------------ release_lane ------------------'
//!    '------ close_lane: any other call; what is on the lane gets its record
//! ```
//! Such a request always travels in slot 0 and inline. Between finding one answer and
//! handing the next request over nothing happens but what the two need; the account
//! follows while the server works.
//!
//! - I1: while the lane is not closed nothing is in flight, held, granted or unposted
//!   besides the request on it, whose sequence is `next - 1`, and no record is used.
//! - I2: counts are kept as if the answer had been read already; who shows them takes
//!   the one on its way off again.
//! - I3: an answer is taken here only if state and length word are exactly what the
//!   request's own response has to be; everything else is looked at by the long way.

use std::hint::spin_loop;
use std::sync::atomic::Ordering;

use super::Sequence;
use super::batch::Shape;
use super::bytes::{FramePlace, Place, fill_inline};
use super::client::{ClientCore, MIRROR_MASK};
use super::event;
use super::layout::{INLINE_BYTES, line, presence, slot};
use super::record::{Phase, Record, UNKNOWN};
use super::request::Poll;
use super::segment::Segment;
use super::state::{self, Side, State};
use super::waiting::Pace;
use crate::shm::{KeptLine, high_half};
use crate::sys::futex;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Closed,
    Open,
    InFlight,
    Done,
}

/// What a [`ClientCore`] knows of its only request.
#[derive(Debug)]
pub(super) struct Lane {
    on: On,
    /// The length word that slot 0 holds.
    length: u64,
    slot: KeptLine,
    stop: [KeptLine; 2],
    ready: KeptLine,
    consumed: KeptLine,
    /// When the next answer is to be expected.
    pace: Pace,
    pub(super) counters: KeptLine,
}

impl Lane {
    pub(super) fn new(segment: &Segment) -> Lane {
        let keep = |index| segment.lines().keep(index);
        Lane {
            on: On::Closed,
            length: UNKNOWN,
            slot: segment.slots().keep(0),
            stop: [keep(line::CLIENT), keep(line::SERVER)],
            ready: keep(line::REQUEST_READY),
            consumed: keep(line::RESPONSE_CONSUMED),
            pace: Pace::default(),
            counters: keep(line::CLIENT_COUNTERS),
        }
    }

    pub(super) fn is_in_flight(&self) -> bool {
        self.on == On::InFlight
    }

    #[inline]
    pub(super) fn is_done(&self) -> bool {
        self.on == On::Done
    }

    #[inline]
    fn is_stopped(&self) -> bool {
        let [client, server] = &self.stop;
        let stop = |line: &KeptLine| line.0[presence::STOP_WORD].load(Ordering::Acquire);
        (stop(client) | stop(server)) as u32 != 0
    }
}

impl ClientCore {
    /// Hands `bytes` over as the only request and rings the server. None if they do not
    /// lie in a slot or there is something besides: then
    /// [`ClientCore::submit`] says more.
    #[inline]
    pub fn send_alone(&mut self, bytes: &[u8]) -> Option<Sequence> {
        if (self.lane.on != On::Open && !self.open_lane())
            || bytes.len() > INLINE_BYTES
            || self.lane.is_stopped()
        {
            return None;
        }
        let sequence = state::next_lap(self.next, self.mask);
        let slot_line = &self.lane.slot;
        let length = u64::from(slot::IN_SLOT) << 32 | bytes.len() as u64;
        if self.lane.length != length {
            slot_line.0[slot::LENGTH].store(length, Ordering::Relaxed);
        }
        fill_inline(slot_line, bytes);
        state::hand_over(&slot_line.0[slot::STATE], sequence, State::Request);
        self.lane.length = length;
        self.lane.on = On::InFlight;
        self.next = sequence + 1;
        self.written_count += 1;
        self.written_bytes += bytes.len() as u64;
        self.read_count += 1;
        self.completed += 1;
        self.store_counters();
        if self.written_count & MIRROR_MASK == 0 {
            self.segment.mirror(Side::Client);
        }
        let word = &self.lane.ready.0[0];
        if event::post(word) {
            // Refused only for an address that is not mapped.
            let _ = futex::wake_masked(high_half(word), 1, u32::MAX);
        }
        Some(sequence)
    }

    /// Opens the lane if nothing is under way; no lane where each state is to be stored.
    #[inline(never)]
    fn open_lane(&mut self) -> bool {
        let busy = self.outstanding + self.loose + self.held + self.unposted();
        let barred = self.failpoints || self.broken || self.orphan_of != 0;
        // The first request of all has sequence 1, in slot 1.
        let first = self.next == 1;
        if self.lane.on != On::Closed || busy != 0 || self.granted != 0 || barred || first {
            return false;
        }
        // Slot 0 is free, and has been learned of if it ever was used.
        self.lane.length = self.records[0].length;
        self.lane.on = On::Open;
        true
    }

    /// Polls for the answer to `sequence`, that only request, up to `looks` times.
    /// Where it lies, if it is an ordinary response of the request's own length; else
    /// [`ClientCore::poll`] says more.
    #[inline]
    pub fn take_alone(&mut self, sequence: Sequence, looks: u32) -> Option<FramePlace> {
        if self.lane.on != On::InFlight || sequence + 1 != self.next {
            return None;
        }
        let word = &self.lane.slot.0[slot::STATE];
        let pending = state::pack(sequence, State::Request);
        let mut left = looks;
        self.lane.pace.hold_off();
        // SYNC(frame): pairs with the server's `hand_over`.
        let mut found = word.load(Ordering::Acquire);
        while found == pending {
            if left == 0 {
                return None;
            }
            left -= 1;
            // Without it the poll takes the line back from who is about to write it.
            spin_loop();
            found = word.load(Ordering::Acquire);
        }
        self.lane.pace.found_after(looks - left);
        let length = self.lane.slot.0[slot::LENGTH].load(Ordering::Relaxed);
        if found != state::pack(sequence, State::Response) || length != self.lane.length {
            return None;
        }
        self.lane.on = On::Done;
        Some(self.lane_place())
    }

    /// Where the answer on the lane lies.
    #[inline]
    pub(super) fn lane_place(&self) -> FramePlace {
        FramePlace {
            place: Place::Slot(0),
            len: self.lane.length as u32,
        }
    }

    /// Gives back what is done on the lane. False if `sequence` is not that.
    #[inline]
    pub(super) fn release_lane(&mut self, sequence: Sequence) -> bool {
        if self.lane.on != On::Done || sequence + 1 != self.next {
            return false;
        }
        self.lane.on = On::Open;
        // Only a server that drains listens, and it looks again by itself.
        if event::has_waiters(&self.lane.consumed.0[0]) {
            self.ring_consumed();
        }
        true
    }

    /// Gives what is on the lane its record, before anything else is looked at.
    #[inline]
    pub(super) fn close_lane(&mut self) {
        if self.lane.on != On::Closed {
            self.leave_lane();
        }
    }

    #[cold]
    fn leave_lane(&mut self) {
        let on = std::mem::replace(&mut self.lane.on, On::Closed);
        self.records[0].length = self.lane.length;
        self.ticket = self.completed + 1;
        self.oldest = self.next;
        if on == On::Open {
            return;
        }
        let phase = match on {
            On::Done => Phase::Done(Poll::Response),
            _ => Phase::InFlight,
        };
        self.oldest = self.next - 1;
        self.records[0] = Record {
            sequence: self.next - 1,
            phase,
            capacity: INLINE_BYTES as u32,
            len: self.lane.length as u32,
            batch: Shape::default(),
            place: None,
            length: self.lane.length,
        };
        if phase == Phase::InFlight {
            self.outstanding += 1;
            self.completed -= 1;
            self.read_count -= 1;
            self.ticket -= 1;
        } else {
            self.held += 1;
        }
    }
}
