//! Views and typed fields: region data by copies, never as slices.

use std::marker::PhantomData;
use std::ops::Range;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::sparse::SparseData;
use super::{Region, RegionError};
use crate::units::{OutOfRange, checked_range};

/// A part of a region, for reading. Offsets count from the view's first byte.
#[derive(Clone, Debug)]
pub struct View<'a> {
    data: &'a SparseData,
    range: Range<u64>,
}

impl<'a> View<'a> {
    /// `range` was checked against the size of `data`.
    pub(super) fn new(data: &'a SparseData, range: Range<u64>) -> Self {
        Self { data, range }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Copies `out.len()` bytes at `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`] if they do not lie within the view.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let at = self.place(offset, out.len() as u64)?;
        self.data.read(at, out)
    }

    /// A copy of the `T` at `offset`, which need not be aligned.
    ///
    /// # Errors
    /// [`OutOfRange`] if it does not lie within the view.
    pub fn load<T: FromBytes>(&self, offset: u64) -> Result<T, OutOfRange> {
        let at = self.place(offset, size_of::<T>() as u64)?;
        self.data.load(at)
    }

    /// A copy of all of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len() as usize];
        self.data
            .read(self.range.start, &mut bytes)
            .expect("a view lies within its region");
        bytes
    }

    fn place(&self, offset: u64, len: u64) -> Result<u64, OutOfRange> {
        checked_range(offset, len, self.len()).map(|range| self.range.start + range.start)
    }
}

/// A field of type `T` at a fixed place of a region.
#[derive(Clone, Debug)]
pub struct Typed<'a, T> {
    region: &'a Region,
    offset: u64,
    _type: PhantomData<T>,
}

impl<'a, T: FromBytes + IntoBytes + Immutable> Typed<'a, T> {
    /// The field's range was checked against the region.
    pub(super) fn new(region: &'a Region, offset: u64) -> Self {
        Self {
            region,
            offset,
            _type: PhantomData,
        }
    }

    /// Offset of its first byte within the region.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// A copy of the value.
    pub fn get(&self) -> T {
        self.region
            .load(self.offset)
            .expect("a typed field lies within its region")
    }

    /// Stores a value. In mode `manual` it is to be marked as well:
    /// [`Typed::mark_changed`].
    pub fn set(&self, value: &T) {
        self.region
            .write(self.offset, value.as_bytes())
            .expect("a typed field lies within its region");
    }

    /// Loads, changes and stores the value. Other threads' stores in between are
    /// overwritten.
    pub fn update(&self, change: impl FnOnce(&mut T)) {
        let mut value = self.get();
        change(&mut value);
        self.set(&value);
    }

    /// Marks the whole field as changed.
    ///
    /// # Errors
    /// As for [`Region::mark_region_changed`].
    pub fn mark_changed(&self) -> Result<(), RegionError> {
        self.region
            .mark_region_changed(self.offset, size_of::<T>() as u64)
    }
}

/// Length of the field that `field` leads to, in bytes: for
/// [`mark_field_changed!`](crate::mark_field_changed).
pub const fn field_len<T, F>(_field: fn(&T) -> &F) -> u64 {
    size_of::<F>() as u64
}

/// Marks one field of a `#[repr(C)]` structure in a region as changed:
/// `mark_field_changed!(region, Type, field)` for a structure at the region's
/// beginning, `mark_field_changed!(region, base, Type, field)` for one at `base`.
/// Fields of fields are written `outer.inner`; a type with parameters needs an
/// alias.
///
/// Evaluates to what [`Region::mark_region_changed`](crate::region::Region::mark_region_changed)
/// answers.
#[macro_export]
macro_rules! mark_field_changed {
    ($region:expr, $base:expr, $type:ty, $($field:tt)+) => {
        $region.mark_region_changed(
            u64::saturating_add($base, ::core::mem::offset_of!($type, $($field)+) as u64),
            $crate::region::field_len(|it: &$type| &it.$($field)+),
        )
    };
    ($region:expr, $type:ty, $($field:tt)+) => {
        $crate::mark_field_changed!($region, 0, $type, $($field)+)
    };
}
