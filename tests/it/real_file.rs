//! The main job on real input: a real file in a region that is changed by a recorded
//! pattern while everybody who takes part is killed once.

use std::ops::Range;
use std::time::Duration;

use uffd_sync::words::{Mode, Publish};

use super::nodes::{
    NodeProcess, await_content, await_following, await_that, content, first_difference, folder,
    run_on,
};
use super::pattern;
use super::proxy::Proxy;
use super::writer::{Order, WriterProcess};

const SEED: u64 = 0x5EED_F11E;
/// Not a multiple of the page size, as files are.
const MOST: usize = (6 << 20) + 1234;

/// How long the writer changes the region between two kills.
const SPELL: Duration = Duration::from_millis(700);

#[test]
fn a_real_file_outlives_writer_follower_and_source() {
    let folder = folder();
    let mut model =
        std::fs::read(std::env::current_exe().expect("this program")).expect("its bytes");
    model.truncate(MOST);
    let file = folder.path().join("real");
    std::fs::write(&file, &model).expect("a file in the temporary folder");
    let size = model.len() as u64;

    let mut source = NodeProcess::source(folder.path(), "a");
    let proxy = Proxy::to(source.listen());
    let mut writer =
        WriterProcess::with_region(source.socket(), "real", size, Mode::Async, Publish::Timer);
    writer.carry_out(&Order::Load { path: file });
    let sources = [proxy.source_of("real=copy")];
    let mut follower = NodeProcess::follower(folder.path(), "b", &sources);
    await_content(&follower, "copy", &model);

    // The writer dies in the middle of the pattern; its last stores are not lost.
    writer.send(&Order::Run {
        seed: SEED,
        from: 0,
    });
    let seen = writer.steps_within(SPELL);
    let next = writer.kill().unwrap_or(seen) + 1;
    adopt_what_a_killed_writer_left(&source, ("real", SEED), &mut model, 0..next);
    await_content(&follower, "copy", &model);

    // Its successor goes on from that content.
    let mut writer = WriterProcess::start();
    let resumed = writer.create(source.socket(), "real", size, Mode::Async, Publish::Timer);
    assert!(
        resumed,
        "the second writer begins with what the first one stored"
    );
    writer.send(&Order::Run {
        seed: SEED,
        from: next,
    });
    writer.steps_within(SPELL);

    follower.kill();
    writer.steps_within(SPELL);
    follower = NodeProcess::follower(folder.path(), "b", &sources);
    await_following(&follower, "copy");
    writer.steps_within(SPELL);

    // The source node dies; the living writer goes on and hands over to the next one.
    source.kill();
    writer.steps_within(SPELL);
    source = NodeProcess::source(folder.path(), "a");
    proxy.aim_at(source.listen());
    await_that("the writer hands over again", || {
        source
            .region("real")
            .is_some_and(|region| region.writer_pid == Some(writer.pid() as i32))
    });
    writer.steps_within(SPELL);

    let end = writer.stop_run();
    assert!(end > next + 100, "the pattern went on: {next} to {end}");
    pattern::apply(&mut model, SEED, next..end);
    await_content(&source, "real", &model);
    await_content(&follower, "copy", &model);
    let expected = blake3::hash(&model).to_hex().to_string();
    for (node, name) in [(&source, "real"), (&follower, "copy")] {
        let digest = run_on(node, &format!("region digest {name} --json"), b"").json();
        assert_eq!(digest["digest"], expected.as_str(), "{name}: {digest}");
    }
}

/// Makes `model` what the node has of the region and pattern `of` after its writer was
/// killed: `steps` whole, of the step behind them perhaps a part.
pub(crate) fn adopt_what_a_killed_writer_left(
    source: &NodeProcess,
    (region, seed): (&str, u64),
    model: &mut Vec<u8>,
    steps: Range<u64>,
) {
    let next = steps.end;
    pattern::apply(model, seed, steps);
    let (left, _) = content(source, region).expect("the node keeps the region");
    let mut after = model.clone();
    pattern::apply(&mut after, seed, next..next + 1);
    let mut allowed = model.clone();
    for store in pattern::step(seed, next, model.len() as u64) {
        for at in store.range() {
            if left[at] == after[at] {
                allowed[at] = left[at];
            }
        }
    }
    assert!(
        left == allowed,
        "lost: {}",
        first_difference(&left, &allowed)
    );
    *model = left;
}
