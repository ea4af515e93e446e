//! One source and its replicas, driven by a seed and a virtual clock.

use std::time::{Duration, Instant};

use uffd_sync::limits::RESUME_WINDOW_MS;
use uffd_sync::replicate::{ReplicaKey, ShipperId};
use uffd_sync::wire::{Ack, FLAG_WHOLE, FrameBuilder, HEADER_BYTES, Kind, Subscribe, parse_header};

use crate::link::{Link, Read};
use crate::replica::{Replica, Stats};
use crate::rng::Rng;
use crate::source::{HANDLE, Source};

const TICK: Duration = Duration::from_millis(50);
/// Most turns that it may take until all is equal once faults have ended.
const SETTLE_TICKS: u64 = 3_000;

/// A rule that is broken on purpose: the simulator has to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    /// The code as it is.
    None,
    /// Captures change pinned pages without putting them aside.
    NoPreImages,
    /// Updates are applied whatever they build on.
    NoBaseCheck,
    /// An update of a capture that began anew is sent on.
    NoGivingUp,
    /// Extents leave when they are sent, not when they are acknowledged.
    DropAtSend,
}

/// How often what goes wrong: once in so many turns or frames, 0 is never.
#[derive(Clone, Copy, Debug)]
struct Faults {
    cut: u64,
    replica_restart: u64,
    replica_take_over: u64,
    source_restart: u64,
    source_reborn: u64,
    stall: u64,
    /// A capture loses track in the middle.
    lose_tracking: u64,
    /// The source forgets who went away.
    forget: u64,
    /// Of the cuts: the source learns of them from the next subscription only.
    half_open: u64,
    damage: u64,
    loss: u64,
    duplicate: u64,
}

const NO_FAULTS: Faults = Faults {
    cut: 0,
    replica_restart: 0,
    replica_take_over: 0,
    source_restart: 0,
    source_reborn: 0,
    stall: 0,
    lose_tracking: 0,
    forget: 0,
    half_open: 0,
    damage: 0,
    loss: 0,
    duplicate: 0,
};

struct Peer {
    replica: Replica,
    link: Option<Link>,
    shipper: Option<ShipperId>,
    /// Round of the last info, for the control that fakes acks.
    round: u32,
    stalled: u64,
    redial: u64,
    rate: usize,
    /// Bytes that it applies in one step, and the most steps in a turn.
    apply: (u64, u64),
}

pub(crate) struct World {
    rng: Rng,
    now: Instant,
    source: Source,
    peers: Vec<Peer>,
    faults: Faults,
    frame_faults: bool,
    control: Control,
    ticks: u64,
    capture_pages: u64,
    commit_every: u64,
    pub(crate) cuts: u64,
}

/// What a run went through, to see that it went through something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    pub(crate) replicas: Stats,
    pub(crate) epochs: u64,
    pub(crate) put_off: u64,
    pub(crate) aborted: u64,
    pub(crate) early: u64,
    pub(crate) lost: u64,
    pub(crate) cuts: u64,
}

impl World {
    pub(crate) fn new(seed: u64, replicas: usize, control: Control) -> Self {
        let mut rng = Rng::new(seed);
        let size = rng.pick(&[5_000, 40_000, 100_000, 300_000, 420_001, 900_000]);
        let preimages = rng.pick(&[8_192, 65_536, 1 << 20]);
        let often = |rng: &mut Rng, n: u64| if rng.once_in(3) { n } else { 0 };
        let frame_faults = rng.once_in(2) || control == Control::NoBaseCheck;
        let faults = Faults {
            cut: often(&mut rng, 40).max(120),
            replica_restart: often(&mut rng, 150),
            replica_take_over: often(&mut rng, 200),
            source_restart: often(&mut rng, 150),
            source_reborn: often(&mut rng, 200),
            stall: often(&mut rng, 60),
            lose_tracking: often(&mut rng, 12),
            forget: often(&mut rng, 8),
            half_open: often(&mut rng, 2),
            damage: if frame_faults { 40 } else { 0 },
            loss: if frame_faults { 40 } else { 0 },
            duplicate: if frame_faults { 60 } else { 0 },
        };
        let mut source = Source::new(size, preimages);
        source.no_pre_images = control == Control::NoPreImages;
        source.no_giving_up = control == Control::NoGivingUp;
        let peers = (0..replicas)
            .map(|_| {
                let budget = rng.pick(&[20_000, 350_000, 1 << 30]);
                Peer {
                    replica: Replica::new(size, budget),
                    link: None,
                    shipper: None,
                    round: 0,
                    stalled: 0,
                    redial: rng.below(10),
                    apply: rng.pick(&[(1_000, 2), (20_000, 4), (1 << 20, 6)]),
                    rate: rng.pick(&[3_000, 20_000, 100_000, 2_000_000]),
                }
            })
            .collect();
        Self {
            now: Instant::now(),
            source,
            peers,
            faults,
            frame_faults,
            control,
            ticks: 60 + rng.below(90),
            capture_pages: rng.pick(&[2, 20, 1000]),
            commit_every: rng.pick(&[1, 3, 9]),
            rng,
            cuts: 0,
        }
    }

    /// Runs to the end.
    pub(crate) fn run(mut self) -> Result<Report, String> {
        for _ in 0..self.ticks {
            self.write();
            self.break_things();
            self.turn()?;
        }
        self.faults = NO_FAULTS;
        self.source.store(0, 1, self.rng.next() | 1 << 7);
        let mut settled = 0;
        while !self.is_equal() {
            settled += 1;
            if settled > SETTLE_TICKS {
                return Err(self.why_not_equal());
            }
            for peer in &mut self.peers {
                peer.stalled = 0;
                peer.apply = (1 << 20, 8);
            }
            if !self.source.is_captured() && !self.source.is_capturing() {
                self.source.begin_capture(true);
            }
            self.turn()?;
        }
        Ok(self.report())
    }

    fn report(&self) -> Report {
        let mut report = Report {
            epochs: self.source.epoch,
            put_off: self.source.put_off,
            aborted: self.source.aborted,
            early: self.source.early,
            lost: self.source.lost,
            cuts: self.cuts,
            ..Report::default()
        };
        for peer in &self.peers {
            let (sum, stats) = (&mut report.replicas, peer.replica.stats);
            sum.shown += stats.shown;
            sum.in_place += stats.in_place;
            sum.in_parts += stats.in_parts;
            sum.ignored += stats.ignored;
            sum.dropped += stats.dropped;
        }
        report
    }

    fn write(&mut self) {
        if !self.rng.once_in(3) {
            self.source.random_stores(&mut self.rng);
        }
        if self.rng.once_in(self.commit_every) {
            let commit = self.rng.once_in(2);
            self.source.begin_capture(commit);
        }
    }

    fn turn(&mut self) -> Result<(), String> {
        self.now += TICK;
        let pages = 1 + self.rng.below(self.capture_pages);
        self.source.step_capture(pages);
        for index in 0..self.peers.len() {
            if self.peers[index].link.is_none() {
                self.dial(index);
                continue;
            }
            self.source_turn(index)?;
            self.replica_turn(index)?;
        }
        self.source.publication.forget(self.now);
        Ok(())
    }

    fn dial(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        peer.redial = peer.redial.saturating_sub(1);
        if peer.redial > 0 {
            return;
        }
        let name = "region".parse().expect("it is a name");
        let mut wish = peer.replica.applier.subscribe(name, 3);
        if self.control == Control::DropAtSend && wish.have_epoch.is_some() {
            wish.have_epoch = Some(self.source.epoch);
        }
        let mut link = Link::default();
        link.up.send(&wish.encode());
        peer.link = Some(link);
    }

    /// The link breaks; `keep` bytes of what was under way still arrive.
    fn cut(&mut self, index: usize, keep: u64) {
        let peer = &mut self.peers[index];
        let Some(mut link) = peer.link.take() else {
            return;
        };
        self.cuts += 1;
        link.down.carry(keep as usize);
        // What arrived before is still read; an error there changes nothing.
        let _ = peer.replica.receive(self.now, &mut link.down);
        peer.replica.applier.disconnected();
        peer.redial = 1 + self.rng.below(8);
        if let Some(id) = peer.shipper.take()
            && !self.rng.once_in(self.faults.half_open)
        {
            self.source.publication.disconnected(id, self.now);
        }
    }

    fn source_turn(&mut self, index: usize) -> Result<(), String> {
        let peer = &mut self.peers[index];
        if let Some(link) = &mut peer.link {
            link.up.carry(peer.rate);
        }
        loop {
            let Some(link) = &mut self.peers[index].link else {
                return Ok(());
            };
            match link.up.read() {
                Read::Nothing { .. } => break,
                Read::Broken(error) => return Err(error.to_string()),
                Read::Damaged(header) => return Err(format!("damaged: {header:?}")),
                Read::Frame(header, body) if header.kind == Kind::Subscribe => {
                    let wish = Subscribe::decode(&header, &body).map_err(|e| e.to_string())?;
                    self.subscribed(index, &wish)?;
                }
                Read::Frame(header, body) => {
                    let id = self.peers[index].shipper.ok_or("no subscription")?;
                    let publication = &mut self.source.publication;
                    let taken = publication.handle_frame(id, self.now, &header, &body);
                    if let Err(error) = taken
                        && self.control == Control::None
                    {
                        return Err(format!("the source refuses: {error:?}"));
                    }
                }
            }
        }
        self.ship(index);
        Ok(())
    }

    fn subscribed(&mut self, index: usize, wish: &Subscribe) -> Result<(), String> {
        let mut node = [0; 16];
        node[0] = index as u8;
        let key = ReplicaKey {
            node,
            subscription: wish.subscription,
            name: String::new(),
        };
        let present = self.source.present();
        let publication = &mut self.source.publication;
        let (id, info) = publication
            .subscribe(self.now, key, wish, &present)
            .map_err(|e| e.to_string())?;
        let peer = &mut self.peers[index];
        peer.shipper = Some(id);
        peer.round = info.round;
        if let Some(link) = &mut peer.link {
            link.down.send(&info.encode());
        }
        Ok(())
    }

    /// Fills the send queue of one connection.
    fn ship(&mut self, index: usize) {
        let Some(id) = self.peers[index].shipper else {
            return;
        };
        let steps = self.rng.below(4);
        let source = &mut self.source;
        source.publication.digest_step(id, &source.content, steps);
        loop {
            let Some(link) = &self.peers[index].link else {
                return;
            };
            if link.down.unsent() > self.peers[index].rate * 2 {
                return;
            }
            let source = &mut self.source;
            let early = !matches!(self.control, Control::NoBaseCheck | Control::DropAtSend);
            let Some(out) = source.poll(id, self.now, early) else {
                return;
            };
            self.send_down(index, out.as_ref());
            self.fake_ack(index, id, out.as_ref());
        }
    }

    fn fake_ack(&mut self, index: usize, id: ShipperId, frame: &[u8]) {
        if self.control != Control::DropAtSend {
            return;
        }
        let header = header_of(frame);
        if matches!(header.kind, Kind::SingleUpdate | Kind::EndUpdate) {
            let (round, epoch) = (self.peers[index].round, header.epoch);
            let ack = Ack { round, epoch };
            // Refused while nothing is claimable: the control needs no more.
            let _ = self.source.publication.handle_ack(id, self.now, &ack);
        }
    }

    /// Puts a frame on the wire, or not, or twice, or with a bit flipped.
    fn send_down(&mut self, index: usize, frame: &[u8]) {
        let header = header_of(frame);
        let mut frame = frame.to_vec();
        if header.kind == Kind::RegionInfo {
            self.peers[index].round = self.peers[index].round.wrapping_add(1);
        }
        let unchecked = matches!(self.control, Control::NoBaseCheck | Control::DropAtSend);
        if unchecked && matches!(header.kind, Kind::SingleUpdate | Kind::StartUpdate) {
            let flags = header.flags | FLAG_WHOLE;
            let mut whole = FrameBuilder::new(header.kind, flags, HANDLE, header.epoch);
            whole.put(&[0; 4]).put(&frame[HEADER_BYTES + 4..]);
            frame = whole.finish();
        }
        let mut times = 1;
        if header.kind.is_update() {
            if self.rng.once_in(self.faults.loss) {
                times = 0;
            } else if self.rng.once_in(self.faults.duplicate) {
                times = 2;
            } else if self.rng.once_in(self.faults.damage) && header.body_len > 0 {
                let bit = self.rng.below(u64::from(header.body_len) * 8) as usize;
                frame[HEADER_BYTES + bit / 8] ^= 1 << (bit % 8);
            }
        }
        if let Some(link) = &mut self.peers[index].link {
            (0..times).for_each(|_| link.down.send(&frame));
        }
    }

    fn replica_turn(&mut self, index: usize) -> Result<(), String> {
        let peer = &mut self.peers[index];
        if peer.stalled > 0 {
            peer.stalled -= 1;
            return Ok(());
        }
        let Some(link) = &mut peer.link else {
            return Ok(());
        };
        link.down.carry(peer.rate);
        let read = peer.replica.receive(self.now, &mut link.down);
        let (bytes, steps) = peer.apply;
        for _ in 0..self.rng.below(steps + 1) {
            peer.replica.apply(bytes, &self.source.history)?;
        }
        peer.replica
            .send(self.now, &mut link.up, self.rng.below(30));
        if self.rng.once_in(10) {
            peer.replica.check(&self.source.history)?;
        }
        match read {
            Ok(()) => Ok(()),
            // Frames that came twice or not at all may well be refused.
            Err(_) if self.frame_faults || self.control != Control::None => {
                self.cut(index, 0);
                Ok(())
            }
            Err(error) => Err(format!("the replica refuses: {error}")),
        }
    }

    fn break_things(&mut self) {
        for index in 0..self.peers.len() {
            if self.rng.once_in(self.faults.cut) {
                let keep = self.rng.below(300_000);
                self.cut(index, keep);
            }
            if self.rng.once_in(self.faults.stall) {
                self.peers[index].stalled = self.rng.below(200);
            }
            let size = self.source.content.len() as u64;
            if self.rng.once_in(self.faults.replica_restart) {
                self.cut(index, 0);
                let peer = &mut self.peers[index];
                let stats = peer.replica.stats;
                peer.replica = Replica::new(size, peer.replica.budget);
                peer.replica.stats = stats;
            }
            if self.rng.once_in(self.faults.replica_take_over) {
                self.cut(index, 0);
                self.peers[index].replica.taken_over();
            }
        }
        if self.rng.once_in(self.faults.forget) {
            let later = self.now + Duration::from_millis(RESUME_WINDOW_MS);
            self.source.publication.forget(later);
        }
        if self.rng.once_in(self.faults.lose_tracking) {
            self.source.lose_tracking();
        }
        if self.rng.once_in(self.faults.source_restart) {
            self.source.random_stores(&mut self.rng);
            self.source.restarted();
        }
        if self.rng.once_in(self.faults.source_reborn) {
            (0..self.peers.len()).for_each(|index| self.cut(index, 9_999));
            self.source.reborn();
        }
    }

    fn is_equal(&self) -> bool {
        let shown = Some((self.source.generation, self.source.epoch));
        self.source.is_captured()
            && self.peers.iter().all(|peer| {
                peer.replica.shown == shown
                    && peer.replica.is_idle()
                    && peer.replica.memory == self.source.content
            })
    }

    fn why_not_equal(&self) -> String {
        let mut why = format!(
            "not equal after {SETTLE_TICKS} quiet turns; source at {:?}, capturing {}",
            (self.source.generation, self.source.epoch),
            self.source.is_capturing()
        );
        for peer in &self.peers {
            let status = peer
                .shipper
                .and_then(|id| self.source.publication.status(id));
            let quiet = peer
                .link
                .as_ref()
                .map(|link| (link.down.is_quiet(), link.up.is_quiet()));
            why += &format!(
                "\n  shown {:?}, {:?}, quiet {quiet:?}, {status:?}, {:?}",
                peer.replica.shown,
                peer.replica.applier.state(),
                peer.replica.applier,
            );
        }
        why
    }
}

fn header_of(frame: &[u8]) -> uffd_sync::wire::Header {
    let head = frame.first_chunk::<HEADER_BYTES>();
    parse_header(head.expect("a frame has a header")).expect("it was just made")
}
