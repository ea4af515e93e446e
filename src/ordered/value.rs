//! What variables hold, and what may be done to them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::ids::VariableId;
use crate::limits::MAX_VARIABLE_BYTES;

/// What a variable holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// A signed number of 64 bits.
    Integer(i64),
    /// At most [`MAX_VARIABLE_BYTES`]; clones share them.
    Bytes(Arc<[u8]>),
}

/// Which kind of value a variable holds; static.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValueType {
    /// [`Value::Integer`]; 0 at the start.
    Integer,
    /// [`Value::Bytes`]; empty at the start.
    Bytes,
}

/// One operation on one variable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// The variable holds this value from here on.
    Write(Value),
    /// If the variable holds `expected` here, it holds `new` from here on.
    CompareAndSwap {
        /// What it has to hold.
        expected: Value,
        /// What it holds afterwards; may equal `expected`, which is a success as well.
        new: Value,
    },
    /// Changes nothing; what the variable holds here is the answer.
    Read,
}

/// Why a value does not fit its variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// A number where bytes are held, or the other way round.
    #[error("variable {variable} holds {expected:?}, not {found:?}")]
    Type {
        /// The variable.
        variable: VariableId,
        /// What it holds.
        expected: ValueType,
        /// What was given.
        found: ValueType,
    },
    /// Longer than [`MAX_VARIABLE_BYTES`].
    #[error(
        "a value of {len} bytes for variable {variable}; at most {MAX_VARIABLE_BYTES} are allowed"
    )]
    TooLong {
        /// The variable.
        variable: VariableId,
        /// Length of what was given, in bytes.
        len: usize,
    },
}

impl Value {
    /// The bytes of `content`, copied once.
    pub fn bytes(content: &[u8]) -> Self {
        Self::Bytes(content.into())
    }

    /// Which kind it is.
    pub fn kind(&self) -> ValueType {
        match self {
            Self::Integer(_) => ValueType::Integer,
            Self::Bytes(_) => ValueType::Bytes,
        }
    }

    /// Checks that a variable of this `kind` may hold it.
    ///
    /// # Errors
    /// [`ValueError`] for another kind, or for too many bytes.
    pub fn check(&self, variable: VariableId, kind: ValueType) -> Result<(), ValueError> {
        match self {
            _ if self.kind() != kind => Err(ValueError::Type {
                variable,
                expected: kind,
                found: self.kind(),
            }),
            Self::Bytes(bytes) if bytes.len() as u64 > MAX_VARIABLE_BYTES => {
                Err(ValueError::TooLong {
                    variable,
                    len: bytes.len(),
                })
            }
            _ => Ok(()),
        }
    }
}

/// A number as it is; bytes as text where they are readable, escaped where they are not.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(number) => number.fmt(f),
            Self::Bytes(bytes) => bytes.escape_ascii().fmt(f),
        }
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl ValueType {
    /// What a variable of this kind holds before the first write.
    pub fn initial(self) -> Value {
        match self {
            Self::Integer => Value::Integer(0),
            Self::Bytes => Value::Bytes(Arc::new([])),
        }
    }
}

impl Operation {
    /// Checks that its values may be held by a variable of this `kind`.
    ///
    /// # Errors
    /// [`ValueError`] for the first value that may not.
    pub fn check(&self, variable: VariableId, kind: ValueType) -> Result<(), ValueError> {
        match self {
            Self::Write(value) => value.check(variable, kind),
            Self::CompareAndSwap { expected, new } => {
                expected.check(variable, kind)?;
                new.check(variable, kind)
            }
            Self::Read => Ok(()),
        }
    }

    /// What the variable holds afterwards if it holds `old` before; none if nothing is
    /// applied: a read, or a comparison that failed.
    pub fn applied_to(&self, old: &Value) -> Option<Value> {
        match self {
            Self::Write(new) => Some(new.clone()),
            Self::CompareAndSwap { expected, new } => (old == expected).then(|| new.clone()),
            Self::Read => None,
        }
    }
}
