//! What the client fills in, what the server makes of it, and whether the client got
//! that back. The peers under `tools/peers` are built with this same file.

use std::str::FromStr;

/// Changes every byte of the words it is exclusive-ored with.
const MASK: u64 = 0xA5A5_A5A5_A5A5_A5A5;
const WORDS_PER_LINE: usize = 8;

/// What the server does to a request in order to make the response of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// Nothing: the response is the request.
    Nothing,
    /// The first word changes.
    One,
    /// The first word of each cache line changes.
    Lines,
    /// Every byte changes.
    Bytes,
    /// A Gaussian blur of an RGB image of [`WIDTH`] pixels a row.
    Blur,
}

/// Pixels in a row of the image that is blurred.
pub(crate) const WIDTH: usize = 1024;
const ROW_BYTES: usize = 3 * WIDTH;

impl Touch {
    /// The name that [`FromStr`] takes.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::One => "one",
            Self::Lines => "lines",
            Self::Bytes => "bytes",
            Self::Blur => "blur",
        }
    }

    /// Changes a payload in place.
    #[inline]
    pub(crate) fn apply(self, words: &mut [u64]) {
        match self {
            Self::Nothing => {}
            Self::One => words.iter_mut().take(1).for_each(|word| *word ^= MASK),
            Self::Lines => words
                .iter_mut()
                .step_by(WORDS_PER_LINE)
                .for_each(|word| *word ^= MASK),
            Self::Bytes => words.iter_mut().for_each(|word| *word ^= MASK),
            Self::Blur => blur(bytes_of_mut(words)),
        }
    }

    /// As [`Touch::apply`], and one piece of code wherever it is called from: else each
    /// side is compiled in its own way, which makes up to twice the time of a large payload.
    #[inline(never)]
    pub(crate) fn apply_to_all(self, words: &mut [u64]) {
        self.apply(words);
    }

    /// Writes the response for `request` elsewhere, reading it once.
    #[inline]
    pub(crate) fn apply_to(self, request: &[u64], response: &mut [u64]) {
        match self {
            Self::Bytes => {
                for (to, from) in response.iter_mut().zip(request) {
                    *to = from ^ MASK;
                }
            }
            Self::Blur => blur_to(bytes_of(request), bytes_of_mut(response)),
            Self::Nothing | Self::One | Self::Lines => {
                response.copy_from_slice(request);
                self.apply(response);
            }
        }
    }

    /// Whether `words` are the response to request number `seq`.
    #[inline]
    pub(crate) fn is_answer(self, words: &[u64], seq: u64) -> bool {
        let wrong = |at: usize, mask: u64, word: u64| (word ^ mask) ^ pattern(seq, at);
        let mut bits = 0;
        match self {
            Self::Nothing => {
                for (at, word) in words.iter().enumerate() {
                    bits |= wrong(at, 0, *word);
                }
            }
            Self::Bytes => {
                for (at, word) in words.iter().enumerate() {
                    bits |= wrong(at, MASK, *word);
                }
            }
            Self::One | Self::Lines => {
                for (at, word) in words.iter().enumerate() {
                    let changed = at == 0 || (self == Self::Lines && at % WORDS_PER_LINE == 0);
                    bits |= wrong(at, if changed { MASK } else { 0 }, *word);
                }
            }
            Self::Blur => {
                let mut expected = vec![0; words.len()];
                fill(&mut expected, seq);
                blur(bytes_of_mut(&mut expected));
                bits = u64::from(expected != words);
            }
        }
        bits == 0
    }
}

impl FromStr for Touch {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        use Touch::{Blur, Bytes, Lines, Nothing, One};
        [Nothing, One, Lines, Bytes, Blur]
            .into_iter()
            .find(|touch| touch.name() == name)
            .ok_or_else(|| format!("no such touch: {name}"))
    }
}

/// Word number `at` of request number `seq`.
#[inline]
fn pattern(seq: u64, at: usize) -> u64 {
    seq.wrapping_add((at as u64) << 32)
}

/// Fills a request.
#[inline]
pub(crate) fn fill(words: &mut [u64], seq: u64) {
    for (at, word) in words.iter_mut().enumerate() {
        *word = pattern(seq, at);
    }
}

fn bytes_of(words: &[u64]) -> &[u8] {
    // SAFETY: required: as many valid bytes, for as long. They are those of the
    // slice; any bytes are bytes, and they need no alignment.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

fn bytes_of_mut(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: as for `bytes_of`, borrowed exclusively; any bytes are words.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

/// One row of a 3 x 3 binomial blur of the three rows around it.
fn blur_row(rows: [&[u8]; 3], out: &mut [u8]) {
    let mut sums = [0u16; ROW_BYTES + 6];
    let [above, row, below] = rows.map(|row| &row[..ROW_BYTES]);
    for at in 0..ROW_BYTES {
        sums[at + 3] = u16::from(above[at]) + 2 * u16::from(row[at]) + u16::from(below[at]);
    }
    for channel in 0..3 {
        sums[channel] = sums[channel + 3];
        sums[ROW_BYTES + 3 + channel] = sums[ROW_BYTES + channel];
    }
    for (at, out) in out[..ROW_BYTES].iter_mut().enumerate() {
        *out = ((sums[at] + 2 * sums[at + 3] + sums[at + 6] + 8) >> 4) as u8;
    }
}

/// Blurs an image in place, with two rows of it aside.
fn blur(image: &mut [u8]) {
    let rows = image.len() / ROW_BYTES;
    let mut above = image[..ROW_BYTES].to_vec();
    let mut row = above.clone();
    for at in 0..rows {
        let (done, rest) = image.split_at_mut((at + 1) * ROW_BYTES);
        let here = &mut done[at * ROW_BYTES..];
        row.copy_from_slice(here);
        let below = rest.get(..ROW_BYTES).unwrap_or(&row);
        blur_row([&above, &row, below], here);
        std::mem::swap(&mut above, &mut row);
    }
}

/// Blurs an image into another place.
fn blur_to(image: &[u8], out: &mut [u8]) {
    let rows = image.len() / ROW_BYTES;
    let row = |at: usize| &image[at * ROW_BYTES..][..ROW_BYTES];
    for (at, out) in out.chunks_exact_mut(ROW_BYTES).take(rows).enumerate() {
        let around = [
            row(at.saturating_sub(1)),
            row(at),
            row((at + 1).min(rows - 1)),
        ];
        blur_row(around, out);
    }
}
