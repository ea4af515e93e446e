//! The mark that an operation leaves beside the value it changes: who did it, and whether
//! it changed anything. A value.

use crate::ordered::{Incarnation, OperationId, ProcessId};

/// `<process>.<life, hexadecimal>.<number> <w: written, s: swapped, 0: not swapped>`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) id: OperationId,
    pub(super) applied: bool,
    pub(super) swap: bool,
}

impl Mark {
    pub(super) fn to_text(self) -> String {
        let outcome = match (self.applied, self.swap) {
            (true, false) => 'w',
            (true, true) => 's',
            (false, _) => '0',
        };
        format!("{} {outcome}", self.id)
    }

    /// The mark in a key's value; none if it is something else.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let (id, applied) = text.split_once(' ')?;
        let mut parts = id.split('.');
        let id = OperationId {
            initiator: ProcessId(parts.next()?.parse().ok()?),
            incarnation: Incarnation(u64::from_str_radix(parts.next()?, 16).ok()?),
            number: parts.next()?.parse().ok()?,
        };
        let (applied, swap) = match applied {
            "w" => (true, false),
            "s" => (true, true),
            "0" => (false, true),
            _ => return None,
        };
        parts.next().is_none().then_some(Self { id, applied, swap })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written() {
        let id = OperationId {
            initiator: ProcessId(3),
            incarnation: Incarnation(u64::MAX),
            number: 7,
        };
        for (applied, swap) in [(true, false), (true, true), (false, true)] {
            let mark = Mark { id, applied, swap };
            assert_eq!(Mark::parse(mark.to_text().as_bytes()), Some(mark));
        }
        for text in ["", "1.2", "1.2.3 2", "1.zz.3 w", "1.2.3.4 w", "\u{ff}"] {
            assert_eq!(Mark::parse(text.as_bytes()), None, "{text}");
        }
    }
}
