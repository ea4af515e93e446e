//! Numbers under clients that read, write, add and exchange at once: each number's history
//! has to be that of one number.

use std::time::Instant;

use super::linear::{Asked, Call, is_linearisable};
use super::{PATIENT, WAYS, Way, client};
use crate::rng::Rng;
use crate::space::servers::Servers;

const SEGMENT: u64 = 1 << 20;

/// One client's calls on the numbers at `offsets`, as (number, call).
fn work(
    servers: &Servers,
    way: Way,
    offsets: &[u64],
    seed: u64,
    calls: u64,
    begun: Instant,
) -> Vec<(usize, Call)> {
    let mut rng = Rng::new(seed);
    let mut space = client(servers, way, PATIENT);
    let mut seen = vec![0; offsets.len()];
    let mut made = Vec::new();
    for at in 0..calls {
        let which = rng.below(offsets.len() as u64) as usize;
        let offset = offsets[which];
        let unique = seed << 32 | at;
        let asked = match rng.below(6) {
            0 => Asked::Write(unique),
            1 => Asked::Add(1 + rng.below(9)),
            2 => Asked::Exchange {
                expected: seen[which],
                new: unique,
            },
            _ => Asked::Read,
        };
        let begin = begun.elapsed().as_nanos() as u64;
        let found = match asked {
            Asked::Read => {
                let mut bytes = [0; 8];
                let read = space.read(offset, &mut bytes);
                read.map(|()| u64::from_le_bytes(bytes))
            }
            Asked::Write(new) => space.write(offset, &new.to_le_bytes()).map(|()| 0),
            Asked::Add(addend) => space.fetch_add(offset, addend),
            Asked::Exchange { expected, new } => {
                let exchanged = space.compare_exchange(offset, expected, new);
                exchanged.map(|found| found.unwrap_or_else(|other| other))
            }
        };
        let end = begun.elapsed().as_nanos() as u64;
        let found = found.expect("answered");
        seen[which] = found;
        let end = Some((end, found));
        made.push((which, Call { begin, end, asked }));
    }
    made
}

#[test]
fn numbers_are_linearisable_under_clients_of_every_kind() {
    let servers = Servers::start(3, SEGMENT, "");
    let offsets = [0, SEGMENT - 8, SEGMENT, 2 * SEGMENT + 65_528];
    let is_long = std::env::var_os("UFFD_SYNC_LONG").is_some_and(|long| long == "1");
    for round in 0..if is_long { 20 } else { 3 } {
        let initial: Vec<u64> = {
            let mut space = client(&servers, Way::Tcp, PATIENT);
            let number = |offset: &u64| space.fetch_add(*offset, 0).expect("asked");
            offsets.iter().map(number).collect()
        };
        let begun = Instant::now();
        let made: Vec<(usize, Call)> = std::thread::scope(|scope| {
            let (servers, offsets) = (&servers, &offsets);
            let clients: Vec<_> = (0..6)
                .map(|at| {
                    let seed = round * 100 + at + 1;
                    let way = WAYS[at as usize % WAYS.len()];
                    scope.spawn(move || work(servers, way, offsets, seed, 150, begun))
                })
                .collect();
            let ended = clients
                .into_iter()
                .map(|client| client.join().expect("ended"));
            ended.flatten().collect()
        });
        for (which, initial) in initial.into_iter().enumerate() {
            let of_it = made.iter().filter(|(at, _)| *at == which);
            let mut calls: Vec<Call> = of_it.map(|(_, call)| *call).collect();
            let judged = is_linearisable(&calls, initial);
            assert_eq!(
                judged,
                Some(true),
                "round {round}, number {which}: {calls:?}"
            );
            // The same history with one answer changed is none.
            let read = calls.iter_mut().find(|call| call.asked == Asked::Read);
            if let Some(Call {
                end: Some((_, found)),
                ..
            }) = read
            {
                *found ^= 1 << 63;
                assert_ne!(is_linearisable(&calls, initial), Some(true));
            }
        }
    }
}
