//! Many clients of one server, and one client of many servers.

use crate::harness::{Options, Outcome, Rounds};
use crate::redis::{self, Redis};
use crate::servers::{Client, Servers};
use crate::work::{Bursts, Over, SEGMENT, Shape, Side, What};

const READ: &str = "clients-32-read-4k";
const WRITE: &str = "clients-32-write-4k";
pub(crate) const CLIENTS: &[&str] = &[READ, WRITE];
const COUNT: usize = 32;

const TWO: &str = "servers-2-read-4k-16";
const THREE: &str = "servers-3-read-4k-16";
pub(crate) const SERVERS: &[&str] = &[TWO, THREE];

/// The sum of the rates of all sides, each on a thread of its own.
fn rate_of_all<S: Side + Send>(
    options: &Options,
    shape: Shape,
    sides: &mut [S],
) -> anyhow::Result<f64> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = sides
            .iter_mut()
            .map(|side| scope.spawn(move || Bursts::new(options, shape).rate(side)))
            .collect();
        let mut sum = 0.0;
        for thread in threads {
            let rate = thread.join();
            sum += rate.map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(sum)
    })
}

pub(crate) fn run_clients(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    let servers = Servers::start(1)?;
    for (name, what) in [(READ, What::Read), (WRITE, What::Write)] {
        let shape = Shape {
            what,
            len: 4096,
            depth: 1,
        };
        let baseline = "Redis with as many clients";
        if !redis::is_installed() {
            let reason = "redis-server is not installed";
            outcomes.push(Outcome::not_run(name, baseline, reason));
            continue;
        }
        let redis = Redis::start()?;
        let mut ours: Vec<_> = (0..COUNT)
            .map(|_| Client::new(&servers, Over::Unix, 0))
            .collect::<Result<_, _>>()?;
        let mut theirs: Vec<_> = (0..COUNT)
            .map(|_| redis.connect(Over::Unix))
            .collect::<Result<_, _>>()?;
        let rounds = Rounds::run(options, 2, |variant, _| match variant {
            0 => rate_of_all(options, shape, &mut ours),
            _ => rate_of_all(options, shape, &mut theirs),
        })?;
        let peer = (baseline, rounds.of(1));
        outcomes.push(Outcome::times(name, "op/s", rounds.of(0), peer));
    }
    servers.verify()?;
    Ok(outcomes)
}

/// One thread for each server, 16 reads in flight.
pub(crate) fn run_servers(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let servers = Servers::start(3)?;
    let shape = Shape {
        what: What::Read,
        len: 4096,
        depth: 16,
    };
    let mut clients: Vec<_> = (0..3)
        .map(|at| Client::new(&servers, Over::Unix, at * SEGMENT))
        .collect::<Result<_, _>>()?;
    let rounds = Rounds::run(options, 3, |variant, _| {
        rate_of_all(options, shape, &mut clients[..variant + 1])
    })?;
    servers.verify()?;
    let one = ("one server", rounds.of(0));
    Ok(vec![
        Outcome::times(TWO, "op/s", rounds.of(1), one),
        Outcome::times(THREE, "op/s", rounds.of(2), one),
    ])
}
