//! What the benches share: flags, rounds, latencies, reports, child processes.
//!
//! ```text
//! round 1: A B C   round 2: B C A   round 3: C A B ...   first round dropped
//!          each variant's value = median of its rounds
//! ```
//!
//! - H1: a baseline runs in the same process tree, in the same rounds and in the
//!   same placement as what it is compared with.
//! - H2: a goal that is missed is reported by `holds` and the exit code stays 0;
//!   data that is not what was stored ends the bench with an error.
//! - H3: nothing outlives the bench: a watchdog ends it, and a child process ends
//!   when its channel is closed or its own watchdog fires.
#![allow(dead_code, unused_imports, reason = "each bench uses its part of this")]

mod bare;
mod child;
mod latency;
mod placement;
mod probe;
mod report;
mod rounds;

use std::time::{Duration, Instant};

use clap::Parser;

pub(crate) use bare::{BareScan, BareUffd, Span, pages_in};
pub(crate) use child::{Channel, Child, Role};
pub(crate) use latency::Latencies;
pub(crate) use placement::Placement;
pub(crate) use probe::Nearness;
pub(crate) use report::{Goal, Outcome};
pub(crate) use rounds::{Rounds, median, scattered};

/// Longest run, and the longest of `--quick` and of `--all`, by which the watchdog
/// goes. A smoke run is meant to take far less than its bound; a machine that
/// compiles meanwhile is slow.
const LONGEST: Duration = Duration::from_secs(8 * 60);
const LONGEST_QUICK: Duration = Duration::from_secs(3 * 60);
const LONGEST_ALL: Duration = Duration::from_secs(20 * 60);

/// Flags of every bench.
#[derive(Clone, Debug, Parser)]
#[command(about = "Measures against a baseline in the same run", version = None)]
pub(crate) struct Options {
    /// Short rounds and small sizes: shows that the bench works, measures little.
    #[arg(long)]
    pub(crate) quick: bool,
    /// One JSON object per case and line.
    #[arg(long)]
    pub(crate) json: bool,
    /// The long cases too.
    #[arg(long)]
    pub(crate) all: bool,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "SUBSTR")]
    pub(crate) filter: Option<String>,
    /// Passed by cargo.
    #[arg(long = "bench", hide = true)]
    _bench: bool,
    /// Runs as one of the processes that a case needs: role, then its arguments.
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    child: Vec<String>,
}

impl Options {
    /// Rounds that count, beyond the one that is dropped.
    pub(crate) fn rounds(&self) -> usize {
        if self.quick { 3 } else { 7 }
    }

    /// One of two numbers.
    pub(crate) fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Whether a case is asked for.
    pub(crate) fn wants(&self, case: &str) -> bool {
        self.filter
            .as_deref()
            .is_none_or(|part| case.contains(part))
    }

    fn longest(&self) -> Duration {
        if !self.child.is_empty() {
            return LONGEST_ALL;
        }
        match (self.quick, self.all) {
            (true, _) => LONGEST_QUICK,
            (false, true) => LONGEST_ALL,
            (false, false) => LONGEST,
        }
    }
}

/// Cases that are measured together.
pub(crate) struct Group {
    /// Names of all cases that it can report.
    pub(crate) cases: &'static [&'static str],
    /// Whether it runs with `--all` only.
    pub(crate) only_all: bool,
    /// Measures and verifies.
    pub(crate) run: fn(&Options) -> anyhow::Result<Vec<Outcome>>,
}

impl Group {
    /// Cases that always run.
    pub(crate) const fn of(
        cases: &'static [&'static str],
        run: fn(&Options) -> anyhow::Result<Vec<Outcome>>,
    ) -> Self {
        Self {
            cases,
            only_all: false,
            run,
        }
    }
}

/// The whole program: flags, child roles, groups, report, exit code.
pub(crate) fn run(bench: &'static str, groups: &[Group], roles: &[Role]) -> std::process::ExitCode {
    let options = Options::parse();
    watchdog(options.longest());
    let result = if options.child.is_empty() {
        measure(bench, groups, &options)
    } else {
        child::serve(roles, &options.child)
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            report::complain(bench, &error);
            std::process::ExitCode::FAILURE
        }
    }
}

fn measure(bench: &'static str, groups: &[Group], options: &Options) -> anyhow::Result<()> {
    let mut report = report::Report::new(bench, options.json);
    for group in groups {
        let asked = group.cases.iter().any(|case| options.wants(case));
        if !asked || (group.only_all && !options.all) {
            continue;
        }
        let started = Instant::now();
        let outcomes = (group.run)(options)?;
        report.took(started.elapsed());
        for outcome in outcomes
            .iter()
            .filter(|outcome| options.wants(outcome.case))
        {
            report.add(outcome)?;
        }
    }
    report.end()
}

/// Ends the process when its time is over, whatever it waits for.
fn watchdog(longest: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(longest);
        report::complain("watchdog", &anyhow::anyhow!("not done after {longest:?}"));
        std::process::exit(3);
    });
}
