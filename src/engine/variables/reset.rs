//! A new session after a member lost its memory: all stop, what they know is merged, all
//! start from that.
//!
//! ```text
//!   every member:  freeze --> Saved     merge_saved(all) --> Saved     every member:  begin
//! ```
//!
//! - I1: a frozen member delivers nothing more in its session, so what it saved is what it
//!   will ever have known of it.
//! - I2: of a member that knows nothing, nothing is taken.

use std::collections::BTreeMap;
use std::sync::mpsc;

use serde::{Deserialize, Serialize};

use super::commands::Command;
use super::{ANSWER_DEADLINE, Order, StartError, Variables, subscriptions_of};
use crate::engine::variables::VariablesConfig;
use crate::ordered::{OrderKey, ProcessId, Start, Value, VariableId, merge_states};

/// What one member, or all together, know: the content of a file of `var reset --save`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The member; none for what all know.
    pub process: Option<u32>,
    /// The session it was saved in, or is to be begun.
    pub session: u64,
    /// Place of the last operation that was delivered, or where the session began from
    /// known values if none was since.
    pub last: Option<OrderKey>,
    /// Logical time.
    pub time: u64,
    /// Numbers, by id of the variable.
    #[serde(default)]
    pub numbers: BTreeMap<u32, i64>,
    /// Bytes in hexadecimal digits, by id of the variable.
    #[serde(default)]
    pub bytes: BTreeMap<u32, String>,
}

/// Why no new session can be begun.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// The order keeps its memory elsewhere.
    #[error("with order = \"etcd\" the cluster is the memory: there is no session to begin anew")]
    Cluster,
    /// The loop does not answer.
    #[error("the loop of the variables does not answer")]
    Silent,
    /// A member is missing, so that what it knows would be lost.
    #[error("what process {process} knows is missing; every member has to be frozen and saved")]
    Missing {
        /// Which.
        process: u32,
    },
    /// A saved value is not one.
    #[error("variable {variable} of a saved state: not hexadecimal digits")]
    Digits {
        /// Which.
        variable: u32,
    },
    /// The session is not a later one.
    #[error("session {session} is not later than {present}, which this process is in")]
    Session {
        /// What was asked for.
        session: u64,
        /// The present one.
        present: u64,
    },
    /// The state does not fit.
    #[error("the new session cannot start")]
    Start(#[from] StartError),
}

impl Saved {
    fn new(process: Option<u32>, session: u64, last: Option<OrderKey>, start: &Start) -> Self {
        let mut saved = Self {
            process,
            session,
            last,
            time: start.time,
            ..Self::default()
        };
        for (id, value) in &start.values {
            match value {
                Value::Integer(number) => {
                    saved.numbers.insert(id.0, *number);
                }
                Value::Bytes(bytes) => {
                    let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
                    saved.bytes.insert(id.0, digits.collect());
                }
            }
        }
        saved
    }

    fn start(&self) -> Result<Start, ResetError> {
        let mut start = Start {
            time: self.time,
            values: BTreeMap::new(),
        };
        for (id, number) in &self.numbers {
            start
                .values
                .insert(VariableId(*id), Value::Integer(*number));
        }
        for (&variable, digits) in &self.bytes {
            let bytes = hex(digits).ok_or(ResetError::Digits { variable })?;
            start
                .values
                .insert(VariableId(variable), Value::bytes(&bytes));
        }
        Ok(start)
    }

    /// Whether there is anything that could be lost.
    fn knows_nothing(&self) -> bool {
        self.last.is_none() && self.time == 0
    }
}

fn hex(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2).map(|pair| {
        let [high, low] = pair else { return None };
        let digit = |byte: &u8| char::from(*byte).to_digit(16);
        Some((digit(high)? << 4 | digit(low)?) as u8)
    });
    pairs.collect()
}

/// What the next session starts from; `saved` has to hold every member.
///
/// # Errors
/// [`ResetError::Missing`] and [`ResetError::Digits`].
pub fn merge_saved(config: &VariablesConfig, saved: &[Saved]) -> Result<Saved, ResetError> {
    let subscriptions = subscriptions_of(config).map_err(StartError::from)?;
    for member in subscriptions.processes() {
        let there = |one: &&Saved| one.process == Some(member.0);
        if !saved.iter().any(|one| there(&one)) {
            return Err(ResetError::Missing { process: member.0 });
        }
    }
    let mut states = Vec::new();
    for one in saved.iter().filter(|one| !one.knows_nothing()) {
        if let Some(process) = one.process {
            states.push((ProcessId(process), one.last, one.start()?));
        }
    }
    let given = states.iter().map(|(id, last, start)| (*id, *last, start));
    let merged = merge_states(&subscriptions, given);
    let newest = saved.iter().map(|one| one.session).max().unwrap_or(0);
    Ok(Saved::new(None, newest.saturating_add(1), None, &merged))
}

impl Variables {
    /// Stops delivering for good in this session, and says what is known; operations under
    /// way become indeterminate, later ones are refused until [`Variables::renew`].
    ///
    /// # Errors
    /// [`ResetError`]; with an etcd cluster there is nothing to freeze.
    pub fn freeze(&self) -> Result<Saved, ResetError> {
        let Order::Peers { commands, .. } = &self.order else {
            return Err(ResetError::Cluster);
        };
        let (told, answer) = mpsc::sync_channel(1);
        if !commands.send(Command::Freeze(told), ANSWER_DEADLINE) {
            return Err(ResetError::Silent);
        }
        let frozen = answer.recv_timeout(ANSWER_DEADLINE);
        let frozen = frozen.map_err(|_| ResetError::Silent)?;
        let process = Some(self.config.process);
        Ok(Saved::new(
            process,
            frozen.session,
            frozen.last,
            &frozen.state,
        ))
    }

    /// Begins a new session from what [`merge_saved`] made; every member has to.
    ///
    /// # Errors
    /// [`ResetError`]; a session that is not later changes nothing.
    pub fn renew(&self, merged: &Saved) -> Result<(), ResetError> {
        let Order::Peers { commands, .. } = &self.order else {
            return Err(ResetError::Cluster);
        };
        let (told, answer) = mpsc::sync_channel(1);
        let command = Command::Begin {
            session: merged.session,
            start: merged.start()?,
            answer: told,
        };
        if !commands.send(command, ANSWER_DEADLINE) {
            return Err(ResetError::Silent);
        }
        answer
            .recv_timeout(ANSWER_DEADLINE)
            .map_err(|_| ResetError::Silent)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::variables::ValueKind;
    use crate::ordered::OperationId;

    fn config() -> VariablesConfig {
        let name = |text: &str| text.parse().expect("a name");
        let at = |text: &str| text.parse().expect("an address");
        VariablesConfig::new(0)
            .member(0, at("unix:/a"))
            .member(1, at("unix:/b"))
            .variable(0, name("x"), ValueKind::I64, [0, 1])
            .variable(1, name("y"), ValueKind::Bytes, [1])
    }

    fn saved(process: u32, time: u64, x: i64) -> Saved {
        let id = OperationId::default();
        Saved {
            process: Some(process),
            session: 1,
            last: (time > 0).then_some(OrderKey { time, id }),
            time,
            numbers: [(0, x)].into(),
            bytes: [(1, format!("0{x}"))].into(),
        }
    }

    #[test]
    fn the_furthest_member_wins_and_nobody_may_be_missing() {
        let merged = merge_saved(&config(), &[saved(0, 7, 5), saved(1, 6, 4)]).expect("merged");
        assert_eq!((merged.session, merged.time), (2, 7));
        assert_eq!(merged.numbers[&0], 5, "process 0 delivered further");
        assert_eq!(merged.bytes[&1], "04", "only process 1 knows it");
        let missing = merge_saved(&config(), &[saved(0, 7, 5)]).expect_err("one is missing");
        assert!(matches!(missing, ResetError::Missing { process: 1 }));
    }

    #[test]
    fn a_member_that_lost_its_memory_gives_nothing() {
        let mut survivor = saved(0, 9, 5);
        // It began its session from known values and delivered nothing since.
        survivor.last = Some(OrderKey {
            time: 9,
            ..OrderKey::default()
        });
        let fresh = saved(1, 0, 0);
        let merged = merge_saved(&config(), &[fresh, survivor]).expect("merged");
        assert_eq!(merged.numbers[&0], 5);
    }

    #[test]
    fn a_clock_that_ran_ahead_is_no_knowledge() {
        // Requests raised its clock, and none of them was delivered there.
        let mut behind = saved(1, 9, 0);
        behind.last = None;
        for all in [
            [behind.clone(), saved(0, 6, 5)],
            [saved(0, 6, 5), behind.clone()],
        ] {
            let merged = merge_saved(&config(), &all).expect("merged");
            assert_eq!(merged.numbers[&0], 5, "process 0 delivered it");
            assert_eq!(merged.time, 9, "later than all that was promised");
        }
    }

    #[test]
    fn a_state_is_read_as_it_was_saved() {
        let state = saved(1, 3, 4).start().expect("digits");
        assert_eq!(
            Saved::new(Some(1), 1, saved(1, 3, 4).last, &state),
            saved(1, 3, 4)
        );
        let mut bad = saved(1, 3, 4);
        for digits in ["0", "zz"] {
            bad.bytes.insert(1, digits.into());
            assert!(bad.start().is_err(), "{digits}");
        }
    }
}
