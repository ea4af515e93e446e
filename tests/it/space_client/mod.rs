//! Address spaces as programs and shells use them: real servers, the client library, the
//! commands.
//!
//! [`linear`] judges histories of one 8-byte number, [`proxy`] cuts connections.

mod boundaries;
mod commands;
mod cuts;
mod durable;
mod kills;
mod linear;
mod proxy;
mod registers;
mod torn;

use std::path::PathBuf;
use std::time::Duration;

use uffd_sync::client::space::{Space, SpaceOptions, Transport};
use uffd_sync::space::SpaceConfig;

use crate::space::servers::Servers;

/// Longest wait for one reply on a machine that is busy.
const PATIENT: Duration = Duration::from_secs(30);

/// How a client of a test reaches its servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Tcp,
    Unix,
    Mapped,
}

const WAYS: [Way; 3] = [Way::Tcp, Way::Unix, Way::Mapped];

fn config(servers: &Servers) -> SpaceConfig {
    let file = servers.file();
    let text = std::fs::read_to_string(&file).expect("the file");
    SpaceConfig::parse(&text, &file).expect("a space")
}

fn sockets(servers: &Servers) -> PathBuf {
    let socket = servers.socket(0);
    socket.parent().expect("a folder").to_owned()
}

fn client(servers: &Servers, way: Way, deadline: Duration) -> Space {
    let options = SpaceOptions {
        deadline: Some(deadline),
        transport: match way {
            Way::Tcp => Transport::Tcp,
            Way::Unix | Way::Mapped => Transport::Unix,
        },
        sockets: Some(sockets(servers)),
        no_mapping: way != Way::Mapped,
    };
    Space::connect_with(config(servers), options).expect("a client")
}
