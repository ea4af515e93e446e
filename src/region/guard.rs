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
//! A writing process that dies takes its region with it: the word ends there too.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::control::{Control, wake_all};
use super::layout::{GUARD, GUARD_ENTRIES, GUARD_OWNER};
use super::{Epoch, Region, RegionError, sys};
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
    _not_send: PhantomData<*mut ()>,
}

impl<'a> WriteGuard<'a> {
    pub(super) fn take(region: &'a Region) -> Result<Self, RegionError> {
        let instance = region.instance();
        region.control().enter_shared(held(instance) > 0)?;
        count_held(instance, true);
        Ok(Self {
            region,
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
        let committer = Committer::from_guard(region.control())?;
        count_held(region.instance(), false);
        std::mem::forget(self);
        region.commit_as(committer, begun, deadline)
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        count_held(self.region.instance(), false);
        self.region.control().leave_shared();
    }
}

/// A thread in `commit()`.
pub(super) struct Committer<'a> {
    control: &'a Control,
    /// Whether the word counts it.
    counted: bool,
}

impl<'a> Committer<'a> {
    /// Waits for the thread's turn until `deadline` at most.
    pub(super) fn enter(control: &'a Control, deadline: Instant) -> Result<Self, RegionError> {
        let word = control.guard_word();
        let mut counted = true;
        if let Entry::After(turn) = turns::enter_commit(word)? {
            let came = control.wait_until(Some(deadline), |now| turns::has_ended(now, turn));
            counted = came.as_ref().is_ok_and(|came| *came) || !turns::cancel_commit(word, turn);
            if let (Err(error), false) = (came, counted) {
                return Err(error);
            }
        }
        Ok(Self::of(control, counted))
    }

    /// Gives the thread's guard back in the same step.
    fn from_guard(control: &'a Control) -> Result<Self, RegionError> {
        if turns::guard_to_commit(control.guard_word())? {
            wake_all(control.guard_futex());
        }
        Ok(Self::of(control, true))
    }

    fn of(control: &'a Control, counted: bool) -> Self {
        let owner = control.mem.atomic_u32(GUARD_OWNER);
        owner.store(thread_id().cast_unsigned(), Ordering::Relaxed);
        Self { control, counted }
    }

    /// Waits until no guard is held; false if `deadline` came first, and the commit
    /// goes on as a convergent one.
    pub(super) fn wait_for_guards(&self, deadline: Instant) -> Result<bool, RegionError> {
        self.control.wait_until(Some(deadline), turns::is_quiet)
    }
}

impl Drop for Committer<'_> {
    fn drop(&mut self) {
        let own = thread_id().cast_unsigned();
        let owner = self.control.mem.atomic_u32(GUARD_OWNER);
        let _ = owner.compare_exchange(own, 0, Ordering::Relaxed, Ordering::Relaxed);
        if self.counted && turns::leave_commit(self.control.guard_word()) {
            wake_all(self.control.guard_futex());
        }
    }
}

impl From<Full> for RegionError {
    fn from(_: Full) -> Self {
        Self::TooManyGuards
    }
}

impl Control {
    pub(super) fn guard_word(&self) -> &AtomicU64 {
        self.mem.atomic_u64(GUARD)
    }

    /// The low half of the guard word, to wait on.
    fn guard_futex(&self) -> &AtomicU32 {
        self.mem.atomic_u32(GUARD)
    }

    /// The thread that commits, if one does.
    pub fn guard_owner(&self) -> u32 {
        self.mem.atomic_u32(GUARD_OWNER).load(Ordering::Relaxed)
    }

    /// Sleeps until the guard word is as wanted; false if `deadline` came first.
    fn wait_until(
        &self,
        deadline: Option<Instant>,
        wanted: impl Fn(u64) -> bool,
    ) -> Result<bool, RegionError> {
        loop {
            let now = turns::look(self.guard_word());
            if wanted(now) {
                return Ok(true);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(false);
            }
            futex::wait(self.guard_futex(), turns::futex_of(now), deadline)
                .map_err(sys("waiting for write guards and commits"))?;
        }
    }

    fn enter_shared(&self, holds_one: bool) -> Result<(), RegionError> {
        let word = self.guard_word();
        if let Entry::After(turn) = turns::enter_shared(word, holds_one)?
            && let Err(error) = self.wait_until(None, |now| turns::has_ended(now, turn))
            && turns::cancel_shared(word, turn)
        {
            return Err(error);
        }
        let entries = self.mem.atomic_u32(GUARD_ENTRIES);
        entries.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn leave_shared(&self) {
        if turns::leave_shared(self.guard_word()) {
            wake_all(self.guard_futex());
        }
    }
}
