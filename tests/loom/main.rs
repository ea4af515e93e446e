//! The lock-free code under every order of events that the memory model allows:
//! `RUSTFLAGS="--cfg loom" cargo test --test loom`. Without that it is empty.
//!
//! One module for each algorithm. Each model has a negative control: the same model
//! with one ordering or one step left out, which loom has to catch.
#![cfg(loom)]

mod count;
mod duplex_completion;
mod duplex_event;
mod duplex_frame;
mod exact;
mod futex;
mod lease;
mod lives;
mod queue;
mod seqlock;
mod turns;
mod watch;
