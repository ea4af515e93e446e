//! `durability = "replica"`, seen by the client library: servers are killed and filled again
//! from their replica, and clients go on as if a connection had been cut.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use uffd_sync::client::space::{Failure, Space};

use super::{PATIENT, Way, client};
use crate::nodes::{NodeProcess, await_that, folder};
use crate::space::servers::Servers;

const SEGMENT: u64 = 1 << 20;
const REPLICATED: &str = "durability = \"replica\"\n[limits]\ndeadline_ms = 4000\n";
/// Additions of one client.
const ADDITIONS: u64 = 400;
const CLIENTS: u64 = 4;

/// What a client was told of its additions to one number.
#[derive(Debug, Default)]
struct Told {
    done: u64,
    unknown: u64,
}

fn add(space: &mut Space, offset: u64, progress: &AtomicU64) -> Told {
    let mut told = Told::default();
    let until = Instant::now() + 3 * PATIENT;
    while told.done < ADDITIONS {
        assert!(Instant::now() < until, "{told:?}");
        match space.fetch_add(offset, 1) {
            Ok(_) => told.done += 1,
            Err(error) => match error.parts() {
                // Made, and there unless its server is lost before the replica has it.
                [part] if matches!(part.why, Failure::NotAcknowledged) => told.unknown += 1,
                _ if error.is_indeterminate() => told.unknown += 1,
                _ => panic!("{error}"),
            },
        }
        progress.fetch_add(1, Ordering::Relaxed);
    }
    told
}

#[test]
fn nothing_acknowledged_is_lost_and_no_loss_is_named() {
    let mut servers = Servers::planned(1, SEGMENT, REPLICATED);
    let host = servers.address(0);
    let listen = format!("{}:7422", host.split_once(':').expect("a port").0);
    servers.start_one(0, &["--listen", &listen]);
    let there = folder();
    let source = format!("tcp://{listen}/space-s0=copy");
    let replica = NodeProcess::follower(there.path(), "replica", &[source]);
    let recover = format!("tcp://{}/copy", replica.listen());
    let mut first = client(&servers, Way::Tcp, PATIENT);
    await_that("the replica to acknowledge", || {
        first.fill(SEGMENT - 8, 1, 1).is_ok()
    });
    let progress = AtomicU64::new(0);
    let told: Vec<Told> = std::thread::scope(|scope| {
        let progress = &progress;
        let threads: Vec<_> = (0..CLIENTS)
            .map(|at| {
                let way = if at % 2 == 0 { Way::Tcp } else { Way::Mapped };
                let mut space = client(&servers, way, PATIENT);
                // It knows this life of the segment before the server is killed.
                space.read(0, &mut [0; 8]).expect("read");
                scope.spawn(move || add(&mut space, at * 4096, progress))
            })
            .collect();
        for round in 1..3 {
            await_that("additions", || {
                progress.load(Ordering::Relaxed) > 100 * round
            });
            servers.kill(0);
            servers.start_one(0, &["--listen", &listen, "--recover", &recover]);
        }
        let ended = threads
            .into_iter()
            .map(|thread| thread.join().expect("no loss"));
        ended.collect()
    });
    for (at, Told { done, unknown }) in told.into_iter().enumerate() {
        let mut bytes = [0; 8];
        first
            .read(at as u64 * 4096, &mut bytes)
            .expect("the same life");
        let found = u64::from_le_bytes(bytes);
        assert!(
            (done..=done + unknown).contains(&found),
            "{found}: {done}, {unknown}"
        );
    }
}
