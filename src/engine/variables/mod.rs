//! Ordered variables of one process: small shared cells whose changes every subscriber
//! hears in one order, on a loop of their own.
//!
//! ```text
//!   program's threads          loop (one thread, one ring)            other processes
//!   write, cas, read --queue-> Process --> frames ------------------> Process
//!        ^ completed             |    <-- frames <-------------------
//!        +-----------------------+
//!   get  <-- values <------------+--> callback thread, streams
//! ```
//!
//! The order is decided by [`crate::ordered`], a value; with [`OrderKind::Etcd`] by a
//! cluster. [`Variables`] is what programs and nodes use.
//!
//! - I1: an operation ends in one of three ways: it is known, it was never sent, or it is
//!   [`OperationError::Indeterminate`]; never in silence.
//! - I2: values change before whoever asked for the change is told of it, so a program
//!   reads its own writes.
//! - I3: callbacks are made by one thread in the order of the keys.

mod commands;
mod config;
mod etcd;
mod hearing;
mod links;
mod notes;
mod pending;
mod place;
mod reset;
mod run;
mod status;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use commands::{Command, Commands, Submission};
pub use config::{
    Address, DEFAULT_FILE, Definition, EtcdConfig, Member, OrderKind, ValueKind, VariablesConfig,
    VariablesError,
};
use etcd::Cluster;
pub use etcd::ClusterError;
use hearing::Hearing;
pub use hearing::{Change, Notice, StreamEnd, Subscription};
pub use pending::{Completed, Pending};
pub(crate) use place::place_of;
pub use reset::{ResetError, Saved, merge_saved};
use run::Loop;
pub use status::{LinkStatus, VariablesStatus};

use crate::ordered::{
    Incarnation, Operation, ProcessId, SubmitError, SubscriptionError, Subscriptions, Value,
    ValueType, Variable, VariableId,
};
use crate::sys::SysError;
use crate::words::Generation;

/// How long the loop may take to say how it goes.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Why the variables cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is not one.
    #[error("the variables are not configured rightly")]
    Config(#[from] VariablesError),
    /// The subscriptions are not any.
    #[error("the subscriptions cannot be used")]
    Subscriptions(#[from] SubscriptionError),
    /// The address cannot be listened at.
    #[error("cannot listen at {address}")]
    Listen {
        /// Where.
        address: Address,
        /// What the kernel said.
        #[source]
        source: SysError,
    },
    /// The etcd cluster cannot be used.
    #[error("the etcd cluster cannot be used")]
    Cluster(#[from] ClusterError),
    /// The system refuses what the loop needs.
    #[error("the loop of the variables cannot run; `uffd-sync doctor` says what is missing")]
    Kernel(#[from] SysError),
    /// No thread.
    #[error("cannot start a thread for the variables")]
    Thread(#[source] std::io::Error),
    /// The order refuses to start.
    #[error("the order cannot start")]
    Order(#[from] crate::ordered::StartError),
    /// A thread ended before it said anything.
    #[error("a thread of the variables ended at its start")]
    Ended,
}

/// Why an operation did not end well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperationError {
    /// It was refused; nothing of it was sent.
    #[error("refused")]
    Refused(#[from] SubmitError),
    /// Whoever calls back must not wait for an operation that waits for the callback.
    #[error("a callback cannot wait for an ordered operation; hand it to another thread")]
    InCallback,
    /// It was not sent within the deadline, and will not be.
    #[error("not sent within {deadline:?}: {}; it is not carried out", waited_for(.reason.as_ref()))]
    NotSent {
        /// How long it waited.
        deadline: Duration,
        /// What it waited for: a peer that is not there, or room. None where it waited
        /// behind others.
        reason: Option<SubmitError>,
    },
    /// Too many operations wait already; this one is not carried out.
    #[error(
        "{} operations wait to be sent already; this one is not carried out",
        crate::limits::MAX_COMMANDS
    )]
    Full,
    /// Nobody knows: it may be carried out, before now or later.
    #[error(
        "the outcome is not known: it may be carried out, or have been; read the variable in order to see"
    )]
    Indeterminate,
    /// Another program put something into the key of a variable that it cannot hold.
    #[error(
        "the etcd cluster holds something else than {kind:?} for variable {variable}; write it anew"
    )]
    Foreign {
        /// Which.
        variable: VariableId,
        /// What it holds.
        kind: ValueType,
    },
    /// A new session is being prepared; nothing of it was sent.
    #[error("the variables wait for a new session (`uffd-sync var reset`); nothing was sent")]
    Frozen,
    /// The variables were stopped; nothing of it was sent.
    #[error("the variables were stopped; nothing was sent")]
    Stopped,
}

fn waited_for(reason: Option<&SubmitError>) -> String {
    match reason {
        Some(reason) => reason.to_string(),
        None => "other operations wait to be sent before it".to_owned(),
    }
}

impl From<ValueKind> for ValueType {
    fn from(kind: ValueKind) -> Self {
        match kind {
            ValueKind::I64 => Self::Integer,
            ValueKind::Bytes => Self::Bytes,
        }
    }
}

/// What a program is called back by.
type Callback = Box<dyn FnMut(&Notice) + Send>;

enum Order {
    Peers {
        commands: Commands,
        thread: Option<JoinHandle<()>>,
    },
    Cluster(Option<Cluster>),
}

/// The ordered variables of this process.
///
/// Shared by reference or in an [`Arc`] between threads. Dropping it stops everything:
/// operations under way become [`OperationError::Indeterminate`], streams end.
///
/// ```no_run
/// use std::time::Duration;
/// use uffd_sync::client::variables::{Notice, ValueKind, Variables, VariablesConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = VariablesConfig::new(0)
///     .member(0, "tcp://127.0.0.1:7500".parse()?)
///     .member(1, "tcp://127.0.0.1:7501".parse()?)
///     .variable(0, "price".parse()?, ValueKind::I64, [0, 1]);
/// let variables = Variables::start(config, |notice| {
///     if let Notice::Change(change) = notice {
///         println!("variable {} changed to {:?}", change.variable, change.new);
///     }
/// })?;
/// let deadline = Duration::from_secs(5);
/// variables.write(0, 10, deadline)?;
/// let swapped = variables.compare_and_swap(0, 10, 20, deadline)?;
/// assert!(swapped);
/// variables.stop();
/// # Ok(())
/// # }
/// ```
pub struct Variables {
    config: Arc<VariablesConfig>,
    subscriptions: Arc<Subscriptions>,
    incarnation: Incarnation,
    hearing: Arc<Hearing>,
    order: Order,
    callbacks: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Variables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Variables")
            .field("process", &self.config.process)
            .field("order", &self.config.order)
            .finish_non_exhaustive()
    }
}

impl Variables {
    /// Starts taking part. `callback` hears every change of the variables that this
    /// process subscribes to, from one thread, in the order that all processes hear them
    /// in; it may use [`Variables::get`], and an ordered call in it is an error.
    ///
    /// Operations may be asked for at once: they complete once every process that shares
    /// any variable with this one has been there, and each of these has met all of its own;
    /// from then on their variable's subscribers are enough.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running then.
    pub fn start(
        config: VariablesConfig,
        callback: impl FnMut(&Notice) + Send + 'static,
    ) -> Result<Self, StartError> {
        Self::begin_with(config, Some(Box::new(callback)))
    }

    /// The same without a callback: for programs that only use streams, or none.
    ///
    /// # Errors
    /// As for [`Variables::start`].
    pub fn start_silent(config: VariablesConfig) -> Result<Self, StartError> {
        Self::begin_with(config, None)
    }

    fn begin_with(
        mut config: VariablesConfig,
        callback: Option<Callback>,
    ) -> Result<Self, StartError> {
        config.check()?;
        let config = Arc::new(config);
        let subscriptions = Arc::new(subscriptions_of(&config)?);
        let me = ProcessId(config.process);
        let initial = |one: &Variable| (one.id.0, one.kind.initial());
        let values: BTreeMap<_, _> = subscriptions.of(me).map(initial).collect();
        let hearing = Arc::new(Hearing::new(values, callback.is_some()));
        // Never 0, which stands for no life.
        let incarnation = Incarnation(Generation::random().0 as u64 | 1);
        let (order, commands) = if config.order == OrderKind::Etcd {
            let cluster = Cluster::start(&config, incarnation, Arc::clone(&hearing))?;
            (Order::Cluster(Some(cluster)), None)
        } else {
            let (commands, thread) = spawn_loop(&config, &subscriptions, incarnation, &hearing)?;
            let kept = commands.clone();
            let thread = Some(thread);
            (Order::Peers { commands, thread }, Some(kept))
        };
        let mut this = Self {
            config,
            subscriptions,
            incarnation,
            hearing,
            order,
            callbacks: None,
        };
        if let Some(callback) = callback {
            this.callbacks = Some(this.spawn_callbacks(callback, commands)?);
        }
        Ok(this)
    }

    fn spawn_callbacks(
        &self,
        mut callback: Callback,
        commands: Option<Commands>,
    ) -> Result<JoinHandle<()>, StartError> {
        let hearing = Arc::clone(&self.hearing);
        let body = move || {
            let room = || {
                if let Some(commands) = &commands {
                    commands.send(Command::Room, ANSWER_DEADLINE);
                }
            };
            hearing.call_back(&mut callback, room);
        };
        std::thread::Builder::new()
            .name("variables-call".into())
            .spawn(body)
            .map_err(StartError::Thread)
    }

    /// What it was started with.
    pub fn config(&self) -> &VariablesConfig {
        &self.config
    }

    /// The variable holds `value` from some place in the order on; returns when that place
    /// was reached here.
    ///
    /// # Errors
    /// [`OperationError`]; only `Indeterminate` leaves open whether it was carried out.
    pub fn write(
        &self,
        variable: u32,
        value: impl Into<Value>,
        deadline: Duration,
    ) -> Result<(), OperationError> {
        let operation = Operation::Write(value.into());
        self.carry_out(variable, operation, deadline).map(|_| ())
    }

    /// If the variable holds `expected` at some place in the order, it holds `new` from
    /// there on; says whether it did. Never fails for another reason.
    ///
    /// # Errors
    /// As for [`Variables::write`].
    pub fn compare_and_swap(
        &self,
        variable: u32,
        expected: impl Into<Value>,
        new: impl Into<Value>,
        deadline: Duration,
    ) -> Result<bool, OperationError> {
        let (expected, new) = (expected.into(), new.into());
        let operation = Operation::CompareAndSwap { expected, new };
        let completed = self.carry_out(variable, operation, deadline)?;
        Ok(completed.applied)
    }

    /// What the variable holds here: at once, in the order that this process hears, but
    /// perhaps behind others.
    ///
    /// # Errors
    /// [`SubmitError`] if this process does not subscribe to it.
    pub fn get(&self, variable: u32) -> Result<Value, OperationError> {
        self.check(variable)?;
        let value = self.hearing.value(variable);
        let none = SubmitError::NoVariable {
            variable: VariableId(variable),
        };
        value.ok_or(OperationError::Refused(none))
    }

    /// What the variable holds at a place in the order after all that was completed
    /// before: linearisable, and as dear as a write.
    ///
    /// # Errors
    /// As for [`Variables::write`].
    pub fn read_ordered(&self, variable: u32, deadline: Duration) -> Result<Value, OperationError> {
        let completed = self.carry_out(variable, Operation::Read, deadline)?;
        completed.old.ok_or(OperationError::Indeterminate)
    }

    /// Asks for an operation without waiting for it; several may be under way. Those on
    /// one variable keep their order, those on different ones may change places.
    ///
    /// # Errors
    /// [`OperationError`] if it is refused at once.
    pub fn begin(&self, variable: u32, operation: Operation) -> Result<Pending, OperationError> {
        let kind = self.check(variable)?;
        operation
            .check(VariableId(variable), kind)
            .map_err(SubmitError::from)?;
        let (pending, promise) = pending::pending();
        match &self.order {
            Order::Peers { commands, .. } => commands.submit(Submission {
                variable,
                operation,
                promise,
            }),
            Order::Cluster(Some(cluster)) => cluster.submit(variable, operation, promise),
            Order::Cluster(None) => return Err(OperationError::Stopped),
        }
        Ok(pending)
    }

    /// One operation, waited for; where too many wait already it is asked for again.
    ///
    /// # Errors
    /// As for [`Variables::write`].
    pub fn carry_out(
        &self,
        variable: u32,
        operation: Operation,
        deadline: Duration,
    ) -> Result<Completed, OperationError> {
        if hearing::in_callback() {
            return Err(OperationError::InCallback);
        }
        let until = pending::until(deadline);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.begin(variable, operation.clone())?.wait(left) {
                Err(OperationError::Full) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_micros(100));
                }
                Err(OperationError::NotSent { reason, .. }) => {
                    return Err(OperationError::NotSent { deadline, reason });
                }
                Err(OperationError::Full) => {
                    let reason = None;
                    return Err(OperationError::NotSent { deadline, reason });
                }
                other => return other,
            }
        }
    }

    fn check(&self, variable: u32) -> Result<ValueType, SubmitError> {
        let me = ProcessId(self.config.process);
        let found = self.subscriptions.check(me, VariableId(variable))?;
        Ok(found.kind)
    }

    /// A stream of the changes of some variables, or of all that this process subscribes
    /// to, from now on. It holds `capacity` notices; with more it ends.
    ///
    /// # Errors
    /// [`OperationError::Refused`] for a variable that this process does not subscribe to.
    pub fn subscribe(
        &self,
        variables: Option<&[u32]>,
        capacity: usize,
    ) -> Result<Subscription, OperationError> {
        for variable in variables.unwrap_or_default() {
            self.check(*variable)?;
        }
        Ok(self
            .hearing
            .subscribe(variables.map(<[_]>::to_vec), capacity))
    }

    /// What all variables hold here, by id.
    pub fn values(&self) -> BTreeMap<u32, Value> {
        self.hearing.values()
    }

    /// How it goes; none if the loop does not answer.
    pub fn status(&self) -> Option<VariablesStatus> {
        let mut resyncs = 0;
        let found = match &self.order {
            Order::Peers { commands, .. } => {
                let (told, answer) = mpsc::sync_channel(1);
                if !commands.send(Command::Status(told), ANSWER_DEADLINE) {
                    return None;
                }
                answer.recv_timeout(ANSWER_DEADLINE).ok()?
            }
            Order::Cluster(cluster) => {
                let state = cluster.as_ref()?.state();
                resyncs = state.resyncs;
                commands::LoopStatus {
                    session: self.config.session,
                    state: state.trouble.unwrap_or_else(|| "running".into()),
                    clock: state.revision,
                    last: Some(state.revision),
                    delivered: state.changes,
                    in_flight: state.under_way,
                    waiting: state.waiting,
                    links: Vec::new(),
                }
            }
        };
        Some(VariablesStatus {
            process: self.config.process,
            order: self.config.order.to_string(),
            session: found.session,
            incarnation: format!("{:016x}", self.incarnation.0),
            state: found.state,
            strict: self.config.strict,
            clock: found.clock,
            delivered: found.delivered,
            last: found.last,
            in_flight: found.in_flight,
            waiting: found.waiting,
            resyncs,
            links: found.links,
        })
    }

    /// Stops taking part, after the callbacks that wait were made.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        match &mut self.order {
            Order::Peers { commands, thread } => {
                if let Some(thread) = thread.take() {
                    commands.send(Command::Stop, ANSWER_DEADLINE);
                    // A loop that panicked has ended as well.
                    let _ = thread.join();
                    commands.close();
                }
            }
            Order::Cluster(cluster) => drop(cluster.take()),
        }
        self.hearing.close();
        if let Some(callbacks) = self.callbacks.take()
            && callbacks.thread().id() != std::thread::current().id()
        {
            let _ = callbacks.join();
        }
    }
}

impl Drop for Variables {
    fn drop(&mut self) {
        self.end();
    }
}

/// The subscriptions as the order knows them.
fn subscriptions_of(config: &VariablesConfig) -> Result<Subscriptions, SubscriptionError> {
    Subscriptions::new(config.variables.iter().map(|one| Variable {
        id: VariableId(one.id),
        kind: one.kind.into(),
        subscribers: one.subscribers.iter().map(|id| ProcessId(*id)).collect(),
    }))
}

/// Starts the loop on a thread of its own, which the ring belongs to.
fn spawn_loop(
    config: &Arc<VariablesConfig>,
    subscriptions: &Arc<Subscriptions>,
    incarnation: Incarnation,
    hearing: &Arc<Hearing>,
) -> Result<(Commands, JoinHandle<()>), StartError> {
    let commands = Commands::new()?;
    let for_loop = commands.clone();
    let (config, subscriptions) = (Arc::clone(config), Arc::clone(subscriptions));
    let hearing = Arc::clone(hearing);
    let (told, started) = mpsc::sync_channel(1);
    let body = move || {
        let made = Loop::new(
            config,
            subscriptions,
            incarnation,
            hearing,
            for_loop.clone(),
        );
        match made {
            Ok(made) => {
                // Whoever started it waits for this.
                let _ = told.send(Ok(()));
                if let Err(error) = made.run() {
                    tracing::error!(%error, "the loop of the variables ended");
                }
            }
            Err(error) => {
                let _ = told.send(Err(error));
            }
        }
        for_loop.close();
    };
    let thread = std::thread::Builder::new().name("variables".into());
    let thread = thread.spawn(body).map_err(StartError::Thread)?;
    started.recv().map_err(|_| StartError::Ended)??;
    Ok((commands, thread))
}
