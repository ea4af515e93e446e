//! A replica: its memory, the applier, and jobs that take several turns.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use uffd_sync::checksum::{crc32c, digest};
use uffd_sync::limits::MAX_BODY;
use uffd_sync::replicate::{Applied, Applier, ApplyJob};
use uffd_sync::words::Generation;

use crate::link::Pipe;
use crate::link::Read;

struct Job {
    job: ApplyJob,
    generation: Generation,
    in_place: bool,
}

pub(crate) struct Replica {
    pub(crate) applier: Applier,
    pub(crate) memory: Vec<u8>,
    jobs: VecDeque<Job>,
    /// The epoch that readers see; `None`: nothing can be read.
    pub(crate) shown: Option<(Generation, u64)>,
    /// A job wrote part of the memory: no reader looks now.
    applying: bool,
    pub(crate) budget: u64,
    pub(crate) stats: Stats,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stats {
    pub(crate) shown: u64,
    pub(crate) in_place: u64,
    pub(crate) in_parts: u64,
    pub(crate) ignored: u64,
    pub(crate) dropped: u64,
}

impl Replica {
    pub(crate) fn new(size: u64, budget: u64) -> Self {
        Self {
            applier: Applier::new(size, budget),
            memory: vec![0; size as usize],
            jobs: VecDeque::new(),
            shown: None,
            applying: false,
            budget,
            stats: Stats::default(),
        }
    }

    /// Another process took over the memory, which may hold half of an update.
    pub(crate) fn taken_over(&mut self) {
        let stats = self.stats;
        *self = Self {
            applier: Applier::with_content(self.memory.len() as u64, self.budget),
            memory: std::mem::take(&mut self.memory),
            ..Self::new(0, self.budget)
        };
        self.stats = stats;
    }

    /// Reads what arrived. `Err`: the connection has to be closed.
    pub(crate) fn receive(&mut self, now: Instant, pipe: &mut Pipe) -> Result<(), String> {
        while self.applier.accepts_frames() {
            match pipe.read() {
                Read::Nothing { progress } => {
                    if progress {
                        self.applier.note_progress(now);
                    }
                    break;
                }
                Read::Broken(error) => return Err(error.to_string()),
                Read::Damaged(header) => {
                    self.applier.handle_damaged(&header);
                    self.stats.dropped += 1;
                }
                Read::Frame(header, body) => self.frame(now, &header, body)?,
            }
        }
        Ok(())
    }

    fn frame(
        &mut self,
        now: Instant,
        header: &uffd_sync::wire::Header,
        body: Vec<u8>,
    ) -> Result<(), String> {
        use uffd_sync::wire::{Kind, RegionInfo};
        if header.kind == Kind::RegionInfo {
            let info = RegionInfo::decode(header, &body).map_err(|e| e.to_string())?;
            return self
                .applier
                .handle_info(now, &info)
                .map_err(|e| e.to_string());
        }
        let kind = header.kind;
        let applied = self.applier.handle_frame(now, header, body);
        let generation = self.applier.generation();
        let (update, in_place) = match applied.map_err(|e| e.to_string())? {
            Applied::Apply(update) => (update, false),
            Applied::InPlace(update) => (update, true),
            Applied::Ignored => {
                self.stats.ignored += 1;
                return Ok(());
            }
            Applied::Dropped(_) => {
                self.stats.dropped += 1;
                return Ok(());
            }
            Applied::Staged => return Ok(()),
        };
        self.stats.in_place += u64::from(in_place);
        self.stats.in_parts += u64::from(kind == Kind::EndUpdate);
        self.jobs.push_back(Job {
            job: ApplyJob::new(update),
            generation,
            in_place,
        });
        Ok(())
    }

    /// Applies about `bytes`; every epoch shown is compared with the source's.
    pub(crate) fn apply(
        &mut self,
        bytes: u64,
        history: &HashMap<(Generation, u64), u32>,
    ) -> Result<(), String> {
        let Some(front) = self.jobs.front_mut() else {
            return Ok(());
        };
        self.applying = true;
        if front.in_place {
            self.shown = None;
        }
        if !front.job.step(&mut self.memory, bytes) {
            return Ok(());
        }
        let Some(done) = self.jobs.pop_front() else {
            return Ok(());
        };
        let epoch = done.job.update().epoch;
        self.applier.applied(epoch);
        if done.in_place {
            return Ok(());
        }
        self.applying = false;
        if let Some((generation, shown)) = self.shown
            && generation == done.generation
            && shown > epoch
        {
            return Err(format!("epoch {epoch} is shown after {shown}"));
        }
        self.shown = Some((done.generation, epoch));
        self.stats.shown += 1;
        self.check(history)
    }

    /// What readers see is an epoch of the source.
    pub(crate) fn check(&self, history: &HashMap<(Generation, u64), u32>) -> Result<(), String> {
        let bound = self.budget + 2 * MAX_BODY;
        if self.applier.staged_bytes() > bound {
            return Err(format!("{} bytes staged", self.applier.staged_bytes()));
        }
        let Some(shown) = self.shown.filter(|_| !self.applying) else {
            return Ok(());
        };
        match history.get(&shown) {
            Some(checksum) if *checksum == crc32c(&self.memory) => Ok(()),
            Some(_) => Err(format!("epoch {shown:?} differs from the source's")),
            None => Err(format!("epoch {shown:?} never was")),
        }
    }

    /// Sends what the applier has to say; at most `digests` chunks are digested.
    pub(crate) fn send(&mut self, now: Instant, pipe: &mut Pipe, digests: u64) {
        for _ in 0..digests {
            let Some((chunk, bytes)) = self.applier.wants_digest() else {
                break;
            };
            let bytes = &self.memory[bytes.start as usize..bytes.end as usize];
            self.applier.push_digest(chunk, digest(bytes));
        }
        while let Some(frame) = self.applier.poll(now) {
            pipe.send(&frame);
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }
}
