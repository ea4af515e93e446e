//! Tracking as it is done without userfaultfd: mprotect and a SIGSEGV handler.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use uffd_sync::units::PAGE_SIZE;

use crate::memory::Memory;

/// Most pages that the handler keeps bits for.
pub(crate) const MAX_PAGES: u64 = 1 << 16;

// A signal handler reaches statics only. They are written before the memory is
// protected and by the handler, on the one thread that stores.
static BASE: AtomicUsize = AtomicUsize::new(0);
static LEN: AtomicUsize = AtomicUsize::new(0);
static DIRTY: [AtomicU64; (MAX_PAGES / 64) as usize] =
    [const { AtomicU64::new(0) }; (MAX_PAGES / 64) as usize];

/// The handler, in place until this is dropped.
pub(crate) struct Handler(libc::sigaction);

impl Handler {
    /// Takes faults in `memory`, which outlives the handler.
    pub(crate) fn install(memory: &Memory) -> io::Result<Self> {
        assert!(memory.pages() <= MAX_PAGES);
        LEN.store(memory.writer.len() as usize, Relaxed);
        BASE.store(memory.writer.as_ptr() as usize, Relaxed);
        let on_fault: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            on_fault;
        // SAFETY: required: a `struct sigaction`, for which zero bytes are valid.
        let (mut new, mut old) =
            unsafe { (std::mem::zeroed::<libc::sigaction>(), std::mem::zeroed()) };
        new.sa_sigaction = on_fault as usize;
        new.sa_flags = libc::SA_SIGINFO;
        // SAFETY: required: two valid structures and a handler that does only what
        // is allowed in one: `on_fault` uses atomics, mprotect and sigaction.
        let answer = unsafe { libc::sigaction(libc::SIGSEGV, &raw const new, &raw mut old) };
        if answer < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self(old))
        }
    }

    /// Protects everything and forgets what was written.
    pub(crate) fn protect(&self) -> io::Result<()> {
        DIRTY.iter().for_each(|word| word.store(0, Relaxed));
        let base = BASE.load(Relaxed) as *mut libc::c_void;
        // SAFETY: required: a mapping that its owner lets us protect: that of
        // `install`, whose stores all go through the handler.
        let answer = unsafe { libc::mprotect(base, LEN.load(Relaxed), libc::PROT_READ) };
        if answer < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Pages written since they were protected.
    pub(crate) fn dirty(&self) -> u64 {
        DIRTY
            .iter()
            .map(|word| u64::from(word.load(Relaxed).count_ones()))
            .sum()
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let base = BASE.swap(0, Relaxed) as *mut libc::c_void;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: required: as for `protect`, and the old action is one that
        // sigaction has answered.
        unsafe {
            libc::mprotect(base, LEN.load(Relaxed), access);
            libc::sigaction(libc::SIGSEGV, &raw const self.0, std::ptr::null_mut());
        }
    }
}

extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: required: the kernel's `siginfo_t` of a SIGSEGV, valid in the handler.
    let address = unsafe { (*info).si_addr() } as usize;
    let base = BASE.load(Relaxed);
    let offset = address.wrapping_sub(base);
    if base == 0 || offset >= LEN.load(Relaxed) {
        // Somebody else's fault: the default action takes the next try of it.
        // SAFETY: required: a signal number and an action; SIG_DFL is one.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    let page = offset / PAGE_SIZE as usize;
    DIRTY[page / 64].fetch_or(1 << (page % 64), Relaxed);
    let start = (base + page * PAGE_SIZE as usize) as *mut libc::c_void;
    // SAFETY: required: a page of the mapping that `install` was given.
    unsafe {
        libc::mprotect(
            start,
            PAGE_SIZE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
        )
    };
}
