//! A thread that holds a side's liveness word, so that the object it belongs to may
//! move between threads; a client's also watches the connection to the server.
//!
//! The connection's end is the second source of liveness: a server that never held its
//! word, such as one without robust futexes, is marked dead by the keeper then.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use super::ChannelError;
use super::link::Link;
use crate::duplex::{Segment, Side};
use crate::sys::SysError;
use crate::sys::futex::Lifeline;
use crate::sys::net::wait_readable;
use crate::sys::process::EventFd;

/// Holds the word from creation to drop; the process's death ends it too.
#[derive(Debug)]
pub(super) struct Keeper {
    /// Rung to end the thread.
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// The connection that is watched, closed when the word is given back.
    link: Option<Link>,
}

impl Keeper {
    /// Returns once the word is held. Takes the connection, which stays where it is on
    /// an error.
    pub(super) fn hold(
        segment: &Segment,
        side: Side,
        link: &mut Option<Link>,
    ) -> Result<Keeper, ChannelError> {
        let connection = match link.as_ref().and_then(Link::connection) {
            Some(connection) => Some(connection.try_clone_to_owned().map_err(|error| {
                ChannelError::Sys(SysError::new("fcntl F_DUPFD_CLOEXEC", error))
            })?),
            None => None,
        };
        let end = Arc::new(EventFd::new()?);
        let (held, is_held) = sync_channel(1);
        let (bell, memory) = (Arc::clone(&end), segment.clone());
        let thread = std::thread::Builder::new()
            .name("uffd-sync-keep".to_owned())
            .stack_size(64 << 10)
            .spawn(move || keep(&memory, side, connection, &bell, &held))
            .map_err(ChannelError::Thread)?;
        let mut keeper = Keeper {
            end,
            thread: Some(thread),
            link: None,
        };
        match is_held.recv() {
            Ok(Ok(())) => {
                keeper.link = link.take();
                Ok(keeper)
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(ChannelError::Disconnected),
        }
    }
}

/// Hands `segment` to the next server of the name that the keeper's connection was made
/// by, and keeps the connection to that one. `begin` runs when the former server is gone,
/// before the next one is asked. On an error the keeper is as before, but without a
/// connection.
///
/// # Errors
/// As [`super::DuplexClient::reconnect`].
pub(super) fn go_on(
    keeper: &mut Option<Keeper>,
    segment: &Segment,
    deadline: Instant,
    begin: impl FnOnce(),
) -> Result<(), ChannelError> {
    if segment.is_stopped(Side::Client) {
        return Err(ChannelError::Stopped);
    }
    let held = keeper.as_mut().ok_or(ChannelError::Disconnected)?;
    let link = held.link.as_mut().ok_or(ChannelError::Disconnected)?;
    link.hang_up();
    let taken = match segment.wait_until_server_left(deadline) {
        true => {
            begin();
            let taken = link.take_over(segment, deadline);
            taken.map(|_| ()).map_err(ChannelError::from)
        }
        false => Err(ChannelError::TimedOut),
    };
    if segment.is_stopped(Side::Client) {
        return Err(ChannelError::Stopped);
    }
    taken?;
    // The new one takes the word over before the old one is dropped.
    let next = Keeper::hold(segment, Side::Client, &mut held.link)?;
    *keeper = Some(next);
    Ok(())
}

fn keep(
    segment: &Segment,
    side: Side,
    connection: Option<OwnedFd>,
    bell: &EventFd,
    held: &SyncSender<Result<(), SysError>>,
) {
    let (mapping, offset) = segment.lifeline_place(side);
    let _lifeline = match Lifeline::hold(mapping, offset) {
        Ok(lifeline) => lifeline,
        Err(error) => {
            // Whoever made this thread waits for it.
            let _ = held.send(Err(error));
            return;
        }
    };
    // Welcomed by it: it holds its word.
    let server = segment.holder(Side::Server);
    let _ = held.send(Ok(()));
    if let Some(connection) = connection {
        let watched = [bell.as_fd(), connection.as_fd()];
        let looked = wait_readable(&watched, None);
        if looked.is_err() || bell.drain() > 0 {
            return;
        }
        segment.mark_died(Side::Server, server);
    }
    // Refused only for want of kernel memory: the word is given back early then.
    let _ = wait_readable(&[bell.as_fd()], None);
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
