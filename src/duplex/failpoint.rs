//! Places at which a test can make either side stop.
//!
//! Two words in the control block, looked at only where the channel was made with
//! failpoints: `armed` holds the number of the place, `reached` is stored by the side
//! that gets there, which then sleeps until `armed` changes or it is killed.

use std::sync::atomic::Ordering;

use crate::sys::futex;

use super::segment::Segment;

/// A place: just before the transition it is named after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Failpoint {
    /// Client: the slot is taken, nothing written.
    ClientWriting = 1,
    /// Client: all written, not handed over.
    ClientRequest = 2,
    /// Client: handed over, the server not rung.
    ClientPost = 3,
    /// Client: the response is seen, not read.
    ClientReading = 4,
    /// Client: read, not given back.
    ClientReleased = 5,
    /// Server: the request is taken, not marked.
    ServerBusy = 6,
    /// Server: marked, the handler not run.
    ServerHandler = 7,
    /// Server: the handler ran, not handed over.
    ServerResponse = 8,
    /// Server: handed over, no completion stored; of a server with several workers the
    /// other way round.
    ServerCompletion = 9,
    /// Server: all stored, the client not rung.
    ServerPost = 10,
    /// Server: a cancelled request is seen.
    ServerCancelled = 11,
}

impl Failpoint {
    /// All places.
    pub const ALL: [Failpoint; 11] = [
        Failpoint::ClientWriting,
        Failpoint::ClientRequest,
        Failpoint::ClientPost,
        Failpoint::ClientReading,
        Failpoint::ClientReleased,
        Failpoint::ServerBusy,
        Failpoint::ServerHandler,
        Failpoint::ServerResponse,
        Failpoint::ServerCompletion,
        Failpoint::ServerPost,
        Failpoint::ServerCancelled,
    ];
}

/// Armed instead of a place: both sides delay each sleep by a random time.
const DELAYS: u32 = 0x100;
/// Longest delay, in turns of an empty loop of some 40 ns each.
const MAX_TURNS: u64 = 500;

impl Segment {
    /// Makes both sides pause for a random time between their last look and each sleep.
    pub fn arm_delays(&self) {
        let (armed, _) = self.failpoint_words();
        armed.store(DELAYS, Ordering::Release);
    }

    /// The pause of [`Segment::arm_delays`]. `seed` is the caller's, not 0.
    #[cold]
    pub fn delay_if_armed(&self, seed: &mut u64) {
        let (armed, _) = self.failpoint_words();
        if armed.load(Ordering::Relaxed) != DELAYS {
            return;
        }
        // Xorshift: Marsaglia, Xorshift RNGs, 2003.
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        // One in four at once, so that both orders are common.
        if *seed & 3 != 0 {
            for _ in 0..(*seed >> 8) % MAX_TURNS {
                std::hint::spin_loop();
            }
        }
    }

    /// Makes whoever reaches `place` stop there; `None` lets them go on.
    pub fn arm_failpoint(&self, place: Option<Failpoint>) {
        let (armed, reached) = self.failpoint_words();
        reached.store(0, Ordering::Relaxed);
        // SYNC(failpoint): pairs with the loads in `stop_at`.
        armed.store(place.map_or(0, |place| place as u32), Ordering::Release);
        // Refused only for an address that is not mapped.
        let _ = futex::wake(armed, u32::MAX);
    }

    /// The place at which somebody stands, as a number; 0 = nobody.
    pub fn failpoint_reached(&self) -> u32 {
        let (_, reached) = self.failpoint_words();
        reached.load(Ordering::Acquire)
    }

    /// Stops here if this place is armed.
    #[cold]
    pub(super) fn stop_at(&self, place: Failpoint) {
        let (armed, reached) = self.failpoint_words();
        // SYNC(failpoint): pairs with the store in `arm_failpoint`.
        while armed.load(Ordering::Acquire) == place as u32 {
            reached.store(place as u32, Ordering::Release);
            let _ = futex::wake(reached, u32::MAX);
            if futex::wait(armed, place as u32, None).is_err() {
                return;
            }
        }
    }
}
