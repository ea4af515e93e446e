//! Transactions over distant pages: with guards and commits none is ever seen torn;
//! published by timer without them some are, which shows that the test can see it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use uffd_sync::client::Reader;
use uffd_sync::words::{EpochKind, Mode, Publish};

use super::nodes::{NodeProcess, PATIENCE, await_following, folder, long};
use super::pattern::PAGE;
use super::writer::{AMOUNT, Order, Report, WriterProcess};

const ACCOUNTS: u64 = 512;
const SIZE: u64 = ACCOUNTS * PAGE as u64;

struct Bank {
    writer: WriterProcess,
    follower: NodeProcess,
    _source: NodeProcess,
    _folder: tempfile::TempDir,
}

impl Bank {
    fn open(publish: Publish, guarded: bool) -> Self {
        let folder = folder();
        let source = NodeProcess::source(folder.path(), "source");
        let mut writer =
            WriterProcess::with_region(source.socket(), "bank", SIZE, Mode::Async, publish);
        let follow = [format!("tcp://{}/bank", source.listen())];
        let follower = NodeProcess::follower(folder.path(), "follower", &follow);
        await_following(&follower, "bank");
        writer.send(&Order::Bank {
            threads: 3,
            guarded,
        });
        // The accounts are filled.
        assert_eq!(writer.report(), Report::Done);
        Self {
            writer,
            follower,
            _source: source,
            _folder: folder,
        }
    }

    fn close(&mut self) -> (u64, u64) {
        match self.writer.order(&Order::Stop) {
            Report::Moved {
                transactions,
                commits,
            } => (transactions, commits),
            other => panic!("unexpected report {other:?}"),
        }
    }
}

/// What all accounts hold together in one epoch, its number and kind.
fn balance(reader: &Reader) -> Option<(u64, u64, EpochKind)> {
    let sum = reader.read_at_epoch(|view| {
        (0..ACCOUNTS).fold(0u64, |sum, account| {
            let mut amount = [0; 8];
            let read = view.read(account * PAGE as u64, &mut amount);
            read.expect("accounts lie inside of the region");
            sum.wrapping_add(u64::from_le_bytes(amount))
        })
    });
    let (sum, epoch) = sum.ok()?;
    Some((sum, epoch.number, epoch.kind))
}

#[test]
fn guarded_transactions_are_never_seen_torn() {
    let wanted = if long() { 20_000 } else { 2_000 };
    let mut bank = Bank::open(Publish::Commit, true);
    let reader = Reader::attach(bank.follower.socket(), "bank").expect("it can be read");
    let deadline = Instant::now() + 3 * PATIENCE;
    let (mut cuts, mut others, mut after) = (0u64, BTreeSet::new(), 0);
    while cuts < wanted {
        assert!(
            Instant::now() < deadline,
            "only {cuts} cuts were seen, others: {}",
            others.len()
        );
        let _ = reader.wait_epoch(after, Duration::from_millis(200));
        let Some((sum, number, kind)) = balance(&reader) else {
            continue;
        };
        if number == after {
            continue;
        }
        after = number;
        // Before the accounts are filled there is nothing to add up.
        if kind == EpochKind::Cut && sum != 0 {
            assert_eq!(sum, ACCOUNTS * AMOUNT, "epoch {number} tears a transaction");
            cuts += 1;
        } else {
            others.insert(number);
        }
    }
    let (transactions, commits) = bank.close();
    assert!(transactions > wanted, "{transactions} transactions");
    assert!(commits > 0);
    assert!(
        others.len() as u64 <= wanted / 10,
        "{} epochs were no cuts",
        others.len()
    );
}

#[test]
fn control_unguarded_transactions_by_timer_are_seen_torn() {
    let mut bank = Bank::open(Publish::Timer, false);
    let reader = Reader::attach(bank.follower.socket(), "bank").expect("it can be read");
    let deadline = Instant::now() + PATIENCE;
    let (mut torn, mut seen) = (0, 0);
    while torn == 0 {
        assert!(
            Instant::now() < deadline,
            "no torn transaction in {seen} epochs"
        );
        if let Some((sum, _, kind)) = balance(&reader)
            && sum >= ACCOUNTS * AMOUNT / 2
        {
            assert_eq!(kind, EpochKind::Convergent, "nobody committed");
            seen += 1;
            torn += u64::from(sum != ACCOUNTS * AMOUNT);
        }
    }
    bank.close();
}
