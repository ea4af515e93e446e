//! What `channel serve` does to a request, where it lies.
//!
//! I1. An operation never makes a request longer, so that its response fits its place.
//! I2. Shared memory is read and written in pieces of this process's own: what a client
//!     changes meanwhile changes pixels, never what is computed with.

use std::cell::RefCell;

use clap::ValueEnum;

use super::image::{Blur, ImageError, MAX_HEADER_BYTES, PpmHeader};

/// What `xor` combines each byte with.
const XOR_KEY: u8 = 0x5A;
/// Bytes that are changed at a time; fits the first-level cache.
const PIECE: usize = 16 * 1024;

/// The built-in operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OperationKind {
    /// Leaves the request as it is
    Echo,
    /// Combines each byte with 0x5A
    Xor,
    /// Turns a-z into A-Z
    Upper,
    /// Blurs a binary PPM image
    Blur,
}

impl OperationKind {
    /// As on the command line and in a server's status.
    pub(super) fn word(self) -> &'static str {
        match self {
            OperationKind::Echo => "echo",
            OperationKind::Xor => "xor",
            OperationKind::Upper => "upper",
            OperationKind::Blur => "blur",
        }
    }
}

/// The bytes of a request that an operation changes.
pub(super) trait Place {
    /// Why a range cannot be reached.
    type Error;

    /// Number of bytes.
    fn len(&self) -> usize;
    /// Copies out.
    fn read(&self, at: usize, out: &mut [u8]) -> Result<(), Self::Error>;
    /// Copies in.
    fn write(&self, at: usize, bytes: &[u8]) -> Result<(), Self::Error>;
}

/// An operation that did not succeed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OperationError<E> {
    /// The request is no image that can be blurred.
    Image(ImageError),
    /// The place failed.
    Place(E),
}

/// An operation with its parameters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) kind: OperationKind,
    /// Standard deviation of the blur, in pixels.
    pub(super) sigma: f32,
}

thread_local! {
    /// A worker's own blur, so that its rows are reserved once.
    static BLUR: RefCell<Option<(f32, Blur)>> = const { RefCell::new(None) };
}

impl Operation {
    /// Changes what lies in `place`.
    pub(super) fn apply<P: Place>(&self, place: &P) -> Result<(), OperationError<P::Error>> {
        match self.kind {
            OperationKind::Echo => Ok(()),
            OperationKind::Xor => in_pieces(place, |byte| *byte ^= XOR_KEY),
            OperationKind::Upper => in_pieces(place, |byte| byte.make_ascii_uppercase()),
            OperationKind::Blur => self.blur(place),
        }
    }

    fn blur<P: Place>(&self, place: &P) -> Result<(), OperationError<P::Error>> {
        let mut head = [0; MAX_HEADER_BYTES];
        let head = &mut head[..place.len().min(MAX_HEADER_BYTES)];
        place.read(0, head).map_err(OperationError::Place)?;
        let header = PpmHeader::parse(head, place.len()).map_err(OperationError::Image)?;
        BLUR.with_borrow_mut(|kept| {
            let (_, blur) = match kept {
                Some(kept) if kept.0 == self.sigma => kept,
                _ => kept.insert((self.sigma, Blur::new(self.sigma))),
            };
            blur.apply(
                &header,
                |y, row| place.read(header.row_at(y), row),
                |y, row| place.write(header.row_at(y), row),
            )
        })
        .map_err(OperationError::Place)
    }
}

fn in_pieces<P: Place>(
    place: &P,
    change: impl Fn(&mut u8),
) -> Result<(), OperationError<P::Error>> {
    let mut piece = [0; PIECE];
    let len = place.len();
    for at in (0..len).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(len - at)];
        place.read(at, piece).map_err(OperationError::Place)?;
        piece.iter_mut().for_each(&change);
        place.write(at, piece).map_err(OperationError::Place)?;
    }
    Ok(())
}

/// Codes of a failed image in a frame's error word, among those that programs give a
/// meaning to.
const IMAGE_ERRORS: [(u32, ImageError); 5] = [
    (0x101, ImageError::NotPpm),
    (0x102, ImageError::Header),
    (0x103, ImageError::Depth),
    (0x104, ImageError::Side),
    (0x105, ImageError::Truncated),
];

/// The code that a client is told.
pub(super) fn code_of(error: ImageError) -> u32 {
    let found = IMAGE_ERRORS.iter().find(|(_, known)| *known == error);
    found.map_or(0, |(code, _)| *code)
}

/// What a code says.
pub(super) fn error_of(code: u32) -> Option<ImageError> {
    let found = IMAGE_ERRORS.iter().find(|(known, _)| *known == code);
    found.map(|(_, error)| *error)
}

/// Bytes of this process.
pub(super) struct OwnBytes(pub(super) RefCell<Vec<u8>>);

impl Place for OwnBytes {
    type Error = std::convert::Infallible;

    fn len(&self) -> usize {
        self.0.borrow().len()
    }

    fn read(&self, at: usize, out: &mut [u8]) -> Result<(), Self::Error> {
        out.copy_from_slice(&self.0.borrow()[at..at + out.len()]);
        Ok(())
    }

    fn write(&self, at: usize, bytes: &[u8]) -> Result<(), Self::Error> {
        self.0.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(kind: OperationKind, bytes: &[u8]) -> Result<Vec<u8>, ImageError> {
        let place = OwnBytes(RefCell::new(bytes.to_vec()));
        let sigma = 2.0;
        match (Operation { kind, sigma }).apply(&place) {
            Ok(()) => Ok(place.0.into_inner()),
            Err(OperationError::Image(error)) => Err(error),
            Err(OperationError::Place(never)) => match never {},
        }
    }

    #[test]
    fn bytes_are_changed_to_the_last() {
        let long: Vec<u8> = (0..PIECE * 2 + 3).map(|i| i as u8).collect();
        for bytes in [&b""[..], b"Hello, \xC3\xBC", &long] {
            assert_eq!(done(OperationKind::Echo, bytes).as_deref(), Ok(bytes));
            let once = done(OperationKind::Xor, bytes).expect("no image needed");
            assert!(once.iter().zip(bytes).all(|(a, b)| *a == b ^ 0x5A));
            let twice = done(OperationKind::Xor, &once);
            assert_eq!(twice.as_deref(), Ok(bytes));
            let upper = done(OperationKind::Upper, bytes);
            assert_eq!(upper, Ok(bytes.to_ascii_uppercase()));
        }
    }

    #[test]
    fn an_image_is_blurred_behind_its_header_only() {
        let mut image = b"P6 3 1 255\n".to_vec();
        image.extend([0, 0, 0, 255, 255, 255, 0, 0, 0]);
        image.extend(b"trailer");
        let out = done(OperationKind::Blur, &image).expect("an image");
        assert_eq!((&out[..11], &out[20..]), (&image[..11], &image[20..]));
        assert!(out[11] > 0 && out[14] < 255, "{out:?}");
        for (bytes, error) in [
            (&b""[..], ImageError::NotPpm),
            (b"\xFF\xD8\xFF\xE0 JFIF", ImageError::NotPpm),
            (b"P6 2 2 255 ..", ImageError::Truncated),
        ] {
            assert_eq!(done(OperationKind::Blur, bytes), Err(error));
        }
    }

    #[test]
    fn each_image_error_has_a_code_of_its_own() {
        for (code, error) in IMAGE_ERRORS {
            assert_eq!((code_of(error), error_of(code)), (code, Some(error)));
        }
        assert_eq!(error_of(0), None);
    }
}
