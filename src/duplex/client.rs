//! The client's side of a channel: it places requests, learns of answers, and
//! gives the space back.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use super::batch::Shape;
use super::bytes::{FrameBytes, FramePlace, Place, fill_inline};
use super::completion::{self, Found};
use super::failpoint::Failpoint;
use super::lane::Lane;
use super::layout::{INLINE_BYTES, LINES_AHEAD, block, client_counter, line, presence, slot};
use super::record::{Phase, Record, Taken, UNKNOWN};
use super::request::{AcquireError, Grant, Options, Poll, Room};
use super::segment::Segment;
use super::space::{Placed, Space};
use super::state::{self, Answer, Side, State};
use super::{ErrorCode, Sequence, event};
use crate::limits::MAX_CHANNEL_ERROR_BYTES;
use crate::shm::{Lines, high_half};
use crate::sys::futex;
use crate::units::OutOfRange;

/// The OIEBs are brought up to date once in so many requests, less 1.
pub(super) const MIRROR_MASK: u64 = 1023;

/// The client's side. One per channel.
///
/// Memory: 96 bytes per slot and 24 per block, besides the channel's own.
#[derive(Debug)]
pub struct ClientCore {
    pub(super) segment: Segment,
    pub(super) lines: Lines,
    pub(super) slots: Lines,
    pub(super) mask: u64,
    pub(super) failpoints: bool,
    pub(super) broken: bool,
    /// The generation whose server died; 0 = none.
    pub(super) orphan_of: u64,
    /// A new server is being given the memory: nothing is sent until it has it.
    pub(super) taking_over: bool,
    pub(super) records: Box<[Record]>,
    pub(super) space: Space,
    /// Sequence of the next request.
    pub(super) next: Sequence,
    /// Grants given out and not published.
    pub(super) granted: u64,
    /// Nothing below it is in flight.
    pub(super) oldest: Sequence,
    /// Published since the server was last rung.
    unposted: u32,
    /// In flight or unwanted: what the server still pushes a completion for.
    pub(super) outstanding: u32,
    /// One-way or unwanted: what may give itself back.
    pub(super) loose: u32,
    /// Finished and not released.
    pub(super) held: u32,
    /// Completions learned of.
    pub(super) completed: u64,
    /// Next ticket of the completion ring.
    pub(super) ticket: u64,
    pub(super) written_count: u64,
    pub(super) written_bytes: u64,
    pub(super) read_count: u64,
    /// Finished when the server was found dead, and not yet told by `poll_any`.
    pub(super) finished: VecDeque<Sequence>,
    /// The only request, while there is one at a time.
    pub(super) lane: Lane,
}

impl ClientCore {
    /// The client's side of new memory.
    pub fn new(segment: &Segment) -> ClientCore {
        let core = ClientCore::spare(segment);
        segment.join(Side::Client);
        core.store_counters();
        core
    }

    /// What stands in the place of one that was moved elsewhere; it touches nothing.
    pub(crate) fn spare(segment: &Segment) -> ClientCore {
        let geometry = segment.geometry();
        let free = Record {
            sequence: 0,
            phase: Phase::Free,
            capacity: 0,
            len: 0,
            batch: Shape::default(),
            place: None,
            length: UNKNOWN,
        };
        let slots = geometry.slots as usize;
        ClientCore {
            segment: segment.clone(),
            lines: segment.lines().clone(),
            slots: segment.slots().clone(),
            mask: u64::from(geometry.slots) - 1,
            failpoints: segment.has_failpoints(),
            broken: false,
            orphan_of: 0,
            taking_over: false,
            records: vec![free; slots].into_boxed_slice(),
            space: Space::new(geometry.payload_size, slots),
            next: 1,
            granted: 0,
            oldest: 1,
            unposted: 0,
            outstanding: 0,
            loose: 0,
            held: 0,
            completed: 0,
            ticket: 1,
            written_count: 0,
            written_bytes: 0,
            read_count: 0,
            finished: VecDeque::new(),
            lane: Lane::new(segment),
        }
    }

    /// The memory.
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// Largest request, capacity for the response included, that ever fits, in bytes.
    pub fn largest(&self) -> u64 {
        self.space.largest().max(INLINE_BYTES as u64)
    }

    /// Requests whose response is awaited.
    pub fn in_flight(&self) -> u32 {
        self.outstanding + u32::from(self.lane.is_in_flight())
    }

    /// Places `bytes` as a request, to be handed over by [`ClientCore::kick`].
    ///
    /// # Errors
    /// [`AcquireError`].
    #[inline]
    pub fn submit(&mut self, bytes: &[u8], options: Options) -> Result<Sequence, AcquireError> {
        self.close_lane();
        let capacity = bytes.len().max(options.capacity);
        self.reserve(capacity)?;
        if capacity <= INLINE_BYTES {
            self.pass(Failpoint::ClientWriting);
            let index = (self.next & self.mask) as usize;
            fill_inline(self.slots.line(index), bytes);
            let flags = flags(options.one_way);
            return Ok(self.complete(bytes.len() as u32, INLINE_BYTES as u32, flags, None));
        }
        let mut grant = self.place(bytes.len(), capacity, options.one_way)?;
        // The range is the grant's own.
        let _ = self.write(&mut grant, 0, bytes);
        Ok(self.publish(grant))
    }

    /// Room for a request of `len` bytes, to be filled in and published. The order of
    /// requests is that of publishing.
    ///
    /// # Errors
    /// [`AcquireError`].
    pub fn acquire(&mut self, len: usize, options: Options) -> Result<Grant, AcquireError> {
        self.close_lane();
        let capacity = len.max(options.capacity);
        self.reserve(capacity)?;
        let grant = if capacity <= INLINE_BYTES {
            Grant {
                len: len as u32,
                capacity: INLINE_BYTES as u32,
                one_way: options.one_way,
                room: Room::Inline([0; INLINE_BYTES]),
            }
        } else {
            self.place(len, capacity, options.one_way)?
        };
        self.grant_one();
        Ok(grant)
    }

    /// Copies `bytes` to `offset` of a request.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within its length.
    pub fn write(&self, grant: &mut Grant, offset: usize, bytes: &[u8]) -> Result<(), OutOfRange> {
        let range =
            crate::units::checked_range(offset as u64, bytes.len() as u64, u64::from(grant.len))?;
        match &mut grant.room {
            Room::Inline(room) => {
                room[range.start as usize..range.end as usize].copy_from_slice(bytes);
                Ok(())
            }
            Room::Payload { data, .. } => self
                .segment
                .frame_bytes(FramePlace {
                    place: Place::Payload(*data),
                    len: grant.len,
                })
                .write(offset, bytes),
        }
    }

    /// Completes a request, to be handed over by [`ClientCore::kick`].
    pub fn publish(&mut self, grant: Grant) -> Sequence {
        self.ungrant_one();
        self.pass(Failpoint::ClientWriting);
        let place = match grant.room {
            Room::Inline(room) => {
                let index = (self.next & self.mask) as usize;
                fill_inline(self.slots.line(index), &room[..grant.len as usize]);
                None
            }
            Room::Payload { block, data } => Some((block, data)),
        };
        self.complete(grant.len, grant.capacity, flags(grant.one_way), place)
    }

    /// Gives the room of a request back that is not sent after all.
    pub fn abandon(&mut self, grant: Grant) {
        self.ungrant_one();
        if let Room::Payload { block, .. } = grant.room {
            self.space.release(block);
        }
    }

    /// Hands over all requests since the last time and rings the server for them. True
    /// if it had to be woken.
    #[inline]
    pub fn kick(&mut self) -> bool {
        if self.unposted == 0 {
            return false;
        }
        let count = std::mem::take(&mut self.unposted);
        let begun = self.next - u64::from(count);
        for sequence in state::hand_over_order(begun, self.next, self.mask) {
            let index = (sequence & self.mask) as usize;
            let word = &self.slots.line(index).0[slot::STATE];
            state::hand_over(word, sequence, State::Request);
        }
        self.store_counters();
        if self.next & MIRROR_MASK < u64::from(count) {
            self.segment.mirror(Side::Client);
        }
        self.pass(Failpoint::ClientPost);
        let word = &self.lines.line(line::REQUEST_READY).0[0];
        let wake = event::post(word);
        if wake {
            // One sleeper per request; they are workers of one process.
            let _ = futex::wake_masked(high_half(word), count, u32::MAX);
        }
        wake
    }

    /// What became of a request.
    #[inline]
    pub fn poll(&mut self, sequence: Sequence) -> Poll {
        self.close_lane();
        self.kick();
        let index = (sequence & self.mask) as usize;
        let record = &self.records[index];
        match record.phase {
            Phase::InFlight if record.sequence == sequence => self.look(index),
            Phase::Done(poll) if record.sequence == sequence => poll,
            _ => Poll::Unknown,
        }
    }

    /// Fetches the second half of the slot of `sequence`, while its state is polled.
    #[inline]
    pub fn prefetch(&self, sequence: Sequence) {
        let index = (sequence & self.mask) as usize;
        self.slots.line(index).prefetch_second_half();
    }

    /// The oldest request in flight, if it is the next to be expected.
    #[inline]
    pub fn oldest(&mut self) -> Option<Sequence> {
        self.close_lane();
        if self.outstanding == 0 {
            return None;
        }
        while self.oldest < self.next {
            let record = &self.records[(self.oldest & self.mask) as usize];
            if record.sequence == self.oldest && record.phase == Phase::InFlight {
                return Some(self.oldest);
            }
            self.oldest += 1;
        }
        None
    }

    /// A request that was finished since the last time, whichever it is; its outcome
    /// is what [`ClientCore::poll`] says. Only if `thorough` are others than the oldest
    /// one looked for, which costs a line of the completion ring.
    #[inline]
    pub fn poll_any(&mut self, thorough: bool) -> Option<Sequence> {
        if !self.finished.is_empty()
            && let Some(sequence) = self.next_finished()
        {
            return Some(sequence);
        }
        self.kick();
        let oldest = self.oldest()?;
        if self.look((oldest & self.mask) as usize) != Poll::Pending {
            return Some(oldest);
        }
        if !thorough || self.outstanding == 1 {
            return None;
        }
        self.poll_ring()
    }

    /// The next that was finished when the server was found dead.
    #[cold]
    fn next_finished(&mut self) -> Option<Sequence> {
        self.forget_told();
        self.finished.pop_front()
    }

    /// Forgets of those what was received by its number.
    pub(super) fn forget_told(&mut self) {
        let (records, mask) = (&self.records, self.mask);
        self.finished.retain(|sequence| {
            let record = &records[(sequence & mask) as usize];
            record.sequence == *sequence && matches!(record.phase, Phase::Done(_))
        });
    }

    fn poll_ring(&mut self) -> Option<Sequence> {
        let places = u64::from(completion::places(self.mask as u32 + 1));
        // Entries further back are overwritten: their frames are known (completion, I1).
        let floor = (self.completed + 2).saturating_sub(places);
        self.ticket = self.ticket.max(floor);
        let mut ticket = self.ticket;
        let mut contiguous = true;
        for _ in 0..places {
            let place = self.segment.ring().word((ticket & (places - 1)) as usize);
            let found = completion::find(place, ticket);
            if found == Found::Nothing {
                return None;
            }
            let done = match found {
                Found::Entry(entry) => self.take_entry(entry),
                _ => Taken::Stale,
            };
            contiguous &= done != Taken::NotYet;
            ticket += 1;
            if contiguous {
                self.ticket = ticket;
            }
            if let Taken::Done(sequence) = done {
                return Some(sequence);
            }
        }
        None
    }

    fn take_entry(&mut self, entry: completion::Entry) -> Taken {
        let index = usize::from(entry.slot);
        let Some(record) = self.records.get(index) else {
            return Taken::Stale;
        };
        let (sequence, phase) = (record.sequence, record.phase);
        if sequence as u32 != entry.sequence {
            return Taken::Stale;
        }
        match phase {
            Phase::InFlight if self.look(index) == Poll::Pending => Taken::NotYet,
            Phase::InFlight => Taken::Done(sequence),
            Phase::Unwanted if !self.reap(index) => Taken::NotYet,
            _ => Taken::Stale,
        }
    }

    /// Looks at the slot of a request in flight.
    #[inline]
    pub(super) fn look(&mut self, index: usize) -> Poll {
        if self.outstanding > LINES_AHEAD as u32 {
            let ahead = (index as u64 + LINES_AHEAD) & self.mask;
            self.slots.line(ahead as usize).prefetch();
        }
        let slot_line = self.slots.line(index);
        let record = &mut self.records[index];
        let found = match state::answer(&slot_line.0[slot::STATE], record.sequence) {
            Answer::Pending => return Poll::Pending,
            Answer::Done(state) => state,
            Answer::Foreign(_) => State::Free,
        };
        let length = slot_line.0[slot::LENGTH].load(Ordering::Relaxed);
        let len = length as u32;
        record.length = length;
        let poll = match found {
            _ if len > record.capacity => Poll::Broken,
            State::Response => Poll::Response,
            State::Failed => Poll::Failed(ErrorCode((length >> 32) as u32)),
            State::Cancelled | State::Poisoned => Poll::Cancelled,
            _ => Poll::Broken,
        };
        record.len = if poll == Poll::Broken { 0 } else { len };
        record.phase = Phase::Done(poll);
        self.held += 1;
        self.broken |= poll == Poll::Broken;
        self.read_count += 1;
        self.learned();
        if self.failpoints {
            self.pass(Failpoint::ClientReading);
            let record = &self.records[index];
            let word = &self.slots.line(index).0[slot::STATE];
            state::note(word, record.sequence, State::ClientReading);
        }
        poll
    }

    /// One completion more is known.
    #[inline]
    pub(super) fn learned(&mut self) {
        self.completed += 1;
        self.outstanding = self.outstanding.saturating_sub(1);
        if self.outstanding == 0 {
            // All tickets drawn so far belong to frames that are known.
            self.ticket = self.completed + 1;
        }
    }

    /// The bytes of a response (or of a handler's error text); none for what is not
    /// finished.
    #[inline]
    pub fn response(&self, sequence: Sequence) -> Option<FrameBytes<'_>> {
        self.response_at(sequence)
            .map(|frame| self.segment.frame_bytes(frame))
    }

    /// Where [`ClientCore::response`] lies, for [`Segment::frame_bytes`].
    #[inline]
    pub fn response_at(&self, sequence: Sequence) -> Option<FramePlace> {
        if self.lane.is_done() && sequence + 1 == self.next {
            return Some(self.lane_place());
        }
        let index = (sequence & self.mask) as usize;
        let record = &self.records[index];
        if record.sequence != sequence || !matches!(record.phase, Phase::Done(_)) {
            return None;
        }
        Some(FramePlace {
            place: record
                .place
                .map_or(Place::Slot(index), |(_, data)| Place::Payload(data)),
            len: record.len,
        })
    }

    /// The text of a handler's error, cut to [`MAX_CHANNEL_ERROR_BYTES`].
    pub fn error_text(&self, sequence: Sequence) -> String {
        let Some(bytes) = self.response(sequence) else {
            return String::new();
        };
        let mut text = vec![0; bytes.len().min(MAX_CHANNEL_ERROR_BYTES as usize)];
        let _ = bytes.read(0, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Gives a finished request's room back. False if it is not one.
    #[inline]
    pub fn release(&mut self, sequence: Sequence) -> bool {
        if self.release_lane(sequence) {
            return true;
        }
        self.close_lane();
        let index = (sequence & self.mask) as usize;
        let record = &self.records[index];
        if record.sequence != sequence || !matches!(record.phase, Phase::Done(_)) {
            return false;
        }
        self.pass(Failpoint::ClientReleased);
        self.give_back(index);
        // Only a server that drains listens, and it looks again by itself.
        let word = &self.lines.line(line::RESPONSE_CONSUMED).0[0];
        if event::has_waiters(word) {
            self.ring_consumed();
        }
        true
    }

    #[cold]
    pub(super) fn ring_consumed(&self) {
        self.store_counters();
        let word = &self.lines.line(line::RESPONSE_CONSUMED).0[0];
        if event::post(word) {
            let _ = futex::wake(high_half(word), u32::MAX);
        }
    }

    pub(super) fn give_back(&mut self, index: usize) {
        let record = &mut self.records[index];
        if record.phase != Phase::Done(Poll::Response) {
            record.length = UNKNOWN;
        }
        if matches!(record.phase, Phase::Done(_)) {
            self.held -= 1;
        }
        record.phase = Phase::Free;
        if self.failpoints {
            let word = &self.slots.line(index).0[slot::STATE];
            state::note(word, record.sequence, State::Released);
        }
        if let Some((block, _)) = record.place.take() {
            self.space.release(block);
        }
    }

    /// Sequence that a server that comes anew has to begin with.
    pub fn next_sequence(&self) -> Sequence {
        self.next
    }

    /// Stores the counters and copies them into the OIEBs.
    pub fn mirror(&self) {
        self.store_counters();
        self.segment.mirror(Side::Client);
    }

    /// Requests that were placed and not handed over.
    pub(super) fn unposted(&self) -> u32 {
        self.unposted
    }

    /// Whether there is a slot and possibly space for a request of `capacity` bytes.
    #[inline]
    pub(super) fn reserve(&mut self, capacity: usize) -> Result<(), AcquireError> {
        if self.broken || self.orphan_of != 0 {
            self.impaired()?;
        }
        if capacity > INLINE_BYTES && capacity as u64 > self.space.largest() {
            return Err(AcquireError::TooLarge {
                len: capacity as u64,
                largest: self.largest(),
            });
        }
        if self.stopped() {
            return Err(AcquireError::Stopped);
        }
        if self.outstanding + self.loose + self.held == 0 && self.granted == 0 {
            self.begin_lap();
        }
        let index = ((self.next + self.granted) & self.mask) as usize;
        let phase = self.records[index].phase;
        let free = match phase {
            Phase::Free => self.granted <= self.mask,
            Phase::OneWay | Phase::Unwanted => {
                self.kick();
                self.reap(index)
            }
            _ => false,
        };
        if free {
            Ok(())
        } else {
            Err(AcquireError::Full)
        }
    }

    #[inline]
    pub(super) fn stopped(&self) -> bool {
        let stop =
            |line: usize| self.lines.line(line).0[presence::STOP_WORD].load(Ordering::Acquire);
        (stop(line::CLIENT) | stop(line::SERVER)) as u32 != 0
    }

    /// With nothing in flight and nothing held the next request takes slot 0: one
    /// request at a time then always travels in the same cache lines, which the core
    /// that reads them takes over whole.
    #[inline]
    fn begin_lap(&mut self) {
        if self.next > 1 {
            self.next = state::next_lap(self.next, self.mask);
            self.oldest = self.next;
        }
    }

    #[cold]
    fn impaired(&mut self) -> Result<(), AcquireError> {
        if self.broken {
            return Err(AcquireError::Broken);
        }
        if self.taking_over || self.segment.generation() == self.orphan_of {
            return Err(AcquireError::NoServer);
        }
        self.orphan_of = 0;
        Ok(())
    }

    fn place(&mut self, len: usize, capacity: usize, one_way: bool) -> Result<Grant, AcquireError> {
        let (block, data) = self.allocate(capacity)?;
        Ok(Grant {
            len: len as u32,
            capacity: (capacity as u32).next_multiple_of(64),
            one_way,
            room: Room::Payload { block, data },
        })
    }

    /// A block of the payload for `capacity` bytes, and where its data lies.
    pub(super) fn allocate(&mut self, capacity: usize) -> Result<(u64, u64), AcquireError> {
        let mut placed = self.space.allocate(capacity as u64);
        if placed.is_none() && self.loose > 0 && self.reap_all() {
            placed = self.space.allocate(capacity as u64);
        }
        let Placed {
            block,
            offset,
            wrap,
        } = placed.ok_or(AcquireError::Full)?;
        if let Some((at, len)) = wrap {
            self.write_header(at, block::WRAP, len, 0);
        }
        Ok((block, offset + super::space::UNIT))
    }

    /// Writes a block's header, by which the payload can be walked.
    fn write_header(&self, at: u64, kind: u32, len: u64, sequence: Sequence) {
        let slot = sequence & self.mask;
        let header = [kind.into(), len, sequence, slot, 0, 0, 0, 0];
        // The place is the account's own and lies within the payload.
        if let Ok(words) = self.segment.payload().words(at, header.len()) {
            for (word, value) in words.iter().zip(header) {
                word.store(value, Ordering::Relaxed);
            }
        }
    }

    /// Stores the header of the next sequence's slot.
    #[inline]
    pub(super) fn complete(
        &mut self,
        len: u32,
        capacity: u32,
        mut flags: u32,
        place: Option<(u64, u64)>,
    ) -> Sequence {
        let sequence = self.next;
        let index = (sequence & self.mask) as usize;
        let one_way = flags & slot::ONE_WAY != 0;
        match place {
            None => flags |= slot::IN_SLOT,
            Some((_, data)) => {
                let whole = u64::from(capacity) + super::space::UNIT;
                self.write_header(data - super::space::UNIT, block::FRAME, whole, sequence);
            }
        }
        let words = &self.slots.line(index).0;
        if self.failpoints {
            state::note(&words[slot::STATE], sequence, State::ClientWriting);
        }
        if let Some((_, data)) = place {
            words[slot::OFFSET].store(data, Ordering::Relaxed);
            words[slot::CAPACITY].store(u64::from(capacity), Ordering::Relaxed);
        }
        let length = u64::from(flags) << 32 | u64::from(len);
        if self.records[index].length != length {
            words[slot::LENGTH].store(length, Ordering::Relaxed);
        }
        self.pass(Failpoint::ClientRequest);
        self.records[index] = Record {
            sequence,
            phase: if one_way {
                Phase::OneWay
            } else {
                Phase::InFlight
            },
            capacity,
            len,
            batch: Shape::default(),
            place,
            length,
        };
        if one_way {
            self.loose += 1;
        } else {
            self.outstanding += 1;
        }
        self.next += 1;
        self.unposted += 1;
        self.written_count += 1;
        self.written_bytes += u64::from(len);
        sequence
    }

    #[inline]
    pub(super) fn store_counters(&self) {
        let words = &self.lane.counters.0;
        let set = |word: usize, value| words[word].store(value, Ordering::Relaxed);
        set(client_counter::NEXT, self.next);
        set(client_counter::WRITTEN_COUNT, self.written_count);
        set(client_counter::WRITTEN_BYTES, self.written_bytes);
        let awaited = u64::from(self.lane.is_in_flight());
        set(client_counter::READ_COUNT, self.read_count - awaited);
        set(client_counter::FREE_BYTES, self.space.free_bytes());
    }

    pub(super) fn grant_one(&mut self) {
        self.granted += 1;
        self.store_writing();
    }

    pub(super) fn ungrant_one(&mut self) {
        if self.granted > 0 {
            self.granted -= 1;
            self.store_writing();
        }
    }

    fn store_writing(&self) {
        let words = &self.lines.line(line::CLIENT_COUNTERS).0;
        words[client_counter::WRITING].store(self.granted, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn pass(&self, place: Failpoint) {
        if self.failpoints {
            self.segment.stop_at(place);
        }
    }
}

/// The flags of a frame that is no batch.
#[inline]
fn flags(one_way: bool) -> u32 {
    if one_way { slot::ONE_WAY } else { 0 }
}
