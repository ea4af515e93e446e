//! What a commit answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::RegionError;
use super::layout::ACK_SEQ;
use super::pulse::Waited;
use super::writer::Shared;
use crate::limits::MAX_ACKED_SLOTS;
use crate::sys::process::deadline_in;
use crate::words::{EpochKind, Generation};

/// The epoch that holds what was stored before a commit.
#[derive(Clone, Debug)]
pub struct Epoch {
    /// Its number within the generation.
    pub number: u64,
    /// Whether it is an exact instant of the region.
    pub kind: EpochKind,
    /// The life of the region that the number counts in.
    pub generation: Generation,
    pub(super) shared: Arc<Shared>,
}

impl Epoch {
    /// Waits until `replicas` replicas have acknowledged this epoch or a later one.
    ///
    /// # Errors
    /// [`RegionError::Replicas`] for more than [`MAX_ACKED_SLOTS`],
    /// [`RegionError::TimedOut`], [`RegionError::EngineGone`] if the engine died
    /// (replicas may have it all the same), [`RegionError::GenerationChanged`].
    pub fn wait_acked(&self, replicas: usize, deadline: Duration) -> Result<(), RegionError> {
        if replicas as u64 > MAX_ACKED_SLOTS {
            return Err(RegionError::Replicas { replicas });
        }
        let Some(last) = replicas.checked_sub(1) else {
            return Ok(());
        };
        let control = self.shared.control();
        let end = deadline_in(deadline);
        let seq = control.mem.atomic_u32(ACK_SEQ);
        loop {
            // SYNC(ack_seq): pairs with the addition in `set_acked`.
            let now = seq.load(Ordering::Acquire);
            if control.generation() != self.generation {
                return Err(RegionError::GenerationChanged);
            }
            if control.acked()[last] >= self.number {
                return Ok(());
            }
            let link = self.shared.link().ok_or(RegionError::EngineGone)?;
            match link.pulse.wait_with(seq, now, Some(end))? {
                Waited::Look => {}
                Waited::Gone => return Err(RegionError::EngineGone),
                Waited::TimedOut => return Err(RegionError::TimedOut),
            }
        }
    }
}
