//! Operations: checked, split, handed to the servers' lanes; and what they came to.

use std::time::{Duration, Instant};

use super::batch::{Batch, BatchAnswer, Plan, check_alignment};
use super::error::{PartError, PartsError, ReachError, ReplyError, SpaceError};
use super::lane::Run;
use super::operations::{Asked, Lent, Ticket, Underway};
use super::{Failure, Space};
use crate::limits;
use crate::space::frame::{FrameError, Operation, runs};
use crate::sys::dial;
use crate::units::checked_range;
use crate::words::RegionName;

/// A connection that nothing was asked over for this long is looked at before a change is
/// sent, since a server that ended meanwhile would leave its outcome unknown.
const FRESH: Duration = Duration::from_millis(1);

/// What an operation came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A write or a fill was made.
    Done,
    /// What was read.
    Bytes(Vec<u8>),
    /// A fetch-add: what was there before.
    Value(u64),
    /// A compare-exchange: what was there, as a failure if it was not the expected value.
    Exchanged(Result<u64, u64>),
    /// A batch, item by item.
    Batch(Vec<BatchAnswer>),
    /// How a server goes, as JSON.
    Stat(String),
    /// What a range consists of, from its beginning on: bytes, and whether they are a hole.
    Runs(Vec<(u64, bool)>),
}

impl Space {
    /// Copies the bytes at `offset` into `out`.
    ///
    /// # Errors
    /// [`SpaceError`]; then what is in `out` means nothing.
    pub fn read(&mut self, offset: u64, out: &mut [u8]) -> Result<(), SpaceError> {
        if self.read_mapped(offset, out) {
            return Ok(());
        }
        let asked = self.asked(Operation::Read, offset, Vec::new(), true);
        let ticket = self.submit_range(asked, out.len() as u64)?;
        self.complete(ticket, &mut Lent::Destination(out)).map(drop)
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`SpaceError`]; see [`SpaceError::is_indeterminate`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SpaceError> {
        let done = self.write_mapped(offset, bytes)?;
        if done > 0 && done == bytes.len() {
            return Ok(());
        }
        let (offset, bytes) = (offset + done as u64, &bytes[done..]);
        let asked = self.asked(Operation::Write, offset, Vec::new(), true);
        let ticket = self.submit_range(asked, bytes.len() as u64)?;
        self.complete(ticket, &mut Lent::Body(bytes)).map(drop)
    }

    /// Sets `len` bytes at `offset` to `byte`.
    ///
    /// # Errors
    /// [`SpaceError`]; see [`SpaceError::is_indeterminate`].
    pub fn fill(&mut self, offset: u64, len: u64, byte: u8) -> Result<(), SpaceError> {
        let done = self.fill_mapped(offset, len, byte)?;
        if done > 0 && done == len {
            return Ok(());
        }
        let ticket = self.begin_fill(offset + done, len - done, byte)?;
        self.complete(ticket, &mut Lent::Nothing).map(drop)
    }

    /// Replaces the 8 bytes at `offset`, a little-endian number at a multiple of 8, by
    /// `new` if they are `expected`. What was there: as success if it was exchanged.
    ///
    /// # Errors
    /// [`SpaceError`]; see [`SpaceError::is_indeterminate`].
    pub fn compare_exchange(
        &mut self,
        offset: u64,
        expected: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, SpaceError> {
        let next = |found| (found == expected).then_some(new);
        if let Some(found) = self.update_mapped(offset, next)? {
            return Ok(if found == expected {
                Ok(found)
            } else {
                Err(found)
            });
        }
        let ticket = self.begin_compare_exchange(offset, expected, new)?;
        match self.complete(ticket, &mut Lent::Nothing)? {
            Answer::Exchanged(found) => Ok(found),
            _ => Err(SpaceError::Ticket),
        }
    }

    /// Adds `addend` to the 8 bytes at `offset`, a little-endian number at a multiple of 8,
    /// wrapping around. What was there before.
    ///
    /// # Errors
    /// [`SpaceError`]; see [`SpaceError::is_indeterminate`].
    pub fn fetch_add(&mut self, offset: u64, addend: u64) -> Result<u64, SpaceError> {
        let next = |found: u64| Some(found.wrapping_add(addend));
        if let Some(before) = self.update_mapped(offset, next)? {
            return Ok(before);
        }
        let ticket = self.begin_fetch_add(offset, addend)?;
        match self.complete(ticket, &mut Lent::Nothing)? {
            Answer::Value(before) => Ok(before),
            _ => Err(SpaceError::Ticket),
        }
    }

    /// Carries out a batch; its answers stand in the order of its items.
    ///
    /// # Errors
    /// [`SpaceError`]; on a server that failed, none of its items was carried out, unless
    /// [`SpaceError::is_indeterminate`].
    pub fn batch(&mut self, batch: &Batch) -> Result<Vec<BatchAnswer>, SpaceError> {
        let ticket = self.begin_batch(batch)?;
        match self.complete(ticket, &mut Lent::Nothing)? {
            Answer::Batch(answers) => Ok(answers),
            _ => Err(SpaceError::Ticket),
        }
    }

    /// How each server goes, as JSON: its name, and what it says or why it does not.
    pub fn stat(&mut self) -> Vec<(RegionName, Result<String, SpaceError>)> {
        let servers = self.config.map.servers().iter();
        let names: Vec<_> = servers.map(|server| server.name.clone()).collect();
        let tickets: Vec<_> = (0..names.len()).map(|at| self.begin_stat(at)).collect();
        let found = names.into_iter().zip(tickets);
        let say = |(name, ticket): (RegionName, Ticket)| {
            let said = match self.complete(ticket, &mut Lent::Nothing) {
                Ok(Answer::Stat(text)) => Ok(text),
                Ok(_) => Err(SpaceError::Ticket),
                Err(error) => Err(error),
            };
            (name, said)
        };
        found.map(say).collect()
    }

    /// Submits a read of `len` bytes; [`Answer::Bytes`] has them.
    ///
    /// # Errors
    /// [`SpaceError::OutOfRange`], [`SpaceError::Full`].
    pub fn submit_read(&mut self, offset: u64, len: u64) -> Result<Ticket, SpaceError> {
        // No memory for what cannot be.
        let range = checked_range(offset, len, self.size())?;
        let bytes = vec![0; (range.end - range.start) as usize];
        let asked = self.asked(Operation::Read, offset, bytes, false);
        let ticket = self.submit_range(asked, len);
        self.submitted(ticket)
    }

    /// Submits a write. The bytes are taken over before it returns.
    ///
    /// # Errors
    /// [`SpaceError::OutOfRange`], [`SpaceError::Full`].
    pub fn submit_write(
        &mut self,
        offset: u64,
        bytes: impl Into<Vec<u8>>,
    ) -> Result<Ticket, SpaceError> {
        let bytes = bytes.into();
        let len = bytes.len() as u64;
        let asked = self.asked(Operation::Write, offset, bytes, false);
        let ticket = self.submit_range(asked, len);
        self.submitted(ticket)
    }

    /// Submits a fill.
    ///
    /// # Errors
    /// [`SpaceError::OutOfRange`], [`SpaceError::Full`].
    pub fn submit_fill(&mut self, offset: u64, len: u64, byte: u8) -> Result<Ticket, SpaceError> {
        let ticket = self.begin_fill(offset, len, byte);
        self.submitted(ticket)
    }

    /// Submits a question for the holes of `len` bytes, as far as they lie on one server and
    /// it tells; [`Answer::Runs`] has them. None if the server does not know.
    ///
    /// # Errors
    /// [`SpaceError::OutOfRange`], [`SpaceError::Full`].
    pub fn submit_holes(&mut self, offset: u64, len: u64) -> Result<Ticket, SpaceError> {
        let ticket = self.begin_holes(offset, len);
        self.submitted(ticket)
    }

    /// Submits a compare-exchange.
    ///
    /// # Errors
    /// [`SpaceError::OutOfRange`], [`SpaceError::Misaligned`], [`SpaceError::Full`].
    pub fn submit_compare_exchange(
        &mut self,
        offset: u64,
        expected: u64,
        new: u64,
    ) -> Result<Ticket, SpaceError> {
        let ticket = self.begin_compare_exchange(offset, expected, new);
        self.submitted(ticket)
    }

    /// Submits a fetch-add.
    ///
    /// # Errors
    /// [`SpaceError::OutOfRange`], [`SpaceError::Misaligned`], [`SpaceError::Full`].
    pub fn submit_fetch_add(&mut self, offset: u64, addend: u64) -> Result<Ticket, SpaceError> {
        let ticket = self.begin_fetch_add(offset, addend);
        self.submitted(ticket)
    }

    /// Submits a batch.
    ///
    /// # Errors
    /// [`SpaceError::OutOfRange`], [`SpaceError::Misaligned`], [`SpaceError::Batch`],
    /// [`SpaceError::Full`].
    pub fn submit_batch(&mut self, batch: &Batch) -> Result<Ticket, SpaceError> {
        let ticket = self.begin_batch(batch);
        self.submitted(ticket)
    }

    /// Waits until an operation is done and takes its answer. What else is under way goes
    /// on meanwhile.
    ///
    /// # Errors
    /// What the operation met; [`SpaceError::Ticket`] if its answer was taken already.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Answer, SpaceError> {
        self.operations.find(ticket).ok_or(SpaceError::Ticket)?;
        if self.submitted.front() == Some(&ticket) {
            self.submitted.pop_front();
        } else {
            self.submitted.retain(|other| *other != ticket);
        }
        self.complete(ticket, &mut Lent::Nothing)
    }

    /// Takes the answer of the oldest operation that is done, if any is. Does not wait.
    pub fn poll(&mut self) -> Option<(Ticket, Result<Answer, SpaceError>)> {
        let done = |space: &Self| {
            let mut submitted = space.submitted.iter();
            submitted.position(|ticket| space.operations.is_done(*ticket))
        };
        let at = match done(self) {
            Some(at) => at,
            None => {
                self.progress();
                done(self)?
            }
        };
        let ticket = self.submitted.remove(at)?;
        Some((ticket, self.take(ticket)))
    }

    /// Operations that were submitted and whose answers were not taken.
    pub fn unanswered(&self) -> usize {
        self.submitted.len()
    }

    /// Reads from the memory of servers on this host, if all of it lies there.
    fn read_mapped(&self, offset: u64, out: &mut [u8]) -> bool {
        let Ok(parts) = self.config.map.split(offset, out.len() as u64) else {
            return false;
        };
        for part in parts {
            let link = &self.links[part.server];
            let range = part.of_range.start as usize..part.of_range.end as usize;
            let is_read = match &link.local {
                // A change that was submitted before must not be overtaken.
                Some(local) if link.lane.is_idle() && link.lane.loss().is_none() => {
                    local.read(part.offset, &mut out[range])
                }
                _ => false,
            };
            if !is_read {
                return false;
            }
        }
        true
    }

    fn submitted(&mut self, ticket: Result<Ticket, SpaceError>) -> Result<Ticket, SpaceError> {
        let ticket = ticket?;
        self.submitted.push_back(ticket);
        self.send_if_much(ticket);
        Ok(ticket)
    }

    fn asked(&self, operation: Operation, offset: u64, bytes: Vec<u8>, is_lent: bool) -> Asked {
        Asked {
            operation,
            changes: operation.changes(),
            address: offset,
            bytes,
            is_lent,
            deadline: Instant::now() + self.deadline,
            plan: None,
        }
    }

    fn begin_fill(&mut self, offset: u64, len: u64, byte: u8) -> Result<Ticket, SpaceError> {
        let asked = self.asked(Operation::Fill, offset, vec![byte], false);
        self.submit_range(asked, len)
    }

    fn begin_compare_exchange(
        &mut self,
        offset: u64,
        expected: u64,
        new: u64,
    ) -> Result<Ticket, SpaceError> {
        let body = [expected.to_le_bytes(), new.to_le_bytes()].concat();
        let asked = self.asked(Operation::CompareExchange, offset, body, false);
        self.submit_range(asked, 8)
    }

    fn begin_fetch_add(&mut self, offset: u64, addend: u64) -> Result<Ticket, SpaceError> {
        let body = addend.to_le_bytes().to_vec();
        let asked = self.asked(Operation::FetchAdd, offset, body, false);
        self.submit_range(asked, 8)
    }

    /// Splits a range and hands each server its part.
    fn submit_range(&mut self, asked: Asked, len: u64) -> Result<Ticket, SpaceError> {
        let (operation, offset, changes) = (asked.operation, asked.address, asked.changes);
        let parts = self.config.map.split(offset, len)?;
        check_alignment(operation, offset)?;
        self.check_room()?;
        let now = asked.deadline.checked_sub(self.deadline);
        let body_len = match operation {
            Operation::Fill => 1,
            Operation::CompareExchange => 16,
            Operation::FetchAdd => 8,
            _ => 0,
        };
        let ticket = self.begin(asked);
        for part in parts {
            let at = match operation {
                Operation::Read | Operation::Write => part.of_range.start,
                _ => 0,
            };
            let run = Run {
                ticket,
                operation,
                changes,
                offset: part.offset,
                len: part.of_range.end - part.of_range.start,
                at,
                body_len,
                address: offset + part.of_range.start,
            };
            self.push(part.server, run, now);
        }
        Ok(ticket)
    }

    fn begin_batch(&mut self, batch: &Batch) -> Result<Ticket, SpaceError> {
        let mut plan = Plan::of(batch, &self.config.map)?;
        self.check_room()?;
        let bodies = std::mem::take(&mut plan.bodies);
        let address = plan.shares.first().map_or(0, |share| share.address);
        let mut asked = self.asked(Operation::Batch, address, bodies, false);
        asked.changes = plan.changes;
        let (changes, now) = (plan.changes, asked.deadline.checked_sub(self.deadline));
        let mut runs = Vec::with_capacity(plan.shares.len());
        let mut at = 0;
        for share in &plan.shares {
            let body_len = (share.end - at) as u32;
            runs.push((
                share.server,
                share.items,
                at as u64,
                body_len,
                share.address,
            ));
            at = share.end;
        }
        asked.plan = Some(Box::new(plan));
        let ticket = self.begin(asked);
        for (server, items, at, body_len, address) in runs {
            let run = Run {
                ticket,
                operation: Operation::Batch,
                changes,
                offset: 0,
                len: u64::from(items),
                at,
                body_len,
                address,
            };
            self.push(server as usize, run, now);
        }
        Ok(ticket)
    }

    fn begin_stat(&mut self, server: usize) -> Ticket {
        let address = self.config.map.addresses(server).start;
        let asked = self.asked(Operation::Stat, address, Vec::new(), false);
        let now = asked.deadline.checked_sub(self.deadline);
        let ticket = self.begin(asked);
        let run = Run {
            ticket,
            operation: Operation::Stat,
            changes: false,
            offset: 0,
            len: 0,
            at: 0,
            body_len: 0,
            address,
        };
        self.push(server, run, now);
        ticket
    }

    fn begin_holes(&mut self, offset: u64, len: u64) -> Result<Ticket, SpaceError> {
        checked_range(offset, len, self.size())?;
        self.check_room()?;
        let segment = self.config.map.segment_size();
        let at = offset % segment;
        let asked = self.asked(Operation::Holes, offset, Vec::new(), false);
        let now = asked.deadline.checked_sub(self.deadline);
        let ticket = self.begin(asked);
        let run = Run {
            ticket,
            operation: Operation::Holes,
            changes: false,
            offset: at,
            len: len.min(segment - at).min(u32::MAX.into()),
            at: 0,
            body_len: 0,
            address: offset,
        };
        self.push((offset / segment) as usize, run, now);
        Ok(ticket)
    }

    fn begin(&mut self, asked: Asked) -> Ticket {
        let look = self
            .next_look
            .map_or(asked.deadline, |at| at.min(asked.deadline));
        self.next_look = Some(look);
        self.operations.begin(asked)
    }

    fn push(&mut self, server: usize, run: Run, now: Option<Instant>) {
        let link = &mut self.links[server];
        if let Some(found) = self.operations.find_mut(run.ticket) {
            found.parts += 1;
            found.server = server as u32;
        }
        let now = now.unwrap_or_else(Instant::now);
        let is_stale = run.changes && now.duration_since(link.used) > FRESH;
        if is_stale && !link.lane.is_owed() && link.socket.up().is_some_and(dial::has_ended) {
            link.lane.disconnected(&mut self.operations, None);
            link.socket.lost(now, ReachError::Ended);
            link.local = None;
        }
        link.used = now;
        link.lane.push(&mut self.operations, run);
    }

    fn check_room(&self) -> Result<(), SpaceError> {
        let count = self.operations.len();
        if count as u64 >= limits::MAX_SPACE_TICKETS {
            return Err(SpaceError::Full { count });
        }
        Ok(())
    }

    /// Waits until an operation is done, and takes its answer.
    fn complete(&mut self, ticket: Ticket, lent: &mut Lent<'_>) -> Result<Answer, SpaceError> {
        self.drive(ticket, lent);
        self.take(ticket)
    }

    /// Takes the answer of an operation that is done.
    fn take(&mut self, ticket: Ticket) -> Result<Answer, SpaceError> {
        let found = self.operations.remove(ticket).ok_or(SpaceError::Ticket)?;
        if !found.failed.is_empty() {
            return Err(self.report(found));
        }
        Ok(match found.operation {
            Operation::Write | Operation::Fill | Operation::Ping => Answer::Done,
            Operation::Read => Answer::Bytes(found.bytes),
            Operation::FetchAdd => Answer::Value(found.value),
            Operation::CompareExchange if found.exchanged => Answer::Exchanged(Ok(found.value)),
            Operation::CompareExchange => Answer::Exchanged(Err(found.value)),
            Operation::Batch => {
                let answers = found
                    .plan
                    .as_ref()
                    .and_then(|plan| plan.answers(&found.bodies));
                return match answers {
                    Some(answers) => Ok(Answer::Batch(answers)),
                    None => Err(self.unread_batch(found)),
                };
            }
            Operation::Holes => {
                let body = found.bodies.first().map_or(&[][..], |(_, body)| body);
                Answer::Runs(runs(body).collect())
            }
            Operation::Stat => {
                let text = found.bodies.first().map_or(&[][..], |(_, text)| text);
                Answer::Stat(String::from_utf8_lossy(text).into_owned())
            }
        })
    }

    /// A batch whose results do not answer its items: carried out, as far as one can know.
    fn unread_batch(&self, mut found: Underway) -> SpaceError {
        let at = found.address..found.address;
        let why = if found.changes {
            let why = super::Unanswered::Reply;
            Failure::Indeterminate { why }
        } else {
            let source = ReplyError::Frame(FrameError::Item { index: 0 });
            Failure::Broken { source }
        };
        found.failed.push((found.server, at, why));
        self.report(found)
    }

    fn report(&self, found: Underway) -> SpaceError {
        let failed = found.failed.into_iter().map(|(server, range, why)| {
            let at = &self.config.map.servers()[server as usize];
            PartError {
                server: at.name.clone(),
                address: at.address.clone(),
                range,
                why,
            }
        });
        let mut failed: Vec<_> = failed.collect();
        failed.sort_by_key(|part| part.range.start);
        SpaceError::Parts(Box::new(PartsError {
            of: found.parts,
            failed,
        }))
    }
}
