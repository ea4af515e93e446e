//! The command line as clap reads it: every command, flag and example.
//!
//! Values are parsed here into checked types (names, sizes, addresses), so that a
//! wrong one ends with exit code 2 before anything is connected or changed.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use super::channel::args::{ChannelCommand, EXAMPLES as CHANNEL_EXAMPLES};
use super::space::args::{EXAMPLES as SPACE_EXAMPLES, SpaceCommand};
use super::var::args::{EXAMPLES as VAR_EXAMPLES, VarCommand, VarPartyArgs};
use crate::node::NbdPlace;
use crate::units::ByteSize;
use crate::wire::follow::FollowSpec;
use crate::words::{Mode, Publish, RegionName};

const EXAMPLES: &str = "\
Examples:
  uffd-sync demo                                    two nodes, a writer, a reader, a table
  uffd-sync serve &                                 a node with a control socket, no TCP
  uffd-sync region create prices --size 64MiB       memory that this node holds
  echo 42.17 | uffd-sync region write prices
  uffd-sync region read prices --len 5

Exit codes:
  0  done    1  failed    2  bad input, nothing changed    3  a kernel feature is missing
  4  an operation on a variable or a space whose outcome nobody knows";

const SERVE_EXAMPLES: &str = "\
Examples:
  uffd-sync serve                                   control socket only, no TCP
  uffd-sync serve --listen 127.0.0.1:7411           others on this host may follow shared regions
  uffd-sync serve --socket /tmp/b.sock --follow tcp://127.0.0.1:7411/prices
  uffd-sync serve --config node.toml
  uffd-sync serve --space mcomp.cfg --server a      lends the segment of server a
  uffd-sync serve --space mcomp.cfg --server a --nbd tcp://127.0.0.1:10809

Signals:
  SIGTERM, SIGINT   send what is pending, then end (at most 3 s)
  SIGHUP            read the configuration again: intervals, follow list, log filter";

const REGION_EXAMPLES: &str = "\
Examples:
  uffd-sync region create prices --size 64MiB --shared
  uffd-sync region write prices --offset 4KiB --file day.bin
  uffd-sync region read prices --offset 4KiB --len 100 | xxd
  uffd-sync region watch prices --count 10
  uffd-sync region cut prices
  uffd-sync region track maps --file /dev/shm/maps";

const DEMO_EXAMPLES: &str = "\
Examples:
  uffd-sync demo
  uffd-sync demo --seconds 20 --region-size 1GiB
  uffd-sync demo --mode sync                        every epoch checked to be one exact instant
  uffd-sync demo --json | jq .verified";

/// Keeps memory in step: what a program stores into a region of shared memory is
/// found through userfaultfd write-protection and shown by replicas on other
/// nodes, without help from the program.
#[derive(Debug, Parser)]
#[command(name = "uffd-sync", version, after_help = EXAMPLES, max_term_width = 100)]
#[command(
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// Control socket of the node [default: $XDG_RUNTIME_DIR/uffd-sync/node.sock, else
    /// /run/uffd-sync/node.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs a node until it is told to end
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(ServeArgs),
    /// Makes, reads, writes, watches and removes regions of a running node
    #[command(subcommand, after_help = REGION_EXAMPLES)]
    Region(RegionCommand),
    /// Serves, calls and measures channels between two processes of this host
    #[command(subcommand, after_help = CHANNEL_EXAMPLES)]
    Channel(ChannelCommand),
    /// Reads, writes, compares and watches ordered variables of a running node
    #[command(subcommand, after_help = VAR_EXAMPLES)]
    Var(VarCommand),
    /// Reads and writes the memory of several servers as one range of addresses; checks its file
    #[command(subcommand, after_help = SPACE_EXAMPLES)]
    Space(SpaceCommand),
    /// Shows a running node: regions, replicas, epochs, rates, memory
    Status(Report),
    /// Mirrors a region between two nodes on this host for some seconds and shows what it cost
    #[command(after_help = DEMO_EXAMPLES)]
    Demo(DemoArgs),
    /// Tries every kernel feature and permission that a node needs and names the remedies
    Doctor(Report),
    /// Lists every bound of the program with its reason
    Limits(Report),
    /// Prints a completion script for a shell
    Completions {
        /// Shell that is to complete
        shell: Shell,
    },
    /// Prints the manual page, or writes one page per command
    Man {
        /// Folder for uffd-sync.1, uffd-sync-serve.1, ...; it has to exist
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Takes part in a demonstration of ordered variables
    #[command(hide = true)]
    VarDemoProcess(VarPartyArgs),
    /// Stores into a region of its own as the writer of a demonstration
    #[command(hide = true)]
    DemoWriter(DemoWriterArgs),
    /// Measures at the replica of a demonstration
    #[command(hide = true)]
    DemoReader(DemoReaderArgs),
}

/// How a report is printed.
#[derive(Clone, Copy, Debug, Args)]
pub struct Report {
    /// Prints JSON for programs instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Flags of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// TOML file; flags stand above it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name shown to other nodes [default: this host's name]
    #[arg(long)]
    pub name: Option<RegionName>,
    /// TCP address on which other nodes may follow shared regions; port 0 takes a free one,
    /// which `status` shows
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// Allows --listen, --metrics and --nbd beyond loopback, where nothing encrypts or authenticates
    #[arg(long)]
    pub insecure: bool,
    /// Keeps a replica of another node's region; may be given several times
    #[arg(long, value_name = "tcp://HOST:PORT/REGION[=LOCAL]")]
    pub follow: Vec<FollowSpec>,
    /// HTTP address of the Prometheus metrics
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Log filter, for example info or uffd_sync=debug [default: info]
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// Lends a segment to the address space of this file
    #[arg(long, value_name = "FILE", requires = "server")]
    pub space: Option<PathBuf>,
    /// Name of the server in that file that this node is
    #[arg(long, value_name = "NAME", requires = "space")]
    pub server: Option<String>,
    /// Unix socket of the segment, for clients on this host [default: in the folder of the
    /// default control socket, named by the map's digest and the server]
    #[arg(long, value_name = "PATH", requires = "space")]
    pub space_socket: Option<PathBuf>,
    /// Serves NBD clients there: each region by name, read only, and with --space the
    /// space as exports all and server-0, server-1 and so on; may be given several times
    #[arg(long, value_name = "tcp://HOST[:PORT]|unix:PATH")]
    pub nbd: Vec<NbdPlace>,
    /// Begins the segment with what this replica has of the server's life before, and goes
    /// on with that life; given once for each replica, it takes the newest
    #[arg(long, value_name = "tcp://HOST:PORT/REGION", requires = "space")]
    pub recover: Vec<FollowSpec>,
    /// Ends when standard input does, so that a node does not outlive who started it
    #[arg(long, hide = true)]
    pub until_eof: bool,
}

/// The commands on regions.
#[derive(Debug, Subcommand)]
pub enum RegionCommand {
    /// Makes a region that the node holds, or one that several programs write, filled with zeros
    Create {
        /// Name of the new region: letters, digits, `.`, `_`, `-`
        name: RegionName,
        /// Its size, for example 4096, 64MiB or 1.5GiB
        #[arg(long)]
        size: ByteSize,
        /// Greatest size that `region grow` may give it [default: its size]
        #[arg(long, value_name = "SIZE", conflicts_with = "cooperative")]
        max_size: Option<ByteSize>,
        /// Lets other nodes follow it
        #[arg(long)]
        shared: bool,
        /// Programs write it, as many as attach to it, instead of the node
        #[arg(long)]
        cooperative: bool,
        /// How its changes are to be found [default: async]; only `auto` without --cooperative,
        /// since the node makes them itself
        #[arg(long, value_name = "MODE")]
        mode: Option<Mode>,
        /// When epochs of a cooperative region are made: timer or commit [default: timer]
        #[arg(long, value_name = "WHEN", requires = "cooperative")]
        publish: Option<Publish>,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Makes a region that the node holds longer, as one epoch; what is new is zero
    Grow {
        /// Name of the region
        name: RegionName,
        /// Its size from now on, no more than the --max-size that it was made with
        #[arg(long)]
        size: ByteSize,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Lists the node's regions
    List(Report),
    /// Shows all about one region
    Show {
        /// Name of the region
        name: RegionName,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Writes a file or standard input into a region that the node holds or that is cooperative
    #[command(
        after_help = "Input beyond the end of the region is refused. Pieces of 1 MiB are \
                            each one epoch; of a cooperative region all of it is under one \
                            guard, and committed."
    )]
    Write {
        /// Name of the region
        name: RegionName,
        /// First byte to write
        #[arg(long, default_value = "0")]
        offset: ByteSize,
        /// File to read [default: standard input]
        #[arg(long, value_name = "F")]
        file: Option<PathBuf>,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Reads bytes of a region as of one epoch, raw, to standard output or a file
    #[command(
        after_help = "Up to 1 MiB is read as of one epoch; longer reads in pieces of 1 MiB, \
                            each of one epoch."
    )]
    Read {
        /// Name of the region
        name: RegionName,
        /// First byte to read
        #[arg(long, default_value = "0")]
        offset: ByteSize,
        /// Number of bytes [default: to the end]
        #[arg(long)]
        len: Option<ByteSize>,
        /// File to write [default: standard output]
        #[arg(long, value_name = "F")]
        out: Option<PathBuf>,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Prints one line per epoch until interrupted
    Watch {
        /// Name of the region
        name: RegionName,
        /// Ends after this many epochs
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Prints the BLAKE3 digest of a region's content and its epoch
    Digest {
        /// Name of the region
        name: RegionName,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Makes an epoch that is one exact instant of a region in mode sync, and prints its number
    Cut {
        /// Name of the region
        name: RegionName,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Follows an existing file, such as one in /dev/shm, by comparing it
    Track {
        /// Name of the new region
        name: RegionName,
        /// The file; it is only read
        #[arg(long, value_name = "F")]
        file: PathBuf,
        /// Number of its bytes to follow [default: its present size]
        #[arg(long)]
        size: Option<ByteSize>,
        /// Lets other nodes follow it
        #[arg(long)]
        shared: bool,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
    /// Ends a region on this node
    Remove {
        /// Name of the region
        name: RegionName,
        /// How it is printed.
        #[command(flatten)]
        report: Report,
    },
}

/// Flags of `demo`.
#[derive(Clone, Copy, Debug, Args)]
pub struct DemoArgs {
    /// Seconds of workload
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// Size of the mirrored region, at least 1MiB
    #[arg(long, default_value = "64MiB", value_name = "S")]
    pub region_size: ByteSize,
    /// How changes are found: async, sync, manual or compare; with sync each epoch is checked
    /// at the replica to be one instant
    #[arg(long, default_value = "async", value_name = "MODE")]
    pub mode: Mode,
    #[command(flatten)]
    #[allow(
        missing_docs,
        reason = "a doc here would become the command's help text"
    )]
    pub report: Report,
}

/// Flags of the demonstration's writer process.
#[derive(Debug, Args)]
pub struct DemoWriterArgs {
    /// Name of the region it makes
    #[arg(long)]
    pub region: RegionName,
    /// Size of that region
    #[arg(long)]
    pub size: ByteSize,
    /// Seconds of workload
    #[arg(long)]
    pub seconds: u64,
    /// How changes are found
    #[arg(long)]
    pub mode: Mode,
}

/// Flags of the demonstration's reader process.
#[derive(Debug, Args)]
pub struct DemoReaderArgs {
    /// Name of the replica
    #[arg(long)]
    pub region: RegionName,
    /// How changes are found at the source
    #[arg(long)]
    pub mode: Mode,
}
