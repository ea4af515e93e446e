//! Futexes shared between processes, and a word that the kernel marks when the
//! thread that holds it dies.
//!
//! [`Lifeline`] word (`include/uapi/linux/futex.h`, Linux 6.18):
//!
//! | word | meaning |
//! |---|---|
//! | 0 | nobody holds it (never held, or given back in order) |
//! | TID \| [`WAITERS`] | held by thread TID, in the holder's PID namespace |
//! | [`OWNER_DIED`] \| [`WAITERS`] | its holder died; the kernel wrote this and woke one waiter |
//!
//! The waiters bit is always set, since who waits through a read-only mapping
//! cannot set it and the kernel wakes nobody without it. The kernel wakes one
//! waiter only: each one that is woken wakes the next.
#![allow(
    unsafe_code,
    reason = "futex system calls, and the robust list that the kernel reads"
)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::map::{Access, Mapping};
use super::process::thread_id;
use super::{SysError, check};

/// Set in a [`Lifeline`]'s word by the kernel when its holder dies.
pub const OWNER_DIED: u32 = 0x4000_0000;
/// Set in a held word: the kernel is to wake a waiter when the holder dies.
pub const WAITERS: u32 = 0x8000_0000;
/// The holder's thread id in a held word.
pub const TID_MASK: u32 = 0x3FFF_FFFF;
/// Most words that [`wait_any`] takes.
pub const MAX_WORDS: usize = 4;

/// `FUTEX_WAIT` and `FUTEX_WAKE` without `FUTEX_PRIVATE_FLAG`.
const FUTEX_WAIT: libc::c_int = 0;
const FUTEX_WAKE: libc::c_int = 1;
const FUTEX_WAIT_BITSET: libc::c_int = 9;
const FUTEX_WAKE_BITSET: libc::c_int = 10;
/// `FUTEX2_SIZE_U32`, shared between processes.
const FUTEX2_SIZE_U32: u32 = 2;
/// How long the substitute for `futex_waitv` sleeps on its first word.
const SLICE: Duration = Duration::from_millis(1);

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Somebody woke it, or nothing did: look at the words.
    Woken,
    /// A word did not hold what was expected to begin with.
    Changed,
    /// The deadline passed.
    TimedOut,
}

/// Whether a [`Lifeline`]'s word says that its holder is alive.
pub fn is_held(word: u32) -> bool {
    // SYNC(lifeline): callers load the word with Acquire, so that what its holder
    // did before giving it back is seen; pairs with `Lifeline::drop`.
    word & OWNER_DIED == 0 && word & TID_MASK != 0
}

/// Sleeps while `word` holds `expected`, until it is woken or `deadline` passes.
/// `word` may lie in a read-only mapping.
///
/// # Errors
/// Whatever `futex` says beyond the outcomes of [`Wake`].
pub fn wait(word: &AtomicU32, expected: u32, deadline: Option<Instant>) -> Result<Wake, SysError> {
    let timeout = match remaining(deadline) {
        Some(left) if left.is_zero() => {
            return Ok(if word.load(Ordering::Acquire) == expected {
                Wake::TimedOut
            } else {
                Wake::Changed
            });
        }
        left => left.map(timespec),
    };
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: required: `word` is a readable, aligned u32 and `timeout` null or a
    // valid timespec for the length of the call. Both are borrowed here.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            FUTEX_WAIT,
            expected,
            timeout,
            std::ptr::null::<u32>(),
            0u32,
        )
    };
    outcome("futex FUTEX_WAIT", answer)
}

/// Sleeps while each word holds what is expected of it, until one is woken or
/// `deadline` passes. One to four words.
///
/// # Errors
/// `EINVAL` for no word or more than [`MAX_WORDS`].
pub fn wait_any(words: &[(&AtomicU32, u32)], deadline: Option<Instant>) -> Result<Wake, SysError> {
    if words.is_empty() || words.len() > MAX_WORDS {
        return Err(SysError::os("futex_waitv", libc::EINVAL));
    }
    if remaining(deadline).is_some_and(|left| left.is_zero()) {
        return Ok(if all_as_expected(words) {
            Wake::TimedOut
        } else {
            Wake::Changed
        });
    }
    match wait_vector(words, deadline) {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => wait_slices(words, deadline),
        other => other,
    }
}

/// `struct futex_waitv`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Waiter {
    val: u64,
    uaddr: u64,
    flags: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<Waiter>() == 24);

/// [`wait_any`] without its substitute.
pub(super) fn wait_vector(
    words: &[(&AtomicU32, u32)],
    deadline: Option<Instant>,
) -> Result<Wake, SysError> {
    let mut waiters = [Waiter {
        val: 0,
        uaddr: 0,
        flags: FUTEX2_SIZE_U32,
        reserved: 0,
    }; MAX_WORDS];
    for (waiter, (word, expected)) in waiters.iter_mut().zip(words) {
        waiter.uaddr = word.as_ptr() as u64;
        waiter.val = u64::from(*expected);
    }
    let until = remaining(deadline)
        .map(|left| timespec(Duration::from_nanos(super::process::monotonic_ns()) + left));
    let until = until.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: required: `words.len()` valid waiters (at most MAX_WORDS, checked by
    // the caller) whose words live through the call, which the borrows see to,
    // and `until` null or a valid timespec.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_futex_waitv,
            waiters.as_ptr(),
            words.len() as libc::c_uint,
            0u32,
            until,
            libc::CLOCK_MONOTONIC,
        )
    };
    outcome("futex_waitv", answer)
}

/// What stands in for `futex_waitv` before Linux 5.16: sleeps on the first word
/// a slice at a time and looks at the others in between.
fn wait_slices(words: &[(&AtomicU32, u32)], deadline: Option<Instant>) -> Result<Wake, SysError> {
    let (first, expected) = words[0];
    loop {
        if !all_as_expected(words) {
            return Ok(Wake::Changed);
        }
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Ok(Wake::TimedOut);
        }
        let until = deadline.map_or(now + SLICE, |deadline| deadline.min(now + SLICE));
        match wait(first, expected, Some(until))? {
            Wake::TimedOut => {}
            ended => return Ok(ended),
        }
    }
}

fn all_as_expected(words: &[(&AtomicU32, u32)]) -> bool {
    words
        .iter()
        .all(|(word, expected)| word.load(Ordering::Acquire) == *expected)
}

/// Wakes up to `count` threads, of any process, that wait for `word`, and says
/// how many. Works on a read-only mapping.
///
/// # Errors
/// Whatever `futex` says.
pub fn wake(word: &AtomicU32, count: u32) -> Result<u32, SysError> {
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    // SAFETY: required: `word` is a mapped, aligned address; it is borrowed. The
    // kernel uses the address only.
    let answer = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), FUTEX_WAKE, count) };
    check("futex FUTEX_WAKE", answer).map(|woken| woken as u32)
}

/// [`wait`] for those wake-ups only whose mask has a bit in common with `mask`,
/// until `until_ns` on [`monotonic_ns`](super::process::monotonic_ns)'s clock
/// (`u64::MAX`: for ever). The kernel takes that time as it is, so no clock is
/// read here.
///
/// # Errors
/// `EINVAL` for an empty mask; whatever else `futex` says beyond [`Wake`].
pub fn wait_masked(
    word: &AtomicU32,
    expected: u32,
    mask: u32,
    until_ns: u64,
) -> Result<Wake, SysError> {
    let until = (until_ns != u64::MAX).then(|| timespec(Duration::from_nanos(until_ns)));
    let until = until.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: required: `word` is a readable, aligned u32 and `until` null or a
    // valid timespec for the length of the call. Both are borrowed here.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            FUTEX_WAIT_BITSET,
            expected,
            until,
            std::ptr::null::<u32>(),
            mask,
        )
    };
    outcome("futex FUTEX_WAIT_BITSET", answer)
}

/// Wakes up to `count` threads that wait for `word` with a mask that has a bit in
/// common with `mask`; [`wait`] and [`wait_any`] wait with all bits.
///
/// # Errors
/// `EINVAL` for an empty mask.
pub fn wake_masked(word: &AtomicU32, count: u32, mask: u32) -> Result<u32, SysError> {
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    // SAFETY: required: `word` is a mapped, aligned address; it is borrowed. The
    // kernel uses the address only.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            FUTEX_WAKE_BITSET,
            count,
            std::ptr::null::<libc::timespec>(),
            std::ptr::null::<u32>(),
            mask,
        )
    };
    check("futex FUTEX_WAKE_BITSET", answer).map(|woken| woken as u32)
}

fn outcome(call: &'static str, answer: libc::c_long) -> Result<Wake, SysError> {
    let Err(error) = check(call, answer) else {
        return Ok(Wake::Woken);
    };
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Ok(Wake::Changed),
        Some(libc::EINTR) => Ok(Wake::Woken),
        Some(libc::ETIMEDOUT) => Ok(Wake::TimedOut),
        _ => Err(error),
    }
}

fn remaining(deadline: Option<Instant>) -> Option<Duration> {
    deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// `struct robust_list_head`, with the one entry that this module ever has.
///
/// ```text
/// head.list ----> entry --next--> head.list     (circular)
/// entry + futex_offset = address of the word    (in shared memory)
/// ```
/// Entry and head are this process's own memory, so nobody else can lead the
/// kernel astray; only the word is shared.
#[repr(C)]
struct RobustList {
    first: *const RobustEntry,
    futex_offset: libc::c_long,
    pending: *const RobustEntry,
    entry: RobustEntry,
}

/// `struct robust_list`.
#[repr(C)]
struct RobustEntry {
    next: *const RobustEntry,
}

/// Size of `struct robust_list_head`: what `set_robust_list` wants to hear.
const HEAD_BYTES: usize = 24;

const _: () = assert!(std::mem::offset_of!(RobustList, entry) == HEAD_BYTES);

thread_local! {
    static HOLDS: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread's hold of a word in shared memory: while the thread lives
/// the word names it; when it dies, by whatever cause and however large its
/// process, the kernel marks the word [`OWNER_DIED`] and wakes a waiter.
///
/// A thread holds at most one, and no robust pthread mutex meanwhile: the
/// kernel knows one list per thread.
#[derive(Debug)]
pub struct Lifeline {
    list: *mut RobustList,
    /// What the C library had registered for this thread.
    former: *const libc::c_void,
    former_len: usize,
    mapping: Arc<Mapping>,
    offset: u64,
    /// Belongs to the thread that made it.
    _not_send: PhantomData<*mut ()>,
}

impl Lifeline {
    /// Makes the calling thread hold the u32 at `offset` of `mapping` until the
    /// thread dies or this is dropped. What the word held before is overwritten.
    ///
    /// # Errors
    /// `EINVAL` if the word is misaligned, beyond the mapping or not writable;
    /// `EBUSY` if the thread holds a lifeline already.
    pub fn hold(mapping: Arc<Mapping>, offset: u64) -> Result<Lifeline, SysError> {
        let word = match mapping.word(offset) {
            Some(word) if mapping.access() == Access::ReadWrite => word.as_ptr(),
            _ => return Err(SysError::os("placing a robust futex", libc::EINVAL)),
        };
        if HOLDS.get() {
            return Err(SysError::os(
                "a second robust futex of a thread",
                libc::EBUSY,
            ));
        }
        let (mut former, mut former_len) = (std::ptr::null::<libc::c_void>(), 0usize);
        // SAFETY: required: two valid places for the answer; they are locals.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_get_robust_list,
                0,
                &raw mut former,
                &raw mut former_len,
            )
        };
        check("get_robust_list", answer)?;

        let list = Box::into_raw(Box::new(RobustList {
            first: std::ptr::null(),
            futex_offset: 0,
            pending: std::ptr::null(),
            entry: RobustEntry {
                next: std::ptr::null(),
            },
        }));
        // SAFETY: required: `list` is valid and nobody else has it yet. It was
        // just made, and the kernel learns of it below.
        unsafe {
            let entry = &raw const (*list).entry;
            (*list).first = entry;
            (*list).entry.next = list.cast();
            (*list).futex_offset = (word as i64).wrapping_sub(entry as i64);
        }
        let lifeline = Lifeline {
            list,
            former,
            former_len,
            mapping,
            offset,
            _not_send: PhantomData,
        };
        // The list first, then the word: a death in between leaves the word as it was.
        set_robust_list(list.cast(), HEAD_BYTES)?;
        HOLDS.set(true);
        // SYNC(lifeline): what its holder prepared is seen by who finds it held.
        lifeline
            .word()
            .store(thread_id().cast_unsigned() | WAITERS, Ordering::Release);
        Ok(lifeline)
    }

    /// The word held.
    pub fn word(&self) -> &AtomicU32 {
        match self.mapping.word(self.offset) {
            Some(word) => word,
            None => unreachable!("checked by `hold`"),
        }
    }
}

impl Drop for Lifeline {
    /// Gives the word back: 0, and all waiters are woken.
    fn drop(&mut self) {
        if HOLDS.get() {
            HOLDS.set(false);
            let held = thread_id().cast_unsigned() | WAITERS;
            // SYNC(lifeline): pairs with the loads of those who ask `is_held`.
            // In the child of a fork the word names the parent's thread: not ours to give.
            let given = self
                .word()
                .compare_exchange(held, 0, Ordering::Release, Ordering::Relaxed);
            if given.is_ok() {
                // Waiters look at the word whether or not this reaches them.
                let _ = wake(self.word(), u32::MAX);
            }
        }
        if set_robust_list(self.former, self.former_len).is_ok() {
            // SAFETY: required: from `Box::into_raw`, freed once, and nobody uses
            // it: the kernel has just been told of another list. Where it refused
            // to be told the list is leaked instead.
            drop(unsafe { Box::from_raw(self.list) });
        }
    }
}

/// Tells the kernel where this thread's robust list is.
fn set_robust_list(head: *const libc::c_void, len: usize) -> Result<(), SysError> {
    // SAFETY: required: `head` is null or a head that stays valid until another is
    // set or the thread ends. Callers pass a leaked box, or what the C library had
    // set for this thread. The kernel reads it with its own checks.
    let answer = unsafe { libc::syscall(libc::SYS_set_robust_list, head, len) };
    check("set_robust_list", answer).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd;
    use crate::units::PAGE_SIZE;
    use std::thread;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn page() -> (Arc<Mapping>, Mapping) {
        let fd = memfd::create("futex", PAGE_SIZE).expect("memfd");
        let writable = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite).expect("map");
        let read_only = Mapping::shared(&fd, PAGE_SIZE, Access::ReadOnly).expect("map");
        (Arc::new(writable), read_only)
    }

    #[test]
    fn a_waiter_on_a_read_only_mapping_is_woken_and_wakes_the_next() {
        let (writable, read_only) = page();
        let words = [0, 128].map(|at| read_only.word(at).expect("a word"));
        let deadline = Some(Instant::now() + PATIENCE);
        thread::scope(|scope| {
            for many in [true, false] {
                scope.spawn(move || {
                    while words[0].load(Ordering::Acquire) == 0 {
                        let ended = if many {
                            wait_any(&[(words[0], 0), (words[1], 0)], deadline)
                        } else {
                            wait(words[0], 0, deadline)
                        };
                        assert_ne!(ended.expect("wait"), Wake::TimedOut);
                    }
                    wake(words[0], 1).expect("wake through a read-only mapping");
                });
            }
            let word = writable.word(0).expect("a word");
            word.store(1, Ordering::Release);
            wake(word, 1).expect("wake");
        });
    }

    #[test]
    fn waits_end_at_once_or_at_the_deadline() {
        type WaitAny = fn(&[(&AtomicU32, u32)], Option<Instant>) -> Result<Wake, SysError>;
        let (first, second) = (AtomicU32::new(1), AtomicU32::new(2));
        let soon = || Some(Instant::now() + Duration::from_millis(3));
        assert_eq!(wait(&first, 0, None).expect("wait"), Wake::Changed);
        assert_eq!(wait(&first, 1, soon()).expect("wait"), Wake::TimedOut);
        let past = Some(Instant::now());
        assert_eq!(wait(&first, 1, past).expect("wait"), Wake::TimedOut);
        assert_eq!(wait(&first, 0, past).expect("wait"), Wake::Changed);
        for wait_any in [wait_any as WaitAny, wait_slices] {
            let changed = wait_any(&[(&first, 1), (&second, 1)], None).expect("wait");
            assert_eq!(changed, Wake::Changed);
            let late = wait_any(&[(&first, 1), (&second, 2)], soon()).expect("wait");
            assert_eq!(late, Wake::TimedOut);
        }
        assert!(wait_any(&[], soon()).is_err());
        assert!(wait_any(&[(&first, 1); 5], soon()).is_err());
        assert_eq!(wake(&first, u32::MAX).expect("wake"), 0);
    }

    #[test]
    fn a_masked_wake_reaches_its_mask_only() {
        let word = AtomicU32::new(0);
        let now = super::super::process::monotonic_ns;
        assert_eq!(
            wait_masked(&word, 0, 1, now() + 1_000_000).expect("wait"),
            Wake::TimedOut
        );
        assert_eq!(
            wait_masked(&word, 1, 1, u64::MAX).expect("wait"),
            Wake::Changed
        );
        assert!(wait_masked(&word, 0, 0, now()).is_err());
        thread::scope(|scope| {
            let (word, until) = (&word, now() + PATIENCE.as_nanos() as u64);
            let waiter = scope.spawn(move || wait_masked(word, 0, 4, until));
            while !waiter.is_finished() {
                assert_eq!(wake_masked(word, u32::MAX, 8).expect("wake"), 0);
                if wake_masked(word, u32::MAX, 12).expect("wake") == 1 {
                    break;
                }
                thread::yield_now();
            }
            assert_eq!(
                waiter.join().expect("the waiter").expect("wait"),
                Wake::Woken
            );
        });
    }

    #[test]
    fn the_substitute_notices_every_word() {
        let (first, second) = (AtomicU32::new(0), AtomicU32::new(0));
        let deadline = Some(Instant::now() + PATIENCE);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| wait_slices(&[(&first, 0), (&second, 0)], deadline));
            second.store(1, Ordering::Release);
            let ended = waiter.join().expect("the waiter").expect("wait");
            assert_ne!(ended, Wake::TimedOut);
        });
    }

    #[test]
    fn the_kernel_marks_the_word_of_a_thread_that_died() {
        let (writable, read_only) = page();
        let word = read_only.word(64).expect("a word");
        let tid = thread::spawn(move || {
            let lifeline = Lifeline::hold(writable, 64).expect("hold");
            let word = lifeline.word().load(Ordering::Relaxed);
            assert!(is_held(word));
            std::mem::forget(lifeline);
            word & TID_MASK
        })
        .join()
        .expect("the holder");
        assert_ne!(tid, 0);
        let deadline = Some(Instant::now() + PATIENCE);
        loop {
            let now = word.load(Ordering::Acquire);
            if !is_held(now) {
                assert_eq!(now, OWNER_DIED | WAITERS);
                return;
            }
            assert_ne!(wait(word, now, deadline).expect("wait"), Wake::TimedOut);
        }
    }

    #[test]
    fn a_word_given_back_reads_as_never_held() {
        let (writable, read_only) = page();
        let word = read_only.word(0).expect("a word");
        thread::spawn(move || {
            for _ in 0..3 {
                let first = Lifeline::hold(writable.clone(), 0).expect("hold");
                let second = Lifeline::hold(writable.clone(), 64);
                let error = second.expect_err("one per thread");
                assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
                assert!(is_held(first.word().load(Ordering::Relaxed)));
            }
        })
        .join()
        .expect("the holder");
        assert_eq!(word.load(Ordering::Acquire), 0);
        assert!(!is_held(0));
    }

    #[test]
    fn a_lifeline_needs_a_writable_aligned_word_inside() {
        let (writable, read_only) = page();
        for at in [2, PAGE_SIZE - 2, PAGE_SIZE, u64::MAX - 3] {
            assert!(Lifeline::hold(writable.clone(), at).is_err());
        }
        assert!(Lifeline::hold(Arc::new(read_only), 0).is_err());
        Lifeline::hold(writable, 0).expect("the thread holds none");
    }
}
