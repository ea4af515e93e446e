//! A writer with its node and a follower, the audit as quick as it may be: what happens
//! to the region is to show in seconds.

use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use uffd_sync::wire::control::{LossStatus, RegionStatus};
use uffd_sync::words::{LossKind, Mode, Publish};

use super::deeds::Deed;
use super::nodes::{NodeProcess, await_content, await_some, folder};
use super::pattern::Numbers;
use super::writer::{More, Order, Report, WriterProcess};

pub(crate) const REGION: &str = "region";

/// How soon a loss has to be noticed: the second's audit, a round of one second, and
/// time for a machine with much to do.
pub(crate) const SECONDS: Duration = Duration::from_secs(8);

/// The three processes and what the region should hold.
pub(crate) struct Watched {
    pub(crate) writer: WriterProcess,
    pub(crate) follower: NodeProcess,
    pub(crate) source: NodeProcess,
    pub(crate) model: Vec<u8>,
    pub(crate) mode: Mode,
    pub(crate) folder: TempDir,
}

impl Watched {
    /// A region of `size` numbers that the follower shows.
    #[track_caller]
    pub(crate) fn new(size: u64, mode: Mode, publish: Publish, more: More) -> Self {
        Self::audited(1_000, size, mode, publish, more)
    }

    /// The same with another audit period.
    #[track_caller]
    pub(crate) fn audited(
        period_ms: u64,
        size: u64,
        mode: Mode,
        publish: Publish,
        more: More,
    ) -> Self {
        let folder = folder();
        let source = source(folder.path(), period_ms);
        let mut writer = WriterProcess::start();
        let created = writer.try_create(source.socket(), REGION, size, mode, publish, more);
        assert_eq!(created, Report::Created { resumed: false });
        let follow = [format!("tcp://{}/{REGION}", source.listen())];
        let follower = NodeProcess::follower(folder.path(), "follower", &follow);
        let mut watched = Self {
            writer,
            follower,
            source,
            model: vec![0; size as usize],
            mode,
            folder,
        };
        let numbers = Numbers::new(size).bytes(size as usize);
        watched.store(0, &numbers);
        watched.writer.commit(0);
        watched.await_equal();
        watched
    }

    /// Stores into region and model, with a mark where marks are needed.
    #[track_caller]
    pub(crate) fn store(&mut self, offset: u64, bytes: &[u8]) {
        let path = self.folder.path().join("stored");
        if offset == 0 && bytes.len() > 65_536 {
            std::fs::write(&path, bytes).expect("a file in the temporary folder");
            self.writer.carry_out(&Order::Load { path });
        } else {
            self.writer.write(offset, bytes);
        }
        self.expect(offset, bytes);
        self.mark(offset, bytes.len() as u64);
    }

    /// Marks what changed, in the mode that goes by marks.
    #[track_caller]
    pub(crate) fn mark(&mut self, offset: u64, len: u64) {
        if self.mode == Mode::Manual {
            self.writer.carry_out(&Order::Mark { offset, len });
        }
    }

    /// The region should hold `bytes` at `offset` from now on.
    pub(crate) fn expect(&mut self, offset: u64, bytes: &[u8]) {
        let at = offset as usize;
        self.model[at..at + bytes.len()].copy_from_slice(bytes);
    }

    #[track_caller]
    pub(crate) fn deed(&mut self, deed: Deed) -> String {
        match self.writer.deed(deed.clone()) {
            Ok(text) => text,
            Err(error) => panic!("{deed:?}: {error}"),
        }
    }

    #[track_caller]
    pub(crate) fn await_equal(&self) {
        await_content(&self.follower, REGION, &self.model);
    }

    #[track_caller]
    pub(crate) fn region(&self) -> RegionStatus {
        self.source.region(REGION).expect("the node has it")
    }

    /// Waits until a loss of one of `kinds` is told, for [`SECONDS`] at most.
    #[track_caller]
    pub(crate) fn await_loss(&self, kinds: &[LossKind]) -> LossStatus {
        let begun = Instant::now();
        let loss = await_some("a loss is told", || {
            let losses = self.region().losses;
            losses.into_iter().find(|loss| kinds.contains(&loss.kind))
        });
        let took = begun.elapsed();
        assert!(took < SECONDS, "{loss:?} was told after {took:?}");
        loss
    }

    /// Waits until the audit has confirmed mapping and content whole, twice from now.
    #[track_caller]
    pub(crate) fn await_audit(&self) {
        let rounds = |region: RegionStatus| {
            let audit = region.audit.expect("it is audited");
            (audit.rounds, audit.mapping_rounds)
        };
        let before = rounds(self.region());
        await_some("the audit gets round", || {
            let now = rounds(self.region());
            (now.0 >= before.0 + 2 && now.1 >= before.1 + 2).then_some(())
        });
    }

    /// Nothing was lost until now.
    #[track_caller]
    pub(crate) fn expect_no_loss(&self) {
        let region = self.region();
        assert_eq!(region.losses, [], "{region:?}");
        assert_eq!((region.full_compares, region.tracking), (0, region.mode));
    }
}

/// A node whose audit gets round in that time.
#[track_caller]
pub(crate) fn source(folder: &Path, period_ms: u64) -> NodeProcess {
    let config = folder.join("source.toml");
    std::fs::write(&config, format!("audit_period_ms = {period_ms}\n"))
        .expect("a file in the temporary folder");
    let config = config.to_str().expect("a path in ASCII");
    let arguments = ["--listen", "127.0.0.1:0", "--config", config];
    NodeProcess::start(folder, "source", &arguments)
}
