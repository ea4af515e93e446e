//! The log of operations: lines in a file, written by a thread of its own.
//!
//! ```text
//! loop --(bounded queue, never waits)--> thread --> FILE, FILE.1, FILE.2 ..
//! ```
//! A line: time in seconds since 1970, client (32 hexadecimal digits), operation, offset,
//! length, result.
//!
//! I1: the loop never waits for a disk: what finds the queue full is dropped and counted.
//! I2: at most `keep` + 1 files of little more than `max_size` bytes are there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use super::live::Figures;
use crate::limits;
use crate::space::config::OperationLog;
use crate::space::frame::{Operation, Request, Status};
use crate::sys::process::realtime_ns;

/// How often the thread looks by itself.
const LOOK: Duration = Duration::from_millis(50);
const QUEUE: usize = limits::SPACE_LOG_QUEUE as usize;

/// One operation that was answered.
#[derive(Clone, Copy, Debug)]
struct Entry {
    time_ns: u64,
    client: u128,
    operation: Operation,
    offset: u64,
    len: u32,
    status: Status,
}

#[derive(Debug)]
struct Shared {
    queue: ArrayQueue<Entry>,
    stopping: AtomicBool,
    figures: Arc<Figures>,
}

/// The loop's end. Dropping it writes what is queued and ends the thread.
#[derive(Debug)]
pub(super) struct Log {
    shared: Arc<Shared>,
    writer: Thread,
    thread: Option<JoinHandle<()>>,
}

/// The file that the server called `server` writes: servers on one host share the
/// configuration, so each has a file of its own.
fn own_path(path: &Path, server: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = match path.extension() {
        Some(extension) => format!("{stem}-{server}.{}", extension.to_string_lossy()),
        None => format!("{stem}-{server}"),
    };
    path.with_file_name(name)
}

impl Log {
    /// Opens the file and starts the thread.
    pub(super) fn start(
        config: &OperationLog,
        server: &str,
        figures: Arc<Figures>,
    ) -> io::Result<Self> {
        if config.path.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let path = own_path(&config.path, server);
        let file = Files::open(path, config.max_size, config.keep)?;
        let shared = Arc::new(Shared {
            queue: ArrayQueue::new(QUEUE),
            stopping: AtomicBool::new(false),
            figures,
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("space-log".into())
            .spawn(move || write(&theirs, file))?;
        Ok(Self {
            shared,
            writer: thread.thread().clone(),
            thread: Some(thread),
        })
    }

    pub(super) fn record(&self, client: u128, request: &Request, status: Status) {
        let entry = Entry {
            time_ns: realtime_ns(),
            client,
            operation: request.operation,
            offset: request.offset,
            len: request.len,
            status,
        };
        if self.shared.queue.push(entry).is_err() {
            let dropped = &self.shared.figures.log_dropped;
            dropped.fetch_add(1, Ordering::Relaxed);
        } else if self.shared.queue.len() == QUEUE / 2 {
            self.writer.unpark();
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // SYNC(space_log_stop): pairs with the load in `write`.
        self.shared.stopping.store(true, Ordering::Release);
        self.writer.unpark();
        if let Some(thread) = self.thread.take() {
            // It has ended, by a panic or not.
            let _ = thread.join();
        }
    }
}

fn write(shared: &Shared, mut files: Files) {
    let mut failing = false;
    loop {
        // SYNC(space_log_stop): pairs with the store in `drop`; what was queued before it
        // is written below.
        let last = shared.stopping.load(Ordering::Acquire);
        while let Some(entry) = shared.queue.pop() {
            match files.write(&entry) {
                Ok(()) => {
                    shared.figures.log_lines.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    shared.figures.log_dropped.fetch_add(1, Ordering::Relaxed);
                    if !failing {
                        let path = files.path.display();
                        tracing::error!(%error, %path, "operations are not logged");
                    }
                    failing = true;
                }
            }
        }
        match files.flush() {
            Ok(()) => failing = false,
            Err(error) if !failing => {
                tracing::error!(%error, path = %files.path.display(), "operations are not logged");
                failing = true;
            }
            Err(_) => {}
        }
        if last {
            return;
        }
        std::thread::park_timeout(LOOK);
    }
}

/// The file being written, and those before it.
struct Files {
    path: PathBuf,
    max_size: u64,
    keep: u64,
    file: BufWriter<File>,
    written: u64,
}

impl Files {
    fn open(path: PathBuf, max_size: u64, keep: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let written = file.metadata()?.len();
        Ok(Self {
            path,
            max_size,
            keep,
            file: BufWriter::new(file),
            written,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    fn write(&mut self, entry: &Entry) -> io::Result<()> {
        let (seconds, micros) = (
            entry.time_ns / 1_000_000_000,
            entry.time_ns / 1_000 % 1_000_000,
        );
        let line = format!(
            "{seconds}.{micros:06} {:032x} {:?} {} {} {:?}\n",
            entry.client, entry.operation, entry.offset, entry.len, entry.status
        );
        if self.written > 0 && self.written + line.len() as u64 > self.max_size {
            self.rotate()?;
        }
        self.file.write_all(line.as_bytes())?;
        self.written += line.len() as u64;
        Ok(())
    }

    fn numbered(&self, number: u64) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }

    fn move_on(&self) -> io::Result<()> {
        if self.keep == 0 {
            return fs::remove_file(&self.path);
        }
        for number in (1..self.keep).rev() {
            let from = self.numbered(number);
            if from.exists() {
                fs::rename(from, self.numbered(number + 1))?;
            }
        }
        fs::rename(&self.path, self.numbered(1))
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file.flush()?;
        // Somebody may have taken the file away, or it could not be opened anew before.
        if self.path.exists() {
            self.move_on()?;
        }
        let path = self.path.clone();
        *self = Self::open(path, self.max_size, self.keep)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(offset: u64) -> Request {
        Request {
            id: 1,
            epoch: 0,
            operation: Operation::FetchAdd,
            offset,
            len: 8,
        }
    }

    #[test]
    fn each_operation_is_a_line_and_files_are_rotated() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = OperationLog {
            path: folder.path().join("space.log"),
            max_size: 64 * 1024,
            keep: 2,
        };
        let figures = Arc::new(Figures::default());
        let log = Log::start(&config, "a", Arc::clone(&figures)).expect("started");
        log.record(0xABC, &request(16), Status::Misaligned);
        for at in 0..5000 {
            log.record(7, &request(8 * at), Status::Done);
        }
        drop(log);
        let of = |figure: &std::sync::atomic::AtomicU64| figure.load(Ordering::Relaxed);
        assert_eq!(
            (of(&figures.log_lines), of(&figures.log_dropped)),
            (5001, 0)
        );
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .expect("read")
            .map(|entry| entry.expect("an entry").file_name().into_string())
            .map(|name| name.expect("text"))
            .collect();
        names.sort();
        assert_eq!(names, ["space-a.log", "space-a.log.1", "space-a.log.2"]);
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).expect("read");
        for name in &names {
            assert!(read(name).len() <= 64 * 1024);
        }
        let last = read("space-a.log");
        let last = last.lines().last().expect("a line");
        let words: Vec<_> = last.split(' ').skip(1).collect();
        let client = format!("{:032x}", 7);
        assert_eq!(words, [&client, "FetchAdd", "39992", "8", "Done"]);
    }

    /// As somebody does who makes room on a disk by hand.
    #[test]
    fn a_file_that_was_taken_away_comes_back_at_the_next_rotation() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("space.log");
        for keep in [0, 2] {
            let mut files = Files::open(path.clone(), 500, keep).expect("opened");
            let entry = Entry {
                time_ns: 0,
                client: 0,
                operation: Operation::Ping,
                offset: 0,
                len: 0,
                status: Status::Done,
            };
            files.write(&entry).expect("written");
            fs::remove_file(&path).expect("there");
            for _ in 0..20 {
                files.write(&entry).expect("written");
            }
            files.flush().expect("written");
            let text = fs::read_to_string(&path).expect("there again");
            assert!(!text.is_empty() && text.len() <= 500);
        }
    }

    #[test]
    fn what_cannot_be_written_is_counted() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = OperationLog {
            path: folder.path().join("none/space.log"),
            max_size: 64 * 1024,
            keep: 2,
        };
        assert!(Log::start(&config, "a", Arc::default()).is_err());
        let no_file = OperationLog {
            path: folder.path().into(),
            ..config.clone()
        };
        assert!(Log::start(&no_file, "a", Arc::default()).is_err());
        let full = OperationLog {
            path: "/dev/full".into(),
            ..config
        };
        assert_eq!(own_path(&full.path, "a"), Path::new("/dev/full-a"));
        let figures = Arc::new(Figures::default());
        let shared = Shared {
            queue: ArrayQueue::new(20_000),
            stopping: AtomicBool::new(true),
            figures: Arc::clone(&figures),
        };
        for _ in 0..20_000 {
            let entry = Entry {
                time_ns: 0,
                client: 0,
                operation: Operation::Ping,
                offset: 0,
                len: 0,
                status: Status::Done,
            };
            shared.queue.push(entry).expect("room");
        }
        let files = Files::open("/dev/full".into(), u64::MAX, 0).expect("opened");
        write(&shared, files);
        assert!(figures.log_dropped.load(Ordering::Relaxed) > 0);
    }
}
