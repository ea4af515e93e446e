//! Replies that wait to be sent, each with what it waits for.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One reply in the bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queued {
    /// Its first byte, counted from the start of the stream of replies.
    start: u64,
    end: u64,
    /// Number of the change that has to be safe before this goes.
    after: u64,
}

/// Bytes for one peer, in the order in which they go.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    /// Bytes in front that were sent.
    sent: usize,
    /// Place in the stream of the first of the bytes.
    base: u64,
    replies: VecDeque<Queued>,
    /// Whether the segment's descriptors go with the next bytes.
    pub(super) with_descriptors: bool,
    /// Those that go instead, where the peer has its own.
    pub(super) own_descriptors: Vec<Arc<OwnedFd>>,
}

impl Outbox {
    /// Where the next reply is put.
    pub(crate) fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// All bytes behind `from` are one reply, which goes once change `after` is safe.
    pub(crate) fn reply(&mut self, from: usize, after: u64) {
        self.replies.push_back(Queued {
            start: self.base + from as u64,
            end: self.base + self.bytes.len() as u64,
            after,
        });
    }

    /// Replies that have not gone.
    pub(crate) fn unanswered(&self) -> usize {
        self.replies.len()
    }

    /// Bytes that have not gone.
    pub(crate) fn waiting(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// The bytes that may go now that all changes up to `safe` are.
    pub(super) fn sendable(&self, safe: u64) -> &[u8] {
        let held = match self.replies.back() {
            Some(last) if last.after > safe => self.replies.iter().find(|reply| reply.after > safe),
            _ => None,
        };
        let end = held.map_or(self.bytes.len(), |held| (held.start - self.base) as usize);
        self.bytes.get(self.sent..end).unwrap_or_default()
    }

    /// Number of the change that the next held reply waits for.
    pub(super) fn held_for(&self, safe: u64) -> Option<u64> {
        let last = self.replies.back()?;
        (last.after > safe).then_some(last.after)
    }

    /// The bytes of each reply that waits for a change after `safe` and up to `lost`.
    pub(super) fn each_held(&mut self, safe: u64, lost: u64, mut change: impl FnMut(&mut [u8])) {
        for reply in &self.replies {
            if reply.after > safe && reply.after <= lost {
                let place = (reply.start - self.base) as usize..(reply.end - self.base) as usize;
                if let Some(bytes) = self.bytes.get_mut(place) {
                    change(bytes);
                }
            }
        }
    }

    /// `count` of the bytes in front have gone.
    pub(super) fn gone(&mut self, count: usize) {
        self.sent += count;
        if self.sent == self.bytes.len() {
            self.base += self.bytes.len() as u64;
            self.bytes.clear();
            self.replies.clear();
            self.sent = 0;
            return;
        }
        let reached = self.base + self.sent as u64;
        while self.replies.front().is_some_and(|one| one.end <= reached) {
            self.replies.pop_front();
        }
        // What was sent is given up once that moves fewer bytes than it frees.
        if self.sent > self.bytes.len() / 2 {
            self.bytes.drain(..self.sent);
            self.base += self.sent as u64;
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(afters: &[u64]) -> Outbox {
        let mut out = Outbox::default();
        for after in afters {
            let from = out.bytes().len();
            out.bytes().extend([*after as u8; 4]);
            out.reply(from, *after);
        }
        out
    }

    #[test]
    fn replies_wait_for_what_they_follow() {
        let mut out = with(&[0, 1, 1, 3]);
        assert_eq!(out.sendable(0), [0; 4]);
        assert_eq!(out.held_for(0), Some(3));
        assert_eq!(out.sendable(2).len(), 12);
        out.gone(2);
        assert_eq!((out.unanswered(), out.waiting()), (4, 14));
        out.gone(8);
        assert_eq!((out.unanswered(), out.waiting()), (2, 6));
        assert_eq!(out.sendable(2), [1; 2]);
        out.each_held(2, 3, |bytes| bytes.fill(9));
        assert_eq!(out.sendable(3), [1, 1, 9, 9, 9, 9]);
        out.gone(6);
        assert_eq!((out.unanswered(), out.waiting()), (0, 0));
        assert_eq!(out.held_for(0), None);
        out.bytes().push(7);
        out.reply(0, 4);
        assert!(out.sendable(3).is_empty());
        assert_eq!(out.sendable(4), [7]);
    }
}
