//! Variants measured in the same rounds and in the same placement.

use std::time::Duration;

use crate::harness::{Goal, Latencies, Nearness, Options, Outcome, Placement, Rounds, median};
use crate::link::{Turn, Variant};

/// A variant, or why it cannot be run.
pub(crate) type Entrant = Result<Box<dyn Variant>, String>;

/// Names a variant of a contest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key(usize);

struct Entry {
    name: &'static str,
    variant: Entrant,
    turn: Turn,
    latencies: Latencies,
    cpu_ns: Vec<f64>,
}

/// Variants that are to be compared.
pub(crate) struct Contest<'a> {
    options: &'a Options,
    placement: Placement,
    entries: Vec<Entry>,
}

/// What a contest found.
pub(crate) struct Results {
    entries: Vec<Entry>,
    rounds: Rounds,
}

impl<'a> Contest<'a> {
    pub(crate) fn new(options: &'a Options, placement: Placement) -> Self {
        Self {
            options,
            placement,
            entries: Vec::new(),
        }
    }

    /// Adds a variant by the name that reports give it; a smoke run makes a tenth of
    /// the calls.
    pub(crate) fn enter(
        &mut self,
        name: &'static str,
        variant: Entrant,
        turn: Turn,
    ) -> anyhow::Result<Key> {
        let scaled = |calls: u64| calls.div_ceil(self.options.pick(10, 1));
        self.entries.push(Entry {
            name,
            variant,
            turn: Turn {
                calls: scaled(turn.calls),
                timed: scaled(turn.timed),
                ..turn
            },
            latencies: Latencies::new()?,
            cpu_ns: Vec::new(),
        });
        Ok(Key(self.entries.len() - 1))
    }

    /// Measures all of them in interleaved rounds.
    pub(crate) fn run(mut self) -> anyhow::Result<Results> {
        let entries = &mut self.entries;
        let rounds = Rounds::run_placed(
            self.options,
            self.placement,
            entries.len(),
            |variant, round| entries[variant].measure(round),
        )?;
        Ok(Results {
            entries: self.entries,
            rounds,
        })
    }
}

impl Entry {
    fn measure(&mut self, round: usize) -> anyhow::Result<f64> {
        let Ok(variant) = &mut self.variant else {
            return Ok(f64::NAN);
        };
        let measured = variant
            .turn(self.turn)
            .map_err(|error| error.context(self.name))?;
        if round > 0 {
            self.latencies.add(&measured.latencies)?;
            self.cpu_ns.push(measured.cpu_ns);
        }
        Ok(measured.value_ns())
    }
}

/// One number in the unit that suits it: below 10 us in ns.
fn unit(ns: f64) -> (&'static str, f64) {
    if ns < 10_000.0 {
        ("ns", 1.0)
    } else {
        ("us", 1_000.0)
    }
}

impl Results {
    /// Median over the rounds, in nanoseconds; NaN for what was not run.
    pub(crate) fn ns(&self, key: Key) -> f64 {
        self.rounds.of(key.0)
    }

    /// The one of two that goes with how the two cores lie to each other; none for
    /// threads of one core, and where no probe told.
    pub(crate) fn by_nearness<T>(&self, near: T, far: T) -> Option<T> {
        match self.rounds.nearness {
            Some(Nearness::Near(_)) => Some(near),
            Some(Nearness::Far(_)) => Some(far),
            _ => None,
        }
    }

    /// A case: one variant against another one.
    pub(crate) fn against(
        &self,
        case: &'static str,
        ours: Key,
        theirs: Key,
        goal: Option<Goal>,
    ) -> Outcome {
        let baseline = self.entries[theirs.0].name;
        let outcome = self.against_value(case, ours, (baseline, self.ns(theirs)), goal);
        let reason = self.entries[theirs.0].variant.as_ref().err();
        match reason {
            Some(reason) => Outcome::not_run(case, baseline, reason),
            None => {
                let theirs = &self.entries[theirs.0];
                theirs.describe(outcome)
            }
        }
    }

    /// A case: one variant against a number of nanoseconds.
    pub(crate) fn against_value(
        &self,
        case: &'static str,
        ours: Key,
        (baseline, baseline_ns): (&'static str, f64),
        goal: Option<Goal>,
    ) -> Outcome {
        let entry = &self.entries[ours.0];
        if let Err(reason) = &entry.variant {
            return Outcome::not_run(case, entry.name, reason);
        }
        let value = self.ns(ours);
        let (unit, scale) = unit(value.min(baseline_ns));
        let baseline = (baseline, baseline_ns / scale);
        let mut outcome = match goal {
            Some(Goal::AtLeast(_)) => Outcome::less(case, unit, value / scale, baseline),
            _ => Outcome::times(case, unit, value / scale, baseline),
        };
        outcome.goal = goal;
        outcome = entry.describe(outcome);
        match self.rounds.placement() {
            Some(words) => outcome.note(words),
            None => outcome,
        }
    }
}

impl Entry {
    /// Adds this variant's distribution and processor time.
    fn describe(&self, outcome: Outcome) -> Outcome {
        let cpu = Duration::from_nanos(median(&self.cpu_ns) as u64);
        let outcome = outcome.note(format!("{}: {cpu:.1?} of processor per call", self.name));
        if self.latencies.len() == 0 {
            outcome
        } else {
            outcome.latency(self.name, &self.latencies)
        }
    }
}
