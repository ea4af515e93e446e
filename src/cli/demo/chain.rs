//! Chains of stores over distant pages: what shows that an epoch is one instant.
//!
//! Store `n` of a chain writes the number `n` to page `n % LINKS` of the chain. Whoever
//! sees store `n` and not all before it sees no instant of the writer's memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::workload::chain_offset;
use crate::region::{Region, RegionError};

/// Chains, each stored by a thread of its own.
pub(super) const CHAINS: u64 = 2;
/// Pages of one chain.
pub(super) const LINKS: u64 = 64;
/// Stores between two pauses.
const GROUP: u64 = 32;
const PAUSE: Duration = Duration::from_micros(200);

/// Stores chain `chain` until told to stop; how many stores it made.
pub(super) fn store(region: &Region, chain: u64, stop: &AtomicBool) -> Result<u64, RegionError> {
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..GROUP {
            number += 1;
            let at = chain_offset(chain, number % LINKS, region.size());
            // Two numbers at once, so that a torn page shows as well.
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            bytes[8..].copy_from_slice(&(!number).to_le_bytes());
            region.write(at, &bytes[..8])?;
            region.write(at + 8, &bytes[8..])?;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(number)
}

/// Whether the links of one chain, as {number, its complement}, are of one instant:
/// a prefix of its stores, of whose last one the second half may be missing.
pub(super) fn is_whole(links: &[(u64, u64); LINKS as usize]) -> bool {
    let last = links.iter().map(|link| link.0).max().unwrap_or(0);
    links.iter().enumerate().all(|(index, (number, inverse))| {
        // The last store to this page that is not later than the last one of all.
        let behind = (last + LINKS - index as u64) % LINKS;
        let expected = last.saturating_sub(behind);
        let before = expected.saturating_sub(LINKS);
        let half = |number: u64| if number == 0 { 0 } else { !number };
        let is_last = *number == last;
        *number == expected && (*inverse == half(expected) || (is_last && *inverse == half(before)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(last: u64) -> [(u64, u64); LINKS as usize] {
        let mut links = [(0, 0); LINKS as usize];
        for number in 1..=last {
            links[(number % LINKS) as usize] = (number, !number);
        }
        links
    }

    #[test]
    fn prefixes_are_whole_and_nothing_else_is() {
        for last in [0, 1, 5, 63, 64, 65, 1000] {
            assert!(is_whole(&links(last)), "{last}");
        }
        for last in [1u64, 5, 64, 65, 1000] {
            let mut half = links(last);
            let before = links(last - 1)[(last % LINKS) as usize];
            half[(last % LINKS) as usize].1 = before.1;
            assert!(is_whole(&half), "{last} is half stored");
        }
        let mut torn = links(1000);
        torn[7] = links(1000 - LINKS)[7];
        assert!(!is_whole(&torn), "a link is missing");
        let mut torn = links(1000);
        torn[((1000 - 3) % LINKS) as usize].1 = 0;
        assert!(!is_whole(&torn), "half a link in the middle");
    }
}
