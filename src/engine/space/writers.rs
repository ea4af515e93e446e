//! Clients on this host that write the segment by mapping: who they are, and what becomes of
//! one that stays at a stripe which others wait for.
//!
//! ```text
//! operation --> all its stripes free? --yes--> carried out
//!     ^                 | no
//!     |                 +--> its connection waits; tried again each millisecond (a look)
//!     |                          |
//!     |   the holder says that it is not there        --> the lock is broken open
//!     |   it wants it, and has changed nothing        --> taken away after the lease
//!     |   it holds it, and is dead                    --> taken over: the range is suspect
//!     +-- it holds it for longer than the lease       --> killed; taken over when it is dead
//! ```
//! - I1: only a process is killed whose own page, which it alone can write, has said for a
//!   whole lease that it holds the stripe; it is the process that connected, by its pidfd.
//! - I2: no operation waits for a client for longer than [`GIVE_UP_LEASES`] leases and as
//!   many looks, whatever clients store into the words.
//! - I3: a lease counts looks that this loop has made, each a millisecond or more after the
//!   one before: a host that stood still kills nobody.
//!
//! A range is suspect that was taken from who may have been in the middle of changing it.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::keys::{Key, Keyed};
use crate::limits::{MAX_SPACE_OPERATION, MAX_SPACE_SUSPECTS};
use crate::shm::lease::Stand;
use crate::space::frame::{Operation, Request, items};
use crate::space::locks::{Blocked, Locks, stripes_of};
use crate::sys::SysError;
use crate::sys::process::PidFd;
use crate::wire::control::{LocalWriters, Suspect};

/// Time between two looks at a lock that is in the way.
pub(super) const LOOK: Duration = Duration::from_millis(1);
/// Leases after which a lock is broken open although its holder lives: its words change, or
/// it cannot be killed. Nobody that keeps to the protocol comes to that.
const GIVE_UP_LEASES: u64 = 50;
/// Locks in the way of one operation that are dealt with before it waits for the next look.
const DEALT_WITH: usize = 8;
/// `SIGKILL`.
const KILL: i32 = nix::libc::SIGKILL;

/// What clients that write are given, and how long they may stay at a stripe.
#[derive(Debug)]
pub struct WritersConfig {
    /// The segment's memory, open for writing.
    pub data: OwnedFd,
    /// Longest time at a stripe that others wait for.
    pub lease: Duration,
}

/// A client that may write, and what it is to be passed.
pub(super) type Admitted = (Key, Vec<Arc<OwnedFd>>);

/// One client that writes.
struct Writer {
    owner: u16,
    process: PidFd,
    /// The same, for the ring to wait for its death.
    exit: Arc<OwnedFd>,
    was_killed: bool,
    /// What its page said when a lock of its was first found in the way, and that look.
    seen: Option<(u64, u64, u64)>,
}

/// All of them.
pub(crate) struct Writers {
    locks: Locks,
    /// Segment and stripes, to write.
    shared: [Arc<OwnedFd>; 2],
    segment: u64,
    /// Looks of one lease.
    lease: u64,
    clients: Keyed<Writer>,
    /// Their keys, by number.
    owners: BTreeMap<u16, Key>,
    looks: u64,
    looked: Option<Instant>,
    /// Stripes that operations wait for, and the look since when.
    awaited: BTreeMap<u64, u64>,
    /// An operation has to wait.
    is_blocked: bool,
    /// Clients whose death the ring does not wait for yet.
    fresh: Vec<Key>,
    /// Clients that it need not wait for any more.
    gone: Vec<Key>,
    stripes: Vec<u64>,
    counts: LocalWriters,
    has_news: bool,
}

impl Writers {
    pub(super) fn new(
        locks: Locks,
        shared: [Arc<OwnedFd>; 2],
        segment: u64,
        lease: Duration,
    ) -> Self {
        Self {
            locks,
            shared,
            segment,
            lease: (lease.as_millis() as u64).max(1),
            clients: Keyed::new(),
            owners: BTreeMap::new(),
            looks: 0,
            looked: None,
            awaited: BTreeMap::new(),
            is_blocked: false,
            fresh: Vec::new(),
            gone: Vec::new(),
            stripes: Vec::new(),
            counts: LocalWriters::default(),
            has_news: true,
        }
    }

    /// Takes a client on that connected as `process`; what it is to be passed. None if it
    /// could not be killed, or there are too many.
    pub(super) fn admit(&mut self, process: PidFd) -> Option<Admitted> {
        match self.try_admit(process) {
            Ok(admitted) => admitted,
            Err(error) => {
                tracing::info!(%error, "a client on this host may not write by mapping");
                None
            }
        }
    }

    fn try_admit(&mut self, process: PidFd) -> Result<Option<Admitted>, SysError> {
        // Signal 0 says whether another would be delivered.
        process.kill(0)?;
        let exit = Arc::new(process.try_clone_fd()?);
        let Some((owner, page)) = self.locks.admit()? else {
            return Ok(None);
        };
        let key = self.clients.insert(Writer {
            owner,
            process,
            exit,
            was_killed: false,
            seen: None,
        });
        self.owners.insert(owner, key);
        self.fresh.push(key);
        self.counts.writing += 1;
        self.has_news = true;
        let [data, stripes] = self.shared.each_ref().map(Arc::clone);
        Ok(Some((key, vec![data, stripes, Arc::new(page)])))
    }

    /// A client's connection ended; `by_it` if it was the client that ended it. One that may
    /// be writing still, since it does not know, stays until it dies.
    pub(super) fn left(&mut self, key: Key, by_it: bool) {
        let Some(writer) = self.clients.get(key) else {
            return;
        };
        if by_it && self.locks.is_idle(writer.owner) {
            self.dismiss(key);
        }
    }

    /// A client's process has ended.
    pub(super) fn died(&mut self, key: Key) {
        let Some(writer) = self.clients.get(key) else {
            return;
        };
        let (owner, was_killed) = (writer.owner, writer.was_killed);
        if let Some(stripe) = self.locks.bury(owner) {
            let why = if was_killed {
                "a client held it for longer than its lease and was killed"
            } else {
                "a client died while it held it"
            };
            self.suspect(stripe, why);
        }
        self.dismiss(key);
    }

    fn dismiss(&mut self, key: Key) {
        if let Some(writer) = self.clients.remove(key) {
            self.locks.dismiss(writer.owner);
            self.owners.remove(&writer.owner);
            self.gone.push(key);
            self.counts.writing -= 1;
            self.has_news = true;
        }
    }

    fn suspect(&mut self, stripe: u64, why: &'static str) {
        let range = self.locks.range(stripe);
        tracing::warn!(
            first = range.start,
            end = range.end,
            why,
            "a range of the segment may hold half a change"
        );
        self.counts.taken_over += 1;
        self.has_news = true;
        let suspects = &mut self.counts.maybe_modified;
        if suspects.len() as u64 >= MAX_SPACE_SUSPECTS {
            suspects.remove(0);
        }
        suspects.push(Suspect {
            first: range.start,
            end: range.end,
            why: why.to_owned(),
        });
    }

    /// Enters the locks of what a request touches. False if it has to wait.
    pub(super) fn hold(&mut self, request: &Request, body: &[u8]) -> bool {
        let mut stripes = std::mem::take(&mut self.stripes);
        stripes.clear();
        touched_by(self.segment, request, body, &mut stripes);
        let is_held = self.hold_all(&stripes);
        self.stripes = stripes;
        self.is_blocked |= !is_held;
        is_held
    }

    fn hold_all(&mut self, stripes: &[u64]) -> bool {
        for _ in 0..DEALT_WITH {
            let blocked = match self.locks.hold(stripes.iter().copied()) {
                Ok(()) => {
                    for stripe in stripes {
                        self.awaited.remove(stripe);
                    }
                    return true;
                }
                Err(blocked) => blocked,
            };
            if !self.deal_with(&blocked) {
                return false;
            }
        }
        false
    }

    /// The operation is carried out.
    pub(super) fn let_go(&mut self, changed: bool) {
        self.locks.let_go(changed);
    }

    /// What to do about a lock that is in the way. Whether to try again at once.
    fn deal_with(&mut self, blocked: &Blocked) -> bool {
        let since = *self.awaited.entry(blocked.stripe).or_insert(self.looks);
        if self.looks - since > self.lease * GIVE_UP_LEASES {
            return self.give_up(blocked);
        }
        let stand = self.locks.stand(blocked);
        let key = blocked.owner().and_then(|owner| self.owners.get(&owner));
        let (Some(key), Stand::Wants | Stand::Holds(_)) = (key.copied(), stand) else {
            if stand == Stand::Denies && self.locks.break_open(blocked) {
                tracing::warn!(stripe = blocked.stripe, "a lock named who did not hold it");
                self.counts.repaired += 1;
                self.has_news = true;
            }
            return true;
        };
        let said = match stand {
            Stand::Holds(said) => said,
            _ => 0,
        };
        let Some(writer) = self.clients.get_mut(key) else {
            return false;
        };
        if writer.process.has_exited().unwrap_or(false) {
            self.died(key);
            return true;
        }
        let looks = self.looks;
        let (stripe, lease) = (blocked.stripe, self.lease);
        let seen = writer
            .seen
            .filter(|seen| (seen.0, seen.1) == (stripe, said));
        let (_, _, first) = *writer.seen.insert(seen.unwrap_or((stripe, said, looks)));
        if looks - first < lease {
            return false;
        }
        match stand {
            Stand::Wants => {
                // Whoever forged the word, nobody is killed for it.
                self.counts.repaired += u64::from(self.locks.take_unused(blocked));
                self.has_news = true;
                true
            }
            _ => self.kill(key, stripe),
        }
    }

    /// Kills a client that has held a stripe for a whole lease. It is not dead at once.
    fn kill(&mut self, key: Key, stripe: u64) -> bool {
        let Some(writer) = self.clients.get_mut(key) else {
            return false;
        };
        if writer.was_killed {
            return false;
        }
        writer.was_killed = true;
        let pid = writer.process.pid().unwrap_or(-1);
        match writer.process.kill(KILL) {
            Ok(()) => {
                let lease_ms = self.lease;
                tracing::warn!(
                    pid,
                    stripe,
                    lease_ms,
                    "a client held a stripe for longer than its lease; it was killed"
                );
                self.counts.killed += 1;
                self.has_news = true;
            }
            // It is dead, or has changed its user since: then it comes to giving up.
            Err(error) => tracing::warn!(pid, %error, "a client cannot be killed"),
        }
        false
    }

    /// Breaks a lock open although its holder may live.
    fn give_up(&mut self, blocked: &Blocked) -> bool {
        self.awaited.remove(&blocked.stripe);
        let changed = matches!(self.locks.stand(blocked), Stand::Holds(_));
        if self.locks.break_open(blocked) {
            self.counts.repaired += 1;
            self.has_news = true;
            if changed {
                self.suspect(blocked.stripe, "clients would not leave it to the server");
            }
        }
        true
    }

    /// Whether an operation has to wait since this was last asked.
    pub(super) fn take_blocked(&mut self) -> bool {
        std::mem::take(&mut self.is_blocked)
    }

    /// Whether it is time for another look at what is in the way.
    pub(super) fn look(&mut self, now: Instant) -> bool {
        if self.looked.is_some_and(|last| now < last + LOOK) {
            return false;
        }
        self.looked = Some(now);
        self.looks += 1;
        true
    }

    /// Nothing waits: what comes next begins anew.
    pub(super) fn rest(&mut self) {
        self.awaited.clear();
    }

    /// Clients whose deaths are to be waited for from now on.
    pub(super) fn take_fresh(&mut self) -> Vec<(Key, Arc<OwnedFd>)> {
        let fresh = std::mem::take(&mut self.fresh);
        let exit = |key: Key| Some((key, Arc::clone(&self.clients.get(key)?.exit)));
        fresh.into_iter().filter_map(exit).collect()
    }

    /// Those that are not any more.
    pub(super) fn take_gone(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.gone)
    }

    /// What was counted, if that has changed since.
    pub(super) fn news(&mut self) -> Option<LocalWriters> {
        std::mem::take(&mut self.has_news).then(|| self.counts.clone())
    }
}

/// Puts the stripes of what a request touches into `out`, ascending, each once; none of what
/// will be refused.
fn touched_by(segment: u64, request: &Request, body: &[u8], out: &mut Vec<u64>) {
    let stripes = |offset, len: u32| {
        let is_short = u64::from(len) <= MAX_SPACE_OPERATION;
        let stripes = stripes_of(segment, offset, len.into()).ok();
        stripes.filter(|_| is_short).unwrap_or(0..0)
    };
    match request.operation {
        Operation::Stat | Operation::Ping => {}
        Operation::Batch => {
            let all = items(request.len, body).into_iter().flatten().flatten();
            let all: BTreeSet<u64> = all
                .flat_map(|item| stripes(item.offset, item.len))
                .collect();
            out.extend(all);
        }
        _ => out.extend(stripes(request.offset, request.len)),
    }
}
