//! The commands on an address space as clap reads them.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::super::args::Report;
use crate::client::space::Transport;
use crate::units::ByteSize;

pub(in crate::cli) const EXAMPLES: &str = "\
Examples:
  uffd-sync space check --config mcomp.cfg          is the file whole and right?
  uffd-sync space map --config mcomp.cfg            which server holds which addresses
  uffd-sync space map --config mcomp.cfg --offset 1GiB --len 4KiB
  echo 42.17 | uffd-sync space write --config mcomp.cfg --offset 1GiB
  uffd-sync space read --config mcomp.cfg --offset 1GiB --len 5
  uffd-sync space read --config mcomp.cfg --out whole.img
  uffd-sync space stat --config mcomp.cfg           how each server goes

The file is the same on every machine of the space. Machines compare the digest that check
and map print: it covers segment_size, names and addresses, no comments.

Servers are those of `uffd-sync serve --space mcomp.cfg --server NAME`. One on this host is
reached over its Unix socket, others over TCP.";

const READ_EXAMPLES: &str = "\
Examples:
  uffd-sync space read --config mcomp.cfg --offset 4KiB --len 100 | xxd
  uffd-sync space read --config mcomp.cfg --out whole.img        all of it, with a progress bar
  uffd-sync space read --config mcomp.cfg --len 8 --json

Each 64 KiB of a server's segment is read as of one instant; longer ranges are not.";

const WRITE_EXAMPLES: &str = "\
Examples:
  echo 42.17 | uffd-sync space write --config mcomp.cfg --offset 1GiB
  uffd-sync space write --config mcomp.cfg --file whole.img
  pg_dump orders | uffd-sync space write --config mcomp.cfg --offset 8GiB

Input of any length is passed on in pieces, 32 MiB in memory at most. A file, or up to 16 MiB
of other input, that does not fit is refused before anything is written.";

const CAS_EXAMPLES: &str = "\
Examples:
  uffd-sync space cas --config mcomp.cfg --offset 64 --expected 0 --new 1
  uffd-sync space cas --config mcomp.cfg --offset 64 --expected 0xff --new 0 --json

Prints what was there. Exit code 0 if it was exchanged, 1 if something else was there, 4 if
nobody knows.";

/// The commands on an address space.
#[derive(Debug, Subcommand)]
pub enum SpaceCommand {
    /// Reads the file and says what is wrong with it, or what it describes
    Check(CheckArgs),
    /// Shows which server holds which addresses, or the parts of a range
    Map(MapArgs),
    /// Reads bytes, raw, to standard output or a file
    #[command(after_help = READ_EXAMPLES)]
    Read(ReadArgs),
    /// Writes a file or standard input
    #[command(after_help = WRITE_EXAMPLES)]
    Write(WriteArgs),
    /// Sets bytes to one value
    Fill(FillArgs),
    /// Replaces an 8-byte number if it is the expected one, and prints what was there
    #[command(after_help = CAS_EXAMPLES)]
    Cas(CasArgs),
    /// Adds to an 8-byte number, wrapping around, and prints what was there
    FetchAdd(FetchAddArgs),
    /// Shows how each server goes
    Stat(StatArgs),
}

/// Flags of `space check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The file of the space
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    #[command(flatten)]
    pub(super) report: Report,
}

/// Flags of `space map`.
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The file of the space
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// First address of a range, whose parts are shown instead of the whole map
    #[arg(long, value_name = "SIZE")]
    pub offset: Option<ByteSize>,
    /// Bytes of that range
    #[arg(long, value_name = "SIZE", default_value = "1", requires = "offset")]
    pub len: ByteSize,
    #[command(flatten)]
    pub(super) report: Report,
}

/// Over what servers are reached.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Over {
    /// The Unix socket of servers on this host, TCP to others
    Auto,
    /// TCP
    Tcp,
    /// Unix sockets: servers on this host only
    Unix,
}

impl From<Over> for Transport {
    fn from(over: Over) -> Self {
        match over {
            Over::Auto => Self::Auto,
            Over::Tcp => Self::Tcp,
            Over::Unix => Self::Unix,
        }
    }
}

/// How the servers are reached, and how the report is printed.
#[derive(Debug, Args)]
pub struct Reach {
    /// The file of the space
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Longest wait without a reply, in milliseconds [default: deadline_ms of the file]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub deadline: Option<u64>,
    /// Over what servers are reached
    #[arg(long, value_enum, default_value = "auto", value_name = "WAY")]
    pub over: Over,
    /// Folder of the servers' Unix sockets [default: that of the node's control socket]
    #[arg(long, value_name = "DIR")]
    pub sockets: Option<PathBuf>,
    #[command(flatten)]
    pub(super) report: Report,
}

/// Flags of `space read`.
#[derive(Debug, Args)]
pub struct ReadArgs {
    #[command(flatten)]
    pub(super) reach: Reach,
    /// First address
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub offset: ByteSize,
    /// Number of bytes [default: to the end]
    #[arg(long, value_name = "SIZE")]
    pub len: Option<ByteSize>,
    /// File to write [default: standard output]
    #[arg(long, value_name = "F")]
    pub out: Option<PathBuf>,
}

/// Flags of `space write`.
#[derive(Debug, Args)]
pub struct WriteArgs {
    #[command(flatten)]
    pub(super) reach: Reach,
    /// First address
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub offset: ByteSize,
    /// File to read [default: standard input]
    #[arg(long, value_name = "F")]
    pub file: Option<PathBuf>,
}

/// Flags of `space fill`.
#[derive(Debug, Args)]
pub struct FillArgs {
    #[command(flatten)]
    pub(super) reach: Reach,
    /// First address
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub offset: ByteSize,
    /// Number of bytes [default: to the end]
    #[arg(long, value_name = "SIZE")]
    pub len: Option<ByteSize>,
    /// Value of each byte, for example 0, 255 or 0xff
    #[arg(long, value_name = "N", default_value = "0", value_parser = byte)]
    pub byte: u8,
}

/// Flags of `space cas`.
#[derive(Debug, Args)]
pub struct CasArgs {
    #[command(flatten)]
    pub(super) reach: Reach,
    /// Address of the number, a multiple of 8
    #[arg(long, value_name = "SIZE")]
    pub offset: ByteSize,
    /// The number that has to be there, little-endian, for example 7 or 0x7
    #[arg(long, value_name = "N", value_parser = number)]
    pub expected: u64,
    /// The number that replaces it
    #[arg(long, value_name = "N", value_parser = number)]
    pub new: u64,
}

/// Flags of `space fetch-add`.
#[derive(Debug, Args)]
pub struct FetchAddArgs {
    #[command(flatten)]
    pub(super) reach: Reach,
    /// Address of the number, a multiple of 8
    #[arg(long, value_name = "SIZE")]
    pub offset: ByteSize,
    /// What is added to it; a negative number subtracts
    #[arg(long, value_name = "N", default_value = "1", value_parser = addend, allow_negative_numbers = true)]
    pub add: u64,
}

/// Flags of `space stat`.
#[derive(Debug, Args)]
pub struct StatArgs {
    #[command(flatten)]
    pub(super) reach: Reach,
}

fn number(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

fn addend(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix('-') {
        Some(digits) => number(digits).map(u64::wrapping_neg),
        None => number(text),
    }
}

fn byte(text: &str) -> Result<u8, String> {
    let value = number(text).map_err(|error| error.to_string())?;
    u8::try_from(value).map_err(|_| format!("{value} is no byte: 0 to 255"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_people_write_them() {
        assert_eq!(number("0xff"), Ok(255));
        assert_eq!(number("18446744073709551615"), Ok(u64::MAX));
        assert!(number("18446744073709551616").is_err() && number("-1").is_err());
        assert_eq!(addend("-1"), Ok(u64::MAX));
        assert_eq!(byte("255"), Ok(255));
        assert!(byte("256").is_err() && byte("x").is_err());
    }
}
