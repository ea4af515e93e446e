//! io_uring reads into memory at an address, plain and into registered buffers.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, opcode, types};

/// A ring whose one registered buffer, if any, is the memory given last.
pub struct Ring(IoUring);

impl Ring {
    /// One that waits in the kernel for each read.
    pub fn new() -> io::Result<Self> {
        Ok(Self(IoUring::new(4)?))
    }

    /// Registers `len` bytes at `at`: the kernel pins their pages until the ring is
    /// dropped or [`Ring::release`] is called.
    pub fn pin(&self, at: u64, len: u64) -> io::Result<()> {
        let buffer = libc::iovec {
            iov_base: at as *mut _,
            iov_len: len as usize,
        };
        // SAFETY: required: the memory stays mapped while it is registered. The
        // caller's matter; pinned pages stay where they are in any case.
        unsafe { self.0.submitter().register_buffers(&[buffer]) }
    }

    /// Gives the registered buffer back.
    pub fn release(&self) -> io::Result<()> {
        self.0.submitter().unregister_buffers()
    }

    /// `READ` of up to `len` bytes from the file's beginning to `at`.
    pub fn read_to(&mut self, from: impl AsFd, at: u64, len: u32) -> io::Result<u32> {
        let fd = types::Fd(from.as_fd().as_raw_fd());
        self.run(opcode::Read::new(fd, at as *mut u8, len).build())
    }

    /// `READ_FIXED` of the same, to a place within the registered buffer.
    pub fn read_fixed_to(&mut self, from: impl AsFd, at: u64, len: u32) -> io::Result<u32> {
        let fd = types::Fd(from.as_fd().as_raw_fd());
        self.run(opcode::ReadFixed::new(fd, at as *mut u8, len, 0).build())
    }

    fn run(&mut self, entry: io_uring::squeue::Entry) -> io::Result<u32> {
        // SAFETY: required: descriptor and memory live until the completion. It is
        // waited for here.
        unsafe { self.0.submission().push(&entry) }.map_err(io::Error::other)?;
        self.0.submit_and_wait(1)?;
        let done = self.0.completion().next();
        let done = done.ok_or_else(|| io::Error::other("no completion"))?;
        u32::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()))
    }
}
