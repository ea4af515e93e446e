//! Channels from a shell: each operation, reports, refusals and their exit codes,
//! signals.

use std::process::Stdio;

use nix::sys::signal::Signal;

use super::channels::{ChannelServer, channel_command, channel_run, socket_of, to_its_end};
use super::nodes::{await_that, folder};

/// An image with edges in it, as a binary PPM file.
fn image(width: usize, height: usize) -> Vec<u8> {
    let mut file = format!("P6 {width} {height} 255\n").into_bytes();
    for y in 0..height {
        for x in 0..width {
            let inside = (x / 16 + y / 16) % 2 == 0;
            file.extend([if inside { 255 } else { 0 }, x as u8, y as u8]);
        }
    }
    file
}

/// The Gaussian blur of `sigma` by its definition, edges continued; one channel at a time.
fn blurred(file: &[u8], width: usize, height: usize, sigma: f64) -> Vec<u8> {
    let header = file.len() - width * height * 3;
    let radius = (3.0 * sigma).ceil() as i64;
    let bell: Vec<f64> = (-radius..=radius)
        .map(|x| (-((x * x) as f64) / (2.0 * sigma * sigma)).exp())
        .collect();
    let total: f64 = bell.iter().sum();
    let mut out = file.to_vec();
    for color in 0..3 {
        let at = |x: i64, y: i64| {
            let x = x.clamp(0, width as i64 - 1) as usize;
            let y = y.clamp(0, height as i64 - 1) as usize;
            f64::from(file[header + (y * width + x) * 3 + color])
        };
        for y in 0..height as i64 {
            for x in 0..width as i64 {
                let mut sum = 0.0;
                for (dy, down) in (-radius..=radius).zip(&bell) {
                    for (dx, across) in (-radius..=radius).zip(&bell) {
                        sum += down * across * at(x + dx, y + dy);
                    }
                }
                let place = header + (y as usize * width + x as usize) * 3 + color;
                out[place] = (sum / (total * total)).round() as u8;
            }
        }
    }
    out
}

#[test]
fn an_image_is_blurred_in_place_from_file_to_file() {
    let folder = folder();
    let _server = ChannelServer::start(folder.path(), "img", "--op blur");
    let (photo, out) = (
        folder.path().join("photo.ppm"),
        folder.path().join("out.ppm"),
    );
    let (width, height) = (64, 48);
    let file = image(width, height);
    std::fs::write(&photo, &file).expect("a file");
    let line = format!("--file {} --out {}", photo.display(), out.display());
    let ended = channel_run(folder.path(), "call", "img", &line, b"");
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let found = std::fs::read(&out).expect("the image");
    let expected = blurred(&file, width, height, 2.0);
    assert_eq!(found.len(), expected.len());
    let worst = found
        .iter()
        .zip(&expected)
        .map(|(a, b)| a.abs_diff(*b))
        .max();
    assert!(worst <= Some(1), "{worst:?}");
    assert_ne!(found, file, "it is another image");

    for (bytes, says) in [(&b"GIF89a"[..], "P6"), (b"P6 9 9 255 .", "last pixel")] {
        std::fs::write(&photo, bytes).expect("a file");
        let ended = channel_run(folder.path(), "call", "img", &line, b"");
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains(says), "{ended:?}");
        assert_eq!(std::fs::read(&out).expect("the image"), found, "unchanged");
    }
}

#[test]
fn each_operation_does_what_it_says() {
    let folder = folder();
    let long: Vec<u8> = (0..300_000u32).map(|i| (i * 7) as u8).collect();
    for (op, change) in [
        ("echo", (|b| b) as fn(u8) -> u8),
        ("xor", |b| b ^ 0x5A),
        ("upper", |b| b.to_ascii_uppercase()),
    ] {
        for flags in ["", "--workers 3 --wait park", "--wait spin"] {
            let line = format!("--op {op} --payload 1MiB {flags}");
            let _server = ChannelServer::start(folder.path(), op, &line);
            for input in [&b""[..], b"Hello", &long] {
                let ended = channel_run(folder.path(), "call", op, "", input);
                assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
                let expected: Vec<u8> = input.iter().map(|b| change(*b)).collect();
                assert!(ended.stdout == expected, "{line}: {} bytes", input.len());
            }
            let ended = channel_run(folder.path(), "call", op, "--count 100 --json", b"ab");
            let report = ended.json();
            assert_eq!(
                (&report["calls"], &report["bytes"]),
                (&100.into(), &2.into())
            );
            let expected: String = b"ab".map(|b| format!("{:02x}", change(b))).concat();
            assert_eq!(report["hex"], expected.as_str());
        }
    }
}

#[test]
fn a_bench_verifies_and_reports_percentiles() {
    let folder = folder();
    let _server = ChannelServer::start(folder.path(), "loud", "--op upper");
    for flags in ["", "--bytes 100KiB", "--depth 8", "--wait park --bytes 0"] {
        let line = format!("--seconds 1 --json {flags}");
        let report = channel_run(folder.path(), "bench", "loud", &line, b"").json();
        assert_eq!(report["operation"], "upper", "{report}");
        let at = |name: &str| report["round_trip_us"][name].as_f64().expect(name);
        let order = ["p50", "p90", "p99", "p999", "max"].map(at);
        assert!(order[0] > 0.0 && order.is_sorted(), "{report}");
        assert!(report["calls"].as_u64() > Some(100), "{report}");
        assert_eq!(report["verified"], true, "{report}");
    }
    let text = channel_run(folder.path(), "bench", "loud", "--seconds 1", b"");
    let text = String::from_utf8(text.stdout).expect("text");
    assert!(text.contains("p99.9"), "{text}");

    let _server = ChannelServer::start(folder.path(), "img", "--op blur");
    let line = "--seconds 1 --json --bytes 10KiB";
    let report = channel_run(folder.path(), "bench", "img", line, b"").json();
    assert_eq!(report["verified"], true, "{report}");
}

#[test]
fn a_status_shows_the_server_and_its_clients() {
    let folder = folder();
    let server = ChannelServer::start(folder.path(), "a", "--op echo --clients 3 --workers 2");
    let status = || channel_run(folder.path(), "status", "a", "--json", b"").json();
    let alone = status();
    assert_eq!(alone["pid"], server.pid());
    assert_eq!(alone["kind"], "in-place");
    assert_eq!(
        (&alone["max_clients"], &alone["workers"]),
        (&3.into(), &2.into())
    );
    assert_eq!(alone["clients"], serde_json::json!([]));
    let mut bench = channel_command(folder.path(), "bench", "a")
        .args(["--seconds", "60"])
        .stdout(Stdio::null())
        .spawn()
        .expect("the command starts");
    await_that("a client that calls", || {
        let status = status();
        let client = &status["clients"][0];
        client["pid"] == bench.id() && client["responses"].as_u64() > Some(10)
    });
    let text = channel_run(folder.path(), "status", "a", "", b"");
    let text = String::from_utf8(text.stdout).expect("text");
    assert!(text.contains(&bench.id().to_string()), "{text}");
    bench.kill().expect("our child");
    bench.wait().expect("our child");
    await_that("the killed client's end", || {
        status()["clients"] == serde_json::json!([])
    });
}

#[test]
fn names_and_clients_are_refused_with_a_reason() {
    let folder = folder();
    let nobody = channel_run(folder.path(), "call", "a", "", b"x");
    assert_eq!(nobody.code, Some(1), "{nobody:?}");
    assert!(nobody.stderr.contains("channel serve a"), "{nobody:?}");

    let first = ChannelServer::start(folder.path(), "a", "--op upper");
    let taken = channel_run(folder.path(), "serve", "a", "--op echo", b"");
    assert_eq!(taken.code, Some(1), "{taken:?}");
    assert!(taken.stderr.contains("taken"), "{taken:?}");

    // A killed server's socket is a stale one, which the next replaces.
    first.kill();
    assert!(socket_of(folder.path(), "a").exists());
    let nobody = channel_run(folder.path(), "status", "a", "", b"");
    assert_eq!(nobody.code, Some(1), "{nobody:?}");
    let server = ChannelServer::start(folder.path(), "a", "--op upper");
    let ended = channel_run(folder.path(), "call", "a", "", b"x");
    assert_eq!(ended.stdout, b"X", "{ended:?}");

    // A stopped server is alive: its name stays taken, and a call ends at its deadline.
    server.signal(Signal::SIGSTOP);
    let taken = channel_run(folder.path(), "serve", "a", "--op echo", b"");
    assert_eq!(taken.code, Some(1), "{taken:?}");
    let late = channel_run(folder.path(), "call", "a", "--timeout 200ms", b"x");
    assert_eq!(late.code, Some(1), "{late:?}");
    assert!(late.stderr.contains("in time"), "{late:?}");
    server.signal(Signal::SIGCONT);
    let ended = channel_run(folder.path(), "call", "a", "", b"x");
    assert_eq!(ended.stdout, b"X", "{ended:?}");

    let mut bench = channel_command(folder.path(), "bench", "a")
        .args(["--seconds", "60"])
        .stdout(Stdio::null())
        .spawn()
        .expect("the command starts");
    await_that("the first client", || {
        let status = channel_run(folder.path(), "status", "a", "--json", b"").json();
        status["clients"][0]["pid"] == bench.id()
    });
    let second = channel_run(folder.path(), "call", "a", "", b"x");
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(
        second.stderr.contains("1 of at most 1 clients"),
        "{second:?}"
    );
    bench.kill().expect("our child");
    bench.wait().expect("our child");
}

#[test]
fn bad_input_is_refused_with_code_2() {
    let folder = folder();
    let _server = ChannelServer::start(folder.path(), "a", "--op echo --payload 4KiB");
    let long = channel_run(folder.path(), "call", "a", "", &[7; 5000]);
    assert_eq!(long.code, Some(2), "{long:?}");
    assert!(
        long.stderr.contains("5000") && long.stderr.contains("4032"),
        "{long:?}"
    );
    for (verb, name, line, says) in [
        ("call", "a/b", "", "a/b"),
        ("call", "a", "--file /nonexistent", "/nonexistent"),
        ("call", "a", "--count 0", "0"),
        ("call", "a", "--timeout 5", "500ms"),
        ("call", "a", "--out /nonexistent/x", "/nonexistent/x"),
        ("serve", "b", "", "--op"),
        ("serve", "b", "--op twirl", "twirl"),
        ("serve", "b", "--op echo --workers 0", "0"),
        ("serve", "b", "--op echo --clients 100000", "100000"),
        ("serve", "b", "--op echo --payload 5TiB", "payload"),
        ("serve", "b", "--op blur --sigma 0", "0"),
        ("bench", "a", "--depth 0", "0"),
        ("bench", "a", "--bytes 1MiB", "4032"),
    ] {
        let ended = channel_run(folder.path(), verb, name, line, b"");
        assert_eq!(ended.code, Some(2), "{verb} {line}: {ended:?}");
        assert!(ended.stderr.contains(says), "{verb} {line}: {ended:?}");
        assert_eq!(ended.stdout, b"", "{verb} {line}");
    }
    assert!(!socket_of(folder.path(), "b").exists(), "nothing was made");
}

#[test]
fn signals_end_a_server_in_order() {
    let folder = folder();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = ChannelServer::start(folder.path(), "a", "--op echo --clients 2");
        let bench = channel_command(folder.path(), "bench", "a")
            .args(["--seconds", "60"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        await_that("a client that calls", || {
            let status = channel_run(folder.path(), "status", "a", "--json", b"").json();
            status["clients"][0]["responses"].as_u64() > Some(10)
        });
        server.signal(signal);
        assert_eq!(server.ended().code(), Some(0), "{signal}");
        assert!(!socket_of(folder.path(), "a").exists(), "{signal}");
        let output = bench.wait_with_output().expect("our child");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("stopped"), "{stderr}");
    }
}

#[test]
fn the_folder_comes_from_flag_or_environment_and_is_made_where_it_is_the_default() {
    let folder = folder();
    let server = {
        let mut command = channel_command(folder.path(), "serve", "a");
        command.args(["--op", "upper"]);
        ChannelServer::from_command(command).expect("a server")
    };
    let mut command = std::process::Command::new(super::nodes::BINARY);
    command.args(["channel", "call", "a"]);
    command.env("UFFD_SYNC_CHANNELS", folder.path());
    assert_eq!(to_its_end(command, b"x").stdout, b"X");
    drop(server);
    let runtime = folder.path().join("run");
    std::fs::create_dir(&runtime).expect("a folder");
    let under_runtime = |verb: &str| {
        let mut command = std::process::Command::new(super::nodes::BINARY);
        command.args(["channel", verb, "a"]);
        command.env_remove("UFFD_SYNC_CHANNELS");
        command.env("XDG_RUNTIME_DIR", &runtime);
        command
    };
    let mut serve = under_runtime("serve");
    serve.args(["--op", "upper"]);
    let _server = ChannelServer::from_command(serve).expect("a server");
    assert!(runtime.join("uffd-sync/channels/a.sock").exists());
    assert_eq!(to_its_end(under_runtime("call"), b"x").stdout, b"X");
}
