//! The file of an address space, where everything that is told its path finds it.

pub use crate::engine::space_file::{SpaceFileError, load};
