//! Channels against what does not keep to them: servers and clients made by hand,
//! other versions, other users, memory that is none, processes without descriptors.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::time::Duration;

use uffd_sync::client::channel::{
    AnyDuplexClient, ChannelError, ClientOptions, ConnectError, DuplexChannelFactory, NamedServer,
    ServerOptions,
};
use uffd_sync::duplex::layout::LAYOUT_VERSION;
use uffd_sync::duplex::rendezvous::{
    Answer, Ask, ChannelKind, Hello, MESSAGE_BYTES, Refusal, Welcome,
};
use uffd_sync::duplex::{BufferConfig, Segment};
use uffd_sync::sys::memfd::{self, Seals};
use uffd_sync::sys::net::{self, Blocking};
use uffd_sync::zerobuffer;

use super::channel_peer::{Order, Peer, Report, ask, call, connect, join, request, serve};
use super::channels::{ChannelServer, channel_command, socket_of, to_its_end};
use super::nodes::{BINARY, PATIENCE, folder};

const ATTACH: Hello = Hello {
    versions: (LAYOUT_VERSION, LAYOUT_VERSION),
    features: u32::MAX,
    ask: Ask::Attach,
    generation: 0,
    fds: 0,
};

fn is_root() -> bool {
    uffd_sync::sys::process::effective_uid() == 0
}

/// What a server answers to a hello; none if it ends the connection instead.
fn answer_to(socket: &std::path::Path, bytes: &[u8], fds: &[OwnedFd]) -> Option<Answer> {
    let stream = UnixStream::connect(socket).expect("a server");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    net::send_with_fds(&stream, bytes, &fds).expect("sent");
    let mut answer = [0; MESSAGE_BYTES];
    (&stream).read_exact(&mut answer).ok()?;
    Some(Answer::decode(&answer).expect("an answer"))
}

#[track_caller]
fn still_serves(folder: &std::path::Path, server: &NamedServer) {
    assert!(server.is_running());
    let client = join(folder, "a").expect("a client");
    assert_eq!(
        call(&client, &request(ask::UPPER, 99), 10_000).kind(),
        "response"
    );
}

#[test]
fn peers_of_other_versions_are_told_what_is_spoken() {
    let folder = folder();
    let server = serve(folder.path(), "a", 1, 1, true).expect("a server");
    let socket = socket_of(folder.path(), "a");
    let newer = Hello {
        versions: (7, 9),
        ..ATTACH
    };
    let version = Refusal::Version {
        min: LAYOUT_VERSION,
        max: LAYOUT_VERSION,
    };
    let answer = answer_to(&socket, &newer.encode(), &[]);
    assert_eq!(answer, Some(Answer::Refused(version)));
    // The server's memory has failpoints, which this client does not know.
    let plain = Hello {
        features: 0,
        ..ATTACH
    };
    let Some(Answer::Refused(Refusal::Features { missing })) =
        answer_to(&socket, &plain.encode(), &[])
    else {
        panic!("no refusal");
    };
    assert_ne!(missing, 0);
    still_serves(folder.path(), &server);
}

#[test]
fn hostile_clients_change_nothing() {
    let folder = folder();
    let server = serve(folder.path(), "a", 1, 1, false).expect("a server");
    let socket = socket_of(folder.path(), "a");
    for bytes in [[0; MESSAGE_BYTES], [0xA5; MESSAGE_BYTES]] {
        let answer = answer_to(&socket, &bytes, &[]);
        assert_eq!(answer, Some(Answer::Refused(Refusal::Malformed)));
    }
    // Half a hello, then the end.
    let mut half = UnixStream::connect(&socket).expect("a server");
    half.write_all(&ATTACH.encode()[..40]).expect("sent");
    drop(half);
    // Memory that is none of a channel, and memory of somebody else's generation.
    let take_over = |generation| Hello {
        ask: Ask::TakeOver,
        generation,
        fds: 1,
        ..ATTACH
    };
    for fd in [
        plain_memory(4096),
        sealed(plain_memory(1 << 20)),
        no_memory(),
    ] {
        let answer = answer_to(&socket, &take_over(1).encode(), &[fd]);
        assert_eq!(answer, Some(Answer::Refused(Refusal::Memory)));
    }
    let answer = answer_to(&socket, &take_over(77).encode(), &[channel_memory()]);
    let served = Refusal::Served { generation: 1 };
    assert_eq!(answer, Some(Answer::Refused(served)));
    // A client that talks after its attach has ended its channel.
    let stream = UnixStream::connect(&socket).expect("a server");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    (&stream).write_all(&ATTACH.encode()).expect("sent");
    let mut answer = [0; MESSAGE_BYTES];
    let received = net::recv_with_fds(&stream, &mut answer, 2, Blocking::Yes).expect("an answer");
    assert_eq!((received.bytes, received.fds.len()), (MESSAGE_BYTES, 1));
    (&stream).write_all(b"more").expect("sent");
    let end = (&stream).read(&mut answer);
    assert!(end.is_err() || end.is_ok_and(|bytes| bytes == 0));
    still_serves(folder.path(), &server);
}

fn plain_memory(bytes: u64) -> OwnedFd {
    memfd::create("hostile", bytes).expect("memfd")
}

fn sealed(fd: OwnedFd) -> OwnedFd {
    memfd::add_seals(&fd, Seals::SHRINK | Seals::GROW).expect("sealed");
    fd
}

fn no_memory() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("a device").into()
}

fn channel_memory() -> OwnedFd {
    let segment = Segment::create(&BufferConfig::new(64, 4096)).expect("memory");
    let fd = segment.fds()[0].try_clone_to_owned();
    fd.expect("a descriptor")
}

/// Bytes of a channel's memory in a file of another kind.
fn copy_of_channel(bytes_more: i64) -> OwnedFd {
    let original = std::fs::File::from(channel_memory());
    let mut content = vec![0; original.metadata().expect("a size").len() as usize];
    original.read_exact_at(&mut content, 0).expect("its bytes");
    let len = content.len() as i64 + bytes_more;
    let copy = plain_memory(len as u64);
    let keep = content.len().min(len as usize);
    memfd::write_at(&copy, &content[..keep], 0).expect("written");
    copy
}

/// What a client makes of a server that answers with `fds`.
fn client_of(welcome: Welcome, fds: Vec<OwnedFd>) -> ChannelError {
    let folder = folder();
    let socket = socket_of(folder.path(), "a");
    let listener = UnixListener::bind(&socket).expect("a socket");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            let mut hello = [0; MESSAGE_BYTES];
            (&stream).read_exact(&mut hello).expect("a hello");
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let answer = Answer::Welcome(welcome).encode();
            net::send_with_fds(&stream, &answer, &fds).expect("sent");
            // Until the client has seen enough.
            let _ = (&stream).read(&mut hello);
        });
        join(folder.path(), "a")
            .map(drop)
            .expect_err("not a server")
    })
}

#[test]
fn hostile_servers_hand_out_no_memory_that_is_used() {
    let welcome = Welcome {
        version: LAYOUT_VERSION,
        features: 0,
        kind: ChannelKind::InPlace,
        generation: 1,
        fds: 1,
        body_bytes: 0,
    };
    for (what, fd) in [
        ("unsealed", copy_of_channel(0)),
        ("too short", sealed(copy_of_channel(-4096))),
        ("too long", sealed(copy_of_channel(4096))),
        ("empty", sealed(plain_memory(1 << 20))),
        ("not memory", no_memory()),
    ] {
        let error = client_of(welcome, vec![fd]);
        let refused = matches!(error, ChannelError::Connect(ConnectError::Memory { .. }));
        assert!(refused, "{what}: {error}");
    }
    for (what, welcome) in [
        (
            "generation",
            Welcome {
                generation: 2,
                ..welcome
            },
        ),
        (
            "kind",
            Welcome {
                kind: ChannelKind::TwoBuffers,
                ..welcome
            },
        ),
        ("descriptors", Welcome { fds: 2, ..welcome }),
        (
            "version",
            Welcome {
                version: LAYOUT_VERSION + 1,
                ..welcome
            },
        ),
    ] {
        let error = client_of(welcome, vec![channel_memory()]);
        assert!(matches!(error, ChannelError::Connect(_)), "{what}: {error}");
    }
}

#[test]
fn a_second_client_and_a_second_server_are_refused_by_type() {
    let folder = folder();
    let server = serve(folder.path(), "a", 2, 1, false).expect("a server");
    let clients = [(); 2].map(|()| join(folder.path(), "a").expect("a client"));
    let third = join(folder.path(), "a").map(drop).expect_err("two are all");
    let ChannelError::Connect(error) = &third else {
        panic!("{third}");
    };
    let full = Refusal::Clients { clients: 2, max: 2 };
    assert_eq!(error.refusal(), Some(full));
    for client in &clients {
        assert_eq!(
            call(client, &request(ask::UPPER, 9), 10_000).kind(),
            "response"
        );
    }
    let taken = serve(folder.path(), "a", 1, 1, false).map(drop);
    let taken = taken.expect_err("the name is taken");
    let is_taken = matches!(taken, ChannelError::Connect(ConnectError::NameTaken { .. }));
    assert!(is_taken, "{taken}");
    let nobody = join(folder.path(), "b")
        .map(drop)
        .expect_err("nobody there");
    let is_absent = matches!(
        nobody,
        ChannelError::Connect(ConnectError::NoChannel { .. })
    );
    assert!(is_absent, "{nobody}");
    assert_eq!(server.status().expect("a status").clients.len(), 2);
}

#[test]
fn failing_handlers_fail_their_request_and_no_other() {
    let folder = folder();
    for workers in [1, 3] {
        let server = serve(folder.path(), "a", 1, workers, false).expect("a server");
        let client = join(folder.path(), "a").expect("a client");
        let mut slow = request(ask::SLEEP, 9);
        slow[1] = 250;
        for (request, kind, says) in [
            (request(ask::FAIL, 3000), "handler", "does not like it"),
            (request(ask::PANIC, 9), "handler", "panic"),
            (request(ask::GROW, 9), "handler", ""),
            (slow, "timed out", "deadline"),
            (request(ask::UPPER, 2 << 20), "too large", "2097152"),
        ] {
            let timeout_ms = if kind == "timed out" { 50 } else { 10_000 };
            let report = call(&client, &request, timeout_ms);
            assert_eq!(report.kind(), kind, "{report:?}");
            let Report::Failed { text, .. } = &report else {
                panic!("{report:?}");
            };
            assert!(text.contains(says), "{text}");
            let works = call(&client, &self::request(ask::UPPER, 400), 10_000);
            assert_eq!(works.kind(), "response", "after {kind}: {works:?}");
        }
        drop(server);
    }
}

#[test]
fn metadata_is_set_once_and_fits() {
    let folder = folder();
    let _server = serve(folder.path(), "a", 1, 1, false).expect("a server");
    let client = join(folder.path(), "a").expect("a client");
    let long = client
        .set_metadata(&[7; 57])
        .expect_err("64 with their length");
    assert!(long.to_string().contains("57"), "{long}");
    client.set_metadata(&[7; 56]).expect("fits");
    client.set_metadata(b"again").expect_err("once");
    assert_eq!(
        call(&client, &request(ask::UPPER, 9), 10_000).kind(),
        "response"
    );
}

#[test]
fn processes_without_descriptors_say_so_and_recover() {
    let folder = folder();
    // The client has too few: each number of them ends in an error, none in a hang.
    let server = serve(folder.path(), "a", 1, 1, false).expect("a server");
    let mut client = Peer::start();
    let mut failures = 0;
    for count in 0..8 {
        client.carry_out(&Order::LeaveDescriptors { count });
        match client.order(&connect(folder.path(), "a")) {
            Report::Done => client.carry_out(&Order::Leave),
            Report::Failed { kind, text, .. } => {
                assert!(!text.is_empty(), "{kind}");
                failures += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(failures >= 2, "{failures}");
    client.carry_out(&Order::LeaveDescriptors { count: 100 });
    client.carry_out(&connect(folder.path(), "a"));
    drop((client, server));

    let mut server = Peer::start();
    server.carry_out(&Order::Serve {
        folder: folder.path().to_owned(),
        name: "b".to_owned(),
        clients: 1,
        workers: 1,
        failpoints: false,
    });
    for count in 0..8 {
        server.carry_out(&Order::LeaveDescriptors { count });
        match join(folder.path(), "b") {
            Ok(client) => {
                assert_eq!(
                    call(&client, &request(ask::UPPER, 9), 10_000).kind(),
                    "response"
                );
            }
            Err(ChannelError::Connect(error)) => {
                let short = matches!(error.refusal(), Some(Refusal::Resources { .. }));
                let behind = matches!(error.refusal(), Some(Refusal::Clients { .. }));
                assert!(short || behind, "{count}: {error}");
            }
            Err(error) => panic!("{count}: {error}"),
        }
    }
    server.carry_out(&Order::LeaveDescriptors { count: 100 });
    let client =
        super::nodes::await_some("a server that recovered", || join(folder.path(), "b").ok());
    assert_eq!(
        call(&client, &request(ask::UPPER, 9), 10_000).kind(),
        "response"
    );
}

/// An ordinary user without a home, processes or files.
const NOBODY: u32 = 65_534;

#[test]
fn another_user_is_refused_on_both_sides() {
    if !is_root() {
        // Not a missing feature: without privileges there is no other user to be.
        let _ = std::io::stderr().write_all(b"SKIP only root can act as another user\n");
        return;
    }
    let folder = folder();
    let everybody = || std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(folder.path(), everybody()).expect("our folder");
    let copy = folder.path().join("uffd-sync");
    std::fs::copy(BINARY, &copy).expect("a copy of the command");
    std::fs::set_permissions(&copy, everybody()).expect("our copy");
    let as_nobody = |verb: &str, name: &str, user: u32| {
        let mut command = std::process::Command::new(&copy);
        command
            .args(["channel", verb, name, "--dir"])
            .arg(folder.path());
        command.uid(user).gid(user).current_dir("/");
        command
    };
    // The socket's mode keeps others out; where somebody opened it, the server does.
    let server = serve(folder.path(), "a", 1, 1, false).expect("a server");
    let ended = to_its_end(as_nobody("call", "a", NOBODY), b"u");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("denied"), "{ended:?}");
    let socket = socket_of(folder.path(), "a");
    std::fs::set_permissions(&socket, everybody()).expect("our socket");
    // Root's server is trusted by its client, but does not trust it.
    let ended = to_its_end(as_nobody("call", "a", NOBODY), b"u");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("user 65534"), "{ended:?}");
    still_serves(folder.path(), &server);

    // Somebody else's server: neither root nor a third user gives it a request.
    let mut serving = as_nobody("serve", "b", NOBODY);
    serving.args(["--op", "upper"]);
    let _server = ChannelServer::from_command(serving).expect("a server");
    let socket = socket_of(folder.path(), "b");
    std::fs::set_permissions(&socket, everybody()).expect("root may");
    for ended in [
        to_its_end(channel_command(folder.path(), "call", "b"), b"u"),
        to_its_end(as_nobody("call", "b", NOBODY - 1), b"u"),
    ] {
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains("belongs to user 65534"), "{ended:?}");
    }
    let own = to_its_end(as_nobody("call", "b", NOBODY), b"u");
    assert_eq!(own.stdout, b"U", "{own:?}");
}

#[test]
fn silent_clients_keep_nobody_out_for_long() {
    let folder = folder();
    let _server = serve(folder.path(), "a", 1, 1, false).expect("a server");
    let socket = socket_of(folder.path(), "a");
    let silent: Vec<_> = (0..16)
        .map(|_| UnixStream::connect(&socket).expect("a server"))
        .collect();
    // The next one waits until they have had their time.
    let options = ClientOptions {
        connect_timeout: Duration::from_secs(20),
        ..ClientOptions::default()
    };
    let name = "a".parse().expect("a name");
    let client = DuplexChannelFactory::in_folder(folder.path())
        .create_in_place_client(&name, options)
        .expect("its turn comes");
    let served = call(&client, &request(ask::UPPER, 99), 10_000);
    assert_eq!(served.kind(), "response");
    for mut stream in silent {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let end = stream.read(&mut [0; 1]).expect("an end");
        assert_eq!(end, 0, "each was given up");
    }
}

#[test]
fn a_client_takes_the_kind_of_channel_that_there_is() {
    let folder = folder();
    let factory = DuplexChannelFactory::in_folder(folder.path());
    let name = format!("it-kinds-{}", std::process::id());
    let name = name.parse().expect("a name");
    let options = ClientOptions::default();
    let nobody = factory.create_client(&name, options).map(drop);
    let nobody = nobody.expect_err("no server of either kind");
    let is_absent = matches!(
        nobody,
        ChannelError::Connect(ConnectError::NoChannel { .. })
    );
    assert!(is_absent, "{nobody}");

    let request = zerobuffer::BufferConfig::new(1024, 1 << 16);
    let serve = || {
        let options = zerobuffer::ServerOptions::new(request);
        factory.create_immutable_server(&name, options, |frame, reply| {
            Ok(reply.write(&frame.to_vec().to_ascii_uppercase())?)
        })
    };
    let server = serve().expect("the name is free");
    let status = factory.status(&name).expect("a status");
    assert_eq!(status.kind, "two-buffers");
    let taken = serve().map(drop).expect_err("the name is taken");
    assert!(matches!(taken, ChannelError::Connect(_)), "{taken}");
    let refused = factory.create_in_place_client(&name, options).map(drop);
    let refused = refused.expect_err("of the other kind");
    assert!(matches!(refused, ChannelError::Connect(_)), "{refused}");
    let mut client = factory.create_client(&name, options).expect("two buffers");
    assert!(matches!(client, AnyDuplexClient::TwoBuffers(_)));
    assert_eq!(
        client.call(b"hello", PATIENCE).expect("a response"),
        b"HELLO"
    );
    drop((client, server));

    // A server of another implementation has no socket, but buffers of the name.
    let options_v1 = zerobuffer::ServerOptions::new(request);
    let server = zerobuffer::DuplexServer::start(name.as_str(), options_v1, |frame, reply| {
        Ok(reply.write(&frame.to_vec())?)
    });
    let server = server.expect("the buffers' names are free");
    let mut client = factory.create_client(&name, options).expect("two buffers");
    assert_eq!(
        client.call(b"hello", PATIENCE).expect("a response"),
        b"hello"
    );
    drop((client, server));

    let server = factory
        .create_in_place_server(&name, BufferConfig::new(0, 4096), ServerOptions::default())
        .expect("the name is free");
    server.start(|_| Ok(())).expect("started once");
    let mut client = factory.create_client(&name, options).expect("in place");
    assert!(matches!(client, AnyDuplexClient::InPlace(_)));
    assert_eq!(
        client.call(b"hello", PATIENCE).expect("a response"),
        b"hello"
    );
}
