//! Whether the loop looks out for the next request for a moment before it sleeps.
//!
//! To be woken costs more than most requests: 5 us and more on each side. A client that
//! asks one thing at a time sends the next request some microseconds after it has the reply,
//! so the loop waits for that awake. With several clients it does not: they may need the
//! processor that it would keep busy, and there is always somebody to serve anyway.
//!
//! - I1: it looks out only while one connection has spoken many times in a row.
//! - I2: looking out in vain doubles the number of times that it is left out next.

use crate::engine::keys::Key;

/// Times in a row that one connection has spoken, before it is waited for.
const STREAK: u32 = 16;
/// Most times that looking out is left out after it was in vain.
const MOST_SKIPPED: u32 = 1024;

/// What the loop has seen of late.
#[derive(Debug, Default)]
pub(super) struct Eager {
    last: Option<Key>,
    streak: u32,
    /// How often to leave it out after the next time in vain.
    patience: u32,
    skip: u32,
}

impl Eager {
    /// Something came over a connection.
    pub(super) fn spoke(&mut self, key: Key) {
        if self.last == Some(key) {
            self.streak = self.streak.saturating_add(1);
        } else {
            (self.last, self.streak) = (Some(key), 0);
        }
    }

    /// Whether to look out now.
    pub(super) fn is_worth_it(&mut self) -> bool {
        if self.streak < STREAK {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        true
    }

    /// How looking out went.
    pub(super) fn looked(&mut self, found: bool) {
        if found {
            self.patience = 0;
        } else {
            self.patience = (2 * self.patience).clamp(1, MOST_SKIPPED);
            self.skip = self.patience;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_speaks_again_and_again_is_waited_for() {
        let mut eager = Eager::default();
        let (one, other) = (Key::from_bits(1), Key::from_bits(2));
        for _ in 0..STREAK {
            eager.spoke(one);
            assert!(!eager.is_worth_it());
        }
        eager.spoke(one);
        assert!(eager.is_worth_it());
        eager.looked(true);
        assert!(eager.is_worth_it());
        eager.spoke(other);
        for _ in 0..100 {
            eager.spoke(one);
            eager.spoke(other);
            assert!(!eager.is_worth_it(), "two are at it");
        }
    }

    #[test]
    fn in_vain_it_is_left_out_more_and_more() {
        let mut eager = Eager::default();
        let one = Key::from_bits(1);
        let mut looked = 0;
        for _ in 0..100_000 {
            eager.spoke(one);
            if eager.is_worth_it() {
                looked += 1;
                eager.looked(false);
            }
        }
        assert!((20..200).contains(&looked), "{looked} times");
    }
}
