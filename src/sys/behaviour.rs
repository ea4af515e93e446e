//! What the kernel's write-protection and scans really do, found out on scratch memory.
//!
//! Tracking relies on more than that the calls exist: that holes can be armed, that a
//! dropped page-table entry does not lose a mark, that a scan which stops early goes on
//! without losing one. Kernels have differed in each, and version numbers do not tell.
//! Each question is asked once per process, on memory of its own; together they take
//! some milliseconds and change nothing outside of the process.
//!
//! A question that cannot be asked here (a container's filter forbids userfaultfd, say)
//! is `Untried`: not denied, since another process may hand its tracking over.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use super::SysError;
use super::map::{Access, Mapping};
use super::memfd;
use super::pagemap::{Pagemap, Then};
use super::uffd::Uffd;
use crate::units::{MIB, PAGE_SIZE};

/// Where the system says whether shared memory gets huge pages.
const SHMEM_HUGE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// One question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Short name, as `doctor` prints it.
    pub name: &'static str,
    /// What should hold.
    pub what: &'static str,
    /// Whether tracking by write-protection relies on it.
    pub needed: bool,
    /// The answer.
    pub answer: Answer,
}

/// The answer to one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It holds; with what there is to know about it.
    Holds(String),
    /// The kernel does something else.
    Denied(String),
    /// It cannot be found out here, and why.
    Untried(String),
}

/// All answers of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behaviour {
    findings: Vec<Finding>,
    untried: Option<String>,
}

/// Why tracking by write-protection is refused: the kernel does not behave as it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {what} is not so here: {found}; `uffd-sync doctor` shows what was tried")]
pub struct Denied {
    /// The question's name.
    pub name: &'static str,
    /// What should hold.
    pub what: &'static str,
    /// What was found instead.
    pub found: String,
}

enum Failure {
    Refused(SysError),
    Different(String),
    NotHere(String),
}

impl From<SysError> for Failure {
    fn from(error: SysError) -> Self {
        Self::Refused(error)
    }
}

type Tried = Result<String, Failure>;

struct Question {
    name: &'static str,
    what: &'static str,
    needed: bool,
    ask: fn() -> Tried,
}

const QUESTIONS: &[Question] = &[
    Question {
        name: "scan-holes",
        what: "pages that were never touched are armed and report their first store",
        needed: true,
        ask: holes,
    },
    Question {
        name: "scan-empty-entries",
        what: "data without a page-table entry is armed and reports its first store",
        needed: true,
        ask: empty_entries,
    },
    Question {
        name: "scan-zapped-entries",
        what: "marks and protection survive that a page-table entry is dropped",
        needed: true,
        ask: zapped_entries,
    },
    Question {
        name: "scan-arms",
        what: "a scan arms what it reports, and nothing is reported without a store",
        needed: true,
        ask: arms,
    },
    Question {
        name: "scan-room-of-one",
        what: "a result vector of one range goes on where it stopped and loses nothing",
        needed: true,
        ask: || stops_early(1, u64::MAX),
    },
    Question {
        name: "scan-max-pages",
        what: "a limit of pages is kept, and going on loses nothing",
        needed: true,
        ask: || stops_early(64, 3),
    },
    Question {
        name: "scan-tail",
        what: "the last page of a range that ends within it is reported",
        needed: true,
        ask: tail,
    },
    Question {
        name: "scan-registration",
        what: "a part that is not registered is told: by an error, and when asked for",
        needed: true,
        ask: registration,
    },
    Question {
        name: "scan-huge-pages",
        what: "a store to an armed huge page reports that page alone",
        needed: false,
        ask: huge,
    },
];

impl Behaviour {
    /// What the kernel does for this process; found out at the first call.
    pub fn of_process() -> &'static Behaviour {
        static FOUND: OnceLock<Behaviour> = OnceLock::new();
        FOUND.get_or_init(Self::find_out)
    }

    /// Asks all questions now.
    pub fn find_out() -> Behaviour {
        // Where the first step fails all fail alike: say it once.
        let untried = Scratch::new(1).err().map(|failure| match failure {
            Failure::Refused(error) => refusal(&error),
            Failure::Different(text) | Failure::NotHere(text) => text,
        });
        let answer = |question: &Question| match &untried {
            Some(reason) => Answer::Untried(reason.clone()),
            None => match (question.ask)() {
                Ok(detail) => Answer::Holds(detail),
                Err(Failure::Different(found)) => Answer::Denied(found),
                Err(Failure::NotHere(reason)) => Answer::Untried(reason),
                Err(Failure::Refused(error)) => Answer::Denied(refusal(&error)),
            },
        };
        let findings = QUESTIONS.iter().map(|question| Finding {
            name: question.name,
            what: question.what,
            needed: question.needed,
            answer: answer(question),
        });
        Behaviour {
            findings: findings.collect(),
            untried,
        }
    }

    /// All answers.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Whether nothing that write-protection relies on is denied. What could not be
    /// tried is allowed.
    ///
    /// # Errors
    /// The first that is denied.
    pub fn allows_tracking(&self) -> Result<(), Denied> {
        for finding in self.findings.iter().filter(|finding| finding.needed) {
            if let Answer::Denied(found) = &finding.answer {
                return Err(Denied {
                    name: finding.name,
                    what: finding.what,
                    found: found.clone(),
                });
            }
        }
        Ok(())
    }

    /// Why this process cannot track by write-protection at all: the kernel, a filter
    /// or a missing file.
    pub fn untried(&self) -> Option<&str> {
        self.untried.as_deref()
    }

    /// The same with other answers, for tests of what follows from them.
    #[cfg(test)]
    pub(crate) fn with(mut self, name: &str, answer: Answer) -> Behaviour {
        for finding in self.findings.iter_mut().filter(|it| it.name == name) {
            finding.answer = answer.clone();
        }
        self
    }

    /// Answers as of a kernel where all is well, or where nothing can be tried.
    #[cfg(test)]
    pub(crate) fn made_up(untried: Option<&str>) -> Behaviour {
        let answer = match untried {
            Some(reason) => Answer::Untried(reason.to_owned()),
            None => Answer::Holds("made up".to_owned()),
        };
        let findings = QUESTIONS.iter().map(|question| Finding {
            name: question.name,
            what: question.what,
            needed: question.needed,
            answer: answer.clone(),
        });
        Behaviour {
            findings: findings.collect(),
            untried: untried.map(str::to_owned),
        }
    }
}

impl fmt::Display for Behaviour {
    /// One line: what holds, what is denied, what could not be tried.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reason) = &self.untried {
            return write!(f, "not tried: {reason}");
        }
        let names = |wanted: fn(&Answer) -> bool| {
            let found = self.findings.iter().filter(|it| wanted(&it.answer));
            let names: Vec<_> = found
                .map(|it| it.name.trim_start_matches("scan-"))
                .collect();
            names.join(", ")
        };
        write!(f, "holds: {}", names(|a| matches!(a, Answer::Holds(_))))?;
        let denied = names(|a| matches!(a, Answer::Denied(_)));
        if !denied.is_empty() {
            write!(f, "; denied: {denied}")?;
        }
        let untried = names(|a| matches!(a, Answer::Untried(_)));
        if !untried.is_empty() {
            write!(f, "; not tried: {untried}")?;
        }
        Ok(())
    }
}

fn refusal(error: &SysError) -> String {
    format!("{error}: {}", error.source)
}

fn expect(holds: bool, otherwise: impl Into<String>) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(Failure::Different(otherwise.into()))
    }
}

/// A tracked scratch mapping.
struct Scratch {
    memory: Mapping,
    fd: OwnedFd,
    uffd: Uffd,
    pagemap: Pagemap,
}

impl Scratch {
    /// Registered and not yet armed.
    fn new(pages: u64) -> Result<Scratch, Failure> {
        let fd = memfd::create("uffd-sync-probe", pages * PAGE_SIZE)?;
        let memory = Mapping::shared(&fd, pages * PAGE_SIZE, Access::ReadWrite)?;
        let uffd = Uffd::open_async()?;
        uffd.register_wp(&memory)?;
        Ok(Scratch {
            memory,
            fd,
            uffd,
            pagemap: Pagemap::open_self()?,
        })
    }

    fn armed(pages: u64) -> Result<Scratch, Failure> {
        let scratch = Self::new(pages)?;
        scratch.arm()?;
        Ok(scratch)
    }

    fn arm(&self) -> Result<(), Failure> {
        Ok(self
            .uffd
            .protect(self.memory.address(), self.memory.len())?)
    }

    fn store(&self, page: u64) -> Result<(), Failure> {
        let word = self.memory.word(page * PAGE_SIZE);
        let word = word.ok_or_else(|| Failure::Different("a page has no word".to_owned()))?;
        word.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The pages reported by one scan of everything.
    fn scan(&self, then: Then) -> Result<Vec<u64>, Failure> {
        let len = self.memory.len();
        let (pages, end) = self.scan_part(0..len, usize::MAX, u64::MAX, then)?;
        expect(end == len, "a scan of everything stopped early")?;
        Ok(pages)
    }

    fn scan_part(
        &self,
        bytes: Range<u64>,
        max_ranges: usize,
        max_pages: u64,
        then: Then,
    ) -> Result<(Vec<u64>, u64), Failure> {
        let base = self.memory.address();
        let mut ranges = Vec::new();
        let (start, end) = (base + bytes.start, base + bytes.end);
        let stopped =
            self.pagemap
                .scan_written(start, end, &mut ranges, max_ranges, max_pages, then)?;
        let page = |address: u64| (address - base) / PAGE_SIZE;
        let pages = ranges
            .into_iter()
            .flat_map(|range| page(range.start)..page(range.end));
        Ok((pages.collect(), stopped - base))
    }

    fn expect_scan(&self, pages: &[u64], otherwise: &str) -> Result<(), Failure> {
        let found = self.scan(Then::Protect)?;
        expect(
            found == pages,
            format!("{otherwise}: pages {found:?} for {pages:?}"),
        )
    }
}

fn holes() -> Tried {
    let scratch = Scratch::armed(16)?;
    scratch.expect_scan(&[], "untouched pages are reported after arming")?;
    scratch.store(5)?;
    scratch.expect_scan(&[5], "the first store to a hole is not what is reported")?;
    scratch.store(5)?;
    scratch.store(15)?;
    scratch.expect_scan(&[5, 15], "a store next to holes is not what is reported")?;
    Ok("armed and reported".to_owned())
}

fn empty_entries() -> Tried {
    let scratch = Scratch::new(16)?;
    for page in [2, 3, 9] {
        memfd::write_at(&scratch.fd, &[1], page * PAGE_SIZE)?;
    }
    scratch.arm()?;
    scratch.expect_scan(&[], "data that nobody mapped is reported after arming")?;
    scratch.store(3)?;
    scratch.expect_scan(
        &[3],
        "the first store to unmapped data is not what is reported",
    )?;
    Ok("armed and reported".to_owned())
}

fn zapped_entries() -> Tried {
    let scratch = Scratch::armed(16)?;
    for page in [1, 2, 6] {
        scratch.store(page)?;
    }
    scratch.expect_scan(&[1, 2, 6], "stores are not what is reported")?;
    // Dirty, then dropped: the mark must stay. Clean, then dropped: the protection.
    scratch.store(6)?;
    scratch.memory.zap(0, scratch.memory.len())?;
    scratch.expect_scan(&[6], "after entries were dropped")?;
    scratch.store(1)?;
    scratch.expect_scan(&[1], "a store after its entry was dropped")?;
    Ok("marks and protection kept".to_owned())
}

fn arms() -> Tried {
    let scratch = Scratch::armed(16)?;
    for page in [0, 5, 6] {
        scratch.store(page)?;
    }
    let seen = scratch.scan(Then::Leave)?;
    expect(
        seen == [0, 5, 6],
        "a look does not report what was stored to",
    )?;
    scratch.expect_scan(&[0, 5, 6], "a protecting scan")?;
    scratch.expect_scan(&[], "pages are reported again without a store")?;
    scratch.store(5)?;
    scratch.expect_scan(&[5], "a scan does not arm what it reports")?;
    Ok("reported once for each time".to_owned())
}

/// Alternating pages, with room for little in each call.
fn stops_early(max_ranges: usize, max_pages: u64) -> Tried {
    const PAGES: u64 = 24;
    let scratch = Scratch::armed(PAGES)?;
    let stored: Vec<u64> = (0..PAGES).filter(|page| page % 2 == 1).collect();
    for page in &stored {
        scratch.store(*page)?;
    }
    let (mut found, mut at, mut calls) = (Vec::new(), 0, 0);
    while at < scratch.memory.len() {
        let bytes = at..scratch.memory.len();
        let (pages, end) = scratch.scan_part(bytes, max_ranges, max_pages, Then::Protect)?;
        expect(
            end > at && pages.len() as u64 <= max_pages.min(max_ranges as u64),
            format!("{} pages in one call that stopped at {end}", pages.len()),
        )?;
        found.extend(pages);
        at = end;
        calls += 1;
    }
    expect(found == stored, format!("pages {found:?} for {stored:?}"))?;
    scratch.expect_scan(&[], "what was reported is not armed")?;
    Ok(format!("{} pages in {calls} calls", found.len()))
}

fn tail() -> Tried {
    let scratch = Scratch::armed(6)?;
    scratch.store(4)?;
    scratch.store(5)?;
    let (pages, _) = scratch.scan_part(0..5 * PAGE_SIZE + 100, 64, u64::MAX, Then::Protect)?;
    expect(
        pages == [4, 5],
        format!("pages {pages:?} of a range that ends in page 5"),
    )?;
    let (pages, _) = scratch.scan_part(0..5 * PAGE_SIZE, 64, u64::MAX, Then::Protect)?;
    expect(pages.is_empty(), "a page is reported twice at the tail")?;
    Ok("reported once".to_owned())
}

fn registration() -> Tried {
    let scratch = Scratch::armed(8)?;
    let (start, len) = (scratch.memory.address(), scratch.memory.len());
    let tracked = scratch.pagemap.tracked_bytes(start, start + len)?;
    expect(
        tracked == len,
        format!("{tracked} of {len} bytes registered"),
    )?;
    (0..8).try_for_each(|page| scratch.store(page))?;
    let half = len / 2;
    scratch.uffd.unregister_part(&scratch.memory, half, half)?;
    let tracked = scratch.pagemap.tracked_bytes(start, start + len)?;
    expect(
        tracked == half,
        format!("{tracked} bytes registered after half of {len} was unregistered"),
    )?;
    let refused = scratch.scan(Then::Protect).is_err();
    expect(refused, "a scan over an unregistered part is not refused")?;
    let (left, _) = scratch.scan_part(0..half, 64, u64::MAX, Then::Leave)?;
    Ok(format!(
        "told; the refused scan took the marks of {} pages of 4",
        4 - left.len().min(4)
    ))
}

fn huge() -> Tried {
    let setting = std::fs::read_to_string(SHMEM_HUGE).unwrap_or_default();
    if setting.contains("[never]") || setting.contains("[deny]") || setting.is_empty() {
        return Err(Failure::NotHere(format!(
            "shared memory gets no huge pages ({SHMEM_HUGE})"
        )));
    }
    let scratch = Scratch::new(4 * MIB / PAGE_SIZE)?;
    scratch.memory.advise_huge()?;
    for page in [0, 2 * MIB / PAGE_SIZE] {
        scratch.store(page)?;
    }
    let (start, len) = (scratch.memory.address(), scratch.memory.len());
    let mapped = scratch.pagemap.huge_bytes(start, start + len)?;
    if mapped == 0 {
        return Err(Failure::NotHere("no huge page was given".to_owned()));
    }
    scratch.arm()?;
    scratch.store(7)?;
    scratch.expect_scan(&[7], "a store to an armed huge page")?;
    Ok(format!(
        "{} MiB of huge pages split by arming",
        mapped / MIB
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::or_skip;

    #[test]
    fn this_kernel_behaves_as_tracking_needs_it() {
        let found = Behaviour::find_out();
        assert_eq!(found.findings().len(), QUESTIONS.len());
        if let Some(reason) = found.untried() {
            let refused = Err(SysError::os("userfaultfd", libc::EPERM));
            or_skip::<()>(reason, refused);
            return;
        }
        for finding in found.findings().iter().filter(|finding| finding.needed) {
            assert!(matches!(finding.answer, Answer::Holds(_)), "{finding:?}");
        }
        assert_eq!(found.allows_tracking(), Ok(()));
        assert!(found.to_string().starts_with("holds: holes, empty-entries"));
    }

    #[test]
    fn what_is_denied_refuses_and_what_cannot_be_tried_does_not() {
        let well = Behaviour::made_up(None);
        let denied = Answer::Denied("lost a page".to_owned());
        let advice = well.clone().with("scan-huge-pages", denied.clone());
        assert_eq!(advice.allows_tracking(), Ok(()), "nothing relies on it");
        let without = well.clone().with("scan-max-pages", denied);
        let refused = without.allows_tracking().expect_err("denied");
        assert_eq!(refused.name, "scan-max-pages");
        let text = refused.to_string();
        assert!(
            text.contains("lost a page") && text.contains("doctor"),
            "{text}"
        );
        assert!(without.to_string().contains("denied: max-pages"));
        let unknown = Behaviour::made_up(Some("userfaultfd failed"));
        assert_eq!(unknown.allows_tracking(), Ok(()));
        assert_eq!(unknown.to_string(), "not tried: userfaultfd failed");
    }
}
