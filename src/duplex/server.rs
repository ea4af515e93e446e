//! The server's side of a channel: it takes requests in sequence and answers them
//! in any order.

use std::sync::atomic::{AtomicU64, Ordering};

use super::batch::BatchWords;
use super::bytes::{FrameBytes, Place, cut};
use super::completion;
use super::failpoint::Failpoint;
use super::layout::{INLINE_BYTES, LINES_AHEAD, client_counter, line, server_counter, slot};
use super::segment::Segment;
use super::space::UNIT;
use super::state::{self, Side, State};
use super::waiting::{Pace, Semaphore};
use super::{ErrorCode, Sequence, event};
use crate::limits::{MAX_CHANNEL_ERROR_BYTES, MAX_DEFERRED_POSTS};
use crate::shm::{KeptLine, Line, Lines, PeerTrust, TrustedBytes, high_half};
use crate::sys::futex;
use crate::units::checked_range;

/// Most bytes of a request that lies in its slot, as part of a length word.
const MOST_INLINE: u64 = INLINE_BYTES as u64;
/// The OIEBs are brought up to date once in so many requests, less 1.
const MIRROR_MASK: u64 = 1023;

/// A request that one worker has taken. It has to be answered once:
/// [`ServerCore::respond`] or [`ServerCore::fail`].
#[derive(Debug)]
#[must_use = "a request that is not answered keeps its client waiting"]
pub struct Claim {
    sequence: Sequence,
    slot: usize,
    place: Place,
    len: u32,
    capacity: u32,
    flags: u32,
    cancelled: bool,
    malformed: bool,
}

impl Claim {
    /// Its number.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// Bytes of the request.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that the response may have.
    pub fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// Whether nobody waits for a response.
    pub fn is_one_way(&self) -> bool {
        self.flags & slot::ONE_WAY != 0
    }

    /// Whether it is many requests in one: see [`ServerCore::batch`].
    #[inline]
    pub fn is_batch(&self) -> bool {
        self.flags & slot::BATCH != 0
    }

    /// Whether the client no longer wants it: answer by [`ServerCore::skip`].
    pub fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    /// Whether its header is impossible: answer by [`ServerCore::fail`].
    pub fn is_malformed(&self) -> bool {
        self.malformed
    }
}

/// What a worker that looks for requests has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing.
    Nothing,
    /// Something: [`ServerCore::claim`] says more.
    Some,
    /// A request that is alone and was taken, after so many looks.
    Alone(u32),
}

/// What a worker still has to tell the client: answers stored since it last rang,
/// and counts since it last added them up. One per worker.
#[derive(Debug, Default)]
pub struct Posts {
    /// Slots answered, modulo 32, as a wake-up mask.
    mask: u32,
    answers: u32,
    one_way: u32,
    read: u64,
    written_bytes: u64,
    failed: u64,
    /// When the next request is to be expected.
    pace: Pace,
}

impl Posts {
    /// Nothing to tell.
    pub fn new() -> Posts {
        Posts::default()
    }

    /// Whether anything waits to be told.
    pub fn is_empty(&self) -> bool {
        self.answers + self.one_way == 0
    }
}

/// The server's side. One per channel; its workers share it.
#[derive(Debug)]
pub struct ServerCore {
    segment: Segment,
    lines: Lines,
    slots: Lines,
    mask: u64,
    places: u64,
    failpoints: bool,
    /// The payload is a part of a region: what changes in it is marked.
    marked: bool,
    /// One worker and no failpoints: what comes alone is answered the short way.
    direct: bool,
    /// One worker: it says what it serves in `serving`, and nobody else counts.
    alone: bool,
    counters: KeptLine,
    response_ready: KeptLine,
    space_available: KeptLine,
    /// Slot 0.
    first: KeptLine,
    /// The client's wishes, those of slot 0 in front.
    first_wish: KeptLine,
    wishes: Lines,
    ring: Lines,
    /// Sequence of the next request.
    cursor: Own,
    /// Next ticket of the completion ring.
    ticket: Own,
    /// Where the frame ended in the payload that was marked last.
    marked_to: Own,
}

/// A word of this process on a line of its own.
#[repr(align(128))]
#[derive(Debug)]
struct Own(AtomicU64);

impl ServerCore {
    /// The server's side of new memory, for so many workers.
    pub fn new(segment: &Segment, workers: usize) -> ServerCore {
        ServerCore::begin(segment, workers, 1)
    }

    /// The server's side of memory whose former server is dead and whose client has
    /// ended all that was in flight ([`super::ClientCore::server_died`]) and sends
    /// nothing until this returns. Raises the generation.
    pub fn take_over(segment: &Segment, workers: usize) -> ServerCore {
        segment.raise_generation();
        let counters = &segment.lines().line(line::CLIENT_COUNTERS).0;
        let next = counters[client_counter::NEXT].load(Ordering::Acquire);
        let written = counters[client_counter::WRITTEN_COUNT].load(Ordering::Acquire);
        let counters = &segment.lines().line(line::SERVER_COUNTERS).0;
        counters[server_counter::READ_COUNT].store(written, Ordering::Relaxed);
        // A sequence has 56 bits in the state word.
        ServerCore::begin(segment, workers, next & (u64::MAX >> 8))
    }

    fn begin(segment: &Segment, workers: usize, first: Sequence) -> ServerCore {
        let slots = segment.geometry().slots;
        let places = completion::places(slots);
        for place in 0..places as usize {
            segment.ring().word(place).store(0, Ordering::Relaxed);
        }
        let counters = &segment.lines().line(line::SERVER_COUNTERS).0;
        counters[server_counter::SERVING].store(0, Ordering::Relaxed);
        segment.join(Side::Server);
        ServerCore {
            segment: segment.clone(),
            lines: segment.lines().clone(),
            slots: segment.slots().clone(),
            mask: u64::from(slots) - 1,
            places: u64::from(places),
            failpoints: segment.has_failpoints(),
            marked: segment.is_marked(),
            direct: workers <= 1 && !segment.has_failpoints(),
            alone: workers <= 1,
            counters: segment.lines().keep(line::SERVER_COUNTERS),
            response_ready: segment.lines().keep(line::RESPONSE_READY),
            space_available: segment.lines().keep(line::SPACE_AVAILABLE),
            first: segment.slots().keep(0),
            first_wish: segment.wishes().keep(0),
            wishes: segment.wishes().clone(),
            ring: segment.ring().clone(),
            cursor: Own(AtomicU64::new(first)),
            ticket: Own(AtomicU64::new(1)),
            marked_to: Own(AtomicU64::new(0)),
        }
    }

    /// The memory.
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// Whether a request is there to be taken.
    #[inline]
    pub fn has_request(&self) -> bool {
        self.awaited(self.cursor.0.load(Ordering::Relaxed))
            .is_some()
    }

    /// Whether there is a request right behind the last one. Who goes back to slot 0
    /// has nothing else in flight and waits for its answer: its line is left alone.
    #[inline]
    fn has_further_request(&self) -> bool {
        let cursor = self.cursor.0.load(Ordering::Relaxed);
        let slot_line = self.slots.line((cursor & self.mask) as usize);
        state::is_request(&slot_line.0[slot::STATE], cursor)
    }

    /// The request that follows where `cursor` would be the next, if it is there.
    #[inline]
    fn awaited(&self, cursor: Sequence) -> Option<Sequence> {
        state::awaited(cursor, self.mask, |sequence| {
            let slot_line = self.slots.line((sequence & self.mask) as usize);
            state::is_request(&slot_line.0[slot::STATE], sequence)
        })
    }

    /// Looks for the next request up to `looks` times, and touches nothing but the two
    /// lines it may come in. One that is alone, in slot 0, and an ordinary one, is taken
    /// into `claim` at once: answer it by [`ServerCore::respond_alone`].
    #[inline(always)]
    pub fn look_for_request(
        &self,
        looks: u32,
        posts: &mut Posts,
        claim: &mut Option<Claim>,
    ) -> Seen {
        let cursor = self.cursor.0.load(Ordering::Relaxed);
        let lap = state::next_lap(cursor, self.mask);
        let next = &self.slots.line((cursor & self.mask) as usize).0[slot::STATE];
        let first = &self.first.0[slot::STATE];
        posts.pace.hold_off();
        for look in 0..looks {
            if state::is_request(first, lap) {
                // See `state::awaited`.
                if !self.direct || state::is_request(next, cursor) {
                    posts.pace.found_after(look);
                    return Seen::Some;
                }
                return self.take_alone(lap, look, posts, claim);
            }
            if state::is_request(next, cursor) {
                return Seen::Some;
            }
            // Without it the poll takes the line back from who is about to write it.
            std::hint::spin_loop();
        }
        Seen::Nothing
    }

    #[inline(always)]
    fn take_alone(
        &self,
        sequence: Sequence,
        look: u32,
        posts: &mut Posts,
        claim: &mut Option<Claim>,
    ) -> Seen {
        let length = self.first.0[slot::LENGTH].load(Ordering::Relaxed);
        let cancelled = self.first_wish.0[0].load(Ordering::Relaxed) == sequence;
        let ordinary =
            u64::from(slot::IN_SLOT) << 32..=u64::from(slot::IN_SLOT) << 32 | MOST_INLINE;
        if cancelled || !ordinary.contains(&length) {
            posts.pace.found_after(look);
            return Seen::Some;
        }
        self.cursor.0.store(sequence + 1, Ordering::Relaxed);
        posts.read += 1;
        *claim = Some(Claim {
            sequence,
            slot: 0,
            place: Place::Slot(0),
            len: length as u32,
            capacity: INLINE_BYTES as u32,
            flags: slot::IN_SLOT,
            cancelled: false,
            malformed: false,
        });
        let serving = &self.counters.0[server_counter::SERVING];
        serving.store(sequence, Ordering::Relaxed);
        // SYNC(serving): as in `begin_handler`.
        std::sync::atomic::fence(Ordering::Release);
        Seen::Alone(look)
    }

    /// The bytes of a request that [`ServerCore::look_for_request`] took.
    #[inline(always)]
    pub fn bytes_alone(&self) -> FrameBytes<'_> {
        FrameBytes::of_slot(&self.first, INLINE_BYTES as u32)
    }

    /// Answers a request that [`ServerCore::look_for_request`] took with as many bytes as
    /// it has, and hands the answer over before anything else is done.
    #[inline(always)]
    pub fn respond_alone(&self, claim: &Claim, look: u32, posts: &mut Posts) {
        let word = &self.first.0[slot::STATE];
        state::hand_over(word, claim.sequence, State::Response);
        posts.pace.found_after(look);
        posts.written_bytes += u64::from(claim.len);
        self.note_answer(claim, posts);
        self.counters.0[server_counter::SERVING].store(0, Ordering::Relaxed);
    }

    /// Takes the next request. A core that was made for one worker is to be asked by
    /// one thread at a time.
    #[inline]
    pub fn claim(&self, posts: &mut Posts) -> Option<Claim> {
        let order = Ordering::Relaxed;
        let mut cursor = self.cursor.0.load(order);
        loop {
            let found = self.awaited(cursor);
            if self.alone {
                let sequence = found?;
                self.cursor.0.store(sequence + 1, order);
                return Some(self.taken_at(sequence, posts));
            }
            let now = match found {
                Some(sequence) => {
                    let next = sequence + 1;
                    match self.cursor.0.compare_exchange(cursor, next, order, order) {
                        Ok(_) => return Some(self.taken_at(sequence, posts)),
                        Err(now) => now,
                    }
                }
                None => self.cursor.0.load(order),
            };
            if now == cursor {
                return None;
            }
            cursor = now;
        }
    }

    #[inline]
    fn taken_at(&self, sequence: Sequence, posts: &mut Posts) -> Claim {
        if posts.answers > 0 {
            // In the middle of many: those that follow are on their way meanwhile.
            let ahead = (sequence + LINES_AHEAD) & self.mask;
            self.slots.line(ahead as usize).prefetch();
        }
        let line = self.slots.line((sequence & self.mask) as usize);
        self.taken(sequence, line, posts)
    }

    /// Copies the header out and checks it.
    #[inline]
    fn taken(&self, sequence: Sequence, line: &Line, posts: &mut Posts) -> Claim {
        let index = (sequence & self.mask) as usize;
        let length = line.0[slot::LENGTH].load(Ordering::Relaxed);
        let (len, flags) = (length as u32, (length >> 32) as u32);
        posts.read += 1;
        self.pass(Failpoint::ServerBusy);
        let claim = Claim {
            sequence,
            slot: index,
            place: Place::Slot(index),
            len,
            capacity: INLINE_BYTES as u32,
            flags,
            cancelled: self.wishes.word(index).load(Ordering::Relaxed) == sequence,
            malformed: false,
        };
        if flags & (slot::IN_SLOT | slot::BATCH) == slot::IN_SLOT && len as usize <= INLINE_BYTES {
            claim
        } else {
            self.in_payload(claim)
        }
    }

    /// The rest of the header of a frame that is not an ordinary inline one.
    fn in_payload(&self, claim: Claim) -> Claim {
        let words = &self.slots.line(claim.slot).0;
        let word = |at: usize| words[at].load(Ordering::Relaxed);
        let (offset, capacity) = (word(slot::OFFSET), word(slot::CAPACITY));
        let size = self.segment.geometry().payload_size;
        let fits = claim.flags & slot::IN_SLOT == 0
            && offset.is_multiple_of(UNIT)
            && checked_range(offset, capacity, size).is_ok()
            && u64::from(claim.len) <= capacity;
        match u32::try_from(capacity) {
            Ok(capacity) if fits => Claim {
                place: Place::Payload(offset),
                capacity,
                ..claim
            },
            _ => Claim {
                len: 0,
                capacity: 0,
                malformed: true,
                ..claim
            },
        }
    }

    /// The handler is about to run: from here on the frame's bytes may change.
    #[inline]
    pub fn begin_handler(&self, claim: &Claim) {
        if self.alone {
            let serving = &self.counters.0[server_counter::SERVING];
            serving.store(claim.sequence, Ordering::Relaxed);
        }
        if !self.alone || self.failpoints {
            let word = &self.slots.line(claim.slot).0[slot::STATE];
            state::note(word, claim.sequence, State::ServerBusy);
        }
        // SYNC(serving): who sees the handler's stores sees the words above; pairs
        // with the loads of a client whose server died.
        std::sync::atomic::fence(Ordering::Release);
        self.pass(Failpoint::ServerHandler);
    }

    /// The bytes of a request, `len` of them or up to the capacity.
    #[inline]
    pub fn bytes(&self, claim: &Claim, len: usize) -> FrameBytes<'_> {
        let len = claim.capacity.min(u32::try_from(len).unwrap_or(u32::MAX));
        FrameBytes::new(&self.slots, self.segment.payload(), claim.place, len)
    }

    /// The items of a request that is a batch; none if it cannot be one.
    pub fn batch(&self, claim: &Claim) -> Option<BatchWords<'_>> {
        match claim.place {
            Place::Payload(offset) if claim.is_batch() => {
                BatchWords::open(self.segment.payload(), offset, claim.len)
            }
            _ => None,
        }
    }

    /// `len` bytes at `offset` of the payload, of a request that was taken, as a slice.
    pub fn trusted_part(
        &self,
        offset: u64,
        len: usize,
        trust: PeerTrust,
    ) -> Option<TrustedBytes<'_>> {
        let payload = self.segment.payload();
        let range = checked_range(offset, len as u64, payload.len()).ok()?;
        let (memory, start) = payload.memory();
        trust.bytes(memory, start + range.start, len as u64).ok()
    }

    /// The bytes of a request, its whole capacity, as a slice; none if malformed.
    pub fn trusted_bytes(&self, claim: &Claim, trust: PeerTrust) -> Option<TrustedBytes<'_>> {
        let (memory, offset) = match claim.place {
            Place::Slot(index) => {
                let geometry = self.segment.geometry();
                let at = geometry.table + 128 * index as u64 + 8 * slot::INLINE as u64;
                (self.segment.control(), at)
            }
            Place::Payload(offset) => return self.trusted_part(offset, claim.capacity(), trust),
        };
        trust.bytes(memory, offset, u64::from(claim.capacity)).ok()
    }

    /// Answers with the first `len` bytes of the frame; a length beyond the capacity is
    /// answered as [`ErrorCode::TOO_LONG`]. The client learns of it by [`ServerCore::post`].
    #[inline]
    pub fn respond(&self, claim: Claim, len: usize, posts: &mut Posts) {
        if len > claim.capacity() {
            self.fail(claim, ErrorCode::TOO_LONG, "", posts);
            return;
        }
        if len != claim.len() {
            let word = &self.slots.line(claim.slot).0[slot::LENGTH];
            let length = u64::from(claim.flags) << 32 | len as u64;
            word.store(length, Ordering::Relaxed);
        }
        posts.written_bytes += len as u64;
        self.finish(&claim, State::Response, posts);
    }

    /// Answers with an error, and as much of its text as the frame and
    /// [`MAX_CHANNEL_ERROR_BYTES`] allow.
    #[cold]
    pub fn fail(&self, claim: Claim, code: ErrorCode, text: &str, posts: &mut Posts) {
        let room = claim.capacity().min(MAX_CHANNEL_ERROR_BYTES as usize);
        let text = cut(text, room).as_bytes();
        let len = text.len();
        if self.bytes(&claim, len).write(0, text).is_ok() {
            let word = &self.slots.line(claim.slot).0[slot::LENGTH];
            let length = u64::from(code.0) << 32 | len as u64;
            word.store(length, Ordering::Relaxed);
        }
        posts.failed += 1;
        self.finish(&claim, State::Failed, posts);
    }

    /// Gives a cancelled request back; the handler was not run.
    #[cold]
    pub fn skip(&self, claim: Claim, posts: &mut Posts) {
        self.pass(Failpoint::ServerCancelled);
        self.finish(&claim, State::Cancelled, posts);
    }

    #[inline]
    fn finish(&self, claim: &Claim, state: State, posts: &mut Posts) {
        self.pass(Failpoint::ServerResponse);
        if self.marked {
            self.mark(claim);
        }
        let word = &self.slots.line(claim.slot).0[slot::STATE];
        if claim.is_one_way() {
            state::hand_over(word, claim.sequence, State::Released);
            posts.one_way += 1;
        } else {
            // A worker that is alone stores its entries in the order of their tickets
            // whenever it does: its entry may follow.
            if self.alone {
                state::hand_over(word, claim.sequence, state);
                self.pass(Failpoint::ServerCompletion);
            }
            self.note_answer(claim, posts);
            if !self.alone {
                self.pass(Failpoint::ServerCompletion);
                state::hand_over(word, claim.sequence, state);
            }
        }
        if self.alone {
            self.counters.0[server_counter::SERVING].store(0, Ordering::Relaxed);
        }
        self.pass(Failpoint::ServerPost);
    }

    /// Marks the frame with its header. The next frame of a ring that went round lies
    /// below the last one, behind which the client has stored a wrap marker.
    #[cold]
    fn mark(&self, claim: &Claim) {
        let Place::Payload(offset) = claim.place else {
            return;
        };
        let (begin, end) = (
            offset.saturating_sub(UNIT),
            offset + u64::from(claim.capacity),
        );
        self.segment.mark(begin..end);
        let last = self.marked_to.0.swap(end, Ordering::Relaxed);
        if begin < last && last < self.segment.geometry().payload_size {
            self.segment.mark(last..last + UNIT);
        }
    }

    /// Stores the entry of an answer in the completion ring.
    #[inline]
    fn note_answer(&self, claim: &Claim, posts: &mut Posts) {
        let ticket = self.draw();
        let place = self.ring.word((ticket & (self.places - 1)) as usize);
        completion::push(place, ticket, claim.sequence, claim.slot as u16);
        posts.answers += 1;
        posts.mask |= 1 << (claim.slot % 32);
    }

    #[inline]
    fn draw(&self) -> u64 {
        let ticket = &self.ticket.0;
        if self.alone {
            let drawn = ticket.load(Ordering::Relaxed);
            ticket.store(drawn + 1, Ordering::Relaxed);
            drawn
        } else {
            ticket.fetch_add(1, Ordering::Relaxed)
        }
    }

    /// Whether the client has to be rung now rather than after the next answer: no
    /// further request is there, enough answers wait, or somebody is seen asleep.
    #[inline]
    pub fn is_post_due(&self, posts: &Posts) -> bool {
        let waiting = u64::from(posts.answers + posts.one_way);
        waiting > 0
            && (waiting >= MAX_DEFERRED_POSTS
                || event::has_waiters(&self.response_ready.0[0])
                || event::has_waiters(&self.space_available.0[0])
                || !self.has_further_request())
    }

    /// Rings sleeping workers of this process, so that they look around.
    pub fn ring_workers(&self) {
        self.segment.ring_all(Semaphore::RequestReady);
    }

    /// Rings the client for all answers since the last time. True if it had to be woken.
    #[inline]
    pub fn post(&self, posts: &mut Posts) -> bool {
        if self.add_up(posts) {
            self.mirror();
        }
        let mut woke = false;
        if std::mem::take(&mut posts.answers) > 0 {
            let word = &self.response_ready.0[0];
            if event::post(word) {
                woke = true;
                // Refused only for an empty mask, and this has a bit per answer.
                let _ = futex::wake_masked(high_half(word), u32::MAX, posts.mask);
            }
            posts.mask = 0;
            // SYNC(room): an answer to a request that was cancelled late is room too. Who
            // waits for room changes the word posted above after it has announced itself.
            if event::has_waiters(&self.space_available.0[0]) {
                self.segment.ring_all(Semaphore::SpaceAvailable);
            }
        }
        if std::mem::take(&mut posts.one_way) > 0 {
            let word = &self.lines.line(line::SPACE_AVAILABLE).0[0];
            if event::post(word) {
                woke = true;
                let _ = futex::wake(high_half(word), u32::MAX);
            }
        }
        woke
    }

    /// Adds a worker's counts to the control block. True once in a while.
    #[inline]
    fn add_up(&self, posts: &mut Posts) -> bool {
        let words = &self.counters.0;
        let add = |word: usize, count: u64| {
            let word = &words[word];
            if self.alone {
                let sum = word.load(Ordering::Relaxed).wrapping_add(count);
                word.store(sum, Ordering::Relaxed);
                sum
            } else {
                word.fetch_add(count, Ordering::Relaxed).wrapping_add(count)
            }
        };
        let sum = add(server_counter::READ_COUNT, posts.read);
        add(server_counter::WRITTEN_COUNT, u64::from(posts.answers));
        add(server_counter::WRITTEN_BYTES, posts.written_bytes);
        if posts.failed > 0 {
            add(server_counter::FAILED, posts.failed);
        }
        let mirror = sum & MIRROR_MASK < posts.read;
        (posts.read, posts.written_bytes, posts.failed) = (0, 0, 0);
        mirror
    }

    /// Copies the counters into the OIEBs.
    pub fn mirror(&self) {
        self.segment.mirror(Side::Server);
    }

    /// Answers written that the client has not read, by its own account.
    pub fn unread(&self) -> u64 {
        let load =
            |index: usize, word: usize| self.lines.line(index).0[word].load(Ordering::Acquire);
        load(line::SERVER_COUNTERS, server_counter::WRITTEN_COUNT)
            .saturating_sub(load(line::CLIENT_COUNTERS, client_counter::READ_COUNT))
    }

    #[inline]
    fn pass(&self, place: Failpoint) {
        if self.failpoints {
            self.segment.stop_at(place);
        }
    }
}
