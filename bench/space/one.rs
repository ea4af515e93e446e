//! One client and one server: sizes, depths, sockets; against a bare echo and Redis.

use crate::echo::Echo;
use crate::harness::{Goal, Options, Outcome, Rounds};
use crate::line::Waits;
use crate::redis::{self, Redis};
use crate::servers::{Client, PLACEMENT, Servers, on_their_core};
use crate::work::{Bursts, Over, Shape, Side, What};

struct Case {
    names: [&'static str; 3],
    shape: Shape,
    over: Over,
}

macro_rules! cases {
    ($($what:ident $verb:literal $len:expr, $size:literal, $depth:literal, $suffix:literal;)+) => {
        pub(crate) const CASES: &[&str] = &[$(
            concat!($verb, "-", $size, $suffix, "/tcp"),
            concat!($verb, "-", $size, $suffix, "/tcp/redis"),
            concat!($verb, "-", $size, $suffix, "/tcp/looking-echo"),
            concat!($verb, "-", $size, $suffix, "/unix"),
            concat!($verb, "-", $size, $suffix, "/unix/redis"),
            concat!($verb, "-", $size, $suffix, "/unix/looking-echo"),
        )+];

        fn cases() -> Vec<Case> {
            let mut cases = Vec::new();
            $(
                let shape = Shape { what: What::$what, len: $len, depth: $depth };
                cases.push(Case {
                    names: [
                        concat!($verb, "-", $size, $suffix, "/tcp"),
                        concat!($verb, "-", $size, $suffix, "/tcp/redis"),
                        concat!($verb, "-", $size, $suffix, "/tcp/looking-echo"),
                    ],
                    shape,
                    over: Over::Tcp,
                });
                cases.push(Case {
                    names: [
                        concat!($verb, "-", $size, $suffix, "/unix"),
                        concat!($verb, "-", $size, $suffix, "/unix/redis"),
                        concat!($verb, "-", $size, $suffix, "/unix/looking-echo"),
                    ],
                    shape,
                    over: Over::Unix,
                });
            )+
            cases
        }
    };
}

cases! {
    Read "read" 8, "8", 1, "";
    Write "write" 8, "8", 1, "";
    Read "read" 4096, "4k", 1, "";
    Write "write" 4096, "4k", 1, "";
    Read "read" 1 << 20, "1m", 1, "";
    Write "write" 1 << 20, "1m", 1, "";
    Read "read" 8, "8", 16, "-16";
    Write "write" 8, "8", 16, "-16";
    Read "read" 4096, "4k", 16, "-16";
    Write "write" 4096, "4k", 16, "-16";
    Read "read" 8, "8", 64, "-64";
    Write "write" 8, "8", 64, "-64";
    Read "read" 4096, "4k", 64, "-64";
    Write "write" 4096, "4k", 64, "-64";
}

const ECHO: &str = "a bare echo of as many bytes over the same socket";
const LOOKING: &str = "the same by processes that look for bytes before they sleep, as ours do";
const REDIS: &str = "Redis over the same socket, its client waiting as ours does";

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let servers = on_their_core(|| Servers::start(1))?;
    let redis = match redis::is_installed() {
        true => Some(on_their_core(Redis::start)?),
        false => None,
    };
    let mut outcomes = Vec::new();
    for case in cases() {
        if case.names.iter().any(|name| options.wants(name)) {
            measure(options, &servers, redis.as_ref(), &case, &mut outcomes)?;
        }
    }
    servers.verify()?;
    Ok(outcomes)
}

fn measure(
    options: &Options,
    servers: &Servers,
    redis: Option<&Redis>,
    case: &Case,
    outcomes: &mut Vec<Outcome>,
) -> anyhow::Result<()> {
    let Case { names, shape, over } = case;
    let is_page = shape.len == 4096;
    let mut sides: Vec<Box<dyn Side + Send>> = vec![
        Box::new(Client::new(servers, *over, 0)?),
        Box::new(Echo::start(*over, *shape, Waits::Asleep)?),
    ];
    if is_page {
        sides.push(Box::new(Echo::start(*over, *shape, Waits::Looking)?));
    }
    if let Some(redis) = redis {
        sides.push(Box::new(redis.connect(*over)?));
    }
    let mut bursts = Bursts::new(options, *shape);
    let count = sides.len();
    let rounds = Rounds::run_placed(options, PLACEMENT, count, |side, _| {
        bursts.rate(&mut *sides[side])
    })?;
    let mut echo = Outcome::times(names[0], "op/s", rounds.of(0), (ECHO, rounds.of(1)));
    if is_page && shape.depth == 1 {
        echo = echo.goal(Goal::AtLeast(0.85));
    }
    if let Some(placement) = rounds.placement() {
        echo = echo.note(placement);
    }
    outcomes.push(echo);
    if is_page {
        let looking = (LOOKING, rounds.of(2));
        outcomes.push(Outcome::times(names[2], "op/s", rounds.of(0), looking));
    }
    if redis.is_none() {
        let reason = "redis-server is not installed";
        outcomes.push(Outcome::not_run(names[1], REDIS, reason));
        return Ok(());
    }
    let theirs = (REDIS, rounds.of(count - 1));
    let mut peer = Outcome::times(names[1], "op/s", rounds.of(0), theirs);
    match (is_page, shape.depth) {
        (true, 1) => peer = peer.goal(Goal::AtLeast(1.0)),
        (true, 16) => peer = peer.goal(Goal::AtLeast(1.5)),
        _ => {}
    }
    outcomes.push(peer);
    Ok(())
}
