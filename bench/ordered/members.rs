//! Processes that share two variables, of which the bench itself is the last one: the
//! initiator dials, and with a sequencer is not the sequencer.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use uffd_sync::client::variables::{
    Address, OrderKind, Value, ValueKind, Variables, VariablesConfig,
};

use crate::harness::{Channel, Child};

pub(crate) const ROLE: &str = "ordered-member";
/// Longest wait for anything that has to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The variable that is written, and the one that is counted.
pub(crate) const WRITTEN: u32 = 0;
pub(crate) const COUNTED: u32 = 1;

fn config(process: u32, order: &str, ports: &[u16]) -> anyhow::Result<VariablesConfig> {
    let order = match order {
        "skeen" => OrderKind::Skeen,
        "sequencer" => OrderKind::Sequencer,
        other => bail!("no order: {other}"),
    };
    let mut config = VariablesConfig::new(process).order(order);
    for (id, port) in (0..).zip(ports) {
        config = config.member(id, Address::Tcp("127.0.0.1".into(), *port));
    }
    let all = 0..ports.len() as u32;
    Ok(config
        .variable(WRITTEN, "written".parse()?, ValueKind::I64, all.clone())
        .variable(COUNTED, "counted".parse()?, ValueKind::I64, all))
}

/// One of the others: takes part, and counts when it is told to.
pub(crate) fn serve(mut channel: Channel, args: &[String]) -> anyhow::Result<()> {
    let [process, order, ports @ ..] = args else {
        bail!("a member needs its number, an order and ports")
    };
    let ports: Result<Vec<u16>, _> = ports.iter().map(|port| port.parse()).collect();
    let variables = Variables::start_silent(config(process.parse()?, order, &ports?)?)?;
    channel.send("ready", &[])?;
    while let Some((line, _)) = channel.receive()? {
        let answer = match line.split_once(' ') {
            Some(("count", ms)) => {
                let (tries, wins) = count(&variables, Duration::from_millis(ms.parse()?))?;
                format!("{tries} {wins}")
            }
            Some(("get", variable)) => variables
                .read_ordered(variable.parse()?, PATIENCE)?
                .to_string(),
            _ => bail!("no order: {line}"),
        };
        channel.send(&answer, &[])?;
    }
    variables.stop();
    Ok(())
}

/// Counts up by compare-and-swap for some time: tries and successes.
pub(crate) fn count(variables: &Variables, time: Duration) -> anyhow::Result<(u64, u64)> {
    let until = Instant::now() + time;
    let (mut tries, mut wins) = (0, 0);
    while Instant::now() < until {
        let Value::Integer(held) = variables.get(COUNTED)? else {
            bail!("the counter is no number")
        };
        tries += 1;
        wins += u64::from(variables.compare_and_swap(COUNTED, held, held + 1, PATIENCE)?);
    }
    Ok((tries, wins))
}

/// All processes; this one's variables, and the others as children.
pub(crate) struct Members {
    pub(crate) variables: Variables,
    pub(crate) children: Vec<Child>,
}

impl Members {
    pub(crate) fn start(order: &str, processes: usize) -> anyhow::Result<Self> {
        let listeners: Result<Vec<_>, _> = (0..processes)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect();
        let ports: Result<Vec<u16>, _> = listeners?
            .iter()
            .map(|one| one.local_addr().map(|address| address.port()))
            .collect();
        let ports = ports?;
        let words: Vec<String> = ports.iter().map(u16::to_string).collect();
        let mut children = Vec::new();
        for process in 0..processes - 1 {
            let process = process.to_string();
            let mut args = vec![process.as_str(), order];
            args.extend(words.iter().map(String::as_str));
            children.push(Child::spawn(ROLE, None, &args)?);
        }
        let own = config(processes as u32 - 1, order, &ports)?;
        let variables = Variables::start_silent(own)?;
        for child in &mut children {
            ensure!(child.hear()?.0 == "ready", "a member is not ready");
        }
        // All are there when the first write is done.
        variables.write(WRITTEN, 0, PATIENCE)?;
        Ok(Self {
            variables,
            children,
        })
    }

    /// Every process has to hold what this one holds.
    pub(crate) fn verify(&mut self) -> anyhow::Result<()> {
        for variable in [WRITTEN, COUNTED] {
            let held = self.variables.read_ordered(variable, PATIENCE)?.to_string();
            for child in &mut self.children {
                let there = child.ask(&format!("get {variable}"))?;
                ensure!(
                    there == held,
                    "variable {variable}: {held} here, {there} there"
                );
            }
        }
        Ok(())
    }

    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.verify().context("comparing the values at the end")?;
        self.variables.stop();
        for child in self.children {
            child.end()?;
        }
        Ok(())
    }
}
