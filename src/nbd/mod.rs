//! NBD (network block device) as a server speaks it, so that tools nobody here wrote
//! reach the memory of a space: bytes in, reads and writes of a [`Backing`], bytes out.
//!
//! ```text
//! client                                    server
//!   |        magic, IHAVEOPT, flags 0x3       |
//!   |<----------------------------------------|
//!   | flags; options: STRUCTURED_REPLY,       |  an option that is not known is
//!   |   SET_META_CONTEXT base:allocation, GO  |  answered, and parsing goes on
//!   |<=======================================>|
//!   | requests of 28 bytes, payloads          |
//!   |========================================>|  [`Session`] cuts what is long in pieces;
//!   |        simple or structured replies     |  [`Backing`] carries each out at once, or
//!   |<========================================|  later and in any order
//! ```
//!
//! Fixed newstyle only. A [`Session`] is one connection; whoever owns the socket calls
//! [`Session::advance`] with what was received and sends what it leaves in the output.
//!
//! | command | carried out as |
//! |---|---|
//! | READ, WRITE | pieces that end where stripes end, so that what lies in one stripe stays whole |
//! | TRIM, WRITE_ZEROES | zeros in pieces of 1 MiB; TRIM may be less ([`Zeroing`]) |
//! | FLUSH, flag FUA | nothing: a reply is only given to what is applied, for every connection |
//! | CACHE | nothing: all of it is memory |
//! | BLOCK_STATUS | [`Backing::extents`], for the context `base:allocation`; [`Backing::changed`], for `x-uffd:dirty-N` |
//!
//! Invariants:
//! - I1: a length is compared with its limit before anything is kept or made of that size;
//!   what is longer is passed over as it comes in, or ends the connection.
//! - I2: no more is staged than [`NBD_STAGED`](crate::limits::NBD_STAGED) and one piece; a
//!   call makes one reply or a part of it, and after [`NBD_TURN`](crate::limits::NBD_TURN)
//!   bytes it asks to let others go on.
//! - I3: each request gets one reply, in the terms of the protocol, whatever its flags,
//!   range and length; bytes that are no request end the connection.
//! - I4: a request is passed to the backing only if its whole range lies in the export.
//! - I5: nothing here reads a socket or a clock, or panics on what a client sends.
//!
//! The protocol: doc/proto.md of the project NetworkBlockDevice/nbd.

mod backing;
mod command;
mod context;
mod export;
mod handshake;
mod numbers;
mod options;
mod reply;
mod session;
#[cfg(test)]
mod tests;
mod transmission;

pub use backing::{Answer, Backing, Extent, Failure, Kind, Since, Unit, Zeroing};
pub use export::{Catalog, Export, Exports, ExportsError};
pub use numbers::REQUEST_BYTES;
pub use session::{Advanced, Next, Session, Violation};
pub use transmission::Counts;
