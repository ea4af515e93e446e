//! Interleaved rounds and their medians.

use super::{Nearness, Options};

/// The median; NaN of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// What each variant measured in each round that counts.
pub(crate) struct Rounds {
    values: Vec<Vec<f64>>,
    /// Of cases over two cores: what the probes said, and rounds dropped for it.
    pub(crate) nearness: Option<Nearness>,
    pub(crate) dropped: usize,
}

impl Rounds {
    /// Runs variants `0 .. variants` once per round, each round beginning with
    /// another one; the first round is dropped.
    pub(crate) fn run(
        options: &Options,
        variants: usize,
        mut measure: impl FnMut(usize, usize) -> anyhow::Result<f64>,
    ) -> anyhow::Result<Self> {
        let mut rounds = Self::new(variants, None);
        for round in 0..=options.rounds() {
            let values = one_round(variants, round, &mut measure)?;
            if round > 0 {
                rounds.keep(&values);
            }
        }
        Ok(rounds)
    }

    /// The same over two cores: a round in which the cores moved apart or together
    /// is dropped, and up to as many again are run instead.
    pub(crate) fn run_over_two_cores(
        options: &Options,
        variants: usize,
        mut measure: impl FnMut(usize, usize) -> anyhow::Result<f64>,
    ) -> anyhow::Result<Self> {
        one_round(variants, 0, &mut measure)?;
        let mut before = Nearness::probe();
        let mut rounds = Self::new(variants, Some(before));
        let mut spare = Vec::new();
        for round in 1..=2 * options.rounds() {
            let values = one_round(variants, round, &mut measure)?;
            let after = Nearness::probe();
            if before.agrees_with(after) && after != Nearness::Unknown {
                rounds.keep(&values);
                rounds.nearness = Some(after);
            } else {
                rounds.dropped += 1;
                spare.push(values);
            }
            before = after;
            if rounds.values[0].len() == options.rounds() {
                return Ok(rounds);
            }
        }
        // A machine so busy that no probe tells: the rounds count, and are said to
        // be of unknown placement.
        for values in spare {
            rounds.keep(&values);
        }
        rounds.nearness = Some(Nearness::Unknown);
        rounds.dropped = 0;
        Ok(rounds)
    }

    fn new(variants: usize, nearness: Option<Nearness>) -> Self {
        Self {
            values: vec![Vec::new(); variants],
            nearness,
            dropped: 0,
        }
    }

    fn keep(&mut self, values: &[f64]) {
        for (list, value) in self.values.iter_mut().zip(values) {
            list.push(*value);
        }
    }

    /// The median of one variant.
    pub(crate) fn of(&self, variant: usize) -> f64 {
        median(&self.values[variant])
    }

    /// The placement in words, for a note.
    pub(crate) fn placement(&self) -> Option<String> {
        let nearness = self.nearness?;
        Some(format!(
            "cores 0 and 1: {nearness}; {} rounds dropped",
            self.dropped
        ))
    }
}

fn one_round(
    variants: usize,
    round: usize,
    measure: &mut impl FnMut(usize, usize) -> anyhow::Result<f64>,
) -> anyhow::Result<Vec<f64>> {
    let mut values = vec![f64::NAN; variants];
    for turn in 0..variants {
        let variant = (turn + round) % variants;
        values[variant] = measure(variant, round)?;
    }
    Ok(values)
}

/// The numbers `0 .. count` in an order that no prefetcher foresees, always the same.
pub(crate) fn scattered(count: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for last in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(last, (state % (last as u64 + 1)) as usize);
    }
    order
}
