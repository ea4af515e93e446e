//! A thread that holds a side's liveness word, so that the object it belongs to may
//! move between threads.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::ChannelError;
use crate::duplex::{Segment, Side};
use crate::sys::futex::Lifeline;

/// Holds the word from creation to drop; the process's death ends it too.
#[derive(Debug)]
pub(super) struct Keeper {
    /// Dropped to end the thread.
    end: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Returns once the word is held.
    pub(super) fn hold(segment: &Segment, side: Side) -> Result<Keeper, ChannelError> {
        let (mapping, offset) = segment.lifeline_place(side);
        let (held, is_held) = sync_channel(1);
        let (end, ended) = sync_channel::<()>(0);
        let thread = std::thread::Builder::new()
            .name("uffd-sync-keep".to_owned())
            .stack_size(64 << 10)
            .spawn(move || match Lifeline::hold(mapping, offset) {
                Ok(_lifeline) => {
                    // Whoever made this thread waits for it.
                    let _ = held.send(Ok(()));
                    let _ = ended.recv();
                }
                Err(error) => {
                    let _ = held.send(Err(error));
                }
            })
            .map_err(ChannelError::Thread)?;
        let keeper = Keeper {
            end: Some(end),
            thread: Some(thread),
        };
        match is_held.recv() {
            Ok(Ok(())) => Ok(keeper),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(ChannelError::Disconnected),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
