//! Clients that mean harm, or are broken: each ends alone, and good ones go on.

use uffd_sync::space::frame::{HELLO_BYTES, Hello, Operation, Refusal, Status};

use super::servers::Servers;
use super::wire::{Wire, hello, request};

const MIB: u64 = 1 << 20;

/// A good client, before and after.
struct Witness(Wire, u64);

impl Witness {
    fn new(servers: &Servers) -> Self {
        Self(Wire::greeted(servers, 0).0, 0)
    }

    /// The server still answers, and nothing of the segment has changed.
    #[track_caller]
    fn check(&mut self, servers: &Servers) {
        let one = 1u64.to_le_bytes();
        let (reply, _) = self.0.ask(Operation::FetchAdd, 0, 8, &one);
        assert_eq!((reply.status, reply.value), (Status::Done, self.1));
        self.1 += 1;
        let (_, rest) = self.0.ask(Operation::Read, 8, MIB as u32 - 8, b"");
        assert!(rest.iter().all(|byte| *byte == 0), "something changed");
        let (mut new, _) = Wire::greeted(servers, 0);
        assert_eq!(new.ask(Operation::Ping, 0, 0, b"").0.status, Status::Done);
    }
}

fn resident_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
    let line = text.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.expect("a number") * 1024
}

#[test]
fn bytes_that_are_no_frames_end_their_own_connection() {
    let servers = Servers::start(1, MIB, "");
    let mut witness = Witness::new(&servers);
    for garbage in [
        vec![0; 4096],
        vec![0xFF; HELLO_BYTES],
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(8),
    ] {
        let mut wire = Wire::tcp(&servers, 0);
        // It may be ended before the last byte.
        let _ = wire.put(&garbage);
        assert!(wire.is_ended());
    }
    let body = [0xEE; 24];
    let sound = [&request(Operation::Write, 64, 24).encode(&body)[..], &body].concat();
    for bit in 0..sound.len() * 8 {
        let mut wire = Wire::unix(&servers, 0);
        assert_eq!(wire.greet(&hello(&servers, 0)).refusal, Refusal::None);
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let _ = wire.put(&bytes);
        assert!(wire.is_ended(), "bit {bit} of the request went unnoticed");
    }
    let greeting = hello(&servers, 0).encode();
    for bit in 0..greeting.len() * 8 {
        let mut wire = Wire::unix(&servers, 0);
        let mut bytes = greeting;
        bytes[bit / 8] ^= 1 << (bit % 8);
        let _ = wire.put(&bytes);
        assert!(wire.is_ended(), "bit {bit} of the hello went unnoticed");
    }
    witness.check(&servers);
}

#[test]
fn half_a_frame_and_then_silence_holds_nobody_up() {
    let servers = Servers::start(1, MIB, "");
    let mut witness = Witness::new(&servers);
    let body = vec![0xEE; MIB as usize - 4096];
    let whole = request(Operation::Write, 4096, body.len() as u32).encode(&body);
    let whole = [&whole[..], &body].concat();
    let mut halves: Vec<_> = [1, 47, 48, 49, 100_000, whole.len() - 1]
        .into_iter()
        .map(|len| {
            let (mut wire, _) = Wire::greeted(&servers, 0);
            wire.put(&whole[..len]).expect("sent");
            (wire, len)
        })
        .collect();
    witness.check(&servers);
    // One that goes on in the end is served like any other; the others are cut there.
    let (last, len) = halves.last_mut().expect("some");
    last.put(&whole[*len..]).expect("sent");
    assert_eq!(last.try_receive().expect("a reply").0.status, Status::Done);
    let (reply, _) = last.ask(Operation::Fill, 4096, body.len() as u32, b"\0");
    assert_eq!(reply.status, Status::Done);
    drop(halves);
    witness.check(&servers);
}

#[test]
fn greetings_of_another_space_are_refused_with_what_is_here() {
    let servers = Servers::start(2, MIB, "");
    let right = hello(&servers, 0);
    for (hello, refusal) in [
        (
            Hello {
                versions: (2, 3),
                ..right
            },
            Refusal::Version,
        ),
        (
            Hello {
                map: [7; 16],
                ..right
            },
            Refusal::Map,
        ),
        (Hello { server: 1, ..right }, Refusal::Server),
        (
            Hello {
                server: u32::MAX,
                ..right
            },
            Refusal::Server,
        ),
    ] {
        let mut wire = Wire::tcp(&servers, 0);
        let welcome = wire.greet(&hello);
        assert_eq!(welcome.refusal, refusal);
        assert_eq!((welcome.map, welcome.server), (right.map, 0));
        assert!(wire.is_ended());
    }
    let more = "[limits]\nmax_clients = 2\n";
    let servers = Servers::start(1, MIB, more);
    let kept = [Wire::greeted(&servers, 0), Wire::greeted(&servers, 0)];
    let mut third = Wire::tcp(&servers, 0);
    let welcome = third.greet(&hello(&servers, 0));
    assert_eq!(welcome.refusal, Refusal::Clients);
    drop(kept);
    crate::nodes::await_that("room for a third client", || {
        let mut third = Wire::tcp(&servers, 0);
        third.greet(&hello(&servers, 0)).refusal == Refusal::None
    });
}

#[test]
fn ranges_that_are_not_in_the_segment_are_named_so() {
    let servers = Servers::start(1, MIB, "");
    let mut witness = Witness::new(&servers);
    let (mut wire, _) = Wire::greeted(&servers, 0);
    for back in [0, 1, 7, 8, 9, 4095, 4096, MIB] {
        for (operation, len, body) in [
            (Operation::Read, 16, &[][..]),
            (Operation::Write, 16, &[0xEE; 16]),
            (Operation::Fill, 16, &[0xEE]),
            (Operation::FetchAdd, 8, &[0xEE; 8]),
            (Operation::CompareExchange, 8, &[0; 16]),
        ] {
            let (reply, body) = wire.ask(operation, u64::MAX - back, len, body);
            let refused = matches!(reply.status, Status::OutOfRange | Status::Misaligned);
            assert!(refused && body.is_empty(), "{operation:?} {back}");
        }
    }
    let (reply, _) = wire.ask(Operation::Write, MIB - 15, 16, &[0xEE; 16]);
    assert_eq!(reply.status, Status::OutOfRange);
    let (reply, _) = wire.ask(Operation::Read, 0, u32::MAX, b"");
    assert_eq!(reply.status, Status::TooLong);
    let (reply, _) = wire.ask(Operation::Batch, 0, u32::MAX, b"");
    assert_eq!(reply.status, Status::Malformed);
    witness.check(&servers);
}

#[test]
fn who_asks_and_never_reads_costs_a_bounded_amount() {
    let servers = Servers::start(1, MIB, "[limits]\nmax_in_flight = 64\n");
    let mut witness = Witness::new(&servers);
    let before = resident_bytes(servers.server(0).pid());
    let mut deaf: Vec<_> = (0..8).map(|_| Wire::greeted(&servers, 0).0).collect();
    for wire in &mut deaf {
        for _ in 0..500 {
            wire.send(Operation::Read, 0, MIB as u32, b"");
        }
    }
    witness.check(&servers);
    // 8 times 500 MiB were asked for.
    let grown = resident_bytes(servers.server(0).pid()) - before;
    assert!(grown < 160 * MIB, "{} MiB for 8 deaf clients", grown / MIB);
    // Once it reads, each is answered, in order; what was too much is told so.
    let (mut done, mut too_many) = (0, 0);
    for _ in 0..500 {
        match deaf[0].try_receive().expect("a reply") {
            (reply, body) if reply.status == Status::Done => {
                assert_eq!(body.len() as u64, MIB);
                done += 1;
            }
            (reply, _) => {
                assert_eq!(reply.status, Status::TooMany);
                too_many += 1;
            }
        }
    }
    assert!(done > 0 && done + too_many == 500);
}

#[test]
fn more_under_way_than_the_file_allows_is_refused() {
    let servers = Servers::start(1, MIB, "[limits]\nmax_in_flight = 1\n");
    let (mut wire, _) = Wire::greeted(&servers, 0);
    for _ in 0..64 {
        wire.send(Operation::Read, 0, MIB as u32, b"");
    }
    // Unread until the kernel takes no more, so that one stays unanswered.
    let (mut other, _) = Wire::greeted(&servers, 0);
    let (mut before, mut turns) = (0, 0);
    while before == 0 || turns < 20 {
        let (_, json) = other.ask(Operation::Stat, 0, 0, b"");
        let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
        let now = json["read_bytes"].as_u64().expect("a figure");
        turns = if now == before { turns + 1 } else { 0 };
        before = now;
    }
    let mut statuses = Vec::new();
    for _ in 0..64 {
        statuses.push(wire.try_receive().expect("a reply").0.status);
    }
    assert!(statuses.contains(&Status::Done));
    assert!(statuses.contains(&Status::TooMany));
    // In its bounds again it is served again.
    let (reply, _) = wire.ask(Operation::Ping, 0, 0, b"");
    assert_eq!(reply.status, Status::Done);
}

#[test]
fn thousands_that_never_greet_keep_nobody_out() {
    uffd_sync::sys::process::raise_fd_limit();
    let servers = Servers::start(1, MIB, "");
    let mut witness = Witness::new(&servers);
    let mut silent = Vec::new();
    for at in 0..3000 {
        silent.push(if at % 2 == 0 {
            Wire::tcp(&servers, 0)
        } else {
            Wire::unix(&servers, 0)
        });
        if at % 500 == 0 {
            witness.check(&servers);
        }
    }
    witness.check(&servers);
    // Those that came first had to go for those that came last.
    assert!(silent[0].is_ended() && silent[1].is_ended());
}
