//! Old content of pages that an open update still needs.
//!
//! An update in the middle of being sent must stay one epoch although captures go
//! on. Its target epoch is pinned with the extents it carries; a capture that is
//! about to change a pinned page that was not sent yet puts the old page aside
//! first. Reading through the pin then gives the content as of the target epoch.
//!
//! ```text
//! pin(7) ---- capture 8 changes page 3: old page 3 -> copies of 7 ---- unpin(7)
//! read(7, page 3) = copy          read(7, page 4) = content
//! ```
//!
//! - I1: a page is copied before its first change behind the pin and never again,
//!   so a copy is the page as of the target epoch.
//! - I2: the bytes put aside never exceed the budget. Copies that two targets
//!   share count once.
//! - I3: a target that lost a page it needs is not alive, and says so until its
//!   last user has let go of it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::ExtentSet;
use crate::bitmap::Bitmap;
use crate::limits::MAX_PINNED_TARGETS;
use crate::units::{PAGE_SIZE, page_of, pages_for};

/// What to do with a page that the budget has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// Refuse: the capture is put off.
    PutOff,
    /// Give up the open update that holds most: the capture goes on.
    Abort,
}

/// There is no room for another target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_PINNED_TARGETS} epochs are held open already")]
pub struct Full;

/// There is no room for another page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room to put a page aside: {used_bytes} of {budget_bytes} bytes in use")]
pub struct NoRoom {
    /// Bytes put aside.
    pub used_bytes: u64,
    /// The bound they may not pass.
    pub budget_bytes: u64,
}

/// The pages put aside for the open updates of one region.
///
/// Memory: at most the budget, and one bit per page for each target.
#[derive(Debug)]
pub struct PreImages {
    size: u64,
    budget: u64,
    used: u64,
    pins: Vec<Pin>,
}

#[derive(Debug)]
struct Pin {
    target: u64,
    users: u32,
    alive: bool,
    /// Whether the target is not complete yet: nothing is copied aside for it, since
    /// what was read of it stays as it is.
    coming: bool,
    /// Pages that may still be read at the target epoch.
    needed: Bitmap,
    copies: HashMap<u64, Arc<[u8]>>,
}

impl PreImages {
    /// For a region of `size` bytes; at most `budget_bytes` are put aside, and
    /// always at least one page.
    pub fn new(size: u64, budget_bytes: u64) -> Self {
        Self {
            size,
            budget: budget_bytes.max(PAGE_SIZE),
            used: 0,
            pins: Vec::new(),
        }
    }

    /// The region has `size` bytes now; a lesser size changes nothing. What is new is part
    /// of no target that is held.
    pub fn grow(&mut self, size: u64) {
        if size <= self.size {
            return;
        }
        self.size = size;
        for pin in &mut self.pins {
            pin.needed.grow(pages_for(size));
        }
    }

    /// Holds the content of `extents` as of `target_epoch`, which must be the epoch
    /// that the content has now. Updates with the same target share one pin: each
    /// pins and unpins for itself.
    ///
    /// # Errors
    /// [`Full`] if [`MAX_PINNED_TARGETS`] other epochs are held, or if the target was
    /// given up.
    pub fn pin(&mut self, target_epoch: u64, extents: &ExtentSet) -> Result<(), Full> {
        if let Some(pin) = self.pins.iter_mut().find(|pin| pin.target == target_epoch) {
            if !pin.alive {
                return Err(Full);
            }
            pin.users += 1;
            pin.needed.union(&extents.pages());
            return Ok(());
        }
        let alive = self.pins.iter().filter(|pin| pin.alive).count();
        if alive as u64 >= MAX_PINNED_TARGETS {
            return Err(Full);
        }
        self.pins.push(Pin {
            target: target_epoch,
            users: 1,
            alive: true,
            coming: false,
            needed: extents.pages(),
            copies: HashMap::new(),
        });
        Ok(())
    }

    /// Holds a place for `target_epoch`, which a capture is still making. Its users read
    /// from the content what that capture will not change again; once it is complete
    /// they call [`complete`](Self::complete).
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn pin_coming(&mut self, target_epoch: u64) -> Result<(), Full> {
        self.pin(target_epoch, &ExtentSet::new(self.size))?;
        let pin = self.pins.iter_mut().find(|pin| pin.target == target_epoch);
        if let Some(pin) = pin {
            pin.coming = true;
        }
        Ok(())
    }

    /// The capture of `target` is complete and is the content now: of `extents` what
    /// lies at `from` or behind is still to be read. False if the target was given up.
    pub fn complete(&mut self, target: u64, extents: &ExtentSet, from: u64) -> bool {
        let pin = self.pins.iter_mut().find(|pin| pin.target == target);
        let Some(pin) = pin.filter(|pin| pin.alive) else {
            return false;
        };
        pin.coming = false;
        let mut at = from;
        while let Some(range) = extents.next_range(at) {
            pin.needed
                .insert_range(page_of(range.start)..pages_for(range.end));
            at = range.end;
        }
        true
    }

    /// The capture begins anew: what was read of the coming epoch may change again.
    pub fn give_up_coming(&mut self) {
        for pin in self.pins.iter_mut().filter(|pin| pin.coming) {
            (pin.alive, pin.coming) = (false, false);
        }
    }

    /// One user of `target` is done; the last one frees what was put aside.
    pub fn unpin(&mut self, target: u64) {
        let Some(index) = self.pins.iter().position(|pin| pin.target == target) else {
            return;
        };
        self.pins[index].users -= 1;
        if self.pins[index].users == 0 {
            let pin = self.pins.swap_remove(index);
            self.used -= freed(pin.copies.into_values());
        }
    }

    /// The user of `target` will not read `bytes` again. Pages that lie wholly within
    /// (the region's end counts as a page's end) are let go, unless the target has
    /// more users. An update sent in ascending order passes `0..sent_up_to`.
    pub fn sent(&mut self, target: u64, bytes: Range<u64>) {
        let whole_end = if bytes.end >= self.size {
            pages_for(self.size)
        } else {
            page_of(bytes.end)
        };
        let Some(pin) = self.pins.iter_mut().find(|pin| pin.target == target) else {
            return;
        };
        if pin.users > 1 {
            return;
        }
        let mut from = pages_for(bytes.start);
        while let Some(page) = pin.needed.next(from).filter(|page| *page < whole_end) {
            pin.needed.remove(page);
            self.used -= freed(pin.copies.remove(&page).into_iter());
            from = page + 1;
        }
    }

    /// Puts `old`, the content of `page` that is about to change, aside for every
    /// target that needs it. Must be called before the content changes, for each
    /// change of each page.
    ///
    /// # Errors
    /// [`NoRoom`] with [`WhenFull::PutOff`] only; nothing was put aside then.
    pub fn before_change(
        &mut self,
        page: u64,
        old: &[u8],
        when_full: WhenFull,
    ) -> Result<(), NoRoom> {
        let wants =
            |pin: &Pin| pin.alive && pin.needed.contains(page) && !pin.copies.contains_key(&page);
        while self.pins.iter().any(wants) {
            let len = old.len() as u64;
            if self.used + len <= self.budget {
                let copy: Arc<[u8]> = old.into();
                for pin in self.pins.iter_mut().filter(|pin| wants(pin)) {
                    pin.copies.insert(page, Arc::clone(&copy));
                }
                self.used += len;
                return Ok(());
            }
            if when_full == WhenFull::PutOff {
                return Err(NoRoom {
                    used_bytes: self.used,
                    budget_bytes: self.budget,
                });
            }
            self.give_up_largest();
        }
        Ok(())
    }

    /// Whether `target` is pinned and can still be read whole; false after it was
    /// given up for want of room.
    pub fn is_alive(&self, target: u64) -> bool {
        self.pins
            .iter()
            .any(|pin| pin.target == target && pin.alive)
    }

    /// Whether nothing of the target was copied aside: the content is that epoch still.
    pub fn is_untouched(&self, target: u64) -> bool {
        let mut pins = self.pins.iter();
        pins.any(|pin| pin.target == target && pin.alive && pin.copies.is_empty())
    }

    /// Copies the bytes at `offset` as of epoch `target` to `out`; `content` is the
    /// region's content now. False, with `out` of no meaning, if the target is not
    /// alive.
    ///
    /// # Panics
    /// If the range lies beyond the end of `content`.
    pub fn read(&self, target: u64, offset: u64, out: &mut [u8], content: &[u8]) -> bool {
        let start = offset as usize;
        let end = start + out.len();
        let Some(pin) = self
            .pins
            .iter()
            .find(|pin| pin.target == target && pin.alive)
        else {
            out.copy_from_slice(&content[start..end]);
            return false;
        };
        if pin.copies.is_empty() {
            out.copy_from_slice(&content[start..end]);
            return true;
        }
        let mut at = start;
        while at < end {
            let page = page_of(at as u64);
            let page_start = (page * PAGE_SIZE) as usize;
            let stop = end.min(page_start + PAGE_SIZE as usize);
            let piece = &mut out[at - start..stop - start];
            match pin.copies.get(&page) {
                Some(copy) => piece.copy_from_slice(&copy[at - page_start..stop - page_start]),
                None => piece.copy_from_slice(&content[at..stop]),
            }
            at = stop;
        }
        true
    }

    /// Bytes put aside now.
    pub fn used_bytes(&self) -> u64 {
        self.used
    }

    /// The most bytes that are put aside.
    pub fn budget_bytes(&self) -> u64 {
        self.budget
    }

    /// Epochs that updates hold open.
    pub fn targets(&self) -> usize {
        self.pins.iter().filter(|pin| pin.alive).count()
    }

    /// Whether no update holds an epoch open.
    pub fn is_idle(&self) -> bool {
        self.pins.iter().all(|pin| !pin.alive)
    }

    #[cold]
    fn give_up_largest(&mut self) {
        let largest = self
            .pins
            .iter_mut()
            .filter(|pin| pin.alive)
            .max_by_key(|pin| pin.copies.len());
        if let Some(pin) = largest {
            pin.alive = false;
            pin.needed.clear();
            self.used -= freed(std::mem::take(&mut pin.copies).into_values());
        }
    }
}

/// Drops `copies`; the bytes that nobody else holds.
fn freed(copies: impl Iterator<Item = Arc<[u8]>>) -> u64 {
    copies
        .filter(|copy| Arc::strong_count(copy) == 1)
        .map(|copy| copy.len() as u64)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = PAGE_SIZE as usize;
    /// Ten pages, the last one not whole.
    const SIZE: usize = 9 * PAGE + 100;

    fn pages_set(pages: &[u64]) -> ExtentSet {
        let mut set = ExtentSet::new(SIZE as u64);
        for page in pages {
            let start = page * PAGE_SIZE;
            set.insert(start + 8..start + 50);
        }
        set
    }

    fn change(
        pre: &mut PreImages,
        content: &mut [u8],
        page: u64,
        value: u8,
        full: WhenFull,
    ) -> Result<(), NoRoom> {
        let start = page as usize * PAGE;
        let end = (start + PAGE).min(content.len());
        pre.before_change(page, &content[start..end], full)?;
        content[start..end].fill(value);
        Ok(())
    }

    proptest! {
        /// Each pinned epoch reads like a full copy of the content made when it was
        /// pinned, for all that was not said to be sent.
        #[test]
        fn pinned_epochs_read_like_full_copies(
            ops in proptest::collection::vec((0u8..8, 0u64..10, any::<u8>()), 1..120),
            budget_pages in 1u64..16,
            abort in any::<bool>(),
        ) {
            let mut content = vec![0u8; SIZE];
            let mut pre = PreImages::new(SIZE as u64, budget_pages * PAGE_SIZE);
            let mut epoch = 1u64;
            let full = if abort { WhenFull::Abort } else { WhenFull::PutOff };
            // target, copy at pin time, pages it may read, users
            let mut model: Vec<(u64, Vec<u8>, Vec<u64>, u32)> = Vec::new();
            for (op, page, value) in ops {
                match op {
                    0 => {
                        let wanted: Vec<u64> = (0..10).filter(|p| value >> (p % 8) & 1 == 1).collect();
                        let known = model.iter().position(|m| m.0 == epoch);
                        if pre.pin(epoch, &pages_set(&wanted)).is_ok() {
                            match known {
                                Some(i) => {
                                    model[i].2.extend(&wanted);
                                    model[i].3 += 1;
                                }
                                None => model.push((epoch, content.clone(), wanted, 1)),
                            }
                        } else {
                            prop_assert!(known.is_none() || !pre.is_alive(epoch));
                            let alive = model.iter().filter(|m| pre.is_alive(m.0)).count();
                            prop_assert!(known.is_some() || alive == 2);
                        }
                    }
                    1 if !model.is_empty() => {
                        let index = value as usize % model.len();
                        pre.unpin(model[index].0);
                        model[index].3 -= 1;
                        if model[index].3 == 0 {
                            model.remove(index);
                        }
                    }
                    2 if !model.is_empty() => {
                        let index = value as usize % model.len();
                        pre.sent(model[index].0, 0..page * PAGE_SIZE);
                        if model[index].3 == 1 {
                            model[index].2.retain(|p| *p >= page);
                        }
                    }
                    _ => {
                        let alive: Vec<u64> = model.iter().map(|m| m.0).filter(|t| pre.is_alive(*t)).collect();
                        epoch += 1;
                        if change(&mut pre, &mut content, page, value, full).is_err() {
                            prop_assert_eq!(full, WhenFull::PutOff);
                            prop_assert!(alive.iter().all(|t| pre.is_alive(*t)), "putting off gives nothing up");
                        }
                    }
                }
                prop_assert!(pre.used_bytes() <= pre.budget_bytes());
                for (target, copy, pages, _) in model.iter().filter(|m| pre.is_alive(m.0)) {
                    for page in pages {
                        let start = *page as usize * PAGE;
                        let mut out = vec![0; 50.min(SIZE - start)];
                        prop_assert!(pre.read(*target, start as u64, &mut out, &content));
                        prop_assert_eq!(&out[..], &copy[start..start + out.len()]);
                    }
                }
            }
            for (target, _, _, users) in &model {
                (0..*users).for_each(|_| pre.unpin(*target));
            }
            prop_assert_eq!(pre.used_bytes(), 0);
        }
    }

    #[test]
    fn a_full_budget_puts_off_or_gives_up_the_largest() {
        let mut content = vec![1u8; SIZE];
        let mut pre = PreImages::new(SIZE as u64, 2 * PAGE_SIZE);
        pre.pin(5, &pages_set(&[0, 1, 2])).unwrap();
        change(&mut pre, &mut content, 0, 9, WhenFull::PutOff).unwrap();
        change(&mut pre, &mut content, 1, 9, WhenFull::PutOff).unwrap();
        pre.pin(6, &pages_set(&[3])).unwrap();
        assert_eq!(pre.pin(7, &pages_set(&[3])), Err(Full));
        let refused = change(&mut pre, &mut content, 3, 9, WhenFull::PutOff).unwrap_err();
        assert_eq!(refused.used_bytes, 2 * PAGE_SIZE);
        assert_eq!(content[3 * PAGE], 1);
        change(&mut pre, &mut content, 3, 9, WhenFull::Abort).unwrap();
        assert!(!pre.is_alive(5) && pre.is_alive(6));
        assert_eq!(pre.used_bytes(), PAGE_SIZE);
        let mut out = [0];
        assert!(pre.read(6, 3 * PAGE_SIZE, &mut out, &content));
        assert_eq!(out, [1]);
        assert!(!pre.read(5, 0, &mut out, &content));
        // A given-up target no longer counts, and cannot be pinned again.
        pre.pin(8, &pages_set(&[4])).unwrap();
        assert_eq!(pre.pin(5, &pages_set(&[4])), Err(Full));
        pre.unpin(5);
        assert!(!pre.is_alive(5));
    }

    #[test]
    fn a_coming_target_takes_nothing_until_it_is_complete() {
        let mut content = vec![1u8; SIZE];
        let mut pre = PreImages::new(SIZE as u64, SIZE as u64);
        pre.pin_coming(5).unwrap();
        change(&mut pre, &mut content, 3, 9, WhenFull::PutOff).unwrap();
        assert_eq!(pre.used_bytes(), 0);
        assert!(pre.complete(5, &pages_set(&[3, 4]), 4 * PAGE_SIZE));
        change(&mut pre, &mut content, 3, 8, WhenFull::PutOff).unwrap();
        assert_eq!(pre.used_bytes(), 0, "it was read before");
        change(&mut pre, &mut content, 4, 8, WhenFull::PutOff).unwrap();
        assert_eq!(pre.used_bytes(), PAGE_SIZE);
        pre.give_up_coming();
        assert!(pre.is_alive(5), "it came");
        pre.pin_coming(6).unwrap();
        pre.give_up_coming();
        assert!(!pre.is_alive(6) && !pre.complete(6, &pages_set(&[1]), 0));
        pre.unpin(6);
        assert!(pre.pin_coming(6).is_ok());
    }

    #[test]
    fn two_users_of_a_target_keep_what_one_has_sent() {
        let mut content = vec![1u8; SIZE];
        let mut pre = PreImages::new(SIZE as u64, SIZE as u64);
        pre.pin(5, &pages_set(&[0, 9])).unwrap();
        pre.pin(5, &pages_set(&[0, 9])).unwrap();
        change(&mut pre, &mut content, 0, 9, WhenFull::PutOff).unwrap();
        change(&mut pre, &mut content, 9, 9, WhenFull::PutOff).unwrap();
        assert_eq!(pre.used_bytes(), PAGE_SIZE + 100);
        pre.sent(5, 0..SIZE as u64);
        assert_eq!(pre.used_bytes(), PAGE_SIZE + 100);
        pre.unpin(5);
        pre.sent(5, 0..PAGE_SIZE - 1);
        assert_eq!(
            pre.used_bytes(),
            PAGE_SIZE + 100,
            "the page is not sent whole"
        );
        pre.sent(5, 0..SIZE as u64);
        assert_eq!(pre.used_bytes(), 0);
        assert!(pre.is_alive(5));
    }
}
