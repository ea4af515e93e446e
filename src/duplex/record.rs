//! What a client knows of each slot, whatever the slot says.

use super::Sequence;
use super::batch::Shape;
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
    /// If it is a batch; without items if not.
    pub(super) batch: Shape,
    /// Block of the payload and offset of the data; none if inline.
    pub(super) place: Option<(u64, u64)>,
    /// The length word that the slot holds, as far as this side knows. What stands
    /// there is not stored again: each store is one more moment in which a polling
    /// server takes the line away.
    pub(super) length: u64,
}

/// No length word is ever this.
pub(super) const UNKNOWN: u64 = u64::MAX;
