//! How a command ends: the exit code of an error and the line that says it.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed |
//! | 2 | bad input: a flag, a file, a name, a size or a range; nothing changed |
//! | 3 | a kernel feature or permission is missing; `doctor` names the remedy |
//! | 4 | the outcome of an operation on a variable or a space is known to nobody |

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::client::ClientError;
use crate::client::channel::ChannelError;
use crate::client::space::{self, Failure};
use crate::node::space::SpaceError as LendError;
use crate::node::space_file::SpaceFileError;
use crate::node::{ConfigError, NbdError, NodeError};
use crate::sys::SysError;
use crate::units::OutOfRange;
use crate::wire::control::RefusalCode;
use crate::wire::variables::Denied;

pub(super) const FAILED: u8 = 1;
pub(super) const BAD_INPUT: u8 = 2;
pub(super) const MISSING_FEATURE: u8 = 3;
pub(super) const UNKNOWN_OUTCOME: u8 = 4;

/// Input that a command refuses on its own, with what would be right.
#[derive(Debug)]
pub(super) struct BadInput(pub(super) String);

impl fmt::Display for BadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

/// A file that cannot be opened is bad input.
pub(super) fn bad_file(error: io::Error) -> BadInput {
    BadInput(error.to_string())
}

/// A report was printed and says why; there is nothing to add.
#[derive(Debug)]
pub(super) struct Reported(pub(super) u8);

impl fmt::Display for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ended with code {}", self.0)
    }
}

impl std::error::Error for Reported {}

/// Says on standard error what failed, if anything is to be said, and picks the code.
pub(super) fn report(error: &anyhow::Error) -> ExitCode {
    if is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    if let Some(Reported(code)) = error.downcast_ref() {
        return ExitCode::from(*code);
    }
    let mut stderr = io::stderr().lock();
    // Where standard error is closed there is nobody left to tell.
    let _ = writeln!(stderr, "uffd-sync: {error:#}");
    if let Some(remedy) = remedy(error) {
        let _ = writeln!(stderr, "uffd-sync: remedy: {remedy}");
    }
    ExitCode::from(code(error))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    // Only what this process wrote itself: a node's socket fails as `SysError`.
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn remedy(error: &anyhow::Error) -> Option<&'static str> {
    error
        .chain()
        .find_map(|cause| cause.downcast_ref::<SysError>()?.remedy)
}

/// Whether NBD clients cannot be served at the place that was asked for.
fn is_bad_place(error: &NodeError) -> bool {
    matches!(
        error,
        NodeError::Nbd(NbdError::Address { .. } | NbdError::Exposed { .. })
    )
}

fn code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        let bad_input = cause.is::<BadInput>()
            || cause.is::<OutOfRange>()
            || cause.is::<ConfigError>()
            || cause.is::<SpaceFileError>()
            || cause.downcast_ref::<NodeError>().is_some_and(is_bad_place)
            || cause
                .downcast_ref::<LendError>()
                .is_some_and(LendError::is_bad_input)
            || cause
                .downcast_ref::<ClientError>()
                .is_some_and(is_bad_request)
            || cause
                .downcast_ref::<ChannelError>()
                .is_some_and(is_bad_call);
        if let Some(ClientError::Denied {
            code: Denied::Indeterminate,
            ..
        }) = cause.downcast_ref()
        {
            return UNKNOWN_OUTCOME;
        }
        if let Some(error) = cause.downcast_ref::<space::SpaceError>() {
            return space_code(error);
        }
        if bad_input {
            return BAD_INPUT;
        }
    }
    if remedy(error).is_some() {
        return MISSING_FEATURE;
    }
    FAILED
}

fn space_code(error: &space::SpaceError) -> u8 {
    match error {
        _ if error.is_indeterminate() => UNKNOWN_OUTCOME,
        space::SpaceError::File(_)
        | space::SpaceError::Tls
        | space::SpaceError::OutOfRange(_)
        | space::SpaceError::Misaligned { .. }
        | space::SpaceError::Batch(_)
        | space::SpaceError::NoServer { .. } => BAD_INPUT,
        space::SpaceError::Parts(parts) => {
            // Another file, and nothing was carried out by anybody.
            let is_file = |why: &_| matches!(why, Failure::OtherMap { .. });
            let all = parts.failed.len() == parts.of;
            if all && parts.failed.iter().all(|part| is_file(&part.why)) {
                BAD_INPUT
            } else {
                FAILED
            }
        }
        space::SpaceError::Full { .. } | space::SpaceError::Ticket => FAILED,
    }
}

fn is_bad_call(error: &ChannelError) -> bool {
    match error {
        ChannelError::TooLarge { .. }
        | ChannelError::Clients { .. }
        | ChannelError::Workers { .. } => true,
        ChannelError::Handler { code, .. } => super::channel::is_bad_request(*code),
        _ => false,
    }
}

fn is_bad_request(error: &ClientError) -> bool {
    match error {
        ClientError::Refused { code, .. } => matches!(
            code,
            RefusalCode::Invalid
                | RefusalCode::NotFound
                | RefusalCode::Exists
                | RefusalCode::Unsupported
                | RefusalCode::Limit
        ),
        ClientError::Name(_) => true,
        ClientError::Denied { code, .. } => *code == Denied::Invalid,
        _ => false,
    }
}
