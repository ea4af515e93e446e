//! The command `uffd-sync`.

use std::process::ExitCode;

#[cfg(not(loom))]
fn main() -> ExitCode {
    uffd_sync::cli::main()
}

/// Models need no command, but cargo builds it with them.
#[cfg(loom)]
fn main() -> ExitCode {
    ExitCode::FAILURE
}
