//! Whether what several processes heard is one order: the oracle over their callbacks,
//! and the answers that each got against the merged order. A value.

use std::collections::BTreeMap;

use super::party::{Changed, Own};
use crate::ordered::oracle::{self, Acknowledged, Log};
use crate::ordered::{
    Delivery, Operation, OrderKey, ProcessId, Start, Subscriptions, Value, VariableId,
};

/// What was checked.
pub(super) struct Verified {
    /// All changes, in the order.
    pub(super) merged: Vec<Changed>,
    /// Answers that were compared with it.
    pub(super) answers: u64,
}

/// Checks the callbacks of each process, which are all that happened, and the answers.
pub(super) fn check(
    subscriptions: &Subscriptions,
    heard: &[Vec<Changed>],
    own: &[Vec<Own>],
) -> Result<Verified, String> {
    let logs: Vec<Log> = heard
        .iter()
        .zip(0..)
        .map(|(heard, process)| Log {
            process: ProcessId(process),
            deliveries: heard.iter().map(delivery).collect(),
            complete: true,
        })
        .collect();
    let acknowledged: Vec<Acknowledged> = own
        .iter()
        .flatten()
        .filter(|own| own.applied)
        .map(|own| Acknowledged {
            key: own.key,
            variable: VariableId(own.variable),
            applied: true,
        })
        .collect();
    oracle::check(subscriptions, &Start::default(), &logs, &acknowledged)
        .map_err(|breach| breach.to_string())?;
    let merged: BTreeMap<OrderKey, Changed> = heard
        .iter()
        .flatten()
        .map(|change| (change.key, *change))
        .collect();
    let merged: Vec<Changed> = merged.into_values().collect();
    let answers = check_answers(&merged, own)?;
    Ok(Verified { merged, answers })
}

fn delivery(change: &Changed) -> Delivery {
    let (old, new) = (Value::Integer(change.old), Value::Integer(change.new));
    let operation = if change.swap {
        Operation::CompareAndSwap {
            expected: old.clone(),
            new: new.clone(),
        }
    } else {
        Operation::Write(new.clone())
    };
    Delivery {
        key: change.key,
        variable: VariableId(change.variable),
        operation,
        old,
        new,
        applied: true,
    }
}

/// What an operation found has to be what the order has there.
fn check_answers(merged: &[Changed], own: &[Vec<Own>]) -> Result<u64, String> {
    let mut by_variable: BTreeMap<u32, Vec<&Changed>> = BTreeMap::new();
    for change in merged {
        by_variable.entry(change.variable).or_default().push(change);
    }
    let mut answers = 0;
    for one in own.iter().flatten() {
        let changes = by_variable
            .get(&one.variable)
            .map_or(&[][..], Vec::as_slice);
        let before = changes.partition_point(|change| change.key < one.key);
        let held = before.checked_sub(1).map_or(0, |last| changes[last].new);
        let right = held == one.old
            && one
                .expected
                .is_none_or(|expected| one.applied == (expected == held));
        if !right {
            return Err(format!(
                "{one:?} where variable {} held {held}",
                one.variable
            ));
        }
        answers += 1;
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ordered::{OperationId, ValueType, Variable};

    fn subscriptions() -> Subscriptions {
        let all = vec![ProcessId(0), ProcessId(1)];
        Subscriptions::new([Variable {
            id: VariableId(0),
            kind: ValueType::Integer,
            subscribers: all,
        }])
        .expect("usable")
    }

    fn key(time: u64) -> OrderKey {
        let id = OperationId {
            initiator: ProcessId(0),
            number: time,
            ..OperationId::default()
        };
        OrderKey { time, id }
    }

    fn change(time: u64, old: i64, new: i64) -> Changed {
        Changed {
            key: key(time),
            variable: 0,
            old,
            new,
            swap: false,
        }
    }

    #[test]
    fn equal_orders_pass_and_others_do_not() {
        let order = vec![change(1, 0, 5), change(2, 5, 6)];
        let heard = [order.clone(), order.clone()];
        let swap = |old, applied| Own {
            key: key(3),
            variable: 0,
            applied,
            old,
            expected: Some(6),
        };
        let verified = check(&subscriptions(), &heard, &[vec![], vec![]]).expect("one order");
        assert_eq!(verified.merged, order);
        let wrong = swap(6, false);
        assert!(check(&subscriptions(), &heard, &[vec![wrong], vec![]]).is_err());
        let wrong = swap(5, false);
        assert!(check(&subscriptions(), &heard, &[vec![wrong], vec![]]).is_err());
        let swapped = [order[1], order[0]].to_vec();
        assert!(
            check(
                &subscriptions(),
                &[order.clone(), swapped],
                &[vec![], vec![]]
            )
            .is_err()
        );
        let short = order[..1].to_vec();
        assert!(check(&subscriptions(), &[order, short], &[vec![], vec![]]).is_err());
    }
}
