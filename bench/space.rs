//! What an address space costs: `cargo bench --bench space`.
//!
//! | cases | against | goal |
//! |---|---|---|
//! | `read-4k/*`, `write-4k/*`: one client, one at a time | a bare echo of the same bytes over the same socket | >= 0.85x its rate |
//! | the same, `/redis` | Redis GETRANGE and SETRANGE over the same socket | >= 1x its rate |
//! | `read-4k-16/*`, `write-4k-16/*`: 16 in flight, `/redis` | Redis with as many in flight | >= 1.5x its rate |
//! | the same, `/looking-echo` | the echo, both of whose sides look for bytes before they sleep, as ours do | none |
//! | 8 B, 1 MiB, 64 in flight, 32 clients | the same peers | none |
//! | `mapped-*`: reads from a segment on this host | memcpy of as many bytes | <= 1.5x its time |
//! | `written-*`: writes to a segment on this host, with `local_writers` | memcpy of as many bytes | none |
//! | `servers-2`, `servers-3` | one server | none |
//! | `nbd-read-4k`, `nbd-write-4k`: `fio`, one at a time | the same job, nbdkit's memory plugin | <= 1.1x its time |
//! | `nbd-*-32`: 32 in flight | the same | >= 1x its rate, unless `fio` is at 90 % of a processor |
//! | `nbd-*/qemu-nbd` | the same, qemu-nbd | none |
//! | `udp-8` | UDP for 8-byte reads, a bare echo over TCP | none |
//!
//! Servers are `uffd-sync serve --space` processes, as users run them; the echo is a
//! process of this program, Redis one of its own. Where one client is measured it has a
//! core and the server the other one; elsewhere the kernel places them. TCP is over
//! loopback. Bytes that come back are compared with those that were written.

#[path = "space/echo.rs"]
mod echo;
mod harness;
#[path = "space/line.rs"]
mod line;
#[path = "space/mapped.rs"]
mod mapped;
#[path = "space/nbd.rs"]
mod nbd;
#[path = "space/one.rs"]
mod one;
#[path = "space/redis.rs"]
mod redis;
#[path = "space/servers.rs"]
mod servers;
#[path = "space/several.rs"]
mod several;
#[path = "space/udp.rs"]
mod udp;
#[path = "space/work.rs"]
mod work;
#[path = "space/written.rs"]
mod written;

use harness::{Group, Role};

fn main() -> std::process::ExitCode {
    let groups = [
        Group::of(one::CASES, one::run),
        Group::of(several::CLIENTS, several::run_clients),
        Group::of(several::SERVERS, several::run_servers),
        Group::of(mapped::CASES, mapped::run),
        Group::of(written::CASES, written::run),
        Group::of(udp::CASES, udp::run),
        Group::of(nbd::CASES, nbd::run),
    ];
    let roles = [
        Role::of(echo::ROLE, echo::serve),
        Role::of(udp::ROLE, udp::serve),
    ];
    harness::run("space", &groups, &roles)
}
