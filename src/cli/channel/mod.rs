//! `channel ...`: in-place channels from a shell, with the built-in operations.

pub mod args;
mod bench;
mod call;
mod image;
mod operations;
mod serve;
mod status;
mod times;

use std::path::PathBuf;

use args::{ChannelCommand, Target, Wait};

use crate::client::channel::DuplexChannelFactory;
use crate::duplex::{ErrorCode, Waiting};

/// Runs one of the commands.
pub(super) fn run(command: ChannelCommand) -> anyhow::Result<()> {
    match command {
        ChannelCommand::Serve(args) => serve::run(&args),
        ChannelCommand::Call(args) => call::run(&args),
        ChannelCommand::Bench(args) => bench::run(&args),
        ChannelCommand::Status(args) => status::run(&args),
    }
}

/// Channels in the folder that `--dir` names.
fn factory(target: &Target) -> DuplexChannelFactory {
    match &target.dir {
        Some(dir) => DuplexChannelFactory::in_folder(PathBuf::from(dir)),
        None => DuplexChannelFactory::new(),
    }
}

impl From<Wait> for Waiting {
    fn from(wait: Wait) -> Waiting {
        match wait {
            Wait::Spin => Waiting::Spin,
            Wait::Park => Waiting::Park,
            Wait::Adaptive => Waiting::Adaptive,
        }
    }
}

/// Whether a server's handler refused the request for what is in it.
pub(super) fn is_bad_request(code: ErrorCode) -> bool {
    operations::error_of(code.0).is_some()
}
