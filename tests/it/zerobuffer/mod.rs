//! Two-buffer channels between processes: against the published Python package in both
//! directions, and against this crate itself, killed at any moment.

mod deaths;
mod parties;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uffd_sync::zerobuffer::{BufferConfig, Reader, Wait, Writer};

use self::parties::{Own, Party, Process, ROLE, content, hex};

/// Not a test of its own: with the variable set this process is a party.
#[test]
fn zerobuffer_process() {
    if std::env::var_os(ROLE).is_some() {
        parties::serve_orders();
    }
}

/// A name that nobody else has.
fn unique(what: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("uffd-sync-it-{}-{count}-{what}", std::process::id())
}

/// Runs a scenario with each pair of ends: Python reads, Python writes, and this crate
/// on both sides in two processes.
fn between_all(scenario: impl Fn(&str, &mut Party, &mut Party)) {
    scenario(
        "own process writes",
        &mut Party::here(),
        &mut Party::There(Process::own()),
    );
    if let Some(python) = Process::python() {
        let (mut own, mut python) = (Party::here(), Party::There(python));
        scenario("Python writes", &mut own, &mut python);
        own.done(&json!({ "do": "close" }));
        python.done(&json!({ "do": "close" }));
        scenario("Python reads", &mut python, &mut own);
    }
}

fn joined(reader: &mut Party, writer: &mut Party, metadata: u64, payload: u64) -> String {
    let name = unique("scenario");
    reader.done(&json!({ "do": "create", "name": name, "metadata": metadata, "payload": payload }));
    writer.done(&json!({ "do": "attach", "name": name, "timeout": 0.2 }));
    name
}

fn write(number: u64, size: u64) -> Value {
    json!({ "do": "write", "number": number, "size": size })
}

#[track_caller]
fn reads(reader: &mut Party, sequence: u64, number: u64, size: u64) {
    let frame = reader.done(&json!({ "do": "read" }));
    assert_eq!(frame["sequence"], sequence);
    assert_eq!(
        frame["data"],
        hex(&content(number, size)),
        "frame {sequence}"
    );
}

#[test]
fn scenario_1_1_one_frame_and_metadata() {
    between_all(|pair, reader, writer| {
        joined(reader, writer, 1024, 10 * 1024);
        assert_eq!(
            reader.done(&json!({ "do": "metadata" })),
            Value::Null,
            "{pair}"
        );
        let text = "m".repeat(100);
        writer.done(&json!({ "do": "set_metadata", "text": text }));
        writer.done(&write(1, 1024));
        assert_eq!(
            reader.done(&json!({ "do": "metadata" })),
            text.as_str(),
            "{pair}"
        );
        reads(reader, 1, 1, 1024);
        reader.done(&json!({ "do": "release" }));
    });
}

#[test]
fn scenario_1_2_frames_in_order() {
    between_all(|_, reader, writer| {
        joined(reader, writer, 1024, 100 * 1024);
        for n in 1..=10 {
            writer.done(&write(n, 5 * 1024));
        }
        for n in 1..=10 {
            reads(reader, n, n, 5 * 1024);
        }
    });
}

#[test]
fn scenario_1_3_full_and_again_room() {
    between_all(|pair, reader, writer| {
        joined(reader, writer, 512, 10 * 1024);
        writer.done(&write(1, 8 * 1024));
        let refused = writer.refused(&write(2, 5 * 1024));
        assert_eq!(refused, "BufferFullException", "{pair}");
        reads(reader, 1, 1, 8 * 1024);
        let refused = writer.refused(&write(2, 5 * 1024));
        assert_eq!(refused, "BufferFullException", "{pair}: held is not free");
        reader.done(&json!({ "do": "release" }));
        writer.done(&write(2, 5 * 1024));
        reads(reader, 2, 2, 5 * 1024);
    });
}

#[test]
fn scenario_1_4_filled_in_place() {
    between_all(|_, reader, writer| {
        joined(reader, writer, 1024, 100 * 1024);
        writer.done(&json!({ "do": "write", "number": 3, "size": 4096, "in_place": true }));
        reads(reader, 1, 3, 4096);
    });
}

#[test]
fn scenario_1_5_mixed_sizes_and_sizes_that_cannot_be() {
    between_all(|pair, reader, writer| {
        joined(reader, writer, 1024, 100 * 1024);
        for (n, size) in (1..).zip([100, 1024, 10 * 1024, 1]) {
            writer.done(&write(n, size));
        }
        for (n, size) in (1..).zip([100, 1024, 10 * 1024, 1]) {
            reads(reader, n, n, size);
        }
        let large = writer.refused(&write(5, 100 * 1024));
        assert_eq!(large, "FrameTooLargeException", "{pair}");
        assert_eq!(
            writer.refused(&write(5, 0)),
            "InvalidFrameSizeException",
            "{pair}"
        );
        writer.done(&write(5, 50 * 1024));
        reads(reader, 5, 5, 50 * 1024);
    });
}

#[test]
fn scenario_1_6_metadata_is_written_once() {
    between_all(|pair, reader, writer| {
        let name = joined(reader, writer, 128, 10 * 1024);
        let long = "x".repeat(121);
        assert_eq!(
            writer.refused(&json!({ "do": "set_metadata", "text": long })),
            "ZeroBufferException",
            "{pair}"
        );
        writer.done(&json!({ "do": "set_metadata", "text": "version=1.0" }));
        writer.done(&write(1, 10));
        assert_eq!(reader.done(&json!({ "do": "metadata" })), "version=1.0");
        reads(reader, 1, 1, 10);
        assert_eq!(
            writer.refused(&json!({ "do": "set_metadata", "text": "version=2.0" })),
            "MetadataAlreadyWrittenException",
            "{pair}"
        );
        let second = Writer::attach(&name, Wait::Park).expect_err("there is a writer");
        assert!(
            second.to_string().contains("has a writer"),
            "{pair}: {second}"
        );
        let taken = Reader::create(&name, &BufferConfig::default()).expect_err("a reader");
        assert!(taken.to_string().contains("taken"), "{pair}: {taken}");
    });
}

#[test]
fn scenario_1_7_wrapping_with_a_marker_and_at_the_very_end() {
    between_all(|_, reader, writer| {
        joined(reader, writer, 64, 1024);
        // 1024 bytes: a frame that ends with the ring; one that leaves a tail for a
        // marker; and so on, round and round.
        let mut number = 0;
        for sizes in [[492, 500], [400, 300], [300, 500], [492, 500], [100, 480]] {
            for size in sizes {
                number += 1;
                writer.done(&write(number, size));
                reads(reader, number, number, size);
                reader.done(&json!({ "do": "release" }));
            }
        }
    });
}

#[test]
fn frames_that_only_an_empty_ring_takes_reach_python_too() {
    let Some(python) = Process::python() else {
        return;
    };
    let (mut python, mut own) = (Party::There(python), Party::here());
    joined(&mut python, &mut own, 64, 1024);
    for (n, size) in (1..=60).zip([700, 1008, 999, 1, 600, 1000].into_iter().cycle()) {
        own.done(&write(n, size));
        reads(&mut python, n, n, size);
        python.done(&json!({ "do": "release" }));
    }
}

/// `count` frames of random sizes through a ring that they go round thousands of times.
fn many(reader: &mut Party, writer: &mut Party, count: u64) {
    joined(reader, writer, 64, 16 * 1024);
    let what = |order| json!({ "do": order, "count": count, "most": 3000, "seed": 7 });
    match (reader, writer) {
        (Party::Here(_), Party::Here(_)) => unreachable!("two processes"),
        (Party::There(there), here) => {
            there.begin(&what("read_many"));
            here.done(&what("write_many"));
            assert_eq!(there.finish(), json!({ "ok": null }));
        }
        (here, Party::There(there)) => {
            there.begin(&what("write_many"));
            here.done(&what("read_many"));
            assert_eq!(there.finish(), json!({ "ok": null }));
        }
    }
}

#[test]
fn twenty_thousand_frames_of_random_sizes() {
    between_all(|_, reader, writer| many(reader, writer, 20_000));
}

#[test]
fn scenario_13_1_requests_and_responses() {
    let turned = |number, size| -> String {
        let bytes: Vec<u8> = content(number, size)
            .iter()
            .map(|byte| byte ^ 0xFF)
            .collect();
        hex(&bytes)
    };
    let scenario = |server: &mut Party, client: &mut Party| {
        let channel = unique("duplex");
        server.done(
            &json!({ "do": "serve", "channel": channel, "metadata": 4096, "payload": 1 << 20 }),
        );
        // The Python package's server makes its buffer on a thread of its own.
        let deadline = Instant::now() + Duration::from_secs(20);
        while client
            .order(&json!({ "do": "connect", "channel": channel }))
            .get("ok")
            .is_none()
        {
            assert!(Instant::now() < deadline, "no server");
            std::thread::sleep(Duration::from_millis(5));
        }
        for (number, size) in (1..).zip([1, 1024, 102_400]) {
            client.done(&json!({ "do": "send", "number": number, "size": size }));
            let response = client.done(&json!({ "do": "receive" }));
            assert_eq!(response["data"], turned(number, size));
        }
        for number in 0..50 {
            client.done(&json!({ "do": "send", "number": number, "size": 1000 + number }));
        }
        for number in 0..50 {
            let response = client.done(&json!({ "do": "receive" }));
            assert_eq!(response["data"], turned(number, 1000 + number));
        }
        client.done(&json!({ "do": "close" }));
        server.done(&json!({ "do": "close" }));
    };
    scenario(&mut Party::There(Process::own()), &mut Party::here());
    if let Some(python) = Process::python() {
        let (mut own, mut python) = (Party::here(), Party::There(python));
        scenario(&mut python, &mut own);
        scenario(&mut own, &mut python);
    }
}

#[test]
fn a_python_client_that_comes_late_finds_the_server() {
    let Some(python) = Process::python() else {
        return;
    };
    let (mut own, mut python) = (Party::here(), Party::There(python));
    let channel = unique("late");
    own.done(&json!({ "do": "serve", "channel": channel, "metadata": 64, "payload": 65536 }));
    // Longer than the 5 s after which servers of version 1 give up.
    let longer = if crate::nodes::long() { 6 } else { 0 };
    std::thread::sleep(Duration::from_secs(longer));
    for turn in 0..3u64 {
        python.done(&json!({ "do": "connect", "channel": channel }));
        let deadline = Instant::now() + Duration::from_secs(20);
        while python.done(&json!({ "do": "connected" })) != true {
            assert!(
                Instant::now() < deadline,
                "the server does not join client {turn}"
            );
        }
        for number in 0..20 {
            python.done(&json!({ "do": "send", "number": number, "size": 77 }));
            python.done(&json!({ "do": "receive" }));
        }
        python.done(&json!({ "do": "close" }));
    }
}

#[test]
fn the_python_package_writes_the_golden_bytes() {
    let Some(mut python) = Process::python() else {
        return;
    };
    // The same steps as in the test of the golden bytes, Python on both ends.
    let answer = python.order(&json!({ "do": "golden", "name": unique("golden") }));
    let golden = include_str!("../../data/zerobuffer_v1.txt");
    assert_eq!(answer["ok"].as_str(), Some(golden), "{answer}");
}

#[test]
fn nothing_is_left_behind() {
    let name = unique("left");
    let mut own = Own::default();
    own.reader = Some(Reader::create(&name, &BufferConfig::default()).expect("a buffer"));
    own.writer = Some(Writer::attach(&name, Wait::Park).expect("a writer"));
    let found = || -> Vec<String> {
        ["/dev/shm", "/tmp/zerobuffer", "/tmp/zerobuffer/locks"]
            .iter()
            .filter_map(|folder| std::fs::read_dir(folder).ok())
            .flat_map(|entries| entries.flatten())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|file| file.contains(&name))
            .collect()
    };
    assert!(found().len() >= 4, "{:?}", found());
    drop(own);
    assert_eq!(found(), Vec::<String>::new());
}
