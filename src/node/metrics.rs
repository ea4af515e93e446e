//! `--metrics ADDR`: the status as Prometheus text at `/metrics`.
//!
//! The HTTP server (crate `tiny_http`) has threads of its own; it asks the engine
//! for its status by a command, and never touches the loop's data.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::engine::Commands;
use crate::wire::control::{NodeStatus, SpaceStatus};

/// How long a scrape waits for the engine.
const STATUS_DEADLINE: Duration = Duration::from_secs(2);

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The address cannot be taken.
    #[error("cannot serve metrics on {addr}: {reason}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What the server said.
        reason: Box<str>,
    },
    /// No thread.
    #[error("cannot start the thread that serves metrics")]
    Thread(#[source] std::io::Error),
}

/// A running server; ends when dropped.
pub(super) struct Server {
    http: Arc<tiny_http::Server>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("addr", &self.http.server_addr())
            .finish()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.http.unblock();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Serves metrics on `addr`, if there is one.
pub(super) fn serve(
    addr: Option<SocketAddr>,
    commands: &Commands,
) -> Result<Option<Server>, MetricsError> {
    let Some(addr) = addr else { return Ok(None) };
    let http = tiny_http::Server::http(addr).map_err(|error| MetricsError::Listen {
        addr,
        reason: error.to_string().into(),
    })?;
    let http = Arc::new(http);
    let (server, commands) = (Arc::clone(&http), commands.clone());
    let body = move || {
        for request in server.incoming_requests() {
            answer(request, &commands);
        }
    };
    let thread = std::thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(body);
    let thread = Some(thread.map_err(MetricsError::Thread)?);
    tracing::info!(addr = %http.server_addr(), "metrics at /metrics");
    Ok(Some(Server { http, thread }))
}

fn answer(request: tiny_http::Request, commands: &Commands) {
    let reply = if *request.method() != tiny_http::Method::Get || request.url() != "/metrics" {
        tiny_http::Response::from_string("only GET /metrics is served here\n").with_status_code(404)
    } else {
        match commands.status(STATUS_DEADLINE) {
            Some(status) => tiny_http::Response::from_string(text(&status)).with_header(
                "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8"
                    .parse::<tiny_http::Header>()
                    .expect("a constant header"),
            ),
            None => tiny_http::Response::from_string("the engine does not answer\n")
                .with_status_code(503),
        }
    };
    if let Err(error) = request.respond(reply) {
        tracing::debug!(%error, "a scrape was given up");
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SpaceLabels {
    server: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RegionLabels {
    region: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LossLabels {
    region: String,
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReplicaLabels {
    region: String,
    node: String,
}

/// Every figure of the status that changes, in OpenMetrics text.
fn text(status: &NodeStatus) -> String {
    let mut registry = Registry::with_prefix("uffd_sync");
    let plain = [
        (
            "uptime_milliseconds",
            "Time since the node started",
            status.uptime_ms,
        ),
        ("resident_bytes", "Memory of the process", status.rss_bytes),
        (
            "connections",
            "Open connections of all kinds",
            status.connections,
        ),
        ("sent_bytes", "Bytes sent to other nodes", status.bytes_sent),
        (
            "received_bytes",
            "Bytes received from other nodes",
            status.bytes_received,
        ),
        ("turns", "Turns of the loop", status.turns),
        (
            "longest_turn_microseconds",
            "Longest turn since the last look",
            status.longest_turn_us,
        ),
    ];
    for (name, help, value) in plain {
        let gauge = Gauge::<u64, AtomicU64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    }
    if let Some(space) = &status.space {
        space_figures(&mut registry, space);
    }
    region_figures(&mut registry, status);
    loss_figures(&mut registry, status);
    replica_figures(&mut registry, status);
    let mut out = String::new();
    match encode(&mut out, &registry) {
        Ok(()) => out,
        Err(error) => format!("# the metrics cannot be written: {error}\n"),
    }
}

fn space_figures(registry: &mut Registry, space: &SpaceStatus) {
    let writers = space.local_writers.clone().unwrap_or_default();
    let figures = [
        ("clients", "Clients of the segment", space.clients),
        (
            "local_writers",
            "Clients that write the segment by mapping",
            writers.writing,
        ),
        (
            "local_writers_killed",
            "Clients killed for staying at a stripe which others waited for",
            writers.killed,
        ),
        (
            "stripes_taken_over",
            "Stripes taken from clients that may have been in the middle of a change",
            writers.taken_over,
        ),
        ("operations", "Operations carried out", space.operations),
        ("refused", "Operations refused", space.refused),
        (
            "read_bytes",
            "Bytes copied out of the segment",
            space.read_bytes,
        ),
        (
            "written_bytes",
            "Bytes changed in the segment",
            space.written_bytes,
        ),
        (
            "unacknowledged",
            "Replies that went without a replica's acknowledgement",
            space.unacknowledged,
        ),
        ("turned_away", "Clients turned away", space.turned_away),
        (
            "broken",
            "Connections ended for what they sent",
            space.broken,
        ),
        (
            "log_dropped",
            "Operations that the log had no room for",
            space.log_dropped,
        ),
    ];
    for (name, help, value) in figures {
        let family = Family::<SpaceLabels, Gauge<u64, AtomicU64>>::default();
        registry.register(format!("space_{name}"), help, family.clone());
        let server = space.server.clone();
        family.get_or_create(&SpaceLabels { server }).set(value);
    }
}

fn region_figures(registry: &mut Registry, status: &NodeStatus) {
    let family = |registry: &mut Registry, name: &str, help: &str| {
        let family = Family::<RegionLabels, Gauge<u64, AtomicU64>>::default();
        registry.register(name, help, family.clone());
        family
    };
    let epoch = family(registry, "region_epoch", "Last epoch of the region");
    let size = family(registry, "region_size_bytes", "Size of the region");
    let resident = family(
        registry,
        "region_resident_bytes",
        "Memory that its data takes",
    );
    let changed = family(
        registry,
        "region_changed_bytes",
        "Bytes changed by captures or updates",
    );
    let captures = family(registry, "region_captures", "Captures made");
    let compares = family(
        registry,
        "region_full_compares",
        "Comparisons after lost tracking",
    );
    let interval = family(
        registry,
        "region_interval_microseconds",
        "Pause between captures",
    );
    let hot = family(
        registry,
        "region_hot_pages",
        "Pages written in so many captures in a row that they are treated apart",
    );
    let hot_after = family(
        registry,
        "region_hot_after",
        "Captures in a row after which a page is hot",
    );
    let hot_share = family(
        registry,
        "region_hot_permille",
        "Share of the region's pages that are hot, in thousandths",
    );
    for region in &status.regions {
        let labels = RegionLabels {
            region: region.name.clone(),
        };
        if let Some(figures) = region.hot {
            hot.get_or_create(&labels).set(figures.pages);
            hot_after.get_or_create(&labels).set(figures.after);
            let permille = (1_000.0 * figures.share).round() as u64;
            hot_share.get_or_create(&labels).set(permille);
        }
        epoch.get_or_create(&labels).set(region.epoch);
        size.get_or_create(&labels).set(region.size);
        resident.get_or_create(&labels).set(region.resident_bytes);
        changed.get_or_create(&labels).set(region.bytes_changed);
        captures.get_or_create(&labels).set(region.captures);
        compares.get_or_create(&labels).set(region.full_compares);
        interval.get_or_create(&labels).set(region.interval_us);
    }
}

fn loss_figures(registry: &mut Registry, status: &NodeStatus) {
    let losses = Family::<LossLabels, Gauge<u64, AtomicU64>>::default();
    let last = Family::<LossLabels, Gauge<u64, AtomicU64>>::default();
    let rounds = Family::<RegionLabels, Gauge<u64, AtomicU64>>::default();
    registry.register(
        "region_losses",
        "Times that tracking was lost, by kind",
        losses.clone(),
    );
    registry.register(
        "region_last_loss_milliseconds",
        "Time of the last loss of a kind, since 1970",
        last.clone(),
    );
    registry.register(
        "region_audit_rounds",
        "Times that the audit compared the whole region",
        rounds.clone(),
    );
    for region in &status.regions {
        for loss in &region.losses {
            let labels = LossLabels {
                region: region.name.clone(),
                kind: loss.kind.as_str(),
            };
            losses.get_or_create(&labels).set(loss.count);
            last.get_or_create(&labels).set(loss.at_ms);
        }
        if let Some(audit) = &region.audit {
            let labels = RegionLabels {
                region: region.name.clone(),
            };
            rounds.get_or_create(&labels).set(audit.rounds);
        }
    }
}

fn replica_figures(registry: &mut Registry, status: &NodeStatus) {
    let lag = Family::<ReplicaLabels, Gauge<u64, AtomicU64>>::default();
    let pending = Family::<ReplicaLabels, Gauge<u64, AtomicU64>>::default();
    registry.register(
        "replica_lag_epochs",
        "Epochs a replica is behind",
        lag.clone(),
    );
    registry.register(
        "replica_pending_bytes",
        "Bytes not yet acknowledged",
        pending.clone(),
    );
    for region in &status.regions {
        for replica in &region.replicas {
            let labels = ReplicaLabels {
                region: region.name.clone(),
                node: replica.node.clone(),
            };
            lag.get_or_create(&labels).set(replica.lag_epochs);
            pending.get_or_create(&labels).set(replica.pending_bytes);
        }
    }
}
