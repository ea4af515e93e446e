//! The documented example, run: what each of the three processes prints, and in which
//! order.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uffd_sync::client::variables::{
    Address, Notice, OperationError, SubmitError, ValueKind, Variables, VariablesConfig,
};

use super::free;
use crate::nodes::await_that;

const DEADLINE: Duration = Duration::from_secs(30);

/// What one process printed.
type Printed = Arc<Mutex<Vec<String>>>;

fn lines(printed: &Printed) -> Vec<String> {
    let lines = printed.lock().unwrap_or_else(PoisonError::into_inner);
    lines.clone()
}

fn start(process: u32, ports: &[u16; 3]) -> (Variables, Printed) {
    let printed = Printed::default();
    let prints = Arc::clone(&printed);
    let on_variable_change = move |notice: &Notice| {
        if let Notice::Change(change) = notice {
            let line = format!("Variable {} changed to {}", change.variable, change.new);
            let mut lines = prints.lock().unwrap_or_else(PoisonError::into_inner);
            lines.push(line);
        }
    };
    let mut config = VariablesConfig::new(process);
    for (member, port) in (0..).zip(ports) {
        config = config.member(member, Address::Tcp("127.0.0.1".into(), *port));
    }
    for (variable, name, subscribers) in [
        (0, "left", vec![0, 1]),
        (1, "right", vec![1, 2]),
        (2, "total", vec![0, 1, 2]),
    ] {
        let name = name.parse().expect("a name");
        config = config.variable(variable, name, ValueKind::I64, subscribers);
    }
    let variables = Variables::start(config, on_variable_change).expect("it starts");
    (variables, printed)
}

#[test]
fn the_documented_example_prints_the_same_order_everywhere() {
    let ports = [(); 3].map(|()| free().port());
    let parties: Vec<_> = (0..3).map(|process| start(process, &ports)).collect();

    let dsm = &parties[0].0;
    dsm.write(0, 10, DEADLINE).expect("it subscribes");
    let success = dsm.compare_and_swap(0, 10, 20, DEADLINE);
    assert!(success.expect("it subscribes"));
    assert_eq!(dsm.get(0).expect("it subscribes"), 20.into());
    // From the same value once more: it is another one by now.
    let again = dsm.compare_and_swap(0, 10, 30, DEADLINE);
    assert!(!again.expect("it subscribes"));

    // All of them write the variable that they share, at once.
    std::thread::scope(|scope| {
        for (process, (variables, _)) in parties.iter().enumerate() {
            scope.spawn(move || {
                for round in 0..20 {
                    let value = 100 * process as i64 + round;
                    variables.write(2, value, DEADLINE).expect("it subscribes");
                }
            });
        }
    });
    let refused = parties[2].0.write(0, 1, DEADLINE);
    assert!(matches!(
        refused,
        Err(OperationError::Refused(SubmitError::NotSubscribed { .. }))
    ));

    await_that("all have heard all", || {
        let counts = parties.iter().map(|(_, printed)| lines(printed).len());
        counts.eq([62, 62, 60])
    });
    let [zero, one, two] = [0, 1, 2].map(|process: usize| lines(&parties[process].1));
    assert_eq!(
        zero[..2],
        ["Variable 0 changed to 10", "Variable 0 changed to 20"]
    );
    assert_eq!(zero, one, "both subscribe to variables 0 and 2");
    assert_eq!(zero[2..], two, "variable 2 is all that process 2 hears of");
    for (variables, _) in parties {
        variables.stop();
    }
}
