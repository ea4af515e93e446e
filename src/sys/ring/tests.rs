//! What travels, what is cancelled, and what a dropped ring leaves behind.

use super::*;
use crate::sys::{memfd, net, or_skip, process::EventFd};
use std::os::fd::AsFd;

const PATIENCE: Duration = Duration::from_secs(10);

fn ring() -> Option<Ring> {
    or_skip("io_uring", Ring::new(64))
}

fn pair() -> (Arc<OwnedFd>, Arc<OwnedFd>) {
    let (a, b) = net::unix_pair().expect("a pair of sockets");
    (Arc::new(a), Arc::new(b))
}

fn one(ring: &mut Ring) -> Completion {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(done) = ring.next() {
            return done;
        }
        assert!(Instant::now() < deadline, "no completion in time");
        ring.enter(Some(PATIENCE)).expect("enter");
    }
}

#[test]
fn bytes_travel_and_buffers_come_back() {
    let Some(mut ring) = ring() else { return };
    let (a, b) = pair();
    let recv = Op::Recv {
        socket: b,
        buf: {
            let mut buf = Vec::with_capacity(16);
            buf.extend_from_slice(b"abc");
            buf.into()
        },
        upto: 16,
    };
    ring.submit(1, recv).expect("recv");
    ring.enter(Some(Duration::ZERO)).expect("enter");
    assert!(ring.next().is_none(), "nothing was sent yet");
    assert!(!ring.has_work());
    let send = Op::Send {
        socket: a,
        buf: SendBuf::Shared(Arc::from(&b"..hello"[..])),
        from: 2,
    };
    ring.submit(2, send).expect("send");
    ring.enter(Some(Duration::ZERO)).expect("enter");
    assert!(ring.has_work(), "the send is done");
    let mut seen = [one(&mut ring), one(&mut ring)];
    seen.sort_by_key(|done| done.token);
    let [recv, send] = seen;
    assert_eq!(send.result.expect("sent"), 5);
    assert_eq!(recv.result.expect("received"), 5);
    let Op::Recv { buf, .. } = recv.op else {
        panic!("another operation")
    };
    assert_eq!(&buf[..], b"abchello");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_cancelled_operation_gives_its_buffer_back() {
    let Some(mut ring) = ring() else { return };
    let (_a, b) = pair();
    for token in [7, 7, 8] {
        let recv = Op::Recv {
            socket: b.clone(),
            buf: Vec::with_capacity(100).into(),
            upto: 100,
        };
        ring.submit(token, recv).expect("recv");
    }
    ring.enter(Some(Duration::ZERO)).expect("enter");
    ring.cancel(7);
    for _ in 0..2 {
        let done = one(&mut ring);
        assert_eq!(done.token, 7);
        let error = done.result.expect_err("cancelled");
        assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
        assert!(matches!(done.op, Op::Recv { buf, .. } if buf.is_empty() && buf.capacity() >= 100));
    }
    assert_eq!(ring.in_flight(), 1, "the other token goes on");
    ring.cancel(99);
    ring.enter(Some(Duration::ZERO)).expect("enter");
    assert!(ring.next().is_none());
}

#[test]
fn dropping_a_ring_ends_what_is_in_flight() {
    let Some(mut ring) = ring() else { return };
    let (a, b) = pair();
    let watched = Arc::new(EventFd::new().expect("eventfd"));
    let fd = Arc::new(watched.try_clone_fd().expect("dup"));
    for token in 0..200 {
        let recv = Op::Recv {
            socket: b.clone(),
            buf: Vec::with_capacity(64).into(),
            upto: 64,
        };
        ring.submit(token, recv).expect("recv");
    }
    let poll = Op::Poll {
        fd: fd.clone(),
        writable: false,
    };
    ring.submit(1000, poll).expect("poll");
    ring.enter(Some(Duration::ZERO)).expect("enter");
    let before = Instant::now();
    drop(ring);
    assert!(before.elapsed() < DROP_DEADLINE, "all came back at once");
    assert_eq!(Arc::strong_count(&fd), 1, "and gave its descriptors back");
    assert_eq!(Arc::strong_count(&b), 1);
    drop(a);
}

#[test]
fn more_than_the_queue_holds_is_flushed() {
    let Some(mut ring) = or_skip("io_uring", Ring::new(4)) else {
        return;
    };
    let bell = EventFd::new().expect("eventfd");
    let fd = Arc::new(bell.try_clone_fd().expect("dup"));
    for token in 0..300 {
        let poll = Op::Poll {
            fd: fd.clone(),
            writable: false,
        };
        ring.submit(token, poll).expect("poll");
    }
    ring.enter(Some(Duration::ZERO)).expect("enter");
    bell.ring();
    let mut tokens: Vec<u64> = (0..300).map(|_| one(&mut ring).token).collect();
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..300), "each completes once");
}

#[test]
fn a_stream_larger_than_the_socket_arrives_whole() {
    let Some(mut ring) = ring() else { return };
    let (a, b) = pair();
    net::set_buffers(&a, None, Some(4096)).expect("small buffer");
    let sent: Vec<u8> = (0..1_000_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
    let mut from = 0;
    let mut received = Vec::new();
    let send = |ring: &mut Ring, from: usize| {
        let op = Op::Send {
            socket: a.clone(),
            buf: SendBuf::Owned(sent.clone()),
            from,
        };
        ring.submit(1, op).expect("send");
    };
    let recv = |ring: &mut Ring, buf: Vec<u8>| {
        let op = Op::Recv {
            socket: b.clone(),
            buf: buf.into(),
            upto: 10_000,
        };
        ring.submit(2, op).expect("recv");
    };
    send(&mut ring, 0);
    recv(&mut ring, Vec::with_capacity(10_000));
    while received.len() < sent.len() {
        let done = one(&mut ring);
        let count = done.result.expect("transfer") as usize;
        match done.op {
            Op::Send { .. } => {
                from += count;
                if from < sent.len() {
                    send(&mut ring, from);
                }
            }
            Op::Recv { buf, .. } => {
                assert_eq!(buf.len(), count);
                received.extend_from_slice(&buf);
                if received.len() < sent.len() {
                    recv(&mut ring, Vec::with_capacity(10_000));
                }
            }
            _ => panic!("another operation"),
        }
    }
    assert!(sent == received);
}

#[test]
fn many_buffers_travel_as_one_stream() {
    let Some(mut ring) = ring() else { return };
    for (len, from) in [(10, 0), (10, 25), (10, 160), (70_000, 3), (70_000, 70_001)] {
        let (a, b) = pair();
        let bufs: Vec<SendBuf> = (0..MAX_PARTS as u8)
            .map(|number| match number % 2 {
                0 => SendBuf::Owned(vec![number; len]),
                _ => SendBuf::Shared(vec![number; len].into()),
            })
            .collect();
        let all: Vec<u8> = bufs.iter().flat_map(|buf| buf.as_ref().to_vec()).collect();
        let mut too_many = bufs.clone();
        too_many.push(SendBuf::Owned(vec![0]));
        for (bufs, from) in [(too_many, 0), (bufs.clone(), all.len() + 1)] {
            let socket = Arc::clone(&a);
            assert!(ring.submit(9, Op::SendAll { socket, bufs, from }).is_err());
        }
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            let mut piece = vec![0; 1 << 20];
            loop {
                let part = net::recv_with_fds(&b, &mut piece, 0, net::Blocking::Yes);
                match part.expect("recv").bytes {
                    0 => return got,
                    bytes => got.extend_from_slice(&piece[..bytes]),
                }
            }
        });
        let (mut bufs, mut at) = (bufs, from);
        while at < all.len() {
            let socket = Arc::clone(&a);
            ring.submit(
                1,
                Op::SendAll {
                    socket,
                    bufs,
                    from: at,
                },
            )
            .expect("send");
            let done = one(&mut ring);
            at += done.result.expect("sent") as usize;
            let Op::SendAll { bufs: back, .. } = done.op else {
                panic!("another operation")
            };
            bufs = back;
        }
        drop(a);
        assert_eq!(reader.join().expect("the reader"), all[from..]);
    }
}

#[test]
fn a_ring_without_kernel_threads_sends_by_itself() {
    let Some(mut ring) = ring() else { return };
    for alone in [false, true] {
        let (a, _b) = pair();
        ring.alone = alone;
        let send = Op::Send {
            socket: Arc::clone(&a),
            buf: SendBuf::Owned(vec![1; ASIDE]),
            from: 0,
        };
        ring.submit(1, send).expect("send");
        let aside = ring.in_flight.iter().any(|(_, op)| op.aside);
        assert_eq!(aside, !alone);
        ring.enter(Some(Duration::ZERO)).expect("enter");
        assert!(!alone || ring.has_work(), "it is done at once");
        let sent = one(&mut ring).result.expect("sent");
        assert!(sent > 0);
    }
}

#[test]
fn a_send_cancelled_half_way_says_how_far_it_came() {
    let Some(mut ring) = ring() else { return };
    let (a, b) = pair();
    net::set_buffers(&a, None, Some(4096)).expect("small buffer");
    let send = Op::Send {
        socket: a,
        buf: SendBuf::Owned(vec![1; 1_000_000]),
        from: 0,
    };
    ring.submit(1, send).expect("send");
    ring.enter(Some(Duration::ZERO)).expect("enter");
    assert!(ring.next().is_none(), "there is no room for all of it");
    // A kernel thread sends it: what arrives says that it has begun.
    assert!(net::wait_readable(&[b.as_fd()], Some(PATIENCE)).expect("poll"));
    ring.cancel(1);
    let done = one(&mut ring);
    let sent = done.result.expect("a part went");
    assert!(sent > 0 && sent < 1_000_000, "a short send: {sent}");
    let mut buf = vec![0; 2_000_000];
    let got = net::recv_with_fds(&b, &mut buf, 0, net::Blocking::No).expect("recv");
    assert!(got.bytes > 0 && got.bytes <= sent as usize);
    drop(b);
}

#[test]
fn tcp_connect_accept_and_end_of_stream() {
    let Some(mut ring) = ring() else { return };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = Arc::new(net::tcp_listen(any).expect("listen"));
    let addr = net::local_addr(&listener).expect("address");
    let socket = Arc::new(net::tcp_socket_for(&addr).expect("socket"));
    let connect = Op::Connect {
        socket: socket.clone(),
        addr,
    };
    ring.submit(1, connect).expect("connect");
    ring.submit(2, Op::Accept { socket: listener })
        .expect("accept");
    let mut seen = [one(&mut ring), one(&mut ring)];
    seen.sort_by_key(|done| done.token);
    let [connected, accepted] = seen;
    assert_eq!(connected.result.expect("connected"), 0);
    let peer = Arc::new(accepted.accepted.expect("a connection"));
    net::set_nodelay(&peer).expect("nodelay");
    net::shutdown(&socket).expect("shutdown");
    let recv = Op::Recv {
        socket: peer,
        buf: Vec::with_capacity(4).into(),
        upto: 4,
    };
    ring.submit(3, recv).expect("recv");
    assert_eq!(one(&mut ring).result.expect("end of stream"), 0);
}

#[test]
fn a_refused_connection_says_so() {
    let Some(mut ring) = ring() else { return };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let addr = {
        let gone = net::tcp_listen(any).expect("listen");
        net::local_addr(&gone).expect("address")
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let socket = Arc::new(net::tcp_socket_for(&addr).expect("socket"));
        ring.submit(1, Op::Connect { socket, addr })
            .expect("connect");
        // A process that another test is just starting may listen on for a moment.
        if let Err(error) = one(&mut ring).result {
            assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
            return;
        }
        assert!(Instant::now() < deadline, "somebody still listens");
    }
}

#[test]
fn waiting_ends_with_the_timeout_and_bad_offsets_are_refused() {
    let Some(mut ring) = ring() else { return };
    let before = Instant::now();
    ring.enter(Some(Duration::from_millis(20))).expect("enter");
    assert!(before.elapsed() >= Duration::from_millis(15));
    let file = Arc::new(memfd::create("x", 4096).expect("memfd"));
    let recv = Op::Recv {
        socket: file.clone(),
        buf: Vec::with_capacity(4).into(),
        upto: 1 << 20,
    };
    assert!(ring.submit(1, recv).is_err());
    let send = Op::Send {
        socket: file.clone(),
        buf: SendBuf::Owned(vec![0; 4]),
        from: 5,
    };
    assert!(ring.submit(1, send).is_err());
    assert_eq!(ring.in_flight(), 0);
    let recv = Op::Recv {
        socket: file.clone(),
        buf: Vec::with_capacity(4).into(),
        upto: 4,
    };
    ring.submit(1, recv).expect("queued");
    let error = one(&mut ring).result.expect_err("not a socket");
    assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
    assert!(memfd::is_regular_file(file.as_fd()).expect("fstat"));
}

#[test]
fn all_needed_operations_exist() {
    let Some(ring) = ring() else { return };
    assert!(ring.missing_operations().expect("probe").is_empty());
}
