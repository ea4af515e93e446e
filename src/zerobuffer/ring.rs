//! Where frames go in the ring, as values: no memory, no clock, no peer.
//!
//! ```text
//! 0            read            write                size
//! |  free        | frames        |  free ...          |
//! ```
//! Invariants of the writer:
//! * I1: a frame lies within the ring in one piece, behind a header of 16 bytes.
//! * I2: what it takes (frame, and the tail given up by wrapping) is free when it
//!   is taken.
//! * I3: behind a frame there is room for a header, or the ring's end, or the next
//!   frame goes to the beginning of an empty ring: no reader meets a tail of 1 to
//!   15 bytes.
//!
//! Invariants of the reader:
//! * I4: bytes are given back in the order they were read in; what is released
//!   early waits. A tail counts as read when it is passed. The free bytes are then
//!   one piece that begins where the writer writes, so I2 protects what is held.
//! * I5: nothing is read that was not taken: free bytes, bytes held and bytes read
//!   add up to the ring.

use std::collections::VecDeque;

use super::layout::{FrameHeader, HEADER_BYTES};
use crate::limits::ZEROBUFFER_RESUME_STEPS;

/// What a peer that keeps the rules never writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// More bytes are free, or held, than there are.
    #[error("{free} bytes free and {held} held in a ring of {size}")]
    FreeBytes {
        /// The word in the shared memory.
        free: u64,
        /// Bytes read and not given back.
        held: u64,
        /// Bytes of the ring.
        size: u64,
    },
    /// A position that no frame begins or ends at.
    #[error("position {found} where {expected} has to be, in a ring of {size} bytes")]
    Position {
        /// The word in the shared memory.
        found: u64,
        /// What it was.
        expected: u64,
        /// Bytes of the ring.
        size: u64,
    },
    /// A frame that reaches beyond what was written.
    #[error("a frame of {len} bytes at {at}, where {room} bytes were written")]
    FrameLength {
        /// Length in its header.
        len: u64,
        /// Its position.
        at: u64,
        /// Bytes that it can have taken, header included.
        room: u64,
    },
    /// A wrap marker at a place where none can be.
    #[error("a wrap marker at {at}, where no frame was given up")]
    Marker {
        /// Its position.
        at: u64,
    },
    /// A frame was lost or read twice.
    #[error("frame {found} where frame {expected} has to be")]
    Sequence {
        /// The number in its header.
        found: u64,
        /// The number after the last one.
        expected: u64,
    },
    /// Metadata longer than what was written.
    #[error("metadata of {len} bytes, where {room} were written")]
    Metadata {
        /// Its length prefix.
        len: u64,
        /// Bytes that there are.
        room: u64,
    },
    /// A process number that no process has.
    #[error("process {pid}, which cannot be")]
    Pid {
        /// The word in the shared memory.
        pid: u64,
    },
}

/// Where a writer puts its next frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// Position of its header.
    pub(super) at: u64,
    /// Bytes that have to be free for it; the ring's size if it has to be empty.
    pub(super) need: u64,
    /// Bytes that it takes.
    pub(super) takes: u64,
    /// Where a wrap marker goes.
    pub(super) marker: Option<u64>,
    /// The ring is empty and both positions go back to its beginning.
    pub(super) restart: bool,
    /// The position behind it.
    pub(super) end: u64,
}

/// The place of a frame with `len` bytes of data behind position `pos` of a ring of
/// `size` bytes; none if it can never fit. `pos <= size`.
pub(super) fn place(size: u64, pos: u64, len: u64) -> Option<Placement> {
    let total = len
        .checked_add(HEADER_BYTES)
        .filter(|total| *total <= size)?;
    let tail = size - pos;
    let leaves_room = |room: u64| room == 0 || room >= HEADER_BYTES;
    let end_of = |at: u64| if at + total == size { 0 } else { at + total };
    if total <= tail && (pos == 0 || leaves_room(tail - total)) {
        return Some(Placement {
            at: pos,
            need: total,
            takes: total,
            marker: None,
            restart: false,
            end: end_of(pos),
        });
    }
    if tail >= HEADER_BYTES && total <= size - tail {
        return Some(Placement {
            at: 0,
            need: tail + total,
            takes: tail + total,
            marker: Some(pos),
            restart: false,
            end: end_of(0),
        });
    }
    Some(Placement {
        at: 0,
        need: size,
        takes: total,
        marker: None,
        restart: true,
        end: end_of(0),
    })
}

/// A frame that a reader found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Position of its data.
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) sequence: u64,
    /// To be given to [`ReleaseQueue::release`].
    pub(super) ticket: u64,
}

/// Where a reader is.
#[derive(Clone, Debug)]
pub(super) struct ReadCursor {
    size: u64,
    pos: u64,
    expected: u64,
    /// Frames and wrap markers passed: the reader's count in the shared memory.
    passed: u64,
}

impl ReadCursor {
    pub(super) fn new(size: u64) -> ReadCursor {
        ReadCursor {
            size,
            pos: 0,
            expected: 1,
            passed: 0,
        }
    }

    /// The position to publish. Behind a frame that ends with the ring it is the
    /// ring's size, not 0: a writer of version 1 that wrote such a frame does not
    /// find the room at the beginning otherwise.
    pub(super) fn pos(&self) -> u64 {
        self.pos
    }

    /// The count to publish.
    pub(super) fn passed(&self) -> u64 {
        self.passed
    }

    /// Number of the next frame, unless its writer is a new one.
    pub(super) fn expected(&self) -> u64 {
        self.expected
    }

    /// Moves over the next frame, if there is one. `read_pos` and `free` are words
    /// of the shared memory, loaded by the caller; `header_at` copies a header.
    pub(super) fn next(
        &mut self,
        queue: &mut ReleaseQueue,
        read_pos: u64,
        free: u64,
        header_at: impl Fn(u64) -> FrameHeader,
    ) -> Result<Option<Found>, Damage> {
        let mut unread = self.unread(queue, free)?;
        let mut pos = self.pos;
        if read_pos != pos {
            // A writer sends both positions back to the beginning of an empty ring.
            if read_pos != 0 || queue.held() != 0 {
                return Err(Damage::Position {
                    found: read_pos,
                    expected: pos,
                    size: self.size,
                });
            }
            self.pos = 0;
            pos = 0;
        }
        if pos == self.size {
            pos = 0;
        }
        let mut wrapped = false;
        loop {
            if unread == 0 {
                return Ok(None);
            }
            let tail = self.size - pos;
            let header = if tail < HEADER_BYTES {
                FrameHeader::WRAP
            } else {
                header_at(pos)
            };
            if header.size != 0 {
                return self.take(queue, pos, header, tail.min(unread)).map(Some);
            }
            if wrapped || unread < tail || pos == 0 {
                return Err(Damage::Marker { at: pos });
            }
            queue.push_released(tail);
            (pos, wrapped, unread) = (0, true, unread - tail);
            self.pos = 0;
            self.passed = self.passed.wrapping_add(1);
        }
    }

    fn take(
        &mut self,
        queue: &mut ReleaseQueue,
        pos: u64,
        header: FrameHeader,
        room: u64,
    ) -> Result<Found, Damage> {
        let total = match header.size.checked_add(HEADER_BYTES) {
            Some(total) if total <= room => total,
            _ => {
                return Err(Damage::FrameLength {
                    len: header.size,
                    at: pos,
                    room,
                });
            }
        };
        // A new writer of version 1 begins at 1, whatever its predecessor wrote.
        if header.sequence != self.expected && header.sequence != 1 {
            return Err(Damage::Sequence {
                found: header.sequence,
                expected: self.expected,
            });
        }
        self.pos = pos + total;
        self.expected = header.sequence.wrapping_add(1);
        self.passed = self.passed.wrapping_add(1);
        Ok(Found {
            at: pos + HEADER_BYTES,
            len: header.size,
            sequence: header.sequence,
            ticket: queue.push(total),
        })
    }

    /// Bytes written and not passed.
    fn unread(&self, queue: &ReleaseQueue, free: u64) -> Result<u64, Damage> {
        let held = queue.held();
        self.size
            .checked_sub(free)
            .and_then(|taken| taken.checked_sub(held))
            .ok_or(Damage::FreeBytes {
                free,
                held,
                size: self.size,
            })
    }
}

/// Bytes to give back, and how many frames they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GivenBack {
    pub(super) bytes: u64,
    pub(super) frames: u16,
}

/// What was read and not given back, in the order it was read in.
///
/// Its memory is bounded by the ring: each entry stands for at least 17 bytes of
/// it, or for the one tail.
#[derive(Clone, Debug, Default)]
pub(super) struct ReleaseQueue {
    entries: VecDeque<Entry>,
    /// Ticket of the first entry.
    first: u64,
    held: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: u64,
    frames: u16,
    released: bool,
}

impl ReleaseQueue {
    /// Bytes in it.
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    fn push(&mut self, bytes: u64) -> u64 {
        self.held += bytes;
        self.entries.push_back(Entry {
            bytes,
            frames: 1,
            released: false,
        });
        self.first + self.entries.len() as u64 - 1
    }

    /// Adds bytes that are released already and wait for what is in front of them.
    fn push_released(&mut self, bytes: u64) {
        self.held += bytes;
        self.entries.push_back(Entry {
            bytes,
            frames: 0,
            released: true,
        });
    }

    /// Marks a frame as released; a second time, or with a ticket that is none,
    /// nothing happens.
    pub(super) fn release(&mut self, ticket: u64) {
        let entry = ticket
            .checked_sub(self.first)
            .and_then(|at| usize::try_from(at).ok())
            .and_then(|at| self.entries.get_mut(at));
        if let Some(entry) = entry {
            entry.released = true;
        }
    }

    /// Takes out what can be given back now.
    pub(super) fn give_back(&mut self) -> GivenBack {
        let mut given = GivenBack::default();
        while let Some(entry) = self.entries.front().filter(|entry| entry.released) {
            if given.frames == u16::MAX {
                break;
            }
            given.bytes += entry.bytes;
            given.frames += entry.frames;
            self.entries.pop_front();
            self.first += 1;
        }
        self.held -= given.bytes;
        given
    }
}

/// Number of the last frame written in the present lap, found by walking over the
/// lap's headers from the ring's beginning to `write_pos`; none if they do not lead
/// there within [`ZEROBUFFER_RESUME_STEPS`] steps. Each header is copied once.
pub(super) fn last_sequence(
    size: u64,
    write_pos: u64,
    header_at: impl Fn(u64) -> FrameHeader,
) -> Option<u64> {
    let end = if write_pos == 0 { size } else { write_pos };
    let (mut at, mut last) = (0u64, None);
    for _ in 0..ZEROBUFFER_RESUME_STEPS {
        if at >= end {
            return last;
        }
        if size - at < HEADER_BYTES {
            return last.filter(|_| write_pos == 0);
        }
        let header = header_at(at);
        if header.size == 0 {
            return last.filter(|_| write_pos == 0);
        }
        at = at
            .checked_add(HEADER_BYTES)?
            .checked_add(header.size)
            .filter(|at| *at <= end)?;
        last = Some(header.sequence);
    }
    None
}
