//! The order of scan and copy under many writers, and the edges of scans.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uffd_sync::shm::SharedMemory;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::memfd;
use uffd_sync::sys::pagemap::{Pagemap, Then};
use uffd_sync::sys::uffd::Uffd;
use uffd_sync::units::{MIB, PAGE_SIZE};
use uffd_sync::words::{Mode, Publish};

use super::deeds::{Deed, pages};
use super::nodes::{PATIENCE, long};
use super::pattern::Numbers;
use super::watched::Watched;
use super::writer::More;

const SIZE: u64 = 2 * MIB;
const WRITERS: u64 = 8;

/// Memory that threads store into, and what is known of it.
struct Scene {
    memory: SharedMemory,
    fd: OwnedFd,
    pagemap: Pagemap,
    copy: Vec<u8>,
    _uffd: Uffd,
}

impl Scene {
    fn new() -> Option<Self> {
        let uffd = match Uffd::open_async() {
            Ok(uffd) => uffd,
            Err(error) => {
                super::refused_calls::skip(&error.to_string());
                return None;
            }
        };
        let fd = memfd::create("scene", SIZE).expect("a memfd");
        let mapping = Mapping::shared(&fd, SIZE, Access::ReadWrite).expect("a mapping");
        uffd.register_wp(&mapping).expect("write-protection");
        uffd.protect(mapping.address(), SIZE).expect("armed");
        Some(Self {
            memory: SharedMemory::new(mapping),
            fd,
            pagemap: Pagemap::open_self().expect("the page map"),
            copy: vec![0; SIZE as usize],
            _uffd: uffd,
        })
    }

    /// Pages written since they were armed.
    fn scan(&self, max_ranges: usize, max_pages: u64, then: Then) -> Vec<u64> {
        let base = self.memory.mapping().address();
        let (mut found, mut at) = (Vec::new(), base);
        while at < base + SIZE {
            let mut ranges = Vec::new();
            let end = base + SIZE;
            let stopped = self
                .pagemap
                .scan_written(at, end, &mut ranges, max_ranges, max_pages, then)
                .expect("a scan");
            assert!(stopped > at, "a scan stands still");
            at = stopped;
            let page = |address: u64| (address - base) / PAGE_SIZE;
            found.extend(ranges.iter().flat_map(|it| page(it.start)..page(it.end)));
        }
        found
    }

    fn copy_page(&mut self, page: u64) {
        let at = (page * PAGE_SIZE) as usize;
        let into = &mut self.copy[at..at + PAGE_SIZE as usize];
        self.memory.read(page * PAGE_SIZE, into).expect("inside");
    }

    /// Pages whose copy is not what is there.
    fn stale(&self) -> usize {
        let mut bytes = vec![0; SIZE as usize];
        memfd::read_at(&self.fd, &mut bytes, 0).expect("readable");
        let pages = bytes.chunks(PAGE_SIZE as usize);
        let copied = self.copy.chunks(PAGE_SIZE as usize);
        pages.zip(copied).filter(|(a, b)| a != b).count()
    }
}

fn store_until(memory: &SharedMemory, seed: u64, stop: &AtomicBool) {
    let mut numbers = Numbers::new(seed);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..64 {
            let at = numbers.below(SIZE / 8) * 8;
            let value = numbers.below(u64::MAX).to_le_bytes();
            memory.write(at, &value).expect("inside");
        }
    }
}

/// Writers store while `round` collects again and again for `time`; after the last
/// store comes one more round. The pages that are stale then.
fn collected(time: Duration, mut round: impl FnMut(&mut Scene)) -> Option<usize> {
    let mut scene = Scene::new()?;
    let memory = scene.memory.clone();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..WRITERS {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || store_until(memory, seed, stop));
        }
        let begun = Instant::now();
        let mut rounds = 0;
        while begun.elapsed() < time || rounds < 20 {
            round(&mut scene);
            rounds += 1;
            assert!(begun.elapsed() < PATIENCE, "{rounds} rounds");
        }
        stop.store(true, Ordering::Relaxed);
    });
    round(&mut scene);
    Some(scene.stale())
}

fn time() -> Duration {
    Duration::from_secs(if long() { 20 } else { 1 })
}

#[test]
fn scan_then_copy_loses_no_store_of_many_writers() {
    for (max_ranges, max_pages) in [(512, u64::MAX), (1, u64::MAX), (64, 7)] {
        let stale = collected(time() / 3, |scene| {
            for page in scene.scan(max_ranges, max_pages, Then::Protect) {
                scene.copy_page(page);
            }
        });
        assert!(
            stale.is_none_or(|stale| stale == 0),
            "{stale:?} stale pages with {max_ranges} ranges and {max_pages} pages"
        );
    }
}

#[test]
fn control_copy_then_scan_loses_stores() {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Looked for, copied, and only then armed: what is stored between the copy and
        // the arming is reported to nobody.
        let stale = collected(time() / 2, |scene| {
            for page in scene.scan(512, u64::MAX, Then::Leave) {
                scene.copy_page(page);
            }
            scene.scan(512, u64::MAX, Then::Protect);
        });
        match stale {
            None => return,
            Some(0) => assert!(Instant::now() < deadline, "the wrong order lost nothing"),
            Some(_) => return,
        }
    }
}

#[test]
fn regions_of_odd_sizes_are_followed_to_their_last_byte() {
    for size in [1, PAGE_SIZE - 1, PAGE_SIZE + 1, 5 * PAGE_SIZE + 123] {
        let mut watched = Watched::new(size, Mode::Async, Publish::Timer, More::default());
        watched.store(size - 1, &[0xFE]);
        watched.await_equal();
        watched.store(0, &[0xFD]);
        watched.await_equal();
        watched.expect_no_loss();
    }
}

#[test]
fn alternating_pages_are_followed() {
    let mut watched = Watched::new(MIB, Mode::Async, Publish::Commit, More::default());
    for page in (0..MIB / PAGE_SIZE).step_by(2) {
        watched.store(page * PAGE_SIZE + 9, &[page as u8; 3]);
    }
    watched.writer.commit(0);
    watched.await_equal();
    watched.expect_no_loss();
}

#[test]
fn a_scan_refused_in_the_middle_loses_nothing() {
    let mut watched = Watched::new(MIB, Mode::Async, Publish::Commit, More::default());
    // Marks before, in and behind the part that makes the scan fail.
    watched.deed(Deed::Unregister {
        offset: pages(100),
        len: pages(1),
    });
    for page in [0, 50, 99, 100, 101, 200, 255] {
        watched.store(pages(page) + 11, b"stored before the scan");
    }
    watched.writer.commit(0);
    watched.await_equal();
    let region = watched.region();
    assert_eq!(region.tracking, Some(Mode::Compare), "{region:?}");
    assert!(!region.losses.is_empty() && region.full_compares > 0);
    watched.store(pages(100), b"and after it");
    watched.writer.commit(0);
    watched.await_equal();
}
