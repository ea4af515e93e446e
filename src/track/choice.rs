//! Mode `auto`: which way of tracking a region gets, and why.
//!
//! ```text
//! exact epochs asked for?  yes, by timer:   sync, if it works, else none
//!                          yes, at commits: async, if it works, else compare
//!                          no:  async, if it works
//!                               else manual, if the program marks what it changes
//!                               else compare
//! ```
//! A choice is made once, in the writing process, and its reason goes along with the
//! region: into the log and the status of the node.

use crate::sys::behaviour::Behaviour;
use crate::words::{Mode, Publish};

/// What a writer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// When its epochs are made.
    pub publish: Publish,
    /// Whether each epoch has to be an exact instant.
    pub exact: bool,
    /// Whether the program marks what it changes.
    pub marks: bool,
}

/// A mode and why it is that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Never [`Mode::Auto`].
    pub mode: Mode,
    /// One sentence.
    pub reason: String,
}

/// Nothing here gives what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no mode makes exact epochs by timer without write-protection: publish at commits \
     (`commit`), or give the promise up (exact = false); `uffd-sync doctor` says what is missing"
)]
pub struct Unmet;

/// The mode for a writer that asked for `auto`.
///
/// # Errors
/// [`Unmet`] if exact epochs were asked for and no mode makes them.
pub fn choose(asked: Asked, found: &Behaviour) -> Result<Choice, Unmet> {
    let lacking = match (found.untried(), found.allows_tracking()) {
        (Some(reason), _) => Some(reason.to_owned()),
        (None, Err(denied)) => Some(denied.to_string()),
        (None, Ok(())) => None,
    };
    let by_timer = asked.publish == Publish::Timer;
    if asked.exact && by_timer && lacking.is_some() {
        return Err(Unmet);
    }
    let promise = match (asked.publish, asked.exact) {
        (Publish::Commit, _) => "each epoch is a cut made by commit()",
        (Publish::Timer, true) => "each epoch is a cut, without help from the writer",
        (Publish::Timer, false) => "epochs are convergent",
    };
    let (mode, why) = match lacking {
        None if asked.exact && by_timer => (
            Mode::Sync,
            "stores wait for the engine's answer while a cut is made".to_owned(),
        ),
        None => (
            Mode::Async,
            "the kernel reports written pages, at the lowest cost to the writer".to_owned(),
        ),
        Some(reason) if asked.marks && !asked.exact => (
            Mode::Manual,
            format!(
                "the program marks what it changes; write-protection is not to be had: {reason}"
            ),
        ),
        Some(reason) => (
            Mode::Compare,
            format!("everything is compared; write-protection is not to be had: {reason}"),
        ),
    };
    Ok(Choice {
        mode,
        reason: format!("{promise}; {why}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::behaviour::Answer;

    #[test]
    fn the_choice_follows_from_what_is_found_and_asked() {
        let well = Behaviour::made_up(None);
        let filtered = Behaviour::made_up(Some("userfaultfd failed: EPERM"));
        let odd = well
            .clone()
            .with("scan-holes", Answer::Denied("reported twice".to_owned()));
        let (timer, commit) = (Publish::Timer, Publish::Commit);
        let cases = [
            (&well, timer, false, false, Some(Mode::Async)),
            (&well, timer, false, true, Some(Mode::Async)),
            (&well, commit, true, false, Some(Mode::Async)),
            (&well, timer, true, false, Some(Mode::Sync)),
            (&filtered, timer, false, false, Some(Mode::Compare)),
            (&filtered, timer, false, true, Some(Mode::Manual)),
            (&filtered, commit, true, true, Some(Mode::Compare)),
            (&filtered, timer, true, true, None),
            (&odd, commit, false, false, Some(Mode::Compare)),
            (&odd, commit, false, true, Some(Mode::Manual)),
        ];
        for (found, publish, exact, marks, expected) in cases {
            let asked = Asked {
                publish,
                exact,
                marks,
            };
            let choice = choose(asked, found);
            assert_eq!(choice.as_ref().ok().map(|c| c.mode), expected, "{asked:?}");
            if let Ok(choice) = choice {
                let told = !std::ptr::eq(found, &filtered) || choice.reason.contains("EPERM");
                assert!(told, "{}", choice.reason);
                let told = !std::ptr::eq(found, &odd) || choice.reason.contains("reported twice");
                assert!(told, "{}", choice.reason);
            }
        }
    }
}
