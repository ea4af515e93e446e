//! What the kernel and its configuration allow, each tried for real.
//!
//! `doctor` prints these. No version number decides anything: each feature is
//! used on scratch objects, and what it does is looked at. Probes change nothing
//! outside the process and take some milliseconds together.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::behaviour::{Answer, Behaviour, Finding};
use super::futex::{self, Lifeline, Wake};
use super::map::{Access, Mapping};
use super::memfd::{self, Seals};
use super::pagemap::{Pagemap, Then};
use super::process::{EventFd, PidFd};
use super::ring::{Op, Ring, SendBuf, Setup};
use super::uffd::{Features, OpenedBy, Uffd};
use super::{SysError, net};
use crate::units::{MIB, PAGE_SIZE};

/// Descriptors below which a node with many regions would run out.
const ENOUGH_FDS: u64 = 4096;
/// How long a probe waits for an event that it has caused.
const PATIENCE: Duration = Duration::from_secs(2);

/// One feature or permission, tried on scratch objects.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Short name, as `doctor` prints it.
    pub name: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
    /// Whether the program cannot do its main work without it.
    pub required: bool,
    /// What came out.
    pub outcome: Outcome,
}

/// What came out of a probe.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It works; with what there is to know about it.
    Works {
        /// Version, way, number.
        detail: String,
    },
    /// It does not.
    Missing {
        /// What the kernel said or did.
        reason: String,
        /// What to do about it.
        remedy: &'static str,
    },
}

/// Why a probe failed: the kernel refused, or did something else than expected.
enum Failure {
    Refused(SysError),
    Different(&'static str),
}

impl From<SysError> for Failure {
    fn from(error: SysError) -> Failure {
        Failure::Refused(error)
    }
}

type Tried = Result<String, Failure>;

struct Entry {
    name: &'static str,
    purpose: &'static str,
    required: bool,
    remedy: &'static str,
    run: fn() -> Tried,
}

const PROBES: &[Entry] = &[
    Entry {
        name: "kernel",
        purpose: "asynchronous write-protection came with Linux 6.7",
        required: false,
        remedy: "use Linux 6.7 or newer; the probes below say what works here",
        run: kernel,
    },
    Entry {
        name: "memfd-seals",
        purpose: "regions that nobody else can write, shrink or grow",
        required: true,
        remedy: "use Linux 5.1 or newer, with sysctl vm.memfd_noexec below 2",
        run: memfd_seals,
    },
    Entry {
        name: "sparse-files",
        purpose: "regions whose holes take no memory and no time",
        required: true,
        remedy: "use a kernel whose tmpfs supports SEEK_DATA (Linux 3.8)",
        run: sparse_files,
    },
    Entry {
        name: "userfaultfd",
        purpose: "noticing stores (modes async and sync)",
        required: true,
        remedy: "use a kernel with CONFIG_USERFAULTFD=y and allow userfaultfd(2) in the container's seccomp profile",
        run: userfaultfd,
    },
    Entry {
        name: "userfaultfd-wp-async",
        purpose: "stores to shared memory cost one kernel fault, not a message",
        required: true,
        remedy: "use Linux 6.7 or newer with CONFIG_PTE_MARKER_UFFD_WP=y; or track with mode compare",
        run: wp_async,
    },
    Entry {
        name: "userfaultfd-wp-unpopulated",
        purpose: "first stores to untouched pages are noticed",
        required: true,
        remedy: "use Linux 6.4 or newer; or track with mode compare",
        run: wp_unpopulated,
    },
    Entry {
        name: "pagemap-scan",
        purpose: "finding what was stored to, and arming it again, in one step",
        required: true,
        remedy: "use Linux 6.7 or newer; or track with mode compare",
        run: pagemap_scan,
    },
    Entry {
        name: "pidfd",
        purpose: "noticing the death of a writer",
        required: true,
        remedy: "use Linux 5.4 or newer and allow pidfd_open(2) in the container's seccomp profile",
        run: pidfd,
    },
    Entry {
        name: "futex-shared",
        purpose: "waking readers that map a region for reading only",
        required: true,
        remedy: "allow futex(2) in the container's seccomp profile",
        run: futex_shared,
    },
    Entry {
        name: "futex-waitv",
        purpose: "readers that wait for an epoch and for the engine's death at once",
        required: false,
        remedy: "use Linux 5.16 or newer; until then such waits look around every millisecond",
        run: futex_waitv,
    },
    Entry {
        name: "robust-futex",
        purpose: "noticing the death of the engine within a millisecond",
        required: true,
        remedy: "allow set_robust_list(2) and get_robust_list(2) in the container's seccomp profile",
        run: robust_futex,
    },
    Entry {
        name: "io-uring",
        purpose: "the loop that moves all data",
        required: true,
        remedy: "sysctl kernel.io_uring_disabled=0 and allow io_uring in the container's seccomp profile",
        run: io_uring,
    },
    Entry {
        name: "scm-rights",
        purpose: "handing a region and its tracking to the node",
        required: true,
        remedy: "allow sendmsg(2) and recvmsg(2) in the container's seccomp profile",
        run: scm_rights,
    },
    Entry {
        name: "huge-pages",
        purpose: "cheaper private copies of large regions",
        required: false,
        remedy: "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        run: huge_pages,
    },
    Entry {
        name: "mseal",
        purpose: "regions whose mapping nothing can take away (option mseal)",
        required: false,
        remedy: "use Linux 6.10 or newer on a 64-bit machine, or leave the option off",
        run: mseal,
    },
    Entry {
        name: "open-files",
        purpose: "many regions and connections on one node",
        required: false,
        remedy: "raise the hard limit of open files (ulimit -Hn, LimitNOFILE= in the unit)",
        run: open_files,
    },
];

/// Tries everything, with what the scans really do behind the rest.
pub fn probe_all() -> Vec<Probe> {
    let findings = Behaviour::of_process().findings();
    PROBES
        .iter()
        .map(probe)
        .chain(findings.iter().map(probe_of))
        .collect()
}

fn probe_of(finding: &Finding) -> Probe {
    let remedy = "update the kernel; or track with mode compare";
    Probe {
        name: finding.name,
        purpose: finding.what,
        required: finding.needed,
        outcome: match &finding.answer {
            Answer::Holds(detail) => Outcome::Works {
                detail: detail.clone(),
            },
            Answer::Denied(reason) => Outcome::Missing {
                reason: reason.clone(),
                remedy,
            },
            Answer::Untried(reason) => Outcome::Missing {
                reason: format!("not tried: {reason}"),
                remedy: if finding.needed {
                    "make userfaultfd work first (see above)"
                } else {
                    "none is needed: small pages are used"
                },
            },
        },
    }
}

fn probe(entry: &Entry) -> Probe {
    let outcome = match (entry.run)() {
        Ok(detail) => Outcome::Works { detail },
        Err(Failure::Refused(error)) => Outcome::Missing {
            reason: format!("{}: {}", error.call, error.source),
            remedy: error.remedy.unwrap_or(entry.remedy),
        },
        Err(Failure::Different(what)) => Outcome::Missing {
            reason: what.to_owned(),
            remedy: entry.remedy,
        },
    };
    Probe {
        name: entry.name,
        purpose: entry.purpose,
        required: entry.required,
        outcome,
    }
}

/// The detail if `holds`, else what was different.
fn expect(holds: bool, otherwise: &'static str) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(Failure::Different(otherwise))
    }
}

fn kernel() -> Tried {
    let name = nix::sys::utsname::uname().map_err(|e| SysError::new("uname", e))?;
    let release = name.release().to_string_lossy();
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let version = (
        numbers.next().and_then(Result::ok).unwrap_or(0),
        numbers.next().and_then(Result::ok).unwrap_or(0),
    );
    expect(version >= (6, 7), "the kernel is older than Linux 6.7")?;
    Ok(format!("{release} {}", name.machine().to_string_lossy()))
}

fn memfd_seals() -> Tried {
    let fd = memfd::create("uffd-sync-probe", PAGE_SIZE)?;
    let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite)?;
    memfd::add_seals(
        &fd,
        Seals::FUTURE_WRITE | Seals::SHRINK | Seals::GROW | Seals::SEAL,
    )?;
    expect(
        memfd::write_at(&fd, &[1], 0).is_err(),
        "a sealed memory file can be written by pwrite",
    )?;
    expect(
        Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite).is_err(),
        "a sealed memory file can be mapped writable again",
    )?;
    let read_only = memfd::reopen_read_only(&fd)?;
    word_at(&mapping, 0)?.store(7, Ordering::Release);
    let mut word = [0; 4];
    memfd::read_at(&read_only, &mut word, 0)?;
    expect(
        u32::from_ne_bytes(word) == 7,
        "a store through the first mapping is not seen",
    )?;
    Ok("FUTURE_WRITE, SHRINK, GROW, SEAL".to_owned())
}

fn sparse_files() -> Tried {
    let fd = memfd::create("uffd-sync-probe", MIB)?;
    memfd::write_at(&fd, &[1], 8 * PAGE_SIZE)?;
    let data = memfd::next_data(&fd, 0)?;
    expect(
        data == Some(8 * PAGE_SIZE..9 * PAGE_SIZE),
        "SEEK_DATA does not find the one page that holds data",
    )?;
    Ok(format!(
        "{} bytes resident of 1 MiB",
        memfd::resident_bytes(&fd)?
    ))
}

fn userfaultfd() -> Tried {
    let (_, opened_by) = Uffd::open(Features::PAGEFAULT_FLAG_WP)?;
    Ok(match opened_by {
        OpenedBy::SystemCall => "by system call, privileged".to_owned(),
        OpenedBy::UserModeOnly => {
            "by system call, user mode only: in mode sync read(2) into armed pages fails".to_owned()
        }
        OpenedBy::Device => "by /dev/userfaultfd".to_owned(),
    })
}

/// A scratch region that is tracked: its memory, and what tracks it.
struct Scratch {
    memory: Mapping,
    fd: OwnedFd,
    uffd: Uffd,
    pagemap: Pagemap,
}

impl Scratch {
    const PAGES: u64 = 16;

    /// With page 0 populated before arming, the others holes.
    fn new(features: Features) -> Result<Scratch, Failure> {
        let fd = memfd::create("uffd-sync-probe", Self::PAGES * PAGE_SIZE)?;
        let mapping = Mapping::shared(&fd, Self::PAGES * PAGE_SIZE, Access::ReadWrite)?;
        let (uffd, _) = Uffd::open(features)?;
        let scratch = Scratch {
            memory: mapping,
            fd,
            uffd,
            pagemap: Pagemap::open_self()?,
        };
        scratch.store(0)?;
        let mapping = &scratch.memory;
        scratch.uffd.register_wp(mapping)?;
        scratch.uffd.protect(mapping.address(), mapping.len())?;
        Ok(scratch)
    }

    fn store(&self, page: u64) -> Result<(), Failure> {
        word_at(&self.memory, page * PAGE_SIZE)?.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The pages reported as written.
    fn scan(&self, then: Then) -> Result<Vec<u64>, Failure> {
        let (start, len) = (self.memory.address(), self.memory.len());
        let mut ranges = Vec::new();
        let end = self
            .pagemap
            .scan_written(start, start + len, &mut ranges, 64, u64::MAX, then)?;
        expect(end == start + len, "the scan stopped early")?;
        Ok(ranges
            .into_iter()
            .flat_map(|range| (range.start - start) / PAGE_SIZE..(range.end - start) / PAGE_SIZE)
            .collect())
    }
}

fn wp_async() -> Tried {
    let features = Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM | Features::WP_ASYNC;
    let scratch = Scratch::new(features)?;
    scratch.store(0)?;
    expect(
        scratch.scan(Then::Leave)?.contains(&0),
        "a store to a protected page is not reported",
    )?;
    Ok("on shared memory".to_owned())
}

fn wp_unpopulated() -> Tried {
    let scratch = Scratch::new(Features::all())?;
    expect(
        scratch.scan(Then::Leave)?.is_empty(),
        "pages that were never touched are reported after arming",
    )?;
    scratch.store(5)?;
    expect(
        scratch.scan(Then::Leave)? == [5],
        "the first store to an untouched page is not reported",
    )?;
    Ok("holes are armed too".to_owned())
}

fn pagemap_scan() -> Tried {
    let scratch = Scratch::new(Features::all())?;
    scratch.store(0)?;
    scratch.store(5)?;
    scratch.store(6)?;
    expect(
        scratch.scan(Then::Protect)? == [0, 5, 6],
        "a protecting scan does not report what was stored to",
    )?;
    expect(
        scratch.scan(Then::Protect)?.is_empty(),
        "pages are reported again without a store",
    )?;
    scratch.store(5)?;
    expect(
        scratch.scan(Then::Protect)? == [5],
        "a scan does not arm what it reports",
    )?;
    // What is dirty and then loses its page-table entry must stay dirty.
    scratch.store(6)?;
    let zapped = scratch.memory.zap(6 * PAGE_SIZE, PAGE_SIZE);
    let kept = scratch.scan(Then::Protect)? == [6];
    let start = scratch.memory.address();
    let tracked = scratch
        .pagemap
        .tracked_bytes(start, start + scratch.memory.len())?;
    expect(
        tracked == scratch.memory.len(),
        "registered memory is not reported as tracked",
    )?;
    expect(
        zapped.is_err() || kept,
        "a dirty page is forgotten when its entry is dropped",
    )?;
    let resident = memfd::resident_bytes(&scratch.fd)? / PAGE_SIZE;
    Ok(format!(
        "reports, arms again, keeps dropped entries; {resident} of {} scratch pages resident",
        Scratch::PAGES
    ))
}

fn pidfd() -> Tried {
    let own = PidFd::own()?;
    expect(!own.has_exited()?, "a live process reads as exited")?;
    expect(
        own.pid()? == super::process::process_id(),
        "a pidfd does not tell its number",
    )?;
    Ok("open, poll, number".to_owned())
}

/// The word at `offset` of a scratch mapping.
fn word_at(mapping: &Mapping, offset: u64) -> Result<&AtomicU32, Failure> {
    mapping
        .word(offset)
        .ok_or(Failure::Different("a word lies outside its page"))
}

/// A page of words, mapped twice: writable and read-only.
fn words() -> Result<(Arc<Mapping>, Mapping), Failure> {
    let fd = memfd::create("uffd-sync-probe", PAGE_SIZE)?;
    let writable = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite)?;
    let read_only = Mapping::shared(&fd, PAGE_SIZE, Access::ReadOnly)?;
    Ok((Arc::new(writable), read_only))
}

fn futex_shared() -> Tried {
    let (writable, read_only) = words()?;
    let waiter = std::thread::spawn(move || {
        let word = word_at(&read_only, 0)?;
        let deadline = Instant::now() + PATIENCE;
        while word.load(Ordering::Acquire) == 0 && Instant::now() < deadline {
            futex::wait(word, 0, Some(deadline))?;
        }
        Ok::<u32, Failure>(word.load(Ordering::Acquire))
    });
    let word = word_at(&writable, 0)?;
    word.store(1, Ordering::Release);
    futex::wake(word, u32::MAX)?;
    match waiter.join() {
        Ok(seen) => expect(seen? == 1, "a waiter on a read-only mapping was not woken")?,
        Err(_) => return Err(Failure::Different("the waiting thread panicked")),
    }
    Ok("wait and wake through a read-only mapping".to_owned())
}

fn futex_waitv() -> Tried {
    let (first, second) = (AtomicU32::new(0), AtomicU32::new(1));
    let changed = futex::wait_vector(&[(&first, 0), (&second, 0)], None)?;
    expect(changed == Wake::Changed, "a changed word is not noticed")?;
    let deadline = Instant::now() + Duration::from_millis(1);
    let late = futex::wait_vector(&[(&first, 0), (&second, 1)], Some(deadline))?;
    expect(late == Wake::TimedOut, "a deadline is not kept")?;
    Ok("several words at once".to_owned())
}

fn robust_futex() -> Tried {
    let (writable, _) = words()?;
    let held = writable.clone();
    let thread = std::thread::spawn(move || {
        // Forgotten, so that it is the kernel that finds it at the thread's end.
        Lifeline::hold(held, 64).map(std::mem::forget)
    });
    match thread.join() {
        Ok(result) => result?,
        Err(_) => return Err(Failure::Different("the holding thread panicked")),
    }
    let word = word_at(&writable, 64)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let value = word.load(Ordering::Acquire);
        if value & futex::OWNER_DIED != 0 {
            return Ok("marked at a thread's death".to_owned());
        }
        if futex::wait(word, value, Some(deadline))? == Wake::TimedOut {
            return Err(Failure::Different("a dead thread's word is not marked"));
        }
    }
}

fn io_uring() -> Tried {
    let mut ring = Ring::new(8)?;
    let missing = ring.missing_operations()?;
    expect(missing.is_empty(), "an operation is missing")?;
    let bell = EventFd::new()?;
    let fd = Arc::new(bell.try_clone_fd()?);
    ring.submit(
        1,
        Op::Poll {
            fd,
            writable: false,
        },
    )?;
    bell.ring();
    ring.enter(Some(PATIENCE))?;
    expect(
        ring.next().is_some_and(|done| done.result.is_ok()),
        "a poll of a ready descriptor does not complete",
    )?;
    let (a, b) = net::unix_pair()?;
    let recv = Op::Recv {
        socket: Arc::new(b),
        buf: Vec::with_capacity(8).into(),
        upto: 8,
    };
    ring.submit(2, recv)?;
    let send = Op::Send {
        socket: Arc::new(a),
        buf: SendBuf::Owned(vec![7; 8]),
        from: 0,
    };
    ring.submit(3, send)?;
    let deadline = Instant::now() + PATIENCE;
    while ring.in_flight() > 0 {
        expect(Instant::now() < deadline, "a transfer does not complete")?;
        ring.enter(Some(PATIENCE))?;
        while let Some(done) = ring.next() {
            let moved = done.result.map_err(|e| SysError::new("a transfer", e))?;
            expect(moved == 8, "a transfer of eight bytes is cut short")?;
        }
    }
    Ok(match ring.setup() {
        Setup::Deferred => "SINGLE_ISSUER, DEFER_TASKRUN".to_owned(),
        Setup::Cooperative => "COOP_TASKRUN (Linux 6.1 defers completions)".to_owned(),
        Setup::Plain => "plain (Linux 6.1 defers completions)".to_owned(),
    })
}

fn scm_rights() -> Tried {
    let (a, b) = net::unix_pair()?;
    let passed = memfd::create("uffd-sync-probe", PAGE_SIZE)?;
    net::send_with_fds(&a, b"x", &[passed.as_fd()])?;
    let got = net::recv_with_fds(&b, &mut [0; 4], 2, net::Blocking::No)?;
    expect(got.fds.len() == 1, "a descriptor did not arrive")?;
    let peer = net::peer_credentials(&a)?;
    Ok(format!("descriptors, peer credentials (uid {})", peer.uid))
}

fn huge_pages() -> Tried {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .map_err(|e| SysError::new("read transparent_hugepage/enabled", e))?;
    expect(
        !text.contains("[never]"),
        "transparent huge pages are switched off",
    )?;
    Ok(text.trim().to_owned())
}

fn mseal() -> Tried {
    let fd = memfd::create("uffd-sync-probe", PAGE_SIZE)?;
    // It stays mapped until this process ends: one page.
    let mapping = Mapping::shared(&fd, PAGE_SIZE, Access::ReadWrite)?;
    mapping.seal()?;
    let (uffd, _) = Uffd::open(Features::PAGEFAULT_FLAG_WP)?;
    uffd.register_wp(&mapping)?;
    Ok("a sealed mapping can be tracked".to_owned())
}

fn open_files() -> Tried {
    let limit = super::process::raise_fd_limit();
    expect(limit >= ENOUGH_FDS, "the limit of open files is below 4096")?;
    Ok(format!("{limit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_tried_and_what_is_missing_has_a_remedy() {
        let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
        let probes = probe_all();
        assert!(probes.len() > PROBES.len());
        for probe in probes {
            match probe.outcome {
                Outcome::Works { detail } => assert!(!detail.is_empty(), "{}", probe.name),
                Outcome::Missing { reason, remedy } => {
                    assert!(!reason.is_empty() && !remedy.is_empty(), "{}", probe.name);
                    assert!(!(required && probe.required), "{}: {reason}", probe.name);
                }
            }
        }
    }
}
