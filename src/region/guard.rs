//! Write guards and commits: one word that tells the engine whether anybody is
//! writing.
//!
//! The word's turns are those of [`turns`]: who waits for a guard has it at the end of
//! the commits that are under way, however many threads commit without end; who comes
//! to commit meanwhile is next.
//!
//! - I1: `entries` is raised before the guard is given back, so two equal readings
//!   around a capture mean that no guard was taken in between.
//! - I2: a commit whose turn does not come in time goes on without being counted: it
//!   is inside `commit()` all the same, so what others' guards say of a cut holds.
//!
//! - I3: of a cooperative region the word is given up when a process dies that used it
//!   ([`lives`]): its guards are nobody's any more, and whoever waits begins anew with the
//!   other word. A commit waits for the living who still hold a guard of the old one.
//!
//! An exclusive region's only process takes the word with it.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::control::{Control, wake_all};
use super::layout::{
    GUARD, GUARD_ENTRIES, GUARD_LIFE, GUARD_ODD, GUARD_OWNER, HELD as HELD_WORDS, HELD_LINE, OWNERS,
};
use super::{Epoch, Region, RegionError, sys};
use crate::limits::MAX_WRITERS;
use crate::shm::lives;
use crate::shm::turns::{self, Entry, Full};
use crate::sys::futex;
use crate::sys::process::thread_id;

thread_local! {
    /// Guards that this thread holds: {region object, how many}.
    static HELD: RefCell<Vec<(u64, u32)>> = const { RefCell::new(Vec::new()) };
}

/// How many guards of the region object this thread holds.
pub(super) fn held(instance: u64) -> u32 {
    HELD.with_borrow(|held| {
        let entry = held.iter().find(|(region, _)| *region == instance);
        entry.map_or(0, |(_, count)| *count)
    })
}

fn count_held(instance: u64, taken: bool) {
    HELD.with_borrow_mut(|held| {
        match held.iter_mut().find(|(region, _)| *region == instance) {
            Some((_, count)) if taken => *count += 1,
            Some((_, count)) => *count -= 1,
            None => held.push((instance, 1)),
        }
        held.retain(|(_, count)| *count > 0);
    });
}

/// While it lives, a commit by another thread waits for this thread, so that what
/// is stored under one guard is in one epoch. Stays in its thread.
#[derive(Debug)]
pub struct WriteGuard<'a> {
    region: &'a Region,
    place: Place,
    _not_send: PhantomData<*mut ()>,
}

impl<'a> WriteGuard<'a> {
    pub(super) fn take(region: &'a Region) -> Result<Self, RegionError> {
        let instance = region.instance();
        let holds_one = held(instance) > 0;
        let place = region.control().enter_shared(region.slot(), holds_one)?;
        count_held(instance, true);
        Ok(Self {
            region,
            place,
            _not_send: PhantomData,
        })
    }

    /// Gives the guard back and commits in one step: no other guard comes in between.
    ///
    /// # Errors
    /// As for [`Region::commit`]; the guard is given back in any case.
    pub fn commit(self, deadline: Duration) -> Result<Epoch, RegionError> {
        let region = self.region;
        let begun = Instant::now();
        let committer = Committer::from_guard(region.control(), self.place)?;
        count_held(region.instance(), false);
        std::mem::forget(self);
        region.commit_as(committer, begun, deadline)
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        count_held(self.region.instance(), false);
        self.region.control().leave_shared(self.place);
    }
}

/// Where a thread is counted: in the word of a life, and in its process's own words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    slot: Option<u32>,
    life: u32,
}

/// What came of waiting for the guard word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// It is as wanted.
    Wanted,
    TooLate,
    /// The word was given up.
    Replaced,
}

/// Pause between two looks for guards of a life that is over.
const DRAIN_PAUSE: Duration = Duration::from_millis(1);

/// A thread in `commit()`.
pub(super) struct Committer<'a> {
    control: &'a Control,
    place: Place,
    /// Whether the word counts it.
    counted: bool,
}

impl<'a> Committer<'a> {
    /// Waits for the thread's turn until `deadline` at most.
    pub(super) fn enter(
        control: &'a Control,
        slot: Option<u32>,
        deadline: Instant,
    ) -> Result<Self, RegionError> {
        loop {
            let place = control.enter_life(slot);
            let word = control.guard_word(place.life);
            let entry = turns::enter_commit(word).inspect_err(|_| control.leave_life(place))?;
            let Entry::After(turn) = entry else {
                return Ok(Self::of(control, place, true));
            };
            let came = control.wait_until(place.life, Some(deadline), |now| {
                turns::has_ended(now, turn)
            });
            match came {
                Ok(Came::Wanted) => return Ok(Self::of(control, place, true)),
                Ok(Came::Replaced) => control.leave_life(place),
                Ok(Came::TooLate) => {
                    let counted = !turns::cancel_commit(word, turn);
                    return Ok(Self::of(control, place, counted));
                }
                Err(error) => {
                    if turns::cancel_commit(word, turn) {
                        control.leave_life(place);
                        return Err(error);
                    }
                    return Ok(Self::of(control, place, true));
                }
            }
        }
    }

    /// Gives the thread's guard back in the same step.
    fn from_guard(control: &'a Control, place: Place) -> Result<Self, RegionError> {
        let word = control.guard_word(place.life);
        if turns::guard_to_commit(word)? {
            wake_all(control.guard_futex(place.life));
        }
        Ok(Self::of(control, place, true))
    }

    fn of(control: &'a Control, place: Place, counted: bool) -> Self {
        let owner = control.mem.atomic_u32(GUARD_OWNER);
        owner.store(thread_id().cast_unsigned(), Ordering::Relaxed);
        Self {
            control,
            place,
            counted,
        }
    }

    /// Waits until no guard is held; false if `deadline` came first, and the commit
    /// goes on as a convergent one.
    pub(super) fn wait_for_guards(&mut self, deadline: Instant) -> Result<bool, RegionError> {
        let control = self.control;
        loop {
            let life = self.place.life;
            match control.wait_until(life, Some(deadline), turns::is_quiet)? {
                Came::Wanted if control.is_drained(life) => return Ok(true),
                Came::Wanted if Instant::now() < deadline => std::thread::sleep(DRAIN_PAUSE),
                Came::Wanted | Came::TooLate => return Ok(false),
                Came::Replaced => *self = Self::enter(control, self.place.slot, deadline)?,
            }
        }
    }
}

impl Drop for Committer<'_> {
    fn drop(&mut self) {
        let own = thread_id().cast_unsigned();
        let owner = self.control.mem.atomic_u32(GUARD_OWNER);
        let _ = owner.compare_exchange(own, 0, Ordering::Relaxed, Ordering::Relaxed);
        let life = self.place.life;
        if self.counted && turns::leave_commit(self.control.guard_word(life)) {
            wake_all(self.control.guard_futex(life));
        }
        self.control.leave_life(self.place);
    }
}

impl From<Full> for RegionError {
    fn from(_: Full) -> Self {
        Self::TooManyGuards
    }
}

impl Control {
    /// The word of a life.
    pub(super) fn guard_word(&self, life: u32) -> &AtomicU64 {
        self.mem.atomic_u64([GUARD, GUARD_ODD][lives::parity(life)])
    }

    /// The low half of the guard word, to wait on.
    fn guard_futex(&self, life: u32) -> &AtomicU32 {
        self.mem.atomic_u32([GUARD, GUARD_ODD][lives::parity(life)])
    }

    /// The guard word's life at present; 0 for ever in exclusive regions.
    pub(super) fn guard_life(&self) -> u32 {
        lives::look(self.mem.atomic_u32(GUARD_LIFE))
    }

    /// The thread that commits, if one does.
    pub fn guard_owner(&self) -> u32 {
        self.mem.atomic_u32(GUARD_OWNER).load(Ordering::Relaxed)
    }

    /// The own words of the process in `slot`.
    fn held_words(&self, slot: u32) -> [&AtomicU32; 2] {
        // Whoever says it, a slot is one of those that there are.
        let line = HELD_WORDS + u64::from(slot) % MAX_WRITERS * HELD_LINE;
        [self.mem.atomic_u32(line), self.mem.atomic_u32(line + 4)]
    }

    fn enter_life(&self, slot: Option<u32>) -> Place {
        let life = match slot {
            Some(slot) => lives::enter(self.mem.atomic_u32(GUARD_LIFE), self.held_words(slot)),
            None => 0,
        };
        Place { slot, life }
    }

    fn leave_life(&self, place: Place) {
        if let Some(slot) = place.slot {
            lives::leave(place.life, self.held_words(slot));
        }
    }

    /// Whether nobody living holds a guard of the life before `life`.
    pub(super) fn is_drained(&self, life: u32) -> bool {
        let before = lives::parity(life.wrapping_add(1));
        let owned = (0..MAX_WRITERS as u32).filter(|slot| self.owner(*slot) != 0);
        life == 0 || lives::is_drained(owned.map(|slot| self.held_words(slot)[before]))
    }

    /// Sleeps until the guard word of `life` is as wanted.
    fn wait_until(
        &self,
        life: u32,
        deadline: Option<Instant>,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<Came, RegionError> {
        loop {
            let now = turns::look(self.guard_word(life));
            if self.guard_life() != life {
                return Ok(Came::Replaced);
            }
            if wanted(now) {
                return Ok(Came::Wanted);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(Came::TooLate);
            }
            futex::wait(self.guard_futex(life), turns::futex_of(now), deadline)
                .map_err(sys("waiting for write guards and commits"))?;
        }
    }

    fn enter_shared(&self, slot: Option<u32>, holds_one: bool) -> Result<Place, RegionError> {
        let place = loop {
            let place = self.enter_life(slot);
            let word = self.guard_word(place.life);
            let entry = turns::enter_shared(word, holds_one).inspect_err(|_| {
                self.leave_life(place);
            })?;
            let Entry::After(turn) = entry else {
                break place;
            };
            match self.wait_until(place.life, None, |now| turns::has_ended(now, turn)) {
                Ok(Came::Replaced) => self.leave_life(place),
                Ok(_) => break place,
                Err(error) if turns::cancel_shared(word, turn) => {
                    self.leave_life(place);
                    return Err(error);
                }
                Err(_) => break place,
            }
        };
        let entries = self.mem.atomic_u32(GUARD_ENTRIES);
        entries.fetch_add(1, Ordering::Relaxed);
        Ok(place)
    }

    fn leave_shared(&self, place: Place) {
        if turns::leave_shared(self.guard_word(place.life)) {
            wake_all(self.guard_futex(place.life));
        }
        self.leave_life(place);
    }
}

/// The engine's side: who has which slot. It alone changes owners and lives.
impl Control {
    /// The process that has a slot; 0 if none.
    pub fn owner(&self, slot: u32) -> i32 {
        self.owner_word(slot).load(Ordering::Acquire).cast_signed()
    }

    fn owner_word(&self, slot: u32) -> &AtomicU32 {
        let slot = u64::from(slot) % MAX_WRITERS;
        self.mem.atomic_u32(OWNERS + 4 * slot)
    }

    /// A process has a slot from now on.
    pub fn give_slot(&self, slot: u32, pid: i32) {
        self.owner_word(slot)
            .store(pid.cast_unsigned(), Ordering::Release);
    }

    /// A process is gone; whether it used the guard word, which then has to be given up:
    /// [`Control::replace_guard`].
    pub fn take_slot(&self, slot: u32) -> bool {
        self.give_slot(slot, 0);
        let used = |word: &AtomicU32| word.swap(0, Ordering::AcqRel) != 0;
        // Both, not the first that was used.
        self.held_words(slot)
            .into_iter()
            .fold(false, |any, word| used(word) | any)
    }

    /// Gives the guard word up for the other one; false while somebody living still
    /// holds a guard in that.
    pub fn replace_guard(&self) -> bool {
        let life = self.guard_life();
        if !self.is_drained(life) {
            return false;
        }
        let next = self.guard_word(life.wrapping_add(1));
        lives::begin_next(self.mem.atomic_u32(GUARD_LIFE), next);
        turns::disturb(self.guard_word(life));
        wake_all(self.guard_futex(life));
        true
    }
}
