//! What all sides do: bursts of reads or writes at scattered places, counted over a time.

use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::harness::{Options, scattered};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of a segment, and of the string that Redis has.
pub(crate) const SEGMENT: u64 = 32 << 20;

/// Which socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    Tcp,
    Unix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Read,
    Write,
}

/// One kind of work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) what: What,
    pub(crate) len: usize,
    /// Operations that are sent before the first reply is waited for.
    pub(crate) depth: usize,
}

/// Somebody who does it: all of a burst is sent, then all of it is waited for.
pub(crate) trait Side {
    fn burst(&mut self, shape: Shape, offsets: &[u64]) -> anyhow::Result<()>;
}

/// The eight bytes at `offset`, a multiple of 8: each place has its own.
pub(crate) fn word(offset: u64) -> [u8; 8] {
    offset.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()
}

/// The bytes at `offset ..`.
pub(crate) fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (0..len as u64 / 8)
        .flat_map(|at| word(offset + 8 * at))
        .collect()
}

/// The first and the last word are those of the place.
pub(crate) fn check(offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
    let last = bytes.len() - 8;
    let whole = bytes[..8] == word(offset) && bytes[last..] == word(offset + last as u64);
    ensure!(whole, "other bytes at {offset} than were written");
    Ok(())
}

/// Bursts of one shape, place after place.
pub(crate) struct Bursts {
    shape: Shape,
    places: Vec<u64>,
    next: usize,
    time: Duration,
    offsets: Vec<u64>,
}

impl Bursts {
    pub(crate) fn new(options: &Options, shape: Shape) -> Self {
        let count = SEGMENT / shape.len as u64;
        let places = scattered(count.min(1 << 16));
        let stride = shape.len as u64;
        Self {
            shape,
            places: places.into_iter().map(|place| place * stride).collect(),
            next: 0,
            time: Duration::from_millis(options.pick(15, 120)),
            offsets: Vec::with_capacity(shape.depth),
        }
    }

    /// Operations per second of one round.
    pub(crate) fn rate(&mut self, side: &mut dyn Side) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let mut done = 0;
        loop {
            // The clock is looked at after some bursts: it is no part of what is measured.
            for _ in 0..16_usize.div_ceil(self.shape.depth) {
                self.offsets.clear();
                for _ in 0..self.shape.depth {
                    self.offsets
                        .push(self.places[self.next % self.places.len()]);
                    self.next += 1;
                }
                side.burst(self.shape, &self.offsets)?;
                done += self.shape.depth;
            }
            let time = begun.elapsed();
            if time >= self.time {
                return Ok(done as f64 / time.as_secs_f64());
            }
        }
    }
}
