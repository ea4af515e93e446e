//! A server of a space made of its frames, a listener and a vector: honest, or with one of
//! the tricks that a test asks for.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::space::SpaceConfig;
use crate::space::frame::{
    EXCHANGED, HELLO_BYTES, Hello, Incarnation, ItemResult, Operation, REQUEST_BYTES, Refusal,
    Reply, Request, RequestHeader, Status, Welcome, append_run, items,
};

/// What a server does with a request instead of what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trick {
    None,
    /// Replies to another number.
    WrongId,
    /// Replies twice.
    Twice,
    /// Replies to another kind of request.
    WrongOperation,
    /// One byte more than was asked for.
    LongBody,
    /// One byte less.
    ShortBody,
    /// One bit of the reply is not the one that was sent.
    Flip(usize),
    /// The connection ends, nothing was carried out.
    CutBefore,
    /// It was carried out, and the connection ends before the reply.
    CutAfter,
    /// The connection ends in the middle of the reply.
    CutWithin,
    /// No reply, ever.
    Silent,
    /// The reply comes byte by byte.
    Dribble,
    /// Nothing carried out; this status.
    Says(Status),
    /// The same, behind the next reply.
    SaysLater(Status),
    /// This and the next reply change places.
    Later,
}

type Tricks = Box<dyn Fn(u64, &Request) -> Trick + Send + Sync>;

struct Shared {
    memory: Mutex<Vec<u8>>,
    welcome: Mutex<Welcome>,
    tricks: Mutex<Tricks>,
    requests: AtomicU64,
    carried_out: AtomicU64,
    greeted: AtomicU64,
    connections: Mutex<Vec<TcpStream>>,
    ends: AtomicBool,
}

/// Ended when dropped.
pub(super) struct Server {
    shared: Arc<Shared>,
    port: u16,
    thread: Option<JoinHandle<()>>,
}

/// `count` servers of `segment` bytes each, and the file that describes them.
pub(super) fn space_of(count: usize, segment: u64) -> (Vec<Server>, SpaceConfig) {
    let listeners: Vec<_> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").expect("a port"))
        .collect();
    let mut text = format!("segment_size = {segment}\nservers = [\n");
    for (at, listener) in listeners.iter().enumerate() {
        let address = listener.local_addr().expect("its address");
        text += &format!("{{ name = \"s{at}\", address = \"{address}\" }},\n");
    }
    text += "]\n";
    let config = SpaceConfig::parse(&text, Path::new("mcomp.cfg")).expect("a space");
    let digest = config.map.digest();
    let servers = listeners.into_iter().enumerate().map(|(at, listener)| {
        let welcome = Welcome {
            version: 1,
            refusal: Refusal::None,
            map: digest,
            server: at as u32,
            flags: 0,
            incarnation: Incarnation(1),
            segment_size: segment,
            epoch: 0,
            max_in_flight: 64,
        };
        Server::start(listener, segment, welcome)
    });
    (servers.collect(), config)
}

impl Server {
    fn start(listener: TcpListener, segment: u64, welcome: Welcome) -> Self {
        let port = listener.local_addr().expect("its address").port();
        let shared = Arc::new(Shared {
            memory: Mutex::new(vec![0; segment as usize]),
            welcome: Mutex::new(welcome),
            tricks: Mutex::new(Box::new(|_, _| Trick::None)),
            requests: AtomicU64::new(0),
            carried_out: AtomicU64::new(0),
            greeted: AtomicU64::new(0),
            connections: Mutex::new(Vec::new()),
            ends: AtomicBool::new(false),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        });
        Self {
            shared,
            port,
            thread: Some(thread),
        }
    }

    /// What it does with the n-th request from now on, from 0.
    pub(super) fn plays(&self, tricks: impl Fn(u64, &Request) -> Trick + Send + Sync + 'static) {
        self.shared.requests.store(0, Ordering::Relaxed);
        *self.shared.tricks.lock().expect("whole") = Box::new(tricks);
    }

    /// Ends all connections.
    pub(super) fn cut(&self) {
        for connection in self.shared.connections.lock().expect("whole").drain(..) {
            // It may have ended by itself.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Another life: memory of zeros, connections ended.
    pub(super) fn restart(&self, incarnation: u128) {
        self.shared.memory.lock().expect("whole").fill(0);
        self.greets(|welcome| welcome.incarnation = Incarnation(incarnation));
        self.cut();
    }

    pub(super) fn greets(&self, change: impl FnOnce(&mut Welcome)) {
        change(&mut self.shared.welcome.lock().expect("whole"));
    }

    pub(super) fn memory(&self) -> Vec<u8> {
        self.shared.memory.lock().expect("whole").clone()
    }

    /// Requests that changed or read something.
    pub(super) fn carried_out(&self) -> u64 {
        self.shared.carried_out.load(Ordering::Relaxed)
    }
}

impl Server {
    /// Connections that came as far as a greeting.
    pub(super) fn greeted(&self) -> u64 {
        self.shared.greeted.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        self.cut();
        // Wakes the listener.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "a server panicked"
            );
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut threads = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        if shared.ends.load(Ordering::Relaxed) {
            break;
        }
        stream.set_nodelay(true).expect("TCP");
        let twin = stream.try_clone().expect("a descriptor");
        shared.connections.lock().expect("whole").push(twin);
        let shared = Arc::clone(shared);
        threads.push(std::thread::spawn(move || {
            // However it ends, the client is told by the end of the connection.
            let _ = serve(&stream, &shared);
            let _ = stream.shutdown(Shutdown::Both);
        }));
    }
    for connection in shared.connections.lock().expect("whole").drain(..) {
        let _ = connection.shutdown(Shutdown::Both);
    }
    threads
        .into_iter()
        .for_each(|thread| thread.join().expect("served"));
}

fn serve(mut stream: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello)?;
    Hello::decode(&hello).expect("a greeting");
    shared.greeted.fetch_add(1, Ordering::Relaxed);
    let welcome = *shared.welcome.lock().expect("whole");
    stream.write_all(&welcome.encode())?;
    if welcome.refusal != Refusal::None {
        return Ok(());
    }
    let mut held = Vec::new();
    loop {
        let mut header = [0; REQUEST_BYTES];
        stream.read_exact(&mut header)?;
        let header = RequestHeader::decode(&header).expect("a request");
        let mut body = vec![0; header.body_len as usize];
        stream.read_exact(&mut body)?;
        header.check_body(&body).expect("its body");
        let number = shared.requests.fetch_add(1, Ordering::Relaxed);
        let trick = (shared.tricks.lock().expect("whole"))(number, &header.request);
        if trick == Trick::CutBefore {
            return Ok(());
        }
        if trick == Trick::Silent {
            continue;
        }
        let (mut reply, mut out) = match trick {
            Trick::Says(status) | Trick::SaysLater(status) => {
                (reply_to(&header.request, status), Vec::new())
            }
            _ => execute(&header.request, &body, shared),
        };
        let bytes = twisted(trick, &mut reply, &mut out);
        match trick {
            Trick::CutAfter => return Ok(()),
            Trick::CutWithin => {
                stream.write_all(&bytes[..bytes.len() - 1])?;
                return Ok(());
            }
            Trick::Later | Trick::SaysLater(_) => {
                held = bytes;
                continue;
            }
            Trick::Dribble => {
                for byte in bytes {
                    stream.write_all(&[byte])?;
                }
            }
            _ => stream.write_all(&bytes)?,
        }
        if trick == Trick::Twice {
            stream.write_all(&reply.encode(&out))?;
            stream.write_all(&out)?;
        }
        stream.write_all(&std::mem::take(&mut held))?;
    }
}

fn twisted(trick: Trick, reply: &mut Reply, out: &mut Vec<u8>) -> Vec<u8> {
    match trick {
        Trick::WrongId => reply.id += 1000,
        Trick::WrongOperation => reply.operation = Operation::Ping,
        Trick::LongBody => out.push(7),
        Trick::ShortBody => drop(out.pop()),
        _ => {}
    }
    let mut bytes = reply.encode(out).to_vec();
    bytes.extend_from_slice(out);
    if let Trick::Flip(bit) = trick {
        let bit = bit % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    bytes
}

fn reply_to(request: &Request, status: Status) -> Reply {
    Reply {
        id: request.id,
        epoch: 3,
        operation: request.operation,
        status,
        flags: 0,
        value: 0,
    }
}

fn execute(request: &Request, body: &[u8], shared: &Shared) -> (Reply, Vec<u8>) {
    shared.carried_out.fetch_add(1, Ordering::Relaxed);
    let mut memory = shared.memory.lock().expect("whole");
    let mut reply = reply_to(request, Status::Done);
    let mut out = Vec::new();
    match request.operation {
        Operation::Batch => {
            for item in items(request.len, body).expect("a batch") {
                let item = item.expect("an item");
                let mut bytes = Vec::new();
                let (offset, len) = (item.offset, item.len);
                let done = one(
                    &mut memory,
                    item.operation,
                    offset,
                    len,
                    item.body,
                    &mut bytes,
                );
                let (value, flags) = done.expect("within");
                let result = ItemResult {
                    value,
                    flags,
                    body: &bytes,
                };
                result.append_to(&mut out);
            }
        }
        // The first 96 bytes are a hole, whatever is asked.
        Operation::Holes => {
            append_run(&mut out, 96, true);
            append_run(&mut out, u64::from(request.len) - 96, false);
        }
        Operation::Stat => out.extend_from_slice(b"{\"clients\":1}"),
        operation => {
            let done = one(
                &mut memory,
                operation,
                request.offset,
                request.len,
                body,
                &mut out,
            );
            match done {
                Some((value, flags)) => (reply.value, reply.flags) = (value, flags),
                None => reply.status = Status::OutOfRange,
            }
        }
    }
    (reply, out)
}

fn one(
    memory: &mut [u8],
    operation: Operation,
    offset: u64,
    len: u32,
    body: &[u8],
    out: &mut Vec<u8>,
) -> Option<(u64, u8)> {
    let end = offset.checked_add(u64::from(len))?;
    let range = memory.get_mut(offset as usize..end as usize)?;
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    match operation {
        Operation::Read => out.extend_from_slice(range),
        Operation::Write => range.copy_from_slice(body),
        Operation::Fill => range.fill(body[0]),
        Operation::FetchAdd => {
            let before = number(range);
            range.copy_from_slice(&before.wrapping_add(number(body)).to_le_bytes());
            return Some((before, 0));
        }
        Operation::CompareExchange => {
            let before = number(range);
            let same = before == number(&body[..8]);
            if same {
                range.copy_from_slice(&body[8..]);
            }
            return Some((before, if same { EXCHANGED } else { 0 }));
        }
        Operation::Batch | Operation::Stat | Operation::Ping | Operation::Holes => {}
    }
    Some((0, 0))
}
