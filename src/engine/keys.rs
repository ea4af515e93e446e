//! A table whose keys never mean another entry than the one they were made for.

use slab::Slab;

/// Names one entry of a [`Keyed`] table; stale once the entry was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    index: u32,
    serial: u32,
}

impl Key {
    /// Bits that [`Key::to_bits`] uses.
    pub(crate) const BITS: u32 = 56;

    /// The key in the low 56 bits of a number.
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.index) << 24 | u64::from(self.serial & 0xFF_FFFF)
    }

    /// The key that [`Key::to_bits`] made.
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self {
            index: (bits >> 24) as u32,
            serial: (bits & 0xFF_FFFF) as u32,
        }
    }
}

/// A slab with a serial number in each slot: a completion that arrives after its
/// connection was closed finds nothing, even if the slot was given away again.
#[derive(Debug)]
pub(crate) struct Keyed<T> {
    slots: Slab<(u32, T)>,
    serial: u32,
}

impl<T> Keyed<T> {
    pub(crate) fn new() -> Self {
        Self {
            slots: Slab::new(),
            serial: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn insert(&mut self, value: T) -> Key {
        self.serial = self.serial.wrapping_add(1) & 0xFF_FFFF;
        let index = self.slots.insert((self.serial, value));
        Key {
            index: u32::try_from(index).expect("a table is bounded by limits"),
            serial: self.serial,
        }
    }

    pub(crate) fn get(&self, key: Key) -> Option<&T> {
        let (serial, value) = self.slots.get(key.index as usize)?;
        (*serial == key.serial).then_some(value)
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let (serial, value) = self.slots.get_mut(key.index as usize)?;
        (*serial == key.serial).then_some(value)
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        self.get(key)?;
        Some(self.slots.remove(key.index as usize).1)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().map(|(index, (serial, value))| {
            (
                Key {
                    index: index as u32,
                    serial: *serial,
                },
                value,
            )
        })
    }

    pub(crate) fn keys(&self) -> Vec<Key> {
        self.iter().map(|(key, _)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_of_a_removed_entry_finds_nothing() {
        let mut table = Keyed::new();
        let old = table.insert("old");
        assert_eq!(table.remove(old), Some("old"));
        let new = table.insert("new");
        assert_eq!(old.index, new.index, "the slot is used again");
        assert_eq!(table.get(old), None);
        assert_eq!(table.get(Key::from_bits(new.to_bits())), Some(&"new"));
        assert!(new.to_bits() < 1 << Key::BITS);
    }
}
