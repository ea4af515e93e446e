//! Which server holds which addresses.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::checksum::{self, Digest};
use crate::limits;
use crate::units::{OutOfRange, PAGE_SIZE, checked_range};
use crate::words::RegionName;

/// `HOST:PORT`, where a server is reached; an IPv6 address stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServerAddress {
    /// Name or address of the host; IPv6 addresses without brackets.
    pub host: String,
    /// TCP port, never 0.
    pub port: u16,
}

/// An address that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "write an address as HOST:PORT with a port from 1 to 65535, as in 10.0.0.1:7421 or [::1]:7421"
)]
pub struct ServerAddressError;

impl FromStr for ServerAddress {
    type Err = ServerAddressError;

    fn from_str(text: &str) -> Result<Self, ServerAddressError> {
        let (host, port) = text.rsplit_once(':').ok_or(ServerAddressError)?;
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        let port: u16 = port.parse().map_err(|_| ServerAddressError)?;
        let host = match host.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').ok_or(ServerAddressError)?,
            None if host.contains([':', ']']) => return Err(ServerAddressError),
            None => host,
        };
        let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '[' | ']');
        let long = host.len() as u64 > limits::MAX_HOST_BYTES;
        if port == 0 || !digits || host.is_empty() || long || host.contains(odd) {
            return Err(ServerAddressError);
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') {
            write!(f, "[{host}]:{port}")
        } else {
            write!(f, "{host}:{port}")
        }
    }
}

impl Serialize for ServerAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ServerAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// One server of the space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Its name, by which `serve --server` picks it.
    pub name: RegionName,
    /// Where it is reached.
    pub address: ServerAddress,
}

/// A map that no space can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// k of 0, above the largest region, or no whole number of pages.
    #[error(
        "{size} bytes: a segment is a multiple of {PAGE_SIZE} bytes, from {PAGE_SIZE} to {}",
        limits::MAX_REGION_BYTES
    )]
    SegmentSize {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// N of 0, or more servers than a space has.
    #[error("{count} servers: a space has 1 to {} of them", limits::MAX_SERVERS)]
    Count {
        /// How many were named.
        count: usize,
    },
    /// Two servers with one name.
    #[error("servers {first} and {second} (counted from 0) both have the name {name}")]
    NameTwice {
        /// The name.
        name: RegionName,
        /// Position of the one that had it first.
        first: usize,
        /// Position of the other.
        second: usize,
    },
    /// Two servers at one address.
    #[error("servers {first} and {second} (counted from 0) both have the address {address}")]
    AddressTwice {
        /// The address.
        address: ServerAddress,
        /// Position of the one that had it first.
        first: usize,
        /// Position of the other.
        second: usize,
    },
}

/// Where one byte of the space lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// Position of the server in the file, from 0.
    pub server: usize,
    /// Offset in its segment, in bytes.
    pub offset: u64,
}

/// What one server holds of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Position of the server in the file, from 0.
    pub server: usize,
    /// First byte in its segment.
    pub offset: u64,
    /// The bytes of the caller's buffer, counted from the start of the whole range.
    pub of_range: Range<u64>,
}

/// k and the servers in the order of their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceMap {
    segment_size: u64,
    servers: Box<[Server]>,
}

impl SpaceMap {
    /// A map, if a space can have it.
    ///
    /// # Errors
    /// The first [`MapError`] found.
    pub fn new(segment_size: u64, servers: Vec<Server>) -> Result<Self, MapError> {
        let whole = segment_size.is_multiple_of(PAGE_SIZE);
        if segment_size == 0 || !whole || segment_size > limits::MAX_REGION_BYTES {
            return Err(MapError::SegmentSize { size: segment_size });
        }
        let count = servers.len();
        if count == 0 || count as u64 > limits::MAX_SERVERS {
            return Err(MapError::Count { count });
        }
        for (second, server) in servers.iter().enumerate() {
            let before = || servers[..second].iter();
            if let Some(first) = before().position(|s| s.name == server.name) {
                let name = server.name.clone();
                return Err(MapError::NameTwice {
                    name,
                    first,
                    second,
                });
            }
            if let Some(first) = before().position(|s| s.address == server.address) {
                let address = server.address.clone();
                return Err(MapError::AddressTwice {
                    address,
                    first,
                    second,
                });
            }
        }
        Ok(Self {
            segment_size,
            servers: servers.into(),
        })
    }

    /// Bytes that each server lends: k.
    pub fn segment_size(&self) -> u64 {
        self.segment_size
    }

    /// The servers, in the order of their addresses.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// Bytes of the whole space: N times k. Cannot overflow: both are bounded.
    pub fn size(&self) -> u64 {
        self.segment_size * self.servers.len() as u64
    }

    /// The addresses that the server at position `server` holds.
    ///
    /// # Panics
    /// If there is no such server.
    pub fn addresses(&self, server: usize) -> Range<u64> {
        assert!(server < self.servers.len(), "no server {server}");
        let start = server as u64 * self.segment_size;
        start..start + self.segment_size
    }

    /// Position of the server called `name`.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.servers.iter().position(|s| s.name.as_str() == name)
    }

    /// Where the byte at `address` lives.
    ///
    /// # Errors
    /// [`OutOfRange`] if the space ends at or before it.
    pub fn locate(&self, address: u64) -> Result<Located, OutOfRange> {
        checked_range(address, 1, self.size())?;
        Ok(Located {
            server: (address / self.segment_size) as usize,
            offset: address % self.segment_size,
        })
    }

    /// The parts of `offset .. offset + len`, one for each server that it touches, in
    /// the order of their addresses; none for an empty range.
    ///
    /// # Errors
    /// [`OutOfRange`] if any of it lies beyond the end.
    pub fn split(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<impl Iterator<Item = Part> + use<>, OutOfRange> {
        let range = checked_range(offset, len, self.size())?;
        let k = self.segment_size;
        let mut at = range.start;
        Ok(std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let server = at / k;
            let end = range.end.min((server + 1) * k);
            let part = Part {
                server: server as usize,
                offset: at % k,
                of_range: at - range.start..end - range.start,
            };
            at = end;
            Some(part)
        }))
    }

    /// 128 bits over k, N, names and addresses. Servers and clients compare it, so that
    /// two machines with different maps find out before they touch a byte.
    pub fn digest(&self) -> Digest {
        let mut text = format!("uffd-sync space map 1\n{}\n", self.segment_size);
        for server in &self.servers {
            text.push_str(server.name.as_str());
            text.push(' ');
            text.push_str(&server.address.to_string());
            text.push('\n');
        }
        checksum::digest(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(segment_size: u64, count: usize) -> SpaceMap {
        let server = |at: usize| Server {
            name: format!("s{at}").parse().expect("a name"),
            address: format!("10.0.0.1:{}", 7000 + at)
                .parse()
                .expect("an address"),
        };
        SpaceMap::new(segment_size, (0..count).map(server).collect()).expect("a map")
    }

    #[test]
    fn addresses_are_read_as_they_are_printed() {
        for text in ["10.0.0.1:7421", "[::1]:1", "db.example:65535"] {
            let address: ServerAddress = text.parse().expect(text);
            assert_eq!(address.to_string(), text);
        }
        for text in [
            "",
            "host",
            "host:",
            ":1",
            "host:0",
            "host:65536",
            "host:+1",
            "::1:7",
            "[::1:7",
            "a b:1",
            "tcp://a:1",
            "[]:1",
            "a]:1",
        ] {
            assert!(text.parse::<ServerAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_edges_of_the_space() {
        let map = map(PAGE_SIZE, 3);
        assert_eq!(map.size(), 3 * PAGE_SIZE);
        let last = Located {
            server: 2,
            offset: PAGE_SIZE - 1,
        };
        assert_eq!(map.locate(3 * PAGE_SIZE - 1), Ok(last));
        assert!(map.locate(3 * PAGE_SIZE).is_err());
        assert!(map.locate(u64::MAX).is_err());
        assert!(map.split(u64::MAX, 2).is_err());
        assert!(map.split(1, u64::MAX).is_err());
        assert!(map.split(0, 3 * PAGE_SIZE + 1).is_err());
        assert_eq!(map.split(3 * PAGE_SIZE, 0).expect("empty").count(), 0);
    }

    #[test]
    fn a_range_one_byte_before_on_and_after_a_boundary() {
        let map = map(PAGE_SIZE, 3);
        let parts = |offset, len| -> Vec<_> {
            let split = map.split(offset, len).expect("within");
            split.map(|p| (p.server, p.offset, p.of_range)).collect()
        };
        let k = PAGE_SIZE;
        assert_eq!(parts(k - 1, 1), [(0, k - 1, 0..1)]);
        assert_eq!(parts(k, 1), [(1, 0, 0..1)]);
        assert_eq!(parts(k - 1, 2), [(0, k - 1, 0..1), (1, 0, 1..2)]);
        let three = [(0, k - 1, 0..1), (1, 0, 1..k + 1), (2, 0, k + 1..k + 2)];
        assert_eq!(parts(k - 1, k + 2), three);
    }

    #[test]
    fn a_map_that_cannot_be() {
        let one = |name: &str, address: &str| Server {
            name: name.parse().expect("a name"),
            address: address.parse().expect("an address"),
        };
        for size in [
            0,
            1,
            PAGE_SIZE + 1,
            limits::MAX_REGION_BYTES + PAGE_SIZE,
            u64::MAX,
        ] {
            let error = SpaceMap::new(size, vec![one("a", "h:1")]).expect_err("the size");
            assert_eq!(error, MapError::SegmentSize { size });
        }
        assert_eq!(
            SpaceMap::new(PAGE_SIZE, Vec::new()),
            Err(MapError::Count { count: 0 })
        );
        let many = limits::MAX_SERVERS as usize + 1;
        let servers = (0..many).map(|at| one(&format!("s{at}"), &format!("h{at}:1")));
        assert!(matches!(
            SpaceMap::new(PAGE_SIZE, servers.collect()),
            Err(MapError::Count { count }) if count == many
        ));
        let twice = SpaceMap::new(PAGE_SIZE, vec![one("a", "h:1"), one("a", "h:2")]);
        assert!(matches!(twice, Err(MapError::NameTwice { second: 1, .. })));
        let twice = SpaceMap::new(PAGE_SIZE, vec![one("a", "h:1"), one("b", "h:1")]);
        assert!(matches!(
            twice,
            Err(MapError::AddressTwice { first: 0, .. })
        ));
    }

    #[test]
    fn the_digest_is_that_of_the_map() {
        let base = map(PAGE_SIZE, 2);
        assert_eq!(base.digest(), map(PAGE_SIZE, 2).digest());
        assert_ne!(base.digest(), map(2 * PAGE_SIZE, 2).digest());
        assert_ne!(base.digest(), map(PAGE_SIZE, 3).digest());
        let mut swapped = base.servers().to_vec();
        swapped.reverse();
        let swapped = SpaceMap::new(PAGE_SIZE, swapped).expect("a map");
        assert_ne!(base.digest(), swapped.digest());
    }

    proptest! {
        /// Byte by byte, the parts are what `locate` says.
        #[test]
        fn a_split_is_what_locating_each_byte_gives(
            pages in 1u64..3,
            count in 1usize..5,
            offset in 0u64..40_000,
            len in 0u64..40_000,
        ) {
            let map = map(pages * PAGE_SIZE, count);
            match map.split(offset, len) {
                Err(_) => prop_assert!(offset + len > map.size()),
                Ok(parts) => {
                    let mut next = 0;
                    for part in parts {
                        prop_assert_eq!(part.of_range.start, next);
                        prop_assert!(part.of_range.end > next);
                        for at in [part.of_range.start, part.of_range.end - 1] {
                            let found = map.locate(offset + at).expect("within");
                            prop_assert_eq!(found.server, part.server);
                            prop_assert_eq!(found.offset, part.offset + at - part.of_range.start);
                        }
                        next = part.of_range.end;
                    }
                    prop_assert_eq!(next, len);
                }
            }
        }
    }
}
