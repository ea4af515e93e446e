//! Readers against an engine that applies updates in a thread of this process.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::writer_tests::name;
use super::*;
use crate::limits::HOLD_MAX_MS;
use crate::shm::OwnedMemory;
use crate::sys::map::Access;
use crate::sys::memfd;
use crate::units::{MIB, PAGE_SIZE};
use crate::words::{EpochKind, RegionId};

const LONG: Duration = Duration::from_secs(30);

/// The engine's side of a replica.
struct Replica {
    data: OwnedMemory,
    control: Control,
    control_fd: OwnedFd,
    identity: Identity,
}

impl Replica {
    fn new(size: u64, kind: RegionKind) -> Self {
        let identity = Identity {
            name: name(),
            id: RegionId::random(),
            size,
            max_size: size,
            kind,
        };
        let (control, control_fd) = Control::create("reader-test", &identity).unwrap();
        Self {
            data: OwnedMemory::create("reader-test", size).unwrap(),
            control,
            control_fd,
            identity,
        }
    }

    fn reader(&self, hold: HoldPage, pulse: &Pulse) -> RegionReader {
        let data = memfd::reopen_read_only(self.data.fd()).unwrap();
        let control = memfd::reopen_read_only(&self.control_fd).unwrap();
        RegionReader::open(data, control, hold, pulse.clone(), &self.identity).unwrap()
    }

    fn apply(&mut self, epoch: u64, kind: EpochKind) {
        self.control.publish_begin();
        self.data.fill(epoch as u8);
        self.control.set_syncing(false);
        self.control.publish_end(epoch, kind, epoch * 10);
    }
}

fn is_whole(view: &View<'_>) -> (bool, u8) {
    let bytes = view.to_vec();
    (bytes.iter().all(|byte| *byte == bytes[0]), bytes[0])
}

/// Runs `turn` in a thread that holds a pulse, until told to stop.
struct Engine {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    pulse: Pulse,
}

impl Engine {
    fn start(mut turn: impl FnMut() + Send + 'static) -> Self {
        let (send, receive) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (_holder, fd) = Pulse::create().unwrap();
            send.send(fd).unwrap();
            while !stopped.load(Ordering::Acquire) {
                turn();
            }
        });
        let pulse = Pulse::open(receive.recv().unwrap()).unwrap();
        Self {
            stop,
            thread: Some(thread),
            pulse,
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Updates without a pause: epochs are whole nevertheless, since the engine waits
/// for a raised hold. Without waiting, most reads are overrun and none is torn.
#[test]
fn epochs_are_whole_under_a_storm_of_updates() {
    for honours in [true, false] {
        let mut replica = Replica::new(256 * 1024, RegionKind::Replica);
        replica.apply(1, EpochKind::Cut);
        let (hold, fd) = HoldPage::create().unwrap();
        let engine_hold = HoldPage::open(&fd).unwrap();
        let (send, receive) = mpsc::channel();
        let mut replica = Some(replica);
        let mut epoch = 1;
        let (hand, take) = mpsc::channel::<Replica>();
        let mut applied: Option<Replica> = None;
        let engine = Engine::start(move || {
            let Some(replica) = &mut applied else {
                applied = take.recv_timeout(LONG).ok();
                return;
            };
            let begun = Instant::now();
            while honours
                && engine_hold.is_raised()
                && begun.elapsed() < Duration::from_millis(HOLD_MAX_MS)
            {
                std::thread::yield_now();
            }
            epoch += 1;
            replica.apply(epoch, EpochKind::Convergent);
        });
        send.send(replica.as_ref().unwrap().reader(hold, &engine.pulse))
            .unwrap();
        let reader = receive.recv().unwrap();
        hand.send(replica.take().unwrap()).unwrap();
        let (mut whole, mut overrun) = (0, 0);
        for _ in 0..100 {
            match reader.read_at_epoch(|view| is_whole(&view)) {
                Ok(((is_whole, byte), epoch)) => {
                    assert!(is_whole, "a torn epoch was shown");
                    assert_eq!(byte, epoch.number as u8);
                    assert_eq!(epoch.source_time_ns, epoch.number * 10);
                    whole += 1;
                }
                Err(ReadError::Overrun) => overrun += 1,
                Err(other) => panic!("{other}"),
            }
        }
        if honours {
            assert!(whole * 4 > overrun, "{whole} whole, {overrun} overrun");
        }
        let after = reader.control().epoch();
        assert!(reader.wait_epoch(after, LONG).unwrap() > after);
    }
}

#[test]
fn readers_are_told_when_there_is_no_whole_epoch() {
    let engine = Engine::start(std::thread::yield_now);
    let hold = || HoldPage::create().unwrap().0;
    let mut replica = Replica::new(MIB, RegionKind::Replica);
    let reader = replica.reader(hold(), &engine.pulse);
    let read = |reader: &RegionReader| reader.read_at_epoch(|view| is_whole(&view));
    assert!(matches!(read(&reader), Err(ReadError::Syncing)));
    replica.control.publish_begin();
    assert!(matches!(read(&reader), Err(ReadError::Syncing)));
    replica.apply(4, EpochKind::Convergent);
    let ((_, byte), epoch) = read(&reader).unwrap();
    assert_eq!(
        (byte, epoch.number, epoch.kind),
        (4, 4, EpochKind::Convergent)
    );
    let short = Duration::from_millis(5);
    assert!(matches!(
        reader.read_cut(short, |_| ()),
        Err(ReadError::TimedOut)
    ));
    assert!(matches!(
        reader.wait_epoch(4, short),
        Err(ReadError::TimedOut)
    ));
    assert_eq!(reader.wait_epoch(3, short).unwrap(), 4);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| reader.read_cut(LONG, |view| is_whole(&view)));
        replica.apply(5, EpochKind::Cut);
        assert_eq!(waits.join().unwrap().unwrap().1.number, 5);
    });
    let source = Replica::new(MIB, RegionKind::Source);
    let other = source.reader(hold(), &engine.pulse);
    assert!(matches!(read(&other), Err(ReadError::NotReplica)));
    assert!(other.read(MIB - 1, &mut [0; 2]).is_err());

    // The engine dies in the middle of an update.
    replica.control.publish_begin();
    std::thread::scope(|scope| {
        let waits: Vec<_> = (0..3).map(|_| scope.spawn(|| read(&reader))).collect();
        drop(engine);
        for wait in waits {
            assert!(matches!(wait.join().unwrap(), Err(ReadError::SourceGone)));
        }
    });
    assert!(matches!(
        reader.wait_epoch(5, LONG),
        Err(ReadError::SourceGone)
    ));
}

#[test]
fn reading_and_digesting_holes_allocates_nothing() {
    let engine = Engine::start(std::thread::yield_now);
    let size = 64 * MIB + 100;
    let mut replica = Replica::new(size, RegionKind::Replica);
    replica.data[5 * MIB as usize] = 1;
    replica.data[size as usize - 1] = 2;
    replica.control.publish_begin();
    replica.control.set_syncing(false);
    replica.control.publish_end(9, EpochKind::Cut, 0);
    let reader = replica.reader(HoldPage::create().unwrap().0, &engine.pulse);
    let (content, _) = reader.read_at_epoch(|view| view.to_vec()).unwrap();
    let (digest, epoch, stable) = reader.digest().unwrap();
    assert_eq!(digest, *blake3::hash(&content).as_bytes());
    assert_eq!((epoch, stable), (9, true));
    assert_eq!((content[5 * MIB as usize], content.last()), (1, Some(&2)));
    assert_eq!(replica.data.resident_bytes().unwrap(), 2 * PAGE_SIZE);
    // What becomes data later is seen.
    replica.data[9 * MIB as usize] = 3;
    let mut byte = [0];
    reader.read(9 * MIB, &mut byte).unwrap();
    assert_eq!(byte, [3]);
    replica.control.publish_begin();
    assert!(!reader.digest().unwrap().2);
}

#[test]
fn a_reader_is_not_given_another_region() {
    let engine = Engine::start(std::thread::yield_now);
    let replica = Replica::new(MIB, RegionKind::Replica);
    let open = |data: OwnedFd, identity: &Identity| {
        let control = memfd::reopen_read_only(&replica.control_fd).unwrap();
        let hold = HoldPage::create().unwrap().0;
        RegionReader::open(data, control, hold, engine.pulse.clone(), identity)
    };
    let data = || memfd::reopen_read_only(replica.data.fd()).unwrap();
    assert!(open(data(), &replica.identity).is_ok());
    let mut other = replica.identity.clone();
    other.size += 1;
    assert!(matches!(
        open(data(), &other),
        Err(RegionError::Foreign { .. })
    ));
    let unsealed = memfd::create("reader-test", MIB).unwrap();
    assert!(matches!(
        open(unsealed, &replica.identity),
        Err(RegionError::Foreign { .. })
    ));
    let short = OwnedMemory::create("reader-test", PAGE_SIZE).unwrap();
    let short = memfd::reopen_read_only(short.fd()).unwrap();
    assert!(open(short, &replica.identity).is_err());
    assert!(Control::open(&replica.control_fd, Access::ReadOnly).is_ok());
}
