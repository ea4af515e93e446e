//! Peers whose both sides are other programs: iceoryx2 from `tools/peers`, if that is
//! built, and the published Python package of two-buffer channels, if it is installed.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use uffd_sync::sys::process::process_id;

use crate::harness::{Child, Placement};
use crate::link::{Peers, Variant, channel_name};
use crate::payload::Touch;

/// Names the program where it lies elsewhere.
const PROGRAM: &str = "UFFD_SYNC_PEERS";
const BUILT: &str = "tools/peers/target/release/uffd-sync-peers";

/// Names a Python that has the package.
const PYTHON: &str = "UFFD_SYNC_ZEROBUFFER_PYTHON";
const SCRIPT: &str = "bench/duplex/zerobuffer_peer.py";

/// Services of one run have different names.
static SERVICES: AtomicU32 = AtomicU32::new(0);

/// How iceoryx2 waits.
#[derive(Clone, Copy)]
pub(crate) enum Wait {
    /// It polls.
    Busy,
    /// It sleeps on an event service in each direction.
    Event,
}

/// The program, or why there is none.
pub(crate) fn program() -> Result<PathBuf, String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let program = std::env::var_os(PROGRAM).map_or_else(|| root.join(BUILT), PathBuf::from);
    if program.is_file() {
        Ok(program)
    } else {
        Err(format!("no {BUILT}: run tools/peers/build"))
    }
}

/// iceoryx2's request and response; `Ok(Err)` says why it cannot be run.
pub(crate) fn iceoryx(
    placement: Placement,
    len: u64,
    touch: Touch,
    wait: Wait,
) -> anyhow::Result<Result<Box<dyn Variant>, String>> {
    let program = match program() {
        Ok(program) => program,
        Err(reason) => return Ok(Err(reason)),
    };
    let number = SERVICES.fetch_add(1, Ordering::Relaxed);
    let service = format!("uffd-sync-bench/{}/{number}", process_id());
    let wait = match wait {
        Wait::Busy => "busy",
        Wait::Event => "event",
    };
    let len = len.to_string();
    let args = [service.as_str(), &len, touch.name(), wait];
    let [client_core, server_core] = placement.cores();
    let spawn = |side, core| -> anyhow::Result<Child> {
        let mut child =
            Child::spawn_program(&program, &["iceoryx2", side], "iceoryx2", core, &args)?;
        child.hear()?;
        Ok(child)
    };
    let server = spawn("server", server_core)?;
    let client = spawn("client", client_core)?;
    Ok(Ok(Box::new(Peers::new(server, client))))
}

/// The published implementation of two-buffer channels, client and server in Python.
pub(crate) fn python(
    placement: Placement,
    len: u64,
) -> anyhow::Result<Result<Box<dyn Variant>, String>> {
    let Some(python) = std::env::var_os(PYTHON).map(PathBuf::from) else {
        return Ok(Err(format!("{PYTHON} names no Python with zerobuffer-ipc")));
    };
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(SCRIPT);
    let script = script.to_string_lossy();
    let (name, len) = (channel_name(), len.to_string());
    let spawn = |side, core| -> anyhow::Result<Child> {
        let leading = [script.as_ref(), side];
        let args = [name.as_str(), len.as_str()];
        let mut child = Child::spawn_program(&python, &leading, "zerobuffer-ipc", core, &args)?;
        child.hear()?;
        Ok(child)
    };
    let [client_core, server_core] = placement.cores();
    let server = spawn("server", server_core)?;
    let client = spawn("client", client_core)?;
    Ok(Ok(Box::new(Peers::new(server, client))))
}
