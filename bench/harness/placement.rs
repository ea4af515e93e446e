//! Which cores a client and its server run on.

/// Where the two processes of a case run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Both on core 0.
    OneCore,
    /// The client on core 0, the server on core 1.
    TwoCores,
    /// Wherever the kernel puts them.
    Free,
}

impl Placement {
    /// The client's core and the server's; none for any.
    pub(crate) fn cores(self) -> [Option<usize>; 2] {
        match self {
            Self::OneCore => [Some(0), Some(0)],
            Self::TwoCores => [Some(0), Some(1)],
            Self::Free => [None, None],
        }
    }
}
