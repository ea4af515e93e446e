//! `mcomp.cfg`: one TOML file, the same on every machine of a space.
//!
//! ```toml
//! segment_size = "1GiB"        # k: what each server lends; a multiple of 4 KiB
//! servers = [                  # N and the map, in the order of the addresses
//!     { name = "a", address = "10.0.0.1:7421" },
//!     { name = "b", address = "10.0.0.2:7421" },
//!     { name = "c", address = "10.0.0.3:7421" },
//! ]
//! durability = "memory"        # or "replica": a reply follows the replica's ack
//! local_writers = false        # clients on a server's host write by mapping; not with "replica"
//!
//! [limits]
//! max_clients = 1024           # connections to one server
//! max_in_flight = 1024         # operations of one connection
//! deadline_ms = 5000           # of one operation, as clients wait for it
//! writer_lease_ms = 20         # at a stripe that others wait for, before a local writer is killed
//!
//! [log]                        # the log of operations; without it there is none
//! path = "/var/log/uffd-sync/space.log"
//! max_size = "64MiB"           # of one file, before it is rotated
//! keep = 4                     # rotated files
//!
//! [tls]                        # each path on every machine
//! ca = "/etc/uffd-sync/ca.pem"
//! cert = "/etc/uffd-sync/node.pem"
//! key = "/etc/uffd-sync/node.key"
//!
//! [snapshot]
//! directory = "/var/lib/uffd-sync/snapshots"
//! master = "a"                 # the server whose agent writes the image
//! period_s = 3600              # 0: on demand only
//! keep = 24                    # whole snapshots
//! mode = "causal"              # or "strict"
//! gate_max_ms = 20             # longest time that `strict` holds writes back
//! ```
//!
//! Only `segment_size` and `servers` have to be there.
//!
//! Invariants:
//! - I1: a [`SpaceConfig`] has been validated whole; there is no other.
//! - I2: an error names the file, the line, and the key where one stands there.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::map::{MapError, Server, ServerAddress, SpaceMap};
use crate::limits;
use crate::units::{ByteSize, MIB};
use crate::words::RegionName;

/// Something in a file that makes no space of it.
#[derive(Debug, thiserror::Error)]
#[error("{}:{line}: {}{problem}", path.display(), Key(key))]
pub struct SpaceConfigError {
    /// The file that was named.
    pub path: PathBuf,
    /// Line of the offence, from 1.
    pub line: usize,
    /// The key it belongs to, where one is known.
    pub key: Option<Box<str>>,
    /// What is wrong with it.
    pub problem: Problem,
}

struct Key<'a>(&'a Option<Box<str>>);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(key) => write!(f, "key `{key}`: "),
            None => Ok(()),
        }
    }
}

/// What is wrong at a place of the file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// No TOML, an unknown key, a missing one, or a value of the wrong type.
    #[error("{0}")]
    Form(Box<str>),
    /// `segment_size` and `servers` make no map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A number outside its bounds.
    #[error("{value}: must be within {least} ..= {most}")]
    Bounds {
        /// What it was set to.
        value: u64,
        /// Least value allowed.
        least: u64,
        /// Greatest value allowed.
        most: u64,
    },
    /// A path that depends on where a process was started.
    #[error("{}: write an absolute path; every process of the space reads this file", .0.display())]
    Relative(PathBuf),
    /// Changes by mapping that no replica would acknowledge.
    #[error(
        "true, together with durability = \"replica\": a client that writes by mapping waits for \
         no replica; choose one of the two"
    )]
    WritersWithReplica,
    /// The master of the snapshots is none of the servers.
    #[error("{0} is none of the servers")]
    Master(RegionName),
}

/// What an operation's reply promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// The server's memory has it. A server that restarts has lost it and says so.
    #[default]
    Memory,
    /// A replica has it too.
    Replica,
}

/// How the instant of a snapshot is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotMode {
    /// No effect is in the image without its cause; nothing waits.
    #[default]
    Causal,
    /// One instant on all servers; writes wait for about one round trip.
    Strict,
}

/// `[limits]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceLimits {
    /// Connections to one server.
    pub max_clients: u64,
    /// Operations of one connection that are not yet answered.
    pub max_in_flight: u64,
    /// Time that a client waits for one operation, in milliseconds.
    pub deadline_ms: u64,
    /// Time that a client which writes by mapping may stay at a stripe that others wait for,
    /// before it is killed, in milliseconds.
    pub writer_lease_ms: u64,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperationLog {
    /// The file that is written, with the server's name before its ending: `space-a.log`
    /// for `space.log`. Rotated ones have a number behind it.
    pub path: PathBuf,
    /// Bytes after which the file is rotated.
    pub max_size: u64,
    /// Rotated files that are kept.
    pub keep: u64,
}

/// `[tls]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificates of the authority that both sides trust, PEM.
    pub ca: PathBuf,
    /// This machine's certificate, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

/// `[snapshot]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotPolicy {
    /// Folder on the master that the images are written to.
    pub directory: PathBuf,
    /// Name of the server whose agent writes the image.
    pub master: RegionName,
    /// Seconds between two snapshots; 0 means on demand only.
    pub period_s: u64,
    /// Whole snapshots that are kept.
    pub keep: u64,
    /// How the instant is made.
    pub mode: SnapshotMode,
    /// Longest time that `strict` holds writes back, in milliseconds.
    pub gate_max_ms: u64,
}

/// The whole file, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceConfig {
    /// k, N and where the servers are.
    pub map: SpaceMap,
    /// What a reply promises.
    pub durability: Durability,
    /// Whether clients on a server's own host write by mapping.
    pub local_writers: bool,
    /// Bounds of the operations.
    pub limits: SpaceLimits,
    /// The log of operations, if there is to be one.
    pub log: Option<OperationLog>,
    /// TLS between machines, if there is to be any.
    pub tls: Option<TlsFiles>,
    /// Snapshots, if there are to be any.
    pub snapshot: Option<SnapshotPolicy>,
}

impl SpaceConfig {
    /// Reads and validates the text of a file; `path` only names it in errors.
    ///
    /// # Errors
    /// [`SpaceConfigError`] with the line and, where there is one, the key.
    pub fn parse(text: &str, path: &Path) -> Result<Self, SpaceConfigError> {
        let written = toml::from_str::<Written>(text).map_err(|error: toml::de::Error| Misfit {
            at: error.span().unwrap_or(0..0),
            key: None,
            problem: Problem::Form(error.message().into()),
        });
        let checked = written.and_then(Written::checked);
        checked.map_err(|misfit| SpaceConfigError {
            path: path.to_owned(),
            line: line_of(text, misfit.at.start),
            key: misfit.key.map(Into::into),
            problem: misfit.problem,
        })
    }
}

/// Something wrong at a place of the text, not yet put into words of lines.
struct Misfit {
    at: Range<usize>,
    key: Option<&'static str>,
    problem: Problem,
}

fn misfit<T>(key: &'static str, at: &Spanned<T>, problem: impl Into<Problem>) -> Misfit {
    Misfit {
        at: at.span(),
        key: Some(key),
        problem: problem.into(),
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}

/// A size as the file has it: `"64MiB"` or a number of bytes.
#[derive(Clone, Copy)]
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected a size such as \"512MiB\" or a number of bytes"
        )]
        enum Form {
            Bytes(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Bytes(bytes) => Ok(Size(bytes)),
            Form::Text(text) => {
                let size = text.parse().map_err(serde::de::Error::custom);
                size.map(|ByteSize(bytes)| Size(bytes))
            }
        }
    }
}

fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<RegionName, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}

/// The file as it is written, each number with its place.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    segment_size: Spanned<Size>,
    servers: Spanned<Vec<Spanned<WrittenServer>>>,
    #[serde(default)]
    durability: Durability,
    local_writers: Option<Spanned<bool>>,
    #[serde(default)]
    limits: WrittenLimits,
    log: Option<WrittenLog>,
    tls: Option<WrittenTls>,
    snapshot: Option<WrittenSnapshot>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenServer {
    #[serde(deserialize_with = "name")]
    name: RegionName,
    address: ServerAddress,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLimits {
    max_clients: Option<Spanned<u64>>,
    max_in_flight: Option<Spanned<u64>>,
    deadline_ms: Option<Spanned<u64>>,
    writer_lease_ms: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLog {
    path: Spanned<PathBuf>,
    max_size: Option<Spanned<Size>>,
    keep: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenTls {
    ca: Spanned<PathBuf>,
    cert: Spanned<PathBuf>,
    key: Spanned<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSnapshot {
    directory: Spanned<PathBuf>,
    master: Spanned<MasterName>,
    period_s: Option<Spanned<u64>>,
    keep: Option<Spanned<u64>>,
    #[serde(default)]
    mode: SnapshotMode,
    gate_max_ms: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(transparent)]
struct MasterName(#[serde(deserialize_with = "name")] RegionName);

impl Written {
    fn checked(self) -> Result<SpaceConfig, Misfit> {
        let map = checked_map(&self.segment_size, self.servers)?;
        let snapshot = self.snapshot.map(|snapshot| snapshot.checked(&map));
        let local_writers = match &self.local_writers {
            Some(on) if *on.get_ref() && self.durability == Durability::Replica => {
                return Err(misfit("local_writers", on, Problem::WritersWithReplica));
            }
            on => on.as_ref().is_some_and(|on| *on.get_ref()),
        };
        Ok(SpaceConfig {
            durability: self.durability,
            local_writers,
            limits: self.limits.checked()?,
            log: self.log.map(WrittenLog::checked).transpose()?,
            tls: self.tls.map(WrittenTls::checked).transpose()?,
            snapshot: snapshot.transpose()?,
            map,
        })
    }
}

fn checked_map(
    segment_size: &Spanned<Size>,
    servers: Spanned<Vec<Spanned<WrittenServer>>>,
) -> Result<SpaceMap, Misfit> {
    let whole = servers.span();
    let servers = servers.into_inner();
    let places: Vec<_> = servers.iter().map(Spanned::span).collect();
    let plain = |server: Spanned<WrittenServer>| {
        let WrittenServer { name, address } = server.into_inner();
        Server { name, address }
    };
    let servers = servers.into_iter().map(plain).collect();
    SpaceMap::new(segment_size.get_ref().0, servers).map_err(|error| {
        let (key, at) = match &error {
            MapError::SegmentSize { .. } => ("segment_size", segment_size.span()),
            MapError::Count { .. } => ("servers", whole),
            MapError::NameTwice { second, .. } | MapError::AddressTwice { second, .. } => {
                ("servers", places[*second].clone())
            }
        };
        Misfit {
            at,
            key: Some(key),
            problem: error.into(),
        }
    })
}

impl WrittenLimits {
    fn checked(self) -> Result<SpaceLimits, Misfit> {
        let clients = (1, limits::MAX_SPACE_CLIENTS);
        let in_flight = (1, limits::MAX_SPACE_IN_FLIGHT);
        let deadline = (1, limits::SPACE_DEADLINE_CEILING_MS);
        let lease = (5, limits::SPACE_LEASE_CEILING_MS);
        Ok(SpaceLimits {
            max_clients: within("max_clients", self.max_clients, 1024, clients)?,
            max_in_flight: within("max_in_flight", self.max_in_flight, 1024, in_flight)?,
            deadline_ms: within("deadline_ms", self.deadline_ms, 5000, deadline)?,
            writer_lease_ms: within("writer_lease_ms", self.writer_lease_ms, 20, lease)?,
        })
    }
}

impl WrittenLog {
    fn checked(self) -> Result<OperationLog, Misfit> {
        let sizes = (limits::SPACE_LOG_FLOOR, limits::MAX_REGION_BYTES);
        let max_size = self.max_size.map(|size| {
            let span = size.span();
            Spanned::new(span, size.into_inner().0)
        });
        Ok(OperationLog {
            path: absolute("path", self.path)?,
            max_size: within("max_size", max_size, 64 * MIB, sizes)?,
            keep: within("keep", self.keep, 4, (0, limits::MAX_KEPT_FILES))?,
        })
    }
}

impl WrittenTls {
    fn checked(self) -> Result<TlsFiles, Misfit> {
        Ok(TlsFiles {
            ca: absolute("ca", self.ca)?,
            cert: absolute("cert", self.cert)?,
            key: absolute("key", self.key)?,
        })
    }
}

impl WrittenSnapshot {
    fn checked(self, map: &SpaceMap) -> Result<SnapshotPolicy, Misfit> {
        let master = &self.master.get_ref().0;
        if map.position(master.as_str()).is_none() {
            let problem = Problem::Master(master.clone());
            return Err(misfit("master", &self.master, problem));
        }
        let period = (0, limits::SNAPSHOT_PERIOD_CEILING_S);
        let gate = (1, limits::SNAPSHOT_GATE_CEILING_MS);
        Ok(SnapshotPolicy {
            directory: absolute("directory", self.directory)?,
            master: self.master.into_inner().0,
            period_s: within("period_s", self.period_s, 3600, period)?,
            keep: within("keep", self.keep, 24, (1, limits::MAX_KEPT_FILES))?,
            mode: self.mode,
            gate_max_ms: within("gate_max_ms", self.gate_max_ms, 20, gate)?,
        })
    }
}

fn within(
    key: &'static str,
    written: Option<Spanned<u64>>,
    default: u64,
    (least, most): (u64, u64),
) -> Result<u64, Misfit> {
    let Some(written) = written else {
        return Ok(default);
    };
    let value = *written.get_ref();
    if !(least..=most).contains(&value) {
        let problem = Problem::Bounds { value, least, most };
        return Err(misfit(key, &written, problem));
    }
    Ok(value)
}

fn absolute(key: &'static str, path: Spanned<PathBuf>) -> Result<PathBuf, Misfit> {
    if path.get_ref().is_absolute() {
        return Ok(path.into_inner());
    }
    let problem = Problem::Relative(path.get_ref().clone());
    Err(misfit(key, &path, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "segment_size = \"8KiB\"\nservers = [\n  { name = \"a\", address = \"h:1\" },\n  { name = \"b\", address = \"h:2\" },\n]\n";

    fn parse(text: &str) -> Result<SpaceConfig, SpaceConfigError> {
        SpaceConfig::parse(text, Path::new("mcomp.cfg"))
    }

    fn message(text: &str) -> String {
        parse(text).expect_err(text).to_string()
    }

    #[test]
    fn two_keys_are_enough() {
        let config = parse(LEAST).expect("a space");
        assert_eq!(config.map.size(), 16 << 10);
        assert_eq!(config.durability, Durability::Memory);
        assert_eq!(config.limits.max_clients, 1024);
        assert_eq!((config.log, config.tls), (None, None));
        assert_eq!(config.snapshot, None);
    }

    #[test]
    fn every_key_of_the_example_is_read() {
        let source = include_str!("config.rs");
        let example: String = source
            .lines()
            .skip_while(|line| *line != "//! ```toml")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| format!("{}\n", line.trim_start_matches("//!")))
            .collect();
        let config = parse(&example).expect("the example in the module doc is valid");
        assert_eq!(config.map.servers().len(), 3);
        assert_eq!(config.map.segment_size(), 1 << 30);
        assert_eq!(config.log.expect("a log").max_size, 64 << 20);
        assert_eq!(
            config.tls.expect("tls").key,
            Path::new("/etc/uffd-sync/node.key")
        );
        assert_eq!(config.snapshot.expect("a policy").master.as_str(), "a");
    }

    /// Each text is refused at this line, for this key, with these words.
    fn refused(cases: &[(String, usize, &str, &str)]) {
        for (text, line, key, says) in cases {
            let said = message(text);
            let place = match *key {
                "" => format!("mcomp.cfg:{line}: "),
                key => format!("mcomp.cfg:{line}: key `{key}`: "),
            };
            assert!(said.starts_with(&place), "{text}\n{said}");
            assert!(said.contains(says), "{text}\n{said}");
        }
    }

    #[test]
    fn a_wrong_map_is_named_with_its_line() {
        refused(&[
            (String::new(), 1, "", "missing field `segment_size`"),
            (
                "segment_size = 8192".into(),
                1,
                "",
                "missing field `servers`",
            ),
            (
                LEAST.replace("8KiB", "0"),
                1,
                "segment_size",
                "0 bytes: a segment is a multiple",
            ),
            (LEAST.replace("\"8KiB\"", "8193"), 1, "segment_size", "8193"),
            (
                "segment_size = 8192\nservers = []".into(),
                2,
                "servers",
                "0 servers",
            ),
            (
                LEAST.replace("\"b\"", "\"a\""),
                4,
                "servers",
                "both have the name a",
            ),
            (
                LEAST.replace("h:2", "h:1"),
                4,
                "servers",
                "both have the address h:1",
            ),
            (LEAST.replace("h:2", "h"), 4, "", "HOST:PORT"),
            (LEAST.replace("\"b\"", "\"b b\""), 4, "", "character ' '"),
            (
                LEAST.replace("name = \"b\", ", ""),
                4,
                "",
                "missing field `name`",
            ),
        ]);
    }

    #[test]
    fn a_wrong_section_is_named_with_its_line() {
        let with = |tail: &str| format!("{LEAST}{tail}");
        refused(&[
            (with("severs = 3"), 6, "", "unknown field `severs`"),
            (
                with("durability = \"disk\""),
                6,
                "",
                "unknown variant `disk`",
            ),
            (
                with("[limits]\nmax_clients = 0"),
                7,
                "max_clients",
                "within 1",
            ),
            (
                with("durability = \"replica\"\nlocal_writers = true"),
                7,
                "local_writers",
                "choose one of the two",
            ),
            (
                with("[limits]\nwriter_lease_ms = 4"),
                7,
                "writer_lease_ms",
                "within 5",
            ),
            (with("[log]\npath = \"x.log\""), 7, "path", "absolute"),
            (with("[log]\nkeep = 1"), 6, "", "missing field `path`"),
            (
                with("[tls]\nca = \"/a\"\ncert = \"/b\"\nkey = \"c\""),
                9,
                "key",
                "absolute",
            ),
            (
                with("[snapshot]\ndirectory = \"/s\"\nmaster = \"z\""),
                8,
                "master",
                "z is none of the servers",
            ),
            (
                with("[snapshot]\ndirectory = \"/s\"\nmaster = \"a\"\ngate_max_ms = 0"),
                9,
                "gate_max_ms",
                "within 1",
            ),
        ]);
    }
}
