//! The rules that the order rests on, each as a constant: a model sets one of them to
//! false and must then find what it is there for. [`Exact`] is what runs, and the
//! compiler drops the rest.

use std::fmt::Debug;
use std::hash::Hash;

/// What the algorithm does; all true, but for a model's negative controls.
pub trait Rules: Copy + Debug + Eq + Hash + 'static {
    /// A commit raises the clock to its time, so that no later proposal is below it.
    const COMMIT_RAISES_CLOCK: bool = true;
    /// Operations of the same time are delivered in the order of their ids, not of their
    /// arrival.
    const TIES_BY_ID: bool = true;
    /// A process has one delivery queue, not one per variable.
    const ONE_QUEUE: bool = true;
    /// A committed operation waits until nothing can come before it.
    const WAITS_ITS_TURN: bool = true;
    /// Variables that share any subscriber have one sequencer, not only those that share
    /// two.
    const SHARE_ANY: bool = true;
}

/// All rules kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Exact;

impl Rules for Exact {}
