//! What a session asks of the memory behind its export.

/// Why something was not carried out, as clients are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// EPERM: the export cannot be written.
    ReadOnly,
    /// EIO: a server is lost or cannot be reached, or nobody knows what became of it.
    Io,
    /// EINVAL: not a request of this protocol, or its range is none.
    Invalid,
    /// ENOSPC: a write beyond the end.
    NoSpace,
    /// ESHUTDOWN: the server ends.
    Stopping,
}

impl Failure {
    /// The number of the protocol.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::ReadOnly => 1,
            Self::Io => 5,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Stopping => 108,
        }
    }

    /// In words, for the clients that show them.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::ReadOnly => "the export is read-only",
            Self::Io => "the memory behind it is lost, cannot be reached, or did not answer",
            Self::Invalid => "the command, its flags or its range are not valid here",
            Self::NoSpace => "the range lies beyond the end of the export",
            Self::Stopping => "the server ends",
        }
    }
}

/// What became of a [`Unit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Carried out.
    Done,
    /// Taken; [`Session::completed`](super::Session::completed) will be called with it.
    Later,
    /// Not taken now: it is to be asked again after the next completion of any session.
    Busy,
    /// Not carried out, or nobody knows.
    Failed(Failure),
}

/// A request to the backing, or a piece of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Address of its first byte, by the base of the export.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// The request it belongs to, for the session's own use.
    pub(super) flight: u32,
}

/// How a range becomes zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// It need not even: its content does not matter any more.
    Discard,
    /// Memory may be given back, or not be taken.
    Sparse,
    /// It stays or becomes memory.
    Allocated,
}

/// What is said of bytes in an answer to a question of block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// There is memory behind them.
    Data,
    /// There is none; they read as zeros.
    Hole,
    /// They were not changed since the epoch that was asked for.
    Clean,
    /// They were, or it is not known.
    Dirty,
}

impl Kind {
    /// [`Kind::Hole`], or else [`Kind::Data`].
    pub fn of_hole(hole: bool) -> Self {
        if hole { Self::Hole } else { Self::Data }
    }

    /// Bits of a status descriptor, by the context that it is of.
    pub(super) fn bits(self) -> u32 {
        match self {
            Self::Data | Self::Clean => 0,
            // No memory, and reads as zeros.
            Self::Hole => 3,
            Self::Dirty => 1,
        }
    }
}

/// Consecutive bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// What is said of them.
    pub kind: Kind,
}

/// An epoch of one life of a region: what was changed since then can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Since {
    /// Its number.
    pub epoch: u64,
    /// The life: numbers of another one mean nothing in it.
    pub generation: u128,
}

/// Memory by address. Each range that it is asked for lies within one export.
pub trait Backing {
    /// Appends the bytes of `unit` to `out`; nothing unless it is [`Answer::Done`].
    fn read(&mut self, unit: Unit, out: &mut Vec<u8>) -> Answer;

    /// Stores `bytes`, as many as `unit` has, there.
    fn write(&mut self, unit: Unit, bytes: &[u8]) -> Answer;

    /// Sets the bytes of `unit` to zero.
    fn zero(&mut self, unit: Unit, how: Zeroing) -> Answer;

    /// Appends what `unit` consists of to `into`, from its beginning on, at most `most`
    /// extents; nothing means that all of it is memory. With [`Answer::Later`]
    /// [`Session::told`](super::Session::told) will be called with it.
    fn extents(&mut self, unit: Unit, most: usize, into: &mut Vec<Extent>) -> Answer;

    /// The same of what was changed since an epoch, at once; nothing means that all of it
    /// may have been. Asked only where the export says that it has epochs.
    fn changed(
        &mut self,
        _since: Since,
        _address: u64,
        _len: u64,
        _most: usize,
        _into: &mut Vec<Extent>,
    ) {
    }
}
