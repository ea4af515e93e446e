//! `channel serve`: a built-in operation behind a name, until a signal ends it.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Context;

use super::args::ServeArgs;
use super::factory;
use super::operations::{Operation, OperationError, OperationKind, Place, code_of};
use crate::cli::failure::BadInput;
use crate::cli::serve::{start_log, tell_manager};
use crate::client::channel::{Frame, HandlerError, ServerOptions};
use crate::duplex::{BufferConfig, FrameBytes};
use crate::limits;
use crate::sys::net::wait_readable;
use crate::sys::process::SignalFd;
use crate::units::OutOfRange;

/// Time for clients to read what was answered before the end.
const DRAIN: Duration = Duration::from_millis(500);

/// Serves until a signal comes.
pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    if args.payload.0 > limits::MAX_CHANNEL_PAYLOAD {
        let most = crate::units::ByteSize(limits::MAX_CHANNEL_PAYLOAD);
        let text = format!("--payload {}: a channel has at most {most}", args.payload);
        return Err(BadInput(text).into());
    }
    start_log("info")?;
    let signals = SignalFd::block(&[nix::libc::SIGTERM, nix::libc::SIGINT])
        .context("taking the signals over")?;
    let operation = Operation {
        kind: args.op,
        sigma: args.sigma.0,
    };
    let options = ServerOptions {
        workers: args.workers as usize,
        waiting: args.wait.into(),
        max_clients: args.clients as usize,
        drain: DRAIN,
    };
    let name = &args.target.name;
    let config = BufferConfig::new(0, args.payload.0);
    let mut server = factory(&args.target).create_in_place_server(name, config, options)?;
    server.describe(&operation.describe());
    server.start(move |frame| serve(&operation, frame))?;
    let socket = server.socket().display().to_string();
    let op = operation.describe();
    tracing::info!(%name, op, socket, "serving channel");
    tell_manager(sd_notify::NotifyState::Ready);
    wait_readable(&[signals.as_fd()], None).context("waiting for a signal")?;
    tell_manager(sd_notify::NotifyState::Stopping);
    server.stop();
    tracing::info!(%name, "stopped");
    Ok(())
}

fn serve(operation: &Operation, frame: &mut Frame<'_>) -> Result<(), HandlerError> {
    match operation.apply(&frame.view()) {
        Ok(()) => Ok(()),
        Err(OperationError::Image(error)) => {
            Err(HandlerError::with_code(code_of(error), error.to_string()))
        }
        Err(OperationError::Place(error)) => Err(error.into()),
    }
}

impl Place for FrameBytes<'_> {
    type Error = OutOfRange;

    fn len(&self) -> usize {
        FrameBytes::len(self)
    }

    fn read(&self, at: usize, out: &mut [u8]) -> Result<(), OutOfRange> {
        FrameBytes::read(self, at, out)
    }

    fn write(&self, at: usize, bytes: &[u8]) -> Result<(), OutOfRange> {
        FrameBytes::write(self, at, bytes)
    }
}

impl Operation {
    /// As a status shows it and `bench` reads it.
    pub(super) fn describe(&self) -> String {
        match self.kind {
            OperationKind::Blur => format!("blur {}", self.sigma),
            other => other.word().to_owned(),
        }
    }

    /// The operation of a status, if it is a built-in one.
    pub(super) fn from_description(text: &str) -> Option<Operation> {
        let (word, sigma) = text.split_once(' ').unwrap_or((text, "2"));
        let kind = [
            OperationKind::Echo,
            OperationKind::Xor,
            OperationKind::Upper,
            OperationKind::Blur,
        ]
        .into_iter()
        .find(|kind| kind.word() == word)?;
        let sigma = sigma.parse::<super::args::Sigma>().ok()?.0;
        Some(Operation { kind, sigma })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_are_read_back() {
        for text in ["echo", "xor", "upper", "blur 2", "blur 0.5"] {
            let operation = Operation::from_description(text).expect(text);
            assert_eq!(operation.describe(), text);
        }
        for text in ["", "twirl", "blur x", "blur 99", "echo loud"] {
            assert!(Operation::from_description(text).is_none(), "{text}");
        }
    }
}
