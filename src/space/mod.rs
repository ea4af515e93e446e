//! One byte-addressed space out of the memory of N servers, as values.
//!
//! Every server lends a *segment* of the same size k. Address `a` lives on server
//! `a / k`, at offset `a % k` of its segment; the order of the servers in the file
//! is the order of their addresses:
//!
//! ```text
//! address   0            k            2k           3k = end
//!           |  server 0  |  server 1  |  server 2  |
//!                     [---------------)              a range over two servers:
//!                     [ part 0 )[ p 1 )              split, each part asked of its own
//! ```
//!
//! - [`SpaceMap`] knows k and the servers; it locates addresses and splits ranges.
//! - [`SpaceConfig`] is the one file, `mcomp.cfg`, that all machines have.
//! - [`frame`] is what travels between a client and one server.
//! - [`execute`] carries requests out on [`memory`]; [`stripes`] tell readers by mapping.
//!
//! Invariants:
//! - I1: the parts of a split lie in order, touch each other and make up the range.
//! - I2: no part crosses a server; a range beyond the end is refused whole.
//! - I3: two maps have the same digest exactly if they mean the same space: comments,
//!   the writing of sizes and everything that is not the map do not count.

pub mod config;
pub mod execute;
pub mod frame;
pub mod locks;
pub mod map;
pub mod memory;
pub mod stripes;

pub use config::{Durability, SnapshotMode, SpaceConfig, SpaceConfigError};
pub use map::{Located, Part, Server, SpaceMap};
