//! The client against servers made of frames: honest ones, hostile ones, ones that end.

mod server;

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::limits::{MAX_SPACE_OPERATION, MAX_SPACE_TICKETS};
use crate::space::frame::{Incarnation, Operation, Refusal, Status, TELLS_HOLES};
use crate::units::MIB;
use server::{Server, Trick, space_of};

/// Long enough for anything here on a busy machine.
const PATIENT: Duration = Duration::from_secs(30);
/// Of what is to end by its deadline.
const SHORT: Duration = Duration::from_millis(200);
/// Of what is to end by its deadline, where other things have to be done within it.
const UNHURRIED: Duration = Duration::from_secs(3);

fn client(config: &SpaceConfig, deadline: Duration) -> Space {
    let options = SpaceOptions {
        deadline: Some(deadline),
        transport: Transport::Tcp,
        ..SpaceOptions::default()
    };
    Space::connect_with(config.clone(), options).expect("a client")
}

fn space(count: usize, segment: u64) -> (Vec<Server>, Space) {
    let (servers, config) = space_of(count, segment);
    let space = client(&config, PATIENT);
    (servers, space)
}

/// Why the only part that failed did so.
fn why<T: std::fmt::Debug>(result: Result<T, SpaceError>) -> Failure {
    let error = result.expect_err("a failure");
    match error.parts() {
        [part] => part.why.clone(),
        _ => panic!("{error}"),
    }
}

#[test]
fn every_operation_on_one_server() {
    let (servers, mut space) = space(1, 1 << 16);
    space.write(10, b"hello").expect("written");
    let mut bytes = [9; 7];
    space.read(9, &mut bytes).expect("read");
    assert_eq!(&bytes, b"\0hello\0");
    space.fill(100, 3, 7).expect("filled");
    assert_eq!(&servers[0].memory()[99..104], [0, 7, 7, 7, 0]);
    assert_eq!(space.fetch_add(64, 5).expect("added"), 0);
    assert_eq!(space.fetch_add(64, u64::MAX).expect("added"), 5);
    assert_eq!(space.compare_exchange(64, 4, 9).expect("asked"), Ok(4));
    assert_eq!(space.compare_exchange(64, 4, 8).expect("asked"), Err(9));
    let said = space.stat();
    assert_eq!(said.len(), 1);
    assert!(matches!(&said[0].1, Ok(text) if text.contains("clients")));
    space.read(1 << 16, &mut []).expect("nothing");
}

#[test]
fn a_range_is_split_at_every_boundary() {
    let (servers, mut space) = space(3, 4096);
    let mut model = vec![0_u8; 3 * 4096];
    let mut salt = 0_u8;
    for edge in [4096_u64, 8192] {
        for start in edge - 2..edge + 2 {
            for len in [1, 2, 3, 4, 4096, 4097] {
                if start + len > space.size() {
                    continue;
                }
                salt = salt.wrapping_add(31);
                let bytes: Vec<u8> = (0..len).map(|at| salt.wrapping_add(at as u8)).collect();
                space.write(start, &bytes).expect("written");
                model[start as usize..][..len as usize].copy_from_slice(&bytes);
                let mut found = vec![0; len as usize];
                space.read(start, &mut found).expect("read");
                assert_eq!(found, bytes, "{len} at {start}");
            }
        }
    }
    space.write(4095, &[1; 4098]).expect("over all three");
    model[4095..4095 + 4098].fill(1);
    space.fill(4095, 4098, 2).expect("over all three");
    model[4095..4095 + 4098].fill(2);
    let whole: Vec<u8> = servers.iter().flat_map(Server::memory).collect();
    assert_eq!(whole, model);
}

#[test]
fn what_does_not_lie_in_the_space_is_asked_of_nobody() {
    let (servers, mut space) = space(2, 4096);
    let end = space.size();
    for (offset, len) in [
        (end, 1),
        (end - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 7, 8),
        (1, u64::MAX),
    ] {
        let refused = |result: Result<_, SpaceError>| {
            assert!(
                matches!(result, Err(SpaceError::OutOfRange(_))),
                "{result:?}"
            );
        };
        refused(space.fill(offset, len, 1));
        refused(space.submit_read(offset, len).map(drop));
        if len <= 8 {
            refused(space.write(offset, &[1; 8][..len as usize]));
            refused(space.read(offset, &mut [1; 8][..len as usize]));
        }
    }
    assert!(matches!(
        space.fetch_add(u64::MAX - 7, 1),
        Err(SpaceError::OutOfRange(_))
    ));
    for offset in [1, 4, 4092, 8191] {
        let misaligned = space.compare_exchange(offset, 0, 1);
        let is_refused = matches!(
            misaligned,
            Err(SpaceError::Misaligned { .. } | SpaceError::OutOfRange(_))
        );
        assert!(is_refused, "{offset}: {misaligned:?}");
    }
    assert_eq!(servers[0].carried_out() + servers[1].carried_out(), 0);
}

#[test]
fn long_ranges_go_in_pieces_and_come_back_whole() {
    let (servers, mut space) = space(2, 6 * MIB);
    let bytes: Vec<u8> = (0..8 * MIB + 777).map(|at| (at % 251) as u8).collect();
    space.write(12_345, &bytes).expect("written");
    let pieces = servers[0].carried_out() + servers[1].carried_out();
    assert!(pieces >= bytes.len() as u64 / MAX_SPACE_OPERATION);
    let mut found = vec![0; bytes.len()];
    space.read(12_345, &mut found).expect("read");
    assert!(found == bytes);
    let ticket = space.submit_read(12_345, bytes.len() as u64).expect("room");
    assert!(space.wait(ticket).expect("read") == Answer::Bytes(bytes));
    space.fill(0, 12 * MIB, 9).expect("filled");
    assert!(
        servers
            .iter()
            .all(|server| server.memory().iter().all(|byte| *byte == 9))
    );
}

#[test]
fn many_at_once_are_answered_each_with_its_own() {
    let (servers, mut space) = space(3, 4096);
    // Every other reply comes after the next one.
    servers[1].plays(|number, _| {
        if number % 2 == 0 {
            Trick::Later
        } else {
            Trick::None
        }
    });
    let mut tickets = Vec::new();
    for at in 0..600_u64 {
        let offset = at % 192 * 64;
        tickets.push((
            space
                .submit_write(offset, vec![at as u8; 64])
                .expect("room"),
            None,
        ));
        let read = space.submit_read(offset, 64).expect("room");
        tickets.push((read, Some(at as u8)));
    }
    assert_eq!(space.unanswered(), 1200);
    let read = |answer, expected: Option<u8>| match expected {
        None => assert_eq!(answer, Answer::Done),
        Some(byte) => assert_eq!(answer, Answer::Bytes(vec![byte; 64])),
    };
    // Half by waiting, the rest by polling.
    let rest = tickets.split_off(600);
    for (ticket, expected) in tickets.into_iter().rev() {
        read(space.wait(ticket).expect("answered"), expected);
    }
    let mut left = rest.len();
    let until = Instant::now() + PATIENT;
    while left > 0 {
        assert!(Instant::now() < until, "{left} never answered");
        if let Some((ticket, answer)) = space.poll() {
            let (_, expected) = rest.iter().find(|(own, _)| *own == ticket).expect("own");
            read(answer.expect("answered"), *expected);
            left -= 1;
        }
    }
    assert!(space.poll().is_none());
    assert!(matches!(space.wait(rest[0].0), Err(SpaceError::Ticket)));
}

#[test]
fn more_than_a_client_may_submit_is_a_value() {
    let (_servers, mut space) = space(1, 4096);
    let first = space.submit_read(0, 1).expect("room");
    for _ in 1..MAX_SPACE_TICKETS {
        space.submit_read(0, 1).expect("room");
    }
    let full = space.submit_read(0, 1);
    assert!(matches!(full, Err(SpaceError::Full { count }) if count as u64 == MAX_SPACE_TICKETS));
    space.wait(first).expect("answered");
    space.submit_read(0, 1).expect("room again");
}

#[test]
fn a_batch_is_put_together_in_the_order_of_its_items() {
    let (servers, mut space) = space(2, 4096);
    let mut batch = Batch::new();
    batch
        .write(4096, b"on the second")
        .fetch_add(8, 5)
        .read(4096, 6)
        .compare_exchange(8, 5, 6)
        .compare_exchange(8, 5, 7)
        .fill(100, 2, 1);
    let answers = space.batch(&batch).expect("carried out");
    assert_eq!(
        answers,
        [
            BatchAnswer::Done,
            BatchAnswer::Value(0),
            BatchAnswer::Bytes(b"on the".to_vec()),
            BatchAnswer::Exchanged(Ok(5)),
            BatchAnswer::Exchanged(Err(6)),
            BatchAnswer::Done,
        ]
    );
    assert_eq!(servers[0].carried_out() + servers[1].carried_out(), 2);
    let mut wrong = |batch: &Batch| space.batch(batch).expect_err("refused");
    assert!(matches!(
        wrong(&Batch::new()),
        SpaceError::Batch(BatchError::Count { count: 0 })
    ));
    assert!(matches!(
        wrong(Batch::new().read(4095, 2)),
        SpaceError::Batch(BatchError::Crosses { index: 0 })
    ));
    assert!(matches!(
        wrong(Batch::new().read(8191, 2)),
        SpaceError::OutOfRange(_)
    ));
    assert!(matches!(
        wrong(Batch::new().fetch_add(4, 2)),
        SpaceError::Misaligned { offset: 4 }
    ));
    let mut many = Batch::new();
    for _ in 0..65 {
        many.read(0, 1);
    }
    assert!(matches!(
        wrong(&many),
        SpaceError::Batch(BatchError::Count { count: 65 })
    ));
}

#[test]
fn a_read_is_asked_again_and_a_change_is_not() {
    let (servers, mut space) = space(2, 4096);
    space.write(0, &[1; 8]).expect("written");
    for trick in [Trick::CutBefore, Trick::CutAfter, Trick::CutWithin] {
        servers[0].plays(move |number, _| if number == 0 { trick } else { Trick::None });
        let mut bytes = [0; 8];
        space.read(0, &mut bytes).expect("asked again");
        assert_eq!(bytes, [1; 8], "{trick:?}");
        // The second server's part is carried out whatever becomes of the first.
        servers[0].plays(move |number, _| if number == 0 { trick } else { Trick::None });
        let before = servers[0].carried_out();
        let failure = why(space.write(4092, &[3; 8]));
        let Failure::Indeterminate { why } = failure else {
            panic!("{trick:?}: {failure:?}")
        };
        assert_eq!(why, Unanswered::Connection);
        let times = servers[0].carried_out() - before;
        assert_eq!(times, u64::from(trick != Trick::CutBefore));
        assert_eq!(servers[1].memory()[..4], [3; 4]);
    }
}

#[test]
fn an_unknown_outcome_names_its_part() {
    let (servers, mut space) = space(3, 4096);
    servers[1].plays(|_, _| Trick::CutAfter);
    let error = space.write(4000, &[5; 8000]).expect_err("unknown in part");
    assert!(error.is_indeterminate() && !error.is_segment_lost());
    let [part] = error.parts() else {
        panic!("{error}")
    };
    assert_eq!(
        (part.server.as_str(), part.range.clone()),
        ("s1", 4096..8192)
    );
    let said = error.to_string();
    assert!(
        said.starts_with("1 of 3 parts failed: server s1 at 127.0.0.1:"),
        "{said}"
    );
    assert!(
        said.contains("addresses 4096..8192: nobody knows"),
        "{said}"
    );
    assert_eq!(servers[0].memory()[4000..], [5; 96]);
    assert_eq!(
        servers[2].memory()[..3809],
        [[5; 3808].as_slice(), &[0]].concat()
    );
}

#[test]
fn a_change_that_never_left_goes_over_the_next_connection() {
    let (servers, mut space) = space(1, 4096);
    space.write(0, &[1]).expect("written");
    servers[0].cut();
    // Idle for longer than a connection counts as fresh.
    let until = Instant::now() + Duration::from_millis(20);
    while Instant::now() < until {
        std::thread::yield_now();
    }
    space
        .write(0, &[2])
        .expect("the ended connection is noticed before it is used");
    assert_eq!(servers[0].memory()[0], 2);
}

#[test]
fn a_lost_segment_is_named_until_it_is_accepted() {
    let (servers, mut space) = space(2, 4096);
    space.write(0, &[1; 8192]).expect("written");
    servers[0].restart(2);
    let lost = |failure| {
        let Failure::SegmentLost { known, found } = failure else {
            panic!("{failure:?}")
        };
        assert_eq!((known, found), (Incarnation(1), Incarnation(2)));
    };
    let mut bytes = [7; 4];
    lost(why(space.read(0, &mut bytes)));
    for _ in 0..2 {
        lost(why(space.read(4094, &mut bytes)));
        lost(why(space.fetch_add(0, 1)));
    }
    space
        .read(4096, &mut bytes)
        .expect("the other one has its memory");
    assert_eq!(bytes, [1; 4]);
    assert!(space.accept_loss("s0").expect("a server"));
    assert!(!space.accept_loss("s0").expect("a server"));
    assert!(!space.accept_loss("s1").expect("a server"));
    assert!(space.accept_loss("s2").is_err());
    space.read(4094, &mut bytes).expect("accepted");
    assert_eq!(bytes, [0, 0, 1, 1]);
}

#[test]
fn a_server_of_another_map_is_refused_with_both_digests() {
    let (servers, mut space) = space(1, 4096);
    servers[0].greets(|welcome| {
        welcome.refusal = Refusal::Map;
        welcome.map = [7; 16];
    });
    let Failure::OtherMap { ours, theirs } = why(space.write(0, &[1])) else {
        panic!("the map")
    };
    assert_eq!((ours, theirs), (space.map().digest(), [7; 16]));
    servers[0].greets(|welcome| welcome.refusal = Refusal::Version);
    servers[0].greets(|welcome| welcome.map = ours);
    assert!(matches!(
        why(space.write(0, &[1])),
        Failure::TurnedAway { .. }
    ));
    servers[0].greets(|welcome| {
        welcome.refusal = Refusal::None;
        welcome.version = 2;
    });
    assert!(matches!(
        why(space.write(0, &[1])),
        Failure::TurnedAway { .. }
    ));
    servers[0].greets(|welcome| welcome.version = 1);
    space.write(0, &[1]).expect("taken");
}

#[test]
fn nobody_there_is_said_by_the_deadline() {
    let (servers, config) = space_of(2, 4096);
    let mut space = client(&config, SHORT);
    servers[1].greets(|welcome| welcome.server = 0);
    let Failure::Unreachable { source } = why(space.write(4096, &[1])) else {
        panic!("another server answers")
    };
    assert!(
        matches!(
            *source,
            ReachError::Position {
                expected: 1,
                found: 0
            }
        ),
        "{source}"
    );
    servers[0].greets(|welcome| welcome.refusal = Refusal::Clients);
    let Failure::Unreachable { source } = why(space.write(0, &[1])) else {
        panic!("full")
    };
    assert!(
        matches!(*source, ReachError::Busy(Refusal::Clients)),
        "{source}"
    );
    drop(servers);
    let Failure::Unreachable { source } = why(space.read(0, &mut [1])) else {
        panic!("nobody")
    };
    assert!(
        matches!(*source, ReachError::Io(_) | ReachError::Busy(_)),
        "{source}"
    );
    assert_eq!(
        space
            .stat()
            .iter()
            .filter(|(_, said)| said.is_err())
            .count(),
        2
    );
}

#[test]
fn no_reply_is_said_by_the_deadline() {
    let (servers, config) = space_of(1, 1 << 16);
    let mut space = client(&config, SHORT);
    servers[0].plays(|_, _| Trick::Silent);
    assert!(matches!(why(space.read(0, &mut [1])), Failure::TimedOut));
    let Failure::Indeterminate { why } = why(space.write(0, &[1])) else {
        panic!("sent")
    };
    assert_eq!(why, Unanswered::Deadline);
    let ticket = space.submit_fetch_add(0, 1).expect("room");
    let until = Instant::now() + PATIENT;
    let answer = loop {
        assert!(Instant::now() < until, "never given up");
        if let Some((own, answer)) = space.poll() {
            assert_eq!(own, ticket);
            break answer;
        }
    };
    assert!(answer.expect_err("silent").is_indeterminate());
    servers[0].plays(|_, _| Trick::None);
    space.write(0, &[1]).expect("another connection");
}

/// What is behind it would be remembered for good.
#[test]
fn a_request_that_is_never_answered_costs_its_connection_in_the_end() {
    let (servers, config) = space_of(1, 4096);
    let mut space = client(&config, UNHURRIED);
    space.write(0, &[1]).expect("written");
    servers[0].plays(|number, _| match number {
        0 => Trick::Silent,
        _ => Trick::None,
    });
    assert!(matches!(why(space.read(0, &mut [1])), Failure::TimedOut));
    for _ in 0..100 {
        let tickets: Vec<_> = (0..50)
            .map(|_| space.submit_read(0, 1).expect("room"))
            .collect();
        for ticket in tickets {
            assert_eq!(space.wait(ticket).expect("read"), Answer::Bytes(vec![1]));
        }
    }
    assert_eq!(servers[0].greeted(), 2, "another connection was made");
}

#[test]
fn a_server_that_ends_is_waited_for() {
    let (servers, mut space) = space(1, 4096);
    let stopping = |number, _: &_| match number {
        0 => Trick::Says(Status::Stopping),
        _ => Trick::None,
    };
    servers[0].plays(stopping);
    space
        .write(0, &[4])
        .expect("asked again: nothing was changed");
    assert_eq!(servers[0].memory()[0], 4);
    servers[0].plays(|_, _| Trick::Says(Status::NotAcknowledged));
    assert!(matches!(
        why(space.write(0, &[5])),
        Failure::NotAcknowledged
    ));
    servers[0].plays(|_, _| Trick::Says(Status::TooMany));
    let status = Status::TooMany;
    let Failure::Refused { status: found } = why(space.write(0, &[5])) else {
        panic!("refused")
    };
    assert_eq!(found, status);
}

/// One that does not say in its welcome that it knows would end the connection.
#[test]
fn who_does_not_tell_holes_is_not_asked() {
    let (servers, mut space) = space(2, 4096);
    servers[0].plays(|_, request| {
        assert_ne!(request.operation, Operation::Holes);
        Trick::None
    });
    let ticket = space.submit_holes(4000, 4192).expect("room");
    let answer = space.wait(ticket).expect("answered");
    assert_eq!(answer, Answer::Runs(Vec::new()));
    assert!(matches!(
        space.submit_holes(8192, 1),
        Err(SpaceError::OutOfRange(_))
    ));
    servers[1].greets(|welcome| welcome.flags |= TELLS_HOLES);
    let ticket = space.submit_holes(5000, 3192).expect("room");
    let runs = vec![(96, true), (3096, false)];
    assert_eq!(space.wait(ticket).expect("answered"), Answer::Runs(runs));
}

#[test]
fn what_a_server_that_ends_leaves_undone_keeps_its_order() {
    let (servers, mut space) = space(1, 4096);
    servers[0].plays(|number, _| match number {
        0..4 => Trick::Says(Status::Stopping),
        _ => Trick::None,
    });
    let tickets: Vec<_> = (1..=4_u8)
        .map(|value| space.submit_write(8, [value; 8]).expect("room"))
        .collect();
    for ticket in tickets {
        assert_eq!(space.wait(ticket).expect("written"), Answer::Done);
    }
    assert_eq!(servers[0].memory()[8..16], [4; 8]);
}

#[test]
fn what_its_caller_gave_up_is_not_sent_again() {
    let (servers, config) = space_of(1, 4096);
    let mut space = client(&config, UNHURRIED);
    space.write(0, &[1]).expect("the connection is heard of");
    servers[0].plays(|number, _| match number {
        0 => Trick::SaysLater(Status::Stopping),
        _ => Trick::None,
    });
    let ticket = space.submit_write(8, [7; 8]).expect("room");
    let until = Instant::now() + PATIENT;
    while !space.operations.is_done(ticket) {
        assert!(Instant::now() < until, "never given up");
        space.progress();
    }
    // Its answer is not taken yet, and now the server says that it did nothing.
    for _ in 0..2 {
        space.read(0, &mut [0]).expect("read");
    }
    space.write(1, &[2]).expect("over another connection");
    assert!(space.wait(ticket).expect_err("silent").is_indeterminate());
    assert_eq!(servers[0].memory()[8..16], [0; 8]);
}

#[test]
fn replies_that_cannot_be_believed_end_in_an_error() {
    let (servers, mut space) = space(1, 1 << 17);
    for trick in [
        Trick::WrongId,
        Trick::WrongOperation,
        Trick::LongBody,
        Trick::ShortBody,
        Trick::Flip(5),
        Trick::Flip(48 * 8 + 9),
    ] {
        servers[0].plays(move |number, _| if number == 0 { trick } else { Trick::None });
        for len in [8, 100_000] {
            let failure = why(space.read(0, &mut vec![0; len]));
            assert!(
                matches!(failure, Failure::Broken { .. }),
                "{trick:?}: {failure:?}"
            );
            servers[0].plays(move |number, _| if number == 0 { trick } else { Trick::None });
        }
        if matches!(trick, Trick::ShortBody | Trick::Flip(393)) {
            continue;
        }
        let Failure::Indeterminate { why } = why(space.write(0, &[1; 8])) else {
            panic!("{trick:?}")
        };
        assert_eq!(why, Unanswered::Reply, "{trick:?}");
    }
    servers[0].plays(|number, _| {
        if number == 0 {
            Trick::Twice
        } else {
            Trick::None
        }
    });
    space.write(0, &[1; 8]).expect("the first reply is right");
    // The second one comes with the first, or as an answer to what is asked next.
    let mut bytes = [0; 8];
    match space.read(0, &mut bytes) {
        Ok(()) => assert_eq!(bytes, [1; 8]),
        second => assert!(matches!(why(second), Failure::Broken { .. })),
    }
    servers[0].plays(|_, _| Trick::Dribble);
    let mut bytes = [0; 300];
    space.read(0, &mut bytes).expect("slow, but whole");
    assert_eq!(bytes[..9], [1, 1, 1, 1, 1, 1, 1, 1, 0]);
}

#[test]
fn an_event_loop_needs_no_waiting_call() {
    let (_servers, mut space) = space(3, 4096);
    let ticket = space.submit_write(4000, vec![7; 8000]).expect("room");
    let until = Instant::now() + PATIENT;
    while !space.operations.is_done(ticket) {
        assert!(Instant::now() < until, "never done");
        space.progress();
        let wanted = space.descriptors();
        assert!(
            !wanted.is_empty() || space.next_alarm().is_some() || space.operations.is_done(ticket)
        );
    }
    assert!(space.descriptors().is_empty() && space.next_alarm().is_none());
    let (own, answer) = space.poll().expect("done");
    assert_eq!((own, answer.expect("written")), (ticket, Answer::Done));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever bit of whatever reply is another one: an error or the right bytes, soon.
    #[test]
    fn no_flipped_bit_is_believed(bit in 0_usize..80 * 8, nth in 0_u64..6) {
        let (servers, config) = space_of(1, 4096);
        let mut space = client(&config, SHORT);
        servers[0].plays(move |number, _| {
            if number == nth { Trick::Flip(bit) } else { Trick::None }
        });
        for round in 0_u8..6 {
            let mut bytes = [0xEE; 32];
            if let Ok(()) = space.write(64, &[round; 32])
                && let Ok(()) = space.read(64, &mut bytes)
            {
                prop_assert_eq!(bytes, [round; 32]);
            }
        }
    }

    /// Against a vector of bytes.
    #[test]
    fn a_space_is_a_vector(
        steps in proptest::collection::vec((0_u64..3 * 4096, 0_u64..5000, 0_u8..4), 1..40)
    ) {
        let (_servers, config) = space_of(3, 4096);
        let mut space = client(&config, PATIENT);
        let mut model = vec![0_u8; 3 * 4096];
        for (step, (offset, len, kind)) in steps.into_iter().enumerate() {
            let len = len.min(model.len() as u64 - offset);
            let range = offset as usize..(offset + len) as usize;
            match kind {
                0 => {
                    let bytes: Vec<u8> = (0..len).map(|at| (at as u8) ^ (step as u8)).collect();
                    model[range].copy_from_slice(&bytes);
                    space.write(offset, &bytes).expect("written");
                }
                1 => {
                    model[range].fill(step as u8);
                    space.fill(offset, len, step as u8).expect("filled");
                }
                2 => {
                    let at = offset as usize / 8 * 8;
                    let cell = &mut model[at..at + 8];
                    let before = u64::from_le_bytes(cell.try_into().expect("8"));
                    cell.copy_from_slice(&before.wrapping_add(len).to_le_bytes());
                    prop_assert_eq!(space.fetch_add(at as u64, len).expect("added"), before);
                }
                _ => {
                    let mut bytes = vec![0; len as usize];
                    space.read(offset, &mut bytes).expect("read");
                    prop_assert_eq!(&bytes[..], &model[range]);
                }
            }
        }
    }
}
