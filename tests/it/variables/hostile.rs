//! Peers that do not keep to anything: each ends its own connection, and the others go on.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uffd_sync::client::variables::{Address, ValueKind, Variables, VariablesConfig};
use uffd_sync::ordered::{
    Action, Config, Event, Frame, Hello, Incarnation, Message, Operation, OperationId, OrderKind,
    Process, ProcessId, Start, Subscriptions, Value, ValueType, Variable, VariableId,
};

use super::free;

const PATIENCE: Duration = Duration::from_secs(30);

/// Three members; 0 and 1 share variable 0, 0 and 2 share variable 1; 0 and 1 are real.
fn config(process: u32, addresses: &[SocketAddr]) -> VariablesConfig {
    let name = |text: &str| text.parse().expect("a name");
    let mut config = VariablesConfig::new(process);
    for (id, address) in (0..).zip(addresses) {
        config = config.member(id, Address::Tcp(address.ip().to_string(), address.port()));
    }
    config
        .variable(0, name("x"), ValueKind::I64, [0, 1])
        .variable(1, name("y"), ValueKind::I64, [0, 2])
        .variable(2, name("z"), ValueKind::I64, [1])
}

/// The same as the order knows it, for process 2, which the test plays.
fn player() -> Process {
    let variable = |id, all: &[u32]| Variable {
        id: VariableId(id),
        kind: ValueType::Integer,
        subscribers: all.iter().map(|id| ProcessId(*id)).collect(),
    };
    let all = [
        variable(0, &[0, 1]),
        variable(1, &[0, 2]),
        variable(2, &[1]),
    ];
    let config = Config {
        me: ProcessId(2),
        incarnation: Incarnation(99),
        session: 1,
        subscriptions: Arc::new(Subscriptions::new(all).expect("usable")),
        order: OrderKind::Skeen,
        strict: false,
    };
    Process::new(config, Start::default()).expect("a process")
}

fn hello() -> Hello {
    let mut actions = Vec::new();
    player().step(Event::LinkUp { peer: ProcessId(0) }, &mut actions);
    match actions.first() {
        Some(Action::Send {
            frame: Frame::Hello(hello),
            ..
        }) => *hello,
        other => panic!("{other:?} in place of a hello"),
    }
}

fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connected");
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a TCP socket");
    stream
}

/// Reads to the end of the stream; a reset is one as well.
#[track_caller]
fn read_to_end(mut stream: TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the connection is not closed: {error}"),
    }
    all
}

fn operation(number: u64, variable: u32, time: u64) -> Frame {
    Frame::Message {
        sequence: number,
        message: Message::Request {
            id: OperationId {
                initiator: ProcessId(2),
                incarnation: Incarnation(99),
                number,
            },
            variable: VariableId(variable),
            operation: Operation::Write(Value::Integer(1)),
            time,
        },
    }
}

struct Real {
    address: SocketAddr,
    victim: Variables,
    other: Variables,
}

fn real() -> Real {
    let addresses = [free(), free(), free()];
    let start = |process| Variables::start_silent(config(process, &addresses));
    Real {
        address: addresses[0],
        victim: start(0).expect("started"),
        other: start(1).expect("started"),
    }
}

impl Real {
    /// Whether the link between the two real ones lives: it is looked at, since operations
    /// wait for process 2 as long as that is not there.
    #[track_caller]
    fn is_well(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.victim.status().expect("the loop answers");
            let links = &status.links;
            if links
                .iter()
                .any(|link| link.process == 1 && link.state == "linked")
            {
                assert!(!status.state.contains("unavailable"), "{}", status.state);
                return;
            }
            assert!(Instant::now() < deadline, "{links:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn garbage_and_absurd_lengths_end_their_own_connection() {
    let real = real();
    let mut cut = bytes_of(&Frame::Hello(hello()));
    cut.truncate(40);
    cut.extend([0xAA; 64]);
    let mut long = bytes_of(&Frame::Hello(hello()));
    long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let before_hello = bytes_of(&operation(1, 1, 1));
    let note = [&b"UVRF"[..], &u32::MAX.to_le_bytes()].concat();
    let ping = b"UVPG\0\0\0\0".to_vec();
    let http = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n0123456789012345".to_vec();
    for bytes in [cut, long, before_hello, note, ping, http, vec![0; 4096]] {
        let mut stream = connect(real.address);
        // It may be closed before all was taken.
        let _ = stream.write_all(&bytes);
        let answer = read_to_end(stream);
        assert!(
            answer.is_empty() || answer.starts_with(b"UVRF"),
            "{answer:?}"
        );
        real.is_well();
    }
    drop(real.other);
}

#[test]
fn a_clock_jump_and_foreign_variables_are_refused_with_the_reason() {
    let mut stopped = hello();
    stopped.session = 7;
    let foreign_hello = Frame::Hello(Hello {
        process: ProcessId(1),
        to: ProcessId(2),
        ..hello()
    });
    let stranger = Frame::Hello(Hello {
        process: ProcessId(8),
        ..hello()
    });
    let good = Frame::Hello(hello());
    for (frames, words) in [
        (
            vec![good.clone(), Frame::Ready, operation(1, 1, 1 << 60)],
            "ahead",
        ),
        (
            vec![good.clone(), Frame::Ready, operation(1, 0, 1)],
            "does not subscribe to variable 0",
        ),
        (
            vec![good.clone(), Frame::Ready, operation(1, 9, 1)],
            "variable 9",
        ),
        (
            vec![good.clone(), Frame::Ready, operation(5, 1, 1)],
            "where 1 has to come",
        ),
        (vec![good.clone(), operation(1, 1, 1)], "hello"),
        (vec![good.clone(), good.clone()], "hello"),
        (
            vec![Frame::Hello(stopped)],
            "session is 7 here and 1 there|in session 7",
        ),
        (vec![foreign_hello], "hello from process 1"),
        (vec![stranger], "process 8"),
    ] {
        // Each against processes that never heard of process 2.
        let real = real();
        real.is_well();
        let mut stream = connect(real.address);
        let bytes: Vec<u8> = frames.iter().flat_map(bytes_of).collect();
        stream.write_all(&bytes).expect("taken");
        let answer = read_to_end(stream);
        let text = String::from_utf8_lossy(&answer);
        assert!(
            words.split('|').any(|words| text.contains(words)),
            "{words}: {text}"
        );
        real.is_well();
        drop(real.other);
    }
}

#[test]
fn half_open_connections_keep_nobody_out() {
    let real = real();
    real.is_well();
    let silent: Vec<_> = (0..100).map(|_| connect(real.address)).collect();
    real.is_well();
    // More than there may be are closed at once, the others when their time is over.
    for stream in silent {
        assert!(read_to_end(stream).is_empty());
    }
    let mut stream = connect(real.address);
    stream
        .write_all(&bytes_of(&Frame::Hello(hello())))
        .expect("taken");
    let mut first = [0; 4];
    stream.read_exact(&mut first).expect("a hello in turn");
    assert_eq!(&first, b"UVAR");
    drop(real.other);
}

/// It asks, commits and tells receipts, and takes nothing of what it is told: what waits
/// for it is bounded all the same.
#[test]
fn a_peer_that_tells_receipts_of_what_it_never_took_is_cut_off() {
    const MOST: u64 = 200_000;
    let real = real();
    real.is_well();
    let mut stream = connect(real.address);
    stream
        .set_write_timeout(Some(PATIENCE))
        .expect("a TCP socket");
    let mut bytes = bytes_of(&Frame::Hello(hello()));
    Frame::Ready.encode(&mut bytes);
    let cut_off = (1..=MOST).find(|&number| {
        let id = OperationId {
            initiator: ProcessId(2),
            incarnation: Incarnation(99),
            number,
        };
        let request = Message::Request {
            id,
            variable: VariableId(1),
            operation: Operation::Read,
            time: 4 * number,
        };
        let commit = Message::Commit {
            id,
            time: 4 * number + 3,
            acknowledge: false,
        };
        for (sequence, message) in (2 * number - 1..).zip([request, commit]) {
            Frame::Message { sequence, message }.encode(&mut bytes);
        }
        // A proposal for each, and each 64 of them that so many were delivered.
        let sequence = number + number / 64;
        Frame::Received { sequence }.encode(&mut bytes);
        if number % 500 != 0 {
            return false;
        }
        let sent = stream.write_all(&bytes);
        bytes.clear();
        sent.is_err()
    });
    assert!(cut_off.is_some(), "{MOST} answers wait to be sent");
    let status = real.victim.status().expect("the loop answers");
    let link = status.links.iter().find(|link| link.process == 2);
    let trouble = link.and_then(|link| link.trouble.clone());
    assert_eq!(
        trouble.as_deref(),
        Some("it takes nothing of what is sent"),
        "{status:?}"
    );
    real.is_well();
    drop(real.other);
}

/// What a peer gives as its reason is shown on the operator's terminal.
#[test]
fn a_reason_cannot_write_to_the_terminal() {
    let real = real();
    let note = br#"{"process":2,"reason":"\u001b[2Jall is\nwell","order":"skeen","session":1,"variables":null}"#;
    let mut bytes = b"UVRF".to_vec();
    bytes.extend((note.len() as u32).to_le_bytes());
    bytes.extend(note);
    let mut stream = connect(real.address);
    stream.write_all(&bytes).expect("taken");
    read_to_end(stream);
    let status = real.victim.status().expect("the loop answers");
    let link = status.links.iter().find(|link| link.process == 2);
    let trouble = link.and_then(|link| link.trouble.clone()).expect("told");
    assert_eq!(trouble, " [2Jall is well");
    drop(real.other);
}
