//! The data of options, taken apart. Lengths in it are compared with what is there before
//! they are used; the whole of it has been bounded by its caller.

use crate::limits::{MAX_NBD_QUERIES, MAX_NBD_TEXT};

/// Data that does not have the form of its option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Misformed;

/// What is left of an option's data.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Misformed> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Misformed)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, Misformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, Misformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// A text behind its length.
    fn text(&mut self) -> Result<&'a [u8], Misformed> {
        let len = self.u32()?;
        if u64::from(len) > MAX_NBD_TEXT {
            return Err(Misformed);
        }
        let (text, rest) = self.0.split_at_checked(len as usize).ok_or(Misformed)?;
        self.0 = rest;
        Ok(text)
    }

    fn end(&self) -> Result<(), Misformed> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Misformed)
        }
    }
}

/// INFO and GO: the export and the pieces of information that are wanted of it.
#[derive(Debug)]
pub(super) struct Chosen<'a> {
    pub(super) name: &'a [u8],
    wanted: &'a [u8],
}

impl<'a> Chosen<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Misformed> {
        let mut rest = Rest(data);
        let name = rest.text()?;
        let count = rest.u16()?;
        let wanted = rest.0;
        if wanted.len() != 2 * usize::from(count) {
            return Err(Misformed);
        }
        Ok(Self { name, wanted })
    }

    pub(super) fn wants(&self, info: u16) -> bool {
        self.wanted
            .chunks_exact(2)
            .any(|pair| pair == info.to_be_bytes())
    }
}

/// LIST_META_CONTEXT and SET_META_CONTEXT: the export and the queries.
#[derive(Debug)]
pub(super) struct Queries<'a> {
    pub(super) name: &'a [u8],
    pub(super) queries: Vec<&'a [u8]>,
}

impl<'a> Queries<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Misformed> {
        let mut rest = Rest(data);
        let name = rest.text()?;
        let count = rest.u32()?;
        if u64::from(count) > MAX_NBD_QUERIES {
            return Err(Misformed);
        }
        let queries = (0..count).map(|_| rest.text()).collect::<Result<_, _>>()?;
        rest.end()?;
        Ok(Self { name, queries })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_be_bytes(), bytes].concat()
    }

    #[test]
    fn a_choice_is_exactly_as_long_as_it_says() {
        let whole = [text(b"all"), vec![0, 2, 0, 3, 0, 1]].concat();
        let chosen = Chosen::parse(&whole).expect("well-formed");
        assert_eq!(chosen.name, b"all");
        assert!(chosen.wants(3) && chosen.wants(1) && !chosen.wants(0));
        for len in 0..whole.len() {
            assert!(Chosen::parse(&whole[..len]).is_err(), "{len} bytes");
        }
        assert!(Chosen::parse(&[whole.clone(), vec![0]].concat()).is_err());
        let long = [text(&[b'x'; 4097]), vec![0, 0]].concat();
        assert!(Chosen::parse(&long).is_err());
    }

    #[test]
    fn queries_are_bounded() {
        let whole = [text(b""), vec![0, 0, 0, 2], text(b"base:"), text(b"x")].concat();
        let asked = Queries::parse(&whole).expect("well-formed");
        assert_eq!(asked.queries, [&b"base:"[..], b"x"]);
        for len in 0..whole.len() {
            assert!(Queries::parse(&whole[..len]).is_err(), "{len} bytes");
        }
        let many = [text(b""), u32::MAX.to_be_bytes().to_vec()].concat();
        assert!(Queries::parse(&many).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Chosen::parse(&data);
            let _ = Queries::parse(&data);
        }
    }
}
