//! Where a replica comes from, as people write it: `tcp://HOST:PORT/REGION[=LOCAL]`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::words::RegionName;

/// A region of another node and the name that its copy gets here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FollowSpec {
    /// Name or address of the source node's host; IPv6 addresses without brackets.
    pub host: String,
    /// TCP port of the source node.
    pub port: u16,
    /// Name of the region there.
    pub region: RegionName,
    /// Name of the replica here.
    pub local: RegionName,
}

/// A follow specification that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FollowSpecError {
    /// It does not begin with `tcp://`.
    #[error("write a source as tcp://HOST:PORT/REGION or tcp://HOST:PORT/REGION=LOCAL")]
    Form,
    /// The port is missing or is not a number from 1 to 65535.
    #[error("a source needs a port from 1 to 65535, as in tcp://127.0.0.1:7700/prices")]
    Port,
    /// One of the names is not a region name.
    #[error("a source names a region that cannot exist")]
    Name(#[source] crate::words::WordError),
}

impl FromStr for FollowSpec {
    type Err = FollowSpecError;

    fn from_str(text: &str) -> Result<Self, FollowSpecError> {
        let rest = text.strip_prefix("tcp://").ok_or(FollowSpecError::Form)?;
        let (address, names) = rest.split_once('/').ok_or(FollowSpecError::Form)?;
        let (host, port) = address.rsplit_once(':').ok_or(FollowSpecError::Port)?;
        let port: u16 = port.parse().map_err(|_| FollowSpecError::Port)?;
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = match bare {
            Some(bare) => bare,
            None if host.contains([':', '[', ']']) => return Err(FollowSpecError::Form),
            None => host,
        };
        if port == 0 {
            return Err(FollowSpecError::Port);
        }
        if host.is_empty() || host.contains(char::is_whitespace) {
            return Err(FollowSpecError::Form);
        }
        let (region, local) = names.split_once('=').unwrap_or((names, names));
        let name = |name: &str| name.parse().map_err(FollowSpecError::Name);
        Ok(Self {
            host: host.to_owned(),
            port,
            region: name(region)?,
            local: name(local)?,
        })
    }
}

impl fmt::Display for FollowSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            host,
            port,
            region,
            local,
        } = self;
        if host.contains(':') {
            write!(f, "tcp://[{host}]:{port}/{region}")?;
        } else {
            write!(f, "tcp://{host}:{port}/{region}")?;
        }
        if local != region {
            write!(f, "={local}")?;
        }
        Ok(())
    }
}

impl Serialize for FollowSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FollowSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_prints() {
        for text in [
            "tcp://127.0.0.1:7700/prices",
            "tcp://db.example:1/prices=prices.copy",
            "tcp://[::1]:7700/a=b",
        ] {
            let spec: FollowSpec = text.parse().unwrap();
            assert_eq!(spec.to_string(), text);
        }
    }

    #[test]
    fn refuses_what_it_cannot_mean() {
        for text in [
            "",
            "prices",
            "udp://h:1/a",
            "tcp://h/a",
            "tcp://h:0/a",
            "tcp://h:70000/a",
            "tcp://h:1/",
            "tcp://h:1/a=",
            "tcp://:1/a",
            "tcp://::1:7700/a",
            "tcp://h:1",
        ] {
            assert!(text.parse::<FollowSpec>().is_err(), "{text}");
        }
    }
}
