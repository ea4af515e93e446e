//! Messages of the control socket: what programs and the command line ask of a
//! node, and what it answers. Pure: values and their bytes, no socket.
//!
//! ```text
//! 0        4           8            12
//! | "UFC1" | json_len  | payload_len | json ... | payload ... |
//!   magic    u32 LE      u32 LE
//! ```
//!
//! One message is the 12-byte prefix, a JSON value and raw bytes; descriptors
//! travel by `SCM_RIGHTS` with the first byte of the message. Each request is
//! answered by one response, in order.
//!
//! I1. Both lengths are checked against `limits` before anything is reserved.
//! I2. A message is handed out whole or not at all; what follows it stays buffered.

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::words::{LossKind, Mode, Publish, WriteKind};

/// First four bytes of every message.
pub const MAGIC: [u8; 4] = *b"UFC1";
/// Length of the prefix in front of the JSON, in bytes.
pub const PREFIX_BYTES: usize = 12;
/// Version of these messages; the node refuses others by name.
pub const CONTROL_VERSION: u32 = 1;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// First request on a connection.
    Hello {
        /// [`CONTROL_VERSION`] of the client.
        version: u32,
    },
    /// The node's whole state: answered by [`Response::Status`].
    Status,
    /// Makes a region whose memory the node holds and writes: [`Response::Done`].
    RegionCreate {
        /// Name of the new region.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// Greatest size that it can grow to, in bytes; none: it does not grow.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_size: Option<u64>,
        /// Whether other nodes may follow it.
        shared: bool,
        /// If programs are to write it instead of the node: how.
        #[serde(default)]
        cooperative: Option<Terms>,
    },
    /// Lengthens a region that the node holds: [`Response::Done`].
    RegionGrow {
        /// Name of the region.
        name: String,
        /// Its size from now on, in bytes.
        size: u64,
    },
    /// Writes the payload at `offset` of a region that the node holds: [`Response::Done`].
    RegionWrite {
        /// Name of the region.
        name: String,
        /// First byte written.
        offset: u64,
    },
    /// Ends a region: [`Response::Done`].
    RegionRemove {
        /// Name of the region.
        name: String,
    },
    /// Joins a region read-only; one descriptor goes along: the reader's hold page.
    /// Answered by [`Response::Attached`].
    Attach {
        /// Name of the region.
        name: String,
    },
    /// The memory of a region whose writer is gone, read-only, so that a new
    /// writer can start from it: [`Response::PreviousLife`].
    PreviousLife {
        /// Name of the region.
        name: String,
    },
    /// A writer hands its region's tracking over. Descriptors, in this order:
    /// data, control, pidfd, and in modes that protect userfaultfd and pagemap.
    /// Answered by [`Response::HandedOver`].
    HandOver(HandOver),
    /// The memory of a cooperative region, to map and hand over as one more of its
    /// writers: [`Response::Enlisted`].
    Enlist {
        /// Name of the region.
        name: String,
    },
    /// Follows an existing file by comparing it; its descriptor goes along: [`Response::Done`].
    TrackFile {
        /// Name of the new region.
        name: String,
        /// Bytes of the file that are followed.
        size: u64,
        /// Whether other nodes may follow it.
        shared: bool,
    },
    /// Speaks of ordered variables over this connection from now on, in the messages of
    /// [`variables`](super::variables): [`Response::Done`].
    Variables,
    /// Makes an epoch of a region that is an exact instant after this request:
    /// [`Response::Cut`], once it is captured.
    Cut {
        /// Name of the region.
        name: String,
    },
    /// Follows a region of another node from now on: [`Response::Done`].
    Follow {
        /// `tcp://HOST:PORT/REGION[=LOCAL]`.
        source: String,
    },
    /// Stops following into the local region `name`, which is removed: [`Response::Done`].
    Unfollow {
        /// Name of the local region.
        name: String,
    },
}

/// What a writer says of the region it hands over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandOver {
    /// Name of the region.
    pub name: String,
    /// Size in bytes now.
    pub size: u64,
    /// Greatest size that it can grow to, which its mapping has room for, in bytes;
    /// none: it does not grow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<u64>,
    /// How changes are found.
    pub mode: Mode,
    /// When epochs are published.
    pub publish: Publish,
    /// Whether other nodes may follow it.
    pub shared: bool,
    /// Address of the mapping in the writer's process.
    pub base: u64,
    /// Shortest pause between timer captures, if not the node's own, in microseconds.
    pub interval_min_us: Option<u64>,
    /// Longest pause between timer captures, if not the node's own, in microseconds.
    pub interval_max_us: Option<u64>,
    /// Why it is this mode, if the writer left the choice to `auto`.
    #[serde(default)]
    pub chosen: Option<String>,
    /// Who may write it. A cooperative region that the node has already gets one more
    /// writer, if this is its memory.
    #[serde(default = "exclusive")]
    pub kind: WriteKind,
    /// Of a writer of a cooperative region that comes back: its place. One without it
    /// comes with its whole mapping armed, and stores nothing before it is answered.
    #[serde(default)]
    pub slot: Option<u32>,
}

fn exclusive() -> WriteKind {
    WriteKind::Exclusive
}

/// How a region is tracked, as all its writers agree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    /// How changes are found.
    pub mode: Mode,
    /// When epochs are published.
    pub publish: Publish,
    /// Shortest pause between timer captures, if not the node's own, in microseconds.
    #[serde(default)]
    pub interval_min_us: Option<u64>,
    /// Longest pause between timer captures, if not the node's own, in microseconds.
    #[serde(default)]
    pub interval_max_us: Option<u64>,
}

/// What the node answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Response {
    /// Answer to [`Request::Hello`].
    Welcome {
        /// Version of the node's messages.
        version: u32,
        /// The node's name.
        node: String,
    },
    /// The request was carried out.
    Done,
    /// Answer to [`Request::Status`].
    Status(Box<NodeStatus>),
    /// Answer to [`Request::Attach`]; descriptors: data, control, pulse, all read-only.
    Attached {
        /// What was joined.
        region: Box<RegionStatus>,
    },
    /// Answer to [`Request::PreviousLife`]; descriptor: data, read-only.
    PreviousLife {
        /// Size in bytes.
        size: u64,
    },
    /// Answer to [`Request::HandOver`]; descriptors: doorbell, pulse (read-only).
    HandedOver {
        /// Generation of this life, 32 hexadecimal digits.
        generation: String,
        /// The writer's place among those of a cooperative region.
        #[serde(default)]
        slot: u32,
    },
    /// Answer to [`Request::Enlist`]; descriptors: data, control, both writable.
    Enlisted {
        /// Size in bytes.
        size: u64,
        /// Whether other nodes may follow it.
        shared: bool,
        /// How it is tracked.
        terms: Terms,
    },
    /// Answer to [`Request::Cut`].
    Cut {
        /// The epoch that is the cut; an earlier one if nothing was stored since.
        epoch: u64,
    },
    /// The request was refused; nothing changed.
    Refused {
        /// What kind of refusal.
        code: RefusalCode,
        /// What was tried, what was wrong, what would be right.
        message: String,
    },
}

/// Kinds of refusal, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The request itself is wrong: name, size, range, descriptors.
    Invalid,
    /// No region of that name.
    NotFound,
    /// The name is taken, or its writer is alive.
    Exists,
    /// Not this region's owner.
    Forbidden,
    /// The region's kind does not allow it.
    Unsupported,
    /// A limit was reached.
    Limit,
    /// The node could not do it; the message says why.
    Failed,
    /// Versions differ.
    Version,
}

/// Where a region's content comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Written by a process that handed its tracking over.
    Tracked,
    /// Written by the node itself, on request.
    Held,
    /// A file that is compared.
    File,
    /// A copy that follows a region of another node.
    Replica,
}

/// One region in a status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegionStatus {
    /// Name on this node.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Greatest size that it can grow to, in bytes.
    #[serde(default)]
    pub max_size: u64,
    /// Bytes of memory that its data takes.
    pub resident_bytes: u64,
    /// Bytes that the node keeps beside it: twin, pre-images, staged updates.
    pub overhead_bytes: u64,
    /// Where its content comes from.
    pub role: Role,
    /// `live`, `orphaned` (its writer is gone), `unattended` (a cooperative region that
    /// nobody writes at the moment), or of replicas `connecting`,
    /// `syncing`, `following`, `resyncing`.
    pub state: String,
    /// How changes are found, as its writer asked; none for replicas.
    pub mode: Option<Mode>,
    /// How changes are found now: `compare` where tracking was lost for good.
    pub tracking: Option<Mode>,
    /// Why changes are found this way, where it was not the writer who said how.
    pub chosen: Option<String>,
    /// When epochs are published; none for replicas.
    pub publish: Option<Publish>,
    /// Whether other nodes may follow it.
    pub shared: bool,
    /// User id of its owner.
    pub owner_uid: u32,
    /// Process that writes it; the first of them where several do.
    pub writer_pid: Option<i32>,
    /// Who may write it; none where no program does.
    #[serde(default)]
    pub kind: Option<WriteKind>,
    /// Of a cooperative region: the processes that write it.
    #[serde(default)]
    pub attachments: Vec<AttachmentStatus>,
    /// Generation, 32 hexadecimal digits.
    pub generation: String,
    /// Last epoch.
    pub epoch: u64,
    /// Whether the last epoch is a cut.
    pub cut: bool,
    /// Captures made in this life.
    pub captures: u64,
    /// Bytes that all captures or applied updates changed.
    pub bytes_changed: u64,
    /// Dirty pages found per second, over the last seconds.
    pub dirty_pages_per_s: f64,
    /// Current pause between timer captures, in microseconds.
    pub interval_us: u64,
    /// Cost of the last capture, in microseconds.
    pub capture_us: u64,
    /// Whole comparisons made because tracking was lost, with the last reason.
    pub full_compares: u64,
    /// Why tracking was last lost.
    pub last_loss: Option<String>,
    /// What happened to its tracking, by kind; kinds that never happened are left out.
    pub losses: Vec<LossStatus>,
    /// How the audit gets on; none where everything is compared anyway, where only
    /// marks count, and for regions that nobody tracks.
    pub audit: Option<AuditStatus>,
    /// Pages that are written all the time; of regions in mode `async` and `sync`.
    #[serde(default)]
    pub hot: Option<HotStatus>,
    /// What exact tracking costs; of regions in mode `sync`.
    pub exact: Option<ExactStatus>,
    /// Readers attached.
    pub readers: u64,
    /// Where a replica comes from.
    pub source: Option<String>,
    /// Who follows it.
    pub replicas: Vec<ReplicaStatus>,
    /// Of a replica: updates applied, ignored, dropped, and resyncs asked for.
    pub applied: Option<AppliedStatus>,
}

/// One process that writes a cooperative region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentStatus {
    /// Its place among the writers.
    pub slot: u32,
    /// The process.
    pub pid: i32,
    /// How its stores are found; `compare` where its tracking was lost.
    pub mode: Mode,
    /// `writing`, `ending` (its link or its memory is gone, its process is not yet), or
    /// `away`: it wrote under an earlier node and has not come back.
    pub state: String,
}

/// Losses of tracking of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossStatus {
    /// What happened.
    pub kind: LossKind,
    /// How often, over all lives of the region on this node.
    pub count: u64,
    /// The last one, in words.
    pub reason: String,
    /// When that was, in milliseconds since 1970.
    pub at_ms: u64,
}

/// The audit of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditStatus {
    /// Time in which it is to get round, in milliseconds.
    pub period_ms: u64,
    /// Times that it compared everything.
    pub rounds: u64,
    /// How long the last round took, in milliseconds; none before its end.
    pub last_round_ms: Option<u64>,
    /// Bytes of the present round that are behind it.
    pub position: u64,
    /// Times that the registration of the whole mapping was confirmed.
    pub mapping_rounds: u64,
}

/// Pages that were written in so many captures or cuts in a row that they are treated
/// apart: in mode `async` left open and compared, in mode `sync` left out of what is
/// armed before a cut's last pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HotStatus {
    /// Hot pages now.
    pub pages: u64,
    /// Their share of the region's pages, 0 to 1.
    pub share: f64,
    /// Captures in a row after which a page counts as hot; 0 for never.
    pub after: u64,
}

/// What exact tracking of a region has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExactStatus {
    /// Cuts made.
    pub cuts: u64,
    /// The last pass in which stores waited, in microseconds.
    pub withheld_us: u64,
    /// The longest such pass, in microseconds.
    pub longest_withheld_us: u64,
    /// Faults answered.
    pub faults: u64,
    /// Pages copied before they were written.
    pub saved_pages: u64,
    /// Room for such copies, in bytes.
    pub pool_bytes: u64,
    /// How much of it is used now, in bytes.
    pub pool_used_bytes: u64,
    /// Cuts given up because stores waited too long for room.
    pub voided: u64,
    /// Pages that were dirty in `hot_after` successive cuts, at the last one.
    pub hot_pages: u64,
    /// Successive cuts after which a page counts as hot.
    pub hot_after: u64,
    /// Pages written since the last cut.
    pub dirty_pages: u64,
}

/// What a replica has done with the updates it received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedStatus {
    /// Updates applied.
    pub applied: u64,
    /// Updates ignored because they were known.
    pub ignored: u64,
    /// Updates dropped: gap, deadline, damage.
    pub dropped: u64,
    /// Resyncs asked for.
    pub resyncs: u64,
    /// Times that an apply waited for a reader's hold.
    pub held: u64,
}

/// One follower of a region in a status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Name of the following node.
    pub node: String,
    /// `syncing`, `following`, `behind`, `away`.
    pub state: String,
    /// Last epoch it acknowledged.
    pub acked_epoch: u64,
    /// Epochs it is behind.
    pub lag_epochs: u64,
    /// Bytes not yet acknowledged.
    pub pending_bytes: u64,
    /// Bytes of updates sent, headers included.
    pub bytes_sent: u64,
    /// Updates sent.
    pub updates_sent: u64,
}

/// A node in a status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Name of the node.
    pub node: String,
    /// Version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Random id of this run, 32 hexadecimal digits.
    pub node_id: String,
    /// Time since it started, in milliseconds.
    pub uptime_ms: u64,
    /// Address it listens on for followers, with the real port.
    pub listen: Option<String>,
    /// Memory of the process, in bytes.
    pub rss_bytes: u64,
    /// Bytes of it that are kept to receive and send bulk in, used now or not.
    #[serde(default)]
    pub buffer_bytes: u64,
    /// Open connections of all kinds.
    pub connections: u64,
    /// Bytes sent to other nodes.
    pub bytes_sent: u64,
    /// Bytes received from other nodes.
    pub bytes_received: u64,
    /// Longest turn of the loop since the last report, in microseconds.
    pub longest_turn_us: u64,
    /// Turns of the loop.
    pub turns: u64,
    /// Its regions, by name.
    pub regions: Vec<RegionStatus>,
    /// The segment that it lends to an address space, if it does.
    #[serde(default)]
    pub space: Option<SpaceStatus>,
    /// NBD clients of it, if it serves any.
    #[serde(default)]
    pub nbd: Option<NbdStatus>,
}

/// NBD clients of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdStatus {
    /// Clients that are connected, whether they have chosen an export or not.
    pub clients: u64,
    /// Clients that were turned away.
    pub turned_away: u64,
    /// Clients that were hung up on for what they sent.
    pub broken: u64,
    /// What they have chosen, by name; those that nobody has chosen are left out.
    pub exports: Vec<NbdExportStatus>,
}

/// One export in a status report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdExportStatus {
    /// Its name.
    pub name: String,
    /// Connections to it that are there.
    pub connections: u64,
    /// Connections to it that there have been.
    pub connected: u64,
    /// Requests taken.
    pub requests: u64,
    /// Requests answered by an error.
    pub errors: u64,
}

/// How a server of an address space goes; also the reply to a stat of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceStatus {
    /// Its name.
    pub server: String,
    /// Its position among the servers, from 0.
    pub position: u32,
    /// The life of its segment, 32 hexadecimal digits.
    pub incarnation: String,
    /// Bytes of its segment.
    pub segment_size: u64,
    /// `memory` or `replica`.
    pub durability: String,
    /// Clients that were welcomed and are there.
    pub clients: u64,
    /// Clients that were turned away.
    pub turned_away: u64,
    /// Connections that were ended for what they sent.
    pub broken: u64,
    /// Operations carried out, those in batches each for itself.
    pub operations: u64,
    /// Operations refused.
    pub refused: u64,
    /// Bytes copied out.
    pub read_bytes: u64,
    /// Bytes changed.
    pub written_bytes: u64,
    /// Requests that changed something.
    pub changes: u64,
    /// Replies that went without a replica's acknowledgement, which they should have had.
    pub unacknowledged: u64,
    /// Lines in the log of operations.
    pub log_lines: u64,
    /// Operations that the log had no room for.
    pub log_dropped: u64,
    /// NBD clients of its process, if it serves any.
    #[serde(default)]
    pub nbd: Option<NbdStatus>,
    /// Clients on its host that write by mapping, where they may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_writers: Option<LocalWriters>,
}

/// Clients of a server of an address space that write its segment by mapping. What they do
/// is in none of its other figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalWriters {
    /// How many may.
    pub writing: u64,
    /// Those that were killed for staying at a stripe which others waited for.
    pub killed: u64,
    /// Stripes taken over from a client that may have been in the middle of a change.
    pub taken_over: u64,
    /// Locks that named who did not hold them, and were broken open.
    pub repaired: u64,
    /// The latest ranges of those that were taken over: each may hold half a change.
    pub maybe_modified: Vec<Suspect>,
}

/// A range of a segment that may hold half a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspect {
    /// Its first byte in the segment.
    pub first: u64,
    /// The byte behind its last one.
    pub end: u64,
    /// What happened.
    pub why: String,
}

impl std::fmt::Display for Suspect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}: {}", self.first, self.end, self.why)
    }
}

/// A message that could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The first bytes are something else.
    #[error("not a control message: it starts with {found:02x?} instead of {MAGIC:02x?}")]
    Magic {
        /// What stood there.
        found: [u8; 4],
    },
    /// A length is beyond its limit.
    #[error("{part} of {len} bytes in a control message is over the limit of {limit}")]
    TooLong {
        /// `json` or `payload`.
        part: &'static str,
        /// Declared length.
        len: u64,
        /// Greatest length.
        limit: u64,
    },
    /// The JSON is not a message.
    #[error("a control message cannot be read")]
    Json(#[from] serde_json::Error),
}

/// A message taken from the front of a buffer.
#[derive(Debug, PartialEq)]
pub struct Message<T> {
    /// What it says.
    pub body: T,
    /// Raw bytes that go along.
    pub payload: Vec<u8>,
}

/// The bytes of one message.
///
/// # Errors
/// [`ControlError::TooLong`] if it is over the limits.
pub fn encode<T: Serialize>(body: &T, payload: &[u8]) -> Result<Vec<u8>, ControlError> {
    let json = serde_json::to_vec(body)?;
    check_lengths(
        json.len() as u64,
        payload.len() as u64,
        limits::MAX_CONTROL_ANSWER,
    )?;
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + json.len() + payload.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&json);
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Takes one whole message from the front of `buffer`; none while it is incomplete.
/// `max_json` is [`limits::MAX_CONTROL_REQUEST`] in the node, which trusts nobody,
/// and [`limits::MAX_CONTROL_ANSWER`] in a client.
///
/// # Errors
/// What makes the rest of the stream meaningless: the connection is to be closed,
/// except after [`ControlError::Json`], where the message was taken off.
pub fn decode<T: for<'a> Deserialize<'a>>(
    buffer: &mut Vec<u8>,
    max_json: u64,
) -> Result<Option<Message<T>>, ControlError> {
    let Some(prefix) = buffer.first_chunk::<PREFIX_BYTES>() else {
        return Ok(None);
    };
    let [m0, m1, m2, m3, j0, j1, j2, j3, p0, p1, p2, p3] = *prefix;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(ControlError::Magic {
            found: [m0, m1, m2, m3],
        });
    }
    let json_len = u32::from_le_bytes([j0, j1, j2, j3]);
    let payload_len = u32::from_le_bytes([p0, p1, p2, p3]);
    check_lengths(u64::from(json_len), u64::from(payload_len), max_json)?;
    let json_end = PREFIX_BYTES + json_len as usize;
    let end = json_end + payload_len as usize;
    if buffer.len() < end {
        return Ok(None);
    }
    let body = serde_json::from_slice(&buffer[PREFIX_BYTES..json_end]);
    let payload = buffer[json_end..end].to_vec();
    buffer.drain(..end);
    Ok(Some(Message {
        body: body?,
        payload,
    }))
}

fn check_lengths(json: u64, payload: u64, max_json: u64) -> Result<(), ControlError> {
    let check = |part, len, limit| {
        if len > limit {
            Err(ControlError::TooLong { part, len, limit })
        } else {
            Ok(())
        }
    };
    check("json", json, max_json)?;
    check("payload", payload, limits::MAX_CONTROL_PAYLOAD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_any_cut_of_the_stream() {
        let request = Request::RegionWrite {
            name: "a".into(),
            offset: 7,
        };
        let mut bytes = encode(&request, b"payload").unwrap();
        bytes.extend(encode(&Request::Status, b"").unwrap());
        let mut buffer = Vec::new();
        let mut seen = Vec::new();
        for byte in bytes {
            buffer.push(byte);
            while let Some(message) = decode::<Request>(&mut buffer, 1 << 16).unwrap() {
                seen.push(message);
            }
        }
        assert_eq!(seen.len(), 2);
        assert_eq!(
            seen[0],
            Message {
                body: request,
                payload: b"payload".to_vec()
            }
        );
        assert_eq!(seen[1].body, Request::Status);
        assert!(buffer.is_empty());
    }

    #[test]
    fn lengths_are_checked_before_anything_is_kept() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(u32::MAX.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        assert!(matches!(
            decode::<Request>(&mut bytes, 1 << 16),
            Err(ControlError::TooLong { part: "json", .. })
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if bytes.len() > 4 && bytes[0] % 2 == 0 {
                bytes[..4].copy_from_slice(&MAGIC);
            }
            let _ = decode::<Request>(&mut bytes, 1 << 16);
        }
    }
}
