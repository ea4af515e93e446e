//! The locks of a segment's stripes, which its server shares with clients that write the
//! segment by mapping.
//!
//! ```text
//! stripes, version 2: | header 4096 | u64 u64 u64 ..                 written by all of them
//! page of a client:   | magic 8 | version u32 | owner u32 | zero 48 | own word u64 | zero ..
//! ```
//! The protocol over the words is [`lease`]'s. Each client has a page of its own, made for
//! it alone and passed to nobody else, so that no client can speak for another.
//!
//! Invariants:
//! - I1: the server never waits for a word: it has all locks of an operation, or none.
//! - I2: what a word or a page says is compared with bounds before it is used; whatever they
//!   say, nothing here panics or goes on for ever.
//! - I3: a stripe that may hold half a change is named by whoever frees it.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use super::stripes::{HEADER_BYTES, MappedStripes, Stripes, StripesError, touched};
use crate::limits::{MAX_SPACE_WRITERS, SPACE_STRIPE};
use crate::shm::SharedMemory;
use crate::shm::lease::{self, Says, Stand};
use crate::sys::SysError;
use crate::sys::map::{Access, Mapping};
use crate::sys::memfd::{self, Seals};
use crate::units::{OutOfRange, PAGE_SIZE, checked_range};

const MAGIC: [u8; 8] = *b"uffdWRTR";
const VERSION: u32 = 1;
const VERSION_AT: u64 = 8;
const OWNER_AT: u64 = 12;
const OWN_AT: u64 = 64;

/// Looks at a lock that is held, before an operation is put off: about as long as a small
/// copy takes.
const LOOKS: u32 = 64;

const _: () = assert!(MAX_SPACE_WRITERS < lease::SERVER as u64);

/// A lock that stands in the way of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// Which stripe.
    pub stripe: u64,
    word: u64,
}

impl Blocked {
    /// The client that is said to hold it; none if no client can.
    pub fn owner(&self) -> Option<u16> {
        let owner = lease::owner_of(self.word);
        (u64::from(owner) <= MAX_SPACE_WRITERS && owner > 0).then_some(owner)
    }
}

/// The server's side.
#[derive(Debug)]
pub struct Locks {
    memory: SharedMemory,
    segment: u64,
    /// The page of each client, at its number less one.
    pages: Vec<Option<SharedMemory>>,
    /// Stripes of the operation that is being carried out, ascending.
    held: Vec<u64>,
}

impl Locks {
    /// Those of `stripes`, if they were made with locks.
    pub fn of(stripes: &Stripes) -> Option<Self> {
        let (memory, segment) = stripes.locks()?;
        Some(Self {
            memory,
            segment,
            pages: Vec::new(),
            held: Vec::new(),
        })
    }

    fn word(&self, stripe: u64) -> &AtomicU64 {
        self.memory.atomic_u64(HEADER_BYTES + 8 * stripe)
    }

    fn page(&self, owner: u16) -> Option<&SharedMemory> {
        self.pages.get(usize::from(owner).checked_sub(1)?)?.as_ref()
    }

    /// The addresses of a stripe in the segment.
    pub fn range(&self, stripe: u64) -> Range<u64> {
        let start = stripe * SPACE_STRIPE;
        start..self.segment.min(start + SPACE_STRIPE)
    }

    /// One more client that writes: its number, and its page to pass on to it. None if there
    /// are too many.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn admit(&mut self) -> Result<Option<(u16, OwnedFd)>, SysError> {
        let free = self.pages.iter().position(Option::is_none);
        let at = free.unwrap_or(self.pages.len());
        if at as u64 >= MAX_SPACE_WRITERS {
            return Ok(None);
        }
        let owner = at as u16 + 1;
        let fd = memfd::create("uffd-sync-writer", PAGE_SIZE)?;
        memfd::add_seals(&fd, Seals::SHRINK | Seals::GROW | Seals::SEAL)?;
        let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite)?;
        mapping.dont_fork()?;
        let page = SharedMemory::new(mapping);
        let mut header = [0; 16];
        header[..8].copy_from_slice(&MAGIC);
        header[VERSION_AT as usize..][..4].copy_from_slice(&VERSION.to_le_bytes());
        header[OWNER_AT as usize..].copy_from_slice(&u32::from(owner).to_le_bytes());
        let written = page.write(0, &header);
        debug_assert!(written.is_ok(), "the page's own bytes");
        if at == self.pages.len() {
            self.pages.push(None);
        }
        self.pages[at] = Some(page);
        Ok(Some((owner, fd)))
    }

    /// A client writes no more, or never will again.
    pub fn dismiss(&mut self, owner: u16) {
        if let Some(page) = self.pages.get_mut(usize::from(owner).wrapping_sub(1)) {
            *page = None;
        }
    }

    /// Whether a client says that it is at no lock.
    pub fn is_idle(&self, owner: u16) -> bool {
        let said = self
            .page(owner)
            .map(|page| own(page).load(Ordering::Acquire));
        said.is_none_or(|own| lease::says(own) == Says::Idle)
    }

    /// Enters the locks of these stripes, ascending and each once: all, or none. A stripe
    /// that is not in the segment has none.
    ///
    /// # Errors
    /// [`Blocked`] with the lock that is in the way; clients leave it to the server next.
    pub fn hold(&mut self, stripes: impl Iterator<Item = u64>) -> Result<(), Blocked> {
        debug_assert!(self.held.is_empty(), "one operation at a time");
        for stripe in stripes {
            if self.range(stripe).is_empty() {
                continue;
            }
            if let Err(word) = self.enter(stripe) {
                lease::want(self.word(stripe), word);
                self.let_go(false);
                return Err(Blocked { stripe, word });
            }
            self.held.push(stripe);
        }
        Ok(())
    }

    fn enter(&self, stripe: u64) -> Result<(), u64> {
        let word = self.word(stripe);
        let mut found = 0;
        for _ in 0..LOOKS {
            match lease::try_take(word) {
                Ok(()) => return Ok(()),
                Err(now) => found = now,
            }
            std::hint::spin_loop();
        }
        Err(found)
    }

    /// Leaves the locks of the operation that [`hold`](Self::hold) was for.
    pub fn let_go(&mut self, changed: bool) {
        let mut held = std::mem::take(&mut self.held);
        for stripe in held.drain(..).rev() {
            lease::free(self.word(stripe), changed);
        }
        self.held = held;
    }

    /// How the owner of a lock that is in the way stands to it.
    pub fn stand(&self, blocked: &Blocked) -> Stand {
        let word = self.word(blocked.stripe);
        if lease::owner_of(blocked.word) == 0 {
            return Stand::Moved;
        }
        let page = blocked.owner().and_then(|owner| self.page(owner));
        match page {
            Some(page) => lease::look(word, blocked.word, own(page), blocked.stripe),
            None if lease::is_same(word.load(Ordering::Relaxed), blocked.word) => Stand::Denies,
            None => Stand::Moved,
        }
    }

    /// Frees a lock whatever its word says: for one that nobody holds, or whose holder will
    /// never run again. False if its word says something else by now.
    pub fn break_open(&self, blocked: &Blocked) -> bool {
        let word = self.word(blocked.stripe);
        let taken = lease::take_over(word, blocked.word);
        if taken {
            lease::free(word, true);
        }
        taken
    }

    /// Frees a lock whose owner has not yet begun. False if it turns out that it has, which
    /// then has the lock as before.
    pub fn take_unused(&self, blocked: &Blocked) -> bool {
        let Some(page) = blocked.owner().and_then(|owner| self.page(owner)) else {
            return false;
        };
        let word = self.word(blocked.stripe);
        let taken = lease::take_unused(word, blocked.word, own(page), blocked.stripe);
        if taken {
            lease::free(word, true);
        }
        taken
    }

    /// Frees what a client held that has died. The stripe that may hold half a change.
    pub fn bury(&self, owner: u16) -> Option<u64> {
        let said = lease::says(own(self.page(owner)?).load(Ordering::Acquire));
        let (Says::Wants(stripe) | Says::Holds(stripe)) = said else {
            return None;
        };
        if stripe >= self.segment.div_ceil(SPACE_STRIPE) {
            return None;
        }
        let word = self.word(stripe).load(Ordering::Acquire);
        let was_its = lease::owner_of(word) == owner;
        let freed = was_its && self.break_open(&Blocked { stripe, word });
        (freed && said == Says::Holds(stripe)).then_some(stripe)
    }
}

fn own(page: &SharedMemory) -> &AtomicU64 {
    page.atomic_u64(OWN_AT)
}

/// Why a client did not change what it wanted to by mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotChanged {
    /// Somebody else is there: nothing was changed, the server is to be asked.
    Busy,
    /// The lock was taken away meanwhile, or the server died: nobody knows what is there.
    Unknown,
}

/// A client's side.
#[derive(Debug)]
pub struct MappedLocks {
    stripes: MappedStripes,
    page: SharedMemory,
    owner: u16,
}

impl MappedLocks {
    /// Maps the locks of a segment of `segment` bytes, and the client's own page, from
    /// descriptors that its server has passed.
    ///
    /// # Errors
    /// [`StripesError::Foreign`] if they are anything else.
    pub fn open(stripes: &OwnedFd, page: &OwnedFd, segment: u64) -> Result<Self, StripesError> {
        let foreign = |problem| StripesError::Foreign { problem };
        let stripes = MappedStripes::open_for(stripes, segment, Access::ReadWrite)?;
        let is_sealed = memfd::seals(page)?.contains(Seals::SHRINK);
        if !stripes.is_locked() || !is_sealed || memfd::size(page)? != PAGE_SIZE {
            return Err(foreign("they have no locks"));
        }
        let page = SharedMemory::new(Mapping::shared(page, PAGE_SIZE, Access::ReadWrite)?);
        let is_page = page.load::<[u8; 8]>(0)? == MAGIC;
        if !is_page || u32::from_le(page.load(VERSION_AT)?) != VERSION {
            return Err(foreign("the client's page is another"));
        }
        let owner = u32::from_le(page.load(OWNER_AT)?);
        let owner = match u16::try_from(owner) {
            Ok(owner) if (1..=MAX_SPACE_WRITERS).contains(&owner.into()) => owner,
            _ => return Err(foreign("the client's number is none")),
        };
        Ok(Self {
            stripes,
            page,
            owner,
        })
    }

    /// The sequences, to read by.
    pub fn stripes(&self) -> &MappedStripes {
        &self.stripes
    }

    /// The lock of a stripe of the segment, as this client has it.
    pub fn lock(&self, stripe: u64) -> lease::Client<'_> {
        lease::Client {
            word: self.stripes.lock(stripe),
            own: own(&self.page),
            owner: self.owner,
            place: stripe,
        }
    }

    /// Runs `change` under the lock of a stripe of the segment, if it is to be had in `tries`
    /// tries.
    ///
    /// # Errors
    /// [`NotChanged`].
    #[inline]
    pub fn change<R>(
        &self,
        stripe: u64,
        tries: u32,
        change: impl FnOnce() -> R,
    ) -> Result<R, NotChanged> {
        let lock = self.lock(stripe);
        for _ in 0..tries {
            let Some(held) = lock.try_enter() else {
                std::hint::spin_loop();
                continue;
            };
            let changed = change();
            let is_known = lock.leave(held) && self.stripes.is_alive();
            return is_known.then_some(changed).ok_or(NotChanged::Unknown);
        }
        Err(NotChanged::Busy)
    }
}

/// A segment that clients on this host map for writing, unlike a region: a memfd of its own,
/// which nobody can shorten.
///
/// # Errors
/// What the kernel refuses.
pub fn shared_segment(name: &str, len: u64) -> Result<(SharedMemory, OwnedFd), SysError> {
    let fd = memfd::create(name, len)?;
    memfd::add_seals(&fd, Seals::SHRINK | Seals::GROW | Seals::SEAL)?;
    let mapping = Mapping::shared(&fd, len, Access::ReadWrite)?;
    mapping.dont_fork()?;
    Ok((SharedMemory::new(mapping), fd))
}

/// The ranges of an operation in terms of stripes: pieces that each lie in one.
pub fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, Range<u64>)> {
    touched(offset, len).map(move |stripe| {
        let start = offset.max(stripe * SPACE_STRIPE);
        let end = (offset + len).min((stripe + 1) * SPACE_STRIPE);
        (stripe, start..end)
    })
}

/// The stripes of a range, if it lies in a segment of `segment` bytes.
///
/// # Errors
/// [`OutOfRange`] if it does not.
pub fn stripes_of(segment: u64, offset: u64, len: u64) -> Result<Range<u64>, OutOfRange> {
    checked_range(offset, len, segment)?;
    Ok(touched(offset, len))
}

#[cfg(test)]
mod tests {
    use super::super::frame::Incarnation;
    use super::*;

    const SEGMENT: u64 = 3 * SPACE_STRIPE + PAGE_SIZE;
    const TRIES: u32 = 8;

    fn server() -> (Stripes, Locks) {
        let stripes = Stripes::create_locked(SEGMENT, Incarnation(5)).expect("made");
        let locks = Locks::of(&stripes).expect("with locks");
        (stripes, locks)
    }

    fn client(stripes: &Stripes, locks: &mut Locks) -> MappedLocks {
        let (owner, page) = locks.admit().expect("made").expect("room");
        let writable = stripes.writable().expect("with locks");
        let mapped = MappedLocks::open(&writable, &page, SEGMENT).expect("mapped");
        assert_eq!(mapped.owner, owner);
        mapped
    }

    #[test]
    fn the_server_has_all_locks_of_an_operation_or_none() {
        let (stripes, mut locks) = server();
        let _life = stripes.live().expect("held");
        let (one, other) = (client(&stripes, &mut locks), client(&stripes, &mut locks));
        locks.hold(0..4).expect("nobody is there");
        assert_eq!(one.change(3, TRIES, || ()), Err(NotChanged::Busy));
        locks.let_go(true);
        assert_eq!(one.change(3, TRIES, || 7), Ok(7));
        let held = one.lock(2).try_enter().expect("free");
        let blocked = locks.hold(1..4).expect_err("one is at stripe 2");
        assert_eq!((blocked.stripe, blocked.owner()), (2, Some(1)));
        assert!(matches!(locks.stand(&blocked), Stand::Holds(_)));
        assert_eq!(other.change(1, TRIES, || ()), Ok(()), "stripe 1 was let go");
        assert!(one.lock(2).leave(held));
        assert_eq!(locks.stand(&blocked), Stand::Moved);
        assert_eq!(
            other.change(2, TRIES, || ()),
            Err(NotChanged::Busy),
            "the server comes first"
        );
        locks.hold(1..4).expect("nobody is there");
        locks.let_go(false);
        assert_eq!(other.change(2, TRIES, || ()), Ok(()));
        locks.hold(7..9).expect("not in the segment");
        locks.let_go(true);
    }

    #[test]
    fn what_words_say_is_believed_only_of_who_says_so_too() {
        let (stripes, mut locks) = server();
        let one = client(&stripes, &mut locks);
        for word in [1, 2, 999, 0xFFFF, u64::MAX, 0xFFFF_0001, 0x2_0001] {
            one.stripes.lock(1).store(word, Ordering::Relaxed);
            if lease::owner_of(word) == 0 {
                continue;
            }
            let blocked = locks.hold(1..2).expect_err("somebody is said to be there");
            assert_eq!(locks.stand(&blocked), Stand::Denies, "{word:#x}");
            assert!(locks.break_open(&blocked));
            locks.hold(1..2).expect("free");
            locks.let_go(true);
        }
        assert!(locks.is_idle(1) && locks.bury(1).is_none());
    }

    #[test]
    fn what_the_dead_leave_is_freed_and_named() {
        let (stripes, mut locks) = server();
        let one = client(&stripes, &mut locks);
        assert_eq!(locks.range(3), 3 * SPACE_STRIPE..SEGMENT);
        let _held = one.lock(3).try_enter().expect("free");
        assert!(!locks.is_idle(1));
        assert_eq!(locks.bury(1), Some(3));
        assert_eq!(locks.bury(1), None, "once");
        locks.hold(3..4).expect("free");
        locks.let_go(true);
        // A page that names what is not there, and one whose owner has lost its lock.
        for said in [u64::MAX, 2 | 3 << 2, 1 | 3 << 2, 2 | 99 << 2] {
            own(&one.page).store(said, Ordering::Relaxed);
            assert_eq!(locks.bury(1), None, "{said:#x}");
        }
        locks.dismiss(1);
        assert!(locks.bury(1).is_none() && locks.is_idle(1));
        let (owner, _page) = locks.admit().expect("made").expect("room");
        assert_eq!(owner, 1, "its number is used again");
    }

    #[test]
    fn other_memory_is_refused() {
        let (stripes, mut locks) = server();
        let (_, page) = locks.admit().expect("made").expect("room");
        let writable = stripes.writable().expect("with locks");
        let plain = Stripes::create(SEGMENT, Incarnation(5)).expect("made");
        assert!(Locks::of(&plain).is_none() && plain.writable().is_none());
        assert!(MappedLocks::open(&plain.descriptor(), &page, SEGMENT).is_err());
        assert!(MappedLocks::open(&stripes.descriptor(), &page, SEGMENT).is_err());
        assert!(MappedLocks::open(&writable, &writable, SEGMENT).is_err());
        assert!(MappedLocks::open(&writable, &page, SEGMENT * 600).is_err());
        let zeros = memfd::create("zeros", PAGE_SIZE).expect("memfd");
        memfd::add_seals(&zeros, Seals::SHRINK).expect("seals");
        assert!(MappedLocks::open(&writable, &zeros, SEGMENT).is_err());
        let readers = MappedStripes::open(&stripes.descriptor(), SEGMENT).expect("mapped");
        assert!(readers.is_locked());
    }

    #[test]
    fn no_more_clients_than_there_may_be() {
        let (_stripes, mut locks) = server();
        for _ in 0..MAX_SPACE_WRITERS {
            assert!(locks.admit().expect("made").is_some());
        }
        assert!(locks.admit().expect("made").is_none());
        locks.dismiss(17);
        assert_eq!(locks.admit().expect("made").expect("room").0, 17);
    }

    #[test]
    fn pieces_lie_in_one_stripe_each() {
        let found: Vec<_> = pieces(SPACE_STRIPE - 1, SPACE_STRIPE + 2).collect();
        let expected = [
            (0, SPACE_STRIPE - 1..SPACE_STRIPE),
            (1, SPACE_STRIPE..2 * SPACE_STRIPE),
            (2, 2 * SPACE_STRIPE..2 * SPACE_STRIPE + 1),
        ];
        assert_eq!(found, expected);
        assert_eq!(pieces(5, 0).count(), 0);
    }
}
