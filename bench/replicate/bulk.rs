//! Every byte of a region changed: from entering `commit()` to the reader on the
//! replica seeing it, against a bare TCP stream of as many bytes.

use std::time::Duration;

use anyhow::bail;
use uffd_sync::client::{self, Writer};
use uffd_sync::shm::OwnedMemory;
use uffd_sync::sys::process::monotonic_ns;
use uffd_sync::units::{GIB, MIB, PAGE_SIZE};
use uffd_sync::words::Mode;

use crate::harness::{Goal, Options, Outcome, Rounds, median};
use crate::nodes::{PATIENCE, Pair};
use crate::sink::{Sender, allocated};
use crate::watch::{Watcher, store};

const ASYNC: &str = "all-pages/async";
const MANUAL: &str = "all-pages/manual";
const SHIPPING: &str = "all-pages/async-after-capture";
const ASYNC_LARGE: &str = "all-pages-1GiB/async";
const MANUAL_LARGE: &str = "all-pages-1GiB/manual";
const SHIPPING_LARGE: &str = "all-pages-1GiB/async-after-capture";

pub(crate) const CASES: &[&str] = &[ASYNC, MANUAL, SHIPPING];
pub(crate) const CASES_LARGE: &[&str] = &[ASYNC_LARGE, MANUAL_LARGE, SHIPPING_LARGE];

const BASELINE: &str = "bare TCP stream into staging, CRC-32C, one memcpy";

struct Subject {
    pair: Pair,
    asynchronous: (Writer, Watcher),
    manual: (Writer, Watcher),
    memory: OwnedMemory,
    sender: Sender,
    /// From the return of `commit()` to seen, of the rounds that count, in MB/s.
    shipping: Vec<f64>,
}

impl Subject {
    fn new(size: u64) -> anyhow::Result<Self> {
        let pair = Pair::start([None; 2])?;
        let region = |name, mode| -> anyhow::Result<_> {
            let writer = pair.replicated(name, size, mode)?;
            let watcher = Watcher::start(&pair, name, None)?;
            Ok((writer, watcher))
        };
        Ok(Self {
            asynchronous: region("async", Mode::Async)?,
            manual: region("manual", Mode::Manual)?,
            pair,
            memory: allocated(size)?,
            sender: Sender::start(size)?,
            shipping: Vec::new(),
        })
    }

    /// One round of one variant, in MB/s.
    fn measure(&mut self, variant: usize, round: usize) -> anyhow::Result<f64> {
        let seq = round as u64 + 1;
        let ns = match variant {
            0 => {
                let (ns, captured_ns) = update(&self.pair, "async", &mut self.asynchronous, seq)?;
                if round > 0 {
                    let shipped_ns = ns - captured_ns;
                    self.shipping
                        .push(self.memory.len() as f64 / shipped_ns * 1e3);
                }
                ns
            }
            1 => update(&self.pair, "manual", &mut self.manual, seq)?.0,
            _ => {
                self.memory.fill(round as u8 + 2);
                let begun = monotonic_ns();
                let held = self.sender.send_region(&self.memory)?;
                self.sender.verify(&self.memory)?;
                (held - begun) as f64
            }
        };
        Ok(self.memory.len() as f64 / ns * 1e3)
    }
}

/// Changes every byte of a region; nanoseconds from entering `commit()` until the
/// replica shows it, and until it returned.
fn update(
    pair: &Pair,
    name: &str,
    (writer, watcher): &mut (Writer, Watcher),
    seq: u64,
) -> anyhow::Result<(f64, f64)> {
    let writer = &*writer;
    let mut returned_ns = 0.0;
    let mut pattern = [0u8; PAGE_SIZE as usize];
    for (place, byte) in pattern.iter_mut().enumerate() {
        *byte = (place as u8).wrapping_mul(31).wrapping_add(seq as u8);
    }
    for page in 0..writer.size() / PAGE_SIZE {
        writer.write(page * PAGE_SIZE, &pattern)?;
    }
    writer.mark_region_changed(0, writer.size())?;
    let latencies = watcher.time(
        (seq, 1),
        |seq| store(writer, seq),
        || {
            let begun = monotonic_ns();
            writer.commit(PATIENCE)?;
            returned_ns = (monotonic_ns() - begun) as f64;
            Ok(())
        },
    )?;
    pair.verify(name, writer)?;
    Ok((latencies.at(0.5), returned_ns))
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    measure(options, options.pick(32 * MIB, 256 * MIB), CASES)
}

pub(crate) fn run_large(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    measure(options, GIB, CASES_LARGE)
}

fn measure(options: &Options, size: u64, cases: &[&'static str]) -> anyhow::Result<Vec<Outcome>> {
    let &[async_case, manual_case, shipping_case] = cases else {
        bail!("three cases are reported");
    };
    let mut subject = Subject::new(size)?;
    let rounds = Rounds::run(options, 3, |variant, round| subject.measure(variant, round))?;
    let [asynchronous, manual, bare] = [0, 1, 2].map(|variant| rounds.of(variant));
    let shipping = median(&subject.shipping);
    let Subject {
        pair,
        asynchronous: one,
        manual: other,
        ..
    } = subject;
    drop((one, other));
    pair.end()?;
    let what = format!(
        "{} MiB; from commit() to seen, capture included",
        size / MIB
    );
    Ok(vec![
        Outcome::times(async_case, "MB/s", asynchronous, (BASELINE, bare))
            .goal(Goal::AtLeast(0.75))
            .note(&what),
        Outcome::times(manual_case, "MB/s", manual, (BASELINE, bare)).note(&what),
        Outcome::times(shipping_case, "MB/s", shipping, (BASELINE, bare))
            .note("from the return of commit(), which is when the capture is done, to seen"),
    ])
}

const FIRST: &str = "first-sync";
pub(crate) const CASES_FIRST: &[&str] = &[FIRST];

/// A replica that has nothing yet gets the whole region.
struct FirstSync {
    pair: Pair,
    writer: Writer,
    node: client::Node,
    memory: OwnedMemory,
    sender: Sender,
}

impl FirstSync {
    const NAME: &str = "first";

    fn measure(&mut self, variant: usize, round: usize) -> anyhow::Result<f64> {
        let begun;
        let held = if variant == 0 {
            begun = monotonic_ns();
            self.pair.follow(&mut self.node, Self::NAME)?;
            while !self.is_whole()? {
                std::thread::sleep(LOOK);
            }
            let held = monotonic_ns();
            self.pair.verify(Self::NAME, &self.writer)?;
            self.node.unfollow(Self::NAME)?;
            held
        } else {
            self.memory.fill(round as u8 + 2);
            self.sender.freshen()?;
            begun = monotonic_ns();
            let held = self.sender.place_region(&self.memory)?;
            self.sender.verify(&self.memory)?;
            held
        };
        Ok(self.memory.len() as f64 / (held - begun) as f64 * 1e3)
    }

    fn is_whole(&mut self) -> anyhow::Result<bool> {
        let regions = self.node.status()?.regions;
        let replica = regions.iter().find(|region| region.name == Self::NAME);
        Ok(replica.is_some_and(|replica| replica.state == "following"))
    }
}

/// Pause between two looks at the replica's state.
const LOOK: Duration = Duration::from_micros(500);

pub(crate) fn run_first(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let size = options.pick(32 * MIB, 256 * MIB);
    let pair = Pair::start([None; 2])?;
    let mut subject = FirstSync {
        writer: pair.writer(FirstSync::NAME, size, Mode::Manual, true)?,
        node: client::Node::connect(pair.replica_socket())?,
        pair,
        memory: allocated(size)?,
        sender: Sender::start(size)?,
    };
    let rounds = Rounds::run(options, 2, |variant, round| subject.measure(variant, round))?;
    let FirstSync { pair, writer, .. } = subject;
    drop(writer);
    pair.end()?;
    let baseline = "bare TCP stream into new memory, CRC-32C";
    let (ours, bare) = (rounds.of(0), rounds.of(1));
    Ok(vec![
        Outcome::times(FIRST, "MB/s", ours, (baseline, bare)).note(format!(
            "{} MiB; from follow() to whole, in place",
            size / MIB
        )),
    ])
}
