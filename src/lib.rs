//! Keeps memory in step: what a program stores into a region is found through
//! userfaultfd write-protection, shipped by an io_uring loop as byte-exact updates,
//! and shown by replicas on other nodes, each update whole or not at all.
//!
//! # A writer, whatever it stores with
//!
//! A region is memory. The program stores into it as into any other; a node
//! (`uffd-sync serve` on the same host) finds what was stored.
//!
//! ```no_run
//! use std::time::Duration;
//! use uffd_sync::client::{Node, Writer, WriterOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let socket = Node::default_socket();
//! let region = Writer::create(&socket, "prices", 1 << 20, &WriterOptions::default())?;
//! region.write(4096, b"42.17")?;
//! let epoch = region.commit(Duration::from_secs(1))?; // one exact instant
//! epoch.wait_acked(1, Duration::from_secs(1))?;       // one replica shows it
//! # Ok(())
//! # }
//! ```
//!
//! # A reader of a replica
//!
//! ```no_run
//! use std::time::Duration;
//! use uffd_sync::client::{Node, Reader};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let reader = Reader::attach(Node::default_socket(), "prices")?;
//! reader.wait_epoch(0, Duration::from_secs(5))?;
//! let (price, epoch) = reader.read_at_epoch(|view| view.load::<[u8; 5]>(4096))?;
//! println!("{:?} as of epoch {}", price?, epoch.number);
//! # Ok(())
//! # }
//! ```
//!
//! # The engine inside a program
//!
//! [`node::Node::embedded`] runs the loop on a thread of the program itself; see there.
//!
//! # Rooms
//!
//! | room | what is in it |
//! |---|---|
//! | [`client`] | blocking faces: [`client::Node`], [`client::Writer`], [`client::Reader`]; channels by name: [`client::DuplexChannelFactory`]; ordered variables: [`client::variables`] |
//! | [`node`] | configuration, the engine on a thread, metrics |
//! | [`engine`] | the io_uring loop and its connections |
//! | [`zerobuffer`] | two-buffer channels, compatible with ZeroBuffer v1 |
//! | [`space`] | the memory of several servers as one range of addresses: its file and its map |
//! | [`nbd`] | the NBD protocol of a server, as values |
//! | [`replicate`] | updates from a source's epochs to a replica's, as values |
//! | [`ordered`] | variables with one total order over all processes, as values |
//! | [`duplex`] | channels in place: one frame, changed by the server where the client wrote it |
//! | [`region`], [`track`] | memfd regions with their control pages; finding and capturing what changed |
//! | [`wire`] | frames between nodes, messages of the control socket |
//! | [`words`], [`units`], [`limits`], [`bitmap`], [`checksum`], [`shm`] | what all of them stand on |
//! | [`sys`] | the only place that calls the kernel |
//!
//! Under `--cfg loom` (`tests/loom`) only the lock-free code is compiled.

#[cfg(not(loom))]
pub mod bitmap;
#[cfg(not(loom))]
pub mod checksum;
#[cfg(not(loom))]
pub mod cli;
#[cfg(not(loom))]
pub mod client;
pub mod duplex;
#[cfg(not(loom))]
pub mod engine;
#[cfg(not(loom))]
pub mod limits;
#[cfg(not(loom))]
pub mod manual;
#[cfg(not(loom))]
pub mod nbd;
#[cfg(not(loom))]
pub mod node;
#[cfg(not(loom))]
pub mod ordered;
#[cfg(not(loom))]
pub mod region;
#[cfg(not(loom))]
pub mod replicate;
pub mod shm;
#[cfg(not(loom))]
pub mod space;
#[cfg(not(loom))]
pub mod sys;
#[cfg(not(loom))]
pub mod track;
/// What loom models of it.
#[cfg(loom)]
pub mod track {
    #[path = "exact/ring.rs"]
    pub mod ring;
    #[path = "exact/word.rs"]
    pub mod word;
}
#[cfg(not(loom))]
pub mod units;
#[cfg(not(loom))]
pub mod wire;
#[cfg(not(loom))]
pub mod words;
#[cfg(not(loom))]
pub mod zerobuffer;
