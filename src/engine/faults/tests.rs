//! The cut test: processes that chain stores over distant pages, thousands of cuts,
//! each one checked to be a prefix of what every chain stored. Its controls tear.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU64;

use super::*;
use crate::sys::map::{Access, Mapping};
use crate::sys::{memfd, net, or_skip};
use crate::track::exact::Badly;
use crate::track::{Capture, PreImages, Source as Captured, Step, Tracker, Twin, WhenFull};

const ROLE: &str = "UFFD_SYNC_FAULTS_ROLE";
const SOCKET: &str = "UFFD_SYNC_FAULTS_SOCKET";
const PATIENCE: Duration = Duration::from_secs(20);
const PAGES: u64 = 512;
/// Chains there can be: words of 8 bytes at the beginning of each page.
const CHAINS: usize = 16;

/// What writing processes do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Each thread has a chain of its own.
    Alone,
    /// All threads of all processes store one chain in turn.
    Relay,
    /// All threads store to one page at once, then to the next.
    Herd,
    /// Pages in rising order.
    InOrder,
}

/// The page of store `number` of a chain.
fn page_of(chain: usize, number: u64, in_order: bool) -> u64 {
    if in_order {
        return number / 4 % PAGES;
    }
    let mut x = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (chain as u64 + 1) << 56;
    x ^= x >> 29;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (x >> 33) % PAGES
}

/// Not a test of its own: with the variable set this process writes.
#[test]
fn child() {
    let (Ok(role), Ok(path)) = (std::env::var(ROLE), std::env::var(SOCKET)) else {
        return;
    };
    let socket = net::unix_connect(Path::new(&path)).expect("connect");
    let mut numbers = role
        .split(' ')
        .map(|n| n.parse::<usize>().expect("a number"));
    let mut number = || numbers.next().expect("three numbers");
    let (first, threads, way) = (number(), number(), number());
    let mut byte = [0];
    let got = net::recv_with_fds(&socket, &mut byte, 2, net::Blocking::Yes).expect("memory");
    let [region, turn] = <[OwnedFd; 2]>::try_from(got.fds).expect("two memfds");
    let map =
        |fd, len| SharedMemory::new(Mapping::shared(fd, len, Access::ReadWrite).expect("map"));
    let memory = map(region, PAGES * PAGE_SIZE);
    let turn = map(turn, PAGE_SIZE);
    let uffd = Uffd::open_sync().expect("the parent has tried");
    uffd.register_wp(memory.mapping()).expect("register");
    let base = memory.mapping().address().to_ne_bytes();
    net::send_with_fds(&socket, &base, &[uffd.as_fd()]).expect("send");
    drop(uffd);
    let mut socket = UnixStream::from(socket);
    socket.read_exact(&mut byte).expect("the word to begin");
    let go_on = Arc::new(AtomicBool::new(true));
    let stores = Arc::new(AtomicU64::new(0));
    for chain in first..first + threads {
        let (memory, turn) = (memory.clone(), turn.clone());
        let (go_on, stores) = (Arc::clone(&go_on), Arc::clone(&stores));
        std::thread::spawn(move || match way {
            0 | 3 => write_alone(&memory, chain, way == 3, &go_on, &stores),
            1 => write_in_turn(&memory, &turn, chain, threads * 2, &go_on),
            _ => write_as_a_herd(&memory, chain, &go_on, &stores),
        });
    }
    // Each byte asks how many stores there were; the end of the stream ends it.
    while socket.read_exact(&mut byte).is_ok() {
        let count = stores.load(Ordering::Relaxed).to_ne_bytes();
        if socket.write_all(&count).is_err() {
            break;
        }
    }
    std::process::exit(0);
}

fn word(memory: &SharedMemory, page: u64, chain: usize) -> &AtomicU64 {
    memory.atomic_u64(page * PAGE_SIZE + 8 * chain as u64)
}

fn write_alone(
    memory: &SharedMemory,
    chain: usize,
    in_order: bool,
    go_on: &AtomicBool,
    stores: &AtomicU64,
) {
    let mut number = 1;
    while go_on.load(Ordering::Relaxed) {
        let page = page_of(chain, number, in_order);
        word(memory, page, chain).store(number, Ordering::Release);
        stores.fetch_add(1, Ordering::Relaxed);
        number += 1;
    }
}

/// Store `n` is that of thread `n % all`, in chain 0.
fn write_in_turn(
    memory: &SharedMemory,
    turn: &SharedMemory,
    chain: usize,
    all: usize,
    go_on: &AtomicBool,
) {
    let next = turn.atomic_u64(0);
    while go_on.load(Ordering::Relaxed) {
        let done = next.load(Ordering::Acquire);
        if done as usize % all != chain {
            std::thread::yield_now();
            continue;
        }
        let page = page_of(0, done + 1, false);
        word(memory, page, 0).store(done + 1, Ordering::Release);
        next.store(done + 1, Ordering::Release);
    }
}

/// All threads of the process go over the same pages at the same time.
fn write_as_a_herd(memory: &SharedMemory, chain: usize, go_on: &AtomicBool, stores: &AtomicU64) {
    let mut number = 1;
    while go_on.load(Ordering::Relaxed) {
        let page = page_of(0, number, false);
        word(memory, page, chain).store(number, Ordering::Release);
        stores.fetch_add(1, Ordering::Relaxed);
        number += 1;
    }
}

/// A writing process; killed on drop.
struct WritingProcess {
    child: Child,
    socket: UnixStream,
}

impl WritingProcess {
    fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    fn stores(&mut self) -> u64 {
        let mut count = [0; 8];
        self.socket.write_all(&[0]).expect("ask");
        self.socket.read_exact(&mut count).expect("an answer");
        u64::from_ne_bytes(count)
    }
}

impl Drop for WritingProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A region with its writing processes, its fault thread, and an engine.
struct Stage {
    // Children after the thread: they may wait for it, and it ends at once.
    faults: Option<FaultThread>,
    processes: Vec<WritingProcess>,
    content: Captured,
    twin: Twin,
    pre: PreImages,
    tracker: Tracker,
    way: Way,
    /// Of each chain: the last store captured, and where each page stands then.
    expected: Vec<(u64, Vec<u64>)>,
}

impl Stage {
    /// `processes` processes with `threads` threads each; none if the kernel refuses.
    fn new(processes: usize, threads: usize, way: Way, slots: u32, make: Make) -> Option<Stage> {
        or_skip("userfaultfd", Uffd::open_sync())?;
        let size = PAGES * PAGE_SIZE;
        let region = memfd::create("cut-test", size).expect("memfd");
        let turn = memfd::create("cut-test-turn", PAGE_SIZE).expect("memfd");
        let mapping = Mapping::shared(&region, size, Access::ReadOnly).expect("map");
        let memory = SharedMemory::new(mapping);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).expect("listen");
        let mut children = Vec::new();
        let mut writers = Vec::new();
        for process in 0..processes {
            // Writers run when nobody else wants to, or a small machine would make few cuts.
            let child = Command::new("nice")
                .args(["-n", "10"])
                .arg(std::env::current_exe().expect("this binary"))
                .args(["--exact", "engine::faults::tests::child", "--nocapture"])
                .env(
                    ROLE,
                    format!("{} {threads} {}", process * threads, way as usize),
                )
                .env(SOCKET, &path)
                .stdout(Stdio::null())
                .spawn()
                .expect("spawn");
            let ready = net::wait_readable(&[listener.as_fd()], Some(PATIENCE)).expect("poll");
            assert!(ready, "the child does not connect");
            let socket = OwnedFd::from(listener.accept().expect("accept").0);
            net::set_timeouts(&socket, Some(PATIENCE), Some(PATIENCE)).expect("timeouts");
            net::send_with_fds(&socket, &[0], &[region.as_fd(), turn.as_fd()]).expect("send");
            let mut base = [0; 8];
            let mut got = net::recv_with_fds(&socket, &mut base, 1, net::Blocking::Yes)
                .expect("the child answers");
            writers.push(Writing {
                uffd: Uffd::from_fd(got.fds.pop().expect("one")).expect("a userfaultfd"),
                base: u64::from_ne_bytes(base),
            });
            children.push(WritingProcess {
                child,
                socket: UnixStream::from(socket),
            });
        }
        let board = Arc::new(Board::with_slots(size, slots).expect("a board"));
        let read = Content {
            memory: memory.clone(),
            fd: region.try_clone().expect("a descriptor"),
        };
        let faults = FaultThread::start_with(&board, read, writers, make);
        Some(Stage {
            faults: Some(faults.expect("a thread")),
            processes: children,
            content: Captured::Mapped { memory, fd: region },
            twin: Twin::new(size).expect("a twin"),
            pre: PreImages::new(size, size),
            tracker: Tracker::Compare {
                attachments: Vec::new(),
            },
            way,
            expected: vec![(0, vec![0; PAGES as usize]); CHAINS],
        })
    }

    fn begin(&mut self) {
        for process in &mut self.processes {
            process.socket.write_all(&[1]).expect("the child begins");
        }
    }

    fn faults(&self) -> &FaultThread {
        self.faults.as_ref().expect("running")
    }

    /// Makes a cut; false if tracking is lost.
    fn make(&self, all: bool) -> bool {
        let number = self.faults().ask(all);
        let deadline = Instant::now() + PATIENCE;
        while self.faults().board().made().number != number {
            if self.faults().board().lost().is_some() {
                return false;
            }
            assert!(Instant::now() < deadline, "no cut");
            net::wait_readable(&[self.faults().events().as_fd()], Some(PATIENCE)).expect("poll");
            self.faults().heard();
        }
        true
    }

    /// Captures the cut made last; false if it was given up.
    fn capture(&mut self) -> bool {
        let board = Arc::clone(self.faults().board());
        let mut capture = Capture::cut(Arc::clone(&board), board.made()).expect("a capture");
        loop {
            let (twin, pre) = (&mut self.twin, &mut self.pre);
            let full = WhenFull::Abort;
            let step = capture.step(&mut self.tracker, &self.content, twin, pre, full);
            self.faults().freed();
            match step {
                Step::More | Step::NoRoom => {}
                Step::Done(_) => return true,
                Step::Lost(_) => {
                    capture.abandon();
                    return false;
                }
            }
        }
    }

    /// Whether the twin holds a prefix of each chain.
    fn is_whole(&mut self) -> bool {
        let value = |twin: &Twin, page: u64, chain: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&twin.page(page)[8 * chain..8 * chain + 8]);
            u64::from_ne_bytes(bytes)
        };
        let mut whole = true;
        for (chain, (known, pages)) in self.expected.iter_mut().enumerate() {
            let last = (0..PAGES).map(|page| value(&self.twin, page, chain)).max();
            let last = last.expect("there are pages");
            let of = if self.way == Way::Herd { 0 } else { chain };
            // Far fewer stores than these leave no page out.
            let first = (*known + 1).max(last.saturating_sub(40 * PAGES));
            for number in first..=last {
                let page = page_of(of, number, self.way == Way::InOrder);
                pages[page as usize] = number;
            }
            *known = last.max(*known);
            whole &= (0..PAGES).all(|page| value(&self.twin, page, chain) == pages[page as usize]);
        }
        whole
    }

    /// Waits until something was stored since the last cut.
    fn wait_dirty(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.faults().board().is_dirty() {
            assert!(Instant::now() < deadline, "the writers stand still");
            net::wait_readable(&[self.faults().events().as_fd()], Some(PATIENCE)).expect("poll");
            self.faults().heard();
        }
    }

    /// Makes `cuts` cuts, the first of all among them; how many were torn, void or not
    /// to be made ends it early if `until_torn`.
    fn torn(&mut self, cuts: u64, until_torn: bool) -> u64 {
        self.torn_of(0..cuts, until_torn)
    }

    /// The same for the cuts of these numbers.
    fn torn_of(&mut self, cuts: Range<u64>, until_torn: bool) -> u64 {
        let mut torn = 0;
        for cut in cuts {
            if cut > 0 {
                self.wait_dirty();
            }
            assert!(
                self.make(cut == 0),
                "lost: {:?}",
                self.faults().board().lost()
            );
            assert!(self.capture(), "given up");
            if !self.is_whole() {
                torn += 1;
                // A torn image is no base for the next check.
                if until_torn {
                    return torn;
                }
            }
        }
        torn
    }
}

fn long(short: u64, long: u64) -> u64 {
    let asked = std::env::var_os("UFFD_SYNC_LONG").is_some_and(|v| v == "1");
    if asked { long } else { short }
}

fn no_cut_is_torn(processes: usize, threads: usize, way: Way, slots: u32) {
    let Some(mut stage) = Stage::new(processes, threads, way, slots, Cutter::cut) else {
        return;
    };
    stage.begin();
    let most = if way == Way::Alone && slots >= PAGES as u32 {
        10_000
    } else {
        1_000
    };
    let cuts = long(200, most);
    assert_eq!(stage.torn(cuts, false), 0, "of {cuts} cuts");
    let stats = stage.faults().board().stats();
    // Each cut but the first waited for a store, which had run into its page.
    assert!(
        stats.faults + 1 >= cuts,
        "writers ran into pages: {stats:?}"
    );
    assert_eq!(stats.cuts, cuts);
    // On a busy machine a store may run into a page again and again before it is done.
    let deadline = Instant::now() + PATIENCE;
    let mut made = cuts;
    while stage.expected.iter().all(|chain| chain.0 <= PAGES / 8) {
        assert!(Instant::now() < deadline, "the chains stand still");
        assert_eq!(stage.torn_of(made..made + 1, false), 0, "of cut {made}");
        made += 1;
    }
}

#[test]
fn no_cut_is_torn_with_two_writers() {
    no_cut_is_torn(1, 2, Way::Alone, 512);
}

#[test]
fn no_cut_is_torn_with_eight_writers() {
    no_cut_is_torn(1, 8, Way::Alone, 512);
}

#[test]
fn no_cut_is_torn_over_two_processes() {
    no_cut_is_torn(2, 1, Way::Relay, 512);
}

#[test]
fn no_cut_is_torn_over_eight_processes() {
    no_cut_is_torn(8, 1, Way::Alone, 512);
}

#[test]
fn no_cut_is_torn_with_few_slots() {
    no_cut_is_torn(1, 4, Way::Alone, 3);
}

#[test]
fn a_herd_on_one_page_goes_on() {
    no_cut_is_torn(1, 12, Way::Herd, 64);
}

#[test]
fn writers_in_order_go_through_windows() {
    no_cut_is_torn(1, 2, Way::InOrder, 512);
}

/// Cuts until one is torn.
fn tears(processes: usize, threads: usize, way: Way, make: Make) {
    let Some(mut stage) = Stage::new(processes, threads, way, 512, make) else {
        return;
    };
    stage.begin();
    assert!(
        stage.torn(20_000, true) > 0,
        "none torn: the check sees nothing"
    );
}

#[test]
fn control_faults_answered_while_arming() {
    tears(1, 4, Way::Alone, |cutter, kernel, all| {
        cutter.cut_badly(kernel, all, Badly::AnswersWhileArming)
    });
}

#[test]
fn control_faults_answered_per_attachment() {
    tears(2, 2, Way::Alone, |cutter, kernel, all| {
        cutter.cut_badly(kernel, all, Badly::PerAttachment)
    });
}

#[test]
fn control_hot_pages_left_out_of_the_withheld_pass() {
    tears(1, 4, Way::Alone, |cutter, kernel, all| {
        cutter.cut_badly(kernel, all, Badly::SkipsHotPages)
    });
}

#[test]
fn faults_during_arming_and_from_the_first_moment_are_answered() {
    let Some(mut stage) = Stage::new(1, 4, Way::Alone, 512, Cutter::cut) else {
        return;
    };
    stage.begin();
    for round in 0..long(20, 200) {
        // Everything anew each time, while the writers run.
        assert!(stage.make(true));
        assert!(stage.capture(), "round {round}");
        assert!(stage.is_whole(), "round {round}");
    }
}

#[test]
fn a_cut_that_nobody_captures_is_given_up_and_the_writers_go_on() {
    let Some(mut stage) = Stage::new(1, 4, Way::Alone, 2, Cutter::cut) else {
        return;
    };
    stage.begin();
    assert_eq!(stage.torn(3, false), 0);
    assert!(stage.make(true));
    // The pool is full within moments; the deadline passes; nobody captures.
    let deadline = Instant::now() + PATIENCE;
    while stage.faults().board().stats().voided == 0 {
        assert!(Instant::now() < deadline, "stores wait for ever");
        net::wait_readable(&[stage.faults().events().as_fd()], Some(PATIENCE)).expect("poll");
        stage.faults().heard();
    }
    let before = stage.processes[0].stores();
    while stage.processes[0].stores() < before + 1_000 {
        assert!(Instant::now() < deadline, "the writers stand still");
    }
    assert!(!stage.capture(), "what was given up is no cut");
    assert!(stage.make(false));
    assert!(
        stage.faults().board().made().all,
        "nothing is known any more"
    );
    assert!(stage.capture());
    assert!(stage.is_whole());
    assert_eq!(stage.torn(20, false), 0);
    assert_eq!(stage.faults().board().stats().voided, 1);
}

#[test]
fn the_end_of_the_thread_frees_the_writers() {
    let Some(mut stage) = Stage::new(1, 4, Way::Alone, 2, Cutter::cut) else {
        return;
    };
    stage.begin();
    assert_eq!(stage.torn(3, false), 0);
    // A cut that nobody captures: stores wait, their messages read.
    assert!(stage.make(true));
    let deadline = Instant::now() + PATIENCE;
    while !stage.faults().board().is_starved() {
        assert!(Instant::now() < deadline, "no store waits");
        std::thread::yield_now();
    }
    stage.faults = None;
    let before = stage.processes[0].stores();
    while stage.processes[0].stores() < before + 1_000 {
        assert!(Instant::now() < deadline, "the writers stand still");
    }
}

#[test]
fn a_writer_killed_in_a_fault_ends_tracking_with_a_reason() {
    let Some(mut stage) = Stage::new(1, 4, Way::Alone, 2, Cutter::cut) else {
        return;
    };
    stage.begin();
    assert_eq!(stage.torn(3, false), 0);
    assert!(stage.make(true));
    let deadline = Instant::now() + PATIENCE;
    while !stage.faults().board().is_starved() {
        assert!(Instant::now() < deadline, "no store waits");
        std::thread::yield_now();
    }
    stage.processes[0].kill();
    let captured = stage.capture();
    if captured {
        assert!(stage.is_whole(), "what was cut before its end is a cut");
    }
    assert!(!stage.make(true), "a dead process's memory cannot be armed");
    let lost = stage.faults().board().lost();
    assert_eq!(
        lost,
        Some(Lost::Refused {
            errno: nix::libc::ESRCH
        })
    );
}

#[test]
fn a_thread_that_breaks_says_so_and_frees_the_writers() {
    let breaks: Make = |cutter, kernel, all| {
        assert!(all, "breaks at the second cut, as this test wants it");
        cutter.cut(kernel, all)
    };
    let Some(mut stage) = Stage::new(1, 4, Way::Alone, 8, breaks) else {
        return;
    };
    stage.begin();
    assert_eq!(stage.torn(1, false), 0);
    assert!(!stage.make(false), "no cut is made any more");
    assert_eq!(stage.faults().board().lost(), Some(Lost::Ended));
    let before = stage.processes[0].stores();
    let deadline = Instant::now() + PATIENCE;
    while stage.processes[0].stores() < before + 1_000 {
        assert!(Instant::now() < deadline, "the writers stand still");
    }
}

#[test]
fn whoever_came_may_leave_however_many_come_and_go_during_a_cut() {
    static ENTERED: AtomicBool = AtomicBool::new(false);
    static GO_ON: AtomicBool = AtomicBool::new(false);
    let long_cut: Make = |_, _, _| {
        ENTERED.store(true, Ordering::Release);
        while !GO_ON.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        Err(Lost::Ended)
    };
    if or_skip("userfaultfd", Uffd::open_sync()).is_none() {
        return;
    }
    let region = memfd::create("crowd-test", PAGE_SIZE).expect("memfd");
    let mapping = Mapping::shared(&region, PAGE_SIZE, Access::ReadOnly).expect("map");
    let content = Content {
        memory: SharedMemory::new(mapping),
        fd: region,
    };
    let board = Arc::new(Board::with_slots(PAGE_SIZE, 1).expect("a board"));
    let faults = FaultThread::run_with(&board, content, Vec::new(), true, long_cut);
    let faults = faults.expect("a thread");
    faults.ask(true);
    let deadline = Instant::now() + PATIENCE;
    while !ENTERED.load(Ordering::Acquire) {
        assert!(Instant::now() < deadline, "the cut does not begin");
        std::thread::yield_now();
    }
    let (mut refused, mut members) = (0, Vec::new());
    for round in 0..20 * WRITERS {
        let slot = (round % WRITERS) as u32;
        let uffd = Uffd::open_sync().expect("as before");
        match faults.join(slot, Writing { uffd, base: 0 }, true) {
            Ok(()) => members.push(slot),
            Err(error) => {
                assert!(matches!(error, FaultThreadError::Busy), "{error}");
                refused += 1;
            }
        }
        // Every second one goes at once; at most as many as there may be stay.
        if round % 2 == 0 || members.len() == WRITERS {
            for slot in members.drain(..) {
                faults.leave(slot).expect("it came, and so it may go");
            }
        }
    }
    for slot in members {
        faults.leave(slot).expect("it came, and so it may go");
    }
    assert!(refused > 0, "all came in, and nothing was tried");
    GO_ON.store(true, Ordering::Release);
}
