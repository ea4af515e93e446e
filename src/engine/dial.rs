//! Following regions of other nodes: names become addresses, addresses connections,
//! and a lost source is dialled again with growing pauses.
//!
//! A host name is resolved by a thread of its own, since the system's resolver
//! blocks; its answer comes back as a command.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use super::Engine;
use super::apply::Replica;
use super::commands::Command;
use super::keys::Key;
use super::regions::{Body, RegionEntry};
use super::requests::{NewEntry, Refusal, chain};
use super::timers::Timer;
use crate::limits;
use crate::region::RegionKind;
use crate::shm::OwnedMemory;
use crate::sys::process::effective_uid;
use crate::wire::follow::FollowSpec;
use crate::words::{Generation, RegionName};

impl Engine {
    /// Follows `spec` into a local replica that belongs to `uid`. The region appears
    /// with its size once the source answers; until then it is one byte long.
    pub(super) fn follow(&mut self, spec: FollowSpec, uid: u32) -> Result<(), Refusal> {
        let name = self.free_name(spec.local.as_str())?;
        let entry = self.replica_entry(name, spec, uid, (1, 1))?;
        let key = self.add_region(entry);
        self.dial(key);
        Ok(())
    }

    /// An empty replica of `size` bytes that can grow to `max_size`.
    pub(super) fn replica_entry(
        &mut self,
        name: RegionName,
        spec: FollowSpec,
        uid: u32,
        (size, max_size): (u64, u64),
    ) -> Result<RegionEntry, Refusal> {
        let memory = OwnedMemory::with_room(name.as_str(), size, max_size)
            .map_err(|error| Refusal::failed("cannot make the replica's memory", &error))?;
        let data_fd = memory.shared_fd();
        let budget = self.settings.staging_budget;
        let replica = Replica::new(spec, self.next_handle, memory, size, budget);
        self.new_entry(NewEntry {
            name,
            size,
            max_size,
            // A replica that is itself followed passes epochs on as they are.
            shared: true,
            owner_uid: uid,
            generation: Generation::ZERO,
            kind: RegionKind::Replica,
            data_fd,
            body: Body::Replica(Box::new(replica)),
        })
    }

    /// Ends the replica that follows exactly this, and nothing else of its name.
    pub(super) fn stop_following(&mut self, spec: &FollowSpec) {
        if let Some(key) = self.following(spec) {
            self.drop_region(key, "no longer followed");
        }
    }

    /// The replica that follows `spec`.
    fn following(&self, spec: &FollowSpec) -> Option<Key> {
        let key = *self.names.get(&spec.local)?;
        match &self.regions.get(key)?.body {
            Body::Replica(replica) if replica.spec == *spec => Some(key),
            _ => None,
        }
    }

    /// Follows what the settings name and what is not followed yet.
    pub(super) fn follow_all(&mut self, specs: &[FollowSpec]) {
        for spec in specs {
            if self.following(spec).is_none()
                && let Err(refusal) = self.follow(spec.clone(), effective_uid())
            {
                tracing::error!(%spec, reason = refusal.message, "cannot follow");
            }
        }
    }

    /// A timer for dialling fired: an attempt that was planned for later is not made yet.
    pub(super) fn dial_due(&mut self, key: Key) {
        if let Some(RegionEntry {
            body: Body::Replica(replica),
            ..
        }) = self.regions.get(key)
            && replica.dial_at.is_some_and(|at| at <= self.now)
        {
            self.dial(key);
        }
    }

    /// Plans the next attempt; one that was planned before is not made.
    fn plan_dial(&mut self, key: Key, pause: Duration) {
        let at = self.now + pause;
        if let Some(RegionEntry {
            body: Body::Replica(replica),
            ..
        }) = self.regions.get_mut(key)
        {
            replica.dial_at = Some(at);
            self.timers.set(at, Timer::Dial(key));
        }
    }

    /// Starts a connection to the source of the replica `key`.
    pub(super) fn dial(&mut self, key: Key) {
        let Some(RegionEntry {
            body: Body::Replica(replica),
            ..
        }) = self.regions.get_mut(key)
        else {
            return;
        };
        if replica.peer.is_some() || self.stopping.is_some() {
            return;
        }
        replica.dial_at = None;
        let (host, port) = (replica.spec.host.clone(), replica.spec.port);
        if let Ok(ip) = host.parse::<IpAddr>() {
            self.resolved(key, Ok(vec![SocketAddr::new(ip, port)]));
            return;
        }
        let commands = self.commands.clone();
        let resolve = move || {
            let addresses = (host.as_str(), port)
                .to_socket_addrs()
                .map(Iterator::collect);
            // A full queue means that the engine is busy: the next attempt asks again.
            let _ = commands.send(Command::Resolved(key, addresses));
        };
        if let Err(error) = std::thread::Builder::new()
            .name("resolve".into())
            .spawn(resolve)
        {
            tracing::error!(%error, "cannot resolve a host name");
        }
        // Should the answer be lost, the attempt is made again.
        self.plan_dial(key, Duration::from_secs(30));
    }

    /// The source's host has these addresses: the next one in turn is tried.
    pub(super) fn resolved(&mut self, key: Key, addresses: std::io::Result<Vec<SocketAddr>>) {
        let Some(RegionEntry {
            body: Body::Replica(replica),
            name,
            ..
        }) = self.regions.get_mut(key)
        else {
            return;
        };
        if replica.peer.is_some() {
            return;
        }
        let attempt = replica.attempts as usize;
        let addr = match addresses {
            Ok(addresses) if !addresses.is_empty() => addresses[attempt % addresses.len()],
            Ok(_) => return self.dial_later(key, "the host has no address"),
            Err(error) => return self.dial_later(key, &error.to_string()),
        };
        tracing::debug!(region = %name, %addr, "dialling");
        match self.connect_peer(addr, key) {
            Ok(peer) => {
                if let Some(RegionEntry {
                    body: Body::Replica(replica),
                    ..
                }) = self.regions.get_mut(key)
                {
                    replica.peer = Some(peer);
                    replica.dial_at = None;
                }
            }
            Err(error) => self.dial_later(key, &chain(&error)),
        }
    }

    /// Plans the next attempt: pauses double up to the longest, and are spread by up
    /// to a quarter so that many followers do not come back at one instant.
    pub(super) fn dial_later(&mut self, key: Key, reason: &str) {
        let Some(RegionEntry {
            body: Body::Replica(replica),
            name,
            ..
        }) = self.regions.get_mut(key)
        else {
            return;
        };
        let doubled = limits::RECONNECT_MIN_MS << replica.attempts.min(16);
        let pause = doubled.min(limits::RECONNECT_MAX_MS);
        replica.attempts = replica.attempts.saturating_add(1);
        let spread = u64::from(self.node_id[0]) * pause / 1024;
        tracing::info!(region = %name, source = %replica.spec, reason, pause_ms = pause, "source not reached");
        self.plan_dial(key, Duration::from_millis(pause + spread));
    }
}
