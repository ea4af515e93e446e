//! Ordered variables between real processes: nodes and their commands, parties that are
//! cut off and stopped, a peer that lost its memory, hostile peers.

mod etcd;
mod example;
mod hostile;
#[path = "../../ordered/linear.rs"]
mod linear;
mod nodes_of;
mod party;
mod relay;
mod soak;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// An address that nobody listens at, another one each time: a port that the kernel picks
/// may be picked again as soon as it was let go of. Below the ports that the kernel gives
/// to connections that are made meanwhile.
fn free() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let place = std::process::id().wrapping_mul(61).wrapping_add(number);
        let port = 10_000 + (place % 20_000) as u16;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return listener.local_addr().expect("bound");
        }
    }
}
