//! What a writer process does to its own region behind the engine's back, on order.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use serde::{Deserialize, Serialize};
use uffd_sync::client::Writer;
use uffd_sync::sys::map::{Access, Mapping};
use uffd_sync::sys::memfd;
use uffd_sync::units::PAGE_SIZE;

/// One deed; offsets are those of the region.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Deed {
    /// `munmap` of a part.
    Unmap { offset: u64, len: u64 },
    /// `mremap` of a part to another place.
    MoveAway { offset: u64, len: u64 },
    /// Stores to what was moved away last, counted from its beginning.
    StoreMoved { offset: u64, byte: u8 },
    /// `mmap` with `MAP_FIXED` over a part, and a store to what is there now.
    MapOver { offset: u64, len: u64, byte: u8 },
    /// `mprotect`.
    SetWritable {
        offset: u64,
        len: u64,
        writable: bool,
    },
    /// `madvise(MADV_DONTNEED)`.
    DropEntries { offset: u64, len: u64 },
    /// `madvise(MADV_REMOVE)`.
    Punch { offset: u64, len: u64 },
    /// Children that each store a byte and end; answered by how the last ended.
    Fork {
        children: u64,
        places: Vec<u64>,
        byte: u8,
    },
    /// The kernel writes the file's bytes into the region.
    Take {
        way: Way,
        offset: u64,
        path: PathBuf,
    },
    /// Registers a part as the buffer of io_uring's fixed reads.
    Pin { offset: u64, len: u64 },
    /// A second writable mapping of the data is made, and stored to.
    MapAgain { offset: u64, byte: u8 },
    /// `pwrite` to the data.
    WriteFile { offset: u64, byte: u8 },
    /// `UFFDIO_UNREGISTER` of a part, by a descriptor of this process.
    Unregister { offset: u64, len: u64 },
    /// Another program in this process; its descriptors stay open if `keep`.
    Exec { keep: bool },
    /// Ends by itself.
    Leave,
    /// `PR_SET_DUMPABLE` 0. Before there is a region.
    HideMemory,
    /// Forbids itself system calls. Before there is a region.
    Forbid { calls: Vec<i64>, errno: i32 },
    /// Lowers its limit of open files to what it has now and `spare`.
    LimitFiles { spare: u64 },
}

/// How the kernel writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Way {
    Read,
    Receive,
    ReadVector,
    ProcessWrite,
    RingRead,
    RingReadFixed,
}

/// What is kept between deeds.
#[derive(Default)]
pub(crate) struct Doer {
    ring: Option<unruly::Ring>,
    moved: u64,
}

impl Doer {
    /// Carries a deed out; some tell how it went.
    pub(crate) fn carry_out(&mut self, region: Option<&Writer>, deed: &Deed) -> io::Result<String> {
        let done = |()| String::new();
        match deed {
            Deed::HideMemory => return unruly::set_dumpable(false).map(done),
            Deed::Forbid { calls, errno } => return unruly::forbid(calls, *errno).map(done),
            Deed::LimitFiles { spare } => return limit_files(*spare).map(done),
            Deed::Leave => std::process::exit(0),
            _ => {}
        }
        let region = region.ok_or_else(|| io::Error::other("no region yet"))?;
        let base = region.as_ptr() as u64;
        match deed {
            Deed::Unmap { offset, len } => unruly::unmap(base + offset, *len).map(done),
            Deed::MoveAway { offset, len } => {
                self.moved = unruly::move_away(base + offset, *len)?;
                Ok(String::new())
            }
            Deed::StoreMoved { offset, byte } => {
                unruly::store(self.moved + offset, *byte);
                Ok(String::new())
            }
            Deed::MapOver { offset, len, byte } => {
                unruly::map_over(base + offset, *len)?;
                unruly::store(base + offset, *byte);
                Ok(String::new())
            }
            Deed::SetWritable {
                offset,
                len,
                writable,
            } => unruly::set_writable(base + offset, *len, *writable).map(done),
            Deed::DropEntries { offset, len } => {
                unruly::drop_entries(base + offset, *len).map(done)
            }
            Deed::Punch { offset, len } => unruly::punch(base + offset, *len).map(done),
            Deed::Fork {
                children,
                places,
                byte,
            } => {
                let places: Vec<u64> = places.iter().map(|place| base + place).collect();
                let mut end = unruly::End::Exit(0);
                for _ in 0..*children {
                    end = unruly::store_in_a_fork(&places, *byte)?;
                }
                Ok(format!("{end:?}"))
            }
            Deed::Take { way, offset, path } => {
                let bytes = std::fs::read(path)?;
                self.take(*way, base + offset, &bytes, &File::open(path)?)
                    .map(done)
            }
            Deed::Pin { offset, len } => {
                let ring = unruly::Ring::new()?;
                ring.pin(base + offset, *len)?;
                self.ring = Some(ring);
                Ok(String::new())
            }
            other => through_other_ways(region, other),
        }
    }

    fn take(&mut self, way: Way, at: u64, bytes: &[u8], file: &File) -> io::Result<()> {
        let len = bytes.len() as u64;
        let ring = |kept: &mut Option<unruly::Ring>| match kept.take() {
            Some(ring) => Ok(ring),
            None => unruly::Ring::new(),
        };
        let taken = match way {
            Way::Read => unruly::read_to(file, at, len)?,
            Way::Receive => {
                let (mut from, to) = UnixStream::pair()?;
                from.write_all(bytes)?;
                unruly::receive_to(to, at, len)?
            }
            Way::ReadVector => unruly::read_vector_to(file, at, len)?,
            Way::ProcessWrite => unruly::write_to_process(std::process::id() as i32, at, bytes)?,
            Way::RingRead => {
                let mut ring = ring(&mut self.ring)?;
                let taken = ring.read_to(file, at, len as u32)?;
                self.ring = Some(ring);
                taken.into()
            }
            Way::RingReadFixed => {
                let mut ring = ring(&mut self.ring)?;
                let taken = ring.read_fixed_to(file, at, len as u32)?;
                self.ring = Some(ring);
                taken.into()
            }
        };
        if taken == len {
            Ok(())
        } else {
            Err(io::Error::other(format!("{taken} of {len} bytes")))
        }
    }
}

fn through_other_ways(region: &Writer, deed: &Deed) -> io::Result<String> {
    let done = |()| String::new();
    match deed {
        Deed::MapAgain { offset, byte } => {
            let mapping = Mapping::shared(region.data_fd(), region.size(), Access::ReadWrite)
                .map_err(|error| error.source)?;
            unruly::store(mapping.address() + offset, *byte);
            Ok(String::new())
        }
        Deed::WriteFile { offset, byte } => {
            memfd::write_at(region.data_fd(), &[*byte], *offset).map_err(|error| error.source)?;
            Ok(String::new())
        }
        Deed::Unregister { offset, len } => {
            let at = region.as_ptr() as u64 + offset;
            let uffd = own_fds()?
                .into_iter()
                .find(|(_, kind)| kind == "anon_inode:[userfaultfd]")
                .ok_or_else(|| io::Error::other("no userfaultfd"))?;
            unruly::unregister(uffd.0, at, *len).map(done)
        }
        Deed::Exec { keep } => {
            for (fd, kind) in own_fds()? {
                if *keep && (kind.starts_with("socket:") || kind.starts_with("anon_inode:")) {
                    unruly::keep_over_exec(fd)?;
                }
            }
            Err(Command::new("sleep").arg("60").exec())
        }
        other => Err(io::Error::other(format!("cannot {other:?}"))),
    }
}

/// Open descriptors of this process with what they refer to.
fn own_fds() -> io::Result<Vec<(i32, String)>> {
    let mut fds = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().parse();
        if let (Ok(fd), Ok(kind)) = (number, std::fs::read_link(entry.path())) {
            fds.push((fd, kind.to_string_lossy().into_owned()));
        }
    }
    Ok(fds)
}

fn limit_files(spare: u64) -> io::Result<()> {
    let probe = OwnedFd::from(File::open("/dev/null")?);
    let limit = probe.as_raw_fd() as u64 + spare;
    use nix::sys::resource::{Resource, setrlimit};
    Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)
}

/// Bytes of whole pages.
pub(crate) const fn pages(count: u64) -> u64 {
    count * PAGE_SIZE
}
