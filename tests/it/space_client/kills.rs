//! Servers killed and started again under load: the loss is named to every client, and no
//! client ever reads zeros for what was lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use uffd_sync::client::space::{Failure, Space, SpaceError};

use super::{PATIENT, WAYS, client};
use crate::space::servers::Servers;

const SEGMENT: u64 = 1 << 20;
const PATTERN: [u8; 64] = [0xA5; 64];

/// What one client met until its segment was said to be lost.
#[derive(Debug, Default)]
struct Met {
    reads: u64,
    writes: u64,
    unknown: u64,
}

fn is_lost(error: &SpaceError) -> bool {
    error.is_segment_lost()
}

/// Reads and writes on server `at` until it is told that the memory is lost.
fn until_lost(space: &mut Space, at: u64, begun: &AtomicU64) -> Met {
    let mut met = Met::default();
    let base = at * SEGMENT;
    let until = Instant::now() + 2 * PATIENT;
    loop {
        assert!(Instant::now() < until, "the loss was never named: {met:?}");
        let mut bytes = [1; 64];
        match space.read(base, &mut bytes) {
            Ok(()) => {
                assert_eq!(bytes, PATTERN, "read from a segment that is another one");
                met.reads += 1;
            }
            Err(error) if is_lost(&error) => return met,
            Err(error) => panic!("a read is asked again: {error}"),
        }
        match space.write(base + 4096, &PATTERN) {
            Ok(()) => met.writes += 1,
            Err(error) if is_lost(&error) => return met,
            Err(error) if error.is_indeterminate() => met.unknown += 1,
            Err(error) => panic!("{error}"),
        }
        begun.fetch_add(1, Ordering::Relaxed);
    }
}

/// Until each client has done a good deal.
fn await_work(begun: &[AtomicU64]) {
    crate::nodes::await_that("every client to work", || {
        begun.iter().all(|one| one.load(Ordering::Relaxed) > 30)
    });
}

fn killed_under_load(victims: &[usize]) {
    let mut servers = Servers::start(3, SEGMENT, "");
    let count = 2 * WAYS.len();
    let mut first = client(&servers, WAYS[0], PATIENT);
    for at in 0..3 {
        first.write(at * SEGMENT, &PATTERN).expect("written");
    }
    let begun: Vec<AtomicU64> = (0..count).map(|_| AtomicU64::new(0)).collect();
    let clients: Vec<Space> = (0..count)
        .map(|at| client(&servers, WAYS[at % WAYS.len()], PATIENT))
        .collect();
    std::thread::scope(|scope| {
        let begun = &begun;
        let threads: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(number, mut space)| {
                let victim = victims[number % victims.len()] as u64;
                scope.spawn(move || {
                    let met = until_lost(&mut space, victim, &begun[number]);
                    after_the_loss(&mut space, victim);
                    met
                })
            })
            .collect();
        await_work(begun);
        for victim in victims {
            servers.kill(*victim);
        }
        for victim in victims {
            servers.start_one(*victim, &[]);
        }
        for thread in threads {
            let met = thread.join().expect("each is told");
            assert!(met.reads > 0 && met.writes > 0, "{met:?}");
            // One operation at a time: at most the one that was under way.
            assert!(met.unknown <= 1, "{met:?}");
        }
    });
    // Those that were not killed have what they had.
    for at in (0..3).filter(|at| !victims.contains(at)) {
        let mut bytes = [0; 64];
        first.read(at as u64 * SEGMENT, &mut bytes).expect("read");
        assert_eq!(bytes, PATTERN);
    }
}

fn after_the_loss(space: &mut Space, victim: u64) {
    let base = victim * SEGMENT;
    let mut bytes = [1; 64];
    for _ in 0..3 {
        let told = space.read(base, &mut bytes).expect_err("still lost");
        assert!(is_lost(&told), "{told}");
        let told = space.fetch_add(base + 8192, 1).expect_err("still lost");
        assert!(is_lost(&told), "{told}");
    }
    // What lies on two servers is reported for the lost one only.
    if victim > 0 {
        let told = space.read(base - 8, &mut bytes).expect_err("in part");
        assert!(told.parts().iter().any(|part| {
            part.server.as_str() == format!("s{victim}")
                && matches!(part.why, Failure::SegmentLost { .. })
        }));
    }
    let name = format!("s{victim}");
    assert!(space.accept_loss(&name).expect("a server"));
    space.read(base, &mut bytes).expect("accepted");
    assert_eq!(bytes, [0; 64], "the new life, as it is");
}

#[test]
fn a_killed_server_is_named_to_every_client() {
    killed_under_load(&[1]);
}

#[test]
fn two_killed_at_once() {
    killed_under_load(&[0, 2]);
}

/// The signal takes effect on one thread after the other.
fn await_stopped(pid: u32) {
    crate::nodes::await_that("every thread to stand still", || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it is there");
        let mut stats = threads.map(|thread| {
            let stat = thread.expect("readable").path().join("stat");
            std::fs::read_to_string(stat).unwrap_or_default()
        });
        stats.all(|stat| {
            let state = stat.rsplit_once(") ").map(|(_, state)| state);
            state.is_some_and(|state| state.starts_with('T'))
        })
    });
}

#[test]
fn a_server_that_stands_still_costs_a_deadline_and_no_more() {
    let servers = Servers::start(2, SEGMENT, "");
    let mut space = client(&servers, super::Way::Unix, Duration::from_millis(300));
    space.write(0, &PATTERN).expect("written");
    space.write(SEGMENT, &PATTERN).expect("written");
    servers.server(0).signal(nix::sys::signal::Signal::SIGSTOP);
    await_stopped(servers.server(0).pid());
    let mut bytes = [0; 64];
    let told = space.read(0, &mut bytes).expect_err("stopped");
    assert!(matches!(
        told.parts()[0].why,
        Failure::TimedOut | Failure::Unreachable { .. }
    ));
    let told = space.write(SEGMENT - 8, &[1; 16]).expect_err("stopped");
    assert_eq!(told.parts().len(), 1, "{told}");
    let why = &told.parts()[0].why;
    let is_named = matches!(
        why,
        Failure::Indeterminate { .. } | Failure::Unreachable { .. }
    );
    assert!(is_named, "{why:?}");
    space
        .read(SEGMENT, &mut bytes)
        .expect("the other one goes on");
    servers.server(0).signal(nix::sys::signal::Signal::SIGCONT);
    let until = Instant::now() + PATIENT;
    while let Err(error) = space.read(0, &mut bytes) {
        assert!(Instant::now() < until, "{error}");
    }
    assert_eq!(bytes, PATTERN, "it is the same life");
}
