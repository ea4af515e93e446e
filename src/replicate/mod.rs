//! From a source's epochs to a replica's, as plain values.
//!
//! ```text
//! captures ─> Publication ─ poll() ─> frames ~~~ link ~~~> Applier ─> ApplyJob ─> replica
//!                  ^                                          │
//!                  └──────── ACK, RESYNC, DIGEST <── poll() ──┘
//! ```
//!
//! [`Publication`] is the source's side of one region and keeps, for each replica,
//! the set of bytes that it may lack, never a queue of payloads. [`Applier`] is the
//! replica's side. Neither knows sockets, clocks or threads: time is an argument,
//! content is a slice that the caller passes, frames are bytes.
//!
//! Invariants, for a replica that has epoch h of the source's generation:
//! - I1: all bytes outside of the pending and in-flight extents are the same in
//!   epoch h and in the source's epoch now. Extents leave by ack only.
//! - I2: an update from base b to epoch e holds all bytes that differ between any
//!   epoch in `b..e` and e, with their content as of e. So it is applied iff
//!   `b <= h < e`; what it builds on is never guessed.
//! - I3: the update is handed over whole and checked, or its extents go back to
//!   pending. A replica whose memory was changed by part of an update is `Syncing`
//!   until a later update, which holds at least the same extents, is whole.
//! - I4: digests decide only between bytes that were compared: a chunk that changed
//!   after it was compared is pending because of the capture that changed it.
//!
//! On failure (loss of the link, a gap, a damaged or missing frame, a pin given up)
//! what was in flight is pending again and the next update is made of newer content.

mod applier;
mod apply;
mod publication;
mod shipper;

pub use applier::{Applied, Applier, ApplyError, ReplicaState};
pub use apply::{ApplyJob, Update};
pub use publication::{
    CaptureInfo, Coming, Out, ProtocolError, Publication, ReplicaKey, ShipperId, ShipperState,
    ShipperStatus, Spare, SubscribeError,
};

#[cfg(test)]
mod tests;
