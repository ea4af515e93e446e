//! What clients of the control socket may ask for, and what comes of it.
//!
//! A request is carried out whole or refused with the reason; a refused one
//! changes nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::Engine;
use super::exports::Changes;
use super::keys::Key;
use super::regions::{Body, Reader, RegionEntry};
use crate::limits;
use crate::region::{Control, HoldPage, Identity, RegionKind};
use crate::replicate::Publication;
use crate::shm::OwnedMemory;
use crate::sys::SysError;
use crate::sys::memfd;
use crate::sys::net::PeerCredentials;
use crate::units::{ByteSize, checked_range};
use crate::wire::control::{CONTROL_VERSION, RefusalCode, Request, Response};
use crate::wire::follow::FollowSpec;
use crate::words::{EpochKind, Generation, RegionId, RegionName};

/// What came along with a request.
pub(super) struct Call {
    pub(super) connection: Key,
    pub(super) peer: PeerCredentials,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// An answer and the descriptors that go along.
pub(super) struct Reply {
    pub(super) response: Response,
    pub(super) fds: Vec<OwnedFd>,
}

/// Why a request is not carried out.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) code: RefusalCode,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(RefusalCode::Invalid, message)
    }

    /// What was tried and the whole chain of what the kernel said.
    pub(super) fn failed(what: &str, error: &dyn std::error::Error) -> Self {
        Self::new(RefusalCode::Failed, format!("{what}: {}", chain(error)))
    }
}

/// An error with all its sources, outermost first.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

impl Reply {
    pub(super) fn new(response: Response, fds: Vec<OwnedFd>) -> Self {
        Self { response, fds }
    }

    pub(super) fn refused(code: RefusalCode, message: String) -> Self {
        Self::new(Response::Refused { code, message }, Vec::new())
    }
}

impl Engine {
    /// Carries a request out; none for one that is answered later.
    pub(super) fn handle(&mut self, request: Request, call: Call) -> Option<Reply> {
        if let Request::Cut { name } = &request {
            let result = self.request_cut(name, &call);
            return result
                .unwrap_or_else(|refusal| Some(Reply::refused(refusal.code, refusal.message)));
        }
        let result = match request {
            // Both are answered elsewhere.
            Request::Cut { .. } | Request::Variables => return None,
            Request::Hello { version } => self.hello(version),
            Request::Status => Ok(Reply::new(
                Response::Status(Box::new(self.status())),
                vec![],
            )),
            Request::RegionCreate {
                name,
                size,
                max_size,
                shared,
                cooperative: None,
            } => self
                .create_held(&name, (size, max_size.unwrap_or(size)), shared, &call)
                .map(|()| done()),
            Request::RegionCreate {
                size,
                max_size: Some(max_size),
                cooperative: Some(_),
                ..
            } if max_size != size => Err(Refusal::invalid(
                "a cooperative region does not grow; leave max_size out",
            )),
            Request::RegionCreate {
                name,
                size,
                max_size: _,
                shared,
                cooperative: Some(terms),
            } => self
                .create_cooperative(&name, size, shared, &terms, &call)
                .map(|()| done()),
            Request::RegionGrow { name, size } => {
                self.grow_region(&name, size, &call).map(|()| done())
            }
            Request::Enlist { name } => self.enlist(&name, &call),
            Request::RegionWrite { name, offset } => {
                self.write_held(&name, offset, &call).map(|()| done())
            }
            Request::RegionRemove { name } => self.remove_region(&name, &call).map(|()| done()),
            Request::Attach { name } => self.attach_reader(&name, call),
            Request::PreviousLife { name } => self.previous_life(&name, &call),
            Request::HandOver(offer) => self.hand_over(offer, call),
            Request::TrackFile { name, size, shared } => {
                self.track_file(&name, size, shared, call).map(|()| done())
            }
            Request::Follow { source } => self.follow_request(&source, &call).map(|()| done()),
            Request::Unfollow { name } => self.unfollow_request(&name, &call).map(|()| done()),
        };
        Some(result.unwrap_or_else(|refusal| Reply::refused(refusal.code, refusal.message)))
    }

    fn hello(&self, version: u32) -> Result<Reply, Refusal> {
        if version != CONTROL_VERSION {
            return Err(Refusal::new(
                RefusalCode::Version,
                format!("the client speaks version {version}, this node {CONTROL_VERSION}"),
            ));
        }
        let node = self.settings.name.clone();
        Ok(Reply::new(
            Response::Welcome {
                version: CONTROL_VERSION,
                node,
            },
            vec![],
        ))
    }

    fn create_held(
        &mut self,
        name: &str,
        (size, max_size): (u64, u64),
        shared: bool,
        call: &Call,
    ) -> Result<(), Refusal> {
        let name = self.free_name(name)?;
        check_sizes(size, max_size)?;
        let memory = OwnedMemory::with_room(name.as_str(), size, max_size)
            .map_err(|error| Refusal::failed("cannot make the region's memory", &error))?;
        let data_fd = memory.shared_fd();
        let generation = Generation::random();
        let entry = self.new_entry(NewEntry {
            name,
            size,
            max_size,
            shared,
            owner_uid: call.peer.uid,
            generation,
            kind: RegionKind::Held,
            data_fd,
            body: Body::Held(memory),
        })?;
        self.add_region(entry);
        Ok(())
    }

    /// A new region's control page and publication around its memory.
    pub(super) fn new_entry(&mut self, new: NewEntry) -> Result<RegionEntry, Refusal> {
        let identity = Identity {
            name: new.name.clone(),
            id: RegionId::random(),
            size: new.size,
            max_size: new.max_size,
            kind: new.kind,
        };
        let (control, control_fd) = Control::create(new.name.as_str(), &identity)
            .map_err(|error| Refusal::failed("cannot make the region's control page", &error))?;
        let control_fd = read_only(control_fd.as_fd())?;
        Ok(self.entry_around(new, control, control_fd))
    }

    /// A new region around an existing control page.
    pub(super) fn entry_around(
        &mut self,
        new: NewEntry,
        control: Control,
        control_fd: OwnedFd,
    ) -> RegionEntry {
        let handle = self.next_handle;
        self.next_handle = self.next_handle.checked_add(1).unwrap_or(1);
        control.set_generation(new.generation);
        // A page handed over once more may have been retired with the life before.
        control.set_syncing(new.kind == RegionKind::Replica);
        // Epochs go on rising where the control page has seen some, so that nobody
        // waits for an epoch that was long ago; what is there is a foreign number.
        let epoch = Some(control.epoch())
            .filter(|epoch| *epoch < MAX_INHERITED_EPOCH)
            .unwrap_or(0);
        let mut publication = Publication::new(handle, new.generation, epoch, new.size);
        publication.set_max_size(new.max_size);
        let offered = self.settings.nbd.is_some();
        let sizes = (new.size, new.max_size);
        let changes = offered.then(|| Changes::new(new.generation, epoch, sizes));
        // Before its first epoch a region has nothing that followers may see.
        publication.set_busy(!matches!(new.body, Body::Held(_)));
        RegionEntry {
            publication,
            name: new.name,
            size: new.size,
            max_size: new.max_size,
            shared: new.shared,
            owner_uid: new.owner_uid,
            generation: new.generation,
            epoch,
            first_epoch: epoch,
            kind: EpochKind::Convergent,
            control,
            control_fd,
            data_fd: new.data_fd,
            followers: Vec::new(),
            readers: Vec::new(),
            body: new.body,
            statistics: Default::default(),
            changes: changes.flatten(),
            queued: false,
            timer: None,
        }
    }

    pub(super) fn add_region(&mut self, entry: RegionEntry) -> Key {
        let name = entry.name.clone();
        tracing::info!(region = %name, size = entry.size, role = ?entry.role(), "region added");
        let key = self.regions.insert(entry);
        self.names.insert(name, key);
        key
    }

    fn write_held(&mut self, name: &str, offset: u64, call: &Call) -> Result<(), Refusal> {
        let key = self.owned_region(name, call)?;
        let Some(entry) = self.regions.get_mut(key) else {
            return Err(not_found(name));
        };
        if !matches!(entry.body, Body::Held(_)) {
            return Err(Refusal::new(
                RefusalCode::Unsupported,
                format!(
                    "{name} is not written by this node; only regions made with `region create` are"
                ),
            ));
        }
        let range = checked_range(offset, call.payload.len() as u64, entry.size)
            .map_err(|error| Refusal::invalid(format!("cannot write to {name}: {error}")))?;
        self.apply_held(key, range, &call.payload);
        Ok(())
    }

    /// Lengthens a region that the node holds.
    fn grow_region(&mut self, name: &str, size: u64, call: &Call) -> Result<(), Refusal> {
        let key = self.owned_region(name, call)?;
        let entry = self.regions.get(key).ok_or_else(|| not_found(name))?;
        if !matches!(entry.body, Body::Held(_)) {
            return Err(Refusal::new(
                RefusalCode::Unsupported,
                format!("{name} is not held by this node; whoever writes it makes it grow"),
            ));
        }
        if size > entry.max_size {
            return Err(Refusal::invalid(format!(
                "{name} cannot grow to {size} bytes; it was made with a greatest size of {} bytes",
                entry.max_size
            )));
        }
        if size < entry.size {
            return Err(Refusal::invalid(format!(
                "{name} cannot shrink to {size} bytes; it has {} bytes and never gets smaller",
                entry.size
            )));
        }
        self.grow_held(key, size)
            .map_err(|error| Refusal::failed("cannot make the region grow", &error))
    }

    fn remove_region(&mut self, name: &str, call: &Call) -> Result<(), Refusal> {
        let key = self.owned_region(name, call)?;
        let Some(entry) = self.regions.get(key) else {
            return Err(not_found(name));
        };
        if let Body::Tracked(tracked) = &entry.body
            && let Some(pid) = tracked.living_writer()
        {
            return Err(Refusal::new(
                RefusalCode::Exists,
                format!("process {pid} still writes {name}; end it first"),
            ));
        }
        self.drop_region(key, "removed on request");
        Ok(())
    }

    fn attach_reader(&mut self, name: &str, mut call: Call) -> Result<Reply, Refusal> {
        let key = self.owned_region(name, &call)?;
        let (Some(hold), true) = (call.fds.pop(), call.fds.is_empty()) else {
            return Err(Refusal::invalid(
                "a reader sends one descriptor: its hold page",
            ));
        };
        let hold = HoldPage::open(hold).map_err(|error| {
            Refusal::invalid(format!("the hold page is not one: {}", chain(&error)))
        })?;
        let pulse = self.pulse_fd()?;
        let region = Box::new(self.region_status(key).ok_or_else(|| not_found(name))?);
        let (Some(entry), Some(connection)) = (
            self.regions.get_mut(key),
            self.controls.get_mut(call.connection),
        ) else {
            return Err(not_found(name));
        };
        // One attachment per connection and region: the last.
        let connected = call.connection;
        entry
            .readers
            .retain(|reader| reader.connection != connected);
        connection.reads.retain(|region| *region != key);
        if connection.reads.len() >= limits::MAX_READERS as usize {
            return Err(Refusal::new(
                RefusalCode::Limit,
                format!(
                    "the connection reads {} regions already",
                    limits::MAX_READERS
                ),
            ));
        }
        if entry.readers.len() >= limits::MAX_READERS as usize {
            return Err(Refusal::new(
                RefusalCode::Limit,
                format!("{name} has {} readers already", limits::MAX_READERS),
            ));
        }
        let fds = vec![
            duplicate(&entry.data_fd)?,
            duplicate(&entry.control_fd)?,
            pulse,
        ];
        connection.reads.push(key);
        entry.readers.push(Reader {
            connection: call.connection,
            hold,
            held_since: None,
        });
        Ok(Reply::new(Response::Attached { region }, fds))
    }

    /// The connection that read a region is gone.
    pub(super) fn forget_reader(&mut self, region: Key, connection: Key) {
        if let Some(entry) = self.regions.get_mut(region) {
            entry
                .readers
                .retain(|reader| reader.connection != connection);
        }
    }

    fn follow_request(&mut self, source: &str, call: &Call) -> Result<(), Refusal> {
        let spec: FollowSpec = source
            .parse()
            .map_err(|error| Refusal::invalid(format!("{source}: {}", chain(&error))))?;
        self.follow(spec, call.peer.uid)
    }

    fn unfollow_request(&mut self, name: &str, call: &Call) -> Result<(), Refusal> {
        let key = self.owned_region(name, call)?;
        if !matches!(
            self.regions.get(key).map(|entry| &entry.body),
            Some(Body::Replica(_))
        ) {
            return Err(Refusal::new(
                RefusalCode::Unsupported,
                format!("{name} is no replica"),
            ));
        }
        self.drop_region(key, "no longer followed");
        Ok(())
    }

    pub(super) fn pulse_fd(&self) -> Result<OwnedFd, Refusal> {
        duplicate(&self.pulse)
    }

    /// A name that can be given to a new region.
    pub(super) fn free_name(&self, name: &str) -> Result<RegionName, Refusal> {
        let parsed = parse_name(name)?;
        if self.names.contains_key(&parsed) {
            return Err(Refusal::new(
                RefusalCode::Exists,
                format!("a region named {name} exists; choose another name or remove it"),
            ));
        }
        if self.regions.len() >= limits::MAX_REGIONS as usize {
            return Err(Refusal::new(
                RefusalCode::Limit,
                format!("the node has {} regions already", limits::MAX_REGIONS),
            ));
        }
        Ok(parsed)
    }

    /// The region of that name, if the caller may use it.
    pub(super) fn owned_region(&self, name: &str, call: &Call) -> Result<Key, Refusal> {
        let parsed = parse_name(name)?;
        let key = *self.names.get(&parsed).ok_or_else(|| not_found(name))?;
        let entry = self.regions.get(key).ok_or_else(|| not_found(name))?;
        if call.peer.uid != 0 && call.peer.uid != entry.owner_uid {
            return Err(Refusal::new(
                RefusalCode::Forbidden,
                format!(
                    "region {name} belongs to user id {}, not to {}",
                    entry.owner_uid, call.peer.uid
                ),
            ));
        }
        Ok(key)
    }
}

/// Greatest epoch that is taken over from a control page: far from overflow.
const MAX_INHERITED_EPOCH: u64 = 1 << 48;

/// What a new region is made of.
pub(super) struct NewEntry {
    pub(super) name: RegionName,
    pub(super) size: u64,
    pub(super) max_size: u64,
    pub(super) shared: bool,
    pub(super) owner_uid: u32,
    pub(super) generation: Generation,
    pub(super) kind: RegionKind,
    pub(super) data_fd: Arc<OwnedFd>,
    pub(super) body: Body,
}

/// The answer to a request for a cut.
pub(super) fn cut_made(epoch: u64) -> Reply {
    Reply::new(Response::Cut { epoch }, vec![])
}

fn done() -> Reply {
    Reply::new(Response::Done, vec![])
}

pub(super) fn parse_name(name: &str) -> Result<RegionName, Refusal> {
    name.parse()
        .map_err(|error| Refusal::invalid(format!("{name:?} is no region name: {error}")))
}

pub(super) fn not_found(name: &str) -> Refusal {
    Refusal::new(
        RefusalCode::NotFound,
        format!("no region named {name} here; `uffd-sync region list` shows those there are"),
    )
}

pub(super) fn check_size(size: u64) -> Result<(), Refusal> {
    if size == 0 || size > limits::MAX_REGION_BYTES {
        return Err(Refusal::invalid(format!(
            "a region of {size} bytes cannot be made; sizes go from 1 byte to {}",
            ByteSize(limits::MAX_REGION_BYTES)
        )));
    }
    Ok(())
}

/// A size and the greatest one that it can grow to.
pub(super) fn check_sizes(size: u64, max_size: u64) -> Result<(), Refusal> {
    check_size(size)?;
    check_size(max_size)?;
    if max_size < size {
        return Err(Refusal::invalid(format!(
            "a region of {size} bytes cannot have a greatest size of {max_size} bytes"
        )));
    }
    Ok(())
}

pub(super) fn read_only(fd: impl AsFd) -> Result<OwnedFd, Refusal> {
    memfd::reopen_read_only(fd)
        .map_err(|error: SysError| Refusal::failed("cannot open the memory read-only", &error))
}

pub(super) fn duplicate(fd: impl AsFd) -> Result<OwnedFd, Refusal> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|error| Refusal::failed("cannot duplicate a descriptor", &error))
}
