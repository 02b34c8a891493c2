//! Which fragmented datagrams have passed with their first fragment.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::time::Instant;

use crate::flow::{Direction, FlowKey};
use crate::packet::{Addrs, Fragment, Packet};

/// Datagrams of one peer and direction that may be in fragments at once, a count. Hosts send the fragments of a
/// datagram in a row, so few are under way; the oldest makes room.
pub const MAX_FRAGMENTED: usize = 32;
/// Peers (counted per direction) with datagrams in fragments at once; the longest idle one makes room.
pub const MAX_FRAGMENTING_PEERS: usize = 256;
/// How long later fragments may follow the first. Hosts give up reassembly after 30 s (Linux) or 60 s (RFC 8200).
pub const FRAGMENT_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct Fragments {
    peers: BTreeMap<(Direction, u32), PeerFragments>,
}

#[derive(Debug)]
struct PeerFragments {
    used: Instant,
    /// Oldest first.
    datagrams: ArrayVec<Datagram, MAX_FRAGMENTED>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Name {
    src: IpAddr,
    dst: IpAddr,
    id: u32,
    /// Zero for IPv6, whose identification stands alone (RFC 8200, section 4.5).
    proto: u8,
}

#[derive(Clone, Copy, Debug)]
struct Datagram {
    name: Name,
    flow: FlowKey,
    /// Where the first fragment ends; a later one that begins before it would rewrite what was judged.
    first_end: u16,
    expires: Instant,
}

impl Fragments {
    /// Notes that the first fragment of a datagram passed.
    pub(super) fn remember(
        &mut self,
        direction: Direction,
        peer: u32,
        packet: &Packet<'_>,
        fragment: Fragment,
        flow: FlowKey,
        now: Instant,
    ) {
        let key = (direction, peer);
        if self.peers.len() >= MAX_FRAGMENTING_PEERS && !self.peers.contains_key(&key) {
            let idle = self.peers.iter().min_by_key(|(_, peer)| peer.used);
            if let Some(idle) = idle.map(|(key, _)| *key) {
                self.peers.remove(&idle);
            }
        }
        let peer =
            self.peers.entry(key).or_insert_with(|| PeerFragments { used: now, datagrams: ArrayVec::new() });
        peer.used = now;
        let name = Name::of(packet, fragment);
        peer.datagrams.retain(|datagram| datagram.name != name && datagram.expires > now);
        if peer.datagrams.is_full() {
            peer.datagrams.remove(0);
        }
        peer.datagrams.push(Datagram {
            name,
            flow,
            first_end: fragment.end,
            expires: now + FRAGMENT_TIMEOUT,
        });
    }

    /// The flow a later fragment belongs to, if its first fragment passed.
    pub(super) fn find(
        &self,
        direction: Direction,
        peer: u32,
        packet: &Packet<'_>,
        fragment: Fragment,
        now: Instant,
    ) -> Option<FlowKey> {
        let name = Name::of(packet, fragment);
        self.peers
            .get(&(direction, peer))?
            .datagrams
            .iter()
            .find(|datagram| datagram.name == name && datagram.expires > now)
            .filter(|datagram| fragment.offset >= datagram.first_end)
            .map(|datagram| datagram.flow)
    }

    /// Peers with datagrams in fragments, counted per direction.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    /// Drops what is known of a peer.
    pub(super) fn forget(&mut self, peer: u32) {
        self.peers.retain(|(_, known), _| *known != peer);
    }
}

impl Name {
    fn of(packet: &Packet<'_>, fragment: Fragment) -> Self {
        Self {
            src: packet.src(),
            dst: packet.dst(),
            id: fragment.id,
            proto: match packet.addrs {
                Addrs::V4 { .. } => packet.proto,
                Addrs::V6 { .. } => 0,
            },
        }
    }
}
