//! The file of an address space as a shell checks and shows it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const FILE: &str = r#"
segment_size = "1MiB"
servers = [
    { name = "a", address = "127.0.0.1:7421" },
    { name = "b", address = "127.0.0.1:7422" },
    { name = "c", address = "127.0.0.1:7423" },
]
"#;

/// Runs `space LINE --config FILE`; these commands connect to nothing and end at once.
fn space(line: &str, file: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_uffd-sync"))
        .arg("space")
        .args(line.split(' '))
        .arg("--config")
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .expect("the command runs")
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn a_range_over_three_servers_is_shown_in_its_parts() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("mcomp.cfg");
    fs::write(&file, FILE).expect("written");
    let whole = json(&space("map --json", &file));
    assert_eq!(whole["size"], 3 << 20);
    assert_eq!(whole["parts"].as_array().expect("parts").len(), 3);

    let shown = json(&space("map --offset 1048575 --len 1048578 --json", &file));
    let parts = shown["parts"].as_array().expect("parts");
    let seen: Vec<_> = parts
        .iter()
        .map(|part| {
            let number = |key: &str| part[key].as_u64().expect("a number");
            let server = part["server"].as_str().expect("a name");
            (
                server,
                number("first"),
                number("end"),
                number("segment_offset"),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("a", 0xF_FFFF, 0x10_0000, 0xF_FFFF),
            ("b", 0x10_0000, 0x20_0000, 0),
            ("c", 0x20_0000, 0x20_0001, 0)
        ]
    );

    let beyond = space("map --offset 3145727 --len 2", &file);
    assert_eq!(beyond.status.code(), Some(2));
    let said = String::from_utf8_lossy(&beyond.stderr).into_owned();
    assert!(said.contains("beyond the end at 3145728"), "{said}");
}

#[test]
fn machines_compare_the_map_and_not_the_comments() {
    let folder = tempfile::tempdir().expect("a folder");
    let digest = |name: &str, text: &str| {
        let file = folder.path().join(name);
        fs::write(&file, text).expect("written");
        json(&space("check --json", &file))["digest"].clone()
    };
    let first = digest("a.cfg", FILE);
    let comment = FILE.replace("\"1MiB\"", "1048576 # a mebibyte");
    assert_eq!(digest("b.cfg", &comment), first);
    assert_ne!(digest("c.cfg", &FILE.replace("7423", "7424")), first);
}

#[test]
fn a_wrong_file_is_named_with_line_and_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("mcomp.cfg");
    for (text, says) in [
        (
            FILE.replace("1MiB", "0"),
            "mcomp.cfg:2: key `segment_size`: 0 bytes",
        ),
        (
            FILE.replace("\"c\"", "\"a\""),
            "mcomp.cfg:6: key `servers`: servers 0 and 2",
        ),
        (
            FILE.replace("7423", "7422"),
            "both have the address 127.0.0.1:7422",
        ),
        (format!("{FILE}[snapshots]\n"), "unknown field `snapshots`"),
    ] {
        fs::write(&file, text).expect("written");
        for line in ["check", "map"] {
            let output = space(line, &file);
            assert_eq!(output.status.code(), Some(2), "{output:?}");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains(says), "{said}");
            assert!(output.stdout.is_empty());
        }
    }
    let missing = space("check", &folder.path().join("none.cfg"));
    assert_eq!(missing.status.code(), Some(2));
}
