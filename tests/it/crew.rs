//! What each of several processes does that write one region, on order.
//!
//! ```text
//! page 0       words: whose turn the relay is | gate of the count
//! pages 1 ..   words: relay | chain of process 0 | chain of process 1 | ...
//! ```
//! The store `n` of a chain goes to page [`page_of`]`(chain, n)`; those of the relay come
//! from all processes in turn. So a cut holds a prefix of each of them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uffd_sync::client::Writer;

use super::nodes::PATIENCE;
use super::pattern::{Numbers, PAGE};
use super::writer::{AMOUNT, Order, Outcome, Report, is_told, say};

/// Words of a page that chains use: the relay, and one for each process.
pub(crate) const CHAINS: usize = 32;

/// What one of several writers does until its next order.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Share {
    /// A chain of its own, and its part of the relay of `all` processes.
    Chains { number: u64, all: u64, pages: u64 },
    /// Moves amounts between accounts of its own under guards, and commits after some.
    Bank { number: u64, all: u64, fill: bool },
    /// Takes a guard, stores a byte and keeps the guard.
    Hold { offset: u64, byte: u8 },
    /// Adds one to words of its own all over the region, from several threads.
    Count { number: u64, threads: u64 },
    /// Maps and unmaps other memory all the time, beside its chain.
    MapStorm { number: u64, pages: u64 },
}

/// The page of a chain's store.
pub(crate) fn page_of(chain: usize, number: u64, pages: u64) -> u64 {
    let mut x = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (chain as u64 + 1) << 56;
    x ^= x >> 29;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    1 + (x >> 33) % (pages - 1)
}

/// Where a chain's word of a page stands.
fn place(page: u64, chain: usize) -> u64 {
    page * PAGE as u64 + 8 * chain as u64
}

/// Carries the order out.
pub(super) fn work(region: &Writer, orders: &Receiver<Order>, share: &Share) -> Outcome {
    match *share {
        Share::Chains { number, all, pages } => chains(region, orders, number, all, pages),
        Share::Bank { number, all, fill } => bank(region, orders, number, all, fill),
        Share::Hold { offset, byte } => {
            let _guard = region.write_guard()?;
            region.write(offset, &[byte])?;
            say(&Report::Done);
            wait(orders);
            Ok(Report::Done)
        }
        Share::Count { number, threads } => count(region, orders, number, threads),
        Share::MapStorm { number, pages } => map_storm(region, orders, number, pages),
    }
}

fn wait(orders: &Receiver<Order>) {
    while !is_told(orders) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The word at an offset of a region that this process writes.
fn word(region: &Writer, offset: u64) -> &AtomicU64 {
    region.atomic_u64(offset).expect("a word of the region")
}

fn chains(region: &Writer, orders: &Receiver<Order>, number: u64, all: u64, pages: u64) -> Outcome {
    let stop = AtomicBool::new(false);
    let longest = AtomicU64::new(0);
    let stores = std::thread::scope(|scope| {
        scope.spawn(|| relay(region, number, all, pages, &stop));
        let own = scope.spawn(|| chain(region, number as usize + 1, pages, &stop, &longest));
        wait(orders);
        stop.store(true, Ordering::Relaxed);
        own.join()
    });
    Ok(Report::Beaten {
        stores: stores.map_err(|_| "the chain panicked")?,
        longest_us: longest.load(Ordering::Relaxed),
    })
}

/// Goes on with a chain where it stands.
fn chain(region: &Writer, chain: usize, pages: u64, stop: &AtomicBool, longest: &AtomicU64) -> u64 {
    let last = (1..pages).map(|page| word(region, place(page, chain)).load(Ordering::Relaxed));
    let first = last.max().unwrap_or(0) + 1;
    let mut number = first;
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let page = page_of(chain, number, pages);
        word(region, place(page, chain)).store(number, Ordering::Release);
        longest.fetch_max(begun.elapsed().as_micros() as u64, Ordering::Relaxed);
        number += 1;
    }
    number - first
}

/// Store `n` of the relay is that of process `n % all`.
fn relay(region: &Writer, own: u64, all: u64, pages: u64, stop: &AtomicBool) {
    let turn = word(region, 0);
    while !stop.load(Ordering::Relaxed) {
        let done = turn.load(Ordering::Acquire);
        if done % all != own {
            std::thread::yield_now();
            continue;
        }
        let page = page_of(0, done + 1, pages);
        word(region, place(page, 0)).store(done + 1, Ordering::Release);
        turn.store(done + 1, Ordering::Release);
    }
}

/// What chains have stored, as a cut shows it.
pub(crate) struct Chains {
    pages: u64,
    /// Of each chain: the last store seen, and where each page stands then.
    known: Vec<(u64, Vec<u64>)>,
}

impl Chains {
    pub(crate) fn new(pages: u64) -> Self {
        Self {
            pages,
            known: vec![(0, vec![0; pages as usize]); CHAINS],
        }
    }

    /// Whether `content` holds a prefix of each chain.
    pub(crate) fn is_whole(&mut self, content: &[u8]) -> bool {
        let pages = self.pages;
        let value = |page: u64, chain: usize| {
            let at = place(page, chain) as usize;
            u64::from_le_bytes(content[at..at + 8].try_into().expect("eight bytes"))
        };
        let mut whole = true;
        for (chain, (known, expected)) in self.known.iter_mut().enumerate() {
            let last = (1..pages).map(|page| value(page, chain)).max();
            let last = last.expect("there are pages");
            // So many stores leave no page out.
            let first = (*known + 1).max(last.saturating_sub(60 * pages));
            for number in first..=last {
                expected[page_of(chain, number, pages) as usize] = number;
            }
            *known = last.max(*known);
            whole &= (1..pages).all(|page| value(page, chain) == expected[page as usize]);
        }
        whole
    }

    /// The last store seen of the relay, and of the chain that has come least far.
    pub(crate) fn last(&self, processes: usize) -> (u64, u64) {
        let own = self.known[1..=processes].iter().map(|chain| chain.0);
        (self.known[0].0, own.min().unwrap_or(0))
    }
}

/// Accounts `number`, `number + all`, ... are this process's.
fn bank(region: &Writer, orders: &Receiver<Order>, number: u64, all: u64, fill: bool) -> Outcome {
    let accounts = region.size() / PAGE as u64;
    if fill {
        for account in 0..accounts {
            region.write(account * PAGE as u64, &AMOUNT.to_le_bytes())?;
        }
        region.commit(PATIENCE)?;
    }
    say(&Report::Done);
    let own = accounts / all;
    let mut numbers = Numbers::new(number);
    let (mut transactions, mut commits) = (0, 0);
    while !is_told(orders) {
        let offset = |index: u64| (index * all + number) * PAGE as u64;
        let from = offset(numbers.below(own / 2));
        let to = offset(own / 2 + numbers.below(own / 2));
        let amount = 1 + numbers.below(100);
        let guard = region.write_guard()?;
        for (at, by) in [(from, amount.wrapping_neg()), (to, amount)] {
            let changed = region.load::<u64>(at)?.wrapping_add(by);
            region.write(at, &changed.to_le_bytes())?;
        }
        transactions += 1;
        if numbers.below(8) == 0 {
            guard.commit(PATIENCE)?;
            commits += 1;
        }
    }
    Ok(Report::Moved {
        transactions,
        commits,
    })
}

fn count(region: &Writer, orders: &Receiver<Order>, number: u64, threads: u64) -> Outcome {
    let stop = AtomicBool::new(false);
    let pages = region.size() / PAGE as u64;
    let stores: u64 = std::thread::scope(|scope| {
        let counters: Vec<_> = (0..threads)
            .map(|thread| {
                let stop = &stop;
                scope.spawn(move || {
                    let own = number * threads + thread;
                    let mut numbers = Numbers::new(own);
                    let mut stores = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        let at = numbers.below(pages) * PAGE as u64 + 8 * own;
                        let word = word(region, at);
                        word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        stores += 1;
                    }
                    stores
                })
            })
            .collect();
        wait(orders);
        stop.store(true, Ordering::Relaxed);
        counters.into_iter().map(|it| it.join().unwrap_or(0)).sum()
    });
    Ok(Report::Beaten {
        stores,
        longest_us: 0,
    })
}

fn map_storm(region: &Writer, orders: &Receiver<Order>, number: u64, pages: u64) -> Outcome {
    let (stop, longest) = (AtomicBool::new(false), AtomicU64::new(0));
    let stores = std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Large enough for a mapping of its own, which is made and given back.
                    let mut memory = vec![0u8; 1 << 20];
                    memory[0] = 1;
                    std::hint::black_box(&memory);
                }
            });
        }
        let own = scope.spawn(|| chain(region, number as usize + 1, pages, &stop, &longest));
        wait(orders);
        stop.store(true, Ordering::Relaxed);
        own.join()
    });
    Ok(Report::Beaten {
        stores: stores.map_err(|_| "the chain panicked")?,
        longest_us: longest.load(Ordering::Relaxed),
    })
}
