//! What one NBD client can choose among: the exports of the space, if there are any, and
//! the regions that it may see.
//!
//! - I1: a client on TCP sees regions that are shared; one on a Unix socket those that its
//!   user owns, or all as root. Nobody sees one that this process may not attach to.
//! - I2: the names of the space come first; a region of such a name is not seen.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use crate::engine::Exported;
use crate::nbd::{Catalog, Export, Since};
use crate::sys::process::effective_uid;
use crate::wire::control::Role;

/// How long a client's option waits for the engine.
const ANSWER: Duration = Duration::from_secs(2);

/// Who is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// A process of this user, on a Unix socket.
    Local(u32),
    /// Somebody on TCP.
    Remote,
}

/// What this client sees.
pub(super) struct Visible {
    pub(super) shared: Arc<Shared>,
    pub(super) peer: Peer,
}

impl fmt::Debug for Visible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Visible");
        shown.field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Whether `peer` sees a region of `owner`, in a process of the user `own`.
fn sees(peer: Peer, own: u32, owner: u32, shared: bool) -> bool {
    let may_attach = own == 0 || own == owner;
    may_attach
        && match peer {
            Peer::Local(uid) => uid == 0 || uid == owner,
            Peer::Remote => shared,
        }
}

impl Visible {
    /// The exports of the space.
    fn space(&self) -> Vec<Export> {
        let space = self.shared.space.as_ref();
        space.map_or_else(Vec::new, |space| space.exports.all())
    }

    /// Whether that is the name of an export of the space.
    pub(super) fn is_of_space(&self, name: &str) -> bool {
        let space = self.shared.space.as_ref();
        space.is_some_and(|space| space.exports.find(name.as_bytes()).is_some())
    }

    /// The regions, as they are now; none if the engine does not answer.
    fn regions(&self) -> Vec<Exported> {
        let mut regions = self.shared.commands.regions(ANSWER).unwrap_or_default();
        let own = effective_uid();
        regions.retain(|region| {
            sees(self.peer, own, region.owner_uid, region.shared)
                && !self.is_of_space(region.name.as_str())
        });
        regions
    }

    /// The region of this name, as it is now.
    pub(super) fn region(&self, name: &[u8]) -> Option<Exported> {
        let mut regions = self.regions().into_iter();
        regions.find(|region| region.name.as_str().as_bytes() == name)
    }
}

impl Catalog for Visible {
    fn all(&self) -> Vec<Export> {
        let mut all = self.space();
        all.extend(self.regions().iter().map(export_of));
        all
    }

    fn find(&self, name: &[u8]) -> Option<Export> {
        if let Some(space) = &self.shared.space
            && let Some(export) = space.exports.find(name)
        {
            return Some(export);
        }
        if !name.is_empty() {
            return self.region(name).as_ref().map(export_of);
        }
        // Nobody is given one of several by chance.
        match &self.regions()[..] {
            [only] => Some(export_of(only)),
            _ => None,
        }
    }
}

fn export_of(region: &Exported) -> Export {
    let kind = match region.role {
        Role::Tracked => "written by a process",
        Role::Held => "held by the node",
        Role::File => "a file",
        Role::Replica => "a replica, by whole epochs",
    };
    let newest = region.changes.as_ref().map(|_| Since {
        epoch: region.epoch,
        generation: region.generation.0,
    });
    Export {
        name: region.name.as_str().into(),
        description: format!("region at epoch {}, {kind}", region.epoch).into(),
        base: 0,
        size: region.size,
        segment: region.size,
        read_only: true,
        newest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sees_what() {
        for (peer, own, owner, shared, expected) in [
            (Peer::Local(0), 0, 7, false, true),
            (Peer::Local(7), 0, 7, false, true),
            (Peer::Local(8), 0, 7, true, false),
            (Peer::Local(7), 7, 7, false, true),
            (Peer::Local(0), 7, 8, false, false),
            (Peer::Local(7), 7, 8, true, false),
            (Peer::Remote, 0, 7, true, true),
            (Peer::Remote, 0, 0, false, false),
            (Peer::Remote, 7, 7, true, true),
            (Peer::Remote, 7, 8, true, false),
        ] {
            assert_eq!(
                sees(peer, own, owner, shared),
                expected,
                "{peer:?} {own} {owner} {shared}"
            );
        }
    }
}
