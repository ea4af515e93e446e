//! Stands between clients and a server's Unix socket, and cuts each connection after some
//! bytes.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// A socket of the same name as the server's, in a folder of its own.
pub(super) struct Proxy {
    folder: tempfile::TempDir,
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    target: PathBuf,
    /// Bytes from the server that the next connection passes on, before it is cut.
    least: AtomicU64,
    cuts: AtomicU64,
    ends: AtomicBool,
}

impl Proxy {
    /// Each connection is cut after another number of bytes from the server, at least
    /// `least`.
    pub(super) fn start(target: PathBuf, least: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(target.file_name().expect("a name"));
        let listener = UnixListener::bind(&path).expect("a socket");
        let shared = Arc::new(Shared {
            target,
            least: AtomicU64::new(least),
            cuts: AtomicU64::new(0),
            ends: AtomicBool::new(false),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        });
        Self {
            folder,
            path,
            shared,
            thread: Some(thread),
        }
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(super) fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::Relaxed)
    }

    /// From the next connection on nothing is cut.
    pub(super) fn lets_all_pass(&self) {
        self.shared.least.store(u64::MAX / 2, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        drop(UnixStream::connect(&self.path));
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking());
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    let (mut threads, mut open) = (Vec::new(), Vec::new());
    while let Ok((client, _)) = listener.accept() {
        if shared.ends.load(Ordering::Relaxed) {
            break;
        }
        let Ok(server) = UnixStream::connect(&shared.target) else {
            continue;
        };
        let number = threads.len() as u64;
        let budget = shared.least.load(Ordering::Relaxed) + number * 37 % 1009;
        open.push((client.try_clone(), server.try_clone()));
        let to_server = (client.try_clone(), server.try_clone());
        threads.push(std::thread::spawn(move || {
            if let (Ok(from), Ok(to)) = to_server {
                pass(from, to, u64::MAX);
            }
        }));
        let shared = Arc::clone(shared);
        threads.push(std::thread::spawn(move || {
            if pass(server, client, budget) {
                shared.cuts.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    for (client, server) in open {
        for end in [client, server].into_iter().flatten() {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
    threads
        .into_iter()
        .for_each(|thread| thread.join().expect("ended"));
}

/// Passes bytes on until an end or the budget; then both ends are ended. Whether it was the
/// budget.
fn pass(mut from: UnixStream, mut to: UnixStream, mut budget: u64) -> bool {
    let mut piece = [0; 4096];
    while budget > 0 {
        let most = budget.min(piece.len() as u64) as usize;
        let Ok(bytes @ 1..) = from.read(&mut piece[..most]) else {
            break;
        };
        budget -= bytes as u64;
        if to.write_all(&piece[..bytes]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
    budget == 0
}
