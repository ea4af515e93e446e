//! What a node is told at its start: a TOML file, then the flags of `serve`.
//!
//! ```toml
//! name = "rack7"                       # default: the host's name
//! socket = "/run/uffd-sync/node.sock"  # default: $XDG_RUNTIME_DIR/uffd-sync/node.sock
//! listen = "127.0.0.1:7411"            # default: no TCP
//! insecure = false
//! metrics = "127.0.0.1:9411"           # default: none
//! follow = ["tcp://10.0.0.7:7411/prices=prices-copy"]
//! interval_min_us = 1000
//! interval_max_us = 20000
//! mark_max_delay_us = 5000
//! audit_period_ms = 60000
//! hot_after = 2
//! staging_budget = "512MiB"
//! nbd = ["unix:/run/uffd-sync/regions.nbd"]  # default: no NBD
//! log = "info"
//! ```
//!
//! A table `[variables]` makes the node a member of [ordered variables](VariablesConfig).
//!
//! Invariants:
//! - I1: a [`NodeConfig`] that [`ConfigSource::load`] returned has been validated.
//! - I2: without a file and flags nothing listens on TCP.
//! - I3: an unknown key or a value of the wrong type names the key and its line, and
//!   nothing of the file is taken over.

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use super::nbd::NbdPlace;
use super::space::SpaceFlags;
use crate::engine::variables::{VariablesConfig, VariablesError, place_of};
use crate::limits;
use crate::units::{ByteSize, ParseSizeError};
use crate::wire::follow::FollowSpec;
use crate::words::RegionName;

/// A file or a set of flags that does not make a node.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file that was named.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML, has a key that is not known or a value of the wrong type.
    #[error("{}:{line}: {}{message}", path.display(), Key(key))]
    File {
        /// The file that was named.
        path: PathBuf,
        /// Line of the offence, from 1.
        line: usize,
        /// The key it belongs to, where one stands on that line or above it.
        key: Option<Box<str>>,
        /// What is wrong with it.
        message: Box<str>,
    },
    /// A number outside its bounds.
    #[error("{key} = {value}: must be within {least} ..= {most}")]
    Bounds {
        /// The key of the configuration.
        key: &'static str,
        /// What it was set to.
        value: u64,
        /// Least value allowed.
        least: u64,
        /// Greatest value allowed.
        most: u64,
    },
    /// `interval_min_us` above `interval_max_us`.
    #[error("interval_min_us = {min_us} is above interval_max_us = {max_us}")]
    Intervals {
        /// The shortest pause asked for, in microseconds.
        min_us: u64,
        /// The longest pause asked for, in microseconds.
        max_us: u64,
    },
    /// An address that other hosts reach, with nothing to protect it.
    #[error(
        "{key} = {address} can be reached from other hosts and nothing encrypts or authenticates \
         it; use a loopback address such as 127.0.0.1, or pass --insecure (insecure = true) if \
         the network is trusted"
    )]
    Exposed {
        /// `listen` or `metrics`.
        key: &'static str,
        /// The address asked for.
        address: SocketAddr,
    },
    /// The node's name does not keep the rules for names.
    #[error(
        "name {name:?}: must be 1 to {} letters, digits, `.`, `_` or `-`, the first a letter or digit",
        limits::MAX_NAME_BYTES
    )]
    Name {
        /// The name asked for.
        name: Box<str>,
    },
    /// The ordered variables cannot be served.
    #[error("[variables]: {0}")]
    Variables(VariablesError),
    /// Two `follow` entries would make the same local region.
    #[error("follow: two entries make the local region {local}; add =OTHER to one of them")]
    FollowTwice {
        /// The local name that is taken twice.
        local: RegionName,
    },
    /// The log filter cannot be read.
    #[error("log = {filter:?}: not a filter; write for example info or uffd_sync=debug")]
    Log {
        /// The filter asked for.
        filter: Box<str>,
        /// What its parser said.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
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

/// The configuration of one node; every key of the file with its default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// Name shown to other nodes and in `status`. Default: the host's name.
    pub name: String,
    /// Path of the control socket. Default: [`default_socket`].
    pub socket: PathBuf,
    /// TCP address on which other nodes may follow shared regions. Default: none.
    pub listen: Option<SocketAddr>,
    /// Allows `listen` and `metrics` beyond loopback without TLS. Default: false.
    pub insecure: bool,
    /// HTTP address of the Prometheus metrics. Default: none.
    pub metrics: Option<SocketAddr>,
    /// Regions of other nodes to keep replicas of. Default: none.
    pub follow: Vec<FollowSpec>,
    /// Shortest pause between two timer captures of a region, in microseconds.
    pub interval_min_us: u64,
    /// Longest pause between two timer captures, the staleness limit, in microseconds.
    pub interval_max_us: u64,
    /// Time within which marked bytes are shipped without a commit, in microseconds.
    pub mark_max_delay_us: u64,
    /// Time in which the audit compares each region with its twin, in milliseconds.
    pub audit_period_ms: u64,
    /// Captures in a row in which a page of an `async` region is written before it is
    /// left open and compared at each capture; 0 for never.
    pub hot_after: u64,
    /// Bytes of updates staged at once over all replicas; worst-case memory of staging.
    #[serde(deserialize_with = "byte_size")]
    pub staging_budget: u64,
    /// Where NBD clients are served, with the regions and, beside a segment, the space.
    /// Default: nowhere.
    pub nbd: Vec<NbdPlace>,
    /// Filter of the log, as `tracing` reads it. Default: `info`.
    pub log: String,
    /// Ordered variables, of which this node is a member. Default: none.
    pub variables: Option<VariablesConfig>,
}

impl Default for NodeConfig {
    fn default() -> Self {
        NodeConfig {
            name: host_name(),
            socket: default_socket(),
            listen: None,
            insecure: false,
            metrics: None,
            follow: Vec::new(),
            interval_min_us: limits::INTERVAL_MIN_US,
            interval_max_us: limits::INTERVAL_MAX_US,
            mark_max_delay_us: limits::MARK_MAX_DELAY_US,
            audit_period_ms: limits::AUDIT_PERIOD_MS,
            hot_after: limits::HOT_CAPTURES,
            staging_budget: limits::STAGING_BUDGET,
            nbd: Vec::new(),
            log: "info".to_owned(),
            variables: None,
        }
    }
}

/// The flags of `serve` that stand above the file; none set changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFlags {
    /// Replaces `name`.
    pub name: Option<String>,
    /// Replaces `socket`.
    pub socket: Option<PathBuf>,
    /// Replaces `listen`.
    pub listen: Option<SocketAddr>,
    /// Sets `insecure` if true.
    pub insecure: bool,
    /// Replaces `metrics`.
    pub metrics: Option<SocketAddr>,
    /// Added to `follow`.
    pub follow: Vec<FollowSpec>,
    /// Added to `nbd`.
    pub nbd: Vec<NbdPlace>,
    /// Replaces `log`.
    pub log: Option<String>,
    /// The segment of a space that this node lends besides; no file has it.
    pub space: Option<SpaceFlags>,
}

/// Where a node's configuration comes from, kept so that `SIGHUP` can load it again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigSource {
    /// The file; none for the embedded default.
    pub file: Option<PathBuf>,
    /// The flags that stand above it.
    pub flags: NodeFlags,
}

impl ConfigSource {
    /// Reads the file, puts the flags above it and validates the whole.
    ///
    /// # Errors
    /// [`ConfigError`]; the file, the key and where possible the line are named.
    pub fn load(&self) -> Result<NodeConfig, ConfigError> {
        let mut config = match &self.file {
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
                    path: path.clone(),
                    source,
                })?;
                NodeConfig::parse(&text, path)?
            }
            None => NodeConfig::default(),
        };
        config.put_above(&self.flags);
        config.validate()?;
        Ok(config)
    }
}

impl NodeConfig {
    /// Reads the text of a file; `path` only names it in errors. Not yet validated:
    /// flags may still change what is wrong.
    ///
    /// # Errors
    /// [`ConfigError::File`] with the line and, where there is one, the key.
    pub fn parse(text: &str, path: &Path) -> Result<NodeConfig, ConfigError> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let start = place_of(text, error.message())
                .or(error.span().map(|span| span.start))
                .map_or(0, |start| start.min(text.len()));
            ConfigError::File {
                path: path.to_owned(),
                line: text[..start].matches('\n').count() + 1,
                key: key_at(text, start).map(Into::into),
                message: error.message().into(),
            }
        })
    }

    /// Puts the flags that were given above what the file says.
    pub fn put_above(&mut self, flags: &NodeFlags) {
        if let Some(name) = &flags.name {
            self.name.clone_from(name);
        }
        if let Some(socket) = &flags.socket {
            self.socket.clone_from(socket);
        }
        self.listen = flags.listen.or(self.listen);
        self.insecure |= flags.insecure;
        self.metrics = flags.metrics.or(self.metrics);
        self.follow.extend(flags.follow.iter().cloned());
        self.nbd.extend(flags.nbd.iter().cloned());
        if let Some(log) = &flags.log {
            self.log.clone_from(log);
        }
    }

    /// Checks every bound and every relation between keys.
    ///
    /// # Errors
    /// The first [`ConfigError`] found, in the order of the keys.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.name.parse::<RegionName>().is_err() {
            let name = self.name.as_str().into();
            return Err(ConfigError::Name { name });
        }
        for (key, address) in [("listen", self.listen), ("metrics", self.metrics)] {
            if let Some(address) = address
                && !self.insecure
                && !is_loopback(address.ip())
            {
                return Err(ConfigError::Exposed { key, address });
            }
        }
        let follows = self.follow.len() as u64;
        let pauses = (limits::PAUSE_FLOOR_US, limits::PAUSE_CEILING_US);
        let audits = (
            limits::AUDIT_PERIOD_FLOOR_MS,
            limits::AUDIT_PERIOD_CEILING_MS,
        );
        let staging = (2 * limits::MAX_BODY, limits::MAX_REGION_BYTES);
        for (key, value, (least, most)) in [
            ("follow", follows, (0, limits::MAX_REGIONS)),
            ("interval_min_us", self.interval_min_us, pauses),
            ("interval_max_us", self.interval_max_us, pauses),
            ("mark_max_delay_us", self.mark_max_delay_us, pauses),
            ("audit_period_ms", self.audit_period_ms, audits),
            (
                "hot_after",
                self.hot_after,
                (0, limits::HOT_CAPTURES_CEILING),
            ),
            ("staging_budget", self.staging_budget, staging),
            ("nbd", self.nbd.len() as u64, (0, limits::MAX_NBD_PLACES)),
        ] {
            if !(least..=most).contains(&value) {
                return Err(ConfigError::Bounds {
                    key,
                    value,
                    least,
                    most,
                });
            }
        }
        if self.interval_min_us > self.interval_max_us {
            return Err(ConfigError::Intervals {
                min_us: self.interval_min_us,
                max_us: self.interval_max_us,
            });
        }
        for (at, entry) in self.follow.iter().enumerate() {
            if self.follow[..at].iter().any(|e| e.local == entry.local) {
                let local = entry.local.clone();
                return Err(ConfigError::FollowTwice { local });
            }
        }
        if let Some(mut variables) = self.ordered_variables() {
            variables.check().map_err(ConfigError::Variables)?;
        }
        match tracing_subscriber::EnvFilter::try_new(&self.log) {
            Ok(_) => Ok(()),
            Err(source) => Err(ConfigError::Log {
                filter: self.log.as_str().into(),
                source,
            }),
        }
    }

    /// The ordered variables as they are served: `insecure` of the node holds for them too.
    pub(super) fn ordered_variables(&self) -> Option<VariablesConfig> {
        let mut variables = self.variables.clone()?;
        variables.insecure |= self.insecure;
        Some(variables)
    }

    /// What a running node that has `self` can take over from `other` on `SIGHUP`,
    /// and which keys that differ need a restart.
    pub fn reloadable_differences(&self, other: &NodeConfig) -> Differences {
        let missing_in = |list: &[FollowSpec], entries: &[FollowSpec]| {
            let gone = entries.iter().filter(|entry| !list.contains(entry));
            gone.cloned().collect::<Vec<_>>()
        };
        let intervals = |config: &NodeConfig| Intervals {
            min_us: config.interval_min_us,
            max_us: config.interval_max_us,
            mark_max_delay_us: config.mark_max_delay_us,
            audit_period_ms: config.audit_period_ms,
            hot_after: config.hot_after,
        };
        let changed = [
            ("name", self.name != other.name),
            ("socket", self.socket != other.socket),
            ("listen", self.listen != other.listen),
            ("insecure", self.insecure != other.insecure),
            ("metrics", self.metrics != other.metrics),
            ("variables", self.variables != other.variables),
            ("nbd", self.nbd != other.nbd),
            (
                "staging_budget",
                self.staging_budget != other.staging_budget,
            ),
        ];
        Differences {
            intervals: Some(intervals(other)).filter(|new| *new != intervals(self)),
            follow_added: missing_in(&self.follow, &other.follow),
            follow_removed: missing_in(&other.follow, &self.follow),
            log: Some(other.log.clone()).filter(|log| *log != self.log),
            needs_restart: changed
                .iter()
                .filter(|(_, is)| *is)
                .map(|(key, _)| *key)
                .collect(),
        }
    }
}

/// What governs capture; times in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intervals {
    /// Shortest pause between two timer captures.
    pub min_us: u64,
    /// Longest pause between two timer captures.
    pub max_us: u64,
    /// Time within which marked bytes are shipped.
    pub mark_max_delay_us: u64,
    /// Time in which the audit gets round, in milliseconds.
    pub audit_period_ms: u64,
    /// Captures in a row after which a page is left open.
    pub hot_after: u64,
}

/// What differs between a running configuration and one read again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// The new times, if any of them changed.
    pub intervals: Option<Intervals>,
    /// Replicas to begin.
    pub follow_added: Vec<FollowSpec>,
    /// Replicas to end.
    pub follow_removed: Vec<FollowSpec>,
    /// The new log filter, if it changed.
    pub log: Option<String>,
    /// Keys that changed and are only read at a start.
    pub needs_restart: Vec<&'static str>,
}

impl Differences {
    /// Whether nothing differs at all.
    pub fn is_empty(&self) -> bool {
        *self == Differences::default()
    }
}

/// `$XDG_RUNTIME_DIR/uffd-sync/node.sock`, or `/run/uffd-sync/node.sock` where that
/// variable is unset, empty or not absolute.
pub fn default_socket() -> PathBuf {
    socket_under(env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from))
}

fn socket_under(runtime: Option<PathBuf>) -> PathBuf {
    runtime
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| PathBuf::from("/run"))
        .join("uffd-sync/node.sock")
}

fn host_name() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = text.trim();
    let valid = name.parse::<RegionName>().is_ok();
    if valid { name } else { "node" }.to_owned()
}

pub(super) fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// The key of the `key = value` on the line of byte `at`, or on the nearest line
/// above it that has one, as within an array over several lines.
fn key_at(text: &str, at: usize) -> Option<&str> {
    let line_end = text[at..].find('\n').map_or(text.len(), |n| at + n);
    let begin = text[..at].rfind('\n').map_or(0, |n| n + 1);
    let line = text[begin..line_end].trim();
    if line.starts_with('[') && line.ends_with(']') {
        return Some(line.trim_matches(['[', ']']));
    }
    text[..line_end].lines().rev().find_map(|line| {
        let (key, _) = line.split_once('=')?;
        let key = key.trim().trim_matches('"');
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        (!key.is_empty() && key.chars().all(plain)).then_some(key)
    })
}

fn byte_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(
        untagged,
        expecting = "expected a size such as \"512MiB\" or a number of bytes"
    )]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    match Size::deserialize(deserializer)? {
        Size::Bytes(bytes) => Ok(bytes),
        Size::Text(text) => {
            let size: Result<ByteSize, ParseSizeError> = text.parse();
            size.map(|size| size.0).map_err(serde::de::Error::custom)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    fn parse(text: &str) -> Result<NodeConfig, ConfigError> {
        let config = NodeConfig::parse(text, Path::new("node.toml"))?;
        config.validate()?;
        Ok(config)
    }

    fn message(text: &str) -> String {
        parse(text).expect_err(text).to_string()
    }

    #[test]
    fn an_empty_file_is_the_embedded_default() {
        let config = parse("").expect("the default is valid");
        assert_eq!(config, NodeConfig::default());
        assert_eq!(config.listen, None);
        assert_eq!(config.metrics, None);
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
        assert_eq!(config.name, "rack7");
        assert_eq!(config.listen, Some(([127, 0, 0, 1], 7411).into()));
        assert_eq!(config.follow[0].local.to_string(), "prices-copy");
        assert_eq!(config.staging_budget, 512 << 20);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let text = message("name = \"a\"\n\nsokcet = \"/tmp/x\"\n");
        assert!(text.starts_with("node.toml:3: key `sokcet`: "), "{text}");
        assert!(text.contains("unknown field"), "{text}");
    }

    #[test]
    fn a_wrong_type_is_named_with_its_line() {
        for (input, line, key) in [
            ("name = \"a\"\ninsecure = \"yes\"", 2, "insecure"),
            ("interval_min_us = -1", 1, "interval_min_us"),
            ("staging_budget = \"12 parsecs\"", 1, "staging_budget"),
            ("staging_budget = true", 1, "staging_budget"),
            ("listen = \"localhost\"", 1, "listen"),
            ("\nfollow = [\n  \"http://a:1/b\",\n]", 2, "follow"),
        ] {
            let text = message(input);
            let expected = format!("node.toml:{line}: key `{key}`: ");
            assert!(text.starts_with(&expected), "{input:?}: {text}");
        }
        assert!(message("name = [").starts_with("node.toml:1: "));
    }

    /// Each offence stands on a line of its own, which is not that of the table.
    #[test]
    fn relations_of_variables_are_named_with_their_line() {
        let right = "name = \"a\"\n[variables]\nprocess = 0\nsession = 1\nmember = [\n  \
             { id = 0, address = \"unix:/a\" },\n  { id = 1, address = \"unix:/b\" },\n]\n\
             [[variables.variable]]\nid = 0\nname = \"x\"\ntype = \"i64\"\nsubscribers = [0]\n\
             [[variables.variable]]\nid = 1\nname = \"y\"\ntype = \"i64\"\nsubscribers = [0, 1]\n";
        parse(right).expect("it is valid as it stands");
        for (from, to, said) in [
            (
                "process = 0",
                "process = 7",
                "3: key `process`: process: process 7",
            ),
            (
                "session = 1",
                "session = 0",
                "4: key `session`: session = 0",
            ),
            (
                "id = 1, address",
                "id = 0, address",
                "7: key `member`: member: two entries have id 0",
            ),
            (
                "unix:/b",
                "unix:/a",
                "7: key `member`: member: two entries have address",
            ),
            (
                "[0]",
                "[0, 5]",
                "9: key `variables.variable`: variable x: subscribers: process 5",
            ),
            (
                "[0, 1]",
                "[]",
                "14: key `variables.variable`: variable y: has no subscribers",
            ),
            (
                "\"y\"",
                "\"x\"",
                "14: key `variables.variable`: variable: two entries have name x",
            ),
            (
                "id = 1\n",
                "id = 0\n",
                "14: key `variables.variable`: variable: two entries have id 0",
            ),
            (
                "session = 1",
                "order = \"etcd\"",
                "4: key `order`: order = \"etcd\" and a table",
            ),
        ] {
            assert!(right.contains(from), "{from}");
            let text = message(&right.replacen(from, to, 1));
            let expected = format!("node.toml:{said}");
            assert!(text.starts_with(&expected), "{to}: {text}");
        }
        let etcd = right.replace("session = 1", "order = \"etcd\"");
        let etcd = format!("{etcd}[variables.etcd]\nendpoints = [\"here:1\"]\n");
        let text = message(&etcd);
        assert!(
            text.starts_with("node.toml:19: key `variables.etcd`: etcd.endpoints"),
            "{text}"
        );
        // What is wrong elsewhere keeps its own line.
        let text = message(&right.replace("name = \"a\"\n", "nmae = \"a\"\n"));
        assert!(text.starts_with("node.toml:1: key `nmae`"), "{text}");
    }

    #[test]
    fn relations_are_checked() {
        assert!(message("interval_min_us = 9000\ninterval_max_us = 8000").contains("is above"));
        assert!(message("interval_min_us = 0").contains("must be within"));
        assert!(message("mark_max_delay_us = 999999999999").contains("must be within"));
        assert!(message("staging_budget = 1").contains("must be within"));
        assert!(message("name = \"no spaces please\"").contains("letters, digits"));
        let twice = "follow = [\"tcp://a:1/x\", \"tcp://b:1/y=x\"]";
        assert!(message(twice).contains("local region x"));
        let log = parse("log = \"uffd_sync=loud\"").expect_err("no such level");
        assert!(log.source().is_some());
    }

    #[test]
    fn nothing_is_exposed_by_mistake() {
        for exposed in ["0.0.0.0:7411", "10.0.0.1:7411", "[::]:7411"] {
            for key in ["listen", "metrics"] {
                let text = message(&format!("{key} = \"{exposed}\""));
                assert!(text.contains("--insecure"), "{text}");
                parse(&format!("{key} = \"{exposed}\"\ninsecure = true")).expect("asked for");
            }
        }
        for inside in [
            "127.0.0.1:0",
            "127.1.2.3:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            parse(&format!("listen = \"{inside}\"")).expect(inside);
        }
    }

    #[test]
    fn flags_stand_above_the_file() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let file = folder.path().join("node.toml");
        fs::write(
            &file,
            "name = \"file\"\nlog = \"warn\"\nfollow = [\"tcp://a:1/x\"]",
        )
        .expect("a written file");
        let flags = NodeFlags {
            name: Some("flag".to_owned()),
            follow: vec!["tcp://a:1/y".parse().expect("a spec")],
            ..NodeFlags::default()
        };
        let file = Some(file);
        let config = ConfigSource { file, flags }.load().expect("valid");
        assert_eq!(
            (config.name.as_str(), config.log.as_str()),
            ("flag", "warn")
        );
        assert_eq!(config.follow.len(), 2);
        let file = Some(folder.path().join("absent.toml"));
        let flags = NodeFlags::default();
        let error = ConfigSource { file, flags }.load().expect_err("no file");
        assert!(error.to_string().contains("absent.toml"), "{error}");
    }

    #[test]
    fn a_reload_takes_what_can_change_and_names_the_rest() {
        let running = parse("follow = [\"tcp://a:1/x\", \"tcp://a:1/y\"]").expect("valid");
        assert!(running.reloadable_differences(&running).is_empty());
        let again = parse(
            "follow = [\"tcp://a:1/y\", \"tcp://a:1/z\"]\nlog = \"debug\"\n\
             interval_max_us = 30000\nlisten = \"127.0.0.1:1\"",
        )
        .expect("valid");
        let found = running.reloadable_differences(&again);
        assert_eq!(found.intervals.map(|i| i.max_us), Some(30_000));
        assert_eq!(found.follow_added, again.follow[1..]);
        assert_eq!(found.follow_removed, running.follow[..1]);
        assert_eq!(found.log.as_deref(), Some("debug"));
        assert_eq!(found.needs_restart, ["listen"]);
    }

    #[test]
    fn the_socket_lies_in_the_runtime_folder() {
        let at = |path: &str| socket_under(Some(PathBuf::from(path)));
        assert_eq!(
            at("/run/user/7"),
            Path::new("/run/user/7/uffd-sync/node.sock")
        );
        assert_eq!(at("relative"), Path::new("/run/uffd-sync/node.sock"));
        assert_eq!(socket_under(None), Path::new("/run/uffd-sync/node.sock"));
    }
}
