//! What changes cost on the wire, counted on the socket, and that a change in several
//! parts is one change.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use uffd_sync::client::Reader;
use uffd_sync::limits::MAX_CHUNK;
use uffd_sync::units::MIB;
use uffd_sync::wire::control::ReplicaStatus;
use uffd_sync::words::{Mode, Publish};

use super::nodes::{
    NodeProcess, PATIENCE, await_content, await_some, content, content_of, folder, long,
};
use super::pattern::{self, Numbers};
use super::proxy::{CHUNK, END, Frame, Proxy, RESYNC, SINGLE, START, Verdict, Way};
use super::writer::{Order, WriterProcess};

/// A writer, its node, and a follower behind a proxy.
pub(crate) struct Pair {
    pub(crate) writer: WriterProcess,
    pub(crate) follower: NodeProcess,
    pub(crate) proxy: Proxy,
    pub(crate) source: NodeProcess,
    pub(crate) model: Vec<u8>,
    pub(crate) mode: Mode,
    pub(crate) folder: TempDir,
}

pub(crate) const REGION: &str = "region";

impl Pair {
    /// A region of `size` bytes full of numbers, which the replica shows already.
    #[track_caller]
    pub(crate) fn new(size: u64, mode: Mode, publish: Publish) -> Self {
        let folder = folder();
        let source = NodeProcess::source(folder.path(), "source");
        let proxy = Proxy::to(source.listen());
        let mut writer = WriterProcess::with_region(source.socket(), REGION, size, mode, publish);
        let model = Numbers::new(size).bytes(size as usize);
        let file = folder.path().join("content");
        std::fs::write(&file, &model).expect("a file in the temporary folder");
        writer.carry_out(&Order::Load { path: file });
        writer.carry_out(&Order::Mark {
            offset: 0,
            len: size,
        });
        writer.commit(0);
        let follower = NodeProcess::follower(folder.path(), "follower", &[proxy.source_of(REGION)]);
        let pair = Self {
            writer,
            follower,
            proxy,
            source,
            model,
            mode,
            folder,
        };
        await_content(&pair.follower, REGION, &pair.model);
        pair.await_settled();
        pair
    }

    /// Waits until everything captured is acknowledged.
    #[track_caller]
    pub(crate) fn await_settled(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let region = self.source.region(REGION).expect("the region is there");
            let in_step = |replica: &ReplicaStatus| replica.acked_epoch == region.epoch;
            if !region.replicas.is_empty() && region.replicas.iter().all(in_step) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "not in step: {region:?} {:?}",
                self.proxy.since(0)
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stores into the region and the model, with a mark where marks are needed.
    #[track_caller]
    pub(crate) fn store(&mut self, offset: u64, bytes: &[u8]) {
        self.writer.write(offset, bytes);
        let at = offset as usize;
        self.model[at..at + bytes.len()].copy_from_slice(bytes);
        if self.mode == Mode::Manual {
            self.writer.carry_out(&Order::Mark {
                offset,
                len: bytes.len() as u64,
            });
        }
    }

    /// Stores other bytes than there are, each of them different.
    #[track_caller]
    fn invert(&mut self, offset: u64, len: usize) {
        let at = offset as usize;
        let bytes: Vec<u8> = self.model[at..at + len].iter().map(|byte| !byte).collect();
        self.store(offset, &bytes);
    }

    #[track_caller]
    pub(crate) fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        self.writer.carry_out(&Order::Fill { offset, len, byte });
        self.model[offset as usize..(offset + len) as usize].fill(byte);
    }

    #[track_caller]
    pub(crate) fn await_equal(&self) {
        await_content(&self.follower, REGION, &self.model);
    }

    /// Frames of updates that went to the follower since `mark`.
    fn updates(&self, mark: usize) -> Vec<Frame> {
        let frames = self.proxy.since(mark);
        frames
            .into_iter()
            .filter(|f| f.way == Way::ToFollower && f.is_update())
            .collect()
    }
}

fn bytes_of(frames: &[Frame]) -> usize {
    frames.iter().map(|frame| frame.len).sum()
}

fn an_integer_costs_at_most_64_bytes(mode: Mode, publish: Publish) {
    let mut pair = Pair::new(MIB, mode, publish);
    for offset in [0, 4096 * 77 + 1234, MIB - 4] {
        let mark = pair.proxy.mark();
        pair.invert(offset, 4);
        if publish == Publish::Commit {
            pair.writer.commit(1);
        }
        pair.await_equal();
        pair.await_settled();
        let updates = pair.updates(mark);
        assert!(bytes_of(&updates) <= 64, "offset {offset}: {updates:?}");
        assert_eq!(updates.len(), 1, "offset {offset}: {updates:?}");
        assert_eq!(updates[0].kind, SINGLE);
    }
}

#[test]
fn an_integer_found_by_tracking_costs_at_most_64_bytes() {
    an_integer_costs_at_most_64_bytes(Mode::Async, Publish::Timer);
}

#[test]
fn an_integer_found_at_a_commit_costs_at_most_64_bytes() {
    an_integer_costs_at_most_64_bytes(Mode::Async, Publish::Commit);
}

#[test]
fn a_marked_integer_costs_at_most_64_bytes() {
    an_integer_costs_at_most_64_bytes(Mode::Manual, Publish::Timer);
}

#[test]
fn a_marked_integer_committed_costs_at_most_64_bytes() {
    an_integer_costs_at_most_64_bytes(Mode::Manual, Publish::Commit);
}

#[test]
fn an_integer_found_by_comparing_costs_at_most_64_bytes() {
    an_integer_costs_at_most_64_bytes(Mode::Compare, Publish::Timer);
}

fn distant_fields_are_one_small_update(mode: Mode) {
    let mut pair = Pair::new(MIB, mode, Publish::Commit);
    let fields = [
        (96, 4),
        (50_000, 8),
        (300_001, 1),
        (777_777, 16),
        (MIB - 7, 7),
    ];
    let mark = pair.proxy.mark();
    for (offset, len) in fields {
        pair.invert(offset, len);
    }
    let (_, cut) = pair.writer.commit(1);
    assert!(cut, "a commit of the only writing thread is a cut");
    pair.await_equal();
    let updates = pair.updates(mark);
    let most = 48 + fields.iter().map(|(_, len)| len + 16).sum::<usize>();
    assert!(bytes_of(&updates) <= most, "at most {most}: {updates:?}");
    assert_eq!(updates.len(), 1, "{updates:?}");
}

#[test]
fn distant_fields_found_by_tracking_are_one_small_update() {
    distant_fields_are_one_small_update(Mode::Async);
}

#[test]
fn distant_marked_fields_are_one_small_update() {
    distant_fields_are_one_small_update(Mode::Manual);
}

/// Reads a replica again and again and counts the epochs in which a range does not
/// hold one and the same byte all over: mostly at some places of it, which takes less
/// time than an update is applied in, sometimes all of it.
struct Uniform {
    stop: Arc<AtomicBool>,
    torn: Arc<AtomicU64>,
    reads: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Places that are read, both ends among them.
const PLACES: usize = 8;

impl Uniform {
    fn watch(node: &NodeProcess, offset: u64, len: usize) -> Self {
        let reader = Reader::attach(node.socket(), REGION).expect("the replica can be read");
        let (stop, torn, reads) = <(Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>)>::default();
        let (told, counted, read) = (Arc::clone(&stop), Arc::clone(&torn), Arc::clone(&reads));
        let thread = std::thread::spawn(move || {
            let (mut all, mut some) = (vec![0; len], vec![0; PLACES]);
            let step = (len - 1) / (PLACES - 1);
            while !told.load(Ordering::Relaxed) {
                let whole = read.fetch_add(1, Ordering::Relaxed).is_multiple_of(1024);
                let seen = if whole {
                    reader.read_at_epoch(|view| view.read(offset, &mut all))
                } else {
                    reader.read_at_epoch(|view| {
                        let mut places = some.iter_mut().enumerate();
                        places.try_for_each(|(place, byte)| {
                            let at = offset + (place * step) as u64;
                            view.read(at, std::slice::from_mut(byte))
                        })
                    })
                };
                let bytes = if whole { &all } else { &some };
                let shown = matches!(seen, Ok((Ok(()), _)));
                if shown && bytes[1..] != bytes[..bytes.len() - 1] {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self {
            stop,
            torn,
            reads,
            thread: Some(thread),
        }
    }

    #[track_caller]
    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .take()
            .expect("it runs")
            .join()
            .expect("the reader ends");
        let reads = self.reads.load(Ordering::Relaxed);
        assert!(reads > 0, "nothing was read");
        assert_eq!(
            self.torn.load(Ordering::Relaxed),
            0,
            "half an update was shown in {reads} reads"
        );
    }
}

impl Drop for Uniform {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_change_longer_than_a_chunk_comes_in_parts_and_is_applied_at_once() {
    let len = MAX_CHUNK + 1;
    let mut pair = Pair::new(2 * MIB, Mode::Async, Publish::Commit);
    pair.fill(777, len, 1);
    pair.writer.commit(1);
    let uniform = Uniform::watch(&pair.follower, 777, len as usize);
    for round in 2..20 {
        let mark = pair.proxy.mark();
        pair.fill(777, len, round);
        let (epoch, _) = pair.writer.commit(1);
        let kinds: Vec<u8> = pair.updates(mark).iter().map(|frame| frame.kind).collect();
        assert_eq!(kinds.first(), Some(&START), "{kinds:?}");
        assert_eq!(kinds.last(), Some(&END), "{kinds:?}");
        assert!(
            kinds[1..kinds.len() - 1].iter().all(|kind| *kind == CHUNK),
            "{kinds:?}"
        );
        assert!(pair.updates(mark).iter().all(|frame| frame.epoch == epoch));
    }
    uniform.end();
    pair.await_equal();
}

#[test]
fn a_bulk_change_comes_in_parts_and_is_applied_at_once() {
    let size = if long() { 256 * MIB } else { 32 * MIB };
    let mut pair = Pair::new(size, Mode::Async, Publish::Commit);
    let mark = pair.proxy.mark();
    pair.fill(0, size, 0xA5);
    let (epoch, _) = pair.writer.commit(1);
    let (bytes, shown) = content(&pair.follower, REGION).expect("the replica can be read");
    assert!(
        bytes.iter().all(|byte| *byte == 0xA5),
        "the epoch {shown} shows half of {epoch}"
    );
    assert_eq!(shown, epoch);
    let updates = pair.updates(mark);
    assert_eq!(updates.first().map(|frame| frame.kind), Some(START));
    assert_eq!(updates.last().map(|frame| frame.kind), Some(END));
    let most = size as usize + size as usize / 100;
    assert!(
        bytes_of(&updates) <= most,
        "{} bytes for {size}",
        bytes_of(&updates)
    );
    let longest = updates.iter().map(|frame| frame.len).max().unwrap_or(0);
    assert!(
        longest as u64 <= uffd_sync::limits::MAX_BODY + 32,
        "a frame of {longest} bytes"
    );
    // Applying takes many turns of the loop: long enough to look into it.
    let uniform = Uniform::watch(&pair.follower, 0, size as usize);
    for byte in 1..4 {
        pair.fill(0, size, byte);
        pair.writer.commit(1);
    }
    uniform.end();
    pair.await_equal();
}

/// Breaks one update of several parts by `judge` and demands that the replica gets
/// there all the same without ever showing half of it.
fn a_broken_update_is_made_good(judge: impl Fn(u64, &Frame) -> Verdict + Send + 'static) -> Pair {
    let len = 4 * MAX_CHUNK;
    let mut pair = Pair::new(2 * MIB, Mode::Async, Publish::Commit);
    pair.fill(5, len, 1);
    let (before, _) = pair.writer.commit(1);
    let uniform = Uniform::watch(&pair.follower, 5, len as usize);
    pair.proxy.judge(move |frame| judge(before + 1, frame));
    pair.fill(5, len, 2);
    let (epoch, _) = pair.writer.commit(0);
    assert_eq!(epoch, before + 1);
    pair.await_equal();
    uniform.end();
    pair.proxy.pass();
    // And it goes on.
    pair.store(3, b"after");
    pair.writer.commit(1);
    pair.await_equal();
    pair
}

/// A verdict on the second chunk of an epoch, the first time it comes.
fn second_chunk(verdict: Verdict) -> impl Fn(u64, &Frame) -> Verdict + Send + 'static {
    let seen = AtomicU64::new(0);
    move |epoch, frame| {
        let hit = frame.kind == CHUNK && frame.epoch == epoch;
        if hit && seen.fetch_add(1, Ordering::Relaxed) == 1 {
            verdict
        } else {
            Verdict::Pass
        }
    }
}

#[test]
fn a_lost_chunk_is_noticed_at_the_end_and_asked_for_again() {
    let pair = a_broken_update_is_made_good(second_chunk(Verdict::Drop));
    pair.proxy
        .await_frame(0, "resync", |frame| frame.kind == RESYNC);
    assert_eq!(pair.proxy.accepted(), 1, "the connection was kept");
}

#[test]
fn an_update_without_end_is_dropped_after_the_deadline() {
    let over = AtomicBool::new(false);
    let pair = a_broken_update_is_made_good(move |epoch, frame| {
        if frame.kind == RESYNC {
            over.store(true, Ordering::Relaxed);
        }
        let of_it = frame.epoch == epoch && matches!(frame.kind, CHUNK | END);
        if of_it && !over.load(Ordering::Relaxed) {
            Verdict::Drop
        } else {
            Verdict::Pass
        }
    });
    pair.proxy
        .await_frame(0, "resync", |frame| frame.kind == RESYNC);
    let applied = pair
        .follower
        .region(REGION)
        .and_then(|region| region.applied);
    assert!(
        applied.is_some_and(|applied| applied.dropped > 0),
        "{applied:?}"
    );
}

#[test]
fn an_update_cut_in_a_chunk_is_sent_again_after_reconnecting() {
    let pair = a_broken_update_is_made_good(second_chunk(Verdict::CutAfter(10_000)));
    assert!(pair.proxy.accepted() >= 2, "there was a second connection");
}

/// The first frame of the first update in parts since `mark`.
fn bulk_since(pair: &Pair, mark: usize) -> Option<Frame> {
    pair.updates(mark)
        .into_iter()
        .find(|frame| frame.kind == START)
}

/// Reads whole epochs of the replica until `enough` of them are not older than the bulk
/// change; each with the sum that stands for its content.
fn sums_shown(pair: &Pair, mark: usize, enough: usize) -> Vec<(u64, u128)> {
    let reader = Reader::attach(pair.follower.socket(), REGION).expect("the replica can be read");
    let deadline = Instant::now() + 3 * PATIENCE;
    let mut seen: Vec<(u64, u128)> = Vec::new();
    loop {
        let after = seen.last().map_or(0, |(epoch, _)| *epoch);
        assert!(
            Instant::now() < deadline,
            "only {:?} were seen; {:?}",
            seen.iter().map(|(epoch, _)| epoch).collect::<Vec<_>>(),
            pair.follower.region(REGION),
        );
        if reader.wait_epoch(after, Duration::from_secs(1)).is_err() {
            continue;
        }
        // A copy of all of it takes longer than a hold is honoured: nothing new comes
        // meanwhile, as over a slow network.
        pair.proxy.stall(true);
        let read = content_of(&reader);
        pair.proxy.stall(false);
        if let Ok((bytes, epoch)) = read
            && epoch > after
        {
            seen.push((epoch, pattern::content_sum(&bytes)));
        }
        let bulk = bulk_since(pair, mark).map_or(u64::MAX, |bulk| bulk.epoch);
        if seen.iter().filter(|(epoch, _)| *epoch >= bulk).count() >= enough {
            return seen;
        }
    }
}

/// The writer's log: the sum at each epoch.
fn sums_logged(log: &Path) -> HashMap<u64, u128> {
    let text = std::fs::read_to_string(log).expect("the writer's log");
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .map(|(epoch, sum)| {
            (
                epoch.parse().expect("an epoch"),
                sum.parse().expect("a sum"),
            )
        })
        .collect()
}

#[test]
fn every_epoch_that_a_slow_replica_shows_is_one_of_the_source() {
    let size = if long() { 256 * MIB } else { 32 * MIB };
    let mut pair = Pair::new(size, Mode::Async, Publish::Commit);
    pair.proxy.throttle(16 * MIB);
    let log = pair.folder.path().join("sums");
    let mark = pair.proxy.mark();
    pair.writer.send(&Order::Storm {
        seed: 9,
        bulk_at: 100,
        hot_pages: 512,
        log: log.clone(),
    });
    let seen = sums_shown(&pair, mark, 8);
    pair.proxy.throttle(0);
    pair.writer.carry_out(&Order::Stop);
    let sums = sums_logged(&log);
    let first = sums.keys().copied().min().expect("the writer committed");
    for (epoch, sum) in seen.iter().filter(|(epoch, _)| *epoch >= first) {
        assert_eq!(
            sums.get(epoch),
            Some(sum),
            "epoch {epoch} is none of the source's"
        );
    }
    // Not vacuous: many commits went by while the bulk was on its way.
    let bulk = bulk_since(&pair, mark).expect("the bulk came in parts");
    let epochs = pair.updates(mark).into_iter().map(|frame| frame.epoch);
    let next = epochs.filter(|epoch| *epoch > bulk.epoch).min();
    assert!(
        next.is_some_and(|next| next > bulk.epoch + 20),
        "{bulk:?}, then epoch {next:?}"
    );

    let last = sums.keys().copied().max().expect("the writer committed");
    let end = await_some("the last epoch", || {
        content(&pair.follower, REGION)
            .ok()
            .filter(|(_, epoch)| *epoch >= last)
    });
    assert_eq!(sums.get(&end.1), Some(&pattern::content_sum(&end.0)));
}
