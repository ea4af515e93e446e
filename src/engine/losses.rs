//! What happened to the tracking of a region: counted by kind, with the last reason.
//!
//! I1. At most one entry for each kind: bounded, whatever happens how often.
//! I2. A reason is at most [`limits::MAX_REASON_BYTES`] long and holds no control
//!     characters: it may have come from a writer, and it is printed on terminals.

use nix::libc::{ENOENT, ESRCH};

use crate::limits;
use crate::sys::process::realtime_ns;
use crate::track::TrackError;
use crate::track::exact::Lost;
use crate::wire::control::LossStatus;
use crate::words::LossKind;

/// Losses of one region, over all its lives on this node.
#[derive(Clone, Debug, Default)]
pub(super) struct Losses(Vec<LossStatus>);

impl Losses {
    /// Counts one.
    pub(super) fn note(&mut self, kind: LossKind, reason: &str) {
        let reason = printable(reason);
        let at_ms = realtime_ns() / 1_000_000;
        match self.0.iter_mut().find(|loss| loss.kind == kind) {
            Some(loss) => {
                loss.count += 1;
                loss.reason = reason;
                loss.at_ms = at_ms;
            }
            None => self.0.push(LossStatus {
                kind,
                count: 1,
                reason,
                at_ms,
            }),
        }
    }

    /// All kinds that happened, in the order of their first time.
    pub(super) fn status(&self) -> Vec<LossStatus> {
        self.0.clone()
    }
}

/// What the error of a capture is; none if the writer's memory is gone, which is told by
/// its end, or by the audit if that does not come.
pub(super) fn kind_of(error: &TrackError) -> Option<LossKind> {
    match error {
        TrackError::WriterExited => None,
        TrackError::Void => Some(LossKind::CutVoid),
        TrackError::Exact(lost) => kind_of_lost(*lost),
        _ => Some(LossKind::ScanError),
    }
}

/// The same of what a fault thread met.
pub(super) fn kind_of_lost(lost: Lost) -> Option<LossKind> {
    match lost {
        Lost::Refused { errno: ESRCH } => None,
        Lost::Refused { errno: ENOENT } => Some(LossKind::Untracked),
        _ => Some(LossKind::ScanError),
    }
}

/// `text` as one short line.
pub(super) fn printable(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut line: String = text.chars().map(clean).collect();
    let mut end = line.len().min(limits::MAX_REASON_BYTES as usize);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_counted_by_kind_and_keep_the_last_reason() {
        let mut losses = Losses::default();
        losses.note(LossKind::ScanError, "one");
        losses.note(LossKind::Untracked, "two");
        losses.note(LossKind::ScanError, "three");
        let seen: Vec<_> = losses
            .status()
            .into_iter()
            .map(|loss| (loss.kind, loss.count, loss.reason))
            .collect();
        assert_eq!(
            seen,
            [
                (LossKind::ScanError, 2, "three".to_owned()),
                (LossKind::Untracked, 1, "two".to_owned()),
            ]
        );
        assert!(losses.status()[0].at_ms > 1_600_000_000_000);
    }

    #[test]
    fn reasons_are_short_lines() {
        assert_eq!(printable("a\n\u{1b}[31mb"), "a  [31mb");
        let long = printable(&"ä".repeat(400));
        assert!(long.len() <= limits::MAX_REASON_BYTES as usize && long.ends_with('ä'));
    }
}
