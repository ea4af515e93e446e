//! What a hand-over has to carry, and what of it is checked: nothing of a writer's is
//! used before.

use std::os::fd::OwnedFd;

use super::requests::{Refusal, chain};
use crate::region::{Control, RegionKind};
use crate::sys::SysError;
use crate::sys::behaviour::Behaviour;
use crate::sys::map::Access;
use crate::sys::memfd::{self, Seals};
use crate::sys::pagemap::Then;
use crate::track::Attachment;
use crate::units::PAGE_SIZE;
use crate::wire::control::{HandOver, RefusalCode};
use crate::words::{Mode, WriteKind};

/// The descriptors of a hand-over, each of the kind it has to be.
pub(super) struct Parts {
    pub(super) data: OwnedFd,
    pub(super) control: OwnedFd,
    pub(super) attachment: Attachment,
}

impl Parts {
    pub(super) fn take(offer: &HandOver, fds: Vec<OwnedFd>) -> Result<Self, Refusal> {
        let protects = matches!(offer.mode, Mode::Async | Mode::Sync);
        let expected = if protects { 5 } else { 3 };
        if fds.len() != expected {
            return Err(Refusal::invalid(format!(
                "a hand-over in mode {} carries {expected} descriptors, not {}",
                offer.mode,
                fds.len()
            )));
        }
        let mut fds = fds.into_iter();
        let mut next = || {
            fds.next()
                .ok_or_else(|| Refusal::invalid("a descriptor is missing"))
        };
        let (data, control, pidfd) = (next()?, next()?, next()?);
        check_data(&data, offer)?;
        let (uffd, pagemap) = match offer.mode {
            Mode::Async | Mode::Sync => (Some(next()?), Some(next()?)),
            _ => (None, None),
        };
        let (base, size) = (offer.base, offer.max_size.unwrap_or(offer.size));
        let attachment = Attachment::from_parts(offer.mode, uffd, pagemap, pidfd, base, size)
            .map_err(|e| {
                Refusal::invalid(format!("tracking cannot be taken over: {}", chain(&e)))
            })?;
        Ok(Self {
            data,
            control,
            attachment,
        })
    }
}

/// Refuses what this kernel cannot keep; a choice has to be made by the writer.
pub(super) fn check_mode(mode: Mode, found: &Behaviour) -> Result<(), Refusal> {
    match mode {
        Mode::Auto => Err(Refusal::invalid(
            "a hand-over names the mode that was picked, not auto",
        )),
        Mode::Async | Mode::Sync => found.allows_tracking().map_err(|denied| {
            Refusal::new(
                RefusalCode::Unsupported,
                format!("mode {mode} is refused: {denied}"),
            )
        }),
        _ => Ok(()),
    }
}

/// Whoever hands a region over writes it: another process's end would not be noticed.
pub(super) fn check_writer(attachment: &Attachment, peer: i32) -> Result<(), Refusal> {
    let pid = attachment
        .pidfd
        .pid()
        .map_err(|e| Refusal::failed("cannot read the pidfd", &e))?;
    // The kernel says 0 of a process in another namespace.
    if peer != 0 && pid != peer {
        return Err(Refusal::invalid(format!(
            "the pidfd is of process {pid}, the request of process {peer}; \
             a writer hands its own region over"
        )));
    }
    Ok(())
}

/// The control page that a writer passed, if it is one of a region of `size` bytes now
/// and `max_size` at most.
pub(super) fn open_control(fd: &OwnedFd, size: u64, max_size: u64) -> Result<Control, Refusal> {
    let control = Control::open(fd, Access::ReadWrite).map_err(|error| {
        Refusal::invalid(format!("the control page is not one: {}", chain(&error)))
    })?;
    let (now, most) = (control.size(), control.max_size());
    let fits = now == size && most == max_size;
    if !fits || control.identity().kind != RegionKind::Source {
        return Err(Refusal::invalid(format!(
            "the control page tells of {now} bytes, {most} at most, the request of {size}, \
             {max_size} at most"
        )));
    }
    Ok(control)
}

/// A data memfd that cannot shrink under the engine and that nobody else can write,
/// unless others are to; one that has its greatest size takes no further seals either.
fn check_data(data: &OwnedFd, offer: &HandOver) -> Result<(), Refusal> {
    let size = offer.size;
    let seals = memfd::seals(data).map_err(|e| {
        Refusal::invalid(format!("the first descriptor is no memfd: {}", chain(&e)))
    })?;
    let alone = match offer.kind {
        WriteKind::Exclusive => Seals::FUTURE_WRITE,
        WriteKind::Cooperative => Seals::empty(),
    };
    let last = match offer.max_size {
        Some(max_size) if max_size > size => Seals::empty(),
        _ => Seals::SEAL,
    };
    let needed = Seals::SHRINK | alone | last;
    if !seals.contains(needed) {
        return Err(Refusal::invalid(format!(
            "the data memfd has seals {seals:?}; it needs {needed:?}"
        )));
    }
    let huge = memfd::page_bytes(data).is_ok_and(|bytes| bytes > PAGE_SIZE);
    let small = offer.kind == WriteKind::Cooperative || offer.mode == Mode::Sync;
    if huge && small {
        // A hole that somebody punches and finds no huge page later would end the node.
        return Err(Refusal::invalid(
            "a region of huge pages has one writer and is not tracked in mode sync; \
             leave huge_pages off",
        ));
    }
    let real = memfd::size(data).map_err(|e| Refusal::failed("cannot look at the memfd", &e))?;
    if real < size {
        return Err(Refusal::invalid(format!(
            "the data memfd has {real} bytes, not {size}"
        )));
    }
    Ok(())
}

/// Refuses a page map of another process and an address that is not the mapping's, as
/// far as its two ends show; what lies between is the audit's.
pub(super) fn check_mapping(mode: Mode, attachment: &Attachment) -> Result<(), Refusal> {
    // In other modes than the asynchronous one the page map does not tell.
    let (Mode::Async, Some(pagemap)) = (mode, &attachment.pagemap) else {
        return Ok(());
    };
    let last = attachment.base + attachment.len - PAGE_SIZE;
    for at in [attachment.base, last] {
        match pagemap.tracked_bytes(at, at + PAGE_SIZE) {
            Ok(PAGE_SIZE) => {}
            Ok(_) => {
                return Err(Refusal::invalid(format!(
                    "the page at {at:#x} is not registered for write-protection in the process \
                     that the pagemap belongs to"
                )));
            }
            Err(error) => return Err(Refusal::failed("the pagemap cannot be scanned", &error)),
        }
    }
    Ok(())
}

/// Refuses a further writer whose first page is not there and armed, or whose userfaultfd
/// does not act on the memory that its page map is of. It has not stored yet, so the page
/// can be opened for a moment.
pub(super) fn check_armed(attachment: &Attachment) -> Result<(), Refusal> {
    let (Some(uffd), Some(pagemap)) = (&attachment.uffd, &attachment.pagemap) else {
        return Ok(());
    };
    let at = attachment.base;
    let is_open = || {
        let mut found = Vec::new();
        pagemap
            .scan_written(at, at + PAGE_SIZE, &mut found, 1, 1, Then::Leave)
            .map(|_| !found.is_empty())
            .map_err(|e| Refusal::failed("the pagemap cannot be scanned", &e))
    };
    let change = |result: Result<(), SysError>| {
        result.map_err(|e| Refusal::failed("the userfaultfd does not protect that mapping", &e))
    };
    let armed = !is_open()?;
    change(uffd.unprotect(at, PAGE_SIZE))?;
    let opened = is_open()?;
    change(uffd.protect(at, PAGE_SIZE))?;
    if armed && opened {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "the page at {at:#x} is not there and armed by the userfaultfd that was passed: \
         one more writer arms all of its mapping before it hands it over"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::behaviour::Answer;

    #[test]
    fn a_mode_is_refused_if_the_kernel_denies_what_it_relies_on() {
        let well = Behaviour::made_up(None);
        for mode in [Mode::Async, Mode::Manual, Mode::Compare] {
            check_mode(mode, &well).expect("all is well");
        }
        assert_eq!(
            check_mode(Mode::Auto, &well).expect_err("no mode").code,
            RefusalCode::Invalid
        );
        let odd = well.with("scan-holes", Answer::Denied("page 5 is missing".to_owned()));
        let refusal = check_mode(Mode::Async, &odd).expect_err("denied");
        assert_eq!(refusal.code, RefusalCode::Unsupported);
        assert!(refusal.message.contains("page 5 is missing"), "{refusal:?}");
        check_mode(Mode::Manual, &odd).expect("it needs no scans");
        check_mode(Mode::Compare, &odd).expect("it needs no scans");
    }
}
