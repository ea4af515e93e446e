//! What ordered variables cost: `cargo bench --bench ordered`.
//!
//! | cases | against | goal |
//! |---|---|---|
//! | `write-skeen/3` | a bare fan-out to two peers and back, same sockets, same hand-offs | <= 1.5x |
//! | `write-*`, `cas-*` with 2, 3, 5 processes | the same with as many peers | none |
//! | `throughput-*` with 1, 16, 64 in flight | the same in flight over the bare fan-out | none |
//! | `contention/5` | compare-and-swap by one process alone | none |
//! | `etcd-fsync`, `etcd-no-fsync` | one etcd node, a put over its kept connection | >= 5x less; none |
//! | `redis`, `nats` | SET and WAIT 1 with one replica; a key-value put of JetStream | none |
//!
//! Each process is one of its own, this program started anew; the initiator is the bench
//! itself. All connections are TCP over loopback. A write ends when its initiator
//! delivered it, which needs an answer of every other subscriber.

#[path = "ordered/bare.rs"]
mod bare;
#[path = "ordered/contention.rs"]
mod contention;
mod harness;
#[path = "ordered/members.rs"]
mod members;
#[path = "ordered/peers.rs"]
mod peers;
#[path = "ordered/single.rs"]
mod single;
#[path = "ordered/throughput.rs"]
mod throughput;

use harness::{Group, Role};

fn main() -> std::process::ExitCode {
    let groups = [
        Group::of(single::CASES_TWO, single::run_two),
        Group::of(single::CASES_THREE, single::run_three),
        Group::of(single::CASES_FIVE, single::run_five),
        Group::of(throughput::CASES, throughput::run),
        Group::of(contention::CASES, contention::run),
        Group::of(peers::CASES, peers::run),
    ];
    let roles = [
        Role::of(bare::ROLE, bare::serve),
        Role::of(members::ROLE, members::serve),
    ];
    harness::run("ordered", &groups, &roles)
}
