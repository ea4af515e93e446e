//! Flags of `var`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::super::args::Report;

pub(in super::super) const EXAMPLES: &str = "\
Examples:
  uffd-sync var demo                                three processes, one order, checked
  uffd-sync var init > node.toml                    a table [variables] to begin with
  uffd-sync serve --config node.toml &
  uffd-sync var set left 10
  uffd-sync var cas left 10 20                      exit code 1 if it does not hold 10
  uffd-sync var get left --ordered
  uffd-sync var watch --json left total
  uffd-sync var reset --with /run/b.sock --with /run/c.sock

Exit codes:
  0  done    1  failed, or not swapped    2  bad input    4  nobody knows the outcome";

const RESET_EXAMPLES: &str = "\
A process that restarted has lost its memory: the others answer `unavailable` until all
begin a new session. Nodes of one host at once:
  uffd-sync var reset --socket a.sock --with b.sock --with c.sock
Nodes of several hosts, first each, then each with the files of all:
  uffd-sync var reset --save $(hostname).json
  uffd-sync var reset --load a.json --load b.json --load c.json";

/// How long an operation may take.
#[derive(Clone, Copy, Debug, Args)]
pub struct Patience {
    /// Longest wait in milliseconds
    #[arg(long, default_value_t = 5_000, value_name = "MS",
          value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub deadline: u64,
}

/// The commands on variables.
#[derive(Debug, Subcommand)]
pub enum VarCommand {
    /// Prints what a variable holds
    Get {
        /// Name or number of the variable
        variable: String,
        /// Asks all subscribers, so that nothing that completed before is missed
        #[arg(long)]
        ordered: bool,
        #[command(flatten)]
        #[allow(missing_docs, reason = "a doc here would become help text")]
        patience: Patience,
        #[command(flatten)]
        #[allow(missing_docs, reason = "a doc here would become help text")]
        report: Report,
    },
    /// Writes a variable
    Set {
        /// Name or number of the variable
        variable: String,
        /// A number, or text for a variable of bytes
        #[arg(allow_hyphen_values = true)]
        value: String,
        #[command(flatten)]
        #[allow(missing_docs, reason = "a doc here would become help text")]
        patience: Patience,
        #[command(flatten)]
        #[allow(missing_docs, reason = "a doc here would become help text")]
        report: Report,
    },
    /// Writes a variable if it holds what is expected
    Cas {
        /// Name or number of the variable
        variable: String,
        /// What it has to hold
        #[arg(allow_hyphen_values = true)]
        expected: String,
        /// What it is to hold then
        #[arg(allow_hyphen_values = true)]
        new: String,
        #[command(flatten)]
        #[allow(missing_docs, reason = "a doc here would become help text")]
        patience: Patience,
        #[command(flatten)]
        #[allow(missing_docs, reason = "a doc here would become help text")]
        report: Report,
    },
    /// Prints one line per change until interrupted
    Watch {
        /// Names or numbers of variables [default: all that the node subscribes to]
        variables: Vec<String>,
        /// Ends after this many changes
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        #[command(flatten)]
        #[allow(missing_docs, reason = "a doc here would become help text")]
        report: Report,
    },
    /// Lists the node's variables
    List(Report),
    /// Shows order, session and links
    Status(Report),
    /// Begins a new session after a process lost its memory
    #[command(after_help = RESET_EXAMPLES)]
    Reset {
        /// Control socket of another member on this host; all members have to be named
        #[arg(long, value_name = "SOCKET", conflicts_with_all = ["save", "load"])]
        with: Vec<PathBuf>,
        /// Stops this node's variables and writes what it knows to a file
        #[arg(long, value_name = "FILE", conflicts_with = "load")]
        save: Option<PathBuf>,
        /// Begins the new session from the files of all members
        #[arg(long, value_name = "FILE")]
        load: Vec<PathBuf>,
    },
    /// Prints a commented table of variables for a node's file
    Init,
    /// Lets three processes write and swap, and checks the order of all that they hear
    Demo {
        /// Operations of each process after the scripted ones
        #[arg(long, default_value_t = 20, value_name = "N",
              value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
        operations: u64,
        /// How the order is agreed on: skeen or sequencer
        #[arg(long, default_value = "skeen", value_parser = ["skeen", "sequencer"])]
        order: String,
        #[command(flatten)]
        #[allow(missing_docs, reason = "a doc here would become help text")]
        report: Report,
    },
}

/// Flags of one process of the demonstration.
#[derive(Debug, Args)]
pub struct VarPartyArgs {
    /// Which member it is.
    #[arg(long)]
    pub process: u32,
    /// Folder of the sockets.
    #[arg(long, required_unless_present = "config")]
    pub folder: Option<PathBuf>,
    /// How the order is agreed on.
    #[arg(long, default_value = "skeen")]
    pub order: String,
    /// A file with a table of variables in place of the demonstration's.
    #[arg(long)]
    pub config: Option<PathBuf>,
}
