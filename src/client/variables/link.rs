//! A connection to a node that speaks of its ordered variables.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::super::ClientError;
use crate::limits;
use crate::sys::net::{self, Blocking};
use crate::wire::control;
use crate::wire::variables::{Denied, Request, Response};

/// How much longer than an operation its answer may take.
const GRACE: Duration = Duration::from_secs(10);

/// A connection to a node's variables: one request, one answer, in order.
#[derive(Debug)]
pub struct VariablesLink {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl VariablesLink {
    pub(in super::super) fn new(socket: OwnedFd, buffer: Vec<u8>) -> Self {
        Self { socket, buffer }
    }

    /// Asks and waits for the answer, for `deadline` and some seconds.
    ///
    /// # Errors
    /// [`ClientError::Denied`] if it was refused or its outcome is not known.
    pub fn ask(&mut self, request: &Request, deadline: Duration) -> Result<Response, ClientError> {
        self.send(request, Some(deadline.saturating_add(GRACE)))?;
        let timed_out = |error: &ClientError| match error {
            ClientError::Io(error) => error.source.kind() == std::io::ErrorKind::WouldBlock,
            ClientError::Closed => true,
            _ => false,
        };
        let changes = matches!(request, Request::Set { .. } | Request::Cas { .. });
        match self.hear() {
            Err(error) if changes && timed_out(&error) => Err(ClientError::Denied {
                code: Denied::Indeterminate,
                message: "the node did not answer: the operation may be carried out, or have \
                          been; read the variable in order to see"
                    .to_owned(),
            }),
            other => other,
        }
    }

    /// Watches some variables, or all; the first answer is their list. Then
    /// [`VariablesLink::hear`] waits for each further one without a bound.
    ///
    /// # Errors
    /// As for [`VariablesLink::ask`].
    pub fn watch(&mut self, variables: Vec<String>) -> Result<Response, ClientError> {
        self.send(&Request::Watch { variables }, Some(GRACE))?;
        let first = self.hear()?;
        net::set_timeouts(&self.socket, None, Some(GRACE))?;
        Ok(first)
    }

    fn send(&self, request: &Request, patience: Option<Duration>) -> Result<(), ClientError> {
        net::set_timeouts(&self.socket, patience, Some(GRACE))?;
        let bytes = control::encode(request, &[])?;
        let mut sent = 0;
        while sent < bytes.len() {
            sent += net::send_with_fds(&self.socket, &bytes[sent..], &[])?;
        }
        Ok(())
    }

    /// The next answer.
    ///
    /// # Errors
    /// [`ClientError::Closed`] at the end of the connection.
    pub fn hear(&mut self) -> Result<Response, ClientError> {
        loop {
            let limit = limits::MAX_CONTROL_ANSWER;
            match control::decode::<Response>(&mut self.buffer, limit)? {
                Some(message) => {
                    return match message.body {
                        Response::Refused { code, message } => {
                            Err(ClientError::Denied { code, message })
                        }
                        response => Ok(response),
                    };
                }
                None => {
                    let mut piece = [0; 16 * 1024];
                    let received = net::recv_with_fds(&self.socket, &mut piece, 1, Blocking::Yes)?;
                    if received.bytes == 0 {
                        return Err(ClientError::Closed);
                    }
                    self.buffer.extend_from_slice(&piece[..received.bytes]);
                }
            }
        }
    }
}
