//! What a channel costs: `cargo bench --bench duplex`.
//!
//! | cases | against | goal |
//! |---|---|---|
//! | `parked-64B`, `default-64B` | a futex ping-pong that wakes and waits unconditionally | one core: <= 0.95x, <= 0.70x |
//! | `adaptive-*` | parking at once | <= 1.1x in every placement |
//! | `hot-64B` | one cache line's round trip; iceoryx2 polling | near <= 1.15x, >= 6x less; far <= 1.3x, >= 4.5x |
//! | `hot-64B-vs-bare-64B`, `hot-64B-bytes-vs-bare-64B` | the same 64 bytes behind one polled word, bare | <= 1.2x |
//! | `batch-64` (one frame), `batch-64-of-slots` (one kick) | a round trip of one cache line per request | <= 0.06x |
//! | `hot-1MiB-bytes` | the computation alone, iceoryx2, a Unix socket | near <= 1.25x, >= 3x, >= 15x less |
//! | `*-vs-two-buffers` | two rings of the same size, waiting alike | parked >= 1.15x, one byte >= 1.8x; hot >= 1.6x, >= 3x |
//! | `killed` | a bare wait for the robust futex of the same process | <= 1.5x |
//! | `resident` | two rings of the same size, filled | <= 0.51x |
//! | `blur-3MB`, `large-frame`, sizes, other peers | each other | none |
//! | with `--all`: sizes, image, large frame and deaths in the other placements, `parked-batch-*` | as above | deaths <= 1.5x |
//!
//! Client and server are processes of their own everywhere; each response is checked.
//! Peers under `tools/peers` are named as not run where they are not built.
#![allow(
    unsafe_code,
    reason = "bare pages that two processes write in turns, and slices of frames"
)]

#[path = "duplex/adaptive.rs"]
mod adaptive;
#[path = "duplex/alone.rs"]
mod alone;
#[path = "duplex/bare.rs"]
mod bare;
#[path = "duplex/contest.rs"]
mod contest;
#[path = "duplex/death.rs"]
mod death;
mod harness;
#[path = "duplex/inplace.rs"]
mod inplace;
#[path = "duplex/large.rs"]
mod large;
#[path = "duplex/link.rs"]
mod link;
#[path = "duplex/payload.rs"]
mod payload;
#[path = "duplex/peers.rs"]
mod peers;
#[path = "duplex/resident.rs"]
mod resident;
#[path = "duplex/small.rs"]
mod small;
#[path = "duplex/two_buffers.rs"]
mod two_buffers;

use harness::{Group, Role};

fn main() -> std::process::ExitCode {
    let extra = |cases, run| Group {
        cases,
        only_all: true,
        run,
    };
    let groups = [
        Group::of(small::CASES_HOT, small::run_hot),
        Group::of(small::CASES_ONE_CORE, small::run_one_core),
        Group::of(small::CASES_SLEEPING, small::run_sleeping),
        Group::of(small::CASES_FREE, small::run_free),
        Group::of(large::CASES_HOT, large::run_hot),
        Group::of(large::CASES_PARKED_ONE_CORE, large::run_parked_one_core),
        Group::of(large::CASES_PARKED_TWO_CORES, large::run_parked_two_cores),
        Group::of(adaptive::CASES_ONE_CORE, adaptive::run_one_core),
        Group::of(adaptive::CASES_TWO_CORES, adaptive::run_two_cores),
        Group::of(adaptive::CASES_FREE, adaptive::run_free),
        Group::of(death::CASES, death::run),
        Group::of(resident::CASES, resident::run),
        Group::of(resident::CASES_LARGE, resident::run_large),
        Group::of(large::CASES_IMAGE, large::run_image),
        extra(large::CASES_SIZES, large::run_sizes),
        extra(large::CASES_SIZES_ONE_CORE, large::run_sizes_one_core),
        extra(large::CASES_SIZES_FREE, large::run_sizes_free),
        extra(large::CASES_IMAGE_ONE_CORE, large::run_image_one_core),
        extra(large::CASES_IMAGE_FREE, large::run_image_free),
        extra(resident::CASES_LARGE_ONE_CORE, resident::run_large_one_core),
        extra(resident::CASES_LARGE_FREE, resident::run_large_free),
        extra(small::CASES_BATCHES_ONE_CORE, small::run_batches_one_core),
        extra(death::CASES_PINNED, death::run_pinned),
    ];
    let roles = [
        Role::of(bare::ROLE, bare::serve),
        Role::of(alone::ROLE, alone::serve),
        Role::of(inplace::ROLE, inplace::serve),
        Role::of(two_buffers::ROLE, two_buffers::serve),
        Role::of(death::ROLE, death::serve),
        Role::of(death::ROLE_CHANNEL, death::serve_channel),
    ];
    harness::run("duplex", &groups, &roles)
}
