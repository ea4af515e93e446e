//! Reads the source tree and holds the rules that the compiler does not know:
//! which room may import which, how long files and functions may be, where
//! `unsafe` may stand, and that each `SYNC` label has both of its ends.
//!
//! The scan works on tokens: comments and string literals are taken out first, so
//! that a rule's name in a sentence is not a breach of it. [`self_test`] feeds one
//! small offence per rule and demands that each is found.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const MAX_FILE_LINES: usize = 800;
const MAX_FN_LINES: usize = 70;
const DRAWERS: [&str; 4] = ["util", "common", "helpers", "types"];
const UNSAFE_ROOMS: [&str; 3] = ["sys", "shm", "ffi"];
/// Rooms whose code is values: no socket, clock or thread of their own.
const PURE_ROOMS: [&str; 6] = ["wire", "replicate", "duplex", "ordered", "space", "nbd"];
const BASE: [&str; 5] = ["units", "limits", "bitmap", "checksum", "words"];

/// The rooms that `room` may import besides the base and itself, or none if the
/// table does not know it. Only what stands below it: siblings are no exception.
fn below(room: &str) -> Option<&'static [&'static str]> {
    Some(match room {
        "sys" | "wire" | "manual" | "ordered" | "nbd" => &[],
        "shm" => &["sys"],
        "region" | "track" | "zerobuffer" => &["shm", "sys"],
        "replicate" | "duplex" => &["region", "track", "wire", "shm", "sys"],
        "space" => &["replicate", "region", "track", "wire", "shm", "sys"],
        "engine" => &[
            "ordered",
            "space",
            "nbd",
            "replicate",
            "region",
            "track",
            "wire",
            "shm",
            "sys",
        ],
        "node" => &[
            "client",
            "engine",
            "space",
            "nbd",
            "duplex",
            "ordered",
            "replicate",
            "zerobuffer",
            "region",
            "track",
            "wire",
            "shm",
            "sys",
        ],
        "client" => &[
            "engine",
            "space",
            "nbd",
            "duplex",
            "ordered",
            "replicate",
            "zerobuffer",
            "region",
            "track",
            "wire",
            "shm",
            "sys",
        ],
        "cli" => &[
            "node",
            "client",
            "engine",
            "space",
            "nbd",
            "duplex",
            "ordered",
            "replicate",
            "zerobuffer",
            "region",
            "track",
            "wire",
            "shm",
            "sys",
        ],
        _ if BASE.contains(&room) => &[],
        _ => return None,
    })
}

/// A word, a number or a piece of punctuation (`::` is one piece), with its line.
#[derive(Clone, Copy, Debug)]
struct Token<'a> {
    text: &'a str,
    line: usize,
}

/// The tokens of `source` without comments, literals of text and lifetimes' ticks.
fn tokens(source: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while let Some(first) = source[at..].chars().next() {
        let rest = &source[at..];
        let skipped = skipped_len(rest);
        let len = if skipped > 0 {
            skipped
        } else if first == '_' || first.is_alphanumeric() {
            let word = rest
                .find(|c: char| c != '_' && !c.is_alphanumeric())
                .unwrap_or(rest.len());
            let text = &rest[..word];
            found.push(Token { text, line });
            word
        } else if rest.starts_with("::") {
            let text = &rest[..2];
            found.push(Token { text, line });
            2
        } else {
            let len = first.len_utf8();
            if !first.is_whitespace() {
                let text = &rest[..len];
                found.push(Token { text, line });
            }
            len
        };
        line += source[at..at + len].matches('\n').count();
        at += len;
    }
    found
}

/// Length of the comment or literal that `rest` begins with, 0 if it is neither.
fn skipped_len(rest: &str) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment_len(rest);
    }
    let unprefixed = rest.trim_start_matches(['b', 'c']);
    let prefix = rest.len() - unprefixed.len();
    if prefix <= 1 {
        if let Some(raw) = unprefixed.strip_prefix('r') {
            let hashes = raw.len() - raw.trim_start_matches('#').len();
            if raw[hashes..].starts_with('"') {
                let close = format!("\"{}", "#".repeat(hashes));
                let body = &raw[hashes + 1..];
                let end = body.find(&close).map_or(body.len(), |n| n + close.len());
                return prefix + 1 + hashes + 1 + end;
            }
        }
        if unprefixed.starts_with('"') {
            return prefix + quoted_len(unprefixed, '"');
        }
    }
    if rest.starts_with('\'') || rest.starts_with("b'") {
        let tick = rest.find('\'').unwrap_or(0);
        let mut inside = rest[tick + 1..].chars();
        let (first, second) = (inside.next(), inside.next());
        return match (first, second) {
            (Some('\\'), _) | (_, Some('\'')) => tick + quoted_len(&rest[tick..], '\''),
            _ => tick + 1,
        };
    }
    0
}

fn block_comment_len(rest: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

fn quoted_len(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The room a file of `src/` lies in: its folder, or its own name at the top.
fn room_of(path: &str) -> Option<&str> {
    let inside = path.strip_prefix("src/")?;
    match inside.split_once('/') {
        Some((room, _)) => Some(room),
        None => match inside.strip_suffix(".rs")? {
            "lib" | "main" => None,
            room => Some(room),
        },
    }
}

/// The names that stand directly under `crate::`, groups in braces taken apart.
fn imports<'a>(tokens: &[Token<'a>]) -> Vec<Token<'a>> {
    let mut found = Vec::new();
    for at in 0..tokens.len().saturating_sub(2) {
        if tokens[at].text != "crate" || tokens[at + 1].text != "::" {
            continue;
        }
        if tokens[at + 2].text != "{" {
            let is_macro = tokens.get(at + 3).is_some_and(|next| next.text == "!");
            if !is_macro {
                found.push(tokens[at + 2]);
            }
            continue;
        }
        let (mut depth, mut begins) = (0, true);
        for token in &tokens[at + 2..] {
            match token.text {
                "{" => depth += 1,
                "}" => depth -= 1,
                "," if depth == 1 => begins = true,
                _ if depth == 1 && begins => {
                    found.push(*token);
                    begins = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

fn check_layers(path: &str, tokens: &[Token<'_>], out: &mut Vec<String>) {
    let Some(room) = room_of(path) else { return };
    let Some(allowed) = below(room) else {
        out.push(format!("{path}: room `{room}` is not in the layer table"));
        return;
    };
    for name in imports(tokens) {
        let known = name.text == room || BASE.contains(&name.text) || allowed.contains(&name.text);
        if !known {
            out.push(format!(
                "{path}:{}: room `{room}` may not import `crate::{}`",
                name.line, name.text
            ));
        }
    }
    // How many `super` lead to the crate's root from the file's own top level.
    let mut depth = path.matches('/').count() - usize::from(path.ends_with("mod.rs"));
    let mut chain = 0;
    for (at, token) in tokens.iter().enumerate() {
        let next = |n: usize| tokens.get(at + n).map_or("", |next| next.text);
        match token.text {
            "mod" if next(2) == "{" => depth += 1,
            "super" => chain += 1,
            "::" if chain > 0 => {}
            _ => chain = 0,
        }
        if chain >= depth && token.text == "super" && next(1) == "::" {
            out.push(format!(
                "{path}:{}: leaves the room by `super`; write `crate::`",
                token.line
            ));
        }
    }
}

fn check_lengths(path: &str, source: &str, tokens: &[Token<'_>], out: &mut Vec<String>) {
    let lines = source.lines().count();
    if lines > MAX_FILE_LINES {
        out.push(format!(
            "{path}: {lines} lines, at most {MAX_FILE_LINES} are allowed"
        ));
    }
    for at in 0..tokens.len() {
        let named = |token: &Token<'_>| {
            token
                .text
                .starts_with(|c: char| c == '_' || c.is_alphabetic())
        };
        if tokens[at].text != "fn" || !tokens.get(at + 1).is_some_and(named) {
            continue;
        }
        let Some(last) = body_end(&tokens[at..]) else {
            continue;
        };
        let lines = last.line - tokens[at].line + 1;
        if lines > MAX_FN_LINES {
            out.push(format!(
                "{path}:{}: fn {} has {lines} lines, at most {MAX_FN_LINES} are allowed",
                tokens[at].line,
                tokens[at + 1].text
            ));
        }
    }
}

/// The brace that closes the body of the function that `tokens` begin with; none
/// for a declaration without a body.
fn body_end<'a>(tokens: &[Token<'a>]) -> Option<Token<'a>> {
    let (mut round, mut curly) = (0i32, 0i32);
    for token in tokens {
        match token.text {
            "(" | "[" => round += 1,
            ")" | "]" => round -= 1,
            ";" if round == 0 && curly == 0 => return None,
            "{" => curly += 1,
            "}" => {
                curly -= 1;
                if curly == 0 {
                    return Some(*token);
                }
            }
            _ => {}
        }
    }
    None
}

fn check_words(path: &str, source: &str, tokens: &[Token<'_>], out: &mut Vec<String>) {
    let in_unsafe_room = room_of(path).is_some_and(|room| UNSAFE_ROOMS.contains(&room));
    // Benches time the bare kernel and the -sys crate spells its structures out.
    let outside = path.starts_with("bench/") || path.starts_with("tools/");
    for (at, token) in tokens.iter().enumerate() {
        let next = tokens.get(at + 1).map_or("", |next| next.text);
        let line = token.line;
        match token.text {
            "unsafe" if !in_unsafe_room && !outside => {
                out.push(format!("{path}:{line}: `unsafe` outside sys/, shm/, ffi/"));
            }
            "todo" | "unimplemented" if next == "!" => {
                out.push(format!("{path}:{line}: `{}!`", token.text));
            }
            "ignore" if at > 0 && tokens[at - 1].text == "[" => {
                out.push(format!("{path}:{line}: an ignored test"));
            }
            "allow" | "expect" if at > 0 && tokens[at - 1].text == "[" && next == "(" => {
                let inside = tokens[at..].iter().take_while(|t| t.text != "]");
                if !inside.into_iter().any(|t| t.text == "reason") {
                    out.push(format!("{path}:{line}: `{}` without a reason", token.text));
                }
            }
            _ => {}
        }
    }
    let stem = Path::new(path).file_stem().and_then(|stem| stem.to_str());
    let folders = path.split('/').rev().skip(1);
    if folders.chain(stem).any(|name| DRAWERS.contains(&name)) {
        out.push(format!("{path}: a drawer, not a name"));
    }
    if path.starts_with("src/") && path != "src/main.rs" && !source.starts_with("//!") {
        out.push(format!("{path}: does not begin with its module doc"));
    }
}

/// Protocols are values: outside their tests they name no clock, socket or thread.
fn check_purity(path: &str, tokens: &[Token<'_>], out: &mut Vec<String>) {
    let in_tests = path.ends_with("/tests.rs");
    if in_tests || !room_of(path).is_some_and(|room| PURE_ROOMS.contains(&room)) {
        return;
    }
    for window in tokens.windows(3) {
        let [first, middle, last] = window else {
            continue;
        };
        let text = [first.text, middle.text, last.text];
        if text == ["cfg", "(", "test"] {
            return;
        }
        let impure = matches!(
            text,
            ["Instant" | "SystemTime", "::", "now"]
                | ["std", "::", "thread" | "net" | "fs"]
                | ["thread", "::", "spawn" | "sleep"]
        );
        if impure {
            out.push(format!(
                "{path}:{}: `{}` in a room of values",
                first.line,
                text.concat()
            ));
        }
    }
}

/// Adds the `SYNC(label)`s of `source` to `labels`, with the places they stand at.
fn sync_labels(path: &str, source: &str, labels: &mut BTreeMap<String, Vec<String>>) {
    for (number, line) in source.lines().enumerate() {
        for part in line.split("SYNC(").skip(1) {
            let Some((label, _)) = part.split_once(')') else {
                continue;
            };
            let place = format!("{path}:{}", number + 1);
            labels.entry(label.to_owned()).or_default().push(place);
        }
    }
}

fn check_sync(labels: &BTreeMap<String, Vec<String>>, out: &mut Vec<String>) {
    for (label, places) in labels {
        if places.len() < 2 {
            out.push(format!(
                "{}: SYNC({label}) has no other end in the tree",
                places[0]
            ));
        }
    }
}

/// All that is wrong with one file on its own.
fn findings(path: &str, source: &str) -> Vec<String> {
    let mut out = Vec::new();
    let tokens = tokens(source);
    check_layers(path, &tokens, &mut out);
    check_lengths(path, source, &tokens, &mut out);
    check_words(path, source, &tokens, &mut out);
    check_purity(path, &tokens, &mut out);
    out
}

fn rust_files(folder: &Path, root: &Path, out: &mut Vec<(String, String)>) {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("reading {}: {error}", folder.display()))
        .map(|entry| entry.expect("a readable folder entry").path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                rust_files(&path, root, out);
            }
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            let name = path.strip_prefix(root).expect("a path inside the tree");
            let text = fs::read_to_string(&path).expect("a readable source file");
            out.push((name.to_string_lossy().into_owned(), text));
        }
    }
}

#[test]
fn the_tree_keeps_the_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests", "bench", "tools"] {
        if root.join(folder).is_dir() {
            rust_files(&root.join(folder), root, &mut files);
        }
    }
    assert!(files.iter().any(|(path, _)| path == "src/lib.rs"));
    let (mut out, mut labels) = (Vec::new(), BTreeMap::new());
    for (path, source) in &files {
        out.extend(findings(path, source));
        if path != "tests/tidy.rs" {
            sync_labels(path, source, &mut labels);
        }
    }
    check_sync(&labels, &mut out);
    assert!(out.is_empty(), "\n{}\n", out.join("\n"));
}

/// One offence per rule; each has to be found, and by the rule it breaks.
#[test]
fn self_test() {
    let doc = |body: &str| format!("//! Doc.\n{body}\n");
    let long_fn = format!("fn long() {{\n{}}}", "    let _ = 1;\n".repeat(70));
    let bad: [(&str, String, &str); 19] = [
        ("src/sys/a.rs", doc("use crate::shm::X;"), "may not import"),
        ("src/units.rs", doc("use crate::sys::X;"), "may not import"),
        ("src/wire/a.rs", doc("use crate::shm::X;"), "may not import"),
        (
            "src/track/a.rs",
            doc("use crate::region::X;"),
            "may not import",
        ),
        (
            "src/track/a.rs",
            doc("use crate::{units::A, sys::{B, C}, engine::D};"),
            "crate::engine",
        ),
        ("src/client/a.rs", doc("use crate::node;"), "crate::node"),
        (
            "src/region/a.rs",
            doc("fn f() { crate::engine::run() }"),
            "may not import",
        ),
        (
            "src/shm/a.rs",
            doc("use super::super::engine::X;"),
            "leaves the room",
        ),
        ("src/attic/a.rs", doc(""), "not in the layer table"),
        ("src/sys/a.rs", doc(&long_fn), "fn long has"),
        (
            "src/sys/a.rs",
            doc(&"// line\n".repeat(800)),
            "lines, at most 800",
        ),
        (
            "src/track/a.rs",
            doc("fn f() { unsafe { g() } }"),
            "`unsafe`",
        ),
        ("tests/a.rs", doc("fn f() { unsafe { g() } }"), "`unsafe`"),
        ("src/cli/a.rs", doc("fn f() { todo!() }"), "todo!"),
        (
            "tests/a.rs",
            doc("#[test] #[ignore] fn f() {}"),
            "ignored test",
        ),
        (
            "src/cli/a.rs",
            doc("#[allow(dead_code)] fn f() {}"),
            "without a reason",
        ),
        ("src/cli/helpers.rs", doc(""), "a drawer"),
        ("src/cli/a.rs", "fn f() {}".to_owned(), "module doc"),
        (
            "src/wire/a.rs",
            doc("fn f() { Instant::now(); }"),
            "room of values",
        ),
    ];
    for (path, source, expected) in &bad {
        let found = findings(path, source);
        assert!(
            found.iter().any(|finding| finding.contains(expected)),
            "{path} {source:?}: expected `{expected}`, found {found:?}"
        );
    }
}

#[test]
fn what_is_allowed_is_not_flagged() {
    let good = [
        (
            "src/shm/a.rs",
            "//! unsafe todo!()\nuse crate::sys::{self, map::Mapping};\n// SAFETY: unsafe\nfn f() { unsafe { g() } }\n",
        ),
        (
            "src/cli/a.rs",
            "//! D.\nconst A: &str = \"unsafe \\\" todo!()\"; const B: &str = r#\"unsafe \" todo!()\"#;\n/* unsafe /* todo!() */ */ fn f<'a>(c: &'a str) -> char { '\\'' }\n",
        ),
        (
            "src/track/a.rs",
            "//! D.\n#[allow(dead_code, reason = \"read by the layout test\")]\nstruct A;\npub(crate) fn f() { crate::mark_field_changed!(a) }\n",
        ),
        (
            "src/engine/a/b.rs",
            "//! D.\nmod tests { use super::super::Loop; }\n",
        ),
        (
            "src/replicate/a.rs",
            "//! D.\nfn f(now: Instant) {}\n#[cfg(test)]\nmod tests { fn g() { Instant::now(); } }\n",
        ),
        ("bench/a.rs", "fn main() { unsafe { mmap() } }"),
    ];
    for (path, source) in good {
        assert_eq!(findings(path, source), Vec::<String>::new(), "{path}");
    }
}

#[test]
fn a_sync_label_needs_both_ends() {
    let (mut labels, mut out) = (BTreeMap::new(), Vec::new());
    sync_labels("a.rs", "// SYNC(ready): publishes\n", &mut labels);
    check_sync(&labels, &mut out);
    assert_eq!(out.len(), 1, "one end alone is found");
    sync_labels("b.rs", "// SYNC(ready): sees it\n", &mut labels);
    out.clear();
    check_sync(&labels, &mut out);
    assert!(out.is_empty(), "{out:?}");
}
