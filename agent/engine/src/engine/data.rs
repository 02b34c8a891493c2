//! The data path: packets from the TUN out, datagrams from the network in.

use std::net::IpAddr;

use warren_common::time::Now;
use warren_common::wire::probe;

use super::Engine;
use crate::filter::{DropReason, Output, Verdict};
use crate::flow::Direction;
use crate::io::{Destination, Outbox, Source, TunOut};
use crate::paths::{Carried, PeerIdx, is_endpoint};
use crate::stun::is_stun;
use crate::wg;

/// Room a WireGuard message of up to the MTU may need: padding and overhead.
const WG_ROOM: usize = 16 + wg::DATA_OVERHEAD;

/// What the engine itself dropped. The filter, WireGuard and paths count their own.
#[derive(Clone, Debug, Default)]
pub(super) struct Drops {
    pub(super) no_path: u64,
    pub(super) outbox_full: u64,
    pub(super) tun_full: u64,
    pub(super) queued: u64,
    pub(super) too_long: u64,
    pub(super) bad_endpoint: u64,
    pub(super) unknown_protocol: u64,
    pub(super) unknown_sender: u64,
    pub(super) not_granted: u64,
    pub(super) stun_unexpected: u64,
    pub(super) notices: u64,
    pub(super) events: u64,
    pub(super) bad_peers: u64,
    pub(super) presence: u64,
    pub(super) wireguard: [u64; WG_REASONS.len()],
}

/// WireGuard's reasons, in the order of the counters.
pub(super) const WG_REASONS: [wg::DropReason; 15] = [
    wg::DropReason::Malformed,
    wg::DropReason::BadMac1,
    wg::DropReason::CookieSent,
    wg::DropReason::RateLimited,
    wg::DropReason::BadHandshake,
    wg::DropReason::UnknownPeer,
    wg::DropReason::ReplayedInitiation,
    wg::DropReason::InitiationTooSoon,
    wg::DropReason::UnknownIndex,
    wg::DropReason::TooManyResponses,
    wg::DropReason::BadCookie,
    wg::DropReason::SessionExpired,
    wg::DropReason::Replayed,
    wg::DropReason::BadTag,
    wg::DropReason::NotIp,
];

impl Engine {
    /// Takes one IP packet from the TUN. Allowed ones are sealed straight into `out`, where packets of one size to one
    /// destination form one batch; the first ones to a peer wait for its handshake. Drain `out` when it has no room
    /// for a packet of the MTU and 64 bytes more: what doesn't fit is dropped.
    pub fn handle_tun(&mut self, now: Now, packet: &[u8], out: &mut Outbox) {
        self.end_lease_if_over(now);
        let Some((src, dst)) = ip_ends(packet) else {
            // The filter knows how to say what is wrong with it; it passes nothing that it can't parse.
            self.filter.egress(now, packet, PeerIdx::MAX);
            return;
        };
        if packet.len() > self.mtu {
            self.drops.too_long += 1;
            return;
        }
        if self.enforced.is_none() {
            self.filter.record_drop(Direction::Egress, now, packet, DropReason::LeaseEnded);
            return;
        }
        if !self.own.contains(&src) {
            self.filter.record_drop(Direction::Egress, now, packet, DropReason::SpoofedSource);
            return;
        }
        let Some(owner) = self.routes.lookup(dst) else {
            self.filter.record_drop(Direction::Egress, now, packet, DropReason::NoPeer);
            return;
        };
        if let Verdict::Drop(_) = self.filter.egress(now, packet, owner.peer) {
            return;
        }
        self.send_packet(now, owner.peer, packet, out);
        self.resend_handshakes(now);
    }

    /// Seals an allowed packet and hands it to the path.
    fn send_packet(&mut self, now: Now, peer: PeerIdx, packet: &[u8], out: &mut Outbox) {
        let Some(handle) = self.peers.get(peer as usize).and_then(Option::as_ref).map(|p| p.handle) else {
            return;
        };
        self.before_use(now, peer);
        let to = self.paths.route(now.boot, peer);
        if to.is_none() && self.wg.has_session(handle, now) {
            self.drops.no_path += 1;
            return;
        }
        let Some(space) = out.space(packet.len() + WG_ROOM) else {
            self.drops.outbox_full += 1;
            return;
        };
        match self.wg.seal(handle, now, packet, space) {
            Ok(len) => {
                if let Some(to) = to {
                    out.commit(to, len);
                    self.count_sent(peer, packet.len());
                } else {
                    self.drops.no_path += 1;
                }
            }
            Err(wg::SealError::Queued) => self.count_sent(peer, packet.len()),
            Err(wg::SealError::QueueFull) => self.drops.queued += 1,
            Err(wg::SealError::BufferTooSmall { .. }) => self.drops.outbox_full += 1,
            Err(wg::SealError::PacketSize | wg::SealError::UnknownPeer) => self.drops.too_long += 1,
        }
    }

    fn count_sent(&mut self, peer: PeerIdx, len: usize) {
        if let Some(state) = self.peers.get_mut(peer as usize).and_then(Option::as_mut) {
            state.tx_bytes += len as u64;
        }
    }

    /// Takes a batch of datagrams from one source, each `stride` bytes long (the last may be shorter; 0 for a single
    /// datagram), and opens them in place. Allowed packets go to `tun`, which must have room for as many bytes and
    /// packets as the batch has: what doesn't fit is dropped.
    pub fn handle_datagram(
        &mut self,
        now: Now,
        from: Source,
        data: &mut [u8],
        stride: usize,
        tun: &mut TunOut,
    ) {
        self.end_lease_if_over(now);
        let stride = if stride == 0 { data.len().max(1) } else { stride };
        for datagram in data.chunks_mut(stride) {
            self.handle_one(now, from, datagram, tun);
        }
        self.resend_handshakes(now);
    }

    fn handle_one(&mut self, now: Now, from: Source, datagram: &mut [u8], tun: &mut TunOut) {
        if let Source::Direct { socket, remote } = from {
            if is_stun(datagram) {
                match self.stun.handle(now.boot, socket, remote, datagram) {
                    Some(_) => self.on_stun_news(now),
                    None => self.drops.stun_unexpected += 1,
                }
                return;
            }
            if !is_endpoint(self.overlay(), remote) {
                self.drops.bad_endpoint += 1;
                return;
            }
        }
        if self.enforced.is_none() {
            self.drops.not_granted += 1;
        } else if probe::is_probe(datagram) {
            if let Source::Relay { device, .. } | Source::Signal { device } = from
                && let Some(idx) = self.paths.find(device)
            {
                self.before_use(now, idx);
            }
            self.paths.handle_probe(now.boot, from, datagram);
        } else if matches!(datagram, [1..=4, 0, 0, 0, ..]) {
            match from {
                Source::Relay { device, .. } if self.paths.find(device).is_none() => {
                    self.drops.unknown_sender += 1;
                }
                Source::Signal { .. } => self.drops.unknown_protocol += 1,
                Source::Direct { .. } | Source::Relay { .. } => {
                    self.handle_wireguard(now, from, datagram, tun)
                }
            }
        } else {
            self.drops.unknown_protocol += 1;
        }
    }

    fn handle_wireguard(&mut self, now: Now, from: Source, datagram: &mut [u8], tun: &mut TunOut) {
        let received = match self.wg.handle(now, from, datagram) {
            Ok(received) => received,
            Err(reason) => {
                if let Some(at) = WG_REASONS.iter().position(|r| *r == reason) {
                    self.drops.wireguard[at] += 1;
                }
                return;
            }
        };
        let carried = match &received {
            wg::Received::Data { .. } => Carried::Data,
            wg::Received::Initiation { .. } | wg::Received::Response { .. } => Carried::Handshake,
            wg::Received::Keepalive { .. } => Carried::Nothing,
            wg::Received::Cookie { .. } => return,
        };
        let Some(peer) = received.authenticated().map(wg::PeerHandle::slot) else { return };
        if carried != Carried::Nothing {
            self.before_use(now, peer);
        }
        self.paths.on_authentic(now.boot, peer, from, carried);
        let wg::Received::Data { packet, .. } = received else { return };
        let Some(packet) = datagram.get(packet) else { return };
        let Some((src, dst)) = ip_ends(packet) else {
            self.filter.ingress(now, packet, peer);
            return;
        };
        if self.routes.lookup(src).is_none_or(|owner| owner.peer != peer) {
            self.filter.record_drop(Direction::Ingress, now, packet, DropReason::SpoofedSource);
            return;
        }
        if !self.own.contains(&dst) {
            self.filter.record_drop(Direction::Ingress, now, packet, DropReason::NoPeer);
            return;
        }
        if let Verdict::Drop(_) = self.filter.ingress(now, packet, peer) {
            return;
        }
        if !tun.push(packet) {
            self.drops.tun_full += 1;
        }
        if let Some(state) = self.peers.get_mut(peer as usize).and_then(Option::as_mut) {
            state.rx_bytes += packet.len() as u64;
        }
    }

    /// Probes and STUN. True if all fitted.
    pub(super) fn transmit_probes(&mut self, now: Now, out: &mut Outbox) -> bool {
        if !self.paths.poll_transmit(out) {
            return false;
        }
        while out.has_room(crate::stun::REQUEST_LEN) {
            let Some(asked) = self.stun.poll(now.boot, &mut self.rng) else { return true };
            let to = Destination::Direct { socket: asked.socket, remote: asked.server };
            if !out.push(to, &asked.bytes) {
                self.drops.outbox_full += 1;
            }
        }
        false
    }

    /// Handshakes, keep-alives, packets that waited, and what the filter sends to peers. True if all fitted.
    pub(super) fn transmit_wireguard(&mut self, now: Now, out: &mut Outbox) -> bool {
        let room = self.mtu.max(wg::MIN_TRANSMIT_BUFFER) + WG_ROOM;
        loop {
            let Some(space) = out.space(room) else { return false };
            let Some(transmit) = self.wg.poll_transmit(now, space) else { break };
            let to = match transmit.to {
                wg::Destination::Peer(handle) => {
                    let idx = handle.slot();
                    match transmit.kind {
                        wg::TransmitKind::Data => self.paths.route(now.boot, idx),
                        _ => self.paths.peek_route(now.boot, idx),
                    }
                }
                wg::Destination::Reply { source, peer } => self.reply_to(now, source, peer),
            };
            match to {
                Some(to) => out.commit(to, transmit.len),
                // A handshake is sent again as soon as there is a way.
                None => self.drops.no_path += 1,
            }
        }
        self.take_filter_output();
        while let Some((peer, packet)) = self.peer_packets.pop_front() {
            self.send_packet(now, peer, &packet, out);
        }
        true
    }

    pub(super) fn take_filter_output(&mut self) {
        while let Some(output) = self.filter.poll_output() {
            match output {
                Output::Local(packet) => self.push_notice(packet),
                Output::Peer { peer, packet } => {
                    if self.peer_packets.len() < super::MAX_NOTICES {
                        self.peer_packets.push_back((peer, packet));
                    } else {
                        self.drops.notices += 1;
                    }
                }
            }
        }
    }

    /// Where an answer to a datagram goes: back, or if that relay is gone by another way.
    fn reply_to(&self, now: Now, source: Source, peer: Option<wg::PeerHandle>) -> Option<Destination> {
        match source {
            Source::Direct { socket, remote } => Some(Destination::Direct { socket, remote }),
            Source::Relay { relay, device } if self.paths.relay_connected(relay) => {
                Some(Destination::Relay { relay, device })
            }
            Source::Relay { .. } | Source::Signal { .. } => self.paths.peek_route(now.boot, peer?.slot()),
        }
    }
}

/// Source and destination of an IP packet, without a look at the rest of it.
fn ip_ends(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match packet.first()? >> 4 {
        4 => {
            let (src, rest) = packet.get(12..)?.split_first_chunk::<4>()?;
            Some(((*src).into(), (*rest.first_chunk::<4>()?).into()))
        }
        6 => {
            let (src, rest) = packet.get(8..)?.split_first_chunk::<16>()?;
            Some(((*src).into(), (*rest.first_chunk::<16>()?).into()))
        }
        _ => None,
    }
}
