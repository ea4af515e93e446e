//! Three processes write, swap and read as fast as they can while links are cut and
//! processes stopped; then all that they heard has to be one order.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use uffd_sync::ordered::{ProcessId, Subscriptions, ValueType, Variable, VariableId};

use super::free;
use super::party::{Party, verify};
use super::relay::Relay;
use crate::nodes::{folder, long};

const SUBSCRIBERS: [&[u32]; 3] = [&[0, 1], &[1, 2], &[0, 1, 2]];

fn subscriptions() -> Subscriptions {
    let variables = (0..).zip(SUBSCRIBERS).map(|(id, all)| Variable {
        id: VariableId(id),
        kind: ValueType::Integer,
        subscribers: all.iter().map(|id| ProcessId(*id)).collect(),
    });
    Subscriptions::new(variables).expect("usable")
}

/// A table for one process; `addresses` as that process sees them.
fn table(order: &str, addresses: &[String]) -> String {
    let mut text = format!("[variables]\nprocess = 0\norder = \"{order}\"\nmember = [\n");
    for (id, address) in addresses.iter().enumerate() {
        let _ = writeln!(text, "{{ id = {id}, address = \"tcp://{address}\" }},");
    }
    text.push_str("]\nvariable = [\n");
    for (id, all) in SUBSCRIBERS.iter().enumerate() {
        let _ = writeln!(
            text,
            "{{ id = {id}, name = \"v{id}\", type = \"i64\", subscribers = {all:?} }},"
        );
    }
    text.push_str("]\n");
    text
}

/// Free addresses, all different.
fn addresses() -> Vec<String> {
    (0..3).map(|_| free().to_string()).collect()
}

fn soak(order: &str, operations: u64) {
    let folder = folder();
    let real = addresses();
    // The one with the greater number dials: every link runs over a relay.
    let relays: Vec<Relay> = real[..2]
        .iter()
        .map(|address| Relay::to(address.parse().expect("an address")))
        .collect();
    let mut parties: Vec<Party> = (0..3_u32)
        .map(|process| {
            let mut seen = real.clone();
            for (at, relay) in relays.iter().enumerate() {
                if (at as u32) < process {
                    seen[at] = relay.address().to_string();
                }
            }
            let path = folder.path().join(format!("{process}.toml"));
            std::fs::write(&path, table(order, &seen)).expect("written");
            Party::start(&path, process)
        })
        .collect();
    let patience = Duration::from_secs(if long() { 400 } else { 120 });
    for (at, party) in parties.iter_mut().enumerate() {
        party.await_idle(patience);
        party.tell(&format!("random {} {} 16", operations / 3, 77 + at));
    }
    let deadline = Instant::now() + patience;
    let mut round = 0;
    while !parties.iter().all(Party::is_idle) {
        assert!(Instant::now() < deadline, "not done within {patience:?}");
        // The pace of the faults, not a wait for something: a link that was cut takes some
        // 50 ms to come back, and a million operations have to get by in between.
        std::thread::sleep(Duration::from_millis(if long() { 500 } else { 40 }));
        round += 1;
        relays[round % 2].cut();
        if round % 10 == 0 {
            let stopped = &parties[round / 10 % 3];
            stopped.signal(Signal::SIGSTOP);
            std::thread::sleep(Duration::from_millis(100));
            stopped.signal(Signal::SIGCONT);
        }
    }
    for (variable, all) in SUBSCRIBERS.iter().enumerate() {
        for process in *all {
            parties[*process as usize].tell(&format!("read {variable}"));
            parties[*process as usize].await_idle(patience);
        }
    }
    let cut: u64 = relays.iter().map(Relay::taken).sum();
    assert!(cut > 3, "the links were cut and made again: {cut}");
    let said: Vec<_> = parties.into_iter().map(|one| one.end(patience)).collect();
    let answers: usize = said.iter().map(|said| said.own.len()).sum();
    assert!(answers as u64 >= operations / 3 * 3, "{answers}");
    let changes = verify(&subscriptions(), &said);
    assert!(changes > answers / 5, "{changes} of {answers}");
}

fn operations() -> u64 {
    if long() { 1_000_000 } else { 20_000 }
}

#[test]
fn one_order_while_links_are_cut_and_processes_stopped() {
    soak("skeen", operations());
}

#[test]
fn one_order_by_a_sequencer_as_well() {
    soak("sequencer", operations() / 4);
}

/// The demonstration itself, in both forms.
#[test]
fn the_demonstration_is_verified() {
    for (arguments, words) in [
        (&["var", "demo"][..], "one order: "),
        (&["var", "demo", "--json"], "\"order_verified\": true"),
    ] {
        let output = std::process::Command::new(crate::nodes::BINARY)
            .args(arguments)
            .output()
            .expect("the command runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains(words), "{text}");
        if arguments.len() == 2 {
            let first = "[Process 0] Writing 10 to variable 0\n";
            let after = text.split_once(first).map_or("", |(_, rest)| rest);
            for process in [0, 1] {
                let line = format!("[Process {process}] Callback: Variable 0 changed to 10\n");
                assert!(after.contains(&line), "{text}");
            }
        }
    }
}
