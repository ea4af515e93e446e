//! What tracking costs: `cargo bench --bench track`.
//!
//! | cases | against | goal |
//! |---|---|---|
//! | `first-store` | the bare kernel's fault, mprotect + SIGSEGV, no tracking | <= 1.1x, >= 4x less |
//! | `find-100-of-1GiB` | bare `PAGEMAP_SCAN`, comparing 1 GiB | <= 1.2x, >= 100x less |
//! | `capture` | memcpy of the same pages, cold | >= 0.4x its speed sparse, >= 0.25x all bytes |
//! | `hot-store` | the page armed again at each capture | >= 10x less |
//! | `throughput-random`, by pause between captures | the same stores untracked | >= 0.7x at the default |
//! | `sync-fault` | a bare thread that reads faults and lifts, same cores | <= 1.15x |
//! | `sync-stall`: longest store during a cut | one bare pass over everything | 1 GiB, 3 % hot: >= 8x less |
//! | `sync-cut`: a cut of 1 GiB | one of 64 MiB with as many pages dirtied | <= 2x |
//! | `clean-scan-1GiB`, `idle` | a bare scan, a node without regions | none |
#![allow(
    unsafe_code,
    reason = "stores through raw pointers, bare system calls, and a signal handler as baselines"
)]

#[path = "track/capture.rs"]
mod capture;
#[path = "track/find.rs"]
mod find;
#[path = "track/first_store.rs"]
mod first_store;
mod harness;
#[path = "track/hot.rs"]
mod hot;
#[path = "track/idle.rs"]
mod idle;
#[path = "track/memory.rs"]
mod memory;
#[path = "track/segv.rs"]
mod segv;
#[path = "track/sync.rs"]
mod sync;
#[path = "track/throughput.rs"]
mod throughput;
#[path = "track/tracked.rs"]
mod tracked;

use harness::{Group, Role};

fn main() -> std::process::ExitCode {
    let groups = [
        Group::of(first_store::CASES, first_store::run),
        Group::of(find::CASES, find::run),
        Group::of(capture::CASES, capture::run),
        Group::of(hot::CASES, hot::run),
        Group::of(throughput::CASES, throughput::run),
        Group::of(sync::FAULT_CASES, sync::run_faults),
        Group::of(sync::STALL_CASES, sync::run_stalls),
        Group::of(sync::CUT_CASES, sync::run_cuts),
        Group::of(idle::CASES, idle::run),
    ];
    let roles = [Role::of(idle::ROLE, idle::serve)];
    harness::run("track", &groups, &roles)
}
