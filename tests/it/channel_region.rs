//! A channel whose payload is a region: what its server answers reaches the replica on
//! another node.

use std::path::Path;
use std::sync::Arc;

use uffd_sync::client::channel::{ChannelError, DuplexChannelFactory, DuplexClient, NamedServer};
use uffd_sync::client::{ClientOptions, InPlaceDuplexServer, ServerOptions, Writer, WriterOptions};
use uffd_sync::duplex::{BufferConfig, DuplexError, Segment, SharedMemoryView, Waiting};
use uffd_sync::region::Region;
use uffd_sync::words::{Mode, WriteKind};

use super::channel_peer::{ask, handle, join, request};
use super::nodes::{
    NodeProcess, PATIENCE, await_content, await_following, await_that, content, folder,
};

const REGION: &str = "frames";
const SIZE: u64 = 96 << 10;
/// The channel's part of the region.
const START: u64 = 16 << 10;
const LEN: u64 = 64 << 10;

/// A node with a cooperative region that is only marked, a node that follows it, and
/// this process as the region's first writer.
struct Stage {
    writer: Writer,
    follower: NodeProcess,
    source: NodeProcess,
    folder: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let folder = folder();
        let source = NodeProcess::source(folder.path(), "source");
        let options = WriterOptions {
            mode: Mode::Manual,
            kind: WriteKind::Cooperative,
            ..WriterOptions::default()
        };
        let writer = Writer::create(source.socket(), REGION, SIZE, &options).expect("a region");
        let follow = [format!("tcp://{}/{REGION}", source.listen())];
        let follower = NodeProcess::follower(folder.path(), "follower", &follow);
        await_following(&follower, REGION);
        Self {
            writer,
            follower,
            source,
            folder,
        }
    }

    /// What the region holds.
    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        self.writer.read(0, &mut bytes).expect("within the region");
        bytes
    }

    /// Waits until the replica holds what the region does.
    #[track_caller]
    fn await_equal(&self) {
        await_content(&self.follower, REGION, &self.content());
    }
}

fn view_of(region: &Arc<Region>) -> SharedMemoryView {
    SharedMemoryView::of_region(region, START, LEN).expect("a view")
}

fn serve_in(folder: &Path, region: &Arc<Region>) -> Result<NamedServer, ChannelError> {
    let options = ServerOptions {
        waiting: Waiting::Park,
        ..ServerOptions::default()
    };
    let name = "a".parse().expect("a name");
    let factory = DuplexChannelFactory::in_folder(folder);
    let config = BufferConfig::with_view(64, view_of(region)).slots(8);
    let server = factory.create_in_place_server(&name, config, options)?;
    server.start(handle)?;
    Ok(server)
}

/// Calls of every kind, whose frames go round the payload.
#[track_caller]
fn call_all(client: &DuplexClient) {
    let upper = |len: usize| {
        let asked = request(ask::UPPER, len);
        let response = client.call(&asked, PATIENCE).expect("a response");
        assert_eq!(response.copy_to_vec(), asked.to_ascii_uppercase());
        response
    };
    for len in [10, 200, 5000, 20_000, 1, 13_000, 30_000] {
        upper(len);
        let failed = client.call(&request(ask::FAIL, len), PATIENCE).map(drop);
        assert!(matches!(failed, Err(ChannelError::Handler { .. })));
    }
    for _ in 0..3 {
        // With their headers of 64 bytes they take five pages each.
        let first = upper(20 * 1024 - 64);
        let (_second, _third) = (upper(20 * 1024 - 64), upper(20 * 1024 - 64));
        drop(first);
        // Behind the third one there is no room: a marker stands there, in a page that no
        // frame was in, and this lies in the place of the first.
        upper(15_000);
    }
    let items: Vec<Vec<u8>> = (2..40).map(|len| request(ask::UPPER, len)).collect();
    let items: Vec<&[u8]> = items.iter().map(|item| &item[..]).collect();
    let answers = client.call_batch(&items, PATIENCE).expect("an answer");
    assert!(answers.items().all(|item| item.is_ok()));
}

#[test]
fn responses_in_a_region_reach_its_replica() {
    let stage = Stage::new();
    let server = serve_in(stage.folder.path(), stage.writer.region()).expect("a server");
    let mut client = join(stage.folder.path(), "a").expect("a client");
    call_all(&client);
    stage.await_equal();

    // One frame, and where it lies.
    let asked = request(ask::UPPER, 3000);
    let response = client.call(&asked, PATIENCE).expect("a response");
    let at = START + response.view().payload_offset().expect("beyond a slot");
    await_that("the response on the other node", || {
        let seen = content(&stage.follower, REGION).map(|(bytes, _)| bytes);
        let range = at as usize..at as usize + asked.len();
        seen.is_ok_and(|bytes| bytes[range] == asked.to_ascii_uppercase())
    });
    drop(response);

    // The next server is another writer of the region, and goes on with the memory.
    drop(server);
    let second = Writer::attach(stage.source.socket(), REGION).expect("one more writer");
    let _next = serve_in(stage.folder.path(), second.region()).expect("the next server");
    client.reconnect(PATIENCE).expect("it takes over");
    assert_eq!(client.segment().generation(), 2);
    call_all(&client);
    stage.await_equal();
}

#[test]
fn a_server_of_another_region_does_not_take_the_memory_over() {
    let stage = Stage::new();
    let server = serve_in(stage.folder.path(), stage.writer.region()).expect("a server");
    let mut client = join(stage.folder.path(), "a").expect("a client");
    client
        .call(&request(ask::UPPER, 500), PATIENCE)
        .expect("a response");
    drop(server);
    let options = WriterOptions {
        mode: Mode::Manual,
        kind: WriteKind::Cooperative,
        ..WriterOptions::default()
    };
    let other = Writer::create(stage.source.socket(), "other", SIZE, &options).expect("a region");
    let next = serve_in(stage.folder.path(), other.region()).expect("a server");
    let refused = client.reconnect(PATIENCE);
    assert!(
        matches!(refused, Err(ChannelError::Connect(_))),
        "{refused:?}"
    );
    drop(next);
    let _next = serve_in(stage.folder.path(), stage.writer.region()).expect("the right one");
    client.reconnect(PATIENCE).expect("it takes over");
    client
        .call(&request(ask::UPPER, 500), PATIENCE)
        .expect("a response");
    stage.await_equal();
}

/// The control: a view that marks nothing is not followed. What is marked later is.
#[test]
fn what_nobody_marks_does_not_reach_the_replica() {
    let stage = Stage::new();
    let fd = stage.writer.data_fd();
    let view = SharedMemoryView::new(fd, START, LEN).expect("a view");
    let segment = Segment::create(&BufferConfig::with_view(0, view)).expect("a segment");
    let server = InPlaceDuplexServer::new(ServerOptions::default()).expect("a server");
    server.start(handle).expect("a handler");
    let serving = server.serve_segment(&segment, false).expect("served");
    let client = DuplexClient::over(segment, ClientOptions::default()).expect("a client");
    let asked = request(ask::UPPER, 3000);
    let response = client.call(&asked, PATIENCE).expect("a response");
    let at = (START + response.view().payload_offset().expect("beyond a slot")) as usize;
    let mark = |at: u64, byte: u8| {
        stage.writer.write(at, &[byte]).expect("within");
        stage.writer.mark_region_changed(at, 1).expect("within");
        await_that("what was marked on the other node", || {
            let seen = content(&stage.follower, REGION).map(|(bytes, _)| bytes);
            seen.is_ok_and(|bytes| bytes[at as usize] == byte)
        });
    };
    mark(0, 7);
    let (seen, _) = content(&stage.follower, REGION).expect("the replica");
    assert!(seen[at..at + asked.len()].iter().all(|byte| *byte == 0));
    stage
        .writer
        .mark_region_changed(START, LEN)
        .expect("within");
    stage.await_equal();
    drop(response);
    drop(client);
    serving.join();
}

#[test]
fn regions_that_no_channel_can_mark_are_refused() {
    let stage = Stage::new();
    let region = |name: &str, kind, mode| {
        let options = WriterOptions {
            mode,
            kind,
            ..WriterOptions::default()
        };
        Writer::create(stage.source.socket(), name, SIZE, &options).expect("a region")
    };
    let exclusive = region("exclusive", WriteKind::Exclusive, Mode::Manual);
    assert!(matches!(
        SharedMemoryView::of_region(exclusive.region(), 0, LEN),
        Err(DuplexError::ExclusiveRegion)
    ));
    let compared = region("compared", WriteKind::Cooperative, Mode::Compare);
    SharedMemoryView::of_region(compared.region(), 0, LEN).expect("all of it is looked at");
    let region = stage.writer.region();
    for (offset, len) in [
        (64, LEN),
        (START, SIZE),
        (SIZE, 64),
        (u64::MAX - 4095, 4096),
    ] {
        assert!(matches!(
            SharedMemoryView::of_region(region, offset, len),
            Err(DuplexError::OutOfRange(_))
        ));
    }
}
