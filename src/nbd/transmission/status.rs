//! Questions of block status: what a range consists of, by each context that was chosen.

use super::super::backing::{Answer, Backing, Extent, Kind, Unit};
use super::super::command::Request;
use super::super::context::Context;
use super::super::numbers::REQUEST_BYTES;
use super::super::reply;
use super::super::session::Next;
use super::{Step, Transmission};
use crate::limits::{MAX_NBD_EXTENTS, NBD_TURN};

impl Transmission {
    pub(super) fn status(
        &mut self,
        out: &mut Vec<u8>,
        backing: &mut dyn Backing,
        request: &Request,
        one: bool,
    ) -> Step {
        // To find out what is a hole takes the backing about as long.
        self.turn += NBD_TURN / 2;
        let most = if one { 1 } else { MAX_NBD_EXTENTS as usize };
        let unit = self.single(request);
        let mut extents = std::mem::take(&mut self.extents);
        extents.clear();
        let answer = match self.agreed.contexts.contains(&Context::Allocation) {
            true => backing.extents(unit, most, &mut extents),
            false => Answer::Done,
        };
        let step = match answer {
            Answer::Busy => Step::Stop(Next::Completion),
            Answer::Failed(failure) => {
                self.refuse(out, request, failure);
                Step::On(REQUEST_BYTES)
            }
            // The other contexts are asked when this is known, at once then too.
            Answer::Later => {
                let flight = self.open(request);
                let flight = &mut self.flights[flight as usize];
                (flight.left, flight.whole, flight.status) = (1, true, Some(most));
                Step::On(REQUEST_BYTES)
            }
            Answer::Done => {
                let place = (unit.address, u64::from(unit.len));
                self.tell(
                    out,
                    Some(backing),
                    (request.cookie, place, most),
                    &mut extents,
                );
                Step::On(REQUEST_BYTES)
            }
        };
        self.extents = extents;
        step
    }

    /// The reply to a question of block status, with the extents of its allocation.
    fn tell(
        &self,
        out: &mut Vec<u8>,
        mut backing: Option<&mut dyn Backing>,
        (cookie, (address, len), most): (u64, (u64, u64), usize),
        allocation: &mut Vec<Extent>,
    ) {
        let contexts = &self.agreed.contexts;
        let mut changed = Vec::new();
        for (id, context) in (1..).zip(contexts) {
            let (extents, unknown) = match context {
                Context::Allocation => (&mut *allocation, Kind::Data),
                Context::Changed(since, _) => {
                    changed.clear();
                    if let Some(backing) = &mut backing {
                        backing.changed(*since, address, len, most, &mut changed);
                    }
                    (&mut changed, Kind::Dirty)
                }
            };
            tidy_extents(extents, len, most, unknown);
            reply::status_chunk(out, cookie, id, extents, id as usize == contexts.len());
        }
    }

    /// What a range consists of, that was asked for later.
    pub(in crate::nbd) fn told(&mut self, unit: Unit, mut extents: Vec<Extent>, out: &mut Vec<u8>) {
        let Some(flight) = self.flights.get(unit.flight as usize) else {
            return;
        };
        let Some(most) = flight.status else {
            return;
        };
        let place = (unit.address, u64::from(unit.len));
        self.tell(out, None, (flight.cookie, place, most), &mut extents);
        self.flights.remove(unit.flight as usize);
    }
}

/// Makes what a backing said of `len` bytes fit to be sent: neighbours of one kind merged,
/// nothing empty, nothing behind the end, at least one and at most `most`.
fn tidy_extents(extents: &mut Vec<Extent>, len: u64, most: usize, unknown: Kind) {
    let mut left = len;
    extents.retain_mut(|extent| {
        extent.len = extent.len.min(left);
        left -= extent.len;
        extent.len > 0
    });
    extents.dedup_by(|next, before| {
        let same = next.kind == before.kind;
        if same {
            before.len += next.len;
        }
        same
    });
    extents.truncate(most);
    if extents.is_empty() {
        let kind = unknown;
        extents.push(Extent { len, kind });
    }
}
