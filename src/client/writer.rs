//! A region that this process writes, with its link to a node.
//!
//! ```text
//!   stores --> mapping (write-protected) ............ scanned by the engine
//!   commit --> control page, doorbell --> engine
//!
//!   link thread: waits on the control connection; when the engine dies it dials
//!   again with growing pauses and hands the same descriptors over once more
//! ```
//!
//! I1. Stores never wait for a node that is away: the writer goes on. In mode `sync` the
//!     node alone has the userfaultfd, so its death lets every store go on; each
//!     hand-over registers anew.
//! Of a cooperative region each writing process has one of these, over the same memory:
//!
//! ```text
//!   Writer::create, region create    makes the memory, hands it over
//!   Writer::attach                   is given the memory, maps it, arms all of it, hands
//!                                    its mapping over, and only then stores
//! ```
//!
//! I2. While the node is away `commit` says `EngineGone`; what was stored meanwhile
//!     is found by the first capture after the next hand-over, which compares everything.

use std::ops::{Deref, RangeInclusive};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{ClientError, Node};
use crate::limits;
use crate::region::{EngineLink, Pulse, Region, RegionOptions};
use crate::sys::behaviour::Behaviour;
use crate::sys::net;
use crate::sys::process::EventFd;
use crate::track::{Asked, Attachment, Choice, choose};
use crate::wire::control::{HandOver, RefusalCode, Request, Response};
use crate::words::{Mode, Publish, RegionName, WriteKind};

/// How a writer's region is made and tracked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterOptions {
    /// How changes are found. Default `async`. With `auto` one is picked by what the
    /// kernel does and what else is asked for here; [`Region::options`] then has it,
    /// [`Writer::chosen`] and the node's status say why.
    pub mode: Mode,
    /// Whether each epoch has to be an exact instant. Only `auto` looks at it: what
    /// cannot keep the promise is not picked. Default false.
    pub exact: bool,
    /// Whether the program marks whatever it changes. Only `auto` looks at it: without
    /// write-protection it then picks `manual`. Default false.
    pub marks: bool,
    /// When epochs are published. Default `timer`.
    pub publish: Publish,
    /// Who may write the region. Default exclusive; with cooperative further processes
    /// do by [`Writer::attach`], at the price that [`RegionOptions::kind`] names.
    pub kind: WriteKind,
    /// Whether other nodes may follow the region. Default true.
    pub shared: bool,
    /// Shortest pause between timer captures; the node's own if none.
    pub interval_min: Option<Duration>,
    /// Longest pause between timer captures, the staleness limit; the node's own if none.
    pub interval_max: Option<Duration>,
    /// Whether children made by `fork` are left without the memory, as
    /// [`RegionOptions::dont_fork`] says. Default true.
    pub dont_fork: bool,
    /// Whether the mapping is sealed for the life of the process, as
    /// [`RegionOptions::mseal`] says. Default false.
    pub mseal: bool,
    /// Greatest size that [`Region::grow`] may give it, as [`RegionOptions::max_size`]
    /// says. Default none: it does not grow.
    pub max_size: Option<u64>,
    /// Whether its data consists of huge pages, as [`RegionOptions::huge_pages`] says.
    /// Default false.
    pub huge_pages: bool,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Async,
            exact: false,
            marks: false,
            publish: Publish::Timer,
            kind: WriteKind::Exclusive,
            shared: true,
            interval_min: None,
            interval_max: None,
            dont_fork: true,
            mseal: false,
            max_size: None,
            huge_pages: false,
        }
    }
}

impl WriterOptions {
    /// The mode that a region gets with these options in this process, and why.
    ///
    /// # Errors
    /// [`Unmet`](crate::track::Unmet) if `auto` finds no mode that keeps what is asked.
    pub fn choice(&self) -> Result<Choice, ClientError> {
        if self.mode != Mode::Auto {
            return Ok(Choice {
                mode: self.mode,
                reason: "asked for".to_owned(),
            });
        }
        let asked = Asked {
            publish: self.publish,
            exact: self.exact,
            marks: self.marks,
        };
        let choice = choose(asked, Behaviour::of_process())?;
        tracing::info!(mode = %choice.mode, reason = choice.reason, "mode picked");
        Ok(choice)
    }
}

/// A region that this process writes and a node follows.
///
/// It is a [`Region`]: stores through it, or through its pointer, are all it takes.
/// Dropping it ends the region's life: the node ships what was stored last and keeps
/// the content until a new writer takes the name over. A cooperative region lives on in
/// the node, with the writers that are left or without any, until it is removed or the
/// node ends without a writer left.
#[derive(Debug)]
pub struct Writer {
    region: Arc<Region>,
    resumed: bool,
    chosen: Option<String>,
    link: Option<Link>,
}

#[derive(Debug)]
struct Link {
    stop: Arc<AtomicBool>,
    bell: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Deref for Writer {
    type Target = Region;

    fn deref(&self) -> &Region {
        &self.region
    }
}

impl Writer {
    /// Makes the region `name` of `size` bytes and hands its tracking to the node at
    /// `socket`. If the node still has the content of an earlier writer of that name
    /// and size who is gone, the region starts with it: [`Writer::is_resumed`].
    ///
    /// When the node dies the region goes on; a thread dials it until it is back.
    ///
    /// # Errors
    /// If there is no node, the name is taken by a living writer, or this process
    /// cannot track its stores; `uffd-sync doctor` says what the kernel lacks.
    pub fn create(
        socket: impl AsRef<Path>,
        name: &str,
        size: u64,
        options: &WriterOptions,
    ) -> Result<Self, ClientError> {
        let path = socket.as_ref().to_owned();
        let node = Node::connect(&path)?;
        Self::create_on(node, Some(path), name, size, options, |_| Ok(()))
    }

    /// The same over an existing connection, as to an engine inside this program;
    /// if it is lost there is no way back.
    ///
    /// # Errors
    /// As for [`Writer::create`].
    pub fn create_over(
        node: Node,
        name: &str,
        size: u64,
        options: &WriterOptions,
    ) -> Result<Self, ClientError> {
        Self::create_on(node, None, name, size, options, |_| Ok(()))
    }

    /// The same, with a content of its own: `fill` stores it before the node is handed the
    /// region, so that nobody who follows it ever sees it without.
    ///
    /// # Errors
    /// As for [`Writer::create`], and what `fill` says.
    pub fn create_filled_over(
        node: Node,
        name: &str,
        size: u64,
        options: &WriterOptions,
        fill: impl FnOnce(&Region) -> Result<(), ClientError>,
    ) -> Result<Self, ClientError> {
        Self::create_on(node, None, name, size, options, fill)
    }

    fn create_on(
        mut node: Node,
        path: Option<PathBuf>,
        name: &str,
        size: u64,
        options: &WriterOptions,
        fill: impl FnOnce(&Region) -> Result<(), ClientError>,
    ) -> Result<Self, ClientError> {
        let name: RegionName = name.parse()?;
        let Choice { mode, reason } = options.choice()?;
        let chosen = Some(reason).filter(|_| options.mode == Mode::Auto);
        let region_options = RegionOptions {
            mode,
            publish: options.publish,
            kind: options.kind,
            dont_fork: options.dont_fork,
            mseal: options.mseal,
            max_size: options.max_size,
            huge_pages: options.huge_pages,
        };
        let sizes = size..=options.max_size.unwrap_or(size);
        let (region, resumed) = match earlier_content(&mut node, &name, sizes)? {
            // It has grown before.
            Some((old, size)) => (
                Region::create_from(&name, old.as_fd(), size, &region_options)?,
                true,
            ),
            None => (Region::create(&name, size, &region_options)?, false),
        };
        fill(&region)?;
        let attachment = Attachment::for_region(region.mapping(), mode)?;
        let offer = HandOver {
            name: name.to_string(),
            size: region.size(),
            max_size: options.max_size,
            mode,
            publish: options.publish,
            shared: options.shared,
            base: region.mapping().address(),
            interval_min_us: options.interval_min.map(|pause| pause.as_micros() as u64),
            interval_max_us: options.interval_max.map(|pause| pause.as_micros() as u64),
            chosen: chosen.clone(),
            kind: options.kind,
            slot: None,
        };
        let mut writer = Self::hand_over(node, path, region, attachment, offer)?;
        (writer.resumed, writer.chosen) = (resumed, chosen);
        Ok(writer)
    }

    fn hand_over(
        mut node: Node,
        path: Option<PathBuf>,
        region: Region,
        attachment: Attachment,
        offer: HandOver,
    ) -> Result<Self, ClientError> {
        let region = Arc::new(region);
        let mut hand = Hand {
            region: Arc::clone(&region),
            attachment: Some(attachment),
            offer,
        };
        hand.over(&mut node)?;
        let link = Link::start(node, path, hand)?;
        Ok(Self {
            region,
            resumed: false,
            chosen: None,
            link: Some(link),
        })
    }

    /// Attaches to the cooperative region `name` of the node at `socket` as one more of
    /// its writers, under the terms that it was made with; also while others write, and
    /// in the middle of a cut. Costs 60 ns for each page of the region where stores are
    /// found by write-protection.
    ///
    /// # Errors
    /// If there is no node or no such region, it is not cooperative, it belongs to
    /// another user, or it has [`MAX_WRITERS`](crate::limits::MAX_WRITERS) already.
    pub fn attach(socket: impl AsRef<Path>, name: &str) -> Result<Self, ClientError> {
        let path = socket.as_ref().to_owned();
        let node = Node::connect(&path)?;
        Self::attach_on(node, Some(path), name)
    }

    /// The same over an existing connection; if it is lost there is no way back.
    ///
    /// # Errors
    /// As for [`Writer::attach`].
    pub fn attach_over(node: Node, name: &str) -> Result<Self, ClientError> {
        Self::attach_on(node, None, name)
    }

    fn attach_on(mut node: Node, path: Option<PathBuf>, name: &str) -> Result<Self, ClientError> {
        let name: RegionName = name.parse()?;
        let request = Request::Enlist {
            name: name.to_string(),
        };
        let answer = node.request(&request, &[], &[])?;
        let Response::Enlisted {
            size,
            shared,
            terms,
        } = answer.response
        else {
            return Err(ClientError::unexpected("enlist", &answer.response));
        };
        let [data, control] = <[OwnedFd; 2]>::try_from(answer.fds)
            .map_err(|_| ClientError::Descriptors { expected: 2 })?;
        let options = RegionOptions {
            mode: terms.mode,
            publish: terms.publish,
            kind: WriteKind::Cooperative,
            ..RegionOptions::default()
        };
        let region = Region::attach(data, control, &options)?;
        if *region.name() != name || region.size() != size {
            return Err(ClientError::OtherRegion);
        }
        let attachment = Attachment::for_region(region.mapping(), terms.mode)?;
        // By its first page the node sees that what is armed is this mapping.
        region.populate_first_page();
        attachment.arm()?;
        let offer = HandOver {
            name: name.to_string(),
            size,
            max_size: None,
            mode: terms.mode,
            publish: terms.publish,
            shared,
            base: region.mapping().address(),
            interval_min_us: terms.interval_min_us,
            interval_max_us: terms.interval_max_us,
            chosen: None,
            kind: WriteKind::Cooperative,
            slot: None,
        };
        Self::hand_over(node, path, region, attachment, offer)
    }

    /// The region itself, to be kept: for a channel whose payload it is, for example. It
    /// is followed as long as this writer is there.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Why the region is tracked the way it is, if the choice was left to `auto`.
    pub fn chosen(&self) -> Option<&str> {
        self.chosen.as_deref()
    }

    /// Whether the region began with the content of an earlier writer.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(link) = self.link.take() {
            link.stop.store(true, Ordering::Release);
            link.bell.ring();
            let _ = link.thread.join();
        }
    }
}

/// The memory of an earlier life, if the node has one of such a size.
fn earlier_content(
    node: &mut Node,
    name: &RegionName,
    sizes: RangeInclusive<u64>,
) -> Result<Option<(OwnedFd, u64)>, ClientError> {
    let request = Request::PreviousLife {
        name: name.to_string(),
    };
    match node.request(&request, &[], &[]) {
        Ok(mut answer) => match answer.response {
            Response::PreviousLife { size: old } if sizes.contains(&old) => answer
                .fds
                .pop()
                .map(|fd| Some((fd, old)))
                .ok_or(ClientError::Descriptors { expected: 1 }),
            Response::PreviousLife { size: old } => Err(ClientError::Size {
                old,
                new: *sizes.start(),
            }),
            other => Err(ClientError::unexpected("previous life", &other)),
        },
        Err(error) if error.refusal() == Some(RefusalCode::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Everything that a hand-over carries; kept so that it can be done again.
struct Hand {
    region: Arc<Region>,
    /// In mode `sync` none once it was handed over: a duplicate of the userfaultfd kept
    /// here would leave stores waiting for ever if the node died.
    attachment: Option<Attachment>,
    offer: HandOver,
}

impl Hand {
    fn over(&mut self, node: &mut Node) -> Result<(), ClientError> {
        let mode = self.offer.mode;
        let attachment = match self.attachment.take() {
            Some(attachment) => attachment,
            None => Attachment::for_region(self.region.mapping(), mode)?,
        };
        let handed = self.over_with(node, &attachment);
        if mode != Mode::Sync {
            self.attachment = Some(attachment);
        }
        handed
    }

    fn over_with(&mut self, node: &mut Node, attachment: &Attachment) -> Result<(), ClientError> {
        let mut fds: Vec<BorrowedFd<'_>> = vec![
            self.region.data_fd(),
            self.region.control_fd(),
            attachment.pidfd.as_fd(),
        ];
        fds.extend(attachment.uffd.as_ref().map(AsFd::as_fd));
        fds.extend(attachment.pagemap.as_ref().map(AsFd::as_fd));
        let offer = HandOver {
            // It may have grown since the last time.
            size: self.region.size(),
            ..self.offer.clone()
        };
        let request = Request::HandOver(offer);
        let answer = node.request(&request, &[], &fds)?;
        let Response::HandedOver { slot, .. } = answer.response else {
            return Err(ClientError::unexpected("hand-over", &answer.response));
        };
        let [doorbell, pulse] = <[OwnedFd; 2]>::try_from(answer.fds)
            .map_err(|_| ClientError::Descriptors { expected: 2 })?;
        let doorbell = EventFd::from_fd(doorbell)?;
        if self.offer.kind == WriteKind::Cooperative {
            self.region.set_slot(slot);
            self.offer.slot = Some(slot);
        }
        self.region.connect_engine(EngineLink {
            doorbell,
            pulse: Pulse::open(pulse)?,
        });
        Ok(())
    }
}

impl Link {
    fn start(node: Node, path: Option<PathBuf>, hand: Hand) -> Result<Self, ClientError> {
        let stop = Arc::new(AtomicBool::new(false));
        let bell = Arc::new(EventFd::new()?);
        let (told, rung) = (Arc::clone(&stop), Arc::clone(&bell));
        let body = move || watch(node, path.as_deref(), hand, &told, &rung);
        let thread = std::thread::Builder::new()
            .name("uffd-sync-link".to_owned())
            .spawn(body)
            .map_err(ClientError::Thread)?;
        Ok(Self { stop, bell, thread })
    }
}

/// The link thread: ends when told, or when a lost node cannot be dialled.
fn watch(mut node: Node, path: Option<&Path>, mut hand: Hand, stop: &AtomicBool, bell: &EventFd) {
    loop {
        // The node never speaks first: the connection becomes readable at its end.
        let ended = net::wait_readable(&[node.socket(), bell.as_fd()], None);
        if stop.load(Ordering::Acquire) {
            // Not unmapped before the node looks at it no more: a part that is missing
            // while it still does counts as a loss, for the other writers too.
            node.leave(Duration::from_millis(limits::FAREWELL_MS));
            return;
        }
        if let Err(error) = ended {
            tracing::error!(%error, "the link to the node is not watched any more");
            return;
        }
        hand.region.disconnect_engine();
        let Some(path) = path else { return };
        tracing::warn!(
            region = hand.offer.name,
            "the node is gone; dialling until it is back"
        );
        match dial(path, &mut hand, stop, bell) {
            Some(next) => node = next,
            None => return,
        }
    }
}

fn dial(path: &Path, hand: &mut Hand, stop: &AtomicBool, bell: &EventFd) -> Option<Node> {
    let mut pause = Duration::from_millis(limits::RECONNECT_MIN_MS);
    loop {
        let _ = net::wait_readable(&[bell.as_fd()], Some(pause));
        if stop.load(Ordering::Acquire) {
            return None;
        }
        pause = (pause * 2).min(Duration::from_millis(limits::RECONNECT_MAX_MS));
        let handed = Node::connect(path).and_then(|mut node| hand.over(&mut node).map(|()| node));
        match handed {
            Ok(node) => {
                tracing::info!(region = hand.offer.name, "handed over again");
                return Some(node);
            }
            Err(error @ ClientError::Refused { .. }) => {
                tracing::error!(region = hand.offer.name, %error, "the node refuses the region");
            }
            Err(error) => tracing::debug!(%error, "the node is not back"),
        }
    }
}
