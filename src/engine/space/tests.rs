//! A server inside this process, and a client of a few lines.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::*;
use crate::limits;
use crate::space::frame::{
    HELLO_BYTES, Hello, Operation, REPLY_BYTES, Refusal, Reply, ReplyHeader, Request, Status,
    WELCOME_BYTES, Welcome,
};
use crate::space::{Server, SpaceMap};

const K: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

struct Served {
    server: SpaceServer,
    map: SpaceMap,
    _folder: tempfile::TempDir,
}

fn config_in(folder: &tempfile::TempDir, limits: SpaceLimits) -> SpaceServerConfig {
    let server = |name: &str, port| Server {
        name: name.parse().expect("a name"),
        address: format!("127.0.0.1:{port}").parse().expect("an address"),
    };
    let map = SpaceMap::new(K, vec![server("a", 1), server("b", 2)]).expect("a map");
    SpaceServerConfig {
        map,
        position: 1,
        incarnation: Incarnation(5),
        limits,
        doors: vec![
            Place::Tcp("127.0.0.1:0".parse().expect("an address")),
            Place::Unix(folder.path().join("space.sock")),
        ],
        data: None,
        errands: None,
        nbd: None,
        writers: None,
        replica: None,
        log: None,
    }
}

fn serve(limits: SpaceLimits) -> Served {
    let folder = tempfile::tempdir().expect("a folder");
    let config = config_in(&folder, limits);
    let map = config.map.clone();
    let memory = Box::new(vec![0u8; K as usize]);
    Served {
        server: SpaceServer::start(config, memory).expect("started"),
        map,
        _folder: folder,
    }
}

/// 49 bytes ask for a mebibyte to be set: a thousand such requests lie in one buffer.
#[test]
fn a_client_that_only_fills_lets_others_have_their_turn() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = config_in(&folder, bounds(8, 1024));
    let nbd = Nbd::new(&config.map, 1, None, None);
    let memory = Box::new(vec![0u8; K as usize]);
    let mut core = Core::new(&config, Executor::new(None), memory, nbd);
    let mut speaks = speaks::Speaks::Native(native::Native::new(false));
    let mut out = outbox::Outbox::default();
    let hello = Hello {
        versions: (1, 1),
        map: config.map.digest(),
        server: 1,
        flags: 0,
        client: 3,
        incarnation: Incarnation(0),
    };
    let greeted = speaks.take(&hello.encode(), &mut core, &mut out);
    assert_eq!(greeted, Ok(speaks::Taken::Bytes(HELLO_BYTES)));
    let request = |operation, len: u64| Request {
        id: 1,
        epoch: 0,
        operation,
        offset: 0,
        len: len as u32,
    };
    let mut turns = |operation, len, body: &[u8], count| {
        let mut bytes = request(operation, len).encode(body).to_vec();
        bytes.extend(body);
        let taken = (0..count).map(|_| speaks.take(&bytes, &mut core, &mut out));
        taken
            .filter(|taken| *taken == Ok(speaks::Taken::Turn(bytes.len())))
            .count()
    };
    assert_eq!(turns(Operation::Fill, K, b"x", 64), 16);
    assert!(turns(Operation::Stat, 0, b"", 1024) >= 4);
    assert!(
        turns(Operation::Read, 8, b"", 256) <= 1,
        "small ones gather"
    );
}

fn bounds(max_clients: u64, max_in_flight: u64) -> SpaceLimits {
    SpaceLimits {
        writer_lease_ms: 20,
        max_clients,
        max_in_flight,
        deadline_ms: 5000,
    }
}

trait Stream: Read + Write {}
impl<S: Read + Write> Stream for S {}

struct Client(Box<dyn Stream>);

impl Served {
    fn hello(&self) -> Hello {
        Hello {
            versions: (1, 1),
            map: self.map.digest(),
            server: 1,
            flags: 0,
            client: 3,
            incarnation: Incarnation(0),
        }
    }

    fn tcp(&self) -> Client {
        let stream = TcpStream::connect(self.server.address().expect("TCP")).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.set_nodelay(true).expect("no delay");
        Client(Box::new(stream))
    }

    fn unix(&self) -> Client {
        let Place::Unix(path) = &self.server.places()[1] else {
            panic!("the second place is a Unix socket");
        };
        let stream = UnixStream::connect(path).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        Client(Box::new(stream))
    }

    fn greeted(&self, mut client: Client) -> Client {
        let welcome = client.greet(&self.hello());
        assert_eq!(welcome.refusal, Refusal::None);
        assert_eq!((welcome.server, welcome.segment_size), (1, K));
        client
    }
}

impl Client {
    fn greet(&mut self, hello: &Hello) -> Welcome {
        self.0.write_all(&hello.encode()).expect("sent");
        let mut bytes = [0; WELCOME_BYTES];
        self.0.read_exact(&mut bytes).expect("a welcome");
        Welcome::decode(&bytes).expect("a whole welcome")
    }

    fn send(&mut self, operation: Operation, offset: u64, len: u32, body: &[u8]) {
        let request = Request {
            id: offset,
            epoch: 0,
            operation,
            offset,
            len,
        };
        let mut bytes = request.encode(body).to_vec();
        bytes.extend(body);
        self.0.write_all(&bytes).expect("sent");
    }

    fn receive(&mut self) -> (Reply, Vec<u8>) {
        let mut bytes = [0; REPLY_BYTES];
        self.0.read_exact(&mut bytes).expect("a reply");
        let header = ReplyHeader::decode(&bytes).expect("a whole header");
        let mut body = vec![0; header.body_len as usize];
        self.0.read_exact(&mut body).expect("its body");
        header.check_body(&body).expect("the body sent");
        (header.reply, body)
    }

    fn ask(
        &mut self,
        operation: Operation,
        offset: u64,
        len: u32,
        body: &[u8],
    ) -> (Reply, Vec<u8>) {
        self.send(operation, offset, len, body);
        self.receive()
    }

    fn is_ended(&mut self) -> bool {
        let mut byte = [0];
        // A reset is an end too.
        !matches!(self.0.read(&mut byte), Ok(1))
    }
}

#[test]
fn both_sockets_reach_the_same_bytes() {
    let served = serve(bounds(8, 64));
    let (mut a, mut b) = (served.greeted(served.tcp()), served.greeted(served.unix()));
    let (reply, _) = a.ask(Operation::Write, 65_530, 12, b"over an edge");
    assert_eq!((reply.status, reply.id), (Status::Done, 65_530));
    let (_, body) = b.ask(Operation::Read, 65_530, 12, b"");
    assert_eq!(body, b"over an edge");
    let (reply, _) = b.ask(Operation::Read, u64::MAX, 12, b"");
    assert_eq!(reply.status, Status::OutOfRange);
    // Nothing is said of holes without the segment's memory file.
    let (_, body) = b.ask(Operation::Holes, 4096, 8192, b"");
    assert!(crate::space::frame::runs(&body).eq([(8192, false)]));
    let (reply, _) = b.ask(Operation::Holes, K - 1, 2, b"");
    assert_eq!(reply.status, Status::OutOfRange);
    let (_, json) = b.ask(Operation::Stat, 0, 0, b"");
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(
        (&json["server"], &json["clients"]),
        (&"b".into(), &2.into())
    );
    let status = served.server.status();
    assert_eq!((status.refused, status.clients), (1, 2));
    drop(a);
    let until = Instant::now() + PATIENCE;
    while served.server.status().clients != 1 {
        assert!(Instant::now() < until, "a client that left still counts");
    }
    served.server.stop();
    assert!(b.is_ended());
}

#[test]
fn what_is_long_comes_and_goes_whole() {
    let served = serve(bounds(8, 64));
    let mut client = served.greeted(served.tcp());
    let long: Vec<u8> = (0..K).map(|at| (at * 7 / 5) as u8).collect();
    for _ in 0..3 {
        client.send(Operation::Write, 0, K as u32, &long);
        client.send(Operation::Read, 0, K as u32, b"");
        client.send(Operation::Read, 100, 8, b"");
        assert_eq!(client.receive().0.status, Status::Done);
        assert!(client.receive().1 == long);
        assert_eq!(client.receive().1, long[100..108]);
    }
    let (reply, _) = client.ask(Operation::Read, 0, K as u32 + 1, b"");
    assert_eq!(reply.status, Status::TooLong);
}

/// Replies go in parts and turns; what follows in the same bytes received is not left over.
#[test]
fn many_replies_at_once_come_in_order_and_keep_nobody_waiting() {
    let served = serve(bounds(8, 1000));
    let mut greedy = served.greeted(served.unix());
    let mut other = served.greeted(served.tcp());
    let pages = K / 4096;
    for page in 0..pages {
        greedy.send(Operation::Fill, page * 4096, 4096, &[page as u8]);
    }
    for _ in 0..pages {
        assert_eq!(greedy.receive().0.status, Status::Done);
    }
    // Beyond what one turn answers, in few receives.
    let mut asked = Vec::new();
    for page in 0..pages {
        let request = Request {
            id: page,
            epoch: 0,
            operation: Operation::Read,
            offset: page * 4096,
            len: 4096,
        };
        asked.extend(request.encode(b""));
    }
    for _ in 0..3 {
        greedy.0.write_all(&asked).expect("sent");
        assert_eq!(other.ask(Operation::Ping, 0, 0, b"").0.status, Status::Done);
        for page in 0..pages {
            let (reply, body) = greedy.receive();
            assert_eq!(reply.id, page);
            assert!(body == [page as u8; 4096], "page {page}");
        }
    }
}

/// As much as the file allows is sent before the first reply is read, then more.
#[test]
fn many_may_be_under_way_and_too_many_are_told_so() {
    let served = serve(bounds(8, 64));
    let mut client = served.greeted(served.unix());
    let mut refused = 0;
    for at in 0..64 {
        client.send(Operation::FetchAdd, 8 * (at % 2), 8, &1u64.to_le_bytes());
    }
    for at in 0..64 {
        let (reply, _) = client.receive();
        assert_eq!(reply.value, at / 2, "in the order of execution");
    }
    // Nobody reads 256 replies of 1 MiB: what the kernel does not take counts.
    for _ in 0..256 {
        client.send(Operation::Read, 0, K as u32, b"");
    }
    for _ in 0..256 {
        let (reply, body) = client.receive();
        match reply.status {
            Status::Done => assert_eq!(body.len() as u64, K),
            Status::TooMany => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    // The bound on waiting bytes comes first here.
    assert_eq!(refused, 0);
    let few = serve(bounds(8, 1));
    let mut client = few.greeted(few.unix());
    for _ in 0..64 {
        client.send(Operation::Read, 0, K as u32, b"");
    }
    let statuses: Vec<_> = (0..64).map(|_| client.receive().0.status).collect();
    assert!(statuses.contains(&Status::Done) && statuses.contains(&Status::TooMany));
}

#[test]
fn greetings_that_do_not_fit_are_refused() {
    let served = serve(bounds(1, 64));
    let right = served.hello();
    let refusals = [
        (
            Hello {
                versions: (2, 9),
                ..right
            },
            Refusal::Version,
        ),
        (
            Hello {
                map: [1; 16],
                ..right
            },
            Refusal::Map,
        ),
        (Hello { server: 0, ..right }, Refusal::Server),
    ];
    for (hello, refusal) in refusals {
        let mut client = served.tcp();
        let welcome = client.greet(&hello);
        assert_eq!((welcome.refusal, welcome.map), (refusal, right.map));
        assert!(client.is_ended());
    }
    let kept = served.greeted(served.unix());
    let mut second = served.unix();
    // What is sent behind a greeting that is refused does not take the answer with it.
    let mut bytes = right.encode().to_vec();
    bytes.extend([0xEE; 100_000]);
    second.0.write_all(&bytes).expect("sent");
    let mut welcome = [0; WELCOME_BYTES];
    second.0.read_exact(&mut welcome).expect("a welcome");
    let welcome = Welcome::decode(&welcome).expect("whole");
    assert_eq!(welcome.refusal, Refusal::Clients);
    assert_eq!(served.server.status().turned_away, 4);
    drop(kept);
}

#[test]
fn garbage_ends_its_own_connection_alone() {
    let served = serve(bounds(8, 64));
    let mut good = served.greeted(served.tcp());
    let mut silly = served.tcp();
    silly.0.write_all(&[0x55; HELLO_BYTES]).expect("sent");
    assert!(silly.is_ended());
    let request = Request {
        id: 1,
        epoch: 0,
        operation: Operation::Write,
        offset: 0,
        len: 4,
    };
    let sound = [&request.encode(b"evil")[..], b"evil"].concat();
    for bit in 0..sound.len() * 8 {
        let mut client = served.greeted(served.unix());
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        // It may have been ended before the last byte.
        let _ = client.0.write_all(&bytes);
        assert!(client.is_ended(), "bit {bit}");
    }
    let (_, body) = good.ask(Operation::Read, 0, 4, b"");
    assert_eq!(body, [0; 4]);
    let broken = served.server.status().broken;
    assert_eq!(broken, 1 + sound.len() as u64 * 8);
}

#[test]
fn silent_connections_keep_nobody_out() {
    let served = serve(bounds(8, 64));
    let silent: Vec<_> = (0..4 * limits::MAX_HALF_OPEN)
        .map(|_| served.unix())
        .collect();
    let mut client = served.greeted(served.unix());
    assert_eq!(
        client.ask(Operation::Ping, 0, 0, b"").0.status,
        Status::Done
    );
    drop(silent);
}

#[test]
fn a_client_that_does_not_read_is_no_burden_to_others() {
    let served = serve(bounds(8, 1024));
    let mut deaf = served.greeted(served.tcp());
    let mut good = served.greeted(served.tcp());
    for _ in 0..200 {
        deaf.send(Operation::Read, 0, K as u32, b"");
    }
    for at in 0..1000 {
        let (reply, _) = good.ask(Operation::FetchAdd, 0, 8, &1u64.to_le_bytes());
        assert_eq!(reply.value, at);
    }
    for _ in 0..200 {
        assert_eq!(deaf.receive().1.len() as u64, K);
    }
}
