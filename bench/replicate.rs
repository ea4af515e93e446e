//! What replication costs: `cargo bench --bench replicate`.
//!
//! | cases | against | goal |
//! |---|---|---|
//! | `commit-manual`, `commit-async` | the bare chain of the same four processes | <= 1.5x; async: plus 1.2 bare scans |
//! | `all-pages` | a bare TCP stream into staging, one memcpy, the same checksum | >= 0.75x its speed |
//! | `first-sync` | a bare TCP stream into new memory, the same checksum | none |
//! | `one-percent` | whole dirty pages, the whole region | >= 50x fewer bytes, >= 2x and >= 100x less time |
//! | `wire` | whole dirty pages | none |
//! | `neighbour-commit-p99` | the same commit while nothing else goes on | <= 3x |
//!
//! Source node, replica node and reader are processes of their own, this program
//! started anew; the writer is the bench itself. `CLOCK_MONOTONIC` is the same for
//! all of them: a time ends in the process that sees the value.

#[path = "replicate/bulk.rs"]
mod bulk;
#[path = "replicate/chain.rs"]
mod chain;
#[path = "replicate/commit.rs"]
mod commit;
mod harness;
#[path = "replicate/neighbour.rs"]
mod neighbour;
#[path = "replicate/nodes.rs"]
mod nodes;
#[path = "replicate/one_percent.rs"]
mod one_percent;
#[path = "replicate/sink.rs"]
mod sink;
#[path = "replicate/watch.rs"]
mod watch;
#[path = "replicate/wire.rs"]
mod wire;

use harness::{Group, Role};

fn main() -> std::process::ExitCode {
    let groups = [
        Group::of(commit::CASES_FREE, commit::run_free),
        Group::of(commit::CASES_TWO_CORES, commit::run_two_cores),
        Group::of(bulk::CASES, bulk::run),
        Group {
            cases: bulk::CASES_LARGE,
            only_all: true,
            run: bulk::run_large,
        },
        Group::of(bulk::CASES_FIRST, bulk::run_first),
        Group::of(one_percent::CASES, one_percent::run),
        Group::of(wire::CASES, wire::run),
        Group::of(neighbour::CASES, neighbour::run),
    ];
    let roles = [
        Role::of(nodes::ROLE, nodes::serve),
        Role::of(watch::ROLE, watch::serve),
        Role::of(chain::ROLE_SOURCE, chain::serve_source),
        Role::of(chain::ROLE_REPLICA, chain::serve_replica),
        Role::of(chain::ROLE_READER, chain::serve_reader),
        Role::of(sink::ROLE, sink::serve),
    ];
    harness::run("replicate", &groups, &roles)
}
