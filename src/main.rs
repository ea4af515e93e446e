//! The command `uffd-sync`.

fn main() {}
