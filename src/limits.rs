//! Every bound of the project, with its reason; `uffd-sync limits` prints this table.
//!
//! Relations between bounds are asserted at compile time below the table.

use crate::units::{GIB, KIB, MIB, PAGE_SIZE};

/// How a limit's number is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A number of bytes.
    Bytes,
    /// A number of things.
    Count,
    /// A time in microseconds.
    Micros,
    /// A time in milliseconds.
    Millis,
}

/// One bound: what `uffd-sync limits` prints.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// The constant's name.
    pub name: &'static str,
    /// Its value.
    pub value: u64,
    /// How the value is to be read.
    pub unit: Unit,
    /// Why it is what it is.
    pub reason: &'static str,
}

macro_rules! limits {
    ($($(#[doc = $reason:literal])+ $name:ident = $value:expr, $unit:ident;)+) => {
        $($(#[doc = $reason])+ pub const $name: u64 = $value;)+

        /// All limits, in the order of this file.
        pub const LIMITS: &[Limit] = &[
            $(Limit { name: stringify!($name), value: $name, unit: Unit::$unit, reason: concat!($($reason),+) },)+
        ];
    };
}

limits! {
    /// Longest name of a region or a node; one line on a screen, and a fixed field in shared layouts.
    MAX_NAME_BYTES = 64, Bytes;
    /// Largest region; keeps every offset + length far from overflow and page numbers in 32 bits.
    MAX_REGION_BYTES = 4096 * GIB, Bytes;
    /// Most regions on one node; each costs descriptors and two mappings.
    MAX_REGIONS = 16_384, Count;
    /// Changed bytes carried by one frame; fits the second-level cache, so that checksum and copy read it once.
    MAX_CHUNK = 256 * KIB, Bytes;
    /// Extents in one frame; bounds the headers in a frame to a fraction of its data.
    MAX_EXTENTS_PER_FRAME = 4096, Count;
    /// Longest body of any frame: a full chunk, its extent headers and the update prefix.
    MAX_BODY = MAX_CHUNK + 12 * MAX_EXTENTS_PER_FRAME + 64, Bytes;
    /// Bytes of an update staged by a replica before it is applied; a larger update goes in place and the region is `syncing` meanwhile.
    STAGING_BUDGET = 512 * MIB, Bytes;
    /// Time for which staging memory is kept for the next large update; faulting it in again costs more than the copy.
    STAGING_KEPT_MS = 10_000, Millis;
    /// Changed bytes of a capture under way from which on it is shipped while it goes on; below, one frame or few carry it at once.
    EARLY_MIN = 4 * MAX_CHUNK, Bytes;
    /// Frames whose memory one node keeps for the next ones.
    SPARE_FRAMES = 16, Count;
    /// Bytes of an update from which on it is applied past the caches, which it would only empty.
    STREAM_COPY_MIN = 8 * MIB, Bytes;
    /// Freed memory that `serve` keeps for the next large buffer instead of faulting it in again.
    KEPT_FREE = 64 * MIB, Bytes;
    /// Extents kept exactly per replica; beyond it they degrade to whole pages.
    MAX_PENDING_EXTENTS = 65_536, Count;
    /// Share of a region that may be copied aside for open updates: region size / this.
    PREIMAGE_DIVISOR = 4, Count;
    /// Least bytes for pre-images, so that tiny regions can have an open update at all.
    PREIMAGE_MIN = 4 * MIB, Bytes;
    /// Open updates of different epochs that one region copies aside for.
    MAX_PINNED_TARGETS = 2, Count;
    /// Updates sent to one replica and not yet acknowledged; beyond it changes merge into the next one.
    MAX_UNACKED = 64, Count;
    /// Servers of one space; a split operation asks them all at once.
    MAX_SERVERS = 1024, Count;
    /// Longest name of a host in a space's file, as DNS has it.
    MAX_HOST_BYTES = 253, Bytes;
    /// Longest file that describes a space: each server on a line with the longest names.
    MAX_SPACE_FILE = MIB, Bytes;
    /// Most connections to one server of a space that its file may allow; each has up to two operations in a ring of 65,536.
    MAX_SPACE_CLIENTS = 32_000, Count;
    /// Most unanswered operations of one connection that a space's file may allow.
    MAX_SPACE_IN_FLIGHT = 65_536, Count;
    /// Longest range of one operation on a server of a space; clients split what is longer.
    MAX_SPACE_OPERATION = MIB, Bytes;
    /// Bytes of a segment that change as one; what an operation touches in it is seen whole or not at all.
    SPACE_STRIPE = 64 * KIB, Bytes;
    /// Clients that write the segment of one server by mapping.
    MAX_SPACE_WRITERS = 256, Count;
    /// Longest time that such a client may be given to be at a stripe which others wait for.
    SPACE_LEASE_CEILING_MS = 60_000, Millis;
    /// Ranges that may hold half a change, of which a server of a space names the latest.
    MAX_SPACE_SUSPECTS = 16, Count;
    /// Operations in one batch on a server of a space.
    MAX_SPACE_BATCH = 64, Count;
    /// Time for a server of a space to greet, once it is connected.
    SPACE_GREETING_MS = 2_000, Millis;
    /// Operations that one client of a space may have submitted without taking their answers.
    MAX_SPACE_TICKETS = 4096, Count;
    /// Bytes of one client's operations that one server of a space has not yet answered.
    SPACE_WINDOW = 8 * MIB, Bytes;
    /// Unanswered operations of one client at one server of a space, whatever it allows.
    SPACE_CLIENT_IN_FLIGHT = 1024, Count;
    /// Replies to one client of a space that wait to be sent, before nothing more is carried out for it.
    SPACE_SEND_QUEUE = 4 * MIB, Bytes;
    /// Bytes that one client's requests copy or set before other clients have their turn; a fill asks for a MiB by 49 bytes.
    SPACE_TURN = 4 * MIB, Bytes;
    /// Time for which a client of a space may stay in the middle of a request, or leave replies unread.
    SPACE_STALL_MS = 60_000, Millis;
    /// Time that a server of a space looks for the next request, and its client for the reply, before it sleeps: about two wake-ups of a sleeping processor.
    SPACE_SPIN_US = 100, Micros;
    /// Longest deadline of one operation on a space.
    SPACE_DEADLINE_CEILING_MS = 3_600_000, Millis;
    /// Smallest file of a log of operations, before it is rotated.
    SPACE_LOG_FLOOR = 64 * KIB, Bytes;
    /// Operations of a server of a space that wait to be written to its log; more are dropped and counted.
    SPACE_LOG_QUEUE = 65_536, Count;
    /// Rotated logs, or snapshots, that may be kept.
    MAX_KEPT_FILES = 10_000, Count;
    /// Longest pause between two periodic snapshots: a year, in seconds.
    SNAPSHOT_PERIOD_CEILING_S = 31_536_000, Count;
    /// Longest time that a strict snapshot may hold writes back.
    SNAPSHOT_GATE_CEILING_MS = 10_000, Millis;
    /// Longest read or write of one NBD request, as clients take for granted where nothing else is said.
    MAX_NBD_PAYLOAD = 32 * MIB, Bytes;
    /// Size that NBD clients are told to prefer for their requests: a page.
    NBD_PREFERRED_BLOCK = PAGE_SIZE, Bytes;
    /// Longest text in the NBD protocol, as its document has it.
    MAX_NBD_TEXT = 4 * KIB, Bytes;
    /// Longest data of an option that is looked at; fits the name of an export and a dozen queries, what is longer is refused and passed over.
    MAX_NBD_OPTION = 64 * KIB, Bytes;
    /// Options of one NBD client before it has to have chosen an export; real ones send five.
    MAX_NBD_OPTIONS = 256, Count;
    /// Queries for metadata contexts in one option.
    MAX_NBD_QUERIES = 64, Count;
    /// Parts of a region whose last change is kept for NBD clients, 8 bytes each; pages, up to a region of 4 GiB.
    MAX_CHANGE_GRAINS = 1024 * 1024, Count;
    /// Metadata contexts that one NBD client has answered at once; real ones ask for two.
    MAX_NBD_CONTEXTS = 8, Count;
    /// Bytes that a long NBD request is carried out by at a time; whole stripes.
    NBD_PIECE = 4 * SPACE_STRIPE, Bytes;
    /// Bytes of a range that is zeroed at a time; nothing of it is sent or staged.
    NBD_ZERO_PIECE = MIB, Bytes;
    /// Bytes of one NBD connection that wait for other servers before nothing more is taken from it.
    NBD_STAGED = 4 * MIB, Bytes;
    /// Requests of one NBD connection that wait for other servers; `fio` and `nbdcopy` use up to 64.
    MAX_NBD_IN_FLIGHT = 256, Count;
    /// Bytes of replies that are made for one NBD client at a time, besides the piece that passes it.
    NBD_REPLIES = MIB, Bytes;
    /// Bytes read, written or zeroed for one NBD connection before others have their turn; about 0.2 ms.
    NBD_TURN = 2 * MIB, Bytes;
    /// Extents in one answer to a question of block status; clients ask again from where it ends.
    MAX_NBD_EXTENTS = 1024, Count;
    /// Bytes that all NBD connections of a server have wait for other servers.
    NBD_STAGED_BY_ALL = 64 * MIB, Bytes;
    /// Units of all NBD connections of a server that wait for other servers.
    MAX_NBD_ERRANDS = 4096, Count;
    /// Places where one process serves NBD clients.
    MAX_NBD_PLACES = 16, Count;
    /// Runs in one answer of a server of a space to a question for holes; each costs it two system calls.
    MAX_SPACE_RUNS = 256, Count;
    /// NBD connections to one process, whatever they have chosen.
    MAX_NBD_CLIENTS = 256, Count;
    /// Exports that NBD figures are shown of; more than clients can be connected to.
    MAX_NBD_FIGURES = 512, Count;
    /// Replicas following one region.
    MAX_REPLICAS = 64, Count;
    /// Replicas whose acknowledged epochs stand in the control page.
    MAX_ACKED_SLOTS = 16, Count;
    /// Time without a frame after which an open update is dropped and a resync asked for.
    UPDATE_DEADLINE_MS = 5_000, Millis;
    /// Longest time that a capture by timer is put off while pre-images are short.
    CAPTURE_POSTPONE_MS = 100, Millis;
    /// Longest time that a reader's hold delays the next apply.
    HOLD_MAX_MS = 10, Millis;
    /// Seqlock tries of a reader before it raises its hold.
    READ_TRIES = 3, Count;
    /// Readers attached to one region.
    MAX_READERS = 256, Count;
    /// Pages that one step of a capture looks at; about 0.15 ms when all of them changed.
    CAPTURE_STEP_PAGES = 128, Count;
    /// Longest time that one turn of the loop works on captures, applies and digests.
    SLICE_US = 1_000, Micros;
    /// Longest time that one turn works on one region; what waits behind it is another region's commit.
    WORK_STEP_US = 200, Micros;
    /// Connections of all kinds on one node.
    MAX_CONNECTIONS = 1_024, Count;
    /// Of these, kept for the control socket: followers, however many, do not lock its users out.
    RESERVED_CONNECTIONS = 64, Count;
    /// Connections that have not finished their hello.
    MAX_HALF_OPEN = 64, Count;
    /// Time for a hello to arrive.
    HANDSHAKE_DEADLINE_MS = 5_000, Millis;
    /// Connections accepted in one turn of the loop.
    MAX_ACCEPTS_PER_TURN = 32, Count;
    /// Silence after which a connection is probed with a ping.
    PING_INTERVAL_MS = 1_000, Millis;
    /// Silence after which a connection counts as dead.
    PEER_DEADLINE_MS = 5_000, Millis;
    /// Shortest wait before a lost source is dialled again; doubled up to the longest.
    RECONNECT_MIN_MS = 50, Millis;
    /// Longest wait before a lost source is dialled again.
    RECONNECT_MAX_MS = 2_000, Millis;
    /// Bytes queued for one connection before producers stop.
    MAX_SEND_QUEUE = 2 * MIB, Bytes;
    /// Longest JSON part of a request on the control socket.
    MAX_CONTROL_REQUEST = 64 * KIB, Bytes;
    /// Longest JSON part of an answer on the control socket; the status of as many regions as a node may have.
    MAX_CONTROL_ANSWER = 64 * MIB, Bytes;
    /// Longest raw payload of a message on the control socket.
    MAX_CONTROL_PAYLOAD = MIB, Bytes;
    /// Descriptors in one message on the control socket.
    MAX_CONTROL_FDS = 8, Count;
    /// Clients of one channel server; each costs its memory, a connection and a thread.
    MAX_CHANNEL_CLIENTS = 256, Count;
    /// Connections to a channel server that have not said what they want; more wait to be accepted.
    MAX_CHANNEL_HALF_OPEN = 16, Count;
    /// Descriptors of one channel's memory: the channel's own, and the payload's where that is a view.
    MAX_CHANNEL_FDS = 2, Count;
    /// Longest status of a channel server; some 800 bytes for each of its clients.
    MAX_CHANNEL_STATUS = 256 * KIB, Bytes;
    /// Notices of changed variables that wait for the program's callback; beyond it nothing is received from peers.
    MAX_CALLBACKS_WAITING = 4_096, Count;
    /// Notices that one stream of changed variables holds at most, whatever is asked for.
    MAX_STREAM_NOTICES = 65_536, Count;
    /// Longest note about a refused connection between processes that share variables; lists some hundred of them.
    MAX_VARIABLE_NOTE = 64 * KIB, Bytes;
    /// Longest request about ordered variables; a new session begins with what all members saved, in hexadecimal digits.
    MAX_VARIABLE_REQUEST = 64 * MIB, Bytes;
    /// Threads that carry operations to an etcd cluster, each with one request under way.
    CLUSTER_WORKERS = 16, Count;
    /// Longest answer of an etcd cluster: some thousand of the longest values.
    MAX_CLUSTER_ANSWER = 64 * MIB, Bytes;
    /// Commands that look at or change ordered variables of a node at once; each has a thread.
    MAX_VARIABLE_CLIENTS = 64, Count;
    /// Commands from other threads waiting for the engine.
    MAX_COMMANDS = 256, Count;
    /// Marks in the ring of a control memfd; beyond it they degrade to whole pages.
    MARK_RING_SLOTS = 4_096, Count;
    /// Shortest pause between two timer captures of a region (default of the configuration).
    INTERVAL_MIN_US = 1_000, Micros;
    /// Longest pause between two timer captures of a region (default of the configuration); the staleness limit, reached where captures are costly.
    INTERVAL_MAX_US = 20_000, Micros;
    /// Longest pause between two timer captures of a region in which nothing is stored; what is stored first waits that long.
    IDLE_MAX_US = 20_000, Micros;
    /// Time within which marked bytes are shipped without a commit (default of the configuration).
    MARK_MAX_DELAY_US = 5_000, Micros;
    /// Least pause that may be configured; below it scanning alone keeps the engine busy.
    PAUSE_FLOOR_US = 50, Micros;
    /// Greatest pause that may be configured; beyond it a replica is a backup, not a mirror.
    PAUSE_CEILING_US = 60_000_000, Micros;
    /// Time after which a region is scanned even though its writer has not run; for stores that another process makes into the writer's memory.
    IDLE_SCAN_MS = 500, Millis;
    /// Time of each second that captures which find nothing may take together; beyond it such regions are looked at less often.
    IDLE_SHARE_US = 250_000, Micros;
    /// Time in which the audit compares all of a region with its twin (default of the configuration).
    AUDIT_PERIOD_MS = 60_000, Millis;
    /// Least audit period that may be configured: what is due is given out once a second.
    AUDIT_PERIOD_FLOOR_MS = 1_000, Millis;
    /// Greatest audit period that may be configured: a day.
    AUDIT_PERIOD_CEILING_MS = 86_400_000, Millis;
    /// Pages that one step of the audit compares; about 0.1 ms when they are cold.
    AUDIT_STEP_PAGES = 64, Count;
    /// Longest time that one turn works on the audit.
    AUDIT_TURN_US = 200, Micros;
    /// Pause between two turns of the audit: it takes a tenth of a processor at most.
    AUDIT_PAUSE_US = 2_000, Micros;
    /// Bytes of a mapping whose registration is asked about at once; 0.2 ms where all of it is in use.
    MAPPING_SLICE = 64 * MIB, Bytes;
    /// Share of a mapping whose registration is asked about each second, if that is more: mapping length / this.
    MAPPING_DIVISOR = 8, Count;
    /// Time without a capture after which stores that wait are told as a standstill.
    STANDSTILL_MS = 10_000, Millis;
    /// Longest reason that is kept of what happened to a region.
    MAX_REASON_BYTES = 512, Bytes;
    /// Content compared by one digest in a resync; a region is sent in these pieces where they differ.
    DIGEST_CHUNK = 64 * KIB, Bytes;
    /// Digests in one frame.
    MAX_DIGESTS_PER_FRAME = 4_096, Count;
    /// Share of a `sync` region that may be copied before it is written, while a cut is captured: region size / this.
    CUT_POOL_DIVISOR = 16, Count;
    /// Least bytes copied before they are written, so that a small region's writers seldom wait.
    CUT_POOL_MIN = MIB, Bytes;
    /// Most bytes copied before they are written; at 100,000 faults a second a capture may take 160 ms before writers wait.
    CUT_POOL_MAX = 64 * MIB, Bytes;
    /// Longest time that a store waits for room to copy its page; then the cut is given up and the region compared.
    CUT_STALL_MS = 1_000, Millis;
    /// Rounds in which pages are armed before a cut while faults are still answered.
    CUT_ROUNDS = 4, Count;
    /// Pages left over for the pass in which faults wait: 50 us at 0.8 us each.
    CUT_ENOUGH_PAGES = 64, Count;
    /// Captures in a row that a page of an `async` region is written in before it is left open (default of the configuration).
    HOT_CAPTURES = 2, Count;
    /// Greatest number of such captures that may be configured; beyond it few pages ever get there.
    HOT_CAPTURES_CEILING = 64, Count;
    /// Successive cuts a page has to be dirty in to count as hot.
    HOT_CUTS = 4, Count;
    /// Hot pages left out of the rounds before a cut; more of them would make the pass in which faults wait too long.
    HOT_WITHHELD_PAGES = 128, Count;
    /// Adjacent pages opened at once for a writer that goes through memory in order.
    WINDOW_PAGES = 64, Count;
    /// Stores of one region that wait for room at the same time; further ones stay with the kernel.
    MAX_PARKED = 1_024, Count;
    /// Processes that write one cooperative region; each costs the node a descriptor or three, and a bit per page in mode `sync`.
    MAX_WRITERS = 32, Count;
    /// Time for which the writers of a cooperative region may take to come back to a new node, before they count as gone; thirty of their dials.
    AWAY_DEADLINE_MS = 60_000, Millis;
    /// Threads that answer faults, one for each `sync` region.
    MAX_FAULT_THREADS = 256, Count;
    /// How long such a thread looks for the next fault before it sleeps; what is beyond it wakes in 20 us.
    FAULT_SPIN_US = 30, Micros;
    /// Longest time that a writer which lets its region go waits for the node to take notice.
    FAREWELL_MS = 1_000, Millis;
    /// Time within which a cut that was asked for is answered or refused.
    CUT_DEADLINE_MS = 10_000, Millis;
    /// Time in which `SIGTERM` drains what is pending.
    DRAIN_DEADLINE_MS = 3_000, Millis;
    /// Time for which a source remembers a replica that went away, so that it can resume.
    RESUME_WINDOW_MS = 300_000, Millis;
    /// Slots of a channel: requests in flight at the same time; two completions of each fit in 16-bit tickets.
    MAX_CHANNEL_SLOTS = 1_024, Count;
    /// Least slots of a channel; its completion ring is then one line.
    MIN_CHANNEL_SLOTS = 8, Count;
    /// Slots of a channel that asks for no number.
    DEFAULT_CHANNEL_SLOTS = 64, Count;
    /// Payload of a channel; lengths of frames are 32 bits.
    MAX_CHANNEL_PAYLOAD = 2 * GIB, Bytes;
    /// Metadata of one side of a channel, its length word included.
    MAX_CHANNEL_METADATA = MIB, Bytes;
    /// Longest text of a handler's error that reaches the client.
    MAX_CHANNEL_ERROR_BYTES = 256, Bytes;
    /// Requests in one batch of a channel; one worker has them all, and nobody else's turn comes before.
    MAX_BATCH_ITEMS = 4_096, Count;
    /// Worker threads of one channel.
    MAX_CHANNEL_WORKERS = 64, Count;
    /// Time that a channel's side polls before it sleeps; longer stretches cost more than a wake-up.
    CHANNEL_SPIN_US = 30, Micros;
    /// Time after which a sleeping side of a channel also watches its peer's liveness word.
    CHANNEL_PROBE_MS = 10, Millis;
    /// Answers of a channel's worker that may wait for their wake-up while further requests are there.
    MAX_DEFERRED_POSTS = 32, Count;
    /// Longest name of a two-buffer channel's buffer: with `sem.sem-w-` in front of it a file name of 255 bytes.
    ZEROBUFFER_NAME_BYTES = 245, Bytes;
    /// Largest buffer of a two-buffer channel; as for regions.
    ZEROBUFFER_MAX_BYTES = 4096 * GIB, Bytes;
    /// Pause after which a waiting end of a two-buffer channel looks whether its peer lives; version 1 has no word that the kernel marks.
    ZEROBUFFER_PEER_CHECK_MS = 20, Millis;
    /// Frames written without waiting after which a writer looks whether its reader lives.
    ZEROBUFFER_CHECK_FRAMES = 64, Count;
    /// Longest spinning before an adaptive wait sleeps; beyond it a processor is burnt for less than a wake-up costs.
    SPIN_MAX_US = 30, Micros;
    /// Bytes of a handler's error that reach the client of a two-buffer channel; the frame then fits the smallest useful buffer.
    ZEROBUFFER_REFUSAL_BYTES = 200, Bytes;
    /// Lock files of other two-buffer channels looked at when one is made, to remove what dead owners left.
    ZEROBUFFER_SWEEP_FILES = 1_024, Count;
    /// Time for which a locked name without a living reader is tried again: somebody begins, ends or clears up.
    ZEROBUFFER_LOCK_MS = 200, Millis;
    /// Age from which a lock file without shared memory counts as left behind; its owner makes both within microseconds.
    ZEROBUFFER_ORPHAN_MS = 10_000, Millis;
    /// Frames of a lap that a new writer walks over to find where its predecessor stopped; a fraction of a second.
    ZEROBUFFER_RESUME_STEPS = 16 * MIB, Count;
    /// Pause between two looks for a buffer that its reader has not made yet.
    ZEROBUFFER_ATTACH_POLL_MS = 2, Millis;
    /// Longest value of an ordered variable that holds bytes; a compare-and-swap carries two.
    MAX_VARIABLE_BYTES = 16 * KIB, Bytes;
    /// Ordered variables in one configuration.
    MAX_VARIABLES = 65_536, Count;
    /// Processes that share ordered variables; one word has a bit for each subscriber.
    MAX_VARIABLE_PROCESSES = 32, Count;
    /// Operations of one process that another has not delivered yet; with the longest values 8 MiB on each link.
    ORDERED_WINDOW = 256, Count;
    /// Messages of a link after which their receipt is told.
    ORDERED_RECEIPT_EVERY = 64, Count;
    /// How far ahead of the own clock a peer's may be: three years of a million operations a second that this process heard nothing of.
    ORDERED_CLOCK_JUMP = 1 << 48, Count;
    /// Logical time after which no operation is taken; jumps reach it after 32,768 messages, work never does.
    ORDERED_TIME_CEILING = 1 << 63, Count;
}

const _: () = {
    assert!(
        MAX_CHUNK.is_multiple_of(PAGE_SIZE),
        "a chunk holds whole pages"
    );
    assert!(
        MAX_BODY <= u32::MAX as u64,
        "a body's length is 32 bits on the wire"
    );
    assert!(
        16 * MAX_DIGESTS_PER_FRAME + 64 <= MAX_BODY,
        "a frame of digests is a frame"
    );
    assert!(
        MAX_REGION_BYTES / PAGE_SIZE <= 1 << 32,
        "page numbers fit in 32 bits"
    );
    assert!(
        RESERVED_CONNECTIONS + MAX_HALF_OPEN < MAX_CONNECTIONS,
        "followers have room beside the control socket"
    );
    assert!(
        PEER_DEADLINE_MS >= 3 * PING_INTERVAL_MS,
        "one lost ping kills no connection"
    );
    assert!(INTERVAL_MIN_US <= INTERVAL_MAX_US, "the interval has room");
    assert!(
        HOLD_MAX_MS < UPDATE_DEADLINE_MS,
        "a reader's hold cannot make an update miss its deadline"
    );
    assert!(
        MAX_SEND_QUEUE >= 2 * MAX_BODY,
        "one frame is sent while the next is made"
    );
    assert!(
        DIGEST_CHUNK.is_multiple_of(PAGE_SIZE),
        "digests cover whole pages"
    );
    assert!(
        AUDIT_PERIOD_FLOOR_MS <= AUDIT_PERIOD_MS && AUDIT_PERIOD_MS <= AUDIT_PERIOD_CEILING_MS,
        "the default audit period may be configured"
    );
    assert!(
        MAX_VARIABLE_PROCESSES <= 32,
        "subscribers of a variable are bits of one word"
    );
    assert!(
        ORDERED_CLOCK_JUMP < ORDERED_TIME_CEILING,
        "one jump does not use up the clock"
    );
    assert!(
        STANDSTILL_MS > CAPTURE_POSTPONE_MS,
        "a capture that is put off is no standstill"
    );
    assert!(
        CUT_STALL_MS > 2 * CAPTURE_POSTPONE_MS,
        "a capture that was put off ends before its writers' patience"
    );
    assert!(
        CUT_POOL_MAX / PAGE_SIZE < 1 << 24,
        "a slot's number fits beside a page's"
    );
    assert!(
        AWAY_DEADLINE_MS > 10 * RECONNECT_MAX_MS,
        "a writer dials often enough before it counts as gone"
    );
    assert!(
        MAX_WRITERS <= 32,
        "the control page has a line of words for each writer"
    );
    assert!(
        MAX_NBD_FIGURES > MAX_NBD_CLIENTS,
        "an export that is in use is not forgotten"
    );
    assert!(
        NBD_PIECE.is_multiple_of(SPACE_STRIPE) && NBD_ZERO_PIECE.is_multiple_of(SPACE_STRIPE),
        "a long request is cut where stripes end"
    );
    assert!(
        NBD_ZERO_PIECE <= MAX_SPACE_OPERATION && NBD_PIECE <= MAX_SPACE_OPERATION,
        "a piece of an NBD request is one operation"
    );
    assert!(
        NBD_STAGED >= 2 * NBD_PIECE && MAX_NBD_PAYLOAD <= u32::MAX as u64,
        "pieces overlap, and lengths fit their fields"
    );
    assert!(
        MARK_RING_SLOTS.is_power_of_two(),
        "ring positions wrap by a mask"
    );
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_has_a_reason_and_a_name_of_its_own() {
        for (i, limit) in LIMITS.iter().enumerate() {
            assert!(limit.reason.len() > 20, "{} has no reason", limit.name);
            assert!(LIMITS[..i].iter().all(|other| other.name != limit.name));
        }
    }
}
