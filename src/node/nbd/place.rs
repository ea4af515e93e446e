//! Places where NBD clients are served, as people write them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use crate::space::map::ServerAddress;

/// Where NBD clients are served: `tcp://HOST[:PORT]` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdPlace {
    /// On TCP; without a port on [`NBD_PORT`].
    Tcp(ServerAddress),
    /// On a Unix socket.
    Unix(PathBuf),
}

/// The port that is registered for NBD.
pub const NBD_PORT: u16 = 10809;

/// Text that names no place for NBD clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write tcp://HOST, tcp://HOST:PORT or unix:/PATH, as in tcp://127.0.0.1:10809")]
pub struct NbdPlaceError;

impl FromStr for NbdPlace {
    type Err = NbdPlaceError;

    fn from_str(text: &str) -> Result<Self, NbdPlaceError> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return match path.is_absolute() {
                true => Ok(Self::Unix(path)),
                false => Err(NbdPlaceError),
            };
        }
        let host = text.strip_prefix("tcp://").ok_or(NbdPlaceError)?;
        let with_port = || format!("{host}:{NBD_PORT}").parse();
        let address = host.parse().or_else(|_| with_port());
        Ok(Self::Tcp(address.map_err(|_| NbdPlaceError)?))
    }
}

impl fmt::Display for NbdPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for NbdPlace {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_shown() {
        for (text, shown) in [
            ("unix:/run/a.nbd", "unix:/run/a.nbd"),
            ("tcp://127.0.0.1", "tcp://127.0.0.1:10809"),
            ("tcp://127.0.0.1:9", "tcp://127.0.0.1:9"),
            ("tcp://[::1]:7", "tcp://[::1]:7"),
        ] {
            let place: NbdPlace = text.parse().expect(text);
            assert_eq!(place.to_string(), shown);
        }
        for wrong in [
            "",
            "unix:",
            "unix:a.nbd",
            "127.0.0.1",
            "udp://a",
            "tcp://",
            "tcp://a:x",
        ] {
            assert!(wrong.parse::<NbdPlace>().is_err(), "{wrong}");
        }
    }
}
