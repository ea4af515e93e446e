//! Real processes: nodes, writers, followers; killed, cut off and fed with garbage.
//!
//! One module per capability. [`nodes`] starts and kills nodes, [`writer`] runs this
//! test binary again as a program that writes a region, [`proxy`] stands between two
//! nodes, counts what passes and breaks it, [`pattern`] is the recorded change,
//! [`channels`] starts channel servers, [`channel_peer`] is either side of a channel.
//!
//! `UFFD_SYNC_LONG=1` runs the long forms.

mod bad_input;
mod bad_peers;
mod channel_cli;
mod channel_death;
mod channel_hostile;
mod channel_lives;
mod channel_peer;
mod channel_python;
mod channel_region;
mod channel_trips;
mod channels;
mod chaos;
mod cli;
mod command;
mod cooperative;
mod cooperative_hostile;
mod crew;
mod deeds;
mod exact;
mod exact_hostile;
mod faults;
mod growth;
mod hand_over;
mod hostile;
mod idle;
mod kernel_writers;
mod library;
mod loss;
mod many;
mod nodes;
mod pattern;
mod privileges;
mod proxy;
mod real_file;
mod refused_calls;
#[allow(dead_code, reason = "the checker of histories uses a part of it")]
#[path = "../sim/rng.rs"]
mod rng;
mod scan_edges;
mod scenarios;
mod space;
mod space_client;
mod space_file;
mod space_writers;
mod transactions;
mod variables;
mod watched;
mod writer;
mod zerobuffer;

/// Not a test of its own: with the variable set this process runs the command without
/// some system calls.
#[test]
fn forbidden_process() {
    if let Some(order) = std::env::var_os(refused_calls::ROLE) {
        refused_calls::become_command(&order);
    }
}

/// Not a test of its own: with the variable set this process is a writer.
#[test]
fn writer_process() {
    if std::env::var_os(writer::ROLE).is_some() {
        writer::serve_orders();
    }
}

/// Not a test of its own: with the variable set this process is one side of a channel.
#[test]
fn channel_process() {
    if std::env::var_os(channel_peer::ROLE).is_some() {
        channel_peer::serve_orders();
    }
}

/// Not a test of its own: with the variable set this process is a client of a space that
/// writes by mapping.
#[test]
fn space_writer_process() {
    if let Ok(order) = std::env::var(space_writers::ROLE) {
        space_writers::serve(&order);
    }
}
