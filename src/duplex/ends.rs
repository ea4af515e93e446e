//! How requests of a client end that nobody waits for: unwanted ones, one-way ones,
//! and those whose server died.

use std::sync::atomic::Ordering;

use super::Sequence;
use super::client::ClientCore;
use super::layout::{line, server_counter, slot};
use super::record::Phase;
use super::request::Poll;
use super::state::{self, Answer, State};

impl ClientCore {
    /// The response of `sequence` is not wanted any more. If the server has not begun
    /// it does not; either way the room comes back by itself. False if there is no
    /// such request, or its response is there already.
    pub fn cancel(&mut self, sequence: Sequence) -> bool {
        self.close_lane();
        self.kick();
        let index = (sequence & self.mask) as usize;
        let record = &mut self.records[index];
        if record.sequence != sequence || record.phase != Phase::InFlight {
            return false;
        }
        record.phase = Phase::Unwanted;
        self.loose += 1;
        let wish = self.segment.wishes().word(index);
        wish.store(sequence, Ordering::Relaxed);
        true
    }

    /// Gives the room of an unwanted or one-way request back if the server is done
    /// with it.
    pub(super) fn reap(&mut self, index: usize) -> bool {
        let record = &self.records[index];
        let phase = record.phase;
        let word = &self.slots.line(index).0[slot::STATE];
        match state::answer(word, record.sequence) {
            Answer::Pending => return false,
            Answer::Done(_) => {}
            Answer::Foreign(_) => self.broken = true,
        }
        self.loose = self.loose.saturating_sub(1);
        if phase == Phase::Unwanted {
            self.learned();
        }
        self.give_back(index);
        true
    }

    /// Gives back what gives itself back. True if anything was.
    pub fn reap_all(&mut self) -> bool {
        self.close_lane();
        self.kick();
        let mut any = false;
        for index in 0..self.records.len() {
            if self.loose == 0 {
                break;
            }
            let loose = matches!(self.records[index].phase, Phase::OneWay | Phase::Unwanted);
            any |= loose && self.reap(index);
        }
        any
    }

    /// Between [`ClientCore::server_died`] and a new server's having the memory: with
    /// `true` nothing can be sent until it is said with `false`. A new server raises the
    /// generation before it has read where to begin; one that was asked in vain may do so
    /// at any time later.
    pub fn set_taking_over(&mut self, taking_over: bool) {
        self.taking_over = taking_over;
    }

    /// What [`ClientCore::set_taking_over`] said last.
    pub fn is_taking_over(&self) -> bool {
        self.taking_over
    }

    /// Whether what was in flight was ended, and no new server has come since, or it is not
    /// said yet that it has.
    pub fn is_orphan(&self) -> bool {
        self.taking_over || self.orphan_of != 0 && self.segment.generation() == self.orphan_of
    }

    /// The server died: every request in flight ends as cancelled. Answers each one's
    /// sequence, and whether its bytes may have been changed. What was finished before
    /// can still be read.
    pub fn server_died(&mut self) -> Vec<(Sequence, bool)> {
        self.close_lane();
        self.kick();
        // SYNC(serving): the handler's stores come after this word's.
        let counters = &self.lines.line(line::SERVER_COUNTERS).0;
        let serving = counters[server_counter::SERVING].load(Ordering::Acquire);
        let mut lost = Vec::new();
        self.forget_told();
        for index in 0..self.records.len() {
            let record = self.records[index];
            // SYNC(serving): as above, of a server with several workers.
            let word = self.slots.line(index).0[slot::STATE].load(Ordering::Acquire);
            let busy = word == state::pack(record.sequence, State::ServerBusy);
            match record.phase {
                Phase::InFlight if self.look(index) != Poll::Pending => {
                    self.finished.push_back(record.sequence);
                }
                Phase::InFlight => {
                    lost.push((record.sequence, busy || serving == record.sequence));
                    self.records[index].phase = Phase::Done(Poll::Cancelled);
                    self.held += 1;
                    self.records[index].len = 0;
                    let word = &self.slots.line(index).0[slot::STATE];
                    state::note(word, record.sequence, State::Poisoned);
                    self.learned();
                }
                Phase::OneWay | Phase::Unwanted if !self.reap(index) => {
                    if record.phase == Phase::Unwanted {
                        self.learned();
                    }
                    self.loose = self.loose.saturating_sub(1);
                    self.give_back(index);
                }
                _ => {}
            }
        }
        // A new server draws tickets from 1 again.
        (self.completed, self.ticket) = (0, 1);
        self.orphan_of = self.segment.generation();
        self.mirror();
        lost.sort_unstable();
        self.finished.make_contiguous().sort_unstable();
        lost
    }
}
