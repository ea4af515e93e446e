//! What the four kinds of update frames hold besides extents.

use crate::words::EpochKind;

use super::body::Reader;
use super::encode::FrameBuilder;
use super::frame::{FLAG_COMING, FLAG_CUT, FLAG_WHOLE, Header, Kind, WireError};

/// Length of [`UpdatePrefix`] on the wire.
pub const UPDATE_PREFIX_BYTES: usize = 12;

/// What an update builds on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// This epoch of the same generation, or any between it and the update's own.
    Epoch(u64),
    /// Nothing: the update makes the replica whole ([`FLAG_WHOLE`]).
    Nothing,
}

/// The flags of an update of `kind` built on `base`.
pub fn update_flags(kind: EpochKind, base: Base) -> u16 {
    let cut = match kind {
        EpochKind::Cut => FLAG_CUT,
        EpochKind::Convergent => 0,
    };
    match base {
        Base::Nothing => cut | FLAG_WHOLE,
        Base::Epoch(_) => cut,
    }
}

/// What stands before the extents of a SINGLE and at the front of a START.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpdatePrefix {
    /// What the update builds on.
    pub base: Base,
    /// When the source made the epoch, nanoseconds of its real-time clock.
    pub source_time_ns: u64,
}

impl UpdatePrefix {
    /// Whether an update of `epoch` can name `base`: the distance has 32 bits.
    pub fn can_name(base: u64, epoch: u64) -> bool {
        epoch
            .checked_sub(base)
            .is_some_and(|distance| u32::try_from(distance).is_ok())
    }

    /// Its bytes in an update of `epoch`.
    ///
    /// # Panics
    /// If the base is not [nameable](Self::can_name).
    pub fn to_bytes(&self, epoch: u64) -> [u8; UPDATE_PREFIX_BYTES] {
        let distance = match self.base {
            Base::Nothing => 0,
            Base::Epoch(base) => {
                assert!(Self::can_name(base, epoch), "base {base} of {epoch}");
                (epoch - base) as u32
            }
        };
        let mut bytes = [0; UPDATE_PREFIX_BYTES];
        bytes[..4].copy_from_slice(&distance.to_le_bytes());
        bytes[4..].copy_from_slice(&self.source_time_ns.to_le_bytes());
        bytes
    }

    /// Reads the prefix of a SINGLE or START; the rest of the body comes back too.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode<'a>(header: &Header, body: &'a [u8]) -> Result<(Self, &'a [u8]), WireError> {
        let mut reader = Reader::new(header, header.kind, body)?;
        let distance = u64::from(reader.u32()?);
        let source_time_ns = reader.u64()?;
        let base = match (header.has(FLAG_WHOLE), header.epoch.checked_sub(distance)) {
            (true, _) if distance == 0 => Base::Nothing,
            (true, _) => return Err(reader.bad("a whole update names a base")),
            (false, Some(base)) => Base::Epoch(base),
            (false, None) => return Err(reader.bad("its base lies before epoch 0")),
        };
        let prefix = Self {
            base,
            source_time_ns,
        };
        Ok((prefix, reader.rest))
    }
}

/// The first frame of an update in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartUpdate {
    /// What the update builds on, and when it was made.
    pub prefix: UpdatePrefix,
    /// Bytes of all its extents together, extent headers apart; the most that they
    /// can be if the epoch is `coming`.
    pub total_bytes: u64,
    /// Whether the epoch is not complete yet ([`FLAG_COMING`]).
    pub coming: bool,
}

impl StartUpdate {
    /// The frame: an update to `epoch` of `kind` of the region with `handle`. Of a coming
    /// epoch the kind is not known yet: convergent.
    pub fn encode(&self, handle: u32, epoch: u64, kind: EpochKind) -> Vec<u8> {
        let flags = match self.coming {
            true => update_flags(EpochKind::Convergent, self.prefix.base) | FLAG_COMING,
            false => update_flags(kind, self.prefix.base),
        };
        let mut frame = FrameBuilder::new(Kind::StartUpdate, flags, handle, epoch);
        frame.put(&self.prefix.to_bytes(epoch));
        frame.put(&self.total_bytes.to_le_bytes());
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let (prefix, rest) = UpdatePrefix::decode(header, body)?;
        let mut reader = Reader::new(header, Kind::StartUpdate, rest)?;
        let total_bytes = reader.u64()?;
        let coming = header.has(FLAG_COMING);
        if coming && header.flags != FLAG_COMING {
            return Err(reader.bad("a coming epoch builds on one and has no kind yet"));
        }
        reader.end()?;
        Ok(Self {
            prefix,
            total_bytes,
            coming,
        })
    }
}

/// The end of an update in parts: what must have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndUpdate {
    /// Number of chunks between START and END.
    pub chunks: u32,
    /// Bytes of their extents, extent headers apart.
    pub total_bytes: u64,
    /// What the epoch promises, where the START did not know it; else convergent.
    pub kind: EpochKind,
}

impl EndUpdate {
    /// The frame: the end of the update to `epoch` of the region with `handle`.
    pub fn encode(&self, handle: u32, epoch: u64) -> Vec<u8> {
        let flags = match self.kind {
            EpochKind::Cut => FLAG_CUT,
            EpochKind::Convergent => 0,
        };
        let mut frame = FrameBuilder::new(Kind::EndUpdate, flags, handle, epoch);
        frame.put(&self.chunks.to_le_bytes()).put(&[0; 4]);
        frame.put(&self.total_bytes.to_le_bytes());
        frame.finish()
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(header, Kind::EndUpdate, body)?;
        let chunks = reader.u32()?;
        reader.zero(4)?;
        let total_bytes = reader.u64()?;
        reader.end()?;
        Ok(Self {
            chunks,
            total_bytes,
            kind: if header.has(FLAG_CUT) {
                EpochKind::Cut
            } else {
                EpochKind::Convergent
            },
        })
    }
}
