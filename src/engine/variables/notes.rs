//! What two processes tell each other beside the frames of the order: that they are
//! there, and why they do not go on with each other. Pure.
//!
//! ```text
//!  0        4             8
//!  | "UVPG" | 0           |                      still here
//!  | "UVRF" | length      | JSON: Note ...       refused, and what the sender is configured with
//! ```
//!
//! - I1: a length is checked against [`limits::MAX_VARIABLE_NOTE`] before it is waited for.

use serde::{Deserialize, Serialize};

use super::config::{Definition, OrderKind, ValueKind, VariablesConfig};
use crate::limits;

/// Length of what stands before a note.
pub(super) const PREFIX_BYTES: usize = 8;
const PING: [u8; 4] = *b"UVPG";
const REFUSAL: [u8; 4] = *b"UVRF";
/// Variables that a note lists; with more of them only the digests tell.
const MOST_LISTED: usize = 512;

/// Why a process does not go on, and what it is configured with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Note {
    pub(super) process: u32,
    pub(super) reason: String,
    pub(super) order: OrderKind,
    pub(super) session: u64,
    /// None if there are too many.
    pub(super) variables: Option<Vec<Listed>>,
}

/// A variable as a note lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed(u32, ValueKind, Vec<u32>);

impl Listed {
    fn of(one: &Definition) -> Self {
        Self(one.id, one.kind, one.subscribers.clone())
    }
}

/// What begins at the front of what was received.
#[derive(Debug, PartialEq)]
pub(super) enum Front {
    /// More bytes have to come.
    Unfinished,
    /// A frame of the order, or something that its decoder refuses.
    Frame,
    /// The other side is there; so many bytes.
    Ping(usize),
    /// A note, and how many bytes it took.
    Note(Box<Note>, usize),
    /// Neither; the connection is of no use.
    Broken,
}

/// Looks at the front of `bytes`.
pub(super) fn front(bytes: &[u8]) -> Front {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else {
        return Front::Unfinished;
    };
    let (magic, length) = prefix.split_at(4);
    let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
    match magic {
        magic if magic == PING && length == 0 => Front::Ping(PREFIX_BYTES),
        magic if magic == PING => Front::Broken,
        magic if magic == REFUSAL => {
            if u64::from(length) > limits::MAX_VARIABLE_NOTE {
                return Front::Broken;
            }
            let Some(text) = rest.get(..length as usize) else {
                return Front::Unfinished;
            };
            match serde_json::from_slice(text) {
                Ok(note) => Front::Note(Box::new(note), PREFIX_BYTES + length as usize),
                Err(_) => Front::Broken,
            }
        }
        _ => Front::Frame,
    }
}

/// The bytes that say that this side is there.
pub(super) fn ping() -> [u8; PREFIX_BYTES] {
    let mut bytes = [0; PREFIX_BYTES];
    bytes[..4].copy_from_slice(&PING);
    bytes
}

impl Note {
    pub(super) fn new(config: &VariablesConfig, session: u64, reason: String) -> Self {
        let few = config.variables.len() <= MOST_LISTED;
        Self {
            process: config.process,
            reason,
            order: config.order,
            session,
            variables: few.then(|| config.variables.iter().map(Listed::of).collect()),
        }
    }

    /// Its bytes; without the variables if they do not fit.
    pub(super) fn encode(mut self) -> Vec<u8> {
        let mut text = serde_json::to_vec(&self).unwrap_or_default();
        if text.len() as u64 > limits::MAX_VARIABLE_NOTE {
            self.variables = None;
            self.reason.truncate(0);
            text = serde_json::to_vec(&self).unwrap_or_default();
        }
        let mut bytes = REFUSAL.to_vec();
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text);
        bytes
    }

    /// What differs from `config`, in words; none if nothing that the note tells does.
    pub(super) fn difference(&self, config: &VariablesConfig, session: u64) -> Option<String> {
        if self.order != config.order {
            return Some(format!(
                "order is {} here and {} there",
                config.order, self.order
            ));
        }
        if self.session != session {
            return Some(format!(
                "session is {session} here and {} there",
                self.session
            ));
        }
        let theirs = self.variables.as_ref()?;
        for ours in &config.variables {
            let Some(there) = theirs.iter().find(|one| one.0 == ours.id) else {
                return Some(format!(
                    "variable {} ({}) only exists here",
                    ours.id, ours.name
                ));
            };
            if there.1 != ours.kind {
                return Some(format!(
                    "variable {} ({}) is of type {} here and {} there",
                    ours.id, ours.name, ours.kind, there.1
                ));
            }
            if there.2 != ours.subscribers {
                return Some(format!(
                    "variable {} ({}) has subscribers {:?} here and {:?} there",
                    ours.id, ours.name, ours.subscribers, there.2
                ));
            }
        }
        let foreign = theirs
            .iter()
            .find(|one| config.definition(one.0).is_none())?;
        Some(format!("variable {} only exists there", foreign.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VariablesConfig {
        let name = |text: &str| text.parse().expect("a name");
        let at = |text: &str| text.parse().expect("an address");
        VariablesConfig::new(0)
            .member(0, at("unix:/a"))
            .member(1, at("unix:/b"))
            .variable(0, name("x"), ValueKind::I64, [0, 1])
            .variable(1, name("y"), ValueKind::Bytes, [1])
    }

    #[test]
    fn a_note_is_read_as_it_was_written_and_no_byte_less() {
        let note = Note::new(&config(), 3, "because".into());
        let bytes = note.clone().encode();
        for cut in 0..bytes.len() {
            assert_eq!(front(&bytes[..cut]), Front::Unfinished, "{cut}");
        }
        assert_eq!(front(&bytes), Front::Note(Box::new(note), bytes.len()));
        assert_eq!(front(&ping()), Front::Ping(PREFIX_BYTES));
    }

    #[test]
    fn absurd_lengths_are_not_waited_for() {
        for bytes in [
            b"UVRF\xff\xff\xff\xff",
            b"UVPG\x01\0\0\0",
            b"UVRF\x01\0\0\0",
        ] {
            let mut bytes = bytes.to_vec();
            bytes.push(b'x');
            assert_eq!(front(&bytes), Front::Broken);
        }
        assert_eq!(front(b"UVARxxxx"), Front::Frame);
    }

    #[test]
    fn what_differs_is_named() {
        let ours = config();
        let name = |text: &str| text.parse().expect("a name");
        let said = |theirs: &VariablesConfig, session| {
            Note::new(theirs, session, String::new()).difference(&ours, 1)
        };
        assert_eq!(said(&ours, 1), None);
        let differs = |theirs: VariablesConfig, words: &str| {
            let found = said(&theirs, 1).expect("a difference");
            assert!(found.contains(words), "{found}");
        };
        assert!(said(&ours, 2).is_some_and(|said| said.contains("session is 1 here and 2")));
        differs(
            ours.clone().order(OrderKind::Sequencer),
            "order is skeen here",
        );
        let mut other = ours.clone();
        other.variables[0].kind = ValueKind::Bytes;
        differs(other, "variable 0 (x) is of type i64 here and bytes there");
        let mut other = ours.clone();
        other.variables[1].subscribers = vec![0, 1];
        differs(
            other,
            "variable 1 (y) has subscribers [1] here and [0, 1] there",
        );
        let other = ours.clone().variable(7, name("z"), ValueKind::I64, [0]);
        differs(other, "variable 7 only exists there");
        let mut other = ours.clone();
        other.variables.pop();
        differs(other, "variable 1 (y) only exists here");
    }
}
