//! What a client knows of each slot, whatever the slot says.

use super::Sequence;
use super::layout::slot;
use super::request::Poll;

/// What an entry of the completion ring is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// Its frame is known already, or never was in flight.
    Stale,
    /// Its frame is about to be handed over.
    NotYet,
    /// Its frame has just been finished.
    Done(Sequence),
}

/// What the client knows of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Free,
    /// A response is awaited.
    InFlight,
    /// Nobody awaits the response; it gives itself back.
    Unwanted,
    /// No response comes.
    OneWay,
    /// Finished, as this says, and not released.
    Done(Poll),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) sequence: Sequence,
    pub(super) phase: Phase,
    pub(super) capacity: u32,
    pub(super) len: u32,
    /// Block of the payload and offset of the data; none if inline.
    pub(super) place: Option<(u64, u64)>,
    /// What the slot holds as offset, length, flags and wish, as far as this side
    /// knows. What stands there is not stored again: each store is one more moment in
    /// which a polling server takes the line away.
    pub(super) header: [u64; 4],
}

/// The header words of a slot, in the order of [`Record::header`].
pub(super) const HEADER: [usize; 4] = [slot::OFFSET, slot::LENGTH, slot::FLAGS, slot::CANCEL];
/// No header word is ever this.
pub(super) const UNKNOWN: u64 = u64::MAX;
