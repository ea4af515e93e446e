//! Eight bytes changed in each of 1 % of the pages: against a replication that finds
//! the dirty pages in the same way but sends them whole, and against the whole region.

use anyhow::ensure;
use uffd_sync::client::Writer;
use uffd_sync::shm::OwnedMemory;
use uffd_sync::sys::process::monotonic_ns;
use uffd_sync::units::{GIB, MIB, PAGE_SIZE};
use uffd_sync::words::Mode;

use crate::harness::{BareScan, BareUffd, Goal, Options, Outcome, Rounds, Span, median, scattered};
use crate::nodes::{PATIENCE, Pair, place_of};
use crate::sink::{Sender, allocated};
use crate::watch::{Watcher, store};

const BYTES: &str = "one-percent/bytes-whole-pages";
const TIME_PAGES: &str = "one-percent/time-whole-pages";
const TIME_REGION: &str = "one-percent/time-whole-region";

pub(crate) const CASES: &[&str] = &[BYTES, TIME_PAGES, TIME_REGION];

/// Bytes changed in each dirty page.
const CHANGED: u64 = 8;

struct Subject {
    pair: Pair,
    region: (Writer, Watcher),
    bare: Bare,
    /// Page numbers, the first hundredth of which is dirtied, rising.
    dirty: Vec<u64>,
    /// Bytes on the wire of each round that counts.
    ours: Vec<f64>,
    pages: Vec<f64>,
}

/// The baseline's memory: tracked by the kernel alone.
struct Bare {
    memory: OwnedMemory,
    uffd: BareUffd,
    scan: BareScan,
    sender: Sender,
}

impl Bare {
    fn new(size: u64) -> anyhow::Result<Self> {
        let memory = allocated(size)?;
        let uffd = BareUffd::new(span_of(&memory))?;
        uffd.protect(span_of(&memory))?;
        let scan = BareScan::new((size / PAGE_SIZE) as usize)?;
        Ok(Self {
            memory,
            uffd,
            scan,
            sender: Sender::start(size)?,
        })
    }

    fn change(&mut self, pages: &[u64], value: u64) {
        for page in pages {
            let at = (page * PAGE_SIZE) as usize;
            self.memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Finds the dirty pages and sends them whole; nanoseconds.
    fn send_pages(&mut self, expected: usize) -> anyhow::Result<f64> {
        let span = span_of(&self.memory);
        let begun = monotonic_ns();
        let mut pages = Vec::with_capacity(expected);
        for region in self.scan.protect(span)? {
            let (start, end) = (region.start - span.address, region.end - span.address);
            pages.extend(start / PAGE_SIZE..end / PAGE_SIZE);
        }
        let held = self.sender.send_pages(&self.memory, &pages)?;
        ensure!(
            pages.len() == expected,
            "the bare scan found {} pages",
            pages.len()
        );
        self.sender.verify(&self.memory)?;
        Ok((held - begun) as f64)
    }

    fn send_region(&mut self) -> anyhow::Result<f64> {
        let begun = monotonic_ns();
        let held = self.sender.send_region(&self.memory)?;
        self.sender.verify(&self.memory)?;
        self.uffd.protect(span_of(&self.memory))?;
        Ok((held - begun) as f64)
    }
}

fn span_of(memory: &OwnedMemory) -> Span {
    Span {
        address: memory.as_ptr() as u64,
        len: memory.len() as u64,
    }
}

impl Subject {
    fn new(size: u64) -> anyhow::Result<Self> {
        let pair = Pair::start([None; 2])?;
        let writer = pair.replicated("region", size, Mode::Async)?;
        let watcher = Watcher::start(&pair, "region", None)?;
        let mut dirty = scattered(size / PAGE_SIZE);
        dirty.truncate(dirty.len() / 100);
        dirty.sort_unstable();
        Ok(Self {
            pair,
            region: (writer, watcher),
            bare: Bare::new(size)?,
            dirty,
            ours: Vec::new(),
            pages: Vec::new(),
        })
    }

    /// One round of one variant, in milliseconds.
    fn measure(&mut self, variant: usize, round: usize) -> anyhow::Result<f64> {
        let seq = round as u64 + 1;
        let ns = match variant {
            0 => self.update(seq, round > 0)?,
            1 => {
                self.bare.change(&self.dirty, !seq);
                let before = self.bare.sender.bytes_sent;
                let ns = self.bare.send_pages(self.dirty.len())?;
                if round > 0 {
                    self.pages
                        .push((self.bare.sender.bytes_sent - before) as f64);
                }
                ns
            }
            _ => self.bare.send_region()?,
        };
        Ok(ns / 1e6)
    }

    fn update(&mut self, seq: u64, counts: bool) -> anyhow::Result<f64> {
        let (writer, watcher) = (&self.region.0, &mut self.region.1);
        let before = self.pair.bytes_sent("region", 0)?;
        for page in &self.dirty {
            // Every byte of the eight changes, as those at the page's start.
            let value = (seq << 1 | 1).wrapping_mul(0x0101_0101_0101_0101);
            writer.write(page * PAGE_SIZE, &value.to_le_bytes())?;
        }
        // The value that the reader waits for is on one page more.
        ensure!(
            !place_of(seq, writer.size()).is_multiple_of(PAGE_SIZE),
            "it would hide a change"
        );
        let mut epoch = 0;
        let latencies = watcher.time(
            (seq, 1),
            |seq| store(writer, seq),
            || {
                epoch = writer.commit(PATIENCE)?.number;
                Ok(())
            },
        )?;
        let sent = self.pair.bytes_sent("region", epoch)? - before;
        if counts {
            self.ours.push(sent as f64);
        }
        Ok(latencies.at(0.5))
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let size = options.pick(128 * MIB, GIB);
    let mut subject = Subject::new(size)?;
    let rounds = Rounds::run(options, 3, |variant, round| subject.measure(variant, round))?;
    subject.pair.verify("region", &subject.region.0)?;
    let [ours, pages, region] = [0, 1, 2].map(|variant| rounds.of(variant));
    let (bytes, page_bytes) = (median(&subject.ours), median(&subject.pages));
    let note = format!(
        "{} of {} MiB in pages of 4 KiB, {CHANGED} bytes in each",
        subject.dirty.len(),
        size / MIB
    );
    let Subject {
        pair, region: one, ..
    } = subject;
    drop(one);
    pair.end()?;
    Ok(vec![
        Outcome::less(
            BYTES,
            "bytes",
            bytes,
            ("bare scan, whole dirty pages", page_bytes),
        )
        .goal(Goal::AtLeast(50.0))
        .note(&note),
        Outcome::less(
            TIME_PAGES,
            "ms",
            ours,
            ("bare scan, whole dirty pages", pages),
        )
        .goal(Goal::AtLeast(2.0))
        .note(&note),
        Outcome::less(
            TIME_REGION,
            "ms",
            ours,
            ("bare TCP stream of the whole region", region),
        )
        .goal(Goal::AtLeast(100.0))
        .note(&note),
    ])
}
