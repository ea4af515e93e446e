//! This node as a source: greetings and subscriptions of followers, their acks, and
//! the frames of the regions that they follow.

use std::time::{Duration, Instant};

use super::Engine;
use super::keys::Key;
use super::peers::{PING, Phase, Subscription};
use super::regions::Follower;
use super::timers::Timer;
use crate::limits;
use crate::replicate::{Out, ReplicaKey};
use crate::wire::{
    ErrorCode, ErrorFrame, Header, Hello, Kind, Subscribe, Unsubscribe, VERSION, WireError,
};

/// Chunks compared between two looks at the clock: about 0.1 ms.
const DIGESTS_PER_STEP: u64 = 4;

impl Engine {
    pub(super) fn hello_came(
        &mut self,
        key: Key,
        header: &Header,
        body: &[u8],
    ) -> Result<(), WireError> {
        let hello = Hello::decode(header, body)?;
        if !(hello.min_version..=hello.max_version).contains(&VERSION) {
            let text = format!(
                "this node speaks version {VERSION} of the frames, the follower {} to {}",
                hello.min_version, hello.max_version
            );
            self.refuse_peer(key, ErrorCode::Version, 0, &text);
            return Ok(());
        }
        let welcome = self.own_hello().encode(Kind::Welcome);
        if let Some(peer) = self.peers.get_mut(key) {
            tracing::info!(
                remote = peer.remote,
                node = hello.name,
                "follower connected"
            );
            peer.hello = Some(hello);
            peer.phase = Phase::Open;
        }
        self.timers.set(self.now + PING, Timer::Peer(key));
        self.send(key, welcome);
        Ok(())
    }

    /// A frame of a node that follows regions of this one.
    pub(super) fn follower_frame(
        &mut self,
        key: Key,
        header: &Header,
        body: &[u8],
    ) -> Result<(), WireError> {
        match header.kind {
            Kind::Subscribe => {
                let subscribe = Subscribe::decode(header, body)?;
                self.subscribe(key, &subscribe);
            }
            Kind::Unsubscribe => {
                let unsubscribe = Unsubscribe::decode(header, body)?;
                self.unsubscribe(key, unsubscribe.subscription);
            }
            Kind::Ack | Kind::Resync | Kind::Digest => {
                self.shipper_frame(key, header, body);
            }
            kind => {
                let text = format!("a follower does not send {kind:?} frames");
                self.refuse_peer(key, ErrorCode::Protocol, 0, &text);
            }
        }
        self.pump_peer(key);
        Ok(())
    }

    fn subscribe(&mut self, key: Key, subscribe: &Subscribe) {
        let Some(hello) = self.peers.get(key).and_then(|peer| peer.hello.clone()) else {
            return;
        };
        let region = self.names.get(&subscribe.name).copied();
        let number = subscribe.subscription;
        let elsewhere = |s: &&Subscription| s.number == number && Some(s.region) != region;
        if let Some(peer) = self.peers.get(key)
            && peer.subscriptions.iter().any(|s| elsewhere(&s))
        {
            self.unsubscribe(key, number);
        }
        let entry = region.and_then(|region| self.regions.get_mut(region));
        let (Some(region), Some(entry)) = (region, entry.filter(|entry| entry.is_followable()))
        else {
            // The same answer whether it does not exist or is not shared.
            let text = format!("no shared region named {} on this node", subscribe.name);
            self.refuse_subscription(key, ErrorCode::UnknownRegion, subscribe.subscription, text);
            return;
        };
        let replica = ReplicaKey {
            node: hello.node,
            subscription: subscribe.subscription,
            name: hello.name.clone(),
        };
        let present = entry.present();
        let handle = entry.publication.handle();
        match entry
            .publication
            .subscribe(self.now, replica, subscribe, &present)
        {
            Ok((shipper, info)) => {
                tracing::info!(region = %entry.name, node = hello.name, plan = ?info.plan, "followed");
                // Who held the replica's place before is not sent anything any more.
                let publication = &entry.publication;
                let replaced = entry.followers.iter();
                let replaced: Vec<Key> = replaced
                    .filter(|follower| !publication.knows(follower.shipper))
                    .map(|follower| follower.peer)
                    .filter(|peer| *peer != key)
                    .collect();
                entry
                    .followers
                    .retain(|follower| publication.knows(follower.shipper));
                entry.followers.push(Follower { peer: key, shipper });
                if let Some(peer) = self.peers.get_mut(key) {
                    peer.subscriptions
                        .retain(|subscription| subscription.number != number);
                    peer.subscriptions.push(Subscription {
                        number,
                        handle,
                        region,
                        shipper,
                    });
                }
                self.send(key, info.encode());
                for peer in replaced {
                    self.close_peer(peer, "the same replica connected once more");
                }
            }
            Err(error) => {
                let text = super::requests::chain(&error);
                self.refuse_subscription(key, ErrorCode::Limit, subscribe.subscription, text);
            }
        }
    }

    fn refuse_subscription(&mut self, key: Key, code: ErrorCode, subscription: u32, text: String) {
        tracing::warn!(reason = text, "subscription refused");
        self.send(
            key,
            ErrorFrame {
                code,
                subscription,
                text,
            }
            .encode(),
        );
    }

    fn unsubscribe(&mut self, key: Key, number: u32) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let Some(at) = peer.subscriptions.iter().position(|s| s.number == number) else {
            return;
        };
        let subscription = peer.subscriptions.swap_remove(at);
        if let Some(entry) = self.regions.get_mut(subscription.region) {
            entry
                .followers
                .retain(|follower| follower.shipper != subscription.shipper);
            entry.publication.unsubscribe(subscription.shipper);
            entry.publish_acks();
        }
    }

    /// An ack, resync or digest of one region's replica.
    fn shipper_frame(&mut self, key: Key, header: &Header, body: &[u8]) {
        let Some(peer) = self.peers.get(key) else {
            return;
        };
        // A handle that is not subscribed to may be one that was just dropped.
        let handles = |s: &&Subscription| s.handle == header.region;
        let Some(Subscription {
            region, shipper, ..
        }) = peer.subscriptions.iter().find(handles).copied()
        else {
            return;
        };
        let Some(entry) = self.regions.get_mut(region) else {
            return;
        };
        if header.kind == Kind::Resync {
            tracing::info!(region = %entry.name, remote = peer.remote, "resync asked for");
        }
        if let Err(error) = entry
            .publication
            .handle_frame(shipper, self.now, header, body)
        {
            let text = super::requests::chain(&error);
            self.refuse_peer(key, ErrorCode::Protocol, 0, &text);
            return;
        }
        entry.publish_acks();
        if entry.publication.is_digesting(shipper) {
            self.make_runnable(region);
        }
    }

    /// Compares a few chunks with what followers have, and sends what differs and
    /// what waited for a place among the open updates.
    pub(super) fn serve_followers(&mut self, region: Key) {
        let Some(entry) = self.regions.get_mut(region) else {
            return;
        };
        let end = Instant::now() + Duration::from_micros(limits::WORK_STEP_US);
        let mut waiting = Vec::new();
        let mut more = false;
        for follower in entry.followers.clone() {
            if entry.publication.is_digesting(follower.shipper) {
                // A hole costs next to nothing: as many chunks as the time allows.
                let mut all = entry.digest_step(follower.shipper, DIGESTS_PER_STEP);
                while !all && Instant::now() < end {
                    all = entry.digest_step(follower.shipper, DIGESTS_PER_STEP);
                }
                more |= !all;
                waiting.push(follower.peer);
            } else if entry.is_coming() || entry.publication.wants_poll(follower.shipper) {
                waiting.push(follower.peer);
            }
        }
        for peer in waiting {
            self.pump_peer(peer);
        }
        if more {
            self.make_runnable(region);
        }
    }

    /// Fills the outboxes of all that follow a region.
    pub(super) fn pump_followers(&mut self, region: Key) {
        let Some(entry) = self.regions.get(region) else {
            return;
        };
        for follower in entry.followers.clone() {
            self.pump_peer(follower.peer);
        }
    }

    /// Fills one connection's outbox from the regions followed over it, in turn.
    pub(super) fn pump_peer(&mut self, key: Key) {
        // What is on its way brings the next look, so a late turn need not fill up.
        let late = self.is_late();
        let Some(mut peer) = self.peers.get_mut(key).filter(|peer| !peer.closing) else {
            return;
        };
        let mut freed = Vec::new();
        let mut some = true;
        while some && peer.outbox.has_room() && !(late && peer.is_sending()) {
            some = false;
            for subscription in &peer.subscriptions {
                let Some(entry) = self.regions.get_mut(subscription.region) else {
                    continue;
                };
                let held = entry.publication.held_open();
                let frame = entry.poll_frame(subscription.shipper, self.now, &mut self.spare);
                if entry.publication.held_open() < held {
                    freed.push(subscription.region);
                }
                if let Some(frame) = frame {
                    match frame {
                        Out::Owned(frame) => peer.outbox.push(frame),
                        Out::Shared(frame) => peer.outbox.push_shared(frame),
                    }
                    some = true;
                }
            }
            if peer.may_send_bulk() {
                self.send_now(key);
                match self.peers.get_mut(key) {
                    Some(open) => peer = open,
                    None => break,
                }
            }
        }
        for region in freed {
            self.make_runnable(region);
        }
        self.start_send(key);
    }
}
