//! A read-only attachment to a region of a node on this host.

use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::{ClientError, Node};
use crate::region::{Control, HoldPage, Pulse, RegionReader};
use crate::sys::map::Access;
use crate::wire::control::{RegionStatus, Request, Response};

/// A region joined read-only: a [`RegionReader`] that the node knows of.
///
/// When the node dies its waits end with `SourceGone`; when the region is made anew
/// (a new writer, another size) with `Retired`: join again.
#[derive(Debug)]
pub struct Reader {
    reader: RegionReader,
    status: RegionStatus,
    // Its end tells the node that the reader is gone.
    node: Mutex<Node>,
}

impl Deref for Reader {
    type Target = RegionReader;

    fn deref(&self) -> &RegionReader {
        &self.reader
    }
}

impl Reader {
    /// Joins the region `name` of the node at `socket`.
    ///
    /// # Errors
    /// If there is no node, no such region, or it belongs to another user.
    pub fn attach(socket: impl AsRef<Path>, name: &str) -> Result<Self, ClientError> {
        Self::attach_over(Node::connect(socket)?, name)
    }

    /// The same over an existing connection.
    ///
    /// # Errors
    /// As for [`Reader::attach`].
    pub fn attach_over(mut node: Node, name: &str) -> Result<Self, ClientError> {
        let (hold, hold_fd) = HoldPage::create()?;
        let request = Request::Attach {
            name: name.to_owned(),
        };
        let answer = node.request(&request, &[], &[hold_fd.as_fd()])?;
        let Response::Attached { region: status } = answer.response else {
            return Err(ClientError::unexpected("attach", &answer.response));
        };
        let [data, control, pulse] = <[OwnedFd; 3]>::try_from(answer.fds)
            .map_err(|_| ClientError::Descriptors { expected: 3 })?;
        let identity = Control::open(&control, Access::ReadOnly)?
            .identity()
            .clone();
        // An older node says nothing of growth.
        let max_size = status.max_size.max(status.size);
        if identity.name.as_str() != status.name || identity.max_size != max_size {
            return Err(ClientError::OtherRegion);
        }
        let reader = RegionReader::open(data, control, hold, Pulse::open(pulse)?, &identity)?;
        Ok(Self {
            reader,
            status: *status,
            node: Mutex::new(node),
        })
    }

    /// Makes an epoch that is one exact instant between this call and its return, and
    /// says its number: see [`Node::cut`].
    ///
    /// # Errors
    /// As for [`Node::cut`].
    pub fn cut(&self) -> Result<u64, ClientError> {
        let mut node = self.node.lock().unwrap_or_else(PoisonError::into_inner);
        node.cut(&self.status.name)
    }

    /// What the node said of the region when it was joined.
    pub fn joined_status(&self) -> &RegionStatus {
        &self.status
    }
}
