//! Whole buffers and channels in one process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::layout::*;
use super::segment::Segment;
use super::*;
use crate::sys::map::{Access, Mapping};
use crate::sys::process::process_id;
use crate::sys::{memfd, posix_shm};

const SOON: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(30);

/// A name that nobody else has.
fn unique(what: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("uffd-sync-test-{}-{count}-{what}", process_id())
}

fn pair(payload: u64, wait: Wait) -> (String, Reader, Writer) {
    let name = unique("pair");
    let config = BufferConfig {
        wait,
        ..BufferConfig::new(256, payload)
    };
    let reader = Reader::create(&name, &config).expect("a buffer");
    let writer = Writer::attach(&name, wait).expect("a writer");
    (name, reader, writer)
}

fn raw(name: &str) -> Segment {
    Segment::open(&BufferName::new(name).expect("a name")).expect("the buffer")
}

/// The bytes of the shared memory.
fn bytes_of(name: &str) -> Vec<u8> {
    let fd = posix_shm::open(name).expect("the shared memory");
    let mut bytes = vec![0; memfd::size(&fd).expect("its size") as usize];
    memfd::read_at(&fd, &mut bytes, 0).expect("read");
    bytes
}

fn hex(bytes: &[u8]) -> String {
    let lines = bytes.chunks(16).enumerate().filter_map(|(at, line)| {
        let text: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let zero = line.iter().all(|byte| *byte == 0);
        (!zero).then(|| format!("{:04x}: {}\n", at * 16, text.join(" ")))
    });
    lines.collect()
}

#[test]
fn the_bytes_are_those_of_version_1() {
    let name = unique("golden");
    let mut reader = Reader::create(&name, &BufferConfig::new(100, 190)).expect("a buffer");
    let own = u64::from(process_id().cast_unsigned());
    let settle = |mut bytes: Vec<u8>| {
        for at in [WRITER_PID, READER_PID] {
            let pid = &mut bytes[at as usize..][..8];
            if pid == own.to_le_bytes() {
                pid.copy_from_slice(&0x1111_2222_u64.to_le_bytes());
            }
        }
        hex(&bytes)
    };
    let mut seen = format!("# made\n{}", settle(bytes_of(&name)));
    let mut writer = Writer::attach(&name, Wait::Park).expect("a writer");
    writer.set_metadata(b"width=640").expect("metadata");
    writer.write(b"first frame", SOON).expect("room");
    writer.write(&[0xA5; 100], SOON).expect("room");
    seen += &format!("# written\n{}", settle(bytes_of(&name)));
    drop(reader.read(SOON).expect("a frame"));
    let second = reader.read(SOON).expect("a frame");
    seen += &format!("# read\n{}", settle(bytes_of(&name)));
    drop(second);
    writer.write(&[0x5A; 60], SOON).expect("room");
    seen += &format!("# wrapped\n{}", settle(bytes_of(&name)));
    let golden = include_str!("../../tests/data/zerobuffer_v1.txt");
    assert_eq!(seen, golden, "\n{seen}");
    for semaphore in [format!("sem.sem-w-{name}"), format!("sem.sem-r-{name}")] {
        let expected = format!(
            "0000: {:02x} 00 00 00 00 00 00 00 80",
            if semaphore.contains("-w-") { 1 } else { 2 }
        );
        let shown = hex(&bytes_of(&semaphore));
        assert!(shown.starts_with(&expected), "{semaphore}: {shown}");
    }
}

#[test]
fn frames_and_metadata_arrive() {
    for wait in [Wait::Park, Wait::Spin, Wait::Adaptive] {
        let (_, mut reader, mut writer) = pair(4096, wait);
        assert_eq!(reader.metadata().expect("whole"), None);
        writer.set_metadata(b"about the frames").expect("metadata");
        let metadata = reader.metadata().expect("whole");
        assert_eq!(metadata.as_deref(), Some(&b"about the frames"[..]));
        assert!(matches!(
            writer.set_metadata(b"again"),
            Err(ZeroBufferError::MetadataTwice)
        ));
        assert_eq!(writer.write(b"one", SOON).expect("room"), 1);
        let mut second = writer.reserve(5, SOON).expect("room");
        second.write(1, b"ive").expect("inside");
        second.write(0, b"f").expect("inside");
        second.write(4, b"!").expect("inside");
        assert!(second.write(4, b"!!").is_err());
        assert_eq!(second.commit().expect("commit"), 2);
        let _ = writer.reserve(100, SOON).expect("room");
        let frame = reader.read(SOON).expect("a frame");
        assert_eq!((frame.sequence(), frame.to_vec()), (1, b"one".to_vec()));
        let frame = reader.read(SOON).expect("a frame");
        assert_eq!((frame.sequence(), frame.to_vec()), (2, b"five!".to_vec()));
        assert!(frame.read(4, &mut [0; 2]).is_err());
        assert!(reader.try_read().expect("alive").is_none());
        let begun = Instant::now();
        assert!(matches!(reader.read(SHORT), Err(ZeroBufferError::TimedOut)));
        assert!(begun.elapsed() >= SHORT);
    }
}

/// No clock shows the sum of now and the longest time there is.
#[test]
fn waits_without_an_end_are_waits() {
    let (_, mut reader, mut writer) = pair(4096, Wait::Adaptive);
    writer.write(b"one", Duration::MAX).expect("room");
    assert_eq!(
        reader.read(Duration::MAX).expect("a frame").to_vec(),
        b"one"
    );
    assert!(reader.wait_writer(Duration::MAX).expect("it is there"));
    let held = writer
        .write(&[7; 4000], Duration::MAX)
        .and_then(|_| reader.read(Duration::MAX));
    let held = held.expect("a frame");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| writer.write(&[8; 4000], Duration::MAX));
        drop(held);
        let number = waiting.join().expect("the writer").expect("room comes");
        assert_eq!(number, 3);
    });
}

#[test]
fn sizes_that_cannot_be_are_refused_at_once() {
    let (_, _reader, mut writer) = pair(640, Wait::Park);
    assert!(matches!(
        writer.write(&[0; 625], SOON),
        Err(ZeroBufferError::TooLarge { len: 625, max: 624 })
    ));
    assert!(matches!(
        writer.reserve(u64::MAX, SOON),
        Err(ZeroBufferError::TooLarge { .. })
    ));
    assert!(matches!(
        writer.write(b"", SOON),
        Err(ZeroBufferError::EmptyFrame)
    ));
    assert!(matches!(
        writer.set_metadata(&[0; 249]),
        Err(ZeroBufferError::MetadataTooLong { len: 249, max: 248 })
    ));
    writer.set_metadata(&[0; 248]).expect("just fits");
    writer.write(&[0; 624], SOON).expect("just fits");
    assert!(matches!(
        writer.write(b"x", SHORT),
        Err(ZeroBufferError::Full { len: 1, free: 0 })
    ));
    for (name, config) in [
        ("a/b", BufferConfig::default()),
        ("a", BufferConfig::new(0, 1)),
        ("a", BufferConfig::new(1, u64::MAX)),
    ] {
        assert!(Reader::create(name, &config).is_err());
    }
    let huge = BufferConfig::new(1, 4000 << 30);
    let error = Reader::create(&unique("huge"), &huge).expect_err("no such memory");
    assert!(matches!(error, ZeroBufferError::Sys { .. }), "{error}");
}

#[test]
fn frames_larger_than_half_the_ring_get_through_again_and_again() {
    let (_, mut reader, mut writer) = pair(1024, Wait::Adaptive);
    let writing = std::thread::spawn(move || {
        for turn in 0..500u64 {
            let frame = vec![turn as u8; [700, 1008, 999, 30, 513][turn as usize % 5]];
            writer.write(&frame, SOON).expect("room");
        }
    });
    for turn in 0..500u64 {
        let frame = reader.read(SOON).expect("a frame");
        let len = [700, 1008, 999, 30, 513][turn as usize % 5];
        assert_eq!(frame.to_vec(), vec![turn as u8; len]);
    }
    writing.join().expect("the writer");
}

#[test]
fn held_frames_are_not_overwritten() {
    let (_, mut reader, mut writer) = pair(1024, Wait::Park);
    let mut held = Vec::new();
    for n in 0..4u8 {
        writer.write(&[n; 200], SOON).expect("room");
        held.push(reader.read(SOON).expect("a frame"));
    }
    let first = held.remove(0);
    held.clear();
    assert!(
        writer
            .write(&[9; 200], SHORT)
            .is_err_and(|e| e.is_timeout())
    );
    assert_eq!(first.to_vec(), [0; 200]);
    first.release();
    writer.write(&[9; 200], Duration::ZERO).expect("room");
    assert_eq!(reader.read(SOON).expect("a frame").to_vec(), [9; 200]);
}

#[test]
fn a_name_has_one_reader_and_one_writer() {
    let (name, reader, writer) = pair(1024, Wait::Park);
    let own = u64::from(process_id().cast_unsigned());
    let error = Reader::create(&name, &BufferConfig::default()).expect_err("taken");
    assert!(
        matches!(error, ZeroBufferError::NameTaken { pid } if pid == own),
        "{error}"
    );
    let error = Writer::attach(&name, Wait::Park).expect_err("taken");
    assert!(
        matches!(error, ZeroBufferError::WriterTaken { pid } if pid == own),
        "{error}"
    );
    let error = Writer::attach_within(&name, Wait::Park, SHORT).expect_err("taken");
    assert!(
        matches!(error, ZeroBufferError::WriterTaken { .. }),
        "{error}"
    );
    drop(writer);
    let mut writer = Writer::attach(&name, Wait::Park).expect("free again");
    drop(reader);
    let error = writer.write(b"x", SOON).expect_err("nobody reads");
    assert!(
        matches!(
            error,
            ZeroBufferError::PeerGone {
                side: Side::Reader,
                gone: Gone::Left,
                ..
            }
        ),
        "{error}"
    );
    for object in [
        name.clone(),
        format!("sem.sem-w-{name}"),
        format!("sem.sem-r-{name}"),
    ] {
        assert!(posix_shm::open(&object).is_err(), "{object} is left");
    }
    assert!(
        !std::path::Path::new("/tmp/zerobuffer")
            .join(format!("{name}.lock"))
            .exists()
    );
    assert!(matches!(
        Writer::attach(&name, Wait::Park),
        Err(ZeroBufferError::NoBuffer)
    ));
    Reader::create(&name, &BufferConfig::default()).expect("free again");
}

#[test]
fn writers_follow_each_other_with_rising_numbers() {
    let (name, mut reader, mut writer) = pair(1024, Wait::Park);
    let mut expected = 0u64;
    for turn in 1..40u64 {
        for _ in 0..turn % 4 {
            let sent = writer.write(&vec![7; 1 + (turn * 53 % 300) as usize], SOON);
            let sent = sent.expect("room");
            expected += 1;
            assert_eq!(sent, expected);
            if turn % 3 != 0 {
                assert_eq!(reader.read(SOON).expect("a frame").sequence(), expected);
            } else {
                drop(reader.read(SOON).expect("a frame"));
            }
        }
        drop(writer);
        let error = reader.read(SOON).expect_err("the writer left");
        assert!(
            matches!(
                error,
                ZeroBufferError::PeerGone {
                    gone: Gone::Left,
                    ..
                }
            ),
            "{error}"
        );
        writer = Writer::attach(&name, Wait::Park).expect("a writer");
        assert!(reader.wait_writer(SOON).expect("whole"));
        assert_eq!(writer.next_sequence(), expected + 1);
    }
}

#[test]
fn what_a_writer_wrote_before_it_left_is_read() {
    let (_, mut reader, mut writer) = pair(1024, Wait::Adaptive);
    for n in 0..3u8 {
        writer.write(&[n], SOON).expect("room");
    }
    drop(writer);
    for n in 0..3u8 {
        assert_eq!(reader.read(SOON).expect("a frame").to_vec(), [n]);
    }
    assert!(matches!(
        reader.read(SOON),
        Err(ZeroBufferError::PeerGone { .. })
    ));
}

#[test]
fn lost_posts_and_posts_too_many_do_no_harm() {
    let (name, mut reader, mut writer) = pair(1024, Wait::Park);
    let semaphore = crate::shm::Semaphore::open(&format!("sem-w-{name}"));
    let semaphore = semaphore.expect("the semaphore");
    semaphore.post_many(1000).expect("post");
    assert!(matches!(reader.read(SHORT), Err(ZeroBufferError::TimedOut)));
    writer.write(b"a", SOON).expect("room");
    assert!(semaphore.try_acquire(), "its post is stolen");
    assert_eq!(reader.read(SOON).expect("a frame").to_vec(), b"a");
    semaphore.post_many(1000).expect("post");
    for n in 0..10u8 {
        writer.write(&[n], SOON).expect("room");
        assert_eq!(reader.read(SOON).expect("a frame").to_vec(), [n]);
    }
}

#[test]
fn a_reader_is_stopped_while_it_waits() {
    let (_, mut reader, _writer) = pair(1024, Wait::Park);
    let stopper = reader.stopper();
    let waiting = std::thread::spawn(move || {
        let begun = Instant::now();
        let error = reader.read(SOON).expect_err("stopped");
        assert!(matches!(error, ZeroBufferError::Stopped), "{error}");
        assert!(matches!(
            reader.wait_writer(SOON),
            Ok(true) | Err(ZeroBufferError::Stopped)
        ));
        begun.elapsed()
    });
    stopper.stop();
    assert!(stopper.is_stopped());
    assert!(waiting.join().expect("the reader") < SOON);
}

#[test]
fn what_is_no_buffer_is_told_from_one() {
    let name = unique("foreign");
    let fd = posix_shm::unnamed(0o600).expect("an object");
    posix_shm::resize(&fd, 4096, false).expect("space");
    posix_shm::link(&fd, &name).expect("a name");
    let attach = || Writer::attach(&name, Wait::Park);
    assert!(
        matches!(attach(), Err(ZeroBufferError::NoBuffer)),
        "not filled yet"
    );
    memfd::write_at(&fd, b"something else entirely", 0).expect("write");
    assert!(matches!(attach(), Err(ZeroBufferError::Foreign { .. })));
    let error = Reader::create(&name, &BufferConfig::default()).expect_err("not ours");
    assert!(matches!(error, ZeroBufferError::Foreign { .. }), "{error}");
    posix_shm::resize(&fd, 100, false).expect("space");
    assert!(matches!(attach(), Err(ZeroBufferError::Foreign { .. })));
    posix_shm::unlink(&name).expect("unlink");
}

#[test]
fn a_dead_owners_things_are_replaced() {
    // What a killed reader leaves: shared memory that names a process that is gone
    // (or lives, but is another one now), semaphores, lock files nobody holds.
    for pid in [
        0,
        0x3FFF_FFFF,
        u64::from(nix::unistd::getppid().as_raw().cast_unsigned()),
    ] {
        let name = unique("stale");
        let reader = Reader::create(&name, &BufferConfig::default()).expect("a buffer");
        raw(&name).set_word(READER_PID, pid);
        let lock = std::path::Path::new("/tmp/zerobuffer").join(format!("{name}.lock"));
        std::fs::remove_file(&lock).expect("its lock file");
        let other = std::env::temp_dir().join(format!("zerobuffer/locks/{name}.lock"));
        std::fs::remove_file(&other).expect("its lock file");
        let next = Reader::create(&name, &BufferConfig::default()).expect("in its place");
        drop(reader);
        assert!(
            lock.exists(),
            "the dead one removes nothing of the living one's"
        );
        let mut writer = Writer::attach(&name, Wait::Park).expect("the living one's");
        writer.write(b"x", SOON).expect("room");
        drop(next);
    }
}

#[test]
fn a_living_readers_name_is_not_taken_although_its_lock_file_is_gone() {
    let name = unique("unlocked");
    let _reader = Reader::create(&name, &BufferConfig::default()).expect("a buffer");
    std::fs::remove_file(format!("/tmp/zerobuffer/{name}.lock")).expect("its lock file");
    let other = std::env::temp_dir().join(format!("zerobuffer/locks/{name}.lock"));
    std::fs::remove_file(other).expect("its lock file");
    let error = Reader::create(&name, &BufferConfig::default()).expect_err("taken");
    assert!(
        matches!(error, ZeroBufferError::NameTaken { .. }),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A hostile peer stores anything anywhere: every operation ends in time, none
    /// panics, none reads beyond the ring.
    #[test]
    fn hostile_words_give_errors(
        writes in prop::collection::vec(
            (0..1024u64 / 8, prop_oneof![0..2000u64, any::<u64>()]), 1..12,
        ),
        frames in 0..6usize,
    ) {
        let (name, mut reader, mut writer) = pair(640, Wait::Park);
        for _ in 0..frames {
            let _ = writer.write(&[1; 90], Duration::ZERO);
        }
        let fd = posix_shm::open(&name).expect("the buffer");
        let hostile = Mapping::shared(&fd, 1024, Access::ReadWrite).expect("map");
        let hostile = crate::shm::SharedMemory::new(hostile);
        let mut held = Vec::new();
        for (at, value) in writes {
            hostile.atomic_u64(at * 8).store(value, Ordering::Relaxed);
            let _ = writer.write(&[2; 50], Duration::ZERO);
            if let Ok(Some(frame)) = reader.try_read() {
                prop_assert!(frame.to_vec().len() <= 640);
                held.push(frame);
            }
            let _ = reader.metadata();
            let _ = Writer::attach(&name, Wait::Park);
            if held.len() > 2 {
                held.remove(0);
            }
        }
    }
}

fn echo(channel: &str) -> DuplexServer {
    DuplexServer::start(channel, ServerOptions::default(), |request, reply| {
        let bytes = request.to_vec();
        match bytes.first() {
            Some(b'!') => Err(HandlerError::new("it begins with !")),
            Some(b'?') => Ok(()),
            Some(b'*') => panic!("it begins with *"),
            Some(0xF5) => Ok(reply.write(b"\xF5\xFF\xC1uffd-refused and so on")?),
            Some(b'+') => Ok(reply.write(&vec![1; 64 << 20])?),
            _ => {
                reply.reserve(bytes.len() as u64)?;
                Ok(reply.write_at(0, &bytes)?)
            }
        }
    })
    .expect("a server")
}

#[test]
fn requests_are_answered_in_order_and_failures_too() {
    let channel = unique("duplex");
    let server = echo(&channel);
    let mut client = DuplexClient::connect(&channel, &ClientOptions::default()).expect("joined");
    assert_eq!(
        client.call(b"hello", SOON).expect("a response").to_vec(),
        b"hello"
    );
    let requests: [&[u8]; 8] = [b"a", b"!", b"b", b"?", b"*", b"\xF5", b"+", b"c"];
    let first = client.send(requests[0], SOON).expect("room");
    for request in &requests[1..] {
        client.send(request, SOON).expect("room");
    }
    assert_eq!(client.unanswered(), 8);
    for (n, request) in requests.iter().enumerate() {
        let expected = first + n as u64;
        match client.receive(SOON) {
            Ok(response) => {
                assert_eq!(response.to_vec(), *request);
                assert_eq!(response.sequence(), expected);
                assert!(matches!(request[0], b'a' | b'b' | b'c'));
            }
            Err(ZeroBufferError::Refused {
                sequence,
                refusal,
                detail,
            }) => {
                assert_eq!(sequence, expected);
                let kind = match request[0] {
                    b'*' => Refusal::Panicked,
                    b'?' => Refusal::Empty,
                    _ => Refusal::Failed,
                };
                assert_eq!(refusal, kind, "{detail}");
                assert!(request[0] != b'!' || &*detail == "it begins with !");
                assert!(
                    request[0] != b'+' || detail.contains("67108864"),
                    "{detail}"
                );
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(matches!(
        client.receive_for(first, SOON),
        Err(ZeroBufferError::NoSuchRequest { .. })
    ));
    let mut pending = client.acquire(3, SOON).expect("room");
    pending.write(0, b"xyz").expect("inside");
    let sequence = pending.send().expect("sent");
    let response = client.receive_for(sequence, SOON).expect("a response");
    assert_eq!(response.to_vec(), b"xyz");
    assert!(client.is_server_connected().expect("whole"));
    assert!(server.is_running());
    assert!(server.stop(SOON));
    assert!(matches!(
        client.call(b"anyone?", SOON),
        Err(ZeroBufferError::PeerGone { .. })
    ));
}

#[test]
fn clients_come_and_go() {
    let channel = unique("clients");
    let seen = Arc::new(AtomicU64::new(0));
    let told = Arc::clone(&seen);
    let options = ServerOptions::default().on_init(move |metadata| {
        told.fetch_add(metadata.len() as u64, Ordering::Relaxed);
    });
    let _server = DuplexServer::start(&channel, options, |request, reply| {
        Ok(reply.write(&request.to_vec())?)
    })
    .expect("a server");
    for turn in 0..5u8 {
        let options = ClientOptions::default();
        let mut client = DuplexClient::connect(&channel, &options).expect("joined");
        if turn == 0 {
            client.set_metadata(b"12345").expect("metadata");
        }
        let second = DuplexClient::connect(
            &channel,
            &ClientOptions {
                connect_timeout: SHORT,
                ..options
            },
        );
        assert!(matches!(second, Err(ZeroBufferError::WriterTaken { .. })));
        for n in 0..20u8 {
            let response = client.call(&[turn, n], SOON).expect("a response");
            assert_eq!(response.to_vec(), [turn, n]);
        }
        // It goes with requests on their way: the next one gets none of the answers.
        for _ in 0..3 {
            client.send(b"never received", SOON).expect("room");
        }
    }
    assert_eq!(seen.load(Ordering::Relaxed), 5);
}

#[test]
fn a_late_response_does_not_answer_the_next_request() {
    let channel = unique("late");
    let _server = DuplexServer::start(&channel, ServerOptions::default(), |request, reply| {
        let bytes = request.to_vec();
        if bytes == b"slow" {
            std::thread::sleep(Duration::from_millis(60));
        }
        Ok(reply.write(&bytes)?)
    })
    .expect("a server");
    let mut client = DuplexClient::connect(&channel, &ClientOptions::default()).expect("joined");
    let error = client.call(b"slow", SHORT).expect_err("too slow");
    assert!(error.is_timeout(), "{error}");
    assert_eq!(
        client.call(b"fast", SOON).expect("a response").to_vec(),
        b"fast"
    );
    assert_eq!(client.unanswered(), 0);
}
