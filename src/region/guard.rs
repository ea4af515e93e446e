//! Write guards and commits: one word that tells the engine whether anybody is
//! writing.
//!
//! `committers << 16 | shared`, a futex word in the control page:
//!
//! | committers | shared | meaning |
//! |---|---|---|
//! | 0 | 0 | nobody writes under a guard |
//! | 0 | n | n guards are held |
//! | c | n | c threads commit and wait for n guards; new guards wait |
//! | c | 0 | what is captured now is an exact instant |
//!
//! - I1: a guard is taken only while nobody commits, or by a thread that holds one
//!   already (it would wait for itself).
//! - I2: `entries` is raised before the guard is given back, so two equal readings
//!   around a capture mean that no guard was taken in between.
//!
//! A writing process that dies takes its region with it: the word ends there too.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::control::{Control, wake_all};
use super::layout::{GUARD, GUARD_ENTRIES, GUARD_OWNER};
use super::{Epoch, Region, RegionError, sys};
use crate::sys::futex;
use crate::sys::process::thread_id;

const COMMITTER: u32 = 1 << 16;
const SHARED: u32 = COMMITTER - 1;

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
        let control = region.control();
        let committer = Committer::enter(control, COMMITTER - 1)?;
        count_held(region.instance(), false);
        std::mem::forget(self);
        region.commit_as(committer, deadline)
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        count_held(self.region.instance(), false);
        self.region.control().leave_shared();
    }
}

/// A thread in `commit()`.
pub(super) struct Committer<'a>(&'a Control);

impl<'a> Committer<'a> {
    /// Adds `change` to the word: a committer, and perhaps one guard less.
    pub(super) fn enter(control: &'a Control, change: u32) -> Result<Self, RegionError> {
        let word = control.guard_word();
        let enter = |now: u32| (now >> 16 < SHARED).then(|| now.wrapping_add(change));
        // SYNC(guard): what this thread stored under its guard is seen by whoever sees
        // the guard gone; pairs with the load in `guard_state`.
        word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, enter)
            .map_err(|_| RegionError::TooManyGuards)?;
        let owner = control.mem.atomic_u32(GUARD_OWNER);
        owner.store(thread_id().cast_unsigned(), Ordering::Relaxed);
        if change < COMMITTER {
            // A guard was given back: other committers may wait for it.
            wake_all(word);
        }
        Ok(Self(control))
    }

    /// Waits until no guard is held; false if `deadline` came first, and the commit
    /// goes on as a convergent one.
    pub(super) fn wait_for_guards(&self, deadline: Instant) -> Result<bool, RegionError> {
        let word = self.0.guard_word();
        loop {
            let now = word.load(Ordering::Acquire);
            if now & SHARED == 0 {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            futex::wait(word, now, Some(deadline)).map_err(sys("waiting for write guards"))?;
        }
    }
}

impl Drop for Committer<'_> {
    fn drop(&mut self) {
        let word = self.0.guard_word();
        let own = thread_id().cast_unsigned();
        let owner = self.0.mem.atomic_u32(GUARD_OWNER);
        let _ = owner.compare_exchange(own, 0, Ordering::Relaxed, Ordering::Relaxed);
        // SYNC(guard_free): pairs with the exchange in `enter_shared`.
        if word.fetch_sub(COMMITTER, Ordering::Release) >> 16 == 1 {
            wake_all(word);
        }
    }
}

impl Control {
    fn guard_word(&self) -> &AtomicU32 {
        self.mem.atomic_u32(GUARD)
    }

    /// The thread that commits, if one does.
    pub fn guard_owner(&self) -> u32 {
        self.mem.atomic_u32(GUARD_OWNER).load(Ordering::Relaxed)
    }

    fn enter_shared(&self, holds_one: bool) -> Result<(), RegionError> {
        let word = self.guard_word();
        let mut now = word.load(Ordering::Relaxed);
        loop {
            if now & SHARED == SHARED {
                return Err(RegionError::TooManyGuards);
            }
            if now >> 16 != 0 && !holds_one {
                futex::wait(word, now, None).map_err(sys("waiting for a commit"))?;
                now = word.load(Ordering::Relaxed);
                continue;
            }
            // SYNC(guard_free): what is stored under the guard comes after the commit;
            // pairs with the subtraction of the committer.
            match word.compare_exchange_weak(now, now + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => break,
                Err(other) => now = other,
            }
        }
        let entries = self.mem.atomic_u32(GUARD_ENTRIES);
        entries.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn leave_shared(&self) {
        let word = self.guard_word();
        // SYNC(guard): pairs with the load in `guard_state`.
        let before = word.fetch_sub(1, Ordering::Release);
        if before & SHARED == 1 && before >> 16 != 0 {
            wake_all(word);
        }
    }
}
