//! Interleaved rounds and their medians.

use uffd_sync::sys::process::pin_to_cpu;

use super::{Nearness, Options, Placement};

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
    /// is dropped. Rounds go on until enough of them have found the cores alike, at most twice as many as asked for; then those alike that are more count.
    pub(crate) fn run_over_two_cores(
        options: &Options,
        variants: usize,
        mut measure: impl FnMut(usize, usize) -> anyhow::Result<f64>,
    ) -> anyhow::Result<Self> {
        one_round(variants, 0, &mut measure)?;
        let mut before = Nearness::probe();
        let mut alike = [(); 3].map(|()| Self::new(variants, None));
        let mut spare = Self::new(variants, Some(Nearness::Unknown));
        for round in 1..=2 * options.rounds() {
            let values = one_round(variants, round, &mut measure)?;
            let after = Nearness::probe();
            let kept = match after {
                _ if !before.agrees_with(after) => &mut spare,
                Nearness::Near(_) => &mut alike[0],
                Nearness::Far(_) => &mut alike[1],
                Nearness::Sibling(_) => &mut alike[2],
                Nearness::Unknown => &mut spare,
            };
            kept.keep(&values);
            kept.nearness = Some(after);
            before = after;
            if alike.iter().any(|kind| kind.count() == options.rounds()) {
                break;
            }
        }
        let all = spare.count() + alike.iter().map(Self::count).sum::<usize>();
        let [near, far, sibling] = alike;
        let most = |a: Self, b: Self| if a.count() >= b.count() { a } else { b };
        let mut rounds = most(most(near, far), sibling);
        if rounds.count() == 0 {
            // A machine so busy that no probe tells: the rounds count, and are said
            // to be of unknown placement.
            rounds = spare;
            rounds.nearness = Some(Nearness::Unknown);
        }
        rounds.dropped = all - rounds.count();
        Ok(rounds)
    }

    /// One of the two above, with the client's thread where the placement has it.
    /// What is measured is used on a thread of its own, so that nothing else of this
    /// process stays pinned.
    pub(crate) fn run_placed(
        options: &Options,
        placement: Placement,
        variants: usize,
        measure: impl FnMut(usize, usize) -> anyhow::Result<f64> + Send,
    ) -> anyhow::Result<Self> {
        let measured = std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                if let [Some(core), _] = placement.cores() {
                    pin_to_cpu(core)?;
                }
                match placement {
                    Placement::TwoCores => Self::run_over_two_cores(options, variants, measure),
                    Placement::OneCore | Placement::Free => Self::run(options, variants, measure),
                }
            });
            client.join()
        });
        measured.map_err(|_| anyhow::anyhow!("the measuring thread panicked"))?
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

    /// Rounds that count.
    fn count(&self) -> usize {
        self.values[0].len()
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
