//! One end is killed: the other hears of it in time, and the name is free again.

use std::time::{Duration, Instant};

use serde_json::json;
use uffd_sync::zerobuffer::{
    BufferConfig, ClientOptions, DuplexClient, DuplexServer, Gone, Reader, ServerOptions, Side,
    Wait, Writer, ZeroBufferError,
};

use super::parties::Process;
use super::unique;
use crate::nodes::PATIENCE;

/// 20 ms is the promise; a machine shared with other tests gets more.
const IN_TIME: Duration = Duration::from_secs(2);
const ROUNDS: u64 = 8;

#[track_caller]
fn is_death_of(side: Side, error: &ZeroBufferError) {
    let died = Gone::Died;
    assert!(
        matches!(error, ZeroBufferError::PeerGone { side: of, gone, .. } if *of == side && *gone == died),
        "{error}"
    );
}

#[test]
fn a_killed_writer_is_noticed_and_followed() {
    for round in 0..ROUNDS {
        let name = unique("writer");
        let mut reader = Reader::create(&name, &BufferConfig::new(64, 8192)).expect("a buffer");
        let mut writer = Process::own();
        writer.order(&json!({ "do": "attach", "name": name }));
        writer.order(&json!({ "do": "write_on", "size": 100 + round * 97 }));
        for _ in 0..100 * round {
            reader.read(PATIENCE).expect("a frame");
        }
        writer.kill();
        let killed = Instant::now();
        let error = loop {
            match reader.read(PATIENCE) {
                Ok(frame) => drop(frame),
                Err(error) => break error,
            }
        };
        assert!(killed.elapsed() < IN_TIME, "{:?}", killed.elapsed());
        is_death_of(Side::Writer, &error);
        let again = reader.read(Duration::ZERO).expect_err("nobody writes");
        is_death_of(Side::Writer, &again);
        let mut next = Writer::attach(&name, Wait::Park).expect("free again");
        assert_eq!(next.next_sequence(), reader.next_sequence());
        next.write(b"goes on", PATIENCE).expect("room");
        assert_eq!(reader.read(PATIENCE).expect("a frame").to_vec(), b"goes on");
    }
}

#[test]
fn a_killed_reader_is_noticed_and_followed() {
    for round in 0..ROUNDS {
        let name = unique("reader");
        let mut reader = Process::own();
        reader.order(&json!({ "do": "create", "name": name, "metadata": 64, "payload": 8192 }));
        let mut writer = Writer::attach(&name, Wait::Adaptive).expect("a writer");
        if round % 2 == 0 {
            reader.order(&json!({ "do": "read_on" }));
        }
        for _ in 0..4 {
            writer.write(&[7; 1000], PATIENCE).expect("room");
        }
        let refused = Reader::create(&name, &BufferConfig::default()).expect_err("taken");
        assert!(
            matches!(refused, ZeroBufferError::NameTaken { .. }),
            "{refused}"
        );
        reader.kill();
        let killed = Instant::now();
        let error = loop {
            match writer.write(&[7; 1000], PATIENCE) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(killed.elapsed() < IN_TIME, "{:?}", killed.elapsed());
        is_death_of(Side::Reader, &error);
        let error = Writer::attach(&name, Wait::Park).expect_err("nobody reads");
        assert!(
            matches!(
                error,
                ZeroBufferError::PeerGone { .. } | ZeroBufferError::NoBuffer
            ),
            "{error}"
        );
        let mut next = Reader::create(&name, &BufferConfig::default()).expect("free again");
        let mut writer = Writer::attach(&name, Wait::Park).expect("a writer");
        writer.write(b"anew", PATIENCE).expect("room");
        let frame = next.read(PATIENCE).expect("a frame");
        assert_eq!((frame.sequence(), frame.to_vec()), (1, b"anew".to_vec()));
    }
}

#[test]
fn a_killed_server_is_noticed_and_followed() {
    for round in 0..4u64 {
        let channel = unique("server");
        let mut server = Process::own();
        server
            .order(&json!({ "do": "serve", "channel": channel, "metadata": 64, "payload": 65536 }));
        let options = ClientOptions::default();
        let mut client = DuplexClient::connect(&channel, &options).expect("joined");
        for _ in 0..round * 50 {
            client.call(&[1; 50], PATIENCE).expect("a response");
        }
        server.kill();
        let killed = Instant::now();
        let error = client.call(&[1; 50], PATIENCE).expect_err("nobody serves");
        assert!(matches!(error, ZeroBufferError::PeerGone { .. }), "{error}");
        assert!(killed.elapsed() < IN_TIME, "{:?}", killed.elapsed());
        drop(client);
        let _next = DuplexServer::start(&channel, ServerOptions::default(), |request, reply| {
            Ok(reply.write(&request.to_vec())?)
        })
        .expect("free again");
        let mut client = DuplexClient::connect(&channel, &options).expect("joined");
        assert_eq!(
            client.call(b"x", PATIENCE).expect("a response").to_vec(),
            b"x"
        );
    }
}

#[test]
fn a_killed_client_is_followed_by_another() {
    let channel = unique("client");
    let _server = DuplexServer::start(&channel, ServerOptions::default(), |request, reply| {
        Ok(reply.write(&request.to_vec())?)
    })
    .expect("a server");
    for round in 0..ROUNDS {
        let mut client = Process::own();
        client.order(&json!({ "do": "connect", "channel": channel }));
        client.order(&json!({ "do": "call_on", "size": 50 + round }));
        let taken = DuplexClient::connect(
            &channel,
            &ClientOptions {
                connect_timeout: Duration::from_millis(10),
                ..ClientOptions::default()
            },
        );
        assert!(taken.is_err(), "a second client");
        client.kill();
        let mut next = DuplexClient::connect(&channel, &ClientOptions::default()).expect("joined");
        for n in 0..20u8 {
            let response = next.call(&[n; 9], PATIENCE).expect("a response");
            assert_eq!(response.to_vec(), [n; 9]);
        }
    }
}

#[test]
fn what_a_killed_python_left_is_replaced() {
    let Some(mut python) = Process::python() else {
        return;
    };
    let name = unique("python");
    python.order(&json!({ "do": "create", "name": name, "metadata": 64, "payload": 8192 }));
    let mut writer = Writer::attach(&name, Wait::Park).expect("a writer");
    writer.write(b"x", PATIENCE).expect("room");
    let taken = Reader::create(&name, &BufferConfig::default()).expect_err("taken");
    assert!(
        matches!(taken, ZeroBufferError::NameTaken { .. }),
        "{taken}"
    );
    python.kill();
    let error = loop {
        match writer.write(&[1; 1000], PATIENCE) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    is_death_of(Side::Reader, &error);
    let mut reader = Reader::create(&name, &BufferConfig::new(64, 8192)).expect("free again");
    drop(writer);

    // And the other way: Python replaces what a killed process of this crate left.
    let mut python = Process::python().expect("it was there");
    python.order(&json!({ "do": "attach", "name": name }));
    python.order(&json!({ "do": "write", "number": 5, "size": 40 }));
    assert_eq!(reader.read(PATIENCE).expect("a frame").len(), 40);
    python.kill();
    is_death_of(Side::Writer, &reader.read(PATIENCE).expect_err("it died"));
    drop(reader);
    let mut own = Process::own();
    own.order(&json!({ "do": "create", "name": name, "metadata": 64, "payload": 8192 }));
    own.kill();
    let mut python = Process::python().expect("it was there");
    let made =
        python.order(&json!({ "do": "create", "name": name, "metadata": 64, "payload": 8192 }));
    assert!(made.get("ok").is_some(), "{made}");
    let mut writer = Writer::attach(&name, Wait::Park).expect("a writer");
    writer.write(b"to Python", PATIENCE).expect("room");
    let frame = python.order(&json!({ "do": "read" }));
    assert_eq!(frame["ok"]["data"], super::hex(b"to Python"));
    python.order(&json!({ "do": "close" }));
}
