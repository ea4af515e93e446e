//! What NBD clients of this process do, export by export, for whoever looks.
//!
//! - I1: no more exports are remembered than [`MAX_NBD_FIGURES`]; those that nobody is
//!   connected to are forgotten first.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::limits::MAX_NBD_FIGURES;
use crate::wire::control::{NbdExportStatus, NbdStatus};

/// Figures of all exports.
#[derive(Debug, Default)]
pub struct NbdFigures {
    clients: AtomicU64,
    turned_away: AtomicU64,
    broken: AtomicU64,
    exports: Mutex<BTreeMap<Box<str>, Arc<ExportFigures>>>,
}

/// Figures of one export.
#[derive(Debug, Default)]
struct ExportFigures {
    connections: AtomicU64,
    connected: AtomicU64,
    requests: AtomicU64,
    errors: AtomicU64,
}

/// One client's place among those that are served; free when it is dropped.
#[derive(Debug)]
pub struct Seat(Arc<NbdFigures>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One connection to an export, counted until it is dropped.
#[derive(Debug)]
pub struct Counted(Arc<ExportFigures>);

impl Counted {
    /// So many requests were taken, and so many answered by an error.
    pub fn add(&self, requests: u64, errors: u64) {
        self.0.requests.fetch_add(requests, Ordering::Relaxed);
        self.0.errors.fetch_add(errors, Ordering::Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl NbdFigures {
    /// A place for one more client, if less than `most` have one. Clients are taken in by
    /// one thread.
    pub fn seat(self: &Arc<Self>, most: u64) -> Option<Seat> {
        if self.clients.load(Ordering::Relaxed) >= most {
            self.turned_away.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        self.clients.fetch_add(1, Ordering::Relaxed);
        Some(Seat(Arc::clone(self)))
    }

    /// A client was hung up on for what it sent.
    pub fn broke(&self) {
        self.broken.fetch_add(1, Ordering::Relaxed);
    }

    /// A client has chosen the export of this name.
    pub fn connected(&self, name: &str) -> Counted {
        let mut exports = self.exports.lock().unwrap_or_else(PoisonError::into_inner);
        if exports.len() as u64 >= MAX_NBD_FIGURES && !exports.contains_key(name) {
            exports.retain(|_, one| one.connections.load(Ordering::Relaxed) > 0);
        }
        let found = exports.entry(name.into()).or_default();
        found.connections.fetch_add(1, Ordering::Relaxed);
        found.connected.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(found))
    }

    /// How it goes. The figures need not be of one instant.
    pub fn status(&self) -> NbdStatus {
        let of = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        let exports = self.exports.lock().unwrap_or_else(PoisonError::into_inner);
        let exports = exports.iter().map(|(name, one)| NbdExportStatus {
            name: name.to_string(),
            connections: of(&one.connections),
            connected: of(&one.connected),
            requests: of(&one.requests),
            errors: of(&one.errors),
        });
        NbdStatus {
            clients: of(&self.clients),
            turned_away: of(&self.turned_away),
            broken: of(&self.broken),
            exports: exports.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_given_back_and_exports_counted() {
        let figures = Arc::new(NbdFigures::default());
        let seats: Vec<_> = (0..3).map(|_| figures.seat(2)).collect();
        assert_eq!(seats.iter().flatten().count(), 2);
        let all = figures.connected("all");
        all.add(3, 1);
        figures.broke();
        let status = figures.status();
        assert_eq!(
            (status.clients, status.turned_away, status.broken),
            (2, 1, 1)
        );
        let export = &status.exports[0];
        assert_eq!(
            (export.connections, export.requests, export.errors),
            (1, 3, 1)
        );
        drop((seats, all));
        let status = figures.status();
        assert_eq!((status.clients, status.exports[0].connections), (0, 0));
        assert_eq!(status.exports[0].connected, 1);
        assert!(figures.seat(2).is_some());
    }

    #[test]
    fn what_nobody_is_connected_to_is_forgotten_first() {
        let figures = NbdFigures::default();
        let kept = figures.connected("kept");
        for at in 0..3 * MAX_NBD_FIGURES {
            drop(figures.connected(&format!("region-{at}")));
            let known = figures.status().exports;
            assert!(known.len() as u64 <= MAX_NBD_FIGURES);
        }
        kept.add(1, 0);
        let known = figures.status().exports;
        assert_eq!(
            known
                .iter()
                .find(|one| one.name == "kept")
                .map(|one| one.requests),
            Some(1)
        );
    }
}
