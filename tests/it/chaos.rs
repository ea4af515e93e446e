//! A day compressed: one thing after the other happens to writer, nodes and network
//! while the recorded pattern goes on; at the end nothing that was stored is missing.
//!
//! `UFFD_SYNC_SEED` repeats a run.

use std::io::Write;
use std::time::Duration;

use nix::sys::signal::Signal;
use uffd_sync::units::MIB;
use uffd_sync::words::{Mode, Publish};

use super::nodes::{NodeProcess, PATIENCE, await_content, await_following, await_that, long};
use super::pattern::{self, Numbers};
use super::proxy::{Frame, Verdict};
use super::real_file::adopt_what_a_killed_writer_left;
use super::scenarios::{Pair, REGION};
use super::writer::{Order, Report, WriterProcess};

const SIZE: u64 = 2 * MIB;

/// What happens, and the writer's place in the pattern.
struct Day {
    pair: Pair,
    numbers: Numbers,
    seed: u64,
    /// First step that the model does not have.
    modelled: u64,
    happened: Vec<&'static str>,
}

#[test]
fn nothing_is_lost_on_a_bad_day() {
    a_bad_day(Mode::Async);
}

#[test]
fn nothing_is_lost_on_a_bad_day_in_mode_sync() {
    if super::exact::may_be_exact() {
        a_bad_day(Mode::Sync);
    }
}

fn a_bad_day(mode: Mode) {
    let fresh = u64::from(std::process::id()) << 20;
    let seed = std::env::var("UFFD_SYNC_SEED").map_or(fresh, |seed| seed.parse().expect("a seed"));
    let pair = Pair::new(SIZE, mode, Publish::Timer);
    let numbers = Numbers::new(seed);
    let mut day = Day {
        pair,
        numbers,
        seed,
        modelled: 0,
        happened: Vec::new(),
    };
    day.run_from(0);
    let events = if long() { 400 } else { 16 };
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for _ in 0..events {
            day.event();
        }
        day.evening();
    }));
    if let Err(panic) = outcome {
        let happened = day.happened.join(", ");
        let text = format!("UFFD_SYNC_SEED={seed} in mode {mode}: {happened}\n");
        let _ = std::io::stderr().write_all(text.as_bytes());
        std::panic::resume_unwind(panic);
    }
}

impl Day {
    fn run_from(&mut self, from: u64) {
        self.pair.writer.send(&Order::Run {
            seed: self.seed,
            from,
        });
    }

    fn event(&mut self) {
        let spell = Duration::from_millis(20 + self.numbers.below(150));
        let (what, act): (&'static str, fn(&mut Self)) = match self.numbers.below(9) {
            0 => ("writer killed", Self::kill_writer),
            1 => ("follower killed", Self::kill_follower),
            2 => ("source killed", Self::kill_source),
            3 => ("source stopped", |day| day.pause_node(true)),
            4 => ("follower stopped", |day| day.pause_node(false)),
            5 => ("network stalled", Self::stall),
            6 => ("network slow", |day| day.pair.proxy.throttle(2 * MIB)),
            7 => ("network fast", |day| day.pair.proxy.throttle(0)),
            _ => ("connection broken", Self::break_connection),
        };
        self.happened.push(what);
        act(self);
        // The writer goes on whatever happens.
        self.pair
            .writer
            .steps_within(spell + Duration::from_millis(200));
    }

    fn kill_writer(&mut self) {
        let seen = self.pair.writer.steps_within(Duration::from_millis(200));
        let new = WriterProcess::start();
        let old = std::mem::replace(&mut self.pair.writer, new);
        let next = old.kill().unwrap_or(seen) + 1;
        let steps = self.modelled..next;
        adopt_what_a_killed_writer_left(
            &self.pair.source,
            (REGION, self.seed),
            &mut self.pair.model,
            steps,
        );
        self.modelled = next;
        let (socket, mode) = (self.pair.source.socket().to_owned(), self.pair.mode);
        let resumed = self
            .pair
            .writer
            .create(&socket, REGION, SIZE, mode, Publish::Timer);
        assert!(resumed, "the successor begins with what there was");
        self.run_from(next);
    }

    fn kill_follower(&mut self) {
        self.pair.follower.signal(Signal::SIGKILL);
        self.pair.follower.await_end(PATIENCE);
        let sources = [self.pair.proxy.source_of(REGION)];
        self.pair.follower = NodeProcess::follower(self.pair.folder.path(), "follower", &sources);
        await_following(&self.pair.follower, REGION);
    }

    fn kill_source(&mut self) {
        self.pair.source.signal(Signal::SIGKILL);
        self.pair.source.await_end(PATIENCE);
        self.pair.source = NodeProcess::source(self.pair.folder.path(), "source");
        self.pair.proxy.aim_at(self.pair.source.listen());
        // Were the writer killed before that, its memory would be nowhere.
        await_that("the writer hands over again", || {
            self.pair.source.region(REGION).is_some()
        });
    }

    fn pause_node(&mut self, source: bool) {
        let node = if source {
            &self.pair.source
        } else {
            &self.pair.follower
        };
        node.signal(Signal::SIGSTOP);
        let spell = Duration::from_millis(200);
        if source && self.pair.mode == Mode::Sync {
            // Its stores wait for it.
            std::thread::sleep(spell);
        } else {
            self.pair.writer.steps_within(spell);
        }
        let node = if source {
            &self.pair.source
        } else {
            &self.pair.follower
        };
        node.signal(Signal::SIGCONT);
    }

    fn stall(&mut self) {
        self.pair.proxy.stall(true);
        self.pair.writer.steps_within(Duration::from_millis(300));
        self.pair.proxy.stall(false);
    }

    /// Does something to the next frame of an update, once.
    fn break_connection(&mut self) {
        let at = self.numbers.below(100) as usize;
        let verdict = match self.numbers.below(4) {
            0 => Verdict::CutAfter(at),
            1 => Verdict::ResetAfter(at),
            2 => Verdict::Drop,
            _ => Verdict::Flip(at),
        };
        let mut left = 1;
        self.pair.proxy.judge(move |frame: &Frame| {
            if frame.is_update() && std::mem::take(&mut left) == 1 {
                verdict
            } else {
                Verdict::Pass
            }
        });
    }

    /// The end of the day: everything that was stored is everywhere.
    fn evening(&mut self) {
        self.pair.proxy.pass();
        self.pair.proxy.throttle(0);
        let end = self.pair.writer.stop_run();
        pattern::apply(&mut self.pair.model, self.seed, self.modelled..end);
        let path = self.pair.folder.path().join("dump");
        let dumped = self.pair.writer.order(&Order::Dump { path: path.clone() });
        assert_eq!(dumped, Report::Done);
        assert!(
            std::fs::read(path).expect("the dump") == self.pair.model,
            "the writer lost it"
        );
        await_content(&self.pair.source, REGION, &self.pair.model);
        await_content(&self.pair.follower, REGION, &self.pair.model);
    }
}
