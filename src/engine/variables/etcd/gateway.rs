//! Requests to an etcd cluster through its JSON gateway, endpoints in turn.
//!
//! ```text
//! txn, range, watch --> JSON, base64 --> POST /v3/... --> first endpoint that answers
//! ```
//!
//! - I1: what comes back is bounded ([`limits::MAX_CLUSTER_ANSWER`] per message) before
//!   it is parsed.
//! - I2: an error says whether the request may have been carried out; callers decide by
//!   the operation's mark whether it was (the module above).

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Value as Json, json};
use ureq::Agent;
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use super::super::config::EtcdConfig;
use crate::limits;

/// How long an endpoint may take to take a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);

/// A request to the cluster that failed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A file for TLS or the password cannot be used.
    #[error("{what} {path}: cannot be used", path = path.display())]
    File {
        /// What it is for.
        what: &'static str,
        /// Its path.
        path: std::path::PathBuf,
        /// What is wrong.
        #[source]
        source: std::io::Error,
    },
    /// A PEM file without what it has to hold.
    #[error("{what} {path}: holds none", path = path.display())]
    Pem {
        /// What was looked for.
        what: &'static str,
        /// The file.
        path: std::path::PathBuf,
    },
    /// The endpoint did not answer, or not to the end.
    #[error("{endpoint} does not answer")]
    Silent {
        /// Which one.
        endpoint: Box<str>,
        /// What went wrong.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The connection ended in the middle of an answer.
    #[error("{endpoint} broke off")]
    BrokeOff {
        /// Which one.
        endpoint: Box<str>,
        /// What went wrong.
        #[source]
        source: std::io::Error,
    },
    /// The cluster refused.
    #[error("{endpoint} refused with status {status}: {message}")]
    Refused {
        /// Which one.
        endpoint: Box<str>,
        /// HTTP status.
        status: u16,
        /// What it said, shortened.
        message: Box<str>,
    },
    /// The answer is none.
    #[error("the answer of {endpoint} cannot be read")]
    Answer {
        /// Which one.
        endpoint: Box<str>,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// A key with its value, as a range or a watch says it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct KeyValue {
    #[serde(deserialize_with = "bytes")]
    pub(super) key: Vec<u8>,
    #[serde(deserialize_with = "bytes")]
    pub(super) value: Vec<u8>,
    #[serde(deserialize_with = "number")]
    pub(super) mod_revision: u64,
    #[serde(deserialize_with = "number")]
    pub(super) version: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Header {
    #[serde(deserialize_with = "number")]
    pub(super) revision: u64,
}

/// Answer to a range.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Range {
    pub(super) header: Header,
    pub(super) kvs: Vec<KeyValue>,
}

/// Answer to a transaction.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Txn {
    pub(super) header: Header,
    pub(super) succeeded: bool,
    pub(super) responses: Vec<Part>,
}

/// Answer to a put.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Put {
    pub(super) prev_kv: Option<KeyValue>,
}

/// One part of a transaction's answer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Part {
    pub(super) response_range: Option<Range>,
    pub(super) response_put: Option<Put>,
    pub(super) response_txn: Option<Txn>,
}

/// One change that a watch tells.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Change {
    /// `DELETE`, or nothing for a put.
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) kv: KeyValue,
}

/// One message of a watch.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Watched {
    pub(super) header: Header,
    pub(super) created: bool,
    pub(super) canceled: bool,
    #[serde(deserialize_with = "number")]
    pub(super) compact_revision: u64,
    pub(super) events: Vec<Change>,
}

#[derive(Deserialize)]
struct Line {
    result: Option<Watched>,
    #[serde(default)]
    error: Option<Json>,
}

#[derive(Deserialize)]
struct Token {
    token: String,
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

/// The gateway writes 64-bit numbers as text.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}

pub(super) fn encoded(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// A connection pool to the cluster, usable from any thread.
pub(super) struct Gateway {
    agent: Agent,
    endpoints: Vec<String>,
    /// The endpoint that answered last.
    current: AtomicUsize,
    login: Option<(String, String)>,
    token: Mutex<Option<String>>,
    timeout: Duration,
}

impl Gateway {
    /// Reads the files for TLS and the password; connects to nothing yet.
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, ClusterError> {
        let mut tls = TlsConfig::builder();
        if let Some(path) = &config.ca {
            let roots = certificates("etcd.ca", path)?;
            tls = tls.root_certs(RootCerts::new_with_certs(&roots));
        }
        if let (Some(cert), Some(key)) = (&config.cert, &config.key) {
            let chain = certificates("etcd.cert", cert)?;
            let pem = read("etcd.key", key)?;
            let private = PrivateKey::from_pem(&pem).map_err(|_| ClusterError::Pem {
                what: "etcd.key",
                path: key.clone(),
            })?;
            tls = tls.client_cert(Some(ClientCert::new_with_certs(&chain, private)));
        }
        let login = match (&config.user, &config.password_file) {
            (Some(user), Some(path)) => {
                let text = String::from_utf8_lossy(&read("etcd.password_file", path)?).into_owned();
                let password = text.lines().next().unwrap_or_default().to_owned();
                Some((user.clone(), password))
            }
            _ => None,
        };
        let timeout = Duration::from_millis(config.timeout_ms.unwrap_or(1_000));
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_DEADLINE.min(timeout)))
            .tls_config(tls.build())
            .max_redirects(0)
            .proxy(None)
            .no_delay(true)
            .build()
            .new_agent();
        Ok(Self {
            agent,
            endpoints: config.endpoints.clone(),
            current: AtomicUsize::new(0),
            login,
            token: Mutex::new(None),
            timeout,
        })
    }

    /// Number of endpoints.
    pub(super) fn endpoints(&self) -> usize {
        self.endpoints.len()
    }

    /// Turns to the endpoint after the one that failed.
    pub(super) fn turn_away(&self, failed: usize) {
        // Only a hint: whoever comes late finds that another thread has turned already.
        let next = (failed + 1) % self.endpoints.len();
        let _ = self
            .current
            .compare_exchange(failed, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    pub(super) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Reads keys from `key` to before `end`, or `key` alone; linearisable.
    pub(super) fn range(&self, key: &[u8], end: Option<&[u8]>) -> Result<Range, ClusterError> {
        let mut body = json!({ "key": encoded(key) });
        if let Some(end) = end {
            body["range_end"] = encoded(end).into();
        }
        self.call("/v3/kv/range", &body)
    }

    pub(super) fn txn(&self, body: &Json) -> Result<Txn, ClusterError> {
        self.call("/v3/kv/txn", body)
    }

    /// One request to the endpoint whose turn it is.
    fn call<T: DeserializeOwned>(&self, path: &str, body: &Json) -> Result<T, ClusterError> {
        let at = self.current();
        let answer = self
            .send(at, path, body, self.timeout, true)
            .and_then(|reader| {
                let mut text = Vec::new();
                reader
                    .take(limits::MAX_CLUSTER_ANSWER)
                    .read_to_end(&mut text)
                    .map_err(|source| self.broke_off(at, source))?;
                self.parse(at, &text)
            });
        if answer.is_err() {
            self.turn_away(at);
        }
        answer
    }

    fn send(
        &self,
        at: usize,
        path: &str,
        body: &Json,
        timeout: Duration,
        whole: bool,
    ) -> Result<impl Read + use<>, ClusterError> {
        let mut tries = 0;
        loop {
            let token = self.token(at)?;
            let mut request = self
                .agent
                .post(format!("{}{path}", self.endpoints[at]))
                .header("content-type", "application/json")
                // A member without a leader answers so instead of keeping silent.
                .header("grpc-metadata-hasleader", "true");
            if let Some(token) = &token {
                request = request.header("authorization", token);
            }
            let request = request
                .config()
                .timeout_global(whole.then_some(timeout))
                .timeout_recv_response(Some(timeout))
                .timeout_per_read(Some(timeout))
                .build();
            let answer = request
                .send(body.to_string())
                .map_err(|source| ClusterError::Silent {
                    endpoint: self.endpoints[at].as_str().into(),
                    source: Box::new(source),
                })?;
            let status = answer.status().as_u16();
            let reader = answer.into_body().into_with_config().limit(u64::MAX);
            if status == 200 {
                return Ok(reader.reader());
            }
            let mut said = String::new();
            // What cannot be read of a refusal is not said.
            let _ = reader.reader().take(300).read_to_string(&mut said);
            tries += 1;
            if token.is_some() && tries == 1 && said.contains("auth token") {
                *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
                continue;
            }
            return Err(ClusterError::Refused {
                endpoint: self.endpoints[at].as_str().into(),
                status,
                message: said.into(),
            });
        }
    }

    /// The token of the configured user; asked for once, and again when it has run out.
    fn token(&self, at: usize) -> Result<Option<String>, ClusterError> {
        let Some((name, password)) = &self.login else {
            return Ok(None);
        };
        let mut token = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if token.is_none() {
            let endpoint = || self.endpoints[at].as_str().into();
            let answer = self
                .agent
                .post(format!("{}/v3/auth/authenticate", self.endpoints[at]))
                .config()
                .timeout_global(Some(self.timeout))
                .build()
                .send(json!({ "name": name, "password": password }).to_string());
            let mut answer = answer.map_err(|source| ClusterError::Silent {
                endpoint: endpoint(),
                source: Box::new(source),
            })?;
            let status = answer.status().as_u16();
            let text = answer.body_mut().read_to_vec().unwrap_or_default();
            if status != 200 {
                return Err(ClusterError::Refused {
                    endpoint: endpoint(),
                    status,
                    message: String::from_utf8_lossy(&text[..text.len().min(300)]).into(),
                });
            }
            *token = Some(self.parse::<Token>(at, &text)?.token);
        }
        Ok(token.clone())
    }

    /// Watches all keys from `key` to before `end`, from `revision` on; an end of the
    /// stream or a silence longer than `silence` is an error.
    pub(super) fn watch(
        &self,
        (key, end): (&[u8], &[u8]),
        revision: u64,
        silence: Duration,
    ) -> Result<Watch, ClusterError> {
        let at = self.current();
        let body = json!({ "create_request": {
            "key": encoded(key), "range_end": encoded(end),
            "start_revision": revision.to_string(),
        }});
        match self.send(at, "/v3/watch", &body, silence, false) {
            Ok(reader) => Ok(Watch {
                reader: BufReader::new(Box::new(reader)),
                endpoint: at,
            }),
            Err(error) => {
                self.turn_away(at);
                Err(error)
            }
        }
    }

    /// The next message of a watch.
    pub(super) fn next(&self, watch: &mut Watch) -> Result<Watched, ClusterError> {
        let mut line = Vec::new();
        let read = (&mut watch.reader)
            .take(limits::MAX_CLUSTER_ANSWER)
            .read_until(b'\n', &mut line);
        let at = watch.endpoint;
        if read.map_err(|source| self.broke_off(at, source))? == 0 {
            return Err(self.broke_off(at, std::io::ErrorKind::UnexpectedEof.into()));
        }
        let line: Line = self.parse(at, &line)?;
        line.result.ok_or_else(|| ClusterError::Refused {
            endpoint: self.endpoints[at].as_str().into(),
            status: 200,
            message: line.error.unwrap_or_default().to_string().into(),
        })
    }

    fn parse<T: DeserializeOwned>(&self, at: usize, text: &[u8]) -> Result<T, ClusterError> {
        serde_json::from_slice(text).map_err(|source| ClusterError::Answer {
            endpoint: self.endpoints[at].as_str().into(),
            source,
        })
    }

    fn broke_off(&self, at: usize, source: std::io::Error) -> ClusterError {
        ClusterError::BrokeOff {
            endpoint: self.endpoints[at].as_str().into(),
            source,
        }
    }
}

/// A watch under way.
pub(super) struct Watch {
    reader: BufReader<Box<dyn Read + Send>>,
    pub(super) endpoint: usize,
}

impl ClusterError {
    /// Whether the watch only was silent for as long as it may be.
    pub(super) fn is_silence(&self) -> bool {
        match self {
            Self::BrokeOff { source, .. } => matches!(
                source.kind(),
                std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock
            ),
            _ => false,
        }
    }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, ClusterError> {
    fs::read(path).map_err(|source| ClusterError::File {
        what,
        path: path.to_owned(),
        source,
    })
}

fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<Certificate<'static>>, ClusterError> {
    let pem = read(what, path)?;
    let found: Vec<_> = ureq::tls::parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        let path = path.to_owned();
        return Err(ClusterError::Pem { what, path });
    }
    Ok(found)
}
