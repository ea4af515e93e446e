//! The bodies of all frames but those of updates, as structs.
//!
//! Each has `encode(..) -> Vec<u8>` (a whole frame) and `decode(&Header, body)`.
//! Fields of unknown value, wrong lengths and reserved bytes that are set are
//! refused by `decode`; a body that it takes is encoded to the same bytes again.

use crate::checksum::Digest;
use crate::limits::{MAX_DIGESTS_PER_FRAME, MAX_NAME_BYTES, MAX_REGION_BYTES};
use crate::words::{Generation, RegionName};

use super::body::{PutFields, Reader};
use super::encode::FrameBuilder;
use super::frame::{Header, Kind, WireError};

/// Longest text of an error frame, in bytes.
const MAX_ERROR_TEXT: usize = 200;

/// The first frame of the node that dialled, and (as WELCOME) the answer to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lowest version of frames that the node speaks.
    pub min_version: u8,
    /// Highest one; in a WELCOME both are the version chosen.
    pub max_version: u8,
    /// Longest body that the node takes, in bytes.
    pub max_body: u32,
    /// The node's id, the same over restarts if it keeps one.
    pub node: [u8; 16],
    /// Number of this life of the node, rising over restarts.
    pub incarnation: u64,
    /// The node's name, at most `MAX_NAME_BYTES` bytes.
    pub name: String,
}

impl Hello {
    /// The frame, as `Kind::Hello` or `Kind::Welcome`.
    pub fn encode(&self, kind: Kind) -> Vec<u8> {
        let mut frame = FrameBuilder::new(kind, 0, 0, 0);
        frame.put(&[self.min_version, self.max_version, 0, 0]);
        frame.put(&self.max_body.to_le_bytes()).put(&self.node);
        frame.put(&self.incarnation.to_le_bytes());
        frame.put_text(&self.name, MAX_NAME_BYTES as usize);
        frame.finish()
    }

    /// Reads a HELLO or a WELCOME.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let kind = match header.kind {
            Kind::Welcome => Kind::Welcome,
            _ => Kind::Hello,
        };
        let mut reader = Reader::new(header, kind, body)?;
        let (min_version, max_version) = (reader.u8()?, reader.u8()?);
        reader.zero(2)?;
        let hello = Self {
            min_version,
            max_version,
            max_body: reader.u32()?,
            node: reader.array()?,
            incarnation: reader.u64()?,
            name: reader.text(MAX_NAME_BYTES as usize)?.to_owned(),
        };
        if hello.min_version > hello.max_version {
            return Err(reader.bad("its lowest version is above its highest"));
        }
        reader.end()?;
        Ok(hello)
    }
}

/// A replica asks to follow a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscribe {
    /// The region's name on the source.
    pub name: RegionName,
    /// The replica's number for this subscription, the same over reconnects.
    pub subscription: u32,
    /// The life of the region that the replica's content is of; ZERO if none.
    pub generation: Generation,
    /// The epoch that the replica has of it.
    pub have_epoch: Option<u64>,
    /// Whether the replica's memory is all zero.
    pub fresh: bool,
}

impl Subscribe {
    /// The frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut frame = FrameBuilder::new(Kind::Subscribe, 0, 0, 0);
        frame.put(&self.subscription.to_le_bytes());
        frame.put(&[u8::from(self.fresh), 0, 0, 0]);
        frame.put(&self.generation.0.to_le_bytes());
        frame.put_epoch(self.have_epoch);
        frame.put_text(self.name.as_str(), MAX_NAME_BYTES as usize);
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(header, Kind::Subscribe, body)?;
        let subscription = reader.u32()?;
        let fresh = reader.u8()?;
        reader.zero(3)?;
        let generation = reader.generation()?;
        let have_epoch = reader.epoch()?;
        let name = reader.text(MAX_NAME_BYTES as usize)?;
        let name = name
            .parse()
            .map_err(|_| reader.bad("its region name is not one"))?;
        if fresh > 1 {
            return Err(reader.bad("fresh is neither 0 nor 1"));
        }
        reader.end()?;
        Ok(Self {
            name,
            subscription,
            generation,
            have_epoch,
            fresh: fresh == 1,
        })
    }
}

/// How a replica gets from what it has to what the source has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SyncPlan {
    /// The source knows what is missing: updates go on from the epoch it has.
    Resume = 1,
    /// Everything that is not zero at the source comes, in one update flagged WHOLE.
    Everything = 2,
    /// The replica sends the digests of its chunks; what differs comes, in one
    /// update flagged WHOLE.
    Digests = 3,
    /// The region has grown: from the next update on it has this size. All else goes on.
    Grow = 4,
}

/// The source says which life of the region follows, and how it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// The region's handle in all frames about it on this connection.
    pub handle: u32,
    /// The subscription that this answers.
    pub subscription: u32,
    /// Counts the starts on one subscription; comes back in ACK, RESYNC and DIGEST,
    /// so that what was meant for an earlier start is told apart.
    pub round: u32,
    /// This life of the region.
    pub generation: Generation,
    /// Its size, in bytes.
    pub size: u64,
    /// The greatest size that it can grow to in this life, in bytes.
    pub max_size: u64,
    /// Its epoch now.
    pub epoch: u64,
    /// How the replica is brought there.
    pub plan: SyncPlan,
}

impl RegionInfo {
    /// Whether updates go on from the epoch that the replica has.
    pub fn resume(&self) -> bool {
        self.plan == SyncPlan::Resume
    }

    /// The frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut frame = FrameBuilder::new(Kind::RegionInfo, 0, self.handle, self.epoch);
        frame.put(&self.subscription.to_le_bytes());
        frame.put(&self.round.to_le_bytes());
        frame.put(&self.generation.0.to_le_bytes());
        frame.put(&self.size.to_le_bytes());
        frame.put(&self.max_size.to_le_bytes());
        frame.put(&[self.plan as u8, 0, 0, 0, 0, 0, 0, 0]);
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(header, Kind::RegionInfo, body)?;
        let (subscription, round) = (reader.u32()?, reader.u32()?);
        let generation = reader.generation()?;
        let size = reader.u64()?;
        let max_size = reader.u64()?;
        let plan = match reader.u8()? {
            1 => SyncPlan::Resume,
            2 => SyncPlan::Everything,
            3 => SyncPlan::Digests,
            4 => SyncPlan::Grow,
            _ => return Err(reader.bad("unknown plan")),
        };
        reader.zero(7)?;
        if max_size > MAX_REGION_BYTES {
            return Err(reader.bad("its region is larger than any may be"));
        }
        if size > max_size {
            return Err(reader.bad("its region is larger than it may get"));
        }
        reader.end()?;
        Ok(Self {
            handle: header.region,
            subscription,
            round,
            generation,
            size,
            max_size,
            epoch: header.epoch,
            plan,
        })
    }
}

/// A replica shows an epoch (and all before it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The round that the epoch belongs to.
    pub round: u32,
    /// The epoch it shows.
    pub epoch: u64,
}

impl Ack {
    /// The frame, about the region with `handle`.
    pub fn encode(&self, handle: u32) -> Vec<u8> {
        let mut frame = FrameBuilder::new(Kind::Ack, 0, handle, self.epoch);
        frame.put(&self.round.to_le_bytes());
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(header, Kind::Ack, body)?;
        let round = reader.u32()?;
        reader.end()?;
        Ok(Self {
            round,
            epoch: header.epoch,
        })
    }
}

/// Why a replica asks for what is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ResyncReason {
    /// An update builds on an epoch that the replica does not have.
    Gap = 1,
    /// An update was not ended in time.
    Deadline = 2,
    /// The parts of an update do not add up.
    Mismatch = 3,
    /// An update does not fit into what may be staged.
    TooLarge = 4,
}

/// A replica lost an update and asks for what is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resync {
    /// The round that the epoch belongs to.
    pub round: u32,
    /// The epoch that the replica has, if it has one of this round's generation.
    pub have_epoch: Option<u64>,
    /// Why.
    pub reason: ResyncReason,
}

impl Resync {
    /// The frame, about the region with `handle`.
    pub fn encode(&self, handle: u32) -> Vec<u8> {
        let mut frame = FrameBuilder::new(Kind::Resync, 0, handle, 0);
        frame.put(&self.round.to_le_bytes());
        frame.put(&[self.reason as u8, 0, 0, 0]);
        frame.put_epoch(self.have_epoch);
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(header, Kind::Resync, body)?;
        let round = reader.u32()?;
        let reason = match reader.u8()? {
            1 => ResyncReason::Gap,
            2 => ResyncReason::Deadline,
            3 => ResyncReason::Mismatch,
            4 => ResyncReason::TooLarge,
            _ => return Err(reader.bad("unknown reason")),
        };
        reader.zero(3)?;
        let have_epoch = reader.epoch()?;
        reader.end()?;
        Ok(Self {
            round,
            have_epoch,
            reason,
        })
    }
}

/// A question for a sign of life (PING) or the answer (PONG, same number).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    /// Chosen by the asking side.
    pub number: u64,
}

impl Ping {
    /// The frame, as `Kind::Ping` or `Kind::Pong`.
    pub fn encode(&self, kind: Kind) -> Vec<u8> {
        let mut frame = FrameBuilder::new(kind, 0, 0, 0);
        frame.put(&self.number.to_le_bytes());
        frame.finish()
    }

    /// Reads a PING or a PONG.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let kind = match header.kind {
            Kind::Pong => Kind::Pong,
            _ => Kind::Ping,
        };
        let mut reader = Reader::new(header, kind, body)?;
        let number = reader.u64()?;
        reader.end()?;
        Ok(Self { number })
    }
}

/// Digests of adjacent chunks of a replica's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DigestFrame {
    /// The round that asked for them.
    pub round: u32,
    /// Index of the first chunk; chunks are `DIGEST_CHUNK` bytes.
    pub first_chunk: u64,
    /// One digest per chunk, at least one, at most `MAX_DIGESTS_PER_FRAME`.
    pub digests: Vec<Digest>,
}

impl DigestFrame {
    /// The frame, about the region with `handle`.
    pub fn encode(&self, handle: u32) -> Vec<u8> {
        let len = 16 + self.digests.len() * size_of::<Digest>();
        let mut frame = FrameBuilder::with_capacity(Kind::Digest, 0, handle, 0, len);
        frame.put(&self.first_chunk.to_le_bytes());
        frame.put(&self.round.to_le_bytes()).put(&[0; 4]);
        for digest in &self.digests {
            frame.put(digest);
        }
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(header, Kind::Digest, body)?;
        let (first_chunk, round) = (reader.u64()?, reader.u32()?);
        reader.zero(4)?;
        let (digests, rest) = reader.rest.as_chunks::<16>();
        if !rest.is_empty() || digests.is_empty() || digests.len() as u64 > MAX_DIGESTS_PER_FRAME {
            return Err(reader.bad("the number of digests is out of range"));
        }
        Ok(Self {
            round,
            first_chunk,
            digests: digests.to_vec(),
        })
    }
}

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ErrorCode {
    /// No version of frames is spoken by both.
    Version = 1,
    /// The source has no such region, or does not share it.
    UnknownRegion = 2,
    /// A bound of the node is reached.
    Limit = 3,
    /// The region is going away.
    Removed = 4,
    /// The node is stopping.
    Stopping = 5,
    /// A frame came that has no place here.
    Protocol = 6,
}

/// Something was refused; sent before the connection or the subscription ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorFrame {
    /// Why.
    pub code: ErrorCode,
    /// The subscription meant; 0 if the connection is.
    pub subscription: u32,
    /// For people: at most 200 bytes are sent.
    pub text: String,
}

impl ErrorFrame {
    /// The frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut frame = FrameBuilder::new(Kind::Error, 0, 0, 0);
        frame.put(&(self.code as u16).to_le_bytes()).put(&[0; 2]);
        frame.put(&self.subscription.to_le_bytes());
        frame.put_text(&self.text, MAX_ERROR_TEXT);
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(header, Kind::Error, body)?;
        let code = match reader.u16()? {
            1 => ErrorCode::Version,
            2 => ErrorCode::UnknownRegion,
            3 => ErrorCode::Limit,
            4 => ErrorCode::Removed,
            5 => ErrorCode::Stopping,
            6 => ErrorCode::Protocol,
            _ => return Err(reader.bad("unknown code")),
        };
        reader.zero(2)?;
        let subscription = reader.u32()?;
        let text = reader.text(MAX_ERROR_TEXT)?.to_owned();
        reader.end()?;
        Ok(Self {
            code,
            subscription,
            text,
        })
    }
}

/// A replica follows a region no longer; nothing is kept for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsubscribe {
    /// The subscription meant.
    pub subscription: u32,
}

impl Unsubscribe {
    /// The frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut frame = FrameBuilder::new(Kind::Unsubscribe, 0, 0, 0);
        frame.put(&self.subscription.to_le_bytes());
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(header, Kind::Unsubscribe, body)?;
        let subscription = reader.u32()?;
        reader.end()?;
        Ok(Self { subscription })
    }
}
