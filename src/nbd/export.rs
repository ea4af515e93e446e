//! What a client can choose among.

use std::fmt::Debug;

use super::backing::Since;
use crate::limits::{MAX_NBD_TEXT, SPACE_STRIPE};

/// A range of addresses under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// What clients call it; 1 to [`MAX_NBD_TEXT`] bytes without NUL.
    pub name: Box<str>,
    /// A line for people.
    pub description: Box<str>,
    /// Address of its first byte, as the [`Backing`](super::Backing) counts them.
    pub base: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Bytes that lie on one server; stripes are counted from the beginning of each such
    /// part, and `base` is the beginning of one.
    pub segment: u64,
    /// Whether it refuses to be written.
    pub read_only: bool,
    /// Its newest epoch, where what was changed since an earlier one can be asked for.
    pub newest: Option<Since>,
}

impl Export {
    /// The last end of a stripe that is not behind `most`, if one lies behind `offset`.
    pub(super) fn last_stripe_end(&self, offset: u64, most: u64) -> Option<u64> {
        if most >= self.size {
            return Some(self.size).filter(|end| *end > offset);
        }
        let begin = most - most % self.segment;
        let end = begin + (most - begin) / SPACE_STRIPE * SPACE_STRIPE;
        Some(end).filter(|end| *end > offset)
    }
}

/// What clients can choose among, looked at anew with each option of theirs.
pub trait Catalog: Debug + Send + Sync {
    /// All of them, in the order in which they are listed; each is as [`Exports::new`]
    /// would have it.
    fn all(&self) -> Vec<Export>;

    /// The one called `name`; with an empty name the one for clients that name none.
    fn find(&self, name: &[u8]) -> Option<Export>;
}

/// Exports that cannot be offered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportsError {
    /// There is none.
    #[error("there is nothing to export")]
    None,
    /// A name that the protocol has no room for.
    #[error("the name of export {position} is {len} bytes, it has 1 to {MAX_NBD_TEXT} and no NUL")]
    Name {
        /// Its position, from 0.
        position: usize,
        /// Length of the name.
        len: usize,
    },
    /// Two of one name.
    #[error("two exports are called {0}")]
    Twice(Box<str>),
    /// A size or a segment of nothing.
    #[error("export {0} is empty")]
    Empty(Box<str>),
}

/// The exports of a server; the first one is also what clients get that name none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exports {
    all: Box<[Export]>,
}

impl Exports {
    /// The exports, in the order in which they are listed.
    ///
    /// # Errors
    /// The first [`ExportsError`] found.
    pub fn new(all: Vec<Export>) -> Result<Self, ExportsError> {
        if all.is_empty() {
            return Err(ExportsError::None);
        }
        let mut names: Vec<&str> = all.iter().map(|export| &*export.name).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ExportsError::Twice(pair[0].into()));
        }
        for (position, export) in all.iter().enumerate() {
            let len = export.name.len();
            if len == 0 || len as u64 > MAX_NBD_TEXT || export.name.contains('\0') {
                return Err(ExportsError::Name { position, len });
            }
            if export.size == 0 || export.segment == 0 {
                return Err(ExportsError::Empty(export.name.clone()));
            }
        }
        Ok(Self { all: all.into() })
    }
}

impl Catalog for Exports {
    fn all(&self) -> Vec<Export> {
        self.all.to_vec()
    }

    fn find(&self, name: &[u8]) -> Option<Export> {
        let is_named = |export: &&Export| name.is_empty() || export.name.as_bytes() == name;
        self.all.iter().find(is_named).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE_SIZE;

    fn export(size: u64, segment: u64) -> Export {
        Export {
            name: "e".into(),
            description: "".into(),
            base: 0,
            size,
            segment,
            read_only: false,
            newest: None,
        }
    }

    #[test]
    fn stripes_are_counted_in_each_segment() {
        let odd = SPACE_STRIPE + PAGE_SIZE;
        let export = export(3 * odd, odd);
        assert_eq!(export.last_stripe_end(0, SPACE_STRIPE - 1), None);
        assert_eq!(export.last_stripe_end(0, SPACE_STRIPE), Some(SPACE_STRIPE));
        assert_eq!(export.last_stripe_end(5, odd + 7), Some(odd));
        assert_eq!(export.last_stripe_end(odd, odd + 7), None);
        assert_eq!(export.last_stripe_end(7, u64::MAX), Some(3 * odd));
    }

    #[test]
    fn exports_that_cannot_be() {
        assert_eq!(Exports::new(Vec::new()), Err(ExportsError::None));
        let two = vec![export(1, 1), export(2, 1)];
        assert_eq!(Exports::new(two), Err(ExportsError::Twice("e".into())));
        assert!(Exports::new(vec![export(0, 1)]).is_err());
        let long = "x".repeat(4097);
        for name in ["", "a\0b", &long] {
            let named = Export {
                name: name.into(),
                ..export(1, 1)
            };
            assert!(Exports::new(vec![named]).is_err(), "{name}");
        }
    }
}
