//! Order by an etcd cluster: its revisions are the order, its log is the memory.
//!
//! ```text
//!  <prefix>v/<variable>            value: decimal digits, or the bytes as they are
//!  <prefix>o/<process>/<worker>    mark: the last operation of that worker, its outcome
//!
//!  write  txn: mark unchanged since -> put value, put mark
//!  cas    txn: mark unchanged since -> (value = expected -> put value, put mark "1"
//!                                       else              -> put mark "0", read value)
//!  hear   one watch over the prefix from the revision behind the first read
//! ```
//!
//! - I1: an operation is carried out at most once: each transaction compares its worker's
//!   mark with the revision that this worker knows. An earlier one that is still on its
//!   way finds the mark changed, and one that was carried out is found by its mark.
//! - I2: values never hold the mark, so equal values stay equal.
//! - I3: of the operations of this process on one variable one is under way at a time, so
//!   they keep their order.
//! - I4: changes are delivered in the order of their revisions, each once; where etcd has
//!   compacted them away, all values are read anew and [`Notice::Resync`] says so.

mod gateway;
mod mark;
mod watcher;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

pub use gateway::ClusterError;
use gateway::{Gateway, Txn, encoded};
use mark::Mark;
use serde_json::{Value as Json, json};

use super::OperationError;
use super::config::VariablesConfig;
use super::hearing::Hearing;
use super::pending::{Completed, Promise};
use crate::limits;
use crate::ordered::{
    Incarnation, Operation, OperationId, OrderKey, ProcessId, Value, ValueType, VariableId,
};

/// Pause before a request that failed is made at the next endpoint.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// How long an operation is tried for a caller that is still waiting.
const TRY_ROUNDS: u32 = 100_000;

/// An operation with whoever waits for it.
struct Job {
    variable: u32,
    operation: Operation,
    promise: Promise,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// Variables that a worker is busy with.
    taken: BTreeSet<u32>,
    closed: bool,
}

impl Jobs {
    /// The first operation on a variable that no worker is busy with.
    fn take(&mut self) -> Option<Job> {
        let taken = &self.taken;
        let free = |job: &Job| !taken.contains(&job.variable);
        let at = self.waiting.iter().position(free)?;
        let job = self.waiting.remove(at)?;
        self.taken.insert(job.variable);
        Some(job)
    }
}

/// Completed operations that wait until their change was delivered here, by revision.
type Ready = BTreeMap<u64, Vec<Promise>>;

struct Shared {
    gateway: Gateway,
    prefix: String,
    me: ProcessId,
    incarnation: Incarnation,
    kinds: BTreeMap<u32, ValueType>,
    hearing: Arc<Hearing>,
    jobs: Mutex<Jobs>,
    arrived: Condvar,
    ready: Mutex<Ready>,
    /// Revision up to which everything was delivered here.
    delivered: AtomicU64,
    number: AtomicU64,
    stopping: AtomicBool,
    /// What the watch last failed with; none while it runs.
    trouble: Mutex<Option<String>>,
    resyncs: AtomicU64,
    /// Changes delivered here.
    changes: AtomicU64,
    /// Operations that a worker has taken up and not completed.
    under_way: AtomicU64,
}

/// How it goes.
pub(super) struct ClusterState {
    /// Revision up to which everything was delivered.
    pub(super) revision: u64,
    pub(super) resyncs: u64,
    pub(super) changes: u64,
    pub(super) under_way: u64,
    /// Operations that no worker has taken up.
    pub(super) waiting: u64,
    /// What is wrong with the watch.
    pub(super) trouble: Option<String>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is complete before anything that can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The variables of one process over an etcd cluster.
pub(super) struct Cluster {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Cluster {
    /// Reads all values, making those that are missing, and starts watching.
    ///
    /// # Errors
    /// [`ClusterError`] if a file cannot be used or no endpoint answers.
    pub(super) fn start(
        config: &VariablesConfig,
        incarnation: Incarnation,
        hearing: Arc<Hearing>,
    ) -> Result<Self, ClusterError> {
        let etcd = config.etcd.clone().unwrap_or_default();
        let me = config.process;
        let own = |one: &&super::config::Definition| one.subscribers.contains(&me);
        let shared = Arc::new(Shared {
            gateway: Gateway::new(&etcd)?,
            prefix: etcd.prefix(),
            me: ProcessId(me),
            incarnation,
            kinds: config
                .variables
                .iter()
                .filter(own)
                .map(|one| (one.id, one.kind.into()))
                .collect(),
            hearing,
            jobs: Mutex::default(),
            arrived: Condvar::new(),
            ready: Mutex::default(),
            delivered: AtomicU64::new(0),
            number: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            trouble: Mutex::default(),
            resyncs: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            under_way: AtomicU64::new(0),
        });
        let revision = watcher::begin(&shared)?;
        let mut cluster = Self {
            shared: Arc::clone(&shared),
            workers: Vec::new(),
        };
        for index in 0..limits::CLUSTER_WORKERS {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("etcd-{index}"));
            match thread.spawn(move || Worker::new(shared, index).run()) {
                Ok(thread) => cluster.workers.push(thread),
                // Fewer workers do the same more slowly.
                Err(error) => tracing::warn!(%error, "one etcd worker fewer"),
            }
        }
        // It ends by itself soon after `stopping` is set: at the latest when its watch has
        // been silent for as long as it may be.
        let watching = std::thread::Builder::new().name("etcd-watch".into());
        if let Err(error) = watching.spawn(move || watcher::run(&shared, revision)) {
            tracing::error!(%error, "no thread to watch the cluster");
        }
        Ok(cluster)
    }

    /// Hands an operation in.
    pub(super) fn submit(&self, variable: u32, operation: Operation, promise: Promise) {
        let mut jobs = locked(&self.shared.jobs);
        if jobs.waiting.len() >= limits::MAX_COMMANDS as usize {
            promise.complete(Err(OperationError::Full));
            return;
        }
        jobs.waiting.push_back(Job {
            variable,
            operation,
            promise,
        });
        drop(jobs);
        self.shared.arrived.notify_one();
    }

    pub(super) fn state(&self) -> ClusterState {
        let shared = &self.shared;
        ClusterState {
            revision: shared.delivered.load(Ordering::Relaxed),
            resyncs: shared.resyncs.load(Ordering::Relaxed),
            changes: shared.changes.load(Ordering::Relaxed),
            under_way: shared.under_way.load(Ordering::Relaxed),
            waiting: locked(&shared.jobs).waiting.len() as u64,
            trouble: locked(&shared.trouble).clone(),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        let left = {
            let mut jobs = locked(&self.shared.jobs);
            jobs.closed = true;
            std::mem::take(&mut jobs.waiting)
        };
        drop(left);
        self.shared.arrived.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has dropped its promises.
            let _ = worker.join();
        }
        locked(&self.shared.ready).clear();
    }
}

impl Shared {
    fn value_key(&self, variable: u32) -> Vec<u8> {
        format!("{}v/{variable}", self.prefix).into_bytes()
    }

    /// Everything under the prefix: from it to before what follows it.
    fn all_keys(&self) -> (Vec<u8>, Vec<u8>) {
        let mut end = self.prefix.clone().into_bytes();
        // The prefix ends with `/`, behind which comes `0`.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        (self.prefix.clone().into_bytes(), end)
    }

    /// What follows the prefix in a key of a variable.
    fn variable_of(&self, key: &[u8]) -> Option<u32> {
        let rest = key.strip_prefix(self.prefix.as_bytes())?;
        std::str::from_utf8(rest.strip_prefix(b"v/")?)
            .ok()?
            .parse()
            .ok()
    }

    fn is_mark(&self, key: &[u8]) -> bool {
        let rest = key.strip_prefix(self.prefix.as_bytes());
        rest.is_some_and(|rest| rest.starts_with(b"o/"))
    }

    /// Gives an answer at once if its change was delivered, else when it is.
    fn complete_at(&self, revision: u64, promise: Promise, completed: Completed) {
        promise.known(Ok(completed));
        let mut ready = locked(&self.ready);
        if self.delivered.load(Ordering::Acquire) < revision {
            ready.entry(revision).or_default().push(promise);
        } else {
            promise.release();
        }
    }

    /// Everything up to `revision` was delivered.
    fn advance(&self, revision: u64) {
        let mut ready = locked(&self.ready);
        self.delivered.fetch_max(revision, Ordering::Release);
        let later = ready.split_off(&(revision + 1));
        let due = std::mem::replace(&mut *ready, later);
        drop(ready);
        for promise in due.into_values().flatten() {
            promise.release();
        }
    }
}

/// A value as etcd keeps it.
fn text_of(value: &Value) -> Vec<u8> {
    match value {
        Value::Integer(number) => number.to_string().into_bytes(),
        Value::Bytes(bytes) => bytes.to_vec(),
    }
}

/// The value that a key holds; none if it cannot be one of that kind.
fn value_of(kind: ValueType, text: &[u8]) -> Option<Value> {
    match kind {
        ValueType::Integer => {
            let number = std::str::from_utf8(text).ok()?.parse().ok()?;
            Some(Value::Integer(number))
        }
        ValueType::Bytes => {
            let fits = text.len() as u64 <= limits::MAX_VARIABLE_BYTES;
            fits.then(|| Value::bytes(text))
        }
    }
}

/// One thread that carries operations out, with a mark of its own.
struct Worker {
    shared: Arc<Shared>,
    mark: Vec<u8>,
    /// Revision of the mark as far as this worker knows.
    revision: u64,
}

impl Worker {
    fn new(shared: Arc<Shared>, index: u64) -> Self {
        let mark = format!("{}o/{}/{index}", shared.prefix, shared.me).into_bytes();
        Self {
            shared,
            mark,
            revision: 0,
        }
    }

    fn run(mut self) {
        while let Some(job) = self.next() {
            let variable = job.variable;
            if job.promise.take() {
                self.shared.under_way.fetch_add(1, Ordering::Relaxed);
                match job.operation {
                    Operation::Read => self.read(job),
                    _ => self.change(job),
                }
                self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
            }
            locked(&self.shared.jobs).taken.remove(&variable);
            // This worker takes one itself, and another may have been passed over.
            self.shared.arrived.notify_one();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut jobs = locked(&self.shared.jobs);
        loop {
            if jobs.closed {
                return None;
            }
            if let Some(job) = jobs.take() {
                return Some(job);
            }
            let woken = self.shared.arrived.wait(jobs);
            jobs = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn id(&self) -> OperationId {
        OperationId {
            initiator: self.shared.me,
            incarnation: self.shared.incarnation,
            number: self.shared.number.fetch_add(1, Ordering::Relaxed) + 1,
        }
    }

    /// Whether to go on trying.
    fn goes_on(&self, promise: &Promise) -> bool {
        !self.shared.stopping.load(Ordering::Relaxed) && !promise.is_given_up()
    }

    /// A linearisable read.
    fn read(&self, job: Job) {
        let key = self.shared.value_key(job.variable);
        while self.goes_on(&job.promise) {
            let kv = match self.shared.gateway.range(&key, None) {
                Ok(range) => range.kvs.into_iter().next(),
                Err(error) => {
                    self.failed(&error);
                    continue;
                }
            };
            let kind = self.shared.kinds[&job.variable];
            let (value, revision) = match &kv {
                Some(kv) => (value_of(kind, &kv.value), kv.mod_revision),
                None => (Some(kind.initial()), 0),
            };
            if value.is_none() {
                let variable = name(job.variable);
                job.promise
                    .complete(Err(OperationError::Foreign { variable, kind }));
                return;
            }
            let id = self.id();
            let completed = Completed {
                key: OrderKey { time: revision, id },
                applied: false,
                old: value,
            };
            self.shared.complete_at(revision, job.promise, completed);
            return;
        }
    }

    /// A write or a compare-and-swap, until it was carried out or its caller gave it up.
    fn change(&mut self, job: Job) {
        let id = self.id();
        for _ in 0..TRY_ROUNDS {
            if !self.goes_on(&job.promise) {
                return;
            }
            let body = self.transaction(&job, id);
            let txn = match self.shared.gateway.txn(&body) {
                Ok(txn) => txn,
                Err(error) => {
                    self.failed(&error);
                    continue;
                }
            };
            if txn.succeeded {
                self.revision = txn.header.revision;
                let (applied, old) = self.outcome(&job, &txn);
                if !applied && self.was_removed(&job, &txn) {
                    // By another program; until it is made again it compares with nothing.
                    let kind = self.shared.kinds[&job.variable];
                    if let Err(error) = watcher::make_key(&self.shared, job.variable, kind) {
                        self.failed(&error);
                    }
                    continue;
                }
                self.finish(job, id, applied, old);
                return;
            }
            // The mark is not as it was known: by this operation itself, whose answer was
            // lost, or by an earlier one.
            let mark = txn
                .responses
                .first()
                .and_then(|part| part.response_range.as_ref());
            let mark = mark.and_then(|range| range.kvs.first());
            self.revision = mark.map_or(0, |kv| kv.mod_revision);
            let found = mark.and_then(|kv| Mark::parse(&kv.value));
            if let Some(found) = found
                && found.id == id
            {
                self.finish(job, id, found.applied, None);
                return;
            }
        }
    }

    fn finish(&self, job: Job, id: OperationId, applied: bool, old: Option<Value>) {
        let key = OrderKey {
            time: self.revision,
            id,
        };
        let completed = Completed { key, applied, old };
        self.shared
            .complete_at(self.revision, job.promise, completed);
    }

    fn failed(&self, error: &ClusterError) {
        tracing::debug!(error = error as &dyn std::error::Error, "etcd: tried again");
        std::thread::sleep(RETRY_PAUSE);
    }

    /// Whether the operation changed its variable, and what it held before.
    fn outcome(&self, job: &Job, txn: &Txn) -> (bool, Option<Value>) {
        let kind = self.shared.kinds[&job.variable];
        let part = txn.responses.first();
        match &job.operation {
            Operation::CompareAndSwap { expected, .. } => {
                let inner = part.and_then(|part| part.response_txn.as_ref());
                if inner.is_some_and(|inner| inner.succeeded) {
                    return (true, Some(expected.clone()));
                }
                let held = match held(txn) {
                    Some(kv) => value_of(kind, &kv.value),
                    None => Some(kind.initial()),
                };
                (false, held)
            }
            _ => {
                let old = part
                    .and_then(|part| part.response_put.as_ref())
                    .and_then(|put| put.prev_kv.as_ref());
                let initial = || Some(kind.initial());
                (
                    true,
                    old.map_or_else(initial, |kv| value_of(kind, &kv.value)),
                )
            }
        }
    }

    /// Whether a compare-and-swap found no key where it would have found what it expects.
    fn was_removed(&self, job: &Job, txn: &Txn) -> bool {
        let initial = self.shared.kinds[&job.variable].initial();
        let Operation::CompareAndSwap { expected, .. } = &job.operation else {
            return false;
        };
        *expected == initial && held(txn).is_none()
    }

    fn transaction(&self, job: &Job, id: OperationId) -> Json {
        let key = encoded(&self.shared.value_key(job.variable));
        let mark = encoded(&self.mark);
        let swap = matches!(job.operation, Operation::CompareAndSwap { .. });
        let put_mark = |applied| {
            let text = Mark { id, applied, swap }.to_text();
            json!({ "request_put": { "key": mark, "value": encoded(text.as_bytes()) } })
        };
        let put = |value: &Value, previous: bool| {
            json!({ "request_put": {
                "key": key, "value": encoded(&text_of(value)), "prev_kv": previous,
            } })
        };
        let success = match &job.operation {
            Operation::CompareAndSwap { expected, new } => json!([{ "request_txn": {
                "compare": [{
                    "key": key, "target": "VALUE", "result": "EQUAL",
                    "value": encoded(&text_of(expected)),
                }],
                "success": [put(new, false), put_mark(true)],
                "failure": [put_mark(false), { "request_range": { "key": key } }],
            } }]),
            Operation::Write(value) => json!([put(value, true), put_mark(true)]),
            Operation::Read => json!([]),
        };
        json!({
            "compare": [{
                "key": mark, "target": "MOD", "result": "EQUAL",
                "mod_revision": self.revision.to_string(),
            }],
            "success": success,
            "failure": [{ "request_range": { "key": mark } }],
        })
    }
}

/// What a compare-and-swap that failed found; none if there is no key.
fn held(txn: &Txn) -> Option<&gateway::KeyValue> {
    let inner = txn.responses.first()?.response_txn.as_ref()?;
    let range = inner.responses.get(1)?.response_range.as_ref()?;
    range.kvs.first()
}

/// The kind of a variable that this process subscribes to.
fn kind_of(shared: &Shared, variable: u32) -> Option<ValueType> {
    shared.kinds.get(&variable).copied()
}

/// The change of an operation whose mark came along, or of a stranger.
fn change_key(revision: u64, id: Option<OperationId>) -> OrderKey {
    OrderKey {
        time: revision,
        id: id.unwrap_or_default(),
    }
}

/// For messages of the log.
fn name(variable: u32) -> VariableId {
    VariableId(variable)
}
