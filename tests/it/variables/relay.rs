//! A TCP relay between two processes that knows nothing of frames: it cuts all its
//! connections when told to.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

struct Shared {
    target: SocketAddr,
    open: Mutex<Vec<TcpStream>>,
    stopping: AtomicBool,
    closed: AtomicBool,
    taken: AtomicU64,
}

/// A relay that ends when dropped.
pub(crate) struct Relay {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

impl Relay {
    pub(crate) fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let shared = Arc::new(Shared {
            target,
            open: Mutex::default(),
            stopping: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            taken: AtomicU64::new(0),
        });
        let for_thread = Arc::clone(&shared);
        let accepting = Some(std::thread::spawn(move || accept(&listener, &for_thread)));
        Self {
            shared,
            address,
            accepting,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections that were taken so far.
    pub(crate) fn taken(&self) -> u64 {
        self.shared.taken.load(Ordering::Relaxed)
    }

    /// From now on connections are closed at once, or not any more.
    pub(crate) fn close(&self, closed: bool) {
        self.shared.closed.store(closed, Ordering::Relaxed);
        self.cut();
    }

    /// Ends all connections, wherever they are in a frame.
    pub(crate) fn cut(&self) {
        for socket in self.shared.open.lock().expect("no pump panicked").drain(..) {
            // It may have ended already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.cut();
        // Wakes the accepting thread, which then looks at the flag.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((caller, _)) = listener.accept() {
        if shared.stopping.load(Ordering::Relaxed) {
            return;
        }
        if shared.closed.load(Ordering::Relaxed) {
            continue;
        }
        let Ok(called) = TcpStream::connect_timeout(&shared.target, Duration::from_secs(5)) else {
            continue;
        };
        shared.taken.fetch_add(1, Ordering::Relaxed);
        for socket in [&caller, &called] {
            socket.set_nodelay(true).expect("a TCP socket");
        }
        let copy = |socket: &TcpStream| socket.try_clone().expect("a descriptor");
        let mut open = shared.open.lock().expect("no pump panicked");
        open.extend([copy(&caller), copy(&called)]);
        drop(open);
        let ways = [(copy(&caller), copy(&called)), (called, caller)];
        for (from, to) in ways {
            std::thread::spawn(move || pump(from, to));
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    let mut bytes = [0; 16 * 1024];
    while let Ok(count) = from.read(&mut bytes) {
        if count == 0 || to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
