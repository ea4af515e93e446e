//! Metadata contexts: what block status can be asked for.
//!
//! | name | tells |
//! |---|---|
//! | `base:allocation` | holes |
//! | `x-uffd:dirty-N`, `x-uffd:dirty-N-GENERATION` | what was changed since epoch N |
//! | `qemu:dirty-bitmap:dirty-N`, and with a generation | the same, where QEMU looks for it |
//!
//! - I1: an epoch that has not been is no context: nothing could be said of it. One of
//!   another generation is one in which all is changed.

use super::backing::Since;
use super::export::Export;
use crate::limits::MAX_NBD_CONTEXTS;

const ALLOCATION: &str = "base:allocation";
/// What stands in front of the epoch.
const DIRTY: [&str; 2] = ["x-uffd:dirty-", "qemu:dirty-bitmap:dirty-"];

/// One context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Context {
    Allocation,
    /// Since when, under which name.
    Changed(Since, Box<str>),
}

impl Context {
    /// What it is called; as its client called it.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Allocation => ALLOCATION,
            Self::Changed(_, name) => name,
        }
    }

    /// The one of this name, if the export has it.
    fn named(export: &Export, name: &[u8]) -> Option<Self> {
        let name = std::str::from_utf8(name).ok()?;
        if name == ALLOCATION {
            return Some(Self::Allocation);
        }
        let newest = export.newest?;
        let rest = DIRTY.iter().find_map(|prefix| name.strip_prefix(prefix))?;
        let (epoch, generation) = match rest.split_once('-') {
            Some((epoch, generation)) => (epoch, generation_of(generation)?),
            None => (rest, newest.generation),
        };
        let is_number = epoch.bytes().all(|byte| byte.is_ascii_digit());
        let epoch = epoch.parse().ok().filter(|_| is_number)?;
        let since = Since { epoch, generation };
        if generation == newest.generation && epoch > newest.epoch {
            return None;
        }
        Some(Self::Changed(since, name.into()))
    }
}

/// 32 hexadecimal digits, as generations are shown.
fn generation_of(text: &str) -> Option<u128> {
    let is_hex = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    u128::from_str_radix(text, 16).ok().filter(|_| is_hex)
}

/// What a client chooses by exact names; others are passed over.
pub(super) fn chosen(export: &Export, queries: &[&[u8]]) -> Vec<Context> {
    let mut found: Vec<Context> = Vec::new();
    for query in queries {
        if let Some(context) = Context::named(export, query)
            && !found.contains(&context)
            && (found.len() as u64) < MAX_NBD_CONTEXTS
        {
            found.push(context);
        }
    }
    found
}

/// What there is, of epochs the newest; by exact names, by the names of a kind (what ends
/// with a colon), or all without any query.
pub(super) fn listed(export: &Export, queries: &[&[u8]]) -> Vec<Context> {
    let newest = export.newest.iter().flat_map(|since| {
        let called = |prefix| format!("{prefix}{}-{:032x}", since.epoch, since.generation);
        DIRTY.map(|prefix| Context::Changed(*since, called(prefix).into()))
    });
    let all = std::iter::once(Context::Allocation).chain(newest);
    let is_asked = |context: &Context| {
        let of_kind =
            |query: &&[u8]| query.ends_with(b":") && context.name().as_bytes().starts_with(query);
        queries.is_empty() || queries.iter().any(of_kind)
    };
    let mut found: Vec<Context> = all.filter(is_asked).collect();
    for context in chosen(export, queries) {
        if !found.contains(&context) {
            found.push(context);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENERATION: u128 = 0xabc;

    fn export(newest: Option<u64>) -> Export {
        let generation = GENERATION;
        Export {
            name: "e".into(),
            description: "".into(),
            base: 0,
            size: 1,
            segment: 1,
            read_only: true,
            newest: newest.map(|epoch| Since { epoch, generation }),
        }
    }

    fn since(export: &Export, name: &str) -> Option<Since> {
        match Context::named(export, name.as_bytes())? {
            Context::Changed(since, same) => {
                assert_eq!(&*same, name);
                Some(since)
            }
            Context::Allocation => None,
        }
    }

    #[test]
    fn epochs_have_a_life_and_have_been() {
        let export = export(Some(7));
        let of = |epoch, generation| Some(Since { epoch, generation });
        for prefix in DIRTY {
            let named = |rest: &str| since(&export, &format!("{prefix}{rest}"));
            assert_eq!(named("0"), of(0, GENERATION));
            assert_eq!(named("7"), of(7, GENERATION));
            assert_eq!(named("8"), None, "it has not been");
            assert_eq!(named(&format!("7-{GENERATION:032x}")), of(7, GENERATION));
            assert_eq!(named(&format!("8-{GENERATION:032x}")), None);
            assert_eq!(named(&format!("8-{:032x}", 5)), of(8, 5), "of another life");
            for wrong in [
                "",
                "-",
                "+1",
                "1-",
                "1-2",
                "x",
                "1 ",
                "99999999999999999999",
            ] {
                assert_eq!(named(wrong), None, "{wrong}");
            }
        }
        assert_eq!(since(&self::export(None), "x-uffd:dirty-0"), None);
    }

    #[test]
    fn lists_and_choices() {
        let export = export(Some(3));
        let names = |found: Vec<Context>| -> Vec<String> {
            found.iter().map(|one| one.name().to_owned()).collect()
        };
        let newest = |prefix: &str| format!("{prefix}3-{GENERATION:032x}");
        let [x, qemu] = DIRTY.map(newest);
        let all = vec![ALLOCATION.to_owned(), x.clone(), qemu.clone()];
        assert_eq!(names(listed(&export, &[])), all);
        assert_eq!(names(listed(&export, &[b"qemu:"])), [&*qemu]);
        assert_eq!(names(listed(&export, &[b"x-uffd:", x.as_bytes()])), [&*x]);
        let old: &[u8] = b"x-uffd:dirty-1";
        assert_eq!(
            names(listed(&export, &[b"base:", old])),
            [ALLOCATION, "x-uffd:dirty-1"]
        );
        assert_eq!(
            names(chosen(&export, &[b"x-uffd:", b"base:allocation", old])).len(),
            2
        );
        let many: Vec<String> = (0..4)
            .cycle()
            .take(64)
            .enumerate()
            .map(|(at, epoch)| format!("x-uffd:dirty-{}{epoch}", "0".repeat(at)))
            .collect();
        let many: Vec<&[u8]> = many.iter().map(|name| name.as_bytes()).collect();
        assert_eq!(chosen(&export, &many).len() as u64, MAX_NBD_CONTEXTS);
    }
}
