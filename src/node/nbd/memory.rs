//! A region as NBD clients read it.
//!
//! - I1: bytes are given out only of a region that is still there after they were copied; of
//!   a replica only of one whole epoch. Anything else is an error, never zeros.
//! - I2: what is exported ends where the region ended when it was chosen.

use std::sync::Arc;

use super::catalog::Visible;
use crate::client::{self, Reader};
use crate::engine::Changes;
use crate::nbd::{Answer, Backing, Extent, Failure, Kind, Since, Unit, Zeroing};
use crate::region::{ReadError, RegionKind};
use crate::sys::net;
use crate::words::Generation;

/// Reads of a replica that an update may come into, each longer than a hold is honoured.
const READS: usize = 8;

/// A region that was joined.
struct Joined {
    reader: Reader,
    changes: Option<Arc<Changes>>,
}

/// The memory behind one connection: nothing before a region was chosen, and nothing if it
/// was gone by then.
#[derive(Default)]
pub(super) struct Memory(Option<Joined>);

impl Memory {
    /// Joins the region called `name` if the client still sees it.
    pub(super) fn join(visible: &Visible, name: &str) -> Self {
        let Some(region) = visible.region(name.as_bytes()) else {
            return Self(None);
        };
        let joined = net::unix_pair().map_err(client::ClientError::from);
        let joined = joined.and_then(|(ours, engines)| {
            // Without an engine the greeting below fails.
            let _ = visible.shared.commands.adopt(engines);
            Reader::attach_over(client::Node::from_socket(ours)?, name)
        });
        match joined {
            // Another one may have come under that name.
            Ok(reader) if reader.identity().id == region.id => Self(Some(Joined {
                reader,
                changes: region.changes,
            })),
            Ok(_) => Self(None),
            Err(error) => {
                tracing::warn!(%error, region = name, "an NBD client cannot have a region");
                Self(None)
            }
        }
    }
}

impl Joined {
    fn is_there(&self, end: u64) -> bool {
        !self.reader.control().is_retired() && self.reader.has(end)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        if self.reader.identity().kind != RegionKind::Replica {
            return self.reader.read(offset, out);
        }
        let mut tries = READS;
        loop {
            match self.reader.read_at_epoch(|view| view.read(offset, out)) {
                Err(ReadError::Overrun) if tries > 0 => tries -= 1,
                read => return Ok(read?.0?),
            }
        }
    }

    /// Holes and data from `at` on, the first run of it.
    fn run(&self, at: u64, end: u64) -> Extent {
        let (until, kind) = match self.reader.next_data(at) {
            Ok(Some(data)) if data.start > at => (data.start, Kind::Hole),
            Ok(Some(data)) => (data.end, Kind::Data),
            Ok(None) => (end, Kind::Hole),
            Err(_) => (end, Kind::Data),
        };
        let len = until.clamp(at + 1, end) - at;
        Extent { len, kind }
    }
}

impl Backing for Memory {
    fn read(&mut self, unit: Unit, out: &mut Vec<u8>) -> Answer {
        let Some(joined) = &self.0 else {
            return Answer::Failed(Failure::Io);
        };
        let start = out.len();
        out.resize(start + unit.len as usize, 0);
        let read = joined.read(unit.address, &mut out[start..]);
        // What was copied counts if the region was still there afterwards.
        if read.is_ok() && joined.is_there(unit.address + u64::from(unit.len)) {
            return Answer::Done;
        }
        if let Err(error) = read {
            tracing::debug!(%error, "an NBD read failed");
        }
        out.truncate(start);
        Answer::Failed(Failure::Io)
    }

    fn write(&mut self, _: Unit, _: &[u8]) -> Answer {
        Answer::Failed(Failure::ReadOnly)
    }

    fn zero(&mut self, _: Unit, _: Zeroing) -> Answer {
        Answer::Failed(Failure::ReadOnly)
    }

    fn extents(&mut self, unit: Unit, most: usize, into: &mut Vec<Extent>) -> Answer {
        let end = unit.address + u64::from(unit.len);
        let Some(joined) = self.0.as_ref().filter(|joined| joined.is_there(end)) else {
            return Answer::Failed(Failure::Io);
        };
        let mut at = unit.address;
        while at < end && into.len() < most {
            let run = joined.run(at, end);
            at += run.len;
            into.push(run);
        }
        // What is gone by now has no holes.
        if joined.is_there(end) {
            Answer::Done
        } else {
            Answer::Failed(Failure::Io)
        }
    }

    fn changed(
        &mut self,
        since: Since,
        address: u64,
        len: u64,
        most: usize,
        into: &mut Vec<Extent>,
    ) {
        let Some(changes) = self.0.as_ref().and_then(|it| it.changes.as_ref()) else {
            return;
        };
        let since = (Generation(since.generation), since.epoch);
        for (len, changed) in changes.since(since, address..address + len, most) {
            let kind = if changed { Kind::Dirty } else { Kind::Clean };
            into.push(Extent { len, kind });
        }
    }
}
