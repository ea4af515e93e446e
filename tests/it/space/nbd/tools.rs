//! Programs run with a deadline, ended by their ids.

use std::ffi::OsStr;
use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest run of a tool; many times what it takes, since tests share the machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// Whether a tool is not installed; then it says so, or panics where all tests have to run.
pub(super) fn are_missing(tools: &[&str]) -> bool {
    let required = std::env::var_os("UFFD_SYNC_REQUIRE_ALL").is_some_and(|v| v == "1");
    for tool in tools {
        let found = command(tool)
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !found.is_ok_and(|status| status.success()) {
            assert!(!required, "{tool} is not installed");
            use std::io::Write as _;
            let line = format!("SKIP {tool} is not installed\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
            return true;
        }
    }
    false
}

/// The system's tools before all others: `nbdsh` needs the Python that libnbd is made for.
fn command(tool: &str) -> Command {
    let mut command = Command::new(tool);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:{path}"));
    command
}

/// A program with its arguments.
pub(super) struct Tool(Command);

/// One that runs; ended when dropped.
pub(super) struct Running {
    name: String,
    child: Child,
    /// What it says, on both of its outputs.
    said: tempfile::NamedTempFile,
    ends: Instant,
}

impl Tool {
    pub(super) fn new(name: &str) -> Self {
        Self(command(name))
    }

    pub(super) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.0.arg(argument);
        self
    }

    pub(super) fn args<A: AsRef<OsStr>>(mut self, all: impl IntoIterator<Item = A>) -> Self {
        self.0.args(all);
        self
    }

    #[track_caller]
    pub(super) fn start(mut self) -> Running {
        let said = tempfile::NamedTempFile::new().expect("a file");
        let output = || {
            File::options()
                .append(true)
                .open(said.path())
                .expect("opened")
        };
        let folder = said.path().parent().expect("a folder").to_owned();
        self.0
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(output())
            .stderr(output());
        Running {
            name: self.0.get_program().to_string_lossy().into_owned(),
            child: self.0.spawn().expect("it starts"),
            said,
            ends: Instant::now() + DEADLINE,
        }
    }

    #[track_caller]
    pub(super) fn succeeds(self) {
        self.start().succeeds();
    }

    /// What it says, if it ends well.
    #[track_caller]
    pub(super) fn says(self) -> String {
        self.start().succeeds()
    }

    /// What it ends with.
    #[track_caller]
    pub(super) fn code(self) -> Option<i32> {
        self.start().end().0
    }
}

impl Running {
    pub(super) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("waited for").is_some()
    }

    /// Waits for a good end; what it said.
    #[track_caller]
    pub(super) fn succeeds(self) -> String {
        let name = self.name.clone();
        let (code, said) = self.end();
        assert_eq!(code, Some(0), "{name}: {said}");
        said
    }

    #[track_caller]
    fn end(mut self) -> (Option<i32>, String) {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waited for") {
                break status;
            }
            let said = self.said();
            assert!(Instant::now() < self.ends, "{} runs on: {said}", self.name);
            std::thread::sleep(Duration::from_millis(2));
        };
        (status.code(), self.said())
    }

    fn said(&self) -> String {
        let bytes = std::fs::read(self.said.path()).expect("read");
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
