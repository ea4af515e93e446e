//! How a client finds a server: one hello, one answer, over a Unix socket, as values.
//!
//! ```text
//!        0         8      12      16     20     24       32     36            64
//! hello  | magic   | vmin | vmax  | feat | ask  | gener. | fds  | 0 ...       |
//!                                                                40    48    56
//! answer | magic   | code | vers. | feat | kind | gener. | fds  | body | a | b | 0 |
//! ```
//!
//! All numbers are little-endian. A hello and an answer have 64 bytes each;
//! descriptors travel by `SCM_RIGHTS` with the first of them. After the answer to
//! [`Ask::Status`] come `body` bytes of JSON. After an attach the connection says
//! nothing more: it stays open, and its end tells each side that the other is gone.
//!
//! | ask | descriptors with the hello | with the answer |
//! |---|---|---|
//! | attach | none | the memory: one memfd, and the payload's where that is a view |
//! | take over | the memory of the client whose server died | none |
//! | status | none | none |
//!
//! I1. A message is taken whole; reserved bytes that are not zero, unknown numbers and
//!     ranges that are none refuse it.
//! I2. The server names the features that its memory uses; a client that does not know
//!     all of them is refused before a descriptor is passed.
//! I3. A refusal carries its two numbers, so that who is refused can say what would be right.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::{MAX_CHANNEL_FDS, MAX_CHANNEL_STATUS};
use crate::words::{RegionName, WordError};

/// First eight bytes of both messages; the last is the version of the messages.
pub const MAGIC: [u8; 8] = *b"uffdchn\x01";
/// Length of a hello and of an answer, in bytes.
pub const MESSAGE_BYTES: usize = 64;

/// Name of a channel: as a region's, so that it is a file name and a shell word.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelName(RegionName);

impl ChannelName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl std::str::FromStr for ChannelName {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        text.parse().map(ChannelName)
    }
}

impl std::fmt::Display for ChannelName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a client wants of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Ask {
    /// A channel of its own, with memory that the server makes.
    Attach = 1,
    /// To go on with the memory of a channel whose server died.
    TakeOver = 2,
    /// The server's state.
    Status = 3,
}

/// What kind of channel a server has under its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ChannelKind {
    /// One shared payload, changed in place.
    InPlace = 1,
    /// Two buffers, one each way.
    TwoBuffers = 2,
}

/// A message that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RendezvousError {
    /// The first eight bytes are those of something else, or of another version of
    /// these messages.
    #[error("not a channel's message: it begins with {found:02x?}")]
    Magic {
        /// The bytes found.
        found: [u8; 8],
    },
    /// Reserved bytes are not zero.
    #[error("reserved bytes of a channel's message are set")]
    Reserved,
    /// A field holds a number that it cannot have.
    #[error("{field} of a channel's message is {found}")]
    Field {
        /// Which one.
        field: &'static str,
        /// The number found.
        found: u64,
    },
}

/// What a client says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lowest and highest version of the memory's layout that it speaks.
    pub versions: (u32, u32),
    /// Feature bits that it knows.
    pub features: u32,
    /// What it wants.
    pub ask: Ask,
    /// Generation of the memory it hands over; 0 unless it takes over.
    pub generation: u64,
    /// Descriptors that come along.
    pub fds: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHello {
    magic: [u8; 8],
    version_min: U32,
    version_max: U32,
    features: U32,
    ask: U32,
    generation: U64,
    fds: U32,
    reserved: [u8; 28],
}

const _: () = assert!(size_of::<RawHello>() == MESSAGE_BYTES);

impl Hello {
    /// The bytes that are sent.
    pub fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let raw = RawHello {
            magic: MAGIC,
            version_min: self.versions.0.into(),
            version_max: self.versions.1.into(),
            features: self.features.into(),
            ask: (self.ask as u32).into(),
            generation: self.generation.into(),
            fds: self.fds.into(),
            reserved: [0; 28],
        };
        zerocopy::transmute!(raw)
    }

    /// Reads what came from a client, whoever that is.
    ///
    /// # Errors
    /// [`RendezvousError`] for anything that [`Hello::encode`] does not make.
    pub fn decode(bytes: &[u8; MESSAGE_BYTES]) -> Result<Self, RendezvousError> {
        let raw: RawHello = zerocopy::transmute!(*bytes);
        check_frame(raw.magic, &raw.reserved)?;
        let versions = (raw.version_min.get(), raw.version_max.get());
        if versions.0 > versions.1 {
            return Err(field("version range", versions.0.into()));
        }
        let ask = match raw.ask.get() {
            1 => Ask::Attach,
            2 => Ask::TakeOver,
            3 => Ask::Status,
            other => return Err(field("ask", other.into())),
        };
        let (generation, fds) = (raw.generation.get(), raw.fds.get());
        let takes_over = ask == Ask::TakeOver;
        if takes_over != (generation != 0) {
            return Err(field("generation", generation));
        }
        if takes_over != (fds != 0) || u64::from(fds) > MAX_CHANNEL_FDS {
            return Err(field("number of descriptors", fds.into()));
        }
        Ok(Hello {
            versions,
            features: raw.features.get(),
            ask,
            generation,
            fds,
        })
    }
}

/// Why a server does not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The hello cannot be read.
    #[error("the server cannot read the hello; is it of another version?")]
    Malformed,
    /// No version of the layout that both speak.
    #[error("the server speaks versions {min} to {max} of the channel's layout")]
    Version {
        /// Lowest that the server speaks.
        min: u32,
        /// Highest that the server speaks.
        max: u32,
    },
    /// The server's memory uses features that the client does not know.
    #[error("the server's channel uses features {missing:#x} that this client does not know")]
    Features {
        /// The bits that are missing.
        missing: u32,
    },
    /// The server has as many clients as it takes.
    #[error("the server has {clients} of at most {max} clients")]
    Clients {
        /// Connected now.
        clients: u32,
        /// Most that it takes.
        max: u32,
    },
    /// The client belongs to another user.
    #[error("the server belongs to user {server}, this client to user {client}")]
    User {
        /// The server's user.
        server: u32,
        /// The client's user.
        client: u32,
    },
    /// The server is out of memory, descriptors or threads.
    #[error("the server is out of resources (error number {errno})")]
    Resources {
        /// What its kernel said; 0 if it was none of its errors.
        errno: u32,
    },
    /// The memory that was handed over cannot be used.
    #[error("the server does not take the memory of the earlier channel over")]
    Memory,
    /// The server is about to end.
    #[error("the server is stopping")]
    Stopping,
    /// The channel is of a kind that has no memory to hand out over a socket.
    #[error("the channel under this name is not an in-place one")]
    Kind,
    /// The memory that was handed over has a server, or had one since the hello was made.
    #[error("the memory of the earlier channel has a server, or is of generation {generation} now")]
    Served {
        /// Generation of the memory.
        generation: u64,
    },
}

impl Refusal {
    /// Code and the two numbers, as they travel.
    fn parts(self) -> (u32, u64, u64) {
        match self {
            Refusal::Malformed => (1, 0, 0),
            Refusal::Version { min, max } => (2, min.into(), max.into()),
            Refusal::Features { missing } => (3, missing.into(), 0),
            Refusal::Clients { clients, max } => (4, clients.into(), max.into()),
            Refusal::User { server, client } => (5, server.into(), client.into()),
            Refusal::Resources { errno } => (6, errno.into(), 0),
            Refusal::Memory => (7, 0, 0),
            Refusal::Stopping => (8, 0, 0),
            Refusal::Kind => (9, 0, 0),
            Refusal::Served { generation } => (10, generation, 0),
        }
    }

    fn from_parts(code: u32, a: u64, b: u64) -> Result<Self, RendezvousError> {
        let number = |n: u64| u32::try_from(n).map_err(|_| field("detail", n));
        let refusal = match code {
            1 => Refusal::Malformed,
            2 => Refusal::Version {
                min: number(a)?,
                max: number(b)?,
            },
            3 => Refusal::Features {
                missing: number(a)?,
            },
            4 => Refusal::Clients {
                clients: number(a)?,
                max: number(b)?,
            },
            5 => Refusal::User {
                server: number(a)?,
                client: number(b)?,
            },
            6 => Refusal::Resources { errno: number(a)? },
            7 => Refusal::Memory,
            8 => Refusal::Stopping,
            9 => Refusal::Kind,
            10 => Refusal::Served { generation: a },
            other => return Err(field("code", other.into())),
        };
        if refusal.parts() != (code, a, b) {
            return Err(RendezvousError::Reserved);
        }
        Ok(refusal)
    }
}

/// What a server grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Version of the layout that both use from here on.
    pub version: u32,
    /// Feature bits that the channel's memory uses.
    pub features: u32,
    /// Kind of the channel.
    pub kind: ChannelKind,
    /// Generation of the channel's memory; 0 with a status.
    pub generation: u64,
    /// Descriptors that come along.
    pub fds: u32,
    /// Bytes of JSON that follow.
    pub body_bytes: u32,
}

/// What a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It does what it was asked.
    Welcome(Welcome),
    /// It does not; nothing changed.
    Refused(Refusal),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawAnswer {
    magic: [u8; 8],
    code: U32,
    version: U32,
    features: U32,
    kind: U32,
    generation: U64,
    fds: U32,
    body_bytes: U32,
    a: U64,
    b: U64,
    reserved: [u8; 8],
}

const _: () = assert!(size_of::<RawAnswer>() == MESSAGE_BYTES);

impl Answer {
    /// The bytes that are sent.
    pub fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut raw = RawAnswer {
            magic: MAGIC,
            code: 0.into(),
            version: 0.into(),
            features: 0.into(),
            kind: 0.into(),
            generation: 0.into(),
            fds: 0.into(),
            body_bytes: 0.into(),
            a: 0.into(),
            b: 0.into(),
            reserved: [0; 8],
        };
        match self {
            Answer::Welcome(welcome) => {
                raw.version = welcome.version.into();
                raw.features = welcome.features.into();
                raw.kind = (welcome.kind as u32).into();
                raw.generation = welcome.generation.into();
                raw.fds = welcome.fds.into();
                raw.body_bytes = welcome.body_bytes.into();
            }
            Answer::Refused(refusal) => {
                let (code, a, b) = refusal.parts();
                (raw.code, raw.a, raw.b) = (code.into(), a.into(), b.into());
            }
        }
        zerocopy::transmute!(raw)
    }

    /// Reads what came from a server, whoever that is.
    ///
    /// # Errors
    /// [`RendezvousError`] for anything that [`Answer::encode`] does not make.
    pub fn decode(bytes: &[u8; MESSAGE_BYTES]) -> Result<Self, RendezvousError> {
        let raw: RawAnswer = zerocopy::transmute!(*bytes);
        check_frame(raw.magic, &raw.reserved)?;
        let (a, b) = (raw.a.get(), raw.b.get());
        if raw.code.get() != 0 {
            let rest = &bytes[12..40];
            if rest.iter().any(|byte| *byte != 0) {
                return Err(RendezvousError::Reserved);
            }
            return Refusal::from_parts(raw.code.get(), a, b).map(Answer::Refused);
        }
        if (a, b) != (0, 0) {
            return Err(RendezvousError::Reserved);
        }
        let kind = match raw.kind.get() {
            1 => ChannelKind::InPlace,
            2 => ChannelKind::TwoBuffers,
            other => return Err(field("kind", other.into())),
        };
        let (fds, body_bytes) = (raw.fds.get(), raw.body_bytes.get());
        if u64::from(fds) > MAX_CHANNEL_FDS {
            return Err(field("number of descriptors", fds.into()));
        }
        if u64::from(body_bytes) > MAX_CHANNEL_STATUS {
            return Err(field("length of the status", body_bytes.into()));
        }
        Ok(Answer::Welcome(Welcome {
            version: raw.version.get(),
            features: raw.features.get(),
            kind,
            generation: raw.generation.get(),
            fds,
            body_bytes,
        }))
    }
}

fn check_frame(magic: [u8; 8], reserved: &[u8]) -> Result<(), RendezvousError> {
    if magic != MAGIC {
        return Err(RendezvousError::Magic { found: magic });
    }
    if reserved.iter().any(|byte| *byte != 0) {
        return Err(RendezvousError::Reserved);
    }
    Ok(())
}

fn field(field: &'static str, found: u64) -> RendezvousError {
    RendezvousError::Field { field, found }
}

/// What a server speaks and uses, to compare a hello with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Lowest and highest version of the layout.
    pub versions: (u32, u32),
    /// Feature bits that its memory uses.
    pub features: u32,
}

impl Offer {
    /// The version that both sides use: the highest that both speak.
    ///
    /// # Errors
    /// [`Refusal::Version`] if there is none, [`Refusal::Features`] if the client does
    /// not know all that the memory uses.
    pub fn compare(&self, hello: &Hello) -> Result<u32, Refusal> {
        let version = self.versions.1.min(hello.versions.1);
        if version < self.versions.0.max(hello.versions.0) {
            let (min, max) = self.versions;
            return Err(Refusal::Version { min, max });
        }
        match self.features & !hello.features {
            0 => Ok(version),
            missing => Err(Refusal::Features { missing }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HELLO: Hello = Hello {
        versions: (1, 3),
        features: 5,
        ask: Ask::Attach,
        generation: 0,
        fds: 0,
    };
    const WELCOME: Welcome = Welcome {
        version: 1,
        features: 4,
        kind: ChannelKind::InPlace,
        generation: 9,
        fds: 1,
        body_bytes: 0,
    };
    const REFUSALS: [Refusal; 10] = [
        Refusal::Malformed,
        Refusal::Version { min: 1, max: 2 },
        Refusal::Features { missing: 8 },
        Refusal::Clients { clients: 1, max: 1 },
        Refusal::User {
            server: 0,
            client: 65_534,
        },
        Refusal::Resources { errno: 24 },
        Refusal::Memory,
        Refusal::Stopping,
        Refusal::Kind,
        Refusal::Served { generation: 3 },
    ];

    #[test]
    fn the_bytes_are_as_drawn() {
        let bytes = HELLO.encode();
        assert_eq!(&bytes[..8], b"uffdchn\x01");
        assert_eq!(
            bytes[8..24],
            [1, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0]
        );
        assert!(bytes[24..].iter().all(|byte| *byte == 0));
        let bytes = Answer::Welcome(WELCOME).encode();
        assert_eq!(
            bytes[8..24],
            [0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0]
        );
        assert_eq!(bytes[24..36], [9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        let bytes = Answer::Refused(Refusal::Clients { clients: 7, max: 8 }).encode();
        assert_eq!((bytes[8], bytes[40], bytes[48]), (4, 7, 8));
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let take_over = Hello {
            ask: Ask::TakeOver,
            generation: 3,
            fds: 2,
            ..HELLO
        };
        let status = Hello {
            ask: Ask::Status,
            ..HELLO
        };
        for hello in [HELLO, take_over, status] {
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
        let answers = REFUSALS.map(Answer::Refused);
        for answer in answers.into_iter().chain([Answer::Welcome(WELCOME)]) {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn fields_out_of_range_are_refused() {
        let hello = HELLO.encode();
        for (at, value) in [
            (0, 0u8), // magic
            (7, 2),   // version of the messages
            (8, 4),   // lowest version above the highest
            (20, 0),  // no ask
            (20, 4),  // unknown ask
            (20, 2),  // takes over nothing
            (24, 1),  // a generation without a take-over
            (32, 1),  // descriptors without a take-over
            (36, 1),  // reserved
            (63, 1),  // reserved
        ] {
            let mut bytes = hello;
            bytes[at] = value;
            assert!(Hello::decode(&bytes).is_err(), "byte {at} = {value}");
        }
        let answer = Answer::Welcome(WELCOME).encode();
        for (at, value) in [
            (0, 0u8),
            (8, 1),   // refused, but with a version
            (8, 200), // unknown code
            (20, 0),  // no kind
            (20, 3),  // unknown kind
            (33, 1),  // 257 descriptors
            (39, 1),  // a status of 16 MiB
            (40, 1),  // a detail without a refusal
            (56, 1),  // reserved
        ] {
            let mut bytes = answer;
            bytes[at] = value;
            assert!(Answer::decode(&bytes).is_err(), "byte {at} = {value}");
        }
        let mut refused = Answer::Refused(Refusal::Memory).encode();
        refused[40] = 1;
        assert!(
            Answer::decode(&refused).is_err(),
            "a detail it does not have"
        );
        let mut refused = Answer::Refused(REFUSALS[1]).encode();
        refused[47] = 1;
        assert!(
            Answer::decode(&refused).is_err(),
            "a version beyond 32 bits"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_encode_to_themselves(
            mut bytes in proptest::array::uniform32(any::<u8>()),
            edits in proptest::collection::vec((0usize..64, any::<u8>()), 0..4),
            answer in any::<bool>(),
        ) {
            bytes[0] = bytes[0].wrapping_add(1);
            let mut message = if answer {
                Answer::Welcome(WELCOME).encode()
            } else {
                HELLO.encode()
            };
            for (at, value) in edits {
                message[at] = value;
            }
            if let Ok(hello) = Hello::decode(&message) {
                prop_assert_eq!(hello.encode(), message);
            }
            if let Ok(answer) = Answer::decode(&message) {
                prop_assert_eq!(answer.encode(), message);
            }
            let mut noise = [0; MESSAGE_BYTES];
            noise[..32].copy_from_slice(&bytes);
            noise[32..].copy_from_slice(&bytes);
            prop_assert!(Answer::decode(&noise).is_err() || noise[..8] == MAGIC);
            prop_assert!(Hello::decode(&noise).is_err() || noise[..8] == MAGIC);
        }
    }

    #[test]
    fn versions_and_features_are_compared() {
        let offer = Offer {
            versions: (2, 4),
            features: 0b101,
        };
        let hello = |min, max, features| Hello {
            versions: (min, max),
            features,
            ..HELLO
        };
        assert_eq!(offer.compare(&hello(1, 3, 0b111)), Ok(3));
        assert_eq!(offer.compare(&hello(2, 2, 0b101)), Ok(2));
        assert_eq!(offer.compare(&hello(4, 9, u32::MAX)), Ok(4));
        let versions = Err(Refusal::Version { min: 2, max: 4 });
        assert_eq!(offer.compare(&hello(5, 9, u32::MAX)), versions);
        assert_eq!(offer.compare(&hello(0, 1, u32::MAX)), versions);
        let missing = Err(Refusal::Features { missing: 0b100 });
        assert_eq!(offer.compare(&hello(2, 4, 0b011)), missing);
    }

    #[test]
    fn names_are_file_names() {
        for name in ["img", "a.b-c_9", "7"] {
            let parsed: ChannelName = name.parse().expect(name);
            assert_eq!(parsed.to_string(), name);
        }
        for name in ["", ".", "../x", "a/b", "-x", "a b", &"x".repeat(65)] {
            assert!(name.parse::<ChannelName>().is_err(), "{name:?}");
        }
    }
}
