//! Clients and peers that behave as no program of ours would, and programs that leave
//! at bad moments: nothing is lost, nothing grows, nobody else waits.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uffd_sync::client::{Writer, WriterOptions};
use uffd_sync::limits;
use uffd_sync::region::{Region, RegionOptions};
use uffd_sync::sys::memfd;
use uffd_sync::sys::net::{send_with_fds, unix_connect};
use uffd_sync::track::Attachment;
use uffd_sync::units::{GIB, MIB, PAGE_SIZE};
use uffd_sync::wire::control::{self, HandOver, Request};
use uffd_sync::wire::{
    Base, EndUpdate, FrameBuilder, HEADER_BYTES, Header, Hello, Kind, Ping, RegionInfo,
    StartUpdate, Subscribe, SyncPlan, UpdatePrefix, VERSION, parse_header, update_flags,
};
use uffd_sync::words::{EpochKind, Generation, Mode, Publish, WriteKind};

use super::nodes::{
    NodeProcess, PATIENCE, await_content, await_following, await_that, folder, run_on,
};

/// A source with a follower of its region `name`.
fn pair(folder: &std::path::Path, name: &str) -> (NodeProcess, NodeProcess) {
    let source = NodeProcess::source(folder, "source");
    let follow = [format!("tcp://{}/{name}", source.listen())];
    let follower = NodeProcess::follower(folder, "follower", &follow);
    (source, follower)
}

#[test]
fn a_program_that_drops_its_region_and_goes_on_loses_nothing() {
    let folder = folder();
    let (source, follower) = pair(folder.path(), "r");
    let options = WriterOptions {
        // The last stores are never found by a timer.
        interval_min: Some(Duration::from_secs(30)),
        interval_max: Some(Duration::from_secs(30)),
        ..WriterOptions::default()
    };
    let mut expected = vec![0; MIB as usize];
    for life in 1..=3u8 {
        let writer = Writer::create(source.socket(), "r", MIB, &options).expect("a region");
        assert_eq!(writer.is_resumed(), life > 1);
        await_following(&follower, "r");
        let at = usize::from(life) * 70_000;
        writer
            .write(at as u64, &[life; 5000])
            .expect("it is inside");
        expected[at..at + 5000].fill(life);
        drop(writer);
        await_content(&follower, "r", &expected);
    }
    let state = source.region("r").expect("the node keeps it").state;
    assert_eq!(state, "orphaned");
}

#[test]
fn a_client_that_asks_and_never_reads_costs_one_answer() {
    let folder = folder();
    let mut node = NodeProcess::source(folder.path(), "node");
    for region in 0..40 {
        let line = format!("region create region-{region} --size 4KiB");
        assert_eq!(run_on(&node, &line, b"").code, Some(0));
    }
    let before = node.status().rss_bytes;
    let request = control::encode(&Request::Status, b"").expect("a request");
    let flood = request.repeat(60_000 / request.len());
    let deaf: Vec<UnixStream> = (0..20)
        .map(|_| {
            let mut socket = UnixStream::connect(node.socket()).expect("the node listens");
            socket.set_nonblocking(true).expect("a socket");
            while socket.write(&flood).is_ok() {}
            socket
        })
        .collect();
    let asked = Instant::now();
    let status = node.status();
    assert!(asked.elapsed() < Duration::from_secs(2), "others wait");
    let grown = status.rss_bytes.saturating_sub(before);
    assert!(
        grown < 64 * MIB,
        "{grown} bytes for answers that nobody takes"
    );
    drop(deaf);
    await_that("their connections are closed", || {
        node.status().connections <= 1
    });
    assert!(node.is_alive());
}

/// A follower made of frames.
struct Peer(TcpStream);

impl Peer {
    fn dial(node: &NodeProcess, id: u8) -> Self {
        let mut socket = TcpStream::connect(node.listen()).expect("the node listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let hello = Hello {
            min_version: VERSION,
            max_version: VERSION,
            max_body: limits::MAX_BODY as u32,
            node: [id; 16],
            incarnation: 0,
            name: "hostile".into(),
        };
        let sent = socket.write_all(&hello.encode(Kind::Hello));
        sent.expect("the node takes bytes");
        Self(socket)
    }

    fn subscribe(&mut self, name: &str, subscription: u32, fresh: bool) -> std::io::Result<()> {
        let subscribe = Subscribe {
            name: name.parse().expect("a name"),
            subscription,
            generation: Generation::ZERO,
            have_epoch: None,
            fresh,
        };
        self.0.write_all(&subscribe.encode())
    }

    /// The next frame; none at the end.
    fn frame(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut raw = [0; HEADER_BYTES];
        self.0.read_exact(&mut raw).ok()?;
        let header = parse_header(&raw).expect("the node sends frames");
        let mut body = vec![0; header.body_len as usize];
        self.0.read_exact(&mut body).ok()?;
        Some((header, body))
    }

    /// Waits for a frame of that kind.
    #[track_caller]
    fn await_kind(&mut self, kind: Kind) -> (Header, Vec<u8>) {
        loop {
            let frame = self.frame().expect("the node goes on");
            if frame.0.kind == kind {
                return frame;
            }
        }
    }
}

#[test]
fn a_peer_that_asks_and_takes_no_answers_is_closed() {
    let folder = folder();
    let mut node = NodeProcess::source(folder.path(), "node");
    let before = node.status().rss_bytes;
    for frame in [
        Ping { number: 1 }.encode(Kind::Ping),
        Subscribe {
            name: "nix".parse().expect("a name"),
            subscription: 1,
            generation: Generation::ZERO,
            have_epoch: None,
            fresh: true,
        }
        .encode(),
    ] {
        let mut peer = Peer::dial(&node, 9);
        let flood = frame.repeat(64 * 1024 / frame.len());
        let timeout = Some(Duration::from_secs(5));
        peer.0.set_write_timeout(timeout).expect("a socket");
        let mut sent = 0;
        while peer.0.write_all(&flood).is_ok() {
            sent += flood.len();
            assert!(sent < 256 * MIB as usize, "it goes on for ever");
        }
        let grown = node.status().rss_bytes.saturating_sub(before);
        assert!(grown < 48 * MIB, "{grown} bytes for answers nobody takes");
    }
    assert!(node.is_alive());
}

#[test]
fn a_peer_that_subscribes_again_and_again_leaves_nothing_behind() {
    let folder = folder();
    let (node, follower) = pair(folder.path(), "a");
    for name in ["a", "b"] {
        let line = format!("region create {name} --size 64KiB --shared");
        assert_eq!(run_on(&node, &line, b"").code, Some(0));
    }
    await_following(&follower, "a");
    let mut peer = Peer::dial(&node, 9);
    for round in 0..300 {
        let name = if round % 2 == 0 { "a" } else { "b" };
        peer.subscribe(name, 1, true).expect("the node takes it");
        peer.await_kind(Kind::RegionInfo);
    }
    drop(peer);
    let replicas = |name: &str| node.region(name).expect("it is there").replicas;
    await_that("only the follower is connected", || {
        let connected = |name: &str| {
            let replicas = replicas(name);
            replicas.iter().filter(|r| r.state != "gone").count()
        };
        connected("a") == 1 && connected("b") == 0
    });
    // Room for as many as may follow.
    let mut peers: Vec<Peer> = (10..10 + limits::MAX_HALF_OPEN as u8 / 2)
        .map(|id| Peer::dial(&node, id))
        .collect();
    for peer in &mut peers {
        peer.subscribe("a", 7, true).expect("the node takes it");
        peer.await_kind(Kind::RegionInfo);
    }
    assert_eq!(run_on(&node, "region write a", b"news").code, Some(0));
    let mut expected = vec![0; 65536];
    expected[..4].copy_from_slice(b"news");
    await_content(&follower, "a", &expected);
}

#[test]
fn a_replica_that_connects_once_more_ends_its_old_connection() {
    let folder = folder();
    let node = NodeProcess::source(folder.path(), "node");
    let made = run_on(&node, "region create a --size 4KiB --shared", b"");
    assert_eq!(made.code, Some(0));
    let mut first = Peer::dial(&node, 9);
    first.subscribe("a", 1, true).expect("the node takes it");
    first.await_kind(Kind::RegionInfo);
    let mut second = Peer::dial(&node, 9);
    second.subscribe("a", 1, true).expect("the node takes it");
    second.await_kind(Kind::RegionInfo);
    // Not left open and silent, as if nothing happened at the source.
    let started = Instant::now();
    while first.frame().is_some() {}
    assert!(started.elapsed() < Duration::from_secs(4), "it goes on");
}

#[test]
fn two_replicas_of_one_region_on_one_node_both_follow() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    let made = run_on(&source, "region create r --size 64KiB --shared", b"");
    assert_eq!(made.code, Some(0));
    let follow = ["one", "two"].map(|local| format!("tcp://{}/r={local}", source.listen()));
    let follower = NodeProcess::follower(folder.path(), "follower", &follow);
    let mut expected = vec![0; 65536];
    for round in 1..=20u8 {
        expected[..4].fill(round);
        let wrote = run_on(&source, "region write r", &[round; 4]);
        assert_eq!(wrote.code, Some(0));
        await_content(&follower, "one", &expected);
        await_content(&follower, "two", &expected);
    }
    assert_eq!(source.region("r").expect("it is there").replicas.len(), 2);
}

#[test]
fn a_resync_of_a_sparse_region_allocates_nothing() {
    let folder = folder();
    let (source, follower) = pair(folder.path(), "sparse");
    let size = 8 * GIB;
    let options = WriterOptions::default();
    for life in 1..=2u8 {
        let writer = Writer::create(source.socket(), "sparse", size, &options);
        let writer = writer.expect("a region");
        for at in [5, 3 * GIB, size - 9] {
            writer.write(at, &[life; 9]).expect("it is inside");
        }
        let epoch = writer.commit(PATIENCE).expect("the engine answers");
        // The second time by digests, since the region has another generation.
        epoch
            .wait_acked(1, 3 * PATIENCE)
            .expect("the replica follows");
        let loss = source.region("sparse").expect("it is there").last_loss;
        assert_eq!(loss, None, "a hole is no loss");
        drop(writer);
    }
    let replica = follower.region("sparse").expect("it is there");
    let resident = replica.resident_bytes;
    assert!(resident < MIB, "{resident} bytes of three pages");
}

/// A source made of frames, for one follower.
struct Host {
    listener: TcpListener,
    handle: u32,
}

impl Host {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        Self {
            listener,
            handle: 3,
        }
    }

    fn follower(&self, folder: &std::path::Path) -> NodeProcess {
        let address = self.listener.local_addr().expect("a bound socket");
        NodeProcess::follower(folder, "follower", &[format!("tcp://{address}/r")])
    }

    /// Takes the follower's next connection up to its subscription.
    #[track_caller]
    fn accept(&self) -> (Peer, Subscribe) {
        let (socket, _) = self.listener.accept().expect("the follower dials");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut peer = Peer(socket);
        peer.await_kind(Kind::Hello);
        let welcome = Hello {
            min_version: VERSION,
            max_version: VERSION,
            max_body: limits::MAX_BODY as u32,
            node: [1; 16],
            incarnation: 0,
            name: "source".into(),
        };
        let sent = peer.0.write_all(&welcome.encode(Kind::Welcome));
        sent.expect("the follower reads");
        let (header, body) = peer.await_kind(Kind::Subscribe);
        let subscribe = Subscribe::decode(&header, &body).expect("a subscription");
        (peer, subscribe)
    }

    fn info(&self, size: u64, epoch: u64, round: u32, plan: SyncPlan) -> Vec<u8> {
        let info = RegionInfo {
            handle: self.handle,
            subscription: 1,
            round,
            generation: Generation(77),
            size,
            max_size: size,
            epoch,
            plan,
        };
        info.encode()
    }

    /// An update in one frame that fills `range` with `byte`.
    fn single(&self, base: Base, epoch: u64, range: Range<u64>, byte: u8) -> Vec<u8> {
        let flags = update_flags(EpochKind::Cut, base);
        let mut frame = FrameBuilder::new(Kind::SingleUpdate, flags, self.handle, epoch);
        let source_time_ns = 1;
        frame.put(
            &UpdatePrefix {
                base,
                source_time_ns,
            }
            .to_bytes(epoch),
        );
        frame.extent(range.start, &vec![byte; (range.end - range.start) as usize]);
        frame.finish()
    }

    /// An update in parts that fills `size` bytes with `byte`.
    fn parts(&self, base: Base, epoch: u64, size: u64, byte: u8) -> Vec<u8> {
        let prefix = UpdatePrefix {
            base,
            source_time_ns: 1,
        };
        let start = StartUpdate {
            prefix,
            total_bytes: size,
            coming: false,
        };
        let mut frames = start.encode(self.handle, epoch, EpochKind::Cut);
        let (mut at, mut chunks) = (0, 0);
        while at < size {
            let len = (size - at).min(limits::MAX_CHUNK);
            let mut frame = FrameBuilder::new(Kind::UpdateChunk, 0, self.handle, epoch);
            frame.extent(at, &vec![byte; len as usize]);
            frames.extend(frame.finish());
            (at, chunks) = (at + len, chunks + 1);
        }
        let end = EndUpdate {
            chunks,
            total_bytes: size,
            kind: uffd_sync::words::EpochKind::Convergent,
        };
        frames.extend(end.encode(self.handle, epoch));
        frames
    }
}

#[test]
fn an_update_cut_off_while_it_is_applied_is_ended_before_the_next() {
    let folder = folder();
    let host = Host::new();
    let follower = host.follower(folder.path());
    let size = 192 * MIB;
    let (mut peer, subscribe) = host.accept();
    assert!(subscribe.fresh);
    let mut frames = host.info(size, 1, 1, SyncPlan::Everything);
    frames.extend(host.single(Base::Nothing, 1, 0..1, 0));
    peer.0.write_all(&frames).expect("the follower reads");
    peer.await_kind(Kind::Ack);
    // Takes the follower much longer to apply than to dial again.
    let bulk = host.parts(Base::Epoch(1), 2, size, 0xAA);
    peer.0.write_all(&bulk).expect("the follower reads");
    peer.0
        .shutdown(std::net::Shutdown::Write)
        .expect("a socket");
    let (mut peer, subscribe) = host.accept();
    assert!(subscribe.have_epoch >= Some(1), "{subscribe:?}");
    let have = subscribe.have_epoch.unwrap_or(1);
    let mut frames = host.info(size, 3, 2, SyncPlan::Resume);
    frames.extend(host.single(Base::Epoch(have), 3, 8..16, 0xBB));
    peer.0.write_all(&frames).expect("the follower reads");
    let mut acked = 0;
    while acked < 3 {
        let (header, body) = peer.await_kind(Kind::Ack);
        acked = uffd_sync::wire::Ack::decode(&header, &body)
            .expect("an ack")
            .epoch;
    }
    let mut expected = vec![0xAA; size as usize];
    expected[8..16].fill(0xBB);
    await_content(&follower, "r", &expected);
}

#[test]
fn a_damaged_update_is_asked_for_again_on_the_same_connection() {
    let folder = folder();
    let host = Host::new();
    let follower = host.follower(folder.path());
    let (mut peer, _) = host.accept();
    let mut frames = host.info(4096, 1, 1, SyncPlan::Everything);
    frames.extend(host.single(Base::Nothing, 1, 0..64, 1));
    peer.0.write_all(&frames).expect("the follower reads");
    peer.await_kind(Kind::Ack);
    let mut damaged = host.single(Base::Epoch(1), 2, 0..64, 2);
    *damaged.last_mut().expect("a body") ^= 1;
    peer.0.write_all(&damaged).expect("the follower reads");
    peer.await_kind(Kind::Resync);
    let mut expected = vec![0; 4096];
    expected[..64].fill(1);
    await_content(&follower, "r", &expected);
    let again = host.single(Base::Epoch(1), 2, 0..64, 2);
    peer.0.write_all(&again).expect("the follower reads");
    peer.await_kind(Kind::Ack);
    expected[..64].fill(2);
    await_content(&follower, "r", &expected);
}

#[test]
fn a_reader_that_plays_with_its_hold_delays_no_update_for_long() {
    let folder = folder();
    let host = Host::new();
    let follower = host.follower(folder.path());
    let (mut peer, _) = host.accept();
    let mut frames = host.info(4096, 1, 1, SyncPlan::Everything);
    frames.extend(host.single(Base::Nothing, 1, 0..64, 1));
    peer.0.write_all(&frames).expect("the follower reads");
    peer.await_kind(Kind::Ack);
    // Hold pages, the words of which change all the time.
    let readers: Vec<_> = (0..8).map(|_| hold_page(&follower)).collect();
    await_that("all are attached", || {
        let region = follower.region("r");
        region.is_some_and(|region| region.readers == readers.len() as u64)
    });
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (_, hold) in &readers {
                    memfd::write_at(hold, &[0], 0).expect("it can be written");
                    memfd::write_at(hold, &[1], 0).expect("it can be written");
                }
            }
        });
        let started = Instant::now();
        for epoch in 2..52 {
            let update = host.single(Base::Epoch(epoch - 1), epoch, 0..64, epoch as u8);
            peer.0.write_all(&update).expect("the follower reads");
            peer.await_kind(Kind::Ack);
        }
        stop.store(true, Ordering::Relaxed);
        let most = 50 * Duration::from_millis(4 * limits::HOLD_MAX_MS);
        assert!(started.elapsed() < most, "{:?} for 50", started.elapsed());
    });
}

/// Attaches to the region `r` with a hold page that is written by hand.
fn hold_page(node: &NodeProcess) -> (OwnedFd, OwnedFd) {
    let hold = memfd::create("hold", PAGE_SIZE).expect("a memfd");
    let seals = memfd::Seals::SHRINK | memfd::Seals::GROW;
    memfd::add_seals(&hold, seals).expect("seals");
    let socket = unix_connect(node.socket()).expect("the node listens");
    let attach = Request::Attach { name: "r".into() };
    let request = control::encode(&attach, b"").expect("a request");
    send_with_fds(&socket, &request, &[hold.as_fd()]).expect("a request");
    (socket, hold)
}

#[test]
fn a_reload_moves_a_name_to_another_source_and_ends_nothing_else() {
    let folder = folder();
    let source = NodeProcess::source(folder.path(), "source");
    for name in ["one", "two"] {
        let line = format!("region create {name} --size 4KiB --shared");
        assert_eq!(run_on(&source, &line, b"").code, Some(0));
        let wrote = run_on(&source, &format!("region write {name}"), name.as_bytes());
        assert_eq!(wrote.code, Some(0));
    }
    let path = folder.path().join("node.toml");
    let write = |region: &str, local: &str| {
        let follow = format!("tcp://{}/{region}={local}", source.listen());
        let text = format!("follow = [\"{follow}\", \"tcp://127.0.0.1:1/x=own\"]\n");
        std::fs::write(&path, text).expect("a file");
    };
    write("one", "copy");
    let path_text = path.to_str().expect("a path in ASCII");
    let node = NodeProcess::start(folder.path(), "node", &["--config", path_text]);
    let mut expected = vec![0; 4096];
    expected[..3].copy_from_slice(b"one");
    await_content(&node, "copy", &expected);
    // A region that only has the name of something once followed.
    assert_eq!(run_on(&node, "region remove own", b"").code, Some(0));
    let made = run_on(&node, "region create own --size 4KiB", b"");
    assert_eq!(made.code, Some(0));
    write("two", "copy");
    node.signal(nix::sys::signal::Signal::SIGHUP);
    expected[..3].copy_from_slice(b"two");
    await_content(&node, "copy", &expected);
    std::fs::write(&path, "follow = []\n").expect("a file");
    node.signal(nix::sys::signal::Signal::SIGHUP);
    await_that("nothing is followed", || node.region("copy").is_none());
    assert!(
        node.region("own").is_some(),
        "a reload ended another region"
    );
}

#[test]
fn a_mapping_that_is_gone_is_noticed_although_it_scans_as_clean() {
    let folder = folder();
    let (source, follower) = pair(folder.path(), "r");
    let name = "r".parse().expect("a name");
    let options = RegionOptions::default();
    let region = Region::create(&name, MIB, &options).expect("a region");
    let attachment = Attachment::for_region(region.mapping(), Mode::Async).expect("tracking");
    let half_a_minute = Some(30_000_000);
    let offer = Request::HandOver(HandOver {
        name: "r".into(),
        size: MIB,
        max_size: None,
        mode: Mode::Async,
        publish: Publish::Timer,
        shared: true,
        base: region.mapping().address(),
        interval_min_us: half_a_minute,
        interval_max_us: half_a_minute,
        chosen: None,
        kind: WriteKind::Exclusive,
        slot: None,
    });
    let fds = [
        region.data_fd(),
        region.control_fd(),
        attachment.pidfd.as_fd(),
        attachment.uffd.as_ref().expect("async").as_fd(),
        attachment.pagemap.as_ref().expect("async").as_fd(),
    ];
    let link = unix_connect(source.socket()).expect("the node listens");
    let request = control::encode(&offer, b"").expect("a request");
    send_with_fds(&link, &request, &fds).expect("a request");
    await_following(&follower, "r");
    region.write(5000, b"the last store").expect("it is inside");
    // Unmapped by a process that lives on and keeps its link.
    drop(region);
    let mut expected = vec![0; MIB as usize];
    expected[5000..5014].copy_from_slice(b"the last store");
    await_content(&follower, "r", &expected);
    let loss = source.region("r").expect("it is there").last_loss;
    assert!(loss.is_some_and(|loss| loss.contains("unmapped")));
    drop(link);
}
