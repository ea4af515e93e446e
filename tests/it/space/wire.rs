//! A client made of frames and a blocking socket, which can also send what is no frame.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use uffd_sync::space::frame::{
    Hello, Incarnation, Operation, REPLY_BYTES, Refusal, Reply, ReplyHeader, Request,
    WELCOME_BYTES, Welcome,
};

use super::servers::Servers;
use crate::nodes::PATIENCE;

trait Stream: Read + Write + Send {}
impl<S: Read + Write + Send> Stream for S {}

/// One connection to one server.
pub(crate) struct Wire(Box<dyn Stream>);

pub(crate) fn hello(servers: &Servers, at: usize) -> Hello {
    Hello {
        versions: (1, 1),
        map: servers.map().digest(),
        server: at as u32,
        flags: 0,
        client: 7,
        incarnation: Incarnation(0),
    }
}

pub(crate) fn request(operation: Operation, offset: u64, len: u32) -> Request {
    Request {
        id: offset ^ 0x55,
        epoch: 0,
        operation,
        offset,
        len,
    }
}

impl Wire {
    /// Over TCP, without a greeting.
    #[track_caller]
    pub(crate) fn tcp(servers: &Servers, at: usize) -> Self {
        let stream = TcpStream::connect(servers.address(at)).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("no delay");
        Self(Box::new(stream))
    }

    /// Over the Unix socket, without a greeting.
    #[track_caller]
    pub(crate) fn unix(servers: &Servers, at: usize) -> Self {
        let stream = UnixStream::connect(servers.socket(at)).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self(Box::new(stream))
    }

    /// Over TCP, welcomed; with the life of the segment.
    #[track_caller]
    pub(crate) fn greeted(servers: &Servers, at: usize) -> (Self, Incarnation) {
        let mut wire = Self::tcp(servers, at);
        let welcome = wire.greet(&hello(servers, at));
        assert_eq!(welcome.refusal, Refusal::None);
        (wire, welcome.incarnation)
    }

    #[track_caller]
    pub(crate) fn greet(&mut self, hello: &Hello) -> Welcome {
        self.put(&hello.encode()).expect("sent");
        let mut bytes = [0; WELCOME_BYTES];
        self.0.read_exact(&mut bytes).expect("a welcome");
        Welcome::decode(&bytes).expect("a whole welcome")
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    #[track_caller]
    pub(crate) fn send(&mut self, operation: Operation, offset: u64, len: u32, body: &[u8]) {
        let mut bytes = request(operation, offset, len).encode(body).to_vec();
        bytes.extend(body);
        self.put(&bytes).expect("sent");
    }

    /// One reply, or why there is none.
    pub(crate) fn try_receive(&mut self) -> io::Result<(Reply, Vec<u8>)> {
        let mut bytes = [0; REPLY_BYTES];
        self.0.read_exact(&mut bytes)?;
        let header = ReplyHeader::decode(&bytes).expect("a whole header");
        let mut body = vec![0; header.body_len as usize];
        self.0.read_exact(&mut body)?;
        header.check_body(&body).expect("the body that was sent");
        Ok((header.reply, body))
    }

    #[track_caller]
    pub(crate) fn ask(
        &mut self,
        operation: Operation,
        offset: u64,
        len: u32,
        body: &[u8],
    ) -> (Reply, Vec<u8>) {
        self.send(operation, offset, len, body);
        let (reply, body) = self.try_receive().expect("a reply");
        assert_eq!(reply.id, offset ^ 0x55, "the reply to another request");
        (reply, body)
    }

    /// Waits for the end of the connection; false if something came instead.
    pub(crate) fn is_ended(&mut self) -> bool {
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(count) => count == 0,
            // A reset is an end, nothing within the time is none.
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }
}
