//! Who, which and when: the names that operations and their places are known by.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A process that takes part, as the configuration numbers it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ProcessId(pub u32);

/// A variable, as the configuration numbers it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct VariableId(pub u32);

/// One life of a process's memory: a random number, never 0, drawn at its start.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

/// One operation, unique within its session: who asked for it, in which life, as its how
/// manieth. A life that goes on in a new session counts from 1 again, at later times.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct OperationId {
    /// The process that submitted it.
    pub initiator: ProcessId,
    /// That process's life.
    pub incarnation: Incarnation,
    /// Counts the operations of that life in its session from 1.
    pub number: u64,
}

/// A place in the total order; places compare by time, and at the same time by id.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct OrderKey {
    /// Logical time: a Lamport clock's or a sequencer's count, no unit.
    pub time: u64,
    /// The operation that stands there.
    pub id: OperationId,
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for VariableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            initiator,
            incarnation,
            number,
        } = self;
        write!(f, "{initiator}.{:x}.{number}", incarnation.0)
    }
}

impl fmt::Display for OrderKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.time, self.id)
    }
}
