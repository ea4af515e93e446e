//! One process of the demonstration: three variables, orders on standard input, JSON
//! lines on standard output.
//!
//! ```text
//!  in:   write V X | cas V OLD NEW | read V | random N SEED DEPTH | end
//!  out:  ready, change (from the callback), done (an own operation), idle, failed
//! ```

use std::collections::VecDeque;
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::args::VarPartyArgs;
use crate::client::variables::{
    Address, Completed, Notice, Operation, OrderKind, Pending, Value, ValueKind, Variables,
    VariablesConfig,
};
use crate::ordered::OrderKey;

/// How long one operation may take; the others may be starting, or be stopped.
const PATIENCE: Duration = Duration::from_secs(30);
/// Who subscribes to which variable.
pub(super) const SUBSCRIBERS: [(u32, &str, &[u32]); 3] = [
    (0, "left", &[0, 1]),
    (1, "right", &[1, 2]),
    (2, "total", &[0, 1, 2]),
];

/// One line of a process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    Ready,
    Change(Changed),
    Done(Own),
    Idle,
    Failed,
}

/// A callback.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Changed {
    pub(super) key: OrderKey,
    pub(super) variable: u32,
    pub(super) old: i64,
    pub(super) new: i64,
    pub(super) swap: bool,
}

/// An own operation that completed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Own {
    pub(super) key: OrderKey,
    pub(super) variable: u32,
    pub(super) applied: bool,
    pub(super) old: i64,
    /// What a compare-and-swap expected.
    pub(super) expected: Option<i64>,
}

/// The configuration of a process of the demonstration.
pub(super) fn config(process: u32, order: &str, folder: &Path) -> anyhow::Result<VariablesConfig> {
    let order = match order {
        "sequencer" => OrderKind::Sequencer,
        _ => OrderKind::Skeen,
    };
    let mut config = VariablesConfig::new(process).order(order);
    for id in 0..3 {
        config = config.member(id, Address::Unix(folder.join(format!("{id}.sock"))));
    }
    for (id, name, subscribers) in SUBSCRIBERS {
        config = config.variable(
            id,
            name.parse()?,
            ValueKind::I64,
            subscribers.iter().copied(),
        );
    }
    Ok(config)
}

fn number(value: &Value) -> i64 {
    match value {
        Value::Integer(number) => *number,
        Value::Bytes(_) => 0,
    }
}

fn say(line: &Line) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    writeln!(out)?;
    out.flush()
}

/// Takes part until it is told to end, or its input ends.
pub(in super::super) fn run(args: &VarPartyArgs) -> anyhow::Result<()> {
    let callback = |notice: &Notice| {
        if let Notice::Change(change) = notice {
            // Nobody reads any more: the demonstration has ended.
            let _ = say(&Line::Change(Changed {
                key: change.key,
                variable: change.variable,
                old: number(&change.old),
                new: number(&change.new),
                swap: change.swap,
            }));
        }
    };
    let config = match (&args.config, &args.folder) {
        (Some(path), _) => read_config(path, args.process)?,
        (None, Some(folder)) => config(args.process, &args.order, folder)?,
        (None, None) => bail!("neither a folder nor a file"),
    };
    let variables = Variables::start(config, callback)?;
    say(&Line::Ready)?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        if words == ["end"] {
            break;
        }
        if let Err(error) = obey(args.process, &variables, &words) {
            say(&Line::Failed)?;
            return Err(error);
        }
        say(&Line::Idle)?;
    }
    variables.stop();
    Ok(())
}

fn obey(process: u32, variables: &Variables, words: &[&str]) -> anyhow::Result<()> {
    let id = |word: &str| word.parse::<u32>().context("a variable");
    let value = |word: &str| word.parse::<i64>().context("a value");
    match words {
        ["write", variable, new] => {
            let new = Value::Integer(value(new)?);
            carry_out(variables, id(variable)?, Operation::Write(new))
        }
        ["cas", variable, old, new] => {
            let (expected, new) = (value(old)?.into(), value(new)?.into());
            let operation = Operation::CompareAndSwap { expected, new };
            carry_out(variables, id(variable)?, operation)
        }
        ["read", variable] => carry_out(variables, id(variable)?, Operation::Read),
        ["random", count, seed, depth] => {
            let mut seed = seed.parse().context("a seed")?;
            let depth = depth.parse().context("a depth")?;
            random(process, variables, (count.parse()?, depth), &mut seed)
        }
        _ => bail!("no order: {words:?}"),
    }
}

/// The table of a file, as the process of that number.
fn read_config(path: &Path, process: u32) -> anyhow::Result<VariablesConfig> {
    let text = std::fs::read_to_string(path)?;
    let file = crate::node::NodeConfig::parse(&text, path)?;
    let mut config = file.variables.context("no table [variables]")?;
    config.process = process;
    Ok(config)
}

fn expected(operation: &Operation) -> Option<i64> {
    match operation {
        Operation::CompareAndSwap { expected, .. } => Some(number(expected)),
        _ => None,
    }
}

fn carry_out(variables: &Variables, variable: u32, operation: Operation) -> anyhow::Result<()> {
    let expected = expected(&operation);
    let done: Completed = variables.carry_out(variable, operation, PATIENCE)?;
    say_done(variable, expected, &done)
}

fn say_done(variable: u32, expected: Option<i64>, done: &Completed) -> anyhow::Result<()> {
    say(&Line::Done(Own {
        key: done.key,
        variable,
        applied: done.applied,
        old: done.old.as_ref().map_or(0, number),
        expected,
    }))?;
    Ok(())
}

/// Writes, swaps and reads by turns that depend on the seed alone.
fn random(
    process: u32,
    variables: &Variables,
    (count, depth): (u64, usize),
    seed: &mut u64,
) -> anyhow::Result<()> {
    let mut under_way: VecDeque<(u32, Option<i64>, Pending)> = VecDeque::new();
    let own: Vec<u32> = SUBSCRIBERS
        .iter()
        .filter(|(_, _, subscribers)| subscribers.contains(&process))
        .map(|(id, ..)| *id)
        .collect();
    let mut next = |bound: u64| {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        *seed % bound
    };
    for _ in 0..count {
        let variable = own[next(own.len() as u64) as usize];
        let new = Value::Integer(next(1_000) as i64);
        let operation = match next(4) {
            0 => Operation::Write(new),
            1 => Operation::Read,
            // What is seen here may be swapped by another process meanwhile.
            _ => Operation::CompareAndSwap {
                expected: variables.get(variable)?,
                new,
            },
        };
        if under_way.len() >= depth
            && let Some((variable, expected, pending)) = under_way.pop_front()
        {
            say_done(variable, expected, &pending.wait(PATIENCE)?)?;
        }
        let expected = expected(&operation);
        under_way.push_back((variable, expected, variables.begin(variable, operation)?));
    }
    for (variable, expected, pending) in under_way {
        say_done(variable, expected, &pending.wait(PATIENCE)?)?;
    }
    Ok(())
}
