//! What a client on the server's host maps: the segment and its stripes, read only.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use uffd_sync::shm::SharedMemory;
use uffd_sync::space::frame::{
    HAS_MAPPING, Hello, Operation, Status, WANTS_MAPPING, WELCOME_BYTES, Welcome,
};
use uffd_sync::space::stripes::MappedStripes;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::net::{self, Blocking};

use super::servers::Servers;
use super::wire::{Wire, hello};
use crate::nodes::{self, await_that};

const MIB: u64 = 1 << 20;
const TRIES: u32 = 64;

/// Greets and takes the two descriptors.
#[track_caller]
fn descriptors(servers: &Servers) -> ([OwnedFd; 2], Welcome, UnixStream) {
    use std::io::Write;
    let mut stream = UnixStream::connect(servers.socket(0)).expect("connected");
    stream
        .set_read_timeout(Some(nodes::PATIENCE))
        .expect("a timeout");
    let hello = Hello {
        flags: WANTS_MAPPING,
        ..hello(servers, 0)
    };
    stream.write_all(&hello.encode()).expect("sent");
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    while bytes.len() < WELCOME_BYTES {
        let mut piece = [0; WELCOME_BYTES];
        let rest = WELCOME_BYTES - bytes.len();
        let got = net::recv_with_fds(&stream, &mut piece[..rest], 4, Blocking::Yes).expect("more");
        assert!(got.bytes > 0 && !got.truncated);
        bytes.extend(&piece[..got.bytes]);
        fds.extend(got.fds);
    }
    let bytes: [u8; WELCOME_BYTES] = bytes.try_into().expect("as many");
    let welcome = Welcome::decode(&bytes).expect("a welcome");
    assert_eq!(welcome.flags & HAS_MAPPING, HAS_MAPPING);
    (fds.try_into().expect("two descriptors"), welcome, stream)
}

#[test]
fn a_client_on_the_host_reads_by_mapping_and_cannot_write() {
    let mut servers = Servers::start(1, MIB, "");
    let ([data, stripes], welcome, _kept) = descriptors(&servers);
    for fd in [&data, &stripes] {
        let len = 4096;
        assert!(
            Mapping::shared(fd, len, Access::ReadWrite).is_err(),
            "read only"
        );
    }
    let mapped = MappedStripes::open(&stripes, MIB).expect("stripes");
    assert_eq!(mapped.incarnation(), welcome.incarnation);
    assert!(mapped.is_alive());
    let memory = Mapping::shared(&data, MIB, Access::ReadOnly).expect("mapped");
    let memory = SharedMemory::new(memory);
    let (mut wire, _) = Wire::greeted(&servers, 0);
    let (reply, _) = wire.ask(Operation::Write, 65_530, 12, b"over an edge");
    assert_eq!(reply.status, Status::Done);
    let mut out = [0; 12];
    // What was answered is seen by a read that begins behind the answer.
    assert_eq!(mapped.read(&memory, 65_530, &mut out, TRIES), Ok(true));
    assert_eq!(&out, b"over an edge");
    servers.kill(0);
    await_that("the liveness word to tell of the death", || {
        !mapped.is_alive()
    });
}

#[test]
fn no_mapping_for_who_does_not_ask_or_comes_from_afar() {
    let servers = Servers::start(1, MIB, "");
    let wants = Hello {
        flags: WANTS_MAPPING,
        ..hello(&servers, 0)
    };
    let welcome = Wire::tcp(&servers, 0).greet(&wants);
    assert_eq!(welcome.flags & HAS_MAPPING, 0);
    let welcome = Wire::unix(&servers, 0).greet(&hello(&servers, 0));
    assert_eq!(welcome.flags & HAS_MAPPING, 0);
}

/// Cells of 4 KiB are written over the network, each filled with one byte; whoever reads by
/// mapping sees no cell of two.
#[test]
fn cells_read_by_mapping_are_never_torn() {
    let servers = Servers::start(1, MIB, "");
    let ([data, stripes], _, _kept) = descriptors(&servers);
    let mapped = MappedStripes::open(&stripes, MIB).expect("stripes");
    let memory = Mapping::shared(&data, MIB, Access::ReadOnly).expect("mapped");
    let memory = SharedMemory::new(memory);
    let stop = AtomicBool::new(false);
    let (mut whole, mut values) = (0u32, [false; 256]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut wire, _) = Wire::greeted(&servers, 0);
            let mut value = 0u8;
            while !stop.load(Ordering::Relaxed) {
                value = value.wrapping_add(1);
                wire.ask(Operation::Write, 4096, 4096, &[value; 4096]);
            }
        });
        let until = std::time::Instant::now() + nodes::PATIENCE;
        let mut out = [0; 4096];
        while whole < 20_000 && std::time::Instant::now() < until {
            if mapped.read(&memory, 4096, &mut out, TRIES).expect("within") {
                assert!(out.iter().all(|byte| *byte == out[0]), "a torn cell");
                values[usize::from(out[0])] = true;
                whole += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(whole > 0 && values.iter().filter(|seen| **seen).count() > 1);
}
