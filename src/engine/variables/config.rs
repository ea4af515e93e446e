//! What a process has to know of its ordered variables before it starts: the
//! `[variables]` table of a node's file, or the same built by a program.
//!
//! ```toml
//! [variables]
//! process = 0                  # which of the members this process is
//! order = "skeen"              # skeen | sequencer | etcd
//! session = 1                  # raised by all members together after one lost its memory
//! strict = false
//! insecure = false
//! member = [
//!   { id = 0, address = "tcp://127.0.0.1:7500" },
//!   { id = 1, address = "unix:/run/uffd-sync/vars-1.sock" },
//! ]
//! variable = [
//!   { id = 0, name = "price", type = "i64", subscribers = [0, 1] },
//!   { id = 1, name = "label", type = "bytes", subscribers = [0, 1] },
//! ]
//! ```
//!
//! Invariants:
//! - I1: a [`VariablesConfig`] that was read or built has been checked: ids are unique,
//!   every subscriber is a member, every member has an address where one is needed.
//! - I2: the same file serves on all hosts, but for `process`. What has to be equal
//!   everywhere is compared when two processes meet; addresses may differ, since a host
//!   may be reached by several.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::words::RegionName;

/// The commented default that `uffd-sync var init` prints; it loads as it stands.
pub const DEFAULT_FILE: &str = include_str!("default.toml");

/// Least time for one request to an etcd cluster; a shorter one is over before it is sent.
const MIN_TIMEOUT_MS: u64 = 10;
/// Greatest one: the end of a process waits for the requests that are under way.
const MAX_TIMEOUT_MS: u64 = 60_000;

/// How the order of all operations is agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OrderKind {
    /// By the subscribers of each variable among themselves.
    #[default]
    Skeen,
    /// By one fixed member per group of variables that share subscribers.
    Sequencer,
    /// By an etcd cluster.
    Etcd,
}

impl fmt::Display for OrderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Skeen => "skeen",
            Self::Sequencer => "sequencer",
            Self::Etcd => "etcd",
        })
    }
}

/// What a variable holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValueKind {
    /// A signed 64-bit number, 0 at first.
    I64,
    /// Up to [`limits::MAX_VARIABLE_BYTES`] bytes, none at first.
    Bytes,
}

impl fmt::Display for ValueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I64 => "i64",
            Self::Bytes => "bytes",
        })
    }
}

/// Where a member is reached: `tcp://HOST:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// Host name or IP address, and port.
    Tcp(String, u16),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// Whether other hosts may reach it.
    fn is_exposed(&self) -> bool {
        match self {
            Self::Unix(_) => false,
            Self::Tcp(host, _) => match host.parse::<IpAddr>() {
                Ok(ip) => !ip.to_canonical().is_loopback(),
                Err(_) => host != "localhost",
            },
        }
    }
}

impl FromStr for Address {
    type Err = VariablesError;

    fn from_str(text: &str) -> Result<Self, VariablesError> {
        let wrong = || VariablesError::Address { text: text.into() };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            // 107 bytes are what a Unix address holds.
            let fits = !path.is_empty() && path.len() <= 107;
            return fits
                .then(|| Self::Unix(PathBuf::from(path)))
                .ok_or_else(wrong);
        }
        let rest = text.strip_prefix("tcp://").ok_or_else(wrong)?;
        let (host, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let port = port.parse().map_err(|_| wrong())?;
        if host.is_empty() || host.len() > 253 {
            return Err(wrong());
        }
        Ok(Self::Tcp(host.to_owned(), port))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = VariablesError;

    fn try_from(text: String) -> Result<Self, VariablesError> {
        text.parse()
    }
}

/// One process that may subscribe.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its number.
    pub id: u32,
    /// Where others reach it.
    #[serde(deserialize_with = "address")]
    pub address: Address,
}

fn address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Address, D::Error> {
    String::deserialize(deserializer)?
        .parse()
        .map_err(serde::de::Error::custom)
}

/// One variable.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// Its number, the same everywhere.
    pub id: u32,
    /// Its name, for people and commands.
    pub name: RegionName,
    /// What it holds.
    #[serde(rename = "type")]
    pub kind: ValueKind,
    /// The members that read, write and hear it; nobody else can.
    pub subscribers: Vec<u32>,
}

/// An etcd cluster as the engine of the order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EtcdConfig {
    /// `http://HOST:PORT` or `https://..` of its members, tried in turn.
    pub endpoints: Vec<String>,
    /// What the keys begin with. Default: `/uffd-sync/variables/`.
    pub prefix: Option<String>,
    /// PEM file of the authority that signed the members' certificates.
    pub ca: Option<PathBuf>,
    /// PEM file of this client's certificate.
    pub cert: Option<PathBuf>,
    /// PEM file of its key.
    pub key: Option<PathBuf>,
    /// User to log in as.
    pub user: Option<String>,
    /// File whose first line is that user's password.
    pub password_file: Option<PathBuf>,
    /// Time for one request before the next endpoint is tried, in milliseconds, 10 to
    /// 60,000. Default: 1000.
    pub timeout_ms: Option<u64>,
}

impl EtcdConfig {
    /// What the keys begin with, `/` at its end.
    pub fn prefix(&self) -> String {
        let prefix = self.prefix.as_deref().unwrap_or("/uffd-sync/variables/");
        format!("{}/", prefix.trim_end_matches('/'))
    }
}

/// The ordered variables of one process.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Table")]
pub struct VariablesConfig {
    /// Which of the members this process is.
    pub process: u32,
    /// How the order is agreed on. Default: [`OrderKind::Skeen`].
    pub order: OrderKind,
    /// Number of the session: raised by all members after one lost its memory. Default: 1.
    pub session: u64,
    /// Whether an operation completes only when every subscriber has its commit. Default: false.
    pub strict: bool,
    /// Allows TCP beyond loopback, where nothing encrypts or authenticates. Default: false.
    pub insecure: bool,
    /// All processes, in the order of their ids.
    pub members: Vec<Member>,
    /// All variables, in the order of their ids.
    pub variables: Vec<Definition>,
    /// The cluster of [`OrderKind::Etcd`].
    pub etcd: Option<EtcdConfig>,
}

/// The table as it stands in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    process: u32,
    #[serde(default)]
    order: OrderKind,
    #[serde(default = "first_session")]
    session: u64,
    #[serde(default)]
    strict: bool,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    member: Vec<Member>,
    #[serde(default)]
    variable: Vec<Definition>,
    #[serde(default)]
    etcd: Option<EtcdConfig>,
}

fn first_session() -> u64 {
    1
}

impl TryFrom<Table> for VariablesConfig {
    type Error = VariablesError;

    fn try_from(table: Table) -> Result<Self, VariablesError> {
        let mut config = Self {
            process: table.process,
            order: table.order,
            session: table.session,
            strict: table.strict,
            insecure: table.insecure,
            members: table.member,
            variables: table.variable,
            etcd: table.etcd,
        };
        config.check_form()?;
        Ok(config)
    }
}

/// A set of variables that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum VariablesError {
    /// An address that is none.
    #[error("address {text:?}: write tcp://HOST:PORT or unix:PATH (at most 107 bytes)")]
    Address {
        /// What was written.
        text: Box<str>,
    },
    /// A number outside its bounds.
    #[error("{key} = {value}: must be within {least} ..= {most}")]
    Bounds {
        /// The key in `[variables]`.
        key: &'static str,
        /// What it was set to.
        value: u64,
        /// Least value allowed.
        least: u64,
        /// Greatest value allowed.
        most: u64,
    },
    /// Two entries have the same id, name or address.
    #[error("{key}: two entries have {what}")]
    Twice {
        /// `member` or `variable`.
        key: &'static str,
        /// What they share.
        what: Box<str>,
    },
    /// A process that is not among the members.
    #[error("{key}: process {process} is not among the members {members:?}")]
    NoMember {
        /// Where it stands.
        key: Box<str>,
        /// Its number.
        process: u32,
        /// The members there are.
        members: Vec<u32>,
    },
    /// A variable that nobody may use.
    #[error("variable {name}: has no subscribers, so nobody could read or write it")]
    NoSubscribers {
        /// Its name.
        name: RegionName,
    },
    /// TCP that other hosts reach.
    #[error(
        "member {process}: {address} can be reached from other hosts and nothing encrypts or \
         authenticates it; use a loopback or Unix address, or set insecure = true (serve \
         --insecure) if the network is trusted"
    )]
    Exposed {
        /// Whose address it is.
        process: u32,
        /// The address.
        address: Address,
    },
    /// The order needs a cluster and none is named, or the other way round.
    #[error("order = \"etcd\" and a table [variables.etcd] with endpoints go together")]
    Cluster,
    /// Two keys of the cluster's table of which only one is there.
    #[error("etcd.{one} and etcd.{other} go together, and only one of them is there")]
    Pair {
        /// One key.
        one: &'static str,
        /// The other one.
        other: &'static str,
    },
    /// Certificates where nothing is encrypted.
    #[error(
        "etcd.ca, etcd.cert and etcd.key are for https:// endpoints, and none of the endpoints is \
         one: nothing would be encrypted"
    )]
    Plain,
    /// An endpoint that is none.
    #[error("etcd.endpoints: {endpoint:?}: write http://HOST:PORT or https://HOST:PORT")]
    Endpoint {
        /// What was written.
        endpoint: Box<str>,
    },
}

impl VariablesConfig {
    /// The variables of one process, to be completed by [`VariablesConfig::member`] and
    /// [`VariablesConfig::variable`]; [`super::Variables::start`] checks the whole.
    pub fn new(process: u32) -> Self {
        Self {
            process,
            order: OrderKind::default(),
            session: 1,
            strict: false,
            insecure: false,
            members: Vec::new(),
            variables: Vec::new(),
            etcd: None,
        }
    }

    /// Adds a process.
    #[must_use]
    pub fn member(mut self, id: u32, address: Address) -> Self {
        self.members.push(Member { id, address });
        self
    }

    /// Adds a variable.
    #[must_use]
    pub fn variable(
        mut self,
        id: u32,
        name: RegionName,
        kind: ValueKind,
        subscribers: impl IntoIterator<Item = u32>,
    ) -> Self {
        self.variables.push(Definition {
            id,
            name,
            kind,
            subscribers: subscribers.into_iter().collect(),
        });
        self
    }

    /// Sets how the order is agreed on.
    #[must_use]
    pub fn order(mut self, order: OrderKind) -> Self {
        self.order = order;
        self
    }

    /// The variable of that id.
    pub fn definition(&self, id: u32) -> Option<&Definition> {
        self.variables.iter().find(|one| one.id == id)
    }

    /// The variable of that name, or of that number in digits.
    pub fn find(&self, name: &str) -> Option<&Definition> {
        let by_name = self.variables.iter().find(|one| one.name.as_str() == name);
        by_name.or_else(|| self.definition(name.parse().ok()?))
    }

    /// Where this process listens.
    pub fn own_address(&self) -> Option<&Address> {
        self.address_of(self.process)
    }

    /// Where a member listens.
    pub fn address_of(&self, process: u32) -> Option<&Address> {
        let member = self.members.iter().find(|one| one.id == process)?;
        Some(&member.address)
    }

    /// Puts entries into the order of their ids and checks every bound and relation.
    ///
    /// # Errors
    /// The first offence found; the entry is named.
    pub fn check(&mut self) -> Result<(), VariablesError> {
        self.check_form()?;
        match self.members.iter().find(|one| one.address.is_exposed()) {
            Some(one) if !self.insecure && self.order != OrderKind::Etcd => {
                Err(VariablesError::Exposed {
                    process: one.id,
                    address: one.address.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    /// All of it but what a flag of `serve` may still allow.
    fn check_form(&mut self) -> Result<(), VariablesError> {
        self.members.sort_by_key(|one| one.id);
        self.variables.sort_by_key(|one| one.id);
        for one in &mut self.variables {
            one.subscribers.sort_unstable();
            one.subscribers.dedup();
        }
        self.check_bounds()?;
        self.check_members()?;
        self.check_variables()?;
        self.check_cluster()
    }

    fn check_bounds(&self) -> Result<(), VariablesError> {
        for (key, value, least, most) in [
            (
                "member",
                self.members.len() as u64,
                1,
                limits::MAX_VARIABLE_PROCESSES,
            ),
            (
                "variable",
                self.variables.len() as u64,
                1,
                limits::MAX_VARIABLES,
            ),
            ("session", self.session, 1, u64::MAX >> 1),
        ] {
            if !(least..=most).contains(&value) {
                return Err(VariablesError::Bounds {
                    key,
                    value,
                    least,
                    most,
                });
            }
        }
        Ok(())
    }

    fn check_members(&self) -> Result<(), VariablesError> {
        let twice = |what: String| VariablesError::Twice {
            key: "member",
            what: what.into(),
        };
        for (at, one) in self.members.iter().enumerate() {
            for other in &self.members[..at] {
                if other.id == one.id {
                    return Err(twice(format!("id {}", one.id)));
                }
                if other.address == one.address {
                    return Err(twice(format!("address {}", one.address)));
                }
            }
        }
        self.must_be_member(self.process, "process")
    }

    fn must_be_member(&self, process: u32, key: &str) -> Result<(), VariablesError> {
        if self.address_of(process).is_some() {
            return Ok(());
        }
        Err(VariablesError::NoMember {
            key: key.into(),
            process,
            members: self.members.iter().map(|one| one.id).collect(),
        })
    }

    fn check_variables(&self) -> Result<(), VariablesError> {
        let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
        for one in &self.variables {
            let twice = |what: String| VariablesError::Twice {
                key: "variable",
                what: what.into(),
            };
            if !ids.insert(one.id) {
                return Err(twice(format!("id {}", one.id)));
            }
            if !names.insert(one.name.as_str()) {
                return Err(twice(format!("name {}", one.name)));
            }
            if one.subscribers.is_empty() {
                let name = one.name.clone();
                return Err(VariablesError::NoSubscribers { name });
            }
            for process in &one.subscribers {
                self.must_be_member(*process, &format!("variable {}: subscribers", one.name))?;
            }
        }
        Ok(())
    }

    fn check_cluster(&self) -> Result<(), VariablesError> {
        let endpoints = self.etcd.as_ref().map(|etcd| &etcd.endpoints[..]);
        match (self.order, endpoints) {
            (OrderKind::Etcd, None | Some([])) => Err(VariablesError::Cluster),
            (OrderKind::Etcd, Some(endpoints)) => {
                let is_url = |url: &&String| {
                    let rest = url.strip_prefix("http://").or(url.strip_prefix("https://"));
                    rest.is_none_or(|rest| rest.is_empty() || rest.contains(['/', ' ']))
                };
                match endpoints.iter().find(is_url) {
                    Some(endpoint) => Err(VariablesError::Endpoint {
                        endpoint: endpoint.as_str().into(),
                    }),
                    None => self.etcd.as_ref().map_or(Ok(()), EtcdConfig::check),
                }
            }
            (_, Some(_)) => Err(VariablesError::Cluster),
            (_, None) => Ok(()),
        }
    }
}

impl EtcdConfig {
    /// Nothing that was written may be without effect.
    fn check(&self) -> Result<(), VariablesError> {
        let (user, password) = (self.user.is_some(), self.password_file.is_some());
        let (cert, key) = (self.cert.is_some(), self.key.is_some());
        for (one, other, differ) in [
            ("user", "password_file", user != password),
            ("cert", "key", cert != key),
        ] {
            if differ {
                return Err(VariablesError::Pair { one, other });
            }
        }
        let encrypted = self.endpoints.iter().any(|url| url.starts_with("https://"));
        if (cert || self.ca.is_some()) && !encrypted {
            return Err(VariablesError::Plain);
        }
        let (least, most) = (MIN_TIMEOUT_MS, MAX_TIMEOUT_MS);
        match self.timeout_ms {
            Some(value) if !(least..=most).contains(&value) => Err(VariablesError::Bounds {
                key: "etcd.timeout_ms",
                value,
                least,
                most,
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        variables: VariablesConfig,
    }

    fn parse(text: &str) -> Result<VariablesConfig, String> {
        let file = toml::from_str::<File>(text).map_err(|error| error.to_string())?;
        let mut config = file.variables;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }

    fn example() -> String {
        include_str!("config.rs")
            .lines()
            .skip_while(|line| *line != "//! ```toml")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| format!("{}\n", line.trim_start_matches("//!")))
            .collect()
    }

    #[test]
    fn the_default_file_and_the_example_load_as_they_stand() {
        let config = parse(DEFAULT_FILE).expect("the default is valid");
        assert_eq!((config.process, config.members.len()), (0, 3));
        assert_eq!(config.order, OrderKind::Skeen);
        assert_eq!(config.find("total").map(|one| one.id), Some(2));
        assert_eq!(config.find("2").map(|one| one.id), Some(2));
        let config = parse(&example()).expect("the example is valid");
        assert_eq!(config.variables[1].kind, ValueKind::Bytes);
        assert!(matches!(config.members[1].address, Address::Unix(_)));
    }

    /// Each offence changes one thing of the example and has to be named.
    #[test]
    fn offences_are_named() {
        for (from, to, said) in [
            ("process = 0 ", "process = 9 ", "process 9 is not among"),
            (
                "id = 1, address",
                "id = 0, address",
                "two entries have id 0",
            ),
            (
                "name = \"label\"",
                "name = \"price\"",
                "two entries have name price",
            ),
            ("{ id = 1, name", "{ id = 0, name", "two entries have id 0"),
            (
                "subscribers = [0, 1] },\n   { id = 1",
                "subscribers = [] },\n   { id = 1",
                "no subscribers",
            ),
            (
                "type = \"i64\", subscribers = [0, 1]",
                "type = \"i64\", subscribers = [0, 7]",
                "process 7",
            ),
            ("type = \"bytes\"", "type = \"float\"", "float"),
            ("127.0.0.1", "10.0.0.1", "insecure = true"),
            ("tcp://127.0.0.1:7500", "127.0.0.1:7500", "tcp://HOST:PORT"),
            (
                "tcp://127.0.0.1:7500",
                "tcp://127.0.0.1:99999",
                "tcp://HOST:PORT",
            ),
            ("session = 1 ", "session = 0 ", "must be within"),
            (
                "order = \"skeen\" ",
                "order = \"etcd\" ",
                "[variables.etcd]",
            ),
            ("order = \"skeen\" ", "order = \"paxos\" ", "paxos"),
            ("strict = false", "stirct = false", "stirct"),
        ] {
            let text = example();
            assert!(text.contains(from), "{from}");
            let error = parse(&text.replace(from, to)).expect_err(to);
            assert!(error.contains(said), "{to}: {error}");
        }
    }

    /// Time in the square of their number would be minutes.
    #[test]
    fn as_many_variables_as_there_may_be_are_checked_at_once() {
        let begun = std::time::Instant::now();
        let mut config = VariablesConfig::new(0).member(0, Address::Unix("/a".into()));
        for id in (0..limits::MAX_VARIABLES as u32).rev() {
            let name = format!("v{id}").parse().expect("a name");
            config = config.variable(id, name, ValueKind::I64, [0]);
        }
        config.check().expect("valid");
        let took = begun.elapsed();
        assert!(took < std::time::Duration::from_secs(20), "{took:?}");
        let name = "one-more".parse().expect("a name");
        let more = config.variable(u32::MAX, name, ValueKind::I64, [0]).check();
        assert!(matches!(more, Err(VariablesError::Bounds { .. })));
    }

    #[test]
    fn addresses_are_read_and_said_alike() {
        for text in ["tcp://[::1]:7", "tcp://localhost:80", "unix:/run/a.sock"] {
            let address: Address = text.parse().expect(text);
            assert_eq!(address.to_string(), text);
            assert!(!address.is_exposed(), "{text}");
        }
        for text in ["tcp://0.0.0.0:7", "tcp://example.org:80", "tcp://[::]:1"] {
            let address: Address = text.parse().expect(text);
            assert!(address.is_exposed(), "{text}");
        }
        let long = format!("unix:/{}", "x".repeat(107));
        for text in ["", "unix:", "tcp://:1", "tcp://a", long.as_str()] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_cluster_is_asked_for_where_it_is_needed() {
        let with = |endpoints: &str| {
            let text = example().replace("order = \"skeen\"", "order = \"etcd\"");
            parse(&format!(
                "{text}\n[variables.etcd]\nendpoints = {endpoints}\n"
            ))
        };
        let config = with("[\"http://127.0.0.1:2379\"]").expect("valid");
        let etcd = config.etcd.expect("the table was read");
        assert_eq!(etcd.prefix(), "/uffd-sync/variables/");
        assert!(with("[]").is_err());
        for (line, said) in [
            (
                "user = \"a\"",
                "etcd.user and etcd.password_file go together",
            ),
            (
                "password_file = \"/a\"",
                "etcd.user and etcd.password_file go together",
            ),
            ("key = \"/a\"", "etcd.cert and etcd.key go together"),
            ("ca = \"/a\"", "nothing would be encrypted"),
            (
                "timeout_ms = 9",
                "etcd.timeout_ms = 9: must be within 10 ..= 60000",
            ),
            ("timeout_ms = 60001", "must be within"),
        ] {
            let error = with(&format!("[\"http://127.0.0.1:2379\"]\n{line}")).expect_err(line);
            assert!(error.contains(said), "{line}: {error}");
        }
        let both = "ca = \"/a\"\ncert = \"/b\"\nkey = \"/c\"\ntimeout_ms = 60000";
        with(&format!("[\"https://127.0.0.1:2379\"]\n{both}")).expect("valid");
        assert!(
            with("[\"127.0.0.1:2379\"]")
                .expect_err("no scheme")
                .contains("http://")
        );
    }
}
