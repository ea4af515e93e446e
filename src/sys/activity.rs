//! Whether a process has run: one that has not can have stored nothing.
//!
//! What tells is the processor time that its threads have used, kernel threads that
//! work for it (`io_uring`) included. It does not tell of stores that another process
//! makes into this one's memory: by `process_vm_writev`, as a debugger, or as a task
//! that shares the memory without being a thread.
//!
//! The time of a process other than the caller's is brought up to date when one of
//! its threads sleeps and at each timer tick of the processor that it runs on
//! (`kernel/sched/cputime.c`, Linux 6.18: `thread_group_cputime`), so what began to run
//! within the last tick may not be seen yet, and is seen by the next look.

use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use super::SysError;
use super::process::{process_id, thread_id};

/// Most threads of the caller's own process that are looked at one by one.
pub const MAX_THREADS: usize = 64;

/// The processor time of one process.
#[derive(Debug)]
pub struct Activity(Who);

#[derive(Debug)]
enum Who {
    Other(ClockId),
    /// This process: all threads but one, whose own looks do not count.
    Own {
        except: i32,
    },
}

impl Activity {
    /// Of the process `pid`. Of the caller's own process the calling thread does not
    /// count.
    ///
    /// # Errors
    /// `EINVAL` or `ESRCH` if there is no such process.
    pub fn of(pid: i32) -> Result<Activity, SysError> {
        if pid <= 0 {
            return Err(SysError::os("clock_getcpuclockid", libc::ESRCH));
        }
        if pid == process_id() {
            return Ok(Activity(Who::Own {
                except: thread_id(),
            }));
        }
        clock_getcpuclockid(Pid::from_raw(pid))
            .map(|clock| Activity(Who::Other(clock)))
            .map_err(|e| SysError::new("clock_getcpuclockid", e))
    }

    /// A number that is another one whenever the process has run in between. 0.4 us;
    /// some 2 us for each thread of the caller's own process.
    ///
    /// # Errors
    /// `EINVAL` if the process is gone; whatever reading `/proc/self/task` says; `E2BIG`
    /// if the caller's own process has more than [`MAX_THREADS`] threads.
    pub fn read(&self) -> Result<u64, SysError> {
        match &self.0 {
            Who::Other(clock) => nanoseconds(*clock),
            Who::Own { except } => own_threads(*except),
        }
    }
}

fn nanoseconds(clock: ClockId) -> Result<u64, SysError> {
    let time = clock_gettime(clock).map_err(|e| SysError::new("clock_gettime", e))?;
    let seconds = time.tv_sec().cast_unsigned().wrapping_mul(1_000_000_000);
    Ok(seconds.wrapping_add(time.tv_nsec().cast_unsigned()))
}

/// Numbers and times of all threads of this process but one, folded into one number.
fn own_threads(except: i32) -> Result<u64, SysError> {
    let failed = |e| SysError::new("read /proc/self/task", e);
    let (mut folded, mut threads) = (0u64, 0);
    for entry in std::fs::read_dir("/proc/self/task").map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(thread) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        threads += 1;
        if threads > MAX_THREADS {
            return Err(SysError::os("looking at each thread", libc::E2BIG));
        }
        if thread == except {
            continue;
        }
        // A thread that has just ended: its number is missing from the next look.
        let used = nanoseconds(clock_of_thread(thread)).unwrap_or(0);
        for number in [thread.cast_unsigned().into(), used] {
            // FNV-1a, a word at a time: equal lists fold alike, others hardly ever.
            folded = (folded ^ number).wrapping_mul(0x0000_0100_0000_01B3);
            folded ^= folded >> 32;
        }
    }
    Ok(folded)
}

/// The clock of a thread's processor time: its number inverted, and the kind
/// `CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED` (`include/linux/posix-timers_types.h`).
fn clock_of_thread(thread: i32) -> ClockId {
    ClockId::from_raw((!thread << 3) | 6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::{Child, Command, Stdio};
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Waits until the number stands still: whoever is looked at sleeps.
    fn at_rest(activity: &Activity) -> u64 {
        let end = Instant::now() + PATIENCE;
        let mut seen = activity.read().expect("a number");
        let mut since = Instant::now();
        while since.elapsed() < Duration::from_millis(50) {
            assert!(Instant::now() < end, "it never rests");
            std::thread::sleep(Duration::from_millis(1));
            let now = activity.read().expect("a number");
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
        }
        seen
    }

    fn changes_from(activity: &Activity, rest: u64) {
        let end = Instant::now() + PATIENCE;
        while activity.read().expect("a number") == rest {
            assert!(Instant::now() < end, "what ran was not noticed");
        }
    }

    struct Cat(Child);

    impl Drop for Cat {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn another_process_that_runs_is_noticed() {
        let cat = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut cat = Cat(cat.expect("cat"));
        let activity = Activity::of(cat.0.id().cast_signed()).expect("a clock");
        let mut byte = [0];
        for _ in 0..20 {
            let rest = at_rest(&activity);
            cat.0
                .stdin
                .as_mut()
                .expect("piped")
                .write_all(b"x")
                .expect("write");
            cat.0
                .stdout
                .as_mut()
                .expect("piped")
                .read_exact(&mut byte)
                .expect("read");
            changes_from(&activity, rest);
        }
        assert!(Activity::of(0).is_err() && Activity::of(-1).is_err());
    }

    #[test]
    fn a_thread_of_this_process_is_noticed_and_the_caller_is_not() {
        // In a process of its own: other tests run in this one.
        if std::env::var_os(ALONE).is_some() {
            return alone();
        }
        let thread = std::thread::current();
        let program = std::env::current_exe().expect("this program");
        let run = Command::new(program)
            .args(["--exact", thread.name().expect("a test's name")])
            .env(ALONE, "1")
            .stdout(Stdio::null())
            .status();
        assert!(run.expect("a child").success());
    }

    const ALONE: &str = "UFFD_SYNC_TEST_ALONE";

    fn alone() {
        let activity = Activity::of(process_id()).expect("a clock");
        let (tell, told) = mpsc::channel::<()>();
        let (answer, answered) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            while told.recv().is_ok() {
                answer.send(()).expect("the test waits");
            }
        });
        for _ in 0..20 {
            let rest = at_rest(&activity);
            let spun = Instant::now();
            while spun.elapsed() < Duration::from_millis(5) {
                std::hint::spin_loop();
            }
            assert_eq!(
                activity.read().expect("a number"),
                rest,
                "the caller counts"
            );
            tell.send(()).expect("the thread waits");
            answered.recv().expect("an answer");
            changes_from(&activity, rest);
        }
        drop(tell);
        thread.join().expect("the thread ends");
    }
}
