//! Named shared memory in `/dev/shm`, and files that are locked for life.
//!
//! An object is made without a name ([`unnamed`]), filled, and only then given
//! one ([`link`]): nobody ever opens a half-made one. A [`LockFile`] says that its
//! owner lives: the kernel lets the lock go when the last descriptor is closed,
//! by whatever death.
//!
//! Objects with a name cannot be sealed: whoever may write one may also truncate
//! it, and then the next access beyond the new end is a `SIGBUS`. So an object is
//! as trustworthy as all that its mode lets in.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, OFlag, open as open_file, posix_fallocate};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{ftruncate, linkat, unlink as unlink_file};

use super::SysError;

/// Where the C library keeps named shared memory and semaphores.
pub const FOLDER: &str = "/dev/shm";

const REMEDY_MOUNT: &str = "mount a tmpfs at /dev/shm";
const REMEDY_SPACE: &str = "enlarge /dev/shm (mount -o remount,size=..., docker run --shm-size)";
/// Tries to get a lock file that its owner removes at the same moment.
const LOCK_TRIES: u32 = 100;

fn path_of(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// An object without a name, empty, readable and writable as `mode` says.
///
/// # Errors
/// `EOPNOTSUPP` where `/dev/shm` is no tmpfs; `EMFILE` without descriptors.
pub fn unnamed(mode: u32) -> Result<OwnedFd, SysError> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let fd = open_file(FOLDER, flags, Mode::S_IRUSR | Mode::S_IWUSR)
        .map_err(|e| SysError::new("open O_TMPFILE /dev/shm", e).with_remedy(REMEDY_MOUNT))?;
    fchmod(&fd, Mode::from_bits_truncate(mode)).map_err(|e| SysError::new("fchmod", e))?;
    Ok(fd)
}

/// Makes the object `len` bytes long, new ones zero. With `reserve` their memory
/// is taken now, so that no later store can fail for want of it.
///
/// # Errors
/// `ENOSPC` if `/dev/shm` is too small for what is reserved.
pub fn resize(fd: impl AsFd, len: u64, reserve: bool) -> Result<(), SysError> {
    let len = i64::try_from(len).map_err(|_| SysError::os("ftruncate", libc::EFBIG))?;
    ftruncate(&fd, len).map_err(|e| SysError::new("ftruncate", e))?;
    if reserve && len > 0 {
        posix_fallocate(&fd, 0, len).map_err(|e| {
            let error = SysError::new("posix_fallocate", e);
            if e == Errno::ENOSPC {
                error.with_remedy(REMEDY_SPACE)
            } else {
                error
            }
        })?;
    }
    Ok(())
}

/// Gives an object made by [`unnamed`] its name.
///
/// # Errors
/// `EEXIST` if there is one of that name.
pub fn link(fd: impl AsFd, name: &str) -> Result<(), SysError> {
    let from = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    linkat(
        AT_FDCWD,
        from.as_str(),
        AT_FDCWD,
        &path_of(name),
        AtFlags::AT_SYMLINK_FOLLOW,
    )
    .map_err(|e| SysError::new("linkat into /dev/shm", e))
}

/// Opens the object `name` for reading and writing.
///
/// # Errors
/// `ENOENT` if there is none, `EACCES` if its mode forbids it, `ELOOP` if it is a
/// symbolic link.
pub fn open(name: &str) -> Result<OwnedFd, SysError> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    open_file(&path_of(name), flags, Mode::empty()).map_err(|e| SysError::new("shm_open", e))
}

/// Takes the name away; memory goes with the last mapping. Says whether there was
/// such a name.
///
/// # Errors
/// `EACCES` or `EPERM` if the object belongs to another user.
pub fn unlink(name: &str) -> Result<bool, SysError> {
    match unlink_file(&path_of(name)) {
        Ok(()) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(e) => Err(SysError::new("shm_unlink", e)),
    }
}

/// Whether there is an object `name`.
pub fn exists(name: &str) -> bool {
    fs::symlink_metadata(path_of(name)).is_ok()
}

/// Whether `name` still leads to the object that `fd` refers to.
pub fn is_linked(fd: impl AsFd, name: &str) -> bool {
    same_file(fd, &path_of(name))
}

fn same_file(fd: impl AsFd, path: &Path) -> bool {
    match (fstat(fd), fs::symlink_metadata(path)) {
        (Ok(own), Ok(there)) => own.st_ino == there.ino() && own.st_dev == there.dev(),
        _ => false,
    }
}

/// Whether process `pid` has the object mapped, or none where this process may not
/// look. A process that is gone, or a zombie, has nothing mapped.
pub fn is_mapped_by(pid: i32, fd: impl AsFd) -> Option<bool> {
    let stat = fstat(fd).ok()?;
    let maps = match fs::read_to_string(format!("/proc/{pid}/maps")) {
        Ok(maps) => maps,
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Some(false),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Some(false),
        Err(_) => return None,
    };
    let (major, minor) = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
    let (device, inode) = (format!("{major:02x}:{minor:02x}"), stat.st_ino.to_string());
    Some(maps.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(3);
        words.next() == Some(device.as_str()) && words.next() == Some(inode.as_str())
    }))
}

/// A file locked by its owner for life (`flock`) and removed by it at the end.
#[derive(Debug)]
pub struct LockFile {
    path: PathBuf,
    _lock: Flock<OwnedFd>,
}

impl LockFile {
    /// Locks `path`, made if missing together with its folder, or says `None` if
    /// somebody else holds it. A file that a dead owner left is taken over.
    ///
    /// # Errors
    /// `EACCES` if the folder or the file belongs to another user and is closed.
    pub fn take(path: &Path) -> Result<Option<LockFile>, SysError> {
        if let Some(folder) = path.parent() {
            make_folder(folder)?;
        }
        let flags = OFlag::O_CREAT | OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        LockFile::lock(path, flags)
    }

    /// Locks `path` if it is there and nobody holds it: its owner is dead then.
    ///
    /// # Errors
    /// `EACCES` if the file belongs to another user and is closed.
    pub fn take_left_behind(path: &Path) -> Result<Option<LockFile>, SysError> {
        LockFile::lock(path, OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
    }

    fn lock(path: &Path, flags: OFlag) -> Result<Option<LockFile>, SysError> {
        for _ in 0..LOCK_TRIES {
            let fd = match open_file(path, flags, Mode::from_bits_truncate(0o666)) {
                Ok(fd) => fd,
                Err(Errno::ENOENT) if !flags.contains(OFlag::O_CREAT) => return Ok(None),
                Err(e) => return Err(SysError::new("open of a lock file", e)),
            };
            match Flock::lock(fd, FlockArg::LockExclusiveNonblock) {
                // Its owner may have removed it between the two calls: a lock on a
                // file without a name keeps nobody out.
                Ok(lock) if same_file(&*lock, path) => {
                    return Ok(Some(LockFile {
                        path: path.to_owned(),
                        _lock: lock,
                    }));
                }
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_, e)) => return Err(SysError::new("flock", e)),
            }
        }
        Err(SysError::os(
            "locking a file that is removed again and again",
            libc::EBUSY,
        ))
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Removed while it is still locked, and only if it is still this file.
        if same_file(&*self._lock, &self.path) {
            let _ = unlink_file(&self.path);
        }
    }
}

/// Makes a folder that every user may put files into and remove only its own from,
/// as the system's temporary folder is.
fn make_folder(folder: &Path) -> Result<(), SysError> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(above) = folder.parent() {
        make_folder(above)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => fs::set_permissions(folder, fs::Permissions::from_mode(0o1777))
            .map_err(|e| SysError::new("chmod of the folder of lock files", e)),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(SysError::new("mkdir of the folder of lock files", e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::{Access, Mapping};
    use crate::sys::process::process_id;
    use std::process::Command;

    fn unique(what: &str) -> String {
        format!("uffd-sync-test-{}-{what}", process_id())
    }

    #[test]
    fn an_object_is_seen_once_it_has_its_name() {
        let name = unique("object");
        assert_eq!(
            open(&name).expect_err("none").raw_os_error(),
            Some(libc::ENOENT)
        );
        let fd = unnamed(0o600).expect("an object");
        resize(&fd, 8192, true).expect("space");
        link(&fd, &name).expect("a name");
        assert_eq!(
            link(&fd, &name).expect_err("twice").raw_os_error(),
            Some(libc::EEXIST)
        );
        let other = open(&name).expect("the object");
        assert!(is_linked(&other, &name));
        assert_eq!(is_mapped_by(process_id(), &fd), Some(false));
        let mapping = Mapping::shared(&other, 8192, Access::ReadWrite).expect("map");
        assert_eq!(is_mapped_by(process_id(), &fd), Some(true));
        drop(mapping);
        assert!(unlink(&name).expect("unlink"));
        assert!(!unlink(&name).expect("unlink"));
        assert!(!is_linked(&fd, &name));
        let mut child = Command::new("true").spawn().expect("spawn");
        child.wait().expect("wait");
        assert_eq!(is_mapped_by(child.id().cast_signed(), &fd), Some(false));
    }

    #[test]
    fn more_than_there_is_is_refused() {
        let fd = unnamed(0o600).expect("an object");
        let error = resize(&fd, 1 << 50, true).expect_err("a petabyte");
        assert!(
            error.remedy.is_some() || error.raw_os_error() == Some(libc::EFBIG),
            "{error}"
        );
    }

    #[test]
    fn a_lock_file_has_one_owner_and_goes_with_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a/b/name.lock");
        assert!(
            LockFile::take_left_behind(&path)
                .expect("no file")
                .is_none()
        );
        let lock = LockFile::take(&path).expect("lock").expect("free");
        assert!(LockFile::take(&path).expect("lock").is_none());
        assert!(LockFile::take_left_behind(&path).expect("lock").is_none());
        drop(lock);
        assert!(!path.exists());
        fs::write(&path, b"").expect("a file that a dead owner left");
        let lock = LockFile::take_left_behind(&path)
            .expect("lock")
            .expect("nobody's");
        fs::remove_file(&path).expect("remove");
        let next = LockFile::take(&path).expect("lock").expect("another file");
        drop(lock);
        assert!(path.exists(), "an owner removes its own file only");
        drop(next);
    }
}
