//! The servers of one space as processes on this host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use uffd_sync::space::{SpaceConfig, SpaceMap};

use crate::nodes::{self, BINARY, NodeProcess};

/// A file of a space, and its servers as far as they run. All sockets lie in one folder,
/// which commands find by `XDG_RUNTIME_DIR`.
pub(crate) struct Servers {
    folder: tempfile::TempDir,
    config: SpaceConfig,
    running: Vec<Option<NodeProcess>>,
}

/// An address of this host that no other test has, in this process or another.
pub(crate) fn own_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let pid = std::process::id();
    let numbers = [pid % 250 + 2, pid / 250 % 250, next / 250 % 250];
    let [a, b, c] = numbers;
    format!("127.{a}.{b}.{}", (c * 250 + next) % 250 + 1)
}

impl Servers {
    /// Writes the file of `count` servers of `segment_size` bytes, called `s0`, `s1` and so
    /// on, with `more` at its end; starts none.
    pub(crate) fn planned(count: usize, segment_size: u64, more: &str) -> Self {
        let folder = nodes::folder();
        let mut text = format!("segment_size = {segment_size}\nservers = [\n");
        for at in 0..count {
            let address = own_address();
            text.push_str(&format!(
                "  {{ name = \"s{at}\", address = \"{address}:7421\" }},\n"
            ));
        }
        text.push_str("]\n");
        text.push_str(more);
        let file = folder.path().join("mcomp.cfg");
        fs::write(&file, &text).expect("written");
        let config = SpaceConfig::parse(&text, &file).expect("a space");
        Self {
            folder,
            config,
            running: (0..count).map(|_| None).collect(),
        }
    }

    /// The same, and starts all of them.
    #[track_caller]
    pub(crate) fn start(count: usize, segment_size: u64, more: &str) -> Self {
        let mut servers = Self::planned(count, segment_size, more);
        for at in 0..count {
            servers.start_one(at, &[]);
        }
        servers
    }

    pub(crate) fn map(&self) -> &SpaceMap {
        &self.config.map
    }

    /// Where sockets and other files may lie.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder.path().join("mcomp.cfg")
    }

    /// The address of a server as `HOST:PORT`.
    pub(crate) fn address(&self, at: usize) -> String {
        self.map().servers()[at].address.to_string()
    }

    /// The path of a server's Unix socket.
    pub(crate) fn socket(&self, at: usize) -> PathBuf {
        let name = self.map().servers()[at].name.as_str();
        let default = uffd_sync::node::space::socket_of(self.map(), name);
        let file = default.file_name().expect("a file");
        self.folder.path().join("uffd-sync").join(file)
    }

    /// `uffd-sync` with the sockets of this space as its default ones.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(BINARY);
        command.env("XDG_RUNTIME_DIR", self.folder.path());
        command
    }

    /// The command that runs a server, without a start.
    pub(crate) fn serve_command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = self.command();
        command
            .arg("serve")
            .arg("--socket")
            .arg(self.control_socket(name))
            .args(["--name", name, "--server", name])
            .arg("--space")
            .arg(self.file())
            .args(arguments);
        command
    }

    fn control_socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.control"))
    }

    #[track_caller]
    pub(crate) fn start_one(&mut self, at: usize, arguments: &[&str]) {
        let command = self.serve_command(&format!("s{at}"), arguments);
        self.start_by(at, command);
    }

    /// The same by a command of its own, as another user for example.
    #[track_caller]
    pub(crate) fn start_by(&mut self, at: usize, command: Command) {
        let name = format!("s{at}");
        let node = NodeProcess::start_by(command, &name, self.control_socket(&name));
        self.running[at] = Some(node);
    }

    pub(crate) fn server(&self, at: usize) -> &NodeProcess {
        self.running[at].as_ref().expect("it runs")
    }

    /// Ends a server by `SIGKILL`.
    pub(crate) fn kill(&mut self, at: usize) {
        self.running[at].take().expect("it runs").kill();
    }

    /// Ends a server by `SIGTERM` and waits for it.
    #[track_caller]
    pub(crate) fn terminate(&mut self, at: usize) {
        let mut node = self.running[at].take().expect("it runs");
        node.signal(nix::sys::signal::Signal::SIGTERM);
        let status = node.await_end(nodes::PATIENCE);
        assert!(status.success(), "{status}");
    }
}
