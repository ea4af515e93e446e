//! Requests that libnbd would not send if it were not told to, and bytes that are none.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::tools::{Tool, are_missing};
use super::*;

/// Everything that a client can ask wrongly, each with its error, and the connection goes on.
#[test]
fn requests_that_libnbd_would_not_send_get_their_errors() {
    if are_missing(&["nbdsh"]) {
        return;
    }
    let exported = Exported::start();
    for export in ["all", "server-0"] {
        let script = format!(
            r#"
h.set_strict_mode(0)
h.connect_uri("{uri}")
size = h.get_size()
def refused(errno, what, *args, **more):
    try:
        what(*args, **more)
    except nbd.Error as error:
        assert error.errno == errno, (what, args, error.errno)
    else:
        raise SystemExit("not refused: %r %r" % (what, args))
for offset, count in [(size, 1), (size - 1, 2), (2**63 - 1, 1), (size, 65536)]:
    refused("EINVAL", h.pread, count, offset)
    refused("ENOSPC", h.pwrite, bytes(count), offset)
    refused("EINVAL", h.trim, count, offset)
    refused("ENOSPC", h.zero, count, offset)
    refused("EINVAL", h.cache, count, offset)
    refused("EINVAL", h.block_status, count, offset, lambda *a: 0)
for flags in [2, 8, 16, 32, 0x8000]:
    refused("EINVAL", h.pread, 8, 0, flags=flags)
    refused("EINVAL", h.pwrite, bytes(8), 0, flags=flags)
    refused("EINVAL", h.trim, 8, 0, flags=flags)
    refused("EINVAL", h.cache, 8, 0, flags=flags)
refused("EINVAL", h.pread, 32 * 1024 * 1024 + 1, 0)
h.pwrite(b"whole", size - 5, flags=nbd.CMD_FLAG_FUA)
assert h.pread(5, size - 5) == b"whole"
h.zero(size, 0)
assert h.pread(65536, size - 65536) == bytes(65536)
h.flush()
"#,
            uri = exported.uri(export)
        );
        Tool::new("nbdsh").args(["-c", &script]).succeeds();
    }
}

/// One request of the greatest length, both ways, over all servers.
#[test]
fn requests_as_long_as_they_may_be() {
    if are_missing(&["nbdsh"]) {
        return;
    }
    let exported = Exported::start();
    let script = format!(
        r#"
import os
for structured in [True, False]:
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.connect_uri("{uri}")
    size = h.get_size()
    data = os.urandom(size)
    h.pwrite(data, 0)
    assert h.pread(size, 0) == data
    if structured:
        whole, runs = bytearray(size), []
        def run(bytes, offset, status, error):
            whole[offset:offset + len(bytes)] = bytes
            runs.append(offset)
        h.pread_structured(size, 0, run, flags=nbd.CMD_FLAG_DF)
        assert whole == data and runs == [0]
    tickets = [(at, h.aio_pread(nbd.Buffer(65536), at)) for at in range(0, size - 65536, 65536)]
    while h.aio_in_flight() > 0: h.poll(-1)
"#,
        uri = exported.uri("all")
    );
    Tool::new("nbdsh").args(["-c", &script]).succeeds();
}

fn connect(exported: &Exported) -> UnixStream {
    let stream = UnixStream::connect(exported.path("nbd.sock")).expect("connected");
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).expect("set");
    stream.set_write_timeout(patience).expect("set");
    stream
}

/// Bytes that are no NBD end their own connection and nobody else's; clients that say
/// nothing, or do not read, keep nobody from being served.
#[test]
fn bad_peers_do_not_keep_good_ones_from_being_served() {
    let exported = Exported::start();
    let silent: Vec<_> = (0..20).map(|_| connect(&exported)).collect();
    let mut rng = 0x1234_5678_9abc_def0_u64;
    for _ in 0..50 {
        let mut stream = connect(&exported);
        let junk: Vec<u8> = (0..4096)
            .map(|_| {
                rng ^= rng << 13;
                rng ^= rng >> 7;
                rng ^= rng << 17;
                rng as u8
            })
            .collect();
        let _ = stream.write_all(&junk);
        let mut rest = Vec::new();
        // An end or a reset, but an end.
        let ended = stream.read_to_end(&mut rest);
        let silence = ended.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!silence, "it was not hung up on");
    }
    let mut greedy = connect(&exported);
    let mut asked = [
        &3_u32.to_be_bytes()[..],
        b"IHAVEOPT",
        &[0, 0, 0, 1, 0, 0, 0, 0],
    ]
    .concat();
    for cookie in 0..100_u64 {
        asked.extend(0x2560_9513_u32.to_be_bytes());
        asked.extend([0; 4]);
        asked.extend(cookie.to_be_bytes());
        asked.extend(0_u64.to_be_bytes());
        asked.extend((SEGMENT as u32).to_be_bytes());
    }
    greedy.write_all(&asked).expect("sent");
    let began = Instant::now();
    let mut space = exported.space();
    for at in 0..200_u64 {
        space.write(at * 4096, &at.to_le_bytes()).expect("written");
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    drop((silent, greedy));
}
