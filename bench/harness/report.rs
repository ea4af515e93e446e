//! What a case found, as a table for people or as JSON lines.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::Latencies;

/// A bound on a ratio.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    fn number(self) -> f64 {
        match self {
            Self::AtMost(bound) | Self::AtLeast(bound) => bound,
        }
    }

    fn holds(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(bound) => ratio <= bound,
            Self::AtLeast(bound) => ratio >= bound,
        }
    }
}

/// What one case found. `ratio` is the one that the goal speaks of.
pub(crate) struct Outcome {
    pub(crate) case: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) value: f64,
    pub(crate) baseline: &'static str,
    pub(crate) baseline_value: f64,
    pub(crate) ratio: f64,
    pub(crate) goal: Option<Goal>,
    pub(crate) latencies: Vec<(&'static str, Latencies)>,
    pub(crate) notes: Vec<String>,
    /// Why it was not measured.
    pub(crate) not_run: Option<String>,
}

impl Outcome {
    /// A case whose ratio is value over baseline: how many times the baseline.
    pub(crate) fn times(
        case: &'static str,
        unit: &'static str,
        value: f64,
        (baseline, baseline_value): (&'static str, f64),
    ) -> Self {
        Self {
            case,
            unit,
            value,
            baseline,
            baseline_value,
            ratio: value / baseline_value,
            goal: None,
            latencies: Vec::new(),
            notes: Vec::new(),
            not_run: None,
        }
    }

    /// A case that was not measured, for a reason; its numbers are null.
    pub(crate) fn not_run(
        case: &'static str,
        baseline: &'static str,
        reason: impl Into<String>,
    ) -> Self {
        let mut outcome = Self::times(case, "", f64::NAN, (baseline, f64::NAN));
        outcome.not_run = Some(reason.into());
        outcome
    }

    /// A case whose ratio is baseline over value: how many times less than it.
    pub(crate) fn less(
        case: &'static str,
        unit: &'static str,
        value: f64,
        baseline: (&'static str, f64),
    ) -> Self {
        let mut outcome = Self::times(case, unit, value, baseline);
        outcome.ratio = outcome.baseline_value / outcome.value;
        outcome
    }

    pub(crate) fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    pub(crate) fn latency(mut self, of: &'static str, latencies: &Latencies) -> Self {
        self.latencies.push((of, latencies.clone()));
        self
    }
}

#[derive(Serialize)]
struct Line<'a> {
    bench: &'a str,
    case: &'a str,
    unit: &'a str,
    value: f64,
    baseline: &'a str,
    baseline_value: f64,
    ratio: f64,
    goal: Option<f64>,
    holds: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_run: Option<&'a str>,
}

/// Prints outcomes as they come.
pub(super) struct Report {
    bench: &'static str,
    json: bool,
    missed: usize,
    goals: usize,
    took: Duration,
}

impl Report {
    pub(super) fn new(bench: &'static str, json: bool) -> Self {
        Self {
            bench,
            json,
            missed: 0,
            goals: 0,
            took: Duration::ZERO,
        }
    }

    pub(super) fn took(&mut self, time: Duration) {
        self.took += time;
    }

    pub(super) fn add(&mut self, outcome: &Outcome) -> anyhow::Result<()> {
        let measured = outcome.not_run.is_none();
        let goal = outcome.goal.filter(|_| measured);
        let holds = goal.map(|goal| goal.holds(outcome.ratio));
        self.goals += usize::from(holds.is_some());
        self.missed += usize::from(holds == Some(false));
        let mut out = io::stdout().lock();
        if self.json {
            let line = Line {
                bench: self.bench,
                case: outcome.case,
                unit: outcome.unit,
                value: outcome.value,
                baseline: outcome.baseline,
                baseline_value: outcome.baseline_value,
                ratio: outcome.ratio,
                goal: goal.map(Goal::number),
                holds,
                not_run: outcome.not_run.as_deref(),
            };
            writeln!(out, "{}", serde_json::to_string(&line)?)?;
        } else {
            table(&mut out, outcome, holds)?;
        }
        out.flush()?;
        Ok(())
    }

    pub(super) fn end(&self) -> anyhow::Result<()> {
        if !self.json {
            writeln!(
                io::stdout(),
                "{}: {} of {} goals hold; {:.1?}",
                self.bench,
                self.goals - self.missed,
                self.goals,
                self.took
            )?;
        }
        Ok(())
    }
}

fn table(out: &mut impl Write, outcome: &Outcome, holds: Option<bool>) -> io::Result<()> {
    let Outcome { unit, .. } = outcome;
    writeln!(out, "{}", outcome.case)?;
    if let Some(reason) = &outcome.not_run {
        return writeln!(out, "    not run: {reason} ({})\n", outcome.baseline);
    }
    writeln!(
        out,
        "    {:<52} {:>12} {unit}",
        "measured",
        number(outcome.value)
    )?;
    writeln!(
        out,
        "    {:<52} {:>12} {unit}",
        outcome.baseline,
        number(outcome.baseline_value)
    )?;
    let goal = match (outcome.goal, holds) {
        (Some(Goal::AtMost(bound)), Some(holds)) => format!("goal <= {bound:.2}x {}", met(holds)),
        (Some(Goal::AtLeast(bound)), Some(holds)) => format!("goal >= {bound:.2}x {}", met(holds)),
        _ => "no goal".to_owned(),
    };
    writeln!(
        out,
        "    {:<52} {:>12} x   {goal}",
        "ratio",
        number(outcome.ratio)
    )?;
    for (of, latencies) in &outcome.latencies {
        writeln!(out, "    {of}: {latencies}")?;
    }
    for note in &outcome.notes {
        writeln!(out, "    {note}")?;
    }
    writeln!(out)
}

fn met(holds: bool) -> &'static str {
    if holds { "holds" } else { "MISSED" }
}

fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

/// Says on the error stream what went wrong, with its causes.
pub(super) fn complain(what: &str, error: &anyhow::Error) {
    let _ = writeln!(io::stderr(), "{what}: {error:#}");
}
