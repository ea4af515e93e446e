//! Address spaces between real processes: servers from one file, clients good and bad.
//!
//! [`servers`] starts, kills and restarts them, [`wire`] is a client made of frames alone.

mod durability;
mod hostile;
mod lives;
mod mapped;
mod nbd;
pub(crate) mod servers;
mod watched;
pub(crate) mod wire;
