//! Images as the channel's `blur` takes them: binary PPM, changed row by row.
//!
//! ```text
//! P6 <width> <height> 255\n  r g b r g b ...      rows from the top, 3 bytes a pixel
//! ```
//!
//! Source: the PPM format definition of Netpbm (`ppm(5)`): fields separated by white
//! space, `#` begins a comment up to the end of its line, one single white-space byte
//! before the pixels.
//!
//! The blur is separable and works in place: a row is read once, filtered along
//! itself, kept in a ring of `2 * radius + 1` rows, and written when the last row that
//! its result needs has been read. So it takes memory for that many rows, not for an
//! image, and rows above the one being written are never read again.
//!
//! I1. The weights are 16-bit fractions that sum to exactly 1, so that an even area
//!     stays as it is.
//! I2. Beyond an edge the edge's own pixel goes on.

/// Longest header that is looked at, comments included.
pub(super) const MAX_HEADER_BYTES: usize = 1024;
/// Greatest width and height.
const MAX_SIDE: u32 = 65_535;
/// Sum of the weights: 1 as a fraction of 16 bits.
const ONE: u32 = 1 << 16;
/// Greatest standard deviation of a blur, in pixels.
pub(super) const MAX_SIGMA: f32 = 20.0;
/// Bytes of a pixel.
const PIXEL: usize = 3;

/// An image that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ImageError {
    /// The first two bytes are not `P6`.
    #[error("not a binary PPM image (it does not begin with P6)")]
    NotPpm,
    /// Width, height or the greatest value is missing, or the header does not end.
    #[error("the PPM header is incomplete or holds something else than numbers")]
    Header,
    /// Samples that are not bytes.
    #[error("the PPM image has a greatest value other than 255")]
    Depth,
    /// A side is 0 or too long.
    #[error("a side of the PPM image is 0 or longer than {MAX_SIDE} pixels")]
    Side,
    /// Less pixels than the header says.
    #[error("the PPM image ends before its last pixel")]
    Truncated,
}

/// A checked header: all rows lie within the bytes it was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PpmHeader {
    /// Pixels of a row.
    pub(super) width: usize,
    /// Rows.
    pub(super) height: usize,
    /// Where the first row begins.
    pub(super) pixels_at: usize,
}

impl PpmHeader {
    /// Reads the header from the first bytes (up to [`MAX_HEADER_BYTES`]) of an image
    /// of `len` bytes.
    pub(super) fn parse(head: &[u8], len: usize) -> Result<Self, ImageError> {
        let mut rest = head.strip_prefix(b"P6").ok_or(ImageError::NotPpm)?;
        let mut numbers = [0; 3];
        for number in &mut numbers {
            let (value, after) = next_number(rest)?;
            (*number, rest) = (value, after);
        }
        let [width, height, greatest] = numbers;
        let (&separator, pixels) = rest.split_first().ok_or(ImageError::Header)?;
        if !separator.is_ascii_whitespace() {
            return Err(ImageError::Header);
        }
        if greatest != 255 {
            return Err(ImageError::Depth);
        }
        let sides = 1..=MAX_SIDE;
        if !sides.contains(&width) || !sides.contains(&height) {
            return Err(ImageError::Side);
        }
        let header = PpmHeader {
            width: width as usize,
            height: height as usize,
            pixels_at: head.len() - pixels.len(),
        };
        // At most 13 * 10^9: far from overflow.
        let needed = header.height * header.row_bytes() + header.pixels_at;
        if needed > len {
            return Err(ImageError::Truncated);
        }
        Ok(header)
    }

    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        self.width * PIXEL
    }

    /// Where row `y` begins.
    pub(super) fn row_at(&self, y: usize) -> usize {
        self.pixels_at + y * self.row_bytes()
    }
}

/// The next number and what follows it; white space and comments before it are skipped.
fn next_number(mut text: &[u8]) -> Result<(u32, &[u8]), ImageError> {
    loop {
        match text.first() {
            Some(b'#') => {
                let end = text.iter().position(|byte| *byte == b'\n');
                text = &text[end.ok_or(ImageError::Header)?..];
            }
            Some(byte) if byte.is_ascii_whitespace() => text = &text[1..],
            _ => break,
        }
    }
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    // Ten digits may be too many for 32 bits; then it is no side of an image either.
    let number = std::str::from_utf8(&text[..digits])
        .ok()
        .and_then(|digits| digits.parse().ok());
    Ok((number.ok_or(ImageError::Header)?, &text[digits..]))
}

/// A Gaussian blur: its weights, and room for the rows it works on.
#[derive(Clone, Debug)]
pub(super) struct Blur {
    /// From the furthest pixel on one side to the furthest on the other.
    weights: Vec<u32>,
    /// One row as read, with the edge's pixels repeated on both sides.
    padded: Vec<u8>,
    sums: Vec<u32>,
    /// Rows filtered along themselves, 8 bits before the point and 8 behind it; row y
    /// lies in slot y % (number of weights).
    ring: Vec<u16>,
    row: Vec<u8>,
}

impl Blur {
    /// A blur with a standard deviation of `sigma` pixels, 0 < `sigma` <= [`MAX_SIGMA`];
    /// it looks three deviations far.
    pub(super) fn new(sigma: f32) -> Blur {
        let sigma = f64::from(sigma.clamp(0.01, MAX_SIGMA));
        let radius = (3.0 * sigma).ceil() as i32;
        let bell: Vec<f64> = (-radius..=radius)
            .map(|x| (-f64::from(x * x) / (2.0 * sigma * sigma)).exp())
            .collect();
        let total: f64 = bell.iter().sum();
        let mut weights: Vec<u32> = bell
            .iter()
            .map(|value| (value / total * f64::from(ONE)).round() as u32)
            .collect();
        // What rounding took or gave goes to the middle, the greatest of them.
        let others = weights.iter().sum::<u32>() - weights[radius as usize];
        weights[radius as usize] = ONE - others;
        Blur {
            weights,
            padded: Vec::new(),
            sums: Vec::new(),
            ring: Vec::new(),
            row: Vec::new(),
        }
    }

    fn radius(&self) -> usize {
        self.weights.len() / 2
    }

    /// Blurs an image in place through two closures that read and write row `y`.
    pub(super) fn apply<E>(
        &mut self,
        header: &PpmHeader,
        mut read: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
        mut write: impl FnMut(usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (width, radius) = (header.row_bytes(), self.radius());
        self.padded.resize(width + 2 * radius * PIXEL, 0);
        self.sums.resize(width, 0);
        self.row.resize(width, 0);
        self.ring.resize(self.weights.len() * width, 0);
        let last = header.height - 1;
        let mut next = 0;
        for y in 0..header.height {
            while next <= (y + radius).min(last) {
                let inner = radius * PIXEL..radius * PIXEL + width;
                read(next, &mut self.padded[inner])?;
                self.filter_along(next);
                next += 1;
            }
            self.filter_across(y, last);
            write(y, &self.row)?;
        }
        Ok(())
    }

    /// Filters the row just read and puts it into its slot of the ring.
    fn filter_along(&mut self, y: usize) {
        let (width, edge) = (self.sums.len(), self.radius() * PIXEL);
        let (first, rest) = self.padded.split_at_mut(edge);
        for pixel in first.chunks_exact_mut(PIXEL) {
            pixel.copy_from_slice(&rest[..PIXEL]);
        }
        let (inner, after) = rest.split_at_mut(width);
        for pixel in after.chunks_exact_mut(PIXEL) {
            pixel.copy_from_slice(&inner[width - PIXEL..]);
        }
        self.sums.fill(1 << 7);
        for (tap, weight) in self.weights.iter().enumerate() {
            let from = &self.padded[tap * PIXEL..][..width];
            for (sum, value) in self.sums.iter_mut().zip(from) {
                *sum += weight * u32::from(*value);
            }
        }
        let slot = y % self.weights.len();
        let filtered = &mut self.ring[slot * width..][..width];
        for (out, sum) in filtered.iter_mut().zip(&self.sums) {
            *out = (sum >> 8) as u16;
        }
    }

    /// Filters the ring's rows around `y` into [`Self::row`].
    fn filter_across(&mut self, y: usize, last: usize) {
        let (width, radius) = (self.sums.len(), self.radius());
        self.sums.fill(1 << 23);
        for (tap, weight) in self.weights.iter().enumerate() {
            let from = (y + tap).saturating_sub(radius).min(last);
            let slot = from % self.weights.len();
            let row = &self.ring[slot * width..][..width];
            for (sum, value) in self.sums.iter_mut().zip(row) {
                // At most 65,280 * 65,536 + 2^23, which 32 bits hold.
                *sum += weight * u32::from(*value);
            }
        }
        for (out, sum) in self.row.iter_mut().zip(&self.sums) {
            *out = (sum >> 24) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    fn parse(text: &[u8]) -> Result<PpmHeader, ImageError> {
        PpmHeader::parse(&text[..text.len().min(MAX_HEADER_BYTES)], text.len())
    }

    /// Both dimensions at once, in floating point, from the definition.
    fn naive(pixels: &[u8], width: usize, height: usize, sigma: f64) -> Vec<u8> {
        let radius = (3.0 * sigma).ceil() as i64;
        let bell = |x: i64| (-((x * x) as f64) / (2.0 * sigma * sigma)).exp();
        let total: f64 = (-radius..=radius).map(bell).sum();
        let at = |x: i64, y: i64, c: usize| {
            let x = x.clamp(0, width as i64 - 1) as usize;
            let y = y.clamp(0, height as i64 - 1) as usize;
            f64::from(pixels[(y * width + x) * PIXEL + c])
        };
        let mut out = Vec::with_capacity(pixels.len());
        for y in 0..height as i64 {
            for x in 0..width as i64 {
                for c in 0..PIXEL {
                    let mut sum = 0.0;
                    for dy in -radius..=radius {
                        for dx in -radius..=radius {
                            sum += bell(dx) * bell(dy) * at(x + dx, y + dy, c);
                        }
                    }
                    out.push((sum / (total * total)).round() as u8);
                }
            }
        }
        out
    }

    fn blurred(pixels: &[u8], width: usize, height: usize, blur: &mut Blur) -> Vec<u8> {
        let header = PpmHeader {
            width,
            height,
            pixels_at: 0,
        };
        let image = std::cell::RefCell::new(pixels.to_vec());
        let row = header.row_bytes();
        let done: Result<(), Infallible> = blur.apply(
            &header,
            |y, out| {
                out.copy_from_slice(&image.borrow()[y * row..][..row]);
                Ok(())
            },
            |y, bytes| {
                image.borrow_mut()[y * row..][..row].copy_from_slice(bytes);
                Ok(())
            },
        );
        done.expect("memory does not fail");
        image.into_inner()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn as_the_naive_blur_within_one_level(
            width in 1usize..24,
            height in 1usize..24,
            sigma in 0.3f32..4.0,
            seed in any::<u64>(),
        ) {
            let mut state = seed | 1;
            let pixels: Vec<u8> = (0..width * height * PIXEL)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 56) as u8
                })
                .collect();
            let mut blur = Blur::new(sigma);
            let found = blurred(&pixels, width, height, &mut blur);
            let expected = naive(&pixels, width, height, f64::from(sigma));
            for (found, expected) in found.iter().zip(&expected) {
                prop_assert!(found.abs_diff(*expected) <= 1, "{found} {expected}");
            }
            // The same one again, for another size: nothing of the first is left in it.
            let tall = blurred(&pixels, 1, width * height, &mut blur);
            prop_assert_eq!(tall, blurred(&pixels, 1, width * height, &mut Blur::new(sigma)));
        }
    }

    #[test]
    fn an_even_area_stays_as_it_is() {
        for level in [0, 1, 127, 254, 255] {
            for sigma in [0.1, 2.0, MAX_SIGMA] {
                let pixels = vec![level; 40 * 7 * PIXEL];
                assert_eq!(blurred(&pixels, 40, 7, &mut Blur::new(sigma)), pixels);
            }
        }
    }

    #[test]
    fn a_point_becomes_a_bell() {
        let mut pixels = vec![0; 31 * 31 * PIXEL];
        pixels[(15 * 31 + 15) * PIXEL] = 255;
        let out = blurred(&pixels, 31, 31, &mut Blur::new(1.0));
        let red = |x: usize, y: usize| out[(y * 31 + x) * PIXEL];
        // 255 / (2 pi), and exp(-1/2) of it one pixel aside.
        assert_eq!((red(15, 15), red(14, 15), red(15, 16)), (41, 25, 25));
        assert_eq!((red(5, 15), out[(15 * 31 + 15) * PIXEL + 1]), (0, 0));
    }

    #[test]
    fn headers_as_they_are_written() {
        for (text, width, height, pixels_at) in [
            (&b"P6\n2 1\n255\n......"[..], 2, 1, 11),
            (b"P6 2 1 255 ......", 2, 1, 11),
            (b"P6#c\n# d\n1\t2#e\n255\r......", 1, 2, 19),
            (b"P6\n1 1\n255\n#..", 1, 1, 11),
        ] {
            let header = parse(text).expect("a header");
            assert_eq!((header.width, header.height), (width, height));
            assert_eq!(header.pixels_at, pixels_at);
            assert_eq!(header.row_at(header.height), pixels_at + width * height * 3);
        }
        for (text, error) in [
            (&b""[..], ImageError::NotPpm),
            (b"P5 1 1 255 ...", ImageError::NotPpm),
            (b"P6", ImageError::Header),
            (b"P6 1 1 255", ImageError::Header),
            (b"P6 1 1 255x...", ImageError::Header),
            (b"P6 -1 1 255 ...", ImageError::Header),
            (b"P6 99999999999 1 255 ...", ImageError::Header),
            (b"P6 # no end", ImageError::Header),
            (b"P6 1 1 65535 ......", ImageError::Depth),
            (b"P6 0 1 255 ", ImageError::Side),
            (b"P6 1 65536 255 ", ImageError::Side),
            (b"P6 1 1 255 ..", ImageError::Truncated),
            (b"P6 65535 65535 255 ..", ImageError::Truncated),
        ] {
            let shown = String::from_utf8_lossy(text);
            assert_eq!(parse(text), Err(error), "{shown}");
        }
        let long = [b"P6 #", &[b'x'; MAX_HEADER_BYTES][..], b"\n1 1 255 ..."].concat();
        assert_eq!(parse(&long), Err(ImageError::Header));
    }
}
