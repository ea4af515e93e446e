//! Reads the file of an address space, bounded, for everything that is told its path.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::limits;
use crate::space::{SpaceConfig, SpaceConfigError};

/// A path that does not lead to a space.
#[derive(Debug, thiserror::Error)]
pub enum SpaceFileError {
    /// The file could not be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file that was named.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is longer than any such file has to be.
    #[error(
        "{}: longer than {} bytes, so it is no file of a space",
        path.display(),
        limits::MAX_SPACE_FILE
    )]
    TooLong {
        /// The file that was named.
        path: PathBuf,
    },
    /// Something in the file is wrong.
    #[error(transparent)]
    Config(#[from] SpaceConfigError),
}

/// Reads and validates the file at `path`.
///
/// # Errors
/// [`SpaceFileError`]; nothing of the file is taken over.
pub fn load(path: &Path) -> Result<SpaceConfig, SpaceFileError> {
    let read = |source| SpaceFileError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let bounded = File::open(path)
        .map_err(read)?
        .take(limits::MAX_SPACE_FILE + 1);
    // Memory grows with what was read, never with what a file claims to hold.
    let len = { bounded }.read_to_string(&mut text).map_err(read)?;
    if len as u64 > limits::MAX_SPACE_FILE {
        let path = path.to_owned();
        return Err(SpaceFileError::TooLong { path });
    }
    Ok(SpaceConfig::parse(&text, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_none() {
        let missing = load(Path::new("/nonexistent/mcomp.cfg"));
        assert!(matches!(missing, Err(SpaceFileError::Read { .. })));
        let endless = load(Path::new("/dev/zero"));
        assert!(matches!(endless, Err(SpaceFileError::TooLong { .. })));
    }
}
