//! Kills, stops and broken connections: nothing that was stored is lost, and nothing
//! half is shown.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use uffd_sync::client::Reader;
use uffd_sync::region::ReadError;
use uffd_sync::units::MIB;
use uffd_sync::words::{Mode, Publish};

use super::nodes::{NodeProcess, await_content, await_some, await_that};
use super::pattern;
use super::proxy::{ACK, Frame, Proxy, Verdict, Way};
use super::scenarios::{Pair, REGION};
use super::writer::{Order, Report};

/// Longest single store of a writer whose engine is away; a store never waits for it,
/// only for a processor.
const LONGEST_STORE_US: u64 = 2_000_000;

/// The writer's own view of its region.
fn dump(pair: &mut Pair) -> Vec<u8> {
    let path = pair.folder.path().join("dump");
    pair.writer.carry_out(&Order::Dump { path: path.clone() });
    std::fs::read(path).expect("the dump")
}

#[track_caller]
fn end_beat(pair: &mut Pair) -> u64 {
    match pair.writer.order(&Order::Stop) {
        Report::Beaten { stores, longest_us } => {
            assert!(
                longest_us < LONGEST_STORE_US,
                "a store took {longest_us} us"
            );
            stores
        }
        other => panic!("unexpected report {other:?}"),
    }
}

#[test]
fn a_writer_goes_on_while_its_engine_is_dead() {
    let mut pair = Pair::new(MIB, Mode::Async, Publish::Timer);
    pair.writer.send(&Order::Beat);
    await_that("captures run", || {
        pair.source
            .region(REGION)
            .is_some_and(|region| region.captures > 20)
    });
    let name = "source";
    pair.source.signal(Signal::SIGKILL);
    pair.source.await_end(super::nodes::PATIENCE);
    let stores = end_beat(&mut pair);
    assert!(stores > 1000, "{stores} stores");
    match pair.writer.order(&Order::Commit {
        acks: 0,
        deadline_ms: 5_000,
    }) {
        Report::Failed { error } => assert!(error.contains("EngineGone"), "{error}"),
        other => panic!("committed without an engine: {other:?}"),
    }
    pair.writer.write(77, b"stored without an engine");
    let source = NodeProcess::source(pair.folder.path(), name);
    pair.proxy.aim_at(source.listen());
    pair.source = source;
    pair.model = dump(&mut pair);
    await_content(&pair.source, REGION, &pair.model);
    pair.await_equal();
    await_that("the writer hands over again", || {
        pair.source
            .region(REGION)
            .is_some_and(|region| region.state == "live")
    });
    pair.store(500, b"and with the next one");
    pair.writer.commit(1);
    pair.await_equal();
}

#[test]
fn a_writer_goes_on_while_its_engine_is_stopped() {
    let mut pair = Pair::new(MIB, Mode::Async, Publish::Timer);
    pair.writer.send(&Order::Beat);
    await_that("captures run", || {
        pair.source
            .region(REGION)
            .is_some_and(|region| region.captures > 20)
    });
    pair.source.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(1));
    let stores = end_beat(&mut pair);
    pair.source.signal(Signal::SIGCONT);
    assert!(stores > 1000, "{stores} stores");
    pair.model = dump(&mut pair);
    pair.await_equal();
}

#[test]
fn the_last_stores_of_a_killed_writer_are_shipped() {
    for mode in [Mode::Async, Mode::Manual] {
        let mut pair = Pair::new(MIB, mode, Publish::Commit);
        // Neither committed nor, where it matters, marked.
        pair.writer.write(123, b"stored and not committed");
        pair.writer.write(MIB - 9, b"the end");
        let model = dump(&mut pair);
        let Pair {
            writer,
            follower,
            source,
            model: committed,
            ..
        } = &pair;
        assert_ne!(&model, committed);
        writer.signal(Signal::SIGKILL);
        await_content(follower, REGION, &model);
        let region = source.region(REGION).expect("the node keeps it");
        assert_eq!(
            (region.state.as_str(), region.writer_pid),
            ("orphaned", None)
        );
    }
}

#[test]
fn a_writer_that_ends_by_itself_leaves_everything() {
    let mut pair = Pair::new(MIB, Mode::Async, Publish::Timer);
    pair.store(4000, &[0xEE; 9000]);
    pair.writer.signal(Signal::SIGTERM);
    pair.await_equal();
}

#[test]
fn a_replica_killed_while_it_applies_comes_back_equal() {
    let mut pair = Pair::new(8 * MIB, Mode::Async, Publish::Commit);
    for round in 0..6u8 {
        let reader = Reader::attach(pair.follower.socket(), REGION).expect("it can be read");
        // Slow enough to be killed in the middle of receiving, or right behind the end.
        pair.proxy
            .throttle(if round % 2 == 0 { 20 * MIB } else { 0 });
        let mark = pair.proxy.mark();
        pair.fill(0, 8 * MIB, round);
        let (epoch, _) = pair.writer.commit(0);
        let kind = if round % 2 == 0 {
            super::proxy::CHUNK
        } else {
            super::proxy::END
        };
        pair.proxy
            .await_frame(mark, "part of the update", |frame: &Frame| {
                frame.kind == kind && frame.epoch == epoch
            });
        pair.follower.signal(Signal::SIGKILL);
        shows_nothing_half(&reader);
        pair.follower.await_end(super::nodes::PATIENCE);
        pair.proxy.throttle(0);
        let sources = [pair.proxy.source_of(REGION)];
        pair.follower = NodeProcess::follower(pair.folder.path(), "follower", &sources);
        pair.await_equal();
    }
}

/// Reads until the node's death shows; the content is of one epoch all over.
#[track_caller]
fn shows_nothing_half(reader: &Reader) {
    let mut bytes = vec![0; reader.size() as usize];
    await_some("an answer of the reader", || {
        match reader.read_at_epoch(|view| view.read(0, &mut bytes)) {
            Ok((whole, _)) => {
                whole.expect("the whole region is inside of it");
                let first = bytes[0];
                let other = bytes.iter().filter(|byte| **byte != first).count();
                // The content before the first round is no single byte.
                assert!(
                    other == 0 || bytes[..256].iter().any(|byte| *byte != first),
                    "{other} bytes of another epoch"
                );
                Some(())
            }
            Err(ReadError::SourceGone) => Some(()),
            Err(_) => None,
        }
    });
}

/// Breaks the connection by the first `hit` after the writer runs, and demands a second
/// connection and an equal end.
fn a_broken_connection_loses_nothing(verdict: impl Fn(&Frame) -> Option<Verdict> + Send + 'static) {
    let mut pair = Pair::new(MIB, Mode::Async, Publish::Timer);
    let before = pair.proxy.accepted();
    pair.writer.send(&Order::Run { seed: 4, from: 0 });
    pair.writer.steps_within(Duration::from_millis(200));
    let mut left = 3u64;
    pair.proxy.judge(move |frame| match verdict(frame) {
        // Not the first one, so that more is in flight.
        Some(verdict) if left > 0 => {
            left -= 1;
            if left == 0 { verdict } else { Verdict::Pass }
        }
        _ => Verdict::Pass,
    });
    await_that("the follower dials again", || {
        pair.proxy.accepted() > before
    });
    pair.writer.steps_within(Duration::from_millis(200));
    let end = pair.writer.stop_run();
    pattern::apply(&mut pair.model, 4, 0..end);
    pair.await_equal();
    assert!(pair.source.is_alive() && pair.follower.is_alive());
}

fn update(frame: &Frame) -> bool {
    frame.way == Way::ToFollower && frame.is_update()
}

#[test]
fn a_reset_loses_nothing() {
    a_broken_connection_loses_nothing(|frame| update(frame).then_some(Verdict::ResetAfter(0)));
}

#[test]
fn a_cut_inside_a_header_loses_nothing() {
    a_broken_connection_loses_nothing(|frame| update(frame).then_some(Verdict::CutAfter(17)));
}

#[test]
fn a_cut_inside_a_payload_loses_nothing() {
    a_broken_connection_loses_nothing(|frame| update(frame).then_some(Verdict::CutAfter(47)));
}

#[test]
fn a_cut_between_the_last_byte_and_its_ack_loses_nothing() {
    a_broken_connection_loses_nothing(|frame| {
        (frame.way == Way::ToSource && frame.kind == ACK).then_some(Verdict::CutAfter(0))
    });
}

#[test]
fn silence_is_noticed_and_loses_nothing() {
    a_broken_connection_loses_nothing(|frame| {
        update(frame).then_some(Verdict::SilenceAfter(usize::MAX))
    });
}

#[test]
fn silence_inside_a_frame_is_noticed_and_loses_nothing() {
    a_broken_connection_loses_nothing(|frame| update(frame).then_some(Verdict::SilenceAfter(40)));
}

#[test]
fn a_flipped_bit_in_a_header_loses_nothing() {
    a_broken_connection_loses_nothing(|frame| update(frame).then_some(Verdict::Flip(9)));
}

#[test]
fn a_stalled_replica_costs_bounded_memory_and_disturbs_nobody() {
    let size = 8 * MIB;
    let mut pair = Pair::new(size, Mode::Async, Publish::Timer);
    let second_way = Proxy::to(pair.source.listen());
    let sources = [second_way.source_of(REGION)];
    let second = NodeProcess::follower(pair.folder.path(), "second", &sources);
    await_content(&second, REGION, &pair.model);
    pair.writer.send(&Order::Beat);
    let before = pair.source.status();
    pair.proxy.stall(true);
    let epoch = |node: &NodeProcess| node.region(REGION).map_or(0, |region| region.epoch);
    let begin = epoch(&second);
    let most = AtomicU64::new(0);
    await_that("the other replica goes on", || {
        most.fetch_max(pair.source.status().rss_bytes, Ordering::Relaxed);
        epoch(&second) > begin + 100
    });
    let grown = most
        .load(Ordering::Relaxed)
        .saturating_sub(before.rss_bytes);
    // Pre-images up to their budget, the send queue, sets of extents, and some slack.
    assert!(grown < 4 * size, "the source grew by {grown} bytes");
    assert!(
        epoch(&pair.follower) < epoch(&second),
        "the stalled one stands"
    );
    end_beat(&mut pair);
    pair.model = dump(&mut pair);
    await_content(&second, REGION, &pair.model);
    pair.proxy.stall(false);
    pair.await_equal();
}

#[test]
fn readers_learn_at_once_that_their_node_was_killed() {
    let pair = Pair::new(MIB, Mode::Async, Publish::Commit);
    let reader = Reader::attach(pair.follower.socket(), REGION).expect("it can be read");
    let epoch = reader.control().epoch();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let waited = reader.wait_epoch(epoch, super::nodes::PATIENCE);
            (waited, Instant::now())
        });
        let killed = Instant::now();
        pair.follower.signal(Signal::SIGKILL);
        let (waited, woken) = waiting.join().expect("the reader ends");
        assert!(matches!(waited, Err(ReadError::SourceGone)), "{waited:?}");
        let took = woken - killed;
        assert!(took < Duration::from_secs(2), "it took {took:?}");
    });
    // The last whole epoch can still be read.
    let (bytes, shown) = super::nodes::content_of(&reader).expect("the memory is still mapped");
    assert!(bytes == pair.model && shown == epoch);
}
