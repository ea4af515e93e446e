//! The words that all rooms share: names, random ids, modes and kinds.
//!
//! They are plain values with one text form each, the same on the command line,
//! in configuration files, in JSON and in logs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::limits::MAX_NAME_BYTES;

/// A text that is not a valid value of one of the types of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    /// A name is empty.
    #[error("a name has at least one character")]
    Empty,
    /// A name is longer than [`MAX_NAME_BYTES`].
    #[error("a name of {len} bytes is longer than {MAX_NAME_BYTES}")]
    TooLong {
        /// Length that was given, in bytes.
        len: usize,
    },
    /// A name holds a character that names do not have.
    #[error("character {character:?} in a name; allowed are A-Z a-z 0-9 . _ -")]
    Character {
        /// The first one that is not allowed.
        character: char,
    },
    /// A name begins with a character that may only follow.
    #[error("a name begins with a letter or a digit, not with {character:?}")]
    First {
        /// The character it begins with.
        character: char,
    },
    /// An id is not 32 hexadecimal digits.
    #[error("an id is 32 hexadecimal digits")]
    Id,
    /// A tracking mode that does not exist.
    #[error("unknown tracking mode; use async, sync, manual, compare or auto")]
    Mode,
    /// A kind of writing that does not exist.
    #[error("unknown kind of region; use exclusive or cooperative")]
    WriteKind,
    /// A way of publishing that does not exist.
    #[error("unknown way of publishing; use timer or commit")]
    Publish,
    /// A kind of epoch that does not exist.
    #[error("unknown kind of epoch; use cut or convergent")]
    EpochKind,
    /// A kind of loss that does not exist.
    #[error("unknown kind of loss of tracking")]
    LossKind,
}

/// Name of a region: 1 to [`MAX_NAME_BYTES`] of `A-Z a-z 0-9 . _ -`, the first a
/// letter or a digit. So it is a file name, a URL segment and a shell word as it
/// stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionName(Box<str>);

impl RegionName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RegionName {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        let first = text.chars().next().ok_or(WordError::Empty)?;
        if text.len() as u64 > MAX_NAME_BYTES {
            return Err(WordError::TooLong { len: text.len() });
        }
        let odd = |c: &char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if let Some(character) = text.chars().find(odd) {
            return Err(WordError::Character { character });
        }
        if !first.is_ascii_alphanumeric() {
            return Err(WordError::First { character: first });
        }
        Ok(Self(text.into()))
    }
}

impl AsRef<str> for RegionName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// Reads 32 hexadecimal digits.
fn parse_id(text: &str) -> Result<u128, WordError> {
    if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(WordError::Id);
    }
    u128::from_str_radix(text, 16).map_err(|_| WordError::Id)
}

/// 128 bits from the kernel's generator, never all zero.
fn random_id() -> u128 {
    let mut bytes = [0; 16];
    // The kernel's generator fails only before it was ever seeded, or where the
    // system call is forbidden: nothing that needs ids can go on then.
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    u128::from_le_bytes(bytes).max(1)
}

macro_rules! random_ids {
    ($($(#[doc = $doc:literal])+ $name:ident;)+) => {
        $(
            $(#[doc = $doc])+
            ///
            /// Written as 32 hexadecimal digits.
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
            pub struct $name(pub u128);

            impl $name {
                /// The id that nothing has: none yet.
                pub const ZERO: Self = Self(0);

                /// A fresh one, 128 random bits, never [`Self::ZERO`].
                ///
                /// # Panics
                /// If the kernel gives no random bytes.
                pub fn random() -> Self {
                    Self(random_id())
                }

                /// Whether this is [`Self::ZERO`].
                pub const fn is_zero(self) -> bool {
                    self.0 == 0
                }
            }

            impl FromStr for $name {
                type Err = WordError;

                fn from_str(text: &str) -> Result<Self, WordError> {
                    parse_id(text).map(Self)
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    write!(f, "{:032x}", self.0)
                }
            }
        )+
    };
}

random_ids! {
    /// Random id of one life of a region: a new writer, a restart or a promotion
    /// starts a new one. Epochs compare only within one generation.
    Generation;
    /// Random id of one region's memory, given at its creation: tells two regions
    /// that had the same name apart.
    RegionId;
}

macro_rules! named_words {
    ($($(#[doc = $doc:literal])+ $name:ident, $error:ident { $($(#[doc = $case_doc:literal])+ $case:ident = $text:literal,)+ })+) => {
        $(
            $(#[doc = $doc])+
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub enum $name { $($(#[doc = $case_doc])+ $case,)+ }

            impl $name {
                /// The word as it is written everywhere.
                pub const fn as_str(self) -> &'static str {
                    match self { $(Self::$case => $text,)+ }
                }
            }

            impl FromStr for $name {
                type Err = WordError;

                fn from_str(text: &str) -> Result<Self, WordError> {
                    match text { $($text => Ok(Self::$case),)+ _ => Err(WordError::$error) }
                }
            }

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.pad(self.as_str())
                }
            }
        )+
    };
}

named_words! {
    /// How changes of a region are found (the `Tracker` of each mode says what it promises).
    Mode, Mode {
        /// Asynchronous write-protection and page-map scans: convergent, a cut at
        /// `commit()`. The lowest cost that needs no help from the writer.
        Async = "async",
        /// Stores to protected pages wait for a thread of the engine: every epoch is a
        /// cut, without help from the writer. Where the process may handle faults of its
        /// own code only (`doctor` tells), `read(2)` and the like into such a page fail
        /// with `EFAULT`.
        Sync = "sync",
        /// Marks by the writer only: the smallest cost.
        Manual = "manual",
        /// The whole region compared with the twin: for memory of programs that
        /// cannot be changed, and kernels without the features.
        Compare = "compare",
        /// One of the others, picked at the region's creation by what the kernel does
        /// and what the writer asked for. No region is tracked in this mode.
        Auto = "auto",
    }
    /// Who may write a region.
    WriteKind, WriteKind {
        /// One process, whose mapping is the only writable one there ever is.
        Exclusive = "exclusive",
        /// Several processes, which come and go.
        Cooperative = "cooperative",
    }
    /// When a region's epochs are made; never both ways at once.
    Publish, Publish {
        /// By timer, at an interval that adapts to what is found: convergent epochs.
        Timer = "timer",
        /// At `commit()` only.
        Commit = "commit",
    }
    /// What an epoch promises about its instant.
    EpochKind, EpochKind {
        /// An exact instant of the source.
        Cut = "cut",
        /// May mix instants; right once writes pause.
        Convergent = "convergent",
    }
    /// Why what was known of a region's changes was not enough any more. After each
    /// but a standstill the whole region is compared with the twin.
    LossKind, LossKind {
        /// A scan or a protection was refused: the marks of a part may be gone.
        ScanError = "scan-error",
        /// The writing process exited.
        WriterExited = "writer-exited",
        /// The writing process runs another program in its place (`exec`).
        WriterReplaced = "writer-replaced",
        /// The connection that the region was handed over on ended, as when its
        /// program dropped it.
        LinkEnded = "link-ended",
        /// A part of the mapping is not tracked any more: unmapped, moved, mapped over
        /// or unregistered.
        Untracked = "untracked",
        /// The audit found bytes that changed in a page that nothing reported.
        UnseenWrite = "unseen-write",
        /// In mode `sync`: stores waited too long for room to copy their pages, so a cut
        /// was given up.
        CutVoid = "cut-void",
        /// Stores wait, and no epoch is made of them. Nothing is compared: the region
        /// is looked at again.
        Standstill = "standstill",
    }
}

impl fmt::Display for RegionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

macro_rules! serde_as_text {
    ($($name:ident)+) => {
        $(
            impl Serialize for $name {
                fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                    serializer.collect_str(self)
                }
            }

            impl<'de> Deserialize<'de> for $name {
                fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                    struct Text;
                    impl de::Visitor<'_> for Text {
                        type Value = $name;
                        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                            f.write_str("a text")
                        }
                        fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                            text.parse().map_err(E::custom)
                        }
                    }
                    deserializer.deserialize_str(Text)
                }
            }
        )+
    };
}

serde_as_text!(RegionName Generation RegionId Mode WriteKind Publish EpochKind LossKind);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "orders.v1", "7_x-y", &"n".repeat(64)] {
            assert_eq!(good.parse::<RegionName>().unwrap().as_str(), good);
        }
        assert_eq!("".parse::<RegionName>(), Err(WordError::Empty));
        assert_eq!(
            "n".repeat(65).parse::<RegionName>(),
            Err(WordError::TooLong { len: 65 })
        );
        for odd in ["a/b", "a b", "ä", "a\0", "a\n"] {
            assert!(
                matches!(odd.parse::<RegionName>(), Err(WordError::Character { .. })),
                "{odd:?}"
            );
        }
        for first in [".a", "-a", "_"] {
            assert!(
                matches!(first.parse::<RegionName>(), Err(WordError::First { .. })),
                "{first:?}"
            );
        }
    }

    #[test]
    fn ids_survive_their_text_form() {
        let id = Generation::random();
        assert!(!id.is_zero());
        assert_ne!(id, Generation::random());
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(Generation(0xAB).to_string().len(), 32);
        for bad in ["", "12", "+0000000000000000000000000000000", "zz"] {
            assert_eq!(bad.parse::<Generation>(), Err(WordError::Id));
        }
        let json = serde_json::to_string(&RegionId(1)).unwrap();
        assert_eq!(json, "\"00000000000000000000000000000001\"");
        assert_eq!(
            serde_json::from_str::<RegionId>(&json).unwrap(),
            RegionId(1)
        );
    }

    #[test]
    fn words_have_one_text_form() {
        for mode in [Mode::Async, Mode::Sync, Mode::Manual, Mode::Compare] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!(
            serde_json::to_string(&Publish::Commit).unwrap(),
            "\"commit\""
        );
        assert_eq!(
            serde_json::from_str::<EpochKind>("\"cut\"").unwrap(),
            EpochKind::Cut
        );
        assert!(serde_json::from_str::<Mode>("\"Async\"").is_err());
    }
}
