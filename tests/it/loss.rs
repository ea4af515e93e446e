//! What makes tracking blind is noticed, told with its reason, and loses nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use nix::sys::signal::Signal;
use uffd_sync::units::MIB;
use uffd_sync::words::{LossKind, Mode, Publish};

use super::deeds::{Deed, pages};
use super::nodes::{NodeProcess, PATIENCE, await_content, await_that, run_on};
use super::watched::{REGION, Watched};
use super::writer::{More, Order, Report};

/// Kinds that a part which is no longer tracked shows by: the audit's, or a capture's
/// that comes first.
const BLIND: [LossKind; 2] = [LossKind::Untracked, LossKind::ScanError];

const RARE: More = More {
    rare: true,
    may_fork: false,
    mseal: false,
    exact: false,
    marks: false,
    cooperative: false,
};

fn watched(more: More) -> Watched {
    Watched::new(MIB, Mode::Async, Publish::Timer, more)
}

#[test]
fn an_unmapped_part_is_noticed_and_its_last_stores_are_shipped() {
    for more in [More::default(), RARE] {
        let mut watched = watched(more);
        watched.store(pages(10) + 7, b"just before");
        watched.deed(Deed::Unmap {
            offset: pages(10),
            len: pages(4),
        });
        let loss = watched.await_loss(&BLIND);
        assert!(!loss.reason.is_empty() && loss.at_ms > 0, "{loss:?}");
        watched.await_equal();
        let region = watched.region();
        assert_eq!(region.mode, Some(Mode::Async));
        assert_eq!(region.tracking, Some(Mode::Compare));
        assert_eq!((region.state.as_str(), loss.count), ("live", 1));
        // What is still mapped is followed on.
        watched.store(pages(30), b"afterwards");
        watched.writer.commit(0);
        watched.await_equal();
    }
}

#[test]
fn a_moved_part_is_noticed_and_followed_on() {
    let mut watched = watched(RARE);
    watched.deed(Deed::MoveAway {
        offset: pages(16),
        len: pages(8),
    });
    watched.deed(Deed::StoreMoved {
        offset: pages(2) + 1,
        byte: 0xA7,
    });
    watched.expect(pages(18) + 1, &[0xA7]);
    watched.await_loss(&[LossKind::Untracked]);
    watched.await_equal();
    watched.deed(Deed::StoreMoved {
        offset: 5,
        byte: 0xA8,
    });
    watched.expect(pages(16) + 5, &[0xA8]);
    watched.writer.commit(0);
    watched.await_equal();
}

#[test]
fn memory_mapped_over_a_part_is_noticed_and_is_not_the_region() {
    for more in [More::default(), RARE] {
        let mut watched = watched(more);
        watched.store(pages(20), b"under what comes");
        watched.deed(Deed::MapOver {
            offset: pages(20),
            len: pages(1),
            byte: 0xEE,
        });
        watched.await_loss(&BLIND);
        watched.await_equal();
        watched.store(pages(19), b"beside it");
        watched.writer.commit(0);
        watched.await_equal();
    }
}

#[test]
fn changed_access_and_dropped_entries_lose_nothing_and_are_no_loss() {
    changed_access_and_dropped_entries(Mode::Async);
    if super::exact::may_be_exact() {
        changed_access_and_dropped_entries(Mode::Sync);
    }
}

fn changed_access_and_dropped_entries(mode: Mode) {
    let mut watched = Watched::new(MIB, mode, Publish::Timer, More::default());
    let (offset, len) = (pages(40), pages(30));
    for round in 0..3u8 {
        watched.store(pages(41), &[round; 100]);
        watched.deed(Deed::SetWritable {
            offset,
            len,
            writable: false,
        });
        watched.store(pages(80), &[round + 100; 100]);
        watched.deed(Deed::SetWritable {
            offset,
            len,
            writable: true,
        });
        watched.store(pages(42), &[round + 10; 9000]);
        watched.deed(Deed::DropEntries { offset, len });
        watched.store(pages(43), &[round + 20; 10]);
        watched.await_equal();
    }
    let refused = watched.writer.deed(Deed::Punch { offset, len });
    assert!(refused.is_err_and(|error| error.contains("PermissionDenied")));
    watched.await_audit();
    watched.await_equal();
    watched.expect_no_loss();
}

#[test]
fn forks_do_not_inherit_the_region() {
    let mut watched = watched(More::default());
    for children in [1, 60] {
        let end = watched.deed(Deed::Fork {
            children,
            places: vec![pages(3)],
            byte: 9,
        });
        assert_eq!(end, format!("Signal({})", Signal::SIGSEGV as i32));
        watched.store(pages(3), &[children as u8; 20]);
    }
    let end = watched.deed(Deed::Fork {
        children: 100,
        places: vec![],
        byte: 0,
    });
    assert_eq!(end, "Exit(0)");
    watched.store(pages(4), b"after a storm");
    watched.await_equal();
    watched.await_audit();
    watched.expect_no_loss();
}

#[test]
fn what_an_inherited_mapping_stores_is_found_by_the_audit() {
    let more = More {
        may_fork: true,
        ..More::default()
    };
    let mut watched = watched(more);
    let places = vec![pages(3) + 5, pages(100)];
    let fork = Deed::Fork {
        children: 1,
        places,
        byte: 0x5A,
    };
    assert_eq!(watched.deed(fork), "Exit(0)");
    watched.expect(pages(3) + 5, &[0x5A]);
    watched.expect(pages(100), &[0x5A]);
    let loss = watched.await_loss(&[LossKind::UnseenWrite]);
    assert!(loss.reason.contains("not reported"), "{loss:?}");
    watched.await_equal();
    // Tracking goes on: what is seen is no loss.
    let losses = watched.region().losses;
    watched.store(pages(7), b"seen again");
    watched.await_equal();
    watched.await_audit();
    let region = watched.region();
    assert_eq!(region.tracking, Some(Mode::Async));
    let counts = |losses: &[uffd_sync::wire::control::LossStatus]| -> u64 {
        losses.iter().map(|loss| loss.count).sum()
    };
    assert!(counts(&region.losses) <= counts(&losses) + 1, "{region:?}");
}

#[test]
fn control_without_the_audit_an_unseen_store_is_never_shipped() {
    let more = More {
        may_fork: true,
        ..More::default()
    };
    let day = 86_400_000;
    let mut watched = Watched::audited(day, MIB, Mode::Async, Publish::Timer, more);
    let fork = Deed::Fork {
        children: 1,
        places: vec![pages(3)],
        byte: watched.model[pages(3) as usize] ^ 0xFF,
    };
    assert_eq!(watched.deed(fork), "Exit(0)");
    let before = watched.region().captures;
    watched.store(pages(5), b"seen");
    await_that("captures go on", || watched.region().captures > before + 50);
    // The replica is as it was there: stale, and nothing says so.
    watched.await_equal();
    watched.expect_no_loss();
}

#[test]
fn a_second_mapping_and_pwrite_are_refused_by_the_seals() {
    let mut watched = watched(More::default());
    for deed in [
        Deed::MapAgain {
            offset: pages(1),
            byte: 1,
        },
        Deed::WriteFile {
            offset: pages(1),
            byte: 1,
        },
    ] {
        let refused = watched.writer.deed(deed.clone());
        let refused = refused.expect_err("it is sealed");
        assert!(refused.contains("PermissionDenied"), "{deed:?}: {refused}");
    }
    watched.await_audit();
    watched.await_equal();
    watched.expect_no_loss();
}

#[test]
fn unregistering_behind_the_engines_back_is_an_alarm_within_seconds() {
    for publish in [Publish::Timer, Publish::Commit] {
        let mut watched = Watched::new(MIB, Mode::Async, publish, More::default());
        watched.deed(Deed::Unregister {
            offset: pages(64),
            len: pages(16),
        });
        watched.store(pages(70), b"nobody reports this");
        watched.await_loss(&BLIND);
        if publish == Publish::Commit {
            // Not before: a transaction may be open.
            watched.writer.commit(0);
        }
        watched.await_equal();
        assert!(watched.source.has_logged("tracking"), "the log tells it");
        watched.store(pages(71), b"nor this");
        watched.writer.commit(0);
        watched.await_equal();
    }
}

#[test]
fn a_writer_that_becomes_another_program_is_noticed() {
    becomes_another_program(Mode::Async);
    if super::exact::may_be_exact() {
        becomes_another_program(Mode::Sync);
    }
}

fn becomes_another_program(mode: Mode) {
    for keep in [false, true] {
        let mut watched = Watched::new(MIB, mode, Publish::Timer, RARE);
        watched.store(pages(9), b"the last words");
        watched.writer.send(&Order::Do(Deed::Exec { keep }));
        let kinds = [LossKind::WriterReplaced, LossKind::LinkEnded];
        let loss = watched.await_loss(&kinds);
        watched.await_equal();
        let region = watched.region();
        if keep {
            // Nothing but the memory's end tells it.
            assert_eq!(loss.kind, LossKind::WriterReplaced);
            assert_eq!(region.tracking, Some(Mode::Compare));
        } else {
            assert_eq!(region.state, "orphaned", "{loss:?}");
        }
    }
}

#[test]
fn what_goes_behind_the_engines_back_in_mode_sync_is_noticed_too() {
    let unmap = Deed::Unmap {
        offset: pages(64),
        len: pages(16),
    };
    let unregister = Deed::Unregister {
        offset: 0,
        len: MIB,
    };
    let fork = Deed::Fork {
        children: 1,
        places: vec![pages(3)],
        byte: 0x77,
    };
    let more = More {
        may_fork: true,
        ..More::default()
    };
    for deed in [unmap, unregister, fork] {
        let mut watched = Watched::new(MIB, Mode::Sync, Publish::Timer, more);
        watched.store(pages(65), b"just before");
        watched.await_equal();
        match &deed {
            // The engine alone has the descriptor in this mode.
            Deed::Unregister { .. } => {
                let refused = watched.writer.deed(deed.clone());
                assert!(refused.is_err_and(|error| error.contains("no userfaultfd")));
            }
            Deed::Fork { .. } => {
                assert_eq!(watched.deed(deed.clone()), "Exit(0)");
                watched.expect(pages(3), &[0x77]);
                watched.await_loss(&[LossKind::UnseenWrite]);
            }
            _ => drop(watched.deed(deed.clone())),
        }
        watched.store(pages(5), b"and after it");
        watched.await_equal();
    }
}

#[test]
fn a_writer_that_leaves_or_is_killed_in_the_middle_loses_nothing() {
    for by_itself in [true, false] {
        let mut watched = Watched::new(MIB, Mode::Async, Publish::Commit, More::default());
        // The first store of a transaction whose second never comes.
        watched.store(pages(50), b"half of it");
        if by_itself {
            watched.writer.send(&Order::Do(Deed::Leave));
        } else {
            watched.writer.signal(Signal::SIGKILL);
        }
        watched.await_loss(&[LossKind::WriterExited]);
        watched.await_equal();
        let region = watched.region();
        assert_eq!(
            (region.state.as_str(), region.writer_pid),
            ("orphaned", None)
        );
    }
}

#[test]
fn another_process_with_the_writers_number_is_not_the_writer() {
    let mut watched = watched(RARE);
    let number = watched.writer.pid();
    watched.store(pages(11), b"before its number went on");
    let Watched {
        writer,
        follower,
        source,
        model,
        folder,
        ..
    } = watched;
    writer.kill();
    let Some(mut other) = process_with_number(number) else {
        super::refused_calls::skip("a process number cannot be chosen here");
        return;
    };
    await_content(&follower, REGION, &model);
    let region = source.region(REGION).expect("the node keeps it");
    assert_eq!(
        (region.state.as_str(), region.writer_pid),
        ("orphaned", None)
    );
    let mut next = super::writer::WriterProcess::start();
    let resumed = next.create(source.socket(), REGION, MIB, Mode::Async, Publish::Timer);
    assert!(resumed, "the name is free for a successor");
    let _ = other.kill();
    let _ = other.wait();
    drop(folder);
}

/// A process that has the number `wanted`, which was used before.
fn process_with_number(wanted: u32) -> Option<std::process::Child> {
    for _ in 0..200 {
        let last = (wanted - 1).to_string();
        std::fs::write("/proc/sys/kernel/ns_last_pid", last).ok()?;
        let mut child = std::process::Command::new("sleep").arg("60").spawn().ok()?;
        if child.id() == wanted {
            return Some(child);
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    None
}

#[test]
fn a_sealed_mapping_cannot_be_taken_away() {
    let more = More {
        mseal: true,
        ..More::default()
    };
    let mut watched = watched(more);
    let (offset, len) = (pages(8), pages(8));
    for deed in [
        Deed::Unmap { offset, len },
        Deed::MoveAway { offset, len },
        Deed::MapOver {
            offset,
            len,
            byte: 1,
        },
        Deed::SetWritable {
            offset,
            len,
            writable: false,
        },
    ] {
        let refused = watched.writer.deed(deed.clone());
        let refused = refused.expect_err("it is sealed");
        assert!(refused.contains("PermissionDenied"), "{deed:?}: {refused}");
    }
    watched.store(pages(9), b"still tracked");
    watched.await_equal();
    watched.await_audit();
    watched.expect_no_loss();
    // And it can be handed over again.
    let folder = watched.folder.path().to_owned();
    watched.source.signal(Signal::SIGKILL);
    watched.source.await_end(PATIENCE);
    watched.store(pages(10), b"meanwhile");
    watched.source = super::watched::source(&folder, 1_000);
    await_content(&watched.source, REGION, &watched.model);
    await_that("it is handed over", || {
        watched.source.region(REGION).is_some_and(|r| r.epoch > 0)
    });
    watched.store(pages(11), b"afterwards");
    watched.writer.commit(0);
    watched.expect_no_loss();
}

#[test]
fn losses_are_shown_by_the_command_and_the_metrics() {
    let folder = super::nodes::folder();
    let port = free_port();
    let metrics = format!("127.0.0.1:{port}");
    let node = NodeProcess::start(folder.path(), "node", &["--metrics", &metrics]);
    let mut writer = super::writer::WriterProcess::with_region(
        node.socket(),
        REGION,
        MIB,
        Mode::Async,
        Publish::Timer,
    );
    writer
        .deed(Deed::Unmap {
            offset: 0,
            len: pages(1),
        })
        .expect("its own memory");
    await_that("the loss is told", || {
        node.region(REGION).is_some_and(|r| !r.losses.is_empty())
    });
    let kind = node.region(REGION).expect("it is there").losses[0].kind;
    for line in ["status", &format!("region show {REGION}")] {
        let shown = run_on(&node, line, b"");
        assert_eq!(shown.code, Some(0), "{shown:?}");
        let text = shown.text();
        assert!(
            text.contains("LAST REASON") && text.contains(kind.as_str()),
            "{text}"
        );
    }
    let mut http = TcpStream::connect(&metrics).expect("metrics are served");
    http.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")
        .expect("a request");
    let mut text = String::new();
    http.read_to_string(&mut text).expect("an answer");
    let wanted = format!("uffd_sync_region_losses{{region=\"{REGION}\",kind=\"{kind}\"}} 1");
    assert!(text.contains(&wanted), "{wanted}: {text}");
    assert!(
        text.contains("uffd_sync_region_last_loss_milliseconds"),
        "{text}"
    );
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

#[test]
fn a_writer_that_stores_and_never_commits_is_told_as_a_standstill() {
    let mut watched = Watched::new(MIB, Mode::Async, Publish::Commit, More::default());
    watched.store(pages(1), b"not committed");
    let region = || watched.region();
    await_that("the standstill is told", || {
        region()
            .losses
            .iter()
            .any(|loss| loss.kind == LossKind::Standstill)
    });
    let told = region().losses;
    assert!(told[0].reason.contains("has not committed"), "{told:?}");
    assert_eq!(region().full_compares, 0, "nothing is lost by it");
    std::thread::sleep(Duration::from_millis(2_500));
    assert_eq!(region().losses, told, "it is told once");
    let Report::Epoch { .. } = watched.writer.order(&Order::Commit {
        acks: 1,
        deadline_ms: 20_000,
    }) else {
        panic!("no epoch");
    };
    watched.await_equal();
}
