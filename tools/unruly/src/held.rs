//! One thread of a child that stands still while the others go on.

use std::io;

use super::answer;

/// A thread of a child process that does nothing while this lives. Belongs to the thread
/// that made it.
pub struct Held {
    thread: i32,
    _not_send: std::marker::PhantomData<*mut ()>,
}

impl Held {
    /// Stops the thread.
    pub fn hold(thread: i32) -> io::Result<Held> {
        // SAFETY: required: nothing; seizing takes numbers only and stops nobody.
        answer(unsafe { libc::ptrace(libc::PTRACE_SEIZE, thread, 0, 0) })?;
        let held = Held {
            thread,
            _not_send: std::marker::PhantomData,
        };
        // SAFETY: required: a thread that the caller has seized. It was just now.
        answer(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0) })?;
        let mut status = 0;
        // SAFETY: required: a place for the status. It is a local.
        let stopped = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
        answer(stopped.into())?;
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: required: nothing; a thread that is gone is an error.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.thread, 0, 0) };
    }
}
