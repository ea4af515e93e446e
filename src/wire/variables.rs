//! Messages about ordered variables between a command and its node, after
//! [`control::Request::Variables`](super::control::Request::Variables) has turned a control
//! connection into one of these. Framed as control messages are. Pure.
//!
//! Each request is answered by one response, in order; `watch` by responses without end.

use serde::{Deserialize, Serialize};

use crate::limits;

/// What a variable holds, as JSON: a number, a text, or `{"hex": ".."}` for bytes that are
/// no text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Shown {
    /// Of type `i64`.
    Number(i64),
    /// Of type `bytes`, as text.
    Text(String),
    /// Of type `bytes`.
    Hex {
        /// Two digits each.
        hex: String,
    },
}

impl Shown {
    /// The form of some bytes.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Hex {
                hex: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
            },
        }
    }

    /// The bytes that it stands for; none for a number or a wrong digit.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            Self::Number(_) => None,
            Self::Text(text) => Some(text.clone().into_bytes()),
            Self::Hex { hex } if hex.len() as u64 > 2 * limits::MAX_VARIABLE_BYTES + 2 => None,
            Self::Hex { hex } => {
                let pairs = hex.as_bytes().chunks(2).map(|pair| {
                    let [high, low] = pair else { return None };
                    let digit = |byte: &u8| char::from(*byte).to_digit(16);
                    Some((digit(high)? << 4 | digit(low)?) as u8)
                });
                pairs.collect()
            }
        }
    }
}

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
            Self::Hex { hex } => write!(f, "0x{hex}"),
        }
    }
}

/// What a command asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What a variable holds: [`Response::Value`].
    Get {
        /// Name or number.
        variable: String,
        /// Whether it has to be linearisable.
        ordered: bool,
        /// Longest wait.
        deadline_ms: u64,
    },
    /// Writes: [`Response::Done`].
    Set {
        /// Name or number.
        variable: String,
        /// As text for both types.
        value: Shown,
        /// Longest wait.
        deadline_ms: u64,
    },
    /// Compares and swaps: [`Response::Done`].
    Cas {
        /// Name or number.
        variable: String,
        /// What it has to hold.
        expected: Shown,
        /// What it holds then.
        new: Shown,
        /// Longest wait.
        deadline_ms: u64,
    },
    /// All variables: [`Response::List`].
    List,
    /// How it goes: [`Response::Status`].
    Status,
    /// Changes from now on: [`Response::Change`] and the like, until the connection ends.
    Watch {
        /// Names or numbers; none for all.
        variables: Vec<String>,
    },
    /// Stops delivering in this session: [`Response::Saved`].
    Freeze,
    /// Begins a new session from what all members saved: [`Response::Renewed`].
    Renew {
        /// What each member saved.
        saved: Vec<serde_json::Value>,
    },
}

/// One variable in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// `i64` or `bytes`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Who reads, writes and hears it.
    pub subscribers: Vec<u32>,
    /// What it holds here; none if this node does not subscribe to it.
    pub value: Option<Shown>,
}

/// A place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// Logical time; of an etcd cluster its revision.
    pub time: u64,
    /// Who asked for it.
    pub initiator: u32,
    /// In which life.
    pub incarnation: u64,
    /// As its how manieth.
    pub number: u64,
}

/// One callback, as `var watch --json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Its place; places rise.
    pub key: Place,
    /// The variable's number.
    pub variable: u32,
    /// Its name.
    pub name: String,
    /// What it held.
    pub old: Shown,
    /// What it holds.
    pub new: Shown,
    /// `write` or `cas`.
    pub operation: String,
    /// The process that asked for it; null for a change by another program of the cluster.
    pub initiator: Option<u32>,
}

/// Why a request about variables was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Denied {
    /// The request is wrong: no such variable, not a subscriber, a value that does not fit.
    Invalid,
    /// It was not carried out; the message says why.
    Failed,
    /// Nobody knows whether it was carried out.
    Indeterminate,
}

/// What the node answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Response {
    /// Answer to [`Request::Get`].
    Value {
        /// What it holds.
        value: Shown,
    },
    /// Answer to [`Request::Set`] and [`Request::Cas`].
    Done {
        /// Its place in the order.
        key: Place,
        /// Whether it changed the variable.
        applied: bool,
        /// What the variable held before, where that is known.
        old: Option<Shown>,
    },
    /// Answer to [`Request::List`].
    List {
        /// By number.
        variables: Vec<Row>,
    },
    /// Answer to [`Request::Status`].
    Status {
        /// As `var status --json` prints it.
        status: serde_json::Value,
    },
    /// To a watch: one change.
    Change(Line),
    /// To a watch: changes were missed, and this is what everything holds.
    Resync {
        /// Place up to which everything is contained.
        time: u64,
        /// By number.
        values: Vec<(u32, Shown)>,
    },
    /// To a watch: nothing changes any more.
    Unavailable {
        /// Why.
        reason: String,
    },
    /// To a watch: it ended.
    Ended {
        /// Why.
        reason: String,
    },
    /// Answer to [`Request::Freeze`].
    Saved {
        /// What this member knows.
        saved: serde_json::Value,
    },
    /// Answer to [`Request::Renew`].
    Renewed {
        /// The new session.
        session: u64,
    },
    /// The request was not carried out.
    Refused {
        /// What kind of refusal.
        code: Denied,
        /// What was tried and what was wrong.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_they_are_shown() {
        for (bytes, json) in [
            (&b"text"[..], "\"text\""),
            (b"\xff\x00", "{\"hex\":\"ff00\"}"),
            (b"", "\"\""),
        ] {
            let shown = Shown::of_bytes(bytes);
            let text = serde_json::to_string(&shown).expect("JSON");
            assert_eq!(text, json);
            let back: Shown = serde_json::from_str(&text).expect("a value");
            assert_eq!(back.bytes().as_deref(), Some(bytes));
        }
        let number: Shown = serde_json::from_str("-7").expect("a number");
        assert_eq!(number, Shown::Number(-7));
        assert_eq!(number.bytes(), None);
        assert_eq!(Shown::Hex { hex: "0".into() }.bytes(), None);
    }
}
