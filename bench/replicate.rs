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
    let group = |cases, run| Group {
        cases,
        only_all: false,
        run,
    };
    let groups = [
        group(commit::CASES_FREE, commit::run_free),
        group(commit::CASES_TWO_CORES, commit::run_two_cores),
        group(bulk::CASES, bulk::run),
        Group {
            cases: bulk::CASES_LARGE,
            only_all: true,
            run: bulk::run_large,
        },
        group(bulk::CASES_FIRST, bulk::run_first),
        group(one_percent::CASES, one_percent::run),
        group(wire::CASES, wire::run),
        group(neighbour::CASES, neighbour::run),
    ];
    let roles = [
        Role {
            name: nodes::ROLE,
            run: nodes::serve,
        },
        Role {
            name: watch::ROLE,
            run: watch::serve,
        },
        Role {
            name: chain::ROLE_SOURCE,
            run: chain::serve_source,
        },
        Role {
            name: chain::ROLE_REPLICA,
            run: chain::serve_replica,
        },
        Role {
            name: chain::ROLE_READER,
            run: chain::serve_reader,
        },
        Role {
            name: sink::ROLE,
            run: sink::serve,
        },
    ];
    harness::run("replicate", &groups, &roles)
}
