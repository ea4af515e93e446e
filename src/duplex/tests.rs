//! The two sides over one memory, in one thread.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

fn segment(payload: u64) -> Segment {
    Segment::create(&BufferConfig::new(256, payload).slots(8)).expect("segment")
}

pub(super) fn opened(segment: &Segment) -> Segment {
    let fds = segment.fds().into_iter().map(|fd| fd.try_clone_to_owned());
    let fds = fds.collect::<Result<_, _>>().expect("descriptors");
    Segment::open(fds, OpenLimits::default()).expect("open")
}

pub(super) fn sides(payload: u64) -> (ClientCore, ServerCore) {
    let segment = segment(payload);
    let server = ServerCore::new(&segment, 1);
    (ClientCore::new(&opened(&segment)), server)
}

fn options(capacity: usize) -> Options {
    Options {
        capacity,
        one_way: false,
    }
}

/// Serves one request by adding 1 to each byte.
fn serve(server: &ServerCore) {
    let mut posts = Posts::new();
    let claim = server.claim(&mut posts).expect("a request");
    server.begin_handler(&claim);
    let len = claim.len();
    server
        .bytes(&claim, len)
        .update_chunks(|_, chunk| chunk.iter_mut().for_each(|byte| *byte += 1));
    server.respond(claim, len, &mut posts);
    assert_eq!(server.is_post_due(&posts), !server.has_request());
    assert!(!server.post(&mut posts));
}

#[test]
fn requests_of_every_size_come_back_changed() {
    let (mut client, server) = sides(64 << 10);
    for len in [0, 1, 7, 8, 16, 47, 48, 63, 64, 111, 112, 113, 4096, 40_000] {
        let request: Vec<u8> = (0..len).map(|i| i as u8 % 251).collect();
        let sequence = client.submit(&request, Options::default()).expect("submit");
        client.kick();
        assert_eq!(client.poll(sequence), Poll::Pending);
        serve(&server);
        assert_eq!(client.poll_any(true), Some(sequence));
        assert_eq!(client.poll(sequence), Poll::Response);
        let response = client.response(sequence).expect("response").to_vec();
        assert_eq!(response.len(), len);
        assert!(
            response
                .iter()
                .zip(&request)
                .all(|(new, old)| *new == old + 1)
        );
        assert!(client.release(sequence));
        assert!(!client.release(sequence));
        assert_eq!(client.poll(sequence), Poll::Unknown);
    }
}

#[test]
fn grants_are_filled_in_place_and_sent_in_any_order() {
    let (mut client, server) = sides(1 << 20);
    let mut large = client.acquire(100_000, Options::default()).expect("room");
    let mut small = client.acquire(5, options(INLINE_BYTES)).expect("room");
    let never = client.acquire(70_000, Options::default()).expect("room");
    client
        .write(&mut large, 99_990, b"0123456789")
        .expect("write");
    client.write(&mut small, 0, b"abcde").expect("write");
    assert!(client.write(&mut small, 1, b"abcde").is_err());
    assert_eq!(client.publish(small), 1);
    client.abandon(never);
    assert_eq!(client.publish(large), 2);
    client.kick();
    serve(&server);
    serve(&server);
    assert_eq!(client.poll_any(true), Some(1));
    assert_eq!(client.poll_any(true), Some(2));
    let mut tail = [0; 10];
    client
        .response(2)
        .expect("response")
        .read(99_990, &mut tail)
        .expect("read");
    assert_eq!(&tail, b"123456789:");
}

#[test]
fn refusals_change_nothing() {
    let (mut client, server) = sides(1024);
    let too_large = AcquireError::TooLarge {
        len: 961,
        largest: 960,
    };
    assert_eq!(client.submit(&[0; 961], Options::default()), Err(too_large));
    assert_eq!(client.submit(&[0; 5], options(961)), Err(too_large));
    client
        .submit(&[0; 960], Options::default())
        .expect("all of it");
    assert_eq!(
        client.submit(&[0; INLINE_BYTES + 1], Options::default()),
        Err(AcquireError::Full)
    );
    for _ in 1..8 {
        client
            .submit(&[0; INLINE_BYTES], Options::default())
            .expect("a slot");
    }
    assert_eq!(
        client.submit(b"", Options::default()),
        Err(AcquireError::Full)
    );
    assert!(client.acquire(1, Options::default()).is_err());
    let status = {
        client.kick();
        client.segment().status().expect("status")
    };
    assert_eq!((status.requests, status.free_bytes), (8, 0));
    server.segment().stop(Side::Server);
    assert_eq!(
        client.submit(b"", Options::default()),
        Err(AcquireError::Stopped)
    );
}

#[test]
fn the_oiebs_equal_the_control_block_after_mirroring() {
    let (mut client, server) = sides(64 << 10);
    for _ in 0..3 {
        client
            .submit(&[1; 1000], Options::default())
            .expect("submit");
    }
    client.kick();
    for _ in 0..2 {
        serve(&server);
    }
    assert!(client.poll_any(true).is_some());
    client.mirror();
    server.mirror();
    let segment = client.segment();
    let (request, response) = (segment.oieb(Side::Client), segment.oieb(Side::Server));
    assert_eq!(request.operation_size, 88 | 2 << 32);
    assert_eq!(request.payload_size, 64 << 10);
    assert_eq!(request.payload_free_bytes, (64 << 10) - 3 * (1024 + 64));
    assert_eq!(request.payload_free_bytes, response.payload_free_bytes);
    assert_eq!(request.payload_written_count, 3);
    assert_eq!(request.payload_written_bytes, 3000);
    assert_eq!(request.payload_read_count, 2);
    assert_eq!(response.payload_written_count, 2);
    assert_eq!(response.payload_written_bytes, 2000);
    assert_eq!(response.payload_read_count, 1);
    let pid = u64::from(std::process::id());
    for oieb in [request, response] {
        assert_eq!((oieb.writer_pid, oieb.reader_pid), (pid, pid));
    }
    let status = segment.status().expect("status");
    assert_eq!(status.requests, request.payload_written_count);
    assert_eq!(status.requests_read, request.payload_read_count);
    assert_eq!(status.responses, response.payload_written_count);
    assert_eq!(status.responses_read, response.payload_read_count);
    assert_eq!(status.free_bytes, request.payload_free_bytes);
}

#[test]
fn a_cancelled_request_is_skipped_and_gives_itself_back() {
    let (mut client, server) = sides(4096);
    let first = client
        .submit(&[1; 1000], Options::default())
        .expect("submit");
    let second = client
        .submit(&[2; 1000], Options::default())
        .expect("submit");
    assert!(client.cancel(first) && !client.cancel(first));
    assert_eq!(client.poll(first), Poll::Unknown);
    let mut posts = Posts::new();
    let claim = server.claim(&mut posts).expect("request");
    assert!(claim.is_cancelled());
    server.skip(claim, &mut posts);
    serve(&server);
    assert_eq!(client.poll_any(true), Some(second));
    assert!(!client.cancel(second) && client.release(second));
    assert_eq!(client.poll_any(true), None);
    assert!(client.reap_all());
    assert_eq!(client.in_flight(), 0);
    client.kick();
    client.mirror();
    assert_eq!(client.segment().status().expect("status").free_bytes, 4096);
}

#[test]
fn a_new_server_takes_over_where_the_old_one_died() {
    let (mut client, old) = sides(4096);
    let sent: Vec<_> = (0..5)
        .map(|_| {
            client
                .submit(&[1; 100], Options::default())
                .expect("submit")
        })
        .collect();
    client.kick();
    let mut posts = Posts::new();
    let first = old.claim(&mut posts).expect("request");
    old.respond(first, 100, &mut posts);
    let second = old.claim(&mut posts).expect("request");
    old.begin_handler(&second);
    client
        .submit(
            b"one-way",
            Options {
                one_way: true,
                ..options(0)
            },
        )
        .expect("submit");
    drop((old, second));
    let lost = client.server_died();
    assert_eq!(lost, [(2, true), (3, false), (4, false), (5, false)]);
    assert_eq!(client.poll_any(true), Some(1));
    assert_eq!(client.poll(1), Poll::Response);
    assert!(sent.iter().all(|sequence| client.release(*sequence)));
    let new = ServerCore::take_over(client.segment(), 1);
    assert_eq!(client.segment().generation(), 2);
    for round in 0..40 {
        let a = client
            .submit(&[round; 100], Options::default())
            .expect("submit");
        let b = client
            .submit(&[round; 10], Options::default())
            .expect("submit");
        client.kick();
        serve(&new);
        serve(&new);
        assert_eq!(
            [client.poll_any(true), client.poll_any(true)],
            [Some(a), Some(b)]
        );
        assert!(client.release(b) && client.release(a));
    }
}

#[test]
fn what_was_received_by_its_number_is_not_told_again() {
    let (mut client, server) = sides(4096);
    let [first, second] = [(); 2].map(|()| {
        let sent = client.submit(b"x", Options::default());
        sent.expect("room")
    });
    client.kick();
    serve(&server);
    serve(&server);
    assert!(client.server_died().is_empty(), "all were answered");
    assert_eq!(client.poll(first), Poll::Response);
    assert!(client.release(first));
    assert_eq!(client.poll_any(true), Some(second));
    assert!(client.release(second));
    assert_eq!(client.poll_any(true), None);
    // What nobody asks for by any number does not add up either.
    for _ in 0..100 {
        let server = ServerCore::take_over(client.segment(), 1);
        let sent = client.submit(b"x", Options::default()).expect("room");
        client.kick();
        serve(&server);
        assert!(client.server_died().is_empty());
        assert!(client.release(sent));
    }
    assert!(client.finished.len() <= 1);
}

/// Kind and length in the header of the block at `unit`.
fn header_at(segment: &Segment, unit: u64) -> (u64, u64) {
    let words = segment.payload().words(64 * unit, 2).expect("a header");
    let word = |at: usize| words[at].load(std::sync::atomic::Ordering::Relaxed);
    (word(0), word(1) / 64)
}

/// Three frames: of every length, behind it a short one that is held, and one of every
/// length that finds its place behind that, at the beginning, or nowhere.
#[test]
fn a_channel_wraps_at_every_offset() {
    use super::layout::block::{FRAME, WRAP};
    const UNITS: u64 = 64;
    let (mut client, server) = sides(64 * UNITS);
    let send = |client: &mut ClientCore, fill: u8, units: u64| {
        let data = vec![fill; 64 * (units as usize - 1)];
        let sent = client.submit(&data, Options::default())?;
        client.kick();
        serve(&server);
        assert_eq!(client.poll(sent), Poll::Response);
        Ok::<_, AcquireError>(sent)
    };
    for first in 3..UNITS - 3 {
        let tail = first + 3;
        for third in 3..=UNITS {
            let a = send(&mut client, 1, first).expect("all is free");
            let b = send(&mut client, 10, 3).expect("it fits behind");
            assert!(client.release(a));
            let placed = match third {
                _ if third <= UNITS - tail => Some(tail),
                _ => (third <= first).then_some(0),
            };
            match (send(&mut client, 20, third), placed) {
                (Ok(c), Some(at)) => {
                    let segment = client.segment();
                    assert_eq!(header_at(segment, at), (FRAME.into(), third));
                    if at == 0 && tail < UNITS {
                        let marker = (WRAP.into(), UNITS - tail);
                        assert_eq!(header_at(segment, tail), marker, "{first} {third}");
                    }
                    for (sequence, byte) in [(b, 11), (c, 21)] {
                        let bytes = client.response(sequence).expect("held").to_vec();
                        assert!(bytes.iter().all(|found| *found == byte), "{first} {third}");
                    }
                    assert!(client.release(c));
                }
                (Err(AcquireError::Full), None) => {}
                (found, expected) => panic!("{first} {third}: {found:?}, {expected:?}"),
            }
            assert!(client.release(b));
        }
    }
}

/// What a test does to a channel in one step.
#[derive(Clone, Debug)]
enum Step {
    Send {
        len: usize,
        capacity: usize,
        one_way: bool,
    },
    Claim,
    Answer {
        pick: usize,
        grow: bool,
    },
    Receive,
    Poll {
        pick: usize,
    },
    Cancel {
        pick: usize,
    },
    Release {
        pick: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![0usize..90, 0usize..1500];
    prop_oneof![
        4 => (len.clone(), len, prop::bool::weighted(0.15))
            .prop_map(|(len, capacity, one_way)| Step::Send { len, capacity, one_way }),
        4 => Just(Step::Claim),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(pick, grow)| Step::Answer { pick, grow }),
        3 => Just(Step::Receive),
        1 => any::<usize>().prop_map(|pick| Step::Poll { pick }),
        1 => any::<usize>().prop_map(|pick| Step::Cancel { pick }),
        3 => any::<usize>().prop_map(|pick| Step::Release { pick }),
    ]
}

/// A channel as queues of plain vectors.
#[derive(Default)]
struct Naive {
    /// Sent, with content; not taken.
    requests: VecDeque<(Sequence, Vec<u8>)>,
    /// In the server's hands.
    busy: Vec<(Claim, Vec<u8>)>,
    /// Answered, not received; in the order of answers.
    answered: Vec<(Sequence, Vec<u8>)>,
    /// Received, not released.
    held: Vec<(Sequence, Vec<u8>)>,
    cancelled: Vec<Sequence>,
    one_way: Vec<Sequence>,
}

struct Run {
    client: ClientCore,
    server: ServerCore,
    posts: Posts,
    naive: Naive,
    fill: u8,
    sent: u64,
}

impl Run {
    fn take(&mut self, step: &Step) {
        match *step {
            Step::Send {
                len,
                capacity,
                one_way,
            } => self.send(len, capacity, one_way),
            Step::Claim => self.claim(),
            Step::Answer { pick, grow } => self.answer(pick, grow),
            Step::Receive => {
                if let Some(sequence) = self.client.poll_any(true) {
                    self.received(sequence);
                } else {
                    assert!(self.naive.answered.is_empty(), "an answer was missed");
                }
            }
            Step::Poll { pick } => {
                if !self.naive.answered.is_empty() {
                    let (sequence, _) = self.naive.answered[pick % self.naive.answered.len()];
                    if pick.is_multiple_of(2)
                        && let Some(place) = self.client.take_alone(sequence, 0)
                    {
                        let (_, content) = self.naive.answered.remove(0);
                        let bytes = self.client.segment().frame_bytes(place).to_vec();
                        assert_eq!(bytes, content);
                        self.naive.held.push((sequence, content));
                        return;
                    }
                    assert_eq!(self.client.poll(sequence), Poll::Response);
                    self.received(sequence);
                }
            }
            Step::Cancel { pick } => {
                let waiting: Vec<_> = self.naive.requests.iter().map(|(n, _)| *n).collect();
                let waiting: Vec<_> = waiting
                    .into_iter()
                    .filter(|n| {
                        !self.naive.one_way.contains(n) && !self.naive.cancelled.contains(n)
                    })
                    .collect();
                if !waiting.is_empty() {
                    let sequence = waiting[pick % waiting.len()];
                    assert!(self.client.cancel(sequence));
                    self.naive.cancelled.push(sequence);
                }
            }
            Step::Release { pick } => {
                if !self.naive.held.is_empty() {
                    let index = pick % self.naive.held.len();
                    let (sequence, content) = self.naive.held.remove(index);
                    let bytes = self.client.response(sequence).expect("held").to_vec();
                    assert_eq!(bytes, content, "changed while it was held");
                    assert!(self.client.release(sequence));
                }
            }
        }
    }

    fn send(&mut self, len: usize, capacity: usize, one_way: bool) {
        self.fill = self.fill.wrapping_add(1);
        let content = vec![self.fill; len];
        if !one_way
            && capacity <= len
            && self.fill.is_multiple_of(2)
            && let Some(sequence) = self.client.send_alone(&content)
        {
            let naive = &self.naive;
            assert!(naive.held.is_empty() && naive.answered.is_empty(), "alone");
            self.sent += 1;
            self.naive.requests.push_back((sequence, content));
            return;
        }
        match self.client.submit(&content, Options { capacity, one_way }) {
            Ok(sequence) => {
                self.sent += 1;
                if one_way {
                    self.naive.one_way.push(sequence);
                }
                if !self.fill.is_multiple_of(3) {
                    self.client.kick();
                }
                self.naive.requests.push_back((sequence, content));
            }
            Err(AcquireError::Full) => {
                let naive = &self.naive;
                let idle = naive.requests.is_empty() && naive.busy.is_empty();
                assert!(
                    !idle || !naive.answered.is_empty() || !naive.held.is_empty(),
                    "full, and nothing is in it"
                );
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn claim(&mut self) {
        self.client.kick();
        let claim = self.server.claim(&mut self.posts);
        let expected = self.naive.requests.pop_front();
        let (Some(claim), Some((sequence, content))) = (claim, expected) else {
            assert!(!self.server.has_request() && self.naive.requests.is_empty());
            return;
        };
        assert_eq!(claim.sequence(), sequence);
        assert!(!claim.is_malformed());
        assert_eq!(claim.is_one_way(), self.naive.one_way.contains(&sequence));
        assert_eq!(
            claim.is_cancelled(),
            self.naive.cancelled.contains(&sequence)
        );
        assert_eq!(self.server.bytes(&claim, claim.len()).to_vec(), content);
        if claim.is_cancelled() {
            self.server.skip(claim, &mut self.posts);
        } else {
            self.naive.busy.push((claim, content));
        }
    }

    fn answer(&mut self, pick: usize, grow: bool) {
        if self.naive.busy.is_empty() {
            return;
        }
        let (claim, content) = self.naive.busy.remove(pick % self.naive.busy.len());
        let sequence = claim.sequence();
        self.server.begin_handler(&claim);
        let bytes = self.server.bytes(&claim, claim.len());
        assert_eq!(bytes.to_vec(), content, "changed in the server's hands");
        let len = if grow { claim.capacity() } else { claim.len() };
        let response = vec![content.first().map_or(5, |byte| byte ^ 0x55); len];
        self.server
            .bytes(&claim, len)
            .write(0, &response)
            .expect("write");
        let one_way = claim.is_one_way();
        self.server.respond(claim, len, &mut self.posts);
        if !one_way {
            self.naive.answered.push((sequence, response));
        }
    }

    fn received(&mut self, sequence: Sequence) {
        let answered = &mut self.naive.answered;
        let index = answered.iter().position(|(found, _)| *found == sequence);
        let (_, content) = answered.remove(index.expect("an answer that was given"));
        assert_eq!(self.client.poll(sequence), Poll::Response);
        assert_eq!(
            self.client.response(sequence).expect("response").to_vec(),
            content
        );
        self.naive.held.push((sequence, content));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn a_channel_is_a_queue(
        payload in prop_oneof![Just(2048u64), Just(4096), 1600u64..9000],
        workers in 1usize..3,
        steps in prop::collection::vec(step(), 1..400),
    ) {
        let segment = segment(payload);
        let mut run = Run {
            server: ServerCore::new(&segment, workers),
            client: ClientCore::new(&opened(&segment)),
            posts: Posts::new(),
            naive: Naive::default(),
            fill: 0,
            sent: 0,
        };
        for step in &steps {
            run.take(step);
        }
        while !run.naive.requests.is_empty() {
            run.claim();
        }
        while !run.naive.busy.is_empty() {
            run.answer(0, false);
        }
        while !run.naive.answered.is_empty() {
            run.take(&Step::Receive);
        }
        while !run.naive.held.is_empty() {
            run.take(&Step::Release { pick: 0 });
        }
        run.client.reap_all();
        run.client.mirror();
        let free = segment.oieb(Side::Client).payload_free_bytes;
        prop_assert_eq!(free, segment.geometry().payload_size, "all room came back");
        let read = run.server.segment().status().expect("status").requests;
        prop_assert_eq!(read, run.sent);
    }
}

#[test]
fn a_held_response_does_not_block_those_behind_it() {
    let (mut client, server) = sides(1 << 16);
    let send = |client: &mut super::ClientCore| client.submit(b"x", Options::default());
    let first = send(&mut client).expect("submit");
    let held = send(&mut client).expect("submit");
    client.kick();
    serve(&server);
    serve(&server);
    for sequence in [first, held] {
        assert_eq!(client.poll(sequence), Poll::Response);
    }
    assert!(client.release(first));
    // Nothing is in flight, but slot 1 is in use: the next ones go on behind it.
    for _ in 0..3 {
        let sent: Vec<_> = (0..2).map(|_| send(&mut client).expect("room")).collect();
        client.kick();
        for sequence in sent {
            serve(&server);
            assert_eq!(client.poll(sequence), Poll::Response);
            assert!(client.release(sequence));
        }
    }
    assert!(client.release(held));
}
