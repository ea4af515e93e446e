//! Address spaces between real processes: servers from one file, clients good and bad.
//!
//! [`servers`] starts, kills and restarts them, [`wire`] is a client made of frames alone.

mod hostile;
mod lives;
pub(crate) mod servers;
pub(crate) mod wire;
