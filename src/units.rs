//! Sizes, pages and the one check of a range against a size.
//!
//! Every offset and length that comes from a peer, a flag, a file or shared
//! memory goes through [`checked_range`] before it is used; no other arithmetic
//! is done on such numbers.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Size of the pages that write-protection works on, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Kibibyte, in bytes.
pub const KIB: u64 = 1 << 10;
/// Mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;
/// Gibibyte, in bytes.
pub const GIB: u64 = 1 << 30;

/// A range that does not lie within the size it was checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("offset {offset} + length {len} lies beyond the end at {size} bytes")]
pub struct OutOfRange {
    /// First byte that was asked for.
    pub offset: u64,
    /// Number of bytes that were asked for.
    pub len: u64,
    /// Size that the range has to lie within, in bytes.
    pub size: u64,
}

/// The range `offset .. offset + len`, if it lies within `0 .. size`.
///
/// # Errors
/// [`OutOfRange`] if it does not, or if `offset + len` overflows.
pub const fn checked_range(offset: u64, len: u64, size: u64) -> Result<Range<u64>, OutOfRange> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(offset..end),
        _ => Err(OutOfRange { offset, len, size }),
    }
}

/// The page that byte `offset` lies in, as a page number.
pub const fn page_of(offset: u64) -> u64 {
    offset / PAGE_SIZE
}

/// Number of pages that `len` bytes take, the last one counted whole.
pub const fn pages_for(len: u64) -> u64 {
    len.div_ceil(PAGE_SIZE)
}

/// `len` rounded up to whole pages, in bytes; saturates at the last page.
pub const fn page_align_up(len: u64) -> u64 {
    pages_for(len).saturating_mul(PAGE_SIZE)
}

/// A number of bytes as people write it: `4096`, `64KiB`, `1.5GiB`, `100MB`.
///
/// Binary suffixes are `K KiB M MiB G GiB T TiB`, decimal ones `kB KB MB GB TB`,
/// a bare number or `B` means bytes; case matters only between `k` and `K`, which
/// mean the same. Printed with the largest binary unit that keeps it exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A size that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// The number in front of the unit is missing or is not a number.
    #[error("no number in the size; write for example 4096, 64KiB or 1.5GiB")]
    Number,
    /// The unit behind the number is not known.
    #[error("unknown unit in the size; use B, KiB, MiB, GiB, TiB, or kB, MB, GB, TB")]
    Unit,
    /// The size is not a whole number of bytes or does not fit in 64 bits.
    #[error("the size is not a whole number of bytes below 16 EiB")]
    Range,
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let text = text.trim();
        let split = text
            .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit: u64 = match unit.trim() {
            "" | "B" | "b" => 1,
            "K" | "k" | "KiB" | "kiB" => KIB,
            "M" | "MiB" => MIB,
            "G" | "GiB" => GIB,
            "T" | "TiB" => GIB << 10,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(ParseSizeError::Unit),
        };
        let number = number.replace('_', "");
        let (whole, fraction) = number.split_once('.').unwrap_or((&number, ""));
        if whole.is_empty()
            || fraction.contains('.')
            || (number.contains('.') && fraction.is_empty())
        {
            return Err(ParseSizeError::Number);
        }
        let scale = match u32::try_from(fraction.len())
            .ok()
            .and_then(|n| 10u128.checked_pow(n))
        {
            Some(scale) if fraction.len() <= 18 => scale,
            _ => return Err(ParseSizeError::Range),
        };
        let whole: u64 = whole.parse().map_err(|_| ParseSizeError::Range)?;
        let fraction: u128 = if fraction.is_empty() {
            0
        } else {
            fraction.parse().map_err(|_| ParseSizeError::Number)?
        };
        let scaled = (u128::from(whole) * scale + fraction) * u128::from(unit);
        if !scaled.is_multiple_of(scale) {
            return Err(ParseSizeError::Range);
        }
        u64::try_from(scaled / scale)
            .map(ByteSize)
            .map_err(|_| ParseSizeError::Range)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = [(GIB << 10, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")]
            .into_iter()
            .find(|(unit, _)| self.0 >= *unit && self.0.is_multiple_of(*unit))
            .unwrap_or((1, "B"));
        write!(f, "{} {name}", self.0 / unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_at_the_edges() {
        assert_eq!(checked_range(0, 0, 0), Ok(0..0));
        assert_eq!(checked_range(4, 4, 8), Ok(4..8));
        assert!(checked_range(5, 4, 8).is_err());
        assert!(checked_range(u64::MAX, 1, u64::MAX).is_err());
        assert!(checked_range(u64::MAX, 0, u64::MAX).is_ok());
    }

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64KiB", 64 * KIB),
            ("64k", 64 * KIB),
            ("1.5GiB", 3 * GIB / 2),
            ("100MB", 100_000_000),
            (" 2 M ", 2 * MIB),
            ("1_000", 1000),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in [
            "",
            "KiB",
            "-1",
            "1.5",
            "1.",
            "12XB",
            "17000000T",
            "1.2.3K",
            "0x10",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(ByteSize(3 * GIB / 2).to_string(), "1536 MiB");
    }
}
